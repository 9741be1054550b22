"""A dispute is decided once and refunded once, wherever whoever carries it out dies."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from callora.actors import disputes as actors
from callora.actors.billing import Billing, ChargeMissing, Credited, Deducted, Mismatch
from callora.actors.disputes import (
    DecidedBefore,
    DisputedBefore,
    Disputes,
    EventMissing,
    NothingToRefund,
    Resolution,
)
from callora.ledger.commands import Grant, Refund, SetStanding
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import Draining, Overloaded, RefundRefused
from callora.store.bridge import Database
from callora.store.disputes import Dispute
from callora.store.reads import disputes as reads
from tests.actors.test_billing import AMOUNT, Bank, Process, open_bank, process
from tests.simulation.support import QUIET
from tests.support.knife import Knife

RICH = 1_000_000


@attrs.frozen
class Court:
    """A bank whose customer disputes what he paid."""

    bank: Bank
    at: Process
    disputes: Disputes

    def disputes_of(self, billing: Billing) -> Disputes:
        """Return what resolves disputes by another billing."""
        ledger = self.bank.ledger
        return Disputes(ledger.database, billing, ledger.clock, ledger.ids, QUIET)

    async def paid(self) -> EventId:
        """Return an event that was charged AMOUNT."""
        made = await self.at.billing.deduct(self.bank.user_id, self.bank.order(self.bank.ledger.ids.uuid7()))
        assert isinstance(made, Deducted)
        return made.event_id

    async def disputed(self) -> Dispute:
        """Return an open dispute of a new event."""
        made = await self.disputes.open(self.bank.user_id, await self.paid(), "because")
        assert isinstance(made, Dispute)
        return made

    async def now(self, dispute: Dispute) -> Dispute:
        """Return a dispute as it stands."""
        found = await reads.find_dispute(self.bank.ledger.database, dispute.dispute_id)
        assert found is not None
        return found

    async def refunds(self, dispute: Dispute) -> list[int]:
        """Return all refunds of a dispute's event."""
        rows = await self.bank.ledger.database.fetch(
            "SELECT amount FROM ledger_entries WHERE kind = 'refund' AND event_id = $1 ORDER BY seq", dispute.event_id
        )
        return [row["amount"] for row in rows]

    async def steps(self, dispute: Dispute) -> list[str]:
        """Return what became of a dispute."""
        return [str(each["type"]) for each in await reads.events_of(self.bank.ledger.database, dispute.dispute_id)]

    async def told(self, dispute: Dispute) -> list[tuple[str, str]]:
        """Return what was told of a dispute, with its status then."""
        rows = await self.bank.ledger.database.fetch(
            "SELECT type, payload ->> 'status' AS status FROM outbox WHERE payload ->> 'disputeId' = $1 ORDER BY type",
            dispute.dispute_id,
        )
        return [(row["type"], row["status"]) for row in rows]

    async def refunded_once(self, dispute: Dispute) -> None:
        """Assert that a dispute ended with one refund of all that was charged, told once."""
        found = await self.now(dispute)
        assert (found.status, found.refunded) == ("REFUNDED", AMOUNT)
        assert await self.refunds(dispute) == [AMOUNT]
        assert await self.steps(dispute) == ["opened", "decided", "refunded"]
        assert await self.told(dispute) == [("dispute_opened", "OPEN"), ("dispute_resolved", "REFUNDED")]


@asynccontextmanager
async def court(bank: Bank) -> AsyncIterator[Court]:
    """Run a process that takes disputes."""
    async with process(bank) as at:
        ledger = bank.ledger
        yield Court(bank, at, Disputes(ledger.database, at.billing, ledger.clock, ledger.ids, QUIET))


@pytest.fixture
async def at(database: Database, database_url: str) -> AsyncIterator[Court]:
    """A court; the audit finds its ledger clean when the test ends."""
    async with open_bank(database, database_url) as bank:
        await bank.ledger.locked(bank.vault_id, Grant(Stroops(RICH), "rich"))
        async with court(bank) as opened:
            yield opened


