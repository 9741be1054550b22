"""Garbage: a call, answered or refused, leaves nothing that only a collector would find, which stops all of them."""

import gc
from collections.abc import Sequence

import pytest
from trio.testing import wait_all_tasks_blocked

from callora.http.gateway.admission import Refused
from callora.http.gateway.calls import Call
from callora.ledger.keys import RANDOM_BYTES, make_key
from tests.support.client import call, watchdog
from tests.support.service import running_service
from tests.support.upstream import raw_upstream, respond

STRANGER = [("X-Api-Key", make_key("testnet", bytes(RANDOM_BYTES)))]


@pytest.mark.parametrize(
    ("target", "headers", "balance", "status"),
    [
        pytest.param("/v1/call/echo/x", None, "10", 200, id="answered"),
        pytest.param("/v1/call/echo/x", None, "0", 402, id="for want of money"),
        pytest.param("/v1/call/nowhere/x", None, "10", 404, id="for want of an API"),
        pytest.param("/v1/call/echo/x", [], "10", 401, id="for want of a key"),
        pytest.param("/v1/call/echo/x", STRANGER, "10", 401, id="for a key nobody has"),
        pytest.param("/v1/call/gone/x", None, "10", 502, id="for want of an upstream"),
    ],
)
async def test_a_call_leaves_no_cycle_behind(
    database_url: str, target: str, headers: Sequence[tuple[str, str]] | None, balance: str, status: int
) -> None:
    with watchdog("a service that serves three calls"):
        async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
            await service.api("echo", upstream.url)
            await service.api("gone", "http://127.0.0.1:9")
            consumer = await service.consumer(balance)
            gc.disable()
            try:
                for _ in range(3):
                    answer = await call(service.port, "GET", target, consumer.headers if headers is None else headers)
                    assert answer.status == status
                await wait_all_tasks_blocked()
                assert [each for each in gc.get_objects() if isinstance(each, Call | Refused)] == []
            finally:
                gc.enable()
