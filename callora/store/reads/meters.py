"""Meter sources and runs, as they are looked at."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Protocol, cast

import attrs

from callora.ledger.collecting import Counted, Difference, JobRun, SourceStatus
from callora.ledger.ids import ApiId, EndpointId
from callora.ledger.snapshots import FirstSeen, MeterSource, ResetPolicy
from callora.store.bridge import Database as Database
from callora.store.bridge import Row

_COLUMNS: Final = """
source_id, origin, base_url, expected_node_id, expected_env, api_id, endpoint_id, enabled, timeout_seconds, first_seen,
reset, meter, region, credential_env, last_completed_until, last_attempted_at, last_succeeded_at, last_error,
created_at, removed_at
"""

_FIND: Final = f"SELECT {_COLUMNS} FROM meter_sources WHERE source_id = $1 AND (removed_at IS NULL OR $2)"  # noqa: S608

_ENABLED: Final = f"SELECT {_COLUMNS} FROM meter_sources WHERE enabled ORDER BY source_id"  # noqa: S608

_LIST: Final = f"""
SELECT {_COLUMNS} FROM meter_sources WHERE removed_at IS NULL AND source_id > $1 ORDER BY source_id LIMIT $2
"""  # noqa: S608 - columns of ours

_ANY: Final = "SELECT EXISTS (SELECT FROM meter_sources WHERE enabled)"

_LATEST: Final = """
SELECT run_id, job, status, started_at, finished_at, processed_samples, written_minutes, replayed_minutes, quarantined,
       invalid, resets, error, source_statuses::text AS source_statuses, differences::text AS differences
FROM job_runs ORDER BY finished_at DESC, run_id DESC LIMIT 1
"""


class Reading(Protocol):
    """A connection, or the pool of them."""

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        """Return all rows."""
        ...

    async def fetch_row(self, sql: str, *args: object) -> Row | None:
        """Return the first row, or None."""
        ...

    async def fetch_value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row, or None."""
        ...


@attrs.frozen
class FoundSource:
    """A source, who keeps it, and how far it is read."""

    source: MeterSource
    origin: str
    """environment or operator."""
    status: SourceStatus
    created_at: datetime
    removed: bool


async def find_source(
    reading: Reading, source_id: str, *, removed: bool = False, lock: bool = False
) -> FoundSource | None:
    """Return a source.

    Args:
        removed: whether one that was taken away counts.
        lock: whether nobody else may change it until the transaction ends.
    """
    row = await reading.fetch_row(_FIND + " FOR UPDATE" * lock, source_id, removed)
    return None if row is None else _found(row)


async def enabled_sources(reading: Reading) -> list[FoundSource]:
    """Return the sources that are read, by their ids."""
    return [_found(row) for row in await reading.fetch(_ENABLED)]


async def list_sources(reading: Reading, after: str, limit: int) -> list[FoundSource]:
    """Return at most `limit` sources past an id."""
    return [_found(row) for row in await reading.fetch(_LIST, after, limit)]


async def has_sources(reading: Reading) -> bool:
    """Tell whether any source is read."""
    return bool(await reading.fetch_value(_ANY))


async def latest_run(reading: Reading) -> JobRun | None:
    """Return the run that ended last."""
    row = await reading.fetch_row(_LATEST)
    if row is None:
        return None
    return JobRun(
        run_id=str(row["run_id"]),
        job=row["job"],
        status=row["status"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        counted=Counted(*(row[each.name] for each in attrs.fields(Counted))),
        error=row["error"],
        source_statuses=tuple(_status(values) for values in json.loads(row["source_statuses"])),
        differences=tuple(Difference(*values) for values in json.loads(row["differences"])),
    )


def _status(values: Sequence[str | None]) -> SourceStatus:
    dates = [None if each is None else datetime.fromisoformat(each) for each in values[1:4]]
    return SourceStatus(cast("str", values[0]), dates[0], dates[1], dates[2], cast("str", values[4]))


def _found(row: Row) -> FoundSource:
    return FoundSource(
        source=MeterSource(
            source_id=row["source_id"],
            base_url=row["base_url"],
            expected_node_id=row["expected_node_id"],
            expected_env=row["expected_env"],
            api_id=ApiId(row["api_id"]),
            endpoint_id=EndpointId(row["endpoint_id"]),
            enabled=row["enabled"],
            timeout_seconds=row["timeout_seconds"],
            first_seen=cast("FirstSeen", row["first_seen"]),
            reset=cast("ResetPolicy", row["reset"]),
            meter=row["meter"],
            region=row["region"],
            credential_env=row["credential_env"],
        ),
        origin=row["origin"],
        status=SourceStatus(
            row["source_id"],
            row["last_completed_until"],
            row["last_attempted_at"],
            row["last_succeeded_at"],
            row["last_error"],
        ),
        created_at=row["created_at"],
        removed=row["removed_at"] is not None,
    )
