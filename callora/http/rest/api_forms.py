"""The forms of APIs that developers send, and what is wrong with one that its form cannot know."""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    DETAILS_MAX,
    INT64_MAX,
    ApiNumber,
    Form,
    Instant,
    Usdc,
    field_path,
    stroops,
)
from callora.ledger.offers import (
    HEADERS_MAX,
    PATH_CHARS_MAX,
    PRICE_MAX,
    SLUG_PATTERN,
    SLUGS_RESERVED,
    ApiOffer,
    DatedPrice,
    EndpointOffer,
    Wrong,
    check_headers,
    check_path,
)
from callora.ledger.rating import (
    CARD_COLUMNS,
    SOURCE_CHARS_MAX,
    UNIT_CREDITS_MAX,
    UNITS_MAX,
    RateCard,
    Source,
    Unit,
    make_card,
)
from callora.outbound.addresses import Resolver, TargetBlocked, TargetUnresolved, parse_base_url

ENDPOINTS_SENT_MAX: Final = 100
DAYS_AHEAD_MAX: Final = 366
"""How far ahead a price may be dated."""
TAGS_MAX: Final = 20

# --- types ------------------------------------------------------------------------------------------------------------

_LINE: Final = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"
_LABEL: Final = r"^[^\x00-\x1f\x7f,]*[^\s\x00-\x1f\x7f,][^\x00-\x1f\x7f,]*$"
_PROSE: Final = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
_WEB_URL: Final = (
    r"^https?://[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(?::[0-9]{1,5})?(?:[/?#][!#-;=?-Z\[\]_a-z~]*)?$"
)

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=120, pattern=_LINE)]
"""A name on one line, trimmed."""
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60, pattern=_LABEL)]
"""A category, trimmed; without a comma, because a query lists several."""
Tag = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40, pattern=_LABEL)]
ShortProse = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500, pattern=_PROSE)]
EndpointProse = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000, pattern=_PROSE)]
ApiProse = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000, pattern=_PROSE)]
WebUrl = Annotated[str, StringConstraints(max_length=2048, pattern=_WEB_URL)]
"""An http or https URL of a page or a picture, percent-encoded, without a user name."""


def _slug(text: str) -> str:
    if text in SLUGS_RESERVED:
        raise ValueError(f"must not be {text}, which is reserved")
    return text


Slug = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=SLUG_PATTERN), AfterValidator(_slug)]


def _reference(text: str) -> str:
    if text.isdecimal() and int(text) > INT64_MAX:
        raise ValueError("must be the number or the slug of an API")
    return text


ApiName = Annotated[
    str,
    StringConstraints(pattern=r"^(?:[1-9][0-9]{0,18}|[a-z][a-z0-9-]{0,62})$"),
    AfterValidator(_reference),
]
"""An API in a path: its number or its slug."""


def _base_url(text: str) -> str:
    return parse_base_url(text).url


BaseUrl = Annotated[
    str,
    AfterValidator(_base_url),
    Field(min_length=1, max_length=2048, examples=["https://api.example.com/v1"], json_schema_extra={"format": "uri"}),
]


def _headers(headers: Any) -> Any:
    wrong = check_headers(headers or {})
    if wrong:
        raise ValueError("; ".join(wrong[:10]))
    return headers


_Fields = Field(max_length=HEADERS_MAX, examples=[{"X-Api-Key": "secret"}])
UpstreamHeaders = Annotated[dict[str, str], _Fields, AfterValidator(_headers)]
"""Header fields for the upstream, sent as they stand."""
HeaderChanges = Annotated[dict[str, str | None], _Fields, AfterValidator(_headers)]
"""The same, changed one by one: null takes a field away."""


def _tags(tags: list[str]) -> list[str]:
    """Return each tag once, in whatever case."""
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(tag.lower(), tag)
    return list(first.values())


Tags = Annotated[list[Tag], Field(max_length=TAGS_MAX), AfterValidator(_tags)]


def _path(text: str) -> str:
    check_path(text)
    return text


