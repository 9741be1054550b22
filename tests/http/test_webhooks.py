"""Webhooks over REST: endpoints that are their owner's alone, and a whole service that tells them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from standardwebhooks import Webhook

from callora.ledger.ids import UserId
from callora.ledger.webhooks import ENDPOINTS_MAX, REGISTRABLE
from callora.store.outbox import Event, add_events
from tests.support.rest import Person, Told, anonymous, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.upstream import RawUpstream, big, raw_upstream, respond, silent

PATH = "/api/webhooks"
NOBODYS = "0198c1a2-0000-7000-8000-000000000001"
ENVIRON = {"WEBHOOK_POLL_INTERVAL_MS": "10", "REST_RATE_LIMIT_MAX_REQUESTS": "1000000", "WEBHOOK_TIMEOUT_MS": "1000"}


@attrs.frozen
class It:
    """A service, a receiver and two people."""

    service: RunningService
    receiver: RawUpstream
    ada: Person
    bob: Person
    stranger: Person

    async def made(self, **fields: object) -> Any:
        """Register an endpoint of Ada's."""
        body = {"url": self.receiver.url, "events": ["settlement_completed", "key.revoked"], **fields}
        told = await self.ada.ask("POST", PATH, body)
        assert told.status == 201, told
        return told.body

    async def happen(self, number: int, kind: str = "settlement_completed") -> None:
        """Have something happen to Ada."""
        assert self.ada.user_id is not None
        context = self.service.context
        event = Event(context.ids.uuid7(), kind, f"thing:{number}", None, {"number": number}, UserId(self.ada.user_id))
        async with self.service.database.transaction() as connection:
            await add_events(connection, [event], context.clock.now())

    async def log(self, webhook_id: str, **query: str | int) -> Told:
        """Return an endpoint's log."""
        return await self.ada.ask("GET", f"{PATH}/{webhook_id}/deliveries", query=query)

    async def until(self, webhook_id: str, *statuses: str) -> list[Any]:
        """Return an endpoint's log once its deliveries are in these states, the latest first."""
        with trio.fail_after(60):
            while True:
                found: list[Any] = (await self.log(webhook_id)).body["data"]
                if [each["status"] for each in found] == list(statuses):
                    return found
                await trio.sleep(0.02)


@asynccontextmanager
async def webhooks_of(database_url: str) -> AsyncIterator[It]:
    async with (
        raw_upstream(respond(204)) as receiver,
        running_service(database_url, ENVIRON) as service,
        rest_client(service) as client,
    ):
        yield It(
            service,
            receiver,
            await person(service, client, "Ada"),
            await person(service, client, "Bob"),
            anonymous(client),
        )


