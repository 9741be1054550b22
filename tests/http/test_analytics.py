"""What developers see of the calls to their APIs: analytics, revenue, and nothing of anyone else."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest

from callora.http.rest.periods import Span, bucket_of
from callora.ledger.commands import Refund
from callora.ledger.ids import DeveloperId, EventId, UserId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.reads.usage import Unit
from callora.store.revenue import advance as revenue_pass
from callora.store.rollup import advance
from tests.support.client import call
from tests.support.rest import Person, anonymous, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.upstream import raw_upstream, respond

SETTINGS = {"REST_RATE_LIMIT_MAX_REQUESTS": "100000", "USAGE_ROLLUP_INTERVAL_MS": "3600000"}
DEAR = (PricedEndpoint("GET", "/dear", parse_usdc("0.1")), PricedEndpoint("*", "*", parse_usdc("0.0000001")))


async def owner_of(service: RunningService, client: httpx.AsyncClient, slug: str) -> Person:
    """Return the developer of an API at his dashboard."""
    row = await service.database.fetch_row(
        "SELECT d.user_id, d.developer_id FROM apis a JOIN developers d ON d.developer_id = a.developer_id"
        " WHERE a.slug = $1",
        slug,
    )
    assert row is not None
    assert row["user_id"] != row["developer_id"]
    user_id = UserId(str(row["user_id"]))
    return Person(client, {"X-User-Id": user_id}, user_id)


async def counted(service: RunningService) -> None:
    for count in (advance, revenue_pass):
        assert await count(service.database, service.context.clock.now(), wait=True) is not None


def around(now: datetime, days: int = 3) -> dict[str, str | int]:
    return {"from": (now - timedelta(days=days)).isoformat(), "to": now.isoformat()}


async def test_defect_20_what_callers_pay_is_what_the_developer_earned(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("mine", upstream.url, DEAR)
        await service.api("theirs", upstream.url, DEAR)
        one, other = await service.consumer("1"), await service.consumer("1")
        for consumer, path in ((one, "mine/dear"), (other, "mine/x"), (other, "mine/dear"), (one, "theirs/dear")):
            assert (await call(service.port, "GET", f"/v1/call/{path}", consumer.headers)).status == 200
        await counted(service)
        developer = await owner_of(service, client, "mine")
        revenue = (await developer.ask("GET", "/api/developers/revenue")).body
        assert revenue["summary"] == {
            "total_earned": "0.2000001",
            "completed": "0.0000000",
            "pending": "0.0000000",
            "available_to_withdraw": "0.2000001",
            "held_back": None,
        }
        assert revenue["settlements"] == []
        assert revenue["pagination"] == {"limit": 20, "nextCursor": None, "hasMore": False}
        spent = [await service.balance(each) for each in (one, other)]
        theirs = (await (await owner_of(service, client, "theirs")).ask("GET", "/api/developers/revenue")).body
        earned = sum(parse_usdc(each["summary"]["total_earned"]) for each in (revenue, theirs))
        assert earned == 2 * parse_usdc("1") - sum(available for available, _ in spent)

        event = await service.database.fetch_value(
            "SELECT event_id::text FROM usage_events WHERE vault_id = $1 AND amount > 100", other.vault_id
        )
        refund = Refund(EventId(event), Stroops(1), "because")
        assert isinstance(await service.ledger.registry.ask(other.vault_id, refund), BalanceMoved)
        await counted(service)
        revenue = (await developer.ask("GET", "/api/developers/revenue")).body
        assert revenue["summary"]["total_earned"] == "0.2000000"


async def test_analytics_name_endpoints_and_hide_callers(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        api_id = await service.api("mine", upstream.url, DEAR)
        one, other = await service.consumer("1"), await service.consumer("1")
        for consumer, path in ((one, "dear"), (other, "x"), (other, "y"), (one, "dear")):
            assert (await call(service.port, "GET", f"/v1/call/mine/{path}", consumer.headers)).status == 200
        await counted(service)
        developer = await owner_of(service, client, "mine")
        now = service.context.clock.now()
        query = {**around(now), "includeTop": "true"}
        told = await developer.ask("GET", "/api/developers/analytics", query=query)
        assert told.status == 200
        assert [each["calls"] for each in told.body["data"]] == [0, 0, 0, 4]
        assert told.body["data"][-1]["revenue"] == "0.2000002"
        assert told.body["data"][-1]["period"] == f"{now:%Y-%m-%d}T00:00:00.000Z"
        tops = told.body["topEndpoints"]
        assert [(each["endpoint"]["path"], each["calls"], each["revenue"]) for each in tops] == [
            ("/dear", 2, "0.2000000"),
            ("*", 2, "0.0000002"),
        ]
        assert told.body["topUsers"] == [
            {"user": f"user_{one.user_id[-4:]}", "calls": 2, "revenue": "0.2000000"},
            {"user": f"user_{other.user_id[-4:]}", "calls": 2, "revenue": "0.0000002"},
        ]
        assert one.user_id not in str(told.body)
        assert one.vault_id not in str(told.body)
        for unit, buckets in (("week", 2), ("month", 2)):
            told = await developer.ask("GET", "/api/developers/analytics", query={**around(now, 7), "groupBy": unit})
            assert len(told.body["data"]) in (1, buckets)
            assert sum(each["calls"] for each in told.body["data"]) == 4
            assert told.body["topUsers"] is None
        told = await developer.ask("GET", "/api/developers/analytics", query={**around(now), "apiId": api_id})
        assert sum(each["calls"] for each in told.body["data"]) == 4


async def test_anothers_api_is_not_found_and_nor_is_one_that_is_not_there(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        await service.api("mine", "http://127.0.0.1:9", DEAR)
        theirs = await service.api("theirs", "http://127.0.0.1:9", DEAR)
        developer = await owner_of(service, client, "mine")
        query = around(service.context.clock.now())
        told = [
            await developer.ask("GET", "/api/developers/analytics", query={**query, "apiId": api_id})
            for api_id in (theirs, 4_000_000)
        ]
        assert [(each.status, each.code) for each in told] == [(404, "NOT_FOUND")] * 2
        assert len({str({**each.body, "requestId": ""}) for each in told}) == 1


async def test_who_is_no_developer_is_told_so(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        someone = await person(service, client)
        query = around(service.context.clock.now())
        for path, asked in (("revenue", {}), ("analytics", query)):
            told = await someone.ask("GET", f"/api/developers/{path}", query=asked)
            assert (told.status, told.code) == (403, "DEVELOPER_NOT_FOUND")
            assert (await anonymous(client).ask("GET", f"/api/developers/{path}", query=asked)).status == 401
        assert someone.user_id is not None
        now = service.context.clock.now()
        await accounts.ensure_developer(
            service.database, DeveloperId(service.context.ids.uuid7()), someone.user_id, "New", now
        )
        told = await someone.ask("GET", "/api/developers/revenue")
        assert told.body["summary"]["total_earned"] == "0.0000000"
        told = await someone.ask("GET", "/api/developers/analytics", query={**query, "includeTop": "true"})
        assert (told.body["topUsers"], told.body["topEndpoints"]) == ([], [])
        for wrong, fields in (
            ({}, ["query.from", "query.to"]),
            ({"from": query["to"], "to": query["from"]}, ["query.from"]),
            ({**query, "groupBy": "hour", "includeTop": "1"}, ["query.groupBy", "query.includeTop"]),
        ):
            told = await someone.ask("GET", "/api/developers/analytics", query=wrong)
            assert (told.code, told.wrong) == ("VALIDATION_ERROR", fields)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (
            "day",
            [datetime(2026, 11, day, tzinfo=UTC) for day in (27, 28, 29, 30)] + [datetime(2026, 12, 1, tzinfo=UTC)],
        ),
        ("week", [datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 30, tzinfo=UTC)]),
        ("month", [datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)]),
    ],
)
def test_buckets_begin_at_midnight_on_monday_or_on_the_first(unit: Unit, expected: list[datetime]) -> None:
    span = Span(datetime(2026, 11, 27, 3, 4, tzinfo=UTC), datetime(2026, 12, 1, 0, 1, tzinfo=UTC))
    assert [*span.buckets(unit)] == expected
    assert bucket_of(span.since, unit) == expected[0]
