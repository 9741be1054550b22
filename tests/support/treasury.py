"""A treasury's parts on a real database, with a stream of events in place of the network; and its users."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs

from callora.actors.booking import Booking
from callora.actors.listener import Listener
from callora.actors.registry import VaultRegistry
from callora.actors.vaults import VaultOpening
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.store import accounts
from callora.store.bridge import Database
from callora.store.deposits import Intent, add_intent
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import METRICS, Log, running
from tests.support.stream import Stream, wallet_of


@attrs.frozen
class Watch:
    """One process that follows a stream."""

    ledger: RealLedger
    stream: Stream
    listener: Listener
    booking: Booking
    log: Log

    async def follow(self) -> None:
        """Look until there is nothing new, and book."""
        while await self.listener.look() in ("more", "moved", "lost"):
            pass
        await self.booking.book_all(self.stream.network)


@attrs.frozen
class Books:
    """A database, a stream, and what tests ask of both."""

    ledger: RealLedger
    stream: Stream

    @property
    def database(self) -> Database:
        """The pool."""
        return self.ledger.database

    async def user(self, wallet: str | None = None, *, vault: bool = True) -> tuple[UserId, VaultId | None]:
        """Make a user, perhaps with a proved wallet and a vault."""
        ids, now = self.ledger.ids, self.ledger.clock.now()
        user_id = UserId(ids.uuid7())
        await accounts.add_user(self.database, user_id, "Someone", now)
        if wallet is not None:
            await self.database.execute("UPDATE users SET wallet_address = $2 WHERE user_id = $1", user_id, wallet)
        if not vault:
            return user_id, None
        made = await accounts.ensure_vault(
            self.database, VaultId(ids.uuid7()), user_id, self.stream.network, "free", now
        )
        return user_id, made

    async def intent(self, user_id: UserId, vault_id: VaultId, tx_hash: str, address: str, amount: int) -> None:
        """Store a deposit as prepared."""
        now = self.ledger.clock.now()
        intent = Intent(
            tx_hash, self.stream.network, 1, vault_id, address, Stroops(amount), "AAAA", 100, 1, now,
            now.replace(year=2030), "approving", None, None,
        )  # fmt: skip
        stored = await add_intent(self.database, user_id, intent, 100)
        assert isinstance(stored, Intent)

    async def rows(self, sql: str, *args: object) -> list[dict[str, Any]]:
        """Return rows as dictionaries."""
        return [dict(row) for row in await self.database.fetch(sql, *args)]

    async def events(self) -> list[tuple[str, str]]:
        """Return state and kind of every event noted, in order."""
        found = await self.rows("SELECT state, kind FROM chain_events ORDER BY epoch, event_id")
        return [(row["state"], row["kind"]) for row in found]

    async def credited(self) -> int:
        """Return Σ deposits that the ledger has booked from events."""
        sql = "SELECT coalesce(sum(amount), 0)::bigint FROM ledger_entries WHERE kind = 'deposit' AND ref LIKE '%:%:%'"
        return int(await self.database.fetch_value(sql))


@asynccontextmanager
async def books(database: Database, stream: Stream) -> AsyncIterator[Books]:
    """Open the books, which the audit finds clean at the end."""
    async with real_ledger(database, TestClock()) as ledger:
        yield Books(ledger, stream)
        assert await ledger.findings() == []


@asynccontextmanager
async def watch(
    at: Books, *, stream: Stream | None = None, page_events: int = 1000, store: VaultStore | None = None
) -> AsyncIterator[Watch]:
    """Run one process's ledger, and give it a listener that the test moves."""
    stream = stream or at.stream
    async with running(store or at.ledger.store) as process:
        yield make_watch(at.ledger, stream, process.registry, process.log, page_events)


def make_watch(ledger: RealLedger, stream: Stream, registry: VaultRegistry, log: Log, page_events: int = 1000) -> Watch:
    """Return a listener and what books for it."""
    database, clock = ledger.database, ledger.clock
    booking = Booking(stream, database, registry, VaultOpening(database, clock, ledger.ids), clock, log.logger())
    listener = Listener(
        stream, database, booking, clock, METRICS, log.logger(), interval_seconds=0.01, page_events=page_events
    )
    return Watch(ledger, stream, listener, booking, log)


def amounts(events: Sequence[Any]) -> int:
    """Return the sum of what events moved."""
    return sum(event.amount for event in events)


async def stored_transaction(database: Database, tx_hash: str, purpose: str) -> None:
    """Store a transaction of ours, as the submitter does before it sends one."""
    await database.execute(
        "INSERT INTO chain_transactions (hash, network, epoch, purpose, envelope, source_account, sequence, max_time,"
        " fee, prepared_ledger, bid, channel, sponsored, failed_before, state, stored_at)"
        " VALUES (decode($1, 'hex'), 'testnet', 1, $2, 'AAAA', $3, 1, now(), 100, 1, 100, false, false, 0, 'stored',"
        " now())",
        tx_hash,
        purpose,
        wallet_of("channel"),
    )
