"""The classic operations: every result code that the sandbox models, by an operation that gets it."""

from typing import Any

import pytest
from stellar_sdk import (
    Asset,
    AuthorizationFlag,
    BumpSequence,
    ChangeTrust,
    CreateAccount,
    Keypair,
    ManageData,
    Payment,
    SetOptions,
    SetTrustLineFlags,
    Signer,
    TrustLineFlags,
    xdr,
)
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.accounts import changed, put_account
from callora.stellar.sandbox.genesis import keypair_of
from callora.stellar.sandbox.state import Overlay
from tests.support.sandbox import XLM, Person, Town, codes, make_town

STRANGER = keypair_of("stranger").public_key


@pytest.fixture(scope="module")
def town() -> Town:
    return make_town()


@pytest.fixture(scope="module")
def alice(town: Town) -> Person:
    person = town.someone("alice")
    person.trust(town.usdc, "1000")
    return person


@pytest.fixture(scope="module")
def bob(town: Town) -> Person:
    person = town.someone("bob")
    person.trust(town.usdc)
    return person


def outcome(person: Person, *operations: Operation) -> Any:
    """Return the code of the last of some operations, whether it was refused at once or failed in a ledger."""
    envelope = person.transaction(operations)
    admission = person.town.submit(envelope)
    told = person.town.refused(envelope) if admission.status == "ERROR" else None
    if told is None:
        person.town.sandbox.ledger.close()
        found = person.town.sandbox.ledger.transaction(envelope.hash_hex())
        assert found is not None
        told = codes(found.result)
    return told["operations"][-1]


def raw(body: xdr.OperationBody) -> Operation:
    """Return an operation that the SDK would not build."""

    class _Raw(Operation):
        _XDR_OPERATION_TYPE = body.type

        def _to_operation_body(self) -> xdr.OperationBody:
            return body

        @classmethod
        def from_xdr_object(cls, xdr_object: xdr.Operation) -> "Operation":
            raise NotImplementedError

    return _Raw()


def forced(town: Town, account: xdr.AccountEntry) -> None:
    """Put an account as it would take many ledgers to become."""
    overlay = Overlay(town.sandbox.ledger.state, town.sandbox.ledger.header.sequence)
    put_account(overlay, account)
    overlay.commit()


