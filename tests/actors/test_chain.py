"""The chain: what answers is checked, whoever can answers, and what does not fit halts this part alone."""

import gc
import io
import random
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import pytest
import trio
from stellar_sdk import scval

from callora.actors.chain import CHECK_SECONDS_MAX, HEAD_SECONDS, Chain
from callora.actors.supervisor import Supervisor
from callora.chain_part import keep, make_chain
from callora.config.loading import load_settings
from callora.config.settings import PASSPHRASES
from callora.ledger.chain import Applied, ContractFault, Envelope, NotSeen, OutsideRange
from callora.ledger.faults import ChainMismatch, ChainOutcomeUnknown, ChainUnavailable
from callora.logs import Logs
from callora.metrics import Metrics
from tests.stellar.test_rpc import invoked, result
from tests.support.nodes import (
    CLOSED_AT,
    ENVIRON,
    HORIZON_ROOT,
    OWNER,
    SETTLEMENT,
    USDC,
    VAULT,
    MemoryNet,
    RpcScript,
    Trap,
    account,
    contract,
)

DOWN: Final = httpx.ConnectError("refused")
CHANNELS: Final = account("channel").secret
ALICE: Final = account("alice").public_key


class TrioClock:
    """The date as Trio's own clock has it, so that it jumps with a virtual one."""

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.timestamp(), UTC)

    def timestamp(self) -> float:
        return CLOSED_AT + trio.current_time() % 1e6


class Made:
    """A chain on a network in memory."""

    def __init__(self, net: MemoryNet, environ: Mapping[str, str] | None = None) -> None:
        hosts = ",".join(f"https://{host}" for host in net.scripts)
        settings = load_settings({**ENVIRON, "SOROBAN_RPC_URL": hosts, **(environ or {})})
        self.net, self.stream, self.metrics = net, io.StringIO(), Metrics()
        self.logs = Logs(TrioClock(), level="info", stream=self.stream)
        self.chain: Chain = make_chain(
            settings,
            net.transport(),
            clock=TrioClock(),
            random=random.Random(3),
            metrics=self.metrics,
            log=self.logs.logger("chain"),
        )

    def gauge(self, name: str) -> float:
        """Return what a metric shows."""
        self.chain.refresh_metrics()
        for line in self.metrics.render().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(name)


async def test_a_chain_that_fits_is_recognised_at_the_start(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    vault = made.chain.vault
    assert (vault.contract_id, vault.owner, vault.usdc, vault.settlement) == (VAULT, OWNER.public_key, USDC, SETTLEMENT)
    assert await made.chain.ready() == vault
    assert await made.chain.balance() == 250_000_000
    assert await made.chain.is_allowed(ALICE)
    assert not await made.chain.is_paused()
    assert not await made.chain.is_request_processed("a" * 32)
    assert await made.chain.held() == 250_000_000
    assert (await made.chain.wallet(ALICE)).exists is False
    assert (await made.chain.fee_stats()).p90 == 110
    assert (await made.chain.network_facts()).protocol_version == 23
    assert await made.chain.sequence_of(ALICE) is None


@pytest.mark.parametrize(
    ("change", "environ", "says"),
    [
        ("passphrase", {}, "STELLAR_NETWORK_PASSPHRASE"),
        ("contract", {}, "no vault that Callora knows"),
        ("fits", {"STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID": contract("other")}, "SETTLEMENT_CONTRACT_ID"),
        ("fits", {"VAULT_OWNER_SEED": account("thief").secret, "CHANNEL_SEEDS": CHANNELS}, "VAULT_OWNER_SEED"),
    ],
)
async def test_what_was_not_configured_refuses_the_start(
    change: str, environ: Mapping[str, str], says: str, autojump_clock: trio.testing.MockClock
) -> None:
    script = RpcScript()
    if change == "passphrase":
        script.passphrase = PASSPHRASES["mainnet"]
    if change == "contract":
        script.views = {}
    with pytest.raises(ChainMismatch, match=says):
        await Made(MemoryNet(one=script), environ).chain.check()


async def test_one_wrong_node_among_right_ones_refuses_the_start(autojump_clock: trio.testing.MockClock) -> None:
    wrong = RpcScript()
    wrong.passphrase = "Another Network"
    with pytest.raises(ChainMismatch, match="Another Network"):
        await Made(MemoryNet(one=RpcScript(), two=wrong)).chain.check()


@pytest.mark.parametrize("fault", [DOWN, 3600.0, httpx.Response(503)])
async def test_a_chain_that_does_not_answer_does_not_keep_the_start_waiting(
    fault: Exception | httpx.Response | float, autojump_clock: trio.testing.MockClock
) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    made.net.faults["one"] = fault
    began = trio.current_time()
    await made.chain.check()
    assert trio.current_time() - began <= CHECK_SECONDS_MAX
    with pytest.raises(ChainUnavailable) as caught:
        _ = made.chain.vault
    assert caught.value.kind == "unready"
    assert "chain_unreachable_at_start" in made.stream.getvalue() or made.logs is not None


async def test_it_is_recognised_when_it_is_reached_and_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    made.net.faults["one"] = DOWN
    await made.chain.check()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.chain.run)
        await trio.sleep(60)
        made.net.faults.clear()
        assert (await made.chain.ready()).generation == "g1"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("wrong", ["network", "contract"])
