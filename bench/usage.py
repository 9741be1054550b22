"""Row 13: the pages of usage over millions of calls, in database time, each with its plan.

Pages are asked through the functions that the routes ask. Every statement of a page is explained as it runs; a page's
time is that of its statements, planning included. It is then asked ten times without that, because a server that has
seen a statement some times may keep another plan: how long that takes is shown beside it.
"""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

import attrs
import trio

from bench.machine import BenchError
from bench.plan import Plan, Progress
from bench.stack import Stack
from bench.usage_seed import (
    COMMON_API,
    DAYS,
    RARE_API,
    RARE_KEY,
    UNKNOWN_API,
    VAULTS,
    developer_id,
    key_id,
    seed_usage,
    vault_id,
)
from callora.ledger.ids import LAST_ID, ApiId, ApiKeyId, DeveloperId, EventId, VaultId, least_id
from callora.service import SystemClock
from callora.store.bridge import Connection, Database, Row, open_database
from callora.store.reads import calls, settlements, spending
from callora.store.reads import usage as reads
from callora.store.rollup import advance, rebuild

PAGE: Final = 21
"""A page of twenty asks for one more."""
_ASKED: Final = 10
_COMMAND_SECONDS: Final = 900
_FRESH: Final = 60_000
_DAY: Final = timedelta(days=1)

Page = Callable[[reads.Reading], Awaitable[object]]


@attrs.frozen
class PageFigure:
    """One page."""

    name: str
    ms: float
    """Database time: planning and execution of its statements, as explained."""
    asked_ms: float
    """From asking to the last row, transaction and driver included."""
    statements: int
    buffers: int
    """Pages of the database that the statements looked at."""
    plans: tuple[str, ...]
    """EXPLAIN (ANALYZE, BUFFERS) of each statement."""


@attrs.frozen
class UsageFigures:
    """All pages, and what keeping their sums costs."""

    events: int
    events_counted_per_second: float
    """By a rebuild from nothing."""
    pass_ms: float
    """A pass that finds a minute of a thousand calls a second."""
    idle_pass_ms: float
    """The same pass again, with nothing new."""
    pages: tuple[PageFigure, ...]

    @property
    def slowest(self) -> PageFigure:
        """The slowest page."""
        return max(self.pages, key=lambda page: page.ms)


