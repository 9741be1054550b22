"""What a call is: the endpoint it matches, the price it has now, the answers it is charged for.

An endpoint matches by method and whole path segments; the most specific match wins, literal before `{parameter}` before
a trailing `*`, then the exact method before `*`. What matches nothing has no price, and is not offered.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final
from urllib.parse import unquote_to_bytes

import attrs

from callora.ledger.ids import ApiId, DeveloperId, EndpointId
from callora.ledger.money import Stroops
from callora.ledger.rating import RateCard

_DOT_SEGMENT: Final = re.compile(rb"(?:^|[/\\])\.{1,2}(?:[/\\;]|$)")
_KNOWN_MAX: Final = 4096
"""Paths whose match is remembered, for each API."""
_SLASHES: Final = re.compile(rb"[/\\]+")


class AmbiguousPath(ValueError):
    """A path that an upstream might read as another endpoint than the one it would be charged for."""


@attrs.frozen(slots=True)
class Price:
    """One version of an endpoint's price."""

    version: int
    amount: Stroops
    """Of one unit."""
    effective_from: datetime
    card: RateCard | None = None
    """What a unit is; None where it is a call, at no credits."""


@attrs.frozen(slots=True, eq=False)
class Endpoint:
    """One priced endpoint of an API."""

    endpoint_id: EndpointId
    method: str
    """An upper-case method, or `*`."""
    path: str
    """`/literal/{parameter}/*`, or `*` for every path."""
    billable: frozenset[int]
    """The upstream statuses that are charged."""
    required_scope: str | None
    prices: tuple[Price, ...]
    """By effective_from, oldest first."""

    def price_at(self, now: datetime) -> Price | None:
        """Return the version in effect, or None before the first."""
        if len(self.prices) == 1:
            return self.prices[0] if self.prices[0].effective_from <= now else None
        index = bisect_right(self.prices, now, key=lambda price: price.effective_from)
        return self.prices[index - 1] if index else None


def parse_billable(text: str) -> frozenset[int]:
    """Return the statuses that `2xx,404` names."""
    statuses: set[int] = set()
    for item in text.split(","):
        if item.endswith("xx"):
            statuses.update(range(int(item[0]) * 100, int(item[0]) * 100 + 100))
        else:
            statuses.add(int(item))
    return frozenset(statuses)


def _segments(path: bytes) -> list[bytes]:
    return path.removeprefix(b"/").split(b"/")


@attrs.frozen(slots=True)
class _Pattern:
    literals: tuple[bytes | None, ...]
    """None stands for a parameter."""
    open_ended: bool
    endpoint: Endpoint

    def matches(self, method: str, segments: Sequence[bytes]) -> bool:
        if self.endpoint.method not in ("*", method):
            return False
        if len(segments) < len(self.literals) or (len(segments) > len(self.literals) and not self.open_ended):
            return False
        return all(
            segment == literal if literal is not None else segment != b""
            for literal, segment in zip(self.literals, segments, strict=False)
        )

    @property
    def rank(self) -> tuple[object, ...]:
        """Sorts the most specific first."""
        return (
            (*(0 if literal is not None else 1 for literal in self.literals), 2 if self.open_ended else -1),
            -len(self.literals),
            self.endpoint.method == "*",
        )


def _compile(endpoint: Endpoint) -> _Pattern:
    if endpoint.path == "*":
        return _Pattern((), True, endpoint)
    segments = _segments(endpoint.path.encode())
    open_ended = segments[-1] == b"*"
    if open_ended:
        segments.pop()
    literals = tuple(None if s.startswith(b"{") and s.endswith(b"}") else s for s in segments)
    return _Pattern(literals, open_ended, endpoint)


class EndpointTable:
    """The endpoints of one API, ready to be matched."""

    __slots__ = ("_known", "_patterns")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._patterns = sorted((_compile(endpoint) for endpoint in endpoints), key=lambda pattern: pattern.rank)
        self._known: dict[tuple[str, bytes], Endpoint] = {}

    def match(self, method: str, path: bytes) -> Endpoint | None:
        """Return the endpoint that a request is charged as, or None.

        Args:
            path: the path below the API, as sent: `/reports/K%C3%B6ln`; `` and `/` are the same.

        Raises:
            AmbiguousPath: the path has dot segments, or its decoded form would be charged otherwise.
        """
        known = self._known.get((method, path))
        if known is not None:
            return known
        endpoint = self._match(method, path or b"/")
        if endpoint is not None and len(self._known) < _KNOWN_MAX:
            self._known[method, path] = endpoint
        return endpoint

    def _match(self, method: str, path: bytes) -> Endpoint | None:
        plain = unquote_to_bytes(path) if b"%" in path else path
        if b"." in plain and _DOT_SEGMENT.search(plain) is not None:
            raise AmbiguousPath("The path must not contain dot segments; send the path that they lead to.")
        found = self._find(method, path)
        literal = found is not None and found.path.encode() == path
        if not literal and (b"%" in path or b"//" in path or b"\\" in path or (path[-1:] == b"/" and path != b"/")):
            meant = self._find(method, _SLASHES.sub(b"/", plain).rstrip(b"/") or b"/")
            if meant is not found:
                raise AmbiguousPath(
                    "The path can be read as two endpoints; send it decoded, without empty segments or a last slash."
                )
        return found

    def _find(self, method: str, path: bytes) -> Endpoint | None:
        segments = _segments(path)
        for pattern in self._patterns:
            if pattern.matches(method, segments):
                return pattern.endpoint
        return None


@attrs.frozen(slots=True, eq=False)
class ApiRecord:
    """A published API as the gateway knows it."""

    api_id: ApiId
    slug: str
    developer_id: DeveloperId
    base_url: str
    active: bool
    """False: paused, archived or a draft; not offered."""
    upstream_headers: Mapping[str, str]
    """Set on every request to the upstream, as the developer configured."""
    endpoints: EndpointTable
