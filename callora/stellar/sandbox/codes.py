"""Result codes as Horizon writes them."""

from typing import Any, Final

from stellar_sdk import xdr

_TRANSACTION: Final = {"NO_ACCOUNT": "no_source_account", "BAD_MIN_SEQ_AGE_OR_GAP": "bad_minseq_age_or_gap"}
_OPERATION: Final = {
    "opBAD_AUTH": "op_bad_auth",
    "opNO_ACCOUNT": "op_no_source_account",
    "opNOT_SUPPORTED": "op_not_supported",
    "opTOO_MANY_SUBENTRIES": "op_too_many_subentries",
    "opEXCEEDED_WORK_LIMIT": "op_exceeded_work_limit",
    "opTOO_MANY_SPONSORING": "op_too_many_sponsoring",
    "CREATE_ACCOUNT_ALREADY_EXIST": "op_already_exists",
    "MANAGE_DATA_NAME_NOT_FOUND": "op_data_name_not_found",
    "MANAGE_DATA_INVALID_NAME": "op_data_invalid_name",
    "INVOKE_HOST_FUNCTION_TRAPPED": "function_trapped",
    "INVOKE_HOST_FUNCTION_RESOURCE_LIMIT_EXCEEDED": "resource_limit_exceeded",
    "INVOKE_HOST_FUNCTION_ENTRY_ARCHIVED": "entry_archived",
    "INVOKE_HOST_FUNCTION_INSUFFICIENT_REFUNDABLE_FEE": "insufficient_refundable_fee",
    "EXTEND_FOOTPRINT_TTL_RESOURCE_LIMIT_EXCEEDED": "resource_limit_exceeded",
    "EXTEND_FOOTPRINT_TTL_INSUFFICIENT_REFUNDABLE_FEE": "insufficient_refundable_fee",
    "RESTORE_FOOTPRINT_RESOURCE_LIMIT_EXCEEDED": "resource_limit_exceeded",
    "RESTORE_FOOTPRINT_INSUFFICIENT_REFUNDABLE_FEE": "insufficient_refundable_fee",
}
"""Those that are no plain transcription of the network's name."""
_PREFIXES: Final = (
    "CREATE_ACCOUNT_",
    "PAYMENT_",
    "CHANGE_TRUST_",
    "SET_OPTIONS_",
    "MANAGE_DATA_",
    "BUMP_SEQUENCE_",
    "SET_TRUST_LINE_FLAGS_",
    "INVOKE_HOST_FUNCTION_",
    "EXTEND_FOOTPRINT_TTL_",
    "RESTORE_FOOTPRINT_",
)


def transaction_code(code: xdr.TransactionResultCode) -> str:
    """Return a transaction's code: `tx_bad_seq`."""
    name = code.name.removeprefix("tx")
    return "tx_" + _TRANSACTION.get(name, name.lower())


def operation_code(result: xdr.OperationResult) -> str:
    """Return an operation's code: `op_underfunded`."""
    return operation_code_name(result.code.name if result.tr is None else _code_of(result.tr).name)


def operation_code_name(name: str) -> str:
    """Return an operation's code by the network's own name for it, such as `PAYMENT_UNDERFUNDED`."""
    if name in _OPERATION:
        return _OPERATION[name]
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return "op_" + name.removeprefix(prefix).lower()
    raise AssertionError(f"no name for {name}")


def _code_of(tr: xdr.OperationResultTr) -> Any:
    for name, value in vars(tr).items():
        if value is not None and name != "type":
            return value.code
    raise AssertionError("a result without a result")


def result_codes(result: xdr.TransactionResult) -> dict[str, Any]:
    """Return what Horizon tells of a result: the code of the transaction, and of each operation it got to."""
    told: dict[str, Any] = {"transaction": transaction_code(result.result.code)}
    operations = result.result.results
    pair = result.result.inner_result_pair
    if pair is not None:
        told["inner_transaction"] = transaction_code(pair.result.result.code)
        operations = pair.result.result.results
    if operations is not None:
        told["operations"] = [operation_code(each) for each in operations]
    return told
