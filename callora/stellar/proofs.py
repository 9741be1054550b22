"""Proofs that someone holds a wallet: what a SEP-10 challenge proves, and messages signed by SEP-53.

Both prove that the account's master key signed, and no more. The account itself is not looked up, so signers that were
added to it cannot log in, and a master key whose weight was taken away still can: docs/decisions, "Logging in with a
wallet". Everything is computed at once, in a few milliseconds at most, without I/O.
"""

import base64
import binascii
import hashlib
import re
from datetime import datetime
from typing import Final

import attrs
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from callora.ledger.wallets import is_address, public_key

_SIGNATURE_BYTES: Final = 64
_HEX: Final = re.compile(r"[0-9a-fA-F]{128}", re.ASCII)
_PREFIX: Final = b"Stellar Signed Message:\n"


@attrs.frozen
class Proof:
    """A challenge that its wallet has signed."""

    address: str
    """The wallet, `G…`."""
    challenge_hash: bytes
    """The transaction's own hash, 32 bytes: the same however it was encoded and whatever signatures it carries."""
    expires_at: datetime
    """From when on the challenge proves nothing any more."""


@attrs.frozen
class ProofRefused:
    """The transaction proves nothing."""

    reason: str
    """What is wrong with it, for the client."""


def signed_message(address: str, message: str, signature: str) -> bool:
    """Tell whether the wallet signed the message, by SEP-53: its prefix and the text in UTF-8, SHA-256, ed25519.

    Args:
        address: `G…`; one that is no address has signed nothing.
        signature: 64 bytes in base64, as wallets give it, or in hexadecimal digits.
    """
    if not is_address(address):
        return False
    try:
        raw = bytes.fromhex(signature) if _HEX.fullmatch(signature) else base64.b64decode(signature, validate=True)
        if len(raw) != _SIGNATURE_BYTES:
            return False
        VerifyKey(public_key(address)).verify(hashlib.sha256(_PREFIX + message.encode()).digest(), raw)
    except (BadSignatureError, binascii.Error, ValueError):  # ValueError: a text that is not ASCII, or not UTF-8
        return False
    return True
