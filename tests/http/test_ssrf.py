"""Server-side request forgery: no base URL and no request leads a call to an address that may not be called."""

import json

import pytest

from callora.ledger.money import parse_usdc
from tests.support.client import RawClient, call
from tests.support.service import running_service
from tests.support.upstream import raw_upstream, respond

NOTHING_ALLOWED = {"UPSTREAM_HOST_ALLOWLIST": ""}


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1.2.3", "localhost", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255", "168.63.129.16", "[::1]", "[::]", "[fe80::1]"),
        *(
            "[fd00::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[::127.0.0.1]",
        ),
        *(
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "127.1",
            "127.0.0.1.",
            "\uff11\uff12\uff17.0.0.1",
            "user@127.0.0.1",
        ),
        *("127.0.0.1#", "[fe80::1%25eth0]"),
    ],
)
async def test_a_base_url_at_an_address_of_our_own_is_never_called(database_url: str, host: str) -> None:
    async with (
        running_service(database_url, NOTHING_ALLOWED) as service,
        raw_upstream(respond(), host="127.0.0.1") as upstream,
    ):
        await service.api("echo", f"http://{host}:{upstream.port}")
        consumer = await service.consumer("1")
        for _ in range(2):
            response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
            assert (response.status, response.json()["code"]) == (502, "UPSTREAM_TARGET_BLOCKED")
            assert host not in response.json()["message"]
        assert upstream.connections == []
        assert await service.events(consumer) == []
        assert await service.balance(consumer) == (parse_usdc("1"), 0)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "file:///etc/passwd", "gopher://127.0.0.1", "//127.0.0.1", "x", ""])
async def test_a_base_url_of_another_kind_is_never_called(database_url: str, url: str) -> None:
    async with running_service(database_url) as service:
        await service.api("echo", url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        assert (response.status, response.json()["code"]) == (502, "UPSTREAM_TARGET_BLOCKED")


async def test_only_the_addresses_that_the_operator_allowed_are_called(database_url: str) -> None:
    async with (
        running_service(database_url, {"UPSTREAM_HOST_ALLOWLIST": "127.0.0.1/32"}) as service,
        raw_upstream(respond(), host="127.0.0.1") as allowed,
        raw_upstream(respond(), host="127.0.0.2") as other,
    ):
        await service.api("allowed", allowed.url)
        await service.api("other", other.url)
        consumer = await service.consumer("1")
        assert (await call(service.port, "GET", "/v1/call/allowed/x", consumer.headers)).status == 200
        assert (await call(service.port, "GET", "/v1/call/other/x", consumer.headers)).status == 502
        assert other.connections == []


@pytest.mark.parametrize(
    "path",
    [
        *("@{evil}/x", "/@{evil}/x", "//{evil}/x", "/http://{evil}/x", "?http://{evil}/x", "/x?@{evil}", ":80@{evil}/"),
        *("/\\{evil}/x", "/%2f%2f{evil}/x", "/x%23@{evil}", "/x;@{evil}"),
    ],
)
async def test_no_path_leads_a_call_to_another_host(database_url: str, path: str) -> None:
    async with (
        running_service(database_url, {"UPSTREAM_HOST_ALLOWLIST": "127.0.0.0/8"}) as service,
        raw_upstream(respond(), host="127.0.0.1") as upstream,
        raw_upstream(respond(), host="127.0.0.2") as evil,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        target = path.replace("{evil}", evil.url.removeprefix("http://"))
        response = await call(service.port, "GET", f"/v1/call/echo{target}", consumer.headers)
        assert response.status in (200, 400, 404)
        assert evil.connections == []
        for request in upstream.requests:
            assert request.header("Host") == f"127.0.0.1:{upstream.port}"
            assert request.target.startswith("/")


@pytest.mark.parametrize("name", ["Host", "X-Forwarded-Host", "Forwarded", "X-Original-URL", "X-Rewrite-URL", "Via"])
async def test_no_header_leads_a_call_to_another_host(database_url: str, name: str) -> None:
    async with (
        running_service(database_url, {"UPSTREAM_HOST_ALLOWLIST": "127.0.0.0/8"}) as service,
        raw_upstream(respond(), host="127.0.0.1") as upstream,
        raw_upstream(respond(), host="127.0.0.2") as evil,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        value = evil.url.removeprefix("http://")
        response = await call(service.port, "GET", "/v1/call/echo/x", [*consumer.headers, (name, value)])
        assert response.status == 200
        assert evil.connections == []
        assert upstream.requests[0].header("Host") == f"127.0.0.1:{upstream.port}"


@pytest.mark.parametrize("line", ["GET http://{evil}/v1/call/echo/x HTTP/1.1", "CONNECT {evil} HTTP/1.1"])
async def test_the_gateway_is_no_forward_proxy(database_url: str, line: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as evil:
        consumer = await service.consumer("1")
        request_line = line.replace("{evil}", evil.url.removeprefix("http://"))
        async with RawClient.connect(port=service.port) as client:
            await client.send(f"{request_line}\r\nHost: a\r\nX-Api-Key: {consumer.api_key}\r\n\r\n".encode())
            assert (await client.read_response()).status == 400
            assert await client.read_eof() == b""
        assert evil.connections == []


async def test_a_redirect_to_an_address_of_our_own_is_not_followed(database_url: str) -> None:
    async with (
        running_service(database_url, {"UPSTREAM_HOST_ALLOWLIST": "127.0.0.0/8"}) as service,
        raw_upstream(respond(), host="127.0.0.2") as inner,
        raw_upstream(respond(307, [("Location", inner.url), ("Refresh", f"0;url={inner.url}")])) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        assert (await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)).status == 307
        assert inner.connections == []


async def test_a_base_url_moved_to_a_blocked_address_is_no_longer_called(database_url: str) -> None:
    async with (
        running_service(database_url, {"CATALOGUE_REFRESH_MS": "10"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        assert (await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)).status == 200
        await service.database.execute("UPDATE apis SET base_url = 'http://169.254.169.254'")
        while (response := await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)).status == 200:
            pass
        assert json.loads(response.body)["code"] == "UPSTREAM_TARGET_BLOCKED"
