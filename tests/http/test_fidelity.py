"""Fidelity: what one side sends the other side receives, byte for byte, and the headers that may differ are listed."""

import gzip
import json
import random

import pytest
import trio

from tests.support.client import Headers, RawClient, RawResponse, call, request_bytes
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import (
    Exchange,
    RawUpstream,
    chunk_bytes,
    chunked,
    echo,
    head_bytes,
    interim,
    raw,
    raw_upstream,
    respond,
)

NOISE = random.Random(7).randbytes(1 << 20)
MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="\xc3\xa4.bin"\r\n\r\n'
    + bytes(range(256))
    + b"\r\n--b--\r\n"
)
BODIES = {
    "text": b"hello, w\xc3\xb6rld\n",
    "empty": b"",
    "one byte": b"\x00",
    "1 MiB of noise": NOISE,
    "gzip": gzip.compress(NOISE[:5000], mtime=0),
    "multipart": MULTIPART,
    "a request": b"GET /v1/call/echo/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "chunks": b"5\r\nhello\r\n0\r\n\r\n",
}
OURS = {
    *(
        "x-request-id",
        "x-ratelimit-limit",
        "x-ratelimit-remaining",
        "x-ratelimit-reset",
        "ratelimit",
        "ratelimit-policy",
    ),
    *("x-callora-charge", "x-callora-balance", "server-timing"),
}


def upstreams_own(response: RawResponse) -> Headers:
    """Return the answer's headers without those that Callora adds."""
    return [(name, value) for name, value in response.headers if name.lower() not in OURS]


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_of_known_length_arrives_unchanged_in_both_directions(database_url: str, name: str) -> None:
    body = BODIES[name]
    async with running_service(database_url) as service, raw_upstream(echo([("Content-Encoding", "x")])) as upstream:
        consumer = await ready(service, upstream)
        headers = [*consumer.headers, ("Content-Length", str(len(body)))]
        response = await call(service.port, "POST", "/v1/call/echo/x", headers, body)
        assert response.body == body
        assert upstream.requests[0].raw_body == body
        assert upstream.requests[0].header("Content-Length") == response.header("Content-Length") == str(len(body))
        assert response.header("Transfer-Encoding") is None


@pytest.mark.parametrize("name", BODIES)
async def test_a_chunked_body_arrives_chunked_and_unchanged_in_both_directions(database_url: str, name: str) -> None:
    body = BODIES[name]
    pieces = [body[at : at + 30_000] for at in range(0, len(body), 30_000)]
    sent = b"".join(map(chunk_bytes, pieces)) + b"0\r\nX-Check: 1\r\nX-Other: 2\r\n\r\n"
    answer = chunked(pieces, trailers=[("X-Sum", "3")])
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
        response = await call(service.port, "POST", "/v1/call/echo/x", headers, sent)
        assert response.body == body
        assert response.trailers == [("X-Sum", "3")]
        assert response.header("Transfer-Encoding") == "chunked"
        assert response.header("Content-Length") is None
        request = upstream.requests[0]
        assert request.body == body
        assert request.trailers == [("X-Check", "1"), ("X-Other", "2")]
        assert request.header("Transfer-Encoding") == "chunked"
        assert request.header("Content-Length") is None


@pytest.mark.parametrize("name", BODIES)
async def test_a_chunked_idempotent_request_arrives_unchanged_too(database_url: str, name: str) -> None:
    body = BODIES[name]
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        headers = [*consumer.headers, ("Transfer-Encoding", "chunked"), ("Idempotency-Key", "one")]
        sent = (chunk_bytes(body) if body else b"") + b"0\r\nX-Check: 1\r\n\r\n"
        response = await call(service.port, "POST", "/v1/call/echo/x", headers, sent)
        assert response.body == body
        assert upstream.requests[0].body == body
        assert upstream.requests[0].trailers == [("X-Check", "1")]


