"""The rules of sending: each row of the table of answers, and the golden rules whatever comes."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.chain import Applied, ContractFault, Envelope, FeeStats, Head, NotSeen, Retained, Sent
from callora.ledger.submission import (
    BUMP_FACTOR,
    FAILURES_MAX,
    OPEN,
    OPINIONS,
    POLL_SECONDS_MAX,
    PUT_OFF_MAX,
    STUCK_LEDGERS,
    UNPROVEN_LOOKS_MAX,
    UNRESOLVED_POLL_SECONDS,
    Alive,
    Answered,
    AskWitness,
    Build,
    Bump,
    Bumped,
    Bury,
    Course,
    Dead,
    FeeBump,
    Finish,
    Follow,
    Look,
    Looked,
    News,
    NotBumped,
    NotLooked,
    NotSent,
    Opinion,
    Send,
    Shelve,
    Shelved,
    Silent,
    State,
    Step,
    Submission,
    TakenUp,
    advance,
    aftermath,
    first_bid,
    goes_away,
    next_bid,
    outcome_of,
    stand,
)

GENESIS = datetime(2026, 11, 21, tzinfo=UTC)
LEDGER_SECONDS = 5
SENT_AT = 1000
LAST_IN_TIME = SENT_AT + 18
MAX_TIME = int((GENESIS + timedelta(seconds=LEDGER_SECONDS * LAST_IN_TIME)).timestamp())
"""A ledger that closes at this very second may still hold it."""
STATS = FeeStats(100, 1_000, 50_000, 900_000)


def head(ledger: int) -> Head:
    """Return a ledger: one every five seconds."""
    return Head(ledger, GENESIS + timedelta(seconds=LEDGER_SECONDS * ledger))


def envelope(number: int = 1) -> Envelope:
    """Return a signed envelope by its number."""
    return Envelope(f"xdr-{number}", f"{number:064x}", None, "G" + "A" * 55, 7, MAX_TIME, 100_100)


def stored(number: int = 1, *, channel: bool = True, sponsored: bool = True) -> Submission:
    """Return what was stored just now."""
    return Submission("testnet", 1, "pay:1", envelope(number), SENT_AT, 100, channel, sponsored)


def answered(ledger: int = SENT_AT, status: str = "pending", code: str | None = None) -> Answered:
    """Return a node's answer to a send."""
    return Answered(Sent(status, code, head(ledger)))  # type: ignore[arg-type]


def refused(code: str, ledger: int = SENT_AT) -> Answered:
    """Return a node's refusal."""
    return answered(ledger, "refused", code)


def unseen(ledger: int, oldest: int = 1) -> Looked:
    """Return that a node does not know it."""
    return Looked((NotSeen(Retained(oldest, head(ledger))),))


def applied(
    *, result: str = "tx_success", operation: str | None = None, contract_error: int | None = None, ledger: int = 1002
) -> Applied:
    """Return what is in a ledger."""
    fault = ContractFault(contract_error, "trapped") if operation == "trapped" else None
    return Applied(result == "tx_success", ledger, head(ledger).closed_at, result, operation, fault, None, 100)


class Journey:
    """A submission on its way, with the counters as the store keeps them."""

    def __init__(self, submission: Submission | None = None, *, sponsor: bool = True, witness: bool = False) -> None:
        self.course = Course(submission or stored(), sponsor=sponsor, witness=witness)
        self.step: Step | None = None

    @property
    def submission(self) -> Submission:
        """What is stored."""
        return self.course.submission

    def keep(self, **changes: object) -> None:
        """Change what is stored."""
        changed = attrs.evolve(self.submission, **changes)  # type: ignore[arg-type]
        self.course = attrs.evolve(self.course, submission=changed)

    def tell(self, *news: News) -> Step:
        """Tell what happened, counting sends as the store does; return the last step."""
        for each in news:
            if isinstance(each, Answered | Silent | NotSent):
                self.keep(sends=self.submission.sends + 1, state="sent")
            if isinstance(each, NotSent) or (isinstance(each, Answered) and each.sent.status == "refused"):
                refusal = each.sent.result_code if isinstance(each, Answered) else self.submission.refusal
                self.keep(untaken=self.submission.untaken + 1, refusal=refusal)
            self.course, self.step = advance(self.course, each)
        assert self.step is not None
        return self.step


