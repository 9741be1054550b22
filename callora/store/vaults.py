"""Vaults and their usage events: load, commit a round, commit one locked command."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, cast

import attrs

from callora.ledger.clock import Clock
from callora.ledger.commands import (
    Deposit,
    ExtendHold,
    GiveBack,
    Grant,
    GrantQuota,
    LockedCommand,
    RateDelta,
    Refund,
    ReviewDebt,
    SetPlan,
    SetStanding,
    Withdraw,
)
from callora.ledger.debt import Purse, credited, debited, reviewed, stood
from callora.ledger.faults import StoreRefused, StoreUnavailable
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
from callora.ledger.vault import VaultState, carry
from callora.store.bridge import Connection, Database, Line, Row
from callora.store.by_key import GO_BY_KEY
from callora.store.counters import rate
from callora.store.outbox import Event, add_events, iso
from callora.store.purses import COLUMNS, purse_of, setting, values_of
from callora.store.quotas import grant, renew
from callora.store.reads.quotas import Terms, terms
from callora.store.reads.spending import spending_limits
from callora.store.rounds import result_of, statement_of
from callora.store.states import GUARDING, whole_state_of
from callora.store.together import Together

LIMITS_FRESH: Final = timedelta(seconds=1)
"""How long what was spent is believed before it is counted anew for a refusal: counting is the dearest read there is,
and whoever is refused may ask a thousand times a second."""

_LOAD: Final = f"""
SELECT vault_id, available, held, version, standing::text AS standing, {", ".join(GUARDING)} FROM vaults
WHERE vault_id = ANY ($1::uuid[])
"""  # noqa: S608 - names of ours

_LOCK: Final = f"""
SELECT vault_id, user_id, network, held, version, entry_seq, {COLUMNS},
       {", ".join(name for name in GUARDING if name != "owed")} FROM vaults
WHERE vault_id = $1 FOR UPDATE
"""  # noqa: S608 - names of ours

_LOCK_MANY: Final = "SELECT vault_id FROM vaults WHERE vault_id = ANY ($1::uuid[]) ORDER BY vault_id FOR UPDATE"
"""In the order in which rounds lock them."""

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


LOADED_TOGETHER_MAX: Final = 10_000
COUNTED_TOGETHER_MAX: Final = 64
"""Vaults in one query: a balance is some microseconds' work, a count about a millisecond's, and the last waits for the
first."""
RENEWED_TOGETHER_MAX: Final = 64
"""Vaults whose grants are renewed in one database transaction, which keeps their rows locked."""
RENEWALS_MAX: Final = 3
"""How often a vault's grants may turn out to be due for one decision: once, or twice as a month ends."""


