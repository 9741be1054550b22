"""What was spent, by a key or from a whole vault: counted from events and from the sums behind them.

What was spent in a period is the sum of five parts that are read in one statement, and so at one moment:

- what is final, from the rollup: whole days, whole hours before and after them, and minutes before and after those;
- what is after them, from the events themselves, a hold with its whole amount;
- holds that were open when their minute became final (`usage_open`), as they are now;
- for the day, the calls of its first, partial minute one by one; for longer periods that minute counts whole, so a call
  may count up to 60 seconds too long, and never too short;
- less what was given back of calls in the period.

A rebuild of the sums takes minutes out and moves `done_until` back with them, so nothing is counted too low meanwhile:
more is read from the events.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.ids import ApiKeyId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.spending import LENGTHS, PERIODS, Period, Spending, SpendingLimits, in_order
from callora.store.bridge import Connection, Row
from callora.store.bridge import Database as Database  # HTTP names what it passes on

# `first_minute` is the first that counts whole: for the day the one after that of its start, for longer periods that.
# From there come minutes until `since_hour`, hours until `since_day`, days until `until_day`, hours until `until_hour`,
# and minutes until `done`. Where there is no whole day, or no whole hour, its bounds are where the smaller parts meet.
# Events are found by the BRIN index on their date; OFFSET 0 keeps the planner from walking through all of the vault's.
_PARTS: Final = """
WITH edges AS MATERIALIZED (
    SELECT p.period, p.start, r.done_until AS done, m.first_minute, h.since_hour, h.until_hour,
           CASE WHEN d.first < d.last THEN d.first ELSE h.since_hour END AS since_day,
           CASE WHEN d.first < d.last THEN d.last ELSE h.since_hour END AS until_day
    FROM unnest($2::text[], $3::timestamptz[]) AS p (period, start), usage_rollup r,
         LATERAL (SELECT date_trunc('minute', p.start, 'UTC')
                         + CASE p.period WHEN 'day' THEN interval '1 minute' ELSE interval '0' END
                             AS first_minute) AS m,
         LATERAL (SELECT date_trunc('hour', m.first_minute + interval '1 hour' - interval '1 microsecond', 'UTC')
                             AS first,
                         date_trunc('hour', r.done_until, 'UTC') AS last) AS w,
         LATERAL (SELECT CASE WHEN w.first < w.last THEN w.first ELSE m.first_minute END AS since_hour,
                         CASE WHEN w.first < w.last THEN w.last ELSE m.first_minute END AS until_hour) AS h,
         LATERAL (SELECT date_trunc('day', m.first_minute + interval '24 hours' - interval '1 microsecond', 'UTC')
                             AS first,
                         date_trunc('day', r.done_until, 'UTC') AS last) AS d
), singly AS MATERIALIZED (
    SELECT u.api_key_id, u.created_at, u.amount
    FROM (SELECT vault_id, api_key_id, created_at,
                 CASE state WHEN 'held' THEN held_amount ELSE coalesce(amount, 0) END AS amount
          FROM usage_events
          WHERE created_at >= (SELECT max(done) FROM edges) AND created_at > (SELECT min(start) FROM edges)
          OFFSET 0) AS u
    WHERE u.vault_id = $1
    UNION ALL
    SELECT u.api_key_id, u.created_at, CASE u.state WHEN 'held' THEN u.held_amount ELSE coalesce(u.amount, 0) END
    FROM usage_open o JOIN usage_events u ON u.vault_id = o.vault_id AND u.event_id = o.event_id
    WHERE o.vault_id = $1
    UNION ALL
    SELECT u.api_key_id, u.created_at, -r.amount
    FROM ledger_entries r JOIN usage_events u ON u.vault_id = r.vault_id AND u.event_id = r.event_id
    WHERE r.vault_id = $1 AND r.kind = 'refund' AND r.created_at > (SELECT min(start) FROM edges)
), first_minutes AS MATERIALIZED (
    SELECT e.period, u.api_key_id, u.amount
    FROM edges e,
         LATERAL (SELECT vault_id, event_id, api_key_id, amount FROM usage_events
                  WHERE created_at > e.start AND created_at < e.first_minute AND created_at < e.done
                        AND state = 'captured'
                  OFFSET 0) AS u
    WHERE e.period = 'day' AND u.vault_id = $1
          AND NOT EXISTS (SELECT FROM usage_open o WHERE o.vault_id = $1 AND o.event_id = u.event_id)
)
"""

_FINAL: Final = (
    ("usage_minutes", "minute", "first_minute", "since_hour"),
    ("key_hours", "hour", "since_hour", "since_day"),
    ("key_hours", "hour", "until_day", "until_hour"),
    ("usage_minutes", "minute", "until_hour", "done"),
)
"""What is taken from sums, but for the days: table, its column of time, and the edges that it lies between."""


def _spent(days: str, whose: str, of_event: str) -> str:
    """Return the sum of all parts, of one period `e`.

    Args:
        days: the table of whole days.
        whose: the condition on its rows `s`, and on those of _FINAL.
        of_event: further conditions on an event `u` of the vault.
    """
    parts = [
        f"coalesce((SELECT sum(s.amount) FROM {table} s WHERE {whose}"  # noqa: S608 - our own text
        f" AND s.{column} >= e.{since} AND s.{column} < e.{until}), 0)"
        for table, column, since, until in ((days, "day", "since_day", "until_day"), *_FINAL)
    ] + [
        f"coalesce((SELECT sum(u.amount) FROM {events} u WHERE {which} {of_event}), 0)"  # noqa: S608 - our own text
        for events, which in (("singly", "u.created_at > e.start"), ("first_minutes", "u.period = e.period"))
    ]
    return f"({' + '.join(parts)})::bigint AS spent"


_OF_KEY: Final = "s.vault_id = $1 AND s.api_key_id = k.api_key_id"

_SPENT_BY_KEYS: Final = f"""{_PARTS}
SELECT k.api_key_id, e.period, {_spent("usage_days", _OF_KEY, "AND u.api_key_id = k.api_key_id")}
FROM unnest($4::uuid[]) AS k (api_key_id), edges e
"""  # noqa: S608 - our own text

_SPENT_BY_VAULT: Final = f"""{_PARTS}
SELECT NULL::uuid AS api_key_id, e.period, {_spent("vault_days", "s.vault_id = $1", "")}
FROM edges e
"""  # noqa: S608 - our own text

_LIMITS: Final = "SELECT api_key_id, period, amount FROM spending_limits WHERE vault_id = $1"

# A plan for these periods and no others, and none that reads a whole partition.
_PLANNED: Final = (
    "SELECT set_config('enable_seqscan', 'off', true), set_config('plan_cache_mode', 'force_custom_plan', true)"
)


@attrs.frozen
class Account:
    """One period of a key or vault: its limit, if it has one, and what was spent."""

    period: Period
    limit: Stroops | None
    spent: Stroops

    @property
    def remaining(self) -> Stroops | None:
        """What is left, never below 0; None without a limit."""
        return None if self.limit is None else Spending(self.period, self.limit, self.spent).remaining


async def spending_limits(connection: Connection, vault_id: VaultId, now: datetime) -> SpendingLimits | None:
    """Return the limits of a vault and its keys with what was spent, or None where there are none.

    Args:
        connection: inside a transaction.

    Raises:
        StoreUnavailable: nothing was read.
    """
    rows = await connection.fetch(_LIMITS, vault_id)
    if not rows:
        return None
    await connection.fetch_row(_PLANNED)
    periods = [period for period in PERIODS if any(row["period"] == period for row in rows)]
    keys = [ApiKeyId(key) for key in sorted({str(row["api_key_id"]) for row in rows if row["api_key_id"] is not None})]
    spent = await spent_in(
        connection, vault_id, now, periods, keys, vault=any(row["api_key_id"] is None for row in rows)
    )
    found: dict[ApiKeyId | None, list[Spending]] = {}
    for row in rows:
        whose = None if row["api_key_id"] is None else ApiKeyId(str(row["api_key_id"]))
        found.setdefault(whose, []).append(Spending(row["period"], Stroops(row["amount"]), spent[whose, row["period"]]))
    return SpendingLimits(
        in_order(found.pop(None, [])), {key: in_order(each) for key, each in found.items() if key is not None}, now
    )


async def account(
    database: Database, vault_id: VaultId, api_key_id: ApiKeyId | None, now: datetime
) -> tuple[Account, ...]:
    """Return every period of a key, or of its whole vault, the shortest first.

    Args:
        api_key_id: a key of this vault; None for the vault itself.

    Raises:
        StoreUnavailable: nothing was read.
    """
    async with database.transaction() as connection:
        await connection.fetch_row(_PLANNED)
        rows = await connection.fetch(_LIMITS, vault_id)
        limits = {
            row["period"]: Stroops(row["amount"])
            for row in rows
            if api_key_id == (None if row["api_key_id"] is None else str(row["api_key_id"]))
        }
        keys = [] if api_key_id is None else [api_key_id]
        spent = await spent_in(connection, vault_id, now, PERIODS, keys, vault=api_key_id is None)
    return tuple(Account(period, limits.get(period), spent[api_key_id, period]) for period in PERIODS)


async def spent_in(
    connection: Connection | Database,
    vault_id: VaultId,
    now: datetime,
    periods: Sequence[Period],
    keys: Sequence[ApiKeyId],
    *,
    vault: bool,
) -> Mapping[tuple[ApiKeyId | None, Period], Stroops]:
    """Return what was spent in each of some periods that end now, by each of some keys and, under None, by the vault.

    Args:
        vault: whether the whole vault is counted too.

    Raises:
        StoreUnavailable: nothing was read.
    """
    starts = [now - LENGTHS[period] for period in periods]
    rows: list[Row] = []
    if keys:
        rows += await connection.fetch(_SPENT_BY_KEYS, vault_id, periods, starts, keys)
    if vault:
        rows += await connection.fetch(_SPENT_BY_VAULT, vault_id, periods, starts)
    return {
        (None if row["api_key_id"] is None else ApiKeyId(str(row["api_key_id"])), row["period"]): Stroops(row["spent"])
        for row in rows
    }
