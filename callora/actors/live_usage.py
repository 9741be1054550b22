"""Live usage: everyone who follows his own usage as it happens, and the one task that asks for all of them.

PostgreSQL keeps the order of a feed (`store.feed`): whichever process a client comes back to, it goes on after what it
saw last. What is in memory is for those who listen now, and bounded: a follower whose queue is full reads for himself,
page by page, as fast as he takes them; one who does not keep up at all is told so and let go, and comes back for the
rest. Nothing is asked while nobody follows.
"""

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Final, Literal

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import UserId
from callora.ledger.money import format_usdc
from callora.ledger.outcomes import Draining
from callora.metrics import Metrics
from callora.store import feed as store
from callora.store.bridge import Database, Row, StatementRejected
from callora.store.outbox import iso
from callora.store.reads import feed as reads

BATCH: Final = 500
"""Events of one user that are read at once."""
MISSING_MAX: Final = 4
"""Followers who are given what they missed at the same time: each takes a connection to PostgreSQL."""
BYTES_AT_ONCE: Final = 65_536
CURRENT: Final = timedelta(seconds=60)
"""A feed that was looked at within this time is at its end; the clock of whoever looked may differ."""
RECHECK_SECONDS: Final = 5.0
"""How often it is asked whose sessions have ended."""
UNSTARTED_SECONDS_MAX: Final = 30.0
"""A follower whose answer is never begun has gone."""
LATE_SECONDS_MAX: Final = 30.0
"""How long a follower may read what was too much for its queue before it is let go."""
PAUSE_PER_WORK: Final = 9
"""A look that takes long is followed by a pause so many times as long: following takes a tenth of a core at most."""
RETRY_SECONDS: Final = (1.0, 4.0)
"""When those who are sent away at once shall come back: not all at the same time."""

Reason = Literal["draining", "lagged", "session_ended", "token_expired", "restarted"]
"""Why a stream ends. Restarted: the feed was left alone for so long that it began anew."""


@attrs.frozen
class TooMany:
    """No more streams are opened."""

    by: Literal["user", "process"]
    """Whose bound is reached."""
    limit: int


@attrs.frozen
class Placed:
    """Where a follower goes on from; the first that he is told."""

    how: Literal["live", "resumed", "reset"]
    """Reset: what he was told last is not kept any more; some of what came after may never be told."""
    last: str
    """The event before the next one he is told, or START."""


@attrs.frozen
class News:
    """Events, each as it was encoded."""

    blocks: bytes


@attrs.frozen
class Quiet:
    """Nothing has happened for as long as was waited."""


@attrs.frozen
class Ended:
    """The last that a follower is told."""

    reason: Reason
    retry_seconds: float
    """When to come back."""


@attrs.define(eq=False)
class Follower:
    """One stream."""

    user_id: UserId
    feed: "_Feed"
    session_id: str | None
    """Of the token that it was opened with."""
    expires_at: datetime | None
    """When that token ends."""
    last: str | None
    """What its client was told last; None: he begins now."""
    opened_at: float
    """On Trio's clock."""
    state: Literal["asking", "waiting", "missing", "live"]
    """Asking where its last event is; waiting for the present end of the feed; reading what it missed; told at once."""
    reset: bool = False
    """Whether what it was told last is not kept."""
    started: bool = False
    late_since: float | None = None
    """On Trio's clock: since when it reads what was too much for its queue."""
    placed: bool = False
    """Whether it was told where it begins."""
    position: int = 0
    """Of the last event in its queue or told."""
    begins_at: int | None = None
    """Its position when it was put to the feed's end; None where it goes on from what it was told last."""
    queue: deque[bytes] = attrs.field(factory=deque)
    woken: trio.Event = attrs.field(factory=trio.Event)
    ended: Reason | None = None

    def end(self, reason: Reason) -> None:
        """End it; what is in its queue is told before, but to nobody whose login has ended."""
        if self.ended is not None:
            return
        self.ended = reason
        if reason in ("session_ended", "token_expired"):
            self.queue.clear()
        self.woken.set()


