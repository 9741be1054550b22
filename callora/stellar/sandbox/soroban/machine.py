"""Contract operations as the ledger applies them: what is refused, what is executed, and what it costs."""

import hashlib
from itertools import pairwise
from typing import Final

from stellar_sdk import xdr

from callora.stellar.sandbox.soroban import contracts
from callora.stellar.sandbox.soroban import limits as fees
from callora.stellar.sandbox.soroban.authorization import Enforced
from callora.stellar.sandbox.soroban.contracts.token import instance_entries
from callora.stellar.sandbox.soroban.faults import (
    Archived,
    HostError,
    OverRefundable,
    OverResources,
)
from callora.stellar.sandbox.soroban.host import Host
from callora.stellar.sandbox.soroban.limits import Limits, Usage
from callora.stellar.sandbox.soroban.storage import (
    Footprint,
    Storage,
    code_ledger_key,
    has_life,
    is_archived,
    is_temporary,
    kind_of,
)
from callora.stellar.sandbox.soroban.values import BYTES, SYMBOL, Unfit, address_text, contract_text
from callora.stellar.sandbox.state import (
    LedgerContext,
    Operation,
    OperationOutcome,
    Overlay,
    Reader,
    Transaction,
)

SOROBAN_OPERATIONS: Final = (
    xdr.OperationType.INVOKE_HOST_FUNCTION,
    xdr.OperationType.EXTEND_FOOTPRINT_TTL,
    xdr.OperationType.RESTORE_FOOTPRINT,
)
_Code = xdr.TransactionResultCode
_Invoked = xdr.InvokeHostFunctionResultCode
_Extended = xdr.ExtendFootprintTTLResultCode
_Restored = xdr.RestoreFootprintResultCode
_FOOTPRINT_KINDS: Final = (
    xdr.LedgerEntryType.ACCOUNT,
    xdr.LedgerEntryType.TRUSTLINE,
    xdr.LedgerEntryType.CONTRACT_DATA,
    xdr.LedgerEntryType.CONTRACT_CODE,
)


