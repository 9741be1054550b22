"""The forms of requests and answers: what every model shares, and how what is wrong with one is told.

Models stand at the HTTP boundary only; behind it values are the ledger's own. Bodies are taken as sent: no text becomes
a number, no unknown field is ignored. All wrong fields are told at once, each by its path.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Final, TypeVar

import attrs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from werkzeug.datastructures import MultiDict

from callora.http.problems import ProblemRaised
from callora.ledger.money import Stroops, format_usdc, parse_usdc

DETAILS_MAX: Final = 50
"""Wrong fields told in one answer."""
DEPTH_MAX: Final = 64
"""Nesting of a JSON body."""
INT64_MAX: Final = 2**63 - 1

M = TypeVar("M", bound="Form")


class Form(BaseModel):
    """A request's or an answer's shape. Field names are the JSON's; a camelCase name is an alias."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True, defer_build=True
    )


# --- types that several forms share -----------------------------------------------------------------------------------


def _amount(text: str) -> str:
    parse_usdc(text)
    return text


def _positive_amount(text: str) -> str:
    if parse_usdc(text) <= 0:
        raise ValueError("must be more than 0")
    return text


_USDC_PATTERN: Final = r"^(0|[1-9][0-9]{0,11})(\.[0-9]{1,7})?$"
_USDC_SCHEMA: Final = WithJsonSchema({"type": "string", "pattern": _USDC_PATTERN, "examples": ["0.0100000"]})
Usdc = Annotated[str, AfterValidator(_amount), _USDC_SCHEMA]
"""An amount in a request: a decimal string of USDC with at most 7 places."""
PositiveUsdc = Annotated[str, AfterValidator(_positive_amount), _USDC_SCHEMA]
"""The same, more than 0."""
UsdcOut = Annotated[str, Field(pattern=r"^-?[0-9]+\.[0-9]{7}$", examples=["0.0100000"])]
"""An amount in an answer: a decimal string of USDC with exactly 7 places."""


def usdc(amount: int) -> str:
    """Return an amount as answers show it."""
    return format_usdc(amount)


def stroops(text: str) -> Stroops:
    """Return the amount that a validated text names."""
    return parse_usdc(text)


_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


def _uuid(text: str) -> str:
    lowered = text.lower()
    if _UUID.fullmatch(lowered) is None:
        raise ValueError("must be a UUID")
    return lowered


Uuid = Annotated[str, AfterValidator(_uuid), WithJsonSchema({"type": "string", "format": "uuid"})]
"""An id of ours, in lower case once taken."""


def _whole(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,18})", value, re.ASCII) is None:
        raise ValueError("must be a whole number")
    return int(value)


Whole = BeforeValidator(_whole)
"""Reads an integer in a path or a query: `Annotated[int, Field(ge=1), Whole]`, the constraints first."""


def _flag(value: object) -> object:
    if isinstance(value, str):
        if value not in ("true", "false"):
            raise ValueError("must be true or false")
        return value == "true"
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
"""true or false in a query."""
ApiNumber = Annotated[int, Field(ge=1, le=INT64_MAX), Whole]
"""The number of an API or an endpoint."""
Limit = Annotated[int, Field(ge=1, le=100), Whole]
"""How many items a page may have."""


def _instant(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value, re.ASCII):
            return datetime.combine(date.fromisoformat(value), time(), UTC)
        if re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]", value, re.ASCII) is None:
            raise ValueError
        # A plus sign in a query that was not encoded arrives as a blank.
        moment = datetime.fromisoformat(re.sub(r"(?<=[0-9]) (?=[0-9]{2}:?[0-9]{2}$)", "+", value.upper()))
        if moment.tzinfo is None:
            raise ValueError
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be an ISO 8601 date, or a date and time with its offset, such as 2026-11-21T10:00:00Z")


Instant = Annotated[
    datetime,
    BeforeValidator(_instant),
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "string", "format": "date"}]}),
]
"""A moment in a request, in UTC once taken; a date alone is its first instant in UTC."""


def iso(moment: datetime) -> str:
    """Return a moment as answers show it: UTC, milliseconds, `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


InstantOut = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""A moment in an answer; `iso` makes it."""

# --- pages ------------------------------------------------------------------------------------------------------------

Cursor = Annotated[str, Field(min_length=1, max_length=512, description="`meta.nextCursor` of the page before.")]


class PageQuery(Form):
    """What every list takes."""

    limit: Limit = Field(default=20, description="Items on a page.")
    cursor: Cursor | None = None


class PageMeta(Form):
    """Where a page stands in its list."""

    limit: int
    nextCursor: str | None = Field(description="Give it as `cursor` for the next page; null on the last.")
    hasMore: bool


