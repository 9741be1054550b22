"""What people and operators see of the chain: deposits, withdrawals, suspense, gaps, comparisons."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.reconciliation import Parts
from callora.ledger.watching import ref_prefix
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

_ASKER: Final = """
SELECT v.vault_id, v.standing::text AS standing, u.wallet_address
FROM vaults v JOIN users u USING (user_id) WHERE v.user_id = $1 AND v.network = $2
"""

_WALLET: Final = "SELECT wallet_address FROM users WHERE user_id = $1"

_SYNCED: Final = "SELECT contract_id, updated_at FROM chain_networks WHERE network = $1"

# A deposit is one that was prepared, or one that came without; the latter has no intent to be known by.
_DEPOSITS: Final = """
SELECT * FROM (
    SELECT i.tx_hash, i.network, i.address, i.amount, i.stage, i.failure, i.prepared_at AS at, i.expires_at, i.event_id,
           e.ledger, e.closed_at
    FROM deposit_intents i
    LEFT JOIN chain_events e ON e.network = i.network AND e.epoch = i.epoch AND e.event_id = i.event_id
    WHERE i.vault_id = $1
    UNION ALL
    SELECT e.tx_hash, e.network, e.address, e.amount, 'confirmed', NULL, e.closed_at, NULL, e.event_id, e.ledger,
           e.closed_at
    FROM chain_events e
    WHERE e.vault_id = $1 AND e.kind = 'deposit' AND e.state = 'booked'
        AND NOT EXISTS (SELECT FROM deposit_intents i
                        WHERE i.network = e.network AND i.epoch = e.epoch AND i.event_id = e.event_id)
) AS d
"""

_DEPOSIT_LIST: Final = f"""
SELECT encode(tx_hash, 'hex') AS hash, d.* FROM ({_DEPOSITS}) AS d
WHERE $2::timestamptz IS NULL OR (at, tx_hash) < ($2, $3)
ORDER BY at DESC, tx_hash DESC LIMIT $4
"""  # noqa: S608 - SQL of ours

_DEPOSIT: Final = f"""
SELECT encode(tx_hash, 'hex') AS hash, d.* FROM ({_DEPOSITS}) AS d WHERE tx_hash = $2 ORDER BY event_id LIMIT 1
"""  # noqa: S608 - SQL of ours

_VAULT: Final = "SELECT vault_id FROM vaults WHERE user_id = $1 AND network = $2"

_WITHDRAWAL_COLUMNS: Final = """
w.withdrawal_id, w.network, w.address, w.amount, w.state, w.failure, w.event_id, w.asked_at, w.updated_at,
encode(e.tx_hash, 'hex') AS hash, e.ledger, v.user_id
"""
_WITHDRAWALS: Final = f"""
SELECT {_WITHDRAWAL_COLUMNS}
FROM withdrawals w JOIN vaults v USING (vault_id)
LEFT JOIN chain_events e ON e.network = w.network AND e.event_id = w.event_id AND e.vault_id = w.vault_id
"""  # noqa: S608 - columns of ours

_WITHDRAWAL_LIST: Final = f"""{_WITHDRAWALS}
WHERE v.user_id = $1 AND v.network = $2 AND ($3::timestamptz IS NULL OR (w.asked_at, w.withdrawal_id) < ($3, $4))
ORDER BY w.asked_at DESC, w.withdrawal_id DESC LIMIT $5
"""

_WITHDRAWAL: Final = f"{_WITHDRAWALS} WHERE v.user_id = $1 AND w.withdrawal_id = $2"

_OPEN_WITHDRAWALS: Final = f"""{_WITHDRAWALS}
WHERE w.network = $1 AND w.state IN ('asked', 'debited', 'sent', 'returning')
    AND ($2::timestamptz IS NULL OR (w.asked_at, w.withdrawal_id) > ($2, $3))
ORDER BY w.asked_at, w.withdrawal_id LIMIT $4
"""

_WATCHED: Final = """
SELECT epoch, contract_id, ledger, seen_ledger, halted, settlement_halted, updated_at FROM chain_networks
WHERE network = $1
"""

_DEPOSITORS: Final = """
SELECT d.address, d.user_id, d.state, d.reason, d.asked_at, d.answered_at
FROM depositors d JOIN chain_networks n ON n.network = d.network AND n.epoch = d.epoch
WHERE d.network = $1 AND ($2::text IS NULL OR d.state = $2)
    AND ($3::timestamptz IS NULL OR (d.asked_at, d.address) > ($3, $4))
