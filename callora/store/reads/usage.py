"""Sums of usage as their owners see them, always from the rollup: whole days from usage_days, what is left at both ends
from usage_minutes.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final, Literal, TypeAlias

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, UserId, VaultId
from callora.store.bridge import Connection, Row
from callora.store.bridge import Database as Database  # HTTP names what it passes on

Unit = Literal["hour", "day", "week", "month"]
Reading: TypeAlias = Connection | Database
"""What is asked; inside `reading()` its connection."""

DAY: Final = timedelta(days=1)
TOP_ENDPOINTS: Final = 100

_READING: Final = """
SET TRANSACTION READ ONLY; SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL jit = off;
SET LOCAL max_parallel_workers_per_gather = 0
"""


@asynccontextmanager
async def reading(database: Database) -> AsyncIterator[Connection]:
    """Lend a connection whose statements are planned for the very vault and period that are asked for.

    A plan that is kept for all of them fits neither the large nor the small: a list of errors that takes 30 ms took
    1200 with it. Raises and cancellation: as `Database.transaction`.
    """
    async with database.transaction() as connection:
        await connection.execute(_READING)
        yield connection


# --- whose ------------------------------------------------------------------------------------------------------------

_VAULTS: Final = "SELECT vault_id FROM vaults WHERE user_id = $1 ORDER BY vault_id"
_USER: Final = "SELECT true FROM users WHERE user_id = $1"
_KEY: Final = "SELECT vault_id FROM api_keys WHERE api_key_id = $2 AND user_id = $1"
_DEVELOPER: Final = "SELECT developer_id FROM developers WHERE user_id = $1"
_OWN_API: Final = "SELECT true FROM apis WHERE api_id = $2 AND developer_id = $1"
_ROLLUP: Final = "SELECT done_until, as_of FROM usage_rollup"


async def vaults_of(database: Reading, user_id: UserId) -> list[VaultId]:
    """Return a user's vaults: one a network."""
    return [VaultId(str(row["vault_id"])) for row in await database.fetch(_VAULTS, user_id)]


async def user_exists(database: Reading, user_id: UserId) -> bool:
    """Tell whether there is such a user."""
    return await database.fetch_value(_USER, user_id) is not None


async def vault_of_key(database: Reading, user_id: UserId, api_key_id: ApiKeyId) -> VaultId | None:
    """Return the vault that a key of this user is paid from; None where the user has no such key."""
    found = await database.fetch_value(_KEY, user_id, api_key_id)
    return None if found is None else VaultId(str(found))


async def developer_of(database: Reading, user_id: UserId) -> DeveloperId | None:
    """Return a user's developer profile."""
    found = await database.fetch_value(_DEVELOPER, user_id)
    return None if found is None else DeveloperId(str(found))


async def owns_api(database: Reading, developer_id: DeveloperId, api_id: ApiId) -> bool:
    """Tell whether the API is this developer's."""
    return await database.fetch_value(_OWN_API, developer_id, api_id) is not None


@attrs.frozen
class Extent:
    """How far the rollup is."""

    done_until: datetime
    """Everything dated before is counted, but for open holds."""
    as_of: datetime
    """Everything that had ended by then is counted."""


async def rollup_extent(database: Reading) -> Extent:
    """Return how far sums reach."""
    row = await database.fetch_row(_ROLLUP)
    assert row is not None, "a migration made it"
    return Extent(row["done_until"], row["as_of"])


@attrs.frozen
class Scope:
    """What of whose usage is asked for."""

    vault_ids: Sequence[VaultId]
    since: datetime
    """A whole minute."""
    until: datetime
    """A whole minute, not part of the period."""
    api_id: ApiId | None = None
    api_key_id: ApiKeyId | None = None


# --- sums -------------------------------------------------------------------------------------------------------------

_MEASURES: Final = """calls, charged_calls, failed_calls, timed_calls, amount, refunded, latency_us, request_bytes,
        response_bytes"""
_TOTALS: Final = ", ".join(
    f"coalesce(sum({each.strip()}), 0)::bigint AS {each.strip()}" for each in _MEASURES.split(",")
)

_PIECES: Final = f"""
    SELECT minute AS at, api_id, endpoint_id, api_key_id, {_MEASURES} FROM usage_minutes
    WHERE vault_id = ANY ($1::uuid[]) AND minute >= $2 AND minute < $3
    UNION ALL
    SELECT day, api_id, endpoint_id, api_key_id, {_MEASURES} FROM usage_days
    WHERE vault_id = ANY ($1::uuid[]) AND day >= $3 AND day < $4
    UNION ALL
    SELECT minute, api_id, endpoint_id, api_key_id, {_MEASURES} FROM usage_minutes
    WHERE vault_id = ANY ($1::uuid[]) AND minute >= $4 AND minute < $5
"""  # noqa: S608 - names of ours
_WANTED: Final = "($6::bigint IS NULL OR api_id = $6) AND ($7::uuid IS NULL OR api_key_id = $7)"

