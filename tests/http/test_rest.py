"""The REST surface: probes, metrics, errors as documents, and how it behaves as a served socket."""

import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from quart import Response, request
from quart.testing.utils import sentinel
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers

from callora.config.loading import load_settings
from callora.http.problems import ProblemRaised
from callora.http.rest.app import RestDeps, create_app, serve_rest
from callora.http.rest.health import Health, health_routes
from callora.http.rest.identity import Authenticator, People
from callora.http.rest.operations import Doors
from callora.ledger.ids import UserId
from callora.logs import Logs
from callora.metrics import Metrics

PRODUCTION = {
    "APP_ENV": "production",
    "DATABASE_URL": "postgresql://callora@db/callora",
    "JWT_SECRET": "j" * 32,
    "ADMIN_API_KEY": "admin",
    "METRICS_API_KEY": "scrape-me",
    "APP_VERSION": "9.8.7",
}


class FixedClock:
    def now(self) -> datetime:
        return datetime(2026, 11, 21, 10, 9, 8, 7654, tzinfo=UTC)

    def timestamp(self) -> float:
        return self.now().timestamp()


async def healthy() -> None:
    await trio.lowlevel.checkpoint()


async def broken() -> None:
    await trio.lowlevel.checkpoint()
    raise OSError("db-host.internal refused 5432")


async def nobody(_: str) -> UserId:
    await trio.lowlevel.checkpoint()
    raise AssertionError("a probe asks for nobody")


async def never_alive(_: str, __: UserId) -> bool:
    await trio.lowlevel.checkpoint()
    raise AssertionError("a probe asks for no session")


