"""A ledger store in memory, and everything that can go wrong between it and the actors.

`Tables` is what PostgreSQL would hold: it keeps the same constraints and tells when it had to use them.
`SimulatedStore` is one process's connection to it: each commit may be slow, lost, refused, stored without an answer, or
stored late.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, Protocol, TypeVar, runtime_checkable

import attrs
import trio

from callora.ledger.commands import (
    CloseHold,
    Deposit,
    ExtendHold,
    GiveBack,
    Grant,
    GrantQuota,
    LockedCommand,
    PlaceHold,
    RateDelta,
    Refund,
    ReviewDebt,
    SetPlan,
    SetStanding,
    Withdraw,
)
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    CloseState,
    EventFound,
    HoldExtended,
    HoldNotOpen,
    InsufficientFunds,
    RefundRefused,
    StandingSet,
    VaultMissing,
)
from callora.ledger.rounds import NO_VERSION, RoundResult, Share
from callora.ledger.vault import HoldPolicy, Standing, VaultState

Verb = Literal["load", "find", "round", "locked_round", "locked"]
Fate = Literal[
    "ok", "unavailable", "unknown_lost", "unknown_stored", "unknown_late", "conflict", "refused", "bug", "bug_stored"
]
"""What becomes of one call. `unknown_late` is stored after its caller was told that nobody knows."""

READ_FATES: tuple[Fate, ...] = ("unavailable", "bug")
WRITE_FATES: tuple[Fate, ...] = (
    "unavailable",
    "unknown_lost",
    "unknown_stored",
    "unknown_late",
    "conflict",
    "refused",
    "bug",
    "bug_stored",
)


@runtime_checkable
class Counting(Protocol):
    """A policy that knows whether it counted exactly."""

    exact: bool


def _is_exact(policy: HoldPolicy) -> bool:
    return isinstance(policy, Counting) and policy.exact


Policies = Callable[[VaultState], Sequence[HoldPolicy]]
"""The rules of a vault as it stands; the same number of them, whatever it has."""

T = TypeVar("T")


def no_policies(_: VaultState) -> Sequence[HoldPolicy]:
    """Return no rule: the balance and the standing alone decide."""
    return ()


class Bug(Exception):
    """What no code expects."""


@attrs.define
class VaultRow:
    """A row of vaults, and every balance and standing it ever had with the time it got it."""

    available: int
    held: int = 0
    version: int = 0
    rounds: int = 0
    placed: int = 0
    entry_seq: int = 0
    standing: Standing = "active"
    history: list[tuple[float, int, Standing]] = attrs.field(factory=list)


@attrs.define
class EventRow:
    """A row of usage_events."""

    vault_id: VaultId
    held_amount: int
    placed_at: float
    expires_at: float
    late: bool
    state: Literal["held"] | CloseState = "held"
    amount: int = 0
    outcome: str = ""
    closed_at: float | None = None


@attrs.frozen
class Entry:
    """A row of ledger_entries."""

    kind: str
    amount: int
    ref: str
    event_id: EventId | None
    seq: int


@attrs.define
class Tables:
    """The database that every process shares."""

    vaults: dict[VaultId, VaultRow] = attrs.field(factory=dict)
    events: dict[EventId, EventRow] = attrs.field(factory=dict)
    entries: dict[VaultId, list[Entry]] = attrs.field(factory=dict)
    keys: dict[tuple[VaultId, str], EventId] = attrs.field(factory=dict)
    guards_used: list[str] = attrs.field(factory=list)
    """Constraints that had to refuse what an actor should have refused."""
    closings: list[EventId] = attrs.field(factory=list)
    late: set[VaultId] = attrs.field(factory=set)
    """Vaults that a round changed after its writer was told that nobody knows."""

    def add_vault(self, vault_id: VaultId, amount: int, standing: Standing = "active") -> VaultRow:
        """Make a vault with a first deposit."""
        row = self.vaults[vault_id] = VaultRow(amount, standing=standing)
        self.entries[vault_id] = []
        if amount:
            row.entry_seq = 1
            self.entries[vault_id].append(Entry("deposit", amount, "first", None, 1))
        self._note(row)
        return row

    def state(self, vault_id: VaultId) -> VaultState:
        """Return a vault as its actor would read it."""
        row = self.vaults[vault_id]
        return VaultState(
            vault_id,
            Stroops(row.available),
            Stroops(row.held),
            row.version,
            row.standing,
            rules=row.version - row.rounds,
            placed=row.placed,
        )

    def _note(self, row: VaultRow) -> None:
        try:
            now = trio.current_time()
        except RuntimeError:
            now = float("-inf")
        row.history.append((now, row.available, row.standing))

    def _refuse(self, constraint: str) -> StoreRefused:
        self.guards_used.append(constraint)
        return StoreRefused(constraint, constraint=constraint, sqlstate="23514")

    def store_round(self, shares: Sequence[Share], *, late: bool = False) -> RoundResult:
        """What the round's statement does, all or nothing."""
        lost, drifted, missed = [], [], set()
        won = []
        guarded = any(share.guarded for share in shares)
        for share in shares:
            row = self.vaults[share.vault_id]
            if (
                row.available >= share.need
                and (not share.holds or row.standing == "active")
                and (not (share.guarded and share.holds) or self._admits(row, share))
            ):
                won.append(share)
            else:
                lost.append(self.state(share.vault_id))
        self._check(won)
        self.late |= {share.vault_id for share in won if late}
        for share in won:
            row = self.vaults[share.vault_id]
            version, changed = row.version, False
            # Closes see the rows as they were before the statement; of two for one row any one counts.
            open_before = {close.event_id for close in share.closes if self._closes(close, share.vault_id)}
            missed |= {close.event_id for close in share.closes} - open_before
            for close in share.closes:
                if close.event_id in open_before:
                    open_before.discard(close.event_id)
                    self._close(row, close)
                    changed = True
            for hold in share.holds:
                if self._place(share.vault_id, row, hold, late=late):
                    row.placed += hold.amount if guarded else 0
                    changed = True
                else:
                    missed.add(hold.event_id)
            row.version += changed
            row.rounds += changed and guarded
            self._note(row)
            if version != share.decided_version:
                drifted.append(self.state(share.vault_id))
        return RoundResult(lost, drifted, frozenset(missed))

    def _admits(self, row: VaultRow, share: Share) -> bool:
        if share.rules is None:
            return row.version == share.decided_version
        return row.version - row.rounds == share.rules and row.placed <= share.ceiling

    def _check(self, shares: Sequence[Share]) -> None:
        for share in shares:
            row = self.vaults[share.vault_id]
            freed = 0
            for close in share.closes:
                event = self.events.get(close.event_id)
                if event is not None and event.state == "held":
                    if not 0 <= close.amount <= event.held_amount:
                        raise self._refuse("amount_within_hold")
                    freed += event.held_amount - close.amount
            if row.available + freed - sum(hold.amount for hold in share.holds) < 0:
                raise self._refuse("available_not_negative")
            if any(hold.event_id in self.events for hold in share.holds):
                raise self._refuse("usage_events_pkey")

    def _closes(self, close: CloseHold, vault_id: VaultId) -> bool:
        event = self.events.get(close.event_id)
        if event is None or event.state != "held" or event.vault_id != vault_id:
            return False
        return close.state != "expired" or event.expires_at <= trio.current_time()

    def _close(self, row: VaultRow, close: CloseHold) -> None:
        event = self.events[close.event_id]
        event.state, event.amount, event.outcome = close.state, close.amount, close.delivery.outcome
        event.closed_at = trio.current_time()
        row.available += event.held_amount - close.amount
        row.held -= event.held_amount
        self.closings.append(close.event_id)

    def _place(self, vault_id: VaultId, row: VaultRow, hold: PlaceHold, *, late: bool) -> bool:
        if hold.claim is not None:
            if (vault_id, hold.claim.key) in self.keys:
                return False
            self.keys[vault_id, hold.claim.key] = hold.event_id
        now = trio.current_time()
        self.events[hold.event_id] = EventRow(vault_id, hold.amount, now, now + hold.ttl_seconds, late)
        row.available -= hold.amount
        row.held += hold.amount
        return True

    def store_locked(self, vault_id: VaultId, command: LockedCommand) -> object:
        """What a rare command does."""
        row = self.vaults.get(vault_id)
        if row is None:
            return VaultMissing()
        outcome = self._locked(vault_id, row, command)
        self._note(row)
        return outcome

    def _locked(self, vault_id: VaultId, row: VaultRow, command: LockedCommand) -> object:
        match command:
            case Deposit(amount, ref):
                return self._book(vault_id, row, "deposit", amount, ref, None)
            case Withdraw(amount, ref):
                return self._book(vault_id, row, "withdrawal", -amount, ref, None)
            case Grant(amount, ref):
                return self._book(vault_id, row, "grant", amount, ref, None)
            case GiveBack(amount, ref):
                return self._book(vault_id, row, "adjustment", amount, ref, None)
            case Refund(event_id, amount, ref):
                if not any(entry.kind == "refund" and entry.ref == ref for entry in self.entries[vault_id]):
                    event = self.events.get(event_id)
                    captured = event.amount if event is not None and event.state == "captured" else 0
                    left = captured - sum(entry.amount for entry in self.refunds(event_id))
                    if not 0 < amount <= left:
                        return RefundRefused(Stroops(left))
                return self._book(vault_id, row, "refund", amount, ref, event_id)
            case ExtendHold(event_id, seconds, amount):
                event = self.events.get(event_id)
                if event is None:
                    return HoldNotOpen(None)
                if event.state != "held":
                    return HoldNotOpen(event.state)
                if amount > row.available:
                    return InsufficientFunds(amount, Stroops(row.available))
                event.held_amount += amount
                event.expires_at = min(event.expires_at + seconds, event.placed_at + 86_400)
                row.available -= amount
                row.held += amount
                row.version += 1
                row.rounds += 1
                row.placed += amount
                return HoldExtended(Stroops(event.held_amount))
            case GrantQuota() | SetPlan() | RateDelta() | ReviewDebt():
                raise AssertionError("the simulation knows no quotas and no counters: they are tried on PostgreSQL")
            case SetStanding(standing):
                row.version += row.standing != standing
                row.standing = standing
                return StandingSet()

    def refunds(self, event_id: EventId) -> list[Entry]:
        """Return what was given back of an event's capture."""
        return [entry for entry in self.entries[self.events[event_id].vault_id] if entry.event_id == event_id]

    def _book(
        self, vault_id: VaultId, row: VaultRow, kind: str, amount: int, ref: str, event_id: EventId | None
    ) -> object:
        for entry in self.entries[vault_id]:
            if (entry.kind, entry.ref) == (kind, ref):
                return BalanceMoved(entry.seq, Stroops(row.available), repeated=True)
        if row.available + amount < 0:
            return InsufficientFunds(Stroops(-amount), Stroops(row.available))
        row.available += amount
        row.version += 1
        row.entry_seq += 1
        self.entries[vault_id].append(Entry(kind, amount, ref, event_id, row.entry_seq))
        return BalanceMoved(row.entry_seq, Stroops(row.available), repeated=False)


