"""The bridge against a real PostgreSQL: faults by what was sent, exits under cancellation, the line."""

import asyncio
import logging
import os
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
import trio.testing
import trustme

from callora.ledger.faults import OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable
from callora.store import bridge
from callora.store.bridge import (
    Database,
    Line,
    StatementRejected,
    open_database,
)
from callora.store.embedded import EmbeddedPostgres

KILL_MYSELF = "SELECT pg_terminate_backend(pg_backend_pid())"

# A deferred trigger runs inside COMMIT: the way to lose a connection exactly there.
TABLES = """
CREATE TABLE pairs (id bigint NOT NULL, half text NOT NULL, PRIMARY KEY (id, half));
CREATE TABLE amounts (id bigint PRIMARY KEY, amount bigint NOT NULL CONSTRAINT amount_not_negative CHECK (amount >= 0));
CREATE TABLE at_commit (what text NOT NULL);
CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.what = 'die' THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5);
    ELSIF NEW.what = 'hang' THEN PERFORM pg_sleep(60);
    ELSE RAISE EXCEPTION 'closed events never change' USING ERRCODE = 'CA001', CONSTRAINT = 'closed_once';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON at_commit DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION at_commit();
"""


@pytest.fixture
async def store(empty_database: Database) -> Database:
    """A database with the tables above."""
    await empty_database.execute(TABLES)
    return empty_database


async def backends(store: Database) -> int:
    """Count the client connections to this database, the asking one among them."""
    return int(
        await store.fetch_value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend'"
        )
    )


async def only_one_backend_left(store: Database) -> None:
    """Return when the asking connection is the only one; a cut one's server process needs a moment to notice."""
    with trio.fail_after(60):
        while True:
            if await backends(store) == 1:
                return


# --- the pool ---------------------------------------------------------------------------------------------------------


async def test_verbs_return_rows_row_value_and_tag(store: Database) -> None:
    assert await store.execute("INSERT INTO amounts VALUES (1, 10), (2, 20)") == "INSERT 0 2"
    rows = await store.fetch("SELECT id, amount FROM amounts WHERE id >= $1 ORDER BY id", 1)
    assert [dict(row) for row in rows] == [{"id": 1, "amount": 10}, {"id": 2, "amount": 20}]
    row = await store.fetch_row("SELECT amount FROM amounts WHERE id = 2")
    assert row is not None
    assert row["amount"] == 20
    assert await store.fetch_row("SELECT amount FROM amounts WHERE id = 3") is None
    assert await store.fetch_value("SELECT sum(amount)::bigint FROM amounts") == 30


async def test_opens_while_the_database_is_down(tmp_path: Path) -> None:
    async with open_database(f"postgresql://postgres@/callora?host={tmp_path}", connect_seconds=1) as store:
        with pytest.raises(StoreUnavailable):
            await store.check()
        with pytest.raises(StoreUnavailable):
            async with store.transaction():
                pytest.fail("there is no connection to run this on")
        async with store.line({}) as line:
            with pytest.raises(StoreUnavailable):
                await line.run("SELECT 1", deadline_seconds=1)


async def test_a_database_that_does_not_exist_is_unavailable(postgres_server: EmbeddedPostgres) -> None:
    async with open_database(postgres_server.dsn_for("nowhere")) as store:
        with pytest.raises(StoreUnavailable, match="3D000"):
            await store.check()


async def test_a_full_pool_refuses_after_its_time_out(empty_database_url: str) -> None:
    async with open_database(empty_database_url, pool_max=1, connect_seconds=2, command_seconds=2) as store:
        async with store.acquire():
            with pytest.raises(StoreUnavailable):
                await store.fetch_value("SELECT 1")
        assert await store.fetch_value("SELECT 1") == 1


async def test_the_blocks_own_error_comes_out_as_it_is(empty_database_url: str) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_database(empty_database_url):
            raise KeyError("mine")


async def test_a_connection_that_is_lost_as_the_pool_closes_is_no_error(empty_database_url: str) -> None:
    async with open_database(empty_database_url, pool_max=1) as store:
        async with store.acquire() as connection:
            raw = connection._raw._con
        with socket.socket(fileno=os.dup(raw._transport.get_extra_info("socket").fileno())) as wire:
            wire.shutdown(socket.SHUT_WR)


