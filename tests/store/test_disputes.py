"""What the database itself refuses of disputes, whoever writes it."""

from collections.abc import AsyncIterator

import attrs
import pytest

from callora.ledger.commands import Delivery, PlaceHold, Refund, capture, release
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.store import disputes as store
from callora.store.bridge import Database
from callora.store.disputes import Dispute
from callora.store.reads import disputes as reads
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED

DECIDED = "decided_at = now(), decided_by = 'somebody'"
UNDECIDED = "decided_at = NULL, decided_by = NULL, notes = NULL"


@attrs.frozen
class Payer:
    """A vault that paid for calls."""

    ledger: RealLedger
    vault_id: VaultId
    user_id: UserId

    async def event(self, amount: int = 60) -> EventId:
        """Return an event that was charged this much."""
        event_id = self.ledger.event()
        place = PlaceHold(event_id, Stroops(60), 60, CHARGED)
        await self.ledger.store.commit_round([await self.ledger.share(self.vault_id, place)])
        close = capture(event_id, Stroops(60), Stroops(amount), DELIVERED)
        await self.ledger.store.commit_round([await self.ledger.share(self.vault_id, close)])
        return event_id

    async def add(self, event_id: EventId, user_id: UserId | None = None) -> Dispute | None:
        """Store a dispute."""
        async with self.ledger.database.transaction() as connection:
            return await store.add_dispute(
                connection,
                self.ledger.ids.uuid7(),
                self.vault_id,
                event_id,
                user_id or self.user_id,
                "because",
                self.ledger.clock.now(),
            )

    async def dispute(self) -> Dispute:
        """Return a dispute of a new event."""
        made = await self.add(await self.event())
        assert made is not None
        return made

    async def change(self, dispute: Dispute, change: str) -> None:
        """Write to a dispute as no actor would."""
        await self.ledger.database.execute(f"UPDATE disputes SET {change} WHERE dispute_id = '{dispute.dispute_id}'")

    async def refused(self, dispute: Dispute, change: str) -> str | None:
        """Return which rule refuses a change."""
        with pytest.raises(StoreRefused) as refusal:
            await self.change(dispute, change)
        return refusal.value.constraint


