"""What operators and developers see of settlements, and of what developers withdraw."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.bridge import Row
from callora.store.reads.usage import Reading

# The credit of an item is made by the one part with its position that is not split.
_PAID: Final = """
SELECT s.settlement_id, s.state, s.failure, i.developer_id, d.name, i.address, i.credit,
       encode(c.hash, 'hex') AS credit_hash
FROM settlements s JOIN settlement_items i USING (settlement_id)
LEFT JOIN developers d ON d.developer_id = i.developer_id
LEFT JOIN settlement_credits c ON c.settlement_id = s.settlement_id AND c.state <> 'split'
    AND i.position BETWEEN c.first_position AND c.last_position
WHERE s.network = $1 AND i.developer_id IS NOT NULL
    AND (s.state NOT IN ('completed', 'failed') OR s.ended_at >= $2)
ORDER BY s.opened_at, s.settlement_id, i.position
"""


# What is open is of the latest passes: entries are never added to the ones before.
_REVENUE: Final = """
SELECT r.as_of, coalesce(a.gross, 0) AS gross, coalesce(a.fee, 0) AS fee,
       coalesce(a.sealed_gross - a.sealed_fee, 0) AS sealed, a.held_back,
       coalesce((SELECT sum(i.credit) FROM settlement_items i JOIN settlement_credits c
                     ON c.settlement_id = i.settlement_id AND c.state = 'credited'
                         AND i.position BETWEEN c.first_position AND c.last_position
                 JOIN settlements s ON s.settlement_id = i.settlement_id AND s.state <> 'failed'
                 WHERE i.network = $1 AND i.developer_id = $2), 0)::bigint AS completed
FROM revenue_index r LEFT JOIN revenue_accounts a ON a.network = $1 AND a.developer_id = $2
"""

_SETTLEMENTS: Final = """
SELECT s.settlement_id, s.network, s.opened_at, i.address, i.gross, i.fee, i.credit,
       CASE WHEN s.state = 'failed' THEN 'failed' WHEN c.state = 'credited' THEN 'completed'
            ELSE 'pending' END AS status,
       s.failure, encode(s.charge_hash, 'hex') AS charge_hash, encode(c.hash, 'hex') AS credit_hash,
       CASE WHEN s.state = 'failed' THEN s.ended_at ELSE t.applied_at END AS ended_at
FROM settlement_items i JOIN settlements s USING (settlement_id)
LEFT JOIN settlement_credits c ON c.settlement_id = s.settlement_id AND c.state <> 'split'
    AND i.position BETWEEN c.first_position AND c.last_position
LEFT JOIN chain_transactions t ON t.hash = c.hash
"""

_SETTLEMENT_LIST: Final = f"""{_SETTLEMENTS}
WHERE i.network = $1 AND i.developer_id = $2
    AND ($3::timestamptz IS NULL OR (s.opened_at, s.settlement_id) < ($3, $4::uuid))
ORDER BY s.opened_at DESC, s.settlement_id DESC LIMIT $5
"""

_SETTLEMENT: Final = f"{_SETTLEMENTS} WHERE i.developer_id = $1 AND s.settlement_id = $2"

_WITHDRAWALS: Final = """
SELECT encode(w.tx_hash, 'hex') AS hash, w.network, w.address, w.amount, w.stage, w.failure, w.ledger, w.prepared_at,
       w.expires_at, w.applied_at
FROM developer_withdrawals w
"""

_WITHDRAWAL_LIST: Final = f"""{_WITHDRAWALS}
WHERE w.network = $1 AND w.developer_id = $2
    AND ($3::timestamptz IS NULL OR (w.prepared_at, w.tx_hash) < ($3, $4))
ORDER BY w.prepared_at DESC, w.tx_hash DESC LIMIT $5
"""

_WITHDRAWAL: Final = f"{_WITHDRAWALS} WHERE w.developer_id = $1 AND w.tx_hash = $2"

# What was earned and not paid before a moment. A credit counts from when its ledger closed.
_OWED: Final = """
SELECT ((SELECT coalesce(sum(e.net), 0) FROM revenue_entries e
         WHERE e.network = $1 AND e.developer_id = $2 AND e.at < $3)
        - (SELECT coalesce(sum(i.credit), 0) FROM settlement_items i JOIN settlement_credits c
               ON c.settlement_id = i.settlement_id AND c.state = 'credited'
                   AND i.position BETWEEN c.first_position AND c.last_position
           JOIN chain_transactions t ON t.hash = c.hash AND t.applied_at < $3
           JOIN settlements s ON s.settlement_id = i.settlement_id AND s.state <> 'failed'
           WHERE i.network = $1 AND i.developer_id = $2))::bigint
