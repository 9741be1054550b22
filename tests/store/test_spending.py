"""What was spent in a period, against the plainest count there is; and limits that no hold gets past."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Final

import attrs
import pytest
import trio

from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.commands import CloseHold, Command, ExtendHold, PlaceHold, Refund, capture, expire, release
from callora.ledger.ids import ApiKeyId, EventId, UserId, VaultId, least_id
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    HoldClosed,
    HoldExtended,
    HoldPlaced,
    InsufficientFunds,
    PolicyRefused,
)
from callora.ledger.rounds import CLEAN
from callora.ledger.spending import LENGTHS, PERIODS, Period
from callora.ledger.vault import VaultState
from callora.store import usage
from callora.store.bridge import Connection, Database, open_database
from callora.store.reads.spending import account, spending_limits
from callora.store.rollup import advance, rebuild
from callora.store.rounds import LINE_SETTINGS
from callora.store.spending import remove_limit, set_limit
from callora.store.vaults import LIMITS_FRESH, VaultStore
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED, METRICS, QUIET

MINUTE: Final = timedelta(minutes=1)
KEY: Final = CHARGED.api_key_id
OTHER_KEY: Final = ApiKeyId("00000000-0000-7000-8000-00000000001a")
ID_AGES: Final = (0.0, 0.0, 0.0, 5.0, -5.0, 15.0, -15.0, 3_600.0, 5_000_000.0)
"""Seconds: an id may be made long before its event, and by a clock that is ahead."""


@attrs.define
class Spenders:
    """A ledger with a vault of two keys, and everything that was ever spent from it."""

    ledger: RealLedger
    vault_id: VaultId
    owner: UserId
    placed: dict[EventId, tuple[ApiKeyId, datetime]] = attrs.field(factory=dict)

    def now(self) -> datetime:
        """Return the present instant."""
        return self.ledger.clock.now()

    async def place(
        self, amount: int, key: ApiKeyId = KEY, ttl_seconds: int = 86_400, id_age_seconds: float = 0.0
    ) -> EventId:
        """Place a hold, as a round of an unlimited vault does.

        Args:
            id_age_seconds: how long ago its id was made.
        """
        made = least_id(self.now() - timedelta(seconds=id_age_seconds))
        event_id = EventId(made[:14] + self.ledger.event()[14:])
        hold = PlaceHold(event_id, Stroops(amount), ttl_seconds, attrs.evolve(CHARGED, api_key_id=key))
        await self._store(hold)
        self.placed[event_id] = key, self.now()
        return event_id

    async def close(self, close: CloseHold) -> None:
        """End a hold."""
        await self._store(close)

    async def _store(self, command: PlaceHold | CloseHold) -> None:
        share = await self.ledger.share(self.vault_id, command, guarded=True)
        assert await self.ledger.store.commit_round([share]) == CLEAN

    async def spent(self, key: ApiKeyId | None) -> dict[Period, int]:
        """Return what was spent in each period, as limits count it."""
        accounts = await account(self.ledger.database, self.vault_id, key, self.now())
        assert [each.period for each in accounts] == list(PERIODS)
        return {each.period: each.spent for each in accounts}

    async def counted(self, key: ApiKeyId | None, period: Period, leeway: timedelta = timedelta()) -> int:
        """Return the same by looking at every event there is.

        Args:
            leeway: how much longer than the period calls count.
        """
        start = self.now() - LENGTHS[period] - leeway
        total = 0
        refunds: dict[str, int] = {}
        for row in await self.ledger.database.fetch(
            "SELECT event_id, amount FROM ledger_entries WHERE kind = 'refund'"
        ):
            refunds[str(row["event_id"])] = refunds.get(str(row["event_id"]), 0) + row["amount"]
        for row in await self.ledger.database.fetch("SELECT * FROM usage_events WHERE vault_id = $1", self.vault_id):
            if row["created_at"] > start and key in (None, str(row["api_key_id"])):
                amount = row["held_amount"] if row["state"] == "held" else row["amount"] or 0
                total += amount - refunds.get(str(row["event_id"]), 0)
        return total

    async def limit(self, period: Period, amount: int, key: ApiKeyId | None = KEY) -> None:
        """Set a limit."""
        await set_limit(self.ledger.database, self.vault_id, key, period, Stroops(amount), self.owner, self.now())


async def spenders(ledger: RealLedger, balance: int = 10**12, keys: Sequence[ApiKeyId] = (KEY, OTHER_KEY)) -> Spenders:
    vault_id = await ledger.vault(balance)
    owner = UserId(str(await ledger.database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", vault_id)))
    for key in keys:
        await ledger.database.execute(
            "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4)"
            " VALUES ($1, $2, $3, 'ck_test_' || $4::text, sha256($4::text::bytea), 'abcd')",
            key,
            owner,
            vault_id,
            key[-8:],
        )
    return Spenders(ledger, vault_id, owner)


@pytest.fixture
async def at(database: Database) -> AsyncIterator[Spenders]:
    """A vault of two keys."""
    async with real_ledger(database, TestClock()) as opened:
        yield await spenders(opened)


# --- what was spent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_what_was_spent_is_what_the_events_say_whatever_the_rollup_has_counted(at: Spenders, seed: int) -> None:
    random, ledger = Random(seed), at.ledger
    steps = (0.5, 20.0, 59.0, 600.0, 7_200.0, 40_000.0, 200_000.0, 2_000_000.0)
    open_holds: list[EventId] = []
    captured: list[tuple[EventId, int]] = []
    for _ in range(60):
        ledger.clock.advance(random.choice(steps))
        await usage.ensure_partitions(ledger.database, at.now())
        event_id = await at.place(
            random.randint(0, 100), random.choice((KEY, OTHER_KEY)), id_age_seconds=random.choice(ID_AGES)
        )
        open_holds.append(event_id)
        if random.random() < 0.7:
            ledger.clock.advance(random.choice((0.1, 30.0, 300.0)))
            chosen = open_holds.pop(random.randrange(len(open_holds)))
            row = await ledger.event_row(chosen)
            assert row is not None
            held = Stroops(row["held_amount"])
            if row["expires_at"] <= at.now():
                await at.close(expire(chosen, held))
            elif random.random() < 0.8:
                amount = random.randint(0, held)
                await at.close(capture(chosen, held, Stroops(amount), DELIVERED))
                captured.append((chosen, amount))
            else:
                await at.close(release(chosen, held, DELIVERED))
        if captured and random.random() < 0.2:
            chosen, amount = captured.pop(random.randrange(len(captured)))
            if amount:
                refund = Refund(chosen, Stroops(random.randint(1, amount)), str(chosen))
                assert isinstance(await ledger.locked(at.vault_id, refund), BalanceMoved)
        if random.random() < 0.4:
            await advance(ledger.database, at.now(), span=timedelta(days=random.choice((1, 400))))
        if random.random() < 0.05:
            await rebuild(ledger.database, ledger.clock, lambda _: None, timedelta(days=60))
        for key in (KEY, OTHER_KEY, None):
            spent = await at.spent(key)
            assert spent["day"] == await at.counted(key, "day"), "to the microsecond"
            for period in PERIODS[1:]:
                least, most = await at.counted(key, period), await at.counted(key, period, MINUTE)
                assert min(least, most) <= spent[period] <= max(least, most), period


@pytest.mark.parametrize("seed", range(3))
async def test_wherever_a_period_begins_and_the_sums_end_minutes_hours_and_days_meet(at: Spenders, seed: int) -> None:
    random, ledger = Random(seed), at.ledger
    for _ in range(40):
        edge = ledger.clock.at.replace(minute=0, second=0, microsecond=0) + timedelta(hours=random.choice((1, 1, 1, 4)))
        at_random = timedelta(minutes=random.randrange(60), microseconds=random.randrange(60_000_000))
        ledger.clock.at = edge + random.choice((timedelta(microseconds=-1), timedelta(), MINUTE, at_random))
        amount = Stroops(random.randint(1, 100))
        event_id = await at.place(amount, random.choice((KEY, OTHER_KEY)), id_age_seconds=random.choice(ID_AGES))
        await at.close(capture(event_id, amount, amount, DELIVERED))
    last = at.now()
    behind = True
    while behind:
        ledger.clock.at = last + timedelta(minutes=5)
        made = await advance(ledger.database, at.now(), span=MINUTE * random.choice((1, 40, 60, 700, 1440, 2000)))
        assert made is not None
        behind = made.behind
        for period in (*PERIODS, *PERIODS):
            # A start somewhere among the calls, often close to where the sums end, or where an hour or a day begins.
            soon = made.done_until - random.random() * timedelta(hours=2)
            start = random.choice((NOON + random.random() * (last - NOON), soon, soon))
            edge = start.replace(hour=random.choice((0, start.hour)), minute=0, second=0, microsecond=0)
            ledger.clock.at = random.choice((start, edge, edge - timedelta(microseconds=1))) + LENGTHS[period]
            for key in (KEY, None):
                spent = (await at.spent(key))[period]
                least = await at.counted(key, period)
                assert least <= spent <= await at.counted(key, period, timedelta() if period == "day" else MINUTE)


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("passed", [False, True])
async def test_what_is_exactly_as_old_as_a_period_does_not_count_any_more(
    at: Spenders, period: Period, passed: bool
) -> None:
    ledger = at.ledger
    ledger.clock.at = NOON.replace(minute=7, second=31, microsecond=17)
    await at.place(5)
    event_id = await at.place(10)
    await at.close(capture(event_id, Stroops(10), Stroops(10), DELIVERED))
    beginning = at.now()

    async def spent() -> int:
        if passed:
            await advance(ledger.database, at.now(), span=timedelta(days=1000))
        return (await at.spent(KEY))[period]

    ledger.clock.at = beginning + LENGTHS[period] - timedelta(microseconds=1)
    assert await spent() == 15
    # Counted call by call for a day and where no minute is final yet, else by the minute.
    exact = period == "day" or not passed
    ledger.clock.at = beginning + LENGTHS[period] + (timedelta() if exact else MINUTE)
    assert await spent() == 0


async def test_a_call_placed_just_as_a_minute_begins_counts_no_longer_than_a_day(at: Spenders) -> None:
    event_id = await at.place(10)
    await at.close(capture(event_id, Stroops(10), Stroops(10), DELIVERED))
    for early, spent in ((timedelta(microseconds=1), 10), (timedelta(), 0)):
        at.ledger.clock.at = NOON + LENGTHS["day"] - early
        await advance(at.ledger.database, at.now(), span=timedelta(days=1000))
        assert (await at.spent(KEY))["day"] == spent


async def test_a_rebuild_of_the_sums_counts_nothing_too_low_meanwhile(at: Spenders) -> None:
    for _ in range(5):
        at.ledger.clock.advance(3 * 86_400)
        event_id = await at.place(10)
        await at.close(capture(event_id, Stroops(10), Stroops(10), DELIVERED))
    at.ledger.clock.advance(300)
    await advance(at.ledger.database, at.now(), span=timedelta(days=1000))
    seen: list[int] = []

    async def look() -> None:
        seen.append((await at.spent(KEY))["year"])

    before = (await at.spent(KEY))["year"]
    await rebuild(at.ledger.database, at.ledger.clock, lambda _: seen.append(-1), timedelta(days=4))
    await look()
    assert (before, seen[-1], len(seen) > 2) == (50, 50, True)


# --- what may be held -------------------------------------------------------------------------------------------------


@attrs.frozen
class Process:
    """A registry on the ledger, as each process of a service has one."""

    registry: VaultRegistry
    vault_id: VaultId

    async def ask(self, command: Command) -> object:
        """Return what a command comes to."""
        return await self.registry.ask(self.vault_id, command)


async def run_process(at: Spenders, database: Database, task_status: trio.TaskStatus[Process]) -> None:
    async with database.line(LINE_SETTINGS) as line:
        store = VaultStore(database, line, at.ledger.clock, at.ledger.ids.uuid7, 10)
        writer = Writer(store, METRICS, QUIET, 1000)
        registry = VaultRegistry(store, writer, METRICS, QUIET, Random(0), 1000)
        async with trio.open_nursery() as nursery:
            await nursery.start(writer.run)
            await nursery.start(registry.run)
            task_status.started(Process(registry, at.vault_id))


def hold(at: Spenders, amount: int, key: ApiKeyId = KEY, ttl_seconds: int = 60) -> PlaceHold:
    return PlaceHold(at.ledger.event(), Stroops(amount), ttl_seconds, attrs.evolve(CHARGED, api_key_id=key))


def refused(outcome: object) -> tuple[object, ...]:
    assert isinstance(outcome, PolicyRefused), outcome
    assert outcome.code == "SPENDING_LIMIT_EXCEEDED"
    return outcome.details["limitedBy"], outcome.details["window"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("whose", ["key", "vault"])
async def test_twenty_at_once_on_a_limit_of_ten_place_exactly_ten(
    at: Spenders, database_url: str, processes: int, whose: str
) -> None:
    await at.limit("day", 10_000, KEY if whose == "key" else None)
    outcomes: list[object] = []
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        running = [await nursery.start(run_process, at, each) for each in (at.ledger.database, other)[:processes]]
        async with trio.open_nursery() as callers:

            async def one(process: Process) -> None:
                outcomes.append(await process.ask(hold(at, 1000)))

            for number in range(20):
                callers.start_soon(one, running[number % processes])
        nursery.cancel_scope.cancel()
    assert sum(isinstance(each, HoldPlaced) for each in outcomes) == 10
    assert {refused(each) for each in outcomes if not isinstance(each, HoldPlaced)} == {(whose, "day")}
    assert (await at.spent(KEY))["day"] == 10_000
    assert await at.ledger.findings() == []


async def test_b14_a_limit_set_beside_an_actor_that_knows_of_none_holds_at_once(at: Spenders) -> None:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run_process, at, at.ledger.database)
        for _ in range(3):
            assert isinstance(await process.ask(hold(at, 100)), HoldPlaced)
        await at.limit("week", 350)
        assert refused(await process.ask(hold(at, 100))) == ("key", "week"), "what was spent before counts"
        assert isinstance(await process.ask(hold(at, 50)), HoldPlaced), "reaching the limit is allowed"
        assert refused(await process.ask(hold(at, 1))) == ("key", "week")
        assert isinstance(await process.ask(hold(at, 0)), HoldPlaced), "what costs nothing is not spent"
        assert isinstance(await process.ask(hold(at, 500, OTHER_KEY)), HoldPlaced), "another key's own"
        await at.limit("week", 400)
        assert isinstance(await process.ask(hold(at, 50)), HoldPlaced)
        await remove_limit(at.ledger.database, at.vault_id, KEY, "week")
        assert isinstance(await process.ask(hold(at, 10_000)), HoldPlaced)
        nursery.cancel_scope.cancel()


async def test_what_comes_back_of_a_hold_may_be_spent_again_at_once(at: Spenders) -> None:
    await at.limit("day", 100)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run_process, at, at.ledger.database)
        for close in (release, partial(capture, amount=Stroops(0))):
            placed = hold(at, 100)
            assert isinstance(await process.ask(placed), HoldPlaced)
            refused(await process.ask(hold(at, 1)))
            assert isinstance(await process.ask(close(placed.event_id, placed.amount, delivery=DELIVERED)), HoldClosed)
        placed = hold(at, 100)
        assert isinstance(await process.ask(placed), HoldPlaced)
        part = capture(placed.event_id, placed.amount, Stroops(60), DELIVERED)
        assert isinstance(await process.ask(part), HoldClosed)
        refused(await process.ask(hold(at, 41)))
        assert isinstance(await process.ask(hold(at, 40)), HoldPlaced)
        nursery.cancel_scope.cancel()
    assert (await at.spent(KEY))["day"] == 100


async def test_a_hold_placed_by_another_process_and_a_refund_are_seen(at: Spenders, database_url: str) -> None:
    await at.limit("day", 100)
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        one = await nursery.start(run_process, at, at.ledger.database)
        two = await nursery.start(run_process, at, other)
        first = hold(at, 60)
        assert isinstance(await one.ask(first), HoldPlaced)
        refused(await two.ask(hold(at, 41)))
        second = hold(at, 40)
        assert isinstance(await two.ask(second), HoldPlaced)
        assert isinstance(await two.ask(release(first.event_id, first.amount, DELIVERED)), HoldClosed)
        third = hold(at, 60)
        assert isinstance(await one.ask(third), HoldPlaced)
        assert isinstance(await one.ask(capture(third.event_id, third.amount, third.amount, DELIVERED)), HoldClosed)
        refused(await two.ask(hold(at, 1)))
        assert isinstance(await one.ask(Refund(third.event_id, Stroops(25), "r")), BalanceMoved)
        assert isinstance(await two.ask(hold(at, 25)), HoldPlaced)
        refused(await one.ask(hold(at, 1)))
        nursery.cancel_scope.cancel()


async def test_what_other_processes_hold_and_close_is_not_counted_anew(
    at: Spenders, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[VaultId] = []

    async def counting(connection: Connection, vaults: Sequence[VaultState], now: datetime) -> object:
        counts.extend(vault.vault_id for vault in vaults)
        return await spending_limits(connection, vaults, now)

    monkeypatch.setattr("callora.store.vaults.spending_limits", counting)
    await at.limit("day", 1000)
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        processes = [await nursery.start(run_process, at, each) for each in (at.ledger.database, other)]
        for _ in range(20):
            for process in processes:
                placed = hold(at, 20)
                assert isinstance(await process.ask(placed), HoldPlaced)
                assert isinstance(await process.ask(release(placed.event_id, placed.amount, DELIVERED)), HoldClosed)
        # Once by each of them at first, and where too much seems to be spent, as what came back of holds is not known.
        assert len(counts) <= 6
        before = len(counts)
        await at.limit("day", 1001)
        assert isinstance(await processes[0].ask(hold(at, 1001)), HoldPlaced)
        assert len(counts) == before + 1, "another limit is read"
        refused(await processes[1].ask(hold(at, 1)))
        nursery.cancel_scope.cancel()


async def test_what_another_process_grows_a_hold_by_is_spent(at: Spenders, database_url: str) -> None:
    await at.limit("day", 100)
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        one = await nursery.start(run_process, at, at.ledger.database)
        two = await nursery.start(run_process, at, other)
        assert isinstance(await one.ask(hold(at, 10)), HoldPlaced)
        grown = hold(at, 20)
        assert isinstance(await two.ask(grown), HoldPlaced)
        assert isinstance(await two.ask(ExtendHold(grown.event_id, 0, Stroops(40), "more")), HoldExtended)
        refused(await one.ask(hold(at, 31)))
        assert isinstance(await one.ask(hold(at, 30)), HoldPlaced)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(4, 60))])
async def test_processes_decide_as_one_that_counts_everything(at: Spenders, database_url: str, seed: int) -> None:
    """Three of them, their holds ended by any of them, refunds, growth, limits that change, and bursts of calls."""
    random = Random(seed)
    opened: list[tuple[EventId, Stroops]] = []
    captured: list[tuple[EventId, int]] = []
    limits: dict[tuple[ApiKeyId | None, Period], int] = {}

    async def over(key: ApiKeyId, amount: int, leeway: timedelta) -> bool:
        """Whether a hold reaches past a limit, what is `leeway` longer ago than a period counted as well."""
        return any(
            [
                await at.counted(whose, period, leeway) + amount > limit
                for (whose, period), limit in limits.items()
                if whose in (None, key)
            ]
        )

    async def call(process: Process, command: PlaceHold) -> object:
        outcome = await process.ask(command)
        if isinstance(outcome, HoldPlaced):
            opened.append((command.event_id, command.amount))
        return outcome

    async with (
        open_database(database_url) as second,
        open_database(database_url) as third,
        trio.open_nursery() as nursery,
    ):
        processes: Sequence[Process] = [
            await nursery.start(run_process, at, each) for each in (at.ledger.database, second, third)
        ]
        for step in range(150):
            process, what = random.choice(processes), random.random()
            if what < 0.45:
                key, amount = random.choice((KEY, OTHER_KEY)), random.randint(1, 40)
                if isinstance(outcome := await call(process, hold(at, amount, key, ttl_seconds=86_400)), HoldPlaced):
                    assert not await over(key, 0, timedelta()), step
                else:
                    refused(outcome)
                    # What has left a period less than a second ago may still count.
                    assert await over(key, amount, LIMITS_FRESH), step
            elif what < 0.7 and opened:
                event_id, held = opened.pop(random.randrange(len(opened)))
                amount = random.choice((0, held, random.randint(0, held)))
                ended = capture(event_id, held, Stroops(amount), DELIVERED)
                assert isinstance(await process.ask(ended), HoldClosed)
                captured.append((event_id, amount))
            elif what < 0.77 and opened:
                event_id, held = opened[-1]
                grown = await process.ask(ExtendHold(event_id, 0, Stroops(random.randint(1, 60)), f"{step}"))
                if isinstance(grown, HoldExtended):
                    opened[-1] = event_id, grown.held_amount
                else:
                    refused(grown)
            elif what < 0.8 and captured:
                event_id, amount = captured.pop(random.randrange(len(captured)))
                if amount:
                    given = Refund(event_id, Stroops(random.randint(1, amount)), f"{step}")
                    assert isinstance(await process.ask(given), BalanceMoved)
            elif what < 0.85:
                which = random.choice((None, KEY, OTHER_KEY)), random.choice(PERIODS[:2])
                limits[which] = random.randint(50, 300)
                await at.limit(which[1], limits[which], which[0])
            elif what < 0.93:
                before = {which: await at.counted(*which) for which in limits}
                async with trio.open_nursery() as callers:
                    for each in processes:
                        for key in (KEY, OTHER_KEY):
                            callers.start_soon(call, each, hold(at, random.randint(1, 40), key, ttl_seconds=86_400))
                for which, limit in limits.items():
                    assert await at.counted(*which) <= max(limit, before[which]), step
            else:
                at.ledger.clock.advance(random.choice((0.2, 5.0, 3_000.0, 40_000.0)))
                await usage.ensure_partitions(at.ledger.database, at.now())
        nursery.cancel_scope.cancel()
    assert set(await at.ledger.findings()) <= {"no hold outlives its time"}, "which nobody sweeps here"


async def test_b12_what_leaves_the_day_may_be_spent_again(at: Spenders) -> None:
    await at.limit("day", 100)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run_process, at, at.ledger.database)
        placed = hold(at, 100)
        assert isinstance(await process.ask(placed), HoldPlaced)
        beginning = at.now()
        captured = capture(placed.event_id, placed.amount, placed.amount, DELIVERED)
        assert isinstance(await process.ask(captured), HoldClosed)
        at.ledger.clock.at = beginning + timedelta(days=1) - LIMITS_FRESH
        refused(await process.ask(hold(at, 1)))
        at.ledger.clock.at = beginning + timedelta(days=1)
        assert isinstance(await process.ask(hold(at, 100)), HoldPlaced)
        nursery.cancel_scope.cancel()


async def test_the_first_limit_that_fails_is_named_the_vaults_before_the_keys(at: Spenders) -> None:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run_process, at, at.ledger.database)
        for period, amount in (("year", 100), ("month", 90), ("week", 80), ("day", 70)):
            await at.limit(period, amount)  # type: ignore[arg-type]
            assert refused(await process.ask(hold(at, 101))) == ("key", period)
            assert refused(await process.ask(hold(at, amount + 1))) == ("key", period)
        await at.limit("year", 60, None)
        assert refused(await process.ask(hold(at, 71))) == ("vault", "year")
        outcome = await process.ask(hold(at, 61))
        assert isinstance(outcome, PolicyRefused)
        assert outcome.details == {
            "limitedBy": "vault",
            "window": "year",
            "limit": "0.0000060",
            "spent": "0.0000000",
            "requested": "0.0000061",
            "remaining": "0.0000060",
        }
        assert outcome.message == "The vault's annual spending limit would be exceeded"
        assert isinstance(await process.ask(hold(at, 10**13)), InsufficientFunds), "the balance comes first"
        nursery.cancel_scope.cancel()


async def test_a_hold_that_grows_is_checked_for_what_it_grows_by(at: Spenders) -> None:
    await at.limit("day", 100)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run_process, at, at.ledger.database)
        placed = hold(at, 90)
        assert isinstance(await process.ask(placed), HoldPlaced)
        assert refused(await process.ask(ExtendHold(placed.event_id, 10, Stroops(11)))) == ("key", "day")
        assert await process.ask(ExtendHold(placed.event_id, 10, Stroops(10))) == HoldExtended(Stroops(100))
        assert await process.ask(ExtendHold(placed.event_id, 10)) == HoldExtended(Stroops(100))
        refused(await process.ask(hold(at, 1)))
        nursery.cancel_scope.cancel()


# --- setting and removing ---------------------------------------------------------------------------------------------


async def test_limits_set_and_removed_at_once_leave_a_vault_that_knows_whether_it_is_limited(at: Spenders) -> None:
    database = at.ledger.database
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            for period in PERIODS:
                nursery.start_soon(at.limit, period, 100)
                nursery.start_soon(remove_limit, database, at.vault_id, KEY, period)
            for _ in range(5):
                nursery.start_soon(at.limit, "day", 77, None)
        limits = await at.ledger.count("spending_limits")
        assert await at.ledger.count("spending_limits", "api_key_id IS NULL") == 1
        assert (await at.ledger.state(at.vault_id)).limited
        await remove_limit(database, at.vault_id, None, "day")
        assert (await at.ledger.state(at.vault_id)).limited == (limits > 1)
        for period in PERIODS:
            await remove_limit(database, at.vault_id, KEY, period)
        assert not (await at.ledger.state(at.vault_id)).limited


async def test_the_database_refuses_what_is_no_limit(at: Spenders) -> None:
    stranger = await spenders_key_of_another(at)
    for period, amount, key in (("day", 0, KEY), ("day", -1, KEY), ("hour", 1, KEY), ("day", 1, stranger)):
        with pytest.raises(Exception, match="spending_limits"):
            await at.limit(period, amount, key)  # type: ignore[arg-type]
    await at.limit("day", 1)
    other = await at.ledger.vault(1)
    for sql in (f"UPDATE spending_limits SET vault_id = '{other}', api_key_id = NULL", "TRUNCATE spending_limits"):
        with pytest.raises(Exception, match="limit"):
            await at.ledger.database.execute(sql)


async def spenders_key_of_another(at: Spenders) -> ApiKeyId:
    """Return a key of somebody else's vault."""
    vault_id, key = await at.ledger.vault(1), ApiKeyId(at.ledger.ids.uuid7())
    await at.ledger.database.execute(
        "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4)"
        " SELECT $1, user_id, vault_id, 'ck_test_00000009', sha256('9'), 'abcd' FROM vaults WHERE vault_id = $2",
        key,
        vault_id,
    )
    return key
