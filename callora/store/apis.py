"""APIs, their endpoints and prices, as written: verbs that share the transaction of whoever changes an API.

A change of endpoints or prices needs the API's row locked (`lock_api`, or the row just added): version numbers and what
is there already are read before they are written.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import attrs

from callora.ledger.ids import ApiId, DeveloperId, EndpointId, UserId
from callora.ledger.offers import PRICE_VERSIONS_MAX, ApiOffer, ApiRef, EndpointOffer, Status, new_versions
from callora.ledger.pricing import Price
from callora.ledger.rating import card_values
from callora.store.bridge import Connection, Database, Row
from callora.store.reads.gateway import price_of

_ADD: Final = """
INSERT INTO apis (developer_id, slug, name, base_url, status, upstream_headers, description, category, tags, logo_url,
                  created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11)
ON CONFLICT (slug) DO NOTHING RETURNING api_id
"""

_LOCK_DEVELOPER: Final = "SELECT developer_id FROM developers WHERE developer_id = $1 FOR NO KEY UPDATE"

_COUNT: Final = "SELECT count(*) FROM apis WHERE developer_id = $1 AND deleted_at IS NULL"

_LOCK: Final = """
SELECT a.api_id, a.slug, a.name, a.base_url, a.status, a.upstream_headers::text AS upstream_headers, a.description,
       a.category, a.tags, a.logo_url
FROM apis a JOIN developers d ON d.developer_id = a.developer_id
WHERE (a.slug = $1 OR a.api_id = $2) AND d.user_id = $3 AND a.deleted_at IS NULL
FOR NO KEY UPDATE OF a
"""

_CHANGE: Final = """
UPDATE apis SET name = $2, base_url = $3, upstream_headers = $4, description = $5, category = $6, tags = $7,
                logo_url = $8, updated_at = $9
WHERE api_id = $1
"""

_SET_STATUS: Final = "UPDATE apis SET status = $2, updated_at = $3 WHERE api_id = $1"

_DELETE: Final = """
UPDATE apis SET deleted_at = coalesce(deleted_at, $3) WHERE slug = $1 OR api_id = $2 RETURNING api_id
"""

_RESTORE: Final = "UPDATE apis SET deleted_at = NULL WHERE slug = $1 OR api_id = $2 RETURNING api_id"

# Of an endpoint's versions, those that are in effect or ahead.
_PRESENT: Final = """
SELECT e.endpoint_id, e.method, e.path, e.description, e.billable_statuses, e.required_scope, e.retired_at,
       p.*, coalesce(p.newest, 0) AS last_version
FROM api_endpoints e LEFT JOIN LATERAL (
    SELECT v.version, v.amount, v.effective_from, v.unit, v.unit_credits, v.min_units, v.held_units, v.max_units,
           v.quantity_from, max(v.version) OVER () AS newest,
           lead(v.effective_from) OVER (ORDER BY v.effective_from, v.version) AS replaced_at
    FROM endpoint_prices v WHERE v.endpoint_id = e.endpoint_id) AS p ON p.replaced_at IS NULL OR p.replaced_at > $2
WHERE e.api_id = $1
ORDER BY e.endpoint_id, p.effective_from, p.version
"""

_PUT_ENDPOINTS: Final = """
INSERT INTO api_endpoints (api_id, method, path, description, billable_statuses, required_scope)
SELECT $1, method, path, description, billable_statuses, required_scope
FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
     WITH ORDINALITY AS offered (method, path, description, billable_statuses, required_scope, number)
ORDER BY number
ON CONFLICT (api_id, method, path) DO UPDATE SET
    description = excluded.description, billable_statuses = excluded.billable_statuses,
    required_scope = excluded.required_scope, retired_at = NULL
RETURNING endpoint_id, method, path
"""

_ADD_PRICES: Final = """
INSERT INTO endpoint_prices (endpoint_id, version, amount, effective_from, unit, unit_credits, min_units, held_units,
                             max_units, quantity_from)
SELECT * FROM unnest($1::bigint[], $2::int[], $3::bigint[], $4::timestamptz[], $5::text[], $6::bigint[], $7::bigint[],
                     $8::bigint[], $9::bigint[], $10::text[])
