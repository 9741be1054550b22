"""What is stored under idempotency keys: looked at before each call that has one."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.store.bridge import Database, Line, Row
from callora.store.by_key import BY_KEY
from callora.store.together import Together

CLAIMS_TOGETHER_MAX: Final = 256

CLAIMS_SETTINGS: Final[Mapping[str, str]] = {**BY_KEY, "default_transaction_read_only": "on"}
SMALL_BYTES_MAX: Final = 16 * 1024
"""Answers up to this come with their claim; larger ones are read one by one, so that no look brings many of them."""

# The event is looked up for an attempt that has not ended, or never will; a CASE is not turned into a join.
CLAIMS: Final = """
SELECT w.place, i.fingerprint, i.event_id, i.state, i.charge, i.expires_at, s.*,
       CASE i.state WHEN 'started' THEN (SELECT u.state = 'held' FROM usage_events u
                                         WHERE u.vault_id = ANY (ARRAY[i.vault_id])
                                               AND u.event_id = ANY (ARRAY[i.event_id])) END AS event_open
FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS w (vault_id, key, place)
JOIN idempotency_keys i ON i.vault_id = ANY (ARRAY[w.vault_id]) AND i.key = ANY (ARRAY[w.key])
LEFT JOIN LATERAL (SELECT i.status, i.head, i.body) AS s ON octet_length(i.head) + octet_length(i.body) <= $3
"""

_ANSWER: Final = """
SELECT status, head, body FROM idempotency_keys
WHERE vault_id = $1 AND key = $2 AND event_id = $3 AND state = 'completed'
"""


@attrs.frozen(slots=True)
class KeptAnswer:
    """The first answer to an idempotent call."""

    status: int
    head: bytes
    body: bytes


@attrs.frozen(slots=True)
class Claim:
    """What is stored under an idempotency key."""

    fingerprint: bytes
    event_id: EventId
    state: Literal["started", "completed", "not_replayable"]
    charge: Stroops | None
    expires_at: datetime
    event_open: bool
    """True while the hold of the attempt that made the claim is open."""
    answer: KeptAnswer | None
    """None where there is none that can be replayed, and where it is not small."""


class Claims:
    """Looks at claims over a line of its own, many in one look, and at large answers over the pool."""

    def __init__(self, line: Line, database: Database, deadline_seconds: float) -> None:
        """Args:
        line: with CLAIMS_SETTINGS; nobody else uses it.
        deadline_seconds: for one look, > 0.
        """
        self._line = line
        self._database = database
        self._deadline_seconds = deadline_seconds
        self._looks = Together(self._look, CLAIMS_TOGETHER_MAX)

    async def find(self, vault_id: VaultId, key: str) -> Claim | None:
        """Return what is stored under a vault's idempotency key.

        Raises:
            StoreUnavailable: nothing was read.

        Cancellation: a look under way is waited for, at most until its deadline.
        """
        (found,) = await self._looks.ask((vault_id, key))
        return found

    async def answer(self, vault_id: VaultId, key: str, event_id: EventId) -> KeptAnswer | None:
        """Return the answer of a claim found a moment ago, of any size; None where it was dropped since, being old.

        Raises:
            StoreUnavailable: nothing was read.
        """
        row = await self._database.fetch_row(_ANSWER, vault_id, key, event_id)
        return None if row is None else _answer(row)

    async def _look(self, asked: Sequence[tuple[VaultId, str]]) -> Sequence[Claim | None]:
        vault_ids, keys = [vault_id for vault_id, _ in asked], [key for _, key in asked]
        try:
            rows = await self._line.run(
                CLAIMS, vault_ids, keys, SMALL_BYTES_MAX, deadline_seconds=self._deadline_seconds
            )
        except OutcomeUnknown as fault:
            raise StoreUnavailable(f"claims could not be looked at: {fault}") from fault
        found = {row["place"]: _claim(row) for row in rows}
        return [found.get(place) for place in range(1, len(asked) + 1)]


def _claim(row: Row) -> Claim:
    return Claim(
        fingerprint=row["fingerprint"],
        event_id=EventId(str(row["event_id"])),
        state=row["state"],
        charge=row["charge"],
        expires_at=row["expires_at"],
        event_open=bool(row["event_open"]),
        answer=_answer(row),
    )


def _answer(row: Row) -> KeptAnswer | None:
    return None if row["body"] is None else KeptAnswer(row["status"], row["head"], row["body"])
