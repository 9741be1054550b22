"""Withdrawals: asked, debited, sent, and then confirmed by the chain or given back."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Connection, Database, Row

NEVER_DEBITED: Final = "insufficient_balance"
"""The failure of a withdrawal that the vault did not cover."""

_COLUMNS: Final = """
w.withdrawal_id, w.network, w.epoch, w.vault_id, w.address, w.amount, w.state, w.failure,
encode(w.tx_hash, 'hex') AS tx_hash, w.envelope, w.prepared_ledger, w.expires_at, w.event_id, w.asked_at, w.updated_at
"""

_LOCK_USER: Final = "SELECT user_id FROM users WHERE user_id = $1 FOR NO KEY UPDATE"

_FIND: Final = f"SELECT {_COLUMNS} FROM withdrawals w WHERE w.withdrawal_id = $1"  # noqa: S608 - columns of ours

_COUNT_OPEN: Final = """
SELECT count(*) FROM withdrawals WHERE vault_id = $1 AND state IN ('asked', 'debited', 'sent', 'returning')
"""

_ADD: Final = """
INSERT INTO withdrawals (withdrawal_id, network, epoch, vault_id, address, amount, state, asked_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, 'asked', $7, $7)
"""

_MOVE: Final = """
UPDATE withdrawals SET state = $3, failure = left($4, 200), updated_at = $5
WHERE withdrawal_id = $1 AND state = $2
RETURNING true
"""

_END_RETURN: Final = """
UPDATE withdrawals SET state = 'failed', updated_at = $2 WHERE withdrawal_id = $1 AND state = 'returning'
RETURNING true
"""

# Nothing was debited, so that the same withdrawal may be tried again.
_ASK_AGAIN: Final = f"""
UPDATE withdrawals SET state = 'asked', failure = NULL, updated_at = $2
WHERE withdrawal_id = $1 AND state = 'failed' AND failure = '{NEVER_DEBITED}'
"""  # noqa: S608 - a word of ours

_LOCK: Final = "SELECT state, tx_hash FROM withdrawals WHERE withdrawal_id = $1 FOR UPDATE"

# What may still be applied, or has been. Asked with the withdrawal's row locked, for which whoever stores a payment
# waits as well.
_MAY_BE_PAID: Final = """
SELECT EXISTS (SELECT FROM chain_transactions WHERE purpose = $1 AND state NOT IN ('failed', 'dead'))
"""

_OFFER: Final = """
UPDATE withdrawals
SET state = 'sent', tx_hash = $2, envelope = $3, prepared_ledger = $4, expires_at = $5, updated_at = $6
WHERE withdrawal_id = $1
"""

_OPEN: Final = f"""
SELECT {_COLUMNS} FROM withdrawals w
WHERE w.network = $1 AND w.state IN ('asked', 'debited', 'sent', 'returning')
    AND (w.asked_at, w.withdrawal_id) > ($2, $3)
ORDER BY w.asked_at, w.withdrawal_id LIMIT $4
"""  # noqa: S608 - columns of ours


@attrs.frozen
class Withdrawal:
    """Money on its way back to its owner."""

    withdrawal_id: str
    network: str
    epoch: int
    vault_id: VaultId
    address: str
    """To where, `G…`."""
    amount: Stroops
    state: str
    """asked, debited, sent, returning, confirmed or failed."""
    failure: str | None
    tx_hash: str | None
    """Of what the owner was given to sign."""
    envelope: str | None
    prepared_ledger: int | None
    expires_at: datetime | None
    event_id: str | None
    asked_at: datetime
    updated_at: datetime

    @property
    def purpose(self) -> str:
        """The name under which its one payment is sent."""
        return purpose_of(self.withdrawal_id)


def purpose_of(withdrawal_id: str) -> str:
    """Return the name under which a withdrawal's one payment is sent."""
    return f"withdraw:{withdrawal_id}"


