"""Webhooks: where a person's programs hear of what happened."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.webhook_desk import (
    DeliveryMissing,
    EndpointChange,
    EndpointDisabled,
    EndpointMissing,
    Made,
    Replayed,
    Rotated,
    StillPending,
    TooMany,
    UrlRefused,
    WebhookDesk,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import INT64_MAX, Form, InstantOut, Page, PageMeta, PageQuery, Uuid, decode_cursor, iso
from callora.http.rest.key_forms import moment
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import UserId
from callora.ledger.webhooks import EVENTS, REGISTRABLE, RetryPolicy, judge, stored_type
from callora.store.reads import webhooks as reads

Url = Annotated[str, Field(max_length=2048, description="Where to POST; without a user name or a fragment.")]
Events = Annotated[
    list[Annotated[str, Field(max_length=100)]],
    Field(max_length=100, description=f"Of {', '.join(REGISTRABLE)}."),
]
Description = Annotated[str, Field(min_length=1, max_length=200)]
State = Literal["pending", "delivered", "dead"]

_RETRIES: Final = (0, 10)
_DELAYS: Final = (100, 60_000)


class RetryPolicyIn(Form):
    """How often and how fast a delivery is tried again; what is left out stays, or is as by default."""

    maxRetries: int | None = Field(default=None, description="0 to 10, after the first attempt.")
    baseDelayMs: int | None = Field(
        default=None,
        description="100 to 60000, before the first retry; each next one waits twice as long, an hour at most.",
    )


class WebhookIn(Form):
    """An endpoint to register."""

    url: Url
    events: Events
    description: Description | None = None
    retryPolicy: RetryPolicyIn | None = None
    developerId: str | None = Field(default=None, max_length=100, description="Your own, or left out.")
    secret: str | None = Field(default=None, max_length=500, description="To be left out: it is made here.")


class WebhookPatch(Form):
    """What to change; what is left out stays."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = Field(default=None, description="null clears.")
    retryPolicy: RetryPolicyIn | None = None
    disabled: bool | None = Field(default=None, description="Whether it takes nothing; what waits for it is kept.")


class WebhookPath(Form):
    """Which endpoint."""

    webhookId: Uuid


class DeliveryPath(Form):
    """Which delivery."""

    deliveryId: Uuid


class DeliveryQuery(PageQuery):
    """Which of an endpoint's deliveries."""

    status: State | None = None


class RetryPolicyOut(Form):
    """How often and how fast a delivery is tried again."""

    maxRetries: int
    baseDelayMs: int


class WebhookOut(Form):
    """An endpoint."""

    id: str
    developerId: str | None = Field(description="Yours, where you are a developer.")
    url: str
    description: str | None
    events: list[str]
    retryPolicy: RetryPolicyOut
    disabled: bool
    disabledReason: Literal["asked", "gone", "failing"] | None = Field(
        description="`gone`: it answered 410; `failing`: it took nothing for five days."
    )
    failingSince: InstantOut | None = Field(description="Since when it has taken nothing of what it was told.")
    previousSecretExpiresAt: InstantOut | None = Field(
        description="Until when the secret before the present one signs as well."
    )
    createdAt: InstantOut
    updatedAt: InstantOut


class WebhookMade(WebhookOut):
    """An endpoint as it was registered, with its secret."""

    secret: str = Field(
        description="Shown this once: `whsec_` and base64, as the libraries of Standard Webhooks take it."
    )
    message: str


class WebhookList(Form):
    """Your endpoints, the oldest first."""

    data: list[WebhookOut]


class SecretOut(Form):
    """An endpoint's new secret."""

    secret: str = Field(description="Shown this once.")
    previousExpiresAt: InstantOut = Field(description="Until when the one before signs as well.")


class DeletedOut(Form):
    """The endpoint is gone."""

    message: str


class TestOut(Form):
    """What came of a test."""

    delivered: bool
    status: int | None = Field(description="The endpoint's answer; null where there was none.")
    error: str | None = Field(description="Why there was none.")
    durationMs: int


