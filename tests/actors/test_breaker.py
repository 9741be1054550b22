"""Breakers: open on failures in a row, one trial at a time, and no call that ends badly wedges one."""

from hypothesis import given
from hypothesis import strategies as st

from callora.actors.breaker import TRIAL_SECONDS, Breaker, BreakerSettings, Ticket

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
    breaker.reset()
    assert (breaker.state, breaker.failures, breaker.remaining(0.0)) == ("closed", 0, 0.0)
    for _ in range(SETTINGS.failures - 1):
        ticket(breaker, 0.0).end(False, 0.0)
    assert (breaker.state, breaker.failures) == ("closed", SETTINGS.failures - 1)


def test_defect_39_a_trial_from_before_an_operator_stepped_in_neither_opens_closes_nor_wedges_it() -> None:
    for succeeded in (True, False, None):
        breaker = opened()
        trial = ticket(breaker, 30.0)
        breaker.reset()
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
