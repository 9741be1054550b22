"""Webhooks' rules: names, what an attempt means, and how long the next one is waited for."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.webhooks import (
    DELAY_SECONDS_MAX,
    EVENTS,
    REGISTRABLE,
    Attempt,
    RetryPolicy,
    judge,
    pause_seconds,
    stored_type,
)


def test_every_event_has_one_name_that_is_told() -> None:
    assert len(set(EVENTS.values())) == len(EVENTS)
    assert all(re.fullmatch(r"[a-z][a-z_]{0,62}", stored) for stored in EVENTS)
    assert {stored_type(name) for name in REGISTRABLE} == set(EVENTS)
    assert stored_type("new_api_call") == stored_type("usage_event.created") == "usage_event_created"
    assert stored_type("usage_event_created") is None


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ((200, 201, 204, 299), "delivered"),
        ((None, 408, 425, 429, 500, 503, 599), "again"),
        ((300, 301, 302, 304, 307, 308, 400, 401, 403, 404, 409, 413, 422, 499), "refused"),
        ((410,), "gone"),
    ],
)
def test_a_status_means_what_it_says(statuses: tuple[int | None, ...], verdict: str) -> None:
    assert {judge(Attempt(status)) for status in statuses} == {verdict}


@given(
    st.integers(0, 10),
    st.integers(100, 60_000),
    st.integers(1, 11),
    st.none() | st.floats(0, 1e9),
    st.floats(0, 1, exclude_max=True),
)
def test_a_pause_grows_within_its_bounds(
    retries: int, base: int, attempts: int, wish: float | None, jitter: float
) -> None:
    policy = RetryPolicy(retries, base)
    pause = pause_seconds(policy, attempts, wish, jitter)
    assert base / 1000 * 0.5 <= pause <= DELAY_SECONDS_MAX
    assert pause_seconds(policy, attempts + 1, wish, jitter) >= pause
    if wish is not None:
        assert pause >= min(wish, DELAY_SECONDS_MAX)
    if wish is None and base / 1000 * 2 ** (attempts - 1) * 1.5 < DELAY_SECONDS_MAX:
        assert pause == base / 1000 * 2 ** (attempts - 1) * (0.5 + jitter)
