"""The vault contract: how it is called, what it answers, what its events and its error numbers say.

Callora targets the interface of June 2026 (`g1`) and knows its successor (`g2`); which one is deployed is asked of the
contract itself. Source: the contracts' own sources and their `docs/interfaces`.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

import attrs
from stellar_sdk import Account, Address, SorobanDataBuilder, TransactionBuilder, scval, xdr

from callora.ledger.chain import (
    Archived,
    ChainEvent,
    ContractFault,
    Envelope,
    Simulated,
    TokenTransfer,
    VaultEvent,
)
from callora.ledger.faults import ChainMismatch
from callora.stellar.envelopes import FOREIGN, seal

Generation = Literal["g1", "g2"]
T = TypeVar("T")

BATCH_ITEMS_MAX: Final = 50
"""The contract's own bound of a batch."""
NOBODY: Final = "GAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAWHF"
"""The account of no key: the source of what is only simulated."""
AMOUNT_MAX: Final = 2**63 - 1
_SYMBOL: Final = re.compile(r"[A-Za-z0-9_]{1,32}", re.ASCII)
_SIMULATED_FEE: Final = 100
_FUNCTION_MISSING: Final = "Error(WasmVm, MissingValue)"
_ARGUMENTS_WRONG: Final = re.compile(r"Error\((?:WasmVm|Value|Object), ")
"""What the host says of a call that a contract has no such function for, or whose arguments it cannot read."""

_SHARED_ERRORS: Final = {
    1: "NotInitialized",
    2: "AlreadyInitialized",
    3: "Unauthorized",
    4: "Paused",
    5: "InsufficientBalance",
    6: "AmountNotPositive",
    7: "ExceedsMaxDeduct",
    8: "BelowMinDeposit",
    9: "Overflow",
    10: "InitialBalanceNegative",
    11: "MinDepositNotPositive",
    12: "MaxDeductNotPositive",
    13: "MinDepositExceedsMaxDeduct",
    14: "UsdcTokenCannotBeVault",
    15: "RevenuePoolCannotBeVault",
    16: "AuthorizedCallerCannotBeVault",
    17: "InitialBalanceExceedsOnLedger",
    18: "AlreadyPaused",
    19: "NotPaused",
    20: "SettlementNotSet",
    21: "BatchEmpty",
    22: "BatchTooLarge",
    23: "NewOwnerSameAsCurrent",
    24: "NoOwnershipTransferPending",
    25: "NoAdminTransferPending",
    26: "OfferingIdTooLong",
    27: "MetadataTooLong",
    28: "PriceParseError",
    29: "DuplicateRequestId",
    30: "OfferingIdInvalid",
    31: "MetadataInvalid",
    32: "StaleNonce",
    35: "Slippage",
    36: "RateLimited",
}
VAULT_ERRORS: Final[Mapping[Generation, Mapping[int, str]]] = {
    "g1": _SHARED_ERRORS,
    "g2": {
        **_SHARED_ERRORS,
        44: "CallerNotInAllowlist",
        51: "ProposalNotFound",
        52: "TimelockNotExpired",
        53: "TimelockOverflow",
        54: "InvalidTimelockWindow",
        55: "BelowMinTransferAmount",
    },
}
"""What the vault contract's error numbers mean, by its generation: the same number means other things in others."""
TOKEN_ERRORS: Final[Mapping[int, str]] = {
    1: "InternalError",
    4: "AlreadyInitialized",
    6: "AccountMissing",
    8: "NegativeAmount",
    9: "AllowanceError",
    10: "BalanceError",
    11: "BalanceDeauthorized",
    12: "Overflow",
    13: "TrustlineMissing",
}
"""What a Stellar asset contract's error numbers mean: 10 is a balance that does not suffice, or a full trustline.
Source: the host's own ContractError."""


@attrs.frozen
class ContractCall:
    """A call of a contract, to be made into a transaction by `build`."""

    authority: str
    """Whose consent it needs, `G…`: the source of its operation."""
    contract_id: str
    function: str
    args: tuple[str, ...] = ()
    """Base64 XDR."""


