"""People and their sessions."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database, Row

_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

_SESSION_ALIVE: Final = """
SELECT true FROM sessions WHERE session_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > $3
"""

_SESSIONS: Final = """
SELECT session_id, client_address, user_agent, created_at, last_used_at, expires_at
FROM sessions
WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > $2 AND ($3::uuid IS NULL OR session_id < $3)
ORDER BY session_id DESC LIMIT $4
"""


async def session_alive(database: Database, session_id: str, user_id: UserId, now: datetime) -> bool:
    """Tell whether this session of this user is neither ended nor expired; False for what is no id."""
    if _UUID.fullmatch(session_id) is None or _UUID.fullmatch(user_id) is None:
        return False
    return await database.fetch_value(_SESSION_ALIVE, session_id, user_id, now) is not None


class SessionReads:
    """A user's sessions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, user_id: UserId, now: datetime, *, before: str | None, limit: int) -> Sequence[Row]:
        """Return sessions of a user that can be used, the latest first.

        Args:
            before: the id of the last session of the page before; a UUID.
        """
        return await self._database.fetch(_SESSIONS, user_id, now, before, limit)
