"""What the treasury answers: values that routes and commands tell apart.

They stand apart from the actors that give them, so that a process without a chain, which still documents its routes,
does not load Stellar's SDK.
"""

from datetime import datetime

import attrs

from callora.ledger.chain import Envelope
from callora.ledger.money import Stroops
from callora.ledger.outcomes import Draining, InsufficientFunds, Overloaded, StandingRefused, VaultMissing
from callora.store.deposits import Intent, TooManyOpen

__all__ = [
    "Admitted",
    "ChainHalted",
    "Claimed",
    "ContractRefuses",
    "DepositMissing",
    "Expired",
    "Halted",
    "MayBePaid",
    "Mismatch",
    "NotAsked",
    "NotInSuspense",
    "NotOpen",
    "NotTaken",
    "Offered",
    "PrepareRefusal",
    "Prepared",
    "Refused",
    "SignedWrong",
    "SimulationFailed",
    "SourceMissing",
    "SourceUnclear",
    "Taken",
    "TooManyAddresses",
    "TooManyOpen",
    "TooManyWithdrawals",
    "TrustlineMissing",
    "Waiting",
    "WalletNotProved",
    "WalletShort",
    "WithdrawalRefusal",
]


# --- addresses that want to deposit -----------------------------------------------------------------------------------


@attrs.frozen
class Admitted:
    """The address may deposit."""


@attrs.frozen
class Waiting:
    """The owner has not answered yet."""

    automatic: bool
    """Whether the owner's key is here, so that it is a matter of seconds; else of an operator."""


@attrs.frozen
class Refused:
    """The owner does not want deposits of this address."""

    reason: str | None


@attrs.frozen
class TooManyAddresses:
    """The user has asked for as many others as he may."""


@attrs.frozen
class NotAsked:
    """Nobody has asked for this address."""


@attrs.frozen
class Offered:
    """A transaction for the owner to sign."""

    envelope: Envelope
    expires_at: datetime
    prepared_ledger: int
    """The latest when it was made: it is in no ledger up to this one."""


@attrs.frozen
class ContractRefuses:
    """The contract would not take the call that is to be signed."""

    reason: str


@attrs.frozen
class Taken:
    """The signed transaction is stored and sent; whether it is applied shows in what waits."""

    tx_hash: str


@attrs.frozen
class NotTaken:
    """What was handed back is not what was offered, or is not signed."""

    reason: str


# --- deposits ---------------------------------------------------------------------------------------------------------


@attrs.frozen
class Prepared:
    """A deposit to be signed."""

    intent: Intent
    contract_id: str
    passphrase: str
    timeout_seconds: int


@attrs.frozen
class SourceUnclear:
    """The user named no account and has proved to hold none, or named one that another user holds."""

    other_users: bool


@attrs.frozen
class SourceMissing:
    """The account is not on the network."""


@attrs.frozen
class WalletShort:
    """The account does not have the amount in USDC."""

    has: int | None
    """None: it has no trustline."""


@attrs.frozen
class SimulationFailed:
    """The contract would not take the deposit."""

    rule: str | None
    """Which of its rules speaks, such as `BelowMinDeposit` or `Paused`."""


@attrs.frozen
class ChainHalted:
    """Nothing is taken, credited or paid until an operator has looked."""


@attrs.frozen
class DepositMissing:
    """No deposit of the user's was prepared as this transaction."""


@attrs.frozen
class SignedWrong:
    """What came back is not what was prepared, or not signed by its account."""

    reason: str


@attrs.frozen
class Expired:
    """The time to send it is over."""


PrepareRefusal = (
    VaultMissing
    | SourceUnclear
    | SourceMissing
    | WalletShort
    | SimulationFailed
    | ChainHalted
    | TooManyOpen
    | TooManyAddresses
    | Waiting
    | Refused
)


# --- withdrawals ------------------------------------------------------------------------------------------------------


@attrs.frozen
class WalletNotProved:
    """The user has proved to hold no wallet, or another than this."""

    proved: str | None


@attrs.frozen
class TrustlineMissing:
    """The wallet could not receive USDC."""


@attrs.frozen
class TooManyWithdrawals:
    """The vault has as many withdrawals under way as it may."""


@attrs.frozen
class Mismatch:
    """The same name stands for another withdrawal."""


@attrs.frozen
class NotOpen:
    """No debited withdrawal of this id waits to be paid."""


@attrs.frozen
class MayBePaid:
    """A payment of it may still be applied: it is waited for until that is certain."""


WithdrawalRefusal = (
    VaultMissing
    | StandingRefused
    | InsufficientFunds
    | WalletNotProved
    | TrustlineMissing
    | TooManyWithdrawals
    | Mismatch
    | ChainHalted
    | Overloaded
    | Draining
)


# --- deposits that wait in suspense -----------------------------------------------------------------------------------


@attrs.frozen
class Claimed:
    """Deposits that waited for their owner are his now."""

    count: int
    amount: Stroops


@attrs.frozen
class NotInSuspense:
    """No deposit of this id waits for an owner."""


@attrs.frozen
class Halted:
    """Nothing is credited until an operator has looked."""

    reason: str
