"""Transactions: decoding and hashing, what the network refuses to take, and what it does with what it took.

Everything here is pure: entries come from a Reader or an Overlay, the ledger's facts from a LedgerContext. The rules
and their order are stellar-core's from protocol 23 on; what it has and this does not is refused with txNOT_SUPPORTED
(minimum sequence age and gap, extra signers) or with op_not_supported (`classic`).
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Final, TypeAlias

import attrs
from stellar_sdk import Keypair, xdr
from stellar_sdk.exceptions import BadSignatureError

from callora.stellar.sandbox import classic
from callora.stellar.sandbox.accounts import changed, find_account, put_account, spendable
from callora.stellar.sandbox.events import events_of, fee_event
from callora.stellar.sandbox.state import (
    LedgerContext,
    Machine,
    Operation,
    Overlay,
    Reader,
    Transaction,
    Undecodable,
    account_id,
)

Code: TypeAlias = xdr.TransactionResultCode
REPLACE_FACTOR: Final = 10
"""How many times the inclusion fee of a waiting transaction another one must bid to take its place."""
_SOROBAN: Final = (
    xdr.OperationType.INVOKE_HOST_FUNCTION,
    xdr.OperationType.EXTEND_FOOTPRINT_TTL,
    xdr.OperationType.RESTORE_FOOTPRINT,
)
_PLACES: Final = {"low": 1, "medium": 2, "high": 3}
_WEIGHT_MAX: Final = 255
_INT64_MAX: Final = 2**63 - 1


def network_id_of(passphrase: str) -> bytes:
    """Return a network's id, 32 bytes."""
    return hashlib.sha256(passphrase.encode()).digest()


def decode(envelope: str, network_id: bytes) -> Transaction | Undecodable:
    """Return the transaction in an envelope.

    Args:
        envelope: base64 XDR, from anyone.
    """
    try:
        parsed = xdr.TransactionEnvelope.from_xdr(envelope)
        return _of_envelope(parsed, network_id)
    except Exception:
        # A stranger's bytes go through a foreign parser, which has an exception of its own for every fault.
        return Undecodable("the envelope cannot be read: it must be a TransactionEnvelope in base64 XDR")


def _of_envelope(envelope: xdr.TransactionEnvelope, network_id: bytes) -> Transaction:
    if envelope.fee_bump is not None:
        outer = envelope.fee_bump.tx
        assert outer.inner_tx.v1 is not None
        inner = _of_v1(envelope, outer.inner_tx.v1, network_id)
        return attrs.evolve(
            inner,
            hash=_hash(network_id, xdr.EnvelopeType.ENVELOPE_TYPE_TX_FEE_BUMP, outer.to_xdr_bytes()),
            fee_source=classic.account_of(outer.fee_source),
            fee=outer.fee.int64,
            outer_signatures=tuple(envelope.fee_bump.signatures),
        )
    if envelope.v0 is not None:
        return _of_v1(envelope, _as_v1(envelope.v0), network_id)
    if envelope.v1 is None:
        raise ValueError("an envelope of another kind")
    return _of_v1(envelope, envelope.v1, network_id)


def _of_v1(envelope: xdr.TransactionEnvelope, v1: xdr.TransactionV1Envelope, network_id: bytes) -> Transaction:
    body = v1.tx
    source = classic.account_of(body.source_account)
    tx_hash = _hash(network_id, xdr.EnvelopeType.ENVELOPE_TYPE_TX, body.to_xdr_bytes())
    operations = tuple(
        Operation(
            source=classic.account_of(each.source_account) if each.source_account is not None else source,
            muxed=(each.source_account or body.source_account).med25519 is not None,
            body=each.body,
        )
        for each in body.operations
    )
    return Transaction(
        envelope=envelope,
        hash=tx_hash,
        inner_hash=tx_hash,
        body=body,
        source=source,
        sequence=body.seq_num.sequence_number.int64,
        fee_source=source,
        fee=body.fee.uint32,
        operations=operations,
        signatures=tuple(v1.signatures),
        outer_signatures=(),
    )


