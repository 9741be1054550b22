"""APIs as they are shown: the marketplace's list, one API, its owner's, the operators', and endpoints with prices.

Every list is a keyset scan. A sort key is a number, highest first; where a page begins is a key and an API's number.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import attrs

from callora.ledger.ids import ApiId, EndpointId, UserId
from callora.ledger.offers import ApiRef
from callora.store.bridge import Database as Database  # what HTTP hands in: it may not know the bridge itself
from callora.store.bridge import Row

Sort = Literal["relevance", "price_asc", "price_desc", "popularity", "newest"]
_INT64_MAX: Final = 2**63 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROS_MAX: Final = 253_402_300_799_000_000

_CARD: Final = "{0}.unit, {0}.unit_credits, {0}.min_units, {0}.held_units, {0}.max_units, {0}.quantity_from"
_PRICE_NOW: Final = """
SELECT {columns} FROM endpoint_prices p WHERE p.endpoint_id = e.endpoint_id AND p.effective_from <= $1
ORDER BY p.effective_from DESC, p.version DESC LIMIT 1
"""
_CURRENT_PRICE: Final = _PRICE_NOW.format(columns="p.amount")

_COLUMNS: Final = f"""
a.api_id, a.slug, a.name, a.description, a.category, a.tags, a.logo_url, a.status, a.created_at, a.updated_at,
a.deleted_at, a.base_url, a.upstream_headers::text AS upstream_headers,
d.developer_id::text AS developer_id, d.user_id::text AS user_id, d.name AS developer_name,
d.website AS developer_website,
d.description AS developer_description, o.price_from, o.endpoint_count, p.calls, p.failed_calls, p.latency_us
FROM apis a JOIN developers d ON d.developer_id = a.developer_id
LEFT JOIN api_popularity p ON p.api_id = a.api_id
LEFT JOIN LATERAL (
    SELECT min(c.amount) AS price_from, count(*) AS endpoint_count
    FROM api_endpoints e LEFT JOIN LATERAL ({_CURRENT_PRICE}) AS c ON true
    WHERE e.api_id = a.api_id AND e.retired_at IS NULL) AS o ON true
"""  # noqa: S608 - constants only

# First which, by narrow rows, then what is shown of them.
_LIST: Final = """
WITH picked AS MATERIALIZED (
    SELECT a.api_id, {key} AS sort_key
    FROM apis a JOIN developers d ON d.developer_id = a.developer_id
    LEFT JOIN api_popularity p ON p.api_id = a.api_id {prices}
    WHERE a.status = 'active' AND a.deleted_at IS NULL
      AND ($2::text IS NULL OR a.name ILIKE $2 OR a.description ILIKE $2 OR d.name ILIKE $2
           OR EXISTS (SELECT FROM unnest(a.tags) AS tag WHERE tag ILIKE $2))
      AND ($3::text[] IS NULL OR lower(a.category) = ANY ($3))
      AND ($4::bigint IS NULL OR {price} >= $4)
      AND ($5::bigint IS NULL OR {price} <= $5)
      AND ({key}, a.api_id) < ($6::{type}, $7::bigint)
    ORDER BY {key} DESC, a.api_id DESC LIMIT $8)
SELECT picked.sort_key, {columns} JOIN picked ON picked.api_id = a.api_id
ORDER BY picked.sort_key DESC, picked.api_id DESC
"""

# Of all APIs in one go, where it decides which are picked.
_PRICES: Final = """
LEFT JOIN (
    SELECT e.api_id, min(c.amount) AS price_from
    FROM api_endpoints e JOIN (
        SELECT DISTINCT ON (q.endpoint_id) q.endpoint_id, q.amount FROM endpoint_prices q WHERE q.effective_from <= $1
        ORDER BY q.endpoint_id, q.effective_from DESC, q.version DESC) AS c ON c.endpoint_id = e.endpoint_id
    WHERE e.retired_at IS NULL GROUP BY e.api_id) AS cheapest ON cheapest.api_id = a.api_id
"""

# How well an API fits: what fits equally well is sorted by its calls. $2 is `%text%`.
_RELEVANCE: Final = """
(CASE WHEN a.name ILIKE substr($2, 2, length($2) - 2) THEN 5
      WHEN a.name ILIKE substr($2, 2) THEN 4
      WHEN a.name ILIKE $2 THEN 3
      WHEN EXISTS (SELECT FROM unnest(a.tags) AS tag WHERE tag ILIKE $2) THEN 2
      WHEN d.name ILIKE $2 THEN 1
      ELSE 0 END * 1099511627776 + least(coalesce(p.calls, 0), 1099511627775))
