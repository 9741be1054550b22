"""What a contract call may use, and what it pays: the network's limits, and rates of the sandbox's own.

The limits are those that validators voted (docs/sandbox.md names them). The rates have the shape of the network's, so
that every rule of fees can be met, but not its numbers, which change by vote and with the load.
"""

from typing import Final

import attrs

TTL_ENTRY_BYTES: Final = 48
"""What an entry's end of life takes on the ledger."""
TX_BASE_BYTES: Final = 300
"""What the result of a transaction takes in the history, besides the transaction."""


@attrs.frozen
class Usage:
    """What one transaction declares or was found to use."""

    instructions: int
    disk_read_entries: int
    """Accounts and trust lines in the footprint, and archived entries to be restored."""
    disk_read_bytes: int
    write_entries: int
    write_bytes: int
    transaction_bytes: int


@attrs.frozen
class Limits:
    """One transaction's limits, and the lives of contract entries. Protocol constants are not settings of Callora."""

    instructions: int = 400_000_000
    disk_read_entries: int = 200
    disk_read_bytes: int = 200_000
    write_entries: int = 200
    write_bytes: int = 132_096
    footprint_keys: int = 400
    transaction_bytes: int = 132_096
    events_bytes: int = 16_384
    """Of its events and its return value together."""
    data_key_bytes: int = 250
    entry_bytes: int = 131_072
    """Of one contract entry."""
    persistent_ledgers_min: int = 2_073_600
    """How long a new or restored persistent entry lives: about 120 days."""
    temporary_ledgers_min: int = 17_280
    """How long a new temporary entry lives: about a day."""
    ledgers_max: int = 3_110_400
    """How far ahead a life may be extended: about 180 days."""
    legacy_restore: bool = False
    """Simulate like a node before protocol 23: a preamble instead of indices of archived entries."""

    def fits(self, usage: Usage, footprint_keys: int) -> bool:
        """Tell whether a transaction may declare this."""
        return (
            usage.instructions <= self.instructions
            and usage.disk_read_entries <= self.disk_read_entries
            and usage.disk_read_bytes <= self.disk_read_bytes
            and usage.write_entries <= self.write_entries
            and usage.write_bytes <= self.write_bytes
            and usage.transaction_bytes <= self.transaction_bytes
            and footprint_keys <= self.footprint_keys
        )


def _share(amount: int, rate: int, unit: int) -> int:
    """Return amount x rate / unit, rounded up."""
    return -(-amount * rate // unit)


_KIB: Final = 1024
_PER_10_000_INSTRUCTIONS: Final = 25
_DISK_READ_ENTRY: Final = 6_250
_DISK_READ_KIB: Final = 1_786
_WRITE_ENTRY: Final = 10_000
_WRITE_KIB: Final = 3_500
_HISTORY_KIB: Final = 16_235
_BANDWIDTH_KIB: Final = 1_624
_EVENTS_KIB: Final = 10_000
_RENT_KIB: Final = 12_000
_PERSISTENT_RENT_LEDGERS: Final = 24_000
"""Ledgers for which a KiB of a persistent entry costs `_RENT_KIB`."""
_TEMPORARY_RENT_LEDGERS: Final = 48_000


def non_refundable_fee(usage: Usage) -> int:
    """Return the part of a resource fee that pays for what is declared, stroops."""
    return (
        _share(usage.instructions, _PER_10_000_INSTRUCTIONS, 10_000)
        + usage.disk_read_entries * _DISK_READ_ENTRY
        + _share(usage.disk_read_bytes, _DISK_READ_KIB, _KIB)
        + usage.write_entries * _WRITE_ENTRY
        + _share(usage.write_bytes, _WRITE_KIB, _KIB)
        + _share(usage.transaction_bytes + TX_BASE_BYTES, _HISTORY_KIB, _KIB)
        + _share(usage.transaction_bytes, _BANDWIDTH_KIB, _KIB)
    )


def events_fee(size: int) -> int:
    """Return what events and a return value cost, stroops.

    Args:
        size: their bytes together.
    """
    return _share(size, _EVENTS_KIB, _KIB)


def rent_fee(size: int, ledgers: int, *, persistent: bool) -> int:
    """Return what an entry pays to live, stroops.

    Args:
        size: its bytes.
        ledgers: for how many more.
    """
    unit = _PERSISTENT_RENT_LEDGERS if persistent else _TEMPORARY_RENT_LEDGERS
    return _share(size * ledgers, _RENT_KIB, _KIB * unit)


def life_fee() -> int:
    """Return what writing down a new end of a life costs, stroops."""
    return _WRITE_ENTRY + _share(TTL_ENTRY_BYTES, _WRITE_KIB, _KIB)
