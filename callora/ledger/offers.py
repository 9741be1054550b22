"""What a developer may offer: slugs, endpoints and the paths they cover, header fields for his upstream, standings.

Everything here is a rule without state. What a rule refuses comes back as `Wrong` values, so that all of it can be told
at once; what stands in the store is checked against the same rules before it is changed.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

import attrs

from callora.ledger.money import Stroops
from callora.ledger.pricing import Price
from callora.ledger.rating import RateCard

Status = Literal["draft", "active", "paused", "archived"]
Move = Literal["publish", "pause", "resume", "archive"]

SLUG_CHARS_MAX: Final = 63
PATH_CHARS_MAX: Final = 512
PRICE_MAX: Final = Stroops(1_000_000 * 10_000_000)
"""A call's highest price: a million USDC, as the table of prices has it."""
ENDPOINTS_MAX: Final = 500
"""Endpoints that an API may offer at a time."""
APIS_MAX: Final = 500
"""APIs of one developer that are not deleted."""
HEADERS_MAX: Final = 20
HEADER_NAME_CHARS_MAX: Final = 100
HEADER_VALUE_CHARS_MAX: Final = 2048
HEADERS_CHARS_MAX: Final = 8192
"""Names and values together: a quarter of what a head may hold, so that the caller's own fields fit beside them."""
MASK: Final = "****"
_MASKED_TAIL_CHARS: Final = 4
_MASKED_TAIL_FROM_CHARS: Final = 16
"""Of a shorter value the last characters would give away too much."""

