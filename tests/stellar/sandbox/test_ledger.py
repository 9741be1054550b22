"""The queue, the ledgers that close, their history, and the nodes that tell it."""

from itertools import pairwise

import pytest
import trio
import trio.testing
from stellar_sdk import Asset, Keypair, ManageData, TransactionEnvelope, xdr

from callora.stellar.sandbox.genesis import NULL_ACCOUNT, Cast, Places
from callora.stellar.sandbox.ledger import NetworkRules, SandboxNode
from callora.stellar.sandbox.state import Admission, account_key
from callora.stellar.sandbox.transactions import network_id_of
from tests.support.sandbox import START, XLM, Person, Town, codes, make_town


@pytest.fixture
def town() -> Town:
    return make_town()


def note(person: Person, value: bytes = b"1", *, fee: int = 100, sequence: int | None = None) -> TransactionEnvelope:
    return person.transaction([ManageData("note", value)], fee=fee, sequence=sequence)


# How it begins.


def test_it_begins_with_the_contracts_and_with_everyone_who_is_named() -> None:
    friend = Keypair.random().public_key
    town = make_town(cast=Cast(funded=(friend,)))
    places = town.sandbox.places
    for address in (NULL_ACCOUNT, friend, places.issuer.public_key, Cast().owner.public_key):
        assert town.sandbox.ledger.state.get(account_key(address)) is not None
    assert town.sandbox.ledger.header.sequence == 6
    coins = sum(
        entry.data.account.balance.int64
        for key in town.sandbox.ledger.state.keys(xdr.LedgerEntryType.ACCOUNT.to_xdr_bytes())
        if (entry := town.sandbox.ledger.state.get(key)) is not None and entry.data.account is not None
    )
    assert coins + town.sandbox.ledger.header.fee_pool == town.sandbox.ledger.header.total_coins


def test_ids_follow_from_the_passphrase_alone() -> None:
    first, second = make_town(cast=Cast(owner=Keypair.random())), make_town()
    assert first.sandbox.places == second.sandbox.places == Places.of()
    assert Places.of("Another") != Places.of()
    usdc = first.sandbox.places.usdc
    assert first.sandbox.places.usdc_contract == usdc.contract_id(first.passphrase)
    assert first.sandbox.places.xlm_contract == Asset.native().contract_id(first.passphrase)


def test_the_same_submissions_make_the_same_ledgers() -> None:
    def run() -> list[bytes]:
        town = make_town()
        people = [town.someone(f"person {number}") for number in range(6)]
        for person in people:
            town.submit(note(person))
        town.sandbox.ledger.close()
        return [header.hash() for header in map(town.sandbox.ledger.header_of, range(1, 14)) if header is not None]

    assert run() == run()


# The queue.


def test_the_same_hash_twice_is_a_duplicate(town: Town) -> None:
    envelope = note(town.someone("alice"))
    assert [town.submit(envelope).status for _ in range(3)] == ["PENDING", "DUPLICATE", "DUPLICATE"]


def test_one_transaction_of_an_account_waits_and_the_next_is_told_to_try_again(town: Town) -> None:
    alice = town.someone("alice")
    town.submit(note(alice))
    assert town.submit(note(alice, b"2", sequence=alice.sequence + 1)).status == "TRY_AGAIN_LATER"
    assert town.submit(note(alice, b"2")).status == "TRY_AGAIN_LATER", "nor another one with the same number"
    assert town.refused(note(alice, b"2", sequence=alice.sequence - 1)) == {"transaction": "tx_bad_seq"}


