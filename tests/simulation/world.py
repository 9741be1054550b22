"""A whole world from one seed: callers, two processes, a bad database, crashes and clock jumps; and who audits it.

The auditor knows nothing of actors. It sees each command when it is sent, each answer in the instant it is given, and
the tables; what it demands is the design's rules, not what the code does.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import attrs
import trio
import trio.testing
from trio._core import _run as scheduler

from callora.actors.compensation import Compensator, Undelivered
from callora.actors.mailbox import Envelope, Reply
from callora.actors.registry import VaultRegistry
from callora.actors.supervisor import Supervisor
from callora.actors.vault import VaultActor
from callora.actors.writer import Writer
from callora.ledger.commands import (
    CloseHold,
    Command,
    Delivery,
    Deposit,
    ExtendHold,
    Grant,
    IdempotencyClaim,
    PlaceHold,
    Refund,
    SetStanding,
    Withdraw,
    capture,
    expire,
    release,
)
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    Draining,
    HoldClosed,
    HoldExtended,
    HoldNotOpen,
    HoldPlaced,
    IdempotencyKeyTaken,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
    RefundRefused,
    StandingRefused,
    StandingSet,
    VaultMissing,
)
from callora.ledger.vault import HoldPolicy, VaultState
from callora.service import SystemClock
from tests.simulation.store import READ_FATES, WRITE_FATES, Fate, SimulatedStore, Tables, Verb
from tests.simulation.support import CHARGED, IDS, METRICS, QUIET

SOLO: Final = VaultId("vault-solo")
"""Only the first process uses it, so its actor never loses a round for another's sake, and its cache is exact."""
CAPPED: Final = VaultId("vault-capped")
"""Guarded by its version: a policy caps what it holds."""
POOR: Final = VaultId("vault-poor")
RICH: Final = VaultId("vault-rich")
MISSING: Final = VaultId("vault-missing")
HELD_MAX: Final = 150
PATIENCE_SECONDS: Final = 200.0
"""On the simulation's clock: whoever has no answer by then never gets one."""


class Wrong(Exception):
    """A rule of the design is broken."""


