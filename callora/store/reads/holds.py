"""What is read of external holds: each with what became of its event, found by any of its names."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, HoldId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.tokens import ALL_SCOPES
from callora.store.bridge import Database as Database
from callora.store.bridge import Row
from callora.store.holds import ExternalHold, Placing

_HOLD: Final = """
SELECT h.vault_id, h.request_id, h.hold_id, h.api_key_id, h.api_id, h.endpoint_id, h.amount AS asked, h.ttl_seconds,
       h.fingerprint, h.event_id, h.event_amount, h.transaction_id, h.asked_amount, h.released_at, h.created_at,
       u.state::text AS state, u.held_amount, u.amount, u.created_at AS placed_at, u.expires_at, u.closed_at,
       v.network, v.available, coalesce((
           SELECT sum(e.amount) FROM ledger_entries e
           WHERE e.vault_id = h.vault_id AND e.event_id = h.event_id AND e.kind = 'refund'
       ), 0)::bigint AS refunded
FROM external_holds h
JOIN vaults v ON v.vault_id = h.vault_id
LEFT JOIN usage_events u ON u.vault_id = h.vault_id AND u.event_id = h.event_id
"""

_BY_REQUEST: Final = _HOLD + "WHERE h.vault_id = $1 AND h.request_id = $2"

_BY_ID: Final = _HOLD + "WHERE h.hold_id = $1"

_BY_TRANSACTION: Final = (
    _HOLD + "WHERE h.transaction_id = $1 AND h.vault_id = coalesce($2, h.vault_id) ORDER BY h.vault_id LIMIT 2"
)

_KEY: Final = "SELECT k.vault_id, v.network FROM api_keys k JOIN vaults v USING (vault_id) WHERE k.api_key_id = $1"

_RIGHTS: Final = """
SELECT k.revoked_at IS NULL AND NOT k.disabled AND (k.expires_at IS NULL OR k.expires_at > $4) AS usable,
       k.allowed_apis IS NULL OR $2::bigint = ANY (k.allowed_apis) AS api,
       p.allowed_apis IS NULL OR $2 = ANY (p.allowed_apis) AS plan,
       k.allowed_endpoints IS NULL OR $3::bigint = ANY (k.allowed_endpoints) AS endpoint,
       coalesce((SELECT e.required_scope = ANY (k.scopes) FROM api_endpoints e WHERE e.endpoint_id = $3), true)
           OR $5 = ANY (k.scopes) AS scope
FROM api_keys k JOIN vaults v ON v.vault_id = k.vault_id JOIN plans p ON p.plan_id = v.plan_id WHERE k.api_key_id = $1
"""


@attrs.frozen
class FoundHold:
    """A hold and what became of it."""

    hold: ExternalHold
    state: Literal["held", "captured", "released", "expired"] | None
    """Its event's; None while there is none."""
    held_amount: Stroops
    """What the event holds or held; 0 while there is none."""
    amount: Stroops
    """What was charged."""
    refunded: Stroops
    """What was given back of that."""
    placed_at: datetime | None
    expires_at: datetime | None
    closed_at: datetime | None
    network: str
    available: Stroops
    """What its vault has to spend."""


@attrs.frozen
class PayingKey:
    """Whose key it is."""

    vault_id: VaultId
    network: str


@attrs.frozen
class KeyRights:
    """What a key may be charged for."""

    usable: bool
    """Neither revoked nor disabled nor expired."""
    api: bool
    plan: bool
    """Whether its vault's plan has the API."""
    endpoint: bool
    scope: bool


def _found(row: Row) -> FoundHold:
    placing = None
    if row["asked"] is not None:
        placing = Placing(
            ApiId(row["api_id"]),
            EndpointId(row["endpoint_id"]),
            Stroops(row["asked"]),
            row["ttl_seconds"],
            row["fingerprint"],
        )
    return FoundHold(
        ExternalHold(
            vault_id=VaultId(str(row["vault_id"])),
            request_id=row["request_id"],
            hold_id=HoldId(str(row["hold_id"])),
            api_key_id=ApiKeyId(str(row["api_key_id"])),
            placing=placing,
            event_id=EventId(str(row["event_id"])),
            event_amount=Stroops(row["event_amount"] or 0),
            transaction_id=row["transaction_id"],
            asked_amount=None if row["asked_amount"] is None else Stroops(row["asked_amount"]),
            released_at=row["released_at"],
            created_at=row["created_at"],
        ),
        state=row["state"],
        held_amount=Stroops(row["held_amount"] or 0),
        amount=Stroops(row["amount"] or 0),
        refunded=Stroops(row["refunded"]),
        placed_at=row["placed_at"],
        expires_at=row["expires_at"],
        closed_at=row["closed_at"],
        network=row["network"],
        available=Stroops(row["available"]),
    )


async def find_request(database: Database, vault_id: VaultId, request_id: str) -> FoundHold | None:
    """Return the hold that a vault's name stands for, or None."""
    row = await database.fetch_row(_BY_REQUEST, vault_id, request_id)
    return None if row is None else _found(row)


async def find_hold(database: Database, hold_id: HoldId) -> FoundHold | None:
    """Return the hold with this id, or None."""
    row = await database.fetch_row(_BY_ID, hold_id)
    return None if row is None else _found(row)


async def holds_of(database: Database, transaction_id: str, vault_id: VaultId | None) -> Sequence[FoundHold]:
    """Return the holds that are bound to a transaction: one a vault, at most two of them.

    Args:
        vault_id: only this vault's; None for all.
    """
    return [_found(row) for row in await database.fetch(_BY_TRANSACTION, transaction_id, vault_id)]


async def paying_key(database: Database, api_key_id: ApiKeyId) -> PayingKey | None:
    """Return whose key this is, whatever has become of it, or None."""
    row = await database.fetch_row(_KEY, api_key_id)
    return None if row is None else PayingKey(VaultId(str(row["vault_id"])), row["network"])


async def key_rights(
    database: Database, api_key_id: ApiKeyId, api_id: ApiId, endpoint_id: EndpointId, now: datetime
) -> KeyRights:
    """Return what a key that exists may be charged for."""
    row = await database.fetch_row(_RIGHTS, api_key_id, api_id, endpoint_id, now, ALL_SCOPES)
    assert row is not None, "keys are never deleted"
    return KeyRights(row["usable"], row["api"], row["plan"], row["endpoint"], row["scope"])
