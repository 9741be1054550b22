"""Migrations against a real PostgreSQL, from folders of the tests' own."""

from pathlib import Path

import pytest
import trio

from callora.store import migrate
from callora.store.bridge import Database
from callora.store.migrate import MigrationRefused, load_migrations, migrate_down, migrate_up, pending


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two migrations: a table, and a column with a default from a function."""
    write(tmp_path, "0001_accounts", "CREATE TABLE accounts (id bigint PRIMARY KEY);", "DROP TABLE accounts;")
    write(
        tmp_path,
        "0002_names",
        "CREATE FUNCTION nobody() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN 'nobody'; END $$;\n"
        "ALTER TABLE accounts ADD COLUMN name text NOT NULL DEFAULT nobody();",
        "ALTER TABLE accounts DROP COLUMN name;\nDROP FUNCTION nobody();",
    )
    return tmp_path


def write(folder: Path, name: str, up: str, down: str = "SELECT 1;") -> None:
    (folder / f"{name}.up.sql").write_text(up)
    (folder / f"{name}.down.sql").write_text(down)


async def columns(database: Database) -> list[str]:
    sql = "SELECT column_name FROM information_schema.columns WHERE table_name = 'accounts' ORDER BY 1"
    return [row["column_name"] for row in await database.fetch(sql)]


async def test_up_then_down_then_up_again(empty_database: Database, folder: Path) -> None:
    both = ["0001_accounts", "0002_names"]
    assert await pending(empty_database, directory=folder) == both
    assert await migrate_up(empty_database, directory=folder) == both
    assert await columns(empty_database) == ["id", "name"]
    assert await migrate_up(empty_database, directory=folder) == []
    assert await pending(empty_database, directory=folder) == []
    assert await migrate_down(empty_database, target=1, directory=folder) == ["0002_names"]
    assert await columns(empty_database) == ["id"]
    assert await migrate_down(empty_database, target=0, directory=folder) == ["0001_accounts"]
    assert await pending(empty_database, directory=folder) == both
    assert await migrate_up(empty_database, target=1, directory=folder) == ["0001_accounts"]
    assert await migrate_up(empty_database, directory=folder) == ["0002_names"]
    row = await empty_database.fetch_row(
        "SELECT name, applied_at <= now() AS dated FROM callora_migrations WHERE number = 2"
    )
    assert row is not None
    assert dict(row) == {"name": "0002_names", "dated": True}


async def test_of_three_at_once_one_applies_and_the_others_find_nothing_left(
    empty_database: Database, folder: Path
) -> None:
    write(folder, "0003_index", "-- no-transaction\nCREATE INDEX CONCURRENTLY accounts_name ON accounts (name);")
    applied: list[list[str]] = []

    async def start() -> None:
        applied.append(await migrate_up(empty_database, directory=folder))

    with trio.fail_after(60):  # waiting for the lock inside the server would deadlock with the index
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(start)
    assert sorted(applied) == [[], [], ["0001_accounts", "0002_names", "0003_index"]]


async def test_the_lock_is_waited_for_and_then_given_up(
    empty_database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_SECONDS", 0.3)
    async with empty_database.acquire() as other:
        assert await other.fetch_value("SELECT pg_try_advisory_lock($1)", migrate._LOCK_KEY)
        with pytest.raises(MigrationRefused, match="another process"):
            await migrate_up(empty_database, directory=folder)
    assert len(await migrate_up(empty_database, directory=folder)) == 2


async def test_a_failing_file_is_rolled_back_whole_and_named_with_its_place(
    empty_database: Database, folder: Path
) -> None:
    write(folder, "0003_wrong", "CREATE TABLE half (id int);\n\nALTER TABLE accounts\n    ADD COLUM oops int;")
    with pytest.raises(MigrationRefused, match=r'0003_wrong\.up\.sql:4:20: 42601: syntax error at or near "int"'):
        await migrate_up(empty_database, directory=folder)
    assert await empty_database.fetch_value("SELECT to_regclass('half') IS NULL")
    assert await pending(empty_database, directory=folder) == ["0003_wrong"]
    write(folder, "0003_wrong", "INSERT INTO accounts VALUES (1), (1);")
    with pytest.raises(MigrationRefused, match=r"0003_wrong\.up\.sql: 23505"):
        await migrate_up(empty_database, directory=folder)
    assert await empty_database.fetch_value("SELECT count(*) FROM accounts") == 0


async def test_a_file_that_ends_its_own_transaction_is_refused(empty_database: Database, folder: Path) -> None:
    write(folder, "0003_commits", "CREATE TABLE half (id int);\nCOMMIT;")
    with pytest.raises(MigrationRefused, match="COMMIT or ROLLBACK"):
        await migrate_up(empty_database, directory=folder)


async def test_an_edited_file_is_refused_but_other_line_ends_are_not(empty_database: Database, folder: Path) -> None:
    await migrate_up(empty_database, directory=folder)
    up = folder / "0002_names.up.sql"
    up.write_bytes(up.read_bytes().replace(b"\n", b"\r\n"))
    assert await pending(empty_database, directory=folder) == []
    up.write_text(up.read_text() + "\n-- only a comment")
    for refused in (migrate_up(empty_database, directory=folder), pending(empty_database, directory=folder)):
        with pytest.raises(MigrationRefused, match=r"0002_names\.up\.sql was edited after it was applied"):
            await refused
    with pytest.raises(MigrationRefused, match="edited"):
        await migrate_down(empty_database, target=0, directory=folder)
    assert await columns(empty_database) == ["id", "name"]


async def test_a_newer_or_a_different_database_is_refused(empty_database: Database, folder: Path) -> None:
    await migrate_up(empty_database, directory=folder)
    for half in ("0002_names.up.sql", "0002_names.down.sql"):
        (folder / half).unlink()
    with pytest.raises(
        MigrationRefused, match="newer than this build: it has 0002_names, and the last known here is 0001"
    ):
        await migrate_up(empty_database, directory=folder)
    for way in ("up", "down"):
        (folder / f"0001_accounts.{way}.sql").rename(folder / f"0001_others.{way}.sql")
    with pytest.raises(MigrationRefused, match="has 0001_accounts where this build has 0001_others"):
        await migrate_up(empty_database, directory=folder)


def test_gaps_doubles_missing_halves_and_strange_names_are_refused(folder: Path) -> None:
    assert [migration.name for migration in load_migrations(folder)] == ["0001_accounts", "0002_names"]
    (folder / "schema.sql").write_text("-- the whole, for reading")
    assert len(load_migrations(folder)) == 2

    def refused_with(name: str, text: str) -> None:
        (folder / name).write_text("SELECT 1;")
        with pytest.raises(MigrationRefused, match=text):
            load_migrations(folder)
        (folder / name).unlink()

    refused_with("0003_half.up.sql", "other half")
    refused_with("0002_again.up.sql", "has the number of")
    refused_with("0003-dash.up.sql", "must be called NNNN_name")
    refused_with("003_short.up.sql", "must be called NNNN_name")
    write(folder, "0004_gap", "SELECT 1;")
    with pytest.raises(MigrationRefused, match="number 0003 is missing, 0004 is there"):
        load_migrations(folder)


async def test_a_target_that_does_not_exist_is_refused(empty_database: Database, folder: Path) -> None:
    for target in (-1, 3):
        with pytest.raises(MigrationRefused, match="there is no migration"):
            await migrate_up(empty_database, target=target, directory=folder)
        with pytest.raises(MigrationRefused, match="there is no migration"):
            await migrate_down(empty_database, target=target, directory=folder)


async def test_callora_s_own_migrations_go_up_down_and_up(empty_database: Database) -> None:
    names = await migrate_up(empty_database)
    assert names == [migration.name for migration in load_migrations(migrate.migrations_directory())]
    assert await migrate_down(empty_database, target=0) == names[::-1]
    left = (
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'S')"
    )
    assert [row["relname"] for row in await empty_database.fetch(left)] == ["callora_migrations"]
    assert await migrate_up(empty_database) == names


async def test_the_shared_template_is_migrated(database: Database) -> None:
    assert await pending(database) == []
