"""The Callora settlement contract, generation G1: what the vault's deductions add up to, and what developers may claim.

Source: as for the vault. Some of its refusals are numbers and some are texts, which trap, as in the contract itself.
"""

from enum import IntEnum
from typing import Any, Final, TypeVar

import attrs
from stellar_sdk import xdr

from callora.stellar.sandbox.soroban.faults import ContractError, Trap
from callora.stellar.sandbox.soroban.host import Contract, function
from callora.stellar.sandbox.soroban.values import (
    ADDRESS,
    BOOL,
    I128,
    I128_MAX,
    SYMBOL,
    U32,
    U64,
    VOID,
    Shape,
    Slot,
    address_order,
    option,
    pair,
    slot,
    struct,
    symbol,
    vec,
)

T = TypeVar("T")

BATCH_ITEMS_MAX: Final = 50
PAGE_MAX: Final = 100
_DAY_SECONDS: Final = 86_400
_ENTRY_LEDGERS: Final = 50_000


class SettlementError(IntEnum):
    """N of `Error(Contract, #N)`."""

    NOT_INITIALIZED = 1
    ALREADY_INITIALIZED = 2
    UNAUTHORIZED = 3
    AMOUNT_NOT_POSITIVE = 4
    DEVELOPER_REQUIRED = 5
    DEVELOPER_MUST_BE_NONE = 6
    POOL_OVERFLOW = 7
    DEVELOPER_OVERFLOW = 8
    USDC_TOKEN_NOT_CONFIGURED = 9
    INSUFFICIENT_DEVELOPER_BALANCE = 10
    INSUFFICIENT_CONTRACT_BALANCE = 12
    DAILY_WITHDRAW_CAP_EXCEEDED = 13
    GAS_EXHAUSTION_RISK = 14


@attrs.frozen
class GlobalPool:
    """What was received for nobody in particular."""

    total_balance: int
    last_updated: int
    """When, seconds since 1970."""


@attrs.frozen
class DeveloperBalance:
    """What one developer may claim."""

    address: str
    balance: int


@attrs.frozen
class DailyWithdrawState:
    """What a developer claimed on one day."""

    day: int
    """Days since 1970."""
    amount: int


@attrs.frozen
class PaymentReceived:
    """An event."""

    from_vault: str
    amount: int
    to_pool: bool
    developer: str | None


@attrs.frozen
class BalanceCredited:
    """An event."""

    developer: str
    amount: int
    new_balance: int


@attrs.frozen
class DeveloperWithdraw:
    """An event."""

    developer: str
    amount: int
    remaining_balance: int
    to: str


@attrs.frozen
class DeveloperForceCredited:
    """An event."""

    developer: str
    amount: int
    reason: str
    new_balance: int


@attrs.frozen
class DailyWithdrawCapChanged:
    """An event."""

    developer: str
    new_cap: int


@attrs.frozen
class VaultProposed:
    """An event."""

    current_vault: str
    proposed_vault: str


@attrs.frozen
class VaultAccepted:
    """An event."""

    old_vault: str
    new_vault: str
    accepted_by: str


_OPTIONAL_ADDRESS: Final = option(ADDRESS)
_POOL: Final = slot("GlobalPool", struct(GlobalPool, total_balance=I128, last_updated=U64))
_ADMIN: Final = slot("Admin", ADDRESS)
_VAULT: Final = slot("Vault", ADDRESS)
_PENDING_ADMIN: Final = slot("PendingAdmin", ADDRESS)
_PENDING_VAULT: Final = slot("PendingVault", ADDRESS)
_INDEX: Final = slot("DeveloperIndex", vec(ADDRESS))
_USDC: Final = slot("Usdc", ADDRESS)
_TOTAL: Final = slot("TotalReceived", I128)
_DAILY: Final = struct(DailyWithdrawState, day=U64, amount=I128)
_BALANCE: Final = struct(DeveloperBalance, address=ADDRESS, balance=I128)
_RECEIVED: Final = struct(PaymentReceived, from_vault=ADDRESS, amount=I128, to_pool=BOOL, developer=_OPTIONAL_ADDRESS)
_CREDITED: Final = struct(BalanceCredited, developer=ADDRESS, amount=I128, new_balance=I128)
_WITHDRAWN: Final = struct(DeveloperWithdraw, developer=ADDRESS, amount=I128, remaining_balance=I128, to=ADDRESS)
_FORCED: Final = struct(DeveloperForceCredited, developer=ADDRESS, amount=I128, reason=SYMBOL, new_balance=I128)
_CAP_CHANGED: Final = struct(DailyWithdrawCapChanged, developer=ADDRESS, new_cap=I128)
_PROPOSED: Final = struct(VaultProposed, current_vault=ADDRESS, proposed_vault=ADDRESS)
_ACCEPTED: Final = struct(VaultAccepted, old_vault=ADDRESS, new_vault=ADDRESS, accepted_by=ADDRESS)


