"""The rollup: calls and money by minute, by hour and by day, derived from closed usage events and from refunds.

A pass is one database transaction under the lock of `usage_rollup`, and one statement in it, so it sees one moment. The
minutes from `done_until` on are counted anew, as absolute values; what that changes moves the hours and days. A minute
becomes final once it is over for SETTLE and no transaction of ours is old enough to still bring one of its rows. Holds
that are open then go to `usage_open`, and each is added to its minute in the transaction that takes it out of there: a
hold of a day stops nothing, and nothing that closes late is lost or counted twice. A pass that is repeated, cut off, or
run by two processes at once therefore changes nothing.

The events of a pass are found by the BRIN index on their date alone. The time inside their ids would leave old months
out, but an id may be made long before its event: a charge over REST keeps its id from try to try.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import attrs

from callora.ledger.clock import Clock
from callora.store.breath import EVENTS, SUMS, breathing
from callora.store.bridge import Connection, Database

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""`done_until` of a rollup that has counted nothing."""
MINUTE: Final = timedelta(minutes=1)
SETTLE: Final = timedelta(seconds=60)
"""How long a minute must be over. A row is dated before its statement is sent, and the statement ends within the 15
seconds of a round or is cut; connecting and the difference of clocks come on top."""
SLOW_SECONDS: Final = 20.0
"""A transaction of ours that has lasted so long, such as a commit on a stalled disk, stops minutes from becoming final
until it has ended."""
SLOW_MAX: Final = timedelta(days=1)
"""Minutes so long over become final whatever is open: an audit or a migration that lasts must not stop a rebuild."""
SPAN: Final = timedelta(hours=1)
"""How much a pass counts at once when it is behind."""
RECENT: Final = timedelta(seconds=10)
"""How long a minute must be over for a light pass to leave it alone until it becomes final."""

_MEASURES: Final = (
    "calls",
    "charged_calls",
    "failed_calls",
    "timed_calls",
    "amount",
    "refunded",
    "latency_us",
    "request_bytes",
    "response_bytes",
    "credits",
)

SUCCEEDED: Final = "((u.state = 'captured' OR u.outcome = 'upstream_status') AND coalesce(u.status, 200) < 400)"
"""Whether an event of usage_events `u` is a call that went well: it had an answer, and that was no error."""

_EVENT: Final = f"""
    u.vault_id, date_trunc('minute', u.created_at, 'UTC') AS minute, u.api_key_id, u.endpoint_id, u.api_id,
    u.developer_id, 1 AS calls, (coalesce(u.amount, 0) > 0)::int AS charged_calls,
    (NOT {SUCCEEDED})::int AS failed_calls, (u.latency_us IS NOT NULL)::int AS timed_calls,
    coalesce(u.amount, 0) AS amount, 0::bigint AS refunded, coalesce(u.latency_us, 0)::bigint AS latency_us,
    coalesce(u.request_bytes, 0) AS request_bytes, coalesce(u.response_bytes, 0) AS response_bytes,
    coalesce(u.credits, 0) AS credits"""

_REFUND: Final = """
    r.vault_id, date_trunc('minute', r.created_at, 'UTC'), u.api_key_id, u.endpoint_id, u.api_id, u.developer_id,
    0, 0, 0, 0, 0, r.amount, 0, 0, 0, 0"""


def _sums(measures: tuple[str, ...]) -> str:
    return ", ".join(f"sum({each})::bigint AS {each}" for each in measures)


def _grouped(source: str) -> str:
    """Return the sums of a source's rows by minute, key and endpoint; an endpoint has one API and one developer."""
    return f"""SELECT vault_id, minute, api_key_id, endpoint_id, min(api_id) AS api_id,
           (array_agg(developer_id))[1] AS developer_id, {_sums(_MEASURES)}
    FROM {source} GROUP BY vault_id, minute, api_key_id, endpoint_id"""  # noqa: S608 - names of ours


def _added(table: str, key: tuple[str, ...], more: str, measures: tuple[str, ...], which: str = "") -> str:
    """Return the CTE that adds the changes to a table of sums.

    Args:
        key: its primary key.
        more: a further column that follows from the key, "" for none.
        which: WHERE, to leave changes out.
    """
    columns = ", ".join((*key, *((more,) if more else ()), *measures))
    chosen = ", ".join(
        (*(each if each not in _UNITS else f"date_trunc('{each}', minute, 'UTC') AS {each}" for each in key),)
        + ((f"min({more})",) if more else ())
    )
    moved = ", ".join(f"{each} = t.{each} + excluded.{each}" for each in measures)
    groups = ", ".join(str(number) for number in range(1, len(key) + 1))
    return f"""{table}_moved AS (
    INSERT INTO {table} AS t ({columns})
    SELECT {chosen}, {_sums(measures)} FROM changes {which} GROUP BY {groups}
    HAVING {breathing(SUMS, rest="$5")}
    ON CONFLICT ({", ".join(key)}) DO UPDATE SET {moved}
)"""  # noqa: S608 - names of ours


