"""The forms of holds that services place, and what is shown of them."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.holds import CaptureOrder, HoldOrder
from callora.http.rest.billing_forms import Network, Number, Reason, RequestId
from callora.http.rest.forms import Form, InstantOut, PositiveUsdc, UsdcOut, Uuid, iso, stroops, usdc
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId
from callora.store.reads.holds import FoundHold

SECONDS_MAX: Final = 86_400
"""No hold lasts longer than a day from when it was placed."""

TransactionId = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9._:-]{1,128}$", description="Your name for what is paid for; it is charged once a vault."
    ),
]
Seconds = Annotated[int, Field(ge=1, le=SECONDS_MAX)]


class HoldBody(Form):
    """What is to be held."""

    requestId: RequestId
    apiKeyId: Uuid = Field(description="Whose vault pays, and whose spending limits count.")
    apiId: Number
    endpointId: Number
    amountUsdc: PositiveUsdc
    ttlSeconds: Seconds | None = Field(default=None, description="After it the hold is given back: HOLD_TTL_SECONDS.")

    def order(self) -> HoldOrder:
        """Return what is asked for."""
        return HoldOrder(
            request_id=self.requestId,
            api_key_id=ApiKeyId(self.apiKeyId),
            api_id=ApiId(self.apiId),
            endpoint_id=EndpointId(self.endpointId),
            amount=stroops(self.amountUsdc),
            ttl_seconds=self.ttlSeconds,
        )


class CaptureBody(Form):
    """What a hold is captured for."""

    transactionId: TransactionId
    amountUsdc: PositiveUsdc | None = Field(default=None, description="All that is held, when left out.")
    mode: Literal["exact", "partial"] = Field(
        default="exact",
        description="exact: the amount must be what is held. partial: of less the rest is given back; of more the rest "
        "is held first, and where that is refused, what is held is captured and the rest is the shortfall.",
    )

    def order(self) -> CaptureOrder:
        """Return what is asked for."""
        amount = None if self.amountUsdc is None else stroops(self.amountUsdc)
        return CaptureOrder(self.transactionId, amount, self.mode == "exact")


class ExtendBody(Form):
    """By how much a hold is extended."""

    seconds: Seconds = Field(description="Added to its expiry, which stays within a day of when it was placed.")
    extraAmountUsdc: PositiveUsdc | None = Field(default=None, description="Held besides, if the limits allow it.")


class HoldReleaseBody(Form):
    """Which hold is released, by its own name."""

    requestId: RequestId
    apiKeyId: Uuid = Field(description="A key of the vault that pays, or would have.")


class TransactionRefundBody(Form):
    """How much of a transaction is given back."""

    amountUsdc: PositiveUsdc | None = Field(default=None, description="All that is left of it, when left out.")
    reason: Reason
    apiKeyId: Uuid | None = Field(
        default=None, description="A key of the vault that paid; needed where several paid for transactions so named."
    )


class HoldPath(Form):
    """Which hold."""

    holdId: Uuid


class TransactionPath(Form):
    """Which transaction."""

    transactionId: TransactionId


class HoldOut(Form):
    """A hold and what became of it."""

    holdId: Uuid
    requestId: str
    status: Literal["pending", "held", "captured", "released", "expired"] = Field(
        description="pending: asked for and not placed. Only captured is charged."
    )
    apiKeyId: Uuid
    apiId: int | None
    endpointId: int | None
    network: Network
    usageEventId: Uuid | None = Field(description="What the charge is in usage and statements.")
    amountUsdc: UsdcOut | None = Field(description="What is or was held; null where it was released before it came.")
    capturedUsdc: UsdcOut
    refundedUsdc: UsdcOut
    shortfallUsdc: UsdcOut = Field(description="What was to be captured besides and could not be held.")
    transactionId: str | None = Field(description="What it is captured for.")
    createdAt: InstantOut
    expiresAt: InstantOut | None
    closedAt: InstantOut | None


class HoldPlacedOut(HoldOut):
    """A hold that stands as was asked."""

    alreadyProcessed: bool = Field(description="Whether an earlier request had done it.")
    balance_usdc: UsdcOut = Field(description="What the vault has left to spend.")


class HoldCapturedOut(HoldPlacedOut):
    """A transaction that is charged."""

    chargedHoldId: Uuid = Field(description="The hold it is charged to; another's where that was captured before.")
    chargedUsdc: UsdcOut


class TransactionRefundOut(Form):
    """The refund is booked."""

    transactionId: str
    holdId: Uuid
    usageEventId: Uuid
    amountUsdc: UsdcOut = Field(description="What this request gave back.")
    refundedUsdc: UsdcOut = Field(description="What was given back of the transaction in all.")
    alreadyProcessed: bool
    balance_usdc: UsdcOut


def shown(found: FoundHold) -> dict[str, Any]:
    """Return the fields of a hold as they are shown."""
    hold, placing = found.hold, found.hold.placing
    status = found.state or ("pending" if hold.released_at is None else "released")
    shortfall = (hold.asked_amount or 0) - found.amount if found.state == "captured" else 0
    amount = found.held_amount if found.state is not None else hold.event_amount
    return {
        "holdId": hold.hold_id,
        "requestId": hold.request_id,
        "status": status,
        "apiKeyId": hold.api_key_id,
        "apiId": None if placing is None else placing.api_id,
        "endpointId": None if placing is None else placing.endpoint_id,
        "network": found.network,
        "usageEventId": None if found.state is None else hold.event_id,
        "amountUsdc": None if placing is None else usdc(amount),
        "capturedUsdc": usdc(found.amount),
        "refundedUsdc": usdc(found.refunded),
        "shortfallUsdc": usdc(shortfall),
        "transactionId": hold.transaction_id if found.state == "captured" else None,
        "createdAt": iso(found.placed_at or hold.created_at),
        "expiresAt": None if found.expires_at is None else iso(found.expires_at),
        "closedAt": None if found.closed_at is None else iso(found.closed_at),
    }