ORDER BY d.asked_at, d.address LIMIT $5
"""

_SUSPENSE: Final = """
SELECT network, epoch, event_id, encode(tx_hash, 'hex') AS hash, address, amount, ledger, closed_at FROM chain_events
WHERE network = $1 AND state = 'suspense' AND (epoch, event_id) > ($2, $3)
ORDER BY epoch, event_id LIMIT $4
"""

_GAPS: Final = """
SELECT network, epoch, first_ledger, last_ledger, found_at, closed_at, closed_by, moved FROM chain_gaps
WHERE network = $1 AND (epoch, first_ledger) > ($2, $3)
ORDER BY epoch, first_ledger LIMIT $4
"""

_COMPARISONS: Final = """
SELECT network, epoch, ledger, at, on_chain, expected, drift, parts FROM chain_reconciliations
WHERE network = $1 AND ($2::timestamptz IS NULL OR at < $2) ORDER BY at DESC LIMIT $3
"""

# One statement, so that all of it is of one moment. `$2` is the ledger compared, `$3` what every reference of this
# history begins with. Captured usage is what the days say, with the minutes that are not final yet counted from the
# events themselves: of all that is ever captured, that is the part which is not the same tomorrow.
_PARTS: Final = """
WITH n AS (
    SELECT network, epoch, opening FROM chain_networks WHERE network = $1 AND ledger >= $2 AND halted IS NULL
), recent AS (
    SELECT u.vault_id, date_trunc('minute', u.created_at, 'UTC') AS minute, sum(u.amount) AS amount
    FROM usage_events u JOIN vaults v ON v.vault_id = u.vault_id AND v.network = $1
    WHERE u.created_at >= (SELECT done_until FROM usage_rollup) AND u.state <> 'held'
    GROUP BY 1, 2
), entries AS (
    SELECT l.kind, starts_with(l.ref, $3) AS own, sum(l.amount) AS amount
    FROM ledger_entries l JOIN vaults v ON v.vault_id = l.vault_id AND v.network = $1
    GROUP BY 1, 2
), events AS (
    SELECT e.*, e.ledger <= $2 AS seen,
        e.vault_id IS NOT NULL AND EXISTS (
            SELECT FROM ledger_entries l
            WHERE l.vault_id = e.vault_id AND l.kind = 'deposit' AND l.ref = $3 || e.event_id) AS credited,
        e.kind IN ('deduct', 'withdraw_to', 'withdraw') AND EXISTS (
            SELECT FROM chain_transactions t
            WHERE t.hash = e.tx_hash OR t.outer_hash = e.tx_hash
                OR t.hash = (SELECT b.inner_hash FROM chain_bumps b WHERE b.hash = e.tx_hash)) AS ours,
        e.kind = 'withdraw_to' AND EXISTS (SELECT FROM withdrawals w WHERE w.tx_hash = e.tx_hash) AS offered
    FROM chain_events e JOIN n ON n.network = e.network AND n.epoch = e.epoch
)
SELECT n.epoch,
    (SELECT coalesce(sum(available + held - owed), 0) FROM vaults WHERE network = $1)::bigint AS balances,
    ((SELECT coalesce(sum(d.amount), 0) FROM vault_days d JOIN vaults v ON v.vault_id = d.vault_id AND v.network = $1)
        + (SELECT coalesce(sum(r.amount), 0) FROM recent r)
        - (SELECT coalesce(sum(m.amount), 0) FROM recent r
               JOIN usage_minutes m ON m.vault_id = r.vault_id AND m.minute = r.minute)
        + (SELECT coalesce(sum(u.amount), 0) FROM usage_open o
               JOIN vaults v ON v.vault_id = o.vault_id AND v.network = $1
               JOIN usage_events u ON u.vault_id = o.vault_id AND u.event_id = o.event_id
               WHERE u.state = 'captured'))::bigint AS captured,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'deduct' AND ours AND seen), 0) FROM events)::bigint AS charged,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'grant'), 0) FROM entries)::bigint AS granted,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'refund'), 0) FROM entries)::bigint AS refunded,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'adjustment' AND NOT own), 0) FROM entries)::bigint AS adjusted,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind IN ('deposit', 'withdrawal') AND NOT own), 0)
     FROM entries)::bigint AS unbacked,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'deposit' AND seen AND state = 'suspense'), 0)
     FROM events)::bigint AS suspense,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'deposit' AND seen AND state = 'noted' AND NOT credited), 0)
     FROM events)::bigint AS noted,
    (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'deposit' AND NOT seen AND credited), 0)
     FROM events)::bigint AS later,
    ((SELECT -coalesce(sum(amount) FILTER (WHERE kind IN ('withdrawal', 'adjustment') AND own), 0) FROM entries)
        - (SELECT coalesce(sum(amount) FILTER (WHERE kind = 'withdraw_to' AND (ours OR offered) AND seen), 0)
           FROM events))::bigint AS withdrawing,
    coalesce(n.opening, 0)::bigint AS opening,
    (SELECT coalesce(sum(g.moved), 0) FROM chain_gaps g WHERE g.network = $1 AND g.epoch = n.epoch)::bigint AS gaps
