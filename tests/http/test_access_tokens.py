"""Access tokens: never wider than their key, dead when it is, and their budgets kept to the last call."""

import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import httpx
import jwt
import pytest
import trio
import trio.testing

from callora.actors.catalogue import STALE_SECONDS
from callora.http.rest.identity import TokenSettings, mint_access_token
from callora.ledger.ids import ApiId
from callora.ledger.money import Stroops, format_usdc, parse_usdc
from callora.service import SystemClock
from callora.store.accounts import PricedEndpoint
from callora.store.tokens import drop_expired_tokens
from tests.support.client import RawClient, RawResponse, call, closed_port, request_bytes, watchdog
from tests.support.rest import Person, Told, anonymous, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Handler, gated, raw_upstream, respond, silent

PATH = "/v1/call/echo/x"
SECRET = "s" * 64
PRICE = parse_usdc("0.01")
SETTINGS = {"JWT_SECRET": SECRET, "REST_RATE_LIMIT_MAX_REQUESTS": "10000"}
NOBODYS = "01a1ff0e-0fb6-7396-aa6d-6df1fb066d39"


@attrs.frozen
class Shop:
    """A service, one API, and a consumer whose key pays for tokens."""

    service: RunningService
    client: httpx.AsyncClient
    consumer: Consumer
    owner: Person
    api_id: ApiId

    @property
    def path(self) -> str:
        """The key's."""
        return f"/api/keys/{self.consumer.api_key_id}"

    async def mint(self, **fields: object) -> Told:
        """Make a token."""
        made = await self.owner.ask("POST", f"{self.path}/tokens", {"ttl": 60, **fields})
        assert made.status == 201, made.body
        return made

    async def token(self, **fields: object) -> str:
        """Make a token and return it."""
        return str((await self.mint(**fields)).body["token"])

    async def outcome(self, token: str, path: str = PATH) -> str:
        """Make a call with a token."""
        return code(await call(self.service.port, "GET", path, bearer(token)))

    async def spent(self) -> list[tuple[int | None, int]]:
        """Return every token's budget and what is out of it."""
        rows = await self.service.database.fetch("SELECT budget, spent FROM access_tokens ORDER BY token_id")
        return [(row["budget"], row["spent"]) for row in rows]

    async def until_spent(self, amount: int) -> None:
        """Return when this much is out of the only token's budget: giving back is not waited for by a call."""
        with watchdog(f"{amount} to be spent"):
            while [spent for _, spent in await self.spent()] != [amount]:
                pass


@asynccontextmanager
async def shop(
    database_url: str, *, balance: str = "1", handler: Handler | None = None, **settings: str
) -> AsyncIterator[Shop]:
    async with (
        running_service(database_url, {**SETTINGS, **settings}) as service,
        rest_client(service) as client,
        raw_upstream(handler or respond()) as upstream,
    ):
        api_id = await service.api("echo", upstream.url)
        consumer = await service.consumer(balance)
        yield Shop(service, client, consumer, person_of(client, consumer), api_id)


def person_of(client: httpx.AsyncClient, consumer: Consumer) -> Person:
    """The consumer on the dashboard."""
    return Person(client, {"X-User-Id": consumer.user_id}, consumer.user_id)


def bearer(token: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token}")]


def code(response: RawResponse) -> str:
    return "200" if response.status == 200 else str(response.json()["code"])


async def barrage(port: int, count: int, headers: Sequence[tuple[str, str]]) -> list[str]:
    """Make calls on connections that stand already; return what each came to."""
    outcomes: list[str] = []
    start = trio.Event()

    async def one() -> None:
        async with RawClient.connect(port=port) as client:
            await start.wait()
            await client.send(request_bytes("GET", PATH, headers))
            outcomes.append(code(await client.read_response()))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked(0.05)
        start.set()
    return outcomes


# --- what a token is --------------------------------------------------------------------------------------------------


async def test_a_token_makes_calls_that_its_key_pays_for(database_url: str) -> None:
    async with shop(database_url) as it:
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
        running_service(database_url, SETTINGS) as service,
        rest_client(service) as client,
        raw_upstream(respond()) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        it = Shop(service, client, consumer, person_of(client, consumer), ApiId(1))
        token = await it.token()
        assert code(await call(service.port, "GET", PATH, [("X-Api-Key", token)])) == "UNAUTHORIZED"
        assert await it.outcome(token) == "200"
        assert token.encode() not in upstream.requests[0].raw_head


