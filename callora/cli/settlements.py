"""Payments to developers: made at once, released where only an operator can tell, and compared with the books."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from callora.cli.database import data_dir_option, database_url
from callora.cli.running import fail, make_logs, read_settings, run_and_exit
from callora.ledger.money import format_usdc
from callora.service import Context, SystemClock

SETTLE_SECONDS_MAX: Final = 300.0
DAYS: Final = 7
REASON_MAX: Final = 500


@click.command()
@data_dir_option
@click.option("--now", "at_once", is_flag=True, required=True, help="Do not wait for SETTLEMENT_INTERVAL_MS.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(1, 86_400), default=SETTLE_SECONDS_MAX, show_default=True)
def settle(data_dir: Path, at_once: bool, wait_seconds: float) -> None:
    """Pay developers what they have earned up to now: a running service is asked to; where none runs, this does it.

    Exit code 0 when everything under way has ended and nothing failed, else 1.
    """
    settings = read_settings(os.environ)
    clock = SystemClock()

    async def run() -> int:
        from callora.settling import settle_now

        with make_logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with database_url(settings, data_dir, shared=True) as dsn:
                settled = await settle_now(context, dsn, wait_seconds)
        table = Table("developer", "address", "USDC", "state", "transaction")
        for each in settled.payments:
            told = each.tx_hash or each.failure or ""
            table.add_row(each.name or each.developer_id, each.address, format_usdc(each.amount), each.state, told)
        if settled.payments:
            Console(width=240 if not sys.stdout.isatty() else None).print(table)
        click.echo(settled.said)
        failed = any(each.state == "failed" for each in settled.payments)
        return 0 if settled.ended and not failed else 1

    run_and_exit(run)


@click.group()
def settlements() -> None:
    """What became of payments to developers where only an operator can decide."""


@settlements.command(name="release")
@data_dir_option
@click.argument("settlement_id", type=click.UUID)
@click.option("--reason", required=True, help="The developers are told.")
def release_settlement_command(data_dir: Path, settlement_id: object, reason: str) -> None:
    """Say that a settlement's charge is lost with a history that is over: its revenue is settled anew.

    Refused unless the network has begun another history. Where the charge was real, this pays developers twice.
    """
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.ledger.ids import Ids
        from callora.store import settlements as store
        from callora.store.bridge import open_database

        clock = SystemClock()
        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            found = await store.find(database, str(settlement_id))
            new_id = Ids(clock, os.urandom).uuid7
            done = found is not None and await store.fail(database, found, reason, new_id, clock.now(), lost=True)
        click.echo("released" if done else "there is none that can be released by this id", err=not done)
        return 0 if done else 1

    run_and_exit(run)


@click.command()
@data_dir_option
@click.option("--days", type=click.IntRange(1, 3660), default=DAYS, show_default=True, help="How far back to look.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--clear", "cleared", type=click.UUID, help="Clear what you have explained, by its id; needs --reason.")
@click.option("--reason", help="Why it is cleared, 1 to 500 characters.")
def reconcile(data_dir: Path, days: int, as_json: bool, cleared: object, reason: str | None) -> None:
    """Compare usage, revenue, settlements and the chain, which running services do by themselves.

    What does not add up is kept, and stops new settlements until it is cleared and settlement is resumed. Exit code 1
    when anything is open, or nobody could tell of something.
    """
    settings = read_settings(os.environ)
    if (cleared is None) != (reason is None) or (reason is not None and not 1 <= len(reason) <= REASON_MAX):
        fail(f"callora reconcile: --clear and --reason go together, and a reason has 1 to {REASON_MAX} characters", 2)

    async def run() -> int:
        from callora.reconciling import clear_one, compare_books, shown

        clock = SystemClock()
        with make_logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with database_url(settings, data_dir, shared=True) as dsn:
                if cleared is not None and reason is not None:
                    found = await clear_one(context, dsn, str(cleared), reason)
                    click.echo("cleared" if found else "nothing of this id waits to be cleared", err=not found)
                    return 0 if found else 1
                compared = await compare_books(context, dsn, timedelta(days=days))
        if as_json:
            click.echo(json.dumps(shown(compared), indent=2))
        elif compared.open:
            table = Table("class", "subject", "USDC", "finding", "id")
            for each in compared.open:
                amount = format_usdc(each.found.difference)
                table.add_row(each.found.kind, each.found.subject, amount, each.found.said, each.discrepancy_id)
            Console(width=240 if not sys.stdout.isatty() else None).print(table)
        if not as_json:
            untold = f"; of {compared.untold} nobody could tell" if compared.untold else ""
            click.echo(f"{len(compared.open)} discrepancies; asked the network of {compared.asked}{untold}")
        return 1 if compared.open or compared.untold else 0

    run_and_exit(run)
