"""Subscriptions: a plan is paid for by the calendar month, from the vault that it is for.

A month is paid once, whatever dies in between: the intent is stored first, the vault is charged under a reference made
of it, and then the intent says so. Whoever works on a subscription has claimed it for CLAIM_SECONDS; what he leaves
behind is carried on by the sweep of any process.
"""

from datetime import datetime, timedelta
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import SetPlan
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import Ids, UserId, VaultId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.outcomes import Draining, InsufficientFunds, Overloaded, PlanMissing, PlanSet, VaultMissing
from callora.ledger.quota import month_of
from callora.ledger.subscriptions import (
    FALLBACK_PLAN,
    AlreadySubscribed,
    Begin,
    Keep,
    Payment,
    PlanOffer,
    Schedule,
    Subscription,
    decide,
    renewal,
)
from callora.store import subscriptions as store
from callora.store.bridge import Connection, Database
from callora.store.outbox import Event, add_events
from callora.store.reads.billing import entry_amount
from callora.store.reads.subscriptions import find_subscription

CLAIM_SECONDS: Final = 120
"""Longer than a request or a step of the sweep may take; what was left behind is carried on after it."""
BATCH: Final = 32
"""How many subscriptions one process works on at once."""


@attrs.frozen
class Subscribed:
    """The subscription stands as asked for."""

    subscription: Subscription
    charged: Stroops
    """What was taken for it now; 0 where what is paid already goes on."""


@attrs.frozen
class NotSold:
    """No plan of this name is active and has a price."""


@attrs.frozen
class Busy:
    """Somebody else works on the vault's subscription right now."""


@attrs.frozen
class SubscriptionMissing:
    """The user has no such subscription."""


SubscribeOutcome = (
    Subscribed | AlreadySubscribed | NotSold | Busy | InsufficientFunds | VaultMissing | Overloaded | Draining
)


