"""API keys, made, revoked and listed by an operator."""

import os
import sys
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from callora.cli.database import data_dir_option, database_url
from callora.cli.running import read_settings, run_and_exit
from callora.service import SystemClock


@click.group()
def keys() -> None:
    """Make, revoke and list API keys."""


@keys.command(name="create")
@data_dir_option
@click.option("--vault", "vault_id", type=click.UUID, required=True, help="The vault that its calls are paid from.")
@click.option("--name", default="", help="What it is for; at most 120 characters.")
@click.option("--scope", "scopes", multiple=True, default=("*",), show_default=True, help="May be repeated.")
@click.option("--rate-limit", type=click.IntRange(1, 2**31 - 1), help="Calls a minute. [default: the plan's]")
@click.option("--expires", type=click.DateTime(), help="When it ends, in UTC.")
def create_key(
    data_dir: Path,
    vault_id: object,
    name: str,
    scopes: tuple[str, ...],
    rate_limit: int | None,
    expires: datetime | None,
) -> None:
    """Make an API key and print it, once: only its hash is kept."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from datetime import UTC

        from callora.ledger.ids import ApiKeyId, Ids, VaultId
        from callora.ledger.keys import RANDOM_BYTES, make_key
        from callora.store.bridge import open_database
        from callora.store.keys import add_key, network_of

        clock = SystemClock()
        vault = VaultId(str(vault_id))
        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            network = await network_of(database, vault)
            if network is None:
                click.echo(f"--vault: there is no vault {vault}", err=True)
                return 1
            key = make_key(network, os.urandom(RANDOM_BYTES))
            api_key_id = ApiKeyId(Ids(clock, os.urandom).uuid7())
            await add_key(
                database,
                api_key_id=api_key_id,
                vault_id=vault,
                key=key,
                name=name,
                now=clock.now(),
                scopes=scopes,
                rate_limit_per_minute=rate_limit,
                expires_at=None if expires is None else expires.replace(tzinfo=UTC),
            )
        click.echo(key)
        click.echo(f"id {api_key_id}; this is the only time the key is shown", err=True)
        return 0

    run_and_exit(run)


@keys.command(name="revoke")
@data_dir_option
@click.argument("key")
def revoke_key(data_dir: Path, key: str) -> None:
    """Revoke the key with this id, or all with this 16-character prefix; every process obeys within a second."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.ledger.ids import Ids
        from callora.store.bridge import open_database
        from callora.store.keys import revoke_keys

        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            clock = SystemClock()
            revoked = await revoke_keys(database, key, clock.now(), Ids(clock, os.urandom).uuid7)
        for row in revoked:
            click.echo(f"revoked {row['api_key_id']} {row['prefix']}…")
        if not revoked:
            click.echo("no key has this id or prefix", err=True)
        return 0 if revoked else 1

    run_and_exit(run)


@keys.command(name="list")
@data_dir_option
@click.option("--vault", "vault_id", type=click.UUID, help="Only the keys of this vault.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
def list_keys_command(data_dir: Path, vault_id: object, limit: int) -> None:
    """List API keys, masked."""
    settings = read_settings(os.environ)

    async def run() -> int:
        from callora.ledger.ids import VaultId
        from callora.store.bridge import open_database
        from callora.store.keys import list_keys

        async with database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            rows = await list_keys(database, None if vault_id is None else VaultId(str(vault_id)), limit)
        table = Table("id", "key", "name", "vault", "network", "scopes", "state", "last used")
        for row in rows:
            state = "revoked" if row["revoked_at"] else "disabled" if row["disabled"] else "active"
            used = row["last_used_at"]
            table.add_row(
                str(row["api_key_id"]),
                f"{row['prefix']}…{row['last4']}",
                row["name"],
                str(row["vault_id"]),
                row["network"],
                " ".join(row["scopes"]),
                state,
                f"{used:%Y-%m-%d %H:%M}" if used else "never",
            )
        Console(width=200 if not sys.stdout.isatty() else None).print(table)
        return 0

    run_and_exit(run)
