"""What the network takes and what it refuses: every result code of a transaction that the sandbox models."""

from collections.abc import Iterator

import pytest
from stellar_sdk import (
    Account,
    AccountMerge,
    Asset,
    BumpSequence,
    Claimant,
    ClaimPredicate,
    CreateAccount,
    CreateClaimableBalance,
    Keypair,
    LedgerBounds,
    ManageData,
    Payment,
    SetOptions,
    Signer,
    TransactionBuilder,
    TransactionEnvelope,
    xdr,
)
from stellar_sdk.signer_key import SignerKey

from callora.stellar.sandbox.genesis import keypair_of
from callora.stellar.sandbox.state import Undecodable
from tests.support.sandbox import START, XLM, Person, Town, make_town

STRANGER = keypair_of("stranger")
PAYMENT = Payment(keypair_of("bob").public_key, Asset.native(), "1")


@pytest.fixture(scope="module")
def town() -> Town:
    return make_town()


@pytest.fixture(scope="module")
def _people(town: Town) -> tuple[Person, Person]:
    return town.someone("alice"), town.someone("bob")


@pytest.fixture
def alice(_people: tuple[Person, Person], town: Town) -> Iterator[Person]:
    yield _people[0]
    town.sandbox.ledger.lose_waiting()


@pytest.fixture
def bob(_people: tuple[Person, Person]) -> Person:
    return _people[1]


def result(town: Town, envelope: TransactionEnvelope) -> xdr.TransactionResult:
    admission = town.submit(envelope)
    assert admission.result is not None
    return xdr.TransactionResult.from_xdr(admission.result)


def test_a_payment_is_applied_and_charged(town: Town, alice: Person, bob: Person) -> None:
    before = alice.xlm, bob.xlm
    town.applied(alice.pay(bob, "5"))
    assert (alice.xlm, bob.xlm) == (before[0] - 5 * XLM - 100, before[1] + 5 * XLM)


def test_an_account_that_is_not_there_cannot_send(town: Town) -> None:
    envelope = TransactionBuilder(Account(STRANGER.public_key, 1), town.passphrase, 100)
    built = envelope.append_operation(PAYMENT).add_time_bounds(0, 0).build()
    built.sign(STRANGER)
    assert town.refused(built) == {"transaction": "tx_no_source_account"}


@pytest.mark.parametrize("ahead", [-1, 1, 10])
def test_only_the_next_sequence_number_is_taken(town: Town, alice: Person, ahead: int) -> None:
    envelope = alice.transaction([PAYMENT], sequence=alice.sequence + ahead)
    assert town.refused(envelope) == {"transaction": "tx_bad_seq"}


def test_a_minimum_sequence_number_allows_a_gap(town: Town, alice: Person) -> None:
    builder = alice.builder(sequence=alice.sequence + 5).append_operation(PAYMENT).add_time_bounds(0, 0)
    envelope = builder.set_min_sequence_number(alice.sequence).build()
    envelope.sign(alice.keypair)
    town.applied(envelope)


@pytest.mark.parametrize(
    ("bounds", "code"),
    [
        ((START + 1, 0), "tx_too_early"),
        ((0, START - 1), "tx_too_late"),
        ((START, START), None),
    ],
)
def test_a_time_bound_holds_to_the_second(town: Town, alice: Person, bounds: tuple[int, int], code: str | None) -> None:
    envelope = alice.transaction([PAYMENT], bounds=bounds)
    if code is None:
        town.applied(envelope)
    else:
        assert town.refused(envelope) == {"transaction": code}


@pytest.mark.parametrize(("first", "last", "code"), [(2, 0, "tx_too_early"), (0, 1, "tx_too_late"), (1, 2, None)])
def test_a_bound_of_ledgers_holds_for_the_next_one(
    town: Town, alice: Person, first: int, last: int, code: str | None
) -> None:
    coming = town.sandbox.ledger.header.sequence + 1
    bounds = LedgerBounds(coming + first - 1, coming + last - 1 if last else 0)
    builder = alice.builder().append_operation(PAYMENT).add_time_bounds(0, 0)
    builder.ledger_bounds = bounds
    envelope = builder.build()
    envelope.sign(alice.keypair)
    if code is None:
        town.applied(envelope)
    else:
        assert town.refused(envelope) == {"transaction": code}