class TestPayment:
    def test_native(self, alice: Person, bob: Person) -> None:
        assert outcome(alice, Payment(bob.address, Asset.native(), "1")) == "op_success"
        assert outcome(alice, Payment(alice.address, Asset.native(), "999999")) == "op_success", "to oneself: nothing"

    def test_issued_held_and_given_back(self, town: Town, alice: Person, bob: Person) -> None:
        usdc, before = town.usdc, (alice.has(town.usdc) or 0, bob.has(town.usdc) or 0)
        assert outcome(town.issuer, Payment(alice.address, usdc, "100")) == "op_success"
        assert outcome(alice, Payment(bob.address, usdc, "30")) == "op_success"
        assert outcome(bob, Payment(town.issuer.address, usdc, "10")) == "op_success"
        assert (alice.has(usdc), bob.has(usdc)) == (before[0] + 70 * XLM, before[1] + 20 * XLM)

    def test_malformed(self, alice: Person, bob: Person) -> None:
        for amount in (0, -1):
            payment = xdr.PaymentOp(bob.keypair.xdr_muxed_account(), Asset.native().to_xdr_object(), xdr.Int64(amount))
            assert (
                outcome(alice, raw(xdr.OperationBody(xdr.OperationType.PAYMENT, payment_op=payment))) == "op_malformed"
            )
        for code in (b"\0\0\0\0", b"US C", b"\xff\0\0\0"):
            issuer = bob.keypair.xdr_account_id()
            asset = xdr.Asset(
                xdr.AssetType.ASSET_TYPE_CREDIT_ALPHANUM4, alpha_num4=xdr.AlphaNum4(xdr.AssetCode4(code), issuer)
            )
            payment = xdr.PaymentOp(bob.keypair.xdr_muxed_account(), asset, xdr.Int64(1))
            assert (
                outcome(alice, raw(xdr.OperationBody(xdr.OperationType.PAYMENT, payment_op=payment))) == "op_malformed"
            )

    def test_underfunded(self, town: Town, alice: Person, bob: Person) -> None:
        assert outcome(alice, Payment(bob.address, Asset.native(), "100000")) == "op_underfunded"
        assert outcome(alice, Payment(bob.address, town.usdc, "999")) == "op_underfunded"

    def test_underfunded_below_the_reserve(self, town: Town, bob: Person) -> None:
        keeper = town.someone("keeper", xlm=10)
        left = (keeper.xlm - 2 * 5_000_000 - 100) // XLM
        assert outcome(keeper, Payment(bob.address, Asset.native(), str(left + 1))) == "op_underfunded"

    def test_src_no_trust(self, town: Town, bob: Person) -> None:
        assert outcome(town.someone("lineless"), Payment(bob.address, town.usdc, "1")) == "op_src_no_trust"

    def test_no_destination(self, alice: Person) -> None:
        assert outcome(alice, Payment(STRANGER, Asset.native(), "1")) == "op_no_destination"

    def test_no_trust(self, town: Town, alice: Person) -> None:
        other = town.someone("untrusting")
        assert outcome(alice, Payment(other.address, town.usdc, "1")) == "op_no_trust"

    def test_line_full(self, town: Town, alice: Person) -> None:
        assert outcome(town.issuer, Payment(alice.address, town.usdc, "1000.0000001")) == "op_line_full"

    def test_line_full_of_xlm(self, town: Town, alice: Person) -> None:
        rich = town.someone("rich")
        forced(town, changed(rich.entry, balance=xdr.Int64(2**63 - 2)))
        assert outcome(alice, Payment(rich.address, Asset.native(), "1")) == "op_line_full"
        forced(town, changed(rich.entry, balance=xdr.Int64(0)))

    def test_not_authorized_and_src_not_authorized(self, town: Town, bob: Person) -> None:
        strict, held = town.someone("strict"), town.someone("held")
        asset = Asset("STRICT", strict.address)
        flags = AuthorizationFlag.AUTHORIZATION_REQUIRED | AuthorizationFlag.AUTHORIZATION_REVOCABLE
        assert outcome(strict, SetOptions(set_flags=flags)) == "op_success"
        held.trust(asset)
        assert outcome(strict, Payment(held.address, asset, "5")) == "op_not_authorized"
        allow = SetTrustLineFlags(held.address, asset, set_flags=TrustLineFlags.AUTHORIZED_FLAG)
        assert outcome(strict, allow) == "op_success"
        assert outcome(strict, Payment(held.address, asset, "5")) == "op_success"
        forbid = SetTrustLineFlags(held.address, asset, clear_flags=TrustLineFlags.AUTHORIZED_FLAG)
        assert outcome(strict, forbid) == "op_success"
        assert outcome(held, Payment(strict.address, asset, "1")) == "op_src_not_authorized"


class TestCreateAccount:
    def test_success(self, town: Town, alice: Person) -> None:
        new = Person(town, Keypair.random())
        assert outcome(alice, CreateAccount(new.address, "2")) == "op_success"
        assert (new.xlm, new.sequence) == (2 * XLM, town.sandbox.ledger.header.sequence << 32)

    def test_malformed(self, alice: Person) -> None:
        assert outcome(alice, CreateAccount(alice.address, "5")) == "op_malformed"

    def test_already_exists(self, alice: Person, bob: Person) -> None:
        assert outcome(alice, CreateAccount(bob.address, "5")) == "op_already_exists"

    def test_low_reserve(self, alice: Person) -> None:
        assert outcome(alice, CreateAccount(STRANGER, "0.9999999")) == "op_low_reserve"

    def test_underfunded(self, alice: Person) -> None:
        assert outcome(alice, CreateAccount(STRANGER, "100000")) == "op_underfunded"


