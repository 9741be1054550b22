"""What counters charged, as those who pay for it see it: the same facts that were charged, added up."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.store.bridge import Row
from callora.store.reads.meters import Reading

_USED: Final = """
SELECT a.account_id, a.vault_id, a.subject, a.name, v.network, coalesce(d.up, 0)::bigint AS up,
       coalesce(d.down, 0)::bigint AS down, coalesce(d.included, 0)::bigint AS included,
       coalesce(d.amount, 0)::bigint AS amount, coalesce(d.minutes, 0)::bigint AS minutes, d.last_minute
FROM vaults v JOIN counter_accounts a ON a.vault_id = v.vault_id
LEFT JOIN LATERAL (
    SELECT sum(up) AS up, sum(down) AS down, sum(included) AS included, sum(amount) AS amount,
           count(DISTINCT minute) AS minutes, max(minute) AS last_minute
    FROM counter_deltas c
    WHERE c.vault_id = a.vault_id AND c.account_id = a.account_id AND c.minute >= $3 AND c.minute < $4
) AS d ON true
WHERE v.user_id = $1 AND v.network = $2 AND a.account_id > coalesce($5::uuid, '00000000-0000-0000-0000-000000000000')
ORDER BY a.account_id LIMIT $6
"""

_TOTAL: Final = """
SELECT coalesce(sum(d.up), 0)::bigint AS up, coalesce(sum(d.down), 0)::bigint AS down,
       coalesce(sum(d.included), 0)::bigint AS included, coalesce(sum(d.amount), 0)::bigint AS amount
FROM vaults v JOIN counter_deltas d ON d.vault_id = v.vault_id
WHERE v.user_id = $1 AND v.network = $2 AND d.minute >= $3 AND d.minute < $4
"""

_BUCKETS: Final = """
SELECT m.account_id, m.bucket_start, m.env, m.node_id, m.meter, m.region, m.line, m.multiplier, m.up, m.down, m.total,
       m.included, m.rated, m.amount
FROM vaults v JOIN counter_minutes m ON m.vault_id = v.vault_id
WHERE v.user_id = $1 AND v.network = $2 AND m.bucket_start >= $3 AND m.bucket_start < $4
    AND ($5::uuid IS NULL OR m.account_id = $5)
    AND ($6::timestamptz IS NULL OR m.bucket_start <= $6)
    AND ($6::timestamptz IS NULL
         OR (m.bucket_start, m.account_id, m.env, m.node_id, m.meter, m.region, m.line, m.multiplier)
            < ($6, $7::uuid, $8::text, $9::text, $10::text, $11::text, $12::text, $13::numeric))
ORDER BY m.bucket_start DESC, m.account_id DESC, m.env DESC, m.node_id DESC, m.meter DESC, m.region DESC, m.line DESC,
         m.multiplier DESC
LIMIT $14
"""

_VAULT: Final = """
SELECT v.vault_id, v.network, v.available, v.held, v.owed, v.standing, v.arrears_since
FROM vaults v WHERE v.user_id = $1 AND v.network = $2
"""

_ACCOUNTS: Final = """
SELECT a.account_id, a.subject, a.name, a.active, a.unit_price, a.region_multiplier, a.line_multiplier, a.rule_version,
       a.included_granted, a.included_used,
       (SELECT max(d.minute) FROM counter_deltas d WHERE d.vault_id = a.vault_id AND d.account_id = a.account_id)
           AS last_minute
FROM counter_accounts a WHERE a.vault_id = $1 ORDER BY a.account_id LIMIT $2
"""

ACCOUNTS_MAX: Final = 1000
"""Accounts that a billing summary shows."""


@attrs.frozen
class Scope:
    """Whose usage, and when."""

    user_id: UserId
    network: str
    since: datetime
    until: datetime
    """Not part of it."""


async def used(reading: Reading, scope: Scope, after: str | None, limit: int) -> Sequence[Row]:
    """Return at most `limit` accounts with what each used, by their ids; also those that used nothing."""
    return await reading.fetch(_USED, scope.user_id, scope.network, scope.since, scope.until, after, limit)


async def total_used(reading: Reading, scope: Scope) -> Row:
    """Return what all accounts used together."""
    row = await reading.fetch_row(_TOTAL, scope.user_id, scope.network, scope.since, scope.until)
    assert row is not None, "a sum has a row"
    return row


async def buckets(
    reading: Reading, scope: Scope, account_id: str | None, before: Sequence[object] | None, limit: int
) -> Sequence[Row]:
    """Return at most `limit` minutes, the latest first.

    Args:
        account_id: None for all.
        before: the last one that was seen: minute, account, env, node, meter, region, line and multiplier.
    """
    position = before or (None,) * 8
    span = (scope.user_id, scope.network, scope.since, scope.until)
    return await reading.fetch(_BUCKETS, *span, account_id, *position, limit)


async def vault_of(reading: Reading, user_id: UserId, network: str) -> Row | None:
    """Return what a user's vault has, owes and stands at."""
    return await reading.fetch_row(_VAULT, user_id, network)


async def accounts_of(reading: Reading, vault_id: VaultId) -> Sequence[Row]:
    """Return the counter accounts that a vault pays for, ACCOUNTS_MAX at most."""
    return await reading.fetch(_ACCOUNTS, vault_id, ACCOUNTS_MAX)