"""

_CHANGE_ENDPOINT: Final = """
UPDATE api_endpoints SET description = $3, billable_statuses = $4, required_scope = $5
WHERE api_id = $1 AND endpoint_id = $2
"""

_RETIRE: Final = """
UPDATE api_endpoints SET retired_at = $3 WHERE api_id = $1 AND endpoint_id = $2 AND retired_at IS NULL
RETURNING endpoint_id
"""

_TOUCH: Final = "UPDATE apis SET updated_at = $2 WHERE api_id = $1"

# Old counts go with what nobody called in the time; one process counts at a time, the others have its figures.
_RECOUNT: Final = """
WITH counted AS (
    SELECT m.api_id, sum(m.calls)::bigint AS calls, sum(m.failed_calls)::bigint AS failed_calls,
           sum(m.latency_us)::bigint AS latency_us
    FROM usage_days m JOIN apis a ON a.api_id = m.api_id
    WHERE m.day >= date_trunc('day', $1::timestamptz, 'UTC') GROUP BY m.api_id
), gone AS (
    DELETE FROM api_popularity WHERE api_id NOT IN (SELECT api_id FROM counted)
)
INSERT INTO api_popularity (api_id, calls, failed_calls, latency_us) SELECT * FROM counted
ON CONFLICT (api_id) DO UPDATE SET
    calls = excluded.calls, failed_calls = excluded.failed_calls, latency_us = excluded.latency_us
"""
_RECOUNT_LOCK: Final = "SELECT pg_try_advisory_xact_lock(7420250301)"


class TooManyVersions(Exception):
    """An endpoint has PRICE_VERSIONS_MAX prices. Raised inside the transaction, which rolls back."""


@attrs.frozen
class PresentEndpoint:
    """An endpoint as it is stored."""

    endpoint_id: EndpointId
    method: str
    path: str
    description: str | None
    billable_statuses: str
    required_scope: str | None
    retired: bool
    prices: tuple[Price, ...]
    """In effect or ahead, by date."""
    last_version: int

    def changed_by(self, offer: EndpointOffer) -> EndpointOffer:
        """Return the offer with what was not sent taken from here."""
        return attrs.evolve(offer, **{name: getattr(self, name) for name in offer.kept})

    def is_as(self, offer: EndpointOffer) -> bool:
        """Tell whether storing this offer changes nothing but, maybe, the price."""
        mine = (self.description, self.billable_statuses, self.required_scope)
        return not self.retired and mine == (offer.description, offer.billable_statuses, offer.required_scope)


@attrs.frozen
class PutEndpoints:
    """What came of storing endpoints."""

    endpoint_ids: tuple[EndpointId, ...]
    """In the order of the offers."""
    added_count: int
    """Offered for the first time, or again after they were retired."""


async def lock_developer(connection: Connection, developer_id: DeveloperId) -> int:
    """Return how many APIs a developer has; until the transaction ends nobody else registers for him."""
    await connection.fetch_value(_LOCK_DEVELOPER, developer_id)
    return int(await connection.fetch_value(_COUNT, developer_id))


async def add_api(
    connection: Connection, developer_id: DeveloperId, slugs: Sequence[str], offer: ApiOffer, now: datetime
) -> ApiId | None:
    """Store an API under the first slug that is free, with its endpoints; return None where none is."""
    for slug in slugs:
        api_id = await connection.fetch_value(
            _ADD,
            developer_id,
            slug,
            offer.name,
            offer.base_url,
            offer.status,
            json.dumps(dict(offer.upstream_headers)),
            offer.description,
            offer.category,
            list(offer.tags),
            offer.logo_url,
            now,
        )
        if api_id is not None:
            await put_endpoints(connection, ApiId(api_id), offer.endpoints, (), now)
            return ApiId(api_id)
    return None


async def lock_api(connection: Connection, ref: ApiRef, user_id: UserId) -> Row | None:
    """Return a user's own API, locked until the transaction ends; None where he has no such API."""
    return await connection.fetch_row(_LOCK, ref.slug, ref.number, user_id)


async def change_api(connection: Connection, api_id: ApiId, fields: Mapping[str, Any], now: datetime) -> None:
    """Store all the fields of an API that may change."""
    await connection.execute(
        _CHANGE,
        api_id,
        fields["name"],
        fields["base_url"],
        json.dumps(fields["upstream_headers"]),
        fields["description"],
        fields["category"],
        list(fields["tags"]),
        fields["logo_url"],
        now,
    )


async def set_status(connection: Connection | Database, api_id: ApiId, status: Status, now: datetime) -> None:
    """Publish, pause or archive an API."""
    await connection.execute(_SET_STATUS, api_id, status, now)


async def present_endpoints(connection: Connection, api_id: ApiId, now: datetime) -> list[PresentEndpoint]:
    """Return every endpoint of an API, retired ones too, oldest first."""
    lines: dict[int, list[Row]] = {}
    for row in await connection.fetch(_PRESENT, api_id, now):
        lines.setdefault(row["endpoint_id"], []).append(row)
    return [_present(rows) for rows in lines.values()]