"""

_KEYS: Final[Mapping[Sort, str]] = {
    "relevance": _RELEVANCE,
    "price_asc": f"-coalesce(cheapest.price_from, {_INT64_MAX})",
    "price_desc": "coalesce(cheapest.price_from, -1)",
    "popularity": "coalesce(p.calls, 0)",
    "newest": "a.created_at",  # by the column itself, so that the index does the sorting
}


def _list_sql(sort: Sort, by_price: bool) -> str:
    return _LIST.format(
        key=_KEYS[sort],
        type="timestamptz" if sort == "newest" else "bigint",
        columns=_COLUMNS,
        prices=_PRICES if by_price else "",
        price="cheapest.price_from" if by_price else "NULL::bigint",
    )


_LISTS: Final = {
    (sort, by_price): _list_sql(sort, by_price)
    for sort in _KEYS
    for by_price in (False, True)
    if by_price or "cheapest" not in _KEYS[sort]
}

_ONE: Final = f"""
SELECT {_COLUMNS}
WHERE (a.slug = $2 OR a.api_id = $3) AND a.deleted_at IS NULL
  AND CASE WHEN $4::uuid IS NULL THEN a.status = 'active' ELSE d.user_id = $4 END
"""

_OWN: Final = f"""
SELECT {_COLUMNS}
WHERE d.user_id = $2 AND a.deleted_at IS NULL AND ($3::text IS NULL OR a.status = $3)
  AND (a.created_at, a.api_id) < ($4::timestamptz, $5::bigint)
ORDER BY a.created_at DESC, a.api_id DESC LIMIT $6
"""

_ALL: Final = f"""
SELECT {_COLUMNS}
WHERE ($2::text IS NULL OR a.name ILIKE $2 OR a.slug ILIKE $2) AND ($3::text IS NULL OR a.status = $3)
  AND ($4::boolean IS NULL OR (a.deleted_at IS NOT NULL) = $4) AND ($5::uuid IS NULL OR a.developer_id = $5)
  AND ($8::text IS NULL OR a.slug = $8 OR a.api_id = $9)
  AND (a.created_at, a.api_id) < ($6::timestamptz, $7::bigint)
ORDER BY a.created_at DESC, a.api_id DESC LIMIT $10
"""

_ENDPOINTS: Final = f"""
SELECT e.api_id, e.endpoint_id, e.method, e.path, e.description, e.billable_statuses, e.required_scope, c.*,
       n.amount AS next_amount, n.effective_from AS next_from, n.unit AS next_unit, n.unit_credits AS next_unit_credits,
       n.min_units AS next_min_units, n.held_units AS next_held_units, n.max_units AS next_max_units,
       n.quantity_from AS next_quantity_from
FROM unnest($2::bigint[]) AS wanted (api_id)
CROSS JOIN LATERAL (
    SELECT * FROM api_endpoints x WHERE x.api_id = wanted.api_id AND x.retired_at IS NULL
        AND ($4::bigint[] IS NULL OR x.endpoint_id = ANY ($4))
    ORDER BY x.endpoint_id LIMIT $3) AS e
LEFT JOIN LATERAL ({_PRICE_NOW.format(columns="p.amount, " + _CARD.format("p"))}) AS c ON true
LEFT JOIN LATERAL (
    SELECT p.amount, p.effective_from, {_CARD.format("p")} FROM endpoint_prices p
    WHERE p.endpoint_id = e.endpoint_id AND p.effective_from > $1
    ORDER BY p.effective_from, p.version DESC LIMIT 1) AS n ON true
ORDER BY e.api_id, e.endpoint_id
"""  # noqa: S608 - constants only

# A version that another of the same date replaced was never in effect, and is not exported.
_SCHEDULE: Final = f"""
SELECT e.endpoint_id, p.*
FROM api_endpoints e CROSS JOIN LATERAL (
    SELECT v.amount, v.effective_from, {_CARD.format("v")},
           lead(v.effective_from) OVER (ORDER BY v.effective_from, v.version) AS replaced_at
    FROM endpoint_prices v WHERE v.endpoint_id = e.endpoint_id) AS p
WHERE e.api_id = $1 AND e.retired_at IS NULL AND p.effective_from > $2
  AND (p.replaced_at IS NULL OR p.replaced_at > p.effective_from)
ORDER BY e.endpoint_id, p.effective_from
"""  # noqa: S608 - constants only

_OWN_ENDPOINT: Final = """
SELECT e.endpoint_id FROM api_endpoints e JOIN apis a ON a.api_id = e.api_id
JOIN developers d ON d.developer_id = a.developer_id
WHERE (a.slug = $1 OR a.api_id = $2) AND e.endpoint_id = $3 AND d.user_id = $4 AND a.deleted_at IS NULL
"""

_VERSIONS: Final = """
SELECT version, amount, effective_from, unit, unit_credits, min_units, held_units, max_units, quantity_from,
       version = (SELECT q.version FROM endpoint_prices q WHERE q.endpoint_id = $1 AND q.effective_from <= $2
                  ORDER BY q.effective_from DESC, q.version DESC LIMIT 1) AS in_effect