async def not_audited(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise AssertionError("a probe is not audited")


def not_counted(*_: object) -> None:
    raise AssertionError("a probe is no service's")


DOORS = Doors(
    Authenticator(
        tokens=None,
        admin_key=None,
        admin_networks=(),
        service_token=None,
        user_header_allowed=False,
        people=People(nobody, never_alive),
        clock=FixedClock(),
    ),
    admit=lambda _method, _path, _caller: None,
    audit=not_audited,
    count=not_counted,
)


@attrs.define
class House:
    """An app with everything it was given at hand."""

    app: QuartTrio
    deps: RestDeps
    logs: Logs
    stream: io.StringIO

    def records(self) -> list[dict[str, Any]]:
        self.logs.flush()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    async def ask(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> tuple[int, Headers, Any]:
        """Return status, headers and the decoded body of an answer."""
        client = self.app.test_client()
        answer = await client.open(path, method=method, headers=dict(headers or {}), data=data, json=sentinel)
        body = await answer.get_data()
        assert isinstance(answer, Response)
        kind = answer.headers.get("content-type", "")
        return answer.status_code, answer.headers, json.loads(body) if kind == "application/json" and body else body


def house(
    environ: Mapping[str, str] | None = None,
    *,
    database_check: Callable[[], Awaitable[None]] = healthy,
    draining: Callable[[], bool] = lambda: False,
    **given: Any,
) -> House:
    stream = io.StringIO()
    logs = Logs(FixedClock(), level="debug", stream=stream)
    deps = RestDeps(
        settings=load_settings({"APP_ENV": "test", **(environ or {})}),
        metrics=Metrics(),
        logger=logs.logger("rest"),
        clock=FixedClock(),
        new_request_id=lambda: "made-id",
        database_check=database_check,
        draining=draining,
        **given,
    )
    return House(probes(deps), deps, logs, stream)


def probes(deps: RestDeps) -> QuartTrio:
    """An app with the probes and the metrics alone."""
    return create_app(deps, health_routes(Health(deps), deps).operations, DOORS)


# Probes


async def test_health_reports_version_date_and_every_check() -> None:
    status, headers, body = await house({"APP_VERSION": "9.8.7"}).ask("/api/health")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert body == {
        "status": "ok",
        "version": "9.8.7",
        "timestamp": "2026-11-21T10:09:08.007Z",
        "checks": {"api": "ok", "database": "ok"},
    }


async def test_a_database_that_is_down_makes_health_503_without_saying_why_to_strangers() -> None:
    made = house(database_check=broken)
    status, _, body = await made.ask("/api/health")
    assert (status, body["status"], body["checks"]) == (503, "down", {"api": "ok", "database": "down"})
    assert "db-host" not in json.dumps(body)
    assert "db-host.internal" in made.stream.getvalue() or "db-host.internal" in json.dumps(made.records())


@pytest.mark.parametrize(("seconds", "status", "state"), [(0.9, 200, "ok"), (1.0, 200, "degraded"), (3.0, 503, "down")])
async def test_a_slow_database_is_degraded_and_a_silent_one_down(
    seconds: float, status: int, state: str, autojump_clock: trio.testing.MockClock
) -> None:
    got, _, body = await house(database_check=partial(trio.sleep, seconds)).ask("/api/health")
    assert (got, body["status"], body["checks"]["database"]) == (status, state, state)


async def test_a_health_request_as_a_whole_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    made = house({"HEALTH_CHECK_DB_TIMEOUT": "60000"}, database_check=trio.sleep_forever)
    status, _, body = await made.ask("/api/health")
    assert (status, body["code"]) == (504, "GATEWAY_TIMEOUT")
    assert trio.current_time() == pytest.approx(5)


async def test_a_crash_of_the_database_probe_is_down_not_an_error() -> None:
    async def crash() -> None:
        async with trio.open_nursery():
            raise ZeroDivisionError

    assert (await house(database_check=crash).ask("/api/health"))[0] == 503


async def test_probes_that_wait_together_ask_the_database_once(autojump_clock: trio.testing.MockClock) -> None:
    asked = 0

    async def slow() -> None:
        nonlocal asked
        asked += 1
        await trio.sleep(0.5)

    made = house(database_check=slow)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(made.ask, "/readyz")
    assert asked <= 2
    await made.ask("/readyz")
    assert asked <= 3


async def test_liveness_is_ok_whatever_happens_elsewhere() -> None:
    made = house(database_check=broken, draining=lambda: True, pending_migrations=lambda: 3)
    assert (await made.ask("/livez"))[0] == 200
    assert (await made.ask("/healthz"))[0] == 200


@pytest.mark.parametrize(
    ("given", "details"),
    [
        ({"draining": lambda: True}, {"draining": True, "pendingMigrations": 0, "database": "ok"}),
        ({"database_check": broken}, {"draining": False, "pendingMigrations": 0, "database": "down"}),
        ({"pending_migrations": lambda: 2}, {"draining": False, "pendingMigrations": 2, "database": "ok"}),
    ],
)
async def test_readiness_says_what_is_missing(given: dict[str, Any], details: dict[str, Any]) -> None:
    assert (await house().ask("/readyz"))[0] == 200
    status, headers, body = await house(**given).ask("/readyz")
    assert (status, body["code"], body["details"]) == (503, "SERVICE_UNAVAILABLE", details)
    assert headers["retry-after"] == "1"


# Metrics


async def test_metrics_are_prometheus_text_refreshed_before_the_scrape() -> None:
    made = house()
    made = House(
        probes(attrs.evolve(made.deps, refresh_metrics=lambda: made.deps.metrics.active_vaults.set(7))),
        made.deps,
        made.logs,
        made.stream,
    )
    for path in ("/api/metrics", "/metrics"):
        status, headers, body = await made.ask(path)
        assert status == 200
        assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"callora_active_vaults 7.0" in body


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "scrape-me", "Basic scrape-me", "Bearer scrape-me2", "Bearer é"],
)
async def test_production_metrics_are_for_the_key_alone(authorization: str | None) -> None:
    made = house(PRODUCTION)
    headers = {} if authorization is None else {"Authorization": authorization}
    status, answered, body = await made.ask("/api/metrics", headers=headers)
    assert (status, body["code"], answered["www-authenticate"]) == (401, "UNAUTHORIZED", "Bearer")
    assert (await made.ask("/api/metrics", headers={"Authorization": "Bearer scrape-me"}))[0] == 200
    assert (await made.ask("/api/metrics", headers={"authorization": "bearer scrape-me"}))[0] == 200


async def test_requests_are_counted_by_template_and_an_unknown_path_or_method_makes_no_series() -> None:
    made = house()
    await made.ask("/livez")
    for number in range(5):
        await made.ask(f"/made/up/{number}")
    await made.ask("/livez", method="BREW")
    text = made.deps.metrics.render().decode()
    assert 'http_requests_total{method="GET",route="/livez",route_group="health",status_code="200"} 1.0' in text
    assert 'http_requests_total{method="GET",route="_unknown",route_group="other",status_code="404"} 5.0' in text
    assert 'method="OTHER",route="_unknown",route_group="other",status_code="405"' in text
    assert "BREW" not in text
    assert "made/up" not in text


# What every answer has


