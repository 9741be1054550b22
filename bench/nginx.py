"""nginx, twice: the upstream that every lane calls, and the peer that stands where the gateway stands.

Both run in the foreground with one worker, from a configuration and a directory of their own; nothing of the machine's
nginx is read or written. The peer does what a gateway without a ledger does: it looks the API key up in a map and
passes the call on over kept connections, with buffering as it comes.
"""

import os
import pwd
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from string import Template
from typing import Final

import attrs

from bench.machine import Child, fetch, free_port, running, until_ready

LARGE_BODY_BYTES: Final = 1024 * 1024
_STATUS: Final = "/__status"

_COMMON: Final = Template("""\
daemon off;
$user
worker_processes 1;
pid $directory/nginx.pid;
error_log stderr error;
events { worker_connections 8192; }
http {
    access_log off;
    keepalive_timeout 3600s;
    keepalive_requests 1000000000;
    client_body_temp_path $directory/body;
    proxy_temp_path $directory/proxy;
    fastcgi_temp_path $directory/fastcgi;
    uwsgi_temp_path $directory/uwsgi;
    scgi_temp_path $directory/scgi;
$servers
}
""")

_UPSTREAM: Final = Template("""\
    server {
        listen 127.0.0.1:$port backlog=4096;
        location = /__status { stub_status; }
        location / { default_type application/json; return 200 '{"hello":"world"}'; }
    }
    server {
        listen 127.0.0.1:$large_port backlog=4096;
        sendfile on;
        default_type application/octet-stream;
        root $directory;
        location = /__status { stub_status; }
        location / { rewrite ^ /large break; }
    }
""")

_PEER: Final = Template("""\
    map_hash_max_size 65536;
    map_hash_bucket_size 128;
    map $$http_x_api_key $$caller {
        default "";
$keys
    }
    upstream small { server 127.0.0.1:$small_upstream; keepalive 512; keepalive_requests 1000000000; }
    upstream large { server 127.0.0.1:$large_upstream; keepalive 512; keepalive_requests 1000000000; }
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header X-Api-Key "";
    server {
        listen 127.0.0.1:$port backlog=4096;
        location = /__status { stub_status; }
        location / { if ($$caller = "") { return 401; } proxy_pass http://small; }
    }
    server {
        listen 127.0.0.1:$large_port backlog=4096;
        location = /__status { stub_status; }
        location / { if ($$caller = "") { return 401; } proxy_buffering on; proxy_pass http://large; }
    }
""")


@attrs.define
class Nginx:
    """A running nginx."""

    child: Child
    """Its process tree: the master and one worker."""
    port: int
    """Answers with the small body, any path."""
    large_port: int
    """Answers with the 1 MiB body, any path."""

    async def requests(self) -> int:
        """Return how many requests it has taken so far, without those that asked for this number."""
        _, body = await fetch(self.port, _STATUS)
        counters = re.search(rb"\n\s*\d+\s+\d+\s+(\d+)", body)
        assert counters is not None, body
        self._asked += 1
        return int(counters.group(1)) - self._asked

    _asked: int = attrs.field(default=0, init=False)


@asynccontextmanager
async def upstream(binary: str, directory: Path, *, cores: Sequence[int]) -> AsyncIterator[Nginx]:
    """Run the upstream: a static small body on one port, a 1 MiB file on the other."""
    _prepare(directory)
    (directory / "large").write_bytes(os.urandom(LARGE_BODY_BYTES))
    ports = {"port": free_port(), "large_port": free_port()}
    async with _run(binary, directory, _UPSTREAM.substitute(directory=directory, **ports), ports, cores) as nginx:
        yield nginx


@asynccontextmanager
async def peer(
    binary: str, directory: Path, behind: Nginx, api_keys: Sequence[str], *, cores: Sequence[int]
) -> AsyncIterator[Nginx]:
    """Run the peer in front of `behind`, admitting these API keys."""
    _prepare(directory)
    ports = {"port": free_port(), "large_port": free_port()}
    keys = "\n".join(f'        "{key}" 1;' for key in api_keys)
    servers = _PEER.substitute(keys=keys, small_upstream=behind.port, large_upstream=behind.large_port, **ports)
    async with _run(binary, directory, servers, ports, cores) as nginx:
        yield nginx


@asynccontextmanager
async def _run(
    binary: str, directory: Path, servers: str, ports: dict[str, int], cores: Sequence[int]
) -> AsyncIterator[Nginx]:
    # Started as root, nginx would give its worker to an account that cannot read the benchmark's directory.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    configuration = directory / "nginx.conf"
    configuration.write_text(_COMMON.substitute(user=user, directory=directory, servers=servers))
    argv = [binary, "-p", str(directory), "-c", str(configuration)]
    async with running(argv, cores=cores, log=directory / "log") as child:
        await until_ready(child, ports["port"], _STATUS)
        yield Nginx(child=child, **ports)


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700)