async def test_a_mismatch_found_later_halts_the_part_and_says_why(
    wrong: str, autojump_clock: trio.testing.MockClock
) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    made.net.faults["one"] = DOWN
    await made.chain.check()
    if wrong == "network":
        made.net.scripts["one"].passphrase = "Another Network"
    else:
        made.net.scripts["one"].views = {}
    made.net.faults.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.chain.run)
        with pytest.raises(ChainMismatch):
            await made.chain.ready()
    assert made.chain.halted is not None
    assert made.gauge("callora_chain_halted") == 1
    count = len(made.net.requests)
    for asking in (made.chain.retained, made.chain.balance, made.chain.fee_stats):
        with pytest.raises(ChainMismatch):
            await asking()
    assert len(made.net.requests) == count, "a halted part asks nobody"
    assert await made.chain.health() == {"rpc": "down"}
    made.chain.halt("another reason")
    assert made.chain.halted != "another reason"


async def test_the_newest_ledger_is_followed_and_its_age_shown(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.chain.run)
        await trio.sleep(1)
        assert made.gauge("callora_chain_head_ledger") == 1000
        made.net.scripts["one"].ledger = 1001
        await trio.sleep(HEAD_SECONDS)
        assert made.gauge("callora_chain_head_ledger") == 1001
        made.net.faults["one"] = DOWN
        before = made.gauge("callora_chain_lag_seconds")
        await trio.sleep(600)
        assert made.gauge("callora_chain_lag_seconds") == pytest.approx(before + 600, abs=1)
        nursery.cancel_scope.cancel()