class TestChangeTrust:
    def test_made_changed_and_removed(self, town: Town) -> None:
        person = town.someone("truster")
        for limit, entries in (("5", 1), ("7", 1), ("0", 0)):
            assert outcome(person, ChangeTrust(town.usdc, limit)) == "op_success"
            assert person.entry.num_sub_entries.uint32 == entries
        assert person.has(town.usdc) is None

    def test_malformed(self, town: Town, alice: Person) -> None:
        assert outcome(alice, ChangeTrust(Asset.native(), "5")) == "op_malformed"
        assert outcome(town.issuer, ChangeTrust(town.usdc, "5")) == "op_malformed", "an issuer needs no line"

    def test_no_issuer(self, alice: Person) -> None:
        assert outcome(alice, ChangeTrust(Asset("USDC", STRANGER), "5")) == "op_no_issuer"

    def test_invalid_limit(self, town: Town) -> None:
        person = town.someone("limited")
        assert outcome(person, ChangeTrust(town.usdc, "0")) == "op_invalid_limit", "there is nothing to remove"
        person.trust(town.usdc)
        assert outcome(town.issuer, Payment(person.address, town.usdc, "5")) == "op_success"
        assert outcome(person, ChangeTrust(town.usdc, "4")) == "op_invalid_limit"
        assert outcome(person, ChangeTrust(town.usdc, "0")) == "op_invalid_limit"

    def test_low_reserve(self, town: Town) -> None:
        tight = town.someone("tight truster", xlm=2)
        forced(town, changed(tight.entry, num_sub_entries=xdr.Uint32(1)))
        assert outcome(tight, ChangeTrust(town.usdc)) == "op_low_reserve"

    def test_too_many_subentries(self, town: Town, alice: Person) -> None:
        full = town.someone("full")
        forced(town, changed(full.entry, num_sub_entries=xdr.Uint32(1000)))
        assert outcome(full, ChangeTrust(town.usdc)) == "op_too_many_subentries"


class TestSetOptions:
    def test_success(self, town: Town) -> None:
        person = town.someone("optional")
        done = SetOptions(home_domain="callora.test", low_threshold=1, inflation_dest=person.address)
        assert outcome(person, done) == "op_success"
        assert person.entry.home_domain.string32 == b"callora.test"

    def test_low_reserve_and_too_many_signers(self, town: Town) -> None:
        def signer() -> Operation:
            return SetOptions(signer=Signer.ed25519_public_key(Keypair.random().public_key, 1))

        person = town.someone("signed")
        assert outcome(person, *(signer() for _ in range(20))) == "op_success"
        assert outcome(person, signer()) == "op_too_many_signers"
        tight = town.someone("tight signer", xlm=2)
        forced(town, changed(tight.entry, num_sub_entries=xdr.Uint32(1)))
        assert outcome(tight, signer()) == "op_low_reserve"

    def test_flags(self, town: Town, alice: Person) -> None:
        set_and_clear = SetOptions(
            set_flags=AuthorizationFlag.AUTHORIZATION_REQUIRED, clear_flags=AuthorizationFlag.AUTHORIZATION_REQUIRED
        )
        assert outcome(alice, set_and_clear) == "op_bad_flags"
        assert outcome(alice, SetOptions(set_flags=AuthorizationFlag(16))) == "op_unknown_flag"
        clawback = SetOptions(set_flags=AuthorizationFlag.AUTHORIZATION_CLAWBACK_ENABLED)
        assert outcome(alice, clawback) == "op_auth_revocable_required"
        fixed = town.someone("fixed")
        assert outcome(fixed, SetOptions(set_flags=AuthorizationFlag.AUTHORIZATION_IMMUTABLE)) == "op_success"
        assert outcome(fixed, SetOptions(set_flags=AuthorizationFlag.AUTHORIZATION_REQUIRED)) == "op_cant_change"

    def test_invalid_inflation(self, alice: Person) -> None:
        assert outcome(alice, SetOptions(inflation_dest=STRANGER)) == "op_invalid_inflation"

    def test_threshold_out_of_range(self, alice: Person) -> None:
        assert outcome(alice, SetOptions(med_threshold=256)) == "op_threshold_out_of_range"

    def test_bad_signer(self, alice: Person) -> None:
        assert outcome(alice, SetOptions(signer=Signer.ed25519_public_key(alice.address, 1))) == "op_bad_signer"
        assert outcome(alice, SetOptions(signer=Signer.ed25519_public_key(STRANGER, 256))) == "op_bad_signer"

    def test_invalid_home_domain(self, alice: Person) -> None:
        assert outcome(alice, SetOptions(home_domain="a\tb")) == "op_invalid_home_domain"


