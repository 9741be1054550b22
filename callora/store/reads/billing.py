"""What billing reads: requests with what became of them, what is offered, who pays, and what was given back."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import attrs

from callora.ledger.commands import Charged
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.billing import BillingRequest
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

NO_KEY: Final = ApiKeyId("00000000-0000-0000-0000-000000000000")
"""The key of a usage event that no key asked for."""
OWN_PRICE: Final = 0
"""The price version of a usage event whose amount its payer named."""
LATEST_HOLD: Final = timedelta(hours=1)
"""How long after an event's id was made its hold may be placed, for a call: far longer than any call waits."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_MAX: Final = 9000
CLOCKS: Final = timedelta(minutes=1)
"""How far the clocks of processes may differ."""

_REQUEST: Final = """
SELECT r.user_id, r.request_id, r.vault_id, r.event_id, r.api_key_id, r.api_id, r.endpoint_id, r.amount, r.fingerprint,
       r.created_at, u.state::text AS state, v.network, v.available
FROM billing_requests r
JOIN vaults v ON v.vault_id = r.vault_id
LEFT JOIN usage_events u ON u.vault_id = r.vault_id AND u.event_id = r.event_id
"""

_FIND: Final = _REQUEST + "WHERE r.user_id = $1 AND r.request_id = $2"

_LIST: Final = (
    _REQUEST
    + """
WHERE r.user_id = $1 AND r.created_at <= coalesce($3::timestamptz, 'infinity')
      AND (r.created_at < coalesce($3::timestamptz, 'infinity') OR r.request_id > $4::text)
ORDER BY r.created_at DESC, r.request_id LIMIT $2
"""
)

_VAULTS: Final = "SELECT vault_id, network FROM vaults WHERE user_id = $1"

_KEY: Final = """
SELECT k.vault_id, (k.allowed_apis IS NULL OR $4::bigint = ANY (k.allowed_apis)) AS api_allowed,
       (p.allowed_apis IS NULL OR $4 = ANY (p.allowed_apis)) AS plan_allowed,
       (k.allowed_endpoints IS NULL OR $5::bigint = ANY (k.allowed_endpoints)) AS endpoint_allowed
FROM api_keys k JOIN vaults v ON v.vault_id = k.vault_id JOIN plans p ON p.plan_id = v.plan_id
WHERE k.api_key_id = $1 AND k.user_id = $2 AND k.revoked_at IS NULL AND NOT k.disabled
      AND (k.expires_at IS NULL OR k.expires_at > $3)
"""

_OFFER: Final = """
SELECT a.developer_id FROM apis a JOIN api_endpoints e ON e.api_id = a.api_id
WHERE a.api_id = $1 AND e.endpoint_id = $2 AND a.status = 'active' AND a.deleted_at IS NULL AND e.retired_at IS NULL
"""

_CREDITS: Final = """
SELECT u.user_id, coalesce(v.available, 0)::bigint AS available, coalesce(e.granted, 0)::bigint AS granted,
       coalesce(v.created_at, u.created_at) AS created_at,
       greatest(v.created_at, e.latest, c.latest, u.created_at) AS updated_at
FROM users u
LEFT JOIN vaults v ON v.user_id = u.user_id AND v.network = $2
LEFT JOIN LATERAL (
    SELECT sum(amount) FILTER (WHERE kind = 'grant') AS granted, max(created_at) AS latest
    FROM ledger_entries WHERE vault_id = v.vault_id
) AS e ON true
LEFT JOIN LATERAL (
    SELECT coalesce(closed_at, created_at) AS latest FROM usage_events WHERE vault_id = v.vault_id
    ORDER BY event_id DESC LIMIT 1
) AS c ON true
WHERE u.user_id = $1
"""

_BILLED_EVENT: Final = """
SELECT vault_id FROM billing_requests WHERE event_id = $1
UNION ALL SELECT vault_id FROM external_holds WHERE event_id = $1
"""

_CALLED_EVENT: Final = """
SELECT vault_id FROM usage_events WHERE event_id = $1 AND created_at BETWEEN $2 AND $3
"""

_CHARGE: Final = """
SELECT u.vault_id, u.amount, coalesce((
           SELECT sum(e.amount) FROM ledger_entries e
           WHERE e.vault_id = u.vault_id AND e.event_id = u.event_id AND e.kind = 'refund'
       ), 0)::bigint AS refunded, v.available
FROM usage_events u JOIN vaults v ON v.vault_id = u.vault_id
WHERE u.vault_id = $1 AND u.event_id = $2 AND u.state = 'captured'
"""

_ENTRY: Final = "SELECT amount FROM ledger_entries WHERE vault_id = $1 AND kind = $2 AND ref = $3"


@attrs.frozen
class BilledRequest:
    """A request and what became of it."""

    request: BillingRequest
    state: Literal["held", "captured", "released", "expired"] | None
    """Its usage event's; None while there is none."""
    network: str
    available: Stroops
    """What its vault has to spend."""


@attrs.frozen
class OwnKey:
    """A usable key of whom it was asked for."""

    vault_id: VaultId
    api_allowed: bool
    plan_allowed: bool
    """Whether its vault's plan has the API."""
    endpoint_allowed: bool


