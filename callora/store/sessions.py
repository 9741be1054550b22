"""Sessions: challenges that wallets sign, the people they belong to, and the tokens that keep a session going.

Only hashes of refresh tokens are stored. Every change that must happen once is one conditional statement: of any number
that try, in any number of processes, one finds the row as it must be.
"""

from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.ids import UserId
from callora.store.bridge import Connection, Database, Row

EndedFor = Literal["logout", "revoked_all", "reuse"]

_ADD_CHALLENGE: Final = "INSERT INTO login_challenges (challenge_hash, wallet_address, expires_at) VALUES ($1, $2, $3)"

_USE_CHALLENGE: Final = """
UPDATE login_challenges SET used_at = $3
WHERE challenge_hash = $1 AND wallet_address = $2 AND used_at IS NULL AND expires_at > $3
RETURNING true
"""

_CLAIM_CHALLENGE: Final = """
INSERT INTO login_challenges (challenge_hash, wallet_address, expires_at, used_at) VALUES ($1, $2, $3, $4)
ON CONFLICT (challenge_hash) DO NOTHING
RETURNING true
"""

_ADD_WALLET_USER: Final = """
INSERT INTO users (user_id, name, wallet_address, created_at) VALUES ($1, $2, $2, $3)
ON CONFLICT (wallet_address) DO NOTHING
"""

_FIND_WALLET_USER: Final = "SELECT user_id FROM users WHERE wallet_address = $1"

_ADD_SESSION: Final = """
INSERT INTO sessions (session_id, user_id, client_address, user_agent, created_at, last_used_at, expires_at)
VALUES ($1, $2, left($3, 64), left($4, 256), $5, $5, $6)
"""

_ISSUE: Final = """
INSERT INTO refresh_tokens (token_hash, session_id, issued_at, expires_at) VALUES ($1, $2, $3, $4)
"""

_USE_UP: Final = """
UPDATE refresh_tokens SET used_at = $2 WHERE token_hash = $1 AND used_at IS NULL AND expires_at > $2
RETURNING session_id
"""

_FIND_ISSUED: Final = "SELECT session_id, used_at FROM refresh_tokens WHERE token_hash = $1"

_PROLONG: Final = """
UPDATE sessions s SET last_used_at = $2, expires_at = $3
FROM users u
WHERE s.session_id = $1 AND s.revoked_at IS NULL AND s.expires_at > $2 AND u.user_id = s.user_id
RETURNING s.user_id, u.wallet_address
"""

_END: Final = "UPDATE sessions SET revoked_at = $2, revoked_for = $3 WHERE session_id = $1 AND revoked_at IS NULL"

_END_BY_ISSUED: Final = """
UPDATE sessions SET revoked_at = $2, revoked_for = 'logout'
WHERE session_id = (SELECT session_id FROM refresh_tokens WHERE token_hash = $1) AND revoked_at IS NULL
"""

_END_OWN: Final = """
UPDATE sessions SET revoked_at = coalesce(revoked_at, $3), revoked_for = coalesce(revoked_for, 'logout')
WHERE session_id = $1 AND user_id = $2
RETURNING true
"""

# Locked in one order, so that two that end all sessions of a user at once do not wait for each other.
_END_ALL: Final = """
UPDATE sessions SET revoked_at = $2, revoked_for = 'revoked_all'
WHERE session_id IN (SELECT session_id FROM sessions WHERE user_id = $1 AND revoked_at IS NULL
                     ORDER BY session_id FOR UPDATE)
"""

_PURGE: Final = (
    """
DELETE FROM refresh_tokens
WHERE token_hash IN (SELECT token_hash FROM refresh_tokens WHERE expires_at < $1 ORDER BY expires_at LIMIT $2)
""",
    """
DELETE FROM sessions
WHERE session_id IN (SELECT session_id FROM sessions WHERE expires_at < $1 ORDER BY expires_at LIMIT $2)
""",
    """
DELETE FROM login_challenges
WHERE challenge_hash IN (SELECT challenge_hash FROM login_challenges WHERE expires_at < $1
                         ORDER BY expires_at LIMIT $2)
""",
)


