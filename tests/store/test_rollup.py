"""The rollup: sums are those of the events, whatever came in between, however often and by whomever it is passed."""

import re
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from random import Random

import attrs
import pytest
import trio

from callora.ledger.commands import Charged, Delivery, PlaceHold, Refund, capture, expire, release
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved
from callora.ledger.rounds import CLEAN
from callora.store import rollup, usage
from callora.store.bridge import Database
from callora.store.migrate import migrate_down, migrate_up
from callora.store.rollup import EPOCH, Pass, advance, rebuild
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED

MINUTE = timedelta(minutes=1)
MEASURES = (
    "calls",
    "charged_calls",
    "failed_calls",
    "timed_calls",
    "amount",
    "refunded",
    "latency_us",
    "request_bytes",
    "response_bytes",
)
TABLES = {
    "usage_minutes": ("vault_id", "minute", "api_key_id", "endpoint_id", "api_id", "developer_id"),
    "key_hours": ("vault_id", "hour", "api_key_id"),
    "usage_days": ("vault_id", "day", "api_key_id", "endpoint_id", "api_id"),
    "developer_days": ("developer_id", "day", "endpoint_id", "api_id"),
    "developer_callers": ("developer_id", "day", "api_id", "vault_id"),
    "vault_days": ("day", "vault_id"),
    "all_days": ("day",),
}
Sums = dict[tuple[object, ...], tuple[int, ...]]


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def measures_of(database: Database, table: str) -> tuple[str, ...]:
    rows = await database.fetch("SELECT column_name FROM information_schema.columns WHERE table_name = $1", table)
    return tuple(each for each in MEASURES if each in {row["column_name"] for row in rows})


async def stored(database: Database) -> dict[str, Sums]:
    """Return every table of sums."""
    found: dict[str, Sums] = {}
    for table, key in TABLES.items():
        measures = await measures_of(database, table)
        found[table] = {
            tuple(row[each] for each in key): tuple(row[each] for each in measures)
            for row in await database.fetch(f"SELECT * FROM {table}")
        }
    return found


async def expected(database: Database) -> dict[str, Sums]:
    """Add everything up anew, in the plainest way."""
    facts: list[dict[str, object]] = []
    events = {row["event_id"]: row for row in await database.fetch("SELECT * FROM usage_events")}
    for event in events.values():
        if event["state"] == "held":
            continue
        answered = event["state"] == "captured" or event["outcome"] == "upstream_status"
        failed = not answered or (event["status"] is not None and event["status"] >= 400)
        facts.append(
            {
                **{key: event[key] for key in ("vault_id", "api_key_id", "endpoint_id", "api_id", "developer_id")},
                "minute": event["created_at"].replace(second=0, microsecond=0),
                "calls": 1,
                "charged_calls": int((event["amount"] or 0) > 0),
                "failed_calls": int(failed),
                "timed_calls": int(event["latency_us"] is not None),
                **{key: event[key] or 0 for key in ("amount", "latency_us", "request_bytes", "response_bytes")},
                "refunded": 0,
            }
        )
    for entry in await database.fetch("SELECT * FROM ledger_entries WHERE kind = 'refund'"):
        event = events[entry["event_id"]]
        facts.append(
            {
                **{key: event[key] for key in ("vault_id", "api_key_id", "endpoint_id", "api_id", "developer_id")},
                "minute": entry["created_at"].replace(second=0, microsecond=0),
                **dict.fromkeys(MEASURES, 0),
                "refunded": entry["amount"],
            }
        )
    made: dict[str, Sums] = {}
    for table, key in TABLES.items():
        measures = await measures_of(database, table)
        sums: dict[tuple[object, ...], list[int]] = defaultdict(lambda: [0] * len(measures))  # noqa: B023
        for fact in facts:
            minute = fact["minute"]
            assert isinstance(minute, datetime)
            fact["hour"], fact["day"] = minute.replace(minute=0), minute.replace(hour=0, minute=0)
            total = sums[tuple(fact[each] for each in key)]
            for place, measure in enumerate(measures):
                value = fact[measure]
                assert isinstance(value, int)
                total[place] += value
        made[table] = {at: tuple(total) for at, total in sums.items() if table != "key_hours" or total != [0]}
    return made


async def must_agree(database: Database) -> None:
    assert await stored(database) == await expected(database)


