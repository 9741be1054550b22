"""Accounts and trust lines: reading them, and moving XLM and issued assets between them by the network's rules."""

import copy
from enum import Enum, auto
from typing import Any, Final, TypeVar

from stellar_sdk import xdr

from callora.stellar.sandbox.state import Overlay, Reader, account_id, account_key, address_of, trust_line_key

INT64_MAX: Final = 2**63 - 1
SUBENTRIES_MAX: Final = 1000
LINE_AUTHORIZED: Final = xdr.TrustLineFlags.AUTHORIZED_FLAG.value
LINE_MAINTAIN: Final = xdr.TrustLineFlags.AUTHORIZED_TO_MAINTAIN_LIABILITIES_FLAG.value
LINE_CLAWBACK: Final = xdr.TrustLineFlags.TRUSTLINE_CLAWBACK_ENABLED_FLAG.value
_NATIVE: Final = xdr.AssetType.ASSET_TYPE_NATIVE
_T = TypeVar("_T")


class NotMoved(Enum):
    """Why an amount was not moved; nothing was written."""

    NO_ACCOUNT = auto()
    NO_TRUST = auto()
    NOT_AUTHORIZED = auto()
    UNDERFUNDED = auto()
    LINE_FULL = auto()


def changed(entry: _T, **values: Any) -> _T:
    """Return a copy of an XDR object with some of its attributes replaced; the rest is shared."""
    made = copy.copy(entry)
    for name, value in values.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made


def find_account(reader: Reader, address: str) -> xdr.AccountEntry | None:
    """Return an account; None where there is none.

    Args:
        address: `G…`.
    """
    entry = reader.get(account_key(address))
    return entry.data.account if entry is not None else None


def put_account(overlay: Overlay, account: xdr.AccountEntry) -> None:
    """Write an account."""
    data = xdr.LedgerEntryData(xdr.LedgerEntryType.ACCOUNT, account=account)
    overlay.put(account_key(address_of(account.account_id)), data)


def new_account(address: str, balance: int, sequence: int) -> xdr.AccountEntry:
    """Return an account as it begins: its own key has weight 1, and nothing needs more than any signature.

    Args:
        balance: stroops of XLM.
        sequence: the last sequence number that counts as used.
    """
    return xdr.AccountEntry(
        account_id=account_id(address),
        balance=xdr.Int64(balance),
        seq_num=xdr.SequenceNumber(xdr.Int64(sequence)),
        num_sub_entries=xdr.Uint32(0),
        inflation_dest=None,
        flags=xdr.Uint32(0),
        home_domain=xdr.String32(b""),
        thresholds=xdr.Thresholds(bytes([1, 0, 0, 0])),
        signers=[],
        ext=xdr.AccountEntryExt(0),
    )


def new_trust_line(address: str, asset: xdr.Asset, limit: int, flags: int = LINE_AUTHORIZED) -> xdr.TrustLineEntry:
    """Return a trust line as it begins: empty.

    Args:
        limit: what it may hold, base units.
    """
    return xdr.TrustLineEntry(
        account_id=account_id(address),
        asset=xdr.TrustLineAsset(asset.type, alpha_num4=asset.alpha_num4, alpha_num12=asset.alpha_num12),
        balance=xdr.Int64(0),
        limit=xdr.Int64(limit),
        flags=xdr.Uint32(flags),
        ext=xdr.TrustLineEntryExt(0),
    )


def reserve(account: xdr.AccountEntry, base_reserve: int, more: int = 0) -> int:
    """Return what an account must keep, stroops of XLM.

    Args:
        more: entries that it does not have yet.
    """
    return (2 + account.num_sub_entries.uint32 + more) * base_reserve


def spendable(account: xdr.AccountEntry, base_reserve: int) -> int:
    """Return the XLM above the reserve, stroops; negative where a fee has eaten into it."""
    return account.balance.int64 - reserve(account, base_reserve)


def with_entries(account: xdr.AccountEntry, more: int) -> xdr.AccountEntry:
    """Return an account with more, or fewer, entries of its own to keep a reserve for."""
    return changed(account, num_sub_entries=xdr.Uint32(account.num_sub_entries.uint32 + more))


def find_trust_line(reader: Reader, address: str, asset: xdr.Asset) -> xdr.TrustLineEntry | None:
    """Return an account's trust line; None where there is none, as for the issuer itself."""
    entry = reader.get(trust_line_key(address, asset))
    return entry.data.trust_line if entry is not None else None


def put_trust_line(overlay: Overlay, asset: xdr.Asset, line: xdr.TrustLineEntry) -> None:
    """Write a trust line."""
    data = xdr.LedgerEntryData(xdr.LedgerEntryType.TRUSTLINE, trust_line=line)
    overlay.put(trust_line_key(address_of(line.account_id), asset), data)


def issuer_of(asset: xdr.Asset) -> str | None:
    """Return who issues an asset, `G…`; None for XLM."""
    code = asset.alpha_num4 or asset.alpha_num12
    return address_of(code.issuer) if code is not None else None


def debit(overlay: Overlay, address: str, asset: xdr.Asset, amount: int, base_reserve: int) -> NotMoved | None:
    """Take an amount from an account; from its issuer it comes out of nothing.

    Args:
        amount: stroops, > 0.

    Returns:
        None where it was taken.
    """
    if asset.type == _NATIVE:
        account = find_account(overlay, address)
        if account is None:
            return NotMoved.NO_ACCOUNT
        if spendable(account, base_reserve) < amount:
            return NotMoved.UNDERFUNDED
        put_account(overlay, changed(account, balance=xdr.Int64(account.balance.int64 - amount)))
        return None
    if issuer_of(asset) == address:
        return None
    line = find_trust_line(overlay, address, asset)
    if line is None:
        return NotMoved.NO_TRUST
    if not line.flags.uint32 & LINE_AUTHORIZED:
        return NotMoved.NOT_AUTHORIZED
    if line.balance.int64 < amount:
        return NotMoved.UNDERFUNDED
    put_trust_line(overlay, asset, changed(line, balance=xdr.Int64(line.balance.int64 - amount)))
    return None


def credit(overlay: Overlay, address: str, asset: xdr.Asset, amount: int) -> NotMoved | None:
    """Give an amount to an account; to its issuer it ceases to be.

    Args:
        amount: stroops, > 0.

    Returns:
        None where it was given.
    """
    if asset.type == _NATIVE:
        account = find_account(overlay, address)
        if account is None:
            return NotMoved.NO_ACCOUNT
        if account.balance.int64 > INT64_MAX - amount:
            return NotMoved.LINE_FULL
        put_account(overlay, changed(account, balance=xdr.Int64(account.balance.int64 + amount)))
        return None
    if issuer_of(asset) == address:
        return None
    line = find_trust_line(overlay, address, asset)
    if line is None:
        return NotMoved.NO_TRUST
    if not line.flags.uint32 & LINE_AUTHORIZED:
        return NotMoved.NOT_AUTHORIZED
    if line.balance.int64 > line.limit.int64 - amount:
        return NotMoved.LINE_FULL
    put_trust_line(overlay, asset, changed(line, balance=xdr.Int64(line.balance.int64 + amount)))
    return None
