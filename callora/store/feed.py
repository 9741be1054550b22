"""The feed: what closed of a user's usage, each event once, at a position that never changes.

Calls write nothing for it. A pass is one database transaction under the locks of the feeds that it keeps, and one
statement in it. Events are found by their ids, vault by vault: a UUIDv7 tells when it was made, and TRAIL later its
event is there or will never be, unless a transaction of ours is slow, or the id is an old one, of a charge over REST
that is tried again; such a one is noted before it is placed (`note_late`). What is seen open is noted as well, and
looked at by its id from then on. So nothing that closes late is missed, a pass that is repeated or cut off changes
nothing, and no event has two positions: the feed's own key would refuse it.

Most passes look at the latest ids alone; one every FULL looks at all that are not final. A feed that nobody listened to
for a while is caught up in steps; one that was left alone for longer than its events are kept begins anew.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.ledger.ids import LAST_ID, EventId, UserId, VaultId, least_id, made_at
from callora.store.bridge import Connection, Database, Row
from callora.store.reads.calls import ID_SLACK, least_id_sql
from callora.store.rollup import BY_INDEX, SETTLE, SLOW_SECONDS, has_slow

TRAIL: Final = ID_SLACK + SETTLE
"""How old an id is when its event is final, or held."""
LATE: Final = ID_SLACK / 2
"""An id this old is noted before its event is placed."""
QUICK: Final = timedelta(seconds=10)
"""How far before the last pass a quick one looks."""
FULL: Final = timedelta(seconds=15)
"""How often a pass looks at everything that is not final."""
BEHIND: Final = timedelta(minutes=10)
"""A feed further behind is caught up in steps."""
HOLD_MAX: Final = timedelta(days=1, minutes=5)
"""No hold is open for longer."""
STEP_EVENTS: Final = 2000
"""Events of a vault in one step."""
FORGET_BATCH: Final = 10_000
OPEN_KEPT: Final = timedelta(days=2)
"""What is noted as open is forgotten after: no hold lasts longer than a day."""

_BEGIN: Final = """
INSERT INTO usage_feeds (user_id, done_until, as_of)
SELECT user_id, $2, $2 FROM users WHERE user_id = ANY ($1::uuid[]) ORDER BY user_id
ON CONFLICT (user_id) DO NOTHING RETURNING user_id
"""

_STALE: Final = """
SELECT user_id FROM usage_feeds WHERE user_id = ANY ($1::uuid[]) AND done_until < $2 ORDER BY user_id FOR UPDATE
"""

_BEGIN_ANEW: Final = """
WITH closed AS (
    DELETE FROM usage_feed_open o USING vaults v, usage_events u
    WHERE v.user_id = ANY ($1::uuid[]) AND o.vault_id = v.vault_id
        AND u.vault_id = o.vault_id AND u.event_id = o.event_id AND u.state <> 'held'
)
UPDATE usage_feeds SET position = position + 1, since = position + 1, done_until = $2, as_of = $2, told = NULL
WHERE user_id = ANY ($1::uuid[])
"""

# The rollup knows which holds were open when their minute became final, and looks anew at every later minute: together
# that is every open hold, whatever its age, without a look at a day of calls.
_OPEN: Final = f"""
INSERT INTO usage_feed_open (vault_id, event_id, noted_at)
SELECT o.vault_id, o.event_id, $2::timestamptz FROM vaults v JOIN usage_open o ON o.vault_id = v.vault_id
WHERE v.user_id = ANY ($1::uuid[])
UNION
SELECT u.vault_id, u.event_id, $2 FROM vaults v JOIN usage_events u ON u.vault_id = v.vault_id
WHERE v.user_id = ANY ($1::uuid[]) AND u.state = 'held' AND u.event_id < $3::uuid
    AND u.event_id >= (
        SELECT {least_id_sql("greatest(done_until, $4::timestamptz) - $5::interval")} FROM usage_rollup
    )
