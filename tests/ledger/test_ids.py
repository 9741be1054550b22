"""Ids: UUIDv7 that Python's own reader takes, unique, and sorted by their time."""

import os
import uuid
from datetime import UTC, datetime, timedelta

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.ids import EPOCH, FIRST_ID, LAST_ID, Ids, least_id, least_id_of, made_at

quick = settings(max_examples=100, database=None)


@attrs.define
class FixedClock:
    at: datetime

    def now(self) -> datetime:
        return self.at

    def timestamp(self) -> float:
        return self.at.timestamp()


moments = st.integers(10**5, 4 * 10**9).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@quick
@given(moments, st.binary(min_size=10, max_size=10))
def test_an_id_is_a_uuid_of_version_7_with_the_time_in_front(at: datetime, noise: bytes) -> None:
    made = Ids(FixedClock(at), lambda count: (noise * count)[:count]).uuid7()
    read = uuid.UUID(made)
    assert str(read) == made
    assert read.version == 7
    assert read.variant == uuid.RFC_4122
    assert read.int >> 80 == int(at.timestamp() * 1000)


@quick
@given(moments, st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_ids_of_later_milliseconds_sort_later(at: datetime, steps: list[int]) -> None:
    clock = FixedClock(at)
    ids = Ids(clock, os.urandom)
    made = [ids.uuid7()]
    for step in steps:
        clock.at += timedelta(milliseconds=min(step, 10**9))
        made.append(ids.uuid7())
    assert made == sorted(made)


@quick
@given(st.integers(10**12, 4 * 10**12))
def test_an_id_carries_its_very_millisecond(millis: int) -> None:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=millis)
    made = Ids(FixedClock(at), bytes).uuid7()
    assert uuid.UUID(made).int >> 80 == millis


def test_ten_thousand_ids_of_one_millisecond_are_all_different() -> None:
    ids = Ids(FixedClock(datetime(2026, 1, 1, tzinfo=UTC)), os.urandom)
    assert len({ids.uuid7() for _ in range(10_000)}) == 10_000


def test_every_random_bit_of_an_id_comes_from_the_source_of_randomness() -> None:
    clock = FixedClock(datetime(2026, 1, 1, tzinfo=UTC))
    zeros = uuid.UUID(Ids(clock, bytes).uuid7()).int
    ones = uuid.UUID(Ids(clock, lambda count: b"\xff" * count).uuid7()).int
    assert (zeros ^ ones).bit_count() == 74


def test_an_id_tells_its_millisecond_and_a_moment_within_it_the_least_of_these() -> None:
    event_id = "01a1ff0e-0fb6-7396-aa6d-6df1fb066d39"
    made = EPOCH + timedelta(milliseconds=0x01A1FF0E0FB6)
    assert made_at(event_id) == made
    for within in (0, 1, 999):
        assert least_id(made + timedelta(microseconds=within)) == "01a1ff0e-0fb6-0000-0000-000000000000"
    assert least_id(made - timedelta(microseconds=1)) == "01a1ff0e-0fb5-0000-0000-000000000000"


def test_what_no_id_can_tell_is_told_by_the_first_or_the_last() -> None:
    assert least_id(EPOCH - timedelta(days=1)) == least_id(EPOCH) == FIRST_ID
    assert least_id_of(2**60) == "ffffffff-ffff-0000-0000-000000000000"
    assert made_at(LAST_ID) == datetime.max.replace(microsecond=999_000, tzinfo=UTC)
    assert made_at(least_id(datetime.max.replace(tzinfo=UTC))) == made_at(LAST_ID)
