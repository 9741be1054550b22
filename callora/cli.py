"""The commands. Each parses its arguments, builds what it needs and calls; nothing is decided here."""

import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NoReturn

import attrs
import click
import trio
from rich.console import Console
from rich.table import Table

from callora.config import ConfigurationInvalid, Settings, load_settings
from callora.http.gateway.listener import open_listener
from callora.ledger.faults import CalloraFault, leaves_of
from callora.logs import Logs
from callora.service import Context, Ledger, Serving, SystemClock, serve
from callora.store.bridge import StatementRejected

DATA_DIR: Final = Path(".callora")
LOOPBACK: Final = "127.0.0.1/32"
_DSN_FILE: Final = "database_url"
ROLLUP_SECONDS_MAX: Final = 600
ROLLUP_SPAN: Final = timedelta(days=1)
"""How much one database transaction counts, and how long it may take."""
_UNDEFINED_TABLE: Final = "42P01"
_GC_THRESHOLDS: Final = (50_000, 20, 100)
"""Young objects are collected seldom and old ones hardly ever: calls make no cycles, and a full pass stops them all."""

_data_dir = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DATA_DIR,
    show_default=True,
    help="Where the embedded PostgreSQL keeps its data when no database is configured.",
)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def _settings(environ: Mapping[str, str]) -> Settings:
    try:
        return load_settings(environ)
    except ConfigurationInvalid as error:
        _fail(f"The configuration is invalid:\n{error}", 2)


def _logs(settings: Settings, clock: SystemClock) -> Logs:
    return Logs(clock, level=settings.log_level, as_json=settings.is_production)


