"""A deduct that dies at any point is carried on by its retry: one charge in the end, and no success without it."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import attrs
import pytest
import trio

from callora.actors.billing import Billing, Deducted, Mismatch, Order, Refusal
from callora.ledger.commands import Delivery, Grant, release
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import ApiId, DeveloperId, EndpointId, EventId, Ids, UserId, VaultId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.outcomes import Draining, HoldClosed, InsufficientFunds
from callora.ledger.rounds import RoundResult, Share
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import Database, open_database
from callora.store.reads import billing as reads
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import Running, running
from tests.support.knife import Knife

AMOUNT = Stroops(60)


@attrs.frozen
class Bank:
    """A ledger, an API that is sold, and a user with a vault."""

    ledger: RealLedger
    dsn: str
    user_id: UserId
    vault_id: VaultId
    api_id: ApiId
    endpoint_id: EndpointId

    def order(self, name: str = "r", amount: int = AMOUNT) -> Order:
        return Order(name, self.api_id, self.endpoint_id, None, Stroops(amount), None)

    async def events(self) -> list[str]:
        """Return the states of the vault's usage events."""
        rows = await self.ledger.database.fetch("SELECT state::text AS state FROM usage_events")
        return sorted(row["state"] for row in rows)

    async def bound(self, name: str = "r") -> EventId:
        """Return the event that a request is bound to."""
        found = await reads.find_request(self.ledger.database, self.user_id, name)
        assert found is not None
        return found.request.event_id


@asynccontextmanager
async def open_bank(database: Database, database_url: str) -> AsyncIterator[Bank]:
    """Yield a bank whose ledger the audit finds clean when the block ends."""
    async with real_ledger(database, TestClock()) as ledger:
        now, user_id = ledger.clock.now(), UserId(ledger.ids.uuid7())
        await accounts.add_user(database, user_id, "Consumer", now)
        vault_id = VaultId(ledger.ids.uuid7())
        await accounts.ensure_vault(database, vault_id, user_id, "testnet", "free", now)
        await ledger.locked(vault_id, Grant(Stroops(100), "first"))
        developer = await accounts.ensure_developer(database, DeveloperId(ledger.ids.uuid7()), user_id, "D", now)
        api_id = await accounts.ensure_api(
            database,
            developer_id=developer,
            slug="sold",
            name="sold",
            base_url="http://127.0.0.1:9",
            endpoints=(PricedEndpoint("*", "*", parse_usdc("0.01")),),
            now=now,
        )
        endpoint = await database.fetch_value("SELECT endpoint_id FROM api_endpoints")
        yield Bank(ledger, database_url, user_id, vault_id, api_id, EndpointId(endpoint))
        assert await ledger.findings() == []


@pytest.fixture
async def bank(database: Database, database_url: str) -> AsyncIterator[Bank]:
    """A bank whose ledger the audit finds clean when the test ends."""
    async with open_bank(database, database_url) as opened:
        yield opened


class FaultyStore(VaultStore):
    """A store whose rounds go wrong as told: lost before they are stored, or stored without an answer."""

    faults: list[str]

    async def commit_round(self, shares: Sequence[Share]) -> RoundResult:
        fault = self.faults.pop(0) if self.faults else "ok"
        if fault == "lost":
            raise OutcomeUnknown("lost")
        if fault == "unavailable":
            raise StoreUnavailable("away")
        result = await super().commit_round(shares)
        if fault == "stored":
            raise OutcomeUnknown("stored")
        return result


@attrs.frozen
class Process:
    """One process: its own connections, registry and billing."""

    billing: Billing
    running: Running
    store: FaultyStore
    nursery: trio.Nursery


@asynccontextmanager
async def process(bank: Bank) -> AsyncIterator[Process]:
    """Run a process on the bank's database; on leaving, what is decided is still stored."""
    clock = bank.ledger.clock
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(bank.dsn))
        line = await stack.enter_async_context(database.line(LINE_SETTINGS))
        store = FaultyStore(database, line, clock, bank.ledger.ids.uuid7, 10)
        store.faults = []
        at = await stack.enter_async_context(running(store))
        billing = Billing(database, at.registry, clock, Ids(clock, os.urandom))
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(billing.run)
        yield Process(billing, at, store, nursery)
        nursery.cancel_scope.cancel()