class TestManageData:
    def test_made_changed_and_removed(self, town: Town) -> None:
        person = town.someone("noter")
        for value, entries in ((b"1", 1), (b"2", 1), (None, 0)):
            assert outcome(person, ManageData("note", value)) == "op_success"
            assert person.entry.num_sub_entries.uint32 == entries

    def test_name_not_found(self, alice: Person) -> None:
        assert outcome(alice, ManageData("nothing", None)) == "op_data_name_not_found"

    def test_low_reserve(self, town: Town) -> None:
        tight = town.someone("tight noter", xlm=2)
        forced(town, changed(tight.entry, num_sub_entries=xdr.Uint32(1)))
        assert outcome(tight, ManageData("note", b"1")) == "op_low_reserve"

    def test_invalid_name(self, alice: Person) -> None:
        assert outcome(alice, ManageData("", b"1")) == "op_data_invalid_name"


class TestBumpSequence:
    def test_success(self, alice: Person) -> None:
        target = alice.sequence + 100
        assert outcome(alice, BumpSequence(target)) == "op_success"
        assert alice.sequence == target
        assert outcome(alice, BumpSequence(5)) == "op_success", "it never goes back"
        assert alice.sequence == target + 1

    def test_bad_seq(self, alice: Person) -> None:
        bump = xdr.BumpSequenceOp(xdr.SequenceNumber(xdr.Int64(-1)))
        told = outcome(alice, raw(xdr.OperationBody(xdr.OperationType.BUMP_SEQUENCE, bump_sequence_op=bump)))
        assert told == "op_bad_seq"


class TestSetTrustLineFlags:
    def test_malformed(self, town: Town, alice: Person, bob: Person) -> None:
        authorized = TrustLineFlags.AUTHORIZED_FLAG
        assert outcome(alice, SetTrustLineFlags(bob.address, town.usdc, set_flags=authorized)) == "op_malformed"
        assert (
            outcome(town.issuer, SetTrustLineFlags(town.issuer.address, town.usdc, set_flags=authorized))
            == "op_malformed"
        )

    def test_no_trust_line(self, town: Town) -> None:
        lineless = town.someone("no line")
        flags = SetTrustLineFlags(lineless.address, town.usdc, set_flags=TrustLineFlags.AUTHORIZED_FLAG)
        assert outcome(town.issuer, flags) == "op_no_trust_line"

    def test_cant_revoke(self, town: Town, bob: Person) -> None:
        flags = SetTrustLineFlags(bob.address, town.usdc, clear_flags=TrustLineFlags.AUTHORIZED_FLAG)
        assert outcome(town.issuer, flags) == "op_cant_revoke"

    def test_invalid_state(self, town: Town, bob: Person) -> None:
        maintain = TrustLineFlags.AUTHORIZED_TO_MAINTAIN_LIABILITIES_FLAG
        assert outcome(town.issuer, SetTrustLineFlags(bob.address, town.usdc, set_flags=maintain)) == "op_invalid_state"
