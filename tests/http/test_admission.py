"""Admission: every check, in its order, with its own refusal; and what every answer says about itself."""

import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

from callora.ledger.commands import SetStanding
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import StandingSet
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import open_database
from callora.store.embedded import EmbeddedPostgres
from tests.support.client import RawClient, RawResponse, call, closed_port, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, close_silently, gated, raw_upstream, respond

AT_ONCE = {"CATALOGUE_REFRESH_MS": "10"}
PATH = "/v1/call/echo/x"
UNKNOWN_KEY = make_key("testnet", bytes(RANDOM_BYTES))


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


def code(response: RawResponse) -> str:
    """Return the refusal's code, or the status of an answer that is no refusal."""
    if response.status == 200:
        return "200"
    found: str = response.json()["code"]
    return found


async def until(service: RunningService, expected: str, *request: Any) -> RawResponse:
    """Repeat a request until its answer is the expected one: a change takes a moment to be seen."""
    with watchdog(f"{expected} as an answer"):
        while True:
            response = await call(service.port, *request)
            if code(response) == expected:
                return response


@asynccontextmanager
async def database_away(server: EmbeddedPostgres, dsn: str) -> AsyncIterator[None]:
    """Refuse every connection to the service's database and end those there are."""
    name = urlsplit(dsn).path.removeprefix("/")
    async with open_database(server.dsn) as outside:
        await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        await outside.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        try:
            yield
        finally:
            with trio.move_on_after(10, shield=True):
                await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")


async def test_each_check_speaks_only_when_all_before_it_are_content(database_url: str) -> None:
    """Everything is wrong at once; then one thing after the other is put right, and the next check refuses."""
    gate = trio.Event()
    settings = {**AT_ONCE, "KEY_MAX_CONCURRENCY_PER_KEY": "1"}
    async with (
        running_service(database_url, settings) as service,
        raw_upstream(gated(gate, respond(200))) as upstream,
    ):
        await service.api("echo", upstream.url, [PricedEndpoint("GET", "/x", parse_usdc("0.01"))])
        consumer = await service.consumer("0.01", rate_limit_per_minute=1)
        key = [("X-Api-Key", consumer.api_key)]
        run = service.database.execute
        async with RawClient.connect(port=service.port) as running:
            await running.send(request_bytes("GET", PATH, key))
            await upstream.wait_requests(1)
            past = datetime.now(UTC) - timedelta(days=1)
            await run("UPDATE api_keys SET disabled = true, expires_at = $1, revoked_at = $1", past)
            await run("UPDATE api_keys SET allowed_apis = '{999}', allowed_endpoints = '{999}', scopes = '{other}'")
            await run("UPDATE api_keys SET allowed_cidrs = '{192.0.2.0/24}'")
            await run("UPDATE api_endpoints SET required_scope = 'weather:read'")
            assert isinstance(
                await service.ledger.registry.ask(consumer.vault_id, SetStanding("suspended")), StandingSet
            )
            upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
            bad_name = [("Idempotency-Key", "not valid")]
            nowhere = ("GET", "/v1/call/nothing/a/../b")
            assert code(await call(service.port, *nowhere, [*upgrade, *bad_name])) == "UPGRADE_NOT_SUPPORTED"
            assert code(await call(service.port, *nowhere, bad_name)) == "UNAUTHORIZED"
            assert code(await call(service.port, *nowhere, [("X-Api-Key", UNKNOWN_KEY)])) == "UNAUTHORIZED"
            await until(service, "API_KEY_DISABLED", *nowhere, [*key, *bad_name])
            await run("UPDATE api_keys SET disabled = false")
            await until(service, "API_KEY_EXPIRED", *nowhere, [*key, *bad_name])
            await run("UPDATE api_keys SET expires_at = NULL")
            await until(service, "API_KEY_REVOKED", *nowhere, [*key, *bad_name])
            await run("UPDATE api_keys SET revoked_at = NULL")
            await until(service, "NOT_FOUND", *nowhere, [*key, *bad_name])
            dotted = ("GET", "/v1/call/echo/a/../x")
            assert code(await call(service.port, *dotted, [*key, *bad_name])) == "BAD_REQUEST"
            assert code(await call(service.port, "GET", "/v1/call/echo/y", [*key, *bad_name])) == "NOT_FOUND"
            assert code(await call(service.port, "POST", PATH, [*key, *bad_name])) == "NOT_FOUND"
            good = ("GET", PATH, [*key, *bad_name])
            await until(service, "API_ACCESS_FORBIDDEN", *good)
            await run("UPDATE api_keys SET allowed_apis = NULL")
            await until(service, "ENDPOINT_FORBIDDEN", *good)
            await run("UPDATE api_keys SET allowed_endpoints = NULL")
            response = await until(service, "SCOPE_REQUIRED", *good)
            assert response.json()["details"] == {"scope": "weather:read"}
            await run("UPDATE api_keys SET scopes = '{weather:read}'")
            await until(service, "IP_NOT_ALLOWED", *good)
            await run("UPDATE api_keys SET allowed_cidrs = NULL")
            await until(service, "VAULT_SUSPENDED", *good)
            await service.ledger.registry.ask(consumer.vault_id, SetStanding("active"))
            response = await until(service, "CONCURRENCY_LIMIT_EXCEEDED", *good)
            assert (response.status, response.header("Retry-After")) == (429, "1")
            gate.set()
            assert (await running.read_response()).status == 200
        await until(service, "TOO_MANY_REQUESTS", *good)
        await run("UPDATE api_keys SET rate_limit_per_minute = 1000000")
        await until(service, "INVALID_IDEMPOTENCY_KEY", *good)
        assert code(await call(service.port, "GET", PATH, key)) == "INSUFFICIENT_BALANCE"
        assert len(upstream.requests) == 1


