"""The audit finds every corruption, and calls a clean ledger clean."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from callora.ledger.commands import (
    Delivery,
    Grant,
    IdempotencyClaim,
    PlaceHold,
    Refund,
    StoredAnswer,
    Withdraw,
    capture,
    release,
)
from callora.ledger.ids import UserId
from callora.ledger.money import Stroops
from callora.store import audit as audits
from callora.store.bridge import Database
from callora.store.disputes import add_dispute
from callora.store.revenue import advance
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED
from tests.store.test_settlements import Desk
from tests.support.chain_rows import set_network
from tests.support.counters import metering, minute, rating_process, snapshot

PLANTED = {
    "no vault has a negative balance": "UPDATE vaults SET available = -1",
    "what a vault holds is the sum of its open holds": "UPDATE vaults SET held = held + 1, available = available - 1",
    "every balance is deposits + grants − withdrawals − captures + refunds": "UPDATE vaults"
    " SET available = available + 1",
    "no hold outlives its time": "UPDATE usage_events SET expires_at = created_at - interval '1 hour'"
    " WHERE state = 'held'",
    "a vault knows whether it has spending limits or quota grants": "UPDATE vaults SET limited = true",
    "a vault's credits are its grants − what ended unburnt − what calls burnt and hold": "UPDATE vaults"
    " SET credits = credits + 1",
    "who owes is in arrears or suspended, and since when is known": "UPDATE vaults SET owed = 1",
    "a metered charge is the sum of the deltas that it carries": "UPDATE counter_deltas SET amount = amount + 1",
    "what a counter was rated by is without gaps in each epoch, up to its checkpoint": "UPDATE counter_deltas"
    " SET from_up = from_up + 1",
    "the included units of an account that are used are those of its deltas": "UPDATE counter_accounts"
    " SET included_used = included_used - 1",
    "every usage event belongs to a vault": "UPDATE usage_events SET vault_id = gen_random_uuid()"
    " WHERE state = 'released'",
    "a closed event keeps to what it held, and has an amount exactly when it is captured": "UPDATE usage_events"
    " SET amount = held_amount + 1 WHERE state = 'captured'",
    "a captured event names what was delivered, or was charged without a call": "UPDATE usage_events"
    " SET status = NULL WHERE state = 'captured'",
    "a service's hold that is captured names its transaction, and for how much": "INSERT INTO external_holds"
    " (vault_id, request_id, hold_id, api_key_id, event_id, released_at, created_at) SELECT vault_id, 'r', event_id,"
    " api_key_id, event_id, created_at, created_at FROM usage_events WHERE state = 'captured' LIMIT 1",
    "no event is refunded beyond its capture": "UPDATE ledger_entries SET amount = 1000 WHERE kind = 'refund'",
    "a dispute is refunded exactly where the ledger has its refund": "UPDATE disputes SET status = 'REFUNDED',"
    " refunded = 70, decided_at = created_at, decided_by = 'x'",
    "a vault's entries are numbered without a gap up to its counter": "UPDATE ledger_entries SET seq = 7 WHERE seq = 2",
    "an answered idempotency key belongs to a closed event and names its charge": "UPDATE idempotency_keys"
    " SET charge = charge + 1",
    "the final sums of usage are those of the events": "UPDATE usage_rollup"
    " SET done_until = now() + interval '9 years'",
    "revenue is that of the events, each once": "DELETE FROM revenue_entries WHERE refund_seq = 0",
    "an entry of revenue is what its event or refund says": "UPDATE revenue_entries SET gross = gross + 1",
    "a developer's account is the sum of his entries": "UPDATE revenue_accounts SET fee = fee + 1",
    "what is sealed of an account is in settlements that did not fail, without gaps": "UPDATE revenue_accounts"
    " SET sealed_gross = sealed_gross + 1",
    "what a settlement charges for a developer is the sum of the entries it sealed": "UPDATE settlement_items"
    " SET gross = gross + 1",
    "what is charged or credited on chain is so once, for a settlement that did not fail": "UPDATE settlements"
    " SET state = 'failed', failure = 'x', ended_at = now()",
    "what is credited of a settlement is each item once, and no more than was charged": "UPDATE settlement_credits"
    " SET amount = amount + 1",
    "a vault's days add up to its minutes": "INSERT INTO usage_days SELECT vault_id, created_at, vault_id, 1, 1, 1, 0,"
    " 0, 0, 0, 0, 0, 0, 0 FROM vaults",
    "a vault's hours add up to its minutes": "INSERT INTO key_hours SELECT vault_id, created_at, vault_id, 1"
    " FROM vaults",
    "no usage event fell into the default partition": "INSERT INTO usage_events SELECT vault_id,"
    " '00000000-0000-7000-8000-000000000000', api_key_id, developer_id, api_id, endpoint_id, 0, created_at,"
    " expires_at, price_version, 'released', NULL, NULL, NULL, NULL, NULL, closed_at FROM usage_events"
    " WHERE state = 'released'",
}
"""A corruption for each rule, written where no trigger and no foreign key looks."""


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger in which something of everything has happened."""
    async with real_ledger(database, TestClock()) as opened:
        vault_id = await opened.vault(1000)
        spent, given_back, still_open, keyed = (opened.event() for _ in range(4))
        claim = IdempotencyClaim("k", bytes(32), None, 3600)
        for event_id in (spent, given_back, still_open, keyed):
            hold = PlaceHold(event_id, Stroops(100), 60, CHARGED, claim if event_id == keyed else None)
            await opened.store.commit_round([await opened.share(vault_id, hold)])
        answer = StoredAnswer("k", 200, b"", b"body", Stroops(70))
        for close in (
            capture(spent, Stroops(100), Stroops(60), DELIVERED),
            release(given_back, Stroops(100), Delivery("client_gone")),
            capture(keyed, Stroops(100), Stroops(70), DELIVERED, answer),
        ):
            await opened.store.commit_round([await opened.share(vault_id, close)])
        await opened.locked(vault_id, Refund(spent, Stroops(20), "r"))
        user_id = UserId(str(await database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", vault_id)))
        async with database.transaction() as connection:
            assert await add_dispute(connection, opened.ids.uuid7(), vault_id, keyed, user_id, "because", NOON)
        await opened.locked(vault_id, Withdraw(Stroops(5), "w"))
        await opened.locked(vault_id, Grant(Stroops(7), "g"))
        await set_network(database, epoch=1)
        await Desk(opened, vault_id).in_state("completed")
        at = await metering(opened)
        await at.account(vault_id, included=10)
        async with rating_process(opened, database) as rater:
            await rater.rate(at.source, [snapshot(minute(each), {1: (each * 9, 3)}) for each in range(4)])
        await advance(database, NOON + timedelta(minutes=10))
        yield opened


async def test_a_clean_ledger_is_called_clean(ledger: RealLedger) -> None:
    assert await ledger.findings() == []


def test_a_corruption_is_planted_for_every_rule() -> None:
    assert sorted(PLANTED) == sorted(check.rule for check in audits._CHECKS)


@pytest.mark.parametrize("rule", PLANTED)
async def test_every_corruption_is_found(ledger: RealLedger, rule: str) -> None:
    database = ledger.database
    names = await database.fetch(
        "SELECT conrelid::regclass::text AS table, conname FROM pg_constraint"
        " WHERE contype = 'c' AND conparentid = 0 AND conislocal"
        " AND conrelid::regclass::text IN ('vaults', 'usage_events', 'ledger_entries', 'idempotency_keys',"
        " 'revenue_entries', 'revenue_accounts', 'settlements', 'settlement_items', 'settlement_credits',"
        " 'counter_deltas', 'counter_accounts')"
    )
    for row in names:
        await database.execute(f"ALTER TABLE {row['table']} DROP CONSTRAINT {row['conname']}")
    async with database.acquire() as connection:
        await connection.execute("SET session_replication_role = replica")
        assert await connection.execute(PLANTED[rule]) not in ("UPDATE 0", "INSERT 0 0")
    found = await audits.audit(database, NOON)
    assert rule in [each.rule for each in found if each.wrong]
    assert all(each.example for each in found if each.wrong), "an example to look at"


async def test_a_hold_that_is_only_just_due_is_the_sweeps_and_no_finding(ledger: RealLedger) -> None:
    ledger.clock.advance(60 + audits.GRACE.total_seconds() - 1)
    assert await ledger.findings() == []
    ledger.clock.advance(2)
    assert await ledger.findings() == ["no hold outlives its time"]
