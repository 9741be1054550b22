"""Ids: UUIDv7 that Python's own reader takes, unique, and sorted by their time."""

import os
import uuid
from datetime import UTC, datetime, timedelta

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.ids import Ids

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
