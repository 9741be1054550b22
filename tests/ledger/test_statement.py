"""Positions in a statement: one order of entries and usage, and a bound that neither loses nor repeats a line."""

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.ids import FIRST_ID, LAST_ID, EventId, least_id, made_at
from callora.ledger.statement import (
    Bound,
    Position,
    after,
    before_moment,
    earlier,
    entry_position,
    id_from,
    usage_position,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
START = datetime(2026, 11, 21, 12, tzinfo=UTC)
quick = settings(max_examples=300, database=None)
# Few milliseconds, so that lines often share one.
moments = st.integers(0, 4000).map(lambda micros: START + timedelta(microseconds=micros))
entries = st.builds(lambda at, seq: (at, seq), moments, st.integers(1, 5))
events = st.builds(
    lambda at, low: EventId(least_id(at)[:14] + "7" + f"{low:03x}" + "-8000-000000000000"),
    moments,
    st.integers(0, 4095),
)


def within(bound: Bound, line: Position, at: datetime, seq: int) -> bool:
    """Decide as the two queries of the store do."""
    if seq:
        return (at, seq) < (bound.at, bound.seq)
    return line.event_id < bound.event_id


@quick
@given(st.lists(entries, unique=True), st.lists(events, unique=True), st.data())
def test_the_lines_within_a_bound_are_exactly_those_after_the_position(
    booked: list[tuple[datetime, int]], used: list[EventId], data: st.DataObject
) -> None:
    lines = [(entry_position(at, seq), at, seq) for at, seq in booked]
    lines += [(usage_position(event_id), EPOCH, 0) for event_id in used]
    lines.sort(reverse=True)
    if not lines:
        return
    index = data.draw(st.integers(0, len(lines) - 1))
    bound = after(lines[index][0])
    assert [line for line in lines if within(bound, *line)] == lines[index + 1 :]
    moment = data.draw(moments)
    older = [line for line in lines if (line[1] if line[2] else made_at(line[0].event_id)) < moment]
    assert [line for line in lines if within(before_moment(moment), *line)] == older
    both = [line for line in lines[index + 1 :] if line in older]
    assert [line for line in lines if within(earlier(bound, before_moment(moment)), *line)] == both


def test_ids_from_within_a_millisecond_are_those_of_the_next() -> None:
    assert id_from(EPOCH + timedelta(microseconds=1)) == id_from(EPOCH + timedelta(milliseconds=1))
    assert id_from(EPOCH - timedelta(days=1)) == id_from(EPOCH) == FIRST_ID
    assert FIRST_ID < id_from(START) < id_from(datetime.max.replace(tzinfo=UTC)) <= LAST_ID
