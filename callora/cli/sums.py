"""What is derived from usage, brought up to now or made anew: its sums, and the revenue of developers."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Final

import click

from callora.cli.database import data_dir_option, database_url
from callora.cli.running import read_settings, run_and_exit
from callora.service import SystemClock

ROLLUP_SECONDS_MAX: Final = 600
ROLLUP_SPAN: Final = timedelta(days=1)
"""How much one database transaction counts, and how long it may take."""
REVENUE_SPAN: Final = timedelta(hours=1)


@click.command()
@data_dir_option
@click.option("--rebuild", is_flag=True, help="Forget every sum and count anew; sums grow back meanwhile.")
def rollup(data_dir: Path, rebuild: bool) -> None:
    """Add usage up to now, which running services do by themselves; tell how far the sums are."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.store import rollup as sums
        from callora.store.bridge import open_database

        def tell(made: sums.Pass) -> None:
            if made.behind:
                click.echo(f"counted until {made.as_of:%Y-%m-%d %H:%M}", err=True)

        clock = SystemClock()
        async with (
            database_url(settings, data_dir, shared=True) as dsn,
            open_database(dsn, command_seconds=ROLLUP_SECONDS_MAX) as database,
        ):
            if rebuild:
                calls = await sums.rebuild(database, clock, tell, ROLLUP_SPAN)
                click.echo(f"counted {calls} calls anew")
                return 0
            calls, behind = 0, True
            while behind:
                made = await sums.advance(database, clock.now(), span=ROLLUP_SPAN, wait=True)
                assert made is not None, "it waits for its turn"
                tell(made)
                calls, behind = calls + made.calls, made.behind
            click.echo(f"counted {calls} calls more")
        return 0

    run_and_exit(run)


@click.command()
@data_dir_option
@click.option("--rebuild", is_flag=True, help="Look at every call again; what is missing is added, nothing is changed.")
def revenue(data_dir: Path, rebuild: bool) -> None:
    """Index the revenue of developers up to now, which running services do by themselves."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.store import revenue as entries
        from callora.store.bridge import open_database

        clock = SystemClock()
        async with (
            database_url(settings, data_dir, shared=True) as dsn,
            open_database(dsn, command_seconds=ROLLUP_SECONDS_MAX) as database,
        ):
            await entries.set_fee(database, settings.platform_fee_bps, clock.now())
            if rebuild:
                await entries.look_again(database)
            count, behind = 0, True
            while behind:
                made = await entries.advance(database, clock.now(), span=REVENUE_SPAN, wait=True)
                assert made is not None, "it waits for its turn"
                count, behind = count + made.entries, made.behind
                if behind:
                    click.echo(f"indexed until {made.as_of:%Y-%m-%d %H:%M}", err=True)
        click.echo(f"indexed {count} entries more")
        return 0

    run_and_exit(run)