_UNITS: Final = ("hour", "day")
_DEVELOPER_MEASURES: Final = ("calls", "failed_calls", "amount", "refunded")

_FACTS: Final = f"""(
    SELECT {_EVENT} FROM usage_events u
        WHERE u.created_at >= $1 AND u.created_at < $2 AND {breathing(EVENTS, "u.state <> 'held'", rest="$5")}
    UNION ALL
    SELECT {_REFUND} FROM ledger_entries r
        JOIN usage_events u ON u.vault_id = r.vault_id AND u.event_id = r.event_id
        WHERE r.kind = 'refund' AND r.created_at >= $1 AND r.created_at < $2
) AS facts"""  # noqa: S608 - names of ours

_PASS: Final = f"""
WITH fresh AS (
    {_grouped(_FACTS)}
), ended AS (
    DELETE FROM usage_open o USING usage_events u
    WHERE u.vault_id = o.vault_id AND u.event_id = o.event_id AND u.state <> 'held'
    RETURNING {_EVENT}
), changes AS MATERIALIZED (
    SELECT f.vault_id, f.minute, f.api_key_id, f.endpoint_id, f.api_id, f.developer_id,
           {", ".join(f"f.{each} - coalesce(m.{each}, 0) AS {each}" for each in _MEASURES)}
    FROM fresh f LEFT JOIN usage_minutes m ON m.vault_id = f.vault_id AND m.minute = f.minute
        AND m.api_key_id = f.api_key_id AND m.endpoint_id = f.endpoint_id
    WHERE m.vault_id IS NULL OR ({", ".join(f"f.{each}" for each in _MEASURES)})
        IS DISTINCT FROM ({", ".join(f"m.{each}" for each in _MEASURES)})
    UNION ALL
    {_grouped("ended")}
), usage_minutes_moved AS (
    INSERT INTO usage_minutes AS t (vault_id, minute, api_key_id, endpoint_id, api_id, developer_id,
                                    {", ".join(_MEASURES)})
    SELECT * FROM (SELECT * FROM changes ORDER BY minute, vault_id OFFSET 0) AS c WHERE {breathing(SUMS, rest="$5")}
    ON CONFLICT (vault_id, minute, api_key_id, endpoint_id)
        DO UPDATE SET {", ".join(f"{each} = t.{each} + excluded.{each}" for each in _MEASURES)}
), {_added("key_hours", ("vault_id", "hour", "api_key_id"), "", ("amount",), "WHERE amount <> 0")},
{_added("usage_days", ("vault_id", "day", "api_key_id", "endpoint_id"), "api_id", _MEASURES)},
{_added("developer_days", ("developer_id", "day", "endpoint_id"), "api_id", _DEVELOPER_MEASURES)},
{_added("developer_callers", ("developer_id", "day", "api_id", "vault_id"), "", ("calls", "amount", "refunded"))},
{_added("vault_days", ("day", "vault_id"), "", _DEVELOPER_MEASURES)},
{_added("all_days", ("day",), "", _DEVELOPER_MEASURES)},
opened AS (
    INSERT INTO usage_open (vault_id, event_id)
    SELECT vault_id, event_id FROM usage_events
    WHERE created_at >= $1 AND created_at < $3 AND {breathing(EVENTS, "state = 'held'", rest="$5")}
), moved AS (
    UPDATE usage_rollup SET done_until = $3, as_of = $4
)
SELECT coalesce(sum(calls), 0)::bigint FROM changes
"""  # noqa: S608 - names of ours

BY_INDEX: Final = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
SET LOCAL enable_partition_pruning = off; SET LOCAL jit = off; SET LOCAL work_mem = '64MB';
SET LOCAL synchronous_commit = off
"""
"""Rows are found by index whatever the statistics say, as in a round. A lost commit of a derived table costs nothing:
what is durable is always the state after some pass."""
_HASHED: Final = "SET LOCAL enable_sort = off"
"""Sums are kept in a table while events are read, and breathe with that; the planner takes them for few, and would sort
all of them at one go."""

_LOCK: Final = "SELECT done_until, as_of FROM usage_rollup FOR UPDATE SKIP LOCKED"
_LOCK_WAITING: Final = "SELECT done_until, as_of FROM usage_rollup FOR UPDATE"

_FIRST: Final = "SELECT date_trunc('minute', min(created_at), 'UTC') FROM usage_events"

_SLOW: Final = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'callora%' AND pid <> pg_backend_pid()
        AND xact_start <= clock_timestamp() - $1::float8 * interval '1 second'
)
"""

