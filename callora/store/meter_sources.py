"""Meter sources, how far each is read, the runs that have ended, and whose turn it is to collect."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal

import attrs

from callora.ledger.collecting import ERROR_CHARS_MAX, RUN_ERROR_CHARS_MAX, JobRun, SourceOffer, SourceStatus
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import ApiId, DeveloperId, EndpointId, UserId
from callora.ledger.money import ZERO
from callora.ledger.offers import ApiOffer, DatedPrice, EndpointOffer
from callora.store import apis
from callora.store.bridge import Connection, Database
from callora.store.reads.meters import FoundSource, find_source

Origin = Literal["environment", "operator"]
Lease = Literal["loop", "run"]

RUNS_KEPT: Final = timedelta(days=30)
OWNER_SUBJECT: Final = "callora:metering"
"""The user who owns the APIs that are made for sources; no issuer of tokens can name him."""
OWNER_NAME: Final = "Metering"
_NODE_INDEX: Final = "meter_sources_node"

_ADD_OWNER: Final = """
INSERT INTO users (user_id, name, subject, created_at) VALUES ($1, $2, $3, $4) ON CONFLICT (subject) DO NOTHING
"""

_ADD_OWNER_DEVELOPER: Final = """
INSERT INTO developers (developer_id, user_id, name, created_at)
SELECT $1, user_id, $2, $4 FROM users WHERE subject = $3
ON CONFLICT (user_id) DO NOTHING
"""

_FIND_OWNER: Final = """
SELECT d.developer_id FROM developers d JOIN users u ON u.user_id = d.user_id WHERE u.subject = $1
"""

_LOCK_API: Final = "SELECT api_id FROM apis WHERE api_id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE"

_PUT: Final = """
INSERT INTO meter_sources (source_id, origin, base_url, expected_node_id, expected_env, api_id, endpoint_id, enabled,
                           timeout_seconds, first_seen, reset, meter, region, credential_env, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $15)
ON CONFLICT (source_id) DO UPDATE SET
    origin = excluded.origin, base_url = excluded.base_url, expected_node_id = excluded.expected_node_id,
    expected_env = excluded.expected_env, api_id = excluded.api_id, endpoint_id = excluded.endpoint_id,
    enabled = excluded.enabled, timeout_seconds = excluded.timeout_seconds, first_seen = excluded.first_seen,
    reset = excluded.reset, meter = excluded.meter, region = excluded.region,
    credential_env = excluded.credential_env, updated_at = excluded.updated_at, removed_at = NULL
"""

_REMOVE: Final = """
UPDATE meter_sources SET enabled = false, removed_at = $3, updated_at = $3
WHERE source_id = $1 AND origin = $2 AND removed_at IS NULL
RETURNING true
"""

_REMOVE_OTHERS: Final = """
UPDATE meter_sources SET enabled = false, removed_at = $2, updated_at = $2
WHERE origin = 'environment' AND removed_at IS NULL AND source_id <> ALL ($1::text[])
"""

_ATTEMPTED: Final = "UPDATE meter_sources SET last_attempted_at = $2 WHERE source_id = $1"

_SUCCEEDED: Final = """
UPDATE meter_sources SET last_completed_until = $2, last_succeeded_at = $3, last_error = left($4, $5)
WHERE source_id = $1
"""

_PUSHED: Final = "UPDATE meter_sources SET last_succeeded_at = $2, last_error = '' WHERE source_id = $1"

_FAILED: Final = "UPDATE meter_sources SET last_error = left($2, $3) WHERE source_id = $1"

_ADD_RUN: Final = """
INSERT INTO job_runs (run_id, job, status, started_at, finished_at, processed_samples, written_minutes,
                      replayed_minutes, quarantined, invalid, resets, error, source_statuses, differences)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, left($12, $13), $14::jsonb, $15::jsonb)
"""

_FORGET_RUNS: Final = "DELETE FROM job_runs WHERE finished_at < $1"

# A lease is told by the database's clock, which all processes share.
_TAKE_LEASE: Final = """
UPDATE collector_leases
SET holder = $2, held_until = clock_timestamp() + $3::float8 * interval '1 second'
WHERE name = $1 AND (holder IS NULL OR holder = $2 OR held_until < clock_timestamp())
RETURNING true
"""

_GIVE_LEASE: Final = "UPDATE collector_leases SET holder = NULL, held_until = NULL WHERE name = $1 AND holder = $2"


@attrs.frozen
class SourceTaken:
    """The source cannot be as it is offered: it is there already, or its node is another source's."""

    field: Literal["source_id", "expected_node_id"]


@attrs.frozen
class ApiUnknown:
    """No API has the number."""


@attrs.frozen
class Owner:
    """Ids under which the owner of made APIs is stored, where he is not yet."""

    user_id: UserId
    developer_id: DeveloperId


Put = FoundSource | SourceTaken | ApiUnknown