def test_a_transaction_needs_an_operation(town: Town, alice: Person) -> None:
    assert town.refused(alice.transaction([])) == {"transaction": "tx_missing_operation"}


def test_a_fee_below_the_least_is_refused_with_the_fee_that_would_do(town: Town, alice: Person) -> None:
    told = result(town, alice.transaction([PAYMENT, PAYMENT], fee=99))
    assert told.result.code == xdr.TransactionResultCode.txINSUFFICIENT_FEE
    assert told.fee_charged.int64 == 200


def test_a_surge_asks_for_more(town: Town, alice: Person) -> None:
    town.sandbox.ledger.surge_fee = 500
    try:
        assert result(town, alice.transaction([PAYMENT], fee=499)).fee_charged.int64 == 500
        before = alice.xlm
        town.applied(alice.transaction([PAYMENT], fee=10_000))
        assert before - alice.xlm == 1 * XLM + 500, "it pays the price of the surge, not its bid"
    finally:
        town.sandbox.ledger.surge_fee = None


def test_whoever_cannot_pay_the_fee_is_refused(town: Town) -> None:
    poor = town.someone("poor", xlm=1)
    told = town.refused(poor.transaction([PAYMENT], fee=100))
    assert told == {"transaction": "tx_insufficient_balance"}


def test_fees_of_what_waits_are_not_spent_twice(town: Town, alice: Person, bob: Person) -> None:
    sponsor = town.someone("sponsor", xlm=2)
    first = sponsor.bump(alice.transaction([PAYMENT]), 6_000_000)
    second = sponsor.bump(bob.transaction([PAYMENT]), 6_000_000)
    assert town.submit(first).status == "PENDING"
    assert town.refused(second) == {"transaction": "tx_insufficient_balance"}


def test_a_wrong_or_missing_signature_is_refused(town: Town, alice: Person) -> None:
    assert town.refused(alice.transaction([PAYMENT], signers=[])) == {"transaction": "tx_bad_auth"}
    assert town.refused(alice.transaction([PAYMENT], signers=[STRANGER])) == {"transaction": "tx_bad_auth"}
    of_another = TransactionEnvelope(alice.transaction([PAYMENT]).transaction, "Another Network")
    of_another.sign(alice.keypair)
    assert town.refused(of_another.to_xdr()) == {"transaction": "tx_bad_auth"}


def test_a_signature_that_nobody_needs_is_refused(town: Town, alice: Person) -> None:
    envelope = alice.transaction([PAYMENT], signers=[alice.keypair, STRANGER])
    assert town.refused(envelope) == {"transaction": "tx_bad_auth_extra"}


def test_the_source_of_an_operation_must_sign_too(town: Town, alice: Person, bob: Person) -> None:
    payment = Payment(alice.address, Asset.native(), "1", source=bob.address)
    told = town.refused(alice.transaction([payment]))
    assert told == {"transaction": "tx_failed", "operations": ["op_bad_auth"]}
    town.applied(alice.transaction([payment], signers=[alice.keypair, bob.keypair]))


def test_an_operation_of_an_account_that_is_not_there_fails_in_the_ledger(town: Town, alice: Person) -> None:
    payment = Payment(alice.address, Asset.native(), "1", source=STRANGER.public_key)
    told = town.closed(alice.transaction([payment], signers=[alice.keypair, STRANGER]))
    assert told == {"transaction": "tx_failed", "operations": ["op_no_source_account"]}


def test_an_account_made_by_the_same_transaction_can_act_in_it(town: Town, alice: Person) -> None:
    child = keypair_of("child")
    operations = [CreateAccount(child.public_key, "10"), Payment(alice.address, Asset.native(), "1", child.public_key)]
    town.applied(alice.transaction(operations, signers=[alice.keypair, child]))


def test_a_failed_operation_takes_back_all_and_costs_the_fee_and_the_number(
    town: Town, alice: Person, bob: Person
) -> None:
    before = alice.xlm, alice.sequence, bob.xlm
    told = town.closed(alice.transaction([PAYMENT, Payment(STRANGER.public_key, Asset.native(), "1"), PAYMENT]))
    assert told == {"transaction": "tx_failed", "operations": ["op_success", "op_no_destination", "op_success"]}
    assert (alice.xlm, alice.sequence, bob.xlm) == (before[0] - 300, before[1] + 1, before[2])


