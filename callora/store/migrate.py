"""Migrations: plain SQL files, applied in order, once, under a lock, and never edited after.

`migrations/NNNN_name.up.sql` and its `.down.sql`, numbered from 0001 without gaps. A file runs in one database
transaction together with its line in `callora_migrations`. A file whose first line is `-- no-transaction` holds exactly
one statement and runs outside (CREATE INDEX CONCURRENTLY); it must be safe to run twice, since a crash may fall between
it and its line.
"""

import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Final

import attrs
import trio

from callora.ledger.faults import CalloraFault, StoreConflict, StoreRefused
from callora.store.bridge import Connection, Database, StatementRejected

LOCK_SECONDS: Final = 120.0
"""How long to wait for another process that is migrating."""

STATEMENT_SECONDS: Final = 3600.0
"""How long one file may take: an index on a large table takes its time."""

_LOCK_KEY: Final = 0x63616C6C6F7261  # "callora", the number of the advisory lock
_POLL_SECONDS: Final = 0.1
_FILE_NAME: Final = re.compile(r"(?P<number>[0-9]{4})_(?P<name>[a-z0-9_]+)\.(?P<way>up|down)\.sql")
_NO_TRANSACTION: Final = "-- no-transaction"

_CREATE_TABLE: Final = """
CREATE TABLE IF NOT EXISTS callora_migrations (
    number integer PRIMARY KEY CHECK (number > 0),
    name text NOT NULL,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
_TABLE_EXISTS: Final = "SELECT to_regclass('callora_migrations') IS NOT NULL"
_APPLIED: Final = "SELECT number, name, sha256 FROM callora_migrations ORDER BY number"
_RECORD: Final = "INSERT INTO callora_migrations (number, name, sha256) VALUES ($1, $2, $3)"
_FORGET: Final = "DELETE FROM callora_migrations WHERE number = $1"
_TRY_LOCK: Final = "SELECT pg_try_advisory_lock($1)"
_DATABASE_TRANSACTION_ID: Final = "SELECT pg_current_xact_id()::text"


class MigrationRefused(CalloraFault):
    """The migrations cannot be applied as they stand. What was applied before the refused one stays applied."""


@attrs.frozen
class Migration:
    """One numbered step, both ways."""

    number: int
    """From 1."""
    name: str
    """`0001_name`, as the files are called."""
    up: str
    """SQL, line ends normalised."""
    down: str
    """SQL that undoes it, line ends normalised."""
    sha256: str
    """Of `up`: an applied file that was edited afterwards is found by it."""


def migrations_directory() -> Path:
    """Return where the migrations are: inside the installed package, or at the root of the source tree."""
    packaged = Path(str(files("callora") / "_migrations"))
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"


def load_migrations(directory: Path) -> list[Migration]:
    """Return the directory's migrations in order.

    Raises:
        MigrationRefused: a gap or a double in the numbers, a missing half, or a numbered file with a strange name.
    """
    halves: dict[int, dict[str, Path]] = {}
    for path in sorted(directory.glob("[0-9]*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise MigrationRefused(
                f"{path}: must be called NNNN_name.up.sql or NNNN_name.down.sql, name in a-z, 0-9, _"
            )
        other = halves.setdefault(int(match["number"]), {}).setdefault(match["way"], path)
        if other != path:
            raise MigrationRefused(f"{path}: has the number of {other.name}")
    migrations: list[Migration] = []
    for expected, (number, ways) in enumerate(sorted(halves.items()), start=1):
        if number != expected:
            raise MigrationRefused(f"{directory}: number {expected:04} is missing, {number:04} is there")
        if set(ways) != {"up", "down"}:
            raise MigrationRefused(f"{next(iter(ways.values()))}: its other half, up or down, is missing")
        name = ways["up"].name.removesuffix(".up.sql")
        if ways["down"].name.removesuffix(".down.sql") != name:
            raise MigrationRefused(f"{ways['down']}: must be called {name}.down.sql")
        up, down = (_read(ways[way]) for way in ("up", "down"))
        digest = hashlib.sha256(up.encode()).hexdigest()
        migrations.append(Migration(number=number, name=name, up=up, down=down, sha256=digest))
    return migrations


def _read(path: Path) -> str:
    # A checkout on another system may have turned the line ends; that is no edit.
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


async def migrate_up(database: Database, *, target: int | None = None, directory: Path | None = None) -> list[str]:
    """Apply what is not applied yet, in order, up to `target`; return the names applied now.

    Any number of processes may call this at once: one applies, the others wait and find nothing left.

    Args:
        database: lends one connection.
        target: the last number to apply; all if None.
        directory: where the files are; Callora's own if None.

    Raises:
        MigrationRefused: see `load_migrations`; or an applied file was edited, or the database is newer than this
            build, or a file failed (the text names file, line and column), or the lock was not had in `LOCK_SECONDS`.
        StoreUnavailable: the database was lost; the file under way was not applied.
        OutcomeUnknown: it was lost under a COMMIT; run this again, it finds out.

    Cancellation: the file under way is rolled back, those before it stay.
    """
    migrations = load_migrations(directory or migrations_directory())
    if target is not None and not 0 <= target <= len(migrations):
        raise MigrationRefused(f"there is no migration {target}: the last is {len(migrations)}")
    done: list[str] = []
    async with database.acquire() as connection:
        await _lock(connection)
        await connection.execute(_CREATE_TABLE)
        applied = await _applied(connection, migrations)
        for migration in migrations[applied:target]:
            await _apply(connection, migration, migration.up, "up")
            done.append(migration.name)
    return done


async def migrate_down(database: Database, *, target: int, directory: Path | None = None) -> list[str]:
    """Undo what was applied after `target`, newest first; return the names undone.

    Args:
        database: lends one connection.
        target: the number that stays the last applied; 0 undoes all.
        directory: where the files are; Callora's own if None.

    Raises and cancellation: as `migrate_up`.
    """
    migrations = load_migrations(directory or migrations_directory())
    if not 0 <= target <= len(migrations):
        raise MigrationRefused(f"there is no migration {target}: the last is {len(migrations)}")
    done: list[str] = []
    async with database.acquire() as connection:
        await _lock(connection)
        await connection.execute(_CREATE_TABLE)
        applied = await _applied(connection, migrations)
        for migration in reversed(migrations[target:applied]):
            await _apply(connection, migration, migration.down, "down")
            done.append(migration.name)
    return done


async def pending(database: Database, *, directory: Path | None = None) -> list[str]:
    """Return the names of what `migrate_up` would apply, without changing anything.

    Raises:
        MigrationRefused: `migrate_up` would refuse before applying anything.
        StoreUnavailable: the database could not be asked.

    Cancellation: nothing was done.
    """
    migrations = load_migrations(directory or migrations_directory())
    async with database.acquire() as connection:
        applied = await _applied(connection, migrations) if await connection.fetch_value(_TABLE_EXISTS) else 0
    return [migration.name for migration in migrations[applied:]]


async def _lock(connection: Connection) -> None:
    """Take the migration lock for the session. It ends with the session, so a crash leaves none behind.

    Asked for again and again rather than waited for in the server: a waiting statement holds a snapshot, and CREATE
    INDEX CONCURRENTLY of the lock's holder would wait for that in turn, for ever.
    """
    with trio.move_on_after(LOCK_SECONDS):
        while True:
            if await connection.fetch_value(_TRY_LOCK, _LOCK_KEY):
                return
            await trio.sleep(_POLL_SECONDS)
    raise MigrationRefused(f"another process has been migrating for {LOCK_SECONDS:.0f} s; try again when it is done")


async def _applied(connection: Connection, migrations: list[Migration]) -> int:
    """Return how many migrations are applied, having compared each with its file."""
    rows = await connection.fetch(_APPLIED)
    for index, row in enumerate(rows):
        if index >= len(migrations):
            raise MigrationRefused(
                f"the database is newer than this build: it has {row['name']}, and the last known here is "
                f"{migrations[-1].name if migrations else 'none'}; run the newer build, or migrate down with it first"
            )
        migration = migrations[index]
        if row["number"] != migration.number or row["name"] != migration.name:
            raise MigrationRefused(f"the database has {row['name']} where this build has {migration.name}")
        if row["sha256"] != migration.sha256:
            raise MigrationRefused(
                f"{migration.name}.up.sql was edited after it was applied: put it back and write a new migration"
            )
    return len(rows)


async def _apply(connection: Connection, migration: Migration, sql: str, way: str) -> None:
    file = f"{migration.name}.{way}.sql"
    try:
        if sql.split("\n", 1)[0].strip() == _NO_TRANSACTION:
            await connection.execute(sql, deadline_seconds=STATEMENT_SECONDS)
            await _record(connection, migration, way)
            return
        async with connection.transaction():
            before = await connection.fetch_value(_DATABASE_TRANSACTION_ID)
            await connection.execute(sql, deadline_seconds=STATEMENT_SECONDS)
            if await connection.fetch_value(_DATABASE_TRANSACTION_ID) != before:
                raise MigrationRefused(
                    f"{file} ends the database transaction it runs in: take its COMMIT or ROLLBACK out"
                )
            await _record(connection, migration, way)
    except StatementRejected as error:
        raise MigrationRefused(f"{file}{_place(sql, error.position)}: {error}") from error
    except (StoreRefused, StoreConflict) as error:
        raise MigrationRefused(f"{file}: {error}") from error


async def _record(connection: Connection, migration: Migration, way: str) -> None:
    if way == "up":
        await connection.execute(_RECORD, migration.number, migration.name, migration.sha256)
    else:
        await connection.execute(_FORGET, migration.number)


def _place(sql: str, position: int | None) -> str:
    """Return `:line:column` of a position counted in characters from 1."""
    if position is None:
        return ""
    before = sql[: position - 1]
    return f":{before.count(chr(10)) + 1}:{position - 1 - before.rfind(chr(10))}"
