"""Vaults and their usage events: load, commit a round, commit one locked command.

The round is one statement, one round trip and one fsync for every vault in it. Invariants it keeps whatever its caller
believed: a hold is placed only where `available` covers the vault's whole share and its standing is active; a close
counts only if it ended an open hold in this very statement, and an expiry only if it is due; the balance moves by what
the statement's own rows say.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, cast

from callora.ledger.clock import Clock
from callora.ledger.commands import (
    CloseHold,
    Deposit,
    ExtendHold,
    LockedCommand,
    PlaceHold,
    Refund,
    SetStanding,
    Withdraw,
)
from callora.ledger.ids import EventId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    BalanceMoved,
    EventFound,
    HoldExtended,
    HoldNotOpen,
    InsufficientFunds,
    RefundRefused,
    StandingSet,
    VaultMissing,
)
from callora.ledger.rounds import CLEAN, UNGUARDED, RoundResult, Share
from callora.ledger.vault import Standing, VaultState
from callora.store.bridge import Connection, Database, Line, Row

ROUND_SECONDS_MAX: Final = 15
"""The server ends a round that takes longer, so that one whose writer gave up on it is not stored at any later time."""

LINE_SETTINGS: Final[Mapping[str, str]] = {
    # The plan is made once and kept: one made for the arrays of a first round on empty tables would not stay good.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "jit": "off",
    "statement_timeout": f"{ROUND_SECONDS_MAX}s",
}

_LOCKED_AND_CLOSED: Final = """
WITH wanted AS (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[]) AS w (vault_id, need, guard, decided)
), locked AS MATERIALIZED (
    SELECT v.vault_id, v.available, v.held, v.version, v.standing, w.decided,
           v.available >= w.need AND (w.need < 0 OR v.standing = 'active')
               AND (w.guard < 0 OR v.version = w.guard) AS won
    FROM wanted w JOIN vaults v ON v.vault_id = w.vault_id
    ORDER BY v.vault_id
    FOR UPDATE OF v
), closed AS (
    UPDATE usage_events u
    SET state = c.state::usage_state, amount = CASE c.state WHEN 'captured' THEN c.amount END, status = c.status,
        latency_us = c.latency_us, request_bytes = c.request_bytes, response_bytes = c.response_bytes,
        outcome = c.outcome, closed_at = $5
    FROM unnest($6::uuid[], $7::uuid[], $8::text[], $9::bigint[], $10::smallint[], $11::int[], $12::bigint[],
                $13::bigint[], $14::text[])
         AS c (vault_id, event_id, state, amount, status, latency_us, request_bytes, response_bytes, outcome)
    JOIN locked l ON l.vault_id = c.vault_id AND l.won
    WHERE u.vault_id = c.vault_id AND u.event_id = c.event_id AND u.state = 'held'
          AND (c.state <> 'expired' OR u.expires_at <= $5)
    RETURNING u.vault_id, u.event_id, u.held_amount, coalesce(u.amount, 0) AS amount
)"""

_CLAIMED: Final = """, claimed AS (
    INSERT INTO idempotency_keys AS k (vault_id, key, fingerprint, event_id, replaces, state, created_at, expires_at)
    SELECT DISTINCT ON (i.vault_id, i.key) i.vault_id, i.key, i.fingerprint, i.event_id, i.replaces, 'started', $5,
           $5 + i.retention * interval '1 second'
    FROM unnest($24::uuid[], $25::text[], $26::bytea[], $27::uuid[], $28::uuid[], $29::int[])
         AS i (vault_id, key, fingerprint, event_id, replaces, retention)
    JOIN locked l ON l.vault_id = i.vault_id AND l.won
    ORDER BY i.vault_id, i.key, i.event_id
    ON CONFLICT (vault_id, key) DO UPDATE
        SET fingerprint = excluded.fingerprint, event_id = excluded.event_id, replaces = excluded.replaces,
            state = 'started', status = NULL, head = NULL, body = NULL, charge = NULL,
            created_at = excluded.created_at, expires_at = excluded.expires_at
        WHERE k.expires_at <= excluded.created_at OR (k.state = 'started' AND k.event_id = excluded.replaces)
    RETURNING event_id
), answered AS (
    UPDATE idempotency_keys k
    SET state = CASE WHEN a.body IS NULL THEN 'not_replayable' ELSE 'completed' END,
        status = a.status, head = a.head, body = a.body, charge = a.charge
    FROM unnest($30::uuid[], $31::text[], $32::uuid[], $33::smallint[], $34::bytea[], $35::bytea[], $36::bigint[])
         AS a (vault_id, key, event_id, status, head, body, charge)
    JOIN closed c ON c.event_id = a.event_id
    WHERE k.vault_id = a.vault_id AND k.key = a.key AND k.event_id = a.event_id AND k.state = 'started'
)"""

_PLACED_AND_MOVED: Final = """, placed AS (
    INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,
                              price_version, created_at, expires_at)
    SELECT h.vault_id, h.event_id, h.api_key_id, h.developer_id, h.api_id, h.endpoint_id, h.held_amount,
           h.price_version, $5, $5 + h.ttl * interval '1 second'
    FROM unnest($15::uuid[], $16::uuid[], $17::uuid[], $18::uuid[], $19::bigint[], $20::bigint[], $21::bigint[],
                $22::int[], $23::int[])
         AS h (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, price_version, ttl)
    JOIN locked l ON l.vault_id = h.vault_id AND l.won
    {unless_taken}
    RETURNING vault_id, event_id, held_amount
), change AS (
    SELECT vault_id, sum(available)::bigint AS available, sum(held)::bigint AS held FROM (
        SELECT vault_id, held_amount - amount AS available, -held_amount AS held FROM closed
        UNION ALL
        SELECT vault_id, -held_amount, held_amount FROM placed
    ) AS rows GROUP BY vault_id
), moved AS (
    UPDATE vaults v
    SET available = v.available + c.available, held = v.held + c.held, version = v.version + 1
    FROM change c WHERE v.vault_id = c.vault_id
    RETURNING v.vault_id, v.available, v.held, v.version
)
SELECT l.won, l.vault_id, coalesce(m.available, l.available) AS available, coalesce(m.held, l.held) AS held,
       coalesce(m.version, l.version) AS version, l.standing::text AS standing, NULL::uuid AS missed
