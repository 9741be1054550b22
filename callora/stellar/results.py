"""What the network says of a transaction, read from its XDR: result codes, what a contract returned, why it failed."""

import re
from collections.abc import Iterable
from typing import Final

import attrs
from stellar_sdk import Address, xdr

from callora.ledger.chain import ContractFault

REASON_CHARS_MAX: Final = 500
_CONTRACT_ERROR: Final = re.compile(r"Error\(Contract, ?#([0-9]{1,10})\)")
_INNER: Final = (
    xdr.TransactionResultCode.txFEE_BUMP_INNER_SUCCESS,
    xdr.TransactionResultCode.txFEE_BUMP_INNER_FAILED,
)
_RESULTS: Final = (xdr.TransactionResultCode.txSUCCESS, xdr.TransactionResultCode.txFAILED)


@attrs.frozen
class Outcome:
    """What a transaction result says."""

    successful: bool
    result_code: str
    """`tx_success`, `tx_bad_seq` …; of a fee-bump whose inner transaction was refused, the inner one's."""
    operation_code: str | None
    """Of the first operation that failed: `trapped`, `underfunded`, `bad_auth` …"""
    fee_charged: int


def read_result(result_xdr: str) -> Outcome:
    """Return what a result says.

    Args:
        result_xdr: base64 XDR of a TransactionResult.

    Raises:
        Exception: whatever the SDK raises for what it cannot read.
    """
    read = xdr.TransactionResult.from_xdr(result_xdr)
    code, operations = read.result.code, read.result.results
    successful = code in (xdr.TransactionResultCode.txSUCCESS, xdr.TransactionResultCode.txFEE_BUMP_INNER_SUCCESS)
    if code in _INNER and read.result.inner_result_pair is not None:
        inner = read.result.inner_result_pair.result.result
        operations = inner.results
        code = code if inner.code in _RESULTS else inner.code
    failed = None if successful else next((name for name in map(_operation_code, operations or ()) if name), None)
    return Outcome(successful, f"tx_{code.name.removeprefix('tx').lower()}", failed, read.fee_charged.int64)


def _operation_code(result: xdr.OperationResult) -> str | None:
    """Return an operation's code without the operation's own name; None for a success."""
    if result.tr is None:
        return result.code.name.removeprefix("op").lower()
    operation = result.tr.type.name
    told = next(value for name, value in vars(result.tr).items() if name != "type" and value is not None)
    name: str = told.code.name
    # SET_TRUST_LINE_FLAGS_MALFORMED of a SET_TRUST_LINE_FLAGS; of BUMP_SEQUENCE it is BUMP_SEQUENCE_BAD_SEQ
    name = name.removeprefix(f"{operation}_").lower()
    return None if name == "success" else name


def read_meta(meta_xdr: str) -> tuple[str | None, tuple[xdr.DiagnosticEvent, ...]]:
    """Return what a contract call returned, in base64 XDR, and its diagnostic events where the node keeps them.

    Args:
        meta_xdr: base64 XDR of a TransactionMeta; version 4 since protocol 23, 3 before.

    Raises:
        Exception: whatever the SDK raises for what it cannot read.
    """
    meta = xdr.TransactionMeta.from_xdr(meta_xdr)
    if meta.v4 is not None:
        value = meta.v4.soroban_meta.return_value if meta.v4.soroban_meta is not None else None
        return (None if value is None else value.to_xdr(), tuple(meta.v4.diagnostic_events))
    if meta.v3 is not None and meta.v3.soroban_meta is not None:
        soroban = meta.v3.soroban_meta
        return soroban.return_value.to_xdr(), tuple(soroban.diagnostic_events)
    return None, ()


def read_diagnostics(events: Iterable[str]) -> tuple[xdr.DiagnosticEvent, ...]:
    """Return diagnostic events from base64 XDR.

    Raises:
        Exception: whatever the SDK raises for what it cannot read.
    """
    return tuple(map(xdr.DiagnosticEvent.from_xdr, events))


def contract_fault(events: Iterable[xdr.DiagnosticEvent], text: str) -> ContractFault:
    """Return why a contract call failed.

    An error of a contract that the called one called comes up through all of them with the same number, so the first
    event that tells of it says whose rule it is.

    Args:
        text: what the node says besides, such as a simulation's error.
    """
    reason = text[:REASON_CHARS_MAX]
    for each in events:
        if each.event.body.v0 is None:
            continue
        topics = each.event.body.v0.topics
        if len(topics) < 2 or topics[0].sym is None or topics[0].sym.sc_symbol != b"error":
            continue
        error = topics[1].error
        if error is None:
            continue
        reason = reason or _said(error)
        if error.type == xdr.SCErrorType.SCE_CONTRACT and error.contract_code is not None:
            owner = each.event.contract_id
            return ContractFault(
                error.contract_code.uint32,
                reason,
                None if owner is None else Address.from_raw_contract(owner.contract_id.hash).address,
            )
    told = _CONTRACT_ERROR.search(text)
    return ContractFault(None if told is None else int(told[1]), reason or "no reason given")


def _said(error: xdr.SCError) -> str:
    if error.contract_code is not None:
        return f"Error(Contract, #{error.contract_code.uint32})"
    kind = error.type.name.removeprefix("SCE_").title()
    return f"Error({kind}, {error.code.name.removeprefix('SCEC_') if error.code is not None else '?'})"
