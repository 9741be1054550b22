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
from callora.ledger.spending import LENGTHS, PERIODS, Period, Spending, SpendingLimits, allowance
from callora.ledger.vault import VaultState
from callora.store.bridge import Connection
from callora.store.bridge import Database as Database  # HTTP names what it passes on
from callora.store.by_key import GO_BY_KEY
from callora.store.reads.dated import EVENT_OF, dated_events, of_each

_COSTS: Final = "CASE u.state WHEN 'held' THEN u.held_amount ELSE coalesce(u.amount, 0) END"

# `first_minute` is the first that counts whole: for the day the one after that of its start, for longer periods that.
# From there come minutes until `since_hour`, hours until `since_day`, days until `until_day`, hours until `until_hour`,
# and minutes until `done`. Where there is no whole day, or no whole hour, its bounds are where the smaller parts meet.
# Periods that nothing wants are not looked at. Of single events those that are in every period are summed at once.
_PARTS: Final = f"""
edges AS MATERIALIZED (
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
    WHERE p.period IN (SELECT period FROM wanted)
), span AS MATERIALIZED (
    SELECT min(start) AS start, greatest(max(done), min(start)) AS since, max(start) AS last_start FROM edges
), singly AS MATERIALIZED (
    SELECT api_key_id, CASE WHEN created_at > (SELECT last_start FROM span) THEN 'infinity' ELSE created_at END AS at,
           sum(amount) AS amount
    FROM (SELECT u.api_key_id, u.created_at, {_COSTS} AS amount
          FROM {dated_events("api_key_id, created_at, state, held_amount, amount", "(SELECT since FROM span)")} AS u
          UNION ALL
          SELECT u.api_key_id, u.created_at, {_COSTS}
          FROM (SELECT event_id FROM usage_open WHERE vault_id = v.vault_id OFFSET 0) AS o,
               LATERAL {EVENT_OF.format("o")} AS u
          UNION ALL
          SELECT u.api_key_id, u.created_at, -r.amount
          FROM (SELECT event_id, amount FROM ledger_entries
                WHERE vault_id = v.vault_id AND kind = 'refund' AND created_at > (SELECT start FROM span)
                OFFSET 0) AS r,
               LATERAL {EVENT_OF.format("r")} AS u) AS parts
    GROUP BY 1, 2
), first_minutes AS MATERIALIZED (
    SELECT e.period, u.api_key_id, u.amount
    FROM edges e,
         LATERAL {dated_events("event_id, api_key_id, created_at, state, amount", "e.start", "e.first_minute")} AS u
    WHERE e.period = 'day' AND u.created_at > e.start AND u.created_at < e.done AND u.state = 'captured'
          AND NOT EXISTS (SELECT FROM usage_open o WHERE o.vault_id = v.vault_id AND o.event_id = u.event_id)
)"""  # noqa: S608 - names of ours

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
        for events, which in (("singly", "u.at > e.start"), ("first_minutes", "u.period = e.period"))
    ]
    return f"({' + '.join(parts)})::bigint"


_OF_KEY: Final = "s.vault_id = v.vault_id AND s.api_key_id = w.api_key_id"


def _counted(wanted: str, limit: str) -> str:
    """Return the statement that counts what was spent.

    Args:
        wanted: the rows (api_key_id, NULL for the whole vault; period) that are asked for.
        limit: the limit of a row `w` of these.
    """
    return of_each(
        "unnest($1::uuid[]) AS v (vault_id)",
        f"""
WITH wanted AS MATERIALIZED ({wanted}), {_PARTS}
SELECT w.api_key_id, w.period, {limit} AS amount,
       CASE WHEN w.api_key_id IS NULL THEN {_spent("vault_days", "s.vault_id = v.vault_id", "")}
            ELSE {_spent("usage_days", _OF_KEY, "AND u.api_key_id = w.api_key_id")} END AS spent
FROM wanted w JOIN edges e ON e.period = w.period
""",  # noqa: S608 - our own text
    )


LIMITS: Final = _counted(
    "SELECT api_key_id, period, amount FROM spending_limits WHERE vault_id = v.vault_id",
    "w.amount",
)

ACCOUNT: Final = _counted(
    "SELECT $4::uuid AS api_key_id, p AS period FROM unnest($2::text[]) AS p",
    """(SELECT l.amount FROM spending_limits l
        WHERE l.vault_id = v.vault_id AND l.api_key_id IS NOT DISTINCT FROM w.api_key_id AND l.period = w.period)""",
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


async def spending_limits(
    connection: Connection, vaults: Sequence[VaultState], now: datetime
) -> dict[VaultId, SpendingLimits]:
    """Return the limits of vaults and their keys with what was spent, of those vaults that have any.

    Args:
        connection: inside a transaction that goes by key (`GO_BY_KEY`).
        vaults: as they were read before.

    Raises:
        StoreUnavailable: nothing was read.
    """
    found: dict[VaultId, dict[ApiKeyId | None, list[Spending]]] = {}
    for row in await connection.fetch(LIMITS, [vault.vault_id for vault in vaults], PERIODS, _starts(now)):
        whose = None if row["api_key_id"] is None else ApiKeyId(str(row["api_key_id"]))
        of_vault = found.setdefault(VaultId(str(row["vault_id"])), {})
        of_vault.setdefault(whose, []).append(Spending(row["period"], Stroops(row["amount"]), Stroops(row["spent"])))
    return {
        vault.vault_id: _limits(found[vault.vault_id], now, vault.placed) for vault in vaults if vault.vault_id in found
    }


def _limits(spent: Mapping[ApiKeyId | None, Sequence[Spending]], now: datetime, placed: int) -> SpendingLimits:
    of_keys = {key: allowance(each) for key, each in spent.items() if key is not None}
    return SpendingLimits(allowance(spent.get(None, ())), of_keys, now, placed)


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
        return await counted(connection, vault_id, api_key_id, now)


async def counted(
    connection: Connection, vault_id: VaultId, api_key_id: ApiKeyId | None, now: datetime
) -> tuple[Account, ...]:
    """Do the same inside a transaction, which goes by key from then on (`GO_BY_KEY`)."""
    await connection.execute(GO_BY_KEY)
    rows = await connection.fetch(ACCOUNT, [vault_id], PERIODS, _starts(now), api_key_id)
    found = {row["period"]: row for row in rows}
    return tuple(
        Account(
            period,
            None if found[period]["amount"] is None else Stroops(found[period]["amount"]),
            Stroops(found[period]["spent"]),
        )
        for period in PERIODS
    )


def _starts(now: datetime) -> list[datetime]:
    return [now - LENGTHS[period] for period in PERIODS]
