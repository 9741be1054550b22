"""Usage of those who sell, and of everyone: a developer's analytics, what operators see."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    ApiNumber,
    Flag,
    Form,
    Instant,
    InstantOut,
    Limit,
    UsdcOut,
    Uuid,
    Whole,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.periods import (
    AS_OF,
    REVENUE,
    Bucket,
    EndpointRef,
    GroupBy,
    Period,
    PeriodQuery,
    endpoint_of,
    filled,
    net,
    span_of,
)
from callora.http.rest.usage import MONTH, UsageReads, latest_days
from callora.http.rest.usage_forms import Stats, stats_of
from callora.ledger.clock import Clock
from callora.ledger.ids import ApiId, DeveloperId, UserId
from callora.store.reads import usage as reads

TOP: Final = 10
"""Endpoints and users that analytics name."""
LAST4: Final = 4

# --- forms ------------------------------------------------------------------------------------------------------------


class AnalyticsQuery(Form):
    """What of a developer's calls."""

    model_config = ConfigDict(populate_by_name=False)

    from_: Instant = Field(alias="from", description="Taken down to the first instant of its day in UTC.")
    to: Instant = Field(description="Not part of the period; taken up to a whole day, and to today at most.")
    groupBy: Literal["day", "week", "month"] = "day"
    apiId: ApiNumber | None = Field(default=None, description="Only calls of this API of yours.")
    includeTop: Flag = Field(default=False, description="Whether the top endpoints and users are named.")


class TopEndpoint(Form):
    """An endpoint that earned much."""

    apiId: int
    slug: str | None
    endpoint: EndpointRef
    calls: int
    revenue: UsdcOut = Field(description=REVENUE)


class TopCaller(Form):
    """A user who paid much."""

    user: str = Field(description="`user_` and the last four characters of an id: enough to tell them apart.")
    calls: int
    revenue: UsdcOut = Field(description=REVENUE)


class AnalyticsReport(Form):
    """A developer's calls and revenue by time."""

    data: list[Bucket]
    topEndpoints: list[TopEndpoint] | None = Field(description="Null unless includeTop.")
    topUsers: list[TopCaller] | None = Field(description="Null unless includeTop.")
    period: Period
    asOf: InstantOut | None = Field(description=AS_OF)


class UserPath(Form):
    """A user."""

    userId: Uuid


class UserUsage(Form):
    """What a user spent."""

    userId: Uuid
    stats: Stats
    period: Period
    asOf: InstantOut | None = Field(description=AS_OF)


class UserUsageQuery(PeriodQuery):
    """A period and its buckets."""

    groupBy: GroupBy = "day"


class LatestQuery(Form):
    """The latest days."""

    days: Annotated[int, Field(ge=1, le=366), Whole] = Field(default=30, description="Days in UTC, today among them.")


class TopUsersQuery(LatestQuery):
    """The latest days, and how many users."""

    limit: Limit = 20


class PlanUsage(Form):
    """What vaults of a plan did."""

    planId: str
    calls: int
    revenue: UsdcOut = Field(description=REVENUE)


class EveryonesUsage(Form):
    """What everyone did."""

    days: int
    totalCalls: int
    failedCalls: int
    totalRevenue: UsdcOut = Field(description=REVENUE)
    refunded_usdc: UsdcOut
    buckets: list[Bucket]
    byEndpoint: list[TopEndpoint] = Field(description="The hundred most called.")
    byPlan: list[PlanUsage] = Field(description="By the plan that a vault has now.")
    asOf: InstantOut | None = Field(description=AS_OF)


class TopUser(Form):
    """A user who spent much."""

    userId: Uuid
    name: str
    calls: int
    spent_usdc: UsdcOut = Field(description=REVENUE)


class TopUsers(Form):
    """Users by what they spent."""

    days: int
    data: list[TopUser]
    asOf: InstantOut | None = Field(description=AS_OF)


def _top_endpoints(rows: Sequence[Mapping[str, Any]]) -> list[TopEndpoint]:
    return [
        TopEndpoint(
            apiId=row["api_id"], slug=row["slug"], endpoint=endpoint_of(row), calls=row["calls"], revenue=usdc(net(row))
        )
        for row in rows
    ]


def _top_callers(rows: Sequence[Mapping[str, Any]]) -> list[TopCaller]:
    return [
        TopCaller(user=f"user_{str(row['user_id'])[-LAST4:]}", calls=row["calls"], revenue=usdc(row["net"]))
        for row in rows
    ]


# --- developers -------------------------------------------------------------------------------------------------------


