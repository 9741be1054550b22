"""Meter sources, kept by operators; those of the environment are shown and not changed here."""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from callora.actors.meter_sources import MeterSources, SourceFixed, SourceMissing, SourceWrong
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    INT64_MAX,
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.collecting import (
    CREDENTIAL_PATTERN,
    METER_PATTERN,
    REGION_CHARS_MAX,
    SOURCE_ID_PATTERN,
    TIMEOUT_SECONDS,
    TIMEOUT_SECONDS_MAX,
    SourceOffer,
    check_url,
)
from callora.ledger.snapshots import ENV_CHARS_MAX, NODE_CHARS_MAX
from callora.store.reads import meters as reads

_FIXED: Final = "The environment describes this source: change EXPORTER_SOURCES_JSON and start again"

SourceId = Annotated[str, Field(pattern=SOURCE_ID_PATTERN, examples=["jp-1"])]
Url = Annotated[str, Field(max_length=500, description="https except on this machine."), AfterValidator(check_url)]
NodeId = Annotated[str, Field(min_length=1, max_length=NODE_CHARS_MAX, pattern=r"^[\x20-\x7e]+$")]
Env = Annotated[str, Field(min_length=1, max_length=ENV_CHARS_MAX, pattern=r"^[\x20-\x7e]+$")]
Number = Annotated[int, Field(ge=1, le=INT64_MAX)]
Seconds = Annotated[float, Field(gt=0, le=TIMEOUT_SECONDS_MAX, description="For one page.")]
FirstSeen = Annotated[
    Literal["full", "baseline"],
    Field(description="A counter that is seen first: `full` charges its total, `baseline` what it grows by from then."),
]
Reset = Annotated[
    Literal["drop", "count_new_total"],
    Field(description="A counter that began anew: `drop` charges from its new total on, `count_new_total` that too."),
]
Meter = Annotated[str, Field(pattern=METER_PATTERN, description="What the counters count.")]
Region = Annotated[str, Field(max_length=REGION_CHARS_MAX, pattern=r"^[\x20-\x7e]*$")]
Credential = Annotated[
    str,
    Field(
        pattern=CREDENTIAL_PATTERN,
        description="The variable of the environment that holds its bearer token; the token itself is never sent here.",
    ),
]


class SourceIn(Form):
    """A meter source."""

    source_id: SourceId
    base_url: Url
    expected_node_id: NodeId
    expected_env: Env
    credential_env: Credential
    api_id: Number | None = Field(
        default=None, description="Whose developer earns what is charged; left out, an API is made that nobody calls."
    )
    enabled: bool = True
    timeout_seconds: Seconds = TIMEOUT_SECONDS
    first_seen: FirstSeen = "full"
    reset: Reset = "drop"
    meter: Meter = "bytes"
    region: Region = ""


class SourceChange(Form):
    """What of a meter source changes; the rest stays."""

    base_url: Url | None = None
    expected_node_id: NodeId | None = None
    expected_env: Env | None = None
    credential_env: Credential | None = None
    api_id: Number | None = None
    enabled: bool | None = None
    timeout_seconds: Seconds | None = None
    first_seen: FirstSeen | None = None
    reset: Reset | None = None
    meter: Meter | None = None
    region: Region | None = None


class SourcePath(Form):
    """Which source."""

    sourceId: SourceId


class SourceOut(Form):
    """A meter source, and how far it is read."""

    source_id: str
    origin: Literal["environment", "operator"]
    base_url: str
    expected_node_id: str
    expected_env: str
    credential_env: str | None
    api_id: int
    enabled: bool
    timeout_seconds: float
    first_seen: FirstSeen
    reset: Reset
    meter: str
    region: str
    last_completed_until: InstantOut | None
    last_attempted_at: InstantOut | None
    last_succeeded_at: InstantOut | None
    last_error: str
    created_at: InstantOut


class SourceList(Form):
    """Meter sources by their ids."""

    data: list[SourceOut]
    meta: PageMeta