@attrs.frozen
class Reading(Generic[T]):
    """A question to a contract: simulated, never sent, and how its answer reads."""

    call: ContractCall
    decode: Callable[[xdr.SCVal], T]

    def answer(self, simulated: Simulated) -> T:
        """Return what the contract answered.

        Raises:
            ChainMismatch: it answers in another form than this interface.
        """
        try:
            assert simulated.return_value is not None
            return self.decode(xdr.SCVal.from_xdr(simulated.return_value))
        except FOREIGN as error:
            raise ChainMismatch(
                f"The contract {self.call.contract_id} answers {self.call.function} in an unknown form"
            ) from error


@attrs.frozen
class DeductItem:
    """One charge of a batch."""

    amount: int
    """Stroops, > 0."""
    request_id: str
    """1 to 32 of `[A-Za-z0-9_]`; the contract takes each once."""

    def __attrs_post_init__(self) -> None:
        """Refuse what the network would refuse, or worse, take."""
        assert 0 < self.amount <= AMOUNT_MAX
        symbol(self.request_id)


@attrs.frozen
class VaultMeta:
    """What the vault contract says of itself."""

    owner: str
    balance: int
    """Stroops that it tracks; donations to its address are not among them."""
    authorized_caller: str | None
    """Who besides its owner may charge."""
    min_deposit: int
    """Stroops."""


