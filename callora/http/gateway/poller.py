"""The poller: one epoll that knows the gateway's sockets for their whole life, and one task that waits for it; and the
outbox: what tasks have to send, sent when all of them have had their turn.

Trio arms its own epoll anew for every wait, a system call and some bookkeeping each time; here a socket is registered
once, edge-triggered, and what is known of it is remembered. The rules of edges (epoll(7), and nginx lives by the same):
try before waiting; a read that returned less than it asked for, or nothing, has emptied the socket, and whatever comes
after it is told again; an end that was told stays true. A word too many is harmless, for whoever is woken tries again.
"""

import select
from collections.abc import Callable
from typing import Final

import trio

_ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READABLE: Final = select.EPOLLIN | _ENDED
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
EVENTS_A_TURN: Final = 64
"""Sockets told of in a row. Whoever they wake runs in one go: with all of some hundred connections that is a hundredth
of a second or two in which no round is sent and nobody else has a turn."""


class Watch:
    """What is known of one socket, and who waits for it: at most one reader and one writer."""

    __slots__ = ("_descriptor", "_poller", "_reader", "_writer", "ended", "on_end", "on_writable", "readable")

    def __init__(self, poller: "Poller", descriptor: int) -> None:
        self._poller = poller
        self._descriptor = descriptor
        self._reader: trio.lowlevel.Task | None = None
        self._writer: trio.lowlevel.Task | None = None
        self.readable = False
        """False: a read would find nothing. True: it may find something; whoever finds nothing sets it to False."""
        self.ended = False
        """True once the other side, or we, have ended its direction: there is something to read for ever."""
        self.on_end: Callable[[], object] | None = None
        """Called when that happens, also while nobody waits."""
        self.on_writable: Callable[[], object] | None = None
        """Called when a write that was refused, or taken in part, may go on, before whoever waits for it is woken."""

    def drained(self) -> None:
        """Note that a read has found less than it asked for."""
        self.readable = self.ended

    async def wait_readable(self) -> None:
        """Wait until a read may find something; only while `readable` is False. Cancellation: nothing is lost."""
        assert self._reader is None, "one reader at a time"
        self._reader = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._forget_reader)

    async def wait_writable(self) -> None:
        """Wait until a write that was refused, or taken in part, may go on. Cancellation: nothing is lost."""
        assert self._writer is None, "one writer at a time"
        self._writer = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._forget_writer)

    def close(self) -> None:
        """Forget the socket, before it is closed; whoever waits for it is woken, and finds it closed. Idempotent."""
        self._poller.forget(self, self._descriptor)
        self.on_end = self.on_writable = None
        self.told(_READABLE | _WRITABLE)

    def told(self, events: int) -> None:
        """Take note of an edge."""
        if events & _READABLE:
            self.readable = True
            if self._reader is not None:
                trio.lowlevel.reschedule(self._reader)
                self._reader = None
        if events & _WRITABLE:
            if self.on_writable is not None:
                self.on_writable()
            if self._writer is not None:
                trio.lowlevel.reschedule(self._writer)
                self._writer = None
        if events & _ENDED and not self.ended:
            self.ended = True
            if self.on_end is not None:
                self.on_end()

    def _forget_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _forget_writer(self, _: object) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED


class Outbox(trio.abc.Instrument):
    """What is to be sent before Trio waits for anything, or gives anyone another turn.

    A send wakes whoever reads at the other end. Where that is a process of this machine, and idle, waking it costs more
    than the send; of sends in a row the first wakes it and the others find it awake.
    """

    def __init__(self) -> None:
        self._pushes: list[Callable[[], object]] = []
        self.opened = False
        """Whether anything that is put in will be sent: while the poller runs."""

    def put(self, push: Callable[[], object]) -> None:
        """Have `push` called at the end of this turn; it must not raise, nor wake a task: Trio may be about to wait."""
        self._pushes.append(push)

    def before_io_wait(self, timeout: float) -> None:
        """Send; Trio calls this once a turn, and never again after an exception: from then on all is sent at once."""
        if self._pushes:
            pushes, self._pushes = self._pushes, []
            crash: Exception | None = None
            for push in pushes:
                try:
                    push()
                except Exception as error:  # raised when the others have been sent, whose callers count on it
                    crash = error
            if crash is not None:
                self.opened = False
                raise crash


class Poller:
    """The sockets that are watched. A crash of `run` may lose an edge: it is not restarted, the process ends."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self._epoll = select.epoll()
        self._watches: dict[int, Watch] = {}

    def watch(self, descriptor: int, *, end_only: bool = False) -> Watch:
        """Watch a socket until its watch is closed.

        Args:
            end_only: for a socket that somebody else reads and writes: only its end is told.
        """
        events = select.EPOLLRDHUP if end_only else select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP
        self._epoll.register(descriptor, events | select.EPOLLET)
        watch = self._watches[descriptor] = Watch(self, descriptor)
        return watch

    def forget(self, watch: Watch, descriptor: int) -> None:
        """Watch a socket no longer."""
        if self._watches.get(descriptor) is watch:
            del self._watches[descriptor]
            self._epoll.unregister(descriptor)

    async def run(self) -> None:
        """Tell every watch what its socket is ready for, and empty the outbox each turn, until cancelled."""
        watches, outbox = self._watches, self.outbox
        trio.lowlevel.add_instrument(outbox)
        outbox.opened = True
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll)
                # Nothing is closed and no descriptor used again before all of it is told: there is no checkpoint in it.
                for descriptor, events in self._epoll.poll(0, EVENTS_A_TURN):
                    watch = watches.get(descriptor)
                    if watch is not None:
                        watch.told(events)
        finally:
            if outbox.opened:
                outbox.opened = False
                trio.lowlevel.remove_instrument(outbox)
            outbox.before_io_wait(0)

    def close(self) -> None:
        """Close the epoll; every watch is closed before."""
        trio.lowlevel.notify_closing(self._epoll)
        self._epoll.close()
