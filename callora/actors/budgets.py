"""Budgets of access tokens: taken before a call is held, given back when it was not charged.

One task settles all that came meanwhile in one database transaction, so a popular token costs a commit for many calls,
not one each. What it decides is durable before a call goes on: a crash loses budget and never exceeds it. Money is not
here: whatever becomes of a budget, the vault's hold decides what is paid.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.mailbox import Reply
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import TokenId
from callora.ledger.money import Stroops
from callora.ledger.tokens import BudgetOutcome, BudgetTaken
from callora.store.bridge import Database
from callora.store.tokens import settle_budgets

BATCH_MAX: Final = 500
PENDING_MAX: Final = 10_000
"""Calls that may wait for a budget at the same time."""
PAUSE_SECONDS: Final = 0.2
LAST_SECONDS_MAX: Final = 2.0
"""How long giving back may take when the service ends."""


@attrs.define(slots=True, eq=False)
class _Ask:
    token_id: TokenId
    amount: Stroops
    reply: Reply[BudgetOutcome] = attrs.field(factory=Reply)
    abandoned: bool = False


class Budgets:
    """Takes from budgets and gives back to them."""

    def __init__(self, database: Database, log: FilteringBoundLogger) -> None:
        self._database = database
        self._log = log
        self._asked: deque[_Ask] = deque()
        self._returned: dict[TokenId, Stroops] = {}
        self._wake = trio.Event()

    async def take(self, token_id: TokenId, amount: Stroops) -> BudgetOutcome:
        """Take a call's price from a token's budget, durably.

        Raises:
            StoreUnavailable: it is not known to be taken; if it was, that much budget is lost.

        Cancellation: what was taken by then is given back.
        """
        if len(self._asked) >= PENDING_MAX:
            raise StoreUnavailable("too many calls wait for their budgets")
        ask = _Ask(token_id, amount)
        self._asked.append(ask)
        self._wake.set()
        try:
            return await ask.reply.wait()
        except trio.Cancelled:
            ask.abandoned = True
            raise

    def give_back(self, token_id: TokenId, amount: Stroops) -> None:
        """Give back what a call took and was not charged; whatever is taken from here on already sees it."""
        self._returned[token_id] = Stroops(self._returned.get(token_id, 0) + amount)
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Settle until cancelled; then what is to be given back is stored, for at most LAST_SECONDS_MAX."""
        task_status.started()
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                while self._asked or self._returned:
                    await self._settle()
        finally:
            with trio.move_on_after(LAST_SECONDS_MAX, shield=True):
                if self._asked or self._returned:
                    await self._settle()
            while self._asked:
                self._asked.popleft().reply.fail(StoreUnavailable("budgets are not kept any more"))

    async def _settle(self) -> None:
        batch = [self._asked.popleft() for _ in range(min(len(self._asked), BATCH_MAX))]
        returned, self._returned = self._returned, {}
        asked: dict[TokenId, list[_Ask]] = {}
        for ask in batch:
            if not ask.abandoned:
                asked.setdefault(ask.token_id, []).append(ask)
        try:
            outcomes = await settle_budgets(
                self._database, {token_id: [ask.amount for ask in asks] for token_id, asks in asked.items()}, returned
            )
        except OutcomeUnknown as fault:
            # What may have been given back is not given back again: budget may be lost, never exceeded.
            await self._failed(batch, {}, fault)
        except CalloraFault as fault:
            await self._failed(batch, returned, fault)
        except BaseException:  # cancelled or crashed inside the transaction, which then wrote nothing
            self._fail(batch, returned)
            raise
        else:
            self._tell(asked, outcomes)

    def _tell(
        self, asked: Mapping[TokenId, Sequence[_Ask]], outcomes: Mapping[TokenId, Sequence[BudgetOutcome]]
    ) -> None:
        for token_id, asks in asked.items():
            for ask, outcome in zip(asks, outcomes[token_id], strict=True):
                if ask.abandoned and isinstance(outcome, BudgetTaken):
                    self.give_back(ask.token_id, ask.amount)
                ask.reply.resolve(outcome)

    async def _failed(self, batch: Sequence[_Ask], returned: Mapping[TokenId, Stroops], fault: CalloraFault) -> None:
        self._log.warning("budgets_not_settled", error=str(fault), calls=len(batch))
        self._fail(batch, returned)
        await trio.sleep(PAUSE_SECONDS)

    def _fail(self, batch: Sequence[_Ask], returned: Mapping[TokenId, Stroops]) -> None:
        for token_id, amount in returned.items():
            self.give_back(token_id, amount)
        for ask in batch:
            ask.reply.fail(StoreUnavailable("the budget could not be settled; nothing was charged"))
