"""Counters rated on a real PostgreSQL, by the numbers of the statements that this answers: C15 to C24, W-C1 to W-C10.

What is answered otherwise, and why: docs/decisions/0032.
"""

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from random import Random
from typing import Any, Final

import attrs
import pytest
import trio

from callora.actors.rating import Rated, Rater, SubjectUnknown
from callora.ledger.commands import Deposit, Grant, PlaceHold, ReviewDebt, SetStanding, Withdraw, release
from callora.ledger.counters import Rule, SubjectTaken
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import FIRST_ID, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import BalanceMoved, DebtReviewed, InsufficientFunds, StandingSet, VaultMissing
from callora.ledger.snapshots import Sample
from callora.store import counter_accounts, quarantine
from callora.store.bridge import Database, open_database
from callora.store.reads.counters import list_quarantined
from callora.store.revenue import advance as index_revenue
from callora.store.rollup import advance as roll_up
from tests.ledger.test_counters import truth
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED
from tests.support.counters import (
    MINUTE,
    PROFILE,
    Metering,
    metering,
    minute,
    rating_process,
    snapshot,
    subject,
)
from tests.support.knife import Knife

USDC: Final = 10**7


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger that the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened
        assert await opened.findings() == []


@pytest.fixture
async def at(ledger: RealLedger) -> Metering:
    """A source whose first totals count, and whose resets drop."""
    return await metering(ledger)


@pytest.fixture
async def rater(at: Metering) -> AsyncIterator[Rater]:
    """A process that rates."""
    async with rating_process(at.ledger, at.ledger.database) as running:
        yield running


# --- deltas and their minutes -----------------------------------------------------------------------------------------


