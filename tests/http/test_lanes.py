"""Lanes: calls and the REST surface share a port, a parser and a connection, in any order."""

import pytest
import trio

from tests.support.client import RawClient, call, request_bytes
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, chunk_bytes, echo, raw_upstream, respond

PATH = "/v1/call/echo/x"
HEALTH = "/api/health"


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


async def test_one_connection_carries_calls_and_rest_in_any_order(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            for number, lane in enumerate("crrcccrcrr"):
                if lane == "c":
                    body = b"%d" % number
                    await client.send(request_bytes("POST", PATH, consumer.headers, body))
                    response = await client.read_response()
                    assert (response.status, response.body) == (200, body)
                    assert response.header("X-Callora-Charge") == "0.0100000"
                else:
                    await client.send(request_bytes("GET", HEALTH))
                    response = await client.read_response()
                    assert response.status == 200
                    assert response.json()["status"] == "ok"
                    assert response.header("X-Callora-Charge") is None
        assert len(upstream.requests) == 5
        assert await service.balance(consumer) == (9_500_000, 0)


async def test_requests_of_both_lanes_in_one_segment_are_answered_in_their_order(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        chunked_call = request_bytes(
            "POST", PATH, [*consumer.headers, ("Transfer-Encoding", "chunked")], chunk_bytes(b"two") + b"0\r\n\r\n"
        )
        segment = (
            request_bytes("POST", PATH, consumer.headers, b"one")
            + request_bytes("GET", HEALTH)
            + chunked_call
            + request_bytes("HEAD", HEALTH)
            + request_bytes("GET", "/api/nothing")
            + request_bytes("POST", PATH, consumer.headers, b"three")
        )
        async with RawClient.connect(port=service.port) as client:
            await client.send(segment)
            assert (await client.read_response()).body == b"one"
            assert (await client.read_response()).json()["status"] == "ok"
            assert (await client.read_response()).body == b"two"
            assert (await client.read_response("HEAD")).status == 200
            assert (await client.read_response()).status == 404
            assert (await client.read_response()).body == b"three"


async def test_a_rest_refusal_leaves_the_connection_to_calls(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("POST", "/api/nothing", [("X-Request-Id", "r-1")], b"x" * 1000))
            response = await client.read_response()
            assert (response.status, response.json()["code"]) == (404, "NOT_FOUND")
            assert response.json()["requestId"] == response.header("X-Request-Id") == "r-1"
            await client.send(request_bytes("POST", PATH, consumer.headers, b"call"))
            assert (await client.read_response()).body == b"call"


@pytest.mark.parametrize(
    "path", ["/v1/call", "/v1/callx/echo", "/V1/call/echo/x", "/v1//call/echo/x", "//v1/call/echo/x"]
)
async def test_what_only_resembles_the_route_of_calls_is_not_one(database_url: str, path: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", path, consumer.headers)
        assert (response.status, response.json()["code"]) == (404, "NOT_FOUND")
        assert upstream.requests == []


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_rest_body_past_its_limit_is_refused_and_the_answer_arrives(database_url: str, framing: str) -> None:
    body = b"x" * 2000
    async with running_service(database_url, {"REQUEST_BODY_LIMIT": "1kb"}) as service:
        if framing == "length":
            response = await call(service.port, "POST", HEALTH, [], body)
        else:
            sent = chunk_bytes(body) + b"0\r\n\r\n"
            response = await call(service.port, "POST", HEALTH, [("Transfer-Encoding", "chunked")], sent)
        assert response.status in (405, 413)
        assert response.json()["code"] in ("METHOD_NOT_ALLOWED", "REQUEST_BODY_TOO_LARGE")


async def test_probes_answer_while_calls_are_stuck_on_every_connection(database_url: str) -> None:
    gate = trio.Event()

    async def stuck(exchange: object) -> None:
        await gate.wait()

    async with running_service(database_url) as service, raw_upstream(stuck) as upstream:
        consumer = await ready(service, upstream)
        async with trio.open_nursery() as nursery:

            async def hang() -> None:
                async with RawClient.connect(port=service.port) as client:
                    await client.send(request_bytes("GET", PATH, consumer.headers))
                    await trio.sleep_forever()

            for _ in range(50):
                nursery.start_soon(hang)
            await upstream.wait_requests(50)
            for path in ("/livez", "/readyz", HEALTH):
                assert (await call(service.port, "GET", path)).status == 200
            nursery.cancel_scope.cancel()
        gate.set()


async def test_many_connections_mix_both_lanes_at_once(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)

        async def one(number: int) -> None:
            async with RawClient.connect(port=service.port) as client:
                for step in range(4):
                    if (number + step) % 2:
                        body = b"%d-%d" % (number, step)
                        await client.send(request_bytes("POST", PATH, consumer.headers, body))
                        assert (await client.read_response()).body == body
                    else:
                        await client.send(request_bytes("GET", HEALTH))
                        assert (await client.read_response()).json()["status"] == "ok"

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number)
        assert await service.balance(consumer) == (10_000_000 - 60 * 100_000, 0)


async def test_a_client_cannot_tell_the_rest_server_who_it_is(database_url: str) -> None:
    async with running_service(database_url) as service:
        headers = [("X-Forwarded-For", "192.0.2.1"), ("X-Request-Id", "r-1")]
        response = await call(service.port, "GET", HEALTH, headers)
        assert (response.status, response.header("X-Request-Id")) == (200, "r-1")