async def test_losing_the_connection_is_unknown_only_where_something_may_have_been_written(store: Database) -> None:
    with pytest.raises(StoreUnavailable):
        await store.fetch_value(KILL_MYSELF)
    with pytest.raises(OutcomeUnknown):
        await store.execute(KILL_MYSELF)
    with pytest.raises(OutcomeUnknown):
        await store.fetch_value(
            "WITH t AS (INSERT INTO amounts VALUES (1, 1) RETURNING id)"
            " SELECT pg_terminate_backend(pg_backend_pid()) FROM t"
        )
    with pytest.raises(StoreUnavailable):
        async with store.transaction() as connection:
            await connection.execute("INSERT INTO amounts VALUES (2, 2); " + KILL_MYSELF)
    assert await store.fetch_value("SELECT count(*) FROM amounts") == 0


async def test_a_commit_without_an_answer_is_unknown(store: Database, empty_database_url: str) -> None:
    with pytest.raises(OutcomeUnknown):
        async with store.transaction() as connection:
            await connection.execute("INSERT INTO at_commit VALUES ('die')")
    async with open_database(empty_database_url, command_seconds=0.3) as impatient:
        with pytest.raises(OutcomeUnknown):
            async with impatient.transaction() as connection:
                await connection.execute("INSERT INTO at_commit VALUES ('hang')")
    assert await store.fetch_value("SELECT count(*) FROM at_commit") == 0


async def test_a_refusal_names_its_constraint(store: Database) -> None:
    with pytest.raises(StoreRefused) as caught:
        await store.execute("INSERT INTO amounts VALUES (1, -1)")
    assert (caught.value.constraint, caught.value.sqlstate) == ("amount_not_negative", "23514")
    await store.execute("INSERT INTO amounts VALUES (1, 1)")
    with pytest.raises(StoreRefused) as caught:
        await store.fetch("INSERT INTO amounts VALUES (1, 1) RETURNING id")
    assert (caught.value.constraint, caught.value.sqlstate) == ("amounts_pkey", "23505")
    with pytest.raises(StoreRefused) as caught:
        async with store.transaction() as connection:
            await connection.execute("INSERT INTO at_commit VALUES ('refuse')")
    assert (caught.value.constraint, caught.value.sqlstate) == ("closed_once", "CA001")
    with pytest.raises(StoreRefused, match="P0001"):
        await store.execute("DO $$ BEGIN RAISE EXCEPTION 'no'; END $$")


async def test_a_wrong_statement_or_argument_is_a_bug_and_not_a_fault(store: Database) -> None:
    with pytest.raises(StatementRejected) as caught:
        await store.fetch("SELECT * FROM nowhere")
    assert (caught.value.sqlstate, caught.value.position) == ("42P01", 15)
    assert caught.value.of_older_schema
    with pytest.raises(StatementRejected) as caught:
        await store.fetch("SELECT newer FROM pg_class")
    assert caught.value.of_older_schema
    with pytest.raises(StatementRejected) as caught:
        await store.fetch("SELECT $1::bigint", "not a number")
    assert not caught.value.of_older_schema
    with pytest.raises(Exception, match="expects 1 argument") as misuse:
        await store.fetch("SELECT $1::bigint")
    assert not isinstance(misuse.value, StoreUnavailable | OutcomeUnknown)
    assert await store.fetch_value("SELECT 1") == 1


async def test_of_two_deadlocked_transactions_one_is_told_to_run_again(store: Database) -> None:
    await store.execute("INSERT INTO amounts VALUES (1, 0), (2, 0)")
    barrier = [trio.Event(), trio.Event()]
    conflicts: list[int] = []

    async def cross(mine: int) -> None:
        first, second = (1, 2) if mine == 0 else (2, 1)
        try:
            async with store.transaction() as connection:
                await connection.execute("UPDATE amounts SET amount = amount + 1 WHERE id = $1", first)
                barrier[mine].set()
                await barrier[1 - mine].wait()
                await connection.execute("UPDATE amounts SET amount = amount + 1 WHERE id = $1", second)
        except StoreConflict:
            conflicts.append(mine)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cross, 0)
        nursery.start_soon(cross, 1)
    assert len(conflicts) == 1
    assert await store.fetch_value("SELECT sum(amount)::bigint FROM amounts") == 2


async def test_a_commit_that_rolled_back_says_so(store: Database) -> None:
    async def swallow() -> None:
        async with store.transaction() as connection:
            await connection.execute("INSERT INTO amounts VALUES (1, 1)")
            with suppress(StoreRefused):
                await connection.execute("INSERT INTO amounts VALUES (2, -1)")

    with pytest.raises(StoreConflict):
        await swallow()
    assert await store.fetch_value("SELECT count(*) FROM amounts") == 0


async def test_an_error_in_the_block_rolls_back(store: Database) -> None:
    async def fail() -> None:
        async with store.transaction() as connection:
            await connection.execute("INSERT INTO amounts VALUES (1, 1)")
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert await store.fetch_value("SELECT count(*) FROM amounts") == 0


