"""One vault's actor: the only owner of its cached balance, one command at a time.

Decide on the cached state, persist through the writer, apply, reply: no reply overtakes its commit. The state is a
cache. A refusal is given only on a state read after the command came; a lost round, a failed commit or a crash drops
the state, and the truth is read again.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from typing import TypeVar

import trio

from callora.actors.mailbox import Envelope
from callora.actors.writer import LedgerStore, Stake, Writer
from callora.ledger.commands import CloseHold, Command, LockedCommand, PlaceHold, RoundCommand
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    HoldClosed,
    HoldNotOpen,
    HoldPlaced,
    IdempotencyKeyTaken,
    VaultMissing,
)
from callora.ledger.rounds import Share
from callora.ledger.vault import Refusal, VaultState, apply_close, apply_hold, carry, decide_hold

LOSSES_BEFORE_LOCK = 2
"""A command that lost this many rounds is stored with the vault's row locked, where it cannot lose."""
CLOSE_RETRY_SECONDS = 5.0
"""A close is tried again after a fault for this long: it is idempotent by its event, and its money waits for it."""
RETRY_PAUSE_SECONDS = 0.1
CONFLICT_RETRIES_MAX = 3
"""A deadlock or serialisation failure rolled everything back, so repeating the command is safe."""

T = TypeVar("T")


