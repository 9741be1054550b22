"""Upstream faults: every way to fail has one answer, costs what the table says, and harms no other call."""

import pytest
import trio

from callora.ledger.money import parse_usdc
from tests.support.client import ClosedEarly, RawClient, RawResponse, call, closed_port, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import (
    Exchange,
    Handler,
    RawUpstream,
    chunk_bytes,
    chunked,
    close_silently,
    dribble,
    echo,
    endless_headers,
    garbage,
    gated,
    head_bytes,
    raw,
    raw_upstream,
    reset_before_head,
    respond,
    sequence,
    silent,
    wrong_length,
)

PATH = "/v1/call/echo/x"
QUICK = {"PROXY_TIMEOUT_MS": "200", "HOLD_TTL_SECONDS": "5"}
PATIENT_BREAKER = {"PROXY_BREAKER_FAILURE_THRESHOLD": "1000"}


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


async def ask(service: RunningService, consumer: Consumer) -> RawResponse:
    return await call(service.port, "GET", PATH, consumer.headers)


def refused(response: RawResponse, status: int, code: str) -> None:
    assert (response.status, response.json()["code"]) == (status, code)
    assert "127.0.0.1" not in response.body.decode()


@pytest.mark.parametrize(
    ("name", "handler"),
    [
        ("closes", close_silently()),
        ("resets", reset_before_head()),
        ("garbage", garbage()),
        ("endless headers", endless_headers()),
        ("endless line", raw(b"HTTP/1.1 200 " + b"x" * 70_000, close=False)),
        ("HTTP/2", raw(b"HTTP/2 200 OK\r\n\r\n")),
        ("no status", raw(b"HTTP/1.1 OK\r\n\r\n")),
        ("bare LF", raw(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n")),
        ("two lengths", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx")),
        ("both framings", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("a fold", raw(b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n")),
        ("half a head", raw(b"HTTP/1.1 200 OK\r\nContent-")),
        ("a bad first chunk", raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")),
    ],
)
async def test_an_answer_that_is_none_is_a_bad_gateway_that_costs_nothing(
    database_url: str, name: str, handler: Handler
) -> None:
    async with running_service(database_url) as service, raw_upstream(handler) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            refused(await client.read_response(), 502, "BAD_GATEWAY")
            upstream.handler = respond(body=b"well again")
            await client.send(request_bytes("GET", PATH, consumer.headers))
            assert (await client.read_response()).body == b"well again"
        assert len(upstream.requests) == 2
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_a_refused_connection_is_a_bad_gateway(database_url: str) -> None:
    with closed_port() as port:
        async with running_service(database_url) as service:
            await service.api("echo", f"http://127.0.0.1:{port}")
            refused(await ask(service, await service.consumer("1")), 502, "BAD_GATEWAY")


async def test_a_name_that_does_not_resolve_is_a_bad_gateway(database_url: str) -> None:
    async with running_service(database_url) as service:
        await service.api("echo", "http://nowhere.invalid")
        consumer = await service.consumer("1")
        response = await ask(service, consumer)
        assert (response.status, response.json()["code"]) == (502, "BAD_GATEWAY")
        assert await service.events(consumer) == []


@pytest.mark.parametrize(
    "handler",
    [
        silent(),
        raw(b"HTTP/1.1 200 OK\r\nX-Begun: yes\r\n", close=False),
        raw(head_bytes(103) * 3, close=False),
        raw(head_bytes(100), close=False),
    ],
)
async def test_an_upstream_that_does_not_complete_its_head_in_time_is_a_timeout(
    database_url: str, handler: Handler
) -> None:
    async def stays(exchange: Exchange) -> None:
        await handler(exchange)
        await silent()(exchange)

    async with running_service(database_url, QUICK) as service, raw_upstream(stays) as upstream:
        consumer = await ready(service, upstream)
        refused(await ask(service, consumer), 504, "GATEWAY_TIMEOUT")
        await upstream.wait_peer_gone()
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("1"), 0)


async def test_a_head_that_trickles_past_its_time_is_a_timeout(database_url: str) -> None:
    async def trickle(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            await exchange.send(b"s")
            await trio.sleep(0.01)  # the pace itself is the fault

    async with running_service(database_url, QUICK) as service, raw_upstream(trickle) as upstream:
        consumer = await ready(service, upstream)
        refused(await ask(service, consumer), 504, "GATEWAY_TIMEOUT")


async def test_interim_answers_without_end_buy_no_time(database_url: str) -> None:
    async def stall(exchange: Exchange) -> None:
        while True:
            await exchange.send(head_bytes(103, [("Link", "</a>")]))
            await trio.sleep(0.01)  # the pace itself is the fault

    async with running_service(database_url, QUICK) as service, raw_upstream(stall) as upstream:
        consumer = await ready(service, upstream)
        refused(await ask(service, consumer), 504, "GATEWAY_TIMEOUT")


@pytest.mark.parametrize(
    "answer",
    [
        head_bytes(200, [("Content-Length", "5")]) + b"hello",
        head_bytes(200, [("Transfer-Encoding", "chunked")]) + chunk_bytes(b"hel") + chunk_bytes(b"lo") + b"0\r\n\r\n",
        head_bytes(103) + head_bytes(200, [("Content-Length", "5")]) + b"hello",
    ],
)
async def test_an_answer_byte_by_byte_is_as_good_as_any(database_url: str, answer: bytes) -> None:
    async with running_service(database_url) as service, raw_upstream(dribble(answer)) as upstream:
        consumer = await ready(service, upstream)
        for _ in range(2):
            assert (await ask(service, consumer)).body == b"hello"
        assert len(upstream.connections) == 1


async def test_a_body_at_a_byte_a_second_passes_while_it_lasts(database_url: str) -> None:
    async def drip(exchange: Exchange) -> None:
        await exchange.send(head_bytes(200, [("Content-Length", "3")]))
        for octet in b"abc":
            await trio.sleep(1.5)  # longer than PROXY_TIMEOUT_MS, which bounds the head alone
            await exchange.send(bytes([octet]))

    settings = {**QUICK, "PROXY_TIMEOUT_MS": "3000"}
    async with running_service(database_url, settings) as service, raw_upstream(drip) as upstream:
        consumer = await ready(service, upstream)
        assert (await ask(service, consumer)).body == b"abc"


@pytest.mark.parametrize(
    "handler",
    [
        wrong_length(100, 10),
        raw(head_bytes(200, [("Transfer-Encoding", "chunked")]) + chunk_bytes(b"x" * 10)),
    ],
)
async def test_a_body_cut_short_is_seen_as_cut_by_the_client(database_url: str, handler: Handler) -> None:
    async with running_service(database_url) as service, raw_upstream(handler) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            with pytest.raises(ClosedEarly):
                await client.read_response()
        upstream.handler = respond(body=b"well again")
        assert (await ask(service, consumer)).body == b"well again"


async def test_a_body_that_breaks_its_framing_on_the_way_is_seen_as_cut_by_the_client(database_url: str) -> None:
    gate = trio.Event()

    async def break_off(exchange: Exchange) -> None:
        await exchange.send(head_bytes(200, [("Transfer-Encoding", "chunked")]) + chunk_bytes(b"good"))
        await gate.wait()
        await exchange.send(b"nonsense\r\n")

    async with running_service(database_url) as service, raw_upstream(break_off) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            body = client.body(await client.read_head())
            piece = await client.read_piece(body)
            assert piece is not None
            assert piece.data == b"good"
            gate.set()
            with pytest.raises(ClosedEarly):
                await client.read_piece(body)
        await upstream.wait_peer_gone()


@pytest.mark.parametrize(
    "handler",
    [
        wrong_length(5, 50),
        raw(
            head_bytes(200, [("Transfer-Encoding", "chunked")]) + b"5\r\nxxxxx\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
            close=False,
        ),
        raw(head_bytes(204) + b"stray", close=False),
        raw(head_bytes(304) + head_bytes(200, [("Content-Length", "6")]) + b"forged", close=False),
    ],
)
async def test_bytes_behind_an_answer_never_become_the_answer_to_another_call(
    database_url: str, handler: Handler
) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(sequence(handler, respond(body=b"own"))) as upstream,
    ):
        consumer = await ready(service, upstream)
        first = await ask(service, consumer)
        assert first.body in (b"xxxxx", b"")
        assert (await ask(service, consumer)).body == b"own"
        assert len(upstream.connections) == 2


async def test_unasked_bytes_on_an_idle_connection_never_become_an_answer(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"own")) as upstream:
        consumer = await ready(service, upstream)
        await ask(service, consumer)
        forged = head_bytes(200, [("Content-Length", "6")]) + b"forged"
        await upstream.connections[0].stream.send_all(forged)
        assert (await ask(service, consumer)).body == b"own"
        await upstream.wait_peer_gone(1)
        assert len(upstream.connections) == 2


async def test_a_kept_connection_that_the_upstream_has_closed_is_replaced_unnoticed(database_url: str) -> None:
    async def once(exchange: Exchange) -> None:
        await echo()(exchange)
        await exchange.connection.close()

    async with running_service(database_url) as service, raw_upstream(once) as upstream:
        consumer = await ready(service, upstream)
        for number in range(5):
            body = b"%d" % number
            response = await call(service.port, "POST", PATH, consumer.headers, body)
            assert (response.status, response.body) == (200, body)
        assert [request.body for request in upstream.requests] == [b"0", b"1", b"2", b"3", b"4"]
        assert await service.balance(consumer) == (parse_usdc("0.95"), 0)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("handler", [close_silently(), reset_before_head()])
async def test_a_request_that_a_kept_connection_has_taken_is_never_sent_again(
    database_url: str, method: str, handler: Handler
) -> None:
    async with running_service(database_url) as service, raw_upstream(sequence(respond(), handler)) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, method, PATH, consumer.headers)).status == 200
        refused(await call(service.port, method, PATH, consumer.headers), 502, "BAD_GATEWAY")
        assert [request.connection for request in upstream.requests] == [1, 1]
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_an_upstream_that_says_close_gets_a_new_connection_each_time(database_url: str) -> None:
    answer = raw(head_bytes(200, [("Connection", "close"), ("Content-Length", "2")]) + b"ok", close=False)
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        for number in (1, 2, 3):
            assert (await ask(service, consumer)).body == b"ok"
            await upstream.wait_peer_gone(number)
        assert len(upstream.connections) == 3


async def test_connections_to_an_upstream_are_bounded_and_calls_wait_their_turn(database_url: str) -> None:
    gate = trio.Event()
    async with (
        running_service(database_url, {"UPSTREAM_POOL_MAX": "2"}) as service,
        raw_upstream(gated(gate, respond())) as upstream,
    ):
        consumer = await ready(service, upstream)
        statuses: list[int] = []

        async def one() -> None:
            statuses.append((await ask(service, consumer)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
            await upstream.wait_requests(2)
            gate.set()
        assert statuses == [200] * 10
        assert len(upstream.connections) == 2


async def test_a_call_whose_turn_does_not_come_in_time_is_refused_for_nothing(database_url: str) -> None:
    gate = trio.Event()
    async with (
        running_service(database_url, {"UPSTREAM_POOL_MAX": "1", "PROXY_CONNECT_TIMEOUT_MS": "200"}) as service,
        raw_upstream(gated(gate, respond())) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, consumer.headers))
            await upstream.wait_requests(1)
            response = await ask(service, consumer)
            refused(response, 503, "UPSTREAM_UNAVAILABLE")
            assert response.header("Retry-After") == "1"
            gate.set()
            assert (await client.read_response()).status == 200
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


@pytest.mark.parametrize(
    ("handler", "status"), [(respond(500), 500), (respond(503), 503), (close_silently(), 502), (silent(), 504)]
)
async def test_a_breaker_opens_after_so_many_failures_in_a_row_and_the_upstream_is_left_alone(
    database_url: str, handler: Handler, status: int
) -> None:
    # Only the silent one has little time: the others answer, however slow the machine.
    quick = QUICK if status == 504 else {}
    settings = {**quick, "PROXY_BREAKER_FAILURE_THRESHOLD": "3", "PROXY_BREAKER_COOLDOWN_MS": "30000"}
    async with running_service(database_url, settings) as service, raw_upstream(handler) as upstream:
        consumer = await ready(service, upstream)
        for _ in range(3):
            assert (await ask(service, consumer)).status == status
        for _ in range(3):
            response = await ask(service, consumer)
            refused(response, 503, "UPSTREAM_UNAVAILABLE")
            assert 28 <= int(response.header("Retry-After") or 0) <= 30
        assert len(upstream.requests) == 3
        await service.api("other", upstream.url)
        other = await call(service.port, "GET", "/v1/call/other/x", consumer.headers)
        assert other.status == status
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("1"), 0)


async def test_a_success_between_failures_keeps_a_breaker_closed_and_a_4xx_is_one(database_url: str) -> None:
    handlers = [handler for _ in range(4) for handler in (respond(500), respond(500), respond(404))]
    async with (
        running_service(database_url, {"PROXY_BREAKER_FAILURE_THRESHOLD": "3"}) as service,
        raw_upstream(sequence(*handlers)) as upstream,
    ):
        consumer = await ready(service, upstream)
        assert [(await ask(service, consumer)).status for _ in range(12)] == [500, 500, 404] * 4


async def test_a_half_open_breaker_lets_exactly_one_call_through_and_closes_on_its_success(database_url: str) -> None:
    settings = {"PROXY_BREAKER_FAILURE_THRESHOLD": "2", "PROXY_BREAKER_COOLDOWN_MS": "100"}
    gate = trio.Event()
    async with running_service(database_url, settings) as service, raw_upstream(respond(500)) as upstream:
        consumer = await ready(service, upstream)
        for _ in range(2):
            assert (await ask(service, consumer)).status == 500
        upstream.handler = gated(gate, respond(200))

        async def probe() -> None:
            with watchdog("the trial"):
                while (await ask(service, consumer)).status != 200:
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe)
            await upstream.wait_requests(3)
            for _ in range(5):
                refused(await ask(service, consumer), 503, "UPSTREAM_UNAVAILABLE")
            assert len(upstream.requests) == 3
            gate.set()
        for _ in range(5):
            assert (await ask(service, consumer)).status == 200


@pytest.mark.parametrize("how", ["client gone", "refused by the balance"])
async def test_a_trial_that_was_given_up_neither_closes_a_breaker_nor_wedges_it(database_url: str, how: str) -> None:
    settings = {"PROXY_BREAKER_FAILURE_THRESHOLD": "1", "PROXY_BREAKER_COOLDOWN_MS": "100"}
    async with running_service(database_url, settings) as service, raw_upstream(respond(500)) as upstream:
        consumer, poor = await ready(service, upstream), await service.consumer("0")
        assert (await ask(service, consumer)).status == 500
        if how == "client gone":
            upstream.handler = silent()
            with watchdog("a trial to be under way"):
                while len(upstream.requests) < 2:
                    async with RawClient.connect(port=service.port) as client:
                        await client.send(request_bytes("GET", PATH, consumer.headers))
                        with trio.move_on_after(0.05):
                            await client.wire.fill()
                        await client.reset()
        else:
            with watchdog("a trial to be refused"):
                while (await ask(service, poor)).status != 402:
                    pass
        upstream.handler = respond(200)
        with watchdog("the next trial"):
            while (await ask(service, consumer)).status != 200:
                pass


async def test_a_failing_api_harms_no_other(database_url: str) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(silent()) as stuck,
        raw_upstream(chunked([b"fine"])) as upstream,
    ):
        consumer = await ready(service, upstream)
        await service.api("stuck", stuck.url)
        async with trio.open_nursery() as nursery:

            async def hang() -> None:
                async with RawClient.connect(port=service.port) as client:
                    await client.send(request_bytes("GET", "/v1/call/stuck/x", consumer.headers))
                    await trio.sleep_forever()

            for _ in range(50):
                nursery.start_soon(hang)
            await stuck.wait_requests(50)
            for _ in range(5):
                assert (await ask(service, consumer)).body == b"fine"
            nursery.cancel_scope.cancel()
