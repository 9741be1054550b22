"""What is compared: usage with revenue, revenue with settlements, settlements with what the chain said."""

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final, cast

import attrs

from callora.ledger.discrepancies import (
    BookedPart,
    BookedSettlement,
    KnownTransaction,
    RevenueGap,
    StrangeCharge,
)
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops
from callora.store.bridge import Connection, Database, Row

GAPS_MAX: Final = 1000
"""How many developers whose revenue is off are told."""
ADDRESSES_MAX: Final = 1000
SPAN: Final = timedelta(hours=6)
"""How much usage one statement compares."""

# Of one moment: rows that move on between two statements would contradict each other.
_READING: Final = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL plan_cache_mode = force_custom_plan;
SET LOCAL jit = off
"""

# What is final: dated before `done_until`, but for holds that were open then and are indexed when they close.
_USAGE: Final = """
WITH facts AS (
    SELECT u.vault_id, u.event_id, 0::bigint AS refund_seq, u.developer_id, u.amount AS gross, u.created_at AS at
    FROM usage_events u JOIN vaults v ON v.vault_id = u.vault_id AND v.network = $1
    WHERE u.state = 'captured' AND u.amount > 0 AND u.created_at >= $2 AND u.created_at < $3
        AND NOT EXISTS (SELECT FROM revenue_open o WHERE o.vault_id = u.vault_id AND o.event_id = u.event_id)
    UNION ALL
    SELECT r.vault_id, r.event_id, r.seq, u.developer_id, -r.amount, r.created_at
    FROM ledger_entries r JOIN vaults v ON v.vault_id = r.vault_id AND v.network = $1
    JOIN usage_events u ON u.vault_id = r.vault_id AND u.event_id = r.event_id
    WHERE r.kind = 'refund' AND r.created_at >= $2 AND r.created_at < $3
), entries AS (
    SELECT vault_id, event_id, refund_seq, developer_id, gross, at FROM revenue_entries
    WHERE network = $1 AND at >= $2 AND at < $3
)
SELECT coalesce(e.developer_id, f.developer_id) AS developer_id, count(*) AS wrong,
       sum(coalesce(e.gross, 0) - coalesce(f.gross, 0))::bigint AS difference, min(coalesce(f.at, e.at)) AS at
FROM facts f FULL JOIN entries e USING (vault_id, event_id, refund_seq)
WHERE (e.gross, e.developer_id) IS DISTINCT FROM (f.gross, f.developer_id)
GROUP BY 1 ORDER BY 1 LIMIT $4
"""

_FINAL: Final = """
SELECT done_until, (SELECT min(created_at) FROM usage_events) AS first FROM revenue_index
"""

_ACCOUNTS: Final = """
SELECT coalesce(a.developer_id, e.developer_id) AS developer_id, 1 AS wrong,
       (coalesce(a.gross - a.fee, 0) - coalesce(e.gross - e.fee, 0))::bigint AS difference,
       NULL::timestamptz AS at
FROM (SELECT * FROM revenue_accounts WHERE network = $1) AS a FULL JOIN (
    SELECT developer_id, count(*) AS entries, sum(gross) AS gross, sum(fee) AS fee FROM revenue_entries
    WHERE network = $1 GROUP BY developer_id
) AS e ON e.developer_id = a.developer_id
WHERE (a.entries, a.gross, a.fee) IS DISTINCT FROM (e.entries, e.gross, e.fee)
ORDER BY 1 LIMIT $2
"""

_SEALED: Final = """
SELECT coalesce(a.developer_id, i.developer_id) AS developer_id, 1 AS wrong,
       (coalesce(i.gross - i.fee, 0) - coalesce(a.sealed_gross - a.sealed_fee, 0))::bigint AS difference,
       NULL::timestamptz AS at