@attrs.define
class Cap:
    """A policy: what is held never exceeds HELD_MAX; now and then it crashes."""

    world: "World"
    held: int
    """By the vault when it was read, and since."""
    placed: int
    """By the vault, ever, when it was read."""
    exact: bool = True
    counted: int = attrs.Factory(lambda self: self.held, takes_self=True)

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Return why the hold may not be placed, or None."""
        bad_spell = trio.current_time() < self.world.bad_spell_until
        if self.world.weather.stormy and self.world.random.random() < (0.6 if bad_spell else 0.01):
            raise RuntimeError("a policy with a bug")
        return PolicyRefused("CAPPED", {}) if self.held + command.amount > HELD_MAX else None

    def place(self, command: PlaceHold) -> None:
        """Count a hold."""
        self.held += command.amount

    def room(self, command: PlaceHold) -> int | None:
        """Return how much others may place before a hold would be one too many, or now and then that they may not."""
        return HELD_MAX - self.held if self.world.random.random() < 0.7 else None

    def close(self, command: CloseHold) -> None:
        """Count the end of one."""
        self.held -= command.held_amount

    def carried(self, placed: int) -> "Cap":
        """Count what others may hold as well."""
        return Cap(self.world, self.counted + placed - self.placed, placed, exact=False)


@attrs.define
class RandomWeather:
    """What goes wrong, by chance."""

    random: Random
    faults: float
    """0 to 1: how many calls go wrong."""
    slow: float
    """Seconds that one way takes at most, mostly."""
    stormy: bool = True
    away_until: float = 0.0

    def fate(self, verb: Verb) -> Fate:
        """Return what becomes of this call."""
        if not self.stormy:
            return "ok"
        if trio.current_time() < self.away_until:
            return "unavailable"
        if self.random.random() >= self.faults:
            return "ok"
        fates = READ_FATES if verb in ("load", "find") else WRITE_FATES
        fate = self.random.choice(fates)
        # A bug each time would only show that vaults fail closed.
        return "unavailable" if fate.startswith("bug") and self.random.random() < 0.6 else fate

    def delay(self) -> float:
        """Return seconds that one way takes."""
        return self.slow * self.random.random() * (20 if self.random.random() < 0.02 else 1)


class WatchedReply(Reply[object]):
    """A reply that the auditor sees in the instant it is given."""

    __slots__ = ("_watch",)

    def __init__(self, watch: Callable[[object], None]) -> None:
        super().__init__()
        self._watch = watch

    def resolve(self, value: object) -> None:
        """Show, then answer."""
        self._watch(value)
        super().resolve(value)

    def fail(self, fault: BaseException) -> None:
        """Show, then answer."""
        self._watch(fault)
        super().fail(fault)


@attrs.define(eq=False)
class Sent:
    """A command, and what its sender was told."""

    vault_id: VaultId
    command: Command
    at: float
    process: "Process"
    answer: object = None


@attrs.define(eq=False)
class Auditor:
    """Checks every answer against the tables when it is given, and everything at the end."""

    tables: Tables
    sent: list[Sent] = attrs.field(factory=list)
    wrong: list[str] = attrs.field(factory=list)
    repeated: set[str] = attrs.field(factory=set)
    """References of commands that were sent again, since nobody knew what became of them."""

    def expects(self, holds: bool, sent: Sent, rule: str) -> None:
        """Note a broken rule."""
        if not holds:
            self.wrong.append(f"{rule}: {sent.command} was answered {sent.answer!r}")

    def answered(self, sent: Sent, answer: object) -> None:
        """Check an answer in the instant it is given."""
        sent.answer = answer
        command, row = sent.command, None
        if isinstance(command, PlaceHold | CloseHold | Refund | ExtendHold):
            row = self.tables.events.get(command.event_id)
        match answer:
            case HoldPlaced():
                self.expects(row is not None, sent, "no reply before its commit")
            case HoldClosed(state, amount):
                self.expects(
                    row is not None and row.state == state and row.amount == amount,
                    sent,
                    "a hold that is said to be closed is closed so",
                )
            case HoldNotOpen(None):
                # A hold stored after its caller was told that nobody knows is left to the sweep.
                self.expects(
                    row is None or row.late or (isinstance(command, CloseHold) and command.state == "expired"),
                    sent,
                    "a hold that is said not to exist does not",
                )
            case HoldNotOpen(state):
                self.expects(row is not None and row.state == state, sent, "a hold is closed as it is said to be")
            case InsufficientFunds(required, available):
                known = available < required and any(each[0] == available for each in self._seen(sent))
                self.expects(known, sent, "a refusal for balance names a stored balance since the command was sent")
                self.expects(row is None or not isinstance(command, PlaceHold), sent, "what is refused is not stored")
            case StandingRefused(standing):
                known = any(each[1] == standing for each in self._seen(sent))
                self.expects(known and row is None, sent, "a refusal for standing names a stored standing")
            case BalanceMoved(seq):
                assert isinstance(command, Deposit | Withdraw | Refund | Grant)
                found = [each for each in self.tables.entries[sent.vault_id] if each.ref == command.ref]
                self.expects([each.seq for each in found] == [seq], sent, "an entry is booked once")
            case (
                PolicyRefused()
                | IdempotencyKeyTaken()
                | Overloaded()
                | Draining()
                | VaultMissing()
                | HoldExtended()
                | StandingSet()
                | RefundRefused()
            ):
                pass
            case StoreUnavailable() | OutcomeUnknown():
                pass
            case _:
                self.expects(False, sent, "an answer is an outcome or one of two faults")

    def _seen(self, sent: Sent) -> Sequence[tuple[int, str]]:
        """Return the balances and standings that the vault had since the command was sent."""
        history = self.tables.vaults[sent.vault_id].history
        seen = []
        for at, available, standing in reversed(history):
            seen.append((available, standing))
            if at < sent.at:
                break
        return seen

    def refused_by_rule(self, sent: Sent) -> bool:
        """Tell whether the answer promises that nothing was stored."""
        promises = (
            PolicyRefused,
            IdempotencyKeyTaken,
            Overloaded,
            Draining,
            VaultMissing,
            InsufficientFunds,
            StandingRefused,
            StoreUnavailable,
        )
        return isinstance(sent.answer, promises)

    def close_books(self) -> None:
        """Check everything, once nothing moves any more."""
        tables = self.tables
        for rule in tables.guards_used:
            self.wrong.append(f"an actor relied on the database's own constraint: {rule}")
        if len(tables.closings) != len(set(tables.closings)):
            self.wrong.append("a hold was closed twice")
        for sent in self.sent:
            if sent.answer is None and not sent.process.crashed:
                self.wrong.append(f"never answered: {sent.command}")
            if isinstance(sent.command, CloseHold) and sent.command.state != "expired":
                row = tables.events.get(sent.command.event_id)
                absent = sent.answer == HoldNotOpen(None)
                self.expects(not absent or row is None or row.late, sent, "a hold is not placed after its release")
            if not self.refused_by_rule(sent):
                continue
            if isinstance(sent.command, PlaceHold):
                stored = sent.command.event_id in tables.events
                self.expects(not stored, sent, "what is refused is not stored, ever")
            elif isinstance(sent.command, CloseHold) and sent.command.state != "expired":
                row = tables.events.get(sent.command.event_id)
                stored = row is not None and row.outcome == sent.command.delivery.outcome
                self.expects(not stored or row is None or row.state != sent.command.state, sent, "what failed did not")
            elif isinstance(sent.command, Deposit | Withdraw | Grant):
                booked = any(each.ref == sent.command.ref for each in tables.entries[sent.vault_id])
                self.expects(
                    not booked or sent.command.ref in self.repeated, sent, "what is refused is not booked, ever"
                )
        for vault_id, vault in tables.vaults.items():
            events = [each for each in tables.events.values() if each.vault_id == vault_id]
            held = sum(each.held_amount for each in events if each.state == "held")
            posted = sum(each.amount for each in tables.entries[vault_id])
            spent = sum(each.amount for each in events if each.state == "captured")
            if vault.held != held or vault.available + vault.held != posted - spent:
                self.wrong.append(f"money is not conserved in {vault_id}")
            if min(each[1] for each in vault.history) < 0:
                self.wrong.append(f"{vault_id} was overdrawn")
            if held:
                self.wrong.append(f"a hold of {vault_id} outlived its time")
        if CAPPED in tables.vaults:
            most = _most_held(tables, CAPPED)
            if most > HELD_MAX:
                self.wrong.append(f"a policy was passed over: {most} held at once")


def _most_held(tables: Tables, vault_id: VaultId) -> int:
    moves: list[tuple[float, int, int]] = []
    for row in tables.events.values():
        if row.vault_id == vault_id:
            moves.append((row.placed_at, 1, row.held_amount))
            if row.closed_at is not None:
                moves.append((row.closed_at, 0, -row.held_amount))
    held = most = 0
    for _, _, amount in sorted(moves):
        held += amount
        most = max(most, held)
    return most


class Process:
    """One process: its writer, its registry, its compensator and the calls in its hands."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.crashed = False
        self.store = SimulatedStore(world.tables, world.weather)
        self.store.policies = world.policies
        self.writer = Writer(self.store, METRICS, QUIET, 6)
        self.registry = VaultRegistry(self.store, self.writer, METRICS, QUIET, world.random, 12)
        self.compensator = Compensator(self.registry, SystemClock(), IDS, QUIET)
        self.scope = trio.CancelScope()
        self.nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Live until the scope is cancelled: a crash, as far as the tables can tell."""
        supervisor = Supervisor(METRICS, QUIET, self.world.random)
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await nursery.start(supervisor.run, "writer", self.writer.run)
                await nursery.start(self.registry.run)
                await nursery.start(self.compensator.run)
                task_status.started()
                await trio.sleep_forever()

    def crash(self) -> None:
        """End at once, whatever is in hand."""
        self.crashed = True
        self.scope.cancel()

    def send(self, vault_id: VaultId, command: Command) -> tuple[Sent, Envelope]:
        """Send a command under the auditor's eyes."""
        sent = Sent(vault_id, command, trio.current_time(), self)
        auditor = self.world.auditor
        auditor.sent.append(sent)
        envelope = Envelope(command, WatchedReply(lambda answer: auditor.answered(sent, answer)))
        refusal = self.registry.send(vault_id, envelope)
        if refusal is not None:
            envelope.reply.resolve(refusal)
        return sent, envelope

    async def ask(self, vault_id: VaultId, command: Command) -> object:
        """Send a command and return what it came to, a fault as a value."""
        _, envelope = self.send(vault_id, command)
        try:
            return await envelope.reply.wait()
        except CalloraFault as fault:
            return fault


