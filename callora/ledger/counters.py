"""What counters come to: how far a counter has grown since it was last rated, in which epoch, and its cost. Pure.

A counter only grows, until whoever keeps it begins anew. What is rated is therefore what it grew by between two
snapshots, never a snapshot itself, and only forwards in time: a snapshot no later than the last one rated is a replay
and changes nothing, so pages may overlap, repeat and arrive late.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Final

import attrs

from callora.ledger.ids import ApiId, DeveloperId, EndpointId, EventId
from callora.ledger.money import STROOPS_PER_USDC, Stroops
from callora.ledger.snapshots import FirstSeen, ResetPolicy
from callora.ledger.values import value

TOTAL_MAX: Final = 2**62 - 1
"""What an account's totals, summed over its inbounds, may be: two of them and their difference fit a bigint."""
CHARGE_MAX: Final = Stroops(10**15)
"""What one delta may cost, 100 million USDC: beyond it a price or a counter is wrong."""
INCLUDED_MAX: Final = 2**62
PRICE_MAX: Final = Decimal(1_000_000)
"""USDC for a unit."""
PRICE_PLACES: Final = 18
MULTIPLIER_MAX: Final = Decimal("999.999999")
MULTIPLIER_PLACES: Final = 6


@value
class Rule:
    """By what a unit is charged."""

    unit_price: Decimal
    """USDC, 0 to PRICE_MAX, at most 18 decimal places: a unit may cost far less than a stroop."""
    version: str
    """Names the rule on what was rated by it; 1 to 80 characters."""


@attrs.frozen
class Profile:
    """What an operator says of an account."""

    name: str
    active: bool
    unit_price: Decimal | None
    """USDC; None: the service's default."""
    region_multiplier: Decimal
    line_multiplier: Decimal
    rule_version: str | None
    """None: the service's default."""


@attrs.frozen
class SubjectTaken:
    """The subject has an account already."""


@value
class Metered:
    """What is metered, and under what it is booked."""

    source_id: str
    env: str
    node_id: str
    meter: str
    region: str
    first_seen: FirstSeen
    reset: ResetPolicy
    developer_id: DeveloperId
    api_id: ApiId
    endpoint_id: EndpointId


@value
class Reading:
    """What an account's counter stood at, its inbounds summed."""

    collected_at: datetime
    up: int
    """0 <= up <= TOTAL_MAX."""
    down: int
    """0 <= down <= TOTAL_MAX."""
    line: str
    """The inbound, where all samples summed here have the same; else empty."""


@value
class AccountReadings:
    """What a source's snapshots say of one account."""

    account_id: str
    event_id: EventId
    """Of the usage event that carries what they come to, if they come to anything."""
    readings: tuple[Reading, ...]
    """The earliest first; of one instant at most one."""


@value
class Checkpoint:
    """What a counter stood at when it was last rated."""

    epoch: int
    """Grows by one with each reset, from 0."""
    up: int
    down: int
    seen_at: datetime | None
    """None: never; then up and down are 0."""


@value
class Delta:
    """What a counter grew by between two snapshots; up + down > 0."""

    epoch: int
    from_up: int
    from_down: int
    up: int
    down: int
    included: int
    """Units that cost nothing, 0 <= included <= up + down."""
    amount: Stroops
    collected_at: datetime
    line: str


@attrs.frozen(slots=True)
class Advance:
    """What readings of one counter came to."""

    checkpoint: Checkpoint
    deltas: tuple[Delta, ...]
    processed: int
    replayed: tuple[Reading, ...]
    resets: int
    too_large: tuple[Reading, ...]


@attrs.frozen(slots=True)
class Price:
    """The exact price of a unit in stroops, as a fraction."""

    numerator: int
    denominator: int

    @classmethod
    def of(cls, unit_price: Decimal, multiplier: Decimal) -> "Price":
        """Return what a unit costs: the price in USDC times all multipliers, exactly."""
        exact = Fraction(unit_price) * Fraction(multiplier) * STROOPS_PER_USDC
        return cls(exact.numerator, exact.denominator)

    def charge(self, units: int) -> Stroops:
        """Return what units cost, rounded half up; units >= 0."""
        return Stroops((2 * units * self.numerator + self.denominator) // (2 * self.denominator))


def advance(
    checkpoint: Checkpoint,
    readings: Sequence[Reading],
    price: Price,
    included_left: int,
    first_seen: FirstSeen,
    reset: ResetPolicy,
) -> Advance:
    """Return how far readings take a counter.

    Args:
        readings: the earliest first.
        included_left: units that cost nothing, >= 0; used before any is charged.
        first_seen: what the first total is: all of it grown, or where counting begins.
        reset: what a total is that is lower than the one before: nothing but where counting begins, or all grown since.
    """
    epoch, up, down, seen_at = checkpoint.epoch, checkpoint.up, checkpoint.down, checkpoint.seen_at
    deltas: list[Delta] = []
    replayed: list[Reading] = []
    too_large: list[Reading] = []
    processed = resets = 0
    for reading in readings:
        if seen_at is not None and reading.collected_at <= seen_at:
            replayed.append(reading)
            continue
        began_anew = reading.up < up or reading.down < down
        from_up, from_down = (0, 0) if began_anew else (up, down)
        counted = reset == "count_new_total" if began_anew else seen_at is not None or first_seen == "full"
        units = reading.up - from_up + reading.down - from_down if counted else 0
        if units:
            included = min(units, included_left)
            amount = price.charge(units - included)
            if amount > CHARGE_MAX:
                too_large.append(reading)
                continue
            included_left -= included
            deltas.append(
                Delta(
                    epoch + began_anew,
                    from_up,
                    from_down,
                    reading.up - from_up,
                    reading.down - from_down,
                    included,
                    amount,
                    reading.collected_at,
                    reading.line,
                )
            )
        epoch += began_anew
        resets += began_anew
        processed += counted or not began_anew
        up, down, seen_at = reading.up, reading.down, reading.collected_at
    return Advance(
        Checkpoint(epoch, up, down, seen_at), tuple(deltas), processed, tuple(replayed), resets, tuple(too_large)
    )
