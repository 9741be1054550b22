"""What a vault's quota is: for the decision on a hold, and as people see it."""

from collections.abc import Container, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import ApiKeyId, VaultId
from callora.ledger.quota import GrantLine, KeyCap, Overage, Quota, month_of, settle
from callora.ledger.vault import VaultState
from callora.store.bridge import Connection, Database
from callora.store.reads.dated import EVENT_OF, dated_events, of_each

_TERMS: Final = """
SELECT v.vault_id, v.credits, v.plan_id, p.monthly_credits, p.overage,
       CASE WHEN isfinite(v.quota_until) THEN v.quota_until END AS until,
       v.quota_until <= $2 OR p.monthly_credits > 0 AND NOT EXISTS (
           SELECT FROM quota_grants g
           WHERE g.vault_id = v.vault_id AND g.source = 'plan' AND g.lapsed_at IS NULL) AS due,
       (SELECT coalesce(sum(g.amount), 0)::bigint FROM quota_grants g
        WHERE g.vault_id = v.vault_id AND g.lapsed_at IS NULL) AS granted,
       EXISTS (SELECT FROM quota_grants g WHERE g.vault_id = v.vault_id) AS ever_granted,
       ARRAY(SELECT (k.api_key_id, k.monthly_credit_cap) FROM api_keys k
             WHERE k.vault_id = v.vault_id AND k.monthly_credit_cap IS NOT NULL) AS caps
FROM vaults v JOIN plans p ON p.plan_id = v.plan_id WHERE v.vault_id = ANY ($1::uuid[])
"""

# A month begins with a day and a minute, so sums of whole days and minutes are exact, and what is not final yet is read
# from the events. `spending` says how the parts meet.
BURNT: Final = of_each(
    "(SELECT vault_id, array_agg(api_key_id) AS keys FROM unnest($1::uuid[], $2::uuid[]) AS k (vault_id, api_key_id)"
    " GROUP BY vault_id) AS v",
    f"""
WITH recent AS MATERIALIZED (
    SELECT u.* FROM usage_rollup r, LATERAL {
        dated_events("api_key_id, created_at, state, held_credits, credits", "greatest($3, r.done_until)")
    } AS u
)
SELECT k.api_key_id,
       (coalesce((SELECT sum(s.credits) FROM usage_days s
                  WHERE s.vault_id = v.vault_id AND s.api_key_id = k.api_key_id
                        AND s.day >= $3 AND s.day < r.last_day), 0)
        + coalesce((SELECT sum(s.credits) FROM usage_minutes s
                    WHERE s.vault_id = v.vault_id AND s.api_key_id = k.api_key_id
                          AND s.minute >= greatest($3, r.last_day) AND s.minute < r.done_until), 0)
        + coalesce((SELECT sum(CASE u.state WHEN 'held' THEN u.held_credits ELSE u.credits END) FROM recent u
                    WHERE u.api_key_id = k.api_key_id), 0)
        + coalesce((SELECT sum(CASE u.state WHEN 'held' THEN u.held_credits ELSE u.credits END)
                    FROM (SELECT event_id FROM usage_open WHERE vault_id = v.vault_id OFFSET 0) AS o,
                         LATERAL {EVENT_OF.format("o")} AS u
                    WHERE u.api_key_id = k.api_key_id AND u.created_at >= $3), 0))::bigint AS burnt
FROM unnest(v.keys) AS k (api_key_id),
     (SELECT done_until, date_trunc('day', done_until, 'UTC') AS last_day FROM usage_rollup) AS r
""",  # noqa: S608 - names of ours
)

_LIVE: Final = """
SELECT grant_id, source, amount, remaining, created_at, expires_at FROM quota_grants
WHERE vault_id = $1 AND lapsed_at IS NULL ORDER BY expires_at, created_at, grant_id
"""


@attrs.frozen
class Terms:
    """What a vault's plan and grants say, and whether they are to be renewed before a hold is decided."""

    quota: Quota
    credits: int
    due: bool


async def terms(
    connection: Connection, vaults: Sequence[VaultState], now: datetime, wanted: Container[VaultId]
) -> dict[VaultId, Terms]:
    """Return the quotas of vaults, of those that have grants and those of which they are wanted.

    Args:
        connection: inside a transaction that goes by key (`GO_BY_KEY`).
        vaults: as they were read before.
        wanted: in which of them something priced in credits is to be decided.

    Raises:
        StoreUnavailable: nothing was read.
    """
    rows = await connection.fetch(_TERMS, [vault.vault_id for vault in vaults], now)
    found = {VaultId(str(row["vault_id"])): row for row in rows}
    granted = [
        (vault, found[vault.vault_id])
        for vault in vaults
        if vault.vault_id in wanted or found[vault.vault_id]["ever_granted"]
    ]
    capped = [(vault.vault_id, api_key_id) for vault, row in granted for api_key_id, _ in row["caps"]]
    start, following = month_of(now)
    burnt = await connection.fetch(BURNT, *zip(*capped, strict=True), start) if capped else []
    used = {ApiKeyId(str(each["api_key_id"])): each["burnt"] for each in burnt}
    result: dict[VaultId, Terms] = {}
    for vault, row in granted:
        keys = [(ApiKeyId(str(api_key_id)), cap) for api_key_id, cap in row["caps"]]
        quota = Quota(
            row["granted"],
            row["monthly_credits"],
            row["overage"],
            following,
            {api_key_id: KeyCap(cap, used[api_key_id]) for api_key_id, cap in keys},
            now,
            row["until"],
            vault.placed_credits,
        )
        result[vault.vault_id] = Terms(quota, row["credits"], row["due"])
    return result


@attrs.frozen
class GrantView:
    """A grant that has not ended."""

    grant_id: str
    source: str
    amount: int
    remaining: int
    created_at: datetime
    expires_at: datetime


@attrs.frozen
class QuotaView:
    """A vault's quota as people see it."""

    plan_id: str
    monthly_credits: int
    overage: Overage
    credits: int
    """Left of all grants that have not ended, and not held."""
    granted: int
    """All of these grants."""
    grants: Sequence[GrantView]
    """The earliest to end, which burns first, first. Before a first call that is priced in credits: none."""


async def quota_of(database: Database, vault_id: VaultId, now: datetime) -> QuotaView | None:
    """Return a vault's quota at a moment, or None where there is no such vault.

    Raises:
        StoreUnavailable: nothing was read.
    """
    async with database.transaction() as connection:
        row = await connection.fetch_row(_TERMS, [vault_id], now)
        if row is None:
            return None
        rows = await connection.fetch(_LIVE, vault_id)
    settled, _ = settle(
        [GrantLine(str(each["grant_id"]), each["amount"], each["remaining"], each["expires_at"]) for each in rows],
        row["credits"],
    )
    grants = [
        GrantView(line.grant_id, each["source"], line.amount, line.remaining, each["created_at"], line.expires_at)
        for each, line in zip(rows, settled, strict=True)
        if line.expires_at > now
    ]
    return QuotaView(
        row["plan_id"],
        row["monthly_credits"],
        row["overage"],
        sum(each.remaining for each in grants),
        sum(each.amount for each in grants),
        grants,
    )
