"""Answers that come before the body of their request: the connection goes on, or they say that it does not.

A client that was not told of an end may have sent its next request by then, and cannot know what became of it.
"""

import pytest

from callora.http.gateway.client import DISCARD_BYTES_MAX
from callora.http.gateway.exchange import SMALL_BODY_BYTES
from tests.support.client import ClosedEarly, RawClient, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Exchange, chunk_bytes, head_bytes, raw_upstream

PATH = "/v1/call/early/x"
FIRST_BYTES = SMALL_BODY_BYTES
"""So much of a body that is passed on as it arrives, beside its answer, since what is longer is not kept in memory."""


async def answer_at_once(exchange: Exchange) -> None:
    """Answer before anything of the body is read."""
    await exchange.send(head_bytes(401, [("Content-Length", "5")]) + b"early")


async def ready(service: RunningService, url: str) -> Consumer:
    await service.api("early", url)
    return await service.consumer("1")


def begun(path: str, headers: list[tuple[str, str]], length: int, framing: str) -> tuple[bytes, bytes]:
    """Return the beginning of a request and the rest of it."""
    body = bytes(length)
    if framing == "length":
        return request_bytes("POST", path, [*headers, ("Content-Length", str(length))]) + body[:FIRST_BYTES], body[
            FIRST_BYTES:
        ]
    chunks = chunk_bytes(body[:FIRST_BYTES]), chunk_bytes(body[FIRST_BYTES:]) + b"0\r\n\r\n"
    return request_bytes("POST", path, [*headers, ("Transfer-Encoding", "chunked")]) + chunks[0], chunks[1]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("rest", [1, 20_000, DISCARD_BYTES_MAX])
async def test_the_next_request_follows_a_body_that_was_answered_too_early(
    database_url: str, framing: str, rest: int
) -> None:
    async with running_service(database_url) as service, raw_upstream(answer_at_once) as upstream:
        consumer = await ready(service, upstream.url)
        first, others = begun(PATH, consumer.headers, FIRST_BYTES + rest, framing)
        async with RawClient.connect(port=service.port) as client:
            for _ in range(3):
                await client.send(first)
                answer = await client.read_response()
                assert (answer.status, answer.body, answer.header("Connection")) == (401, b"early", None)
                await client.send(others)
            await client.send(request_bytes("GET", PATH, consumer.headers))
            assert (await client.read_response()).status == 401


@pytest.mark.parametrize("known", [True, False])
async def test_a_rest_too_long_to_be_dropped_ends_the_connection_and_the_answer_says_so(
    database_url: str, known: bool
) -> None:
    async with running_service(database_url) as service, raw_upstream(answer_at_once) as upstream:
        consumer = await ready(service, upstream.url)
        headers = consumer.headers if known else []
        first, rest = begun(PATH, headers, FIRST_BYTES + DISCARD_BYTES_MAX + 100_000, "length")
        async with RawClient.connect(port=service.port) as client:
            await client.send(first)
            answer = await client.read_response()
            assert (answer.status, answer.header("Connection")) == (401, "close")
            await client.send(rest)
            with watchdog("the end of the connection"), pytest.raises(ClosedEarly):
                await client.read_response()


async def test_the_rest_surface_does_the_same(database_url: str) -> None:
    async with running_service(database_url) as service:
        first, rest = begun("/api/keys", [("Content-Type", "application/json")], FIRST_BYTES + 20_000, "chunked")
        async with RawClient.connect(port=service.port) as client:
            for _ in range(3):
                await client.send(first)
                answer = await client.read_response()
                assert (answer.status, answer.header("Connection")) == (401, None)
                await client.send(rest)


async def test_a_rest_that_never_comes_is_not_waited_for_long(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.http.gateway.client.DISCARD_SECONDS_MAX", 0.01)
    monkeypatch.setattr("callora.http.gateway.client.LINGER_SECONDS_MAX", 0.01)
    async with running_service(database_url) as service, raw_upstream(answer_at_once) as upstream:
        consumer = await ready(service, upstream.url)
        first, _ = begun(PATH, consumer.headers, FIRST_BYTES + 1, "length")
        async with RawClient.connect(port=service.port) as client:
            await client.send(first)
            assert (await client.read_response()).status == 401
            with watchdog("the end of the connection"), pytest.raises(ClosedEarly):
                await client.read_response()
