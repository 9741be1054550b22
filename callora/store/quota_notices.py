"""Which vaults have used up how much of their credits, as it is told once a month for each of THRESHOLDS."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.store.bridge import Connection, Database

THRESHOLDS: Final = (80, 95, 100)
"""Percent of all grants that have not ended."""
EVENT: Final = "quota_threshold"

_TURN: Final = "UPDATE quota_watch SET due_at = $1 WHERE due_at <= $2 RETURNING true"

# What a vault holds counts as used. Its grants are as it last settled them, so a vault whose month or grant has ended
# since is not looked at before its next call settles them: it has used nothing of the new month.
_REACHED: Final = """
SELECT v.vault_id, v.user_id, v.plan_id, v.credits, g.granted, v.quota_until > $3 AS settled,
       ARRAY(SELECT t.percent FROM unnest($4::int[]) AS t (percent)
             WHERE (g.granted - v.credits)::numeric * 100 >= g.granted::numeric * t.percent
                 AND NOT EXISTS (SELECT FROM outbox o WHERE o.type = 'quota_threshold'
                                 AND o.subject = v.vault_id || ':' || $5::text || ':' || t.percent)
             ORDER BY t.percent) AS reached
FROM (SELECT vault_id, user_id, plan_id, credits, quota_until FROM vaults
      WHERE vault_id > $1 AND quota_until <> 'infinity' ORDER BY vault_id LIMIT $2) AS v
CROSS JOIN LATERAL (SELECT coalesce(sum(q.amount), 0)::bigint AS granted FROM quota_grants q
                    WHERE q.vault_id = v.vault_id AND q.lapsed_at IS NULL) AS g
ORDER BY v.vault_id
"""


@attrs.frozen
class Reached:
    """A vault that has used up so much of its credits, of which nobody was told yet."""

    vault_id: VaultId
    user_id: UserId
    plan_id: str
    granted: int
    remaining: int
    thresholds: Sequence[int]
    """Of THRESHOLDS, each once for the month."""


@attrs.frozen
class Turn:
    """A batch of vaults."""

    reached: Sequence[Reached]
    last: VaultId | None
    """Where the next batch begins; None after the last."""


async def take_turn(database: Database, now: datetime, every: timedelta) -> bool:
    """Tell whether this process is the one to look now; another is not for as long as `every`."""
    return bool(await database.fetch_value(_TURN, now + every, now))


async def look(connection: Connection, after: VaultId, limit: int, month: str, now: datetime) -> Turn:
    """Return which of the next `limit` vaults with a quota have reached a threshold.

    Args:
        month: the calendar month of `now`, such as 2026-11.
    """
    rows = await connection.fetch(_REACHED, after, limit, now, list(THRESHOLDS), month)
    reached = [
        Reached(
            vault_id=VaultId(str(row["vault_id"])),
            user_id=UserId(str(row["user_id"])),
            plan_id=row["plan_id"],
            granted=row["granted"],
            remaining=row["credits"],
            thresholds=row["reached"],
        )
        for row in rows
        if row["settled"] and row["granted"] and row["reached"]
    ]
    return Turn(reached, VaultId(str(rows[-1]["vault_id"])) if len(rows) == limit else None)
