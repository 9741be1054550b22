"""The round: what many vaults decided, stored by one statement, one round trip and one fsync.

Invariants it keeps whatever its caller believed: a hold is placed only where `available` covers the vault's whole share
and its standing is active; a close counts only if it ended an open hold in this very statement, and an expiry only if
it is due; the balance moves by what the statement's own rows say.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import attrs

from callora.ledger.commands import CloseHold, IdempotencyClaim, PlaceHold, StoredAnswer
from callora.ledger.ids import EventId
from callora.ledger.money import Stroops
from callora.ledger.rounds import CLEAN, NO_CEILING, RoundResult, Share
from callora.ledger.vault import VaultState
from callora.store.bridge import Row
from callora.store.by_key import BY_KEY
from callora.store.states import GUARDING, state_of, whole_state_of

ROUND_SECONDS_MAX: Final = 15
"""The server ends a round that takes longer, so that one whose writer gave up on it is not stored at any later time."""

LINE_SETTINGS: Final[Mapping[str, str]] = {
    **BY_KEY,
    # PostgreSQL 18 (seen with 18.4) crashes where a row lock had to be waited for in a statement that prunes partitions
    # while it runs. Every month is looked at instead.
    "enable_partition_pruning": "off",
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
        guarding = GUARDING if guarded else ()
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

_NO_HOLDS: Final = -1
"""What a share without holds needs: nothing, not even an active vault."""


def statement_of(shares: Sequence[Share], now: datetime) -> tuple[str, list[object]]:
    """Return the statement that stores a round, and its arguments.

    Args:
        shares: at most one for each vault; each has holds or closes.
    """
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
    columns["now"] = now
    if closes:
        columns |= _close_columns(closes)
    if holds:
        columns |= _hold_columns(holds)
    if rated:
        columns |= _rated_columns(holds, closes)
    if claims or answers:
        columns |= _key_columns(claims, answers)
    return statement.sql, [columns[name] for name in statement.parameters]


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


def _guard(share: Share) -> tuple[int, ...]:
    """Return what `_GUARDS` are of a share."""
    if not share.guarded or not share.holds:
        return _UNGUARDED, 0, NO_CEILING, NO_CEILING, 0, NO_CEILING
    guard, rules = (share.decided_version, 0) if share.rules is None else (_WITHIN, share.rules)
    return guard, rules, share.ceiling, share.credits_ceiling, share.credits_need, share.credits_most


def _guard_columns(share: Share) -> Columns:
    return dict(zip(_GUARDS, _guard(share), strict=True))


def _guards_columns(shares: Sequence[Share]) -> Columns:
    columns = zip(*map(_guard, shares), strict=True)
    return {name: _numbers(column) for name, column in zip(_GUARDS, columns, strict=True)}


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


def result_of(rows: Sequence[Row], shares: Sequence[Share]) -> RoundResult:
    """Return what a stored round did not do as decided, from the rows that its statement returned."""
    if not rows:
        return CLEAN
    lost: list[VaultState] = []
    drifted: list[VaultState] = []
    missed: list[EventId] = []
    for row in rows:
        if row["missed"] is not None:
            missed.append(EventId(str(row["missed"])))
        elif row["won"]:
            drifted.append(state_of(row) if row.get("rounds") is None else whole_state_of(row))
        else:
            lost.append(state_of(row))
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
