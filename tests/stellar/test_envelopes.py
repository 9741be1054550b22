"""Envelopes: what is read, signed, bumped, and told apart from what was asked to be signed."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stellar_sdk import Account, Asset, TransactionBuilder, TransactionEnvelope

from callora.config.settings import PASSPHRASES
from callora.ledger.chain import Envelope
from callora.stellar.contracts import build
from callora.stellar.envelopes import Signer, Unreadable, bump, inclusion_fee, read, seal, signed_same
from tests.stellar.test_contracts import G1
from tests.support.nodes import OWNER, PASSPHRASE, account

ALICE: Final = account("alice")
CHANNEL: Final = account("channel")
MAX_TIME: Final = 1_800_000_300


def admission(source: str = OWNER.public_key) -> Envelope:
    """Return an unsigned call of the owner's."""
    return build(
        G1.set_allowed_depositor(ALICE.public_key),
        source=source,
        sequence=8,
        max_time=MAX_TIME,
        fee=250,
        passphrase=PASSPHRASE,
    )


def payment(v1: bool = True, **bounds: int) -> TransactionEnvelope:
    """Return an unsigned payment of Alice's."""
    builder = TransactionBuilder(Account(ALICE.public_key, 41), PASSPHRASE, base_fee=100, v1=v1)
    builder.append_payment_op(OWNER.public_key, Asset.native(), "1")
    builder.append_payment_op(OWNER.public_key, Asset.native(), "2")
    builder.add_time_bounds(bounds.get("min_time", 0), bounds.get("max_time", MAX_TIME))
    return builder.build()


def test_an_envelope_says_what_it_uses_and_until_when() -> None:
    built = payment()
    found = read(built.to_xdr(), PASSPHRASE)
    assert found == Envelope(
        xdr=built.to_xdr(),
        hash=built.hash_hex(),
        inner_hash=None,
        source=ALICE.public_key,
        sequence=42,
        max_time=MAX_TIME,
        fee=200,
    )
    assert inclusion_fee(seal(built), PASSPHRASE) == 100


def test_the_hash_belongs_to_one_network() -> None:
    text = payment().to_xdr()
    one, other = read(text, PASSPHRASE), read(text, PASSPHRASES["mainnet"])
    assert isinstance(one, Envelope)
    assert isinstance(other, Envelope)
    assert one.hash != other.hash


def test_an_envelope_of_the_first_form_is_kept_in_the_present_one() -> None:
    old, new = payment(v1=False), payment()
    found = read(old.to_xdr(), PASSPHRASE)
    assert isinstance(found, Envelope)
    assert (found.hash, found.xdr) == (new.hash_hex(), new.to_xdr())


def test_an_envelope_that_never_ends_says_so() -> None:
    found = read(payment(max_time=0).to_xdr(), PASSPHRASE)
    assert isinstance(found, Envelope)
    assert found.max_time == 0


@pytest.mark.parametrize("text", ["", "AAAA", "AAAAAg==", "x" * 200_000, "\0", "ééé", "A" * 179_999])
def test_what_is_no_envelope_is_refused(text: str) -> None:
    assert isinstance(read(text, PASSPHRASE), Unreadable)


@given(st.data())
def test_no_bytes_make_reading_raise(data: st.DataObject) -> None:
    whole = bytearray(payment().to_xdr().encode())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.sampled_from(b"AQgw/+9z="))
    read(bytes(whole[: data.draw(st.integers(0, len(whole)))]).decode(), PASSPHRASE)


def test_signing_changes_no_hash_and_signs_once() -> None:
    signer = Signer.from_seed(OWNER.secret, PASSPHRASE)
    unsigned = admission()
    signed = signer.sign(unsigned)
    assert signed.hash == unsigned.hash
    assert signed.xdr != unsigned.xdr
    assert signer.sign(signed) == signed
    both = Signer.from_seed(CHANNEL.secret, PASSPHRASE).sign(signed)
    assert len(TransactionEnvelope.from_xdr(both.xdr, PASSPHRASE).signatures) == 2
    assert OWNER.secret not in repr(signer)


def test_a_call_that_a_channel_carries_has_its_authority_as_source_of_its_operation() -> None:
    carried = TransactionEnvelope.from_xdr(admission(CHANNEL.public_key).xdr, PASSPHRASE).transaction
    (operation,) = carried.operations
    assert (carried.source.account_id, carried.sequence) == (CHANNEL.public_key, 8)
    assert operation.source is not None
    assert operation.source.account_id == OWNER.public_key
    own = TransactionEnvelope.from_xdr(admission().xdr, PASSPHRASE).transaction
    assert own.operations[0].source is None


def test_a_bump_has_a_hash_of_its_own_and_keeps_the_inner_one() -> None:
    inner = Signer.from_seed(OWNER.secret, PASSPHRASE).sign(admission())
    payer = Signer.from_seed(CHANNEL.secret, PASSPHRASE)
    outer = bump(inner, payer, 2500)
    assert outer.inner_hash == inner.hash
    assert outer.hash != inner.hash
    assert (outer.source, outer.sequence, outer.max_time) == (OWNER.public_key, 8, MAX_TIME)
    assert outer.fee == 2 * 2500
    assert inclusion_fee(outer, PASSPHRASE) == 2500
    found = read(outer.xdr, PASSPHRASE)
    assert found == outer
    assert payer.sign(outer) == outer


def test_what_a_wallet_signed_is_taken_only_if_it_is_what_was_prepared() -> None:
    prepared = seal(payment())

    def signed(envelope: TransactionEnvelope, *keys: object) -> str:
        for key in keys:
            envelope.sign(key)  # type: ignore[arg-type]
        return envelope.to_xdr()

    taken = signed_same(prepared, signed(payment(), ALICE), PASSPHRASE)
    assert isinstance(taken, Envelope)
    assert taken.hash == prepared.hash
    assert isinstance(signed_same(prepared, signed(payment(v1=False), ALICE), PASSPHRASE), Envelope)
    assert isinstance(signed_same(prepared, signed(payment(), CHANNEL), PASSPHRASE), Envelope), (
        "a signer of the account"
    )

    forged = payment()
    forged.sign(ALICE)
    forged.signatures[0].signature = bytes(64)
    bumped = bump(
        seal(TransactionEnvelope.from_xdr(taken.xdr, PASSPHRASE)), Signer.from_seed(CHANNEL.secret, PASSPHRASE), 100
    )
    for wrong, says in (
        (payment().to_xdr(), "not signed"),
        (signed(payment(max_time=MAX_TIME + 1), ALICE), "another transaction"),
        (forged.to_xdr(), "not valid"),
        (bumped.xdr, "fee-bump"),
        ("AAAA", "no transaction envelope"),
    ):
        refused = signed_same(prepared, wrong, PASSPHRASE)
        assert isinstance(refused, Unreadable), says
        assert says in refused.reason
