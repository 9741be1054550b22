"""What operators see and do about books that do not add up."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from callora.http.problems import ProblemRaised
from callora.http.rest.chain_admin import Done, ReasonBody
from callora.http.rest.deposits import NOT_CONFIGURED, Network
from callora.http.rest.forms import (
    Flag,
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
    UsdcOut,
    Uuid,
    decode_cursor,
    encode_cursor,
    iso,
    microseconds,
    moment_of,
    read_uuid,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.store.reads import discrepancies as reads

if TYPE_CHECKING:
    from callora.actors.bookkeeping import Bookkeeper


class DiscrepanciesQuery(PageQuery):
    """Which discrepancies."""

    all: Flag = Field(default=False, description="Those too that are gone or cleared.")


class DiscrepancyPath(Form):
    """Which discrepancy."""

    discrepancyId: Uuid


class DiscrepancyOut(Form):
    """Something that does not add up."""

    id: Uuid
    network: Network
    kind: Literal["MISSING_TX", "STALE_PENDING", "FALSE_FAILURE", "UNEXPECTED_STATUS", "DRIFT"]
    subject: str
    difference_usdc: UsdcOut
    message: str
    stopsSettlement: bool
    foundAt: InstantOut
    seenAt: InstantOut = Field(description="When it was last found.")
    goneAt: InstantOut | None = Field(description="When it was not found any more.")
    clearedAt: InstantOut | None
    clearedBy: str | None
    reason: str | None


class DiscrepancyList(Form):
    """A page of discrepancies, the latest first."""

    data: list[DiscrepancyOut]
    meta: PageMeta


def settlement_admin_routes(bookkeeper: "Bookkeeper | None", database: reads.Database, network: Network) -> Routes:
    """Return the routes of discrepancies.

    Args:
        bookkeeper: None where the chain is not configured.
        network: the configured one.
    """
    routes = Routes("Operators")

    @routes.add(
        "GET",
        "/api/admin/settlements/discrepancies",
        access=Access.ADMIN,
        query=DiscrepanciesQuery,
        answers={200: DiscrepancyList},
    )
    async def list_discrepancies(ask: Ask[Any, DiscrepanciesQuery, Any]) -> Answer:
        """What does not add up between usage, revenue, settlements and the chain, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        before = None if position is None else (moment_of(position[0]), read_uuid(position[1]))
        found = await reads.list_discrepancies(database, network, before, limit + 1, everything=ask.query.all)
        cursor = None
        if len(found) > limit:
            last = found[limit - 1]
            cursor = encode_cursor(microseconds(last.found_at), last.discrepancy_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(DiscrepancyList(data=[_shown(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "POST",
        "/api/admin/settlements/discrepancies/{discrepancyId}/clear",
        access=Access.ADMIN,
        path_form=DiscrepancyPath,
        body=ReasonBody,
        answers={200: Done},
        problems=("NOT_FOUND", "COMPONENT_NOT_CONFIGURED"),
    )
    async def clear_discrepancy(ask: Ask[DiscrepancyPath, Any, ReasonBody]) -> Answer:
        """Clear a discrepancy that you have explained: it stops settlement no more, unless by another amount.

        Settlement goes on once it is resumed: POST /api/admin/chain/settlement/resume.
        """
        if bookkeeper is None:
            raise ProblemRaised("COMPONENT_NOT_CONFIGURED", NOT_CONFIGURED)
        ask.exchange.audit_details["reason"] = ask.body.reason
        assert ask.identity is not None
        if not await bookkeeper.clear(ask.path.discrepancyId, ask.identity.actor[:200], ask.body.reason):
            raise ProblemRaised("NOT_FOUND", "No discrepancy of this id waits to be cleared")
        return Answer(Done())

    return routes


def _shown(noted: reads.Noted) -> DiscrepancyOut:
    network: Any = noted.network
    return DiscrepancyOut(
        id=noted.discrepancy_id,
        network=network,
        kind=noted.found.kind,
        subject=noted.found.subject,
        difference_usdc=usdc(noted.found.difference),
        message=noted.found.said,
        stopsSettlement=noted.found.stops,
        foundAt=iso(noted.found_at),
        seenAt=iso(noted.seen_at),
        goneAt=None if noted.gone_at is None else iso(noted.gone_at),
        clearedAt=None if noted.cleared_at is None else iso(noted.cleared_at),
        clearedBy=noted.cleared_by,
        reason=noted.reason,
    )