def test_a_fee_bump_takes_the_place_of_what_waits_for_ten_times_its_fee(town: Town) -> None:
    alice, sponsor = town.someone("alice"), town.someone("sponsor")
    inner = note(alice)
    assert town.submit(inner).status == "PENDING"
    cheap = town.submit(sponsor.bump(inner, 1999))
    assert cheap.status == "ERROR"
    assert cheap.result is not None
    assert xdr.TransactionResult.from_xdr(cheap.result).fee_charged.int64 == 2000, "ten times the rate, for one more"
    bumped = sponsor.bump(inner, 2000)
    assert town.submit(bumped).status == "PENDING"
    assert town.sandbox.ledger.waiting == (bumped.hash_hex(),)
    assert town.submit(inner).status == "DUPLICATE", "it waits inside of the other one"
    town.sandbox.ledger.close()
    found = town.sandbox.ledger.transaction(inner.hash_hex())
    assert found is not None
    assert (found.hash, found.successful) == (bumped.hash_hex(), True)


def test_a_transaction_waits_four_ledgers_and_is_banned_for_ten(town: Town) -> None:
    alice, ledger = town.someone("alice"), town.sandbox.ledger
    envelope = note(alice)
    town.submit(envelope)
    ledger.surge_fee = 1000
    for left in (1, 1, 1, 0):
        ledger.close()
        assert len(ledger.waiting) == left
    ledger.surge_fee = None
    for _ in range(10):
        assert town.submit(envelope).status == "TRY_AGAIN_LATER"
        ledger.close()
    assert town.submit(envelope).status == "TRY_AGAIN_LATER"
    ledger.close()
    assert town.submit(envelope).status == "PENDING"
    ledger.close()
    assert ledger.transaction(envelope.hash_hex()) is not None


def test_what_was_applied_is_first_to_be_tried_later_and_then_has_a_used_number(town: Town) -> None:
    alice, ledger = town.someone("alice"), town.sandbox.ledger
    envelope = note(alice)
    town.applied(envelope)
    said = []
    for _ in range(13):
        said.append(town.submit(envelope))
        ledger.close()
    assert [each.status for each in said[:10]] == ["TRY_AGAIN_LATER"] * 10
    assert said[-1].status == "ERROR"
    assert codes(said[-1].result) == {"transaction": "tx_bad_seq"}


def test_what_expires_while_it_waits_is_never_applied(town: Town) -> None:
    alice, ledger = town.someone("alice"), town.sandbox.ledger
    envelope = alice.transaction([ManageData("note", b"1")], bounds=(0, START + 10))
    assert town.submit(envelope).status == "PENDING"
    town.clock.advance(11)
    ledger.close()
    assert ledger.transaction(envelope.hash_hex()) is None
    assert ledger.waiting == ()
    assert ledger.header.closed_at > START + 10


def test_a_full_ledger_takes_the_highest_bids_at_the_price_of_the_lowest_of_them() -> None:
    town = make_town(rules=NetworkRules(operations_max=3))
    people = [town.someone(f"person {number}") for number in range(5)]
    for person, fee in zip(people, (100, 500, 300, 400, 200), strict=True):
        assert town.submit(note(person, fee=fee)).status == "PENDING"
    before = [person.xlm for person in people]
    town.sandbox.ledger.close()
    assert [had - person.xlm for had, person in zip(before, people, strict=True)] == [0, 300, 300, 300, 0]
    town.sandbox.ledger.close()
    assert [had - person.xlm for had, person in zip(before, people, strict=True)] == [100, 300, 300, 300, 100]


def test_a_full_queue_drops_the_lowest_bid_for_a_higher_one() -> None:
    town = make_town(rules=NetworkRules(operations_max=1))
    people = [town.someone(f"person {number}") for number in range(6)]
    for person in people[:4]:
        town.submit(note(person, fee=200))
    refused = town.submit(note(people[4], fee=200))
    assert refused.result is not None
    assert codes(refused.result) == {"transaction": "tx_insufficient_fee"}
    assert xdr.TransactionResult.from_xdr(refused.result).fee_charged.int64 == 201
    assert town.submit(note(people[4], fee=201)).status == "PENDING"
    assert len(town.sandbox.ledger.waiting) == 4