async def test_an_endpoint_is_registered_told_changed_and_deleted(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        made = await it.made(description="The shop", retryPolicy={"maxRetries": 0, "baseDelayMs": 100})
        secret = made.pop("secret")
        made.pop("message")
        assert (made["events"], made["disabled"], made["developerId"]) == (
            ["settlement_completed", "key.revoked"],
            False,
            None,
        )
        assert made["retryPolicy"] == {"maxRetries": 0, "baseDelayMs": 100}
        path = f"{PATH}/{made['id']}"
        assert (await it.ada.ask("GET", path)).body == made
        assert (await it.ada.ask("GET", PATH)).body == {"data": [made]}
        assert (await it.bob.ask("GET", PATH)).body == {"data": []}

        await it.happen(1)
        (sent,) = await it.until(made["id"], "delivered")
        request = it.receiver.requests[0]
        assert Webhook(secret).verify(request.body, dict(request.headers))["data"] == {"number": 1}
        assert (sent["attempts"], sent["lastStatus"], sent["lastError"], sent["event"]) == (
            1,
            204,
            None,
            "settlement_completed",
        )
        assert request.header("webhook-id") == sent["eventId"]
        assert request.header("X-Callora-Delivery") == sent["id"]

        changed = await it.ada.ask(
            "PATCH", path, {"events": ["new_api_call"], "description": None, "retryPolicy": {"maxRetries": 3}}
        )
        assert changed.body["events"] == ["usage_event.created"]
        assert changed.body["retryPolicy"] == {"maxRetries": 3, "baseDelayMs": 100}
        assert changed.body["description"] is None
        await it.happen(2)
        assert (await it.ada.ask("PATCH", path, {"disabled": True})).body["disabledReason"] == "asked"
        await it.happen(3, "usage_event_created")
        with trio.fail_after(60):
            while await it.service.database.fetch_value("SELECT EXISTS (SELECT FROM outbox_queue)"):  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert (await it.ada.ask("PATCH", path, {"disabled": False})).body["disabled"] is False
        await it.happen(4, "usage_event_created")
        await it.until(made["id"], "delivered", "delivered")

        assert (await it.ada.ask("DELETE", path)).status == 200
        for method, suffix, body in (
            ("GET", "", None),
            ("DELETE", "", None),
            ("PATCH", "", {}),
            ("POST", "/test", None),
            ("POST", "/rotate-secret", None),
            ("GET", "/deliveries", None),
        ):
            assert (await it.ada.ask(method, path + suffix, body)).code == "WEBHOOK_NOT_FOUND"
        assert (await it.ada.ask("POST", f"{PATH}/deliveries/{sent['id']}/replay")).code == "WEBHOOK_DELIVERY_NOT_FOUND"


async def test_what_is_somebody_elses_is_not_there(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        made = await it.made()
        await it.happen(1)
        (sent,) = await it.until(made["id"], "delivered")
        path = f"{PATH}/{made['id']}"
        for method, where, body in (
            ("GET", path, None),
            ("DELETE", path, None),
            ("PATCH", path, {"disabled": True}),
            ("POST", f"{path}/test", None),
            ("POST", f"{path}/rotate-secret", None),
            ("GET", f"{path}/deliveries", None),
            ("POST", f"{PATH}/deliveries/{sent['id']}/replay", None),
        ):
            assert (await it.bob.ask(method, where, body)).status == 404
            assert (await it.stranger.ask(method, where, body)).status == 401
        assert (await it.ada.ask("GET", path)).body["disabled"] is False
        assert (await it.bob.ask("GET", f"{PATH}/dead-letters")).body["data"] == []


async def test_what_cannot_be_registered_says_why(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        good = {"url": it.receiver.url, "events": ["key.revoked"]}
        for fields, code in (
            ({"events": []}, "INVALID_WEBHOOK_EVENT_TYPES"),
            ({"events": ["key.revoked", "nonsense"]}, "INVALID_WEBHOOK_EVENT_TYPES"),
            ({"url": "ftp://example.com"}, "INVALID_WEBHOOK_URL"),
            ({"url": "nonsense"}, "INVALID_WEBHOOK_URL"),
            ({"url": "http://10.0.0.1/"}, "INVALID_WEBHOOK_URL"),
            ({"url": "http://[::1]/"}, "INVALID_WEBHOOK_URL"),
            ({"url": "http://169.254.169.254/latest"}, "INVALID_WEBHOOK_URL"),
            ({"url": "http://no-such-host.invalid/"}, "INVALID_WEBHOOK_URL"),
            ({"retryPolicy": {"maxRetries": 11}}, "INVALID_RETRY_POLICY"),
            ({"retryPolicy": {"maxRetries": -1}}, "INVALID_RETRY_POLICY"),
            ({"retryPolicy": {"baseDelayMs": 99}}, "INVALID_RETRY_POLICY"),
            ({"retryPolicy": {"baseDelayMs": 60001}}, "INVALID_RETRY_POLICY"),
            ({"secret": "mine"}, "INVALID_WEBHOOK_REGISTRATION"),
            ({"developerId": "somebody"}, "INVALID_WEBHOOK_REGISTRATION"),
            ({"url": 1}, "VALIDATION_ERROR"),
            ({"more": 1}, "VALIDATION_ERROR"),
        ):
            told = await it.ada.ask("POST", PATH, {**good, **fields})
            assert (told.status, told.code) == (400, code), (fields, told)
            if code == "INVALID_WEBHOOK_EVENT_TYPES":
                assert told.body["details"]["known"] == list(REGISTRABLE)
        assert (await it.ada.ask("GET", PATH)).body["data"] == []
        developer = (await it.ada.ask("GET", "/api/developers/me")).body["id"]
        made = await it.made(developerId=developer)
        assert made["developerId"] == developer
        for url in ("http://10.0.0.1/", "nonsense"):
            told = await it.ada.ask("PATCH", f"{PATH}/{made['id']}", {"url": url})
            assert told.code == "INVALID_WEBHOOK_URL"
        for _ in range(ENDPOINTS_MAX - 1):
            await it.made()
        assert (await it.ada.ask("POST", PATH, good)).code == "TOO_MANY_WEBHOOKS"


async def test_a_test_tells_what_came_of_it_and_leaves_no_trace(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        made = await it.made()
        path = f"{PATH}/{made['id']}/test"
        told = (await it.ada.ask("POST", path)).body
        assert (told["delivered"], told["status"], told["error"]) == (True, 204, None)
        request = it.receiver.requests[-1]
        assert Webhook(made["secret"]).verify(request.body, dict(request.headers))["event"] == "webhook.test"
        it.receiver.handler = respond(302, [("Location", "/elsewhere")])
        told = (await it.ada.ask("POST", path)).body
        assert (told["delivered"], told["status"]) == (False, 302)
        it.receiver.handler = big(1)
        assert (await it.ada.ask("POST", path)).body["delivered"] is True
        it.receiver.handler = silent()
        told = (await it.ada.ask("POST", path)).body
        assert (told["delivered"], told["status"]) == (False, None)
        assert told["error"].startswith("timeout")
        assert (await it.log(made["id"])).body["data"] == []


async def test_a_rotated_secret_signs_beside_the_one_before(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        made = await it.made()
        rotated = (await it.ada.ask("POST", f"{PATH}/{made['id']}/rotate-secret")).body
        assert rotated["secret"] != made["secret"]
        await it.happen(1)
        await it.until(made["id"], "delivered")
        request = it.receiver.requests[0]
        for secret in (made["secret"], rotated["secret"]):
            assert Webhook(secret).verify(request.body, dict(request.headers))["data"] == {"number": 1}
        shown = (await it.ada.ask("GET", f"{PATH}/{made['id']}")).body
        assert shown["previousSecretExpiresAt"] == rotated["previousExpiresAt"]
        assert made["secret"] not in str(shown)
        assert rotated["secret"] not in str(shown)
        stored = await it.service.database.fetch("SELECT webhook_endpoints::text AS row FROM webhook_endpoints")
        assert made["secret"].removeprefix("whsec_") not in stored[0]["row"]


async def test_dead_letters_are_listed_by_pages_and_replayed(database_url: str) -> None:
    async with webhooks_of(database_url) as it:
        it.receiver.handler = respond(404)
        made = await it.made()
        for number in range(3):
            await it.happen(number)
        dead = await it.until(made["id"], "dead", "dead", "dead")
        assert {each["lastStatus"] for each in dead} == {404}
        first = await it.ada.ask("GET", f"{PATH}/dead-letters", query={"limit": 2})
        rest = await it.ada.ask(
            "GET", f"{PATH}/dead-letters", query={"limit": 2, "cursor": first.body["meta"]["nextCursor"]}
        )
        assert first.body["data"] + rest.body["data"] == dead
        assert rest.body["meta"]["hasMore"] is False
        assert (await it.log(made["id"], status="delivered")).body["data"] == []
        it.receiver.handler = respond(204)
        replayed = await it.ada.ask("POST", f"{PATH}/deliveries/{dead[1]['id']}/replay")
        assert (replayed.status, replayed.body["id"]) == (200, dead[1]["id"])
        log = await it.until(made["id"], "delivered", "dead", "dead")
        assert (log[0]["id"], log[0]["eventId"]) == (dead[1]["id"], dead[1]["eventId"])
        assert (await it.ada.ask("POST", f"{PATH}/deliveries/{NOBODYS}/replay")).code == "WEBHOOK_DELIVERY_NOT_FOUND"
