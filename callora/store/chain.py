"""What the chain said: how far the vault contract's events were followed, the events themselves, and what was made of
each. What is noted here is noted in the database transaction that moves the cursor past it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.chain import VaultEvent
from callora.ledger.ids import UserId, VaultId
from callora.ledger.watching import Seen
from callora.store.bridge import Database, Row

_COLUMNS: Final = """
network, passphrase, epoch, contract_id, ledger, seen_ledger, closed_at, cursor, opening, halted, settlement_halted,
updated_at
"""

_FIND: Final = f"SELECT {_COLUMNS} FROM chain_networks WHERE network = $1"  # noqa: S608 - columns of ours

_ADD: Final = """
INSERT INTO chain_networks (network, passphrase, contract_id, ledger, seen_ledger, updated_at)
VALUES ($1, $2, $3, 0, 0, $4) ON CONFLICT (network) DO NOTHING
"""

_MOVE: Final = """
UPDATE chain_networks
SET ledger = $5, seen_ledger = $6, closed_at = $7, cursor = $8, opening = coalesce(opening, $9), updated_at = $10
WHERE network = $1 AND epoch = $2 AND ledger = $3 AND cursor IS NOT DISTINCT FROM $4 AND halted IS NULL
"""

_NOTE: Final = """
INSERT INTO chain_events (network, epoch, event_id, kind, ledger, closed_at, tx_hash, address, amount, balance_after,
                          state, noted_at, booked_at)
SELECT $1, $2, e.event_id, e.kind, e.ledger, e.closed_at, decode(e.tx_hash, 'hex'), e.address, e.amount,
       e.balance_after, CASE WHEN e.kind IN ('deduct', 'distribute') THEN 'booked' ELSE 'noted' END,
       $3::timestamptz, CASE WHEN e.kind IN ('deduct', 'distribute') THEN $3::timestamptz END
FROM unnest($4::text[], $5::text[], $6::bigint[], $7::timestamptz[], $8::text[], $9::text[], $10::bigint[],
            $11::bigint[]) AS e (event_id, kind, ledger, closed_at, tx_hash, address, amount, balance_after)
ON CONFLICT (network, epoch, event_id) DO NOTHING
"""

_GAP: Final = """
INSERT INTO chain_gaps (network, epoch, first_ledger, last_ledger, found_at) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (network, epoch, first_ledger) DO NOTHING
"""

_CLOSE_GAP: Final = """
UPDATE chain_gaps SET closed_at = $5, closed_by = left($6, 255), moved = $4
WHERE network = $1 AND epoch = $2 AND first_ledger = $3 AND closed_at IS NULL
RETURNING true
"""

_HALT: Final = """
UPDATE chain_networks SET halted = left($3, 200), updated_at = $4
WHERE network = $1 AND epoch = $2 AND halted IS NULL
RETURNING true
"""

_NOTE_OPENING: Final = """
UPDATE chain_networks SET opening = $3 WHERE network = $1 AND epoch = $2 AND opening IS NULL AND halted IS NULL
RETURNING true
"""

_BEGIN_EPOCH: Final = """
UPDATE chain_networks
SET epoch = epoch + 1, passphrase = $3, contract_id = $4, ledger = 0, seen_ledger = 0, closed_at = NULL, cursor = NULL,
    opening = NULL, halted = NULL, updated_at = $5
WHERE network = $1 AND epoch = $2 AND halted IS NOT NULL
RETURNING true
"""

_HALT_SETTLEMENT: Final = """
UPDATE chain_networks SET settlement_halted = left($3, 200)
WHERE network = $1 AND epoch = $2 AND settlement_halted IS NULL
RETURNING true
"""

_RESUME_SETTLEMENT: Final = """
UPDATE chain_networks SET settlement_halted = NULL WHERE network = $1 AND settlement_halted IS NOT NULL RETURNING true
"""

_OPEN: Final = """
SELECT e.network, e.epoch, e.event_id, e.kind, encode(e.tx_hash, 'hex') AS tx_hash, e.address, e.amount, e.vault_id
FROM chain_events e JOIN chain_networks n ON n.network = e.network
WHERE e.network = $1 AND n.halted IS NULL AND e.state = 'noted' AND (e.epoch, e.event_id) > ($2, $3)
ORDER BY e.epoch, e.event_id LIMIT $4
"""

# The transaction of an event is the outermost one; what was prepared may be inside a fee-bump of ours.
_HASHES: Final = """(SELECT $1::bytea UNION ALL SELECT inner_hash FROM chain_bumps WHERE hash = $1
    UNION ALL SELECT hash FROM chain_transactions WHERE outer_hash = $1)"""

_INTENT_VAULT: Final = f"SELECT vault_id FROM deposit_intents WHERE tx_hash IN {_HASHES}"  # noqa: S608

_IS_OURS: Final = f"""
SELECT EXISTS (SELECT FROM deposit_intents WHERE tx_hash IN {_HASHES})
    OR EXISTS (SELECT FROM chain_transactions WHERE hash IN {_HASHES})
    OR EXISTS (SELECT FROM withdrawals WHERE tx_hash IN {_HASHES})