class Killed(Billing):
    """Billing whose work on a request is cut at a chosen wait, as a kill would."""

    knife: Knife

    async def _carry_on(self, user_id: UserId, order: Order) -> Deducted | Refusal:
        with self.knife as scope, scope:
            return await super()._carry_on(user_id, order)
        raise OutcomeUnknown("killed")


@pytest.mark.parametrize("dies_with_it", [True, False])
async def test_defect_11_a_deduct_cut_at_any_wait_is_one_charge_after_its_retry_elsewhere(
    bank: Bank, dies_with_it: bool
) -> None:
    """The retry comes to another process, at once: what the first had sent may be stored before, during or after it.

    Args:
        dies_with_it: the first process's actors are killed too; otherwise they carry out what was sent to them.
    """
    cut_at, ends = 0, set()
    await bank.ledger.locked(bank.vault_id, Grant(Stroops(100_000), "plenty"))
    async with process(bank) as second:
        while True:
            cut_at += 1
            name = f"r-{cut_at}"
            async with process(bank) as first:
                killed = Killed(bank.ledger.database, first.running.registry, bank.ledger.clock, bank.ledger.ids)
                killed.knife = knife = Knife(cut_at)
                await first.nursery.start(killed.run)
                told: object = None
                try:
                    told = await killed.deduct(bank.user_id, bank.order(name))
                except OutcomeUnknown:
                    if dies_with_it:
                        first.running.registry_scope.cancel()
                before = await reads.find_request(bank.ledger.database, bank.user_id, name)
                ends.add(before and before.state)
                again = await second.billing.deduct(bank.user_id, bank.order(name))
                assert isinstance(again, Deducted), again
                assert again.already or not isinstance(told, Deducted)
            once_more = await second.billing.deduct(bank.user_id, bank.order(name))
            assert isinstance(once_more, Deducted)
            assert (once_more.event_id, once_more.already) == (again.event_id, True)
            assert await bank.events() == ["captured"] * cut_at
            if knife.waits < cut_at:
                break
    assert isinstance(told, Deducted), "the last is not cut at all"
    assert await bank.ledger.balance(bank.vault_id) == (100_100 - cut_at * AMOUNT, 0)
    assert {None, "captured"} <= ends
    print(f"\ncut at each of {cut_at - 1} waits; the retry found {ends}")


@pytest.mark.parametrize(
    "faults",
    [
        ["lost"],
        ["stored"],
        ["ok", "lost"],
        ["ok", "stored"],
        ["unavailable", "stored", "lost"],
        ["stored", "ok", "stored"],
    ],
)
async def test_defect_12_an_unknown_outcome_is_looked_up_and_never_retried_blindly(
    bank: Bank, faults: list[str]
) -> None:
    async with process(bank) as at:
        at.store.faults = list(faults)
        told: object = None
        for _ in range(20):
            with suppress(CalloraFault):
                told = await at.billing.deduct(bank.user_id, bank.order())
                break
        assert isinstance(told, Deducted)
        assert await bank.events() == ["captured"]
        assert await bank.ledger.balance(bank.vault_id) == (40, 0)
        assert told.event_id == await bank.bound()


async def test_a_hold_that_expired_after_a_crash_costs_nothing_and_the_retry_begins_anew(bank: Bank) -> None:
    async with process(bank) as at:
        at.store.faults = ["stored"]
        with pytest.raises(OutcomeUnknown):
            await at.billing.deduct(bank.user_id, bank.order())
        first = await bank.bound()
        assert await bank.events() == ["held"]
        ended = await at.running.ask(release(first, AMOUNT, Delivery("expired")), bank.vault_id)
        assert isinstance(ended, HoldClosed)
        assert await bank.ledger.balance(bank.vault_id) == (100, 0)
        told = await at.billing.deduct(bank.user_id, bank.order())
        assert isinstance(told, Deducted) and not told.already
        assert told.event_id == await bank.bound() != first
        assert await bank.events() == ["captured", "released"]
        assert await bank.ledger.balance(bank.vault_id) == (40, 0)


