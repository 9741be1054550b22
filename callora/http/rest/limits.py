"""The pace of REST requests: by user, or by address where nobody is logged in. Exact within one process."""

import math
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from callora.http.problems import ProblemRaised
from callora.ledger.limits import SlidingLog

SWEEP_SECONDS: Final = 30.0
CALLERS_MAX: Final = 100_000
"""Callers of one rule that are kept; past it the one seen longest ago is forgotten."""


@attrs.frozen
class PaceRule:
    """How often each caller may ask for the paths that begin with one of these."""

    name: str
    prefixes: tuple[str, ...]
    requests_max: int
    window_seconds: float
    methods: frozenset[str] | None = None
    """The methods that count; None for all."""


class RestLimiter:
    """Admits requests. Plain methods: nothing here waits."""

    def __init__(self, rules: Sequence[PaceRule]) -> None:
        """Args:
        rules: the first with a fitting prefix and method counts; a request that fits none is not limited.
        """
        self._rules = tuple(rules)
        self._logs: dict[str, dict[str, SlidingLog]] = {rule.name: {} for rule in rules}

    def admit(self, method: str, path: str, caller: str) -> None:
        """Take one request from the caller's limit.

        Args:
            method: an operation's.
            path: its template.
            caller: `user:…` or `ip:…`.

        Raises:
            ProblemRaised: TOO_MANY_REQUESTS, which takes nothing.
        """
        rule = next((each for each in self._rules if _fits(each, method, path)), None)
        if rule is None:
            return
        now = trio.current_time()
        logs = self._logs[rule.name]
        log = logs.pop(caller, None) or SlidingLog(rule.requests_max, rule.window_seconds)
        logs[caller] = log  # the latest last
        if len(logs) > CALLERS_MAX:
            del logs[next(iter(logs))]
        refused = log.refuse(now)
        if refused is not None:
            seconds = max(1, math.ceil(refused.reset_seconds))
            raise ProblemRaised(
                "TOO_MANY_REQUESTS",
                details={"limitedBy": rule.name, "limit": refused.limit, "retryAfter": seconds},
                headers={"Retry-After": str(seconds)},
            )
        log.admit(now)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forget logs that have emptied, until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(SWEEP_SECONDS)
            now = trio.current_time()
            for logs in self._logs.values():
                for caller, log in tuple(logs.items()):
                    if log.is_empty(now):
                        del logs[caller]


def _fits(rule: PaceRule, method: str, path: str) -> bool:
    return path.startswith(rule.prefixes) and (rule.methods is None or method in rule.methods)
