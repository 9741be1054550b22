"""Withdrawals of developers from the settlement contract, as they were prepared: each known by its hash."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import DeveloperId, UserId
from callora.ledger.money import Stroops
from callora.store.bridge import Database, Row

_COLUMNS: Final = """
w.developer_id, encode(w.tx_hash, 'hex') AS tx_hash, w.network, w.epoch, w.address, w.amount, w.envelope, w.fee,
w.prepared_ledger, w.prepared_at, w.expires_at, w.stage, w.failure, w.ledger, w.applied_at, w.updated_at
"""

_TAKER: Final = """
SELECT d.developer_id, u.wallet_address FROM developers d JOIN users u USING (user_id) WHERE d.user_id = $1
"""

# Whoever prepares for the same developer waits here, so that a limit counted is a limit kept.
_LOCK: Final = "SELECT developer_id FROM developers WHERE developer_id = $1 FOR NO KEY UPDATE"

_FIND: Final = f"""
SELECT {_COLUMNS} FROM developer_withdrawals w WHERE w.developer_id = $1 AND w.tx_hash = $2
"""  # noqa: S608 - columns of ours

_COUNT_OPEN: Final = """
SELECT count(*) FROM developer_withdrawals
WHERE developer_id = $1 AND network = $2 AND stage IN ('approving', 'pending') AND expires_at > $3
"""

_ADD: Final = """
INSERT INTO developer_withdrawals (developer_id, tx_hash, network, epoch, address, amount, envelope, fee,
                                   prepared_ledger, prepared_at, expires_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $10)
"""

_SUBMITTED: Final = """
UPDATE developer_withdrawals SET stage = 'pending', updated_at = $3
WHERE developer_id = $1 AND tx_hash = $2 AND stage = 'approving'
RETURNING true
"""

_CONFIRM: Final = """
UPDATE developer_withdrawals SET stage = 'confirmed', ledger = $3, applied_at = $4, updated_at = $5
WHERE developer_id = $1 AND tx_hash = $2 AND stage IN ('approving', 'pending')
RETURNING true
"""

_FAIL: Final = """
UPDATE developer_withdrawals SET stage = 'failed', failure = left($3, 200), updated_at = $4
WHERE developer_id = $1 AND tx_hash = $2 AND stage IN ('approving', 'pending')
RETURNING true
"""

# A pending one is looked at from the start, one in a wallet's hands once its time is over: a wallet may have sent it.
_TO_LOOK_AT: Final = f"""
SELECT {_COLUMNS} FROM developer_withdrawals w
WHERE w.network = $1 AND (w.stage = 'pending' OR (w.stage = 'approving' AND w.expires_at <= $2))
    AND (w.tx_hash, w.developer_id) > ($3, $4)
ORDER BY w.tx_hash, w.developer_id LIMIT $5
"""  # noqa: S608 - columns of ours


@attrs.frozen
class Payout:
    """A withdrawal of a developer's, as it was prepared."""

    developer_id: DeveloperId
    tx_hash: str
    network: str
    epoch: int
    address: str
    """Whose balance it takes and to whom, `G…`."""
    amount: Stroops
    envelope: str
    fee: int
    """Stroops of XLM, at most."""
    prepared_ledger: int
    prepared_at: datetime
    expires_at: datetime
    stage: str
    """approving, pending, confirmed or failed."""
    failure: str | None
    ledger: int | None
    """The one that holds it."""
    applied_at: datetime | None
    updated_at: datetime

    @property
    def purpose(self) -> str:
        """The name under which it is sent."""
        return f"payout:{self.tx_hash}"


@attrs.frozen
class Taker:
    """A developer who wants his money."""

    developer_id: DeveloperId
    wallet: str | None
    """The one he has proved to hold."""


async def taker(database: Database, user_id: UserId) -> Taker | None:
    """Return a user as a developer; None where he has no profile."""
    row = await database.fetch_row(_TAKER, user_id)
    return None if row is None else Taker(DeveloperId(str(row["developer_id"])), row["wallet_address"])


async def has_room(database: Database, developer_id: DeveloperId, network: str, now: datetime, open_max: int) -> bool:
    """Tell whether a developer may have another under way: asked early, before the chain is."""
    return bool(await database.fetch_value(_COUNT_OPEN, developer_id, network, now) < open_max)


async def add_payout(database: Database, payout: Payout, open_max: int) -> Payout | None:
    """Store what a wallet shall sign, or return what was stored under its hash; None where too many are under way.

    Raises:
        StoreUnavailable: nothing was stored. OutcomeUnknown: it may be stored, and then ends by itself.
    """
    async with database.transaction() as connection:
        await connection.execute(_LOCK, payout.developer_id)
        tx_hash = bytes.fromhex(payout.tx_hash)
        found = await connection.fetch_row(_FIND, payout.developer_id, tx_hash)
        if found is not None:
            return _payout(found)
        count = await connection.fetch_value(_COUNT_OPEN, payout.developer_id, payout.network, payout.prepared_at)
        if count >= open_max:
            return None
        await connection.execute(
            _ADD,
            payout.developer_id,
            tx_hash,
            payout.network,
            payout.epoch,
            payout.address,
            payout.amount,
            payout.envelope,
            payout.fee,
            payout.prepared_ledger,
            payout.prepared_at,
            payout.expires_at,
        )
    return payout


async def find_payout(database: Database, developer_id: DeveloperId, tx_hash: str) -> Payout | None:
    """Return a developer's withdrawal by its hash."""
    row = await database.fetch_row(_FIND, developer_id, bytes.fromhex(tx_hash))
    return None if row is None else _payout(row)


async def note_submitted(database: Database, payout: Payout, now: datetime) -> bool:
    """Note that it was signed and passed on; False where it is further already."""
    return await database.fetch_value(_SUBMITTED, payout.developer_id, bytes.fromhex(payout.tx_hash), now) is not None


async def confirm(database: Database, payout: Payout, ledger: int, applied_at: datetime, now: datetime) -> bool:
    """Note that it is in a ledger; False where it has ended already."""
    key = bytes.fromhex(payout.tx_hash)
    return await database.fetch_value(_CONFIRM, payout.developer_id, key, ledger, applied_at, now) is not None


async def fail(database: Database, payout: Payout, failure: str, now: datetime) -> bool:
    """Note that it provably is in no ledger and never will be; False where it has ended already."""
    key = bytes.fromhex(payout.tx_hash)
    return await database.fetch_value(_FAIL, payout.developer_id, key, failure, now) is not None


async def payouts_to_look_at(
    database: Database, network: str, now: datetime, after: Payout | None, limit: int
) -> Sequence[Payout]:
    """Return those whose outcome may be known by now, in the order of their hashes.

    Args:
        after: the last one seen.
    """
    nobody = "00000000-0000-0000-0000-000000000000"
    place = (b"", nobody) if after is None else (bytes.fromhex(after.tx_hash), after.developer_id)
    return [_payout(row) for row in await database.fetch(_TO_LOOK_AT, network, now, *place, limit)]


def _payout(row: Row) -> Payout:
    return Payout(
        developer_id=DeveloperId(str(row["developer_id"])),
        tx_hash=row["tx_hash"],
        network=row["network"],
        epoch=row["epoch"],
        address=row["address"],
        amount=Stroops(row["amount"]),
        envelope=row["envelope"],
        fee=row["fee"],
        prepared_ledger=row["prepared_ledger"],
        prepared_at=row["prepared_at"],
        expires_at=row["expires_at"],
        stage=row["stage"],
        failure=row["failure"],
        ledger=row["ledger"],
        applied_at=row["applied_at"],
        updated_at=row["updated_at"],
    )
