"""Fixtures that every room shares."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from callora.store.bridge import Database, open_database
from callora.store.embedded import EmbeddedPostgres
from tests.support.postgres import embedded_server, fresh_database, make_template
from tests.support.valkey import Valkey, running_valkey

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("callora", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("callora")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One server a session (and a worker)."""
    with embedded_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def database_template(postgres_server: EmbeddedPostgres) -> str:
    """The name of a database with every migration applied."""
    return make_template(postgres_server)


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, database_template: str) -> Iterator[str]:
    """The DSN of a migrated database that only this test uses."""
    with fresh_database(postgres_server, database_template) as dsn:
        yield dsn


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open pool on `database_url`."""
    async with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def empty_database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of a database without any table, for the tests of the store's own machinery."""
    with fresh_database(postgres_server) as dsn:
        yield dsn


@pytest.fixture
async def empty_database(empty_database_url: str) -> AsyncIterator[Database]:
    """An open pool on `empty_database_url`."""
    async with open_database(empty_database_url) as opened:
        yield opened


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A store of shared rate limits that only this test uses, and may kill."""
    with running_valkey(tmp_path / "valkey") as server:
        yield server
