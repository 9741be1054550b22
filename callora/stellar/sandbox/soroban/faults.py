"""Why a contract call fails: the host's errors and the contracts' own, as XDR and as text."""

from enum import IntEnum
from typing import Final

from stellar_sdk import xdr

_TYPES: Final = {
    "WasmVm": xdr.SCErrorType.SCE_WASM_VM,
    "Context": xdr.SCErrorType.SCE_CONTEXT,
    "Storage": xdr.SCErrorType.SCE_STORAGE,
    "Object": xdr.SCErrorType.SCE_OBJECT,
    "Crypto": xdr.SCErrorType.SCE_CRYPTO,
    "Events": xdr.SCErrorType.SCE_EVENTS,
    "Budget": xdr.SCErrorType.SCE_BUDGET,
    "Value": xdr.SCErrorType.SCE_VALUE,
    "Auth": xdr.SCErrorType.SCE_AUTH,
}
_CODES: Final = {
    "ArithDomain": xdr.SCErrorCode.SCEC_ARITH_DOMAIN,
    "IndexBounds": xdr.SCErrorCode.SCEC_INDEX_BOUNDS,
    "InvalidInput": xdr.SCErrorCode.SCEC_INVALID_INPUT,
    "MissingValue": xdr.SCErrorCode.SCEC_MISSING_VALUE,
    "ExistingValue": xdr.SCErrorCode.SCEC_EXISTING_VALUE,
    "ExceededLimit": xdr.SCErrorCode.SCEC_EXCEEDED_LIMIT,
    "InvalidAction": xdr.SCErrorCode.SCEC_INVALID_ACTION,
    "InternalError": xdr.SCErrorCode.SCEC_INTERNAL_ERROR,
    "UnexpectedType": xdr.SCErrorCode.SCEC_UNEXPECTED_TYPE,
    "UnexpectedSize": xdr.SCErrorCode.SCEC_UNEXPECTED_SIZE,
}
_REFUSED: Final = "escalating Ok(ScErrorType::Contract) frame-exit to Err"
"""What the host writes down where a contract returns an error."""
_TYPE_NAMES: Final = {kind: name for name, kind in _TYPES.items()}
_CODE_NAMES: Final = {code: name for name, code in _CODES.items()}


class HostError(Exception):
    """A call failed, and everything that it did is dropped."""

    def __init__(self, kind: str, code: str, why: str) -> None:
        """Make one.

        Args:
            kind: `Auth`, `Storage` …, as in `Error(Auth, InvalidAction)`.
            code: `InvalidAction` …
            why: for the diagnostic event.
        """
        super().__init__(f"Error({kind}, {code}): {why}")
        self.error = xdr.SCError(_TYPES[kind], code=_CODES[code])
        self.why = why
        self.told = False
        """Whether the diagnostic event of where it began is written."""


class ContractError(HostError):
    """A contract refused, by a rule of its own."""

    def __init__(self, number: IntEnum | int, why: str = _REFUSED) -> None:
        """Make one.

        Args:
            number: N of `Error(Contract, #N)`.
            why: for the diagnostic event.
        """
        Exception.__init__(self, f"Error(Contract, #{int(number)}): {why}")
        self.error = xdr.SCError(xdr.SCErrorType.SCE_CONTRACT, contract_code=xdr.Uint32(int(number)))
        self.why = why
        self.told = False


class Trap(HostError):
    """A contract panicked with a text: on a real network only its log would say which."""

    def __init__(self, why: str) -> None:
        """Make one.

        Args:
            why: the text of the panic.
        """
        super().__init__("WasmVm", "InvalidAction", why)


class Archived(Exception):
    """An entry of the footprint is archived, and the transaction does not say that it is to be restored."""


class OverResources(Exception):
    """More was used than the transaction declares, or than any may."""

    def __init__(self, why: str) -> None:
        """Make one.

        Args:
            why: which resource, for the diagnostic event.
        """
        super().__init__(why)
        self.why = why


class OverRefundable(Exception):
    """Rent and events cost more than is left of the resource fee."""


def error_text(error: xdr.SCError) -> str:
    """Return an error as a node writes it: `Error(Contract, #5)`, `Error(Auth, InvalidAction)`."""
    if error.type == xdr.SCErrorType.SCE_CONTRACT:
        assert error.contract_code is not None
        return f"Error(Contract, #{error.contract_code.uint32})"
    assert error.code is not None
    return f"Error({_TYPE_NAMES[error.type]}, {_CODE_NAMES[error.code]})"