FROM n
"""


@attrs.frozen
class Asker:
    """Who wants something of his vault."""

    vault_id: VaultId
    standing: str
    wallet: str | None
    """The wallet he has proved to hold."""


@attrs.frozen
class Shown:
    """A deposit as its owner sees it."""

    tx_hash: str
    network: str
    address: str | None
    amount: Stroops
    stage: str
    failure: str | None
    at: datetime
    """When it was prepared; of one that came without, when it arrived."""
    expires_at: datetime | None
    ledger: int | None
    confirmed_at: datetime | None


@attrs.frozen
class ShownWithdrawal:
    """A withdrawal as its owner and operators see it."""

    withdrawal_id: str
    user_id: UserId
    network: str
    address: str
    amount: Stroops
    state: str
    failure: str | None
    tx_hash: str | None
    """Of the payment, once it was seen."""
    ledger: int | None
    asked_at: datetime
    updated_at: datetime


@attrs.frozen
class Suspended:
    """A deposit of nobody known."""

    network: str
    epoch: int
    event_id: str
    tx_hash: str
    address: str | None
    amount: Stroops
    ledger: int
    closed_at: datetime


@attrs.frozen
class Gap:
    """Ledgers that no node could show."""

    network: str
    epoch: int
    first_ledger: int
    last_ledger: int
    found_at: datetime
    closed_at: datetime | None
    closed_by: str | None
    moved: int | None


@attrs.frozen
class Watched:
    """How far a network's events were followed."""

    epoch: int
    contract_id: str
    ledger: int
    seen_ledger: int
    halted: str | None
    settlement_halted: str | None
    updated_at: datetime


@attrs.frozen
class DepositorLine:
    """An address that a user asked for."""

    address: str
    user_id: UserId
    state: str
    reason: str | None
    asked_at: datetime
    answered_at: datetime | None


@attrs.frozen
class Comparison:
    """What the contract had, and should have had."""

    network: str
    epoch: int
    ledger: int
    at: datetime
    on_chain: int
    expected: int
    drift: int
    parts: Mapping[str, int]


async def withdrawer(database: Database, user_id: UserId, network: str) -> Asker | None:
    """Return who asks, with his vault on a network; None where he has none."""
    row = await database.fetch_row(_ASKER, user_id, network)
    if row is None:
        return None
    return Asker(VaultId(str(row["vault_id"])), row["standing"], row["wallet_address"])


async def wallet_of(database: Database, user_id: UserId) -> str | None:
    """Return the wallet that a user has proved to hold."""
    found = await database.fetch_value(_WALLET, user_id)
    return None if found is None else str(found)


async def synced(database: Database, network: str) -> tuple[str, datetime] | None:
    """Return a network's vault contract, and when its events were last looked at; None before the first time."""
    row = await database.fetch_row(_SYNCED, network)
    return None if row is None else (row["contract_id"], row["updated_at"])


async def list_deposits(
    database: Database, user_id: UserId, network: str, before: tuple[datetime, str] | None, limit: int
) -> Sequence[Shown]:
    """Return a user's deposits on a network, the latest first; only those before a moment and a hash."""
    vault_id = await database.fetch_value(_VAULT, user_id, network)
    if vault_id is None:
        return ()
    at, tx_hash = (None, b"") if before is None else (before[0], bytes.fromhex(before[1]))
    return [_shown(row) for row in await database.fetch(_DEPOSIT_LIST, vault_id, at, tx_hash, limit)]


async def find_deposit(database: Database, user_id: UserId, network: str, tx_hash: str) -> Shown | None:
    """Return a user's deposit by the hash of its transaction."""
    vault_id = await database.fetch_value(_VAULT, user_id, network)
    if vault_id is None:
        return None
    row = await database.fetch_row(_DEPOSIT, vault_id, bytes.fromhex(tx_hash))
    return None if row is None else _shown(row)