@pytest.mark.parametrize("path", ["/livez", "/api/metrics", "/nowhere", "/boom"])
async def test_every_answer_has_a_request_id_and_security_headers(path: str) -> None:
    made = house()
    add_route(made, "/boom", ValueError("x"))
    _, headers, _ = await made.ask(path)
    assert headers["x-request-id"] == "made-id"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize("sent", ["a", "x" * 128, "req-1/2:3"])
async def test_a_usable_request_id_is_kept(sent: str) -> None:
    _, headers, body = await house().ask("/nowhere", headers={"X-Request-Id": sent})
    assert headers["x-request-id"] == body["requestId"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "two words", "é", "tab\there"])
async def test_an_unusable_request_id_is_replaced(sent: str) -> None:
    _, headers, body = await house().ask("/nowhere", headers={"X-Request-Id": sent})
    assert headers["x-request-id"] == body["requestId"] == "made-id"


async def test_only_allowed_origins_may_read_answers() -> None:
    made = house({"CORS_ALLOWED_ORIGINS": "https://app.example.com"})
    _, headers, _ = await made.ask("/livez", headers={"Origin": "https://app.example.com"})
    assert headers["access-control-allow-origin"] == "https://app.example.com"
    assert "X-Request-Id" in headers["access-control-expose-headers"]
    assert headers["vary"] == "Origin"
    for origin in ("https://evil.example.com", "null", "https://app.example.com.evil.com"):
        _, headers, _ = await made.ask("/livez", headers={"Origin": origin})
        assert "access-control-allow-origin" not in headers
        assert headers["vary"] == "Origin"


async def test_a_preflight_is_answered_for_allowed_origins_only() -> None:
    made = house({"CORS_ALLOWED_ORIGINS": "https://app.example.com"})
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    status, headers, _ = await made.ask("/api/anything", method="OPTIONS", headers=asked)
    assert (status, headers["access-control-allow-origin"]) == (204, "https://app.example.com")
    assert "POST" in headers["access-control-allow-methods"]
    assert "Idempotency-Key" in headers["access-control-allow-headers"]
    status, headers, _ = await made.ask(
        "/api/anything", method="OPTIONS", headers={**asked, "Origin": "https://evil.example.com"}
    )
    assert status == 204
    assert not [name for name, _ in headers if name.lower().startswith("access-control")]


async def test_the_client_is_who_our_listener_says_and_nobody_else() -> None:
    made = house()
    await made.ask("/livez", headers={"X-Forwarded-For": "203.0.113.9"})
    assert made.records()[-1]["client"] == "203.0.113.9"
    direct = house(behind_listener=False)
    await direct.ask("/livez", headers={"X-Forwarded-For": "203.0.113.9"})
    assert direct.records()[-1]["client"] != "203.0.113.9"


async def test_a_request_is_recorded_without_its_query() -> None:
    made = house()
    await made.ask("/nowhere?token=tell-no-one")
    record = made.records()[-1]
    assert (record["event"], record["request_id"], record["path"], record["status"]) == (
        "request",
        "made-id",
        "/nowhere",
        404,
    )
    assert "tell-no-one" not in made.stream.getvalue()


# Errors


def add_route(made: House, path: str, error: BaseException | None, *, reads: bool = False) -> None:
    """Add a route that reads the body if asked, then raises, or answers ok where there is nothing to raise."""

    async def route() -> Response:
        if reads:
            await request.get_data()
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error
        return Response("ok")

    made.app.add_url_rule(path, path, route, methods=["GET", "POST"])


async def test_an_unknown_path_and_a_wrong_method_are_documents() -> None:
    made = house()
    status, headers, body = await made.ask("/api/nowhere")
    assert (status, headers["content-type"], body["code"]) == (404, "application/json", "NOT_FOUND")
    assert body == {"code": "NOT_FOUND", "message": "Not found", "requestId": "made-id"}
    status, headers, body = await made.ask("/livez", method="DELETE")
    assert (status, body["code"], headers["allow"]) == (405, "METHOD_NOT_ALLOWED", "GET, HEAD, OPTIONS")