async def test_a_contract_that_no_longer_answers_like_a_vault_is_a_mismatch(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    made.net.scripts["one"].views["balance"] = Trap(1, VAULT)
    with pytest.raises(ChainMismatch, match="balance"):
        await made.chain.balance()
    made.net.scripts["one"].views["balance"] = scval.to_bool(True)
    with pytest.raises(ChainMismatch, match="unknown form"):
        await made.chain.balance()


async def test_calls_are_built_for_this_network_and_prepared(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    call = made.chain.vault.deposit(ALICE, 5)
    built = made.chain.build(call, source=ALICE, sequence=3, max_time=CLOSED_AT, fee=100)
    made.net.scripts["one"].views["deposit"] = Trap(4)
    refused = await made.chain.prepare(built)
    assert isinstance(refused, ContractFault)
    made.net.scripts["one"].views["deposit"] = scval.to_int128(1)
    prepared = await made.chain.prepare(built)
    assert isinstance(prepared, Envelope)
    assert (await made.chain.send(prepared)).status == "pending"
    assert isinstance(await made.chain.transaction(prepared.hash), NotSeen)


async def test_a_history_that_began_again_is_seen_by_whoever_asks_for_events(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    await made.chain.retained()
    script = made.net.scripts["one"]
    script.ledger = 7
    page = await made.chain.events(VAULT, cursor=None, start_ledger=1, limit=1)
    assert not isinstance(page, OutsideRange)
    assert page.retained.latest.sequence == 7
    with pytest.raises(ChainUnavailable):
        await made.chain.fee_stats()
    made.chain.begin_again()
    assert (await made.chain.fee_stats()).p50 == 106


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (None, "ok"),
        (1.9, "ok"),
        (2.5, "degraded"),
        (5.0, "down"),
        (DOWN, "down"),
        (httpx.Response(503), "degraded"),
        (httpx.Response(200, content=b"<html>"), "degraded"),
    ],
)
async def test_a_probe_says_how_rpc_fares(
    fault: Exception | httpx.Response | float | None, expected: str, autojump_clock: trio.testing.MockClock
) -> None:
    made = Made(MemoryNet(one=RpcScript()), {"SOROBAN_RPC_TIMEOUT": "3000"})
    await made.chain.check()
    if fault is not None:
        made.net.faults["one"] = fault
    assert await made.chain.health() == {"rpc": expected}


async def test_one_node_that_is_well_suffices_and_all_who_ask_share_a_probe(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript(), two=RpcScript()))
    await made.chain.check()
    made.net.faults["one"] = DOWN
    made.net.requests.clear()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(made.chain.health)
    assert len(made.net.requests) == 2
    assert await made.chain.health() == {"rpc": "ok"}


async def test_an_open_breaker_is_degraded_at_best(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))
    await made.chain.check()
    made.chain.breakers["chain:rpc"].trip(trio.current_time())
    assert await made.chain.health() == {"rpc": "degraded"}


async def test_the_breakers_figures_have_dates(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()), {"CIRCUIT_BREAKER_THRESHOLD": "1"})
    began = TrioClock().now()
    await made.chain.check()
    await trio.sleep(10)
    report = made.chain.reports()["chain:rpc"]
    assert (report.state, report.total_failures, report.last_failure_time) == ("closed", 0, None)
    assert report.total_successes == report.consecutive_successes > 0
    assert abs(report.last_state_change - began) < timedelta(seconds=1)
    made.net.faults["one"] = DOWN
    with pytest.raises(ChainUnavailable):
        await made.chain.retained()
    failed = TrioClock().now()
    await trio.sleep(20)
    report = made.chain.reports()["chain:rpc"]
    assert (report.state, report.consecutive_failures, report.consecutive_successes) == ("open", 1, 0)
    assert report.last_failure_time is not None
    assert abs(report.last_failure_time - failed) < timedelta(seconds=1)
    assert abs(report.last_state_change - failed) < timedelta(seconds=1)


SECOND: Final = {"HORIZON_ENABLED": "true", "HORIZON_URL": "https://horizon"}


async def test_where_rpc_does_not_answer_horizon_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()), SECOND)
    await made.chain.check()
    made.net.scripts["one"].views["deposit"] = scval.to_int128(1)
    call = made.chain.vault.deposit(ALICE, 5)
    built = made.chain.build(call, source=ALICE, sequence=3, max_time=CLOSED_AT, fee=100)
    prepared = await made.chain.prepare(built)
    assert isinstance(prepared, Envelope)
    made.net.faults["one"] = DOWN
    made.net.horizon |= {
        f"/accounts/{ALICE}": (200, {"id": ALICE, "account_id": ALICE, "sequence": "41", "thresholds": {}}),
        "/transactions_async": (201, {"tx_status": "PENDING", "hash": prepared.hash}),
    }
    assert await made.chain.sequence_of(ALICE) == 41
    assert (await made.chain.send(prepared)).status == "pending"
    with pytest.raises(ChainUnavailable):  # that Horizon has none proves nothing
        await made.chain.transaction(prepared.hash)
    assert await made.chain.recorded(prepared.hash) is None
    made.net.horizon[f"/transactions/{prepared.hash}"] = (
        200,
        {"ledger": 990, "created_at": "2027-01-15T07:59:10Z", "result_xdr": result("txSUCCESS", invoked("SUCCESS"))},
    )
    told = await made.chain.transaction(prepared.hash)
    assert isinstance(told, Applied)
    assert (told.successful, told.ledger) == (True, 990)
    assert await made.chain.recorded(prepared.hash) == told
    made.net.faults["horizon"] = DOWN
    assert await made.chain.recorded(prepared.hash) is None
    assert set(made.chain.reports()) == {"chain:rpc", "chain:horizon"}
    assert await made.chain.health() == {"rpc": "down", "horizon": "down"}


