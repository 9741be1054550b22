"""Settlements as stored: what the database refuses whoever asks, and what of many that try only one does."""

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any

import attrs
import pytest
import trio

from callora.ledger.faults import StoreRefused
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops
from callora.ledger.settlement import TRANSITIONS, Candidate, Item, Part, Settlement, items_for
from callora.store import settlements as store
from callora.store.bridge import Database
from callora.store.revenue import advance
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.store.test_rollup import placed, taken
from tests.support.chain_rows import set_network

DEVELOPER = DeveloperId("00000000-0000-7000-8000-00000000000b")
"""Who earns by the calls of the tests' ledger."""
ADDRESS = "G" + "D" * 55
ALL_STATES = tuple(TRANSITIONS)


@attrs.define(eq=False)
class Desk:
    """A ledger in which a developer has earned 10 stroops a call."""

    ledger: RealLedger
    vault_id: Any
    number: int = 0

    @property
    def database(self) -> Database:
        """The pool."""
        return self.ledger.database

    @property
    def now(self) -> Any:
        """The clock's."""
        return self.ledger.clock.now()

    async def earn(self, calls: int = 1) -> None:
        """Let calls be paid for and indexed."""
        for _ in range(calls):
            await taken(self.ledger, self.vault_id, await placed(self.ledger, self.vault_id))
        await advance(self.database, self.now)

    async def sealed(self) -> Settlement:
        """Return a settlement of what was earned."""
        settlement_id = self.ledger.ids.uuid7()

        def group(candidates: Sequence[Candidate]) -> Sequence[tuple[str, Sequence[Item]]]:
            return [(settlement_id, items_for(settlement_id, candidates, None))]

        made = await store.seal(self.database, "testnet", 1, {DEVELOPER: ADDRESS}, Stroops(1), group, self.now)
        assert made == [settlement_id]
        return await self.find(settlement_id)

    async def find(self, settlement_id: str) -> Settlement:
        """Return a settlement as it stands."""
        found = await store.find(self.database, settlement_id)
        assert found is not None
        return found

    async def applied(self, purpose: str) -> None:
        """Let a transaction of a purpose succeed."""
        await self.stored(purpose)
        await self.database.execute(
            "UPDATE chain_transactions SET state = 'succeeded', ledger = 7, applied_at = now(), fee_charged = 1,"
            " result_code = 'tx_success', closes_purpose = true, ended_at = now() WHERE purpose = $1",
            purpose,
        )

    async def stored(self, purpose: str) -> None:
        """Store a transaction for a purpose."""
        self.number += 1
        await self.database.execute(
            "INSERT INTO chain_transactions (hash, network, epoch, purpose, envelope, source_account, sequence,"
            " max_time, fee, prepared_ledger, bid, channel, sponsored, failed_before, state, stored_at) VALUES"
            " (decode(lpad($1::bigint::text, 64, '0'), 'hex'), 'testnet', 1, $2, 'AAAA', 'G' || repeat('A', 55), $1,"
            " now(), 1, 1, 1, false, false, 0, 'stored', now())",
            self.number,
            purpose,
        )

    async def reserved(self, purpose: str, amount: int = 10) -> None:
        """Reserve what a purpose moves."""
        assert await store.reserve(
            self.database, "testnet", "charging", purpose, Stroops(amount), Stroops(10**12), self.now
        )

    async def in_state(self, state: str) -> Settlement:
        """Return a settlement that has walked to a state."""
        await self.earn()
        made = await self.sealed()
        if state == "sealed":
            return made
        await self.reserved(made.charge_purpose)
        assert await store.begin_charge(self.database, made, self.now)
        if state == "failed":
            assert await store.fail(self.database, made, "why", self.ledger.ids.uuid7, self.now)
        if state in ("charge_sent", "failed"):
            return await self.find(made.settlement_id)
        await self.applied(made.charge_purpose)
        assert await store.book_charge(self.database, made, "transaction", self.now)
        if state == "charged":
            return await self.find(made.settlement_id)
        assert await store.begin_credits(self.database, made, self.now)
        if state == "completed":
            part = Part(1, 1, 1)
            await self.reserved(made.credit_purpose(part))
            await self.applied(made.credit_purpose(part))
            assert await store.book_credits(self.database, made, part, self.now)
            assert await store.complete(self.database, made, self.ledger.ids.uuid7, self.now)
        return await self.find(made.settlement_id)

    async def account(self) -> tuple[int, int]:
        """Return what was earned, and what of it is sealed."""
        row = await self.database.fetch_row("SELECT gross, sealed_gross FROM revenue_accounts")
        assert row is not None
        return row["gross"], row["sealed_gross"]


