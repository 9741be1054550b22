"""Quota grants as they are stored: the plan's each month, others as they are given, all settled when one is added or
ends. Every change is made with the vault's row locked.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from callora.ledger.commands import GrantQuota
from callora.ledger.ids import VaultId
from callora.ledger.outcomes import QuotaGranted, ReferenceTaken
from callora.ledger.quota import GrantLine, month_of, settle
from callora.store.bridge import Connection, Row

_VAULT: Final = """
SELECT v.credits, v.plan_id, p.monthly_credits FROM vaults v JOIN plans p ON p.plan_id = v.plan_id
WHERE v.vault_id = $1
"""

_LIVE: Final = """
SELECT grant_id, amount, remaining, expires_at, plan_id FROM quota_grants
WHERE vault_id = $1 AND lapsed_at IS NULL ORDER BY expires_at, created_at, grant_id
"""

_SETTLE: Final = "UPDATE quota_grants SET remaining = $3 WHERE vault_id = $1 AND grant_id = $2 AND remaining <> $3"

_LAPSE: Final = """
UPDATE quota_grants SET remaining = 0, lapsed = $3, lapsed_at = $4 WHERE vault_id = $1 AND grant_id = $2
"""

# Credits that came back of holds after their grant had ended: it lapsed with so many more.
_LAPSE_LATE: Final = """
UPDATE quota_grants g SET lapsed = g.lapsed + w.more
FROM (SELECT grant_id,
             greatest(0, least(amount - lapsed, $2::bigint - coalesce(sum(amount - lapsed) OVER earlier, 0)))::bigint
                 AS more
      FROM quota_grants WHERE vault_id = $1 AND lapsed_at IS NOT NULL
      WINDOW earlier AS (ORDER BY lapsed_at DESC, grant_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)) AS w
WHERE g.vault_id = $1 AND g.grant_id = w.grant_id AND w.more > 0
"""

_OF_MONTH: Final = """
SELECT count(*) AS grants, coalesce(sum(amount - lapsed - remaining), 0)::bigint AS burnt FROM quota_grants
WHERE vault_id = $1 AND source = 'plan' AND ref LIKE $2
"""

_ADD: Final = """
INSERT INTO quota_grants (vault_id, grant_id, source, ref, plan_id, amount, remaining, created_at, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8)
"""

_ADD_OF_PLAN: Final = """
INSERT INTO quota_grants (vault_id, grant_id, source, ref, plan_id, amount, remaining, created_at, expires_at)
VALUES ($1, gen_random_uuid(), 'plan', $2, $3, $4, $4, $5, $6)
"""

_SET: Final = """
UPDATE vaults SET credits = $2, quota_until = coalesce($3::timestamptz, 'infinity'), version = version + 1
WHERE vault_id = $1
"""

_KNOWN: Final = "SELECT amount, expires_at FROM quota_grants WHERE vault_id = $1 AND source = $2 AND ref = $3"


async def renew(connection: Connection, vault_id: VaultId, now: datetime) -> int:
    """End the grants that are over, give the month's where the plan has one, and return the vault's credits.

    Args:
        connection: inside a transaction that has locked the vault's row.
    """
    vault, grants, credits_left = await _settled(connection, vault_id)
    start, following = month_of(now)
    live: list[datetime] = []
    of_plan = False
    for row, grant in grants:
        if grant.expires_at <= now or (row["plan_id"] not in (None, vault["plan_id"])):
            await connection.execute(_LAPSE, vault_id, grant.grant_id, grant.remaining, now)
            credits_left -= grant.remaining
        else:
            live.append(grant.expires_at)
            of_plan = of_plan or row["plan_id"] is not None
    monthly = vault["monthly_credits"]
    if monthly and not of_plan:
        month = f"{start:%Y-%m}"
        found = await connection.fetch_row(_OF_MONTH, vault_id, f"{month}/%")
        assert found is not None
        amount = max(0, monthly - found["burnt"])
        ref = f"{month}/{found['grants'] + 1}"
        await connection.execute(_ADD_OF_PLAN, vault_id, ref, vault["plan_id"], amount, now, following)
        credits_left += amount
        live.append(following)
    await connection.execute(_SET, vault_id, credits_left, min(live, default=None))
    return credits_left


async def grant(
    connection: Connection, vault_id: VaultId, command: GrantQuota, now: datetime
) -> QuotaGranted | ReferenceTaken:
    """Add a grant once; the vault's row is locked."""
    credits_left = await renew(connection, vault_id, now)
    known = await connection.fetch_row(_KNOWN, vault_id, command.source, command.ref)
    if known is not None:
        if (known["amount"], known["expires_at"]) != (command.amount, command.expires_at):
            return ReferenceTaken()
        return QuotaGranted(credits_left, repeated=True)
    await connection.execute(
        _ADD, vault_id, command.grant_id, command.source, command.ref, None, command.amount, now, command.expires_at
    )
    credits_left += command.amount
    live = [row["expires_at"] for row in await connection.fetch(_LIVE, vault_id)]
    await connection.execute(_SET, vault_id, credits_left, min(live, default=None))
    return QuotaGranted(credits_left, repeated=False)


async def _settled(connection: Connection, vault_id: VaultId) -> tuple[Row, list[tuple[Row, GrantLine]], int]:
    """Return the vault and its grants, with what was burnt taken from them; and its credits."""
    vault = await connection.fetch_row(_VAULT, vault_id)
    assert vault is not None, "the caller has locked it"
    rows: Sequence[Row] = await connection.fetch(_LIVE, vault_id)
    grants, vanished = settle([_line(row) for row in rows], vault["credits"])
    for each in grants:
        await connection.execute(_SETTLE, vault_id, each.grant_id, each.remaining)
    if vanished:
        await connection.execute(_LAPSE_LATE, vault_id, vanished)
    return vault, list(zip(rows, grants, strict=True)), vault["credits"] - vanished


def _line(row: Row) -> GrantLine:
    return GrantLine(str(row["grant_id"]), row["amount"], row["remaining"], row["expires_at"])
