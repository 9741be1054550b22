"""Budgets of access tokens on real calls: kept to the last one, given back for what was not charged."""

import trio

from callora.ledger.money import Stroops, format_usdc, parse_usdc
from callora.store.accounts import PricedEndpoint
from tests.support.client import RawClient, call, closed_port, request_bytes, watchdog
from tests.support.keys import PATH, PRICE, TOKEN_SETTINGS, barrage, bearer, token_shop
from tests.support.service import running_service
from tests.support.upstream import gated, raw_upstream, respond, silent

# --- budgets ----------------------------------------------------------------------------------------------------------


async def test_a_budget_of_20_calls_pays_for_exactly_20_of_those_that_meet_at_a_barrier(database_url: str) -> None:
    async with token_shop(database_url) as it:
        token = await it.token(budget_usdc=format_usdc(20 * PRICE))
        outcomes = await barrage(it.service.port, 60, bearer(token))
        assert sorted(set(outcomes)) == ["200", "TOKEN_BUDGET_EXHAUSTED"]
        assert outcomes.count("200") == 20
        assert await it.spent() == [(20 * PRICE, 20 * PRICE)]
        assert await it.service.balance(it.consumer) == (parse_usdc("1") - 20 * PRICE, 0)


async def test_a_budget_holds_across_processes(database_url: str) -> None:
    async with token_shop(database_url) as it, running_service(database_url, TOKEN_SETTINGS) as second:
        token = await it.token(budget_usdc=format_usdc(20 * PRICE))
        outcomes: list[str] = []

        async def storm(port: int) -> None:
            outcomes.extend(await barrage(port, 30, bearer(token)))

        async with trio.open_nursery() as nursery:
            for port in (it.service.port, second.port):
                nursery.start_soon(storm, port)
        assert (outcomes.count("200"), outcomes.count("TOKEN_BUDGET_EXHAUSTED")) == (20, 40)


async def test_an_exhausted_budget_is_402_and_says_so(database_url: str) -> None:
    async with token_shop(database_url) as it:
        token = await it.token(budget_usdc="0.0150000")
        assert await it.outcome(token) == "200"
        response = await call(it.service.port, "GET", PATH, bearer(token))
        assert response.status == 402
        assert response.json()["code"] == "TOKEN_BUDGET_EXHAUSTED"
        assert response.json()["details"] == {"required": "0.0100000", "remaining": "0.0050000", "budget": "0.0150000"}
        assert await it.outcome(it.consumer.api_key) == "200", "the key itself has no budget"


async def test_what_is_not_charged_is_given_back(database_url: str) -> None:
    async with token_shop(database_url, handler=respond(404)) as it:
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
        async with token_shop(database_url, balance="0.02") as it:
            await it.service.api("down", f"http://127.0.0.1:{port}")
            token = await it.token(budget_usdc="0.05")
            assert await it.outcome(token, "/v1/call/down/x") == "BAD_GATEWAY"
            await it.until_spent(0)
            outcomes = [await it.outcome(token) for _ in range(4)]
            assert outcomes == ["200", "200", "INSUFFICIENT_BALANCE", "INSUFFICIENT_BALANCE"]
            await it.until_spent(2 * PRICE)


async def test_a_client_that_leaves_gets_its_budget_back(database_url: str) -> None:
    async with token_shop(database_url, handler=silent()) as it:
        token = await it.token(budget_usdc=format_usdc(PRICE))
        async with RawClient.connect(port=it.service.port) as client:
            await client.send(request_bytes("GET", PATH, bearer(token)))
            await it.until_spent(PRICE)
        await it.until_spent(0)


async def test_a_replay_costs_no_budget(database_url: str) -> None:
    async with token_shop(database_url) as it:
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
    async with token_shop(database_url) as it, raw_upstream(respond()) as upstream:
        await it.service.api("free", upstream.url, [PricedEndpoint("*", "*", Stroops(0))])
        token = await it.token(budget_usdc=format_usdc(PRICE))
        assert [await it.outcome(token), await it.outcome(token)] == ["200", "TOKEN_BUDGET_EXHAUSTED"]
        assert await it.outcome(token, "/v1/call/free/x") == "200"


async def test_rate_and_concurrency_are_the_keys(database_url: str) -> None:
    gate = trio.Event()
    async with token_shop(database_url, handler=gated(gate, respond()), KEY_MAX_CONCURRENCY_PER_KEY="2") as it:
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
