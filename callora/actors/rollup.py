"""The rollup's task: a pass every interval, in whichever process finds nobody else at it."""

from datetime import timedelta
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.metrics import Metrics
from callora.store.breath import BREATH_SECONDS
from callora.store.bridge import Database, StatementRejected
from callora.store.rollup import EPOCH, MINUTE, SETTLE, SPAN, Pass, advance, as_of

PAUSE_PER_WORK: Final = 99
"""A pass that takes long is followed by a pause so many times as long: calls share the database with it."""
PAUSE_SECONDS_MAX: Final = 20.0
"""However long a pass took: one that only had to wait must not leave the sums behind for minutes."""
WHOLE_CALLS_MAX: Final = 20_000
"""Where more calls than this are not final yet, passes are light."""
SPAN_MIN: Final = timedelta(minutes=1)
SPAN_MAX: Final = timedelta(days=1)
QUICK_SECONDS: Final = 1.0
"""While the rollup is behind, a pass that took less is followed by one over twice the time."""


class Rollup:
    """One task that keeps the sums of usage."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        interval_seconds: float,
    ) -> None:
        self._database = database
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._interval_seconds = interval_seconds
        self._span = SPAN
        self._as_of = EPOCH
        self._light = False
        self._rest_seconds = BREATH_SECONDS

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make a pass every interval until cancelled; one that fails is made up for by the next."""
        task_status.started()
        while True:
            started = trio.current_time()
            made: Pass | None = None
            try:
                made = await self.make_pass()
            except StatementRejected as error:
                if not error.of_older_schema:
                    raise
                # The schema is an older one, and somebody may be about to migrate: /readyz says so.
                self._log.warning("rollup_failed", error=str(error))
            except CalloraFault as fault:
                self._span = max(SPAN_MIN, self._span / 2)
                self._rest_seconds = 0.0  # it may have taken too long
                self._log.warning("rollup_failed", error=str(fault))
            took = trio.current_time() - started
            behind = made is not None and made.behind
            if behind and took < QUICK_SECONDS:
                self._span = min(SPAN_MAX, self._span * 2)
            self._show_lag()
            rest = max(self._interval_seconds, min(PAUSE_PER_WORK * took, PAUSE_SECONDS_MAX))
            await trio.sleep(took if behind else rest)

    async def make_pass(self) -> Pass | None:
        """Count what is new; return None where another process is at it.

        Raises:
            StoreUnavailable, StoreConflict: nothing was changed.
            OutcomeUnknown: the pass was made whole, or not at all.

        Cancellation: the pass is not made.
        """
        made = await advance(
            self._database, self._clock.now(), span=self._span, light=self._light, rest_seconds=self._rest_seconds
        )
        self._rest_seconds = BREATH_SECONDS
        before, self._as_of = self._as_of, made.as_of if made is not None else await as_of(self._database)
        if made is not None and self._as_of > before > EPOCH:
            rate = made.calls / (self._as_of - before).total_seconds()
            # A minute becomes final when it has been over for SETTLE.
            self._light = rate * (SETTLE + MINUTE).total_seconds() > WHOLE_CALLS_MAX
        return made

    def _show_lag(self) -> None:
        # A process that has seen no pass yet knows of no lag
        if self._as_of > EPOCH:
            lag = (self._clock.now() - self._as_of).total_seconds()
            self._metrics.usage_rollup_lag_seconds.set(max(0.0, lag))
