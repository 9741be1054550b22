"""Payouts: what a developer withdraws is sent once, as it was prepared, and ends as the chain says."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import cast

import attrs
import pytest
import trio
from stellar_sdk import TransactionEnvelope, scval
from trio.testing import MockClock, wait_all_tasks_blocked

from callora.actors.booking import Booking
from callora.actors.listener import Listener
from callora.actors.payout_answers import BalanceShort, ContractRefuses, Expired, NoTrustline, Prepared
from callora.actors.payouts import Payouts
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import DeveloperId, UserId
from callora.ledger.money import Stroops
from callora.store.bridge import Database
from callora.store.payouts import Payout
from tests.simulation.support import METRICS
from tests.support.chain_rows import set_network
from tests.support.knife import Knife
from tests.support.passing_time import passing_time
from tests.support.payroll import CLOSE_SECONDS, Payroll, Process, payroll
from tests.support.sandbox import Person

CREDITED = 70_000_000


@attrs.frozen
class Desk:
    """A developer who was credited, and processes that pay him out."""

    at: Payroll
    process: Process
    developer_id: DeveloperId
    user_id: UserId
    wallet: Person

    def payouts(self) -> Payouts:
        """Return a process's payouts, which the test lets look."""
        return Payouts(
            self.process.chain,
            self.process.submitter,
            self.at.database,
            self.at.town.clock,
            METRICS,
            self.at.log.logger(),
            bid=100,
            timeout_seconds=300,
        )

    async def prepared(self, amount: int | None = None) -> Prepared:
        """Return a withdrawal to sign."""
        made = await self.payouts().prepare(self.user_id, None if amount is None else Stroops(amount))
        assert isinstance(made, Prepared), made
        return made

    def signed(self, prepared: Prepared) -> str:
        """Return it with the wallet's signature."""
        envelope = TransactionEnvelope.from_xdr(prepared.payout.envelope, prepared.passphrase)
        envelope.sign(self.wallet.keypair)
        return envelope.to_xdr()

    async def stage(self, *, within_seconds: float = 60) -> tuple[str, str | None]:
        """Return stage and failure of the latest withdrawal, once it has ended or the time is over."""
        with trio.move_on_after(within_seconds):
            while True:
                await self.payouts().look()
                if (await self._latest())[0] in ("confirmed", "failed"):
                    break
                await trio.sleep(5)
        return await self._latest()

    async def _latest(self) -> tuple[str, str | None]:
        row = await self.at.database.fetch_row(
            "SELECT stage, failure FROM developer_withdrawals ORDER BY prepared_at DESC LIMIT 1"
        )
        assert row is not None
        return row["stage"], row["failure"]

    @property
    def owed(self) -> int:
        """What the settlement contract owes him, as the ledger has it."""
        return self.at.on_chain(self.wallet.address)


@pytest.fixture
async def desk(mock_clock: MockClock, database: Database) -> AsyncIterator[Desk]:
    """A developer who was credited, on a chain whose ledgers close."""
    async with passing_time(mock_clock, database) as watched, payroll(watched) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.town.sandbox.ledger.run, CLOSE_SECONDS)
        developer_id = await at.developer()
        await at.earn({developer_id: CREDITED})
        async with at.process() as process:
            watcher = Listener(
                process.chain, watched, cast(Booking, None), at.town.clock, METRICS, at.log.logger(), interval_seconds=1
            )
            await watcher.look()
            await process.settlements.settle()
            settlement_id = await watched.fetch_value("SELECT settlement_id::text FROM settlements")
            await process.settlements.walk(settlement_id)
            user_id = await watched.fetch_value("SELECT user_id::text FROM developers")
            yield Desk(at, process, developer_id, UserId(user_id), at.wallets[developer_id])
        nursery.cancel_scope.cancel()


async def test_one_withdrawal_submitted_by_many_at_once_is_sent_once(mock_clock: MockClock, desk: Desk) -> None:
    prepared = await desk.prepared(30_000_000)
    signed, barrier = desk.signed(prepared), trio.Event()
    answers: list[object] = []

    async def submit() -> None:
        await barrier.wait()
        answers.append(await desk.payouts().submit(desk.user_id, signed))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(submit)
        await wait_all_tasks_blocked()
        barrier.set()
    assert {type(each) for each in answers} == {Payout}
    assert await desk.stage() == ("confirmed", None)
    assert desk.owed == CREDITED - 30_000_000
    assert desk.wallet.has(desk.at.town.usdc) == 30_000_000
    sent = await desk.at.database.fetch_value("SELECT count(*) FROM chain_transactions WHERE purpose LIKE 'payout:%'")
    assert sent == 1


async def test_a_submission_cut_at_any_wait_is_sent_once_by_the_next(mock_clock: MockClock, desk: Desk) -> None:
    cut_at, amount = 0, 1_000_000
    while True:
        cut_at += 1
        signed = desk.signed(await desk.prepared(amount))
        knife = Knife(cut_at)
        with knife as scope, scope:
            await desk.payouts().submit(desk.user_id, signed)
            await trio.sleep(2 * CLOSE_SECONDS)
            await desk.payouts().look()
        assert isinstance(await desk.payouts().submit(desk.user_id, signed), Payout)
        assert await desk.stage() == ("confirmed", None)
        assert desk.owed == CREDITED - cut_at * amount
        assert desk.wallet.has(desk.at.town.usdc) == cut_at * amount
        sent = await desk.at.database.fetch_value(
            "SELECT count(*) FROM chain_transactions WHERE purpose LIKE 'payout:%'"
        )
        assert sent == cut_at
        if not knife.cut:
            break
    assert cut_at > 10


