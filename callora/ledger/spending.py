"""Spending limits: what a key or a whole vault may spend in the last day, week, month and year. Pure.

The periods roll: what was spent counts until exactly 24 hours, 7, 30 or 365 days later. A hold counts in full from the
instant it exists, a captured call with what it was charged, less what was given back. What was spent before a limit was
set counts as well.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final, Literal, get_args

import attrs

from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.ids import ApiKeyId, EventId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.outcomes import PolicyRefused

Period = Literal["day", "week", "month", "year"]
PERIODS: Final[tuple[Period, ...]] = get_args(Period)
"""The shortest first, which is the order they are checked in."""
LENGTHS: Final[Mapping[Period, timedelta]] = {
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "month": timedelta(days=30),
    "year": timedelta(days=365),
}
ROOM_MAX: Final = 2**62
"""Room where nothing narrows it."""
_ADJECTIVES: Final[Mapping[Period, str]] = {"day": "daily", "week": "weekly", "month": "monthly", "year": "annual"}


@attrs.frozen(slots=True)
class Spending:
    """What one key, or a vault, may spend and has spent in one period."""

    period: Period
    limit: Stroops
    """stroops, > 0."""
    spent: Stroops
    """stroops; never less than what was spent and is held in the period."""

    @property
    def remaining(self) -> Stroops:
        """What is left; 0 where a limit was set below what was spent already."""
        return Stroops(max(0, self.limit - self.spent))


@attrs.frozen(slots=True)
class Allowance:
    """The limits of one key, or of a vault, as they were read.

    What is placed counts in every period alike, so one number tells how far all of them have moved since.
    """

    counted: tuple[Spending, ...]
    """In the order of PERIODS."""
    room: int
    """What could be placed then, stroops; below 0 where a limit was set below what was spent."""

    def exceeded(self, since: int, amount: Stroops) -> Spending:
        """Return the first limit that an amount beyond the room would exceed, as it stands.

        Args:
            since: stroops that were placed since it was read, less what came back.
        """
        return next(
            attrs.evolve(each, spent=Stroops(each.spent + since))
            for each in self.counted
            if each.spent + since + amount > each.limit
        )


_UNLIMITED: Final = Allowance((), ROOM_MAX)


@attrs.define(slots=True)
class SpendingLimits:
    """The limits of a vault and of its keys, with what was spent when they were read and what is held since.

    What leaves a period is seen when they are next read, which is before anything is refused, unless they were read
    within the last second. So spending is never counted too low, and a refusal counts a call at most a second too long.
    """

    vault: Allowance
    keys: Mapping[ApiKeyId, Allowance]
    read_at: datetime
    placed: int
    """Stroops that had ever been set aside for the vault before this was read."""
    exact: bool = True
    """False where it may be too much: once a hold has ended that was placed before this was read, as what came back of
    it is not known here; and where it was carried on."""
    _carried: int = 0
    """stroops that count for the vault and for each of its keys, as it is not known whose they were."""
    _own: int = 0
    _own_of: dict[ApiKeyId, int] = attrs.field(factory=dict)
    """stroops that were placed since, less what came back: in all, and by each key."""
    _open: dict[EventId, ApiKeyId] = attrs.field(factory=dict)

    def refuse(self, command: PlaceHold) -> PolicyRefused | None:
        """Return why a hold may not be placed, or None: the vault's limits first, then the key's."""
        return self.refuse_amount(command.charged.api_key_id, command.amount)

    def refuse_amount(self, api_key_id: ApiKeyId, amount: Stroops) -> PolicyRefused | None:
        """The same for what a key is to spend, stroops. Reaching a limit passes, and what costs nothing always does."""
        if amount:
            since = self._carried + self._own
            if amount > self.vault.room - since:
                return _refused("vault", self.vault.exceeded(since, amount), amount)
            of_key = self.keys.get(api_key_id, _UNLIMITED)
            since = self._carried + self._own_of.get(api_key_id, 0)
            if amount > of_key.room - since:
                return _refused("key", of_key.exceeded(since, amount), amount)
        return None

    def place(self, command: PlaceHold) -> None:
        """Count a hold that is decided."""
        self._open[command.event_id] = command.charged.api_key_id
        self._count(command.charged.api_key_id, command.amount)

    def room(self, command: PlaceHold) -> int:
        """Return how much others may place, stroops, before a hold that is counted would have been refused."""
        if not command.amount:
            return ROOM_MAX
        api_key_id = command.charged.api_key_id
        of_key = self.keys.get(api_key_id, _UNLIMITED)
        return min(self.vault.room - self._own, of_key.room - self._own_of.get(api_key_id, 0)) - self._carried

    def close(self, command: CloseHold) -> None:
        """Count the end of a hold, which is stored."""
        api_key_id = self._open.pop(command.event_id, None)
        if api_key_id is not None:
            self._count(api_key_id, command.amount - command.held_amount)
        elif command.amount < command.held_amount:
            self.exact = False

    def carried(self, placed: int) -> "SpendingLimits":
        """Return the limits as they are when others may have spent as well: never less than what was spent.

        Args:
            placed: stroops that were ever set aside for the vault, by whomever and for whichever key.
        """
        since = placed - self.placed
        return SpendingLimits(self.vault, self.keys, self.read_at, self.placed, exact=False, carried=since)

    def _count(self, api_key_id: ApiKeyId, amount: int) -> None:
        self._own += amount
        self._own_of[api_key_id] = self._own_of.get(api_key_id, 0) + amount


def allowance(found: Iterable[Spending]) -> Allowance:
    """Return limits as they are checked: the shortest period first."""
    counted = tuple(sorted(found, key=lambda each: PERIODS.index(each.period)))
    return Allowance(counted, min([each.limit - each.spent for each in counted], default=ROOM_MAX))


def _refused(whose: Literal["vault", "key"], spending: Spending, amount: Stroops) -> PolicyRefused:
    return PolicyRefused(
        "SPENDING_LIMIT_EXCEEDED",
        {
            "limitedBy": whose,
            "window": spending.period,
            "limit": format_usdc(spending.limit),
            "spent": format_usdc(spending.spent),
            "requested": format_usdc(amount),
            "remaining": format_usdc(spending.remaining),
        },
        f"The {whose}'s {_ADJECTIVES[spending.period]} spending limit would be exceeded",
    )
