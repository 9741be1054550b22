"""Sources: a question is asked until somebody answers it, within bounds, and a send is never sent twice on a doubt."""

import io
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import httpx
import pytest
import trio
from stellar_sdk import Account, Asset, TransactionBuilder

from callora.actors.breaker import BreakerSettings
from callora.actors.chain import same_network
from callora.actors.sources import JITTER, PAUSE_SECONDS_MAX, STALE_LEDGERS, RetrySettings, Source
from callora.config.settings import PASSPHRASES
from callora.ledger.chain import Envelope
from callora.ledger.faults import ChainMismatch, ChainOutcomeUnknown, ChainUnavailable
from callora.logs import Logs
from callora.metrics import Metrics
from callora.service import SystemClock
from callora.stellar.envelopes import seal
from callora.stellar.rpc import RpcNode
from tests.support.nodes import PASSPHRASE, MemoryNet, Refusal, RpcScript, account

DOWN: Final = httpx.ConnectError("refused")
LOST: Final = httpx.ReadError("reset")


def signed() -> Envelope:
    """Return something to send."""
    alice = account("alice")
    builder = TransactionBuilder(Account(alice.public_key, 1), PASSPHRASE)
    builder.append_payment_op(alice.public_key, Asset.native(), "1").add_time_bounds(0, 9)
    envelope = builder.build()
    envelope.sign(alice)
    return seal(envelope)


def source(
    net: MemoryNet, hosts: Sequence[str], *, attempts: int = 3, base_seconds: float = 1.0, failures: int = 5
) -> Source[RpcNode]:
    """Return a source of these nodes."""
    transport = net.transport()

    async def verify(node: RpcNode) -> None:
        same_network(PASSPHRASE, (await node.network()).passphrase, node.name)

    return Source(
        "rpc",
        [RpcNode(f"https://{host}", PASSPHRASE, transport) for host in hosts],
        verify,
        breaker_settings=BreakerSettings(failures, 30.0, 1),
        retry=RetrySettings(attempts, base_seconds),
        random=random.Random(7),
        metrics=Metrics(),
        log=Logs(SystemClock(), level="error", stream=io.StringIO()).logger("chain"),
    )


async def unanswered(asked: Source[RpcNode]) -> ChainUnavailable:
    """Return the fault that asking must end in."""
    with pytest.raises(ChainUnavailable) as caught:
        await asked.ask("retained", RpcNode.retained)
    return caught.value


def state_of(asked: Source[RpcNode]) -> str:
    """Return its breaker's state."""
    return asked.breaker.state


def asked_of(net: MemoryNet, method: str) -> list[str]:
    """Return who was asked this, in order."""
    return [host for _, host, each in net.requests if each == method]


async def test_a_node_that_fails_gives_way_to_the_next_at_once(autojump_clock: trio.testing.MockClock) -> None:
    net = MemoryNet(one=RpcScript(), two=RpcScript())
    net.faults["one"] = DOWN
    asked = source(net, ("one", "two"))
    began = trio.current_time()
    assert (await asked.ask("retained", RpcNode.retained)).oldest == 1
    assert trio.current_time() == began
    assert asked.breaker.figures.total_failures == 0
    del net.faults["one"]
    net.requests.clear()
    await asked.ask("retained", RpcNode.retained)
    assert asked_of(net, "getTransaction") == ["two"], "the one that answered is asked first"


async def test_a_question_is_asked_so_often_and_so_far_apart(autojump_clock: trio.testing.MockClock) -> None:
    net = MemoryNet(one=RpcScript())
    asked = source(net, ("one",), attempts=6)
    await asked.ask("retained", RpcNode.retained)
    net.requests.clear()
    net.faults["one"] = httpx.Response(503)
    assert (await unanswered(asked)).kind == "status"
    times = [at for at, _, _ in net.requests]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert len(pauses) == 5
    for pause, doubled in zip(pauses, (1, 2, 4, 8, 10), strict=True):
        assert doubled * (1 - JITTER) <= pause <= doubled * (1 + JITTER)
    assert len(set(pauses)) == 5, "with jitter"


