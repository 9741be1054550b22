"""The classic operations that the sandbox models, each by the network's rules and with the network's result codes.

Every other operation is refused as the network refuses what it does not support: `op_not_supported`. Signers that are
no ed25519 keys (pre-authorised transactions, hashes, signed payloads) are refused in the same way.

Source: stellar-core's operation frames, from protocol 23 on.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.accounts import (
    LINE_AUTHORIZED,
    LINE_CLAWBACK,
    LINE_MAINTAIN,
    SUBENTRIES_MAX,
    NotMoved,
    changed,
    credit,
    debit,
    find_account,
    find_trust_line,
    issuer_of,
    new_account,
    new_trust_line,
    put_account,
    put_trust_line,
    reserve,
    with_entries,
)
from callora.stellar.sandbox.state import LedgerContext, Operation, Overlay, address_of, data_key, trust_line_key

Level: TypeAlias = Literal["low", "medium", "high"]
"""Which of an account's thresholds an operation's signatures must reach."""
Code: TypeAlias = IntEnum
"""A result code: of the operation's own kind, or an OperationResultCode."""

SIGNERS_MAX: Final = 20
_NATIVE_ASSET: Final = xdr.Asset(xdr.AssetType.ASSET_TYPE_NATIVE)
_NOT_SUPPORTED: Final = xdr.OperationResultCode.opNOT_SUPPORTED
_TOO_MANY: Final = xdr.OperationResultCode.opTOO_MANY_SUBENTRIES
_ISSUER_REQUIRED: Final = xdr.AccountFlags.AUTH_REQUIRED_FLAG.value
_ISSUER_REVOCABLE: Final = xdr.AccountFlags.AUTH_REVOCABLE_FLAG.value
_ISSUER_IMMUTABLE: Final = xdr.AccountFlags.AUTH_IMMUTABLE_FLAG.value
_ISSUER_CLAWBACK: Final = xdr.AccountFlags.AUTH_CLAWBACK_ENABLED_FLAG.value
_ISSUER_FLAGS: Final = _ISSUER_REQUIRED | _ISSUER_REVOCABLE | _ISSUER_IMMUTABLE | _ISSUER_CLAWBACK
_LINE_FLAGS: Final = LINE_AUTHORIZED | LINE_MAINTAIN | LINE_CLAWBACK
_LINE_AUTH: Final = LINE_AUTHORIZED | LINE_MAINTAIN

_Payment: TypeAlias = xdr.PaymentResultCode
_Create: TypeAlias = xdr.CreateAccountResultCode
_Trust: TypeAlias = xdr.ChangeTrustResultCode
_Options: TypeAlias = xdr.SetOptionsResultCode
_Data: TypeAlias = xdr.ManageDataResultCode
_Bump: TypeAlias = xdr.BumpSequenceResultCode
_Flags: TypeAlias = xdr.SetTrustLineFlagsResultCode


@attrs.frozen
class _Rules:
    """One kind of operation."""

    level: Callable[[xdr.OperationBody], Level]
    check: Callable[[Operation], Code | None]
    """What is wrong with it whatever the ledger holds."""
    apply: Callable[[Overlay, LedgerContext, Operation], Code]
    codes: type[Code]
    result: Callable[[Any], xdr.OperationResultTr]


def level_of(operation: Operation) -> Level:
    """Return the threshold of the source account that an operation needs."""
    if operation.body.type in (_TYPES.EXTEND_FOOTPRINT_TTL, _TYPES.RESTORE_FOOTPRINT):
        return "low"
    rules = _RULES.get(operation.body.type)
    return rules.level(operation.body) if rules is not None else "medium"


def check(operation: Operation) -> Code | None:
    """Return what is wrong with an operation whatever the ledger holds; None if nothing is."""
    rules = _RULES.get(operation.body.type)
    return rules.check(operation) if rules is not None else _NOT_SUPPORTED


