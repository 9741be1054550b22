"""Holds that die at any point are carried on by their retry: one hold, one charge, and no success without them."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from random import Random

import attrs
import pytest
import trio

from callora.actors.billing import Billing
from callora.actors.holds import (
    CaptureOrder,
    HoldCaptured,
    HoldEnded,
    HoldOrder,
    Holds,
    HoldStands,
    Outcome,
    Work,
)
from callora.ledger.commands import Grant, LockedCommand, expire
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import ApiKeyId, EventId, HoldId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import Draining, HoldClosed
from callora.ledger.rounds import RoundResult, Share
from callora.store.bridge import open_database
from callora.store.reads import holds as reads
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import LockedOutcome, VaultStore
from tests.actors.test_billing import Bank, bank
from tests.simulation.support import Running, running
from tests.support.knife import Knife

__all__ = ["bank"]

AMOUNT = Stroops(60)
TTL = 60


@attrs.frozen
class House:
    """A bank, and a key of its vault."""

    bank: Bank
    api_key_id: ApiKeyId

    def order(self, name: str = "r", amount: int = AMOUNT, ttl_seconds: int = TTL) -> HoldOrder:
        at = self.bank
        return HoldOrder(name, self.api_key_id, at.api_id, at.endpoint_id, Stroops(amount), ttl_seconds)

    async def events(self) -> list[str]:
        """Return the states of all usage events."""
        return await self.bank.events()

    async def balance(self) -> tuple[int, int]:
        """Return what is available and held."""
        return await self.bank.ledger.balance(self.bank.vault_id)


@pytest.fixture
async def house(bank: Bank) -> House:
    """A bank whose vault has a key."""
    key = ApiKeyId(bank.ledger.ids.uuid7())
    await bank.ledger.database.execute(
        "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4)"
        " VALUES ($1, $2, $3, 'ck_test_00000001', sha256('1'), 'abcd')",
        key,
        bank.user_id,
        bank.vault_id,
    )
    return House(bank, key)


class FaultyStore(VaultStore):
    """A store whose writes go wrong as told: lost before they are stored, or stored without an answer."""

    fault: Callable[[], str]

    async def commit_round(self, shares: Sequence[Share]) -> RoundResult:
        fault = self._raise_unless_stored()
        result = await super().commit_round(shares)
        if fault == "stored":
            raise OutcomeUnknown("stored")
        return result

    async def commit_locked(self, vault_id: VaultId, command: LockedCommand) -> LockedOutcome:
        fault = self._raise_unless_stored()
        outcome = await super().commit_locked(vault_id, command)
        if fault == "stored":
            raise OutcomeUnknown("stored")
        return outcome

    def _raise_unless_stored(self) -> str:
        fault = self.fault()
        if fault == "lost":
            raise OutcomeUnknown("lost")
        if fault == "unavailable":
            raise StoreUnavailable("away")
        return fault


@attrs.frozen
class Process:
    """One process: its own connections, registry and holds."""

    holds: Holds
    running: Running
    store: FaultyStore
    nursery: trio.Nursery

    def fail(self, *faults: str) -> None:
        """Let the next writes go wrong."""
        left = list(faults)
        self.store.fault = lambda: left.pop(0) if left else "ok"


@asynccontextmanager
async def process(house: House, kind: type[Holds] = Holds) -> AsyncIterator[Process]:
    """Run a process on the bank's database; on leaving, what is decided is still stored."""
    clock, ids = house.bank.ledger.clock, house.bank.ledger.ids
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(house.bank.dsn))
        line = await stack.enter_async_context(database.line(LINE_SETTINGS))
        store = FaultyStore(database, line, clock, ids.uuid7, 10)
        store.fault = lambda: "ok"
        at = await stack.enter_async_context(running(store))
        billing = Billing(database, at.registry, clock, ids)
        holds = kind(database, at.registry, billing, clock, ids, ttl_seconds_default=TTL)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(holds.run)
        yield Process(holds, at, store, nursery)
        nursery.cancel_scope.cancel()


class Killed(Holds):
    """Holds whose work is cut at a chosen wait, as a kill would."""

    knife: Knife | None = None

    async def _fly(self, vault_id: VaultId, request_id: str, same: object, work: Work) -> Outcome:
        async def cut() -> Outcome:
            knife = self.knife
            if knife is None:
                return await work()
            with knife as scope, scope:
                return await work()
            raise OutcomeUnknown("killed")

        return await super()._fly(vault_id, request_id, same, cut)


async def carried_on(ask: Callable[[], Awaitable[object]]) -> object:
    """Ask until it is known what came of it."""
    for _ in range(20):
        with suppress(CalloraFault):
            return await ask()
    raise AssertionError("never known")


# --- cut at every wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_with_it", [True, False])
@pytest.mark.parametrize("step", ["place", "capture", "capture above", "release", "extend"])
async def test_a_step_cut_at_any_wait_is_done_once_by_its_retry_elsewhere(
    house: House, step: str, dies_with_it: bool
) -> None:
    """The retry comes to another process, at once: what the first had sent may be stored before, during or after it.

    Args:
        dies_with_it: the first process's actors are killed too; otherwise they carry out what was sent to them.
    """
    await house.bank.ledger.locked(house.bank.vault_id, Grant(Stroops(1_000_000), "plenty"))
    cut_at, held, charged = 0, 0, 0
    async with process(house) as second:
        while True:
            cut_at += 1
            name = f"r-{cut_at}"

            def asked(holds: Holds, hold_id: HoldId, name: str = name) -> Awaitable[object]:
                match step:
                    case "place":
                        return holds.place(house.order(name))
                    case "capture":
                        return holds.capture(hold_id, CaptureOrder(name, None, exact=True))
                    case "capture above":
                        return holds.capture(hold_id, CaptureOrder(name, Stroops(100), exact=False))
                    case "release":
                        return holds.release(hold_id)
                    case _:
                        return holds.extend(hold_id, 5, Stroops(7), f"ref-{name}")

            async with process(house, Killed) as first:
                hold_id = HoldId("")
                if step != "place":
                    placed = await second.holds.place(house.order(name))
                    assert isinstance(placed, HoldStands)
                    hold_id = placed.found.hold.hold_id
                assert isinstance(first.holds, Killed)
                first.holds.knife = knife = Knife(cut_at)
                told: object = None
                try:
                    told = await asked(first.holds, hold_id)
                except OutcomeUnknown:
                    if dies_with_it:
                        first.running.registry_scope.cancel()
                again = await carried_on(partial(asked, second.holds, hold_id))
                assert isinstance(again, HoldStands | HoldCaptured), again
                assert told is None or again.already
            once_more = await asked(second.holds, hold_id)
            assert isinstance(once_more, HoldStands | HoldCaptured) and once_more.already
            assert once_more.found == again.found
            held += {"place": 60, "extend": 67}.get(step, 0)
            charged += {"capture": 60, "capture above": 100}.get(step, 0)
            assert await house.balance() == (1_000_100 - held - charged, held)
            if knife.waits < cut_at:
                break
    assert told is not None, "the last is not cut at all"
    ended = {"place": "held", "extend": "held", "release": "released"}.get(step, "captured")
    assert await house.events() == [ended] * cut_at
    for row in await house.bank.ledger.database.fetch("SELECT vault_id, hold_id FROM external_holds"):
        if held:
            assert isinstance(await _released(house, HoldId(str(row["hold_id"]))), HoldStands)
    print(f"\n{step}: cut at each of {cut_at - 1} waits")


async def _released(house: House, hold_id: HoldId) -> object:
    async with process(house) as at:
        return await at.holds.release(hold_id)