async def test_a_lent_connection_keeps_no_session_state(empty_database_url: str) -> None:
    async with open_database(empty_database_url, pool_max=1) as store:
        async with store.acquire() as connection:
            await connection.execute("SET statement_timeout = '77s'")
            assert await connection.fetch_value("SELECT pg_try_advisory_lock(1)")
        assert await store.fetch_value("SELECT current_setting('statement_timeout')") == "0"
        assert await store.fetch_value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_300_random_cancellations_leak_no_connection_and_no_half_pair(
    store: Database, empty_database_url: str
) -> None:
    rng = random.Random(20260101)
    done = 0

    async def pair(pool: Database, number: int) -> None:
        async with pool.transaction() as connection:
            await connection.execute("INSERT INTO pairs VALUES ($1, 'left')", number)
            await connection.execute("INSERT INTO pairs VALUES ($1, 'right')", number)

    async def lent(pool: Database, _number: int) -> None:
        async with pool.acquire() as connection:
            await connection.fetch_value("SELECT pg_sleep(0.002)")

    async def single(pool: Database, _number: int) -> None:
        await pool.fetch_value("SELECT pg_sleep(0.002)")

    async with open_database(empty_database_url, pool_max=2) as pool:

        async def attempt(number: int, seconds: float) -> None:
            nonlocal done
            with trio.move_on_after(seconds) as scope:
                await rng.choice([pair, pair, lent, single])(pool, number)
            done += not scope.cancelled_caught

        for start in range(0, 300, 3):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 3):
                    nursery.start_soon(attempt, number, rng.uniform(0, 0.02))
        assert 0 < done < 300
        with trio.fail_after(60):
            async with pool.acquire() as one, pool.acquire() as other:  # all that the pool has
                assert await one.fetch_value("SELECT 1") == await other.fetch_value("SELECT 1") == 1
    halves = "SELECT count(*) FROM (SELECT id FROM pairs GROUP BY id HAVING count(*) <> 2) AS broken"
    assert await store.fetch_value(halves) == 0
    await only_one_backend_left(store)


