"""A vault with millions of past calls beside a new one: what a decision takes, where spending limits are set.

Both have a limit for the day and for the year. A hold and its capture are decided from what the actor keeps; the first
hold after a start, and a refusal, count what was spent anew. The two vaults are measured in turn.
"""

import os
import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import attrs
import trio

from bench.ledger import open_registry
from bench.machine import BenchError
from bench.plan import Plan, Progress
from bench.stack import Stack
from bench.usage_seed import VAULTS, developer_id, key_id, seed_usage, vault_id
from callora.actors.registry import VaultRegistry
from callora.ledger.commands import Charged, Delivery, Deposit, PlaceHold, capture, release
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId, Ids, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved, HoldClosed, HoldPlaced, PolicyRefused
from callora.service import SystemClock
from callora.store.bridge import Database, open_database
from callora.store.rollup import rebuild
from callora.store.spending import set_limit

Which = Literal["old", "new"]

_VAULTS: Final[dict[Which, int]] = {"old": 0, "new": VAULTS // 2}
_CALLERS: Final = 32
_PRICE: Final = Stroops(1000)
_FUNDS: Final = Stroops(10**12)
_COMMAND_SECONDS: Final = 900
_TOLD_DAYS: Final = timedelta(days=6)
_WARM_UP_SECONDS: Final = 0.5
_DELIVERY: Final = Delivery("delivered", 200, 1000, 0, 17)
_RELEASED: Final = Delivery("client_gone")
_NO_LIMIT: Final = Stroops(10**15)


@attrs.frozen
class HistoryFigure:
    """One vault."""

    which: Which
    events: int
    """Past calls of the vault."""
    calls_per_second: float
    """Held and captured by 32 callers; the median of the repetitions."""
    call_ms: float
    """A hold and its capture, the median of the last repetition."""
    first_ms: float
    """The first hold after a start, which reads the vault and what was spent."""
    refused_ms: float
    """The first answer after a start, a refusal by the limit of the year: it counts what was spent anew."""


async def run_history(stack: Stack, plan: Plan, progress: Progress) -> tuple[HistoryFigure, ...]:
    """Return the figures of both vaults.

    Raises:
        BenchError: a decision was another than it had to be.
    """
    tenant = await stack.tenant("history", vaults=1)
    now = datetime.now(UTC)
    async with open_database(tenant.dsn, command_seconds=_COMMAND_SECONDS) as database:
        await seed_usage(database, now, plan.usage_events, progress.say, large_share=1)
        await rebuild(
            database,
            SystemClock(),
            lambda made: progress.say(f"history: counted until {made.as_of:%Y-%m-%d}"),
            _TOLD_DAYS,
        )
        await database.execute("VACUUM (ANALYZE)")
        await database.execute("CHECKPOINT")  # else what filling left behind is flushed while rates are measured
        past = {which: await _past(database, which) for which in _VAULTS}
        await _limit(database, _NO_LIMIT)
        await _fund(tenant.dsn)
        firsts: dict[Which, list[float]] = {which: [] for which in _VAULTS}
        refusals: dict[Which, list[float]] = {which: [] for which in _VAULTS}
        for _ in range(plan.repetitions):
            for which in _VAULTS:
                async with open_registry(tenant.dsn) as registry:
                    firsts[which].append(await _Bench(registry).first(_vault(which)))
        await _limit(database, Stroops(1))
        for _ in range(plan.repetitions):
            for which in _VAULTS:
                async with open_registry(tenant.dsn) as registry:
                    refusals[which].append(await _Bench(registry).refused(_vault(which)))
        await _limit(database, _NO_LIMIT)
        rates: dict[Which, list[float]] = {which: [] for which in _VAULTS}
        took: dict[Which, float] = {}
        async with open_registry(tenant.dsn) as registry:
            bench = _Bench(registry)
            for repetition in range(plan.repetitions):
                for which in _VAULTS:
                    rate, took[which] = await bench.rate(_vault(which), plan.seconds)
                    rates[which].append(rate)
                    progress.say(f"history: {which} vault, repetition {repetition + 1}: {rate:.0f} calls/s")
    return tuple(
        HistoryFigure(
            which=which,
            events=past[which],
            calls_per_second=statistics.median(rates[which]),
            call_ms=took[which],
            first_ms=statistics.median(firsts[which]),
            refused_ms=statistics.median(refusals[which]),
        )
        for which in _VAULTS
    )


def _vault(which: Which) -> VaultId:
    return VaultId(vault_id(_VAULTS[which]))


async def _past(database: Database, which: Which) -> int:
    events: int = await database.fetch_value("SELECT count(*) FROM usage_events WHERE vault_id = $1", _vault(which))
    return events


async def _fund(dsn: str) -> None:
    async with open_registry(dsn) as registry:
        for which in _VAULTS:
            moved = await registry.ask(_vault(which), Deposit(_FUNDS, "history"))
            if not isinstance(moved, BalanceMoved):
                raise BenchError(f"a deposit was answered {moved}")


async def _limit(database: Database, amount: Stroops) -> None:
    for which in _VAULTS:
        setter = await database.fetch_value("SELECT user_id::text FROM vaults WHERE vault_id = $1", _vault(which))
        for period in ("day", "year"):
            await set_limit(
                database,
                _vault(which),
                None,
                period,
                amount if period == "year" else _NO_LIMIT,
                UserId(setter),
                SystemClock().now(),
            )


class _Bench:
    """Holds asked of a registry, with the time each took."""

    def __init__(self, registry: VaultRegistry) -> None:
        self._registry = registry
        self._ids = Ids(SystemClock(), os.urandom)
        self._charged = Charged(ApiKeyId(key_id(0, 0)), DeveloperId(developer_id(0)), ApiId(1001), EndpointId(10000), 1)

    async def rate(self, vault: VaultId, seconds: float) -> tuple[float, float]:
        """Return the calls a second of all callers, and the median milliseconds of one."""
        took: list[float] = []
        over = False

        async def caller() -> None:
            while not over:
                began = time.perf_counter()
                event = await self._hold(vault)
                closed = await self._registry.ask(vault, capture(event, _PRICE, _PRICE, _DELIVERY))
                if not isinstance(closed, HoldClosed):
                    raise BenchError(f"a capture was answered {closed}")
                took.append((time.perf_counter() - began) * 1000)

        async with trio.open_nursery() as nursery:
            for _ in range(_CALLERS):
                nursery.start_soon(caller)
            await trio.sleep(_WARM_UP_SECONDS)
            took.clear()
            began = time.perf_counter()
            await trio.sleep(seconds)
            counted, lasted = len(took), time.perf_counter() - began
            over = True
        return counted / lasted, statistics.median(took)

    async def first(self, vault: VaultId) -> float:
        """Return the milliseconds of a hold, which is released again."""
        began = time.perf_counter()
        event = await self._hold(vault)
        took = (time.perf_counter() - began) * 1000
        await self._registry.ask(vault, release(event, _PRICE, _RELEASED))
        return took

    async def refused(self, vault: VaultId) -> float:
        """Return the milliseconds of a refusal."""
        began = time.perf_counter()
        answer = await self._ask(vault, EventId(self._ids.uuid7()))
        took = (time.perf_counter() - began) * 1000
        if not isinstance(answer, PolicyRefused):
            raise BenchError(f"a hold above its limit was answered {answer}")
        return took

    async def _hold(self, vault: VaultId) -> EventId:
        event = EventId(self._ids.uuid7())
        answer = await self._ask(vault, event)
        if not isinstance(answer, HoldPlaced):
            raise BenchError(f"a hold was answered {answer}")
        return event

    async def _ask(self, vault: VaultId, event: EventId) -> object:
        return await self._registry.ask(vault, PlaceHold(event, _PRICE, 120, self._charged))