@pytest.fixture
async def desk(database: Database) -> AsyncIterator[Desk]:
    """A desk whose audit is clean in the end."""
    await set_network(database, epoch=1)
    async with real_ledger(database, TestClock()) as ledger:
        yield Desk(ledger, await ledger.vault(100_000))
        assert await ledger.findings() == []


async def refused(database: Database, constraint: str, sql: str, *args: object) -> None:
    """Fail unless the database refuses a statement by a rule of ours."""
    with pytest.raises(StoreRefused) as raised:
        await database.execute(sql, *args)
    assert raised.value.constraint == constraint, raised.value


@pytest.mark.parametrize("state", [state for state in ALL_STATES if state != "open"])
async def test_a_settlement_moves_by_its_transitions_alone(desk: Desk, state: str) -> None:
    settlement = await desk.in_state(state)
    assert settlement.state == state
    for other in ALL_STATES:
        if other not in TRANSITIONS[state]:
            sql = "UPDATE settlements SET state = $2 WHERE settlement_id = $1"
            await refused(desk.database, "settlements_move_forwards", sql, settlement.settlement_id, other)
    for column in ("charge_total", "credit_total", "items", "epoch"):
        sql = f"UPDATE settlements SET {column} = {column} + 1 WHERE settlement_id = $1"
        await refused(desk.database, "settlements_move_forwards", sql, settlement.settlement_id)


async def test_what_is_sealed_is_neither_changed_nor_added_to_nor_deleted(desk: Desk) -> None:
    settlement = await desk.in_state("sealed")
    for sql in (
        "UPDATE settlement_items SET credit = credit + 1",
        "DELETE FROM settlement_items",
        "DELETE FROM settlements",
        "UPDATE revenue_entries SET fee = 0",
        "DELETE FROM revenue_entries",
    ):
        with pytest.raises(StoreRefused, match="what is closed is never changed"):
            await desk.database.execute(sql)
    await refused(
        desk.database,
        "items_of_open_settlement",
        "INSERT INTO settlement_items (settlement_id, position, network, address, gross, fee, credit)"
        " VALUES ($1, 2, 'testnet', 'G' || repeat('E', 55), 0, 0, 1)",
        settlement.settlement_id,
    )


async def test_revenue_is_in_one_live_settlement_and_free_again_when_that_fails(desk: Desk) -> None:
    settlement = await desk.in_state("charge_sent")
    assert await desk.account() == (10, 10)
    await desk.earn()
    due = await store.due(desk.database, "testnet", Stroops(1), desk.now, store.NOBODY, 10)
    assert due == [], "one settlement of a developer at a time"
    assert await store.fail(desk.database, settlement, "why", desk.ledger.ids.uuid7, desk.now)
    assert not await store.fail(desk.database, settlement, "why", desk.ledger.ids.uuid7, desk.now)
    assert await desk.account() == (20, 0)
    assert (await desk.sealed()).charge_total == 20


async def test_an_item_is_what_was_earned_since_the_last_one_and_nothing_else(desk: Desk) -> None:
    await desk.in_state("completed")
    await desk.earn()
    settlement_id = desk.ledger.ids.uuid7()

    async def forge(gross: int, from_pass: int | None) -> None:
        async with desk.database.transaction() as connection:
            await connection.execute(
                "INSERT INTO settlements (settlement_id, network, epoch, state, items, charge_total, credit_total,"
                " opened_at, moved_at) VALUES ($1, 'testnet', 1, 'open', 1, $2, $2, now(), now())",
                settlement_id,
                gross,
            )
            await connection.execute(
                "INSERT INTO settlement_items (settlement_id, position, network, developer_id, address, from_pass,"
                " to_pass, gross, fee, credit, request_id) SELECT $1, 1, 'testnet', $2, $3,"
                " coalesce($5, a.sealed_pass), i.pass, $4, 0, $4, repeat('f', 32)"
                " FROM revenue_accounts a, revenue_index i",
                settlement_id,
                DEVELOPER,
                ADDRESS,
                gross,
                from_pass,
            )

    for gross, from_pass in ((20, 0), (9, None), (11, None), (10, 0)):
        with pytest.raises(StoreRefused) as raised:
            await forge(gross, from_pass)
        assert raised.value.constraint == "items_of_unsealed_revenue"


