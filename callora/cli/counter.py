"""The counter: deposits and withdrawals that wait for an operator, who has the owner's signature made elsewhere."""

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click
import trio
from rich.console import Console
from rich.table import Table

from callora.cli.database import data_dir_option, database_url
from callora.cli.running import make_logs, read_settings, run_and_exit
from callora.service import Context, SystemClock

if TYPE_CHECKING:
    from callora.chain_part import ChainPart

_SENT_SECONDS_MAX: Final = 120.0
"""How long a command waits for what it passed on to be in a ledger."""
_signed = click.option("--signed", help="What the owner signed, base64 XDR; - reads it from standard input.")


def _at_counter(work: "Callable[[ChainPart], Awaitable[int]]", data_dir: Path) -> NoReturn:
    """Run what an operator does about the chain, beside running services."""
    settings = read_settings(os.environ)
    clock = SystemClock()

    async def run() -> int:
        from callora.chain_part import open_counter
        from callora.service import Budget, chain_desk, open_ledger

        with make_logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with (
                database_url(settings, data_dir, shared=True) as dsn,
                open_ledger(context, dsn, Budget(settings.drain_timeout_seconds)) as ledger,
                open_counter(chain_desk(context, ledger)) as part,
            ):
                return await work(part)

    run_and_exit(run)


def _text(given: str) -> str:
    return sys.stdin.read().strip() if given == "-" else given


async def _tell_signing(part: "ChainPart", outcome: object) -> int:
    """Print what is to be signed, or wait for what was passed on and tell what became of it."""
    from callora.actors.treasury_answers import Admitted, Offered, Taken
    from callora.ledger.chain import Applied
    from callora.ledger.submission import Alive

    if isinstance(outcome, Offered):
        click.echo(outcome.envelope.xdr)
        click.echo(
            f"hash {outcome.envelope.hash}; sign it with the owner's key until {outcome.expires_at:%Y-%m-%d %H:%M} UTC,"
            " and give it back by --signed",
            err=True,
        )
        return 0
    if isinstance(outcome, Admitted):
        click.echo("admitted already")
        return 0
    if not isinstance(outcome, Taken):
        click.echo(_counter_refusal(outcome), err=True)
        return 1
    with trio.move_on_after(_SENT_SECONDS_MAX):
        while isinstance(became := await part.submitter.outcome(outcome.tx_hash), Alive | None):  # noqa: ASYNC110
            await trio.sleep(1)
        if isinstance(became, Applied) and became.successful:
            await part.treasury.depositors.look()
            click.echo(f"applied in ledger {became.ledger}")
            return 0
        click.echo(f"not applied: {became}", err=True)
        return 1
    click.echo(f"transaction {outcome.tx_hash} is sent and not in a ledger yet; running services follow it", err=True)
    return 1


def _counter_refusal(outcome: object) -> str:
    """Return a line for an operator: why nothing was done."""
    from callora.actors.treasury_answers import ContractRefuses, MayBePaid, NotAsked, NotOpen, NotTaken

    match outcome:
        case NotAsked():
            return "nobody has asked for this address"
        case ContractRefuses(reason):
            return f"the vault contract would refuse it: {reason}"
        case NotTaken(reason):
            return f"not sent: {reason}"
        case NotOpen():
            return "no withdrawal of this id waits to be paid"
        case MayBePaid():
            return "a payment of it may still be applied: ask again when the time to send it is over"
    raise AssertionError(outcome)


@click.group()
def depositors() -> None:
    """Who may deposit: list, admit and refuse addresses, where the key of the vault contract's owner is elsewhere."""


@depositors.command(name="list")
@data_dir_option
@click.option("--state", type=click.Choice(["asked", "admitted", "refused"]), help="Only these.")
def list_depositors_command(data_dir: Path, state: str | None) -> None:
    """List addresses that users want to deposit from, in the order in which they asked."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.store.bridge import open_database
        from callora.store.reads.chain import list_depositors

        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            found = await list_depositors(database, settings.stellar_network, state, None, 10_000)
        table = Table("address", "user", "state", "asked", "reason")
        for each in found:
            table.add_row(each.address, each.user_id, each.state, f"{each.asked_at:%Y-%m-%d %H:%M}", each.reason or "")
        Console(width=200 if not sys.stdout.isatty() else None).print(table)
        return 0

    run_and_exit(run)


@depositors.command(name="admit")
@data_dir_option
@click.argument("address")
@_signed
def admit_depositor_command(data_dir: Path, address: str, signed: str | None) -> None:
    """Print the transaction that admits an address, for the owner to sign offline; with --signed, send it."""

    async def work(part: "ChainPart") -> int:
        desk = part.treasury.depositors
        outcome = await desk.offer(address) if signed is None else await desk.take(address, _text(signed))
        return await _tell_signing(part, outcome)

    _at_counter(work, data_dir)


@depositors.command(name="refuse")
@data_dir_option
@click.argument("address")
@click.option("--reason", required=True, help="The user is told.")
def refuse_depositor_command(data_dir: Path, address: str, reason: str) -> None:
    """Refuse an address."""

    async def work(part: "ChainPart") -> int:
        refused = await part.treasury.depositors.refuse(address, reason)
        click.echo("refused" if refused else "nobody has asked for it, or it is refused already", err=not refused)
        return 0 if refused else 1

    _at_counter(work, data_dir)


@click.group()
def withdrawals() -> None:
    """Withdrawals that wait to be paid: list, pay and refuse them, where the key of the vault's owner is elsewhere."""


@withdrawals.command(name="list")
@data_dir_option
def list_withdrawals_command(data_dir: Path) -> None:
    """List withdrawals under way, the oldest first."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.ledger.money import format_usdc
        from callora.store.bridge import open_database
        from callora.store.reads.chain import open_withdrawals

        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            found = await open_withdrawals(database, settings.stellar_network, None, 10_000)
        table = Table("id", "user", "to", "USDC", "state", "asked")
        for each in found:
            table.add_row(
                each.withdrawal_id,
                each.user_id,
                each.address,
                format_usdc(each.amount),
                each.state,
                f"{each.asked_at:%Y-%m-%d %H:%M}",
            )
        Console(width=240 if not sys.stdout.isatty() else None).print(table)
        return 0

    run_and_exit(run)


@withdrawals.command(name="pay")
@data_dir_option
@click.argument("withdrawal_id", type=click.UUID)
@_signed
def pay_withdrawal_command(data_dir: Path, withdrawal_id: object, signed: str | None) -> None:
    """Print the payment of a withdrawal, for the owner to sign offline; with --signed, send it."""

    async def work(part: "ChainPart") -> int:
        desk, name = part.treasury.withdrawals, str(withdrawal_id)
        outcome = await desk.offer(name) if signed is None else await desk.take(name, _text(signed))
        return await _tell_signing(part, outcome)

    _at_counter(work, data_dir)


@withdrawals.command(name="refuse")
@data_dir_option
@click.argument("withdrawal_id", type=click.UUID)
@click.option("--reason", required=True, help="The user is told.")
def refuse_withdrawal_command(data_dir: Path, withdrawal_id: object, reason: str) -> None:
    """Give a withdrawal back to its vault instead of paying it."""

    async def work(part: "ChainPart") -> int:
        from callora.store.withdrawals import Withdrawal

        refused = await part.treasury.withdrawals.refuse(str(withdrawal_id), reason)
        if isinstance(refused, Withdrawal):
            click.echo("given back")
            return 0
        click.echo(_counter_refusal(refused), err=True)
        return 1

    _at_counter(work, data_dir)
