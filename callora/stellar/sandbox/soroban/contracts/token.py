"""The Stellar Asset Contract: an asset of the ledger, or XLM, as a token that contracts can hold and move.

What an account has is its trust line (for XLM its own balance); what a contract has is an entry of this contract.
Source: CAP-46-06, CAP-67; error numbers as in soroban-env-host.
"""

from enum import IntEnum
from typing import Final

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.accounts import (
    NotMoved,
    credit,
    debit,
    find_account,
    find_trust_line,
    issuer_of,
    spendable,
)
from callora.stellar.sandbox.events import asset_code, asset_name
from callora.stellar.sandbox.soroban.faults import ContractError
from callora.stellar.sandbox.soroban.host import Contract, Host, function
from callora.stellar.sandbox.soroban.values import (
    ADDRESS,
    BOOL,
    BYTES,
    I128,
    I128_MAX,
    MUXED_ADDRESS,
    STRING,
    U32,
    U64,
    Shape,
    Slot,
    Unfit,
    sc_address,
    slot,
    split_muxed,
    struct,
    struct_value,
    symbol,
    vec_value,
)
from callora.stellar.sandbox.state import account_key, trust_line_key

DECIMALS: Final = 7
_INT64_MAX: Final = 2**63 - 1
_DAY: Final = 17_280
_INSTANCE_LEDGERS: Final = 7 * _DAY
_BALANCE_LEDGERS: Final = 30 * _DAY
_AUTHORIZED: Final = xdr.TrustLineFlags.AUTHORIZED_FLAG.value
_AUTH_REQUIRED: Final = xdr.AccountFlags.AUTH_REQUIRED_FLAG.value
_NATIVE: Final = xdr.AssetType.ASSET_TYPE_NATIVE


class TokenError(IntEnum):
    """N of `Error(Contract, #N)`."""

    ALREADY_INITIALIZED = 3
    UNAUTHORIZED = 4
    ACCOUNT_MISSING = 6
    NEGATIVE_AMOUNT = 8
    ALLOWANCE = 9
    BALANCE = 10
    BALANCE_DEAUTHORIZED = 11
    OVERFLOW = 12
    TRUSTLINE_MISSING = 13


@attrs.frozen
class Balance:
    """What a contract has of the asset."""

    amount: int
    authorized: bool
    clawback: bool


@attrs.frozen
class Allowance:
    """What one address may spend of another's."""

    amount: int
    expiration_ledger: int


@attrs.frozen
class Metadata:
    """How the asset is called."""

    decimal: int
    name: str
    symbol: str


_BALANCE: Final = struct(Balance, amount=I128, authorized=BOOL, clawback=BOOL)
_ALLOWANCE: Final = struct(Allowance, amount=I128, expiration_ledger=U32)
_METADATA: Final[Slot[Metadata]] = Slot(symbol("METADATA"), struct(Metadata, decimal=U32, name=STRING, symbol=STRING))
_ADMIN: Final = slot("Admin", ADDRESS)
_FAULTS: Final = {
    NotMoved.NO_ACCOUNT: (TokenError.ACCOUNT_MISSING, "account entry is missing"),
    NotMoved.NO_TRUST: (TokenError.TRUSTLINE_MISSING, "trustline entry is missing for account"),
    NotMoved.NOT_AUTHORIZED: (TokenError.BALANCE_DEAUTHORIZED, "balance is deauthorized"),
    NotMoved.UNDERFUNDED: (TokenError.BALANCE, "resulting balance is not within the allowed range"),
    NotMoved.LINE_FULL: (TokenError.BALANCE, "resulting balance is not within the allowed range"),
}


def _decode_asset(value: xdr.SCVal) -> xdr.Asset:
    if value.vec is None or not value.vec.sc_vec:
        raise Unfit("no asset")
    parts = value.vec.sc_vec
    if len(parts) == 1:
        return xdr.Asset(_NATIVE)
    if parts[1].map is None:
        raise Unfit("no asset")
    code, issuer = (entry.val for entry in parts[1].map.sc_map)
    name = STRING.decode(code).encode()
    account = xdr.AccountID(
        xdr.PublicKey(xdr.PublicKeyType.PUBLIC_KEY_TYPE_ED25519, ed25519=xdr.Uint256(BYTES.decode(issuer)))
    )
    if len(name) <= 4:
        short = xdr.AlphaNum4(xdr.AssetCode4(name.ljust(4, b"\0")), account)
        return xdr.Asset(xdr.AssetType.ASSET_TYPE_CREDIT_ALPHANUM4, alpha_num4=short)
    long = xdr.AlphaNum12(xdr.AssetCode12(name.ljust(12, b"\0")), account)
    return xdr.Asset(xdr.AssetType.ASSET_TYPE_CREDIT_ALPHANUM12, alpha_num12=long)