class SorobanMachine:
    """The contracts' half of the rules; see `state.Machine`."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        """Make one.

        Args:
            limits: the network's.
        """
        self.limits = limits

    def check(self, reader: Reader, transaction: Transaction) -> xdr.TransactionResultCode | None:
        """Return why a transaction cannot be admitted; None if it can."""
        kinds = [operation.body.type for operation in transaction.operations]
        if transaction.soroban is None or len(kinds) != 1 or kinds[0] not in SOROBAN_OPERATIONS:
            return _Code.txMALFORMED
        data = transaction.soroban
        footprint = Footprint.of(data.resources.footprint)
        if not _footprint_fits(data, footprint, self.limits) or not _memo_fits(transaction):
            return _Code.txSOROBAN_INVALID
        usage = declared_usage(data, footprint, size_of(transaction))
        if not self.limits.fits(usage, len(footprint.keys)):
            return _Code.txSOROBAN_INVALID
        if fees.non_refundable_fee(usage) > data.resource_fee.int64:
            return _Code.txSOROBAN_INVALID
        return None

    def apply(
        self, overlay: Overlay, context: LedgerContext, transaction: Transaction, operation: Operation
    ) -> OperationOutcome:
        """Apply the operation onto the overlay, which the caller commits or drops."""
        data = transaction.soroban
        assert data is not None, "checked when it was admitted"
        run = _Run(overlay, context, data, self.limits, size_of(transaction))
        body = operation.body
        if body.invoke_host_function_op is not None:
            return run.invoke(body.invoke_host_function_op, operation.source)
        if body.extend_footprint_ttl_op is not None:
            return run.extend(body.extend_footprint_ttl_op.extend_to.uint32)
        return run.restore()


def size_of(transaction: Transaction) -> int:
    """Return the bytes that a transaction pays for: of the inner one, where there is a fee-bump."""
    envelope = transaction.envelope
    if envelope.fee_bump is not None:
        assert envelope.fee_bump.tx.inner_tx.v1 is not None
        return len(envelope.fee_bump.tx.inner_tx.v1.to_xdr_bytes()) + 4
    return len(envelope.to_xdr_bytes())


def declared_usage(data: xdr.SorobanTransactionData, footprint: Footprint, transaction_bytes: int) -> Usage:
    """Return what a transaction declares that it will use.

    Args:
        footprint: of the same data.
    """
    resources = data.resources
    classic = sum(not has_life(key) for key in footprint.keys)
    return Usage(
        instructions=resources.instructions.uint32,
        disk_read_entries=classic + len(_archived_indices(data)),
        disk_read_bytes=resources.disk_read_bytes.uint32,
        write_entries=len(footprint.written),
        write_bytes=resources.write_bytes.uint32,
        transaction_bytes=transaction_bytes,
    )


def _archived_indices(data: xdr.SorobanTransactionData) -> list[int]:
    ext = data.ext.resource_ext
    return [index.uint32 for index in ext.archived_soroban_entries] if ext is not None else []


def _footprint_fits(data: xdr.SorobanTransactionData, footprint: Footprint, limits: Limits) -> bool:
    keys = footprint.keys
    if len(set(keys)) != len(keys):
        return False
    if any(kind_of(key) not in _FOOTPRINT_KINDS or len(key) > limits.data_key_bytes for key in keys):
        return False
    indices = _archived_indices(data)
    if any(later <= earlier for earlier, later in pairwise(indices)):
        return False
    written = footprint.written
    return all(index < len(written) and _is_durable(written[index]) for index in indices)


def _is_durable(key: bytes) -> bool:
    return has_life(key) and not is_temporary(key)


def _memo_fits(transaction: Transaction) -> bool:
    """Tell whether it has neither a memo nor a muxed source, where someone else than its source allows the call."""
    invoke = transaction.operations[0].body.invoke_host_function_op
    of_source = xdr.SorobanCredentialsType.SOROBAN_CREDENTIALS_SOURCE_ACCOUNT
    if invoke is None or all(entry.credentials.type == of_source for entry in invoke.auth):
        return True
    return transaction.body.memo.type == xdr.MemoType.MEMO_NONE and not transaction.operations[0].muxed


def perform(host: Host, what: xdr.HostFunction) -> xdr.SCVal:
    """Do what a host function says: call a contract, create one, or upload code.

    Returns:
        What it returned.

    Raises:
        HostError: it failed.
        OverResources: too many instructions.
    """
    try:
        if what.invoke_contract is not None:
            return _invoke(host, what.invoke_contract)
        return _upload(host, what.wasm) if what.wasm is not None else _create(host, what)
    except Unfit as error:
        raise HostError("Value", "InvalidInput", str(error)) from error


def _invoke(host: Host, called: xdr.InvokeContractArgs) -> xdr.SCVal:
    contract = address_text(called.contract_address)
    if not contract.startswith("C"):
        raise HostError("Context", "InvalidInput", "an account is no contract")
    name = SYMBOL.decode(xdr.SCVal(xdr.SCValType.SCV_SYMBOL, sym=called.function_name))
    return host.call(contract, name, list(called.args))


def _upload(host: Host, code: bytes) -> xdr.SCVal:
    if not contracts.is_known(code):
        raise HostError("WasmVm", "InvalidAction", "the sandbox executes its own contracts only, not WebAssembly")
    hashed = hashlib.sha256(code).digest()
    key = code_ledger_key(hashed)
    if host.storage.get(key) is None:
        host.storage.put(key, code_entry(code))
    return BYTES.encode(hashed)


def code_entry(code: bytes) -> xdr.LedgerEntryData:
    """Return the entry of a contract's code."""
    entry = xdr.ContractCodeEntry(xdr.ContractCodeEntryExt(0), xdr.Hash(hashlib.sha256(code).digest()), code)
    return xdr.LedgerEntryData(xdr.LedgerEntryType.CONTRACT_CODE, contract_code=entry)


def contract_id_of(network_id: bytes, preimage: xdr.ContractIDPreimage) -> str:
    """Return the id of a contract, which follows from who creates it, or from its asset."""
    hashed = xdr.HashIDPreimage(
        xdr.EnvelopeType.ENVELOPE_TYPE_CONTRACT_ID,
        contract_id=xdr.HashIDPreimageContractID(xdr.Hash(network_id), preimage),
    )
    return contract_text(hashlib.sha256(hashed.to_xdr_bytes()).digest())


def _create(host: Host, what: xdr.HostFunction) -> xdr.SCVal:
    functions = xdr.SorobanAuthorizedFunctionType
    first, second = what.create_contract, what.create_contract_v2
    if first is not None:
        preimage, executable = first.contract_id_preimage, first.executable
        asked = xdr.SorobanAuthorizedFunction(
            functions.SOROBAN_AUTHORIZED_FUNCTION_TYPE_CREATE_CONTRACT_HOST_FN, create_contract_host_fn=first
        )
    else:
        assert second is not None
        if second.constructor_args:
            raise HostError("Context", "InvalidInput", "the sandbox's contracts have no constructors")
        preimage, executable = second.contract_id_preimage, second.executable
        asked = xdr.SorobanAuthorizedFunction(
            functions.SOROBAN_AUTHORIZED_FUNCTION_TYPE_CREATE_CONTRACT_V2_HOST_FN, create_contract_v2_host_fn=second
        )
    contract = contract_id_of(host.context.network_id, preimage)
    is_asset = executable.type == xdr.ContractExecutableType.CONTRACT_EXECUTABLE_STELLAR_ASSET
    if is_asset != (preimage.from_asset is not None):
        raise HostError("Value", "InvalidInput", "an asset's contract is created from the asset, and no other is")
    deployer = address_text(preimage.from_address.address) if preimage.from_address is not None else None
    entries = instance_entries(preimage.from_asset) if preimage.from_asset is not None else []
    return host.create(contract, executable, entries, deployer, asked)