async def test_after_the_rate_come_the_intent_the_breaker_the_address_and_last_the_balance(database_url: str) -> None:
    settings = {**AT_ONCE, "PROXY_BREAKER_FAILURE_THRESHOLD": "1", "PROXY_BREAKER_COOLDOWN_MS": "60000"}
    with closed_port() as port:
        async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
            consumer = await ready(service, upstream)
            one = [*consumer.headers, ("Idempotency-Key", "one")]
            assert (await call(service.port, "GET", PATH, one)).status == 200
            upstream.handler = close_silently()
            assert (await call(service.port, "GET", PATH, consumer.headers)).status == 502
            await service.database.execute("UPDATE apis SET base_url = 'http://10.0.0.1'")
            await service.database.execute("UPDATE endpoint_prices SET amount = 20000000")
            # The intent and the breaker
            assert code(await call(service.port, "GET", PATH + "?other", one)) == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
            response = await call(service.port, "GET", PATH, consumer.headers)
            assert code(response) == "UPSTREAM_UNAVAILABLE"
            assert 1 <= int(response.header("Retry-After") or 0) <= 60
            # The address and the balance
            costly = [PricedEndpoint("*", "*", parse_usdc("2"))]
            await service.api("blocked", "http://10.0.0.1", costly)
            assert (
                code(await call(service.port, "GET", "/v1/call/blocked/x", consumer.headers))
                == "UPSTREAM_TARGET_BLOCKED"
            )
            await service.api("refusing", f"http://127.0.0.1:{port}", costly)
            response = await call(service.port, "GET", "/v1/call/refusing/x", consumer.headers)
            assert code(response) == "INSUFFICIENT_BALANCE"
            assert response.json()["details"] == {"required": "2.0000000", "available": "0.9900000"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("X-Api-Key", "")],
        [("X-Api-Key", "nonsense")],
        [("X-Api-Key", UNKNOWN_KEY)],
        [("X-Api-Key", UNKNOWN_KEY.upper())],
        [("X-Api-Key", UNKNOWN_KEY[:-1])],
        [("X-Api-Key", UNKNOWN_KEY[:-1] + "z")],
        [("X-Api-Key", UNKNOWN_KEY), ("X-Api-Key", UNKNOWN_KEY)],
        [("X-Api-Key", f"{UNKNOWN_KEY}, {UNKNOWN_KEY}")],
        [("Authorization", UNKNOWN_KEY)],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {UNKNOWN_KEY}")],
        [("Authorization", f"Bearer {UNKNOWN_KEY}"), ("Authorization", "Bearer x")],
        [("Cookie", f"X-Api-Key={UNKNOWN_KEY}")],
    ],
)
async def test_who_has_no_key_is_told_nothing_but_that(database_url: str, headers: list[tuple[str, str]]) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        await ready(service, upstream)
        for path in (PATH, "/v1/call/nothing/x", "/v1/call/", "/v1/call/echo/a/../b"):
            response = await call(service.port, "GET", path, headers)
            assert (response.status, code(response)) == (401, "UNAUTHORIZED")
            assert response.header("X-Callora-Charge") is None
            assert response.header("X-RateLimit-Limit") is None
        assert upstream.requests == []


