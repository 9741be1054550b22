"""API keys over REST: made, seen and changed by their owners, nobody else's, in effect on the next call."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio

from callora.ledger.commands import Deposit
from callora.ledger.ids import VaultId
from callora.ledger.keys import is_well_formed
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store import apis
from callora.store.accounts import PricedEndpoint
from tests.support.client import watchdog
from tests.support.keys import NOBODYS, id_of, key_shop
from tests.support.rest import Told
from tests.support.upstream import raw_upstream, respond

# --- making -----------------------------------------------------------------------------------------------------------


async def test_a_key_is_made_with_its_secret_shown_once_and_pays_from_the_callers_own_vault(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(description="for the till", scopes=["read", "read"], rateLimitPerMinute=5)
        secret, shown = made.body["key"], made.body["apiKey"]
        assert is_well_formed(secret.encode()) and secret.startswith("ck_test_")
        assert shown["maskedKey"] == f"ck_test_…{secret[-4:]}"
        assert (shown["prefix"], shown["scopes"], shown["rateLimitPerMinute"]) == (secret[:16], ["read"], 5)
        assert (shown["active"], shown["revoked"], shown["lastUsedAt"]) == (True, False, None)
        assert await it.outcome(secret) == "200"
        owner = await it.service.database.fetch_value("SELECT user_id::text FROM vaults")
        assert owner == it.ada.user_id
        for path in ("/api/keys", f"/api/keys/{shown['id']}", "/api-keys", f"/api-keys/{shown['id']}"):
            told = await it.ada.ask("GET", path)
            assert told.status == 200
            assert secret not in str(told.body)
        assert (await it.ada.ask("GET", f"/api-keys/{shown['id']}")).body == shown


async def test_a_mainnet_key_is_live_and_has_its_own_vault(database_url: str) -> None:
    async with key_shop(database_url) as it:
        test, live = await it.key(), await it.key(network="mainnet")
        assert live.body["key"].startswith("ck_live_")
        assert live.body["apiKey"]["maskedKey"].startswith("ck_live_…")
        assert test.body["apiKey"]["vaultId"] != live.body["apiKey"]["vaultId"]
        again = await it.ada.ask("POST", "/api/keys", {"name": "b", "vaultId": live.body["apiKey"]["vaultId"]})
        assert again.body["key"].startswith("ck_live_")


async def test_everything_wrong_with_a_new_key_is_told_at_once(database_url: str) -> None:
    async with key_shop(database_url) as it:
        told = await it.ada.ask(
            "POST",
            "/api/keys",
            {
                "tier": "free",
                "network": "TestNet",
                "scopes": ["x y"],
                "allowedIps": ["10.0.0.1/8", "300.1.1.1"],
                "allowedApis": [],
                "rateLimitPerMinute": 0,
                "expiresAt": "tomorrow",
            },
        )
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")
        assert set(told.wrong) == {
            "body.name",
            "body.tier",
            "body.network",
            "body.scopes[0]",
            "body.allowedIps[0]",
            "body.allowedIps[1]",
            "body.allowedApis",
            "body.rateLimitPerMinute",
            "body.expiresAt",
        }
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        told = await it.ada.ask(
            "POST",
            "/api/keys",
            {"name": "n", "expiresAt": past, "allowedApis": [it.api_id, 999], "allowedEndpoints": [999]},
        )
        assert told.wrong == ["body.expiresAt", "body.allowedApis[1]", "body.allowedEndpoints[0]"]
        assert await it.service.database.fetch_value("SELECT count(*) FROM api_keys") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", " "),
        ("name", "n" * 121),
        ("name", "a\0b"),
        ("description", "d" * 501),
        ("scopes", ["s"] * 21),
        ("scopes", []),
        ("allowedIps", ["127.0.0.1"] * 51),
        ("rateLimitPerMinute", 100_001),
        ("rateLimitPerMinute", "5"),
        ("allowedApis", [2**63]),
        ("allowedApis", ["1"]),
        ("vaultId", "mine"),
    ],
)
async def test_every_input_has_a_bound(database_url: str, field: str, value: object) -> None:
    async with key_shop(database_url) as it:
        told = await it.ada.ask("POST", "/api/keys", {"name": "n", field: value})
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")


async def test_a_key_may_only_narrow_its_plans_rate(database_url: str) -> None:
    async with key_shop(database_url) as it:
        told = await it.ada.ask("POST", "/api/keys", {"name": "fast", "rateLimitPerMinute": 11})
        assert told.wrong == ["body.rateLimitPerMinute"], "the free plan allows 10"
        made = await it.key(rateLimitPerMinute=10)
        told = await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"rateLimitPerMinute": 11})
        assert told.wrong == ["body.rateLimitPerMinute"]
        told = await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"rateLimitPerMinute": 1})
        assert told.body["rateLimitPerMinute"] == 1
        assert [await it.outcome(made.body["key"]) for _ in range(2)] == ["200", "TOO_MANY_REQUESTS"]


async def test_parallel_first_keys_share_one_vault(database_url: str) -> None:
    async with key_shop(database_url) as it:
        told: list[Told] = []

        async def make(number: int) -> None:
            told.append(await it.ada.ask("POST", "/api/keys", {"name": f"key {number}"}))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(make, number)
        assert [each.status for each in told] == [201] * 10
        assert len({each.body["apiKey"]["vaultId"] for each in told}) == 1
        assert len({each.body["key"] for each in told}) == 10


async def test_anybody_may_get_a_key_for_a_published_api_and_it_is_good_for_nothing_else(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        await it.service.api("other", upstream.url)
        made = await it.bob.ask("POST", f"/api/apis/{it.api_id}/keys", {"scopes": ["read"]})
        assert made.status == 201
        assert made.body["apiKey"]["allowedApis"] == [it.api_id]
        moved = await it.service.ledger.registry.ask(
            VaultId(made.body["apiKey"]["vaultId"]), Deposit(parse_usdc("1"), "first")
        )
        assert isinstance(moved, BalanceMoved)
        assert await it.outcome(made.body["key"]) == "200"
        assert await it.outcome(made.body["key"], "/v1/call/other/x") == "API_ACCESS_FORBIDDEN"
        for status in ("draft", "paused", "archived"):
            await apis.set_status(it.service.database, it.api_id, status, it.service.context.clock.now())
            told = await it.bob.ask("POST", f"/api/apis/{it.api_id}/keys", {})
            missing = await it.bob.ask("POST", "/api/apis/999999/keys", {})
            assert (told.status, told.code, told.body["message"]) == (404, "NOT_FOUND", missing.body["message"])


# --- seeing -----------------------------------------------------------------------------------------------------------


async def test_a_list_shows_the_newest_first_page_by_page_and_only_ones_own(database_url: str) -> None:
    async with key_shop(database_url) as it:
        await it.key(it.bob)
        made = [id_of(await it.key(name=f"key {number}")) for number in range(5)]
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query: dict[str, str | int] = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
            page = (await it.ada.ask("GET", "/api/keys", query=query)).body
            seen += (each["id"] for each in page["data"])
            cursor = page["meta"]["nextCursor"]
            assert page["meta"]["hasMore"] == (cursor is not None)
            if cursor is None:
                break
        assert seen == sorted(made, reverse=True)  # ids begin with their time


@pytest.mark.parametrize(
    "query",
    [{"cursor": "x"}, {"cursor": base64.b64encode(b'["no id"]').decode()}, {"limit": 0}, {"limit": 101}, {"page": 1}],
)
async def test_a_wrong_list_query_is_400(database_url: str, query: dict[str, Any]) -> None:
    async with key_shop(database_url) as it:
        told = await it.ada.ask("GET", "/api/keys", query=query)
        assert (told.status, told.wrong) == (400, [f"query.{next(iter(query))}"])


async def test_other_peoples_keys_answer_404_exactly_as_those_that_do_not_exist(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        asks: list[tuple[str, str, Any]] = [
            ("GET", "", None),
            ("PATCH", "", {"name": "stolen"}),
            ("DELETE", "", None),
            ("POST", "/revoke", None),
            ("POST", "/regenerate", {}),
            ("POST", "/tokens", {"ttl": 60}),
            ("GET", "/tokens", None),
            ("DELETE", f"/tokens/{NOBODYS}", None),
        ]
        for method, below, body in asks:
            foreign = await it.bob.ask(method, f"/api/keys/{id_of(made)}{below}", body)
            missing = await it.bob.ask(method, f"/api-keys/{NOBODYS}{below}", body)
            assert (foreign.status, foreign.code) == (404, "API_KEY_NOT_FOUND"), (method, below)
            assert {**foreign.body, "requestId": 0} == {**missing.body, "requestId": 0}
        vault_id = made.body["apiKey"]["vaultId"]
        told = await it.bob.ask("POST", "/api/keys", {"name": "n", "vaultId": vault_id})
        missing = await it.bob.ask("POST", "/api/keys", {"name": "n", "vaultId": NOBODYS})
        assert (told.status, told.code, told.body["message"]) == (404, "VAULT_NOT_FOUND", missing.body["message"])
        assert await it.outcome(made.body["key"]) == "200", "nothing came of any of it"


async def test_who_is_nobody_gets_401_and_a_key_is_no_login(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        stranger = it.stranger
        assert (await stranger.ask("GET", "/api/keys")).status == 401
        for headers in ({"X-Api-Key": made.body["key"]}, {"Authorization": f"Bearer {made.body['key']}"}):
            assert (await stranger.ask("GET", "/api/keys", headers=headers)).status == 401


# --- changing ---------------------------------------------------------------------------------------------------------


async def test_a_patch_changes_what_it_names_and_null_takes_a_narrowing_away(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api/keys/{id_of(made)}"
        endpoint = await it.service.database.fetch_value("SELECT endpoint_id FROM api_endpoints")
        changes = {
            "name": "other",
            "description": "text",
            "scopes": ["read", "write"],
            "allowedApis": [it.api_id],
            "allowedEndpoints": [endpoint],
            "allowedIps": ["127.0.0.1", "2001:db8::/32"],
            "rateLimitPerMinute": 7,
            "expiresAt": "2130-01-01T01:00:00+01:00",
            "active": False,
        }
        told = await it.ada.ask("PATCH", path, changes)
        assert told.status == 200
        assert told.body == {
            **made.body["apiKey"],
            **changes,
            "expiresAt": "2130-01-01T00:00:00.000Z",
        }
        nullable = ("description", "allowedApis", "allowedEndpoints", "allowedIps", "rateLimitPerMinute", "expiresAt")
        told = await it.ada.ask("PATCH", path, dict.fromkeys(nullable))
        assert [told.body[name] for name in nullable] == [None] * 6
        assert (told.body["name"], told.body["scopes"], told.body["active"]) == ("other", ["read", "write"], False)


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, "body"),
        ({"tier": "pro"}, "body.tier"),
        ({"rateLimit": 5}, "body.rateLimit"),
        ({"monthlyCredits": 5}, "body.monthlyCredits"),
        ({"network": "mainnet"}, "body.network"),
        ({"key": "ck_live_"}, "body.key"),
        ({"name": None}, "body.name"),
        ({"scopes": None}, "body.scopes"),
        ({"active": None}, "body.active"),
        ({"active": "yes"}, "body.active"),
        ({"expiresAt": "2001-01-01"}, "body.expiresAt"),
        ({"allowedIps": []}, "body.allowedIps"),
    ],
)
async def test_a_patch_takes_nothing_else(database_url: str, body: dict[str, Any], wrong: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        told = await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", body)
        assert (told.status, told.wrong) == (400, [wrong])
        assert (await it.ada.ask("GET", f"/api/keys/{id_of(made)}")).body == made.body["apiKey"]


async def test_a_disabled_key_is_refused_on_the_very_next_call_and_works_again_when_enabled(database_url: str) -> None:
    async with key_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        made = await it.key()
        for active, expected in ((True, "200"), (False, "API_KEY_DISABLED"), (True, "200")):
            assert (await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"active": active})).status == 200
            assert await it.outcome(made.body["key"]) == expected


async def test_a_deleted_key_is_refused_on_the_very_next_call_stays_listed_and_stays_dead(database_url: str) -> None:
    async with key_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        made = await it.key()
        path = f"/api/keys/{id_of(made)}"
        assert await it.outcome(made.body["key"]) == "200"
        for _ in range(2):
            assert (await it.ada.ask("DELETE", path)).status == 204
            assert await it.outcome(made.body["key"]) == "API_KEY_REVOKED"
        shown = (await it.ada.ask("GET", path)).body
        assert (shown["revoked"], shown["active"]) == (True, False)
        told = await it.ada.ask("POST", f"{path}/revoke")
        assert (told.status, told.body) == (200, shown), "its first date stays"
        for method, below, body in (("PATCH", "", {"active": True}), ("POST", "/regenerate", {})):
            assert (await it.ada.ask(method, path + below, body)).code == "CONFLICT"
        assert await it.outcome(made.body["key"]) == "API_KEY_REVOKED"
        assert await it.service.database.fetch_value("SELECT count(*) FROM usage_events") == 1, "usage outlives its key"


async def test_a_key_is_good_for_its_addresses_alone(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(allowedIps=["10.0.0.0/8"])
        assert await it.outcome(made.body["key"]) == "IP_NOT_ALLOWED"
        await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"allowedIps": ["10.0.0.0/8", "127.0.0.0/8"]})
        assert await it.outcome(made.body["key"]) == "200"


async def test_an_expired_key_is_401(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        soon = (datetime.now(UTC) + timedelta(milliseconds=300)).isoformat()
        await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"expiresAt": soon})
        with watchdog("the key's expiry"):
            while await it.outcome(made.body["key"]) != "API_KEY_EXPIRED":
                pass


async def test_a_key_keeps_an_api_that_was_withdrawn_and_takes_no_new_one_of_that_kind(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        other = await it.service.api("other", upstream.url)
        made = await it.key(allowedApis=[it.api_id])
        path = f"/api/keys/{id_of(made)}"
        for api_id in (it.api_id, other):
            await apis.set_status(it.service.database, api_id, "paused", it.service.context.clock.now())
        assert (await it.ada.ask("PATCH", path, {"allowedApis": [it.api_id]})).status == 200
        assert (await it.ada.ask("PATCH", path, {"allowedApis": [it.api_id, other]})).wrong == ["body.allowedApis[1]"]


async def test_a14_a_key_can_be_narrowed_to_an_endpoint(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        priced = [PricedEndpoint("GET", path, parse_usdc("0.01")) for path in ("/a", "/b")]
        await it.service.api("two", upstream.url, priced)
        endpoint = await it.service.database.fetch_value("SELECT endpoint_id FROM api_endpoints WHERE path = '/a'")
        made = await it.key(allowedEndpoints=[endpoint])
        assert await it.outcome(made.body["key"], "/v1/call/two/a") == "200"
        assert await it.outcome(made.body["key"], "/v1/call/two/b") == "ENDPOINT_FORBIDDEN"
