"""Several worker processes on one port: started, watched, told to drain together.

Each is a whole service of its own; what keeps money right between them is the database, not this module.
"""

import signal
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
            process = await trio.lowlevel.open_process(self._command, env=dict(self._environ))
            self._processes.add(process)
            code = await process.wait()
            self._processes.discard(process)
            if self.stopping or code == 2:
                self.exit_code = max(self.exit_code, abs(code))
                self.stop()
                return
            self._log.error("worker_ended", pid=process.pid, code=code)
            now = trio.current_time()
            self._crashes.append(now)
            while self._crashes[0] < now - RESTARTS_WINDOW_SECONDS:
                self._crashes.popleft()
            if len(self._crashes) > RESTARTS_MAX:
                self.exit_code = 1
                self.stop()
                return
            await trio.sleep(PAUSE_SECONDS)

    def stop(self) -> None:
        """Tell every worker to drain."""
        self.stopping = True
        for process in self._processes:
            process.send_signal(signal.SIGTERM)


async def run_workers(
    count: int, arguments: Sequence[str], environ: Mapping[str, str], log: FilteringBoundLogger
) -> int:
    """Run workers until SIGTERM or SIGINT, then until each has drained; return the worst of their exit codes.

    Args:
        count: how many.
        arguments: of `callora` for one worker.
    """
    watch = _Watch(arguments, environ, log)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def forward() -> None:
                async for _ in signals:
                    watch.stop()

            nursery.start_soon(forward)
            async with trio.open_nursery() as workers:
                for _ in range(count):
                    workers.start_soon(watch.keep_one)
            nursery.cancel_scope.cancel()
    return watch.exit_code
