"""The shared limiter: takes calls from limits that processes share, and says what holds where their store is away."""

from typing import TYPE_CHECKING

import trio

from callora.actors.limiter import KeyPace, Limiter
from callora.ledger.faults import RateStoreUnavailable
from callora.ledger.keys import KeyRecord
from callora.ledger.limits import Standing
from callora.metrics import Metrics

if TYPE_CHECKING:
    from callora.store.pace import SharedPace


class SharedLimiter:
    """Asks the store; this process's own limiter knows every call as well where it may have to decide alone."""

    def __init__(self, limiter: Limiter, pace: "SharedPace", metrics: Metrics, *, opens: bool) -> None:
        """Args:
        opens: whether calls go on, within this process's own limits, while the store does not decide.
        """
        self._limiter = limiter
        self._pace = pace
        self._undecided = metrics.rate_limit_undecided
        self.opens = opens

    @property
    def answers(self) -> bool:
        """Whether the store answered in time when it was last asked."""
        return self._pace.answers

    async def take(self, key: KeyRecord, kept: KeyPace, call_id: str) -> Standing:
        """Take one call from the key's and the user's limit, from both or from none; return where the tighter stands.

        Args:
            call_id: no other call has the same.

        Raises:
            RateStoreUnavailable: the store did not decide; it is counted, and nothing was taken anywhere.

        Cancellation: nothing is taken, or it is given back.
        """
        user, own = self._limiter.limits(key)
        try:
            standing = await self._pace.take(call_id, key.user_id, user, key.api_key_id, own)
        except RateStoreUnavailable as fault:
            self._undecided.of("open" if self.opens else "closed", fault.why).inc()
            raise
        if self.opens and not standing.refused:
            self._limiter.note(key, kept, trio.current_time())
        return standing
