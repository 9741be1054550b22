"""Following a contract's events: pages, gaps, and other histories."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.chain import ChainEvent, EventPage, Head, Retained, VaultEvent
from callora.ledger.watching import (
    BEHIND_LEDGERS_MAX,
    Seen,
    after_page,
    event_ref,
    events_after,
    ledger_of,
    missing_before,
    opening_of,
    same_history,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
FRESH = Seen(0, None, 0, None)


def closed(ledger: int) -> datetime:
    return START + timedelta(seconds=5 * ledger)


def head(ledger: int) -> Head:
    return Head(ledger, closed(ledger))


def event_id(ledger: int, number: int = 1) -> str:
    return f"{(ledger << 32) | (number << 12):019d}-0000000000"


def window_end(ledger: int) -> str:
    return f"{((ledger + 1) << 32) - 1:019d}-4294967294"


def chain_event(ledger: int, number: int = 1) -> ChainEvent:
    return ChainEvent(event_id(ledger, number), "C", ledger, closed(ledger), "00" * 32, (), "")


def seen(ledger: int) -> Seen:
    return Seen(ledger, window_end(ledger), ledger, closed(ledger))


def moved(kind: str, amount: int, after: int | None, tx: str = "a") -> VaultEvent:
    return VaultEvent(event_id(7), kind, 7, closed(7), tx, None, amount, after)  # type: ignore[arg-type]


def test_a_position_begins_with_its_ledger() -> None:
    assert ledger_of(event_id(123_456, 7)) == ledger_of(window_end(123_456)) == 123_456
    for text in ("", "7", "x-1", "-1"):
        with pytest.raises(ValueError, match="position"):
            ledger_of(text)


def test_a_reference_names_network_epoch_and_event() -> None:
    assert event_ref("testnet", 2, "7-1") == "testnet:2:7-1"


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_any_node_of_the_same_history_is_recognised_however_far_ahead_or_a_day_behind(known: int, now: int) -> None:
    if known - now <= BEHIND_LEDGERS_MAX:
        assert same_history(seen(known), head(now))


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_network_that_began_anew_is_never_taken_for_the_old_one_before_it_is_as_long(
    known: int, now: int, pause: int
) -> None:
    began = closed(known) + timedelta(seconds=pause)
    if now <= known:
        assert not same_history(seen(known), Head(now, began + timedelta(seconds=5 * now)))


def test_a_node_more_than_a_day_behind_is_no_stale_node() -> None:
    assert same_history(seen(20_000), head(20_000 - BEHIND_LEDGERS_MAX))
    assert not same_history(seen(20_001), head(20_000 - BEHIND_LEDGERS_MAX))


def test_nothing_seen_fits_every_history() -> None:
    assert same_history(FRESH, head(5))


def test_a_page_that_is_not_full_leads_to_the_end_of_its_window() -> None:
    page = EventPage((chain_event(5),), window_end(9), Retained(1, head(9)))
    assert after_page(FRESH, page, 100) == seen(9)


def test_a_full_page_may_end_within_a_ledger_and_vouches_for_the_one_before() -> None:
    page = EventPage((chain_event(5), chain_event(6)), event_id(6), Retained(1, head(9)))
    assert after_page(FRESH, page, 2) == Seen(5, event_id(6), 9, closed(9))


def test_a_page_of_a_node_that_is_behind_leads_nowhere() -> None:
    page = EventPage((), window_end(7), Retained(1, head(7)))
    assert after_page(seen(9), page, 100) == seen(9)


def test_a_window_beyond_the_newest_ledger_vouches_for_none_that_nobody_has_seen() -> None:
    page = EventPage((), window_end(12), Retained(1, head(9)))
    assert after_page(FRESH, page, 100).ledger == 9


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3), st.booleans()), max_size=20))
def test_whatever_pages_come_the_position_never_moves_back(pages: list[tuple[int, int, bool]]) -> None:
    at = FRESH
    for ledger, behind, full in pages:
        cursor = event_id(ledger) if full else window_end(ledger)
        page = EventPage((chain_event(ledger),), cursor, Retained(1, head(ledger + behind)))
        to = after_page(at, page, 1 if full else 2)
        assert to.ledger >= at.ledger
        assert (to.cursor or "") >= (at.cursor or "")
        assert to.seen_ledger >= max(at.seen_ledger, to.ledger)
        at = to


def test_a_gap_is_what_was_never_seen_and_is_no_longer_kept() -> None:
    assert missing_before(seen(9), 10) is None
    assert missing_before(seen(9), 11) == (10, 10)
    assert missing_before(seen(9), 30) == (10, 29)
    assert missing_before(FRESH, 30) is None, "what came before the first look is not missing"


def test_overlapping_and_repeated_events_come_once_and_in_order() -> None:
    page = [chain_event(6), chain_event(5), chain_event(6), chain_event(4)]
    assert [event.ledger for event in events_after(page, event_id(4))] == [5, 6]
    assert len(events_after(page, None)) == 3


def test_the_opening_balance_is_what_the_first_transaction_did_not_bring() -> None:
    assert opening_of([]) is None
    assert opening_of([moved("distribute", 5, None)]) is None
    assert opening_of([moved("deposit", 30, 100)]) == 70
    assert opening_of([moved("withdraw_to", 30, 100), moved("deposit", 1, 101, "b")]) == 130
    batch = [moved("deduct", 10, 70), moved("deduct", 20, 70), moved("deposit", 5, 75, "b")]
    assert opening_of(batch) == 100, "every event of a batch carries the balance after all of it"
