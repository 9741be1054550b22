"""The rater: snapshots of counters become commands to the vaults that pay for them.

It decides nothing about money and keeps nothing: what each counter was rated up to is stored with what it was charged,
so the same snapshots may be given again, by any process, at once or after a crash, and change nothing the second time.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import RateDelta
from callora.ledger.counters import TOTAL_MAX, AccountReadings, Metered, Reading, Rule
from callora.ledger.faults import CalloraFault, StoreUnavailable
from callora.ledger.ids import DeveloperId, EventId, Ids, VaultId
from callora.ledger.outcomes import DeltasRated, Draining, Overloaded
from callora.ledger.snapshots import MeterSource, Snapshot
from callora.store import counter_accounts as accounts
from callora.store import quarantine
from callora.store.bridge import Database
from callora.store.quarantine import Origin
from callora.store.reads.counters import developer_of_api

READINGS_MAX: Final = 2000
"""What one command may rate: its vault answers no call meanwhile."""
VAULTS_AT_ONCE: Final = 4
"""A rater takes so many of the pool's connections and leaves the others to everybody else."""
OVERLOADED_TRIES: Final = 100
OVERLOADED_PAUSE_SECONDS: Final = 0.05


@attrs.frozen
class Rated:
    """What snapshots came to."""

    processed_samples: int = 0
    """A subject's in one snapshot are one; without replays and resets."""
    written_minutes: int = 0
    """Minutes of accounts that have something new."""
    replayed_minutes: int = 0
    """Minutes of accounts that were rated before: nothing changed."""
    quarantined: int = 0
    """Of subjects without an account, or at a charge that cannot be meant."""
    invalid: int = 0
    resets: int = 0
    latest: datetime | None = None
    """The latest snapshot's; None where there was none."""

    def __add__(self, other: "Rated") -> "Rated":
        """Return what both came to."""
        return Rated(
            self.processed_samples + other.processed_samples,
            self.written_minutes + other.written_minutes,
            self.replayed_minutes + other.replayed_minutes,
            self.quarantined + other.quarantined,
            self.invalid + other.invalid,
            self.resets + other.resets,
            max(filter(None, (self.latest, other.latest)), default=None),
        )


@attrs.frozen
class SubjectUnknown:
    """The subject has no account."""


@attrs.define
class _Work:
    """What is rated together: one node's readings, by subject, and what became of them."""

    origin: Origin
    readings: dict[str, list[Reading]] = attrs.field(factory=dict)
    came_to: Rated = attrs.field(factory=Rated)
    too_large: list[tuple[str, Reading]] = attrs.field(factory=list)
    """By account."""