@attrs.frozen
class _Counted:
    """A vault that is limited, as it was read, with what its rules counted since."""

    state: VaultState
    limits: SpendingLimits | None


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
        self._loads = Together(self._load, LOADED_TOGETHER_MAX)
        self._counts = Together(self._count, COUNTED_TOGETHER_MAX)
        self._renewals = Together(self._renew, RENEWED_TOGETHER_MAX)

    async def load_vaults(self, vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        """Return the stored state of each vault that exists, as it is at some moment after this was called.

        Raises:
            StoreUnavailable: nothing was read.
        """
        found = await self._loads.ask(*vault_ids)
        return {state.vault_id: attrs.evolve(state) for state in found if state is not None}

    async def _load(self, vault_ids: Sequence[VaultId]) -> Sequence[VaultState | None]:
        rows = await self._database.fetch(_LOAD, list(set(vault_ids)))
        states = {state.vault_id: state for state in map(whole_state_of, rows)}
        return [states.get(vault_id) for vault_id in vault_ids]

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
            StoreUnavailable: nothing was read. StoreRefused: its grants cannot be renewed. OutcomeUnknown: they may
                have been, which does no harm.
        """
        now = self._clock.now()
        if known is not None and _still_rules(known, state, now, credited=credited):
            if not refusing:
                carry(known, state)
                return state
            if known.version == state.version and _is_fresh(known, now):
                state.policies, state.quota = known.policies, known.quota
                return state
        for _ in range(RENEWALS_MAX):
            (counted,) = await self._counts.ask((state, credited))
            if counted is not None:
                return counted.state
            (refused,) = await self._renewals.ask(state.vault_id)
            if refused is not None:
                raise refused
            state = (await self.load_vaults([state.vault_id]))[state.vault_id]
        raise StoreUnavailable("its grants are due however often they are renewed")

    async def _renew(self, vault_ids: Sequence[VaultId]) -> Sequence[StoreRefused | None]:
        """Renew vaults' grants; return what was refused of each, so that one is no other's fault."""
        try:
            await self._renew_all(vault_ids)
        except StoreRefused as refused:
            if len(vault_ids) == 1:
                return [refused]
            return [(await self._renew([vault_id]))[0] for vault_id in vault_ids]
        return [None] * len(vault_ids)

    async def _renew_all(self, vault_ids: Sequence[VaultId]) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(GO_BY_KEY)
            await connection.fetch(_LOCK_MANY, vault_ids)
            await renew(connection, vault_ids, self._clock.now())

    async def _count(self, asked: Sequence[tuple[VaultState, bool]]) -> Sequence[_Counted | None]:
        """Return vaults with their rules, and None for those whose grants are to be renewed first."""
        now, states = self._clock.now(), [state for state, _ in asked]
        async with self._database.transaction() as connection:
            await connection.execute(GO_BY_KEY)
            found = await terms(connection, states, now, {state.vault_id for state, credited in asked if credited})
            due = {vault_id for vault_id, each in found.items() if each.due}
            counted = await _with_rules(connection, [each for each in states if each.vault_id not in due], found, now)
        return [counted.get(state.vault_id) for state in states]

    async def _guard(self, connection: Connection, state: VaultState, *, credited: bool) -> _Counted:
        """Return a vault whose row is locked with its rules, its quota renewed where that is due."""
        now = self._clock.now()
        await connection.execute(GO_BY_KEY)
        found = await terms(connection, [state], now, {state.vault_id} if credited else ())
        if state.vault_id in found and found[state.vault_id].due:
            await renew(connection, [state.vault_id], now)
            row = cast(Row, await connection.fetch_row(_LOCK, state.vault_id))
            state = whole_state_of(row)
            found = await terms(connection, [state], now, {state.vault_id})
        return (await _with_rules(connection, [state], found, now))[state.vault_id]

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
        statement, arguments = statement_of(shares, self._clock.now())
        rows = await self._line.run(statement, *arguments, deadline_seconds=self._commit_seconds_max)
        return result_of(rows, shares)

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
            state = whole_state_of(row)
            if row["limited"] or credited:
                state = (await self._guard(connection, state, credited=credited)).state
            share = decide(state)
            if not (share.holds or share.closes):
                return share, CLEAN
            statement, arguments = statement_of([share], self._clock.now())
            return share, result_of(await connection.fetch(statement, *arguments), [share])

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
            state, limits = whole_state_of(row), None
            if row["limited"] or command.unit_credits:
                counted = await self._guard(connection, state, credited=command.unit_credits > 0)
                state, limits = counted.state, counted.limits
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


async def _with_rules(
    connection: Connection, states: Sequence[VaultState], found: Mapping[VaultId, Terms], now: datetime
) -> dict[VaultId, _Counted]:
    """Return vaults with their quotas and their limits with what was spent."""
    limits = await spending_limits(connection, states, now) if states else {}
    for state in states:
        limit, quota = limits.get(state.vault_id), found.get(state.vault_id)
        state.policies = () if limit is None else (limit,)
        if quota is not None:
            state.quota, state.credits = quota.quota, quota.credits
    return {state.vault_id: _Counted(state, limits.get(state.vault_id)) for state in states}


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
