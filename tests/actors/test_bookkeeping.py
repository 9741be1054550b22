"""The books: a good one is called good, every fault that is planted is found by its class, and stops settlement."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock

from callora.actors.booking import Booking
from callora.actors.bookkeeping import Bookkeeper, Compared
from callora.actors.listener import Listener
from callora.ledger.chain import Applied
from callora.ledger.discrepancies import Discrepancy
from callora.ledger.faults import ChainUnavailable
from callora.store.bridge import Database
from callora.store.chain import find_network, resume_settlement
from callora.store.settlements import under_way
from tests.simulation.support import METRICS
from tests.support.passing_time import passing_time
from tests.support.payroll import CLOSE_SECONDS, Payroll, Process, payroll

USDC = 10_000_000
WEEK = timedelta(days=7)
TABLES = (
    "settlements",
    "settlement_items",
    "settlement_credits",
    "chain_transactions",
    "chain_events",
    "chain_reconciliations",
    "chain_networks",
    "revenue_entries",
    "revenue_accounts",
    "discrepancies",
)


@attrs.frozen
class Book:
    """A payroll that has paid two developers, its events followed, and who compares."""

    at: Payroll
    process: Process
    bookkeeper: Bookkeeper
    listener: Listener

    @property
    def database(self) -> Database:
        """The watched one."""
        return self.at.database

    async def compare(self) -> Compared:
        """Compare the last week."""
        return await self.bookkeeper.compare(self.at.town.clock.now() - WEEK)

    async def found(self) -> list[Discrepancy]:
        """Return what is open after a comparison."""
        return [each.found for each in (await self.compare()).open]

    async def plant(self, *statements: str) -> None:
        """Write where no trigger and no foreign key looks."""
        async with self.database.transaction() as connection:
            await connection.execute("SET LOCAL session_replication_role = replica")
            for statement in statements:
                await connection.execute(statement)

    async def kept(self) -> "dict[str, str]":
        """Copy what faults are planted in; return the columns of each table."""
        columns: dict[str, str] = {}
        for table in TABLES:
            rows = await self.database.fetch(
                "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0"
                " AND NOT attisdropped AND attgenerated = '' ORDER BY attnum",
                table,
            )
            columns[table] = ", ".join(row["attname"] for row in rows)
            await self.database.execute(f"CREATE TABLE kept_{table} AS SELECT {columns[table]} FROM {table}")
        return columns

    async def restore(self, columns: Mapping[str, str]) -> None:
        """Make everything what it was when it was copied."""
        await self.plant(
            *(f"DELETE FROM {table}" for table in columns),
            *(f"INSERT INTO {table} ({each}) SELECT {each} FROM kept_{table}" for table, each in columns.items()),
        )

    async def halted(self) -> str | None:
        """Return why nothing is settled."""
        watched = await find_network(self.database, "testnet")
        assert watched is not None
        return watched.settlement_halted


def bookkeeper(at: Payroll, process: Process | None, interval_seconds: float = 86_400) -> Bookkeeper:
    """Return who compares, asking the chain where a process lends it."""
    return Bookkeeper(
        None if process is None else process.chain,
        at.database,
        network="testnet",
        clock=at.town.clock,
        ids=at.ids,
        metrics=METRICS,
        log=at.log.logger(),
        interval_seconds=interval_seconds,
        drift_max=0,
    )


@asynccontextmanager
async def opened(at: Payroll) -> AsyncIterator[Book]:
    """Pay two developers, follow the events, and let what they earned become final."""
    await at.earn({await at.developer(): 7 * USDC, await at.developer(): 9 * USDC})
    async with at.process(fee_bps=100) as process:
        watcher = Listener(
            process.chain, at.database, cast(Booking, None), at.town.clock, METRICS, at.log.logger(), interval_seconds=1
        )
        await watcher.look()
        await process.settlements.settle()
        for each in await at.database.fetch("SELECT settlement_id FROM settlements"):
            with trio.fail_after(3600):
                await process.settlements.walk(str(each["settlement_id"]))
        await trio.sleep(120)
        await process.indexer.catch_up()
        while await watcher.look() in ("more", "moved"):
            pass
        yield Book(at, process, bookkeeper(at, process), watcher)


@pytest.fixture
async def book(mock_clock: MockClock, database: Database) -> AsyncIterator[Book]:
    """A good book."""
    async with passing_time(mock_clock, database) as watched, payroll(watched) as at:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.town.sandbox.ledger.run, CLOSE_SECONDS)
            async with opened(at) as made:
                yield made
            nursery.cancel_scope.cancel()


def kinds(found: Sequence[Discrepancy]) -> set[str]:
    """Return the classes found."""
    return {each.kind for each in found}


async def test_a_good_book_is_called_good_by_both_who_look(mock_clock: MockClock, book: Book) -> None:
    compared = await book.compare()
    assert (compared.open, compared.untold) == ([], 0)
    assert compared.asked == 2 + 3, "the charge and the credits, two developers and the platform"
    assert await book.halted() is None
    assert await book.at.findings() == []
    deducted = await book.database.fetch_value("SELECT sum(amount) FROM chain_events WHERE kind = 'deduct'")
    assert deducted == 16 * USDC, "the charge's events were there to be compared"


async def test_a_book_that_is_being_written_is_good_at_every_moment(mock_clock: MockClock, book: Book) -> None:
    at, compared = book.at, 0

    async def earn_and_settle() -> None:
        for _ in range(4):
            await at.earn(dict.fromkeys(at.wallets, 6 * USDC))
            await book.process.settlements.settle()
            for each in await under_way(at.database, "testnet"):
                await book.process.settlements.walk(each.settlement_id)

    async def follow() -> None:
        while True:
            await book.listener.look()
            await trio.sleep(7)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        async with trio.open_nursery() as working:
            working.start_soon(earn_and_settle)
            for _ in range(60):
                assert await book.found() == []
                compared += len(await under_way(at.database, "testnet"))
                await trio.sleep(0.7)
        nursery.cancel_scope.cancel()
    assert await at.states() == ["completed"] * 5
    assert compared > 10, "it was looked at while a settlement was under way"


UNCHARGED = (
    "DELETE FROM settlement_credits",
    "UPDATE settlements SET state = 'charge_sent', charged_by = NULL, charge_hash = NULL, charged_at = NULL,"
    " ended_at = NULL, moved_at = moved_at - interval '1 hour'",
)
PLANTED: dict[str, tuple[str, tuple[str, ...], set[tuple[str, int]]]] = {
    "a charge without a transaction of ours": (
        "MISSING_TX",
        (
            "UPDATE settlements SET charge_hash = decode(repeat('ab', 32), 'hex')",
            "UPDATE chain_transactions SET hash = decode(repeat('ab', 32), 'hex') WHERE purpose LIKE 'charge:%'",
            "UPDATE chain_events SET tx_hash = decode(repeat('ab', 32), 'hex')",
        ),
        {(":charge", 0)},
    ),
    "a charge without an event": ("MISSING_TX", ("DELETE FROM chain_events",), {(":charge", -16 * USDC)}),
    "a credit that no node knows": (
        "MISSING_TX",
        (
            "UPDATE settlement_credits SET hash = decode(repeat('cd', 32), 'hex')",
            "UPDATE chain_transactions SET hash = decode(repeat('cd', 32), 'hex') WHERE purpose LIKE 'credit:%'",
        ),
        {(":credits 1", 0)},
    ),
    "a credit whose transaction is not stored": (
        "MISSING_TX",
        ("DELETE FROM chain_transactions WHERE purpose LIKE 'credit:%'",),
        {(":credits 1", 0)},
    ),
    "a charge that is applied and not booked": ("STALE_PENDING", UNCHARGED, {("", 0)}),
    "a credit that is applied and not booked": (
        "STALE_PENDING",
        (
            "UPDATE settlement_credits SET state = 'sent', hash = NULL, moved_at = moved_at - interval '1 hour'",
            "UPDATE settlements SET state = 'credit_sent', ended_at = NULL, moved_at = moved_at - interval '1 hour'",
        ),
        {("", 0)},
    ),
    "a settlement that stands still": (
        "STALE_PENDING",
        (
            *UNCHARGED,
            "DELETE FROM chain_transactions",
            "DELETE FROM chain_events",
            "UPDATE settlements SET state = 'sealed', opened_at = opened_at - interval '3 hours'",
        ),
        {("", 0)},
    ),
    "a failed settlement that is charged": (
        "FALSE_FAILURE",
        (
            "DELETE FROM settlement_credits",
            "UPDATE settlements SET state = 'failed', failure = 'given up'",
            "UPDATE revenue_accounts SET sealed_gross = 0, sealed_fee = 0, sealed_pass = 0",
            "UPDATE settlements SET charged_by = NULL, charge_hash = NULL, charged_at = NULL",
        ),
        {("", 16 * USDC)},
    ),
    "a part that was given up and is applied": (
        "FALSE_FAILURE",
        (
            "UPDATE settlement_credits SET state = 'sent', hash = NULL, attempt = 2",
            "UPDATE settlements SET state = 'credit_sent', ended_at = NULL",
        ),
        {("", 0)},
    ),
    "a charge whose transaction is called dead": (
        "UNEXPECTED_STATUS",
        (
            "UPDATE chain_transactions SET state = 'dead', closes_purpose = false, ledger = NULL, applied_at = NULL,"
            " result_code = NULL, fee_charged = NULL WHERE purpose LIKE 'charge:%'",
        ),
        {(":charge", 0)},
    ),
    "credits of what was not charged": (
        "UNEXPECTED_STATUS",
        (
            "UPDATE settlements SET state = 'charge_sent', charged_by = NULL, charge_hash = NULL, charged_at = NULL,"
            " ended_at = NULL",
            "DELETE FROM chain_transactions WHERE purpose LIKE 'charge:%'",
            "DELETE FROM chain_events",
            "UPDATE settlement_credits SET state = 'sent', hash = NULL",
        ),
        {("", 0)},
    ),
    "a stroop more of revenue than of usage": (
        "DRIFT",
        (
            "UPDATE revenue_entries SET gross = gross + 1 WHERE gross = 70000000",
            "UPDATE revenue_accounts SET gross = gross + 1 WHERE gross = 70000000",
        ),
        {(":usage", 1)},
    ),
    "a call without revenue": (
        "DRIFT",
        ("DELETE FROM revenue_entries WHERE gross = 70000000", "DELETE FROM revenue_accounts WHERE gross = 70000000"),
        {(":usage", -7 * USDC), (":sealed", 7 * USDC - 700_000)},
    ),
    "a stroop more in an account than its entries have": (
        "DRIFT",
        ("UPDATE revenue_accounts SET gross = gross + 1 WHERE gross = 70000000",),
        {(":account", 1)},
    ),
    "a stroop less sealed than settled": (
        "DRIFT",
        ("UPDATE revenue_accounts SET sealed_gross = sealed_gross - 1 WHERE gross = 70000000",),
        {(":sealed", 1)},
    ),
    "a stroop more in a total than in its items": (
        "DRIFT",
        ("UPDATE settlements SET credit_total = credit_total - 1",),
        {(":credits", 1), (":credited", 1)},
    ),
    "a stroop less charged than settled": (
        "DRIFT",
        ("UPDATE chain_events SET amount = amount - 1 WHERE amount = 70000000",),
        {(":charge", -1)},
    ),
    "a charge that nobody settled": (
        "DRIFT",
        (
            "INSERT INTO chain_events (network, epoch, event_id, kind, ledger, closed_at, tx_hash, amount, state,"
            " noted_at, booked_at) SELECT network, epoch, repeat('9', 19) || '-0000000001', 'deduct', 5, now(),"
            " decode(repeat('ef', 32), 'hex'), 1, 'booked', now(), now() FROM chain_networks",
            "UPDATE chain_events SET closed_at = '2100-01-01' WHERE amount = 1",
        ),
        {("transaction:" + "ef" * 32, 1)},
    ),
    "a vault contract that has a stroop too much": (
        "DRIFT",
        (
            "INSERT INTO chain_reconciliations (network, epoch, ledger, at, on_chain, expected, parts)"
            " SELECT network, epoch, 5, now(), 2, 1, '{}' FROM chain_networks",
        ),
        {("vault contract", 1)},
    ),
}


async def test_every_fault_is_found_by_its_class_and_amount(mock_clock: MockClock, book: Book) -> None:
    columns = await book.kept()
    for fault, (kind, statements, wanted) in PLANTED.items():
        await book.plant(*statements)
        found = await book.found()
        assert kinds(found) == {kind}, (fault, found)
        assert len(found) == len(wanted), (fault, found)
        for subject, difference in wanted:
            assert any(subject in each.subject and each.difference == difference for each in found), (fault, found)
        assert (await book.halted() is not None) == (kind != "STALE_PENDING"), fault
        await book.restore(columns)
    assert await book.found() == []


async def test_what_was_credited_past_callora_is_a_drift_of_its_address(mock_clock: MockClock, book: Book) -> None:
    (_, anna), *_ = book.at.wallets.items()
    contract = await book.bookkeeper._contract()
    paid = await book.process.submitter.call("oops:1", contract.batch_receive_payment([(anna.address, 1)]))
    assert isinstance(paid, Applied)
    (found,) = await book.found()
    assert (found.kind, found.subject, found.difference) == ("DRIFT", f"address:{anna.address}", 1)


async def test_a_drift_of_one_stroop_stops_settlement_until_an_operator_clears_and_resumes_it(
    mock_clock: MockClock, book: Book
) -> None:
    await book.plant("UPDATE chain_events SET amount = amount - 1 WHERE amount = 70000000")
    (noted,) = (await book.compare()).open
    assert "DRIFT" in str(await book.halted())
    await book.at.earn(dict.fromkeys(book.at.wallets, 8 * USDC))
    assert "until an operator has looked" in await book.process.settlements.settle()
    assert await book.at.states() == ["completed"]

    assert await resume_settlement(book.database, "testnet")
    assert [each.discrepancy_id for each in (await book.compare()).open] == [noted.discrepancy_id]
    assert await book.halted() is not None, "what is not explained stops it again"

    assert await book.bookkeeper.clear(noted.discrepancy_id, "an operator", "the node lied")
    assert not await book.bookkeeper.clear(noted.discrepancy_id, "another", "twice")
    assert await resume_settlement(book.database, "testnet")
    assert (await book.compare()).open == []
    assert await book.halted() is None
    assert "1 settlements pay" in await book.process.settlements.settle()

    await book.plant("UPDATE chain_events SET amount = amount - 1 WHERE amount = 69999999")
    assert [each.difference for each in await book.found()] == [-2], "another amount is another discrepancy"
    assert await book.halted() is not None


async def test_what_is_not_found_any_more_is_gone_and_comes_back_as_the_same(mock_clock: MockClock, book: Book) -> None:
    more = "UPDATE revenue_accounts SET gross = gross + 1 WHERE gross = 70000000"
    less = "UPDATE revenue_accounts SET gross = gross - 1 WHERE gross = 70000001"
    await book.plant(more)
    (first,) = (await book.compare()).open
    await trio.sleep(1)
    await book.plant(less)
    assert (await book.compare()).open == []
    assert await book.database.fetch_value("SELECT gone_at IS NOT NULL FROM discrepancies")
    await trio.sleep(1)
    await book.plant(more)
    (again,) = (await book.compare()).open
    assert again.discrepancy_id == first.discrepancy_id
    assert again.found_at == first.found_at


async def test_what_ended_before_the_period_is_neither_found_nor_let_go(mock_clock: MockClock, book: Book) -> None:
    await book.plant("DELETE FROM chain_events")
    assert len(await book.found()) == 1
    compared = await book.bookkeeper.compare(book.at.town.clock.now())
    assert [each.found.kind for each in compared.open] == ["MISSING_TX"]
    assert compared.asked == 0


async def test_who_cannot_ask_the_chain_lets_nothing_go_and_says_of_how_much_it_cannot_tell(
    mock_clock: MockClock, book: Book
) -> None:
    await book.plant(*PLANTED["a credit that no node knows"][1])
    assert kinds(await book.found()) == {"MISSING_TX"}

    class Away:
        passphrase = book.process.chain.passphrase
        vault = book.process.chain.vault

        def __getattr__(self, name: str) -> Any:
            raise ChainUnavailable("away")

    book.bookkeeper._chain = cast(Any, Away())
    compared = await book.compare()
    assert (compared.asked, compared.untold) == (5, 5)
    assert [each.found.kind for each in compared.open] == ["MISSING_TX"]
    alone = bookkeeper(book.at, None)
    compared = await alone.compare(book.at.town.clock.now() - WEEK)
    assert compared.asked == 0


async def test_one_of_many_processes_compares_in_an_interval(mock_clock: MockClock, book: Book) -> None:
    turns = 0

    class Counted(Bookkeeper):
        async def compare(self, since: Any) -> Compared:
            nonlocal turns
            turns += 1
            return await super().compare(since)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            one = bookkeeper(book.at, book.process, 120)
            one.__class__ = Counted
            await nursery.start(one.run)
        await trio.sleep(100)
        assert turns == 1
        await trio.sleep(100)
        assert turns == 2
        nursery.cancel_scope.cancel()
    row = await book.database.fetch_row("SELECT asked, untold FROM book_comparisons")
    assert row is not None
    assert (row["asked"], row["untold"]) == (5, 0)


async def test_a_turn_that_comes_to_nothing_is_anybodys_at_once(mock_clock: MockClock, book: Book) -> None:
    class Crashing(Bookkeeper):
        async def compare(self, since: Any) -> Compared:
            raise RuntimeError("a bug")

    one = bookkeeper(book.at, book.process)
    one.__class__ = Crashing
    with pytest.raises(RuntimeError):
        await one._take_turn()
    other = bookkeeper(book.at, book.process)
    await other._take_turn()
    assert await book.database.fetch_value("SELECT ended_at IS NOT NULL FROM book_comparisons")