ON CONFLICT DO NOTHING
"""  # noqa: S608 - names of ours

_LOCK: Final = """
SELECT user_id, done_until, as_of FROM usage_feeds
WHERE user_id = ANY ($1::uuid[]) AND as_of <= $2 ORDER BY user_id FOR UPDATE SKIP LOCKED
"""

_STEP: Final = """
SELECT min(s.event_id::text) FROM vaults v CROSS JOIN LATERAL (
    SELECT event_id FROM usage_events u WHERE u.vault_id = v.vault_id AND u.event_id >= $2 AND u.event_id < $3
    ORDER BY u.event_id OFFSET $4 LIMIT 1
) AS s WHERE v.user_id = $1
"""

# A feed in which nothing is new is not written each time; that its next look goes a little further back does no harm.
_KEEP: Final = """
WITH feeds AS MATERIALIZED (
    SELECT w.*, s.position
    FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::timestamptz[], $5::timestamptz[])
        AS w (user_id, since, until, final, as_of)
    JOIN usage_feeds s ON s.user_id = w.user_id
), own AS MATERIALIZED (
    SELECT f.user_id, f.since, f.until, v.vault_id FROM feeds f JOIN vaults v ON v.user_id = f.user_id
), seen AS MATERIALIZED (
    SELECT o.user_id, u.vault_id, u.event_id, u.state, u.closed_at
    FROM own o CROSS JOIN LATERAL (
        SELECT vault_id, event_id, state, closed_at FROM usage_events
        WHERE vault_id = o.vault_id AND event_id >= o.since AND event_id < o.until
        OFFSET 0
    ) AS u
), ended AS (
    DELETE FROM usage_feed_open p USING own o, usage_events u
    WHERE p.vault_id = o.vault_id AND u.vault_id = p.vault_id AND u.event_id = p.event_id AND u.state <> 'held'
    RETURNING o.user_id, u.vault_id, u.event_id, u.closed_at
), fresh AS (
    SELECT n.* FROM (
        SELECT user_id, vault_id, event_id, closed_at FROM seen WHERE state <> 'held'
        UNION
        SELECT user_id, vault_id, event_id, closed_at FROM ended
    ) AS n
    WHERE NOT EXISTS (SELECT FROM usage_feed k WHERE k.user_id = n.user_id AND k.event_id = n.event_id)
), added AS (
    INSERT INTO usage_feed (user_id, position, vault_id, event_id, fed_at)
    SELECT n.user_id, f.position + row_number() OVER (PARTITION BY n.user_id ORDER BY n.closed_at, n.event_id),
           n.vault_id, n.event_id, $6
    FROM fresh n JOIN feeds f ON f.user_id = n.user_id
    RETURNING user_id
), opened AS (
    INSERT INTO usage_feed_open (vault_id, event_id, noted_at)
    SELECT vault_id, event_id, $6 FROM seen WHERE state = 'held'
    ON CONFLICT DO NOTHING
), counted AS (
    SELECT user_id, count(*) AS events FROM added GROUP BY user_id
), moved AS (
    UPDATE usage_feeds s SET position = s.position + coalesce(c.events, 0), done_until = f.final, as_of = f.as_of
    FROM feeds f LEFT JOIN counted c ON c.user_id = f.user_id
    WHERE s.user_id = f.user_id
        AND (c.events > 0 OR f.final <> s.done_until OR f.as_of >= s.as_of + interval '5 seconds')
)
SELECT coalesce(sum(events), 0)::bigint FROM counted
"""

_NOTE_LATE: Final = """
INSERT INTO usage_feed_open (vault_id, event_id, noted_at) VALUES ($1, $2, $3)
ON CONFLICT (vault_id, event_id) DO UPDATE SET noted_at = excluded.noted_at
"""

# The latest of each feed stays, as the place that one goes on from to whom nothing has happened for a while.
_FORGET: Final = """
WITH old AS MATERIALIZED (
    SELECT f.user_id, f.position FROM usage_feed f JOIN usage_feeds s ON s.user_id = f.user_id
    WHERE f.fed_at < $1 AND f.position < s.position AND (s.told IS NULL OR f.position <= s.told)
    LIMIT $2
)
DELETE FROM usage_feed f USING old o WHERE f.user_id = o.user_id AND f.position = o.position
"""

_FORGET_OPEN: Final = """
DELETE FROM usage_feed_open o WHERE o.noted_at < $1
    AND NOT EXISTS (SELECT FROM usage_events u
                    WHERE u.vault_id = o.vault_id AND u.event_id = o.event_id AND u.state = 'held')
"""


@attrs.frozen
class Passed:
    """What a pass came to."""

    feeds: int
    """How many were kept by it; the others are in another process's hands, or were looked at a moment ago."""
    events: int
    """New in them."""
    behind: bool
    """Whether there is more to find at once."""


