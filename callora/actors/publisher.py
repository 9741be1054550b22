"""The publisher: whatever developers do to their profile and their APIs, and operators to anyone's.

Each method is one database transaction: all of it happens or nothing. What has changed takes effect here before the
method returns, elsewhere as soon as the catalogue there has looked.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.catalogue import Catalogue
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, StoreUnavailable
from callora.ledger.ids import ApiId, DeveloperId, EndpointId, Ids, UserId
from callora.ledger.offers import (
    APIS_MAX,
    ENDPOINTS_MAX,
    PRICE_VERSIONS_MAX,
    ApiOffer,
    ApiRef,
    DatedPrice,
    EndpointOffer,
    Move,
    Wrong,
    after,
    check_endpoints,
    check_headers,
    make_slug,
    merge_headers,
    slug_candidates,
    wrong_versions,
)
from callora.store import apis, developers
from callora.store.apis import PresentEndpoint, TooManyVersions
from callora.store.bridge import Connection, Database, Row

POPULARITY_SECONDS: Final = 300.0
"""How often calls are counted for the marketplace."""
POPULARITY_WINDOW: Final = timedelta(days=30)


@attrs.frozen
class NoSuchApi:
    """The user has no such API, or it no such endpoint."""


@attrs.frozen
class NotAllowed:
    """What the API is, or others have, does not allow it."""

    message: str
    details: Mapping[str, str] | None = None


@attrs.frozen
class OfferRefused:
    """A rule refuses it."""

    wrong: tuple[Wrong, ...]


@attrs.frozen
class Done:
    """It is stored."""

    api_id: ApiId
    endpoint_ids: tuple[EndpointId, ...] = ()
    added_count: int = 0


Outcome = Done | NoSuchApi | NotAllowed | OfferRefused

_TOO_MANY_VERSIONS: Final = NotAllowed(f"An endpoint has {PRICE_VERSIONS_MAX} price versions and can have no more")
_ARCHIVED: Final = NotAllowed("The API is archived, which is for ever", {"status": "archived"})


class Publisher:
    """Changes profiles and APIs. Every method raises StoreUnavailable (nothing done) and OutcomeUnknown."""

    def __init__(
        self, database: Database, catalogue: Catalogue, clock: Clock, ids: Ids, log: FilteringBoundLogger
    ) -> None:
        self._database = database
        self._catalogue = catalogue
        self._clock = clock
        self._ids = ids
        self._log = log

    async def ensure_profile(self, user_id: UserId) -> DeveloperId:
        """Return the user's developer, made at first sight.

        Cancellation: may leave it made.
        """
        return await developers.ensure_profile(
            self._database, DeveloperId(self._ids.uuid7()), user_id, self._clock.now()
        )

    async def change_profile(self, user_id: UserId, changes: Mapping[str, str | None]) -> None:
        """Set fields of the user's profile, None clears.

        Cancellation: may leave it changed.
        """
        await self.ensure_profile(user_id)
        await developers.change_profile(self._database, user_id, changes, self._clock.now())

    async def register(self, user_id: UserId, offer: ApiOffer) -> Outcome:
        """Store an API with its endpoints and prices, all or nothing.

        Args:
            offer: each field well-formed, the base URL checked.

        Returns:
            Done; OfferRefused, NotAllowed: nothing was stored.

        Cancellation: nothing was stored, or all.
        """
        wrong = check_endpoints(offer.endpoints)
        if wrong:
            await trio.lowlevel.checkpoint()
            return OfferRefused(tuple(wrong))
        now = self._clock.now()
        developer_id = await self.ensure_profile(user_id)
        wish = offer.slug or make_slug(offer.name)
        slugs: tuple[str, ...] = (wish,)
        if offer.slug is None or offer.slug_is_wish:
            slugs = slug_candidates(wish, self._ids.uuid7()[-12:])
        async with self._database.transaction() as connection:
            if await apis.lock_developer(connection, developer_id) >= APIS_MAX:
                return NotAllowed(f"You have {APIS_MAX} APIs, which is as many as anyone may")
            api_id = await apis.add_api(connection, developer_id, slugs, offer, now)
        if api_id is None:
            return NotAllowed("The slug is taken", {"field": "body.slug"})
        await self._tell()
        return Done(api_id)

    async def change(self, user_id: UserId, ref: ApiRef, changes: Mapping[str, Any]) -> Outcome:
        """Set fields of an API.

        Args:
            changes: name, base_url, description, category, tags, logo_url; upstream_headers by name, None takes a
                field away. None as a whole clears what may be empty.

        Cancellation: nothing was changed, or all.
        """

        async def change(connection: Connection, row: Row, now: datetime) -> Outcome:
            headers: dict[str, str] = json.loads(row["upstream_headers"])
            if "upstream_headers" in changes:
                headers = merge_headers(headers, changes["upstream_headers"])
                wrong = check_headers(headers)
                if wrong:
                    message = f"{wrong[0]}, those that are kept among them"
                    return OfferRefused((Wrong(("upstream_headers",), message, "TOO_LARGE"),))
            fields = {**dict(row), **changes, "upstream_headers": headers}
            fields["tags"] = fields["tags"] or ()
            await apis.change_api(connection, row["api_id"], fields, now)
            return Done(row["api_id"])

        return await self._on_api(user_id, ref, change)

    async def move(self, user_id: UserId, ref: ApiRef, move: Move) -> Outcome:
        """Publish, pause, resume or archive an API; where it stands there already, nothing is done.

        Cancellation: it was moved, or not.
        """

        async def change(connection: Connection, row: Row, now: datetime) -> Outcome:
            status = after(row["status"], move)
            if status is None:
                return NotAllowed(f"An API that is {row['status']} cannot {move}", {"status": row["status"]})
            if status != row["status"]:
                await apis.set_status(connection, row["api_id"], status, now)
            return Done(row["api_id"])

        return await self._on_api(user_id, ref, change, archived=True)

    async def put_endpoints(self, user_id: UserId, ref: ApiRef, offers: Sequence[EndpointOffer]) -> Outcome:
        """Add endpoints to an API, and change those that it has: a changed price is a new version.

        Cancellation: nothing was changed, or all.
        """

        async def change(connection: Connection, row: Row, now: datetime) -> Outcome:
            present = await apis.present_endpoints(connection, row["api_id"], now)
            wrong = _refuse_endpoints(offers, present, now)
            if wrong:
                return OfferRefused(tuple(wrong))
            put = await apis.put_endpoints(connection, row["api_id"], offers, present, now)
            await apis.touch(connection, row["api_id"], now)
            return Done(row["api_id"], put.endpoint_ids, put.added_count)

        return await self._on_api(user_id, ref, change)

    async def change_endpoint(
        self,
        user_id: UserId,
        ref: ApiRef,
        endpoint_id: EndpointId,
        changes: Mapping[str, Any],
        price: DatedPrice | None,
    ) -> Outcome:
        """Set fields of an endpoint that is offered, and give it a price.

        Args:
            changes: description, billable_statuses, required_scope.

        Cancellation: nothing was changed, or all.
        """

        async def change(connection: Connection, row: Row, now: datetime) -> Outcome:
            present = await apis.present_endpoints(connection, row["api_id"], now)
            found = next((each for each in present if each.endpoint_id == endpoint_id and not each.retired), None)
            if found is None:
                return NoSuchApi()
            offered = () if price is None else (price,)
            wrong = wrong_versions(found.prices, found.last_version, offered, now)
            if wrong:
                return OfferRefused(tuple(Wrong(("rate_card",), message, "INVALID_VALUE") for message in wrong))
            changed = attrs.evolve(found, **changes)
            if changed != found:
                await apis.change_endpoint(connection, row["api_id"], changed)
            if price is not None:
                offer = EndpointOffer(found.method, found.path, (price,))
                await apis.add_prices(connection, [(endpoint_id, found, offer)], now)
            await apis.touch(connection, row["api_id"], now)
            return Done(row["api_id"], (endpoint_id,))

        return await self._on_api(user_id, ref, change)

    async def retire_endpoint(self, user_id: UserId, ref: ApiRef, endpoint_id: EndpointId) -> Outcome:
        """Offer an endpoint no more.

        Cancellation: it was retired, or not.
        """

        async def change(connection: Connection, row: Row, now: datetime) -> Outcome:
            if not await apis.retire_endpoint(connection, row["api_id"], endpoint_id, now):
                return NoSuchApi()
            await apis.touch(connection, row["api_id"], now)
            return Done(row["api_id"], (endpoint_id,))

        return await self._on_api(user_id, ref, change)

    async def delete(self, ref: ApiRef) -> bool:
        """Take anyone's API out of sight; return False where there never was one. Twice is once.

        Cancellation: it may be deleted.
        """
        found = await apis.delete_api(self._database, ref, self._clock.now())
        await self._tell()
        return found

    async def restore(self, ref: ApiRef) -> bool:
        """Give a deleted API back as it was; return False where there never was one.

        Cancellation: it may be restored.
        """
        found = await apis.restore_api(self._database, ref)
        await self._tell()
        return found

    async def count_popularity(self) -> None:
        """Count the calls of the last 30 days for the marketplace."""
        await apis.recount_popularity(self._database, self._clock.now() - POPULARITY_WINDOW)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Count the calls every few minutes, until cancelled; a database that is away is asked again."""
        task_status.started()
        while True:
            try:
                await self.count_popularity()
            except CalloraFault as fault:
                self._log.warning("popularity_not_counted", error=str(fault))
            await trio.sleep(POPULARITY_SECONDS)

    async def _on_api(
        self,
        user_id: UserId,
        ref: ApiRef,
        change: Callable[[Connection, Row, datetime], Awaitable[Outcome]],
        *,
        archived: bool = False,
    ) -> Outcome:
        """Change a user's own API under its lock.

        Args:
            change: writes only what it answers with Done; called once.
            archived: whether it may be done to an archived API.
        """
        try:
            async with self._database.transaction() as connection:
                row = await apis.lock_api(connection, ref, user_id)
                if row is None:
                    return NoSuchApi()
                if row["status"] == "archived" and not archived:
                    return _ARCHIVED
                outcome = await change(connection, row, self._clock.now())
        except TooManyVersions:
            return _TOO_MANY_VERSIONS
        if isinstance(outcome, Done):
            await self._tell()
        return outcome

    async def _tell(self) -> None:
        """Let the catalogue see the change; it is stored, so a database gone just now is no reason to say otherwise."""
        try:
            await self._catalogue.refresh()
        except StoreUnavailable as fault:
            self._log.warning("catalogue_not_refreshed", error=str(fault))


