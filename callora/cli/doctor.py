"""What is wrong with an installation, a line a check."""

import os
import sys
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.table import Table

from callora.cli.database import data_dir_option, database_url
from callora.cli.running import make_logs, run_and_exit
from callora.config.forms import RedisAddress
from callora.config.loading import ConfigurationInvalid, load_settings
from callora.config.settings import Settings
from callora.ledger.faults import CalloraFault
from callora.service import Context, SystemClock


@attrs.frozen
class _Line:
    name: str
    good: bool
    said: str


@click.command()
@data_dir_option
def doctor(data_dir: Path) -> None:
    """Check configuration, database and migrations, and audit the ledger; exit code 1 when something is wrong."""
    try:
        settings = load_settings(os.environ)
    except ConfigurationInvalid as error:
        _show([_Line("configuration", False, str(error))])
        sys.exit(1)

    async def run() -> int:
        lines = [_Line("configuration", True, settings.environment)]
        if settings.redis_address is not None:
            lines.append(await _examine_rate_store(settings.redis_address))
        async with database_url(settings, data_dir, shared=True) as dsn:
            lines += await _examine(dsn, settings)
            if settings.soroban_rpc_enabled:
                lines.append(await _examine_chain(dsn, settings))
        _show(lines)
        return 0 if all(line.good for line in lines) else 1

    run_and_exit(run)


async def _examine(dsn: str, settings: Settings) -> list[_Line]:
    from callora.store.audit import audit
    from callora.store.bridge import open_database
    from callora.store.migrate import pending

    async with open_database(dsn, connect_seconds=settings.db_conn_timeout_seconds) as database:
        try:
            await database.check()
        except CalloraFault as error:
            return [_Line("database", False, f"does not answer: {error}")]
        lines = [_Line("database", True, "answers")]
        missing = await pending(database)
        lines.append(_Line("migrations", not missing, f"missing: {', '.join(missing)}" if missing else "all applied"))
        if not missing:
            for finding in await audit(database, SystemClock().now()):
                said = "holds" if not finding.wrong else f"{finding.wrong} break it, such as {finding.example}"
                lines.append(_Line(finding.rule, not finding.wrong, said))
    return lines


async def _examine_rate_store(address: RedisAddress) -> _Line:
    from callora.store.pace import examine

    try:
        found = await examine(address)
    except CalloraFault as fault:
        return _Line("rate limits", False, f"REDIS_URL cannot be used: {fault}")
    if found.eviction is not None:
        return _Line("rate limits", False, f"{found.name} forgets limits when full: {found.eviction}, not noeviction")
    return _Line("rate limits", True, f"{found.name} answers in {found.answer_seconds * 1000:.1f} ms")


async def _examine_chain(dsn: str, settings: Settings) -> _Line:
    """Ask the contracts whether the keys are those they expect. Nothing is sent."""
    from callora.chain_part import examine
    from callora.service import Budget, chain_desk, open_ledger

    clock = SystemClock()
    with make_logs(settings, clock) as logs:
        context = Context.make(settings, logs, clock)
        async with open_ledger(context, dsn, Budget(settings.drain_timeout_seconds)) as ledger:
            try:
                return _Line("chain", True, await examine(chain_desk(context, ledger)))
            except CalloraFault as fault:
                return _Line("chain", False, str(fault))


def _show(lines: list[_Line]) -> None:
    table = Table("check", "", "finding")
    for line in lines:
        table.add_row(line.name, "ok" if line.good else "WRONG", line.said, style=None if line.good else "bold red")
    Console(width=140 if not sys.stdout.isatty() else None).print(table)
