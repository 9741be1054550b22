"""Requests for more credits: asked for by owners, decided once by operators, and given once after that."""

from datetime import datetime, timedelta
from typing import Final

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.registry import VaultRegistry
from callora.ledger.clock import Clock
from callora.ledger.commands import GrantQuota
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import Ids, UserId, VaultId
from callora.ledger.outcomes import Draining, Overloaded, QuotaGranted
from callora.store import quota_requests as store
from callora.store.bridge import Connection, Database
from callora.store.outbox import Event, add_events
from callora.store.quota_requests import QuotaRequest
from callora.store.reads.quota_requests import find_request
from callora.store.subscriptions import lock_user

OPEN_MAX: Final = 5
"""Undecided requests of a vault."""
GIVEN: Final = timedelta(days=30)
"""How long approved credits last where the approval does not say."""
LEFT_BEHIND: Final = timedelta(minutes=2)
"""An approval this old whose credits are not known to be given has lost its process."""
BATCH: Final = 100


@attrs.frozen
class TooManyOpen:
    """The vault has OPEN_MAX undecided requests."""


@attrs.frozen
class RequestMissing:
    """There is no such request."""


@attrs.frozen
class DecidedOtherwise:
    """The request was decided before, and not in this way."""

    state: str


class QuotaRequests:
    """Takes requests, and carries decisions out."""

    def __init__(
        self, database: Database, registry: VaultRegistry, clock: Clock, ids: Ids, log: FilteringBoundLogger
    ) -> None:
        self._database = database
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._log = log

    async def ask(self, user_id: UserId, vault_id: VaultId, credits_asked: int, reason: str) -> str | TooManyOpen:
        """Store a request of a vault's owner; return its id.

        Raises:
            StoreUnavailable: nothing was stored. OutcomeUnknown: it may have been; the list tells.
        """
        now, request_id = self._clock.now(), self._ids.uuid7()
        async with self._database.transaction() as connection:
            await lock_user(connection, user_id)
            if await store.count_open(connection, user_id, vault_id) >= OPEN_MAX:
                return TooManyOpen()
            await store.add_request(connection, request_id, vault_id, user_id, credits_asked, reason, now)
            payload = {"requestId": request_id, "vaultId": vault_id, "credits": credits_asked, "reason": reason}
            await add_events(
                connection, [Event(self._ids.uuid7(), "quota_request_made", request_id, None, payload)], now
            )
        return request_id

    async def approve(
        self, request_id: str, credits_granted: int | None, expires_at: datetime | None, by: str
    ) -> QuotaRequest | RequestMissing | DecidedOtherwise | Overloaded | Draining:
        """Approve a request and give what it is approved for; repeated with the same numbers it changes nothing.

        Args:
            credits_granted: > 0; None: what was asked for.
            expires_at: ahead; None: GIVEN from now.
            by: who decides, for the record.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: it may be approved; then it is given by the sweep at
                the latest.
        """
        now = self._clock.now()
        grant_id = self._ids.uuid7()
        decided = await store.approve(
            self._database, request_id, credits_granted, expires_at or now + GIVEN, grant_id, now, by
        )
        if decided is None:
            decided = await find_request(self._database, request_id)
            if decided is None:
                return RequestMissing()
            same = credits_granted in (None, decided.granted) and expires_at in (None, decided.expires_at)
            if decided.state != "approved" or not same:
                return DecidedOtherwise(decided.state)
        try:
            refused = await self._give(decided)
        except StoreUnavailable as fault:
            raise OutcomeUnknown("it is approved, and given by the sweep") from fault
        return decided if refused is None else refused

    async def reject(
        self, request_id: str, answer: str | None, by: str
    ) -> QuotaRequest | RequestMissing | DecidedOtherwise:
        """Reject a request; repeated it changes nothing.

        Raises:
            StoreUnavailable: nothing was changed. OutcomeUnknown: rejecting again is safe.
        """
        now = self._clock.now()
        async with self._database.transaction() as connection:
            decided = await store.reject(connection, request_id, answer, now, by)
            if decided is not None:
                await self._tell(connection, decided, "quota_request_rejected", now)
                return decided
        decided = await find_request(self._database, request_id)
        if decided is None:
            return RequestMissing()
        return decided if decided.state == "rejected" else DecidedOtherwise(decided.state)

    async def sweep(self) -> None:
        """Give what was approved by a process that died at it.

        Raises:
            CalloraFault: what is left could not be read; the next sweep makes up for it.
        """
        for each in await store.left_ungranted(self._database, self._clock.now() - LEFT_BEHIND, BATCH):
            try:
                await self._give(each)
            except CalloraFault as fault:
                self._log.warning("quota_request_left", request_id=each.request_id, error=str(fault))

    async def _give(self, request: QuotaRequest) -> Overloaded | Draining | None:
        """Grant what was approved, once under the request's name; None when that is done."""
        if request.granted_at is not None:
            return None
        assert request.grant_id is not None
        assert request.granted is not None
        assert request.expires_at is not None
        now = self._clock.now()
        # What would have ended while nobody could give it is not given any more.
        if request.expires_at > now:
            command = GrantQuota(
                request.grant_id, "promo", request.granted, f"request:{request.request_id}", request.expires_at
            )
            outcome = await self._registry.ask(request.vault_id, command)
            if isinstance(outcome, Overloaded | Draining):
                return outcome
            assert isinstance(outcome, QuotaGranted), outcome
        async with self._database.transaction() as connection:
            if await store.note_granted(connection, request.request_id, now):
                await self._tell(connection, request, "quota_request_approved", now)
        return None

    async def _tell(self, connection: Connection, request: QuotaRequest, kind: str, now: datetime) -> None:
        payload: dict[str, object] = {
            "requestId": request.request_id,
            "vaultId": request.vault_id,
            "credits": request.granted,
            "expiresAt": None if request.expires_at is None else request.expires_at.isoformat().replace("+00:00", "Z"),
            "reason": request.answer,
        }
        event = Event(
            event_id=self._ids.uuid7(),
            type=kind,
            subject=request.request_id,
            developer_id=None,
            payload=payload,
            user_id=request.user_id,
        )
        await add_events(connection, [event], now)