def apply(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    """Apply an operation that `check` found nothing wrong with, and whose source account exists.

    Returns:
        Its result code, 0 for success; otherwise the caller drops the overlay.
    """
    return _RULES[operation.body.type].apply(overlay, context, operation)


def result_of(operation: Operation, code: Code | None) -> xdr.OperationResult:
    """Return a code as the result of an operation.

    Args:
        code: None for success.
    """
    if isinstance(code, xdr.OperationResultCode):
        return xdr.OperationResult(code)
    rules = _RULES[operation.body.type]
    return xdr.OperationResult(xdr.OperationResultCode.opINNER, rules.result(rules.codes(0) if code is None else code))


def _check_payment(operation: Operation) -> Code | None:
    payment = operation.body.payment_op
    assert payment is not None
    return _Payment.PAYMENT_MALFORMED if payment.amount.int64 <= 0 or not _is_asset(payment.asset) else None


_PAYMENT_DESTINATION: Final = {
    NotMoved.NO_ACCOUNT: _Payment.PAYMENT_NO_DESTINATION,
    NotMoved.NO_TRUST: _Payment.PAYMENT_NO_TRUST,
    NotMoved.NOT_AUTHORIZED: _Payment.PAYMENT_NOT_AUTHORIZED,
    NotMoved.LINE_FULL: _Payment.PAYMENT_LINE_FULL,
}
_PAYMENT_SOURCE: Final = {
    NotMoved.NO_TRUST: _Payment.PAYMENT_SRC_NO_TRUST,
    NotMoved.NOT_AUTHORIZED: _Payment.PAYMENT_SRC_NOT_AUTHORIZED,
    NotMoved.UNDERFUNDED: _Payment.PAYMENT_UNDERFUNDED,
}


def _apply_payment(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    payment = operation.body.payment_op
    assert payment is not None
    asset, amount, destination = payment.asset, payment.amount.int64, account_of(payment.destination)
    if asset.type == _NATIVE_ASSET.type and destination == operation.source:
        return _Payment.PAYMENT_SUCCESS
    if issuer_of(asset) != destination and find_account(overlay, destination) is None:
        return _Payment.PAYMENT_NO_DESTINATION
    refused = credit(overlay, destination, asset, amount)
    if refused is not None:
        return _PAYMENT_DESTINATION[refused]
    refused = debit(overlay, operation.source, asset, amount, context.base_reserve)
    return _PAYMENT_SOURCE[refused] if refused is not None else _Payment.PAYMENT_SUCCESS


def _check_create(operation: Operation) -> Code | None:
    create = operation.body.create_account_op
    assert create is not None
    wrong = create.starting_balance.int64 < 0 or address_of(create.destination) == operation.source
    return _Create.CREATE_ACCOUNT_MALFORMED if wrong else None


def _apply_create(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    create = operation.body.create_account_op
    assert create is not None
    address, balance = address_of(create.destination), create.starting_balance.int64
    if find_account(overlay, address) is not None:
        return _Create.CREATE_ACCOUNT_ALREADY_EXIST
    account = new_account(address, balance, context.sequence << 32)
    if balance < reserve(account, context.base_reserve):
        return _Create.CREATE_ACCOUNT_LOW_RESERVE
    if debit(overlay, operation.source, _NATIVE_ASSET, balance, context.base_reserve) is not None:
        return _Create.CREATE_ACCOUNT_UNDERFUNDED
    put_account(overlay, account)
    return _Create.CREATE_ACCOUNT_SUCCESS


def _check_trust(operation: Operation) -> Code | None:
    trust = operation.body.change_trust_op
    assert trust is not None
    if trust.line.type == xdr.AssetType.ASSET_TYPE_POOL_SHARE:
        return _NOT_SUPPORTED
    asset = asset_of(trust.line)
    wrong = trust.limit.int64 < 0 or asset.type == _NATIVE_ASSET.type or not _is_asset(asset)
    return _Trust.CHANGE_TRUST_MALFORMED if wrong or issuer_of(asset) == operation.source else None


def _apply_trust(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    trust = operation.body.change_trust_op
    assert trust is not None
    asset, limit = asset_of(trust.line), trust.limit.int64
    line, account = find_trust_line(overlay, operation.source, asset), find_account(overlay, operation.source)
    issuer = issuer_of(asset)
    assert issuer is not None
    assert account is not None
    if line is not None and limit < line.balance.int64:
        return _Trust.CHANGE_TRUST_INVALID_LIMIT
    if line is not None and limit == 0:
        overlay.delete(trust_line_key(operation.source, asset))
        put_account(overlay, with_entries(account, -1))
        return _Trust.CHANGE_TRUST_SUCCESS
    if limit == 0:
        return _Trust.CHANGE_TRUST_INVALID_LIMIT
    issuing = find_account(overlay, issuer)
    if issuing is None:
        return _Trust.CHANGE_TRUST_NO_ISSUER
    if line is not None:
        put_trust_line(overlay, asset, changed(line, limit=xdr.Int64(limit)))
        return _Trust.CHANGE_TRUST_SUCCESS
    refused = _add_entry(overlay, context, account, _Trust.CHANGE_TRUST_LOW_RESERVE)
    if refused is not None:
        return refused
    flags = 0 if issuing.flags.uint32 & _ISSUER_REQUIRED else LINE_AUTHORIZED
    if issuing.flags.uint32 & _ISSUER_CLAWBACK:
        flags |= LINE_CLAWBACK
    put_trust_line(overlay, asset, new_trust_line(address_of(account.account_id), asset, limit, flags))
    return _Trust.CHANGE_TRUST_SUCCESS


def _add_entry(overlay: Overlay, context: LedgerContext, account: xdr.AccountEntry, low: Code) -> Code | None:
    """Give an account one more entry to keep a reserve for, or return why not."""
    if account.num_sub_entries.uint32 >= SUBENTRIES_MAX:
        return _TOO_MANY
    if account.balance.int64 < reserve(account, context.base_reserve, 1):
        return low
    put_account(overlay, with_entries(account, 1))
    return None


def _options_level(body: xdr.OperationBody) -> Level:
    options = body.set_options_op
    assert options is not None
    who_signs = (
        options.master_weight,
        options.low_threshold,
        options.med_threshold,
        options.high_threshold,
        options.signer,
    )
    return "high" if any(value is not None for value in who_signs) else "medium"


def _check_options(operation: Operation) -> Code | None:
    options = operation.body.set_options_op
    assert options is not None
    set_flags = options.set_flags.uint32 if options.set_flags is not None else 0
    clear_flags = options.clear_flags.uint32 if options.clear_flags is not None else 0
    if (set_flags | clear_flags) & ~_ISSUER_FLAGS:
        return _Options.SET_OPTIONS_UNKNOWN_FLAG
    if set_flags & clear_flags:
        return _Options.SET_OPTIONS_BAD_FLAGS
    weights = (options.master_weight, options.low_threshold, options.med_threshold, options.high_threshold)
    if any(weight is not None and weight.uint32 > 255 for weight in weights):
        return _Options.SET_OPTIONS_THRESHOLD_OUT_OF_RANGE
    if options.signer is not None:
        key = options.signer.key
        if key.ed25519 is None:
            return _NOT_SUPPORTED
        itself = address_of(xdr.AccountID(xdr.PublicKey(xdr.PublicKeyType.PUBLIC_KEY_TYPE_ED25519, key.ed25519)))
        if itself == operation.source or options.signer.weight.uint32 > 255:
            return _Options.SET_OPTIONS_BAD_SIGNER
    domain = options.home_domain
    if domain is not None and not _is_text(domain.string32):
        return _Options.SET_OPTIONS_INVALID_HOME_DOMAIN
    return None


def _apply_options(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    options = operation.body.set_options_op
    account = find_account(overlay, operation.source)
    assert options is not None
    assert account is not None
    values: dict[str, Any] = {}
    if options.inflation_dest is not None:
        if find_account(overlay, address_of(options.inflation_dest)) is None:
            return _Options.SET_OPTIONS_INVALID_INFLATION
        values["inflation_dest"] = options.inflation_dest
    if options.set_flags is not None or options.clear_flags is not None:
        flags = account.flags.uint32
        if flags & _ISSUER_IMMUTABLE:
            return _Options.SET_OPTIONS_CANT_CHANGE
        flags &= ~(options.clear_flags.uint32 if options.clear_flags is not None else 0)
        flags |= options.set_flags.uint32 if options.set_flags is not None else 0
        if flags & _ISSUER_CLAWBACK and not flags & _ISSUER_REVOCABLE:
            return _Options.SET_OPTIONS_AUTH_REVOCABLE_REQUIRED
        values["flags"] = xdr.Uint32(flags)
    if options.home_domain is not None:
        values["home_domain"] = options.home_domain
    thresholds = list(account.thresholds.thresholds)
    wanted = (options.master_weight, options.low_threshold, options.med_threshold, options.high_threshold)
    for place, value in enumerate(wanted):
        if value is not None:
            thresholds[place] = value.uint32
    account = changed(account, thresholds=xdr.Thresholds(bytes(thresholds)), **values)
    if options.signer is None:
        put_account(overlay, account)
        return _Options.SET_OPTIONS_SUCCESS
    return _set_signer(overlay, context, account, options.signer)


def _set_signer(overlay: Overlay, context: LedgerContext, account: xdr.AccountEntry, signer: xdr.Signer) -> Code:
    others = [each for each in account.signers if each.key != signer.key]
    known = len(others) < len(account.signers)
    if signer.weight.uint32 == 0:
        account = changed(account, signers=others)
        put_account(overlay, with_entries(account, -1) if known else account)
        return _Options.SET_OPTIONS_SUCCESS
    if not known:
        if len(others) >= SIGNERS_MAX:
            return _Options.SET_OPTIONS_TOO_MANY_SIGNERS
        refused = _add_entry(overlay, context, account, _Options.SET_OPTIONS_LOW_RESERVE)
        if refused is not None:
            return refused
        account = with_entries(account, 1)
    # Kept sorted by key, as the network does.
    put_account(overlay, changed(account, signers=sorted([*others, signer], key=lambda each: each.key.to_xdr_bytes())))
    return _Options.SET_OPTIONS_SUCCESS


def _check_data(operation: Operation) -> Code | None:
    data = operation.body.manage_data_op
    assert data is not None
    name = data.data_name.string64
    return None if name and _is_text(name) else _Data.MANAGE_DATA_INVALID_NAME


def _apply_data(overlay: Overlay, context: LedgerContext, operation: Operation) -> Code:
    data = operation.body.manage_data_op
    account = find_account(overlay, operation.source)
    assert data is not None
    assert account is not None
    key = data_key(operation.source, data.data_name.string64)
    known = overlay.get(key) is not None
    if data.data_value is None:
        if not known:
            return _Data.MANAGE_DATA_NAME_NOT_FOUND
        overlay.delete(key)
        put_account(overlay, with_entries(account, -1))
        return _Data.MANAGE_DATA_SUCCESS
    if not known:
        refused = _add_entry(overlay, context, account, _Data.MANAGE_DATA_LOW_RESERVE)
        if refused is not None:
            return refused
    entry = xdr.DataEntry(account.account_id, data.data_name, data.data_value, xdr.DataEntryExt(0))
    overlay.put(key, xdr.LedgerEntryData(xdr.LedgerEntryType.DATA, data=entry))
    return _Data.MANAGE_DATA_SUCCESS


def _check_bump(operation: Operation) -> Code | None:
    bump = operation.body.bump_sequence_op
    assert bump is not None
    return _Bump.BUMP_SEQUENCE_BAD_SEQ if bump.bump_to.sequence_number.int64 < 0 else None


def _apply_bump(overlay: Overlay, _: LedgerContext, operation: Operation) -> Code:
    bump = operation.body.bump_sequence_op
    account = find_account(overlay, operation.source)
    assert bump is not None
    assert account is not None
    if bump.bump_to.sequence_number.int64 > account.seq_num.sequence_number.int64:
        put_account(overlay, changed(account, seq_num=bump.bump_to))
    return _Bump.BUMP_SEQUENCE_SUCCESS


def _check_flags(operation: Operation) -> Code | None:
    wanted = operation.body.set_trust_line_flags_op
    assert wanted is not None
    set_flags, clear_flags = wanted.set_flags.uint32, wanted.clear_flags.uint32
    wrong = (
        not _is_asset(wanted.asset)
        or issuer_of(wanted.asset) != operation.source
        or address_of(wanted.trustor) == operation.source
        or set_flags & clear_flags
        or set_flags & ~_LINE_AUTH
        or clear_flags & ~_LINE_FLAGS
        or set_flags & _LINE_AUTH == _LINE_AUTH
    )
    return _Flags.SET_TRUST_LINE_FLAGS_MALFORMED if wrong else None


def _apply_flags(overlay: Overlay, _: LedgerContext, operation: Operation) -> Code:
    wanted = operation.body.set_trust_line_flags_op
    account = find_account(overlay, operation.source)
    assert wanted is not None
    assert account is not None
    line = find_trust_line(overlay, address_of(wanted.trustor), wanted.asset)
    if line is None:
        return _Flags.SET_TRUST_LINE_FLAGS_NO_TRUST_LINE
    flags = line.flags.uint32 & ~wanted.clear_flags.uint32 | wanted.set_flags.uint32
    if flags & _LINE_AUTH == _LINE_AUTH:
        return _Flags.SET_TRUST_LINE_FLAGS_INVALID_STATE
    revoked = line.flags.uint32 & LINE_AUTHORIZED and not flags & LINE_AUTHORIZED
    if revoked and not account.flags.uint32 & _ISSUER_REVOCABLE:
        return _Flags.SET_TRUST_LINE_FLAGS_CANT_REVOKE
    put_trust_line(overlay, wanted.asset, changed(line, flags=xdr.Uint32(flags)))
    return _Flags.SET_TRUST_LINE_FLAGS_SUCCESS


def account_of(muxed: xdr.MuxedAccount) -> str:
    """Return the account behind a plain or muxed address, `G…`."""
    key = muxed.med25519.ed25519 if muxed.med25519 is not None else muxed.ed25519
    assert key is not None
    return address_of(xdr.AccountID(xdr.PublicKey(xdr.PublicKeyType.PUBLIC_KEY_TYPE_ED25519, key)))


def asset_of(line: xdr.ChangeTrustAsset) -> xdr.Asset:
    """Return the asset that a trust line is to be of."""
    return xdr.Asset(line.type, alpha_num4=line.alpha_num4, alpha_num12=line.alpha_num12)


def _is_asset(asset: xdr.Asset) -> bool:
    """Tell whether an asset's code is letters and digits and of its type's length, but for zeros at its end."""
    if asset.alpha_num4 is not None:
        code, least = asset.alpha_num4.asset_code.asset_code4, 1
    elif asset.alpha_num12 is not None:
        code, least = asset.alpha_num12.asset_code.asset_code12, 5
    else:
        return True
    name = code.rstrip(b"\0")
    return len(name) >= least and name.isascii() and name.isalnum()


def _is_text(text: bytes) -> bool:
    return text.isascii() and text.decode("ascii").isprintable()


_TYPES: Final = xdr.OperationType
_TR: Final = xdr.OperationResultTr


def _medium(_: xdr.OperationBody) -> Level:
    return "medium"


def _low(_: xdr.OperationBody) -> Level:
    return "low"


_RULES: Final[dict[xdr.OperationType, _Rules]] = {
    _TYPES.CREATE_ACCOUNT: _Rules(
        _medium,
        _check_create,
        _apply_create,
        _Create,
        lambda code: _TR(_TYPES.CREATE_ACCOUNT, create_account_result=xdr.CreateAccountResult(code)),
    ),
    _TYPES.PAYMENT: _Rules(
        _medium,
        _check_payment,
        _apply_payment,
        _Payment,
        lambda code: _TR(_TYPES.PAYMENT, payment_result=xdr.PaymentResult(code)),
    ),
    _TYPES.CHANGE_TRUST: _Rules(
        _medium,
        _check_trust,
        _apply_trust,
        _Trust,
        lambda code: _TR(_TYPES.CHANGE_TRUST, change_trust_result=xdr.ChangeTrustResult(code)),
    ),
    _TYPES.SET_OPTIONS: _Rules(
        _options_level,
        _check_options,
        _apply_options,
        _Options,
        lambda code: _TR(_TYPES.SET_OPTIONS, set_options_result=xdr.SetOptionsResult(code)),
    ),
    _TYPES.MANAGE_DATA: _Rules(
        _medium,
        _check_data,
        _apply_data,
        _Data,
        lambda code: _TR(_TYPES.MANAGE_DATA, manage_data_result=xdr.ManageDataResult(code)),
    ),
    _TYPES.BUMP_SEQUENCE: _Rules(
        _low,
        _check_bump,
        _apply_bump,
        _Bump,
        lambda code: _TR(_TYPES.BUMP_SEQUENCE, bump_seq_result=xdr.BumpSequenceResult(code)),
    ),
    _TYPES.SET_TRUST_LINE_FLAGS: _Rules(
        _low,
        _check_flags,
        _apply_flags,
        _Flags,
        lambda code: _TR(_TYPES.SET_TRUST_LINE_FLAGS, set_trust_line_flags_result=xdr.SetTrustLineFlagsResult(code)),
    ),
}
