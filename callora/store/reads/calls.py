"""Single calls as their owners see them, from usage_events by primary key.

Nothing here reads more than a bounded part of a large vault. A list walks the vault's events from the newest; what
matches seldom is found through the rollup instead: days with a match, their minutes with a match, and the events of
those minutes.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Literal

from callora.ledger.ids import EventId, VaultId, least_id, made_at
from callora.store.bridge import Row
from callora.store.reads.usage import Reading, Scope, rollup_extent
from callora.store.rollup import SUCCEEDED

Status = Literal["success", "error"]

LOOK_EVENTS: Final = 1000
"""Events that a filtered list looks through at once before it asks the rollup."""
ID_SLACK: Final = timedelta(minutes=2)
"""How much older than its event an id may be: it is made before the hold waits for its round."""

_EVENT: Final = f"""u.vault_id, u.event_id, u.api_key_id, u.api_id, u.endpoint_id, u.created_at, u.state, u.amount,
        u.request_bytes, u.response_bytes, u.latency_us, u.status, u.outcome,
        CASE WHEN u.state = 'held' THEN NULL ELSE {SUCCEEDED} END AS succeeded"""

_MATCHES: Final = """u.created_at >= $4 AND u.created_at < $5
        AND ($6::bigint IS NULL OR u.api_id = $6) AND ($7::uuid IS NULL OR u.api_key_id = $7)
        AND ($8::boolean IS NULL OR u.succeeded = $8)"""

_SHOWN: Final = """u.event_id, u.api_key_id, u.api_id, u.endpoint_id, u.created_at, u.state::text AS state, u.amount,
       u.request_bytes, u.response_bytes, u.latency_us, u.status, u.outcome, u.succeeded, e.method, e.path,
       (SELECT coalesce(sum(r.amount), 0)::bigint FROM ledger_entries r
        WHERE r.vault_id = u.vault_id AND r.event_id = u.event_id AND r.kind = 'refund') AS refunded"""

_LOOK: Final = f"""
WITH seen AS MATERIALIZED (
    SELECT {_EVENT} FROM usage_events u
    WHERE u.vault_id = $1 AND u.event_id < $2 AND u.event_id >= $3 ORDER BY u.event_id DESC LIMIT $9
), last AS (
    SELECT count(*) AS looked, (array_agg(event_id ORDER BY event_id))[1] AS reached FROM seen
), shown AS (
    SELECT * FROM seen u WHERE {_MATCHES} ORDER BY event_id DESC LIMIT $10
)
SELECT last.looked, last.reached, {_SHOWN}
FROM last LEFT JOIN shown u ON true LEFT JOIN api_endpoints e ON e.endpoint_id = u.endpoint_id
ORDER BY u.event_id DESC
"""  # noqa: S608 - names of ours

_MATCHING: Final[dict[bool | None, str]] = {None: "calls", True: "calls - failed_calls", False: "failed_calls"}
"""What of a line of the rollup matches: all, what went well, what failed. Spelt out, so that an index can be by it."""


def least_id_sql(moment: str) -> str:
    """Return the SQL of the least id of a moment: `least_id` in the database."""
    return f"(lpad(to_hex((extract(epoch FROM {moment}) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid"


def _later(column: str, apart: str) -> str:
    """Return the window of the rows so much later: past the next one, since ids may be ID_SLACK older than events."""
    return f"ORDER BY {column} DESC RANGE BETWEEN UNBOUNDED PRECEDING AND interval '{apart}' PRECEDING"


def _narrowed_sql(matching: str) -> str:
    """Return the SQL of a list by way of the rollup."""
    return f"""