async def test_an_answer_that_ends_with_its_connection_arrives_chunked(database_url: str) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(raw(b"HTTP/1.1 200 OK\r\n\r\n" + NOISE)) as upstream,
    ):
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.body == NOISE
        assert response.header("Transfer-Encoding") == "chunked"


@pytest.mark.parametrize(
    ("status", "answer_headers"),
    [(200, [("Content-Length", "1234")]), (200, [("Transfer-Encoding", "chunked")]), (404, [("Content-Length", "9")])],
)
async def test_the_answer_to_head_has_the_length_of_a_body_and_no_body(
    database_url: str, status: int, answer_headers: Headers
) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(raw(head_bytes(status, answer_headers), close=False)) as upstream,
    ):
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            for _ in range(2):
                await client.send(request_bytes("HEAD", "/v1/call/echo/x", consumer.headers))
                response = await client.read_response("HEAD")
                assert response.status == status
                length = dict(answer_headers).get("Content-Length")
                assert response.header("Content-Length") == length
        assert [request.method for request in upstream.requests] == ["HEAD", "HEAD"]
        assert len(upstream.connections) == 1


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_leaves_the_connection_usable(database_url: str, status: int) -> None:
    answer = raw(head_bytes(status, [("ETag", '"a"'), ("X-A", "b")]), close=False)
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            for _ in range(3):
                await client.send(request_bytes("GET", "/v1/call/echo/x", consumer.headers))
                response = await client.read_response()
                assert response.status == status
                assert upstreams_own(response) == [("ETag", '"a"'), ("X-A", "b")]
        assert len(upstream.connections) == 1


async def test_a_304_keeps_the_length_it_states_and_a_204_never_has_one(database_url: str) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(raw(head_bytes(304, [("Content-Length", "77")]), close=False)) as upstream,
    ):
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.header("Content-Length") == "77"
        upstream.handler = raw(head_bytes(204, [("Content-Length", "0")]), close=False)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.header("Content-Length") is None


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [5, 100_000])
async def test_a_client_that_waits_for_100_continue_gets_it_once_its_call_is_paid_for(
    database_url: str, framing: str, size: int
) -> None:
    body = NOISE[:size]
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        field = ("Content-Length", str(size)) if framing == "length" else ("Transfer-Encoding", "chunked")
        async with RawClient.connect(port=service.port) as client:
            await client.send(
                request_bytes("POST", "/v1/call/echo/x", [*consumer.headers, ("Expect", "100-continue"), field])
            )
            head = await client.read_head()
            assert head.start[1] == "100"
            await client.send(body if framing == "length" else chunk_bytes(body) + b"0\r\n\r\n")
            response = await client.read_response()
            assert (response.status, response.body) == (200, body)
        assert upstream.requests[0].header("Expect") is None


async def test_a_client_that_waits_for_100_continue_and_is_refused_never_sends_its_body(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            headers = [("Expect", "100-continue"), ("Content-Length", "5")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers))
            response = await client.read_response()
            assert (response.status, response.interim) == (401, [])
            assert response.header("Connection") == "close"
            assert await client.read_eof() == b""


