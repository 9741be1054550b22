"""What every lane stands on: tools, a directory, PostgreSQL and the upstream; and how gateways are put on top of it.

Each gateway has a database of its own in the one server, so that no lane's background work touches another's tables.
"""

import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

import attrs
import trio

from bench import naive
from bench.audit import Books, Traffic, complaints, read_books
from bench.load import Target, write_keys
from bench.machine import (
    GATEWAY_CORE,
    LOAD_CORE,
    BenchError,
    Child,
    all_cores,
    environment,
    free_port,
    move,
    running,
    tree,
    until_ready,
)
from bench.nginx import Nginx, upstream
from bench.postgres import Postgres, postgres
from bench.seed import seed_bench
from callora.ledger.money import parse_usdc

ROOT: Final = Path(__file__).resolve().parent.parent
PRICE_USDC: Final = "0.0001"
BALANCE_USDC: Final = "1000000"
"""Enough for ten thousand million calls: no run is ever refused for lack of money."""

GatewayLane = Literal["proxy", "limits", "paid"]

_LIMITLESS: Final = {
    "APP_ENV": "development",
    "LOG_LEVEL": "warning",
    "UPSTREAM_HOST_ALLOWLIST": "127.0.0.1/32",
    "UPSTREAM_POOL_MAX": "1024",
    "GATEWAY_RATE_LIMIT_MAX_REQUESTS": "1000000000",
    "RATE_LIMIT_MAX_REQUESTS": "1000000000",
    "KEY_MAX_CONCURRENCY_PER_KEY": "100000",
}
"""Settings of every gateway: limits are checked on each call and never reached."""


@attrs.frozen
class Tenant:
    """A migrated database with an API in front of the upstream and funded callers."""

    dsn: str
    path: str
    """The priced call."""
    api_keys: list[str]
    """One for each vault."""
    keys: Path
    """File of the API keys."""
    vault_ids: list[str]


@attrs.frozen
class Gateway:
    """A running gateway: `callora serve`, or one of `bench.gateway`."""

    child: Child
    port: int
    tenant: Tenant

    @property
    def target(self) -> Target:
        """The call its callers make."""
        return Target(self.port, self.tenant.path, self.tenant.keys)


@attrs.frozen
class Stack:
    """The parts all lanes share."""

    tools: dict[str, str]
    """Path of each tool."""
    directory: Path
    """For everything that is written; gone when the run ends."""
    postgres: Postgres
    upstream: Nginx

    async def tenant(
        self, name: str, *, vaults: int, upstream_port: int | None = None, limited: bool = False
    ) -> Tenant:
        """Make a database with this many funded vaults, a key each, and one priced endpoint before the upstream.

        Args:
            limited: every key and vault has spending limits, and a plan that is asked on each call.
        """
        dsn = await self.postgres.create(f"bench_{name}")
        argv = [sys.executable, "-m", "callora", "migrate"]
        done = await trio.run_process(
            argv, cwd=ROOT, env=environment(_settings(dsn)), capture_stdout=True, capture_stderr=True, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"callora migrate ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
        seed = await seed_bench(
            dsn,
            upstream_url=f"http://127.0.0.1:{upstream_port or self.upstream.port}",
            vaults=vaults,
            balance_usdc=BALANCE_USDC,
            price_usdc=PRICE_USDC,
            limited=limited,
        )
        keys = write_keys(self.directory / f"{name}.keys", seed.api_keys)
        return Tenant(dsn=dsn, path=seed.path, api_keys=list(seed.api_keys), keys=keys, vault_ids=list(seed.vault_ids))

    @asynccontextmanager
    async def gateway(
        self,
        name: str,
        tenant: Tenant,
        *,
        lane: GatewayLane = "paid",
        workers: int = 1,
        cores: Sequence[int] = (GATEWAY_CORE,),
        wait: bool = True,
    ) -> AsyncIterator[Gateway]:
        """Run a gateway on a tenant's database; with `wait`, the block begins once it is ready."""
        port = free_port()
        env = {**_settings(tenant.dsn), "PORT": str(port)}
        # What is sold is measured as it is sold; the shorter flows exist only here.
        command = ["callora", "serve", "--workers", str(workers)] if lane == "paid" else ["bench.gateway", lane]
        argv = [sys.executable, "-m", *command]
        async with running(argv, cores=cores, log=self.directory / f"{name}.log", env=env, cwd=ROOT) as child:
            if wait:
                await until_ready(child, port, "/readyz")
            yield Gateway(child=child, port=port, tenant=tenant)

    @contextmanager
    def unpinned(self) -> Iterator[None]:
        """Let this process, PostgreSQL and the upstream use every core for the block, and pin them again after it."""
        roots = (self.postgres.pid, self.upstream.child.pid)
        move([os.getpid(), *(pid for root in roots for pid in tree(root))], all_cores())
        try:
            yield
        finally:
            move([os.getpid(), *(pid for root in roots for pid in tree(root))], [LOAD_CORE])

    @asynccontextmanager
    async def naive(self, vaults: int) -> AsyncIterator[tuple[Child, Target]]:
        """Run the naive stack on a database of its own."""
        dsn, port = await self.postgres.create("bench_naive"), free_port()
        keys = write_keys(self.directory / "naive.keys", [naive.api_key(n) for n in range(vaults)])
        target = Target(port, "/v1/call/bench/hello", keys)
        argv = [sys.executable, "-m", "bench.naive", str(port), str(self.upstream.port), dsn, str(vaults)]
        async with running(argv, cores=[GATEWAY_CORE], log=self.directory / "naive.log", cwd=ROOT) as child:
            await until_ready(child, port, target.path, headers={"X-Api-Key": naive.api_key(0)})
            yield child, target


def _settings(dsn: str) -> dict[str, str]:
    return {**_LIMITLESS, "DATABASE_URL": dsn}


@attrs.define
class LedgerCheck:
    """The ledger check around one or more paid runs: `begin`, then the runs, then `end` with what they saw."""

    stack: Stack
    gateway: Gateway
    _before: Books | None = None
    _requests: int = 0

    async def begin(self) -> None:
        """Note the books and the upstream's count."""
        self._before = await read_books(self.stack.postgres, self.gateway.tenant.dsn)
        self._requests = await self.stack.upstream.requests()

    async def end(self, *, answered: int, cut_off: int) -> list[str]:
        """Return what is wrong with the books since `begin`; an empty list means exact.

        Args:
            answered: success answers that the load received.
            cut_off: the most calls that can have been on their way when a load stopped.
        """
        assert self._before is not None, "begin() comes first"
        dsn = self.gateway.tenant.dsn
        after = await read_books(self.stack.postgres, dsn)
        asked = await self.stack.upstream.requests() - self._requests
        traffic = Traffic(answered=answered, cut_off=cut_off, upstream_requests=asked)
        return complaints(self._before, after, traffic, price=parse_usdc(PRICE_USDC))


@asynccontextmanager
async def standing(tools: dict[str, str]) -> AsyncIterator[Stack]:
    """Run PostgreSQL and the upstream on the load's core, where this process moves too."""
    move([os.getpid()], [LOAD_CORE])
    # A short path: the server's UNIX socket lives in it, and its name may take about a hundred bytes.
    with TemporaryDirectory(prefix="callora-bench-") as name:
        directory = Path(name)
        async with (
            postgres(directory / "data") as server,
            upstream(tools["nginx"], directory / "upstream", cores=[LOAD_CORE]) as behind,
        ):
            yield Stack(tools=tools, directory=directory, postgres=server, upstream=behind)
