"""Webhooks on a real database and real sockets: once at least, in order, and nobody waits for a bad receiver."""

import json
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import attrs
import pytest
import trio

from callora.actors.webhook_desk import EndpointChange
from callora.ledger.webhooks import RetryPolicy
from callora.store import webhooks as store
from callora.store.bridge import Connection, Database
from callora.store.outbox import Event, add_events
from callora.store.webhooks import EndpointDisabled, Replayed, StillPending
from tests.support.upstream import (
    Handler,
    RawUpstream,
    big,
    close_silently,
    endless_headers,
    garbage,
    gated,
    raw,
    raw_upstream,
    reset_before_head,
    respond,
    sequence,
    silent,
    wrong_length,
)
from tests.support.webhooks import Post, choosing, delivering, number_of, post_office

OK = respond(204)


def told(upstream: RawUpstream) -> list[int]:
    """Return the numbers of the events that reached a receiver, in order."""
    return [number_of(request) for request in upstream.requests]


async def test_an_event_reaches_every_endpoint_that_wants_it_and_no_other(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada, bob = await post.user(), await post.user()
        await post.endpoint(ada, f"{upstream.url}/one")
        await post.endpoint(ada, f"{upstream.url}/two?x=1", ["settlement_completed"])
        await post.endpoint(ada, f"{upstream.url}/other", ["settlement_failed"])
        await post.endpoint(bob, f"{upstream.url}/bob")
        gone = await post.endpoint(ada, f"{upstream.url}/gone")
        await store.delete_endpoint(database, gone, ada, post.clock.now())
        off = await post.endpoint(ada, f"{upstream.url}/off")
        await store.change_endpoint(database, off, ada, EndpointChange(disabled=True), post.clock.now())
        event = post.event(ada, 1)
        await post.happen(event, attrs.evolve(post.event(ada, 2), user_id=None))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 2})
        assert sorted(request.target for request in upstream.requests) == ["/one", "/two?x=1"]
        one, two = upstream.requests
        assert one.body == two.body
        body = json.loads(one.body)
        assert list(body) == ["event", "timestamp", "data"]
        assert (body["event"], body["data"]) == ("settlement_completed", {"number": 1})
        assert one.header("webhook-id") == two.header("webhook-id") == event.event_id
        assert one.header("X-Callora-Delivery") != two.header("X-Callora-Delivery")
        assert one.header("User-Agent") == "Callora-Webhook/1.0"
        assert (one.header("X-Callora-Event"), one.header("Content-Type")) == (
            "settlement_completed",
            "application/json",
        )
        assert one.header("X-Callora-Timestamp") == one.header("webhook-timestamp")


async def test_what_happened_before_an_endpoint_was_made_is_not_told(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        await post.happen(post.event(ada, 1))
        post.clock.pass_by(1)
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 2))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 1})
        assert told(upstream) == [2]


async def test_a_transaction_that_commits_late_is_not_passed_over(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        async with delivering(post.webhooks()):
            async with database.transaction() as late:
                await store_events(late, post, post.event(ada, 1, "slow"))
                await post.happen(post.event(ada, 2, "fast"))
                await post.until({"delivered": 1})
                assert told(upstream) == [2]
            await post.until({"delivered": 2})
        assert told(upstream) == [2, 1]


async def store_events(connection: Connection, post: Post, *events: Event) -> None:
    await add_events(connection, events, post.clock.now())


async def test_what_was_rolled_back_is_not_told(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        with suppress(RuntimeError):
            async with database.transaction() as connection:
                await store_events(connection, post, post.event(ada, 1))
                raise RuntimeError
        await post.happen(post.event(ada, 2))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 1})
        assert told(upstream) == [2]


@pytest.mark.parametrize(
    "handler",
    [
        respond(500),
        respond(503),
        respond(429),
        respond(408),
        respond(425),
        close_silently(),
        reset_before_head(),
        garbage(),
        endless_headers(),
    ],
    ids=["500", "503", "429", "408", "425", "closes", "resets", "garbage", "endless headers"],
)
async def test_a_failure_is_tried_again_under_the_same_ids_and_with_the_same_body(
    database: Database, handler: Handler
) -> None:
    async with post_office(database) as post, raw_upstream(sequence(handler, handler, OK)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1))
        async with delivering(post.webhooks()):
            await post.pass_until({"delivered": 1})
        assert len(upstream.requests) == 3
        for header in ("webhook-id", "X-Callora-Delivery", "X-Callora-Event"):
            assert len({request.header(header) for request in upstream.requests}) == 1
        assert len({request.body for request in upstream.requests}) == 1
        assert len({request.header("webhook-timestamp") for request in upstream.requests}) == 3
        assert len({request.header("webhook-signature") for request in upstream.requests}) == 3
        row = await database.fetch_row("SELECT attempts, last_status, due_at, closed_at FROM webhook_deliveries")
        assert row is not None
        assert (row["attempts"], row["last_status"], row["due_at"]) == (3, 204, None)