def analytics_routes(database: reads.Database, clock: Clock) -> Routes:
    """Return what a developer sees of the calls to his APIs."""
    routes = Routes("Developers")

    async def developer(connection: reads.Reading, user_id: str) -> DeveloperId:
        found = await reads.developer_of(connection, UserId(user_id))
        if found is None:
            raise ProblemRaised("DEVELOPER_NOT_FOUND")
        return found

    @routes.add(
        "GET",
        "/api/developers/analytics",
        access=Access.USER,
        query=AnalyticsQuery,
        answers={200: AnalyticsReport},
        problems=("DEVELOPER_NOT_FOUND", "NOT_FOUND"),
    )
    async def get_developer_analytics(ask: Ask[Any, AnalyticsQuery, Any]) -> Answer:
        """Calls and revenue of your APIs by day, week or month, in whole days of UTC."""
        query = ask.query
        span = span_of(query, clock.now(), MONTH).whole_days()
        api_id = None if query.apiId is None else ApiId(query.apiId)
        async with reads.reading(database) as connection:
            developer_id = await developer(connection, ask.user_id)
            if api_id is not None and not await reads.owns_api(connection, developer_id, api_id):
                raise ProblemRaised("NOT_FOUND", "No such API")
            scope = reads.DeveloperScope(developer_id, span.since, span.until, api_id)
            as_of = await UsageReads(connection).as_of()
            rows = await reads.analytics(connection, scope, query.groupBy)
            tops = await reads.top_endpoints(connection, scope, TOP) if query.includeTop else None
            callers = await reads.top_callers(connection, scope, TOP) if query.includeTop else None
        return Answer(
            AnalyticsReport(
                data=filled(span, query.groupBy, rows),
                topEndpoints=None if tops is None else _top_endpoints(tops),
                topUsers=None if callers is None else _top_callers(callers),
                period=span.shown,
                asOf=as_of,
            )
        )

    return routes


# --- operators --------------------------------------------------------------------------------------------------------


def admin_usage_routes(database: reads.Database, clock: Clock) -> Routes:
    """Return what operators see of usage."""
    routes = Routes("Operators")

    @routes.add(
        "GET",
        "/api/admin/usage/summary",
        access=Access.ADMIN,
        query=LatestQuery,
        answers={200: EveryonesUsage},
        aliases=("/admin/usage/summary",),
    )
    async def get_everyones_usage(ask: Ask[Any, LatestQuery, Any]) -> Answer:
        """Calls and revenue of everyone: by day, by endpoint and by plan."""
        span = latest_days(clock, ask.query.days)
        async with reads.reading(database) as connection:
            as_of = await UsageReads(connection).as_of()
            rows = await reads.all_days(connection, span.since)
            endpoints = await reads.all_endpoints(connection, span.since, reads.TOP_ENDPOINTS)
            plans = await reads.all_plans(connection, span.since)
        return Answer(
            EveryonesUsage(
                days=ask.query.days,
                totalCalls=sum(row["calls"] for row in rows),
                failedCalls=sum(row["failed_calls"] for row in rows),
                totalRevenue=usdc(sum(map(net, rows))),
                refunded_usdc=usdc(sum(row["refunded"] for row in rows)),
                buckets=filled(span, "day", {row["day"]: row for row in rows}),
                byEndpoint=_top_endpoints(endpoints),
                byPlan=[
                    PlanUsage(planId=row["plan_id"], calls=row["calls"], revenue=usdc(row["net"])) for row in plans
                ],
                asOf=as_of,
            )
        )

    @routes.add(
        "GET",
        "/api/admin/usage/top-users",
        access=Access.ADMIN,
        query=TopUsersQuery,
        answers={200: TopUsers},
        aliases=("/admin/usage/top-users",),
    )
    async def get_top_users(ask: Ask[Any, TopUsersQuery, Any]) -> Answer:
        """Users by what they spent, the most first."""
        since = latest_days(clock, ask.query.days).since
        async with reads.reading(database) as connection:
            as_of = await UsageReads(connection).as_of()
            rows = await reads.top_users(connection, since, ask.query.limit)
        data = [
            TopUser(
                userId=str(row["user_id"]),
                name=row["name"],
                calls=row["calls"],
                spent_usdc=usdc(row["net"]),
            )
            for row in rows
        ]
        return Answer(TopUsers(days=ask.query.days, data=data, asOf=as_of))

    @routes.add(
        "GET",
        "/api/admin/usage/{userId}",
        access=Access.ADMIN,
        path_form=UserPath,
        query=UserUsageQuery,
        answers={200: UserUsage},
        problems=("NOT_FOUND",),
    )
    async def get_usage_of_user(ask: Ask[UserPath, UserUsageQuery, Any]) -> Answer:
        """What a user did, over all his vaults; by default in the last 30 days."""
        user_id = UserId(ask.path.userId)
        span = span_of(ask.query, clock.now(), MONTH, ask.query.groupBy)
        async with reads.reading(database) as connection:
            if not await reads.user_exists(connection, user_id):
                raise ProblemRaised("NOT_FOUND", "No such user")
            scope = reads.Scope(await reads.vaults_of(connection, user_id), span.since, span.until)
            as_of = await UsageReads(connection).as_of()
            sums = await reads.sums(connection, scope, ask.query.groupBy)
        stats = stats_of(sums, span, ask.query.groupBy)
        return Answer(UserUsage(userId=user_id, stats=stats, period=span.shown, asOf=as_of))

    return routes
