"""Breakers: open on failures in a row, one trial at a time, and no call that ends badly wedges one."""

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.actors.breaker import TRIAL_SECONDS, Breaker, BreakerSettings, Figures, Ticket

SETTINGS = BreakerSettings(failures=3, cooldown_seconds=30.0, successes=2)


def ticket(breaker: Breaker, now: float) -> Ticket:
    """Return a ticket that must be given."""
    admitted = breaker.admit(now)
    assert isinstance(admitted, Ticket)
    return admitted


def opened(now: float = 0.0) -> Breaker:
    """Return a breaker that opened at `now`."""
    breaker = Breaker(SETTINGS)
    for _ in range(SETTINGS.failures):
        ticket(breaker, now).end(False, now)
    assert breaker.state == "open"
    return breaker


def test_only_failures_in_a_row_open_it() -> None:
    breaker = Breaker(SETTINGS)
    for succeeded in (False, False, True, False, False):
        ticket(breaker, 0).end(succeeded, 0)
    assert isinstance(breaker.admit(0), Ticket)
    ticket(breaker, 0).end(False, 0)
    assert breaker.state == "open"


def test_an_open_one_says_how_long_to_stay_away() -> None:
    assert opened(5.0).admit(15.0) == 20.0


def test_after_its_cooldown_one_trial_is_admitted_at_a_time() -> None:
    breaker = opened()
    trial = ticket(breaker, 30.0)
    assert breaker.admit(30.0) == TRIAL_SECONDS
    trial.end(True, 31.0)
    ticket(breaker, 31.0).end(True, 31.0)
    assert breaker.state == "closed"


def test_a_failed_trial_opens_it_anew() -> None:
    breaker = opened()
    ticket(breaker, 30.0).end(False, 40.0)
    assert breaker.state == "open"
    assert breaker.admit(41.0) == 29.0


def test_a_cancelled_trial_neither_closes_it_nor_wedges_it() -> None:
    breaker = opened()
    for _ in range(10):
        ticket(breaker, 30.0).end(None, 30.0)
        assert breaker.state == "half_open"


def test_a_cancelled_call_counts_neither_way() -> None:
    breaker = Breaker(SETTINGS)
    for succeeded in (False, False, None, False):
        ticket(breaker, 0).end(succeeded, 0)
    assert breaker.state == "open"


def test_a_call_admitted_before_it_opened_does_not_decide_a_trial() -> None:
    breaker = Breaker(SETTINGS)
    old = ticket(breaker, 0)
    for _ in range(SETTINGS.failures):
        ticket(breaker, 0).end(False, 0)
    trial = ticket(breaker, 30.0)
    old.end(False, 30.0)
    assert breaker.state == "half_open"
    trial.end(True, 30.0)
    assert breaker.state == "half_open"


def test_a_ticket_is_ended_once() -> None:
    breaker = Breaker(SETTINGS)
    one = ticket(breaker, 0)
    for _ in range(SETTINGS.failures):
        one.end(False, 0)
    assert breaker.state == "closed"


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0, 20)), max_size=60))
def test_whatever_calls_come_to_a_breaker_never_refuses_for_ever(ends: list[tuple[bool | None, float]]) -> None:
    breaker, now = Breaker(SETTINGS), 0.0
    for succeeded, seconds in ends:
        now += seconds
        admitted = breaker.admit(now)
        if isinstance(admitted, Ticket):
            admitted.end(succeeded, now)
    assert isinstance(breaker.admit(now + SETTINGS.cooldown_seconds), Ticket)


def test_an_operators_trip_opens_it_and_its_cooldown_admits_a_trial() -> None:
    breaker = Breaker(SETTINGS)
    before = ticket(breaker, 0.0)
    breaker.trip(1.0)
    assert (breaker.state, breaker.admit(2.0), breaker.remaining(2.0)) == ("open", 29.0, 29.0)
    before.end(True, 2.0)
    assert breaker.remaining(2.0) == 29.0
    assert ticket(breaker, 31.0).trial


def test_an_operators_reset_closes_it_and_forgets_every_failure() -> None:
    breaker = opened()
    breaker.reset(0.0)
    assert (breaker.state, breaker.failures, breaker.remaining(0.0)) == ("closed", 0, 0.0)
    for _ in range(SETTINGS.failures - 1):
        ticket(breaker, 0.0).end(False, 0.0)
    assert (breaker.state, breaker.failures) == ("closed", SETTINGS.failures - 1)


def test_defect_39_a_trial_from_before_an_operator_stepped_in_neither_opens_closes_nor_wedges_it() -> None:
    for succeeded in (True, False, None):
        breaker = opened()
        trial = ticket(breaker, 30.0)
        breaker.reset(0.0)
        trial.end(succeeded, 31.0)
        assert breaker.state == "closed"
        breaker.trip(40.0)
        second = ticket(breaker, 70.0)
        breaker.trip(71.0)
        second.end(succeeded, 72.0)
        assert (breaker.state, breaker.remaining(72.0)) == ("open", 29.0)
        third = ticket(breaker, 101.0)
        assert third.trial and not isinstance(breaker.admit(101.0), Ticket)
        third.end(True, 101.0)
        ticket(breaker, 101.0).end(True, 101.0)
        assert breaker.state == "closed"


# --- all histories ----------------------------------------------------------------------------------------------------

