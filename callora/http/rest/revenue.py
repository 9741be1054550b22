"""What developers earn and how they are paid: revenue, settlements, a statement."""

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import attrs
from pydantic import Field

from callora.config.settings import Settings
from callora.http.problems import ProblemRaised
from callora.http.rest.deposits import Hash, Network
from callora.http.rest.forms import (
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
from callora.http.rest.operations import Access, Answer, Ask, Routes, Text
from callora.http.rest.periods import AS_OF, PeriodQuery, Span, shown_as_of, span_of
from callora.ledger.clock import Clock
from callora.ledger.ids import DeveloperId, UserId
from callora.store.reads import settlements as reads
from callora.store.reads import usage

MONTH: Final = timedelta(days=30)
CSV_SPAN: Final = timedelta(days=31)
"""How much of a statement is read at once."""
CSV_HEADER: Final = (
    "at",
    "account",
    "entry",
    "amount_usdc",
    "balance_usdc",
    "api_id",
    "api",
    "settlement_id",
    "tx_hash",
    "network",
)


class RevenueQuery(PageQuery):
    """Which settlements."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class StatementQuery(PeriodQuery):
    """Of which period."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class SettlementPath(Form):
    """Which settlement."""

    settlementId: Uuid


class SettlementOut(Form):
    """A payment to you."""

    id: Uuid
    network: Network
    amount: UsdcOut = Field(description="What you are credited.")
    gross: UsdcOut = Field(description="What callers paid for it, less refunds.")
    fee: UsdcOut = Field(description="What of it is the platform's.")
    status: Literal["pending", "completed", "failed"] = Field(
        description="pending: on its way; completed: the settlement contract owes it to your wallet; failed: nothing "
        "was paid, and its revenue is in a later settlement."
    )
    address: str = Field(description="Which wallet is credited.")
    tx_hash: Hash | None = Field(description="Of the credit.")
    explorer_url: str | None = Field(description="Where people look at it; null on networks that nobody shows.")
    charge_tx_hash: Hash | None = Field(description="Of the charge that it was paid from.")
    failure: str | None
    created_at: InstantOut
    completed_at: InstantOut | None


class RevenueSummary(Form):
    """What you have earned: total_earned = completed + pending + what is in no settlement."""

    total_earned: UsdcOut = Field(
        description="Everything charged for calls of your APIs, less refunds and the platform's share."
    )
    completed: UsdcOut = Field(description="Credited to your wallet by the settlement contract.")
    pending: UsdcOut = Field(description="In settlements under way.")
    available_to_withdraw: UsdcOut = Field(
        description="In no settlement yet; it is in the next one, where it comes to the least payout. 0 where more was "
        "refunded than earned since the last one."
    )
    held_back: Literal["no_wallet", "no_account", "no_trustline", "refused", "over_cap"] | None = Field(
        description="Why you were left out of the last settlement: you logged in with no wallet; it is no account; it "
        "has no trustline for USDC; the contract refuses it; it is more than may be moved in an hour."
    )


class RevenueReport(Form):
    """What you have earned, and your settlements, the newest first."""

    network: Network
    settlements: list[SettlementOut]
    summary: RevenueSummary
    pagination: PageMeta
    asOf: InstantOut | None = Field(description=AS_OF)


class SettlementList(Form):
    """A page of settlements, the newest first."""

    data: list[SettlementOut]
    meta: PageMeta


@attrs.frozen
class Shown:
    """Shows settlements with links to where people look at them."""

    settings: Settings

    def settlement(self, found: reads.ShownSettlement) -> SettlementOut:
        """Return a settlement as its developer sees it."""
        network: Any = found.network
        status: Any = found.status
        return SettlementOut(
            id=found.settlement_id,
            network=network,
            amount=usdc(found.credit),
            gross=usdc(found.gross),
            fee=usdc(found.fee),
            status=status,
            address=found.address,
            tx_hash=found.credit_hash,
            explorer_url=explorer_url(self.settings, found.network, found.credit_hash),
            charge_tx_hash=found.charge_hash,
            failure=found.failure,
            created_at=iso(found.opened_at),
            completed_at=None if found.ended_at is None or found.status != "completed" else iso(found.ended_at),
        )

    def page(self, found: Sequence[reads.ShownSettlement], limit: int) -> tuple[list[SettlementOut], PageMeta]:
        """Return a page, of one more than it shows."""
        cursor = None
        if len(found) > limit:
            last = found[limit - 1]
            cursor = encode_cursor(microseconds(last.opened_at), last.settlement_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return [self.settlement(each) for each in found[:limit]], meta


def explorer_url(settings: Settings, network: str, tx_hash: str | None) -> str | None:
    """Return where people look at a transaction; None where nobody shows it."""
    base = settings.explorer_of(network)
    return None if base is None or tx_hash is None else f"{base}/{tx_hash}"


async def developer_of(connection: usage.Reading, user_id: str) -> DeveloperId:
    """Return a user as a developer.

    Raises:
        ProblemRaised: DEVELOPER_NOT_FOUND.
    """
    found = await usage.developer_of(connection, UserId(user_id))
    if found is None:
        raise ProblemRaised("DEVELOPER_NOT_FOUND")
    return found


def revenue_routes(settings: Settings, database: reads.Database, clock: Clock) -> Routes:
    """Return the routes of revenue and settlements."""
    routes = Routes("Developers")
    configured: Any = settings.stellar_network
    shown = Shown(settings)

    @routes.add(
        "GET",
        "/api/developers/revenue",
        access=Access.USER,
        query=RevenueQuery,
        answers={200: RevenueReport},
        problems=("DEVELOPER_NOT_FOUND",),
    )
    async def get_developer_revenue(ask: Ask[Any, RevenueQuery, Any]) -> Answer:
        """What your APIs have earned since their first call, and what of it was paid out."""
        network, before = ask.query.network or configured, _before(ask.query.cursor)
        async with usage.reading(database) as connection:
            developer_id = await developer_of(connection, ask.user_id)
            revenue = await reads.revenue_of(connection, network, developer_id)
            found = await reads.list_settlements(connection, network, developer_id, before, ask.query.limit + 1)
        settlements, meta = shown.page(found, ask.query.limit)
        held_back: Any = revenue.held_back
        return Answer(
            RevenueReport(
                network=network,
                settlements=settlements,
                summary=RevenueSummary(
                    total_earned=usdc(revenue.earned),
                    completed=usdc(revenue.completed),
                    pending=usdc(revenue.pending),
                    available_to_withdraw=usdc(max(0, revenue.unsettled)),
                    held_back=held_back,
                ),
                pagination=meta,
                asOf=shown_as_of(revenue.as_of),
            )
        )

    @routes.add(
        "GET",
        "/api/developers/settlements",
        access=Access.USER,
        query=RevenueQuery,
        answers={200: SettlementList},
        problems=("DEVELOPER_NOT_FOUND",),
    )
    async def list_developer_settlements(ask: Ask[Any, RevenueQuery, Any]) -> Answer:
        """Your settlements, the newest first."""
        network, before = ask.query.network or configured, _before(ask.query.cursor)
        async with usage.reading(database) as connection:
            developer_id = await developer_of(connection, ask.user_id)
            found = await reads.list_settlements(connection, network, developer_id, before, ask.query.limit + 1)
        data, meta = shown.page(found, ask.query.limit)
        return Answer(SettlementList(data=data, meta=meta))

    @routes.add(
        "GET",
        "/api/developers/settlements/{settlementId}",
        access=Access.USER,
        path_form=SettlementPath,
        answers={200: SettlementOut},
        problems=("DEVELOPER_NOT_FOUND", "SETTLEMENT_NOT_FOUND"),
    )
    async def get_developer_settlement(ask: Ask[SettlementPath, Any, Any]) -> Answer:
        """A settlement of yours."""
        developer_id = await developer_of(database, ask.user_id)
        found = await reads.find_settlement(database, developer_id, ask.path.settlementId)
        if found is None:
            raise ProblemRaised("SETTLEMENT_NOT_FOUND")
        return Answer(shown.settlement(found))

    @routes.add(
        "GET",
        "/api/developers/statement",
        access=Access.USER,
        query=StatementQuery,
        answers={200: Text("text/csv; charset=utf-8", "One line an entry: " + ",".join(CSV_HEADER))},
        problems=("DEVELOPER_NOT_FOUND",),
    )
    async def export_developer_statement(ask: Ask[Any, StatementQuery, Any]) -> Answer:
        """Your statement as CSV, the oldest first; by default of the last 30 days.

        Account `owed` is what Callora owes you: usage, platform_fee, refund and fee_refund by day and API, less
        settlements. It begins with opening_balance and ends with closing_balance, and its amounts lead from one to the
        other. Account `on_chain` is what the settlement contract owes your wallet: settlements less withdrawals.
        Complete once `asOf` of your revenue is past its end.
        """
        network = ask.query.network or configured
        span = span_of(ask.query, clock.now(), MONTH)
        developer_id = await developer_of(database, ask.user_id)
        lines = await _statement(database, network, developer_id, span)
        name = f"statement-{span.since:%Y-%m-%d}-{span.until:%Y-%m-%d}.csv"
        return Answer(lines, headers={"Content-Disposition": f'attachment; filename="{name}"'})

    return routes


async def _statement(
    database: reads.Database, network: str, developer_id: DeveloperId, span: Span
) -> AsyncIterator[bytes]:
    """Return a statement as it is read; what comes first is read before this returns, so that its faults are told."""

    async def read(since: datetime) -> Sequence[reads.Line]:
        async with usage.reading(database) as connection:
            until = min(since + CSV_SPAN, span.until)
            return await reads.statement(connection, network, developer_id, since, until)

    async with usage.reading(database) as connection:
        opening = await reads.owed_at(connection, network, developer_id, span.since)
    first = await read(span.since)

    async def lines() -> AsyncIterator[bytes]:
        yield _csv([CSV_HEADER, _balance(span.since, "opening_balance", opening, network)])
        owed, since, batch = opening, span.since, first
        while True:
            if batch:
                yield _csv([_cells(line, network) for line in batch])
            owed += sum(line.amount for line in batch if line.account == "owed")
            since += CSV_SPAN
            if since >= span.until:
                break
            batch = await read(since)
        yield _csv([_balance(span.until, "closing_balance", owed, network)])

    return lines()


def _balance(at: datetime, entry: str, amount: int, network: str) -> tuple[str, ...]:
    return iso(at), "owed", entry, "", usdc(amount), "", "", "", "", network


def _cells(line: reads.Line, network: str) -> tuple[str, ...]:
    return (
        iso(line.at),
        line.account,
        line.entry,
        usdc(line.amount),
        "",
        "" if line.api_id is None else str(line.api_id),
        line.slug or "",
        line.reference or "",
        line.tx_hash or "",
        network,
    )


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _before(cursor: str | None) -> tuple[datetime, str] | None:
    position = decode_cursor(cursor, int, str)
    return None if position is None else (moment_of(position[0]), read_uuid(position[1]))
