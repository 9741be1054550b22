"""Idempotency: one intent, one upstream call, one charge; and nobody sees another's answer."""

from functools import partial

import pytest
import trio

from callora.actors.mailbox import Envelope
from callora.http.gateway import calls
from callora.http.gateway.calls import Call, CallFlow
from callora.ledger.commands import Delivery, StoredAnswer, release
from callora.ledger.money import parse_usdc
from tests.support.client import RawClient, RawResponse, call, closed_port, request_bytes, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import (
    Handler,
    RawUpstream,
    chunked,
    garbage,
    gated,
    raw_upstream,
    reset_before_head,
    respond,
    silent,
    wrong_length,
)

PATH = "/v1/call/echo/x"
PRICE = parse_usdc("0.01")
# Not the answer's own: they say what this request cost and where its limits stand.
CHANGING = {
    *(
        "x-request-id",
        "x-callora-charge",
        "x-callora-balance",
        "x-ratelimit-remaining",
        "x-ratelimit-reset",
        "ratelimit",
    ),
    *("server-timing", "idempotent-replayed", "content-length", "transfer-encoding"),
}


class Dying(CallFlow):
    """A flow that never closes what it holds, as a process that is killed does not."""

    def _release(self, call: Call, answer: StoredAnswer | None) -> Envelope:
        call.state = "closed"
        return Envelope(release(call.event_id, call.held, Delivery("lost"), answer))


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("1")


def keyed(consumer: Consumer, key: str = "one") -> list[tuple[str, str]]:
    return [*consumer.headers, ("Idempotency-Key", key)]


def code(response: RawResponse) -> str:
    return str(response.json()["code"])


