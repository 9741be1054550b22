"""Snapshots of counters: what a meter source says its subjects' counters stood at, and how its pages are read.

A source is pulled by the window (`parse_page`) or pushes (`parse_pushed`). What is no snapshot at all refuses the whole
body; a sample that says nothing usable is counted as invalid and the others go on. Nothing here knows what a counter is
worth. The e-mail address that exporters send along is not looked at and not kept.
"""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeGuard

import attrs

from callora.ledger.ids import ApiId, EndpointId
from callora.ledger.values import value

FirstSeen = Literal["full", "baseline"]
"""What the first total of a counter is: `full` counts it, `baseline` only remembers it."""
ResetPolicy = Literal["drop", "count_new_total"]
"""What a counter that began anew has counted since: `drop` forgets it, `count_new_total` counts it."""

TOTAL_MAX: Final = 2**60 - 1
"""Past it a total is nonsense (an exbibyte); what a subject's inbounds come to still fits a bigint."""
INBOUND_CHARS_MAX: Final = 200
NODE_CHARS_MAX: Final = 200
ENV_CHARS_MAX: Final = 64
SNAPSHOTS_MAX: Final = 10_000
"""Of one body."""
_QUOTED_CHARS_MAX: Final = 120
_EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_INSTANT: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:[Zz]|([+-][0-9]{2}:[0-9]{2}))",
    re.ASCII,
)


@value
class Sample:
    """One counter of one subject: totals since the counter began."""

    subject: str
    """A UUID in its canonical lower case."""
    inbound: str
    """Which of the subject's counters it is; may be empty."""
    up: int
    """0 <= up <= TOTAL_MAX."""
    down: int
    """0 <= down <= TOTAL_MAX."""


@value
class Snapshot:
    """What a node's counters stood at, at one instant."""

    node_id: str
    env: str
    collected_at: datetime
    """In UTC, to the microsecond."""
    samples: tuple[Sample, ...]
    invalid: int
    """Samples that were refused: no UUID, no inbound, totals missing, negative or past TOTAL_MAX."""


@value
class Cursor:
    """Where the next page begins: sent back as it came, compared to the nanosecond."""

    text: str
    nanos: int
    """Since 1970."""


@value
class Page:
    """One answer of a source."""

    snapshots: tuple[Snapshot, ...]
    """The earliest first."""
    next_cursor: Cursor | None
    has_more: bool


@attrs.frozen
class Malformed:
    """The body is none that could be read, or lacks what a snapshot needs."""

    kind: Literal["unreadable", "incomplete"]
    reason: str
    """Without anything of the body."""
    quoted: str
    """How the body begins, at most 120 characters."""


@attrs.frozen
class MeterSource:
    """Where counters come from, and by what policies they are read."""

    source_id: str
    base_url: str
    """https outside this machine; without a slash at the end."""
    expected_node_id: str
    expected_env: str
    api_id: ApiId
    """Whose developer earns what is charged."""
    endpoint_id: EndpointId
    """What charges are booked under: an endpoint of that API, at price version 1 (0), which no call can reach."""
    enabled: bool = True
    timeout_seconds: float = 15.0
    """For one page; > 0."""
    first_seen: FirstSeen = "full"
    reset: ResetPolicy = "drop"
    meter: str = "bytes"
    """What the counters count."""
    region: str = ""
    """What its facts are filed under."""
    credential_env: str | None = None
    """The environment's variable that holds its bearer token; None: the service token."""


def parse_instant(text: str) -> datetime | None:
    """Return an RFC 3339 instant in UTC, cut to the microsecond; None for anything else and outside 2000 to 2199."""
    parsed = _instant(text)
    return None if parsed is None else parsed[0]


def parse_cursor(text: str) -> Cursor | None:
    """Return an RFC 3339 instant with all of its nine possible digits; None for anything else."""
    parsed = _instant(text)
    if parsed is None:
        return None
    instant, fraction = parsed
    whole = (instant.replace(microsecond=0) - _EPOCH) // timedelta(seconds=1)
    return Cursor(text, whole * 10**9 + int(f"{fraction:0<9}"))


