"""The contracts of the sandbox, and which executable is which.

A contract's "code" on the ledger is a WebAssembly module without functions that names the class: real enough to be
uploaded, hashed and referred to, and nothing any other network would run.
"""

import hashlib
from typing import Final

from stellar_sdk import xdr

from callora.stellar.sandbox.soroban.contracts.settlement import Settlement, SettlementG2
from callora.stellar.sandbox.soroban.contracts.token import Token
from callora.stellar.sandbox.soroban.contracts.vault import Vault
from callora.stellar.sandbox.soroban.contracts.vault_g2 import VaultG2
from callora.stellar.sandbox.soroban.host import Contract

_SECTION: Final = b"callora-sandbox"


def _module(name: str) -> bytes:
    """Return a WebAssembly module with nothing but a custom section that has the name."""
    payload = bytes([len(_SECTION)]) + _SECTION + name.encode()
    return b"\0asm\x01\0\0\0" + bytes([0, len(payload)]) + payload


CODE: Final[dict[type[Contract], bytes]] = {
    Vault: _module("callora-vault-g1"),
    VaultG2: _module("callora-vault-g2"),
    Settlement: _module("callora-settlement-g1"),
    SettlementG2: _module("callora-settlement-g2"),
}
"""What to upload for each contract that has code."""
_BY_HASH: Final = {hashlib.sha256(code).digest(): made for made, code in CODE.items()}
ASSET_EXECUTABLE: Final = xdr.ContractExecutable(xdr.ContractExecutableType.CONTRACT_EXECUTABLE_STELLAR_ASSET)


def wasm_hash(made: type[Contract]) -> bytes:
    """Return the hash by which a contract's code is known, 32 bytes."""
    return hashlib.sha256(CODE[made]).digest()


def is_known(code: bytes) -> bool:
    """Tell whether the sandbox can run a module."""
    return hashlib.sha256(code).digest() in _BY_HASH


def executable_of(made: type[Contract]) -> xdr.ContractExecutable:
    """Return what a contract's entry says that it runs."""
    kind = xdr.ContractExecutableType.CONTRACT_EXECUTABLE_WASM
    return xdr.ContractExecutable(kind, wasm_hash=xdr.Hash(wasm_hash(made)))


def model_of(executable: xdr.ContractExecutable) -> type[Contract] | None:
    """Return the class that an executable is; None where the sandbox has none."""
    if executable.type == xdr.ContractExecutableType.CONTRACT_EXECUTABLE_STELLAR_ASSET:
        return Token
    return _BY_HASH.get(executable.wasm_hash.hash) if executable.wasm_hash is not None else None
