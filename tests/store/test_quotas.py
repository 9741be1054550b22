"""Quota grants on a real PostgreSQL: burnt by the hold, by as many at once as there are, and renewed each month."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from typing import Final

import attrs
import pytest
import trio

from callora.actors.compensation import Compensator, Undelivered
from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.commands import (
    Command,
    ExtendHold,
    GrantQuota,
    PlaceHold,
    SetPlan,
    capture,
    expire,
    release,
)
from callora.ledger.faults import StoreRefused, StoreUnavailable
from callora.ledger.ids import ApiKeyId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    HoldClosed,
    HoldExtended,
    HoldNotOpen,
    HoldPlaced,
    InsufficientFunds,
    PlanMissing,
    PlanSet,
    PolicyRefused,
    QuotaGranted,
    ReferenceTaken,
    VaultMissing,
)
from callora.ledger.quota import month_of
from callora.ledger.rounds import RoundResult, Share
from callora.ledger.spending import PERIODS
from callora.ledger.vault import VaultState
from callora.store import usage
from callora.store.bridge import Connection, Database, open_database
from callora.store.reads.quotas import QuotaView, quota_of
from callora.store.reads.spending import spending_limits
from callora.store.rollup import advance
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import NOON, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED, METRICS, QUIET
from tests.store.test_spending import KEY, OTHER_KEY, Spenders, spenders

DECEMBER: Final = datetime(2026, 12, 1, tzinfo=UTC)
PLANS: Final = """
INSERT INTO plans (plan_id, name, monthly_credits, overage) VALUES
    ('ten', 'Ten', 10, 'deny'), ('hundred', 'Hundred', 100, 'deny'), ('paying', 'Paying', 10, 'charge'),
    ('none', 'None', 0, 'deny')
"""

_PLANS_OF_MONTH: Final = """
SELECT v.vault_id, count(g) AS grants, max(g.amount) AS given FROM vaults v
LEFT JOIN quota_grants g ON g.vault_id = v.vault_id AND g.source = 'plan' AND g.ref LIKE $1 AND g.expires_at > $2
GROUP BY v.vault_id
"""


@attrs.frozen
class Process:
    """One process's way to the vault."""

    registry: VaultRegistry
    at: Spenders

    async def ask(self, command: Command) -> object:
        """Carry out a command."""
        return await self.registry.ask(self.at.vault_id, command)

    async def hold(self, units: int = 1, unit_credits: int = 1, price: int = 0, key: ApiKeyId = KEY) -> object:
        """Return what a hold came to."""
        return await self.ask(hold(self.at, units, unit_credits, price, key))

    async def placed(self, units: int = 1, unit_credits: int = 1, price: int = 0, key: ApiKeyId = KEY) -> PlaceHold:
        """Return a hold that is placed, as it was decided."""
        command = hold(self.at, units, unit_credits, price, key)
        outcome = await self.ask(command)
        assert isinstance(outcome, HoldPlaced), outcome
        covered = outcome.credits // unit_credits
        return attrs.evolve(command, amount=Stroops(price * (units - covered)), credits=outcome.credits)

    async def plan(self, plan_id: str, price: int = 0, ref: str = "r") -> object:
        """Put the vault on a plan."""
        return await self.ask(SetPlan(plan_id, Stroops(price), ref))

    async def grant(self, amount: int, until: datetime, ref: str = "g") -> object:
        """Give the vault credits."""
        return await self.ask(GrantQuota(self.at.ledger.ids.uuid7(), "promo", amount, ref, until))


def hold(
    at: Spenders, units: int = 1, unit_credits: int = 1, price: int = 0, key: ApiKeyId = KEY, ttl: int = 3600
) -> PlaceHold:
    charged = attrs.evolve(CHARGED, api_key_id=key)
    return PlaceHold(at.ledger.event(), Stroops(units * price), ttl, charged, None, units, unit_credits)


def given_back(placed: PlaceHold) -> Command:
    return release(placed.event_id, placed.amount, DELIVERED, held_credits=placed.credits)


def spent(placed: PlaceHold, amount: int | None = None, burnt: int | None = None) -> Command:
    return capture(
        placed.event_id,
        placed.amount,
        placed.amount if amount is None else Stroops(amount),
        DELIVERED,
        held_credits=placed.credits,
        spent_credits=placed.credits if burnt is None else burnt,
    )


