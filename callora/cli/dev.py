"""Trying it out on one machine: everything in one process, or a sandbox ledger alone."""

import json
import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click
import trio

from callora.cli.database import apply_migrations, data_dir_option, database_url
from callora.cli.running import Stop, fail, make_logs, read_settings, run_and_exit, run_until_stopped, said_of
from callora.http.gateway.listener import open_listener
from callora.service import Context, Ledger, Serving, SystemClock, serve

if TYPE_CHECKING:
    from callora.demo import DevCredentials
    from callora.sandbox import SandboxPlan

LOOPBACK: Final = "127.0.0.1/32"


@click.command()
@data_dir_option
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
    if read_settings(environ).is_production:
        fail("callora dev is not for production: it makes a funded demo account. Use callora serve.", 2)
    if not os.environ.get("AUTH_SIGNING_SEED"):
        # Not before: in production it would need a domain, and that is not what is wrong with this command there.
        environ["AUTH_SIGNING_SEED"] = credentials.auth_signing_seed
    sandbox = None
    if not os.environ.get("SOROBAN_RPC_ENABLED"):
        sandbox = _dev_sandbox(data_dir, sandbox_port, credentials)
        environ |= sandbox.settings
    settings = read_settings(environ)
    clock = SystemClock()

    async def run() -> int:
        with make_logs(settings, clock) as logs:
            logs.capture_structlog()
            context = Context.make(settings, logs, clock)

            async def main(stop: Stop) -> int:
                async with AsyncExitStack() as stack:
                    dsn = await stack.enter_async_context(database_url(settings, data_dir, shared=False))
                    await apply_migrations(dsn, clock)
                    if sandbox is not None:
                        await stack.enter_async_context(sandbox.running(clock))
                    facts = attrs.asdict(sandbox.facts) if sandbox is not None else None
                    return await _serve_demo(context, dsn, data_dir, stop, facts, example=example, as_json=as_json)

            return await run_until_stopped(main)

    run_and_exit(run)


def _dev_sandbox(data_dir: Path, port: int, credentials: "DevCredentials") -> "SandboxPlan":
    from callora.demo import GRANT
    from callora.ledger.money import parse_usdc
    from callora.sandbox import DEV_CLOSE_SECONDS, SandboxPlan

    try:
        listener = open_listener("127.0.0.1", port, shared=False)
    except OSError as error:
        fail(f"callora: {said_of(error)}", 1)
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
    stop: Stop,
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


@click.command()
@data_dir_option
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
        async def main(stop: Stop) -> int:
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

        return await run_until_stopped(main)

    run_and_exit(run)