def meter_source_routes(sources: MeterSources, database: reads.Database) -> Routes:
    """Return the routes of meter sources."""
    routes = Routes("Metering")

    @routes.add(
        "POST",
        "/api/admin/meter-sources",
        access=Access.ADMIN,
        body=SourceIn,
        answers={201: SourceOut},
        problems=("CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def add_meter_source(ask: Ask[Any, Any, SourceIn]) -> Answer:
        """Read the counters of a source from the next run on."""
        fields = ask.body.model_dump()
        ask.exchange.audit_target = ask.body.source_id
        return Answer(_done(await sources.add(SourceOffer(**fields))), status=201)

    @routes.add("GET", "/api/admin/meter-sources", access=Access.ADMIN, query=PageQuery, answers={200: SourceList})
    async def list_meter_sources(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """All meter sources."""
        query = ask.query
        position = decode_cursor(query.cursor, str)
        found = await reads.list_sources(database, "" if position is None else position[0], query.limit + 1)
        page = found[: query.limit]
        more = len(found) > query.limit
        cursor = encode_cursor(page[-1].source.source_id) if more else None
        meta = PageMeta(limit=query.limit, nextCursor=cursor, hasMore=more)
        return Answer(SourceList(data=[_shown(each) for each in page], meta=meta))

    @routes.add(
        "GET",
        "/api/admin/meter-sources/{sourceId}",
        access=Access.ADMIN,
        path_form=SourcePath,
        answers={200: SourceOut},
        problems=("NOT_FOUND",),
    )
    async def get_meter_source(ask: Ask[SourcePath, Any, Any]) -> Answer:
        """A meter source."""
        found = await reads.find_source(database, ask.path.sourceId)
        if found is None:
            raise ProblemRaised("NOT_FOUND")
        return Answer(_shown(found))

    @routes.add(
        "PATCH",
        "/api/admin/meter-sources/{sourceId}",
        access=Access.ADMIN,
        path_form=SourcePath,
        body=SourceChange,
        answers={200: SourceOut},
        problems=("NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def change_meter_source(ask: Ask[SourcePath, Any, SourceChange]) -> Answer:
        """Change a meter source; how far it is read stays."""
        changes = ask.body.model_dump(exclude_none=True)
        ask.exchange.audit_details |= {name: str(text) for name, text in changes.items()}
        return Answer(_done(await sources.change(ask.path.sourceId, changes)))

    @routes.add(
        "DELETE",
        "/api/admin/meter-sources/{sourceId}",
        access=Access.ADMIN,
        path_form=SourcePath,
        answers={204: None},
        problems=("NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def remove_meter_source(ask: Ask[SourcePath, Any, Any]) -> Answer:
        """Read a meter source no more; what it was charged stays."""
        refused = await sources.remove(ask.path.sourceId)
        if refused is not None:
            _done(refused)
        return Answer(status=204)

    return routes


def _done(outcome: reads.FoundSource | SourceMissing | SourceFixed | SourceWrong) -> SourceOut:
    match outcome:
        case SourceMissing():
            raise ProblemRaised("NOT_FOUND")
        case SourceFixed():
            raise ProblemRaised("CONFLICT", _FIXED)
        case SourceWrong(field, message, taken=True):
            raise ProblemRaised("CONFLICT", f"{field} {message}", details={"field": f"body.{field}"})
        case SourceWrong(field, message):
            raise invalid(f"body.{field}", message, "INVALID_VALUE")
        case _:
            return _shown(outcome)


def _shown(found: reads.FoundSource) -> SourceOut:
    source, status = found.source, found.status
    origin: Any = found.origin
    dates = (status.last_completed_until, status.last_attempted_at, status.last_succeeded_at)
    completed, attempted, succeeded = (None if each is None else iso(each) for each in dates)
    return SourceOut(
        source_id=source.source_id,
        origin=origin,
        base_url=source.base_url,
        expected_node_id=source.expected_node_id,
        expected_env=source.expected_env,
        credential_env=source.credential_env,
        api_id=source.api_id,
        enabled=source.enabled,
        timeout_seconds=source.timeout_seconds,
        first_seen=source.first_seen,
        reset=source.reset,
        meter=source.meter,
        region=source.region,
        last_completed_until=completed,
        last_attempted_at=attempted,
        last_succeeded_at=succeeded,
        last_error=status.last_error,
        created_at=iso(found.created_at),
    )
