"""Disputes of usage events: opened by who paid, decided once by operators, refunded once where that was decided.

The decision is stored before money moves, and that it has moved after: whoever dies in between leaves a dispute
REFUNDING, and the next pass of any process carries it on. The refund is booked under the dispute's own name, so
carrying it on twice moves nothing twice.
"""

from datetime import datetime
from typing import Final, Literal

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.billing import Billing, Credited
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import FIRST_ID, EventId, Ids, UserId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.outcomes import Draining, Overloaded, RefundRefused
from callora.store import disputes as store
from callora.store.bridge import Connection, Database
from callora.store.disputes import Dispute, Status
from callora.store.outbox import Event, add_events
from callora.store.reads.billing import find_charge
from callora.store.reads.disputes import find_dispute

Resolution = Literal["REFUNDED", "UPHELD"]
BATCH: Final = 100


@attrs.frozen
class EventMissing:
    """No usage event of the user's has this id."""


@attrs.frozen
class NothingToRefund:
    """The event cost nothing, or all that it cost was given back."""


@attrs.frozen
class DisputedBefore:
    """The event has its dispute already."""

    dispute_id: str
    status: Status


@attrs.frozen
class DisputeMissing:
    """There is no such dispute."""


@attrs.frozen
class DecidedBefore:
    """Somebody else was first."""

    status: Status


