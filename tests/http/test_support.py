"""The helpers the gateway's tests stand on, since a wrong one would hide a wrong gateway; and the demo upstream."""

import hashlib
import ssl
import time
from functools import partial

import pytest
import trio
import trustme
from trio.testing import MockClock

from callora.demo_upstream import serve_demo_upstream
from tests.support import client as c
from tests.support import upstream as u
from tests.support.client import ClosedEarly, Malformed, RawClient, TooSlow, call, closed_port, request_bytes, watchdog
from tests.support.upstream import raw_upstream

# ---------------------------------------------------------------------------------------------------------------------
# Sound exchanges


async def test_a_request_is_recorded_as_it_was_sent_and_the_answer_read_as_it_was_sent() -> None:
    """Bytes, order, case and repetitions survive both ways."""
    answer = u.respond(418, [("X-A", "1"), ("x-a", "2"), ("Content-Length", "3")], b"abc", reason="Tea Pot")
    sent = b"PoST /a%20b?x=1&x HTTP/1.1\r\nhost: h\r\nX-B:  v \r\nx-b:w\r\ncontent-length: 4\r\n\r\nbody"
    async with raw_upstream(answer) as upstream, RawClient.connect(port=upstream.port) as client:
        await client.send(sent)
        response = await client.read_response()
    assert (response.status, response.reason, response.body) == (418, "Tea Pot", b"abc")
    assert response.all("X-A") == ["1", "2"]
    assert response.header("content-LENGTH") == "3"
    assert response.raw == b"HTTP/1.1 418 Tea Pot\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 3\r\n\r\nabc"
    (request,) = upstream.requests
    assert (request.method, request.target, request.version) == ("PoST", "/a%20b?x=1&x", "HTTP/1.1")
    assert request.headers == [("host", "h"), ("X-B", "v"), ("x-b", "w"), ("content-length", "4")]
    assert (request.raw_head + request.body, request.raw_body, request.complete) == (sent, b"body", True)
    assert upstream.url == f"http://127.0.0.1:{upstream.port}"


async def test_connections_are_kept_and_numbered() -> None:
    """Two requests on the first connection, pipelined; one on the second, which asks to be closed."""
    async with raw_upstream(u.echo()) as upstream:
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("POST", "/1", body=b"one") + request_bytes("PUT", "/2", body=b"two"))
            assert [(await client.read_response()).body for _ in range(2)] == [b"one", b"two"]
        await upstream.wait_peer_gone(1)
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/3", [("Connection", "close")]))
            assert (await client.read_response()).body == b""
            assert await client.read_eof() == b""
            assert not client.was_reset
    assert [(request.target, request.connection) for request in upstream.requests] == [("/1", 1), ("/2", 1), ("/3", 2)]
    assert len(upstream.connections) == 2


async def test_bodies_without_content_are_known_by_method_and_status() -> None:
    """HEAD, 204 and 304 have none, whatever their headers say; the connection stays in step."""
    script = u.by_path(
        {"/204": u.respond(204), "/304": u.respond(304, [("Content-Length", "9")])}, u.respond(body=b"x")
    )
    async with raw_upstream(script) as upstream, RawClient.connect(port=upstream.port) as client:
        for method, path, status in [("HEAD", "/", 200), ("GET", "/204", 204), ("GET", "/304", 304), ("GET", "/", 200)]:
            await client.send(request_bytes(method, path))
            response = await client.read_response(method)
            assert response.status == status
            assert response.body == (b"x" if (method, path) == ("GET", "/") else b"")


async def test_chunked_bodies_go_both_ways_with_trailers() -> None:
    """Sizes in hex, extensions, trailers; raw framing is recorded."""
    body = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n"
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = u.chunked([b"ab", b"c" * 20], trailers=[("X-Sum", "9")])
    async with raw_upstream(answer) as upstream, RawClient.connect(port=upstream.port) as client:
        await client.send(head + body)
        response = await client.read_response()
    assert response.body == b"ab" + b"c" * 20
    assert response.trailers == [("X-Sum", "9")]
    assert response.raw.endswith(b"\r\n\r\n2\r\nab\r\n14\r\n" + b"c" * 20 + b"\r\n0\r\nX-Sum: 9\r\n\r\n")
    (request,) = upstream.requests
    assert (request.body, request.raw_body, request.trailers) == (b"hello0123456789", body, [("X-T", "1")])


