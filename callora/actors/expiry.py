"""The expiry sweep: ends holds that nobody closed, by one written rule: past its time a hold is given back whole.

After a crash this is what frees the money of calls that were in hand. Each row is looked at in the sweeps after its
birth and then remembered here while its hold is open, so a sweep reads what is new and not what is old.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.mailbox import Envelope
from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import expire
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import FIRST_ID, EventId
from callora.ledger.outcomes import HoldClosed
from callora.metrics import Metrics
from callora.store.breath import BREATH_SECONDS
from callora.store.bridge import Database, StatementRejected
from callora.store.rounds import ROUND_SECONDS_MAX
from callora.store.usage import OpenHold, open_holds, still_open

LOOK_BACK: Final = timedelta(hours=25)
"""A hold lasts a day at most, so the first sweep after a start looks at everything that may be open."""
BATCH: Final = 5000
CONNECT_SECONDS: Final = 10.0
"""What a round may wait for its connection after its date was taken, and how far the clocks of processes may differ."""


class ExpirySweep:
    """One task that expires holds through their vaults' actors."""

    def __init__(
        self,
        database: Database,
        registry: VaultRegistry,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        interval_seconds: float,
        commit_seconds_max: float,
    ) -> None:
        """Args:
        commit_seconds_max: how long a writer waits for its round.
        """
        self._database = database
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._interval_seconds = interval_seconds
        # A round whose writer gave up on it may still be stored, as long as the server works on it.
        self._overlap = timedelta(seconds=max(commit_seconds_max, ROUND_SECONDS_MAX) + CONNECT_SECONDS)
        self._seen_until: datetime | None = None
        self._open: dict[EventId, OpenHold] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sweep every interval until cancelled; a sweep that fails is made up for by the next."""
        task_status.started()
        while True:
            try:
                await self.sweep()
            except CalloraFault as fault:
                self._log.warning("sweep_failed", error=str(fault))
            await trio.sleep(self._interval_seconds)

    async def sweep(self) -> int:
        """Expire what is due now; return how many holds ended."""
        now = self._clock.now()
        await self._look(now)
        due = [hold for hold in self._open.values() if hold.expires_at <= now]
        ended = 0
        if due:
            # A hold may have been closed or given more time since it was seen.
            present = {hold.event_id: hold for hold in await still_open(self._database, due)}
            for hold in due:
                del self._open[hold.event_id]
            self._open.update(present)
            ended = await self._expire([hold for hold in present.values() if hold.expires_at <= now])
        oldest = min((hold.created_at for hold in self._open.values()), default=now)
        self._metrics.hold_oldest_seconds.set((now - oldest).total_seconds())
        first = min((hold.expires_at for hold in self._open.values()), default=now)
        self._metrics.hold_overdue_seconds.set(max(0.0, (now - first).total_seconds()))
        return ended

    async def _look(self, now: datetime) -> None:
        since, rest_seconds = now - LOOK_BACK, 0.0
        if self._seen_until is not None:
            since, rest_seconds = self._seen_until - self._overlap, BREATH_SECONDS
        after = FIRST_ID
        while True:
            found = await open_holds(self._database, since, now, BATCH, after, rest_seconds)
            self._open.update((hold.event_id, hold) for hold in found)
            if len(found) < BATCH:
                break
            since, after = found[-1].created_at, found[-1].event_id
        self._seen_until = now
        # What closed in the meantime is dropped here, so that only holds that are open stay in memory.
        if self._open:
            kept = await still_open(self._database, list(self._open.values()))
            self._open = {hold.event_id: hold for hold in kept}

    async def _expire(self, holds: Sequence[OpenHold]) -> int:
        sent: list[Envelope] = []
        for hold in holds:
            envelope = Envelope(expire(hold.event_id, hold.held_amount, hold.held_credits))
            if self._registry.send(hold.vault_id, envelope) is None:
                sent.append(envelope)
        ended = 0
        for envelope in sent:
            try:
                ended += isinstance(await envelope.reply.wait(), HoldClosed)
            except CalloraFault as fault:  # this vault's holds are due again at the next sweep
                self._log.warning("expiry_failed", error=str(fault))
        if ended:
            self._metrics.expired_holds.inc(ended)
            self._log.info("holds_expired", count=ended)
        return ended


Job = Callable[[], Awaitable[None]]


async def repeat(
    name: str,
    job: Job,
    interval_seconds: float,
    log: FilteringBoundLogger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a job now and every `interval_seconds`, until cancelled; the next run makes up for one with a fault."""
    task_status.started()
    while True:
        try:
            await job()
        except CalloraFault as fault:
            log.warning("job_failed", job=name, error=str(fault))
        except StatementRejected as error:
            if not error.of_older_schema:
                raise
            # The schema is an older one, and somebody may be about to migrate: /readyz says so.
            log.warning("job_failed", job=name, error=str(error))
        await trio.sleep(interval_seconds)
