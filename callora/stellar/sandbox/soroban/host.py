"""The host: calls of contracts, what they see of the ledger, the events they publish, and the instructions they use.

A contract is a class whose functions are declared with `function`; an instance of it lives as long as one call.
Contracts see typed values: the host turns arguments into them, and results back, as the contract's own types say.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Final, TypeVar

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.soroban.authorization import Authorization
from callora.stellar.sandbox.soroban.faults import HostError, OverResources, error_text
from callora.stellar.sandbox.soroban.storage import (
    INSTANCE_KEY,
    PERSISTENT,
    TEMPORARY,
    Storage,
    code_ledger_key,
    data_ledger_key,
    instance_ledger_key,
)
from callora.stellar.sandbox.soroban.values import (
    BYTES,
    STRING,
    VOID,
    VOID_VALUE,
    Shape,
    Slot,
    Unfit,
    address_text,
    sc_address,
    sorted_map,
    symbol,
    value_text,
    vec_value,
)
from callora.stellar.sandbox.state import LedgerContext

T = TypeVar("T")
_Function = TypeVar("_Function", bound=Callable[..., Any])

CALL_INSTRUCTIONS: Final = 650_000
"""A call of a contract that has code; one of an asset's contract costs a third."""
_READ_INSTRUCTIONS: Final = 25_000
_WRITE_INSTRUCTIONS: Final = 55_000
_EVENT_INSTRUCTIONS: Final = 20_000
_ARGUMENT_INSTRUCTIONS: Final = 4_000
_DEPTH_MAX: Final = 10
TOPICS_MAX: Final = 4
_CONTRACT_DATA: Final = xdr.LedgerEntryType.CONTRACT_DATA
_CONTRACT_EVENT: Final = xdr.ContractEventType.CONTRACT
_DIAGNOSTIC_EVENT: Final = xdr.ContractEventType.DIAGNOSTIC
_FN: Final = xdr.SorobanAuthorizedFunctionType


@attrs.frozen
class Declared:
    """A function of a contract, as callers see it."""

    attribute: str
    arguments: tuple[Shape[Any], ...]
    returns: Shape[Any]


def function(*arguments: Shape[Any], returns: Shape[Any] = VOID) -> Callable[[_Function], _Function]:
    """Declare a method as a function of the contract, under its own name.

    Args:
        arguments: the shapes of its arguments, in order.
        returns: the shape of its result.
    """

    def mark(method: _Function) -> _Function:
        method.__declared__ = Declared(method.__name__, arguments, returns)  # type: ignore[attr-defined]
        return method

    return mark


class Contract:
    """A contract while one of its functions runs."""

    functions: ClassVar[dict[str, Declared]] = {}
    native: ClassVar[bool] = False
    """Whether it is part of the network and has no code of its own."""

    def __init__(self, host: "Host", address: str, caller: str | None) -> None:
        """Make one, for one call.

        Args:
            address: its own, `C…`.
            caller: the contract that called it; None where a transaction did.
        """
        self.host = host
        self.address = address
        self.caller = caller
        self.instance = Instance(host, address)
        self.persistent = Entries(host, address, PERSISTENT)
        self.temporary = Entries(host, address, TEMPORARY)

    def __init_subclass__(cls) -> None:
        declared = {name: method.__declared__ for name, method in vars(cls).items() if hasattr(method, "__declared__")}
        cls.functions = {**cls.functions, **declared}

    @property
    def timestamp(self) -> int:
        """When the ledger being made closes, seconds since 1970."""
        return self.host.context.closed_at

    def require_auth(self, address: str) -> None:
        """Require that an address allowed this very call.

        Raises:
            HostError: it did not.
        """
        self.host.require_auth(address)

    def publish(self, topics: Sequence[xdr.SCVal], data: xdr.SCVal) -> None:
        """Publish an event, which counts only if the whole transaction succeeds."""
        self.host.publish(self.address, topics, data)

    def call(self, contract: str, name: str, arguments: Sequence[xdr.SCVal], returns: Shape[T]) -> T:
        """Call another contract; whatever goes wrong there goes wrong here.

        Raises:
            HostError: it failed, or answered something else.
        """
        try:
            return returns.decode(self.host.call(contract, name, list(arguments)))
        except Unfit as error:
            raise HostError("Value", "UnexpectedType", str(error)) from error


