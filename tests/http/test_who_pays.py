"""Who pays, row by row of the published table: the answer, the balance, the usage event, and what the upstream saw."""

import ssl
from collections.abc import Sequence

import pytest
import trio
import trustme

from callora.ledger.money import Stroops, format_usdc, parse_usdc
from callora.store.accounts import PricedEndpoint
from tests.support.client import RawClient, RawResponse, call, closed_port, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import (
    RawUpstream,
    big,
    close_silently,
    endless_headers,
    garbage,
    gated,
    raw_upstream,
    reset_amid_body,
    reset_before_head,
    respond,
    silent,
    sse,
    wrong_length,
)

FULL = parse_usdc("1")
PRICE = parse_usdc("0.01")
Event = tuple[str, str | None, int | None, int | None]


async def closed_events(service: RunningService, consumer: Consumer) -> list[Event]:
    """Return the consumer's usage events once all of them are closed: state, outcome, amount, status."""
    with watchdog("every usage event to be closed"):
        while True:
            events = await service.events(consumer)
            if all(event[0] != "held" for event in events):
                return events


async def expect(
    service: RunningService,
    consumer: Consumer,
    *,
    paid: int = 0,
    events: Sequence[Event] = (),
    upstream: RawUpstream | None = None,
    requests: int = 0,
) -> None:
    """Check all that a call may leave behind."""
    assert await closed_events(service, consumer) == list(events)
    assert await service.balance(consumer) == (FULL - paid, 0)
    if upstream is not None:
        assert len(upstream.requests) == requests


async def make_billable(service: RunningService, statuses: str) -> None:
    await service.database.execute("UPDATE api_endpoints SET billable_statuses = $1", statuses)


def refused(response: RawResponse, status: int, code: str) -> None:
    assert (response.status, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("key", "path", "status", "code"),
    [
        ("none", "/v1/call/echo/x", 401, "UNAUTHORIZED"),
        ("mistyped", "/v1/call/echo/x", 401, "UNAUTHORIZED"),
        ("good", "/v1/call/nothing/x", 404, "NOT_FOUND"),
        ("good", "/v1/call/echo/a/../b", 400, "BAD_REQUEST"),
        ("good", "/v1/call/costly/x", 402, "INSUFFICIENT_BALANCE"),
        ("good", "/v1/call/blocked/x", 502, "UPSTREAM_TARGET_BLOCKED"),
    ],
)
async def test_refused_before_the_upstream_costs_nothing(
    database_url: str, key: str, path: str, status: int, code: str
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        await service.api("costly", upstream.url, [PricedEndpoint("*", "*", parse_usdc("1.0000001"))])
        await service.api("blocked", f"http://169.254.169.254:{upstream.port}")
        consumer = await service.consumer("1")
        presented = {"none": "", "mistyped": consumer.api_key[:-1] + "-", "good": consumer.api_key}[key]
        response = await call(service.port, "GET", path, [("X-Api-Key", presented)] if presented else [])
        refused(response, status, code)
        await expect(service, consumer, upstream=upstream)
        if code == "INSUFFICIENT_BALANCE":
            assert response.json()["details"] == {"required": "1.0000001", "available": "1.0000000"}


async def test_a_failed_connection_costs_nothing_and_the_answer_shows_the_whole_balance(database_url: str) -> None:
    with closed_port() as port:
        async with running_service(database_url) as service:
            await service.api("echo", f"http://127.0.0.1:{port}")
            consumer = await service.consumer("1")
            response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
            refused(response, 502, "BAD_GATEWAY")
            assert response.header("X-Callora-Charge") == "0.0000000"
            assert response.header("X-Callora-Balance") == "1.0000000"
            await expect(service, consumer, events=[("released", "connect_failed", None, None)])


async def test_a_certificate_that_is_not_trusted_costs_nothing(database_url: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async with running_service(database_url) as service, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def shake(stream: trio.SocketStream) -> None:
            try:
                await trio.SSLStream(stream, context, server_side=True).do_handshake()
            except trio.BrokenResourceError:
                await trio.aclose_forcefully(stream)

        nursery.start_soon(trio.serve_listeners, shake, listeners)
        await service.api("echo", f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        consumer = await service.consumer("1")
        refused(await call(service.port, "GET", "/v1/call/echo/x", consumer.headers), 502, "BAD_GATEWAY")
        await expect(service, consumer, events=[("released", "connect_failed", None, None)])
        nursery.cancel_scope.cancel()


async def test_an_upstream_silent_past_its_time_costs_nothing_and_is_hung_up_on(database_url: str) -> None:
    settings = {"PROXY_TIMEOUT_MS": "200", "HOLD_TTL_SECONDS": "5"}
    async with running_service(database_url, settings) as service, raw_upstream(silent()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        refused(response, 504, "GATEWAY_TIMEOUT")
        assert response.header("X-Callora-Balance") == "1.0000000"
        await upstream.wait_peer_gone()
        await expect(service, consumer, events=[("released", "timeout", None, None)], upstream=upstream, requests=1)


@pytest.mark.parametrize("body", [b"", b"x" * 1000, b"x" * 200_000])
async def test_an_upstream_that_answers_no_request_of_this_size_in_time_is_a_timeout(
    database_url: str, body: bytes
) -> None:
    settings = {"PROXY_TIMEOUT_MS": "200", "HOLD_TTL_SECONDS": "5"}
    async with running_service(database_url, settings) as service, raw_upstream(silent()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "POST", "/v1/call/echo/x", consumer.headers, body)
        refused(response, 504, "GATEWAY_TIMEOUT")
        await expect(service, consumer, events=[("released", "timeout", None, None)])


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 226, 299])
async def test_a_success_costs_the_price(database_url: str, status: int) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status)) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.status == status
        assert response.header("X-Callora-Charge") == "0.0100000"
        assert response.header("X-Callora-Balance") == "0.9900000"
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, status)],
            upstream=upstream,
            requests=1,
        )