# --- the table, row by row --------------------------------------------------------------------------------------------


def test_what_was_only_stored_is_sent() -> None:
    assert Journey().tell(TakenUp()) == Send()


def test_what_was_sent_before_a_crash_is_looked_up_before_it_is_sent_again() -> None:
    journey = Journey(attrs.evolve(stored(), state="sent", sends=1))
    assert journey.tell(TakenUp()) == Look(0.0)
    assert journey.tell(unseen(SENT_AT + 1)) == Send()


def test_a_send_without_an_answer_is_looked_up_and_the_identical_envelope_sent_again_each_ledger() -> None:
    journey = Journey(sponsor=False)
    assert journey.tell(TakenUp(), Silent()) == Look(1.0)
    assert isinstance(journey.tell(unseen(SENT_AT)), Look), "no ledger closed since it was sent"
    for ledger in range(SENT_AT + 1, LAST_IN_TIME + 1):
        assert journey.tell(unseen(ledger)) == Send()
        assert isinstance(journey.tell(Silent()), Look)
    assert journey.tell(unseen(LAST_IN_TIME + 1)) == Bury(Retained(1, head(LAST_IN_TIME + 1)))


def test_an_unknown_send_that_was_applied_after_all_is_finished() -> None:
    done = applied()
    assert Journey().tell(TakenUp(), Silent(), Looked((done,))) == Finish(done, closes_purpose=True)


def test_pending_is_polled_from_one_second_to_five() -> None:
    journey = Journey(sponsor=False)
    pauses = [journey.tell(TakenUp(), answered())]
    pauses += [journey.tell(NotLooked()) for _ in range(6)]
    seconds = [step.after_seconds for step in pauses if isinstance(step, Look)]
    assert seconds == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0]


def test_duplicate_is_pending_and_no_error() -> None:
    one, other = Journey(), Journey()
    one.tell(TakenUp(), answered(status="pending"))
    other.tell(TakenUp(), answered(status="duplicate"))
    assert one.step == other.step
    assert one.course == other.course


def test_try_again_later_is_looked_up_first_and_sent_again_a_ledger_later() -> None:
    journey = Journey()
    assert journey.tell(TakenUp(), answered(status="try_again_later")) == Look(0.0)
    assert isinstance(journey.tell(unseen(SENT_AT)), Look)
    assert journey.tell(unseen(SENT_AT + 1)) == Send()


def test_try_again_later_that_persists_is_helped_by_a_fee_bump() -> None:
    journey = Journey()
    journey.tell(TakenUp())
    for ledger in range(SENT_AT, SENT_AT + PUT_OFF_MAX - 1):
        assert journey.tell(answered(ledger, "try_again_later")) == Look(0.0)
    assert journey.tell(answered(SENT_AT + PUT_OFF_MAX, "try_again_later")) == Bump(surge=False)
    assert journey.tell(Bumped()) == Send()


def test_bad_sequence_of_what_was_never_taken_is_looked_up_and_then_dead() -> None:
    journey = Journey()
    assert journey.tell(TakenUp(), refused("tx_bad_seq")) == Look(0.0)
    assert journey.tell(unseen(SENT_AT)) == Bury(None)


def test_bad_sequence_of_what_is_applied_already_is_its_success() -> None:
    journey = Journey()
    done = applied()
    journey.tell(TakenUp(), Silent(), unseen(SENT_AT + 1), refused("tx_bad_seq", SENT_AT + 1))
    assert journey.tell(Looked((done,))) == Finish(done, closes_purpose=True)