STEPS = ("ask", "ok", "fail", "cancel", "ok last", "fail last", "wait", "cool", "trip", "reset")
"""What may happen: somebody asks; the oldest or the latest call under way ends; time passes; an operator steps in."""


class Told:
    """The rules of a breaker once more, written down without thrift: what must hold, whatever happened."""

    def __init__(self, rules: BreakerSettings) -> None:
        self.settings = rules
        self.state = "closed"
        self.failed = self.succeeded = 0
        self.opened_at = 0.0
        self.era = 0
        self.trial_under_way = False

    def asked(self, now: float) -> bool:
        """Tell whether somebody who asks now is let through."""
        if self.state == "open" and now >= self.opened_at + self.settings.cooldown_seconds:
            self.state, self.succeeded = "half_open", 0
        if self.state == "half_open" and not self.trial_under_way:
            self.trial_under_way = True
            return True
        return self.state == "closed"

    def ended(self, how: str, trial: bool, era: int, now: float) -> None:
        """Note how a call ended that was let through in this era."""
        if era != self.era:
            return
        if trial:
            self.trial_under_way = False
            if how == "ok":
                self.succeeded += 1
                if self.succeeded == self.settings.successes:
                    self.state, self.failed = "closed", 0
            elif how == "fail":
                self.open(now)
        elif self.state == "closed" and how == "ok":
            self.failed = 0
        elif self.state == "closed" and how == "fail":
            self.failed += 1
            if self.failed == self.settings.failures:
                self.open(now)

    def open(self, now: float) -> None:
        """Open."""
        self.state, self.opened_at, self.failed = "open", now, 0

    def operator(self, step: str, now: float) -> None:
        """Note that an operator stepped in."""
        self.era += 1
        self.trial_under_way = False
        if step == "trip":
            self.open(now)
        else:
            self.state, self.failed = "closed", 0


def live_through(history: Iterable[str], rules: BreakerSettings) -> None:
    """Let a breaker live through a history beside the rules, and at the end show that it is not wedged."""
    breaker, told, now = Breaker(rules), Told(rules), 0.0
    under_way: list[tuple[Ticket, int]] = []
    ends = {"ok": True, "fail": False, "cancel": None}
    successes = failures = 0
    for step in history:
        how, _, last = step.partition(" ")
        if step == "ask":
            admitted = breaker.admit(now)
            assert isinstance(admitted, Ticket) == told.asked(now)
            if isinstance(admitted, Ticket):
                under_way.append((admitted, told.era))
            else:
                assert admitted > 0
        elif how in ends and under_way:
            one, era = under_way.pop(-1 if last else 0)
            one.end(ends[how], now)
            one.end(not ends[how], now)
            told.ended(how, one.trial, era, now)
            successes += how == "ok"
            failures += how == "fail"
        elif step in ("wait", "cool"):
            now += rules.cooldown_seconds * (1.0 if step == "cool" else 0.4)
        elif step == "trip":
            breaker.trip(now)
            told.operator(step, now)
        elif step == "reset":
            breaker.reset(now)
            told.operator(step, now)
        assert breaker.state == told.state
        trials = [each for each, era in under_way if each.trial and era == told.era]
        assert len(trials) <= 1
    figures = breaker.figures
    assert (figures.total_successes, figures.total_failures) == (successes, failures)
    assert figures.consecutive_failures == 0 or figures.consecutive_successes == 0
    # However the calls under way end, or even if they were lost with their tasks' cancellation, trials go on.
    for one, _ in under_way:
        one.end(None, now)
    for _ in range(rules.successes):
        now += rules.cooldown_seconds
        ticket(breaker, now).end(True, now)
    assert breaker.state == "closed"


@pytest.mark.parametrize(("failures", "successes"), [(1, 1), (2, 1), (2, 2)])
def test_every_short_history_ends_in_the_state_that_the_rules_say(failures: int, successes: int) -> None:
    rules = BreakerSettings(failures=failures, cooldown_seconds=10.0, successes=successes)
    for history in product(STEPS, repeat=4):
        live_through(("ask", "fail", *history), rules)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(STEPS), max_size=200), st.integers(1, 4), st.integers(1, 3))
def test_every_long_history_ends_in_the_state_that_the_rules_say(
    history: list[str], failures: int, successes: int
) -> None:
    live_through(history, BreakerSettings(failures, 10.0, successes))


@pytest.mark.proof
def test_all_histories_of_six_steps() -> None:
    for history in product(STEPS, repeat=6):
        live_through(history, BreakerSettings(failures=2, cooldown_seconds=10.0, successes=1))


def test_figures_tell_what_was_seen_and_when() -> None:
    breaker = Breaker(SETTINGS)
    assert (breaker.figures.last_failure_at, breaker.figures.last_change_at) == (None, None)
    for now in (1.0, 2.0, 3.0):
        ticket(breaker, now).end(False, now)
    assert breaker.figures == Figures(
        state="open",
        consecutive_failures=3,
        consecutive_successes=0,
        total_failures=3,
        total_successes=0,
        last_failure_at=3.0,
        last_change_at=3.0,
    )
    for now in (40.0, 41.0):
        ticket(breaker, now).end(True, now)
    found = breaker.figures
    assert (found.state, found.consecutive_failures, found.consecutive_successes) == ("closed", 0, 2)
    assert (found.total_failures, found.last_failure_at, found.last_change_at) == (3, 3.0, 41.0)
