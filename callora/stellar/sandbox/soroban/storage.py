"""Entries as one contract call sees them: within its footprint, alive, and with what it used of the ledger.

Two ways: `Storage.enforced` refuses what the transaction did not declare, as when it is applied; `Storage.recording`
writes down what is touched, as when it is simulated.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Final

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.soroban import limits as fees
from callora.stellar.sandbox.soroban.faults import HostError
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.values import sc_address
from callora.stellar.sandbox.state import Entry, Overlay, key_bytes

PERSISTENT: Final = xdr.ContractDataDurability.PERSISTENT
TEMPORARY: Final = xdr.ContractDataDurability.TEMPORARY
INSTANCE_KEY: Final = xdr.SCVal(xdr.SCValType.SCV_LEDGER_KEY_CONTRACT_INSTANCE)
_INSTANCE_KEY_BYTES: Final = INSTANCE_KEY.to_xdr_bytes()
_DATA: Final = xdr.LedgerEntryType.CONTRACT_DATA
_CODE: Final = xdr.LedgerEntryType.CONTRACT_CODE
_CLASSIC: Final = (xdr.LedgerEntryType.ACCOUNT, xdr.LedgerEntryType.TRUSTLINE)


def data_ledger_key(contract: str, key: bytes, durability: xdr.ContractDataDurability) -> bytes:
    """Return the key of an entry of a contract.

    Args:
        contract: `C…`, or for a nonce whoever signs, `G…`.
        key: the contract's own key, XDR of an SCVal.
    """
    return _kind_bytes(_DATA) + _address_bytes(contract) + key + durability.value.to_bytes(4, "big")


@functools.lru_cache(maxsize=4096)
def _address_bytes(address: str) -> bytes:
    return sc_address(address).to_xdr_bytes()


def _kind_bytes(kind: xdr.LedgerEntryType) -> bytes:
    return kind.value.to_bytes(4, "big")


def instance_ledger_key(contract: str) -> bytes:
    """Return the key of a contract itself."""
    return data_ledger_key(contract, _INSTANCE_KEY_BYTES, PERSISTENT)


def code_ledger_key(wasm_hash: bytes) -> bytes:
    """Return the key of a contract's code."""
    return _kind_bytes(_CODE) + wasm_hash


def kind_of(key: bytes) -> xdr.LedgerEntryType:
    """Return what kind of entry a key is of."""
    return xdr.LedgerEntryType(int.from_bytes(key[:4], "big"))


def is_temporary(key: bytes) -> bool:
    """Tell whether an entry is gone, not archived, when its life ends."""
    return kind_of(key) == _DATA and int.from_bytes(key[-4:], "big") == TEMPORARY


def has_life(key: bytes) -> bool:
    """Tell whether an entry pays rent: contract data and code do."""
    return kind_of(key) in (_DATA, _CODE)


def is_archived(key: bytes, entry: Entry, sequence: int) -> bool:
    """Tell whether an entry is there, but cannot be used before it is restored."""
    return entry.live_until is not None and entry.live_until < sequence and not is_temporary(key)


