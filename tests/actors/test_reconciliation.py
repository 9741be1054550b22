"""Reconciliation: the contract's balance is explained to the stroop, whatever it is made of."""

from collections.abc import AsyncIterator
from datetime import timedelta

import attrs
import pytest

from callora.actors.reconciliation import Reconciliation
from callora.ledger.commands import Deposit, GiveBack, Grant, PlaceHold, Refund, Withdraw, capture
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.store import chain as store
from callora.store import rollup
from callora.store.bridge import Database
from callora.store.reads.chain import list_comparisons, parts_at
from tests.simulation.support import CHARGED, DELIVERED, METRICS
from tests.support.stream import Stream, tx_hash_of, wallet_of
from tests.support.treasury import Books, Watch, books, stored_transaction, watch

ANNA, NOBODY = wallet_of("anna"), wallet_of("nobody")


@pytest.fixture
async def at(database: Database) -> AsyncIterator[Books]:
    """Books whose ledger the audit finds clean when the test ends."""
    async with books(database, Stream(balance=1000)) as opened:
        yield opened


def reconciliation(at: Books, one: Watch, drift_max: int = 0) -> Reconciliation:
    return Reconciliation(
        at.stream,
        one.listener,
        at.database,
        at.ledger.clock,
        METRICS,
        one.log.logger(),
        interval_seconds=60,
        drift_max=drift_max,
    )


async def paid_call(at: Books, vault_id: VaultId, amount: int) -> str:
    """Capture a call; return its event."""
    event_id = at.ledger.event()
    hold = PlaceHold(event_id, Stroops(amount), 60, CHARGED)
    await at.ledger.store.commit_round([await at.ledger.share(vault_id, hold)])
    close = capture(event_id, Stroops(amount), Stroops(amount), DELIVERED)
    await at.ledger.store.commit_round([await at.ledger.share(vault_id, close)])
    return event_id


async def everything(at: Books, one: Watch) -> VaultId:
    """Do everything that moves the contract's balance or the ledger's, each with an amount of its own."""
    ledger, stream = at.ledger, at.stream
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    stream.deposit(ANNA, 500)
    await one.follow()
    # Ledgers that nobody can show: 64 came in them.
    stream.close(5)
    stream.event("deposit", NOBODY, 64)
    stream.close(5)
    stream.oldest = stream.latest
    await one.follow()
    assert await store.close_gap(at.database, "testnet", 1, 11, 64, "admin-key", ledger.clock.now())
    stream.close()
    # What has no counterpart on chain
    await ledger.locked(vault_id, Grant(Stroops(30), "welcome"))
    await ledger.locked(vault_id, Deposit(Stroops(20), "first"))
    await ledger.locked(vault_id, Withdraw(Stroops(3), "by hand"))
    await ledger.locked(vault_id, GiveBack(Stroops(7), "manual correction"))
    # Calls, of which one is refunded in part, some are settled, and one is open
    event_id = await paid_call(at, vault_id, 90)
    await ledger.locked(vault_id, Refund(at.ledger.event().__class__(event_id), Stroops(11), "sorry"))
    await paid_call(at, vault_id, 25)
    hold = PlaceHold(at.ledger.event(), Stroops(9), 3600, CHARGED)
    await ledger.store.commit_round([await ledger.share(vault_id, hold)])
    await stored_transaction(at.database, tx_hash_of("charge"), "fee:1")
    stream.event("deduct", wallet_of("caller"), 40, tx_hash=tx_hash_of("charge"))
    # Withdrawals: one paid, one debited, one given back
    for name, amount in (("paid", 13), ("debited", 17), ("returned", 19)):
        await ledger.locked(vault_id, Withdraw(Stroops(amount), f"testnet:1:withdrawal:{name}"))
    await ledger.locked(vault_id, GiveBack(Stroops(19), "testnet:1:withdrawal:returned"))
    await stored_transaction(at.database, tx_hash_of("paid"), "payment:13")
    stream.event("withdraw_to", ANNA, 13, tx_hash=tx_hash_of("paid"))
    # Suspense, and what is noted and not credited
    stream.deposit(NOBODY, 51)
    await one.follow()
    stream.close()
    stream.deposit(ANNA, 71)
    stream.event("distribute", ANNA, 5)  # moves tokens past the count
    await one.listener.look()
    return vault_id


