"""Faults: what went wrong somewhere else. Refusals are values (`outcomes`); bugs are any other exception."""

from collections.abc import Iterator
from typing import Literal

ChainFaultKind = Literal[
    "unreachable", "timeout", "rate_limited", "status", "malformed", "error", "refused", "stale", "open", "unready"
]
"""Why a node gave no usable answer: no connection; no answer in time; asked too often; an HTTP status that is none of
success; a reply that makes no sense; an error of its own; it understood and refuses the question; it is behind the
others; its breaker is open, so it was not asked; not known yet."""

RateStoreFault = Literal["unreachable", "timeout", "refused"]
"""Why the store of shared rate limits did not decide: no connection, or known to be away; no answer in time; it
answered with an error."""


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


class RateStoreUnavailable(CalloraFault):
    """The store of shared rate limits did not decide on a call."""

    def __init__(self, why: RateStoreFault, message: str = "the store of shared rate limits does not answer") -> None:
        super().__init__(message)
        self.why: RateStoreFault = why


class ChainUnavailable(CalloraFault):
    """No node of the chain answered usefully. The question changed nothing; of a transaction, nothing was sent."""

    def __init__(
        self,
        message: str,
        *,
        kind: ChainFaultKind = "unreachable",
        passing: bool = True,
        retry_after_seconds: float | None = None,
    ) -> None:
        """Say what happened.

        Args:
            passing: whether the same question may be answered later; False where it is the question, or an operator's
                setting, that is wrong.
            retry_after_seconds: how long the node, or its breaker, wants to be left alone; None where it does not say.
        """
        super().__init__(message)
        self.kind: ChainFaultKind = kind
        self.passing = passing
        self.retry_after_seconds = retry_after_seconds


class ChainOutcomeUnknown(OutcomeUnknown):
    """A transaction was sent and no answer came. It may be applied until its time bound is past: look it up."""

    def __init__(self, message: str, *, kind: ChainFaultKind = "timeout") -> None:
        super().__init__(message)
        self.kind: ChainFaultKind = kind


class ChainMismatch(CalloraFault):
    """What answers is not what was configured: another network, another contract, another history. Ask an operator."""


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that a group is made of, however deeply; of any other exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves_of(member)
    else:
        yield error
