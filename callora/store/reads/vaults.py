"""Vaults as their owners see them: balances, and the statement of everything that moved them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import UserId, VaultId, made_at
from callora.ledger.statement import Bound, Position, entry_position, id_from, usage_position
from callora.store.bridge import Database, Row

USAGE: Final = "usage"

_SELECT: Final = """
SELECT vault_id, network, plan_id, standing::text AS standing, available, held, owed, created_at FROM vaults
"""
_VAULT: Final = _SELECT + "WHERE vault_id = $1 AND user_id = $2"
_OF_NETWORK: Final = _SELECT + "WHERE user_id = $1 AND network = $2"
_OF_USER: Final = _SELECT + "WHERE user_id = $1 AND vault_id > $2 ORDER BY vault_id LIMIT $3"

# Each side is read by an index that has its order, and stops at a page: the entries by their date, the usage by the
# date inside the event's id, which is what usage_events is partitioned by.
_ENTRIES: Final = """
SELECT created_at, seq, kind, amount, balance_after, ref, event_id FROM ledger_entries
WHERE vault_id = $1 AND (created_at, seq) < ($2, $3) AND created_at >= $4 AND ($5::text IS NULL OR kind = $5)
ORDER BY created_at DESC, seq DESC LIMIT $6
"""
_USAGE: Final = """
SELECT event_id, amount FROM usage_events
WHERE vault_id = $1 AND event_id < $2 AND event_id >= $3 AND state = 'captured' AND amount > 0
ORDER BY event_id DESC LIMIT $4
"""


@attrs.frozen
class Line:
    """One line of a statement."""

    at: datetime
    kind: str
    """deposit, withdrawal, refund, grant, adjustment, subscription or usage."""
    amount: int
    """stroops, signed: below 0 for what was spent."""
    ref: str
    event_id: str | None
    """The usage event that is charged or refunded."""
    balance_after: int | None
    """The vault's whole balance after an entry, below 0 where it owes; None for usage, which does not count them."""
    position: Position


class VaultReads:
    """Queries over the pool. Every method raises StoreUnavailable, and then nothing was read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def vault(self, vault_id: VaultId, user_id: UserId) -> Row | None:
        """Return a user's vault by its id."""
        return await self._database.fetch_row(_VAULT, vault_id, user_id)

    async def vault_on(self, network: str, user_id: UserId) -> Row | None:
        """Return a user's vault on a network."""
        return await self._database.fetch_row(_OF_NETWORK, user_id, network)

    async def vaults(self, user_id: UserId, *, after: str, limit: int) -> Sequence[Row]:
        """Return a user's vaults in the order they were made; only those with a greater id than `after`."""
        return await self._database.fetch(_OF_USER, user_id, after, limit)

    async def statement(
        self, vault_id: VaultId, *, since: datetime, until: Bound, kind: str | None, limit: int
    ) -> Sequence[Line]:
        """Return what moved a vault's balance from a moment on, the newest first.

        Args:
            since: inclusive.
            until: what is older than the lines shown before.
            kind: only lines of this kind.
        """
        lines: list[Line] = []
        if kind != USAGE:
            rows = await self._database.fetch(_ENTRIES, vault_id, until.at, until.seq, since, kind, limit)
            lines += map(_entry, rows)
        if kind in (None, USAGE):
            rows = await self._database.fetch(_USAGE, vault_id, until.event_id, id_from(since), limit)
            lines += map(_usage, rows)
        lines.sort(key=lambda line: line.position, reverse=True)
        return lines[:limit]


def _entry(row: Row) -> Line:
    event_id = row["event_id"]
    return Line(
        at=row["created_at"],
        kind=row["kind"],
        amount=row["amount"],
        ref=row["ref"],
        event_id=None if event_id is None else str(event_id),
        balance_after=row["balance_after"],
        position=entry_position(row["created_at"], row["seq"]),
    )


def _usage(row: Row) -> Line:
    event_id = str(row["event_id"])
    return Line(made_at(event_id), USAGE, -row["amount"], event_id, event_id, None, usage_position(event_id))
