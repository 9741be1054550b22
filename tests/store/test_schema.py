"""The database's own last word: what no actor, and no hand at a console, can write."""

from collections.abc import AsyncIterator

import pytest

from callora.ledger.commands import Delivery, PlaceHold, capture, release
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.rounds import CLEAN
from callora.store.bridge import Database
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger that the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened
        assert await opened.findings() == []


async def captured_event(ledger: RealLedger, vault_id: VaultId, amount: int = 50) -> EventId:
    """Store a capture."""
    event_id = ledger.event()
    hold = PlaceHold(event_id, Stroops(60), 60, CHARGED)
    assert await ledger.store.commit_round([await ledger.share(vault_id, hold)]) == CLEAN
    close = capture(event_id, Stroops(60), Stroops(amount), DELIVERED)
    assert await ledger.store.commit_round([await ledger.share(vault_id, close)]) == CLEAN
    return event_id


@pytest.mark.parametrize(
    "change",
    [
        "amount = 1",
        "state = 'held', amount = NULL, closed_at = NULL",
        "state = 'released', amount = NULL",
        "outcome = 'other'",
        "held_amount = held_amount + 1",
        "expires_at = expires_at + interval '1 second'",
    ],
)
async def test_a_closed_event_never_changes(ledger: RealLedger, change: str) -> None:
    event_id = await captured_event(ledger, await ledger.vault(100))
    with pytest.raises(StoreRefused) as refused:
        await ledger.database.execute(f"UPDATE usage_events SET {change} WHERE event_id = '{event_id}'")
    assert refused.value.sqlstate == "23001"


@pytest.mark.parametrize("table", ["usage_events", "ledger_entries"])
async def test_nothing_is_deleted(ledger: RealLedger, table: str) -> None:
    vault_id = await ledger.vault(100)
    await captured_event(ledger, vault_id)
    for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}"):
        with pytest.raises(StoreRefused):
            await ledger.database.execute(statement)


async def test_an_entry_is_never_changed(ledger: RealLedger) -> None:
    await ledger.vault(100)
    for change in ("amount = amount + 1", "ref = 'other'", "kind = 'adjustment'"):
        with pytest.raises(StoreRefused):
            await ledger.database.execute(f"UPDATE ledger_entries SET {change}")


async def test_an_open_hold_is_never_deleted_either(ledger: RealLedger) -> None:
    vault_id, event_id = await ledger.vault(100), ledger.event()
    hold = PlaceHold(event_id, Stroops(60), 60, CHARGED)
    await ledger.store.commit_round([await ledger.share(vault_id, hold)])
    with pytest.raises(StoreRefused):
        await ledger.database.execute("DELETE FROM usage_events")
    close = release(event_id, Stroops(60), Delivery("cleaned_up"))
    assert await ledger.store.commit_round([await ledger.share(vault_id, close)]) == CLEAN


@pytest.mark.parametrize("column", ["available", "held"])
async def test_no_balance_is_negative(ledger: RealLedger, column: str) -> None:
    await ledger.vault(100)
    with pytest.raises(StoreRefused) as refused:
        await ledger.database.execute(f"UPDATE vaults SET {column} = -1")
    assert refused.value.constraint == f"vaults_{column}_check"


async def test_a_user_has_one_vault_on_a_network(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    with pytest.raises(StoreRefused):
        await ledger.database.execute(
            "INSERT INTO vaults (vault_id, user_id, network) SELECT gen_random_uuid(), user_id, network FROM vaults"
        )
    assert await ledger.balance(vault_id) == (100, 0)


@pytest.mark.parametrize(
    ("kind", "amount", "event"),
    [
        ("deposit", -1, "NULL"),
        ("deposit", 0, "NULL"),
        ("withdrawal", 1, "NULL"),
        ("refund", 1, "NULL"),
        ("refund", -1, "gen_random_uuid()"),
        ("deposit", 1, "gen_random_uuid()"),
        ("gift", 1, "NULL"),
    ],
)
async def test_an_entry_makes_sense(ledger: RealLedger, kind: str, amount: int, event: str) -> None:
    vault_id = await ledger.vault(100)
    with pytest.raises(StoreRefused):
        await ledger.database.execute(
            "INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, event_id, created_at)"
            f" VALUES ('{vault_id}', 2, '{kind}', {amount}, 0, 'x', {event}, now())"
        )


async def test_a_reference_is_booked_once_whoever_writes_it(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    with pytest.raises(StoreRefused) as refused:
        await ledger.database.execute(
            "INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, created_at)"
            f" VALUES ('{vault_id}', 2, 'deposit', 1, 101, 'first', now())"
        )
    assert refused.value.sqlstate == "23505"


async def test_a_refund_beyond_its_capture_is_refused_by_the_database_itself(ledger: RealLedger) -> None:
    vault_id, other = await ledger.vault(100), await ledger.vault(100)
    event_id = await captured_event(ledger, vault_id, 50)
    insert = (
        "INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, event_id, created_at)"
        " VALUES ('{vault}', 9, 'refund', {amount}, 0, 'r', '{event}', now())"
    )
    for vault, amount, event in ((vault_id, 51, event_id), (other, 1, event_id), (vault_id, 1, ledger.event())):
        with pytest.raises(StoreRefused) as refused:
            await ledger.database.execute(insert.format(vault=vault, amount=amount, event=event))
        assert refused.value.constraint == "refund_within_capture"


async def test_the_statement_of_a_vault_adds_up_to_its_balance(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    await captured_event(ledger, vault_id, 50)
    rows = await ledger.database.fetch("SELECT kind, amount FROM vault_statement WHERE vault_id = $1", vault_id)
    assert sorted((row["kind"], row["amount"]) for row in rows) == [("deposit", 100), ("usage", -50)]