def _refuse_endpoints(
    offers: Sequence[EndpointOffer], present: Sequence[PresentEndpoint], now: datetime
) -> list[Wrong]:
    known = {(each.method, each.path): each for each in present}
    live = [(each.method, each.path) for each in present if not each.retired]
    retired = {(each.method, each.path) for each in present if each.retired}
    wrong = check_endpoints(offers, live)
    for number, offer in enumerate(offers):
        found = known.get((offer.method, offer.path))
        if found is not None and any(price.card_kept for price in offer.prices):
            wrong += [
                Wrong(("endpoints", number, "rate_card"), message, "INVALID_VALUE")
                for message in wrong_versions(found.prices, found.last_version, offer.prices, now)
            ]
        if (offer.method, offer.path) in retired and any(price.effective_from is not None for price in offer.prices):
            # Its former price would be in effect until then.
            message = "must be left out for an endpoint that was retired: it is offered again at once"
            wrong.append(Wrong(("endpoints", number, "effective_from"), message, "INVALID_VALUE"))
    if len({*live, *((offer.method, offer.path) for offer in offers)}) > ENDPOINTS_MAX:
        wrong.append(Wrong(("endpoints",), f"must be at most {ENDPOINTS_MAX} with those the API has", "TOO_LARGE"))
    return wrong
