"""What payouts answer: apart from the actor that does, so that routes are made without Stellar's SDK."""

import attrs

from callora.ledger.money import Stroops
from callora.store.payouts import Payout


@attrs.frozen
class Prepared:
    """A withdrawal to be signed."""

    payout: Payout
    contract_id: str
    """The settlement contract."""
    passphrase: str
    timeout_seconds: int


@attrs.frozen
class Balance:
    """What the settlement contract owes a developer."""

    address: str
    amount: Stroops


@attrs.frozen
class NoDeveloper:
    """The user has no developer profile."""


@attrs.frozen
class NoWallet:
    """He has proved to hold no wallet."""


@attrs.frozen
class NoAccount:
    """The wallet is not on the network."""


@attrs.frozen
class NoTrustline:
    """The wallet could not receive USDC."""


@attrs.frozen
class BalanceShort:
    """The contract owes him less."""

    required: Stroops | None
    """None: he asked for all there is, and there is nothing."""
    available: Stroops


@attrs.frozen
class TooManyOpen:
    """He has OPEN_MAX withdrawals to sign or under way."""


@attrs.frozen
class ContractRefuses:
    """The contract would not pay."""

    rule: str | None
    """Which of its rules speaks, such as `DailyWithdrawCapExceeded`."""


@attrs.frozen
class ChainHalted:
    """Nothing is sent until an operator has looked."""


@attrs.frozen
class PayoutMissing:
    """No withdrawal of his was prepared as this transaction."""


@attrs.frozen
class SignedWrong:
    """What came back is not what was prepared, or not signed by its account."""

    reason: str


@attrs.frozen
class Expired:
    """The time to send it is over."""


PrepareRefusal = (
    NoDeveloper | NoWallet | NoAccount | NoTrustline | BalanceShort | TooManyOpen | ContractRefuses | ChainHalted
)
SubmitRefusal = NoDeveloper | PayoutMissing | SignedWrong | Expired | ChainHalted
