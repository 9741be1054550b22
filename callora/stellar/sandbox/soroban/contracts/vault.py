"""The Callora vault contract, generation G1 (June 2026): its functions, the order of its checks, its errors and events.

Source: CalloraOrg/Callora-Contracts, docs/interfaces/vault.json and contracts/vault of that time. Written anew from
what it does; where its documents and its code differ, as its code does it: every event of a batch carries the final
balance.
"""

from enum import IntEnum
from typing import Final, TypeVar

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.soroban.faults import ContractError, Trap
from callora.stellar.sandbox.soroban.host import Contract, function
from callora.stellar.sandbox.soroban.values import (
    ADDRESS,
    BOOL,
    BYTES32,
    I128,
    I128_MAX,
    STRING,
    SYMBOL,
    U16,
    U32,
    U64,
    VOID,
    VOID_VALUE,
    Slot,
    option,
    pair,
    slot,
    struct,
    struct_value,
    symbol,
    unit_enum,
    vec,
    vec_value,
)

T = TypeVar("T")

BATCH_ITEMS_MAX: Final = 50
OFFERING_ID_CHARS_MAX: Final = 64
METADATA_CHARS_MAX: Final = 256
LIST_PRICES_MAX: Final = 100
NO_SLIPPAGE_LIMIT: Final = 65_535
_BASIS_POINTS: Final = 10_000
_U64_MAX: Final = 2**64 - 1
_DAY: Final = 17_280
_INSTANCE_THRESHOLD: Final = 30 * _DAY
_INSTANCE_LEDGERS: Final = 60 * _DAY
_REQUEST_THRESHOLD: Final = 7 * _DAY
_REQUEST_LEDGERS: Final = 30 * _DAY


class VaultError(IntEnum):
    """N of `Error(Contract, #N)`."""

    NOT_INITIALIZED = 1
    ALREADY_INITIALIZED = 2
    UNAUTHORIZED = 3
    PAUSED = 4
    INSUFFICIENT_BALANCE = 5
    AMOUNT_NOT_POSITIVE = 6
    EXCEEDS_MAX_DEDUCT = 7
    BELOW_MIN_DEPOSIT = 8
    OVERFLOW = 9
    INITIAL_BALANCE_NEGATIVE = 10
    MIN_DEPOSIT_NOT_POSITIVE = 11
    MAX_DEDUCT_NOT_POSITIVE = 12
    MIN_DEPOSIT_EXCEEDS_MAX_DEDUCT = 13
    USDC_TOKEN_CANNOT_BE_VAULT = 14
    REVENUE_POOL_CANNOT_BE_VAULT = 15
    AUTHORIZED_CALLER_CANNOT_BE_VAULT = 16
    INITIAL_BALANCE_EXCEEDS_ON_LEDGER = 17
    ALREADY_PAUSED = 18
    NOT_PAUSED = 19
    SETTLEMENT_NOT_SET = 20
    BATCH_EMPTY = 21
    BATCH_TOO_LARGE = 22
    NEW_OWNER_SAME_AS_CURRENT = 23
    NO_OWNERSHIP_TRANSFER_PENDING = 24
    NO_ADMIN_TRANSFER_PENDING = 25
    OFFERING_ID_TOO_LONG = 26
    METADATA_TOO_LONG = 27
    PRICE_PARSE_ERROR = 28
    DUPLICATE_REQUEST_ID = 29
    OFFERING_ID_INVALID = 30
    METADATA_INVALID = 31
    STALE_NONCE = 32
    NEW_REVENUE_POOL_SAME_AS_CURRENT = 33
    NO_REVENUE_POOL_TRANSFER_PENDING = 34
    SLIPPAGE = 35


class Severity(IntEnum):
    """How urgent a broadcast is."""

    INFO = 0
    WARN = 1
    CRIT = 2


@attrs.frozen
class DeductItem:
    """One deduction of a batch."""

    amount: int
    request_id: str | None
    """At most 32 of A-Z, a-z, 0-9 and _; single use. None: not deduplicated."""


@attrs.frozen
class VaultMeta:
    """What a vault is and has."""

    owner: str
    balance: int
    """Stroops that it accounts for."""
    authorized_caller: str | None
    min_deposit: int


