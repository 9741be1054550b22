"""Plans as operators keep them."""

from typing import Literal

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.catalogue import Catalogue
from callora.actors.vaults import DEFAULT_PLAN
from callora.ledger.faults import CalloraFault
from callora.store.bridge import Database
from callora.store.plans import Plan, put_plan

__all__ = ["DefaultPlanStays", "Plan", "Plans"]


@attrs.frozen
class DefaultPlanStays:
    """New vaults are put on this plan, so it stays active."""


class Plans:
    """Makes and replaces plans, and lets calls obey at once in this process."""

    def __init__(self, database: Database, catalogue: Catalogue, log: FilteringBoundLogger) -> None:
        self._database = database
        self._catalogue = catalogue
        self._log = log

    async def put(self, plan: Plan) -> Literal["made", "replaced"] | DefaultPlanStays:
        """Make a plan, or replace the one of its id.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: putting it again is safe.
        """
        if plan.plan_id == DEFAULT_PLAN and not plan.active:
            return DefaultPlanStays()
        done = await put_plan(self._database, plan)
        await self.take_effect()
        return done

    async def take_effect(self) -> None:
        """Let the gateway see a changed plan now; where it cannot look, it trusts nothing it keeps within a second."""
        try:
            await self._catalogue.refresh()
        except CalloraFault as fault:  # what was written stands, and its answer must not be lost
            self._log.warning("catalogue_not_refreshed", error=str(fault))
