"""Supervision of long tasks: a crash is logged and the task started again, within an intensity; past it, the process
ends.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

import trio
from structlog.typing import FilteringBoundLogger

from callora.metrics import Metrics

RESTARTS_MAX: Final = 5
RESTARTS_WINDOW_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 0.1


class Supervisor:
    """Restarts the tasks it is given."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger, random: Random) -> None:
        self._metrics = metrics
        self._log = log
        self._random = random

    async def run(
        self,
        name: str,
        task: Callable[[], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run a task until it returns; start it again when it crashes.

        Raises:
            Exception: what the task raised, once it has crashed more than RESTARTS_MAX times within
                RESTARTS_WINDOW_SECONDS. The process then ends: a part that cannot run must not be served without.
        """
        crashes: deque[float] = deque()
        task_status.started()
        while True:
            try:
                await task()
                return
            except Exception:
                self._log.exception("task_crashed", task=name)
                self._metrics.actor_restarts.inc()
                now = trio.current_time()
                crashes.append(now)
                while crashes[0] < now - RESTARTS_WINDOW_SECONDS:
                    crashes.popleft()
                if len(crashes) > RESTARTS_MAX:
                    raise
                await trio.sleep(PAUSE_SECONDS * len(crashes) * (0.5 + self._random.random()))