_META: Final = slot(
    "MetaKey",
    struct(VaultMeta, owner=ADDRESS, balance=I128, authorized_caller=option(ADDRESS), min_deposit=I128),
)
_ADMIN: Final = slot("Admin", ADDRESS)
_USDC: Final = slot("UsdcToken", ADDRESS)
_SETTLEMENT: Final = slot("Settlement", ADDRESS)
_REVENUE_POOL: Final = slot("RevenuePool", ADDRESS)
_MAX_DEDUCT: Final = slot("MaxDeduct", I128)
_PAUSED: Final = slot("Paused", BOOL)
_OFFERINGS: Final = slot("OfferingIndex", vec(STRING))
_PENDING_OWNER: Final = slot("PendingOwner", ADDRESS)
_PENDING_ADMIN: Final = slot("PendingAdmin", ADDRESS)
_PENDING_REVENUE_POOL: Final = slot("PendingRevenuePool", option(ADDRESS))
_DEPOSITORS: Final = slot("DepositorList", vec(ADDRESS))
_VERSION: Final = slot("ContractVersion", BYTES32)
_NONCE: Final = slot("AuthorizedCallerNonce", U64)
_DEDUCT_ITEM: Final = struct(DeductItem, amount=I128, request_id=option(SYMBOL))
_SEVERITY: Final = unit_enum(Severity)
_OPTIONAL_ADDRESS: Final = option(ADDRESS)


def _price(offering_id: str) -> Slot[str]:
    return slot("Price", STRING, STRING.encode(offering_id))


def _metadata(offering_id: str) -> Slot[str]:
    return slot("Metadata", STRING, STRING.encode(offering_id))


def _processed(request_id: str) -> Slot[bool]:
    return slot("ProcessedRequest", BOOL, SYMBOL.encode(request_id))


def _amounts(amount: int, balance: int) -> xdr.SCVal:
    return vec_value([I128.encode(amount), I128.encode(balance)])


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_plain(text: str) -> bool:
    """Tell whether a text is one that the vault keeps: not empty, no control characters, no space at either end."""
    raw = _bytes_of(text)
    return bool(raw) and all(byte > 0x1F and byte != 0x7F for byte in raw) and raw[0] != 0x20 and raw[-1] != 0x20


def _parse_price(text: str) -> int | None:
    """Return the number that a price is, as Rust reads an i128; None where it is none or none above 0."""
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        return None
    number = int(digits)
    return number if 0 < number <= I128_MAX else None