def test_bad_sequence_after_a_send_in_doubt_waits_for_proof() -> None:
    journey = Journey(sponsor=False)
    journey.tell(TakenUp(), Silent(), unseen(SENT_AT + 1), refused("tx_bad_seq", SENT_AT + 1))
    for ledger in range(SENT_AT + 1, LAST_IN_TIME + 1):
        assert not isinstance(journey.tell(unseen(ledger)), Bury)
    assert isinstance(journey.tell(unseen(LAST_IN_TIME + 1)), Bury)


def test_bad_sequence_of_a_node_that_is_behind_says_nothing() -> None:
    journey = Journey()
    journey.tell(TakenUp(), NotSent(), unseen(SENT_AT + 5))
    assert isinstance(journey.tell(refused("tx_bad_seq", SENT_AT + 2)), Look)
    assert isinstance(journey.tell(unseen(SENT_AT + 5)), Look)
    assert journey.tell(unseen(SENT_AT + 6)) == Send()


def test_a_fee_too_low_of_what_was_never_taken_is_dead_and_built_anew_for_more() -> None:
    journey = Journey()
    assert journey.tell(TakenUp(), refused("tx_insufficient_fee")) == Bury(None)
    dead = attrs.evolve(journey.submission, state="dead")
    plan = stand([dead], 1)
    assert isinstance(plan, Build)
    assert plan.pressure == 1
    assert first_bid(100, STATS, plan.pressure, 10**7) == STATS.p90


def test_a_fee_too_low_after_a_send_in_doubt_is_helped_by_a_fee_bump() -> None:
    journey = Journey()
    step = journey.tell(TakenUp(), Silent(), unseen(SENT_AT + 1), refused("tx_insufficient_fee", SENT_AT + 1))
    assert step == Bump(surge=True)


def test_a_fee_too_low_after_a_send_in_doubt_without_a_sponsor_waits_for_proof() -> None:
    journey = Journey(sponsor=False)
    journey.tell(TakenUp(), Silent(), unseen(SENT_AT + 1))
    assert isinstance(journey.tell(refused("tx_insufficient_fee", SENT_AT + 1)), Look)


def test_too_late_is_looked_up_and_then_dead() -> None:
    journey = Journey()
    assert journey.tell(TakenUp(), refused("tx_too_late")) == Look(0.0)
    assert journey.tell(unseen(SENT_AT)) == Bury(None)
    assert aftermath("tx_too_late") == "build"


def test_a_channel_that_cannot_pay_is_set_aside_and_another_one_used() -> None:
    for code in ("tx_insufficient_balance", "tx_no_account", "tx_no_source_account"):
        assert Journey().tell(TakenUp(), refused(code)) == Bury(None)
        assert aftermath(code) == "set_aside"


def test_a_wallet_that_cannot_pay_is_helped_by_the_sponsor() -> None:
    journey = Journey(stored(channel=False))
    assert journey.tell(TakenUp(), refused("tx_insufficient_balance")) == Bump(surge=True)


@pytest.mark.parametrize("code", ["tx_bad_auth", "tx_bad_auth_extra"])
def test_wrong_keys_or_another_passphrase_stop_everything(code: str) -> None:
    assert Journey().tell(TakenUp(), refused(code)) == Bury(None)
    assert aftermath(code) == "stop"


def test_what_a_wallet_signed_wrongly_is_not_sent_again_and_dead_when_its_time_is_past() -> None:
    journey = Journey(stored(channel=False, sponsored=False))
    journey.tell(TakenUp(), refused("tx_bad_auth"))
    for ledger in range(SENT_AT, LAST_IN_TIME + 1):
        assert isinstance(journey.tell(unseen(ledger)), Look), "the wallet may send it with better signatures"
    assert isinstance(journey.tell(unseen(LAST_IN_TIME + 1)), Bury)


