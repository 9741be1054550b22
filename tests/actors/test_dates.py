"""The index of dates: told of what is new, at no cost to a vacuum, and of nothing where that is not allowed."""

import secrets
from collections.abc import AsyncIterator
from typing import cast
from urllib.parse import quote

import pytest
import trio

from callora.actors import dates as actor
from callora.actors.dates import Dates
from callora.ledger.faults import StoreConflict
from callora.store.bridge import Database, StatementRejected, open_database
from callora.store.usage import RANGE_BLOCKS, extend_dates
from tests.simulation.support import Log

EVENTS = """
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, closed_at)
SELECT id, id, id, id, 1, 1, 0, now(), now() + interval '1 minute', 1, 'captured', 0, now()
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1::int)) AS made
"""
"""Ids of no date of theirs: they are in the default partition."""
TABLE = "usage_events_default"
INDEX = "usage_events_default_created_at_idx"


async def filled(database: Database, ranges: int) -> None:
    """Have events fill that many ranges more."""
    sql = f"SELECT pg_relation_size('{TABLE}') / current_setting('block_size')::int"
    until = await database.fetch_value(sql) + ranges * RANGE_BLOCKS
    while await database.fetch_value(sql) < until:
        await database.execute(EVENTS, 500)


async def unknown(database: Database) -> int:
    """Return how many ranges the index does not know, and tell it of them."""
    found: int = await database.fetch_value("SELECT brin_summarize_new_values($1::text::regclass)", INDEX)
    return found


@pytest.fixture
async def quiet(database: Database) -> Database:
    """A database that no vacuum tells the index of, with a range that nobody told it of."""
    await database.execute(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = false)")
    await filled(database, 3)
    return database


async def test_what_was_placed_since_the_last_time_is_known_but_for_what_is_being_filled(quiet: Database) -> None:
    reached: dict[int, int] = {}
    assert await extend_dates(quiet, reached) == 0, "what is older is left to the database itself"
    await filled(quiet, 4)
    assert 4 <= await extend_dates(quiet, reached) <= 5
    assert await extend_dates(quiet, reached) == 0
    await filled(quiet, 2)
    assert 2 <= await extend_dates(quiet, reached) <= 3
    assert 3 <= await unknown(quiet) <= 5, "two or three from before, and one or two at the end"


async def test_two_processes_tell_it_once(quiet: Database) -> None:
    one: dict[int, int] = {}
    other: dict[int, int] = {}
    for reached in (one, other):
        await extend_dates(quiet, reached)
    await filled(quiet, 3)
    assert await extend_dates(quiet, one) >= 3
    assert await extend_dates(quiet, other) == 0


async def test_while_a_vacuum_is_at_it_nothing_is_told_and_all_of_it_later(quiet: Database) -> None:
    log = Log()
    reached: dict[int, int] = {}
    dates = Dates(quiet, log.logger())
    await extend_dates(quiet, reached)
    await dates.extend()
    await filled(quiet, 3)
    async with quiet.transaction() as vacuum:
        await vacuum.execute(f"LOCK TABLE {TABLE} IN SHARE UPDATE EXCLUSIVE MODE")
        with pytest.raises(StoreConflict):
            await extend_dates(quiet, reached)
        await dates.extend()
    await dates.extend()
    assert await extend_dates(quiet, reached) == 0
    assert 3 <= await unknown(quiet) <= 5
    assert log.events == []


@pytest.fixture
async def guest_url(quiet: Database, database_url: str) -> AsyncIterator[str]:
    """The DSN of a role that may read and write every table, and owns none."""
    name = f"callora_guest_{secrets.token_hex(4)}"  # roles belong to the server, which tests share
    await quiet.execute(f"CREATE ROLE {name}")
    await quiet.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}")
    joint = "&" if "?" in database_url else "?"
    yield f"{database_url}{joint}options={quote(f'-c role={name}')}"
    await quiet.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {name}")
    await quiet.execute(f"DROP ROLE {name}")


async def test_a_service_that_does_not_own_its_tables_says_so_once(quiet: Database, guest_url: str) -> None:
    log = Log()
    async with open_database(guest_url) as guest:
        dates = Dates(guest, log.logger())
        await dates.extend()
        for _ in range(3):
            await filled(quiet, 1)
            await dates.extend()
    assert log.events == ["dates_not_extended"]


@pytest.mark.parametrize(("sqlstate", "goes_on"), [("55000", True), ("42883", False)])
async def test_a_standby_is_waited_for_and_a_wrong_statement_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, sqlstate: str, goes_on: bool
) -> None:
    async def refused(*_: object) -> int:
        await trio.lowlevel.checkpoint()
        raise StatementRejected("recovery is in progress", sqlstate=sqlstate, position=None)

    monkeypatch.setattr(actor, "extend_dates", refused)
    log = Log()
    dates = Dates(cast(Database, None), log.logger())
    for _ in range(2):
        if goes_on:
            await dates.extend()
        else:
            with pytest.raises(StatementRejected):
                await dates.extend()
    assert log.events == []
