"""The Callora vault contract's next generation (G2, July 2026), as far as telling it from G1 and using it need it.

It is here so that the choice of an adapter can be met: other arguments, other events, other rules. Timelocks, rate
limits and reserve caps are left out. Source: as for G1; the sources of that time do not compile, and this does what
they say.
"""

from typing import Final, TypeVar

from stellar_sdk import xdr

from callora.stellar.sandbox.soroban.contracts.vault import VaultError
from callora.stellar.sandbox.soroban.faults import ContractError
from callora.stellar.sandbox.soroban.host import Contract, function
from callora.stellar.sandbox.soroban.values import (
    ADDRESS,
    BOOL,
    I128,
    I128_MAX,
    U64,
    VOID,
    Slot,
    option,
    pair,
    slot,
    symbol,
    vec,
    vec_value,
)

T = TypeVar("T")

CALLER_NOT_IN_ALLOWLIST: Final = 44
CAPABILITIES: Final = 0b1111
"""Which features it says it has: deposits, deductions, batches, withdrawals (which it has not)."""
_DAY: Final = 17_280
_OPTIONAL_ADDRESS: Final = option(ADDRESS)
_OWNER: Final = slot("Owner", ADDRESS)
_USDC: Final = slot("UsdcToken", ADDRESS)
_BALANCE: Final = slot("Balance", I128)
_AUTHORIZED_CALLER: Final = slot("AuthorizedCaller", _OPTIONAL_ADDRESS)
_MIN_DEPOSIT: Final = slot("MinDeposit", I128)
_REVENUE_POOL: Final = slot("RevenuePool", ADDRESS)
_MAX_DEDUCT: Final = slot("MaxDeduct", I128)
_SETTLEMENT: Final = slot("Settlement", ADDRESS)
_PAUSED: Final = slot("Paused", BOOL)
_ADMIN: Final = slot("Admin", ADDRESS)
_ALLOWED: Final = slot("AllowedDepositors", vec(ADDRESS))
_NONCE: Final = slot("AuthorizedCallerNonce", U64)


