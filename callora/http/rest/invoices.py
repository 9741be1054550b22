"""Invoices: the closed months of one's own vaults."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    InstantOut,
    Page,
    PageMeta,
    PageQuery,
    UsdcOut,
    Uuid,
    iso,
    usdc,
)
from callora.http.rest.key_desk import before_id
from callora.http.rest.key_forms import Network
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import UserId
from callora.store.reads import invoices as reads


class InvoicePath(Form):
    """Which invoice."""

    invoiceId: Uuid


class InvoiceOut(Form):
    """What a vault was charged in a calendar month, UTC."""

    id: Uuid
    vaultId: Uuid
    network: Network
    month: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}$", examples=["2026-11"])
    calls: int
    usage_usdc: UsdcOut = Field(description="Charged for calls that began in the month.")
    refunded_usdc: UsdcOut = Field(description="Refunded in the month, whenever the calls were.")
    subscriptions_usdc: UsdcOut = Field(description="Paid for plans.")
    total_usdc: str = Field(
        pattern=r"^-?[0-9]+\.[0-9]{7}$",
        description="usage_usdc - refunded_usdc + subscriptions_usdc; all of it was paid from the balance.",
        examples=["12.5000000"],
    )
    issuedAt: InstantOut


class Invoices(Form):
    """Invoices, the latest first."""

    data: list[InvoiceOut]
    meta: PageMeta


def invoice_routes(database: reads.Database) -> Routes:
    """Return the routes of invoices."""
    routes = Routes("Billing")

    @routes.add(
        "GET",
        "/api/billing/invoices",
        access=Access.USER,
        query=PageQuery,
        answers={200: Invoices},
        aliases=("/api/invoices",),
    )
    async def list_invoices(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """What your vaults were charged, month by month, the latest first.

        A month is closed about a day after its end, when no call of it is open any more. Nothing is left to be paid.
        """
        limit = ask.query.limit
        rows = await reads.invoices_of(database, UserId(ask.user_id), before_id(ask.query.cursor), limit + 1)
        page = Page.of(rows, limit, "invoice_id")
        return Answer(Invoices(data=[_shown(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "GET",
        "/api/billing/invoices/{invoiceId}",
        access=Access.USER,
        path_form=InvoicePath,
        answers={200: InvoiceOut},
        problems=("NOT_FOUND",),
        aliases=("/api/invoices/{invoiceId}",),
    )
    async def get_invoice(ask: Ask[InvoicePath, Any, Any]) -> Answer:
        """One of your invoices."""
        row = await reads.find_invoice(database, UserId(ask.user_id), ask.path.invoiceId)
        if row is None:
            raise ProblemRaised("NOT_FOUND", "You have no such invoice")
        return Answer(_shown(row))

    return routes


def _shown(row: Mapping[str, Any]) -> InvoiceOut:
    return InvoiceOut(
        id=str(row["invoice_id"]),
        vaultId=str(row["vault_id"]),
        network=row["network"],
        month=f"{row['month']:%Y-%m}",
        calls=row["calls"],
        usage_usdc=usdc(row["usage"]),
        refunded_usdc=usdc(row["refunded"]),
        subscriptions_usdc=usdc(row["subscriptions"]),
        total_usdc=usdc(row["total"]),
        issuedAt=iso(row["issued_at"]),
    )
