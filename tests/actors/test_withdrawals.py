"""Withdrawals: debited once, paid once or given back once, whoever dies and whoever asks."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from callora.actors.treasury_answers import MayBePaid, Mismatch, TooManyWithdrawals
from callora.actors.withdrawals import Withdrawals
from callora.ledger.chain import Applied, ContractFault, Envelope, WalletBalances
from callora.ledger.commands import Grant
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import InsufficientFunds
from callora.ledger.submission import Alive, Dead
from callora.stellar.contracts import ContractCall
from callora.store import withdrawals as store
from callora.store.bridge import Database
from callora.store.withdrawals import Withdrawal
from tests.support.knife import Knife
from tests.support.stream import Stream, tx_hash_of, wallet_of
from tests.support.treasury import Books, Watch, books, stored_transaction, watch

ANNA = wallet_of("anna")
ID = "00000000-0000-8000-8000-000000000001"
FAULT = ContractFault(5, "Error(Contract, #5)")


class Banked(Stream):
    """A stream whose wallets exist."""

    async def wallet(self, address: str) -> WalletBalances:
        await trio.lowlevel.checkpoint()
        return WalletBalances(True, 0, 0)


@attrs.define
class Cashier:
    """Whoever sends: pays a purpose once, by an event of the stream, or finds that it cannot be paid."""

    at: Books
    refused: ContractFault | None = None
    paid: set[str] = attrs.field(factory=set)
    calls: int = 0

    async def call(self, purpose: str, call: ContractCall) -> Applied | ContractFault:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self.refused is not None:
            return self.refused
        if purpose not in self.paid:
            with trio.CancelScope(shield=True):  # the network does not die with whoever sent
                await self._pay(purpose)
        return Applied(True, 7, self.at.stream.closed_at(7), "tx_success", None, None, None, 100)

    async def _pay(self, purpose: str) -> None:
        await stored_transaction(self.at.database, tx_hash_of(purpose), purpose)
        self.paid.add(purpose)
        (row,) = await self.at.rows(
            "SELECT address, amount FROM withdrawals WHERE 'withdraw:' || withdrawal_id = $1", purpose
        )
        self.at.stream.close()
        self.at.stream.event("withdraw_to", row["address"], row["amount"], tx_hash=tx_hash_of(purpose))

    async def pass_on(self, purpose: str, envelope: Envelope, prepared_ledger: int) -> str:
        raise NotImplementedError

    async def outcome(self, tx_hash: str) -> Applied | Dead | Alive | None:
        raise NotImplementedError


@attrs.frozen
class Counter:
    """One process that pays out."""

    watch: Watch
    withdrawals: Withdrawals
    cashier: Cashier


@pytest.fixture
async def at(database: Database) -> AsyncIterator[Books]:
    """Books whose ledger the audit finds clean when the test ends."""
    async with books(database, Banked(balance=10_000)) as opened:
        yield opened


@asynccontextmanager
async def counter(at: Books, cashier: Cashier | None = None, *, owner_signs: bool = True) -> AsyncIterator[Counter]:
    """Run one process, whose withdrawals the test carries on."""
    cashier = cashier or Cashier(at)
    async with watch(at) as one:
        await one.follow()
        made = Withdrawals(
            at.stream,
            cashier,
            at.database,
            one.booking._registry,
            at.ledger.clock,
            one.log.logger(),
            owner_signs=owner_signs,
            bid=100,
        )
        yield Counter(one, made, cashier)


async def funded(at: Books, amount: int) -> tuple[UserId, VaultId]:
    """Return a user with a wallet and this much."""
    user_id, vault_id = await at.user(ANNA)
    assert vault_id is not None
    await at.ledger.locked(vault_id, Grant(Stroops(amount), "welcome"))
    return user_id, vault_id


async def together(count: int, do: Callable[[int], object]) -> None:
    """Let tasks meet at a barrier, and wait for all."""
    barrier = trio.Event()

    async def one(number: int) -> None:
        await barrier.wait()
        await do(number)  # type: ignore[misc]

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked()
        barrier.set()


async def test_one_intent_asked_by_many_is_debited_once(at: Books) -> None:
    user_id, vault_id = await funded(at, 100)
    async with counter(at) as one, counter(at) as other:
        answers: list[object] = []

        async def ask(number: int) -> None:
            which = (one, other)[number % 2]
            answers.append(await which.withdrawals.request(user_id, ID, Stroops(30), None))

        await together(10, ask)
        assert {type(each) for each in answers} == {Withdrawal}
        assert await at.ledger.balance(vault_id) == (70, 0)
        assert isinstance(await one.withdrawals.request(user_id, ID, Stroops(31), None), Mismatch)


async def test_many_intents_at_once_never_take_more_than_there_is(at: Books) -> None:
    user_id, vault_id = await funded(at, 100)
    async with counter(at) as one:
        answers: list[object] = []

        async def ask(number: int) -> None:
            name = f"00000000-0000-8000-8000-{number:012x}"
            answers.append(await one.withdrawals.request(user_id, name, Stroops(30), None))

        await together(9, ask)
        kinds = [type(each) for each in answers]
        assert (kinds.count(Withdrawal), kinds.count(InsufficientFunds)) == (3, 6)
        assert await at.ledger.balance(vault_id) == (10, 0)


async def test_withdrawals_under_way_are_limited(at: Books) -> None:
    user_id, _ = await funded(at, 100)
    async with counter(at) as one:
        answers: list[object] = []

        async def ask(number: int) -> None:
            name = f"00000000-0000-8000-8000-{number:012x}"
            answers.append(await one.withdrawals.request(user_id, name, Stroops(1), None))

        await together(15, ask)
        kinds = [type(each) for each in answers]
        assert (kinds.count(Withdrawal), kinds.count(TooManyWithdrawals)) == (10, 5)


@pytest.mark.parametrize("payable", [True, False])
async def test_a_withdrawal_cut_at_any_wait_is_paid_once_or_given_back_once(at: Books, payable: bool) -> None:
    user_id, vault_id = await funded(at, 100_000)
    cashier = Cashier(at, None if payable else FAULT)
    cut_at, balance = 0, 100_000
    while True:
        cut_at += 1
        name = f"00000000-0000-8000-8000-{cut_at:012x}"
        async with counter(at, cashier) as first:
            knife = Knife(cut_at)
            with knife as scope, scope:
                await first.withdrawals.request(user_id, name, Stroops(10), None)
                await first.withdrawals.carry_on(name)
                await first.watch.follow()
        async with counter(at, cashier) as second:
            await second.withdrawals.request(user_id, name, Stroops(10), None)
            await second.withdrawals.carry_on(name)
            await second.watch.follow()
            found = await store.find_withdrawal(at.database, name)
            assert found is not None
            assert found.state == ("confirmed" if payable else "failed")
            assert "payment_unexplained" not in second.watch.log.events
        balance -= 10 if payable else 0
        assert await at.ledger.balance(vault_id) == (balance, 0)
        if not knife.cut:
            break
    assert cut_at > 10
    assert len(cashier.paid) == (cut_at if payable else 0)
    entries = await at.ledger.count("ledger_entries", "kind = 'adjustment'")
    assert entries == (0 if payable else cut_at)


async def test_many_processes_at_a_withdrawal_that_cannot_be_paid_give_it_back_once(at: Books) -> None:
    user_id, vault_id = await funded(at, 100)
    cashier = Cashier(at, FAULT)
    async with counter(at, cashier) as one, counter(at, cashier) as other:
        assert isinstance(await one.withdrawals.request(user_id, ID, Stroops(30), None), Withdrawal)
        await together(8, lambda number: (one, other)[number % 2].withdrawals.carry_on(ID))
        found = await store.find_withdrawal(at.database, ID)
        assert found is not None
        assert (found.state, found.failure) == ("failed", "not paid: InsufficientBalance")
    assert await at.ledger.balance(vault_id) == (100, 0)
    assert await at.ledger.count("ledger_entries", "kind = 'adjustment'") == 1


async def test_a_payment_and_a_return_of_one_withdrawal_exclude_each_other(at: Books) -> None:
    """Whoever stores its payment and whoever decides to give it back meet: the database lets one of them."""
    user_id, _ = await funded(at, 1000)
    won = {"paid": 0, "returned": 0}
    async with counter(at, owner_signs=False) as one:
        for number in range(10):
            name = f"00000000-0000-8000-8000-{number:012x}"
            made = await one.withdrawals.request(user_id, name, Stroops(10), None)
            assert isinstance(made, Withdrawal)
            outcomes: list[str] = []

            async def pay(name: str = name, outcomes: list[str] = outcomes) -> None:
                try:
                    await stored_transaction(at.database, tx_hash_of(name), f"withdraw:{name}")
                    outcomes.append("paid")
                except StoreRefused as refused:
                    if refused.constraint != "payment_of_open_withdrawal":
                        raise

            async def give_back(made: Withdrawal = made, outcomes: list[str] = outcomes) -> None:
                if await store.begin_return(at.database, made, "no", at.ledger.clock.now()):
                    outcomes.append("returned")

            await together(2, lambda which, pay=pay, give_back=give_back: (pay, give_back)[which]())  # type: ignore[misc]
            (outcome,) = outcomes
            won[outcome] += 1
            await one.withdrawals.carry_on(name)
    assert sum(won.values()) == 10


async def test_what_may_be_paid_is_not_given_back_on_an_operators_word(at: Books) -> None:
    user_id, vault_id = await funded(at, 100)
    async with counter(at, owner_signs=False) as one:
        await one.withdrawals.request(user_id, ID, Stroops(30), None)
        await stored_transaction(at.database, tx_hash_of("payment"), f"withdraw:{ID}")
        assert isinstance(await one.withdrawals.refuse(ID, "no"), MayBePaid)
        assert await at.ledger.balance(vault_id) == (70, 0)
        at.stream.close()
        at.stream.event("withdraw_to", ANNA, 30, tx_hash=tx_hash_of("payment"))
        await one.watch.follow()
        found = await store.find_withdrawal(at.database, ID)
        assert found is not None
        assert found.state == "confirmed"
