"""The round's SQL on a real PostgreSQL, attacked."""

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import pytest
import trio

from callora.actors.registry import VaultRegistry
from callora.actors.writer import Writer
from callora.ledger.commands import (
    CloseHold,
    Delivery,
    Deposit,
    ExtendHold,
    Grant,
    IdempotencyClaim,
    PlaceHold,
    Refund,
    SetStanding,
    StoredAnswer,
    Withdraw,
    capture,
    expire,
    release,
)
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import EventId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    EventFound,
    HoldExtended,
    HoldNotOpen,
    HoldPlaced,
    InsufficientFunds,
    RefundRefused,
    StandingSet,
    VaultMissing,
)
from callora.ledger.rounds import CLEAN, RoundResult, Share
from callora.ledger.vault import VaultState
from callora.store.bridge import Connection, Database, open_database
from callora.store.reads.claims import CLAIMS, CLAIMS_SETTINGS, SMALL_BYTES_MAX, Claim, KeptAnswer
from callora.store.reads.gateway import Reads
from callora.store.rounds import LINE_SETTINGS, STATEMENTS
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED, METRICS, QUIET

GONE = Delivery("client_gone")
FINGERPRINT = bytes(range(32))


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger that the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened
        assert await opened.findings() == []


def hold(event_id: EventId, amount: int, *, claim: IdempotencyClaim | None = None, ttl_seconds: int = 60) -> PlaceHold:
    """Return a hold of `amount`."""
    return PlaceHold(event_id, Stroops(amount), ttl_seconds, CHARGED, claim)


def spend(event_id: EventId, held: int, amount: int | None = None, answer: StoredAnswer | None = None) -> CloseHold:
    """Return a capture, of the whole unless said otherwise."""
    return capture(event_id, Stroops(held), Stroops(held if amount is None else amount), DELIVERED, answer)


def give_back(event_id: EventId, held: int, answer: StoredAnswer | None = None) -> CloseHold:
    """Return a release."""
    return release(event_id, Stroops(held), GONE, answer)


def claim_of(key: str, replaces: EventId | None = None, retention_seconds: int = 3600) -> IdempotencyClaim:
    """Return the claim of a key."""
    return IdempotencyClaim(key, FINGERPRINT, replaces, retention_seconds)


async def commit(ledger: RealLedger, *shares: Share) -> RoundResult:
    """Store one round."""
    return await ledger.store.commit_round(shares)


async def placed(ledger: RealLedger, vault_id: VaultId, amount: int, ttl_seconds: int = 60) -> EventId:
    """Store one hold and return its event."""
    event_id = ledger.event()
    share = await ledger.share(vault_id, hold(event_id, amount, ttl_seconds=ttl_seconds))
    assert await commit(ledger, share) == CLEAN
    return event_id


# --- the guards -------------------------------------------------------------------------------------------------------


async def test_a_hold_takes_from_available_and_its_capture_gives_back_the_rest(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 60)
    assert await ledger.balance(vault_id) == (40, 60)
    assert await commit(ledger, await ledger.share(vault_id, spend(event_id, 60, 45))) == CLEAN
    assert await ledger.balance(vault_id) == (55, 0)
    assert await ledger.store.find_event(vault_id, event_id) == EventFound(
        event_id, "captured", Stroops(60), Stroops(45)
    )