def _run(main: Callable[[], Awaitable[int]]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to clean up
    try:
        code = trio.run(main)
    except Exception as raised:  # not `except*`: leaving the process from there raises a group on Python 3.11.2
        leaves = list(leaves_of(raised))
        if not all(map(_tellable, leaves)):
            raise
        _fail(f"callora: {_said(leaves[0])}", 1)
    sys.exit(code)


def _tellable(error: BaseException) -> bool:
    """Tell whether a line says enough of an error; of what else goes wrong the traceback is wanted."""
    if isinstance(error, StatementRejected):
        return error.sqlstate == _UNDEFINED_TABLE
    return isinstance(error, CalloraFault | OSError)


def _said(error: BaseException) -> str:
    """Return what to tell of an error; without its number where it is the system's and says all by itself."""
    if isinstance(error, StatementRejected):
        return "the database has no schema yet, or an older one: run callora migrate"
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


class _Stop:
    """What SIGTERM and SIGINT do: before calls are taken they end the start, from then on they begin the drain."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.starting = trio.CancelScope()
        self.started = False

    def now(self) -> None:
        """Stop; called again, it joins the stop under way."""
        self.event.set()
        if not self.started:
            self.starting.cancel()

    def as_drain(self) -> trio.Event:
        """Return the event that begins the drain; from here on stopping cancels nothing."""
        self.started = True
        return self.event


async def _run_until_stopped(main: Callable[[_Stop], Awaitable[int]], *, until_stdin_ends: bool = False) -> int:
    """Run what SIGTERM and SIGINT can stop, and return its exit code; 0 where it was stopped before it took calls.

    Args:
        until_stdin_ends: whether the end of our standard input, a pipe that our parent holds open, stops it as well.
    """
    stop = _Stop()
    code = 0
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for _ in signals:
                    stop.now()

            async def outlive() -> None:
                await trio.lowlevel.wait_readable(sys.stdin.fileno())
                stop.now()

            nursery.start_soon(listen)
            if until_stdin_ends:
                nursery.start_soon(outlive)
            with stop.starting:
                code = await main(stop)
            nursery.cancel_scope.cancel()
    return code


@asynccontextmanager
async def _database_url(settings: Settings, data_dir: Path, *, shared: bool) -> AsyncIterator[str]:
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


async def _migrate(dsn: str, clock: SystemClock) -> list[str]:
    from callora.store.bridge import open_database
    from callora.store.migrate import migrate_up
    from callora.store.usage import ensure_partitions

    async with open_database(dsn) as database:
        applied = await migrate_up(database)
        await ensure_partitions(database, clock.now())
        return applied


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Callora: prepaid, pay-per-call API access. Every setting is an environment variable (docs/configuration.md)."""


@main.command(name="serve")
@_data_dir
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes on one port.")
@click.option("--shared-port", is_flag=True, hidden=True, help="Let other processes listen on this port as well.")
@click.option("--until-stdin-ends", is_flag=True, hidden=True, help="Drain when standard input ends: with the parent.")
def serve_command(data_dir: Path, workers: int, shared_port: bool, until_stdin_ends: bool) -> None:
    """Serve calls until SIGTERM, then drain: exit code 0 when every accepted call ended, 1 when some had to be cut."""
    settings = _settings(os.environ)
    if workers > 1 and settings.port == 0:
        _fail("--workers: needs a PORT other than 0, which all of them share", 2)
    gc.set_threshold(*_GC_THRESHOLDS)
    clock = SystemClock()

    async def run() -> int:
        with _logs(settings, clock) as logs:
            logs.capture_structlog()

            async def main(stop: _Stop) -> int:
                if workers > 1:
                    # Workers share the port with whoever asks for that: one in use has to be noticed before.
                    open_listener(settings.host, settings.port, shared=False).close()
                async with _database_url(settings, data_dir, shared=False) as dsn:
                    if settings.database_dsn is None:
                        await _migrate(dsn, clock)
                    if workers > 1:
                        return await _run_workers(dsn, workers, stop, logs)
                    context = Context.make(settings, logs, clock)
                    return await serve(context, dsn, stop.as_drain(), shared_port=shared_port)

            return await _run_until_stopped(main, until_stdin_ends=until_stdin_ends)

    _run(run)


async def _run_workers(dsn: str, count: int, stop: _Stop, logs: Logs) -> int:
    from callora.workers import run_workers

    environ = {**os.environ, "DATABASE_URL": dsn}
    arguments = ["serve", "--shared-port", "--until-stdin-ends"]
    return await run_workers(count, arguments, environ, stop.as_drain(), logs.logger("workers"))


@main.command()
@_data_dir
@click.option(
    "--port", type=click.IntRange(0, 65535), help="The port; 0 lets the system choose. [default: PORT or 3000]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready, and everything else as errors.")
def dev(data_dir: Path, port: int | None, as_json: bool) -> None:
    """Run everything on this machine: embedded PostgreSQL, a demo API with its upstream, a funded caller with a key."""
    from callora.demo import dev_credentials

    data_dir.mkdir(parents=True, exist_ok=True)
    credentials = dev_credentials(data_dir)
    allowed = os.environ.get("UPSTREAM_HOST_ALLOWLIST", "")
    secrets = {
        "ADMIN_API_KEY": credentials.admin_api_key,
        "JWT_SECRET": credentials.jwt_secret,
        "METRICS_API_KEY": credentials.metrics_api_key,
    }
    environ = {
        **os.environ,
        **{name: value for name, value in secrets.items() if not os.environ.get(name)},
        "UPSTREAM_HOST_ALLOWLIST": f"{allowed},{LOOPBACK}" if allowed else LOOPBACK,
    }
    if port is not None:
        environ["PORT"] = str(port)
    if _settings(environ).is_production:
        _fail("callora dev is not for production: it makes a funded demo account. Use callora serve.", 2)
    if not os.environ.get("AUTH_SIGNING_SEED"):
        # Not before: in production it would need a domain, and that is not what is wrong with this command there.
        environ["AUTH_SIGNING_SEED"] = credentials.auth_signing_seed
    settings = _settings(environ)
    gc.set_threshold(*_GC_THRESHOLDS)
    clock = SystemClock()

    async def run() -> int:
        with _logs(settings, clock) as logs:
            logs.capture_structlog()
            context = Context.make(settings, logs, clock)

            async def main(stop: _Stop) -> int:
                async with _database_url(settings, data_dir, shared=False) as dsn:
                    await _migrate(dsn, clock)
                    return await _serve_demo(context, dsn, data_dir, stop, as_json=as_json)

            return await _run_until_stopped(main)

    _run(run)


async def _serve_demo(context: Context, dsn: str, data_dir: Path, stop: _Stop, *, as_json: bool) -> int:
    from callora.demo import Demo, demo_token, dev_credentials, ensure_demo
    from callora.demo_upstream import serve_demo_upstream

    credentials = dev_credentials(data_dir)
    async with trio.open_nursery() as nursery:
        upstream_url = await nursery.start(serve_demo_upstream)
        demo: Demo

        async def prepare(ledger: Ledger) -> None:
            # Before calls are taken: the upstream is elsewhere since the last start, and calls to where it was would
            # open its breaker.
            nonlocal demo
            demo = await ensure_demo(context, ledger, credentials, upstream_url)

        async def show(serving: Serving) -> None:
            consumer_token = await demo_token(context, serving.ledger, demo.consumer_id)
            developer_token = await demo_token(context, serving.ledger, demo.developer_user_id)
            facts = {
                "url": serving.url,
                "pid": os.getpid(),
                "database_url": dsn,
                "data_dir": str(data_dir.absolute()),
                "upstream_url": upstream_url,
                "admin_api_key": credentials.admin_api_key,
                "consumer": {
                    "user_id": demo.consumer_id,
                    "api_key": credentials.consumer_api_key,
                    "vault_id": demo.vault_id,
                    "token": consumer_token,
                },
                "developer": {
                    "user_id": demo.developer_user_id,
                    "api_id": demo.api_id,
                    "api_slug": "weather-api",
                    "token": developer_token,
                },
            }
            welcome = _welcome(serving.url, credentials.consumer_api_key, consumer_token)
            click.echo(json.dumps(facts) if as_json else welcome)

        code = await serve(context, dsn, stop.as_drain(), prepare=prepare, on_ready=show)
        nursery.cancel_scope.cancel()
    return code


def _welcome(url: str, key: str, token: str) -> str:
    return f"""
Callora is ready at {url}

A paid call (0.01 USDC); the headers show what it cost and what is left:
  curl -i -H 'X-Api-Key: {key}' '{url}/v1/call/weather-api/current'

A dearer one, a body, and one whose retry costs nothing:
  curl -i -H 'X-Api-Key: {key}' '{url}/v1/call/weather-api/forecast?days=3'
  curl -i -H 'X-Api-Key: {key}' -d '{{"unit":"celsius"}}' '{url}/v1/call/weather-api/reports/berlin'
  curl -i -H 'X-Api-Key: {key}' -H 'Idempotency-Key: first-order' -X POST '{url}/v1/call/weather-api/reports/oslo'

The same caller on the dashboard's REST ({url}/api/docs), for a day:
  curl -H 'Authorization: Bearer {token}' '{url}/api/auth/sessions'

Health and metrics:
  curl {url}/api/health
  curl {url}/api/metrics

Ctrl-C drains and stops. The next start keeps the data.
"""


@main.command()
@_data_dir
@click.option("--down-to", type=click.IntRange(0), help="Take back every migration above this number.")
@click.option("--status", is_flag=True, help="Only list what is missing.")
def migrate(data_dir: Path, down_to: int | None, status: bool) -> None:
    """Bring the database's schema up to this version, under a lock; or take migrations back."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.store.bridge import open_database
        from callora.store.migrate import migrate_down, pending

        async with _database_url(settings, data_dir, shared=True) as dsn:
            if status or down_to is not None:
                async with open_database(dsn) as database:
                    names = await pending(database) if down_to is None else await migrate_down(database, target=down_to)
                verb = "missing" if down_to is None else "taken back"
            else:
                names, verb = await _migrate(dsn, SystemClock()), "applied"
        click.echo("\n".join(f"{verb} {name}" for name in names) or f"nothing {verb}")
        return 0

    _run(run)


@main.group()
def keys() -> None:
    """Make, revoke and list API keys."""


@keys.command(name="create")
@_data_dir
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
    settings = _settings(os.environ)

    async def run() -> int:
        from datetime import UTC

        from callora.ledger.ids import ApiKeyId, Ids, VaultId
        from callora.ledger.keys import RANDOM_BYTES, make_key
        from callora.store.bridge import open_database
        from callora.store.keys import add_key, network_of

        clock = SystemClock()
        vault = VaultId(str(vault_id))
        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
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

    _run(run)


@keys.command(name="revoke")
@_data_dir
@click.argument("key")
def revoke_key(data_dir: Path, key: str) -> None:
    """Revoke the key with this id, or all with this 16-character prefix; every process obeys within a second."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.store.bridge import open_database
        from callora.store.keys import revoke_keys

        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            revoked = await revoke_keys(database, key, SystemClock().now())
        for row in revoked:
            click.echo(f"revoked {row['api_key_id']} {row['prefix']}…")
        if not revoked:
            click.echo("no key has this id or prefix", err=True)
        return 0 if revoked else 1

    _run(run)


@keys.command(name="list")
@_data_dir
@click.option("--vault", "vault_id", type=click.UUID, help="Only the keys of this vault.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
def list_keys_command(data_dir: Path, vault_id: object, limit: int) -> None:
    """List API keys, masked."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.ledger.ids import VaultId
        from callora.store.bridge import open_database
        from callora.store.keys import list_keys

        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
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

    _run(run)


@main.command()
@_data_dir
@click.option("--rebuild", is_flag=True, help="Forget every sum and count anew; sums grow back meanwhile.")
def rollup(data_dir: Path, rebuild: bool) -> None:
    """Add usage up to now, which running services do by themselves; tell how far the sums are."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.store import rollup as sums
        from callora.store.bridge import open_database

        def tell(made: sums.Pass) -> None:
            if made.behind:
                click.echo(f"counted until {made.as_of:%Y-%m-%d %H:%M}", err=True)

        clock = SystemClock()
        async with (
            _database_url(settings, data_dir, shared=True) as dsn,
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

    _run(run)


@attrs.frozen
class _Line:
    name: str
    good: bool
    said: str


@main.command()
@_data_dir
def doctor(data_dir: Path) -> None:
    """Check configuration, database and migrations, and audit the ledger; exit code 1 when something is wrong."""
    try:
        settings = load_settings(os.environ)
    except ConfigurationInvalid as error:
        _show([_Line("configuration", False, str(error))])
        sys.exit(1)

    async def run() -> int:
        lines = [_Line("configuration", True, settings.environment)]
        async with _database_url(settings, data_dir, shared=True) as dsn:
            lines += await _examine(dsn, settings)
        _show(lines)
        return 0 if all(line.good for line in lines) else 1

    _run(run)


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


def _show(lines: list[_Line]) -> None:
    table = Table("check", "", "finding")
    for line in lines:
        table.add_row(line.name, "ok" if line.good else "WRONG", line.said, style=None if line.good else "bold red")
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure every lane against nginx on this machine; needs a source checkout, wrk and nginx."""
    if find_spec("bench") is None:
        _fail("callora bench: run it at the root of a source checkout, where the bench package is", 2)
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments])  # noqa: S606 - our own module
