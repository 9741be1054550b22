"""The wall clock as an argument: dates come from here, durations from Trio's clock."""

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """Where the date comes from."""

    def now(self) -> datetime:
        """Return the present instant, aware, in UTC."""
        ...

    def timestamp(self) -> float:
        """Return the same in seconds since 1970: a fraction of the price, where no date is asked for."""
        ...
