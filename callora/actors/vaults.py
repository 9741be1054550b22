"""Opening vaults: one a user and network, whoever asks at the same time."""

import attrs

from callora.ledger.clock import Clock
from callora.ledger.ids import Ids, UserId, VaultId
from callora.store.accounts import ensure_vault
from callora.store.bridge import Database

DEFAULT_PLAN = "free"
"""The plan of a vault until somebody gives it another."""


@attrs.frozen
class Opened:
    """A user's vault on a network."""

    vault_id: VaultId
    made: bool
    """True when it was made now."""


class VaultOpening:
    """Gives users their vaults."""

    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

    async def ensure(self, user_id: UserId, network: str) -> Opened:
        """Return the user's vault on a network, made where there is none.

        Args:
            network: testnet or mainnet.

        Raises:
            StoreUnavailable: nothing was made.
            OutcomeUnknown: it may have been made; asking again finds it.
        """
        proposed = VaultId(self._ids.uuid7())
        found = await ensure_vault(self._database, proposed, user_id, network, DEFAULT_PLAN, self._clock.now())
        return Opened(found, found == proposed)
