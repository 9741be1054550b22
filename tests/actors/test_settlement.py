"""Settlement: developers are paid what they earned, once, whoever dies, whoever else runs, whatever the chain says."""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from stellar_sdk import scval
from trio.testing import MockClock

from callora.ledger.chain import Applied, ContractFault, Envelope, Simulated
from callora.ledger.faults import CalloraFault, ChainMismatch, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops
from callora.ledger.settlement import TRANSITIONS
from callora.stellar.contracts import ContractCall
from callora.stellar.sandbox.faults import Fault
from callora.store import settlements as store
from callora.store.bridge import Database
from tests.support.passing_time import passing_time
from tests.support.payroll import CLOSE_SECONDS, OPENING, PLATFORM, Payroll, Process, payroll

USDC = 10_000_000
PATIENCE_SECONDS = 3600.0
SETTLEMENTS_TOLD = "SELECT count(*) FROM outbox WHERE type LIKE 'settlement%'"


@pytest.fixture
async def at(mock_clock: MockClock, database: Database) -> AsyncIterator[Payroll]:
    """A payroll beside which time passes, ledgers close, and whose audit is clean in the end."""
    async with passing_time(mock_clock, database) as watched, payroll(watched) as opened:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.town.sandbox.ledger.run, CLOSE_SECONDS)
            yield opened
            nursery.cancel_scope.cancel()
        assert await opened.findings() == []


@asynccontextmanager
async def at_work(at: Payroll, **changes: Any) -> AsyncIterator[Process]:
    """Run a process that settles by itself."""
    async with at.process(**changes) as process, trio.open_nursery() as nursery:
        await nursery.start(process.settlements.run)
        yield process
        nursery.cancel_scope.cancel()


async def settled(at: Payroll, count: int = 1) -> None:
    """Return when so many settlements have been made, and all have ended."""
    with trio.fail_after(PATIENCE_SECONDS):
        while len(await at.states()) < count or not await at.all_ended():  # noqa: ASYNC110 - rows set no event
            await trio.sleep(1)


async def walked(at: Payroll, process: Process) -> None:
    """Take everything under way to its end in one process."""
    with trio.fail_after(PATIENCE_SECONDS):
        for each in await store.under_way(at.database, "testnet"):
            await process.settlements.walk(each.settlement_id)


async def earners(at: Payroll, count: int, stroops: int = 7 * USDC) -> dict[DeveloperId, int]:
    """Return developers who have earned something."""
    earned = {await at.developer(): stroops + number for number in range(count)}
    await at.earn(earned)
    return earned


# --- from end to end --------------------------------------------------------------------------------------------------


async def test_developers_are_credited_what_they_earned_and_the_vault_is_charged_for_it(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 3)
    async with at_work(at) as process:
        await settled(at)
        assert await at.states() == ["completed"]
        assert await at.paid() == earned
        assert at.vault_has(process.chain) == OPENING - sum(earned.values())
    rows = await at.database.fetch("SELECT type, payload FROM outbox WHERE type LIKE 'settlement%'")
    assert {row["type"] for row in rows} == {"settlement_completed"}
    assert len(rows) == 3


