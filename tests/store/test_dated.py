"""A vault's events by their date: against the plainest look there is, and without a look at other vaults'."""

import json
import os
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Final

import pytest

from callora.ledger.ids import EventId, Ids, UserId, VaultId, least_id
from callora.ledger.spending import LENGTHS, PERIODS
from callora.store import accounts, usage
from callora.store.bridge import Connection, Database
from callora.store.by_key import GO_BY_KEY
from callora.store.reads import quotas, spending
from callora.store.reads.dated import dated_events, of_each
from tests.simulation.ledgers import NOON, TestClock

_ADD: Final = """
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version)
SELECT $1, e, $1, $1, 1, 1, 1, d, d + interval '1 minute', 1 FROM unnest($2::uuid[], $3::timestamptz[]) AS w (e, d)
"""
_VAULT: Final = "(SELECT $1::uuid AS vault_id) AS v"
_SINCE: Final = of_each(_VAULT, f"SELECT event_id FROM {dated_events('event_id', '$2::timestamptz')} AS u")
_BETWEEN: Final = of_each(
    _VAULT, f"SELECT event_id FROM {dated_events('event_id', '$2::timestamptz', '$3::timestamptz')} AS u"
)

MICROSECOND: Final = timedelta(microseconds=1)
IDS: Final = Ids(TestClock(), os.urandom)
STRAYS: Final = tuple(
    sign * timedelta(seconds=seconds) + nearby * MICROSECOND
    for sign in (-1, 1)
    for seconds in (0, 3, 9.999, 10, 10.001, 10.999, 11, 11.001, 12, 3600, 5_000_000)
    for nearby in (-600, -1, 0, 1, 600)
)


async def a_vault(database: Database, clock: TestClock) -> VaultId:
    user_id, vault_id = UserId(IDS.uuid7()), VaultId(IDS.uuid7())
    await accounts.add_user(database, user_id, "Consumer", clock.now())
    return await accounts.ensure_vault(database, vault_id, user_id, "testnet", "free", clock.now())


def id_made(at: datetime) -> EventId:
    """Return an id as it is made at a moment."""
    return EventId(least_id(at)[:14] + IDS.uuid7()[14:])


async def found(connection: Connection, sql: str, *args: object) -> set[str]:
    rows = [str(row["event_id"]) for row in await connection.fetch(sql, *args)]
    assert len(rows) == len(set(rows)), "each once"
    return set(rows)


@pytest.mark.parametrize("seed", range(3))
async def test_every_event_of_the_time_is_found_once_however_far_its_id_has_strayed(
    database: Database, seed: int
) -> None:
    random, clock = Random(seed), TestClock()
    vault_id, other = await a_vault(database, clock), await a_vault(database, clock)
    for month in (NOON - timedelta(days=31), NOON):
        await usage.ensure_partitions(database, month)
    edges = [NOON + random.choice((1, -1)) * random.random() * timedelta(hours=1) for _ in range(4)]
    edges += [
        edges[0].replace(microsecond=500),
        edges[1].replace(microsecond=499_500),
    ]  # where milliseconds are rounded
    placed: dict[str, datetime] = {}
    for edge in edges:
        for stray in STRAYS:
            at = edge + random.choice((-10_000_000, -600, -1, 0, 1, 600, 10_000_000)) * MICROSECOND
            placed[id_made(at - stray)] = at
    # Ids that are no UUIDv7, and tell any time or none.
    placed |= {f"{random.randbytes(4).hex()}-0000-4000-8000-{random.randbytes(6).hex()}": NOON for _ in range(50)}
    await database.execute(_ADD, vault_id, list(placed), list(placed.values()))
    others = [id_made(at) for at in placed.values()]
    await database.execute(_ADD, other, others, list(placed.values()))
    async with database.transaction() as connection:
        await connection.execute(GO_BY_KEY)
        for since in (*edges, edges[0] - MICROSECOND, edges[0] + MICROSECOND):
            expected = {event_id for event_id, at in placed.items() if at >= since}
            assert await found(connection, _SINCE, vault_id, since) == expected
            for until in (since + MICROSECOND, since + timedelta(seconds=30), *edges):
                expected = {event_id for event_id, at in placed.items() if since <= at < until}
                assert await found(connection, _BETWEEN, vault_id, since, until) == expected


def _nodes(plan: dict[str, object]) -> list[dict[str, object]]:
    children = plan.get("Plans", [])
    assert isinstance(children, list)
    return [plan, *(node for child in children for node in _nodes(child))]


LOOKS: Final = {"limits": (spending.LIMITS, 3), "account": (spending.ACCOUNT, 4), "burnt": (quotas.BURNT, 3)}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("look", LOOKS)
async def test_what_is_counted_before_a_decision_is_looked_up_by_the_vaults_own_keys_however_empty_the_tables_are(
    database: Database, look: str, known: bool
) -> None:
    statement, parameters = LOOKS[look]
    await usage.ensure_partitions(database, NOON)
    if known:  # to be empty, where before that was only a guess
        async with database.acquire() as connection:
            await connection.execute("VACUUM ANALYZE")
    async with database.transaction() as connection:
        await connection.execute(GO_BY_KEY)
        await connection.execute(f"PREPARE look AS {statement}")
        nothing = ", ".join(["NULL"] * parameters)
        text = await connection.fetch_value(f"EXPLAIN (FORMAT JSON) EXECUTE look({nothing})")
    nodes = _nodes(json.loads(text)[0]["Plan"])
    on_events = [node for node in nodes if str(node.get("Relation Name", "")).startswith("usage_events")]
    assert {node["Node Type"] for node in on_events} == {"Index Scan"}
    for node in on_events:
        condition = str(node["Index Cond"])
        assert re.search(r"\bvault_id = \w+\.vault_id\b", condition), node
        assert "event_id " in condition or "created_at " in condition, node
    for node in nodes:
        if node["Node Type"] == "Seq Scan":
            assert node["Relation Name"] == "usage_rollup", "which has one row"


@pytest.mark.parametrize("busy", [0, 20_000])
async def test_others_calls_of_these_minutes_cost_a_look_nothing(database: Database, busy: int) -> None:
    clock = TestClock()
    await usage.ensure_partitions(database, NOON)
    vault_id, other = await a_vault(database, clock), await a_vault(database, clock)
    moments = [NOON + number * timedelta(milliseconds=3) for number in range(busy)]
    for whose, dates in ((other, moments), (vault_id, moments[:2] or [NOON])):
        await database.execute(_ADD, whose, [id_made(at) for at in dates], dates)
    now = NOON + timedelta(minutes=1)
    starts: Sequence[datetime] = [now - LENGTHS[period] for period in PERIODS]
    async with database.transaction() as connection:
        await connection.execute(GO_BY_KEY)
        sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {spending.ACCOUNT}"
        text = await connection.fetch_value(sql, [vault_id], PERIODS, starts, None)
    plan = json.loads(text)[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 150, "pages, of some 700 that 20 000 events fill"
