"""The writer: one round in flight, the next gathers, and every stake is told exactly once what became of it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from callora.actors.writer import CONFLICT_RETRIES_MAX, Stake, Writer
from callora.ledger.commands import Deposit, PlaceHold
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.rounds import RoundResult, Share
from callora.ledger.vault import VaultState
from tests.simulation.store import Fate, Scripted, SimulatedStore, Tables
from tests.simulation.support import METRICS, Log, place

CONFLICTS: list[Fate] = ["conflict"] * 100


@attrs.define(eq=False)
class Holder:
    """Remembers what it is told."""

    told: list[str] = attrs.field(factory=list)
    present: VaultState | None = None

    def stored(self, stake: Stake, present: VaultState | None, missed: frozenset[EventId]) -> None:
        """Remember."""
        self.told.append("stored")
        self.present = present

    def lost(self, stake: Stake) -> None:
        """Remember."""
        self.told.append("lost")

    def failed(self, stake: Stake, fault: CalloraFault) -> None:
        """Remember."""
        self.told.append(type(fault).__name__)


@attrs.frozen
class Bench:
    """A writer at work on a simulated store."""

    writer: Writer
    store: SimulatedStore
    weather: Scripted
    log: Log
    rounds: list[list[VaultId]]
    scope: trio.CancelScope

    def stake(self, vault: int, number: int, amount: int = 1) -> Holder:
        """Hand in one hold of a vault of its own holder."""
        holder = Holder()
        self.stake_for(holder, vault, place(number, amount))
        return holder

    def stake_for(self, holder: Holder, vault: int, hold: PlaceHold) -> Stake:
        """Hand in one hold."""
        vault_id = VaultId(f"vault-{vault}")
        stake = self.writer.stake(holder, vault_id, lambda: Share(vault_id, 0, guarded=False))
        stake.share.place(hold)
        return stake


@asynccontextmanager
async def bench(*fates: Fate, vaults: int = 5, round_max: int = 100) -> AsyncIterator[Bench]:
    """Run a writer whose rounds have these fates."""
    tables, weather, log = Tables(), Scripted(round=fates), Log()
    for number in range(vaults):
        tables.add_vault(VaultId(f"vault-{number}"), 100)
    store = SimulatedStore(tables, weather)
    rounds: list[list[VaultId]] = []
    commit = store.commit_round

    async def watched(shares: Sequence[Share]) -> RoundResult:
        rounds.append([share.vault_id for share in shares])
        return await commit(shares)

    store.commit_round = watched  # type: ignore[method-assign]
    writer = Writer(store, METRICS, log.logger(), round_max)
    scope = trio.CancelScope()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(writer.run)
                task_status.started()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield Bench(writer, store, weather, log, rounds, scope)
        scope.cancel()


async def test_what_comes_while_a_round_is_in_flight_gathers_into_the_next() -> None:
    async with bench() as at:
        at.store.gate = trio.Event()
        first = at.stake(0, 1)
        await trio.testing.wait_all_tasks_blocked()
        others = [at.stake(number, 10 + number) for number in range(4)]
        at.store.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert [len(each) for each in at.rounds] == [1, 4]
        assert [each.told for each in (first, *others)] == [["stored"]] * 5


async def test_a_full_round_lets_the_next_begin_and_rounds_of_a_vault_stay_in_order() -> None:
    async with bench(round_max=2) as at:
        at.store.gate = trio.Event()
        holder = Holder()
        stakes = [at.stake_for(holder, 0, place(number, 1)) for number in range(7)]
        assert len({id(each) for each in stakes}) == 4
        at.store.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(at.rounds) == 4
        assert len(at.store.tables.events) == 7


@pytest.mark.parametrize(
    ("fate", "told"),
    [
        ("unavailable", "StoreUnavailable"),
        ("unknown_lost", "OutcomeUnknown"),
        ("unknown_stored", "OutcomeUnknown"),
        ("bug", "OutcomeUnknown"),
        ("bug_stored", "OutcomeUnknown"),
    ],
)
async def test_everybody_in_a_failed_round_is_told_and_the_next_round_is_stored(fate: Fate, told: str) -> None:
    async with bench(fate) as at:
        holders = [at.stake(number, number) for number in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        assert [each.told for each in holders] == [[told]] * 3
        later = at.stake(0, 50)
        await trio.testing.wait_all_tasks_blocked()
        assert later.told == ["stored"]


async def test_a_conflict_is_repeated_within_a_bound() -> None:
    async with bench(*CONFLICTS[:CONFLICT_RETRIES_MAX]) as at:
        holder = at.stake(0, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert holder.told == ["stored"]
        assert len(at.rounds) == CONFLICT_RETRIES_MAX + 1


async def test_a_conflict_that_stays_is_given_up_as_not_written() -> None:
    async with bench(*CONFLICTS) as at:
        holders = [at.stake(number, number) for number in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        assert [each.told for each in holders] == [["StoreUnavailable"]] * 2
        assert at.store.tables.events == {}


async def test_only_the_guilty_share_of_a_refused_round_is_refused() -> None:
    async with bench() as at:
        at.stake(1, 7)
        await trio.testing.wait_all_tasks_blocked()
        holders = [at.stake(0, 1), at.stake(1, 7), at.stake(2, 3)]  # event 7 is there already
        await trio.testing.wait_all_tasks_blocked()
        assert [each.told for each in holders] == [["stored"], ["StoreRefused"], ["stored"]]
        assert at.log.events == ["share_refused"]


@pytest.mark.parametrize("at_stake", [1, 2, 3])
async def test_a_writer_stopped_while_it_stores_one_by_one_tells_those_it_never_sent(at_stake: int) -> None:
    async with bench("refused") as at:
        holders = [at.stake(number, number) for number in range(3)]

        def stop() -> None:
            if len(at.rounds) == 1 + at_stake:
                at.scope.cancel()

        at.store.before_commit = stop
        await trio.testing.wait_all_tasks_blocked()
        assert all(len(each.told) == 1 for each in holders), "each is told once, whatever it is"
        never_sent = holders[at_stake:]
        assert [each.told for each in never_sent] == [["StoreUnavailable"]] * len(never_sent)


async def test_a_stopped_writer_fails_what_it_never_sent_as_not_written() -> None:
    async with bench(round_max=1) as at:
        at.store.gate = trio.Event()
        in_flight = at.stake(0, 1)
        await trio.testing.wait_all_tasks_blocked()
        waiting = [at.stake(number, 10 + number) for number in range(1, 4)]
        at.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert in_flight.told == ["OutcomeUnknown"]
        assert [each.told for each in waiting] == [["StoreUnavailable"]] * 3


async def test_losers_are_told_and_drift_is_told() -> None:
    async with bench() as at:
        at.store.tables.store_locked(VaultId("vault-0"), Deposit(Stroops(1), "behind its back"))
        holders = [at.stake(0, 1), at.stake(1, 2, amount=1000), at.stake(2, 3)]
        await trio.testing.wait_all_tasks_blocked()
        assert [each.told for each in holders] == [["stored"], ["lost"], ["stored"]]
        assert holders[0].present is not None and holders[0].present.available == 100
        assert holders[2].present is None
