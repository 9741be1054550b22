"""Samples that could be charged to nobody, kept until an operator has them rated or drops them.

Bounded: of one subject the latest READINGS_MAX are kept, of one source SOURCE_MAX in all. Counters only grow, so what
is dropped of a subject was counted by what came after it, but for usage that ended in a reset.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal, cast

import attrs

from callora.ledger.counters import Reading
from callora.ledger.ids import ApiId, EndpointId
from callora.ledger.snapshots import FirstSeen, ResetPolicy
from callora.store.bridge import Database, Row

READINGS_MAX: Final = 1440
"""A day's, where a snapshot comes each minute."""
SOURCE_MAX: Final = 200_000
"""A source that sends nonsense fills no disk."""

Reason = Literal["unknown_subject", "charge_too_large"]

_KEPT: Final = "SELECT count(*) FROM quarantined_samples WHERE source_id = $1"

_ADD: Final = """
INSERT INTO quarantined_samples (subject, source_id, env, node_id, meter, collected_at, reason, up, down, line, region,
                                 api_id, endpoint_id, first_seen, reset, received_at)
SELECT i.subject, $1, $2, $3, $4, i.collected_at, $5, i.up, i.down, i.line, $6, $7, $8, $9, $10, $11
FROM unnest($12::uuid[], $13::timestamptz[], $14::bigint[], $15::bigint[], $16::text[])
    AS i (subject, collected_at, up, down, line)
ON CONFLICT DO NOTHING
"""

_THIN: Final = """
DELETE FROM quarantined_samples q USING (
    SELECT subject, collected_at, row_number() OVER (PARTITION BY subject ORDER BY collected_at DESC) AS place
    FROM quarantined_samples
    WHERE subject = ANY ($5::uuid[]) AND source_id = $1 AND env = $2 AND node_id = $3 AND meter = $4
) AS o
WHERE o.place > $6 AND q.subject = o.subject AND q.collected_at = o.collected_at
    AND q.source_id = $1 AND q.env = $2 AND q.node_id = $3 AND q.meter = $4
"""

_OF_SUBJECT: Final = """
SELECT source_id, env, node_id, meter, collected_at, up, down, line, region, api_id, endpoint_id, first_seen, reset
FROM quarantined_samples WHERE subject = $1
ORDER BY source_id, env, node_id, meter, collected_at
"""

_DROP: Final = """
DELETE FROM quarantined_samples
WHERE subject = $1 AND source_id = $2 AND env = $3 AND node_id = $4 AND meter = $5 AND collected_at = ANY ($6)
"""

_DROP_ALL: Final = (
    "WITH gone AS (DELETE FROM quarantined_samples WHERE subject = $1 RETURNING 1) SELECT count(*) FROM gone"
)


@attrs.frozen
class Origin:
    """Where samples came from, and how their source was read."""

    source_id: str
    env: str
    node_id: str
    meter: str
    region: str
    api_id: ApiId
    endpoint_id: EndpointId
    first_seen: FirstSeen
    reset: ResetPolicy


async def add(
    database: Database, origin: Origin, reason: Reason, samples: Sequence[tuple[str, Reading]], now: datetime
) -> None:
    """Keep samples by subject, as far as there is room; those that are kept already stay as they are."""
    room = SOURCE_MAX - await database.fetch_value(_KEPT, origin.source_id)
    kept = samples[: max(0, room)]
    if not kept:
        return
    place = (origin.source_id, origin.env, origin.node_id, origin.meter)
    await database.execute(
        _ADD,
        *place,
        reason,
        origin.region,
        origin.api_id,
        origin.endpoint_id,
        origin.first_seen,
        origin.reset,
        now,
        [subject for subject, _ in kept],
        [reading.collected_at for _, reading in kept],
        [reading.up for _, reading in kept],
        [reading.down for _, reading in kept],
        [reading.line for _, reading in kept],
    )
    await database.execute(_THIN, *place, sorted({subject for subject, _ in kept}), READINGS_MAX)


async def of_subject(database: Database, subject: str) -> Sequence[tuple[Origin, Sequence[Reading]]]:
    """Return what is kept of a subject, by origin, the earliest first in each."""
    found: dict[Origin, list[Reading]] = {}
    for row in await database.fetch(_OF_SUBJECT, subject):
        reading = Reading(row["collected_at"], row["up"], row["down"], row["line"])
        found.setdefault(_origin(row), []).append(reading)
    return list(found.items())


async def drop(database: Database, subject: str, origin: Origin, readings: Sequence[Reading]) -> None:
    """Keep these no longer: they are rated."""
    moments = [reading.collected_at for reading in readings]
    await database.execute(_DROP, subject, origin.source_id, origin.env, origin.node_id, origin.meter, moments)


async def drop_all(database: Database, subject: str) -> int:
    """Keep nothing of a subject any longer; return how many samples that were."""
    return int(await database.fetch_value(_DROP_ALL, subject))


def _origin(row: Row) -> Origin:
    return Origin(
        row["source_id"],
        row["env"],
        row["node_id"],
        row["meter"],
        row["region"],
        ApiId(row["api_id"]),
        EndpointId(row["endpoint_id"]),
        cast(FirstSeen, row["first_seen"]),
        cast(ResetPolicy, row["reset"]),
    )