def _as_v1(v0: xdr.TransactionV0Envelope) -> xdr.TransactionV1Envelope:
    """Return an envelope of the first kind as one of the second: its hash and its signatures are the same."""
    old = v0.tx
    kinds = xdr.PreconditionType
    made = xdr.Transaction(
        source_account=xdr.MuxedAccount(xdr.CryptoKeyType.KEY_TYPE_ED25519, ed25519=old.source_account_ed25519),
        fee=old.fee,
        seq_num=old.seq_num,
        cond=xdr.Preconditions(kinds.PRECOND_TIME, time_bounds=old.time_bounds)
        if old.time_bounds is not None
        else xdr.Preconditions(kinds.PRECOND_NONE),
        memo=old.memo,
        operations=old.operations,
        ext=xdr.TransactionExt(0),
    )
    return xdr.TransactionV1Envelope(made, v0.signatures)


def _hash(network_id: bytes, kind: xdr.EnvelopeType, body: bytes) -> bytes:
    return hashlib.sha256(network_id + kind.to_xdr_bytes() + body).digest()


# Fees.


def fee_operations(transaction: Transaction) -> int:
    """Return how many operations its inclusion is paid for: a fee-bump counts as one."""
    return len(transaction.operations) + transaction.is_fee_bump


def inclusion_fee(transaction: Transaction) -> int:
    """Return what it bids for its inclusion, stroops: without the resource fee."""
    return transaction.fee - transaction.resource_fee


def rate(transaction: Transaction) -> Fraction:
    """Return what it bids for its inclusion, stroops an operation."""
    return Fraction(inclusion_fee(transaction), fee_operations(transaction))


def size(transaction: Transaction) -> int:
    """Return how much of a ledger it takes: operations, or one contract call."""
    return len(transaction.operations)


def fee_wanted(transaction: Transaction, base_fee: int) -> int:
    """Return what it must pay at least, stroops.

    Args:
        base_fee: stroops an operation.
    """
    return base_fee * fee_operations(transaction) + transaction.resource_fee


