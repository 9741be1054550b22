"""Bad input over real sockets: the whole attack corpus, upgrades, and clients that take their time."""

import contextlib
import re
from functools import partial

import pytest
import trio

from tests.http.attacks import ATTACKS, Attack
from tests.support.client import RawClient, call, request_bytes
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, raw_upstream, respond

PATH = "/v1/call/echo/x"
AT_ONCE = 96
IMPATIENT = {"CLIENT_HEAD_TIMEOUT_MS": "300", "CLIENT_IDLE_TIMEOUT_MS": "300", "CLIENT_BODY_TIMEOUT_MS": "300"}
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n")


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("100")


async def attack(service: RunningService, consumer: Consumer, number: int, each: Attack) -> list[int]:
    """Send one attack and return the statuses of its answers, up to the end of the connection."""
    raw = each.render(b"/v1/call/echo/attack-%d" % number, consumer.api_key.encode(), b"127.0.0.1")
    async with RawClient.connect(port=service.port, watchdog_seconds=60) as client, trio.open_nursery() as nursery:

        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError):  # refused before it was sent whole
                await client.send(raw)

        nursery.start_soon(send)
        answers = await client.read_eof()
    return [int(status) for status in _STATUS.findall(answers)]


async def test_every_attack_is_refused_or_read_as_the_one_request_it_is(database_url: str) -> None:
    """A refused one is answered 4xx and its connection closed; no request behind it ever reaches the upstream."""
    settings = {"CLIENT_IDLE_TIMEOUT_MS": "2000"}  # more than any pause between a connect and its first bytes
    async with running_service(database_url, settings) as service, raw_upstream(respond(body=b"ok")) as upstream:
        consumer = await ready(service, upstream)
        statuses: dict[int, list[int]] = {}
        limiter = trio.CapacityLimiter(AT_ONCE)

        async def one(number: int, each: Attack) -> None:
            async with limiter:
                statuses[number] = await attack(service, consumer, number, each)

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for number, each in enumerate(ATTACKS):
                    nursery.start_soon(one, number, each)

        reached: dict[int, list[bool]] = {number: [] for number in range(len(ATTACKS))}
        for request in upstream.requests:
            assert "smuggled" not in request.target
            target = re.match(r"/attack-([0-9]+)", request.target)
            assert target is not None, request.raw_head
            reached[int(target[1])].append(request.complete)
        wrong: list[str] = []
        for number, each in enumerate(ATTACKS):
            got = statuses[number]
            if each.verdict == "refused":
                fine = len(got) == 1 and 400 <= got[0] < 500 and reached[number] in ([], [False])
            else:
                fine = reached[number] == [True] and 200 in got and all(status < 500 for status in got)
            if not fine:
                wrong.append(f"{each.name}: answered {got}, upstream saw {reached[number]}")
        assert not wrong, f"{len(wrong)} of {len(ATTACKS)}:\n" + "\n".join(wrong)
        await service.until_no_hold(consumer)
        charged = sum(event[0] == "captured" for event in await service.events(consumer))
        assert charged == sum(each.verdict == "one" for each in ATTACKS)


