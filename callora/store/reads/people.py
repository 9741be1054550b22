"""People and their sessions."""

import re
from datetime import datetime
from typing import Final

from callora.ledger.ids import UserId
from callora.store.bridge import Database

_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

_SESSION_ALIVE: Final = """
SELECT true FROM sessions WHERE session_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > $3
"""


async def session_alive(database: Database, session_id: str, user_id: UserId, now: datetime) -> bool:
    """Tell whether this session of this user is neither ended nor expired; False for what is no id."""
    if _UUID.fullmatch(session_id) is None or _UUID.fullmatch(user_id) is None:
        return False
    return await database.fetch_value(_SESSION_ALIVE, session_id, user_id, now) is not None
