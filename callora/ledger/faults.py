"""Faults: what went wrong somewhere else. Refusals are values (`outcomes`); bugs are any other exception."""

from collections.abc import Iterator


class CalloraFault(Exception):
    """A fault of something Callora depends on. Its text may reach a log, never a client."""


class StoreUnavailable(CalloraFault):
    """PostgreSQL could not be reached, or refused before doing anything. Nothing was written."""


class OutcomeUnknown(CalloraFault):
    """A commit was sent and no answer came: it may or may not have happened. Look it up before deciding."""


class StoreConflict(CalloraFault):
    """A deadlock or serialisation failure: the database rolled the work back whole. Nothing was written; repeat it."""


class StoreRefused(CalloraFault):
    """A constraint or trigger of the database refused what an actor should have refused. Nothing was written."""

    def __init__(self, message: str, *, constraint: str | None, sqlstate: str) -> None:
        super().__init__(message)
        self.constraint = constraint
        self.sqlstate = sqlstate


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that a group is made of, however deeply; of any other exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves_of(member)
    else:
        yield error
