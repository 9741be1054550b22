"""What may be offered: every path that is taken can be called, every header field that is taken can be sent."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from callora.http.gateway.heads import HOP_BY_HOP
from callora.ledger.ids import EndpointId
from callora.ledger.money import Stroops
from callora.ledger.offers import (
    HEADERS_REFUSED,
    METHODS,
    SLUG_PATTERN,
    SLUGS_RESERVED,
    DatedPrice,
    EndpointOffer,
    Move,
    after,
    check_endpoints,
    check_headers,
    check_path,
    make_slug,
    masked,
    merge_headers,
    new_versions,
    signature,
    slug_candidates,
)
from callora.ledger.pricing import Endpoint, EndpointTable, Price, parse_billable

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SEGMENTS = st.sampled_from(
    ["a", "b", "{x}", "{y}", "", "a%20b", "a.b", "..", ".", "%2e", "*", "a*", "{", "{x}y", "ä", "a;b"]
)
PATHS = st.lists(SEGMENTS, max_size=4).map(lambda parts: "/" + "/".join(parts)) | st.sampled_from(["*", "", "a", "//"])


def taken(path: str) -> bool:
    """Tell whether a path may be offered."""
    try:
        check_path(path)
    except ValueError:
        return False
    return True


def table(*offers: tuple[str, str]) -> EndpointTable:
    """Return what the gateway makes of endpoints."""
    return EndpointTable(
        [
            Endpoint(EndpointId(number), method, path, parse_billable("2xx"), None, ())
            for number, (method, path) in enumerate(offers)
        ]
    )


def called(path: str) -> list[bytes]:
    """Return paths of calls of this endpoint, of which any other has at most one unless it covers the same calls."""
    parts = ["*"] if path == "*" else path[1:].split("/")
    open_ended = parts[-1] == "*"
    begun = [b"zz" if part.startswith("{") else part.encode() for part in (parts[:-1] if open_ended else parts)]
    return [b"/" + b"/".join([*begun, *[b"zz"] * more]) for more in ((0, 6) if open_ended else (0,))]


# --- paths ------------------------------------------------------------------------------------------------------------


@given(PATHS, st.sampled_from(METHODS))
def test_whatever_path_is_taken_can_be_called(path: str, method: str) -> None:
    assume(taken(path))
    for call in called(path):
        found = table((method, path)).match("GET" if method == "*" else method, call)
        assert found is not None and found.path == path


@given(st.lists(st.tuples(st.sampled_from(["GET", "*"]), PATHS), max_size=2, unique=True))
@example([("GET", "*"), ("GET", "/{x}/*")])
@example([("GET", "*"), ("GET", "/{x}")])
def test_of_two_endpoints_that_are_taken_neither_hides_the_other(offers: list[tuple[str, str]]) -> None:
    offers = [offer for offer in offers if taken(offer[1])]
    made = [EndpointOffer(method, path, ()) for method, path in offers]
    assume(not check_endpoints(made))
    both = table(*offers)
    for method, path in offers:
        found = [both.match("GET" if method == "GET" else "DELETE", call) for call in called(path)]
        assert (method, path) in [(each.method, each.path) for each in found if each is not None]


@pytest.mark.parametrize(
    "path", ["/", "*", "/*", "/a/", "/a/{b}/*", "/a%20b", "/v1.0/x-y_z~", "/{a}/{b.c-d}", "/a:b@c", "/" + "a" * 511]
)
def test_these_paths_are_taken(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "a",
            "/a b",
            "/a?b",
            "/a#b",
            "/ä",
            "/a\\b",
            "/%zz",
            "/%2",
            "/{}",
            "/{a",
            "/a}",
            "/{a}b",
            "/{a b}",
            "/{ä}",
        ),
        *("//", "/a//b", "//*", "/{a}/", "/a%20/{b}", "/a%20b/*", "/*/a", "/a*", "/.", "/a/..", "/%2E%2e/a", "/a/.;x"),
        *("/a\n", "/\0", "/" + "a" * 512, "**", "/{" + "a" * 65 + "}"),
    ],
)
def test_these_paths_are_not(path: str) -> None:
    assert not taken(path)


def test_what_covers_the_same_calls_is_told_with_both_places() -> None:
    offers = [EndpointOffer("GET", path, ()) for path in ("/a", "/{x}", "/a", "/{y}", "/b")]
    assert [(wrong.place, wrong.message) for wrong in check_endpoints(offers)] == [
        (("endpoints", 2), "is the same method and path as endpoints[0]"),
        (("endpoints", 3), "covers the same calls as endpoints[1]"),
    ]
    present = [("GET", "/{z}"), ("GET", "/a")]
    assert [wrong.place for wrong in check_endpoints(offers, present)] == [
        ("endpoints", 1),
        ("endpoints", 2),
        ("endpoints", 3),
    ]
    assert signature("GET", "*") == signature("GET", "/*") != signature("*", "*")


# --- slugs ------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=200), st.text("0123456789abcdef", min_size=12, max_size=12))
def test_every_name_has_slugs(name: str, noise: str) -> None:
    slugs = slug_candidates(make_slug(name), noise)
    assert len(set(slugs)) == len(slugs)
    for slug in slugs:
        assert re.fullmatch(SLUG_PATTERN, slug, re.ASCII) and slug not in SLUGS_RESERVED


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Köln Weather!", "koln-weather"),
        ("  2nd -- API ", "api-2nd-api"),
        ("天気", "api"),
        ("import", "import-api"),
        ("x" * 100, "x" * 63),
    ],
)
def test_a_slug_looks_like_its_name(name: str, slug: str) -> None:
    assert make_slug(name) == slug


# --- header fields ----------------------------------------------------------------------------------------------------


def test_no_field_of_a_connection_may_be_set() -> None:
    assert {name.decode() for name in HOP_BY_HOP} | {"host", "content-length", "x-request-id"} <= HEADERS_REFUSED
    for name in HEADERS_REFUSED:
        assert check_headers({name.title(): "x"}) != []
        assert check_headers({name.replace("-", "_"): "x"}) != []


@given(st.text("aZ-_ :\r\n\x00ä", max_size=3), st.text("a ~\r\n\x00\x7fäß", max_size=4))
def test_what_is_taken_is_one_line_of_a_head(name: str, value: str) -> None:
    if check_headers({name: value}):
        return
    line = f"{name}: {value}\r\n".encode("latin-1")
    assert re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [!-~]([ -~]*[!-~])?\r\n", line)


@pytest.mark.parametrize(
    "value", ["", " a", "a ", "a\r\nb", "a\nb", "a\0b", "ä", "\x7f", "a" * 2049, "****", "****abcd"]
)
def test_these_values_are_not_taken(value: str) -> None:
    assert len(check_headers({"X-A": value})) == 1


def test_names_are_counted_and_told_apart_in_any_case() -> None:
    assert check_headers({"X-A": "a", "x-a": "b"}) == ["must name each field once, in whatever case"]
    assert check_headers({"X-A": None, "Authorization": "Bearer x y", "Cookie": "a=b"}) == []


def test_merging_sets_replaces_and_takes_away() -> None:
    present = {"X-A": "1", "X-B": "2", "X-C": "3"}
    assert merge_headers(present, {"x-a": "9", "X-B": None, "X-D": "4"}) == {"X-C": "3", "x-a": "9", "X-D": "4"}
    assert merge_headers(present, {}) == present
    assert merge_headers(present, None) == {}


@given(st.text(max_size=40))
def test_a_mask_shows_a_quarter_at_most(value: str) -> None:
    shown = masked(value).removeprefix("****")
    assert value.endswith(shown) and len(shown) * 4 <= len(value)


# --- prices -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(-2, 6)), max_size=8))
def test_each_change_holds_from_its_date_until_the_next_one_dated_later(changes: list[tuple[int, int | None]]) -> None:
    """A day passes between changes; a naive list of (date, price) says what each day costs."""
    versions: list[Price] = []
    naive: list[tuple[datetime, int]] = []
    for day, (amount, ahead) in enumerate(changes):
        now = NOON + timedelta(days=day)
        date = None if ahead is None else now + timedelta(days=ahead)
        versions += new_versions(versions, len(versions), [DatedPrice(Stroops(amount), date)], now)
        naive.append((now if date is None else max(now, date), amount))
    assert [each.version for each in versions] == list(range(1, len(versions) + 1))
    endpoint = Endpoint(
        EndpointId(1),
        "GET",
        "/",
        frozenset(),
        None,
        tuple(sorted(versions, key=lambda each: (each.effective_from, each.version))),
    )
    for day in range(len(changes) + 8):
        now = NOON + timedelta(days=day)
        # Of what was said for a date up to now, the latest date counts, and what was said last of it.
        said = [(date, number) for number, (date, _) in enumerate(naive) if date <= now]
        price = endpoint.price_at(now)
        assert (price.amount if price is not None else None) == (naive[max(said)[1]][1] if said else None)


def test_what_an_endpoint_costs_anyway_is_no_version() -> None:
    ahead = NOON + timedelta(days=1)
    present = (Price(4, Stroops(10), NOON), Price(7, Stroops(20), ahead))

    def made(amount: int, date: datetime | None) -> tuple[Price, ...]:
        return new_versions(present, 7, [DatedPrice(Stroops(amount), date)], NOON)

    assert made(10, None) == made(20, ahead) == ()
    later = ahead + timedelta(days=1)
    assert made(20, later) == (Price(8, Stroops(20), later),), "what is promised for a date is kept"
    assert made(10, ahead) == (Price(8, Stroops(10), ahead),)
    assert made(20, None) == (Price(8, Stroops(20), NOON),)


# --- standings --------------------------------------------------------------------------------------------------------


def test_archived_is_for_ever_and_moving_where_one_is_is_allowed() -> None:
    moves: tuple[Move, ...] = ("publish", "pause", "resume", "archive")
    assert {
        (status, move): after(status, move) for status in ("draft", "active", "paused", "archived") for move in moves
    } == {
        ("draft", "publish"): "active",
        ("draft", "pause"): None,
        ("draft", "resume"): None,
        ("draft", "archive"): "archived",
        ("active", "publish"): "active",
        ("active", "pause"): "paused",
        ("active", "resume"): "active",
        ("active", "archive"): "archived",
        ("paused", "publish"): None,
        ("paused", "pause"): "paused",
        ("paused", "resume"): "active",
        ("paused", "archive"): "archived",
        ("archived", "publish"): None,
        ("archived", "pause"): None,
        ("archived", "resume"): None,
        ("archived", "archive"): "archived",
    }
