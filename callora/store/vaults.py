"""Vaults and their usage events: load, commit a round, commit one locked command.

The round is one statement, one round trip and one fsync for every vault in it. Invariants it keeps whatever its caller
believed: a hold is placed only where `available` covers the vault's whole share and its standing is active; a close
counts only if it ended an open hold in this very statement, and an expiry only if it is due; the balance moves by what
the statement's own rows say.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, cast

import attrs
import trio

from callora.ledger.clock import Clock
from callora.ledger.commands import (
    CloseHold,
    Deposit,
    ExtendHold,
    GiveBack,
    Grant,
    GrantQuota,
    IdempotencyClaim,
    LockedCommand,
    PlaceHold,
    RateDelta,
    Refund,
    ReviewDebt,
    SetPlan,
    SetStanding,
    StoredAnswer,
    Withdraw,
)
from callora.ledger.debt import Purse, credited, debited, reviewed, stood
from callora.ledger.faults import CalloraFault, StoreUnavailable
from callora.ledger.ids import ApiKeyId, EventId, UserId, VaultId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.outcomes import (
    BalanceMoved,
    DebtReviewed,
    DeltasRated,
    EventFound,
    HoldExtended,
    HoldNotOpen,
    InsufficientFunds,
    PlanMissing,
    PlanSet,
    PolicyRefused,
    QuotaGranted,
    ReferenceTaken,
    RefundRefused,
    StandingRefused,
    StandingSet,
    VaultMissing,
)
from callora.ledger.quota import Quota
from callora.ledger.rounds import CLEAN, RoundResult, Share
from callora.ledger.spending import SpendingLimits
from callora.ledger.vault import Standing, VaultState, carry
from callora.store.bridge import Connection, Database, Line, Row
from callora.store.counters import rate
from callora.store.outbox import Event, add_events, iso
from callora.store.purses import COLUMNS, purse_of, setting, values_of
from callora.store.quotas import grant, renew
from callora.store.reads.dated import BY_VAULT
from callora.store.reads.quotas import terms
from callora.store.reads.spending import spending_limits

LIMITS_FRESH: Final = timedelta(seconds=1)
"""How long what was spent is believed before it is counted anew for a refusal: counting is the dearest read there is,
and whoever is refused may ask a thousand times a second."""

ROUND_SECONDS_MAX: Final = 15
"""The server ends a round that takes longer, so that one whose writer gave up on it is not stored at any later time."""

LINE_SETTINGS: Final[Mapping[str, str]] = {
    # The plan is made once and kept: one made for the arrays of a first round on empty tables would not stay good.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    # A bitmap goes by the index too, but looks at every old version of a vault's row that the index still names, and
    # never marks one as dead, as an index scan does: thousands where vaults are few and busy.
    "enable_bitmapscan": "off",
    # PostgreSQL 18 (seen with 18.4) crashes where a row lock had to be waited for in a statement that prunes partitions
    # while it runs. Every month is looked at instead.
    "enable_partition_pruning": "off",
    "jit": "off",
    "statement_timeout": f"{ROUND_SECONDS_MAX}s",
}

# How rows are looked up. `column = ANY (ARRAY[value])` PostgreSQL can do by an index and in no other way. With a plain
# `=` a plan made while a table is as good as empty, on the first day or in a new partition, reads the whole table for
# every round: that is cheaper then, and the plan is kept until statistics are next gathered. OFFSET 0 keeps a subquery
# whole, so that both columns of a key come from one relation and are looked up together.

_LOCKED: Final = """
WITH wanted AS (
    SELECT * FROM unnest(@vaults::uuid[], @needs::bigint[], @decided::bigint[]{guards}) WITH ORDINALITY
        AS w (vault_id, need, decided{guard_names}, place)
), locked AS MATERIALIZED (
    SELECT w.place, v.vault_id, v.available, v.held, v.version, v.standing{guarding}, w.decided,
           v.available >= w.need
               AND (w.need < 0
                    OR v.standing = 'active' AND v.quota_until > :now::timestamptz AND {admits}) AS won
    FROM wanted w JOIN vaults v ON v.vault_id = ANY (ARRAY[w.vault_id])
    ORDER BY w.vault_id
    FOR UPDATE OF v
), winners AS MATERIALIZED (
    SELECT CASE count(*) WHEN (SELECT count(*) FROM wanted) THEN array_agg(won ORDER BY place) END AS won,
           array_agg(vault_id ORDER BY place) AS vaults
    FROM locked
)"""

# A round of one vault, as most are where calls are few, needs neither sets nor an order. What is not opened and closed
# for it is an eighth of what PostgreSQL spends on such a round.
_LOCKED_ALONE: Final = """
WITH locked AS MATERIALIZED (
    SELECT v.vault_id, v.available, v.held, v.version, v.standing{guarding}, :decided_version::bigint AS decided,
           v.available >= :need::bigint
               AND (:need::bigint < 0
                    OR v.standing = 'active' AND v.quota_until > :now::timestamptz AND {admits}) AS won
    FROM vaults v WHERE v.vault_id = ANY (ARRAY[:vault::uuid])
    FOR UPDATE OF v
), winners AS MATERIALIZED (
    SELECT ARRAY[won] AS won, ARRAY[vault_id] AS vaults FROM locked
)"""

_UNGUARDED: Final = -1
_WITHIN: Final = -2
"""What a guard is where it is no version: none, or what the rules and the ceilings say."""
_GUARDS: Final = ("guard", "rules", "ceiling", "credits_ceiling", "credits_need", "credits_most")
"""What is sent of each share in a round with vaults that are guarded."""
_GUARDING: Final = ("limited", "owed", "rounds", "placed", "placed_credits", "credits")
"""What else is read of a vault whose rules count."""


def _admits(of: str) -> str:
    """Return the condition on which holds of a vault that may be guarded are stored.

    Args:
        of: how what is known of the vault's share is named, with its name for `{}`.
    """
    guard, rules, ceiling, credits_ceiling, credits_need, credits_most = map(of.format, _GUARDS)
    return f"""CASE {guard} WHEN {_UNGUARDED} THEN NOT v.limited
                   WHEN {_WITHIN} THEN v.version - v.rounds = {rules}
                       AND v.placed <= {ceiling} AND v.placed_credits <= {credits_ceiling}
                       AND v.credits BETWEEN {credits_need} AND {credits_most}
                   ELSE v.version = {guard} END"""


_CLOSED: Final = """, closed AS (
    UPDATE usage_events u
    SET state = c.state::usage_state, amount = CASE c.state WHEN 'captured' THEN c.amount END, status = c.status,
        latency_us = c.latency_us, request_bytes = c.request_bytes, response_bytes = c.response_bytes,
        outcome = c.outcome, closed_at = :now::timestamptz{rated_set}
    FROM (SELECT w.vaults[i.place] AS vault_id, i.*
          FROM unnest(@close_places::int[], @close_events::uuid[], @close_states::text[], @close_amounts::bigint[],
                      @close_statuses::smallint[], @close_latencies::int[], @close_requests::bigint[],
                      @close_responses::bigint[], @close_outcomes::text[]{rated_arrays})
               AS i (place, event_id, state, amount, status, latency_us, request_bytes, response_bytes,
                     outcome{rated_names}), winners w
          WHERE w.won[i.place]
          OFFSET 0) AS c
    WHERE u.vault_id = ANY (ARRAY[c.vault_id]) AND u.event_id = ANY (ARRAY[c.event_id]) AND u.state = 'held'
          AND (c.state <> 'expired' OR u.expires_at <= :now::timestamptz)
    RETURNING u.vault_id, u.event_id, u.held_amount, coalesce(u.amount, 0) AS amount{rated_returned}
)"""

_RATED_CLOSED: Final = {
    "rated_set": ",\n        credits = CASE WHEN u.held_credits > 0 THEN c.credits END, quantity = c.quantity",
    "rated_arrays": ",\n                      @close_credits::bigint[], @close_quantities::bigint[]",
    "rated_names": ", credits, quantity",
    "rated_returned": ", u.held_credits - coalesce(u.credits, 0) AS credits_back",
}

_CLAIMED: Final = """, claimed AS (
    INSERT INTO idempotency_keys AS k (vault_id, key, fingerprint, event_id, replaces, state, created_at, expires_at)
    SELECT DISTINCT ON (i.place, i.key) w.vaults[i.place], i.key, i.fingerprint, i.event_id, i.replaces,
           'started', :now::timestamptz, :now::timestamptz + i.retention * interval '1 second'
    FROM unnest(:claim_places::int[], :claim_keys::text[], :claim_fingerprints::bytea[], :claim_events::uuid[],
                :claim_replaces::uuid[], :claim_retentions::int[])
         AS i (place, key, fingerprint, event_id, replaces, retention), winners w
    WHERE w.won[i.place]
    ORDER BY i.place, i.key, i.event_id
    ON CONFLICT (vault_id, key) DO UPDATE
        SET fingerprint = excluded.fingerprint, event_id = excluded.event_id, replaces = excluded.replaces,
            state = 'started', status = NULL, head = NULL, body = NULL, charge = NULL,
            created_at = excluded.created_at, expires_at = excluded.expires_at
        WHERE k.expires_at <= excluded.created_at OR (k.state = 'started' AND k.event_id = excluded.replaces)
    RETURNING event_id
)"""

_ANSWERED: Final = """, answered AS (
    UPDATE idempotency_keys k
    SET state = CASE WHEN a.body IS NULL THEN 'not_replayable' ELSE 'completed' END,
        status = a.status, head = a.head, body = a.body, charge = a.charge
    FROM (SELECT w.vaults[i.place] AS vault_id, i.*
          FROM unnest(:answer_places::int[], :answer_keys::text[], :answer_events::uuid[], :answer_statuses::smallint[],
                      :answer_heads::bytea[], :answer_bodies::bytea[], :answer_charges::bigint[])
               AS i (place, key, event_id, status, head, body, charge), winners w
          WHERE i.event_id IN (SELECT event_id FROM closed)
          OFFSET 0) AS a
    WHERE k.vault_id = ANY (ARRAY[a.vault_id]) AND k.key = ANY (ARRAY[a.key]) AND k.event_id = a.event_id
          AND k.state = 'started'
)"""

_PLACED: Final = """, placed AS (
    INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,
                              price_version, created_at, expires_at{credits_column})
    SELECT w.vaults[h.place], h.event_id, h.api_key_id, h.developer_id, h.api_id, h.endpoint_id,
           h.held_amount, h.price_version, :now::timestamptz,
           :now::timestamptz + h.ttl * interval '1 second'{credits_value}
    FROM unnest(@hold_places::int[], @hold_events::uuid[], @hold_keys::uuid[], @hold_developers::uuid[],
                @hold_apis::bigint[], @hold_endpoints::bigint[], @hold_amounts::bigint[], @hold_versions::int[],
                @hold_ttls::int[]{credits_array})
         AS h (place, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, price_version,
               ttl{credits_name}),
         winners w
    WHERE w.won[h.place]{unless_taken}
    RETURNING vault_id, event_id, held_amount{credits_column}
)"""

_RATED_PLACED: Final = {
    "credits_column": ", held_credits",
    "credits_value": ", h.credits",
    "credits_array": ", @hold_credits::bigint[]",
    "credits_name": ", credits",
}

_UNLESS_TAKEN: Final = """
          AND (h.event_id NOT IN (SELECT e FROM unnest(:claim_events::uuid[]) AS e)
               OR h.event_id IN (SELECT event_id FROM claimed))"""

_CHANGED_BY_CLOSED: Final = (
    "SELECT vault_id, held_amount - amount AS available, -held_amount AS held, 0 AS placed{credits} FROM closed"
)

_CHANGED_BY_PLACED: Final = (
    "SELECT vault_id, -held_amount AS available, held_amount AS held, held_amount AS placed{credits} FROM placed"
)

_MOVED: Final = """, moved AS (
    UPDATE vaults v
    SET available = v.available + c.available, held = v.held + c.held, version = v.version + 1{guarded_set}{credits_set}
    FROM (SELECT vault_id, sum(available)::bigint AS available, sum(held)::bigint AS held{guarded_sum}{credits_sum}
          FROM ({changes}) AS rows GROUP BY vault_id) AS c
    WHERE v.vault_id = ANY (ARRAY[c.vault_id])
)
SELECT won, vault_id, available, held, version, standing::text AS standing, NULL::uuid AS missed{guarding}
FROM locked
WHERE NOT won OR version <> decided"""

_CREDITS_SET: Final = ", credits = v.credits + c.credits, placed_credits = v.placed_credits + c.placed_credits"
_CREDITS_SUM: Final = ", sum(credits)::bigint AS credits, sum(placed_credits)::bigint AS placed_credits"

_MISSED: Final = """
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, e{nothing} FROM unnest({events}::uuid[]) AS e
WHERE e NOT IN (SELECT event_id FROM {done})"""

_PARAMETER: Final = re.compile(r"(?<!:)([:@])([a-z_]+)")
"""`:name` is a parameter, `@name` one that is given as an array literal (`_words`, `_numbers`)."""


@attrs.frozen
class RoundStatement:
    """The round's statement for what a round contains: parts that are not there cost nothing."""

    sql: str
    parameters: tuple[str, ...]
    """The columns that it takes, in the order of their numbers."""

    @classmethod
    def of(cls, *, closes: bool, holds: bool, keyed: bool, alone: bool, rated: bool, guarded: bool) -> "RoundStatement":
        """Return the statement; a round has closes, holds or both, perhaps idempotency keys, and one vault or more.

        Args:
            rated: whether anything in it has credits or a quantity.
            guarded: whether any of its vaults is.
        """
        guards = _GUARDS if guarded else ()
        guarding = _GUARDING if guarded else ()
        text = (_LOCKED_ALONE if alone else _LOCKED).format(
            guards="".join(f", @{name}::bigint[]" for name in guards),
            guard_names="".join(f", {name}" for name in guards),
            guarding="".join(f", v.{name}" for name in guarding),
            admits=_admits(":{}::bigint" if alone else "w.{}") if guarded else "NOT v.limited",
        )
        changes: list[str] = []
        if closes:
            text += _CLOSED.format_map(_RATED_CLOSED if rated else dict.fromkeys(_RATED_CLOSED, ""))
            credits_back = ", credits_back AS credits, 0 AS placed_credits" if rated else ""
            changes.append(_CHANGED_BY_CLOSED.format(credits=credits_back))
        if keyed and holds:
            text += _CLAIMED
        if keyed and closes:
            text += _ANSWERED
        if holds:
            rating = _RATED_PLACED if rated else dict.fromkeys(_RATED_PLACED, "")
            text += _PLACED.format(unless_taken=_UNLESS_TAKEN if keyed else "", **rating)
            credits_held = ", -held_credits AS credits, held_credits AS placed_credits" if rated else ""
            changes.append(_CHANGED_BY_PLACED.format(credits=credits_held))
        text += _MOVED.format(
            changes=" UNION ALL ".join(changes),
            guarded_set=", rounds = v.rounds + 1, placed = v.placed + c.placed" if guarded else "",
            guarded_sum=", sum(placed)::bigint AS placed" if guarded else "",
            credits_set=_CREDITS_SET if rated else "",
            credits_sum=_CREDITS_SUM if rated else "",
            guarding="".join(f", {name}" for name in guarding),
        )
        nothing = ", NULL" * len(guarding)
        if closes:
            text += _MISSED.format(events="@close_events", done="closed", nothing=nothing)
        if keyed and holds:
            text += _MISSED.format(events=":claim_events", done="claimed", nothing=nothing)
        parameters = tuple(dict.fromkeys(name for _, name in _PARAMETER.findall(text)))
        numbers = {name: f"${number}" for number, name in enumerate(parameters, 1)}

        def numbered(match: re.Match[str]) -> str:
            return numbers[match[2]] + ("::text" if match[1] == "@" else "")

        return cls(_PARAMETER.sub(numbered, text), parameters)


