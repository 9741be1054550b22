"""Invoices: a calendar month of a vault, closed once from the sums of its days."""

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops, format_usdc
from callora.store.bridge import Connection, Database, Row
from callora.store.outbox import Event, add_events, iso

EVENT: Final = "invoice_created"
OPEN_MAX: Final = timedelta(hours=25)
"""After a month's end: every hold of it has ended, which takes a day at most, and what ended is in the sums."""

_STATE: Final = "SELECT i.closed, r.as_of FROM invoicing i, usage_rollup r"

_NEXT_VAULTS: Final = "SELECT vault_id FROM vaults WHERE vault_id > $1 ORDER BY vault_id LIMIT $2"

_CLOSE: Final = """
WITH sums AS (
    SELECT v.vault_id, v.user_id, v.network, u.calls, u.usage, u.refunded, s.subscriptions
    FROM unnest($1::uuid[], $2::uuid[]) AS w (vault_id, invoice_id) JOIN vaults v ON v.vault_id = w.vault_id
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(d.calls), 0)::bigint AS calls, coalesce(sum(d.amount), 0)::bigint AS usage,
               coalesce(sum(d.refunded), 0)::bigint AS refunded
        FROM usage_days d WHERE d.vault_id = v.vault_id AND d.day >= $3 AND d.day < $4
    ) AS u
    CROSS JOIN LATERAL (
        SELECT coalesce(-sum(e.amount), 0)::bigint AS subscriptions FROM ledger_entries e
        WHERE e.vault_id = v.vault_id AND e.kind = 'subscription' AND e.created_at >= $3 AND e.created_at < $4
    ) AS s
), made AS (
    INSERT INTO invoices (invoice_id, vault_id, month, calls, usage, refunded, subscriptions, issued_at)
    SELECT w.invoice_id, s.vault_id, $5, s.calls, s.usage, s.refunded, s.subscriptions, $6
    FROM sums s JOIN unnest($1::uuid[], $2::uuid[]) AS w (vault_id, invoice_id) ON w.vault_id = s.vault_id
    WHERE s.calls > 0 OR s.refunded > 0 OR s.subscriptions > 0
    ON CONFLICT (vault_id, month) DO NOTHING
    RETURNING invoice_id, vault_id, month, calls, usage, refunded, subscriptions, total, issued_at
)
SELECT m.*, s.user_id, s.network FROM made m JOIN sums s ON s.vault_id = m.vault_id ORDER BY m.vault_id
"""

_CLOSED: Final = "UPDATE invoicing SET closed = $1 WHERE closed IS NULL OR closed < $1"


@attrs.frozen
class Month:
    """A calendar month in UTC."""

    first: date

    @property
    def since(self) -> datetime:
        """Its first instant."""
        return datetime(self.first.year, self.first.month, 1, tzinfo=UTC)

    @property
    def next(self) -> "Month":
        """The month after it."""
        return Month((self.first + timedelta(days=31)).replace(day=1))

    @classmethod
    def of(cls, moment: datetime) -> "Month":
        """Return the month of a moment."""
        return cls(moment.astimezone(UTC).date().replace(day=1))


async def next_month(database: Database, now: datetime) -> Month | None:
    """Return the month to be closed next, None while it is not over for OPEN_MAX, or not added up.

    The first one is the month before the present.
    """
    row = await database.fetch_row(_STATE)
    assert row is not None, "migrations made both"
    before = Month.of(Month.of(now).since - timedelta(days=1))
    month = before if row["closed"] is None else Month(row["closed"]).next
    return month if min(now, row["as_of"]) >= month.next.since + OPEN_MAX else None


async def close_vaults(
    connection: Connection, month: Month, after: VaultId, limit: int, now: datetime, new_id: Callable[[], str]
) -> VaultId | None:
    """Make the invoices of the next vaults, and tell their owners; call it in a transaction.

    Returns:
        Where to go on; None after the last.
    """
    vaults = [row["vault_id"] for row in await connection.fetch(_NEXT_VAULTS, after, limit)]
    if vaults:
        ids = [new_id() for _ in vaults]
        rows = await connection.fetch(_CLOSE, vaults, ids, month.since, month.next.since, month.first, now)
        await _tell(connection, rows, now, new_id)
    return VaultId(str(vaults[-1])) if len(vaults) == limit else None


async def close_month(database: Database, month: Month) -> None:
    """Note that every vault has its invoice of a month."""
    await database.execute(_CLOSED, month.first)


async def _tell(connection: Connection, rows: Sequence[Row], now: datetime, new_id: Callable[[], str]) -> None:
    events = [
        Event(
            event_id=new_id(),
            type=EVENT,
            subject=str(row["invoice_id"]),
            developer_id=None,
            payload={
                "invoiceId": str(row["invoice_id"]),
                "vaultId": str(row["vault_id"]),
                "network": row["network"],
                "month": f"{row['month']:%Y-%m}",
                "calls": row["calls"],
                "usageUsdc": format_usdc(Stroops(row["usage"])),
                "refundedUsdc": format_usdc(Stroops(row["refunded"])),
                "subscriptionsUsdc": format_usdc(Stroops(row["subscriptions"])),
                "totalUsdc": format_usdc(Stroops(row["total"])),
                "issuedAt": iso(now),
            },
            user_id=UserId(str(row["user_id"])),
        )
        for row in rows
    ]
    if events:
        await add_events(connection, events, now)