def encode_cursor(*position: str | int) -> str:
    """Return an opaque cursor for a position in a list: the sort key of the last item shown."""
    return base64.urlsafe_b64encode(json.dumps(position, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, *kinds: type) -> tuple[Any, ...] | None:
    """Return the position that a cursor of ours names; None where there is none.

    Args:
        kinds: the type of each part, str or int.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.cursor`.
    """
    if cursor is None:
        return None
    try:
        position = json.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
        if [type(part) for part in position] != list(kinds):
            raise ValueError
        if any((isinstance(part, int) and not -INT64_MAX <= part <= INT64_MAX) or part == "\0" for part in position):
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
    return tuple(position)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    """Return a moment as a cursor holds it, exactly."""
    return (moment - _EPOCH) // _MICROSECOND


def moment_of(position: int) -> datetime:
    """Return the moment that a cursor's number names.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.cursor`.
    """
    try:
        return _EPOCH + position * _MICROSECOND
    except OverflowError:
        raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE") from None


def read_uuid(position: str) -> str:
    """Return the id that a cursor holds.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.cursor`.
    """
    if _UUID.fullmatch(position) is None:
        raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
    return position


@attrs.frozen
class Page:
    """One more row than the page shows was asked for; this is what is left of them."""

    rows: Sequence[Mapping[str, Any]]
    meta: PageMeta

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], limit: int, *columns: str) -> "Page":
        """Return the page of at most `limit` of these rows; the cursor holds the columns of its last one.

        Args:
            rows: at most `limit` + 1, in the list's order; a datetime column must have been read as text.
        """
        shown = rows[:limit]
        more = len(rows) > limit
        cursor = None
        if more:
            values = (shown[-1][column] for column in columns)
            cursor = encode_cursor(*(value if isinstance(value, int) else str(value) for value in values))
        return cls(shown, PageMeta(limit=limit, nextCursor=cursor, hasMore=more))


# --- reading ----------------------------------------------------------------------------------------------------------

_KINDS: Final = (
    (re.compile(r"missing"), "REQUIRED"),
    (re.compile(r"extra_forbidden"), "UNKNOWN_FIELD"),
    (re.compile(r".*_(type|parsing)|is_.*"), "INVALID_TYPE"),
    (re.compile(r".*too_short|greater_than.*"), "TOO_SMALL"),
    (re.compile(r".*too_long|less_than.*"), "TOO_LARGE"),
    (re.compile(r"string_pattern_mismatch|url.*"), "INVALID_FORMAT"),
)


def invalid(field: str, message: str, code: str) -> ProblemRaised:
    """Return the problem of one wrong field that a model cannot know.

    Args:
        field: its path, such as `query.cursor`.
    """
    return ProblemRaised("VALIDATION_ERROR", details=[{"field": field, "message": message, "code": code}])


def refused(root: str, error: ValidationError) -> list[dict[str, str]]:
    """Return the details of everything that is wrong, in the order of the fields."""
    details = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        kind = each["type"]
        code = next((name for pattern, name in _KINDS if pattern.fullmatch(kind)), "INVALID_VALUE")
        message = each["msg"].removeprefix("Value error, ")
        detail = {"field": field_path(root, each["loc"]), "message": message[:1].upper() + message[1:], "code": code}
        if detail not in details:
            details.append(detail)
    return details[:DETAILS_MAX]


def field_path(root: str, location: Sequence[str | int]) -> str:
    """Return a path such as `body.endpoints[0].path`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part != "function-after"]
    return root + "".join(parts)


class _Repeated(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Repeated
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _number(text: str) -> float | int:
    """1.0 is an integer in JSON; what a float cannot hold is refused where it is used."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def parse_json(body: bytes) -> Any:
    """Return what a JSON body says.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `body`: not UTF-8, not JSON, a key twice, NaN, a lone surrogate, or nested
            too deeply.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_number)
        _check_depth([value], 0)
        if "\\u" in text:  # else there is no way to write a NUL or half a character
            _check_texts(value)
    except _Repeated:
        raise invalid("body", "Must not name a field twice", "INVALID_BODY")
    except (ValueError, RecursionError):
        raise invalid("body", "Must be JSON in UTF-8", "INVALID_BODY")
    return value


def _check_depth(values: Iterable[Any], depth: int) -> None:
    if depth > DEPTH_MAX + 1:
        raise ValueError
    for value in values:
        kind = type(value)
        if kind is dict:
            _check_depth(value.values(), depth + 1)
        elif kind is list:
            _check_depth(value, depth + 1)


def _check_texts(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    text.encode("utf-8")  # not possible for half a surrogate pair
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text) is not None:
        raise ValueError  # PostgreSQL's text cannot hold it


def read_body(form: type[M], body: bytes) -> tuple[M | None, list[dict[str, str]]]:
    """Return the body as the form, or what is wrong with it."""
    value = parse_json(body)
    try:
        return form.model_validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        return None, refused("body", error)


def read_texts(form: type[M], root: str, texts: MultiDict[str, str]) -> tuple[M | None, list[dict[str, str]]]:
    """Return path or query texts as the form, or what is wrong with them. A name sent twice is wrong."""
    twice = [name for name in texts if len(texts.getlist(name)) > 1]
    bad = [name for name in texts if "\0" in name or "\0" in texts[name]]
    wrong = [
        *({"field": f"{root}.{name}", "message": "Must be sent once", "code": "INVALID_VALUE"} for name in twice),
        *({"field": root, "message": "Must not contain NUL", "code": "INVALID_VALUE"} for _ in bad[:1]),
    ]
    try:
        made = form.model_validate(dict(texts.items()))
    except ValidationError as error:
        return None, [*wrong, *refused(root, error)]
    return (None, wrong) if wrong else (made, [])
