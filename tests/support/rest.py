"""A client of the dashboard's REST, over a real socket, and the people who use it."""

import json
from collections.abc import Mapping
from typing import Any

import attrs
import httpx

from callora.ledger.ids import UserId
from callora.store import accounts
from tests.support.service import RunningService


@attrs.frozen
class Told:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    body: Any
    """Parsed where it is JSON, else bytes; None for no body."""

    @property
    def code(self) -> str:
        """The problem's code."""
        return str(self.body["code"])

    @property
    def wrong(self) -> list[str]:
        """The fields that a validation error names."""
        return [detail["field"] for detail in self.body["details"]]


@attrs.frozen
class Person:
    """Someone who asks, by header or by token."""

    client: httpx.AsyncClient
    headers: Mapping[str, str]
    user_id: UserId | None = None

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Told:
        """Return the answer to one request; of a stream that does not end by itself its head."""
        sent = {**self.headers, **(headers or {})}
        async with self.client.stream(method, path, json=body, params=query, headers=sent) as response:
            if response.headers.get("content-type") == "text/event-stream":
                return Told(response.status_code, response.headers, None)
            await response.aread()
        told: Any = response.content or None
        if told is not None and response.headers.get("content-type", "").startswith("application/json"):
            told = json.loads(told)
        return Told(response.status_code, response.headers, told)


def rest_client(service: RunningService) -> httpx.AsyncClient:
    """Return a client of the service; use it in `async with`."""
    return httpx.AsyncClient(base_url=service.url, timeout=30)


def anonymous(client: httpx.AsyncClient) -> Person:
    """Return someone who sends no credentials."""
    return Person(client, {})


async def person(service: RunningService, client: httpx.AsyncClient, name: str = "Someone") -> Person:
    """Return a new user, who names himself by X-User-Id."""
    user_id = UserId(service.context.ids.uuid7())
    await accounts.add_user(service.database, user_id, name, service.context.clock.now())
    return Person(client, {"X-User-Id": user_id}, user_id)


ADMIN_KEY = "tests-admin-key"


def admin(client: httpx.AsyncClient) -> Person:
    """Return an operator; the service must run with ADMIN_API_KEY=ADMIN_KEY."""
    return Person(client, {"X-Admin-Api-Key": ADMIN_KEY})


SERVICE_TOKEN = "tests-service-token-of-forty-characters-"


def biller(client: httpx.AsyncClient) -> Person:
    """Return a service that charges outside the proxy; ours must run with INTERNAL_SERVICE_TOKEN=SERVICE_TOKEN."""
    return Person(client, {"Authorization": f"Bearer {SERVICE_TOKEN}"})
