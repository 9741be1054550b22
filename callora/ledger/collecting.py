"""Collecting counters: which window of a source is asked for, how far it is then read, and what a run came to.

Two clocks meet here: a source dates its snapshots, this service its windows. A window ends a whole minute before the
present one, so that the source has had time to write it down; it begins a little before where the last one ended, and
what is read twice is told apart by its date when it is rated.
"""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import attrs

from callora.ledger.ids import ApiId
from callora.ledger.snapshots import (
    ENV_CHARS_MAX,
    NODE_CHARS_MAX,
    FirstSeen,
    MeterSource,
    ResetPolicy,
    Snapshot,
)
from callora.ledger.values import value

Job = Literal["collect-and-rate", "reconcile", "ingest"]
RunStatus = Literal["ok", "partial", "error"]

MINUTE: Final = timedelta(minutes=1)
FUTURE_MAX: Final = timedelta(minutes=5)
"""How far a source's clock may be ahead. Whatever is dated later would make everything after it a replay."""
TIMEOUT_SECONDS: Final = 15.0
TIMEOUT_SECONDS_MAX: Final = 60.0
SOURCES_MAX: Final = 1000
ERROR_CHARS_MAX: Final = 300
RUN_ERROR_CHARS_MAX: Final = 2000
REGION_CHARS_MAX: Final = 64
SOURCE_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
METER_PATTERN: Final = r"^[a-z][a-z0-9_]{0,39}$"
CREDENTIAL_PATTERN: Final = r"^EXPORTER_TOKEN_[A-Z0-9_]{1,64}$"
"""Which variables may hold a source's credential: no other of this process's secrets can be sent to it."""
_URL: Final = re.compile(r"[\x21-\x7e]{1,500}", re.ASCII)
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")


@value
class Window:
    """What is asked of a source: snapshots from `since` to `until`, both included."""

    since: datetime
    until: datetime


def window_at(now: datetime, completed_until: datetime | None, overlap: timedelta) -> Window:
    """Return the window that is due; where it begins after it ends, nothing is to be asked.

    Args:
        completed_until: how far the source was read; None for never.
        overlap: how much of it is read again; > 0.
    """
    until = now.replace(second=0, microsecond=0) - MINUTE
    return Window((until if completed_until is None else completed_until) - overlap, until)


def read_until(window: Window, latest: datetime | None) -> datetime:
    """Return how far the source is read after a window without a fault.

    Args:
        latest: the date of the latest snapshot of it; None where there was none.
    """
    if latest is None or window.since > window.until:
        return window.until
    return max(window.since, min(window.until, latest))


def misdated(source: MeterSource, snapshots: Sequence[Snapshot], now: datetime) -> str | None:
    """Return why none of these snapshots may be rated for a source: another node's, or from the future."""
    for each in snapshots:
        if source.expected_node_id not in ("", each.node_id):
            return "a snapshot is of another node than expected_node_id"
        if source.expected_env not in ("", each.env):
            return "a snapshot is of another environment than expected_env"
        if each.collected_at > now + FUTURE_MAX:
            return "a snapshot is dated in the future"
    return None


@attrs.frozen
class SourceOffer:
    """A source as the environment or an operator describes it."""

    source_id: str
    base_url: str
    expected_node_id: str
    """Empty only for the one source of EXPORTER_BASE_URL: any node."""
    expected_env: str
    """Empty with it."""
    api_id: ApiId | None = None
    """None: an API is made for it that nobody can call."""
    enabled: bool = True
    timeout_seconds: float = TIMEOUT_SECONDS
    first_seen: FirstSeen = "full"
    reset: ResetPolicy = "drop"
    meter: str = "bytes"
    region: str = ""
    credential_env: str | None = None


def check_url(text: str) -> str:
    """Return the URL of a node or an exporter without a slash at its end: https, or http of this machine.

    Raises:
        ValueError: it is none of these, has credentials, a query or a fragment, or characters that are not visible.
    """
    parts = urlsplit(text)
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL)):
        raise ValueError("not an https URL")
    if parts.username is not None or parts.query or parts.fragment or text.endswith(("?", "#")):
        raise ValueError("credentials, a query or a fragment")
    if parts.port == 0:  # reading it validates it
        raise ValueError("not a port")
    if _URL.fullmatch(text) is None:
        raise ValueError("not visible characters")
    return text.rstrip("/")


_FIELDS: Final = frozenset(each.name for each in attrs.fields(SourceOffer))


def parse_offer(item: object, region: str) -> SourceOffer | str:
    """Return the source that one object of EXPORTER_SOURCES_JSON describes, or what is wrong with it.

    Args:
        region: where it names none.
    """
    if not isinstance(item, dict):
        return "a source must be an object"
    unknown = sorted(map(str, item.keys() - _FIELDS))
    if unknown:
        return f"a source has no field {unknown[0]!r}"
    fields: dict[str, Any] = {
        "enabled": True,
        "timeout_seconds": TIMEOUT_SECONDS,
        "first_seen": "full",
        "reset": "drop",
    }
    fields |= {"meter": "bytes", "region": region, "api_id": None, "credential_env": None}
    fields |= item
    timeout = fields["timeout_seconds"]
    if isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout <= 0:
        fields["timeout_seconds"] = TIMEOUT_SECONDS
    wrong = next((f"{name} must {must}" for name, must, fits in _RULES if not fits(fields.get(name))), None)
    if wrong is not None:
        return wrong
    try:
        fields["base_url"] = check_url(str(fields["base_url"]))
    except ValueError:
        return "base_url must be https except on this machine, without credentials, query and fragment"
    return SourceOffer(**fields)


