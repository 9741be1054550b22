"""Sliding logs: exact, whatever the order of calls and pauses; a naive model keeps every call and counts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.limits import Limit, SharedCount, SlidingLog, stand

quick = settings(max_examples=300, database=None)
# Powers of two: sums of them are exact, so the model and the log agree at the very edge of the window.
pauses = st.lists(st.integers(0, 64).map(lambda count: count / 16), max_size=60)


@quick
@given(st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]), pauses)
def test_a_log_admits_exactly_what_a_count_of_the_window_admits(limit: int, window: float, pauses: list[float]) -> None:
    log = SlidingLog(limit, window)
    admitted: list[float] = []
    now = 100.0
    for pause in pauses:
        now += pause
        inside = [at for at in admitted if at > now - window]
        refused = log.refuse(now)
        assert (refused is not None) == (len(inside) >= limit)
        if refused is None:
            log.admit(now)
            admitted.append(now)
            inside.append(now)
        else:
            assert refused.remaining == 0
            assert refused.reset_seconds == inside[0] + window - now
        pace = log.pace(now)
        assert (pace.limit, pace.remaining) == (limit, limit - len(inside))
        assert log.is_empty(now) == (not inside)


@quick
@given(st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]), pauses)
def test_no_window_wherever_it_begins_holds_more_than_the_limit(limit: int, window: float, pauses: list[float]) -> None:
    log = SlidingLog(limit, window)
    admitted: list[float] = []
    now = 0.0
    for pause in pauses:
        now += pause
        if log.refuse(now) is None:
            log.admit(now)
            admitted.append(now)
    for start in admitted:
        assert sum(start <= at < start + window for at in admitted) <= limit


def test_a20_what_left_the_window_makes_room_and_nothing_before() -> None:
    log = SlidingLog(10, 60.0)
    for second in range(10):
        assert log.refuse(second) is None
        log.admit(second)
    assert log.refuse(59.999) is not None
    assert log.refuse(60.001) is None
    log.admit(60.001)
    refused = log.refuse(60.5)
    assert refused is not None
    assert refused.reset_seconds == 0.5
    assert log.refuse(61.0) is None


def counts(user_calls: int, key_calls: int) -> tuple[SharedCount, SharedCount]:
    """Return what a store has counted: a user's ten a minute and a key's five in half of one."""
    return (
        SharedCount("user", Limit(10, 60.0), user_calls, 1_000_000_000_000),
        SharedCount("key", Limit(5, 30.0), key_calls, 1_000_020_000_000),
    )


def test_of_shared_limits_the_tighter_is_told_and_the_keys_of_two_alike() -> None:
    now_us = 1_000_021_500_000
    standing = stand(0, now_us, counts(9, 2), 500.0)
    assert (standing.which, standing.remaining, standing.refused) == ("user", 1, False)
    assert (standing.reset_at, standing.reset_timestamp) == (500.0 + 38.5, 1_000_060.0)
    standing = stand(0, now_us, counts(7, 2), 500.0)
    assert (standing.which, standing.remaining) == ("key", 3)
    assert (standing.reset_at, standing.reset_timestamp) == (500.0 + 28.5, 1_000_050.0)


def test_of_shared_limits_the_one_that_refused_is_told_with_nothing_left() -> None:
    for full, which in ((1, "user"), (2, "key")):
        standing = stand(full, 1_000_021_500_000, counts(10, 5), 500.0)
        assert (standing.which, standing.remaining, standing.refused) == (which, 0, True)


def test_a_limit_that_was_lowered_leaves_nothing_and_not_less() -> None:
    assert stand(0, 1_000_021_500_000, counts(12, 9), 500.0).remaining == 0


def test_whoever_waits_as_long_as_the_refusal_says_is_admitted() -> None:
    log = SlidingLog(2, 10.0)
    log.admit(0.0)
    log.admit(4.0)
    refused = log.refuse(6.0)
    assert refused is not None
    assert refused.reset_seconds == 4.0
    assert log.refuse(6.0 + refused.reset_seconds) is None


def test_asking_again_and_again_does_not_prolong_a_refusal() -> None:
    log = SlidingLog(1, 10.0)
    log.admit(0.0)
    for now in range(1, 10):
        assert log.refuse(float(now)) is not None
    assert log.refuse(10.0) is None


def test_a_lowered_limit_holds_for_the_calls_already_admitted() -> None:
    log = SlidingLog(5, 10.0)
    for at in range(4):
        log.admit(float(at))
    log.limit = 2
    refused = log.refuse(5.0)
    assert refused is not None
    assert refused.remaining == 0
