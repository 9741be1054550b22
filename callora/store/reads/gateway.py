"""What the gateway reads: keys, APIs and prices, stored answers; and the sums that gauges show."""

import json
import re
from collections.abc import Sequence
from typing import Final, Literal

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, UserId, VaultId
from callora.ledger.keys import KeyRecord
from callora.ledger.money import Stroops
from callora.ledger.pricing import ApiRecord, Endpoint, EndpointTable, Price, parse_billable
from callora.ledger.rating import CARD_COLUMNS, make_card
from callora.ledger.tokens import SignedToken, TokenRecord, narrow
from callora.store.bridge import Database, Row
from callora.store.together import Together

_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

# A regenerated key's former secret is the same key, until its grace ends.
KEYS: Final = """
SELECT s.prefix, k.api_key_id, k.user_id, k.vault_id, s.key_hash, k.scopes, k.allowed_apis, k.allowed_endpoints,
       k.allowed_cidrs,
       coalesce(k.rate_limit_per_minute, p.rate_limit_per_minute) AS rate_limit_per_minute, k.disabled, s.expires_at,
       k.revoked_at, v.standing::text AS standing, p.allowed_apis AS plan_apis
FROM api_keys k JOIN vaults v ON v.vault_id = k.vault_id JOIN plans p ON p.plan_id = v.plan_id
CROSS JOIN LATERAL (VALUES
    (k.prefix, k.key_hash, k.expires_at),
    (k.previous_prefix, k.previous_hash, least(k.expires_at, k.previous_expires_at))
) AS s (prefix, key_hash, expires_at)
WHERE (k.prefix = ANY ($1::text[]) OR k.previous_prefix = ANY ($1::text[])) AND s.prefix = ANY ($1::text[])
"""
KEYS_TOGETHER_MAX: Final = 256

_PRESENTED: Final = """
SELECT t.scopes AS token_scopes, t.allowed_apis AS token_apis, t.budget IS NOT NULL AS budgeted,
       t.expires_at AS token_expires_at, t.revoked_at AS token_revoked_at,
       k.api_key_id, k.user_id, k.vault_id, k.key_hash, k.scopes, k.allowed_apis, k.allowed_endpoints, k.allowed_cidrs,
       coalesce(k.rate_limit_per_minute, p.rate_limit_per_minute) AS rate_limit_per_minute, k.disabled, k.expires_at,
       k.revoked_at, v.standing::text AS standing, p.allowed_apis AS plan_apis
FROM access_tokens t JOIN api_keys k ON k.api_key_id = t.api_key_id
JOIN vaults v ON v.vault_id = k.vault_id JOIN plans p ON p.plan_id = v.plan_id
WHERE t.token_id = $1 AND t.api_key_id = $2
"""

_API: Final = """
SELECT api_id, slug, developer_id, base_url, status = 'active' AND deleted_at IS NULL AS active,
       upstream_headers::text AS upstream_headers
FROM apis WHERE slug = $1 OR api_id = $2
"""

# Of an endpoint's versions, those ahead and those in effect at any time of the last day, whatever the clocks say: the
# past is not the gateway's business, and grows.
_ENDPOINTS: Final = """
SELECT e.endpoint_id, e.method, e.path, e.billable_statuses, e.required_scope, p.*
FROM api_endpoints e CROSS JOIN LATERAL (
    SELECT v.version, v.amount, v.effective_from, v.unit, v.unit_credits, v.min_units, v.held_units, v.max_units,
           v.quantity_from,
           lead(v.effective_from) OVER (ORDER BY v.effective_from, v.version) AS replaced_at
    FROM endpoint_prices v WHERE v.endpoint_id = e.endpoint_id) AS p
WHERE e.api_id = $1 AND e.retired_at IS NULL AND (p.replaced_at IS NULL OR p.replaced_at > now() - interval '1 day')
ORDER BY e.endpoint_id, p.effective_from, p.version
"""

_EPOCH: Final = "SELECT version FROM catalogue_epoch"

_CHANGES: Final = "SELECT version, kind, ref FROM catalogue_changes WHERE version > $1 ORDER BY version"

_SUMS: Final = """
SELECT coalesce(sum(available), 0)::bigint AS available, coalesce(sum(held), 0)::bigint AS held,
       coalesce(sum(owed), 0)::bigint AS owed
FROM vaults
"""


_LEDGER_DRIFT: Final = """
SELECT (b.total - e.total + u.total)::bigint
FROM (SELECT coalesce(sum(available + held - owed), 0) AS total FROM vaults) AS b,
     (SELECT coalesce(sum(amount), 0) AS total FROM ledger_entries) AS e,
     (SELECT coalesce(sum(amount), 0) AS total FROM usage_events WHERE state = 'captured') AS u
"""


@attrs.frozen(slots=True)
class CatalogueChange:
    """One change of what the gateway caches."""

    version: int
    kind: Literal["key", "api", "vault", "plan"]
    ref: str