def test_what_is_not_modelled_is_refused_by_name(town: Town, alice: Person) -> None:
    told = {"transaction": "tx_failed", "operations": ["op_not_supported"]}
    assert town.refused(alice.transaction([AccountMerge(STRANGER.public_key)])) == told
    claimants = [Claimant(STRANGER.public_key, ClaimPredicate.predicate_unconditional())]
    assert town.refused(alice.transaction([CreateClaimableBalance(Asset.native(), "1", claimants)])) == told
    for key in (SignerKey.pre_auth_tx(bytes(32)), SignerKey.sha256_hash(bytes(32))):
        assert town.refused(alice.transaction([SetOptions(signer=Signer(key, 1))])) == told
    aged = alice.builder().append_operation(PAYMENT).add_time_bounds(0, 0).set_min_sequence_age(5).build()
    aged.sign(alice.keypair)
    assert town.refused(aged) == {"transaction": "tx_not_supported"}


def test_soroban_data_around_a_classic_operation_is_malformed(town: Town, alice: Person) -> None:
    data = xdr.SorobanTransactionData(
        xdr.SorobanTransactionDataExt(0),
        xdr.SorobanResources(xdr.LedgerFootprint([], []), xdr.Uint32(0), xdr.Uint32(0), xdr.Uint32(0)),
        xdr.Int64(100),
    )
    builder = alice.builder().append_operation(PAYMENT).add_time_bounds(0, 0).set_soroban_data(data)
    envelope = builder.build()
    envelope.sign(alice.keypair)
    assert town.refused(envelope) == {"transaction": "tx_malformed"}


def test_the_first_kind_of_envelope_is_taken_as_well(town: Town, alice: Person, bob: Person) -> None:
    envelope = alice.pay(bob, "1")
    v1 = envelope.to_xdr_object().v1
    assert v1 is not None
    old = xdr.TransactionV0(
        alice.keypair.xdr_muxed_account().ed25519,  # type: ignore[arg-type]
        v1.tx.fee,
        v1.tx.seq_num,
        v1.tx.cond.time_bounds,
        v1.tx.memo,
        v1.tx.operations,
        xdr.TransactionV0Ext(0),
    )
    told = xdr.TransactionEnvelope(
        xdr.EnvelopeType.ENVELOPE_TYPE_TX_V0, v0=xdr.TransactionV0Envelope(old, v1.signatures)
    )
    admission = town.submit(told.to_xdr())
    assert (admission.status, admission.hash) == ("PENDING", envelope.hash_hex()), "the hash is that of the second kind"
    town.sandbox.ledger.close()
    found = town.sandbox.ledger.transaction(envelope.hash_hex())
    assert found is not None
    assert found.successful


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "AAAAAgAAAAA=", "é", "A" * 100_000])
def test_what_is_no_envelope_is_said_to_be_none(town: Town, text: str) -> None:
    assert isinstance(town.sandbox.ledger.submit(text), Undecodable)


# Weights and thresholds.


def test_weights_must_reach_the_threshold_of_the_operation(town: Town) -> None:
    shared, second, third = town.someone("shared"), Keypair.random(), Keypair.random()
    options = [SetOptions(signer=Signer.ed25519_public_key(key.public_key, 1)) for key in (second, third)]
    levels = SetOptions(master_weight=1, low_threshold=1, med_threshold=2, high_threshold=3)
    town.applied(shared.transaction([*options, levels]))
    one, two, all_three = [shared.keypair], [shared.keypair, second], [shared.keypair, second, third]
    low, medium = [BumpSequence(1)], [PAYMENT]
    high = [SetOptions(master_weight=1)]
    bad = {"transaction": "tx_failed", "operations": ["op_bad_auth"]}
    assert town.refused(shared.transaction(medium, signers=one)) == bad
    assert town.refused(shared.transaction(high, signers=two)) == bad
    for operations, signers in ((low, one), (medium, two), (high, all_three)):
        town.applied(shared.transaction(operations, signers=signers))
    town.applied(shared.transaction(medium, signers=[second, third]))
    assert town.refused(shared.transaction(medium, signers=all_three)) == {"transaction": "tx_bad_auth_extra"}