async def test_what_may_have_been_sent_to_rpc_is_never_sent_to_horizon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript()), SECOND)
    await made.chain.check()
    made.net.scripts["one"].views["deposit"] = scval.to_int128(1)
    call = made.chain.vault.deposit(ALICE, 5)
    prepared = await made.chain.prepare(made.chain.build(call, source=ALICE, sequence=3, max_time=CLOSED_AT, fee=100))
    assert isinstance(prepared, Envelope)
    made.net.faults["one"] = httpx.Response(504)
    with pytest.raises(ChainOutcomeUnknown):
        await made.chain.send(prepared)
    assert not [path for _, host, path in made.net.requests if host == "horizon" and path == "/transactions_async"]


async def test_a_horizon_on_another_network_refuses_the_start(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()), SECOND)
    made.net.horizon["/"] = (200, {**HORIZON_ROOT, "network_passphrase": "Another Network"})
    with pytest.raises(ChainMismatch, match="Another Network"):
        await made.chain.check()


async def kept(made: Made, task: Callable[[], Awaitable[None]]) -> None:
    """Keep a task running as the service does."""
    supervisor = Supervisor(made.metrics, made.logs.logger("supervisor"), random.Random(1))
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - started as the service does
        await nursery.start(keep, supervisor, made.chain, "task", task)


async def test_a_task_that_crashes_again_and_again_halts_the_chain_and_raises_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript()), {"LOG_LEVEL": "fatal"})
    crashes = 0

    async def crash() -> None:  # noqa: ASYNC124
        nonlocal crashes
        crashes += 1
        raise ZeroDivisionError

    await kept(made, crash)
    assert crashes == 6
    assert made.chain.halted == "the task task crashed again and again"


async def test_a_task_that_finds_a_mismatch_halts_the_chain_at_once(autojump_clock: trio.testing.MockClock) -> None:
    made = Made(MemoryNet(one=RpcScript()))

    async def find() -> None:
        async with trio.open_nursery():  # what is raised inside comes in a group
            raise ChainMismatch("another history")

    await kept(made, find)
    assert made.chain.halted == "another history"


async def test_rpc_down_for_an_hour_costs_no_memory_and_few_requests_and_ends_by_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Made(MemoryNet(one=RpcScript(), two=RpcScript()), {"LOG_LEVEL": "error"})
    await made.chain.check()
    refused = 0

    async def ask_every_second() -> None:
        nonlocal refused
        while True:
            try:
                await made.chain.events(VAULT, cursor="c", start_ledger=None, limit=10)
            except ChainUnavailable:
                refused += 1
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.chain.run)
        nursery.start_soon(ask_every_second)
        await trio.sleep(60)
        made.net.faults |= {"one": DOWN, "two": httpx.Response(503, headers={"Retry-After": "3"})}
        await trio.sleep(600)
        made.net.requests.clear()
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        await trio.sleep(3600)
        made.net.requests, requests = [], made.net.requests
        count = len(requests)
        requests.clear()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert refused > 3000, "who asks is answered at once"
        assert count < 3600, "the nodes are left alone"
        assert grown < 200_000
        assert made.gauge("callora_chain_lag_seconds") > 4000
        assert (await made.chain.health())["rpc"] != "ok"
        made.net.faults.clear()
        await trio.sleep(120)
        refused = 0
        await trio.sleep(60)
        assert refused == 0
        assert await made.chain.health() == {"rpc": "ok"}
        nursery.cancel_scope.cancel()