async def run_process(at: Spenders, database: Database, task_status: trio.TaskStatus[Process]) -> None:
    async with database.line(LINE_SETTINGS) as line:
        store = VaultStore(database, line, at.ledger.clock, at.ledger.ids.uuid7, 10)
        writer = Writer(store, METRICS, QUIET, 1000)
        registry = VaultRegistry(store, writer, METRICS, QUIET, Random(0), 1000)
        async with trio.open_nursery() as nursery:
            await nursery.start(writer.run)
            await nursery.start(registry.run)
            task_status.started(Process(registry, at))


async def seen(at: Spenders) -> QuotaView:
    found = await quota_of(at.ledger.database, at.vault_id, at.now())
    assert found is not None
    return found


def remaining(view: QuotaView) -> list[tuple[str, int]]:
    return [(each.source, each.remaining) for each in view.grants]


async def wrong(at: Spenders) -> list[str]:
    """Return what the audit finds, but that nobody sweeps here."""
    return [rule for rule in await at.ledger.findings() if rule != "no hold outlives its time"]


@pytest.fixture
async def at(database: Database) -> AsyncIterator[Spenders]:
    """A vault of two keys on a plan of ten credits a month."""
    async with real_ledger(database, TestClock()) as opened:
        await database.execute(PLANS)
        yield await spenders(opened)


@pytest.fixture
async def process(at: Spenders) -> AsyncIterator[Process]:
    """A process, on the plan of ten."""
    async with trio.open_nursery() as nursery:
        running: Process = await nursery.start(run_process, at, at.ledger.database)
        assert await running.plan("ten") == PlanSet(Stroops(10**12), repeated=False)
        yield running
        nursery.cancel_scope.cancel()
    assert await wrong(at) == []


@pytest.fixture
async def other(at: Spenders, process: Process, database_url: str) -> AsyncIterator[Process]:
    """Another process at the same vault."""
    async with open_database(database_url) as database, trio.open_nursery() as nursery:
        yield await nursery.start(run_process, at, database)
        nursery.cancel_scope.cancel()


# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_vaults_counted_together_are_told_what_each_would_be_told_alone(
    at: Spenders, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, ledger, store = Random(seed), at.ledger, at.ledger.store
    vaults, queries = [at], list[int]()
    for _ in range(11):
        keys = [ApiKeyId(ledger.ids.uuid7()) for _ in range(3)]
        vault = await spenders(ledger, keys=keys)
        for period in random.sample(PERIODS, random.choice((0, 0, 1, 2))):
            await vault.limit(period, random.randint(1, 1000), random.choice((None, *keys)))
        if random.random() < 0.8:
            plan = SetPlan(random.choice(("ten", "hundred", "paying", "none")), Stroops(0), "r")
            assert isinstance(await ledger.locked(vault.vault_id, plan), PlanSet)
        if random.random() < 0.5:
            grant = GrantQuota(ledger.ids.uuid7(), "promo", random.randint(1, 50), "g", at.now() + timedelta(days=60))
            assert not isinstance(await ledger.locked(vault.vault_id, grant), VaultMissing)
        for key in random.sample(keys, random.randint(0, 2)):
            cap = "UPDATE api_keys SET monthly_credit_cap = $2 WHERE api_key_id = $1"
            await ledger.database.execute(cap, key, random.randint(0, 9))
        for key in keys:
            event_id = await vault.place(random.randint(0, 100), key)
            if random.random() < 0.5:
                await vault.close(capture(event_id, Stroops(0), Stroops(0), DELIVERED))
        vaults.append(vault)
        ledger.clock.advance(random.choice((1, 30, 90_000)))
        await usage.ensure_partitions(ledger.database, at.now())
        await advance(ledger.database, at.now(), span=timedelta(days=400))

    async def counting(connection: Connection, states: Sequence[VaultState], now: datetime) -> object:
        queries.append(len(states))
        return await spending_limits(connection, states, now)

    async def guarded(vault: Spenders, *, credited: bool) -> None:
        state = (await store.load_vaults([vault.vault_id]))[vault.vault_id]
        told[vault.vault_id] = await store.load_guarded(state, None, credited=credited, refusing=True)

    monkeypatch.setattr("callora.store.vaults.spending_limits", counting)
    told: dict[VaultId, VaultState] = {}
    for month in (at.now(), month_of(at.now())[1], month_of(at.now())[1]):
        ledger.clock.at = month
        await usage.ensure_partitions(ledger.database, month)
        credited = {vault.vault_id: random.random() < 0.5 for vault in vaults}
        async with trio.open_nursery() as nursery:
            for vault in vaults:
                nursery.start_soon(partial(guarded, vault, credited=credited[vault.vault_id]))
        together, told = told, {}
        assert max(queries) > 3, "not one by one"
        for vault in vaults:
            await guarded(vault, credited=credited[vault.vault_id])
        assert together == told
        assert any(each.policies for each in told.values())
        assert any(each.quota is not None and each.quota.caps for each in told.values())
        rows = await ledger.database.fetch(_PLANS_OF_MONTH, f"{month:%Y-%m}/%", month)
        given = {str(row["vault_id"]): (row["grants"], row["given"]) for row in rows}
        for vault_id, state in told.items():
            expected = (0, None) if state.quota is None or not state.quota.monthly else (1, state.quota.monthly)
            assert given[vault_id] == expected
        assert await wrong(at) == []


async def test_a_vault_whose_grants_cannot_be_renewed_is_no_other_vaults_fault(at: Spenders) -> None:
    ledger = at.ledger
    vaults = [await spenders(ledger, keys=[ApiKeyId(ledger.ids.uuid7())]) for _ in range(5)]
    for vault in vaults:
        assert isinstance(await ledger.locked(vault.vault_id, SetPlan("ten", Stroops(0), "r")), PlanSet)
    await ledger.database.execute(
        "CREATE FUNCTION refuse_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no' USING ERRCODE = 'check_violation'; END $$;"
        "CREATE TRIGGER refused BEFORE INSERT ON quota_grants FOR EACH ROW"
        f" WHEN (NEW.vault_id = '{vaults[2].vault_id}') EXECUTE FUNCTION refuse_it()"
    )
    came_to: dict[int, object] = {}

    async def guarded(number: int) -> None:
        state = (await ledger.store.load_vaults([vaults[number].vault_id]))[vaults[number].vault_id]
        try:
            came_to[number] = await ledger.store.load_guarded(state, None, credited=True, refusing=False)
        except StoreRefused as refused:
            came_to[number] = refused

    async with trio.open_nursery() as nursery:
        for number in range(len(vaults)):
            nursery.start_soon(guarded, number)
    assert isinstance(came_to.pop(2), StoreRefused)
    assert [state.credits for state in came_to.values() if isinstance(state, VaultState)] == [10, 10, 10, 10]


