"""Usage over REST: what a caller sees of his calls, at once in lists and within one pass in sums."""

import csv
import io
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import httpx
import trio

from callora.ledger.commands import Refund
from callora.ledger.ids import ApiId, ApiKeyId, EventId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store.accounts import PricedEndpoint
from callora.store.rollup import advance
from tests.support.client import call
from tests.support.rest import ADMIN_KEY, Person, admin, anonymous, person, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import raw_upstream, respond

ENDPOINTS = (
    PricedEndpoint("GET", "/search", parse_usdc("0.01")),
    PricedEndpoint("GET", "/deep/{id}", parse_usdc("0.0000001")),
)
SETTINGS = {"REST_RATE_LIMIT_MAX_REQUESTS": "100000", "ADMIN_API_KEY": ADMIN_KEY, "USAGE_ROLLUP_INTERVAL_MS": "3600000"}
"""No pass is made unless the test makes one."""


def who(client: httpx.AsyncClient, consumer: Consumer) -> Person:
    """Return the consumer at his dashboard."""
    return Person(client, {"X-User-Id": consumer.user_id}, consumer.user_id)


async def counted(service: RunningService) -> None:
    """Make a pass, after any other that is under way."""
    made = await advance(service.database, service.context.clock.now(), wait=True)
    assert made is not None


async def paid(service: RunningService, consumer: Consumer, path: str = "/search", times: int = 1) -> None:
    for _ in range(times):
        assert (await call(service.port, "GET", f"/v1/call/echo{path}", consumer.headers)).status == 200


