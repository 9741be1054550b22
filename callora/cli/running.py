"""What every command does alike: reading settings, running until it is told to stop, saying what went wrong."""

import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

import click
import trio

from callora.config.loading import ConfigurationInvalid, load_settings
from callora.config.settings import Settings
from callora.ledger.faults import CalloraFault, ChainMismatch, leaves_of
from callora.logs import Logs
from callora.service import SystemClock
from callora.store.bridge import StatementRejected


def fail(message: str, code: int) -> NoReturn:
    """End the process with a message as an error.

    Args:
        code: the exit code, 2 where settings or arguments are wrong, else 1.
    """
    click.echo(message, err=True)
    sys.exit(code)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings of an environment; where any is invalid, name all that are and end the process."""
    try:
        return load_settings(environ)
    except ConfigurationInvalid as error:
        fail(f"The configuration is invalid:\n{error}", 2)


def make_logs(settings: Settings, clock: SystemClock) -> Logs:
    """Return the logs that the settings ask for, not yet entered."""
    return Logs(clock, level=settings.log_level, as_json=settings.is_production)


def run_and_exit(main: Callable[[], Awaitable[int]]) -> NoReturn:
    """Run a command in Trio and end the process with the code it returns, or with a line on what went wrong.

    Raises:
        Exception: of what went wrong a line does not say enough.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to clean up
    try:
        code = trio.run(main)
    except Exception as raised:  # not `except*`: leaving the process from there raises a group on Python 3.11.2
        leaves = list(leaves_of(raised))
        if not all(map(_tellable, leaves)):
            raise
        fail(f"callora: {said_of(leaves[0])}", 2 if isinstance(leaves[0], ChainMismatch) else 1)
    sys.exit(code)


def _tellable(error: BaseException) -> bool:
    """Tell whether a line says enough of an error; of what else goes wrong the traceback is wanted."""
    if isinstance(error, StatementRejected):
        return error.of_older_schema
    return isinstance(error, CalloraFault | OSError)


def said_of(error: BaseException) -> str:
    """Return what to tell of an error; without its number where it is the system's and says all by itself."""
    if isinstance(error, StatementRejected):
        return "the database has no schema yet, or an older one: run callora migrate"
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


class Stop:
    """What SIGTERM and SIGINT do: before calls are taken they end the start, from then on they begin the drain."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.starting = trio.CancelScope()
        self.started = False

    def now(self) -> None:
        """Stop; called again, it joins the stop under way."""
        self.event.set()
        if not self.started:
            self.starting.cancel()

    def as_drain(self) -> trio.Event:
        """Return the event that begins the drain; from here on stopping cancels nothing."""
        self.started = True
        return self.event


async def run_until_stopped(main: Callable[[Stop], Awaitable[int]], *, until_stdin_ends: bool = False) -> int:
    """Run what SIGTERM and SIGINT can stop, and return its exit code; 0 where it was stopped before it took calls.

    Args:
        until_stdin_ends: whether the end of our standard input, a pipe that our parent holds open, stops it as well.
    """
    stop = Stop()
    code = 0
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for _ in signals:
                    stop.now()

            async def outlive() -> None:
                await trio.lowlevel.wait_readable(sys.stdin.fileno())
                stop.now()

            nursery.start_soon(listen)
            if until_stdin_ends:
                nursery.start_soon(outlive)
            with stop.starting:
                code = await main(stop)
            nursery.cancel_scope.cancel()
    return code
