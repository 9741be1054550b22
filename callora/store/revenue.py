"""Revenue: what developers earned, a row for each captured usage event and each refund, derived from them in passes.

A pass is one database transaction under the lock of `revenue_index`, and one statement in it. It indexes what ended
since `done_until`, each event once by its id, and moves `done_until` to what is final, by the rollup's rules: over for
SETTLE, and no transaction of ours old enough to date rows before. Holds that are open then go to `revenue_open`, and
leave it in the transaction that indexes them. So a pass that is repeated, cut off, or run by two processes at once
changes nothing, and nothing that closes late is missed or counted twice.

What counters came to is booked whatever the balance is, and is earned once it is paid: while its vault owes anything,
such an event waits in `revenue_open` too, or its developer would be paid from what others deposited.

A pass has a number, and what it finds carries it. Late events therefore never slip into what is sealed: sealed is a
range of passes, and what a later pass finds is in a later range.
"""

from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.store.bridge import Connection, Database
from callora.store.rollup import BY_INDEX, EPOCH, SETTLE, SLOW_MAX, SLOW_SECONDS, has_slow

SPAN: Final = timedelta(minutes=5)
"""How much a pass indexes at once when it is behind."""
FEE_NOTICE: Final = timedelta(minutes=2)
"""How long before it holds a new share is stored: every process that indexes knows it by then."""

_UNPAID: Final = """
u.outcome = 'metered' AND EXISTS (SELECT FROM vaults o WHERE o.vault_id = u.vault_id AND o.owed > 0)
"""
"""Whether an event of usage_events `u` may not be paid yet: what was charged before the debt waits with it."""

_INDEX: Final = f"""
WITH facts AS (
    SELECT u.vault_id, u.event_id, 0::bigint AS refund_seq, u.developer_id, u.api_id, u.amount AS gross,
           u.amount AS captured, 0::bigint AS refunded, u.created_at AS called_at, u.created_at AS at
    FROM usage_events u
    WHERE u.created_at >= $1 AND u.created_at < $2 AND u.state = 'captured' AND u.amount > 0
        AND ({_UNPAID}) IS NOT TRUE
    UNION ALL
    SELECT r.vault_id, r.event_id, r.seq, u.developer_id, u.api_id, -r.amount, u.amount,
           (SELECT coalesce(sum(b.amount), 0)::bigint FROM ledger_entries b
            WHERE b.vault_id = r.vault_id AND b.event_id = r.event_id AND b.kind = 'refund' AND b.seq < r.seq),
           u.created_at, r.created_at
    FROM ledger_entries r JOIN usage_events u ON u.vault_id = r.vault_id AND u.event_id = r.event_id
    WHERE r.kind = 'refund' AND r.created_at >= $1 AND r.created_at < $2
), ended AS (
    DELETE FROM revenue_open o USING usage_events u
    WHERE u.vault_id = o.vault_id AND u.event_id = o.event_id AND u.state <> 'held'
        AND ({_UNPAID}) IS NOT TRUE
    RETURNING u.vault_id, u.event_id, u.developer_id, u.api_id, u.amount, u.created_at
), unseen AS (
    SELECT * FROM facts f
    WHERE NOT EXISTS (SELECT FROM revenue_entries e WHERE e.vault_id = f.vault_id AND e.event_id = f.event_id
                          AND e.refund_seq = f.refund_seq)
    UNION ALL
    SELECT vault_id, event_id, 0, developer_id, api_id, amount, amount, 0, created_at, created_at FROM ended
    WHERE amount > 0
), entries AS (
    INSERT INTO revenue_entries (vault_id, event_id, refund_seq, network, developer_id, api_id, gross, fee, at, pass)
    SELECT n.vault_id, n.event_id, n.refund_seq, v.network, n.developer_id, n.api_id, n.gross,
           CASE WHEN n.refund_seq = 0 THEN platform_fee(n.captured, p.bps)
           ELSE platform_fee(n.captured - n.refunded + n.gross, p.bps) - platform_fee(n.captured - n.refunded, p.bps)
           END, n.at, $5
    FROM unseen n JOIN vaults v ON v.vault_id = n.vault_id
    CROSS JOIN LATERAL (
        SELECT coalesce((SELECT f.bps FROM platform_fees f WHERE f.effective_from <= n.called_at
                         ORDER BY f.effective_from DESC LIMIT 1), 0) AS bps
    ) AS p
    RETURNING network, developer_id, gross, fee
), accounts AS (
    INSERT INTO revenue_accounts AS a (network, developer_id, entries, gross, fee)
    SELECT network, developer_id, count(*), sum(gross)::bigint, sum(fee)::bigint FROM entries
    GROUP BY network, developer_id ORDER BY network, developer_id
    ON CONFLICT (network, developer_id) DO UPDATE
    SET entries = a.entries + excluded.entries, gross = a.gross + excluded.gross, fee = a.fee + excluded.fee
), opened AS (
    INSERT INTO revenue_open (vault_id, event_id)
    SELECT u.vault_id, u.event_id FROM usage_events u
    WHERE u.created_at >= $1 AND u.created_at < $3 AND (u.state = 'held' OR {_UNPAID}
        AND NOT EXISTS (SELECT FROM revenue_entries e WHERE e.vault_id = u.vault_id AND e.event_id = u.event_id))
    ON CONFLICT DO NOTHING
), moved AS (
    UPDATE revenue_index SET done_until = $3, as_of = $4, pass = $5
)
SELECT count(*) FROM entries
"""  # noqa: S608 - our own text

