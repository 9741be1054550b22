"""Circuit breakers: a pure state, one for a dependency. Plain methods on a clock that is passed in."""

from typing import Final, Literal

import attrs

State = Literal["closed", "open", "half_open"]

BREAKERS_MAX: Final = 20_000
TRIAL_SECONDS: Final = 1.0
"""How long to stay away while a trial is under way."""


@attrs.frozen(slots=True)
class BreakerSettings:
    """When a breaker opens and closes."""

    failures: int
    """In a row, that open it."""
    cooldown_seconds: float
    """It stays open before it admits a trial."""
    successes: int
    """Trials in a row, that close it."""


@attrs.frozen
class Figures:
    """What a breaker has seen. Instants are on the clock that it is given."""

    state: State
    consecutive_failures: int
    """Up to now, whatever they did to the state."""
    consecutive_successes: int
    total_failures: int
    total_successes: int
    last_failure_at: float | None
    last_change_at: float | None
    """When the state became what it is; None: it has never been another."""


@attrs.define(slots=True, eq=False)
class Breaker:
    """Refuses fast while a dependency fails. A cancelled call counts neither as a success nor as a failure."""

    settings: BreakerSettings
    state: State = "closed"
    _failures: int = 0
    _successes: int = 0
    _opened_at: float = 0.0
    _trial: bool = False
    _era: int = 0
    """Grows when an operator steps in: what was admitted before says nothing about what holds since."""
    _run: int = 0
    """How many ends in a row were alike: successes above 0, failures below."""
    _total_failures: int = 0
    _total_successes: int = 0
    _failed_at: float | None = None
    _changed_at: float | None = None

    @property
    def failures(self) -> int:
        """Failures in a row that count towards opening."""
        return self._failures

    @property
    def figures(self) -> Figures:
        """What it has seen; an operator's steps change the state and no figure but the failures in a row."""
        return Figures(
            state=self.state,
            consecutive_failures=max(0, -self._run),
            consecutive_successes=max(0, self._run),
            total_failures=self._total_failures,
            total_successes=self._total_successes,
            last_failure_at=self._failed_at,
            last_change_at=self._changed_at,
        )

    def remaining(self, now: float) -> float:
        """Return for how many seconds an open breaker admits no trial yet; 0 where it is not open."""
        return max(0.0, self._opened_at + self.settings.cooldown_seconds - now) if self.state == "open" else 0.0

    def reset(self, now: float) -> None:
        """Close, as if nothing had ever failed."""
        self._become("closed", now)
        self._failures = self._successes = self._run = 0
        self._trial = False
        self._era += 1

    def trip(self, now: float) -> None:
        """Open now; after the cooldown a trial is admitted, as ever."""
        self._open(now)
        self._trial = False
        self._era += 1

    def admit(self, now: float) -> "Ticket | float":
        """Return a ticket for one call, or how many seconds to stay away.

        Half-open admits one trial at a time. Whoever has a ticket ends it.
        """
        if self.state == "closed":
            return Ticket(self, False, self._era)
        remaining = self._opened_at + self.settings.cooldown_seconds - now
        if self.state == "open":
            if remaining > 0:
                return remaining
            self._become("half_open", now)
            self._successes = 0
        if self._trial:
            return TRIAL_SECONDS
        self._trial = True
        return Ticket(self, True, self._era)

    def _end(self, ticket: "Ticket", succeeded: bool | None, now: float) -> None:
        self._count(succeeded, now)
        if ticket.era != self._era:
            return
        if ticket.trial:
            self._trial = False
            if succeeded:
                self._successes += 1
                if self._successes >= self.settings.successes:
                    self._become("closed", now)
                    self._failures = 0
            elif succeeded is False:
                self._open(now)
        elif self.state == "closed" and succeeded is not None:
            # What was admitted before the breaker opened says nothing about how the dependency is now.
            self._failures = 0 if succeeded else self._failures + 1
            if self._failures >= self.settings.failures:
                self._open(now)

    def _open(self, now: float) -> None:
        self._become("open", now)
        self._opened_at = now
        self._failures = 0

    def _become(self, state: State, now: float) -> None:
        if state != self.state:
            self.state = state
            self._changed_at = now

    def _count(self, succeeded: bool | None, now: float) -> None:
        if succeeded:
            self._total_successes += 1
            self._run = max(1, self._run + 1)
        elif succeeded is False:
            self._total_failures += 1
            self._run = min(-1, self._run - 1)
            self._failed_at = now


@attrs.define(slots=True, eq=False)
class Ticket:
    """The right to make one call; ended once, by what became of it."""

    _breaker: Breaker
    trial: bool
    """True for the one call that a half-open breaker admits."""
    era: int
    """When it was given, in the breaker's own count."""
    _ended: bool = False

    def end(self, succeeded: bool | None, now: float) -> None:
        """Report the call's end, None when it was cancelled first; only the first report counts."""
        if not self._ended:
            self._ended = True
            self._breaker._end(self, succeeded, now)
