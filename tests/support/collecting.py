"""A collector on a real PostgreSQL, with exporters on real sockets that say what a test has written for them."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import attrs
import trio
from pydantic import SecretStr

from callora.actors.collector import Collector, CollectSettings
from callora.actors.exporter import Exporter
from callora.actors.rating import Rater
from callora.ledger.collecting import SourceOffer, SourceStatus
from callora.ledger.snapshots import MeterSource, format_instant
from callora.metrics import Metrics
from callora.outbound.client import open_outbound
from callora.service import METER_POLICY
from callora.store.bridge import Database
from callora.store.reads.meters import find_source
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import QUIET
from tests.support.counters import ENV, NODE, Metering, rating_process, subject
from tests.support.upstream import Handler, RecordedRequest, respond

TOKEN: Final = "EXPORTER_TOKEN_TESTS"
SETTINGS: Final = CollectSettings(interval_seconds=60, overlap=timedelta(minutes=2), pages_max=1000, pushed=False)


def offer(url: str, source_id: str = "s-1", **fields: Any) -> SourceOffer:
    """Return a source at a URL; of `node-1` in `prod` unless said otherwise."""
    described = {"expected_node_id": NODE, "expected_env": ENV, "credential_env": TOKEN, **fields}
    return SourceOffer(source_id=source_id, base_url=url, **described)


def sent(at: datetime, totals: Mapping[int, tuple[int, int]], *, node: str = NODE, env: str = ENV) -> dict[str, Any]:
    """Return a snapshot as an exporter sends it, with one sample for each subject's number."""
    samples = [
        {"uuid": subject(number), "inbound_tag": "in", "uplink_bytes_total": up, "downlink_bytes_total": down}
        for number, (up, down) in totals.items()
    ]
    return {"node_id": node, "env": env, "collected_at": format_instant(at), "samples": samples}


def page(*snapshots: Mapping[str, Any], cursor: str | None = None, more: bool | None = None) -> Handler:
    """Answer with a page; with a cursor there is more."""
    has_more = cursor is not None if more is None else more
    body = {"snapshots": snapshots, "has_more": has_more, "next_cursor": cursor or ""}
    return respond(200, [("Content-Type", "application/json")], json.dumps(body).encode())


def asked(request: RecordedRequest) -> dict[str, str]:
    """Return the query of a request."""
    return {name: values[0] for name, values in parse_qs(urlsplit(request.target).query).items()}


@attrs.frozen
class Process:
    """One process that collects."""

    collector: Collector
    rater: Rater
    scope: trio.CancelScope
    """Cancelled, the process ends."""


@attrs.define
class Collecting:
    """A ledger, and processes that collect for it."""

    ledger: RealLedger
    nursery: trio.Nursery
    _processes: list[Process] = attrs.field(factory=list)

    @property
    def clock(self) -> TestClock:
        """What the test moves."""
        return self.ledger.clock

    @property
    def database(self) -> Database:
        """The ledger's pool."""
        return self.ledger.database

    async def process(
        self, *environment: SourceOffer, settings: CollectSettings = SETTINGS, rater: Rater | None = None
    ) -> Process:
        """Start a process whose environment describes these sources."""
        started: Process = await self.nursery.start(self.run, environment, settings, rater)
        return started

    async def run(
        self,
        environment: tuple[SourceOffer, ...],
        settings: CollectSettings,
        rater: Rater | None,
        *,
        task_status: trio.TaskStatus[Process],
    ) -> None:
        tokens = {TOKEN: SecretStr("tests-token"), f"{TOKEN}_2": SecretStr("another-token")}

        def credential(source: MeterSource) -> SecretStr | None:
            return tokens.get(source.credential_env or "")

        """Be a process, until it is cancelled."""
        with trio.CancelScope() as scope:
            async with (
                rating_process(self.ledger, self.database) as own_rater,
                open_outbound(METER_POLICY) as outbound,
            ):
                collector = Collector(
                    self.database,
                    Exporter(outbound, credential, page_size=120),
                    own_rater if rater is None else rater,
                    environment,
                    settings,
                    clock=self.clock,
                    ids=self.ledger.ids,
                    metrics=Metrics(),
                    log=QUIET,
                )
                async with trio.open_nursery() as nursery:
                    await nursery.start(collector.run)
                    task_status.started(Process(collector, own_rater, scope))

    async def status(self, source_id: str = "s-1") -> SourceStatus:
        """Return how far a source is read."""
        found = await find_source(self.database, source_id)
        assert found is not None
        return found.status

    async def payer(self, number: int = 1) -> str:
        """Make a vault that can pay much, and an account for a subject's number."""
        found = await find_source(self.database, "s-1")
        metering = Metering(self.ledger, MeterSource("s-1", "", NODE, ENV, 1, 1) if found is None else found.source)  # type: ignore[arg-type]
        return await metering.payer(10**12, number)

    async def buckets(self) -> list[tuple[str, int, int, int]]:
        """Return minute, up, down and amount of what was rated, in order."""
        rows = await self.database.fetch("SELECT * FROM counter_minutes ORDER BY bucket_start, env, node_id")
        return [(f"{row['bucket_start']:%H:%M}", row["up"], row["down"], row["amount"]) for row in rows]


@asynccontextmanager
async def collecting(database: Database, *, leads: bool = False) -> AsyncIterator[Collecting]:
    """Yield a ledger that processes may collect for; they end with the block, and the audit then finds it clean.

    Args:
        leads: whether a process begins by itself; else only what is asked for is run.
    """
    async with real_ledger(database, TestClock()) as ledger:
        if not leads:
            await database.execute(
                "UPDATE collector_leases SET holder = gen_random_uuid(), held_until = 'infinity' WHERE name = 'loop'"
            )
        async with trio.open_nursery() as nursery:
            yield Collecting(ledger, nursery)
            nursery.cancel_scope.cancel()
        assert await ledger.findings() == []