class Instance:
    """The storage within a contract's own entry: all of it is read and written with any of it."""

    def __init__(self, host: "Host", contract: str) -> None:
        """Make one, for one call."""
        self._host = host
        self._contract = contract
        self._key = instance_ledger_key(contract)
        self._entries: dict[bytes, xdr.SCMapEntry] | None = None
        self._changed = False

    def _loaded(self) -> dict[bytes, xdr.SCMapEntry]:
        if self._entries is None:
            storage = self._host.instance_of(self._contract).storage
            self._entries = {entry.key.to_xdr_bytes(): entry for entry in storage.sc_map} if storage is not None else {}
        return self._entries

    def get(self, place: Slot[T]) -> T | None:
        """Return what is at a place; None where nothing is."""
        found = self._loaded().get(place.raw)
        return place.shape.decode(found.val) if found is not None else None

    def has(self, place: Slot[Any]) -> bool:
        """Tell whether anything is at a place."""
        return place.raw in self._loaded()

    def set(self, place: Slot[T], value: T) -> None:
        """Put a value at a place."""
        self._loaded()[place.raw] = xdr.SCMapEntry(place.key, place.shape.encode(value))
        self._changed = True

    def remove(self, place: Slot[Any]) -> None:
        """Take away what is at a place, if anything is."""
        if self._loaded().pop(place.raw, None) is not None:
            self._changed = True

    def extend_ttl(self, threshold: int, extend_to: int) -> None:
        """Extend the life of the contract and of its code, where at most `threshold` ledgers of it are left."""
        self._host.storage.extend(self._key, threshold, extend_to)
        executable = self._host.instance_of(self._contract).executable
        if executable.wasm_hash is not None:
            self._host.storage.extend(code_ledger_key(executable.wasm_hash.hash), threshold, extend_to)

    def save(self) -> None:
        """Write what was changed, once the call is over."""
        if self._changed and self._entries is not None:
            executable = self._host.instance_of(self._contract).executable
            self._host.put_instance(self._contract, executable, self._entries.values())
            self._changed = False


class Entries:
    """Entries of a contract's own, each with its own life."""

    def __init__(self, host: "Host", contract: str, durability: xdr.ContractDataDurability) -> None:
        """Make one, for one call."""
        self._host = host
        self._contract = contract
        self._durability = durability

    def _key(self, place: Slot[Any]) -> bytes:
        return data_ledger_key(self._contract, place.raw, self._durability)

    def get(self, place: Slot[T]) -> T | None:
        """Return what is at a place; None where nothing is."""
        self._host.charge(_READ_INSTRUCTIONS)
        entry = self._host.storage.get(self._key(place))
        if entry is None:
            return None
        assert entry.data.contract_data is not None
        return place.shape.decode(entry.data.contract_data.val)

    def has(self, place: Slot[Any]) -> bool:
        """Tell whether anything is at a place."""
        self._host.charge(_READ_INSTRUCTIONS)
        return self._host.storage.get(self._key(place)) is not None

    def set(self, place: Slot[T], value: T) -> None:
        """Put a value at a place.

        Raises:
            HostError: the entry is larger than any may be.
        """
        self._host.charge(_WRITE_INSTRUCTIONS)
        data = xdr.ContractDataEntry(
            xdr.ExtensionPoint(0),
            sc_address(self._contract),
            place.key,
            self._durability,
            place.shape.encode(value),
        )
        self._host.put(self._key(place), xdr.LedgerEntryData(_CONTRACT_DATA, contract_data=data))

    def remove(self, place: Slot[Any]) -> None:
        """Take away what is at a place, if anything is."""
        self._host.charge(_WRITE_INSTRUCTIONS)
        self._host.storage.delete(self._key(place))

    def extend_ttl(self, place: Slot[Any], threshold: int, extend_to: int) -> None:
        """Extend the life of an entry, where at most `threshold` ledgers of it are left."""
        self._host.storage.extend(self._key(place), threshold, extend_to)


