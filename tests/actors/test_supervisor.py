"""Long tasks are started again after a crash, within an intensity."""

from random import Random

import pytest
import trio
import trio.testing

from callora.actors.supervisor import RESTARTS_MAX, RESTARTS_WINDOW_SECONDS, Supervisor
from tests.simulation.support import METRICS, Log


def supervisor(log: Log) -> Supervisor:
    """Return a supervisor that logs here."""
    return Supervisor(METRICS, log.logger(), Random(0))


async def test_a_task_that_returns_is_done(autojump_clock: trio.testing.MockClock) -> None:
    log, runs = Log(), 0

    async def task() -> None:
        nonlocal runs
        runs += 1
        await trio.lowlevel.checkpoint()

    await supervisor(log).run("task", task)
    assert (runs, log.events) == (1, [])


async def test_a_task_that_crashes_is_started_again(autojump_clock: trio.testing.MockClock) -> None:
    log, runs = Log(), 0

    async def task() -> None:
        nonlocal runs
        runs += 1
        await trio.lowlevel.checkpoint()
        if runs < RESTARTS_MAX:
            raise RuntimeError("bug")

    await supervisor(log).run("task", task)
    assert log.events == ["task_crashed"] * (RESTARTS_MAX - 1)


async def test_past_the_intensity_the_crash_is_raised(autojump_clock: trio.testing.MockClock) -> None:
    log = Log()

    async def task() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await supervisor(log).run("task", task)
    assert len(log.events) == RESTARTS_MAX + 1


async def test_rare_crashes_never_add_up(autojump_clock: trio.testing.MockClock) -> None:
    log, runs = Log(), 0

    async def task() -> None:
        nonlocal runs
        runs += 1
        await trio.sleep(RESTARTS_WINDOW_SECONDS / 2)
        if runs < 4 * RESTARTS_MAX:
            raise RuntimeError("bug")

    await supervisor(log).run("task", task)


async def test_cancellation_is_no_crash(autojump_clock: trio.testing.MockClock) -> None:
    log = Log()
    with trio.move_on_after(1) as scope:
        await supervisor(log).run("task", trio.sleep_forever)
    assert scope.cancelled_caught
    assert log.events == []
