"""The outbound client: one request, one reply or a fault in time, and never to an address that may not be called."""

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any, Final

import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from callora.outbound.addresses import AddressPolicy
from callora.outbound.client import EVERYWHERE, Outbound, OutboundFault, OutboundPolicy, Reply, open_outbound
from tests.support.client import watchdog
from tests.support.upstream import (
    MIB,
    Exchange,
    Handler,
    RawUpstream,
    big,
    close_silently,
    echo,
    endless_headers,
    garbage,
    interim,
    raw,
    raw_upstream,
    reset_amid_body,
    reset_before_head,
    respond,
    sequence,
    silent,
    wrong_length,
)

LOCAL: Final = OutboundPolicy(AddressPolicy(networks=(ip_network("127.0.0.0/8"),)), plain="anywhere")
PUBLIC: Final = OutboundPolicy(AddressPolicy(), plain="anywhere")


async def send(
    outbound: Outbound, url: str, body: bytes = b"hello", *, seconds_max: float = 60.0, reply_bytes_max: int = 65536
) -> Reply:
    """Return the reply to a POST."""
    with watchdog(f"the exchange with {url}"):
        return await outbound.exchange(
            "POST", url, {"X-Kind": "test"}, body, seconds_max=seconds_max, reply_bytes_max=reply_bytes_max
        )


@asynccontextmanager
async def outbound_to(handler: Handler) -> AsyncIterator[tuple[Outbound, str, RawUpstream]]:
    async with raw_upstream(handler) as upstream, open_outbound(LOCAL) as outbound:
        yield outbound, upstream.url, upstream


async def test_a_request_arrives_as_it_was_given_and_its_reply_comes_back() -> None:
    async with outbound_to(echo([("X-One", "a"), ("x-one", "b")])) as (outbound, url, upstream):
        reply = await send(outbound, f"{url}/hooks/?of=callora&x=%20", b"body")
        assert reply == Reply(200, {"x-one": "a, b", "content-length": "4"}, b"body", whole=True)
        request = upstream.requests[0]
        assert (request.method, request.target) == ("POST", "/hooks/?of=callora&x=%20")
        assert request.headers == [
            ("Host", url.removeprefix("http://")),
            ("X-Kind", "test"),
            ("Content-Length", "4"),
        ]
        got = await outbound.exchange("GET", url, {}, seconds_max=60, reply_bytes_max=10)
        assert (got.status, upstream.requests[1].target, upstream.requests[1].body) == (200, "/", b"")
        assert len(upstream.connections) == 1, "the connection was kept"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 404, 500, 599])
async def test_any_status_is_a_reply_and_a_redirect_is_not_followed(status: int) -> None:
    async with outbound_to(respond(status, [("Location", "/elsewhere")], b"no")) as (outbound, url, upstream):
        reply = await send(outbound, url)
        assert (reply.status, reply.body, reply.whole) == (status, b"no", True)
        assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (close_silently(), "malformed"),
        (reset_before_head(), "unreachable"),
        (garbage(), "malformed"),
        (endless_headers(), "malformed"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"), "malformed"),
    ],
    ids=["closes", "resets", "garbage", "endless headers", "two lengths"],
)
async def test_what_is_no_reply_is_a_fault_of_a_request_that_may_have_been_taken_up(
    handler: Handler, kind: str
) -> None:
    async with outbound_to(handler) as (outbound, url, upstream):
        with pytest.raises(OutboundFault) as caught:
            await send(outbound, url)
        assert (caught.value.kind, caught.value.perhaps_done) == (kind, True)
        upstream.handler = respond(200)
        assert (await send(outbound, url)).status == 200


@pytest.mark.parametrize(
    ("handler", "read"),
    [
        (big(10), 65536),
        (wrong_length(claimed=100, sent=10), 10),
        (wrong_length(claimed=10, sent=100), 10),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n"), 5),
        (interim([102, 103], respond(200, body=b"x" * 65537)), 65536),
    ],
    ids=["10 MiB", "too short", "too long", "bad chunk", "one byte more"],
)
async def test_a_reply_is_read_to_its_bound_and_one_that_breaks_off_is_still_a_reply(
    handler: Handler, read: int
) -> None:
    async with outbound_to(handler) as (outbound, url, upstream):
        reply = await send(outbound, url)
        assert (reply.status, len(reply.body)) == (200, read)
        assert reply.whole == (reply.headers.get("content-length") == "10")
        if not reply.whole:  # else what came too much is what the next request on that connection is answered with
            upstream.handler = respond(204)
            assert (await send(outbound, url)).status == 204