class Weather(Protocol):
    """Who decides what goes wrong."""

    def fate(self, verb: Verb) -> Fate:
        """Return what becomes of this call."""
        ...

    def delay(self) -> float:
        """Return seconds that one way to the database or back takes."""
        ...


class Scripted:
    """A weather told in advance: fates by verb, in order; then everything succeeds. A gate can hold a commit."""

    def __init__(self, **fates: Sequence[Fate]) -> None:
        self._fates = {verb: deque(each) for verb, each in fates.items()}
        self.calls: list[Verb] = []
        self.seconds = 0.0

    def fate(self, verb: Verb) -> Fate:
        self.calls.append(verb)
        left = self._fates.get(verb)
        return left.popleft() if left else "ok"

    def delay(self) -> float:
        return self.seconds


class SimulatedStore:
    """One process's way to the tables."""

    def __init__(self, tables: Tables, weather: Weather) -> None:
        self.tables = tables
        self._weather = weather
        self._late: list[tuple[float, Callable[[], object]]] = []
        self.policies: Policies = no_policies
        self.before_commit: Callable[[], object] = lambda: None
        """Called when a round has reached the database and before it is stored: what another process does then."""
        self.gate: trio.Event | None = None
        """A round on its way waits for it."""

    async def load_vaults(self, vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        return await self._read(
            "load", lambda: {each: self._state(each) for each in vault_ids if each in self.tables.vaults}
        )

    def _state(self, vault_id: VaultId) -> VaultState:
        state = self.tables.state(vault_id)
        state.limited = bool(self.policies(state))
        return state

    async def load_guarded(
        self, state: VaultState, known: VaultState | None, *, credited: bool, refusing: bool
    ) -> VaultState:
        if known is not None and known.guarded and known.rules == state.rules:
            if not refusing:
                state.policies = [each.carried(state.placed) for each in known.policies]
                return state
            if known.version == state.version and all(_is_exact(each) for each in known.policies):
                state.policies = known.policies
                return state
        state.policies = self.policies(self.tables.state(state.vault_id))
        return state

    async def find_event(self, vault_id: VaultId, event_id: EventId) -> EventFound | None:
        def found() -> EventFound | None:
            row = self.tables.events.get(event_id)
            if row is None or row.vault_id != vault_id:
                return None
            return EventFound(event_id, row.state, Stroops(row.held_amount), Stroops(row.amount))

        return await self._read("find", found)

    async def commit_round(self, shares: Sequence[Share]) -> RoundResult:
        # As bound parameters would be: what the actor does to its share afterwards is not sent.
        sent = [attrs.evolve(share, holds=list(share.holds), closes=list(share.closes)) for share in shares]
        self.lose_what_knows_no_limits(sent)
        return await self._write("round", lambda late: self.tables.store_round(sent, late=late))

    def lose_what_knows_no_limits(self, shares: Sequence[Share]) -> None:
        """Let holds of a limited vault lose that were decided without its limits, as the round's statement does."""
        for share in shares:
            if share.holds and not share.guarded and self._state(share.vault_id).limited:
                share.guarded, share.decided_version = True, NO_VERSION

    async def commit_locked_round(
        self, vault_id: VaultId, decide: Callable[[VaultState], Share], *, credited: bool
    ) -> tuple[Share, RoundResult]:
        def store(late: bool) -> tuple[Share, RoundResult]:
            state = self.tables.state(vault_id)
            state.policies = self.policies(state)
            share = decide(state)
            return share, self.tables.store_round([share], late=late)

        return await self._write("locked_round", store)

    async def commit_locked(self, vault_id: VaultId, command: LockedCommand) -> object:
        return await self._write("locked", lambda late: self.tables.store_locked(vault_id, command))

    def store_late(self, until: float = float("inf")) -> None:
        """Store what was sent without an answer and has arrived by now."""
        due = [each for each in self._late if each[0] <= until]
        self._late = [each for each in self._late if each[0] > until]
        for _, store in due:
            with suppress(CalloraFault):  # nobody is there any more to be told
                store()

    async def _read(self, verb: Verb, answer: Callable[[], T]) -> T:
        fate = self._weather.fate(verb)
        await self._travel()
        if fate == "unavailable":
            raise StoreUnavailable(f"simulated: {verb}")
        if fate == "bug":
            raise Bug(verb)
        answered = answer()
        await self._travel()
        return answered

    async def _write(self, verb: Verb, store: Callable[[bool], T]) -> T:
        fate = self._weather.fate(verb)
        await self._travel()
        if verb == "round":
            if self.gate is not None:
                await self.gate.wait()
            self.before_commit()
        self.store_late(trio.current_time())
        match fate:
            case "unavailable":
                raise StoreUnavailable(f"simulated: {verb}")
            case "conflict":
                raise StoreConflict(f"simulated: {verb}")
            case "refused":
                raise StoreRefused(f"simulated: {verb}", constraint=None, sqlstate="23514")
            case "bug":
                raise Bug(verb)
            case "unknown_lost":
                await self._travel()
                raise OutcomeUnknown(f"simulated: {verb}, lost")
            case "unknown_late" if verb == "round":
                self._late.append((trio.current_time() + 10 * self._weather.delay(), lambda: store(True)))
                raise OutcomeUnknown(f"simulated: {verb}, late")
        done = store(False)
        await self._travel()
        if fate == "bug_stored":
            raise Bug(verb)
        if fate != "ok":
            raise OutcomeUnknown(f"simulated: {verb}, stored")
        return done

    async def _travel(self) -> None:
        seconds = self._weather.delay()
        if seconds:
            await trio.sleep(seconds)
        else:
            await trio.lowlevel.checkpoint()
