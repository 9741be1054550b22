"""Counter accounts: whose counters are charged to which vault, and at what price.

Every change locks the vault's row, as rating does, so that no delta is decided on what is being changed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.counters import Profile, SubjectTaken
from callora.ledger.ids import VaultId
from callora.ledger.outcomes import VaultMissing
from callora.store.bridge import Connection, Database

_LOCK_VAULT: Final = "SELECT FROM vaults WHERE vault_id = $1 FOR UPDATE"

_VAULT_OF: Final = "SELECT vault_id FROM counter_accounts WHERE account_id = $1"

_ADD: Final = """
INSERT INTO counter_accounts (vault_id, account_id, subject, name, active, unit_price, region_multiplier,
                              line_multiplier, rule_version, included_granted, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11)
ON CONFLICT (subject) DO NOTHING RETURNING account_id
"""

_CHANGE: Final = """
UPDATE counter_accounts SET name = $3, active = $4, unit_price = $5, region_multiplier = $6, line_multiplier = $7,
                            rule_version = $8, updated_at = $9
WHERE vault_id = $1 AND account_id = $2
"""

_INCLUDE: Final = """
UPDATE counter_accounts SET included_granted = included_granted + $3, updated_at = $4
WHERE vault_id = $1 AND account_id = $2 AND included_granted + $3 <= $5
RETURNING included_granted
"""

_OF_SUBJECTS: Final = """
SELECT a.subject, a.account_id, a.vault_id FROM unnest($1::uuid[]) AS w (subject)
JOIN counter_accounts a ON a.subject = ANY (ARRAY[w.subject])
WHERE a.active OR $2
"""


@attrs.frozen
class Place:
    """Where a subject's usage goes."""

    account_id: str
    vault_id: VaultId


async def add(
    database: Database,
    account_id: str,
    vault_id: VaultId,
    subject: str,
    profile: Profile,
    included: int,
    now: datetime,
) -> SubjectTaken | VaultMissing | None:
    """Make an account for a subject; None: it is made.

    Args:
        included: units that cost nothing.
    """
    async with database.transaction() as connection:
        if await connection.fetch_row(_LOCK_VAULT, vault_id) is None:
            return VaultMissing()
        made = await connection.fetch_value(
            _ADD,
            vault_id,
            account_id,
            subject,
            profile.name,
            profile.active,
            profile.unit_price,
            profile.region_multiplier,
            profile.line_multiplier,
            profile.rule_version,
            included,
            now,
        )
        return SubjectTaken() if made is None else None


async def change(database: Database, account_id: str, profile: Profile, now: datetime) -> bool:
    """Set what an account is rated by from now on; False: there is none."""
    async with database.transaction() as connection:
        vault_id = await _lock(connection, account_id)
        if vault_id is None:
            return False
        await connection.execute(
            _CHANGE,
            vault_id,
            account_id,
            profile.name,
            profile.active,
            profile.unit_price,
            profile.region_multiplier,
            profile.line_multiplier,
            profile.rule_version,
            now,
        )
        return True


async def include(database: Database, account_id: str, units: int, granted_max: int, now: datetime) -> bool | None:
    """Give an account units that cost nothing; False: that would be more than `granted_max`, None: there is none."""
    async with database.transaction() as connection:
        vault_id = await _lock(connection, account_id)
        if vault_id is None:
            return None
        return await connection.fetch_value(_INCLUDE, vault_id, account_id, units, now, granted_max) is not None


async def _lock(connection: Connection, account_id: str) -> VaultId | None:
    vault_id = await connection.fetch_value(_VAULT_OF, account_id)
    if vault_id is None:
        return None
    await connection.fetch_row(_LOCK_VAULT, vault_id)  # an account stays with its vault
    return VaultId(str(vault_id))


async def places_of(database: Database, subjects: Sequence[str], *, also_inactive: bool = False) -> Mapping[str, Place]:
    """Return the active accounts of these subjects, by subject.

    Args:
        also_inactive: those that are not, too.
    """
    return {
        str(row["subject"]): Place(str(row["account_id"]), VaultId(str(row["vault_id"])))
        for row in await database.fetch(_OF_SUBJECTS, list(subjects), also_inactive)
    }
