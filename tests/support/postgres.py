"""A real PostgreSQL for tests: one embedded server a session, one migrated template, one copy of it a test."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from callora.store.bridge import open_database
from callora.store.embedded import EmbeddedPostgres
from callora.store.migrate import migrate_up

TEMPLATE = "callora_template"
_numbers = itertools.count(1)


@contextmanager
def embedded_server(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    """Run a server for tests, without fsync: what they prove about crashes is about processes, not about power."""
    server = EmbeddedPostgres(data_dir, settings={"fsync": "off", "full_page_writes": "off"})
    server.start()
    try:
        yield server
    finally:
        server.stop()


def make_template(server: EmbeddedPostgres) -> str:
    """Create the migrated database that the tests' databases are copies of; return its name."""

    async def migrate() -> None:
        async with open_database(server.dsn_for(TEMPLATE)) as database:
            await migrate_up(database)

    run_sql(server, f"CREATE DATABASE {TEMPLATE}")
    trio.run(migrate)
    return TEMPLATE


@contextmanager
def fresh_database(server: EmbeddedPostgres, template: str = "template1") -> Iterator[str]:
    """Yield the DSN of a new copy of the template, dropped afterwards whoever is still connected."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    run_sql(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield server.dsn_for(name)
    finally:
        run_sql(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def run_sql(server: EmbeddedPostgres, sql: str) -> None:
    """Run one statement on the server's own database, from outside Trio."""

    async def run(statement: str) -> None:
        async with open_database(server.dsn) as database:
            await database.execute(statement)

    trio.run(partial(run, sql))
