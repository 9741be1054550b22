"""Rows 5 and 6: durable balance changes without HTTP, a transaction per call beside rounds through the actors.

Both write the project's own tables. A transaction per call deducts and records in one database transaction on a pooled
connection; a call through the actors is a hold and a capture, two balance changes, each durable before its reply. The
measuring process has the gateway's core, PostgreSQL the other; the books are checked after each run.
"""

import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal

import attrs
import trio

from bench.audit import read_books
from bench.lanes import Spread, spread
from bench.machine import GATEWAY_CORE, BenchError, environment
from bench.plan import Plan, Progress
from bench.stack import PRICE_USDC, ROOT, Stack, Tenant
from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.commands import Charged, Delivery, PlaceHold, capture
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId, Ids, VaultId
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import HoldClosed, HoldPlaced
from callora.logs import Logs
from callora.metrics import Metrics
from callora.service import SystemClock
from callora.store.bridge import open_database
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore

Way = Literal["transactions", "rounds"]
Vaults = Literal["hot", "many"]

CHANGES_PER_CALL: Final[dict[Way, int]] = {"transactions": 1, "rounds": 2}
_WARM_UP_SECONDS: Final = 0.5
_POOL_CONNECTIONS: Final = 10
_ROUND_COMMANDS_MAX: Final = 1000
_COMMIT_SECONDS_MAX: Final = 5.0
_MAILBOX_COMMANDS_MAX: Final = 1024
_NOBODY: Final = "00000000-0000-7000-8000-000000000000"

_DEDUCT: Final = "UPDATE vaults SET available = available - $2 WHERE vault_id = $1 AND available >= $2"
_RECORD: Final = """
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, closed_at, status, outcome)
VALUES ($1, $2, $3, $3, 1, 1, $4, now(), now() + interval '120 seconds', 1, 'captured', $4, now(), 200, 'delivered')
"""


@attrs.frozen
class LedgerRun:
    """One way at one number of callers and vaults."""

    way: Way
    callers: int
    vaults: Vaults
    calls_per_second: Spread
    """Whole calls: a transaction, or a hold and its capture."""
    changes_per_second: Spread
    """Durable balance changes: one a transaction, two a call through the actors."""


@attrs.frozen
class LedgerFigures:
    """All ways side by side."""

    runs: tuple[LedgerRun, ...]
    complaints: tuple[str, ...]

    def at(self, way: Way, callers: int, vaults: Vaults) -> LedgerRun:
        """Return one run.

        Raises:
            LookupError: it was not measured, or a ledger check failed.
        """
        if self.complaints:
            raise LookupError("the ledger check failed")
        for each in self.runs:
            if (each.way, each.callers, each.vaults) == (way, callers, vaults):
                return each
        raise LookupError(f"{way} at {callers} callers was not measured")


@attrs.frozen
class Calls:
    """What a measuring process counted."""

    counted: int
    """Calls that ended in the counted time."""
    seconds: float
    """The counted time."""
    all: int
    """Calls that ended at all, which is what the books must say."""


@asynccontextmanager
async def open_registry(dsn: str) -> AsyncIterator[VaultRegistry]:
    """Run writer and registry as the service does: every actor has ended before the writer stops."""
    metrics, logs = Metrics(), Logs(SystemClock(), level="warning", as_json=False)
    async with (
        open_database(dsn) as database,
        database.line(LINE_SETTINGS) as line,
        trio.open_nursery() as writing,
    ):
        store = VaultStore(database, line, SystemClock(), Ids(SystemClock(), os.urandom).uuid7, _COMMIT_SECONDS_MAX)
        writer = Writer(store, metrics, logs.logger("writer"), _ROUND_COMMANDS_MAX)
        registry = VaultRegistry(
            store, writer, metrics, logs.logger("registry"), random.Random(), _MAILBOX_COMMANDS_MAX
        )
        await writing.start(writer.run)
        async with trio.open_nursery() as acting:
            await acting.start(registry.run)
            yield registry
            registry.close()
        logs.flush()
        writing.cancel_scope.cancel()


async def run_rounds(dsn: str, vault_ids: Sequence[str], *, callers: int, seconds: float) -> Calls:
    """Return how many calls were held and captured through the vault actors.

    Args:
        dsn: a migrated database in which these vaults have money.
        vault_ids: callers walk through them in turn.
        callers: each makes its next call as soon as its last one is captured.
        seconds: how long to count, once every vault was called and half a second has passed.
    """
    price = parse_usdc(PRICE_USDC)
    ids = Ids(SystemClock(), os.urandom)
    charged = Charged(ApiKeyId(_NOBODY), DeveloperId(_NOBODY), ApiId(1), EndpointId(1), 1)
    delivery = Delivery("delivered", 200, 1000, 0, 17)
    async with open_registry(dsn) as registry:

        async def call(vault_id: str) -> None:
            vault, event = VaultId(vault_id), EventId(ids.uuid7())
            held = await registry.ask(vault, PlaceHold(event, price, 120, charged))
            assert isinstance(held, HoldPlaced), held
            closed = await registry.ask(vault, capture(event, price, price, delivery))
            assert isinstance(closed, HoldClosed), closed

        return await _count(call, vault_ids, callers, seconds)