async def list_withdrawals(
    database: Database, user_id: UserId, network: str, before: tuple[datetime, str] | None, limit: int
) -> Sequence[ShownWithdrawal]:
    """Return a user's withdrawals on a network, the latest first; only those before a moment and an id."""
    at, withdrawal_id = before or (None, None)
    found = await database.fetch(_WITHDRAWAL_LIST, user_id, network, at, withdrawal_id, limit)
    return [_withdrawal(row) for row in found]


async def find_withdrawal(database: Database, user_id: UserId, withdrawal_id: str) -> ShownWithdrawal | None:
    """Return a user's withdrawal."""
    row = await database.fetch_row(_WITHDRAWAL, user_id, withdrawal_id)
    return None if row is None else _withdrawal(row)


async def open_withdrawals(
    database: Database, network: str, after: tuple[datetime, str] | None, limit: int
) -> Sequence[ShownWithdrawal]:
    """Return everyone's withdrawals under way, the oldest first; only those after a moment and an id."""
    at, withdrawal_id = after or (None, None)
    found = await database.fetch(_OPEN_WITHDRAWALS, network, at, withdrawal_id, limit)
    return [_withdrawal(row) for row in found]


async def watched(database: Database, network: str) -> Watched | None:
    """Return how far a network's events were followed; None before the first look."""
    row = await database.fetch_row(_WATCHED, network)
    return None if row is None else Watched(**{name: row[name] for name in attrs.fields_dict(Watched)})


async def list_depositors(
    database: Database, network: str, state: str | None, after: tuple[datetime, str] | None, limit: int
) -> Sequence[DepositorLine]:
    """Return addresses of the present epoch in the order in which they were asked for."""
    at, address = after or (None, None)
    return [
        DepositorLine(
            row["address"],
            UserId(str(row["user_id"])),
            row["state"],
            row["reason"],
            row["asked_at"],
            row["answered_at"],
        )
        for row in await database.fetch(_DEPOSITORS, network, state, at, address, limit)
    ]


async def list_suspense(database: Database, network: str, after: tuple[int, str], limit: int) -> Sequence[Suspended]:
    """Return deposits of nobody known, the oldest first; only those after an epoch and an event id."""
    return [
        Suspended(
            row["network"],
            row["epoch"],
            row["event_id"],
            row["hash"],
            row["address"],
            Stroops(row["amount"]),
            row["ledger"],
            row["closed_at"],
        )
        for row in await database.fetch(_SUSPENSE, network, *after, limit)
    ]


async def list_gaps(database: Database, network: str, after: tuple[int, int], limit: int) -> Sequence[Gap]:
    """Return gaps, the oldest first; only those after an epoch and a first ledger."""
    return [
        Gap(
            row["network"],
            row["epoch"],
            row["first_ledger"],
            row["last_ledger"],
            row["found_at"],
            row["closed_at"],
            row["closed_by"],
            row["moved"],
        )
        for row in await database.fetch(_GAPS, network, *after, limit)
    ]


async def list_comparisons(
    database: Database, network: str, before: datetime | None, limit: int
) -> Sequence[Comparison]:
    """Return comparisons of the contract with the ledger, the latest first."""
    return [
        Comparison(
            row["network"],
            row["epoch"],
            row["ledger"],
            row["at"],
            row["on_chain"],
            row["expected"],
            row["drift"],
            json.loads(row["parts"]),
        )
        for row in await database.fetch(_COMPARISONS, network, before, limit)
    ]


async def parts_at(database: Database, network: str, epoch: int, ledger: int) -> Parts | None:
    """Return what the vault contract's balance should be made of at a ledger.

    Returns:
        None while events up to that ledger are not noted, where the network is halted, or of another epoch by now.
    """
    row = await database.fetch_row(_PARTS, network, ledger, ref_prefix(network, epoch))
    if row is None or row["epoch"] != epoch:
        return None
    return Parts(**{name: row[name] for name in attrs.fields_dict(Parts)})


def _shown(row: Row) -> Shown:
    return Shown(
        row["hash"],
        row["network"],
        row["address"],
        Stroops(row["amount"]),
        row["stage"],
        row["failure"],
        row["at"],
        row["expires_at"],
        row["ledger"],
        row["closed_at"],
    )


def _withdrawal(row: Row) -> ShownWithdrawal:
    return ShownWithdrawal(
        str(row["withdrawal_id"]),
        UserId(str(row["user_id"])),
        row["network"],
        row["address"],
        Stroops(row["amount"]),
        row["state"],
        row["failure"],
        row["hash"],
        row["ledger"],
        row["asked_at"],
        row["updated_at"],
    )