EndpointPath = Annotated[
    str, Field(min_length=1, max_length=PATH_CHARS_MAX, examples=["/reports/{city}"]), AfterValidator(_path)
]
Method = Literal["*", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


def _price(text: str) -> str:
    if stroops(text) > PRICE_MAX:
        raise ValueError("must be at most 1000000 USDC")
    return text


CallPrice = Annotated[Usdc, AfterValidator(_price)]
_BILLABLE: Final = r"^(?:[2-5]xx|[2-5][0-9]{2})(?:,(?:[2-5]xx|[2-5][0-9]{2})){0,39}$"
Billable = Annotated[str, Field(max_length=200, pattern=_BILLABLE, examples=["2xx,404"])]
"""The upstream's statuses that are charged."""
Scope = Annotated[str, Field(max_length=60, pattern=r"^[A-Za-z][A-Za-z0-9:._-]*$", examples=["reports:read"])]


# --- what is sent -----------------------------------------------------------------------------------------------------


class ApiPath(Form):
    """An API, by number or slug."""

    apiId: ApiName


class EndpointPlace(Form):
    """An endpoint of an API."""

    apiId: ApiName
    endpointId: ApiNumber


_EFFECTIVE: Final = "From when the price counts; left out or null: at once."


def _source(text: str) -> str:
    Source.parse(text)
    return text


_Units = Annotated[int, Field(ge=1, le=UNITS_MAX)]
_SOURCES: Final = (
    "Where the quantity is read: request.json:/pointer, request.header:Name, request.bytes, the same of response, "
    "stream.bytes or stream.events. An array counts its items, a number itself, a text its characters where those are "
    "charged. Null for the unit call."
)


class RateCardIn(Form):
    """What the price is the price of."""

    unit: Unit = Field(default="call", description="price_per_call_usdc is the price of one of these.")
    unit_credits: int = Field(
        default=0, ge=0, le=UNIT_CREDITS_MAX, description="What a unit costs where a plan's credits pay; 0: never."
    )
    min_units: _Units = Field(default=1, description="What a call comes to at least.")
    held_units: _Units | None = Field(
        default=None, description="Held before the quantity is known; needed where the answer tells it, and only then."
    )
    max_units: _Units | None = Field(default=None, description="What a call may come to at most.")
    quantity_from: Annotated[str, Field(max_length=SOURCE_CHARS_MAX), AfterValidator(_source)] | None = Field(
        default=None, description=_SOURCES, examples=["request.json:/urls"]
    )

    def card(self) -> RateCard | None:
        """Return it as the rules know it; the plain one is None."""
        return make_card(*(getattr(self, column) for column in CARD_COLUMNS))


_CARD: Final = (
    "What the price is the price of; a call where it is null. Left out of an endpoint that exists, it stays as it is."
)


class EndpointIn(Form):
    """An endpoint to be offered."""

    path: EndpointPath
    method: Method
    price_per_call_usdc: CallPrice = Field(description="Of one unit, where rate_card names another than a call.")
    description: EndpointProse | None = None
    billable_statuses: Billable | None = Field(default=None, description="2xx where it is left out.")
    required_scope: Scope | None = None
    effective_from: Instant | None = Field(default=None, description=_EFFECTIVE)
    rate_card: RateCardIn | None = Field(default=None, description=_CARD)

    def offer(self) -> EndpointOffer:
        """Return it as the rules know it."""
        optional = {"description", "billable_statuses", "required_scope"}
        return EndpointOffer(
            method=self.method,
            path=self.path,
            prices=(_dated(self),),
            description=self.description,
            billable_statuses=self.billable_statuses or "2xx",
            required_scope=self.required_scope,
            kept=frozenset(optional - self.model_fields_set),
        )


class ApiIn(Form):
    """An API to be registered."""

    name: Name
    slug: Slug | None = Field(default=None, description="Its name in calls; made of the name where it is left out.")
    description: ApiProse | None = None
    base_url: BaseUrl = Field(description="Where calls go; never shown to anyone else.")
    category: Label | None = None
    tags: Tags = Field(default=[])
    logo_url: WebUrl | None = None
    upstream_headers: UpstreamHeaders = Field(default={}, description="Set on every request to the upstream.")
    status: Literal["draft", "active"] = "active"
    endpoints: list[EndpointIn] = Field(min_length=1, max_length=ENDPOINTS_SENT_MAX)

    def offer(self) -> ApiOffer:
        """Return it as the rules know it."""
        return ApiOffer(
            name=self.name,
            slug=self.slug,
            base_url=self.base_url,
            description=self.description,
            category=self.category,
            tags=tuple(self.tags),
            logo_url=self.logo_url,
            upstream_headers=self.upstream_headers,
            status=self.status,
            endpoints=tuple(endpoint.offer() for endpoint in self.endpoints),
        )


def require_a_field(form: Form) -> None:
    """Return where a change names a field.

    Raises:
        ValueError: it is empty.
    """
    if not form.model_fields_set:
        raise ValueError("must name at least one field")


class ApiChange(Form):
    """What to change; null clears, what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    name: Name = Field(default_factory=str)
    description: ApiProse | None = None
    base_url: BaseUrl = Field(default_factory=str)
    category: Label | None = None
    tags: Tags | None = None
    logo_url: WebUrl | None = None
    upstream_headers: HeaderChanges | None = Field(
        default=None, description="Changes those named: a value sets, null takes away; others stay."
    )

    @model_validator(mode="after")
    def _something(self) -> "ApiChange":
        require_a_field(self)
        return self


class EndpointsIn(Form):
    """Endpoints to add, or to change where method and path are there already."""

    endpoints: list[EndpointIn] = Field(min_length=1, max_length=50)


class EndpointChange(Form):
    """What to change; null clears, what is left out stays. For another path, retire the endpoint and add one."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    price_per_call_usdc: CallPrice = Field(default_factory=str)
    effective_from: Instant | None = Field(default=None, description=_EFFECTIVE)
    description: EndpointProse | None = None
    billable_statuses: Billable | None = None
    required_scope: Scope | None = None
    rate_card: RateCardIn | None = Field(default=None, description=_CARD)

    @model_validator(mode="after")
    def _something(self) -> "EndpointChange":
        require_a_field(self)
        if "price_per_call_usdc" not in self.model_fields_set:
            if self.effective_from is not None:
                raise ValueError("must name price_per_call_usdc where it names effective_from")
            if "rate_card" in self.model_fields_set:
                raise ValueError("must name price_per_call_usdc where it names rate_card: another unit, another price")
        return self

    def changes(self) -> dict[str, str | None]:
        """Return the fields besides the price."""
        named = self.model_fields_set & {"description", "required_scope"}
        made: dict[str, str | None] = {name: getattr(self, name) for name in named}
        if "billable_statuses" in self.model_fields_set:
            made["billable_statuses"] = self.billable_statuses or "2xx"
        return made

    def price(self) -> DatedPrice | None:
        """Return the new price, None where it stays."""
        if "price_per_call_usdc" not in self.model_fields_set:
            return None
        return _dated(self)


def _dated(form: EndpointIn | EndpointChange) -> DatedPrice:
    return DatedPrice(
        stroops(form.price_per_call_usdc),
        form.effective_from,
        None if form.rate_card is None else form.rate_card.card(),
        card_kept="rate_card" not in form.model_fields_set,
    )


# --- what the forms cannot know ---------------------------------------------------------------------------------------


def refuse(wrong: Iterable[Wrong], root: str = "body") -> None:
    """Return where nothing is wrong.

    Raises:
        ProblemRaised: VALIDATION_ERROR with everything.
    """
    details = [
        {
            "field": field_path(root, each.place),
            "message": each.message[:1].upper() + each.message[1:],
            "code": each.code,
        }
        for each in wrong
    ]
    if details:
        raise ProblemRaised("VALIDATION_ERROR", details=details[:DETAILS_MAX])


async def wrong_target(resolver: Resolver, base_url: str) -> list[Wrong]:
    """Return why calls may not go to a base URL: by the same check that each of them goes through.

    Cancellation: at any time.
    """
    place = ("base_url",)
    try:
        await resolver.resolve(parse_base_url(base_url))
    except TargetBlocked:
        # Which address it is would tell a stranger about our network.
        message = "must not lead to a private, loopback, link-local or special address"
        return [Wrong(place, message, "BLOCKED_ADDRESS")]
    except TargetUnresolved:
        return [Wrong(place, "must have a host that can be resolved", "UNRESOLVABLE_HOST")]
    return []


def wrong_dates(offers: Iterable[EndpointOffer], now: datetime) -> list[Wrong]:
    """Return which prices are not dated ahead, or too far."""
    return [
        Wrong(("endpoints", number, "effective_from"), message, "INVALID_VALUE")
        for number, offer in enumerate(offers)
        for price in offer.prices
        if (message := wrong_date(price.effective_from, now)) is not None
    ]


def wrong_date(moment: datetime | None, now: datetime) -> str | None:
    """Return why a price may not be dated so, None where it may."""
    if moment is None or 0 < (moment - now).total_seconds() <= DAYS_AHEAD_MAX * 86400:
        return None
    return f"must lie ahead, by {DAYS_AHEAD_MAX} days at most; leave it out for now"
