"""API keys: their form, their checksum, and what a key may do.

`ck_live_` or `ck_test_` and 48 lower-case hex digits, of which the last 8 are the CRC-32 of everything before them: a
mistyped key is refused without I/O, and a secret scanner can tell a key from noise. Only the prefix (16 characters)
and the SHA-256 of the whole are ever stored.
"""

import hashlib
import re
import zlib
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from typing import Final

import attrs

from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, TokenId, UserId, VaultId
from callora.ledger.vault import Standing

PREFIX_CHARS: Final = 16
KEY_CHARS: Final = 56
RANDOM_BYTES: Final = 20
_FAMILY_CHARS: Final = 8
_FORM: Final = re.compile(rb"ck_(?:live|test)_[0-9a-f]{48}")


def make_key(network: str, noise: bytes) -> str:
    """Return a new key for a vault on `network` (mainnet: live, testnet: test) from RANDOM_BYTES random bytes."""
    assert len(noise) == RANDOM_BYTES
    body = f"ck_{'live' if network == 'mainnet' else 'test'}_{noise.hex()}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def is_well_formed(key: bytes) -> bool:
    """Tell whether these bytes have a key's form and a fitting checksum; says nothing about whether it exists."""
    return _FORM.fullmatch(key) is not None and int(key[-8:], 16) == zlib.crc32(key[:-8])


def mask_key(prefix: str, last4: str) -> str:
    """Return how a key is shown after its making: `ck_live_…` and its last four characters."""
    return f"{prefix[:_FAMILY_CHARS]}…{last4}"


def hash_key(key: bytes) -> bytes:
    """Return the SHA-256 under which a key is stored. A key has 160 random bits, so a slow hash would add nothing."""
    return hashlib.sha256(key).digest()


@attrs.frozen(slots=True)
class KeyRecord:
    """An API key as the gateway knows it. None in a narrowing field means not narrowed."""

    api_key_id: ApiKeyId
    user_id: UserId
    vault_id: VaultId
    key_hash: bytes
    scopes: frozenset[str]
    """`*` is every scope."""
    allowed_apis: frozenset[ApiId] | None
    allowed_endpoints: frozenset[EndpointId] | None
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] | None
    rate_limit_per_minute: int | None
    """The key's own rate, else its plan's."""
    disabled: bool
    expires_at: datetime | None
    revoked_at: datetime | None
    standing: Standing
    """The standing of the key's vault."""
    plan_apis: frozenset[ApiId] | None = None
    """What the plan of the key's vault gives access to."""
    budget: TokenId | None = None
    """The access token that was presented for the key, where it has a budget that calls are taken from."""

    @property
    def usable_apis(self) -> frozenset[ApiId] | None:
        """What both the key and its plan allow."""
        if self.allowed_apis is None or self.plan_apis is None:
            return self.plan_apis if self.allowed_apis is None else self.allowed_apis
        return self.allowed_apis & self.plan_apis