async def test_a_round_that_is_stored_after_its_retry_places_nothing(bank: Bank) -> None:
    async with process(bank) as slow, process(bank) as quick:
        late: list[list[Share]] = []
        stored = slow.store.commit_round

        async def delayed(shares: Sequence[Share]) -> RoundResult:
            late.append([attrs.evolve(each, holds=list(each.holds), closes=list(each.closes)) for each in shares])
            await trio.lowlevel.checkpoint()
            raise OutcomeUnknown("no answer in time")

        slow.store.commit_round = delayed  # type: ignore[method-assign]
        with pytest.raises(OutcomeUnknown):
            await slow.billing.deduct(bank.user_id, bank.order())
        assert isinstance(await quick.billing.deduct(bank.user_id, bank.order()), Deducted)
        # What the first process had sent arrives now.
        result = await stored(late[0])
        assert result.missed == {await bank.bound()}
        assert await bank.events() == ["captured"]
        assert await bank.ledger.balance(bank.vault_id) == (40, 0)


async def test_what_is_refused_is_bound_and_not_charged_and_another_body_is_another_request(bank: Bank) -> None:
    async with process(bank) as at:
        told = await at.billing.deduct(bank.user_id, bank.order(amount=101))
        assert told == InsufficientFunds(Stroops(101), Stroops(100))
        assert await at.billing.deduct(bank.user_id, bank.order(amount=100)) == Mismatch()
        await bank.ledger.locked(bank.vault_id, Grant(Stroops(1), "one more"))
        told = await at.billing.deduct(bank.user_id, bank.order(amount=101))
        assert isinstance(told, Deducted) and (told.already, told.available) == (False, 0)


async def test_who_leaves_does_not_stop_the_charge_and_who_comes_after_shares_it(bank: Bank) -> None:
    async with process(bank) as at:
        with trio.CancelScope() as scope:
            scope.cancel()
            await at.billing.deduct(bank.user_id, bank.order())
        assert scope.cancelled_caught
        told = await at.billing.deduct(bank.user_id, bank.order())
        assert isinstance(told, Deducted) and told.already
        assert await bank.events() == ["captured"]


async def test_identical_requests_with_different_bodies_at_once_are_one_charge_and_refusals(bank: Bank) -> None:
    async with process(bank) as at:
        told: list[object] = []

        async def one(amount: int) -> None:
            told.append(await at.billing.deduct(bank.user_id, bank.order(amount=amount)))

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, 1 + number % 4)
        assert sum(isinstance(each, Deducted) for each in told) == 10
        assert sum(each == Mismatch() for each in told) == 30
        assert await bank.events() == ["captured"]


async def test_without_its_task_nothing_is_taken_and_what_is_under_way_is_unknown(bank: Bank) -> None:
    async with process(bank) as at:
        gate = trio.Event()
        stored = at.store.commit_round

        async def held_up(shares: Sequence[Share]) -> RoundResult:
            await gate.wait()
            return await stored(shares)

        at.store.commit_round = held_up  # type: ignore[method-assign]
        fault: list[BaseException] = []

        async def one() -> None:
            try:
                await at.billing.deduct(bank.user_id, bank.order())
            except OutcomeUnknown as error:
                fault.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            with trio.fail_after(60):
                while not await bank.ledger.count("billing_requests"):  # noqa: ASYNC110 - another task's database
                    await trio.lowlevel.checkpoint()
            at.nursery.cancel_scope.cancel()
        assert len(fault) == 1
        assert await at.billing.deduct(bank.user_id, bank.order("other")) == Draining()
        gate.set()
    async with process(bank) as at:
        assert isinstance(await at.billing.deduct(bank.user_id, bank.order()), Deducted)
    assert await bank.events() == ["captured"]