FROM locked l LEFT JOIN moved m ON m.vault_id = l.vault_id
WHERE NOT l.won OR l.version <> l.decided
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, e FROM unnest($7::uuid[]) AS e WHERE e NOT IN (SELECT event_id FROM closed)
"""

_ROUND: Final = _LOCKED_AND_CLOSED + _PLACED_AND_MOVED.format(unless_taken="")

_KEYED_ROUND: Final = (
    _LOCKED_AND_CLOSED
    + _CLAIMED
    + _PLACED_AND_MOVED.format(
        unless_taken="WHERE h.event_id NOT IN (SELECT e FROM unnest($27::uuid[]) AS e)"
        " OR h.event_id IN (SELECT event_id FROM claimed)"
    )
    + "UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL, e FROM unnest($27::uuid[]) AS e"
    " WHERE e NOT IN (SELECT event_id FROM claimed)"
)

_LOAD: Final = """
SELECT vault_id, available, held, version, standing::text AS standing FROM vaults WHERE vault_id = ANY ($1::uuid[])
"""

_LOCK: Final = """
SELECT vault_id, available, held, version, entry_seq, standing::text AS standing FROM vaults WHERE vault_id = $1
FOR UPDATE
"""

_EVENT: Final = """
SELECT event_id, state::text AS state, held_amount, coalesce(amount, 0) AS amount
FROM usage_events WHERE vault_id = $1 AND event_id = $2
"""

_ENTRY: Final = """
SELECT seq FROM ledger_entries WHERE vault_id = $1 AND kind = $2 AND ref = $3
"""

_BOOK: Final = """
WITH entry AS (
    INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, event_id, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
)
UPDATE vaults SET available = available + $4, version = version + 1, entry_seq = $2 WHERE vault_id = $1
"""

_REFUNDED: Final = """
SELECT coalesce(sum(amount), 0)::bigint FROM ledger_entries WHERE vault_id = $1 AND event_id = $2 AND kind = 'refund'
"""

_EXTEND: Final = """
WITH extended AS (
    UPDATE usage_events
    SET held_amount = held_amount + $3,
        expires_at = least(expires_at + $4 * interval '1 second', created_at + interval '1 day')
    WHERE vault_id = $1 AND event_id = $2 AND state = 'held'
    RETURNING held_amount
), moved AS (
    UPDATE vaults SET available = available - $3, held = held + $3, version = version + 1
    WHERE vault_id = $1 AND EXISTS (SELECT FROM extended)
)
SELECT held_amount FROM extended
"""

_SET_STANDING: Final = """
UPDATE vaults SET standing = $2::text::standing, version = version + 1
WHERE vault_id = $1 AND standing <> $2::text::standing
"""

_NO_HOLDS: Final = -1
"""What a share without holds needs: nothing, not even an active vault."""

Columns = tuple[object, ...]

LockedOutcome = (
    BalanceMoved | HoldExtended | StandingSet | InsufficientFunds | HoldNotOpen | RefundRefused | VaultMissing
)


def _state(row: Row) -> VaultState:
    return VaultState(
        VaultId(str(row["vault_id"])),
        Stroops(row["available"]),
        Stroops(row["held"]),
        row["version"],
        cast(Standing, row["standing"]),
    )


class VaultStore:
    """The ledger's two doors to PostgreSQL: rounds over one dedicated line, everything else over the pool."""

    def __init__(self, database: Database, line: Line, clock: Clock, commit_seconds_max: float) -> None:
        self._database = database
        self._line = line
        self._clock = clock
        self._commit_seconds_max = commit_seconds_max

    async def load_vaults(self, vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        """Return the stored state of each vault that exists.

        Raises:
            StoreUnavailable: nothing was read.
        """
        states = (_state(row) for row in await self._database.fetch(_LOAD, list(vault_ids)))
        return {state.vault_id: state for state in states}

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
        return _result(rows) if rows else CLEAN

    def _statement(self, shares: Sequence[Share]) -> tuple[str, Columns]:
        holds = [(share.vault_id, hold) for share in shares for hold in share.holds]
        closes = [(share.vault_id, close) for share in shares for close in share.closes]
        claims = [(vault_id, hold) for vault_id, hold in holds if hold.claim is not None]
        answers = [(vault_id, close) for vault_id, close in closes if close.answer is not None]
        arguments = _round_arguments(self._clock.now(), shares, holds, closes)
        if claims or answers:
            return _KEYED_ROUND, arguments + _key_arguments(claims, answers)
        return _ROUND, arguments

    async def commit_locked_round(
        self, vault_id: VaultId, decide: Callable[[VaultState], Share]
    ) -> tuple[Share, RoundResult]:
        """Store one vault's share with its row locked before the decision, so that it cannot lose.

        Args:
            decide: pure; given the locked state, returns the share to store.

        Raises:
            StoreUnavailable: nothing was written. OutcomeUnknown: the commit was sent and no answer came.
        """
        async with self._database.transaction() as connection:
            share = decide(_state(cast(Row, await connection.fetch_row(_LOCK, vault_id))))
            statement, arguments = self._statement([share])
            return share, _result(await connection.fetch(statement, *arguments))

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
                    return await self._book(connection, row, "deposit", amount, ref, None)
                case Withdraw(amount, ref):
                    return await self._book(connection, row, "withdrawal", Stroops(-amount), ref, None)
                case Refund(event_id, amount, ref):
                    return await self._refund(connection, row, event_id, amount, ref)
                case ExtendHold():
                    return await self._extend(connection, row, command)
                case SetStanding(standing):
                    await connection.execute(_SET_STANDING, vault_id, standing)
                    return StandingSet()

    async def _book(
        self, connection: Connection, row: Row, kind: str, amount: Stroops, ref: str, event_id: EventId | None
    ) -> BalanceMoved | InsufficientFunds:
        vault_id = str(row["vault_id"])
        booked = await connection.fetch_value(_ENTRY, vault_id, kind, ref)
        if booked is not None:
            return BalanceMoved(booked, Stroops(row["available"]), repeated=True)
        available = row["available"] + amount
        if available < 0:
            return InsufficientFunds(Stroops(-amount), Stroops(row["available"]))
        seq = row["entry_seq"] + 1
        await connection.execute(
            _BOOK, vault_id, seq, kind, amount, available + row["held"], ref, event_id, self._clock.now()
        )
        return BalanceMoved(seq, Stroops(available), repeated=False)

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
    ) -> HoldExtended | InsufficientFunds | HoldNotOpen:
        if command.extra_amount > row["available"]:
            return InsufficientFunds(command.extra_amount, Stroops(row["available"]))
        vault_id = str(row["vault_id"])
        held = await connection.fetch_value(
            _EXTEND, vault_id, command.event_id, command.extra_amount, command.extra_seconds
        )
        if held is not None:
            return HoldExtended(Stroops(held))
        event = await connection.fetch_row(_EVENT, vault_id, command.event_id)
        return HoldNotOpen(event["state"] if event is not None else None)