METHODS: Final = ("*", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


@attrs.frozen
class Wrong:
    """One thing that a rule refuses."""

    place: tuple[str | int, ...]
    """Where: `("endpoints", 2)`."""
    message: str
    code: str


@attrs.frozen
class DatedPrice:
    """A price from a date on."""

    amount: Stroops
    """Of one unit."""
    effective_from: datetime | None
    """None is at once."""
    card: RateCard | None = None
    """What a unit is; None where it is a call, at no credits."""
    card_kept: bool = False
    """Whether the unit is to be what it is by then already."""


@attrs.frozen
class EndpointOffer:
    """An endpoint as its developer offers it."""

    method: str
    path: str
    prices: tuple[DatedPrice, ...]
    """One at least."""
    description: str | None = None
    billable_statuses: str = "2xx"
    required_scope: str | None = None
    kept: frozenset[str] = frozenset()
    """Fields that an endpoint which exists keeps as they are: those that were not sent."""


@attrs.frozen
class ApiOffer:
    """An API as its developer registers it."""

    name: str
    base_url: str
    endpoints: tuple[EndpointOffer, ...]
    slug: str | None = None
    """The name in calls; None to have it made of the name."""
    slug_is_wish: bool = False
    """Whether another may be made where the slug is taken."""
    description: str | None = None
    category: str | None = None
    tags: tuple[str, ...] = ()
    logo_url: str | None = None
    upstream_headers: Mapping[str, str] = attrs.field(factory=dict)
    status: Literal["draft", "active"] = "active"


@attrs.frozen
class ApiRef:
    """An API by its slug or its number."""

    slug: str
    number: int | None

    @classmethod
    def parse(cls, text: str) -> "ApiRef":
        """Return the reference that a well-formed text is: decimal digits are a number, else it is a slug."""
        return cls(text, int(text) if text.isdecimal() and len(text) <= 18 else None)


# --- slugs ------------------------------------------------------------------------------------------------------------

SLUG_PATTERN: Final = r"^[a-z][a-z0-9-]{0,62}$"
SLUGS_RESERVED: Final = frozenset({"import"})
"""Names that stand for something else where a slug could."""
_NUMBERED: Final = 6


def make_slug(name: str) -> str:
    """Return the slug that a name suggests: `Köln Weather!` is `koln-weather`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not slug or not slug[0].isalpha():
        slug = f"api-{slug}".rstrip("-")
    slug = slug[:SLUG_CHARS_MAX].rstrip("-")
    return f"{slug}-api" if slug in SLUGS_RESERVED else slug


def slug_candidates(wish: str, noise: str) -> tuple[str, ...]:
    """Return slugs to try, the wish first, then numbered ones, last one that nobody has.

    Args:
        noise: 1 to 32 lower-case letters and digits, new each time.
    """
    endings = [*(str(number) for number in range(2, _NUMBERED)), noise]
    return (wish, *(f"{wish[: SLUG_CHARS_MAX - 1 - len(ending)].rstrip('-')}-{ending}" for ending in endings))


# --- paths ------------------------------------------------------------------------------------------------------------

_PARAMETER: Final = re.compile(r"\{[A-Za-z0-9_.-]{1,64}\}", re.ASCII)
_LITERAL: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()+,;=:@-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_DOT_SEGMENT: Final = re.compile(rb"(?:^|[/\\])\.{1,2}(?:[/\\;]|$)")


def check_path(path: str) -> None:
    """Return where a call can match the path, as `pricing` matches it.

    Raises:
        ValueError: it has no meaning there, or every call of it would be refused as ambiguous; the message says which.
    """
    if path == "*":
        return
    if not path.startswith("/"):
        raise ValueError("must start with / or be *")
    if len(path) > PATH_CHARS_MAX:
        raise ValueError(f"must be at most {PATH_CHARS_MAX} characters")
    segments = path[1:].split("/")
    open_ended = segments[-1] == "*"
    if open_ended:
        segments.pop()
    patterned = open_ended
    for segment in segments:
        if _PARAMETER.fullmatch(segment) is not None:
            patterned = True
        elif "{" in segment or "}" in segment:
            raise ValueError("must have {name} as a whole path segment, of letters, digits, _, . and -")
        elif _LITERAL.fullmatch(segment) is None:
            raise ValueError("must have URL characters only, anything else percent-encoded, and * only at its end")
    if _DOT_SEGMENT.search(unquote_to_bytes(path)) is not None:
        raise ValueError("must not have . or .. as a path segment")
    # A last slash means something only in a path that is compared as it stands.
    last = len(segments) if patterned else len(segments) - 1
    if not all(segments[:last]):
        raise ValueError("must not have empty segments; with {name} or * it must not end with /")
    if patterned and "%" in path:
        raise ValueError("must be free of percent-encoding where it has {name} or *")


def signature(method: str, path: str) -> tuple[object, ...]:
    """Return what two endpoints of an API must differ in, or one of them would never be matched."""
    segments = [] if path == "*" else path[1:].split("/")
    open_ended = path == "*" or segments[-1] == "*"
    if segments and open_ended:
        segments.pop()
    return method, open_ended, *(None if segment.startswith("{") else segment for segment in segments)


def check_endpoints(offered: Sequence[EndpointOffer], present: Sequence[tuple[str, str]] = ()) -> list[Wrong]:
    """Return what is wrong with endpoints as a set.

    Args:
        offered: what is added or changed; each is well-formed.
        present: method and path of the endpoints that the API offers already. One that is offered again is a change.
    """
    wrong = []
    seen: dict[tuple[object, ...], tuple[str, str, int | None]] = {
        signature(method, path): (method, path, None) for method, path in present
    }
    for number, endpoint in enumerate(offered):
        mark = signature(endpoint.method, endpoint.path)
        method, path, first = seen.setdefault(mark, (endpoint.method, endpoint.path, number))
        place = ("endpoints", number)
        same = (method, path) == (endpoint.method, endpoint.path)
        if first is not None and first != number:
            what = "is the same method and path as" if same else "covers the same calls as"
            wrong.append(Wrong(place, f"{what} endpoints[{first}]", "DUPLICATE"))
        elif first is None and not same:
            wrong.append(Wrong(place, f"covers the same calls as {method} {path}, which the API has", "DUPLICATE"))
        elif first is None:
            seen[mark] = (method, path, number)
        wrong += [
            Wrong((*place, "rate_card"), message, "INVALID_VALUE")
            for price in endpoint.prices
            if price.card is not None
            for message in price.card.wrong(price.amount)
        ]
    return wrong


# --- prices -----------------------------------------------------------------------------------------------------------

PRICE_VERSIONS_MAX: Final = 1000
"""Versions of one endpoint's price."""


def new_versions(
    present: Sequence[Price], last_version: int, offered: Sequence[DatedPrice], now: datetime
) -> tuple[Price, ...]:
    """Return the versions that give an endpoint these prices; one that says again what holds at its date needs none.

    A price that is dated ahead is a promise: it holds from its date whatever changes before, until another is given for
    its date or a later one.

    Args:
        present: versions in effect or ahead, in any order.
        last_version: the highest number given so far, 0 before the first.
        offered: a date that has passed is at once.
    """
    known = list(present)
    for each in offered:
        at = now if each.effective_from is None else max(each.effective_from, now)
        earlier = [price for price in known if price.effective_from <= at]
        there = max(earlier, key=lambda price: (price.effective_from, price.version), default=None)
        card = there.card if there is not None and each.card_kept else each.card
        said = there is not None and (there.amount, there.card) == (each.amount, card)
        if there is None or not said or at > max(there.effective_from, now):
            last_version += 1
            known.append(Price(last_version, each.amount, at, card))
    return tuple(known[len(present) :])


def wrong_versions(
    present: Sequence[Price], last_version: int, offered: Sequence[DatedPrice], now: datetime
) -> list[str]:
    """Return what does not fit together in the versions that `new_versions` makes: a unit that is kept, a new price."""
    versions = new_versions(present, last_version, offered, now)
    return [message for each in versions if each.card is not None for message in each.card.wrong(each.amount)]


# --- header fields ----------------------------------------------------------------------------------------------------

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?", re.ASCII)
HEADERS_REFUSED: Final = frozenset(
    {
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "forwarded",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
        "x-real-ip",
        "x-request-id",
    }
)
"""What belongs to one connection, frames or codes a body, names the host or the client, or is Callora's to say."""
_PREFIXES_REFUSED: Final = ("x-forwarded-", "x-callora-")


def check_headers(headers: Mapping[str, str | None]) -> list[str]:
    """Return what is wrong with header fields for an upstream, each as a sentence's end; they are sent as they stand.

    Args:
        headers: by name; None takes the field away.
    """
    wrong = []
    if len(headers) > HEADERS_MAX:
        wrong.append(f"must be at most {HEADERS_MAX} fields")
    if len({name.lower() for name in headers}) < len(headers):
        wrong.append("must name each field once, in whatever case")
    if sum(len(name) + len(value or "") for name, value in headers.items()) > HEADERS_CHARS_MAX:
        wrong.append(f"must be at most {HEADERS_CHARS_MAX} characters together")
    for name, value in headers.items():
        if _TOKEN.fullmatch(name) is None or len(name) > HEADER_NAME_CHARS_MAX:
            wrong.append(f"must have names that are tokens of at most {HEADER_NAME_CHARS_MAX} characters")
            continue
        # Some servers read an underscore as a hyphen.
        meant = name.lower().replace("_", "-")
        if meant in HEADERS_REFUSED or meant.startswith(_PREFIXES_REFUSED):
            wrong.append(f"must not have {name}: it is not the developer's to set")
        elif value is not None and (_VALUE.fullmatch(value) is None or len(value) > HEADER_VALUE_CHARS_MAX):
            visible = f"1 to {HEADER_VALUE_CHARS_MAX} visible ASCII characters, blanks inside only"
            wrong.append(f"must have a value for {name} of {visible}")
        elif value is not None and value.startswith(MASK):
            wrong.append(f"must have the value of {name} itself, not what masks it")
    return list(dict.fromkeys(wrong))


def merge_headers(present: Mapping[str, str], changes: Mapping[str, str | None] | None) -> dict[str, str]:
    """Return the fields after a change: a value sets its field, None takes it away, no changes at all take all away."""
    if changes is None:
        return {}
    touched = {name.lower() for name in changes}
    kept = {name: value for name, value in present.items() if name.lower() not in touched}
    return {**kept, **{name: value for name, value in changes.items() if value is not None}}


def masked(value: str) -> str:
    """Return what its owner is shown of a stored secret."""
    return MASK + (value[-_MASKED_TAIL_CHARS:] if len(value) >= _MASKED_TAIL_FROM_CHARS else "")


# --- standings --------------------------------------------------------------------------------------------------------

_MOVES: Final[Mapping[Move, tuple[frozenset[str], Status]]] = {
    "publish": (frozenset({"draft", "active"}), "active"),
    "pause": (frozenset({"active", "paused"}), "paused"),
    "resume": (frozenset({"paused", "active"}), "active"),
    "archive": (frozenset({"draft", "active", "paused", "archived"}), "archived"),
}


def after(status: str, move: Move) -> Status | None:
    """Return the status that a move leads to, None where it is not allowed; moving where one is already is allowed."""
    allowed, to = _MOVES[move]
    return to if status in allowed else None