def test_the_order_in_a_ledger_is_not_that_of_submission() -> None:
    orders = set()
    for seed in ("1", "2", "3"):
        town = make_town(rules=NetworkRules(seed=seed))
        hashes = []
        for number in range(5):
            envelope = note(town.someone(f"person {number}"))
            hashes.append(envelope.hash_hex())
            town.submit(envelope)
        town.sandbox.ledger.close()
        found = [town.sandbox.ledger.transaction(each) for each in hashes]
        orders.add(tuple(each.order for each in found if each is not None))
    assert len(orders) > 1


# What a ledger keeps.


def test_meta_says_what_was_charged_used_and_changed(town: Town) -> None:
    alice, bob = town.someone("alice"), town.someone("bob")
    envelope = alice.pay(bob, "3")
    town.applied(envelope)
    found = town.sandbox.ledger.transaction(envelope.hash_hex())
    assert found is not None
    meta = xdr.TransactionMeta.from_xdr(found.meta)
    assert meta.v == 4
    assert meta.v4 is not None
    kinds = [change.type.name for change in meta.v4.tx_changes_before.ledger_entry_changes]
    assert kinds == ["LEDGER_ENTRY_STATE", "LEDGER_ENTRY_UPDATED"], "the sequence number"
    (operation,) = meta.v4.operations
    assert len(operation.changes.ledger_entry_changes) == 4
    (event,) = operation.events
    assert event.body.v0 is not None
    assert [topic.sym.sc_symbol if topic.sym else None for topic in event.body.v0.topics][:1] == [b"transfer"]
    (fee,) = meta.v4.events
    assert fee.event.body.v0 is not None
    assert fee.event.body.v0.topics[0].sym is not None
    assert fee.event.body.v0.topics[0].sym.sc_symbol == b"fee"
    fees = xdr.LedgerEntryChanges.from_xdr(found.fee_meta).ledger_entry_changes
    assert [change.type.name for change in fees] == ["LEDGER_ENTRY_STATE", "LEDGER_ENTRY_UPDATED"]


def test_headers_form_a_chain_and_time_never_goes_back(town: Town) -> None:
    ledger = town.sandbox.ledger
    for seconds in (5, 0, 7):
        town.clock.advance(seconds)
        ledger.close()
    ledger.skew_seconds = -100
    ledger.close()
    ledger.skew_seconds = 50
    ledger.close()
    headers = [header for header in map(ledger.header_of, range(1, ledger.header.sequence + 1)) if header is not None]
    for earlier, later in pairwise(headers):
        assert later.previous_hash == earlier.hash()
        assert later.closed_at >= earlier.closed_at
    assert [header.closed_at - START for header in headers[-5:]] == [5, 5, 12, 12, 62]


def test_history_is_kept_for_as_long_as_the_rules_say() -> None:
    town = make_town(rules=NetworkRules(retention=5))
    envelope = note(town.someone("alice"))
    town.applied(envelope)
    ledger = town.sandbox.ledger
    for _ in range(4):
        assert ledger.transaction(envelope.hash_hex()) is not None
        ledger.close()
    ledger.close()
    assert ledger.transaction(envelope.hash_hex()) is None
    assert ledger.oldest.sequence == ledger.header.sequence - 4


def test_a_reset_begins_again_with_the_same_accounts_and_nothing_else(town: Town) -> None:
    alice, ledger = town.someone("alice"), town.sandbox.ledger
    envelope = note(alice)
    town.applied(envelope)
    for _ in range(5):
        ledger.close()
    ledger.reset()
    assert ledger.header.sequence == 6
    assert ledger.transaction(envelope.hash_hex()) is None
    assert ledger.state.get(account_key(alice.address)) is None
    town.someone("alice")
    assert town.sandbox.places.vault_contract == Places.of().vault_contract


# Nodes.


