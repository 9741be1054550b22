"""Rate limits, a process's own or shared through a store: the same to callers; and what they see without the store."""

import time
from collections import Counter
from collections.abc import Mapping

import pytest
import trio

from callora.store import pace as pace_of_store
from callora.store.pace import logs_of
from tests.support.client import RawResponse, call, closed_port, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, raw_upstream, respond
from tests.support.valkey import Valkey

PATH = "/v1/call/echo/x"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a busy machine be late with an answer: the bound itself is for the long run of outages to measure."""
    monkeypatch.setattr(pace_of_store, "ANSWER_SECONDS", 0.8)


@pytest.fixture(params=["own", "shared"])
def kept(request: pytest.FixtureRequest, valkey: Valkey) -> Mapping[str, str]:
    """Settings with which limits are a process's own, or shared."""
    return {"REDIS_URL": valkey.url} if request.param == "shared" else {}


def shared(valkey: Valkey, mode: str = "closed", **more: str) -> dict[str, str]:
    return {"REDIS_URL": valkey.url, "RATE_LIMIT_ON_FAILURE": mode, **more}


async def ready(service: RunningService, upstream: RawUpstream, limit: int | None) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("10", rate_limit_per_minute=limit)


async def ask(service: RunningService, consumer: Consumer, path: str = PATH) -> RawResponse:
    return await call(service.port, "GET", path, consumer.headers)


async def ask_at_once(services: list[RunningService], consumer: Consumer, times: int) -> Counter[int]:
    """Return the statuses of calls made at the same time, of each service as many."""
    statuses = Counter[int]()

    async def one(service: RunningService) -> None:
        statuses[(await ask(service, consumer)).status] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            for service in services:
                nursery.start_soon(one, service)
    return statuses


def undecided(service: RunningService, mode: str, *whys: str) -> float:
    """Return how many calls the store did not decide, whyever unless told."""
    registry = service.context.metrics.registry
    return sum(
        registry.get_sample_value("callora_rate_limit_undecided_total", {"mode": mode, "why": why}) or 0.0
        for why in whys or ("unreachable", "timeout", "refused")
    )


async def until_status(service: RunningService, consumer: Consumer, status: int) -> RawResponse:
    """Call until the answer has this status."""
    with watchdog(f"a {status}"):
        while (response := await ask(service, consumer)).status != status:  # noqa: ASYNC110 - only answers tell
            await trio.sleep(0.01)
    return response


# --- the same for both ------------------------------------------------------------------------------------------------


async def test_a18_the_call_beyond_the_limit_is_refused_and_told_when_to_come_back(
    database_url: str, kept: Mapping[str, str]
) -> None:
    async with running_service(database_url, kept) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 3)
        assert [(await ask(service, consumer)).status for _ in range(3)] == [200] * 3
        response = await ask(service, consumer)
        assert (response.status, response.json()["code"]) == (429, "TOO_MANY_REQUESTS")
        seconds = int(response.header("Retry-After") or 0)
        assert 55 <= seconds <= 60
        assert response.json()["details"] == {"limitedBy": "key", "limit": 3, "remaining": 0, "retryAfter": seconds}
        assert len(upstream.requests) == 3


async def test_a19_every_answer_says_what_is_left_and_when_the_oldest_call_leaves(
    database_url: str, kept: Mapping[str, str]
) -> None:
    async with running_service(database_url, kept) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 4)
        began = time.time()
        responses = [await ask(service, consumer) for _ in range(6)]
        assert [r.status for r in responses] == [200] * 4 + [429] * 2
        assert [r.header("X-RateLimit-Limit") for r in responses] == ["4"] * 6
        assert [r.header("X-RateLimit-Remaining") for r in responses] == ["3", "2", "1", "0", "0", "0"]
        assert {r.header("RateLimit-Policy") for r in responses} == {'"key";q=4;w=60'}
        resets = [int(r.header("X-RateLimit-Reset") or 0) for r in responses]
        assert all(began + 60 <= reset <= time.time() + 62 for reset in resets)
        if "REDIS_URL" in kept:
            assert len(set(resets)) == 1, "one instant, whoever asks when"
        assert all(0 < int((r.header("RateLimit") or "").rpartition("t=")[2]) <= 60 for r in responses)