_SUMS: Final = f"""
SELECT s.*, a.slug, a.name FROM (
    SELECT grouping(api_id, bucket) AS level, api_id, bucket, {_TOTALS}
    FROM (SELECT *, date_trunc($8, at, 'UTC') AS bucket FROM ({_PIECES}) AS pieces WHERE {_WANTED}) AS wanted
    GROUP BY GROUPING SETS ((), (api_id), (bucket))
) AS s LEFT JOIN apis a ON a.api_id = s.api_id
ORDER BY level, bucket, amount - refunded DESC, s.api_id
"""  # noqa: S608 - names of ours

_BY_ENDPOINT: Final = f"""
SELECT s.*, e.method, e.path, a.slug, a.name FROM (
    SELECT api_id, endpoint_id, {_TOTALS} FROM ({_PIECES}) AS pieces WHERE {_WANTED} GROUP BY api_id, endpoint_id
) AS s LEFT JOIN api_endpoints e ON e.endpoint_id = s.endpoint_id LEFT JOIN apis a ON a.api_id = s.api_id
WHERE $8::bigint IS NULL OR (s.calls, s.endpoint_id) < ($8, $9)
ORDER BY s.calls DESC, s.endpoint_id DESC LIMIT $10
"""  # noqa: S608 - names of ours


@attrs.frozen
class Sums:
    """Sums of one scope."""

    total: Row
    by_api: Sequence[Row]
    """The dearest first."""
    buckets: dict[datetime, Row]
    """By the bucket's first instant; without those in which nothing happened."""


def _pieces(scope: Scope, *, by_minute: bool) -> tuple[object, ...]:
    first = scope.since if scope.since == _day(scope.since) else _day(scope.since) + DAY
    last = _day(scope.until)
    if by_minute or first >= last:
        first = last = scope.until
    return [*scope.vault_ids], scope.since, first, last, scope.until, scope.api_id, scope.api_key_id