STATEMENTS: Final[Mapping[tuple[bool, bool, bool, bool, bool, bool], RoundStatement]] = {
    (closes, holds, keyed, alone, rated, guarded): RoundStatement.of(
        closes=closes, holds=holds, keyed=keyed, alone=alone, rated=rated, guarded=guarded
    )
    for closes, holds, keyed, alone, rated, guarded in itertools.product((False, True), repeat=6)
    if closes or holds
}
"""By what a round contains: closes, holds, idempotency keys; whether it is of one vault; credits or quantities; vaults
that are guarded."""

_LOAD: Final = f"""
SELECT vault_id, available, held, version, standing::text AS standing, {", ".join(_GUARDING)} FROM vaults
WHERE vault_id = ANY ($1::uuid[])
"""  # noqa: S608 - names of ours

_LOCK: Final = f"""
SELECT vault_id, user_id, network, held, version, entry_seq, {COLUMNS},
       {", ".join(name for name in _GUARDING if name != "owed")} FROM vaults
WHERE vault_id = $1 FOR UPDATE
"""  # noqa: S608 - names of ours

_EVENT: Final = """
SELECT event_id, api_key_id, state::text AS state, held_amount, held_credits, coalesce(amount, 0) AS amount
FROM usage_events WHERE vault_id = $1 AND event_id = $2
"""

