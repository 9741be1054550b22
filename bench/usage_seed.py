"""What the pages of usage are read from: millions of calls over a quarter, a tenth of them one vault's.

The events are made in SQL, a day at a time and in the order of their dates, as calls would have left them.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from callora.store import usage
from callora.store.bridge import Database

DAYS: Final = 90
VAULTS: Final = 2000
"""Small vaults; vault 0 is the large one."""
LARGE_SHARE: Final = 10
"""The large vault's part of all calls, as a divisor."""
RARE_API: Final = 1200
"""Called by the large vault once in twenty thousand calls."""
UNKNOWN_API: Final = 1199
"""Called by the large vault never."""
COMMON_API: Final = 1001
RARE_KEY: Final = 5

_ID: Final = "('00000000-0000-7000-' || '{kind}' || '-' || lpad(to_hex({number}), 12, '0'))::uuid"


def vault_id(number: int) -> str:
    """Return the id of a vault."""
    return f"00000000-0000-7000-8000-{number:012x}"


def key_id(vault: int, number: int) -> str:
    """Return the id of a vault's key."""
    return f"00000000-0000-7000-9000-{vault * 16 + number:012x}"


def developer_id(number: int) -> str:
    """Return the id of a developer; 0 owns the API that everyone calls."""
    return f"00000000-0000-7000-b000-{number:012x}"


def _id(kind: str, number: str) -> str:
    return _ID.format(kind=kind, number=number)


_PEOPLE: Final = f"""
INSERT INTO users (user_id, name) SELECT {_id("a000", "n")}, 'User ' || n FROM generate_series(0, {VAULTS + 50}) n;
INSERT INTO vaults (vault_id, user_id, network, plan_id)
    SELECT {_id("8000", "n")}, {_id("a000", "n")}, 'testnet', 'enterprise' FROM generate_series(0, {VAULTS}) n;
INSERT INTO developers (developer_id, user_id, name)
    SELECT {_id("b000", "n")}, {_id("a000", f"{VAULTS} + 1 + n")}, 'Developer' FROM generate_series(0, 49) n;
INSERT INTO apis (api_id, developer_id, slug, name, base_url) OVERRIDING SYSTEM VALUE
    SELECT 1001 + n, {_id("b000", "n % 50")}, 'api-' || n, 'API ' || n, 'http://127.0.0.1'
    FROM generate_series(0, 199) n;
INSERT INTO api_endpoints (endpoint_id, api_id, method, path) OVERRIDING SYSTEM VALUE
    SELECT 10000 + n, 1001 + n / 5, 'GET', '/' || n FROM generate_series(0, 999) n;
"""

_ROOM: Final = "ALTER SYSTEM SET max_wal_size = '16GB'"
_RELOAD: Final = "SELECT pg_reload_conf()"
"""Filling would else be checkpoints for the most part."""

_DAY: Final = f"""
WITH calls AS (
    SELECT 0 AS vault, CASE WHEN random() < 0.00005 THEN {RARE_KEY} ELSE floor(random() * 4)::int END AS key,
           CASE WHEN random() < 0.00005 THEN 995 ELSE floor(random() * random() * 20)::int END AS endpoint,
           random() < 0.001 AS failed
    FROM generate_series(1, $3::int)
    UNION ALL
    SELECT v, 0, CASE WHEN random() < 0.1 THEN floor(random() * 5)::int
                      ELSE (v * 7 + floor(random() * 3)::int * 331) % 1000 END, random() < 0.03
    FROM generate_series(1, {VAULTS}) v, generate_series(1, $4::int)
), dated AS (
    SELECT *, $1::timestamptz + random() * $2::interval AS at, floor(random() * 4096)::int AS noise,
           floor(random() * 1152921504606846976)::bigint AS more
    FROM calls ORDER BY at
)
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, request_bytes, response_bytes, closed_at,
                          latency_us, status, outcome)
SELECT {_id("8000", "vault")},
       (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(noise), 3, '0')
        || '8' || lpad(to_hex(more), 15, '0'))::uuid,
       {_id("9000", "vault * 16 + key")}, {_id("b000", "(endpoint / 5) % 50")}, 1001 + endpoint / 5, 10000 + endpoint,
       1000, at, at + interval '2 minutes', 1, (CASE WHEN failed THEN 'released' ELSE 'captured' END)::usage_state,
       CASE WHEN NOT failed THEN 1000 END, 100, CASE WHEN NOT failed THEN 1000 END, at + interval '50 milliseconds',
       50000, CASE WHEN failed THEN 500 ELSE 200 END, CASE WHEN failed THEN 'upstream_status' ELSE 'delivered' END
FROM dated
"""


async def seed_usage(
    database: Database, now: datetime, events: int, tell: Callable[[str], None], large_share: int = LARGE_SHARE
) -> None:
    """Make the people and about `events` calls in the quarter that ends now.

    Args:
        large_share: the large vault's part of them, as a divisor.
    """
    await database.execute(_ROOM)
    await database.execute(_RELOAD)
    await database.execute(_PEOPLE)
    start = now - timedelta(days=DAYS)
    for day in range(0, DAYS + 1, 15):
        await usage.ensure_partitions(database, start + timedelta(days=day))
    large = events // large_share // DAYS
    small = (events - events // large_share) // DAYS // VAULTS
    for day in range(DAYS):
        await database.execute(_DAY, start + timedelta(days=day), timedelta(days=1), large, small)
        if day % 15 == 14:
            tell(f"usage: {(day + 1) * (large + small * VAULTS)} calls made")
    await database.execute("VACUUM (ANALYZE) usage_events")