async def run_transactions(dsn: str, vault_ids: Sequence[str], *, callers: int, seconds: float) -> Calls:
    """Return how many calls were charged by a database transaction each, through the bridge's pool.

    Args:
        dsn: a migrated database in which these vaults have money.
        vault_ids: callers walk through them in turn.
        callers: each makes its next call as soon as its last one is committed.
        seconds: how long to count, once every vault was called and half a second has passed.
    """
    price = parse_usdc(PRICE_USDC)
    ids = Ids(SystemClock(), os.urandom)
    async with open_database(dsn, pool_max=_POOL_CONNECTIONS) as database:

        async def call(vault_id: str) -> None:
            async with database.transaction() as connection:
                await connection.execute(_DEDUCT, vault_id, price)
                await connection.execute(_RECORD, vault_id, ids.uuid7(), _NOBODY, price)

        return await _count(call, vault_ids, callers, seconds)


WAYS: Final[dict[str, Callable[..., Awaitable[Calls]]]] = {"transactions": run_transactions, "rounds": run_rounds}


async def _count(
    call: Callable[[str], Awaitable[None]], vault_ids: Sequence[str], callers: int, seconds: float
) -> Calls:
    done = turn = 0
    warm, over = trio.Event(), False

    async def caller() -> None:
        nonlocal done, turn
        while not over:
            turn += 1
            await call(vault_ids[turn % len(vault_ids)])
            done += 1
            if done == len(vault_ids) + callers:
                warm.set()

    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller)
        await trio.sleep(_WARM_UP_SECONDS)
        await warm.wait()
        before, began = done, time.perf_counter()
        await trio.sleep(seconds)
        counted, took = done - before, time.perf_counter() - began
        over = True
    return Calls(counted=counted, seconds=took, all=done)


async def run_ledger(stack: Stack, plan: Plan, progress: Progress) -> LedgerFigures:
    """Return every way at every number of callers on one hot vault and on many, interleaved.

    Raises:
        BenchError: a measuring process failed.
    """
    tenants: dict[Way, Tenant] = {
        way: await stack.tenant(f"ledger_{way}", vaults=plan.many_vaults) for way in ("transactions", "rounds")
    }
    kinds: list[tuple[int, Vaults, Way]] = [
        (callers, vaults, way) for callers in plan.callers for vaults in ("hot", "many") for way in tenants
    ]
    samples: dict[tuple[int, Vaults, Way], list[float]] = {kind: [] for kind in kinds}
    complaints: list[str] = []
    for repetition in range(plan.repetitions):
        for kind in kinds:
            callers, vaults, way = kind
            tenant = tenants[way]
            vault_ids = tenant.vault_ids[:1] if vaults == "hot" else tenant.vault_ids
            before = await read_books(stack.postgres, tenant.dsn)
            calls = await _measure(stack, way, tenant.dsn, vault_ids, callers=callers, seconds=plan.seconds)
            after = await read_books(stack.postgres, tenant.dsn)
            samples[kind].append(calls.counted / calls.seconds)
            price = parse_usdc(PRICE_USDC)
            checks = {
                f"{calls.all} calls, {after.captured - before.captured} captured": (
                    after.captured - before.captured == calls.all
                ),
                f"{after.charged} stroops for {after.captured} calls": after.charged == price * after.captured,
                f"{after.vaults_off} vaults off balance": after.vaults_off == 0,
                f"{after.open_holds} holds open": after.open_holds == 0 == after.held,
            }
            wrong = [f"{way}, {callers} callers, {vaults}: {said}" for said, holds in checks.items() if not holds]
            complaints += wrong
            progress.say(
                f"{way}, {callers} callers, {vaults}, repetition {repetition + 1}/{plan.repetitions}: "
                f"{samples[kind][-1]:.0f} calls/s" + "".join(f"; {each}" for each in wrong)
            )
    runs = tuple(
        LedgerRun(
            way=way,
            callers=callers,
            vaults=vaults,
            calls_per_second=spread(rates),
            changes_per_second=spread([rate * CHANGES_PER_CALL[way] for rate in rates]),
        )
        for (callers, vaults, way), rates in samples.items()
    )
    return LedgerFigures(runs=runs, complaints=tuple(complaints))


async def _measure(
    stack: Stack, way: Way, dsn: str, vault_ids: Sequence[str], *, callers: int, seconds: float
) -> Calls:
    """Run one measurement in a process of its own on the gateway's core."""
    vaults = stack.directory / "ledger.vaults"
    vaults.write_text("\n".join(vault_ids))
    argv = ["taskset", "--cpu-list", str(GATEWAY_CORE), sys.executable, "-m", "bench.ledger"]
    argv += [way, dsn, str(vaults), str(callers), str(seconds)]
    done = await trio.run_process(
        argv, cwd=ROOT, env=environment(), capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{way} with {callers} callers failed:\n{done.stderr.decode(errors='replace')}")
    return Calls(**json.loads(done.stdout))


def main() -> None:
    """Measure one way, as `_measure` asks, and print its `Calls` as JSON."""
    way, dsn, vaults, callers, seconds = sys.argv[1:]
    run = partial(WAYS[way], dsn, Path(vaults).read_text().split(), callers=int(callers), seconds=float(seconds))
    print(json.dumps(attrs.asdict(trio.run(run))))


if __name__ == "__main__":
    main()
