"""Disputes: a charge of one's own that one wants back, what operators decide on it, and what came of that."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.disputes import (
    DecidedBefore,
    DisputedBefore,
    DisputeMissing,
    Disputes,
    EventMissing,
    NothingToRefund,
    Resolution,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, InstantOut, Page, PageMeta, PageQuery, UsdcOut, Uuid, iso, usdc
from callora.http.rest.key_desk import before_id
from callora.http.rest.key_forms import Network, moment
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import EventId, UserId
from callora.store.reads import disputes as reads

Words = Annotated[str, Field(min_length=1, max_length=1000)]
_RESOLVED: Final = ("REFUNDED", "UPHELD")


class DisputeIn(Form):
    """A charge that you dispute."""

    usage_event_id: Uuid = Field(description="Of your own vault: charged, and not refunded whole.")
    reason: Words = Field(description="Told to the operators and the API's developer.")


class DisputeOut(Form):
    """A disputed charge, and what was decided."""

    id: str
    usageEventId: str
    network: Network
    vaultId: str
    apiId: int
    endpointId: int
    amountUsdc: UsdcOut = Field(description="What the event was charged.")
    reason: str
    status: reads.Status = Field(description="REFUNDING: decided, and given back within a minute or so.")
    notes: str | None = Field(description="Of whoever decided.")
    refundedUsdc: UsdcOut | None = Field(description="What was given back under this dispute.")
    createdAt: InstantOut
    decidedAt: InstantOut | None
    resolvedAt: InstantOut | None


class DisputeList(Form):
    """Your disputes, the latest first."""

    disputes: list[DisputeOut]
    total: int
    meta: PageMeta


class RefundList(Form):
    """Your disputes that ended with a refund, the latest first."""

    refunds: list[DisputeOut]
    total: int
    meta: PageMeta


class DisputeEventOut(Form):
    """A step of a dispute."""

    type: Literal["opened", "decided", "refunded", "taken_back"] = Field(
        description="taken_back: everything was given back otherwise before the refund was booked; it is open again."
    )
    at: InstantOut
    resolution: Resolution | None
    notes: str | None
    amountUsdc: UsdcOut | None = Field(description="What was given back.")


class DisputeWithEvents(Form):
    """A dispute of yours and its history."""

    dispute: DisputeOut
    events: list[DisputeEventOut]


class AdminDisputeOut(DisputeOut):
    """A dispute, whose it is, whom it is about, and who decided it."""

    userId: str
    developerId: str
    refundableUsdc: UsdcOut = Field(description="What of the charge is left to give back.")
    decidedBy: str | None


class AdminDisputeList(Form):
    """Everybody's disputes, the latest first."""

    disputes: list[AdminDisputeOut]
    total: int
    meta: PageMeta


class AdminDisputeQuery(PageQuery):
    """Which disputes."""

    status: reads.Status | None = None


class DisputePath(Form):
    """Which dispute."""

    disputeId: Uuid


class ResolutionIn(Form):
    """What is decided."""

    resolution: Resolution = Field(description="REFUNDED gives back what is left of the charge; UPHELD keeps it.")
    notes: Words | None = Field(default=None, description="Told to who paid and to the API's developer.")