async def test_a_body_may_last_until_the_end() -> None:
    """Without a length the close is the framing."""
    async with raw_upstream(u.raw(b"HTTP/1.1 200\r\n\r\nall of it")) as upstream:
        response = await call(upstream.port, "GET", "/")
    assert (response.reason, response.body) == ("", b"all of it")


async def test_interim_responses_precede_the_final_one() -> None:
    """1xx heads are shown apart."""
    async with raw_upstream(u.interim([100, 103], u.respond(201), [("Link", "</a>")])) as upstream:
        response = await call(upstream.port, "POST", "/", body=b"x")
    assert [head.start[1] for head in response.interim] == ["100", "103"]
    assert response.status == 201


async def test_an_event_stream_keeps_the_tests_pace() -> None:
    """Each piece comes when its event is set and not before, and carries the machine's time."""
    gates = [trio.Event() for _ in range(3)]
    steps = [(gate, b"data: %d\n\n" % number) for number, gate in enumerate(gates)]
    async with raw_upstream(u.sse(steps)) as upstream, RawClient.connect(port=upstream.port) as client:
        await client.send(request_bytes("GET", "/events"))
        head = await client.read_head()
        body = client.body(head)
        for number, gate in enumerate(gates):
            before = time.monotonic()
            gate.set()
            piece = await client.read_piece(body)
            assert piece is not None
            assert piece.data == b"data: %d\n\n" % number
            assert before <= piece.at <= time.monotonic()
        assert await client.read_piece(body) is None


