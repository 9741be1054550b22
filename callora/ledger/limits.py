"""Pace: sliding-window logs. Exact: at most `limit` calls in any window, and a refused call does not extend it."""

from collections import deque

import attrs


@attrs.frozen(slots=True)
class Pace:
    """Where a limit stands after a question."""

    limit: int
    remaining: int
    """Calls that would be admitted now."""
    reset_seconds: float
    """Until the oldest call leaves the window and one more is admitted; 0 when the log is empty."""


class SlidingLog:
    """When the admitted calls of one window came."""

    __slots__ = ("_times", "limit", "window_seconds")

    def __init__(self, limit: int, window_seconds: float) -> None:
        self.limit = limit
        self.window_seconds = window_seconds
        self._times: deque[float] = deque()

    def refuse(self, now: float) -> Pace | None:
        """Return where the log stands when it refuses, or None when one more call may be admitted; records nothing."""
        times = self._times
        floor = now - self.window_seconds
        while times and times[0] <= floor:
            times.popleft()
        return self.pace(now) if len(times) >= self.limit else None

    def admit(self, now: float) -> None:
        """Record an admitted call; ask `refuse` first."""
        self._times.append(now)

    def pace(self, now: float) -> Pace:
        """Return where the log stands; call after `refuse` at the same `now`."""
        return Pace(self.limit, self.remaining, self.reset_seconds(now))

    @property
    def remaining(self) -> int:
        """Calls that would be admitted, as of the last question."""
        return max(0, self.limit - len(self._times))

    def reset_seconds(self, now: float) -> float:
        """Return how long until the oldest call leaves the window; 0 when the log is empty."""
        return max(0.0, self._times[0] + self.window_seconds - now) if self._times else 0.0

    def is_empty(self, now: float) -> bool:
        """Tell whether nothing is left in the window, so that the log can be forgotten."""
        return not self._times or self._times[-1] <= now - self.window_seconds