@pytest.fixture
async def payer(database: Database) -> AsyncIterator[Payer]:
    """A payer whose ledger the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as ledger:
        vault_id = await ledger.vault(1000)
        user_id = await database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", vault_id)
        yield Payer(ledger, vault_id, UserId(str(user_id)))
        assert await ledger.findings() == []


async def test_only_what_ones_own_vault_was_charged_is_disputed(payer: Payer) -> None:
    ledger = payer.ledger
    held, released, free = ledger.event(), ledger.event(), await payer.event(0)
    for event_id in (held, released):
        place = PlaceHold(event_id, Stroops(60), 60, CHARGED)
        await ledger.store.commit_round([await ledger.share(payer.vault_id, place)])
    close = release(released, Stroops(60), Delivery("client_gone"))
    await ledger.store.commit_round([await ledger.share(payer.vault_id, close)])
    for event_id in (held, released, free, ledger.event()):
        with pytest.raises(StoreRefused) as refusal:
            await payer.add(event_id)
        assert refusal.value.constraint == "disputes_of_own_charges"
    stranger = await ledger.vault(0)
    other = await ledger.database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", stranger)
    event_id = await payer.event()
    with pytest.raises(StoreRefused):
        await payer.add(event_id, UserId(str(other)))
    with pytest.raises(StoreRefused):
        await ledger.database.execute(
            "INSERT INTO disputes (dispute_id, vault_id, event_id, user_id, reason, status, decided_at, decided_by,"
            " created_at, moved_at) VALUES (gen_random_uuid(), $1, $2, $3, 'x', 'UPHELD', now(), 'x', now(), now())",
            payer.vault_id,
            event_id,
            payer.user_id,
        )
    assert await payer.add(event_id) is not None
    assert await payer.add(event_id) is None, "once an event"
    with pytest.raises(StoreRefused):
        await ledger.database.execute(
            "INSERT INTO disputes (dispute_id, vault_id, event_id, user_id, reason, created_at, moved_at)"
            " VALUES (gen_random_uuid(), $1, $2, $3, 'x', now(), now())",
            payer.vault_id,
            event_id,
            payer.user_id,
        )


async def test_what_was_asked_never_changes_and_nothing_is_deleted(payer: Payer) -> None:
    dispute = await payer.dispute()
    for change in (
        "reason = 'another'",
        "event_id = gen_random_uuid()",
        f"status = 'UPHELD', {DECIDED}, reason = 'another'",
        f"status = 'UPHELD', {DECIDED}, created_at = now()",
        "status = 'OPEN'",
    ):
        assert await payer.refused(dispute, change) == "disputes_move_forwards"
    database = payer.ledger.database
    for table in ("disputes", "dispute_events"):
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
            with pytest.raises(StoreRefused):
                await database.execute(statement)
    with pytest.raises(StoreRefused):
        await database.execute("UPDATE dispute_events SET at = now()")


async def test_a_dispute_moves_forwards_and_is_refunded_only_with_its_entry(payer: Payer) -> None:
    dispute = await payer.dispute()
    for change in ("status = 'REFUNDED', refunded = 60, " + DECIDED, "status = 'UPHELD'", "status = 'REFUNDING'"):
        with pytest.raises(StoreRefused):
            await payer.change(dispute, change)
    await payer.change(dispute, f"status = 'REFUNDING', {DECIDED}, notes = 'n'")
    assert await payer.refused(dispute, "status = 'UPHELD'") == "disputes_move_forwards"
    assert await payer.refused(dispute, "status = 'REFUNDED', refunded = 60") == "disputes_refunded_in_ledger"
    assert await payer.refused(dispute, f"status = 'OPEN', {UNDECIDED}") == "disputes_refunded_in_ledger"
    await payer.ledger.locked(payer.vault_id, Refund(dispute.event_id, Stroops(10), "another"))
    assert await payer.refused(dispute, "status = 'REFUNDED', refunded = 10") == "disputes_refunded_in_ledger"
    await payer.ledger.locked(payer.vault_id, Refund(dispute.event_id, Stroops(50), dispute.refund_ref))
    for change in ("status = 'REFUNDED', refunded = 60", f"status = 'OPEN', {UNDECIDED}"):
        assert await payer.refused(dispute, change) == "disputes_refunded_in_ledger"
    assert await payer.refused(dispute, "status = 'REFUNDED', refunded = 50, notes = 'm'") == "disputes_move_forwards"
    await payer.change(dispute, "status = 'REFUNDED', refunded = 50")
    for change in (
        "status = 'UPHELD', refunded = NULL",
        "refunded = 49",
        f"status = 'OPEN', refunded = NULL, {UNDECIDED}",
    ):
        assert await payer.refused(dispute, change) == "disputes_move_forwards"
    events = await reads.events_of(payer.ledger.database, dispute.dispute_id)
    assert [(each["type"], each["resolution"], each["notes"], each["amount"]) for each in events] == [
        ("opened", None, None, None),
        ("decided", "REFUNDED", "n", None),
        ("refunded", None, None, 50),
    ]


async def test_what_is_upheld_stays_so_and_what_others_refunded_whole_may_be_opened_again(payer: Payer) -> None:
    upheld, taken_back = await payer.dispute(), await payer.dispute()
    await payer.change(upheld, f"status = 'UPHELD', {DECIDED}")
    for status in ("OPEN", "REFUNDING", "REFUNDED"):
        with pytest.raises(StoreRefused):
            await payer.change(upheld, f"status = '{status}'")
    await payer.change(taken_back, f"status = 'REFUNDING', {DECIDED}")
    await payer.ledger.locked(payer.vault_id, Refund(taken_back.event_id, Stroops(60), "another"))
    await payer.change(taken_back, f"status = 'OPEN', {UNDECIDED}")
    events = await reads.events_of(payer.ledger.database, taken_back.dispute_id)
    assert [each["type"] for each in events] == ["opened", "decided", "taken_back"]