async def test_a_call_shows_at_once_in_the_list_and_within_a_pass_in_the_sums(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        api_id = await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        me = who(client, consumer)
        await paid(service, consumer)
        told = await me.ask("GET", "/api/usage")
        assert told.status == 200
        (event,) = told.body["events"]
        stored = await service.database.fetch_row("SELECT event_id, latency_us FROM usage_events")
        assert stored is not None
        assert event == {
            "id": str(stored["event_id"]),  # defect 46: what is shown is what is stored
            "apiId": api_id,
            "keyId": consumer.api_key_id,
            "endpoint": {"id": event["endpoint"]["id"], "method": "GET", "path": "/search"},
            "occurredAt": event["occurredAt"],
            "state": "captured",
            "status": "success",
            "statusCode": 200,
            "outcome": "delivered",
            "latencyMs": stored["latency_us"] / 1000,
            "cost_usdc": "0.0100000",
            "refunded_usdc": "0.0000000",
            "requestBytes": 0,
            "responseBytes": event["responseBytes"],
        }
        assert told.body["period"]["from"] <= event["occurredAt"] < told.body["period"]["to"]
        await counted(service)
        stats = (await me.ask("GET", "/api/usage")).body
        assert stats["asOf"] >= event["occurredAt"]
        stats = stats["stats"]
        assert (stats["totalCalls"], stats["totalSpent"], stats["successRate"]) == (1, "0.0100000", 100.0)
        assert stats["breakdownByApi"] == [
            {
                "apiId": api_id,
                "slug": "echo",
                "name": "echo",
                "calls": 1,
                "failedCalls": 0,
                "revenue": "0.0100000",
                "refunded_usdc": "0.0000000",
            }
        ]
        assert len(stats["buckets"]) == 31
        assert [each["calls"] for each in stats["buckets"]][-1] == 1
        assert sum(each["calls"] for each in stats["buckets"]) == 1


async def test_a_service_makes_passes_by_itself(database_url: str) -> None:
    async with (
        running_service(database_url, {**SETTINGS, "USAGE_ROLLUP_INTERVAL_MS": "10"}) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        await paid(service, await service.consumer("1"))
        with trio.fail_after(60):
            while not await service.database.fetch_value("SELECT sum(calls) FROM usage_minutes"):  # noqa: ASYNC110
                await trio.lowlevel.checkpoint()
        service.context.metrics.flush()
        assert b"callora_usage_rollup_lag_seconds" in service.context.metrics.render()


async def test_a28_three_successes_and_a_failure_are_one_day_of_a_key(database_url: str) -> None:
    answers = iter((200, 200, 200, 500, 404))

    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(lambda request: respond(next(answers), body=b"x")(request)) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        for _ in range(4):
            await call(service.port, "GET", "/v1/call/echo/search", consumer.headers)
        await call(service.port, "GET", "/v1/call/echo/deep/7", consumer.headers)
        await service.until_no_hold(consumer)
        await counted(service)
        me = who(client, consumer)
        for base in ("/api/keys", "/api-keys"):
            told = await me.ask("GET", f"{base}/{consumer.api_key_id}/usage", query={"days": 30})
            (day,) = told.body["data"]
            assert day["date"] == f"{service.context.clock.now():%Y-%m-%d}"
            assert (day["requestCount"], day["chargedCount"], day["errorCount"]) == (5, 3, 2)
            assert day["cost_usdc"] == "0.0300000"
            summary = (await me.ask("GET", f"{base}/{consumer.api_key_id}/usage/summary")).body
            assert (summary["totalRequests"], summary["errorCount"]) == (5, 2)
            assert [
                (each["endpoint"]["path"], each["requests"], each["errors"], each["cost_usdc"])
                for each in summary["byEndpoint"]
            ] == [("/search", 4, 1, "0.0300000"), ("/deep/{id}", 1, 1, "0.0000000")]
        errors = (await me.ask("GET", "/api/usage", query={"status": "error"})).body["events"]
        assert [each["statusCode"] for each in errors] == [404, 500]
        assert {each["status"] for each in errors} == {"error"}
        assert len((await me.ask("GET", "/api/usage", query={"status": "success"})).body["events"]) == 3


async def test_defect_19_a_thousand_smallest_amounts_add_up_exactly(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        await paid(service, consumer, "/deep/1", 7)
        await paid(service, consumer, "/search", 3)
        await counted(service)
        me = who(client, consumer)
        assert (await me.ask("GET", "/api/usage")).body["stats"]["totalSpent"] == "0.0300007"
        told = await me.ask("GET", "/api/usage/aggregate")
        assert told.body["totals"]["totalSpent"] == "0.0300007"
        assert [each["revenue"] for each in told.body["data"] if each["calls"]] == ["0.0300007"]
        assert all(each["hour"] == each["period"] for each in told.body["data"])
        ends = (await me.ask("GET", "/api/usage/by-endpoint")).body["data"]
        assert [(each["endpoint"]["path"], each["calls"], each["revenue"]) for each in ends] == [
            ("/deep/{id}", 7, "0.0000007"),
            ("/search", 3, "0.0300000"),
        ]


async def test_defect_27_what_cannot_be_read_is_an_error_and_never_zero(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        me = who(client, await service.consumer("1"))
        await service.database.execute("ALTER TABLE usage_minutes RENAME TO gone")
        for path in ("/api/usage", "/api/usage/aggregate", "/api/usage/by-endpoint"):
            told = await me.ask("GET", path)
            assert (told.status, told.code) == (500, "INTERNAL_SERVER_ERROR")


async def test_pages_follow_each_other_and_miss_nothing(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        await paid(service, consumer, times=7)
        me, seen = who(client, consumer), list[str]()
        query: dict[str, str | int] = {"limit": 3}
        while True:
            body = (await me.ask("GET", "/api/usage", query=query)).body
            seen += [event["id"] for event in body["events"]]
            assert body["pagination"]["hasMore"] == (body["pagination"]["nextCursor"] is not None)
            if not body["pagination"]["hasMore"]:
                break
            await paid(service, consumer)  # what is new moves no page
            query = {"limit": 3, "cursor": body["pagination"]["nextCursor"]}
        assert len(seen) == len(set(seen)) == 7
        assert seen == sorted(seen, reverse=True)
        ends = (await me.ask("GET", "/api/usage/by-endpoint", query={"limit": 1})).body
        assert ends["meta"] == {"limit": 1, "nextCursor": None, "hasMore": False}


async def test_a_refund_lowers_the_sums_and_is_shown_beside_its_call(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        await paid(service, consumer, times=2)
        me = who(client, consumer)
        event = (await me.ask("GET", "/api/usage")).body["events"][0]
        refund = Refund(EventId(event["id"]), Stroops(40_000), "because")
        assert isinstance(await service.ledger.registry.ask(consumer.vault_id, refund), BalanceMoved)
        await counted(service)
        body = (await me.ask("GET", "/api/usage")).body
        assert [(each["cost_usdc"], each["refunded_usdc"]) for each in body["events"]] == [
            ("0.0100000", "0.0040000"),
            ("0.0100000", "0.0000000"),
        ]
        stats = body["stats"]
        assert (stats["totalSpent"], stats["refunded_usdc"], stats["totalCalls"]) == ("0.0160000", "0.0040000", 2)
        lines = (await me.ask("GET", "/api/usage/csv")).body.decode().splitlines()
        assert [line.rpartition(",")[2] for line in lines[1:]] == ["0.0060000", "0.0100000"]


async def test_what_is_anothers_is_not_there(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        one, other = await service.consumer("1"), await service.consumer("1")
        await paid(service, one)
        await counted(service)
        stranger, nobody = who(client, other), anonymous(client)
        unknown = ApiKeyId("00000000-0000-7000-8000-000000000000")
        for path in ("/api/usage", "/api/usage/aggregate", "/api/usage/by-endpoint", "/api/usage/csv"):
            assert (await nobody.ask("GET", path)).status == 401
            told = await stranger.ask("GET", path)
            assert told.status == 200
            assert one.api_key_id not in str(told.body)
            asked = [await stranger.ask("GET", path, query={"keyId": key}) for key in (one.api_key_id, unknown)]
            assert [(each.status, each.code) for each in asked] == [(404, "API_KEY_NOT_FOUND")] * 2
            assert len({str({**each.body, "requestId": ""}) for each in asked}) == 1
        assert (await stranger.ask("GET", "/api/usage")).body["events"] == []
        assert (await stranger.ask("GET", "/api/usage")).body["stats"]["totalCalls"] == 0
        for path in ("usage", "usage/summary"):
            for key in (one.api_key_id, unknown):
                told = await stranger.ask("GET", f"/api/keys/{key}/{path}")
                assert (told.status, told.code) == (404, "API_KEY_NOT_FOUND")
        # Someone without a vault has no usage, which is no error
        newcomer = await person(service, client)
        told = await newcomer.ask("GET", "/api/usage")
        assert told.status == 200
        assert told.body["events"] == []
        assert told.body["stats"]["successRate"] is None


async def test_both_networks_of_a_user_are_one_list(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        test = await service.consumer("1")
        vault = await service.database.fetch_value(
            "INSERT INTO vaults (vault_id, user_id, network, plan_id) VALUES ($1, $2, 'mainnet', 'enterprise')"
            " RETURNING vault_id",
            service.context.ids.uuid7(),
            test.user_id,
        )
        live = await service.another_key(test.user_id, vault, 1000, "mainnet")
        await service.database.execute("UPDATE vaults SET available = 10000000 WHERE vault_id = $1", vault)
        await paid(service, test)
        await paid(service, live)
        await paid(service, test)
        await counted(service)
        me = who(client, test)
        body = (await me.ask("GET", "/api/usage")).body
        assert [each["keyId"] for each in body["events"]] == [test.api_key_id, live.api_key_id, test.api_key_id]
        assert body["stats"]["totalCalls"] == 3
        one = (await me.ask("GET", "/api/usage", query={"keyId": live.api_key_id})).body
        assert (len(one["events"]), one["stats"]["totalCalls"]) == (1, 1)
        assert len((await me.ask("GET", "/api/usage/csv")).body.splitlines()) == 4


async def test_an_open_hold_is_listed_as_open_and_not_yet_counted(database_url: str) -> None:
    arrived, go_on = trio.Event(), trio.Event()

    async def slow(request: Any) -> None:
        arrived.set()
        await go_on.wait()
        await respond(200, body=b"late")(request)

    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(slow) as upstream,
        rest_client(service) as client,
        trio.open_nursery() as nursery,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        nursery.start_soon(paid, service, consumer)
        await arrived.wait()
        await counted(service)
        body = (await who(client, consumer).ask("GET", "/api/usage")).body
        (event,) = body["events"]
        assert (event["state"], event["status"], event["cost_usdc"]) == ("held", "open", "0.0000000")
        assert body["stats"]["totalCalls"] == 0
        go_on.set()


async def test_everything_wrong_with_a_question_is_told(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        me = who(client, await service.consumer("0"))

        async def wrong(path: str, query: Mapping[str, str | int]) -> list[str]:
            told = await me.ask("GET", path, query=query)
            assert (told.status, told.code) == (400, "VALIDATION_ERROR"), (path, query, told.body)
            return told.wrong

        assert await wrong(
            "/api/usage",
            {
                "from": "yesterday",
                "to": "2026",
                "apiId": 0,
                "keyId": "x",
                "status": "ok",
                "groupBy": "year",
                "limit": 0,
            },
        ) == [f"query.{name}" for name in ("from", "to", "apiId", "keyId", "status", "groupBy", "limit")]
        assert await wrong("/api/usage", {"from_": "2026-11-21"}) == ["query.from_"]
        now = service.context.clock.now()

        def at(**ago: float) -> str:
            return (now - timedelta(**ago)).isoformat()

        for query in (
            {"from": at(days=1), "to": at(days=2)},
            {"from": at(days=-3)},
            {"from": at(days=-3), "to": at(days=-4)},
            {"from": at(days=367)},
            {"from": "0001-01-01", "to": "0001-01-02"},
            {"from": at(days=2, minutes=2), "groupBy": "hour"},
            {"groupBy": "hour"},
        ):
            assert await wrong("/api/usage", query) == ["query.from"]
        for cursor in ("x", "bm9uc2Vuc2U", "WzFd", "WyJ4Il0", "é"):
            assert await wrong("/api/usage", {"cursor": cursor}) == ["query.cursor"]
            assert await wrong("/api/usage/by-endpoint", {"cursor": cursor}) == ["query.cursor"]
        key = "00000000-0000-7000-8000-000000000000"
        for days in ("0", "366", "1.5", "", "-1", "9" * 30):
            assert await wrong(f"/api/keys/{key}/usage", {"days": days}) == ["query.days"]
        assert await wrong("/api/keys/nonsense/usage", {}) == ["path.keyId"]
        for query in (
            {"from": "9999-12-31", "to": "9999-12-31T23:59:59.999999Z"},
            {"to": "0001-01-01"},
            {"from": "2000-01-01", "to": "2000-01-01"},
            {"from": at(days=1), "to": "9999-12-31T23:59:59.999999Z"},
        ):
            assert (await me.ask("GET", "/api/usage", query=query)).status in (200, 400)
        same = at(hours=1)
        told = await me.ask("GET", "/api/usage", query={"from": same, "to": same})
        assert told.status == 200


async def test_a_period_holds_its_first_minute_and_not_the_one_after_its_last(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("1")
        await paid(service, consumer)
        await counted(service)
        me = who(client, consumer)
        event = (await me.ask("GET", "/api/usage")).body["events"][0]
        minute = event["occurredAt"][:16] + ":00.000Z"
        for query, calls in (({"from": minute}, 1), ({"to": minute}, 0), ({"from": event["occurredAt"]}, 1)):
            body = (await me.ask("GET", "/api/usage", query=query)).body
            assert (len(body["events"]), body["stats"]["totalCalls"]) == (calls, calls)


async def test_an_export_is_csv_that_no_spreadsheet_runs(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        api_id = await service.api("echo", upstream.url, ENDPOINTS)
        consumer = await service.consumer("100")
        await paid(service, consumer)
        me = who(client, consumer)
        told = await me.ask("GET", "/api/usage/csv")
        assert told.headers["content-type"] == "text/csv; charset=utf-8"
        name = f"usage-export-{service.context.clock.now():%Y-%m-%d}.csv"
        assert told.headers["content-disposition"] == f'attachment; filename="{name}"'
        event = (await me.ask("GET", "/api/usage")).body["events"][0]
        rows = list(csv.reader(io.StringIO(told.body.decode())))
        assert rows == [
            ["id", "apiId", "endpoint", "occurredAt", "revenue"],
            [event["id"], str(api_id), "GET /search", event["occurredAt"], "0.0100000"],
        ]
        assert (await me.ask("GET", "/api/usage/csv", query={"apiId": api_id + 1})).body.splitlines() == [
            b"id,apiId,endpoint,occurredAt,revenue"
        ]


async def _many_events(service: RunningService, consumer: Consumer, api_id: ApiId, count: int) -> None:
    await service.database.execute(
        "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
        " created_at, expires_at, price_version, state, amount, closed_at, status, outcome)"
        " SELECT $1, (lpad(to_hex((extract(epoch FROM $3::timestamptz) * 1000)::bigint - n), 12, '0')"
        " || '7000' || '8000' || lpad(to_hex(n), 12, '0'))::uuid, $2, $2, $4, 1, 0,"
        " $3::timestamptz - n * interval '1 millisecond', $3::timestamptz + interval '1 hour', 1, 'captured', 0, $3,"
        " 200, 'delivered' FROM generate_series(1, $5::int) n",
        consumer.vault_id,
        consumer.api_key_id,
        service.context.clock.now(),
        api_id,
        count,
    )


async def test_a_long_export_is_read_and_sent_in_steps_and_ends_with_the_client(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        api_id = await service.api("echo", "http://127.0.0.1:9", ENDPOINTS)
        consumer = await service.consumer("1")
        await _many_events(service, consumer, api_id, 3001)
        whole = (await who(client, consumer).ask("GET", "/api/usage/csv")).body.decode().splitlines()
        assert len(whole) == 3002
        assert len(set(whole)) == 3002
        await _many_events(service, consumer, api_id, 150_000)
        ended = service.context.metrics.http_requests.of("GET", "/api/usage/csv", "200", "other")
        before = ended._value.get()
        stream = await trio.open_tcp_stream("127.0.0.1", service.port)
        await stream.send_all(
            f"GET /api/usage/csv HTTP/1.1\r\nHost: x\r\nX-User-Id: {consumer.user_id}\r\n\r\n".encode()
        )
        assert (await stream.receive_some(12)) == b"HTTP/1.1 200"
        async with service.database.transaction() as other:
            # No batch can be read from here on: the export ends because its client leaves, or not at all
            await other.execute("LOCK TABLE usage_events IN ACCESS EXCLUSIVE MODE")
            await stream.aclose()
            with trio.fail_after(5):  # before the database would give up
                while ended._value.get() == before:  # noqa: ASYNC110
                    await trio.lowlevel.checkpoint()
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'"
            )
            with trio.fail_after(60):
                while await service.database.fetch_value(waiting):  # noqa: ASYNC110
                    await trio.lowlevel.checkpoint()
    assert service.exit_code == 0


async def test_operators_see_a_users_usage_and_who_spends_most(database_url: str) -> None:
    async with (
        running_service(database_url, SETTINGS) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        small, large = await service.consumer("1"), await service.consumer("1")
        await paid(service, small)
        await paid(service, large, times=2)
        await counted(service)
        operator = admin(client)
        told = await operator.ask("GET", f"/api/admin/usage/{large.user_id}")
        assert (told.body["stats"]["totalCalls"], told.body["stats"]["totalSpent"]) == (2, "0.0200000")
        top = (await operator.ask("GET", "/api/admin/usage/top-users", query={"limit": 5, "days": 1})).body["data"]
        assert [(each["userId"], each["spent_usdc"]) for each in top] == [
            (large.user_id, "0.0200000"),
            (small.user_id, "0.0100000"),
        ]
        everyone = (await operator.ask("GET", "/api/admin/usage/summary", query={"days": 7})).body
        assert (everyone["totalCalls"], everyone["totalRevenue"], len(everyone["buckets"])) == (3, "0.0300000", 7)
        told = await operator.ask("GET", "/api/admin/usage/00000000-0000-7000-8000-000000000000")
        assert (told.status, told.code) == (404, "NOT_FOUND")
        for path in (large.user_id, "top-users", "summary"):
            assert (await who(client, large).ask("GET", f"/api/admin/usage/{path}")).status == 403
            assert (await anonymous(client).ask("GET", f"/api/admin/usage/{path}")).status == 401
        lines = await service.database.fetch("SELECT action, status FROM audit_events WHERE actor = 'admin-key'")
        assert sorted((row["action"], row["status"]) for row in lines) == [
            ("get_everyones_usage", 200),
            ("get_top_users", 200),
            ("get_usage_of_user", 200),
            ("get_usage_of_user", 404),
        ]
