"""Rate limits: exact at any concurrency, both or none taken, and told on every answer."""

import trio

from tests.support.client import RawResponse, call, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, raw_upstream, respond

PATH = "/v1/call/echo/x"


async def ready(service: RunningService, upstream: RawUpstream, limit: int | None) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("10", rate_limit_per_minute=limit)


async def at_once(service: RunningService, callers: list[Consumer]) -> list[RawResponse]:
    responses: list[RawResponse] = []

    async def one(caller: Consumer) -> None:
        responses.append(await call(service.port, "GET", PATH, caller.headers))

    async with trio.open_nursery() as nursery:
        for caller in callers:
            nursery.start_soon(one, caller)
    return responses


async def test_of_a_hundred_calls_at_once_exactly_the_limit_passes(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 10)
        responses = await at_once(service, [consumer] * 100)
        assert sorted(response.status for response in responses) == [200] * 10 + [429] * 90
        assert len(upstream.requests) == 10
        remaining = sorted(int(r.header("X-RateLimit-Remaining") or -1) for r in responses if r.status == 200)
        assert set(remaining) <= set(range(10))


async def test_a_refused_call_is_told_which_limit_and_when_to_come_back(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 2)
        for remaining in ("1", "0"):
            response = await call(service.port, "GET", PATH, consumer.headers)
            assert (response.status, response.header("X-RateLimit-Remaining")) == (200, remaining)
        response = await call(service.port, "GET", PATH, consumer.headers)
        assert (response.status, response.json()["code"]) == (429, "TOO_MANY_REQUESTS")
        seconds = int(response.header("Retry-After") or 0)
        assert 58 <= seconds <= 60
        assert response.json()["details"] == {"limitedBy": "key", "limit": 2, "remaining": 0, "retryAfter": seconds}
        assert response.header("X-RateLimit-Limit") == "2"
        assert response.header("X-RateLimit-Remaining") == "0"
        assert response.header("RateLimit") == f'"key";r=0;t={seconds}'
        assert response.header("RateLimit-Policy") == '"key";q=2;w=60'
        assert response.header("X-Callora-Charge") == "0.0000000"
        assert len(upstream.requests) == 2


async def test_a_users_limit_is_over_all_his_keys_and_nobody_elses(database_url: str) -> None:
    settings = {"GATEWAY_RATE_LIMIT_MAX_REQUESTS": "5"}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1000)
        second = await service.another_key(consumer.user_id, consumer.vault_id, 1000)
        stranger = await service.consumer("1")
        responses = await at_once(service, [consumer, second] * 10)
        assert sorted(response.status for response in responses) == [200] * 5 + [429] * 15
        refused = next(response for response in responses if response.status == 429)
        assert refused.json()["details"]["limitedBy"] == "user"
        assert refused.header("RateLimit-Policy") == '"user";q=5;w=60'
        assert (await call(service.port, "GET", PATH, stranger.headers)).status == 200


async def test_a_call_that_the_key_refuses_takes_nothing_from_the_user(database_url: str) -> None:
    settings = {"GATEWAY_RATE_LIMIT_MAX_REQUESTS": "3"}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1)
        second = await service.another_key(consumer.user_id, consumer.vault_id, 1000)
        statuses = [(await call(service.port, "GET", PATH, consumer.headers)).status for _ in range(6)]
        assert statuses == [200] + [429] * 5
        statuses = [(await call(service.port, "GET", PATH, second.headers)).status for _ in range(3)]
        assert statuses == [200, 200, 429]


async def test_a_key_without_a_limit_of_its_own_has_its_plans(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, None)
        await service.database.execute("UPDATE vaults SET plan_id = 'free'")
        response = await call(service.port, "GET", PATH, consumer.headers)
        assert response.header("X-RateLimit-Limit") == "10"


async def test_a_full_window_opens_again_when_its_oldest_call_leaves_it(database_url: str) -> None:
    async with (
        running_service(database_url, {"RATE_LIMIT_WINDOW_MS": "300"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream, 1)
        began = trio.current_time()
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        with watchdog("the window to open"):
            while (response := await call(service.port, "GET", PATH, consumer.headers)).status == 429:
                assert response.header("Retry-After") == "1"
        assert trio.current_time() - began >= 0.3
        assert len(upstream.requests) == 2


async def test_a_lower_limit_holds_at_once_for_what_was_already_called(database_url: str) -> None:
    async with (
        running_service(database_url, {"CATALOGUE_REFRESH_MS": "10"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream, 10_000)
        for _ in range(3):
            assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        await service.database.execute("UPDATE api_keys SET rate_limit_per_minute = 2")
        with watchdog("the lower limit"):
            while (response := await call(service.port, "GET", PATH, consumer.headers)).status == 200:
                pass
        assert response.header("X-RateLimit-Limit") == "2"


async def test_calls_that_cost_nothing_count_all_the_same(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(404)) as upstream:
        consumer = await ready(service, upstream, 2)
        statuses = [(await call(service.port, "GET", PATH, consumer.headers)).status for _ in range(3)]
        assert statuses == [404, 404, 429]