@attrs.frozen
class NewSession:
    """A session as it begins."""

    session_id: str
    user_id: UserId
    client_address: str
    """From where; cut to 64 characters."""
    user_agent: str
    """What the client calls itself; cut to 256 characters."""
    created_at: datetime
    expires_at: datetime


@attrs.frozen
class KnownToken:
    """A refresh token that was issued."""

    session_id: str
    used: bool


async def add_challenge(database: Database, challenge_hash: bytes, address: str, expires_at: datetime) -> None:
    """Store a challenge that was given to a wallet."""
    await database.execute(_ADD_CHALLENGE, challenge_hash, address, expires_at)


async def use_challenge(connection: Connection, challenge_hash: bytes, address: str, now: datetime) -> bool:
    """Use up a stored challenge; False where it is none of this wallet's, has expired or was used."""
    return await connection.fetch_value(_USE_CHALLENGE, challenge_hash, address, now) is not None


async def claim_challenge(
    connection: Connection, challenge_hash: bytes, address: str, expires_at: datetime, now: datetime
) -> bool:
    """Use up a challenge that was not stored because it proves itself; False where it was used before."""
    return await connection.fetch_value(_CLAIM_CHALLENGE, challenge_hash, address, expires_at, now) is not None


async def ensure_wallet_user(connection: Connection, user_id: UserId, address: str, now: datetime) -> UserId:
    """Return the user of a wallet, made under `user_id` where there is none."""
    found = await connection.fetch_value(_FIND_WALLET_USER, address)
    if found is None:
        # Waits for another that is making him, and then finds him.
        await connection.execute(_ADD_WALLET_USER, user_id, address, now)
        found = await connection.fetch_value(_FIND_WALLET_USER, address)
    return UserId(str(found))


async def add_session(connection: Connection, session: NewSession) -> None:
    """Store a session."""
    await connection.execute(
        _ADD_SESSION,
        session.session_id,
        session.user_id,
        session.client_address,
        session.user_agent,
        session.created_at,
        session.expires_at,
    )


async def add_refresh_token(
    connection: Connection, token_hash: bytes, session_id: str, now: datetime, expires_at: datetime
) -> None:
    """Store a refresh token's hash."""
    await connection.execute(_ISSUE, token_hash, session_id, now, expires_at)


async def use_refresh_token(connection: Connection, token_hash: bytes, now: datetime) -> str | None:
    """Use up a refresh token and return its session; None where it is unknown, has expired or was used."""
    found = await connection.fetch_value(_USE_UP, token_hash, now)
    return None if found is None else str(found)


async def find_refresh_token(connection: Connection, token_hash: bytes) -> KnownToken | None:
    """Return what is known of a refresh token."""
    row = await connection.fetch_row(_FIND_ISSUED, token_hash)
    return None if row is None else KnownToken(str(row["session_id"]), row["used_at"] is not None)


async def prolong(connection: Connection, session_id: str, now: datetime, expires_at: datetime) -> Row | None:
    """Note a session's use, let it last longer, and return its user_id and wallet_address; None where it has ended."""
    return await connection.fetch_row(_PROLONG, session_id, now, expires_at)


async def end_session(connection: Connection, session_id: str, now: datetime, ended_for: EndedFor) -> None:
    """End a session; what has ended stays as it is."""
    await connection.execute(_END, session_id, now, ended_for)


async def end_session_of_token(database: Database, token_hash: bytes, now: datetime) -> None:
    """End the session of a refresh token, used or not; nothing where there is none."""
    await database.execute(_END_BY_ISSUED, token_hash, now)


async def end_own_session(database: Database, session_id: str, user_id: UserId, now: datetime) -> bool:
    """End a session of this user's; False where he has none of this id. One that has ended stays as it is."""
    return await database.fetch_value(_END_OWN, session_id, user_id, now) is not None


async def end_all_sessions(database: Database, user_id: UserId, now: datetime) -> None:
    """End every session of a user."""
    await database.execute(_END_ALL, user_id, now)


async def purge(database: Database, expired_before: datetime, limit: int) -> int:
    """Delete tokens, sessions and challenges that expired before this, at most `limit` of each; return how many."""
    deleted = 0
    for statement in _PURGE:
        deleted += int((await database.execute(statement, expired_before, limit)).rpartition(" ")[2])
    return deleted
