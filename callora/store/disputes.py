"""Disputes of usage events: one an event, decided once by an operator, and refunded once after that."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import ApiId, DeveloperId, EndpointId, EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Connection, Database, Row

Status = Literal["OPEN", "REFUNDING", "REFUNDED", "UPHELD"]

COLUMNS: Final = """
dispute_id, vault_id, event_id, user_id, reason, status, created_at, moved_at, decided_at, decided_by, notes, refunded
"""

# The vaults of a user are few, and each is looked at by the primary key of its events.
_OWN_EVENT: Final = """
SELECT v.vault_id, u.state::text AS state, coalesce(u.amount, 0) - coalesce((
           SELECT sum(e.amount) FROM ledger_entries e
           WHERE e.vault_id = v.vault_id AND e.event_id = u.event_id AND e.kind = 'refund'
       ), 0)::bigint AS refundable
FROM vaults v JOIN usage_events u ON u.vault_id = v.vault_id
WHERE v.user_id = $1 AND u.event_id = $2
"""

_SUBJECT: Final = """
SELECT u.api_id, u.endpoint_id, u.developer_id, u.amount, d.user_id AS developer
FROM usage_events u LEFT JOIN developers d ON d.developer_id = u.developer_id
WHERE u.vault_id = $1 AND u.event_id = $2
"""

_ADD: Final = f"""
INSERT INTO disputes (dispute_id, vault_id, event_id, user_id, reason, created_at, moved_at)
VALUES ($1, $2, $3, $4, $5, $6, $6)
ON CONFLICT (vault_id, event_id) DO NOTHING
RETURNING {COLUMNS}
"""  # noqa: S608 - columns of ours

_OF_EVENT: Final = f"SELECT {COLUMNS} FROM disputes WHERE vault_id = $1 AND event_id = $2"  # noqa: S608

_DECIDE: Final = f"""
UPDATE disputes SET status = $2, decided_at = $3, moved_at = $3, decided_by = $4, notes = $5
WHERE dispute_id = $1 AND status = 'OPEN'
RETURNING {COLUMNS}
"""  # noqa: S608 - columns of ours

_REFUNDED: Final = f"""
UPDATE disputes SET status = 'REFUNDED', refunded = $2, moved_at = $3
WHERE dispute_id = $1 AND status = 'REFUNDING'
RETURNING {COLUMNS}
"""  # noqa: S608 - columns of ours

_TAKE_BACK: Final = """
UPDATE disputes SET status = 'OPEN', decided_at = NULL, decided_by = NULL, notes = NULL, moved_at = $2
WHERE dispute_id = $1 AND status = 'REFUNDING'
"""

_LEFT: Final = f"""
SELECT {COLUMNS} FROM disputes WHERE status = 'REFUNDING' AND dispute_id > $1 ORDER BY dispute_id LIMIT $2
"""  # noqa: S608 - columns of ours


@attrs.frozen
class Dispute:
    """A charge that its payer disputes, and what was decided."""

    dispute_id: str
    """UUIDv7."""
    vault_id: VaultId
    """Who paid."""
    event_id: EventId
    user_id: UserId
    reason: str
    status: Status
    created_at: datetime
    moved_at: datetime
    """When it came to its status."""
    decided_at: datetime | None
    decided_by: str | None
    notes: str | None
    refunded: Stroops | None
    """What was given back under it; None while nothing was."""

    @property
    def refund_ref(self) -> str:
        """The name of its refund in the ledger, for ever."""
        return f"dispute:{self.dispute_id}"


@attrs.frozen
class OwnEvent:
    """A usage event of one's own vault."""

    vault_id: VaultId
    state: Literal["held", "captured", "released", "expired"]
    refundable: Stroops
    """What of its charge is left to give back."""


@attrs.frozen
class Subject:
    """What a dispute is about."""

    api_id: ApiId
    endpoint_id: EndpointId
    developer_id: DeveloperId
    amount: Stroops
    """What was charged."""
    developer: UserId | None
    """The developer as a user."""


def dispute_of(row: Row) -> Dispute:
    """Return a row as what it is."""
    return Dispute(
        dispute_id=str(row["dispute_id"]),
        vault_id=VaultId(str(row["vault_id"])),
        event_id=EventId(str(row["event_id"])),
        user_id=UserId(str(row["user_id"])),
        reason=row["reason"],
        status=row["status"],
        created_at=row["created_at"],
        moved_at=row["moved_at"],
        decided_at=row["decided_at"],
        decided_by=row["decided_by"],
        notes=row["notes"],
        refunded=None if row["refunded"] is None else Stroops(row["refunded"]),
    )


async def own_event(connection: Connection, user_id: UserId, event_id: EventId) -> OwnEvent | None:
    """Return a usage event of any of a user's vaults; None for what is nobody's or somebody else's."""
    row = await connection.fetch_row(_OWN_EVENT, user_id, event_id)
    return None if row is None else OwnEvent(VaultId(str(row["vault_id"])), row["state"], Stroops(row["refundable"]))


async def subject_of(connection: Connection, dispute: Dispute) -> Subject:
    """Return what a dispute is about."""
    row = await connection.fetch_row(_SUBJECT, dispute.vault_id, dispute.event_id)
    assert row is not None, "usage events are never deleted"
    return Subject(
        api_id=ApiId(row["api_id"]),
        endpoint_id=EndpointId(row["endpoint_id"]),
        developer_id=DeveloperId(str(row["developer_id"])),
        amount=Stroops(row["amount"]),
        developer=None if row["developer"] is None else UserId(str(row["developer"])),
    )


async def add_dispute(
    connection: Connection,
    dispute_id: str,
    vault_id: VaultId,
    event_id: EventId,
    user_id: UserId,
    reason: str,
    now: datetime,
) -> Dispute | None:
    """Store a dispute; None where the event is disputed already."""
    row = await connection.fetch_row(_ADD, dispute_id, vault_id, event_id, user_id, reason, now)
    return None if row is None else dispute_of(row)


async def dispute_of_event(connection: Connection, vault_id: VaultId, event_id: EventId) -> Dispute | None:
    """Return an event's dispute, or None."""
    row = await connection.fetch_row(_OF_EVENT, vault_id, event_id)
    return None if row is None else dispute_of(row)


async def decide(
    connection: Connection,
    dispute_id: str,
    status: Literal["REFUNDING", "UPHELD"],
    notes: str | None,
    now: datetime,
    by: str,
) -> Dispute | None:
    """Decide an open dispute; None where it is not open."""
    row = await connection.fetch_row(_DECIDE, dispute_id, status, now, by, notes)
    return None if row is None else dispute_of(row)


async def note_refunded(connection: Connection, dispute_id: str, amount: Stroops, now: datetime) -> Dispute | None:
    """Note what the ledger has given back under a dispute; None where that was noted before."""
    row = await connection.fetch_row(_REFUNDED, dispute_id, amount, now)
    return None if row is None else dispute_of(row)


async def take_back(database: Database, dispute_id: str, now: datetime) -> None:
    """Open a dispute again that was to be refunded, and of whose event others have given everything back."""
    await database.execute(_TAKE_BACK, dispute_id, now)


async def left_refunding(database: Database, after: str, limit: int) -> Sequence[Dispute]:
    """Return at most `limit` disputes that are to be refunded, by their ids.

    Args:
        after: only those with a larger id.
    """
    return [dispute_of(row) for row in await database.fetch(_LEFT, after, limit)]