async def test_a_reply_that_is_reset_amid_its_body_is_a_reply_or_a_fault_and_no_crash() -> None:
    async with outbound_to(reset_amid_body(10, 100)) as (outbound, url, upstream):
        with contextlib.suppress(OutboundFault):  # the reset overtook the head
            reply = await send(outbound, url)
            assert (reply.status, reply.whole) == (200, False)
        assert len(upstream.requests) == 1


async def test_a_reply_is_as_long_as_its_bound_at_most_and_may_be_exactly_so_long() -> None:
    async with outbound_to(respond(200, body=b"x" * 1000)) as (outbound, url, _):
        assert (await send(outbound, url, reply_bytes_max=1000)).whole
        assert (await send(outbound, url, reply_bytes_max=999)).body == b"x" * 999
        assert (await send(outbound, url, reply_bytes_max=0)) == Reply(200, {"content-length": "1000"}, b"", False)


async def test_at_the_deadline_a_silent_peer_is_a_fault_and_a_slow_body_a_reply(mock_clock: MockClock) -> None:
    sent = trio.Event()

    async def stalls(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(b"HTTP/1.1 202 Accepted\r\nContent-Length: 100\r\n\r\nhalf")
        sent.set()
        await trio.sleep_forever()

    outcomes: list[Reply | OutboundFault] = []

    async def once(outbound: Outbound, url: str) -> None:
        try:
            outcomes.append(await send(outbound, url, seconds_max=10))
        except OutboundFault as fault:
            outcomes.append(fault)

    async with outbound_to(sequence(silent(), stalls)) as (outbound, url, upstream):
        with watchdog("both deadlines"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(once, outbound, url)
                await upstream.wait_requests(1)
                await wait_all_tasks_blocked()
                mock_clock.jump(10)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(once, outbound, url)
                await sent.wait()
                await wait_all_tasks_blocked()
                mock_clock.jump(10)
        fault, reply = outcomes
        assert isinstance(fault, OutboundFault)
        assert (fault.kind, fault.perhaps_done) == ("timeout", True)
        assert reply == Reply(202, {"content-length": "100"}, b"half", whole=False)


async def test_a_port_that_takes_no_connection_is_a_fault_with_nothing_done() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with open_outbound(LOCAL) as outbound:
        with pytest.raises(OutboundFault) as caught:
            await send(outbound, f"http://127.0.0.1:{port}/")
        assert (caught.value.kind, caught.value.perhaps_done) == ("unreachable", False)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "10.0.0.1"],
)
async def test_an_address_of_a_network_of_ours_gets_no_connection(host: str) -> None:
    async with raw_upstream(respond()) as upstream, open_outbound(PUBLIC) as outbound:
        url = f"http://{host}:{upstream.port}/"
        with pytest.raises(OutboundFault) as caught:
            await send(outbound, url)
        assert (caught.value.kind, caught.value.perhaps_done) == ("blocked", False)
        with pytest.raises(ValueError, match="private, local or reserved"):
            await outbound.check(url)
        assert upstream.connections == []


