"""What PostgreSQL would keep of transactions, in memory, with the same constraints; and what can go wrong on the way to
either. `tests/store/test_transactions.py` holds the real one to the same rules.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from random import Random
from typing import Final, TypeVar

import attrs
import trio

from callora.actors.follower import Store
from callora.ledger.chain import Applied, Retained
from callora.ledger.faults import OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable
from callora.ledger.submission import OPEN, FeeBump, Submission
from callora.store.transactions import Epoch, OpenSubmission, Taken

T = TypeVar("T")


@attrs.define
class StoredRow:
    """A row of chain_transactions."""

    submission: Submission
    stored_at: datetime
    touched_at: datetime


@attrs.define
class ChainTables:
    """The database that every process shares."""

    rows: dict[str, StoredRow] = attrs.field(factory=dict)
    epoch: Epoch = attrs.field(factory=lambda: Epoch(1, None))
    refusals: list[str] = attrs.field(factory=list)
    """Rules of the database that had to refuse what no process should have tried."""

    def change(self, tx_hash: str, **changes: object) -> Submission:
        """Change a row."""
        row = self.rows[tx_hash]
        row.submission = attrs.evolve(row.submission, **changes)  # type: ignore[arg-type]
        return row.submission

    def open_row(self, tx_hash: str, *states: str) -> Submission | None:
        """Return a row in one of these states."""
        submission = self.rows[tx_hash].submission
        return submission if submission.state in (states or OPEN) else None

    def taken(self, new: Submission) -> Taken | None:
        """Return what is in the way of a row, in the order in which PostgreSQL looks."""
        if self.epoch.halted is not None or self.epoch.number != new.epoch:
            return "network"
        others = [row.submission for row in self.rows.values()]
        for each in others:
            if each.purpose == new.purpose and (
                each.state in OPEN or (each.closes_purpose and each.epoch == new.epoch)
            ):
                return "purpose"
        for each in others:
            same_channel = (
                each.channel and each.envelope.source == new.envelope.source and each.epoch == new.epoch and new.channel
            )
            if same_channel and each.state in ("stored", "sent"):
                return "channel"
        for each in others:
            same = each.channel and each.envelope.source == new.envelope.source and each.epoch == new.epoch
            used = each.state in ("stored", "sent", "succeeded", "failed")
            if same and new.channel and used and each.envelope.sequence == new.envelope.sequence:
                return "sequence"
        return None

    def refuse(self, rule: str) -> StoreRefused:
        """Return a refusal that no process should need."""
        self.refusals.append(rule)
        return StoreRefused(rule, constraint=rule, sqlstate="23001")


@attrs.define(eq=False)
class MemoryStore:
    """A store on the tables."""

    tables: ChainTables

    async def epoch(self, _: str) -> Epoch:
        """Return the history."""
        return await self._read(lambda: self.tables.epoch)

    async def add(self, submission: Submission, now: datetime) -> Taken | None:
        """Store an envelope."""

        def write() -> Taken | None:
            if submission.hash in self.tables.rows:
                return None
            taken = self.tables.taken(submission)
            if taken is None:
                self.tables.rows[submission.hash] = StoredRow(submission, now, now)
            return taken

        return await self._write(write)

    async def find(self, tx_hash: str) -> Submission | None:
        """Return what is stored under a hash."""

        def look() -> Submission | None:
            found = self.tables.rows.get(tx_hash)
            if found is not None:
                return found.submission
            return next((row.submission for row in self.tables.rows.values() if tx_hash in row.submission.hashes), None)

        return await self._read(look)

    async def of_purpose(self, _: str, purpose: str) -> list[Submission]:
        """Return everything stored for a purpose."""
        return await self._read(
            lambda: [row.submission for row in self.tables.rows.values() if row.submission.purpose == purpose]
        )

    async def open_ones(self, _: str) -> list[OpenSubmission]:
        """Return what may be applied."""
        return await self._read(
            lambda: [
                OpenSubmission(row.submission, row.stored_at, row.touched_at)
                for row in self.tables.rows.values()
                if row.submission.state in OPEN
            ]
        )

    async def busy_channels(self, _: str, epoch: int) -> frozenset[str]:
        """Return the channels in use."""
        return await self._read(
            lambda: frozenset(
                row.submission.envelope.source
                for row in self.tables.rows.values()
                if row.submission.channel
                and row.submission.epoch == epoch
                and row.submission.state in ("stored", "sent")
            )
        )

    async def last_sequence(self, _: str, epoch: int, channel: str) -> int | None:
        """Return the last sequence number known to be used."""
        return await self._read(
            lambda: max(
                (
                    row.submission.envelope.sequence
                    for row in self.tables.rows.values()
                    if row.submission.channel
                    and row.submission.epoch == epoch
                    and row.submission.envelope.source == channel
                    and row.submission.state in ("succeeded", "failed")
                ),
                default=None,
            )
        )

    async def begin_send(self, tx_hash: str, now: datetime) -> Submission | None:
        """Count a send."""

        def write() -> Submission | None:
            found = self.tables.open_row(tx_hash, "stored", "sent")
            if found is None:
                return None
            self.tables.rows[tx_hash].touched_at = now
            return self.tables.change(tx_hash, state="sent", sends=found.sends + 1)

        return await self._write(write)

    async def note_untaken(self, tx_hash: str, refusal: str | None) -> Submission | None:
        """Count a send that came to nothing."""

        def write() -> Submission | None:
            found = self.tables.open_row(tx_hash, "sent", "unresolved")
            if found is None or found.untaken >= found.sends:
                return None
            return self.tables.change(tx_hash, untaken=found.untaken + 1, refusal=refusal or found.refusal)

        return await self._write(write)

    async def add_bump(self, tx_hash: str, bump: FeeBump, now: datetime) -> bool:
        """Store a fee-bump."""

        def write() -> bool:
            found = self.tables.open_row(tx_hash, "stored", "sent")
            if found is None or not found.sponsored:
                return False
            if bump in found.bumps:
                return True
            if bump.bid < 10 * found.highest_bid:
                return False
            self.tables.change(tx_hash, bumps=(*found.bumps, bump))
            return True

        return await self._write(write)

    async def finish(self, tx_hash: str, applied: Applied, now: datetime, *, closes_purpose: bool) -> bool:
        """Note that it is in a ledger."""

        def write() -> bool:
            if self.tables.open_row(tx_hash) is None:
                return False
            if applied.successful and not closes_purpose:
                raise self.tables.refuse("succeeded_closes")
            state = "succeeded" if applied.successful else "failed"
            self.tables.change(tx_hash, state=state, applied=applied, closes_purpose=closes_purpose)
            return True

        return await self._write(write)

    async def bury(self, tx_hash: str, proof: Retained | None, now: datetime) -> bool:
        """Note that it is dead."""

        def write() -> bool:
            found = self.tables.open_row(tx_hash)
            if found is None or (proof is None and found.sends != found.untaken):
                return False
            if not (found.took_nothing or (proof is not None and self._proves(found, proof))):
                raise self.tables.refuse("dead_only_with_proof")
            self.tables.change(tx_hash, state="dead")
            return True

        return await self._write(write)

    def _proves(self, found: Submission, proof: Retained) -> bool:
        past = proof.latest.closed_at.timestamp() > found.envelope.max_time
        covered = proof.oldest <= found.prepared_ledger <= proof.latest.sequence
        return past and (covered or self.tables.epoch.number > found.epoch)

    async def shelve(self, tx_hash: str, proof: Retained) -> bool:
        """Note that nobody can tell."""

        def write() -> bool:
            found = self.tables.open_row(tx_hash, "sent")
            if found is None:
                return False
            if proof.latest.closed_at.timestamp() <= found.envelope.max_time:
                raise self.tables.refuse("unresolved_only_past_its_time")
            self.tables.change(tx_hash, state="unresolved")
            return True

        return await self._write(write)

    async def _read(self, look: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return look()

    async def _write(self, write: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return write()


READS: Final = frozenset(("epoch", "find", "of_purpose", "open_ones", "busy_channels", "last_sequence"))


@attrs.define(eq=False)
class FaultyStore:
    """One process's way to a store: each verb may be slow, fail, be lost, or be carried out without an answer."""

    store: Store
    random: Random
    faults: float = 0.0
    """0 to 1: how many verbs go wrong."""
    slow: float = 0.01
    """Seconds that one way takes, mostly."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        verb: Callable[..., Awaitable[object]] = getattr(self.store, name)

        async def through(*args: object, **options: object) -> object:
            await self._pause()
            fate = "ok"
            if self.random.random() < self.faults:
                fate = "unavailable" if name in READS else self.random.choice(WRITE_FATES)
            if fate == "unavailable":
                raise StoreUnavailable("the database is away")
            if fate == "conflict":
                raise StoreConflict("a deadlock")
            if fate == "lost":
                raise OutcomeUnknown("sent and lost")
            done = await verb(*args, **options)
            await self._pause()
            if fate == "stored":
                raise OutcomeUnknown("stored without an answer")
            return done

        return through

    async def _pause(self) -> None:
        await trio.sleep(self.slow * self.random.random() * (20 if self.random.random() < 0.01 else 1))


WRITE_FATES: Final = ("unavailable", "conflict", "lost", "stored")
