"""Paid calls over real sockets and a real database: who pays, and that money is exact at any concurrency."""

import trio

from callora.ledger.money import parse_usdc
from tests.support.client import call
from tests.support.service import running_service
from tests.support.upstream import raw_upstream, respond


async def test_fifty_parallel_calls_on_a_balance_for_twenty_are_twenty_answers(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(200, body=b"paid")) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("0.20")
        statuses: list[int] = []

        async def one() -> None:
            response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
            statuses.append(response.status)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
        assert sorted(statuses) == [200] * 20 + [402] * 30
        assert await service.balance(consumer) == (0, 0)
        assert len(upstream.requests) == 20
        assert [event[0] for event in await service.events(consumer)] == ["captured"] * 20
    assert service.exit_code == 0


async def test_a_paid_call_says_what_it_cost_and_what_is_left(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond(200, body=b"paid")) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1")
        response = await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)
        headers = {name.lower(): value for name, value in response.headers}
        assert headers["x-callora-charge"] == "0.0100000"
        assert headers["x-callora-balance"] == "0.9900000"
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)
