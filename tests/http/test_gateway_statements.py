"""A gateway's keys, limits and usage, by the numbers of the statements that they answer: A01 to A35, weak points W-A.

Others of these numbers stand where their subject is: A14 in test_keys.py, A15 and more of W-A13 in test_admission.py,
A17 to A19, A21, W-A6, W-A7 and more of W-A12 in test_shared_rate_limits.py, A28 in test_usage.py. What is answered
otherwise, and why: docs/decisions/0029.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio

import callora.service
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import ApiId
from callora.ledger.keys import RANDOM_BYTES, is_well_formed, make_key
from callora.ledger.money import parse_usdc
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import open_database
from callora.store.rollup import rebuild
from tests.support.client import RawClient, call, request_bytes, watchdog
from tests.support.keys import NOBODYS, PATH, SECRET, KeyShop, id_of, key_shop
from tests.support.rest import Person, Told, admin
from tests.support.service import RunningService, running_service
from tests.support.upstream import Exchange, RawUpstream, gated, raw_upstream, respond

NO_PASSES = {"USAGE_ROLLUP_INTERVAL_MS": "3600000"}
"""Sums are made when a test makes them."""


async def counted(service: RunningService) -> None:
    """Add up everything, however old."""
    await rebuild(service.database, service.context.clock, lambda _: None, timedelta(days=400))


async def until_closed(service: RunningService) -> None:
    """Return when no call is open: releases are stored without anyone waiting."""
    with watchdog("every call to be closed"):
        while await service.database.fetch_value("SELECT count(*) FROM usage_events WHERE state = 'held'"):  # noqa: ASYNC110 - the store decides
            await trio.lowlevel.checkpoint()


async def two_endpoints(it: KeyShop, url: str) -> ApiId:
    """Publish an API of which a search costs something and a list nothing."""
    search = PricedEndpoint("GET", "/search", parse_usdc("0.01"))
    return await it.service.api("two", url, [search, PricedEndpoint("GET", "/engines", parse_usdc("0"))])


def refusals(service: RunningService, code: str) -> float:
    return service.context.metrics.registry.get_sample_value("callora_refusals_total", {"code": code}) or 0.0


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a01_a_new_key_is_told_once_and_has_the_free_plans_rate(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.ada.ask("POST", "/api-keys", {"name": "My API Key"})
        assert made.status == 201
        secret, shown = made.body["key"], made.body["apiKey"]
        assert (shown["name"], shown["active"], shown["prefix"]) == ("My API Key", True, secret[:16])
        assert (shown["rateLimitPerMinute"], shown["allowedEndpoints"], shown["lastUsedAt"]) == (None, None, None)
        response = await it.call(secret)
        assert (response.status, response.header("X-RateLimit-Limit")) == (402, "10"), "nothing is prepaid yet"
        assert secret not in str((await it.ada.ask("GET", "/api-keys")).body)
        told = await it.ada.ask("POST", "/api-keys", {"name": "My API Key", "tier": "free"})
        assert told.wrong == ["body.tier"], "a plan is the vault's, and not the caller's to choose"


async def test_a02_a_secret_shows_its_network_and_no_character_of_it_can_be_mistyped(database_url: str) -> None:
    async with key_shop(database_url) as it:
        test, live = await it.key(), await it.key(network="mainnet")
        for made, beginning in ((test, "ck_test_"), (live, "ck_live_")):
            secret = made.body["key"]
            assert secret.startswith(beginning)
            assert (len(secret), is_well_formed(secret.encode())) == (56, True)
            assert set(secret.removeprefix(beginning)) <= set("0123456789abcdef")
            other = "0" if secret[20] != "0" else "1"
            assert not is_well_formed((secret[:20] + other + secret[21:]).encode())
        told = await it.ada.ask("POST", "/api-keys", {"name": "n", "isTest": True})
        assert told.wrong == ["body.isTest"]


async def test_a05_a_list_is_masked_and_ones_own(database_url: str) -> None:
    async with key_shop(database_url) as it:
        ada, bob = await it.key(), await it.key(it.bob)
        told = await it.ada.ask("GET", "/api-keys")
        (shown,) = told.body["data"]
        assert (told.status, shown["id"]) == (200, id_of(ada))
        assert shown["maskedKey"] == f"ck_test_…{ada.body['key'][-4:]}"
        assert ada.body["key"] not in str(told.body) and id_of(bob) not in str(told.body)


async def test_a06_anothers_key_is_as_unknown_as_one_that_is_not_there(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        assert (await it.ada.ask("GET", f"/api-keys/{id_of(made)}")).status == 200
        for key_id in (id_of(made), NOBODYS):
            told = await it.bob.ask("GET", f"/api-keys/{key_id}")
            assert (told.status, told.code, told.body["message"]) == (404, "API_KEY_NOT_FOUND", "No such API key")


async def test_a07_a_patch_changes_what_is_the_owners_and_nothing_else(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api-keys/{id_of(made)}"
        endpoint = await it.service.database.fetch_value("SELECT endpoint_id FROM api_endpoints")
        changes = {
            "name": "other",
            "description": "text",
            "allowedEndpoints": [endpoint],
            "allowedIps": ["127.0.0.0/8"],
            "active": False,
            "expiresAt": "2130-01-01T00:00:00.000Z",
        }
        told = await it.ada.ask("PATCH", path, changes)
        assert (told.status, {name: told.body[name] for name in changes}) == (200, changes)
        assert (await it.ada.ask("PATCH", path, {"expiresAt": None})).body["expiresAt"] is None
        for field in ("tier", "rateLimit", "monthlyCredits"):
            told = await it.ada.ask("PATCH", path, {field: 5})
            assert (told.status, told.wrong) == (400, [f"body.{field}"])


async def test_a08_a_key_can_be_disabled_for_the_very_next_call_and_enabled_again(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for active, status, outcome in ((False, 401, "API_KEY_DISABLED"), (True, 200, "200")):
            await it.ada.ask("PATCH", f"/api-keys/{id_of(made)}", {"active": active})
            assert (await it.call(made.body["key"])).status == status
            assert await it.outcome(made.body["key"]) == outcome


async def test_a09_a_deleted_key_is_refused_for_good_and_its_usage_stays(database_url: str) -> None:
    async with key_shop(database_url, **NO_PASSES) as it:
        made = await it.key()
        path = f"/api-keys/{id_of(made)}"
        assert await it.outcome(made.body["key"]) == "200"
        told = await it.ada.ask("DELETE", path)
        assert (told.status, told.body) == (204, None)
        response = await it.call(made.body["key"])
        assert (response.status, response.json()["code"]) == (403, "API_KEY_REVOKED")
        await counted(it.service)
        assert (await it.ada.ask("GET", f"{path}/usage/summary")).body["totalRequests"] == 1


async def test_a10_a_regenerated_key_is_the_same_key_and_its_window_goes_on(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(network="mainnet", rateLimitPerMinute=2, description="kept")
        former = made.body["key"]
        assert await it.outcome(former) == "200"
        told = await it.ada.ask("POST", f"/api-keys/{id_of(made)}/regenerate", {})
        secret, shown = told.body["key"], told.body["apiKey"]
        assert secret.startswith("ck_live_") and secret != former
        kept = ("id", "name", "description", "network", "vaultId", "rateLimitPerMinute", "createdAt")
        assert [shown[name] for name in kept] == [made.body["apiKey"][name] for name in kept]
        assert (await it.call(former)).status == 401
        assert [await it.outcome(secret) for _ in range(2)] == ["200", "TOO_MANY_REQUESTS"]
        assert secret not in str((await it.ada.ask("GET", f"/api-keys/{id_of(made)}")).body)


async def test_a11_a_key_is_its_makers_and_pays_from_a_vault_of_his(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        owner = await it.service.database.fetch_value(
            "SELECT v.user_id::text FROM api_keys k JOIN vaults v USING (vault_id) WHERE v.user_id = k.user_id"
        )
        assert owner == it.ada.user_id
        for field in ("userId", "organizationId"):
            told = await it.ada.ask("POST", "/api-keys", {"name": "n", field: str(it.bob.user_id)})
            assert told.wrong == [f"body.{field}"]
        told = await it.bob.ask("POST", "/api-keys", {"name": "n", "vaultId": made.body["apiKey"]["vaultId"]})
        assert told.code == "VAULT_NOT_FOUND"


async def test_a12_without_a_good_access_token_nobody_manages_keys(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for headers, code in (
            ({}, "UNAUTHORIZED"),
            ({"Authorization": "Bearer"}, "MISSING_TOKEN"),
            ({"Authorization": "Bearer x.y.z"}, "INVALID_TOKEN"),
            ({"Authorization": "Basic x"}, "INVALID_AUTH_HEADER"),
        ):
            for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{id_of(made)}")):
                told = await it.stranger.ask(method, f"/api-keys{path}", headers=headers)
                assert (told.status, told.code) == (401, code)
        assert await it.outcome(made.body["key"]) == "200"


# --- calls ------------------------------------------------------------------------------------------------------------


async def test_a13_a_call_needs_a_key_that_lives(database_url: str) -> None:
    async with key_shop(database_url) as it:
        bare = await call(it.service.port, "GET", PATH)
        assert (bare.status, bare.json()["code"]) == (401, "UNAUTHORIZED")
        assert "X-Api-Key" in bare.json()["message"]
        unknown = await it.call(make_key("testnet", bytes(RANDOM_BYTES)))
        assert (unknown.status, unknown.json()["message"]) == (401, "The API key is not known")
        made = await it.key()
        soon = datetime.now(UTC) + timedelta(milliseconds=200)
        await it.ada.ask("PATCH", f"/api-keys/{id_of(made)}", {"expiresAt": soon.isoformat()})
        with watchdog("the key to expire"):
            while (response := await it.call(made.body["key"])).status != 401:
                assert datetime.now(UTC) < soon + timedelta(seconds=30)
        assert response.status == 401


async def test_a20_the_window_slides_and_each_call_leaves_it_by_itself(database_url: str) -> None:
    window_seconds = 0.6
    async with key_shop(database_url, RATE_LIMIT_WINDOW_MS="600") as it:
        made = await it.key(rateLimitPerMinute=2)
        sent: list[float] = []
        for _ in range(2):
            sent.append(trio.current_time())
            assert await it.outcome(made.body["key"]) == "200"
            await trio.sleep(window_seconds / 2)
        for first_sent in sent:
            with watchdog("the oldest call to leave the window"):
                while await it.outcome(made.body["key"]) != "200":  # noqa: ASYNC110 - only answers tell
                    await trio.sleep(0.02)
            assert trio.current_time() - first_sent >= window_seconds, "room for one came when that one left"


# --- usage ------------------------------------------------------------------------------------------------------------


async def test_a27_every_call_is_an_event_of_its_own_and_counts_in_its_day(database_url: str) -> None:
    async with key_shop(database_url, **NO_PASSES) as it, raw_upstream(respond(body=b"found")) as upstream:
        api_id = await two_endpoints(it, upstream.url)
        made = await it.key()
        headers = [("X-Api-Key", made.body["key"]), ("User-Agent", "curl/8")]
        assert (await call(it.service.port, "GET", "/v1/call/two/search?q=x", headers)).status == 200
        (event,) = (await it.ada.ask("GET", "/api/usage")).body["events"]
        assert (event["keyId"], event["apiId"], event["statusCode"]) == (id_of(made), api_id, 200)
        assert (event["endpoint"]["method"], event["endpoint"]["path"]) == ("GET", "/search")
        assert (event["cost_usdc"], event["outcome"]) == ("0.0100000", "delivered")
        assert event["latencyMs"] > 0 and event["requestBytes"] == 0 and event["responseBytes"] == len(b"found")
        for _ in range(2):
            await counted(it.service)
            (day,) = (await it.ada.ask("GET", f"/api-keys/{id_of(made)}/usage")).body["data"]
            assert (day["requestCount"], day["cost_usdc"]) == (1, "0.0100000")


async def test_a29_a_keys_days_are_listed_the_newest_first_for_up_to_a_year(database_url: str) -> None:
    async with key_shop(database_url, **NO_PASSES) as it:
        made = await it.key()
        now = it.service.context.clock.now()
        ages = (0, 3, 40)
        for age in ages:
            await past_call(it, made, now - timedelta(days=age))
        await counted(it.service)

        async def dates(**query: int) -> list[str]:
            told = await it.ada.ask("GET", f"/api-keys/{id_of(made)}/usage", query=query)
            assert (told.status, told.body["days"]) == (200, query.get("days", 30))
            return [each["date"] for each in told.body["data"]]

        expected = [f"{now - timedelta(days=age):%Y-%m-%d}" for age in ages]
        assert await dates() == expected[:2]
        assert await dates(days=1) == expected[:1]
        assert await dates(days=365) == expected
        for days in (0, 366):
            told = await it.ada.ask("GET", f"/api-keys/{id_of(made)}/usage", query={"days": days})
            assert (told.status, told.wrong) == (400, ["query.days"])


async def past_call(it: KeyShop, made: Told, at: datetime) -> None:
    """Store a paid call as it was made then."""
    await it.service.database.execute(
        "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
        " created_at, expires_at, price_version, state, amount, closed_at, status, outcome, latency_us)"
        " SELECT $1, (lpad(to_hex((extract(epoch FROM $3::timestamptz) * 1000)::bigint), 12, '0')"
        " || '70008000000000000001')::uuid, $2, a.developer_id, a.api_id, e.endpoint_id, 100000, $3,"
        " $3::timestamptz + interval '1 minute', 1, 'captured', 100000, $3, 200, 'delivered', 1000"
        " FROM apis a JOIN api_endpoints e USING (api_id) LIMIT 1",
        made.body["apiKey"]["vaultId"],
        id_of(made),
        at,
    )


async def test_a30_a_keys_summary_is_in_all_and_by_endpoint_and_its_owners_alone(database_url: str) -> None:
    async with key_shop(database_url, **NO_PASSES) as it:
        statuses = iter((200, 200, 503, 200))
        async with raw_upstream(lambda exchange: respond(next(statuses))(exchange)) as upstream:
            await two_endpoints(it, upstream.url)
            made = await it.key()
            for path in ("search", "search", "search", "engines"):
                await it.call(made.body["key"], f"/v1/call/two/{path}")
            await until_closed(it.service)
        await counted(it.service)
        told = (await it.ada.ask("GET", f"/api-keys/{id_of(made)}/usage/summary")).body
        assert (told["totalRequests"], told["errorCount"], told["totalCost_usdc"]) == (4, 1, "0.0200000")
        assert isinstance(told["avgLatencyMs"], int)
        assert [
            (each["endpoint"]["path"], each["requests"], each["errors"], each["cost_usdc"])
            for each in told["byEndpoint"]
        ] == [("/search", 3, 1, "0.0200000"), ("/engines", 1, 0, "0.0000000")]
        assert all(isinstance(each["avgLatencyMs"], int) for each in told["byEndpoint"])
        foreign = await it.bob.ask("GET", f"/api-keys/{id_of(made)}/usage/summary")
        assert (foreign.status, foreign.code) == (404, "API_KEY_NOT_FOUND")


async def test_a32_what_an_upstream_answers_passes_with_its_status_and_its_own_words(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for status in (400, 404, 429, 500, 502, 503):
            async with raw_upstream(respond(status, body=b"in my own words")) as upstream:
                await it.service.api(f"says-{status}", upstream.url)
                response = await it.call(made.body["key"], f"/v1/call/says-{status}/x")
            assert (response.status, response.body) == (status, b"in my own words")
            assert response.header("X-Callora-Charge") == "0.0000000"


# --- the service ------------------------------------------------------------------------------------------------------


async def test_a33_health_and_metrics_are_where_they_are_looked_for(database_url: str) -> None:
    async with key_shop(database_url) as it:
        told = await it.stranger.ask("GET", "/health")
        assert (told.status, told.body["status"], told.body["checks"]["database"]) == (200, "ok", "ok")
        assert abs(datetime.fromisoformat(told.body["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
        told = await it.stranger.ask("GET", "/metrics")
        assert told.headers["content-type"].startswith("text/plain; version=")
        text = told.body.decode()
        assert 'http_requests_total{method="GET",route="/health",route_group="health",status_code="200"} 1.0' in text


async def test_a34_operators_list_see_change_and_revoke_everybodys_keys_and_see_who_uses_what(
    database_url: str,
) -> None:
    async with key_shop(database_url, **NO_PASSES) as it:
        operator = admin(it.stranger.client)
        ada, bob = await it.key(), await it.key(it.bob)
        assert [await it.outcome(each.body["key"]) for each in (ada, ada, bob)] == ["200"] * 3
        await counted(it.service)
        of_ada = ada.body["apiKey"]["vaultId"]
        await it.service.database.execute("UPDATE vaults SET plan_id = 'pro' WHERE vault_id = $1", of_ada)
        await it.bob.ask("PATCH", f"/api-keys/{id_of(bob)}", {"active": False})

        async def listed(**query: str) -> list[str]:
            told = await operator.ask("GET", "/admin/api-keys", query=query)
            assert told.status == 200
            return [each["id"] for each in told.body["data"]]

        assert await listed() == [id_of(bob), id_of(ada)]
        assert await listed(userId=str(it.bob.user_id)) == await listed(active="false") == [id_of(bob)]
        assert await listed(planId="pro") == [id_of(ada)] and await listed(planId="enterprise") == []
        page = (await operator.ask("GET", "/admin/api-keys", query={"limit": 1})).body["meta"]
        assert await listed(limit="1", cursor=page["nextCursor"]) == [id_of(ada)]
        path = f"/admin/api-keys/{id_of(ada)}"
        shown = (await operator.ask("GET", path)).body
        assert (shown["userId"], shown["planId"]) == (it.ada.user_id, "pro")
        told = await operator.ask("PATCH", path, {"rateLimitPerMinute": 500})
        assert told.body["rateLimitPerMinute"] == 500, "more than her plan"
        told = await operator.ask("GET", "/admin/usage/summary", query={"days": 30})
        assert (told.body["totalCalls"], len(told.body["buckets"])) == (3, 30)
        (endpoint,) = told.body["byEndpoint"]
        assert (endpoint["slug"], endpoint["endpoint"]["path"], endpoint["calls"]) == ("echo", "*", 3)
        assert told.body["byPlan"] == [
            {"planId": "pro", "calls": 2, "revenue": "0.0200000"},
            {"planId": "free", "calls": 1, "revenue": "0.0100000"},
        ]
        told = await operator.ask("GET", "/admin/usage/top-users", query={"limit": 10, "days": 30})
        assert [(each["userId"], each["calls"]) for each in told.body["data"]] == [
            (it.ada.user_id, 2),
            (it.bob.user_id, 1),
        ]
        assert (await operator.ask("DELETE", path)).status == 204
        assert await it.outcome(ada.body["key"]) == "API_KEY_REVOKED"
        for below in ("api-keys", f"api-keys/{id_of(ada)}", "usage/summary", "usage/top-users"):
            assert (await it.ada.ask("GET", f"/admin/{below}")).status == 403
            assert (await it.stranger.ask("GET", f"/admin/{below}")).status == 401
        noted = await it.service.database.fetch_value("SELECT count(*) FROM audit_events")
        assert noted >= 18, "every access of an operator, whichever name it came by"


async def test_a34_a_second_name_has_the_pace_of_the_first(database_url: str) -> None:
    async with key_shop(database_url, REST_RATE_LIMIT_MAX_REQUESTS="3") as it:
        names = ("/api/admin/keys", "/admin/api-keys", "/admin/usage/summary", "/admin/usage/top-users")
        told = [await it.stranger.ask("GET", name, headers={"X-Admin-Api-Key": "guessed"}) for name in names]
        assert [each.code for each in told] == ["UNAUTHORIZED"] * 3 + ["TOO_MANY_REQUESTS"]


async def test_a35_the_reference_is_at_docs_and_no_closed_call_is_ever_purged(database_url: str) -> None:
    async with key_shop(database_url, **NO_PASSES) as it:
        told = await it.stranger.ask("GET", "/docs")
        assert (told.status, told.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"/api/keys/{keyId}/usage" in told.body
        made = await it.key()
        old = it.service.context.clock.now() - timedelta(days=91)
        await past_call(it, made, old)
        await counted(it.service)
        query = {"from": (old - timedelta(days=1)).isoformat()}
        report = (await it.ada.ask("GET", "/api/usage", query=query)).body
        assert (len(report["events"]), report["stats"]["totalCalls"]) == (1, 1)
        with pytest.raises(StoreRefused):
            await it.service.database.execute("DELETE FROM usage_events")


# --- weak points that Callora does not have ---------------------------------------------------------------------------


async def test_wa1_no_answer_and_no_column_has_a_secret_or_its_hash(database_url: str) -> None:
    async with key_shop(database_url) as it:
        operator = admin(it.stranger.client)
        made = await it.key()
        secret = made.body["key"]
        row = await it.service.database.fetch_row("SELECT to_jsonb(k)::text AS text, key_hash FROM api_keys k")
        assert row is not None
        assert secret not in row["text"] and secret.removeprefix(secret[:16]) not in row["text"]
        for who, method, path, body in (
            (it.ada, "GET", "/api-keys", None),
            (it.ada, "GET", f"/api-keys/{id_of(made)}", None),
            (it.ada, "PATCH", f"/api-keys/{id_of(made)}", {"name": "n"}),
            (operator, "GET", "/admin/api-keys", None),
            (operator, "GET", f"/admin/api-keys/{id_of(made)}", None),
            (operator, "PATCH", f"/admin/api-keys/{id_of(made)}", {"name": "m"}),
        ):
            told = await who.ask(method, path, body)
            assert told.status == 200
            for form in (secret, row["key_hash"].hex()):
                assert form not in str(told.body), (method, path)


async def test_wa2_nobody_chooses_his_plan_or_gets_past_it(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api-keys/{id_of(made)}"
        for field in ("tier", "plan", "planId", "monthlyCredits"):
            for method, at in (("POST", "/api-keys"), ("PATCH", path)):
                told = await it.ada.ask(method, at, {"name": "n", field: "enterprise"})
                assert (told.status, told.wrong) == (400, [f"body.{field}"])
        assert (await it.ada.ask("PATCH", path, {"rateLimitPerMinute": 11})).wrong == ["body.rateLimitPerMinute"]
        unoffered = await it.ada.ask("PATCH", path, {"allowedEndpoints": [999_999]})
        assert unoffered.wrong == ["body.allowedEndpoints[0]"], "a list narrows a key and never widens it"
        assert await it.service.database.fetch_value("SELECT plan_id FROM vaults") == "free"


async def test_wa10_free_is_free_failures_cost_nothing_and_what_is_the_callers_stays_here(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        await two_endpoints(it, upstream.url)
        made = await it.key()
        secret = made.body["key"]

        async def charge(path: str) -> str | None:
            return (await it.call(secret, path)).header("X-Callora-Charge")

        assert await charge("/v1/call/two/engines") == "0.0000000"
        assert await it.outcome(secret, "/v1/call/two/unpriced") == "NOT_FOUND", "neither free nor guessed"
        upstream.handler = respond(500)
        assert await charge("/v1/call/two/search") == "0.0000000"
        upstream.handler = respond()
        assert await charge("/v1/call/two/search?q=a%20b") == "0.0100000"
        stored = "SELECT state::text AS state FROM usage_events ORDER BY event_id DESC LIMIT 1"
        assert await it.service.database.fetch_value(stored) == "captured", "before its answer, and for good"
        assert [each.target for each in upstream.requests] == ["/engines", "/search", "/search?q=a%20b"]
        assert not any(secret.encode() in each.raw_head for each in upstream.requests)
        for below in ("usage", "usage/summary"):
            assert (await it.bob.ask("GET", f"/api-keys/{id_of(made)}/{below}")).status == 404


async def test_wa12_every_refusal_is_counted_by_its_code(database_url: str) -> None:
    async with key_shop(database_url) as it:
        poor = await it.key(rateLimitPerMinute=1, balance="0.001")
        narrow = await it.key(allowedIps=["192.0.2.7"], balance="0.001")
        outcomes = [await it.outcome(each) for each in ("nonsense", narrow.body["key"], poor.body["key"])]
        outcomes.append(await it.outcome(poor.body["key"]))
        assert outcomes == ["UNAUTHORIZED", "IP_NOT_ALLOWED", "INSUFFICIENT_BALANCE", "TOO_MANY_REQUESTS"]
        it.service.context.metrics.flush()
        assert [refusals(it.service, code) for code in outcomes] == [1.0] * 4


async def test_wa13_a_list_of_addresses_is_of_networks_and_is_never_empty_or_malformed(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(allowedIps=["127.0.0.0/8"])
        assert await it.outcome(made.body["key"]) == "200", "a network, not a text to be compared"
        path = f"/api-keys/{id_of(made)}"
        for wrong in ([], ["127.0.0.1/8"], ["localhost"], ["1.2.3"], [""], "127.0.0.1", [None]):
            told = await it.ada.ask("PATCH", path, {"allowedIps": wrong})
            assert (told.status, told.code) == (400, "VALIDATION_ERROR"), wrong
        assert (await it.ada.ask("GET", path)).body["allowedIps"] == ["127.0.0.0/8"]
        await it.ada.ask("PATCH", path, {"allowedIps": ["192.0.2.0/24"]})
        spoofed = [("X-Api-Key", made.body["key"]), ("X-Forwarded-For", "192.0.2.7")]
        assert (await call(it.service.port, "GET", PATH, spoofed)).json()["code"] == "IP_NOT_ALLOWED"
        await it.ada.ask("PATCH", path, {"allowedIps": None})
        assert await it.outcome(made.body["key"]) == "200"


async def test_wa14_a_wrong_parameter_is_told_by_its_name_and_the_database_never_heard_of(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        operator = admin(it.stranger.client)
        for who, path, wrong in (
            (it.ada, f"/api-keys/{id_of(made)}/usage?days=abc", "query.days"),
            (it.ada, "/api-keys/not-a-uuid", "path.keyId"),
            (it.ada, "/api-keys/not-a-uuid/usage/summary", "path.keyId"),
            (operator, "/admin/api-keys?page=0", "query.page"),
            (operator, "/admin/api-keys?limit=0", "query.limit"),
            (operator, "/admin/api-keys?userId=1%27--", "query.userId"),
            (operator, "/admin/api-keys/1", "path.keyId"),
            (operator, "/admin/usage/top-users?days=-1", "query.days"),
        ):
            told = await who.ask("GET", path)
            assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", [wrong])
            text = str(told.body).lower()
            assert not any(word in text for word in ("postgres", "asyncpg", "select", "syntax", "traceback"))


async def uploaded_in_halves(it: KeyShop, key: str, upstream: RawUpstream) -> int:
    """Send the second half of a body once the upstream has of the first; return the status."""
    first = trio.Event()

    async def reading(exchange: Exchange) -> None:
        assert await exchange.read_piece()
        first.set()
        await respond()(exchange)

    upstream.handler = reading
    whole = request_bytes("POST", "/v1/call/slow/x", [("X-Api-Key", key)], b"x" * 200_000)
    async with RawClient.connect(port=it.service.port) as client:
        await client.send(whole[:100_000])
        with watchdog("the first half to arrive"):
            await first.wait()
        await client.send(whole[100_000:])
        return (await client.read_response("POST")).status


async def test_wa15_what_is_slow_or_large_is_bounded_and_an_upstreams_refusal_is_seen_as_its_own(
    database_url: str,
) -> None:
    limits = {"PROXY_TIMEOUT_MS": "2000", "GATEWAY_BODY_LIMIT": "256kb", "REQUEST_BODY_LIMIT": "10kb"}
    gate = trio.Event()
    async with key_shop(database_url, **limits) as it, raw_upstream(gated(gate, respond())) as upstream:
        await it.service.api("slow", upstream.url)
        made = await it.key()
        assert await it.outcome(made.body["key"], "/v1/call/slow/x") == "GATEWAY_TIMEOUT"
        gate.set()
        headers = [("X-Api-Key", made.body["key"])]
        large = await call(it.service.port, "POST", "/v1/call/slow/x", headers, b"x" * 262_145)
        assert (large.status, large.json()["code"]) == (413, "REQUEST_BODY_TOO_LARGE")
        told = await it.ada.ask("POST", "/api-keys", {"name": "n" * 10_240})
        assert (told.status, told.code) == (413, "REQUEST_BODY_TOO_LARGE")
        assert await uploaded_in_halves(it, made.body["key"], upstream) == 200
        for status in (401, 402, 429):
            upstream.handler = respond(status, body=b"who are you?")
            response = await it.call(made.body["key"], "/v1/call/slow/x")
            assert (response.status, response.body) == (status, b"who are you?"), "not in our form"
        await until_closed(it.service)
        events = (await it.ada.ask("GET", "/api/usage", query={"limit": 3})).body["events"]
        assert [(each["statusCode"], each["outcome"], each["cost_usdc"]) for each in events] == [
            (status, "upstream_status", "0.0000000") for status in (429, 402, 401)
        ]


async def test_wb14_a_call_writes_nothing_to_its_key(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        row = "SELECT xmin::text FROM api_keys WHERE api_key_id = $1"
        before = await it.service.database.fetch_value(row, id_of(made))
        assert [await it.outcome(made.body["key"]) for _ in range(10)] == ["200"] * 10
        assert await it.service.database.fetch_value(row, id_of(made)) == before


async def last_used(it: KeyShop, made: Told) -> str | None:
    """Return when a key was last used, as its owner sees it."""
    used: str | None = (await it.ada.ask("GET", f"/api-keys/{id_of(made)}")).body["lastUsedAt"]
    return used


async def test_a16_wa16_a_call_is_noted_as_the_keys_last_use_and_a_refused_one_is_not(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callora.service, "KEY_USE_SECONDS", 0.01)
    async with key_shop(database_url) as it:
        keys = [await it.key() for _ in range(4)]
        disabled, revoked, expired, good = keys
        minted = await it.ada.ask("POST", f"/api-keys/{id_of(good)}/tokens", {"ttl": 60})
        token = f"/api-keys/{id_of(good)}/tokens/{minted.body['tokenId']}"
        assert (await it.ada.ask("DELETE", token)).status == 204
        await it.ada.ask("PATCH", f"/api-keys/{id_of(disabled)}", {"active": False})
        await it.ada.ask("DELETE", f"/api-keys/{id_of(revoked)}")
        past = "UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE api_key_id = $1"
        await it.service.database.execute(past, id_of(expired))
        outcomes = [await it.outcome(each.body["key"]) for each in (disabled, revoked, expired)]
        assert outcomes == ["API_KEY_DISABLED", "API_KEY_REVOKED", "API_KEY_EXPIRED"]
        bearer = [("Authorization", f"Bearer {minted.body['token']}")]
        assert (await call(it.service.port, "GET", PATH, bearer)).json()["code"] == "REVOKED_TOKEN"
        assert await last_used(it, good) is None
        before = datetime.now(UTC)
        assert await it.outcome(good.body["key"]) == "200"
        with watchdog("the use of the good key to be noted"):
            while (told := await last_used(it, good)) is None:
                pass
        assert datetime.fromisoformat(told) >= before - timedelta(milliseconds=1), "answers show milliseconds"
        assert [await last_used(it, each) for each in (disabled, revoked, expired)] == [None] * 3


@pytest.fixture
def another_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A time zone in which it is another day than in UTC; the process's own for the test."""
    zone = "Etc/GMT-14" if datetime.now(UTC).hour >= 12 else "Etc/GMT+12"
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    yield zone
    monkeypatch.undo()
    time.tzset()


