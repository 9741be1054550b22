"""Settlements: revenue sealed, and each step of it stored before what it allows is done.

Every verb that moves a settlement is conditional on the state it comes from, and the triggers of the tables check
whether it is true: of any number of processes that try, one does it, and none does what must not be.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import attrs

from callora.ledger.faults import StoreRefused
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops, format_usdc
from callora.ledger.settlement import Candidate, HeldBack, Item, Part, Settlement
from callora.store.bridge import Connection, Database, Row
from callora.store.outbox import Event, add_events

_DUE: Final = """
SELECT a.developer_id, u.wallet_address FROM revenue_accounts a
LEFT JOIN developers d ON d.developer_id = a.developer_id LEFT JOIN users u ON u.user_id = d.user_id
WHERE a.network = $1 AND a.open_settlement IS NULL AND a.gross - a.sealed_gross > 0
    AND a.gross - a.sealed_gross - greatest(a.fee - a.sealed_fee, 0) >= $2
    AND (a.held_back_until IS NULL OR a.held_back_until <= $3) AND a.developer_id > $4
ORDER BY a.developer_id LIMIT $5
"""

_HOLD_BACK: Final = """
UPDATE revenue_accounts a SET held_back = h.reason, held_back_until = $4
FROM unnest($2::uuid[], $3::text[]) AS h (developer_id, reason)
WHERE a.network = $1 AND a.developer_id = h.developer_id AND a.open_settlement IS NULL
"""

_LOCK_INDEX: Final = "SELECT pass FROM revenue_index FOR UPDATE"

_PRESENT: Final = """
SELECT a.developer_id, c.address, a.sealed_pass, (a.gross - a.sealed_gross)::bigint AS gross,
       greatest(a.fee - a.sealed_fee, 0)::bigint AS fee
FROM unnest($2::uuid[], $3::text[]) AS c (developer_id, address)
JOIN revenue_accounts a ON a.network = $1 AND a.developer_id = c.developer_id
WHERE a.open_settlement IS NULL AND a.gross - a.sealed_gross - greatest(a.fee - a.sealed_fee, 0) >= $4
ORDER BY a.developer_id FOR UPDATE OF a
"""

_MAY_SETTLE: Final = """
SELECT epoch FROM chain_networks WHERE network = $1 AND epoch = $2 AND halted IS NULL AND settlement_halted IS NULL
FOR SHARE
"""

_OPEN: Final = """
INSERT INTO settlements (settlement_id, network, epoch, state, items, charge_total, credit_total, opened_at, moved_at)
VALUES ($1, $2, $3, 'open', $4, $5, $6, $7, $7)
"""

_ADD_ITEMS: Final = """
INSERT INTO settlement_items (settlement_id, position, network, developer_id, address, from_pass, to_pass, gross, fee,
                              credit, request_id)
SELECT $1, i.position, $2, i.developer_id, i.address, i.from_pass,
       CASE WHEN i.developer_id IS NOT NULL THEN $3::bigint END, i.gross, i.fee, i.credit, i.request_id