async def test_a_token_is_no_login_and_a_login_is_no_token(database_url: str) -> None:
    async with shop(database_url) as it:
        headers = {"Authorization": f"Bearer {await it.token()}"}
        for path in ("/api/keys", it.path, f"{it.path}/tokens", "/api/vaults", "/api/admin/keys"):
            told = await anonymous(it.client).ask("GET", path, headers=headers)
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
    async with shop(database_url) as it:
        told = await it.owner.ask("POST", f"{it.path}/tokens", body)
        assert (told.status, told.wrong) == (400, [wrong])


async def test_a_token_outlives_neither_its_time_nor_its_key(database_url: str) -> None:
    async with shop(database_url) as it:
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
    async with shop(database_url) as it:
        claims = jwt.decode(await it.token(), options={"verify_signature": False})
        response = await call(it.service.port, "GET", PATH, bearer(forge(claims)))
        assert (response.status, code(response)) == (401, "INVALID_TOKEN")


async def test_a_token_of_which_one_character_is_changed_is_refused(database_url: str) -> None:
    async with shop(database_url) as it:
        token = await it.token()
        head, body, signature = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(body + "=="))
        other = base64.urlsafe_b64encode(json.dumps({**claims, "exp": claims["exp"] + 999}).encode()).decode()
        for forged in (f"{head}.{other.rstrip('=')}.{signature}", f"{head}.{body}.{'A' * 43}", f"{head}.{body}."):
            assert await it.outcome(forged) == "INVALID_TOKEN"
        assert await it.outcome(token) == "200"


async def test_without_a_signing_secret_there_are_no_tokens(database_url: str) -> None:
    async with shop(database_url) as with_secret:
        token = await with_secret.token()
    async with running_service(database_url) as service, rest_client(service) as client:
        consumer = await service.consumer("1")
        told = await person_of(client, consumer).ask("POST", f"/api/keys/{consumer.api_key_id}/tokens", {"ttl": 60})
        assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED")
        assert code(await call(service.port, "GET", PATH, bearer(token))) == "INVALID_TOKEN"


async def test_tokens_name_the_issuer_and_audience_that_are_configured(database_url: str) -> None:
    named = {"JWT_ISSUER": "callora", "JWT_AUDIENCE": "calls"}
    async with shop(database_url, **named) as it:
        token = await it.token()
        assert await it.outcome(token) == "200"
        claims = jwt.decode(token, options={"verify_signature": False})
        for name in ("iss", "aud"):
            assert await it.outcome(jwt.encode({**claims, name: "another"}, SECRET, "HS256")) == "INVALID_TOKEN"


# --- never wider than its key -----------------------------------------------------------------------------------------


async def require(it: Shop, scope: str) -> None:
    """Let the endpoint ask for a scope, and the gateway see it."""
    await it.service.database.execute("UPDATE api_endpoints SET required_scope = $1", scope)
    with watchdog("the scope to be asked for"):
        other = await it.token(scopes=["none-of-these"])
        while await it.outcome(other) != "SCOPE_REQUIRED":
            pass


async def test_a_token_has_no_more_scopes_than_it_was_made_with(database_url: str) -> None:
    async with shop(database_url) as it:
        await require(it, "read")
        outcomes = [await it.outcome(await it.token(scopes=scopes)) for scopes in (["write"], ["read"], ["*"])]
        assert outcomes == ["SCOPE_REQUIRED", "200", "200"]


async def test_a_token_is_good_for_no_more_apis_than_it_was_made_with(database_url: str) -> None:
    async with shop(database_url) as it, raw_upstream(respond()) as upstream:
        other = await it.service.api("other", upstream.url)
        token = await it.token(apis=[other])
        assert await it.outcome(token) == "API_ACCESS_FORBIDDEN"
        assert await it.outcome(token, "/v1/call/other/x") == "200"


async def test_a_token_cannot_be_made_wider_than_its_key(database_url: str) -> None:
    async with shop(database_url) as it:
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
    async with shop(database_url, CATALOGUE_REFRESH_MS="300") as it, raw_upstream(respond()) as upstream:
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
    async with shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        token = await it.token()
        assert await it.outcome(token) == "200"
        await it.owner.ask("DELETE", it.path)
        response = await call(it.service.port, "GET", PATH, bearer(token))
        assert (response.status, code(response)) == (403, "API_KEY_REVOKED")
        for body in ({"ttl": 60}, {"ttl": 60, "scopes": ["*"]}):
            assert (await it.owner.ask("POST", f"{it.path}/tokens", body)).code == "CONFLICT"