@pytest.mark.parametrize(
    "handler",
    [
        respond(200, body=b"x" * 100),
        big(10),
        wrong_length(claimed=100, sent=3),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ],
    ids=["a body", "10 MiB", "a short body", "a bad chunk"],
)
async def test_a_success_is_a_success_whatever_its_body(database: Database, handler: Handler) -> None:
    async with post_office(database) as post, raw_upstream(handler) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 1})
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 404, 413, 422])
async def test_a_refusal_and_a_redirect_are_not_tried_again(database: Database, status: int) -> None:
    async with post_office(database) as post, raw_upstream(respond(status, [("Location", "/x")])) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1), post.event(ada, 2))
        async with delivering(post.webhooks()):
            await post.until({"dead": 2})
        assert (told(upstream), {request.target for request in upstream.requests}) == ([1, 2], {"/"})


async def test_an_endpoint_that_is_gone_is_disabled_and_what_waits_is_kept(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(sequence(respond(410), OK)) as upstream:
        ada = await post.user()
        endpoint_id = await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1), post.event(ada, 2))
        async with delivering(post.webhooks()):
            await post.until({"dead": 1, "pending": 1})
            row = await database.fetch_row("SELECT disabled_why, due_at FROM webhook_endpoints")
            assert row is not None
            assert row["disabled_why"] == "gone"
            await post.happen(post.event(ada, 3))
            await post.until({"dead": 1, "pending": 1})
            change = EndpointChange(disabled=False)
            assert await store.change_endpoint(database, endpoint_id, ada, change, post.clock.now())
            await post.until({"dead": 1, "delivered": 1})
        assert told(upstream) == [1, 2]


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_a_delivery_is_given_up_after_its_retries_and_may_be_made_again(database: Database, retries: int) -> None:
    async with post_office(database) as post, raw_upstream(respond(500)) as upstream:
        ada = await post.user()
        bob = await post.user()
        await post.endpoint(ada, upstream.url, policy=RetryPolicy(retries, 100))
        event = post.event(ada, 1)
        await post.happen(event)
        webhooks = post.webhooks()
        async with delivering(webhooks):
            await post.pass_until({"dead": 1})
            assert len(upstream.requests) == retries + 1
            delivery_id = str(await database.fetch_value("SELECT delivery_id FROM webhook_deliveries"))
            now = post.clock.now()
            assert isinstance(await store.replay(database, delivery_id, bob, now), store.DeliveryMissing)
            upstream.handler = OK
            assert isinstance(await store.replay(database, delivery_id, ada, now), Replayed)
            await post.until({"delivered": 1})
        assert {request.header("webhook-id") for request in upstream.requests} == {event.event_id}
        assert {request.header("X-Callora-Delivery") for request in upstream.requests} == {delivery_id}


async def test_what_is_on_its_way_or_of_a_disabled_endpoint_is_not_replayed(database: Database) -> None:
    async with post_office(database) as post:
        ada = await post.user()
        endpoint_id = await post.endpoint(ada, "http://127.0.0.1:9/")
        await post.happen(post.event(ada, 1))
        assert await store.fan_out(database, 10, post.clock.now()) == store.FannedOut(1, 1)
        delivery_id = str(await database.fetch_value("SELECT delivery_id FROM webhook_deliveries"))
        now = post.clock.now()
        assert isinstance(await store.replay(database, delivery_id, ada, now), StillPending)
        await store.change_endpoint(database, endpoint_id, ada, EndpointChange(disabled=True), now)
        assert isinstance(await store.replay(database, delivery_id, ada, now), EndpointDisabled)


async def test_a_receivers_wish_to_be_left_alone_is_respected(database: Database) -> None:
    answer = respond(429, [("Retry-After", "1800")])
    async with post_office(database) as post, raw_upstream(sequence(answer, OK)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url, policy=RetryPolicy(5, 100))
        await post.happen(post.event(ada, 1))
        async with delivering(post.webhooks()):
            with trio.fail_after(60):
                while not await database.fetch_value("SELECT sum(attempts) FROM webhook_deliveries"):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await post.until({"pending": 1})
            due = await database.fetch_value("SELECT due_at FROM webhook_endpoints")
            assert due - post.clock.now() > timedelta(minutes=25)
            await post.pass_until({"delivered": 1}, 600)