async def test_x_api_key_goes_before_authorization(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        bearer = ("Authorization", f"Bearer {consumer.api_key}")
        assert code(await call(service.port, "GET", PATH, [bearer])) == "200"
        assert code(await call(service.port, "GET", PATH, [("X-Api-Key", UNKNOWN_KEY), bearer])) == "UNAUTHORIZED"


async def test_a_mistyped_key_is_refused_without_the_database_and_an_unknown_one_is_not(
    postgres_server: EmbeddedPostgres, database_url: str
) -> None:
    async with running_service(database_url, {"LOG_LEVEL": "critical"}) as service:
        mistyped = UNKNOWN_KEY[:20] + ("0" if UNKNOWN_KEY[20] != "0" else "1") + UNKNOWN_KEY[21:]
        async with database_away(postgres_server, database_url):
            response = await call(service.port, "GET", PATH, [("X-Api-Key", mistyped)])
            assert (response.status, code(response)) == (401, "UNAUTHORIZED")
            response = await call(service.port, "GET", PATH, [("X-Api-Key", UNKNOWN_KEY)])
            assert (response.status, code(response)) == (503, "SERVICE_UNAVAILABLE")
            assert response.header("Retry-After") == "1"


@pytest.mark.parametrize(
    ("change", "status", "expected"),
    [
        ("UPDATE api_keys SET disabled = true", 401, "API_KEY_DISABLED"),
        ("UPDATE api_keys SET expires_at = now() - interval '1 second'", 401, "API_KEY_EXPIRED"),
        ("UPDATE api_keys SET expires_at = now() + interval '1 hour'", 200, "200"),
        ("UPDATE api_keys SET revoked_at = now()", 403, "API_KEY_REVOKED"),
        ("DELETE FROM api_keys", 401, "UNAUTHORIZED"),
        ("UPDATE apis SET status = 'paused'", 404, "NOT_FOUND"),
        ("UPDATE apis SET status = 'draft'", 404, "NOT_FOUND"),
        ("UPDATE apis SET status = 'archived'", 404, "NOT_FOUND"),
        ("DELETE FROM endpoint_prices", 404, "NOT_FOUND"),
        ("UPDATE endpoint_prices SET effective_from = now() + interval '1 hour'", 404, "NOT_FOUND"),
        ("UPDATE api_keys SET allowed_apis = (SELECT array_agg(api_id) FROM apis)", 200, "200"),
        ("UPDATE api_keys SET allowed_apis = '{}'", 403, "API_ACCESS_FORBIDDEN"),
        ("UPDATE api_keys SET allowed_endpoints = (SELECT array_agg(endpoint_id) FROM api_endpoints)", 200, "200"),
        ("UPDATE api_keys SET allowed_endpoints = '{}'", 403, "ENDPOINT_FORBIDDEN"),
        ("UPDATE api_endpoints SET required_scope = 'a'", 200, "200"),
        ("UPDATE api_keys SET scopes = '{b,c}'", 200, "200"),
        ("UPDATE api_keys SET allowed_cidrs = '{127.0.0.0/8}'", 200, "200"),
        ("UPDATE api_keys SET allowed_cidrs = '{::1/128,127.0.0.1/32}'", 200, "200"),
        ("UPDATE api_keys SET allowed_cidrs = '{127.0.0.2/32,::/0}'", 403, "IP_NOT_ALLOWED"),
        ("UPDATE api_keys SET allowed_cidrs = '{}'", 403, "IP_NOT_ALLOWED"),
        ("UPDATE vaults SET standing = 'suspended'", 403, "VAULT_SUSPENDED"),
        ("UPDATE vaults SET standing = 'arrears'", 402, "INSUFFICIENT_BALANCE"),
    ],
)
async def test_a_key_is_refused_for_what_the_database_says_of_it(
    database_url: str, change: str, status: int, expected: str
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await service.database.execute(change)
        response = await call(service.port, "GET", PATH, consumer.headers)
        assert (response.status, code(response)) == (status, expected)
        assert len(upstream.requests) == (1 if status == 200 else 0)
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.99" if status == 200 else "1"), 0)


async def test_a_vault_suspended_by_command_refuses_its_next_call(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        assert code(await call(service.port, "GET", PATH, consumer.headers)) == "200"
        await service.ledger.registry.ask(consumer.vault_id, SetStanding("suspended"))
        response = await call(service.port, "GET", PATH, consumer.headers)
        assert (response.status, code(response)) == (403, "VAULT_SUSPENDED")
        await service.ledger.registry.ask(consumer.vault_id, SetStanding("active"))
        await until(service, "200", "GET", PATH, consumer.headers)
        assert len(upstream.requests) == 2


@pytest.mark.parametrize("header", [[], [("X-Forwarded-For", "127.0.0.1")], [("X-Real-IP", "127.0.0.1")]])
async def test_a_client_cannot_choose_its_own_address(database_url: str, header: list[tuple[str, str]]) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await service.database.execute("UPDATE api_keys SET allowed_cidrs = '{192.0.2.7/32}'")
        response = await call(service.port, "GET", PATH, [*consumer.headers, *header])
        assert (response.status, code(response)) == (403, "IP_NOT_ALLOWED")
        response = await call(service.port, "GET", PATH, [*consumer.headers, ("X-Forwarded-For", "192.0.2.7")])
        assert (response.status, code(response)) == (403, "IP_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        (["192.0.2.7"], "200"),
        (["10.0.0.1, 192.0.2.7"], "200"),
        (["10.0.0.1", "192.0.2.7"], "200"),
        (["192.0.2.7, 10.0.0.1"], "IP_NOT_ALLOWED"),
        (["192.0.2.7", "10.0.0.1"], "IP_NOT_ALLOWED"),
        (["::ffff:192.0.2.7"], "200"),
        (["::ffff:192.0.2.8"], "IP_NOT_ALLOWED"),
        (["nonsense"], "IP_NOT_ALLOWED"),
        ([], "IP_NOT_ALLOWED"),
    ],
)
async def test_behind_one_trusted_proxy_the_address_is_the_last_that_it_wrote(
    database_url: str, forwarded: list[str], expected: str
) -> None:
    async with (
        running_service(database_url, {"TRUSTED_PROXY_COUNT": "1"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        await service.database.execute("UPDATE api_keys SET allowed_cidrs = '{192.0.2.7/32}'")
        headers = [*consumer.headers, *(("X-Forwarded-For", value) for value in forwarded)]
        assert code(await call(service.port, "GET", PATH, headers)) == expected


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        (["192.0.2.7, 10.0.0.1"], "200"),
        (["192.0.2.7", "10.0.0.1"], "200"),
        (["192.0.2.7, 203.0.113.9, 10.0.0.1"], "IP_NOT_ALLOWED"),
        (["192.0.2.7"], "IP_NOT_ALLOWED"),
        (["192.0.2.7, 192.0.2.7, 192.0.2.8, 10.0.0.1"], "IP_NOT_ALLOWED"),
    ],
)
async def test_wa13_behind_two_trusted_proxies_what_a_client_made_up_counts_for_nothing(
    database_url: str, forwarded: list[str], expected: str
) -> None:
    async with (
        running_service(database_url, {"TRUSTED_PROXY_COUNT": "2"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        await service.database.execute("UPDATE api_keys SET allowed_cidrs = '{192.0.2.7/32}'")
        headers = [*consumer.headers, *(("X-Forwarded-For", value) for value in forwarded)]
        assert code(await call(service.port, "GET", PATH, headers)) == expected


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        (["192.168.1.0/24"], "200"),
        (["192.168.1.77"], "200"),
        (["10.0.0.0/8", "2001:db8::/32", "192.168.0.0/16"], "200"),
        (["192.168.2.0/24"], "IP_NOT_ALLOWED"),
        (["::/0"], "IP_NOT_ALLOWED"),
    ],
)
async def test_a15_a_list_of_addresses_takes_networks_and_single_ones(
    database_url: str, networks: list[str], expected: str
) -> None:
    async with (
        running_service(database_url, {"TRUSTED_PROXY_COUNT": "1"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        await service.database.execute("UPDATE api_keys SET allowed_cidrs = $1::text[]::cidr[]", networks)
        headers = [*consumer.headers, ("X-Forwarded-For", "192.168.1.77")]
        assert code(await call(service.port, "GET", PATH, headers)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/call/", "NOT_FOUND"),
        ("/v1/call/nothing", "NOT_FOUND"),
        ("/v1/call/ECHO/x", "NOT_FOUND"),
        ("/v1/call/ech%6f/x", "NOT_FOUND"),
        ("/v1/call//echo/x", "NOT_FOUND"),
        ("/v1/call/999999999999999999999999/x", "NOT_FOUND"),
        ("/v1/call/./echo/x", "NOT_FOUND"),
        ("/v1/call/echo/../other/x", "BAD_REQUEST"),
        ("/v1/call/echo/%2e%2e/other/x", "BAD_REQUEST"),
        ("/v1/call/echo/.", "BAD_REQUEST"),
        ("/v1/call/echo/..", "BAD_REQUEST"),
        ("/v1/call/echo/x/..%2f..%2fother", "BAD_REQUEST"),
        ("/v1/call/echo/..;/other", "BAD_REQUEST"),
        ("/v1/call/echo/..\\other", "BAD_REQUEST"),
        ("/v1/call/two/cost%6cy", "BAD_REQUEST"),
        ("/v1/call/two//costly", "BAD_REQUEST"),
        ("/v1/call/two/%2fcostly", "BAD_REQUEST"),
        ("/v1/call/two/cheap", "200"),
        ("/v1/call/two/costly", "INSUFFICIENT_BALANCE"),
    ],
)
async def test_a_path_leads_to_one_endpoint_or_nowhere(database_url: str, path: str, expected: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await service.api("two", upstream.url, [PricedEndpoint("*", "*", 1), PricedEndpoint("GET", "/costly", 10**9)])  # type: ignore[arg-type]
        response = await call(service.port, "GET", path, consumer.headers)
        assert code(response) == expected
        assert len(upstream.requests) == (1 if expected == "200" else 0)


async def test_a_key_has_fifty_calls_at_the_same_time_and_not_one_more(database_url: str) -> None:
    gate = trio.Event()
    settings = {"KEY_MAX_CONCURRENCY_PER_KEY": "50"}
    async with (
        running_service(database_url, settings) as service,
        raw_upstream(gated(gate, respond())) as upstream,
    ):
        consumer = await ready(service, upstream)
        other = await service.another_key(consumer.user_id, consumer.vault_id)
        statuses: list[int] = []

        async def one(caller: Consumer) -> None:
            statuses.append((await call(service.port, "GET", PATH, caller.headers)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one, consumer)
            await upstream.wait_requests(50)
            for _ in range(3):
                response = await call(service.port, "GET", PATH, consumer.headers)
                assert (response.status, code(response)) == (429, "CONCURRENCY_LIMIT_EXCEEDED")
            nursery.start_soon(one, other)
            await upstream.wait_requests(51)
            gate.set()
        assert statuses == [200] * 51
        assert code(await call(service.port, "GET", PATH, consumer.headers)) == "200"


async def test_a_call_that_its_client_abandoned_is_no_longer_counted_as_running(database_url: str) -> None:
    gate = trio.Event()
    settings = {"KEY_MAX_CONCURRENCY_PER_KEY": "1"}
    async with (
        running_service(database_url, settings) as service,
        raw_upstream(gated(gate, respond())) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            await upstream.wait_requests(1)
            await client.reset()
        gate.set()
        await until(service, "200", "GET", PATH, consumer.headers)


async def test_a_401_or_403_takes_no_rate_slot(database_url: str) -> None:
    async with running_service(database_url, AT_ONCE) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1", rate_limit_per_minute=2)
        await service.database.execute("UPDATE api_keys SET allowed_apis = '{}'")
        for _ in range(5):
            assert (await call(service.port, "GET", PATH, consumer.headers)).status == 403
        await service.database.execute("UPDATE api_keys SET allowed_apis = NULL, disabled = true")
        await until(service, "API_KEY_DISABLED", "GET", PATH, consumer.headers)
        await service.database.execute("UPDATE api_keys SET disabled = false")
        response = await until(service, "200", "GET", PATH, consumer.headers)
        assert response.header("X-RateLimit-Remaining") == "1"


async def test_an_allowed_answer_says_who_what_and_how_much_is_left(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(200, body=b"x")) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1", rate_limit_per_minute=7)
        before = int(datetime.now(UTC).timestamp())
        response = await call(service.port, "GET", PATH, [*consumer.headers, ("X-Request-Id", "abc-1")])
        assert response.header("X-Request-Id") == "abc-1"
        assert upstream.requests[0].header("X-Request-Id") == "abc-1"
        assert response.header("X-RateLimit-Limit") == "7"
        assert response.header("X-RateLimit-Remaining") == "6"
        assert before + 59 <= int(response.header("X-RateLimit-Reset") or 0) <= before + 70
        assert response.header("RateLimit-Policy") == '"key";q=7;w=60'
        assert re.fullmatch(r'"key";r=6;t=(59|60)', response.header("RateLimit") or "")
        assert response.header("X-Callora-Charge") == "0.0100000"
        assert response.header("X-Callora-Balance") == "0.9900000"
        assert re.fullmatch(r"callora;dur=\d+\.\d\d", response.header("Server-Timing") or "")
        assert response.header("Retry-After") is None


async def test_a_refused_answer_says_the_same_and_why_in_one_form(database_url: str) -> None:
    async with running_service(database_url) as service:
        consumer = await service.consumer("0")
        await service.api("echo", "http://127.0.0.1:1")
        response = await call(service.port, "GET", PATH, [*consumer.headers, ("X-Request-Id", "abc-1")])
        assert response.status == 402
        assert response.header("Content-Type") == "application/json"
        assert response.header("X-Request-Id") == "abc-1"
        assert response.header("X-Callora-Charge") == "0.0000000"
        for name in ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "RateLimit", "Server-Timing"):
            assert response.header(name) is not None
        assert response.json() == {
            "code": "INSUFFICIENT_BALANCE",
            "message": "The balance does not cover the price",
            "requestId": "abc-1",
            "details": {"required": "0.0100000", "available": "0.0000000"},
        }
        assert set((await call(service.port, "GET", PATH)).json()) == {"code", "message", "requestId"}


async def test_a_refusal_leaves_the_connection_usable(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            for headers, status in ((consumer.headers, 200), ([], 401), (consumer.headers, 200)):
                await client.send(request_bytes("POST", PATH, headers, b"x" * 1000))
                assert (await client.read_response()).status == status
            await client.send(request_bytes("HEAD", PATH, []) + request_bytes("GET", PATH, consumer.headers))
            assert (await client.read_response("HEAD")).status == 401
            assert (await client.read_response()).status == 200


@pytest.mark.parametrize("given", ["", "x" * 129, "a\tb", "\xe4", "a b\x7f"])
async def test_a_request_id_that_is_no_name_is_replaced_by_ours(database_url: str, given: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        raw = request_bytes("GET", PATH, [*consumer.headers, ("X-Request-Id", given)])
        async with RawClient.connect(port=service.port) as client:
            await client.send(raw)
            response = await client.read_response()
        if response.status == 200:
            made = response.header("X-Request-Id")
            assert made == upstream.requests[0].header("X-Request-Id")
            assert made == str(await service.database.fetch_value("SELECT event_id FROM usage_events"))
        else:
            assert "\x7f" in given


async def test_the_same_request_id_twice_is_two_calls_and_two_charges(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        for _ in range(2):
            assert (await call(service.port, "GET", PATH, [*consumer.headers, ("X-Request-Id", "same")])).status == 200
        assert len(upstream.requests) == 2
        assert await service.balance(consumer) == (parse_usdc("0.98"), 0)


async def test_while_it_drains_a_service_refuses_new_calls_before_anything_else_and_ends_those_it_has(
    database_url: str,
) -> None:
    gate = trio.Event()
    async with running_service(database_url) as service, raw_upstream(gated(gate, respond())) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            await upstream.wait_requests(1)
            service.stop.set()
            response = await until(service, "SERVICE_UNAVAILABLE", "GET", "/v1/call/nothing/x")
            assert (response.status, response.header("Connection")) == (503, "close")
            assert response.header("Retry-After") == "5"
            gate.set()
            answer = await client.read_response()
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await client.read_eof() == b""
    assert service.exit_code == 0


async def test_a_key_made_after_it_was_first_tried_works_within_a_moment(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        late = make_key("testnet", secrets.token_bytes(RANDOM_BYTES))
        headers = [("X-Api-Key", late)]
        assert code(await call(service.port, "GET", PATH, headers)) == "UNAUTHORIZED"
        await service.database.execute(
            "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4)"
            " SELECT gen_random_uuid(), user_id, vault_id, $1::text, sha256($2::text::bytea), $3::text FROM vaults"
            " WHERE vault_id = $4",
            late[:16],
            late,
            late[-4:],
            consumer.vault_id,
        )
        await until(service, "200", "GET", PATH, headers)
