"""Plans through HTTP, by the numbers of the statements that they answer: A03, A04, A07, A36, W-A2, W-A3, W-A18."""

from datetime import timedelta
from typing import Any

import trio

from callora.ledger.ids import ApiKeyId, VaultId
from tests.support.client import call
from tests.support.keys import NOBODYS, KeyShop, id_of, key_shop
from tests.support.quotas import burn, give
from tests.support.rest import SERVICE_TOKEN, Told, admin, biller
from tests.support.upstream import raw_upstream, respond

BASIC: dict[str, Any] = {
    "name": "Basic",
    "priceUsdc": "5",
    "monthlyCredits": 500,
    "overage": "charge",
    "rateLimitPerMinute": 60,
    "features": ["mail_support"],
    "apis": None,
}


async def put(it: KeyShop, plan_id: str = "basic", /, **changed: object) -> Told:
    """Make or replace a plan."""
    return await admin(it.ada.client).ask("PUT", f"/api/admin/plans/{plan_id}", {**BASIC, **changed})


async def set_plan(it: KeyShop, vault_id: str, plan_id: str) -> Told:
    """Put a vault on a plan, as an operator."""
    return await admin(it.ada.client).ask("PUT", f"/api/admin/vaults/{vault_id}/plan", {"planId": plan_id})


async def vault_of(it: KeyShop) -> str:
    """Open a vault of Ada's."""
    return str((await it.ada.ask("POST", "/api/vault", {"network": "testnet"})).body["vaultId"])


async def grant(it: KeyShop, vault_id: str, **fields: object) -> Told:
    """Give a vault credits, as an operator."""
    ends = it.service.context.clock.now() + timedelta(days=30)
    body = {"credits": 150, "expiresAt": ends.isoformat(), "source": "promo", "ref": "welcome", **fields}
    return await admin(it.ada.client).ask("POST", f"/api/admin/vaults/{vault_id}/credits", body)


async def quota(it: KeyShop) -> Any:
    """Return the quota of Ada's only vault."""
    told = await it.ada.ask("GET", "/api/quotas")
    assert told.status == 200
    return told.body["data"][0]


async def test_a03_plans_are_data_with_their_rates_credits_prices_and_features(database_url: str) -> None:
    async with key_shop(database_url) as it:
        told = await it.stranger.ask("GET", "/api/plans")
        assert told.status == 200
        shown = [
            (each["id"], each["rateLimitPerMinute"], each["monthlyCredits"], each["priceUsdc"], each["features"])
            for each in told.body["data"]
        ]
        assert shown == [
            ("free", 10, 100, "0.0000000", []),
            ("pro", 100, 5000, "19.0000000", ["priority_support"]),
            ("enterprise", 1000, 50000, "99.0000000", ["priority_support", "sla", "dedicated_support"]),
        ]
        assert [(each["overage"], each["apis"]) for each in told.body["data"]] == [("deny", None)] * 3
        assert "active" not in told.body["data"][0]
        again = await it.stranger.ask("GET", "/api/plans", headers={"If-None-Match": told.headers["etag"]})
        assert again.status == 304

        first = await it.stranger.ask("GET", "/api/plans", query={"limit": 2})
        cursor = first.body["meta"]["nextCursor"]
        rest = await it.stranger.ask("GET", "/api/plans", query={"limit": 2, "cursor": cursor})
        assert [each["id"] for each in first.body["data"] + rest.body["data"]] == ["free", "pro", "enterprise"]


