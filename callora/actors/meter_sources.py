"""Meter sources as operators keep them. Those that the environment describes are its own."""

from collections.abc import Mapping
from typing import Any

import attrs
from pydantic import SecretStr

from callora.ledger.clock import Clock
from callora.ledger.collecting import SOURCES_MAX, SourceOffer
from callora.ledger.ids import DeveloperId, Ids, UserId
from callora.ledger.snapshots import MeterSource
from callora.store import meter_sources as store
from callora.store.bridge import Database
from callora.store.reads.meters import FoundSource, find_source, list_sources


@attrs.frozen
class SourceMissing:
    """No source has the id."""


@attrs.frozen
class SourceFixed:
    """The environment describes the source: it is changed there."""


@attrs.frozen
class SourceWrong:
    """The source cannot be as it is described. Nothing was stored."""

    field: str
    message: str
    taken: bool = False
    """Whether it is only in the way of another."""


Outcome = FoundSource | SourceMissing | SourceFixed | SourceWrong


class MeterSources:
    """Keeps sources."""

    def __init__(self, database: Database, tokens: Mapping[str, SecretStr], clock: Clock, ids: Ids) -> None:
        """Args:
        tokens: the credentials that this process was given, by the names of their variables.
        """
        self._database = database
        self._tokens = tokens
        self._clock = clock
        self._ids = ids

    async def add(self, offer: SourceOffer) -> Outcome:
        """Store a source.

        Raises:
            StoreUnavailable: nothing was stored. OutcomeUnknown: it may be.

        Cancellation: it is stored, or not.
        """
        wrong = await self._wrong(offer)
        return await self._put(offer, may_replace=False) if wrong is None else wrong

    async def change(self, source_id: str, changes: Mapping[str, Any]) -> Outcome:
        """Change fields of a source; how far it is read stays.

        Args:
            changes: by the names of SourceOffer's fields.

        Raises and cancellation: as `add`.
        """
        found = await find_source(self._database, source_id)
        if found is None:
            return SourceMissing()
        if found.origin != "operator":
            return SourceFixed()
        offer = attrs.evolve(offer_of(found.source), **changes)
        wrong = await self._wrong(offer)
        return await self._put(offer, may_replace=True) if wrong is None else wrong

    async def remove(self, source_id: str) -> SourceMissing | SourceFixed | None:
        """Take a source away; what was rated of it stays. None where it is done.

        Raises and cancellation: as `add`.
        """
        if await store.remove_source(self._database, source_id, "operator", self._clock.now()):
            return None
        return SourceMissing() if await find_source(self._database, source_id) is None else SourceFixed()

    async def _wrong(self, offer: SourceOffer) -> SourceWrong | None:
        """Return why this process could not read the source."""
        token = self._tokens.get(offer.credential_env or "")
        if token is None:
            return SourceWrong("credential_env", "must name a variable that this process was given")
        present = await list_sources(self._database, "", SOURCES_MAX + 1)
        others = [each.source for each in present if each.source.source_id != offer.source_id]
        if len(others) >= SOURCES_MAX:
            return SourceWrong("source_id", f"is one more than {SOURCES_MAX}, which is as many as may be", taken=True)
        enabled = [each for each in others if each.enabled] if offer.enabled else []
        if any(self._tokens.get(each.credential_env or "") == token for each in enabled):
            return SourceWrong("credential_env", "must be of this source alone", taken=True)
        return None

    async def _put(self, offer: SourceOffer, *, may_replace: bool) -> Outcome:
        owner = store.Owner(UserId(self._ids.uuid7()), DeveloperId(self._ids.uuid7()))
        put = await store.put_source(
            self._database, offer, "operator", owner, self._clock.now(), may_replace=may_replace
        )
        if isinstance(put, store.ApiUnknown):
            return SourceWrong("api_id", "must be the number of an API")
        if isinstance(put, store.SourceTaken):
            return SourceWrong(put.field, "is another source's", taken=True)
        return put


def offer_of(source: MeterSource) -> SourceOffer:
    """Return how a source that is stored would be described."""
    return SourceOffer(**{each.name: getattr(source, each.name) for each in attrs.fields(SourceOffer)})
