"""Holds over REST: placed, captured, extended, released and refunded for services that charge outside the proxy.

A hold is a usage event in state held, and there is no other money. A request is bound to the id of its event before
that exists, and a hold to the transaction it is captured for before it is captured; what became of either is the
event's to tell. So whoever comes next, in any process, sees how far it went and takes it on from there.
"""

import hashlib
from collections.abc import Awaitable, Callable, Hashable
from datetime import timedelta
from functools import partial
from typing import Final, Literal

import attrs
import trio

from callora.actors.billing import (
    CLAIM_SECONDS,
    TURNS_MAX,
    Billing,
    ChargeMissing,
    Credited,
    KeyMissing,
    KeyNarrowed,
    Mismatch,
    NotOffered,
    VaultUnclear,
)
from callora.actors.flights import Flights
from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import Delivery, ExtendHold, IdempotencyClaim, PlaceHold, capture, release
from callora.ledger.faults import OutcomeUnknown
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, HoldId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    Draining,
    HoldClosed,
    HoldExtended,
    HoldNotOpen,
    HoldPlaced,
    IdempotencyKeyTaken,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
    ReferenceTaken,
    RefundRefused,
    StandingRefused,
    VaultMissing,
)
from callora.store import holds as store
from callora.store.bridge import Database
from callora.store.feed import note_late
from callora.store.holds import ExternalHold, Placing
from callora.store.reads import billing as billing_reads
from callora.store.reads import holds as reads
from callora.store.reads.holds import FoundHold

CHARGED: Final = "deducted"
"""The outcome of a hold that was captured for all that was asked."""
SHORTFALL: Final = "shortfall"
"""The outcome of one captured for less: the rest could not be held."""
RELEASED: Final = "given_up"


@attrs.frozen
class HoldOrder:
    """What a service asks to be held."""

    request_id: str
    """1 to 255 characters: the service's name for it, one a vault."""
    api_key_id: ApiKeyId
    """Whose vault pays, and whose limits count."""
    api_id: ApiId
    endpoint_id: EndpointId
    amount: Stroops
    """stroops, > 0."""
    ttl_seconds: int | None
    """1 to 86 400; None: the service's own default."""

    def placing(self, ttl_seconds_default: int) -> Placing:
        """Return it as it is stored."""
        parts = (self.api_key_id, self.api_id, self.endpoint_id, self.amount, self.ttl_seconds)
        same = hashlib.sha256("\n".join(str(part) for part in parts).encode()).digest()
        return Placing(self.api_id, self.endpoint_id, self.amount, self.ttl_seconds or ttl_seconds_default, same)


@attrs.frozen
class CaptureOrder:
    """What a hold is to be captured for."""

    transaction_id: str
    """1 to 128 characters: the service's name for what was paid for, one hold a vault."""
    amount: Stroops | None
    """stroops, > 0; None: all that is held."""
    exact: bool
    """Whether it must be all that is held; otherwise less gives the rest back, and more is held first."""


@attrs.frozen
class HoldStands:
    """The hold is as was asked."""

    found: FoundHold
    already: bool
    """True when this request changed nothing."""


@attrs.frozen
class HoldCaptured:
    """The transaction is charged, once."""

    found: FoundHold
    """The hold that was asked about."""
    charged: FoundHold
    """The hold that the transaction is charged to: this one, or another that was captured before, and then this one is
    released."""
    already: bool


@attrs.frozen
class HoldMissing:
    """No such hold."""


@attrs.frozen
class HoldAlreadyCaptured:
    """The hold is captured, for something else than was asked."""

    stored: str
    """The transaction."""


@attrs.frozen
class HoldAmountMismatch:
    """The amount is not the one that is held, or was captured."""

    stored: Stroops
    given: Stroops


@attrs.frozen
class HoldEnded:
    """The hold has ended uncharged and stays so."""

    state: Literal["released", "expired"]
    because: "Refusal | None" = None
    """Why an expired one could not be held again."""


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
    | HoldMissing
    | HoldAlreadyCaptured
    | HoldAmountMismatch
    | HoldEnded
)
"""Why nothing was done."""
Outcome = HoldStands | HoldCaptured | Refusal
Work = Callable[[], Awaitable[Outcome]]


