"""Snapshots: what of a page or a push is taken, what is refused, and that neither is ever half believed."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.snapshots import (
    TOTAL_MAX,
    Malformed,
    Page,
    Sample,
    Snapshot,
    format_instant,
    parse_cursor,
    parse_instant,
    parse_page,
    parse_pushed,
)

SUBJECT = "6c6c74aa-39b7-4737-893d-875e73a934ec"
AT = "2026-11-22T10:00:00.5Z"


def sample(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"uuid": SUBJECT, "email": "a@example.com", "inbound_tag": "tcp"}
    fields |= {"uplink_bytes_total": 100, "downlink_bytes_total": 50}
    return {name: value for name, value in {**fields, **changes}.items() if value != "absent"}


def snapshot(**changes: Any) -> dict[str, Any]:
    fields = {"node_id": "jp-1", "env": "prod", "collected_at": AT, "samples": [sample()]}
    return {name: value for name, value in {**fields, **changes}.items() if value != "absent"}


def page(*snapshots: object, **more: Any) -> Page | Malformed:
    return parse_page(json.dumps({"snapshots": list(snapshots), **more}).encode())


def test_a_page_is_what_it_says_with_its_snapshots_by_time() -> None:
    later = snapshot(collected_at="2026-11-22T11:00:30+01:00", samples=None)
    found = page(later, snapshot(), has_more=True, next_cursor="2026-11-22T10:00:30.123456789Z")
    assert isinstance(found, Page)
    at = datetime(2026, 11, 22, 10, 0, 0, 500_000, UTC)
    first = Snapshot("jp-1", "prod", at, (Sample(SUBJECT, "tcp", 100, 50),), 0)
    assert found.snapshots == (first, Snapshot("jp-1", "prod", datetime(2026, 11, 22, 10, 0, 30, tzinfo=UTC), (), 0))
    assert found.has_more
    assert found.next_cursor is not None
    assert found.next_cursor.text == "2026-11-22T10:00:30.123456789Z"
    assert found.next_cursor.nanos % 10**9 == 123_456_789


def test_an_empty_page_has_no_cursor_and_no_more() -> None:
    assert parse_page(b'{"snapshots": null, "next_cursor": "", "has_more": false, "new": 1}') == Page((), None, False)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"snapshots": 1}', b'{"has_more": 1}', b'{"next_cursor": "soon"}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_page_is_refused(body: bytes) -> None:
    found = parse_page(body)
    assert isinstance(found, Malformed)
    assert len(found.quoted) <= 120


@pytest.mark.parametrize(
    "changes",
    [
        {"node_id": "absent"},
        {"node_id": ""},
        {"node_id": 7},
        {"node_id": "n" * 201},
        {"env": "absent"},
        {"env": "pr\nod"},
        {"collected_at": "absent"},
        {"collected_at": "0001-01-01T00:00:00Z"},
        {"collected_at": "2026-11-22"},
        {"collected_at": "2026-11-22T10:00:00"},
        {"collected_at": 1_700_000_000},
        {"samples": {}},
    ],
)
def test_wc18_a_snapshot_that_lacks_a_required_field_refuses_the_page(changes: dict[str, Any]) -> None:
    found = page(snapshot(), snapshot(**changes))
    assert isinstance(found, Malformed)
    assert found.kind == "incomplete"


@pytest.mark.parametrize(
    "changes",
    [
        {"uuid": "absent"},
        {"uuid": ""},
        {"uuid": "7"},
        {"uuid": SUBJECT.replace("-", "")},
        {"inbound_tag": "absent"},
        {"inbound_tag": None},
        {"uplink_bytes_total": "absent"},
        {"downlink_bytes_total": "absent"},
        {"uplink_bytes_total": -1},
        {"downlink_bytes_total": TOTAL_MAX + 1},
        {"uplink_bytes_total": 1.5},
        {"uplink_bytes_total": True},
        {"uplink_bytes_total": "100"},
    ],
)
def test_wc18_a_sample_that_says_nothing_usable_is_counted_and_the_others_go_on(changes: dict[str, Any]) -> None:
    found = page(snapshot(samples=[sample(**changes), sample(), 7]))
    assert isinstance(found, Page)
    assert found.snapshots[0].samples == (Sample(SUBJECT, "tcp", 100, 50),)
    assert found.snapshots[0].invalid == 2


def test_a_subject_in_upper_case_is_the_same_subject_and_an_email_is_not_needed() -> None:
    found = page(snapshot(samples=[sample(uuid=SUBJECT.upper(), email="absent", inbound_tag="")]))
    assert isinstance(found, Page)
    assert found.snapshots[0].samples == (Sample(SUBJECT, "", 100, 50),)


@pytest.mark.parametrize("form", ["object", "array", "lines"])
def test_c25_an_object_an_array_and_objects_by_the_line_can_be_pushed(form: str) -> None:
    one, two = snapshot(extra=1), snapshot(collected_at="2026-11-22T09:00:00Z")
    body = {
        "object": json.dumps(one, indent=1),
        "array": json.dumps([one, two]),
        "lines": f"{json.dumps(one)}\r\n\n{json.dumps(two)}\n",
    }[form]
    found = parse_pushed(body.encode())
    assert isinstance(found, tuple)
    assert len(found) == (1 if form == "object" else 2)
    assert [each.collected_at for each in found] == sorted(each.collected_at for each in found)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "unreadable"),
        (b" \n", "unreadable"),
        (b"[]", "unreadable"),
        (b"7", "unreadable"),
        (b"[7]", "unreadable"),
        (b"{}{", "unreadable"),
        (b"x" * 500, "unreadable"),
        (b"[" * 100_000, "unreadable"),
        (b"{}", "incomplete"),
        (b'{"node_id": "n", "env": "e"}', "incomplete"),
    ],
)
def test_c25_what_cannot_be_read_is_told_from_what_lacks_a_field(body: bytes, kind: str) -> None:
    found = parse_pushed(body)
    assert isinstance(found, Malformed)
    assert found.kind == kind
    assert len(found.quoted) <= 120


def test_wc12_cursors_are_told_apart_to_the_nanosecond() -> None:
    texts = ["2026-11-22T10:00:00Z", "2026-11-22T10:00:00.000000001Z", "2026-11-22T11:00:00.1+01:00"]
    cursors = [parse_cursor(text) for text in texts]
    nanos = [each.nanos for each in cursors if each is not None]
    assert nanos == sorted(set(nanos))
    assert len(nanos) == 3
    assert parse_cursor("2026-11-22T10:00:00.0000000001Z") is None


@given(st.datetimes(datetime(2000, 1, 1), datetime(2199, 12, 31), timezones=st.just(UTC)))  # noqa: DTZ001 - a zone is given
def test_an_instant_that_is_written_is_read_as_itself(instant: datetime) -> None:
    assert parse_instant(format_instant(instant)) == instant
    assert format_instant(instant).endswith("Z")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(AT) | st.just(SUBJECT),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*snapshot(), *sample(), "snapshots", "has_more", "next_cursor"]) | st.text(),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(JSON | st.binary())
def test_nothing_that_is_sent_is_more_than_refused(document: Any) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    for found in (parse_page(body), parse_pushed(body)):
        listed = found.snapshots if isinstance(found, Page) else found if isinstance(found, tuple) else ()
        for each in listed:
            assert each.node_id
            assert each.collected_at.tzinfo is UTC
            assert all(0 <= total <= TOTAL_MAX for one in each.samples for total in (one.up, one.down))
