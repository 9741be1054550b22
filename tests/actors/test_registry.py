"""The registry: what it refuses, how it retires, drains, and fails closed."""

from collections.abc import Sequence

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from callora.actors import registry
from callora.actors.mailbox import Envelope
from callora.actors.registry import FAILED_CLOSED_SECONDS, IDLE_SECONDS, RESTARTS_MAX, SWEEP_SECONDS
from callora.ledger.commands import CloseHold, Deposit, PlaceHold
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    Draining,
    HoldClosed,
    HoldNotOpen,
    HoldPlaced,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
)
from callora.ledger.vault import VaultState
from tests.simulation.store import Fate, Scripted, SimulatedStore, Tables
from tests.simulation.support import CHARGED, OTHER_VAULT, VAULT, captured, event, place, released, running


def store_with(available: int = 1000, **fates: list[Fate]) -> SimulatedStore:
    """Return a store with two vaults."""
    tables = Tables()
    tables.add_vault(VAULT, available)
    tables.add_vault(OTHER_VAULT, available)
    return SimulatedStore(tables, Scripted(**fates))


@attrs.define
class Switch:
    """A policy that crashes while it is on."""

    on: bool = True

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Crash, or allow."""
        if self.on:
            raise ZeroDivisionError
        return None

    def place(self, command: PlaceHold) -> None:
        """Count nothing."""

    def room(self, command: PlaceHold) -> None:
        """Leave others none."""

    def close(self, command: CloseHold) -> None:
        """Count nothing."""

    def carried(self, placed: int) -> "Switch":
        """Return the same."""
        return self


@attrs.frozen
class CrashesAt:
    """A policy that crashes at one hold."""

    hold: PlaceHold

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Crash, or allow."""
        if command == self.hold:
            raise ZeroDivisionError
        return None

    def place(self, command: PlaceHold) -> None:
        """Count nothing."""

    def room(self, command: PlaceHold) -> None:
        """Leave others none."""

    def close(self, command: CloseHold) -> None:
        """Count nothing."""

    def carried(self, placed: int) -> "CrashesAt":
        """Return the same."""
        return self


async def outcome_of(envelope: Envelope) -> str:
    """Return the name of what a command came to, a fault or not."""
    try:
        return type(await envelope.reply.wait()).__name__
    except CalloraFault as fault:
        return type(fault).__name__


async def test_a_full_mailbox_refuses_holds_and_deposits_and_never_a_close(autojump_clock: MockClock) -> None:
    store = store_with()
    async with running(store, mailbox_max=5) as at:
        await at.ask(place(1, 1))
        store.gate = trio.Event()
        taken = [at.send(place(number, 1)) for number in range(2, 7)]
        await wait_all_tasks_blocked()
        for command in (place(7, 1), Deposit(Stroops(1), "d")):
            assert await at.ask(command) == Overloaded(), "decided or not, what has no answer counts"
        closes = [at.send(captured(1, 1)), *(at.send(released(number, 1)) for number in range(2, 7))]
        store.gate.set()
        assert [await outcome_of(each) for each in taken] == ["HoldPlaced"] * 5
        assert [await outcome_of(each) for each in closes] == ["HoldClosed"] * 6
        assert isinstance(await at.ask(place(8, 1)), HoldPlaced), "and then there is room again"
    assert event(7) not in store.tables.events


async def test_the_mailbox_bound_also_holds_while_the_actor_waits_for_the_store(autojump_clock: MockClock) -> None:
    store = store_with()
    assert isinstance(store._weather, Scripted)
    store._weather.seconds = 1.0
    async with running(store, mailbox_max=3) as at:
        envelopes = [Envelope(place(number, 1)) for number in range(5)]
        assert [at.registry.send(VAULT, each) for each in envelopes] == [None, None, None, Overloaded(), Overloaded()]
        await trio.sleep(0.5)
        assert at.registry.send(VAULT, Envelope(place(9, 1))) == Overloaded(), "in hand, not in the mailbox"


async def test_one_vaults_full_mailbox_is_not_another_vaults(autojump_clock: MockClock) -> None:
    store = store_with()
    async with running(store, mailbox_max=1) as at:
        at.send(place(1, 1))
        assert await at.ask(place(2, 1)) == Overloaded()
        assert isinstance(await at.ask(place(3, 1), OTHER_VAULT), HoldPlaced)


async def test_an_idle_actor_is_retired_and_the_next_command_starts_another(autojump_clock: MockClock) -> None:
    store = store_with()
    async with running(store) as at:
        for number in range(5):
            assert isinstance(await at.ask(place(number, 1)), HoldPlaced)
            assert at.registry.active == 1
            await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
            assert at.registry.active == 0