class Disputes:
    """Takes disputes, and carries decisions out."""

    def __init__(self, database: Database, billing: Billing, clock: Clock, ids: Ids, log: FilteringBoundLogger) -> None:
        self._database = database
        self._billing = billing
        self._clock = clock
        self._ids = ids
        self._log = log

    async def open(
        self, user_id: UserId, event_id: EventId, reason: str
    ) -> Dispute | EventMissing | NothingToRefund | DisputedBefore:
        """Dispute what the user's own vault was charged for an event, once for the event.

        Raises:
            StoreUnavailable: nothing was stored. OutcomeUnknown: it may have been; opening again tells.

        Cancellation: as after OutcomeUnknown.
        """
        now = self._clock.now()
        async with self._database.transaction() as connection:
            event = await store.own_event(connection, user_id, event_id)
            if event is None:
                return EventMissing()
            known = await store.dispute_of_event(connection, event.vault_id, event_id)
            if known is None and event.refundable <= 0:
                return NothingToRefund()
            if known is None:
                made = await store.add_dispute(
                    connection, self._ids.uuid7(), event.vault_id, event_id, user_id, reason, now
                )
                if made is not None:
                    await self._tell(connection, made, "dispute_opened", now)
                    return made
                known = await store.dispute_of_event(connection, event.vault_id, event_id)
            assert known is not None, "disputes are never deleted"
            return DisputedBefore(known.dispute_id, known.status)

    async def resolve(
        self, dispute_id: str, resolution: Resolution, notes: str | None, by: str
    ) -> Dispute | DisputeMissing | DecidedBefore | NothingToRefund:
        """Decide an open dispute, and give back what is left of its charge where that is decided.

        Args:
            notes: 1 to 1000 characters, for the payer and the developer.
            by: who decides, for the record.

        Returns:
            The dispute: REFUNDING where the refund could not be booked now, and is by the next pass. NothingToRefund
            leaves it open: it can be upheld.

        Raises:
            StoreUnavailable: nothing was decided. OutcomeUnknown: it may be, and is then carried out; the list tells.

        Cancellation: what is decided is carried out by the next pass.
        """
        found = await find_dispute(self._database, dispute_id)
        if found is None:
            return DisputeMissing()
        if found.status != "OPEN":
            return DecidedBefore(found.status)
        if resolution == "REFUNDED":
            charge = await find_charge(self._database, found.event_id, found.vault_id)
            if charge is None or charge.refundable <= 0:
                return NothingToRefund()
        decided = await self._decide(dispute_id, resolution, notes, by)
        if isinstance(decided, DecidedBefore) or resolution == "UPHELD":
            return decided
        try:
            return await self._refund(decided)
        except CalloraFault as fault:
            self._log.warning("dispute_left", dispute_id=dispute_id, error=str(fault))
            return decided

    async def sweep(self) -> None:
        """Give back what was decided and is not known to be given back, such as by a process that died at it.

        Raises:
            CalloraFault: what is left could not be read; the next pass makes up for it.

        Cancellation: the next pass goes on.
        """
        last: str = FIRST_ID
        while True:
            left = await store.left_refunding(self._database, last, BATCH)
            for each in left:
                try:
                    await self._refund(each)
                except CalloraFault as fault:
                    self._log.warning("dispute_left", dispute_id=each.dispute_id, error=str(fault))
            if len(left) < BATCH:
                return
            last = left[-1].dispute_id

    async def _decide(
        self, dispute_id: str, resolution: Resolution, notes: str | None, by: str
    ) -> Dispute | DecidedBefore:
        now = self._clock.now()
        async with self._database.transaction() as connection:
            status: Literal["REFUNDING", "UPHELD"] = "REFUNDING" if resolution == "REFUNDED" else "UPHELD"
            decided = await store.decide(connection, dispute_id, status, notes, now, by)
            if decided is not None and decided.status == "UPHELD":
                await self._tell(connection, decided, "dispute_resolved", now)
        return decided or DecidedBefore((await self._look(dispute_id)).status)

    async def _refund(self, dispute: Dispute) -> Dispute | NothingToRefund:
        """Book the refund of a dispute, once under its name, then note it; safe at any number of processes at once."""
        while True:
            made = await self._billing.refund(dispute.event_id, None, dispute.refund_ref, dispute.vault_id)
            match made:
                case Credited(_, amount):
                    return await self._note(dispute, amount)
                case RefundRefused(refundable) if refundable > 0:
                    pass  # part of it was refunded by another name since it was looked at
                case RefundRefused():
                    # Refunds are final: neither this process nor another can book one under this dispute any more.
                    await store.take_back(self._database, dispute.dispute_id, self._clock.now())
                    return NothingToRefund()
                case Overloaded() | Draining():
                    return dispute
                case _:
                    raise AssertionError(f"not an outcome of a dispute's refund: {made!r}")

    async def _note(self, dispute: Dispute, amount: Stroops) -> Dispute:
        now = self._clock.now()
        async with self._database.transaction() as connection:
            noted = await store.note_refunded(connection, dispute.dispute_id, amount, now)
            if noted is not None:
                await self._tell(connection, noted, "dispute_resolved", now)
        return noted or await self._look(dispute.dispute_id)

    async def _look(self, dispute_id: str) -> Dispute:
        found = await find_dispute(self._database, dispute_id)
        assert found is not None, "disputes are never deleted"
        return found

    async def _tell(self, connection: Connection, dispute: Dispute, kind: str, now: datetime) -> None:
        """Tell who paid and the developer; who is both is told once. The developer is not told whose vault it was."""
        subject = await store.subject_of(connection, dispute)
        about: dict[str, object] = {
            "disputeId": dispute.dispute_id,
            "usageEventId": dispute.event_id,
            "apiId": subject.api_id,
            "endpointId": subject.endpoint_id,
            "amountUsdc": format_usdc(subject.amount),
            "reason": dispute.reason,
            "status": dispute.status,
            "notes": dispute.notes,
            "refundedUsdc": None if dispute.refunded is None else format_usdc(dispute.refunded),
        }
        events = [
            Event(
                event_id=self._ids.uuid7(),
                type=kind,
                subject=dispute.dispute_id,
                developer_id=None,
                payload={**about, "vaultId": dispute.vault_id},
                user_id=dispute.user_id,
            )
        ]
        if subject.developer not in (None, dispute.user_id):
            events.append(
                Event(
                    event_id=self._ids.uuid7(),
                    type=kind,
                    subject=f"{dispute.dispute_id}:developer",
                    developer_id=subject.developer_id,
                    payload=about,
                )
            )
        await add_events(connection, events, now)
