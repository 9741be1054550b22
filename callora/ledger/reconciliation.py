"""What the vault contract should have, by the ledger. Pure.

From design §2.6, Σ deposits + grants − withdrawals − captures + refunds = Σ balances, and from what has a counterpart
on chain: deposits and withdrawals have one, charges have one once they are settled; grants, refunds and adjustments
have none, and neither has anything booked under another name than an event's, such as before a test network began anew.
"""

import attrs

from callora.ledger.money import Stroops


@attrs.frozen
class Parts:
    """Everything that the contract's balance is made of, at one ledger and one moment of the database; in stroops."""

    balances: Stroops
    """Σ (available + held − owed) of the network's vaults."""
    captured: Stroops
    """Σ captured usage, ever."""
    charged: Stroops
    """Σ `deduct` events of our own transactions: captured usage that is charged on chain."""
    granted: int
    refunded: Stroops
    adjusted: int
    """Σ adjustments but for withdrawals given back; may be below 0."""
    unbacked: int
    """Σ deposits less withdrawals that no event of this history stands for; may be below 0."""
    suspense: Stroops
    """Deposits of nobody known."""
    noted: Stroops
    """Deposits seen and not credited yet."""
    later: Stroops
    """Deposits credited already, of ledgers after the one compared."""
    withdrawing: Stroops
    """Debited, not given back, and not yet paid at that ledger."""
    opening: int
    """What the contract had before the first event seen."""
    gaps: int
    """By how much ledgers that nobody could show moved the balance, as operators found."""

    @property
    def expected(self) -> int:
        """What the contract should have."""
        return (
            self.balances
            + self.captured
            - self.charged
            - self.granted
            - self.refunded
            - self.adjusted
            - self.unbacked
            + self.suspense
            + self.noted
            - self.later
            + self.withdrawing
            + self.opening
            + self.gaps
        )