class DeliveryOut(Form):
    """An event on its way to an endpoint, or at its end."""

    id: str = Field(description="X-Callora-Delivery.")
    webhookId: str
    eventId: str = Field(description="webhook-id: the same for all endpoints that hear of it, and at every attempt.")
    event: str
    status: State = Field(description="`dead`: refused, or tried as often as the policy says.")
    attempts: int
    nextAttemptAt: InstantOut | None = Field(description="null where it is over, or waits for an earlier one.")
    lastAttemptAt: InstantOut | None
    lastStatus: int | None = Field(description="The answer to the last attempt; null where there was none.")
    lastError: str | None
    lastDurationMs: int | None
    createdAt: InstantOut = Field(description="When it happened.")
    closedAt: InstantOut | None


class DeliveryList(Form):
    """Deliveries, the latest first."""

    data: list[DeliveryOut]
    meta: PageMeta


def webhook_routes(desk: WebhookDesk, database: reads.Database) -> Routes:
    """Return the routes of webhooks."""
    routes = Routes("Webhooks")

    async def own(webhook_id: str, user_id: UserId) -> Mapping[str, Any]:
        row = await reads.endpoint(database, webhook_id, user_id)
        if row is None:
            raise ProblemRaised("WEBHOOK_NOT_FOUND")
        return row

    async def show(webhook_id: str, user_id: UserId) -> dict[str, Any]:
        return _shown(await own(webhook_id, user_id), await reads.developer_of(database, user_id))

    @routes.add(
        "POST",
        "/api/webhooks",
        access=Access.USER,
        body=WebhookIn,
        answers={201: WebhookMade},
        problems=(
            "INVALID_WEBHOOK_REGISTRATION",
            "INVALID_WEBHOOK_URL",
            "INVALID_WEBHOOK_EVENT_TYPES",
            "INVALID_RETRY_POLICY",
            "TOO_MANY_WEBHOOKS",
            "OUTCOME_UNKNOWN",
        ),
    )
    async def register_webhook(ask: Ask[Any, Any, WebhookIn]) -> Answer:
        """Register an endpoint, which hears of what happens from now on.

        Its secret is shown this once. The same URL may be registered more than once, for different events.
        """
        user_id, body = UserId(ask.user_id), ask.body
        if body.secret is not None:
            raise ProblemRaised("INVALID_WEBHOOK_REGISTRATION", "Leave out the secret: the answer holds one")
        if body.developerId is not None and body.developerId not in (
            user_id,
            await reads.developer_of(database, user_id),
        ):
            raise ProblemRaised("INVALID_WEBHOOK_REGISTRATION", "developerId must be your own, or be left out")
        policy = RetryPolicy(**_policy(body.retryPolicy))
        made = await desk.add(user_id, body.url, body.description, _stored(body.events), policy)
        match made:
            case Made(endpoint_id, secret):
                shown = await show(endpoint_id, user_id)
                message = "Webhook registered; keep the secret, it is not shown again"
                return Answer(WebhookMade(**shown, secret=secret, message=message), 201)
            case UrlRefused(why):
                raise ProblemRaised("INVALID_WEBHOOK_URL", f"The URL {why}")
            case TooMany():
                raise ProblemRaised("TOO_MANY_WEBHOOKS")

    @routes.add("GET", "/api/webhooks", access=Access.USER, answers={200: WebhookList})
    async def list_webhooks(ask: Ask[Any, Any, Any]) -> Answer:
        """Your endpoints, the oldest first."""
        user_id = UserId(ask.user_id)
        developer_id = await reads.developer_of(database, user_id)
        rows = await reads.endpoints(database, user_id)
        return Answer(WebhookList(data=[WebhookOut(**_shown(row, developer_id)) for row in rows]))

    @routes.add("GET", "/api/webhooks/dead-letters", access=Access.USER, query=PageQuery, answers={200: DeliveryList})
    async def list_dead_letters(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """What none of your endpoints took in the end, the latest first."""
        limit = ask.query.limit
        rows = await reads.dead_letters(
            database, UserId(ask.user_id), before=_before(ask.query.cursor), limit=limit + 1
        )
        return Answer(_listed(rows, limit))

    @routes.add(
        "GET",
        "/api/webhooks/{webhookId}",
        access=Access.USER,
        path_form=WebhookPath,
        answers={200: WebhookOut},
        problems=("WEBHOOK_NOT_FOUND",),
    )
    async def get_webhook(ask: Ask[WebhookPath, Any, Any]) -> Answer:
        """One of your endpoints."""
        return Answer(WebhookOut(**await show(ask.path.webhookId, UserId(ask.user_id))))

    @routes.add(
        "PATCH",
        "/api/webhooks/{webhookId}",
        access=Access.USER,
        path_form=WebhookPath,
        body=WebhookPatch,
        answers={200: WebhookOut},
        problems=(
            "WEBHOOK_NOT_FOUND",
            "INVALID_WEBHOOK_URL",
            "INVALID_WEBHOOK_EVENT_TYPES",
            "INVALID_RETRY_POLICY",
            "OUTCOME_UNKNOWN",
        ),
    )
    async def change_webhook(ask: Ask[WebhookPath, Any, WebhookPatch]) -> Answer:
        """Change an endpoint.

        Other events hold for what happens from now on, another URL for all that is still to be told. Enabling it tells
        at once what waits.
        """
        user_id, body = UserId(ask.user_id), ask.body
        change = EndpointChange(
            url=body.url,
            description=body.description,
            clears_description="description" in body.model_fields_set,
            events=None if body.events is None else _stored(body.events),
            disabled=body.disabled,
            **_policy(body.retryPolicy),
        )
        match await desk.change(user_id, ask.path.webhookId, change):
            case EndpointMissing():
                raise ProblemRaised("WEBHOOK_NOT_FOUND")
            case UrlRefused(why):
                raise ProblemRaised("INVALID_WEBHOOK_URL", f"The URL {why}")
        return Answer(WebhookOut(**await show(ask.path.webhookId, user_id)))

    @routes.add(
        "DELETE",
        "/api/webhooks/{webhookId}",
        access=Access.USER,
        path_form=WebhookPath,
        answers={200: DeletedOut},
        problems=("WEBHOOK_NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def delete_webhook(ask: Ask[WebhookPath, Any, Any]) -> Answer:
        """Take an endpoint away, with its log and all that waits for it. An attempt under way goes on."""
        if not await desk.delete(UserId(ask.user_id), ask.path.webhookId):
            raise ProblemRaised("WEBHOOK_NOT_FOUND")
        return Answer(DeletedOut(message="Webhook deleted"))

    @routes.add(
        "POST",
        "/api/webhooks/{webhookId}/rotate-secret",
        access=Access.USER,
        path_form=WebhookPath,
        answers={200: SecretOut},
        problems=("WEBHOOK_NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def rotate_webhook_secret(ask: Ask[WebhookPath, Any, Any]) -> Answer:
        """Give an endpoint another secret, shown this once; until previousExpiresAt both sign.

        Only the last two ever sign: rotated twice, the first is of no use any more.
        """
        match await desk.rotate(UserId(ask.user_id), ask.path.webhookId):
            case Rotated(secret, previous_until):
                return Answer(SecretOut(secret=secret, previousExpiresAt=iso(previous_until)))
            case EndpointMissing():
                raise ProblemRaised("WEBHOOK_NOT_FOUND")

    @routes.add(
        "POST",
        "/api/webhooks/{webhookId}/test",
        access=Access.USER,
        path_form=WebhookPath,
        answers={200: TestOut},
        problems=("WEBHOOK_NOT_FOUND",),
    )
    async def test_webhook(ask: Ask[WebhookPath, Any, Any]) -> Answer:
        """Send an endpoint the event `webhook.test`, once, and tell what came of it. It is not in the log."""
        row = await own(ask.path.webhookId, UserId(ask.user_id))
        told = await desk.test(ask.path.webhookId, row["url"], row["generation"], row["previous_until"])
        attempt = told.attempt
        return Answer(
            TestOut(
                delivered=judge(attempt) == "delivered",
                status=attempt.status,
                error=attempt.error,
                durationMs=told.milliseconds,
            )
        )

    @routes.add(
        "GET",
        "/api/webhooks/{webhookId}/deliveries",
        access=Access.USER,
        path_form=WebhookPath,
        query=DeliveryQuery,
        answers={200: DeliveryList},
        problems=("WEBHOOK_NOT_FOUND",),
    )
    async def list_webhook_deliveries(ask: Ask[WebhookPath, DeliveryQuery, Any]) -> Answer:
        """What an endpoint was told, or is to be, the latest first."""
        await own(ask.path.webhookId, UserId(ask.user_id))
        limit = ask.query.limit
        rows = await reads.deliveries(
            database, ask.path.webhookId, ask.query.status, before=_before(ask.query.cursor), limit=limit + 1
        )
        return Answer(_listed(rows, limit))

    @routes.add(
        "POST",
        "/api/webhooks/deliveries/{deliveryId}/replay",
        access=Access.USER,
        path_form=DeliveryPath,
        answers={200: DeliveryOut},
        problems=("WEBHOOK_DELIVERY_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def replay_webhook_delivery(ask: Ask[DeliveryPath, Any, Any]) -> Answer:
        """Tell an event again that was delivered or given up, under the same ids, from its first attempt on."""
        user_id = UserId(ask.user_id)
        match await desk.replay(user_id, ask.path.deliveryId):
            case Replayed():
                pass
            case StillPending():
                raise ProblemRaised("CONFLICT", "It is on its way already")
            case EndpointDisabled():
                raise ProblemRaised("CONFLICT", "Its endpoint is disabled: enable it first")
            case DeliveryMissing():
                raise ProblemRaised("WEBHOOK_DELIVERY_NOT_FOUND")
        row = await reads.delivery(database, ask.path.deliveryId, user_id)
        if row is None:
            raise ProblemRaised("WEBHOOK_DELIVERY_NOT_FOUND")
        return Answer(_delivery(row))

    return routes


def _stored(events: Sequence[str]) -> list[str]:
    """Return the types that events' names stand for, each once."""
    unknown = [name for name in events if stored_type(name) is None]
    if unknown or not events:
        message = "Name one event at least" if not events else "Some of these events are not told"
        raise ProblemRaised("INVALID_WEBHOOK_EVENT_TYPES", message, details={"known": list(REGISTRABLE)})
    return list(dict.fromkeys(stored for name in events if (stored := stored_type(name)) is not None))


def _policy(policy: RetryPolicyIn | None) -> dict[str, int]:
    """Return what a policy sets."""
    given: dict[str, int] = {}
    for name, number, (low, high) in (
        ("retries_max", None if policy is None else policy.maxRetries, _RETRIES),
        ("base_delay_ms", None if policy is None else policy.baseDelayMs, _DELAYS),
    ):
        if number is None:
            continue
        if not low <= number <= high:
            raise ProblemRaised("INVALID_RETRY_POLICY")
        given[name] = number
    return given


def _before(cursor: str | None) -> int:
    position = decode_cursor(cursor, int)
    return INT64_MAX if position is None else int(position[0])


def _shown(row: Mapping[str, Any], developer_id: str | None) -> dict[str, Any]:
    return {
        "id": str(row["endpoint_id"]),
        "developerId": developer_id,
        "url": row["url"],
        "description": row["description"],
        "events": [EVENTS.get(each, each) for each in row["events"]],
        "retryPolicy": RetryPolicyOut(maxRetries=row["retries_max"], baseDelayMs=row["base_delay_ms"]),
        "disabled": row["disabled_at"] is not None,
        "disabledReason": row["disabled_why"],
        "failingSince": moment(row["failing_since"]),
        "previousSecretExpiresAt": moment(row["previous_until"]),
        "createdAt": iso(row["created_at"]),
        "updatedAt": iso(row["updated_at"]),
    }


def _listed(rows: Sequence[Mapping[str, Any]], limit: int) -> DeliveryList:
    page = Page.of(rows, limit, "position")
    return DeliveryList(data=[_delivery(row) for row in page.rows], meta=page.meta)


def _delivery(row: Mapping[str, Any]) -> DeliveryOut:
    return DeliveryOut(
        id=str(row["delivery_id"]),
        webhookId=str(row["endpoint_id"]),
        eventId=str(row["event_id"]),
        event=EVENTS.get(row["type"], row["type"]),
        status=row["state"],
        attempts=row["attempts"],
        nextAttemptAt=moment(row["due_at"]),
        lastAttemptAt=moment(row["last_at"]),
        lastStatus=row["last_status"],
        lastError=row["last_error"],
        lastDurationMs=row["last_ms"],
        createdAt=iso(row["created_at"]),
        closedAt=moment(row["closed_at"]),
    )
