"""Quotas: the credits a vault was granted, and which calls they pay. Pure; no clock, no I/O.

A credit is the unit of a grant, never a second money. A unit of a call is paid whole in credits or whole in money.
Invariant: a vault's credits are what it was granted, less what ended unburnt, less what calls burnt and hold; never
negative. Which grant a credit was burnt from is settled when a grant is added or ends: the earliest to end burns first.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import attrs

from callora.ledger.commands import CloseHold, PlaceHold
from callora.ledger.ids import ApiKeyId, EventId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import PolicyRefused
from callora.ledger.spending import ROOM_MAX

Overage = Literal["deny", "charge"]


@attrs.define(slots=True)
class KeyCap:
    """How much of its vault's quota a key may burn in a calendar month."""

    cap: int
    """Credits, >= 0."""
    used: int
    """Credits burnt and held in the month; never too few."""
    counted: int = attrs.Factory(lambda self: self.used, takes_self=True)
    """The same when it was read, whatever was decided since."""


@attrs.define(slots=True)
class Quota:
    """What a vault's grants and its plan say, as they were read, with what its keys burnt since."""

    granted: int
    """Credits of all grants that have not ended."""
    monthly: int
    """What the plan grants each month."""
    overage: Overage
    resets_at: datetime
    """When the next calendar month begins, UTC."""
    caps: Mapping[ApiKeyId, KeyCap]
    """Of the keys that have one."""
    read_at: datetime
    until: datetime | None = None
    """When a grant ends or the month does; None where nothing of it ends."""
    placed: int = 0
    """Credits that had ever been set aside for the vault before this was read."""
    exact: bool = True
    """False where a key may have burnt less: once a hold has ended that was placed before this was read, as whose it
    was is not known here; and where it was carried on."""
    _open: dict[EventId, ApiKeyId] = attrs.field(factory=dict)

    def decide(self, command: PlaceHold, left: int) -> PlaceHold | PolicyRefused:
        """Return a hold with as many of its units paid in credits as there are.

        Args:
            left: the vault's credits.
        """
        covered = self.covered(command.charged.api_key_id, command.units, command.unit_credits, left)
        if covered < command.units and self.overage == "deny":
            return self.refused(command.charged.api_key_id, command.units * command.unit_credits, left)
        return attrs.evolve(
            command,
            amount=Stroops(command.amount // command.units * (command.units - covered)),
            credits=covered * command.unit_credits,
        )

    def unsure(self, command: PlaceHold, left: int) -> bool:
        """Tell whether the quota, read anew, might pay more of a hold than `decide` would let it pay."""
        return not self.exact and command.units > self.covered(
            command.charged.api_key_id, command.units, command.unit_credits, left
        )

    def carried(self, placed: int) -> "Quota":
        """Return the quota as it is when others may have burnt as well: no key has burnt more.

        Args:
            placed: credits that were ever set aside for the vault, by whomever and for whichever key.
        """
        since = placed - self.placed
        caps = {api_key_id: KeyCap(each.cap, each.counted + since) for api_key_id, each in self.caps.items()}
        return Quota(
            self.granted,
            self.monthly,
            self.overage,
            self.resets_at,
            caps,
            self.read_at,
            self.until,
            placed,
            exact=not caps,
        )

    def covered(self, api_key_id: ApiKeyId, units: int, unit_credits: int, left: int) -> int:
        """Return how many units credits pay. Those of an ended grant that came back to the vault pay nothing."""
        return min(units, self._room(api_key_id, left) // unit_credits)

    def refused(self, api_key_id: ApiKeyId, required: int, left: int) -> PolicyRefused:
        """Return what is told where the credits do not suffice and the plan charges nothing instead."""
        cap = self.caps.get(api_key_id)
        by_key = cap is not None and cap.cap - cap.used < min(left, self.granted)
        limit, used = (cap.cap, cap.used) if by_key and cap is not None else (self.granted, self.granted - left)
        return PolicyRefused(
            "QUOTA_EXHAUSTED",
            {
                "limitedBy": "key" if by_key else "vault",
                "creditsRequired": required,
                "creditsRemaining": self._room(api_key_id, left),
                "creditsUsed": max(0, used),
                "monthlyLimit": limit,
                "resetAt": self.resets_at.isoformat().replace("+00:00", "Z"),
            },
        )

    def place(self, command: PlaceHold) -> None:
        """Count a hold that is decided."""
        cap = self.caps.get(command.charged.api_key_id)
        if cap is not None and command.credits:
            self._open[command.event_id] = command.charged.api_key_id
            cap.used += command.credits

    def room(self, command: PlaceHold, left: int) -> int | None:
        """Return how much others may place, credits, before a hold that is counted would have been decided otherwise.

        None where the vault must be just as it was: some of the hold is paid in money, and not since the vault has no
        credits for it.

        Args:
            left: the vault's credits after the hold.
        """
        if command.uncovered and left >= command.unit_credits:
            return None
        cap = self.caps.get(command.charged.api_key_id)
        return ROOM_MAX if cap is None or not command.credits else cap.cap - cap.used

    def close(self, command: CloseHold) -> None:
        """Count the end of a hold, which is stored."""
        given_back = command.held_credits - command.credits
        api_key_id = self._open.pop(command.event_id, None)
        if api_key_id is not None:
            self.caps[api_key_id].used -= given_back
        elif given_back and self.caps:
            self.exact = False

    def _room(self, api_key_id: ApiKeyId, left: int) -> int:
        room = min(left, self.granted)
        cap = self.caps.get(api_key_id)
        return room if cap is None else min(room, max(0, cap.cap - cap.used))


@attrs.frozen(slots=True)
class GrantLine:
    """A grant that has not ended."""

    grant_id: str
    amount: int
    remaining: int
    """When it was last settled, 0 <= remaining <= amount."""
    expires_at: datetime


def settle(grants: Sequence[GrantLine], credits_left: int) -> tuple[Sequence[GrantLine], int]:
    """Return grants with what is left of each, and how many credits belong to none of them.

    What was burnt since they were last settled is taken from the earliest to end; what came back of holds goes to the
    latest to end, as far as it was burnt there. The rest came from grants that have ended, and is lost with them.

    Args:
        grants: the earliest to end first.
        credits_left: what the vault has, >= 0.
    """
    burnt = sum(grant.remaining for grant in grants) - credits_left
    settled: list[GrantLine] = []
    if burnt >= 0:
        for grant in grants:
            taken = min(burnt, grant.remaining)
            settled.append(attrs.evolve(grant, remaining=grant.remaining - taken))
            burnt -= taken
        return settled, 0
    for grant in reversed(grants):
        given = min(-burnt, grant.amount - grant.remaining)
        settled.append(attrs.evolve(grant, remaining=grant.remaining + given))
        burnt += given
    return settled[::-1], -burnt


def month_of(now: datetime) -> tuple[datetime, datetime]:
    """Return the calendar month of an instant, UTC: its first instant, and the next month's."""
    start = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return start, start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