@pytest.mark.parametrize("dies_with_it", [True, False])
@pytest.mark.parametrize("resolution", ["REFUNDED", "UPHELD"])
async def test_a_resolve_cut_at_any_wait_is_carried_out_once_by_the_next_pass(
    at: Court, dies_with_it: bool, resolution: Resolution
) -> None:
    """Args:
    dies_with_it: the actors of the process are killed too; otherwise they carry out what was sent to them.
    """
    cut_at, seen = 0, set()
    while True:
        cut_at += 1
        dispute = await at.disputed()
        async with court(at.bank) as dying:
            knife = Knife(cut_at)
            with knife as scope, scope:
                await dying.disputes.resolve(dispute.dispute_id, resolution, "n", "somebody")
            if knife.cut and dies_with_it:
                dying.at.running.registry_scope.cancel()
            seen.add((await at.now(dispute)).status)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.disputes.sweep)
                nursery.start_soon(at.disputes.sweep)
        if (await at.now(dispute)).status == "OPEN":
            assert await at.refunds(dispute) == []
            assert isinstance(await at.disputes.resolve(dispute.dispute_id, resolution, "n", "somebody"), Dispute)
        if resolution == "REFUNDED":
            await at.refunded_once(dispute)
        else:
            assert (await at.now(dispute)).status == "UPHELD"
            assert await at.refunds(dispute) == []
            assert await at.told(dispute) == [("dispute_opened", "OPEN"), ("dispute_resolved", "UPHELD")]
        if knife.waits < cut_at:
            break
    expected = {"OPEN", "REFUNDING", "REFUNDED"} if resolution == "REFUNDED" else {"OPEN", "UPHELD"}
    assert seen == expected
    print(f"\ncut at each of {cut_at - 1} waits; the pass found {seen}")


async def test_an_opening_cut_at_any_wait_is_there_with_what_tells_of_it_or_not_at_all(at: Court) -> None:
    cut_at, seen = 0, set()
    while True:
        cut_at += 1
        event_id = await at.paid()
        knife = Knife(cut_at)
        with knife as scope, scope:
            await at.disputes.open(at.bank.user_id, event_id, "because")
        again = await at.disputes.open(at.bank.user_id, event_id, "because")
        seen.add(type(again))
        assert isinstance(again, Dispute | DisputedBefore)
        found = await reads.find_dispute(at.bank.ledger.database, again.dispute_id)
        assert found is not None
        assert await at.told(found) == [("dispute_opened", "OPEN")]
        assert await at.steps(found) == ["opened"]
        if knife.waits < cut_at:
            break
    assert seen == {Dispute, DisputedBefore}


class Dying(Billing):
    """Billing that loses its process when it has booked a refund, or before."""

    books: bool

    async def refund(
        self, event_id: EventId, amount: Stroops | None, ref: str, vault_id: VaultId | None = None
    ) -> Credited | ChargeMissing | RefundRefused | Mismatch | Overloaded | Draining:
        if self.books:
            await super().refund(event_id, amount, ref, vault_id)
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("the process died")


class Busy(Billing):
    """Billing that has no place in a vault's mailbox."""

    async def refund(
        self, event_id: EventId, amount: Stroops | None, ref: str, vault_id: VaultId | None = None
    ) -> Credited | ChargeMissing | RefundRefused | Mismatch | Overloaded | Draining:
        await trio.lowlevel.checkpoint()
        return Overloaded()


class Raced(Billing):
    """Billing before whose refund somebody else gives back a part by another name, after it was looked at."""

    part: Stroops
    bank: Bank

    async def refund(
        self, event_id: EventId, amount: Stroops | None, ref: str, vault_id: VaultId | None = None
    ) -> Credited | ChargeMissing | RefundRefused | Mismatch | Overloaded | Draining:
        if self.part:
            part, self.part = self.part, Stroops(0)
            await self.bank.ledger.locked(self.bank.vault_id, Refund(event_id, part, f"other {event_id}"))
            return RefundRefused(Stroops(AMOUNT - part))
        return await super().refund(event_id, amount, ref, vault_id)


def billing_like(at: Court, kind: type[Billing]) -> Billing:
    """Return a billing of this kind with the court's parts."""
    ledger = at.bank.ledger
    return kind(ledger.database, at.at.running.registry, ledger.clock, ledger.ids)


@pytest.mark.parametrize("books", [True, False])
async def test_who_dies_between_the_decision_and_its_note_leaves_one_refund_to_the_next_pass(
    at: Court, books: bool
) -> None:
    billing = billing_like(at, Dying)
    assert isinstance(billing, Dying)
    billing.books = books
    dispute = await at.disputed()
    left = await at.disputes_of(billing).resolve(dispute.dispute_id, "REFUNDED", None, "somebody")
    assert isinstance(left, Dispute) and left.status == "REFUNDING"
    assert await at.refunds(dispute) == ([AMOUNT] if books else [])
    assert await at.disputes.resolve(dispute.dispute_id, "REFUNDED", None, "another") == DecidedBefore("REFUNDING")
    assert await at.told(dispute) == [("dispute_opened", "OPEN")], "not before it is given back"
    await at.disputes_of(billing).sweep()
    assert (await at.now(dispute)).status == "REFUNDING", "a pass that dies leaves it too"
    async with court(at.bank) as second, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(at.disputes.sweep)
            nursery.start_soon(second.disputes.sweep)
    await at.refunded_once(dispute)
    assert (await at.now(dispute)).decided_by == "somebody"