def test_an_invalid_contract_transaction_is_simulated_again_and_built_anew() -> None:
    assert Journey().tell(TakenUp(), refused("tx_soroban_invalid")) == Bury(None)
    assert aftermath("tx_soroban_invalid") == "build"


def test_what_would_be_refused_again_is_given_up() -> None:
    assert Journey().tell(TakenUp(), refused("tx_malformed")) == Bury(None)
    assert aftermath("tx_malformed") == "give_up"


@pytest.mark.parametrize("code", ["tx_internal_error", "tx_too_early"])
def test_a_node_in_trouble_is_asked_again(code: str) -> None:
    journey = Journey()
    assert isinstance(journey.tell(TakenUp(), refused(code)), Look)
    assert journey.tell(unseen(SENT_AT + 1)) == Send()


@pytest.mark.parametrize("code", ["entry_archived", "resource_limit_exceeded", "insufficient_refundable_fee"])
def test_a_failure_for_what_the_simulation_no_longer_said_is_simulated_again(code: str) -> None:
    failed = applied(result="tx_failed", operation=code)
    journey = Journey()
    assert journey.tell(TakenUp(), answered(), Looked((failed,))) == Finish(failed, closes_purpose=False)
    plan = stand([attrs.evolve(journey.submission, state="failed", applied=failed)], 1)
    assert plan == Build(pressure=0, leeway=code != "entry_archived", failed_before=1, pause_seconds=0.0)


def test_a_failure_by_the_contracts_own_rule_is_the_purposes_outcome() -> None:
    failed = applied(result="tx_failed", operation="trapped", contract_error=5)
    journey = Journey()
    assert journey.tell(TakenUp(), answered(), Looked((failed,))) == Finish(failed, closes_purpose=True)
    ended = attrs.evolve(journey.submission, state="failed", applied=failed, closes_purpose=True)
    assert stand([ended], 1) == failed


def test_a_trap_without_a_number_of_the_contract_is_simulated_again() -> None:
    assert goes_away(applied(result="tx_failed", operation="trapped"))


def test_a_purpose_that_keeps_failing_is_closed_in_the_end() -> None:
    failed = applied(result="tx_failed", operation="resource_limit_exceeded")
    journey = Journey(attrs.evolve(stored(), failed_before=FAILURES_MAX - 1))
    assert journey.tell(TakenUp(), answered(), Looked((failed,))) == Finish(failed, closes_purpose=True)


def test_a_node_that_is_behind_proves_nothing() -> None:
    journey = Journey(sponsor=False)
    journey.tell(TakenUp(), answered(), unseen(LAST_IN_TIME))
    assert not isinstance(journey.tell(unseen(SENT_AT - 3)), Bury)


def test_outside_retention_an_operator_is_asked_and_nothing_is_called_dead() -> None:
    journey = Journey()
    journey.tell(TakenUp(), answered())
    past = LAST_IN_TIME + 1
    for _ in range(UNPROVEN_LOOKS_MAX - 1):
        assert isinstance(journey.tell(unseen(past, oldest=SENT_AT + 1)), Look)
    step = journey.tell(unseen(past, oldest=SENT_AT + 1))
    assert step == Shelve(Retained(SENT_AT + 1, head(past)))
    journey.keep(state="unresolved")
    assert journey.tell(Shelved()) == Look(UNRESOLVED_POLL_SECONDS)
    assert journey.tell(unseen(past, oldest=SENT_AT + 1)) == Look(UNRESOLVED_POLL_SECONDS)


def test_what_a_wallet_may_have_sent_itself_is_not_dead_by_a_node_that_forgot_when_it_may_have_come() -> None:
    journey = Journey(stored(channel=False))
    past = LAST_IN_TIME + 1
    assert isinstance(journey.tell(TakenUp(), refused("tx_too_late", past)), Look)
    assert isinstance(journey.tell(unseen(past, oldest=SENT_AT + 1)), Look)
    assert isinstance(journey.tell(unseen(past, oldest=SENT_AT)), Bury)