def format_instant(instant: datetime) -> str:
    """Return an instant as RFC 3339 in UTC: with `Z`, and microseconds only where there are any."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_page(body: bytes) -> Page | Malformed:
    """Return a page of the window contract.

    Args:
        body: the JSON document; its length is the caller's to bound.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return _malformed("unreadable", "is not JSON", body)
    if not isinstance(document, dict):
        return _malformed("unreadable", "is not an object", body)
    listed, has_more, cursor_text = (document.get(name) for name in ("snapshots", "has_more", "next_cursor"))
    if listed is not None and not isinstance(listed, list):
        return _malformed("incomplete", "has snapshots that are no list", body)
    if has_more is not None and not isinstance(has_more, bool):
        return _malformed("incomplete", "has a has_more that is neither true nor false", body)
    cursor = None
    if cursor_text not in (None, ""):
        cursor = parse_cursor(cursor_text) if isinstance(cursor_text, str) else None
        if cursor is None:
            return _malformed("incomplete", "has a next_cursor that is no RFC 3339 instant", body)
    snapshots = _snapshots(listed or [])
    if isinstance(snapshots, str):
        return _malformed("incomplete", snapshots, body)
    return Page(snapshots, cursor, bool(has_more))


def parse_pushed(body: bytes) -> tuple[Snapshot, ...] | Malformed:
    """Return what was pushed, the earliest first: one object, an array of objects, or an object a line.

    Args:
        body: its length is the caller's to bound.
    """
    try:
        try:
            document = json.loads(body)
        except json.JSONDecodeError:
            document = [json.loads(line) for line in body.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return _malformed("unreadable", "is neither JSON nor a JSON object a line", body)
    listed = document if isinstance(document, list) else [document]
    if not listed or not all(isinstance(item, dict) for item in listed):
        return _malformed("unreadable", "has no snapshot, or what is no object", body)
    snapshots = _snapshots(listed)
    return _malformed("incomplete", snapshots, body) if isinstance(snapshots, str) else snapshots


def _snapshots(listed: Sequence[Any]) -> tuple[Snapshot, ...] | str:
    """Return the snapshots by time, or what is wrong with one."""
    if len(listed) > SNAPSHOTS_MAX:
        return f"has more than {SNAPSHOTS_MAX} snapshots"
    made = []
    for item in listed:
        snapshot = _snapshot(item) if isinstance(item, dict) else "has a snapshot that is no object"
        if isinstance(snapshot, str):
            return snapshot
        made.append(snapshot)
    made.sort(key=_when)
    return tuple(made)


def _when(snapshot: Snapshot) -> datetime:
    return snapshot.collected_at


def _snapshot(item: dict[str, Any]) -> Snapshot | str:
    node_id, env, collected_text, listed = (item.get(name) for name in ("node_id", "env", "collected_at", "samples"))
    if not _is_name(node_id, NODE_CHARS_MAX):
        return "has a snapshot without a node_id"
    if not _is_name(env, ENV_CHARS_MAX):
        return "has a snapshot without an env"
    collected_at = parse_instant(collected_text) if isinstance(collected_text, str) else None
    if collected_at is None:
        return "has a snapshot without a collected_at (RFC 3339)"
    if listed is None:
        listed = []
    if not isinstance(listed, list):
        return "has a snapshot whose samples are no list"
    samples = tuple(_samples(listed))
    return Snapshot(node_id, env, collected_at, samples, len(listed) - len(samples))


def _is_name(text: object, chars_max: int) -> TypeGuard[str]:
    return isinstance(text, str) and 0 < len(text) <= chars_max and text.isprintable()


def _samples(listed: Sequence[Any]) -> Iterator[Sample]:
    """Yield those that say something usable. This runs once a sample: 20 000 in a second must cost next to nothing."""
    is_uuid = _UUID.fullmatch
    for item in listed:
        if type(item) is not dict:
            continue
        subject, inbound = item.get("uuid"), item.get("inbound_tag")
        up, down = item.get("uplink_bytes_total"), item.get("downlink_bytes_total")
        if (
            type(up) is int
            and type(down) is int
            and 0 <= up <= TOTAL_MAX
            and 0 <= down <= TOTAL_MAX
            and type(subject) is str
            and is_uuid(subject) is not None
            and type(inbound) is str
            and len(inbound) <= INBOUND_CHARS_MAX
            and (not inbound or inbound.isprintable())
        ):
            yield Sample(subject.lower(), inbound, up, down)


def _instant(text: str) -> tuple[datetime, str] | None:
    """Return an instant and the digits of its fraction."""
    match = _INSTANT.fullmatch(text)
    if match is None:
        return None
    day, clock, fraction, offset = match[1], match[2], match[3] or "", match[4] or "+00:00"
    try:
        instant = datetime.fromisoformat(f"{day}T{clock}.{fraction[:6]:0<6}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return (instant, fraction) if _EARLIEST <= instant < _LATEST else None


def _malformed(kind: Literal["unreadable", "incomplete"], reason: str, body: bytes) -> Malformed:
    return Malformed(kind, reason, body[: 4 * _QUOTED_CHARS_MAX].decode("utf-8", "replace")[:_QUOTED_CHARS_MAX])
