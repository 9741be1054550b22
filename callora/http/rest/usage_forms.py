"""The forms of usage, and how rows become them."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from callora.http.rest.forms import (
    ApiNumber,
    Cursor,
    Form,
    InstantOut,
    Limit,
    PageMeta,
    UsdcOut,
    Uuid,
    Whole,
    iso,
    usdc,
)
from callora.http.rest.periods import (
    AS_OF,
    REVENUE,
    Bucket,
    EndpointRef,
    GroupBy,
    Period,
    PeriodQuery,
    Span,
    average_ms,
    endpoint_of,
    filled,
    net,
    success_rate,
)
from callora.store.reads import usage as reads

CSV_HEADER: Final = ("id", "apiId", "endpoint", "occurredAt", "revenue")
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")

# --- forms ------------------------------------------------------------------------------------------------------------


class ScopeQuery(PeriodQuery):
    """Whose calls to what."""

    apiId: ApiNumber | None = Field(default=None, description="Only calls of this API.")
    keyId: Uuid | None = Field(default=None, description="Only calls with this key of yours.")


class UsageQuery(ScopeQuery):
    """What of one's usage."""

    status: Literal["success", "error"] | None = Field(
        default=None, description="Only such events; `stats` describe all. An error had no answer, or one from 400 on."
    )
    groupBy: GroupBy = Field(default="day", description="What `stats.buckets` are; hours for 2 days at most.")
    limit: Limit = Field(default=20, description="Events on a page.")
    cursor: Cursor | None = None


class AggregateQuery(ScopeQuery):
    """Sums by time."""

    groupBy: GroupBy = Field(default="hour", description="Hours for 2 days at most.")


class ByEndpointQuery(ScopeQuery):
    """Sums by endpoint."""

    limit: Limit = Field(default=20, description="Endpoints on a page.")
    cursor: Cursor | None = None


class CsvQuery(ScopeQuery):
    """What is exported."""

    status: Literal["success", "error"] | None = None


class UsageEvent(Form):
    """One call."""

    id: Uuid
    apiId: int
    keyId: Uuid
    endpoint: EndpointRef
    occurredAt: InstantOut
    state: Literal["held", "captured", "released", "expired"]
    status: Literal["success", "error", "open"]
    statusCode: int | None = Field(description="The upstream's.")
    outcome: str | None
    latencyMs: float | None
    cost_usdc: UsdcOut = Field(description="What was charged.")
    refunded_usdc: UsdcOut = Field(description="What of it was given back since.")
    requestBytes: int | None
    responseBytes: int | None


class ApiUsage(Form):
    """Sums of one API."""

    apiId: int
    slug: str | None
    name: str | None
    calls: int
    failedCalls: int
    revenue: UsdcOut = Field(description=REVENUE)
    refunded_usdc: UsdcOut


class Totals(Form):
    """Sums of a period."""

    totalCalls: int
    chargedCalls: int
    failedCalls: int
    totalSpent: UsdcOut = Field(description=REVENUE)
    refunded_usdc: UsdcOut
    successRate: float | None = Field(description="Per cent; null without calls.")
    avgLatencyMs: int | None
    requestBytes: int
    responseBytes: int


class Stats(Totals):
    """Sums of a period, by API and by time."""

    breakdownByApi: list[ApiUsage]
    buckets: list[Bucket]


class UsageReport(Form):
    """A page of calls, and sums of the whole period."""

    events: list[UsageEvent]
    stats: Stats
    period: Period
    pagination: PageMeta
    asOf: InstantOut | None = Field(description=AS_OF)


class AggregateReport(Form):
    """Sums by time."""

    data: list[Bucket]
    totals: Totals
    groupBy: GroupBy
    period: Period
    asOf: InstantOut | None = Field(description=AS_OF)


class EndpointUsage(Form):
    """Sums of one endpoint."""

    apiId: int
    slug: str | None
    endpoint: EndpointRef
    calls: int
    failedCalls: int
    revenue: UsdcOut = Field(description=REVENUE)
    refunded_usdc: UsdcOut
    avgLatencyMs: int | None