async def test_c15_the_first_totals_of_a_counter_are_what_it_grew(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(1000)
    came_to = await rater.rate(at.source, [snapshot(minute(0), {1: (100, 50)})])
    assert came_to == Rated(processed_samples=1, written_minutes=1, latest=minute(0))
    assert await at.buckets() == [(0, 100, 50, 150, 150)]
    assert await at.balance(vault_id) == 850


async def test_wc8_a_source_may_begin_to_count_where_its_counters_are_first_seen(ledger: RealLedger) -> None:
    at = await metering(ledger, first_seen="baseline")
    vault_id = await at.payer(1000)
    async with rating_process(ledger, ledger.database) as rater:
        came_to = await rater.rate(at.source, [snapshot(minute(0), {1: (10**15, 50)})])
        assert came_to == Rated(processed_samples=1, latest=minute(0))
        await rater.rate(at.source, [snapshot(minute(1), {1: (10**15 + 7, 50)})])
    assert await at.buckets() == [(1, 7, 0, 7, 7)]
    assert await at.balance(vault_id) == 993


async def test_c16_what_is_rated_is_the_difference_to_the_checkpoint(at: Metering, rater: Rater) -> None:
    await at.payer(1000)
    await rater.rate(at.source, [snapshot(minute(0), {1: (100, 100)})])
    await rater.rate(at.source, [snapshot(minute(1), {1: (130, 140)})])
    assert await at.buckets() == [(0, 100, 100, 200, 200), (1, 30, 40, 70, 70)]


@pytest.mark.parametrize("anew", [(99, 100), (100, 99), (0, 0), (1, 500)])
async def test_c17_a_lower_total_is_a_reset_and_charges_nothing(
    at: Metering, rater: Rater, anew: tuple[int, int]
) -> None:
    vault_id = await at.payer(1000, included=1000)
    await rater.rate(at.source, [snapshot(minute(0), {1: (100, 100)})])
    came_to = await rater.rate(at.source, [snapshot(minute(1), {1: anew})])
    assert (came_to.processed_samples, came_to.resets, came_to.written_minutes) == (0, 1, 0)
    assert len(await at.buckets()) == 1
    assert await at.rows("SELECT epoch, up, down FROM counter_checkpoints") == [(1, *anew)]
    assert await at.rows("SELECT included_used FROM counter_accounts") == [(200,)]
    assert await at.balance(vault_id) == 1000
    await rater.rate(at.source, [snapshot(minute(2), {1: (anew[0] + 1, anew[1] + 2)})])
    assert (await at.buckets())[1] == (2, 1, 2, 3, 0)


async def test_wc4_a_source_may_count_what_its_counters_show_after_a_reset(ledger: RealLedger) -> None:
    at = await metering(ledger, reset="count_new_total")
    vault_id = await at.payer(1000)
    async with rating_process(ledger, ledger.database) as rater:
        for number, total in enumerate((100, 30, 45)):
            await rater.rate(at.source, [snapshot(minute(number), {1: (total, 0)})])
    assert [total for _, _, _, total, _ in await at.buckets()] == [100, 30, 15]
    assert await at.balance(vault_id) == 855


async def test_c18_a_bucket_is_a_minute_of_one_node_in_one_environment(at: Metering, rater: Rater) -> None:
    await at.payer(1000)
    await rater.rate(at.source, [snapshot(minute(0.999), {1: (10, 0)}), snapshot(minute(1), {1: (20, 0)})])
    for env, node in (("preview", "node-1"), ("prod", "node-2")):
        await rater.rate(at.source, [snapshot(minute(0), {1: (5, 0)}, env=env, node=node)])
    rows = await at.rows("SELECT bucket_start, env, node_id, total FROM counter_minutes ORDER BY 1, 2, 3")
    assert rows == [
        (NOON, "preview", "node-1", 5),
        (NOON, "prod", "node-1", 10),
        (NOON, "prod", "node-2", 5),
        (NOON + MINUTE, "prod", "node-1", 10),
    ]


# --- prices -----------------------------------------------------------------------------------------------------------


async def test_c19_an_account_without_a_price_is_rated_by_the_services_and_with_one_by_its_own(at: Metering) -> None:
    own = attrs.evolve(PROFILE, unit_price=Decimal("0.5"), rule_version="own-v3")
    await at.payer(0, 1, profile=attrs.evolve(PROFILE, unit_price=None))
    await at.payer(0, 2, profile=own)
    await at.payer(0, 3, profile=attrs.evolve(PROFILE, unit_price=Decimal(0)))
    async with rating_process(at.ledger, at.ledger.database, Rule(Decimal("0.25"), "service-v7")) as rater:
        await rater.rate(at.source, [snapshot(minute(0), dict.fromkeys((1, 2, 3), (4, 0)))])
    rows = await at.rows("SELECT amount, rule_version FROM counter_deltas ORDER BY amount")
    assert rows == [(0, "service-v7"), (1 * USDC, "service-v7"), (2 * USDC, "own-v3")]


async def test_c20_included_units_go_first_and_multipliers_multiply(at: Metering, rater: Rater) -> None:
    profile = attrs.evolve(
        PROFILE,
        unit_price=Decimal("0.5"),
        region_multiplier=Decimal("1.2"),
        line_multiplier=Decimal("2.0"),
        rule_version="pricing-v2",
    )
    vault_id = await at.payer(100 * USDC, included=100, profile=profile)
    await rater.rate(at.source, [snapshot(minute(0), {1: (100, 50)})])
    rows = await at.rows("SELECT multiplier, rated, included, amount FROM counter_minutes")
    assert rows == [(Decimal("2.4"), 50, 100, 60 * USDC)]
    assert await at.rows("SELECT rule_version FROM counter_deltas") == [("pricing-v2",)]
    assert await at.balance(vault_id) == 40 * USDC
    assert await at.rows("SELECT included_granted - included_used FROM counter_accounts") == [(0,)]


async def test_c21_who_is_charged_more_than_he_has_is_in_arrears_until_it_is_paid(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(60)
    await rater.rate(at.source, [snapshot(minute(0), {1: (60, 0)})])
    assert ((await at.vault(vault_id))["standing"], await at.balance(vault_id)) == ("active", 0)
    await rater.rate(at.source, [snapshot(minute(1), {1: (70, 0)})])
    row = await at.vault(vault_id)
    assert (row["standing"], row["available"], row["owed"], row["arrears_since"]) == ("arrears", 0, 10, NOON)
    assert isinstance(await at.ledger.locked(vault_id, Deposit(Stroops(10), "ten")), BalanceMoved)
    row = await at.vault(vault_id)
    assert (row["standing"], row["available"], row["owed"], row["arrears_since"]) == ("active", 0, 0, None)


# --- replays ----------------------------------------------------------------------------------------------------------


async def test_c22_the_same_snapshot_twice_is_charged_once(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(1000)
    once = [snapshot(minute(0), {1: (100, 50)})]
    await rater.rate(at.source, once)
    before = await at.rows("SELECT * FROM counter_deltas"), await at.rows("SELECT * FROM vaults")
    assert await rater.rate(at.source, once) == Rated(replayed_minutes=1, latest=minute(0))
    assert (await at.rows("SELECT * FROM counter_deltas"), await at.rows("SELECT * FROM vaults")) == before
    assert await at.balance(vault_id) == 850
    assert await at.ledger.count("usage_events", "outcome = 'metered'") == 1


async def test_wc1_wc2_an_overlapping_window_rewrites_nothing_and_is_no_reset(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(1000)
    stood = [snapshot(minute(number), {1: (total, 0)}) for number, total in enumerate((0, 50, 150, 150, 150, 225))]
    for end in range(1, len(stood) + 1):
        came_to = await rater.rate(at.source, stood[max(0, end - 3) : end])
        assert came_to.resets == 0
    assert await at.buckets() == [(1, 50, 0, 50, 50), (2, 100, 0, 100, 100), (5, 75, 0, 75, 75)]
    assert await at.balance(vault_id) == 1000 - 225
    assert await at.rows("SELECT epoch FROM counter_checkpoints") == [(0,)]


async def test_wc3_two_snapshots_in_a_minute_add_up_in_its_bucket(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(1000)
    for part, total in ((0.1, 100), (0.6, 160)):
        await rater.rate(at.source, [snapshot(minute(part), {1: (total, 0)})])
    assert await at.buckets() == [(0, 160, 0, 160, 160)]
    assert await at.balance(vault_id) == 840


async def test_wc6_two_processes_at_one_page_charge_it_once(at: Metering, database_url: str) -> None:
    vaults = [await at.payer(1000, number) for number in range(1, 6)]
    page = [snapshot(minute(each), {number: (each * number, 0) for number in range(1, 6)}) for each in range(20)]
    async with (
        open_database(database_url) as other,
        rating_process(at.ledger, at.ledger.database) as one,
        rating_process(at.ledger, other) as two,
        trio.open_nursery() as nursery,
    ):
        for rater in (one, two, one):
            nursery.start_soon(rater.rate, at.source, page)
    assert [await at.balance(each) for each in vaults] == [1000 - 19 * number for number in range(1, 6)]
    assert await at.ledger.count("counter_deltas") == 5 * 19


async def test_wc7_a_source_in_another_region_charges_nothing_anew(at: Metering, rater: Rater) -> None:
    await at.payer(1000)
    page = [snapshot(minute(each), {1: (each, 0)}) for each in range(1, 4)]
    await rater.rate(at.source, page)
    moved = attrs.evolve(at.source, region="elsewhere")
    await rater.rate(moved, [*page, snapshot(minute(4), {1: (4, 0)})])
    assert await at.rows("SELECT region, sum(total)::bigint FROM counter_minutes GROUP BY 1 ORDER BY 1") == [
        ("", 3),
        ("elsewhere", 1),
    ]


async def test_wc13_a_minute_without_growth_writes_no_row(at: Metering, rater: Rater) -> None:
    await at.payer(1000)
    came_to = await rater.rate(at.source, [snapshot(minute(each), {1: (5, 5)}) for each in range(60)])
    assert (came_to.processed_samples, came_to.written_minutes) == (60, 1)
    assert await at.ledger.count("counter_deltas") == 1
    came_to = await rater.rate(at.source, [snapshot(minute(each), {1: (5, 5)}) for each in range(60, 90)])
    assert (came_to.processed_samples, came_to.written_minutes) == (30, 0)
    assert await at.ledger.count("usage_events") == 1
    assert await at.rows("SELECT seen_at FROM counter_checkpoints") == [(minute(89),)]


# --- what a snapshot may hold -----------------------------------------------------------------------------------------


async def test_c23_samples_that_say_nothing_usable_are_counted_and_the_others_rated(at: Metering, rater: Rater) -> None:
    await at.payer(1000)
    too_many = tuple(Sample(subject(1), f"in-{number}", 2**60 - 1, 0) for number in range(9))
    bad = attrs.evolve(snapshot(minute(0), {}), samples=too_many, invalid=2)
    good = snapshot(minute(1), {1: (1, 0)})
    came_to = await rater.rate(at.source, [bad, good])
    assert (came_to.invalid, came_to.processed_samples) == (3, 1)


async def test_c24_a_subjects_samples_in_one_snapshot_are_summed_and_a_missing_one_is_a_reset(
    at: Metering, rater: Rater
) -> None:
    await at.payer(1000)

    async def rate(number: int, *samples: tuple[str, int, int]) -> Rated:
        summed = tuple(Sample(subject(1), inbound, up, down) for inbound, up, down in samples)
        return await rater.rate(at.source, [attrs.evolve(snapshot(minute(number), {}), samples=summed)])

    await rate(0, ("a", 100, 50), ("b", 30, 20))
    assert await at.buckets() == [(0, 130, 70, 200, 200)]
    assert (await rate(1, ("a", 120, 60), ("b", 40, 20))).resets == 0
    assert (await at.buckets())[1] == (1, 30, 10, 40, 40)
    came_to = await rate(2, ("a", 125, 60))
    assert (came_to.resets, came_to.written_minutes) == (1, 0)
    await rate(3, ("a", 126, 60))
    assert (await at.buckets())[2:] == [(3, 1, 0, 1, 1)]
    assert await at.rows("SELECT DISTINCT line FROM counter_deltas ORDER BY line") == [("",), ("a",)]


# --- quarantine -------------------------------------------------------------------------------------------------------


async def test_wc9_a_subject_without_an_account_stops_nobody_and_is_rated_once_it_has_one(
    at: Metering, rater: Rater
) -> None:
    payer = await at.payer(1000, 1)
    page = [snapshot(minute(each), {1: (each, 0), 2: (10 * each, 0)}) for each in range(1, 4)]
    came_to = await rater.rate(at.source, page)
    assert (came_to.quarantined, came_to.processed_samples, came_to.latest) == (3, 3, minute(3))
    assert await at.balance(payer) == 997
    await rater.rate(at.source, page)
    (kept,) = await list_quarantined(at.ledger.database, after=FIRST_ID, subject=None, limit=10)
    assert (str(kept["subject"]), kept["samples"], kept["reasons"]) == (subject(2), 3, ["unknown_subject"])
    assert await rater.replay(subject(2)) == SubjectUnknown()
    late = await at.payer(1000, 2, profile=attrs.evolve(PROFILE, active=False))
    assert (await rater.rate(at.source, [snapshot(minute(4), {2: (40, 0)})])).quarantined == 1
    replayed = await rater.replay(subject(2))
    assert replayed == Rated(processed_samples=4, written_minutes=4, latest=minute(4))
    assert await at.balance(late) == 960
    assert await at.ledger.count("quarantined_samples") == 0
    assert await rater.replay(subject(2)) == Rated()


async def test_quarantine_is_bounded_and_keeps_the_latest(
    at: Metering, rater: Rater, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "READINGS_MAX", 5)
    monkeypatch.setattr(quarantine, "SOURCE_MAX", 7)
    for each in range(8):
        await rater.rate(at.source, [snapshot(minute(each), {1: (each, 0)})])
    assert [row[0] for row in await at.rows("SELECT up FROM quarantined_samples ORDER BY up")] == [3, 4, 5, 6, 7]
    assert (await rater.rate(at.source, [snapshot(minute(9), dict.fromkeys(range(2, 9), (1, 0)))])).quarantined == 7
    assert await at.ledger.count("quarantined_samples") == 7
    vault_id = await at.payer(100)
    await rater.replay(subject(1))
    assert await at.balance(vault_id) == 93, "what was dropped is in what came after it"
    assert await quarantine.drop_all(at.ledger.database, subject(2)) == 1


async def test_a_charge_that_cannot_be_meant_is_set_aside_and_made_once_the_price_is_right(
    at: Metering, rater: Rater
) -> None:
    wrong = attrs.evolve(PROFILE, unit_price=Decimal(1_000_000))
    vault_id = await at.payer(10**6)
    await rater.rate(at.source, [snapshot(minute(0), {1: (1, 0)})])
    (account_id,) = [str(row[0]) for row in await at.rows("SELECT account_id FROM counter_accounts")]
    assert await counter_accounts.change(at.ledger.database, account_id, wrong, NOON)
    came_to = await rater.rate(at.source, [snapshot(minute(1), {1: (1001, 0)})])
    assert (came_to.quarantined, came_to.processed_samples) == (1, 0)
    assert await rater.replay(subject(1)) == Rated(quarantined=1, latest=minute(1))
    assert await at.balance(vault_id) == 10**6 - 1
    assert await counter_accounts.change(at.ledger.database, account_id, PROFILE, NOON)
    assert await rater.replay(subject(1)) == Rated(processed_samples=1, written_minutes=1, latest=minute(1))
    assert await at.balance(vault_id) == 10**6 - 1001
    assert await at.ledger.count("quarantined_samples") == 0


# --- accounts ---------------------------------------------------------------------------------------------------------


async def test_a_subject_has_one_account_and_included_units_are_added(at: Metering, rater: Rater) -> None:
    database = at.ledger.database
    vault_id = await at.ledger.vault(1000)
    account_id = await at.account(vault_id, included=10)
    again = await counter_accounts.add(database, at.ledger.ids.uuid7(), vault_id, subject(1), PROFILE, 0, NOON)
    assert again == SubjectTaken()
    nowhere = VaultId(at.ledger.ids.uuid7())
    assert (
        await counter_accounts.add(database, at.ledger.ids.uuid7(), nowhere, subject(2), PROFILE, 0, NOON)
        == VaultMissing()
    )
    await rater.rate(at.source, [snapshot(minute(0), {1: (15, 0)})])
    assert await counter_accounts.include(database, account_id, 3, 100, NOON) is True
    assert await counter_accounts.include(database, account_id, 88, 100, NOON) is False
    assert await counter_accounts.include(database, at.ledger.ids.uuid7(), 1, 100, NOON) is None
    assert await counter_accounts.change(database, at.ledger.ids.uuid7(), PROFILE, NOON) is False
    await rater.rate(at.source, [snapshot(minute(1), {1: (25, 0)})])
    assert await at.balance(vault_id) == 1000 - 5 - 7


async def test_many_accounts_of_one_vault_are_one_event_each_and_one_command_holds_only_so_many(
    at: Metering, rater: Rater, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.actors.rating.READINGS_MAX", 7)
    vault_id = await at.ledger.vault(10**6)
    for number in range(1, 5):
        await at.account(vault_id, number)
    page = [snapshot(minute(each), {number: (each, each * number) for number in range(1, 5)}) for each in range(1, 6)]
    came_to = await rater.rate(at.source, page)
    assert (came_to.processed_samples, came_to.written_minutes) == (20, 20)
    assert await at.balance(vault_id) == 10**6 - sum(5 + 5 * number for number in range(1, 5))
    amounts = await at.rows("SELECT sum(amount)::bigint FROM usage_events GROUP BY api_key_id ORDER BY 1")
    assert amounts == [(10,), (15,), (20,), (25,)]


# --- debt -------------------------------------------------------------------------------------------------------------


def hold(at: Metering, amount: int) -> PlaceHold:
    return PlaceHold(at.ledger.event(), Stroops(amount), 3600, CHARGED)


async def test_what_comes_back_of_a_hold_pays_what_is_owed_before_anything_else(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(100)
    held = hold(at, 60)
    await at.ledger.store.commit_round([await at.ledger.share(vault_id, held)])
    await rater.rate(at.source, [snapshot(minute(0), {1: (90, 0)})])
    row = await at.vault(vault_id)
    assert (row["available"], row["held"], row["owed"]) == (0, 60, 50)
    lost = await at.ledger.store.commit_round([await at.ledger.share(vault_id, hold(at, 0))])
    assert [each.standing for each in lost.lost] == ["arrears"]
    await at.ledger.store.commit_round(
        [await at.ledger.share(vault_id, release(held.event_id, Stroops(60), DELIVERED))]
    )
    assert await at.ledger.locked(vault_id, Withdraw(Stroops(11), "w")) == InsufficientFunds(Stroops(11), Stroops(10))
    assert await at.ledger.locked(vault_id, ReviewDebt(NOON - timedelta(days=1))) == DebtReviewed(Stroops(0), "active")
    assert await at.ledger.balance(vault_id) == (10, 0)


async def test_c26_a_debtor_is_suspended_after_a_fortnight_and_wc14_freed_by_paying(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(0)
    await rater.rate(at.source, [snapshot(minute(0), {1: (100, 0)})])
    fortnight = timedelta(days=14)
    for days, standing in ((3, "arrears"), (14, "suspended")):
        reviewed = await at.ledger.locked(vault_id, ReviewDebt(NOON + timedelta(days=days) - fortnight))
        assert reviewed == DebtReviewed(Stroops(100), standing)
    await at.ledger.locked(vault_id, Grant(Stroops(40), "some"))
    assert (await at.vault(vault_id))["standing"] == "suspended"
    await at.ledger.locked(vault_id, Deposit(Stroops(60), "rest"))
    row = await at.vault(vault_id)
    assert (row["standing"], row["owed"], row["arrears_since"]) == ("active", 0, None)


async def test_an_operators_standing_stays_when_the_debt_is_paid(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(0)
    await rater.rate(at.source, [snapshot(minute(0), {1: (100, 0)})])
    assert await at.ledger.locked(vault_id, SetStanding("active")) == StandingSet()
    assert (await at.vault(vault_id))["standing"] == "arrears", "who owes does not stand well"
    await at.ledger.locked(vault_id, SetStanding("suspended"))
    await at.ledger.locked(vault_id, Deposit(Stroops(500), "all"))
    assert (await at.vault(vault_id))["standing"] == "suspended"
    await at.ledger.locked(vault_id, SetStanding("active"))
    assert (await at.vault(vault_id))["standing"] == "active"


async def test_metered_usage_is_revenue_and_in_the_sums_as_any_call_is(at: Metering, rater: Rater) -> None:
    vault_id = await at.payer(200)
    await rater.rate(at.source, [snapshot(minute(0), {1: (70, 0)})])
    await rater.rate(at.source, [snapshot(minute(1), {1: (140, 0)})])
    later = NOON + timedelta(minutes=10)
    await roll_up(at.ledger.database, later)
    await index_revenue(at.ledger.database, later)
    sums = await at.rows("SELECT sum(calls)::int, sum(failed_calls)::int, sum(amount)::int FROM usage_minutes")
    assert sums == [(2, 0, 140)]
    assert await at.rows("SELECT sum(gross)::int FROM revenue_accounts") == [(140,)]
    assert await at.balance(vault_id) == 60


# --- whatever happens -------------------------------------------------------------------------------------------------


@attrs.define
class World:
    """What subjects truly used, as their counters tell it minute by minute, and what they pay."""

    at: Metering
    stood: dict[int, list[tuple[int, int]]]
    vaults: dict[int, VaultId]
    included: dict[int, int]
    deposited: int

    @classmethod
    async def make(cls, at: Metering, random: Random, minutes: int) -> "World":
        """Make two vaults with two subjects each, with counters that grow, stand still and begin anew."""
        vaults: dict[int, VaultId] = {}
        stood: dict[int, list[tuple[int, int]]] = {}
        included: dict[int, int] = {}
        for number in range(1, 5):
            if number % 2:
                vault_id = await at.ledger.vault(10_000)
            vaults[number], included[number] = vault_id, random.choice((0, 0, 700))
            await at.account(vault_id, number, included=included[number])
            up = down = 0
            stood[number] = []
            for _ in range(minutes):
                if random.random() < 0.05:
                    up = down = 0
                up, down = (
                    up + random.choice((0, 0, random.randint(0, 90))),
                    down + random.choice((0, random.randint(0, 90))),
                )
                stood[number].append((up, down))
        return cls(at, stood, vaults, included, 10_000)

    def page(self, since: int, until: int) -> list[Any]:
        """Return the snapshots of these minutes."""
        return [
            snapshot(minute(each), {number: stood[each] for number, stood in self.stood.items()})
            for each in range(max(0, since), min(until, len(self.stood[1])))
        ]

    async def check(self) -> None:
        """Compare buckets, ledger and balances with what was truly used."""
        charged = dict.fromkeys(self.vaults.values(), 0)
        for number, stood in self.stood.items():
            used, _ = truth(stood, self.at.source.first_seen, self.at.source.reset)
            found = await self.at.rows(
                "SELECT coalesce(sum(m.total), 0)::bigint, coalesce(sum(m.included), 0)::bigint,"
                " coalesce(sum(m.amount), 0)::bigint, coalesce((SELECT sum(u.amount) FROM usage_events u"
                " WHERE u.api_key_id = a.account_id), 0)::bigint"
                " FROM counter_accounts a LEFT JOIN counter_minutes m ON m.account_id = a.account_id"
                " WHERE a.subject = $1 GROUP BY a.account_id",
                subject(number),
            )
            owing = max(0, used - self.included[number])
            assert found == [(used, min(used, self.included[number]), owing, owing)], number
            charged[self.vaults[number]] += owing
        for vault_id, amount in charged.items():
            assert await self.at.balance(vault_id) == self.deposited - amount
        assert await self.at.ledger.findings() == []


KILL: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'callora%'
ORDER BY random() LIMIT 1
"""


async def collect(world: World, rater: Rater, random: Random, *, minutes: int, crashing: bool) -> None:
    """Rate everything in pages that overlap, as a collector does: what failed, or was cut, is given again."""
    reached = 0
    while reached < minutes:
        until = reached + random.randint(1, 9)
        page = world.page(reached - random.randint(0, 3), until)
        random.shuffle(page)
        page += random.choices(page, k=random.randint(0, 3))
        with Knife(random.randint(1, 40) if crashing and random.random() < 0.5 else 10**9) as scope, scope:
            try:
                await rater.rate(world.at.source, page)
                reached = until
            except CalloraFault:
                assert crashing


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(3, 60))])
async def test_every_unit_is_charged_once_whatever_happens(ledger: RealLedger, database_url: str, seed: int) -> None:
    """Two processes at the same pages, cancelled anywhere, their connections killed: Σ buckets = Σ ledger = Σ usage."""
    random = Random(seed)
    minutes = 40
    at = await metering(
        ledger, first_seen=random.choice(("full", "baseline")), reset=random.choice(("drop", "count_new_total"))
    )
    world = await World.make(at, random, minutes)
    async with open_database(database_url) as killer:

        async def process(number: int) -> None:
            async with open_database(database_url) as own, rating_process(ledger, own) as rater:
                await collect(world, rater, Random(f"{seed}/{number}"), minutes=minutes, crashing=True)

        async def kill() -> None:
            while True:
                await killer.execute(KILL.replace("ORDER BY random()", f"AND pid % 3 = {random.randrange(3)}"))
                await trio.sleep(0.02 + random.random() / 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            async with trio.open_nursery() as processes:
                for number in range(2):
                    processes.start_soon(process, number)
            nursery.cancel_scope.cancel()
    await world.check()


async def test_wc5_a_command_whose_answer_is_lost_is_charged_once_or_not_and_then_once(
    at: Metering, rater: Rater
) -> None:
    """Cut at every wait there is: what is stored is all of a page's facts of a vault, or none."""
    vault_id = await at.payer(10_000)
    number = cuts = 0
    while True:
        number += 1
        page = [snapshot(minute(number + part / 10), {1: (10 * number + part, 0)}) for part in range(3)]
        with Knife(number) as scope, scope:
            await rater.rate(at.source, page)
        if not scope.cancelled_caught:
            break
        cuts += 1
        assert await at.ledger.findings() == []
        await rater.rate(at.source, page)
        assert await at.balance(vault_id) == 10_000 - (10 * number + 2)
    assert cuts > 3


async def test_wc10_no_float_comes_near_money(at: Metering, rater: Rater) -> None:
    third = attrs.evolve(PROFILE, unit_price=Decimal("0.000000033333333333"))
    vault_id = await at.payer(10**9, profile=third)
    await rater.rate(at.source, [snapshot(minute(0), {1: (2**59, 2**59)})])
    assert await at.balance(vault_id) == 10**9, "set aside: it cannot be meant"
    await rater.rate(at.source, [snapshot(minute(1), {1: (3 * 10**15, 1)})])
    assert await at.balance(vault_id) == 10**9 - 999_999_999_990_000