async def test_with_every_part_there_is_no_drift_and_a_made_up_stroop_is_found(at: Books) -> None:
    async with watch(at) as one:
        vault_id = await everything(at, one)
        job = reconciliation(at, one)
        compared = await job.compare()
        assert compared is not None
        parts = attrs.asdict(compared.parts)
        assert compared.drift == 0, parts
        assert {name for name, amount in parts.items() if not amount} == {"later"}
        assert (parts["opening"], parts["gaps"], parts["withdrawing"], parts["unbacked"]) == (1000, 64, 17, 17)
        # The same at an earlier ledger: what came after it and is credited already does not count.
        ledger, on_chain = at.stream.latest, at.stream.balance
        at.stream.close()
        at.stream.deposit(ANNA, 83)
        await one.follow()
        parts_then = await parts_at(at.database, "testnet", 1, ledger)
        assert parts_then is not None
        assert (parts_then.expected, parts_then.later) == (on_chain, 83)
        # Any change of the ledger that nothing on chain stands for is found.
        for statement in (
            "UPDATE vaults SET available = available {} 1 WHERE vault_id = $1",
            "UPDATE vaults SET held = held {} 1 WHERE vault_id = $1",
        ):
            await at.database.execute(statement.format("+"), vault_id)
            found = await job.compare()
            assert found is not None
            assert found.drift == -1
            await at.database.execute(statement.format("-"), vault_id)
        at.stream.balance += 1
        found = await job.compare()
        assert found is not None
        assert found.drift == 1
        at.stream.balance -= 1
    lines = await list_comparisons(at.database, "testnet", None, 10)
    assert [line.drift for line in lines][-1] == 0
    assert lines[-1].parts["suspense"] == 51


async def test_the_rollup_changes_nothing_in_what_is_captured(at: Books) -> None:
    """Captured usage is read from the days where they are final, with holds that were open then closing later."""
    async with watch(at) as one:
        vault_id = await everything(at, one)
        job = reconciliation(at, one)
        event_id = at.ledger.event()
        hold = PlaceHold(event_id, Stroops(33), 3600, CHARGED)
        await at.ledger.store.commit_round([await at.ledger.share(vault_id, hold)])
        for minutes in (0, 2, 5):
            at.ledger.clock.advance(60 * minutes)
            await rollup.advance(at.database, at.ledger.clock.now(), slow_seconds=1e9)
            compared = await job.compare()
            assert compared is not None
            assert (compared.drift, compared.parts.captured) == (0, 115)
        assert await at.ledger.count("usage_open") == 2
        close = capture(event_id, Stroops(33), Stroops(21), DELIVERED)
        await at.ledger.store.commit_round([await at.ledger.share(vault_id, close)])
        await paid_call(at, vault_id, 2)
        for _ in range(2):
            compared = await job.compare()
            assert compared is not None
            assert (compared.drift, compared.parts.captured) == (0, 138)
            await rollup.advance(at.database, at.ledger.clock.now() + timedelta(minutes=3), slow_seconds=1e9)


async def test_drift_past_its_bound_stops_settlement_until_an_operator_lets_it_go_on(at: Books) -> None:
    async with watch(at) as one:
        at.stream.deposit(NOBODY, 5)
        await one.follow()
        at.stream.balance += 3
        assert await reconciliation(at, one, drift_max=3).compare() is not None
        watched = await store.find_network(at.database, "testnet")
        assert watched is not None
        assert watched.settlement_halted is None
        assert "chain_drift" in one.log.events
        await reconciliation(at, one, drift_max=2).compare()
        watched = await store.find_network(at.database, "testnet")
        assert watched is not None
        assert watched.settlement_halted is not None
        assert await store.resume_settlement(at.database, "testnet")
        assert not await store.resume_settlement(at.database, "testnet")


async def test_before_the_first_event_the_contract_has_what_it_was_opened_with(at: Books) -> None:
    async with watch(at) as one:
        await one.follow()
        compared = await reconciliation(at, one).compare()
        assert compared is not None
        assert (compared.drift, compared.parts.opening) == (0, 1000)


async def test_what_the_contract_was_opened_with_is_taken_once_and_then_every_other_stroop_is_drift(at: Books) -> None:
    async with watch(at) as one:
        await one.follow()
        job = reconciliation(at, one)
        assert await job.compare() is not None
        at.stream.balance += 7  # without an event
        compared = await job.compare()
        assert compared is not None
        assert (compared.drift, compared.parts.opening) == (7, 1000)
        at.stream.close()
        at.stream.deposit(NOBODY, 5)
        await one.follow()
        compared = await job.compare()
        assert compared is not None
        assert (compared.drift, compared.parts.opening) == (7, 1000), "the first event does not explain it away"


async def test_after_a_network_began_anew_balances_are_unbacked_and_nothing_drifts(at: Books) -> None:
    async with watch(at) as one:
        await everything(at, one)
        await one.booking.book_all("testnet")
        at.stream.reset()
        assert await one.listener.look() == "halted"
        assert await one.listener.begin_epoch(1)
        at.stream.deposit(ANNA, 6)
        at.stream.deposit(NOBODY, 4)
        await one.follow()
        compared = await reconciliation(at, one).compare()
        assert compared is not None
        assert (compared.drift, compared.on_chain) == (0, 10)