async def test_a21_one_key_at_its_limit_leaves_others_alone_and_refused_calls_extend_nothing(
    database_url: str, kept: Mapping[str, str]
) -> None:
    settings = {**kept, "RATE_LIMIT_WINDOW_MS": "400"}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1)
        other = await service.another_key(consumer.user_id, consumer.vault_id, 1)
        assert (await ask(service, consumer)).status == 200
        assert (await ask(service, other)).status == 200
        await until_status(service, consumer, 200)  # refused again and again meanwhile
        assert len(upstream.requests) == 3


async def test_a17_what_is_refused_before_the_rate_uses_no_slot(database_url: str, kept: Mapping[str, str]) -> None:
    settings = {**kept, "CATALOGUE_REFRESH_MS": "10"}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 2)
        run = service.database.execute
        await run("UPDATE api_keys SET disabled = true, allowed_endpoints = '{}', allowed_cidrs = '{192.0.2.0/24}'")
        for status, cure in (
            (401, "disabled = false"),
            (403, "allowed_endpoints = NULL"),
            (403, "allowed_cidrs = NULL"),
        ):
            assert (await until_status(service, consumer, status)).header("X-RateLimit-Limit") is None
            assert [(await ask(service, consumer)).status for _ in range(3)] == [status] * 3
            await run(f"UPDATE api_keys SET {cure}")
        assert (await ask(service, consumer, "/v1/call/nothing/x")).status == 404
        response = await until_status(service, consumer, 200)
        assert response.header("X-RateLimit-Remaining") == "1"


async def test_a17_a_402_has_used_a_slot(database_url: str, kept: Mapping[str, str]) -> None:
    async with running_service(database_url, kept) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("0", rate_limit_per_minute=2)
        assert [(await ask(service, consumer)).status for _ in range(3)] == [402, 402, 429]


async def test_a_full_users_limit_is_named_as_such(database_url: str, kept: Mapping[str, str]) -> None:
    settings = {**kept, "GATEWAY_RATE_LIMIT_MAX_REQUESTS": "2"}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 100)
        second = await service.another_key(consumer.user_id, consumer.vault_id, 100)
        assert [(await ask(service, each)).status for each in (consumer, second, consumer)] == [200, 200, 429]
        response = await ask(service, second)
        assert response.json()["details"]["limitedBy"] == "user"
        assert response.header("RateLimit-Policy") == '"user";q=2;w=60'


async def test_wa12_a_refused_call_is_counted(database_url: str, kept: Mapping[str, str]) -> None:
    async with running_service(database_url, kept) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1)
        for _ in range(3):
            await ask(service, consumer)
        registry = service.context.metrics.registry
        assert registry.get_sample_value("callora_refusals_total", {"code": "TOO_MANY_REQUESTS"}) == 2


# --- several processes ------------------------------------------------------------------------------------------------


