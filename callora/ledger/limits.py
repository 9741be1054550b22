"""Pace: sliding-window logs. Exact: at most `limit` calls in any window, and a refused call does not extend it."""

from collections import deque
from collections.abc import Sequence

import attrs

from callora.ledger.values import value


@value
class Limit:
    """How many calls in which time."""

    calls: int
    window_seconds: float


@value
class SharedCount:
    """What the store of shared limits counted for one of them."""

    which: str
    """`key` or `user`."""
    limit: Limit
    calls: int
    """In the window, with the call that was asked for where it was let in."""
    oldest_us: int
    """When the oldest of them came; the store's own time where there is none."""

    @property
    def remaining(self) -> int:
        """Calls that would be admitted."""
        return max(0, self.limit.calls - self.calls)


@value
class Standing:
    """Where the tighter of a call's limits stood when another process decided on it, or the limit that refused it."""

    which: str
    """`key` or `user`."""
    limit: Limit
    remaining: int
    refused: bool
    reset_at: float
    """When the oldest call leaves the window, on Trio's clock."""
    reset_timestamp: float
    """The same in seconds since 1970, on the clock that decided."""


def stand(full: int, now_us: int, counts: Sequence[SharedCount], now: float) -> Standing:
    """Return where a call's limits stand.

    Args:
        full: which of the counts refused the call, from 1; 0 where it was let in.
        now_us: when that was decided, on the clock that decided, in microseconds since 1970.
        counts: the user's before the key's; of two that are as tight, the key's is told.
        now: on Trio's clock.
    """
    tighter = counts[full - 1] if full else min(reversed(counts), key=lambda count: count.remaining)
    reset_us = tighter.oldest_us + round(tighter.limit.window_seconds * 1_000_000)
    left_seconds = max(0.0, (reset_us - now_us) / 1_000_000)
    remaining = 0 if full else tighter.remaining
    return Standing(tighter.which, tighter.limit, remaining, bool(full), now + left_seconds, reset_us / 1_000_000)


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
