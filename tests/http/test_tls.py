"""TLS on the port: calls, probes and both together on one connection, and nothing for who speaks plain HTTP."""

import contextlib
import ssl
from pathlib import Path

import pytest
import trio
import trustme

from tests.support.client import WATCHDOG_SECONDS, watchdog
from tests.support.service import RunningService, running_service
from tests.support.upstream import raw_upstream, respond


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_settings(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return {"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(key)}


async def connect(service: RunningService, authority: trustme.CA) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    stream = await trio.open_tcp_stream("127.0.0.1", service.port)
    tls = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
    await tls.do_handshake()
    return tls


async def exchange(stream: trio.abc.Stream, request: bytes) -> bytes:
    """Send one request and return its answer, which has a Content-Length."""
    await stream.send_all(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += await stream.receive_some()
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += await stream.receive_some()
    return head + b"\r\n\r\n" + body


async def test_calls_and_probes_share_a_connection_under_tls(
    database_url: str, authority: trustme.CA, tls_settings: dict[str, str]
) -> None:
    async with (
        running_service(database_url, tls_settings) as service,
        raw_upstream(respond(200, body=b"x" * 300_000)) as upstream,
    ):
        assert service.url.startswith("https://")
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        key = consumer.api_key.encode()
        with watchdog("three answers under TLS"):
            stream = await connect(service, authority)
            call = b"GET /v1/call/echo/x HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: " + key + b"\r\n\r\n"
            paid = await exchange(stream, call)
            probe = await exchange(stream, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            again = await exchange(stream, call)
            await stream.aclose()
        assert paid.startswith(b"HTTP/1.1 200 ")
        assert paid.endswith(b"\r\n\r\n" + b"x" * 300_000)
        assert probe.startswith(b"HTTP/1.1 200 ")
        assert again.endswith(b"x" * 300_000)
        assert (await service.balance(consumer)) == (9_800_000, 0)


async def test_plain_http_on_a_tls_port_is_closed_and_harms_nobody(
    database_url: str, authority: trustme.CA, tls_settings: dict[str, str]
) -> None:
    async with running_service(database_url, tls_settings) as service:
        with watchdog("a refusal and an answer", WATCHDOG_SECONDS):
            plain = await trio.open_tcp_stream("127.0.0.1", service.port)
            received = b""
            async with plain:
                await plain.send_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                with contextlib.suppress(trio.BrokenResourceError):
                    while chunk := await plain.receive_some():
                        received += chunk
            assert b"HTTP/" not in received
            stream = await connect(service, authority)
            assert (await exchange(stream, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")).startswith(
                b"HTTP/1.1 200 "
            )
            await stream.aclose()
