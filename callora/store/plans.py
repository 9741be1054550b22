"""Plans as they are written. Whatever changes one is told to every process as a change of the catalogue."""

from collections.abc import Sequence
from typing import Final, Literal

import attrs

from callora.ledger.ids import ApiId
from callora.ledger.money import Stroops
from callora.ledger.quota import Overage
from callora.store.bridge import Database

_PUT: Final = """
INSERT INTO plans AS p (plan_id, name, price, monthly_credits, overage, rate_limit_per_minute, features, allowed_apis,
                        active)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (plan_id) DO UPDATE SET
    name = excluded.name, price = excluded.price, monthly_credits = excluded.monthly_credits,
    overage = excluded.overage, rate_limit_per_minute = excluded.rate_limit_per_minute, features = excluded.features,
    allowed_apis = excluded.allowed_apis, active = excluded.active
RETURNING xmax = 0
"""


@attrs.frozen
class Plan:
    """What vaults on a plan may do, and get each month."""

    plan_id: str
    name: str
    price: Stroops
    """stroops a month, >= 0; 0: it cannot be subscribed to."""
    monthly_credits: int
    """>= 0."""
    overage: Overage
    rate_limit_per_minute: int | None
    """Of each key; None: what the service says."""
    features: Sequence[str]
    allowed_apis: Sequence[ApiId] | None
    """None: all."""
    active: bool
    """Whether a vault may be put on it."""


async def put_plan(database: Database, plan: Plan) -> Literal["made", "replaced"]:
    """Store a plan, or replace the one of its id.

    Raises:
        StoreUnavailable: nothing was changed. OutcomeUnknown: putting it again is safe.
    """
    made = await database.fetch_value(
        _PUT,
        plan.plan_id,
        plan.name,
        plan.price,
        plan.monthly_credits,
        plan.overage,
        plan.rate_limit_per_minute,
        list(plan.features),
        None if plan.allowed_apis is None else list(plan.allowed_apis),
        plan.active,
    )
    return "made" if made else "replaced"