async def test_one_exhausted_question_is_one_failure_of_the_breaker(autojump_clock: trio.testing.MockClock) -> None:
    net = MemoryNet(one=RpcScript(), two=RpcScript())
    net.faults |= {"one": DOWN, "two": httpx.Response(500)}
    asked = source(net, ("one", "two"), failures=2)
    for count in (1, 2):
        await unanswered(asked)
        assert asked.breaker.figures.total_failures == count
    assert state_of(asked) == "open"
    count = len(net.requests)
    refused = await unanswered(asked)
    assert refused.kind == "open"
    assert refused.retry_after_seconds is not None
    assert 0 < refused.retry_after_seconds <= 30
    assert len(net.requests) == count, "an open breaker asks nobody"
    net.faults.clear()
    await trio.sleep(30)
    await asked.ask("retained", RpcNode.retained)
    assert state_of(asked) == "closed"


@pytest.mark.parametrize("fault", [httpx.Response(401), httpx.Response(404)])
async def test_what_time_does_not_cure_is_not_repeated(
    fault: httpx.Response, autojump_clock: trio.testing.MockClock
) -> None:
    net = MemoryNet(one=RpcScript())
    net.faults["one"] = fault
    began = trio.current_time()
    assert not (await unanswered(source(net, ("one",)))).passing
    assert trio.current_time() == began


async def test_a_refused_question_says_nothing_about_the_node(autojump_clock: trio.testing.MockClock) -> None:
    script = RpcScript()
    script.results["getTransaction"] = lambda _: Refusal(-32602, "invalid")
    asked = source(MemoryNet(one=script), ("one",), failures=1)
    for _ in range(3):
        assert (await unanswered(asked)).kind == "refused"
    assert state_of(asked) == "closed"


async def test_a_node_that_wants_to_be_left_alone_is(autojump_clock: trio.testing.MockClock) -> None:
    net = MemoryNet(one=RpcScript(), two=RpcScript())
    asked = source(net, ("one", "two"))
    await asked.verify_all()
    net.requests.clear()
    net.faults["one"] = httpx.Response(429, headers={"Retry-After": "20"})
    for _ in range(3):
        await asked.ask("retained", RpcNode.retained)
    assert asked_of(net, "getTransaction") == ["one", "two", "two", "two"]
    # With nobody else to ask, a short wait is waited and a long one is told.
    net.faults["two"] = httpx.Response(429, headers={"Retry-After": "5"})
    del net.faults["one"]
    await trio.sleep(14)
    began = trio.current_time()
    await asked.ask("retained", RpcNode.retained)
    assert 5 <= trio.current_time() - began <= 9
    net.faults |= dict.fromkeys(("one", "two"), httpx.Response(429, headers={"Retry-After": "600"}))
    began = trio.current_time()
    told = await unanswered(asked)
    assert told.kind == "rate_limited"
    assert trio.current_time() - began <= PAUSE_SECONDS_MAX * (1 + JITTER)


async def test_a_node_that_is_behind_is_not_relied_upon(autojump_clock: trio.testing.MockClock) -> None:
    fresh, stale = RpcScript(), RpcScript()
    net = MemoryNet(fresh=fresh, stale=stale)
    asked = source(net, ("stale", "fresh"))
    fresh.ledger = 1000 + STALE_LEDGERS
    for _ in range(2):
        assert await asked.ask("fee_stats", RpcNode.fee_stats)
    fresh.ledger += 1
    net.faults["stale"] = DOWN
    await asked.ask("fee_stats", RpcNode.fee_stats)
    net.faults = {"fresh": DOWN}
    told = await unanswered(asked)
    assert told.kind in ("stale", "unreachable")
    assert (await asked.ask("retained", RpcNode.retained, stale_allowed=True)).latest.sequence == 1000
    stale.ledger = 1001
    assert await asked.ask("fee_stats", RpcNode.fee_stats)
    stale.ledger = 5
    asked.forget_newest()
    assert await asked.ask("fee_stats", RpcNode.fee_stats), "another history"