FROM unnest($4::int[], $5::uuid[], $6::text[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::text[])
         AS i (position, developer_id, address, from_pass, gross, fee, credit, request_id)
ORDER BY i.position
"""

_SEAL: Final = "UPDATE settlements SET state = 'sealed' WHERE settlement_id = $1"

_COLUMNS: Final = """
s.settlement_id, s.network, s.epoch, s.state, s.moved_at,
(SELECT json_agg(json_build_array(i.position, i.developer_id, i.address, i.gross, i.fee, i.credit, i.request_id)
                 ORDER BY i.position)
 FROM settlement_items i WHERE i.settlement_id = s.settlement_id)::text AS items,
(SELECT json_agg(json_build_array(c.part, c.first_position, c.last_position, c.state, c.attempt) ORDER BY c.part)
 FROM settlement_credits c WHERE c.settlement_id = s.settlement_id)::text AS parts
"""

_FIND: Final = f"SELECT {_COLUMNS} FROM settlements s WHERE s.settlement_id = $1"  # noqa: S608 - columns of ours

_UNDER_WAY: Final = """
SELECT settlement_id, opened_at, state IN ('sealed', 'charge_sent') AS uncharged, charge_total FROM settlements
WHERE network = $1 AND state NOT IN ('completed', 'failed') ORDER BY opened_at, settlement_id
"""

_BEGIN_CHARGE: Final = """
UPDATE settlements SET state = 'charge_sent', moved_at = $2 WHERE settlement_id = $1 AND state = 'sealed'
RETURNING true
"""

_BOOK_CHARGE: Final = """
UPDATE settlements s
SET state = 'charged', charged_by = $2, moved_at = $3, charged_at = $3,
    charge_hash = CASE WHEN $2 = 'transaction' THEN
        (SELECT t.hash FROM chain_transactions t WHERE t.network = s.network AND t.epoch = s.epoch
            AND t.purpose = 'charge:' || s.settlement_id AND t.state = 'succeeded') END
WHERE s.settlement_id = $1 AND s.state = 'charge_sent'
RETURNING true
"""

_BEGIN_CREDITS: Final = """
UPDATE settlements SET state = 'credit_sent', moved_at = $2 WHERE settlement_id = $1 AND state = 'charged'
RETURNING true
"""

_ADD_PART: Final = """
INSERT INTO settlement_credits (settlement_id, part, first_position, last_position, amount, state, moved_at)
SELECT $1, $2, $3, $4, sum(credit)::bigint, 'sent', $5 FROM settlement_items
WHERE settlement_id = $1 AND position BETWEEN $3 AND $4
"""

_BOOK_CREDITS: Final = """
UPDATE settlement_credits c
SET state = 'credited', moved_at = $4,
    hash = (SELECT t.hash FROM chain_transactions t JOIN settlements s ON s.settlement_id = c.settlement_id
            WHERE t.network = s.network AND t.epoch = s.epoch AND t.state = 'succeeded'
                AND t.purpose = 'credit:' || c.settlement_id || ':' || c.part || '.' || c.attempt)
WHERE c.settlement_id = $1 AND c.part = $2 AND c.attempt = $3 AND c.state = 'sent'
RETURNING true
"""

_SPLIT: Final = """
UPDATE settlement_credits SET state = 'split', moved_at = $4
WHERE settlement_id = $1 AND part = $2 AND attempt = $3 AND state = 'sent'
RETURNING true
"""

_AGAIN: Final = """
UPDATE settlement_credits SET attempt = attempt + 1, moved_at = $4
WHERE settlement_id = $1 AND part = $2 AND attempt = $3 AND state = 'sent'
RETURNING true
"""

_COMPLETE: Final = """
UPDATE settlements SET state = 'completed', moved_at = $2, ended_at = $2
WHERE settlement_id = $1 AND state = 'credit_sent'
RETURNING true
"""

_FAIL: Final = """
UPDATE settlements s SET state = 'failed', failure = left($2, 200), moved_at = $3, ended_at = $3
WHERE s.settlement_id = $1 AND s.state NOT IN ('completed', 'failed')
    AND ($4 OR NOT EXISTS (
        SELECT FROM chain_transactions t
        WHERE t.network = s.network AND t.purpose = 'charge:' || s.settlement_id
            AND t.state IN ('stored', 'sent', 'unresolved', 'succeeded')))
RETURNING true
"""

_CREDITED: Final = """
SELECT first_position, last_position, encode(hash, 'hex') AS hash FROM settlement_credits
WHERE settlement_id = $1 AND state = 'credited'
"""

_RESERVE: Final = """
INSERT INTO signer_spending (network, purpose, signer, amount, cap, at)
SELECT $1, $2, $3, $4, $5, $6
WHERE NOT EXISTS (SELECT FROM signer_spending WHERE network = $1 AND purpose = $2)
ON CONFLICT (network, purpose) DO NOTHING
"""

_LATELY_DEAD: Final = """
SELECT encode(hash, 'hex') AS hash, purpose FROM chain_transactions
WHERE network = $1 AND state = 'dead' AND sends > untaken AND ended_at > $2
    AND (purpose LIKE 'charge:%' OR purpose LIKE 'credit:%')
ORDER BY ended_at DESC LIMIT 200
"""

# A lease is told by the database's clock, which all processes share.
_TAKE_LEASE: Final = """
UPDATE settlement_runners
SET holder = $2, held_until = clock_timestamp() + $3::float8 * interval '1 second'
WHERE network = $1 AND (holder IS NULL OR holder = $2 OR held_until < clock_timestamp())
RETURNING wanted_at, coalesce(wanted_at > served_at, wanted_at IS NOT NULL) AS wanted,
          extract(epoch FROM clock_timestamp() - ran_at)::float8 AS age
"""

_GIVE_LEASE: Final = "UPDATE settlement_runners SET holder = NULL, held_until = NULL WHERE network = $1 AND holder = $2"

_WANT: Final = """
UPDATE settlement_runners SET wanted_at = clock_timestamp() WHERE network = $1 RETURNING wanted_at
"""

_SERVED: Final = """
UPDATE settlement_runners
SET served_at = greatest(served_at, $2), said = left($3, 500), ran_at = clock_timestamp() WHERE network = $1
"""

_RUNNER: Final = """
SELECT coalesce(held_until >= clock_timestamp(), false) AS held, wanted_at, served_at, said
FROM settlement_runners
WHERE network = $1
"""


Signing = Literal["charging", "crediting"]


@attrs.frozen
class Due:
    """A developer who has earned enough to be paid."""

    developer_id: DeveloperId
    wallet: str | None


@attrs.frozen
class UnderWay:
    """A settlement that has not ended."""

    settlement_id: str
    opened_at: datetime
    uncharged: Stroops
    """What the vault is to be charged for it, as far as is known; 0 where it is charged."""


@attrs.frozen
class Lease:
    """The right to run settlements of a network, for a time."""

    wanted_at: datetime | None
    """When somebody last asked for a run, on the database's clock."""
    wanted: bool
    """Whether that was not served yet."""
    age_seconds: float | None
    """Since the last run; None where there was none."""


@attrs.frozen
class Runner:
    """Whether somebody runs settlements of a network."""

    held: bool
    wanted_at: datetime | None
    served_at: datetime | None
    said: str | None
    """What the last run came to."""


@attrs.frozen
class DeadTransaction:
    """A charge or credits that were proven never to be applied."""

    hash: str
    purpose: str


Group = Callable[[Sequence[Candidate]], Sequence[tuple[str, Sequence[Item]]]]
"""Says which settlements are made, by id, of developers and what they have earned."""

NOBODY: Final = DeveloperId("00000000-0000-0000-0000-000000000000")


async def due(
    database: Database, network: str, payout_min: Stroops, now: datetime, after: DeveloperId, limit: int
) -> list[Due]:
    """Return developers who have earned enough, are not being settled and are not held back, by id.

    Args:
        payout_min: what a developer gets at least, > 0.
        after: only those with later ids.
    """
    rows = await database.fetch(_DUE, network, payout_min, now, after, limit)
    return [Due(DeveloperId(str(row["developer_id"])), row["wallet_address"]) for row in rows]


async def hold_back(database: Database, network: str, reasons: Mapping[DeveloperId, HeldBack], until: datetime) -> None:
    """Leave developers out until a time, and say why."""
    await database.execute(_HOLD_BACK, network, list(reasons), list(reasons.values()), until)


async def seal(
    database: Database,
    network: str,
    epoch: int,
    addresses: Mapping[DeveloperId, str],
    payout_min: Stroops,
    group: Group,
    now: datetime,
) -> list[str]:
    """Seal what developers have earned up to now in settlements, at once or not at all; return their ids.

    Args:
        addresses: where each of them is paid.
        group: called with those who have still earned enough, in the order of their ids.

    Raises:
        StoreUnavailable, StoreConflict: nothing was sealed.
        OutcomeUnknown: all of it is sealed, or nothing; ids tell.
        StoreRefused: a rule of the database is against it; nothing was sealed.

    Returns:
        Nothing where settlement is halted, or the network is on another history.
    """
    made: list[str] = []
    async with database.transaction() as connection:
        last_pass: int = await connection.fetch_value(_LOCK_INDEX)
        if await connection.fetch_value(_MAY_SETTLE, network, epoch) is None:
            return []
        rows = await connection.fetch(_PRESENT, network, list(addresses), list(addresses.values()), payout_min)
        sealed_pass = {str(row["developer_id"]): row["sealed_pass"] for row in rows}
        candidates = [
            Candidate(DeveloperId(str(row["developer_id"])), row["address"], Stroops(row["gross"]), Stroops(row["fee"]))
            for row in rows
        ]
        for settlement_id, items in group(candidates):
            charge, credit = sum(item.gross for item in items), sum(item.credit for item in items)
            await connection.execute(_OPEN, settlement_id, network, epoch, len(items), charge, credit, now)
            await connection.execute(
                _ADD_ITEMS,
                settlement_id,
                network,
                last_pass,
                [item.position for item in items],
                [item.developer_id for item in items],
                [item.address for item in items],
                [None if item.developer_id is None else sealed_pass[item.developer_id] for item in items],
                [item.gross for item in items],
                [item.fee for item in items],
                [item.credit for item in items],
                [item.request_id for item in items],
            )
            await connection.execute(_SEAL, settlement_id)
            made.append(settlement_id)
    return made


async def find(database: Database, settlement_id: str) -> Settlement | None:
    """Return a settlement."""
    row = await database.fetch_row(_FIND, settlement_id)
    return None if row is None else _settlement(row)


async def under_way(database: Database, network: str) -> list[UnderWay]:
    """Return settlements that have not ended, the oldest first."""
    rows = await database.fetch(_UNDER_WAY, network)
    return [
        UnderWay(str(row["settlement_id"]), row["opened_at"], Stroops(row["charge_total"] if row["uncharged"] else 0))
        for row in rows
    ]


async def begin_charge(database: Database, settlement: Settlement, now: datetime) -> bool:
    """Store that the charge may be sent; False where it is stored, or settlement is halted."""
    try:
        return await database.fetch_value(_BEGIN_CHARGE, settlement.settlement_id, now) is not None
    except StoreRefused as refused:
        if refused.constraint == "settlement_not_halted":
            return False
        raise


async def book_charge(
    database: Database, settlement: Settlement, by: Literal["transaction", "found"], now: datetime
) -> bool:
    """Store that the charge is made; False where that is stored."""
    return await database.fetch_value(_BOOK_CHARGE, settlement.settlement_id, by, now) is not None


async def begin_credits(database: Database, settlement: Settlement, now: datetime) -> bool:
    """Store that credits may be sent, all of them as one part; False where that is stored."""
    async with database.transaction() as connection:
        if await connection.fetch_value(_BEGIN_CREDITS, settlement.settlement_id, now) is None:
            return False
        await _add_part(connection, settlement, Part(1, 1, len(settlement.items)), now)
    return True


async def book_credits(database: Database, settlement: Settlement, part: Part, now: datetime) -> bool:
    """Store that a part is credited; False where that is stored."""
    found = await database.fetch_value(_BOOK_CREDITS, settlement.settlement_id, part.number, part.attempt, now)
    return found is not None


async def split(database: Database, settlement: Settlement, part: Part, now: datetime) -> bool:
    """Store that a part is made in halves; False where it has ended otherwise, or may be applied as a whole."""
    try:
        async with database.transaction() as connection:
            if not await connection.fetch_value(_SPLIT, settlement.settlement_id, part.number, part.attempt, now):
                return False
            for half in part.halves:
                await _add_part(connection, settlement, half, now)
    except StoreRefused as refused:
        if refused.constraint == "credited_once":
            return False
        raise
    return True


async def again(database: Database, settlement: Settlement, part: Part, now: datetime) -> bool:
    """Store that a part's next transaction is another one; False where that is stored, or one may be applied yet."""
    try:
        found = await database.fetch_value(_AGAIN, settlement.settlement_id, part.number, part.attempt, now)
    except StoreRefused as refused:
        if refused.constraint == "credited_once":
            return False
        raise
    return found is not None


async def complete(database: Database, settlement: Settlement, new_id: Callable[[], str], now: datetime) -> bool:
    """Store that all are credited, and tell so; False where that is stored."""
    async with database.transaction() as connection:
        if await connection.fetch_value(_COMPLETE, settlement.settlement_id, now) is None:
            return False
        hashes: dict[int, str] = {}
        for row in await connection.fetch(_CREDITED, settlement.settlement_id):
            for position in range(row["first_position"], row["last_position"] + 1):
                hashes[position] = row["hash"]
        await add_events(
            connection,
            [
                _event(
                    settlement,
                    item,
                    "settlement_completed",
                    new_id(),
                    {"txHash": hashes[item.position], "settledAt": now.isoformat()},
                )
                for item in settlement.charged_items()
            ],
            now,
        )
    return True


async def fail(
    database: Database,
    settlement: Settlement,
    reason: str,
    new_id: Callable[[], str],
    now: datetime,
    *,
    lost: bool = False,
) -> bool:
    """Store that it is not charged and never will be, release its revenue and tell so.

    Args:
        lost: on an operator's word: what was charged is gone with a history that is over.

    Returns:
        False where it has ended, or may be charged yet.
    """
    try:
        async with database.transaction() as connection:
            if await connection.fetch_value(_FAIL, settlement.settlement_id, reason, now, lost) is None:
                return False
            await add_events(
                connection,
                [
                    _event(
                        settlement,
                        item,
                        "settlement_failed",
                        new_id(),
                        {"reason": reason[:200], "failedAt": now.isoformat()},
                    )
                    for item in settlement.charged_items()
                ],
                now,
            )
    except StoreRefused as refused:
        if refused.constraint == "failed_uncharged":
            return False
        raise
    return True


async def reserve(
    database: Database, network: str, signer: Signing, purpose: str, amount: Stroops, cap: Stroops, now: datetime
) -> bool:
    """Reserve what a key is to move, once for its purpose, within what it may move in an hour.

    Returns:
        False where that would be too much; nothing is reserved then.
    """
    try:
        await database.execute(_RESERVE, network, purpose, signer, amount, cap, now)
    except StoreRefused as refused:
        if refused.constraint == "spending_within_cap":
            return False
        raise
    return True


async def lately_dead(database: Database, network: str, since: datetime) -> list[DeadTransaction]:
    """Return charges and credits that were sent and then proven dead since a moment, the latest first."""
    rows = await database.fetch(_LATELY_DEAD, network, since)
    return [DeadTransaction(row["hash"], row["purpose"]) for row in rows]


async def take_lease(database: Database, network: str, holder: str, seconds: float) -> Lease | None:
    """Take or renew the right to run settlements; None where another process has it.

    Args:
        holder: a UUID of this process.
    """
    row = await database.fetch_row(_TAKE_LEASE, network, holder, seconds)
    return None if row is None else Lease(row["wanted_at"], row["wanted"], row["age"])


async def give_lease(database: Database, network: str, holder: str) -> None:
    """Let another process run settlements at once."""
    await database.execute(_GIVE_LEASE, network, holder)


async def ask_for_run(database: Database, network: str) -> datetime:
    """Ask whoever runs settlements for a run now; return the moment, on the database's clock."""
    moment: datetime = await database.fetch_value(_WANT, network)
    return moment


async def note_served(database: Database, network: str, wanted_at: datetime | None, said: str) -> None:
    """Note what a run came to, and that it was the one asked for at this moment."""
    await database.execute(_SERVED, network, wanted_at, said)


async def runner(database: Database, network: str) -> Runner:
    """Return whether somebody runs settlements."""
    row = await database.fetch_row(_RUNNER, network)
    assert row is not None, "the migration made it"
    return Runner(row["held"], row["wanted_at"], row["served_at"], row["said"])


async def _add_part(connection: Connection, settlement: Settlement, part: Part, now: datetime) -> None:
    await connection.execute(_ADD_PART, settlement.settlement_id, part.number, part.first, part.last, now)


def _event(settlement: Settlement, item: Item, kind: str, event_id: str, more: Mapping[str, object]) -> Event:
    payload = {
        "settlementId": settlement.settlement_id,
        "developerId": item.developer_id,
        "network": settlement.network,
        "asset": "USDC",
        "amount": format_usdc(item.credit),
        "address": item.address,
        **more,
    }
    return Event(
        event_id, kind, f"settlement:{settlement.settlement_id}:{item.developer_id}", item.developer_id, payload
    )


def _settlement(row: Row) -> Settlement:
    items: list[list[Any]] = json.loads(row["items"] or "[]")
    parts: list[list[Any]] = json.loads(row["parts"] or "[]")
    return Settlement(
        settlement_id=str(row["settlement_id"]),
        network=row["network"],
        epoch=row["epoch"],
        state=row["state"],
        items=tuple(Item(*item) for item in items),
        parts=tuple(Part(*part) for part in parts),
    )
