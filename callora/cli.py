"""The commands. Each parses its arguments, builds what it needs and calls; nothing is decided here."""

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
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs
import click
import trio
from rich.console import Console
from rich.table import Table

from callora.config.forms import RedisAddress
from callora.config.loading import ConfigurationInvalid, load_settings
from callora.config.settings import Settings
from callora.http.gateway.listener import open_listener
from callora.ledger.faults import CalloraFault, ChainMismatch, leaves_of
from callora.ledger.money import format_usdc
from callora.logs import Logs
from callora.service import Context, Ledger, Serving, SystemClock, serve
from callora.store.bridge import StatementRejected

if TYPE_CHECKING:
    from callora.chain_part import ChainPart
    from callora.demo import DevCredentials
    from callora.sandbox import SandboxPlan

DATA_DIR: Final = Path(".callora")
LOOPBACK: Final = "127.0.0.1/32"
_DSN_FILE: Final = "database_url"
ROLLUP_SECONDS_MAX: Final = 600
ROLLUP_SPAN: Final = timedelta(days=1)
"""How much one database transaction counts, and how long it may take."""
REVENUE_SPAN: Final = timedelta(hours=1)
REASON_MAX: Final = 500

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
        _fail(f"callora: {_said(leaves[0])}", 2 if isinstance(leaves[0], ChainMismatch) else 1)
    sys.exit(code)


def _tellable(error: BaseException) -> bool:
    """Tell whether a line says enough of an error; of what else goes wrong the traceback is wanted."""
    if isinstance(error, StatementRejected):
        return error.of_older_schema
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
@click.option(
    "--sandbox-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="The sandbox ledger's. [default: the system's choice]",
)
@click.option("--example", type=click.Choice(["mana"]), help="Publish an example beside the demo API (README).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready, and everything else as errors.")
def dev(data_dir: Path, port: int | None, sandbox_port: int, example: str | None, as_json: bool) -> None:
    """Run everything on this machine: embedded PostgreSQL, a demo API with its upstream, a funded caller with a key.

    And a sandbox ledger in place of a Stellar network, unless SOROBAN_RPC_ENABLED says what to use.
    """
    from callora.demo import dev_credentials
    from callora.example_mana import ALIASES

    data_dir.mkdir(parents=True, exist_ok=True)
    credentials = dev_credentials(data_dir)
    allowed = os.environ.get("UPSTREAM_HOST_ALLOWLIST", "")
    secrets = {
        "ADMIN_API_KEY": credentials.admin_api_key,
        "JWT_SECRET": credentials.jwt_secret,
        "METRICS_API_KEY": credentials.metrics_api_key,
    }
    # Whoever tries it out looks at once.
    defaults = secrets | {"REVENUE_LEDGER_INDEXER_INTERVAL_MS": "2000"}
    environ = {
        **os.environ,
        **{name: value for name, value in defaults.items() if not os.environ.get(name)},
        "UPSTREAM_HOST_ALLOWLIST": f"{allowed},{LOOPBACK}" if allowed else LOOPBACK,
    }
    if port is not None:
        environ["PORT"] = str(port)
    if example is not None and not os.environ.get("CALL_ALIASES"):
        environ["CALL_ALIASES"] = ",".join(f"{prefix}={target}" for prefix, target in ALIASES.items())
    if _settings(environ).is_production:
        _fail("callora dev is not for production: it makes a funded demo account. Use callora serve.", 2)
    if not os.environ.get("AUTH_SIGNING_SEED"):
        # Not before: in production it would need a domain, and that is not what is wrong with this command there.
        environ["AUTH_SIGNING_SEED"] = credentials.auth_signing_seed
    sandbox = None
    if not os.environ.get("SOROBAN_RPC_ENABLED"):
        sandbox = _dev_sandbox(data_dir, sandbox_port, credentials)
        environ |= sandbox.settings
    settings = _settings(environ)
    clock = SystemClock()

    async def run() -> int:
        with _logs(settings, clock) as logs:
            logs.capture_structlog()
            context = Context.make(settings, logs, clock)

            async def main(stop: _Stop) -> int:
                async with AsyncExitStack() as stack:
                    dsn = await stack.enter_async_context(_database_url(settings, data_dir, shared=False))
                    await _migrate(dsn, clock)
                    if sandbox is not None:
                        await stack.enter_async_context(sandbox.running(clock))
                    facts = attrs.asdict(sandbox.facts) if sandbox is not None else None
                    return await _serve_demo(context, dsn, data_dir, stop, facts, example=example, as_json=as_json)

            return await _run_until_stopped(main)

    _run(run)