@attrs.frozen
class Footprint:
    """The keys that a transaction declares."""

    read: tuple[bytes, ...]
    """Only read."""
    written: tuple[bytes, ...]
    """Read and written, in the order that `archivedSorobanEntries` refers to."""

    @classmethod
    def of(cls, footprint: xdr.LedgerFootprint) -> "Footprint":
        """Return the keys of a transaction."""
        return cls(tuple(map(key_bytes, footprint.read_only)), tuple(map(key_bytes, footprint.read_write)))

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All of them."""
        return (*self.read, *self.written)


class Storage:
    """The entries of one operation."""

    def __init__(
        self,
        overlay: Overlay,
        limits: Limits,
        sequence: int,
        *,
        footprint: tuple[frozenset[bytes], frozenset[bytes]] | None,
    ) -> None:
        """Make one; see `enforced` and `recording`."""
        self.overlay = overlay
        self.limits = limits
        self.sequence = sequence
        self._declared = footprint
        self._touched: dict[bytes, bool] = {}
        """Of a recording: in order, whether also written."""
        self.restored: dict[bytes, None] = {}
        """Archived entries that this operation brought back."""

    @classmethod
    def enforced(
        cls,
        overlay: Overlay,
        limits: Limits,
        sequence: int,
        footprint: Footprint,
    ) -> "Storage":
        """Return a storage that refuses what is not in the footprint.

        Args:
            sequence: the ledger being made.
        """
        declared = frozenset(footprint.read), frozenset(footprint.written)
        return cls(overlay, limits, sequence, footprint=declared)

    @classmethod
    def recording(cls, overlay: Overlay, limits: Limits, sequence: int) -> "Storage":
        """Return a storage that lets everything be touched, and brings back what is archived."""
        return cls(overlay, limits, sequence, footprint=None)

    @property
    def read_only(self) -> list[bytes]:
        """Of a recording: the keys that were only read."""
        return [key for key, written in self._touched.items() if not written]

    @property
    def read_write(self) -> list[bytes]:
        """The keys that may be written: those declared, or of a recording those that were."""
        if self._declared is not None:
            return sorted(self._declared[1])
        return [key for key, written in self._touched.items() if written]

    def touch(self, key: bytes, *, written: bool = False) -> None:
        """Note, or check, that a key is used.

        Raises:
            HostError: it is outside the footprint.
        """
        if self._declared is None:
            self._touched[key] = self._touched.get(key, False) or written
            return
        read, writable = self._declared
        if key not in writable and (written or key not in read):
            raise HostError("Storage", "ExceededLimit", "trying to access a ledger key outside of the footprint")

    def get(self, key: bytes) -> Entry | None:
        """Return a live entry.

        Raises:
            HostError: it is outside the footprint.
        """
        self.touch(key)
        entry = self.overlay.get(key)
        if entry is None or entry.live_until is None or entry.live_until >= self.sequence:
            return entry
        if is_temporary(key):
            return None
        assert self._declared is None, "archived entries of a footprint are restored, or refused, before a call"
        self.touch(key, written=True)
        return self.restore(key)

    def restore(self, key: bytes) -> Entry:
        """Bring back an archived entry, with the life of a new one."""
        self.restored[key] = None
        self.overlay.extend(key, self.sequence + self.limits.persistent_ledgers_min - 1)
        entry = self.overlay.get(key)
        assert entry is not None
        return entry

    def put(self, key: bytes, data: xdr.LedgerEntryData, live_ledgers: int | None = None) -> None:
        """Write an entry; one that has a life keeps it, a new one gets the shortest that there is.

        Args:
            live_ledgers: how long a new one lives at least, with this ledger.

        Raises:
            HostError: it is outside the footprint, or larger than an entry may be.
        """
        self.touch(key, written=True)
        before = self.get(key)
        until: int | None = None
        if before is not None:
            until = before.live_until
        elif has_life(key):
            least = self.limits.temporary_ledgers_min if is_temporary(key) else self.limits.persistent_ledgers_min
            until = self.sequence + max(least, live_ledgers or 0) - 1
        self.overlay.put(key, data, until)
        written = self.overlay.writes[key]
        assert written is not None
        if has_life(key) and written.size > self.limits.entry_bytes:
            raise HostError("Storage", "ExceededLimit", "the entry is too large")

    def delete(self, key: bytes) -> None:
        """Remove an entry, where there is one.

        Raises:
            HostError: it is outside the footprint.
        """
        self.touch(key, written=True)
        if self.overlay.get(key) is not None:
            self.overlay.delete(key)

    def extend(self, key: bytes, threshold: int, extend_to: int) -> None:
        """Extend a life, where little of it is left; reading the entry is enough of a right for that.

        Args:
            threshold: at most this many ledgers left, or nothing happens.
            extend_to: how many ledgers are left then.

        Raises:
            HostError: there is no such entry, or the threshold is beyond the extension.
        """
        if threshold > extend_to:
            raise HostError("Storage", "InvalidInput", "threshold must be <= extend_to")
        entry = self.get(key)
        if entry is None or entry.live_until is None:
            raise HostError("Storage", "MissingValue", "trying to extend an entry that is not there")
        longest = self.sequence + self.limits.ledgers_max - 1
        until = self.sequence + extend_to
        if until > longest:
            if is_temporary(key):
                raise HostError("Storage", "InvalidAction", "trying to extend past max live_until ledger")
            until = longest
        if until > entry.live_until and entry.live_until - self.sequence <= threshold:
            self.overlay.extend(key, until)

    def disk_reads(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """Return how many of the keys are read from disk, and the bytes of their entries as they were before.

        Accounts, trust lines and what is restored are; other contract entries are in a node's memory.
        """
        entries = size = 0
        for key in keys:
            if kind_of(key) in _CLASSIC or key in self.restored:
                entries += 1
                before = self.overlay.before(key)
                size += before.size if before is not None else 0
        return entries, size

    def write_bytes(self) -> int:
        """Return the bytes of the entries that may be written, as they are now."""
        size = 0
        for key in self.read_write:
            entry = self.overlay.get(key)
            size += entry.size if entry is not None else 0
        return size

    def rent(self) -> int:
        """Return what the lives that this operation gave and extended cost, and what grew of what lives, stroops."""
        total = 0
        for key, entry in self.overlay.writes.items():
            if entry is None or entry.live_until is None:
                continue
            size = entry.size
            persistent = not is_temporary(key)
            before = self.overlay.before(key)
            if before is None or before.live_until is None or before.live_until < self.sequence:
                ledgers = entry.live_until - self.sequence + 1
                total += fees.rent_fee(size, ledgers, persistent=persistent) + fees.life_fee()
                continue
            grown = size - before.size
            if grown > 0:
                left = before.live_until - self.sequence + 1
                total += fees.rent_fee(grown, left, persistent=persistent)
            if entry.live_until > before.live_until:
                more = entry.live_until - before.live_until
                total += fees.rent_fee(size, more, persistent=persistent) + fees.life_fee()
        return total


def ledger_keys(keys: Sequence[bytes]) -> list[xdr.LedgerKey]:
    """Return keys as XDR objects."""
    return [xdr.LedgerKey.from_xdr_bytes(key) for key in keys]