async def put_source(
    database: Database, offer: SourceOffer, origin: Origin, owner: Owner, now: datetime, *, may_replace: bool
) -> Put:
    """Store a source, with the API and the endpoint that its charges are booked under; all or nothing.

    What exists under its id is changed only where `may_replace`, or where it was removed before; how far it was read
    stays.

    Raises:
        StoreUnavailable, StoreConflict: nothing was stored. OutcomeUnknown: it may be; again is safe where it may
            replace.
    """
    try:
        async with database.transaction() as connection:
            found = await find_source(connection, offer.source_id, removed=True, lock=True)
            if found is not None and not found.removed and not may_replace:
                return SourceTaken("source_id")
            api_id = await _api_of(connection, offer, found, owner, now)
            if api_id is None:
                return ApiUnknown()
            endpoint_id = await _endpoint_of(connection, offer.source_id, api_id, now)
            await connection.execute(
                _PUT,
                offer.source_id,
                origin,
                offer.base_url,
                offer.expected_node_id,
                offer.expected_env,
                api_id,
                endpoint_id,
                offer.enabled,
                float(offer.timeout_seconds),
                offer.first_seen,
                offer.reset,
                offer.meter,
                offer.region,
                offer.credential_env,
                now,
            )
            stored = await find_source(connection, offer.source_id)
            assert stored is not None
            return stored
    except StoreRefused as refused:
        if refused.constraint != _NODE_INDEX:
            raise
        return SourceTaken("expected_node_id")


async def _api_of(
    connection: Connection, offer: SourceOffer, found: FoundSource | None, owner: Owner, now: datetime
) -> ApiId | None:
    """Return the API that a source's charges are booked under, locked; one is made where the offer names none."""
    named = offer.api_id
    if named is None and found is not None:
        named = found.source.api_id
    if named is not None:
        api_id = await connection.fetch_value(_LOCK_API, named)
        return None if api_id is None else ApiId(api_id)
    await connection.execute(_ADD_OWNER, owner.user_id, OWNER_NAME, OWNER_SUBJECT, now)
    await connection.execute(_ADD_OWNER_DEVELOPER, owner.developer_id, OWNER_NAME, OWNER_SUBJECT, now)
    developer_id = DeveloperId(str(await connection.fetch_value(_FIND_OWNER, OWNER_SUBJECT)))
    slug = "meter-" + "".join(letter if letter.isalnum() else "-" for letter in offer.source_id.lower())
    # A draft is neither listed nor called. The URL is never asked for anything.
    made = ApiOffer(
        name=f"Meter source {offer.source_id}", base_url="https://metering.invalid", endpoints=(), status="draft"
    )
    slugs = (slug[:63], f"{slug[:50]}-{owner.user_id[-12:]}")
    api_id = await apis.add_api(connection, developer_id, slugs, made, now)
    assert api_id is not None, "the second slug ends with random digits"
    return api_id


async def _endpoint_of(connection: Connection, source_id: str, api_id: ApiId, now: datetime) -> EndpointId:
    """Return the endpoint of a source: made once, at a price of 0, and retired at once so that nobody can call it."""
    path = f"/meters/{source_id}"
    present = await apis.present_endpoints(connection, api_id, now)
    found = next((each.endpoint_id for each in present if (each.method, each.path) == ("*", path)), None)
    if found is not None:
        return found
    offer = EndpointOffer("*", path, (DatedPrice(ZERO, None),), description="Counters; not to be called")
    put = await apis.put_endpoints(connection, api_id, (offer,), present, now)
    await apis.retire_endpoint(connection, api_id, put.endpoint_ids[0], now)
    return put.endpoint_ids[0]


async def remove_source(database: Database, source_id: str, origin: Origin, now: datetime) -> bool:
    """Take a source away, its facts stay; return False where there is none of this origin."""
    return await database.fetch_value(_REMOVE, source_id, origin, now) is not None


async def remove_other_sources(database: Database, named: Sequence[str], now: datetime) -> None:
    """Take away every source of the environment that it names no more."""
    await database.execute(_REMOVE_OTHERS, list(named), now)


async def note_attempt(database: Database, source_id: str, now: datetime) -> None:
    """Note that a source is about to be asked."""
    await database.execute(_ATTEMPTED, source_id, now)


async def note_success(database: Database, source_id: str, read_until: datetime, now: datetime, notice: str) -> None:
    """Note how far a source is read.

    Args:
        notice: what should be known all the same, or nothing.
    """
    await database.execute(_SUCCEEDED, source_id, read_until, now, notice, ERROR_CHARS_MAX)


async def note_pushed(database: Database, source_id: str, now: datetime) -> None:
    """Note that a source's snapshots were pushed and rated; how far it is read stays."""
    await database.execute(_PUSHED, source_id, now)


async def note_failure(database: Database, source_id: str, error: str) -> None:
    """Note why a source was not read; how far it is read stays."""
    await database.execute(_FAILED, source_id, error, ERROR_CHARS_MAX)


async def add_run(database: Database, run: JobRun) -> None:
    """Keep a run that has ended, and forget those past RUNS_KEPT."""
    differences = [[each.rule, each.count, each.example] for each in run.differences]
    async with database.transaction() as connection:
        await connection.execute(_FORGET_RUNS, run.finished_at - RUNS_KEPT)
        await connection.execute(
            _ADD_RUN,
            run.run_id,
            run.job,
            run.status,
            run.started_at,
            run.finished_at,
            *attrs.astuple(run.counted),
            run.error,
            RUN_ERROR_CHARS_MAX,
            json.dumps([_status_values(each) for each in run.source_statuses]),
            json.dumps(differences),
        )


def _status_values(status: SourceStatus) -> list[str | None]:
    dates = (status.last_completed_until, status.last_attempted_at, status.last_succeeded_at)
    return [status.source_id, *(None if each is None else each.isoformat() for each in dates), status.last_error]


async def take_lease(database: Database, name: Lease, holder: str, seconds: float) -> bool:
    """Take or renew a lease for this long; return False where another holds it."""
    return await database.fetch_value(_TAKE_LEASE, name, holder, seconds) is not None


async def give_lease(database: Database, name: Lease, holder: str) -> None:
    """Give a lease back, if it is held."""
    await database.execute(_GIVE_LEASE, name, holder)