WITH lines AS MATERIALIZED (
    SELECT day, api_key_id, endpoint_id, {matching} AS matching FROM usage_days
    WHERE vault_id = $1 AND day >= date_trunc('day', $4::timestamptz, 'UTC') AND day < $11::timestamptz
        AND ($6::bigint IS NULL OR api_id = $6) AND ($7::uuid IS NULL OR api_key_id = $7) AND {matching} > 0
), days AS (
    SELECT day, sum(sum(sure)) OVER ({_later("day", "2 days")}) AS later FROM (
        SELECT day, CASE WHEN day >= $4::timestamptz AND day + interval '24 hours' <= least($5::timestamptz, $12)
                         THEN matching ELSE 0 END AS sure
        FROM lines
    ) AS counted GROUP BY day
), minutes AS (
    SELECT minute, sum(sum(sure)) OVER ({_later("minute", "3 minutes")}) AS later FROM (
        SELECT m.minute, CASE WHEN m.minute < $12::timestamptz THEN m.matching ELSE 0 END AS sure
        FROM days JOIN lines l ON l.day = days.day CROSS JOIN LATERAL (
            SELECT minute, {matching} AS matching FROM usage_minutes
            WHERE vault_id = $1 AND api_key_id = l.api_key_id AND endpoint_id = l.endpoint_id
                AND minute >= greatest(l.day, $4) AND minute < least(l.day + interval '24 hours', $5, $11)
                AND {matching} > 0
            OFFSET 0
        ) AS m
        WHERE coalesce(days.later, 0) < $10::bigint
    ) AS counted GROUP BY minute
), found AS (
    SELECT u.* FROM minutes CROSS JOIN LATERAL (
        SELECT {_EVENT} FROM usage_events u
        WHERE u.vault_id = $1 AND u.event_id < $2
            AND u.event_id >= {least_id_sql("minutes.minute - $9::interval")}
            AND u.event_id < {least_id_sql("minutes.minute + interval '1 minute'")}
            AND date_trunc('minute', u.created_at, 'UTC') = minutes.minute  -- not by the BRIN, which is far coarser
        OFFSET 0  -- a minute at a time, never the whole vault at once
    ) AS u
    WHERE coalesce(minutes.later, 0) < $10::bigint
    UNION
    SELECT {_EVENT} FROM usage_open o JOIN usage_events u ON u.vault_id = o.vault_id AND u.event_id = o.event_id
    WHERE o.vault_id = $1 AND o.event_id < $2
), shown AS (
    SELECT * FROM found u WHERE u.event_id >= $3 AND {_MATCHES} ORDER BY event_id DESC LIMIT $10
)
SELECT {_SHOWN} FROM shown u LEFT JOIN api_endpoints e ON e.endpoint_id = u.endpoint_id ORDER BY u.event_id DESC
"""  # noqa: S608 - names of ours


_NARROWED: Final = {succeeded: _narrowed_sql(matching) for succeeded, matching in _MATCHING.items()}


async def events(
    database: Reading,
    scope: Scope,
    status: Status | None,
    before: EventId,
    limit: int,
    look: int = LOOK_EVENTS,
) -> Sequence[Row]:
    """Return at most `limit` events, the newest first.

    Args:
        status: success, error, or both and those still open.
        before: only events with a lesser id.
        limit: > 0.
        look: how many events are looked through at once where there is a filter.
    """
    found: list[Row] = []
    for vault_id in scope.vault_ids:
        found += await _events_of(database, vault_id, scope, status, before, limit, look)
    found.sort(key=lambda row: str(row["event_id"]), reverse=True)
    return found[:limit]


async def _events_of(
    database: Reading, vault_id: VaultId, scope: Scope, status: Status | None, before: EventId, limit: int, look: int
) -> list[Row]:
    succeeded = None if status is None else status == "success"
    filtered = not (scope.api_id is None and scope.api_key_id is None and succeeded is None)
    least = least_id(scope.since - ID_SLACK)
    wanted = scope.since, scope.until, scope.api_id, scope.api_key_id, succeeded
    reached = min(before, least_id(scope.until))
    looked_max = look if filtered else limit
    counted_below: EventId | None = None
    found: list[Row] = []
    while len(found) < limit:
        missing = limit - len(found)
        rows = await database.fetch(_LOOK, vault_id, reached, least, *wanted, looked_max, missing)
        found += (row for row in rows if row["event_id"] is not None)
        if rows[0]["looked"] < looked_max:
            break
        reached = EventId(str(rows[0]["reached"]))
        if filtered and len(found) < limit:
            if counted_below is None:
                counted_below = least_id((await rollup_extent(database)).done_until)
            if reached <= counted_below:
                missing = limit - len(found)
                found += await _narrowed(database, vault_id, reached, least, wanted, succeeded, missing)
                break
    return found


async def _narrowed(
    database: Reading,
    vault_id: VaultId,
    before: EventId,
    least: EventId,
    wanted: tuple[object, ...],
    succeeded: bool | None,
    limit: int,
) -> Sequence[Row]:
    """Return events with a lesser id than `before` by way of the rollup, which has all but the open ones."""
    minute = made_at(before).replace(second=0, microsecond=0)
    reach = minute + ID_SLACK + timedelta(minutes=1)
    return await database.fetch(_NARROWED[succeeded], vault_id, before, least, *wanted, ID_SLACK, limit, reach, minute)


async def scan(
    database: Reading, vault_id: VaultId, scope: Scope, status: Status | None, before: EventId, batch: int
) -> tuple[list[Row], EventId | None]:
    """Return what matches among the next `batch` events of a vault, and where to go on; None at the end.

    For whoever reads everything: each step costs the same, whatever matches.
    """
    succeeded = None if status is None else status == "success"
    rows = await database.fetch(
        _LOOK,
        vault_id,
        min(before, least_id(scope.until)),
        least_id(scope.since - ID_SLACK),
        scope.since,
        scope.until,
        scope.api_id,
        scope.api_key_id,
        succeeded,
        batch,
        batch,
    )
    reached = EventId(str(rows[0]["reached"])) if rows[0]["looked"] == batch else None
    return [row for row in rows if row["event_id"] is not None], reached