async def test_a_client_that_waits_for_a_refusal_before_it_sends_its_body_gets_it(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("POST", "/v1/call/echo/x", [("Content-Length", "5")]))
            assert (await client.read_response()).status == 401
            await client.send(b"hello" + request_bytes("GET", "/v1/call/echo/x", consumer.headers))
            assert (await client.read_response()).status == 200
        assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("called", "seen"),
    [
        ("/v1/call/echo", "/"),
        ("/v1/call/echo/", "/"),
        ("/v1/call/echo?", "/?"),
        ("/v1/call/echo?a=1", "/?a=1"),
        ("/v1/call/echo/x", "/x"),
        ("/v1/call/echo/x/", "/x/"),
        ("/v1/call/echo/x?", "/x?"),
        ("/v1/call/echo/x??", "/x??"),
        ("/v1/call/echo/x?a=1&a=2&b=&c", "/x?a=1&a=2&b=&c"),
        ("/v1/call/echo/x?a=%20+%2B&%zz=%", "/x?a=%20+%2B&%zz=%"),
        ("/v1/call/echo/x?/../../y?//z", "/x?/../../y?//z"),
        ("/v1/call/echo/x?http://e.example/@:;", "/x?http://e.example/@:;"),
        ('/v1/call/echo/x?a[]=<x>|{y}^`\\"', '/x?a[]=<x>|{y}^`\\"'),
        ("/v1/call/echo/K%C3%B6ln/%41%zz/~;p=1,2", "/K%C3%B6ln/%41%zz/~;p=1,2"),
        ("/v1/call/echo//double//slash", "//double//slash"),
        ("/v1/call/echo/v1/call/echo/x", "/v1/call/echo/x"),
        ("/v1/call/echo/a.b/...", "/a.b/..."),
    ],
)
async def test_path_and_query_arrive_as_they_were_sent(database_url: str, called: str, seen: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await service.api("based", f"{upstream.url}/base/path/")
        assert (await call(service.port, "GET", called, consumer.headers)).status == 200
        assert upstream.requests[0].target == seen
        based = called.replace("/call/echo", "/call/based", 1)
        assert (await call(service.port, "GET", based, consumer.headers)).status == 200
        path = seen if called.startswith("/v1/call/echo/") else seen.removeprefix("/")
        assert upstream.requests[1].target == f"/base/path{path}"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "X-ODD"])
async def test_every_method_arrives_as_it_was_sent(database_url: str, method: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, method, "/v1/call/echo/x", consumer.headers)).status == 200
        assert upstream.requests[0].method == method


