"""Meters: what of a stream is counted, however it is cut, and where it stops."""

import re
from itertools import combinations, pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from callora.ledger.meters import ByteMeter, EventMeter, is_nearly_used

quick = settings(max_examples=300, database=None)
MANY = 10**9


def naive_events(stream: bytes) -> int:
    """Count what a reader of the whole stream is told of."""
    count, has_data = 0, False
    lines = re.split(rb"\r\n|\r|\n", stream)
    for line in lines[:-1]:
        if not line:
            count += has_data
            has_data = False
        elif line.partition(b":")[0] == b"data":
            has_data = True
    return count


lines = st.sampled_from(
    [b"data: 1", b"data", b"data:", b"datax: 1", b"dat", b": ping", b"event: a", b"id: 3", b"", b""]
)
streams = st.lists(st.tuples(lines, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=30).map(
    lambda parts: b"".join(line + end for line, end in parts)
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in pairwise(places)]


@quick
@example(b"data\r\n\n", [5, 6])  # a line's end cut in two, and its second half alone in a piece
@given(streams, st.lists(st.integers(0, 500), max_size=8))
def test_events_are_counted_alike_however_the_stream_is_cut(stream: bytes, cuts: list[int]) -> None:
    meter = EventMeter()
    for piece in pieces(stream, cuts):
        assert meter.take(piece, MANY) == len(piece)
    # A last line's end that may be half of one is counted when it comes, as a reader would.
    assert meter.quantity == naive_events(stream)


def test_every_short_stream_is_counted_alike_with_every_two_cuts() -> None:
    ends = (b"\n", b"\r\n", b"\r")
    for parts in product([*(b"data" + end for end in ends), *ends], repeat=3):
        stream = b"".join(parts)
        for cuts in combinations(range(len(stream)), 2):
            meter = EventMeter()
            for piece in pieces(stream, list(cuts)):
                meter.take(piece, MANY)
            assert meter.quantity == naive_events(stream), (stream, cuts)


@quick
@given(streams, st.integers(1, 5), st.lists(st.integers(0, 500), max_size=8))
def test_never_more_events_pass_than_are_held_and_none_in_part(stream: bytes, units: int, cuts: list[int]) -> None:
    meter, passed = EventMeter(), b""
    for piece in pieces(stream, cuts):
        taken = meter.take(piece, units)
        passed += piece[:taken]
        if taken < len(piece):
            break
    assert stream.startswith(passed)
    assert naive_events(passed) == meter.quantity <= units
    if passed != stream:
        assert meter.quantity == units


@quick
@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 40), st.sampled_from([1, 10, 1000]))
def test_never_more_bytes_pass_than_are_held(parts: list[bytes], units: int, size: int) -> None:
    meter = ByteMeter(size)
    passed = sum(meter.take(part, units) for part in parts)
    assert passed == meter.quantity == min(sum(map(len, parts)), units * size)
    assert meter.wants(0) <= units


@pytest.mark.parametrize(("used", "held", "nearly"), [(79, 100, False), (80, 100, True), (0, 1, False), (1, 1, True)])
def test_more_is_asked_for_when_four_fifths_are_used(used: int, held: int, nearly: bool) -> None:
    assert is_nearly_used(used, held) is nearly


def test_what_is_more_than_was_held_passes_once_more_is_held() -> None:
    meter, stream = EventMeter(), b"data: 1\r\n\r\ndata: 2\r\n\r\n: end\r\n\r\n"
    first = meter.take(stream, 1)
    assert stream[:first] == b"data: 1\r\n\r\n"
    assert (meter.take(stream[first:], 1), meter.wants(5), meter.wants(0)) == (0, 2, 1)
    assert first + meter.take(stream[first:], 3) == len(stream)
    assert meter.quantity == 2
