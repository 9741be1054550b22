"""A paid call is cancelled at every checkpoint in turn; each time its money ends in one of the ways that are right."""

from collections import Counter
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio

from callora.http.gateway.calls import CallFlow
from callora.http.gateway.client import ClientConnection
from callora.http.gateway.heads import RequestHead
from tests.proof.books import API, PRICE, assert_audit_clean
from tests.support.client import ClosedEarly, RawClient, request_bytes
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Exchange, RawUpstream, chunk_bytes, raw_upstream


class Cancelling(CallFlow):
    """A call flow whose calls can be cancelled at a chosen checkpoint, as a drain's deadline would."""

    knife: "Knife | None" = None

    async def serve(self, client: ClientConnection, request: RequestHead) -> bool:
        assert Cancelling.knife is not None
        with Cancelling.knife as scope, scope:
            return await super().serve(client, request)
        return False


@attrs.define(eq=False)
class Knife(trio.abc.Instrument):
    """Counts where the tasks of one call wait, and cancels the call where it waits for the n-th time."""

    cut_at: int
    """1 is the first wait; larger than the call has waits, and nothing is cut."""
    waits: int = 0
    ended: trio.Event = attrs.field(factory=trio.Event)
    _task: trio.lowlevel.Task | None = None
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def __enter__(self) -> trio.CancelScope:
        assert self._task is None, "one call a knife"
        self._task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        return self._scope

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)
        self.ended.set()

    @property
    def cut(self) -> bool:
        """Whether the call was cancelled and did not end before it noticed."""
        return self._scope.cancelled_caught

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a wait of the call's task or of one it started."""
        each: trio.lowlevel.Task | None = task
        while each is not None and each is not self._task:
            each = each.parent_nursery.parent_task if each.parent_nursery is not None else None
        if each is None:
            return
        self.waits += 1
        if self.waits == self.cut_at:
            self._scope.cancel()


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


@pytest.mark.parametrize("send", [plain, keyed, streaming])
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.proof)])
async def test_a_call_cancelled_at_any_checkpoint_is_charged_or_not_and_never_both(
    database_url: str, send: Send, rounds: int
) -> None:
    ends: Counter[str] = Counter()
    most = 0
    async with (
        raw_upstream(answer_in_pieces) as upstream,
        running_service(database_url, flow_class=Cancelling) as service,
    ):
        await service.api(API, upstream.url)
        consumer = await service.consumer("100")
        number = 0
        for _ in range(rounds):
            cut_at = 0
            while True:
                cut_at, number = cut_at + 1, number + 1
                knife, end = await one_call(service, upstream, consumer, send, number, cut_at)
                ends[end] += 1
                if knife.waits < cut_at:
                    break
            most = max(most, knife.waits)
        await assert_audit_clean(service.database)
        charged = sum(count for end, count in ends.items() if "captured" in end) * PRICE
        assert await service.balance(consumer) == (100 * 10_000_000 - charged, 0)
    assert service.exit_code == 0
    print(f"\n{send.__name__}: {number} calls, cut at each of {most} waits: {dict(ends)}")
    assert ends["delivered: captured"] >= rounds
    assert sum(count for end, count in ends.items() if end.startswith("cut")) >= 4 * rounds, "hardly a call was cut"


async def one_call(
    service: RunningService, upstream: RawUpstream, consumer: Consumer, send: Send, number: int, cut_at: int
) -> tuple[Knife, str]:
    """Make one call, cut it, and return what became of it and of its money."""
    before = len(await service.events(consumer))
    Cancelling.knife = knife = Knife(cut_at)
    async with RawClient.connect("127.0.0.1", service.port) as client:
        delivered = False
        try:
            await send(client, consumer, number)
            response = await client.read_response("POST")
            delivered = response.status == 200
        except (ClosedEarly, trio.BrokenResourceError):
            pass
        await knife.ended.wait()
    await service.until_no_hold(consumer)
    calls = await settled_events(service, consumer, before)
    new = calls[before:]
    assert len(new) <= 1
    if delivered:
        assert new == [("captured", "delivered", PRICE, 200)], (cut_at, new)
    if new and new[0][0] == "captured":
        assert new[0][1:] == ("delivered", PRICE, 200), (cut_at, new)
    else:
        assert not new or new[0][0] == "released", (cut_at, new)
    await nothing_left_running(service, upstream)
    state = new[0][0] if new else "no hold"
    return knife, f"{'delivered' if delivered else 'cut'}: {state}"


async def settled_events(
    service: RunningService, consumer: Consumer, before: int
) -> list[tuple[str, str | None, int | None, int | None]]:
    """Return the events once every command of the vault is stored: the balance and the events agree by then."""
    return await service.events(consumer)


async def nothing_left_running(service: RunningService, upstream: RawUpstream) -> None:
    """Wait until the service has no request in hand and no connection to the upstream is in the middle of one."""
    metrics = service.context.metrics
    with trio.fail_after(10):
        while metrics.inflight_calls._value.get() or metrics.connections._value.get():
            await trio.sleep(0.01)