async def test_being_behind_is_no_failure_of_the_breaker(autojump_clock: trio.testing.MockClock) -> None:
    script = RpcScript()
    asked = source(MemoryNet(one=script), ("one",), failures=1)
    await asked.ask("retained", RpcNode.retained)
    script.ledger = 5
    assert (await unanswered(asked)).kind == "stale"
    assert state_of(asked) == "closed"


async def test_a_node_on_another_network_is_never_asked_anything_else(autojump_clock: trio.testing.MockClock) -> None:
    script = RpcScript()
    script.passphrase = PASSPHRASES["mainnet"]
    net = MemoryNet(one=script, two=RpcScript())
    asked = source(net, ("one", "two"))
    with pytest.raises(ChainMismatch, match="Public Global Stellar Network"):
        await asked.ask("retained", RpcNode.retained)
    with pytest.raises(ChainMismatch):
        await asked.verify_all()
    assert asked_of(net, "getTransaction") == []


async def test_a_node_that_was_lost_is_looked_at_again(autojump_clock: trio.testing.MockClock) -> None:
    script = RpcScript()
    net = MemoryNet(one=script)
    asked = source(net, ("one",))
    for _ in range(3):
        await asked.ask("retained", RpcNode.retained)
    assert len(asked_of(net, "getNetwork")) == 1
    net.faults["one"] = DOWN
    await unanswered(asked)
    net.faults.clear()
    script.passphrase = PASSPHRASES["mainnet"]
    with pytest.raises(ChainMismatch):
        await asked.ask("retained", RpcNode.retained)


async def test_a_send_goes_elsewhere_only_where_nothing_was_sent(autojump_clock: trio.testing.MockClock) -> None:
    def sends(net: MemoryNet) -> list[str]:
        return asked_of(net, "sendTransaction")

    for fault, expected in (
        (DOWN, ["one", "two"]),
        (httpx.ConnectTimeout("never"), ["one", "two"]),
        (httpx.Response(429, headers={"Retry-After": "60"}), ["one", "two"]),
        (httpx.Response(401), ["one", "two"]),
    ):
        net = MemoryNet(one=RpcScript(), two=RpcScript())
        asked = source(net, ("one", "two"))
        await asked.verify_all()
        net.faults["one"] = fault
        assert (await asked.ask("send", lambda node: node.send(signed()))).status == "pending"
        assert sends(net) == expected

    for unknown in (httpx.Response(502), httpx.Response(200, content=b"<html>")):
        net = MemoryNet(one=RpcScript(), two=RpcScript())
        asked = source(net, ("one", "two"))
        await asked.verify_all()
        net.faults["one"] = unknown
        with pytest.raises(ChainOutcomeUnknown):
            await asked.ask("send", lambda node: node.send(signed()))
        assert sends(net) == ["one"]


async def test_a_cancelled_question_counts_neither_way_and_wedges_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    net = MemoryNet(one=RpcScript())
    asked = source(net, ("one",), attempts=1, failures=1)
    net.faults["one"] = DOWN
    await unanswered(asked)
    assert state_of(asked) == "open"
    await trio.sleep(30)
    net.faults["one"] = 3600.0
    for _ in range(5):
        with trio.move_on_after(1):
            await asked.ask("retained", RpcNode.retained)
        assert state_of(asked) == "half_open"
    # A trial that times out is a failure; the next one closes it.
    assert (await unanswered(asked)).kind == "timeout"
    assert state_of(asked) == "open"
    net.faults.clear()
    await trio.sleep(30)
    await asked.ask("retained", RpcNode.retained)
    assert state_of(asked) == "closed"


async def test_every_request_is_counted_by_its_outcome(autojump_clock: trio.testing.MockClock) -> None:
    net = MemoryNet(one=RpcScript())
    asked = source(net, ("one",), attempts=2)
    await asked.ask("retained", RpcNode.retained)
    net.faults["one"] = DOWN
    await unanswered(asked)
    text = asked._metrics.render().decode()
    assert 'callora_chain_requests_total{method="retained",outcome="answered",source="rpc"} 1.0' in text
    assert 'callora_chain_requests_total{method="retained",outcome="unreachable",source="rpc"} 2.0' in text
