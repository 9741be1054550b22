"""A paid call is cancelled at every checkpoint in turn; each time its money ends in one of the ways that are right."""

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio

from callora.http.gateway.calls import CallFlow
from callora.http.gateway.client import ClientConnection
from callora.http.gateway.heads import RequestHead
from callora.ledger.commands import SetStanding
from tests.proof.books import API, PRICE, assert_audit_clean
from tests.support.client import ClosedEarly, RawClient, request_bytes, watchdog
from tests.support.knife import Knife
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Exchange, chunk_bytes, raw_upstream


class Cancelling(CallFlow):
    """A call flow whose calls can be cancelled at a chosen checkpoint, as a drain's deadline would."""

    knife: "Knife | None" = None

    async def serve(self, client: ClientConnection, request: RequestHead) -> bool:
        assert Cancelling.knife is not None
        with Cancelling.knife as scope, scope:
            return await super().serve(client, request)
        return False


async def answer_in_pieces(exchange: Exchange) -> None:
    """Answer with a body that needs several reads; the pauses make each of them a wait."""
    await exchange.read_body()
    await exchange.send_head(200, [("Transfer-Encoding", "chunked")])
    for number in range(3):
        await trio.sleep(0.002)
        await exchange.send(chunk_bytes(b"%d" % number))
    await exchange.send(b"0\r\n\r\n")


async def plain(client: RawClient, consumer: Consumer, number: int) -> None:
    """A call without a body."""
    await client.send(request_bytes("GET", f"/v1/call/{API}/{number}", consumer.headers))


async def keyed(client: RawClient, consumer: Consumer, number: int) -> None:
    """A call with an Idempotency-Key and a body in two pieces."""
    headers = [*consumer.headers, ("Idempotency-Key", f"intent-{number}")]
    data = request_bytes("POST", f"/v1/call/{API}/{number}", headers, b"x" * 100)
    await client.send(data[:-50])
    await trio.sleep(0.002)
    await client.send(data[-50:])


async def streaming(client: RawClient, consumer: Consumer, number: int) -> None:
    """A call whose body is passed on as it arrives."""
    headers = [*consumer.headers, ("Transfer-Encoding", "chunked")]
    await client.send(request_bytes("POST", f"/v1/call/{API}/{number}", headers))
    for _ in range(4):
        await trio.sleep(0.002)
        await client.send(chunk_bytes(b"y" * 1000))
    await client.send(b"0\r\n\r\n")


Send = Callable[[RawClient, Consumer, int], Awaitable[None]]


ONE_OF_EACH = {"KEY_MAX_CONCURRENCY_PER_KEY": "1", "UPSTREAM_POOL_MAX": "1"}
"""A slot or a connection that one call does not give back is missed by the next."""


@pytest.mark.parametrize("send", [plain, keyed, streaming])
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.proof)])
async def test_a_call_cancelled_at_any_checkpoint_is_charged_or_not_and_never_both(
    database_url: str, send: Send, rounds: int
) -> None:
    ends: Counter[str] = Counter()
    number = most = 0
    async with (
        raw_upstream(answer_in_pieces) as upstream,
        running_service(database_url, ONE_OF_EACH, flow_class=Cancelling) as service,
    ):
        await service.api(API, upstream.url)
        consumer = await service.consumer("100")
        for _ in range(rounds):
            cut_at = 0
            while True:
                cut_at, number = cut_at + 1, number + 1
                knife, end = await one_call(service, consumer, send, number, cut_at)
                ends[end] += 1
                if knife.waits < cut_at:
                    break
            assert end == "delivered: captured", "the last of a round is not cut at all"
            most = max(most, cut_at - 1)
        await assert_audit_clean(service.database)
        charged = [event for event in await service.events(consumer) if event[0] == "captured"]
        assert await service.balance(consumer) == (100 * 10_000_000 - len(charged) * PRICE, 0)
        # Each keyed call was tried again until it had its answer; the others were not.
        captured = sum(count for end, count in ends.items() if "captured" in end)
        assert len(charged) == (number if send is keyed else captured)
    assert service.exit_code == 0
    print(f"\n{send.__name__}: {number} calls, cut at each of {most} waits: {dict(ends)}")
    assert sum(count for end, count in ends.items() if end.startswith("cut")) >= 4 * rounds, "hardly a call was cut"


async def one_call(
    service: RunningService, consumer: Consumer, send: Send, number: int, cut_at: int
) -> tuple[Knife, str]:
    """Make one call, cut it, and return what became of it and of its money."""
    before = len(await service.events(consumer))
    running = gateway_tasks()
    Cancelling.knife = knife = Knife(cut_at)
    delivered = False
    async with RawClient.connect("127.0.0.1", service.port) as client:
        with contextlib.suppress(ClosedEarly, trio.BrokenResourceError):
            await send(client, consumer, number)
            delivered = (await client.read_response("POST")).status == 200
        with watchdog("the call to end"):
            await knife.ended.wait()
    with watchdog("the call's tasks to end"):
        while gateway_tasks() - running:  # noqa: ASYNC110 - tasks set no event when they end
            await trio.lowlevel.checkpoint()
    # A rare command is carried out when all that was decided before it is stored: the hold, then its release.
    for _ in range(2):
        await service.ledger.registry.ask(consumer.vault_id, SetStanding("active"))
    await service.until_no_hold(consumer)
    new = (await service.events(consumer))[before:]
    assert len(new) <= 1, (cut_at, new)
    state = new[0][0] if new else "no hold"
    if delivered or state == "captured":
        assert new == [("captured", "delivered", PRICE, 200)], (cut_at, new)
    else:
        assert state in ("no hold", "released"), (cut_at, new)
    if send is keyed:
        await retried(service, consumer, number, replayed=state == "captured")
    return knife, f"{'delivered' if delivered else 'cut'}: {state}"


async def retried(service: RunningService, consumer: Consumer, number: int, *, replayed: bool) -> None:
    """Try a keyed call again: what was captured is given again, what was not is done now."""
    Cancelling.knife = Knife(cut_at=0)
    async with RawClient.connect("127.0.0.1", service.port) as client:
        await keyed(client, consumer, number)
        response = await client.read_response("POST")
    assert response.status == 200
    assert response.body == b"012"
    assert (response.header("Idempotent-Replayed") == "true") == replayed


def gateway_tasks() -> Counter[str]:
    """Return the data plane's tasks by name."""
    root = trio.lowlevel.current_root_task()
    found: Counter[str] = Counter()
    left = [root] if root is not None else []
    while left:
        task = left.pop()
        left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        found[task.name] += "callora.http.gateway" in task.name
    return +found
