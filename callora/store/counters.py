"""Counters as they are stored: what they were rated up to, what they grew by, and what that was charged.

`rate` is one half of a vault's locked command: everything it writes, and the vault's money, is one transaction.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final

import attrs

from callora.ledger.commands import RateDelta
from callora.ledger.counters import AccountReadings, Advance, Checkpoint, Delta, Price, Reading, advance
from callora.ledger.debt import Purse, charged
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import DeltasRated
from callora.store.bridge import Connection, Row
from callora.store.purses import setting, values_of

# As in a round, rows are looked up in the one way that stays good on tables of any size.
_READ: Final = """
SELECT a.account_id, a.unit_price, a.region_multiplier * a.line_multiplier AS multiplier, a.rule_version,
       a.included_granted - a.included_used AS included_left, c.counter_id, c.epoch, c.up, c.down, c.seen_at
FROM unnest($2::uuid[]) AS w (account_id)
JOIN counter_accounts a ON a.vault_id = ANY (ARRAY[$1::uuid]) AND a.account_id = ANY (ARRAY[w.account_id])
LEFT JOIN counter_checkpoints c ON c.vault_id = ANY (ARRAY[$1::uuid]) AND c.account_id = ANY (ARRAY[w.account_id])
    AND c.env = ANY (ARRAY[$3::text]) AND c.node_id = ANY (ARRAY[$4::text]) AND c.meter = ANY (ARRAY[$5::text])
