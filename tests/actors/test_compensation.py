"""What was charged and not delivered is undone, once, and nothing keeps the others waiting."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import pytest
import trio
from trio.testing import MockClock

from callora.actors.compensation import PAUSE_SECONDS, Compensator, Undelivered
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import HoldPlaced
from callora.service import SystemClock
from tests.simulation.store import Fate, Scripted, SimulatedStore, Tables
from tests.simulation.support import IDS, OTHER_VAULT, VAULT, Running, captured, event, place, running


@attrs.frozen
class Bench:
    """A compensator at work."""

    store: SimulatedStore
    running: Running
    compensator: Compensator

    async def charge(self, number: int, amount: int = 10, vault_id: VaultId = VAULT) -> None:
        """Hold and capture, and take whatever comes for unknown."""
        assert isinstance(await self.running.ask(place(number, amount), vault_id), HoldPlaced)
        with suppress(CalloraFault):
            await self.running.ask(captured(number, amount), vault_id)
        self.compensator.add(Undelivered(vault_id, event(number), Stroops(amount), Stroops(amount)))

    async def until_done(self) -> None:
        """Return when nothing is left to undo."""
        with trio.fail_after(1000):
            while self.compensator.pending:  # noqa: ASYNC110
                await trio.sleep(PAUSE_SECONDS)


@asynccontextmanager
async def bench(**fates: list[Fate]) -> AsyncIterator[Bench]:
    """Run a compensator on a simulated store."""
    tables = Tables()
    tables.add_vault(VAULT, 100)
    tables.add_vault(OTHER_VAULT, 100)
    store = SimulatedStore(tables, Scripted(**fates))
    async with running(store) as at:
        compensator = Compensator(at.registry, SystemClock(), IDS, at.log.logger())
        await at.nursery.start(compensator.run)
        yield Bench(store, at, compensator)
        at.registry_scope.cancel()
        at.nursery.cancel_scope.cancel()


AWAY: list[Fate] = ["unavailable"] * 400


async def test_an_unknown_capture_that_turns_out_captured_is_refunded_once(autojump_clock: MockClock) -> None:
    async with bench(round=["ok", "unknown_stored"], find=AWAY[:200]) as at:
        await at.charge(1)
        await at.until_done()
        vault = at.store.tables.vaults[VAULT]
        assert (vault.available, vault.held) == (100, 0)
        assert at.store.tables.events[event(1)].state == "captured", "what is closed stays closed"
        assert [each.amount for each in at.store.tables.refunds(event(1))] == [10]


async def test_a_capture_whose_answer_was_stored_for_a_retry_stands(autojump_clock: MockClock) -> None:
    async with bench(round=["ok", "unknown_stored"], find=AWAY[:200]) as at:
        assert isinstance(await at.running.ask(place(1, 10), VAULT), HoldPlaced)
        with suppress(CalloraFault):
            await at.running.ask(captured(1, 10), VAULT)
        at.compensator.add(Undelivered(VAULT, event(1), Stroops(10), Stroops(10), answer_kept=True))
        await at.until_done()
        vault = at.store.tables.vaults[VAULT]
        assert (vault.available, vault.held) == (90, 0)
        assert at.store.tables.refunds(event(1)) == []


async def test_an_unknown_capture_that_was_not_stored_is_released(autojump_clock: MockClock) -> None:
    async with bench(round=["ok", "unknown_lost"], find=AWAY[:200]) as at:
        await at.charge(1)
        await at.until_done()
        vault = at.store.tables.vaults[VAULT]
        assert (vault.available, vault.held) == (100, 0)
        assert at.store.tables.events[event(1)].state == "released"
        assert at.store.tables.refunds(event(1)) == []


@pytest.mark.parametrize("fate", ["unknown_stored", "unknown_lost", "unavailable", "bug_stored"])
async def test_a_refund_whose_own_outcome_is_unknown_is_repeated_and_booked_once(
    autojump_clock: MockClock, fate: Fate
) -> None:
    async with bench(locked=[fate, fate, fate]) as at:
        await at.charge(1)
        await at.until_done()
        assert at.store.tables.vaults[VAULT].available == 100
        assert len(at.store.tables.refunds(event(1))) == 1


async def test_a_free_call_is_undone_without_a_refund(autojump_clock: MockClock) -> None:
    async with bench() as at:
        await at.charge(1, amount=0)
        await at.until_done()
        assert at.store.tables.refunds(event(1)) == []


async def test_the_same_call_given_twice_is_refunded_once(autojump_clock: MockClock) -> None:
    async with bench() as at:
        await at.charge(1)
        at.compensator.add(at.compensator._pending[0])
        await at.until_done()
        assert at.store.tables.vaults[VAULT].available == 100


async def test_a_vault_that_keeps_failing_does_not_keep_the_others_waiting(autojump_clock: MockClock) -> None:
    async with bench() as at:
        missing = VaultId("missing")
        at.compensator.add(Undelivered(missing, event(9), Stroops(1), Stroops(1)))
        await at.charge(1)
        await at.charge(2, vault_id=OTHER_VAULT)
        with trio.fail_after(60):
            while len(at.compensator._pending) > 1:  # noqa: ASYNC110
                await trio.sleep(PAUSE_SECONDS)
        assert [each.vault_id for each in at.compensator._pending] == [missing]


async def test_what_was_never_held_is_nothing_to_undo(autojump_clock: MockClock) -> None:
    async with bench() as at:
        at.compensator.add(Undelivered(VAULT, event(5), Stroops(1), Stroops(1)))
        await at.until_done()
        assert at.store.tables.vaults[VAULT].available == 100
