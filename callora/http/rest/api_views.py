"""APIs as they are shown: to everyone, to the developer, to operators. Only the last two see where calls go."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from callora.http.rest.api_forms import Method
from callora.http.rest.forms import Form, InstantOut, PageMeta, UsdcOut, iso, usdc
from callora.ledger.offers import Status, masked
from callora.ledger.rating import CARD_COLUMNS, Unit, make_card

LISTED_ENDPOINTS_MAX: Final = 20
"""Endpoints that a list shows of each API."""


class RateCardOut(Form):
    """What a price is the price of."""

    unit: Unit
    unit_credits: int = Field(description="What a unit costs where a plan's credits pay.")
    min_units: int
    held_units: int | None = Field(description="What is held before the answer tells the quantity.")
    max_units: int | None
    quantity_from: str | None = Field(description="Where the quantity is read.")


_CARD: Final = "Null where the price is that of a call, and credits pay for none."


class NextPrice(Form):
    """A price that is dated ahead."""

    price_per_call_usdc: UsdcOut
    effective_from: InstantOut
    rate_card: RateCardOut | None = Field(description=_CARD)


class EndpointOut(Form):
    """An endpoint that is offered."""

    id: int
    path: str
    method: Method
    price_per_call_usdc: UsdcOut | None = Field(description="Null before its first price is in effect.")
    rate_card: RateCardOut | None = Field(description=_CARD)
    next_price: NextPrice | None
    description: str | None
    billable_statuses: str
    required_scope: str | None


class Stats(Form):
    """The calls of the last 30 days, some minutes old."""

    totalCalls: int
    avgResponseMs: float
    uptimePct: float = Field(description="The share of calls that did not fail.")


class DeveloperOut(Form):
    """Who offers it."""

    name: str | None
    website: str | None
    description: str | None


class Provider(Form):
    """The same, in short."""

    name: str | None
    url: str | None


class PublicApi(Form):
    """An API as everyone sees it."""

    id: int
    slug: str
    name: str
    description: str | None
    category: str | None
    tags: list[str]
    logo_url: str | None
    status: Status
    developer: DeveloperOut
    provider: Provider
    priceFrom: UsdcOut | None = Field(description="The cheapest endpoint's price now.")
    endpointCount: int
    endpoints: list[EndpointOut] = Field(description="In a list the first 20; all of them where one API is asked for.")
    createdAt: InstantOut
    stats: Stats | None = Field(description="Null where nobody called.")


class OwnApi(PublicApi):
    """An API as its developer sees it."""

    base_url: str
    upstream_headers: dict[str, str] = Field(description="The values masked.")
    callCount: int = Field(description="Of the last 30 days, some minutes old.")
    updatedAt: InstantOut


class AdminDeveloper(Form):
    """Whose an API is."""

    id: str
    user_id: str
    name: str | None


class AdminApi(Form):
    """An API as operators see it."""

    id: int
    slug: str
    name: str
    category: str | None
    status: Status
    base_url: str
    developer: AdminDeveloper
    endpointCount: int
    callCount: int
    createdAt: InstantOut
    updatedAt: InstantOut
    deletedAt: InstantOut | None


class PublicApis(Form):
    """A page of the marketplace."""

    data: list[PublicApi]
    meta: PageMeta


class OwnApis(Form):
    """A page of a developer's APIs."""

    data: list[OwnApi]
    meta: PageMeta


class AdminApis(Form):
    """A page of anyone's APIs."""

    data: list[AdminApi]
    meta: PageMeta


class EndpointsOut(Form):
    """The endpoints that were sent, as they are now."""

    data: list[EndpointOut]
    created: int = Field(description="How many were not offered before.")


class PriceVersion(Form):
    """One version of a price."""

    version: int
    price_per_call_usdc: UsdcOut
    rate_card: RateCardOut | None = Field(description=_CARD)
    effective_from: InstantOut
    in_effect: bool


class PriceVersions(Form):
    """A page of versions, the latest first."""

    data: list[PriceVersion]
    meta: PageMeta


# --- made of rows -----------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]


def rate_card_out(row: Row, prefix: str = "") -> RateCardOut | None:
    """Return what a price is the price of, as it is shown; None also where there is no price.

    Args:
        prefix: of the row's columns.
    """
    columns = [row[prefix + column] for column in CARD_COLUMNS]
    if columns[0] is None or make_card(*columns) is None:
        return None
    return RateCardOut(**dict(zip(CARD_COLUMNS, columns, strict=True)))


def endpoint_out(row: Row) -> EndpointOut:
    """Return an endpoint as it is shown."""
    ahead = None
    if row["next_from"] is not None:
        ahead = NextPrice(
            price_per_call_usdc=usdc(row["next_amount"]),
            effective_from=iso(row["next_from"]),
            rate_card=rate_card_out(row, "next_"),
        )
    return EndpointOut(
        id=row["endpoint_id"],
        path=row["path"],
        method=row["method"],
        price_per_call_usdc=None if row["amount"] is None else usdc(row["amount"]),
        rate_card=rate_card_out(row),
        next_price=ahead,
        description=row["description"],
        billable_statuses=row["billable_statuses"],
        required_scope=row["required_scope"],
    )


def _stats(row: Row) -> Stats | None:
    calls = row["calls"]
    if calls is None:
        return None
    return Stats(
        totalCalls=calls,
        avgResponseMs=round(row["latency_us"] / calls / 1000, 3),
        uptimePct=round(100 * (calls - row["failed_calls"]) / calls, 2),
    )


def _public(row: Row, endpoints: Sequence[Row]) -> dict[str, Any]:
    return {
        "id": row["api_id"],
        "slug": row["slug"],
        "name": row["name"],
        "description": row["description"],
        "category": row["category"],
        "tags": list(row["tags"]),
        "logo_url": row["logo_url"],
        "status": row["status"],
        "developer": DeveloperOut(
            name=row["developer_name"], website=row["developer_website"], description=row["developer_description"]
        ),
        "provider": Provider(name=row["developer_name"], url=row["developer_website"]),
        "priceFrom": None if row["price_from"] is None else usdc(row["price_from"]),
        "endpointCount": row["endpoint_count"],
        "endpoints": [endpoint_out(each) for each in endpoints],
        "createdAt": iso(row["created_at"]),
        "stats": _stats(row),
    }


def public_api(row: Row, endpoints: Sequence[Row]) -> PublicApi:
    """Return an API as everyone sees it."""
    return PublicApi(**_public(row, endpoints))


def own_api(row: Row, endpoints: Sequence[Row]) -> OwnApi:
    """Return an API as its developer sees it."""
    headers: dict[str, str] = json.loads(row["upstream_headers"])
    return OwnApi(
        **_public(row, endpoints),
        base_url=row["base_url"],
        upstream_headers={name: masked(value) for name, value in headers.items()},
        callCount=row["calls"] or 0,
        updatedAt=iso(row["updated_at"]),
    )


def admin_api(row: Row) -> AdminApi:
    """Return an API as operators see it."""
    return AdminApi(
        id=row["api_id"],
        slug=row["slug"],
        name=row["name"],
        category=row["category"],
        status=row["status"],
        base_url=row["base_url"],
        developer=AdminDeveloper(id=row["developer_id"], user_id=row["user_id"], name=row["developer_name"]),
        endpointCount=row["endpoint_count"],
        callCount=row["calls"] or 0,
        createdAt=iso(row["created_at"]),
        updatedAt=iso(row["updated_at"]),
        deletedAt=None if row["deleted_at"] is None else iso(row["deleted_at"]),
    )
