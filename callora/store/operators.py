"""What operators did: one line for every access, append-only by the database's own triggers."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Final

import attrs

from callora.store.bridge import Database

_NOTE: Final = """
INSERT INTO audit_events (audit_id, at, actor, action, target, client_address, request_id, status, details)
VALUES ($1, $2, $3, $4, left($5, 255), left($6, 64), $7, $8, $9)
"""


@attrs.frozen
class Access:
    """One access by an operator."""

    audit_id: str
    at: datetime
    actor: str
    """`admin-key`, `user:` and an id, or `unknown` for who was not let in."""
    action: str
    """The operation's id."""
    target: str | None
    """What it was done to, where the path names it."""
    client_address: str
    request_id: str
    status: int
    """The answer's."""
    details: Mapping[str, object]


async def note_access(database: Database, access: Access) -> None:
    """Store one access.

    Raises:
        StoreUnavailable, OutcomeUnknown: it may not be stored.
    """
    await database.execute(
        _NOTE,
        access.audit_id,
        access.at,
        access.actor,
        access.action,
        access.target,
        access.client_address,
        access.request_id,
        access.status,
        json.dumps(dict(access.details)),
    )
