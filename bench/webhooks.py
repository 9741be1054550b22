"""Row 15: webhooks: how fast a backlog is told to many endpoints, what that takes in memory, and how late events are.

The events are written as whatever happens writes them, by this process; the service is one process with PostgreSQL
beside it. The receiver answers at once, on connections that it keeps.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs
import trio

from bench.machine import BenchError, resident_bytes
from bench.plan import Plan, Progress
from bench.stack import Stack
from callora.ledger.ids import Ids, UserId
from callora.service import SystemClock
from callora.store.bridge import Database, open_database
from callora.store.outbox import Event, add_events

ENDPOINTS: Final = 1000
_BATCH: Final = 1000
_STEADY_SHARE: Final = 0.4
"""Of the rate at which the backlog was told."""
_STEADY_SECONDS: Final = 20
_STALL_SECONDS: Final = 60.0
_ANSWER: Final = b"HTTP/1.1 204 No Content\r\n\r\n"

_USERS: Final = """
WITH made AS (
    INSERT INTO users (user_id, name, created_at)
    SELECT ('00000000-0000-7000-a000-' || lpad(to_hex(n), 12, '0'))::uuid, 'Receiver', now()
    FROM generate_series(1, $1::int) n RETURNING user_id
)
INSERT INTO webhook_endpoints (endpoint_id, user_id, url, events, retries_max, base_delay_ms, created_at, updated_at)
SELECT user_id, user_id, $2 || user_id, ARRAY['settlement_completed'], 10, 1000, now(), now() FROM made
"""

_LAGS: Final = """
SELECT count(*) AS told, percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
    ORDER BY extract(epoch FROM d.closed_at - d.created_at)::float8) AS lags
FROM webhook_deliveries d JOIN outbox o ON o.event_id = d.event_id WHERE d.state = 'delivered' AND o.subject LIKE $1
"""


@attrs.frozen
class WebhookFigures:
    """What telling costs."""

    events: int
    endpoints: int
    events_per_second: float
    """Of the backlog, from its first event's writing to its last delivery."""
    base_mib: float
    """Resident memory before it, MiB."""
    peak_mib: float
    """The most while it was told."""
    steady_rate: float
    """Events a second that happened afterwards."""
    lag_p50_seconds: float
    lag_p99_seconds: float
    """From what happened then to its delivery."""


@attrs.define
class _Receiver:
    """Counts requests and answers each with 204."""

    requests: int = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer on one connection until it is closed."""
        data = b""
        try:
            while True:
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += bytes(more)
                    continue
                head = data[:end].lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                while len(data) < end + 4 + length:
                    data += bytes(await stream.receive_some(65536))
                data = data[end + 4 + length :]
                self.requests += 1
                await stream.send_all(_ANSWER)
        except trio.BrokenResourceError:
            return
        finally:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def _receiver() -> AsyncIterator[tuple[_Receiver, str]]:
    receiver = _Receiver()
    async with trio.open_nursery() as nursery:
        listeners: Any = await nursery.start(partial(trio.serve_tcp, receiver.serve, 0, host="127.0.0.1"))
        yield receiver, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


def _event(ids: Ids, number: int, kind: str) -> Event:
    user_id = UserId(f"00000000-0000-7000-a000-{number % ENDPOINTS + 1:012x}")
    payload = {"settlementId": ids.uuid7(), "amount": "12.5000000", "network": "testnet", "number": number}
    return Event(ids.uuid7(), "settlement_completed", f"{kind}:{number}", None, payload, user_id)


async def _write(database: Database, clock: SystemClock, events: list[Event]) -> None:
    async with database.transaction() as connection:
        await add_events(connection, events, clock.now())


async def run_webhooks(stack: Stack, plan: Plan, progress: Progress) -> WebhookFigures:
    """Return the figures.

    Raises:
        BenchError: an event was not told, or told more than once.
    """
    tenant = await stack.tenant("webhooks", vaults=1)
    clock = SystemClock()
    ids = Ids(clock, os.urandom)
    async with (
        _receiver() as (receiver, url),
        open_database(tenant.dsn) as database,
        stack.gateway("webhooks", tenant) as gateway,
    ):
        await database.execute(_USERS, ENDPOINTS, url)
        await _write(database, clock, [_event(ids, number, "warm") for number in range(2 * ENDPOINTS)])
        await _until_told(receiver, 2 * ENDPOINTS)
        base = peak = resident_bytes(gateway.child.pid)
        began = trio.current_time()
        for first in range(0, plan.webhook_events, _BATCH):
            numbers = range(first, min(first + _BATCH, plan.webhook_events))
            await _write(database, clock, [_event(ids, number, "backlog") for number in numbers])
        peak = await _until_told(receiver, 2 * ENDPOINTS + plan.webhook_events, gateway.child.pid)
        rate = plan.webhook_events / (trio.current_time() - began)
        progress.say(f"webhooks: {rate:.0f} events/s to {ENDPOINTS} endpoints, {peak / 2**20:.0f} MiB")
        steady = rate * _STEADY_SHARE
        count = int(steady * _STEADY_SECONDS)
        began = trio.current_time()
        for number in range(count):
            await trio.sleep_until(began + number / steady)
            await _write(database, clock, [_event(ids, number, "steady")])
        await _until_told(receiver, 2 * ENDPOINTS + plan.webhook_events + count)
        await trio.sleep(1)  # the last are noted
        row = await database.fetch_row(_LAGS, "steady:%")
        backlog = await database.fetch_row(_LAGS, "backlog:%")
        assert row is not None
        assert backlog is not None
        if (row["told"], backlog["told"]) != (count, plan.webhook_events):
            raise BenchError(f"{row['told']} of {count} and {backlog['told']} of {plan.webhook_events} are noted")
        expected = 2 * ENDPOINTS + plan.webhook_events + count
        if receiver.requests != expected:
            raise BenchError(f"{receiver.requests} requests for {expected} events")
    p50, p99 = row["lags"]
    progress.say(f"webhooks: at {steady:.0f}/s told after {p50:.2f} s, 99 of 100 within {p99:.2f} s")
    return WebhookFigures(plan.webhook_events, ENDPOINTS, rate, base / 2**20, peak / 2**20, steady, p50, p99)


async def _until_told(receiver: _Receiver, count: int, pid: int | None = None) -> int:
    """Return, once so many requests have come, the most memory a process had meanwhile."""
    peak, seen, since = 0, receiver.requests, trio.current_time()
    while receiver.requests < count:
        if pid is not None:
            peak = max(peak, resident_bytes(pid))
        if receiver.requests > seen:
            seen, since = receiver.requests, trio.current_time()
        if trio.current_time() > since + _STALL_SECONDS:
            raise BenchError(f"{receiver.requests} of {count} events were told, and no more came")
        await trio.sleep(0.2)
    return peak