# --- unknown outcomes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        ["lost"],
        ["stored"],
        ["ok", "lost"],
        ["ok", "stored"],
        ["ok", "ok", "lost"],
        ["ok", "ok", "stored"],
        ["unavailable", "stored", "lost"],
        ["stored", "ok", "stored", "unavailable", "lost"],
    ],
)
async def test_an_unknown_outcome_is_looked_up_and_nothing_is_done_twice(house: House, faults: list[str]) -> None:
    async with process(house) as at:
        at.fail(*faults)
        placed = await carried_on(lambda: at.holds.place(house.order()))
        assert isinstance(placed, HoldStands)
        hold_id = placed.found.hold.hold_id
        captured = await carried_on(lambda: at.holds.capture(hold_id, CaptureOrder("t", Stroops(80), exact=False)))
        assert isinstance(captured, HoldCaptured)
        assert (captured.charged.amount, captured.charged.held_amount) == (80, 80)
        assert await house.events() == ["captured"]
        assert await house.balance() == (20, 0)


async def test_a_round_that_is_stored_after_its_release_places_nothing(house: House) -> None:
    async with process(house) as slow, process(house) as quick:
        late: list[list[Share]] = []
        stored = slow.store.commit_round

        async def delayed(shares: Sequence[Share]) -> RoundResult:
            late.append([attrs.evolve(each, holds=list(each.holds), closes=list(each.closes)) for each in shares])
            await trio.lowlevel.checkpoint()
            raise OutcomeUnknown("no answer in time")

        slow.store.commit_round = delayed  # type: ignore[method-assign]
        with pytest.raises(OutcomeUnknown):
            await slow.holds.place(house.order())
        told = await quick.holds.release_request(house.api_key_id, "r")
        assert isinstance(told, HoldStands) and not told.already
        # What the first process had sent arrives now.
        assert (await stored(late[0])).missed == {told.found.hold.event_id}
        assert await house.events() == []
        assert await quick.holds.place(house.order()) == HoldEnded("released")
        assert await house.balance() == (100, 0)


async def test_a_capture_that_died_after_it_was_bound_is_finished_by_whoever_comes(house: House) -> None:
    async with process(house) as at:
        first, second = [await at.holds.place(house.order(name, 40)) for name in "ab"]
        assert isinstance(first, HoldStands) and isinstance(second, HoldStands)
        await house.bank.ledger.database.execute(
            "UPDATE external_holds SET transaction_id = 't', asked_amount = 40 WHERE request_id = 'a'"
        )
        told = await at.holds.capture(second.found.hold.hold_id, CaptureOrder("t", None, exact=True))
        assert isinstance(told, HoldCaptured)
        assert told.charged.hold.request_id == "a", "it was under way, and may not be charged twice"
        assert await house.events() == ["captured", "released"]
        assert await house.balance() == (60, 0)


async def test_a_release_that_died_half_way_is_finished_by_the_capture_that_it_refuses(house: House) -> None:
    async with process(house) as at:
        placed = await at.holds.place(house.order())
        assert isinstance(placed, HoldStands)
        await house.bank.ledger.database.execute("UPDATE external_holds SET released_at = now()")
        told = await at.holds.capture(placed.found.hold.hold_id, CaptureOrder("t", None, exact=True))
        assert told == HoldEnded("released")
        assert await house.events() == ["released"]


async def test_without_its_task_nothing_is_taken(house: House) -> None:
    async with process(house) as at:
        at.nursery.cancel_scope.cancel()
        assert await at.holds.place(house.order()) == Draining()
        assert await house.events() == []


async def test_who_leaves_does_not_stop_what_he_asked_for(house: House) -> None:
    async with process(house) as at:
        with trio.CancelScope() as scope:
            scope.cancel()
            await at.holds.place(house.order())
        told = await at.holds.place(house.order())
        assert isinstance(told, HoldStands)
        with trio.CancelScope() as scope:
            scope.cancel()
            await at.holds.capture(told.found.hold.hold_id, CaptureOrder("t", None, exact=True))
        captured = await at.holds.capture(told.found.hold.hold_id, CaptureOrder("t", None, exact=True))
        assert isinstance(captured, HoldCaptured)
        assert await house.events() == ["captured"]


