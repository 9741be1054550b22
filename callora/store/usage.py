"""Usage events as the sweep and the housekeeping see them."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.ledger.faults import StoreRefused
from callora.ledger.ids import FIRST_ID, EventId, VaultId, least_id
from callora.ledger.money import Stroops
from callora.store.breath import EVENTS, breathing
from callora.store.bridge import Database, Row, StatementRejected
from callora.store.rollup import BY_INDEX

DUPLICATE_TABLE: Final = "42P07"
MONTHS_AHEAD: Final = 1

RANGE_BLOCKS: Final = 32
"""How many blocks are one entry of the index of dates, as its migration says."""
WAIT_MS: Final = 10
"""How long to wait for a lock that a vacuum may hold for minutes: one that is waited for for a second is cancelled."""

_OPEN_SINCE: Final = f"""
SELECT vault_id, event_id, held_amount, held_credits, created_at, expires_at FROM usage_events
WHERE created_at >= $1 AND created_at < $2 AND (created_at > $1 OR event_id > $4)
    AND {breathing(EVENTS, "state = 'held'", rest="$5")}
ORDER BY created_at, event_id LIMIT $3
"""  # noqa: S608 - our own text

_OPEN_OF: Final = """
SELECT u.vault_id, u.event_id, u.held_amount, u.held_credits, u.created_at, u.expires_at
FROM unnest($1::uuid[], $2::uuid[]) AS w (vault_id, event_id)
JOIN usage_events u ON u.vault_id = w.vault_id AND u.event_id = w.event_id
WHERE u.state = 'held'
"""

_BLOCKS: Final = """
SELECT i.indexrelid::bigint AS index, pg_relation_size(i.indrelid) / current_setting('block_size')::int AS blocks
FROM pg_inherits p JOIN pg_index i ON i.indexrelid = p.inhrelid
WHERE p.inhparent = 'usage_events_created'::regclass
"""
_EXTEND: Final = f"""
SELECT coalesce(sum(brin_summarize_range($1::oid::regclass, block)), 0)
FROM generate_series($2::bigint, $3::bigint - 1, {RANGE_BLOCKS}) AS block
"""  # noqa: S608 - our own text

_PARTITION_EXISTS: Final = "SELECT to_regclass($1) IS NOT NULL"

_DROP_CLAIMS: Final = """
DELETE FROM idempotency_keys WHERE (vault_id, key) IN (
    SELECT vault_id, key FROM idempotency_keys WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2
)
"""

_DROP_CHANGES: Final = """
DELETE FROM catalogue_changes WHERE version < (SELECT version FROM catalogue_epoch) - $1
"""


@attrs.frozen(slots=True)
class OpenHold:
    """A hold that nobody has closed yet."""

    vault_id: VaultId
    event_id: EventId
    held_amount: Stroops
    held_credits: int
    created_at: datetime
    expires_at: datetime


def _hold(row: Row) -> OpenHold:
    return OpenHold(
        VaultId(str(row["vault_id"])),
        EventId(str(row["event_id"])),
        Stroops(row["held_amount"]),
        row["held_credits"],
        row["created_at"],
        row["expires_at"],
    )


async def open_holds(
    database: Database,
    since: datetime,
    until: datetime,
    limit: int,
    after: EventId = FIRST_ID,
    rest_seconds: float = 0.0,
) -> Sequence[OpenHold]:
    """Return at most `limit` open holds placed in [since, until), oldest first.

    Args:
        after: of the holds placed at `since` only those with a greater id: all holds of a round have one date, and may
            be more than `limit`.
        rest_seconds: how long it rests after each millisecond of work.
    """
    async with database.transaction() as connection:
        await connection.execute(BY_INDEX)
        rows = await connection.fetch(_OPEN_SINCE, since, until, limit, after, rest_seconds)
    return [_hold(row) for row in rows]


async def still_open(database: Database, holds: Sequence[OpenHold]) -> Sequence[OpenHold]:
    """Return those of these holds that are still open, as they stand."""
    rows = await database.fetch(_OPEN_OF, [hold.vault_id for hold in holds], [hold.event_id for hold in holds])
    return [_hold(row) for row in rows]


async def extend_dates(database: Database, reached: dict[int, int]) -> int:
    """Tell the index of dates of the events that were placed since the last time; return how many ranges those filled.

    What that BRIN index does not know, each look for a date reads as a whole; PostgreSQL itself tells it once a minute,
    which on a busy service is a few hundred thousand events.

    Args:
        reached: by index, up to which block it was told; kept by the caller, empty at first.

    Raises:
        StoreConflict: a vacuum is under way, which does the same at its end, or another process is doing it.
        StatementRejected: with the state 42501, where the service does not own its tables.
        StoreUnavailable: as `Database.transaction`.

    Cancellation: what was not told is told the next time.
    """
    first, ranges = not reached, 0
    for row in await database.fetch(_BLOCKS):
        # The last of them are being filled: told of those, it would have to be told again of every event.
        full = max(0, row["blocks"] // RANGE_BLOCKS - 1) * RANGE_BLOCKS
        since = reached.setdefault(row["index"], full if first else 0)
        if since < full:
            async with database.transaction() as connection:
                await connection.execute(f"SET LOCAL lock_timeout = {WAIT_MS}")
                ranges += await connection.fetch_value(_EXTEND, row["index"], since, full)
            reached[row["index"]] = full
    return ranges


async def ensure_partitions(database: Database, now: datetime) -> list[str]:
    """Make the monthly partitions of usage_events from this month to MONTHS_AHEAD later; return those made.

    A month's bounds are the least UUIDv7 of its first millisecond and of the next month's. A month that has rows in the
    default partition already keeps them there; another process may be making the same partitions.
    """
    made: list[str] = []
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    for _ in range(MONTHS_AHEAD + 1):
        following = (first + timedelta(days=32)).replace(day=1)
        name = f"usage_events_{first:%Y_%m}"
        if not await database.fetch_value(_PARTITION_EXISTS, name):
            # Names and bounds are made of digits only, and DDL takes no parameters.
            try:
                await database.execute(
                    f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF usage_events"
                    f" FOR VALUES FROM ('{least_id(first)}') TO ('{least_id(following)}') WITH (fillfactor = 45)"
                )
                made.append(name)
            except StoreRefused:
                pass  # rows of this month are in the default partition, where the audit shows them
            except StatementRejected as error:
                if error.sqlstate != DUPLICATE_TABLE:
                    raise
        first = following
    return made


async def drop_expired_claims(database: Database, now: datetime, limit: int) -> int:
    """Delete at most `limit` idempotency keys past their retention; return how many."""
    return int((await database.execute(_DROP_CLAIMS, now, limit)).rpartition(" ")[2])


async def drop_old_changes(database: Database, kept: int) -> None:
    """Delete catalogue changes that every process has seen long since: all but the latest `kept`."""
    await database.execute(_DROP_CHANGES, kept)
