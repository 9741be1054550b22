"""The real ledger store on a real PostgreSQL, a clock that only the test moves, and vaults to use it on."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import attrs

from callora.ledger.commands import CloseHold, Deposit, LockedCommand, PlaceHold
from callora.ledger.ids import EventId, Ids, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved
from callora.ledger.rounds import Share
from callora.ledger.vault import VaultState
from callora.store import accounts, usage
from callora.store.audit import audit
from callora.store.bridge import Database, Row
from callora.store.reads.claims import CLAIMS_SETTINGS, Claims
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@attrs.define
class TestClock:
    """A wall clock that stands still."""

    __test__ = False

    at: datetime = NOON

    def now(self) -> datetime:
        """Return the instant that the test chose."""
        return self.at

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.at.timestamp()

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.at += timedelta(seconds=seconds)


@attrs.frozen
class RealLedger:
    """A store and what the tests ask it."""

    database: Database
    store: VaultStore
    claims: Claims
    clock: TestClock
    ids: Ids

    def event(self) -> EventId:
        """Return a new event's id."""
        return EventId(self.ids.uuid7())

    async def vault(self, amount: int) -> VaultId:
        """Make a vault that holds this much."""
        user_id, vault_id = UserId(self.ids.uuid7()), VaultId(self.ids.uuid7())
        await accounts.add_user(self.database, user_id, "Consumer", self.clock.now())
        await accounts.ensure_vault(self.database, vault_id, user_id, "testnet", "free", self.clock.now())
        if amount:
            assert isinstance(await self.locked(vault_id, Deposit(Stroops(amount), "first")), BalanceMoved)
        return vault_id

    async def locked(self, vault_id: VaultId, command: LockedCommand) -> object:
        """Carry out one rare command."""
        return await self.store.commit_locked(vault_id, command)

    async def state(self, vault_id: VaultId) -> VaultState:
        """Return a vault as stored."""
        return (await self.store.load_vaults([vault_id]))[vault_id]

    async def balance(self, vault_id: VaultId) -> tuple[int, int]:
        """Return what is available and held."""
        state = await self.state(vault_id)
        return state.available, state.held

    async def share(
        self, vault_id: VaultId, *commands: PlaceHold | CloseHold, guarded: bool = False, version: int = -7
    ) -> Share:
        """Return a share with these commands, decided on the stored version unless another is given."""
        decided = (await self.state(vault_id)).version if version == -7 else version
        share = Share(vault_id, decided, guarded)
        for command in commands:
            if isinstance(command, PlaceHold):
                share.place(command)
            else:
                share.close(command)
        return share

    async def event_row(self, event_id: EventId) -> Row | None:
        """Return a usage event as it stands."""
        return await self.database.fetch_row(
            "SELECT state::text AS state, amount, held_amount, outcome, expires_at FROM usage_events"
            " WHERE event_id = $1",
            event_id,
        )

    async def count(self, table: str, where: str = "true") -> int:
        """Return how many rows there are."""
        return int(await self.database.fetch_value(f"SELECT count(*) FROM {table} WHERE {where}"))

    async def findings(self) -> list[str]:
        """Return the rules that the audit finds broken."""
        return [finding.rule for finding in await audit(self.database, self.clock.now()) if finding.wrong]


@asynccontextmanager
async def real_ledger(database: Database, clock: TestClock) -> AsyncIterator[RealLedger]:
    """Open a store on a migrated database, with its partitions made."""
    await usage.ensure_partitions(database, clock.now())
    async with database.line(LINE_SETTINGS) as line, database.line(CLAIMS_SETTINGS) as claims_line:
        ids = Ids(clock, os.urandom)
        store = VaultStore(database, line, clock, ids.uuid7, 10)
        yield RealLedger(database, store, Claims(claims_line, database, 10), clock, ids)
