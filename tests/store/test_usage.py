"""Usage events as the sweep and the housekeeping see them, on a real PostgreSQL."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import trio

from callora.ledger.commands import Delivery, IdempotencyClaim, PlaceHold, release
from callora.ledger.ids import FIRST_ID, EventId, VaultId
from callora.ledger.money import Stroops
from callora.store import usage
from callora.store.bridge import Database, open_database
from callora.store.reads.gateway import Reads
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED
from tests.support.service import running_service


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def holds(ledger: RealLedger, vault_id: VaultId, count: int, key: str | None = None) -> list[EventId]:
    """Place holds in one round, all of one date."""
    events = sorted(ledger.event() for _ in range(count))
    claim = None if key is None else IdempotencyClaim(key, bytes(32), None, 100)
    share = await ledger.share(vault_id, *(PlaceHold(each, Stroops(1), 60, CHARGED, claim) for each in events))
    await ledger.store.commit_round([share])
    return events


async def test_open_holds_are_found_by_their_date_oldest_first(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    expected: list[EventId] = []
    for _ in range(3):
        expected += await holds(ledger, vault_id, 2)
        ledger.clock.advance(10)
    close = release(expected[1], Stroops(1), Delivery("client_gone"))
    await ledger.store.commit_round([await ledger.share(vault_id, close)])
    del expected[1]
    database, second = ledger.database, timedelta(seconds=1)
    found = await usage.open_holds(database, NOON, NOON + 60 * second, 100)
    assert [each.event_id for each in found] == expected
    assert {each.expires_at - each.created_at for each in found} == {60 * second}
    found = await usage.open_holds(database, NOON + second, NOON + 20 * second, 100)
    assert [each.event_id for each in found] == expected[1:3]
    assert len(await usage.still_open(database, found)) == 2


async def test_more_holds_of_one_date_than_a_batch_holds_are_all_found(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    expected = await holds(ledger, vault_id, 10)
    found: list[EventId] = []
    since, after = NOON, FIRST_ID
    for _ in range(20):
        batch = await usage.open_holds(ledger.database, since, NOON + timedelta(seconds=1), 3, after)
        found += [each.event_id for each in batch]
        if len(batch) < 3:
            break
        since, after = batch[-1].created_at, batch[-1].event_id
    assert found == expected


async def test_partitions_are_made_once_and_ahead_of_need(database: Database) -> None:
    made = await usage.ensure_partitions(database, datetime(2026, 12, 31, 23, 59, tzinfo=UTC))
    assert made == ["usage_events_2026_12", "usage_events_2027_01"][: usage.MONTHS_AHEAD + 1]
    assert await usage.ensure_partitions(database, datetime(2026, 12, 31, 23, 59, tzinfo=UTC)) == []


async def test_a_call_falls_into_the_month_of_its_id(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    for at in (
        datetime(2026, 11, 30, 23, 59, 59, 999_000, tzinfo=UTC),
        datetime(2026, 12, 1, tzinfo=UTC),
    ):
        ledger.clock.at = at
        await holds(ledger, vault_id, 1)
    for month in ("2026_11", "2026_12"):
        assert await ledger.count(f"usage_events_{month}") == 1
    assert await ledger.count("usage_events_default") == 0


async def test_a_late_start_loses_no_call_and_keeps_no_later_month_from_being_made(database: Database) -> None:
    clock = TestClock(datetime(2026, 11, 21, tzinfo=UTC))
    async with real_ledger(database, clock) as ledger:
        vault_id = await ledger.vault(100)
        clock.at = datetime(2027, 6, 1, tzinfo=UTC)
        await holds(ledger, vault_id, 1)
        assert await ledger.count("usage_events_default") == 1
        assert "no usage event fell into the default partition" in await ledger.findings()
        made = await usage.ensure_partitions(database, clock.now())
        assert "usage_events_2027_06" not in made
        assert made[:1] == ["usage_events_2027_07"]


async def test_processes_that_start_together_make_the_partitions_together(
    database: Database, database_url: str
) -> None:
    async with open_database(database_url) as other, trio.open_nursery() as nursery:
        for each in (database, other) * 4:
            nursery.start_soon(usage.ensure_partitions, each, NOON)
    assert await usage.ensure_partitions(database, NOON) == []


async def test_old_claims_are_dropped_in_batches_and_young_ones_stay(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    for number in range(5):
        await holds(ledger, vault_id, 1, key=f"old-{number}")
    ledger.clock.advance(50)
    await holds(ledger, vault_id, 1, key="young")
    ledger.clock.advance(50)
    assert await usage.drop_expired_claims(ledger.database, ledger.clock.now(), 3) == 3
    assert await usage.drop_expired_claims(ledger.database, ledger.clock.now(), 3) == 2
    assert await usage.drop_expired_claims(ledger.database, ledger.clock.now(), 3) == 0
    assert await ledger.claims.find(vault_id, "young") is not None


async def test_old_changes_are_dropped_and_the_epoch_stays(ledger: RealLedger) -> None:
    for _ in range(5):
        await ledger.database.execute("UPDATE plans SET rate_limit_per_minute = rate_limit_per_minute + 1")
    reads = Reads(ledger.database)
    version = await reads.catalogue_version()
    await usage.drop_old_changes(ledger.database, 4)
    assert await reads.catalogue_version() == version
    assert [each.version for each in await reads.catalogue_changes(0)] == list(range(version - 4, version + 1))


async def test_a_service_has_the_months_partition_before_its_first_call(database_url: str) -> None:
    up = trio.Event()

    async def start() -> None:
        async with running_service(database_url) as service:
            up.set()
            name = f"usage_events_{service.context.clock.now():%Y_%m}"
            assert await service.database.fetch_value("SELECT to_regclass($1) IS NOT NULL", name)

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE TABLE%'"
    async with open_database(database_url) as database, trio.open_nursery() as nursery:
        async with database.transaction() as other:
            await other.execute("LOCK TABLE usage_events_default IN ACCESS SHARE MODE")
            nursery.start_soon(start)
            with trio.fail_after(60):
                while not await database.fetch_value(waiting):  # noqa: ASYNC110 - the database says when
                    await trio.lowlevel.checkpoint()
            assert not up.is_set()
