"""Simulation: what a contract operation would return, touch, cost and need signed, on the ledger that would come next.

What it answers can be put into the transaction as it is. Source: stellar-rpc's simulateTransaction and
soroban-simulation, whose default margins these are.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Literal

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.soroban import contracts
from callora.stellar.sandbox.soroban import limits as fees
from callora.stellar.sandbox.soroban.authorization import Enforced, Recording
from callora.stellar.sandbox.soroban.faults import HostError, OverResources
from callora.stellar.sandbox.soroban.host import Host, log_of
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.machine import SOROBAN_OPERATIONS, declared_usage, events_bytes, perform, size_of
from callora.stellar.sandbox.soroban.storage import Footprint, Storage, has_life, is_archived, is_temporary, ledger_keys
from callora.stellar.sandbox.state import (
    Entry,
    Header,
    LedgerContext,
    Operation,
    Overlay,
    Reader,
    Transaction,
    key_bytes,
)

AuthMode = Literal["enforce", "record", "record_allow_nonroot"]
_INSTRUCTIONS_MORE: Final = 50_000
_SIGNATURE_BYTES: Final = 200
"""What signing an authorization entry makes it longer by, about."""
_ENVELOPE_BYTES: Final = 500
"""Room for the signatures of the transaction itself."""


@attrs.frozen
class Change:
    """What a call would do to one entry."""

    key: str
    """Base64 XDR."""
    before: str | None
    """Base64 XDR of a LedgerEntry; None where there was none."""
    after: str | None
    """None where there would be none."""


@attrs.frozen
class Restoring:
    """What has to be restored first, for nodes that know no other way."""

    data: xdr.SorobanTransactionData
    fee: int
    """Stroops."""


@attrs.frozen
class Simulation:
    """What an operation would do."""

    data: xdr.SorobanTransactionData
    fee: int
    """The resource fee, stroops; it is in `data` too."""
    value: xdr.SCVal | None
    """What was returned; None for an operation that calls nothing."""
    auth: tuple[xdr.SorobanAuthorizationEntry, ...]
    events: tuple[xdr.DiagnosticEvent, ...]
    changes: tuple[Change, ...]
    restoring: Restoring | None


@attrs.frozen
class SimulationFailed:
    """Why an operation would fail."""

    error: str
    """As a node says it."""
    events: tuple[xdr.DiagnosticEvent, ...] = ()


class Simulator:
    """Answers what operations would do; never changes anything."""

    def __init__(self, limits: Limits, seed: str) -> None:
        """Make one.

        Args:
            limits: the network's.
            seed: of the nonces that it proposes.
        """
        self._limits = limits
        self._seed = seed
        self._nonces = 0

    def simulate(
        self,
        reader: Reader,
        context: LedgerContext,
        transaction: Transaction,
        *,
        auth_mode: AuthMode | None = None,
        upgraded_auth: bool = True,
        more_instructions: int = 0,
    ) -> Simulation | SimulationFailed:
        """Return what the only operation of a transaction would do. Signatures, fee and sequence number do not matter.

        Args:
            reader: the entries as of some ledger.
            context: the ledger after it.
            auth_mode: None: enforce the entries that are there, or record where there are none.
            upgraded_auth: whether recorded entries bind the address that signs (ADDRESS_V2).
            more_instructions: what to allow beyond those that were used.
        """
        if len(transaction.operations) != 1:
            return SimulationFailed("Transaction contains more than one operation")
        operation = transaction.operations[0]
        kind = operation.body.type
        if kind not in SOROBAN_OPERATIONS:
            return SimulationFailed(f"Transaction contains unsupported operation type: {_go_name(kind)}")
        trial = _Trial(Overlay(reader, context.sequence), context, self._limits, transaction)
        invoke = operation.body.invoke_host_function_op
        if invoke is not None:
            if invoke.auth and auth_mode in ("record", "record_allow_nonroot"):
                return SimulationFailed(f"cannot set authMode to '{auth_mode}' with an auth footprint")
            mode: AuthMode = auth_mode or ("enforce" if invoke.auth else "record")
            return trial.invoke(operation, mode, upgraded_auth, more_instructions, lambda: self._nonce(reader))
        if auth_mode is not None:
            return SimulationFailed("cannot set authMode with non-InvokeHostFunction operations")
        if transaction.soroban is None:
            return SimulationFailed(
                "To perform a SimulateTransaction for ExtendFootprintTtl or RestoreFootprint operations,"
                " SorobanTransactionData must be provided"
            )
        if operation.body.extend_footprint_ttl_op is not None:
            return trial.extend(operation.body.extend_footprint_ttl_op.extend_to.uint32)
        return trial.restore()

    def _nonce(self, reader: Reader) -> int:
        """Return a nonce not proposed before: the ledger's hash tells one run of a kept sandbox from the next."""
        self._nonces += 1
        told = f"{self._seed}/{reader.header.hash().hex()}/{self._nonces}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1


class _Trial:
    """One simulation."""

    def __init__(self, overlay: Overlay, context: LedgerContext, limits: Limits, transaction: Transaction) -> None:
        self._overlay = overlay
        self._context = context
        self._limits = limits
        self._transaction = transaction
        self._storage = Storage.recording(overlay, limits, context.sequence)

    # InvokeHostFunction.

    def invoke(
        self,
        operation: Operation,
        mode: AuthMode,
        upgraded_auth: bool,
        more_instructions: int,
        nonce: Callable[[], int],
    ) -> Simulation | SimulationFailed:
        invoke = operation.body.invoke_host_function_op
        assert invoke is not None
        host = Host(self._storage, self._context, contracts.model_of, instructions=self._limits.instructions)
        recording = None
        try:
            if mode == "enforce":
                host.authorization = Enforced(
                    invoke.auth,
                    source=operation.source,
                    network_id=self._context.network_id,
                    storage=self._storage,
                    charge=host.charge,
                )
            else:
                host.authorization = recording = Recording(
                    source=operation.source,
                    storage=self._storage,
                    charge=host.charge,
                    nonce=nonce,
                    upgraded=upgraded_auth,
                    allow_below_root=mode == "record_allow_nonroot",
                )
            value = perform(host, invoke.host_function)
        except HostError as error:
            return self._failed(host, error)
        except OverResources as error:
            return self._failed(host, HostError("Budget", "ExceededLimit", error.why))
        auth = tuple(recording.entries()) if recording is not None else tuple(invoke.auth)
        told = events_bytes(host, value)
        if told > self._limits.events_bytes:
            why = "total events size exceeds network config maximum"
            return self._failed(host, HostError("Budget", "ExceededLimit", why))
        archived = list(self._storage.restored)
        data = self._data(
            self._storage.read_only,
            self._storage.read_write,
            [] if self._limits.legacy_restore else archived,
            instructions=host.instructions * 104 // 100 + _INSTRUCTIONS_MORE + more_instructions,
            disk_read_bytes=self._storage.disk_reads((*self._storage.read_only, *self._storage.read_write))[1],
            write_bytes=self._storage.write_bytes(),
        )
        signing = 0 if recording is None else sum(len(entry.to_xdr_bytes()) + _SIGNATURE_BYTES for entry in auth)
        simulated = self._priced(data, self._storage.rent() + fees.events_fee(told), signing)
        if isinstance(simulated, SimulationFailed):
            return simulated
        return attrs.evolve(
            simulated,
            value=value,
            auth=auth,
            events=tuple(host.diagnostics),
            restoring=self._restoring(archived) if self._limits.legacy_restore and archived else None,
        )

    def _failed(self, host: Host, error: HostError) -> SimulationFailed:
        host.tell(None, error)
        events = host.failed_diagnostics()
        return SimulationFailed(log_of(error.error, events), events)

    def _restoring(self, archived: list[bytes]) -> Restoring:
        """Return the restoration that would have to come first."""
        trial = _Trial(
            Overlay(_Below(self._overlay), self._context.sequence), self._context, self._limits, self._transaction
        )
        made = trial.restore_keys(archived)
        assert isinstance(made, Simulation)
        return Restoring(made.data, made.fee)

    # The other two.

    def extend(self, ledgers: int) -> Simulation | SimulationFailed:
        """Extend lives.

        Args:
            ledgers: how many are left then, at least.
        """
        footprint = self._footprint()
        keys = [key_bytes(key) for key in footprint.read_only]
        if ledgers > self._limits.ledgers_max - 1:
            return SimulationFailed("the extension is longer than any life may be")
        for key in keys:
            entry = self._overlay.get(key)
            if not has_life(key) or entry is None or entry.live_until is None:
                return SimulationFailed("missing entry for one of the keys of the footprint")
            if entry.live_until >= self._context.sequence:
                self._storage.extend(key, ledgers, ledgers)
        return self._priced(self._data(keys, [], []), self._storage.rent(), 0)

    def restore(self) -> Simulation | SimulationFailed:
        """Bring back what the footprint of the transaction names."""
        return self.restore_keys([key_bytes(key) for key in self._footprint().read_write])

    def restore_keys(self, keys: list[bytes]) -> Simulation | SimulationFailed:
        """Bring back entries."""
        wanted = []
        for key in keys:
            if not has_life(key) or is_temporary(key):
                return SimulationFailed("restored entries must be persistent contract data or code")
            entry = self._overlay.get(key)
            if entry is None:
                return SimulationFailed("missing entry for one of the keys of the footprint")
            if is_archived(key, entry, self._context.sequence):
                self._storage.touch(key, written=True)
                self._storage.restore(key)
                wanted.append(key)
        data = self._data(
            [],
            wanted,
            [],
            disk_read_bytes=self._storage.disk_reads(wanted)[1],
            write_bytes=self._storage.write_bytes(),
        )
        return self._priced(data, self._storage.rent(), 0)

    def _footprint(self) -> xdr.LedgerFootprint:
        assert self._transaction.soroban is not None
        return self._transaction.soroban.resources.footprint

    # What it costs.

    def _data(
        self,
        read: Sequence[bytes],
        written: Sequence[bytes],
        archived: Sequence[bytes],
        *,
        instructions: int = 0,
        disk_read_bytes: int = 0,
        write_bytes: int = 0,
    ) -> xdr.SorobanTransactionData:
        """Return footprint and resources, without a fee yet."""
        in_order = sorted(written)
        indices = sorted(in_order.index(key) for key in archived)
        ext = xdr.SorobanTransactionDataExt(0)
        if indices:
            named = xdr.SorobanResourcesExtV0([xdr.Uint32(index) for index in indices])
            ext = xdr.SorobanTransactionDataExt(1, resource_ext=named)
        resources = xdr.SorobanResources(
            xdr.LedgerFootprint(ledger_keys(sorted(read)), ledger_keys(in_order)),
            xdr.Uint32(instructions),
            xdr.Uint32(disk_read_bytes),
            xdr.Uint32(write_bytes),
        )
        return xdr.SorobanTransactionData(ext, resources, xdr.Int64(0))

    def _priced(
        self, data: xdr.SorobanTransactionData, refundable: int, signing_bytes: int
    ) -> Simulation | SimulationFailed:
        """Return the data with its fee, which covers the transaction as it will be sent."""
        present = size_of(self._transaction)
        if self._transaction.soroban is not None:
            present -= len(self._transaction.soroban.to_xdr_bytes())
        size = present + len(data.to_xdr_bytes()) + signing_bytes
        footprint = Footprint.of(data.resources.footprint)
        usage = declared_usage(data, footprint, size * 11 // 10 + _ENVELOPE_BYTES)
        if not self._limits.fits(attrs.evolve(usage, transaction_bytes=size), len(footprint.keys)):
            return SimulationFailed("the transaction exceeds the network's limits of one transaction")
        fee = fees.non_refundable_fee(usage) + refundable * 115 // 100
        priced = xdr.SorobanTransactionData(data.ext, data.resources, xdr.Int64(fee))
        return Simulation(priced, fee, None, (), (), self._changes(), None)

    def _changes(self) -> tuple[Change, ...]:
        found = []
        for key, entry in self._overlay.writes.items():
            before = self._overlay.before(key)
            if before is None and entry is None:
                continue
            text = xdr.LedgerKey.from_xdr_bytes(key).to_xdr()
            found.append(Change(text, _entry_text(before), _entry_text(entry)))
        return tuple(found)


class _Below:
    """What is below an overlay, to try something else on it."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay

    @property
    def header(self) -> Header:
        return self._overlay.header

    def get(self, key: bytes) -> Entry | None:
        return self._overlay.before(key)


def _entry_text(entry: Entry | None) -> str | None:
    return entry.ledger_entry().to_xdr() if entry is not None else None


def _go_name(kind: xdr.OperationType) -> str:
    """Return an operation's type as a node calls it: `OperationTypePayment`."""
    return "OperationType" + "".join(word.capitalize() for word in kind.name.split("_"))