@attrs.frozen
class VaultContract:
    """The deployed vault contract: calls, questions, events and errors in its generation's terms."""

    contract_id: str
    generation: Generation
    owner: str
    """Who admits depositors and pays out, `G…` or `C…`."""
    usdc: str
    """The token contract it holds."""
    settlement: str | None
    """The settlement contract that it pays charges to; None where it is not set yet."""
    authorized_caller: str | None
    """Who may charge: in g1 besides the owner; g2 does not say who, and its owner may not."""

    def deposit(self, address: str, amount: int) -> ContractCall:
        """Return the call by which an address pays in; its own consent covers the token's transfer.

        Args:
            address: `G…` or `C…`, admitted before.
            amount: stroops, > 0.
        """
        assert 0 < amount <= AMOUNT_MAX
        return self._call(address, "deposit", scval.to_address(address), scval.to_int128(amount))

    def set_allowed_depositor(self, address: str) -> ContractCall:
        """Return the call by which the owner admits a depositor; again is no error."""
        return self._call(self.owner, "set_allowed_depositor", scval.to_address(self.owner), scval.to_address(address))

    def withdraw_to(self, address: str, amount: int) -> ContractCall:
        """Return the call by which the owner pays out; works while the contract is paused.

        Args:
            amount: stroops, > 0.

        Raises:
            ChainMismatch: the contract has no such function (g2).
        """
        assert 0 < amount <= AMOUNT_MAX
        if self.generation == "g2":
            raise ChainMismatch(
                f"The vault contract {self.contract_id} ({self.generation}) has no withdraw_to: it pays nobody out"
            )
        return self._call(self.owner, "withdraw_to", scval.to_address(address), scval.to_int128(amount))

    def batch_deduct(self, items: Sequence[DeductItem], charger: str | None = None) -> ContractCall:
        """Return the call that charges all items or none.

        Args:
            items: 1 to BATCH_ITEMS_MAX, no request id twice.
            charger: whose key is here to consent, `G…`; None: whoever the contract names.

        Raises:
            ChainMismatch: the contract does not let him, or it does not say whom it lets; says what to do.
        """
        assert 0 < len(items) <= BATCH_ITEMS_MAX
        assert len({each.request_id for each in items}) == len(items)
        caller = charger or self._charger()
        if self.generation == "g1" and caller not in (self.authorized_caller, self.owner):
            raise ChainMismatch(
                f"The vault contract {self.contract_id} lets {self.authorized_caller or self.owner} charge, and not "
                f"{caller}: have its owner call set_authorized_caller"
            )
        made = [_g1_item(each) if self.generation == "g1" else _g2_item(each) for each in items]
        return self._call(caller, "batch_deduct", scval.to_address(caller), scval.to_vec(made))

    def balance(self) -> Reading[int]:
        """Ask what the contract's tracked balance is, in stroops."""
        return Reading(self._view("balance"), scval.from_int128)

    def is_allowed(self, address: str) -> Reading[bool]:
        """Ask whether an address may deposit."""
        return Reading(self._view("is_authorized_depositor", scval.to_address(address)), scval.from_bool)

    def is_paused(self) -> Reading[bool]:
        """Ask whether deposits and charges are refused for now."""
        return Reading(self._view("is_paused"), scval.from_bool)

    def is_request_processed(self, request_id: str) -> Reading[bool]:
        """Ask whether a charge of this id was taken; g2 does not remember the ids it was given."""
        made = symbol(request_id) if self.generation == "g1" else scval.to_uint64(number_of(request_id))
        return Reading(self._view("is_request_processed", made), scval.from_bool)

    def token_balance(self, address: str) -> Reading[int]:
        """Ask how much USDC an address has, in stroops; error 13 of the token: it has no trustline."""
        return Reading(token_balance_call(self.usdc, address), scval.from_int128)

    def error_name(self, fault: ContractFault) -> str | None:
        """Return what a fault is called: of the vault plainly (`Paused`), of its token with `Token.` before it.

        Returns:
            None for what is no contract's own rule, or one that is not known.
        """
        if fault.contract_error is None:
            return None
        if fault.contract_id in (None, self.contract_id):
            return VAULT_ERRORS[self.generation].get(fault.contract_error)
        name = TOKEN_ERRORS.get(fault.contract_error) if fault.contract_id == self.usdc else None
        return None if name is None else f"Token.{name}"

    def read_event(self, event: ChainEvent) -> VaultEvent | None:
        """Return what an event of the contract says of its balance; None for one that leaves it as it is.

        Raises:
            ChainMismatch: an event that moves the balance has another form than this interface. It must not be skipped.
        """
        if event.contract_id != self.contract_id:
            return None
        try:
            topics = [xdr.SCVal.from_xdr(topic) for topic in event.topics]
            name = scval.from_symbol(topics[0]) if topics and topics[0].sym is not None else ""
            if name not in _MOVES:
                return None
            address = _address(topics[_MOVES[name]])
            value = xdr.SCVal.from_xdr(event.value)
            if name == "distribute":
                amount, after = scval.from_int128(value), None
            else:
                moved, left = scval.from_vec(value)
                amount, after = scval.from_int128(moved), scval.from_int128(left)
            assert 0 < amount <= AMOUNT_MAX
            assert after is None or abs(after) <= AMOUNT_MAX  # g2 lets its tracked balance fall below zero
        except FOREIGN as error:
            raise ChainMismatch(
                f"Event {event.event_id} of the vault contract {self.contract_id} has an unknown form"
            ) from error
        kind: Any = name
        return VaultEvent(
            event_id=event.event_id,
            kind=kind,
            ledger=event.ledger,
            closed_at=event.closed_at,
            tx_hash=event.tx_hash,
            address=address,
            amount=amount,
            balance_after=after,
        )

    def _charger(self) -> str:
        if self.generation == "g2" and self.authorized_caller is None:
            raise ChainMismatch(
                f"The vault contract {self.contract_id} ({self.generation}) does not say who may charge it, and its "
                "owner may not: name the account that its set_authorized_caller was given"
            )
        return self.authorized_caller or self.owner

    def used(self) -> Sequence[ContractCall]:
        """Return a call of every function that Callora may need of it, to be simulated and never sent."""
        probe, owner = DeductItem(1, "callora"), self.owner
        calls = [
            self.deposit(owner, 1),
            self.set_allowed_depositor(owner),
            self.batch_deduct([probe], owner),
            *(each.call for each in (self.balance(), self.is_allowed(owner), self.is_paused())),
            self.is_request_processed(probe.request_id).call,
        ]
        if self.generation == "g1":
            calls.append(self.withdraw_to(owner, 1))
        return [attrs.evolve(call, authority=NOBODY) for call in calls]

    def _call(self, authority: str, function: str, *args: xdr.SCVal) -> ContractCall:
        return ContractCall(authority, self.contract_id, function, tuple(each.to_xdr() for each in args))

    def _view(self, function: str, *args: xdr.SCVal) -> ContractCall:
        return self._call(NOBODY, function, *args)


