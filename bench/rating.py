"""Row 15: counters rated through the Rater, from a day of one source's snapshots, with a kill in the middle.

The measuring process has the gateway's core, PostgreSQL the other. It is killed while it rates a page, and another one
goes on two minutes before the last page that was rated whole, as a collector does; at the end every counter, balance
and rule of the audit is checked. Timed is what Rater.rate takes, the page lost by the kill included. What is not:
making the snapshots, and starting the second process.
"""

import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from subprocess import PIPE
from typing import Final

import attrs
import trio

from bench.machine import GATEWAY_CORE, BenchError, environment
from bench.plan import Plan, Progress
from bench.stack import BALANCE_USDC, ROOT, Stack, Tenant
from callora.actors.rating import Rater
from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.collecting import SourceOffer
from callora.ledger.counters import Rule
from callora.ledger.ids import DeveloperId, Ids, UserId
from callora.ledger.money import parse_usdc
from callora.ledger.snapshots import MeterSource, Sample, Snapshot
from callora.logs import Logs
from callora.metrics import Metrics
from callora.service import SystemClock
from callora.store import usage
from callora.store.audit import audit
from callora.store.bridge import Database, open_database
from callora.store.meter_sources import Owner, put_source
from callora.store.reads.meters import FoundSource, find_source
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore

SOURCE: Final = "bench"
NODE: Final = "node"
ENV: Final = "bench"
PAGE_MINUTES: Final = 120
OVERLAP_MINUTES: Final = 2
START: Final = datetime(2026, 11, 1, tzinfo=UTC)
RULE: Final = Rule(Decimal("0.0000001"), "bench")
"""A stroop a unit, so that amounts are what was used."""
_COMMAND_SECONDS: Final = 300
_GIVE_UP_SECONDS: Final = 300
_COMMIT_SECONDS_MAX: Final = 5.0

_ACCOUNTS: Final = """
INSERT INTO counter_accounts (vault_id, account_id, subject, name, active, included_granted, created_at, updated_at)
SELECT vault_id, gen_random_uuid(), ('00000000-0000-4000-8000-' || lpad(to_hex(place), 12, '0'))::uuid, '', true, 0, $2,
       $2
FROM unnest($1::uuid[]) WITH ORDINALITY AS v (vault_id, place)
"""
_USED: Final = """
SELECT a.subject, sum(d.up + d.down)::bigint AS used, sum(d.amount)::bigint AS amount, count(*) AS deltas,
       min(v.available - v.owed) AS balance
FROM counter_accounts a JOIN vaults v ON v.vault_id = a.vault_id
LEFT JOIN counter_deltas d ON d.vault_id = a.vault_id AND d.account_id = a.account_id
GROUP BY a.subject
"""


@attrs.frozen
class RatingFigures:
    """One day of one source."""

    subjects: int
    minutes: int
    seconds: float
    """In Rater.rate, by both processes."""
    killed_after_minutes: int
    """Of snapshots rated whole when the first process was killed."""

    @property
    def samples_per_second(self) -> float:
        """A subject's in one snapshot, each once; the overlap that is read again is not counted."""
        return self.subjects * self.minutes / self.seconds


def subject(number: int) -> str:
    """Return a subject's id; the first is 1."""
    return f"00000000-0000-4000-8000-{number:012x}"


def totals(number: int, minute: int) -> tuple[int, int]:
    """Return what a subject's counters stand at: both grow in each minute, each subject's at its own pace."""
    return (minute + 1) * (number % 97 + 1), (minute + 1) * (number % 89 + 2)


def page(since: int, until: int, subjects: int) -> list[Snapshot]:
    """Return the snapshots of these minutes."""
    return [
        Snapshot(
            NODE,
            ENV,
            START + timedelta(minutes=minute),
            tuple(Sample(subject(number), "in", *totals(number, minute)) for number in range(1, subjects + 1)),
            0,
        )
        for minute in range(since, until)
    ]


async def run_rating(stack: Stack, plan: Plan, progress: Progress) -> RatingFigures:
    """Return the figures.

    Raises:
        BenchError: a counter, a balance or a rule of the audit is not what it must be.
    """
    subjects, minutes = plan.rated_subjects, plan.rated_minutes
    tenant = await stack.tenant("rating", vaults=subjects)
    async with open_database(tenant.dsn, command_seconds=_COMMAND_SECONDS) as database:
        await _seed(database, tenant)
        kill_at = minutes // 2
        first, lost, reached = await _rate(tenant, subjects, 0, minutes, kill_at)
        progress.say(f"rating: {reached} of {minutes} minutes in {first:.1f} s, then killed")
        second, _, _ = await _rate(tenant, subjects, max(0, reached - OVERLAP_MINUTES), minutes, None)
        figures = RatingFigures(subjects, minutes, first + lost + second, reached)
        progress.say(f"rating: {figures.samples_per_second:.0f} samples/s; the books are checked")
        await _check(database, subjects, minutes)
    return figures