class _Run:
    """One operation being applied."""

    def __init__(
        self,
        overlay: Overlay,
        context: LedgerContext,
        data: xdr.SorobanTransactionData,
        limits: Limits,
        transaction_bytes: int,
    ) -> None:
        self._overlay = overlay
        self._context = context
        self._data = data
        self._limits = limits
        self._footprint = Footprint.of(data.resources.footprint)
        self._storage = Storage.enforced(overlay, limits, context.sequence, self._footprint)
        self._non_refundable = fees.non_refundable_fee(declared_usage(data, self._footprint, transaction_bytes))

    # InvokeHostFunction.

    def invoke(self, operation: xdr.InvokeHostFunctionOp, source: str) -> OperationOutcome:
        """Execute a host function.

        Args:
            source: the operation's, `G…`.
        """
        host = Host(
            self._storage,
            self._context,
            contracts.model_of,
            instructions=self._data.resources.instructions.uint32,
        )
        try:
            self._bring_back()
            self._check_disk_reads()
            host.authorization = Enforced(
                operation.auth,
                source=source,
                network_id=self._context.network_id,
                storage=self._storage,
                charge=host.charge,
            )
            value = perform(host, operation.host_function)
            rent, refundable = self._settle(host, value)
        except HostError as error:
            host.tell(None, error)
            return self._invoked(_Invoked.INVOKE_HOST_FUNCTION_TRAPPED, host)
        except OverResources as error:
            host.tell(None, HostError("Budget", "ExceededLimit", error.why))
            return self._invoked(_Invoked.INVOKE_HOST_FUNCTION_RESOURCE_LIMIT_EXCEEDED, host)
        except Archived:
            return self._invoked(_Invoked.INVOKE_HOST_FUNCTION_ENTRY_ARCHIVED, host)
        except OverRefundable:
            return self._invoked(_Invoked.INVOKE_HOST_FUNCTION_INSUFFICIENT_REFUNDABLE_FEE, host)
        hashed = hashlib.sha256(xdr.InvokeHostFunctionSuccessPreImage(value, host.events).to_xdr_bytes()).digest()
        code = _Invoked.INVOKE_HOST_FUNCTION_SUCCESS
        return OperationOutcome(
            succeeded=True,
            result=_result_of_invoke(xdr.InvokeHostFunctionResult(code, success=xdr.Hash(hashed))),
            return_value=value,
            events=tuple(host.events),
            diagnostics=tuple(host.diagnostics),
            non_refundable=self._non_refundable,
            refundable=refundable,
            rent=rent,
        )

    def _bring_back(self) -> None:
        """Restore the archived entries that the transaction names.

        Raises:
            Archived: there are others in its footprint.
        """
        named = {self._footprint.written[index] for index in _archived_indices(self._data)}
        for key in self._footprint.keys:
            entry = self._overlay.get(key)
            if entry is None or not is_archived(key, entry, self._context.sequence):
                continue
            if key not in named:
                raise Archived
            self._storage.restore(key)

    def _check_disk_reads(self) -> None:
        _, size = self._storage.disk_reads(self._footprint.keys)
        if size > self._data.resources.disk_read_bytes.uint32:
            raise OverResources("operation byte-read resources exceeds amount specified")

    def _check_writes(self) -> None:
        if self._storage.write_bytes() > self._data.resources.write_bytes.uint32:
            raise OverResources("operation byte-write resources exceeds amount specified")

    def _settle(self, host: Host, value: xdr.SCVal) -> tuple[int, int]:
        """Return what rent costs, and rent and events together.

        Raises:
            OverResources: too much was written, or told.
            OverRefundable: that is more than the fee has for it.
        """
        self._check_writes()
        told = events_bytes(host, value)
        if told > self._limits.events_bytes:
            raise OverResources("total events size exceeds network config maximum")
        rent = self._storage.rent()
        return rent, self._charge(rent + fees.events_fee(told))

    def _charge(self, refundable: int) -> int:
        if refundable > self._data.resource_fee.int64 - self._non_refundable:
            raise OverRefundable
        return refundable

    def _invoked(self, code: xdr.InvokeHostFunctionResultCode, host: Host) -> OperationOutcome:
        result = _result_of_invoke(xdr.InvokeHostFunctionResult(code))
        return self._failed(result, host.failed_diagnostics())

    def _failed(
        self, result: xdr.OperationResult, diagnostics: tuple[xdr.DiagnosticEvent, ...] = ()
    ) -> OperationOutcome:
        return OperationOutcome(
            succeeded=False, result=result, diagnostics=diagnostics, non_refundable=self._non_refundable
        )

    # ExtendFootprintTTL.

    def extend(self, ledgers: int) -> OperationOutcome:
        """Extend the lives of the entries in the footprint.

        Args:
            ledgers: how many are left then, at least.
        """
        read, written = self._footprint.read, self._footprint.written
        if written or not all(has_life(key) for key in read) or ledgers > self._limits.ledgers_max - 1:
            return self._extended(_Extended.EXTEND_FOOTPRINT_TTL_MALFORMED)
        for key in read:
            entry = self._overlay.get(key)
            if entry is not None and entry.live_until is not None and entry.live_until >= self._context.sequence:
                self._storage.extend(key, ledgers, ledgers)
        rent = self._storage.rent()
        try:
            self._charge(rent)
        except OverRefundable:
            return self._extended(_Extended.EXTEND_FOOTPRINT_TTL_INSUFFICIENT_REFUNDABLE_FEE)
        return self._extended(_Extended.EXTEND_FOOTPRINT_TTL_SUCCESS, rent)

    def _extended(self, code: xdr.ExtendFootprintTTLResultCode, rent: int = 0) -> OperationOutcome:
        made = xdr.OperationResultTr(
            xdr.OperationType.EXTEND_FOOTPRINT_TTL,
            extend_footprint_ttl_result=xdr.ExtendFootprintTTLResult(code),
        )
        result = xdr.OperationResult(xdr.OperationResultCode.opINNER, tr=made)
        if code != _Extended.EXTEND_FOOTPRINT_TTL_SUCCESS:
            return self._failed(result)
        return self._kept(result, rent)

    def _kept(self, result: xdr.OperationResult, rent: int) -> OperationOutcome:
        return OperationOutcome(
            succeeded=True, result=result, non_refundable=self._non_refundable, refundable=rent, rent=rent
        )

    # RestoreFootprint.

    def restore(self) -> OperationOutcome:
        """Bring back the archived entries in the footprint."""
        read, written = self._footprint.read, self._footprint.written
        if read or not all(_is_durable(key) for key in written):
            return self._brought_back(_Restored.RESTORE_FOOTPRINT_MALFORMED)
        for key in written:
            entry = self._overlay.get(key)
            if entry is not None and is_archived(key, entry, self._context.sequence):
                self._storage.restore(key)
        rent = self._storage.rent()
        try:
            self._check_disk_reads()
            self._check_writes()
            self._charge(rent)
        except OverResources:
            return self._brought_back(_Restored.RESTORE_FOOTPRINT_RESOURCE_LIMIT_EXCEEDED)
        except OverRefundable:
            return self._brought_back(_Restored.RESTORE_FOOTPRINT_INSUFFICIENT_REFUNDABLE_FEE)
        return self._brought_back(_Restored.RESTORE_FOOTPRINT_SUCCESS, rent)

    def _brought_back(self, code: xdr.RestoreFootprintResultCode, rent: int = 0) -> OperationOutcome:
        made = xdr.OperationResultTr(
            xdr.OperationType.RESTORE_FOOTPRINT, restore_footprint_result=xdr.RestoreFootprintResult(code)
        )
        result = xdr.OperationResult(xdr.OperationResultCode.opINNER, tr=made)
        if code != _Restored.RESTORE_FOOTPRINT_SUCCESS:
            return self._failed(result)
        return self._kept(result, rent)


def events_bytes(host: Host, value: xdr.SCVal) -> int:
    """Return the bytes of a call's events and return value together."""
    return sum(len(event.to_xdr_bytes()) for event in host.events) + len(value.to_xdr_bytes())


def _result_of_invoke(result: xdr.InvokeHostFunctionResult) -> xdr.OperationResult:
    made = xdr.OperationResultTr(xdr.OperationType.INVOKE_HOST_FUNCTION, invoke_host_function_result=result)
    return xdr.OperationResult(xdr.OperationResultCode.opINNER, tr=made)