# --- anything at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*range(4), *[pytest.param(each, marks=pytest.mark.proof) for each in range(4, 80)]])
async def test_whatever_is_asked_at_once_a_transaction_is_charged_once_and_every_success_is_true(
    house: House, seed: int
) -> None:
    """Two processes, few names, few transactions, and writes that go wrong; what was said is compared in the end."""
    random, ledger = Random(seed), house.bank.ledger
    await ledger.locked(house.bank.vault_id, Grant(Stroops(random.choice((100, 10_000))), "some"))
    said: dict[str, set[tuple[HoldId, int]]] = defaultdict(set)
    released: set[HoldId] = set()
    async with process(house) as one, process(house) as two:
        for each in (one, two):
            each.store.fault = lambda: random.choice(("ok",) * 12 + ("lost", "stored", "unavailable"))

        async def worker() -> None:
            for _ in range(12):
                at, name = random.choice((one, two)), f"r-{random.randrange(4)}"
                with suppress(CalloraFault):
                    await step(at, name)

        async def step(at: Process, name: str) -> None:
            found = await reads.find_request(ledger.database, house.bank.vault_id, name)
            action = random.choices(("place", "capture", "extend", "release", "expire"), (5, 6, 2, 1, 1))[0]
            if found is None or action == "place":
                await at.holds.place(house.order(name, 20))
                return
            hold = found.hold
            if action == "capture":
                transaction, amount = f"t-{random.randrange(3)}", random.choice((None, 20, 15, 30))
                order = CaptureOrder(transaction, None if amount is None else Stroops(amount), random.random() < 0.5)
                told = await at.holds.capture(hold.hold_id, order)
                if isinstance(told, HoldCaptured):
                    said[transaction].add((told.charged.hold.hold_id, told.charged.amount))
            elif action == "extend":
                await at.holds.extend(hold.hold_id, 1, Stroops(5), f"x-{random.randrange(2)}")
            elif action == "release":
                if isinstance(await at.holds.release(hold.hold_id), HoldStands):
                    released.add(hold.hold_id)
            elif found.state == "held":
                ledger.clock.advance(TTL + 1)
                await at.running.ask(expire(hold.event_id, found.held_amount), house.bank.vault_id)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(worker)
        for each in (one, two):
            each.fail()
        ledger.clock.advance(TTL + 13)  # what was extended as well
        for row in await ledger.database.fetch("SELECT event_id, held_amount FROM usage_events WHERE state = 'held'"):
            await one.running.ask(expire(EventId(str(row["event_id"])), row["held_amount"]), house.bank.vault_id)
    rows = await ledger.database.fetch(
        "SELECT h.hold_id::text AS hold_id, h.transaction_id, h.asked_amount, u.state::text AS state, u.amount,"
        " u.outcome FROM external_holds h LEFT JOIN usage_events u ON u.event_id = h.event_id"
    )
    captured = {row["transaction_id"]: (row["hold_id"], row["amount"]) for row in rows if row["state"] == "captured"}
    assert len(captured) == sum(row["state"] == "captured" for row in rows) == (await house.events()).count("captured")
    for transaction, charges in said.items():
        assert charges == {captured[transaction]}, "what was said to be charged is, once"
    assert not released & {hold_id for hold_id, _ in captured.values()}, "what was said to be released is not charged"
    events = Counter(await house.events())
    print(f"\nseed {seed}: {len(rows)} holds, {events}, {len(said)} transactions, {await house.balance()} left")


async def test_an_expired_hold_whose_re_reservation_died_is_placed_by_the_next_capture(house: House) -> None:
    async with process(house) as at:
        placed = await at.holds.place(house.order())
        assert isinstance(placed, HoldStands)
        hold = placed.found.hold
        house.bank.ledger.clock.advance(TTL + 1)
        expired = await at.running.ask(expire(hold.event_id, AMOUNT), house.bank.vault_id)
        assert isinstance(expired, HoldClosed)
        at.fail("lost")
        with pytest.raises(OutcomeUnknown):
            await at.holds.capture(hold.hold_id, CaptureOrder("t", None, exact=True))
        found = await reads.find_hold(house.bank.ledger.database, hold.hold_id)
        assert found is not None and (found.state, found.hold.transaction_id) == (None, None)
        told = await at.holds.capture(hold.hold_id, CaptureOrder("t", None, exact=True))
        assert isinstance(told, HoldCaptured)
        assert await house.events() == ["captured", "expired"]
