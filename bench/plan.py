"""How long, how often and how many: the two sizes of a run, and the line on the terminal that says how far it is."""

import sys
import time
from typing import Final

import attrs


@attrs.frozen
class Plan:
    """The size of a run."""

    name: str
    repetitions: int
    """Interleaved repetitions of each measurement."""
    seconds: int
    """Length of one closed-loop run."""
    warm_up_seconds: int
    """Load before each closed-loop run that is not counted; every lane has a second of it once besides."""
    connections: tuple[int, ...]
    """Open connections, each a column of the lanes."""
    vaults: int
    """Funded vaults behind the lanes; calls walk through them."""
    callers: tuple[int, ...]
    """Callers of the ledger's benchmark; its rows are read at 256."""
    many_vaults: int
    """Vaults of the ledger's benchmark where it says many."""
    memory_vaults: int
    """Vaults touched by the memory benchmark."""
    pause_seconds: int
    """How long pauses are watched for."""
    usage_events: int
    """Calls under the pages of usage."""


FULL: Final = Plan(
    name="full",
    repetitions=5,
    seconds=5,
    warm_up_seconds=1,
    connections=(1, 64, 256),
    vaults=64,
    callers=(64, 256),
    many_vaults=1000,
    memory_vaults=100_000,
    pause_seconds=20,
    usage_events=10_000_000,
)
QUICK: Final = Plan(
    name="quick",
    repetitions=2,
    seconds=1,
    warm_up_seconds=0,
    connections=(1, 64, 256),
    vaults=64,
    callers=(256,),
    many_vaults=1000,
    memory_vaults=10_000,
    pause_seconds=2,
    usage_events=500_000,
)


class Progress:
    """Says on standard error what is being measured, one line each, and how long the run has lasted."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, what: str) -> None:
        """Print one line."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {what}", file=sys.stderr, flush=True)