async def test_under_a_disabled_or_expired_key_no_token_is_made(database_url: str) -> None:
    async with shop(database_url) as it:
        await it.owner.ask("PATCH", it.path, {"active": False})
        assert (await it.owner.ask("POST", f"{it.path}/tokens", {"ttl": 60})).code == "CONFLICT"
        await it.owner.ask("PATCH", it.path, {"active": True})
        await it.service.database.execute("UPDATE api_keys SET expires_at = now()")
        assert (await it.owner.ask("POST", f"{it.path}/tokens", {"ttl": 60})).code == "CONFLICT"


async def test_a_token_dies_with_the_secret_it_was_made_under(database_url: str) -> None:
    async with shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
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
    async with shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
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
    async with shop(database_url) as it:
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


# --- budgets ----------------------------------------------------------------------------------------------------------


async def test_a_budget_of_20_calls_pays_for_exactly_20_of_those_that_meet_at_a_barrier(database_url: str) -> None:
    async with shop(database_url) as it:
        token = await it.token(budget_usdc=format_usdc(20 * PRICE))
        outcomes = await barrage(it.service.port, 60, bearer(token))
        assert sorted(set(outcomes)) == ["200", "TOKEN_BUDGET_EXHAUSTED"]
        assert outcomes.count("200") == 20
        assert await it.spent() == [(20 * PRICE, 20 * PRICE)]
        assert await it.service.balance(it.consumer) == (parse_usdc("1") - 20 * PRICE, 0)


async def test_a_budget_holds_across_processes(database_url: str) -> None:
    async with shop(database_url) as it, running_service(database_url, SETTINGS) as second:
        token = await it.token(budget_usdc=format_usdc(20 * PRICE))
        outcomes: list[str] = []

        async def storm(port: int) -> None:
            outcomes.extend(await barrage(port, 30, bearer(token)))

        async with trio.open_nursery() as nursery:
            for port in (it.service.port, second.port):
                nursery.start_soon(storm, port)
        assert (outcomes.count("200"), outcomes.count("TOKEN_BUDGET_EXHAUSTED")) == (20, 40)


async def test_an_exhausted_budget_is_402_and_says_so(database_url: str) -> None:
    async with shop(database_url) as it:
        token = await it.token(budget_usdc="0.0150000")
        assert await it.outcome(token) == "200"
        response = await call(it.service.port, "GET", PATH, bearer(token))
        assert response.status == 402
        assert response.json()["code"] == "TOKEN_BUDGET_EXHAUSTED"
        assert response.json()["details"] == {"required": "0.0100000", "remaining": "0.0050000", "budget": "0.0150000"}
        assert await it.outcome(it.consumer.api_key) == "200", "the key itself has no budget"


async def test_what_is_not_charged_is_given_back(database_url: str) -> None:
    async with shop(database_url, handler=respond(404)) as it:
        token = await it.token(budget_usdc=format_usdc(PRICE))
        for _ in range(5):
            assert (await call(it.service.port, "GET", PATH, bearer(token))).status == 404
        await it.until_spent(0)
        await it.service.database.execute("UPDATE api_endpoints SET billable_statuses = '2xx,404'")
        with watchdog("the new price list"):
            while (response := await call(it.service.port, "GET", PATH, bearer(token))).header(
                "X-Callora-Charge"
            ) == "0.0000000":
                pass
        assert response.header("X-Callora-Charge") == "0.0100000"
        assert await it.outcome(token) == "TOKEN_BUDGET_EXHAUSTED"


async def test_a_failing_upstream_and_an_empty_vault_cost_no_budget(database_url: str) -> None:
    with closed_port() as port:
        async with shop(database_url, balance="0.02") as it:
            await it.service.api("down", f"http://127.0.0.1:{port}")
            token = await it.token(budget_usdc="0.05")
            assert await it.outcome(token, "/v1/call/down/x") == "BAD_GATEWAY"
            await it.until_spent(0)
            outcomes = [await it.outcome(token) for _ in range(4)]
            assert outcomes == ["200", "200", "INSUFFICIENT_BALANCE", "INSUFFICIENT_BALANCE"]
            await it.until_spent(2 * PRICE)


async def test_a_client_that_leaves_gets_its_budget_back(database_url: str) -> None:
    async with shop(database_url, handler=silent()) as it:
        token = await it.token(budget_usdc=format_usdc(PRICE))
        async with RawClient.connect(port=it.service.port) as client:
            await client.send(request_bytes("GET", PATH, bearer(token)))
            await it.until_spent(PRICE)
        await it.until_spent(0)