_AS_OF: Final = "SELECT as_of FROM usage_rollup"

_CALLS: Final = "SELECT coalesce(sum(calls), 0)::bigint FROM all_days"

_EMPTY: Final = """
TRUNCATE usage_minutes, key_hours, usage_days, developer_days, developer_callers, vault_days, all_days, usage_open
"""
_BACK: Final = "UPDATE usage_rollup SET done_until = 'epoch', as_of = 'epoch'"


@attrs.frozen
class Pass:
    """What a pass came to."""

    done_until: datetime
    """Every minute before it is final, but for the holds in usage_open."""
    as_of: datetime
    """What had ended by then is counted; where passes are light, but for what ended long after its minute."""
    calls: int
    """Calls that were not counted before."""
    behind: bool
    """Whether there is more to count at once."""


async def advance(
    database: Database,
    now: datetime,
    *,
    span: timedelta = SPAN,
    light: bool = False,
    slow_seconds: float = SLOW_SECONDS,
    rest_seconds: float = 0.0,
    wait: bool = False,
) -> Pass | None:
    """Make one pass; return None where another process is making one.

    Args:
        span: how much is counted at once when the rollup is behind, >= one minute.
        light: count either what becomes final now or, where nothing does, the minutes that RECENT reaches into, rather
            than everything that is not final. What a light pass leaves out a later one counts, at the latest the one
            that makes its minute final.
        slow_seconds: the age of a transaction of ours that keeps minutes from becoming final.
        rest_seconds: how long it rests after each millisecond of work, unless the rollup is behind.
        wait: for the other process to end its pass, rather than return.

    Raises:
        StoreUnavailable, StoreConflict: nothing was changed.
        OutcomeUnknown: the pass was made whole, or not at all; the next makes up for it.

    Cancellation: the pass is not made.
    """
    async with database.transaction() as connection:
        await connection.execute(BY_INDEX)
        await connection.execute(_HASHED)
        row = await connection.fetch_row(_LOCK_WAITING if wait else _LOCK)
        if row is None:
            return None
        reached = (row["done_until"], row["as_of"])
        return await _advance(connection, *reached, now, span, slow_seconds, rest_seconds, light=light)


async def _advance(
    connection: Connection,
    done_until: datetime,
    counted_before: datetime,
    now: datetime,
    span: timedelta,
    slow_seconds: float,
    rest_seconds: float,
    *,
    light: bool,
) -> Pass:
    settled = (now - SETTLE).replace(second=0, microsecond=0)
    # Asked before the pass's statement looks: what began later dates its rows later.
    slow = await has_slow(connection, slow_seconds)
    since = done_until
    if done_until <= EPOCH:
        first: datetime | None = await connection.fetch_value(_FIRST)
        since = min(settled, first) if first is not None else settled
    caught_up = settled - since <= span
    if caught_up:
        # Another process's clock may be ahead: what it dated after `now` is counted as well.
        until, sealed, counted = now + timedelta(hours=1), max(since, settled), now
    else:
        until = sealed = counted = since + span
    behind = not caught_up
    if slow and now - sealed < SLOW_MAX:
        sealed, behind = done_until, False
    if light and caught_up and done_until > EPOCH:
        if sealed > done_until:
            until, counted = sealed, max(counted_before, sealed)
        else:
            since = max(since, (now - RECENT).replace(second=0, microsecond=0))
    rests = rest_seconds if caught_up else 0.0
    calls: int = await connection.fetch_value(_PASS, since, until, sealed, counted, rests)
    return Pass(sealed, counted, calls, behind)


async def has_slow(connection: Connection, seconds: float) -> bool:
    """Tell whether a transaction of ours has lasted so long that it may date rows before what seems final."""
    found: bool = await connection.fetch_value(_SLOW, seconds)
    return found


async def as_of(database: Database) -> datetime:
    """Return the moment up to which calls are counted; EPOCH before the first pass."""
    moment: datetime = await database.fetch_value(_AS_OF)
    return moment


async def rebuild(database: Database, clock: Clock, tell: Callable[[Pass], None], span: timedelta = SPAN) -> int:
    """Count everything anew, from nothing; return how many calls there are. Sums grow back from 0 meanwhile.

    Safe beside running services: a pass of theirs is one of these.

    Args:
        tell: called after each pass.
        span: how much is counted in one transaction.
    """
    async with database.transaction() as connection:
        await connection.fetch_row(_LOCK_WAITING)
        await connection.execute(_EMPTY)
        await connection.execute(_BACK)
    while True:
        made = await advance(database, clock.now(), span=span, wait=True)
        assert made is not None, "it waits for the lock"
        tell(made)
        if not made.behind:
            calls: int = await database.fetch_value(_CALLS)
            return calls
