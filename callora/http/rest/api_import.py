"""Whole APIs in and out: from an OpenAPI document with prices, and as JSON that is given and taken alike."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from callora.http.rest.api_forms import (
    DAYS_AHEAD_MAX,
    ApiPath,
    ApiProse,
    BaseUrl,
    Billable,
    CallPrice,
    EndpointPath,
    EndpointProse,
    Label,
    Method,
    Name,
    RateCardIn,
    Scope,
    Slug,
    Tags,
    UpstreamHeaders,
    WebUrl,
    refuse,
    wrong_target,
)
from callora.http.rest.api_views import OwnApi, RateCardOut, Row, own_api, rate_card_out
from callora.http.rest.apis import WRITES, Shop, no_such_api, settle
from callora.http.rest.forms import DETAILS_MAX, Form, Instant, UsdcOut, field_path, iso, stroops, usdc
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import ApiId, UserId
from callora.ledger.imports import Imported, PriceList, read_openapi
from callora.ledger.offers import (
    ENDPOINTS_MAX,
    ApiOffer,
    ApiRef,
    DatedPrice,
    EndpointOffer,
    Wrong,
    check_endpoints,
)
from callora.ledger.rating import RateCard
from callora.store.reads import apis as reads

BODY_BYTES_MAX: Final = 2 * 1024 * 1024
_PRICES_AHEAD_MAX: Final = 20
_LINES_MAX: Final = 1000
_FORMAT: Final = "callora.api/1"

# --- OpenAPI ----------------------------------------------------------------------------------------------------------

_PriceLines = Annotated[dict[str, CallPrice], Field(max_length=_LINES_MAX)]


class PricesIn(Form):
    """What the operations cost; the most exact line counts."""

    default: CallPrice | None = Field(default=None, description="Of whatever no other line names.")
    by_path: _PriceLines = Field(default={}, examples=[{"/pets/{id}": "0.01"}])
    by_operation: _PriceLines = Field(
        default={}, description="By method and path, or by operationId.", examples=[{"POST /pets": "0.05"}]
    )

    def price_list(self) -> PriceList:
        """Return them as the rules know them."""
        return PriceList(
            default=None if self.default is None else stroops(self.default),
            by_path={name: stroops(price) for name, price in self.by_path.items()},
            by_operation={name: stroops(price) for name, price in self.by_operation.items()},
        )


class OpenApiIn(Form):
    """An OpenAPI document and what its operations cost."""

    document: dict[str, Any] = Field(description="OpenAPI 3.0 or 3.1, as JSON. References are not followed.")
    prices: PricesIn
    exclude: list[Annotated[str, Field(min_length=1, max_length=600)]] = Field(
        default=[], max_length=_LINES_MAX, description="Operations to leave out: a path, method and path, operationId."
    )
    base_url: BaseUrl | None = Field(default=None, description="Else servers[0].url, where it is absolute.")
    name: Name | None = Field(default=None, description="Else info.title.")
    slug: Slug | None = None
    description: ApiProse | None = Field(default=None, description="Else info.description.")
    category: Label | None = None
    tags: Tags = Field(default=[])
    logo_url: WebUrl | None = None
    upstream_headers: UpstreamHeaders = Field(default={})
    status: Literal["draft", "active"] = "active"
    dry_run: bool = Field(default=False, description="Only tell what would come of it.")


class ImportedEndpoint(Form):
    """An endpoint that the document would give."""

    method: Method
    path: str
    price_per_call_usdc: UsdcOut
    description: str | None


class WrongPlace(Form):
    """Why the document cannot be offered as it is."""

    field: str
    message: str
    code: str


class ImportPreview(Form):
    """What would come of an import."""

    dry_run: Literal[True] = True
    name: str | None
    base_url: str | None
    endpoints: list[ImportedEndpoint]
    errors: list[WrongPlace]


def _wrong_import(body: OpenApiIn, found: Imported) -> list[Wrong]:
    wrong = list(found.wrong)
    if body.name is None and found.name is None:
        wrong.append(Wrong(("name",), "must be given: the document has no info.title", "REQUIRED"))
    if body.base_url is None and found.base_url is None:
        wrong.append(Wrong(("base_url",), "must be given: servers[0].url is not absolute", "REQUIRED"))
    return wrong


# --- our own form -----------------------------------------------------------------------------------------------------


class PriceAhead(Form):
    """A price from a date on."""

    price_per_call_usdc: CallPrice
    effective_from: Instant
    rate_card: RateCardIn | None = None


class ExportedEndpoint(Form):
    """An endpoint, with its prices now and ahead."""

    method: Method
    path: EndpointPath
    price_per_call_usdc: CallPrice | None = Field(default=None, description="Null where its first price lies ahead.")
    rate_card: RateCardIn | None = Field(default=None, description="Of the price now.")
    prices_ahead: list[PriceAhead] = Field(default=[], max_length=_PRICES_AHEAD_MAX)
    description: EndpointProse | None = None
    billable_statuses: Billable = "2xx"
    required_scope: Scope | None = None

    @model_validator(mode="after")
    def _priced(self) -> "ExportedEndpoint":
        if self.price_per_call_usdc is None and not self.prices_ahead:
            raise ValueError("must have price_per_call_usdc or prices_ahead")
        return self

    def offer(self) -> EndpointOffer:
        """Return it as the rules know it."""
        prices = [
            DatedPrice(stroops(each.price_per_call_usdc), each.effective_from, _card(each.rate_card))
            for each in self.prices_ahead
        ]
        prices.sort(key=_date)
        if self.price_per_call_usdc is not None:
            prices.insert(0, DatedPrice(stroops(self.price_per_call_usdc), None, _card(self.rate_card)))
        return EndpointOffer(
            self.method, self.path, tuple(prices), self.description, self.billable_statuses, self.required_scope
        )


def _card(form: RateCardIn | None) -> RateCard | None:
    return None if form is None else form.card()


def _date(price: DatedPrice) -> datetime:
    assert price.effective_from is not None
    return price.effective_from


class ExportedApi(Form):
    """An API without its secrets: the values of `upstream_headers` are to be given anew."""

    format: Literal["callora.api/1"]
    name: Name
    slug: Slug | None = Field(default=None, description="A wish: where it is taken, a number is added.")
    description: ApiProse | None = None
    base_url: BaseUrl
    category: Label | None = None
    tags: Tags = Field(default=[])
    logo_url: WebUrl | None = None
    upstream_headers: UpstreamHeaders = Field(default={}, description="Never in an export.")
    status: Literal["draft", "active"] = "active"
    endpoints: list[ExportedEndpoint] = Field(min_length=1, max_length=ENDPOINTS_MAX)


class ExportedPriceOut(Form):
    """A price from a date on."""

    price_per_call_usdc: UsdcOut
    rate_card: RateCardOut | None
    effective_from: str = Field(json_schema_extra={"format": "date-time"})


class ExportedEndpointOut(Form):
    """An endpoint, with its prices now and ahead."""

    method: Method
    path: str
    price_per_call_usdc: UsdcOut | None
    rate_card: RateCardOut | None
    prices_ahead: list[ExportedPriceOut]
    description: str | None
    billable_statuses: str
    required_scope: str | None


class ExportOut(Form):
    """An API as `POST /api/apis/import` takes it, without its secrets."""

    format: Literal["callora.api/1"] = _FORMAT
    name: str
    slug: str
    description: str | None
    base_url: str
    category: str | None
    tags: list[str]
    logo_url: str | None
    status: Literal["draft", "active"]
    endpoints: list[ExportedEndpointOut]


def _too_far(body: ExportedApi, now: datetime) -> list[Wrong]:
    """Return which prices are dated too far ahead; a date that has passed since the export is fine."""
    last = now + timedelta(days=DAYS_AHEAD_MAX)
    message = f"must be {DAYS_AHEAD_MAX} days ahead at most"
    return [
        Wrong(("endpoints", number, "prices_ahead", place, "effective_from"), message, "TOO_LARGE")
        for number, endpoint in enumerate(body.endpoints)
        for place, price in enumerate(endpoint.prices_ahead)
        if price.effective_from > last
    ]


def _exported(row: Row, endpoints: list[Row], ahead: dict[int, list[Row]]) -> ExportOut:
    return ExportOut(
        name=row["name"],
        slug=row["slug"],
        description=row["description"],
        base_url=row["base_url"],
        category=row["category"],
        tags=list(row["tags"]),
        logo_url=row["logo_url"],
        status="active" if row["status"] == "active" else "draft",
        endpoints=[
            ExportedEndpointOut(
                method=each["method"],
                path=each["path"],
                price_per_call_usdc=None if each["amount"] is None else usdc(each["amount"]),
                rate_card=rate_card_out(each),
                prices_ahead=[
                    ExportedPriceOut(
                        price_per_call_usdc=usdc(price["amount"]),
                        rate_card=rate_card_out(price),
                        effective_from=iso(price["effective_from"]),
                    )
                    for price in ahead.get(each["endpoint_id"], [])[:_PRICES_AHEAD_MAX]
                ],
                description=each["description"],
                billable_statuses=each["billable_statuses"],
                required_scope=each["required_scope"],
            )
            for each in endpoints
        ],
    )


# --- routes -----------------------------------------------------------------------------------------------------------


def import_routes(shop: Shop) -> Routes:
    """Return the ways of a whole API in and out."""
    routes = Routes("Import and export")
    database, clock = shop.database, shop.clock

    async def registered(user_id: UserId, offer: ApiOffer) -> Answer:
        done = settle(await shop.publisher.register(user_id, offer))
        now = clock.now()
        row = await reads.find_api(database, ApiRef.parse(str(done.api_id)), user_id, now)
        if row is None:  # an operator was faster
            raise no_such_api()
        endpoints = await reads.endpoints_of(database, [done.api_id], now, ENDPOINTS_MAX)
        return Answer(own_api(row, endpoints[done.api_id]), 201)

    @routes.add(
        "POST",
        "/api/apis/import/openapi",
        access=Access.USER,
        body=OpenApiIn,
        answers={200: ImportPreview, 201: OwnApi},
        problems=WRITES,
        body_bytes_max=BODY_BYTES_MAX,
    )
    async def import_openapi(ask: Ask[Any, Any, OpenApiIn]) -> Answer:
        """Register an API from an OpenAPI document: each operation is an endpoint at the price you name.

        An operation without a price is an error unless there is a default price, and so is a price that names nothing.
        With `dry_run` nothing is stored, and what would keep it from being stored is told with what would come of it.
        """
        body = ask.body
        found = read_openapi(body.document, body.prices.price_list(), body.exclude)
        wrong = _wrong_import(body, found)
        base_url = body.base_url
        if base_url is None and found.base_url is not None:
            try:
                base_url = BaseUrlForm(base_url=found.base_url).base_url
            except ValueError:
                wrong.append(
                    Wrong(("document", "servers", 0, "url"), "must be a base URL: give base_url", "INVALID_FORMAT")
                )
        if base_url is not None:
            wrong += await wrong_target(shop.resolver, base_url)
        name = body.name or found.name
        if body.dry_run:
            return Answer(_preview(name, base_url, found, wrong))
        refuse(wrong)
        assert name is not None
        assert base_url is not None
        offer = ApiOffer(
            name=name,
            slug=body.slug,
            base_url=base_url,
            description=body.description or found.description,
            category=body.category,
            tags=tuple(body.tags),
            logo_url=body.logo_url,
            upstream_headers=body.upstream_headers,
            status=body.status,
            endpoints=found.endpoints,
        )
        return await registered(UserId(ask.user_id), offer)

    @routes.add(
        "POST",
        "/api/apis/import",
        access=Access.USER,
        body=ExportedApi,
        answers={201: OwnApi},
        problems=WRITES,
        body_bytes_max=BODY_BYTES_MAX,
    )
    async def import_api(ask: Ask[Any, Any, ExportedApi]) -> Answer:
        """Register an API from an export; a slug that is taken gets a number. Dates that have passed are at once."""
        body = ask.body
        endpoints = tuple(endpoint.offer() for endpoint in body.endpoints)
        far = _too_far(body, clock.now())
        refuse([*await wrong_target(shop.resolver, body.base_url), *check_endpoints(endpoints), *far])
        offer = ApiOffer(
            name=body.name,
            slug=body.slug,
            slug_is_wish=True,
            base_url=body.base_url,
            description=body.description,
            category=body.category,
            tags=tuple(body.tags),
            logo_url=body.logo_url,
            upstream_headers=body.upstream_headers,
            status=body.status,
            endpoints=endpoints,
        )
        return await registered(UserId(ask.user_id), offer)

    @routes.add(
        "GET",
        "/api/apis/{apiId}/export",
        access=Access.USER,
        path_form=ApiPath,
        answers={200: ExportOut},
        problems=("NOT_FOUND",),
    )
    async def export_api(ask: Ask[ApiPath, Any, Any]) -> Answer:
        """One of your APIs as JSON that `POST /api/apis/import` takes, without the secrets of its upstream headers.

        An API that is paused or archived comes back as a draft.
        """
        now = clock.now()
        row = await reads.find_api(database, ApiRef.parse(ask.path.apiId), UserId(ask.user_id), now)
        if row is None:
            raise no_such_api()
        api_id = ApiId(row["api_id"])
        endpoints = await reads.endpoints_of(database, [api_id], now, ENDPOINTS_MAX)
        return Answer(_exported(row, endpoints[api_id], await reads.prices_ahead(database, api_id, now)))

    return routes


class BaseUrlForm(Form):
    """A base URL that a document names."""

    base_url: BaseUrl


def _preview(name: str | None, base_url: str | None, found: Imported, wrong: list[Wrong]) -> ImportPreview:
    return ImportPreview(
        name=name,
        base_url=base_url,
        endpoints=[
            ImportedEndpoint(
                method=each.method,  # type: ignore[arg-type]
                path=each.path,
                price_per_call_usdc=usdc(each.prices[0].amount),
                description=each.description,
            )
            for each in found.endpoints[:ENDPOINTS_MAX]
        ],
        errors=[
            WrongPlace(field=field_path("body", each.place), message=each.message, code=each.code)
            for each in wrong[:DETAILS_MAX]
        ],
    )