FROM endpoint_prices WHERE endpoint_id = $1 AND version < $3 ORDER BY version DESC LIMIT $4
"""

_PROFILE: Final = """
SELECT developer_id::text AS id, user_id::text AS user_id, name, website, description, category, created_at, updated_at
FROM developers WHERE user_id = $1
"""


@attrs.frozen
class Filters:
    """What the marketplace is asked for."""

    search: str | None = None
    """Looked for in name, description, tags and the developer's name, in whatever case."""
    categories: Sequence[str] | None = None
    price_min: int | None = None
    """Of the cheapest endpoint, in stroops."""
    price_max: int | None = None


def contains(text: str) -> str:
    """Return the pattern of ILIKE that a text is found by as it stands."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def micros(moment: datetime) -> int:
    """Return a moment as a cursor holds it: microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment_of(position: int) -> datetime:
    """Return the moment that a cursor holds.

    Raises:
        ValueError: none does.
    """
    if not 0 <= position <= _MICROS_MAX:
        raise ValueError("no such moment")
    return _EPOCH + timedelta(microseconds=position)


_FIRST: Final = (datetime.max.replace(tzinfo=UTC), _INT64_MAX)


async def list_public(
    database: Database, filters: Filters, sort: Sort, after: tuple[int, int] | None, limit: int, now: datetime
) -> Sequence[Row]:
    """Return at most `limit` active APIs after a position, each with its `sort_key`.

    Args:
        sort: relevance needs a search.

    Raises:
        ValueError: the position is none of this sort's.
    """
    key, number = after or (_INT64_MAX, _INT64_MAX)
    position: object = key
    if sort == "newest":
        position = _FIRST[0] if after is None else moment_of(key)
    categories = None if filters.categories is None else [each.lower() for each in filters.categories]
    search = None if filters.search is None else contains(filters.search)
    by_price = filters.price_min is not None or filters.price_max is not None or sort in ("price_asc", "price_desc")
    return await database.fetch(
        _LISTS[sort, by_price], now, search, categories, filters.price_min, filters.price_max, position, number, limit
    )


async def find_api(database: Database, ref: ApiRef, owner: UserId | None, now: datetime) -> Row | None:
    """Return an API that anyone may see, or any of its owner's."""
    return await database.fetch_row(_ONE, now, ref.slug, ref.number, owner)


async def list_own(
    database: Database, owner: UserId, status: str | None, after: tuple[datetime, int] | None, limit: int, now: datetime
) -> Sequence[Row]:
    """Return at most `limit` of a user's APIs after a position, newest first."""
    return await database.fetch(_OWN, now, owner, status, *(after or _FIRST), limit)


@attrs.frozen
class AdminFilters:
    """What operators ask for."""

    search: str | None = None
    status: str | None = None
    deleted: bool | None = None
    developer_id: str | None = None
    ref: ApiRef | None = None


async def list_all(
    database: Database, filters: AdminFilters, after: tuple[datetime, int] | None, limit: int, now: datetime
) -> Sequence[Row]:
    """Return at most `limit` APIs of anyone after a position, newest first, deleted ones among them."""
    return await database.fetch(
        _ALL,
        now,
        None if filters.search is None else contains(filters.search),
        filters.status,
        filters.deleted,
        filters.developer_id,
        *(after or _FIRST),
        None if filters.ref is None else filters.ref.slug,
        None if filters.ref is None else filters.ref.number,
        limit,
    )


async def endpoints_of(
    database: Database,
    api_ids: Sequence[int],
    now: datetime,
    each_max: int,
    only: Sequence[EndpointId] | None = None,
) -> dict[int, list[Row]]:
    """Return what APIs offer, `each_max` endpoints of each at most, oldest first, with the price now and the next."""
    found: dict[int, list[Row]] = {api_id: [] for api_id in api_ids}
    wanted = None if only is None else list(only)
    for row in await database.fetch(_ENDPOINTS, now, list(api_ids), each_max, wanted):
        found[row["api_id"]].append(row)
    return found


async def prices_ahead(database: Database, api_id: ApiId, now: datetime) -> dict[int, list[Row]]:
    """Return, by endpoint, the prices that are dated ahead, by date."""
    found: dict[int, list[Row]] = {}
    for row in await database.fetch(_SCHEDULE, api_id, now):
        found.setdefault(row["endpoint_id"], []).append(row)
    return found


async def owns_endpoint(database: Database, ref: ApiRef, endpoint_id: EndpointId, owner: UserId) -> bool:
    """Tell whether an endpoint, retired or not, is of this API of this user."""
    return await database.fetch_value(_OWN_ENDPOINT, ref.slug, ref.number, endpoint_id, owner) is not None


async def price_versions(
    database: Database, endpoint_id: EndpointId, before: int, limit: int, now: datetime
) -> Sequence[Row]:
    """Return at most `limit` versions of a price below a number, the latest first."""
    return await database.fetch(_VERSIONS, endpoint_id, now, before, limit)


async def profile(database: Database, user_id: UserId) -> Row | None:
    """Return a user's profile as a developer."""
    return await database.fetch_row(_PROFILE, user_id)