@attrs.frozen
class _Frame:
    """One call under way."""

    contract: str | None
    """None where a contract is being created."""
    function: xdr.SorobanAuthorizedFunction


class Host:
    """Everything that one host function does."""

    def __init__(
        self,
        storage: Storage,
        context: LedgerContext,
        models: Callable[[xdr.ContractExecutable], type[Contract] | None],
        *,
        instructions: int,
    ) -> None:
        """Make one.

        Args:
            models: returns which class an executable is; None where there is none.
            instructions: how many may be used.
        """
        self.storage = storage
        self.context = context
        self._models = models
        self._instructions_max = instructions
        self.instructions = 0
        """How many were used."""
        self.authorization: Authorization
        """Set before the first call; it needs the host's meter."""
        self.events: list[xdr.ContractEvent] = []
        self.diagnostics: list[xdr.DiagnosticEvent] = []
        self._frames: list[_Frame] = []

    def charge(self, instructions: int) -> None:
        """Use instructions.

        Raises:
            OverResources: there are not so many.
        """
        self.instructions += instructions
        if self.instructions > self._instructions_max:
            raise OverResources("operation instructions exceeds amount specified")

    # Calls.

    def call(self, contract: str, name: str, arguments: list[xdr.SCVal]) -> xdr.SCVal:
        """Call a function of a contract.

        Raises:
            HostError: it failed.
            OverResources: too many instructions.
        """
        arguments_xdr = xdr.InvokeContractArgs(sc_address(contract), xdr.SCSymbol(name.encode()), arguments)
        authorized = xdr.SorobanAuthorizedFunction(
            _FN.SOROBAN_AUTHORIZED_FUNCTION_TYPE_CONTRACT_FN, contract_fn=arguments_xdr
        )
        caller = self._frames[-1].contract if self._frames else None
        self._diagnose(caller, [symbol("fn_call"), BYTES.encode(_raw(contract)), symbol(name)], _joined(arguments))
        try:
            return self._framed(_Frame(contract, authorized), lambda: self._run(contract, name, arguments, caller))
        except HostError as error:
            self.tell(contract, error)
            if caller is not None:
                self._diagnose(
                    caller,
                    [symbol("error"), _error_value(error.error)],
                    vec_value([STRING.encode("contract call failed"), symbol(name), vec_value(arguments)]),
                )
            raise

    def _framed(self, frame: _Frame, run: Callable[[], xdr.SCVal]) -> xdr.SCVal:
        self._frames.append(frame)
        self.authorization.push()
        try:
            return run()
        finally:
            self.authorization.pop()
            self._frames.pop()

    def _run(self, contract: str, name: str, arguments: list[xdr.SCVal], caller: str | None) -> xdr.SCVal:
        if len(self._frames) > _DEPTH_MAX:
            raise HostError("Context", "ExceededLimit", "too many nested contract calls")
        if any(frame.contract == contract for frame in self._frames[:-1]):
            raise HostError("Context", "InvalidAction", "Contract re-entry is not allowed")
        executable = self.instance_of(contract).executable
        made = self._models(executable)
        if made is None:
            raise HostError("Storage", "MissingValue", "trying to get non-existing value for contract code")
        self._require_code(executable)
        self.charge(CALL_INSTRUCTIONS // 3 if made.native else CALL_INSTRUCTIONS)
        declared = made.functions.get(name)
        if declared is None:
            raise HostError("WasmVm", "MissingValue", "trying to invoke non-existent contract function")
        if len(declared.arguments) != len(arguments):
            raise HostError("WasmVm", "UnexpectedSize", f"{name} takes {len(declared.arguments)} arguments")
        self.charge(_ARGUMENT_INSTRUCTIONS * len(arguments))
        model = made(self, contract, caller)
        try:
            decoded = [shape.decode(value) for shape, value in zip(declared.arguments, arguments, strict=True)]
        except Unfit as error:
            kind, code = ("Value", "UnexpectedType") if made.native else ("WasmVm", "InvalidAction")
            raise HostError(kind, code, f"an argument of {name}: {error}") from error
        result: xdr.SCVal = declared.returns.encode(getattr(model, declared.attribute)(*decoded))
        model.instance.save()
        self._diagnose(contract, [symbol("fn_return"), symbol(name)], result)
        return result

    def require_auth(self, address: str) -> None:
        """Require that an address allowed the innermost call.

        Raises:
            HostError: it did not.
        """
        frame = self._frames[-1]
        if len(self._frames) > 1 and self._frames[-2].contract == address:
            return
        self.authorization.require(address, frame.function)

    # Contracts.

    def instance_of(self, contract: str) -> xdr.SCContractInstance:
        """Return a contract.

        Raises:
            HostError: there is none.
        """
        self.charge(_READ_INSTRUCTIONS)
        entry = self.storage.get(instance_ledger_key(contract))
        if entry is None:
            raise HostError("Storage", "MissingValue", "trying to get non-existing value for contract instance")
        assert entry.data.contract_data is not None
        assert entry.data.contract_data.val.instance is not None
        return entry.data.contract_data.val.instance

    def _require_code(self, executable: xdr.ContractExecutable) -> None:
        if executable.wasm_hash is None:
            return
        if self.storage.get(code_ledger_key(executable.wasm_hash.hash)) is None:
            raise HostError("Storage", "MissingValue", "trying to get non-existing value for contract code")

    def put_instance(
        self, contract: str, executable: xdr.ContractExecutable, entries: Collection[xdr.SCMapEntry]
    ) -> None:
        """Write a contract.

        Args:
            entries: what is in its own storage, in any order.

        Raises:
            HostError: it has become larger than an entry may be.
        """
        self.charge(_WRITE_INSTRUCTIONS)
        instance = xdr.SCContractInstance(executable, sorted_map(entries) if entries else None)
        value = xdr.SCVal(xdr.SCValType.SCV_CONTRACT_INSTANCE, instance=instance)
        data = xdr.ContractDataEntry(xdr.ExtensionPoint(0), sc_address(contract), INSTANCE_KEY, PERSISTENT, value)
        self.put(instance_ledger_key(contract), xdr.LedgerEntryData(_CONTRACT_DATA, contract_data=data))

    def put(self, key: bytes, data: xdr.LedgerEntryData) -> None:
        """Write an entry.

        Raises:
            HostError: it, or its key, is larger than one may be.
        """
        if len(key) > self.storage.limits.data_key_bytes:
            raise HostError("Storage", "ExceededLimit", "the key of the entry is too long")
        self.storage.put(key, data)

    def create(
        self,
        contract: str,
        executable: xdr.ContractExecutable,
        entries: Collection[xdr.SCMapEntry],
        deployer: str | None,
        asked: xdr.SorobanAuthorizedFunction,
    ) -> xdr.SCVal:
        """Create a contract.

        Args:
            contract: its id, which follows from who creates it.
            entries: what it has in its own storage at once.
            deployer: who has to allow it; None for an asset's contract, which anyone may create.
            asked: what is to be allowed.

        Returns:
            Its address.

        Raises:
            HostError: it is there already, or has no code that the sandbox knows.
        """

        def run() -> xdr.SCVal:
            if deployer is not None:
                self.require_auth(deployer)
            if self.storage.get(instance_ledger_key(contract)) is not None:
                raise HostError("Storage", "ExistingValue", "contract already exists")
            if self._models(executable) is None:
                raise HostError("Storage", "MissingValue", "Wasm does not exist")
            self._require_code(executable)
            self.put_instance(contract, executable, entries)
            return xdr.SCVal(xdr.SCValType.SCV_ADDRESS, address=sc_address(contract))

        self.charge(CALL_INSTRUCTIONS)
        try:
            return self._framed(_Frame(None, asked), run)
        except HostError as error:
            self.tell(contract, error)
            raise

    # Events.

    def publish(self, contract: str, topics: Sequence[xdr.SCVal], data: xdr.SCVal) -> None:
        """Publish an event of a contract.

        Args:
            topics: at most TOPICS_MAX.
        """
        assert len(topics) <= TOPICS_MAX
        self.charge(_EVENT_INSTRUCTIONS)
        event = _event(contract, _CONTRACT_EVENT, topics, data)
        self.events.append(event)
        self.diagnostics.append(xdr.DiagnosticEvent(True, event))

    def _diagnose(self, contract: str | None, topics: Sequence[xdr.SCVal], data: xdr.SCVal) -> None:
        self.diagnostics.append(xdr.DiagnosticEvent(True, _event(contract, _DIAGNOSTIC_EVENT, topics, data)))

    def tell(self, contract: str | None, error: HostError) -> None:
        """Write down where an error began, once.

        Args:
            contract: where; None for the host itself.
        """
        if not error.told:
            error.told = True
            self._diagnose(contract, [symbol("error"), _error_value(error.error)], STRING.encode(error.why))

    def failed_diagnostics(self) -> tuple[xdr.DiagnosticEvent, ...]:
        """Return the diagnostic events of a call that failed: what contracts published counts no more."""
        return tuple(xdr.DiagnosticEvent(False, event.event) for event in self.diagnostics)


def _event(
    contract: str | None, kind: xdr.ContractEventType, topics: Sequence[xdr.SCVal], data: xdr.SCVal
) -> xdr.ContractEvent:
    of = xdr.ContractID(xdr.Hash(_raw(contract))) if contract is not None else None
    body = xdr.ContractEventBody(0, v0=xdr.ContractEventV0(list(topics), data))
    return xdr.ContractEvent(xdr.ExtensionPoint(0), of, kind, body)


def _raw(contract: str) -> bytes:
    of = sc_address(contract).contract_id
    assert of is not None
    return of.contract_id.hash


def _joined(arguments: list[xdr.SCVal]) -> xdr.SCVal:
    """Return arguments as the diagnostic event of a call has them."""
    if not arguments:
        return VOID_VALUE
    return arguments[0] if len(arguments) == 1 else vec_value(arguments)


def _error_value(error: xdr.SCError) -> xdr.SCVal:
    return xdr.SCVal(xdr.SCValType.SCV_ERROR, error=error)


def log_of(error: xdr.SCError, diagnostics: Sequence[xdr.DiagnosticEvent]) -> str:
    """Return a failed simulation's text, as a node writes it: the error, then the events, the newest first."""
    lines = [f"HostError: {error_text(error)}", "", "Event log (newest first):"]
    for number, diagnostic in enumerate(reversed(diagnostics)):
        event = diagnostic.event
        assert event.body.v0 is not None
        of = ""
        if event.contract_id is not None:
            address = xdr.SCAddress(xdr.SCAddressType.SC_ADDRESS_TYPE_CONTRACT, contract_id=event.contract_id)
            of = f"contract:{address_text(address)}, "
        topics = ", ".join(_topic_text(topic) for topic in event.body.v0.topics)
        kind = "Diagnostic" if event.type == _DIAGNOSTIC_EVENT else "Contract"
        failed = "" if diagnostic.in_successful_contract_call else "Failed "
        lines.append(
            f"   {number}: [{failed}{kind} Event{' (not emitted)' if failed else ''}] "
            f"{of}topics:[{topics}], data:{value_text(event.body.v0.data)}"
        )
    return "\n".join(lines) + "\n"


def _topic_text(value: xdr.SCVal) -> str:
    return error_text(value.error) if value.error is not None else value_text(value)