FROM (SELECT * FROM revenue_accounts WHERE network = $1) AS a FULL JOIN (
    SELECT i.developer_id, sum(i.gross) AS gross, sum(i.fee) AS fee
    FROM settlement_items i JOIN settlements s USING (settlement_id)
    WHERE s.network = $1 AND s.state <> 'failed' AND i.developer_id IS NOT NULL GROUP BY i.developer_id
) AS i ON i.developer_id = a.developer_id
WHERE (coalesce(a.sealed_gross, 0), coalesce(a.sealed_fee, 0)) <> (coalesce(i.gross, 0), coalesce(i.fee, 0))
ORDER BY 1 LIMIT $2
"""

_SETTLEMENTS: Final = """
SELECT s.settlement_id, s.state, s.charge_total, s.credit_total, s.charged_by, s.opened_at, s.ended_at,
       encode(s.charge_hash, 'hex') AS charge_hash,
       extract(epoch FROM $3 - s.opened_at)::float8 AS age_seconds,
       extract(epoch FROM $3 - greatest(s.moved_at, (
           SELECT max(c.moved_at) FROM settlement_credits c WHERE c.settlement_id = s.settlement_id
       )))::float8 AS moved_seconds,
       (SELECT coalesce(sum(i.gross), 0) FROM settlement_items i
        WHERE i.settlement_id = s.settlement_id)::bigint AS items_gross,
       (SELECT coalesce(sum(i.credit), 0) FROM settlement_items i
        WHERE i.settlement_id = s.settlement_id)::bigint AS items_credit
FROM settlements s JOIN chain_networks n ON n.network = s.network AND n.epoch = s.epoch
WHERE s.network = $1 AND (s.state NOT IN ('completed', 'failed') OR s.moved_at >= $2)
    AND ($4::timestamptz IS NULL OR (s.opened_at, s.settlement_id) > ($4, $5::uuid))
ORDER BY s.opened_at, s.settlement_id LIMIT $6
"""

_PARTS: Final = """
SELECT settlement_id, part, state, amount, 'credit:' || settlement_id || ':' || part || '.' || attempt AS purpose,
       encode(hash, 'hex') AS hash
FROM settlement_credits WHERE settlement_id = ANY($1::uuid[]) ORDER BY settlement_id, part
"""

# Events of a ledger are known once the listener is past it, where no gap hides it.
_TRANSACTIONS: Final = """
WITH purposes AS (
    SELECT s.settlement_id, 'charge:' || s.settlement_id AS purpose FROM unnest($2::uuid[]) AS s (settlement_id)
    UNION ALL
    SELECT c.settlement_id, 'credit:' || c.settlement_id || ':' || c.part || '.' || g.attempt
    FROM settlement_credits c CROSS JOIN generate_series(1, c.attempt) AS g (attempt)
    WHERE c.settlement_id = ANY($2::uuid[])
)
SELECT p.settlement_id, p.purpose, encode(t.hash, 'hex') AS hash, t.state,
       coalesce(t.ledger, CASE WHEN t.sends > 0 THEN t.prepared_ledger END) AS ledger,
       CASE WHEN t.ledger <= n.ledger AND NOT EXISTS (
           SELECT FROM chain_gaps g WHERE g.network = t.network AND g.epoch = t.epoch
               AND t.ledger BETWEEN g.first_ledger AND g.last_ledger
       ) THEN d.deducted ELSE nullif(d.deducted, 0) END AS deducted
FROM purposes p JOIN chain_networks n ON n.network = $1
JOIN chain_transactions t ON t.network = n.network AND t.epoch = n.epoch AND t.purpose = p.purpose
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.amount), 0)::bigint AS deducted FROM chain_events e
    WHERE e.network = t.network AND e.epoch = t.epoch AND e.kind = 'deduct'
        AND e.tx_hash = ANY(array_cat(ARRAY[t.hash, t.outer_hash],
                                      ARRAY(SELECT b.hash FROM chain_bumps b WHERE b.inner_hash = t.hash)))
) AS d
ORDER BY t.stored_at, t.hash
"""

_STRANGE: Final = """
SELECT encode(e.tx_hash, 'hex') AS hash, sum(e.amount)::bigint AS amount, max(e.ledger) AS ledger,
       max(e.closed_at) AS at