async def test_an_overloaded_vault_is_refunded_by_a_later_pass_and_holds_up_no_other(
    at: Court, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "BATCH", 2)
    busy = at.disputes_of(billing_like(at, Busy))
    disputes: Sequence[Dispute] = [await at.disputed() for _ in range(5)]
    for each in disputes:
        left = await busy.resolve(each.dispute_id, "REFUNDED", None, "somebody")
        assert isinstance(left, Dispute) and left.status == "REFUNDING"
    await busy.sweep()
    assert {(await at.now(each)).status for each in disputes} == {"REFUNDING"}
    await at.disputes.sweep()
    for each in disputes:
        await at.refunded_once(each)


@pytest.mark.parametrize("standing", ["suspended", "arrears"])
async def test_a_vault_that_may_not_spend_is_refunded_all_the_same(at: Court, standing: str) -> None:
    dispute = await at.disputed()
    stand = SetStanding("suspended" if standing == "suspended" else "arrears")
    await at.at.running.ask(stand, at.bank.vault_id)
    assert isinstance(await at.disputes.resolve(dispute.dispute_id, "REFUNDED", None, "somebody"), Dispute)
    await at.refunded_once(dispute)


async def test_what_was_refunded_otherwise_is_not_refunded_again(at: Court) -> None:
    """Before the decision and between it and the refund, in part and whole."""
    dispute = await at.disputed()
    await at.bank.ledger.locked(at.bank.vault_id, Refund(dispute.event_id, Stroops(20), "other"))
    made = await at.disputes.resolve(dispute.dispute_id, "REFUNDED", None, "somebody")
    assert isinstance(made, Dispute) and made.refunded == AMOUNT - 20
    assert await at.refunds(dispute) == [20, AMOUNT - 20]

    dispute = await at.disputed()
    raced = billing_like(at, Raced)
    assert isinstance(raced, Raced)
    raced.part, raced.bank = Stroops(10), at.bank
    made = await at.disputes_of(raced).resolve(dispute.dispute_id, "REFUNDED", None, "somebody")
    assert isinstance(made, Dispute) and made.refunded == AMOUNT - 10
    assert await at.refunds(dispute) == [10, AMOUNT - 10]

    dispute = await at.disputed()
    raced.part = AMOUNT
    assert await at.disputes_of(raced).resolve(dispute.dispute_id, "REFUNDED", "n", "x") == NothingToRefund()
    found = await at.now(dispute)
    assert (found.status, found.decided_by, found.notes) == ("OPEN", None, None)
    assert await at.refunds(dispute) == [AMOUNT]
    assert await at.steps(dispute) == ["opened", "decided", "taken_back"]
    assert await at.disputes.resolve(dispute.dispute_id, "REFUNDED", None, "x") == NothingToRefund()
    await at.disputes.sweep()
    assert isinstance(await at.disputes.resolve(dispute.dispute_id, "UPHELD", "paid back", "x"), Dispute)
    assert await at.told(dispute) == [("dispute_opened", "OPEN"), ("dispute_resolved", "UPHELD")]


async def test_of_many_who_decide_at_two_processes_one_does(at: Court) -> None:
    async with court(at.bank) as second:
        for _ in range(10):
            dispute, told, start = await at.disputed(), list[object](), trio.Event()

            async def decide(
                number: int,
                dispute: Dispute = dispute,
                told: list[object] = told,
                start: trio.Event = start,
            ) -> None:
                await start.wait()
                resolution: Resolution = "REFUNDED" if number % 2 else "UPHELD"
                where = at if number % 4 < 2 else second
                told.append(await where.disputes.resolve(dispute.dispute_id, resolution, None, str(number)))

            async with trio.open_nursery() as nursery:
                for number in range(12):
                    nursery.start_soon(decide, number)
                start.set()
            (winner,) = [each for each in told if isinstance(each, Dispute)]
            assert all(isinstance(each, DecidedBefore) for each in told if each is not winner)
            if winner.status == "REFUNDED":
                await at.refunded_once(dispute)
            else:
                assert await at.refunds(dispute) == []
            assert (await at.now(dispute)).status == winner.status


async def test_of_many_who_open_one_event_at_once_one_does(at: Court) -> None:
    event_id, told = await at.paid(), list[object]()

    async def one() -> None:
        told.append(await at.disputes.open(at.bank.user_id, event_id, "because"))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)
    (made,) = [each for each in told if isinstance(each, Dispute)]
    assert [each for each in told if each is not made] == [DisputedBefore(made.dispute_id, "OPEN")] * 7
    assert await at.bank.ledger.count("outbox", "type = 'dispute_opened'") == 1
    stranger = UserId(at.bank.ledger.ids.uuid7())
    assert await at.disputes.open(stranger, event_id, "because") == EventMissing()
