"""Jobs over meter sources, what is pushed, how the last run went, and what this process was started from."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import trio
from pydantic import Field

from callora.actors.collector import Collector, NoSuchNode
from callora.actors.exporter import PAGE_BYTES_MAX, PARSED_AT_ONCE
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, InstantOut, invalid, iso
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.collecting import Job, JobRun
from callora.ledger.images import Image
from callora.ledger.outcomes import Overloaded
from callora.ledger.snapshots import Malformed, parse_pushed

_RETRY: Final = {"Retry-After": "1"}
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"


class SourceStatusOut(Form):
    """How far a meter source is read."""

    source_id: str
    last_completed_until: InstantOut | None
    last_attempted_at: InstantOut | None
    last_succeeded_at: InstantOut | None
    last_error: str


class DifferenceOut(Form):
    """What of the books does not add up."""

    rule: str = Field(description="What should hold.")
    count: int = Field(description="How many break it.")
    example: str


class JobOut(Form):
    """A run, and what came of it."""

    job: str = Field(description="collect-and-rate, reconcile or ingest; empty before the first run.")
    started_at: InstantOut | None
    finished_at: InstantOut | None
    processed_samples: int
    written_minutes: int
    replayed_minutes: int = Field(description="Counters' minutes that were rated before, and changed nothing.")
    quarantined_samples: int = Field(description="Samples of subjects without an account; an operator can replay them.")
    invalid_samples: int
    resets: int = Field(description="Counters that began anew.")
    status: Literal["", "ok", "partial", "error", "disabled"]
    error: str
    source_statuses: list[SourceStatusOut]
    differences: list[DifferenceOut] = Field(description="Of reconcile: what does not add up.")


class PingOut(Form):
    """What this process was started from. What is not known is empty."""

    image: str
    tag: str
    commit: str
    version: str


def _instant(moment: Any) -> str | None:
    return None if moment is None else iso(moment)


def shown(run: JobRun) -> JobOut:
    """Return a run as it is shown."""
    counted = run.counted
    return JobOut(
        job=run.job,
        started_at=iso(run.started_at),
        finished_at=iso(run.finished_at),
        processed_samples=counted.processed_samples,
        written_minutes=counted.written_minutes,
        replayed_minutes=counted.replayed_minutes,
        quarantined_samples=counted.quarantined,
        invalid_samples=counted.invalid,
        resets=counted.resets,
        status=run.status,
        error=run.error,
        source_statuses=[
            SourceStatusOut(
                source_id=each.source_id,
                last_completed_until=_instant(each.last_completed_until),
                last_attempted_at=_instant(each.last_attempted_at),
                last_succeeded_at=_instant(each.last_succeeded_at),
                last_error=each.last_error,
            )
            for each in run.source_statuses
        ],
        differences=[DifferenceOut(rule=each.rule, count=each.count, example=each.example) for each in run.differences],
    )


def _nothing(job: str, status: Literal["", "error", "disabled"], error: str) -> JobOut:
    """Return what is shown where there was no run."""
    return JobOut(
        job=job,
        started_at=None,
        finished_at=None,
        processed_samples=0,
        written_minutes=0,
        replayed_minutes=0,
        quarantined_samples=0,
        invalid_samples=0,
        resets=0,
        status=status,
        error=error,
        source_statuses=[],
        differences=[],
    )


def job_routes(collector: Collector, image: Image) -> Routes:
    """Return the routes of jobs, of what is pushed, and of what this process is."""
    routes = Routes("Metering")
    _running_routes(routes, collector)

    @routes.add(
        "POST",
        "/v1/ingest/snapshots",
        access=Access.SERVICE,
        raw_body=(JSON, NDJSON),
        body_bytes_max=PAGE_BYTES_MAX,
        answers={200: JobOut, 422: JobOut},
        problems=("OUTCOME_UNKNOWN",),
    )
    async def ingest_snapshots(ask: Ask[Any, Any, Any]) -> Answer:
        """Rate snapshots that a node pushes: one object, an array of them, or one a line.

        Fields that are not known are ignored. Sent again, nothing is charged twice.
        """
        if len(ask.raw) > PARSED_AT_ONCE:
            parsed = await trio.to_thread.run_sync(parse_pushed, ask.raw)
        else:
            await trio.lowlevel.checkpoint()
            parsed = parse_pushed(ask.raw)
        if isinstance(parsed, Malformed):
            if parsed.kind == "unreadable":
                raise invalid("body", f"{parsed.reason}: {json.dumps(parsed.quoted)}", "INVALID_FORMAT")
            return Answer(_nothing("ingest", "error", f"the body {parsed.reason}"), 422)
        made = await collector.ingest(parsed)
        if isinstance(made, NoSuchNode):
            return Answer(_nothing("ingest", "error", made.reason), 422)
        return Answer(shown(made))

    @routes.add("GET", "/api/ping", access=Access.PUBLIC, answers={200: PingOut})
    async def get_ping(_: Ask[Any, Any, Any]) -> Answer:
        """What image this process was started from, as IMAGE says."""
        await trio.lowlevel.checkpoint()
        return Answer(PingOut(image=image.reference, tag=image.tag, commit=image.commit, version=image.commit))

    return routes


def _running_routes(routes: Routes, collector: Collector) -> None:
    answers: Mapping[int, type[Form]] = {200: JobOut, 503: JobOut}

    async def run(job: Job) -> Answer:
        if collector.pushed:
            await trio.lowlevel.checkpoint()
            return Answer(_nothing(job, "disabled", "BILLING_INGEST_MODE is push: no job runs"), 503)
        made = await collector.do(job)
        if isinstance(made, Overloaded):
            raise ProblemRaised("SERVICE_UNAVAILABLE", "Too many runs are waiting", headers=_RETRY)
        return Answer(shown(made), 503 if made.status == "error" else 200)

    @routes.add(
        "POST", "/v1/jobs/collect-and-rate", access=Access.SERVICE, answers=answers, problems=("OUTCOME_UNKNOWN",)
    )
    async def collect_and_rate(_: Ask[Any, Any, Any]) -> Answer:
        """Read every meter source now and rate what it says; 503 where nothing could be done.

        Waits for a run that is under way, and then for its own. Who leaves stops nothing.
        """
        return await run("collect-and-rate")

    @routes.add("POST", "/v1/jobs/reconcile", access=Access.SERVICE, answers=answers, problems=("OUTCOME_UNKNOWN",))
    async def reconcile_meters(_: Ask[Any, Any, Any]) -> Answer:
        """The same, and then compare the books: balances, holds, credits, minutes and counters.

        What does not add up is listed, and the run is partial.
        """
        return await run("reconcile")

    @routes.add("GET", "/v1/status", access=Access.SERVICE, answers={200: JobOut})
    async def get_job_status(_: Ask[Any, Any, Any]) -> Answer:
        """The run that ended last, of any process and also before a restart."""
        run = await collector.latest()
        return Answer(_nothing("", "", "") if run is None else shown(run))
