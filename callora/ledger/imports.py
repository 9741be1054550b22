"""An OpenAPI document as endpoints: what its operations are called, what each costs, and why some cannot be offered.

Reads OpenAPI 3.0 and 3.1 that has been parsed to plain values. References are never followed: what an endpoint needs,
its method and its path, stands in the document itself. Every look takes time proportional to the document.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from callora.ledger.money import Stroops
from callora.ledger.offers import ENDPOINTS_MAX, DatedPrice, EndpointOffer, Wrong, check_path, signature

NAME_CHARS_MAX: Final = 120
DESCRIPTION_CHARS_MAX: Final = 4000
ENDPOINT_DESCRIPTION_CHARS_MAX: Final = 1000
_VARIABLES_MAX: Final = 20
_WRONG_MAX: Final = 100
"""Past it nobody reads on, and neither does this."""
_TOO_MANY: Final = f"must be at most {ENDPOINTS_MAX} operations"
_URL_CHARS_MAX: Final = 2048
_VERSION: Final = re.compile(r"3\.[01]\.[0-9]{1,3}(?:-[A-Za-z0-9.]{1,20})?", re.ASCII)
_METHODS: Final = ("get", "post", "put", "patch", "delete", "head", "options")
_UNSUPPORTED: Final = ("trace",)
_VARIABLE: Final = re.compile(r"\{([^{}]{1,64})\}")


@attrs.frozen
class PriceList:
    """What the operations of a document cost; the most exact line counts."""

    default: Stroops | None = None
    by_path: Mapping[str, Stroops] = attrs.field(factory=dict)
    """By the document's path: `/pets/{id}`."""
    by_operation: Mapping[str, Stroops] = attrs.field(factory=dict)
    """By `GET /pets/{id}`, or by operationId."""

    def of(self, method: str, path: str, operation_id: str | None) -> Stroops | None:
        """Return an operation's price, None where no line has one."""
        named = self.by_operation.get(f"{method} {path}")
        if named is None and operation_id is not None:
            named = self.by_operation.get(operation_id)
        return next((each for each in (named, self.by_path.get(path)) if each is not None), self.default)


@attrs.frozen
class Imported:
    """What a document says."""

    name: str | None
    description: str | None
    base_url: str | None
    """The first server's URL where it is absolute."""
    endpoints: tuple[EndpointOffer, ...]
    wrong: tuple[Wrong, ...]
    """What keeps it from being offered as it is."""


def read_openapi(document: Mapping[str, Any], prices: PriceList, exclude: Sequence[str] = ()) -> Imported:
    """Return a document's operations as priced endpoints.

    Args:
        document: parsed JSON.
        exclude: operations to leave out: `/admin`, `GET /pets` or an operationId.
    """
    wrong: list[Wrong] = []
    version = document.get("openapi")
    if not isinstance(version, str) or _VERSION.fullmatch(version) is None:
        wrong.append(Wrong(("document", "openapi"), "must be 3.0.x or 3.1.x", "INVALID_FORMAT"))
    info = document.get("info")
    info = info if isinstance(info, dict) else {}
    name = _line(info.get("title"), NAME_CHARS_MAX)
    description = _text(info.get("description"), DESCRIPTION_CHARS_MAX) or _text(info.get("summary"), 1000)
    endpoints, wrong_paths = _endpoints(document.get("paths"), prices, frozenset(exclude))
    wrong += wrong_paths
    return Imported(name, description, _base_url(document.get("servers")), tuple(endpoints), tuple(wrong))