def _developer(developer: str) -> Slot[int]:
    return slot("DeveloperBalance", I128, ADDRESS.encode(developer))


def _cap(developer: str) -> Slot[int]:
    return slot("DailyWithdrawCap", I128, ADDRESS.encode(developer))


def _today(developer: str) -> Slot[DailyWithdrawState]:
    return slot("WithdrawalToday", _DAILY, ADDRESS.encode(developer))


class Settlement(Contract):
    """The settlement contract, while one of its functions runs."""

    @function(ADDRESS, ADDRESS)
    def init(self, admin: str, vault_address: str) -> None:
        """Begin, once."""
        self.require_auth(admin)
        if self.instance.has(_ADMIN):
            raise ContractError(SettlementError.ALREADY_INITIALIZED)
        if admin == vault_address:
            raise Trap("invalid config: admin and vault_address must be distinct")
        if self.address in (admin, vault_address):
            raise Trap("invalid config: admin and vault_address cannot be the contract itself")
        self.instance.set(_ADMIN, admin)
        self.instance.set(_VAULT, vault_address)
        self.instance.set(_POOL, GlobalPool(0, self.timestamp))

    # What anyone may ask.

    @function(returns=ADDRESS)
    def get_admin(self) -> str:
        """Return its administrator."""
        return self._required(_ADMIN)

    @function(returns=ADDRESS)
    def get_vault(self) -> str:
        """Return the vault that may pay in."""
        return self._required(_VAULT)

    @function(returns=_POOL.shape)
    def get_global_pool(self) -> GlobalPool:
        """Return what was received for nobody in particular."""
        return self._required(_POOL)

    @function(ADDRESS, returns=I128)
    def get_developer_balance(self, developer: str) -> int:
        """Return what a developer may claim."""
        self.get_admin()
        return self.persistent.get(_developer(developer)) or 0

    @function(ADDRESS, returns=I128)
    def get_daily_withdraw_cap(self, developer: str) -> int:
        """Return what a developer may claim a day; 0 for no limit."""
        return self.persistent.get(_cap(developer)) or 0

    @function(ADDRESS, returns=I128)
    def get_withdrawal_today(self, developer: str) -> int:
        """Return what a developer claimed today, by UTC."""
        return self._claimed_today(developer).amount

    @function(returns=_OPTIONAL_ADDRESS)
    def get_pending_admin(self) -> str | None:
        """Return who was nominated as administrator."""
        return self.instance.get(_PENDING_ADMIN)

    # Money.

    @function(ADDRESS, I128, BOOL, _OPTIONAL_ADDRESS)
    def receive_payment(self, caller: str, amount: int, to_pool: bool, developer: str | None) -> None:
        """Credit what was paid in to the pool, or to a developer. Moves no tokens."""
        self._as_payer(caller)
        if amount <= 0:
            raise ContractError(SettlementError.AMOUNT_NOT_POSITIVE)
        if to_pool:
            if developer is not None:
                raise ContractError(SettlementError.DEVELOPER_MUST_BE_NONE)
            total = self.get_global_pool().total_balance + amount
            if total > I128_MAX:
                raise ContractError(SettlementError.POOL_OVERFLOW)
            self.instance.set(_POOL, GlobalPool(total, self.timestamp))
            self._event("payment_received", caller, _RECEIVED, PaymentReceived(caller, amount, True, None))
            return
        if developer is None:
            raise ContractError(SettlementError.DEVELOPER_REQUIRED)
        balance = self._credit(developer, amount)
        self._event("payment_received", caller, _RECEIVED, PaymentReceived(caller, amount, False, developer))
        self._event("balance_credited", developer, _CREDITED, BalanceCredited(developer, amount, balance))

    @function(ADDRESS, vec(pair(ADDRESS, I128)))
    def batch_receive_payment(self, caller: str, items: tuple[tuple[str, int], ...]) -> None:
        """Credit several developers, all or none of them. The same one may be there twice."""
        self._as_payer(caller)
        if not items:
            raise Trap("batch_receive_payment requires at least one item")
        if len(items) > BATCH_ITEMS_MAX:
            raise Trap("batch too large")
        if any(amount <= 0 for _, amount in items):
            raise Trap("amount must be positive")
        for developer, amount in items:
            balance = self._credit(developer, amount)
            self._event("balance_credited", developer, _CREDITED, BalanceCredited(developer, amount, balance))

    @function(ADDRESS, I128, _OPTIONAL_ADDRESS)
    def withdraw_developer_balance(self, developer: str, amount: int, to: str | None) -> None:
        """Pay a developer what it claims."""
        self.require_auth(developer)
        if amount <= 0:
            raise ContractError(SettlementError.AMOUNT_NOT_POSITIVE)
        recipient = developer if to is None else to
        if recipient == self.address:
            raise Trap("invalid recipient: cannot withdraw to contract itself")
        left = (self.persistent.get(_developer(developer)) or 0) - amount
        if left < 0:
            raise ContractError(SettlementError.INSUFFICIENT_DEVELOPER_BALANCE)
        cap = self.get_daily_withdraw_cap(developer)
        claimed = self._claimed_today(developer)
        if cap > 0 and claimed.amount + amount > cap:
            raise ContractError(SettlementError.DAILY_WITHDRAW_CAP_EXCEEDED)
        token = self.instance.get(_USDC)
        if token is None:
            raise ContractError(SettlementError.USDC_TOKEN_NOT_CONFIGURED)
        if self.call(token, "balance", [ADDRESS.encode(self.address)], I128) < amount:
            raise ContractError(SettlementError.INSUFFICIENT_CONTRACT_BALANCE)
        arguments = [ADDRESS.encode(self.address), ADDRESS.encode(recipient), I128.encode(amount)]
        self.call(token, "transfer", arguments, VOID)
        self._keep(_developer(developer), left)
        self._keep(_today(developer), DailyWithdrawState(claimed.day, min(claimed.amount + amount, I128_MAX)))
        withdrawn = DeveloperWithdraw(developer, amount, left, recipient)
        self._event("developer_withdraw", developer, _WITHDRAWN, withdrawn)

    @function(ADDRESS, ADDRESS, I128, SYMBOL)
    def force_credit_developer(self, caller: str, developer: str, amount: int, reason: str) -> None:
        """Credit a developer by decree. Moves no tokens."""
        self._as_admin(caller)
        if amount <= 0:
            raise ContractError(SettlementError.AMOUNT_NOT_POSITIVE)
        balance = self._credit(developer, amount, in_order=False)
        forced = DeveloperForceCredited(developer, amount, reason, balance)
        self._event("developer_force_credited", developer, _FORCED, forced)

    # Who may do what.

    @function(ADDRESS, ADDRESS)
    def set_usdc_token(self, caller: str, usdc_address: str) -> None:
        """Say which token claims are paid in."""
        self.require_auth(caller)
        if caller != self.get_admin():
            raise Trap("unauthorized: caller is not admin")
        if usdc_address == self.address:
            raise Trap("invalid config: usdc_token cannot be the contract itself")
        self.instance.set(_USDC, usdc_address)

    @function(ADDRESS, ADDRESS, I128)
    def set_daily_withdraw_cap(self, caller: str, developer: str, cap: int) -> None:
        """Say how much a developer may claim a day; 0 for no limit."""
        self._as_admin(caller)
        self._keep(_cap(developer), cap)
        changed = DailyWithdrawCapChanged(developer, cap)
        self._event("daily_withdraw_cap_changed", caller, _CAP_CHANGED, changed)

    @function(ADDRESS, ADDRESS)
    def set_admin(self, caller: str, new_admin: str) -> None:
        """Nominate an administrator."""
        self._as_admin(caller)
        self.instance.set(_PENDING_ADMIN, new_admin)
        topics = [symbol("admin_nominated"), ADDRESS.encode(caller), ADDRESS.encode(new_admin)]
        self.publish(topics, VOID.encode(None))

    @function()
    def accept_admin(self) -> None:
        """Become administrator, having been nominated."""
        pending = self.instance.get(_PENDING_ADMIN)
        if pending is None:
            raise Trap("no admin transfer pending")
        self.require_auth(pending)
        current = self.get_admin()
        self.instance.set(_ADMIN, pending)
        self.instance.remove(_PENDING_ADMIN)
        topics = [symbol("admin_accepted"), ADDRESS.encode(current), ADDRESS.encode(pending)]
        self.publish(topics, VOID.encode(None))

    @function(ADDRESS, ADDRESS)
    def propose_vault(self, caller: str, new_vault: str) -> None:
        """Propose another vault."""
        self._as_admin(caller)
        if new_vault == self.address:
            raise Trap("invalid config: vault cannot be the contract itself")
        self.instance.set(_PENDING_VAULT, new_vault)
        self._event("vault_proposed", caller, _PROPOSED, VaultProposed(self.get_vault(), new_vault))

    @function(ADDRESS, ADDRESS)
    def set_vault(self, caller: str, new_vault: str) -> None:
        """Propose another vault: the same under an older name."""
        self.propose_vault(caller, new_vault)

    @function(ADDRESS)
    def accept_vault(self, caller: str) -> None:
        """Take over from the vault of now, having been proposed; or let it, as administrator."""
        self.require_auth(caller)
        pending = self.instance.get(_PENDING_VAULT)
        if pending is None:
            raise Trap("no vault rotation pending")
        if caller not in (pending, self.get_admin()):
            raise Trap("unauthorized: caller must be pending vault or admin")
        old = self.get_vault()
        self.instance.set(_VAULT, pending)
        self.instance.remove(_PENDING_VAULT)
        self._event("vault_accepted", caller, _ACCEPTED, VaultAccepted(old, pending, caller))

    # What only the administrator may read.

    @function(ADDRESS, returns=vec(_BALANCE))
    def get_all_developer_balances(self, caller: str) -> tuple[DeveloperBalance, ...]:
        """Return every balance, where there are not too many."""
        self._as_admin(caller)
        index = self._index()
        if len(index) > PAGE_MAX:
            raise ContractError(SettlementError.GAS_EXHAUSTION_RISK)
        return self._balances(index)

    @function(ADDRESS, U32, U32, returns=vec(_BALANCE))
    def get_developer_balances_page(self, caller: str, start: int, limit: int) -> tuple[DeveloperBalance, ...]:
        """Return some of the balances, by place."""
        self.require_auth(caller)
        if caller != self.get_admin():
            raise Trap("unauthorized: caller is not admin")
        return self._balances(self._index()[start : start + min(limit, PAGE_MAX)])

    @function(ADDRESS, _OPTIONAL_ADDRESS, U32, returns=pair(vec(_BALANCE), _OPTIONAL_ADDRESS))
    def get_developer_balances_cursor(
        self, caller: str, cursor: str | None, limit: int
    ) -> tuple[tuple[DeveloperBalance, ...], str | None]:
        """Return the balances after a developer, and from where to go on."""
        self._as_admin(caller)
        index = self._index()
        size = min(limit, PAGE_MAX)
        if cursor is not None:
            index = index[index.index(cursor) + 1 :] if cursor in index else ()
        page = index[:size]
        return self._balances(page), page[-1] if size and len(page) == size else None

    # How.

    def _required(self, place: Slot[T]) -> T:
        found = self.instance.get(place)
        if found is None:
            raise ContractError(SettlementError.NOT_INITIALIZED)
        return found

    def _event(self, name: str, address: str, shape: Shape[Any], data: Any) -> None:
        topics: list[xdr.SCVal] = [symbol(name), ADDRESS.encode(address)]
        self.publish(topics, shape.encode(data))

    def _as_admin(self, caller: str) -> None:
        self.require_auth(caller)
        if caller != self.get_admin():
            raise ContractError(SettlementError.UNAUTHORIZED)

    def _as_payer(self, caller: str) -> None:
        self.require_auth(caller)
        if caller not in (self.get_vault(), self.get_admin()):
            raise ContractError(SettlementError.UNAUTHORIZED)

    def _keep(self, place: Slot[Any], value: Any) -> None:
        self.persistent.set(place, value)
        self.persistent.extend_ttl(place, _ENTRY_LEDGERS, _ENTRY_LEDGERS)

    def _index(self) -> tuple[str, ...]:
        return self.instance.get(_INDEX) or ()

    def _credit(self, developer: str, amount: int, *, in_order: bool = True) -> int:
        balance = (self.persistent.get(_developer(developer)) or 0) + amount
        if balance > I128_MAX:
            raise ContractError(SettlementError.DEVELOPER_OVERFLOW)
        self._keep(_developer(developer), balance)
        index = self._index()
        if developer not in index:
            index = (*index, developer)
            self.instance.set(_INDEX, tuple(sorted(index, key=address_order)) if in_order else index)
        return balance

    def _claimed_today(self, developer: str) -> DailyWithdrawState:
        today = self.timestamp // _DAY_SECONDS
        found = self.persistent.get(_today(developer))
        return found if found is not None and found.day == today else DailyWithdrawState(today, 0)

    def _balances(self, developers: tuple[str, ...]) -> tuple[DeveloperBalance, ...]:
        return tuple(
            DeveloperBalance(developer, self.persistent.get(_developer(developer)) or 0) for developer in developers
        )


class SettlementG2(Settlement):
    """The settlement contract that the vault of generation G2 calls, as far as that calls it."""

    @function(I128, U64)
    def record_deduction(self, amount: int, request_id: int) -> None:
        """Add to what the vault took; the id is ignored."""
        self.require_auth(self.get_vault())
        total = self.get_total_received() + amount
        if total > I128_MAX:
            raise ContractError(SettlementError.POOL_OVERFLOW)
        self.instance.set(_TOTAL, total)

    @function(returns=I128)
    def get_total_received(self) -> int:
        """Return what the vault took."""
        return self.instance.get(_TOTAL) or 0