async def test_a_share_that_needs_more_than_is_available_loses_whole(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    events = [ledger.event() for _ in range(3)]
    result = await commit(ledger, await ledger.share(vault_id, *(hold(each, 40) for each in events)))
    assert [state.available for state in result.lost] == [100]
    assert await ledger.count("usage_events") == 0
    assert (await ledger.state(vault_id)).version == 1, "the deposit's, and no other"


async def test_a_lost_vault_stores_nothing_while_the_others_of_its_round_do(ledger: RealLedger) -> None:
    poor, rich = await ledger.vault(10), await ledger.vault(100)
    open_event = await placed(ledger, poor, 5)
    lost_event, won_event = ledger.event(), ledger.event()
    poor_share = await ledger.share(poor, hold(lost_event, 50), spend(open_event, 5))
    result = await commit(ledger, poor_share, await ledger.share(rich, hold(won_event, 50)))
    assert [state.vault_id for state in result.lost] == [poor]
    assert (await ledger.balance(poor), await ledger.balance(rich)) == ((5, 5), (50, 50))
    row = await ledger.event_row(open_event)
    assert row is not None and row["state"] == "held", "its close was not stored either"
    assert await ledger.event_row(lost_event) is None


async def test_a_guarded_share_loses_on_any_other_version_and_an_unguarded_one_reports_the_drift(
    ledger: RealLedger,
) -> None:
    vault_id = await ledger.vault(100)
    version = (await ledger.state(vault_id)).version
    await ledger.locked(vault_id, Deposit(Stroops(7), "behind its back"))
    guarded = await ledger.share(vault_id, hold(ledger.event(), 1), guarded=True, version=version)
    assert (await commit(ledger, guarded)).lost == [
        VaultState(vault_id, Stroops(107), Stroops(0), version + 1, "active")
    ]
    unguarded = await ledger.share(vault_id, hold(ledger.event(), 1), version=version)
    assert (await commit(ledger, unguarded)).drifted == [
        VaultState(vault_id, Stroops(106), Stroops(1), version + 2, "active")
    ]


async def test_a_voided_share_loses_whatever_the_version(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    share = await ledger.share(vault_id, hold(ledger.event(), 1), guarded=True)
    share.void()
    assert len((await commit(ledger, share)).lost) == 1


@pytest.mark.parametrize("amount", [0, 1])
async def test_a_suspended_vault_refuses_holds_whatever_the_actor_believed(ledger: RealLedger, amount: int) -> None:
    vault_id = await ledger.vault(100)
    share = await ledger.share(vault_id, hold(ledger.event(), amount))
    await ledger.locked(vault_id, SetStanding("suspended"))
    assert [state.standing for state in (await commit(ledger, share)).lost] == ["suspended"]
    assert await ledger.count("usage_events") == 0


async def test_a_suspended_vault_still_settles_what_is_open(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10)
    await ledger.locked(vault_id, SetStanding("suspended"))
    assert await commit(ledger, await ledger.share(vault_id, spend(event_id, 10))) == CLEAN
    assert await ledger.balance(vault_id) == (90, 0)


# --- closes -----------------------------------------------------------------------------------------------------------


async def test_closes_that_find_nothing_are_missed_and_move_no_money(ledger: RealLedger) -> None:
    vault_id, other = await ledger.vault(100), await ledger.vault(100)
    closed, theirs, unborn = await placed(ledger, vault_id, 10), await placed(ledger, other, 10), ledger.event()
    await commit(ledger, await ledger.share(vault_id, give_back(closed, 10)))
    share = await ledger.share(vault_id, spend(closed, 10), spend(theirs, 10), spend(unborn, 10))
    assert (await commit(ledger, share)).missed == {closed, theirs, unborn}
    assert (await ledger.balance(vault_id), await ledger.balance(other)) == ((100, 0), (90, 10))


async def test_one_round_closes_one_hold_and_places_another_of_one_vault(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    first, second = await placed(ledger, vault_id, 60), ledger.event()
    assert await commit(ledger, await ledger.share(vault_id, spend(first, 60), hold(second, 40))) == CLEAN
    assert await ledger.balance(vault_id) == (0, 40)


async def test_money_that_a_round_gives_back_cannot_be_held_in_the_same_round(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    first = await placed(ledger, vault_id, 100)
    share = await ledger.share(vault_id, give_back(first, 100), hold(ledger.event(), 50))
    assert len((await commit(ledger, share)).lost) == 1


async def test_a_close_moves_what_the_row_holds_and_not_what_the_actor_believed(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10)
    assert await ledger.locked(vault_id, ExtendHold(event_id, 5, Stroops(20))) == HoldExtended(Stroops(30))
    await commit(ledger, await ledger.share(vault_id, spend(event_id, 10)))
    assert await ledger.balance(vault_id) == (90, 0)


async def test_a_hold_expires_when_it_is_due_and_not_before(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10, ttl_seconds=60)
    ledger.clock.advance(59)
    share = await ledger.share(vault_id, expire(event_id, Stroops(10)))
    assert (await commit(ledger, share)).missed == {event_id}
    assert await ledger.balance(vault_id) == (90, 10)
    ledger.clock.advance(1)
    assert await commit(ledger, await ledger.share(vault_id, expire(event_id, Stroops(10)))) == CLEAN
    assert await ledger.balance(vault_id) == (100, 0)


async def test_a_hold_that_is_due_may_still_be_captured(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10, ttl_seconds=1)
    ledger.clock.advance(5)
    assert await commit(ledger, await ledger.share(vault_id, spend(event_id, 10))) == CLEAN
    assert await ledger.balance(vault_id) == (90, 0)


async def test_a_free_call_is_an_event_and_moves_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(0)
    event_id = await placed(ledger, vault_id, 0)
    assert await commit(ledger, await ledger.share(vault_id, spend(event_id, 0))) == CLEAN
    assert await ledger.store.find_event(vault_id, event_id) == EventFound(event_id, "captured", Stroops(0), Stroops(0))


async def test_a_capture_beyond_its_hold_is_refused_by_the_database(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10)
    with pytest.raises(StoreRefused) as refused:
        await commit(ledger, await ledger.share(vault_id, spend(event_id, 10, 11)))
    assert refused.value.sqlstate == "23514"
    assert await ledger.balance(vault_id) == (90, 10)


async def test_an_event_is_placed_once(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 10)
    with pytest.raises(StoreRefused):
        await commit(ledger, await ledger.share(vault_id, hold(event_id, 10)))
    assert await ledger.balance(vault_id) == (90, 10)


# --- idempotency keys -------------------------------------------------------------------------------------------------


async def test_a_key_is_claimed_once_and_the_second_hold_is_missed(ledger: RealLedger) -> None:
    vault_id, other = await ledger.vault(100), await ledger.vault(100)
    first, second, theirs = ledger.event(), ledger.event(), ledger.event()
    assert await commit(ledger, await ledger.share(vault_id, hold(first, 10, claim=claim_of("k")))) == CLEAN
    share = await ledger.share(vault_id, hold(second, 10, claim=claim_of("k")), hold(ledger.event(), 5))
    result = await commit(ledger, share, await ledger.share(other, hold(theirs, 1, claim=claim_of("k"))))
    assert result.missed == {second}, "another vault's key is another key"
    assert await ledger.balance(vault_id) == (85, 15)
    assert await ledger.event_row(second) is None


async def test_of_two_claims_of_one_key_in_one_round_one_is_stored(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    events = sorted(ledger.event() for _ in range(2))
    share = await ledger.share(vault_id, *(hold(each, 10, claim=claim_of("k")) for each in events))
    assert (await commit(ledger, share)).missed == {events[1]}
    assert await ledger.balance(vault_id) == (90, 10)


async def test_a_claim_is_taken_over_only_by_who_names_the_attempt_that_holds_it(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    first, wrong, second, late = (ledger.event() for _ in range(4))
    await commit(ledger, await ledger.share(vault_id, hold(first, 10, claim=claim_of("k"))))
    await commit(ledger, await ledger.share(vault_id, give_back(first, 10)))
    share = await ledger.share(vault_id, hold(wrong, 10, claim=claim_of("k", replaces=ledger.event())))
    assert (await commit(ledger, share)).missed == {wrong}
    share = await ledger.share(vault_id, hold(second, 10, claim=claim_of("k", replaces=first)))
    assert await commit(ledger, share) == CLEAN
    share = await ledger.share(vault_id, hold(late, 10, claim=claim_of("k", replaces=first)))
    assert (await commit(ledger, share)).missed == {late}, "who names the same attempt later is too late"


async def test_an_answered_claim_is_never_taken_over_until_it_is_old(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    first, second, third = (ledger.event() for _ in range(3))
    answer = StoredAnswer("k", 200, b"X: y\r\n", b"body", Stroops(10))
    await commit(ledger, await ledger.share(vault_id, hold(first, 10, claim=claim_of("k", retention_seconds=100))))
    await commit(ledger, await ledger.share(vault_id, spend(first, 10, answer=answer)))
    stored = await ledger.claims.find(vault_id, "k")
    assert stored is not None
    assert (stored.state, stored.answer) == ("completed", KeptAnswer(200, b"X: y\r\n", b"body"))
    assert await ledger.claims.answer(vault_id, "k", first) == stored.answer
    assert await ledger.claims.answer(vault_id, "k", second) is None
    assert (stored.charge, stored.event_id, stored.event_open) == (10, first, False)
    share = await ledger.share(vault_id, hold(second, 10, claim=claim_of("k", replaces=first)))
    assert (await commit(ledger, share)).missed == {second}
    ledger.clock.advance(100)
    assert await commit(ledger, await ledger.share(vault_id, hold(third, 10, claim=claim_of("k")))) == CLEAN
    taken = await ledger.claims.find(vault_id, "k")
    assert taken is not None
    assert (taken.state, taken.event_id, taken.charge, taken.event_open) == ("started", third, None, True)
    assert taken.answer is None
    assert await ledger.claims.answer(vault_id, "k", third) is None
    await commit(ledger, await ledger.share(vault_id, give_back(third, 10)))


@pytest.mark.parametrize("beyond", [0, 1])
async def test_a_small_answer_comes_with_its_claim_and_a_large_one_by_itself(ledger: RealLedger, beyond: int) -> None:
    vault_id, event_id = await ledger.vault(100), ledger.event()
    kept = KeptAnswer(200, b"X: y\r\n", bytes(SMALL_BYTES_MAX - 6 + beyond))
    answer = StoredAnswer("k", kept.status, kept.head, kept.body, Stroops(10))
    await commit(ledger, await ledger.share(vault_id, hold(event_id, 10, claim=claim_of("k"))))
    await commit(ledger, await ledger.share(vault_id, spend(event_id, 10, answer=answer)))
    stored = await ledger.claims.find(vault_id, "k")
    assert stored is not None
    assert stored.answer == (None if beyond else kept)
    assert await ledger.claims.answer(vault_id, "k", event_id) == kept


async def test_an_answer_is_stored_only_with_the_close_that_counts(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = ledger.event()
    await commit(ledger, await ledger.share(vault_id, hold(event_id, 10, claim=claim_of("k"))))
    await commit(ledger, await ledger.share(vault_id, give_back(event_id, 10)))
    answer = StoredAnswer("k", 200, None, None, Stroops(10))
    share = await ledger.share(vault_id, spend(event_id, 10, answer=answer))
    assert (await commit(ledger, share)).missed == {event_id}
    stored = await ledger.claims.find(vault_id, "k")
    assert stored is not None and stored.state == "started"


async def test_an_answer_without_a_body_is_not_replayable(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = ledger.event()
    await commit(ledger, await ledger.share(vault_id, hold(event_id, 10, claim=claim_of("k"))))
    answer = StoredAnswer("k", 200, None, None, Stroops(10))
    assert await commit(ledger, await ledger.share(vault_id, spend(event_id, 10, answer=answer))) == CLEAN
    stored = await ledger.claims.find(vault_id, "k")
    assert stored is not None and (stored.state, stored.charge) == ("not_replayable", 10)


async def test_a_lost_share_claims_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(5)
    await commit(ledger, await ledger.share(vault_id, hold(ledger.event(), 10, claim=claim_of("k"))))
    assert await ledger.claims.find(vault_id, "k") is None


# --- the locked round and the rare commands ---------------------------------------------------------------------------


async def test_a_locked_round_decides_on_the_stored_state_and_never_loses(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    seen: list[VaultState] = []
    event_id = ledger.event()

    def decide(state: VaultState) -> Share:
        seen.append(state)
        share = Share(vault_id, state.version, guarded=True)
        share.place(hold(event_id, 100))
        return share

    share, result = await ledger.store.commit_locked_round(vault_id, decide, credited=False)
    assert not (result.lost or result.drifted or result.missed)
    assert (share.need, seen[0].available) == (100, 100)
    assert await ledger.balance(vault_id) == (0, 100)


async def test_a_locked_round_that_decides_nothing_stores_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    before = await ledger.state(vault_id)
    share, result = await ledger.store.commit_locked_round(
        vault_id, lambda state: Share(vault_id, state.version, guarded=True), credited=False
    )
    assert not (share.holds or result.lost or result.drifted or result.missed)
    assert await ledger.state(vault_id) == before


async def test_vaults_asked_for_together_are_each_given_their_own_state(ledger: RealLedger) -> None:
    vault_ids = [await ledger.vault(number + 1) for number in range(20)]
    got: dict[VaultId, VaultState] = {}

    async def load(vault_id: VaultId) -> None:
        got.update(await ledger.store.load_vaults([vault_id]))

    async with trio.open_nursery() as nursery:
        for vault_id in vault_ids * 3:
            nursery.start_soon(load, vault_id)
    assert [got[each].available for each in vault_ids] == list(range(1, 21))


async def test_a_reading_begun_after_a_commit_shows_it_whoever_else_is_reading(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1)
    stale: list[int] = []

    async def read() -> None:
        for _ in range(20):
            stored = int(await ledger.database.fetch_value("SELECT available FROM vaults"))
            seen = (await ledger.store.load_vaults([vault_id]))[vault_id].available
            if seen < stored:
                stale.append(seen)

    async def deposit() -> None:
        for number in range(40):
            await ledger.locked(vault_id, Deposit(Stroops(1), f"d-{number}"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read)
        nursery.start_soon(deposit)
    assert stale == [], "a refusal on such a state would be wrong"


async def test_a_crash_inside_a_locked_round_stores_nothing(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)

    def decide(state: VaultState) -> Share:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ledger.store.commit_locked_round(vault_id, decide, credited=False)
    assert await ledger.balance(vault_id) == (100, 0)


async def test_movements_are_booked_once_under_their_reference(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    for repeated in (False, True):
        moved = await ledger.locked(vault_id, Deposit(Stroops(50), "d"))
        assert moved == BalanceMoved(2, Stroops(150), repeated)
    for repeated in (False, True):
        moved = await ledger.locked(vault_id, Withdraw(Stroops(30), "w"))
        assert moved == BalanceMoved(3, Stroops(120), repeated)
    for repeated in (False, True):
        moved = await ledger.locked(vault_id, Grant(Stroops(7), "g"))
        assert moved == BalanceMoved(4, Stroops(127), repeated)
    assert await ledger.count("ledger_entries") == 4


async def test_the_same_reference_names_another_movement_of_another_kind_or_vault(ledger: RealLedger) -> None:
    vault_id, other = await ledger.vault(100), await ledger.vault(100)
    for each, command in (
        (vault_id, Deposit(Stroops(1), "x")),
        (vault_id, Withdraw(Stroops(1), "x")),
        (vault_id, Grant(Stroops(1), "x")),
        (other, Deposit(Stroops(1), "x")),
    ):
        moved = await ledger.locked(each, command)
        assert isinstance(moved, BalanceMoved) and not moved.repeated


async def test_a_withdrawal_never_touches_what_is_held(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    await placed(ledger, vault_id, 60)
    assert await ledger.locked(vault_id, Withdraw(Stroops(41), "w")) == InsufficientFunds(Stroops(41), Stroops(40))
    assert isinstance(await ledger.locked(vault_id, Withdraw(Stroops(40), "w")), BalanceMoved)


async def test_an_amount_of_the_wrong_sign_is_refused_by_the_database(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    for command in (
        Deposit(Stroops(-5), "a"),
        Deposit(Stroops(0), "b"),
        Withdraw(Stroops(-5), "c"),
        Grant(Stroops(0), "d"),
    ):
        with pytest.raises(StoreRefused):
            await ledger.locked(vault_id, command)
    assert await ledger.balance(vault_id) == (100, 0)


async def test_refunds_never_exceed_their_capture(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id, open_event = await placed(ledger, vault_id, 60), await placed(ledger, vault_id, 10)
    await commit(ledger, await ledger.share(vault_id, spend(event_id, 60, 50)))
    assert await ledger.locked(vault_id, Refund(event_id, Stroops(51), "r")) == RefundRefused(Stroops(50))
    assert await ledger.locked(vault_id, Refund(event_id, Stroops(0), "r")) == RefundRefused(Stroops(50))
    for repeated in (False, True):
        moved = await ledger.locked(vault_id, Refund(event_id, Stroops(30), "r"))
        assert moved == BalanceMoved(2, Stroops(70), repeated)
    assert await ledger.locked(vault_id, Refund(event_id, Stroops(21), "s")) == RefundRefused(Stroops(20))
    assert await ledger.locked(vault_id, Refund(open_event, Stroops(1), "t")) == RefundRefused(Stroops(0))
    assert await ledger.locked(vault_id, Refund(ledger.event(), Stroops(1), "u")) == RefundRefused(Stroops(0))


async def test_an_extension_lasts_a_day_at_most_and_holds_only_what_is_there(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    event_id = await placed(ledger, vault_id, 60)
    assert await ledger.locked(vault_id, ExtendHold(event_id, 1, Stroops(41))) == InsufficientFunds(
        Stroops(41), Stroops(40)
    )
    assert await ledger.locked(vault_id, ExtendHold(event_id, 10**6, Stroops(40))) == HoldExtended(Stroops(100))
    row = await ledger.event_row(event_id)
    assert row is not None and (row["expires_at"] - ledger.clock.now()).total_seconds() == 86_400
    assert await ledger.balance(vault_id) == (0, 100)
    await commit(ledger, await ledger.share(vault_id, spend(event_id, 100)))
    assert await ledger.locked(vault_id, ExtendHold(event_id, 1)) == HoldNotOpen("captured")
    assert await ledger.locked(vault_id, ExtendHold(ledger.event(), 1)) == HoldNotOpen(None)


async def test_a_standing_is_set_once_and_tells_the_catalogue(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(100)
    version = (await ledger.state(vault_id)).version
    for _ in range(2):
        assert await ledger.locked(vault_id, SetStanding("arrears")) == StandingSet()
    state = await ledger.state(vault_id)
    assert (state.standing, state.version) == ("arrears", version + 1)
    changes = await Reads(ledger.database).catalogue_changes(0)
    assert [each.ref for each in changes if each.kind == "vault"] == [vault_id]


async def test_a_vault_that_does_not_exist_is_missing(ledger: RealLedger) -> None:
    vault_id = VaultId(ledger.ids.uuid7())
    assert await ledger.store.load_vaults([vault_id]) == {}
    assert await ledger.locked(vault_id, Deposit(Stroops(1), "d")) == VaultMissing()


# --- plans ------------------------------------------------------------------------------------------------------------


def _nodes(plan: dict[str, object]) -> list[dict[str, object]]:
    children = plan.get("Plans", [])
    assert isinstance(children, list)
    return [plan, *(node for child in children for node in _nodes(child))]


async def _planned(connection: Connection, sql: str, parameters: int) -> list[dict[str, object]]:
    await connection.execute(f"PREPARE planned AS {sql}")
    nothing = ", ".join(["NULL"] * parameters)
    text = await connection.fetch_value(f"EXPLAIN (FORMAT JSON) EXECUTE planned({nothing})")
    await connection.execute("DEALLOCATE planned")
    return _nodes(json.loads(text)[0]["Plan"])


@pytest.mark.parametrize("vacuumed", [False, True])
@pytest.mark.parametrize("contents", STATEMENTS)
async def test_the_rounds_plan_finds_every_stored_row_by_its_whole_key_however_empty_the_tables_are(
    ledger: RealLedger, contents: tuple[bool, bool, bool, bool, bool, bool], vacuumed: bool
) -> None:
    closes, _, keyed, _, _, _ = contents
    statement = STATEMENTS[contents]
    async with ledger.database.acquire() as connection:
        if vacuumed:  # now they are known to be empty, where before that was only a guess
            await connection.execute("VACUUM ANALYZE vaults, usage_events, idempotency_keys")
        for name, value in LINE_SETTINGS.items():
            await connection.execute(f"SET {name} = '{value}'")
        nodes = await _planned(connection, statement.sql, len(statement.parameters))
    on_tables = [node for node in nodes if "Relation Name" in node and node["Node Type"] != "ModifyTable"]
    names = {str(node["Relation Name"]) for node in on_tables}
    assert "vaults" in names
    assert ("idempotency_keys" in names) == (closes and keyed)
    if closes:
        assert len([name for name in names if name.startswith("usage_events_2")]) >= 2, "several months"
    second_column = {"vaults": "vault_id", "idempotency_keys": "key"}
    for node in on_tables:
        assert node["Node Type"] == "Index Scan", node
        condition = str(node.get("Index Cond"))
        assert "vault_id = ANY" in condition, node
        assert f"{second_column.get(str(node['Relation Name']), 'event_id')} = ANY" in condition, node


@pytest.mark.parametrize("vacuumed", [False, True])
async def test_claims_are_looked_up_by_their_whole_key_however_empty_the_tables_are(
    ledger: RealLedger, vacuumed: bool
) -> None:
    async with ledger.database.acquire() as connection:
        if vacuumed:
            await connection.execute("VACUUM ANALYZE usage_events, idempotency_keys")
        for name, value in CLAIMS_SETTINGS.items():
            await connection.execute(f"SET {name} = '{value}'")
        nodes = await _planned(connection, CLAIMS, 3)
        await connection.execute("SET default_transaction_read_only = off")
    on_tables = [node for node in nodes if "Relation Name" in node]
    assert {str(node["Relation Name"])[:12] for node in on_tables} == {"idempotency_", "usage_events"}
    for node in on_tables:
        assert node["Node Type"] == "Index Scan", node
        condition = str(node["Index Cond"])
        assert "vault_id = ANY" in condition, node
        assert "key = ANY" in condition or "event_id = ANY" in condition, node


async def test_claims_looked_at_together_are_each_told_their_own(ledger: RealLedger) -> None:
    vaults = [await ledger.vault(100) for _ in range(3)]
    keys = ["plain", "it's", 'quo"ted', "back\\slash", "{a,b}", "NULL", "x" * 255]
    placed: dict[tuple[VaultId, str], EventId] = {}
    for vault_id in vaults[:2]:
        for key in keys[:5] if vault_id == vaults[0] else keys[3:]:
            event_id = placed[vault_id, key] = ledger.event()
            await commit(ledger, await ledger.share(vault_id, hold(event_id, 1, claim=claim_of(key))))
    ended = placed[vaults[0], "it's"]
    await commit(ledger, await ledger.share(vaults[0], give_back(ended, 1)))
    found: dict[tuple[VaultId, str], Claim | None] = {}

    async def look(vault_id: VaultId, key: str) -> None:
        found[vault_id, key] = await ledger.claims.find(vault_id, key)

    async with trio.open_nursery() as nursery:
        for vault_id in vaults:
            for key in (*keys, *keys[:2]):  # some are asked for twice
                nursery.start_soon(look, vault_id, key)
    for asked, claim in found.items():
        expected = placed.get(asked)
        assert (None if claim is None else claim.event_id) == expected, asked
        if claim is not None:
            assert (claim.state, claim.fingerprint, claim.event_open) == ("started", FINGERPRINT, expected != ended)


_AGE = """
DO $$
BEGIN
    FOR round IN 1..2000 LOOP
        UPDATE vaults SET version = version + 1;
        COMMIT;
    END LOOP;
END
$$
"""


async def test_the_rounds_plan_goes_by_the_index_itself_where_busy_vaults_have_left_many_dead_versions(
    ledger: RealLedger,
) -> None:
    vault_ids = sorted([await ledger.vault(1) for _ in range(16)])
    async with ledger.database.acquire() as connection:
        async with ledger.database.acquire() as looking:
            # What somebody may still see is not cleared away, so each version goes to another page.
            await looking.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await looking.fetch_value("SELECT count(*) FROM vaults")
            await connection.execute(_AGE)
            # In an order on the disk that is not that of the ids: else an index scan would look cheap.
            for vault_id in (*vault_ids[::2], *vault_ids[:0:-2]):
                await connection.execute("UPDATE vaults SET version = version + 1 WHERE vault_id = $1", vault_id)
            await looking.execute("ROLLBACK")
        await connection.execute("VACUUM ANALYZE vaults")
        for name, value in LINE_SETTINGS.items():
            await connection.execute(f"SET {name} = '{value}'")

        async def scans() -> set[str]:
            names = set()
            for statement in STATEMENTS.values():
                nodes = await _planned(connection, statement.sql, len(statement.parameters))
                names |= {str(node["Node Type"]) for node in nodes if node.get("Relation Name") == "vaults"}
            return names - {"ModifyTable"}

        assert await scans() == {"Index Scan"}
        await connection.execute("SET enable_bitmapscan = on")
        assert "Bitmap Heap Scan" in await scans(), "what is to be kept away did not even threaten"


# --- several processes ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def processes_at(url: str, clock: TestClock, count: int) -> AsyncIterator[list[VaultRegistry]]:
    """Run registries, each with a pool, a line and a writer of its own, as processes have them."""
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(count):
            database = await stack.enter_async_context(open_database(url))
            stores.append(
                VaultStore(
                    database,
                    await stack.enter_async_context(database.line(LINE_SETTINGS)),
                    clock,
                    Ids(clock, os.urandom).uuid7,
                    10,
                )
            )
        registries = []
        async with trio.open_nursery() as nursery:
            for number, store in enumerate(stores):
                writer = Writer(store, METRICS, QUIET, 1000)
                registries.append(VaultRegistry(store, writer, METRICS, QUIET, Random(number), 100_000))
                await nursery.start(writer.run)
                await nursery.start(registries[-1].run)
            yield registries
            nursery.cancel_scope.cancel()


async def ask_all(requests: Sequence[tuple[VaultRegistry, VaultId, PlaceHold | CloseHold]]) -> list[object]:
    """Ask everything at once, from a barrier, and return the answers in order."""
    answers: list[object] = [None] * len(requests)
    start = trio.Event()

    async def one(index: int, registry: VaultRegistry, vault_id: VaultId, command: PlaceHold | CloseHold) -> None:
        await start.wait()
        answers[index] = await registry.ask(vault_id, command)

    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(one, index, *request)
        start.set()
    return answers


async def test_two_processes_at_one_vault_place_exactly_what_it_can_afford(
    ledger: RealLedger, database_url: str
) -> None:
    callers, price = 200, 7
    vault_id = await ledger.vault(73 * price + 3)
    async with processes_at(database_url, ledger.clock, 2) as processes:
        events = [ledger.event() for _ in range(callers)]
        answers = await ask_all([(processes[n % 2], vault_id, hold(each, price)) for n, each in enumerate(events)])
        won = [each for each, answer in zip(events, answers, strict=True) if isinstance(answer, HoldPlaced)]
        refused = [answer for answer in answers if isinstance(answer, InsufficientFunds)]
        assert (len(won), len(refused)) == (73, callers - 73)
        assert {each.available for each in refused} == {Stroops(3)}
        assert await ledger.count("usage_events") == 73
        assert await ledger.balance(vault_id) == (3, 73 * price)
        closed = await ask_all([(processes[n % 2], vault_id, spend(each, price)) for n, each in enumerate(won)])
        assert {type(answer).__name__ for answer in closed} == {"HoldClosed"}
        assert await ledger.balance(vault_id) == (3, 0)


async def test_of_captures_and_releases_from_two_processes_one_counts(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(10_000)
    events = [await placed(ledger, vault_id, 100) for _ in range(40)]
    async with processes_at(database_url, ledger.clock, 2) as (one, two):
        requests: list[tuple[VaultRegistry, VaultId, PlaceHold | CloseHold]] = []
        for each in events:
            requests += [
                (one, vault_id, spend(each, 100)),
                (one, vault_id, give_back(each, 100)),
                (two, vault_id, give_back(each, 100)),
            ]
        answers = await ask_all(requests)
        for number, each in enumerate(events):
            row = await ledger.event_row(each)
            assert row is not None
            told = {answer.state for answer in answers[3 * number : 3 * number + 3]}  # type: ignore[attr-defined]
            assert told == {row["state"]}, "everybody is told the one way in which it ended"


async def test_two_processes_claiming_one_key_place_one_hold(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(10_000)
    async with processes_at(database_url, ledger.clock, 2) as processes:
        answers = await ask_all(
            [
                (processes[n % 2], vault_id, hold(ledger.event(), 1, claim=claim_of(f"key-{n // 10}")))
                for n in range(200)
            ]
        )
        assert len([each for each in answers if isinstance(each, HoldPlaced)]) == 20
        assert await ledger.count("usage_events") == 20


async def test_many_vaults_in_crossing_rounds_never_deadlock(ledger: RealLedger, database_url: str) -> None:
    vault_ids = [await ledger.vault(1000) for _ in range(20)]
    random = Random(1)
    async with processes_at(database_url, ledger.clock, 2) as processes:
        requests = [(processes[n % 2], random.choice(vault_ids), hold(ledger.event(), 1)) for n in range(400)]
        answers = await ask_all(requests)
        assert {type(answer).__name__ for answer in answers} == {"HoldPlaced"}


async def test_rounds_that_wait_for_each_others_rows_store_what_they_say(ledger: RealLedger, database_url: str) -> None:
    # The server looks again at rows that changed while it waited for them; PostgreSQL 18 has crashed at it where the
    # statement's plan prunes partitions.
    vault_ids = [await ledger.vault(10_000) for _ in range(100)]

    async def process(seed: int) -> None:
        random = Random(seed)
        open_holds: dict[VaultId, list[EventId]] = {vault_id: [] for vault_id in vault_ids}
        async with open_database(database_url) as database, database.line(LINE_SETTINGS) as line:
            store = VaultStore(database, line, ledger.clock, ledger.ids.uuid7, 10)
            for _ in range(60):
                kind = random.choice(["holds", "closes", "both"])
                shares = []
                for vault_id in random.sample(vault_ids, 40):
                    share = Share(vault_id, 0, guarded=False)
                    if kind != "holds":
                        for event_id in open_holds[vault_id]:
                            share.close(spend(event_id, 2, 1))
                        open_holds[vault_id] = []
                    if kind != "closes":
                        event_id = ledger.event()
                        share.place(hold(event_id, 2))
                        open_holds[vault_id].append(event_id)
                    if share.holds or share.closes:
                        shares.append(share)
                if shares:
                    result = await store.commit_round(shares)
                    assert not (result.lost or result.missed)

    async with trio.open_nursery() as nursery:
        for seed in range(3):
            nursery.start_soon(process, seed)
    assert await ledger.count("usage_events", "state = 'captured'") > 1000