async def test_a_preparation_cut_at_any_wait_hands_nothing_out_and_ends_by_itself(
    mock_clock: MockClock, desk: Desk
) -> None:
    cut_at, stored = 0, 0
    while True:
        cut_at += 1
        knife = Knife(cut_at)
        with knife as scope, scope:
            await desk.prepared()
        count = await desk.at.database.fetch_value("SELECT count(*) FROM developer_withdrawals")
        assert count - stored in (0, 1)
        if count > stored:
            assert await desk.stage(within_seconds=600) == ("failed", "expired")
        stored = count
        assert desk.owed == CREDITED
        if not knife.cut:
            break
    assert cut_at > 10
    assert stored >= 1
    assert (
        await desk.at.database.fetch_value("SELECT count(*) FROM chain_transactions WHERE purpose LIKE 'payout:%'") == 0
    )


async def test_a_wallet_may_send_it_by_itself_and_it_is_found(mock_clock: MockClock, desk: Desk) -> None:
    prepared = await desk.prepared()
    desk.at.town.submit(desk.signed(prepared))
    assert await desk.stage(within_seconds=400) == ("confirmed", None)
    assert desk.owed == 0


async def test_what_nobody_signs_expires_only_when_no_ledger_can_hold_it(mock_clock: MockClock, desk: Desk) -> None:
    prepared = await desk.prepared()
    assert await desk.stage(within_seconds=290) == ("approving", None)
    assert await desk.stage(within_seconds=60) == ("failed", "expired")
    assert isinstance(await desk.payouts().submit(desk.user_id, desk.signed(prepared)), Payout)
    assert desk.owed == CREDITED


async def test_what_is_signed_too_late_is_not_sent(mock_clock: MockClock, desk: Desk) -> None:
    prepared = await desk.prepared()
    await trio.sleep(301)
    assert isinstance(await desk.payouts().submit(desk.user_id, desk.signed(prepared)), Expired)
    assert desk.owed == CREDITED


async def test_of_two_for_all_there_is_one_is_paid_and_the_other_fails_in_words(
    mock_clock: MockClock, desk: Desk
) -> None:
    first = await desk.prepared()
    await trio.sleep(2)
    second = await desk.prepared()
    assert first.payout.tx_hash != second.payout.tx_hash
    for each in (first, second):
        assert isinstance(await desk.payouts().submit(desk.user_id, desk.signed(each)), Payout)
    with trio.fail_after(600):
        while await desk.at.database.fetch_value(
            "SELECT count(*) FROM developer_withdrawals WHERE stage NOT IN ('confirmed', 'failed')"
        ):
            await desk.payouts().look()
            await trio.sleep(5)
    rows = await desk.at.database.fetch("SELECT stage FROM developer_withdrawals ORDER BY stage")
    assert [row["stage"] for row in rows] == ["confirmed", "failed"]
    assert desk.wallet.has(desk.at.town.usdc) == CREDITED


async def test_more_than_is_owed_and_a_wallet_without_a_trustline_are_refused(
    mock_clock: MockClock, desk: Desk
) -> None:
    assert await desk.payouts().prepare(desk.user_id, Stroops(CREDITED + 1)) == BalanceShort(
        Stroops(CREDITED + 1), Stroops(CREDITED)
    )
    other = await desk.at.developer(trusts=False)
    user_id = await desk.at.database.fetch_value("SELECT user_id::text FROM developers WHERE developer_id = $1", other)
    assert isinstance(await desk.payouts().prepare(UserId(user_id), None), NoTrustline)


async def test_what_the_contract_refuses_is_refused_with_its_rule(mock_clock: MockClock, desk: Desk) -> None:
    contract = await desk.payouts()._contract()
    capped = contract._call(
        contract.admin,
        "set_daily_withdraw_cap",
        scval.to_address(contract.admin),
        scval.to_address(desk.wallet.address),
        scval.to_int128(1),
    )
    await desk.process.submitter.call("cap:1", capped)
    refused = await desk.payouts().prepare(desk.user_id, None)
    assert refused == ContractRefuses("DailyWithdrawCapExceeded")


async def test_on_another_history_it_has_failed_once_its_time_is_over(mock_clock: MockClock, desk: Desk) -> None:
    await desk.prepared()
    await desk.at.database.execute("ALTER TABLE developer_withdrawals DISABLE TRIGGER payouts_move_forwards")
    await desk.at.database.execute("UPDATE developer_withdrawals SET prepared_ledger = 1000000")
    await desk.at.database.execute("ALTER TABLE developer_withdrawals ENABLE TRIGGER payouts_move_forwards")
    assert (await desk.stage(within_seconds=400))[0] == "approving", "no proof on this history"
    await set_network(desk.at.database, epoch=2)
    assert await desk.stage() == ("failed", "the network began anew")


@pytest.mark.parametrize(
    "change",
    [
        "amount = amount + 1",
        "address = 'G' || repeat('A', 55)",
        "expires_at = expires_at + interval '1 second'",
        "stage = 'approving'",
    ],
)
async def test_what_was_prepared_is_never_changed(mock_clock: MockClock, desk: Desk, change: str) -> None:
    prepared = await desk.prepared()
    await desk.at.database.execute("UPDATE developer_withdrawals SET stage = 'pending'")
    with pytest.raises(StoreRefused):
        await desk.at.database.execute(f"UPDATE developer_withdrawals SET {change}")
    for statement in ("DELETE FROM developer_withdrawals", "TRUNCATE developer_withdrawals"):
        with pytest.raises(StoreRefused):
            await desk.at.database.execute(statement)
    assert prepared.payout.expires_at - prepared.payout.prepared_at <= timedelta(seconds=305)
