"""Looks that are long and share the database with calls: they rest for a few milliseconds after about each one of work.

Half a second of one statement kept calls waiting for 100 ms where the database has no processor to spare; a millisecond
is not seen. A rest is a `pg_sleep` in a condition that is asked of every row. The statement's snapshot is held for as
long, and keeps what rounds update from being cleared away: rests of 9 ms, and looks of several seconds with them, cost
calls more than none.
"""

from typing import Final

BREATH_SECONDS: Final = 0.002
"""A rest; 0 for a look that somebody waits for, or that has far to go."""
EVENTS: Final = 2000
SUMS: Final = 200
"""Events that are read, and sums that are added to, in about a millisecond."""


def breathing(rows: int, condition: str = "true", *, rest: str) -> str:
    """Return a condition in SQL, with a rest for one in so many rows that it is asked of.

    In one expression: of two, the planner would ask the cheaper one first, and rest only for the rows it leaves.

    Args:
        rest: the parameter that says for how many seconds, a double precision.
    """
    return f"CASE WHEN random() * {rows} < 1 AND pg_sleep({rest}) IS NULL THEN false ELSE {condition} END"