async def _seed(database: Database, tenant: Tenant) -> None:
    clock = SystemClock()
    now, ids = clock.now(), Ids(clock, os.urandom)
    await usage.ensure_partitions(database, now)
    await database.execute(_ACCOUNTS, tenant.vault_ids, now)
    owner = Owner(UserId(ids.uuid7()), DeveloperId(ids.uuid7()))
    offer = SourceOffer(source_id=SOURCE, base_url="http://localhost:1", expected_node_id=NODE, expected_env=ENV)
    assert isinstance(await put_source(database, offer, "operator", owner, now, may_replace=False), FoundSource)


async def _rate(tenant: Tenant, subjects: int, since: int, until: int, kill_at: int | None) -> tuple[float, float, int]:
    """Return the seconds that whole pages took, what the page took that was killed, and the minutes rated whole."""
    argv = ["taskset", "-c", str(GATEWAY_CORE), sys.executable, "-m", "bench.rating"]
    arguments = json.dumps({"dsn": tenant.dsn, "subjects": subjects, "since": since, "until": until})
    seconds, lost, reached = 0.0, 0.0, since
    with trio.fail_after(_GIVE_UP_SECONDS):
        async with trio.open_nursery() as nursery:
            start = partial(
                trio.run_process, [*argv, arguments], cwd=ROOT, env=environment({}), stdout=PIPE, check=False
            )
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            text = b""
            async for received in process.stdout:
                *lines, text = (text + received).split(b"\n")
                for line in lines:
                    told = json.loads(line)
                    if "rated" in told:
                        seconds, reached = seconds + told["seconds"], told["rated"]
                    elif kill_at is not None and reached >= kill_at:
                        began = time.perf_counter()
                        await trio.sleep(seconds * PAGE_MINUTES / (reached - since) / 2)  # in the middle of a page
                        process.kill()
                        lost = time.perf_counter() - began
            await process.wait()
    if kill_at is None and (process.returncode != 0 or reached != until):
        raise BenchError(f"the rater ended with {process.returncode} at minute {reached} of {until}")
    return seconds, lost, reached


async def _check(database: Database, subjects: int, minutes: int) -> None:
    rows = {str(row["subject"]): row for row in await database.fetch(_USED)}
    for number in range(1, subjects + 1):
        used, row = sum(totals(number, minutes - 1)), rows[subject(number)]
        found = row["used"], row["amount"], row["deltas"], row["balance"]
        if found != (used, used, minutes, parse_usdc(BALANCE_USDC) - used):
            raise BenchError(f"subject {number} used {used}, and the books say {found}")
    wrong = [each.rule for each in await audit(database, SystemClock().now()) if each.wrong]
    if wrong:
        raise BenchError(f"the audit finds: {wrong}")


@asynccontextmanager
async def _rater(database: Database) -> AsyncIterator[Rater]:
    clock, metrics = SystemClock(), Metrics()
    ids = Ids(clock, os.urandom)
    logs = Logs(clock, level="warning", as_json=False)
    async with database.line(LINE_SETTINGS) as line, trio.open_nursery() as writing:
        store = VaultStore(database, line, clock, ids.uuid7, _COMMIT_SECONDS_MAX)
        writer = Writer(store, metrics, logs.logger("writer"), 1000)
        registry = VaultRegistry(store, writer, metrics, logs.logger("registry"), random.Random(), 1024)
        await writing.start(writer.run)
        async with trio.open_nursery() as acting:
            await acting.start(registry.run)
            yield Rater(database, registry, clock, ids, logs.logger("rating"), RULE)
            registry.close()
        logs.flush()
        writing.cancel_scope.cancel()


async def measure(dsn: str, subjects: int, since: int, until: int) -> None:
    """Rate from a minute on, page by page; say on standard output when a page begins, and what it took."""
    async with open_database(dsn) as database, _rater(database) as rater:
        found = await find_source(database, SOURCE)
        assert found is not None
        source: MeterSource = found.source
        while since < until:
            end = min(until, since + PAGE_MINUTES)
            snapshots = page(since, end, subjects)
            print(json.dumps({"begun": since}), flush=True)
            began = time.perf_counter()
            came_to = await rater.rate(source, snapshots)
            seconds = time.perf_counter() - began
            assert came_to.latest == START + timedelta(minutes=end - 1), came_to
            print(json.dumps({"rated": end, "seconds": seconds}), flush=True)
            since = end


if __name__ == "__main__":
    _asked = json.loads(sys.argv[1])
    trio.run(measure, _asked["dsn"], _asked["subjects"], _asked["since"], _asked["until"])
