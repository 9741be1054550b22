"""Fixtures of the data plane's sockets."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from callora.http.gateway.poller import Poller
from tests.support.wires import Kind


@pytest.fixture
async def poller(nursery: trio.Nursery) -> AsyncIterator[Poller]:
    poller, scope, ended = Poller(), trio.CancelScope(), trio.Event()

    async def run() -> None:
        with scope:
            await poller.run()
        ended.set()

    nursery.start_soon(run)
    await trio.testing.wait_all_tasks_blocked()
    yield poller
    scope.cancel()
    await ended.wait()
    poller.close()


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind
