"""What the sandbox's ledger holds: entries by key, the header of the last ledger, and changes that may yet be dropped.

It owns no rule: `transactions`, `classic` and the contracts' `Machine` say what may be written. Entries are XDR objects
of the SDK and are never changed in place: whoever changes an entry puts another one, and that is what makes a read of
the past (`State.at`), a dropped overlay and a snapshot true without copies.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Final, Protocol

import attrs
from stellar_sdk import Keypair, StrKey, xdr

PAST_LEDGERS: Final = 128
"""How many ledgers back entries can be read: what a node may lag behind."""
_TTL: Final = xdr.LedgerEntryType.TTL


@attrs.frozen
class Entry:
    """One entry as a ledger left it."""

    data: xdr.LedgerEntryData
    """Never changed in place."""
    last_modified: int
    """The ledger that wrote it."""
    live_until: int | None = None
    """The last ledger in which a contract's entry lives; None for what has no rent (accounts, trust lines, data)."""

    @cached_property
    def size(self) -> int:
        """Its bytes on the ledger."""
        return len(self.ledger_entry().to_xdr_bytes())

    def ledger_entry(self) -> xdr.LedgerEntry:
        """Return it as transaction meta shows it."""
        ext = xdr.LedgerEntryExt(0)
        return xdr.LedgerEntry(xdr.Uint32(self.last_modified), self.data, ext)


@attrs.frozen
class Header:
    """A closed ledger, as far as it is known without its transactions."""

    sequence: int
    closed_at: int
    """Seconds since 1970; never before the previous ledger's."""
    protocol_version: int
    base_fee: int
    """Stroops of XLM an operation costs at least, where there is no surge."""
    base_reserve: int
    """Stroops of XLM; an account keeps two of them, and one for each thing that it has."""
    total_coins: int
    fee_pool: int
    previous_hash: bytes
    result_hash: bytes
    """SHA-256 of the results of its transactions."""

    def to_xdr(self) -> xdr.LedgerHeader:
        """Return it as XDR. The hash of all entries, which nothing here could verify, is zero."""
        zero = xdr.Hash(bytes(32))
        value = xdr.StellarValue(
            zero,
            xdr.TimePoint(xdr.Uint64(self.closed_at)),
            [],
            xdr.StellarValueExt(xdr.StellarValueType.STELLAR_VALUE_BASIC),
        )
        return xdr.LedgerHeader(
            xdr.Uint32(self.protocol_version),
            xdr.Hash(self.previous_hash),
            value,
            xdr.Hash(self.result_hash),
            zero,
            xdr.Uint32(self.sequence),
            xdr.Int64(self.total_coins),
            xdr.Int64(self.fee_pool),
            xdr.Uint32(0),
            xdr.Uint64(0),
            xdr.Uint32(self.base_fee),
            xdr.Uint32(self.base_reserve),
            xdr.Uint32(1000),
            [zero] * 4,
            xdr.LedgerHeaderExt(0),
        )

    def hash(self) -> bytes:
        """Return the ledger's id, 32 bytes."""
        return hashlib.sha256(self.to_xdr().to_xdr_bytes()).digest()


class Reader(Protocol):
    """Where entries are read: a State, the state some ledgers ago, or an Overlay."""

    @property
    def header(self) -> Header:
        """The last closed ledger at this place."""
        ...

    def get(self, key: bytes) -> Entry | None:
        """Return an entry, also one whose `live_until` has passed; None where there is none.

        Args:
            key: XDR of a LedgerKey, see `key_bytes`.
        """
        ...


class Keyed(Reader, Protocol):
    """A Reader whose keys can be listed: a State, or the state some ledgers ago."""

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        """Return the keys that begin like this, in order."""
        ...