_ENTRY: Final = """
SELECT seq FROM ledger_entries WHERE vault_id = $1 AND kind = $2 AND ref = $3
"""

_BOOK: Final = f"""
WITH entry AS (
    INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, event_id, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
)
UPDATE vaults SET entry_seq = $2, {setting(9)} WHERE vault_id = $1
"""  # noqa: S608 - names of ours

_REFUNDED: Final = """
SELECT coalesce(sum(amount), 0)::bigint FROM ledger_entries WHERE vault_id = $1 AND event_id = $2 AND kind = 'refund'
"""

_EXTEND: Final = """
WITH extended AS (
    UPDATE usage_events
    SET held_amount = held_amount + $3, held_credits = held_credits + $5,
        expires_at = least(expires_at + $4 * interval '1 second', created_at + interval '1 day')
    WHERE vault_id = $1 AND event_id = $2 AND state = 'held'
    RETURNING held_amount, held_credits
), moved AS (
    UPDATE vaults
    SET available = available - $3, held = held + $3, credits = credits - $5, version = version + 1,
        rounds = rounds + 1, placed = placed + $3, placed_credits = placed_credits + $5
    WHERE vault_id = $1 AND EXISTS (SELECT FROM extended)
)
SELECT held_amount, held_credits FROM extended
"""

