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
    settled_developers: tuple[int, ...]
    """How many developers are settled, each with a thousand calls; from small to large."""
    rated_subjects: int
    """Subjects of the meter source whose counters are rated."""
    rated_minutes: int
    """Snapshots of it, a minute apart."""
    webhook_events: int
    """Events that are told as a backlog."""


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
    settled_developers=(250, 500, 1000),
    rated_subjects=1000,
    rated_minutes=1440,
    webhook_events=100_000,
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
    settled_developers=(50, 100),
    rated_subjects=100,
    rated_minutes=480,
    webhook_events=5_000,
)


class Progress:
    """Says on standard error what is being measured, one line each, and how long the run has lasted."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, what: str) -> None:
        """Print one line."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {what}", file=sys.stderr, flush=True)