async def test_wa17_jobs_in_every_process_count_once_and_days_are_those_of_utc(
    database_url: str, another_zone: str
) -> None:
    often = {"USAGE_ROLLUP_INTERVAL_MS": "100"}
    async with open_database(database_url) as database:
        name = await database.fetch_value("SELECT current_database()")
        await database.execute(f"ALTER DATABASE {name} SET timezone TO '{another_zone}'")
    async with key_shop(database_url, **often) as it, running_service(database_url, {**often, "JWT_SECRET": SECRET}):
        assert await it.service.database.fetch_value("SHOW timezone") == another_zone
        made = await it.key()
        before = datetime.now(UTC).date()
        assert [await it.outcome(made.body["key"]) for _ in range(10)] == ["200"] * 10
        after = datetime.now(UTC).date()
        usage = f"/api-keys/{id_of(made)}/usage"
        with watchdog("every call to be in the sums"):
            while sum(each["requestCount"] for each in await days_of(it.ada, usage)) < 10:  # noqa: ASYNC110 - a job does
                await trio.sleep(0.02)
        passes = (await it.ada.ask("GET", usage)).body["asOf"]
        with watchdog("some more passes"):
            while (told := await it.ada.ask("GET", usage)).body["asOf"] == passes:  # noqa: ASYNC110 - a job does
                await trio.sleep(0.02)
        days = told.body["data"]
        assert sum(each["requestCount"] for each in days) == 10
        assert {each["date"] for each in days} <= {f"{before}", f"{after}"}


async def days_of(who: Person, path: str) -> list[dict[str, Any]]:
    """Return a key's days."""
    days: list[dict[str, Any]] = (await who.ask("GET", path)).body["data"]
    return days