async def test_what_is_opened_and_not_sealed_is_not_stored(desk: Desk) -> None:
    await refused(
        desk.database,
        "settlements_sealed_at_once",
        "INSERT INTO settlements (settlement_id, network, epoch, state, items, charge_total, credit_total, opened_at,"
        " moved_at) VALUES (gen_random_uuid(), 'testnet', 1, 'open', 1, 1, 1, now(), now())",
    )


async def test_credits_are_never_more_than_charges(desk: Desk) -> None:
    with pytest.raises(StoreRefused, match="check constraint"):
        await desk.database.execute(
            "INSERT INTO settlements (settlement_id, network, epoch, state, items, charge_total, credit_total,"
            " opened_at, moved_at) VALUES (gen_random_uuid(), 'testnet', 1, 'open', 1, 1, 2, now(), now())"
        )


async def test_nothing_is_charged_or_credited_before_its_step_is_stored_and_its_amount_reserved(desk: Desk) -> None:
    await desk.earn()
    settlement = await desk.sealed()
    part = Part(1, 1, 1)
    for purpose in (settlement.charge_purpose, settlement.credit_purpose(part)):
        with pytest.raises(StoreRefused) as raised:
            await desk.stored(purpose)
        assert raised.value.constraint == "settlement_step_due"
    assert await store.begin_charge(desk.database, settlement, desk.now)
    with pytest.raises(StoreRefused):
        await desk.stored(settlement.charge_purpose)
    await desk.reserved(settlement.charge_purpose)
    await desk.stored(settlement.charge_purpose)
    with pytest.raises(StoreRefused):
        await desk.stored(settlement.credit_purpose(part))


async def test_what_is_charged_or_may_be_is_not_failed_and_what_has_failed_is_not_charged(desk: Desk) -> None:
    settlement = await desk.in_state("charge_sent")
    await desk.stored(settlement.charge_purpose)
    assert not await store.fail(desk.database, settlement, "why", desk.ledger.ids.uuid7, desk.now)
    assert (await desk.find(settlement.settlement_id)).state == "charge_sent"
    charged = "UPDATE settlements SET state = 'failed', failure = 'x', ended_at = now() WHERE settlement_id = $1"
    await refused(desk.database, "failed_uncharged", charged, settlement.settlement_id)


async def test_a_failed_settlement_can_not_be_charged_by_whoever_is_late(desk: Desk) -> None:
    settlement = await desk.in_state("failed")
    with pytest.raises(StoreRefused) as raised:
        await desk.stored(settlement.charge_purpose)
    assert raised.value.constraint == "settlement_step_due"


@pytest.mark.parametrize("state", ["charged", "credit_sent"])
async def test_a_charged_settlement_never_fails_on_the_history_it_was_charged_on(desk: Desk, state: str) -> None:
    settlement = await desk.in_state(state)
    assert not await store.fail(desk.database, settlement, "why", desk.ledger.ids.uuid7, desk.now)


async def test_nothing_is_booked_that_no_transaction_did(desk: Desk) -> None:
    settlement = await desk.in_state("charge_sent")
    with pytest.raises(StoreRefused):
        await store.book_charge(desk.database, settlement, "transaction", desk.now)
    await desk.applied(settlement.charge_purpose)
    assert await store.book_charge(desk.database, settlement, "transaction", desk.now)
    assert await store.begin_credits(desk.database, settlement, desk.now)
    with pytest.raises(StoreRefused):
        await store.book_credits(desk.database, settlement, Part(1, 1, 1), desk.now)
    with pytest.raises(StoreRefused) as raised:
        await store.complete(desk.database, settlement, desk.ledger.ids.uuid7, desk.now)
    assert raised.value.constraint == "completed_as_credited"


