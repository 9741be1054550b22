"""Subscriptions: a person puts his vault on a plan and pays for it by the month; no key does."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from callora.actors.plans import Plans
from callora.actors.subscriptions import (
    Busy,
    NotSold,
    Subscribed,
    SubscriptionMissing,
    Subscriptions,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, InstantOut, Page, PageMeta, PageQuery, UsdcOut, Uuid, iso, usdc
from callora.http.rest.key_desk import before_id
from callora.http.rest.key_forms import Network, moment
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.plans import BUSY, RETRY, PlanId
from callora.ledger.ids import UserId, VaultId
from callora.ledger.outcomes import Draining, InsufficientFunds, Overloaded, VaultMissing
from callora.ledger.subscriptions import AlreadySubscribed
from callora.store.reads import subscriptions as reads
from callora.store.reads.vaults import VaultReads


class SubscribeIn(Form):
    """What to subscribe to, and which of your vaults pays."""

    planId: PlanId
    network: Network = "testnet"


class SubscriptionPath(Form):
    """Which subscription."""

    subscriptionId: Uuid


class SubscriptionOut(Form):
    """A plan that a vault pays for by the calendar month, UTC."""

    id: str
    network: Network
    vaultId: str
    planId: str
    priceUsdc: UsdcOut = Field(description="A month, as it was agreed to.")
    status: Literal["pending", "active", "ended", "lapsed", "replaced"] = Field(
        description="`pending` while the first month is being charged; `lapsed`: a month could not be paid."
    )
    paidFrom: InstantOut = Field(description="The beginning of the month that is paid, or was last.")
    paidUntil: InstantOut
    nextPlanId: str | None = Field(description="The plan from paidUntil on, where it is to change.")
    nextPriceUsdc: UsdcOut | None
    createdAt: InstantOut
    cancelledAt: InstantOut | None = Field(description="Since when it is to end at paidUntil.")
    endedAt: InstantOut | None


class SubscribedOut(SubscriptionOut):
    """A subscription as it was asked for."""

    chargedUsdc: UsdcOut = Field(description="What was taken from the vault for this.")


class SubscriptionList(Form):
    """Your subscriptions, the latest first."""

    data: list[SubscriptionOut]
    meta: PageMeta


def subscription_routes(
    subscriptions: Subscriptions, vaults: VaultReads, database: reads.Database, plans: Plans
) -> Routes:
    """Return the routes of subscriptions."""
    routes = Routes("Subscriptions")

    async def own(subscription_id: str, user_id: UserId) -> Mapping[str, Any]:
        row = await reads.show_subscription(database, subscription_id, user_id)
        if row is None:
            raise ProblemRaised("SUBSCRIPTION_NOT_FOUND")
        return row

    @routes.add(
        "POST",
        "/api/subscriptions",
        access=Access.USER,
        body=SubscribeIn,
        answers={200: SubscribedOut, 201: SubscribedOut},
        problems=("VAULT_NOT_FOUND", "PLAN_NOT_FOUND", "INSUFFICIENT_BALANCE", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def subscribe(ask: Ask[Any, Any, SubscribeIn]) -> Answer:
        """Put your vault on a plan, and pay the present calendar month from it: 201 when something was charged.

        A dearer plan than the present one begins at once, for the difference in price. A cheaper one begins, and is
        charged, when what is paid has ended: 200. Asking for the present plan takes back a cancellation or such a
        change: 200. After OUTCOME_UNKNOWN your subscriptions say what came of it within minutes.
        """
        user_id = UserId(ask.user_id)
        vault = await vaults.vault_on(ask.body.network, user_id)
        if vault is None:
            raise ProblemRaised("VAULT_NOT_FOUND", f"You have no vault on {ask.body.network}")
        outcome = await subscriptions.subscribe(user_id, VaultId(str(vault["vault_id"])), ask.body.planId)
        match outcome:
            case Subscribed(subscription, charged):
                await plans.take_effect()
                row = await own(subscription.subscription_id, user_id)
                return Answer(SubscribedOut(**_shown(row), chargedUsdc=usdc(charged)), 201 if charged else 200)
            case AlreadySubscribed():
                raise ProblemRaised("CONFLICT", "You are subscribed to this plan, or will be when what is paid ends")
            case NotSold():
                raise ProblemRaised("PLAN_NOT_FOUND", "No plan of this id can be subscribed to")
            case Busy():
                raise ProblemRaised("CONFLICT", BUSY)
            case InsufficientFunds(required, available):
                details = {"required": usdc(required), "available": usdc(available)}
                raise ProblemRaised("INSUFFICIENT_BALANCE", details=details)
            case VaultMissing():
                raise ProblemRaised("VAULT_NOT_FOUND")
            case Overloaded() | Draining():
                raise ProblemRaised("SERVICE_UNAVAILABLE", headers=RETRY)

    @routes.add("GET", "/api/subscriptions", access=Access.USER, query=PageQuery, answers={200: SubscriptionList})
    async def list_subscriptions(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your subscriptions, the latest first, with those that have ended."""
        rows = await reads.list_subscriptions(
            database, UserId(ask.user_id), before=before_id(ask.query.cursor), limit=ask.query.limit + 1
        )
        page = Page.of(rows, ask.query.limit, "subscription_id")
        return Answer(SubscriptionList(data=[SubscriptionOut(**_shown(row)) for row in page.rows], meta=page.meta))

    @routes.add(
        "DELETE",
        "/api/subscriptions/{subscriptionId}",
        access=Access.USER,
        path_form=SubscriptionPath,
        answers={200: SubscriptionOut},
        problems=("SUBSCRIPTION_NOT_FOUND", "CONFLICT"),
    )
    async def cancel_subscription(ask: Ask[SubscriptionPath, Any, Any]) -> Answer:
        """Let a subscription end with what is paid; then its vault is on the free plan.

        Repeated, it changes nothing.
        """
        user_id = UserId(ask.user_id)
        outcome = await subscriptions.cancel(ask.path.subscriptionId, user_id)
        if isinstance(outcome, SubscriptionMissing):
            raise ProblemRaised("SUBSCRIPTION_NOT_FOUND")
        if isinstance(outcome, Busy):
            raise ProblemRaised("CONFLICT", BUSY)
        return Answer(SubscriptionOut(**_shown(await own(ask.path.subscriptionId, user_id))))

    return routes


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(row["subscription_id"]),
        "network": row["network"],
        "vaultId": str(row["vault_id"]),
        "planId": row["plan_id"],
        "priceUsdc": usdc(row["price"]),
        "status": row["state"],
        "paidFrom": iso(row["period_start"]),
        "paidUntil": iso(row["paid_until"]),
        "nextPlanId": row["next_plan_id"],
        "nextPriceUsdc": None if row["next_price"] is None else usdc(row["next_price"]),
        "createdAt": iso(row["created_at"]),
        "cancelledAt": moment(row["cancelled_at"]),
        "endedAt": moment(row["ended_at"]),
    }