_EXTENSION: Final = "SELECT seconds, amount FROM hold_extensions WHERE vault_id = $1 AND event_id = $2 AND ref = $3"

_NOTE_EXTENSION: Final = """
INSERT INTO hold_extensions (vault_id, event_id, ref, seconds, amount, extended_at) VALUES ($1, $2, $3, $4, $5, $6)
"""

_SET_PURSE: Final = f"UPDATE vaults SET {setting(2)} WHERE vault_id = $1"  # noqa: S608 - names of ours

_ACTIVE_PLAN: Final = "SELECT plan_id FROM plans WHERE plan_id = $1 AND active"

_SET_PLAN: Final = """
UPDATE vaults SET plan_id = $2, version = version + 1 WHERE vault_id = $1 AND plan_id <> $2
"""

_NO_HOLDS: Final = -1
"""What a share without holds needs: nothing, not even an active vault."""


LockedOutcome = (
    BalanceMoved
    | HoldExtended
    | StandingSet
    | DebtReviewed
    | DeltasRated
    | QuotaGranted
    | PlanSet
    | PlanMissing
    | InsufficientFunds
    | StandingRefused
    | PolicyRefused
    | HoldNotOpen
    | ReferenceTaken
    | RefundRefused
    | VaultMissing
)


def _state(row: Row) -> VaultState:
    return VaultState(
        VaultId(str(row["vault_id"])),
        Stroops(row["available"]),
        Stroops(row["held"]),
        row["version"],
        cast(Standing, row["standing"]),
    )


def _whole_state(row: Row) -> VaultState:
    state = _state(row)
    state.owed, state.limited, state.credits = Stroops(row["owed"]), row["limited"], row["credits"]
    state.rules = row["version"] - row["rounds"]
    state.placed, state.placed_credits = row["placed"], row["placed_credits"]
    return state


@attrs.define(slots=True, eq=False)
class _Loading:
    """Vaults that are asked for together."""

    vault_ids: set[VaultId] = attrs.field(factory=set)
    done: trio.Event = attrs.field(factory=trio.Event)
    states: dict[VaultId, VaultState] = attrs.field(factory=dict)
    fault: CalloraFault | None = None