_LOCK: Final = "SELECT done_until, as_of, pass FROM revenue_index FOR UPDATE SKIP LOCKED"
_LOCK_WAITING: Final = "SELECT done_until, as_of, pass FROM revenue_index FOR UPDATE"

_FIRST: Final = "SELECT min(created_at) FROM usage_events"

_CHARGES: Final = """
SELECT count(*) FROM (
    SELECT FROM usage_events WHERE created_at >= $1 AND state = 'captured' AND amount > 0 LIMIT $2
) AS c
"""

_AS_OF: Final = "SELECT as_of FROM revenue_index"

_BACK: Final = "UPDATE revenue_index SET done_until = 'epoch', as_of = 'epoch'"

_FORGET_OPEN: Final = "DELETE FROM revenue_open"

_FEE: Final = "SELECT bps FROM platform_fees ORDER BY effective_from DESC LIMIT 1"

# After the one before, whatever a clock says.
_SET_FEE: Final = """
INSERT INTO platform_fees (effective_from, bps)
SELECT greatest($1, max(effective_from) + interval '1 microsecond'), $2 FROM platform_fees
"""

_SUMS: Final = """
SELECT coalesce(sum(a.gross - a.sealed_gross), 0)::bigint AS unsealed,
       coalesce((SELECT sum(s.charge_total) FROM settlements s
                 WHERE s.network = $1 AND s.state NOT IN ('completed', 'failed')), 0)::bigint AS under_way
FROM revenue_accounts a WHERE a.network = $1
"""


@attrs.frozen
class Indexed:
    """What a pass came to."""

    done_until: datetime
    """What is dated before it is final, but for the holds in revenue_open."""
    as_of: datetime
    """What had ended by then is indexed."""
    entries: int
    """Rows made."""
    behind: bool
    """Whether there is more to index at once."""


@attrs.frozen
class Unsettled:
    """What was earned and is not paid yet, in stroops."""

    unsealed: int
    """Not in a settlement."""
    under_way: int
    """In settlements that have not ended."""


async def advance(
    database: Database,
    now: datetime,
    *,
    span: timedelta = SPAN,
    newest_max: int | None = None,
    slow_seconds: float = SLOW_SECONDS,
    wait: bool = False,
) -> Indexed | None:
    """Make one pass; return None where another process is making one.

    Args:
        span: how much is indexed at once when the indexer is behind.
        newest_max: where more charges than this are not final yet, they are left until they are; None leaves none.
        slow_seconds: the age of a transaction of ours that keeps what is dated from being final.
        wait: for the other process to end its pass, rather than return.

    Raises:
        StoreUnavailable, StoreConflict: nothing was changed.
        OutcomeUnknown: the pass was made whole, or not at all; the next makes up for it.

    Cancellation: the pass is not made.
    """
    async with database.transaction() as connection:
        await connection.execute(BY_INDEX)
        row = await connection.fetch_row(_LOCK_WAITING if wait else _LOCK)
        if row is None:
            return None
        reached = (row["done_until"], row["as_of"])
        return await _advance(connection, *reached, row["pass"], now, span, slow_seconds, newest_max)


async def _advance(
    connection: Connection,
    done_until: datetime,
    indexed_before: datetime,
    number: int,
    now: datetime,
    span: timedelta,
    slow_seconds: float,
    newest_max: int | None,
) -> Indexed:
    settled = now - SETTLE
    # Asked before the pass's statement looks: what began later dates its rows later.
    slow = await has_slow(connection, slow_seconds)
    since = done_until
    if done_until <= EPOCH:
        first: datetime | None = await connection.fetch_value(_FIRST)
        since = min(settled, first) if first is not None else settled
    behind = settled - since > span
    if behind or (newest_max is not None and await _many(connection, settled, newest_max)):
        until = final = min(since + span, max(since, settled))
        as_of = max(indexed_before, final)
    else:
        # Another process's clock may be ahead: what it dated after `now` is indexed as well.
        until, final, as_of = now + timedelta(hours=1), max(since, settled), now
    if slow and now - final < SLOW_MAX:
        final, behind = done_until, False
    entries: int = await connection.fetch_value(_INDEX, since, until, final, as_of, number + 1)
    return Indexed(final, as_of, entries, behind)


async def _many(connection: Connection, since: datetime, most: int) -> bool:
    """Tell whether there are more charges than `most`; looks at no more of them."""
    found: int = await connection.fetch_value(_CHARGES, since, most + 1)
    return found > most


async def as_of(database: Database) -> datetime:
    """Return the moment up to which revenue is indexed; EPOCH before the first pass."""
    moment: datetime = await database.fetch_value(_AS_OF)
    return moment


async def look_again(database: Database) -> None:
    """Have the next passes look at everything from the beginning: what is there stays, what is missing is added."""
    async with database.transaction() as connection:
        await connection.fetch_row(_LOCK_WAITING)
        await connection.execute(_FORGET_OPEN)  # found again, open or closed
        await connection.execute(_BACK)


async def set_fee(database: Database, bps: int, now: datetime) -> bool:
    """Let the platform's share of later calls be this; False where it is. The first one holds for all calls.

    Args:
        bps: hundredths of a percent, 0 to 10 000.
    """
    async with database.transaction() as connection:
        await connection.fetch_row(_LOCK_WAITING)
        present: int | None = await connection.fetch_value(_FEE)
        if present == bps:
            return False
        await connection.execute(_SET_FEE, EPOCH if present is None else now + FEE_NOTICE, bps)
        return True


async def unsettled(database: Database, network: str) -> Unsettled:
    """Return what was earned on a network and is not paid yet."""
    row = await database.fetch_row(_SUMS, network)
    assert row is not None
    return Unsettled(row["unsealed"], row["under_way"])
