"""Turns: whoever walks through many things lets everybody else run in between.

There is one thread of control. A walk through a hundred thousand vaults without a checkpoint is a tenth of a second or
more in which no call is answered.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

T = TypeVar("T")

TURN: Final = 500
"""How many things are looked at in a row: about a millisecond of work, where each takes a few microseconds."""


def in_turns(things: Iterable[T], size: int = TURN) -> Iterator[Sequence[T]]:
    """Yield what `things` holds now, at most `size` at a time; await something, a checkpoint at least, after each.

    They are copied first: what is added meanwhile does not come, and what was taken away comes nevertheless.
    """
    taken = iter(tuple(things))
    while turn := tuple(islice(taken, size)):
        yield turn
