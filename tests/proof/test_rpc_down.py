"""RPC is down for long: prepaid calls are served all the while, memory stays flat, and it ends without a restart."""

import gc
import os

import psutil
import pytest
import trio

from tests.http.test_chain_health import shop
from tests.support.upstream import close_silently

OUTAGE_SECONDS = 80.0
"""With cooldown and pauses a sixtieth of the usual, as many openings, trials and retries as an hour and twenty minutes
bring; an hour to the second, on a virtual clock, is in tests/actors/test_chain.py."""
CALLERS = 8
GROWTH_BYTES_MAX = 8 << 20


@pytest.mark.proof
async def test_an_hour_of_trials_against_a_dead_node(database_url: str) -> None:
    async with shop(database_url, CIRCUIT_BREAKER_COOLDOWN_MS="500", RETRY_BASE_DELAY_MS="16") as at:
        calls = 0

        async def pay() -> None:
            nonlocal calls
            while True:
                await at.pays()
                calls += 1
                await trio.sleep(0.05)

        async def follow() -> None:
            chain = at.service.chain
            assert chain is not None
            while True:
                await chain.chain.health()
                await trio.sleep(0.02)

        await at.service.top_up(at.consumer, "100000")
        async with trio.open_nursery() as nursery:
            for _ in range(CALLERS):
                nursery.start_soon(pay)
            at.node.script.fault = close_silently()
            await at.until_rpc_is("down")
            nursery.start_soon(follow)
            await trio.sleep(OUTAGE_SECONDS / 4)
            gc.collect()
            process = psutil.Process(os.getpid())
            at.forget()
            before = process.memory_info().rss
            for _ in range(30):
                await trio.sleep(OUTAGE_SECONDS / 40)
                at.forget()
                assert await at.health() == (200, "degraded", "down")
            gc.collect()
            grown = process.memory_info().rss - before
            at.node.script.fault = None
            await at.until_rpc_is("ok")
            nursery.cancel_scope.cancel()
        print(f"{calls} paid calls in {OUTAGE_SECONDS:g} s without RPC; memory grew by {grown} bytes")
        assert calls > OUTAGE_SECONDS * CALLERS / 2
        assert grown < GROWTH_BYTES_MAX
