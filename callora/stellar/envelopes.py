"""Transaction envelopes: read, signed, wrapped in a fee-bump, and compared with what was asked to be signed."""

import binascii
from typing import Final

import attrs
from stellar_sdk import Keypair, TransactionBuilder, TransactionEnvelope
from stellar_sdk.exceptions import SdkError
from stellar_sdk.fee_bump_transaction_envelope import FeeBumpTransactionEnvelope

from callora.ledger.chain import Envelope

XDR_CHARS_MAX: Final = 180_000
"""In base64; a network takes transactions of 132 096 bytes at most."""

FOREIGN: Final = (
    SdkError,
    ValueError,  # pydantic's and base64's among them
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    RecursionError,
    OverflowError,
)
"""What the SDK raises for bytes and replies that it cannot read: it has no one exception for that."""


@attrs.frozen
class Unreadable:
    """These are no envelope that Callora takes."""

    reason: str
    """What is wrong, for whoever sent it."""


def seal(envelope: TransactionEnvelope | FeeBumpTransactionEnvelope) -> Envelope:
    """Return the SDK's envelope as it is stored and sent."""
    if isinstance(envelope, FeeBumpTransactionEnvelope):
        inner = envelope.transaction.inner_transaction_envelope
        outer, fee = envelope.hash_hex(), envelope.transaction.fee
    else:
        inner, outer, fee = envelope.to_transaction_envelope_v1(), envelope.hash_hex(), envelope.transaction.fee
        envelope = inner
    transaction = inner.transaction
    bounds = None if transaction.preconditions is None else transaction.preconditions.time_bounds
    return Envelope(
        xdr=envelope.to_xdr(),
        hash=outer,
        inner_hash=None if envelope is inner else inner.hash_hex(),
        source=transaction.source.account_id,
        sequence=transaction.sequence,
        max_time=0 if bounds is None else bounds.max_time,
        fee=fee,
    )


def unseal(envelope: Envelope, passphrase: str) -> TransactionEnvelope | FeeBumpTransactionEnvelope:
    """Return a stored envelope as the SDK has it.

    Raises:
        Exception: one of FOREIGN; what Callora stored does not raise.
    """
    return TransactionBuilder.from_xdr(envelope.xdr, passphrase)


def read(text: str, passphrase: str) -> Envelope | Unreadable:
    """Return the envelope that somebody sent.

    Args:
        text: base64 XDR, from anyone.
        passphrase: of the network it is for; it is part of the hash.
    """
    if len(text) > XDR_CHARS_MAX:
        return Unreadable("It is longer than any transaction")
    try:
        sealed = seal(TransactionBuilder.from_xdr("".join(text.split()), passphrase))
    except (*FOREIGN, binascii.Error):
        return Unreadable("It is no transaction envelope in base64 XDR")
    return sealed


@attrs.frozen
class Signer:
    """A key that signs on one network."""

    _keypair: Keypair = attrs.field(repr=False)
    passphrase: str
    """The network's, which is part of what is signed."""

    @classmethod
    def from_seed(cls, seed: str, passphrase: str) -> "Signer":
        """Return the signer of a seed.

        Args:
            seed: `S…`, well-formed with the right checksum.
        """
        return cls(Keypair.from_secret(seed), passphrase)

    @property
    def address(self) -> str:
        """Its account, `G…`."""
        return self._keypair.public_key

    def sign(self, envelope: Envelope) -> Envelope:
        """Return the envelope with this signature as well; unchanged where it has it already. The hash stays."""
        opened = unseal(envelope, self.passphrase)
        signature = self._keypair.sign_decorated(opened.hash())
        if signature in opened.signatures:
            return envelope
        opened.signatures.append(signature)
        return seal(opened)


def bump(envelope: Envelope, signer: Signer, fee: int) -> Envelope:
    """Return a signed fee-bump around a signed transaction: who pays its fee, and more of it.

    Args:
        envelope: signed, and no fee-bump itself; its own fee is not charged then.
        signer: the account that pays.
        fee: stroops an operation, of which a fee-bump counts one more than its transaction; no less than the
            transaction itself bids. The resource fee of a contract call comes besides.
            A queued transaction gives way to at least ten times its own bid.
    """
    inner = TransactionEnvelope.from_xdr(envelope.xdr, signer.passphrase)
    outer = TransactionBuilder.build_fee_bump_transaction(signer.address, fee, inner, signer.passphrase)
    outer.sign(signer._keypair)
    return seal(outer)


def unwrap(envelope: Envelope, passphrase: str) -> Envelope:
    """Return the signed transaction inside a fee-bump; of any other envelope, itself."""
    opened = unseal(envelope, passphrase)
    if not isinstance(opened, FeeBumpTransactionEnvelope):
        return envelope
    return seal(opened.transaction.inner_transaction_envelope)


def inclusion_fee(envelope: Envelope, passphrase: str) -> int:
    """Return what a transaction bids for its inclusion, stroops an operation: its fee without the resource fee."""
    opened = unseal(envelope, passphrase)
    if isinstance(opened, FeeBumpTransactionEnvelope):
        transaction, operations = opened.transaction.inner_transaction_envelope.transaction, 1
    else:
        transaction, operations = opened.transaction, 0
    resources = 0 if transaction.soroban_data is None else transaction.soroban_data.resource_fee.int64
    return -(-(envelope.fee - resources) // (operations + len(transaction.operations)))


def signed_same(prepared: Envelope, signed: str, passphrase: str) -> Envelope | Unreadable:
    """Return what a wallet made of a transaction that it was asked to sign, if it is exactly that transaction.

    Args:
        prepared: what was handed out.
        signed: base64 XDR, from anyone. Its signatures may be others than the source's own key's, whose account then
            decides; but one that claims to be that key's must be.
    """
    sealed = read(signed, passphrase)
    if isinstance(sealed, Unreadable):
        return sealed
    if sealed.inner_hash is not None:
        return Unreadable("It is a fee-bump; the prepared transaction itself must be signed")
    if sealed.hash != prepared.hash:
        return Unreadable("It is another transaction than the one that was prepared")
    opened = unseal(sealed, passphrase)
    if not opened.signatures:
        return Unreadable("It is not signed")
    own = Keypair.from_public_key(prepared.source)
    for each in opened.signatures:
        if each.signature_hint == own.signature_hint():
            try:
                own.verify(opened.hash(), each.signature)
            except FOREIGN:
                return Unreadable("The signature of the source account is not valid")
    return sealed