class State:
    """All entries after the last closed ledger, and what is needed to read them as they were up to PAST_LEDGERS ago."""

    def __init__(self, header: Header, entries: Iterable[tuple[bytes, Entry]] = ()) -> None:
        self._header = header
        self._entries = dict(entries)
        self._open: dict[bytes, Entry | None] = {}
        self._past: deque[tuple[Header, dict[bytes, Entry | None]]] = deque(maxlen=PAST_LEDGERS)

    @property
    def header(self) -> Header:
        """The last closed ledger."""
        return self._header

    def get(self, key: bytes) -> Entry | None:
        """Return an entry; None where there is none."""
        return self._entries.get(key)

    def merge(self, writes: Mapping[bytes, Entry | None]) -> None:
        """Take over entries, for the ledger that `close` will close; None deletes."""
        for key, entry in writes.items():
            self._open.setdefault(key, self._entries.get(key))
            if entry is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = entry

    def close(self, header: Header) -> tuple[bytes, ...]:
        """Close a ledger with what was merged since the last one.

        Returns:
            The keys that it wrote.
        """
        changed = tuple(self._open)
        self._past.append((self._header, self._open))
        self._header, self._open = header, {}
        return changed

    def at(self, sequence: int) -> Keyed:
        """Return the state as a ledger left it.

        Raises:
            LookupError: it is later than the last ledger, or too long ago.
        """
        if sequence == self._header.sequence and not self._open:
            return self
        undone = [dict(self._open)] if self._open else []
        if sequence == self._header.sequence:
            return _Past(self, self._header, undone)
        for header, undo in reversed(self._past):
            undone.append(undo)
            if header.sequence == sequence:
                return _Past(self, header, undone)
        raise LookupError(f"no ledger {sequence} here any more, or not yet")

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        """Return the keys that begin like this, in order."""
        return iter(sorted(key for key in self._entries if key.startswith(prefix)))


class _Past:
    """The state some ledgers ago: what later ledgers replaced, and the present for the rest."""

    def __init__(self, present: State, header: Header, undone: list[dict[bytes, Entry | None]]) -> None:
        self._present = present
        self._header = header
        self._undone = undone[::-1]  # the oldest first: what it replaced is what was there

    @property
    def header(self) -> Header:
        return self._header

    def get(self, key: bytes) -> Entry | None:
        for undo in self._undone:
            if key in undo:
                return undo[key]
        return self._present.get(key)

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        known = {key for undo in self._undone for key in undo if key.startswith(prefix)}.union(
            self._present.keys(prefix)
        )
        return iter(sorted(key for key in known if self.get(key) is not None))


class Overlay:
    """Changes on top of a state or of another overlay, taken over all at once or never.

    Everything read and written is recorded, in order: `reads` has each key that was asked for, written or not, also by
    overlays on top of this one that were dropped; `writes` what `commit` takes over.
    """

    def __init__(self, below: Reader, sequence: int) -> None:
        """Make one.

        Args:
            below: where unwritten keys are read, and what `commit` writes to.
            sequence: the ledger being made, for `last_modified`.
        """
        self._below = below
        self.sequence = sequence
        self.reads: dict[bytes, None] = {}
        self.writes: dict[bytes, Entry | None] = {}

    @property
    def header(self) -> Header:
        """The last closed ledger; not the one being made."""
        return self._below.header

    def get(self, key: bytes) -> Entry | None:
        """Return an entry; None where there is none."""
        self.reads[key] = None
        if key in self.writes:
            return self.writes[key]
        return self._below.get(key)

    def before(self, key: bytes) -> Entry | None:
        """Return the entry as it is below this overlay."""
        return self._below.get(key)

    def put(self, key: bytes, data: xdr.LedgerEntryData, live_until: int | None = None) -> None:
        """Write an entry, in place of the one that was there."""
        self.writes[key] = Entry(data, self.sequence, live_until)

    def extend(self, key: bytes, live_until: int) -> None:
        """Move only the end of an entry's life, which is no change of the entry itself.

        Args:
            key: of an entry that is there.
        """
        entry = self.get(key)
        assert entry is not None
        self.writes[key] = attrs.evolve(entry, live_until=live_until)

    def delete(self, key: bytes) -> None:
        """Remove an entry; nothing happens where there is none."""
        self.writes[key] = None

    def nested(self) -> "Overlay":
        """Return an overlay on top of this one."""
        return Overlay(self, self.sequence)

    def merge(self, writes: Mapping[bytes, Entry | None]) -> None:
        """Take over what an overlay on top of this one wrote."""
        self.writes.update(writes)

    def commit(self) -> None:
        """Hand everything written to what is below, which is no view of the past, and be empty."""
        assert isinstance(self._below, State | Overlay)
        self._below.merge(self.writes)
        self.writes = {}

    def changes(self) -> list[xdr.LedgerEntryChange]:
        """Return what `commit` would do, as transaction meta shows it: what was there, then what became of it."""
        found: list[xdr.LedgerEntryChange] = []
        for key, entry in self.writes.items():
            before = self._below.get(key)
            if before is entry:
                continue
            found += _changes_of(key, before, entry)
        return found


def _changes_of(key: bytes, before: Entry | None, after: Entry | None) -> Iterator[xdr.LedgerEntryChange]:
    if before is None or after is None or before.data is not after.data or before.last_modified != after.last_modified:
        yield from _replaced(
            xdr.LedgerKey.from_xdr_bytes(key),
            before.ledger_entry() if before is not None else None,
            after.ledger_entry() if after is not None else None,
        )
    lived = before.live_until if before is not None else None
    lives = after.live_until if after is not None else None
    if lived != lives:
        sequence = after.last_modified if after is not None else 0
        hashed = xdr.Hash(hashlib.sha256(key).digest())
        yield from _replaced(
            xdr.LedgerKey(_TTL, ttl=xdr.LedgerKeyTtl(hashed)),
            None if lived is None else _ttl_entry(hashed, lived, sequence),
            None if lives is None else _ttl_entry(hashed, lives, sequence),
        )


def _ttl_entry(hashed: xdr.Hash, live_until: int, sequence: int) -> xdr.LedgerEntry:
    data = xdr.LedgerEntryData(_TTL, ttl=xdr.TTLEntry(hashed, xdr.Uint32(live_until)))
    return Entry(data, sequence).ledger_entry()


def _replaced(
    key: xdr.LedgerKey, before: xdr.LedgerEntry | None, after: xdr.LedgerEntry | None
) -> Iterator[xdr.LedgerEntryChange]:
    kinds = xdr.LedgerEntryChangeType
    if before is not None:
        yield xdr.LedgerEntryChange(kinds.LEDGER_ENTRY_STATE, state=before)
        if after is not None:
            yield xdr.LedgerEntryChange(kinds.LEDGER_ENTRY_UPDATED, updated=after)
        else:
            yield xdr.LedgerEntryChange(kinds.LEDGER_ENTRY_REMOVED, removed=key)
    elif after is not None:
        yield xdr.LedgerEntryChange(kinds.LEDGER_ENTRY_CREATED, created=after)


def key_bytes(key: xdr.LedgerKey) -> bytes:
    """Return a key as entries are kept by."""
    return key.to_xdr_bytes()


def account_id(address: str) -> xdr.AccountID:
    """Return an account's id.

    Args:
        address: `G…`.
    """
    return Keypair.from_public_key(address).xdr_account_id()


def account_key(address: str) -> bytes:
    """Return the key of an account.

    Args:
        address: `G…`.
    """
    key = xdr.LedgerKeyAccount(account_id(address))
    return key_bytes(xdr.LedgerKey(xdr.LedgerEntryType.ACCOUNT, account=key))


def trust_line_key(address: str, asset: xdr.Asset) -> bytes:
    """Return the key of an account's trust line.

    Args:
        address: `G…`.
        asset: one that has an issuer.
    """
    line = xdr.TrustLineAsset(asset.type, alpha_num4=asset.alpha_num4, alpha_num12=asset.alpha_num12)
    key = xdr.LedgerKeyTrustLine(account_id(address), line)
    return key_bytes(xdr.LedgerKey(xdr.LedgerEntryType.TRUSTLINE, trust_line=key))


def data_key(address: str, name: bytes) -> bytes:
    """Return the key of an account's data entry."""
    key = xdr.LedgerKeyData(account_id(address), xdr.String64(name))
    return key_bytes(xdr.LedgerKey(xdr.LedgerEntryType.DATA, data=key))


def address_of(account: xdr.AccountID) -> str:
    """Return an account's address, `G…`."""
    assert account.account_id.ed25519 is not None
    return StrKey.encode_ed25519_public_key(account.account_id.ed25519.uint256)


# What a transaction is and becomes: between the core and the contracts' machine.


@attrs.frozen
class Operation:
    """One operation of a transaction."""

    source: str
    """`G…`: its own source, or else the transaction's."""
    muxed: bool
    """Whether that source was written as `M…`."""
    body: xdr.OperationBody


@attrs.frozen
class Transaction:
    """A decoded envelope."""

    envelope: xdr.TransactionEnvelope
    hash: bytes
    """Of the outermost transaction."""
    inner_hash: bytes
    """Of the transaction with the operations: the same as `hash` without a fee-bump."""
    body: xdr.Transaction
    source: str
    """Whose sequence number it uses, `G…`."""
    sequence: int
    fee_source: str
    """Who pays, `G…`."""
    fee: int
    """Stroops, the most that it pays: with a fee-bump the outer fee."""
    operations: tuple[Operation, ...]
    signatures: tuple[xdr.DecoratedSignature, ...]
    """Over `inner_hash`."""
    outer_signatures: tuple[xdr.DecoratedSignature, ...]
    """Over `hash`, of a fee-bump; empty without one."""

    @property
    def is_fee_bump(self) -> bool:
        """Whether another transaction pays for it."""
        return self.envelope.type == xdr.EnvelopeType.ENVELOPE_TYPE_TX_FEE_BUMP

    @property
    def soroban(self) -> xdr.SorobanTransactionData | None:
        """The footprint, resources and resource fee of a contract call."""
        return self.body.ext.soroban_data

    @property
    def resource_fee(self) -> int:
        """What it declares for resources, stroops; 0 where it calls no contract."""
        return self.soroban.resource_fee.int64 if self.soroban is not None else 0


@attrs.frozen
class LedgerContext:
    """The ledger that operations are applied in, or that a simulation supposes."""

    network_id: bytes
    """SHA-256 of the passphrase."""
    sequence: int
    closed_at: int
    base_reserve: int
    protocol_version: int


@attrs.frozen
class OperationOutcome:
    """What became of one operation. Unless it succeeded, everything that it wrote is dropped."""

    succeeded: bool
    result: xdr.OperationResult
    return_value: xdr.SCVal | None = None
    events: tuple[xdr.ContractEvent, ...] = ()
    """Contract and system events, in order; none unless it succeeded."""
    diagnostics: tuple[xdr.DiagnosticEvent, ...] = ()
    non_refundable: int = 0
    """Charged of the declared resource fee for what was declared, whether it succeeded or not, stroops."""
    refundable: int = 0
    """Charged of it for what was used, rent and events, stroops; 0 unless it succeeded. What is left goes back."""
    rent: int = 0
    """The rent in `refundable`, stroops."""


