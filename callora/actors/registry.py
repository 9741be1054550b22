"""The vault registry: one actor for each active vault, made when a command comes, retired when idle.

An actor's task is started only when there is something that needs one: to wait for the store, to try again. The
registry supervises it. A crash drops the actor's cached state, never its mailbox; past the restart intensity the vault
fails closed for a while. Nothing here decides anything about money.
"""

from collections import deque
from random import Random
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.mailbox import Envelope
from callora.actors.turns import in_turns
from callora.actors.vault import VaultActor
from callora.actors.writer import LedgerStore, Writer
from callora.ledger.commands import CloseHold, Command
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import VaultId
from callora.ledger.outcomes import Draining, Overloaded
from callora.ledger.vault import VaultState
from callora.metrics import Metrics

RESTARTS_MAX: Final = 5
RESTARTS_WINDOW_SECONDS: Final = 30.0
"""More crashes than RESTARTS_MAX within this window, and the vault fails closed."""
FAILED_CLOSED_SECONDS: Final = 30.0
SWEEP_SECONDS: Final = 1.0
IDLE_SWEEPS: Final = 2
"""Sweeps that an actor sees without a command before it is retired."""
IDLE_SECONDS: Final = IDLE_SWEEPS * SWEEP_SECONDS
STATES_MAX: Final = 100_000
"""States of retired vaults that are kept, the latest retired: some 200 bytes each, and a call that reads nothing."""


@attrs.define(slots=True)
class _Record:
    """What is remembered of a vault whose actor has crashed."""

    crashes: deque[float] = attrs.field(factory=deque)
    closed_until: float = 0.0


class VaultRegistry:
    """Gives commands to vaults. Run it in a nursery; leaving it ends every actor after its last decision is stored."""

    def __init__(
        self,
        store: LedgerStore,
        writer: Writer,
        metrics: Metrics,
        log: FilteringBoundLogger,
        random: Random,
        mailbox_commands_max: int,
    ) -> None:
        self._store = store
        self._writer = writer
        self._metrics = metrics
        self._log = log
        self._random = random
        self._mailbox_commands_max = mailbox_commands_max
        self._actors: dict[VaultId, VaultActor] = {}
        self._states: dict[VaultId, VaultState] = {}
        self._records: dict[VaultId, _Record] = {}
        self._nursery: trio.Nursery | None = None
        self._closing = False
        self._closed = trio.Event()

    @property
    def active(self) -> int:
        """Vaults that have an actor now."""
        return len(self._actors)

    async def ask(self, vault_id: VaultId, command: Command) -> object:
        """Send a command and return what it came to (`ledger.outcomes`).

        Returns:
            Overloaded or Draining without anything done, or the command's own outcome.

        Raises:
            StoreUnavailable: nothing was written.
            OutcomeUnknown: it may have been stored; its id tells.

        Cancellation: the waiting ends; the command may still be carried out. Who cancels a PlaceHold sends its release.
        """
        envelope = Envelope(command)
        refusal = self.send(vault_id, envelope)
        if refusal is not None:
            await trio.lowlevel.checkpoint()
            return refusal
        return await envelope.reply.wait()

    def send(self, vault_id: VaultId, envelope: Envelope) -> Overloaded | Draining | None:
        """Queue a command without waiting; return why not, or None.

        The close of a hold is never refused for a full mailbox: there are no more of them than holds were admitted.
        """
        actor = self._actors.get(vault_id)
        if actor is None:
            if self._nursery is None or self._closing:
                return Draining()
            record = self._records.get(vault_id)
            if record is not None and record.closed_until > trio.current_time():
                envelope.reply.fail(StoreUnavailable("this vault's actor keeps failing"))
                return None
            actor = self._actors[vault_id] = VaultActor(
                vault_id,
                self._store,
                self._writer,
                self._random,
                self._start,
                self._states.pop(vault_id, None),
            )
        elif not isinstance(envelope.command, CloseHold) and actor.backlog >= self._mailbox_commands_max:
            return Overloaded()
        actor.idle_sweeps = 0
        actor.send(envelope)
        return None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the actors' nursery until `close`, then until every actor has ended.

        Cancellation: actors end at once; what was decided is still answered by the writer, the rest as unknown.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._sweep_until_closed)
            task_status.started()

    def close(self) -> None:
        """Take no commands for vaults without an actor, and let every actor end when its mailbox is empty."""
        self._closing = True
        self._closed.set()
        for vault_id in tuple(self._actors):
            self._retire(vault_id)

    def _start(self, actor: VaultActor) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._supervise, actor, name=f"vault {actor.vault_id}")

    def _retire(self, vault_id: VaultId) -> None:
        actor = self._actors.pop(vault_id)
        if actor.idle and actor.state is not None:
            # As good as one just read: what is stale in it, the guards of the round find, and no refusal rests on it.
            self._states[vault_id] = actor.state
            if len(self._states) > STATES_MAX:
                del self._states[next(iter(self._states))]
        actor.close()

    async def _sweep_until_closed(self) -> None:
        try:
            await self._sweep()
        finally:
            self.close()  # cancelled: the nursery takes no actor any more

    async def _sweep(self) -> None:
        """Retire idle actors: a vault nobody calls costs nothing."""
        while not self._closing:
            with trio.move_on_after(SWEEP_SECONDS):
                await self._closed.wait()
            deepest = 0
            for turn in in_turns(self._actors.values()):
                for actor in turn:
                    deepest = max(deepest, actor.depth)
                    # One that ended meanwhile may have a successor.
                    if actor.idle_sweeps >= IDLE_SWEEPS and actor.idle and self._actors.get(actor.vault_id) is actor:
                        self._retire(actor.vault_id)
                    actor.idle_sweeps += 1
                await trio.lowlevel.checkpoint()
            self._metrics.active_vaults.set(len(self._actors))
            self._metrics.vault_mailbox_depth_max.set(deepest)
            for vault_id, record in tuple(self._records.items()):
                if record.crashes[-1] < trio.current_time() - FAILED_CLOSED_SECONDS:
                    del self._records[vault_id]

    async def _supervise(self, actor: VaultActor) -> None:
        try:
            while True:
                try:
                    await actor.run()
                    return
                except Exception:
                    self._log.exception("vault_actor_crashed", vault_id=actor.vault_id)
                    self._metrics.actor_restarts.inc()
                    actor.abandon()
                    if self._fails_closed(actor.vault_id):
                        self._end(actor)
                        return
                    await trio.sleep(0.05 * self._random.random() * len(self._records[actor.vault_id].crashes))
        except BaseException:  # cancelled: nobody else would ever answer what it holds
            self._end(actor)
            raise

    def _end(self, actor: VaultActor) -> None:
        if self._actors.get(actor.vault_id) is actor:
            del self._actors[actor.vault_id]
        actor.end()

    def _fails_closed(self, vault_id: VaultId) -> bool:
        now = trio.current_time()
        record = self._records.setdefault(vault_id, _Record())
        record.crashes.append(now)
        while record.crashes[0] < now - RESTARTS_WINDOW_SECONDS:
            record.crashes.popleft()
        if len(record.crashes) <= RESTARTS_MAX:
            return False
        record.closed_until = now + FAILED_CLOSED_SECONDS
        return True