def _dev_sandbox(data_dir: Path, port: int, credentials: "DevCredentials") -> "SandboxPlan":
    from callora.demo import GRANT
    from callora.ledger.money import parse_usdc
    from callora.sandbox import DEV_CLOSE_SECONDS, SandboxPlan

    try:
        listener = open_listener("127.0.0.1", port, shared=False)
    except OSError as error:
        _fail(f"callora: {_said(error)}", 1)
    keys = credentials.chain_settings()
    return SandboxPlan.make(
        listener,
        data_dir,
        DEV_CLOSE_SECONDS,
        keys,
        trusting=[credentials.developer_wallet_seed],
        opening=parse_usdc(GRANT),
    )


async def _serve_demo(
    context: Context,
    dsn: str,
    data_dir: Path,
    stop: _Stop,
    sandbox: dict[str, str] | None,
    *,
    example: str | None,
    as_json: bool,
) -> int:
    from callora.demo import Demo, demo_token, dev_credentials, ensure_demo
    from callora.demo_upstream import serve_demo_upstream
    from callora.example_mana import ensure_mana, make_mana

    credentials = dev_credentials(data_dir)
    async with trio.open_nursery() as nursery:
        upstream_url = await nursery.start(serve_demo_upstream)
        mana_url = None
        if example == "mana":
            mana_url = await nursery.start(partial(serve_demo_upstream, make_app=make_mana))
        demo: Demo

        async def prepare(ledger: Ledger) -> None:
            # Before calls are taken: the upstream is elsewhere since the last start, and calls to where it was would
            # open its breaker.
            nonlocal demo
            demo = await ensure_demo(context, ledger, credentials, upstream_url)
            if mana_url is not None:
                await ensure_mana(context, ledger, demo, mana_url)

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
                    "wallet": demo.developer_wallet,
                    "wallet_seed": credentials.developer_wallet_seed,
                    "api_id": demo.api_id,
                    "api_slug": "weather-api",
                    "token": developer_token,
                },
                "sandbox": sandbox,
            }
            welcome = _welcome(serving.url, credentials.consumer_api_key, consumer_token, sandbox, example)
            click.echo(json.dumps(facts) if as_json else welcome)

        code = await serve(context, dsn, stop.as_drain(), prepare=prepare, on_ready=show)
        nursery.cancel_scope.cancel()
    return code


def _welcome(url: str, key: str, token: str, sandbox: dict[str, str] | None, example: str | None) -> str:
    mana = chain = ""
    if example == "mana":
        mana = f"""
The example: three APIs with rate cards, paid by the plan's credits; X-Callora-Credits says how many:
  curl -i -H 'X-Api-Key: {key}' -d '{{"query":"tides"}}' '{url}/v1/search'
  curl -i -H 'X-Api-Key: {key}' -d '{{"urls":["a","b","c"]}}' '{url}/v1/extract/bulk'
  curl -i -H 'X-Api-Key: {key}' -F 'file=@sound.wav' '{url}/v1/stt/transcribe'
  curl -H 'X-Api-Key: {key}' -d '{{"text":"ahoy","format":"wav"}}' -o ahoy.wav '{url}/v1/tts/synthesize'
"""
    if sandbox is not None:
        chain = f"""
A sandbox ledger stands in for Stellar (RPC {sandbox["rpc_url"]}, Horizon {sandbox["horizon_url"]}). What it is:
  curl {sandbox["horizon_url"]}/sandbox
"""
    return f"""
Callora is ready at {url}

A paid call (0.01 USDC); the headers show what it cost and what is left:
  curl -i -H 'X-Api-Key: {key}' '{url}/v1/call/weather-api/current'

A dearer one, a body, and one whose retry costs nothing:
  curl -i -H 'X-Api-Key: {key}' '{url}/v1/call/weather-api/forecast?days=3'
  curl -i -H 'X-Api-Key: {key}' -d '{{"unit":"celsius"}}' '{url}/v1/call/weather-api/reports/berlin'
  curl -i -H 'X-Api-Key: {key}' -H 'Idempotency-Key: first-order' -X POST '{url}/v1/call/weather-api/reports/oslo'
{mana}
The same caller on the dashboard's REST ({url}/api/docs), for a day:
  curl -H 'Authorization: Bearer {token}' '{url}/api/auth/sessions'

Health and metrics:
  curl {url}/api/health
  curl {url}/api/metrics
{chain}
Ctrl-C drains and stops. The next start keeps the data.
"""