@attrs.define(eq=False)
class _Feed:
    """One user's feed, as far as this process has told it."""

    followers: list[Follower] = attrs.field(factory=list)
    begun: bool = False
    """Whether it is known how far it is."""
    position: int = 0
    """What comes after it was told to nobody here."""

    def let_in(self) -> None:
        """Let those who wait for the feed's end hear what comes next."""
        for follower in self.followers:
            if follower.state == "waiting":
                follower.state, follower.position, follower.begins_at = "live", self.position, self.position
                follower.woken.set()


class LiveUsage:
    """All streams of one process."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        random: Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        encode: Callable[[Row], bytes],
        interval_seconds: float,
        heartbeat_seconds: float,
        kept_seconds: float,
        streams_max: int,
        streams_per_user_max: int,
        buffer_events_max: int,
    ) -> None:
        """Args:
        encode: makes of an event what its followers are sent.
        heartbeat_seconds: how long `next` waits.
        kept_seconds: how long what happened can be asked for.
        buffer_events_max: how many events may wait for a follower.
        """
        self._database = database
        self._clock = clock
        self._random = random
        self._metrics = metrics
        self._log = log
        self._encode = encode
        self._interval_seconds = interval_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._kept = timedelta(seconds=kept_seconds)
        self._streams_max = streams_max
        self._per_user_max = streams_per_user_max
        self._buffer_events_max = buffer_events_max
        self._feeds: dict[UserId, _Feed] = {}
        self._streams = 0
        self._draining = False
        self._wanted = trio.Event()
        self._missing = trio.CapacityLimiter(MISSING_MAX)

    @property
    def streams(self) -> int:
        """How many are open."""
        return self._streams

    # What a stream's own task asks. Plain methods wait for nothing.

    def follow(
        self, user_id: UserId, session_id: str | None, expires_at: datetime | None, last: str | None
    ) -> Follower | TooMany | Draining:
        """Open a stream; whoever opens it closes it with `leave`."""
        if self._draining:
            return Draining()
        if self._streams >= self._streams_max:
            return TooMany("process", self._streams_max)
        feed = self._feeds.get(user_id)
        if feed is None:
            feed = _Feed()
        elif len(feed.followers) >= self._per_user_max:
            return TooMany("user", self._per_user_max)
        state: Literal["asking", "waiting"] = "waiting" if last is None else "asking"
        follower = Follower(user_id, feed, session_id, expires_at, last, trio.current_time(), state)
        self._feeds[user_id] = feed
        feed.followers.append(follower)
        self._count(1)
        self._wanted.set()
        return follower

    def leave(self, follower: Follower) -> None:
        """Close a stream. Idempotent."""
        followers = follower.feed.followers
        if follower not in followers:
            return
        followers.remove(follower)
        if not followers:
            del self._feeds[follower.user_id]
        self._count(-1)
        self._metrics.usage_streams_ended.of(follower.ended or "client_gone").inc()

    def close(self) -> None:
        """Open no more streams, and end those that are open."""
        self._draining = True
        for feed in self._feeds.values():
            for follower in feed.followers:
                follower.end("draining")

    async def next(self, follower: Follower) -> Placed | News | Quiet | Ended:
        """Return what a follower is told next.

        Raises:
            StoreUnavailable: what he missed could not be read; he may ask again, or go.

        Cancellation: nothing is lost; the same is told next time.
        """
        follower.started = True
        with trio.move_on_after(self._heartbeat_seconds):
            while True:
                told = await self._look(follower)
                if told is not None:
                    return told
                follower.woken = trio.Event()
                if not (follower.ended or follower.queue):
                    await follower.woken.wait()
        return Quiet()

    async def _look(self, follower: Follower) -> Placed | News | Ended | None:
        """Return what there is to tell, None where that has yet to come."""
        if follower.ended is None and follower.feed.begun and follower.state == "asking":
            await self._find(follower)
        if follower.ended is None and not follower.placed and follower.state in ("missing", "live"):
            return await self._place(follower)
        while follower.ended is None and follower.state == "missing" and not follower.queue:
            await self._read_missed(follower)
        if follower.placed and follower.queue:
            return News(_taken(follower.queue))
        if follower.ended is not None:
            return Ended(follower.ended, self._random.uniform(*RETRY_SECONDS))
        return None

    async def _find(self, follower: Follower) -> None:
        """Find the place of what a follower was told last."""
        assert follower.last is not None
        async with self._missing:
            position = await reads.place_of(self._database, follower.user_id, follower.last)
        if position is None:
            follower.state, follower.reset = "waiting", True
        else:
            follower.state, follower.position = "missing", position

    async def _place(self, follower: Follower) -> Placed:
        if follower.begins_at is None:
            assert follower.last is not None
            follower.placed = True
            return Placed("resumed", follower.last)
        last = await reads.event_at(self._database, follower.user_id, follower.begins_at)
        follower.placed = True
        return Placed("reset" if follower.reset else "live", last or reads.START)

    async def _read_missed(self, follower: Follower) -> None:
        """Give a follower a page of what he missed; after the last he hears what happens with the others."""
        async with self._missing:
            rows = await reads.events_after(self._database, {follower.user_id: follower.position}, BATCH)
        # From here on nothing waits: no event comes between the page and the queue.
        for row in rows:
            follower.queue.append(self._encode(row))
            follower.position = row["position"]
        if len(rows) < BATCH and follower.position >= follower.feed.position:
            follower.state, follower.late_since = "live", None

    # The task that asks for all.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look every interval for what has happened, while anyone follows, until cancelled."""
        task_status.started()
        rechecked = trio.current_time()
        while True:
            if not self._feeds:
                self._metrics.usage_stream_lag_seconds.set(0)
                self._wanted = trio.Event()
                await self._wanted.wait()
            started, behind = trio.current_time(), False
            try:
                behind = await self.look()
                if started - rechecked >= RECHECK_SECONDS:
                    rechecked = started
                    await self.recheck()
            except StatementRejected as error:
                if not error.of_older_schema:
                    raise
                # The schema is an older one, and somebody may be about to migrate: /readyz says so.
                self._log.warning("usage_not_followed", error=str(error))
            except CalloraFault as fault:  # they are told when the database answers again
                self._log.warning("usage_not_followed", error=str(fault))
            took = trio.current_time() - started
            await trio.sleep(0 if behind else max(self._interval_seconds, PAUSE_PER_WORK * took))

    async def look(self) -> bool:
        """Bring the feeds of all followers up to date, and tell them; return whether there is more at once.

        Raises:
            StoreUnavailable, StoreConflict, OutcomeUnknown: what was not told is told by the next look.
        """
        feeds = dict(self._feeds)
        new = [user_id for user_id, feed in feeds.items() if not feed.begun]
        if new:
            await store.begin(self._database, new, self._clock.now(), self._kept)
        fresh = timedelta(seconds=0 if new else self._interval_seconds / 2)
        passed = await store.advance(self._database, feeds, self._clock.now(), fresh=fresh)
        states = await reads.feeds(self._database, list(feeds))
        after: dict[UserId, int] = {}
        for user_id, state in states.items():
            feed = feeds[user_id]
            self._reach(feed, state)
            if feed.position < state.position:
                after[user_id] = feed.position
        more = False
        if after:
            more = self._tell(feeds, after, await reads.events_after(self._database, after, BATCH))
        current = self._clock.now() - CURRENT
        for user_id, state in states.items():
            if feeds[user_id].position == state.position and state.as_of >= current:
                feeds[user_id].let_in()
        return passed.behind or more

    def _reach(self, feed: "_Feed", state: reads.FeedState) -> None:
        """Note how far a feed is, where nobody is to be told what is in it."""
        if feed.begun and feed.position < state.since:
            for follower in feed.followers:
                follower.end("restarted")
            feed.position = state.position
        if not any(follower.state == "live" for follower in feed.followers):
            feed.position = state.position
        if not feed.begun:
            feed.begun = True
            for follower in feed.followers:
                follower.woken.set()

    def _tell(self, feeds: "dict[UserId, _Feed]", after: dict[UserId, int], rows: Sequence[Row]) -> bool:
        found = dict.fromkeys(after, 0)
        oldest = self._clock.now()
        for row in rows:
            user_id = UserId(str(row["user_id"]))
            feed, block = feeds[user_id], self._encode(row)
            found[user_id] += 1
            oldest = min(oldest, row["closed_at"])
            feed.position = row["position"]
            for follower in feed.followers:
                if follower.state == "live" and follower.position < feed.position:
                    self._put(follower, feed.position, block)
        self._metrics.usage_stream_lag_seconds.set(max(0.0, (self._clock.now() - oldest).total_seconds()))
        return any(count == BATCH for count in found.values())

    def _put(self, follower: Follower, position: int, block: bytes) -> None:
        if follower.ended is not None:
            return
        if len(follower.queue) >= self._buffer_events_max:
            # From here on it reads for itself, a page whenever it has taken the one before.
            follower.state, follower.late_since = "missing", trio.current_time()
            return
        follower.position = position
        follower.queue.append(block)
        follower.woken.set()

    async def recheck(self) -> None:
        """End the streams of those whose login has ended, who do not keep up, or who never came for theirs.

        Raises:
            StoreUnavailable: it is asked again.
        """
        now, at = self._clock.now(), trio.current_time()
        followers = [follower for feed in self._feeds.values() for follower in feed.followers]
        for follower in followers:
            if not follower.started and at - follower.opened_at > UNSTARTED_SECONDS_MAX:
                follower.end("lagged")
                self.leave(follower)
            elif follower.late_since is not None and at - follower.late_since > LATE_SECONDS_MAX:
                follower.end("lagged")
            elif follower.expires_at is not None and follower.expires_at <= now:
                follower.end("token_expired")
        asked = {each.session_id for each in followers if each.session_id is not None and each.ended is None}
        if asked:
            alive = await reads.living_sessions(self._database, sorted(asked), now)
            for follower in followers:
                if follower.session_id is not None and follower.session_id not in alive:
                    follower.end("session_ended")

    async def forget(self) -> None:
        """Delete what is kept no longer."""
        await store.forget(self._database, self._clock.now(), self._kept)

    def _count(self, change: int) -> None:
        self._streams += change
        self._metrics.usage_streams.set(self._streams)


def _taken(queue: deque[bytes]) -> bytes:
    """Return what is in a queue, or as much of it as is sent at once."""
    blocks, length = [], 0
    while queue and length < BYTES_AT_ONCE:
        blocks.append(queue.popleft())
        length += len(blocks[-1])
    return b"".join(blocks)


def shown(row: Row) -> dict[str, object]:
    """Return a call as it is told, in the words of `GET /api/usage`, with its vault and its end."""
    return {
        "id": str(row["event_id"]),
        "apiId": row["api_id"],
        "keyId": str(row["api_key_id"]),
        "endpoint": {"id": row["endpoint_id"], "method": row["method"], "path": row["path"]},
        "occurredAt": iso(row["created_at"]),
        "state": row["state"],
        "status": "success" if row["succeeded"] else "error",
        "statusCode": row["status"],
        "outcome": row["outcome"],
        "latencyMs": None if row["latency_us"] is None else row["latency_us"] / 1000,
        "cost_usdc": format_usdc(row["amount"] or 0),
        "refunded_usdc": format_usdc(row["refunded"]),
        "requestBytes": row["request_bytes"],
        "responseBytes": row["response_bytes"],
        "vaultId": str(row["vault_id"]),
        "closedAt": iso(row["closed_at"]),
    }
