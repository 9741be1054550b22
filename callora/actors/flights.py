"""Flights: work that one task of this process does for a name, apart from who waits for it.

Who asks for the same meanwhile gets the same outcome; who asks for something else under the name waits for his turn.
Who leaves does not stop the work. Between processes nothing is kept apart here: what is worked on is stored so that it
can be carried on by anyone.
"""

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import attrs
import trio

from callora.ledger.faults import OutcomeUnknown
from callora.ledger.outcomes import Draining

N = TypeVar("N", bound=Hashable)
T = TypeVar("T")


@attrs.frozen
class Landed(Generic[T]):
    """What a flight came to."""

    outcome: T
    joined: bool
    """Whether someone else had asked for it first."""


@attrs.define(eq=False)
class _Flight(Generic[T]):
    """One piece of work, and all who wait for it."""

    same: Hashable
    done: trio.Event = attrs.field(factory=trio.Event)
    landed: tuple[T] | None = None
    fault: Exception | None = None


class Flights(Generic[N, T]):
    """Keeps the work under each name to one task. Run it in a nursery."""

    def __init__(self, what: str) -> None:
        """Args:
        what: what is done, for the names of tasks.
        """
        self._what = what
        self._flights: dict[N, _Flight[T]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take work until cancelled; then what is under way is left to a retry."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def fly(self, name: N, same: Hashable, work: Callable[[], Awaitable[T]]) -> Landed[T] | Draining:
        """Do the work under this name, or wait for whoever does the same.

        Args:
            same: what makes two pieces of work under one name the same.
            work: does it.

        Returns:
            Draining without anything done, or what it came to.

        Raises:
            OutcomeUnknown: the service stopped at it. Otherwise what the work raised.

        Cancellation: the waiting ends; the work goes on.
        """
        flight = self._flights.get(name)
        while flight is not None and flight.same != same:
            await flight.done.wait()
            flight = self._flights.get(name)
        joined = flight is not None
        if flight is None:
            if self._nursery is None:
                await trio.lowlevel.checkpoint()
                return Draining()
            flight = self._flights[name] = _Flight(same)
            self._nursery.start_soon(self._do, name, flight, work, name=f"{self._what} {name}")
        await flight.done.wait()
        if flight.fault is not None:
            raise flight.fault
        assert flight.landed is not None
        return Landed(flight.landed[0], joined)

    async def _do(self, name: N, flight: _Flight[T], work: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.landed = (await work(),)
        except Exception as fault:  # raised to each who waits
            flight.fault = fault
        except BaseException:
            flight.fault = OutcomeUnknown("the service stopped at this request")
            raise
        finally:
            del self._flights[name]
            flight.done.set()