_MOVES: Final = {"deposit": 1, "withdraw": 1, "withdraw_to": 2, "deduct": 1, "distribute": 1}
"""The events that move the vault contract's balance, and which topic says from or to whom."""


def read_transfer(event: ChainEvent) -> TokenTransfer | None:
    """Return what a token contract's event says, if it is a transfer; its value is an amount, or a map with one.

    Source: SEP-41; the map came with CAP-67 for payments to muxed addresses.
    """
    try:
        topics = [xdr.SCVal.from_xdr(topic) for topic in event.topics]
        if len(topics) < 3 or topics[0].sym is None or scval.from_symbol(topics[0]) != "transfer":
            return None
        value = xdr.SCVal.from_xdr(event.value)
        amount = scval.from_struct(value)["amount"] if value.map is not None else value
        return TokenTransfer(event.event_id, _address(topics[1]), _address(topics[2]), scval.from_int128(amount))
    except FOREIGN:
        return None


def token_balance_call(token: str, address: str) -> ContractCall:
    """Return the question for an address's balance at a token contract."""
    return ContractCall(NOBODY, token, "balance", (scval.to_address(address).to_xdr(),))


def symbol(text: str) -> xdr.SCVal:
    """Return a Symbol, which the SDK itself would make of anything.

    Args:
        text: 1 to 32 of `[A-Za-z0-9_]`; an empty one could not be told from none in events.
    """
    assert _SYMBOL.fullmatch(text) is not None, text
    return scval.to_symbol(text)