async def test_a_defect_is_a_bare_500_and_its_story_is_in_the_log() -> None:
    made = house()
    add_route(made, "/boom", ValueError("SELECT secret FROM host-17"))
    status, _, body = await made.ask("/boom")
    assert (status, body["code"]) == (500, "INTERNAL_SERVER_ERROR")
    assert "SELECT" not in json.dumps(body)
    [record] = [each for each in made.records() if each["level"] == "error"]
    assert record["request_id"] == "made-id"
    assert record["exception"][0]["exc_value"] == "SELECT secret FROM host-17"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ExceptionGroup("one", [ProblemRaised("NOT_FOUND")]), 404, "NOT_FOUND"),
        (ExceptionGroup("two", [ProblemRaised("FORBIDDEN"), ValueError()]), 500, "INTERNAL_SERVER_ERROR"),
        (ExceptionGroup("deep", [ExceptionGroup("in", [ProblemRaised("CONFLICT")])]), 409, "CONFLICT"),
        (trio.TooSlowError(), 504, "GATEWAY_TIMEOUT"),
    ],
)
async def test_a_group_is_a_problem_only_if_all_of_it_is(error: Exception, status: int, code: str) -> None:
    made = house()
    add_route(made, "/group", error)
    got, _, body = await made.ask("/group")
    assert (got, body["code"]) == (status, code)
    if status == 500:
        assert "ValueError" in json.dumps(made.records())


async def test_a_problem_carries_its_message_details_and_headers() -> None:
    made = house()
    add_route(made, "/p", ProblemRaised("CONFLICT", "No.", details={"a": "b"}, headers={"Retry-After": "3"}))
    status, headers, body = await made.ask("/p")
    assert (status, headers["retry-after"]) == (409, "3")
    assert body == {"code": "CONFLICT", "message": "No.", "requestId": "made-id", "details": {"a": "b"}}


@pytest.mark.parametrize("reads", [True, False])
async def test_a_body_over_the_limit_is_413_whether_or_not_the_route_reads_it(reads: bool) -> None:
    made = house({"REQUEST_BODY_LIMIT": "1kb"})
    add_route(made, "/in", None, reads=reads)
    status, _, body = await made.ask("/in", method="POST", data=b"x" * 1025)
    assert (status, body["code"], body["requestId"]) == (413, "REQUEST_BODY_TOO_LARGE", "made-id")
    assert (await made.ask("/in", method="POST", data=b"x" * 1024))[0] == 200


# Served


@attrs.frozen
class Served:
    path: str
    stop: trio.Event
    ended: trio.Event


@asynccontextmanager
async def served(made: House, path: Path) -> AsyncIterator[Served]:
    """Serve the app on a UNIX socket; stop it, and wait until it has stopped, at the end."""
    bind = f"{path}/rest.sock"
    stop, ended = trio.Event(), trio.Event()

    ready = trio.Event()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            binds = await nursery.start(
                partial(
                    serve_rest,
                    made.app,
                    binds=[f"unix:{bind}"],
                    logger=made.logs.stdlib_logger("hypercorn"),
                    shutdown=stop.wait,
                    graceful_timeout_seconds=20,
                    keep_alive_seconds=60,
                )
            )
            assert binds == [f"http://unix:{bind}"]
            ready.set()
        ended.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)  # noqa: ASYNC113
            await ready.wait()
            yield Served(bind, stop, ended)
            stop.set()