async def passed(ledger: RealLedger) -> Pass:
    made = await advance(ledger.database, ledger.clock.now())
    assert made is not None
    return made


async def placed(ledger: RealLedger, vault_id: VaultId, ttl_seconds: int = 60) -> EventId:
    event_id = ledger.event()
    hold = PlaceHold(event_id, Stroops(10), ttl_seconds, CHARGED)
    assert await ledger.store.commit_round([await ledger.share(vault_id, hold)]) == CLEAN
    return event_id


async def taken(ledger: RealLedger, vault_id: VaultId, event_id: EventId, amount: int = 10) -> None:
    close = capture(event_id, Stroops(10), Stroops(amount), DELIVERED)
    assert await ledger.store.commit_round([await ledger.share(vault_id, close)]) == CLEAN


@attrs.define
class World:
    """Vaults, and calls at random."""

    ledger: RealLedger
    random: Random
    vaults: list[VaultId]
    open: list[tuple[VaultId, EventId]] = attrs.field(factory=list)
    captured: list[tuple[VaultId, EventId]] = attrs.field(factory=list)

    async def place(self) -> None:
        vault_id, event_id = self.random.choice(self.vaults), self.ledger.event()
        number = self.random.randrange(3)
        charged = Charged(
            ApiKeyId(f"00000000-0000-7000-8000-0000000000a{self.random.randrange(2)}"),
            DeveloperId(f"00000000-0000-7000-8000-0000000000d{number // 2}"),
            ApiId(number // 2 + 1),
            EndpointId(number + 1),
            1,
        )
        ttl = self.random.choice((10, 120, 86_400))
        hold = PlaceHold(event_id, Stroops(self.random.choice((0, 5, 10))), ttl, charged)
        assert await self.ledger.store.commit_round([await self.ledger.share(vault_id, hold)]) == CLEAN
        self.open.append((vault_id, event_id))

    async def close(self) -> None:
        if not self.open:
            return
        vault_id, event_id = self.open.pop(self.random.randrange(len(self.open)))
        row = await self.ledger.event_row(event_id)
        assert row is not None
        held = Stroops(row["held_amount"])
        kind = self.random.randrange(4)
        if row["expires_at"] <= self.ledger.clock.now():
            close = expire(event_id, held)
        elif kind == 0:
            close = release(event_id, held, Delivery("client_gone"))
        elif kind == 1:
            close = release(event_id, held, Delivery("upstream_status", self.random.choice((304, 404, 500)), 7, 1))
        else:
            close = capture(event_id, held, held, Delivery("delivered", self.random.choice((200, 404)), 9, 2, 3))
            if held:
                self.captured.append((vault_id, event_id))
        assert await self.ledger.store.commit_round([await self.ledger.share(vault_id, close)]) == CLEAN

    async def refund(self) -> None:
        if self.captured:
            vault_id, event_id = self.random.choice(self.captured)
            await self.ledger.locked(vault_id, Refund(event_id, Stroops(1), f"refund-{self.random.random()}"))

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        self.ledger.clock.advance(self.random.choice((0.01, 1, 20, 59, 61, 600, 5000)))

    async def crash(self) -> None:
        """Cut a pass off somewhere."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cut() -> None:
                    for _ in range(self.random.randrange(40)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cut)
                await self.pass_lightly()

    async def pass_lightly(self) -> None:
        """Make a pass that may leave out what is not final."""
        await advance(self.ledger.database, self.ledger.clock.now(), light=self.random.random() < 0.7)

    async def pass_at_once(self) -> None:
        """Several processes pass while a call is closed."""
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.pass_lightly)
            nursery.start_soon(self.close)

    async def pass_alone(self) -> None:
        made = await passed(self.ledger)
        while made.behind:
            made = await passed(self.ledger)
        await must_agree(self.ledger.database)
        assert made.done_until <= self.ledger.clock.now() - MINUTE


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_the_sums_after_a_pass_are_those_of_the_events(ledger: RealLedger, seed: int) -> None:
    random = Random(seed)
    world = World(ledger, random, [await ledger.vault(10_000) for _ in range(3)])
    steps = (
        *(world.place,) * 8,
        *(world.close,) * 7,
        world.refund,
        *(world.wait,) * 4,
        world.crash,
        world.pass_at_once,
        *(world.pass_lightly,) * 2,
        *(world.pass_alone,) * 2,
    )
    for _ in range(150):
        await random.choice(steps)()
    await world.pass_alone()
    assert await ledger.count("usage_open") <= len(world.open)
    before = await stored(ledger.database)
    assert await rebuild(ledger.database, ledger.clock, lambda _: None) == await ledger.count(
        "usage_events", "state <> 'held'"
    )
    assert await stored(ledger.database) == before
    while world.open:
        await world.close()
    await world.pass_alone()
    assert await ledger.count("usage_open") == 0
    assert await ledger.findings() == []


async def test_a_light_pass_counts_the_latest_minutes_and_what_becomes_final(ledger: RealLedger) -> None:
    ledger.clock.advance(-ledger.clock.now().second % 60 + 1 - ledger.clock.now().microsecond / 1_000_000)
    vault_id = await ledger.vault(100)
    late = await placed(ledger, vault_id)
    await passed(ledger)

    async def counted() -> tuple[int, timedelta]:
        """Return the calls in the sums, and how far the sums say they are behind."""
        made = await advance(ledger.database, ledger.clock.now(), light=True)
        assert made is not None
        calls = await ledger.database.fetch_value("SELECT coalesce(sum(calls), 0)::bigint FROM all_days")
        return calls, ledger.clock.now() - made.as_of

    now = timedelta()
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert await counted() == (1, now)
    ledger.clock.advance(65)  # five seconds into the next minute
    await taken(ledger, vault_id, late)
    assert await counted() == (1, timedelta(seconds=65)), "a minute becomes final, and nothing else is looked at"
    assert await counted() == (2, now), "a minute that has just ended is looked at too"
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    later = await placed(ledger, vault_id)
    ledger.clock.advance(50)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert await counted() == (4, now)
    ledger.clock.advance(5)  # one second into the third minute
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert await counted() == (4, timedelta(seconds=5)), "the first minute is final"
    assert await counted() == (5, now)
    ledger.clock.advance(15)
    await taken(ledger, vault_id, later)
    assert await counted() == (5, now), "it took long, and its minute is not final"
    ledger.clock.advance(60)
    assert (await counted())[0] == 6
    await must_agree(ledger.database)


async def test_a_hold_of_a_day_stops_no_minute_and_is_counted_when_it_closes(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    late = await placed(ledger, vault_id, ttl_seconds=86_400)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    await passed(ledger)
    ledger.clock.advance(23 * 3600)
    made = await passed(ledger)
    while made.behind:
        made = await passed(ledger)
    assert ledger.clock.now() - made.done_until <= 2 * MINUTE
    assert await ledger.count("usage_open") == 1
    assert await ledger.database.fetch_value("SELECT sum(calls) FROM usage_minutes") == 1
    await taken(ledger, vault_id, late)
    assert (await passed(ledger)).calls == 1
    await must_agree(ledger.database)
    assert await ledger.count("usage_open") == 0
    row = await ledger.database.fetch_row("SELECT minute, calls FROM usage_minutes")
    assert row is not None
    assert (row["minute"], row["calls"]) == (NOON, 2)  # of its own minute, not of the one it closed in


async def test_a_pass_repeated_writes_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    await passed(ledger)
    versions = "SELECT array_agg(xmin::text || ctid::text) FROM usage_minutes"
    before = await ledger.database.fetch_value(versions)
    assert (await passed(ledger)).calls == 0
    assert await ledger.database.fetch_value(versions) == before


async def test_a_pass_that_rests_sees_one_moment_and_counts_the_same(
    ledger: RealLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = re.sub(r"random\(\) \* [0-9]+ < 1", "random() * 2 < 1", rollup._PASS)
    assert often != rollup._PASS
    monkeypatch.setattr(rollup, "_PASS", often)
    vault_id = await ledger.vault(1_000_000)
    for _ in range(20):
        await taken(ledger, vault_id, await placed(ledger, vault_id))
    made: list[Pass | None] = []

    async def rest() -> None:
        made.append(await advance(ledger.database, ledger.clock.now(), rest_seconds=0.02))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rest)
        while not made:
            await taken(ledger, vault_id, await placed(ledger, vault_id))
    assert made[0] is not None
    assert 20 <= made[0].calls < await ledger.count("usage_events"), "it rested while others were placed"
    await passed(ledger)
    await must_agree(ledger.database)


async def test_what_a_pass_reads_it_adds_up_as_it_goes(ledger: RealLedger) -> None:
    """All calls of a minute sorted at one go keep the database from calls; the planner takes them for few."""
    async with ledger.database.transaction() as connection:
        await connection.execute(rollup.BY_INDEX)
        await connection.execute(rollup._HASHED)
        rows = await connection.fetch(f"EXPLAIN {rollup._PASS}", NOON, NOON + MINUTE, NOON, NOON, 0.0)
    plan = [row["QUERY PLAN"] for row in rows]
    assert sum("HashAggregate" in line for line in plan) >= 7
    sorted_by = [line.strip() for line in plan if "Sort Key" in line]
    assert len(sorted_by) == 1
    assert sorted_by[0].startswith("Sort Key: changes"), "only what is written at the end"


async def test_a_commit_that_takes_minutes_is_not_left_behind(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = ledger.event()
    async with ledger.database.transaction() as slow:
        await slow.execute(
            "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
            " created_at, expires_at, price_version, state, amount, closed_at) VALUES ($1, $2, $1, $1, 1, 1, 0, $3,"
            " $3::timestamptz + interval '1 minute', 1, 'captured', 0, $3)",
            vault_id,
            event_id,
            ledger.clock.now(),
        )
        ledger.clock.advance(600)
        made = await advance(ledger.database, ledger.clock.now(), slow_seconds=0)
        assert made is not None
        assert made.calls == 0
        assert made.as_of == ledger.clock.now()
        stopped_at = made.done_until
        ledger.clock.advance(600)
        made = await advance(ledger.database, ledger.clock.now(), slow_seconds=0)
        assert made is not None
        assert made.done_until == stopped_at
    made = await passed(ledger)
    assert made.done_until > stopped_at
    await must_agree(ledger.database)


async def test_while_another_process_passes_one_returns_at_once(ledger: RealLedger) -> None:
    async with ledger.database.transaction() as other:
        await other.fetch("SELECT * FROM usage_rollup FOR UPDATE")
        with trio.fail_after(60):
            assert await advance(ledger.database, ledger.clock.now()) is None
    assert await advance(ledger.database, ledger.clock.now()) is not None


async def test_a_rollup_that_begins_late_catches_up_by_steps(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    for _ in range(5):
        await taken(ledger, vault_id, await placed(ledger, vault_id))
        ledger.clock.advance(3600)
    made, passes = await passed(ledger), 1
    assert made.behind
    assert made.as_of == made.done_until
    while made.behind:
        made, passes = await passed(ledger), passes + 1
    assert passes >= 4
    await must_agree(ledger.database)


async def test_a_refund_counts_when_it_is_made_and_changes_no_earlier_minute(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id)
    await taken(ledger, vault_id, event_id)
    ledger.clock.advance(600)
    await passed(ledger)
    assert isinstance(await ledger.locked(vault_id, Refund(event_id, Stroops(4), "why")), BalanceMoved)
    assert (await passed(ledger)).calls == 0
    rows = await ledger.database.fetch("SELECT minute, calls, amount, refunded FROM usage_minutes ORDER BY minute")
    assert [(row["minute"], row["calls"], row["amount"], row["refunded"]) for row in rows] == [
        (NOON, 1, 10, 0),
        (NOON + 10 * MINUTE, 0, 0, 4),
    ]
    await must_agree(ledger.database)


async def test_hours_that_were_counted_before_there_was_a_table_of_them_are_in_it(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    for amount in (10, 10, 0, 10):
        await taken(ledger, vault_id, await placed(ledger, vault_id), amount)
        ledger.clock.advance(1500)
    while (await passed(ledger)).behind:
        pass
    await migrate_down(ledger.database, target=14)
    await migrate_up(ledger.database)
    assert await ledger.database.fetch_value("SELECT sum(amount) FROM key_hours") == 30
    await must_agree(ledger.database)


async def test_without_any_event_the_rollup_is_up_to_date(ledger: RealLedger) -> None:
    made = await passed(ledger)
    assert not made.behind
    assert EPOCH < made.done_until <= ledger.clock.now() - MINUTE
    assert await usage.open_holds(ledger.database, EPOCH, ledger.clock.now(), 1) == []