async def test_wa6_bursts_on_two_services_pass_exactly_the_limit(database_url: str, valkey: Valkey) -> None:
    async with (
        running_service(database_url, shared(valkey)) as one,
        running_service(database_url, shared(valkey)) as two,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(one, upstream, 10)
        assert await ask_at_once([one, two], consumer, 50) == {200: 10, 429: 90}
        assert len(upstream.requests) == 10
        assert len(valkey.log(logs_of(consumer.user_id, consumer.api_key_id)[1])) == 10


async def test_without_a_store_each_service_has_its_own(database_url: str) -> None:
    async with (
        running_service(database_url) as one,
        running_service(database_url) as two,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(one, upstream, 5)
        assert await ask_at_once([one, two], consumer, 20) == {200: 10, 429: 30}


# --- without the store ------------------------------------------------------------------------------------------------


async def test_wa7_closed_calls_are_refused_while_the_store_is_away_and_taken_when_it_is_back(
    database_url: str, valkey: Valkey
) -> None:
    async with running_service(database_url, shared(valkey)) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 5)
        assert (await ask(service, consumer)).status == 200
        valkey.kill()
        response = await until_status(service, consumer, 503)
        assert response.json()["code"] == "SERVICE_UNAVAILABLE"
        assert response.header("Retry-After") == "1"
        assert response.header("X-RateLimit-Remaining") is None, "nobody knows"
        told = response.body.decode().lower()
        assert not any(word in told for word in ("redis", "valkey", "127.0.0.1", "connect"))
        before = undecided(service, "closed")
        assert await ask_at_once([service], consumer, 20) == {503: 20}
        assert undecided(service, "closed") == before + 20
        assert len(upstream.requests) == 1
        assert await service.balance(consumer) == (99_900_000, 0)
        valkey.start()
        response = await until_status(service, consumer, 200)
        assert response.header("X-RateLimit-Remaining") == "4", "refused calls took nothing"


async def test_wa7_open_calls_go_on_within_each_services_own_limits(database_url: str, valkey: Valkey) -> None:
    async with running_service(database_url, shared(valkey, "open")) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 5)
        for _ in range(3):
            assert (await ask(service, consumer)).status == 200
        valkey.kill()
        # What the store let in counts here too.
        assert await ask_at_once([service], consumer, 10) == {200: 2, 429: 8}
        response = await ask(service, consumer)
        assert (response.status, response.header("X-RateLimit-Remaining")) == (429, "0")
        assert 55 <= int(response.header("Retry-After") or 0) <= 60
        assert undecided(service, "open") == 11
        assert undecided(service, "closed") == 0
        valkey.start()
        response = await until_status(service, consumer, 200)
        assert response.header("X-RateLimit-Remaining") == "4", "a new store has forgotten"


@pytest.mark.parametrize(("mode", "status"), [("closed", 503), ("open", 200)])
async def test_a_hanging_store_does_not_hold_calls_up(
    database_url: str, valkey: Valkey, mode: str, status: int
) -> None:
    async with running_service(database_url, shared(valkey, mode)) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1000)
        assert (await ask(service, consumer)).status == 200
        valkey.hang()
        assert await ask_at_once([service], consumer, 5) == {status: 5}
        for _ in range(50):
            assert (await ask(service, consumer)).status == status
        assert undecided(service, mode, "timeout") <= 25, "not one in two waited its 100 ms"
        assert undecided(service, mode) == 55
        valkey.go_on()
        with watchdog("the store to decide again"):
            before = -1.0
            while before != (before := undecided(service, mode)):
                assert (await ask(service, consumer)).status in (200, status)
        assert (await ask(service, consumer)).status == 200


@pytest.mark.parametrize(("mode", "status"), [("closed", 503), ("open", 200)])
async def test_a_store_that_is_not_there_at_the_start_is_found_later(
    database_url: str, valkey: Valkey, mode: str, status: int
) -> None:
    valkey.kill()
    async with running_service(database_url, shared(valkey, mode)) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream, 1000)
        assert (await ask(service, consumer)).status == status
        valkey.start()
        with watchdog("the store to be found"):
            while not valkey.names() - {"callora:pace:{trial}:user", "callora:pace:{trial}:key"}:
                await ask(service, consumer)


async def test_the_metrics_say_whether_the_store_answers(database_url: str, valkey: Valkey) -> None:
    async def up(service: RunningService) -> str:
        text = (await call(service.port, "GET", "/api/metrics")).body.decode()
        return text.partition("\ncallora_rate_limit_store_up ")[2].partition("\n")[0]

    async with running_service(database_url, shared(valkey)) as service:
        assert await up(service) == "1.0"
        valkey.kill()
        with watchdog("the loss to be shown"):
            while await up(service) != "0.0":  # noqa: ASYNC110 - a scrape is all there is
                await trio.sleep(0.01)
    with closed_port() as port:
        async with running_service(database_url, {"REDIS_URL": f"redis://127.0.0.1:{port}"}) as service:
            assert await up(service) == "0.0"