async def test_the_platform_is_credited_its_share_and_nobody_else_pays_for_it(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 3)
    async with at_work(at, fee_bps=1000) as process:
        await settled(at)
        fees = {developer: amount // 10 for developer, amount in earned.items()}
        assert await at.paid() == {developer: amount - fees[developer] for developer, amount in earned.items()}
        assert at.on_chain(PLATFORM.public_key) == sum(fees.values())
        assert at.vault_has(process.chain) == OPENING - sum(earned.values())


async def test_developers_are_settled_by_two_transactions_for_fifty(mock_clock: MockClock, at: Payroll) -> None:
    earned = await earners(at, 51)
    async with at_work(at):
        await settled(at, 2)
        assert await at.paid() == earned
    assert await at.database.fetch_value("SELECT count(*) FROM chain_transactions") == 4


async def test_less_than_the_minimum_is_carried_over_to_the_next_settlement(mock_clock: MockClock, at: Payroll) -> None:
    small, large = await at.developer(), await at.developer()
    await at.earn({small: 3 * USDC, large: 5 * USDC})
    async with at.process(payout_min=Stroops(5 * USDC)) as process:
        await process.settlements.settle()
        await walked(at, process)
        assert await at.paid() == {small: 0, large: 5 * USDC}
        await at.earn({small: 2 * USDC, large: 4 * USDC})
        await process.settlements.settle()
        await walked(at, process)
        assert await at.paid() == {small: 5 * USDC, large: 5 * USDC}


async def test_who_cannot_be_paid_is_left_out_and_told_why_and_the_others_are_paid(
    mock_clock: MockClock, at: Payroll
) -> None:
    good = await at.developer()
    kinds: dict[str, dict[str, bool]] = {
        "no_wallet": {"wallet": False},
        "no_account": {"account": False},
        "no_trustline": {"trusts": False},
    }
    bad = {reason: await at.developer(**kind) for reason, kind in kinds.items()}
    await at.earn(dict.fromkeys([good, *bad.values()], 6 * USDC))
    async with at.process() as process:
        said = await process.settlements.settle()
        await walked(at, process)
        assert (await at.paid())[good] == 6 * USDC
        rows = await at.database.fetch("SELECT developer_id, held_back FROM revenue_accounts WHERE held_back <> ''")
        assert {row["held_back"]: str(row["developer_id"]) for row in rows} == bad
        assert all(reason in said for reason in bad)
        at.wallets[bad["no_trustline"]].trust(at.town.usdc)
        await process.settlements.settle()
        await walked(at, process)
        assert (await at.paid())[bad["no_trustline"]] == 6 * USDC


async def test_a_run_that_somebody_asks_for_does_not_wait_for_the_interval(mock_clock: MockClock, at: Payroll) -> None:
    async with at_work(at, interval_seconds=1e6):
        await trio.sleep(30)
        earned = await earners(at, 2)
        began = trio.current_time()
        wanted_at = await store.ask_for_run(at.database, "testnet")
        await settled(at)
        assert trio.current_time() - began < 60
        runner = await store.runner(at.database, "testnet")
        assert runner.served_at is not None
        assert runner.served_at >= wanted_at
        assert runner.said == "1 settlements pay 14.0000001 USDC to 2 developers"
        assert await at.paid() == earned


# --- what stops it ----------------------------------------------------------------------------------------------------


async def test_a_drift_of_one_stroop_stops_new_settlements_until_an_operator_lets_them_go_on(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 2)
    await at.database.execute("UPDATE chain_networks SET settlement_halted = 'drift'")
    async with at.process() as process:
        assert "drift" in await process.settlements.settle()
        assert await at.states() == []
        await at.database.execute("UPDATE chain_networks SET settlement_halted = NULL")
        await process.settlements.settle()
        await at.database.execute("UPDATE chain_networks SET settlement_halted = 'drift'")
        with trio.move_on_after(600):
            await walked(at, process)
        assert await at.states() == ["sealed"], "what is sealed is not charged either"
        await at.database.execute("UPDATE chain_networks SET settlement_halted = NULL")
        await walked(at, process)
        assert await at.paid() == earned


async def test_what_is_charged_is_credited_though_settlement_is_halted_meanwhile(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = await earners(at, 2)
    booked = store.book_charge

    async def book_and_halt(*args: Any) -> bool:
        done = await booked(*args)
        await at.database.execute("UPDATE chain_networks SET settlement_halted = 'drift'")
        return done

    monkeypatch.setattr(store, "book_charge", book_and_halt)
    async with at.process() as process:
        await process.settlements.settle()
        await walked(at, process)
        assert await at.paid() == earned


async def test_two_processes_share_the_cap_of_a_key_and_what_is_above_it_waits(
    mock_clock: MockClock, at: Payroll
) -> None:
    await earners(at, 6, 10 * USDC)
    cap = Stroops(21 * USDC)
    async with at.process(charging_cap=cap) as one, at.process(charging_cap=cap) as other:
        await one.settlements.settle()
        assert len(await at.states()) == 3
        with trio.move_on_after(200):
            async with trio.open_nursery() as nursery:
                for number, each in enumerate(await store.under_way(at.database, "testnet")):
                    nursery.start_soon((one, other)[number % 2].settlements.walk, each.settlement_id)
        assert sorted(await at.states()) == ["completed", "sealed", "sealed"]
        assert "signer_cap_reached" in at.log.events


async def test_who_has_earned_more_than_an_hours_cap_is_left_out_and_told_why(
    mock_clock: MockClock, at: Payroll
) -> None:
    rich, poor = await at.developer(), await at.developer()
    await at.earn({rich: 50 * USDC, poor: 5 * USDC})
    async with at.process(crediting_cap=Stroops(10 * USDC)) as process:
        await process.settlements.settle()
        await walked(at, process)
        assert await at.paid() == {rich: 0, poor: 5 * USDC}
        reason = "SELECT held_back FROM revenue_accounts WHERE developer_id = $1"
        assert await at.database.fetch_value(reason, rich) == "over_cap"


async def test_keys_that_are_not_the_contracts_settle_nothing(mock_clock: MockClock, at: Payroll) -> None:
    await earners(at, 1)
    for wrong in ("charger", "crediter"):
        async with at.process(**{wrong: PLATFORM.public_key}) as process:
            with pytest.raises(ChainMismatch, match="SETTLEMENT_C"):
                await process.settlements.check()
            with pytest.raises(ChainMismatch):
                await process.settlements.settle()
    assert await at.states() == []


async def test_no_more_is_sealed_than_the_vault_contract_has(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    await earners(at, 2)

    async def balance() -> int:
        await trio.lowlevel.checkpoint()
        return 14 * USDC

    async with at.process() as process:
        monkeypatch.setattr(process.chain, "balance", balance)
        assert "lacks funds for 14.0000001" in await process.settlements.settle()
    assert await at.states() == []


# --- who dies ---------------------------------------------------------------------------------------------------------

VERBS = ("seal", "begin_charge", "book_charge", "begin_credits", "book_credits", "complete")
"""What stores a settlement's steps, in their order."""


def test_every_step_of_the_states_that_leads_to_payment_is_stored_by_a_verb_that_is_cut() -> None:
    path, state = [], "open"
    while TRANSITIONS[state]:  # type: ignore[index]
        (state,) = TRANSITIONS[state] - {"failed"}  # type: ignore[index]
        path.append(state)
    verbs = {"sealed": "seal", "charge_sent": "begin_charge", "charged": "book_charge"}
    verbs |= {"credit_sent": "begin_credits", "completed": "complete"}
    assert [verbs[state] for state in path] == [verb for verb in VERBS if verb != "book_credits"]


class Killed(BaseException):
    """A process has died."""


@attrs.define
class Axe:
    """Kills a process before or after something is stored or done, once."""

    moment: str
    struck: bool = False

    def on(self, verb: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return the verb under the axe."""

        async def cut(*args: Any, **more: Any) -> Any:
            if self.moment == "before" and not self.struck:
                self.struck = True
                raise Killed
            done = await verb(*args, **more)
            if self.moment == "after" and not self.struck:
                self.struck = True
                raise Killed
            return done

        return cut


async def dies(at: Payroll, work: Callable[[Process], Awaitable[None]]) -> None:
    """Do something in a process that dies over it."""
    died = False

    async def live() -> None:
        nonlocal died
        try:
            async with at.process() as process:
                await work(process)
        except* Killed:
            died = True

    await live()
    assert died


@pytest.mark.parametrize(
    ("verb", "moment"),
    [
        *(("call:charge", moment) for moment in ("before", "after")),
        *(("call:credit", moment) for moment in ("before", "after")),
        *((verb, "after") for verb in VERBS),
        *(pytest.param(verb, "before", marks=pytest.mark.proof) for verb in VERBS),
    ],
)
async def test_a_process_that_dies_around_any_step_pays_nobody_twice_and_leaves_nobody_unpaid(
    mock_clock: MockClock, at: Payroll, verb: str, moment: str
) -> None:
    earned = await earners(at, 3)
    axe = Axe(moment)

    async def work(process: Process) -> None:
        async with AsyncExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if verb.startswith("call"):
                sender, real = process.settlements._sender, process.submitter.call
                cut = axe.on(real)

                async def call(purpose: str, what: Any) -> Any:
                    return await (cut if purpose.startswith(verb[5:]) else real)(purpose, what)

                patch.setattr(sender, "call", call)
            else:
                patch.setattr(store, verb, axe.on(getattr(store, verb)))
            await process.settlements.settle()
            await walked(at, process)

    await dies(at, work)
    assert axe.struck
    assert await at.database.fetch_value("SELECT count(*) FROM settlements WHERE state = 'open'") == 0
    async with at_work(at) as process:
        await settled(at)
        assert await at.paid() == earned
        assert at.vault_has(process.chain) == OPENING - sum(earned.values())
    assert await at.database.fetch_value(SETTLEMENTS_TOLD) == 3


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_process_that_dies_while_it_gives_up_releases_revenue_once(
    mock_clock: MockClock, at: Payroll, moment: str
) -> None:
    earned = await earners(at, 2)
    axe = Axe(moment)
    await at.pause()

    async def work(process: Process) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process.chain, "is_paused", not_paused)
            patch.setattr(store, "fail", axe.on(store.fail))
            await process.settlements.settle()
            await walked(at, process)

    await dies(at, work)
    await at.pause("unpause")
    async with at_work(at):
        await settled(at, 1 if moment == "before" else 2)
        assert await at.paid() == earned


async def not_paused() -> bool:
    """Answer as a contract that is paused a moment later."""
    await trio.lowlevel.checkpoint()
    return False


# --- who else runs ----------------------------------------------------------------------------------------------------


async def test_defect_18_two_processes_that_settle_at_once_pay_everyone_once(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 5)
    async with at.process(charging_cap=Stroops(15 * USDC)) as one, at.process() as other:

        async def work(process: Process) -> None:
            while True:
                try:
                    await process.settlements.settle()
                    break
                except CalloraFault:
                    await trio.sleep(1)
            async with trio.open_nursery() as nursery:
                for each in await store.under_way(at.database, "testnet"):
                    nursery.start_soon(process.settlements.walk, each.settlement_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, one)
            nursery.start_soon(work, other)
        await walked(at, one)
        assert await at.paid() == earned
        assert at.vault_has(one.chain) == OPENING - sum(earned.values())


async def test_one_process_holds_the_lease_and_another_takes_it_when_it_ends(
    mock_clock: MockClock, at: Payroll
) -> None:
    async with at.process() as one, at.process() as other, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await one.settlements.run()

        nursery.start_soon(first)
        await trio.sleep(3)
        nursery.start_soon(other.settlements.run)
        await trio.sleep(30)
        assert at.log.events.count("settlement_runner_begins") == 1
        scope.cancel()
        await trio.sleep(3)
        assert at.log.events.count("settlement_runner_begins") == 2
        nursery.cancel_scope.cancel()


# --- what the chain says ----------------------------------------------------------------------------------------------


async def test_defect_14_the_hash_of_a_settlement_is_a_transaction_in_a_ledger(
    mock_clock: MockClock, at: Payroll
) -> None:
    await earners(at, 1)
    async with at_work(at) as process:
        await settled(at)
        row = await at.database.fetch_row(
            "SELECT encode(s.charge_hash, 'hex') AS charge, encode(c.hash, 'hex') AS credit"
            " FROM settlements s JOIN settlement_credits c USING (settlement_id)"
        )
        assert row is not None
        for tx_hash in (row["charge"], row["credit"]):
            found = await process.chain.transaction(tx_hash)
            assert isinstance(found, Applied)
            assert found.successful


async def test_defect_15_a_payment_whose_booking_fails_keeps_its_hash_and_is_not_made_again(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = await earners(at, 2)
    real, failures = store.book_credits, [StoreUnavailable("away"), OutcomeUnknown("who knows")]

    async def book(*args: Any) -> bool:
        if failures:
            raise failures.pop()
        return await real(*args)

    monkeypatch.setattr(store, "book_credits", book)
    async with at_work(at):
        await settled(at)
        assert await at.paid() == earned
    assert await at.states() == ["completed"]
    assert await at.database.fetch_value("SELECT count(*) FROM chain_transactions") == 2


async def test_defect_17_a_transaction_that_no_node_knows_is_pending_until_its_time_is_past(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 2)
    at.town.sandbox.plan.add(Fault("lose", method="sendTransaction", times=10_000))
    async with at_work(at):
        await trio.sleep(80)
        assert await at.states() == ["charge_sent"], "no node knows it, and it may come"
        at.town.sandbox.plan.clear()
        await settled(at)
        assert await at.paid() == earned
    assert await at.states() == ["completed"]


async def test_defect_19_sums_of_amounts_that_no_float_has_are_exact(mock_clock: MockClock, at: Payroll) -> None:
    developer = await at.developer()
    await at.earn({developer: 1}, calls=3)
    await at.earn({developer: 2**53 // 1000 + 1}, calls=3)
    async with at_work(at):
        await settled(at)
        assert await at.paid() == {developer: 3 * (2**53 // 1000 + 2)}


async def test_defect_20_who_is_paid_is_the_wallet_of_the_user_whose_developer_earned(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 2)
    async with at_work(at):
        await settled(at)
    rows = await at.database.fetch(
        "SELECT i.developer_id, i.address, u.wallet_address, o.user_id = u.user_id AS told FROM settlement_items i"
        " JOIN developers d USING (developer_id) JOIN users u USING (user_id)"
        " JOIN outbox o ON o.subject = 'settlement:' || i.settlement_id || ':' || i.developer_id"
    )
    assert {str(row["developer_id"]) for row in rows} == set(earned)
    assert all(row["address"] == row["wallet_address"] and row["told"] for row in rows)


async def test_defect_26_nobody_is_told_of_a_settlement_before_its_credit_is_in_a_ledger(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    await earners(at, 1)
    told: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        real = getattr(store, name)

        async def verb(*args: Any) -> Any:
            told.append((name, await at.database.fetch_value(SETTLEMENTS_TOLD)))
            return await real(*args)

        monkeypatch.setattr(store, name, verb)

    for name in VERBS[1:]:
        watch(name)
    async with at_work(at):
        await settled(at)
    assert told == [(name, 0) for name in VERBS[1:]]
    row = await at.database.fetch_row("SELECT o.type, o.payload, c.hash FROM outbox o, settlement_credits c")
    assert row is not None
    assert json.loads(row["payload"])["txHash"] == row["hash"].hex()


async def test_a_charge_that_the_contract_knows_already_is_taken_as_made(mock_clock: MockClock, at: Payroll) -> None:
    earned = await earners(at, 2)
    async with at.process() as process:
        await process.settlements.settle()
        (under_way,) = await store.under_way(at.database, "testnet")
        settlement = await store.find(at.database, under_way.settlement_id)
        assert settlement is not None
        # As by a service whose database was restored from before it: the same ids, under no purpose that is known.
        call = process.settlements._charging(settlement.charged_items())
        made = await process.submitter.call("forgotten:1", call)
        assert isinstance(made, Applied)
        assert made.successful
        await walked(at, process)
        assert await at.paid() == earned
        assert at.vault_has(process.chain) == OPENING - sum(earned.values())
    assert await at.database.fetch_value("SELECT charged_by FROM settlements") == "found"
    assert "charge_found" in at.log.events


async def test_who_fails_a_charge_is_held_back_and_the_others_are_settled_without_him(
    mock_clock: MockClock, at: Payroll
) -> None:
    earned = await earners(at, 3)
    rich = await at.developer()
    await at.earn({rich: 50 * USDC})
    await at.as_owner("set_max_deduct", scval.to_int128(20 * USDC))
    async with at_work(at):
        await settled(at, 2)
        assert await at.paid() == {**earned, rich: 0}
    assert sorted(await at.states()) == ["completed", "failed"]
    assert await at.database.fetch_value("SELECT held_back FROM revenue_accounts WHERE developer_id = $1", rich) == (
        "refused"
    )
    rows = await at.database.fetch(
        "SELECT type, count(*) AS count FROM outbox WHERE type LIKE 'settlement%' GROUP BY type"
    )
    assert {row["type"]: row["count"] for row in rows} == {"settlement_failed": 4, "settlement_completed": 3}


@attrs.define(eq=False)
class Freeze:
    """A settlement contract that refuses an address, for as long as it is told to."""

    address: str
    on: bool = True

    def under(self, process: Process, patch: pytest.MonkeyPatch) -> None:
        """Let a process meet it."""
        fault = ContractFault(8, "Error(Contract, #8)")
        real_call, real_simulate = process.submitter.call, process.chain.simulate
        wanted = scval.to_address(self.address).to_xdr_bytes()

        def refuses(args: Sequence[str], function: str) -> bool:
            return (
                self.on
                and function == "batch_receive_payment"
                and any(wanted in base64.b64decode(each) for each in args)
            )

        async def call(purpose: str, what: ContractCall) -> Applied | ContractFault:
            return fault if refuses(what.args, what.function) else await real_call(purpose, what)

        async def simulate(envelope: Envelope) -> Simulated | ContractFault:
            refused = refuses([envelope.xdr], "batch_receive_payment") and b"batch_receive_payment" in base64.b64decode(
                envelope.xdr
            )
            return fault if refused else await real_simulate(envelope)

        patch.setattr(process.submitter, "call", call)
        patch.setattr(process.chain, "simulate", simulate)


async def test_who_cannot_be_credited_is_found_before_anything_is_charged_for_him(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = await earners(at, 4)
    bad = list(earned)[2]
    async with at.process() as process:
        Freeze(at.wallets[bad].address).under(process, monkeypatch)
        await process.settlements.settle()
        await walked(at, process)
        assert await at.states() == ["failed"]
        await process.settlements.settle()
        await walked(at, process)
        assert await at.paid() == {**earned, bad: 0}
        assert at.vault_has(process.chain) == OPENING - sum(earned.values()) + earned[bad]
    held = "SELECT held_back FROM revenue_accounts WHERE developer_id = $1"
    assert await at.database.fetch_value(held, bad) == "refused"


async def test_credits_that_fail_for_one_developer_are_made_for_the_others_and_his_in_the_end(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = await earners(at, 4)
    bad = list(earned)[2]
    frozen, booked = Freeze(at.wallets[bad].address, on=False), store.book_charge

    async def book_and_freeze(*args: Any) -> bool:
        frozen.on = True
        return await booked(*args)

    monkeypatch.setattr(store, "book_charge", book_and_freeze)
    async with at.process(sync_seconds=30.0) as process:
        frozen.under(process, monkeypatch)
        await process.settlements.settle()
        (under_way,) = await store.under_way(at.database, "testnet")
        with trio.move_on_after(300):
            await process.settlements.walk(under_way.settlement_id)
        assert await at.paid() == {**earned, bad: 0}
        assert "settlement_stuck" in at.log.events
        frozen.on = False
        await walked(at, process)
        assert await at.paid() == earned
    assert await at.states() == ["completed"]


async def test_what_was_proven_dead_and_is_applied_all_the_same_stops_settlement(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    await earners(at, 1)
    async with at.process() as process:
        await process.settlements.settle()
        await walked(at, process)
        tx_hash = await at.database.fetch_value("SELECT encode(charge_hash, 'hex') FROM settlements")

        async def dead(*_: Any) -> list[store.DeadTransaction]:
            await trio.lowlevel.checkpoint()
            return [store.DeadTransaction(tx_hash, "charge:x")]

        monkeypatch.setattr(store, "lately_dead", dead)
        await process.settlements.sync()
        assert "settlement_late_success" in at.log.events
        assert "proven dead" in await process.settlements.settle()


@pytest.mark.parametrize("verb", ["seal", "book_charge"])
async def test_on_another_history_what_is_not_charged_is_released_and_what_is_when_an_operator_says_so(
    mock_clock: MockClock, at: Payroll, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    await earners(at, 2)
    axe = Axe("after")

    async def work(process: Process) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, verb, axe.on(getattr(store, verb)))
            await process.settlements.settle()
            await walked(at, process)

    await dies(at, work)
    await at.database.execute("UPDATE chain_networks SET epoch = 2")
    async with at.process() as process:
        with trio.move_on_after(200):
            await walked(at, process)
        if verb == "book_charge":
            assert await at.states() == ["charged"]
            (under_way,) = await store.under_way(at.database, "testnet")
            charged = await store.find(at.database, under_way.settlement_id)
            assert charged is not None
            now = at.town.clock.now()
            assert not await store.fail(at.database, charged, "lost", at.ids.uuid7, now)
            assert await store.fail(at.database, charged, "lost", at.ids.uuid7, now, lost=True)
        assert await at.states() == ["failed"]
        await process.settlements.settle()
        assert sorted(await at.states()) == ["failed", "sealed"]
    assert await at.database.fetch_value("SELECT epoch FROM settlements WHERE state = 'sealed'") == 2
