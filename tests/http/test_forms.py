"""Forms: what is taken, what is refused, and how everything wrong is told at once."""

import json
from datetime import UTC, datetime
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from werkzeug.datastructures import MultiDict

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    DEPTH_MAX,
    Flag,
    Form,
    Instant,
    Page,
    PageQuery,
    PositiveUsdc,
    Usdc,
    Uuid,
    decode_cursor,
    encode_cursor,
    parse_json,
    read_body,
    read_texts,
)


class Endpoint(Form):
    path: Annotated[str, Field(pattern="^/", max_length=5)]
    price: Usdc


class Thing(Form):
    name: Annotated[str, Field(min_length=1, max_length=3)]
    count: Annotated[int, Field(ge=1, le=9)]
    endpoints: Annotated[list[Endpoint], Field(max_length=2, default_factory=list)]
    when: Instant | None = None


class Query(Form):
    on: Flag = False
    at: Instant | None = None
    id: Uuid | None = None
    amount: PositiveUsdc | None = None


def wrong(body: object) -> dict[str, str]:
    made, details = read_body(Thing, json.dumps(body).encode())
    assert (made is None) == bool(details)
    return {detail["field"]: detail["code"] for detail in details}


def test_everything_wrong_is_told_at_once_by_its_path() -> None:
    body = {
        "name": "long",
        "count": "1",
        "extra": 1,
        "endpoints": [{"path": "/a", "price": "1"}, {"path": "x", "price": "1.00000001"}],
    }
    assert wrong(body) == {
        "body.name": "TOO_LARGE",
        "body.count": "INVALID_TYPE",
        "body.endpoints[1].path": "INVALID_FORMAT",
        "body.endpoints[1].price": "INVALID_VALUE",
        "body.extra": "UNKNOWN_FIELD",
    }
    assert wrong({}) == {"body.name": "REQUIRED", "body.count": "REQUIRED"}
    assert wrong({"name": "", "count": 0}) == {"body.name": "TOO_SMALL", "body.count": "TOO_SMALL"}
    assert wrong([]) == {"body": "INVALID_TYPE"}


def test_no_detail_repeats_what_was_sent() -> None:
    _, details = read_body(Thing, b'{"name": "a secret that is long", "count": true}')
    assert "secret" not in json.dumps(details)


def test_an_integer_may_be_written_with_a_fraction_of_zero() -> None:
    made, details = read_body(Thing, b'{"name": "a", "count": 2.0}')
    assert details == []
    assert made is not None
    assert made.count == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\u0000"}',
        b'{"\\u0000": 1}',
        b"\xff",
        b"[" * (DEPTH_MAX + 2) + b"]" * (DEPTH_MAX + 2),
        b"[" * 100_000,
        b"1" * 10_000,
    ],
    ids=lambda body: str(body[:20]),
)
def test_what_is_not_plain_json_is_refused(body: bytes) -> None:
    with pytest.raises(ProblemRaised) as refused:
        parse_json(body)
    assert refused.value.problem.code == "VALIDATION_ERROR"
    assert isinstance(refused.value.details, list)
    assert refused.value.details[0]["field"] == "body"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-21", datetime(2026, 11, 21, tzinfo=UTC)),
        ("2026-11-21T10:00:00Z", datetime(2026, 11, 21, 10, tzinfo=UTC)),
        ("2026-11-21T12:00:00.5+02:00", datetime(2026, 11, 21, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-11-21T12:00:00 02:00", datetime(2026, 11, 21, 10, tzinfo=UTC)),
    ],
)
def test_a_moment_is_read_in_utc(text: str, moment: datetime) -> None:
    made, details = read_texts(Query, "query", MultiDict({"at": text}))
    assert details == []
    assert made is not None
    assert made.at == moment


@pytest.mark.parametrize(
    "texts",
    [
        {"at": "2026-11-21T10:00:00"},
        {"at": "1700000000"},
        {"at": "20261121"},
        {"at": "0001-01-01T00:00:00+14:00"},
        {"at": "2026-13-01"},
        {"on": "yes"},
        {"on": "1"},
        {"id": "not-a-uuid"},
        {"amount": "0"},
        {"amount": "1e3"},
        {"amount": "-1"},
        {"unknown": "1"},
        {"on": "tr\0ue"},
    ],
)
def test_a_query_that_does_not_fit_is_refused(texts: dict[str, str]) -> None:
    made, details = read_texts(Query, "query", MultiDict(texts))
    assert made is None
    assert details


def test_a_name_sent_twice_is_refused() -> None:
    _, details = read_texts(Query, "query", MultiDict([("on", "true"), ("on", "false")]))
    assert [detail["field"] for detail in details] == ["query.on"]


@pytest.mark.parametrize("limit", ["0", "101", "-1", "1.0", "01", " 1", "1_0", "9" * 30, ""])
def test_a_limit_is_a_whole_number_within_its_bounds(limit: str) -> None:
    made, details = read_texts(PageQuery, "query", MultiDict({"limit": limit}))
    assert made is None
    assert [detail["field"] for detail in details] == ["query.limit"]


@given(st.lists(st.one_of(st.integers(-(2**62), 2**62), st.text(st.characters(exclude_categories=["Cs"]))), max_size=4))
def test_a_cursor_comes_back_as_it_went(position: list[str | int]) -> None:
    kinds = [type(part) for part in position]
    if "\0" not in position:
        assert decode_cursor(encode_cursor(*position), *kinds) == tuple(position)


@given(st.text(max_size=60))
def test_a_cursor_that_is_not_ours_is_refused_as_a_field(text: str) -> None:
    with pytest.raises(ProblemRaised) as refused:
        decode_cursor(text, str, int)
    assert refused.value.problem.code == "VALIDATION_ERROR"


def test_a_page_shows_one_less_than_was_read_and_points_behind_its_last() -> None:
    rows = [{"at": f"t{number}", "id": number} for number in range(4)]
    page = Page.of(rows, 3, "at", "id")
    assert [row["id"] for row in page.rows] == [0, 1, 2]
    assert page.meta.hasMore
    assert decode_cursor(page.meta.nextCursor, str, int) == ("t2", 2)
    last = Page.of(rows[:3], 3, "at", "id")
    assert not last.meta.hasMore
    assert last.meta.nextCursor is None
