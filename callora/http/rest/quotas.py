"""Quotas: what is left of a vault's credits, and requests for more, which operators decide."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from callora.actors.quota_requests import (
    OPEN_MAX,
    DecidedOtherwise,
    QuotaRequests,
    RequestMissing,
    TooManyOpen,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, Instant, InstantOut, Page, PageMeta, PageQuery, Uuid, iso
from callora.http.rest.key_desk import after_id, before_id
from callora.http.rest.key_forms import Network, moment
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.plans import RETRY, Credits, refuse_end
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId, VaultId
from callora.ledger.outcomes import Draining, Overloaded
from callora.ledger.quota import Overage, month_of
from callora.store.reads import quota_requests as reads
from callora.store.reads.plans import grants_of_plans
from callora.store.reads.quotas import GrantView, QuotaView, quota_of
from callora.store.reads.vaults import VaultReads

Source = Literal["plan", "promo", "purchase", "allocation"]
Status = Literal["open", "approved", "rejected"]


class PeriodOut(Form):
    """A calendar month, UTC."""

    start: InstantOut
    end: InstantOut = Field(description="The first instant after it.")


class CreditsOut(Form):
    """Credits of all grants that have not ended."""

    granted: int
    used: int = Field(description="Burnt, or held for calls in hand.")
    remaining: int


class GrantLineOut(Form):
    """Credits that were given, until they end. The earliest to end are burnt first."""

    id: str | None = Field(description="null: given with the month's first call that is priced in credits.")
    source: Source
    amount: int
    remaining: int
    expiresAt: InstantOut


class QuotaOut(Form):
    """A vault's quota, which its keys share."""

    network: Network
    vaultId: str
    plan: str
    overage: Overage = Field(description="When the credits are used up: `deny` calls, or `charge` their price.")
    period: PeriodOut
    credits: CreditsOut
    grants: list[GrantLineOut]
    percentUsed: int | None = Field(description="Of what is granted, rounded down; null where nothing is.")


class QuotaList(Form):
    """The quotas of your vaults."""

    data: list[QuotaOut]
    meta: PageMeta


class QuotaRequestIn(Form):
    """More credits for a vault."""

    network: Network = "testnet"
    credits: Credits
    reason: str = Field(min_length=10, max_length=1000)


class QuotaRequestOut(Form):
    """A request for credits, and what was decided."""

    id: str
    network: Network
    vaultId: str
    credits: int = Field(description="Asked for.")
    reason: str
    status: Status
    creditsGranted: int | None
    expiresAt: InstantOut | None = Field(description="When the granted credits end.")
    answer: str | None = Field(description="Why it was rejected, where that was said.")
    createdAt: InstantOut
    decidedAt: InstantOut | None


class QuotaRequestList(Form):
    """Your requests, the latest first."""

    data: list[QuotaRequestOut]
    meta: PageMeta


class AdminQuotaRequestOut(QuotaRequestOut):
    """A request, whose it is and who decided it."""

    userId: str
    decidedBy: str | None


class AdminQuotaRequestList(Form):
    """Everybody's requests, the latest first."""

    data: list[AdminQuotaRequestOut]
    meta: PageMeta


class AdminQuotaRequestQuery(PageQuery):
    """Which requests."""

    status: Status | None = None


class QuotaRequestPath(Form):
    """Which request."""

    quotaRequestId: Uuid


class ApprovalIn(Form):
    """What is given."""

    credits: Credits | None = Field(default=None, description="What was asked for, when left out.")
    expiresAt: Instant | None = Field(default=None, description="30 days from now, when left out.")


class RejectionIn(Form):
    """Why not."""

    reason: Annotated[str, Field(min_length=1, max_length=1000)] | None = None


