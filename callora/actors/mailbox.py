"""How a command travels: an envelope with one reply, and the ask that waits for it."""

from typing import Generic, TypeVar

import attrs
import trio

from callora.ledger.commands import Command
from callora.ledger.faults import OutcomeUnknown
from callora.ledger.money import ZERO, Stroops

T = TypeVar("T")


class Reply(Generic[T]):
    """A channel for exactly one answer, at most one waiter, and no cost when nobody waits.

    A third of the price of a memory channel of size one, and one of these is spent on every hold and every capture.
    """

    __slots__ = ("_fault", "_settled", "_task", "_value")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._settled = False
        self._value: T
        self._fault: BaseException | None = None

    @property
    def settled(self) -> bool:
        """True once answered."""
        return self._settled

    def resolve(self, value: T) -> None:
        """Answer. An answer nobody reads is normal: the caller has gone."""
        assert not self._settled, "a command is answered once"
        self._value = value
        self._wake()

    def fail(self, fault: BaseException) -> None:
        """Answer with a fault, raised where the reply is awaited."""
        assert not self._settled, "a command is answered once"
        self._fault = fault
        self._wake()

    def _wake(self) -> None:
        self._settled = True
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    async def wait(self) -> T:
        """Return the answer.

        Raises:
            CalloraFault: what the command came to, when that is no outcome.

        Cancellation: the waiting ends, the command does not: it may still be carried out.
        """
        if self._settled:
            await trio.lowlevel.checkpoint()
        else:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abandon)
        if self._fault is not None:
            raise self._fault
        return self._value

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


@attrs.define(slots=True, eq=False)
class Envelope:
    """A command on its way through an actor."""

    command: Command
    reply: Reply[object] = attrs.field(factory=Reply)
    available: Stroops = ZERO
    """The vault's available balance when this command was decided."""
    credits: int = 0
    """What a hold that was decided takes in credits."""
    losses: int = 0
    """Rounds this command lost to another process."""
    look_up: bool = False
    """True: an earlier attempt may have been stored; ask the store before deciding again."""
    give_up_at: float = 0.0
    """On Trio's clock: until then a close is tried again after a fault."""

    def __enter__(self) -> "Envelope":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.reply.settled:
            self.reply.fail(OutcomeUnknown("the vault's actor ended before it answered"))