def test_a_master_key_without_weight_cannot_sign(town: Town) -> None:
    given, heir = town.someone("given"), Keypair.random()
    take_over = SetOptions(master_weight=0, signer=Signer.ed25519_public_key(heir.public_key, 1))
    town.applied(given.transaction([take_over]))
    assert town.refused(given.transaction([PAYMENT])) == {"transaction": "tx_bad_auth"}
    town.applied(given.transaction([PAYMENT], signers=[heir]))


def test_a_signer_taken_away_meanwhile_makes_what_waits_fail(town: Town, alice: Person) -> None:
    pair, other = town.someone("pair"), Keypair.random()
    town.applied(pair.transaction([SetOptions(signer=Signer.ed25519_public_key(other.public_key, 1))]))
    waiting = pair.transaction([PAYMENT], signers=[other])
    assert town.submit(waiting).status == "PENDING"
    away = SetOptions(signer=Signer.ed25519_public_key(other.public_key, 0), source=pair.address)
    assert town.submit(alice.transaction([away], signers=[alice.keypair, pair.keypair])).status == "PENDING"
    town.sandbox.ledger.close()
    found = town.sandbox.ledger.transaction(waiting.hash_hex())
    assert found is not None, "whichever of the two came first, both were taken into the ledger"


# Fee-bumps.


def test_a_fee_bump_pays_for_another_and_both_hashes_find_it(town: Town, alice: Person, bob: Person) -> None:
    before = alice.xlm, bob.xlm, alice.sequence
    inner = alice.transaction([ManageData("bumped", b"yes")])
    bumped = bob.bump(inner, 400)
    assert town.closed(bumped) == {
        "transaction": "tx_fee_bump_inner_success",
        "inner_transaction": "tx_success",
        "operations": ["op_success"],
    }
    assert (alice.xlm, bob.xlm, alice.sequence) == (before[0], before[1] - 200, before[2] + 1)
    for tx_hash in (bumped.hash_hex(), inner.hash_hex()):
        found = town.sandbox.ledger.transaction(tx_hash)
        assert found is not None
        assert (found.hash, found.inner_hash) == (bumped.hash_hex(), inner.hash_hex())
        assert (found.source, found.fee_source) == (alice.address, bob.address)


def test_a_fee_bump_is_refused_for_itself_and_for_what_is_in_it(town: Town, alice: Person, bob: Person) -> None:
    inner = alice.transaction([PAYMENT])
    assert town.refused(bob.bump(inner, 199)) == {"transaction": "tx_insufficient_fee"}
    dear = alice.transaction([PAYMENT], fee=1000)
    assert town.refused(bob.bump(dear, 1999)) == {"transaction": "tx_insufficient_fee"}, "its rate is below the inner"
    assert town.refused(bob.bump(inner, 400, signers=[])) == {"transaction": "tx_bad_auth"}
    assert town.refused(bob.bump(inner, 400, signers=[bob.keypair, STRANGER])) == {"transaction": "tx_bad_auth_extra"}
    assert town.refused(Person(town, STRANGER).bump(inner, 400)) == {"transaction": "tx_no_source_account"}
    late = alice.transaction([PAYMENT], sequence=alice.sequence - 1)
    told = {"transaction": "tx_fee_bump_inner_failed", "inner_transaction": "tx_bad_seq"}
    assert town.refused(bob.bump(late, 400)) == told
    unsigned = alice.transaction([PAYMENT], signers=[])
    assert town.refused(bob.bump(unsigned, 400)) == {**told, "inner_transaction": "tx_bad_auth"}


def test_a_failed_fee_bump_tells_of_the_operations_in_it(town: Town, alice: Person, bob: Person) -> None:
    inner = alice.transaction([Payment(STRANGER.public_key, Asset.native(), "1")])
    assert town.closed(bob.bump(inner, 400)) == {
        "transaction": "tx_fee_bump_inner_failed",
        "inner_transaction": "tx_failed",
        "operations": ["op_no_destination"],
    }