def quota_routes(requests: QuotaRequests, vaults: VaultReads, database: reads.Database, clock: Clock) -> Routes:
    """Return the routes of quotas, for the owners of vaults."""
    routes = Routes("Quotas")

    @routes.add("GET", "/api/quotas", access=Access.USER, query=PageQuery, answers={200: QuotaList})
    async def list_quotas(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """What is left of the credits of each of your vaults. Looking changes nothing."""
        limit, now = ask.query.limit, clock.now()
        rows = await vaults.vaults(UserId(ask.user_id), after=after_id(ask.query.cursor), limit=limit + 1)
        page = Page.of(rows, limit, "vault_id")
        return Answer(QuotaList(data=[await shown(row, now) for row in page.rows], meta=page.meta))

    async def shown(vault: Mapping[str, Any], now: datetime) -> QuotaOut:
        vault_id = VaultId(str(vault["vault_id"]))
        view = await quota_of(database, vault_id, now)
        assert view is not None, "vaults are never deleted"
        return _quota(vault, view, await grants_of_plans(database, vault_id, now), now)

    @routes.add(
        "POST",
        "/api/quotas/requests",
        access=Access.USER,
        body=QuotaRequestIn,
        answers={201: QuotaRequestOut},
        problems=("VAULT_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def request_quota(ask: Ask[Any, Any, QuotaRequestIn]) -> Answer:
        """Ask the operators for more credits. A vault has at most five undecided requests."""
        body, user_id = ask.body, UserId(ask.user_id)
        vault = await vaults.vault_on(body.network, user_id)
        if vault is None:
            raise ProblemRaised("VAULT_NOT_FOUND", f"You have no vault on {body.network}")
        made = await requests.ask(user_id, VaultId(str(vault["vault_id"])), body.credits, body.reason)
        if isinstance(made, TooManyOpen):
            raise ProblemRaised("CONFLICT", f"{OPEN_MAX} requests of this vault are undecided")
        row = await reads.show_request(database, made)
        assert row is not None, "requests are never deleted"
        return Answer(QuotaRequestOut(**_request(row)), 201)

    @routes.add("GET", "/api/quotas/requests", access=Access.USER, query=PageQuery, answers={200: QuotaRequestList})
    async def list_quota_requests(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your requests for credits, the latest first."""
        rows = await reads.list_of_user(
            database, UserId(ask.user_id), before=before_id(ask.query.cursor), limit=ask.query.limit + 1
        )
        page = Page.of(rows, ask.query.limit, "request_id")
        return Answer(QuotaRequestList(data=[QuotaRequestOut(**_request(row)) for row in page.rows], meta=page.meta))

    return routes


def quota_admin_routes(requests: QuotaRequests, database: reads.Database, clock: Clock) -> Routes:
    """Return the routes by which operators decide on requests for credits."""
    routes = Routes("Operators: quotas")

    @routes.add(
        "GET",
        "/api/admin/quota-requests",
        access=Access.ADMIN,
        query=AdminQuotaRequestQuery,
        answers={200: AdminQuotaRequestList},
    )
    async def list_all_quota_requests(ask: Ask[Any, AdminQuotaRequestQuery, Any]) -> Answer:
        """Everybody's requests for credits, the latest first."""
        query = ask.query
        rows = await reads.list_of_all(database, query.status, before=before_id(query.cursor), limit=query.limit + 1)
        page = Page.of(rows, query.limit, "request_id")
        return Answer(AdminQuotaRequestList(data=[_request_to_operators(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "POST",
        "/api/admin/quota-requests/{quotaRequestId}/approve",
        access=Access.ADMIN,
        path_form=QuotaRequestPath,
        body=ApprovalIn,
        answers={200: AdminQuotaRequestOut},
        problems=("QUOTA_REQUEST_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def approve_quota_request(ask: Ask[QuotaRequestPath, Any, ApprovalIn]) -> Answer:
        """Give a vault credits that were asked for, once. Repeated with the same numbers, it changes nothing."""
        body = ask.body
        for name, value in (("credits", body.credits), ("expiresAt", body.expiresAt)):
            if value is not None:
                ask.exchange.audit_details[name] = str(value)
        if body.expiresAt is not None:
            refuse_end(body.expiresAt, clock.now())
        outcome = await requests.approve(ask.path.quotaRequestId, body.credits, body.expiresAt, _actor(ask))
        if isinstance(outcome, Overloaded | Draining):
            raise ProblemRaised("SERVICE_UNAVAILABLE", headers=RETRY)
        refuse_undecided(outcome)
        return Answer(await decided(ask.path.quotaRequestId))

    @routes.add(
        "POST",
        "/api/admin/quota-requests/{quotaRequestId}/reject",
        access=Access.ADMIN,
        path_form=QuotaRequestPath,
        body=RejectionIn,
        answers={200: AdminQuotaRequestOut},
        problems=("QUOTA_REQUEST_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def reject_quota_request(ask: Ask[QuotaRequestPath, Any, RejectionIn]) -> Answer:
        """Reject a request for credits. Repeated, it changes nothing."""
        if ask.body.reason is not None:
            ask.exchange.audit_details["reason"] = ask.body.reason
        refuse_undecided(await requests.reject(ask.path.quotaRequestId, ask.body.reason, _actor(ask)))
        return Answer(await decided(ask.path.quotaRequestId))

    def refuse_undecided(outcome: object) -> None:
        if isinstance(outcome, RequestMissing):
            raise ProblemRaised("QUOTA_REQUEST_NOT_FOUND")
        if isinstance(outcome, DecidedOtherwise):
            raise ProblemRaised("CONFLICT", f"The request is {outcome.state} already, or with other numbers")

    async def decided(request_id: str) -> AdminQuotaRequestOut:
        row = await reads.show_request(database, request_id)
        assert row is not None, "requests are never deleted"
        return _request_to_operators(row)

    return routes


def _actor(ask: Ask[Any, Any, Any]) -> str:
    assert ask.identity is not None
    return ask.identity.actor


def _quota(vault: Mapping[str, Any], view: QuotaView, of_month: Sequence[Mapping[str, Any]], now: datetime) -> QuotaOut:
    """Return a quota with what its plan gives this month, also before the call that it is given with.

    Args:
        of_month: what plans granted in this month.
    """
    start, end = month_of(now)
    left = {grant.grant_id: grant for grant in view.grants}
    grants = [_line(grant) for grant in view.grants]
    # A plan that the vault is no longer on grants nothing more; what it burnt this month counts for the next one.
    former = {str(row["grant_id"]) for row in of_month if row["plan_id"] != view.plan_id}
    live = {str(row["grant_id"]) for row in of_month if row["lapsed_at"] is None and str(row["grant_id"]) in left}
    if view.monthly_credits and not live - former:
        burnt = sum(
            row["amount"] - (row["lapsed"] if row["lapsed_at"] is not None else _remaining(left, row["grant_id"]))
            for row in of_month
        )
        coming = max(0, view.monthly_credits - burnt)
        line = GrantLineOut(id=None, source="plan", amount=coming, remaining=coming, expiresAt=iso(end))
        grants = [*(grant for grant in grants if grant.id not in former), line]
        grants.sort(key=lambda grant: grant.expiresAt)
    elif not view.monthly_credits:
        grants = [grant for grant in grants if grant.id not in former]
    granted, remaining = sum(each.amount for each in grants), sum(each.remaining for each in grants)
    return QuotaOut(
        network=vault["network"],
        vaultId=str(vault["vault_id"]),
        plan=view.plan_id,
        overage=view.overage,
        period=PeriodOut(start=iso(start), end=iso(end)),
        credits=CreditsOut(granted=granted, used=granted - remaining, remaining=remaining),
        grants=grants,
        percentUsed=(granted - remaining) * 100 // granted if granted else None,
    )


def _remaining(left: Mapping[str, GrantView], grant_id: object) -> int:
    found = left.get(str(grant_id))
    return 0 if found is None else found.remaining


def _line(grant: GrantView) -> GrantLineOut:
    source: Any = grant.source
    return GrantLineOut(
        id=grant.grant_id,
        source=source,
        amount=grant.amount,
        remaining=grant.remaining,
        expiresAt=iso(grant.expires_at),
    )


def _request(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(row["request_id"]),
        "network": row["network"],
        "vaultId": str(row["vault_id"]),
        "credits": row["credits"],
        "reason": row["reason"],
        "status": row["state"],
        "creditsGranted": row["granted"],
        "expiresAt": moment(row["expires_at"]),
        "answer": row["answer"],
        "createdAt": iso(row["created_at"]),
        "decidedAt": moment(row["decided_at"]),
    }


def _request_to_operators(row: Mapping[str, Any]) -> AdminQuotaRequestOut:
    return AdminQuotaRequestOut(**_request(row), userId=str(row["user_id"]), decidedBy=row["decided_by"])