async def test_a_part_that_may_be_credited_is_neither_split_nor_tried_in_another_way(desk: Desk) -> None:
    settlement = await desk.in_state("credit_sent")
    part = Part(1, 1, 1)
    await desk.reserved(settlement.credit_purpose(part))
    await desk.stored(settlement.credit_purpose(part))
    assert not await store.again(desk.database, settlement, part, desk.now)
    await desk.database.execute(
        "UPDATE chain_transactions SET state = 'failed', ledger = 7, applied_at = now(), fee_charged = 1,"
        " result_code = 'tx_failed', closes_purpose = true, ended_at = now() WHERE purpose = $1",
        settlement.credit_purpose(part),
    )
    assert await store.again(desk.database, settlement, part, desk.now)
    assert (await desk.find(settlement.settlement_id)).parts == (Part(1, 1, 1, "sent", 2),)
    with pytest.raises(StoreRefused):
        await desk.stored(settlement.credit_purpose(part))


async def test_of_many_that_take_the_same_step_one_does(desk: Desk) -> None:
    settlement = await desk.in_state("sealed")
    await desk.reserved(settlement.charge_purpose)

    async def race(verb: Callable[[], Any]) -> None:
        done: list[bool] = []

        async def one() -> None:
            done.append(await verb())

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(one)
        assert sorted(done) == [False] * 5 + [True]

    new_id = desk.ledger.ids.uuid7
    await race(lambda: store.begin_charge(desk.database, settlement, desk.now))
    await desk.applied(settlement.charge_purpose)
    await race(lambda: store.book_charge(desk.database, settlement, "transaction", desk.now))
    await race(lambda: store.begin_credits(desk.database, settlement, desk.now))
    part = Part(1, 1, 1)
    await desk.reserved(settlement.credit_purpose(part))
    await desk.applied(settlement.credit_purpose(part))
    await race(lambda: store.book_credits(desk.database, settlement, part, desk.now))
    await race(lambda: store.complete(desk.database, settlement, new_id, desk.now))
    assert await desk.ledger.count("outbox", "type LIKE 'settlement%'") == 1


async def test_the_cap_of_a_key_holds_for_all_who_reserve_at_once_and_for_an_hour(desk: Desk) -> None:
    done: list[bool] = []

    async def reserve(number: int, at: Any) -> bool:
        return await store.reserve(
            desk.database, "testnet", "charging", f"charge:{number}", Stroops(10), Stroops(35), at
        )

    async def one(number: int) -> None:
        done.append(await reserve(number, desk.now))

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(one, number)
    assert sorted(done) == [False] * 5 + [True] * 3
    kept = await desk.database.fetch_value("SELECT min(purpose) FROM signer_spending")
    assert await reserve(int(kept.split(":")[1]), desk.now), "what is reserved is so"
    assert await store.reserve(desk.database, "testnet", "crediting", "credit:1", Stroops(35), Stroops(35), desk.now)
    assert not await reserve(100, desk.now + timedelta(minutes=59))
    assert await reserve(100, desk.now + timedelta(minutes=61))


async def test_a_lease_is_one_processes_until_it_ends_or_is_given_back(desk: Desk) -> None:
    one, other = desk.ledger.ids.uuid7(), desk.ledger.ids.uuid7()
    assert await store.take_lease(desk.database, "testnet", one, 60) is not None
    assert await store.take_lease(desk.database, "testnet", other, 60) is None
    assert await store.take_lease(desk.database, "testnet", one, 0) is not None
    assert await store.take_lease(desk.database, "testnet", other, 60) is not None
    assert (await store.runner(desk.database, "testnet")).held
    await store.give_lease(desk.database, "testnet", one)
    assert (await store.runner(desk.database, "testnet")).held
    await store.give_lease(desk.database, "testnet", other)
    assert not (await store.runner(desk.database, "testnet")).held


async def test_a_run_that_is_asked_for_is_wanted_until_it_is_served(desk: Desk) -> None:
    holder = desk.ledger.ids.uuid7()
    wanted_at = await store.ask_for_run(desk.database, "testnet")
    lease = await store.take_lease(desk.database, "testnet", holder, 60)
    assert lease == store.Lease(wanted_at, True, None)
    await store.note_served(desk.database, "testnet", wanted_at, "nothing")
    lease = await store.take_lease(desk.database, "testnet", holder, 60)
    assert lease is not None
    assert not lease.wanted
    assert lease.age_seconds is not None
