"""The database of a command: the configured one, or an embedded one, with the schema of this version."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import click

from callora.config.settings import Settings
from callora.service import SystemClock

DATA_DIR: Final = Path(".callora")
_DSN_FILE: Final = "database_url"

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DATA_DIR,
    show_default=True,
    help="Where the embedded PostgreSQL keeps its data when no database is configured.",
)
"""The option of every command that may keep something on this machine."""


@asynccontextmanager
async def database_url(settings: Settings, data_dir: Path, *, shared: bool) -> AsyncIterator[str]:
    """Yield the configured database's URL, or that of an embedded one.

    Args:
        shared: use the embedded server that another command runs on this directory, where there is one.
    """
    from callora.store.embedded import EmbeddedBusy, running_postgres

    if settings.database_dsn is not None:
        yield settings.database_dsn.get_secret_value()
        return
    note = data_dir / _DSN_FILE
    notice = f"No database is configured: an embedded PostgreSQL keeps its data in {data_dir.absolute()}"
    if not shared:
        click.echo(notice, err=True)
    async with AsyncExitStack() as stack:
        server = running_postgres(data_dir, on_restart=partial(click.echo, err=True))
        try:
            dsn = await stack.enter_async_context(server)
        except EmbeddedBusy:
            if not shared or not note.exists():
                raise
            dsn = note.read_text()
        else:
            note.write_text(dsn)
            stack.callback(note.unlink, missing_ok=True)
            if shared:
                click.echo(notice, err=True)
        yield dsn


async def apply_migrations(dsn: str, clock: SystemClock) -> list[str]:
    """Bring the schema to this version, make the partitions of the next months, and return the migrations applied."""
    from callora.store.bridge import open_database
    from callora.store.migrate import migrate_up
    from callora.store.usage import ensure_partitions

    async with open_database(dsn) as database:
        applied = await migrate_up(database)
        await ensure_partitions(database, clock.now())
        return applied
