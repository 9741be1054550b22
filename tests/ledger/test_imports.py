"""OpenAPI documents: whatever is in one, it is read or told, in time that its size bounds."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.imports import PriceList, read_openapi
from callora.ledger.money import Stroops
from callora.ledger.offers import check_endpoints, check_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OPERATIONS = st.dictionaries(
    st.sampled_from(["get", "post", "trace", "$ref", "parameters", "GET"]),
    JSON | st.fixed_dictionaries({}, optional={"operationId": JSON | st.sampled_from("ab"), "summary": JSON}),
    max_size=3,
)
PATHS = st.dictionaries(
    st.sampled_from(["/", "/a", "/{x}", "/{y}", "/a/", "x-y", "a", "", "*", "/*", "/a b"]),
    OPERATIONS | JSON,
    max_size=4,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "openapi": st.sampled_from(["3.0.3", "3.1.0", "2.0"]) | JSON,
        "info": st.fixed_dictionaries({}, optional={"title": JSON, "description": JSON}) | JSON,
        "servers": st.lists(st.fixed_dictionaries({"url": JSON}) | JSON, max_size=2) | JSON,
        "paths": PATHS | JSON,
    },
)
PRICES = PriceList(Stroops(1), {"/a": Stroops(2)}, {"GET /a": Stroops(3), "a": Stroops(4)})


@given(DOCUMENTS)
def test_whatever_a_document_holds_its_endpoints_may_be_offered_or_it_is_told_why_not(document: dict[str, Any]) -> None:
    found = read_openapi(document, PRICES, ["/{y}"])
    assert found.endpoints or found.wrong
    assert check_endpoints(found.endpoints) == []
    for endpoint in found.endpoints:
        check_path(endpoint.path)
        assert endpoint.path != "/{y}"
        assert endpoint.description is None or 1 <= len(endpoint.description) <= 1000
    assert found.name is None or (1 <= len(found.name) <= 120 and "\n" not in found.name)


def test_the_most_exact_price_counts() -> None:
    assert PRICES.of("GET", "/a", "a") == 3
    assert PRICES.of("POST", "/a", "a") == 4
    assert PRICES.of("POST", "/a", None) == 2
    assert PRICES.of("GET", "/b", "b") == 1
    assert PriceList(by_path={"/a": Stroops(0)}, default=Stroops(5)).of("GET", "/a", None) == 0, "free is a price"
    assert PriceList().of("GET", "/a", None) is None