def _endpoints(paths: object, prices: PriceList, exclude: frozenset[str]) -> tuple[list[EndpointOffer], list[Wrong]]:
    if not isinstance(paths, dict):
        return [], [Wrong(("document", "paths"), "must be an object of paths", "REQUIRED")]
    endpoints: list[EndpointOffer] = []
    wrong: list[Wrong] = []
    met: set[str] = set()
    marks: dict[tuple[object, ...], str] = {}
    for path, item in paths.items():
        if len(wrong) >= _WRONG_MAX:
            return endpoints, wrong
        if len(endpoints) > ENDPOINTS_MAX:
            return endpoints, [*wrong, Wrong(("document", "paths"), _TOO_MANY, "TOO_LARGE")]
        if path.startswith("x-"):
            continue
        if not isinstance(item, dict):
            wrong.append(Wrong(("document", "paths", path), "must be an object", "INVALID_TYPE"))
            continue
        met.add(path)
        for method, operation in _operations(item):
            place = ("document", "paths", path, method.lower())
            operation_id = operation.get("operationId")
            operation_id = operation_id if isinstance(operation_id, str) else None
            names = {path, f"{method} {path}"} | ({operation_id} if operation_id is not None else set())
            met |= names
            if names & exclude:
                continue
            try:
                _check(path)
            except ValueError as error:
                wrong.append(Wrong(place, str(error), "UNSUPPORTED_PATH"))
                continue
            twin = marks.setdefault(signature(method, path), path)
            if twin != path:
                wrong.append(Wrong(place, f"covers the same calls as {twin}", "DUPLICATE"))
                continue
            price = prices.of(method, path, operation_id)
            if price is None:
                wrong.append(Wrong(place, "has no price, and there is no default price", "UNPRICED"))
                continue
            told = operation.get("summary") or operation.get("description")
            text = _text(told, ENDPOINT_DESCRIPTION_CHARS_MAX)
            endpoints.append(EndpointOffer(method, path, (DatedPrice(price, None),), text))
        if "$ref" in item and path not in exclude:
            wrong.append(Wrong(("document", "paths", path), "must not be a reference", "UNSUPPORTED_REFERENCE"))
        for method in _UNSUPPORTED:
            if method in item and not {path, f"{method.upper()} {path}"} & exclude:
                place = ("document", "paths", path, method)
                wrong.append(Wrong(place, "has a method that is not offered; exclude it", "UNSUPPORTED_METHOD"))
    wrong += _unknown(prices, exclude, met)
    if len(endpoints) > ENDPOINTS_MAX:
        wrong.append(Wrong(("document", "paths"), _TOO_MANY, "TOO_LARGE"))
    if not endpoints and not wrong:
        wrong.append(Wrong(("document", "paths"), "must have an operation", "TOO_SMALL"))
    return endpoints, wrong


def _operations(item: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return [(method.upper(), item[method]) for method in _METHODS if isinstance(item.get(method), dict)]


def _check(path: str) -> None:
    if path == "*" or path.endswith("/*"):
        raise ValueError("must not be a wildcard: add such an endpoint yourself")
    check_path(path)


def _unknown(prices: PriceList, exclude: frozenset[str], met: set[str]) -> list[Wrong]:
    """A line that names nothing is a slip of the pen, and would leave something at another price."""
    lists = (("prices", "by_path"), prices.by_path), (("prices", "by_operation"), prices.by_operation)
    wrong = [
        Wrong((*place, name), "names nothing in the document", "UNKNOWN_OPERATION")
        for place, lines in lists
        for name in lines
        if name not in met
    ]
    return wrong + [
        Wrong(("exclude",), f"has {name}, which names nothing in the document", "UNKNOWN_OPERATION")
        for name in sorted(exclude - met)
    ]


def _base_url(servers: object) -> str | None:
    """Return the first server's URL with its variables' defaults, None where that is not absolute."""
    if not isinstance(servers, list) or not servers or not isinstance(servers[0], dict):
        return None
    url, variables = servers[0].get("url"), servers[0].get("variables")
    if not isinstance(url, str) or len(url) > _URL_CHARS_MAX or len(_VARIABLE.findall(url)) > _VARIABLES_MAX:
        return None
    known = variables if isinstance(variables, dict) else {}

    def default(match: re.Match[str]) -> str:
        variable = known.get(match[1])
        value = variable.get("default") if isinstance(variable, dict) else None
        return value if isinstance(value, str) and len(value) <= _URL_CHARS_MAX else match[0]

    filled = _VARIABLE.sub(default, url)
    absolute = filled.lower().startswith(("http://", "https://")) and len(filled) <= _URL_CHARS_MAX
    return filled if absolute else None


def _line(value: object, chars_max: int) -> str | None:
    """Return a text as one line."""
    return _text(" ".join(value.split()), chars_max) if isinstance(value, str) else None


def _text(value: object, chars_max: int) -> str | None:
    """Return a text cut to a length, None where it is empty or none."""
    if not isinstance(value, str) or not value.strip():
        return None
    text = "".join(c for c in value.strip() if c.isprintable() or c == "\n")
    return text if len(text) <= chars_max else text[: chars_max - 1].rstrip() + "…"
