"""APIs: the marketplace that everyone reads, and what a developer does to his own."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import attrs
from pydantic import AfterValidator, Field, model_validator

from callora.actors.publisher import Done, NoSuchApi, NotAllowed, OfferRefused, Outcome, Publisher
from callora.http.problems import ProblemRaised
from callora.http.rest.api_forms import (
    ApiChange,
    ApiIn,
    ApiPath,
    EndpointChange,
    EndpointPlace,
    EndpointsIn,
    refuse,
    wrong_date,
    wrong_dates,
    wrong_target,
)
from callora.http.rest.api_views import (
    LISTED_ENDPOINTS_MAX,
    EndpointOut,
    EndpointsOut,
    OwnApi,
    OwnApis,
    PriceVersion,
    PriceVersions,
    PublicApi,
    PublicApis,
    Row,
    endpoint_out,
    own_api,
    public_api,
    rate_card_out,
)
from callora.http.rest.forms import (
    Page,
    PageMeta,
    PageQuery,
    Usdc,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    stroops,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.clock import Clock
from callora.ledger.ids import ApiId, EndpointId, UserId
from callora.ledger.offers import ENDPOINTS_MAX, ApiRef, Move, Status, Wrong, check_endpoints
from callora.outbound.addresses import Resolver
from callora.store.reads import apis as reads

WRITES = ("OUTCOME_UNKNOWN", "CONFLICT")
CHANGES = ("NOT_FOUND", *WRITES)
_CATEGORIES_MAX = 20
_VERSION_MAX = 2**31 - 1


def _categories(text: str) -> str:
    names = [each.strip() for each in text.split(",")]
    if not all(0 < len(each) <= 60 for each in names) or len(names) > _CATEGORIES_MAX:
        raise ValueError(f"must be 1 to {_CATEGORIES_MAX} categories with a comma between them")
    return text


class Search(PageQuery):
    """What the marketplace is asked for."""

    search: str | None = Field(
        default=None, min_length=1, max_length=100, description="In name, description, tags and the developer's name."
    )
    category: Annotated[str, AfterValidator(_categories)] | None = Field(
        default=None, min_length=1, max_length=1300, description="One of these, with a comma between them."
    )
    min_price: Usdc | None = Field(default=None, description="Of the cheapest endpoint.")
    max_price: Usdc | None = None
    status: Status | None = Field(default=None, description="Only what is active is offered to everyone.")
    sort: reads.Sort = Field(default="relevance", description="relevance without a search is newest.")

    @model_validator(mode="after")
    def _a_range(self) -> "Search":
        both = self.min_price is not None and self.max_price is not None
        if both and stroops(self.min_price or "0") > stroops(self.max_price or "0"):
            raise ValueError("min_price must be at most max_price")
        return self


class OwnQuery(PageQuery):
    """Which of one's own APIs."""

    status: Status | None = None