@pytest.mark.parametrize("status", [300, 302, 304, 400, 401, 402, 404, 429, 500, 502, 503, 599])
async def test_any_other_answer_is_free_by_default_and_passes_untouched(database_url: str, status: int) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status, body=b"no")) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert (response.status, response.body) == (status, b"" if status == 304 else b"no")
        assert response.header("X-Callora-Charge") == "0.0000000"
        assert response.header("X-Callora-Balance") == "1.0000000"
        await expect(
            service,
            consumer,
            events=[("released", "upstream_status", None, status)],
            upstream=upstream,
            requests=1,
        )


@pytest.mark.parametrize(
    ("billable", "status", "paid"),
    [("2xx,404", 404, True), ("2xx,404", 410, False), ("3xx", 301, True), ("5xx", 500, True), ("4xx", 200, False)],
)
async def test_an_endpoint_may_declare_which_answers_cost_the_price(
    database_url: str, billable: str, status: int, paid: bool
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status)) as upstream:
        await service.api("echo", upstream.url)
        await make_billable(service, billable)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.header("X-Callora-Charge") == ("0.0100000" if paid else "0.0000000")
        event: Event = (
            ("captured", "delivered", PRICE, status) if paid else ("released", "upstream_status", None, status)
        )
        await expect(service, consumer, paid=PRICE if paid else 0, events=[event], upstream=upstream, requests=1)


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_before_the_answer_pays_nothing_and_its_upstream_is_cancelled(
    database_url: str, how: str
) -> None:
    async with running_service(database_url) as service, raw_upstream(silent()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            await upstream.wait_requests(1)
            if how == "reset":
                await client.reset()
            elif how == "close":
                await client.stream.aclose()
            else:
                await client.shut_write()
            await upstream.wait_peer_gone()
        await expect(service, consumer, events=[("released", "client_gone", None, None)], upstream=upstream, requests=1)


async def test_a_client_that_leaves_inside_its_own_body_pays_nothing(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            headers = [*consumer.headers, ("Content-Length", "200000")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers) + b"x" * 1000)
            await upstream.wait_requests(1)
            await client.reset()
            await upstream.wait_peer_gone()
        await expect(service, consumer, events=[("released", "client_gone", None, None)])
        assert not upstream.requests[0].complete


async def test_a_client_that_leaves_after_the_head_of_a_success_pays_the_price(database_url: str) -> None:
    first, never = trio.Event(), trio.Event()
    first.set()
    async with running_service(database_url) as service, raw_upstream(sse([(first, b"1"), (never, b"2")])) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            head = await client.read_head()
            assert head.header("X-Callora-Charge") == "0.0100000"
            await client.reset()
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, 200)],
            upstream=upstream,
            requests=1,
        )


async def test_a_client_that_reads_none_of_a_large_success_and_leaves_pays_the_price(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(big(64)) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            await client.read_head()
            await client.reset()
        await upstream.wait_peer_gone()
        await expect(service, consumer, paid=PRICE, events=[("captured", "delivered", PRICE, 200)])


@pytest.mark.parametrize(
    ("name", "status"),
    [("closes", 502), ("resets", 502), ("garbage", 502), ("endless headers", 502), ("switches protocols", 502)],
)
async def test_an_upstream_that_breaks_off_before_its_head_is_complete_costs_nothing(
    database_url: str, name: str, status: int
) -> None:
    handler = {
        "closes": close_silently(),
        "resets": reset_before_head(),
        "garbage": garbage(),
        "endless headers": endless_headers(),
        "switches protocols": respond(101),
    }[name]
    async with running_service(database_url) as service, raw_upstream(handler) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        refused(response, status, "BAD_GATEWAY")
        assert response.header("X-Callora-Balance") == "1.0000000"
        await expect(
            service, consumer, events=[("released", "upstream_failed", None, None)], upstream=upstream, requests=1
        )


async def test_a_success_cut_inside_its_body_costs_the_price_since_its_head_was_delivered(database_url: str) -> None:
    gate = trio.Event()
    async with running_service(database_url) as service, raw_upstream(reset_amid_body(10, 100, gate)) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            body = client.body(await client.read_head())
            assert await client.read_piece(body) is not None
            gate.set()
            assert await client.read_eof() == b""
        await expect(service, consumer, paid=PRICE, events=[("captured", "delivered", PRICE, 200)])


async def test_an_idempotent_success_cut_inside_its_body_was_not_delivered_and_costs_nothing(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(wrong_length(100, 10)) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        headers = [*consumer.headers, ("Idempotency-Key", "one")]
        refused(await call(service.port, "GET", "/v1/call/echo/x", headers), 502, "BAD_GATEWAY")
        await expect(service, consumer, events=[("released", "upstream_failed", None, 200)])


async def test_a_duplicate_of_an_idempotent_call_is_replayed_for_nothing(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(200, body=b"paid")) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        headers = [*consumer.headers, ("Idempotency-Key", "one")]
        first = await call(service.port, "POST", "/v1/call/echo/x", headers, b"body")
        second = await call(service.port, "POST", "/v1/call/echo/x", headers, b"body")
        assert (first.status, first.body) == (second.status, second.body) == (200, b"paid")
        assert first.header("Idempotent-Replayed") is None
        assert second.header("Idempotent-Replayed") == "true"
        assert first.header("X-Callora-Charge") == "0.0100000"
        assert second.header("X-Callora-Charge") == "0.0000000"
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, 200)],
            upstream=upstream,
            requests=1,
        )