@attrs.define(eq=False)
class Call:
    """What one call came to, as its caller knows."""

    event_id: EventId
    amount: int
    process: Process
    delivered: bool = False
    withheld: bool = False
    """Its capture is unknown, and it was given to the compensator."""


class World:
    """Everything that one seed makes."""

    def __init__(self, seed: int, steps: int) -> None:
        self.random = random = Random(seed)
        self.steps = steps
        self.tables = Tables()
        self.auditor = Auditor(self.tables)
        self.weather = RandomWeather(random, random.choice((0.0, 0.05, 0.2)), random.choice((0.001, 0.02, 0.2)))
        self.tables.add_vault(SOLO, random.choice((0, 100, 500)))
        self.tables.add_vault(CAPPED, 400)
        self.tables.add_vault(POOR, random.choice((0, 40, 90)))
        self.tables.add_vault(RICH, 5000)
        self.calls: list[Call] = []
        self.busy = 0
        self.bad_spell_until = 0.0
        """Until then a policy crashes so often that its vault fails closed."""
        self._numbers = 0
        self._unknown_refs: list[tuple[VaultId, Command]] = []

    def policies(self, state: VaultState) -> tuple[HoldPolicy, ...]:
        """Return the policies of a vault."""
        return (Cap(self, state.held, state.placed),) if state.vault_id == CAPPED else ()

    def number(self) -> int:
        """Return a new number."""
        self._numbers += 1
        return self._numbers

    async def run(self, clock: trio.testing.MockClock) -> None:
        """Let it all happen, then come to rest, then audit."""
        async with trio.open_nursery() as nursery:
            processes = [Process(self), Process(self)]
            for process in processes:
                await nursery.start(process.run)
            pace = self.random.choice((0.002, 0.02, 0.2))
            for _ in range(self.steps):
                if self.random.random() < 0.7:
                    await trio.sleep(self.random.expovariate(1 / pace))
                await self._step(nursery, processes, clock)
            await self._come_to_rest(processes, clock)
            for process in processes:
                process.registry.close()
            nursery.cancel_scope.cancel()
        self.auditor.close_books()
        self._audit_calls()

    async def _step(self, nursery: trio.Nursery, processes: list[Process], clock: trio.testing.MockClock) -> None:
        random = self.random
        which = random.randrange(2)
        process = processes[which]
        vault_id = random.choice((POOR, POOR, RICH, CAPPED, SOLO))
        if vault_id == SOLO:
            which, process = 0, processes[0]
        chance = random.random()
        if chance < 0.80:
            process.nursery.start_soon(self._call, process, vault_id)
        elif chance < 0.90:
            process.nursery.start_soon(self._move, process, vault_id)
        elif chance < 0.93:
            self._expire(processes)
        elif chance < 0.95:
            standing = random.choice(("active", "active", "suspended", "arrears"))
            process.send(vault_id, SetStanding(standing))  # type: ignore[arg-type]
        elif chance < 0.96:
            clock.jump(random.choice((0.5, 3.0, 6.0, 31.0)))
        elif chance < 0.97:
            self.weather.away_until = trio.current_time() + random.choice((0.2, 2.0, 8.0))
        elif chance < 0.975:
            process.crash()
            processes[which] = Process(self)
            await nursery.start(processes[which].run)
        elif chance < 0.985 and vault_id != SOLO:
            self._interfere(vault_id)
        elif chance < 0.99:
            self.bad_spell_until = trio.current_time() + random.choice((0.2, 2.0))
            process.nursery.start_soon(self._press_on, process)
        elif chance < 0.995:
            process.send(MISSING, PlaceHold(self._event(), Stroops(1), 5, CHARGED))
        else:
            self._check_cache(processes[0])

    def _event(self) -> EventId:
        return EventId(f"event-{self.number()}")

    def _interfere(self, vault_id: VaultId) -> None:
        """What a third process does behind the actors' backs."""
        amount = self.random.randint(1, 60)
        ref = f"third-{self.number()}"
        command = Deposit(Stroops(amount), ref) if self.random.random() < 0.5 else Withdraw(Stroops(amount), ref)
        self.tables.store_locked(vault_id, command)

    def _check_cache(self, process: Process) -> None:
        actor: VaultActor | None = process.registry._actors.get(SOLO)
        if actor is None or not actor.idle or actor.state is None or SOLO in self.tables.late:
            return
        # What only limited vaults are read with is not kept up.
        if actor.state != attrs.evolve(self.tables.state(SOLO), rules=actor.state.rules, placed=actor.state.placed):
            self.auditor.wrong.append(f"an undisturbed cache went astray: {actor.state} {self.tables.state(SOLO)}")

    async def _call(self, process: Process, vault_id: VaultId) -> None:
        """One call, as the gateway makes it: whatever happens, its hold is closed or given to who closes it."""
        self.busy += 1
        random = self.random
        event_id = self._event()
        amount = random.choice((0, 1, 10, 30, 60, 90))
        claim = None
        if random.random() < 0.3:
            claim = IdempotencyClaim(f"key-{random.randrange(40)}", bytes(32), None, 86_400)
        hold = PlaceHold(event_id, Stroops(amount), random.choice((1, 5, 60)), CHARGED, claim)
        call = Call(event_id, amount, process)
        self.calls.append(call)
        asked = True
        try:
            with trio.move_on_after(math.inf if random.random() < 0.7 else random.random() * 0.05):
                if random.random() < 0.05:
                    # The client is gone before its hold is even taken from the mailbox.
                    process.send(vault_id, hold)
                    return
                outcome = await process.ask(vault_id, hold)
                if not isinstance(outcome, HoldPlaced | CalloraFault):
                    asked = False
                    return
                if isinstance(outcome, CalloraFault):
                    return
                if random.random() < 0.5:
                    await trio.sleep(random.random() * 0.1)
                if random.random() < 0.1:
                    process.send(vault_id, ExtendHold(event_id, random.choice((1, 30))))
                if random.random() < 0.75:
                    asked = False
            if not asked:
                await self._capture(process, vault_id, call)
        finally:
            if asked:
                delivery = Delivery(f"released {self.number()}")
                process.send(vault_id, release(event_id, Stroops(amount), delivery))
            self.busy -= 1

    async def _press_on(self, process: Process) -> None:
        """Call a vault in its bad spell again and again, several times at once."""
        self.busy += 1
        try:
            while trio.current_time() < self.bad_spell_until:
                for _ in range(3):
                    process.nursery.start_soon(self._call, process, CAPPED)
                await trio.sleep(0.3 * self.random.random())
        finally:
            self.busy -= 1

    async def _capture(self, process: Process, vault_id: VaultId, call: Call) -> None:
        spent = Stroops(call.amount if self.random.random() < 0.7 else self.random.randint(0, call.amount))
        delivery = Delivery(f"delivered {self.number()}")
        command = capture(call.event_id, Stroops(call.amount), spent, delivery)
        if self.random.random() < 0.05:
            # Someone else ends the same hold at the same time.
            process.send(vault_id, release(call.event_id, Stroops(call.amount), Delivery(f"twin {self.number()}")))
        outcome = await process.ask(vault_id, command)
        if isinstance(outcome, CalloraFault):
            call.withheld = True
            process.compensator.add(Undelivered(vault_id, call.event_id, Stroops(call.amount), spent))
        elif isinstance(outcome, HoldClosed):
            call.delivered = True

    async def _move(self, process: Process, vault_id: VaultId) -> None:
        """A deposit, grant or withdrawal, repeated under its reference until it is known."""
        self.busy += 1
        try:
            amount, ref = Stroops(self.random.randint(1, 120)), f"ref-{self.number()}"
            make = self.random.choice((Deposit, Deposit, Grant, Withdraw, Withdraw))
            command: Deposit | Grant | Withdraw = make(amount, ref)
            while isinstance(await process.ask(vault_id, command), OutcomeUnknown):
                await trio.sleep(0.5)
                self.auditor.repeated.add(ref)
        finally:
            self.busy -= 1

    def _expire(self, processes: list[Process]) -> None:
        """What the sweep does: ends what is due, and now and then what another process's sweep ends too."""
        now = trio.current_time()
        for event_id, row in tuple(self.tables.events.items()):
            if row.state == "held" and (row.expires_at <= now or self.random.random() < 0.05):
                process = processes[0] if row.vault_id == SOLO else self.random.choice(processes)
                process.send(row.vault_id, expire(event_id, Stroops(row.held_amount)))

    async def _come_to_rest(self, processes: list[Process], clock: trio.testing.MockClock) -> None:
        self.weather.stormy = False
        for process in processes:
            process.store.store_late()
        with trio.move_on_after(PATIENCE_SECONDS):
            # A hold that is stored later would not be due when the sweep comes for the last time.
            while (  # noqa: ASYNC110
                self.busy or self._unanswered() or any(each.compensator._pending for each in processes)
            ):
                await trio.sleep(0.5)
        for process in processes:
            process.store.store_late()  # what was on its way when the storm ended
        self._check_cache(processes[0])
        clock.jump(100.0)  # past every hold's time, and past every vault's closure
        with trio.move_on_after(PATIENCE_SECONDS):
            for _ in range(3):
                self._expire(processes)
                await trio.sleep(1.0)
                while self._unanswered():  # noqa: ASYNC110
                    await trio.sleep(0.5)

    def _unanswered(self) -> bool:
        return any(sent.answer is None and not sent.process.crashed for sent in self.auditor.sent)

    def _audit_calls(self) -> None:
        """No charge without a delivered success, no delivered success without a charge."""
        for call in self.calls:
            row = self.tables.events.get(call.event_id)
            spent = 0 if row is None else row.amount - sum(each.amount for each in self.tables.refunds(call.event_id))
            if call.delivered and (row is None or row.state != "captured" or self.tables.refunds(call.event_id)):
                self.auditor.wrong.append(f"delivered without a charge: {call.event_id}")
            if not call.delivered and spent and not call.process.crashed:
                self.auditor.wrong.append(f"charged {spent} without a delivery: {call.event_id}")


def simulate(seed: int, steps: int = 150) -> list[str]:
    """Run the world of a seed and return every rule that it broke."""
    return run_world(seed, steps).auditor.wrong


def run_world(seed: int, steps: int = 150) -> World:
    """Run the world of a seed, the same way every time, and return it as it ended."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    world = World(seed, steps)
    # Trio deals the tasks of a batch by chance. This is its own way, made for Hypothesis, to have them dealt by a seed.
    scheduler._hypothesis_plugin_setup()
    scheduler._r.seed(seed)
    try:
        trio.run(world.run, clock, clock=clock)
    except Exception:
        world.auditor.wrong.append(traceback.format_exc())
    return world