@pytest.mark.parametrize(
    "headers",
    [
        [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")],
        [("connection", "keep-alive, upgrade"), ("upgrade", "WebSocket")],
        [("Connection", "Upgrade"), ("Upgrade", "TLS/1.0")],
        [("Connection", "Upgrade"), ("Upgrade", "h3")],
    ],
)
@pytest.mark.parametrize("path", [PATH, "/api/health"])
async def test_an_upgrade_is_refused_and_the_connection_closed(
    database_url: str, headers: list[tuple[str, str]], path: str
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", path, [*consumer.headers, *headers]) + b"\x81\x85")
            response = await client.read_response()
            assert (response.status, response.json()["code"]) == (400, "UPGRADE_NOT_SUPPORTED")
            assert response.header("Connection") == "close"
            assert await client.read_eof() == b""
        assert upstream.requests == []


@pytest.mark.parametrize("path", [PATH, "/api/health"])
async def test_an_offer_of_h2c_is_ignored(database_url: str, path: str) -> None:
    offer = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQ")]
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", path, [*consumer.headers, *offer])).status == 200
        for request in upstream.requests:
            assert request.header("Upgrade") is request.header("HTTP2-Settings") is request.header("Connection") is None


async def test_an_upgrade_that_connection_does_not_name_is_none(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        headers = [*consumer.headers, ("Upgrade", "websocket")]
        assert (await call(service.port, "GET", PATH, headers)).status == 200
        assert upstream.requests[0].header("Upgrade") is None


@pytest.mark.parametrize("begun", [b"G", b"GET /v1/call/echo/x HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n"])
async def test_a_head_that_does_not_arrive_in_time_is_refused_and_closed(database_url: str, begun: bytes) -> None:
    async with running_service(database_url, IMPATIENT) as service, raw_upstream(respond()) as upstream:
        await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(begun)
            response = await client.read_response()
            assert (response.status, response.json()["code"]) == (408, "REQUEST_TIMEOUT")
            assert await client.read_eof() == b""
        assert upstream.requests == []


async def test_a_head_that_trickles_in_has_no_more_time_than_any_other(database_url: str) -> None:
    async with running_service(database_url, IMPATIENT) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        raw = request_bytes("GET", PATH, [*consumer.headers, ("X-Slow", "s" * 2000)])
        async with RawClient.connect(port=service.port) as client, trio.open_nursery() as nursery:

            async def trickle() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    for octet in raw:
                        await client.send(bytes([octet]))
                        await trio.sleep(0.005)  # the pace itself is the attack

            nursery.start_soon(trickle)
            assert (await client.read_response()).status == 408
            nursery.cancel_scope.cancel()
        assert upstream.requests == []


async def test_a_connection_that_says_nothing_is_closed_in_silence(database_url: str) -> None:
    async with running_service(database_url, IMPATIENT) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            assert await client.read_eof() == b""
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            assert (await client.read_response()).status == 200
            assert await client.read_eof() == b""


@pytest.mark.parametrize(
    ("field", "begun"),
    [
        (("Content-Length", "10"), b"short"),
        (("Content-Length", "1000000"), b"x" * 1000),
        (("Transfer-Encoding", "chunked"), b"5\r\nhel"),
        (("Transfer-Encoding", "chunked"), b""),
    ],
)
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_body_that_does_not_arrive_in_time_is_refused_and_costs_nothing(
    database_url: str, field: tuple[str, str], begun: bytes, keyed: bool
) -> None:
    async with running_service(database_url, IMPATIENT) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        headers = [*consumer.headers, field, *([("Idempotency-Key", "one")] if keyed else [])]
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("POST", PATH, headers) + begun)
            response = await client.read_response()
            assert (response.status, response.json()["code"]) == (408, "REQUEST_TIMEOUT")
            assert await client.read_eof() == b""
        await service.until_no_hold(consumer)
        assert (await service.balance(consumer))[0] == 100 * 10**7
        assert not any(request.complete for request in upstream.requests)


async def test_a_crowd_of_slow_clients_does_not_keep_others_waiting(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        async with contextlib.AsyncExitStack() as crowd:
            for _ in range(100):
                client = await crowd.enter_async_context(RawClient.connect(port=service.port))
                await client.send(b"POST /v1/call/echo/x HTTP/1.1\r\nHost: a\r\n")
            assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200


async def test_one_connection_past_the_most_is_turned_away_and_told_so(database_url: str) -> None:
    async with (
        running_service(database_url, {"CLIENT_MAX_CONNECTIONS": "2"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as one, RawClient.connect(port=service.port) as other:
            for client in (one, other):
                await client.send(request_bytes("GET", PATH, consumer.headers))
                assert (await client.read_response()).status == 200
            async with RawClient.connect(port=service.port) as third:
                response = await third.read_response()
                assert (response.status, response.header("Connection")) == (503, "close")
                assert response.header("Retry-After") == "1"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_past_the_limit_is_refused_and_costs_nothing(database_url: str, framing: str) -> None:
    body = b"x" * 100_001
    async with (
        running_service(database_url, {"GATEWAY_BODY_LIMIT": "100000b"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        if framing == "length":
            response = await call(service.port, "POST", PATH, consumer.headers, body)
        else:
            headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
            sent = b"%x\r\n%b\r\n" % (len(body), body) + b"0\r\n\r\n"
            response = await call(service.port, "POST", PATH, headers, sent)
        assert (response.status, response.json()["code"]) == (413, "REQUEST_BODY_TOO_LARGE")
        await service.until_no_hold(consumer)
        assert (await service.balance(consumer))[0] == 100 * 10**7
        assert not any(request.complete for request in upstream.requests)


async def test_requests_cut_off_anywhere_leave_nothing_behind(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        raw = request_bytes("POST", PATH, consumer.headers, b"x" * 20)

        async def cut(length: int) -> None:
            async with RawClient.connect(port=service.port) as client:
                await client.send(raw[:length])
                await client.reset()

        async with trio.open_nursery() as nursery:
            for length in range(0, len(raw), 3):
                nursery.start_soon(partial(cut, length))
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        await service.until_no_hold(consumer)
        assert (await service.balance(consumer))[0] == 100 * 10**7 - 10**5
