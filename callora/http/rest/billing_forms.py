"""The forms of charges, refunds and grants."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema

from callora.actors.billing import Order
from callora.http.rest.forms import (
    INT64_MAX,
    ApiNumber,
    Form,
    InstantOut,
    PageMeta,
    PositiveUsdc,
    UsdcOut,
    Uuid,
    stroops,
)
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId

BULK_ITEMS_MAX: Final = 100

Network = Literal["testnet", "mainnet"]
RequestId = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._:-]{1,255}$", description="Your name for this charge; it is made once.")
]
_NUMBER: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": INT64_MAX},
            {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
        ]
    }
)
Number = Annotated[ApiNumber, _NUMBER]
"""The number of an API or an endpoint, in a body: also as text, as other systems send it."""
Reason = Annotated[str, Field(min_length=1, max_length=1000, description="Why; kept in the audit.")]


class DeductItem(Form):
    """A charge to the caller's own vault."""

    requestId: RequestId
    apiId: Number
    endpointId: Number
    apiKeyId: Uuid | None = Field(default=None, description="A key of yours that the charge is counted under.")
    amountUsdc: PositiveUsdc
    network: Network | None = Field(default=None, description="Which of your vaults pays: the key's, or your only one.")

    def order(self) -> Order:
        """Return what is asked for."""
        return Order(
            request_id=self.requestId,
            api_id=ApiId(self.apiId),
            endpoint_id=EndpointId(self.endpointId),
            api_key_id=None if self.apiKeyId is None else ApiKeyId(self.apiKeyId),
            amount=stroops(self.amountUsdc),
            network=self.network,
        )


class DeductBody(DeductItem):
    """One charge, and perhaps the key of its intent."""

    idempotencyKey: str | None = Field(default=None, min_length=1, max_length=255, description="Instead of the header.")


class BulkBody(Form):
    """Several charges, each on its own."""

    items: list[DeductItem] = Field(min_length=1, max_length=BULK_ITEMS_MAX)


class DeductAnswer(Form):
    """The charge was made."""

    success: Literal[True] = True
    usageEventId: Uuid
    stellarTxHash: str | None = Field(description="Null until the charge is settled on chain.")
    alreadyProcessed: bool = Field(description="Whether an earlier request had made it.")
    amountUsdc: UsdcOut
    balance_usdc: UsdcOut


class ItemProblem(Form):
    """Why an item was not charged; the same words as a problem document."""

    code: str
    message: str
    details: Any = None


class BulkResult(Form):
    """What became of one item."""

    requestId: str
    success: bool
    usageEventId: Uuid | None = None
    stellarTxHash: str | None = None
    alreadyProcessed: bool = False
    error: ItemProblem | None = None


class BulkAnswer(Form):
    """What became of each item, in their order."""

    results: list[BulkResult]


class RequestPath(Form):
    """Which request."""

    requestId: RequestId


class BilledRequest(Form):
    """A charge that was asked for, and what became of it."""

    requestId: str
    success: bool = Field(description="Whether it is charged.")
    status: Literal["pending", "held", "captured", "released", "expired"] = Field(
        description="What its usage event says; pending while there is none. Only captured is charged."
    )
    usageEventId: Uuid | None
    stellarTxHash: str | None
    alreadyProcessed: bool = Field(description="Whether sending it again would charge nothing: the same as success.")
    apiId: int
    endpointId: int
    apiKeyId: Uuid | None
    amountUsdc: UsdcOut
    network: Network
    created_at: InstantOut


class BilledList(Form):
    """The caller's charges over REST, the latest first."""

    data: list[BilledRequest]
    meta: PageMeta


class CreditsQuery(Form):
    """Whose credits are always the caller's."""

    network: Network | None = Field(default=None, description="By default that of your only vault, else mainnet.")


class Credits(Form):
    """What the caller has to spend, and how much of all he ever had was given to him."""

    user_id: Uuid
    network: Network
    balance_usdc: UsdcOut
    granted_usdc: UsdcOut
    created_at: InstantOut
    updated_at: InstantOut


class RefundBody(Form):
    """Which charge to give back, and how much of it."""

    usageEventId: Uuid
    amountUsdc: PositiveUsdc | None = Field(default=None, description="All that is left of it, when left out.")
    reason: Reason


class RefundAnswer(Form):
    """The refund is booked."""

    success: Literal[True] = True
    usageEventId: Uuid
    amountUsdc: UsdcOut
    balance_usdc: UsdcOut
    alreadyProcessed: bool


class GrantBody(Form):
    """Whom to credit, and how much."""

    userId: Uuid
    network: Network
    amountUsdc: PositiveUsdc
    reason: Reason


class GrantAnswer(Form):
    """Exactly this amount was credited."""

    success: Literal[True] = True
    userId: Uuid
    network: Network
    amountUsdc: UsdcOut
    balance_usdc: UsdcOut
    alreadyProcessed: bool
