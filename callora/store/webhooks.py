"""Webhooks as they are stored: endpoints, and the deliveries that are made of the outbox for them.

Whoever changes which deliveries of an endpoint are due has locked its row: who makes deliveries of new events, who
notes what became of some, who asks for one again. An endpoint is delivered to by whoever has claimed it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import attrs

from callora.ledger.ids import DeveloperId, UserId
from callora.ledger.webhooks import ENDPOINTS_MAX, RetryPolicy
from callora.store.bridge import Connection, Database, Row

State = Literal["delivered", "dead", "pending"]

RELEASED: Final = 16
"""How many deliveries of one lane are due at once, at most: they are made one after the other."""

# --- endpoints --------------------------------------------------------------------------------------------------------

_LOCK_USER: Final = "SELECT FROM users WHERE user_id = $1 FOR NO KEY UPDATE"
_COUNT: Final = "SELECT count(*) FROM webhook_endpoints WHERE user_id = $1 AND deleted_at IS NULL"
_ADD: Final = """
INSERT INTO webhook_endpoints (endpoint_id, user_id, url, description, events, retries_max, base_delay_ms, created_at,
                               updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
"""

_LOCK: Final = """
SELECT true FROM webhook_endpoints WHERE endpoint_id = $1 AND user_id = $2 AND deleted_at IS NULL FOR NO KEY UPDATE
"""

# What is enabled again begins anew, with what was left.
_CHANGE: Final = """
UPDATE webhook_endpoints SET
    url = coalesce($3, url), description = CASE WHEN $4 THEN $5 ELSE description END, events = coalesce($6, events),
    retries_max = coalesce($7, retries_max), base_delay_ms = coalesce($8, base_delay_ms),
    disabled_at = CASE WHEN $9 THEN coalesce(disabled_at, $10) WHEN NOT $9 THEN NULL ELSE disabled_at END,
    disabled_why = CASE WHEN $9 THEN coalesce(disabled_why, 'asked') WHEN NOT $9 THEN NULL ELSE disabled_why END,
    failures = CASE WHEN NOT $9 OR $3 IS NOT NULL THEN 0 ELSE failures END,
    failing_since = CASE WHEN NOT $9 OR $3 IS NOT NULL THEN NULL ELSE failing_since END,
    due_at = CASE WHEN NOT $9 OR $3 IS NOT NULL
        THEN (SELECT min(d.due_at) FROM webhook_deliveries d WHERE d.endpoint_id = $1 AND d.due_at IS NOT NULL)
        ELSE due_at END,
    updated_at = $10
WHERE endpoint_id = $1 AND user_id = $2
"""

# While it was disabled the first of a lane may have been forgotten, and what came after it waits for nobody.
_BEGIN_LANES: Final = """
UPDATE webhook_deliveries SET due_at = $2
WHERE due_at IS NULL AND delivery_id IN (
    SELECT DISTINCT ON (lane) delivery_id FROM webhook_deliveries
    WHERE endpoint_id = $1 AND state = 'pending' ORDER BY lane, position)
"""

_DELETE: Final = """
UPDATE webhook_endpoints SET deleted_at = $3, updated_at = $3
WHERE endpoint_id = $1 AND user_id = $2 AND deleted_at IS NULL RETURNING true
"""

_ROTATE: Final = """
UPDATE webhook_endpoints SET generation = generation + 1, previous_until = $3, updated_at = $4
WHERE endpoint_id = $1 AND user_id = $2 AND deleted_at IS NULL RETURNING generation
"""


@attrs.frozen
class NewEndpoint:
    """An endpoint as it is asked for."""

    endpoint_id: str
    user_id: UserId
    url: str
    description: str | None
    events: Sequence[str]
    """Types of the outbox."""
    policy: RetryPolicy


@attrs.frozen
class EndpointChange:
    """What is to change; None leaves as it is."""

    url: str | None = None
    description: str | None = None
    clears_description: bool = False
    events: Sequence[str] | None = None
    retries_max: int | None = None
    base_delay_ms: int | None = None
    disabled: bool | None = None


async def add_endpoint(database: Database, endpoint: NewEndpoint, now: datetime) -> bool:
    """Store an endpoint; return False where its user has ENDPOINTS_MAX."""
    async with database.transaction() as connection:
        await connection.execute(_LOCK_USER, endpoint.user_id)
        if await connection.fetch_value(_COUNT, endpoint.user_id) >= ENDPOINTS_MAX:
            return False
        await connection.execute(
            _ADD,
            endpoint.endpoint_id,
            endpoint.user_id,
            endpoint.url,
            endpoint.description,
            list(endpoint.events),
            endpoint.policy.retries_max,
            endpoint.policy.base_delay_ms,
            now,
        )
    return True


async def change_endpoint(
    database: Database, endpoint_id: str, user_id: UserId, change: EndpointChange, now: datetime
) -> bool:
    """Change a user's endpoint; return False where he has none of this id."""
    async with database.transaction() as connection:
        if not await connection.fetch_value(_LOCK, endpoint_id, user_id):
            return False
        if change.disabled is False:
            await connection.execute(_BEGIN_LANES, endpoint_id, now)
        await connection.execute(
            _CHANGE,
            endpoint_id,
            user_id,
            change.url,
            change.clears_description or change.description is not None,
            change.description,
            None if change.events is None else list(change.events),
            change.retries_max,
            change.base_delay_ms,
            change.disabled,
            now,
        )
    return True


async def delete_endpoint(database: Database, endpoint_id: str, user_id: UserId, now: datetime) -> bool:
    """Take an endpoint away; return False where the user has none of this id. Its rows go later."""
    return bool(await database.fetch_value(_DELETE, endpoint_id, user_id, now))


async def rotate_secret(
    database: Database, endpoint_id: str, user_id: UserId, previous_until: datetime, now: datetime
) -> int | None:
    """Give an endpoint its next secret; return its generation, None where the user has no such endpoint."""
    generation: int | None = await database.fetch_value(_ROTATE, endpoint_id, user_id, previous_until, now)
    return generation


# --- from the outbox to deliveries ------------------------------------------------------------------------------------

_QUEUED: Final = "SELECT EXISTS (SELECT FROM outbox_queue)"
_TAKE_TURN: Final = "SELECT true FROM webhook_fanout FOR UPDATE SKIP LOCKED"
_TAKE: Final = """
DELETE FROM outbox_queue WHERE position IN (SELECT position FROM outbox_queue ORDER BY position LIMIT $1)
RETURNING position, event_id
"""
_LOCK_WANTING: Final = """
SELECT w.endpoint_id FROM webhook_endpoints w
WHERE w.deleted_at IS NULL AND w.user_id IN (SELECT o.user_id FROM outbox o WHERE o.event_id = ANY ($1))
ORDER BY w.endpoint_id FOR NO KEY UPDATE
"""

# A lane is what the events are about: the first id in their subject, so that all that is told of a settlement, or of a
# vault, comes in the order in which it happened.
_FAN_OUT: Final = r"""
WITH wanted AS (
    SELECT w.endpoint_id, o.event_id, o.created_at, t.number,
           coalesce(substring(o.subject FROM '[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}'), o.subject) AS lane
    FROM unnest($1::uuid[]) WITH ORDINALITY AS t (event_id, number)
    JOIN outbox o ON o.event_id = t.event_id JOIN webhook_endpoints w ON w.user_id = o.user_id
    WHERE w.endpoint_id = ANY ($2) AND w.disabled_at IS NULL AND w.deleted_at IS NULL
        AND o.type = ANY (w.events) AND o.created_at >= w.created_at
), numbered AS (
    SELECT *, row_number() OVER (PARTITION BY endpoint_id, lane ORDER BY number) AS place FROM wanted
), made AS (
    INSERT INTO webhook_deliveries (endpoint_id, event_id, lane, created_at, due_at)
    SELECT n.endpoint_id, n.event_id, n.lane, n.created_at,
           CASE WHEN n.place <= $4 AND NOT EXISTS (
               SELECT FROM webhook_deliveries p
               WHERE p.endpoint_id = n.endpoint_id AND p.lane = n.lane AND p.state = 'pending') THEN $3::timestamptz END
    FROM numbered n ORDER BY n.number
    RETURNING endpoint_id, due_at
), woken AS (
    UPDATE webhook_endpoints w SET due_at = least(w.due_at, m.due_at)
    FROM (SELECT endpoint_id, min(due_at) AS due_at FROM made GROUP BY endpoint_id) AS m
    WHERE w.endpoint_id = m.endpoint_id AND m.due_at IS NOT NULL AND w.failures = 0
        AND (w.due_at <= m.due_at) IS NOT TRUE
), kept AS (
    UPDATE webhook_endpoints w SET due_at = m.due_at
    FROM (SELECT endpoint_id, min(due_at) AS due_at FROM made GROUP BY endpoint_id) AS m
    WHERE w.endpoint_id = m.endpoint_id AND w.failures > 0 AND w.due_at IS NULL
)
SELECT count(*) FROM made
"""


@attrs.frozen
class FannedOut:
    """What one pass did."""

    events: int
    """Taken from the queue."""
    deliveries: int


async def fan_out(database: Database, limit: int, now: datetime) -> FannedOut | None:
    """Make deliveries of the oldest queued events, in one database transaction; None where another process does.

    An event goes to the endpoints that its user has, which want its type and were made before it.
    """
    if not await database.fetch_value(_QUEUED):
        return FannedOut(0, 0)
    async with database.transaction() as connection:
        if await connection.fetch_value(_TAKE_TURN) is None:
            return None
        queued = await connection.fetch(_TAKE, limit)
        taken = [row["event_id"] for row in sorted(queued, key=lambda row: int(row["position"]))]
        wanting = [row["endpoint_id"] for row in await connection.fetch(_LOCK_WANTING, taken)]
        made = await connection.fetch_value(_FAN_OUT, taken, wanting, now, RELEASED) if wanting else 0
    return FannedOut(len(taken), made)


# --- delivering -------------------------------------------------------------------------------------------------------

# A lease is told by the database's clock, which all processes share.
_CLAIM: Final = """
UPDATE webhook_endpoints SET claimed_by = $1, claimed_until = clock_timestamp() + $2::float8 * interval '1 second'
WHERE endpoint_id IN (
    SELECT endpoint_id FROM webhook_endpoints
    WHERE due_at <= $3 AND disabled_at IS NULL AND deleted_at IS NULL AND (failures > 0) = $4
        AND (claimed_until IS NULL OR claimed_until < clock_timestamp())
    ORDER BY due_at LIMIT $5 FOR NO KEY UPDATE SKIP LOCKED)
RETURNING endpoint_id, url, generation, previous_until, retries_max, base_delay_ms, failures,
          failing_since
"""

_LOCK_CLAIMED: Final = """
SELECT true FROM webhook_endpoints WHERE endpoint_id = $1 AND claimed_by = $2 FOR NO KEY UPDATE
"""

_BATCH: Final = """
SELECT d.delivery_id, d.event_id, d.lane, d.attempts, o.type, o.payload::text AS payload, o.created_at, v.developer_id
FROM webhook_deliveries d JOIN outbox o ON o.event_id = d.event_id LEFT JOIN developers v ON v.user_id = o.user_id
WHERE d.endpoint_id = $1 AND d.due_at <= $2 ORDER BY d.due_at, d.position LIMIT $3
"""

_NOTE: Final = """
UPDATE webhook_deliveries d
SET state = r.state, attempts = d.attempts + 1, due_at = r.due_at, last_at = $9, last_status = r.status,
    last_error = r.error, last_ms = r.ms, closed_at = CASE WHEN r.state <> 'pending' THEN $9::timestamptz END
FROM unnest($2::uuid[], $3::int[], $4::text[], $5::timestamptz[], $6::int[], $7::text[], $8::int[])
         AS r (delivery_id, attempts, state, due_at, status, error, ms)
WHERE d.delivery_id = r.delivery_id AND d.endpoint_id = $1 AND d.state = 'pending' AND d.attempts = r.attempts
"""

_KEEP_BACK: Final = """
UPDATE webhook_deliveries SET due_at = NULL
WHERE endpoint_id = $1 AND lane = ANY ($2) AND state = 'pending' AND due_at IS NOT NULL
    AND delivery_id <> ALL ($3::uuid[])
"""

_RELEASE: Final = """
UPDATE webhook_deliveries SET due_at = $3
WHERE due_at IS NULL AND delivery_id IN (
    SELECT n.delivery_id FROM unnest($2::text[]) AS l (lane) CROSS JOIN LATERAL (
        SELECT d.delivery_id FROM webhook_deliveries d
        WHERE d.endpoint_id = $1 AND d.lane = l.lane AND d.state = 'pending' ORDER BY d.position LIMIT $4) AS n)
"""

_END_TURN: Final = """
UPDATE webhook_endpoints SET
    due_at = (SELECT CASE WHEN min(d.due_at) IS NOT NULL THEN greatest(min(d.due_at), $2) END
              FROM webhook_deliveries d WHERE d.endpoint_id = $1 AND d.due_at IS NOT NULL),
    failures = $3,
    failing_since = CASE WHEN $6 THEN NULL WHEN NOT $6 THEN coalesce(failing_since, $4) ELSE failing_since END,
    disabled_at = CASE WHEN $5::text IS NOT NULL THEN coalesce(disabled_at, $4) ELSE disabled_at END,
    disabled_why = coalesce(disabled_why, $5), claimed_by = NULL, claimed_until = NULL
WHERE endpoint_id = $1
"""


@attrs.frozen
class Claimed:
    """An endpoint that is this process's to deliver to, and how."""

    endpoint_id: str
    url: str
    generation: int
    previous_until: datetime | None
    policy: RetryPolicy
    failures: int
    """Attempts in a row that had no answer, or a slow one."""
    failing_since: datetime | None
    """Since when it has taken nothing of what it was told."""


@attrs.frozen
class Delivery:
    """What is to be told."""

    delivery_id: str
    event_id: str
    lane: str
    attempts: int
    """Made so far."""
    type: str
    payload: Mapping[str, object]
    created_at: datetime
    developer_id: DeveloperId | None


@attrs.frozen
class Result:
    """What one attempt came to."""

    delivery: Delivery
    state: State
    due_at: datetime | None
    """When it is tried again; only where it is pending."""
    status: int | None
    error: str | None
    """1 to 300 characters."""
    milliseconds: int


@attrs.frozen
class TurnEnd:
    """How a turn leaves its endpoint."""

    failures: int
    """Attempts in a row that had no answer, or a slow one."""
    took: bool | None
    """Whether it took anything; None where nothing was tried."""
    not_before: datetime | None = None
    """Until when it is left alone, whatever is due."""
    disabled_why: Literal["gone", "failing"] | None = None


async def claim(
    database: Database, claimant: str, lease_seconds: float, now: datetime, *, failing: bool, limit: int
) -> Sequence[Claimed]:
    """Claim endpoints that have something due, those that wait longest first.

    Args:
        failing: those that at last did not answer, or only slowly; or the others.
    """
    rows = await database.fetch(_CLAIM, claimant, lease_seconds, now, failing, limit)
    return [
        Claimed(
            endpoint_id=str(row["endpoint_id"]),
            url=row["url"],
            generation=row["generation"],
            previous_until=row["previous_until"],
            policy=RetryPolicy(row["retries_max"], row["base_delay_ms"]),
            failures=row["failures"],
            failing_since=row["failing_since"],
        )
        for row in rows
    ]


async def due(connection: Connection | Database, endpoint_id: str, now: datetime, limit: int) -> Sequence[Delivery]:
    """Return what an endpoint is to be told next, in order."""
    return [_delivery(row) for row in await connection.fetch(_BATCH, endpoint_id, now, limit)]


async def note(
    database: Database,
    endpoint_id: str,
    claimant: str,
    results: Sequence[Result],
    now: datetime,
    *,
    end: TurnEnd | None,
    limit: int,
) -> Sequence[Delivery] | None:
    """Note what attempts came to; return what is due next, nothing at a turn's end.

    Where an attempt is to be made again, what comes after it in its lane is kept back; where one is over, released.

    Args:
        end: what to leave the endpoint with; None: the turn goes on.

    Returns:
        None where the endpoint is no longer this claimant's: nothing was noted.
    """
    async with database.transaction() as connection:
        if not await connection.fetch_value(_LOCK_CLAIMED, endpoint_id, claimant):
            return None
        if results:
            await _note(connection, endpoint_id, results, now)
        if end is None:
            return await due(connection, endpoint_id, now, limit)
        await connection.execute(_END_TURN, endpoint_id, end.not_before, end.failures, now, end.disabled_why, end.took)
    return ()


async def _note(connection: Connection, endpoint_id: str, results: Sequence[Result], now: datetime) -> None:
    await connection.execute(
        _NOTE,
        endpoint_id,
        [each.delivery.delivery_id for each in results],
        [each.delivery.attempts for each in results],
        [each.state for each in results],
        [each.due_at for each in results],
        [each.status for each in results],
        [each.error for each in results],
        [each.milliseconds for each in results],
        now,
    )
    again = {each.delivery.lane: each.delivery.delivery_id for each in results if each.state == "pending"}
    over = {each.delivery.lane for each in results} - again.keys()
    if again:
        await connection.execute(_KEEP_BACK, endpoint_id, list(again), list(again.values()))
    if over:
        await connection.execute(_RELEASE, endpoint_id, list(over), now, RELEASED)


def _delivery(row: Row) -> Delivery:
    developer_id = row["developer_id"]
    payload: dict[str, Any] = json.loads(row["payload"])
    return Delivery(
        delivery_id=str(row["delivery_id"]),
        event_id=str(row["event_id"]),
        lane=row["lane"],
        attempts=row["attempts"],
        type=row["type"],
        payload=payload,
        created_at=row["created_at"],
        developer_id=None if developer_id is None else DeveloperId(str(developer_id)),
    )


# --- again, and no more -----------------------------------------------------------------------------------------------

_FIND: Final = """
SELECT w.endpoint_id, w.disabled_at IS NOT NULL AS disabled
FROM webhook_deliveries d JOIN webhook_endpoints w ON w.endpoint_id = d.endpoint_id
WHERE d.delivery_id = $1 AND w.user_id = $2 AND w.deleted_at IS NULL
FOR NO KEY UPDATE OF w
"""

_REPLAY: Final = """
UPDATE webhook_deliveries d
SET state = 'pending', attempts = 0, closed_at = NULL,
    position = nextval(pg_get_serial_sequence('webhook_deliveries', 'position')),
    due_at = CASE WHEN NOT EXISTS (SELECT FROM webhook_deliveries p
                                   WHERE p.endpoint_id = d.endpoint_id AND p.lane = d.lane AND p.state = 'pending')
                  THEN $2::timestamptz END
WHERE d.delivery_id = $1 AND d.state <> 'pending' RETURNING due_at IS NOT NULL
"""

_WAKE: Final = "UPDATE webhook_endpoints SET due_at = least(due_at, $2) WHERE endpoint_id = $1"

_FORGET_CLOSED: Final = """
DELETE FROM webhook_deliveries WHERE delivery_id IN (
    SELECT delivery_id FROM webhook_deliveries WHERE closed_at < $1 ORDER BY closed_at LIMIT $2)
"""

_FORGET_LEFT: Final = """
DELETE FROM webhook_deliveries WHERE delivery_id IN (
    SELECT d.delivery_id FROM webhook_endpoints w JOIN webhook_deliveries d ON d.endpoint_id = w.endpoint_id
    WHERE w.deleted_at < $1 OR (w.disabled_at < $2 AND d.created_at < $2) LIMIT $3)
"""

_FORGET_ENDPOINTS: Final = """
DELETE FROM webhook_endpoints w WHERE w.deleted_at < $1
    AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.endpoint_id = w.endpoint_id)
"""

_FORGET_EVENTS: Final = """
DELETE FROM outbox WHERE event_id IN (
    SELECT o.event_id FROM outbox o WHERE o.type = 'usage_event_created' AND o.created_at < $1
        AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.event_id = o.event_id)
        AND NOT EXISTS (SELECT FROM outbox_queue q WHERE q.event_id = o.event_id)
    ORDER BY o.created_at LIMIT $2)
"""


@attrs.frozen
class Replayed:
    """The delivery is made again, from its first attempt on."""


@attrs.frozen
class DeliveryMissing:
    """The user has no such delivery."""


@attrs.frozen
class StillPending:
    """It is on its way already."""


@attrs.frozen
class EndpointDisabled:
    """Its endpoint takes nothing."""


async def replay(
    database: Database, delivery_id: str, user_id: UserId, now: datetime
) -> Replayed | DeliveryMissing | StillPending | EndpointDisabled:
    """Have a delivery made again that is delivered or dead, after what is pending of its lane."""
    async with database.transaction() as connection:
        row = await connection.fetch_row(_FIND, delivery_id, user_id)
        if row is None:
            return DeliveryMissing()
        if row["disabled"]:
            return EndpointDisabled()
        first = await connection.fetch_value(_REPLAY, delivery_id, now)
        if first is None:
            return StillPending()
        if first:
            await connection.execute(_WAKE, row["endpoint_id"], now)
    return Replayed()


async def forget(database: Database, before: datetime, deleted_before: datetime, limit: int) -> int:
    """Forget deliveries that are over, and events that nobody needs, from before a moment; return about how many.

    Args:
        deleted_before: endpoints deleted by then go with all that they have.
        limit: rows of a kind.
    """
    forgotten = 0
    for sql, *arguments in (
        (_FORGET_CLOSED, before, limit),
        (_FORGET_LEFT, deleted_before, before, limit),
        (_FORGET_ENDPOINTS, deleted_before),
        (_FORGET_EVENTS, before, limit),
    ):
        forgotten = max(forgotten, int((await database.execute(str(sql), *arguments)).rpartition(" ")[2]))
    return forgotten
