"""Calls that are paid from a quota, before any endpoint can be priced in credits over REST."""

from datetime import UTC, datetime, timedelta

import attrs

from callora.ledger.commands import Delivery, GrantQuota, PlaceHold, capture
from callora.ledger.ids import ApiKeyId, EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import HoldClosed, HoldPlaced, QuotaGranted
from tests.simulation.support import CHARGED
from tests.support.service import RunningService


@attrs.define
class MovingClock:
    """A clock that shows what a test says."""

    shown: datetime

    def now(self) -> datetime:
        """Return it."""
        return self.shown

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.shown.timestamp()


def month_after(moment: datetime) -> datetime:
    """Return the first instant of the calendar month after this one, UTC."""
    first = datetime(moment.year, moment.month, 1, tzinfo=UTC)
    return datetime((first + timedelta(days=32)).year, (first + timedelta(days=32)).month, 1, tzinfo=UTC)


async def burn(service: RunningService, vault_id: VaultId, credits_burnt: int, key: ApiKeyId | None = None) -> str:
    """Make a call that costs so many credits; return `paid`, or why it was refused."""
    event_id = EventId(service.context.ids.uuid7())
    charged = CHARGED if key is None else attrs.evolve(CHARGED, api_key_id=key)
    held = await service.ledger.registry.ask(
        vault_id, PlaceHold(event_id, Stroops(0), 60, charged, units=1, unit_credits=credits_burnt)
    )
    if not isinstance(held, HoldPlaced):
        return str(getattr(held, "code", held))
    closed = await service.ledger.registry.ask(
        vault_id,
        capture(
            event_id,
            Stroops(0),
            Stroops(0),
            Delivery("delivered", 200),
            held_credits=held.credits,
            spent_credits=held.credits,
        ),
    )
    assert isinstance(closed, HoldClosed)
    return "paid"


async def give(service: RunningService, vault_id: VaultId, amount: int, ref: str, *, days: int = 365) -> None:
    """Give a vault credits that end in so many days."""
    ids, now = service.context.ids, service.context.clock.now()
    made = await service.ledger.registry.ask(
        vault_id, GrantQuota(ids.uuid7(), "promo", amount, ref, now + timedelta(days=days))
    )
    assert isinstance(made, QuotaGranted)