def test_what_nobody_could_tell_is_finished_when_somebody_can() -> None:
    done = applied()
    unresolved = attrs.evolve(stored(), state="unresolved", sends=1)
    assert Journey(unresolved).tell(TakenUp(), Looked((done,))) == Finish(done, closes_purpose=True)
    assert isinstance(Journey(unresolved).tell(TakenUp(), unseen(LAST_IN_TIME + 1)), Bury)


def test_a_node_on_another_history_proves_nothing() -> None:
    journey = Journey()
    later = NotSeen(Retained(1, Head(SENT_AT - 500, head(LAST_IN_TIME + 9).closed_at)))
    assert isinstance(journey.tell(TakenUp(), answered(), Looked((later,))), Look)


def test_past_its_time_what_was_meant_for_a_history_that_is_gone_is_dead() -> None:
    journey = Journey(attrs.evolve(stored(), state="unresolved", sends=1))
    journey.tell(TakenUp())
    journey.course = attrs.evolve(journey.course, epoch=2)
    early, late = (Retained(1, Head(7, head(ledger).closed_at)) for ledger in (LAST_IN_TIME, LAST_IN_TIME + 1))
    assert isinstance(journey.tell(Looked((NotSeen(early),))), Look)
    assert journey.tell(Looked((NotSeen(late),))) == Bury(late)


def test_a_node_that_does_not_answer_is_asked_again_a_little_later() -> None:
    journey = Journey()
    assert journey.tell(TakenUp(), NotSent()) == Look(1.0)
    for _ in range(20):
        step = journey.tell(NotLooked())
        assert isinstance(step, Look)
        assert 0 < step.after_seconds <= POLL_SECONDS_MAX


def test_what_waits_for_too_many_ledgers_is_helped_by_a_fee_bump() -> None:
    journey = Journey()
    journey.tell(TakenUp(), answered())
    for ledger in range(SENT_AT + 1, SENT_AT + STUCK_LEDGERS):
        assert journey.tell(unseen(ledger)) == Send()
        journey.tell(answered(ledger, "duplicate"))
    assert journey.tell(unseen(SENT_AT + STUCK_LEDGERS)) == Bump(surge=False)
    assert isinstance(journey.tell(NotBumped()), Look), "and without one it goes on"


def test_a_fee_bump_that_cannot_be_paid_is_left_aside_and_the_envelope_sent_alone() -> None:
    journey = Journey()
    journey.tell(TakenUp(), answered())
    journey.keep(bumps=(FeeBump(attrs.evolve(envelope(2), inner_hash=envelope().hash), 1000),))
    journey.tell(Bumped(), refused("tx_insufficient_balance", SENT_AT + 1))
    assert journey.tell(unseen(SENT_AT + 2)) == Send(inner_only=True)


def test_it_is_looked_up_under_the_hashes_of_its_fee_bumps_too() -> None:
    bump = attrs.evolve(envelope(2), inner_hash=envelope().hash)
    submission = attrs.evolve(stored(), bumps=(FeeBump(bump, 1000),))
    assert submission.hashes == (envelope().hash, bump.hash)
    passed_on = attrs.evolve(stored(), envelope=bump)
    assert passed_on.hash == envelope().hash
    assert passed_on.hashes == (envelope().hash, bump.hash)


def test_the_second_witness_is_asked_before_anything_is_called_dead() -> None:
    journey = Journey(witness=True, sponsor=False)
    journey.tell(TakenUp(), answered())
    for _ in range(OPINIONS - 1):
        assert journey.tell(unseen(LAST_IN_TIME + 1)) == AskWitness()
        assert isinstance(journey.tell(Opinion(None)), Look)
    assert journey.tell(unseen(LAST_IN_TIME + 1)) == AskWitness()
    assert isinstance(journey.tell(Opinion(None)), Bury)