def _present(rows: Sequence[Row]) -> PresentEndpoint:
    first = rows[0]
    return PresentEndpoint(
        endpoint_id=EndpointId(first["endpoint_id"]),
        method=first["method"],
        path=first["path"],
        description=first["description"],
        billable_statuses=first["billable_statuses"],
        required_scope=first["required_scope"],
        retired=first["retired_at"] is not None,
        prices=tuple(price_of(row) for row in rows if row["version"] is not None),
        last_version=first["last_version"],
    )


async def put_endpoints(
    connection: Connection,
    api_id: ApiId,
    offers: Sequence[EndpointOffer],
    present: Sequence[PresentEndpoint],
    now: datetime,
) -> PutEndpoints:
    """Add endpoints and change those of the same method and path, with a new price version where the price changes.

    Args:
        offers: no two of the same method and path.
        present: what `present_endpoints` said under the API's lock.

    Raises:
        TooManyVersions.
    """
    known = {(each.method, each.path): each for each in present}
    ids: dict[tuple[str, str], EndpointId] = {place: each.endpoint_id for place, each in known.items()}
    complete = []
    for offer in offers:
        found = known.get((offer.method, offer.path))
        complete.append(offer if found is None else found.changed_by(offer))
    stored = [
        offer
        for offer in complete
        if (found := known.get((offer.method, offer.path))) is None or not found.is_as(offer)
    ]
    if stored:
        columns = ([getattr(offer, name) for offer in stored] for name in _COLUMNS)
        for row in await connection.fetch(_PUT_ENDPOINTS, api_id, *columns):
            ids[row["method"], row["path"]] = EndpointId(row["endpoint_id"])
    await add_prices(
        connection,
        [(ids[each.method, each.path], known.get((each.method, each.path)), each) for each in complete],
        now,
    )
    added = [offer for offer in complete if (found := known.get((offer.method, offer.path))) is None or found.retired]
    return PutEndpoints(tuple(ids[offer.method, offer.path] for offer in complete), len(added))


_COLUMNS: Final = ("method", "path", "description", "billable_statuses", "required_scope")


async def add_prices(
    connection: Connection,
    offers: Sequence[tuple[EndpointId, PresentEndpoint | None, EndpointOffer]],
    now: datetime,
) -> None:
    """Store the versions that give these endpoints these prices.

    Raises:
        TooManyVersions.
    """
    made: list[tuple[object, ...]] = []
    for endpoint_id, found, offer in offers:
        present, last = (found.prices, found.last_version) if found is not None else ((), 0)
        versions = new_versions(present, last, offer.prices, now)
        if versions and versions[-1].version > PRICE_VERSIONS_MAX:
            raise TooManyVersions
        made += (
            (endpoint_id, each.version, each.amount, each.effective_from, *card_values(each.card)) for each in versions
        )
    if made:
        await connection.execute(_ADD_PRICES, *(list(column) for column in zip(*made, strict=True)))


async def change_endpoint(connection: Connection, api_id: ApiId, endpoint: PresentEndpoint) -> None:
    """Store an endpoint's description, billable statuses and scope."""
    await connection.execute(
        _CHANGE_ENDPOINT,
        api_id,
        endpoint.endpoint_id,
        endpoint.description,
        endpoint.billable_statuses,
        endpoint.required_scope,
    )


async def retire_endpoint(connection: Connection, api_id: ApiId, endpoint_id: EndpointId, now: datetime) -> bool:
    """Offer an endpoint no more; return False where the API offers no such endpoint."""
    return await connection.fetch_value(_RETIRE, api_id, endpoint_id, now) is not None


async def touch(connection: Connection, api_id: ApiId, now: datetime) -> None:
    """Note that an API changed."""
    await connection.execute(_TOUCH, api_id, now)


async def delete_api(database: Database, ref: ApiRef, now: datetime) -> bool:
    """Take an API out of everyone's sight, its rows stay; return False where there never was one."""
    return await database.fetch_value(_DELETE, ref.slug, ref.number, now) is not None


async def restore_api(database: Database, ref: ApiRef) -> bool:
    """Give a deleted API back as it was; return False where there never was one."""
    return await database.fetch_value(_RESTORE, ref.slug, ref.number) is not None


async def recount_popularity(database: Database, since: datetime) -> None:
    """Count every API's calls since the day of a moment anew, unless another process is at it."""
    async with database.transaction() as connection:
        if await connection.fetch_value(_RECOUNT_LOCK):
            await connection.execute(_RECOUNT, since)