class _Marketplace:
    """Reads APIs and makes what is shown of them."""

    def __init__(self, database: reads.Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def search(self, query: Search) -> PublicApis:
        sort: reads.Sort = query.sort
        if sort == "relevance" and query.search is None:
            sort = "newest"
        after = None
        decoded = decode_cursor(query.cursor, str, int, int)
        if decoded is not None:
            if decoded[0] != sort:
                raise _bad_cursor()
            after = (decoded[1], decoded[2])
        if query.status not in (None, "active"):
            return PublicApis(data=[], meta=PageMeta(limit=query.limit, nextCursor=None, hasMore=False))
        filters = reads.Filters(
            search=query.search,
            categories=None if query.category is None else [each.strip() for each in query.category.split(",")],
            price_min=None if query.min_price is None else stroops(query.min_price),
            price_max=None if query.max_price is None else stroops(query.max_price),
        )
        now = self._clock.now()
        try:
            rows = await reads.list_public(self._database, filters, sort, after, query.limit + 1, now)
        except ValueError:
            raise _bad_cursor() from None
        shown, more = rows[: query.limit], len(rows) > query.limit
        cursor = None
        if more:
            key = shown[-1]["sort_key"]
            cursor = encode_cursor(sort, reads.micros(key) if sort == "newest" else key, shown[-1]["api_id"])
        endpoints = await self._listed(shown, now)
        return PublicApis(
            data=[public_api(row, endpoints[row["api_id"]]) for row in shown],
            meta=PageMeta(limit=query.limit, nextCursor=cursor, hasMore=more),
        )

    async def own(self, owner: UserId, query: OwnQuery) -> OwnApis:
        now = self._clock.now()
        rows = await reads.list_own(self._database, owner, query.status, after_of(query.cursor), query.limit + 1, now)
        page = page_of(rows, query.limit)
        endpoints = await self._listed(page.rows, now)
        return OwnApis(data=[own_api(row, endpoints[row["api_id"]]) for row in page.rows], meta=page.meta)

    async def one(self, ref: ApiRef, owner: UserId | None) -> tuple[Row, Sequence[Row]]:
        now = self._clock.now()
        row = await reads.find_api(self._database, ref, owner, now)
        if row is None:
            raise no_such_api()
        api_id = row["api_id"]
        return row, (await reads.endpoints_of(self._database, [api_id], now, ENDPOINTS_MAX))[api_id]

    async def endpoints(self, api_id: ApiId, endpoint_ids: Sequence[EndpointId]) -> list[EndpointOut]:
        found = await reads.endpoints_of(self._database, [api_id], self._clock.now(), ENDPOINTS_MAX, endpoint_ids)
        shown = {row["endpoint_id"]: endpoint_out(row) for row in found[api_id]}
        return [shown[each] for each in endpoint_ids if each in shown]

    async def _listed(self, rows: Sequence[Row], now: datetime) -> dict[int, list[Row]]:
        return await reads.endpoints_of(self._database, [row["api_id"] for row in rows], now, LISTED_ENDPOINTS_MAX)


def _bad_cursor() -> ProblemRaised:
    return invalid("query.cursor", "must be meta.nextCursor of an earlier page of the same sort", "INVALID_VALUE")


def no_such_api() -> ProblemRaised:
    """Return the one answer for an API that is not there, not offered, or another's."""
    return ProblemRaised("NOT_FOUND", "No such API")


def after_of(cursor: str | None) -> tuple[datetime, int] | None:
    """Return where a page of the newest APIs begins.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.cursor`.
    """
    decoded = decode_cursor(cursor, int, int)
    try:
        return None if decoded is None else (reads.moment_of(decoded[0]), decoded[1])
    except ValueError:
        raise _bad_cursor() from None


def page_of(rows: Sequence[Row], limit: int) -> Page:
    """Return a page of the newest APIs."""
    dated = [{**row, "created_micros": reads.micros(row["created_at"])} for row in rows]
    return Page.of(dated, limit, "created_micros", "api_id")


def settle(outcome: Outcome) -> Done:
    """Return what was done.

    Raises:
        ProblemRaised: NOT_FOUND, CONFLICT or VALIDATION_ERROR for what was not.
    """
    match outcome:
        case NoSuchApi():
            raise no_such_api()
        case NotAllowed(message, details):
            raise ProblemRaised("CONFLICT", message, details=details)
        case OfferRefused(wrong):
            refuse(wrong)
            raise AssertionError("refused for nothing")
        case Done():
            return outcome


@attrs.frozen
class Shop:
    """What the routes of APIs work with."""

    publisher: Publisher
    database: reads.Database
    resolver: Resolver
    clock: Clock


def marketplace_routes(shop: Shop) -> Routes:
    """Return what everyone reads."""
    routes = Routes("Marketplace")
    marketplace = _Marketplace(shop.database, shop.clock)

    @routes.add("GET", "/api/apis", access=Access.PUBLIC, query=Search, answers={200: PublicApis}, etag=True)
    async def list_apis(ask: Ask[Any, Search, Any]) -> Answer:
        """The APIs that are offered: searched, filtered and sorted.

        A search is found in name, description, tags and the developer's name. Prices are those of the cheapest
        endpoint; popularity is the calls of the last 30 days, counted every few minutes.
        """
        return Answer(await marketplace.search(ask.query))

    @routes.add(
        "GET",
        "/api/apis/{apiId}",
        access=Access.PUBLIC,
        path_form=ApiPath,
        answers={200: PublicApi},
        problems=("NOT_FOUND",),
        etag=True,
    )
    async def get_api(ask: Ask[ApiPath, Any, Any]) -> Answer:
        """One API that is offered, with all its endpoints."""
        return Answer(public_api(*await marketplace.one(ApiRef.parse(ask.path.apiId), None)))

    return routes


def own_api_routes(shop: Shop) -> Routes:
    """Return what a developer does to his own APIs."""
    routes = Routes("APIs")
    marketplace = _Marketplace(shop.database, shop.clock)
    publisher, clock = shop.publisher, shop.clock

    async def shown(user_id: str, ref: ApiRef, status: int = 200) -> Answer:
        return Answer(own_api(*await marketplace.one(ref, UserId(user_id))), status)

    @routes.add(
        "POST",
        "/api/apis",
        access=Access.USER,
        body=ApiIn,
        answers={201: OwnApi},
        problems=WRITES,
        aliases=("/api/developers/apis",),
    )
    async def register_api(ask: Ask[Any, Any, ApiIn]) -> Answer:
        """Register an API with its endpoints and prices: all of it or nothing.

        The base URL goes through the check that calls go through: a private address is refused here already.
        """
        offer = ask.body.offer()
        wrong = [*check_endpoints(offer.endpoints), *wrong_dates(offer.endpoints, clock.now())]
        refuse([*await wrong_target(shop.resolver, offer.base_url), *wrong])
        done = settle(await publisher.register(UserId(ask.user_id), offer))
        return await shown(ask.user_id, ApiRef.parse(str(done.api_id)), 201)

    @routes.add("GET", "/api/developers/apis", access=Access.USER, query=OwnQuery, answers={200: OwnApis})
    async def list_own_apis(ask: Ask[Any, OwnQuery, Any]) -> Answer:
        """Your APIs, of every status, newest first."""
        return Answer(await marketplace.own(UserId(ask.user_id), ask.query))

    @routes.add(
        "GET",
        "/api/developers/apis/{apiId}",
        access=Access.USER,
        path_form=ApiPath,
        answers={200: OwnApi},
        problems=("NOT_FOUND",),
    )
    async def get_own_api(ask: Ask[ApiPath, Any, Any]) -> Answer:
        """One of your APIs, offered or not."""
        return await shown(ask.user_id, ApiRef.parse(ask.path.apiId))

    @routes.add(
        "PATCH",
        "/api/apis/{apiId}",
        access=Access.USER,
        path_form=ApiPath,
        body=ApiChange,
        answers={200: OwnApi},
        problems=CHANGES,
    )
    async def change_api(ask: Ask[ApiPath, Any, ApiChange]) -> Answer:
        """Change one of your APIs; null clears what may be empty. The slug stays: callers have it in their code."""
        changes = {name: getattr(ask.body, name) for name in ask.body.model_fields_set}
        ref = ApiRef.parse(ask.path.apiId)
        if "base_url" in changes:
            # Whose it is comes first: a stranger is told nothing about names that he has us look up
            await marketplace.one(ref, UserId(ask.user_id))
            refuse(await wrong_target(shop.resolver, changes["base_url"]))
        settle(await publisher.change(UserId(ask.user_id), ref, changes))
        return await shown(ask.user_id, ref)

    def movement(move: Move, summary: str) -> None:
        async def handler(ask: Ask[ApiPath, Any, Any]) -> Answer:
            ref = ApiRef.parse(ask.path.apiId)
            settle(await publisher.move(UserId(ask.user_id), ref, move))
            return await shown(ask.user_id, ref)

        handler.__name__ = f"{move}_api"
        handler.__doc__ = summary
        routes.add(
            "POST",
            f"/api/apis/{{apiId}}/{move}",
            access=Access.USER,
            path_form=ApiPath,
            answers={200: OwnApi},
            problems=CHANGES,
        )(handler)

    movement("publish", "Offer a draft to everyone.")
    movement("pause", "Take an API off the marketplace for a time; calls of it are answered 404 at once.")
    movement("resume", "Offer a paused API again.")
    movement("archive", "Take an API off the marketplace for ever; its rows stay.")
    return routes


def endpoint_routes(shop: Shop) -> Routes:
    """Return what a developer does to the endpoints of his APIs, and to their prices."""
    routes = Routes("Endpoints")
    marketplace = _Marketplace(shop.database, shop.clock)
    publisher, database, clock = shop.publisher, shop.database, shop.clock

    @routes.add(
        "POST",
        "/api/apis/{apiId}/endpoints/bulk",
        access=Access.USER,
        path_form=ApiPath,
        body=EndpointsIn,
        answers={201: EndpointsOut},
        problems=CHANGES,
    )
    async def put_endpoints(ask: Ask[ApiPath, Any, EndpointsIn]) -> Answer:
        """Add endpoints, and change those of the same method and path: all of it or nothing.

        A changed price is a new version; what an endpoint costs already needs none. A price may be dated ahead. What
        is left out of an endpoint that is there stays as it is.
        """
        offers = [endpoint.offer() for endpoint in ask.body.endpoints]
        refuse([*check_endpoints(offers), *wrong_dates(offers, clock.now())])
        done = settle(await publisher.put_endpoints(UserId(ask.user_id), ApiRef.parse(ask.path.apiId), offers))
        shown = await marketplace.endpoints(done.api_id, done.endpoint_ids)
        return Answer(EndpointsOut(data=shown, created=done.added_count), 201)

    @routes.add(
        "PATCH",
        "/api/apis/{apiId}/endpoints/{endpointId}",
        access=Access.USER,
        path_form=EndpointPlace,
        body=EndpointChange,
        answers={200: EndpointOut},
        problems=CHANGES,
    )
    async def change_endpoint(ask: Ask[EndpointPlace, Any, EndpointChange]) -> Answer:
        """Change an endpoint; a price is a new version, at once or from a date ahead."""
        price = ask.body.price()
        message = wrong_date(price.effective_from, clock.now()) if price is not None else None
        refuse([] if message is None else [Wrong(("effective_from",), message, "INVALID_VALUE")])
        endpoint_id = EndpointId(ask.path.endpointId)
        done = settle(
            await publisher.change_endpoint(
                UserId(ask.user_id), ApiRef.parse(ask.path.apiId), endpoint_id, ask.body.changes(), price
            )
        )
        shown = await marketplace.endpoints(done.api_id, done.endpoint_ids)
        if not shown:  # retired just now by someone else
            raise no_such_api()
        return Answer(shown[0])

    @routes.add(
        "DELETE",
        "/api/apis/{apiId}/endpoints/{endpointId}",
        access=Access.USER,
        path_form=EndpointPlace,
        answers={204: None},
        problems=CHANGES,
    )
    async def retire_endpoint(ask: Ask[EndpointPlace, Any, Any]) -> Answer:
        """Offer an endpoint no more; calls of it are answered 404 at once."""
        ref, endpoint_id = ApiRef.parse(ask.path.apiId), EndpointId(ask.path.endpointId)
        settle(await publisher.retire_endpoint(UserId(ask.user_id), ref, endpoint_id))
        return Answer(status=204)

    @routes.add(
        "GET",
        "/api/apis/{apiId}/endpoints/{endpointId}/prices",
        access=Access.USER,
        path_form=EndpointPlace,
        query=PageQuery,
        answers={200: PriceVersions},
        problems=("NOT_FOUND",),
    )
    async def list_prices(ask: Ask[EndpointPlace, PageQuery, Any]) -> Answer:
        """Every version of an endpoint's price, the latest first."""
        endpoint_id = EndpointId(ask.path.endpointId)
        after = decode_cursor(ask.query.cursor, int)
        before = _VERSION_MAX if after is None else max(0, min(after[0], _VERSION_MAX))
        if not await reads.owns_endpoint(database, ApiRef.parse(ask.path.apiId), endpoint_id, UserId(ask.user_id)):
            raise no_such_api()
        rows = await reads.price_versions(database, endpoint_id, before, ask.query.limit + 1, clock.now())
        page = Page.of(rows, ask.query.limit, "version")
        versions = [
            PriceVersion(
                version=row["version"],
                price_per_call_usdc=usdc(row["amount"]),
                rate_card=rate_card_out(row),
                effective_from=iso(row["effective_from"]),
                in_effect=bool(row["in_effect"]),
            )
            for row in page.rows
        ]
        return Answer(PriceVersions(data=versions, meta=page.meta))

    return routes
