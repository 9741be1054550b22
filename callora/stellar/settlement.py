"""The settlement contract: what developers are credited by, what they withdraw from, and what its error numbers say.

Callora targets the interface of June 2026 (`g1`), in which a credit names neither a token nor a sequence. Source: the
contract's own sources and its `docs/interfaces`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import attrs
from stellar_sdk import scval, xdr

from callora.ledger.chain import ContractFault
from callora.ledger.faults import ChainMismatch
from callora.stellar.contracts import AMOUNT_MAX, BATCH_ITEMS_MAX, NOBODY, Ask, ContractCall, Reading

SETTLEMENT_ERRORS: Final[Mapping[int, str]] = {
    1: "NotInitialized",
    2: "AlreadyInitialized",
    3: "Unauthorized",
    4: "AmountNotPositive",
    5: "DeveloperRequired",
    6: "DeveloperMustBeNone",
    7: "PoolOverflow",
    8: "DeveloperOverflow",
    9: "UsdcTokenNotConfigured",
    10: "InsufficientDeveloperBalance",
    11: "DeveloperBalanceUnderflow",
    12: "InsufficientContractBalance",
    13: "DailyWithdrawCapExceeded",
    14: "GasExhaustionRisk",
}
"""What the contract's error numbers mean. Some of its rules are texts, which have no number."""


@attrs.frozen
class SettlementContract:
    """The deployed settlement contract: calls, questions and errors."""

    contract_id: str
    admin: str
    """Who credits developers, `G…` or `C…`."""
    vault: str
    """The vault contract that pays in, `C…`."""

    def batch_receive_payment(self, items: Sequence[tuple[str, int]]) -> ContractCall:
        """Return the call by which the administrator credits all or none.

        Args:
            items: address and stroops > 0 of 1 to BATCH_ITEMS_MAX, no address twice.
        """
        assert 0 < len(items) <= BATCH_ITEMS_MAX
        assert len({address for address, _ in items}) == len(items)
        assert all(0 < amount <= AMOUNT_MAX for _, amount in items)
        made = [scval.to_vec([scval.to_address(address), scval.to_int128(amount)]) for address, amount in items]
        return self._call(self.admin, "batch_receive_payment", scval.to_address(self.admin), scval.to_vec(made))

    def withdraw_developer_balance(self, developer: str, amount: int) -> ContractCall:
        """Return the call by which a developer takes what he was credited to his own address.

        Args:
            developer: `G…`, who consents.
            amount: stroops, > 0.
        """
        assert 0 < amount <= AMOUNT_MAX
        who = scval.to_address(developer)
        return self._call(developer, "withdraw_developer_balance", who, scval.to_int128(amount), scval.to_void())

    def developer_balance(self, developer: str) -> Reading[int]:
        """Ask what a developer may withdraw, in stroops."""
        return Reading(
            self._call(NOBODY, "get_developer_balance", scval.to_address(developer)),
            scval.from_int128,
        )

    def error_name(self, fault: ContractFault) -> str | None:
        """Return what a fault of this contract is called; None for one of another, or that is not known."""
        if fault.contract_error is None or fault.contract_id not in (None, self.contract_id):
            return None
        return SETTLEMENT_ERRORS.get(fault.contract_error)

    def _call(self, authority: str, function: str, *args: xdr.SCVal) -> ContractCall:
        return ContractCall(authority, self.contract_id, function, tuple(each.to_xdr() for each in args))


async def recognise_settlement(contract_id: str, ask: Ask) -> SettlementContract:
    """Return the settlement contract at an address, by asking it.

    Args:
        ask: simulates a call; its faults pass through.

    Raises:
        ChainMismatch: there is no contract, or none that Callora knows; says what to do.

    Cancellation: at any time.
    """
    found: dict[str, str] = {}
    for function in ("get_admin", "get_vault"):
        call = ContractCall(NOBODY, contract_id, function)
        answered = await ask(call)
        if isinstance(answered, ContractFault):
            raise ChainMismatch(
                f"The contract {contract_id} is no settlement contract that Callora knows (it refuses {function}): "
                "check STELLAR_*_SETTLEMENT_CONTRACT_ID, and that it is initialised. The node says: "
                f"{answered.reason[:200]}"
            )
        found[function] = Reading(call, _address).answer(answered)
    contract = SettlementContract(contract_id, found["get_admin"], found["get_vault"])
    reading = contract.developer_balance(contract.admin)
    answered = await ask(reading.call)
    if isinstance(answered, ContractFault):
        # Its successor wants a token here, and a sequence with each credit.
        raise ChainMismatch(
            f"The settlement contract {contract_id} has another interface than Callora knows: nothing can be credited. "
            f"The node says: {answered.reason[:200]}"
        )
    reading.answer(answered)
    return contract


def _address(value: xdr.SCVal) -> str:
    return scval.from_address(value).address