async def test_big_bodies_pass_without_being_kept() -> None:
    """8 MiB each way; the digest is the sender's."""
    async with raw_upstream(u.by_path({"/big": u.big(8)}, u.sink())) as upstream:
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/big"))
            body = client.body(await client.read_head())
            digest, count = hashlib.sha256(), 0
            while (piece := await client.read_piece(body)) is not None:
                digest.update(piece.data)
                count += len(piece.data)
            expected = hashlib.sha256(u.BLOCK * (8 * u.MIB // len(u.BLOCK))).hexdigest()
            assert (count, digest.hexdigest()) == (8 * u.MIB, expected)
            await client.send(request_bytes("PUT", "/sink", [("Content-Length", str(8 * u.MIB))]))
            for _ in range(8 * u.MIB // len(u.BLOCK)):
                await client.send(u.BLOCK)
            assert (await client.read_response()).json() == {"bytes": 8 * u.MIB, "sha256": expected}
    assert upstream.requests[1].body == b""
    assert upstream.requests[1].body_length == 8 * u.MIB


async def test_a_script_answers_by_turn_and_by_gate() -> None:
    """The last handler of a sequence goes on; a gate holds its answer."""
    gate = trio.Event()
    async with raw_upstream(u.sequence(u.respond(500), u.gated(gate, u.respond(201)))) as upstream:
        assert (await call(upstream.port, "GET", "/")).status == 500
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/held"))
            assert (await upstream.wait_requests(2)).target == "/held"
            gate.set()
            assert (await client.read_response()).status == 201
        upstream.handler = u.respond(202)
        assert (await call(upstream.port, "GET", "/")).status == 202


async def test_what_a_handler_leaves_of_a_body_is_read_before_the_next_request() -> None:
    """An early answer does not shift the framing."""

    async def early(exchange: u.Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with raw_upstream(early) as upstream, RawClient.connect(port=upstream.port) as client:
        for _ in range(2):
            await client.send(request_bytes("POST", "/", body=b"GET /fake HTTP/1.1\r\n\r\n"))
            assert (await client.read_response()).status == 200
    assert [request.target for request in upstream.requests] == ["/", "/"]


async def test_tls_is_spoken_when_asked() -> None:
    """Over a test authority, with the same handlers."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with raw_upstream(u.respond(body=b"secret"), tls=server) as upstream:
        assert upstream.url.startswith("https://127.0.0.1:")
        tcp = await trio.open_tcp_stream("127.0.0.1", upstream.port)
        async with trio.SSLStream(tcp, trusting, server_hostname="127.0.0.1", https_compatible=True) as stream:
            client = RawClient(stream, tcp.socket, c.WATCHDOG_SECONDS)
            await client.send(request_bytes("GET", "/"))
            assert (await client.read_response()).body == b"secret"
        with pytest.raises((ClosedEarly, Malformed, trio.BrokenResourceError)):
            await call(upstream.port, "GET", "/in-clear")
    assert [request.target for request in upstream.requests] == ["/"]


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    ("handler", "reset"), [(u.close_silently(), False), (u.reset_before_head(), True)], ids=["close", "reset"]
)
async def test_an_upstream_may_leave_without_an_answer(handler: u.Handler, reset: bool) -> None:
    """The client tells a close from a reset."""
    async with raw_upstream(handler) as upstream:
        with pytest.raises(ClosedEarly) as caught:
            await call(upstream.port, "POST", "/", body=b"x")
    assert caught.value.reset is reset
    assert upstream.requests[0].body == b"x"


async def test_an_upstream_may_reset_amid_the_body() -> None:
    """What came before is with the error."""
    gate = trio.Event()
    async with raw_upstream(u.reset_amid_body(10, 100, gate)) as upstream:
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/"))
            body = client.body(await client.read_head())
            assert await client.read_piece(body)
            gate.set()
            with pytest.raises(ClosedEarly) as caught:
                await client.read_piece(body)
            assert caught.value.reset
            assert client.was_reset


async def test_an_event_stream_may_be_cut() -> None:
    """A chunked body without its end is not a whole body."""
    gate = trio.Event()
    gate.set()
    async with raw_upstream(u.sse([(gate, b"data: 1\n\n")], finish=False)) as upstream:
        with pytest.raises(ClosedEarly):
            await call(upstream.port, "GET", "/")


async def test_a_short_body_is_an_early_close_and_a_long_one_leaves_a_rest() -> None:
    """Content-Length of 10 with 4 and with 14 bytes."""
    async with raw_upstream(u.sequence(u.wrong_length(10, 4), u.wrong_length(10, 14))) as upstream:
        with pytest.raises(ClosedEarly, match="closed") as caught:
            await call(upstream.port, "GET", "/")
        assert caught.value.received == b"xxxx"
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/"))
            assert len((await client.read_response()).body) == 10
            await client.shut_write()
            assert await client.read_eof() == b"xxxx"


async def test_garbage_and_endless_headers_are_not_a_response() -> None:
    """Both are Malformed to the test's client, the second after a mebibyte."""
    async with raw_upstream(u.by_path({"/endless": u.endless_headers()}, u.garbage())) as upstream:
        for path in ("/", "/endless"):
            with pytest.raises(Malformed):
                await call(upstream.port, "GET", path)
        await upstream.wait_peer_gone(2)


async def test_a_dribbled_answer_is_read_whole() -> None:
    """Byte by byte it is the same response."""
    async with raw_upstream(u.dribble(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")) as upstream:
        assert (await call(upstream.port, "GET", "/")).body == b"hello"


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_silent_upstream_notices_that_the_peer_has_gone(leave: str) -> None:
    """By FIN and by RST."""
    async with raw_upstream(u.silent()) as upstream:
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/"))
            await upstream.wait_requests(1)
            assert not upstream.connections[0].peer_gone.is_set()
            if leave == "reset":
                await client.reset()
        await upstream.wait_peer_gone()
        assert upstream.connections[0].wire.was_reset is (leave == "reset")


async def test_a_request_cut_short_is_recorded_as_far_as_it_came() -> None:
    """The head, the part of the body, and that it is not complete."""
    async with raw_upstream(u.echo()) as upstream:
        async with RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("POST", "/", [("Content-Length", "9")], b"half"))
            await upstream.wait_requests(1)
        await upstream.wait_peer_gone()
    (request,) = upstream.requests
    assert (request.body, request.body_length, request.complete) == (b"half", 4, False)


async def test_a_handlers_own_error_fails_the_test() -> None:
    """It is not taken for a broken connection."""

    async def wrong(exchange: u.Exchange) -> None:
        await exchange.read_body()
        raise AssertionError("the upstream saw something wrong")

    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="saw something wrong"), flatten_subgroups=True):
        async with raw_upstream(wrong) as upstream, RawClient.connect(port=upstream.port) as client:
            await client.send(request_bytes("GET", "/"))
            await trio.sleep_forever()


async def test_a_closed_port_refuses() -> None:
    """And stays ours while we look."""
    with closed_port() as port:
        with pytest.raises(OSError, match="all attempts to connect"):
            await call(port, "GET", "/")


async def test_the_watchdog_runs_on_the_machines_clock(mock_clock: MockClock) -> None:
    """A frozen clock does not stop it and a jumping one does not set it off."""
    async with raw_upstream(u.silent()) as upstream:
        with pytest.raises(TooSlow, match="a whole response"):
            await call(upstream.port, "GET", "/", watchdog_seconds=0.05)
        with pytest.raises(TooSlow, match="nothing in particular"), watchdog("nothing in particular", 0.05):
            await trio.sleep_forever()
        with watchdog("a short while", 5):
            mock_clock.jump(3600)
            await trio.lowlevel.checkpoint()


# ---------------------------------------------------------------------------------------------------------------------
# The demo upstream


async def test_the_demo_upstream_answers_as_its_page_says(nursery: trio.Nursery) -> None:
    """Weather, forecast, reports, and an echo of anything else; the same call gives the same answer."""
    url = await nursery.start(serve_demo_upstream)
    port = int(url.removeprefix("http://127.0.0.1:"))
    weather = (await call(port, "GET", "/current?city=Rome")).json()
    assert weather["city"] == "Rome"
    assert (await call(port, "GET", "/current?city=Rome")).json() == weather
    assert len((await call(port, "GET", "/forecast?days=5")).json()["days"]) == 5
    assert len((await call(port, "GET", "/forecast")).json()["days"]) == 3
    for days in ("0", "15", "x", "-1", "%C2%B2", "99999999999"):
        assert (await call(port, "GET", f"/forecast?days={days}")).status == 400
    report = await call(port, "POST", "/reports/Oslo", [("Content-Type", "application/json")], b'{"celsius": 3}')
    assert report.status == 201
    assert report.json()["city"] == "Oslo"
    assert report.json()["report"] == {"celsius": 3}
    assert report.json()["sha256"] == hashlib.sha256(b'{"celsius": 3}').hexdigest()
    assert (await call(port, "POST", "/reports/Oslo", body=b"\xff not json")).json()["report"] is None
    for method, path, query in [("GET", "/", ""), ("DELETE", "/current", ""), ("PURGE", "/x/y", "a=1&b")]:
        echoed = await call(port, method, f"{path}?{query}" if query else path)
        assert echoed.status == 200
        assert echoed.json() == {"method": method, "path": path, "query": query}


async def test_the_demo_upstream_streams_five_events(nursery: trio.Nursery) -> None:
    """They come apart from each other, not at the end."""
    url = await nursery.start(serve_demo_upstream)
    async with RawClient.connect(port=int(url.rpartition(":")[2])) as client:
        await client.send(request_bytes("GET", "/events"))
        head = await client.read_head()
        assert head.header("content-type") == "text/event-stream"
        body = client.body(head)
        pieces = []
        while (piece := await client.read_piece(body)) is not None:
            pieces.append(piece)
    text = b"".join(piece.data for piece in pieces).decode()
    assert [line for line in text.splitlines() if line.startswith("id:")] == [f"id: {n}" for n in range(1, 6)]
    assert pieces[-1].at - pieces[0].at > 0.3


async def test_the_demo_upstream_closes_when_asked_and_ends_when_cancelled() -> None:
    """`Connection: close` gets its end; a stream under way does not hold up the cancellation."""
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(serve_demo_upstream, port=0))
        port = int(url.rpartition(":")[2])
        async with RawClient.connect(port=port) as client:
            await client.send(request_bytes("GET", "/current", [("Connection", "close")]))
            assert (await client.read_response()).status == 200
            assert await client.read_eof() == b""
        async with RawClient.connect(port=port) as client:
            await client.send(request_bytes("GET", "/events"))
            await client.read_head()
            with watchdog("the demo upstream to end", 2):
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await client.read_eof()
    with pytest.raises(OSError, match="all attempts to connect"):
        await call(port, "GET", "/")