def number_of(request_id: str) -> int:
    """Return the 64-bit number that stands for a request id where the contract takes numbers."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big")


def build(call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int, passphrase: str) -> Envelope:
    """Return the unsigned transaction of a call. It has no resources yet: prepare it before it is signed.

    Args:
        source: the account whose sequence number it uses and who pays, `G…`; where it is not the call's authority, the
            authority is the operation's source, and both sign.
        sequence: the number that the transaction itself uses: one more than the account's.
        max_time: the last second of its time bound, since 1970, > 0.
        fee: stroops, what it bids for its inclusion.
    """
    assert max_time > 0
    builder = TransactionBuilder(Account(source, sequence - 1), passphrase, base_fee=fee)
    builder.add_time_bounds(0, max_time)
    builder.append_invoke_contract_function_op(
        call.contract_id,
        call.function,
        [xdr.SCVal.from_xdr(each) for each in call.args],
        source=None if call.authority in (source, NOBODY) else call.authority,
    )
    return seal(builder.build())


def build_restore(
    archived: Archived, *, source: str, sequence: int, max_time: int, fee: int, passphrase: str
) -> Envelope:
    """Return the unsigned transaction that restores what a call needs; it is complete, and only to be signed.

    Args:
        source, sequence, max_time, fee: as of `build`.
    """
    assert max_time > 0
    builder = TransactionBuilder(Account(source, sequence - 1), passphrase, base_fee=fee)
    builder.add_time_bounds(0, max_time)
    data = SorobanDataBuilder.from_xdr(archived.resources).set_resource_fee(archived.resource_fee)
    builder.set_soroban_data(data.build())  # type: ignore[no-untyped-call]
    builder.append_restore_footprint_op()
    return seal(builder.build())


def question(call: ContractCall, passphrase: str) -> Envelope:
    """Return the transaction that asks a contract without ever being sent."""
    return build(call, source=NOBODY, sequence=1, max_time=1, fee=_SIMULATED_FEE, passphrase=passphrase)


Ask = Callable[[ContractCall], Awaitable[Simulated | ContractFault]]


async def recognise(contract_id: str, ask: Ask) -> VaultContract:
    """Return the adapter of the vault contract at an address, by asking it.

    Args:
        ask: simulates a call; its faults pass through.

    Raises:
        ChainMismatch: there is no contract, no vault, or one of an unknown interface; says what is missing and what to
            do.

    Cancellation: at any time.
    """
    meta = await _try(ContractCall(NOBODY, contract_id, "get_meta"), _meta, ask)
    if isinstance(meta, VaultMeta):
        generation: Generation = "g1"
    else:
        owner = await _try(ContractCall(NOBODY, contract_id, "get_owner"), _address, ask)
        bitmap = await _try(ContractCall(NOBODY, contract_id, "capabilities"), scval.from_uint64, ask)
        if isinstance(owner, ContractFault) or isinstance(bitmap, ContractFault):
            raise ChainMismatch(_unrecognised(contract_id, meta))
        generation, meta = "g2", VaultMeta(owner, 0, None, 0)
    addresses = await _try(ContractCall(NOBODY, contract_id, "get_contract_addresses"), _addresses, ask)
    if isinstance(addresses, ContractFault) or addresses[0] is None:
        raise ChainMismatch(f"The vault contract {contract_id} does not say which token it holds: initialise it first")
    usdc, settlement = addresses[0], addresses[1]
    found = VaultContract(contract_id, generation, meta.owner, usdc, settlement, meta.authorized_caller)
    await _require_functions(found, ask)
    return found


async def _require_functions(vault: VaultContract, ask: Ask) -> None:
    """Return where a contract has every function in the form in which Callora calls it.

    A rule of the contract that speaks against a call says that it was understood. Another interface of the same name,
    as the variant of July 2026 whose charges name a developer, traps before any rule is asked.
    """
    missing: list[str] = []
    strange: list[str] = []
    for call in vault.used():
        told = await ask(call)
        if isinstance(told, ContractFault) and told.contract_error is None and told.archived is None:
            if _FUNCTION_MISSING in told.reason:
                missing.append(call.function)
            elif _ARGUMENTS_WRONG.search(told.reason) is not None:
                strange.append(call.function)
    if missing or strange:
        lacks = f"it has no {', '.join(missing)}" if missing else ""
        takes = f"it takes other arguments for {', '.join(strange)}" if strange else ""
        raise ChainMismatch(
            f"The contract {vault.contract_id} is no vault that Callora knows, though it looks like "
            f"{vault.generation}: {'; '.join(filter(None, (lacks, takes)))}. Check STELLAR_*_VAULT_CONTRACT_ID "
            "and what is deployed there"
        )


def _unrecognised(contract_id: str, fault: ContractFault) -> str:
    if fault.contract_error == 1 and fault.contract_id in (None, contract_id):
        return f"The vault contract {contract_id} is not initialised: call its init first"
    return (
        f"The contract {contract_id} is no vault that Callora knows (it answers neither get_meta nor get_owner): "
        f"check STELLAR_*_VAULT_CONTRACT_ID and STELLAR_NETWORK. The node says: {fault.reason[:200]}"
    )


async def _try(call: ContractCall, decode: Callable[[xdr.SCVal], T], ask: Ask) -> T | ContractFault:
    answered = await ask(call)
    return answered if isinstance(answered, ContractFault) else Reading(call, decode).answer(answered)


def _meta(value: xdr.SCVal) -> VaultMeta:
    fields = scval.from_struct(value)
    caller = fields["authorized_caller"]
    return VaultMeta(
        owner=_address(fields["owner"]),
        balance=scval.from_int128(fields["balance"]),
        authorized_caller=_optional_address(caller),
        min_deposit=scval.from_int128(fields["min_deposit"]),
    )


def _addresses(value: xdr.SCVal) -> tuple[str | None, str | None]:
    usdc, settlement, *_ = scval.from_vec(value)
    return _optional_address(usdc), _optional_address(settlement)


def _address(value: xdr.SCVal) -> str:
    return scval.from_address(value).address


def _optional_address(value: xdr.SCVal) -> str | None:
    return None if value.type == xdr.SCValType.SCV_VOID else _address(value)


def _g1_item(item: DeductItem) -> xdr.SCVal:
    return scval.to_struct({"amount": scval.to_int128(item.amount), "request_id": symbol(item.request_id)})


def _g2_item(item: DeductItem) -> xdr.SCVal:
    return scval.to_vec([scval.to_int128(item.amount), scval.to_uint64(number_of(item.request_id))])


def address_of(raw: xdr.SCAddress) -> str:
    """Return an address as text."""
    return Address.from_xdr_sc_address(raw).address
