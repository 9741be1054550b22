"""Charges asked for over REST, refunds and grants: each done once, whatever dies in between.

A deduct is bound to the id of its usage event before that event exists. What became of it is the event's to tell: a
retry looks it up and carries it on, and never charges twice or calls done what was not. A request is worked on by one
task of this process at a time, apart from who waits for it; another process at the same request is stopped by the
claim that goes with the hold.
"""

import hashlib
from functools import partial
from typing import Final, Literal

import attrs
import trio

from callora.actors.flights import Flights
from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import Delivery, Grant, IdempotencyClaim, PlaceHold, Refund, capture
from callora.ledger.faults import OutcomeUnknown
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, Ids, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    Draining,
    HoldClosed,
    HoldNotOpen,
    HoldPlaced,
    IdempotencyKeyTaken,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
    RefundRefused,
    StandingRefused,
    VaultMissing,
)
from callora.store import accounts
from callora.store.billing import BillingRequest, bind_anew, bind_request
from callora.store.bridge import Database
from callora.store.feed import note_late
from callora.store.reads import billing as reads

HOLD_SECONDS: Final = 60
"""A deduct is captured as soon as it is held; who dies in between leaves a hold for this long."""
CLAIM_SECONDS: Final = 3600
"""Longer than any round that was given up on may still be stored."""
TURNS_MAX: Final = 8
"""How often a request is looked at anew because another process moved it on."""
NEW_VAULT_PLAN: Final = "free"


@attrs.frozen
class Order:
    """What a deduct asks for."""

    request_id: str
    api_id: ApiId
    endpoint_id: EndpointId
    api_key_id: ApiKeyId | None
    amount: Stroops
    """stroops, > 0."""
    network: str | None
    """Which of the caller's vaults pays; None: the key's, else the only one."""

    @property
    def fingerprint(self) -> bytes:
        """What makes a repetition a repetition."""
        parts = (self.api_id, self.endpoint_id, self.api_key_id, self.amount, self.network)
        return hashlib.sha256("\n".join(str(part) for part in parts).encode()).digest()


@attrs.frozen
class Deducted:
    """The charge is durable."""

    event_id: EventId
    amount: Stroops
    already: bool
    """True when an earlier request had made it."""
    available: Stroops
    """What the vault has left to spend."""


@attrs.frozen
class Mismatch:
    """The same name stands for something else already."""


@attrs.frozen
class NotOffered:
    """No published API offers this endpoint."""


@attrs.frozen
class KeyMissing:
    """No usable key of the caller's on this network has this id."""


@attrs.frozen
class KeyNarrowed:
    """The key may not be used for this."""

    to: Literal["api", "plan", "endpoint", "scope"]


@attrs.frozen
class VaultUnclear:
    """The caller has several vaults and has not said which."""


@attrs.frozen
class ChargeMissing:
    """No captured usage event has this id."""


@attrs.frozen
class UserMissing:
    """No such user."""


@attrs.frozen
class Credited:
    """A refund or a grant is booked."""

    vault_id: VaultId
    amount: Stroops
    available: Stroops
    already: bool
    """True when it was booked under its reference before."""


Refusal = (
    Mismatch
    | NotOffered
    | KeyMissing
    | KeyNarrowed
    | VaultUnclear
    | VaultMissing
    | InsufficientFunds
    | StandingRefused
    | PolicyRefused
    | Overloaded
    | Draining
)
"""Why nothing was charged. The request may be sent again, after Mismatch under another id."""