async def test_an_api_is_called_by_its_number_as_by_its_slug(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        api_id = await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        assert (await call(service.port, "GET", f"/v1/call/{api_id}/x", consumer.headers)).status == 200
        assert upstream.requests[0].target == "/x"


async def test_the_request_headers_that_arrive_are_those_sent_without_the_listed_and_with_ours(
    database_url: str,
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        sent: Headers = [
            ("Host", "callora.example:8080"),
            ("X-Api-Key", consumer.api_key),
            ("Authorization", "Basic dXNlcjpwdw=="),
            ("ACCEPT", "text/html"),
            ("accept", "application/json"),
            ("Connection", "keep-alive, X-Hop, x-other-hop"),
            ("X-Hop", "1"),
            ("X-Other-Hop", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Connection", "keep-alive"),
            ("Proxy-Authorization", "Basic x"),
            ("Proxy-Authenticate", "Basic"),
            ("TE", "trailers"),
            ("Trailer", "X-Sum"),
            ("Cookie", "session=1"),
            ("X-Forwarded-For", "192.0.2.1"),
            ("X-Forwarded-Proto", "https"),
            ("X-Forwarded-Anything", "x"),
            ("X-Real-IP", "192.0.2.1"),
            ("Forwarded", "for=192.0.2.1"),
            ("X-Request-Id", "mine"),
            ("X-Empty", ""),
            ("X-Latin", "\xe4\xff"),
            ("User-Agent", "odd  spaces\tinside"),
            ("Content-Length", "5"),
            ("Content-Type", "text/plain"),
        ]
        await call(service.port, "POST", "/v1/call/echo/x", sent, b"hello")
        assert upstream.requests[0].headers == [
            ("Host", f"127.0.0.1:{upstream.port}"),
            ("Authorization", "Basic dXNlcjpwdw=="),
            ("ACCEPT", "text/html"),
            ("accept", "application/json"),
            ("X-Empty", ""),
            ("X-Latin", "\xe4\xff"),
            ("User-Agent", "odd  spaces\tinside"),
            ("Content-Type", "text/plain"),
            ("Content-Length", "5"),
            ("X-Request-Id", "mine"),
        ]


async def test_authorization_goes_no_further_when_it_carried_the_key(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        for scheme in ("Bearer", "bearer", "BEARER"):
            headers = [("Authorization", f"{scheme} {consumer.api_key}")]
            assert (await call(service.port, "GET", "/v1/call/echo/x", headers)).status == 200
        for request in upstream.requests:
            assert request.header("Authorization") is None
            assert consumer.api_key not in request.raw_head.decode()


async def test_what_the_developer_configured_replaces_what_the_client_sent(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        configured = {"Authorization": "Bearer upstream-token", "X-Tenant": "t1", "X-Forwarded-Host": "api.example"}
        await service.database.execute("UPDATE apis SET upstream_headers = $1::text::jsonb", json.dumps(configured))
        sent = [*consumer.headers, ("authorization", "Basic x"), ("x-tenant", "forged"), ("X-TENANT", "twice")]
        await call(service.port, "GET", "/v1/call/echo/x", sent)
        request = upstream.requests[0]
        for name, value in configured.items():
            assert request.all(name) == [value]


async def test_the_answer_headers_that_arrive_are_those_sent_without_the_listed_and_with_ours(
    database_url: str,
) -> None:
    answer: Headers = [
        ("Content-Type", "text/plain"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("set-cookie", "c=3"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Trailer", "X-Sum"),
        ("Upgrade", "h2c"),
        ("X-Request-Id", "theirs"),
        ("X-Callora-Charge", "0.0000000"),
        ("x-callora-balance", "999"),
        ("X-Callora-Anything", "x"),
        ("X-RateLimit-Limit", "1"),
        ("X-RateLimit-Remaining", "1"),
        ("X-RateLimit-Reset", "1"),
        ("RateLimit", "1"),
        ("RateLimit-Policy", "1"),
        ("Idempotent-Replayed", "true"),
        ("WWW-Authenticate", "Basic"),
        ("Server", "odd/1"),
        ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
        ("X-Empty", ""),
        ("X-Latin", "\xe4\xff"),
    ]
    async with running_service(database_url) as service, raw_upstream(respond(200, answer, b"hello")) as upstream:
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", [*consumer.headers, ("X-Request-Id", "mine")])
        assert upstreams_own(response) == [
            ("Content-Type", "text/plain"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("set-cookie", "c=3"),
            ("WWW-Authenticate", "Basic"),
            ("Server", "odd/1"),
            ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
            ("X-Empty", ""),
            ("X-Latin", "\xe4\xff"),
            ("Content-Length", "5"),
        ]
        assert response.header("X-Request-Id") == "mine"
        assert response.header("X-Callora-Charge") == "0.0100000"
        assert response.header("X-Callora-Balance") == "0.9900000"


@pytest.mark.parametrize(("status", "reason"), [(200, "Fine"), (299, "Odd one"), (418, "I'm a teapot"), (200, "\xe4")])
async def test_status_and_reason_arrive_as_they_were_sent(database_url: str, status: int, reason: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status, reason=reason)) as upstream:
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert (response.status, response.reason) == (status, reason)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_passes_through_and_is_not_followed(database_url: str, status: int) -> None:
    async with (
        running_service(database_url) as service,
        raw_upstream(respond(status, [("Location", "http://127.0.0.1/private")])) as upstream,
    ):
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert response.status == status
        assert response.header("Location") == "http://127.0.0.1/private"
        assert len(upstream.requests) == 1


async def test_a_103_passes_before_the_answer_and_the_upstreams_own_100_does_not(database_url: str) -> None:
    answer = interim([100, 103, 103], respond(200, body=b"x"), [("Link", "</a.css>"), ("X-Callora-Charge", "0")])
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert [(head.start[1], head.headers) for head in response.interim] == [("103", [("Link", "</a.css>")])] * 2
        assert (response.status, response.body) == (200, b"x")


async def test_an_interim_answer_is_not_for_a_client_of_http_1_0(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(interim([103], respond())) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(b"GET /v1/call/echo/x HTTP/1.0\r\nX-Api-Key: %b\r\n\r\n" % consumer.api_key.encode())
            response = await client.read_response()
            assert (response.status, response.interim) == (200, [])


async def test_an_upstream_that_switches_protocols_unasked_is_a_bad_gateway(database_url: str) -> None:
    answer = raw(head_bytes(101, [("Upgrade", "websocket"), ("Connection", "Upgrade")]) + b"\x81\x00", close=False)
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert (response.status, response.json()["code"]) == (502, "BAD_GATEWAY")
        await upstream.wait_peer_gone()


async def test_a_client_of_http_1_0_reads_a_chunked_answer_up_to_the_end_of_the_connection(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(chunked([b"one", b"two"])) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            line = b"GET /v1/call/echo/x HTTP/1.0\r\nConnection: keep-alive\r\nX-Api-Key: %b\r\n\r\n"
            await client.send(line % consumer.api_key.encode())
            response = await client.read_response()
            assert response.body == b"onetwo"
            assert response.header("Transfer-Encoding") is None
            assert response.header("Connection") == "close"
        assert upstream.requests[0].version == "HTTP/1.1"


async def test_a_client_of_http_1_0_that_asks_keeps_its_connection(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"x")) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            keeping = b"GET /v1/call/echo/x HTTP/1.0\r\nConnection: keep-alive\r\nX-Api-Key: %b\r\n\r\n"
            for _ in range(2):
                await client.send(keeping % consumer.api_key.encode())
                assert (await client.read_response()).body == b"x"
            await client.send(b"GET /v1/call/echo/x HTTP/1.0\r\nX-Api-Key: %b\r\n\r\n" % consumer.api_key.encode())
            assert (await client.read_response()).header("Connection") == "close"
            assert await client.read_eof() == b""


async def test_calls_one_after_the_other_share_both_connections(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            for number in range(20):
                body = b"%d" % number
                await client.send(request_bytes("POST", "/v1/call/echo/x", consumer.headers, body))
                assert (await client.read_response()).body == body
        assert len(upstream.connections) == 1


async def test_requests_in_one_segment_are_answered_in_their_order(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(echo()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            bodies = [b"one", b"", b"x" * 100_000, b"four"]
            segment = b""
            for number, body in enumerate(bodies):
                if number % 2:
                    headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
                    body = (chunk_bytes(body) if body else b"") + b"0\r\n\r\n"
                else:
                    headers = consumer.headers
                segment += request_bytes("POST", f"/v1/call/echo/{number}", headers, body)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, segment)
                for body in bodies:
                    assert (await client.read_response()).body == body
        assert [request.target for request in upstream.requests] == ["/0", "/1", "/2", "/3"]


async def test_a_client_that_asks_to_close_is_answered_and_closed(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"x")) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", "/v1/call/echo/x", [*consumer.headers, ("Connection", "close")]))
            response = await client.read_response()
            assert (response.body, response.header("Connection")) == (b"x", "close")
            assert await client.read_eof() == b""
        assert upstream.requests[0].header("Connection") is None


async def test_an_upstream_that_answers_before_it_has_read_the_request_is_heard(database_url: str) -> None:
    """The client is still sending: what it has not sent is not waited for, and its answer is not lost in a reset."""

    async def answer_at_once(exchange: Exchange) -> None:
        await exchange.send(head_bytes(413, [("Content-Length", "9")]) + b"too large")
        await exchange.connection.close()

    async with running_service(database_url) as service, raw_upstream(answer_at_once) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            headers = [*consumer.headers, ("Content-Length", "1000000")]
            await client.send(request_bytes("POST", "/v1/call/echo/x", headers) + NOISE[:100_000])
            response = await client.read_response()
            assert (response.status, response.body) == (413, b"too large")
            for _ in range(4):
                await client.send(NOISE[:25_000])  # what is still sent is taken for a while, not answered with a reset
            assert await client.read_eof() == b""
        assert len(upstream.requests) == 1
