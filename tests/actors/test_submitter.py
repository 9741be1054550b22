"""The submitter on a real PostgreSQL and a network that does what the test says: everything is done once."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from io import StringIO
from random import Random
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from callora.actors.channels import SET_ASIDE_SECONDS, Signer
from callora.actors.follower import Store, Tools
from callora.actors.submitter import FOREIGN_SECONDS, SWEEP_SECONDS, Submitter
from callora.ledger.chain import Applied, ContractFault, Envelope, Sent
from callora.ledger.faults import (
    ChainMismatch,
    ChainOutcomeUnknown,
    ChainUnavailable,
    OutcomeUnknown,
    StoreRefused,
    StoreUnavailable,
)
from callora.ledger.submission import Alive, Dead, FeeBump, Submission
from callora.logs import Logs
from callora.metrics import Metrics
from callora.stellar.contracts import ContractCall
from callora.stellar.rpc import Leeway
from callora.store.bridge import Database
from callora.store.transactions import TransactionStore
from tests.simulation.chain_world import SkewedClock
from tests.simulation.sky import CALM, Key, Sky, View, Weather, account, bid_of, unseal
from tests.simulation.support import METRICS, Log
from tests.support.chain_rows import set_network
from tests.support.knife import Knife
from tests.support.passing_time import WatchedDatabase, passing_time

CHANNELS = tuple(account(number) for number in range(1, 5))
OWNER = account(10)
SPONSOR = account(11)
WALLET = account(20)


@attrs.define(eq=False)
class Spy(View):
    """A process's view that shows what is sent, and lets the test come between."""

    sky: Sky
    sent: list[Envelope] = attrs.field(factory=list)
    before_send: Callable[[Envelope], Awaitable[None]] | None = None
    leeways: list[Leeway] = attrs.field(factory=list)
    faults: list[ContractFault] = attrs.field(factory=list)
    """What the next simulations say."""

    def __attrs_post_init__(self) -> None:
        super().__init__(self.sky, slow=0.1)

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Prepare."""
        self.leeways.append(leeway)
        if self.faults:
            await trio.lowlevel.checkpoint()
            return self.faults.pop(0)
        return await super().prepare(envelope, leeway=leeway)

    async def send(self, envelope: Envelope) -> Sent:
        """Send."""
        self.sent.append(envelope)
        if self.before_send is not None:
            await self.before_send(envelope)
        return await super().send(envelope)


@attrs.define(eq=False)
class Running:
    """A submitter at work."""

    submitter: Submitter
    view: Spy
    store: TransactionStore
    log: Log
    scope: trio.CancelScope

    def call(self, purpose: str) -> Awaitable[Applied | ContractFault]:
        """Ask for a purpose."""
        return self.submitter.call(purpose, ContractCall(OWNER.address, "C", purpose))


@attrs.define(eq=False)
class Place:
    """A network, a database, and the processes that a test starts."""

    sky: Sky
    database: WatchedDatabase
    nursery: trio.Nursery

    async def start(self, **options: Any) -> Running:
        """Start a process; see `make`."""
        running = self.make(**options)

        ready = trio.Event()

        async def live() -> None:
            with running.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(running.submitter.run)
                    ready.set()

        self.nursery.start_soon(live)
        await ready.wait()
        return running

    def make(
        self,
        *,
        channels: tuple[Signer, ...] = CHANNELS,
        sponsor: Key | None = SPONSOR,
        witness: bool = False,
        bid_max: int = 10_000_000,
        store: Callable[[TransactionStore], Store] = lambda store: store,
        metrics: Metrics = METRICS,
    ) -> Running:
        """Make a process that does not run yet."""
        log, kept, view = Log(), TransactionStore(self.database), Spy(self.sky)
        tools = Tools("testnet", view, store(kept), sponsor, witness, bid_max, SkewedClock(), metrics, log.logger())
        submitter = Submitter(
            tools, channels=channels, authorities=(OWNER,), bid_of=bid_of, random=Random(0), base_fee=100
        )
        return Running(submitter, view, kept, log, trio.CancelScope())

    async def rows(self, columns: str = "state") -> list[object]:
        """Return what is stored, oldest first."""
        found = await self.database.fetch(f"SELECT {columns} FROM chain_transactions ORDER BY stored_at, sequence")
        return [next(iter(row.values())) if len(row) == 1 else tuple(row.values()) for row in found]

    async def rest(self) -> None:
        """Wait until everything stored has ended."""
        with trio.fail_after(3600):
            while set(await self.rows()) - {"succeeded", "failed", "dead"}:  # noqa: ASYNC110 - rows set no event
                await trio.sleep(1)


@asynccontextmanager
async def open_place(clock: MockClock, database: Database) -> AsyncIterator[Place]:
    """Run a network, and let time pass."""
    sky = Sky(Random(7))
    for key in (*CHANNELS, OWNER, SPONSOR, WALLET):
        sky.open_account(key)
    async with passing_time(clock, database) as watched, trio.open_nursery() as nursery:
        nursery.start_soon(sky.close_ledgers)
        yield Place(sky, watched, nursery)
        nursery.cancel_scope.cancel()
    assert sky.wrong == []


@pytest.fixture
async def place(mock_clock: MockClock, database: Database) -> AsyncIterator[Place]:
    """A calm network and an empty database."""
    async with open_place(mock_clock, database) as opened:
        yield opened


def deposit(sky: Sky, *, bid: int = 100, seconds: int = 300, signed: bool = True) -> Envelope:
    """Return a deposit as a wallet signed it."""
    draft = View(sky, slow=0).build(
        ContractCall(WALLET.address, "C", "deposit"),
        source=WALLET.address,
        sequence=sky.accounts[WALLET.address].sequences[-1][1] + 1,
        max_time=int(sky.head().closed_at.timestamp()) + seconds,
        fee=bid,
    )
    return WALLET.sign(draft) if signed else draft


# --- once -------------------------------------------------------------------------------------------------------------


async def test_a_call_is_stored_before_it_is_sent_and_signed_by_channel_and_authority(
    mock_clock: MockClock, place: Place
) -> None:
    process = await place.start()
    seen: list[Submission | None] = []

    async def look(envelope: Envelope) -> None:
        seen.append(await process.store.find(envelope.hash))

    process.view.before_send = look
    outcome = await process.call("pay")
    assert isinstance(outcome, Applied)
    assert outcome.successful
    assert place.sky.effects == {(1, "pay"): 1}
    first = seen[0]
    assert first is not None
    assert (first.state, first.sends, first.untaken) == ("sent", 1, 0), "and counted before it is sent"
    assert first.prepared_ledger == 100
    fields = unseal(process.view.sent[0])
    assert set(fields["signatures"]) == {fields["source"], OWNER.address}
    assert fields["source"] in {channel.address for channel in CHANNELS}
    assert await place.rows() == ["succeeded"]


async def test_a_purpose_that_repeats_gets_the_first_outcome(mock_clock: MockClock, place: Place) -> None:
    one, other = await place.start(), await place.start()
    first = await one.call("pay")
    assert await one.call("pay") == first
    assert await other.call("pay") == first
    one.scope.cancel()
    assert await (await place.start()).call("pay") == first
    assert place.sky.effects == {(1, "pay"): 1}
    assert len(await place.rows()) == 1


async def test_a_purpose_that_failed_by_the_contracts_rule_is_not_tried_again(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.weather = Weather(failing=1.0)
    process = await place.start()
    outcome = await process.call("pay")
    while isinstance(outcome, Applied) and (outcome.fault is None or outcome.fault.contract_error is None):
        raise AssertionError(outcome)
    place.sky.weather = CALM
    assert await process.call("pay") == outcome
    assert isinstance(outcome, Applied)
    assert outcome.fault is not None
    assert outcome.fault.contract_error in (4, 5)
    assert place.sky.effects == {}


async def test_two_submitters_that_meet_at_a_barrier_build_one_envelope(mock_clock: MockClock, place: Place) -> None:
    processes = [await place.start(), await place.start()]
    for number in range(1, 6):
        purpose = f"pay:{number}"
        outcomes: list[object] = []

        async def ask(process: Running, purpose: str = purpose, outcomes: list[object] = outcomes) -> None:
            outcomes.append(await process.call(purpose))

        async with trio.open_nursery() as nursery:
            for process in processes:
                for _ in range(2):
                    nursery.start_soon(ask, process)
        assert len(outcomes) == 4
        assert len(set(map(repr, outcomes))) == 1
        rows = await place.database.fetch("SELECT state FROM chain_transactions WHERE purpose = $1", purpose)
        assert [row["state"] for row in rows] == ["succeeded"]
    assert place.sky.effects == {(1, f"pay:{number}"): 1 for number in range(1, 6)}


async def test_calls_go_side_by_side_on_channels_and_one_after_another_on_each(
    mock_clock: MockClock, place: Place
) -> None:
    process = await place.start()
    most = 0

    async def watch(_: Envelope) -> None:
        nonlocal most
        rows = await place.database.fetch("SELECT source_account FROM chain_transactions WHERE state = 'sent'")
        sources = [row["source_account"] for row in rows]
        assert len(sources) == len(set(sources))
        most = max(most, len(sources))

    process.view.before_send = watch
    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(process.call, f"pay:{number}:a")
    assert most == len(CHANNELS)
    assert place.sky.effects == {(1, f"pay:{number}:a"): 1 for number in range(12)}
    assert set(await place.rows()) == {"succeeded"}


async def test_a_call_that_cannot_succeed_stores_and_sends_nothing(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    fault = ContractFault(3, "Error(Contract, #3)")
    process.view.faults.append(fault)
    assert await process.call("pay") == fault
    assert await place.rows() == []
    assert process.view.sent == []
    assert isinstance(await process.call("pay"), Applied), "it is simulated anew when it is asked for again"


async def test_a_call_has_leeway_from_the_first_and_more_after_it_was_short_of_resources(
    mock_clock: MockClock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await place.start()

    async def calm_down(_: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        if len({each.hash for each in process.view.sent}) > 1:
            place.sky.weather = CALM

    process.view.before_send = calm_down
    with monkeypatch.context() as patch:
        patch.setattr(place.sky.random, "choice", lambda _: "resource_limit_exceeded")
        place.sky.weather = Weather(failing=1.0)
        outcome = await process.call("pay")
    assert isinstance(outcome, Applied)
    assert outcome.successful
    assert process.view.leeways == ["some", "more"]


async def test_what_is_archived_is_restored_first(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    outcome = await process.call("pay:10")  # the sky has archived what purposes with a 0 at their end need
    assert isinstance(outcome, Applied)
    assert outcome.successful
    assert await place.rows("purpose") == ["restore1:pay:10", "pay:10"]


# --- crashes and cancellation -----------------------------------------------------------------------------------------


class CutStore:
    """A store at one of whose verbs the process dies, before or after it is done."""

    def __init__(self, store: TransactionStore, verb: str, moment: str, die: Callable[[], None]) -> None:
        self._store = store
        self._cut = verb, moment
        self._die = die

    def __getattr__(self, name: str) -> object:
        verb = getattr(self._store, name)
        if name != self._cut[0]:
            return verb

        async def cut(*args: object, **options: object) -> object:
            if self._cut[1] == "before":
                self._die()
                await trio.lowlevel.checkpoint()
            done = await verb(*args, **options)
            self._die()
            await trio.lowlevel.checkpoint()
            return done

        return cut


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("verb", ["add", "begin_send", "finish"])
async def test_a_process_that_dies_at_a_step_of_the_store_ends_it_exactly_once(
    mock_clock: MockClock, place: Place, verb: str, moment: str
) -> None:
    scope = trio.CancelScope()

    def cutting(store: TransactionStore) -> Store:
        return CutStore(store, verb, moment, scope.cancel)  # type: ignore[return-value]

    dying = place.make(store=cutting)
    with scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(dying.submitter.run)
            await dying.call("pay")
    assert scope.cancelled_caught
    heir = await place.start()
    if await place.rows():
        await place.rest()  # nobody needs to ask
    outcome = await heir.call("pay")
    assert isinstance(outcome, Applied)
    assert outcome.successful
    assert place.sky.effects == {(1, "pay"): 1}
    assert await place.rows() == ["succeeded"]


@pytest.mark.parametrize("taken", [True, False])
async def test_a_process_that_dies_between_the_send_and_its_note_ends_it_exactly_once(
    mock_clock: MockClock, place: Place, taken: bool
) -> None:
    scope = trio.CancelScope()
    dying = place.make()

    async def die(envelope: Envelope) -> None:
        if taken:
            place.sky.take(envelope, 0)
        scope.cancel()
        await trio.lowlevel.checkpoint()

    dying.view.before_send = die
    with scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(dying.submitter.run)
            await dying.call("pay")
    assert scope.cancelled_caught
    assert await place.rows("state, sends, untaken") == [("sent", 1, 0)]
    heir = await place.start()
    await place.rest()
    assert place.sky.effects == {(1, "pay"): 1}
    assert isinstance(await heir.call("pay"), Applied)
    assert await place.rows() == ["succeeded"]


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.proof)])
async def test_a_process_cut_at_any_of_its_waits_ends_it_exactly_once(
    mock_clock: MockClock, place: Place, step: int
) -> None:
    place.sky.weather = Weather(silent=0.3, idle=0.3, refusal=0.2)
    cut_at, cuts = 1, 0
    heir = await place.start()
    while True:
        purpose = f"pay-{cut_at}x"
        knife = Knife(cut_at)
        dying = place.make()
        with knife as scope, scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(dying.submitter.run)
                await dying.call(purpose)
                nursery.cancel_scope.cancel()
        outcome = await ask_until(heir, purpose)
        assert isinstance(outcome, Applied | ContractFault)
        assert place.sky.effects.get((1, purpose), 0) == (isinstance(outcome, Applied) and outcome.successful)
        cuts += knife.cut
        if not knife.cut and knife.waits < cut_at:
            break
        cut_at += step
    await place.rest()
    assert cuts > 2


async def ask_until(process: Running, purpose: str) -> Applied | ContractFault:
    """Ask for a purpose until somebody can tell."""
    while True:
        try:
            return await process.call(purpose)
        except (ChainUnavailable, StoreUnavailable, OutcomeUnknown):
            await trio.sleep(1)


async def test_a_caller_cancelled_at_any_of_its_waits_changes_nothing(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    cut_at = 1
    while True:
        purpose = f"pay-{cut_at}x"
        knife = Knife(cut_at)
        with knife as scope, scope:
            await process.call(purpose)
        outcome = await process.call(purpose)
        assert isinstance(outcome, Applied)
        assert place.sky.effects[1, purpose] == 1
        if not knife.cut:
            break
        cut_at += 2
    assert cut_at > 15
    assert set(await place.rows()) <= {"succeeded", "dead"}


async def test_a_drain_leaves_everything_stored_and_the_next_start_goes_on(mock_clock: MockClock, place: Place) -> None:
    place.sky.weather = Weather(idle=1.0)
    process = await place.start()
    for number in range(3):
        place.nursery.start_soon(quietly, partial(process.call, f"pay:{number}"))
    await trio.sleep(3)
    process.scope.cancel()
    await trio.sleep(1)
    assert set(await place.rows()) == {"sent"}
    place.sky.weather = CALM
    await place.start()
    await place.rest()
    assert set(await place.rows()) == {"succeeded"}


async def quietly(call: Callable[[], Awaitable[object]]) -> None:
    """Ask, whatever comes of it."""
    await call()


async def test_a_crashed_follower_is_started_again_and_concerns_no_other(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    crashes = 2

    async def crash(envelope: Envelope) -> None:
        nonlocal crashes
        await trio.lowlevel.checkpoint()
        if unseal(envelope)["purpose"] == "pay:1" and crashes:
            crashes -= 1
            raise RuntimeError("a bug")

    process.view.before_send = crash
    async with trio.open_nursery() as nursery:
        for number in (1, 2):
            nursery.start_soon(process.call, f"pay:{number}")
    assert process.log.events.count("transaction_follower_crashed") == 2
    assert place.sky.effects == {(1, "pay:1"): 1, (1, "pay:2"): 1}


# --- trouble with the database ----------------------------------------------------------------------------------------


class FlakyStore:
    """A store whose verbs fail the first time each: the write is lost, or stored without an answer."""

    def __init__(self, store: TransactionStore, fault: Exception, *, stored: bool, spare: tuple[str, ...]) -> None:
        self._store = store
        self._fault = fault
        self._stored = stored
        self._spare = set(spare)

    def __getattr__(self, name: str) -> object:
        verb = getattr(self._store, name)

        async def through(*args: object, **options: object) -> object:
            # Decided at each call: who tries again may keep what it got here.
            if name in self._spare:
                return await verb(*args, **options)
            self._spare.add(name)
            if self._stored:
                await verb(*args, **options)
            raise self._fault

        return through


READS = ("epoch", "of_purpose", "open_ones", "busy_channels", "last_sequence")


@pytest.mark.parametrize("stored", [True, False])
async def test_a_write_without_an_answer_is_looked_up_and_not_made_twice(
    mock_clock: MockClock, place: Place, stored: bool
) -> None:
    def flaky(store: TransactionStore) -> Store:
        fault = OutcomeUnknown("no answer")
        return FlakyStore(store, fault, stored=stored, spare=READS)  # type: ignore[return-value]

    process = await place.start(store=flaky)
    assert isinstance(await process.call("pay"), Applied)
    assert place.sky.effects == {(1, "pay"): 1}
    assert await place.rows() == ["succeeded"]


async def test_a_refusal_whose_note_has_no_answer_counts_as_a_send_in_doubt(
    mock_clock: MockClock, place: Place
) -> None:
    def flaky(store: TransactionStore) -> Store:
        spare = (*READS, "add", "begin_send", "find", "bury", "finish", "add_bump")
        return FlakyStore(store, OutcomeUnknown("no answer"), stored=False, spare=spare)  # type: ignore[return-value]

    place.sky.weather = Weather(refusal=1.0)
    process = await place.start(store=flaky, sponsor=None)

    async def calm_down(_: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        if len(process.view.sent) > 3:
            place.sky.weather = CALM

    process.view.before_send = calm_down
    assert isinstance(await process.call("pay"), Applied)
    assert place.sky.effects == {(1, "pay"): 1}
    refusals = sum(times for what, times in place.sky.count.items() if what.startswith("refused"))
    assert refusals > 1
    assert await place.rows("untaken") == [refusals - 1], "the one in doubt is never thought of as untaken"


async def test_a_database_that_is_away_before_anything_is_stored_is_the_callers_to_know(
    mock_clock: MockClock, place: Place
) -> None:
    def flaky(store: TransactionStore) -> Store:
        spare = ("epoch", "open_ones")
        return FlakyStore(store, StoreUnavailable("away"), stored=False, spare=spare)  # type: ignore[return-value]

    process = await place.start(store=flaky)
    with pytest.raises(StoreUnavailable):
        await process.call("pay")
    assert await place.rows() == []


async def test_a_halted_network_takes_nothing_new(mock_clock: MockClock, place: Place) -> None:
    await set_network(place.database, epoch=1, halted="another history")
    process = await place.start()
    with pytest.raises(ChainMismatch, match="another history"):
        await process.call("pay")
    with pytest.raises(ChainMismatch, match="another history"):
        await process.submitter.pass_on("deposit", deposit(place.sky), place.sky.ledger)
    assert await place.rows() == []


# --- trouble with the network -----------------------------------------------------------------------------------------


async def test_a_channel_that_cannot_pay_is_set_aside_with_an_alert_and_another_used(
    mock_clock: MockClock, place: Place
) -> None:
    poor, missing, rich = CHANNELS[0], account(99), CHANNELS[1]
    place.sky.accounts[poor.address].xlm = 0
    process = await place.start(channels=(poor, missing, rich))
    for number in range(6):
        assert isinstance(await process.call(f"pay:{number}"), Applied)
    assert process.log.events.count("channel_set_aside") == 2
    assert METRICS.chain_channels_set_aside._value.get() == 2
    place.sky.accounts[poor.address].xlm = 10**9
    place.sky.accounts[rich.address].xlm = 0
    place.sky.open_account(missing)
    await trio.sleep(SET_ASIDE_SECONDS)
    assert isinstance(await process.call("pay:7"), Applied), "an operator has topped it up"


@pytest.mark.parametrize("code", ["tx_bad_auth", "tx_bad_auth_extra"])
async def test_wrong_keys_stop_the_submitter_with_an_alert(
    mock_clock: MockClock, place: Place, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    process = await place.start(metrics=metrics)
    monkeypatch.setattr(place.sky, "take", lambda _, lag: Sent("refused", code, place.sky.head()))
    with pytest.raises(ChainMismatch, match=code):
        await process.call("pay")
    assert "submitter_stopped" in process.log.events
    sends = len(process.view.sent)
    with pytest.raises(ChainMismatch):
        await process.call("pay:2")
    assert len(process.view.sent) == sends
    assert b"callora_chain_submitter_stopped 1.0" in metrics.render()
    assert await place.rows("state, refusal") == [("dead", code)]


async def test_what_would_be_refused_again_is_given_up_for_its_purpose_alone(
    mock_clock: MockClock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await place.start()
    with monkeypatch.context() as patch:
        patch.setattr(place.sky, "take", lambda _, lag: Sent("refused", "tx_malformed", place.sky.head()))
        with pytest.raises(ChainMismatch, match="tx_malformed"):
            await process.call("pay")
    assert process.submitter.stopped is None
    assert isinstance(await process.call("pay:2"), Applied)


async def test_a_call_whose_key_is_not_here_is_refused(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    with pytest.raises(ChainMismatch, match=WALLET.address):
        await process.submitter.call("pay", ContractCall(WALLET.address, "C", "pay"))


async def test_without_channels_the_authority_lends_its_own_numbers(mock_clock: MockClock, place: Place) -> None:
    process = await place.start(channels=())
    assert isinstance(await process.call("pay"), Applied)
    assert {unseal(each)["source"] for each in process.view.sent} == {OWNER.address}


async def test_what_is_stuck_in_a_surge_is_rescued_by_a_fee_bump_and_known_by_both_hashes(
    mock_clock: MockClock, place: Place
) -> None:
    process = await place.start()

    async def surge(_: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        place.sky.weather = Weather(surge=150) if len(process.view.sent) < 2 else Weather(surge=5_000)

    process.view.before_send = surge
    outcome = await process.call("pay")
    assert isinstance(outcome, Applied)
    assert outcome.successful
    (hashes,) = await place.rows("encode(hash, 'hex')")
    bumps = await place.database.fetch("SELECT encode(hash, 'hex') AS hash, bid FROM chain_bumps")
    assert [row["bid"] >= 1_000 for row in bumps] == [True]
    for tx_hash in (hashes, bumps[0]["hash"]):
        assert await process.submitter.outcome(str(tx_hash)) == outcome
    assert {each.inner_hash or each.hash for each in process.view.sent} == {hashes}, "one inner transaction"


async def test_a_bid_has_a_bound_and_what_is_dead_for_it_is_built_anew(mock_clock: MockClock, place: Place) -> None:
    process = await place.start(bid_max=500)
    place.sky.weather = Weather(surge=150)

    async def surge(_: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        if len(process.view.sent) > 1:
            place.sky.weather = CALM if len(process.view.sent) > 12 else Weather(surge=600)

    process.view.before_send = surge
    assert isinstance(await process.call("pay"), Applied)
    assert "transaction_at_bid_max" in process.log.events
    assert await place.database.fetch_value("SELECT count(*) FROM chain_bumps") == 0
    assert place.sky.effects == {(1, "pay"): 1}


async def test_a_chain_that_is_away_for_an_hour_is_waited_for(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    outcomes: list[object] = []

    async def ask() -> None:
        outcomes.append(await ask_until(process, "pay"))

    place.nursery.start_soon(ask)
    await trio.sleep(2)
    place.sky.weather = Weather(away=1.0)
    await trio.sleep(3600)
    place.sky.weather = CALM
    await trio.sleep(60)
    assert len(outcomes) == 1
    assert place.sky.effects == {(1, "pay"): 1}


async def test_what_nobody_can_tell_is_told_to_the_caller_and_to_an_operator(
    mock_clock: MockClock, place: Place
) -> None:
    process = await place.start(sponsor=None)
    place.sky.weather = Weather(idle=1.0)

    async def forget(_: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        place.sky.weather = Weather(idle=1.0, kept=2)

    process.view.before_send = forget
    with pytest.raises(ChainOutcomeUnknown):
        await process.call("pay")
    with pytest.raises(ChainOutcomeUnknown):
        await process.call("pay")
    assert "transaction_unresolved" in process.log.events
    assert await place.rows() == ["unresolved"]
    process.view.before_send = None
    other = await process.call("pay:2") if len(CHANNELS) == 1 else None
    assert other is None
    place.sky.weather = CALM
    assert isinstance(await ask_until(process, "pay"), Applied), "a node that goes back far enough settles it"
    assert await place.rows() == ["dead", "succeeded"]


async def test_the_second_witness_saves_what_the_first_calls_dead(
    mock_clock: MockClock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await place.start(witness=True)
    look = Sky.head
    lost: set[str] = set()

    async def blind(self: View, tx_hash: str) -> object:
        found = await View._ask(self, lambda: place.sky.applied.get(tx_hash))
        if found is not None:
            lost.add(tx_hash)
        from callora.ledger.chain import NotSeen, Retained

        return NotSeen(Retained(1, look(place.sky)))

    monkeypatch.setattr(Spy, "transaction", blind)
    assert isinstance(await process.call("pay"), Applied)
    assert lost, "the node did not know what was applied"
    assert await place.rows() == ["succeeded"]


# --- what others signed -----------------------------------------------------------------------------------------------


async def test_what_a_wallet_signed_is_stored_when_it_is_passed_on_and_sent_as_it_is(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.weather = Weather(away=1.0)
    process = await place.start()
    envelope = deposit(place.sky)
    tx_hash = await process.submitter.pass_on("deposit", envelope, place.sky.ledger)
    assert await place.rows("envelope") == [envelope.xdr]
    assert isinstance(await process.submitter.outcome(tx_hash), Alive)
    place.sky.weather = CALM
    await place.rest()
    assert {each.xdr for each in process.view.sent} == {envelope.xdr}
    assert isinstance(await process.submitter.outcome(tx_hash), Applied)
    assert await process.submitter.pass_on("deposit", envelope, place.sky.ledger) == tx_hash, "again is no error"
    assert await process.submitter.outcome("ab" * 32) is None


async def test_another_envelope_for_the_same_purpose_is_not_passed_on(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    first = deposit(place.sky)
    second = deposit(place.sky, bid=200)
    assert await process.submitter.pass_on("deposit", first, place.sky.ledger) == first.hash
    assert await process.submitter.pass_on("deposit", second, place.sky.ledger) == first.hash
    await place.rest()
    assert {each.hash for each in process.view.sent} == {first.hash}


async def test_a_sponsored_deposit_of_a_wallet_without_xlm_is_paid_for(mock_clock: MockClock, place: Place) -> None:
    place.sky.accounts[WALLET.address].xlm = 0
    process = await place.start()
    envelope = deposit(place.sky)
    await process.submitter.pass_on("deposit", envelope, place.sky.ledger, sponsored=True)
    await place.rest()
    assert isinstance(await process.submitter.outcome(envelope.hash), Applied)
    assert place.sky.effects == {(1, "deposit"): 1}


async def test_a_deposit_whose_sponsor_is_out_of_xlm_is_paid_by_the_wallet_and_an_operator_is_told(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.accounts[SPONSOR.address].xlm = 0
    before = place.sky.accounts[WALLET.address].xlm
    process = await place.start()
    signed = deposit(place.sky)
    tx_hash = await process.submitter.pass_on("deposit", SPONSOR.bump(signed, 100), place.sky.ledger)
    assert tx_hash == signed.hash
    await place.rest()
    assert isinstance(await process.submitter.outcome(tx_hash), Applied)
    assert place.sky.effects == {(1, "deposit"): 1}
    assert [each.hash == signed.hash for each in process.view.sent] == [False, True]
    assert place.sky.accounts[WALLET.address].xlm < before
    assert "sponsor_cannot_pay" in process.log.events


async def test_a_sponsor_that_is_topped_up_in_time_pays_for_a_wallet_without_xlm(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.accounts[SPONSOR.address].xlm = place.sky.accounts[WALLET.address].xlm = 0
    process = await place.start()
    tx_hash = await process.submitter.pass_on("deposit", SPONSOR.bump(deposit(place.sky), 100), place.sky.ledger)
    await trio.sleep(60)
    assert await process.submitter.outcome(tx_hash) == Alive("sent", "tx_insufficient_balance")
    place.sky.accounts[SPONSOR.address].xlm = 10**9
    await place.rest()
    assert isinstance(await process.submitter.outcome(tx_hash), Applied)


async def test_a_rescue_that_its_sponsor_cannot_pay_leaves_the_transaction_to_its_own_bid(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.accounts[SPONSOR.address].xlm = 0
    place.sky.weather = Weather(idle=1.0)
    process = await place.start()

    async def calm_down(envelope: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        if any(each.inner_hash is not None for each in process.view.sent) and envelope.inner_hash is None:
            place.sky.weather = CALM

    process.view.before_send = calm_down
    assert isinstance(await process.call("pay"), Applied)
    assert "sponsor_cannot_pay" in process.log.events
    assert await place.rows() == ["succeeded"]


async def test_a_deposit_that_is_not_sponsored_never_costs_callora_anything(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.accounts[WALLET.address].xlm = 0
    process = await place.start()
    envelope = deposit(place.sky, seconds=60)
    await process.submitter.pass_on("deposit", envelope, place.sky.ledger)
    await place.rest()
    assert await process.submitter.outcome(envelope.hash) == Dead("tx_insufficient_balance")
    assert await place.database.fetch_value("SELECT count(*) FROM chain_bumps") == 0


async def test_what_a_wallet_signed_wrongly_waits_for_its_time_bound(mock_clock: MockClock, place: Place) -> None:
    process = await place.start()
    envelope = deposit(place.sky, signed=False)
    await process.submitter.pass_on("deposit", envelope, place.sky.ledger)
    await trio.sleep(200)
    assert await process.submitter.outcome(envelope.hash) == Alive("sent", "tx_bad_auth")
    assert len(process.view.sent) == 1, "it would be refused again"
    place.sky.take(WALLET.sign(envelope), 0)  # the wallet sends it itself, well signed
    await place.rest()
    assert isinstance(await process.submitter.outcome(envelope.hash), Applied)


async def test_another_rule_of_the_database_is_the_callers_to_know(
    mock_clock: MockClock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await place.start()

    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreRefused("no", constraint="payment_of_open_withdrawal", sqlstate="23001")

    monkeypatch.setattr(process.store, "add", refuse)
    with pytest.raises(StoreRefused):
        await process.call("pay")
    assert process.view.sent == []


# --- several processes, metrics, logs ---------------------------------------------------------------------------------


async def test_what_another_process_follows_is_left_to_it_until_it_is_silent(
    mock_clock: MockClock, place: Place
) -> None:
    place.sky.weather = Weather(idle=1.0)
    one = await place.start()
    other = await place.start()
    place.nursery.start_soon(quietly, partial(one.call, "pay"))
    await trio.sleep(FOREIGN_SECONDS)
    assert other.view.sent == []
    one.scope.cancel()
    place.sky.weather = CALM
    with trio.fail_after(FOREIGN_SECONDS + SWEEP_SECONDS + 15):
        await place.rest()
    assert place.sky.effects == {(1, "pay"): 1}


async def test_what_is_under_way_is_shown(mock_clock: MockClock, place: Place) -> None:
    metrics = Metrics()
    place.sky.weather = Weather(idle=1.0)
    process = await place.start(metrics=metrics)
    place.nursery.start_soon(quietly, partial(process.call, "pay"))
    await trio.sleep(SWEEP_SECONDS + 1)
    text = metrics.render().decode()
    assert 'callora_chain_transactions_open{state="sent"} 1.0' in text
    assert f"callora_chain_channels_free {len(CHANNELS) - 1}.0" in text
    assert 'callora_chain_sends_total{answer="pending"} 1.0' in text
    place.sky.weather = CALM
    await place.rest()
    await trio.sleep(SWEEP_SECONDS + 1)
    text = metrics.render().decode()
    assert 'callora_chain_transactions_open{state="sent"} 0.0' in text
    assert 'callora_chain_transactions_ended_total{outcome="succeeded"} 1.0' in text
    assert "callora_chain_transaction_oldest_seconds 0.0" in text


async def test_no_log_has_an_envelope_or_a_key(mock_clock: MockClock, place: Place) -> None:
    stream = StringIO()
    logs = Logs(SkewedClock(), level="debug", stream=stream)
    running = place.make()
    running.submitter._tools = attrs.evolve(running.submitter._tools, log=logs.logger("submitter"))
    place.sky.weather = Weather(silent=0.5, refusal=0.5, idle=0.5)
    async with trio.open_nursery() as nursery:
        await nursery.start(running.submitter.run)
        await ask_until(running, "pay:1")
        await ask_until(running, "pay:2")
        nursery.cancel_scope.cancel()
    logs.flush()
    text = stream.getvalue()
    assert running.view.sent
    assert text.count("\n") > 3
    for each in running.view.sent:
        assert each.xdr not in text
        assert json.dumps(each.xdr)[1:-1] not in text
    assert "signatures" not in text
    assert FeeBump.__name__ not in text
