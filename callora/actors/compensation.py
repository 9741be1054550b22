"""Charges whose answer was never delivered: undone as soon as the store says what they came to.

A capture that was sent to a database which then fell silent has an unknown outcome, and its caller got no answer. It is
looked up until it is known: a hold still open is released, a capture is refunded as a new entry (design rules 3 and 7).
"""

from collections import deque
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import Delivery, GrantQuota, Refund, release
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import EventId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    HoldClosed,
    HoldNotOpen,
    QuotaGranted,
    ReferenceTaken,
    RefundRefused,
)
from callora.ledger.quota import month_of

PENDING_MAX: Final = 100_000
PAUSE_SECONDS: Final = 0.5


@attrs.frozen(slots=True)
class Undelivered:
    """A call whose capture has an unknown outcome and whose answer was withheld."""

    vault_id: VaultId
    event_id: EventId
    held_amount: Stroops
    amount: Stroops
    held_credits: int = 0
    credits: int = 0
    answer_kept: bool = False
    """True when the capture, if it was stored, stored the answer with it: a retry under the call's idempotency key gets
    it, and a refund would make it free."""


class Compensator:
    """One task that undoes what was charged and not delivered."""

    def __init__(self, registry: VaultRegistry, clock: Clock, ids: Ids, log: FilteringBoundLogger) -> None:
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._log = log
        self._pending: deque[Undelivered] = deque()
        self._wake = trio.Event()

    @property
    def pending(self) -> int:
        """Charges that are not known to be undone."""
        return len(self._pending)

    def add(self, undelivered: Undelivered) -> None:
        """Undo this when its outcome is known; past PENDING_MAX the hold's expiry is left to end it."""
        if len(self._pending) >= PENDING_MAX:
            self._log.error("undelivered_dropped", event_id=undelivered.event_id)
            return
        self._pending.append(undelivered)
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        task_status.started()
        while True:
            while self._pending:
                if await self._undo(self._pending[0]):
                    self._pending.popleft()
                else:
                    self._pending.rotate(-1)  # one vault that keeps failing does not keep the others waiting
                    await trio.sleep(PAUSE_SECONDS)
            self._wake = trio.Event()
            await self._wake.wait()

    async def _undo(self, call: Undelivered) -> bool:
        try:
            outcome = await self._registry.ask(
                call.vault_id,
                release(call.event_id, call.held_amount, Delivery("undelivered"), held_credits=call.held_credits),
            )
            captured = isinstance(outcome, HoldNotOpen) and outcome.state == "captured"
            ref = f"undelivered:{call.event_id}"
            if captured and call.credits > 0 and not call.answer_kept:
                # What a call burnt is never taken back: the vault is given as much anew, for the rest of the month.
                until = month_of(self._clock.now())[1]
                again = GrantQuota(self._ids.uuid7(), "allocation", call.credits, ref, until)
                granted = await self._registry.ask(call.vault_id, again)
                if not isinstance(granted, QuotaGranted | ReferenceTaken):
                    return False
            if captured and call.amount > 0 and not call.answer_kept:
                outcome = await self._registry.ask(call.vault_id, Refund(call.event_id, call.amount, ref))
        except CalloraFault:
            return False
        self._log.info("undelivered_undone", event_id=call.event_id, outcome=type(outcome).__name__)
        return isinstance(outcome, HoldClosed | HoldNotOpen | BalanceMoved | RefundRefused)
