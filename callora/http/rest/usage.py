"""Usage of those who call: single calls, sums, exports, and what each key did."""

from collections import deque
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import InstantOut, Page, decode_cursor, invalid, usdc
from callora.http.rest.operations import Access, Answer, Ask, Routes, Text
from callora.http.rest.periods import (
    DAY,
    Span,
    average_ms,
    day_of,
    endpoint_of,
    filled,
    net,
    shown_as_of,
    span_of,
)
from callora.http.rest.usage_forms import (
    CSV_HEADER,
    AggregateQuery,
    AggregateReport,
    ByEndpointQuery,
    CsvQuery,
    DaysQuery,
    EndpointReport,
    EndpointUsage,
    KeyDay,
    KeyDays,
    KeyEndpoint,
    KeyPath,
    KeySummary,
    ScopeQuery,
    Totals,
    UsageQuery,
    UsageReport,
    csv_lines,
    event_of,
    stats_of,
    totals_of,
)
from callora.ledger.clock import Clock
from callora.ledger.ids import LAST_ID, ApiId, ApiKeyId, EventId, UserId, VaultId
from callora.store.reads import calls
from callora.store.reads import usage as reads

MONTH: Final = timedelta(days=30)
CSV_BATCH: Final = 500


class UsageReads:
    """What the routes ask, on behalf of one user."""

    def __init__(self, database: reads.Reading) -> None:
        self._database = database

    async def scope(self, user_id: str, query: ScopeQuery, span: Span) -> reads.Scope:
        """Return the user's own vaults, or the one of his key.

        Raises:
            ProblemRaised: API_KEY_NOT_FOUND for a key that is not the user's.
        """
        api_id = None if query.apiId is None else ApiId(query.apiId)
        if query.keyId is None:
            vaults = await reads.vaults_of(self._database, UserId(user_id))
            return reads.Scope(vaults, span.since, span.until, api_id)
        api_key_id = ApiKeyId(query.keyId)
        return reads.Scope([await self.vault_of_key(user_id, api_key_id)], span.since, span.until, api_id, api_key_id)

    async def vault_of_key(self, user_id: str, api_key_id: ApiKeyId) -> VaultId:
        """Return the vault of the user's key.

        Raises:
            ProblemRaised: API_KEY_NOT_FOUND.
        """
        vault_id = await reads.vault_of_key(self._database, UserId(user_id), api_key_id)
        if vault_id is None:
            raise ProblemRaised("API_KEY_NOT_FOUND")
        return vault_id

    async def as_of(self) -> InstantOut | None:
        """Return how far sums reach; asked before them, so that they are at least as new."""
        return shown_as_of((await reads.rollup_extent(self._database)).as_of)


def latest_days(clock: Clock, count: int) -> Span:
    """Return the period of the latest days, today among them."""
    today = day_of(clock.now())
    return Span(today - (count - 1) * DAY, today + DAY)


class _Export:
    """Batches of lines; no connection is held while one is sent, and an export that ends early leaves nothing open."""

    def __init__(self, database: reads.Database, scope: reads.Scope, status: calls.Status | None) -> None:
        self._database = database
        self._scope = scope
        self._status = status
        self._vaults = deque(scope.vault_ids)
        self._reached: EventId = LAST_ID

    def __aiter__(self) -> "_Export":
        return self

    async def __anext__(self) -> bytes:
        while self._vaults:
            rows, reached = await _batch(self._database, self._vaults[0], self._scope, self._status, self._reached)
            if reached is None:
                self._vaults.popleft()
            self._reached = reached or LAST_ID
            if rows:
                return csv_lines(rows)
        raise StopAsyncIteration


async def _export(database: reads.Database, scope: reads.Scope, status: calls.Status | None) -> AsyncIterator[bytes]:
    """Return the lines of an export; the first batch is read before this returns, so that its faults are told."""
    batches = _Export(database, scope, status)
    first = await anext(batches, b"")

    async def lines() -> AsyncIterator[bytes]:
        yield (",".join(CSV_HEADER) + "\r\n").encode() + first
        async for batch in batches:
            yield batch

    return lines()


