"""Counter accounts: made by operators, who also have rated what was quarantined before."""

import attrs

from callora.actors.rating import Rated, Rater, SubjectUnknown
from callora.ledger.clock import Clock
from callora.ledger.counters import INCLUDED_MAX, Profile, SubjectTaken
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import Ids, VaultId
from callora.ledger.outcomes import VaultMissing
from callora.store import counter_accounts as store
from callora.store import quarantine
from callora.store.bridge import Database


class CounterAccounts:
    """Makes and changes accounts."""

    def __init__(self, database: Database, rater: Rater, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._rater = rater
        self._clock = clock
        self._ids = ids

    async def make(
        self, vault_id: VaultId, subject: str, profile: Profile, included: int, *, replay: bool
    ) -> str | SubjectTaken | VaultMissing:
        """Make an account for a subject and return its id.

        Args:
            included: units that cost nothing, 0 to INCLUDED_MAX.
            replay: rate what is quarantined of the subject first. Until that is done the account is not active, so that
                no later sample makes replays of what came before a reset.

        Raises:
            StoreUnavailable: nothing was made. OutcomeUnknown: the account may be made, and is then to be activated.
        """
        account_id = self._ids.uuid7()
        first = attrs.evolve(profile, active=profile.active and not replay)
        refused = await store.add(self._database, account_id, vault_id, subject, first, included, self._clock.now())
        if refused is not None:
            return refused
        try:
            if replay:
                await self._rater.replay(subject)
            if first != profile:
                await store.change(self._database, account_id, profile, self._clock.now())
        except StoreUnavailable as fault:
            raise OutcomeUnknown("the account is made, and perhaps not active yet") from fault
        return account_id

    async def change(self, account_id: str, profile: Profile) -> bool:
        """Set what an account is rated by from now on; False: there is none."""
        return await store.change(self._database, account_id, profile, self._clock.now())

    async def include(self, account_id: str, units: int) -> bool | None:
        """Give an account units that cost nothing; False: beyond INCLUDED_MAX in all, None: there is no account.

        Raises:
            OutcomeUnknown: they may be given; the account tells.
        """
        return await store.include(self._database, account_id, units, INCLUDED_MAX, self._clock.now())

    async def replay(self, subject: str) -> Rated | SubjectUnknown:
        """Rate what is quarantined of a subject that has an account by now. Raises: as `Rater.replay`."""
        return await self._rater.replay(subject)

    async def drop(self, subject: str) -> int:
        """Forget what is quarantined of a subject; return how many samples that were."""
        return await quarantine.drop_all(self._database, subject)