"""  # noqa: S608 - SQL of ours

_WALLET_USER: Final = "SELECT user_id FROM users WHERE wallet_address = $1"

_GIVE: Final = """
UPDATE chain_events SET vault_id = $4, state = 'noted'
WHERE network = $1 AND epoch = $2 AND event_id = $3 AND kind = 'deposit' AND vault_id IS NULL AND state = $5
RETURNING true
"""

_SUSPEND: Final = """
UPDATE chain_events SET state = 'suspense'
WHERE network = $1 AND epoch = $2 AND event_id = $3 AND state = 'noted' AND vault_id IS NULL
RETURNING true
"""

_CLAIM: Final = """
UPDATE chain_events SET vault_id = $3, state = 'noted'
WHERE network = $1 AND address = $2 AND kind = 'deposit' AND state = 'suspense'
RETURNING network, epoch, event_id, kind, encode(tx_hash, 'hex') AS tx_hash, address, amount, vault_id
"""

_OWN_NOTED: Final = """
SELECT network, epoch, event_id, kind, encode(tx_hash, 'hex') AS tx_hash, address, amount, vault_id FROM chain_events
WHERE network = $1 AND vault_id = $2 AND kind = 'deposit' AND state = 'noted'
"""

_BOOK_DEPOSIT: Final = """
WITH booked AS (
    UPDATE chain_events SET state = 'booked', booked_at = $4
    WHERE network = $1 AND epoch = $2 AND event_id = $3 AND state = 'noted'
    RETURNING true
), confirmed AS (
    UPDATE deposit_intents i SET stage = 'confirmed', failure = NULL, event_id = $3, updated_at = $4
    WHERE i.stage <> 'confirmed' AND EXISTS (SELECT FROM booked)
        AND i.tx_hash IN (SELECT $5::bytea UNION ALL SELECT inner_hash FROM chain_bumps WHERE hash = $5
                          UNION ALL SELECT hash FROM chain_transactions WHERE outer_hash = $5)
)
SELECT count(*) FROM booked
"""

# Which withdrawal a payment is: by what the owner was given to sign, or by the purpose it was stored for.
_PAID: Final = f"""
SELECT withdrawal_id, vault_id, address, amount FROM withdrawals
WHERE tx_hash IN {_HASHES}
   OR withdrawal_id IN (SELECT substr(purpose, 10)::uuid FROM chain_transactions
                        WHERE hash IN {_HASHES} AND purpose LIKE 'withdraw:%')
"""  # noqa: S608 - SQL of ours

_BOOK_PAYMENT: Final = """
WITH booked AS (
    UPDATE chain_events SET state = 'booked', booked_at = $4, vault_id = $5
    WHERE network = $1 AND epoch = $2 AND event_id = $3 AND state = 'noted'
    RETURNING event_id
), confirmed AS (
    UPDATE withdrawals SET state = 'confirmed', event_id = $3, updated_at = $4
    WHERE withdrawal_id = $6 AND state IN ('asked', 'debited', 'sent') AND EXISTS (SELECT FROM booked)
    RETURNING withdrawal_id
)
SELECT (SELECT count(*) FROM booked) AS booked, (SELECT count(*) FROM confirmed) AS confirmed
"""

_RECONCILED: Final = """
INSERT INTO chain_reconciliations (network, epoch, ledger, at, on_chain, expected, parts)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
"""


@attrs.frozen
class WatchedNetwork:
    """How a network's history is followed."""

    network: str
    passphrase: str
    epoch: int
    contract_id: str
    seen: Seen
    opening: int | None
    halted: str | None
    """Why nothing is noted or credited, until an operator begins a new epoch."""
    settlement_halted: str | None
    updated_at: datetime