"""

_DAYS: Final = """
SELECT greatest(date_trunc('day', e.at, 'UTC'), $3::timestamptz) AS at, e.api_id, a.slug,
       (e.refund_seq > 0) AS refunded, sum(e.gross)::bigint AS gross, sum(e.fee)::bigint AS fee
FROM revenue_entries e LEFT JOIN apis a ON a.api_id = e.api_id
WHERE e.network = $1 AND e.developer_id = $2 AND e.at >= $3 AND e.at < $4
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 4
"""

_PAYMENTS: Final = """
SELECT t.applied_at AS at, s.settlement_id, i.credit, encode(c.hash, 'hex') AS hash
FROM settlement_items i JOIN settlements s ON s.settlement_id = i.settlement_id AND s.state <> 'failed'
JOIN settlement_credits c ON c.settlement_id = s.settlement_id AND c.state = 'credited'
    AND i.position BETWEEN c.first_position AND c.last_position
JOIN chain_transactions t ON t.hash = c.hash AND t.applied_at >= $3 AND t.applied_at < $4
WHERE i.network = $1 AND i.developer_id = $2
ORDER BY 1, 2
"""

_TAKEN: Final = """
SELECT applied_at AS at, amount, encode(tx_hash, 'hex') AS hash FROM developer_withdrawals
WHERE network = $1 AND developer_id = $2 AND stage = 'confirmed' AND applied_at >= $3 AND applied_at < $4
ORDER BY applied_at, ledger, tx_hash
"""


@attrs.frozen
class Revenue:
    """What a developer has earned on a network, in stroops."""

    as_of: datetime
    """Calls and refunds until then are in it."""
    earned: int
    """Σ calls less refunds less the platform's share; may be below 0."""
    completed: Stroops
    """Credited on chain."""
    pending: Stroops
    """In settlements under way."""
    unsettled: int
    """In none; below 0 where more was refunded than earned since the last one."""
    held_back: str | None
    """Why he is not paid for now."""


@attrs.frozen
class ShownSettlement:
    """What a developer gets by a settlement, as he sees it."""

    settlement_id: str
    network: str
    status: str
    """pending, completed or failed."""
    gross: Stroops
    fee: Stroops
    credit: Stroops
    address: str
    failure: str | None
    charge_hash: str | None
    credit_hash: str | None
    opened_at: datetime
    ended_at: datetime | None


@attrs.frozen
class ShownPayout:
    """A developer's withdrawal, as he sees it."""

    tx_hash: str
    network: str
    address: str
    amount: Stroops
    stage: str
    failure: str | None
    ledger: int | None
    prepared_at: datetime
    expires_at: datetime
    applied_at: datetime | None


@attrs.frozen
class Line:
    """A line of a developer's statement."""

    at: datetime
    account: str
    """`owed`: what Callora owes him; `on_chain`: what the settlement contract does."""
    entry: str
    """usage, platform_fee, refund, fee_refund, settlement or withdrawal."""
    amount: int
    """Stroops, of any sign."""
    api_id: int | None = None
    slug: str | None = None
    reference: str | None = None
    """A settlement's id."""
    tx_hash: str | None = None


async def revenue_of(database: Reading, network: str, developer_id: DeveloperId) -> Revenue:
    """Return what a developer has earned."""
    row = await database.fetch_row(_REVENUE, network, developer_id)
    assert row is not None, "the migration made it"
    earned = row["gross"] - row["fee"]
    return Revenue(
        as_of=row["as_of"],
        earned=earned,
        completed=Stroops(row["completed"]),
        pending=Stroops(row["sealed"] - row["completed"]),
        unsettled=earned - row["sealed"],
        held_back=row["held_back"],
    )


async def list_settlements(
    database: Reading, network: str, developer_id: DeveloperId, before: tuple[datetime, str] | None, limit: int
) -> Sequence[ShownSettlement]:
    """Return a developer's settlements, the newest first; only those before a moment and an id."""
    at, settlement_id = before or (None, None)
    rows = await database.fetch(_SETTLEMENT_LIST, network, developer_id, at, settlement_id, limit)
    return [_shown(row) for row in rows]


