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


@attrs.define(slots=True, eq=False)
class Breaker:
    """Refuses fast while a dependency fails. A cancelled call counts neither as a success nor as a failure."""

    settings: BreakerSettings
    state: State = "closed"
    _failures: int = 0
    _successes: int = 0
    _opened_at: float = 0.0
    _trial: bool = False

    def admit(self, now: float) -> "Ticket | float":
        """Return a ticket for one call, or how many seconds to stay away.

        Half-open admits one trial at a time. Whoever has a ticket ends it.
        """
        if self.state == "closed":
            return Ticket(self, trial=False)
        remaining = self._opened_at + self.settings.cooldown_seconds - now
        if self.state == "open":
            if remaining > 0:
                return remaining
            self.state = "half_open"
            self._successes = 0
        if self._trial:
            return TRIAL_SECONDS
        self._trial = True
        return Ticket(self, trial=True)

    def _end(self, ticket: "Ticket", succeeded: bool | None, now: float) -> None:
        if ticket.trial:
            self._trial = False
            if succeeded:
                self._successes += 1
                if self._successes >= self.settings.successes:
                    self.state = "closed"
                    self._failures = 0
            elif succeeded is False:
                self._open(now)
        elif self.state == "closed" and succeeded is not None:
            # What was admitted before the breaker opened says nothing about how the dependency is now.
            self._failures = 0 if succeeded else self._failures + 1
            if self._failures >= self.settings.failures:
                self._open(now)

    def _open(self, now: float) -> None:
        self.state = "open"
        self._opened_at = now
        self._failures = 0


@attrs.define(slots=True, eq=False)
class Ticket:
    """The right to make one call; ended once, by what became of it."""

    _breaker: Breaker
    trial: bool
    """True for the one call that a half-open breaker admits."""
    _ended: bool = False

    def end(self, succeeded: bool | None, now: float) -> None:
        """Report the call's end, None when it was cancelled first; only the first report counts."""
        if not self._ended:
            self._ended = True
            self._breaker._end(self, succeeded, now)