def _encode_asset(asset: xdr.Asset) -> xdr.SCVal:
    issuer = issuer_of(asset)
    if issuer is None:
        return vec_value([symbol("Native")])
    kind = "AlphaNum4" if asset.alpha_num4 is not None else "AlphaNum12"
    account = sc_address(issuer).account_id
    assert account is not None
    assert account.account_id.ed25519 is not None
    members = {
        "asset_code": STRING.encode(asset_code(asset)),
        "issuer": BYTES.encode(account.account_id.ed25519.uint256),
    }
    return vec_value([symbol(kind), struct_value(members)])


_ASSET: Final = slot("AssetInfo", Shape("asset", _encode_asset, _decode_asset))


def instance_entries(asset: xdr.Asset) -> list[xdr.SCMapEntry]:
    """Return what the contract of an asset begins with in its own storage."""
    metadata = Metadata(DECIMALS, asset_name(asset), asset_code(asset))
    entries = [
        xdr.SCMapEntry(_METADATA.key, _METADATA.shape.encode(metadata)),
        xdr.SCMapEntry(_ASSET.key, _ASSET.shape.encode(asset)),
    ]
    issuer = issuer_of(asset)
    if issuer is not None:
        entries.append(xdr.SCMapEntry(_ADMIN.key, _ADMIN.shape.encode(issuer)))
    return entries