async def test_a_replay_costs_no_budget(database_url: str) -> None:
    async with shop(database_url) as it:
        token = await it.token(budget_usdc=format_usdc(PRICE))
        keyed = [*bearer(token), ("Idempotency-Key", "once")]
        answers = [await call(it.service.port, "GET", PATH, keyed) for _ in range(3)]
        assert [each.status for each in answers] == [200] * 3
        assert [each.header("Idempotent-Replayed") for each in answers] == [None, "true", "true"]
        assert await it.outcome(token) == "TOKEN_BUDGET_EXHAUSTED"
        # A retry after the token has ended is the same intent: it is the key's.
        keyed = [*bearer(await it.token()), ("Idempotency-Key", "once")]
        assert (await call(it.service.port, "GET", PATH, keyed)).header("Idempotent-Replayed") == "true"


async def test_a_free_call_needs_no_budget(database_url: str) -> None:
    async with shop(database_url) as it, raw_upstream(respond()) as upstream:
        await it.service.api("free", upstream.url, [PricedEndpoint("*", "*", Stroops(0))])
        token = await it.token(budget_usdc=format_usdc(PRICE))
        assert [await it.outcome(token), await it.outcome(token)] == ["200", "TOKEN_BUDGET_EXHAUSTED"]
        assert await it.outcome(token, "/v1/call/free/x") == "200"


async def test_rate_and_concurrency_are_the_keys(database_url: str) -> None:
    gate = trio.Event()
    async with shop(database_url, handler=gated(gate, respond()), KEY_MAX_CONCURRENCY_PER_KEY="2") as it:
        first, second = await it.token(), await it.token()
        outcomes: list[str] = []

        async def run(token: str) -> None:
            outcomes.append(await it.outcome(token))

        async with trio.open_nursery() as nursery:
            for token in (first, second):
                nursery.start_soon(run, token)
            with watchdog("both calls to run"):
                while len(await it.service.events(it.consumer)) < 2:
                    pass
            assert await it.outcome(it.consumer.api_key) == "CONCURRENCY_LIMIT_EXCEEDED"
            gate.set()
        await it.owner.ask("PATCH", it.path, {"rateLimitPerMinute": 3})
        assert [await it.outcome(token) for token in (first, second)] == ["200", "TOO_MANY_REQUESTS"]


# --- seeing and forgetting --------------------------------------------------------------------------------------------


async def test_a_keys_tokens_are_listed_without_what_is_presented(database_url: str) -> None:
    async with shop(database_url) as it:
        first = await it.mint(scopes=["read"], apis=[it.api_id], budget_usdc="0.5")
        await trio.sleep(0.002)
        second = await it.mint()
        assert await it.outcome(first.body["token"]) == "200"
        page = (await it.owner.ask("GET", f"{it.path}/tokens", query={"limit": 1})).body
        (newest,) = page["data"]
        assert (newest["tokenId"], newest["budget_usdc"], newest["spent_usdc"]) == (second.body["tokenId"], None, None)
        page = (await it.owner.ask("GET", f"{it.path}/tokens", query={"cursor": page["meta"]["nextCursor"]})).body
        (oldest,) = page["data"]
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
        assert first.body["token"] not in str(page)


async def test_a_token_is_revoked_under_its_own_key_alone(database_url: str) -> None:
    async with shop(database_url) as it:
        made = await it.mint()
        other = await it.service.another_key(it.consumer.user_id, it.consumer.vault_id)
        for path in (f"/api/keys/{other.api_key_id}/tokens/{made.body['tokenId']}", f"{it.path}/tokens/{NOBODYS}"):
            told = await it.owner.ask("DELETE", path)
            assert (told.status, told.code) == (404, "TOKEN_NOT_FOUND")
        assert await it.outcome(made.body["token"]) == "200"


async def test_tokens_long_expired_are_forgotten_without_a_word_to_the_catalogue(database_url: str) -> None:
    async with shop(database_url) as it:
        await it.mint(ttl=1)
        kept = await it.mint(ttl=3600)
        database = it.service.database
        before = await database.fetch_value("SELECT version FROM catalogue_epoch")
        assert await drop_expired_tokens(database, datetime.now(UTC) + timedelta(seconds=2), 10) == 1
        assert await database.fetch_value("SELECT token_id::text FROM access_tokens") == kept.body["tokenId"]
        assert await database.fetch_value("SELECT version FROM catalogue_epoch") == before