"""

_BEGIN: Final = """
INSERT INTO counter_checkpoints (vault_id, account_id, env, node_id, meter)
SELECT $1::uuid, w, $3::text, $4::text, $5::text FROM unnest($2::uuid[]) AS w
RETURNING account_id, counter_id
"""

_WRITE: Final = f"""
WITH rated AS MATERIALIZED (
    SELECT * FROM unnest($2::text::uuid[], $3::text::bigint[], $4::text::int[], $5::text::bigint[], $6::text::bigint[],
                         $7::timestamptz[], $8::text::uuid[], $9::text::bigint[], $10::text::bigint[],
                         $11::text::bigint[], $12::numeric[], $13::numeric[], $14::text[]) WITH ORDINALITY
        AS r (account_id, counter_id, epoch, up, down, seen_at, event_id, units, amount, included, unit_price,
              multiplier, rule_version, place)
), checkpoints AS (
    UPDATE counter_checkpoints c SET epoch = r.epoch, up = r.up, down = r.down, seen_at = r.seen_at
    FROM rated r WHERE c.vault_id = ANY (ARRAY[$1::uuid]) AND c.counter_id = ANY (ARRAY[r.counter_id])
), used AS (
    UPDATE counter_accounts a SET included_used = a.included_used + r.included
    FROM rated r
    WHERE r.included > 0 AND a.vault_id = ANY (ARRAY[$1::uuid]) AND a.account_id = ANY (ARRAY[r.account_id])
), deltas AS (
    INSERT INTO counter_deltas (vault_id, counter_id, epoch, from_up, from_down, up, down, included, amount, account_id,
                                event_id, minute, collected_at, source_id, region, line, unit_price, multiplier,
                                rule_version)
    SELECT $1::uuid, r.counter_id, d.epoch, d.from_up, d.from_down, d.up, d.down, d.included, d.amount, r.account_id,
           r.event_id, date_trunc('minute', d.collected_at, 'UTC'), d.collected_at, $24::text, $25::text,
           ($31::text[])[d.line],
           r.unit_price, r.multiplier, r.rule_version
    FROM unnest($15::text::int[], $16::text::int[], $17::text::bigint[], $18::text::bigint[], $19::text::bigint[],
                $20::text::bigint[], $21::text::bigint[], $22::text::bigint[], $23::text::timestamptz[],
                $26::text::int[])
        AS d (place, epoch, from_up, from_down, up, down, included, amount, collected_at, line)
    JOIN rated r ON r.place = d.place
), events AS (
    INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,
                              price_version, created_at, expires_at, state, amount, quantity, closed_at, outcome)
    SELECT $1::uuid, r.event_id, r.account_id, $27::uuid, $28::bigint, $29::bigint, r.amount, 1, $30::timestamptz,
           $30::timestamptz + interval '1 minute', 'captured', r.amount, r.units, $30::timestamptz, 'metered'
    FROM rated r WHERE r.event_id IS NOT NULL
)
UPDATE vaults SET {setting(32)} WHERE vault_id = $1::uuid
"""  # noqa: S608 - names of ours


@attrs.frozen(slots=True)
class _Account:
    """One account of the command: how it was found, and how far its readings take it."""

    asked: AccountReadings
    counter_id: int
    unit_price: Decimal
    multiplier: Decimal
    rule_version: str
    went: Advance

    @property
    def amount(self) -> int:
        return sum([delta.amount for delta in self.went.deltas])


async def rate(
    connection: Connection, vault_id: VaultId, purse: Purse, command: RateDelta, now: datetime
) -> DeltasRated:
    """Rate readings and charge what they come to; the vault's row is locked.

    Raises:
        AssertionError: an account is not the vault's.
    """
    accounts = await _advanced(connection, vault_id, command)
    moved = [each for each in accounts if each.went.checkpoint.seen_at is not None and _has_moved(each)]
    after = purse
    if moved:
        after = charged(purse, Stroops(sum([each.amount for each in moved])), now)
        await connection.execute(_WRITE, vault_id, *_columns(command, moved, now), *values_of(after))
    return DeltasRated(
        charged=Stroops(sum([each.amount for each in moved])),
        owed=after.owed,
        processed=sum([each.went.processed for each in accounts]),
        written_minutes=sum([_minutes(each.went.deltas) for each in accounts]),
        replayed_minutes=sum([_minutes(each.went.replayed) for each in accounts]),
        resets=sum([each.went.resets for each in accounts]),
        too_large=tuple((each.asked.account_id, reading) for each in accounts for reading in each.went.too_large),
    )


async def _advanced(connection: Connection, vault_id: VaultId, command: RateDelta) -> list[_Account]:
    metered = command.metered
    place = (metered.env, metered.node_id, metered.meter)
    wanted = [each.account_id for each in command.accounts]
    found = {str(row["account_id"]): row for row in await connection.fetch(_READ, vault_id, wanted, *place)}
    assert len(found) == len(wanted), "an account stays with its vault, and comes once"
    counters = {account_id: row["counter_id"] for account_id, row in found.items()}
    new = [account_id for account_id, counter_id in counters.items() if counter_id is None]
    if new:
        for row in await connection.fetch(_BEGIN, vault_id, new, *place):
            counters[str(row["account_id"])] = row["counter_id"]
    return [_advance(each, found[each.account_id], counters[each.account_id], command) for each in command.accounts]


def _advance(asked: AccountReadings, row: Row, counter_id: int, command: RateDelta) -> _Account:
    unit_price = command.rule.unit_price if row["unit_price"] is None else row["unit_price"]
    checkpoint = Checkpoint(row["epoch"] or 0, row["up"] or 0, row["down"] or 0, row["seen_at"])
    went = advance(
        checkpoint,
        asked.readings,
        Price.of(unit_price, row["multiplier"]),
        row["included_left"],
        command.metered.first_seen,
        command.metered.reset,
    )
    version = command.rule.version if row["rule_version"] is None else row["rule_version"]
    return _Account(asked, counter_id, unit_price, row["multiplier"], version, went)


def _has_moved(account: _Account) -> bool:
    return len(account.went.replayed) + len(account.went.too_large) < len(account.asked.readings)


def _minutes(parts: Iterable[Delta | Reading]) -> int:
    return len({each.collected_at.timestamp() // 60 for each in parts})


def _columns(command: RateDelta, accounts: Sequence[_Account], now: datetime) -> list[object]:
    metered = command.metered
    checkpoints = [each.went.checkpoint for each in accounts]
    deltas = [(place, delta) for place, each in enumerate(accounts, 1) for delta in each.went.deltas]
    lines = list({delta.line for _, delta in deltas})
    line_places = {line: place for place, line in enumerate(lines, 1)}
    return [
        _literal([each.asked.account_id for each in accounts]),
        _literal([each.counter_id for each in accounts]),
        _literal([each.epoch for each in checkpoints]),
        _literal([each.up for each in checkpoints]),
        _literal([each.down for each in checkpoints]),
        [each.seen_at for each in checkpoints],
        _literal([each.asked.event_id if each.went.deltas else "NULL" for each in accounts]),
        _literal([sum([delta.up + delta.down for delta in each.went.deltas]) for each in accounts]),
        _literal([each.amount for each in accounts]),
        _literal([sum([delta.included for delta in each.went.deltas]) for each in accounts]),
        [each.unit_price for each in accounts],
        [each.multiplier for each in accounts],
        [each.rule_version for each in accounts],
        _literal([place for place, _ in deltas]),
        _literal([delta.epoch for _, delta in deltas]),
        _literal([delta.from_up for _, delta in deltas]),
        _literal([delta.from_down for _, delta in deltas]),
        _literal([delta.up for _, delta in deltas]),
        _literal([delta.down for _, delta in deltas]),
        _literal([delta.included for _, delta in deltas]),
        _literal([delta.amount for _, delta in deltas]),
        _literal([delta.collected_at.isoformat() for _, delta in deltas]),
        metered.source_id,
        metered.region,
        _literal([line_places[delta.line] for _, delta in deltas]),
        metered.developer_id,
        metered.api_id,
        metered.endpoint_id,
        now,
        lines,
    ]


def _literal(values: Iterable[object]) -> str:
    """Return an array as PostgreSQL reads it, which the driver asks nothing of; of ids, numbers and instants only."""
    return "{" + ",".join(map(str, values)) + "}"
