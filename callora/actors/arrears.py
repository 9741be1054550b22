"""Arrears: who owes pays from what comes back to him, and is suspended where he owes for too long.

It looks and asks; each vault's actor decides, once more and with its row locked. Any number of processes may sweep.
"""

from datetime import timedelta
from typing import Final

from structlog.typing import FilteringBoundLogger

from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import ReviewDebt
from callora.ledger.ids import FIRST_ID, VaultId
from callora.ledger.outcomes import DebtReviewed
from callora.store import arrears as store
from callora.store.bridge import Database

BATCH: Final = 1000


class Arrears:
    """Reviews debts."""

    def __init__(
        self,
        database: Database,
        registry: VaultRegistry,
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        suspend_seconds: float,
    ) -> None:
        """Args:
        suspend_seconds: how long a vault may owe.
        """
        self._database = database
        self._registry = registry
        self._clock = clock
        self._log = log
        self._suspend_after = timedelta(seconds=suspend_seconds)

    async def sweep(self) -> None:
        """Review every debt of which something can be paid, or that has lasted too long.

        Raises:
            CalloraFault: some were not reviewed; the next sweep makes up for it.
        """
        owing_since = self._clock.now() - self._suspend_after
        after = VaultId(FIRST_ID)
        while found := await store.due(self._database, after, owing_since, BATCH):
            for vault_id in found:
                outcome = await self._registry.ask(vault_id, ReviewDebt(owing_since))
                if isinstance(outcome, DebtReviewed):
                    self._log.info(
                        "debt_reviewed", vault_id=vault_id, owed_stroops=outcome.owed, standing=outcome.standing
                    )
            after = found[-1]