@attrs.frozen
class NotedEvent:
    """An event that is noted and not booked."""

    network: str
    epoch: int
    event_id: str
    kind: str
    tx_hash: str
    """Of the outermost transaction; of what was prepared, where a stranger's fee-bump around it was looked into."""
    address: str | None
    amount: int
    vault_id: VaultId | None
    """Whose it is, once that was decided; never changed then."""


@attrs.frozen
class Payment:
    """The withdrawal that an event paid."""

    withdrawal_id: str
    vault_id: VaultId
    address: str
    amount: int


async def find_network(database: Database, network: str) -> WatchedNetwork | None:
    """Return how far a network's events were followed; None where never."""
    row = await database.fetch_row(_FIND, network)
    return None if row is None else _watched(row)


async def add_network(database: Database, network: str, passphrase: str, contract_id: str, now: datetime) -> None:
    """Begin to follow a network, unless somebody has."""
    await database.execute(_ADD, network, passphrase, contract_id, now)


async def note_page(
    database: Database,
    watched: WatchedNetwork,
    to: Seen,
    events: Sequence[VaultEvent],
    opening: int | None,
    now: datetime,
    gap: tuple[int, int] | None = None,
) -> bool:
    """Note events and move the cursor past them, at once or not at all.

    Args:
        watched: what the cursor was read as; another listener may have moved it since.
        events: of this contract, in order; those noted before are left as they are.
        opening: what the contract had before the first of them, where that is not known yet.
        gap: ledgers that are passed over because no node has them any more.

    Returns:
        False where another listener was first, or the network was halted; nothing was written then.
    """
    seen = watched.seen
    async with database.transaction() as connection:
        moved = await connection.execute(
            _MOVE,
            watched.network,
            watched.epoch,
            seen.ledger,
            seen.cursor,
            to.ledger,
            to.seen_ledger,
            to.closed_at,
            to.cursor,
            opening,
            now,
        )
        if moved != "UPDATE 1":
            return False
        if gap is not None:
            await connection.execute(_GAP, watched.network, watched.epoch, *gap, now)
        if events:
            await connection.execute(
                _NOTE,
                watched.network,
                watched.epoch,
                now,
                [each.event_id for each in events],
                [each.kind for each in events],
                [each.ledger for each in events],
                [each.closed_at for each in events],
                [each.tx_hash for each in events],
                [each.address for each in events],
                [each.amount for each in events],
                [each.balance_after for each in events],
            )
    return True


async def halt(database: Database, watched: WatchedNetwork, reason: str, now: datetime) -> bool:
    """Note and credit nothing more in this epoch; False where it is halted already, or another epoch has begun."""
    return await database.fetch_value(_HALT, watched.network, watched.epoch, reason, now) is not None


async def begin_epoch(
    database: Database, network: str, after_epoch: int, passphrase: str, contract_id: str, now: datetime
) -> bool:
    """Follow a new history from its beginning; False where this epoch is not the present one, or is not halted."""
    begun = await database.fetch_value(_BEGIN_EPOCH, network, after_epoch, passphrase, contract_id, now)
    return begun is not None


async def halt_settlement(database: Database, network: str, epoch: int, reason: str) -> bool:
    """Let nothing be settled; False where that is so already."""
    return await database.fetch_value(_HALT_SETTLEMENT, network, epoch, reason) is not None


async def resume_settlement(database: Database, network: str) -> bool:
    """Let settlement go on; False where it was not stopped."""
    return await database.fetch_value(_RESUME_SETTLEMENT, network) is not None


async def close_gap(
    database: Database, network: str, epoch: int, first_ledger: int, moved: int, by: str, now: datetime
) -> bool:
    """Close a gap; False where there is no open one that begins there.

    Args:
        moved: by how many stroops its ledgers changed the contract's balance, of any sign.
        by: who says so.
    """
    return await database.fetch_value(_CLOSE_GAP, network, epoch, first_ledger, moved, now, by) is not None


async def open_events(database: Database, network: str, after: tuple[int, str], limit: int) -> Sequence[NotedEvent]:
    """Return events that are not booked, in order; none while the network is halted.

    Args:
        after: epoch and id of the last one seen.
    """
    return [_noted(row) for row in await database.fetch(_OPEN, network, *after, limit)]


async def own_open_deposits(database: Database, network: str, vault_id: VaultId) -> Sequence[NotedEvent]:
    """Return deposits that are a vault's and not credited yet."""
    return [_noted(row) for row in await database.fetch(_OWN_NOTED, network, vault_id)]


