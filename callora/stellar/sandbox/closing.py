"""A closed ledger as XDR: the meta that a node tells of it, put together from what was kept."""

import hashlib
from functools import lru_cache
from typing import Final

from stellar_sdk import xdr

from callora.stellar.sandbox.state import Header, Included

_EXT: Final = xdr.ExtensionPoint(0)
_NO_CHANGES: Final = xdr.LedgerEntryChanges([])


@lru_cache(maxsize=32)
def close_meta(header: Header, included: tuple[Included, ...]) -> str:
    """Return a ledger's meta, base64 XDR of a LedgerCloseMeta.

    What nothing here keeps is empty in it: the changes by which fees were taken, evicted entries, the size of the
    state.

    Args:
        included: its transactions, in order.
    """
    hashed = xdr.Hash(header.hash())
    history = xdr.LedgerHeaderHistoryEntry(hashed, header.to_xdr(), xdr.LedgerHeaderHistoryEntryExt(0))
    meta = xdr.LedgerCloseMetaV2(
        ext=xdr.LedgerCloseMetaExt(0),
        ledger_header=history,
        tx_set=_transaction_set(header, included),
        tx_processing=[_processed(each) for each in included],
        upgrades_processing=[],
        scp_info=[],
        total_byte_size_of_live_soroban_state=xdr.Uint64(0),
        evicted_keys=[],
    )
    return xdr.LedgerCloseMeta(2, v2=meta).to_xdr()


def _transaction_set(header: Header, included: tuple[Included, ...]) -> xdr.GeneralizedTransactionSet:
    """Return the transactions that were chosen: those of accounts in one phase, contract calls in the other."""
    lanes: tuple[list[xdr.TransactionEnvelope], ...] = ([], [])
    for each in included:
        envelope = xdr.TransactionEnvelope.from_xdr(each.envelope)
        inner = envelope.fee_bump.tx.inner_tx.v1 if envelope.fee_bump is not None else envelope.v1
        lanes[inner is not None and inner.tx.ext.soroban_data is not None].append(envelope)
    made = xdr.TransactionSetV1(xdr.Hash(header.previous_hash), [_phase(lane) for lane in lanes])
    return xdr.GeneralizedTransactionSet(1, v1_tx_set=made)


def _phase(lane: list[xdr.TransactionEnvelope]) -> xdr.TransactionPhase:
    kind = xdr.TxSetComponentType.TXSET_COMP_TXS_MAYBE_DISCOUNTED_FEE
    ordered = sorted(lane, key=lambda envelope: hashlib.sha256(envelope.to_xdr_bytes()).digest())
    component = xdr.TxSetComponent(kind, xdr.TxSetComponentTxsMaybeDiscountedFee(None, ordered))
    return xdr.TransactionPhase(0, v0_components=[component] if lane else [])


def _processed(included: Included) -> xdr.TransactionResultMetaV1:
    pair = xdr.TransactionResultPair(
        xdr.Hash(bytes.fromhex(included.hash)), xdr.TransactionResult.from_xdr(included.result)
    )
    return xdr.TransactionResultMetaV1(
        ext=_EXT,
        result=pair,
        fee_processing=_NO_CHANGES,
        tx_apply_processing=xdr.TransactionMeta.from_xdr(included.meta),
        post_tx_apply_fee_processing=_NO_CHANGES,
    )