def _day(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


async def sums(database: Reading, scope: Scope, unit: Unit) -> Sums:
    """Return a scope's totals, by API, and by bucket of time in UTC; weeks begin on Monday.

    Args:
        unit: with `hour` every minute of the scope is read, so it should be two days at most.
    """
    rows = await database.fetch(_SUMS, *_pieces(scope, by_minute=unit == "hour"), unit)
    # `level` has a bit for each column that the row is not grouped by
    return Sums(
        total=next(row for row in rows if row["level"] == 3),
        by_api=[row for row in rows if row["level"] == 1],
        buckets={row["bucket"]: row for row in rows if row["level"] == 2},
    )


async def by_endpoint(
    database: Reading, scope: Scope, limit: int, after: tuple[int, int] | None = None
) -> Sequence[Row]:
    """Return at most `limit` endpoints with their sums, the most called first.

    Args:
        after: calls and endpoint of the last row of the page before.
    """
    calls, endpoint = after if after is not None else (None, None)
    return await database.fetch(_BY_ENDPOINT, *_pieces(scope, by_minute=False), calls, endpoint, limit)


_KEY_DAYS: Final = f"""
SELECT day, {_TOTALS} FROM usage_days
WHERE vault_id = $1 AND api_key_id = $2 AND day >= $3 GROUP BY day ORDER BY day DESC
"""  # noqa: S608 - names of ours


async def key_days(database: Reading, vault_id: VaultId, api_key_id: ApiKeyId, since: datetime) -> Sequence[Row]:
    """Return a key's sums by day, the newest first."""
    return await database.fetch(_KEY_DAYS, vault_id, api_key_id, since)


# --- developers and operators -----------------------------------------------------------------------------------------

_DEVELOPER_TOTALS: Final = """coalesce(sum(calls), 0)::bigint AS calls,
        coalesce(sum(failed_calls), 0)::bigint AS failed_calls, coalesce(sum(amount), 0)::bigint AS amount,
        coalesce(sum(refunded), 0)::bigint AS refunded"""

_ANALYTICS: Final = f"""
SELECT date_trunc($5, day, 'UTC') AS bucket, {_DEVELOPER_TOTALS} FROM developer_days
WHERE developer_id = $1 AND day >= $2 AND day < $3 AND ($4::bigint IS NULL OR api_id = $4)
GROUP BY bucket ORDER BY bucket
"""  # noqa: S608 - names of ours

_TOP_ENDPOINTS: Final = f"""
SELECT s.*, e.method, e.path, a.slug, a.name FROM (
    SELECT api_id, endpoint_id, {_DEVELOPER_TOTALS} FROM developer_days
    WHERE developer_id = $1 AND day >= $2 AND day < $3 AND ($4::bigint IS NULL OR api_id = $4)
    GROUP BY api_id, endpoint_id ORDER BY sum(amount - refunded) DESC, sum(calls) DESC, endpoint_id LIMIT $5
) AS s LEFT JOIN api_endpoints e ON e.endpoint_id = s.endpoint_id LEFT JOIN apis a ON a.api_id = s.api_id
ORDER BY s.amount - s.refunded DESC, s.calls DESC, s.endpoint_id
"""  # noqa: S608 - names of ours

_TOP_CALLERS: Final = """
SELECT v.user_id, sum(s.calls)::bigint AS calls, sum(s.net)::bigint AS net FROM (
    SELECT vault_id, sum(calls) AS calls, sum(amount - refunded) AS net FROM developer_callers
    WHERE developer_id = $1 AND day >= $2 AND day < $3 AND ($4::bigint IS NULL OR api_id = $4)
    GROUP BY vault_id
) AS s JOIN vaults v ON v.vault_id = s.vault_id
GROUP BY v.user_id ORDER BY net DESC, calls DESC, v.user_id LIMIT $5
"""

_ALL_DAYS: Final = """
SELECT day, calls, failed_calls, amount, refunded FROM all_days WHERE day >= $1 ORDER BY day
"""

_ALL_ENDPOINTS: Final = f"""
SELECT s.*, e.method, e.path, a.slug, a.name FROM (
    SELECT api_id, endpoint_id, {_DEVELOPER_TOTALS} FROM developer_days WHERE day >= $1
    GROUP BY api_id, endpoint_id ORDER BY sum(calls) DESC, endpoint_id LIMIT $2
) AS s LEFT JOIN api_endpoints e ON e.endpoint_id = s.endpoint_id LEFT JOIN apis a ON a.api_id = s.api_id
ORDER BY s.calls DESC, s.endpoint_id
"""  # noqa: S608 - names of ours

_ALL_PLANS: Final = """
SELECT v.plan_id, sum(s.calls)::bigint AS calls, sum(s.net)::bigint AS net
FROM (
    SELECT vault_id, sum(calls) AS calls, sum(amount - refunded) AS net FROM vault_days WHERE day >= $1
    GROUP BY vault_id
) AS s JOIN vaults v ON v.vault_id = s.vault_id
GROUP BY v.plan_id ORDER BY calls DESC, v.plan_id
"""

_TOP_USERS: Final = """
SELECT v.user_id, u.name, sum(s.calls)::bigint AS calls, sum(s.net)::bigint AS net
FROM (
    SELECT vault_id, sum(calls) AS calls, sum(amount - refunded) AS net FROM vault_days WHERE day >= $1
    GROUP BY vault_id
) AS s JOIN vaults v ON v.vault_id = s.vault_id JOIN users u ON u.user_id = v.user_id
GROUP BY v.user_id, u.name ORDER BY net DESC, calls DESC, v.user_id LIMIT $2
"""


@attrs.frozen
class DeveloperScope:
    """What of a developer's calls is asked for: whole days in UTC."""

    developer_id: DeveloperId
    since: datetime
    until: datetime
    api_id: ApiId | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        """The first four of each query."""
        return self.developer_id, self.since, self.until, self.api_id


async def analytics(database: Reading, scope: DeveloperScope, unit: Unit) -> dict[datetime, Row]:
    """Return a developer's sums by bucket; without those in which nothing happened."""
    return {row["bucket"]: row for row in await database.fetch(_ANALYTICS, *scope.arguments, unit)}


async def top_endpoints(database: Reading, scope: DeveloperScope, limit: int) -> Sequence[Row]:
    """Return the endpoints that earned most."""
    return await database.fetch(_TOP_ENDPOINTS, *scope.arguments, limit)


async def top_callers(database: Reading, scope: DeveloperScope, limit: int) -> Sequence[Row]:
    """Return the users who paid the developer most."""
    return await database.fetch(_TOP_CALLERS, *scope.arguments, limit)


async def all_days(database: Reading, since: datetime) -> Sequence[Row]:
    """Return the sums of everyone by day, the oldest first."""
    return await database.fetch(_ALL_DAYS, since)


async def all_endpoints(database: Reading, since: datetime, limit: int) -> Sequence[Row]:
    """Return the sums of everyone by endpoint, the most called first."""
    return await database.fetch(_ALL_ENDPOINTS, since, limit)


async def all_plans(database: Reading, since: datetime) -> Sequence[Row]:
    """Return the sums of everyone by the plan that his vault has now, the most called first."""
    return await database.fetch(_ALL_PLANS, since)


async def top_users(database: Reading, since: datetime, limit: int) -> Sequence[Row]:
    """Return the users who spent most."""
    return await database.fetch(_TOP_USERS, since, limit)