class Rater:
    """Rates snapshots. Any number may run beside one another."""

    def __init__(
        self, database: Database, registry: VaultRegistry, clock: Clock, ids: Ids, log: FilteringBoundLogger, rule: Rule
    ) -> None:
        """Args:
        rule: by what accounts are rated that have no price or rule of their own.
        """
        self._database = database
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._log = log
        self._rule = rule

    async def rate(self, source: MeterSource, snapshots: Sequence[Snapshot]) -> Rated:
        """Rate what a source says and charge it; what was rated before changes nothing.

        Samples of one subject in one snapshot are summed. What has no account, or would cost more than can be meant, is
        quarantined.

        Args:
            snapshots: of the source's node, in any order and with any repetitions.

        Raises:
            StoreUnavailable, OutcomeUnknown: some vaults may be charged and others not; giving the same snapshots again
                makes up for it.

        Cancellation: as after a fault.
        """
        total = Rated()
        works: dict[tuple[str, str], _Work] = {}
        for snapshot in sorted(snapshots, key=_collected_at):
            work = works.get((snapshot.env, snapshot.node_id))
            if work is None:
                work = works[snapshot.env, snapshot.node_id] = _Work(_origin(source, snapshot))
            invalid = snapshot.invalid + _add(work.readings, snapshot)
            total += Rated(invalid=invalid, latest=snapshot.collected_at)
            await trio.lowlevel.checkpoint()
        for work in works.values():
            places = await accounts.places_of(self._database, list(work.readings))
            unknown = [
                (subject, reading)
                for subject, readings in work.readings.items()
                if subject not in places
                for reading in readings
            ]
            if unknown:
                await quarantine.add(self._database, work.origin, "unknown_subject", unknown, self._clock.now())
                self._log.warning("samples_quarantined", source_id=source.source_id, count=len(unknown))
            total += Rated(quarantined=len(unknown)) + await self._rate(work, places)
        return total

    async def replay(self, subject: str) -> Rated | SubjectUnknown:
        """Rate what is quarantined of a subject that has an account by now, active or not.

        Raises:
            StoreUnavailable, OutcomeUnknown: some may be rated; what is left is there to be rated again.
        """
        places = await accounts.places_of(self._database, [subject], also_inactive=True)
        if not places:
            return SubjectUnknown()
        total = Rated()
        for origin, readings in await quarantine.of_subject(self._database, subject):
            work = _Work(origin, {subject: list(readings)})
            total += await self._rate(work, places) + Rated(latest=readings[-1].collected_at)
            left = {reading.collected_at for _, reading in work.too_large}
            rated = [reading for reading in readings if reading.collected_at not in left]
            await quarantine.drop(self._database, subject, origin, rated)
        return total

    async def _rate(self, work: _Work, places: Mapping[str, accounts.Place]) -> Rated:
        """Rate one node's readings of subjects that have an account, several vaults at once."""
        if not places:
            return work.came_to
        developer_id = await developer_of_api(self._database, work.origin.api_id)
        metered = _metered(work.origin, developer_id)
        by_vault: dict[VaultId, list[tuple[str, Sequence[Reading]]]] = {}
        for subject, place in places.items():
            by_vault.setdefault(place.vault_id, []).append((place.account_id, work.readings[subject]))
        waiting = deque(by_vault.items())
        faults: list[CalloraFault] = []

        async def take_turns() -> None:
            while waiting:
                vault_id, asked = waiting.popleft()
                try:
                    await self._rate_vault(work, vault_id, metered, asked)
                except CalloraFault as fault:  # the other vaults are charged all the same
                    faults.append(fault)

        async with trio.open_nursery() as nursery:
            for _ in range(min(VAULTS_AT_ONCE, len(waiting))):
                nursery.start_soon(take_turns)
        if work.too_large:
            await self._set_aside(work, places)
        if faults:
            self._log.warning("vaults_not_rated", source_id=metered.source_id, vaults=len(faults))
            raise faults[0]
        return work.came_to

    async def _rate_vault(
        self, work: _Work, vault_id: VaultId, metered: Metered, asked: Sequence[tuple[str, Sequence[Reading]]]
    ) -> None:
        for part in _parts(asked):
            readings = tuple(
                AccountReadings(account_id, EventId(self._ids.uuid7()), tuple(some)) for account_id, some in part
            )
            outcome = await self._ask(vault_id, RateDelta(metered, readings, self._rule))
            work.too_large += outcome.too_large
            work.came_to += Rated(
                processed_samples=outcome.processed,
                written_minutes=outcome.written_minutes,
                replayed_minutes=outcome.replayed_minutes,
                quarantined=len(outcome.too_large),
                resets=outcome.resets,
            )

    async def _ask(self, vault_id: VaultId, command: RateDelta) -> DeltasRated:
        for _ in range(OVERLOADED_TRIES):
            outcome = await self._registry.ask(vault_id, command)
            if isinstance(outcome, DeltasRated):
                return outcome
            if isinstance(outcome, Draining):
                raise StoreUnavailable("the service is stopping")
            assert isinstance(outcome, Overloaded), outcome
            await trio.sleep(OVERLOADED_PAUSE_SECONDS)
        raise StoreUnavailable("the vault has too much to do")

    async def _set_aside(self, work: _Work, places: Mapping[str, accounts.Place]) -> None:
        subjects = {place.account_id: subject for subject, place in places.items()}
        samples = [(subjects[account_id], reading) for account_id, reading in work.too_large]
        self._log.error(
            "charge_too_large", source_id=work.origin.source_id, subjects=sorted({each for each, _ in samples})
        )
        await quarantine.add(self._database, work.origin, "charge_too_large", samples, self._clock.now())


def _collected_at(snapshot: Snapshot) -> datetime:
    return snapshot.collected_at


def _origin(source: MeterSource, snapshot: Snapshot) -> Origin:
    return Origin(
        source.source_id,
        snapshot.env,
        snapshot.node_id,
        source.meter,
        source.region,
        source.api_id,
        source.endpoint_id,
        source.first_seen,
        source.reset,
    )


def _metered(origin: Origin, developer_id: DeveloperId) -> Metered:
    return Metered(
        origin.source_id,
        origin.env,
        origin.node_id,
        origin.meter,
        origin.region,
        origin.first_seen,
        origin.reset,
        developer_id,
        origin.api_id,
        origin.endpoint_id,
    )


def _add(readings: dict[str, list[Reading]], snapshot: Snapshot) -> int:
    """Add a snapshot's samples to the readings of their subjects; return how many subjects add up to nonsense."""
    at, invalid = snapshot.collected_at, 0
    # A subject has one sample, as a rule: its reading is made once, and made again where another sample joins it.
    made: dict[str, Reading] = {}
    for sample in snapshot.samples:
        subject, known = sample.subject, made.get(sample.subject)
        if known is None:
            made[subject] = Reading(at, sample.up, sample.down, sample.inbound)
        else:
            line = known.line if known.line == sample.inbound else ""
            made[subject] = Reading(at, known.up + sample.up, known.down + sample.down, line)
    for subject, reading in made.items():
        if reading.up > TOTAL_MAX or reading.down > TOTAL_MAX:
            invalid += 1
        elif subject in readings:
            readings[subject].append(reading)
        else:
            readings[subject] = [reading]
    return invalid


Part = list[tuple[str, Sequence[Reading]]]


def _parts(asked: Iterable[tuple[str, Sequence[Reading]]]) -> Iterator[Part]:
    """Yield what one vault is asked in commands of READINGS_MAX at most, each account's readings in their order."""
    part: Part = []
    room = READINGS_MAX
    for account_id, readings in asked:
        start = 0
        while start < len(readings):
            some = readings[start : start + room]
            part.append((account_id, some))
            start += len(some)
            room -= len(some)
            if not room:
                yield part
                part, room = [], READINGS_MAX
    if part:
        yield part
