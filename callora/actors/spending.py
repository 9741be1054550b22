"""Setting spending limits, on behalf of their owners."""

from callora.ledger.clock import Clock
from callora.ledger.ids import ApiKeyId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.spending import Period
from callora.store import spending as store
from callora.store.bridge import Database


class LimitSetting:
    """Sets and removes limits. What it is asked for must belong to who asks."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def set(
        self, vault_id: VaultId, api_key_id: ApiKeyId | None, period: Period, amount: Stroops, user_id: UserId
    ) -> None:
        """Set a limit, or replace it; holds obey from the moment this returns, in every process.

        Args:
            api_key_id: a key of this vault; None for the vault itself.
            amount: stroops, > 0.
            user_id: who sets it.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: setting it again is safe.
        """
        await store.set_limit(self._database, vault_id, api_key_id, period, amount, user_id, self._clock.now())

    async def remove(self, vault_id: VaultId, api_key_id: ApiKeyId | None, period: Period) -> None:
        """Remove a limit; one that was never set is removed as well. Raises as `set`."""
        await store.remove_limit(self._database, vault_id, api_key_id, period)