class Subscriptions:
    """Begins, changes, renews and ends subscriptions."""

    def __init__(
        self, database: Database, registry: VaultRegistry, clock: Clock, ids: Ids, log: FilteringBoundLogger
    ) -> None:
        self._database = database
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._log = log

    async def subscribe(self, user_id: UserId, vault_id: VaultId, plan_id: str) -> SubscribeOutcome:
        """Put a user's vault on a plan that it pays for from now on.

        A dearer plan than the present one begins at once, for the difference; a cheaper one when what is paid has
        ended. One that was cancelled goes on.

        Raises:
            StoreUnavailable: nothing was charged. OutcomeUnknown: it may be charged, or is by the sweep within minutes;
                the list tells.

        Cancellation: as after OutcomeUnknown.
        """
        await self._sweep_once(vault_id)
        now = self._clock.now()
        until = now + timedelta(seconds=CLAIM_SECONDS)
        async with self._database.transaction() as connection:
            await store.lock_user(connection, user_id)
            offer = await store.find_offer(connection, plan_id)
            if offer is None:
                return NotSold()
            active: Subscription | None = None
            for each, claimed_until in await store.living(connection, vault_id):
                claimed = claimed_until is not None and claimed_until > now
                if claimed or each.state == "pending" or each.paid_until <= now:
                    return Busy()
                active = each
            decision = decide(active, offer)
            if isinstance(decision, AlreadySubscribed):
                return decision
            if active is not None and await store.claim(connection, active.subscription_id, until, now) is None:
                return Busy()
            if isinstance(decision, Keep | Schedule):
                assert active is not None
                scheduled = offer if isinstance(decision, Schedule) else None
                kept = await store.go_on_with(connection, active.subscription_id, scheduled)
                return Subscribed(kept, Stroops(0))
            pending = await self._begin(connection, vault_id, decision, offer, now)
        try:
            return await self._pay_first(pending, until)
        except StoreUnavailable as fault:
            raise OutcomeUnknown("the intent is stored, and is carried on") from fault

    async def cancel(self, subscription_id: str, user_id: UserId) -> Subscription | SubscriptionMissing | Busy:
        """Let a subscription end with what is paid. One that ends or has ended is left as it is.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: cancelling again is safe.
        """
        cancelled = await store.cancel(self._database, subscription_id, user_id, self._clock.now())
        if cancelled is not None:
            return cancelled
        found = await find_subscription(self._database, subscription_id, user_id)
        if found is None:
            return SubscriptionMissing()
        return Busy() if found.state in ("pending", "active") else found

    async def set_plan(
        self, vault_id: VaultId, plan_id: str
    ) -> PlanSet | PlanMissing | VaultMissing | Busy | Overloaded | Draining:
        """Put a vault on a plan that it does not pay for, as an operator does; its subscription ends without more.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: it may be set, without an end of its subscription;
                setting it again makes up for that.
        """
        await self._sweep_once(vault_id)
        now = self._clock.now()
        until = now + timedelta(seconds=CLAIM_SECONDS)
        ended: Subscription | None = None
        async with self._database.transaction() as connection:
            user_id = await store.user_of(connection, vault_id)
            if user_id is None:
                return VaultMissing()
            await store.lock_user(connection, user_id)
            for each, _ in await store.living(connection, vault_id):
                ended = await store.claim(connection, each.subscription_id, until, now)
                if ended is None or ended.state == "pending":
                    return Busy()
        outcome = await self._registry.ask(vault_id, SetPlan(plan_id, Stroops(0), f"operator:{self._ids.uuid7()}"))
        if ended is not None and isinstance(outcome, PlanSet):
            try:
                await self._end(ended, "ended", "operator")
            except StoreUnavailable as fault:
                raise OutcomeUnknown("the plan is set, and its subscription goes on") from fault
        elif ended is not None:
            await store.let_go(self._database, ended.subscription_id, until)
        assert isinstance(outcome, PlanSet | PlanMissing | VaultMissing | Overloaded | Draining), outcome
        return outcome

    async def sweep(self) -> None:
        """Charge, end or carry on what is due, until nothing is.

        Raises:
            CalloraFault: what is due could not be read; the next sweep makes up for it.

        Cancellation: what is under way is carried on by the next sweep.
        """
        while await self._sweep_once(None) >= BATCH:
            pass

    async def _sweep_once(self, vault_id: VaultId | None) -> int:
        now = self._clock.now()
        until = now + timedelta(seconds=CLAIM_SECONDS)
        due = await store.claim_due(self._database, until, now, BATCH, vault_id)
        async with trio.open_nursery() as nursery:
            for each in due:
                nursery.start_soon(self._carry_on, each)
        return len(due)

    async def _carry_on(self, subscription: Subscription) -> None:
        """Take a claimed subscription on; with a fault, or refused by overload, it is due again after its claim."""
        try:
            if subscription.state == "pending":
                await self._pay_first(subscription, None)
            else:
                await self._renew(subscription)
        except CalloraFault as fault:
            self._log.warning("subscription_left", subscription_id=subscription.subscription_id, error=str(fault))

    async def _begin(
        self, connection: Connection, vault_id: VaultId, begin: Begin, offer: PlanOffer, now: datetime
    ) -> Subscription:
        return await store.add_pending(
            connection,
            self._ids.uuid7(),
            vault_id,
            offer,
            begin.first_charge,
            begin.replaces,
            month_of(now),
            now,
            now + timedelta(seconds=CLAIM_SECONDS),
        )

    async def _pay_first(
        self, pending: Subscription, replaced_until: datetime | None
    ) -> Subscribed | NotSold | InsufficientFunds | VaultMissing | Overloaded | Draining:
        """Charge the first month of a claimed intent, or forget the intent where nothing is charged for it.

        Args:
            replaced_until: the claim on what it replaces, which is given back; None: nobody waits for this.
        """
        refused: NotSold | InsufficientFunds | VaultMissing | Overloaded | Draining
        if pending.paid_until > self._clock.now():
            payment = SetPlan(pending.plan_id, pending.first_charge, pending.payment_ref)
            outcome = await self._registry.ask(pending.vault_id, payment)
        else:
            outcome = PlanMissing()  # its month is over: it is not begun any more, unless it is paid
        match outcome:
            case PlanSet():
                return await self._activate(pending)
            case PlanMissing():
                # Asked of the ledger, since a plan may be withdrawn between the payment and this
                if await self._paid(pending):
                    return await self._activate(pending)
                refused = NotSold()
            case Overloaded() | Draining():
                if replaced_until is None:
                    return outcome  # an attempt before this one may have charged
                refused = outcome
            case InsufficientFunds() | VaultMissing():
                refused = outcome
            case _:
                raise AssertionError(f"not an outcome of a payment: {outcome!r}")
        await store.drop_pending(self._database, pending.subscription_id)
        if pending.replaces is not None and replaced_until is not None:
            await store.let_go(self._database, pending.replaces, replaced_until)
        return refused

    async def _paid(self, pending: Subscription) -> bool:
        return await entry_amount(self._database, pending.vault_id, "subscription", pending.payment_ref) is not None

    async def _activate(self, pending: Subscription) -> Subscribed:
        now = self._clock.now()
        async with self._database.transaction() as connection:
            if await store.activate(connection, pending, now):
                await self._tell(connection, pending, "subscription_started", pending.subscription_id)
        return Subscribed(attrs.evolve(pending, state="active"), pending.first_charge)

    async def _renew(self, subscription: Subscription) -> None:
        """Charge the month that has begun, or end what is cancelled or cannot be paid."""
        payment = renewal(subscription, self._clock.now())
        if payment is None:
            await self._fall_back(subscription, "ended", "cancelled")
            return
        outcome = await self._registry.ask(subscription.vault_id, SetPlan(payment.plan_id, payment.price, payment.ref))
        match outcome:
            case PlanSet():
                await self._note_renewal(subscription, payment)
            case InsufficientFunds():
                await self._fall_back(subscription, "lapsed", "balance")
            case PlanMissing():
                await self._fall_back(subscription, "lapsed", "plan_withdrawn")
            case Overloaded() | Draining():
                pass
            case _:
                raise AssertionError(f"not an outcome of a payment: {outcome!r}")

    async def _note_renewal(self, subscription: Subscription, payment: Payment) -> None:
        renewed = attrs.evolve(
            subscription, plan_id=payment.plan_id, price=payment.price, paid_until=payment.paid_until
        )
        async with self._database.transaction() as connection:
            if await store.renew(connection, subscription.subscription_id, payment):
                subject = payment.ref.removeprefix("subscription:")
                await self._tell(connection, renewed, "subscription_renewed", subject)

    async def _fall_back(self, subscription: Subscription, state: str, reason: str) -> None:
        ref = f"subscription:{subscription.subscription_id}:end"
        outcome = await self._registry.ask(subscription.vault_id, SetPlan(FALLBACK_PLAN, Stroops(0), ref))
        if isinstance(outcome, Overloaded | Draining):
            return
        assert isinstance(outcome, PlanSet), outcome
        await self._end(subscription, state, reason)

    async def _end(self, subscription: Subscription, state: str, reason: str) -> None:
        async with self._database.transaction() as connection:
            if await store.end(connection, subscription.subscription_id, state, self._clock.now()):
                await self._tell(
                    connection, subscription, f"subscription_{state}", subscription.subscription_id, reason=reason
                )

    async def _tell(
        self, connection: Connection, subscription: Subscription, kind: str, subject: str, **more: str
    ) -> None:
        event = Event(
            event_id=self._ids.uuid7(),
            type=kind,
            subject=subject,
            developer_id=None,
            payload={
                "subscriptionId": subscription.subscription_id,
                "vaultId": subscription.vault_id,
                "planId": subscription.plan_id,
                "priceUsdc": format_usdc(subscription.price),
                "paidUntil": subscription.paid_until.isoformat().replace("+00:00", "Z"),
                **more,
            },
            user_id=await store.user_of(connection, subscription.vault_id),
        )
        await add_events(connection, [event], self._clock.now())