async def is_ours(database: Database, tx_hash: str) -> bool:
    """Tell whether this is the hash of a transaction that was prepared or sent here, or of a fee-bump of ours."""
    return bool(await database.fetch_value(_IS_OURS, bytes.fromhex(tx_hash)))


async def vault_of_intent(database: Database, tx_hash: str) -> VaultId | None:
    """Return the vault for which the deposit of this transaction was prepared; the transaction may be our fee-bump."""
    found = await database.fetch_value(_INTENT_VAULT, bytes.fromhex(tx_hash))
    return None if found is None else VaultId(str(found))


async def user_of_wallet(database: Database, address: str) -> UserId | None:
    """Return the user who has proved to hold this wallet."""
    found = await database.fetch_value(_WALLET_USER, address)
    return None if found is None else UserId(str(found))


async def give_event(
    database: Database, network: str, epoch: int, event_id: str, vault_id: VaultId, state: str = "noted"
) -> bool:
    """Decide whose a deposit is, for ever; False where that is decided, or it is not in this state.

    Args:
        state: noted, or suspense for one that is found an owner late.
    """
    return await database.fetch_value(_GIVE, network, epoch, event_id, vault_id, state) is not None


async def suspend_event(database: Database, event: NotedEvent) -> bool:
    """Keep a deposit of nobody known; False where somebody was found meanwhile."""
    return await database.fetch_value(_SUSPEND, event.network, event.epoch, event.event_id) is not None


async def claim_events(database: Database, network: str, address: str, vault_id: VaultId) -> Sequence[NotedEvent]:
    """Give every deposit in suspense of this address to a vault; each is given once, whoever claims it."""
    return [_noted(row) for row in await database.fetch(_CLAIM, network, address, vault_id)]


async def book_deposit(database: Database, event: NotedEvent, now: datetime) -> bool:
    """Note that a deposit is credited, and confirm the intent it was prepared as; False where that was noted before."""
    args = (event.network, event.epoch, event.event_id, now, bytes.fromhex(event.tx_hash))
    return bool(await database.fetch_value(_BOOK_DEPOSIT, *args))


async def payment_of(database: Database, tx_hash: str) -> Payment | None:
    """Return the withdrawal that a transaction pays; None for none of ours."""
    row = await database.fetch_row(_PAID, bytes.fromhex(tx_hash))
    if row is None:
        return None
    return Payment(str(row["withdrawal_id"]), VaultId(str(row["vault_id"])), row["address"], row["amount"])


async def book_payment(
    database: Database, event: NotedEvent, payment: Payment | None, now: datetime
) -> tuple[bool, bool]:
    """Note that a payment was seen, and confirm its withdrawal.

    Returns:
        Whether the event was booked now, and whether a withdrawal was confirmed by it.
    """
    vault_id = None if payment is None else payment.vault_id
    withdrawal_id = None if payment is None else payment.withdrawal_id
    row = await database.fetch_row(
        _BOOK_PAYMENT, event.network, event.epoch, event.event_id, now, vault_id, withdrawal_id
    )
    assert row is not None
    return bool(row["booked"]), bool(row["confirmed"])


async def note_opening(database: Database, watched: WatchedNetwork, opening: int) -> bool:
    """Note what the contract had before the first event of this history; False where that is noted already.

    Args:
        opening: stroops.
    """
    return await database.fetch_value(_NOTE_OPENING, watched.network, watched.epoch, opening) is not None


async def note_reconciliation(
    database: Database,
    watched: WatchedNetwork,
    ledger: int,
    on_chain: int,
    expected: int,
    parts: Mapping[str, int],
    now: datetime,
) -> None:
    """Store what a comparison came to."""
    document = json.dumps(dict(parts))
    await database.execute(_RECONCILED, watched.network, watched.epoch, ledger, now, on_chain, expected, document)


def _watched(row: Row) -> WatchedNetwork:
    return WatchedNetwork(
        row["network"],
        row["passphrase"],
        row["epoch"],
        row["contract_id"],
        Seen(row["ledger"], row["cursor"], row["seen_ledger"], row["closed_at"]),
        row["opening"],
        row["halted"],
        row["settlement_halted"],
        row["updated_at"],
    )


def _noted(row: Row) -> NotedEvent:
    vault_id = row["vault_id"]
    return NotedEvent(
        row["network"],
        row["epoch"],
        row["event_id"],
        row["kind"],
        row["tx_hash"],
        row["address"],
        row["amount"],
        None if vault_id is None else VaultId(str(vault_id)),
    )
