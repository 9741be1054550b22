"""The net holds: bugs planted in the actors and the writer are each caught by the simulation."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

from callora.actors.compensation import Compensator
from callora.actors.mailbox import Envelope
from callora.actors.registry import VaultRegistry
from callora.actors.vault import VaultActor
from callora.actors.writer import Stake, Writer
from callora.ledger import vault as rules
from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.outcomes import HoldClosed, HoldPlaced
from callora.ledger.rounds import CLEAN, RoundResult, Share
from tests.simulation.store import SimulatedStore
from tests.simulation.world import simulate

SEEDS = 200

Plant = Callable[[pytest.MonkeyPatch], None]


def skip_the_version_guard(patch: pytest.MonkeyPatch) -> None:
    def new_share(self: VaultActor) -> Share:
        assert self.state is not None
        share = Share(self.vault_id, self.state.version, guarded=False)
        self.state.version += 1
        return share

    patch.setattr(VaultActor, "_new_share", new_share)
    patch.setattr(SimulatedStore, "lose_what_knows_no_limits", lambda self, shares: None)


def keep_what_was_decided_on_a_lost_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Share, "void", lambda self: None)


def understate_what_a_share_needs(patch: pytest.MonkeyPatch) -> None:
    original = Share.place

    def place(self: Share, hold: PlaceHold) -> None:
        original(self, hold)
        self.need = 0

    patch.setattr(Share, "place", place)


def reply_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    original = VaultActor._stake

    def stake(self: VaultActor, envelope: Envelope) -> Stake:
        staked = original(self, envelope)
        if isinstance(envelope.command, PlaceHold):
            staked.envelopes.remove(envelope)
            self._staked -= 1
            envelope.reply.resolve(HoldPlaced(envelope.available))
        return staked

    patch.setattr(VaultActor, "_stake", stake)


def forget_that_a_hold_is_on_its_way(patch: pytest.MonkeyPatch) -> None:
    original = VaultActor._forget_placing

    def forget(self: VaultActor, command: PlaceHold) -> Sequence[Envelope]:
        followers = original(self, command)
        self._placing.add(command.event_id)
        return followers

    patch.setattr(VaultActor, "_forget_placing", forget)


def drop_a_follower(patch: pytest.MonkeyPatch) -> None:
    def follow(self: VaultActor, event_id: Any) -> list[Envelope]:
        self._followers.pop(event_id, [])
        return []

    patch.setattr(VaultActor, "_follow", follow)


def treat_unknown_as_failure(patch: pytest.MonkeyPatch) -> None:
    original = VaultActor.failed

    def failed(self: VaultActor, stake: Stake, fault: CalloraFault) -> None:
        original(self, stake, StoreUnavailable(str(fault)) if isinstance(fault, OutcomeUnknown) else fault)

    patch.setattr(VaultActor, "failed", failed)


def treat_unknown_as_success(patch: pytest.MonkeyPatch) -> None:
    def retry_or_fail(self: VaultActor, envelope: Envelope, fault: CalloraFault) -> None:
        command = envelope.command
        assert isinstance(command, CloseHold)
        envelope.reply.resolve(HoldClosed(command.state, command.amount, envelope.available))

    patch.setattr(VaultActor, "_retry_or_fail", retry_or_fail)


def give_up_a_retried_close_as_not_written(patch: pytest.MonkeyPatch) -> None:
    def retry_or_fail(self: VaultActor, envelope: Envelope, fault: CalloraFault) -> None:
        envelope.reply.fail(StoreUnavailable("not written"))

    patch.setattr(VaultActor, "_retry_or_fail", retry_or_fail)


def overlook_what_a_round_missed(patch: pytest.MonkeyPatch) -> None:
    original = Writer._tell

    def tell(self: Writer, stakes: Any, result: RoundResult) -> None:
        original(self, stakes, RoundResult(result.lost, result.drifted, frozenset()))

    patch.setattr(Writer, "_tell", tell)


def overlook_what_a_round_lost(patch: pytest.MonkeyPatch) -> None:
    original = Writer._tell

    def tell(self: Writer, stakes: Any, result: RoundResult) -> None:
        original(self, stakes, CLEAN)

    patch.setattr(Writer, "_tell", tell)


def keep_a_state_that_did_not_come_to_be(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VaultActor, "_void_decided", lambda self: None)


def refuse_on_a_cached_state(patch: pytest.MonkeyPatch) -> None:
    original = VaultActor._decide

    def decide(self: VaultActor, envelope: Envelope, command: Any, *, final: bool) -> bool:
        return original(self, envelope, command, final=True)

    patch.setattr(VaultActor, "_decide", decide)


def close_one_hold_twice_in_a_round(patch: pytest.MonkeyPatch) -> None:
    class Nothing(set[Any]):
        def add(self, _: Any) -> None:
            pass

    original = VaultActor.__init__

    def init(self: VaultActor, *args: Any) -> None:
        original(self, *args)
        self._closing = Nothing()

    patch.setattr(VaultActor, "__init__", init)


def give_back_the_same_money_twice(patch: pytest.MonkeyPatch) -> None:
    original = rules.apply_close

    def apply_close(state: rules.VaultState, command: CloseHold) -> None:
        original(state, command)
        original(state, command)

    patch.setattr("callora.actors.vault.apply_close", apply_close)


def lose_what_is_to_be_repeated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VaultActor, "_repeat", lambda self, envelopes: None)


def leave_the_hand_unanswered_after_a_crash(patch: pytest.MonkeyPatch) -> None:
    def abandon(self: VaultActor) -> None:
        self.state = None
        self._take_waiting()
        self._again.clear()

    patch.setattr(VaultActor, "abandon", abandon)


def leave_the_mailbox_unanswered_when_failing_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VaultActor, "end", lambda self: self._outbox.close())


def drop_what_was_never_sent_when_a_round_is_split(patch: pytest.MonkeyPatch) -> None:
    async def store_alone(self: Writer, stakes: list[Stake], fault: CalloraFault) -> None:
        if len(stakes) == 1:
            stakes[0].holder.failed(stakes[0], fault)
            return
        await self._store_round(stakes[:1], 1)

    patch.setattr(Writer, "_store_alone", store_alone)


def answer_an_interrupted_round_as_not_written(patch: pytest.MonkeyPatch) -> None:
    original = Writer._commit

    async def commit(self: Writer, stakes: Any) -> RoundResult:
        try:
            return await original(self, stakes)
        except CalloraFault:
            raise
        except Exception as error:
            raise StoreUnavailable(str(error)) from error

    patch.setattr(Writer, "_commit", commit)


def compensate_nothing(patch: pytest.MonkeyPatch) -> None:
    async def undo(self: Compensator, call: Any) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    patch.setattr(Compensator, "_undo", undo)


def keep_a_crashed_actors_commands_to_itself(patch: pytest.MonkeyPatch) -> None:
    async def supervise(self: VaultRegistry, actor: VaultActor) -> None:
        try:
            await actor.run()
        except Exception:
            self._actors.pop(actor.vault_id, None)

    patch.setattr(VaultRegistry, "_supervise", supervise)


def overtake_those_who_wait(patch: pytest.MonkeyPatch) -> None:
    original = VaultActor.send

    def send(self: VaultActor, envelope: Envelope) -> None:
        command = envelope.command
        if self.state is None or not isinstance(command, CloseHold) or not self._decide_at_once(envelope, command):
            original(self, envelope)

    patch.setattr(VaultActor, "send", send)


PLANTS: list[Plant] = [
    overtake_those_who_wait,
    skip_the_version_guard,
    keep_what_was_decided_on_a_lost_share,
    understate_what_a_share_needs,
    reply_before_the_commit,
    forget_that_a_hold_is_on_its_way,
    drop_a_follower,
    treat_unknown_as_failure,
    treat_unknown_as_success,
    give_up_a_retried_close_as_not_written,
    overlook_what_a_round_missed,
    overlook_what_a_round_lost,
    keep_a_state_that_did_not_come_to_be,
    refuse_on_a_cached_state,
    close_one_hold_twice_in_a_round,
    give_back_the_same_money_twice,
    lose_what_is_to_be_repeated,
    leave_the_hand_unanswered_after_a_crash,
    leave_the_mailbox_unanswered_when_failing_closed,
    drop_what_was_never_sent_when_a_round_is_split,
    answer_an_interrupted_round_as_not_written,
    compensate_nothing,
    keep_a_crashed_actors_commands_to_itself,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(simulate(seed) for seed in range(SEEDS)), "no seed caught it"