class VaultStore:
    """The ledger's two doors to PostgreSQL: rounds over one dedicated line, everything else over the pool."""

    def __init__(
        self, database: Database, line: Line, clock: Clock, new_id: Callable[[], str], commit_seconds_max: float
    ) -> None:
        """Args:
        new_id: makes the ids of what owners are told.
        """
        self._database = database
        self._line = line
        self._clock = clock
        self._new_id = new_id
        self._commit_seconds_max = commit_seconds_max
        self._loading: _Loading | None = None
        self._load_turn = trio.Lock()

    async def load_vaults(self, vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        """Return the stored state of each vault that exists, as it is at some moment after this was called.

        One query is under way; who asks meanwhile is gathered for the next, because a query for a hundred vaults costs
        little more than for one.

        Raises:
            StoreUnavailable: nothing was read.
        """
        loading = self._loading
        if loading is None:
            loading = self._loading = _Loading()
            loading.vault_ids.update(vault_ids)
            await self._load(loading)
        else:
            loading.vault_ids.update(vault_ids)
            await loading.done.wait()
        if loading.fault is not None:
            raise loading.fault
        found = (loading.states.get(vault_id) for vault_id in vault_ids)
        return {state.vault_id: attrs.evolve(state) for state in found if state is not None}

    async def _load(self, loading: _Loading) -> None:
        try:
            async with self._load_turn:
                self._loading = None
                for row in await self._database.fetch(_LOAD, list(loading.vault_ids)):
                    state = _whole_state(row)
                    loading.states[state.vault_id] = state
        except CalloraFault as fault:
            loading.fault = fault
        except BaseException:
            loading.fault = StoreUnavailable("whoever was reading for this vault was cancelled")
            raise
        finally:
            if self._loading is loading:
                self._loading = None
            loading.done.set()

    async def load_guarded(
        self, state: VaultState, known: VaultState | None, *, credited: bool, refusing: bool
    ) -> VaultState:
        """Return a vault with its rules and what they counted, or with those already known where they serve.

        Args:
            state: the vault, read a moment ago; what is read here may be newer, and then its round is lost.
            known: the vault as its actor knew it last, of whose decisions none is on its way. Where `refusing`, all
                of them are stored.
            credited: whether its quota is to be known whatever it has: then the month's grant is made where it is due.
            refusing: whether something will be refused by what is returned, and not only allowed.

        Raises:
            StoreUnavailable: nothing was read. OutcomeUnknown: a grant may have been renewed, which does no harm.
        """
        now = self._clock.now()
        if known is not None and _still_rules(known, state, now, credited=credited):
            if not refusing:
                carry(known, state)
                return state
            if known.version == state.version and _is_fresh(known, now):
                state.policies, state.quota = known.policies, known.quota
                return state
        async with self._database.transaction() as connection:
            counted, _ = await self._guard(connection, state, credited=credited, locked=False)
        return counted

    async def _guard(
        self, connection: Connection, state: VaultState, *, credited: bool, locked: bool
    ) -> tuple[VaultState, SpendingLimits | None]:
        """Return a vault with its rules; its quota is renewed, with the vault locked, where that is due."""
        now = self._clock.now()
        await connection.execute(BY_VAULT)
        found = await terms(connection, state.vault_id, now, state.placed_credits, wanted=credited)
        if found is not None and found.due:
            if not locked:
                await connection.fetch_row(_LOCK, state.vault_id)
            await renew(connection, state.vault_id, now)
            row = cast(Row, await connection.fetch_row(_LOCK, state.vault_id))
            state = _whole_state(row)
            found = await terms(connection, state.vault_id, now, state.placed_credits, wanted=True)
        limits = await spending_limits(connection, state.vault_id, now, state.placed)
        state.policies = () if limits is None else (limits,)
        if found is not None:
            state.quota, state.credits = found.quota, found.credits
        return state, limits

    async def find_event(self, vault_id: VaultId, event_id: EventId) -> EventFound | None:
        """Return a usage event as it stands, or None: how an unknown outcome is looked up.

        Raises:
            StoreUnavailable: nothing was read.
        """
        row = await self._database.fetch_row(_EVENT, vault_id, event_id)
        if row is None:
            return None
        return EventFound(event_id, row["state"], Stroops(row["held_amount"]), Stroops(row["amount"]))

    async def commit_round(self, shares: Sequence[Share]) -> RoundResult:
        """Store a round and return what did not go as decided.

        Args:
            shares: at most one for each vault.

        Raises:
            StoreUnavailable: nothing was written.
            OutcomeUnknown: the statement was sent and no answer came.
            StoreRefused, StoreConflict: the database refused the whole round; nothing was written.

        Cancellation: a round once sent is waited for, at most `commit_seconds_max`.
        """
        statement, arguments = self._statement(shares)
        rows = await self._line.run(statement, *arguments, deadline_seconds=self._commit_seconds_max)
        return _result(rows, shares) if rows else CLEAN

    def _statement(self, shares: Sequence[Share]) -> tuple[str, list[object]]:
        places = range(1, len(shares) + 1)  # PostgreSQL counts from one
        holds = [(place, hold) for place, share in zip(places, shares, strict=True) for hold in share.holds]
        closes = [(place, close) for place, share in zip(places, shares, strict=True) for close in share.closes]
        claims = [(place, hold, hold.claim) for place, hold in holds if hold.claim is not None]
        answers = [(place, close, close.answer) for place, close in closes if close.answer is not None]
        alone = len(shares) == 1
        rated = any(hold.credits for _, hold in holds) or any(
            close.held_credits or close.delivery.quantity is not None for _, close in closes
        )
        guarded = any(share.guarded for share in shares)
        statement = STATEMENTS[bool(closes), bool(holds), bool(claims or answers), alone, rated, guarded]
        columns = _alone_columns(shares[0]) if alone else _share_columns(shares)
        if guarded:
            columns |= _guard_columns(shares[0]) if alone else _guards_columns(shares)
        columns["now"] = self._clock.now()
        if closes:
            columns |= _close_columns(closes)
        if holds:
            columns |= _hold_columns(holds)
        if rated:
            columns |= _rated_columns(holds, closes)
        if claims or answers:
            columns |= _key_columns(claims, answers)
        return statement.sql, [columns[name] for name in statement.parameters]

    async def commit_locked_round(
        self, vault_id: VaultId, decide: Callable[[VaultState], Share], *, credited: bool
    ) -> tuple[Share, RoundResult]:
        """Store one vault's share with its row locked before the decision, so that it cannot lose.

        Args:
            decide: pure; given the locked state, returns the share to store.
            credited: whether the state's quota is to be known whatever it has.

        Raises:
            StoreUnavailable: nothing was written. OutcomeUnknown: the commit was sent and no answer came.
        """
        async with self._database.transaction() as connection:
            row = cast(Row, await connection.fetch_row(_LOCK, vault_id))
            state = _whole_state(row)
            if row["limited"] or credited:
                state, _ = await self._guard(connection, state, credited=credited, locked=True)
            share = decide(state)
            if not (share.holds or share.closes):
                return share, CLEAN
            statement, arguments = self._statement([share])
            return share, _result(await connection.fetch(statement, *arguments), [share])

    async def commit_locked(self, vault_id: VaultId, command: LockedCommand) -> LockedOutcome:
        """Carry out one rare command with the vault's row locked: lock, read, decide, write, commit.

        Raises:
            StoreUnavailable: nothing was written.
            OutcomeUnknown: the commit was sent and no answer came; repeat the command under the same reference.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetch_row(_LOCK, vault_id)
            if row is None:
                return VaultMissing()
            match command:
                case Deposit(amount, ref):
                    return await self._deposit(connection, row, amount, ref)
                case Withdraw(amount, ref):
                    return await self._book(connection, row, "withdrawal", Stroops(-amount), ref, None)
                case Grant(amount, ref):
                    return await self._book(connection, row, "grant", amount, ref, None)
                case GiveBack(amount, ref):
                    return await self._book(connection, row, "adjustment", amount, ref, None)
                case Refund(event_id, amount, ref):
                    return await self._refund(connection, row, event_id, amount, ref)
                case ExtendHold():
                    return await self._extend(connection, row, command)
                case GrantQuota():
                    return await grant(connection, vault_id, command, self._clock.now())
                case SetPlan(plan_id, price, ref):
                    return await self._set_plan(connection, row, plan_id, price, ref)
                case SetStanding(standing):
                    await self._stand(connection, row, stood(purse_of(row), standing))
                    return StandingSet()
                case ReviewDebt(owing_since):
                    purse = reviewed(purse_of(row), owing_since)
                    await self._stand(connection, row, purse)
                    return DebtReviewed(purse.owed, purse.standing)
                case RateDelta():
                    return await rate(connection, vault_id, purse_of(row), command, self._clock.now())

    async def _stand(self, connection: Connection, row: Row, purse: Purse) -> None:
        if purse != purse_of(row):
            await connection.execute(_SET_PURSE, str(row["vault_id"]), *values_of(purse))

    async def _book(
        self, connection: Connection, row: Row, kind: str, amount: Stroops, ref: str, event_id: EventId | None
    ) -> BalanceMoved | InsufficientFunds:
        vault_id = str(row["vault_id"])
        booked = await connection.fetch_value(_ENTRY, vault_id, kind, ref)
        if booked is not None:
            return BalanceMoved(booked, Stroops(row["available"]), repeated=True)
        purse = purse_of(row)
        after = credited(purse, amount) if amount >= 0 else debited(purse, Stroops(-amount))
        if after is None:
            return InsufficientFunds(Stroops(-amount), credited(purse, Stroops(0)).available)
        seq, balance = row["entry_seq"] + 1, after.available + row["held"] - after.owed
        await connection.execute(
            _BOOK, vault_id, seq, kind, amount, balance, ref, event_id, self._clock.now(), *values_of(after)
        )
        return BalanceMoved(seq, after.available, repeated=False)

    async def _deposit(
        self, connection: Connection, row: Row, amount: Stroops, ref: str
    ) -> BalanceMoved | InsufficientFunds:
        booked = await self._book(connection, row, "deposit", amount, ref, None)
        if isinstance(booked, BalanceMoved) and not booked.repeated:
            vault_id, now = str(row["vault_id"]), self._clock.now()
            told = {
                "vaultId": vault_id,
                "network": row["network"],
                "amountUsdc": format_usdc(amount),
                "balanceUsdc": format_usdc(Stroops(booked.available + row["held"])),
                "reference": ref,
                "creditedAt": iso(now),
            }
            event = Event(
                event_id=self._new_id(),
                type="deposit_confirmed",
                subject=f"{vault_id}:{booked.seq}",
                developer_id=None,
                payload=told,
                user_id=UserId(str(row["user_id"])),
            )
            await add_events(connection, [event], now)
        return booked

    async def _set_plan(
        self, connection: Connection, row: Row, plan_id: str, price: Stroops, ref: str
    ) -> PlanSet | PlanMissing | InsufficientFunds:
        vault_id = str(row["vault_id"])
        if await connection.fetch_value(_ACTIVE_PLAN, plan_id) is None:
            return PlanMissing()
        available, repeated = Stroops(row["available"]), False
        if price:
            booked = await self._book(connection, row, "subscription", Stroops(-price), ref, None)
            if isinstance(booked, InsufficientFunds):
                return booked
            available, repeated = booked.available, booked.repeated
        if not repeated:
            await connection.execute(_SET_PLAN, vault_id, plan_id)
        return PlanSet(available, repeated)

    async def _refund(
        self, connection: Connection, row: Row, event_id: EventId, amount: Stroops, ref: str
    ) -> BalanceMoved | InsufficientFunds | RefundRefused:
        vault_id = str(row["vault_id"])
        if await connection.fetch_value(_ENTRY, vault_id, "refund", ref) is None:
            event = await connection.fetch_row(_EVENT, vault_id, event_id)
            captured = event["amount"] if event is not None else 0
            refundable = Stroops(captured - await connection.fetch_value(_REFUNDED, vault_id, event_id))
            if amount > refundable or amount <= 0:
                return RefundRefused(refundable)
        return await self._book(connection, row, "refund", amount, ref, event_id)

    async def _extend(
        self, connection: Connection, row: Row, command: ExtendHold
    ) -> HoldExtended | InsufficientFunds | StandingRefused | PolicyRefused | HoldNotOpen | ReferenceTaken:
        vault_id = VaultId(str(row["vault_id"]))
        event = await connection.fetch_row(_EVENT, vault_id, command.event_id)
        if command.ref is not None and event is not None:
            known = await connection.fetch_row(_EXTENSION, vault_id, command.event_id, command.ref)
            if known is not None:
                if (known["seconds"], known["amount"]) != (command.extra_seconds, command.extra_amount):
                    return ReferenceTaken()
                return HoldExtended(Stroops(event["held_amount"]), repeated=True, held_credits=event["held_credits"])
        if event is None or event["state"] != "held":
            return HoldNotOpen(event["state"] if event is not None else None)
        amount, credits_more = command.extra_amount, 0
        if amount or command.unit_credits:
            if row["standing"] != "active":
                return StandingRefused(row["standing"], Stroops(row["owed"]))
            state, limits = _whole_state(row), None
            if row["limited"] or command.unit_credits:
                state, limits = await self._guard(connection, state, credited=command.unit_credits > 0, locked=True)
            api_key_id = ApiKeyId(str(event["api_key_id"]))
            if command.unit_credits:
                quota = state.quota
                assert quota is not None, "it was asked for"
                covered = quota.covered(api_key_id, command.units, command.unit_credits, state.credits)
                if covered < command.units and quota.overage == "deny":
                    return quota.refused(api_key_id, command.units * command.unit_credits, state.credits)
                credits_more = covered * command.unit_credits
                amount = Stroops(amount // command.units * (command.units - covered))
            if amount > row["available"]:
                return InsufficientFunds(amount, Stroops(row["available"]))
            refusal = None if limits is None else limits.refuse_amount(api_key_id, amount)
            if refusal is not None:
                return refusal
        held = await connection.fetch_row(
            _EXTEND, vault_id, command.event_id, amount, command.extra_seconds, credits_more
        )
        assert held is not None, "no hold is closed while its vault is locked"
        if command.ref is not None:
            await connection.execute(
                _NOTE_EXTENSION,
                vault_id,
                command.event_id,
                command.ref,
                command.extra_seconds,
                command.extra_amount,
                self._clock.now(),
            )
        return HoldExtended(Stroops(held["held_amount"]), held_credits=held["held_credits"])


def _still_rules(known: VaultState, state: VaultState, now: datetime, *, credited: bool) -> bool:
    """Tell whether nothing but holds and closes changed a vault since its rules were read, and none of them ended."""
    if not known.guarded or known.rules != state.rules or (credited and known.quota is None):
        return False
    return known.quota is None or known.quota.until is None or now < known.quota.until


def _is_fresh(known: VaultState, now: datetime) -> bool:
    """Tell whether what rules counted when they were read, and since, is to be believed for a refusal."""
    counted = [each for each in (*known.policies, known.quota) if each is not None]
    return bool(counted) and all(
        isinstance(each, SpendingLimits | Quota) and each.exact and now - each.read_at < LIMITS_FRESH
        for each in counted
    )


Columns = dict[str, object]


# Arrays go as literals of ids, words of ours and numbers, none of which needs quoting. The driver asks of every element
# of a list whether it is a list itself, which costs more than the round's other work in this process; a text is sent as
# it is, and PostgreSQL reads it in a fraction of that.


def _words(values: Iterable[str]) -> str:
    return "{" + ",".join(values) + "}"


def _numbers(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


def _numbers_or_null(values: Iterable[int | None]) -> str:
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def _share_columns(shares: Sequence[Share]) -> Columns:
    return {
        "vaults": _words([share.vault_id for share in shares]),
        "needs": _numbers(map(_need, shares)),
        "decided": _numbers([share.decided_version for share in shares]),
    }


def _alone_columns(share: Share) -> Columns:
    return {
        "vault": share.vault_id,
        "need": _need(share),
        "decided_version": share.decided_version,
    }


def _guard_columns(share: Share) -> Columns:
    guard = share.decided_version if share.rules is None else _WITHIN
    return {
        "guard": guard if share.guarded and share.holds else _UNGUARDED,
        "rules": share.rules or 0,
        "ceiling": share.ceiling,
        "credits_ceiling": share.credits_ceiling,
        "credits_need": share.credits_need,
        "credits_most": share.credits_most,
    }


def _guards_columns(shares: Sequence[Share]) -> Columns:
    each = [_guard_columns(share) for share in shares]
    return {name: _numbers([cast(int, columns[name]) for columns in each]) for name in _GUARDS}


def _need(share: Share) -> int:
    return share.need if share.holds else _NO_HOLDS


def _close_columns(closes: Sequence[tuple[int, CloseHold]]) -> Columns:
    deliveries = [close.delivery for _, close in closes]
    return {
        "close_places": _numbers([place for place, _ in closes]),
        "close_events": _words([close.event_id for _, close in closes]),
        "close_states": _words([close.state for _, close in closes]),
        "close_amounts": _numbers([close.amount for _, close in closes]),
        "close_statuses": _numbers_or_null([delivery.status for delivery in deliveries]),
        "close_latencies": _numbers_or_null([delivery.latency_us for delivery in deliveries]),
        "close_requests": _numbers_or_null([delivery.request_bytes for delivery in deliveries]),
        "close_responses": _numbers_or_null([delivery.response_bytes for delivery in deliveries]),
        "close_outcomes": _words([delivery.outcome for delivery in deliveries]),
    }


def _hold_columns(holds: Sequence[tuple[int, PlaceHold]]) -> Columns:
    charged = [hold.charged for _, hold in holds]
    return {
        "hold_places": _numbers([place for place, _ in holds]),
        "hold_events": _words([hold.event_id for _, hold in holds]),
        "hold_keys": _words([each.api_key_id for each in charged]),
        "hold_developers": _words([each.developer_id for each in charged]),
        "hold_apis": _numbers([each.api_id for each in charged]),
        "hold_endpoints": _numbers([each.endpoint_id for each in charged]),
        "hold_amounts": _numbers([hold.amount for _, hold in holds]),
        "hold_versions": _numbers([each.price_version for each in charged]),
        "hold_ttls": _numbers([hold.ttl_seconds for _, hold in holds]),
    }


def _rated_columns(holds: Sequence[tuple[int, PlaceHold]], closes: Sequence[tuple[int, CloseHold]]) -> Columns:
    return {
        "hold_credits": _numbers([hold.credits for _, hold in holds]),
        "close_credits": _numbers([close.credits for _, close in closes]),
        "close_quantities": _numbers_or_null([close.delivery.quantity for _, close in closes]),
    }


def _key_columns(
    claims: Sequence[tuple[int, PlaceHold, IdempotencyClaim]], answers: Sequence[tuple[int, CloseHold, StoredAnswer]]
) -> Columns:
    return {
        "claim_places": [place for place, _, _ in claims],
        "claim_keys": [claim.key for _, _, claim in claims],
        "claim_fingerprints": [claim.fingerprint for _, _, claim in claims],
        "claim_events": [hold.event_id for _, hold, _ in claims],
        "claim_replaces": [claim.replaces for _, _, claim in claims],
        "claim_retentions": [claim.retention_seconds for _, _, claim in claims],
        "answer_places": [place for place, _, _ in answers],
        "answer_keys": [answer.key for _, _, answer in answers],
        "answer_events": [close.event_id for _, close, _ in answers],
        "answer_statuses": [answer.status for _, _, answer in answers],
        "answer_heads": [answer.head for _, _, answer in answers],
        "answer_bodies": [answer.body for _, _, answer in answers],
        "answer_charges": [answer.charge for _, _, answer in answers],
    }


def _result(rows: Sequence[Row], shares: Sequence[Share]) -> RoundResult:
    lost: list[VaultState] = []
    drifted: list[VaultState] = []
    missed: list[EventId] = []
    for row in rows:
        if row["missed"] is not None:
            missed.append(EventId(str(row["missed"])))
        elif row["won"]:
            drifted.append(_state(row) if row.get("rounds") is None else _whole_state(row))
        else:
            lost.append(_state(row))
    if drifted:
        by_vault = {share.vault_id: share for share in shares}
        for state in drifted:
            # What was read is the vault before its share; nothing else came in between, since its row was locked.
            share = by_vault[state.vault_id]
            state.available = Stroops(state.available + share.available_change)
            state.held = Stroops(state.held + share.held_change)
            state.version += 1
            if state.limited:
                state.credits += share.credits_change
                state.placed += share.need
                state.placed_credits += share.credits_need
    return RoundResult(lost, drifted, frozenset(missed))
