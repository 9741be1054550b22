"""Access tokens: signed, never wider than their key, dead when it is."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
import trio

from callora.actors.catalogue import STALE_SECONDS
from callora.http.rest.identity import TokenSettings, mint_access_token
from callora.ledger.ids import ApiId
from callora.service import SystemClock
from callora.store.tokens import drop_expired_tokens
from tests.support.client import call, watchdog
from tests.support.keys import (
    NOBODYS,
    PATH,
    PRICE,
    SECRET,
    TOKEN_SETTINGS,
    TokenShop,
    bearer,
    code,
    person_of,
    token_shop,
)
from tests.support.rest import anonymous, rest_client
from tests.support.service import running_service
from tests.support.upstream import raw_upstream, respond

# --- what a token is --------------------------------------------------------------------------------------------------


async def test_a_token_makes_calls_that_its_key_pays_for(database_url: str) -> None:
    async with token_shop(database_url) as it:
        made = await it.mint(ttl=3600)
        response = await call(it.service.port, "GET", PATH, bearer(made.body["token"]))
        assert (response.status, response.header("X-Callora-Charge")) == (200, "0.0100000")
        row = await it.service.database.fetch_row("SELECT api_key_id::text, amount FROM usage_events")
        assert row is not None
        assert (row["api_key_id"], row["amount"]) == (it.consumer.api_key_id, PRICE)
        left = datetime.fromisoformat(made.body["expiresAt"]) - datetime.now(UTC)
        assert timedelta(seconds=3590) < left <= timedelta(seconds=3600)


async def test_a_token_is_taken_as_bearer_alone_and_never_reaches_the_upstream(database_url: str) -> None:
    async with (
        running_service(database_url, TOKEN_SETTINGS) as service,
        rest_client(service) as client,
        raw_upstream(respond()) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        it = TokenShop(service, anonymous(client), consumer, person_of(anonymous(client), consumer), ApiId(1))
        token = await it.token()
        assert code(await call(service.port, "GET", PATH, [("X-Api-Key", token)])) == "UNAUTHORIZED"
        assert await it.outcome(token) == "200"
        assert token.encode() not in upstream.requests[0].raw_head


async def test_a_token_is_no_login_and_a_login_is_no_token(database_url: str) -> None:
    async with token_shop(database_url) as it:
        headers = {"Authorization": f"Bearer {await it.token()}"}
        for path in ("/api/keys", it.path, f"{it.path}/tokens", "/api/vaults", "/api/admin/keys"):
            told = await it.stranger.ask("GET", path, headers=headers)
            assert (told.status, told.code) == (401, "INVALID_TOKEN")
        settings = TokenSettings(it.service.context.settings.jwt_secret, None, None)  # type: ignore[arg-type]
        login = mint_access_token(settings, SystemClock(), it.consumer.user_id, NOBODYS, None)
        assert await it.outcome(login) == "INVALID_TOKEN"


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, "body.ttl"),
        ({"ttl": 0}, "body.ttl"),
        ({"ttl": 3601}, "body.ttl"),
        ({"ttl": "60"}, "body.ttl"),
        ({"ttl": 60.5}, "body.ttl"),
        ({"ttl": 60, "budget_usdc": "0"}, "body.budget_usdc"),
        ({"ttl": 60, "budget_usdc": "-1"}, "body.budget_usdc"),
        ({"ttl": 60, "budget_usdc": 1}, "body.budget_usdc"),
        ({"ttl": 60, "budget_usdc": "0.00000001"}, "body.budget_usdc"),
        ({"ttl": 60, "scopes": []}, "body.scopes"),
        ({"ttl": 60, "apis": []}, "body.apis"),
        ({"ttl": 60, "userId": NOBODYS}, "body.userId"),
    ],
)
async def test_a_token_has_bounds(database_url: str, body: dict[str, Any], wrong: str) -> None:
    async with token_shop(database_url) as it:
        told = await it.owner.ask("POST", f"{it.path}/tokens", body)
        assert (told.status, told.wrong) == (400, [wrong])


async def test_a_token_outlives_neither_its_time_nor_its_key(database_url: str) -> None:
    async with token_shop(database_url) as it:
        token = await it.token(ttl=1)
        with watchdog("the token's expiry"):
            while (outcome := await it.outcome(token)) == "200":  # noqa: ASYNC110 - the wall clock decides
                await trio.sleep(0.05)
        assert outcome == "TOKEN_EXPIRED"
        soon = datetime.now(UTC) + timedelta(seconds=30)
        await it.owner.ask("PATCH", it.path, {"expiresAt": soon.isoformat()})
        made = await it.mint(ttl=3600)
        assert datetime.fromisoformat(made.body["expiresAt"]) <= soon


@pytest.mark.parametrize(
    "forge",
    [
        lambda claims: jwt.encode(claims, "another secret of forty bytes and more!!", "HS256"),
        lambda claims: jwt.encode(claims, SECRET, "HS512"),
        lambda claims: jwt.encode(claims, "", "none"),
        lambda claims: jwt.encode({**claims, "type": "access"}, SECRET, "HS256"),
        lambda claims: jwt.encode({**claims, "type": "refresh"}, SECRET, "HS256"),
        lambda claims: jwt.encode({**claims, "tid": NOBODYS}, SECRET, "HS256"),
        lambda claims: jwt.encode({**claims, "tid": "'; --"}, SECRET, "HS256"),
        lambda claims: jwt.encode({**claims, "tid": 7}, SECRET, "HS256"),
        lambda claims: jwt.encode({key: claims[key] for key in ("type", "tid", "kid")}, SECRET, "HS256"),
    ],
)
async def test_what_we_have_not_signed_is_refused(database_url: str, forge: Any) -> None:
    async with token_shop(database_url) as it:
        claims = jwt.decode(await it.token(), options={"verify_signature": False})
        response = await call(it.service.port, "GET", PATH, bearer(forge(claims)))
        assert (response.status, code(response)) == (401, "INVALID_TOKEN")


async def test_a_token_of_which_one_character_is_changed_is_refused(database_url: str) -> None:
    async with token_shop(database_url) as it:
        token = await it.token()
        head, body, signature = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(body + "=="))
        other = base64.urlsafe_b64encode(json.dumps({**claims, "exp": claims["exp"] + 999}).encode()).decode()
        for forged in (f"{head}.{other.rstrip('=')}.{signature}", f"{head}.{body}.{'A' * 43}", f"{head}.{body}."):
            assert await it.outcome(forged) == "INVALID_TOKEN"
        assert await it.outcome(token) == "200"


async def test_without_a_signing_secret_there_are_no_tokens(database_url: str) -> None:
    async with token_shop(database_url) as with_secret:
        token = await with_secret.token()
    async with running_service(database_url) as service, rest_client(service) as client:
        consumer = await service.consumer("1")
        told = await person_of(anonymous(client), consumer).ask(
            "POST", f"/api/keys/{consumer.api_key_id}/tokens", {"ttl": 60}
        )
        assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED")
        assert code(await call(service.port, "GET", PATH, bearer(token))) == "INVALID_TOKEN"


async def test_tokens_name_the_issuer_and_audience_that_are_configured(database_url: str) -> None:
    async with token_shop(database_url, JWT_ISSUER="callora", JWT_AUDIENCE="calls") as it:
        token = await it.token()
        assert await it.outcome(token) == "200"
        claims = jwt.decode(token, options={"verify_signature": False})
        for name in ("iss", "aud"):
            assert await it.outcome(jwt.encode({**claims, name: "another"}, SECRET, "HS256")) == "INVALID_TOKEN"


# --- never wider than its key -----------------------------------------------------------------------------------------


async def require(it: TokenShop, scope: str) -> None:
    """Let the endpoint ask for a scope, and the gateway see it."""
    await it.service.database.execute("UPDATE api_endpoints SET required_scope = $1", scope)
    with watchdog("the scope to be asked for"):
        other = await it.token(scopes=["none-of-these"])
        while await it.outcome(other) != "SCOPE_REQUIRED":
            pass


async def test_a_token_has_no_more_scopes_than_it_was_made_with(database_url: str) -> None:
    async with token_shop(database_url) as it:
        await require(it, "read")
        outcomes = [await it.outcome(await it.token(scopes=scopes)) for scopes in (["write"], ["read"], ["*"])]
        assert outcomes == ["SCOPE_REQUIRED", "200", "200"]


async def test_a_token_is_good_for_no_more_apis_than_it_was_made_with(database_url: str) -> None:
    async with token_shop(database_url) as it, raw_upstream(respond()) as upstream:
        other = await it.service.api("other", upstream.url)
        token = await it.token(apis=[other])
        assert await it.outcome(token) == "API_ACCESS_FORBIDDEN"
        assert await it.outcome(token, "/v1/call/other/x") == "200"


async def test_a_token_cannot_be_made_wider_than_its_key(database_url: str) -> None:
    async with token_shop(database_url) as it:
        await it.owner.ask("PATCH", it.path, {"scopes": ["read", "write"], "allowedApis": [it.api_id]})
        told = await it.owner.ask(
            "POST", f"{it.path}/tokens", {"ttl": 60, "scopes": ["read", "admin"], "apis": [it.api_id, 999]}
        )
        assert told.wrong == ["body.scopes[1]", "body.apis[1]"]
        assert (await it.mint(scopes=["*"], apis=[it.api_id])).status == 201, "all that the key has"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"scopes": ["write"]}, "SCOPE_REQUIRED"),
        ({"allowedApis": "other"}, "API_ACCESS_FORBIDDEN"),
        ({"allowedIps": ["10.0.0.0/8"]}, "IP_NOT_ALLOWED"),
        ({"active": False}, "API_KEY_DISABLED"),
    ],
)
@pytest.mark.parametrize("wide", [True, False])
async def test_a_key_that_is_narrowed_later_narrows_its_tokens_on_the_next_call(
    database_url: str, change: dict[str, Any], refusal: str, wide: bool
) -> None:
    async with token_shop(database_url, CATALOGUE_REFRESH_MS="300") as it, raw_upstream(respond()) as upstream:
        other = await it.service.api("other", upstream.url)
        await require(it, "read")
        token = await it.token() if wide else await it.token(scopes=["read"], apis=[it.api_id])
        assert await it.outcome(token) == "200"
        if change.get("allowedApis") == "other":
            change = {"allowedApis": [other]}
        assert (await it.owner.ask("PATCH", it.path, change)).status == 200
        assert await it.outcome(token) == refusal
        back = {"scopes": ["*"], "allowedApis": None, "allowedIps": None, "active": True}
        await it.owner.ask("PATCH", it.path, back)
        assert await it.outcome(token) == "200"


# --- dead when its key is ---------------------------------------------------------------------------------------------


async def test_a_token_dies_with_its_key_on_the_next_call(database_url: str) -> None:
    async with token_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        token = await it.token()
        assert await it.outcome(token) == "200"
        await it.owner.ask("DELETE", it.path)
        response = await call(it.service.port, "GET", PATH, bearer(token))
        assert (response.status, code(response)) == (403, "API_KEY_REVOKED")
        for body in ({"ttl": 60}, {"ttl": 60, "scopes": ["*"]}):
            assert (await it.owner.ask("POST", f"{it.path}/tokens", body)).code == "CONFLICT"


async def test_under_a_disabled_or_expired_key_no_token_is_made(database_url: str) -> None:
    async with token_shop(database_url) as it:
        await it.owner.ask("PATCH", it.path, {"active": False})
        assert (await it.owner.ask("POST", f"{it.path}/tokens", {"ttl": 60})).code == "CONFLICT"
        await it.owner.ask("PATCH", it.path, {"active": True})
        await it.service.database.execute("UPDATE api_keys SET expires_at = now()")
        assert (await it.owner.ask("POST", f"{it.path}/tokens", {"ttl": 60})).code == "CONFLICT"


async def test_a_token_dies_with_the_secret_it_was_made_under(database_url: str) -> None:
    async with token_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        token = await it.token()
        assert await it.outcome(token) == "200"
        await it.owner.ask("POST", f"{it.path}/regenerate", {})
        assert await it.outcome(token) == "TOKEN_EXPIRED"
        token = await it.token()
        told = await it.owner.ask("POST", f"{it.path}/regenerate", {"graceSeconds": 20})
        assert await it.outcome(token) == "200", "within the grace"
        (listed, *_) = (await it.owner.ask("GET", f"{it.path}/tokens")).body["data"]
        assert listed["expiresAt"] == told.body["apiKey"]["formerSecretUntil"]


async def test_a_revoked_token_is_refused_on_the_next_call_and_others_are_not(database_url: str) -> None:
    async with token_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        revoked, other = await it.mint(), await it.token()
        token = revoked.body["token"]
        assert [await it.outcome(each) for each in (token, other)] == ["200", "200"]
        for _ in range(2):
            assert (await it.owner.ask("DELETE", f"{it.path}/tokens/{revoked.body['tokenId']}")).status == 204
            assert await it.outcome(token) == "REVOKED_TOKEN"
        assert await it.outcome(other) == "200"
        assert await it.outcome(it.consumer.api_key) == "200"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("UPDATE access_tokens SET revoked_at = now()", "REVOKED_TOKEN"),
        ("UPDATE api_keys SET revoked_at = now()", "API_KEY_REVOKED"),
        ("UPDATE api_keys SET scopes = '{write}'", "SCOPE_REQUIRED"),
        ("UPDATE vaults SET standing = 'suspended'", "VAULT_SUSPENDED"),
    ],
)
async def test_what_another_process_takes_away_is_refused_within_a_second(
    database_url: str, change: str, refusal: str
) -> None:
    async with token_shop(database_url) as it:
        await require(it, "read")
        token = await it.token()
        assert await it.outcome(token) == "200"
        await it.service.database.execute(change)
        changed_at = last_at = trio.current_time()
        with watchdog("the change to be seen"):
            while (outcome := await it.outcome(token)) == "200":
                last_at = trio.current_time()
        assert last_at - changed_at < STALE_SECONDS
        assert outcome == refusal


# --- seeing and forgetting --------------------------------------------------------------------------------------------


async def test_a_keys_tokens_are_listed_without_what_is_presented(database_url: str) -> None:
    async with token_shop(database_url) as it:
        first = await it.mint(scopes=["read"], apis=[it.api_id], budget_usdc="0.5")
        second = await it.mint()
        assert await it.outcome(first.body["token"]) == "200"
        page = (await it.owner.ask("GET", f"{it.path}/tokens", query={"limit": 1})).body
        (line,) = page["data"]
        page = (await it.owner.ask("GET", f"{it.path}/tokens", query={"cursor": page["meta"]["nextCursor"]})).body
        lines = [line, *page["data"]]
        ids = [each["tokenId"] for each in lines]
        assert ids == sorted(
            (first.body["tokenId"], second.body["tokenId"]), reverse=True
        )  # they begin with their time
        listed = {each["tokenId"]: each for each in lines}
        unbounded, oldest = listed[second.body["tokenId"]], listed[first.body["tokenId"]]
        assert (unbounded["budget_usdc"], unbounded["spent_usdc"]) == (None, None)
        assert oldest == {
            "tokenId": first.body["tokenId"],
            "scopes": ["read"],
            "apis": [it.api_id],
            "budget_usdc": "0.5000000",
            "spent_usdc": "0.0100000",
            "createdAt": oldest["createdAt"],
            "expiresAt": first.body["expiresAt"],
            "revokedAt": None,
        }
        assert first.body["token"] not in str(lines)


async def test_a_token_is_revoked_under_its_own_key_alone(database_url: str) -> None:
    async with token_shop(database_url) as it:
        made = await it.mint()
        other = await it.service.another_key(it.consumer.user_id, it.consumer.vault_id)
        for path in (f"/api/keys/{other.api_key_id}/tokens/{made.body['tokenId']}", f"{it.path}/tokens/{NOBODYS}"):
            told = await it.owner.ask("DELETE", path)
            assert (told.status, told.code) == (404, "TOKEN_NOT_FOUND")
        assert await it.outcome(made.body["token"]) == "200"


async def test_tokens_long_expired_are_forgotten_without_a_word_to_the_catalogue(database_url: str) -> None:
    async with token_shop(database_url) as it:
        await it.mint(ttl=1)
        kept = await it.mint(ttl=3600)
        database = it.service.database
        before = await database.fetch_value("SELECT version FROM catalogue_epoch")
        assert await drop_expired_tokens(database, datetime.now(UTC) + timedelta(seconds=2), 10) == 1
        assert await database.fetch_value("SELECT token_id::text FROM access_tokens") == kept.body["tokenId"]
        assert await database.fetch_value("SELECT version FROM catalogue_epoch") == before