def test_what_the_second_witness_has_is_final_whatever_the_first_says() -> None:
    done = applied()
    journey = Journey(witness=True)
    assert journey.tell(TakenUp(), answered(), unseen(LAST_IN_TIME + 1)) == AskWitness()
    assert journey.tell(Opinion(done)) == Finish(done, closes_purpose=True)


def test_the_second_witness_is_asked_where_no_node_goes_back_far_enough() -> None:
    journey = Journey(witness=True)
    assert journey.tell(TakenUp(), answered(), unseen(LAST_IN_TIME + 1, oldest=SENT_AT + 1)) == AskWitness()
    assert isinstance(journey.tell(Opinion(None)), Look), "that it has nothing proves nothing"


def test_a_refusal_that_another_process_can_doubt_is_no_proof() -> None:
    journey = Journey()
    journey.tell(TakenUp())
    journey.keep(sends=1, state="sent")  # the other one's, under way
    assert isinstance(journey.tell(refused("tx_soroban_invalid")), Look)


# --- what a purpose needs ---------------------------------------------------------------------------------------------


def ended(number: int, **changes: object) -> Submission:
    """Return a submission with these changes."""
    return attrs.evolve(stored(number), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", sorted(OPEN))
def test_while_one_is_open_nothing_is_built(state: str) -> None:
    dead = ended(1, state="dead", refusal="tx_bad_seq")
    following = ended(2, state=state)
    assert stand([dead, following], 1) == Follow(following)
    assert stand([dead, following], 2) == Follow(following), "not on another history either"


def test_the_first_outcome_is_the_answer_for_ever() -> None:
    done = applied()
    assert stand([ended(1, state="succeeded", applied=done, closes_purpose=True)], 1) == done


def test_on_another_history_a_purpose_begins_anew() -> None:
    done = ended(1, state="succeeded", applied=applied(), closes_purpose=True)
    assert stand([done], 2) == Build(pressure=0, leeway=False, failed_before=0, pause_seconds=0.0)


def test_refusals_in_a_row_are_further_apart_each_time() -> None:
    refusal = {"state": "dead", "sends": 1, "untaken": 1, "refusal": "tx_insufficient_fee"}
    pauses = []
    for count in range(7):
        plan = stand([ended(number, **refusal) for number in range(count)], 1)
        assert isinstance(plan, Build)
        pauses.append(plan.pause_seconds)
    assert pauses == [0.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    expired = ended(9, state="dead", sends=1, refusal=None)
    plan = stand([ended(1, **refusal), expired], 1)
    assert plan == Build(pressure=2, leeway=False, failed_before=0, pause_seconds=0.0)


def test_what_became_of_it_is_told_from_what_is_stored() -> None:
    done = applied()
    assert outcome_of(ended(1, state="succeeded", applied=done, closes_purpose=True)) == done
    assert outcome_of(ended(1, state="dead", refusal="tx_bad_auth")) == Dead("tx_bad_auth")
    assert outcome_of(ended(1, state="sent", sends=1)) == Alive("sent", None)


# --- what it offers ---------------------------------------------------------------------------------------------------


def test_bids_follow_what_others_pay_and_never_pass_the_bound() -> None:
    assert [first_bid(100, STATS, pressure, 10**7) for pressure in range(6)] == [
        *(100, 1_000, 50_000, 900_000, 1_800_000, 3_600_000)
    ]
    assert first_bid(100, STATS, 100, 10**7) == 10**7
    assert first_bid(100, None, 0, 10**7) == 100
    assert first_bid(100, None, 3, 10**7) == 800


@given(bid=st.integers(0, 10**8), stats=st.none() | st.just(STATS), surge=st.booleans(), bid_max=st.integers(1, 10**8))
def test_a_fee_bump_offers_ten_times_more_or_is_not_made(
    bid: int, stats: FeeStats | None, surge: bool, bid_max: int
) -> None:
    offered = next_bid(ended(1, bid=bid), stats, bid_max, surge=surge)
    if offered is None:
        assert BUMP_FACTOR * max(bid, 1) > bid_max
    else:
        assert BUMP_FACTOR * bid <= offered <= bid_max
        if stats is not None:
            assert offered >= min(stats.p90, bid_max)


# --- the golden rules, whatever comes ---------------------------------------------------------------------------------

CODES = (
    *("tx_bad_seq", "tx_too_late", "tx_insufficient_fee", "tx_insufficient_balance", "tx_bad_auth"),
    *("tx_soroban_invalid", "tx_internal_error", "tx_malformed"),
)


@attrs.define
class Sky:
    """A network that does what it likes within its own rules: it may apply, at any ledger within its time bound, any
    envelope that was ever handed to it, whatever it answered.
    """

    data: st.DataObject
    ledger: int = SENT_AT
    taken: dict[str, int] = attrs.field(factory=dict)
    """Envelopes that may be applied, with the first ledger in which they may."""
    applied: dict[str, Applied] = attrs.field(factory=dict)
    max_times: dict[str, int] = attrs.field(factory=dict)

    def alive(self, tx_hash: str) -> bool:
        """Tell whether it is applied for good, or may still be applied."""
        done = self.applied.get(tx_hash)
        if done is not None:
            return done.successful or not goes_away(done)
        in_time = head(self.ledger).closed_at.timestamp() <= self.max_times[tx_hash]
        return tx_hash in self.taken and in_time

    def pass_time(self) -> None:
        """Close some ledgers; apply what it likes of what it was given."""
        for _ in range(self.data.draw(st.integers(0, 12))):
            self.ledger += 1
            for tx_hash in self.taken:
                in_time = head(self.ledger).closed_at.timestamp() <= self.max_times[tx_hash]
                if tx_hash not in self.applied and in_time and self.data.draw(st.integers(0, 5)) == 0:
                    kind = self.data.draw(st.sampled_from(["ok", "ok", "again", "final"]))
                    self.applied[tx_hash] = {
                        "ok": applied(ledger=self.ledger),
                        "again": applied(result="tx_failed", operation="entry_archived", ledger=self.ledger),
                        "final": applied(result="tx_failed", operation="trapped", contract_error=4, ledger=self.ledger),
                    }[kind]

    def send(self, tx_hash: str) -> News:
        """Take an envelope or not, and answer or not."""
        kind = self.data.draw(st.sampled_from(["pending", "duplicate", "later", "silent", "unsent", "refused"]))
        if kind in ("pending", "duplicate") or (kind in ("later", "silent") and self.data.draw(st.booleans())):
            self.taken.setdefault(tx_hash, self.ledger + 1)
        if kind == "silent":
            return Silent()
        if kind == "unsent":
            return NotSent()
        if kind == "refused":
            return refused(self.data.draw(st.sampled_from(CODES)), self._seen_from())
        return answered(self._seen_from(), "try_again_later" if kind == "later" else kind)

    def look(self, tx_hash: str) -> News:
        """Let a node say what it knows, which may be little."""
        if self.data.draw(st.integers(0, 4)) == 0:
            return NotLooked()
        ledger = self._seen_from()
        done = self.applied.get(tx_hash)
        oldest = self.data.draw(st.sampled_from([1, 1, 1, ledger - 5]))
        if done is not None and oldest <= done.ledger <= ledger:
            return Looked((done,))
        return unseen(ledger, oldest)

    def _seen_from(self) -> int:
        return max(1, self.ledger - self.data.draw(st.sampled_from([0, 0, 0, 3, 40])))


def follow(sky: Sky, submission: Submission, data: st.DataObject) -> Submission:
    """Follow a submission for a while, as a process that may crash anywhere would; return it as stored."""
    course = Course(submission, sponsor=False, witness=data.draw(st.booleans()))
    news: News = TakenUp()
    for _ in range(data.draw(st.integers(1, 40))):
        course, step = advance(course, news)
        present = course.submission
        match step:
            case Send():
                assert present.state in ("stored", "sent"), "only what is open is sent"
                present = attrs.evolve(present, state="sent", sends=present.sends + 1)
                news = sky.send(present.hash)
                came_to_nothing = isinstance(news, NotSent) or (
                    isinstance(news, Answered) and news.sent.status == "refused"
                )
                if came_to_nothing and data.draw(st.integers(0, 9)):  # or a crash before it was noted
                    code = news.sent.result_code if isinstance(news, Answered) else present.refusal
                    present = attrs.evolve(present, untaken=present.untaken + 1, refusal=code)
            case Look(seconds):
                assert 0 <= seconds <= UNRESOLVED_POLL_SECONDS
                sky.pass_time()
                news = sky.look(present.hash)
            case AskWitness():
                done = sky.applied.get(present.hash)
                news = Opinion(done if data.draw(st.booleans()) else None)
            case Finish(done, closes_purpose):
                assert sky.applied[present.hash] == done
                state: State = "succeeded" if done.successful else "failed"
                return attrs.evolve(present, state=state, applied=done, closes_purpose=closes_purpose)
            case Bury(proof):
                assert proof is not None or present.took_nothing
                assert not sky.alive(present.hash), "what is called dead is never applied"
                assert present.hash not in sky.applied
                return attrs.evolve(present, state="dead")
            case Shelve():
                present = attrs.evolve(present, state="unresolved")
                news = Shelved()
            case Bump():
                raise AssertionError("there is no sponsor")
        course = attrs.evolve(course, submission=present)
    return course.submission


@settings(max_examples=300)
@given(data=st.data())
def test_no_two_envelopes_of_one_purpose_can_ever_be_applied(data: st.DataObject) -> None:
    sky = Sky(data)
    history: list[Submission] = []
    for _ in range(data.draw(st.integers(1, 12))):
        standing = stand(history, 1)
        if isinstance(standing, Applied):
            assert standing in sky.applied.values()
            break
        if isinstance(standing, Follow):
            history[history.index(standing.submission)] = follow(sky, standing.submission, data)
            continue
        assert not any(sky.alive(each.hash) for each in history), "built while another one could be applied"
        number = len(history) + 1
        max_time = int(head(sky.ledger).closed_at.timestamp()) + 90
        made = attrs.evolve(envelope(number), max_time=max_time)
        sky.max_times[made.hash] = max_time
        history.append(attrs.evolve(stored(number), envelope=made, failed_before=standing.failed_before))
    assert sum(done.successful for done in sky.applied.values()) <= 1


histories = st.lists(
    st.builds(
        lambda number, state, epoch, operation, closes: ended(
            number,
            state=state,
            epoch=epoch,
            applied={
                "succeeded": applied(),
                "failed": applied(result="tx_failed", operation=operation, contract_error=None),
            }.get(state),
            closes_purpose=state == "succeeded" or (state == "failed" and closes),
        ),
        st.integers(1, 9),
        st.sampled_from(["stored", "sent", "unresolved", "succeeded", "failed", "dead"]),
        st.integers(1, 2),
        st.sampled_from(["trapped", "entry_archived", "resource_limit_exceeded"]),
        st.booleans(),
    ),
    max_size=6,
)


@given(history=histories, epoch=st.integers(1, 2))
def test_a_purpose_is_built_for_only_while_nothing_of_it_is_open_or_final(
    history: Sequence[Submission], epoch: int
) -> None:
    standing = stand(history, epoch)
    anything_open = any(each.state in OPEN for each in history)
    anything_final = any(each.closes_purpose for each in history if each.epoch == epoch)
    assert isinstance(standing, Follow) == anything_open
    assert isinstance(standing, Build) == (not anything_open and not anything_final)
