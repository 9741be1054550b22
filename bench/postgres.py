"""The benchmark's PostgreSQL: a server of its own with fsync on, a database for each lane, and what one commit costs.

Queries go through `psql`, so that the ledger check shares no code with what it checks.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import attrs
import trio

from bench.machine import BenchError
from callora.store.embedded import EmbeddedPostgres, find_binaries

_SEPARATOR: Final = "\x1f"
_OPEN: Final = """
SELECT count(*) FROM pg_stat_activity
WHERE xact_start IS NOT NULL AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
_SETTINGS: Final = """
SELECT current_setting('fsync'), current_setting('synchronous_commit'), current_setting('server_version')
"""


@attrs.frozen
class Postgres:
    """A running server."""

    dsn: str
    """Its maintenance database."""
    pid: int
    """Root of its process tree."""
    binaries: Path
    """Directory of its programs."""
    version: str
    """Such as 18.4."""

    def dsn_of(self, database: str) -> str:
        """Return the address of another database of this server."""
        return urlunsplit(urlsplit(self.dsn)._replace(path=f"/{database}"))

    async def transactions(self) -> int:
        """Return how many sessions of clients have a transaction open."""
        return int((await query(self.binaries, self.dsn, _OPEN))[0][0])

    async def create(self, database: str) -> str:
        """Make an empty database and return its address."""
        await query(self.binaries, self.dsn, f"CREATE DATABASE {database}")
        return self.dsn_of(database)

    async def query(self, dsn: str, sql: str) -> list[list[str]]:
        """Return the rows of one statement, each value as text.

        Raises:
            BenchError: the statement failed.
        """
        return await query(self.binaries, dsn, sql)

    async def commit_ms(self, seconds: int) -> float:
        """Return the mean latency of one `pgbench -N` transaction by one client, milliseconds.

        This is the unit in which added latency is told, because it moves with the disk as the gateway's own commits do.
        """
        if not (self.binaries / "pgbench").exists():
            raise BenchError(f"no pgbench beside {self.binaries / 'postgres'}; on Debian: apt-get install postgresql")
        dsn = await self.create("bench_commit")
        pgbench = str(self.binaries / "pgbench")
        await trio.run_process([pgbench, "--initialize", "--quiet", dsn], capture_stdout=True, capture_stderr=True)
        argv = [pgbench, "--skip-some-updates", "--no-vacuum", "--client=1", f"--time={seconds}", dsn]
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True)
        latency = re.search(rb"latency average = ([0-9.]+) ms", done.stdout)
        if latency is None:
            raise BenchError(f"pgbench said no latency:\n{done.stdout.decode(errors='replace')}")
        return float(latency.group(1))


@asynccontextmanager
async def postgres(directory: Path) -> AsyncIterator[Postgres]:
    """Run a server with its data in `directory`, on the cores of this process, with durable commits."""
    server = EmbeddedPostgres(directory, settings={"max_connections": "300"})  # a pool for each gateway
    try:
        await trio.to_thread.run_sync(server.start)
        pid, binaries = server.server_pid, find_binaries()
        assert pid is not None, "it has just been started"
        fsync, synchronous, version = (await query(binaries, server.dsn, _SETTINGS))[0]
        if (fsync, synchronous) != ("on", "on"):
            raise BenchError(f"fsync is {fsync} and synchronous_commit {synchronous}: no figure would mean anything")
        yield Postgres(dsn=server.dsn, pid=pid, binaries=binaries, version=version.split()[0])
    finally:
        with trio.move_on_after(30, shield=True):
            await trio.to_thread.run_sync(server.stop)


async def query(binaries: Path, dsn: str, sql: str) -> list[list[str]]:
    """Return the rows of one statement run by `psql`, each value as text."""
    argv = [str(binaries / "psql"), "-X", "-A", "-t", "-F", _SEPARATOR, "-v", "ON_ERROR_STOP=1", "-d", dsn, "-c", sql]
    done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{done.stderr.decode(errors='replace').strip()}\nin: {sql}")
    return [line.split(_SEPARATOR) for line in done.stdout.decode().splitlines() if line]