@main.command()
@_data_dir
@click.option("--host", default="127.0.0.1", show_default=True, help="Whoever reaches it may do everything in it.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: the system chooses.")
@click.option(
    "--close-seconds",
    type=click.FloatRange(0, 3600),
    default=5.0,
    show_default=True,
    help="How often a ledger closes; 0 for only by POST /sandbox/close.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def sandbox(data_dir: Path, host: str, port: int, close_seconds: float, as_json: bool) -> None:
    """Serve a sandbox ledger alone: a stand-in for a Stellar network, for tests and first steps (docs/sandbox.md)."""
    from callora.demo import dev_credentials
    from callora.sandbox import NOTICE, SandboxPlan

    data_dir.mkdir(parents=True, exist_ok=True)
    credentials = dev_credentials(data_dir)

    async def run() -> int:
        async def main(stop: _Stop) -> int:
            listener = open_listener(host, port, shared=False)
            keys, trusting = credentials.chain_settings(), [credentials.developer_wallet_seed]
            plan = SandboxPlan.make(listener, data_dir, close_seconds or None, keys, trusting=trusting)
            async with plan.running(SystemClock()):
                facts = attrs.asdict(plan.facts)
                if as_json:
                    click.echo(json.dumps(facts))
                else:
                    click.echo("\n".join([NOTICE, *(f"  {name:24}{value}" for name, value in facts.items())]))
                await stop.as_drain().wait()
            return 0

        return await _run_until_stopped(main)

    _run(run)


def _one_in(name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.IntRange(0), default=0, show_default=True, help=f"One snapshot in N {what}.")


@main.command(name="exporter-sim")
@click.option("--port", type=click.IntRange(0, 65535), default=8082, show_default=True, help="0: the system chooses.")
@click.option("--token", envvar="EXPORTER_SIM_TOKEN", required=True, help="What readers present as a Bearer token.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same counters.")
@click.option("--node-id", default="sim-1", show_default=True)
@click.option("--env", default="dev", show_default=True)
@click.option("--subjects", type=click.IntRange(1, 100_000), default=10, show_default=True)
@click.option(
    "--interval", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds between snapshots."
)
@click.option(
    "--minutes", type=click.IntRange(0), default=10, show_default=True, help="How long ago its counters were 0."
)
@_one_in("--resets", "finds a subject's counters begun anew")
@_one_in("--restarts", "finds all counters begun anew")
@_one_in("--gaps", "is never taken")
@_one_in("--late", "is seen three intervals late")
@_one_in("--duplicates", "comes twice")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def exporter_sim(port: int, token: str, interval: float, minutes: int, as_json: bool, **plan_fields: Any) -> None:
    """Serve a reference exporter on this machine: made-up counters to collect, and at /truth what they come to."""
    from callora.demo_upstream import serve_demo_upstream
    from callora.exporter_sim import SimNode, SimPlan, make_exporter, whole_minutes_ago

    clock = SystemClock()
    plan = SimPlan(began_at=whole_minutes_ago(clock.now(), minutes), interval_seconds=interval, **plan_fields)

    async def run() -> int:
        async def main(stop: _Stop) -> int:
            async with trio.open_nursery() as nursery:
                make_app = partial(make_exporter, plan, clock, token)
                url = await nursery.start(partial(serve_demo_upstream, make_app=make_app, port=port))
                subjects = SimNode(plan).subjects
                facts = {"url": url, "node_id": plan.node_id, "env": plan.env, "subjects": subjects}
                click.echo(
                    json.dumps(facts) if as_json else f"{plan.node_id} ({plan.env}) at {url}\n" + "\n".join(subjects)
                )
                await stop.as_drain().wait()
                nursery.cancel_scope.cancel()
            return 0

        return await _run_until_stopped(main)

    _run(run)


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
        from callora.ledger.ids import Ids
        from callora.store.bridge import open_database
        from callora.store.keys import revoke_keys

        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            clock = SystemClock()
            revoked = await revoke_keys(database, key, clock.now(), Ids(clock, os.urandom).uuid7)
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


_SENT_SECONDS_MAX: Final = 120.0
"""How long a command waits for what it passed on to be in a ledger."""
_signed = click.option("--signed", help="What the owner signed, base64 XDR; - reads it from standard input.")


def _at_counter(work: "Callable[[ChainPart], Awaitable[int]]", data_dir: Path) -> NoReturn:
    """Run what an operator does about the chain, beside running services."""
    settings = _settings(os.environ)
    clock = SystemClock()

    async def run() -> int:
        from callora.chain_part import open_counter
        from callora.service import Budget, chain_desk, open_ledger

        with _logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with (
                _database_url(settings, data_dir, shared=True) as dsn,
                open_ledger(context, dsn, Budget(settings.drain_timeout_seconds)) as ledger,
                open_counter(chain_desk(context, ledger)) as part,
            ):
                return await work(part)

    _run(run)


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


@main.group()
def depositors() -> None:
    """Who may deposit: list, admit and refuse addresses, where the key of the vault contract's owner is elsewhere."""


@depositors.command(name="list")
@_data_dir
@click.option("--state", type=click.Choice(["asked", "admitted", "refused"]), help="Only these.")
def list_depositors_command(data_dir: Path, state: str | None) -> None:
    """List addresses that users want to deposit from, in the order in which they asked."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.store.bridge import open_database
        from callora.store.reads.chain import list_depositors

        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            found = await list_depositors(database, settings.stellar_network, state, None, 10_000)
        table = Table("address", "user", "state", "asked", "reason")
        for each in found:
            table.add_row(each.address, each.user_id, each.state, f"{each.asked_at:%Y-%m-%d %H:%M}", each.reason or "")
        Console(width=200 if not sys.stdout.isatty() else None).print(table)
        return 0

    _run(run)


@depositors.command(name="admit")
@_data_dir
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
@_data_dir
@click.argument("address")
@click.option("--reason", required=True, help="The user is told.")
def refuse_depositor_command(data_dir: Path, address: str, reason: str) -> None:
    """Refuse an address."""

    async def work(part: "ChainPart") -> int:
        refused = await part.treasury.depositors.refuse(address, reason)
        click.echo("refused" if refused else "nobody has asked for it, or it is refused already", err=not refused)
        return 0 if refused else 1

    _at_counter(work, data_dir)


@main.group()
def withdrawals() -> None:
    """Withdrawals that wait to be paid: list, pay and refuse them, where the key of the vault's owner is elsewhere."""


@withdrawals.command(name="list")
@_data_dir
def list_withdrawals_command(data_dir: Path) -> None:
    """List withdrawals under way, the oldest first."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.ledger.money import format_usdc
        from callora.store.bridge import open_database
        from callora.store.reads.chain import open_withdrawals

        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
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

    _run(run)


@withdrawals.command(name="pay")
@_data_dir
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
@_data_dir
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


SETTLE_SECONDS_MAX: Final = 300.0


@main.command()
@_data_dir
@click.option("--now", "at_once", is_flag=True, required=True, help="Do not wait for SETTLEMENT_INTERVAL_MS.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(1, 86_400), default=SETTLE_SECONDS_MAX, show_default=True)
def settle(data_dir: Path, at_once: bool, wait_seconds: float) -> None:
    """Pay developers what they have earned up to now: a running service is asked to; where none runs, this does it.

    Exit code 0 when everything under way has ended and nothing failed, else 1.
    """
    settings = _settings(os.environ)
    clock = SystemClock()

    async def run() -> int:
        from callora.settling import settle_now

        with _logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with _database_url(settings, data_dir, shared=True) as dsn:
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


@main.group()
def settlements() -> None:
    """What became of payments to developers where only an operator can decide."""


@settlements.command(name="release")
@_data_dir
@click.argument("settlement_id", type=click.UUID)
@click.option("--reason", required=True, help="The developers are told.")
def release_settlement_command(data_dir: Path, settlement_id: object, reason: str) -> None:
    """Say that a settlement's charge is lost with a history that is over: its revenue is settled anew.

    Refused unless the network has begun another history. Where the charge was real, this pays developers twice.
    """
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.ledger.ids import Ids
        from callora.store import settlements as store
        from callora.store.bridge import open_database

        clock = SystemClock()
        async with _database_url(settings, data_dir, shared=True) as dsn, open_database(dsn) as database:
            found = await store.find(database, str(settlement_id))
            new_id = Ids(clock, os.urandom).uuid7
            done = found is not None and await store.fail(database, found, reason, new_id, clock.now(), lost=True)
        click.echo("released" if done else "there is none that can be released by this id", err=not done)
        return 0 if done else 1

    _run(run)


@main.command()
@_data_dir
@click.option("--rebuild", is_flag=True, help="Look at every call again; what is missing is added, nothing is changed.")
def revenue(data_dir: Path, rebuild: bool) -> None:
    """Index the revenue of developers up to now, which running services do by themselves."""
    settings = _settings(os.environ)

    async def run() -> int:
        from callora.store import revenue as entries
        from callora.store.bridge import open_database

        clock = SystemClock()
        async with (
            _database_url(settings, data_dir, shared=True) as dsn,
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

    _run(run)


DAYS: Final = 7


@main.command()
@_data_dir
@click.option("--days", type=click.IntRange(1, 3660), default=DAYS, show_default=True, help="How far back to look.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--clear", "cleared", type=click.UUID, help="Clear what you have explained, by its id; needs --reason.")
@click.option("--reason", help="Why it is cleared, 1 to 500 characters.")
def reconcile(data_dir: Path, days: int, as_json: bool, cleared: object, reason: str | None) -> None:
    """Compare usage, revenue, settlements and the chain, which running services do by themselves.

    What does not add up is kept, and stops new settlements until it is cleared and settlement is resumed. Exit code 1
    when anything is open, or nobody could tell of something.
    """
    settings = _settings(os.environ)
    if (cleared is None) != (reason is None) or (reason is not None and not 1 <= len(reason) <= REASON_MAX):
        _fail(f"callora reconcile: --clear and --reason go together, and a reason has 1 to {REASON_MAX} characters", 2)

    async def run() -> int:
        from callora.reconciling import clear_one, compare_books, shown

        clock = SystemClock()
        with _logs(settings, clock) as logs:
            context = Context.make(settings, logs, clock)
            async with _database_url(settings, data_dir, shared=True) as dsn:
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
        if settings.redis_address is not None:
            lines.append(await _examine_rate_store(settings.redis_address))
        async with _database_url(settings, data_dir, shared=True) as dsn:
            lines += await _examine(dsn, settings)
            if settings.soroban_rpc_enabled:
                lines.append(await _examine_chain(dsn, settings))
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
    with _logs(settings, clock) as logs:
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


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure every lane against nginx on this machine; needs a source checkout, wrk and nginx."""
    if find_spec("bench") is None:
        _fail("callora bench: run it at the root of a source checkout, where the bench package is", 2)
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments])  # noqa: S606 - our own module