FROM chain_events e JOIN chain_networks n ON n.network = e.network AND n.epoch = e.epoch
WHERE e.network = $1 AND e.kind = 'deduct' AND e.closed_at >= $2 AND NOT EXISTS (
    SELECT FROM chain_transactions t
    WHERE t.purpose LIKE 'charge:%' AND (t.hash = e.tx_hash OR t.outer_hash = e.tx_hash
        OR t.hash = (SELECT b.inner_hash FROM chain_bumps b WHERE b.hash = e.tx_hash)))
GROUP BY e.tx_hash ORDER BY 3, 1 LIMIT $3
"""

_COMPARED: Final = """
SELECT c.drift, c.ledger FROM chain_reconciliations c JOIN chain_networks n ON n.network = c.network
    AND n.epoch = c.epoch
WHERE c.network = $1 ORDER BY c.at DESC LIMIT 1
"""

_EPOCH: Final = "SELECT epoch FROM chain_networks WHERE network = $1"

_ADDRESSES: Final = """
SELECT i.address, max(s.moved_at) AS at FROM settlement_items i JOIN settlements s USING (settlement_id)
JOIN chain_networks n ON n.network = s.network AND n.epoch = s.epoch
WHERE s.network = $1 AND s.state IN ('credit_sent', 'completed') AND s.moved_at >= $2
GROUP BY i.address ORDER BY at DESC, i.address LIMIT $3
"""

# What may be credited is counted as credited: this is the most that may be there.
_CREDITED: Final = """
SELECT a.address,
    ((SELECT coalesce(sum(i.credit), 0) FROM settlement_items i JOIN settlements s USING (settlement_id)
      WHERE i.address = a.address AND s.network = n.network AND s.epoch = n.epoch
          AND s.state IN ('credit_sent', 'completed'))
     - (SELECT coalesce(sum(w.amount), 0) FROM developer_withdrawals w
        WHERE w.address = a.address AND w.network = n.network AND w.epoch = n.epoch
            AND w.stage = 'confirmed'))::bigint AS credited