@pytest.mark.parametrize("what", ["method", "path", "query", "body"])
async def test_the_same_idempotency_key_on_another_request_is_a_conflict(database_url: str, what: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        headers = [*consumer.headers, ("Idempotency-Key", "one")]
        await call(service.port, "POST", "/v1/call/echo/x?a=1", headers, b"body")
        other = {
            "method": ("PUT", "/v1/call/echo/x?a=1", b"body"),
            "path": ("POST", "/v1/call/echo/y?a=1", b"body"),
            "query": ("POST", "/v1/call/echo/x?a=2", b"body"),
            "body": ("POST", "/v1/call/echo/x?a=1", b"BODY"),
        }[what]
        response = await call(service.port, other[0], other[1], headers, other[2])
        refused(response, 409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, 200)],
            upstream=upstream,
            requests=1,
        )


async def test_a_duplicate_of_a_call_that_still_runs_is_told_so_for_nothing(database_url: str) -> None:
    gate = trio.Event()
    async with running_service(database_url) as service, raw_upstream(gated(gate, respond())) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        headers = [*consumer.headers, ("Idempotency-Key", "one")]
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", headers))
            await upstream.wait_requests(1)
            response = await call(service.port, "GET", "/v1/call/echo/x", headers)
            refused(response, 409, "IDEMPOTENCY_IN_PROGRESS")
            assert response.header("Retry-After") == "1"
            gate.set()
            assert (await client.read_response()).status == 200
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, 200)],
            upstream=upstream,
            requests=1,
        )


async def test_a_duplicate_of_an_answer_too_large_to_store_is_told_the_first_event_and_charge(
    database_url: str,
) -> None:
    settings = {"IDEMPOTENCY_MAX_BODY": "1kb"}
    async with (
        running_service(database_url, settings) as service,
        raw_upstream(respond(200, body=b"x" * 1025)) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        headers = [*consumer.headers, ("Idempotency-Key", "one")]
        first = await call(service.port, "GET", "/v1/call/echo/x", headers)
        assert (first.status, len(first.body)) == (200, 1025)
        second = await call(service.port, "GET", "/v1/call/echo/x", headers)
        refused(second, 409, "IDEMPOTENCY_NOT_REPLAYABLE")
        event_id = await service.database.fetch_value("SELECT event_id FROM usage_events")
        assert second.json()["details"] == {"eventId": str(event_id), "charge": "0.0100000"}
        await expect(
            service,
            consumer,
            paid=PRICE,
            events=[("captured", "delivered", PRICE, 200)],
            upstream=upstream,
            requests=1,
        )


@pytest.mark.parametrize("status", [200, 404])
async def test_a_free_endpoint_works_on_an_empty_vault_and_leaves_a_usage_event(database_url: str, status: int) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status)) as upstream:
        await service.api("echo", upstream.url, [PricedEndpoint("*", "*", Stroops(0))])
        consumer = await service.consumer("0")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.status == status
        assert response.header("X-Callora-Charge") == response.header("X-Callora-Balance") == format_usdc(0)
        event = ("captured", "delivered", 0, 200) if status == 200 else ("released", "upstream_status", None, 404)
        assert await closed_events(service, consumer) == [event]
        assert await service.balance(consumer) == (0, 0)


async def test_a_request_body_that_breaks_its_framing_on_the_way_costs_nothing(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        async with RawClient.connect(port=service.port) as client:
            headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers) + b"5\r\nhello\r\n")
            await upstream.wait_requests(1)
            await client.send(b"nonsense\r\n")
            refused(await client.read_response(), 400, "BAD_REQUEST")
            assert await client.read_eof() == b""
        await expect(service, consumer, events=[("released", "bad_request_body", None, None)])
        assert not upstream.requests[0].complete