async def test_one_refused_address_of_a_name_refuses_the_name_and_its_second_answer_is_never_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [["93.184.216.34", "127.0.0.1"], ["127.0.0.1"]]
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if not host.endswith(".example"):
            return list(real(host, *arguments, **options))
        asked.append(host)
        found = answers[min(len(asked), 2) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    async with raw_upstream(respond()) as upstream, open_outbound(PUBLIC) as outbound:
        for _ in range(2):
            with pytest.raises(OutboundFault) as caught:
                await send(outbound, f"http://both.example:{upstream.port}/")
            assert caught.value.kind == "blocked"
        assert (asked, upstream.connections) == (["both.example"], [])


async def test_a_connection_goes_to_the_address_that_was_checked_under_the_name_that_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def pinned(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if not host.endswith(".example"):
            return list(real(host, *arguments, **options))
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "127.0.0.9", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", pinned)
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(server)
    names: list[str | None] = []
    server.sni_callback = lambda _, name, __: names.append(name)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with (
        raw_upstream(sequence(respond(200, body=b"hi"), big(1), respond(200, body=b"x")), tls=server) as upstream,
        open_outbound(LOCAL, tls=trusting) as outbound,
    ):
        url = f"https://hooks.example:{upstream.port}/"
        assert (await send(outbound, url)).body == b"hi"
        assert len((await send(outbound, url)).body) == 65536
        assert (await send(outbound, url)).body == b"x"
        assert asked == ["hooks.example"]
        assert set(names) == {"hooks.example"}
        assert upstream.requests[0].header("Host") == f"hooks.example:{upstream.port}"


async def test_a_certificate_of_another_name_is_a_fault_with_nothing_done() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with raw_upstream(respond(), tls=server) as upstream, open_outbound(LOCAL, tls=trusting) as outbound:
        with pytest.raises(OutboundFault) as caught:
            await send(outbound, upstream.url)
        assert (caught.value.kind, caught.value.perhaps_done) == ("unreachable", False)
        assert upstream.requests == []


async def test_a_peer_that_reads_nothing_holds_up_neither_a_cancellation_nor_the_end() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def stop(_: Exchange) -> None:
        await trio.sleep_forever()

    async with raw_upstream(stop, tls=server) as upstream, open_outbound(LOCAL, tls=trusting) as outbound:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, outbound, upstream.url, b"x" * (32 * MIB))
            await upstream.wait_requests(1)
            with watchdog("the cancelled exchange to end"):
                nursery.cancel_scope.cancel()


async def test_many_exchanges_share_few_connections() -> None:
    async with raw_upstream(echo()) as upstream, open_outbound(LOCAL, connections_max=3) as outbound:
        bodies: list[bytes] = []

        async def one(number: int) -> None:
            bodies.append((await send(outbound, upstream.url, b"%d" % number)).body)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number)
        assert sorted(bodies) == sorted(b"%d" % number for number in range(30))
        assert len(upstream.connections) <= 3


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.com/", "http:// or https://"),
        ("https://user@example.com/", "user name"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com/?a b", "spaces"),
        ("https://example.com/?a=<", "query"),
        ("https://example.com/../x", "path segment"),
        ("https://example.com:0/", "port"),
        ("http://example.com/", "https://"),
        ("http://127.0.0.1.nip.io/", "unless its host is localhost"),
    ],
)
async def test_a_url_that_requests_are_not_sent_to_says_why(url: str, why: str) -> None:
    policy = OutboundPolicy(EVERYWHERE, plain="localhost")
    with pytest.raises(ValueError, match=why):
        policy.read(url)
    async with open_outbound(policy) as outbound:
        with pytest.raises(ValueError, match=why):
            await outbound.exchange("GET", url, {}, seconds_max=1, reply_bytes_max=1)


def test_plain_http_goes_where_the_policy_says() -> None:
    assert (
        OutboundPolicy(EVERYWHERE, plain="localhost").read("http://localhost:8080/x").text == "http://localhost:8080/x"
    )
    assert OutboundPolicy(EVERYWHERE, plain="localhost").read("http://[::1]/").text == "http://[::1]/"
    assert OutboundPolicy(EVERYWHERE, plain="anywhere").read("HTTP://Example.com").text == "http://example.com/"
    with pytest.raises(ValueError, match="https://"):
        OutboundPolicy(EVERYWHERE, plain="never").read("http://localhost/")


async def test_an_operators_policy_calls_every_address() -> None:
    async with raw_upstream(respond()) as upstream, open_outbound(OutboundPolicy(EVERYWHERE, "localhost")) as outbound:
        assert (await outbound.check(upstream.url)).target.port == upstream.port
        assert (await send(outbound, upstream.url)).status == 200
