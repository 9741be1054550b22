"""The collector: reads every meter source's window and has it rated, at intervals and when somebody asks.

Sources are read beside one another, each in a task and a cancel scope of its own: one that hangs or breaks costs the
others nothing. A source that has more than one run reads is read on by the next. Runs never overlap, in any number of
processes: whoever asks while one is under way waits for it, and then for his own. A run belongs to the collector, not
to who asked: he may leave.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.exporter import Exporter, SourceFault, read_page
from callora.actors.leases import LOOK_SECONDS, Leases
from callora.actors.mailbox import Reply
from callora.actors.rating import Rated, Rater
from callora.ledger.clock import Clock
from callora.ledger.collecting import (
    SOURCES_MAX,
    Counted,
    Difference,
    Job,
    JobRun,
    SourceOffer,
    SourceOutcome,
    SourceStatus,
    Window,
    judge,
    misdated,
    read_until,
    window_at,
)
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable, leaves_of
from callora.ledger.ids import DeveloperId, Ids, UserId
from callora.ledger.outcomes import Overloaded
from callora.ledger.snapshots import Cursor, Snapshot
from callora.metrics import Metrics
from callora.store import meter_sources as store
from callora.store.audit import audit
from callora.store.bridge import Database, StatementRejected
from callora.store.reads.meters import FoundSource, enabled_sources, has_sources, latest_run, list_sources

WAITING_MAX: Final = 16
"""Runs that may wait in one process; more are refused."""
PAGES_AT_ONCE: Final = 1
"""Pages that are taken apart and rated at the same time: rating one takes four of the pool's connections."""
SOURCE_SECONDS_MIN: Final = 45.0
SOURCE_SHARE: Final = 0.75
"""For how much of the interval one source is read in a run, where it has so much; SOURCE_SECONDS_MIN at least."""
IDLE_SECONDS: Final = 5.0
"""How often a process looks whether there is a source now, where there was none: nothing is written meanwhile."""
PROBE_SECONDS_MAX: Final = 1.0
"""How long a probe waits for the database before it tells what was known last."""


@attrs.frozen
class CollectSettings:
    """How sources are read."""

    interval_seconds: float
    overlap: timedelta
    """How much of a window is read again by the next."""
    pages_max: int
    """Of one source in one run."""
    pushed: bool
    """Whether snapshots are only pushed: nothing is read, and no job runs."""


@attrs.frozen
class NoSuchNode:
    """A pushed snapshot is of a node that no enabled source expects, or dated in the future. Nothing was rated."""

    reason: str


@attrs.frozen
class CollectorHealth:
    """What a probe is told."""

    ok: bool
    message: str


@attrs.define(eq=False)
class _Asked:
    """Somebody asks for a run."""

    job: Job
    reply: Reply[JobRun] = attrs.field(factory=Reply)

    def __enter__(self) -> "_Asked":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.reply.settled:
            self.reply.fail(OutcomeUnknown("the collector ended before the run did"))


@attrs.define(eq=False)
class _Progress:
    """How far the reading of one source has come; kept when it breaks off."""

    counted: Counted = attrs.field(factory=Counted)
    latest: datetime | None = None
    """The date of the latest snapshot."""
    pages: int = 0
    ended: bool = False
    """Whether the window was read to its end."""

    def add(self, snapshots: Sequence[Snapshot], rated: Rated) -> None:
        """Count a page that was rated."""
        self.counted = self.counted.plus(counted_of(rated))
        if snapshots:
            newest = snapshots[-1].collected_at
            self.latest = newest if self.latest is None else max(self.latest, newest)


def counted_of(rated: Rated) -> Counted:
    """Return what rating came to, as a run counts it."""
    return Counted(*(getattr(rated, each.name) for each in attrs.fields(Counted)))


