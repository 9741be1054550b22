"""Live usage over REST: each call once, in order, whichever process a client comes back to."""

from contextlib import AsyncExitStack

import pytest
import trio

from callora.actors import live_usage
from callora.dashboard import token_settings
from callora.http.rest.identity import mint_access_token
from callora.ledger.ids import UserId
from callora.ledger.money import parse_usdc
from callora.store.accounts import PricedEndpoint
from tests.support.client import call
from tests.support.events import PATH, EventStream, follow
from tests.support.rest import rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.wallets import Wallet, login_service

ENDPOINTS = (PricedEndpoint("GET", "/search", parse_usdc("0.01")),)
QUICK = {
    "REST_RATE_LIMIT_MAX_REQUESTS": "100000",
    "USAGE_STREAM_INTERVAL_MS": "20",
    "USAGE_ROLLUP_INTERVAL_MS": "3600000",
}


MANY = 12_000
"""More calls than fit between the service and a client that takes nothing."""


def who(consumer: Consumer) -> dict[str, str]:
    return {"X-User-Id": consumer.user_id}


async def paid(service: RunningService, consumer: Consumer, times: int = 1) -> None:
    for _ in range(times):
        assert (await call(service.port, "GET", "/v1/call/echo/search", consumer.headers)).status == 200


async def ids_of(service: RunningService, consumer: Consumer) -> list[str]:
    """Return the consumer's calls in the order in which they closed."""
    sql = "SELECT event_id FROM usage_events WHERE vault_id = $1 AND state <> 'held' ORDER BY closed_at, event_id"
    return [str(row["event_id"]) for row in await service.database.fetch(sql, consumer.vault_id)]


