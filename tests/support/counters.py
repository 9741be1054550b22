"""A meter source, accounts for its subjects, and processes that rate what it says, on a real PostgreSQL."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Final

import attrs
import trio

from callora.actors.rating import Rater
from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.collecting import SourceOffer
from callora.ledger.counters import Profile, Rule
from callora.ledger.ids import DeveloperId, UserId, VaultId
from callora.ledger.snapshots import MeterSource, Sample, Snapshot
from callora.store import counter_accounts
from callora.store.bridge import Database, Row
from callora.store.meter_sources import Owner, put_source
from callora.store.reads.meters import FoundSource
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import NOON, RealLedger
from tests.simulation.support import METRICS, QUIET

MINUTE: Final = timedelta(minutes=1)
NODE: Final = "node-1"
ENV: Final = "prod"
STROOP: Final = Decimal("0.0000001")
PROFILE: Final = Profile(
    "", active=True, unit_price=STROOP, region_multiplier=Decimal(1), line_multiplier=Decimal(1), rule_version=None
)
RULE: Final = Rule(STROOP, "service-v1")


def subject(number: int) -> str:
    """Return a subject's id."""
    return f"00000000-0000-4000-8000-{number:012x}"


def snapshot(at: datetime, totals: Mapping[int, tuple[int, int]], *, node: str = NODE, env: str = ENV) -> Snapshot:
    """Return a snapshot with one sample for each subject's number."""
    samples = tuple(Sample(subject(number), "in", up, down) for number, (up, down) in totals.items())
    return Snapshot(node, env, at, samples, 0)


def minute(number: float) -> datetime:
    """Return an instant, minutes after noon."""
    return NOON + number * MINUTE


@attrs.define
class Metering:
    """A ledger with a source."""

    ledger: RealLedger
    source: MeterSource

    async def account(
        self, vault_id: VaultId, number: int = 1, *, included: int = 0, profile: Profile = PROFILE
    ) -> str:
        """Make an account for a subject; return its id."""
        account_id = self.ledger.ids.uuid7()
        made = await counter_accounts.add(
            self.ledger.database, account_id, vault_id, subject(number), profile, included, self.ledger.clock.now()
        )
        assert made is None, made
        return account_id

    async def payer(self, balance: int, number: int = 1, *, included: int = 0, profile: Profile = PROFILE) -> VaultId:
        """Make a vault with this balance and an account for a subject."""
        vault_id = await self.ledger.vault(balance)
        await self.account(vault_id, number, included=included, profile=profile)
        return vault_id

    async def rows(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Return a query's rows."""
        return [tuple(row.values()) for row in await self.ledger.database.fetch(sql, *args)]

    async def buckets(self) -> list[tuple[int, int, int, int, int]]:
        """Return the minutes after noon of every bucket with its up, down, total and amount."""
        rows = await self.ledger.database.fetch(
            "SELECT * FROM counter_minutes ORDER BY bucket_start, env, node_id, account_id"
        )
        return [
            ((row["bucket_start"] - NOON) // MINUTE, row["up"], row["down"], row["total"], row["amount"])
            for row in rows
        ]

    async def vault(self, vault_id: VaultId) -> Row:
        """Return a vault's row."""
        row = await self.ledger.database.fetch_row("SELECT * FROM vaults WHERE vault_id = $1", vault_id)
        assert row is not None
        return row

    async def balance(self, vault_id: VaultId) -> int:
        """Return a vault's whole balance, below 0 where it owes."""
        row = await self.vault(vault_id)
        return int(row["available"] + row["held"] - row["owed"])


async def metering(ledger: RealLedger, **offer: Any) -> Metering:
    """Return a ledger with a source."""
    offered = SourceOffer(
        source_id="s-1", base_url="http://localhost:1", expected_node_id=NODE, expected_env=ENV, **offer
    )
    owner = Owner(UserId(ledger.ids.uuid7()), DeveloperId(ledger.ids.uuid7()))
    found = await put_source(ledger.database, offered, "operator", owner, ledger.clock.now(), may_replace=False)
    assert isinstance(found, FoundSource)
    return Metering(ledger, found.source)


@asynccontextmanager
async def rating_process(ledger: RealLedger, database: Database, rule: Rule = RULE) -> AsyncIterator[Rater]:
    """Run a process of its own that rates; its vaults' actors end with it."""
    async with database.line(LINE_SETTINGS) as line:
        store = VaultStore(database, line, ledger.clock, ledger.ids.uuid7, 10)
        writer = Writer(store, METRICS, QUIET, 1000)
        registry = VaultRegistry(store, writer, METRICS, QUIET, Random(0), 1000)
        async with trio.open_nursery() as nursery:
            await nursery.start(writer.run)
            await nursery.start(registry.run)
            yield Rater(database, registry, ledger.clock, ledger.ids, QUIET, rule)
            nursery.cancel_scope.cancel()