async def test_the_state_of_a_retired_vault_is_kept_and_its_next_call_reads_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "STATES_MAX", 1)
    store = store_with()
    read: list[str] = []
    load = store.load_vaults

    async def counted(vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        read.extend(vault_ids)
        return await load(vault_ids)

    monkeypatch.setattr(store, "load_vaults", counted)
    async with running(store) as at:
        for number in range(3):
            assert await at.ask(place(number, 1)) == HoldPlaced(Stroops(999 - number))
            await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        assert read == [VAULT]
        await at.ask(place(3, 1), OTHER_VAULT)
        await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        assert await at.ask(place(4, 1)) == HoldPlaced(Stroops(996))
        assert read == [VAULT, OTHER_VAULT, VAULT], "the one retired last is kept"


async def test_a_kept_state_that_is_stale_refuses_nobody(autojump_clock: MockClock) -> None:
    store = store_with(available=5)
    async with running(store) as at:
        await at.ask(place(1, 5))
        await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        await store.commit_locked(VAULT, Deposit(Stroops(3), "by another process"))
        assert await at.ask(place(2, 3)) == HoldPlaced(Stroops(0))
        assert isinstance(await at.ask(place(3, 1)), InsufficientFunds)


async def test_a_kept_state_that_is_stale_tells_nobody_a_wrong_balance(autojump_clock: MockClock) -> None:
    store = store_with(available=10)
    async with running(store) as at:
        await at.ask(place(1, 1))
        await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        await store.commit_locked(VAULT, Deposit(Stroops(100), "by another process"))
        both = [at.send(place(2, 2)), at.send(place(3, 3))]
        assert [await each.reply.wait() for each in both] == [HoldPlaced(Stroops(107)), HoldPlaced(Stroops(104))]
        await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        await store.commit_locked(VAULT, Deposit(Stroops(100), "by another process again"))
        assert await at.ask(captured(2, 2)) == HoldClosed("captured", Stroops(2), Stroops(204))


async def test_a_drain_waits_for_what_was_decided_without_a_task(autojump_clock: MockClock) -> None:
    store = store_with()

    async def open_the_gate() -> None:
        await trio.sleep(1000)
        assert store.gate is not None
        store.gate.set()

    async with trio.open_nursery() as nursery:
        async with running(store) as at:
            await at.ask(place(1, 1))
            await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
            store.gate = trio.Event()
            nursery.start_soon(open_the_gate)
            hold = at.send(place(2, 1))
        assert hold.reply.settled
    assert isinstance(await hold.reply.wait(), HoldPlaced)


async def test_a_busy_actor_is_not_retired_however_long_its_commit_takes(autojump_clock: MockClock) -> None:
    store = store_with()
    store.gate = trio.Event()
    async with running(store) as at:
        hold = at.send(place(1, 1))
        await trio.sleep(10 * IDLE_SECONDS)
        assert at.registry.active == 1
        store.gate.set()
        assert isinstance(await hold.reply.wait(), HoldPlaced)


@pytest.mark.parametrize("before", [-1, 0, 1])
async def test_a_command_in_the_very_moment_of_retirement_is_carried_out(
    autojump_clock: MockClock, before: int
) -> None:
    store = store_with()
    async with running(store) as at:
        at.send(place(1, 1))
        await wait_all_tasks_blocked()
        actor = at.registry._actors[VAULT]
        if before < 0:
            hold = at.send(place(2, 1))
        at.registry._retire(VAULT)
        if before > 0:
            await wait_all_tasks_blocked()
        if before >= 0:
            hold = at.send(place(2, 1))
            assert at.registry._actors[VAULT] is not actor
        release = at.send(released(2, 1)) if before >= 0 else None
        assert isinstance(await hold.reply.wait(), HoldPlaced)
        if release is not None:
            assert isinstance(await release.reply.wait(), HoldClosed)


async def test_closing_drains_what_was_taken_and_takes_nothing_more(autojump_clock: MockClock) -> None:
    store = store_with(round=["ok", "unavailable", "ok", "unknown_stored"])
    assert isinstance(store._weather, Scripted)
    store._weather.seconds = 0.1
    async with running(store) as at:
        await at.ask(place(1, 1))
        envelopes = [at.send(place(2, 1)), at.send(captured(1, 1)), at.send(released(2, 1))]
        envelopes += [at.send(Deposit(Stroops(1), "d")), at.send(place(3, 5000)), at.send(place(4, 1), OTHER_VAULT)]
        at.registry.close()
        assert await at.ask(place(5, 1)) == Draining()
        assert await at.ask(place(5, 1), OTHER_VAULT) == Draining()
        told = [await outcome_of(each) for each in envelopes]
        assert told[0] in ("HoldPlaced", "StoreUnavailable")
        assert told[1:5] == ["HoldClosed", "HoldNotOpen", "BalanceMoved", "InsufficientFunds"]
    assert store.tables.vaults[VAULT].held == 0


async def test_closing_twice_is_closing_once(autojump_clock: MockClock) -> None:
    async with running(store_with()) as at:
        await at.ask(place(1, 1))
        at.registry.close()
        at.registry.close()


async def test_before_it_runs_and_after_it_was_cancelled_nothing_is_taken(autojump_clock: MockClock) -> None:
    store = store_with()
    async with running(store) as at:
        await at.ask(place(1, 1))
        at.registry_scope.cancel()
        assert at.send(place(2, 1)).reply is not None, "taken before it knew"
        await wait_all_tasks_blocked()
        assert at.registry.active == 0
        assert await at.ask(place(3, 1)) == Draining()
        assert await at.ask(released(1, 1)) == Draining()


async def test_past_the_restart_intensity_a_vault_fails_closed_and_then_recovers(autojump_clock: MockClock) -> None:
    store, switch = store_with(), Switch()

    def policies(state: VaultState) -> list[Switch]:
        return [switch] if state.vault_id == VAULT else []

    async with running(store, policies=policies) as at:
        for number in range(RESTARTS_MAX):
            assert await outcome_of(at.send(place(number, 1))) == "OutcomeUnknown"
        last = at.send(place(50, 1))
        assert await outcome_of(last) == "OutcomeUnknown"
        assert at.log.events.count("vault_actor_crashed") == RESTARTS_MAX + 1
        for command in (place(60, 1), captured(60, 1), Deposit(Stroops(1), "d")):
            with pytest.raises(StoreUnavailable):
                await at.ask(command)
        assert isinstance(await at.ask(place(61, 1), OTHER_VAULT), HoldPlaced), "the others go on"
        switch.on = False
        await trio.sleep(FAILED_CLOSED_SECONDS + SWEEP_SECONDS)
        assert isinstance(await at.ask(place(62, 1)), HoldPlaced)
        await trio.sleep(2 * FAILED_CLOSED_SECONDS)
        assert at.registry._records == {}


async def test_a_vault_that_fails_closed_answers_all_it_has_even_what_is_with_the_writer(
    autojump_clock: MockClock,
) -> None:
    switch = Switch(on=False)
    # The capture's round comes to nothing, so an actor that is no more would try it again.
    store = store_with(round=["ok", "ok", "unavailable"])
    async with running(store, policies=lambda _: [switch]) as at:
        await at.ask(place(1, 1))
        await at.ask(place(2, 1))
        switch.on = True
        for number in range(RESTARTS_MAX):
            assert await outcome_of(at.send(place(100 + number, 1))) == "OutcomeUnknown"
            await trio.sleep(0.5)
        switch.on = False
        store.gate = trio.Event()
        crash = PlaceHold(event(200), Stroops(1), 60, CHARGED)
        store.policies = lambda _: [CrashesAt(crash)]
        with_the_writer = [at.send(place(3, 1)), at.send(captured(1, 1)), at.send(captured(2, 1))]
        in_hand = [at.send(released(3, 1)), at.send(crash), at.send(released(200, 1))]
        await wait_all_tasks_blocked()
        assert at.registry.active == 0
        assert [await outcome_of(each) for each in in_hand[1:]] == ["OutcomeUnknown"] * 2
        store.gate.set()
        assert await outcome_of(with_the_writer[0]) == "StoreUnavailable"
        for each in (*with_the_writer[1:], in_hand[0]):
            assert await outcome_of(each) == "OutcomeUnknown", "nobody is left to try it again"


async def test_rare_crashes_never_close_a_vault(autojump_clock: MockClock) -> None:
    store, switch = store_with(), Switch()
    async with running(store, policies=lambda _: [switch]) as at:
        for number in range(4 * RESTARTS_MAX):
            assert await outcome_of(at.send(place(number, 1))) == "OutcomeUnknown"
            await trio.sleep(FAILED_CLOSED_SECONDS / RESTARTS_MAX + 1)
        switch.on = False
        assert isinstance(await at.ask(place(90, 1)), HoldPlaced)


async def test_a_crash_between_two_vaults_rounds_reaches_only_its_own(autojump_clock: MockClock) -> None:
    store, switch = store_with(), Switch()

    def policies(state: VaultState) -> list[Switch]:
        return [switch] if state.vault_id == VAULT else []

    async with running(store, policies=policies) as at:
        theirs = [at.send(place(number, 1), OTHER_VAULT) for number in range(10)]
        ours = at.send(place(50, 1))
        assert await outcome_of(ours) == "OutcomeUnknown"
        assert [await outcome_of(each) for each in theirs] == ["HoldPlaced"] * 10


async def test_a_writer_that_was_stopped_answers_what_it_had(autojump_clock: MockClock) -> None:
    store = store_with()
    store.gate = trio.Event()
    async with running(store, round_max=1) as at:
        envelopes = [at.send(place(number, 1)) for number in range(3)]
        await wait_all_tasks_blocked()
        at.writer_scope.cancel()
        assert [await outcome_of(each) for each in envelopes] == [
            "OutcomeUnknown",
            "StoreUnavailable",
            "StoreUnavailable",
        ]


async def test_what_is_unknown_is_raised_and_what_is_refused_is_returned(autojump_clock: MockClock) -> None:
    store = store_with(round=["unknown_lost"])
    async with running(store) as at:
        with pytest.raises(OutcomeUnknown):
            await at.ask(place(1, 1))
        assert await at.ask(released(1, 1)) == HoldNotOpen(None)
        assert isinstance(await at.ask(Deposit(Stroops(1), "d")), BalanceMoved)