async def test_a_call_is_told_as_it_is_listed_and_a_client_that_comes_back_misses_nothing(database_url: str) -> None:
    async with (
        running_service(database_url, QUICK) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("echo", upstream.url, ENDPOINTS)
        consumer, other = await service.consumer("1"), await service.consumer("1")
        async with follow(service.port, who(consumer)) as stream:
            assert (await stream.expect("connected")).data == {"resumed": False, "lastEventId": "0"}
            assert stream.retry == 2000
            await paid(service, consumer)
            await paid(service, other)
            told = await stream.expect("usage")
            listed = (await client.get("/api/usage", headers=who(consumer))).json()["events"]
            assert {**listed[0], "vaultId": consumer.vault_id, "closedAt": told.data["closedAt"]} == told.data
            assert told.event_id == listed[0]["id"]
        await paid(service, consumer, 3)
        async with follow(service.port, who(consumer), stream.last_id) as again:
            connected = await again.expect("connected")
            assert connected.data == {"resumed": True, "lastEventId": told.event_id}
            missed = await again.usage(3)
            await paid(service, consumer)
            assert [told.event_id, *missed, *await again.usage(1)] == await ids_of(service, consumer)
        async with follow(service.port, who(consumer), "0") as from_the_start:
            await from_the_start.expect("connected")
            assert await from_the_start.usage(5) == await ids_of(service, consumer)
    assert service.exit_code == 0


async def closed(service: RunningService, consumer: Consumer, count: int) -> list[str]:
    """Store calls that have ended, and return their ids in the order in which they are told."""
    ids = [service.context.ids.uuid7() for _ in range(count)]
    await service.database.execute(
        "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
        " created_at, expires_at, price_version, state, amount, closed_at, outcome)"
        " SELECT $1, e, $2, $1, 1, 1, 0, $4, $4::timestamptz + interval '1 minute', 1, 'captured', 0, $4, 'delivered'"
        " FROM unnest($3::uuid[]) AS e",
        consumer.vault_id,
        consumer.api_key_id,
        ids,
        service.context.clock.now(),
    )
    return sorted(ids)


async def test_who_may_follow_and_how_many_at_once(database_url: str) -> None:
    few = {"USAGE_STREAMS_MAX": "3", "USAGE_STREAMS_PER_USER_MAX": "2", "USAGE_STREAM_HEARTBEAT_MS": "20"}
    async with running_service(database_url, {**QUICK, **few}) as service, AsyncExitStack() as open_streams:
        one, two = await service.consumer("1"), await service.consumer("1")

        async def opened(consumer: Consumer) -> EventStream:
            return await open_streams.enter_async_context(follow(service.port, who(consumer)))

        async with follow(service.port, {}) as refused:
            assert (refused.status, (await refused.problem())["code"]) == (401, "UNAUTHORIZED")
        async with follow(service.port, who(one), method="HEAD") as asked:
            assert asked.status == 200
            assert asked.head.header("Content-Type") == "text/event-stream"
        streams = [await opened(one), await opened(one)]
        for stream in streams:
            await stream.expect("connected")
            assert stream.head.header("Cache-Control") == "no-store"
            assert stream.head.header("X-Accel-Buffering") == "no"
        async with follow(service.port, who(one)) as refused:
            told = await refused.problem()
            assert (refused.status, told["code"]) == (429, "TOO_MANY_REQUESTS")
            assert told["details"] == {"limitedBy": "streams", "limit": 2, "retryAfter": 5}
            assert refused.head.header("Retry-After") == "5"
        streams.append(await opened(two))
        async with follow(service.port, who(two)) as refused:
            assert (refused.status, (await refused.problem())["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert await closed(service, one, 1) == await streams[0].usage(1)
        assert streams[0].comments > 0, "the silence before was broken by signs of life"
        await streams[0].wire.stream.aclose()
        with trio.fail_after(60):
            while True:  # the place of one who left is free once that is noticed
                async with follow(service.port, who(one)) as again:
                    if again.status == 200:
                        await again.expect("connected")
                        break


async def test_what_is_no_place_in_the_feed_is_told_to_begin_anew(database_url: str) -> None:
    async with running_service(database_url, QUICK) as service:
        consumer, other = await service.consumer("1"), await service.consumer("1")
        async with follow(service.port, who(other)) as theirs:
            await theirs.expect("connected")
            foreign = await closed(service, other, 1)
            assert await theirs.usage(1) == foreign
        for last in (*foreign, "nonsense", service.context.ids.uuid7()):
            async with follow(service.port, who(consumer), path=f"{PATH}?lastEventId={last}") as stream:
                assert (await stream.expect("reset")).data["reason"] == "not_kept"
                assert (await stream.expect("connected")).data["resumed"] is False
                ids = await closed(service, consumer, 1)
                assert await stream.usage(1) == ids
        async with follow(service.port, who(consumer), "x" * 65) as stream:
            await stream.expect("reset")


async def test_a_process_tells_what_another_one_closed(database_url: str) -> None:
    async with (
        running_service(database_url, QUICK) as near,
        running_service(database_url, QUICK) as far,
        raw_upstream(respond(200, body=b"paid")) as upstream,
    ):
        await near.api("echo", upstream.url, ENDPOINTS)
        consumer = await near.consumer("1")
        async with follow(near.port, who(consumer)) as here, follow(far.port, who(consumer)) as there:
            await here.expect("connected")
            await there.expect("connected")
            for service in (near, far, near, far, far):
                await paid(service, consumer)
            ids = await ids_of(near, consumer)
            assert await here.usage(5) == ids
            assert await there.usage(2) == ids[:2]
        async with follow(near.port, who(consumer), ids[1]) as elsewhere:
            await elsewhere.expect("connected")
            assert await elsewhere.usage(3) == ids[2:]


async def test_a_stream_ends_with_the_login_that_opened_it(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_usage, "RECHECK_SECONDS", 0.05)
    async with login_service(database_url, **QUICK) as (service, client):
        leaving, staying = await Wallet().log_in(client), await Wallet().log_in(client)
        tokens = token_settings(service.context.settings)
        assert tokens is not None
        session_id = await service.database.fetch_value(
            "SELECT session_id FROM sessions WHERE user_id = $1", staying.user_id
        )
        short = mint_access_token(
            tokens, service.context.clock, UserId(staying.user_id), str(session_id), None, seconds=3
        )
        async with (
            follow(service.port, leaving.person.headers) as first,
            follow(service.port, staying.person.headers) as second,
            follow(service.port, {"Authorization": f"Bearer {short}"}) as third,
        ):
            for stream in (first, second, third):
                await stream.expect("connected")
            assert (await leaving.person.ask("POST", "/api/auth/revoke-all")).status in (200, 204)
            assert (await first.expect("end")).data["reason"] == "session_ended"
            assert await first.next() is None
            async with follow(service.port, leaving.person.headers) as gone:
                assert gone.status == 401
            assert (await third.expect("end")).data["reason"] == "token_expired"
            assert await third.next() is None
            service.stop.set()
            assert (await second.expect("end")).data["reason"] == "draining"


@pytest.mark.parametrize("followers", [30, pytest.param(1000, marks=pytest.mark.proof)])
async def test_one_client_that_takes_nothing_keeps_nobody_waiting_and_misses_nothing_in_the_end(
    database_url: str, followers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_usage, "RECHECK_SECONDS", 0.0)
    settings = {**QUICK, "USAGE_STREAM_BUFFER_EVENTS": "100", "USAGE_STREAM_INTERVAL_MS": "200"}
    async with running_service(database_url, settings) as service, AsyncExitStack() as streams:
        stalled = await service.consumer("0")
        others = [await service.consumer("0") for _ in range(followers - 1)]
        slow = await streams.enter_async_context(follow(service.port, who(stalled), receive_bytes=4096))
        attentive = await streams.enter_async_context(follow(service.port, who(stalled)))
        theirs = [
            (consumer, await streams.enter_async_context(follow(service.port, who(consumer)))) for consumer in others
        ]
        for stream in (slow, attentive, *(stream for _, stream in theirs)):
            await stream.expect("connected")
        ids = await closed(service, stalled, MANY)
        expected = {consumer.vault_id: await closed(service, consumer, 3) for consumer in others}
        got: dict[str, list[str]] = {}

        async def take(consumer: Consumer, stream: EventStream) -> None:
            got[consumer.vault_id] = await stream.usage(3)

        async with trio.open_nursery() as nursery:
            for consumer, stream in theirs:
                nursery.start_soon(take, consumer, stream)
            assert await attentive.usage(MANY) == ids
        assert got == expected
        monkeypatch.setattr(live_usage, "LATE_SECONDS_MAX", 0.0)
        for _ in range(2):  # what is told the second time was looked for after everyone was rechecked
            assert await closed(service, others[0], 1) == await theirs[0][1].usage(1)
        seen: list[str] = []
        while (told := await slow.next()) is not None and told.kind == "usage":
            seen.append(str(told.event_id))
        assert told is not None, "it was told why"
        assert (told.kind, told.event_id) == ("lagged", seen[-1])
        assert await slow.next() is None
        assert len(seen) < MANY
        async with follow(service.port, who(stalled), slow.last_id) as again:
            await again.expect("connected")
            seen += await again.usage(MANY - len(seen))
        assert seen == ids


async def test_a_drain_says_goodbye_and_waits_for_no_client_that_takes_nothing(database_url: str) -> None:
    settings = {**QUICK, "USAGE_STREAM_BUFFER_EVENTS": "20000"}
    async with running_service(database_url, settings) as service:
        consumer = await service.consumer("0")
        async with (
            follow(service.port, who(consumer), receive_bytes=4096) as slow,
            follow(service.port, who(consumer)) as attentive,
        ):
            await slow.expect("connected")
            await attentive.expect("connected")
            ids = await closed(service, consumer, MANY)
            assert await attentive.usage(MANY) == ids
            service.stop.set()
            told = await attentive.expect("end")
            assert told.data["reason"] == "draining"
            assert attentive.retry is not None
            assert 1000 <= attentive.retry <= 4000
            assert await attentive.next() is None
            with trio.fail_after(60):
                while service.exit_code is None:  # noqa: ASYNC110 - it sets no event of ours
                    await trio.sleep(0.01)
    assert service.exit_code == 0