async def find_settlement(database: Reading, developer_id: DeveloperId, settlement_id: str) -> ShownSettlement | None:
    """Return what a developer gets by a settlement."""
    row = await database.fetch_row(_SETTLEMENT, developer_id, settlement_id)
    return None if row is None else _shown(row)


async def list_payouts(
    database: Reading, network: str, developer_id: DeveloperId, before: tuple[datetime, str] | None, limit: int
) -> Sequence[ShownPayout]:
    """Return a developer's withdrawals, the newest first; only those before a moment and a hash."""
    at, tx_hash = (None, b"") if before is None else (before[0], bytes.fromhex(before[1]))
    rows = await database.fetch(_WITHDRAWAL_LIST, network, developer_id, at, tx_hash, limit)
    return [_payout(row) for row in rows]


async def find_payout(database: Reading, developer_id: DeveloperId, tx_hash: str) -> ShownPayout | None:
    """Return a developer's withdrawal by its hash."""
    row = await database.fetch_row(_WITHDRAWAL, developer_id, bytes.fromhex(tx_hash))
    return None if row is None else _payout(row)


async def owed_at(database: Reading, network: str, developer_id: DeveloperId, moment: datetime) -> int:
    """Return what Callora owed a developer at a moment, stroops; below 0 after refunds of what he was paid."""
    owed: int = await database.fetch_value(_OWED, network, developer_id, moment)
    return owed


async def statement(
    database: Reading, network: str, developer_id: DeveloperId, since: datetime, until: datetime
) -> Sequence[Line]:
    """Return a developer's lines of a period, in the order of their dates; usage is added up by day and API."""
    arguments = (network, developer_id, since, until)
    lines: list[Line] = []
    for row in await database.fetch(_DAYS, *arguments):
        of_api = {"api_id": row["api_id"], "slug": row["slug"]}
        words = ("refund", "fee_refund") if row["refunded"] else ("usage", "platform_fee")
        lines.append(Line(row["at"], "owed", words[0], row["gross"], **of_api))
        if row["fee"]:
            lines.append(Line(row["at"], "owed", words[1], -row["fee"], **of_api))
    for row in await database.fetch(_PAYMENTS, *arguments):
        paid = {"reference": str(row["settlement_id"]), "tx_hash": row["hash"]}
        lines.append(Line(row["at"], "owed", "settlement", -row["credit"], **paid))
        lines.append(Line(row["at"], "on_chain", "settlement", row["credit"], **paid))
    taken = await database.fetch(_TAKEN, *arguments)
    lines += [Line(row["at"], "on_chain", "withdrawal", -row["amount"], tx_hash=row["hash"]) for row in taken]
    return sorted(lines, key=lambda line: line.at)


@attrs.frozen
class Paid:
    """What a developer gets by a settlement."""

    settlement_id: str
    state: str
    failure: str | None
    developer_id: DeveloperId
    name: str | None
    address: str
    amount: Stroops
    tx_hash: str | None
    """Of the credit, once it is made."""


async def paid_since(database: Database, network: str, since: datetime) -> Sequence[Paid]:
    """Return what developers get by settlements that ended since a moment or are under way, the oldest first."""
    return [
        Paid(
            str(row["settlement_id"]),
            row["state"],
            row["failure"],
            DeveloperId(str(row["developer_id"])),
            row["name"],
            row["address"],
            Stroops(row["credit"]),
            row["credit_hash"],
        )
        for row in await database.fetch(_PAID, network, since)
    ]


def _shown(row: Row) -> ShownSettlement:
    return ShownSettlement(
        settlement_id=str(row["settlement_id"]),
        network=row["network"],
        status=row["status"],
        gross=Stroops(row["gross"]),
        fee=Stroops(row["fee"]),
        credit=Stroops(row["credit"]),
        address=row["address"],
        failure=row["failure"],
        charge_hash=row["charge_hash"],
        credit_hash=row["credit_hash"],
        opened_at=row["opened_at"],
        ended_at=row["ended_at"],
    )


def _payout(row: Row) -> ShownPayout:
    return ShownPayout(
        tx_hash=row["hash"],
        network=row["network"],
        address=row["address"],
        amount=Stroops(row["amount"]),
        stage=row["stage"],
        failure=row["failure"],
        ledger=row["ledger"],
        prepared_at=row["prepared_at"],
        expires_at=row["expires_at"],
        applied_at=row["applied_at"],
    )