class Machine(Protocol):
    """The contracts' half of the rules: InvokeHostFunction, ExtendFootprintTTL and RestoreFootprint."""

    def check(self, reader: Reader, transaction: Transaction) -> xdr.TransactionResultCode | None:
        """Return why a transaction cannot be admitted; None if it can.

        Called before every other check, and again when a ledger closes, for each transaction that has one of those
        operations or has Soroban data: both must be there, the operation alone, and the resources within limits.
        """
        ...

    def apply(
        self, overlay: Overlay, context: LedgerContext, transaction: Transaction, operation: Operation
    ) -> OperationOutcome:
        """Apply the operation onto the overlay, which the caller commits or drops. Fee and sequence are paid before."""
        ...


# What a node of the sandbox tells: the seam of the RPC and Horizon handlers.


@attrs.frozen
class Event:
    """A contract's event in a ledger, split as a node tells it."""

    kind: str
    """`contract` or `system`."""
    contract_id: str | None
    """`C…`."""
    topics: tuple[str, ...]
    """Base64 XDR."""
    value: str
    """Base64 XDR."""
    xdr: str
    """The whole, base64 XDR of a ContractEvent."""


@attrs.frozen
class Included:
    """A transaction in a closed ledger."""

    hash: str
    """Hex; of the outermost transaction."""
    inner_hash: str | None
    """Hex, of a fee-bump's inner transaction; both find it."""
    ledger: int
    order: int
    """From 1, as it was applied in its ledger."""
    closed_at: int
    successful: bool
    source: str
    fee_source: str
    accounts: tuple[str, ...]
    """Every account that it names, `G…`."""
    envelope: str
    """Base64 XDR, like the next two."""
    result: str
    meta: str
    fee_meta: str
    """Base64 XDR of the LedgerEntryChanges of taking the fee."""
    transaction_events: tuple[str, ...]
    """Base64 XDR of TransactionEvents: fees."""
    events: tuple[tuple[Event, ...], ...]
    """For each operation; all empty unless it succeeded."""
    diagnostics: tuple[str, ...]
    """Base64 XDR of DiagnosticEvents."""


@attrs.frozen
class Admission:
    """What a node says to a transaction that it was sent."""

    status: str
    """`PENDING`, `DUPLICATE`, `TRY_AGAIN_LATER` or `ERROR`."""
    hash: str
    result: str | None = None
    """Of an ERROR: base64 XDR of a TransactionResult, which no ledger will have."""
    diagnostics: tuple[str, ...] = ()


@attrs.frozen
class Undecodable:
    """What was sent is no transaction envelope."""

    reason: str


class Node(Protocol):
    """One node of the sandbox network, with its own lag behind the last ledger and its own retention."""

    @property
    def passphrase(self) -> str:
        """The network's."""
        ...

    @property
    def friendbot_url(self) -> str | None:
        """Where accounts are made; None where nobody does that."""
        ...

    @property
    def reader(self) -> Reader:
        """The entries, with the last ledger that this node knows as `header`."""
        ...

    @property
    def oldest(self) -> Header:
        """The first ledger that this node still has."""
        ...

    @property
    def now(self) -> int:
        """Seconds since 1970 by the network's clock."""
        ...

    def context(self) -> LedgerContext:
        """Return the ledger that would come next, for a simulation."""
        ...

    def submit(self, envelope: str) -> Admission | Undecodable:
        """Take a transaction into the queue of the network.

        Args:
            envelope: base64 XDR, from anyone.
        """
        ...

    def transaction(self, tx_hash: str) -> Included | None:
        """Return a transaction that this node still has, by the hash of the whole or of the inner one."""
        ...

    def header_of(self, sequence: int) -> Header | None:
        """Return a ledger that this node still has."""
        ...

    def included(self, first: int, last: int) -> Iterator[Included]:
        """Return the transactions of ledgers that this node still has, in order; cheap where ledgers are empty.

        Args:
            first: a ledger.
            last: a ledger, with it.
        """
        ...

    def inclusion_fees(self, ledgers: int, *, soroban: bool) -> tuple[int, ...]:
        """Return the inclusion fees an operation of the transactions in the last ledgers, stroops, in any order."""
        ...
