"""What users do with webhooks: endpoints made, changed, tried, taken away; secrets replaced; events told again."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import attrs

from callora.actors.webhooks import Teller, Told, test_message
from callora.ledger.clock import Clock
from callora.ledger.ids import Ids, UserId
from callora.ledger.webhooks import RetryPolicy, Secrets
from callora.outbound.client import Outbound
from callora.store import webhooks as store
from callora.store.bridge import Database
from callora.store.webhooks import (
    DeliveryMissing,
    EndpointChange,
    EndpointDisabled,
    NewEndpoint,
    Replayed,
    StillPending,
)

__all__ = [
    "DeliveryMissing",
    "EndpointChange",
    "EndpointDisabled",
    "EndpointMissing",
    "Made",
    "Replayed",
    "Rotated",
    "StillPending",
    "TooMany",
    "UrlRefused",
    "WebhookDesk",
]


@attrs.frozen
class Made:
    """The endpoint is stored."""

    endpoint_id: str
    secret: str = attrs.field(repr=False)
    """Shown this once."""


@attrs.frozen
class Rotated:
    """The endpoint has another secret."""

    secret: str = attrs.field(repr=False)
    """Shown this once."""
    previous_until: datetime
    """Until when the one before signs as well."""


@attrs.frozen
class TooMany:
    """The user has as many endpoints as anyone may."""


@attrs.frozen
class EndpointMissing:
    """The user has no such endpoint."""


@attrs.frozen
class UrlRefused:
    """Nothing is sent there."""

    why: str
    """Follows the words "the URL"."""


class WebhookDesk:
    """Changes endpoints. Every method raises StoreUnavailable (nothing done) and OutcomeUnknown."""

    def __init__(
        self,
        database: Database,
        outbound: Outbound,
        teller: Teller,
        secrets: Secrets,
        clock: Clock,
        ids: Ids,
        *,
        grace_seconds: float,
    ) -> None:
        """Args:
        grace_seconds: how long a replaced secret signs as well.
        """
        self._database = database
        self._outbound = outbound
        self._teller = teller
        self._secrets = secrets
        self._clock = clock
        self._ids = ids
        self._grace = timedelta(seconds=grace_seconds)

    async def add(
        self, user_id: UserId, url: str, description: str | None, events: Sequence[str], policy: RetryPolicy
    ) -> Made | UrlRefused | TooMany:
        """Store an endpoint.

        Args:
            url: as it was sent.
            events: types of the outbox.

        Cancellation: it may be stored.
        """
        try:
            checked = await self._outbound.check(url)
        except ValueError as error:
            return UrlRefused(str(error))
        endpoint_id = self._ids.uuid7()
        new = NewEndpoint(endpoint_id, user_id, checked.text, description, events, policy)
        if not await store.add_endpoint(self._database, new, self._clock.now()):
            return TooMany()
        return Made(endpoint_id, self._secrets.shown(endpoint_id, 1))

    async def change(
        self, user_id: UserId, endpoint_id: str, change: EndpointChange
    ) -> EndpointMissing | UrlRefused | None:
        """Change an endpoint; None where it is done.

        Cancellation: it may be changed.
        """
        if change.url is not None:
            try:
                checked = await self._outbound.check(change.url)
            except ValueError as error:
                return UrlRefused(str(error))
            change = attrs.evolve(change, url=checked.text)
        if not await store.change_endpoint(self._database, endpoint_id, user_id, change, self._clock.now()):
            return EndpointMissing()
        return None

    async def delete(self, user_id: UserId, endpoint_id: str) -> bool:
        """Take an endpoint away with all that waits for it; return False where the user has none of this id."""
        return await store.delete_endpoint(self._database, endpoint_id, user_id, self._clock.now())

    async def rotate(self, user_id: UserId, endpoint_id: str) -> Rotated | EndpointMissing:
        """Give an endpoint another secret; for a while the one before signs as well, and no earlier one does.

        Cancellation: it may have another one, which nobody was shown: rotate again.
        """
        now = self._clock.now()
        generation = await store.rotate_secret(self._database, endpoint_id, user_id, now + self._grace, now)
        if generation is None:
            return EndpointMissing()
        return Rotated(self._secrets.shown(endpoint_id, generation), now + self._grace)

    async def test(self, endpoint_id: str, url: str, generation: int, previous_until: datetime | None) -> Told:
        """Send an event that tells nothing, once, and return what came of it. It is not in the log."""
        message = test_message(self._ids, self._clock.now())
        return await self._teller.tell(url, endpoint_id, generation, previous_until, message)

    async def replay(
        self, user_id: UserId, delivery_id: str
    ) -> Replayed | DeliveryMissing | StillPending | EndpointDisabled:
        """Have a delivery made again, under the same ids.

        Cancellation: it may be made.
        """
        return await store.replay(self._database, delivery_id, user_id, self._clock.now())
