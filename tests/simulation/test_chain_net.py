"""The net holds: bugs planted in the rules and the submitter are each caught by the simulation."""

from collections.abc import Callable
from typing import Any, cast

import attrs
import pytest
import trio

from callora.actors import submitter
from callora.actors.follower import Follower, Network
from callora.actors.submitter import Submitter
from callora.ledger import submission as rules
from callora.ledger.chain import Applied, Envelope, NotSeen
from callora.ledger.faults import ChainOutcomeUnknown, ChainUnavailable, OutcomeUnknown
from callora.ledger.submission import Course, Finish, Step, Submission
from tests.simulation.chain_world import simulate_chain
from tests.simulation.sky import GENESIS, seal, unseal

SEEDS = 400
LEDGERS = 150

Plant = Callable[[pytest.MonkeyPatch], None]


def take_not_found_for_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Submission, "proven_dead", lambda self, answer: True)


def take_the_past_for_proof_whatever_the_node_kept(patch: pytest.MonkeyPatch) -> None:
    def proves(self: NotSeen, max_time: int, prepared_ledger: int) -> bool:
        return self.retained.latest.closed_at.timestamp() > max_time

    patch.setattr(NotSeen, "proves_dead", proves)


def take_when_it_came_for_when_a_wallet_could_first_send_it(patch: pytest.MonkeyPatch) -> None:
    original = Submitter.pass_on

    async def pass_on(self: Submitter, purpose: str, envelope: Envelope, _: int, *, sponsored: bool = False) -> str:
        latest = (await self._tools.chain.retained()).latest.sequence
        return await original(self, purpose, envelope, latest, sponsored=sponsored)

    patch.setattr(Submitter, "pass_on", pass_on)


def take_silence_for_a_send_that_did_not_happen(patch: pytest.MonkeyPatch) -> None:
    original = Follower._sent

    async def sent(self: Follower, envelope: Envelope) -> Any:
        chain = self._tools.chain

        class Deaf:
            async def send(self, envelope: Envelope) -> Any:
                try:
                    return await chain.send(envelope)
                except ChainOutcomeUnknown as fault:
                    raise ChainUnavailable(str(fault)) from fault

        tools = self._tools
        self._tools = attrs.evolve(tools, chain=cast(Network, Deaf()))
        try:
            return await original(self, envelope)
        finally:
            self._tools = tools

    patch.setattr(Follower, "_sent", sent)


def count_a_refusal_twice_in_doubt(patch: pytest.MonkeyPatch) -> None:
    async def untaken(self: Follower, news: Any, refusal: str | None) -> Any:
        store, tx_hash = self._tools.store, self._course.submission.hash
        while True:
            try:
                noted = await store.note_untaken(tx_hash, refusal)
                break
            except OutcomeUnknown:
                await trio.sleep(0.1)
            except Exception:
                await trio.sleep(0.1)
        if noted is None or noted.state not in rules.OPEN:
            return await self._reload()
        self._keep(noted)
        return news

    patch.setattr(Follower, "_untaken", untaken)


def send_what_is_not_identical(patch: pytest.MonkeyPatch) -> None:
    original = Follower._sent

    async def sent(self: Follower, envelope: Envelope) -> Any:
        if self._course.submission.sends > 1 and envelope.inner_hash is None:
            fields = unseal(envelope)
            envelope = seal({**fields, "max_time": fields["max_time"] + 5})
        return await original(self, envelope)

    patch.setattr(Follower, "_sent", sent)


def try_again_what_the_contract_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rules, "goes_away", lambda applied: not applied.successful)


def forget_what_was_done(patch: pytest.MonkeyPatch) -> None:
    def finish(course: Course, applied: Applied) -> Step:
        return Finish(applied, closes_purpose=False)

    patch.setattr(rules, "_finish", finish)


def leave_what_a_crashed_process_had_under_way(patch: pytest.MonkeyPatch) -> None:
    async def sweep(self: Submitter, foreign_seconds: float) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(Submitter, "_sweep", sweep)


def never_ask_again_what_nobody_could_tell(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rules, "UNRESOLVED_POLL_SECONDS", 1e9)


def answer_before_the_end(patch: pytest.MonkeyPatch) -> None:
    done = Applied(True, 1, GENESIS, "tx_success", None, None, None, 0)
    original = rules.stand

    def stand(history: Any, epoch: int) -> Any:
        standing = original(history, epoch)
        return done if isinstance(standing, rules.Follow) and standing.submission.sends else standing

    patch.setattr(submitter, "stand", stand)


PLANTS: dict[Plant, int] = {
    take_not_found_for_dead: 0,
    take_the_past_for_proof_whatever_the_node_kept: 15,
    take_when_it_came_for_when_a_wallet_could_first_send_it: 19,
    take_silence_for_a_send_that_did_not_happen: 14,
    count_a_refusal_twice_in_doubt: 58,
    send_what_is_not_identical: 0,
    try_again_what_the_contract_refused: 13,
    forget_what_was_done: 1,
    leave_what_a_crashed_process_had_under_way: 0,
    never_ask_again_what_nobody_could_tell: 80,
    answer_before_the_end: 0,
}
"""Each with a seed that is known to catch it, which is tried first; a change of the rules may change which do."""


@pytest.mark.parametrize(("plant", "known"), PLANTS.items(), ids=[plant.__name__ for plant in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(simulate_chain(seed, LEDGERS) for seed in (known, *range(SEEDS))), "no seed caught it"
