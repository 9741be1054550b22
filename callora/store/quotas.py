"""Quota grants as they are stored: the plan's each month, others as they are given, all settled when one is added or
ends. Every change is made with the vault's row locked.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.commands import GrantQuota
from callora.ledger.ids import VaultId
from callora.ledger.outcomes import QuotaGranted, ReferenceTaken
from callora.ledger.quota import GrantLine, month_of, settle
from callora.store.bridge import Connection, Row

_VAULTS: Final = """
SELECT v.vault_id, v.credits, v.plan_id, p.monthly_credits FROM vaults v JOIN plans p ON p.plan_id = v.plan_id
WHERE v.vault_id = ANY ($1::uuid[])
"""

_LIVE: Final = """
SELECT vault_id, grant_id, amount, remaining, expires_at, plan_id FROM quota_grants
WHERE vault_id = ANY ($1::uuid[]) AND lapsed_at IS NULL ORDER BY expires_at, created_at, grant_id
"""

_SETTLE: Final = """
UPDATE quota_grants g SET remaining = w.remaining
FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS w (vault_id, grant_id, remaining)
WHERE g.vault_id = w.vault_id AND g.grant_id = w.grant_id AND g.remaining <> w.remaining
"""

_LAPSE: Final = """
UPDATE quota_grants g SET remaining = 0, lapsed = w.lapsed, lapsed_at = $4
FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS w (vault_id, grant_id, lapsed)
WHERE g.vault_id = w.vault_id AND g.grant_id = w.grant_id
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
SELECT w.vault_id, of_month.* FROM unnest($1::uuid[]) AS w (vault_id), LATERAL (
    SELECT count(*) AS grants, coalesce(sum(g.amount - g.lapsed - g.remaining), 0)::bigint AS burnt
    FROM quota_grants g WHERE g.vault_id = w.vault_id AND g.source = 'plan' AND g.ref LIKE $2) AS of_month
"""

_ADD: Final = """
INSERT INTO quota_grants (vault_id, grant_id, source, ref, plan_id, amount, remaining, created_at, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8)
"""

_ADD_OF_PLAN: Final = """
INSERT INTO quota_grants (vault_id, grant_id, source, ref, plan_id, amount, remaining, created_at, expires_at)
SELECT vault_id, gen_random_uuid(), 'plan', ref, plan_id, amount, amount, $5, $6
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[]) AS w (vault_id, ref, plan_id, amount)
"""

_SET: Final = """
UPDATE vaults v
SET credits = w.credits, quota_until = coalesce(w.until, 'infinity'), version = v.version + 1
FROM unnest($1::uuid[], $2::bigint[], $3::timestamptz[]) AS w (vault_id, credits, until)
WHERE v.vault_id = w.vault_id
"""

_KNOWN: Final = "SELECT amount, expires_at FROM quota_grants WHERE vault_id = $1 AND source = $2 AND ref = $3"


@attrs.define(eq=False)
class _Renewing:
    """A vault whose grants are settled, and what becomes of them."""

    plan_id: str
    monthly: int
    credits_left: int
    rows: list[Row] = attrs.field(factory=list)
    live: list[datetime] = attrs.field(factory=list)
    """When the grants end that go on."""
    of_plan: bool = False
    """Whether its plan's is one of them."""


async def renew(connection: Connection, vault_ids: Sequence[VaultId], now: datetime) -> dict[VaultId, int]:
    """End the grants that are over, give the month's where a plan has one, and return each vault's credits.

    Args:
        connection: inside a transaction that has locked the vaults' rows.
    """
    vaults: dict[VaultId, _Renewing] = {}
    for row in await connection.fetch(_VAULTS, vault_ids):
        vaults[_vault_of(row)] = _Renewing(row["plan_id"], row["monthly_credits"], row["credits"])
    for row in await connection.fetch(_LIVE, vault_ids):
        vaults[_vault_of(row)].rows.append(row)
    ended: list[tuple[VaultId, str, int]] = []
    settled: list[tuple[VaultId, str, int]] = []
    for vault_id, vault in vaults.items():
        grants, vanished = settle([_line(row) for row in vault.rows], vault.credits_left)
        if vanished:
            await connection.execute(_LAPSE_LATE, vault_id, vanished)
            vault.credits_left -= vanished
        for row, each in zip(vault.rows, grants, strict=True):
            settled.append((vault_id, each.grant_id, each.remaining))
            if each.expires_at <= now or row["plan_id"] not in (None, vault.plan_id):
                ended.append((vault_id, each.grant_id, each.remaining))
                vault.credits_left -= each.remaining
            else:
                vault.live.append(each.expires_at)
                vault.of_plan = vault.of_plan or row["plan_id"] is not None
    if settled:
        await connection.execute(_SETTLE, *zip(*settled, strict=True))
    if ended:
        await connection.execute(_LAPSE, *zip(*ended, strict=True), now)
    await _give_of_plans(
        connection, {key: each for key, each in vaults.items() if each.monthly and not each.of_plan}, now
    )
    credits_left = {vault_id: vault.credits_left for vault_id, vault in vaults.items()}
    until = [min(vault.live, default=None) for vault in vaults.values()]
    await connection.execute(_SET, list(credits_left), list(credits_left.values()), until)
    return credits_left


async def _give_of_plans(connection: Connection, vaults: Mapping[VaultId, _Renewing], now: datetime) -> None:
    """Give vaults their plans' credits of the month, less what they burnt of an earlier plan's in it."""
    if not vaults:
        return
    start, following = month_of(now)
    month = f"{start:%Y-%m}"
    given: list[tuple[VaultId, str, str, int]] = []
    for row in await connection.fetch(_OF_MONTH, list(vaults), f"{month}/%"):
        vault = vaults[_vault_of(row)]
        amount = max(0, vault.monthly - row["burnt"])
        given.append((_vault_of(row), f"{month}/{row['grants'] + 1}", vault.plan_id, amount))
        vault.credits_left += amount
        vault.live.append(following)
    await connection.execute(_ADD_OF_PLAN, *zip(*given, strict=True), now, following)


async def grant(
    connection: Connection, vault_id: VaultId, command: GrantQuota, now: datetime
) -> QuotaGranted | ReferenceTaken:
    """Add a grant once; the vault's row is locked."""
    credits_left = (await renew(connection, [vault_id], now))[vault_id]
    known = await connection.fetch_row(_KNOWN, vault_id, command.source, command.ref)
    if known is not None:
        if (known["amount"], known["expires_at"]) != (command.amount, command.expires_at):
            return ReferenceTaken()
        return QuotaGranted(credits_left, repeated=True)
    await connection.execute(
        _ADD, vault_id, command.grant_id, command.source, command.ref, None, command.amount, now, command.expires_at
    )
    credits_left += command.amount
    live = [row["expires_at"] for row in await connection.fetch(_LIVE, [vault_id])]
    await connection.execute(_SET, [vault_id], [credits_left], [min(live, default=None)])
    return QuotaGranted(credits_left, repeated=False)


def _vault_of(row: Row) -> VaultId:
    return VaultId(str(row["vault_id"]))


def _line(row: Row) -> GrantLine:
    return GrantLine(str(row["grant_id"]), row["amount"], row["remaining"], row["expires_at"])
