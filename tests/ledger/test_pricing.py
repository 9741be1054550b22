"""Prices: which endpoint a request is charged as, at which price, and for which answers."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.ids import EndpointId
from callora.ledger.money import Stroops
from callora.ledger.pricing import AmbiguousPath, Endpoint, EndpointTable, Price, parse_billable

quick = settings(max_examples=500, database=None)
NOW = datetime(2026, 5, 1, tzinfo=UTC)


def endpoint(method: str, path: str, number: int = 1, prices: Sequence[Price] = ()) -> Endpoint:
    return Endpoint(EndpointId(number), method, path, frozenset({200}), None, tuple(prices))


def table(*lines: str) -> EndpointTable:
    """Return the table of lines such as `GET /a/{x}`."""
    parted = [line.partition(" ") for line in lines]
    return EndpointTable([endpoint(method, path, number) for number, (method, _, path) in enumerate(parted)])


def matched(known: EndpointTable, line: str) -> str | None:
    """Return the endpoint, as `method path`, that a request such as `GET /a/b` is charged as."""
    method, path = line.split(" ", 1)
    found = known.match(method, path.encode("latin-1"))
    return None if found is None else f"{found.method} {found.path}"


# A naive model: every pattern is a regular expression, and the best of those that match is found by comparing kinds,
# segment by segment: a literal beats a parameter, a parameter beats the rest; then an exact method beats any.


def _kinds(path: str) -> list[int]:
    if path == "*":
        return [2]
    return [
        2 if part == "*" and last else 1 if part.startswith("{") else 0
        for part, last in ((part, index == path.count("/") - 1) for index, part in enumerate(path[1:].split("/")))
    ]


def _expression(path: str) -> str:
    if path == "*":
        return r"/.*"
    parts = path[1:].split("/")
    pattern = ""
    for index, part in enumerate(parts):
        if part == "*" and index == len(parts) - 1:
            return pattern + (r"(/.*)?" if pattern else r"/.*")
        pattern += "/" + (r"[^/]+" if part.startswith("{") else re.escape(part))
    return pattern


def model(known: Sequence[tuple[str, str]], method: str, path: str) -> set[tuple[str, str]]:
    """Return the endpoints that may be charged: one, or several that only differ in a name, or none."""
    matching = [
        (each_method, each_path)
        for each_method, each_path in known
        if each_method in ("*", method) and re.fullmatch(_expression(each_path), path)
    ]
    best = min(((_kinds(path), method == "*") for method, path in matching), default=None)
    return {each for each in matching if (_kinds(each[1]), each[0] == "*") == best}


segments = st.sampled_from(["a", "b", "{x}", "{y}"])
paths = st.one_of(
    st.just("*"),
    st.lists(segments, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    st.lists(segments, max_size=2).map(lambda parts: "/" + "/".join([*parts, "*"])),
)
endpoints = st.lists(st.tuples(st.sampled_from(["GET", "POST", "*"]), paths), unique=True, max_size=8)
requested = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


@quick
@given(endpoints, st.sampled_from(["GET", "POST", "PUT"]), requested)
def test_the_most_specific_endpoint_is_charged_as_a_naive_model_finds_it(
    known: list[tuple[str, str]], method: str, path: str
) -> None:
    made = EndpointTable([endpoint(*each, number) for number, each in enumerate(known)])
    found = made.match(method, path.encode())
    expected = model(known, method, path)
    if found is None:
        assert expected == set()
    else:
        assert (found.method, found.path) in expected


@quick
@given(endpoints, st.sampled_from(["GET", "POST"]), requested, st.data())
def test_encoding_a_path_never_changes_what_it_is_charged_as(
    known: list[tuple[str, str]], method: str, path: str, data: st.DataObject
) -> None:
    made = EndpointTable([endpoint(*each, number) for number, each in enumerate(known)])
    plain = made.match(method, path.encode())
    places = data.draw(st.sets(st.integers(1, len(path) - 1)))
    disguised = "".join(f"%{ord(c):02x}" if index in places else c for index, c in enumerate(path))
    assert unquote_to_bytes(disguised) == path.encode()
    try:
        found = made.match(method, disguised.encode())
    except AmbiguousPath:
        return
    assert found is plain or found is None


@pytest.mark.parametrize(
    ("lines", "request_line", "expected"),
    [
        (["GET /a", "GET /{x}"], "GET /a", "GET /a"),
        (["GET /a", "GET /{x}"], "GET /b", "GET /{x}"),
        (["GET /{x}", "GET /*"], "GET /b", "GET /{x}"),
        (["GET /{x}", "GET /*"], "GET /b/c", "GET /*"),
        (["GET /a/*", "GET /{x}/b"], "GET /a/b", "GET /a/*"),
        (["GET /a/*", "* *"], "GET /a", "GET /a/*"),
        (["* /a", "GET /*"], "GET /a", "* /a"),
        (["* /a", "GET /a"], "GET /a", "GET /a"),
        (["* /a", "GET /a"], "PUT /a", "* /a"),
        (["GET /a"], "POST /a", None),
        (["GET /a"], "GET /ab", None),
        (["GET /a"], "GET /a/b", None),
        (["GET /a/b"], "GET /a", None),
        (["GET /a"], "GET /A", None),
        (["GET /{x}"], "GET /", None),
        (["* *"], "GET ", "* *"),
        (["* *"], "GET /", "* *"),
        (["GET /"], "GET ", "GET /"),
        (["* /*"], "GET /", "* /*"),
        ([], "GET /a", None),
    ],
)
def test_an_endpoint_matches_by_method_and_whole_segments(
    lines: list[str], request_line: str, expected: str | None
) -> None:
    assert matched(table(*lines), request_line) == expected


@pytest.mark.parametrize(
    "path",
    [
        *("/cheap/../costly", "/./costly", "/costly/.", "/cheap/..", "/..", "/.", "/%2e%2e/costly", "/.%2E/costly"),
        *(
            "/cheap%2f..%2fcostly",
            "/cheap/..%2fcostly",
            "/cheap/..;/costly",
            "/cheap\\..\\costly",
            "/cheap/..%5ccostly",
        ),
        *("/%63ostly", "/cheap%2fcostly%2f..", "/%2fcostly", "//costly", "/\\costly", "/costl%79", "/costly%2fx"),
    ],
)
def test_a_path_that_an_upstream_could_read_as_another_endpoint_is_refused(path: str) -> None:
    known = table("* *", "GET /costly", "GET /costly/x", "GET /cheap/{x}")
    with pytest.raises(AmbiguousPath):
        known.match("GET", path.encode("latin-1"))


@pytest.mark.parametrize("path", ["/a.b", "/...", "/.well-known/x", "/a..b", "/x/%41", "/x/%C3%B6", "/x/%zz", "/x//y"])
def test_odd_paths_that_can_be_read_in_one_way_only_pass(path: str) -> None:
    assert matched(table("* *"), f"GET {path}") == "* *"


def test_a_price_holds_from_its_date_until_the_next_and_before_the_first_there_is_none() -> None:
    prices = [Price(number, Stroops(number * 10), NOW + timedelta(days=number)) for number in (1, 2, 3)]
    priced = endpoint("GET", "/a", 1, prices)
    for days, expected in ((0.99, None), (1, 1), (1.99, 1), (2, 2), (2.5, 2), (3, 3), (400, 3)):
        found = priced.price_at(NOW + timedelta(days=days))
        assert (None if found is None else found.version) == expected
    assert endpoint("GET", "/a").price_at(NOW) is None
    assert endpoint("GET", "/a", 1, prices[:1]).price_at(NOW) is None


@quick
@given(st.lists(st.integers(0, 20), max_size=8).map(sorted), st.integers(-1, 21))
def test_the_price_in_effect_is_the_last_that_began(starts: list[int], at: int) -> None:
    prices = [Price(number, Stroops(1), NOW + timedelta(days=start)) for number, start in enumerate(starts)]
    begun = [price for price in prices if price.effective_from <= NOW + timedelta(days=at)]
    assert endpoint("GET", "/a", 1, prices).price_at(NOW + timedelta(days=at)) == (begun[-1] if begun else None)


def test_billable_statuses_are_classes_and_single_statuses() -> None:
    assert parse_billable("2xx") == frozenset(range(200, 300))
    assert parse_billable("404") == {404}
    assert parse_billable("2xx,404,5xx") == frozenset(range(200, 300)) | {404} | frozenset(range(500, 600))
