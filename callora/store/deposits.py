"""Deposits as they were prepared: each known by the hash of its transaction before that is signed."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Database, Row

DAY: Final = timedelta(days=1)

_COLUMNS: Final = """
encode(i.tx_hash, 'hex') AS tx_hash, i.network, i.epoch, i.vault_id, i.address, i.amount, i.envelope, i.fee,
i.prepared_ledger, i.prepared_at, i.expires_at, i.stage, i.failure, i.event_id
"""

# Whoever prepares for the same user waits here, so that a limit counted is a limit kept.
_LOCK_USER: Final = "SELECT user_id FROM users WHERE user_id = $1 FOR NO KEY UPDATE"

_FIND: Final = f"SELECT {_COLUMNS} FROM deposit_intents i WHERE i.tx_hash = $1"  # noqa: S608 - columns of ours

_FIND_OWN: Final = f"""
SELECT {_COLUMNS} FROM deposit_intents i JOIN vaults v USING (vault_id) WHERE i.tx_hash = $1 AND v.user_id = $2
"""  # noqa: S608 - columns of ours

_OPEN: Final = """
SELECT count(*) AS count, min(expires_at) AS ends FROM deposit_intents
WHERE vault_id = $1 AND stage IN ('approving', 'pending') AND expires_at > $2
"""

_ADD: Final = """
INSERT INTO deposit_intents (tx_hash, network, epoch, vault_id, address, amount, envelope, fee, prepared_ledger,
                             prepared_at, expires_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $10)
ON CONFLICT (tx_hash) DO NOTHING
"""

_SPONSORED: Final = """
SELECT count(*) FROM deposit_intents i JOIN vaults v USING (vault_id)
WHERE v.user_id = $1 AND i.sponsored_at > $2 AND i.tx_hash <> $3
"""

_SPONSOR: Final = "UPDATE deposit_intents SET sponsored_at = coalesce(sponsored_at, $2) WHERE tx_hash = $1"

_SUBMITTED: Final = """
UPDATE deposit_intents SET stage = 'pending', updated_at = $2 WHERE tx_hash = $1 AND stage = 'approving'
"""

_FAIL: Final = """
UPDATE deposit_intents SET stage = 'failed', failure = left($2, 200), updated_at = $3
WHERE tx_hash = $1 AND stage IN ('approving', 'pending')
RETURNING true
"""

# A pending one is looked at from the start, one in a wallet's hands once its time is over.
_TO_LOOK_AT: Final = f"""
SELECT {_COLUMNS} FROM deposit_intents i
WHERE i.network = $1 AND (i.stage = 'pending' OR i.stage = 'approving' AND i.expires_at <= $2)
    AND i.tx_hash > $3
ORDER BY i.tx_hash LIMIT $4
"""  # noqa: S608 - columns of ours


@attrs.frozen
class Intent:
    """A deposit that a wallet was asked to sign."""

    tx_hash: str
    network: str
    epoch: int
    vault_id: VaultId
    address: str
    """From where, `G…`."""
    amount: Stroops
    envelope: str
    """Unsigned, complete but for that."""
    fee: int
    """Stroops of XLM, at most."""
    prepared_ledger: int
    """The latest ledger when it was prepared: none before it can hold the transaction."""
    prepared_at: datetime
    expires_at: datetime
    """The transaction's time bound."""
    stage: str
    """approving, pending, confirmed or failed."""
    failure: str | None
    event_id: str | None


@attrs.frozen
class TooManyOpen:
    """The user has as many deposits under way as he may."""

    ends: datetime
    """When the first of them ends by itself."""


async def add_intent(database: Database, user_id: UserId, intent: Intent, open_max: int) -> Intent | TooManyOpen:
    """Store what a wallet shall sign, or return what was stored under its hash before, whosever that is.

    Args:
        user_id: whose vault it is for.
        open_max: how many the vault may have under way.

    Raises:
        StoreUnavailable: nothing was stored. OutcomeUnknown: it may be stored, and then ends by itself.
    """
    tx_hash = bytes.fromhex(intent.tx_hash)
    async with database.transaction() as connection:
        await connection.execute(_LOCK_USER, user_id)
        found = await connection.fetch_row(_FIND, tx_hash)
        if found is not None:
            return _intent(found)
        row = await connection.fetch_row(_OPEN, intent.vault_id, intent.prepared_at)
        assert row is not None
        if row["count"] >= open_max:
            return TooManyOpen(row["ends"])
        added = await connection.execute(
            _ADD,
            tx_hash,
            intent.network,
            intent.epoch,
            intent.vault_id,
            intent.address,
            intent.amount,
            intent.envelope,
            intent.fee,
            intent.prepared_ledger,
            intent.prepared_at,
            intent.expires_at,
        )
        if added == "INSERT 0 1":
            return intent
        found = await connection.fetch_row(_FIND, tx_hash)  # of another user, who was at it at the same time
        assert found is not None
        return _intent(found)


async def count_open(database: Database, vault_id: VaultId, now: datetime, open_max: int) -> TooManyOpen | None:
    """Return whether a vault has as many deposits under way as it may: asked early, before the chain is."""
    row = await database.fetch_row(_OPEN, vault_id, now)
    assert row is not None
    return TooManyOpen(row["ends"]) if row["count"] >= open_max else None


async def find_own_intent(database: Database, tx_hash: str, user_id: UserId) -> Intent | None:
    """Return a user's deposit by its hash."""
    row = await database.fetch_row(_FIND_OWN, bytes.fromhex(tx_hash), user_id)
    return None if row is None else _intent(row)


async def take_sponsorship(database: Database, tx_hash: str, user_id: UserId, now: datetime, a_day_max: int) -> bool:
    """Take one of the fees that Callora pays for a user in a day; again for the same deposit is the same one."""
    key = bytes.fromhex(tx_hash)
    async with database.transaction() as connection:
        await connection.execute(_LOCK_USER, user_id)
        if await connection.fetch_value(_SPONSORED, user_id, now - DAY, key) >= a_day_max:
            return False
        await connection.execute(_SPONSOR, key, now)
        return True


async def note_submitted(database: Database, tx_hash: str, now: datetime) -> None:
    """Note that a deposit was signed and passed on; what is further already stays so."""
    await database.execute(_SUBMITTED, bytes.fromhex(tx_hash), now)


async def fail_intent(database: Database, tx_hash: str, failure: str, now: datetime) -> bool:
    """Note that a deposit provably never arrives; False where it has ended already."""
    return await database.fetch_value(_FAIL, bytes.fromhex(tx_hash), failure, now) is not None


async def intents_to_look_at(
    database: Database, network: str, now: datetime, after: str, limit: int
) -> Sequence[Intent]:
    """Return deposits whose outcome may be known by now, in the order of their hashes.

    Args:
        after: the hash of the last one seen, "" for none.
    """
    return [_intent(row) for row in await database.fetch(_TO_LOOK_AT, network, now, bytes.fromhex(after), limit)]


def _intent(row: Row) -> Intent:
    return Intent(
        tx_hash=row["tx_hash"],
        network=row["network"],
        epoch=row["epoch"],
        vault_id=VaultId(str(row["vault_id"])),
        address=row["address"],
        amount=Stroops(row["amount"]),
        envelope=row["envelope"],
        fee=row["fee"],
        prepared_ledger=row["prepared_ledger"],
        prepared_at=row["prepared_at"],
        expires_at=row["expires_at"],
        stage=row["stage"],
        failure=row["failure"],
        event_id=row["event_id"],
    )