class _Explaining:
    """A database that explains what it is asked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.plans: list[str] = []
        self.ms = 0.0
        self.buffers = 0

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        explained = await self._connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {sql}", *args)
        lines = [str(row["QUERY PLAN"]) for row in explained]
        self.plans.append("\n".join(lines))
        self.ms += sum(
            float(line.split(": ")[1].split()[0]) for line in lines if line.startswith(("Planning Time", "Ex"))
        )
        top = next(line for line in lines if line.strip().startswith("Buffers: shared"))
        self.buffers += sum(int(part.partition("=")[2]) for part in top.split() if part.startswith(("hit=", "read=")))
        return await self._connection.fetch(sql, *args)

    async def execute(self, sql: str) -> str:
        return await self._connection.execute(sql)

    async def fetch_row(self, sql: str, *args: object) -> Row | None:
        rows = await self.fetch(sql, *args)
        return rows[0] if rows else None

    async def fetch_value(self, sql: str, *args: object) -> Any:
        row = await self.fetch_row(sql, *args)
        return None if row is None else next(iter(row.values()))


def _pages(now: datetime) -> dict[str, Page]:
    """Return every page by its name; "large" is the vault that made a tenth of all calls."""
    end = now.replace(second=0, microsecond=0) + timedelta(minutes=1)
    large, small = [VaultId(vault_id(0))], [VaultId(vault_id(VAULTS // 2))]
    deep = least_id(end - (DAYS - 10) * _DAY)

    def scope(days: int, vaults: Sequence[VaultId] = large, **only: Any) -> reads.Scope:
        return reads.Scope(vaults, end - days * _DAY, end, **only)

    def listed(
        days: int, status: calls.Status | None = None, before: EventId = LAST_ID, limit: int = PAGE, **only: Any
    ) -> Page:
        return lambda database: calls.events(database, scope(days, **only), status, before, limit)

    def summed(days: int, unit: reads.Unit, **only: Any) -> Page:
        return lambda database: reads.sums(database, scope(days, **only), unit)

    def spent(vault: VaultId, of_key: ApiKeyId | None) -> Page:
        # A page is only ever asked inside of `reading()`.
        return lambda database: spending.counted(cast(Connection, database), vault, of_key, now)

    rare, common, unknown = ApiId(RARE_API), ApiId(COMMON_API), ApiId(UNKNOWN_API)
    rare_key, key = ApiKeyId(key_id(0, RARE_KEY)), ApiKeyId(key_id(0, 1))
    mine = reads.DeveloperScope(DeveloperId(developer_id(0)), end - DAYS * _DAY, end)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return {
        "large: list, newest": listed(30),
        "large: list, newest, 100 a page": listed(30, limit=101),
        "large: list, deep cursor": listed(DAYS, before=deep),
        "large: list of a common API, deep cursor": listed(DAYS, before=deep, api_id=common),
        "large: list of a rare API": listed(DAYS, api_id=rare),
        "large: list of a rare API, deep cursor": listed(DAYS, before=deep, api_id=rare),
        "large: list of an API it never called": listed(DAYS, api_id=unknown),
        "large: list of a rare key": listed(DAYS, api_key_id=rare_key),
        "large: list of a rare key and a rare API": listed(DAYS, api_key_id=rare_key, api_id=rare),
        "large: list of errors": listed(DAYS, "error"),
        "large: list of errors, deep cursor, 100 a page": listed(DAYS, "error", deep, 101),
        "large: list of errors of a rare API": listed(DAYS, "error", api_id=rare),
        "large: sums of 30 days by day": summed(30, "day"),
        "large: sums of 30 days of a rare API": summed(30, "day", api_id=rare),
        "large: sums of 90 days by month": summed(90, "month"),
        "large: sums of 2 days by hour": summed(2, "hour"),
        "large: sums of 24 hours by hour": summed(1, "hour"),
        "large: 30 days by endpoint": lambda database: reads.by_endpoint(database, scope(30), PAGE),
        "large: a key by day, 365 days": lambda database: reads.key_days(database, large[0], key, today - 365 * _DAY),
        "large: a batch of the export": lambda database: calls.scan(database, large[0], scope(DAYS), None, deep, 500),
        "small: list, newest": listed(30, vaults=small),
        "small: list of errors": listed(30, "error", vaults=small),
        "small: sums of 30 days by day": summed(30, "day", vaults=small),
        "developer: 90 days by day": lambda database: reads.analytics(database, mine, "day"),
        "developer: 90 days, top endpoints": lambda database: reads.top_endpoints(database, mine, 10),
        "developer: 30 days, top users": lambda database: reads.top_callers(
            database, attrs.evolve(mine, since=end - 30 * _DAY), 10
        ),
        "developer: revenue": lambda database: settlements.revenue_of(database, "testnet", mine.developer_id),
        "large: spent by a key, four periods": spent(large[0], key),
        "large: spent by all keys, four periods": spent(large[0], None),
        "small: spent by all keys, four periods": spent(small[0], None),
        "operator: everyone, 90 days": lambda database: reads.all_days(database, today - DAYS * _DAY),
        "operator: top users, 30 days": lambda database: reads.top_users(database, today - 30 * _DAY, 20),
    }


async def measure(database: Database, events: int, tell: Callable[[str], None]) -> UsageFigures:
    """Return the figures of a migrated database without calls; it is filled first."""
    clock = SystemClock()
    now = datetime.now(UTC)
    await seed_usage(database, now, events, tell)
    began = trio.current_time()
    counted = await rebuild(database, clock, lambda made: tell(f"usage: counted until {made.as_of:%Y-%m-%d}"), 6 * _DAY)
    rate = counted / (trio.current_time() - began)
    stored = await database.fetch_value("SELECT count(*) FROM usage_events")
    if counted != stored:
        raise BenchError(f"the rollup counted {counted} of {stored} calls")
    await database.execute("VACUUM (ANALYZE)")
    tell(f"usage: {counted} calls counted, {rate:.0f}/s")
    pages = [await _page(database, name, page) for name, page in _pages(now).items()]
    pass_ms, idle_ms = await _passes(database, clock)
    return UsageFigures(counted, rate, pass_ms, idle_ms, tuple(pages))


async def _page(database: Database, name: str, page: Page) -> PageFigure:
    async with reads.reading(database) as connection:
        await page(connection)
        explaining = _Explaining(connection)
        await page(cast(Connection, explaining))
    took: list[float] = []
    for _ in range(_ASKED):
        began = trio.current_time()
        async with reads.reading(database) as connection:
            await page(connection)
        took.append((trio.current_time() - began) * 1000)
    return PageFigure(
        name=name,
        ms=explaining.ms,
        asked_ms=statistics.median(took[_ASKED // 2 :]),
        statements=len(explaining.plans),
        buffers=explaining.buffers,
        plans=tuple(explaining.plans),
    )


_MINUTE_OF_CALLS: Final = f"""
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, closed_at, latency_us, status, outcome)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n % {VAULTS}), 12, '0'))::uuid,
       (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7000' || '9000'
        || lpad(to_hex(n), 12, '0'))::uuid,
       ('00000000-0000-7000-9000-' || lpad(to_hex(n % {VAULTS} * 16), 12, '0'))::uuid,
       '00000000-0000-7000-b000-000000000000', 1001, 10000 + n % 5, 1000, at, at + interval '2 minutes', 1, 'captured',
       1000, at, 50000, 200, 'delivered'
FROM (SELECT n, now() - n * interval '1 millisecond' AS at FROM generate_series({_FRESH}, 1, -1) n) AS made
"""


async def _passes(database: Database, clock: SystemClock) -> tuple[float, float]:
    """Return the milliseconds of a pass over a minute of calls, and of the next without any."""
    await database.execute(_MINUTE_OF_CALLS)
    took: list[float] = []
    for _ in range(2):
        began = trio.current_time()
        if await advance(database, clock.now(), span=_DAY, wait=True) is None:
            raise BenchError("a pass was not made")
        took.append((trio.current_time() - began) * 1000)
    return took[0], took[1]


async def run_usage(stack: Stack, plan: Plan, progress: Progress) -> UsageFigures:
    """Return the figures.

    Raises:
        BenchError: the sums are not those of the calls.
    """
    tenant = await stack.tenant("usage", vaults=1)
    async with open_database(tenant.dsn, command_seconds=_COMMAND_SECONDS) as database:
        return await measure(database, plan.usage_events, progress.say)
