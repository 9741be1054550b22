"""Rests of long looks: they change no answer, and are taken for rows that a look leaves out as well."""

import pytest
import trio

from callora.store.breath import breathing
from callora.store.bridge import Database

ROWS = 40
REST_SECONDS = 0.01


@pytest.mark.parametrize(("condition", "found"), [("n > 0", ROWS), ("n % 4 = 0", ROWS // 4), ("n < 0", 0)])
async def test_every_row_may_bring_a_rest_and_none_is_lost(
    empty_database: Database, condition: str, found: int
) -> None:
    sql = f"SELECT count(*) FROM generate_series(1, {ROWS}) AS n WHERE {breathing(1, condition, rest='$1')}"
    started = trio.current_time()
    assert await empty_database.fetch_value(sql, REST_SECONDS) == found
    assert trio.current_time() - started >= ROWS * REST_SECONDS
    assert await empty_database.fetch_value(sql, 0.0) == found


async def test_one_row_in_so_many_brings_a_rest(empty_database: Database) -> None:
    sql = f"SELECT count(*) FROM generate_series(1, 100000) WHERE {breathing(1000, rest='$1')}"
    with trio.fail_after(30):  # each with a rest would be 100 s, and the statement is cut after ten
        assert await empty_database.fetch_value(sql, 0.001) == 100_000
