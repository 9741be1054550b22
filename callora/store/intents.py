"""What was asked over REST under an Idempotency-Key, and the first answer to it, for who asked alone."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Final

import attrs

from callora.store.bridge import Database

_CLAIM: Final = """
INSERT INTO rest_idempotency AS r (actor, key, fingerprint, attempt, created_at, expires_at)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (actor, key) DO UPDATE
    SET fingerprint = excluded.fingerprint, attempt = excluded.attempt, status = NULL, headers = NULL, body = NULL,
        created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE r.expires_at <= excluded.created_at
          OR (r.status IS NULL AND r.fingerprint = excluded.fingerprint AND r.created_at <= $7)
RETURNING true
"""

_FIND: Final = """
SELECT fingerprint, status, headers::text AS headers, body FROM rest_idempotency WHERE actor = $1 AND key = $2
"""

_ANSWER: Final = """
UPDATE rest_idempotency SET status = $4, headers = $5, body = $6
WHERE actor = $1 AND key = $2 AND attempt = $3 AND status IS NULL
"""

_FORGET: Final = "DELETE FROM rest_idempotency WHERE actor = $1 AND key = $2 AND attempt = $3 AND status IS NULL"

_DROP: Final = """
DELETE FROM rest_idempotency WHERE (actor, key) IN (
    SELECT actor, key FROM rest_idempotency WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2
)
"""


@attrs.frozen
class KeptAnswer:
    """An answer as it was given."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@attrs.frozen
class FoundIntent:
    """What is stored under a key."""

    fingerprint: bytes
    answer: KeptAnswer | None
    """None while the first request is being worked on, or when who worked on it has died."""


async def claim_intent(
    database: Database,
    *,
    actor: str,
    key: str,
    fingerprint: bytes,
    attempt: str,
    now: datetime,
    expires_at: datetime,
    abandoned_before: datetime,
) -> bool:
    """Make this attempt the one that works on the intent; return False where another has it, or had it.

    Args:
        abandoned_before: the same intent begun before this and not answered is taken over.
    """
    claimed = await database.fetch_value(_CLAIM, actor, key, fingerprint, attempt, now, expires_at, abandoned_before)
    return claimed is not None


async def find_intent(database: Database, actor: str, key: str) -> FoundIntent | None:
    """Return what is stored under a key, or None."""
    row = await database.fetch_row(_FIND, actor, key)
    if row is None:
        return None
    answer = None
    if row["status"] is not None:
        answer = KeptAnswer(row["status"], json.loads(row["headers"]), row["body"])
    return FoundIntent(row["fingerprint"], answer)


async def answer_intent(database: Database, actor: str, key: str, attempt: str, answer: KeptAnswer) -> None:
    """Keep the answer, unless the intent was taken over from this attempt."""
    await database.execute(_ANSWER, actor, key, attempt, answer.status, json.dumps(dict(answer.headers)), answer.body)


async def forget_intent(database: Database, actor: str, key: str, attempt: str) -> None:
    """Free the key of an attempt that came to nothing worth keeping."""
    await database.execute(_FORGET, actor, key, attempt)


async def drop_expired_intents(database: Database, now: datetime, limit: int) -> int:
    """Delete at most `limit` intents past their retention; return how many."""
    return int((await database.execute(_DROP, now, limit)).rpartition(" ")[2])
