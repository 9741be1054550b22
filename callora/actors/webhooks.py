"""Webhooks: what stands in the outbox is told to the endpoints that want it, at least once and in order.

A pass makes deliveries of new events. An endpoint that has something due is claimed by one process, which gives it a
turn: a task of its own, one request at a time, in the order of what the events are about. At a turn's end everything
is stored, and nothing of the endpoint stays in memory. Turns of endpoints that did not answer, or were slow, have
places of their own, so that they are never waited for by the others.
"""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import Ids
from callora.ledger.webhooks import (
    EVENTS,
    TEST_EVENT,
    Attempt,
    Message,
    RetryPolicy,
    Secrets,
    judge,
    pause_seconds,
    signed_headers,
)
from callora.metrics import Metrics
from callora.outbound.client import Outbound, OutboundFault
from callora.store import webhooks as store
from callora.store.bridge import Database, StatementRejected
from callora.store.webhooks import Claimed, Delivery, Result, TurnEnd

TURNS_MAX: Final = 48
"""Turns at once of endpoints that answer."""
SLOW_TURNS_MAX: Final = 16
"""Turns at once of endpoints that at last did not, or slowly."""
SLOW_SECONDS: Final = 2.0
BATCH: Final = 16
"""Deliveries of a turn that are in memory."""
FAN_OUT: Final = 500
"""Events that one pass makes deliveries of."""
LEASE_SECONDS: Final = 90.0
TURN_SECONDS: Final = 20.0
"""After which no further attempt is begun; an attempt, and storing it, end well within the lease."""
REPLY_BYTES_MAX: Final = 64 * 1024
PAUSE_SECONDS_MAX: Final = 300.0
"""The longest an endpoint is left alone for not answering, whatever single deliveries wait for."""
FAILING_MAX: Final = timedelta(days=5)
"""An endpoint that has taken nothing for so long is disabled."""
DELETED_KEPT: Final = timedelta(hours=1)
"""How long a deleted endpoint's rows stay: longer than any turn or pass."""
FORGET_BATCH: Final = 5000
ERROR_CHARS_MAX: Final = 300


@attrs.frozen
class Told:
    """What one attempt came to, and how long it took."""

    attempt: Attempt
    milliseconds: int


class Teller:
    """Tells one endpoint one thing, once."""

    def __init__(self, outbound: Outbound, secrets: Secrets, clock: Clock, *, seconds_max: float) -> None:
        """Args:
        seconds_max: how long an attempt may take, from connecting to the reply's end.
        """
        self._outbound = outbound
        self._secrets = secrets
        self._clock = clock
        self.seconds_max = seconds_max

    async def tell(
        self, url: str, endpoint_id: str, generation: int, previous_until: datetime | None, message: Message
    ) -> Told:
        """Send a message to an endpoint and return what came of it, whatever that is.

        Cancellation: the endpoint may have taken it.
        """
        now = self._clock.now()
        keys = [self._secrets.raw(endpoint_id, generation)]
        if previous_until is not None and previous_until > now and generation > 1:
            keys.append(self._secrets.raw(endpoint_id, generation - 1))
        started = trio.current_time()
        try:
            reply = await self._outbound.exchange(
                "POST",
                url,
                signed_headers(message, keys, int(now.timestamp())),
                message.body,
                seconds_max=self.seconds_max,
                reply_bytes_max=REPLY_BYTES_MAX,
            )
            attempt = Attempt(reply.status, retry_after_seconds=reply.retry_after_seconds(now))
        except OutboundFault as fault:
            attempt = Attempt(None, f"{fault.kind}: {fault}"[:ERROR_CHARS_MAX])
        except ValueError as error:  # the operator has narrowed what may be called since it was registered
            attempt = Attempt(None, f"blocked: the URL {error}"[:ERROR_CHARS_MAX])
        return Told(attempt, int((trio.current_time() - started) * 1000))


def message_of(delivery: Delivery) -> Message:
    """Return what an endpoint is told: the same bytes at every attempt."""
    return _message(
        EVENTS.get(delivery.type, delivery.type),
        delivery.event_id,
        delivery.delivery_id,
        delivery.created_at,
        delivery.developer_id,
        delivery.payload,
    )