async def test_events_about_one_thing_wait_for_each_other_and_others_do_not(database: Database) -> None:
    """The first event about `a` fails four times; those about `a` come after it, those about `b` do not wait."""
    failures = Counter[int]()

    def answer(number: int) -> Handler:
        failures[number] += 1
        return respond(500) if number == 1 and failures[1] < 5 else OK

    async with post_office(database) as post, raw_upstream(choosing(answer)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        a, b = post.ids.uuid7(), post.ids.uuid7()
        await post.happen(*(post.event(ada, number, a) for number in range(1, 30)))
        await post.happen(*(post.event(ada, number, b) for number in range(100, 130)))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 30, "pending": 29})
            await post.happen(*(post.event(ada, number, a) for number in range(30, 40)))
            await post.pass_until({"delivered": 69})
        came = told(upstream)
        assert [number for number in came if number < 100] == [1] * 5 + list(range(2, 40))
        assert [number for number in came if number >= 100] == list(range(100, 130))
        assert came.index(129) < came.index(2)


async def test_what_is_given_up_lets_the_next_one_pass(database: Database) -> None:
    def answer(number: int) -> Handler:
        return respond(400) if number % 2 else OK

    async with post_office(database) as post, raw_upstream(choosing(answer)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        about = post.ids.uuid7()
        for number in range(40):
            await post.happen(post.event(ada, number, about, "settlement_failed" if number % 3 else "quota_threshold"))
        async with delivering(post.webhooks()):
            await post.until({"delivered": 20, "dead": 20})
        assert told(upstream) == list(range(40))


async def test_bad_receivers_are_waited_for_by_nobody(database: Database) -> None:
    """More endpoints hang, reset and fail than there are places, and a good one goes on being told."""
    bad = [silent(), reset_before_head(), respond(500), big(1), endless_headers(), close_silently()]
    async with post_office(database) as post, raw_upstream(OK) as good:
        bob = await post.user()
        good_id = await post.endpoint(bob, good.url)
        async with trio.open_nursery() as nursery:
            receivers: list[RawUpstream] = []

            async def serve(handler: Handler, *, task_status: trio.TaskStatus[None]) -> None:
                async with raw_upstream(handler) as upstream:
                    receivers.append(upstream)
                    task_status.started()
                    await trio.sleep_forever()

            for handler in bad:
                await nursery.start(serve, handler)
            for upstream in receivers:
                for _ in range(12):
                    user_id = await post.user()
                    await post.endpoint(user_id, upstream.url, policy=RetryPolicy(10, 100))
                    await post.happen(*(post.event(user_id, number, post.ids.uuid7()) for number in range(3)))
            async with delivering(post.webhooks(seconds_max=0.2)):
                for number in range(15):
                    await post.happen(post.event(bob, number))
                    await good.wait_requests(number + 1)
                    post.clock.pass_by(1)
            nursery.cancel_scope.cancel()
        assert told(good) == list(range(15))
        left = await database.fetch_value(
            "SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = $1 AND state <> 'delivered'", good_id
        )
        assert left == 0


async def test_two_processes_share_the_work_and_nothing_is_told_twice(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        users = [await post.user() for _ in range(10)]
        for user_id in users:
            await post.endpoint(user_id, f"{upstream.url}/{user_id}")
        async with delivering(post.webhooks()), delivering(post.webhooks()), delivering(post.webhooks()):
            for number in range(10):
                await post.happen(*(post.event(user_id, number, f"{user_id}") for user_id in users))
            await post.until({"delivered": 100})
        assert len(upstream.requests) == 100
        for user_id in users:
            assert [number_of(request) for request in upstream.requests if request.target == f"/{user_id}"] == list(
                range(10)
            )


async def test_a_claim_that_was_lost_notes_nothing_and_the_next_one_tells_it_again(database: Database) -> None:
    gate = trio.Event()
    async with post_office(database) as post, raw_upstream(sequence(gated(gate, OK), OK)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1))
        async with delivering(post.webhooks()):
            await upstream.wait_requests(1)
            await database.execute("UPDATE webhook_endpoints SET claimed_until = now() - interval '1 second'")
            async with delivering(post.webhooks()):
                await upstream.wait_requests(2)
                await post.until({"delivered": 1})
            gate.set()
        row = await database.fetch_row("SELECT attempts, state FROM webhook_deliveries")
        assert row is not None
        assert dict(row) == {"attempts": 1, "state": "delivered"}
        assert len({request.header("webhook-id") for request in upstream.requests}) == 1


async def test_a_drain_ends_what_is_under_way_and_begins_nothing_more(database: Database) -> None:
    gate = trio.Event()
    async with post_office(database) as post, raw_upstream(gated(gate, OK)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(*(post.event(ada, number, f"{number}") for number in range(5)))
        webhooks = post.webhooks()
        async with trio.open_nursery() as nursery:
            await nursery.start(webhooks.run)
            await upstream.wait_requests(1)
            webhooks.drain()
            await trio.testing.wait_all_tasks_blocked()
            assert not webhooks.ended.is_set()
            gate.set()
            with trio.fail_after(60):
                await webhooks.ended.wait()
        assert await post.states() == {"delivered": 1, "pending": 4}
        async with delivering(post.webhooks()):
            await post.until({"delivered": 5})
        assert told(upstream) == list(range(5))


async def test_an_attempt_that_is_cut_is_made_again_once_its_lease_has_ended(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(sequence(silent(), OK)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url)
        await post.happen(post.event(ada, 1))
        async with trio.open_nursery() as nursery:
            await nursery.start(post.webhooks().run)
            await upstream.wait_requests(1)
            nursery.cancel_scope.cancel()
        async with delivering(post.webhooks()):
            assert await post.states() == {"pending": 1}
            await database.execute("UPDATE webhook_endpoints SET claimed_until = now() - interval '1 second'")
            await post.until({"delivered": 1})


async def test_an_endpoint_that_takes_nothing_for_five_days_is_disabled(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(respond(503)) as upstream:
        ada = await post.user()
        await post.endpoint(ada, upstream.url, policy=RetryPolicy(0, 100))
        async with delivering(post.webhooks()):
            await post.happen(post.event(ada, 1))
            await post.until({"dead": 1})
            post.clock.pass_by(4 * 86_400)
            await post.happen(post.event(ada, 2))
            await post.until({"dead": 2})
            assert await database.fetch_value("SELECT disabled_why FROM webhook_endpoints") is None
            post.clock.pass_by(2 * 86_400)
            await post.happen(post.event(ada, 3))
            await post.until({"dead": 3})
            assert await database.fetch_value("SELECT disabled_why FROM webhook_endpoints") == "failing"
        assert told(upstream) == [1, 2, 3]


async def test_the_log_is_forgotten_in_time_and_deleted_endpoints_with_all_they_have(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        kept = await post.endpoint(ada, upstream.url, ["usage_event_created", "settlement_completed"])
        gone = await post.endpoint(ada, "http://127.0.0.1:9/", policy=RetryPolicy(10, 60_000))
        await post.happen(post.event(ada, 1), post.event(ada, 2, kind="usage_event_created"))
        webhooks = post.webhooks()
        async with delivering(webhooks):
            await post.until({"delivered": 2, "pending": 1})
            await store.delete_endpoint(database, gone, ada, post.clock.now())
            await webhooks.forget()
            assert await post.states() == {"delivered": 2, "pending": 1}
            post.clock.pass_by(7200)
            await webhooks.forget()
            assert await post.states() == {"delivered": 2}
            assert [
                str(row["endpoint_id"]) for row in await database.fetch("SELECT endpoint_id FROM webhook_endpoints")
            ] == [kept]
            post.clock.pass_by(86_400)
            await webhooks.forget()
        assert await post.states() == {}
        left = await database.fetch("SELECT type FROM outbox")
        assert [row["type"] for row in left] == ["settlement_completed"], "it says that it was told"


async def test_what_waited_for_what_was_forgotten_is_told_once_its_endpoint_is_enabled(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        endpoint_id = await post.endpoint(ada, upstream.url)
        about = post.ids.uuid7()
        webhooks = post.webhooks()
        await post.happen(post.event(ada, 0, about))
        await store.fan_out(database, 10, post.clock.now())
        post.clock.pass_by(86_400 + 3600)
        await post.happen(post.event(ada, 1, about))
        await store.fan_out(database, 10, post.clock.now())
        assert await store.change_endpoint(
            database, endpoint_id, ada, EndpointChange(disabled=True), post.clock.now() - timedelta(days=2)
        )
        await webhooks.forget()
        assert await post.states() == {"pending": 1}
        async with delivering(webhooks):
            change = EndpointChange(disabled=False)
            assert await store.change_endpoint(database, endpoint_id, ada, change, post.clock.now())
            await post.until({"delivered": 1})
        assert told(upstream) == [1]


async def test_while_a_secret_is_being_replaced_both_sign(database: Database) -> None:
    async with post_office(database) as post, raw_upstream(OK) as upstream:
        ada = await post.user()
        endpoint_id = await post.endpoint(ada, upstream.url)
        async with delivering(post.webhooks()):
            await post.happen(post.event(ada, 1))
            await post.until({"delivered": 1})
            now = post.clock.now()
            assert await store.rotate_secret(database, endpoint_id, ada, now + timedelta(hours=1), now) == 2
            await post.happen(post.event(ada, 2))
            await post.until({"delivered": 2})
            post.clock.pass_by(3601)
            await post.happen(post.event(ada, 3))
            await post.until({"delivered": 3})
        signatures = [request.header("webhook-signature") for request in upstream.requests]
        assert [len(str(signature).split(" ")) for signature in signatures] == [1, 2, 1]