@attrs.frozen
class Credits:
    """What a user has on a network, and how much of all he ever had was given to him."""

    available: Stroops
    granted: Stroops
    created_at: datetime
    updated_at: datetime


@attrs.frozen
class Charge:
    """A captured usage event."""

    vault_id: VaultId
    amount: Stroops
    refunded: Stroops
    available: Stroops
    """What its vault has to spend."""

    @property
    def refundable(self) -> Stroops:
        """What is left to give back."""
        return Stroops(self.amount - self.refunded)


def _billed(row: Row) -> BilledRequest:
    return BilledRequest(
        BillingRequest(
            user_id=UserId(str(row["user_id"])),
            request_id=row["request_id"],
            vault_id=VaultId(str(row["vault_id"])),
            event_id=EventId(str(row["event_id"])),
            api_key_id=None if row["api_key_id"] is None else ApiKeyId(str(row["api_key_id"])),
            api_id=ApiId(row["api_id"]),
            endpoint_id=EndpointId(row["endpoint_id"]),
            amount=Stroops(row["amount"]),
            fingerprint=row["fingerprint"],
            created_at=row["created_at"],
        ),
        row["state"],
        row["network"],
        Stroops(row["available"]),
    )


async def find_request(database: Database, user_id: UserId, request_id: str) -> BilledRequest | None:
    """Return a user's own request, or None."""
    row = await database.fetch_row(_FIND, user_id, request_id)
    return None if row is None else _billed(row)


async def list_requests(
    database: Database, user_id: UserId, limit: int, after: tuple[datetime, str] | None
) -> Sequence[BilledRequest]:
    """Return at most `limit` of a user's requests, the latest first.

    Args:
        after: date and request id of the last one seen.
    """
    at, request_id = after or (None, None)
    return [_billed(row) for row in await database.fetch(_LIST, user_id, limit, at, request_id)]


async def vaults_of(database: Database, user_id: UserId) -> dict[str, VaultId]:
    """Return a user's vaults by their network."""
    return {row["network"]: VaultId(str(row["vault_id"])) for row in await database.fetch(_VAULTS, user_id)}


async def own_key(
    database: Database, user_id: UserId, api_key_id: ApiKeyId, api_id: ApiId, endpoint_id: EndpointId, now: datetime
) -> OwnKey | None:
    """Return a key of this user that is neither revoked, disabled nor expired, and what it may be used for."""
    row = await database.fetch_row(_KEY, api_key_id, user_id, now, api_id, endpoint_id)
    if row is None:
        return None
    return OwnKey(VaultId(str(row["vault_id"])), row["api_allowed"], row["plan_allowed"], row["endpoint_allowed"])


async def offered(
    database: Database, api_id: ApiId, endpoint_id: EndpointId, api_key_id: ApiKeyId | None
) -> Charged | None:
    """Return what a charge for this endpoint is for, or None where no published API offers it."""
    developer = await database.fetch_value(_OFFER, api_id, endpoint_id)
    if developer is None:
        return None
    return Charged(api_key_id or NO_KEY, DeveloperId(str(developer)), api_id, endpoint_id, OWN_PRICE)


async def credits_of(database: Database, user_id: UserId, network: str) -> Credits | None:
    """Return what a user has on a network, nothing where he has no vault; None for who is no user."""
    row = await database.fetch_row(_CREDITS, user_id, network)
    if row is None:
        return None
    return Credits(Stroops(row["available"]), Stroops(row["granted"]), row["created_at"], row["updated_at"])


async def find_charge(database: Database, event_id: EventId, vault_id: VaultId | None = None) -> Charge | None:
    """Return the captured usage event with this id, whoever paid it; None where there is none.

    Events are found by their vault. Without it, a charge asked for over REST is found by its request or its hold, and a
    call's by the date inside its id, near which its hold was placed.
    """
    if vault_id is None:
        vault_id = await database.fetch_value(_BILLED_EVENT, event_id)
    if vault_id is None:
        made_at = _date_of(event_id)
        if made_at is None:
            return None
        vault_id = await database.fetch_value(_CALLED_EVENT, event_id, made_at - CLOCKS, made_at + LATEST_HOLD)
    if vault_id is None:
        return None
    row = await database.fetch_row(_CHARGE, vault_id, event_id)
    if row is None:
        return None
    return Charge(
        VaultId(str(row["vault_id"])), Stroops(row["amount"]), Stroops(row["refunded"]), Stroops(row["available"])
    )


async def entry_amount(database: Database, vault_id: VaultId, kind: str, ref: str) -> Stroops | None:
    """Return what was booked under a reference, or None."""
    amount = await database.fetch_value(_ENTRY, vault_id, kind, ref)
    return None if amount is None else Stroops(amount)


def _date_of(event_id: EventId) -> datetime | None:
    """Return the date inside a UUIDv7; None for what is none, or lies beyond any calendar."""
    if event_id[14] != "7":
        return None
    try:
        made_at = _EPOCH + timedelta(milliseconds=int(event_id[:8] + event_id[9:13], 16))
    except OverflowError:
        return None
    return made_at if made_at.year <= _YEAR_MAX else None