class Vault(Contract):
    """The vault, while one of its functions runs."""

    # Beginning.

    @function(
        ADDRESS,
        ADDRESS,
        option(I128),
        option(ADDRESS),
        option(I128),
        option(ADDRESS),
        option(I128),
        returns=_META.shape,
    )
    def init(
        self,
        owner: str,
        usdc_token: str,
        initial_balance: int | None,
        authorized_caller: str | None,
        min_deposit: int | None,
        revenue_pool: str | None,
        max_deduct: int | None,
    ) -> VaultMeta:
        """Begin, once."""
        self.require_auth(owner)
        if self.instance.has(_META):
            raise ContractError(VaultError.ALREADY_INITIALIZED)
        if usdc_token == self.address:
            raise ContractError(VaultError.USDC_TOKEN_CANNOT_BE_VAULT)
        if revenue_pool == self.address:
            raise ContractError(VaultError.REVENUE_POOL_CANNOT_BE_VAULT)
        if authorized_caller == self.address:
            raise ContractError(VaultError.AUTHORIZED_CALLER_CANNOT_BE_VAULT)
        balance = 0 if initial_balance is None else initial_balance
        if balance < 0:
            raise ContractError(VaultError.INITIAL_BALANCE_NEGATIVE)
        least = 1 if min_deposit is None else min_deposit
        if least <= 0:
            raise ContractError(VaultError.MIN_DEPOSIT_NOT_POSITIVE)
        most = I128_MAX if max_deduct is None else max_deduct
        if most <= 0:
            raise ContractError(VaultError.MAX_DEDUCT_NOT_POSITIVE)
        if least > most:
            raise ContractError(VaultError.MIN_DEPOSIT_EXCEEDS_MAX_DEDUCT)
        if balance > 0 and self._on_ledger(usdc_token) < balance:
            raise ContractError(VaultError.INITIAL_BALANCE_EXCEEDS_ON_LEDGER)
        meta = VaultMeta(owner, balance, authorized_caller, least)
        self.instance.set(_META, meta)
        self.instance.set(_USDC, usdc_token)
        self.instance.set(_ADMIN, owner)
        if revenue_pool is not None:
            self.instance.set(_REVENUE_POOL, revenue_pool)
        self.instance.set(_MAX_DEDUCT, most)
        self._bump()
        self._event("init", owner, data=I128.encode(balance))
        return meta

    # What anyone may ask.

    @function(returns=_META.shape)
    def get_meta(self) -> VaultMeta:
        """Return what the vault is and has."""
        return self._required(_META)

    @function(returns=I128)
    def balance(self) -> int:
        """Return what it accounts for."""
        return self.get_meta().balance

    @function(returns=ADDRESS)
    def get_admin(self) -> str:
        """Return its administrator."""
        return self._required(_ADMIN)

    @function(returns=ADDRESS)
    def get_usdc_token(self) -> str:
        """Return the token that it holds."""
        return self._required(_USDC)

    @function(returns=I128)
    def get_max_deduct(self) -> int:
        """Return the most that one deduction may take."""
        found = self.instance.get(_MAX_DEDUCT)
        return I128_MAX if found is None else found

    @function(returns=ADDRESS)
    def get_settlement(self) -> str:
        """Return where deductions go."""
        found = self.instance.get(_SETTLEMENT)
        if found is None:
            raise ContractError(VaultError.SETTLEMENT_NOT_SET)
        return found

    @function(returns=_OPTIONAL_ADDRESS)
    def get_revenue_pool(self) -> str | None:
        """Return an address that is only informational."""
        return self.instance.get(_REVENUE_POOL)

    @function(returns=_OPTIONAL_ADDRESS)
    def get_pending_owner(self) -> str | None:
        """Return who was nominated as owner."""
        return self.instance.get(_PENDING_OWNER)

    @function(returns=_OPTIONAL_ADDRESS)
    def get_pending_admin(self) -> str | None:
        """Return who was nominated as administrator."""
        return self.instance.get(_PENDING_ADMIN)

    @function(returns=_OPTIONAL_ADDRESS)
    def get_pending_revenue_pool(self) -> str | None:
        """Return what was proposed as revenue pool."""
        return self.instance.get(_PENDING_REVENUE_POOL)

    @function(returns=vec(_OPTIONAL_ADDRESS))
    def get_contract_addresses(self) -> tuple[str | None, ...]:
        """Return token, settlement and revenue pool."""
        return tuple(self.instance.get(place) for place in (_USDC, _SETTLEMENT, _REVENUE_POOL))

    @function(returns=BOOL)
    def is_paused(self) -> bool:
        """Tell whether deposits and deductions are refused."""
        return self.instance.get(_PAUSED) is True

    @function(returns=U64)
    def get_authorized_caller_nonce(self) -> int:
        """Return what the next `set_authorized_caller` has to name."""
        return self.instance.get(_NONCE) or 0

    @function(ADDRESS, returns=BOOL)
    def is_authorized_depositor(self, caller: str) -> bool:
        """Tell whether an address may deposit."""
        return caller == self.get_meta().owner or caller in self.get_allowed_depositors()

    @function(STRING, returns=option(STRING))
    def get_metadata(self, offering_id: str) -> str | None:
        """Return what is kept about an offering."""
        return self.instance.get(_metadata(offering_id))

    @function(returns=vec(ADDRESS))
    def get_allowed_depositors(self) -> tuple[str, ...]:
        """Return who may deposit besides the owner."""
        return self.instance.get(_DEPOSITORS) or ()

    @function(returns=vec(ADDRESS))
    def get_allowlist(self) -> tuple[str, ...]:
        """Return who may deposit besides the owner: the same under an older name."""
        return self.get_allowed_depositors()

    @function(STRING, returns=option(STRING))
    def get_price(self, offering_id: str) -> str | None:
        """Return an offering's price, as it was written."""
        return self.instance.get(_price(offering_id))

    @function(U32, U32, returns=vec(pair(STRING, I128)))
    def list_prices(self, start: int, limit: int) -> tuple[tuple[str, int], ...]:
        """Return offerings with their prices, in the order in which they came."""
        listed = (self.instance.get(_OFFERINGS) or ())[start : start + min(limit, LIST_PRICES_MAX)]
        found = ((offering, self.get_price(offering)) for offering in listed)
        priced = ((offering, _parse_price(price)) for offering, price in found if price is not None)
        return tuple((offering, price) for offering, price in priced if price is not None)

    @function(SYMBOL, returns=BOOL)
    def is_request_processed(self, request_id: str) -> bool:
        """Tell whether a request id was used. The mark may also be an old one, in temporary storage."""
        place = _processed(request_id)
        return self.persistent.has(place) or self.temporary.has(place)

    @function(returns=option(BYTES32))
    def get_version(self) -> bytes | None:
        """Return the code that the last upgrade named."""
        return self.instance.get(_VERSION)

    @function(ADDRESS)
    def require_owner(self, caller: str) -> None:
        """Refuse whoever is not the owner. Asks for no signature."""
        if caller != self.get_meta().owner:
            raise ContractError(VaultError.UNAUTHORIZED)

    # Who may do what.

    @function(ADDRESS, ADDRESS)
    def set_admin(self, caller: str, new_admin: str) -> None:
        """Nominate an administrator."""
        self.require_auth(caller)
        current = self.get_admin()
        if caller != current:
            raise ContractError(VaultError.UNAUTHORIZED)
        self.instance.set(_PENDING_ADMIN, new_admin)
        self._event("admin_nominated", current, new_admin)

    @function()
    def accept_admin(self) -> None:
        """Become administrator, having been nominated."""
        pending = self.instance.get(_PENDING_ADMIN)
        if pending is None:
            raise ContractError(VaultError.NO_ADMIN_TRANSFER_PENDING)
        self.require_auth(pending)
        current = self.get_admin()
        self.instance.set(_ADMIN, pending)
        self.instance.remove(_PENDING_ADMIN)
        self._event("admin_accepted", current, pending)

    @function(ADDRESS)
    def transfer_ownership(self, new_owner: str) -> None:
        """Nominate an owner."""
        meta = self.get_meta()
        self.require_auth(meta.owner)
        if new_owner == meta.owner:
            raise ContractError(VaultError.NEW_OWNER_SAME_AS_CURRENT)
        self.instance.set(_PENDING_OWNER, new_owner)
        self._event("ownership_nominated", meta.owner, new_owner)

    @function()
    def accept_ownership(self) -> None:
        """Become owner, having been nominated."""
        pending = self.instance.get(_PENDING_OWNER)
        if pending is None:
            raise ContractError(VaultError.NO_OWNERSHIP_TRANSFER_PENDING)
        self.require_auth(pending)
        meta = self.get_meta()
        self.instance.set(_META, attrs.evolve(meta, owner=pending))
        self.instance.remove(_PENDING_OWNER)
        self._event("ownership_accepted", meta.owner, pending)

    @function(_OPTIONAL_ADDRESS, U64)
    def set_authorized_caller(self, new_caller: str | None, expected_nonce: int) -> None:
        """Say who may deduct besides the owner."""
        meta = self.get_meta()
        self.require_auth(meta.owner)
        if new_caller == self.address:
            raise ContractError(VaultError.AUTHORIZED_CALLER_CANNOT_BE_VAULT)
        nonce = self.get_authorized_caller_nonce()
        if expected_nonce != nonce:
            raise ContractError(VaultError.STALE_NONCE)
        self.instance.set(_META, attrs.evolve(meta, authorized_caller=new_caller))
        self.instance.set(_NONCE, 0 if nonce == _U64_MAX else nonce + 1)
        callers = [_OPTIONAL_ADDRESS.encode(address) for address in (meta.authorized_caller, new_caller)]
        self._event("set_authorized_caller", meta.owner, data=vec_value([*callers, U64.encode(expected_nonce)]))

    @function(I128)
    def set_max_deduct(self, max_deduct: int) -> None:
        """Say how much one deduction may take."""
        meta = self.get_meta()
        self.require_auth(meta.owner)
        if max_deduct <= 0:
            raise ContractError(VaultError.MAX_DEDUCT_NOT_POSITIVE)
        old = self.get_max_deduct()
        self.instance.set(_MAX_DEDUCT, max_deduct)
        self._event("set_max_deduct", meta.owner, data=_amounts(old, max_deduct))

    @function(ADDRESS, _OPTIONAL_ADDRESS)
    def set_allowed_depositor(self, caller: str, depositor: str | None) -> None:
        """Let an address deposit; None takes the right from all of them."""
        self._as_owner(caller)
        self._admit(depositor)

    @function(ADDRESS)
    def clear_allowed_depositors(self, caller: str) -> None:
        """Take the right to deposit from all but the owner."""
        self._as_owner(caller)
        self._admit(None)

    @function(ADDRESS, ADDRESS)
    def add_address(self, caller: str, depositor: str) -> None:
        """Let an address deposit, and say so in an event."""
        self._as_owner(caller)
        self._admit(depositor)
        self._event("allowlist_add", caller, depositor)

    @function(ADDRESS)
    def clear_all(self, caller: str) -> None:
        """Take the right to deposit from all but the owner, and say so in an event."""
        self._as_owner(caller)
        self._admit(None)
        self._event("allowlist_clear", caller)

    @function(ADDRESS, ADDRESS)
    def set_settlement(self, caller: str, settlement_address: str) -> None:
        """Say where deductions go."""
        self._as_admin(caller)
        self.instance.set(_SETTLEMENT, settlement_address)
        self._event("set_settlement", caller, data=ADDRESS.encode(settlement_address))

    @function(_OPTIONAL_ADDRESS)
    def propose_revenue_pool(self, new_pool: str | None) -> None:
        """Propose a revenue pool, or none."""
        meta = self.get_meta()
        self.require_auth(meta.owner)
        if new_pool is not None:
            if new_pool == self.address:
                raise ContractError(VaultError.REVENUE_POOL_CANNOT_BE_VAULT)
            if new_pool == self.get_revenue_pool():
                raise ContractError(VaultError.NEW_REVENUE_POOL_SAME_AS_CURRENT)
        self.instance.set(_PENDING_REVENUE_POOL, new_pool)
        self._event("revenue_pool_proposed", meta.owner, new_pool)

    @function()
    def accept_revenue_pool(self) -> None:
        """Become the revenue pool, having been proposed; where none was, let it be none."""
        if not self.instance.has(_PENDING_REVENUE_POOL):
            raise ContractError(VaultError.NO_REVENUE_POOL_TRANSFER_PENDING)
        pending = self.instance.get(_PENDING_REVENUE_POOL)
        old = self.get_revenue_pool()
        if pending is not None:
            self.require_auth(pending)
            self.instance.set(_REVENUE_POOL, pending)
        else:
            self.instance.remove(_REVENUE_POOL)
        self.instance.remove(_PENDING_REVENUE_POOL)
        self._event("revenue_pool_accepted", old, pending)

    @function()
    def cancel_revenue_pool(self) -> None:
        """Take back what was proposed."""
        meta = self.get_meta()
        self.require_auth(meta.owner)
        if not self.instance.has(_PENDING_REVENUE_POOL):
            raise ContractError(VaultError.NO_REVENUE_POOL_TRANSFER_PENDING)
        pending = self.instance.get(_PENDING_REVENUE_POOL)
        self.instance.remove(_PENDING_REVENUE_POOL)
        self._event("revenue_pool_cancelled", meta.owner, pending)

    @function(ADDRESS)
    def pause(self, caller: str) -> None:
        """Refuse deposits and deductions from now on."""
        self._as_admin_or_owner(caller)
        if self.is_paused():
            raise ContractError(VaultError.ALREADY_PAUSED)
        self.instance.set(_PAUSED, True)
        self._event("vault_paused", caller)

    @function(ADDRESS)
    def unpause(self, caller: str) -> None:
        """Allow them again."""
        self._as_admin_or_owner(caller)
        if not self.is_paused():
            raise ContractError(VaultError.NOT_PAUSED)
        self.instance.set(_PAUSED, False)
        self._event("vault_unpaused", caller)

    # Money.

    @function(ADDRESS, I128, returns=I128)
    def deposit(self, caller: str, amount: int) -> int:
        """Take an amount from a depositor."""
        self._require_not_paused()
        self.require_auth(caller)
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        if not self.is_authorized_depositor(caller):
            raise ContractError(VaultError.UNAUTHORIZED)
        meta = self.get_meta()
        if amount < meta.min_deposit:
            raise ContractError(VaultError.BELOW_MIN_DEPOSIT)
        token = self.get_usdc_token()
        balance = meta.balance + amount
        if balance > I128_MAX:
            raise ContractError(VaultError.OVERFLOW)
        self._set_balance(meta, balance)
        self._event("deposit", caller, data=_amounts(amount, balance))
        self._transfer(token, caller, self.address, amount)
        return balance

    @function(ADDRESS, I128, option(SYMBOL), U16, returns=I128)
    def deduct(self, caller: str, amount: int, request_id: str | None, max_fee_bps: int) -> int:
        """Take an amount out, for one call, to the settlement contract."""
        self._require_not_paused()
        self.require_auth(caller)
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        self._require_deductor(caller)
        if amount > self.get_max_deduct():
            raise ContractError(VaultError.EXCEEDS_MAX_DEDUCT)
        if request_id is not None:
            self._require_not_processed(request_id)
        meta = self.get_meta()
        if meta.balance < amount:
            raise ContractError(VaultError.INSUFFICIENT_BALANCE)
        if max_fee_bps < NO_SLIPPAGE_LIMIT and meta.balance > 0:
            if amount * _BASIS_POINTS > I128_MAX:
                raise ContractError(VaultError.OVERFLOW)
            if amount * _BASIS_POINTS // meta.balance > max_fee_bps:
                raise ContractError(VaultError.SLIPPAGE)
        self._settle(amount)
        balance = meta.balance - amount
        self._set_balance(meta, balance)
        if request_id is not None:
            self._mark_processed(request_id)
        self._event("deduct", caller, SYMBOL.encode(request_id or ""), data=_amounts(amount, balance))
        return balance

    @function(ADDRESS, vec(_DEDUCT_ITEM), returns=I128)
    def batch_deduct(self, caller: str, items: tuple[DeductItem, ...]) -> int:
        """Take several amounts out, all or none of them."""
        self._require_not_paused()
        self.require_auth(caller)
        self._require_deductor(caller)
        if not items:
            raise ContractError(VaultError.BATCH_EMPTY)
        if len(items) > BATCH_ITEMS_MAX:
            raise ContractError(VaultError.BATCH_TOO_LARGE)
        most = self.get_max_deduct()
        meta = self.get_meta()
        balance = meta.balance
        seen: set[str] = set()
        for item in items:
            if item.amount <= 0:
                raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
            if item.amount > most:
                raise ContractError(VaultError.EXCEEDS_MAX_DEDUCT)
            if balance < item.amount:
                raise ContractError(VaultError.INSUFFICIENT_BALANCE)
            if item.request_id is not None:
                self._require_not_processed(item.request_id)
                if item.request_id in seen:
                    raise ContractError(VaultError.DUPLICATE_REQUEST_ID)
                seen.add(item.request_id)
            balance -= item.amount
        self._settle(meta.balance - balance)
        self._set_balance(meta, balance)
        for item in items:
            if item.request_id is not None:
                self._mark_processed(item.request_id)
        for item in items:
            request = SYMBOL.encode(item.request_id or "")
            self._event("deduct", caller, request, data=_amounts(item.amount, balance))
        return balance

    @function(I128, returns=I128)
    def withdraw(self, amount: int) -> int:
        """Pay an amount to the owner, also while paused."""
        meta = self.get_meta()
        balance = self._withdraw(meta, meta.owner, amount)
        self._event("withdraw", meta.owner, data=_amounts(amount, balance))
        return balance

    @function(ADDRESS, I128, returns=I128)
    def withdraw_to(self, to: str, amount: int) -> int:
        """Pay an amount to anyone, also while paused."""
        meta = self.get_meta()
        balance = self._withdraw(meta, to, amount)
        self._event("withdraw_to", meta.owner, to, data=_amounts(amount, balance))
        return balance

    @function(ADDRESS, ADDRESS, I128)
    def distribute(self, caller: str, to: str, amount: int) -> None:
        """Pay from what it holds, whatever it accounts for."""
        self._as_admin(caller)
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        token = self.get_usdc_token()
        if self._on_ledger(token) < amount:
            raise ContractError(VaultError.INSUFFICIENT_BALANCE)
        self._event("distribute", to, data=I128.encode(amount))
        self._transfer(token, self.address, to, amount)

    @function(ADDRESS, vec(SYMBOL))
    def prune_processed_requests(self, caller: str, ids: tuple[str, ...]) -> None:
        """Forget request ids."""
        self._as_owner(caller)
        for request_id in ids:
            if self.persistent.has(_processed(request_id)):
                self.persistent.remove(_processed(request_id))
                self._event("request_id_pruned", caller, data=SYMBOL.encode(request_id))

    # Offerings.

    @function(ADDRESS, STRING, STRING)
    def set_price(self, caller: str, offering_id: str, price: str) -> None:
        """Keep an offering's price."""
        self._as_owner(caller)
        if not _is_plain(self._buffered(offering_id, METADATA_CHARS_MAX)):
            raise ContractError(VaultError.OFFERING_ID_INVALID)
        self._require_offering_id(offering_id)
        if _parse_price(self._buffered(price, OFFERING_ID_CHARS_MAX)) is None:
            raise ContractError(VaultError.PRICE_PARSE_ERROR)
        self.instance.set(_price(offering_id), price)
        listed = self.instance.get(_OFFERINGS) or ()
        if offering_id not in listed:
            self.instance.set(_OFFERINGS, (*listed, offering_id))
        self._event("price_set", caller, STRING.encode(offering_id), data=STRING.encode(price))

    @function(ADDRESS, STRING)
    def remove_price(self, caller: str, offering_id: str) -> None:
        """Forget an offering's price."""
        self._as_owner(caller)
        self._require_offering_id(offering_id)
        self.instance.remove(_price(offering_id))
        left = tuple(offering for offering in self.instance.get(_OFFERINGS) or () if offering != offering_id)
        if left:
            self.instance.set(_OFFERINGS, left)
        else:
            self.instance.remove(_OFFERINGS)
        self._event("price_removed", caller, STRING.encode(offering_id))

    @function(ADDRESS, STRING, STRING, returns=STRING)
    def set_metadata(self, caller: str, offering_id: str, metadata: str) -> str:
        """Keep something about an offering."""
        self._as_owner(caller)
        if not _is_plain(self._buffered(offering_id, METADATA_CHARS_MAX)):
            raise ContractError(VaultError.OFFERING_ID_INVALID)
        if not _is_plain(self._buffered(metadata, METADATA_CHARS_MAX)):
            raise ContractError(VaultError.METADATA_INVALID)
        self._require_offering_id(offering_id)
        self.instance.set(_metadata(offering_id), metadata)
        self._event("metadata_set", STRING.encode(offering_id), caller, data=STRING.encode(metadata))
        return metadata

    @function(ADDRESS, STRING, STRING, returns=STRING)
    def update_metadata(self, caller: str, offering_id: str, metadata: str) -> str:
        """Replace what is kept about an offering."""
        self._as_owner(caller)
        self._require_offering_id(offering_id)
        if len(_bytes_of(metadata)) > METADATA_CHARS_MAX:
            raise ContractError(VaultError.METADATA_TOO_LONG)
        old = self.get_metadata(offering_id) or ""
        self.instance.set(_metadata(offering_id), metadata)
        both = vec_value([STRING.encode(old), STRING.encode(metadata)])
        self._event("metadata_updated", STRING.encode(offering_id), caller, data=both)
        return metadata

    @function(ADDRESS, STRING)
    def remove_metadata(self, caller: str, offering_id: str) -> None:
        """Forget what is kept about an offering."""
        self._as_owner(caller)
        self._require_offering_id(offering_id)
        self.instance.remove(_metadata(offering_id))
        self._event("metadata_removed", STRING.encode(offering_id), caller)

    @function(ADDRESS, _SEVERITY, STRING)
    def broadcast(self, caller: str, severity: IntEnum, message: str) -> None:
        """Say something in an event."""
        self._as_admin(caller)
        if not 0 < len(_bytes_of(message)) <= METADATA_CHARS_MAX:
            raise ContractError(VaultError.METADATA_TOO_LONG)
        data = struct_value({"severity": _SEVERITY.encode(severity), "message": STRING.encode(message)})
        self._event("admin_broadcast", caller, data=data)

    # How.

    def _required(self, place: Slot[T]) -> T:
        found = self.instance.get(place)
        if found is None:
            raise ContractError(VaultError.NOT_INITIALIZED)
        return found

    def _event(self, name: str, *topics: str | xdr.SCVal | None, data: xdr.SCVal = VOID_VALUE) -> None:
        """Publish an event; a topic that is text is an address."""
        encoded = [topic if isinstance(topic, xdr.SCVal) else _OPTIONAL_ADDRESS.encode(topic) for topic in topics]
        self.publish([symbol(name), *encoded], data)

    def _bump(self) -> None:
        self.instance.extend_ttl(_INSTANCE_THRESHOLD, _INSTANCE_LEDGERS)

    def _set_balance(self, meta: VaultMeta, balance: int) -> None:
        self.instance.set(_META, attrs.evolve(meta, balance=balance))
        self._bump()

    def _as_owner(self, caller: str) -> None:
        self.require_auth(caller)
        self.require_owner(caller)

    def _as_admin(self, caller: str) -> None:
        self.require_auth(caller)
        if caller != self.get_admin():
            raise ContractError(VaultError.UNAUTHORIZED)

    def _as_admin_or_owner(self, caller: str) -> None:
        self.require_auth(caller)
        if caller not in (self.get_admin(), self.get_meta().owner):
            raise ContractError(VaultError.UNAUTHORIZED)

    def _admit(self, depositor: str | None) -> None:
        listed = self.get_allowed_depositors() if depositor is not None else ()
        if depositor is not None and depositor not in listed:
            listed = (*listed, depositor)
        self.instance.set(_DEPOSITORS, listed)

    def _require_not_paused(self) -> None:
        if self.is_paused():
            raise ContractError(VaultError.PAUSED)

    def _require_deductor(self, caller: str) -> None:
        meta = self.get_meta()
        if caller not in (meta.owner, meta.authorized_caller):
            raise ContractError(VaultError.UNAUTHORIZED)

    def _require_not_processed(self, request_id: str) -> None:
        if self.is_request_processed(request_id):
            raise ContractError(VaultError.DUPLICATE_REQUEST_ID)

    def _mark_processed(self, request_id: str) -> None:
        place = _processed(request_id)
        self.persistent.set(place, True)
        self.persistent.extend_ttl(place, _REQUEST_THRESHOLD, _REQUEST_LEDGERS)

    def _require_offering_id(self, offering_id: str) -> None:
        if len(_bytes_of(offering_id)) > OFFERING_ID_CHARS_MAX:
            raise ContractError(VaultError.OFFERING_ID_TOO_LONG)

    @staticmethod
    def _buffered(text: str, size: int) -> str:
        """Return a text that the contract copies into a buffer of a fixed size before it looks: a longer one traps."""
        if len(_bytes_of(text)) > size:
            raise Trap("VM call trapped: UnreachableCodeReached")
        return text

    def _on_ledger(self, token: str) -> int:
        return self.call(token, "balance", [ADDRESS.encode(self.address)], I128)

    def _transfer(self, token: str, source: str, to: str, amount: int) -> None:
        self.call(token, "transfer", [ADDRESS.encode(source), ADDRESS.encode(to), I128.encode(amount)], VOID)

    def _settle(self, amount: int) -> None:
        """Move an amount to the settlement contract, and have it credited to its pool."""
        settlement = self.get_settlement()
        self._transfer(self.get_usdc_token(), self.address, settlement, amount)
        arguments = [ADDRESS.encode(self.address), I128.encode(amount), BOOL.encode(True), VOID_VALUE]
        self.call(settlement, "receive_payment", arguments, VOID)

    def _withdraw(self, meta: VaultMeta, to: str, amount: int) -> int:
        self.require_auth(meta.owner)
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        if meta.balance < amount:
            raise ContractError(VaultError.INSUFFICIENT_BALANCE)
        self._transfer(self.get_usdc_token(), self.address, to, amount)
        balance = meta.balance - amount
        self._set_balance(meta, balance)
        return balance