class VaultG2(Contract):
    """The vault, while one of its functions runs."""

    @function(ADDRESS, ADDRESS, I128, ADDRESS, I128, _OPTIONAL_ADDRESS, I128, ADDRESS)
    def init(
        self,
        owner: str,
        usdc_token: str,
        initial_balance: int,
        authorized_caller: str,
        min_deposit: int,
        revenue_pool: str | None,
        max_deduct: int,
        settlement: str,
    ) -> None:
        """Begin, once; nobody has to allow it. It names no administrator."""
        if self.instance.has(_OWNER):
            raise ContractError(VaultError.ALREADY_INITIALIZED)
        if min_deposit <= 0:
            raise ContractError(VaultError.MIN_DEPOSIT_NOT_POSITIVE)
        if max_deduct <= 0:
            raise ContractError(VaultError.MAX_DEDUCT_NOT_POSITIVE)
        if min_deposit > max_deduct:
            raise ContractError(VaultError.MIN_DEPOSIT_EXCEEDS_MAX_DEDUCT)
        self.instance.set(_OWNER, owner)
        self.instance.set(_USDC, usdc_token)
        self.instance.set(_BALANCE, initial_balance)
        self.instance.set(_AUTHORIZED_CALLER, authorized_caller)
        self.instance.set(_MIN_DEPOSIT, min_deposit)
        if revenue_pool is not None:
            self.instance.set(_REVENUE_POOL, revenue_pool)
        self.instance.set(_MAX_DEDUCT, max_deduct)
        self.instance.set(_SETTLEMENT, settlement)
        self.instance.set(_PAUSED, False)

    @function(returns=I128)
    def balance(self) -> int:
        """Return what it accounts for; below 0 after a batch of more than it had."""
        return self.instance.get(_BALANCE) or 0

    @function(returns=ADDRESS)
    def get_owner(self) -> str:
        """Return its owner."""
        return self._required(_OWNER)

    @function(returns=ADDRESS)
    def get_admin(self) -> str:
        """Return its administrator, which it has not."""
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
        return self._required(_SETTLEMENT)

    @function(returns=_OPTIONAL_ADDRESS)
    def get_revenue_pool(self) -> str | None:
        """Return an address that is only informational."""
        return self.instance.get(_REVENUE_POOL)

    @function(returns=vec(_OPTIONAL_ADDRESS))
    def get_contract_addresses(self) -> tuple[str | None, ...]:
        """Return token, settlement and revenue pool."""
        return tuple(self.instance.get(place) for place in (_USDC, _SETTLEMENT, _REVENUE_POOL))

    @function(returns=BOOL)
    def is_paused(self) -> bool:
        """Tell whether deposits and deductions are refused."""
        return self.instance.get(_PAUSED) is True

    @function(returns=U64)
    def capabilities(self) -> int:
        """Return which features it says it has, a bit each."""
        return CAPABILITIES

    @function(ADDRESS, returns=BOOL)
    def is_authorized_depositor(self, caller: str) -> bool:
        """Tell whether an address may deposit."""
        return caller == self.instance.get(_OWNER) or caller in self.get_allowlist()

    @function(returns=vec(ADDRESS))
    def get_allowlist(self) -> tuple[str, ...]:
        """Return who may deposit besides the owner."""
        return self.instance.get(_ALLOWED) or ()

    @function(U64, returns=BOOL)
    def is_request_processed(self, request_id: int) -> bool:
        """Tell whether a request id was used: it keeps none."""
        return False

    @function(returns=U64)
    def get_authorized_caller_nonce(self) -> int:
        """Return what the next `set_authorized_caller` has to name."""
        return self.instance.get(_NONCE) or 0

    @function(ADDRESS, _OPTIONAL_ADDRESS)
    def set_allowed_depositor(self, caller: str, depositor: str | None) -> None:
        """Let an address deposit; None takes the right from all of them."""
        self._as_owner(caller)
        listed = self.get_allowlist() if depositor is not None else ()
        if depositor is not None and depositor not in listed:
            listed = (*listed, depositor)
        self.instance.set(_ALLOWED, listed)

    @function(ADDRESS, ADDRESS)
    def add_address(self, caller: str, depositor: str) -> None:
        """Let an address deposit, and say so in an event."""
        self.set_allowed_depositor(caller, depositor)
        self.publish([symbol("allowlist_add"), ADDRESS.encode(caller), ADDRESS.encode(depositor)], VOID.encode(None))

    @function(_OPTIONAL_ADDRESS, U64)
    def set_authorized_caller(self, new_caller: str | None, expected_nonce: int) -> None:
        """Say who may deduct: the owner may not, unless it is named."""
        self.require_auth(self.get_owner())
        nonce = self.get_authorized_caller_nonce()
        if expected_nonce != nonce:
            raise ContractError(VaultError.STALE_NONCE)
        self.instance.set(_AUTHORIZED_CALLER, new_caller)
        self.instance.set(_NONCE, nonce + 1)

    @function(ADDRESS)
    def pause(self, caller: str) -> None:
        """Refuse deposits and deductions from now on."""
        self._as_owner(caller)
        self.instance.set(_PAUSED, True)

    @function(ADDRESS)
    def unpause(self, caller: str) -> None:
        """Allow them again."""
        self._as_owner(caller)
        self.instance.set(_PAUSED, False)

    @function(ADDRESS, I128)
    def deposit(self, caller: str, amount: int) -> None:
        """Take an amount from a depositor."""
        self.require_auth(caller)
        self._require_not_paused()
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        if amount < self._required(_MIN_DEPOSIT):
            raise ContractError(VaultError.BELOW_MIN_DEPOSIT)
        if not self.is_authorized_depositor(caller):
            raise ContractError(CALLER_NOT_IN_ALLOWLIST)
        balance = self.balance() + amount
        if balance > I128_MAX:
            raise ContractError(VaultError.OVERFLOW)
        self.instance.set(_BALANCE, balance)
        self._transfer(caller, self.address, amount)
        self._bump()
        self._moved("deposit", caller, amount, balance)

    @function(ADDRESS, I128, U64)
    def deduct(self, caller: str, amount: int, request_id: int) -> None:
        """Take an amount out to the settlement contract. A request id is passed on, not remembered."""
        self._as_deductor(caller)
        if amount <= 0:
            raise ContractError(VaultError.AMOUNT_NOT_POSITIVE)
        if amount < self._required(_MIN_DEPOSIT):
            raise ContractError(VaultError.BELOW_MIN_DEPOSIT)
        if amount > self.get_max_deduct():
            raise ContractError(VaultError.EXCEEDS_MAX_DEDUCT)
        balance = self.balance() - amount
        if balance < 0:
            raise ContractError(VaultError.INSUFFICIENT_BALANCE)
        self.instance.set(_BALANCE, balance)
        self._moved("deduct", caller, amount, balance)
        self._transfer(self.address, self.get_settlement(), amount)
        self._record(amount, request_id)

    @function(ADDRESS, vec(pair(I128, U64)))
    def batch_deduct(self, caller: str, items: tuple[tuple[int, int], ...]) -> None:
        """Take several amounts out. Nothing is checked but what the token checks: the whole amount must be there."""
        self._as_deductor(caller)
        balance = self.balance()
        self._transfer(self.address, self.get_settlement(), sum(amount for amount, _ in items))
        for amount, request_id in items:
            balance -= amount
            self._moved("deduct", caller, amount, balance)
            self._record(amount, request_id)
        self.instance.set(_BALANCE, balance)

    def _required(self, place: Slot[T]) -> T:
        found = self.instance.get(place)
        if found is None:
            raise ContractError(VaultError.NOT_INITIALIZED)
        return found

    def _bump(self) -> None:
        self.instance.extend_ttl(30 * _DAY, 60 * _DAY)

    def _moved(self, name: str, caller: str, amount: int, balance: int) -> None:
        topics: list[xdr.SCVal] = [symbol(name), ADDRESS.encode(caller)]
        self.publish(topics, vec_value([I128.encode(amount), I128.encode(balance)]))

    def _as_owner(self, caller: str) -> None:
        self.require_auth(caller)
        if caller != self.get_owner():
            raise ContractError(VaultError.UNAUTHORIZED)

    def _as_deductor(self, caller: str) -> None:
        self.require_auth(caller)
        if caller != self.instance.get(_AUTHORIZED_CALLER):
            raise ContractError(VaultError.UNAUTHORIZED)
        self._require_not_paused()

    def _require_not_paused(self) -> None:
        if self.is_paused():
            raise ContractError(VaultError.PAUSED)

    def _transfer(self, source: str, to: str, amount: int) -> None:
        arguments = [ADDRESS.encode(source), ADDRESS.encode(to), I128.encode(amount)]
        self.call(self.get_usdc_token(), "transfer", arguments, VOID)

    def _record(self, amount: int, request_id: int) -> None:
        self.call(self.get_settlement(), "record_deduction", [I128.encode(amount), U64.encode(request_id)], VOID)