class Billing:
    """Charges the caller's own vault, and gives back. Run it in a nursery."""

    def __init__(self, database: Database, registry: VaultRegistry, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._flights: Flights[tuple[UserId, str], Deducted | Refusal] = Flights("deduct")

    async def run(  # noqa: ASYNC128 - the flights call it
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Work on requests until cancelled; then what is under way is left to a retry."""
        await self._flights.run(task_status=task_status)

    async def deduct(self, user_id: UserId, order: Order) -> Deducted | Refusal:
        """Charge the user's own vault once for this request.

        Raises:
            StoreUnavailable: nothing was charged by this attempt.
            OutcomeUnknown: it may be charged; the same request again tells.

        Cancellation: the waiting ends; the charge is carried on.
        """
        work = partial(self._carry_on, user_id, order)
        landed = await self._flights.fly((user_id, order.request_id), order.fingerprint, work)
        if isinstance(landed, Draining):
            return landed
        if landed.joined and isinstance(landed.outcome, Deducted):
            return attrs.evolve(landed.outcome, already=True)
        return landed.outcome

    async def refund(
        self, event_id: EventId, amount: Stroops | None, ref: str, vault_id: VaultId | None = None
    ) -> Credited | ChargeMissing | RefundRefused | Mismatch | Overloaded | Draining:
        """Give back all or part of a charge, once under this reference.

        Args:
            amount: stroops, > 0; None: all that is left to give back.
            vault_id: who paid, where that is known.

        Raises:
            StoreUnavailable: nothing was given back. OutcomeUnknown: the same reference again tells.

        Cancellation: the waiting ends; the refund may still be booked.
        """
        charge = await reads.find_charge(self._database, event_id, vault_id)
        if charge is None:
            return ChargeMissing()
        available, already = charge.available, True
        booked = await reads.entry_amount(self._database, charge.vault_id, "refund", ref)
        if booked is None:
            asked = charge.refundable if amount is None else amount
            moved = await self._registry.ask(charge.vault_id, Refund(event_id, asked, ref))
            if isinstance(moved, RefundRefused | Overloaded | Draining):
                return moved
            assert isinstance(moved, BalanceMoved), moved
            available, already = moved.available, moved.repeated
            booked = await self._booked(charge.vault_id, "refund", ref) if moved.repeated else asked
        if amount is not None and booked != amount:
            return Mismatch()
        return Credited(charge.vault_id, booked, available, already)

    async def grant(
        self, user_id: UserId, network: str, amount: Stroops, ref: str
    ) -> Credited | UserMissing | Mismatch | Overloaded | Draining:
        """Credit exactly this amount to a user's vault, made where there is none, once under this reference.

        Raises:
            StoreUnavailable: nothing was credited. OutcomeUnknown: the same reference again tells.

        Cancellation: the waiting ends; the grant may still be booked.
        """
        if await reads.credits_of(self._database, user_id, network) is None:
            return UserMissing()
        vault_id = await accounts.ensure_vault(
            self._database, VaultId(self._ids.uuid7()), user_id, network, NEW_VAULT_PLAN, self._clock.now()
        )
        moved = await self._registry.ask(vault_id, Grant(amount, ref))
        if isinstance(moved, Overloaded | Draining):
            return moved
        assert isinstance(moved, BalanceMoved), moved
        if moved.repeated and await self._booked(vault_id, "grant", ref) != amount:
            return Mismatch()
        return Credited(vault_id, amount, moved.available, moved.repeated)

    async def _booked(self, vault_id: VaultId, kind: str, ref: str) -> Stroops:
        booked = await reads.entry_amount(self._database, vault_id, kind, ref)
        assert booked is not None, "entries are never deleted"
        return booked

    async def _carry_on(self, user_id: UserId, order: Order) -> Deducted | Refusal:
        """Look at how far the request has come, and take it on from there."""
        found = await reads.find_request(self._database, user_id, order.request_id)
        if found is None:
            refusal = await self._bind(user_id, order)
            if refusal is not None:
                return refusal
        for _ in range(TURNS_MAX):
            found = await reads.find_request(self._database, user_id, order.request_id)
            assert found is not None, "requests are never deleted"
            request = found.request
            if request.fingerprint != order.fingerprint:
                return Mismatch()
            outcome: Deducted | Refusal | None = None
            match found.state:
                case "captured":
                    return Deducted(request.event_id, request.amount, True, found.available)
                case "held":
                    outcome = await self._capture(request)
                case None:
                    outcome = await self._charge(request)
                case "released" | "expired":
                    await bind_anew(
                        self._database, user_id, order.request_id, request.event_id, EventId(self._ids.uuid7())
                    )
            if outcome is not None:
                return outcome
        raise OutcomeUnknown("others keep moving this request on")

    async def _bind(self, user_id: UserId, order: Order) -> Refusal | None:
        """Bind the request to an event that does not exist yet, unless it asks for what cannot be."""
        if await reads.offered(self._database, order.api_id, order.endpoint_id, order.api_key_id) is None:
            return NotOffered()
        vault_id = await self._payer(user_id, order)
        if not isinstance(vault_id, str):
            return vault_id
        request = BillingRequest(
            user_id=user_id,
            request_id=order.request_id,
            vault_id=vault_id,
            event_id=EventId(self._ids.uuid7()),
            api_key_id=order.api_key_id,
            api_id=order.api_id,
            endpoint_id=order.endpoint_id,
            amount=order.amount,
            fingerprint=order.fingerprint,
            created_at=self._clock.now(),
        )
        await bind_request(self._database, request)
        return None

    async def _payer(self, user_id: UserId, order: Order) -> VaultId | Refusal:
        """Return which of the caller's own vaults pays; another's can not be named."""
        vaults = await reads.vaults_of(self._database, user_id)
        if order.api_key_id is not None:
            key = await reads.own_key(
                self._database, user_id, order.api_key_id, order.api_id, order.endpoint_id, self._clock.now()
            )
            if key is None or (order.network is not None and vaults.get(order.network) != key.vault_id):
                return KeyMissing()
            if not key.api_allowed:
                return KeyNarrowed("api")
            if not key.plan_allowed:
                return KeyNarrowed("plan")
            return key.vault_id if key.endpoint_allowed else KeyNarrowed("endpoint")
        if order.network is None and len(vaults) > 1:
            return VaultUnclear()
        vault_id = next(iter(vaults.values()), None) if order.network is None else vaults.get(order.network)
        return vault_id if vault_id is not None else VaultMissing()

    async def _charge(self, request: BillingRequest) -> Deducted | Refusal | None:
        """Hold and capture; None where another process was first, and the request is to be looked at anew."""
        charged = await reads.offered(self._database, request.api_id, request.endpoint_id, request.api_key_id)
        if charged is None:
            return NotOffered()
        # No Idempotency-Key of the gateway holds a blank. An event that was given up on, and is stored late or by
        # another process, is placed by whoever claims its name first, and by nobody else.
        claim = IdempotencyClaim(f"event {request.event_id}", request.fingerprint, None, CLAIM_SECONDS)
        await note_late(self._database, request.vault_id, request.event_id, self._clock.now())
        placed = await self._registry.ask(
            request.vault_id, PlaceHold(request.event_id, request.amount, HOLD_SECONDS, charged, claim)
        )
        match placed:
            case HoldPlaced():
                return await self._capture(request)
            case IdempotencyKeyTaken():
                return None
            case InsufficientFunds() | StandingRefused() | PolicyRefused() | Overloaded() | Draining() | VaultMissing():
                return placed
            case _:
                raise AssertionError(f"not an outcome of a hold: {placed!r}")

    async def _capture(self, request: BillingRequest) -> Deducted | Refusal | None:
        closed = await self._registry.ask(
            request.vault_id, capture(request.event_id, request.amount, request.amount, Delivery("deducted"))
        )
        match closed:
            case HoldClosed(_, amount, available):
                return Deducted(request.event_id, amount, False, available)
            case HoldNotOpen():
                return None
            case Overloaded() | Draining():
                return closed
            case _:
                raise AssertionError(f"not an outcome of a capture: {closed!r}")