async def test_an_error_report_of_the_asyncio_loop_is_logged_and_ends_nothing(
    store: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        store._loop.call_exception_handler({"message": "a callback failed", "exception": KeyError("x")})
    assert "a callback failed" in caplog.text
    caplog.clear()
    await store.check()


# --- the line, read by ourselves (unix socket) and by the loop (TLS) --------------------------------------------------


@asynccontextmanager
async def tls_door(dsn: str) -> AsyncIterator[str]:
    """Put TLS in front of a server's unix socket, since not every build of the embedded server has it.

    Yields a DSN of the same database through that door.
    """
    parts = urlsplit(dsn)
    socket_path = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async def relay(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)
        scope.cancel()

    async def serve(plain: trio.SocketStream) -> None:
        if await plain.receive_some(8) != struct.pack("!ll", 8, 80877103):  # SSLRequest; or gone before asking
            return
        await plain.send_all(b"S")
        client = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
        server = await trio.open_unix_socket(socket_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, client, server, nursery.cancel_scope)
            nursery.start_soon(relay, server, client, nursery.cancel_scope)
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(server)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield f"postgresql://postgres@127.0.0.1:{port}{parts.path}?sslmode=require"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def no_door(dsn: str) -> AsyncIterator[str]:
    yield dsn


@pytest.fixture(params=["unix", "tls"])
async def lines(
    request: pytest.FixtureRequest, empty_database_url: str, store: Database
) -> AsyncIterator[tuple[Database, Line]]:
    """A pool and a line to the same tables, the line by unix socket or encrypted."""
    door = tls_door if request.param == "tls" else no_door
    async with (
        door(empty_database_url) as dsn,
        open_database(dsn) as through_the_door,
        through_the_door.line({"plan_cache_mode": "force_generic_plan"}) as line,
    ):
        yield store, line


async def closed(raw: Any) -> None:
    """Wait, on asyncio's side, until the driver knows that its connection is gone."""
    while True:
        if raw.is_closed():
            return
        await asyncio.sleep(0)


async def tuples(line: Line, sql: str) -> list[tuple[Any, ...]]:
    """Run a query on the line."""
    return [tuple(row.values()) for row in await line.run(sql, deadline_seconds=5)]


async def pid_of(line: Line) -> int:
    return int((await line.run("SELECT pg_backend_pid() AS pid", deadline_seconds=5))[0]["pid"])


async def test_only_an_encrypted_line_is_read_by_the_loop(
    lines: tuple[Database, Line], request: pytest.FixtureRequest
) -> None:
    _, line = lines
    await pid_of(line)
    assert (line._socket is None) == ("tls" in request.node.name)


async def test_a_line_runs_prepared_statements_on_one_connection_with_its_settings(
    lines: tuple[Database, Line],
) -> None:
    _, line = lines
    pid = await pid_of(line)
    for number in range(3):
        rows = await line.run("INSERT INTO amounts VALUES ($1, $2) RETURNING id, amount", number, 7, deadline_seconds=5)
        assert [dict(row) for row in rows] == [{"id": number, "amount": 7}]
    assert await pid_of(line) == pid
    sql = "SELECT count(*) AS n, current_setting('plan_cache_mode') AS mode FROM pg_prepared_statements"
    sql += " WHERE statement LIKE 'INSERT INTO amounts%'"
    assert dict((await line.run(sql, deadline_seconds=5))[0]) == {"n": 1, "mode": "force_generic_plan"}


async def test_a_line_carries_more_than_a_socket_buffer_both_ways(lines: tuple[Database, Line]) -> None:
    _, line = lines
    numbers = list(range(300_000))
    rows = await line.run("SELECT $1::bigint[] AS numbers, repeat('x', 3000000) AS text", numbers, deadline_seconds=30)
    assert rows[0]["numbers"] == numbers
    assert len(rows[0]["text"]) == 3_000_000


async def test_a_line_lost_while_idle_is_replaced_without_a_fault(lines: tuple[Database, Line]) -> None:
    store, line = lines
    pid = await pid_of(line)
    await store.fetch_value("SELECT pg_terminate_backend($1, 5000)", pid)
    if line._socket is None:
        # The loop reads: it learns of the loss when it is next given the time to.
        with trio.fail_after(60):
            await store._loop.run_aio_coroutine(closed(line._raw))
    assert await pid_of(line) != pid


async def test_a_line_lost_under_a_statement_is_unknown_and_comes_back(lines: tuple[Database, Line]) -> None:
    _, line = lines
    with pytest.raises(OutcomeUnknown):
        await line.run(KILL_MYSELF, deadline_seconds=5)
    with pytest.raises(OutcomeUnknown):
        await line.run("INSERT INTO at_commit VALUES ('die')", deadline_seconds=5)
    assert await tuples(line, "SELECT count(*) AS n FROM at_commit") == [(0,)]


async def test_a_missed_deadline_is_unknown_and_the_line_comes_back(lines: tuple[Database, Line]) -> None:
    _, line = lines
    pid = await pid_of(line)
    with trio.fail_after(20), pytest.raises(OutcomeUnknown, match="no answer within"):
        await line.run("SELECT pg_sleep(30)", deadline_seconds=0.1)
    assert await pid_of(line) != pid


async def test_a_refused_statement_leaves_the_line_standing(lines: tuple[Database, Line]) -> None:
    _, line = lines
    pid = await pid_of(line)
    with pytest.raises(StoreRefused) as caught:
        await line.run("INSERT INTO amounts VALUES (1, $1)", -5, deadline_seconds=5)
    assert caught.value.constraint == "amount_not_negative"
    with pytest.raises(StatementRejected):
        await line.run("SELECT 1 FROM nowhere", deadline_seconds=5)
    with pytest.raises(StatementRejected):
        await line.run("INSERT INTO amounts VALUES (1, $1)", "five", deadline_seconds=5)
    assert await pid_of(line) == pid


async def test_a_changed_table_costs_a_line_one_conflict(lines: tuple[Database, Line]) -> None:
    store, line = lines
    await store.execute("INSERT INTO amounts VALUES (1, 1)")
    await line.run("SELECT * FROM amounts", deadline_seconds=5)
    await store.execute("ALTER TABLE amounts ADD COLUMN note text")
    with pytest.raises(StoreConflict):
        await line.run("SELECT * FROM amounts", deadline_seconds=5)
    assert await tuples(line, "SELECT * FROM amounts") == [(1, 1, None)]


async def test_a_cancelled_caller_still_sees_its_statement_through(lines: tuple[Database, Line]) -> None:
    _, line = lines
    pid = await pid_of(line)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def insert() -> None:
                await line.run("INSERT INTO amounts SELECT 1, 1 FROM pg_sleep(0.2)", deadline_seconds=5)

            nursery.start_soon(insert)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with trio.CancelScope() as scope:
        scope.cancel()
        await line.run("INSERT INTO amounts VALUES (2, 2)", deadline_seconds=5)  # not even sent
    assert scope.cancelled_caught
    assert await tuples(line, "SELECT id FROM amounts") == [(1,)]
    assert await pid_of(line) == pid


async def test_a_line_transaction_commits_or_rolls_back_as_one(lines: tuple[Database, Line]) -> None:
    _, line = lines
    async with line.transaction(deadline_seconds=5) as inside:
        await inside.run("INSERT INTO amounts VALUES (1, 1)", deadline_seconds=5)
        await inside.run("INSERT INTO amounts VALUES (2, 2)", deadline_seconds=5)

    async def fail() -> None:
        async with line.transaction(deadline_seconds=5) as inside:
            await inside.run("INSERT INTO amounts VALUES (3, 3)", deadline_seconds=5)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    with trio.CancelScope() as scope:
        async with line.transaction(deadline_seconds=5) as inside:
            await inside.run("INSERT INTO amounts VALUES (4, 4)", deadline_seconds=5)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    async def swallow() -> None:
        async with line.transaction(deadline_seconds=5) as inside:
            with suppress(StoreRefused):
                await inside.run("INSERT INTO amounts VALUES (5, -5)", deadline_seconds=5)

    with pytest.raises(StoreConflict):
        await swallow()
    assert await tuples(line, "SELECT id FROM amounts ORDER BY id") == [(1,), (2,)]


async def test_a_line_lost_inside_a_transaction_wrote_nothing_and_never_commits_the_rest(
    lines: tuple[Database, Line],
) -> None:
    _, line = lines

    async def go_on_after_the_loss() -> None:
        async with line.transaction(deadline_seconds=5) as inside:
            await inside.run("INSERT INTO amounts VALUES (1, 1)", deadline_seconds=5)
            with suppress(StoreUnavailable):
                await inside.run(KILL_MYSELF, deadline_seconds=5)
            await inside.run("INSERT INTO amounts VALUES (2, 2)", deadline_seconds=5)

    with pytest.raises(StoreUnavailable):
        await go_on_after_the_loss()
    with pytest.raises(OutcomeUnknown):
        async with line.transaction(deadline_seconds=5) as inside:
            await inside.run("INSERT INTO at_commit VALUES ('die')", deadline_seconds=5)
    assert await tuples(line, "SELECT count(*) AS n FROM amounts") == [(0,)]


@pytest.mark.parametrize("beside_calls", [True, False])
async def test_statements_beside_calls_are_not_spread_over_processes(
    empty_database_url: str, beside_calls: bool
) -> None:
    async with open_database(empty_database_url, beside_calls=beside_calls) as database:
        await database.execute("CREATE TABLE long AS SELECT i FROM generate_series(1, 500000) AS i")
        await database.execute("ANALYZE long")
        plan = await database.fetch("EXPLAIN SELECT count(*) FROM long WHERE i % 7 = 3")
    assert any("Parallel" in row["QUERY PLAN"] for row in plan) != beside_calls


async def test_a_transaction_of_a_process_that_stands_still_is_ended_and_wrote_nothing(
    store: Database, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "IDLE_IN_TRANSACTION_SECONDS_MAX", 1)

    async def until_nobody_is_idle() -> None:
        idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in tr%'"
        with trio.fail_after(60):
            while await store.fetch_value(idle):
                pass

    async def stand_still_with_a_connection() -> None:
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO amounts VALUES (1, 1)")
            await until_nobody_is_idle()
            await connection.execute("INSERT INTO amounts VALUES (2, 2)")

    async def stand_still_with_the_line() -> None:
        async with line.transaction(deadline_seconds=5) as inside:
            await inside.run("INSERT INTO amounts VALUES (3, 3)", deadline_seconds=5)
            await until_nobody_is_idle()
            await inside.run("INSERT INTO amounts VALUES (4, 4)", deadline_seconds=5)

    async with open_database(empty_database_url) as database, database.line({}) as line:
        with pytest.raises(StoreUnavailable):
            await stand_still_with_a_connection()
        with pytest.raises(StoreUnavailable):
            await stand_still_with_the_line()
        assert await tuples(line, "SELECT count(*) AS n FROM amounts") == [(0,)]


async def test_a_line_refuses_a_second_task(lines: tuple[Database, Line]) -> None:
    _, line = lines
    async with trio.open_nursery() as nursery:

        async def slow() -> None:
            await line.run("SELECT pg_sleep(0.2)", deadline_seconds=5)

        nursery.start_soon(slow)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(AssertionError, match="one statement at a time"):
            await line.run("SELECT 1", deadline_seconds=5)


async def test_a_closed_line_leaves_no_connection(store: Database) -> None:
    async with store.line({}) as line:
        await pid_of(line)
        assert await backends(store) == 2
    await only_one_backend_left(store)