async def test_grants_that_stay_due_however_often_they_are_renewed_end_in_a_fault(
    at: Spenders, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def renews_nothing(_: Connection, vault_ids: Sequence[VaultId], __: datetime) -> dict[VaultId, int]:
        await trio.lowlevel.checkpoint()
        return dict.fromkeys(vault_ids, 0)

    monkeypatch.setattr("callora.store.vaults.renew", renews_nothing)
    assert isinstance(await at.ledger.locked(at.vault_id, SetPlan("ten", Stroops(0), "r")), PlanSet)
    state = await at.ledger.state(at.vault_id)
    with pytest.raises(StoreUnavailable, match="due however often"):
        await at.ledger.store.load_guarded(state, None, credited=True, refusing=False)


# --- burning ----------------------------------------------------------------------------------------------------------


async def test_a_vault_that_calls_nothing_priced_in_credits_has_no_quota_and_no_guard(
    at: Spenders, process: Process
) -> None:
    assert isinstance(await process.ask(hold(at, unit_credits=0, price=5)), HoldPlaced)
    assert not (await at.ledger.state(at.vault_id)).limited
    assert await at.ledger.count("quota_grants") == 0
    assert (await seen(at)).monthly_credits == 10


async def test_a23_the_last_credit_passes_and_the_next_call_is_refused(at: Spenders, process: Process) -> None:
    placed = await process.placed(9)
    assert isinstance(await process.ask(spent(placed)), HoldClosed)
    assert isinstance(await process.ask(spent(await process.placed(1))), HoldClosed)
    refused = await process.hold(1)
    assert isinstance(refused, PolicyRefused)
    assert refused.code == "QUOTA_EXHAUSTED"
    assert refused.details == {
        "limitedBy": "vault",
        "creditsRequired": 1,
        "creditsRemaining": 0,
        "creditsUsed": 10,
        "monthlyLimit": 10,
        "resetAt": "2026-12-01T00:00:00Z",
    }
    assert (await seen(at)).credits == 0
    assert await at.ledger.balance(at.vault_id) == (10**12, 0), "credits move no money"
    row = await at.ledger.database.fetch_row("SELECT * FROM usage_events WHERE event_id = $1", placed.event_id)
    assert row is not None
    assert (row["held_credits"], row["credits"], row["amount"]) == (9, 9, 0)


@pytest.mark.parametrize("processes", [1, 2])
async def test_wa4_wa5_twenty_at_once_on_ten_credits_hold_exactly_ten(
    at: Spenders, database_url: str, processes: int
) -> None:
    await at.ledger.locked(at.vault_id, SetPlan("ten", Stroops(0), "r"))
    outcomes: list[object] = []
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        running = [await nursery.start(run_process, at, each) for each in (at.ledger.database, other)[:processes]]
        async with trio.open_nursery() as callers:

            async def one(process: Process) -> None:
                outcomes.append(await process.hold(1))

            for number in range(20):
                callers.start_soon(one, running[number % processes])
        nursery.cancel_scope.cancel()
    assert sum(isinstance(each, HoldPlaced) for each in outcomes) == 10
    assert sum(isinstance(each, PolicyRefused) and each.code == "QUOTA_EXHAUSTED" for each in outcomes) == 10
    assert await at.ledger.count("quota_grants") == 1, "the month's is granted once"
    assert (await seen(at)).credits == 0
    assert await wrong(at) == []


async def test_what_comes_back_of_a_hold_may_be_burnt_again(at: Spenders, process: Process) -> None:
    for end in (given_back, lambda placed: spent(placed, burnt=0)):
        placed = await process.placed(10)
        assert isinstance(await process.hold(1), PolicyRefused)
        assert isinstance(await process.ask(end(placed)), HoldClosed)
    placed = await process.placed(5, 2)
    assert isinstance(await process.ask(spent(placed, burnt=6)), HoldClosed)
    assert (await seen(at)).credits == 4
    assert await process.ask(spent(placed)) in (
        HoldNotOpen("captured"),
        HoldClosed("captured", Stroops(0), Stroops(10**12)),
    )
    assert (await seen(at)).credits == 4
    held = await process.placed(4)
    at.ledger.clock.advance(3600)
    await usage.ensure_partitions(at.ledger.database, at.now())
    assert isinstance(await process.ask(expire(held.event_id, held.amount, held.credits)), HoldClosed)
    assert (await seen(at)).credits == 4


async def test_wa8_a_plan_that_charges_takes_money_for_what_its_credits_do_not_cover(
    at: Spenders, process: Process
) -> None:
    await process.plan("paying")
    placed = await process.placed(7, 2, 100)
    assert (placed.credits, placed.amount) == (10, 200)
    assert await at.ledger.balance(at.vault_id) == (10**12 - 200, 200)
    assert isinstance(await process.ask(spent(placed, 100, 10)), HoldClosed)
    assert await at.ledger.balance(at.vault_id) == (10**12 - 100, 0)
    all_money = await process.placed(3, 2, 100)
    assert (all_money.credits, all_money.amount) == (0, 300)
    await process.ask(given_back(all_money))
    assert isinstance(await process.hold(1, 1, 10**13), InsufficientFunds)


async def test_a_hold_that_grows_takes_credits_first_and_only_once_under_its_name(
    at: Spenders, process: Process
) -> None:
    placed = await process.placed(6)
    more = ExtendHold(placed.event_id, 10, Stroops(0), "more", units=3, unit_credits=1)
    assert await process.ask(more) == HoldExtended(Stroops(0), held_credits=9)
    assert await process.ask(more) == HoldExtended(Stroops(0), repeated=True, held_credits=9)
    refused = await process.ask(ExtendHold(placed.event_id, 10, Stroops(0), "too much", units=2, unit_credits=1))
    assert isinstance(refused, PolicyRefused)
    await process.plan("paying")
    # The plan that charges has its own ten, less the nine that are held.
    both = ExtendHold(placed.event_id, 0, Stroops(200), "both", units=2, unit_credits=1)
    assert await process.ask(both) == HoldExtended(Stroops(100), held_credits=10)
    placed = attrs.evolve(placed, amount=Stroops(100), credits=10)
    assert isinstance(await process.ask(spent(placed)), HoldClosed)
    assert await at.ledger.balance(at.vault_id) == (10**12 - 100, 0)


# --- grants and months ------------------------------------------------------------------------------------------------


async def test_a26_a_month_that_begins_ends_the_last_ones_credits_and_grants_its_own(
    at: Spenders, process: Process
) -> None:
    await process.placed(7)
    at.ledger.clock.at = DECEMBER - timedelta(microseconds=1)
    await usage.ensure_partitions(at.ledger.database, at.now())
    assert isinstance(await process.hold(4), PolicyRefused)
    at.ledger.clock.at = DECEMBER
    assert (await process.placed(10)).credits == 10
    assert isinstance(await process.hold(1), PolicyRefused)
    rows = await at.ledger.database.fetch("SELECT ref, amount, lapsed FROM quota_grants ORDER BY ref")
    assert [tuple(row.values()) for row in rows] == [("2026-11/1", 10, 3), ("2026-12/1", 10, 0)]


async def test_a_process_that_does_not_know_of_the_new_month_burns_nothing_of_the_old(
    at: Spenders, database_url: str
) -> None:
    await at.ledger.locked(at.vault_id, SetPlan("ten", Stroops(0), "r"))
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        one: Process = await nursery.start(run_process, at, at.ledger.database)
        two: Process = await nursery.start(run_process, at, other)
        held = await one.placed(10)
        await two.ask(hold(at, 1))
        at.ledger.clock.at = DECEMBER + timedelta(seconds=1)
        await usage.ensure_partitions(at.ledger.database, at.now())
        # Its round is decided on what it knows, and the database refuses it: the month is over.
        await two.ask(given_back(held))
        assert (await one.placed(10)).credits == 10
        assert isinstance(await two.hold(1), PolicyRefused)
        nursery.cancel_scope.cancel()
    assert await wrong(at) == []


async def test_credits_that_come_back_after_their_grant_has_ended_are_gone_with_it(
    at: Spenders, process: Process
) -> None:
    held = [await process.placed(5), await process.placed(5)]
    at.ledger.clock.at = DECEMBER
    await usage.ensure_partitions(at.ledger.database, at.now())
    await process.placed(2)
    for each in held:
        assert isinstance(await process.ask(given_back(each)), HoldClosed)
    assert isinstance(await process.hold(11), PolicyRefused), "never more than was granted"
    await process.grant(5, DECEMBER + timedelta(days=1))
    view = await seen(at)
    # Two that were burnt in December were given back by November's: it is told apart only when grants are settled.
    assert remaining(view) == [("promo", 5), ("plan", 10)]
    lapsed = await at.ledger.database.fetch_value("SELECT sum(lapsed) FROM quota_grants WHERE lapsed_at IS NOT NULL")
    assert lapsed == 8
    assert await wrong(at) == []


async def test_the_grant_that_ends_first_burns_first(at: Spenders, process: Process) -> None:
    assert await process.grant(5, NOON + timedelta(days=1), "soon") == QuotaGranted(15, repeated=False)
    assert await process.grant(5, DECEMBER + timedelta(days=40), "late") == QuotaGranted(20, repeated=False)
    await process.ask(spent(await process.placed(7)))
    assert remaining(await seen(at)) == [("promo", 0), ("plan", 8), ("promo", 5)]
    at.ledger.clock.at = NOON + timedelta(days=1)
    await process.ask(spent(await process.placed(9)))
    assert remaining(await seen(at)) == [("plan", 0), ("promo", 4)]
    at.ledger.clock.at = DECEMBER
    await usage.ensure_partitions(at.ledger.database, at.now())
    await process.ask(spent(await process.placed(1)))
    assert remaining(await seen(at)) == [("plan", 9), ("promo", 4)]


async def test_wa18_a_grant_is_given_once_under_its_name(at: Spenders, process: Process) -> None:
    until = NOON + timedelta(days=1)
    assert await process.grant(5, until) == QuotaGranted(15, repeated=False)
    assert await process.grant(5, until) == QuotaGranted(15, repeated=True)
    assert await process.grant(6, until) == ReferenceTaken()
    assert await process.grant(5, until + timedelta(days=1)) == ReferenceTaken()
    missing = await process.registry.ask(
        at.vault_id.replace("7", "8", 1),  # type: ignore[arg-type]
        GrantQuota(at.ledger.ids.uuid7(), "promo", 1, "g", until),
    )
    assert missing == VaultMissing()


async def test_wa2_changing_plans_back_and_forth_gives_no_credit_twice(at: Spenders, process: Process) -> None:
    await process.ask(spent(await process.placed(6)))
    for plan_id, left in (("hundred", 94), ("ten", 4), ("hundred", 94), ("none", 0), ("ten", 4)):
        await process.plan(plan_id)
        if left:
            placed = await process.placed(1)
            assert (await seen(at)).credits == left - 1
            await process.ask(given_back(placed))
        else:
            assert isinstance(await process.hold(1), PolicyRefused)
        assert (await seen(at)).credits == left
    assert await wrong(at) == []


async def test_wa3_all_keys_of_a_vault_share_its_quota_and_a_cap_narrows_one(at: Spenders, process: Process) -> None:
    await process.ask(spent(await process.placed(4)))
    await at.ledger.database.execute("UPDATE api_keys SET monthly_credit_cap = 6 WHERE api_key_id = $1", KEY)
    await process.ask(spent(await process.placed(1)))
    for moved in (timedelta(), timedelta(minutes=5)):  # before and after the sums have it
        at.ledger.clock.at += moved
        await advance(at.ledger.database, at.now())
        refused = await process.hold(2)
        assert isinstance(refused, PolicyRefused)
        assert (refused.details["limitedBy"], refused.details["creditsUsed"]) == ("key", 5)
    placed = await process.placed(1)
    assert isinstance(await process.hold(1), PolicyRefused)
    await process.ask(given_back(placed))
    await process.ask(spent(await process.placed(1)))
    assert isinstance(await process.hold(1), PolicyRefused)
    assert (await process.placed(4, key=OTHER_KEY)).credits == 4
    refused = await process.hold(1, key=OTHER_KEY)
    assert isinstance(refused, PolicyRefused)
    assert refused.details["limitedBy"] == "vault"
    at.ledger.clock.at = DECEMBER
    await usage.ensure_partitions(at.ledger.database, at.now())
    assert (await process.placed(6)).credits == 6, "a cap is a month's"
    assert isinstance(await process.hold(1), PolicyRefused)


async def test_what_another_process_burns_and_grows_a_hold_by_counts_for_a_keys_cap(
    at: Spenders, process: Process, other: Process
) -> None:
    await process.plan("hundred")
    await at.ledger.database.execute("UPDATE api_keys SET monthly_credit_cap = 10 WHERE api_key_id = $1", KEY)
    await process.placed(1)
    grown = await other.placed(2)
    more = ExtendHold(grown.event_id, 0, Stroops(0), "more", units=4, unit_credits=1)
    assert isinstance(await other.ask(more), HoldExtended)
    refused = await process.hold(4)
    assert isinstance(refused, PolicyRefused)
    assert (refused.details["limitedBy"], refused.details["creditsUsed"]) == ("key", 7)
    assert (await process.placed(3)).credits == 3
    assert isinstance(await other.hold(1), PolicyRefused)
    assert (await other.placed(50, key=OTHER_KEY)).credits == 50


async def test_credits_that_came_back_to_another_process_pay_before_money_does(
    at: Spenders, process: Process, other: Process
) -> None:
    await process.plan("paying")
    await at.ledger.database.execute("UPDATE api_keys SET monthly_credit_cap = 6 WHERE api_key_id = $1", KEY)
    first = await process.placed(1, price=10)
    for _ in range(3):
        placed = await other.placed(5, price=10)
        assert (placed.amount, placed.credits) == (0, 5)
        assert isinstance(await other.ask(given_back(placed)), HoldClosed)
    assert isinstance(await other.ask(given_back(first)), HoldClosed)
    paid = await process.placed(8, price=10)
    assert (paid.amount, paid.credits) == (20, 6), "as many as the key may burn, and the rest in money"


async def test_credits_that_another_process_gives_back_meanwhile_pay_in_place_of_money(
    at: Spenders, process: Process, other: Process
) -> None:
    await process.plan("paying")
    all_of_them = await other.placed(10, price=10)
    assert ((await process.placed(1, price=10)).amount, all_of_them.amount) == (10, 0)
    assert isinstance(await other.ask(given_back(all_of_them)), HoldClosed)
    paid = await process.placed(3, price=10)
    assert (paid.amount, paid.credits) == (0, 3)


async def test_a_keys_cap_that_has_room_again_by_another_process_pays_in_credits(
    at: Spenders, process: Process, other: Process
) -> None:
    await process.plan("paying")
    await at.ledger.database.execute("UPDATE api_keys SET monthly_credit_cap = 3 WHERE api_key_id = $1", KEY)
    capped = await process.placed(3, price=10)
    assert (await process.placed(1, price=10)).amount == 10
    # The vault has as many credits afterwards, and the key may burn some of them.
    assert isinstance(await other.ask(given_back(capped)), HoldClosed)
    assert (await other.placed(3, price=10, key=OTHER_KEY)).credits == 3
    paid = await process.placed(1, price=10)
    assert (paid.amount, paid.credits) == (0, 1)


@pytest.mark.parametrize("plan", ["hundred", "paying"])
async def test_processes_at_one_vault_lose_no_round_to_each_other_where_there_is_room(
    at: Spenders, process: Process, other: Process, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """Forty holds at once, paid in credits or, once those are gone, in money."""
    lost: list[VaultState] = []
    commit = VaultStore.commit_round

    async def watched(self: VaultStore, shares: Sequence[Share]) -> RoundResult:
        result = await commit(self, shares)
        lost.extend(result.lost)
        return result

    monkeypatch.setattr(VaultStore, "commit_round", watched)
    await process.plan(plan)
    await at.limit("day", 10_000)
    for each in (process, other, process, other):
        await each.ask(spent(await each.placed(5, price=1)))
    lost.clear()

    async def calls(each: Process) -> None:
        for _ in range(10):
            await each.ask(spent(await each.placed(1, price=1)))

    async with trio.open_nursery() as callers:
        for each in (process, other, process, other):
            callers.start_soon(calls, each)
    assert lost == []
    view = await seen(at)
    assert (view.credits, (await at.spent(KEY))["day"]) == ((40, 0) if plan == "hundred" else (0, 50))


async def test_credits_of_a_charge_that_was_never_delivered_are_given_anew_once(at: Spenders, process: Process) -> None:
    delivered, lost, held = await process.placed(2), await process.placed(3), await process.placed(1)
    for each in (delivered, lost):
        assert isinstance(await process.ask(spent(each)), HoldClosed)
    compensator = Compensator(process.registry, at.ledger.clock, at.ledger.ids, QUIET)
    async with trio.open_nursery() as nursery:
        await nursery.start(compensator.run)
        for each in (lost, held, lost):
            compensator.add(
                Undelivered(at.vault_id, each.event_id, each.amount, Stroops(0), each.credits, each.credits)
            )
        with trio.fail_after(60):
            while (await seen(at)).credits != 8 or compensator.pending:  # noqa: ASYNC110 - it sets no event
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert sorted(remaining(await seen(at))) == [("allocation", 3), ("plan", 5)]
    row = await at.ledger.database.fetch_row("SELECT * FROM quota_grants WHERE source = 'allocation'")
    assert row is not None
    assert (row["ref"], row["amount"], row["expires_at"]) == (f"undelivered:{lost.event_id}", 3, DECEMBER)


# --- plans that are paid ----------------------------------------------------------------------------------------------


async def test_a_plan_is_paid_once_under_its_name_and_not_without_the_money(at: Spenders, process: Process) -> None:
    before = (await at.ledger.balance(at.vault_id))[0]
    assert await process.plan("hundred", 500, "november") == PlanSet(Stroops(before - 500), repeated=False)
    assert await process.plan("hundred", 500, "november") == PlanSet(Stroops(before - 500), repeated=True)
    assert await process.plan("paying", 10**13, "december") == InsufficientFunds(Stroops(10**13), Stroops(before - 500))
    assert (await seen(at)).plan_id == "hundred"
    assert await process.plan("nowhere") == PlanMissing()
    kinds = await at.ledger.database.fetch("SELECT kind, amount, ref FROM ledger_entries WHERE kind = 'subscription'")
    assert [tuple(row.values()) for row in kinds] == [("subscription", -500, "november")]


# --- whatever happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(3, 40))])
async def test_no_credit_is_lost_or_made_whatever_happens(at: Spenders, database_url: str, seed: int) -> None:
    """Two processes, holds, closes, growth, grants, other plans and months; the audit adds it all up each time."""
    random = Random(seed)
    await at.ledger.locked(at.vault_id, SetPlan("ten", Stroops(0), "r"))
    opened: list[PlaceHold] = []
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        processes: Sequence[Process] = [
            await nursery.start(run_process, at, each) for each in (at.ledger.database, other)
        ]
        for step in range(120):
            process = random.choice(processes)
            what = random.random()
            if what < 0.5:
                command = hold(at, random.randint(1, 4), random.choice((0, 1, 1, 2)), 3, ttl=86_400)
                outcome = await process.ask(command)
                if isinstance(outcome, HoldPlaced):
                    covered = outcome.credits // command.unit_credits if command.unit_credits else 0
                    opened.append(
                        attrs.evolve(command, amount=Stroops(3 * (command.units - covered)), credits=outcome.credits)
                    )
                else:
                    assert isinstance(outcome, PolicyRefused)
            elif what < 0.8 and opened:
                ended = opened.pop(random.randrange(len(opened)))
                close = random.choice(
                    (given_back(ended), spent(ended), spent(ended, 0, random.randint(0, ended.credits)))
                )
                assert isinstance(await process.ask(close), HoldClosed)
            elif what < 0.85 and opened:
                grown = opened.pop()
                outcome = await process.ask(
                    ExtendHold(grown.event_id, 0, Stroops(3), f"step {step}", units=1, unit_credits=1)
                )
                if isinstance(outcome, HoldExtended):
                    grown = attrs.evolve(grown, amount=outcome.held_amount, credits=outcome.held_credits)
                opened.append(grown)
            elif what < 0.9:
                await process.grant(random.randint(1, 9), at.now() + timedelta(hours=random.randint(1, 60)), f"{step}")
            elif what < 0.95:
                await process.plan(random.choice(("ten", "hundred", "paying", "none")))
            else:
                at.ledger.clock.advance(random.choice((3600, 86_400 / 2)))
                await usage.ensure_partitions(at.ledger.database, at.now())
            if step % 10 == 0:
                assert await wrong(at) == [], step
        nursery.cancel_scope.cancel()
    view = await seen(at)
    start, _ = month_of(at.now())
    of_month = await at.ledger.database.fetch_value(
        "SELECT coalesce(max(amount), 0) FROM quota_grants WHERE source = 'plan' AND created_at >= $1", start
    )
    assert of_month <= 100
    assert view.credits <= view.granted
    assert await wrong(at) == []


# --- what the database refuses ----------------------------------------------------------------------------------------


async def test_the_database_refuses_what_no_actor_should_have_asked(at: Spenders, process: Process) -> None:
    placed = await process.placed(3)
    database = at.ledger.database
    for sql in (
        "UPDATE vaults SET credits = -1",
        "UPDATE quota_grants SET amount = 1000",
        "UPDATE quota_grants SET remaining = 11",
        "DELETE FROM quota_grants",
        "TRUNCATE quota_grants",
        "INSERT INTO quota_grants (vault_id, grant_id, source, ref, amount, remaining, created_at, expires_at)"
        " SELECT vault_id, gen_random_uuid(), 'promo', 'x', 0, 0, now(), now() + interval '1 day' FROM vaults",
        f"UPDATE usage_events SET state = 'released', closed_at = now() WHERE event_id = '{placed.event_id}'",
        f"UPDATE usage_events SET state = 'captured', amount = 0, credits = 4, closed_at = now()"
        f" WHERE event_id = '{placed.event_id}'",
    ):
        with pytest.raises(Exception, match=r"quota_grants|grants|vaults|usage_events"):
            await database.execute(sql)
    assert (await seen(at)).credits == 7
