"""Requests for more credits as they are stored: decided once, and granted once after that."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.store.bridge import Connection, Database, Row

COLUMNS: Final = """
request_id, vault_id, user_id, credits, reason, state, created_at, decided_at, answer, grant_id, granted, expires_at,
granted_at
"""

_OPEN: Final = "SELECT count(*) FROM quota_requests WHERE user_id = $1 AND vault_id = $2 AND state = 'open'"

_ADD: Final = """
INSERT INTO quota_requests (request_id, vault_id, user_id, credits, reason, created_at)
VALUES ($1, $2, $3, $4, $5, $6)
"""

_APPROVE: Final = f"""
UPDATE quota_requests SET state = 'approved', granted = coalesce($2, credits), expires_at = $3, grant_id = $4,
                          decided_at = $5, decided_by = $6
WHERE request_id = $1 AND state = 'open'
RETURNING {COLUMNS}
"""  # noqa: S608 - columns of ours

_REJECT: Final = f"""
UPDATE quota_requests SET state = 'rejected', answer = $2, decided_at = $3, decided_by = $4
WHERE request_id = $1 AND state = 'open'
RETURNING {COLUMNS}
"""  # noqa: S608 - columns of ours

_GRANTED: Final = """
UPDATE quota_requests SET granted_at = $2 WHERE request_id = $1 AND state = 'approved' AND granted_at IS NULL
RETURNING true
"""

_LEFT: Final = f"""
SELECT {COLUMNS} FROM quota_requests
WHERE state = 'approved' AND granted_at IS NULL AND decided_at <= $1
ORDER BY decided_at LIMIT $2
"""  # noqa: S608 - columns of ours


@attrs.frozen
class QuotaRequest:
    """Credits that a vault's owner asked for, and what was decided."""

    request_id: str
    """UUIDv7."""
    vault_id: VaultId
    user_id: UserId
    credits: int
    """Asked for, > 0."""
    reason: str
    state: Literal["open", "approved", "rejected"]
    created_at: datetime
    decided_at: datetime | None
    answer: str | None
    """Why it was rejected, where that was said."""
    grant_id: str | None
    granted: int | None
    """What was approved."""
    expires_at: datetime | None
    granted_at: datetime | None
    """When it was given; None while it is not."""


def request_of(row: Row) -> QuotaRequest:
    """Return a row as what it is."""
    return QuotaRequest(
        request_id=str(row["request_id"]),
        vault_id=VaultId(str(row["vault_id"])),
        user_id=UserId(str(row["user_id"])),
        credits=row["credits"],
        reason=row["reason"],
        state=row["state"],
        created_at=row["created_at"],
        decided_at=row["decided_at"],
        answer=row["answer"],
        grant_id=None if row["grant_id"] is None else str(row["grant_id"]),
        granted=row["granted"],
        expires_at=row["expires_at"],
        granted_at=row["granted_at"],
    )


async def count_open(connection: Connection, user_id: UserId, vault_id: VaultId) -> int:
    """Return how many of a vault's requests are undecided; exact while the user is locked."""
    count: int = await connection.fetch_value(_OPEN, user_id, vault_id)
    return count


async def add_request(
    connection: Connection,
    request_id: str,
    vault_id: VaultId,
    user_id: UserId,
    credits_asked: int,
    reason: str,
    now: datetime,
) -> None:
    """Store a request."""
    await connection.execute(_ADD, request_id, vault_id, user_id, credits_asked, reason, now)


async def approve(
    database: Database,
    request_id: str,
    credits_granted: int | None,
    expires_at: datetime,
    grant_id: str,
    now: datetime,
    by: str,
) -> QuotaRequest | None:
    """Fix what an open request is given, before it is given; None where it is not open.

    Args:
        credits_granted: None: what was asked for.
    """
    row = await database.fetch_row(_APPROVE, request_id, credits_granted, expires_at, grant_id, now, by)
    return None if row is None else request_of(row)


async def reject(
    connection: Connection, request_id: str, answer: str | None, now: datetime, by: str
) -> QuotaRequest | None:
    """Reject an open request; None where it is not open."""
    row = await connection.fetch_row(_REJECT, request_id, answer, now, by)
    return None if row is None else request_of(row)


async def note_granted(connection: Connection, request_id: str, now: datetime) -> bool:
    """Note that an approved request has been given. False where that was noted before."""
    return bool(await connection.fetch_value(_GRANTED, request_id, now))


async def left_ungranted(database: Database, before: datetime, limit: int) -> Sequence[QuotaRequest]:
    """Return at most `limit` requests that were approved until then, and of which nobody knows that they are given."""
    return [request_of(row) for row in await database.fetch(_LEFT, before, limit)]
