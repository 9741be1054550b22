"""Lane (x): the same gateway made of the same packages in the way their front pages suggest.

Quart-Trio served by Hypercorn, one httpx client, one database transaction a call on an asyncpg pool through
trio-asyncio. It bills exactly once as long as nothing is cancelled; beyond speed it lacks all that Callora's rules are
about. Run as `python -m bench.naive PORT UPSTREAM_PORT DSN VAULTS`; it makes its own tables.
"""

import hashlib
import sys
from typing import Any

import asyncpg
import httpx
import trio
import trio_asyncio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, request
from quart_trio import QuartTrio
from trio_asyncio import aio_as_trio

PRICE = 1000
_SCHEMA = """
    DROP TABLE IF EXISTS calls, vaults;
    CREATE TABLE vaults (vault_id integer PRIMARY KEY, key_hash bytea UNIQUE, balance bigint CHECK (balance >= 0));
    CREATE TABLE calls (call_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, vault_id integer NOT NULL,
                        amount bigint NOT NULL, status integer NOT NULL, created_at timestamptz DEFAULT now());
"""
_FIND = "SELECT vault_id, balance FROM vaults WHERE key_hash = $1"
_CHARGE = "UPDATE vaults SET balance = balance - $2 WHERE vault_id = $1"
_RECORD = "INSERT INTO calls (vault_id, amount, status) VALUES ($1, $2, $3)"


def api_key(vault: int) -> str:
    """Return the API key of the vault with this number."""
    return f"ck_test_{vault:048x}"


async def open_pool(dsn: str) -> Any:
    """Return a pool of ten connections; runs on the asyncio loop."""
    return await asyncpg.create_pool(dsn, min_size=10, max_size=10)


def make_app(pool: Any, upstream: httpx.AsyncClient) -> QuartTrio:
    """Return the application: one route that looks up, proxies and charges."""
    app = QuartTrio("naive")

    @app.route("/v1/call/<slug>/<path:rest>", methods=["GET", "POST"])
    async def call(slug: str, rest: str) -> Response:
        key = request.headers.get("X-Api-Key", "")
        with trio.CancelScope(
            shield=True
        ):  # its one courtesy: else each client that leaves costs a connection for good
            vault = await aio_as_trio(pool.fetchrow)(_FIND, hashlib.sha256(key.encode()).digest())
        if vault is None:
            return Response("unknown key", 401)
        if vault["balance"] < PRICE:
            return Response("insufficient balance", 402)
        answer = await upstream.request(request.method, f"/{rest}", content=await request.get_data())
        with trio.CancelScope(shield=True):
            async with aio_as_trio(pool.acquire()) as connection, aio_as_trio(connection.transaction()):
                await aio_as_trio(connection.execute)(_CHARGE, vault["vault_id"], PRICE)
                await aio_as_trio(connection.execute)(_RECORD, vault["vault_id"], PRICE, answer.status_code)
        return Response(answer.content, answer.status_code, content_type=answer.headers["content-type"])

    return app


async def main(port: int, upstream_port: int, dsn: str, vaults: int) -> None:
    """Serve until stopped."""
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.loglevel = "WARNING"
    async with trio_asyncio.open_loop():
        pool = await aio_as_trio(open_pool)(dsn)
        async with aio_as_trio(pool.acquire()) as connection:
            await aio_as_trio(connection.execute)(_SCHEMA)
            rows = [(n, hashlib.sha256(api_key(n).encode()).digest(), 10**15) for n in range(vaults)]
            await aio_as_trio(connection.executemany)("INSERT INTO vaults VALUES ($1, $2, $3)", rows)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{upstream_port}", limits=limits) as upstream:
            await serve(make_app(pool, upstream), config)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
