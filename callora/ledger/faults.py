"""Faults: what went wrong somewhere else. Refusals are values (`outcomes`); bugs are any other exception."""


class CalloraFault(Exception):
    """A fault of something Callora depends on. Its text may reach a log, never a client."""


class StoreUnavailable(CalloraFault):
    """PostgreSQL could not be reached, or refused before doing anything. Nothing was written."""


class OutcomeUnknown(CalloraFault):
    """A commit was sent and no answer came: it may or may not have happened. Look it up before deciding."""