def fee_to_replace(new: Transaction, old: Transaction) -> int:
    """Return what a transaction must pay at least to take the place of one that waits, stroops."""
    return -(-REPLACE_FACTOR * inclusion_fee(old) * fee_operations(new) // fee_operations(old)) + new.resource_fee


# Signatures.


class _Signatures:
    """The signatures over one hash, and which of them were needed."""

    def __init__(self, signed: bytes, signatures: Sequence[xdr.DecoratedSignature]) -> None:
        self._signed = signed
        self._signatures = signatures
        self._used: set[int] = set()
        self._true: dict[tuple[int, bytes], bool] = {}

    @property
    def all_used(self) -> bool:
        return len(self._used) == len(self._signatures)

    def reach(self, account: xdr.AccountEntry, level: classic.Level) -> bool:
        """Tell whether an account's signers among them have the weight for a threshold; at least one must be there."""
        thresholds = account.thresholds.thresholds
        itself = account.account_id.account_id.ed25519
        assert itself is not None
        weights = {itself.uint256: thresholds[0]} if thresholds[0] else {}
        for signer in account.signers:
            if signer.key.ed25519 is not None:
                weights[signer.key.ed25519.uint256] = min(signer.weight.uint32, _WEIGHT_MAX)
        return self._reach(weights, thresholds[_PLACES[level]])

    def by(self, address: str) -> bool:
        """Tell whether the key of an account that need not exist is among them."""
        key = account_id(address).account_id.ed25519
        assert key is not None
        return self._reach({key.uint256: 1}, 0)

    def _reach(self, weights: dict[bytes, int], needed: int) -> bool:
        total = 0
        left = dict(weights)
        for place in range(len(self._signatures)):
            for key in left:
                if self._verifies(place, key):
                    self._used.add(place)
                    total += left.pop(key)
                    if total >= needed:
                        return True
                    break
        return False

    def _verifies(self, place: int, key: bytes) -> bool:
        known = self._true.get((place, key))
        if known is not None:
            return known
        signature = self._signatures[place]
        verified = signature.hint.signature_hint == key[-4:]
        if verified:
            try:
                Keypair.from_raw_ed25519_public_key(key).verify(self._signed, signature.signature.signature)
            except (BadSignatureError, ValueError):
                verified = False
        self._true[place, key] = verified
        return verified


# What is refused.


@attrs.frozen
class _Refusal:
    code: Code
    operations: tuple[xdr.OperationResult, ...] = ()
    fee: int = 0
    """For txINSUFFICIENT_FEE: what would be enough."""


def is_soroban(transaction: Transaction) -> bool:
    """Tell whether the contracts' machine must look at it."""
    return transaction.soroban is not None or any(each.body.type in _SOROBAN for each in transaction.operations)


def refusal(
    reader: Reader, transaction: Transaction, context: LedgerContext, base_fee: int, machine: Machine
) -> xdr.TransactionResult | None:
    """Return why the network does not take a transaction into the next ledger; None if it does.

    Args:
        reader: the entries after the last ledger.
        context: the next ledger.
        base_fee: stroops an operation must bid now.
    """
    if transaction.is_fee_bump:
        refused = _outer_refusal(reader, transaction, context, base_fee)
        if refused is not None:
            return _result(refused.fee, refused.code, ())
    found = _inner_refusal(reader, transaction, context, base_fee, machine)
    return result_of(transaction, found.code, found.operations, found.fee) if found is not None else None


def _outer_refusal(reader: Reader, transaction: Transaction, context: LedgerContext, base_fee: int) -> _Refusal | None:
    wanted = fee_wanted(transaction, base_fee)
    inner_bid = transaction.body.fee.uint32 - transaction.resource_fee
    inner_operations = max(len(transaction.operations), 1)
    # Its rate must not be below the inner one's.
    same_rate = -(-inner_bid * fee_operations(transaction) // inner_operations) + transaction.resource_fee
    if transaction.fee < max(wanted, same_rate):
        return _Refusal(Code.txINSUFFICIENT_FEE, fee=max(wanted, same_rate))
    payer = find_account(reader, transaction.fee_source)
    if payer is None:
        return _Refusal(Code.txNO_ACCOUNT)
    signatures = _Signatures(transaction.hash, transaction.outer_signatures)
    if not signatures.reach(payer, "low"):
        return _Refusal(Code.txBAD_AUTH)
    if spendable(payer, context.base_reserve) < transaction.fee:
        return _Refusal(Code.txINSUFFICIENT_BALANCE)
    if not signatures.all_used:
        return _Refusal(Code.txBAD_AUTH_EXTRA)
    return None


def _inner_refusal(
    reader: Reader, transaction: Transaction, context: LedgerContext, base_fee: int, machine: Machine
) -> _Refusal | None:
    pays = not transaction.is_fee_bump
    code = machine.check(reader, transaction) if is_soroban(transaction) else None
    code = code or _untimely(transaction, context)
    if code is not None:
        return _Refusal(code)
    inner_bid = transaction.body.fee.uint32 - transaction.resource_fee
    if pays and transaction.fee < fee_wanted(transaction, base_fee):
        return _Refusal(Code.txINSUFFICIENT_FEE, fee=fee_wanted(transaction, base_fee))
    if inner_bid < 0:
        return _Refusal(Code.txSOROBAN_INVALID)
    account = find_account(reader, transaction.source)
    if account is None:
        return _Refusal(Code.txNO_ACCOUNT)
    if not _sequence_fits(transaction, account):
        return _Refusal(Code.txBAD_SEQ)
    signatures = _Signatures(transaction.inner_hash, transaction.signatures)
    if not signatures.reach(account, "low"):
        return _Refusal(Code.txBAD_AUTH)
    if pays and spendable(account, context.base_reserve) < transaction.fee:
        return _Refusal(Code.txINSUFFICIENT_BALANCE)
    results = _operation_refusals(reader, transaction, signatures, applying=False)
    if results is not None:
        return _Refusal(Code.txFAILED, results)
    if not signatures.all_used:
        return _Refusal(Code.txBAD_AUTH_EXTRA)
    return None


def untimely(transaction: Transaction, context: LedgerContext) -> bool:
    """Tell whether a ledger may not contain a transaction for what it says itself about when it is good."""
    return _untimely(transaction, context) is not None


def _untimely(transaction: Transaction, context: LedgerContext) -> Code | None:
    conditions = transaction.body.cond
    bounds, v2 = conditions.time_bounds, conditions.v2
    if v2 is not None:
        if v2.extra_signers or v2.min_seq_age.duration.uint64 or v2.min_seq_ledger_gap.uint32:
            return Code.txNOT_SUPPORTED
        bounds = v2.time_bounds
    if not transaction.operations:
        return Code.txMISSING_OPERATION
    ledgers = v2.ledger_bounds if v2 is not None else None
    if bounds is not None and context.closed_at < bounds.min_time.time_point.uint64:
        return Code.txTOO_EARLY
    if ledgers is not None and context.sequence < ledgers.min_ledger.uint32:
        return Code.txTOO_EARLY
    if bounds is not None and 0 < bounds.max_time.time_point.uint64 < context.closed_at:
        return Code.txTOO_LATE
    if ledgers is not None and 0 < ledgers.max_ledger.uint32 <= context.sequence:
        return Code.txTOO_LATE
    return None


def _sequence_fits(transaction: Transaction, account: xdr.AccountEntry) -> bool:
    used = account.seq_num.sequence_number.int64
    v2 = transaction.body.cond.v2
    if transaction.sequence == _INT64_MAX:
        return False
    if v2 is not None and v2.min_seq_num is not None:
        return v2.min_seq_num.sequence_number.int64 <= used < transaction.sequence
    return transaction.sequence == used + 1


def _operation_refusals(
    reader: Reader, transaction: Transaction, signatures: _Signatures, *, applying: bool
) -> tuple[xdr.OperationResult, ...] | None:
    """Return the results of operations of which one can never be applied; None where each may be."""
    for place, operation in enumerate(transaction.operations):
        wrong = _signed(reader, operation, signatures, applying=applying)
        code = wrong if wrong is not None or operation.body.type in _SOROBAN else classic.check(operation)
        if code is not None:
            results = [classic.result_of(each, None) for each in transaction.operations[:place]]
            rest = [classic.result_of(each, None) for each in transaction.operations[place + 1 :]]
            return (*results, classic.result_of(operation, code), *rest)
    return None


def _signed(
    reader: Reader, operation: Operation, signatures: _Signatures, *, applying: bool
) -> xdr.OperationResultCode | None:
    account = find_account(reader, operation.source)
    if account is None:
        if applying:
            return xdr.OperationResultCode.opNO_ACCOUNT
        # An operation before it may make the account.
        return None if signatures.by(operation.source) else xdr.OperationResultCode.opBAD_AUTH
    if not signatures.reach(account, classic.level_of(operation)):
        return xdr.OperationResultCode.opBAD_AUTH
    return None


# Results.


def result_of(
    transaction: Transaction, code: Code, operations: Sequence[xdr.OperationResult], fee: int
) -> xdr.TransactionResult:
    """Return the result of a transaction; a fee-bump's is wrapped in the result of the outer one.

    Args:
        code: of the transaction that has the operations.
        fee: stroops charged.
    """
    if not transaction.is_fee_bump:
        return _result(fee, code, operations)
    inner = xdr.InnerTransactionResult(
        xdr.Int64(0),
        xdr.InnerTransactionResultResult(code, results=list(operations) if _has_operations(code) else None),
        xdr.InnerTransactionResultExt(0),
    )
    outer = Code.txFEE_BUMP_INNER_SUCCESS if code == Code.txSUCCESS else Code.txFEE_BUMP_INNER_FAILED
    pair = xdr.InnerTransactionResultPair(xdr.Hash(transaction.inner_hash), inner)
    result = xdr.TransactionResultResult(outer, inner_result_pair=pair)
    return xdr.TransactionResult(xdr.Int64(fee), result, xdr.TransactionResultExt(0))


def _result(fee: int, code: Code, operations: Sequence[xdr.OperationResult]) -> xdr.TransactionResult:
    result = xdr.TransactionResultResult(code, results=list(operations) if _has_operations(code) else None)
    return xdr.TransactionResult(xdr.Int64(fee), result, xdr.TransactionResultExt(0))


def _has_operations(code: Code) -> bool:
    return code in (Code.txSUCCESS, Code.txFAILED)


def insufficient_fee(wanted: int) -> xdr.TransactionResult:
    """Return the refusal of a bid that is too low.

    Args:
        wanted: what would be enough, stroops.
    """
    return _result(wanted, Code.txINSUFFICIENT_FEE, ())


def spendable_of(reader: Reader, transaction: Transaction, base_reserve: int) -> int:
    """Return what the payer of its fee has for fees, stroops."""
    payer = find_account(reader, transaction.fee_source)
    return spendable(payer, base_reserve) if payer is not None else 0


def insufficient_balance() -> xdr.TransactionResult:
    """Return the refusal of a fee that its payer cannot pay beside the fees of what waits already."""
    return _result(0, Code.txINSUFFICIENT_BALANCE, ())


# What a ledger does with it.


@attrs.frozen
class Charged:
    """A transaction whose fee was taken, before any transaction of its ledger is applied."""

    transaction: Transaction
    fee: int
    """Stroops taken: the inclusion fee and the whole resource fee, or all that was there."""
    changes: list[xdr.LedgerEntryChange]


@attrs.frozen
class Applied:
    """What became of a transaction in a ledger."""

    successful: bool
    result: xdr.TransactionResult
    meta: xdr.TransactionMeta
    transaction_events: tuple[xdr.TransactionEvent, ...]
    events: tuple[tuple[xdr.ContractEvent, ...], ...]
    """For each operation."""
    diagnostics: tuple[xdr.DiagnosticEvent, ...]
    refund: int
    """Of the fee taken, what went back, stroops."""


def charge(overlay: Overlay, transaction: Transaction, base_fee: int) -> Charged:
    """Take the fee of a transaction: the ledger's price of an operation, at most its bid, and the resource fee.

    Args:
        base_fee: stroops an operation costs in this ledger.
    """
    account = find_account(overlay, transaction.fee_source)
    assert account is not None, "it was there when the ledger's transactions were chosen, and fees delete no account"
    fee = min(fee_wanted(transaction, base_fee), transaction.fee, account.balance.int64)
    nested = overlay.nested()
    put_account(nested, changed(account, balance=xdr.Int64(account.balance.int64 - fee)))
    changes = nested.changes()
    nested.commit()
    return Charged(transaction, fee, changes)


def apply(overlay: Overlay, charged: Charged, context: LedgerContext, machine: Machine) -> Applied:
    """Apply a transaction whose fee was taken. Its sequence number is used up even if an operation fails."""
    transaction = charged.transaction
    run = _Run(overlay, transaction, context, machine)
    code = run.begin()
    if code is None:
        code = run.operate()
    refund = _give_back(run, transaction, charged.fee)
    stages = xdr.TransactionEventStage
    events = [
        fee_event(
            context.network_id,
            transaction.fee_source,
            charged.fee,
            stages.TRANSACTION_EVENT_STAGE_BEFORE_ALL_TXS,
        )
    ]
    if refund:
        after = stages.TRANSACTION_EVENT_STAGE_AFTER_ALL_TXS
        events.append(fee_event(context.network_id, transaction.fee_source, -refund, after))
    return Applied(
        successful=code == Code.txSUCCESS,
        result=result_of(transaction, code, run.results, charged.fee - refund),
        meta=run.meta(events),
        transaction_events=tuple(events),
        events=tuple(run.events),
        diagnostics=tuple(run.diagnostics),
        refund=refund,
    )


class _Run:
    """One transaction being applied, and what its meta will say."""

    def __init__(self, overlay: Overlay, transaction: Transaction, context: LedgerContext, machine: Machine) -> None:
        self._overlay = overlay
        self._transaction = transaction
        self._context = context
        self._machine = machine
        self._signatures = _Signatures(transaction.inner_hash, transaction.signatures)
        self._before: list[xdr.LedgerEntryChange] = []
        self._operations: list[xdr.OperationMetaV2] = []
        self.after: list[xdr.LedgerEntryChange] = []
        self.outcome: xdr.SCVal | None = None
        self.non_refundable = transaction.resource_fee
        self.refundable = 0
        self._rent = 0
        self.results: list[xdr.OperationResult] = []
        self.events: list[tuple[xdr.ContractEvent, ...]] = []
        self.diagnostics: list[xdr.DiagnosticEvent] = []

    def begin(self) -> Code | None:
        """Use up the sequence number and look at the signatures again; return why it ends there."""
        transaction = self._transaction
        account = find_account(self._overlay, transaction.source)
        if account is None:
            return Code.txNO_ACCOUNT
        if not _sequence_fits(transaction, account):
            return Code.txBAD_SEQ
        nested = self._overlay.nested()
        put_account(nested, changed(account, seq_num=transaction.body.seq_num))
        self._before = nested.changes()
        nested.commit()
        if not self._signatures.reach(account, "low"):
            return Code.txBAD_AUTH
        results = _operation_refusals(self._overlay, transaction, self._signatures, applying=False)
        if results is not None:
            self.results = list(results)
            return Code.txFAILED
        return None if self._signatures.all_used else Code.txBAD_AUTH_EXTRA

    def operate(self) -> Code:
        """Apply the operations, all or none; each is tried, so that each has a result."""
        overlay = self._overlay.nested()
        succeeded = True
        for operation in self._transaction.operations:
            nested = overlay.nested()
            result, events = self._apply(nested, operation)
            self.results.append(result)
            if events is None:
                succeeded = False
                continue
            self._operations.append(xdr.OperationMetaV2(_EXT, xdr.LedgerEntryChanges(nested.changes()), list(events)))
            self.events.append(events)
            nested.commit()
        if succeeded:
            overlay.commit()
            return Code.txSUCCESS
        self._operations, self.events = [], [() for _ in self._transaction.operations]
        self.outcome = None
        return Code.txFAILED

    def _apply(
        self, nested: Overlay, operation: Operation
    ) -> tuple[xdr.OperationResult, tuple[xdr.ContractEvent, ...] | None]:
        """Return an operation's result, and its events if it succeeded."""
        wrong = _signed(nested, operation, self._signatures, applying=True)
        if wrong is not None:
            return xdr.OperationResult(wrong), None
        if operation.body.type in _SOROBAN:
            outcome = self._machine.apply(nested, self._context, self._transaction, operation)
            self.diagnostics += outcome.diagnostics
            self.non_refundable, self.refundable = outcome.non_refundable, outcome.refundable
            self.outcome, self._rent = outcome.return_value, outcome.rent
            return outcome.result, outcome.events if outcome.succeeded else None
        code = classic.apply(nested, self._context, operation)
        result = classic.result_of(operation, code)
        return result, events_of(self._context.network_id, operation) if code == 0 else None

    def meta(self, events: list[xdr.TransactionEvent]) -> xdr.TransactionMeta:
        """Return what the transaction did."""
        soroban = None
        if self._transaction.soroban is not None:
            charged = xdr.SorobanTransactionMetaExtV1(
                _EXT, xdr.Int64(self.non_refundable), xdr.Int64(self.refundable), xdr.Int64(self._rent)
            )
            soroban = xdr.SorobanTransactionMetaV2(xdr.SorobanTransactionMetaExt(1, v1=charged), self.outcome)
        v4 = xdr.TransactionMetaV4(
            ext=_EXT,
            tx_changes_before=xdr.LedgerEntryChanges(self._before),
            operations=self._operations,
            tx_changes_after=xdr.LedgerEntryChanges(self.after),
            soroban_meta=soroban,
            events=events,
            diagnostic_events=self.diagnostics,
        )
        return xdr.TransactionMeta(4, v4=v4)

    def pay_back(self, refund: int) -> None:
        """Give some of the fee back to whoever paid it."""
        account = find_account(self._overlay, self._transaction.fee_source)
        if account is not None:
            nested = self._overlay.nested()
            put_account(nested, changed(account, balance=xdr.Int64(account.balance.int64 + refund)))
            self.after = nested.changes()
            nested.commit()


def _give_back(run: _Run, transaction: Transaction, charged: int) -> int:
    """Give back what was charged for resources and not used, and return how much."""
    refund = min(transaction.resource_fee - run.non_refundable - run.refundable, charged)
    if refund:
        run.pay_back(refund)
    return refund


_EXT: Final = xdr.ExtensionPoint(0)