def _key(row: Row) -> KeyRecord:
    apis, endpoints, networks = row["allowed_apis"], row["allowed_endpoints"], row["allowed_cidrs"]
    plan_apis = row["plan_apis"]
    return KeyRecord(
        api_key_id=ApiKeyId(str(row["api_key_id"])),
        user_id=UserId(str(row["user_id"])),
        vault_id=VaultId(str(row["vault_id"])),
        key_hash=row["key_hash"],
        scopes=frozenset(row["scopes"]),
        allowed_apis=None if apis is None else frozenset(map(ApiId, apis)),
        allowed_endpoints=None if endpoints is None else frozenset(map(EndpointId, endpoints)),
        allowed_networks=None if networks is None else tuple(networks),
        rate_limit_per_minute=row["rate_limit_per_minute"],
        disabled=row["disabled"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        standing=row["standing"],
        plan_apis=None if plan_apis is None else frozenset(map(ApiId, plan_apis)),
    )


class Reads:
    """Queries over the pool. Every method raises StoreUnavailable, and then nothing was read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys = Together(self._with_prefixes, KEYS_TOGETHER_MAX)

    async def keys_with_prefix(self, prefix: str) -> Sequence[KeyRecord]:
        """Return every key with this 16-character prefix; more than one is rare and possible."""
        (found,) = await self._keys.ask(prefix)
        return found

    async def _with_prefixes(self, prefixes: Sequence[str]) -> Sequence[Sequence[KeyRecord]]:
        found: dict[str, list[KeyRecord]] = {prefix: [] for prefix in prefixes}
        for row in await self._database.fetch(KEYS, list(found)):
            found[row["prefix"]].append(_key(row))
        return [found[prefix] for prefix in prefixes]

    async def token(self, signed: SignedToken) -> TokenRecord | None:
        """Return an access token with its key, narrowed to what the token may do."""
        if _UUID.fullmatch(signed.token_id) is None or _UUID.fullmatch(signed.api_key_id) is None:
            return None
        row = await self._database.fetch_row(_PRESENTED, signed.token_id, signed.api_key_id)
        if row is None:
            return None
        apis = row["token_apis"]
        return TokenRecord(
            token_id=signed.token_id,
            key=narrow(
                _key(row),
                signed.token_id,
                frozenset(row["token_scopes"]),
                None if apis is None else frozenset(map(ApiId, apis)),
                budgeted=row["budgeted"],
            ),
            expires_at=row["token_expires_at"],
            revoked_at=row["token_revoked_at"],
        )

    async def api(self, slug_or_id: str) -> ApiRecord | None:
        """Return the API with this slug, or with this number."""
        number = int(slug_or_id) if slug_or_id.isdecimal() and len(slug_or_id) <= 18 else None
        row = await self._database.fetch_row(_API, slug_or_id, number)
        if row is None:
            return None
        endpoints: dict[int, list[Row]] = {}
        for line in await self._database.fetch(_ENDPOINTS, row["api_id"]):
            endpoints.setdefault(line["endpoint_id"], []).append(line)
        return ApiRecord(
            api_id=ApiId(row["api_id"]),
            slug=row["slug"],
            developer_id=DeveloperId(str(row["developer_id"])),
            base_url=row["base_url"],
            active=row["active"],
            upstream_headers=json.loads(row["upstream_headers"]),
            endpoints=EndpointTable([_endpoint(lines) for lines in endpoints.values()]),
        )

    async def catalogue_version(self) -> int:
        """Return the number of the latest change."""
        version = await self._database.fetch_value(_EPOCH)
        assert isinstance(version, int)
        return version

    async def catalogue_changes(self, after: int) -> Sequence[CatalogueChange]:
        """Return the changes after a version, in commit order and without gaps."""
        rows = await self._database.fetch(_CHANGES, after)
        return [CatalogueChange(row["version"], row["kind"], row["ref"]) for row in rows]

    async def ledger_drift(self) -> int:
        """Return what the ledger is off by, stroops, which is 0. Reads every event."""
        drift: int = await self._database.fetch_value(_LEDGER_DRIFT)
        return drift

    async def balance_sums(self) -> tuple[Stroops, Stroops, Stroops]:
        """Return Σ available, Σ held and Σ owed over all vaults."""
        row = await self._database.fetch_row(_SUMS)
        assert row is not None
        return row["available"], row["held"], row["owed"]


def price_of(row: Row) -> Price:
    """Return the version of a price that a row of `endpoint_prices` is."""
    card = make_card(*(row[column] for column in CARD_COLUMNS))
    return Price(row["version"], Stroops(row["amount"]), row["effective_from"], card)


def _endpoint(lines: Sequence[Row]) -> Endpoint:
    first = lines[0]
    return Endpoint(
        endpoint_id=EndpointId(first["endpoint_id"]),
        method=first["method"],
        path=first["path"],
        billable=parse_billable(first["billable_statuses"]),
        required_scope=first["required_scope"],
        prices=tuple(price_of(line) for line in lines),
    )