def _round_arguments(
    now: datetime,
    shares: Sequence[Share],
    holds: Sequence[tuple[VaultId, PlaceHold]],
    closes: Sequence[tuple[VaultId, CloseHold]],
) -> Columns:
    deliveries = [close.delivery for _, close in closes]
    charged = [hold.charged for _, hold in holds]
    return (
        [share.vault_id for share in shares],
        [share.need if share.holds else _NO_HOLDS for share in shares],
        [share.decided_version if share.guarded else UNGUARDED for share in shares],
        [share.decided_version for share in shares],
        now,
        [vault_id for vault_id, _ in closes],
        [close.event_id for _, close in closes],
        [close.state for _, close in closes],
        [close.amount for _, close in closes],
        [delivery.status for delivery in deliveries],
        [delivery.latency_us for delivery in deliveries],
        [delivery.request_bytes for delivery in deliveries],
        [delivery.response_bytes for delivery in deliveries],
        [delivery.outcome for delivery in deliveries],
        [vault_id for vault_id, _ in holds],
        [hold.event_id for _, hold in holds],
        [each.api_key_id for each in charged],
        [each.developer_id for each in charged],
        [each.api_id for each in charged],
        [each.endpoint_id for each in charged],
        [hold.amount for _, hold in holds],
        [each.price_version for each in charged],
        [hold.ttl_seconds for _, hold in holds],
    )


