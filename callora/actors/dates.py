"""The index of dates learns of new events soon after they are placed, for every look that goes by their date."""

from typing import Final

from structlog.typing import FilteringBoundLogger

from callora.ledger.faults import StoreConflict
from callora.store.bridge import Database, StatementRejected
from callora.store.usage import extend_dates

NOT_OWNED: Final = "42501"
STANDBY: Final = "55000"
"""SQLSTATEs: who does not own a table may not tell its index anything, and a server in recovery tells none."""


class Dates:
    """What the index was told, by this process."""

    def __init__(self, database: Database, log: FilteringBoundLogger) -> None:
        self._database = database
        self._log = log
        self._reached: dict[int, int] = {}
        self._allowed = True

    async def extend(self) -> None:
        """Tell the index of what is new. Where the service does not own its tables, that is said once, and left.

        Raises:
            StoreUnavailable: the next time makes up for it.
        """
        if not self._allowed:
            return
        try:
            await extend_dates(self._database, self._reached)
        except StoreConflict:
            return  # a vacuum, or another process, is at it
        except StatementRejected as error:
            if error.sqlstate == STANDBY:
                return  # this connection leads to a server that writes nothing; the rounds say so
            if error.sqlstate != NOT_OWNED:
                raise
            self._allowed = False
            self._log.warning("dates_not_extended", error=str(error))
