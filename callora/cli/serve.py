"""Serving calls, by one process or several, and bringing the database's schema to this version before."""

import os
from pathlib import Path

import click

from callora.cli.database import apply_migrations, data_dir_option, database_url
from callora.cli.running import Stop, fail, make_logs, read_settings, run_and_exit, run_until_stopped
from callora.http.gateway.listener import open_listener
from callora.logs import Logs
from callora.service import Context, SystemClock, serve


@click.command(name="serve")
@data_dir_option
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes on one port.")
@click.option("--shared-port", is_flag=True, hidden=True, help="Let other processes listen on this port as well.")
@click.option("--until-stdin-ends", is_flag=True, hidden=True, help="Drain when standard input ends: with the parent.")
def serve_command(data_dir: Path, workers: int, shared_port: bool, until_stdin_ends: bool) -> None:
    """Serve calls until SIGTERM, then drain: exit code 0 when every accepted call ended, 1 when some had to be cut."""
    settings = read_settings(os.environ)
    if workers > 1 and settings.port == 0:
        fail("--workers: needs a PORT other than 0, which all of them share", 2)
    clock = SystemClock()

    async def run() -> int:
        with make_logs(settings, clock) as logs:
            logs.capture_structlog()

            async def main(stop: Stop) -> int:
                if workers > 1:
                    # Workers share the port with whoever asks for that: one in use has to be noticed before.
                    open_listener(settings.host, settings.port, shared=False).close()
                async with database_url(settings, data_dir, shared=False) as dsn:
                    if settings.database_dsn is None:
                        await apply_migrations(dsn, clock)
                    if workers > 1:
                        return await _run_workers(dsn, workers, stop, logs)
                    context = Context.make(settings, logs, clock)
                    return await serve(context, dsn, stop.as_drain(), shared_port=shared_port)

            return await run_until_stopped(main, until_stdin_ends=until_stdin_ends)

    run_and_exit(run)


async def _run_workers(dsn: str, count: int, stop: Stop, logs: Logs) -> int:
    from callora.workers import run_workers

    environ = {**os.environ, "DATABASE_URL": dsn}
    arguments = ["serve", "--shared-port", "--until-stdin-ends"]
    return await run_workers(count, arguments, environ, stop.as_drain(), logs.logger("workers"))


@click.command()
@data_dir_option
@click.option("--down-to", type=click.IntRange(0), help="Take back every migration above this number.")
@click.option("--status", is_flag=True, help="Only list what is missing.")
def migrate(data_dir: Path, down_to: int | None, status: bool) -> None:
    """Bring the database's schema up to this version, under a lock; or take migrations back."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.store.bridge import open_database
        from callora.store.migrate import migrate_down, pending

        async with database_url(settings, data_dir, shared=True) as dsn:
            if status or down_to is not None:
                async with open_database(dsn) as database:
                    names = await pending(database) if down_to is None else await migrate_down(database, target=down_to)
                verb = "missing" if down_to is None else "taken back"
            else:
                names, verb = await apply_migrations(dsn, SystemClock()), "applied"
        click.echo("\n".join(f"{verb} {name}" for name in names) or f"nothing {verb}")
        return 0

    run_and_exit(run)