def _key_arguments(
    claims: Sequence[tuple[VaultId, PlaceHold]], answers: Sequence[tuple[VaultId, CloseHold]]
) -> Columns:
    claimed = [hold.claim for _, hold in claims if hold.claim is not None]
    answered = [close.answer for _, close in answers if close.answer is not None]
    return (
        [vault_id for vault_id, _ in claims],
        [claim.key for claim in claimed],
        [claim.fingerprint for claim in claimed],
        [hold.event_id for _, hold in claims],
        [claim.replaces for claim in claimed],
        [claim.retention_seconds for claim in claimed],
        [vault_id for vault_id, _ in answers],
        [answer.key for answer in answered],
        [close.event_id for _, close in answers],
        [answer.status for answer in answered],
        [answer.head for answer in answered],
        [answer.body for answer in answered],
        [answer.charge for answer in answered],
    )


def _result(rows: Sequence[Row]) -> RoundResult:
    lost: list[VaultState] = []
    drifted: list[VaultState] = []
    missed: list[EventId] = []
    for row in rows:
        if row["missed"] is not None:
            missed.append(EventId(str(row["missed"])))
        elif row["won"]:
            drifted.append(_state(row))
        else:
            lost.append(_state(row))
    return RoundResult(lost, drifted, frozenset(missed))