class VaultActor:
    """Serialises the commands of one vault."""

    __slots__ = (
        "_again",
        "_claiming",
        "_closing",
        "_doubted",
        "_ended",
        "_followers",
        "_hand",
        "_inbox",
        "_known",
        "_outbox",
        "_placing",
        "_random",
        "_settled_event",
        "_staked",
        "_stakes",
        "_start",
        "_store",
        "_writer",
        "depth",
        "idle_sweeps",
        "state",
        "vault_id",
    )

    def __init__(
        self,
        vault_id: VaultId,
        store: LedgerStore,
        writer: Writer,
        random: Random,
        start: "Callable[[VaultActor], None]",
        state: VaultState | None,
    ) -> None:
        """Args:
        start: called once, when there is something that only the actor's own task can do; starts `run`.
        state: the vault as it was last known, if it was.
        """
        self.vault_id = vault_id
        self._store = store
        self._writer = writer
        self._random = random
        self._start = start
        self._outbox: trio.MemorySendChannel[Envelope | None] | None = None
        self._inbox: trio.MemoryReceiveChannel[Envelope | None]
        self.depth = 0
        self.idle_sweeps = 0
        self.state = state
        self._known: VaultState | None = None  # what was known of a guarded vault whose state is forgotten
        self._stakes: deque[Stake] = deque()
        self._hand: deque[Envelope] = deque()
        self._doubted: deque[Envelope] = deque()
        self._again: deque[Envelope] = deque()
        self._placing: set[EventId] = set()
        self._closing: set[EventId] = set()
        self._followers: dict[EventId, list[Envelope]] = {}
        self._claiming: dict[str, EventId] = {}
        self._staked = 0
        self._ended = False
        self._settled_event: trio.Event | None = None

    @property
    def idle(self) -> bool:
        """True when nothing is queued, decided or on its way."""
        return not (self.depth or self._stakes or self._again or self._hand or self._doubted)

    @property
    def backlog(self) -> int:
        """Commands taken and not answered yet, wherever they wait: in the mailbox, in hand, or for their commit."""
        return self.depth + self._staked + len(self._hand) + len(self._doubted) + len(self._again)

    def send(self, envelope: Envelope) -> None:
        """Take a command. Never blocks and never refuses; the registry bounds what may be refused.

        With nothing before it and a cached state that admits it, a hold or a close is decided here and now: between
        checkpoints there is one thread of control, so this is the mailbox with nothing in it, less two task switches a
        command. Everything else is queued for the actor's own task, which most vaults never need.
        """
        command = envelope.command
        if (
            self.state is None
            or self.depth
            or self._hand
            or self._doubted
            or self._again
            or not isinstance(command, RoundCommand)
            or not self._decide_at_once(envelope, command)
        ):
            self.depth += 1
            self._post(envelope)

    def _post(self, envelope: Envelope | None) -> None:
        """Put a command, or None for a look at what is to be done again, before the actor's own task."""
        if self._outbox is None:
            self._open().send_nowait(envelope)
        else:
            self._outbox.send_nowait(envelope)

    def _open(self) -> trio.MemorySendChannel[Envelope | None]:
        # Unbounded for the closes of holds already placed, which must never be refused; holds are bounded by `depth`
        # where they are sent.
        self._outbox, self._inbox = trio.open_memory_channel[Envelope | None](float("inf"))
        self._start(self)
        return self._outbox

    def close(self) -> None:
        """Take no more commands; the actor's task, if there is anything left for it, ends when that is done."""
        if self._outbox is None and not self.idle:
            self._open()
        if self._outbox is not None:
            self._outbox.close()

    def _decide_at_once(self, envelope: Envelope, command: RoundCommand) -> bool:
        try:
            return self._decide(envelope, command, final=False)
        except Exception:
            # It will crash again in the actor's own task, where a supervisor sees it.
            return False

    async def run(self) -> None:
        """Carry out commands until the mailbox is closed and empty and every decision is stored.

        Cancellation: the caller ends the actor with `end`: commands not yet decided are answered as unknown, decided
        ones by the writer.
        """
        while True:
            if not self._again and not self._hand:
                try:
                    await self._take()
                except trio.EndOfChannel:
                    await self._settle()
                    if not self._again:
                        return
            while self.depth:
                self._receive(self._inbox.receive_nowait())
            self._hand.extend(self._again)
            self._again.clear()
            await self._work_off()

    def abandon(self) -> None:
        """After a crash: forget the cached state and answer what was in hand as unknown.

        Stakes already with the writer stay theirs to answer.
        """
        self.state = self._known = None
        waiting = [*self._take_waiting(), *self._again]
        self._again.clear()
        for envelope in waiting:
            if isinstance(envelope.command, PlaceHold):
                waiting += self._forget_placing(envelope.command)
        for envelope in waiting:
            with envelope:
                pass

    def end(self) -> None:
        """Answer everything not yet decided as unknown and take nothing more.

        Stakes with the writer are answered when it tells of them; what would be decided again then is unknown.
        """
        self._ended = True
        self.abandon()
        self.close()
        while self.depth:
            envelope = self._inbox.receive_nowait()
            self.depth -= envelope is not None
            if envelope is not None:
                with envelope:
                    pass

    # What the writer tells, between checkpoints, in the order of the stakes.

    def stored(self, stake: Stake, present: VaultState | None, missed: frozenset[EventId]) -> None:
        """Answer a stake that is durable."""
        self._end(stake)
        share = stake.share
        if present is not None:
            # Who is answered is told the balance as it is, not as it was thought to be.
            drift = present.available - stake.envelopes[-1].available
            for envelope in stake.envelopes:
                envelope.available = Stroops(envelope.available + drift)
            if self.state is not None:
                self._resume_from(self.state, present)
        if missed and (
            any(hold.event_id in missed for hold in share.holds)
            or any(close.event_id in missed for close in share.closes)
        ):
            self._void_decided()
        for envelope in stake.envelopes:
            command = envelope.command
            if isinstance(command, PlaceHold):
                followers = self._forget_placing(command)
                if command.event_id in missed:
                    envelope.reply.resolve(IdempotencyKeyTaken())
                else:
                    envelope.reply.resolve(HoldPlaced(envelope.available, envelope.credits))
                self._repeat(followers)
            elif isinstance(command, CloseHold):
                if command.event_id in missed:
                    envelope.look_up = True
                    self._repeat([envelope])
                else:
                    if share.guarded and self.state is not None and present is None:
                        apply_close(self.state, command)
                    envelope.reply.resolve(HoldClosed(command.state, command.amount, envelope.available))
                self._repeat(self._forget_closing(command))

    def lost(self, stake: Stake) -> None:
        """Decide a stake's commands again, on a state read anew."""
        self._end(stake)
        self._void_decided()
        for envelope in stake.envelopes:
            envelope.losses += 1
        self._repeat(stake.envelopes)
        for envelope in stake.envelopes:
            if isinstance(envelope.command, CloseHold):
                self._repeat(self._forget_closing(envelope.command))

    def failed(self, stake: Stake, fault: CalloraFault) -> None:
        """Answer holds with the fault; try closes again, looking up first what became of them."""
        self._end(stake)
        self._void_decided()
        for envelope in stake.envelopes:
            if isinstance(envelope.command, PlaceHold):
                followers = self._forget_placing(envelope.command)
                envelope.reply.fail(_told(fault))
                self._repeat(followers)
            elif isinstance(envelope.command, CloseHold):
                if isinstance(fault, StoreRefused) and len(stake.envelopes) == 1:
                    # An attempt before this one may yet be stored.
                    first = envelope.give_up_at == 0.0
                    envelope.reply.fail(_told(fault) if first else OutcomeUnknown(f"refused when repeated: {fault}"))
                else:
                    if not isinstance(fault, StoreUnavailable):
                        # Something in this round cannot be stored, or ended its connection: should it be this one, it
                        # takes no other command with it again.
                        envelope.losses = LOSSES_BEFORE_LOCK
                    self._retry_or_fail(envelope, fault)
                self._repeat(self._forget_closing(envelope.command))

    # The actor's own task.

    async def _take(self) -> None:
        self._receive(await self._inbox.receive())

    def _receive(self, envelope: Envelope | None) -> None:
        if envelope is not None:
            self.depth -= 1
            self._hand.append(envelope)

    async def _work_off(self) -> None:
        """Empty the hand: decide what the cached state allows, then what it would refuse on a state read anew."""
        while self._hand:
            envelope = self._hand[0]
            command = envelope.command
            if not isinstance(command, RoundCommand):
                await self._carry_out(envelope, command)
            elif isinstance(command, CloseHold) and command.event_id in self._placing:
                # Also one that is to be looked up: the store cannot know yet of a hold that has lost a round.
                self._followers.setdefault(command.event_id, []).append(envelope)
            elif envelope.look_up and isinstance(command, CloseHold):
                await self._look_up(envelope, command)
            elif envelope.losses >= LOSSES_BEFORE_LOCK:
                await self._store_locked(envelope, command)
            elif self.state is None and not await self._load(refusing=False):
                return
            elif not self._decide(envelope, command, final=False):
                # Its release, should it come now, waits for what becomes of it.
                self._placing.add(command.event_id)
                self._doubted.append(envelope)
            self._hand.popleft()
        while self._doubted and await self._load(refusing=True):
            for _ in range(len(self._doubted)):
                envelope = self._doubted[0]
                assert isinstance(envelope.command, PlaceHold)
                # What is decided and not stored may come to nothing, and is no reason to refuse.
                if self._decide(envelope, envelope.command, final=not self._stakes):
                    self._doubted.popleft()
                else:
                    self._doubted.rotate(-1)

    async def _load(self, *, refusing: bool) -> bool:
        """Read the vault's state once every decision is stored; answer all who wait for it when that cannot be done.

        Args:
            refusing: whether it is to be refused upon, and not only to be allowed upon what it allows.
        """
        await self._settle()
        try:
            found = (await self._store.load_vaults([self.vault_id])).get(self.vault_id)
            credited = any(_is_credited(each.command) for each in (*self._hand, *self._doubted))
            if found is not None and (found.limited or credited):
                known = self.state if refusing else self._known
                found = await self._store.load_guarded(found, known, credited=credited, refusing=refusing)
        except CalloraFault as fault:
            await self._refuse_for_now(fault)
            return False
        self.state, self._known = found, None
        if self.state is None:
            for envelope in self._take_waiting():
                if isinstance(envelope.command, PlaceHold):
                    self._repeat(self._forget_placing(envelope.command))
                envelope.reply.resolve(VaultMissing())
            return False
        return True

    def _take_waiting(self) -> list[Envelope]:
        waiting = [*self._doubted, *self._hand]
        self._doubted.clear()
        self._hand.clear()
        return waiting

    async def _refuse_for_now(self, fault: CalloraFault) -> None:
        for envelope in self._take_waiting():
            if isinstance(envelope.command, CloseHold):
                self._retry_or_fail(envelope, fault)
            else:
                if isinstance(envelope.command, PlaceHold):
                    self._repeat(self._forget_placing(envelope.command))
                envelope.reply.fail(_told(fault))
        if self._again:
            await self._pause()

    async def _pause(self) -> None:
        await trio.sleep(RETRY_PAUSE_SECONDS * (0.5 + self._random.random()))

    def _decide(self, envelope: Envelope, command: RoundCommand, *, final: bool) -> bool:
        """Decide one command on the cached state; return False for a refusal that wants a state read anew."""
        state = self.state
        assert state is not None
        if isinstance(command, PlaceHold):
            claim = command.claim
            if claim is not None and self._claiming.get(claim.key, command.event_id) != command.event_id:
                self._repeat(self._forget_placing(command))
                envelope.reply.resolve(IdempotencyKeyTaken())
                return True
            if command.unit_credits and (state.quota is None or state.quota.unsure(command, state.credits)):
                return False
            decided = decide_hold(state, command)
            if not isinstance(decided, PlaceHold):
                if final:
                    self._repeat(self._forget_placing(command))
                    envelope.reply.resolve(decided)
                return final
            share = self._stake(envelope).share
            share.place(decided)
            apply_hold(state, decided)
            share.bound(state, decided)
            envelope.credits = decided.credits
            self._placing.add(command.event_id)
            if claim is not None:
                self._claiming[claim.key] = command.event_id
        elif command.event_id in self._placing or command.event_id in self._closing:
            # The hold is not stored yet, and a close in its own round would not find it; or another close is on its
            # way, and of two in one round only one would count while both were answered as done.
            self._followers.setdefault(command.event_id, []).append(envelope)
            return True
        else:
            self._stake(envelope).share.close(command)
            self._closing.add(command.event_id)
            if state.guarded:
                # A close may find nothing, and no guard of the round would undo what a policy allowed because of it: in
                # a guarded vault money comes back when its close is stored.
                envelope.available = Stroops(state.available + command.held_amount - command.amount)
                return True
            apply_close(state, command)
        envelope.available = state.available
        return True

    def _stake(self, envelope: Envelope) -> Stake:
        stake = self._writer.stake(self, self.vault_id, self._new_share)
        if not self._stakes or self._stakes[-1] is not stake:
            self._stakes.append(stake)
        stake.envelopes.append(envelope)
        self._staked += 1
        return stake

    def _new_share(self) -> Share:
        state = self.state
        assert state is not None
        rules = state.rules if state.guarded else None
        share = Share(self.vault_id, state.version, state.guarded, rules, state.placed, state.placed_credits)
        state.version += 1
        return share

    async def _look_up(self, envelope: Envelope, command: CloseHold) -> None:
        """Decide a close whose earlier attempt may have been stored, from what the store says of its event."""
        await self._settle()
        try:
            event = await self._store.find_event(self.vault_id, command.event_id)
            states = await self._store.load_vaults([self.vault_id])
        except CalloraFault as fault:
            self._retry_or_fail(envelope, fault)
            await self._pause()
            return
        present = states.get(self.vault_id)
        self._forget()
        if present is not None and not present.limited:  # one that is, is of no use without what its limits count
            self.state = present
        if event is not None and event.state == "held" and command.state != "expired":
            envelope.look_up = False
            self._again.append(envelope)
        elif event is not None and event.state == command.state and event.amount == command.amount:
            assert present is not None, "a usage event has a vault"
            envelope.reply.resolve(HoldClosed(command.state, command.amount, present.available))
        else:
            envelope.reply.resolve(HoldNotOpen(None if event is None or event.state == "held" else event.state))

    async def _store_locked(self, envelope: Envelope, command: RoundCommand) -> None:
        """Store one command that keeps losing, decided while the vault's row is locked."""
        await self._settle()
        self._forget()
        refusals: list[Refusal] = []

        def decide(state: VaultState) -> Share:
            refusals.clear()  # an attempt before this one may have been rolled back
            share = Share(self.vault_id, state.version, guarded=True)
            if isinstance(command, CloseHold):
                share.close(command)
            elif isinstance(decided := decide_hold(state, command), PlaceHold):
                share.place(decided)
                envelope.credits = decided.credits
            else:
                refusals.append(decided)
            envelope.available = Stroops(state.available + share.available_change)
            return share

        try:
            share, result = await _past_conflicts(
                lambda: self._store.commit_locked_round(self.vault_id, decide, credited=_is_credited(command))
            )
        except CalloraFault as fault:
            self.failed(self._stake_alone(envelope), fault)
            return
        if refusals:
            assert isinstance(command, PlaceHold)
            self._repeat(self._forget_placing(command))
            envelope.reply.resolve(refusals[0])
        else:
            self.stored(self._stake_alone(envelope, share), None, result.missed)

    def _stake_alone(self, envelope: Envelope, share: Share | None = None) -> Stake:
        """Return a stake that never went through the writer, so that one way of ending stakes serves both."""
        stake = Stake(self, share or Share(self.vault_id, 0, guarded=True), [envelope])
        self._stakes.append(stake)
        self._staked += 1
        return stake

    async def _carry_out(self, envelope: Envelope, command: LockedCommand) -> None:
        """Carry out a rare command alone, when everything decided before it is stored."""
        await self._settle()
        self._forget()
        try:
            outcome = await _past_conflicts(lambda: self._store.commit_locked(self.vault_id, command))
        except CalloraFault as fault:
            envelope.reply.fail(_told(fault))
        else:
            envelope.reply.resolve(outcome)

    async def _settle(self) -> None:
        while self._stakes:
            self._settled_event = trio.Event()
            await self._settled_event.wait()

    # Small things.

    def _forget(self) -> None:
        """Let the state be read anew; what was read of a guarded vault's rules may still serve."""
        if self.state is not None:
            self._known = self.state if self.state.guarded else None
            self.state = None

    def _void_decided(self) -> None:
        """Forget a state that has not come to be, and what is decided on top of it and not sent yet."""
        self._forget()
        for stake in self._stakes:
            stake.share.void()

    def _end(self, stake: Stake) -> None:
        first = self._stakes.popleft()
        assert first is stake, "stakes end in the order they were taken"
        self._staked -= len(stake.envelopes)
        if not self._stakes and self._settled_event is not None:
            self._settled_event.set()

    def _resume_from(self, state: VaultState, present: VaultState) -> None:
        """Take over the state another process left, with what is decided since on top of it."""
        if state.guarded:
            if present.rules != state.rules:
                self._forget()
                return
            carry(state, present)
        for stake in self._stakes:
            for hold in stake.share.holds:
                apply_hold(present, hold)
            if not state.guarded:  # where it is, money comes back when a close is stored
                for close in stake.share.closes:
                    apply_close(present, close)
        present.version += len(self._stakes)
        # Decisions on the way may not fit what is there now: their round refuses them, and the state is read anew.
        self.state = present
        if present.available < 0:
            self._forget()

    def _repeat(self, envelopes: Sequence[Envelope]) -> None:
        if self._ended:
            for envelope in envelopes:
                if isinstance(envelope.command, PlaceHold):
                    self._repeat(self._forget_placing(envelope.command))
                with envelope:
                    pass
        elif envelopes:
            self._again.extend(envelopes)
            with suppress(trio.ClosedResourceError):  # the actor looks at what is to be repeated before it ends
                self._post(None)

    def _retry_or_fail(self, envelope: Envelope, fault: CalloraFault) -> None:
        now = trio.current_time()
        if envelope.give_up_at == 0.0:
            envelope.give_up_at = now + CLOSE_RETRY_SECONDS
        if now < envelope.give_up_at:
            envelope.look_up = True
            self._repeat([envelope])
        else:
            # Any one of the attempts may have been stored, whatever the last one came to.
            envelope.reply.fail(OutcomeUnknown(f"not known after {CLOSE_RETRY_SECONDS} s: {fault}"))

    def _forget_placing(self, command: PlaceHold) -> Sequence[Envelope]:
        self._placing.discard(command.event_id)
        if command.claim is not None and self._claiming.get(command.claim.key) == command.event_id:
            del self._claiming[command.claim.key]
        return self._follow(command.event_id)

    def _forget_closing(self, command: CloseHold) -> Sequence[Envelope]:
        self._closing.discard(command.event_id)
        return self._follow(command.event_id)

    def _follow(self, event_id: EventId) -> Sequence[Envelope]:
        return self._followers.pop(event_id, ()) if self._followers else ()


def _is_credited(command: Command) -> bool:
    return isinstance(command, PlaceHold) and command.unit_credits > 0


def _told(fault: CalloraFault) -> CalloraFault:
    """Return what a caller is told: that nothing was written, or that nobody knows."""
    if isinstance(fault, StoreConflict | StoreRefused):
        return StoreUnavailable(f"the database refused: {fault}")
    return fault


async def _past_conflicts(attempt: Callable[[], Awaitable[T]]) -> T:
    for _ in range(CONFLICT_RETRIES_MAX):
        try:
            return await attempt()
        except StoreConflict:
            continue
    return await attempt()
