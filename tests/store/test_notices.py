"""What owners are told of: each cause has its event and each event its cause, once, whatever fails between them."""

import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import attrs
import pytest
import trio

from callora.actors.balance_alerts import BalanceAlerts
from callora.actors.invoicing import Invoicing
from callora.actors.usage_notices import UsageNotices
from callora.ledger.commands import Deposit, Refund, SetPlan, Withdraw
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import ApiKeyId, UserId
from callora.ledger.keys import make_key
from callora.ledger.money import Stroops
from callora.store import balance_alerts, feed, invoices, keys, rollup
from callora.store.bridge import Database
from callora.store.usage_notices import NOTICE_EVENTS
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.store.test_feed import KEPT, Follower, user_of
from tests.store.test_rollup import World, placed, taken


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def told(ledger: RealLedger, kind: str, user_id: UserId | None = None) -> list[dict[str, Any]]:
    """Return the payloads of a kind, in their order."""
    rows = await ledger.database.fetch(
        "SELECT payload FROM outbox WHERE type = $1 AND ($2::uuid IS NULL OR user_id = $2)"
        " ORDER BY created_at, event_id",
        kind,
        user_id,
    )
    return [json.loads(row["payload"]) for row in rows]


async def refuse(ledger: RealLedger, kind: str) -> None:
    """Let no event of a kind be stored any more, as if the process died there."""
    await ledger.database.execute(f"ALTER TABLE outbox ADD CONSTRAINT no_{kind} CHECK (type <> '{kind}') NOT VALID")


# --- deposits and keys ------------------------------------------------------------------------------------------------