class Holds:
    """Keeps the holds of services. Run it in a nursery."""

    def __init__(
        self,
        database: Database,
        registry: VaultRegistry,
        billing: Billing,
        clock: Clock,
        ids: Ids,
        *,
        ttl_seconds_default: int,
    ) -> None:
        """Args:
        billing: gives back.
        ttl_seconds_default: how long a hold lasts that does not say; 1 to 86 400.
        """
        self._database = database
        self._registry = registry
        self._billing = billing
        self._clock = clock
        self._ids = ids
        self._ttl_seconds_default = ttl_seconds_default
        self._flights: Flights[tuple[VaultId, str], Outcome] = Flights("hold")

    async def run(  # noqa: ASYNC128 - the flights call it
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Work on holds until cancelled; then what is under way is left to a retry."""
        await self._flights.run(task_status=task_status)

    # Each of these raises StoreUnavailable where nothing was done, and OutcomeUnknown where the same request again
    # tells. Cancellation: the waiting ends; what was begun is carried on.

    async def place(self, order: HoldOrder) -> HoldStands | Refusal:
        """Hold an amount of a key's vault, once for this request."""
        key = await reads.paying_key(self._database, order.api_key_id)
        if key is None:
            return KeyMissing()
        work = partial(self._place, key.vault_id, order)
        return _stands(await self._fly(key.vault_id, order.request_id, ("place", order), work))

    async def capture(self, hold_id: HoldId, order: CaptureOrder) -> HoldCaptured | Refusal:
        """Charge a hold for a transaction, once."""
        hold = await self._hold_named(hold_id)
        if hold is None:
            return HoldMissing()
        work = partial(self._capture, hold, order)
        made = await self._fly(hold.vault_id, hold.request_id, ("capture", order), work)
        assert not isinstance(made, HoldStands), made
        return made

    async def extend(self, hold_id: HoldId, seconds: int, amount: Stroops, ref: str) -> HoldStands | Refusal:
        """Give an open hold more time and perhaps more money, once under this reference.

        Args:
            seconds: 1 to 86 400; no hold lasts longer than a day.
            amount: stroops, >= 0.
            ref: 1 to 200 characters.
        """
        hold = await self._hold_named(hold_id)
        if hold is None:
            return HoldMissing()
        work = partial(self._extend, hold, seconds, amount, ref)
        return _stands(await self._fly(hold.vault_id, hold.request_id, ("extend", seconds, amount, ref), work))

    async def release(self, hold_id: HoldId) -> HoldStands | Refusal:
        """Give a hold back whole; nothing is placed or captured under its name from then on."""
        hold = await self._hold_named(hold_id)
        if hold is None:
            return HoldMissing()
        work = partial(self._release, hold.vault_id, hold.request_id)
        return _stands(await self._fly(hold.vault_id, hold.request_id, "release", work))

    async def release_request(self, api_key_id: ApiKeyId, request_id: str) -> HoldStands | Refusal:
        """The same by the request's own name, which need not be known: a hold that comes later is refused.

        Args:
            api_key_id: any key of the vault.
        """
        key = await reads.paying_key(self._database, api_key_id)
        if key is None:
            return KeyMissing()
        work = partial(self._release_request, key.vault_id, request_id, api_key_id)
        return _stands(await self._fly(key.vault_id, request_id, ("release request", api_key_id), work))

    async def refund(
        self, transaction_id: str, api_key_id: ApiKeyId | None, amount: Stroops | None, name: Callable[[FoundHold], str]
    ) -> tuple[FoundHold, Credited] | Refusal | RefundRefused:
        """Give back all or part of what a transaction was charged, once under its reference.

        Args:
            api_key_id: a key of the vault that paid; needed where several vaults paid for transactions of this name.
            amount: stroops, > 0; None: all that is left to give back.
            name: makes the refund's reference from the hold.
        """
        vault_id = None
        if api_key_id is not None:
            key = await reads.paying_key(self._database, api_key_id)
            if key is None:
                return KeyMissing()
            vault_id = key.vault_id
        found = await reads.holds_of(self._database, transaction_id, vault_id)
        if len(found) > 1:
            return VaultUnclear()
        if not found:
            return HoldMissing()
        hold = found[0].hold
        made = await self._billing.refund(hold.event_id, amount, name(found[0]), hold.vault_id)
        if isinstance(made, Credited):
            return await self._look(hold.vault_id, hold.request_id), made
        return RefundRefused(Stroops(0)) if isinstance(made, ChargeMissing) else made

    async def _hold_named(self, hold_id: HoldId) -> ExternalHold | None:
        found = await reads.find_hold(self._database, hold_id)
        return None if found is None else found.hold

    async def _fly(self, vault_id: VaultId, request_id: str, same: Hashable, work: Work) -> Outcome:
        landed = await self._flights.fly((vault_id, request_id), same, work)
        if isinstance(landed, Draining):
            return landed
        if landed.joined and isinstance(landed.outcome, HoldStands | HoldCaptured):
            return attrs.evolve(landed.outcome, already=True)
        return landed.outcome

    async def _look(self, vault_id: VaultId, request_id: str) -> FoundHold:
        found = await reads.find_request(self._database, vault_id, request_id)
        assert found is not None, "holds are never deleted"
        return found

    # Placing

    async def _place(self, vault_id: VaultId, order: HoldOrder) -> HoldStands | Refusal:
        placing, placed = order.placing(self._ttl_seconds_default), False
        if await reads.find_request(self._database, vault_id, order.request_id) is None:
            refusal = await self._refuse_key(order.api_key_id, placing)
            if refusal is not None:
                return refusal
            hold_id = HoldId(self._ids.uuid7())
            await store.bind_hold(
                self._database, vault_id, order.request_id, hold_id, order.api_key_id, placing, self._clock.now()
            )
        for _ in range(TURNS_MAX):
            found = await self._look(vault_id, order.request_id)
            if found.hold.placing is None:
                return HoldEnded("released")
            if found.hold.placing.fingerprint != placing.fingerprint:
                return Mismatch()
            if found.state in ("held", "captured"):
                return HoldStands(found, already=not placed)
            if found.hold.released_at is not None or found.state == "released":
                return HoldEnded("released")
            if found.state == "expired":
                return HoldEnded("expired")
            told = await self._hold(found.hold, found.hold.placing)
            if isinstance(told, HoldPlaced):
                placed = True
            elif told is not None:
                return told
        raise OutcomeUnknown("others keep moving this hold on")

    async def _refuse_key(self, api_key_id: ApiKeyId, placing: Placing) -> KeyMissing | KeyNarrowed | None:
        rights = await reads.key_rights(
            self._database, api_key_id, placing.api_id, placing.endpoint_id, self._clock.now()
        )
        if not rights.usable:
            return KeyMissing()
        narrowed: dict[Literal["api", "plan", "endpoint", "scope"], bool] = {
            "api": rights.api,
            "plan": rights.plan,
            "endpoint": rights.endpoint,
            "scope": rights.scope,
        }
        return next((KeyNarrowed(to) for to, allowed in narrowed.items() if not allowed), None)

    async def _hold(self, hold: ExternalHold, placing: Placing) -> HoldPlaced | Refusal | None:
        """Place the hold's event; None where another process was first, and the hold is to be looked at anew."""
        charged = await billing_reads.offered(self._database, placing.api_id, placing.endpoint_id, hold.api_key_id)
        if charged is None:
            return NotOffered()
        # An event that was given up on, and is stored late or by another process, is placed by whoever claims its name
        # first, and by nobody else.
        claim = IdempotencyClaim(store.claim_key(hold.event_id), placing.fingerprint, None, CLAIM_SECONDS)
        await note_late(self._database, hold.vault_id, hold.event_id, self._clock.now())
        placed = await self._registry.ask(
            hold.vault_id, PlaceHold(hold.event_id, hold.event_amount, placing.ttl_seconds, charged, claim)
        )
        match placed:
            case IdempotencyKeyTaken():
                return None
            case (
                HoldPlaced()
                | InsufficientFunds()
                | StandingRefused()
                | PolicyRefused()
                | Overloaded()
                | Draining()
                | VaultMissing()
            ):
                return placed
            case _:
                raise AssertionError(f"not an outcome of a hold: {placed!r}")

    # Capturing

    async def _capture(self, named: ExternalHold, order: CaptureOrder) -> HoldCaptured | Refusal:
        finished = False
        for _ in range(TURNS_MAX):
            found = await self._look(named.vault_id, named.request_id)
            told: HoldCaptured | Refusal | None
            if found.state == "captured":
                return _compare(found, found, order, already=not finished)
            if found.state == "held" and (found.hold.transaction_id or found.hold.released_at) is not None:
                # What was begun comes first; if that is something else, this is told when it is done.
                told = await self._carry_on(found)
                finished = True
            else:
                told = await self._begin(found, order)
            if told is not None:
                return told
        raise OutcomeUnknown("others keep moving this hold on")

    async def _begin(self, found: FoundHold, order: CaptureOrder) -> HoldCaptured | Refusal | None:
        """Bind a hold that is bound to nothing, or has ended, to a transaction; None: look at it anew."""
        hold = found.hold
        for other in await reads.holds_of(self._database, order.transaction_id, hold.vault_id):
            if other.hold.request_id != hold.request_id:
                return await self._give_way(found, other, order)
        if hold.placing is None or hold.released_at is not None or found.state == "released":
            return HoldEnded("released")
        if found.state is None and not hold.rebound:
            return HoldMissing()
        held = hold.event_amount if found.state is None else found.held_amount
        wanted = held if order.amount is None else order.amount
        if order.exact and wanted != held:
            return HoldAmountMismatch(held, wanted)
        if found.state == "held":
            await store.bind_transaction(self._database, hold, order.transaction_id, wanted)
            return None
        if found.state == "expired":
            await store.bind_anew(self._database, hold, EventId(self._ids.uuid7()), held)
            return None
        refusal = await self._refuse_key(hold.api_key_id, hold.placing) or await self._hold(hold, hold.placing)
        if refusal is None or isinstance(refusal, HoldPlaced):
            return None
        return refusal if isinstance(refusal, Overloaded | Draining) else HoldEnded("expired", refusal)

    async def _give_way(self, found: FoundHold, other: FoundHold, order: CaptureOrder) -> HoldCaptured | Refusal | None:
        """Settle a hold whose transaction another hold of its vault has; None where it is to be looked at anew."""
        if other.state == "held":
            return await self._carry_on(other)
        if other.state != "captured":
            await store.unbind_transaction(self._database, other.hold)
            return None
        compared = _compare(found, other, order, already=True)
        if not isinstance(compared, HoldCaptured):
            return compared
        released = await self._release(found.hold.vault_id, found.hold.request_id)
        return attrs.evolve(compared, found=released.found) if isinstance(released, HoldStands) else released

    async def _carry_on(self, found: FoundHold) -> Overloaded | Draining | None:
        """Do what was begun with an open hold, its release or its capture; what came of it is the event's to tell."""
        if found.hold.released_at is None:
            return await self._finish(found)
        released = await self._release(found.hold.vault_id, found.hold.request_id)
        return released if isinstance(released, Overloaded | Draining) else None

    async def _finish(self, found: FoundHold) -> Overloaded | Draining | None:
        """Capture an open hold for what it is bound to."""
        hold, held = found.hold, found.held_amount
        assert hold.asked_amount is not None
        if hold.asked_amount > held:
            more = ExtendHold(hold.event_id, 0, Stroops(hold.asked_amount - held), f"capture:{hold.transaction_id}")
            extended = await self._registry.ask(hold.vault_id, more)
            match extended:
                case HoldExtended(held_now):
                    held = held_now
                case InsufficientFunds() | StandingRefused() | PolicyRefused():
                    pass
                case HoldNotOpen() | ReferenceTaken():
                    return None
                case Overloaded() | Draining():
                    return extended
                case _:
                    raise AssertionError(f"not an outcome of an extension: {extended!r}")
        amount = Stroops(min(hold.asked_amount, held))
        delivery = Delivery(CHARGED if amount == hold.asked_amount else SHORTFALL)
        closed = await self._registry.ask(hold.vault_id, capture(hold.event_id, held, amount, delivery))
        match closed:
            case HoldClosed() | HoldNotOpen():
                return None
            case Overloaded() | Draining():
                return closed
            case _:
                raise AssertionError(f"not an outcome of a capture: {closed!r}")

    # Extending

    async def _extend(self, named: ExternalHold, seconds: int, amount: Stroops, ref: str) -> HoldStands | Refusal:
        found = await self._look(named.vault_id, named.request_id)
        extended = await self._registry.ask(named.vault_id, ExtendHold(found.hold.event_id, seconds, amount, ref))
        match extended:
            case HoldExtended(_, repeated):
                return HoldStands(await self._look(named.vault_id, named.request_id), already=repeated)
            case HoldNotOpen(None):
                return HoldMissing() if found.hold.released_at is None else HoldEnded("released")
            case HoldNotOpen("captured"):
                found = await self._look(named.vault_id, named.request_id)
                return HoldAlreadyCaptured(found.hold.transaction_id or "")
            case HoldNotOpen("released" | "expired" as state):
                return HoldEnded(state)
            case ReferenceTaken():
                return Mismatch()
            case InsufficientFunds() | StandingRefused() | PolicyRefused() | Overloaded() | Draining():
                return extended
            case _:
                raise AssertionError(f"not an outcome of an extension: {extended!r}")

    # Releasing

    async def _release_request(self, vault_id: VaultId, request_id: str, api_key_id: ApiKeyId) -> HoldStands | Refusal:
        if await reads.find_request(self._database, vault_id, request_id) is None:
            hold_id, now = HoldId(self._ids.uuid7()), self._clock.now()
            await store.remember_release(self._database, vault_id, request_id, hold_id, api_key_id, now)
            found = await self._look(vault_id, request_id)
            if found.hold.hold_id == hold_id:
                return HoldStands(found, already=False)
        return await self._release(vault_id, request_id)

    async def _release(self, vault_id: VaultId, request_id: str) -> HoldStands | Refusal:
        released = False
        for _ in range(TURNS_MAX):
            found = await self._look(vault_id, request_id)
            hold = found.hold
            if found.state == "captured":
                return HoldAlreadyCaptured(hold.transaction_id or "")
            if hold.placing is None:
                return HoldStands(found, already=True)
            if hold.released_at is None:
                await store.bar_hold(self._database, hold, self._clock.now())
                released = True
            elif found.state == "held":
                closed = await self._registry.ask(
                    vault_id, release(hold.event_id, found.held_amount, Delivery(RELEASED))
                )
                if isinstance(closed, Overloaded | Draining):
                    return closed
                assert isinstance(closed, HoldClosed | HoldNotOpen), closed
                released = True
            elif found.state is not None or await store.bar_event(
                self._database, hold, hold.placing.fingerprint, self._clock.now(), timedelta(seconds=CLAIM_SECONDS)
            ):
                return HoldStands(found, already=not released)
        raise OutcomeUnknown("others keep moving this hold on")


def _compare(found: FoundHold, charged: FoundHold, order: CaptureOrder, *, already: bool) -> HoldCaptured | Refusal:
    """Return what a capture is told of a hold that is captured."""
    stored = charged.hold.transaction_id
    if stored != order.transaction_id:
        return HoldAlreadyCaptured(stored or "")
    wanted = (found.held_amount or found.hold.event_amount) if order.amount is None else order.amount
    if wanted not in (charged.amount, charged.hold.asked_amount):
        return HoldAmountMismatch(charged.amount, wanted)
    return HoldCaptured(found, charged, already)


def _stands(outcome: Outcome) -> HoldStands | Refusal:
    assert not isinstance(outcome, HoldCaptured), outcome
    return outcome