def lasting(response: RawResponse) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Return what a replay repeats."""
    headers = [(name, value) for name, value in response.headers if name.lower() not in CHANGING]
    return response.status, response.body, headers


async def test_wa11_fifty_duplicates_at_once_are_one_call_and_one_charge(database_url: str) -> None:
    gate = trio.Event()
    answer = respond(201, [("Content-Type", "text/plain"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")], b"only once")
    async with running_service(database_url) as service, raw_upstream(gated(gate, answer)) as upstream:
        consumer = await ready(service, upstream)
        responses: list[RawResponse] = []

        async def one() -> None:
            responses.append(await call(service.port, "POST", PATH, keyed(consumer), b"body"))
            if len(responses) == 49:
                gate.set()

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
        assert [code(response) for response in responses[:49]] == ["IDEMPOTENCY_IN_PROGRESS"] * 49
        first = responses[49]
        assert (first.status, first.body) == (201, b"only once")
        responses.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
        for response in responses:
            assert lasting(response) == lasting(first)
            assert response.header("Idempotent-Replayed") == "true"
            assert response.header("X-Callora-Charge") == "0.0000000"
        assert len(upstream.requests) == 1
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)
        assert await service.events(consumer) == [("captured", "delivered", PRICE, 201)]


async def test_after_a_restart_a_duplicate_gets_the_first_answer_still(database_url: str) -> None:
    answer = chunked([b"one", b"two"], [("Content-Type", "text/plain"), ("X-Odd", "\xe4")])
    async with raw_upstream(answer) as upstream:
        async with running_service(database_url) as service:
            consumer = await ready(service, upstream)
            first = await call(service.port, "GET", PATH, keyed(consumer))
        async with running_service(database_url) as service:
            second = await call(service.port, "GET", PATH, keyed(consumer))
            assert lasting(second) == lasting(first)
            assert second.header("Idempotent-Replayed") == "true"
            assert await service.balance(consumer) == (parse_usdc("0.99"), 0)
        assert len(upstream.requests) == 1


async def test_two_services_on_one_database_call_the_upstream_once(database_url: str) -> None:
    async with (
        running_service(database_url) as one,
        running_service(database_url) as other,
        raw_upstream(respond(body=b"x")) as upstream,
    ):
        consumer = await ready(one, upstream)
        responses: list[RawResponse] = []

        async def ask(service: RunningService) -> None:
            responses.append(await call(service.port, "GET", PATH, keyed(consumer)))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask, one)
                nursery.start_soon(ask, other)
        assert len(upstream.requests) == 1
        assert all(response.status == 200 or code(response) == "IDEMPOTENCY_IN_PROGRESS" for response in responses)
        assert await one.balance(consumer) == (parse_usdc("0.99"), 0)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PROPFIND"])
async def test_every_method_may_be_an_intent(database_url: str, method: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"x")) as upstream:
        consumer = await ready(service, upstream)
        first = await call(service.port, method, PATH, keyed(consumer))
        second = await call(service.port, method, PATH, keyed(consumer))
        assert lasting(first) == lasting(second)
        assert first.header("Content-Length") == second.header("Content-Length") == "1"
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [204, 302, 404, 500])
async def test_an_answer_that_cost_nothing_is_the_answer_all_the_same(database_url: str, status: int) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(status)) as upstream:
        consumer = await ready(service, upstream)
        first = await call(service.port, "GET", PATH, keyed(consumer))
        second = await call(service.port, "GET", PATH, keyed(consumer))
        assert lasting(first) == lasting(second)
        assert len(upstream.requests) == 1
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("0.99" if status == 204 else "1"), 0)


async def test_nobody_else_sees_the_answer_under_the_same_name(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"secret")) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", PATH, keyed(consumer))).body == b"secret"
        upstream.handler = respond(body=b"another")
        second_key = await service.another_key(consumer.user_id, consumer.vault_id, 1000)
        response = await call(service.port, "GET", PATH, keyed(second_key))
        assert (response.status, code(response)) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        other_vault = await service.consumer("1")
        response = await call(service.port, "GET", PATH, keyed(other_vault))
        assert response.body == b"another"
        assert response.header("Idempotent-Replayed") is None
        assert await service.balance(other_vault) == (parse_usdc("0.99"), 0)


async def test_other_names_are_other_intents(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        for key in ("a", "A", "a" * 255, "~!@#$%^&*()"):
            assert (await call(service.port, "GET", PATH, keyed(consumer, key))).status == 200
        assert len(upstream.requests) == 4


@pytest.mark.parametrize("headers", [[""], ["a" * 256], ["a b"], ["\xe4"], ["a", "a"], ["a", "b"], ["a\tb"]])
async def test_a_name_that_is_none_is_refused(database_url: str, headers: list[str]) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        sent = [*consumer.headers, *(("Idempotency-Key", value) for value in headers)]
        response = await call(service.port, "GET", PATH, sent)
        assert (response.status, code(response)) == (400, "INVALID_IDEMPOTENCY_KEY")
        assert upstream.requests == []


async def test_the_intent_of_a_process_that_died_is_taken_over_when_its_hold_has_expired(database_url: str) -> None:
    settings = {"HOLD_TTL_SECONDS": "1", "PROXY_TIMEOUT_MS": "500", "HOLD_SWEEP_INTERVAL_SECONDS": "1"}
    with closed_port() as port:
        async with running_service(database_url, settings, flow_class=Dying) as service:
            await service.api("echo", f"http://127.0.0.1:{port}")
            consumer = await service.consumer("1")
            assert (await call(service.port, "GET", PATH, keyed(consumer))).status == 502
            assert await service.balance(consumer) == (parse_usdc("0.99"), PRICE)
            response = await call(service.port, "GET", PATH, keyed(consumer))
            assert code(response) == "IDEMPOTENCY_IN_PROGRESS"
            other = await call(service.port, "POST", PATH, keyed(consumer))
            assert code(other) == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
    async with running_service(database_url, settings) as service, raw_upstream(respond(body=b"x")) as upstream:
        await service.api("echo", upstream.url)
        with watchdog("the first hold to expire"):
            while (response := await call(service.port, "GET", PATH, keyed(consumer))).status == 409:
                assert code(response) == "IDEMPOTENCY_IN_PROGRESS"
        assert (response.status, response.header("Idempotent-Replayed")) == (200, None)
        assert len(upstream.requests) == 1
        assert await service.events(consumer) == [
            ("expired", "expired", None, None),
            ("captured", "delivered", PRICE, 200),
        ]
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)
        assert (await call(service.port, "GET", PATH, keyed(consumer))).header("Idempotent-Replayed") == "true"


async def test_a_connect_failure_frees_the_name_for_the_same_request_alone(database_url: str) -> None:
    with closed_port() as port:
        async with running_service(database_url) as service, raw_upstream(respond(body=b"x")) as upstream:
            await service.api("echo", f"http://127.0.0.1:{port}")
            consumer = await service.consumer("1")
            for _ in range(2):
                response = await call(service.port, "GET", PATH, keyed(consumer))
                assert (response.status, code(response)) == (502, "BAD_GATEWAY")
                await service.until_no_hold(consumer)
            response = await call(service.port, "GET", PATH + "?other", keyed(consumer))
            assert code(response) == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
            await service.api("other", upstream.url)
            other = "/v1/call/other/x"
            assert (await call(service.port, "GET", other, keyed(consumer, "two"))).status == 200
            assert (await call(service.port, "GET", other, keyed(consumer, "two"))).status == 200
            assert len(upstream.requests) == 1
            assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_a_name_is_remembered_for_its_retention_and_then_free(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(body=b"first")) as upstream:
        consumer = await ready(service, upstream)
        await call(service.port, "GET", PATH, keyed(consumer))
        kept = "SELECT extract(epoch FROM expires_at - created_at)::int FROM idempotency_keys"
        assert await service.database.fetch_value(kept) == 86_400
        upstream.handler = respond(body=b"second")
        await service.database.execute("UPDATE idempotency_keys SET expires_at = now() + interval '1 minute'")
        assert (await call(service.port, "GET", PATH, keyed(consumer))).body == b"first"
        await service.database.execute("UPDATE idempotency_keys SET expires_at = now() - interval '1 second'")
        response = await call(service.port, "GET", PATH, keyed(consumer))
        assert (response.body, response.header("Idempotent-Replayed")) == (b"second", None)
        response = await call(service.port, "GET", PATH, keyed(consumer))
        assert (response.body, response.header("Idempotent-Replayed")) == (b"second", "true")
        assert await service.balance(consumer) == (parse_usdc("0.98"), 0)


@pytest.mark.parametrize("size", [1023, 1024, 1025])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_answer_is_stored_up_to_the_limit_and_not_a_byte_more(
    database_url: str, size: int, framing: str
) -> None:
    body = b"x" * size
    answer = respond(body=body) if framing == "length" else chunked([body[:500], body[500:]])
    async with (
        running_service(database_url, {"IDEMPOTENCY_MAX_BODY": "1kb"}) as service,
        raw_upstream(answer) as upstream,
    ):
        consumer = await ready(service, upstream)
        first = await call(service.port, "GET", PATH, keyed(consumer))
        assert (first.status, first.body) == (200, body)
        for _ in range(2):
            response = await call(service.port, "GET", PATH, keyed(consumer))
            if size <= 1024:
                assert lasting(response) == lasting(first)
            else:
                assert (response.status, code(response)) == (409, "IDEMPOTENCY_NOT_REPLAYABLE")
                assert response.json()["details"]["charge"] == "0.0100000"
        assert len(upstream.requests) == 1
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_a_stream_of_events_passes_at_once_and_is_not_replayable(database_url: str) -> None:
    answer = chunked([b"data: 1\n\n"], [("Content-Type", "Text/Event-Stream; charset=utf-8")])
    async with running_service(database_url) as service, raw_upstream(answer) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", PATH, keyed(consumer))).body == b"data: 1\n\n"
        response = await call(service.port, "GET", PATH, keyed(consumer))
        assert (response.status, code(response)) == (409, "IDEMPOTENCY_NOT_REPLAYABLE")
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_a_keyed_body_past_what_is_kept_in_memory_is_refused_before_anything_is_held(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        fits = await call(service.port, "POST", PATH, keyed(consumer), b"x" * (1 << 20))
        assert fits.status == 200
        response = await call(service.port, "POST", PATH, keyed(consumer, "two"), b"x" * ((1 << 20) + 1))
        assert (response.status, code(response)) == (413, "REQUEST_BODY_TOO_LARGE")
        assert len(upstream.requests) == 1
        assert await service.events(consumer) == [("captured", "delivered", PRICE, 200)]


async def test_a_refused_duplicate_leaves_no_event_and_takes_no_money(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await call(service.port, "GET", PATH, keyed(consumer))
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(partial(call, service.port, "GET", f"{PATH}?{number}", keyed(consumer)))
        assert len(await service.events(consumer)) == 1
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


@pytest.mark.parametrize(
    ("handler", "status"), [(silent(), 504), (reset_before_head(), 502), (garbage(), 502), (wrong_length(100, 10), 502)]
)
async def test_a_retry_of_what_the_upstream_may_have_seen_gets_our_refusal_again(
    database_url: str, handler: Handler, status: int
) -> None:
    settings = {"PROXY_TIMEOUT_MS": "200", "HOLD_TTL_SECONDS": "5"} if status == 504 else {}
    async with running_service(database_url, settings) as service, raw_upstream(handler) as upstream:
        consumer = await ready(service, upstream)
        first = await call(service.port, "GET", PATH, keyed(consumer))
        assert first.status == status
        await service.until_no_hold(consumer)
        upstream.handler = respond(body=b"late")
        second = await call(service.port, "GET", PATH, keyed(consumer))
        assert second.header("Idempotent-Replayed") == "true"
        assert lasting(second) == lasting(first)
        assert len(upstream.requests) == 1
        assert await service.balance(consumer) == (parse_usdc("1"), 0)


async def test_a_retry_of_a_client_that_left_before_the_answer_is_a_new_attempt(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(silent()) as upstream:
        consumer = await ready(service, upstream)
        async with RawClient.connect(port=service.port) as client:
            await client.send(request_bytes("GET", PATH, keyed(consumer)))
            await upstream.wait_requests(1)
            await client.reset()
        await upstream.wait_peer_gone()
        await service.until_no_hold(consumer)
        upstream.handler = respond(body=b"x")
        assert (await call(service.port, "GET", PATH, keyed(consumer))).body == b"x"
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)


async def test_a_call_whose_body_took_long_is_placed_under_a_young_id(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "NAMED_SECONDS_MAX", -1.0)
    async with running_service(database_url) as service, raw_upstream(respond(body=b"once")) as upstream:
        consumer = await ready(service, upstream)
        first = await call(service.port, "POST", PATH, keyed(consumer), b"x")
        again = await call(service.port, "POST", PATH, keyed(consumer), b"x")
        assert (first.status, again.header("Idempotent-Replayed")) == (200, "true")
        rows = await service.database.fetch("SELECT event_id FROM usage_events")
    assert len(rows) == 1
    assert str(rows[0]["event_id"]) != first.header("X-Request-Id")