async def test_a_deposit_is_told_to_its_owner_once_and_is_not_booked_untold(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    user_id = await user_of(ledger, vault_id)
    await placed(ledger, vault_id)
    for _ in range(2):
        await ledger.locked(vault_id, Deposit(Stroops(50), "second"))
    events = await told(ledger, "deposit_confirmed", user_id)
    first, second = sorted(events, key=lambda each: str(each["reference"]))
    assert (first["amountUsdc"], first["reference"]) == ("0.0001000", "first")
    assert second == {
        "vaultId": vault_id,
        "network": "testnet",
        "amountUsdc": "0.0000050",
        "balanceUsdc": "0.0001050",
        "reference": "second",
        "creditedAt": "2026-11-21T12:00:00.000Z",
    }
    await refuse(ledger, "deposit_confirmed")
    with pytest.raises(StoreRefused):
        await ledger.locked(vault_id, Deposit(Stroops(50), "third"))
    assert await ledger.count("ledger_entries", "ref = 'third'") == 0
    assert sum(await ledger.balance(vault_id)) == 1050


async def test_a_revoked_key_is_told_of_once_however_it_is_revoked_and_never_revoked_untold(
    ledger: RealLedger,
) -> None:
    vault_id = await ledger.vault(0)
    user_id, new_id = await user_of(ledger, vault_id), ledger.ids.uuid7
    made: list[tuple[ApiKeyId, str]] = []
    for number in range(4):
        secret, key_id = make_key("testnet", bytes([number] * 20)), ApiKeyId(new_id())
        assert await keys.add_key(
            ledger.database, api_key_id=key_id, vault_id=vault_id, key=secret, name="mine", now=ledger.clock.now()
        )
        made.append((key_id, secret[:16]))
    (by_owner, _), (by_id, _), (by_prefix, prefix), (never, _) = made
    for _ in range(2):
        assert await keys.revoke_key(ledger.database, by_owner, user_id, ledger.clock.now(), new_id)
        assert len(await keys.revoke_keys(ledger.database, by_id, ledger.clock.now(), new_id)) == 1
        assert len(await keys.revoke_keys(ledger.database, prefix, ledger.clock.now(), new_id)) == 1
    assert not await keys.revoke_key(ledger.database, never, UserId(new_id()), ledger.clock.now(), new_id)
    events = await told(ledger, "key_revoked", user_id)
    assert sorted(each["keyId"] for each in events) == sorted((by_owner, by_id, by_prefix))
    assert next(each for each in events if each["keyId"] == by_prefix) == {
        "keyId": by_prefix,
        "vaultId": vault_id,
        "name": "mine",
        "prefix": prefix,
        "revokedAt": "2026-11-21T12:00:00.000Z",
    }
    await refuse(ledger, "key_revoked")
    with pytest.raises(StoreRefused):
        await keys.revoke_key(ledger.database, never, user_id, ledger.clock.now(), new_id)
    assert await ledger.count("api_keys", "revoked_at IS NULL") == 1


# --- low balances -----------------------------------------------------------------------------------------------------


def watching(ledger: RealLedger) -> BalanceAlerts:
    return BalanceAlerts(ledger.database, ledger.clock, ledger.ids, interval_seconds=5)


async def look(ledger: RealLedger, alerts: BalanceAlerts) -> list[str]:
    """Return which balances are told of by the next look."""
    before = len(await told(ledger, "low_balance_alert"))
    ledger.clock.advance(6)
    await alerts.sweep()
    return [each["balanceUsdc"] for each in (await told(ledger, "low_balance_alert"))[before:]]


async def test_a_balance_that_falls_below_is_told_of_once_and_again_after_it_rose(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    user_id, alerts = await user_of(ledger, vault_id), watching(ledger)
    await alerts.set(vault_id, Stroops(990), user_id)
    assert await look(ledger, alerts) == []
    event_id = await placed(ledger, vault_id)
    assert await look(ledger, alerts) == [], "what is held is still one's own"
    await taken(ledger, vault_id, event_id)
    assert await look(ledger, alerts) == [], "990 is not below"
    await taken(ledger, vault_id, await placed(ledger, vault_id), amount=1)
    assert await look(ledger, alerts) == ["0.0000989"]
    assert await look(ledger, alerts) == []
    await alerts.set(vault_id, Stroops(990), user_id)
    assert await look(ledger, alerts) == [], "the same threshold is told of already"
    await alerts.set(vault_id, Stroops(991), user_id)
    assert await look(ledger, alerts) == ["0.0000989"]
    await ledger.locked(vault_id, Deposit(Stroops(11), "up"))
    assert await look(ledger, alerts) == []
    await ledger.locked(vault_id, Withdraw(Stroops(500), "down"))
    assert await look(ledger, alerts) == ["0.0000500"]
    await alerts.remove(vault_id)
    await ledger.locked(vault_id, Deposit(Stroops(1000), "up again"))
    await ledger.locked(vault_id, Withdraw(Stroops(1400), "down again"))
    assert await look(ledger, alerts) == []
    await alerts.set(vault_id, Stroops(991), user_id)
    assert await look(ledger, alerts) == ["0.0000100"]
    subjects = await ledger.database.fetch("SELECT subject FROM outbox WHERE type = 'low_balance_alert'")
    assert {row["subject"] for row in subjects} == {f"{vault_id}:{number}" for number in range(1, 5)}


async def test_of_several_processes_one_tells_and_none_tells_untold(
    ledger: RealLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.actors.balance_alerts.BATCH", 2)
    alerts = watching(ledger)
    for _ in range(5):
        vault_id = await ledger.vault(10)
        await alerts.set(vault_id, Stroops(20), await user_of(ledger, vault_id))
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(watching(ledger).sweep)
    assert len(await told(ledger, "low_balance_alert")) == 5
    late = await ledger.vault(10)
    await alerts.set(late, Stroops(20), await user_of(ledger, late))
    await refuse(ledger, "low_balance_alert")
    ledger.clock.advance(6)
    with pytest.raises(StoreRefused):
        await alerts.sweep()
    assert await ledger.count("balance_alerts", "low_since IS NULL") == 1
    assert await balance_alerts.take_turn(ledger.database, ledger.clock.now(), timedelta(0)) is False


# --- usage ------------------------------------------------------------------------------------------------------------


async def endpoint(ledger: RealLedger, user_id: UserId, events: Sequence[str] = ("usage_event_created",)) -> str:
    endpoint_id = ledger.ids.uuid7()
    await ledger.database.execute(
        "INSERT INTO webhook_endpoints (endpoint_id, user_id, url, events, retries_max, base_delay_ms, created_at,"
        " updated_at) VALUES ($1, $2, 'https://example.com', $3, 1, 100, $4, $4)",
        endpoint_id,
        user_id,
        list(events),
        ledger.clock.now(),
    )
    return endpoint_id


def gathering(ledger: RealLedger) -> UsageNotices:
    return UsageNotices(
        ledger.database, ledger.clock, ledger.ids, interval_seconds=0, kept_seconds=KEPT.total_seconds()
    )


async def calls_told(ledger: RealLedger, user_id: UserId) -> list[str]:
    rows = await ledger.database.fetch(
        "SELECT payload FROM outbox WHERE type = 'usage_event_created' AND user_id = $1"
        " ORDER BY split_part(split_part(subject, ':', 2), '-', 1)::bigint",
        user_id,
    )
    notices = [json.loads(row["payload"]) for row in rows]
    assert all(0 < len(each["events"]) <= NOTICE_EVENTS for each in notices)
    return [event["id"] for each in notices for event in each["events"]]


async def test_calls_are_told_some_at_a_time_to_those_alone_who_want_them(ledger: RealLedger) -> None:
    mine, theirs = await ledger.vault(10_000), await ledger.vault(10_000)
    me, them = await user_of(ledger, mine), await user_of(ledger, theirs)
    await taken(ledger, mine, await placed(ledger, mine))
    notices = gathering(ledger)
    await notices.sweep()
    assert await ledger.count("usage_feeds") == 0, "nothing is looked for while nobody wants it"
    endpoint_id = await endpoint(ledger, me)
    await endpoint(ledger, them, ["key_revoked"])
    await notices.sweep()
    assert await calls_told(ledger, me) == [], "what came before is not told"
    ids = []
    for _ in range(NOTICE_EVENTS + 5):
        ledger.clock.advance(0.01)
        ids.append(await placed(ledger, mine))
        await taken(ledger, mine, ids[-1])
    await taken(ledger, theirs, await placed(ledger, theirs))
    await notices.sweep()
    assert await calls_told(ledger, me) == ids
    assert {len(each["events"]) for each in await told(ledger, "usage_event_created")} == {NOTICE_EVENTS, 5}
    await ledger.database.execute("UPDATE webhook_endpoints SET deleted_at = now() WHERE endpoint_id = $1", endpoint_id)
    await notices.sweep()
    await taken(ledger, mine, await placed(ledger, mine))
    await endpoint(ledger, me)
    await notices.sweep()
    assert await calls_told(ledger, me) == ids, "what happened while nobody wanted it is not told later"


@attrs.define
class ToldWorld(World):
    """Calls at random, gathered by several processes that are cut off somewhere."""

    async def gather(self) -> None:
        await gathering(self.ledger).sweep()

    async def gather_at_once(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.gather)
            nursery.start_soon(self.close)

    async def cut_off(self) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cut() -> None:
                    for _ in range(self.random.randrange(80)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cut)
                await self.gather()

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        self.ledger.clock.advance(self.random.choice((0.01, 1, 9, 20, 200)))


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_fails_a_call_is_told_once_and_in_the_order_of_the_feed(ledger: RealLedger, seed: int) -> None:
    random = Random(seed)
    world = ToldWorld(ledger, random, [await ledger.vault(10_000) for _ in range(2)])
    users = [await user_of(ledger, vault_id) for vault_id in world.vaults]
    for user_id in users:
        await endpoint(ledger, user_id)
    await world.gather()
    steps = (
        *(world.place,) * 6,
        *(world.close,) * 6,
        *(world.wait,) * 3,
        world.gather,
        world.gather_at_once,
        *(world.cut_off,) * 2,
    )
    for _ in range(80):
        await random.choice(steps)()
    while world.open:
        await world.close()
    await world.gather()
    for user_id in users:
        follower = Follower(ledger, user_id)
        await follower.follow()
        assert await calls_told(ledger, user_id) == follower.seen
    assert await ledger.count("outbox", "type = 'usage_event_created'") > 2


async def test_what_is_not_told_is_kept_and_a_notice_that_is_not_stored_moves_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    user_id = await user_of(ledger, vault_id)
    await endpoint(ledger, user_id)
    await gathering(ledger).sweep()
    event_id = await placed(ledger, vault_id)
    await taken(ledger, vault_id, event_id)
    await refuse(ledger, "usage_event_created")
    with pytest.raises(StoreRefused):
        await gathering(ledger).sweep()
    assert await ledger.database.fetch_value("SELECT position - told FROM usage_feeds") == 1
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    await feed.advance(ledger.database, [user_id], ledger.clock.now())
    await feed.forget(ledger.database, ledger.clock.now() + 2 * KEPT, KEPT)
    assert await ledger.count("usage_feed") == 2
    await ledger.database.execute("ALTER TABLE outbox DROP CONSTRAINT no_usage_event_created")
    await gathering(ledger).sweep()
    assert len(await calls_told(ledger, user_id)) == 2


# --- invoices ---------------------------------------------------------------------------------------------------------


async def added_up(ledger: RealLedger) -> None:
    behind = True
    while behind:
        made = await rollup.advance(ledger.database, ledger.clock.now())
        assert made is not None
        behind = made.behind


async def test_a_month_is_closed_once_and_only_when_nothing_of_it_is_open(
    ledger: RealLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.actors.invoicing.BATCH", 2)
    busy, idle, other = await ledger.vault(2_000_000), await ledger.vault(10), await ledger.vault(100)
    event_id = await placed(ledger, busy)
    await taken(ledger, busy, event_id)
    await ledger.locked(busy, Refund(event_id, Stroops(4), "sorry"))
    await ledger.locked(busy, SetPlan("pro", Stroops(1_000_000), "november"))
    await taken(ledger, other, await placed(ledger, other))
    ledger.clock.at = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    late = await placed(ledger, busy, ttl_seconds=86_400)
    ledger.clock.at = datetime(2026, 12, 1, 23, 0, tzinfo=UTC)
    invoicing = Invoicing(ledger.database, ledger.clock, ledger.ids)
    await taken(ledger, busy, late, amount=7)
    await ledger.locked(busy, Refund(event_id, Stroops(1), "december"))
    await added_up(ledger)
    await invoicing.sweep()
    assert await ledger.count("invoices") == 0, "a hold of the month may have been open until now"
    ledger.clock.at = datetime(2026, 12, 2, 1, 30, tzinfo=UTC)
    await invoicing.sweep()
    assert await ledger.count("invoices") == 0, "it is not added up"
    await added_up(ledger)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(Invoicing(ledger.database, ledger.clock, ledger.ids).sweep)
    await invoicing.sweep()
    assert await ledger.count("invoices", f"vault_id = '{idle}'") == 0
    assert await ledger.count("invoices") == 2
    (event,) = await told(ledger, "invoice_created", await user_of(ledger, busy))
    row = await ledger.database.fetch_row("SELECT * FROM invoices WHERE vault_id = $1", busy)
    assert row is not None
    assert (row["calls"], row["usage"], row["refunded"], row["subscriptions"]) == (2, 17, 4, 1_000_000)
    assert event == {
        "invoiceId": str(row["invoice_id"]),
        "vaultId": busy,
        "network": "testnet",
        "month": "2026-11",
        "calls": 2,
        "usageUsdc": "0.0000017",
        "refundedUsdc": "0.0000004",
        "subscriptionsUsdc": "0.1000000",
        "totalUsdc": "0.1000013",
        "issuedAt": "2026-12-02T01:30:00.000Z",
    }
    assert len(await told(ledger, "invoice_created")) == 2


async def test_months_that_were_missed_are_closed_one_after_the_other(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    invoicing = Invoicing(ledger.database, ledger.clock, ledger.ids)
    await added_up(ledger)
    await invoicing.sweep()
    for month in (11, 12):
        ledger.clock.at = datetime(2026, month, 25, tzinfo=UTC)
        await taken(ledger, vault_id, await placed(ledger, vault_id))
    ledger.clock.at = datetime(2027, 2, 2, 2, tzinfo=UTC)
    await added_up(ledger)
    await refuse(ledger, "invoice_created")
    with pytest.raises(StoreRefused):
        await invoicing.sweep()
    assert await ledger.count("invoices") == 0
    await ledger.database.execute("ALTER TABLE outbox DROP CONSTRAINT no_invoice_created")
    await invoicing.sweep()
    assert {each["month"] for each in await told(ledger, "invoice_created")} == {"2026-11", "2026-12"}
    assert await ledger.count("invoices") == 2
    assert await invoices.next_month(ledger.database, ledger.clock.now()) is None
    assert await ledger.database.fetch_value("SELECT closed::text FROM invoicing") == "2027-01-01"
