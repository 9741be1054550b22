"""Lists and sums of usage against the plainest way to find them, with every filter, from page to page."""

import itertools
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from random import Random

import attrs
import pytest

from callora.ledger.ids import LAST_ID, ApiId, ApiKeyId, EventId, Ids, UserId, VaultId
from callora.store import accounts, usage
from callora.store.bridge import Database
from callora.store.reads import calls
from callora.store.reads import usage as reads
from callora.store.rollup import advance
from tests.simulation.ledgers import NOON, TestClock

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
KEYS = [ApiKeyId(f"00000000-0000-7000-8000-00000000000{number}") for number in range(3)]
_ADD = """
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, closed_at, status, outcome, latency_us)
VALUES ($1, $2, $3, $3, $4, $5, 10, $6, $6::timestamptz + interval '1 day', 1, $7, $8, $9, $10, $11, 5)
"""


@attrs.frozen
class Made:
    """One event as it was stored."""

    vault_id: VaultId
    event_id: EventId
    api_key_id: ApiKeyId
    api_id: int
    endpoint_id: int
    at: datetime
    state: str
    status: int | None
    amount: int | None

    @property
    def succeeded(self) -> bool | None:
        """Whether it went well; None while it is open."""
        return None if self.state == "held" else self.state == "captured"


async def vault(database: Database, clock: TestClock) -> VaultId:
    ids = Ids(clock, os.urandom)
    user_id, vault_id = UserId(ids.uuid7()), VaultId(ids.uuid7())
    await accounts.add_user(database, user_id, "Consumer", clock.now())
    return await accounts.ensure_vault(database, vault_id, user_id, "testnet", "free", clock.now())


async def filled(database: Database, clock: TestClock, vault_id: VaultId, random: Random, count: int) -> list[Made]:
    """Store events from the clock's time on, a burst here and a pause there; the third API is called seldom."""
    ids = Ids(clock, os.urandom)
    made: list[Made] = []
    for _ in range(count):
        clock.advance(random.choice((0, 0, 0.2, 5, 40, 4000)))
        event_id = EventId(ids.uuid7())
        at = clock.now() + timedelta(seconds=random.choice((0, 0.003, 0.2, 10)))
        endpoint = random.choice((1, 1, 1, 2, 2, 3)) if random.random() > 0.01 else 4
        kind = random.random()
        state = "captured" if kind < 0.9 else "released" if kind < 0.99 else "held"
        status = {"captured": 200, "released": 500}.get(state)
        amount = 10 if state == "captured" else None
        each = Made(vault_id, event_id, random.choice(KEYS), 1 + endpoint // 3, endpoint, at, state, status, amount)
        made.append(each)
        closed = None if state == "held" else at
        outcome = None if state == "held" else "delivered" if amount else "upstream_status"
        await database.execute(
            _ADD,
            vault_id,
            event_id,
            each.api_key_id,
            each.api_id,
            endpoint,
            at,
            state,
            amount,
            closed,
            status,
            outcome,
        )
    return made


async def counted(database: Database, clock: TestClock) -> None:
    """Bring the rollup up to date."""
    made = await advance(database, clock.now(), span=DAY)
    while made is not None and made.behind:
        made = await advance(database, clock.now(), span=DAY)


def expected(made: Sequence[Made], scope: reads.Scope, status: calls.Status | None) -> list[str]:
    succeeded = None if status is None else status == "success"
    return sorted(
        (
            each.event_id
            for each in made
            if each.vault_id in scope.vault_ids
            and scope.since <= each.at < scope.until
            and scope.api_id in (None, each.api_id)
            and scope.api_key_id in (None, each.api_key_id)
            and (succeeded is None or each.succeeded is succeeded)
        ),
        reverse=True,
    )


async def walked(database: Database, scope: reads.Scope, status: calls.Status | None, limit: int) -> list[str]:
    """Return the whole list, page by page."""
    found: list[str] = []
    before = LAST_ID
    while True:
        page = await calls.events(database, scope, status, before, limit + 1, look=7)
        found += [str(row["event_id"]) for row in page[:limit]]
        if len(page) <= limit:
            return found
        before = EventId(found[-1])


@pytest.mark.parametrize("seed", range(2))
async def test_every_filter_finds_what_is_there_page_by_page(database: Database, seed: int) -> None:
    random, clock = Random(seed), TestClock(NOON - 12 * DAY)
    await usage.ensure_partitions(database, clock.now())
    one, other = await vault(database, clock), await vault(database, clock)
    made = await filled(database, clock, one, random, 250)
    made += await filled(database, TestClock(NOON - 10 * DAY), other, random, 100)
    await counted(database, clock)
    made += await filled(database, clock, one, random, 40)  # not in the sums yet
    end = (clock.now() + 2 * MINUTE).replace(second=0, microsecond=0)
    start = NOON - 12 * DAY
    combinations = itertools.product(
        ([one], [one, other]),
        ((start, end), (start + 50 * 60 * MINUTE + 7 * MINUTE, end - 30 * 60 * MINUTE)),
        (None, ApiId(1), ApiId(2)),
        (None, KEYS[0]),
        (None, "success", "error"),
    )
    for vaults, (since, until), api_id, key, status in combinations:
        scope = reads.Scope(vaults, since, until, api_id, key)
        found = await walked(database, scope, status, 9)  # type: ignore[arg-type]
        assert found == expected(made, scope, status)  # type: ignore[arg-type]


async def test_sums_of_any_period_are_those_of_its_events(database: Database) -> None:
    random, clock = Random(1), TestClock(NOON - 12 * DAY)
    await usage.ensure_partitions(database, clock.now())
    one, other = await vault(database, clock), await vault(database, clock)
    made = await filled(database, clock, one, random, 300)
    made += await filled(database, TestClock(NOON - 12 * DAY), other, random, 100)
    await counted(database, clock)
    for _ in range(60):
        since = NOON - 12 * DAY + random.randrange(12 * 24 * 60) * MINUTE
        until = since + random.choice((1, 60, 1440, 2000, 10_000)) * MINUTE
        scope = reads.Scope([one, other], since, until, random.choice((None, ApiId(2))), random.choice((None, KEYS[1])))
        unit: reads.Unit = random.choice(("hour", "day", "week", "month"))
        sums = await reads.sums(database, scope, unit)
        wanted = set(expected(made, scope, "success")) | set(expected(made, scope, "error"))
        chosen = [each for each in made if each.event_id in wanted]
        assert sums.total["calls"] == len(chosen)
        assert sums.total["amount"] == sum(each.amount or 0 for each in chosen)
        assert sums.total["failed_calls"] == len(expected(made, scope, "error"))
        assert sum(row["calls"] for row in sums.by_api) == len(chosen)
        assert sum(row["amount"] for row in sums.buckets.values()) == sums.total["amount"]
        endpoints = await reads.by_endpoint(database, scope, 100)
        assert sum(row["calls"] for row in endpoints) == len(chosen)


async def test_a_scan_reads_everything_in_steps(database: Database) -> None:
    clock = TestClock(NOON - DAY)
    await usage.ensure_partitions(database, clock.now())
    one = await vault(database, clock)
    made = await filled(database, clock, one, Random(2), 60)
    scope = reads.Scope([one], NOON - 30 * DAY, NOON + 30 * DAY)
    reached: EventId | None = LAST_ID
    found: list[str] = []
    while reached is not None:
        rows, reached = await calls.scan(database, one, scope, None, reached, 7)
        assert len(rows) <= 7
        found += [str(row["event_id"]) for row in rows]
    assert found == expected(made, scope, None)