def test_message(ids: Ids, now: datetime) -> Message:
    """Return a message that tells nothing."""
    return _message(TEST_EVENT, ids.uuid7(), ids.uuid7(), now, None, {"message": "This endpoint can be reached"})


def _message(
    event: str, event_id: str, delivery_id: str, at: datetime, developer_id: str | None, data: object
) -> Message:
    document: dict[str, object] = {"event": event, "timestamp": _iso(at)}
    if developer_id is not None:
        document["developerId"] = developer_id
    document["data"] = data
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return Message(event, event_id, delivery_id, body)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Webhooks:
    """Makes deliveries of what is queued, and makes those that are due."""

    def __init__(
        self,
        database: Database,
        teller: Teller,
        clock: Clock,
        ids: Ids,
        random: Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        interval_seconds: float,
        retention_seconds: float,
    ) -> None:
        """Args:
        interval_seconds: how often it is looked for work while there is none.
        retention_seconds: how long deliveries that are over are kept.
        """
        self._database = database
        self._teller = teller
        self._clock = clock
        self._ids = ids
        self._random = random
        self._metrics = metrics
        self._log = log
        self._interval_seconds = interval_seconds
        self._retention = timedelta(seconds=retention_seconds)
        self._running = {False: 0, True: 0}
        self._places = {False: TURNS_MAX, True: SLOW_TURNS_MAX}
        self._woken = trio.Event()
        self._draining = False
        self.ended = trio.Event()
        """Set once nothing is under way and nothing more will be."""

    def drain(self) -> None:
        """Begin nothing more: attempts under way end, the rest is left for the next start, or another process."""
        self._draining = True
        self._woken.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver until drained; a database that is away is asked again.

        Cancellation: attempts under way are cut, and made again once their lease has ended.
        """
        task_status.started()
        async with trio.open_nursery() as turns:
            while not self._draining:
                try:
                    worked = await self._work(turns)
                except (CalloraFault, StatementRejected) as fault:
                    if isinstance(fault, StatementRejected) and not fault.of_older_schema:
                        raise
                    self._log.warning("webhooks_not_looked_at", error=str(fault))
                    worked = False
                if not worked:
                    with trio.move_on_after(self._interval_seconds):
                        await self._woken.wait()
                self._woken = trio.Event()
        self.ended.set()

    async def _work(self, turns: trio.Nursery) -> bool:
        """Make deliveries of what is queued and begin turns where there is a place; return whether there may be more.

        Returns:
            False where only time, or a turn's end, brings more.
        """
        made = await store.fan_out(self._database, FAN_OUT, self._clock.now())
        begun = 0
        for failing, places in self._places.items():
            free = places - self._running[failing]
            if not free or self._draining:
                continue
            claimant = self._ids.uuid7()
            claimed = await store.claim(
                self._database, claimant, LEASE_SECONDS, self._clock.now(), failing=failing, limit=free
            )
            for endpoint in claimed:
                self._running[failing] += 1
                turns.start_soon(self._run_turn, endpoint, claimant, failing)
            begun += len(claimed)
        self._metrics.webhook_turns.set(sum(self._running.values()))
        return made is not None and made.events == FAN_OUT

    async def _run_turn(self, endpoint: Claimed, claimant: str, failing: bool) -> None:
        """Give an endpoint its turn. Whatever goes wrong is this endpoint's alone: its lease ends by itself."""
        try:
            await self._turn(endpoint, claimant, failing)
        except CalloraFault as fault:
            self._log.warning("webhook_turn_lost", endpoint_id=endpoint.endpoint_id, error=str(fault))
        except Exception:
            self._log.exception("webhook_turn_crashed", endpoint_id=endpoint.endpoint_id)
            self._metrics.actor_restarts.inc()
        finally:
            self._running[failing] -= 1
            self._woken.set()

    async def _turn(self, endpoint: Claimed, claimant: str, failing: bool) -> None:
        until = trio.current_time() + TURN_SECONDS
        state = _Turn(endpoint)
        found: Sequence[Delivery] | None = await store.due(
            self._database, endpoint.endpoint_id, self._clock.now(), BATCH
        )
        while found is not None:
            results: list[Result] = []
            for delivery in found:
                if delivery.lane in state.kept_back:
                    continue
                if state.over or self._draining or trio.current_time() >= until:
                    break
                results.append(await self._attempt(endpoint, delivery, state))
            crowded = self._running[failing] >= self._places[failing]
            goes_on = found and not (state.over or crowded or self._draining or trio.current_time() >= until)
            end = None if goes_on else state.end(self._clock.now())
            found = await store.note(
                self._database,
                endpoint.endpoint_id,
                claimant,
                results,
                self._clock.now(),
                end=end,
                limit=BATCH,
            )
            if end is not None:
                return
            state.kept_back.clear()
        self._log.warning("webhook_claim_lost", endpoint_id=endpoint.endpoint_id)

    async def _attempt(self, endpoint: Claimed, delivery: Delivery, state: "_Turn") -> Result:
        told = await self._teller.tell(
            endpoint.url, endpoint.endpoint_id, endpoint.generation, endpoint.previous_until, message_of(delivery)
        )
        attempt, now = told.attempt, self._clock.now()
        verdict = judge(attempt)
        attempts = delivery.attempts + 1
        pause = self._pause(endpoint.policy, attempts, attempt.retry_after_seconds)
        again = verdict == "again" and attempts <= endpoint.policy.retries_max
        if verdict == "delivered":
            state.took = True
            self._metrics.webhook_lag_seconds.observe(max(0.0, (now - delivery.created_at).total_seconds()))
        else:
            state.took = state.took or False
        if again:
            state.kept_back.add(delivery.lane)
        state.gone = state.gone or verdict == "gone"
        if attempt.status is None:
            state.failures += 1
            rest = min(self._pause(endpoint.policy, state.failures, None).total_seconds(), PAUSE_SECONDS_MAX)
            state.not_before = now + timedelta(seconds=rest)
        else:
            state.failures = int(told.milliseconds > SLOW_SECONDS * 1000)
        outcome = "unanswered" if attempt.status is None else verdict
        self._metrics.webhook_attempts.of(outcome).inc()
        if not again and verdict != "delivered":
            self._metrics.webhook_dead.inc()
        return Result(
            delivery=delivery,
            state="delivered" if verdict == "delivered" else "pending" if again else "dead",
            due_at=now + pause if again else None,
            status=attempt.status,
            error=attempt.error,
            milliseconds=told.milliseconds,
        )

    def _pause(self, policy: RetryPolicy, attempts: int, retry_after_seconds: float | None) -> timedelta:
        return timedelta(seconds=pause_seconds(policy, attempts, retry_after_seconds, self._random.random()))

    async def forget(self) -> None:
        """Forget deliveries past their retention, and endpoints that were deleted.

        Raises:
            CalloraFault: some are still there; the next run makes up for it.
        """
        now = self._clock.now()
        while (
            await store.forget(self._database, now - self._retention, now - DELETED_KEPT, FORGET_BATCH) == FORGET_BATCH
        ):
            pass


@attrs.define
class _Turn:
    """What a turn has found out about its endpoint."""

    endpoint: Claimed
    failures: int = attrs.field(init=False)
    took: bool | None = None
    gone: bool = False
    not_before: datetime | None = None
    kept_back: set[str] = attrs.field(factory=set)
    """Lanes whose next delivery waits to be tried again."""

    def __attrs_post_init__(self) -> None:
        self.failures = self.endpoint.failures

    @property
    def over(self) -> bool:
        """Whether the endpoint is to be left alone: gone, silent, or too slow for this place."""
        return self.gone or self.not_before is not None or (self.failures > 0 and self.took is not None)

    def end(self, now: datetime) -> TurnEnd:
        """Return how to leave the endpoint."""
        since = self.endpoint.failing_since
        given_up = self.took is False and since is not None and now - since > FAILING_MAX
        return TurnEnd(
            failures=self.failures,
            took=self.took,
            not_before=self.not_before,
            disabled_why="gone" if self.gone else "failing" if given_up else None,
        )
