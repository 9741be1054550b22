"""What operators read: people with their vaults, whether an API exists, and the audit of operators themselves."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import attrs

from callora.ledger.ids import ApiId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.vault import Standing
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

_PERSON: Final = """
SELECT u.user_id, u.name, u.wallet_address, u.subject, u.created_at, d.developer_id,
       (SELECT count(*) FROM vaults v WHERE v.user_id = u.user_id) AS vaults,
       (SELECT count(*) FROM api_keys k WHERE k.user_id = u.user_id) AS keys,
       (SELECT count(*) FROM api_keys k WHERE k.user_id = u.user_id AND k.revoked_at IS NULL AND NOT k.disabled
                                              AND (k.expires_at IS NULL OR k.expires_at > $1)) AS live_keys
FROM users u LEFT JOIN developers d ON d.user_id = u.user_id
"""

_FIND: Final = _PERSON + "WHERE u.user_id = $2"

# Ids of ours grow with time, so their order is that of the sign-ups; those of an outside issuer may be anything.
_LIST: Final = (
    _PERSON
    + """
WHERE u.user_id < coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
      AND ($4::text IS NULL OR u.user_id::text = lower($4) OR u.wallet_address = upper($4) OR u.subject = $4
           OR strpos(lower(u.name), lower($4)) > 0)
ORDER BY u.user_id DESC LIMIT $2
"""
)

_VAULTS: Final = """
SELECT vault_id, network, plan_id, available, held, owed, arrears_since, standing::text AS standing, created_at
FROM vaults
WHERE user_id = $1 ORDER BY network
"""

_API_EXISTS: Final = "SELECT true FROM apis WHERE api_id = $1"

_AUDIT: Final = """
SELECT audit_id, at, actor, action, target, client_address, request_id, status, details::text AS details
FROM audit_events
WHERE at <= coalesce($2::timestamptz, 'infinity')
      AND (at < coalesce($2::timestamptz, 'infinity') OR audit_id < $3::uuid)
      AND at >= coalesce($4::timestamptz, '-infinity') AND at < coalesce($5::timestamptz, 'infinity')
      AND ($6::text IS NULL OR action = $6) AND ($7::text IS NULL OR actor = $7) AND ($8::text IS NULL OR target = $8)
ORDER BY at DESC, audit_id DESC LIMIT $1
"""


@attrs.frozen
class PersonFound:
    """A user."""

    user_id: UserId
    name: str
    wallet_address: str | None
    subject: str | None
    developer_id: str | None
    created_at: datetime
    vaults: int
    keys: int
    """All there ever were."""
    live_keys: int
    """Neither revoked, disabled nor expired."""


@attrs.frozen
class VaultFound:
    """One of a user's vaults."""

    vault_id: VaultId
    network: str
    plan_id: str
    available: Stroops
    held: Stroops
    owed: Stroops
    arrears_since: datetime | None
    standing: Standing
    created_at: datetime


@attrs.frozen
class AuditFilter:
    """Which accesses; None is any."""

    since: datetime | None
    """Not before."""
    until: datetime | None
    """Before."""
    action: str | None
    actor: str | None
    target: str | None


def _person(row: Row) -> PersonFound:
    return PersonFound(
        user_id=UserId(str(row["user_id"])),
        name=row["name"],
        wallet_address=row["wallet_address"],
        subject=row["subject"],
        developer_id=None if row["developer_id"] is None else str(row["developer_id"]),
        created_at=row["created_at"],
        vaults=row["vaults"],
        keys=row["keys"],
        live_keys=row["live_keys"],
    )


async def find_person(database: Database, user_id: UserId, now: datetime) -> PersonFound | None:
    """Return a user, or None."""
    row = await database.fetch_row(_FIND, now, user_id)
    return None if row is None else _person(row)


async def list_people(
    database: Database, now: datetime, limit: int, after: UserId | None, search: str | None
) -> Sequence[PersonFound]:
    """Return at most `limit` users, the latest first.

    Args:
        after: the last one seen.
        search: an id, a wallet or a subject as a whole, or a part of a name; None is everybody.
    """
    return [_person(row) for row in await database.fetch(_LIST, now, limit, after, search)]


async def vaults_of(database: Database, user_id: UserId) -> Sequence[VaultFound]:
    """Return a user's vaults."""
    return [
        VaultFound(
            vault_id=VaultId(str(row["vault_id"])),
            network=row["network"],
            plan_id=row["plan_id"],
            available=Stroops(row["available"]),
            held=Stroops(row["held"]),
            owed=Stroops(row["owed"]),
            arrears_since=row["arrears_since"],
            standing=row["standing"],
            created_at=row["created_at"],
        )
        for row in await database.fetch(_VAULTS, user_id)
    ]


async def api_exists(database: Database, api_id: ApiId) -> bool:
    """Tell whether there is such an API, whatever its state."""
    return await database.fetch_value(_API_EXISTS, api_id) is not None


async def list_accesses(
    database: Database, limit: int, after: tuple[datetime, str] | None, chosen: AuditFilter
) -> Sequence[Mapping[str, Any]]:
    """Return at most `limit` lines of the audit, the latest first; details as JSON text.

    Args:
        after: date and id of the last one seen.
    """
    at, audit_id = after or (None, None)
    return await database.fetch(
        _AUDIT, limit, at, audit_id, chosen.since, chosen.until, chosen.action, chosen.actor, chosen.target
    )
