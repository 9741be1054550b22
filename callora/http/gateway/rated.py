"""A call that is priced by units: what is held for it, and what it comes to."""

import attrs

from callora.ledger.money import Stroops
from callora.ledger.rating import Charge, RateCard, charge


@attrs.define(slots=True, eq=False)
class Rated:
    """A call whose price is that of its units."""

    card: RateCard
    price: Stroops
    """Of a unit."""
    cap: Stroops | None
    """What the caller lets it cost."""
    units: int
    """What is held."""
    credits: int = 0
    """What of that is held in credits."""
    due: Charge | None = None
    """What it is to be charged, once that is known."""
    charged: bool = False
    """Whether that is charged."""
    streaming: bool = False
    """Whether the answer's head goes out before anything is charged."""
    trailed: bool = False
    """Whether its trailers can tell what was."""

    @property
    def held(self) -> Stroops:
        """The money that is held."""
        return charge(self.card, self.price, self.units, self.credits).amount

    @property
    def reads_answer(self) -> bool:
        """Whether something is looked for in the answer's body, which is not to be compressed then."""
        source = self.card.source
        return source is not None and source.side != "request" and source.part in ("json", "events")

    @property
    def flows(self) -> bool:
        """Whether it is what passes of a stream that is charged."""
        return self.card.source is not None and self.card.source.side == "stream"

    def cost(self, units: int) -> Charge:
        """Return what units cost, with the credits that are held."""
        return charge(self.card, self.price, units, self.credits)

    def shown(self, told: str) -> str:
        """Return the header lines that tell what was charged.

        Args:
            told: those that tell of money.
        """
        if self.streaming:
            return "Trailer: X-Callora-Charge, X-Callora-Units\r\n" if self.trailed else ""
        if self.due is None or not self.charged:
            return told
        spent = f"X-Callora-Credits: {self.due.credits}\r\n" if self.due.credits else ""
        return f"{told}X-Callora-Units: {self.due.units}\r\n{spent}"