async def _batch(
    database: reads.Database, vault_id: VaultId, scope: reads.Scope, status: calls.Status | None, reached: EventId
) -> tuple[list[Mapping[str, Any]], EventId | None]:
    async with reads.reading(database) as connection:
        rows, next_reached = await calls.scan(connection, vault_id, scope, status, reached, CSV_BATCH)
    return [*rows], next_reached


def _before(cursor: str | None) -> EventId:
    position = decode_cursor(cursor, str)
    if position is None:
        return LAST_ID
    try:
        return EventId(str(UUID(position[0])))
    except ValueError:
        raise invalid("query.cursor", "must be pagination.nextCursor of an earlier page", "INVALID_VALUE")


def usage_routes(database: reads.Database, clock: Clock) -> Routes:
    """Return the routes of usage."""
    routes = Routes("Usage")

    @routes.add(
        "GET",
        "/api/usage",
        access=Access.USER,
        query=UsageQuery,
        answers={200: UsageReport},
        problems=("API_KEY_NOT_FOUND",),
    )
    async def get_usage(ask: Ask[Any, UsageQuery, Any]) -> Answer:
        """Calls of all your vaults, the newest first, and sums of the period.

        The list shows a call at once; the sums are as new as `asOf`. Default: the last 30 days. A refund counts in the
        sums when it is made, not when the call was.
        """
        query = ask.query
        before = _before(query.cursor)
        span = span_of(query, clock.now(), MONTH, query.groupBy)
        async with reads.reading(database) as connection:
            own = UsageReads(connection)
            scope = await own.scope(ask.user_id, query, span)
            as_of = await own.as_of()
            found = await calls.events(connection, scope, query.status, before, query.limit + 1)
            sums = await reads.sums(connection, scope, query.groupBy)
        page = Page.of(found, query.limit, "event_id")
        return Answer(
            UsageReport(
                events=[event_of(row) for row in page.rows],
                stats=stats_of(sums, span, query.groupBy),
                period=span.shown,
                pagination=page.meta,
                asOf=as_of,
            )
        )

    @routes.add(
        "GET",
        "/api/usage/aggregate",
        access=Access.USER,
        query=AggregateQuery,
        answers={200: AggregateReport},
        problems=("API_KEY_NOT_FOUND",),
    )
    async def aggregate_usage(ask: Ask[Any, AggregateQuery, Any]) -> Answer:
        """Calls and money by hour, day, week or month in UTC; by default the last 24 hours by the hour."""
        query = ask.query
        span = span_of(query, clock.now(), DAY, query.groupBy)
        async with reads.reading(database) as connection:
            own = UsageReads(connection)
            scope = await own.scope(ask.user_id, query, span)
            as_of = await own.as_of()
            sums = await reads.sums(connection, scope, query.groupBy)
        return Answer(
            AggregateReport(
                data=filled(span, query.groupBy, sums.buckets),
                totals=Totals(**totals_of(sums.total)),
                groupBy=query.groupBy,
                period=span.shown,
                asOf=as_of,
            )
        )

    @routes.add(
        "GET",
        "/api/usage/by-endpoint",
        access=Access.USER,
        query=ByEndpointQuery,
        answers={200: EndpointReport},
        problems=("API_KEY_NOT_FOUND",),
    )
    async def get_usage_by_endpoint(ask: Ask[Any, ByEndpointQuery, Any]) -> Answer:
        """Calls and money by endpoint, the most called first; by default of the last 30 days."""
        query = ask.query
        position = decode_cursor(query.cursor, int, int)
        after = None if position is None else (int(position[0]), int(position[1]))
        span = span_of(query, clock.now(), MONTH)
        async with reads.reading(database) as connection:
            own = UsageReads(connection)
            scope = await own.scope(ask.user_id, query, span)
            as_of = await own.as_of()
            found = await reads.by_endpoint(connection, scope, query.limit + 1, after)
        page = Page.of(found, query.limit, "calls", "endpoint_id")
        data = [
            EndpointUsage(
                apiId=row["api_id"],
                slug=row["slug"],
                endpoint=endpoint_of(row),
                calls=row["calls"],
                failedCalls=row["failed_calls"],
                revenue=usdc(net(row)),
                refunded_usdc=usdc(row["refunded"]),
                avgLatencyMs=average_ms(row),
            )
            for row in page.rows
        ]
        return Answer(EndpointReport(data=data, meta=page.meta, period=span.shown, asOf=as_of))

    @routes.add(
        "GET",
        "/api/usage/csv",
        access=Access.USER,
        query=CsvQuery,
        answers={200: Text("text/csv; charset=utf-8", "One line a call: " + ",".join(CSV_HEADER))},
        problems=("API_KEY_NOT_FOUND",),
    )
    async def export_usage(ask: Ask[Any, CsvQuery, Any]) -> Answer:
        """Calls as CSV, vault by vault, the newest first; by default of the last 30 days.

        Streamed as it is read. A cell that a spreadsheet would take for a formula begins with an apostrophe.
        """
        span = span_of(ask.query, clock.now(), MONTH)
        scope = await UsageReads(database).scope(ask.user_id, ask.query, span)
        name = f"usage-export-{clock.now():%Y-%m-%d}.csv"
        lines = await _export(database, scope, ask.query.status)
        return Answer(lines, headers={"Content-Disposition": f'attachment; filename="{name}"'})

    @routes.add(
        "GET",
        "/api/keys/{keyId}/usage",
        access=Access.USER,
        path_form=KeyPath,
        query=DaysQuery,
        answers={200: KeyDays},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/usage",),
    )
    async def get_key_usage(ask: Ask[KeyPath, DaysQuery, Any]) -> Answer:
        """What a key of yours did, day by day, the newest first."""
        key_id, days = ApiKeyId(ask.path.keyId), ask.query.days
        async with reads.reading(database) as connection:
            own = UsageReads(connection)
            vault_id = await own.vault_of_key(ask.user_id, key_id)
            as_of = await own.as_of()
            rows = await reads.key_days(connection, vault_id, key_id, latest_days(clock, days).since)
        data = [
            KeyDay(
                date=f"{row['day']:%Y-%m-%d}",
                requestCount=row["calls"],
                chargedCount=row["charged_calls"],
                errorCount=row["failed_calls"],
                totalLatencyMs=round(row["latency_us"] / 1000),
                cost_usdc=usdc(row["amount"]),
                refunded_usdc=usdc(row["refunded"]),
            )
            for row in rows
        ]
        return Answer(KeyDays(keyId=key_id, days=days, data=data, asOf=as_of))

    @routes.add(
        "GET",
        "/api/keys/{keyId}/usage/summary",
        access=Access.USER,
        path_form=KeyPath,
        query=DaysQuery,
        answers={200: KeySummary},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/usage/summary",),
    )
    async def get_key_usage_summary(ask: Ask[KeyPath, DaysQuery, Any]) -> Answer:
        """What a key of yours did, in all and by endpoint."""
        key_id, days = ApiKeyId(ask.path.keyId), ask.query.days
        span = latest_days(clock, days)
        async with reads.reading(database) as connection:
            own = UsageReads(connection)
            vault_id = await own.vault_of_key(ask.user_id, key_id)
            as_of = await own.as_of()
            scope = reads.Scope([vault_id], span.since, span.until, None, key_id)
            total = (await reads.sums(connection, scope, "month")).total
            rows = await reads.by_endpoint(connection, scope, reads.TOP_ENDPOINTS)
        return Answer(
            KeySummary(
                keyId=key_id,
                days=days,
                totalRequests=total["calls"],
                totalCost_usdc=usdc(total["amount"]),
                refunded_usdc=usdc(total["refunded"]),
                errorCount=total["failed_calls"],
                avgLatencyMs=average_ms(total),
                byEndpoint=[
                    KeyEndpoint(
                        apiId=row["api_id"],
                        endpoint=endpoint_of(row),
                        requests=row["calls"],
                        errors=row["failed_calls"],
                        avgLatencyMs=average_ms(row),
                        cost_usdc=usdc(row["amount"]),
                        refunded_usdc=usdc(row["refunded"]),
                    )
                    for row in rows
                ],
                asOf=as_of,
            )
        )

    return routes
