"""Subscriptions as they are stored, each worked on by whoever has claimed it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.subscriptions import Payment, PlanOffer, Subscription
from callora.store.bridge import Connection, Database, Row

_COLUMNS: Final = """
subscription_id, vault_id, plan_id, price, first_charge, replaces, next_plan_id, next_price, state, period_start,
paid_until, created_at, cancelled_at, ended_at
"""

_LOCK: Final = "SELECT FROM users WHERE user_id = $1 FOR NO KEY UPDATE"

_LIVING: Final = f"""
SELECT {_COLUMNS}, claimed_until FROM subscriptions WHERE vault_id = $1 AND state IN ('pending', 'active')
"""  # noqa: S608 - columns of ours

_OFFER: Final = "SELECT plan_id, price FROM plans WHERE plan_id = $1 AND active AND price > 0"

_ADD: Final = f"""
INSERT INTO subscriptions (subscription_id, vault_id, plan_id, price, first_charge, replaces, period_start, paid_until,
                           created_at, claimed_until)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

_CLAIM: Final = f"""
UPDATE subscriptions SET claimed_until = $2
WHERE subscription_id = $1 AND state IN ('pending', 'active') AND (claimed_until <= $3) IS NOT FALSE
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

# Several processes look at once: what one has claimed the others do not wait for. What may be about to be replaced is
# not renewed before that is decided.
_CLAIM_DUE: Final = f"""
WITH due AS (
    SELECT subscription_id FROM subscriptions a
    WHERE state = 'active' AND paid_until <= $2 AND (claimed_until <= $2) IS NOT FALSE
        AND ($4::uuid IS NULL OR vault_id = $4)
        AND NOT EXISTS (SELECT FROM subscriptions p WHERE p.vault_id = a.vault_id AND p.state = 'pending')
    ORDER BY paid_until LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED
), abandoned AS (
    SELECT subscription_id FROM subscriptions
    WHERE state = 'pending' AND (claimed_until <= $2) IS NOT FALSE AND ($4::uuid IS NULL OR vault_id = $4)
    LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE subscriptions SET claimed_until = $1
WHERE subscription_id IN (SELECT subscription_id FROM due UNION ALL SELECT subscription_id FROM abandoned)
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

_LET_GO: Final = """
UPDATE subscriptions SET claimed_until = NULL
WHERE subscription_id = $1 AND claimed_until = $2 AND state IN ('pending', 'active')
"""

_REPLACE: Final = """
UPDATE subscriptions SET state = 'replaced', ended_at = $2, claimed_until = NULL
WHERE subscription_id = $1 AND state = 'active'
"""

_ACTIVATE: Final = """
UPDATE subscriptions SET state = 'active', claimed_until = NULL WHERE subscription_id = $1 AND state = 'pending'
RETURNING true
"""

_DROP: Final = "DELETE FROM subscriptions WHERE subscription_id = $1 AND state = 'pending'"

_RENEW: Final = """
UPDATE subscriptions SET plan_id = $2, price = $3, next_plan_id = NULL, next_price = NULL, period_start = $4,
                         paid_until = $5, claimed_until = NULL
WHERE subscription_id = $1 AND state = 'active'
RETURNING true
"""

_END: Final = """
UPDATE subscriptions SET state = $2, ended_at = $3, claimed_until = NULL
WHERE subscription_id = $1 AND state IN ('pending', 'active')
RETURNING true
"""

_KEEP: Final = f"""
UPDATE subscriptions SET cancelled_at = NULL, next_plan_id = $2, next_price = $3, claimed_until = NULL
WHERE subscription_id = $1 AND state = 'active'
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

_CANCEL: Final = f"""
UPDATE subscriptions s SET cancelled_at = coalesce(s.cancelled_at, $3), next_plan_id = NULL, next_price = NULL
FROM vaults v
WHERE s.subscription_id = $1 AND v.vault_id = s.vault_id AND v.user_id = $2 AND s.state = 'active'
    AND (s.claimed_until <= $3) IS NOT FALSE
RETURNING {", ".join(f"s.{name.strip()}" for name in _COLUMNS.split(","))}
"""  # noqa: S608 - columns of ours

_USER: Final = "SELECT user_id FROM vaults WHERE vault_id = $1"


def subscription_of(row: Row) -> Subscription:
    """Return a row as what it is."""
    return Subscription(
        subscription_id=str(row["subscription_id"]),
        vault_id=VaultId(str(row["vault_id"])),
        plan_id=row["plan_id"],
        price=Stroops(row["price"]),
        first_charge=Stroops(row["first_charge"]),
        replaces=None if row["replaces"] is None else str(row["replaces"]),
        next_plan_id=row["next_plan_id"],
        next_price=None if row["next_price"] is None else Stroops(row["next_price"]),
        state=row["state"],
        period_start=row["period_start"],
        paid_until=row["paid_until"],
        created_at=row["created_at"],
        cancelled_at=row["cancelled_at"],
        ended_at=row["ended_at"],
    )


async def lock_user(connection: Connection, user_id: UserId) -> None:
    """Wait until nobody else decides on this user's subscriptions or requests, and let nobody before the commit."""
    await connection.execute(_LOCK, user_id)


async def living(connection: Connection, vault_id: VaultId) -> Sequence[tuple[Subscription, datetime | None]]:
    """Return a vault's subscriptions that have not ended, at most an active and a pending one, and who has claimed
    them until when."""
    rows = await connection.fetch(_LIVING, vault_id)
    return [(subscription_of(row), row["claimed_until"]) for row in rows]


async def find_offer(connection: Connection, plan_id: str) -> PlanOffer | None:
    """Return a plan that can be subscribed to: it is active and has a price."""
    row = await connection.fetch_row(_OFFER, plan_id)
    return None if row is None else PlanOffer(row["plan_id"], Stroops(row["price"]))


async def add_pending(
    connection: Connection,
    subscription_id: str,
    vault_id: VaultId,
    offer: PlanOffer,
    first_charge: Stroops,
    replaces: str | None,
    period: tuple[datetime, datetime],
    now: datetime,
    claimed_until: datetime,
) -> Subscription:
    """Store the intent of a subscription, claimed."""
    row = await connection.fetch_row(
        _ADD,
        subscription_id,
        vault_id,
        offer.plan_id,
        offer.price,
        first_charge,
        replaces,
        *period,
        now,
        claimed_until,
    )
    assert row is not None
    return subscription_of(row)


async def claim(connection: Connection, subscription_id: str, until: datetime, now: datetime) -> Subscription | None:
    """Claim a subscription that has not ended; None where it has, or where somebody else works on it."""
    row = await connection.fetch_row(_CLAIM, subscription_id, until, now)
    return None if row is None else subscription_of(row)


async def claim_due(
    database: Database, until: datetime, now: datetime, limit: int, vault_id: VaultId | None = None
) -> Sequence[Subscription]:
    """Claim subscriptions whose paid month has ended, and intents that nobody works on any more.

    Args:
        limit: at most so many of each.
        vault_id: of this vault alone; None: of all.
    """
    return [subscription_of(row) for row in await database.fetch(_CLAIM_DUE, until, now, limit, vault_id)]


async def let_go(database: Database, subscription_id: str, claimed_until: datetime) -> None:
    """Give a claim back before its time."""
    await database.execute(_LET_GO, subscription_id, claimed_until)


async def activate(connection: Connection, subscription: Subscription, now: datetime) -> bool:
    """Note that the first month is paid; what it replaces ends. False where that was noted before."""
    if subscription.replaces is not None:
        await connection.execute(_REPLACE, subscription.replaces, now)
    return bool(await connection.fetch_value(_ACTIVATE, subscription.subscription_id))


async def drop_pending(database: Database, subscription_id: str) -> None:
    """Forget an intent that came to nothing: nothing was charged for it, and never will be."""
    await database.execute(_DROP, subscription_id)


async def renew(connection: Connection, subscription_id: str, payment: Payment) -> bool:
    """Note that a month is paid. False where the subscription has ended meanwhile."""
    return bool(
        await connection.fetch_value(
            _RENEW, subscription_id, payment.plan_id, payment.price, payment.period_start, payment.paid_until
        )
    )


async def end(connection: Connection, subscription_id: str, state: str, now: datetime) -> bool:
    """End a subscription. False where it has ended before.

    Args:
        state: ended or lapsed.
    """
    return bool(await connection.fetch_value(_END, subscription_id, state, now))


async def go_on_with(connection: Connection, subscription_id: str, offer: PlanOffer | None) -> Subscription:
    """Let an active, locked subscription go on: with another plan after what is paid, or with its own where None."""
    plan_id, price = (None, None) if offer is None else (offer.plan_id, offer.price)
    row = await connection.fetch_row(_KEEP, subscription_id, plan_id, price)
    assert row is not None, "who changes it has locked its user and claimed it"
    return subscription_of(row)


async def cancel(database: Database, subscription_id: str, user_id: UserId, now: datetime) -> Subscription | None:
    """Let an active subscription of this user's end with what is paid; None where it is not active, or worked on."""
    row = await database.fetch_row(_CANCEL, subscription_id, user_id, now)
    return None if row is None else subscription_of(row)


async def user_of(connection: Connection, vault_id: VaultId) -> UserId | None:
    """Return whose vault it is; None where there is no such vault."""
    user_id = await connection.fetch_value(_USER, vault_id)
    return None if user_id is None else UserId(str(user_id))