async def send_raw(path: str, data: bytes) -> trio.SocketStream:
    stream = await trio.open_unix_socket(path)
    await stream.send_all(data)
    return stream


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Return what arrives until the server closes; a server that never does fails the test."""
    got = bytearray()
    with trio.fail_after(15):
        async for chunk in stream:
            got += chunk
    return bytes(got)


async def test_a_client_that_asks_to_close_gets_the_end_of_the_stream(tmp_path: Path) -> None:
    async with served(house(), tmp_path) as server:
        async with await send_raw(
            server.path, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ) as stream:
            answer = await read_to_end(stream)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b'{"status":"ok"}'
    assert b"server:" not in head.lower()


async def test_an_http_1_0_client_gets_the_end_of_the_stream(tmp_path: Path) -> None:
    async with served(house(), tmp_path) as server:
        async with await send_raw(server.path, b"GET /nowhere HTTP/1.0\r\nHost: x\r\n\r\n") as stream:
            assert b'"code":"NOT_FOUND"' in await read_to_end(stream)


async def test_a_shutdown_waits_for_running_requests_and_not_a_moment_longer(tmp_path: Path) -> None:
    begun, may_end = trio.Event(), trio.Event()

    async def slow() -> None:
        begun.set()
        await may_end.wait()

    made = house({"HEALTH_CHECK_DB_TIMEOUT": "60000", "HEALTH_REQUEST_TIMEOUT_MS": "60000"}, database_check=slow)
    async with served(made, tmp_path) as server:
        # one idle connection, one that never asked anything, one in flight
        idle = await send_raw(server.path, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await idle.receive_some(65536)).startswith(b"HTTP/1.1 200")
        mute = await trio.open_unix_socket(server.path)
        busy = await send_raw(server.path, b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n")
        await begun.wait()
        server.stop.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not server.ended.is_set()
        may_end.set()
        assert (await read_to_end(busy)).startswith(b"HTTP/1.1 200")
        # the grace period is 20 s: reaching this within 15 shows that nothing waited for it
        with trio.fail_after(15):
            await server.ended.wait()
        for stream in (idle, mute, busy):
            await stream.aclose()
    assert not await trio.Path(server.path).exists()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"//livez", b"200"),
        (b"/livez/", b"200"),
        (b"/livez/..", b"404"),
        (b"/livez//x", b"404"),
        (b"/%ff%00", b"404"),
        (b"*", b"404"),
        (b"/" + b"x" * 9000, b"404"),
        (b"http://x/nowhere", b"404"),
    ],
)
async def test_odd_targets_get_an_answer_of_ours_and_never_a_redirect(
    tmp_path: Path, target: bytes, status: bytes
) -> None:
    async with served(house(), tmp_path) as server:
        async with await send_raw(
            server.path, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ) as stream:
            answer = await read_to_end(stream)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert (b'"code":"NOT_FOUND"' in answer) is (status == b"404")


async def test_a_websocket_handshake_is_refused(tmp_path: Path) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    made = house()
    async with served(made, tmp_path) as server:
        request_head = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + upgrade + b"AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        async with await send_raw(server.path, request_head) as stream:
            assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 403")
    assert [each for each in made.records() if each["level"] == "error"] == []


async def test_the_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    async with served(house(), tmp_path) as server:
        mode = (await trio.Path(server.path).stat()).st_mode
        assert mode & 0o777 == 0o600


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_endless_body_is_refused_and_its_connection_ends(tmp_path: Path, chunked: bool) -> None:
    made = house({"REQUEST_BODY_LIMIT": "64kb"})
    add_route(made, "/in", None, reads=True)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 99999999"
    piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n" if chunked else b"x" * 0x8000
    async with served(made, tmp_path) as server:
        stream = await send_raw(server.path, b"POST /in HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        got = b""

        async def send_on() -> None:
            try:
                for _ in range(3000):
                    await stream.send_all(piece)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_on)
            with trio.fail_after(60):
                try:
                    while chunk := await stream.receive_some(65536):
                        got += chunk
                except trio.BrokenResourceError:
                    pass
            nursery.cancel_scope.cancel()
        await stream.aclose()
        assert got.startswith(b"HTTP/1.1 413")
        assert b'"code":"REQUEST_BODY_TOO_LARGE"' in got
        assert b"connection: close" in got.lower()
        server.stop.set()
        with trio.fail_after(15):
            await server.ended.wait()


async def test_a_refusal_is_sent_even_while_the_queue_of_body_parts_is_full() -> None:
    """The server announces the end of an answer through the same bounded queue that the body comes through."""
    made = house({"REQUEST_BODY_LIMIT": "1b"})
    put, take = trio.open_memory_channel[dict[str, Any]](1)
    put.send_nowait({"type": "http.request", "body": b"x", "more_body": True})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await put.send({"type": "http.disconnect"})
            sent.append("closed")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/in",
        "headers": [(b"content-length", b"99")],
        "client": None,
    }
    with trio.fail_after(60):
        await made.app.asgi_app(scope, take.receive, send)  # type: ignore[arg-type]
    put.close()
    take.close()
    assert sent[0]["status"] == 413
    assert sent[-1] == "closed"


async def test_a_client_that_leaves_cancels_its_request_and_is_counted(tmp_path: Path) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def slow() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    made = house({"HEALTH_CHECK_DB_TIMEOUT": "60000", "HEALTH_REQUEST_TIMEOUT_MS": "60000"}, database_check=slow)
    async with served(made, tmp_path) as server:
        stream = await send_raw(server.path, b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n")
        await begun.wait()
        await stream.aclose()
        await ended.wait()
    assert 'status_code="499"' in made.deps.metrics.render().decode()
    assert [each for each in made.records() if each["level"] == "error"] == []


async def test_an_inherited_socket_can_be_served(tmp_path: Path) -> None:
    made = house()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    stop = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    serve_rest,
                    made.app,
                    binds=[f"fd://{listener.detach()}"],
                    logger=made.logs.stdlib_logger("hypercorn"),
                    shutdown=stop.wait,
                    graceful_timeout_seconds=5,
                    keep_alive_seconds=5,
                )
            )
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert (await read_to_end(stream)).endswith(b'{"status":"ok"}')
            stop.set()
    assert any(record.get("part") == "hypercorn" for record in made.records())