async def begin(database: Database, user_ids: Iterable[UserId], now: datetime, kept: timedelta) -> None:
    """See that users have feeds that go on from somewhere; who has one keeps it, unless it was left alone too long.

    Args:
        kept: how long a feed's events are kept.

    Raises:
        StoreUnavailable: nothing was changed. OutcomeUnknown: doing it again is safe.
    """
    async with database.transaction() as connection:
        await connection.execute(BY_INDEX)
        wanted = list(user_ids)
        made = await connection.fetch(_BEGIN, wanted, now - TRAIL)
        stale = await connection.fetch(_STALE, wanted, now - kept)
        if stale:
            await connection.execute(_BEGIN_ANEW, [row["user_id"] for row in stale], now - TRAIL)
        if begun := [row["user_id"] for row in (*made, *stale)]:
            oldest = now - HOLD_MAX
            await connection.execute(_OPEN, begun, now, least_id(now - TRAIL), oldest, ID_SLACK)


async def advance(
    database: Database,
    user_ids: Iterable[UserId],
    now: datetime,
    *,
    fresh: timedelta = timedelta(0),
    slow_seconds: float = SLOW_SECONDS,
) -> Passed:
    """Make one pass over feeds that have begun, but for those that another process is at.

    Args:
        fresh: a feed that was looked at within this time is left alone; another clock's may be ahead.
        slow_seconds: the age of a transaction of ours that keeps ids from being final.

    Raises:
        StoreUnavailable, StoreConflict: nothing was changed.
        OutcomeUnknown: the pass was made whole, or not at all; the next makes up for it.

    Cancellation: the pass is not made.
    """
    async with database.transaction() as connection:
        await connection.execute(BY_INDEX)
        rows = await connection.fetch(_LOCK, list(user_ids), now - fresh if fresh else now + timedelta(days=1))
        if not rows:
            return Passed(0, 0, False)
        full = any(now - row["done_until"] > TRAIL + FULL for row in rows)
        # Asked before the pass's statement looks: what began later makes its ids later.
        slow = full and await has_slow(connection, slow_seconds)
        looks = [await _look(connection, row, now, slow=slow) for row in rows]
        events: int = await connection.fetch_value(
            _KEEP,
            [row["user_id"] for row in rows],
            [look.since for look in looks],
            [look.until for look in looks],
            [look.final for look in looks],
            [look.as_of for look in looks],
            now,
        )
        return Passed(len(rows), events, any(look.behind for look in looks))


@attrs.frozen
class _Look:
    """What of a user's events a pass looks at."""

    since: EventId
    until: EventId
    final: datetime
    as_of: datetime
    behind: bool


async def _look(connection: Connection, row: Row, now: datetime, *, slow: bool) -> _Look:
    done_until: datetime = row["done_until"]
    if now - done_until <= TRAIL + FULL:
        since = max(done_until, row["as_of"] - QUICK)
        return _Look(least_id(since), LAST_ID, done_until, now, behind=False)
    since_id = least_id(done_until)
    if now - done_until > BEHIND:
        found = await connection.fetch_value(_STEP, row["user_id"], since_id, least_id(now - TRAIL), STEP_EVENTS)
        if found is not None:
            # Whole milliseconds, and at least one of them
            reached = max(made_at(EventId(found)), done_until + timedelta(milliseconds=1))
            final = done_until if slow else reached
            return _Look(since_id, least_id(reached), final, max(final, row["as_of"]), behind=not slow)
    final = done_until if slow else max(done_until, now - TRAIL)
    return _Look(since_id, LAST_ID, final, now, behind=False)


async def note_late(database: Database, vault_id: VaultId, event_id: EventId, now: datetime) -> None:
    """Note, before an event is placed, that its id is older than passes look back; nothing where it is not.

    Raises:
        StoreUnavailable, OutcomeUnknown: it may be noted; the event must not be placed then.
    """
    if now - made_at(event_id) > LATE:
        await database.execute(_NOTE_LATE, vault_id, event_id, now)


async def forget(database: Database, now: datetime, kept: timedelta) -> None:
    """Delete what is kept no longer."""
    full = f"DELETE {FORGET_BATCH}"
    while await database.execute(_FORGET, now - kept - TRAIL, FORGET_BATCH) == full:
        pass
    await database.execute(_FORGET_OPEN, now - OPEN_KEPT)