class EndpointReport(Form):
    """Sums by endpoint, the most called first."""

    data: list[EndpointUsage]
    meta: PageMeta
    period: Period
    asOf: InstantOut | None = Field(description=AS_OF)


class KeyPath(Form):
    """A key."""

    keyId: Uuid


class DaysQuery(Form):
    """The latest days."""

    days: Annotated[int, Field(ge=1, le=365), Whole] = Field(default=30, description="Days in UTC, today among them.")


class KeyDay(Form):
    """What a key did in a day."""

    date: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", examples=["2026-11-21"])
    requestCount: int
    chargedCount: int
    errorCount: int
    totalLatencyMs: int
    cost_usdc: UsdcOut
    refunded_usdc: UsdcOut


class KeyDays(Form):
    """A key's days, the newest first; days without a call are left out."""

    keyId: Uuid
    days: int
    data: list[KeyDay]
    asOf: InstantOut | None = Field(description=AS_OF)


class KeyEndpoint(Form):
    """What a key did with an endpoint."""

    apiId: int
    endpoint: EndpointRef
    requests: int
    errors: int
    avgLatencyMs: int | None
    cost_usdc: UsdcOut
    refunded_usdc: UsdcOut


class KeySummary(Form):
    """What a key did."""

    keyId: Uuid
    days: int
    totalRequests: int
    totalCost_usdc: UsdcOut
    refunded_usdc: UsdcOut
    errorCount: int
    avgLatencyMs: int | None
    byEndpoint: list[KeyEndpoint] = Field(description="The hundred most called.")
    asOf: InstantOut | None = Field(description=AS_OF)


# --- from rows to forms -----------------------------------------------------------------------------------------------


def event_of(row: Mapping[str, Any]) -> UsageEvent:
    succeeded = row["succeeded"]
    return UsageEvent(
        id=str(row["event_id"]),
        apiId=row["api_id"],
        keyId=str(row["api_key_id"]),
        endpoint=endpoint_of(row),
        occurredAt=iso(row["created_at"]),
        state=row["state"],
        status="open" if succeeded is None else "success" if succeeded else "error",
        statusCode=row["status"],
        outcome=row["outcome"],
        latencyMs=None if row["latency_us"] is None else row["latency_us"] / 1000,
        cost_usdc=usdc(row["amount"] or 0),
        refunded_usdc=usdc(row["refunded"]),
        requestBytes=row["request_bytes"],
        responseBytes=row["response_bytes"],
    )


def totals_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "totalCalls": row["calls"],
        "chargedCalls": row["charged_calls"],
        "failedCalls": row["failed_calls"],
        "totalSpent": usdc(net(row)),
        "refunded_usdc": usdc(row["refunded"]),
        "successRate": success_rate(row),
        "avgLatencyMs": average_ms(row),
        "requestBytes": row["request_bytes"],
        "responseBytes": row["response_bytes"],
    }


def stats_of(sums: reads.Sums, span: Span, unit: reads.Unit) -> Stats:
    """Return sums as answers show them."""
    return Stats(
        **totals_of(sums.total),
        breakdownByApi=[
            ApiUsage(
                apiId=row["api_id"],
                slug=row["slug"],
                name=row["name"],
                calls=row["calls"],
                failedCalls=row["failed_calls"],
                revenue=usdc(net(row)),
                refunded_usdc=usdc(row["refunded"]),
            )
            for row in sums.by_api
        ],
        buckets=filled(span, unit, sums.buckets),
    )


def _cell(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return events as lines of CSV; revenue is what is left of the charge after refunds."""
    text = io.StringIO()
    writer = csv.writer(text)
    for row in rows:
        endpoint = f"{row['method'] or ''} {row['path'] or ''}".strip()
        left = usdc((row["amount"] or 0) - row["refunded"])
        cells = (str(row["event_id"]), str(row["api_id"]), endpoint, iso(row["created_at"]), left)
        writer.writerow([_cell(cell) for cell in cells])
    return text.getvalue().encode()
