"""Alerts of low balances: below what a vault's owner wants to hear of it, and whether he has."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops, format_usdc
from callora.store.bridge import Connection, Database, Row
from callora.store.outbox import Event, add_events, iso

EVENT: Final = "low_balance_alert"

_SET: Final = """
INSERT INTO balance_alerts AS a (vault_id, threshold, set_by, set_at) VALUES ($1, $2, $3, $4)
ON CONFLICT (vault_id) DO UPDATE SET threshold = excluded.threshold, set_by = excluded.set_by, set_at = excluded.set_at,
    low_since = CASE WHEN a.removed_at IS NULL AND a.threshold = excluded.threshold THEN a.low_since END,
    removed_at = NULL
"""

# The row stays, so that what it told is never told again under the same name.
_REMOVE: Final = "UPDATE balance_alerts SET removed_at = $2 WHERE vault_id = $1 AND removed_at IS NULL"

_TURN: Final = "UPDATE balance_watch SET due_at = $1 WHERE due_at <= $2 RETURNING true"

# Locked, so that a threshold that is set meanwhile is looked at as it is then.
_LOOK: Final = """
SELECT a.vault_id, a.threshold, a.low_since, a.times, v.user_id, v.network, v.available,
       v.available + v.held - v.owed AS balance
FROM balance_alerts a JOIN vaults v ON v.vault_id = a.vault_id
WHERE a.vault_id > $1 AND a.removed_at IS NULL ORDER BY a.vault_id LIMIT $2
FOR UPDATE OF a
"""

_CROSSED: Final = """
UPDATE balance_alerts SET low_since = $2, times = times + 1 WHERE vault_id = ANY ($1::uuid[])
"""

_RECOVERED: Final = "UPDATE balance_alerts SET low_since = NULL WHERE vault_id = ANY ($1::uuid[])"


async def set_alert(database: Database, vault_id: VaultId, threshold: Stroops, set_by: UserId, now: datetime) -> None:
    """Set a vault's threshold, or replace it; another one is told of anew.

    Args:
        threshold: stroops, > 0.

    Raises:
        StoreUnavailable: nothing was changed. OutcomeUnknown: setting it again is safe.
    """
    await database.execute(_SET, vault_id, threshold, set_by, now)


async def remove_alert(database: Database, vault_id: VaultId, now: datetime) -> None:
    """Remove a vault's threshold; one that was never set is removed as well. Raises as `set_alert`."""
    await database.execute(_REMOVE, vault_id, now)


async def take_turn(database: Database, now: datetime, every: timedelta) -> bool:
    """Tell whether this process is the one to look now; another is not for as long as `every`."""
    return bool(await database.fetch_value(_TURN, now + every, now))


async def look(
    connection: Connection, after: VaultId, limit: int, now: datetime, new_id: Callable[[], str]
) -> VaultId | None:
    """Look at the next vaults with a threshold, and tell of those that have fallen below.

    A balance is what is available and held, less what is owed: what a vault holds is its still.

    Returns:
        Where to go on; None after the last.
    """
    rows = await connection.fetch(_LOOK, after, limit)
    low = [row for row in rows if row["balance"] < row["threshold"]]
    crossed = [row for row in low if row["low_since"] is None]
    if crossed:
        await connection.execute(_CROSSED, [row["vault_id"] for row in crossed], now)
        await add_events(connection, [_event(row, now, new_id()) for row in crossed], now)
    low_ids = {row["vault_id"] for row in low}
    recovered = [row["vault_id"] for row in rows if row["low_since"] is not None and row["vault_id"] not in low_ids]
    if recovered:
        await connection.execute(_RECOVERED, recovered)
    return VaultId(str(rows[-1]["vault_id"])) if len(rows) == limit else None


def _event(row: Row, now: datetime, event_id: str) -> Event:
    vault_id = str(row["vault_id"])
    return Event(
        event_id=event_id,
        type=EVENT,
        subject=f"{vault_id}:{row['times'] + 1}",
        developer_id=None,
        payload={
            "vaultId": vault_id,
            "network": row["network"],
            "balanceUsdc": format_usdc(Stroops(row["balance"])),
            "availableUsdc": format_usdc(Stroops(row["available"])),
            "thresholdUsdc": format_usdc(Stroops(row["threshold"])),
            "seenAt": iso(now),
        },
        user_id=UserId(str(row["user_id"])),
    )