async def add_withdrawal(
    database: Database, user_id: UserId, withdrawal: Withdrawal, open_max: int
) -> Withdrawal | None:
    """Store a withdrawal as asked, or return the one of this id; None where the vault has too many under way.

    Raises:
        StoreUnavailable: nothing was stored. OutcomeUnknown: the same again tells.
    """
    async with database.transaction() as connection:
        await connection.execute(_LOCK_USER, user_id)
        found = await connection.fetch_row(_FIND, withdrawal.withdrawal_id)
        if found is not None:
            known = _withdrawal(found)
            if known.failure != NEVER_DEBITED:
                return known
            await connection.execute(_ASK_AGAIN, known.withdrawal_id, withdrawal.asked_at)
            return attrs.evolve(known, state="asked", failure=None)
        if await connection.fetch_value(_COUNT_OPEN, withdrawal.vault_id) >= open_max:
            return None
        await connection.execute(
            _ADD,
            withdrawal.withdrawal_id,
            withdrawal.network,
            withdrawal.epoch,
            withdrawal.vault_id,
            withdrawal.address,
            withdrawal.amount,
            withdrawal.asked_at,
        )
    return withdrawal


async def find_withdrawal(database: Database, withdrawal_id: str) -> Withdrawal | None:
    """Return a withdrawal, whosever it is."""
    row = await database.fetch_row(_FIND, withdrawal_id)
    return None if row is None else _withdrawal(row)


async def move_withdrawal(
    database: Database, withdrawal_id: str, before: str, after: str, now: datetime, failure: str | None = None
) -> bool:
    """Move a withdrawal from one state to another; False where it is not in the first."""
    return await database.fetch_value(_MOVE, withdrawal_id, before, after, failure, now) is not None


async def end_return(database: Database, withdrawal_id: str, now: datetime) -> bool:
    """Note that a withdrawal was given back; False where that was noted before."""
    return await database.fetch_value(_END_RETURN, withdrawal_id, now) is not None


async def begin_return(database: Database, withdrawal: Withdrawal, failure: str, now: datetime) -> bool:
    """Decide that a debited withdrawal is not paid but given back; from then on no payment of it can be stored.

    Args:
        withdrawal: as it was read; what it names as offered to the owner must provably be dead.

    Returns:
        False where a payment of it may still be applied, or was, or others have moved it on.
    """
    async with database.transaction() as connection:
        state = await _unpaid(connection, withdrawal)
        if state is None:
            return False
        await connection.fetch_value(_MOVE, withdrawal.withdrawal_id, state, "returning", failure, now)
        return True


async def offer_payment(
    database: Database,
    withdrawal: Withdrawal,
    tx_hash: str,
    envelope: str,
    ledger: int,
    expires_at: datetime,
    now: datetime,
) -> bool:
    """Note what the owner is given to sign; from then on no other payment of it can be stored.

    Args:
        withdrawal: as it was read; what it names as offered before must provably be dead.
        ledger: the latest then: no ledger before it can hold the payment.

    Returns:
        False where a payment of it may still be applied, or was, or others have moved it on.
    """
    async with database.transaction() as connection:
        if await _unpaid(connection, withdrawal) is None:
            return False
        args = (withdrawal.withdrawal_id, bytes.fromhex(tx_hash), envelope, ledger, expires_at, now)
        await connection.execute(_OFFER, *args)
        return True


async def _unpaid(connection: Connection, withdrawal: Withdrawal) -> str | None:
    """Lock a withdrawal and return its state; None unless it is debited, as it was read, and certainly not paid."""
    row = await connection.fetch_row(_LOCK, withdrawal.withdrawal_id)
    offered = None if withdrawal.tx_hash is None else bytes.fromhex(withdrawal.tx_hash)
    if row is None or row["state"] not in ("debited", "sent") or row["tx_hash"] != offered:
        return None
    if await connection.fetch_value(_MAY_BE_PAID, withdrawal.purpose):
        return None
    return str(row["state"])


async def open_withdrawals(
    database: Database, network: str, after: tuple[datetime, str], limit: int
) -> Sequence[Withdrawal]:
    """Return withdrawals under way, in the order in which they were asked for.

    Args:
        after: when the last one seen was asked for, and its id.
    """
    return [_withdrawal(row) for row in await database.fetch(_OPEN, network, *after, limit)]


def _withdrawal(row: Row) -> Withdrawal:
    return Withdrawal(
        withdrawal_id=str(row["withdrawal_id"]),
        network=row["network"],
        epoch=row["epoch"],
        vault_id=VaultId(str(row["vault_id"])),
        address=row["address"],
        amount=Stroops(row["amount"]),
        state=row["state"],
        failure=row["failure"],
        tx_hash=row["tx_hash"],
        envelope=row["envelope"],
        prepared_ledger=row["prepared_ledger"],
        expires_at=row["expires_at"],
        event_id=row["event_id"],
        asked_at=row["asked_at"],
        updated_at=row["updated_at"],
    )