class Token(Contract):
    """One asset's contract, while one of its functions runs."""

    native = True

    def __init__(self, host: Host, address: str, caller: str | None) -> None:
        """Make one, for one call."""
        super().__init__(host, address, caller)
        asset = self.instance.get(_ASSET)
        assert asset is not None
        self._asset = asset
        self._issuer = issuer_of(asset)

    # What anyone may ask.

    @function(returns=U32)
    def decimals(self) -> int:
        """Return the decimal places of an amount."""
        return DECIMALS

    @function(returns=STRING)
    def name(self) -> str:
        """Return the asset's code and issuer."""
        return asset_name(self._asset)

    @function(returns=STRING)
    def symbol(self) -> str:
        """Return the asset's code."""
        return asset_code(self._asset)

    @function(returns=ADDRESS)
    def admin(self) -> str:
        """Return who may mint."""
        admin = self.instance.get(_ADMIN)
        if admin is None:
            raise ContractError(TokenError.UNAUTHORIZED, "native asset doesn't have an administrator")
        return admin

    @function(ADDRESS, returns=I128)
    def balance(self, owner: str) -> int:
        """Return what an address has."""
        self._extend()
        if owner.startswith("C"):
            found = self._read(owner)
            return found.amount if found is not None else 0
        if owner == self._issuer:
            return _INT64_MAX
        self._touch(owner, written=False)
        overlay = self.host.storage.overlay
        if self._issuer is None:
            account = find_account(overlay, owner)
            if account is None:
                raise ContractError(TokenError.ACCOUNT_MISSING, "account entry is missing")
            return max(0, spendable(account, self.host.context.base_reserve))
        line = find_trust_line(overlay, owner, self._asset)
        if line is None:
            raise ContractError(TokenError.TRUSTLINE_MISSING, "trustline entry is missing for account")
        return line.balance.int64

    @function(ADDRESS, returns=BOOL)
    def authorized(self, owner: str) -> bool:
        """Tell whether an address may use what it has."""
        self._extend()
        if owner.startswith("C"):
            found = self._read(owner)
            return found.authorized if found is not None else not self._needs_authorization()
        if self._issuer is None or owner == self._issuer:
            return True
        self._touch(owner, written=False)
        line = find_trust_line(self.host.storage.overlay, owner, self._asset)
        if line is None:
            raise ContractError(TokenError.TRUSTLINE_MISSING, "trustline entry is missing for account")
        return bool(line.flags.uint32 & _AUTHORIZED)

    @function(ADDRESS, ADDRESS, returns=I128)
    def allowance(self, owner: str, spender: str) -> int:
        """Return what an address may still spend of another's."""
        self._extend()
        return self._allowance(owner, spender)

    # What moves money.

    @function(ADDRESS, MUXED_ADDRESS, I128)
    def transfer(self, source: str, to: str, amount: int) -> None:
        """Move an amount. `to` may carry a number, which the event repeats."""
        self._check(amount)
        self.require_auth(source)
        self._extend()
        target, number = split_muxed(to)
        self._spend(source, amount)
        self._receive(target, amount)
        self._moved(source, target, amount, number)

    @function(ADDRESS, ADDRESS, MUXED_ADDRESS, I128)
    def transfer_from(self, spender: str, source: str, to: str, amount: int) -> None:
        """Move an amount that its owner allowed."""
        self._check(amount)
        self.require_auth(spender)
        self._extend()
        target, number = split_muxed(to)
        self._spend_allowance(source, spender, amount)
        self._spend(source, amount)
        self._receive(target, amount)
        self._moved(source, target, amount, number)

    @function(ADDRESS, ADDRESS, I128, U32)
    def approve(self, owner: str, spender: str, amount: int, expiration_ledger: int) -> None:
        """Allow an address to spend an amount, until a ledger."""
        self._check(amount)
        self.require_auth(owner)
        self._extend()
        sequence = self.host.context.sequence
        place = self._allowance_place(owner, spender)
        if amount > 0 and expiration_ledger < sequence:
            raise ContractError(TokenError.ALLOWANCE, "live_until is less than ledger seq")
        self.temporary.set(place, Allowance(amount, expiration_ledger))
        if amount > 0 and expiration_ledger > sequence:
            self.temporary.extend_ttl(place, expiration_ledger - sequence, expiration_ledger - sequence)
        data = vec_value([I128.encode(amount), U32.encode(expiration_ledger)])
        self.publish([symbol("approve"), ADDRESS.encode(owner), ADDRESS.encode(spender), self._name_topic()], data)

    @function(ADDRESS, I128)
    def burn(self, source: str, amount: int) -> None:
        """Destroy an amount; only where there is an issuer, who cannot burn what it has not."""
        self._check(amount)
        self._check_issued(source)
        self.require_auth(source)
        self._extend()
        self._spend(source, amount)
        self.publish([symbol("burn"), ADDRESS.encode(source), self._name_topic()], I128.encode(amount))

    @function(MUXED_ADDRESS, I128)
    def mint(self, to: str, amount: int) -> None:
        """Make an amount; the issuer alone may."""
        self._check(amount)
        target, number = split_muxed(to)
        self._check_issued(target)
        admin = self.admin()
        self.require_auth(admin)
        self._extend()
        self._receive(target, amount)
        topics = [symbol("mint"), ADDRESS.encode(target), self._name_topic()]
        self.publish(topics, self._amount_data(amount, number))

    # How.

    def _check(self, amount: int) -> None:
        if amount < 0:
            raise ContractError(TokenError.NEGATIVE_AMOUNT, "negative amount is not allowed")

    def _check_issued(self, owner: str) -> None:
        if self._issuer is None or owner == self._issuer:
            raise ContractError(2, "operation not supported for this address")

    def _extend(self) -> None:
        self.instance.extend_ttl(_INSTANCE_LEDGERS - _DAY, _INSTANCE_LEDGERS)

    def _name_topic(self) -> xdr.SCVal:
        return STRING.encode(asset_name(self._asset))

    def _amount_data(self, amount: int, number: int | None) -> xdr.SCVal:
        if number is None:
            return I128.encode(amount)
        return struct_value({"amount": I128.encode(amount), "to_muxed_id": U64.encode(number)})

    def _moved(self, source: str, target: str, amount: int, number: int | None) -> None:
        """Publish what happened: with the issuer at one end, amounts come to be and cease to be (CAP-67)."""
        if source != self._issuer and target == self._issuer:
            topics = [symbol("burn"), ADDRESS.encode(source), self._name_topic()]
            self.publish(topics, I128.encode(amount))
            return
        if source == self._issuer and target != self._issuer:
            topics = [symbol("mint"), ADDRESS.encode(target), self._name_topic()]
        else:
            topics = [symbol("transfer"), ADDRESS.encode(source), ADDRESS.encode(target), self._name_topic()]
        self.publish(topics, self._amount_data(amount, number))

    def _touch(self, owner: str, *, written: bool) -> None:
        """Note what an account's balance is kept in."""
        if owner != self._issuer:
            key = account_key(owner) if self._issuer is None else trust_line_key(owner, self._asset)
            self.host.storage.touch(key, written=written)

    def _needs_authorization(self) -> bool:
        """Tell whether the issuer has to authorise a balance before it can be used."""
        if self._issuer is None:
            return False
        self.host.storage.touch(account_key(self._issuer))
        issuer = find_account(self.host.storage.overlay, self._issuer)
        if issuer is None:
            raise ContractError(TokenError.ACCOUNT_MISSING, "issuer account entry is missing")
        return bool(issuer.flags.uint32 & _AUTH_REQUIRED)

    @staticmethod
    def _place(owner: str) -> Slot[Balance]:
        return slot("Balance", _BALANCE, ADDRESS.encode(owner))

    def _read(self, owner: str) -> Balance | None:
        found = self.persistent.get(self._place(owner))
        if found is not None:
            self.persistent.extend_ttl(self._place(owner), _BALANCE_LEDGERS - _DAY, _BALANCE_LEDGERS)
        return found

    def _write(self, owner: str, balance: Balance) -> None:
        self.persistent.set(self._place(owner), balance)
        self.persistent.extend_ttl(self._place(owner), _BALANCE_LEDGERS - _DAY, _BALANCE_LEDGERS)

    def _spend(self, owner: str, amount: int) -> None:
        if not owner.startswith("C"):
            self._on_account(owner, amount, spent=True)
            return
        found = self._read(owner)
        if found is None:
            if amount:
                raise ContractError(TokenError.BALANCE, "balance is not sufficient to spend")
            return
        if not found.authorized:
            raise ContractError(TokenError.BALANCE_DEAUTHORIZED, "balance is deauthorized")
        if found.amount < amount:
            raise ContractError(TokenError.BALANCE, "balance is not sufficient to spend")
        self._write(owner, attrs.evolve(found, amount=found.amount - amount))

    def _receive(self, owner: str, amount: int) -> None:
        if not owner.startswith("C"):
            self._on_account(owner, amount, spent=False)
            return
        found = self._read(owner)
        if found is None:
            authorized = not self._needs_authorization()
            found = Balance(0, authorized, clawback=False)
        if not found.authorized:
            raise ContractError(TokenError.BALANCE_DEAUTHORIZED, "balance is deauthorized")
        if found.amount > I128_MAX - amount:
            raise ContractError(TokenError.OVERFLOW, "balance overflowed")
        self._write(owner, attrs.evolve(found, amount=found.amount + amount))

    def _on_account(self, owner: str, amount: int, *, spent: bool) -> None:
        """Move an amount on an account or trust line, which hold 64 bits."""
        if amount > _INT64_MAX:
            raise ContractError(TokenError.BALANCE, "resulting balance is not within the allowed range")
        self._touch(owner, written=True)
        overlay = self.host.storage.overlay
        if spent:
            refused = debit(overlay, owner, self._asset, amount, self.host.context.base_reserve)
        else:
            refused = credit(overlay, owner, self._asset, amount)
        if refused is not None:
            raise ContractError(*_FAULTS[refused])

    @staticmethod
    def _allowance_place(owner: str, spender: str) -> Slot[Allowance]:
        key = struct_value({"from": ADDRESS.encode(owner), "spender": ADDRESS.encode(spender)})
        return slot("Allowance", _ALLOWANCE, key)

    def _allowance(self, owner: str, spender: str) -> int:
        found = self.temporary.get(self._allowance_place(owner, spender))
        if found is None or found.expiration_ledger < self.host.context.sequence:
            return 0
        return found.amount

    def _spend_allowance(self, owner: str, spender: str, amount: int) -> None:
        left = self._allowance(owner, spender)
        if left < amount:
            raise ContractError(TokenError.ALLOWANCE, "not enough allowance to spend")
        place = self._allowance_place(owner, spender)
        found = self.temporary.get(place)
        if amount and found is not None:
            self.temporary.set(place, attrs.evolve(found, amount=left - amount))