def test_a_node_that_lags_tells_what_was(town: Town) -> None:
    alice, bob = town.someone("alice"), town.someone("bob")
    node, stale = SandboxNode(town.sandbox.ledger, "a"), SandboxNode(town.sandbox.ledger, "b", lag=2)
    town.sandbox.ledger.close()
    envelope = alice.pay(bob, "7")
    town.applied(envelope)

    def balance(of: SandboxNode) -> int:
        entry = of.reader.get(account_key(bob.address))
        assert entry is not None
        assert entry.data.account is not None
        return entry.data.account.balance.int64

    for seen in (False, False, True):
        assert (balance(node), node.transaction(envelope.hash_hex()) is not None) == (bob.xlm, True)
        assert (balance(stale), stale.transaction(envelope.hash_hex()) is not None) == (
            bob.xlm if seen else bob.xlm - 7 * XLM,
            seen,
        )
        assert stale.reader.header.sequence == node.reader.header.sequence - 2
        town.sandbox.ledger.close()


def test_a_node_that_lags_judges_by_what_it_knows(town: Town) -> None:
    alice = town.someone("alice")
    stale = SandboxNode(town.sandbox.ledger, "b", lag=1)
    town.applied(note(alice))
    admission = stale.submit(note(alice, b"2").to_xdr())
    assert isinstance(admission, Admission)
    assert codes(admission.result) == {"transaction": "tx_bad_seq"}


def test_a_node_may_keep_less_than_the_network(town: Town) -> None:
    envelope = note(town.someone("alice"))
    town.applied(envelope)
    short = SandboxNode(town.sandbox.ledger, "b", retention=2)
    assert short.transaction(envelope.hash_hex()) is not None
    town.sandbox.ledger.close()
    town.sandbox.ledger.close()
    assert short.transaction(envelope.hash_hex()) is None
    assert short.oldest.sequence == town.sandbox.ledger.header.sequence - 1
    assert SandboxNode(town.sandbox.ledger, "a").transaction(envelope.hash_hex()) is not None


def test_a_node_can_accept_and_lose(town: Town) -> None:
    alice, node = town.someone("alice"), SandboxNode(town.sandbox.ledger, "a", lose=1)
    envelope = note(alice)
    for status, waiting in (("PENDING", 0), ("PENDING", 1)):
        admission = node.submit(envelope.to_xdr())
        assert isinstance(admission, Admission)
        assert (admission.status, len(town.sandbox.ledger.waiting)) == (status, waiting)


def test_a_node_can_ask_to_try_again(town: Town) -> None:
    node = SandboxNode(town.sandbox.ledger, "a", try_again=2)
    envelope = note(town.someone("alice")).to_xdr()
    said = [node.submit(envelope) for _ in range(3)]
    assert [each.status for each in said if isinstance(each, Admission)] == ["TRY_AGAIN_LATER"] * 2 + ["PENDING"]


async def test_ledgers_close_on_trios_clock_unless_paused(autojump_clock: trio.testing.MockClock) -> None:
    town = make_town()
    first = town.sandbox.ledger.header.sequence
    async with trio.open_nursery() as nursery:
        nursery.start_soon(town.sandbox.ledger.run, 5.0)
        with trio.fail_after(60):
            for _ in range(4):
                await town.sandbox.ledger.closed.wait()
        assert town.sandbox.ledger.header.sequence - first == 4
        assert trio.current_time() == pytest.approx(20.0)
        town.sandbox.ledger.paused = True
        await trio.sleep(100)
        assert town.sandbox.ledger.header.sequence - first == 4
        nursery.cancel_scope.cancel()


def test_a_thousand_empty_ledgers_cost_little(town: Town) -> None:
    ledger, first = town.sandbox.ledger, town.sandbox.ledger.header.sequence
    for _ in range(1000):
        ledger.close()
    assert ledger.header.sequence == first + 1000
    assert list(ledger.included(first + 1, first + 1000)) == []


def test_the_network_id_is_the_hash_of_the_passphrase() -> None:
    assert network_id_of("Test SDF Network ; September 2015").hex().startswith("cee0302d59844d32bdca915c8203dd44")
