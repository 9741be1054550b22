"""Who may deposit: asked for by users, answered by the vault contract's owner."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import UserId
from callora.store.bridge import Database, Row

_COLUMNS: Final = "network, epoch, address, user_id, state, reason, envelope, prepared_ledger, asked_at, answered_at"

_LOCK_USER: Final = "SELECT user_id FROM users WHERE user_id = $1 FOR NO KEY UPDATE"

_FIND: Final = f"SELECT {_COLUMNS} FROM depositors WHERE network = $1 AND epoch = $2 AND address = $3"  # noqa: S608

_COUNT: Final = "SELECT count(*) FROM depositors WHERE network = $1 AND epoch = $2 AND user_id = $3"

_ASK: Final = """
INSERT INTO depositors (network, epoch, address, user_id, state, asked_at) VALUES ($1, $2, $3, $4, 'asked', $5)
ON CONFLICT (network, epoch, address) DO NOTHING
"""

_ASK_AGAIN: Final = """
UPDATE depositors SET state = 'asked', asked_at = $5, answered_at = NULL, envelope = NULL, prepared_ledger = NULL
WHERE network = $1 AND epoch = $2 AND address = $3 AND state = 'admitted' AND asked_at = $4
"""

_ANSWER: Final = """
UPDATE depositors SET state = $4, reason = left($5, 200), answered_at = $6
WHERE network = $1 AND epoch = $2 AND address = $3 AND state <> $4
RETURNING true
"""

_OFFER: Final = """
UPDATE depositors SET envelope = $4, prepared_ledger = $5
WHERE network = $1 AND epoch = $2 AND address = $3 AND state = 'asked'
"""

_LIST: Final = f"""
SELECT {_COLUMNS} FROM depositors
WHERE network = $1 AND epoch = $2 AND ($3::text IS NULL OR state = $3) AND (asked_at, address) > ($4, $5)
ORDER BY asked_at, address LIMIT $6
"""  # noqa: S608 - columns of ours

State = Literal["asked", "admitted", "refused"]


@attrs.frozen
class Depositor:
    """An address that somebody wants to deposit from."""

    network: str
    epoch: int
    address: str
    user_id: UserId
    """Who asked first."""
    state: State
    reason: str | None
    envelope: str | None
    """What the owner was given to sign, where his key is not here."""
    prepared_ledger: int | None
    """Of the envelope: it is in no ledger up to this one."""
    asked_at: datetime
    answered_at: datetime | None


async def find_depositor(database: Database, network: str, epoch: int, address: str) -> Depositor | None:
    """Return what is known of an address."""
    row = await database.fetch_row(_FIND, network, epoch, address)
    return None if row is None else _depositor(row)


async def ask_depositor(
    database: Database, network: str, epoch: int, address: str, user_id: UserId, now: datetime, user_max: int
) -> Depositor | None:
    """Return what is known of an address, asked for now where it is new; None where the user has asked for enough.

    Args:
        user_max: how many addresses one user may ask for in an epoch.
    """
    async with database.transaction() as connection:
        await connection.execute(_LOCK_USER, user_id)
        row = await connection.fetch_row(_FIND, network, epoch, address)
        if row is None:
            if await connection.fetch_value(_COUNT, network, epoch, user_id) >= user_max:
                return None
            await connection.execute(_ASK, network, epoch, address, user_id, now)
            row = await connection.fetch_row(_FIND, network, epoch, address)
        assert row is not None
        return _depositor(row)


async def ask_again(database: Database, depositor: Depositor, now: datetime) -> None:
    """Ask anew for an address that was admitted and that the contract does not take any more."""
    await database.execute(_ASK_AGAIN, depositor.network, depositor.epoch, depositor.address, depositor.asked_at, now)


async def answer_depositor(
    database: Database,
    network: str,
    epoch: int,
    address: str,
    state: Literal["admitted", "refused"],
    reason: str | None,
    now: datetime,
) -> bool:
    """Note the owner's answer; False where it was this already, or nobody asked."""
    answered = await database.fetch_value(_ANSWER, network, epoch, address, state, reason, now)
    return answered is not None


async def offer_envelope(database: Database, depositor: Depositor, envelope: str, prepared_ledger: int) -> None:
    """Note what the owner is given to sign, made on a ledger that was closed before."""
    key = depositor.network, depositor.epoch, depositor.address
    await database.execute(_OFFER, *key, envelope, prepared_ledger)


async def list_depositors(
    database: Database,
    network: str,
    epoch: int,
    *,
    state: State | None,
    after: tuple[datetime, str],
    limit: int,
) -> Sequence[Depositor]:
    """Return addresses in the order in which they were asked for, those after a moment and an address."""
    return [_depositor(row) for row in await database.fetch(_LIST, network, epoch, state, *after, limit)]


def _depositor(row: Row) -> Depositor:
    return Depositor(
        row["network"],
        row["epoch"],
        row["address"],
        UserId(str(row["user_id"])),
        row["state"],
        row["reason"],
        row["envelope"],
        row["prepared_ledger"],
        row["asked_at"],
        row["answered_at"],
    )