def _is_text(chars_max: int, chars_min: int = 1) -> Any:
    return lambda text: isinstance(text, str) and chars_min <= len(text) <= chars_max and text.isprintable()


def _fits(pattern: str, *, optional: bool = False) -> Any:
    compiled = re.compile(pattern, re.ASCII)
    return lambda text: (optional and text is None) or (isinstance(text, str) and compiled.fullmatch(text) is not None)


def _is_number(found: object) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= TIMEOUT_SECONDS_MAX


def _is_api(found: object) -> bool:
    return found is None or (isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**63)


_RULES: Final[Sequence[tuple[str, str, Any]]] = (
    ("source_id", "be 1 to 63 letters, digits, dots, dashes and underscores", _fits(SOURCE_ID_PATTERN)),
    ("base_url", "be a URL", lambda text: isinstance(text, str)),
    ("expected_node_id", f"be 1 to {NODE_CHARS_MAX} characters", _is_text(NODE_CHARS_MAX)),
    ("expected_env", f"be 1 to {ENV_CHARS_MAX} characters", _is_text(ENV_CHARS_MAX)),
    ("enabled", "be true or false", lambda found: isinstance(found, bool)),
    ("timeout_seconds", f"be a number of at most {TIMEOUT_SECONDS_MAX:g}", _is_number),
    ("first_seen", "be full or baseline", lambda found: found in ("full", "baseline")),
    ("reset", "be drop or count_new_total", lambda found: found in ("drop", "count_new_total")),
    ("meter", "be 1 to 40 of a-z, 0-9 and _", _fits(METER_PATTERN)),
    ("region", f"be at most {REGION_CHARS_MAX} characters", _is_text(REGION_CHARS_MAX, 0)),
    ("api_id", "be the number of an API", _is_api),
    ("credential_env", "name a variable EXPORTER_TOKEN_…", _fits(CREDENTIAL_PATTERN, optional=True)),
)


def clash_of(offers: Sequence[SourceOffer]) -> str | None:
    """Return what two of these sources have in common that each must have for itself; None where nothing."""
    ids = [each.source_id for each in offers]
    twice = next((each for each in ids if ids.count(each) > 1), None)
    if twice is not None:
        return f"source_id {twice} is there twice"
    nodes: dict[tuple[str, str], str] = {}
    for each in offers:
        other = nodes.setdefault((each.expected_env, each.expected_node_id), each.source_id)
        if other != each.source_id:
            return f"{other} and {each.source_id} are the same node of the same environment"
    return None


# --- what a run came to -----------------------------------------------------------------------------------------------


@attrs.frozen
class SourceStatus:
    """How far a source is read."""

    source_id: str
    last_completed_until: datetime | None
    last_attempted_at: datetime | None
    last_succeeded_at: datetime | None
    last_error: str


@attrs.frozen
class Difference:
    """What does not add up."""

    rule: str
    """What should hold."""
    count: int
    """How many break it."""
    example: str


@attrs.frozen
class Counted:
    """What samples came to."""

    processed_samples: int = 0
    written_minutes: int = 0
    replayed_minutes: int = 0
    quarantined: int = 0
    invalid: int = 0
    resets: int = 0

    def plus(self, other: "Counted") -> "Counted":
        """Return the sums."""
        return Counted(*(mine + theirs for mine, theirs in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))


@attrs.frozen
class SourceOutcome:
    """What came of one source in a run."""

    source_id: str
    counted: Counted
    error: str
    """Empty where it was read as far as it was asked."""
    notice: str = ""
    """What is no error and should be known."""


@attrs.frozen
class JobRun:
    """A run that has ended."""

    run_id: str
    job: Job
    status: RunStatus
    started_at: datetime
    finished_at: datetime
    counted: Counted
    error: str
    source_statuses: tuple[SourceStatus, ...]
    differences: tuple[Difference, ...] = ()


def judge(outcomes: Sequence[SourceOutcome], differences: Sequence[Difference] = ()) -> tuple[RunStatus, str]:
    """Return a run's status and what it says about it.

    A run is an error where nothing was done: no source, or each failed before it brought anything.
    """
    if not outcomes:
        return "error", "no meter source is enabled"
    failed = [each for each in outcomes if each.error]
    worked = len(failed) < len(outcomes) or any(each.counted.processed_samples for each in outcomes)
    said = [f"{each.source_id}: {each.error or each.notice}" for each in outcomes if each.error or each.notice]
    for each in outcomes:
        if each.counted.invalid:
            said.append(f"{each.source_id}: {each.counted.invalid} samples were invalid")
        if each.counted.quarantined:
            said.append(f"{each.source_id}: {each.counted.quarantined} samples are in quarantine")
    if differences:
        said.append(f"the books break rules: {len(differences)}")
    text = "; ".join(said)[:RUN_ERROR_CHARS_MAX]
    if not worked:
        return "error", text
    return ("partial" if said else "ok"), text