class Collector:
    """Collects for a service. Several processes may run one on the same database; one of them is at it at a time."""

    def __init__(
        self,
        database: Database,
        exporter: Exporter,
        rater: Rater,
        environment: Sequence[SourceOffer],
        settings: CollectSettings,
        *,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        environment: the sources that the environment describes; no two clash.
        """
        self._database = database
        self._exporter = exporter
        self._rater = rater
        self._environment = tuple(environment)
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._log = log
        self._leases = Leases(database, ids.uuid7(), log)
        self._ask, self._asked = trio.open_memory_channel[_Asked](WAITING_MAX)
        self._alone = trio.Lock()
        self._taking = trio.Lock()
        self._rating = trio.CapacityLimiter(PAGES_AT_ONCE)
        self._unusable: dict[str, str] | None = None
        self._latest: JobRun | None = None
        self._has_sources = bool(environment)

    @property
    def pushed(self) -> bool:
        """Whether snapshots are only pushed, so that no job runs."""
        return self._settings.pushed

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect at intervals while this process holds the lease, and whenever somebody asks, until cancelled.

        Cancellation: at any time; what was rated is stored, and the next run reads the rest.
        """
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            if not self.pushed:
                nursery.start_soon(self._lead)

    async def do(self, job: Job) -> JobRun | Overloaded:
        """Run a job once every run before it has ended, and return what it came to.

        Raises:
            StoreUnavailable: no run was begun. OutcomeUnknown: it may have been.

        Cancellation: the waiting ends, the run does not.
        """
        asked = _Asked(job)
        try:
            self._ask.send_nowait(asked)
        except trio.WouldBlock:
            await trio.lowlevel.checkpoint()
            return Overloaded()
        return await asked.reply.wait()

    async def ingest(self, snapshots: Sequence[Snapshot]) -> JobRun | NoSuchNode:
        """Rate snapshots that were pushed. What was rated before changes nothing.

        Args:
            snapshots: one at least, the earliest first.

        Raises:
            StoreUnavailable, OutcomeUnknown: some may be rated; again is safe.

        Cancellation: some may be rated; again is safe.
        """
        started_at = self._clock.now()
        await self._take_environment()
        found = await enabled_sources(self._database)
        by_source: dict[str, tuple[FoundSource, list[Snapshot]]] = {}
        for snapshot in snapshots:
            own = _source_of(found, snapshot)
            if own is None:
                return NoSuchNode("no enabled source expects snapshots of this node_id and env")
            wrong = misdated(own.source, [snapshot], started_at)
            if wrong is not None:
                return NoSuchNode(wrong)
            by_source.setdefault(own.source.source_id, (own, []))[1].append(snapshot)
        outcomes = []
        for own, of_source in by_source.values():
            await store.note_attempt(self._database, own.source.source_id, started_at)
            async with self._rating:
                rated = await self._rater.rate(own.source, of_source)
            await store.note_pushed(self._database, own.source.source_id, self._clock.now())
            outcomes.append(SourceOutcome(own.source.source_id, counted_of(rated), ""))
        return await self._finish("ingest", started_at, outcomes)

    async def latest(self) -> JobRun | None:
        """Return the run that ended last, of any process; None where none ever did.

        Raises:
            StoreUnavailable.

        Cancellation: at any time.
        """
        self._note_latest(await latest_run(self._database))
        return self._latest

    async def health(self) -> CollectorHealth:
        """Return how the last run went, without waiting for one: from memory where the database is slow or away.

        Cancellation: at any time.
        """
        with trio.move_on_after(PROBE_SECONDS_MAX):
            try:
                self._has_sources = await self._any_sources()
                self._note_latest(await latest_run(self._database))
            except (CalloraFault, StatementRejected) as fault:
                self._log.debug("last_run_not_read", error=str(fault))
        if not self._has_sources:
            return CollectorHealth(ok=True, message="")
        if self._latest is None:
            return CollectorHealth(ok=False, message="nothing was collected yet")
        if self._latest.status == "error":
            return CollectorHealth(ok=False, message=f"the last run failed: {self._latest.job}")
        return CollectorHealth(ok=True, message="")

    def _note_latest(self, run: JobRun | None) -> None:
        if run is not None and (self._latest is None or self._latest.finished_at <= run.finished_at):
            self._latest = run

    # --- when ---------------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        async for asked in self._asked:
            with asked:
                try:
                    asked.reply.resolve(await self._run_alone(asked.job))
                except CalloraFault as fault:
                    asked.reply.fail(fault)
                except StatementRejected as error:
                    if not error.of_older_schema:
                        raise
                    asked.reply.fail(StoreUnavailable("the schema is an older one"))

    async def _lead(self) -> None:
        while True:
            pause = LOOK_SECONDS
            try:
                if await self._any_sources():
                    await self._leases.work("loop", self._collect_forever)
                else:
                    pause = IDLE_SECONDS
            except CalloraFault as fault:
                self._log.warning("collecting_not_begun", error=str(fault))
            except StatementRejected as error:
                if not error.of_older_schema:
                    raise
                # The schema is an older one, and somebody may be about to migrate: /readyz says so.
                self._log.warning("collecting_not_begun", error=str(error))
            await trio.sleep(pause)

    async def _any_sources(self) -> bool:
        return bool(self._environment) or await has_sources(self._database)

    async def _collect_forever(self) -> None:
        """Run now and at intervals, as long as there are sources."""
        while await self._any_sources():
            due_at = trio.current_time() + self._settings.interval_seconds
            try:
                await self._run_alone("collect-and-rate")
            except CalloraFault as fault:
                self._log.warning("run_failed", error=str(fault))
            await trio.sleep_until(due_at)

    async def _run_alone(self, job: Job) -> JobRun:
        """Run a job while no other run is under way anywhere."""
        made: list[JobRun] = []

        async def work() -> None:
            made.append(await self._run(job))

        async with self._alone:
            while not await self._leases.work("run", work):  # noqa: ASYNC110 - another process gives it back
                await trio.sleep(LOOK_SECONDS)
        return made[-1]

    # --- a run --------------------------------------------------------------------------------------------------------

    async def _run(self, job: Job) -> JobRun:
        started_at = self._clock.now()
        stop_at = trio.current_time() + max(SOURCE_SECONDS_MIN, SOURCE_SHARE * self._settings.interval_seconds)
        unusable = await self._take_environment()
        found = [each for each in await enabled_sources(self._database) if each.source.source_id not in unusable]
        outcomes = [SourceOutcome(source_id, Counted(), error) for source_id, error in unusable.items()]

        async def read(each: FoundSource) -> None:
            outcomes.append(await self._read_source(each, stop_at))

        async with trio.open_nursery() as nursery:
            for each in found:
                nursery.start_soon(read, each)
        outcomes.sort(key=lambda each: each.source_id)
        differences: Sequence[Difference] = ()
        if job == "reconcile":
            differences = await self._compare()
        return await self._finish(job, started_at, outcomes, differences)

    async def _take_environment(self) -> dict[str, str]:
        """Store what the environment describes, once a process; return why sources of it cannot be used."""
        async with self._taking:
            if self._unusable is None:
                self._unusable = await self._store_environment()
            return self._unusable

    async def _store_environment(self) -> dict[str, str]:
        now = self._clock.now()
        unusable: dict[str, str] = {}
        await store.remove_other_sources(self._database, [each.source_id for each in self._environment], now)
        for offer in self._environment:
            owner = store.Owner(UserId(self._ids.uuid7()), DeveloperId(self._ids.uuid7()))
            put = await store.put_source(self._database, offer, "environment", owner, now, may_replace=True)
            if isinstance(put, store.ApiUnknown):
                unusable[offer.source_id] = "no API has its api_id"
            elif isinstance(put, store.SourceTaken):
                unusable[offer.source_id] = "its node is another source's"
        for source_id, error in unusable.items():
            self._log.error("meter_source_not_usable", source_id=source_id, error=error)
        return unusable

    async def _read_source(self, found: FoundSource, stop_at: float) -> SourceOutcome:
        """Read one source as far as it goes, and keep how far; whatever goes wrong is this source's alone."""
        source_id = found.source.source_id
        progress = _Progress()
        try:
            return await self._read_window(found, progress, stop_at)
        except Exception as raised:
            error = self._said(source_id, raised)
        try:
            await store.note_failure(self._database, source_id, error)
        except CalloraFault as fault:
            self._log.warning("source_failure_not_noted", source_id=source_id, error=str(fault))
        return SourceOutcome(source_id, progress.counted, error)

    def _said(self, source_id: str, raised: Exception) -> str:
        """Return what is told of a failure, and log it."""
        leaves = list(leaves_of(raised))
        if all(isinstance(leaf, SourceFault) for leaf in leaves):
            self._log.warning("source_failed", source_id=source_id, error=str(leaves[0]))
            return str(leaves[0])
        if all(isinstance(leaf, CalloraFault) for leaf in leaves):
            self._log.warning("source_not_rated", source_id=source_id, error=str(leaves[0]))
            return "the ledger did not take it; the next run tries again"
        self._log.error("source_crashed", source_id=source_id, exc_info=raised)
        return "reading it failed inside; the log says how"

    async def _read_window(self, found: FoundSource, progress: _Progress, stop_at: float) -> SourceOutcome:
        source, completed = found.source, found.status.last_completed_until
        now = self._clock.now()
        await store.note_attempt(self._database, source.source_id, now)
        window = window_at(now, completed, self._settings.overlap)
        if window.since <= window.until:
            await self._read_pages(found, window, progress, stop_at)
        notice = ""
        if window.since <= window.until and not progress.ended:
            if progress.latest is None or (completed is not None and progress.latest <= completed):
                raise SourceFault(f"{progress.pages} pages brought nothing new")
            notice = f"there was more after {progress.pages} pages; the next run goes on"
        until = read_until(window, progress.latest)
        await store.note_success(self._database, source.source_id, until, self._clock.now(), notice)
        self._metrics.meter_source_read_until.of(source.source_id).set(until.timestamp())
        return SourceOutcome(source.source_id, progress.counted, "", notice)

    async def _read_pages(self, found: FoundSource, window: Window, progress: _Progress, stop_at: float) -> None:
        """Read and rate page after page, until there are no more or it is another's turn."""
        cursor: Cursor | None = None
        while progress.pages < self._settings.pages_max and (left := stop_at - trio.current_time()) > 0:
            body = await self._exporter.fetch(found.source, window, cursor, left)
            async with self._rating:
                page = await read_page(body, cursor)
                wrong = misdated(found.source, page.snapshots, self._clock.now())
                if wrong is not None:
                    raise SourceFault(wrong)
                if page.snapshots:
                    progress.add(page.snapshots, await self._rater.rate(found.source, page.snapshots))
            progress.pages += 1
            if not page.has_more:
                progress.ended = True
                return
            cursor = page.next_cursor

    async def _compare(self) -> Sequence[Difference]:
        """Return what of the books does not add up."""
        try:
            findings = await audit(self._database, self._clock.now())
        except CalloraFault as fault:
            self._log.warning("books_not_compared", error=str(fault))
            return (Difference("the books can be compared in time", 1, "the database did not answer"),)
        return tuple(Difference(each.rule, each.wrong, each.example or "") for each in findings if each.wrong)

    async def _finish(
        self, job: Job, started_at: datetime, outcomes: Sequence[SourceOutcome], differences: Sequence[Difference] = ()
    ) -> JobRun:
        """Keep what a run came to, and return it."""
        status, error = judge(outcomes, differences)
        counted = Counted()
        for each in outcomes:
            counted = counted.plus(each.counted)
        run = JobRun(
            run_id=self._ids.uuid7(),
            job=job,
            status=status,
            started_at=started_at,
            finished_at=max(started_at, self._clock.now()),
            counted=counted,
            error=error,
            source_statuses=await self._statuses(outcomes),
            differences=tuple(differences),
        )
        try:
            await store.add_run(self._database, run)
        except CalloraFault as fault:
            self._log.warning("run_not_kept", error=str(fault))
        self._note_latest(run)
        self._metrics.collect_runs.of(job, status).inc()
        for name, count in attrs.asdict(counted).items():
            if name.endswith("_samples") or name in ("quarantined", "invalid"):
                self._metrics.meter_samples.of(name.removesuffix("_samples")).inc(count)
        log = self._log.info if status == "ok" else self._log.warning
        log("run_ended", job=job, status=status, said=error, **attrs.asdict(counted))
        return run

    async def _statuses(self, outcomes: Sequence[SourceOutcome]) -> tuple[SourceStatus, ...]:
        known: dict[str, SourceStatus] = {}
        try:
            found = await list_sources(self._database, "", SOURCES_MAX)
            known = {each.source.source_id: each.status for each in found}
        except CalloraFault as fault:
            self._log.warning("sources_not_read", error=str(fault))
        statuses = []
        for each in outcomes:
            status = known.get(each.source_id) or SourceStatus(each.source_id, None, None, None, "")
            statuses.append(attrs.evolve(status, last_error=each.error or status.last_error))
        return tuple(statuses)


def _source_of(found: Sequence[FoundSource], snapshot: Snapshot) -> FoundSource | None:
    """Return the source whose snapshot this is: the one that expects it, else the one that expects any."""
    wanted = ((snapshot.node_id, snapshot.env), ("", ""))
    return next(
        (each for pair in wanted for each in found if (each.source.expected_node_id, each.source.expected_env) == pair),
        None,
    )
