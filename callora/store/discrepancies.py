"""Discrepancies: found when the books are compared, gone when they are not found any more, cleared by an operator."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from callora.ledger.discrepancies import Discrepancy
from callora.store.bridge import Database
from callora.store.reads.discrepancies import COLUMNS, Noted, noted

# Whoever comes first has the turn; the others find that it is taken. One of which nobody could tell something, or that
# its process did not end, is made up for sooner.
_TAKE_TURN: Final = """
INSERT INTO book_comparisons AS b (network, began_at) VALUES ($1, $2)
ON CONFLICT (network) DO UPDATE SET began_at = $2, ended_at = NULL, asked = NULL, untold = NULL
WHERE b.began_at <= $3 OR b.began_at > $2
    OR (b.untold > 0 AND b.ended_at <= $2 - interval '10 minutes')
    OR (b.ended_at IS NULL AND b.began_at <= $2 - interval '1 hour')
RETURNING true
"""

_END_TURN: Final = "UPDATE book_comparisons SET ended_at = $2, asked = $3, untold = $4 WHERE network = $1"

_GIVE_TURN: Final = "UPDATE book_comparisons SET began_at = $2 WHERE network = $1 AND ended_at IS NULL"

_NOTE: Final = """
INSERT INTO discrepancies AS d (discrepancy_id, network, kind, subject, difference, said, of_at, found_at, seen_at)
SELECT DISTINCT ON (f.kind, f.subject, f.difference)
       f.discrepancy_id, $1, f.kind, left(f.subject, 200), f.difference, left(f.said, 500), f.of_at,
       $2::timestamptz, $2
FROM unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[], $7::text[], $8::timestamptz[])
         AS f (discrepancy_id, kind, subject, difference, said, of_at)
ORDER BY f.kind, f.subject, f.difference
ON CONFLICT (network, kind, subject, difference) DO UPDATE
SET said = excluded.said, of_at = excluded.of_at, seen_at = greatest(d.seen_at, excluded.seen_at), gone_at = NULL
"""

_GONE: Final = """
UPDATE discrepancies SET gone_at = $2 WHERE network = $1 AND seen_at < $2 AND gone_at IS NULL
    AND (of_at IS NULL OR of_at >= $3)
"""

_OPEN: Final = f"""
SELECT {COLUMNS} FROM discrepancies WHERE network = $1 AND gone_at IS NULL AND cleared_at IS NULL
ORDER BY kind, subject, difference
"""  # noqa: S608 - columns of ours

_CLEAR: Final = """
UPDATE discrepancies SET cleared_at = $3, cleared_by = $4, reason = $5
WHERE network = $1 AND discrepancy_id = $2 AND cleared_at IS NULL
RETURNING true
"""


async def take_turn(database: Database, network: str, now: datetime, since: datetime) -> bool:
    """Take the turn to compare, where nobody began later than `since`."""
    return await database.fetch_value(_TAKE_TURN, network, now, since) is not None


async def give_turn(database: Database, network: str, began_at: datetime) -> None:
    """Give back a turn that came to nothing: it counts as begun at this moment, and who next may is told by that."""
    await database.execute(_GIVE_TURN, network, began_at)


async def end_turn(database: Database, network: str, now: datetime, asked: int, untold: int) -> None:
    """Note that a turn came to its end.

    Args:
        asked: of how many transactions and addresses the network was asked.
        untold: of how many of them nobody could tell.
    """
    await database.execute(_END_TURN, network, now, asked, untold)


async def note(
    database: Database,
    network: str,
    found: Sequence[Discrepancy],
    new_id: Callable[[], str],
    now: datetime,
    since: datetime | None,
) -> Sequence[Noted]:
    """Keep all that was found, let go what was not found any more; return those that nobody has cleared.

    Args:
        since: what ended before was not looked at, and is not let go; None lets nothing go.

    Raises:
        StoreUnavailable: nothing was noted. OutcomeUnknown: all of it was, or nothing; the same again is no error.
    """
    async with database.transaction() as connection:
        await connection.execute(
            _NOTE,
            network,
            now,
            [new_id() for _ in found],
            [each.kind for each in found],
            [each.subject for each in found],
            [each.difference for each in found],
            [each.said for each in found],
            [each.at for each in found],
        )
        if since is not None:
            await connection.execute(_GONE, network, now, since)
        return [noted(row) for row in await connection.fetch(_OPEN, network)]


async def clear(database: Database, network: str, discrepancy_id: str, by: str, reason: str, now: datetime) -> bool:
    """Note that an operator has explained one; False where there is none that is not cleared."""
    return await database.fetch_value(_CLEAR, network, discrepancy_id, now, by, reason) is not None
