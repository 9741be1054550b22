"""The revenue indexer's task: a pass every interval, in whichever process finds nobody else at it."""

from datetime import timedelta
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.metrics import Metrics
from callora.store import revenue as store
from callora.store.bridge import Database, StatementRejected
from callora.store.revenue import Indexed
from callora.store.rollup import EPOCH

SPAN_MIN: Final = timedelta(seconds=0.25)
SPAN_FIRST: Final = timedelta(seconds=1)
"""How much the first pass indexes at most: after a restart it may be the busiest second there is."""
SPAN_MAX: Final = timedelta(days=1)
QUICK_SECONDS: Final = 0.01
"""While the indexer is behind, a pass that took less is followed by one over twice the time, and one that took three
times as long by one over half of it: calls made meanwhile share the database with a pass."""
FEW_ENTRIES: Final = 500
"""A pass that found fewer was as quick as one can be, whatever it took: a distant database must not keep it at a second
of calls at a time, where a year of few calls waits."""
REST_PER_WORK: Final = 4
"""A pass that leaves more to index is followed by a pause so many times as long, while that is recent."""
RECENT: Final = timedelta(minutes=10)
NEWEST_MAX: Final = 5_000
"""Where more charges than this are not final yet, they are indexed once they are: looking at them again in each pass
would cost more than indexing them. A settlement indexes them first, however many they are."""


class RevenueIndexer:
    """One task that keeps the revenue of developers."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        network: str,
        fee_bps: int,
        interval_seconds: float,
    ) -> None:
        """Args:
        network: whose unsettled revenue is shown.
        fee_bps: the platform's share of calls from now on, hundredths of a percent.
        """
        self._database = database
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._network = network
        self._fee_bps = fee_bps
        self._fee_known = False
        self._interval_seconds = interval_seconds
        self._span = SPAN_FIRST
        self._as_of = EPOCH

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make a pass every interval until cancelled; one that fails is made up for by the next."""
        task_status.started()
        while True:
            rest = self._interval_seconds
            started = trio.current_time()
            try:
                made = await self.make_pass()
                if made is not None and made.behind:
                    recent = self._clock.now() - made.done_until < RECENT
                    rest = REST_PER_WORK * (trio.current_time() - started) if recent else 0.0
                await self._show()
            except StatementRejected as error:
                if not error.of_older_schema:
                    raise
                # The schema is an older one, and somebody may be about to migrate: /readyz says so.
                self._log.warning("revenue_not_indexed", error=str(error))
            except CalloraFault as fault:
                self._span = max(SPAN_MIN, self._span / 2)
                self._log.warning("revenue_not_indexed", error=str(fault))
            await trio.sleep(rest)

    async def make_pass(self, *, wait: bool = False) -> Indexed | None:
        """Index what is new, all of it where that is little; return None where another process is at it.

        Args:
            wait: for that process, and then index all of it.

        Raises:
            StoreUnavailable, StoreConflict: nothing was changed.
            OutcomeUnknown: the pass was made whole, or not at all.

        Cancellation: the pass is not made.
        """
        if not self._fee_known:
            if await store.set_fee(self._database, self._fee_bps, self._clock.now()):
                self._log.info("platform_fee_set", bps=self._fee_bps)
            self._fee_known = True
        started = trio.current_time()
        newest_max = None if wait else NEWEST_MAX
        made = await store.advance(self._database, self._clock.now(), span=self._span, newest_max=newest_max, wait=wait)
        took = trio.current_time() - started
        if made is not None:
            few = made.entries < FEW_ENTRIES
            if made.behind and (few or took < QUICK_SECONDS):
                self._span = min(SPAN_MAX, self._span * 2)
            elif took > 3 * QUICK_SECONDS and not few:
                self._span = max(SPAN_MIN, self._span / 2)
        self._as_of = made.as_of if made is not None else await store.as_of(self._database)
        return made

    async def catch_up(self) -> None:
        """Index everything that has ended by now. Raises as `make_pass`."""
        behind = True
        while behind:
            made = await self.make_pass(wait=True)
            assert made is not None, "it waits for its turn"
            behind = made.behind

    async def _show(self) -> None:
        # A process that has seen no pass yet knows of no lag
        if self._as_of > EPOCH:
            lag = (self._clock.now() - self._as_of).total_seconds()
            self._metrics.revenue_lag_seconds.set(max(0.0, lag))
        unsettled = await store.unsettled(self._database, self._network)
        self._metrics.unsettled_stroops.set(unsettled.unsealed + unsettled.under_way)
