"""How Stellar writes keys: addresses (`G…`), seeds (`S…`) and contracts (`C…`). Form only; what they sign is not known
here.

Source: SEP-23, strkey: a version byte, 32 bytes and their CRC-16, in base32.
"""

import base64
import binascii
import re
from typing import Final

ADDRESS_PATTERN: Final = "^G[A-Z2-7]{55}$"
KEY_BYTES: Final = 32
_ADDRESS_VERSION: Final = 6 << 3
_SEED_VERSION: Final = 18 << 3
_CONTRACT_VERSION: Final = 2 << 3
_TEXT: Final = re.compile(r"[CGS][A-Z2-7]{55}", re.ASCII)


def is_address(text: str) -> bool:
    """Tell whether this is the address of an account: well-formed, with the right checksum."""
    return _version(text) == _ADDRESS_VERSION


def is_seed(text: str) -> bool:
    """Tell whether this is a secret seed: well-formed, with the right checksum."""
    return _version(text) == _SEED_VERSION


def is_contract(text: str) -> bool:
    """Tell whether this is the address of a contract: well-formed, with the right checksum."""
    return _version(text) == _CONTRACT_VERSION


def public_key(address: str) -> bytes:
    """Return the ed25519 key of an address, 32 bytes.

    Args:
        address: for which `is_address` holds.
    """
    assert is_address(address)
    return base64.b32decode(address)[1:-2]


def make_seed(random_bytes: bytes) -> str:
    """Return the seed of these 32 bytes."""
    assert len(random_bytes) == KEY_BYTES
    payload = bytes([_SEED_VERSION]) + random_bytes
    return base64.b32encode(payload + _checksum(payload)).decode()


def _version(text: str) -> int | None:
    if _TEXT.fullmatch(text) is None:
        return None
    decoded = base64.b32decode(text)
    return decoded[0] if _checksum(decoded[:-2]) == decoded[-2:] else None


def _checksum(payload: bytes) -> bytes:
    return binascii.crc_hqx(payload, 0).to_bytes(2, "little")