def dispute_routes(disputes: Disputes, database: reads.Database) -> Routes:
    """Return the routes of disputes, for those who paid."""
    routes = Routes("Disputes")

    @routes.add(
        "POST",
        "/api/billing/disputes",
        access=Access.USER,
        body=DisputeIn,
        answers={201: DisputeOut},
        problems=("NOT_FOUND", "NOTHING_TO_REFUND", "DISPUTE_EXISTS", "OUTCOME_UNKNOWN"),
    )
    async def open_dispute(ask: Ask[Any, Any, DisputeIn]) -> Answer:
        """Dispute a charge of your own vault, once.

        An operator decides on it. Asked again for the same event the answer is 409 with the dispute's id.
        """
        made = await disputes.open(UserId(ask.user_id), EventId(ask.body.usage_event_id), ask.body.reason)
        match made:
            case EventMissing():
                raise ProblemRaised("NOT_FOUND", "No usage event of yours has this id")
            case NothingToRefund():
                raise ProblemRaised("NOTHING_TO_REFUND")
            case DisputedBefore(dispute_id, status):
                raise ProblemRaised("DISPUTE_EXISTS", details={"disputeId": dispute_id, "status": status})
            case reads.Dispute():
                return Answer(DisputeOut(**_shown(await _row(database, made.dispute_id))), 201)

    @routes.add("GET", "/api/billing/disputes", access=Access.USER, query=PageQuery, answers={200: DisputeList})
    async def list_disputes(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your disputes, the latest first."""
        page, total = await _page(database, ask.query, UserId(ask.user_id), None)
        return Answer(
            DisputeList(disputes=[DisputeOut(**_shown(row)) for row in page.rows], total=total, meta=page.meta)
        )

    @routes.add(
        "GET",
        "/api/billing/disputes/{disputeId}",
        access=Access.USER,
        path_form=DisputePath,
        answers={200: DisputeWithEvents},
        problems=("DISPUTE_NOT_FOUND",),
    )
    async def get_dispute(ask: Ask[DisputePath, Any, Any]) -> Answer:
        """A dispute of yours, and what became of it step by step."""
        row = await reads.show_dispute(database, ask.path.disputeId)
        if row is None or str(row["user_id"]) != ask.user_id:
            raise ProblemRaised("DISPUTE_NOT_FOUND")
        events = [
            DisputeEventOut(
                type=each["type"],
                at=iso(each["at"]),
                resolution=each["resolution"],
                notes=each["notes"],
                amountUsdc=None if each["amount"] is None else usdc(each["amount"]),
            )
            for each in await reads.events_of(database, ask.path.disputeId)
        ]
        return Answer(DisputeWithEvents(dispute=DisputeOut(**_shown(row)), events=events))

    @routes.add("GET", "/api/refunds", access=Access.USER, query=PageQuery, answers={200: RefundList})
    async def list_refunds(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your disputes that ended with a refund, the latest first."""
        page, total = await _page(database, ask.query, UserId(ask.user_id), "REFUNDED")
        return Answer(RefundList(refunds=[DisputeOut(**_shown(row)) for row in page.rows], total=total, meta=page.meta))

    return routes


def dispute_admin_routes(disputes: Disputes, database: reads.Database) -> Routes:
    """Return the routes by which operators decide on disputes."""
    routes = Routes("Operators: disputes")

    @routes.add(
        "GET",
        "/api/billing/disputes/admin/all",
        access=Access.ADMIN,
        query=AdminDisputeQuery,
        answers={200: AdminDisputeList},
    )
    async def list_all_disputes(ask: Ask[Any, AdminDisputeQuery, Any]) -> Answer:
        """Everybody's disputes, the latest first."""
        page, total = await _page(database, ask.query, None, ask.query.status)
        return Answer(
            AdminDisputeList(disputes=[_shown_to_operators(row) for row in page.rows], total=total, meta=page.meta)
        )

    @routes.add(
        "POST",
        "/api/billing/disputes/{disputeId}/resolve",
        access=Access.ADMIN,
        path_form=DisputePath,
        body=ResolutionIn,
        answers={200: AdminDisputeOut, 202: AdminDisputeOut},
        problems=("DISPUTE_NOT_FOUND", "DISPUTE_RESOLVED", "NOTHING_TO_REFUND", "OUTCOME_UNKNOWN"),
    )
    async def resolve_dispute(ask: Ask[DisputePath, Any, ResolutionIn]) -> Answer:
        """Decide a dispute, once: give back what is left of the charge, or uphold it.

        202: it is decided, and the refund is booked as soon as it can be; the status is REFUNDING until then.
        """
        body = ask.body
        ask.exchange.audit_details["resolution"] = body.resolution
        if body.notes is not None:
            ask.exchange.audit_details["notes"] = body.notes
        assert ask.identity is not None
        made = await disputes.resolve(ask.path.disputeId, body.resolution, body.notes, ask.identity.actor)
        match made:
            case DisputeMissing():
                raise ProblemRaised("DISPUTE_NOT_FOUND")
            case DecidedBefore(status):
                raise ProblemRaised("DISPUTE_RESOLVED", details={"status": status})
            case NothingToRefund():
                raise ProblemRaised("NOTHING_TO_REFUND", "All of the charge was given back already: uphold it instead")
            case reads.Dispute():
                shown = _shown_to_operators(await _row(database, made.dispute_id))
                return Answer(shown, 202 if shown.status == "REFUNDING" else 200)

    return routes


async def _row(database: reads.Database, dispute_id: str) -> reads.Row:
    """Return a dispute that was written just now.

    Raises:
        OutcomeUnknown: it cannot be read, but it was written.
    """
    try:
        row = await reads.show_dispute(database, dispute_id)
    except StoreUnavailable as fault:
        raise OutcomeUnknown("it is stored, and could not be read again") from fault
    assert row is not None, "disputes are never deleted"
    return row


async def _page(
    database: reads.Database, query: PageQuery, user_id: UserId | None, status: reads.Status | None
) -> tuple[Page, int]:
    rows = await reads.list_disputes(database, user_id, status, before=before_id(query.cursor), limit=query.limit + 1)
    return Page.of(rows, query.limit, "dispute_id"), await reads.count_disputes(database, user_id, status)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(row["dispute_id"]),
        "usageEventId": str(row["event_id"]),
        "network": row["network"],
        "vaultId": str(row["vault_id"]),
        "apiId": row["api_id"],
        "endpointId": row["endpoint_id"],
        "amountUsdc": usdc(row["amount"]),
        "reason": row["reason"],
        "status": row["status"],
        "notes": row["notes"],
        "refundedUsdc": None if row["refunded"] is None else usdc(row["refunded"]),
        "createdAt": iso(row["created_at"]),
        "decidedAt": moment(row["decided_at"]),
        "resolvedAt": iso(row["moved_at"]) if row["status"] in _RESOLVED else None,
    }


def _shown_to_operators(row: Mapping[str, Any]) -> AdminDisputeOut:
    return AdminDisputeOut(
        **_shown(row),
        userId=str(row["user_id"]),
        developerId=str(row["developer_id"]),
        refundableUsdc=usdc(row["refundable"]),
        decidedBy=row["decided_by"],
    )
