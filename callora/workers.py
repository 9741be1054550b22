"""Several worker processes on one port: started, watched, told to drain together.

Each is a whole service of its own; what keeps money right between them is the database, not this module.
"""

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

RESTARTS_MAX: Final = 5
RESTARTS_WINDOW_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 0.5


class _Watch:
    """The workers of one parent."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], log: FilteringBoundLogger) -> None:
        self._command = [sys.executable, "-m", "callora", *arguments]
        self._environ = environ
        self._log = log
        self._processes: set[trio.Process] = set()
        self._crashes: deque[float] = deque()
        self.stopping = False
        self.exit_code = 0

    async def keep_one(self) -> None:
        """Keep one worker running until told to stop."""
        while not self.stopping:
            # A worker drains when its standard input ends, so that none outlives a parent that was killed.
            process = await trio.lowlevel.open_process(
                self._command, env=dict(self._environ), stdin=subprocess.PIPE, start_new_session=True
            )
            self._processes.add(process)
            if self.stopping:  # told to while the worker was being started
                process.send_signal(signal.SIGTERM)
            code = await process.wait()
            self._processes.discard(process)
            if self.stopping:
                self._note_end(code)
                return
            self._log.error("worker_ended", pid=process.pid, code=code)
            if code == 2 or self._crash_too_often():
                self.exit_code = max(self.exit_code, code, 1)
                self.stop()
                return
            await trio.sleep(PAUSE_SECONDS)

    def stop(self) -> None:
        """Tell every worker to drain."""
        self.stopping = True
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def _note_end(self, code: int) -> None:
        # One that was still starting when it was told to stop dies of the signal, and had nothing in hand.
        if code != -signal.SIGTERM:
            self.exit_code = max(self.exit_code, code if code >= 0 else 1)

    def _crash_too_often(self) -> bool:
        now = trio.current_time()
        self._crashes.append(now)
        while self._crashes[0] < now - RESTARTS_WINDOW_SECONDS:
            self._crashes.popleft()
        if len(self._crashes) <= RESTARTS_MAX:
            return False
        self._log.error("workers_keep_ending", count=len(self._crashes), within_seconds=RESTARTS_WINDOW_SECONDS)
        return True


async def run_workers(
    count: int, arguments: Sequence[str], environ: Mapping[str, str], stop: trio.Event, log: FilteringBoundLogger
) -> int:
    """Run workers until `stop` is set, then until each has drained; return the worst of their exit codes.

    Args:
        count: how many.
        arguments: of `callora` for one worker.
    """
    watch = _Watch(arguments, environ, log)
    async with trio.open_nursery() as nursery:

        async def forward() -> None:
            await stop.wait()
            watch.stop()

        nursery.start_soon(forward)
        async with trio.open_nursery() as workers:
            for _ in range(count):
                workers.start_soon(watch.keep_one)
        nursery.cancel_scope.cancel()
    return watch.exit_code