async def test_an_operator_makes_replaces_and_withdraws_plans(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await put(it, apis=["echo", "echo"])
        assert (made.status, made.body["apis"], made.body["active"]) == (201, ["echo"], True)
        replaced = await put(it, priceUsdc="6.5", overage="deny")
        assert (replaced.status, replaced.body["priceUsdc"], replaced.body["apis"]) == (200, "6.5000000", None)
        assert (await put(it, active=False)).status == 200
        assert "basic" not in [each["id"] for each in (await it.stranger.ask("GET", "/api/plans")).body["data"]]
        everything = await admin(it.ada.client).ask("GET", "/api/admin/plans")
        assert {each["id"]: each["active"] for each in everything.body["data"]}["basic"] is False
        told = await put(it, "free", active=False)
        assert (told.status, told.code) == (409, "CONFLICT"), "new vaults are put on it"
        assert (await set_plan(it, await vault_of(it), "basic")).code == "PLAN_NOT_FOUND"

        audit = await admin(it.ada.client).ask("GET", "/api/admin/audit", query={"action": "set_plan"})
        assert [each["target"] for each in audit.body["data"]].count("basic") == 3
        assert '"priceUsdc":"6.5"' in audit.body["data"][2]["details"]["plan"]


async def test_a_plan_has_bounds(database_url: str) -> None:
    async with key_shop(database_url) as it:
        wrong: list[tuple[str, object]] = [
            ("name", ""),
            ("priceUsdc", "-1"),
            ("priceUsdc", "1000001"),
            ("priceUsdc", 5),
            ("monthlyCredits", -1),
            ("monthlyCredits", 10**12 + 1),
            ("overage", "forgive"),
            ("rateLimitPerMinute", 0),
            ("rateLimitPerMinute", 100_001),
            ("features", ["x"] * 51),
            ("features", ["Not One"]),
            ("apis", []),
            ("apis", ["nothing-like-it"]),
            ("tier", "pro"),
        ]
        for field, value in wrong:
            told = await put(it, **{field: value})
            assert (told.status, told.code) == (400, "VALIDATION_ERROR"), field
            assert all(each.startswith(f"body.{field}") for each in told.wrong)
        assert (await put(it, "No")).wrong == ["path.planId"]


async def test_a04_a07_a_key_names_no_tier_rate_or_credits_of_a_plan(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for field, value in (("tier", "pro"), ("rateLimit", 100), ("monthlyCredits", 5000), ("planId", "pro")):
            told = await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {field: value})
            assert (told.status, told.wrong) == (400, [f"body.{field}"])
            told = await it.ada.ask("POST", "/api/keys", {"name": "n", field: value})
            assert (told.status, told.wrong) == (400, [f"body.{field}"])


async def test_a_keys_cap_narrows_its_vaults_quota_and_can_be_taken_away(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(monthlyCreditCap=3)
        path = f"/api/keys/{id_of(made)}"
        assert made.body["apiKey"]["monthlyCreditCap"] == 3
        vault_id, key_id = VaultId(made.body["apiKey"]["vaultId"]), ApiKeyId(id_of(made))

        async def pay() -> str:
            return await burn(it.service, vault_id, 2, key_id)

        assert [await pay(), await pay()] == ["paid", "QUOTA_EXHAUSTED"]
        assert (await it.ada.ask("PATCH", path, {"monthlyCreditCap": 4})).body["monthlyCreditCap"] == 4
        assert [await pay(), await pay()] == ["paid", "QUOTA_EXHAUSTED"]
        assert (await it.ada.ask("PATCH", path, {"name": "renamed"})).body["monthlyCreditCap"] == 4
        assert (await it.ada.ask("PATCH", path, {"monthlyCreditCap": None})).body["monthlyCreditCap"] is None
        assert await pay() == "paid"
        assert (await it.ada.ask("PATCH", path, {"monthlyCreditCap": 0})).status == 200
        assert await pay() == "QUOTA_EXHAUSTED"
        for wrong in (-1, 10**12 + 1, "5", 1.5):
            assert (await it.ada.ask("PATCH", path, {"monthlyCreditCap": wrong})).wrong == ["body.monthlyCreditCap"]
        assert (await quota(it))["credits"] == {"granted": 100, "used": 6, "remaining": 94}, (
            "the vault's, not the key's"
        )
        narrow = await it.ada.ask("POST", f"/api/apis/{it.api_id}/keys", {"monthlyCreditCap": 7})
        assert narrow.body["apiKey"]["monthlyCreditCap"] == 7


async def test_wa2_an_operator_sets_a_vaults_plan_and_nobody_else_does(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        vault_id = made.body["apiKey"]["vaultId"]
        for someone in (it.ada, it.bob, it.stranger):
            told = await someone.ask("PUT", f"/api/admin/vaults/{vault_id}/plan", {"planId": "enterprise"})
            assert told.status in (401, 403)
        assert (await it.ada.ask("POST", "/api/vault", {"network": "mainnet", "plan": "pro"})).status == 400
        assert (await quota(it))["plan"] == "free"

        told = await set_plan(it, vault_id, "pro")
        assert (told.status, told.body) == (200, {"vaultId": vault_id, "planId": "pro"})
        assert (await quota(it))["credits"] == {"granted": 5000, "used": 0, "remaining": 5000}
        assert (await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"rateLimitPerMinute": 100})).status == 200
        assert (await set_plan(it, vault_id, "nothing")).code == "PLAN_NOT_FOUND"
        assert (await set_plan(it, NOBODYS, "pro")).code == "VAULT_NOT_FOUND"
        audit = await admin(it.ada.client).ask("GET", "/api/admin/audit", query={"action": "set_vault_plan"})
        assert [each["status"] for each in audit.body["data"]] == [404, 404, 200, 401, 403, 403]
        assert audit.body["data"][2]["details"] == {"vaultId": vault_id, "planId": "pro"}


async def test_wa2_a_key_never_reaches_an_api_outside_its_plan(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        inside = await it.service.api("inside", upstream.url)
        endpoint = await it.service.database.fetch_value(
            "SELECT endpoint_id FROM api_endpoints WHERE api_id = $1", it.api_id
        )
        made = await it.key(allowedApis=[it.api_id])
        secret, vault_id = made.body["key"], made.body["apiKey"]["vaultId"]
        wide = await it.key()
        assert (await put(it, apis=["inside"])).status == 201
        assert [await it.outcome(secret), await it.outcome(wide.body["key"])] == ["200", "200"]

        assert (await set_plan(it, vault_id, "basic")).status == 200
        response = await call(it.service.port, "GET", "/v1/call/echo/x", [("X-Api-Key", secret)])
        assert (response.status, response.json()["code"]) == (403, "PLAN_ENDPOINT_NOT_ALLOWED")
        assert response.json()["details"] == {"apis": [it.api_id]}
        assert await it.outcome(wide.body["key"]) == "PLAN_ENDPOINT_NOT_ALLOWED"
        assert await it.outcome(wide.body["key"], "/v1/call/inside/x") == "200"
        token = await it.ada.ask("POST", f"/api/keys/{id_of(wide)}/tokens", {"ttl": 60})
        refused = await call(
            it.service.port, "GET", "/v1/call/echo/x", [("Authorization", f"Bearer {token.body['token']}")]
        )
        assert refused.json()["code"] == "PLAN_ENDPOINT_NOT_ALLOWED"

        for fields in ({"allowedApis": [inside, it.api_id]}, {"allowedEndpoints": [endpoint]}):
            told = await it.ada.ask("POST", "/api/keys", {"name": "n", **fields})
            assert (told.status, told.code, told.body["details"]) == (
                403,
                "PLAN_ENDPOINT_NOT_ALLOWED",
                {"apis": [it.api_id]},
            )
            told = await it.ada.ask("PATCH", f"/api/keys/{id_of(wide)}", fields)
            assert told.code == "PLAN_ENDPOINT_NOT_ALLOWED"
        assert (await it.ada.ask("POST", f"/api/apis/{it.api_id}/keys", {})).code == "PLAN_ENDPOINT_NOT_ALLOWED"
        assert (await it.ada.ask("POST", "/api/keys", {"name": "n", "allowedApis": [inside]})).status == 201
        kept = await it.ada.ask("PATCH", f"/api/keys/{id_of(made)}", {"allowedApis": [it.api_id, inside]})
        assert kept.status == 200, "what the key had before the plan changed is not what is asked for now"

        assert (await put(it, apis=["inside", "echo"])).status == 200
        assert await it.outcome(secret) == "200", "a changed plan reaches the keys that are kept in memory"


async def test_wa2_no_charge_outside_the_proxy_is_made_with_a_key_for_an_api_outside_its_plan(
    database_url: str,
) -> None:
    async with key_shop(database_url, INTERNAL_SERVICE_TOKEN=SERVICE_TOKEN) as it:
        made = await it.key()
        assert (await put(it, apis=["echo"])).status == 201
        assert (await set_plan(it, made.body["apiKey"]["vaultId"], "basic")).status == 200
        endpoint = await it.service.database.fetch_value("SELECT endpoint_id FROM api_endpoints")
        body = {"apiId": it.api_id, "endpointId": endpoint, "apiKeyId": id_of(made), "amountUsdc": "0.01"}
        service = biller(it.ada.client)

        async def outcomes(name: str) -> list[str]:
            held = await service.ask("POST", "/api/billing/holds", {**body, "requestId": f"hold-{name}"})
            charged = await it.ada.ask("POST", "/api/billing/deduct", {**body, "requestId": f"deduct-{name}"})
            checked = await service.ask("POST", "/api/billing/keys/check", {"key": made.body["key"]})
            return [
                *("passed" if each.status < 300 else each.code for each in (held, charged)),
                str(checked.body["apiKey"]["allowedApis"]),
            ]

        assert await outcomes("inside") == ["passed", "passed", f"[{it.api_id}]"]
        await it.service.api("another", "http://127.0.0.1:1")
        assert (await put(it, apis=["another"])).status == 200
        refused = "PLAN_ENDPOINT_NOT_ALLOWED"
        assert (await outcomes("outside"))[:2] == [refused, refused]


async def test_wa3_a_vaults_keys_share_its_quota_and_a_new_key_brings_none(database_url: str) -> None:
    async with key_shop(database_url) as it:
        keys = [await it.key() for _ in range(3)]
        vault_id = VaultId(keys[0].body["apiKey"]["vaultId"])
        ids = [ApiKeyId(id_of(each)) for each in keys]
        assert [await burn(it.service, vault_id, 40, each) for each in ids] == ["paid", "paid", "QUOTA_EXHAUSTED"]
        await it.ada.ask("DELETE", f"/api/keys/{ids[0]}")
        again = ApiKeyId(id_of(await it.key()))
        assert await burn(it.service, vault_id, 40, again) == "QUOTA_EXHAUSTED"
        shown = await quota(it)
        assert (shown["credits"], shown["percentUsed"]) == ({"granted": 100, "used": 80, "remaining": 20}, 80)


async def test_a_quota_is_seen_before_its_first_call_and_looking_gives_nothing(database_url: str) -> None:
    async with key_shop(database_url) as it:
        vault_id = VaultId(await vault_of(it))
        for _ in range(2):
            shown = await quota(it)
            assert (shown["plan"], shown["overage"], shown["network"]) == ("free", "deny", "testnet")
            assert shown["credits"] == {"granted": 100, "used": 0, "remaining": 100}
            assert shown["percentUsed"] == 0
            assert shown["period"]["start"].endswith("-01T00:00:00.000Z")
            assert [(each["id"], each["expiresAt"]) for each in shown["grants"]] == [(None, shown["period"]["end"])]
        assert not await it.service.database.fetch_value("SELECT count(*) FROM quota_grants")
        await burn(it.service, vault_id, 30)
        await give(it.service, vault_id, 50, "later")
        shown = await quota(it)
        assert shown["credits"] == {"granted": 150, "used": 30, "remaining": 120}
        assert [(each["source"], each["remaining"]) for each in shown["grants"]] == [("plan", 70), ("promo", 50)]
        assert shown["percentUsed"] == 20
        await set_plan(it, vault_id, "pro")
        shown = await quota(it)
        assert shown["credits"] == {"granted": 5020, "used": 0, "remaining": 5020}, "what was burnt counts this month"
        await burn(it.service, vault_id, 1)
        shown = await quota(it)
        assert shown["credits"] == {"granted": 5020, "used": 1, "remaining": 5019}
        assert all(each["id"] for each in shown["grants"])
        assert (await it.bob.ask("GET", "/api/quotas")).body["data"] == []


async def test_a36_wa18_credits_are_granted_once_for_a_ref_and_to_this_vault_alone(database_url: str) -> None:
    async with key_shop(database_url) as it:
        vault_id = await vault_of(it)
        ends = (it.service.context.clock.now() + timedelta(days=30)).isoformat()
        told: list[Told] = []

        async def one() -> None:
            told.append(await grant(it, vault_id, expiresAt=ends))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert sorted(each.status for each in told) == [200] * 7 + [201]
        assert {each.body["creditsRemaining"] for each in told} == {250}
        assert [each.body["alreadyGranted"] for each in told if each.status == 201] == [False]
        for changed in ({"credits": 151}, {"expiresAt": "2099-01-01"}):
            refused = await grant(it, vault_id, **{"expiresAt": ends, **changed})
            assert (refused.status, refused.code) in (
                (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH"),
                (400, "VALIDATION_ERROR"),
            )
        assert (await grant(it, vault_id, expiresAt=ends, credits=151)).code == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
        assert (await grant(it, vault_id, expiresAt=ends, source="allocation")).status == 201, "a source has its own"
        bobs = (await it.bob.ask("POST", "/api/vault", {"network": "testnet"})).body["vaultId"]
        assert (await grant(it, bobs, expiresAt=ends)).body["alreadyGranted"] is False, "a vault has its own"
        assert (await grant(it, NOBODYS)).code == "VAULT_NOT_FOUND"
        assert (await quota(it))["credits"]["granted"] == 400
        assert (await it.ada.ask("POST", f"/api/admin/vaults/{vault_id}/credits", {})).status == 403


async def test_a_grant_has_bounds(database_url: str) -> None:
    async with key_shop(database_url) as it:
        wrong: list[tuple[str, object]] = [
            ("credits", 0),
            ("credits", 10**12 + 1),
            ("credits", "5"),
            ("expiresAt", "2020-01-01"),
            ("expiresAt", "2090-01-01"),
            ("expiresAt", "soon"),
            ("source", "purchase"),
            ("ref", ""),
            ("ref", "x" * 129),
        ]
        vault_id = await vault_of(it)
        for field, value in wrong:
            assert (await grant(it, vault_id, **{field: value})).wrong == [f"body.{field}"]
