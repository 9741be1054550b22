"""Intents over REST: what a client names by an Idempotency-Key is done once and answered the same each time.

The key belongs to who asked. A success is kept and given again; anything else changed nothing that a repetition would
not carry on, and frees the key. Whoever dies in between is taken over from after ABANDONED_SECONDS, so what is done
under a key must itself repeat safely: by a request's id, or by a reference made of the key.
"""

import hashlib
from datetime import timedelta
from typing import Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import Ids
from callora.store import intents
from callora.store.bridge import Database
from callora.store.intents import KeptAnswer

__all__ = ["Begun", "InProgress", "Intents", "KeptAnswer", "Mismatch", "reference"]

ABANDONED_SECONDS: Final = 60.0
"""An intent begun so long ago and not answered has lost its process: no request may take as long."""
EXIT_SECONDS_MAX: Final = 5.0
"""How long an intent's end may take when who asked has gone."""
LOOKS_MAX: Final = 3
DROP_BATCH: Final = 10_000


@attrs.frozen
class Begun:
    """The intent is this request's to carry out; end it by `keep` or `forget`."""

    actor: str
    key: str
    attempt: str


@attrs.frozen
class Mismatch:
    """The key names another request."""


@attrs.frozen
class InProgress:
    """The first request with this key is still being worked on."""


class Intents:
    """Answers whether a request under a key is to be carried out."""

    def __init__(
        self, database: Database, clock: Clock, ids: Ids, log: FilteringBoundLogger, *, retention_seconds: float
    ) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids
        self._log = log
        self._retention = timedelta(seconds=retention_seconds)

    async def begin(self, actor: str, key: str, fingerprint: bytes) -> Begun | KeptAnswer | Mismatch | InProgress:
        """Return the intent to carry out, or the answer it has, or why there is neither.

        Args:
            actor: whose key it is; 1 to 255 characters.
            key: 1 to 255 characters.
            fingerprint: SHA-256 of what makes the request this request.

        Raises:
            StoreUnavailable, OutcomeUnknown: the key may be taken until ABANDONED_SECONDS have passed.

        Cancellation: the key is freed.
        """
        for _ in range(LOOKS_MAX):
            begun = Begun(actor, key, self._ids.uuid7())
            if await self._claim(begun, fingerprint):
                return begun
            found = await intents.find_intent(self._database, actor, key)
            if found is not None:
                if found.fingerprint != fingerprint:
                    return Mismatch()
                return found.answer or InProgress()
        return InProgress()  # it came and went each time we looked

    async def _claim(self, begun: Begun, fingerprint: bytes) -> bool:
        now = self._clock.now()
        try:
            return await intents.claim_intent(
                self._database,
                actor=begun.actor,
                key=begun.key,
                fingerprint=fingerprint,
                attempt=begun.attempt,
                now=now,
                expires_at=now + self._retention,
                abandoned_before=now - timedelta(seconds=ABANDONED_SECONDS),
            )
        except BaseException:  # it may have been claimed all the same, and nobody would end it
            with trio.move_on_after(EXIT_SECONDS_MAX, shield=True):
                await self.forget(begun)
            raise

    async def keep(self, begun: Begun, answer: KeptAnswer) -> None:
        """Keep the answer. After a fault a repetition takes over in time, and finds what was done."""
        try:
            await intents.answer_intent(self._database, begun.actor, begun.key, begun.attempt, answer)
        except CalloraFault as fault:
            self._log.warning("intent_not_kept", error=str(fault))

    async def forget(self, begun: Begun) -> None:
        """Free the key, so that a repetition is carried out at once; after a fault it is taken over in time."""
        try:
            await intents.forget_intent(self._database, begun.actor, begun.key, begun.attempt)
        except CalloraFault as fault:
            self._log.warning("intent_not_freed", error=str(fault))

    async def drop_expired(self) -> None:
        """Forget what is past its retention.

        Raises:
            StoreUnavailable, OutcomeUnknown: the next run makes up for it.
        """
        while await intents.drop_expired_intents(self._database, self._clock.now(), DROP_BATCH) == DROP_BATCH:
            pass


def reference(actor: str, key: str, *subjects: str) -> str:
    """Return the name of a ledger entry that an intent makes: the same for the same intent and subjects, for ever."""
    digest = hashlib.sha256("\n".join((actor, key, *subjects)).encode()).hexdigest()
    return f"rest:{digest}"