FROM unnest($2::text[]) AS a (address) JOIN chain_networks n ON n.network = $1
"""


@attrs.frozen
class Moment:
    """The books as of one moment, for as long as it is kept open."""

    _connection: Connection
    _network: str

    async def revenue_gaps(self, since: datetime) -> Sequence[RevenueGap]:
        """Return developers whose revenue is off.

        Args:
            since: calls and refunds before are not looked at; accounts are compared as a whole.
        """
        usage = await self._usage_gaps(since)
        accounts = await self._connection.fetch(_ACCOUNTS, self._network, GAPS_MAX)
        sealed = await self._connection.fetch(_SEALED, self._network, GAPS_MAX)
        return [
            *usage,
            *(_gap(row, "account") for row in accounts),
            *(_gap(row, "sealed") for row in sealed),
        ]

    async def _usage_gaps(self, since: datetime) -> Sequence[RevenueGap]:
        """Return developers whose entries are not what calls and refunds say; read in pieces, none of them long."""
        row = await self._connection.fetch_row(_FINAL)
        assert row is not None, "the migration made it"
        final: datetime = row["done_until"]
        # Before the first call there is nothing, or what should not be there.
        until = min(final, max(since, row["first"] or final))
        found: dict[DeveloperId, RevenueGap] = {}
        while since < final:
            if until > since:
                for wrong in await self._connection.fetch(_USAGE, self._network, since, until, GAPS_MAX):
                    gap = _gap(wrong, "usage")
                    known = found.get(gap.developer_id)
                    found[gap.developer_id] = gap if known is None else _together(known, gap)
            since, until = until, min(final, until + SPAN)
        return [found[developer_id] for developer_id in sorted(found)]

    async def settlements(
        self, since: datetime, now: datetime, after: tuple[datetime, str] | None, limit: int
    ) -> tuple[Sequence[BookedSettlement], tuple[datetime, str] | None]:
        """Return settlements of the present history that are under way or moved since a moment, the oldest first.

        Returns:
            A page of them, and where the next begins; None after the last.
        """
        at, settlement_id = after or (None, None)
        rows = await self._connection.fetch(_SETTLEMENTS, self._network, since, now, at, settlement_id, limit)
        ids = [str(row["settlement_id"]) for row in rows]
        parts: dict[str, list[BookedPart]] = defaultdict(list)
        for row in await self._connection.fetch(_PARTS, ids):
            parts[str(row["settlement_id"])].append(
                BookedPart(row["part"], row["state"], Stroops(row["amount"]), row["purpose"], row["hash"])
            )
        known: dict[str, list[KnownTransaction]] = defaultdict(list)
        for row in await self._connection.fetch(_TRANSACTIONS, self._network, ids):
            known[str(row["settlement_id"])].append(
                KnownTransaction(row["hash"], row["purpose"], row["state"], row["ledger"], row["deducted"])
            )
        made = [_settlement(row, known[each], parts[each]) for row, each in zip(rows, ids, strict=True)]
        further = (rows[-1]["opened_at"], ids[-1]) if len(rows) == limit else None
        return made, further

    async def strange_charges(self, since: datetime) -> Sequence[StrangeCharge]:
        """Return charges of the vault contract that no settlement made, the oldest first."""
        rows = await self._connection.fetch(_STRANGE, self._network, since, GAPS_MAX)
        return [StrangeCharge(row["hash"], Stroops(row["amount"]), row["ledger"], row["at"]) for row in rows]

    async def vault_drift(self) -> tuple[int, int] | None:
        """Return by how much the vault contract was off when it was last compared, and at which ledger."""
        row = await self._connection.fetch_row(_COMPARED, self._network)
        return None if row is None else (row["drift"], row["ledger"])

    async def epoch(self) -> int | None:
        """Return which history the network is on; None before it was looked at."""
        return cast("int | None", await self._connection.fetch_value(_EPOCH, self._network))


@asynccontextmanager
async def moment(database: Database, network: str) -> AsyncIterator[Moment]:
    """Keep the books of a network as they are now, to be read. Raises and cancellation: as `Database.transaction`."""
    async with database.transaction() as connection:
        await connection.execute(_READING)
        yield Moment(connection, network)


async def credited_addresses(database: Database, network: str, since: datetime) -> dict[str, datetime]:
    """Return addresses that were or may be credited since a moment, and when they last were; at most ADDRESSES_MAX."""
    return {row["address"]: row["at"] for row in await database.fetch(_ADDRESSES, network, since, ADDRESSES_MAX)}


async def credited_max(database: Database, network: str, addresses: Collection[str]) -> dict[str, int]:
    """Return the most that the settlement contract may owe addresses on the present history, stroops."""
    return {row["address"]: row["credited"] for row in await database.fetch(_CREDITED, network, [*addresses])}


def _gap(row: Row, between: Any) -> RevenueGap:
    return RevenueGap(DeveloperId(str(row["developer_id"])), between, row["wrong"], row["difference"], row["at"])


def _together(known: RevenueGap, more: RevenueGap) -> RevenueGap:
    return attrs.evolve(known, wrong=known.wrong + more.wrong, difference=known.difference + more.difference)


def _settlement(row: Row, known: Sequence[KnownTransaction], parts: Sequence[BookedPart]) -> BookedSettlement:
    return BookedSettlement(
        settlement_id=str(row["settlement_id"]),
        state=row["state"],
        age_seconds=row["age_seconds"],
        moved_seconds=row["moved_seconds"],
        ended_at=row["ended_at"],
        charge_total=Stroops(row["charge_total"]),
        credit_total=Stroops(row["credit_total"]),
        items_gross=Stroops(row["items_gross"]),
        items_credit=Stroops(row["items_credit"]),
        charged_by=row["charged_by"],
        charge_hash=row["charge_hash"],
        charges=tuple(each for each in known if each.purpose.startswith("charge:")),
        credits=tuple(each for each in known if each.purpose.startswith("credit:")),
        parts=tuple(parts),
    )
