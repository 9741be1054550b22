"""The collector: windows as they are asked for, pages, watermarks, and that one source is never another's trouble."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import attrs
import pytest
import trio

from callora.actors.collector import NoSuchNode
from callora.actors.rating import Rated, Rater
from callora.ledger.collecting import JobRun
from callora.ledger.snapshots import MeterSource, Snapshot, parse_pushed
from callora.store.bridge import Database
from callora.store.reads.meters import enabled_sources, latest_run
from tests.simulation.ledgers import NOON
from tests.support.client import closed_port, watchdog
from tests.support.collecting import SETTINGS, TOKEN, Collecting, Process, asked, collecting, offer, page, sent
from tests.support.counters import minute
from tests.support.upstream import (
    Exchange,
    Handler,
    big,
    close_silently,
    garbage,
    gated,
    raw_upstream,
    respond,
    sequence,
    silent,
    wrong_length,
)

HOLDER = "SELECT holder FROM collector_leases WHERE name = 'loop'"


async def run(process: Process, job: Literal["collect-and-rate", "reconcile"] = "collect-and-rate") -> JobRun:
    """Return what a run of a job came to."""
    with watchdog("a run to end", 60):
        made = await process.collector.do(job)
    assert isinstance(made, JobRun)
    return made


def pushed(*snapshots: dict[str, Any]) -> tuple[Snapshot, ...]:
    parsed = parse_pushed(json.dumps(snapshots).encode())
    assert isinstance(parsed, tuple)
    return parsed


async def until_read(at: Collecting, source_id: str) -> None:
    """Return when a source was read to the end of its window."""
    with watchdog(f"{source_id} to be read", 60):
        while (await at.status(source_id)).last_succeeded_at is None:  # noqa: ASYNC110 - another task stores it
            await trio.lowlevel.checkpoint()


async def test_c10_a_window_is_asked_for_as_the_contract_says(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        made = await run(await at.process(offer(f"{exporter.url}/base")))
        assert made.status == "ok"
        (request,) = exporter.requests
        assert request.target.startswith("/base/v1/snapshots/window?")
        assert asked(request) == {"since": "2026-11-21T11:57:00Z", "until": "2026-11-21T11:59:00Z", "limit": "120"}
        assert request.header("Accept") == "application/json"
        assert request.header("Authorization") == "Bearer tests-token"
        assert (await at.status()).last_completed_until == minute(-1)


async def test_c10_a_window_that_begins_after_it_ends_is_not_asked_for(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        process = await at.process(offer(exporter.url))
        await run(process)
        await database.execute("UPDATE meter_sources SET last_completed_until = $1", minute(60))
        assert (await run(process)).status == "ok"
        assert len(exporter.requests) == 1
        assert (await at.status()).last_completed_until == minute(-1)


async def test_c11_pages_are_followed_by_their_cursors_to_the_last_digit(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await at.payer()
        cursor = "2026-11-21T11:57:30.123456789+00:00"
        exporter.handler = sequence(
            page(sent(minute(-2.5), {1: (10, 0)}), cursor=cursor),
            page(sent(minute(-2), {1: (30, 5)}), cursor="2026-11-21T11:57:30.12345679Z"),
            page(sent(minute(-1.5), {1: (40, 5)})),
        )
        made = await run(await at.process(offer(exporter.url)))
        assert (made.status, made.counted.processed_samples) == ("ok", 3)
        assert [asked(each).get("cursor") for each in exporter.requests] == [
            None,
            cursor,
            "2026-11-21T11:57:30.12345679Z",
        ]
        assert await at.buckets() == [("11:57", 10, 0, 10), ("11:58", 30, 5, 35)]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (page(more=True), "its answer has more and no next_cursor"),
        (page(cursor="tomorrow"), "its answer has a next_cursor that is no RFC 3339 instant"),
    ],
)
async def test_c11_a_page_that_leads_nowhere_fails_its_source(database: Database, answer: Handler, said: str) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        process = await at.process(offer(exporter.url))
        await run(process)
        before = await at.status()
        at.clock.advance(60)
        exporter.handler = answer
        made = await run(process)
        assert (made.status, made.error) == ("error", f"s-1: {said}")
        assert await at.status() == attrs.evolve(before, last_attempted_at=at.clock.at, last_error=said)


async def test_c12_the_watermark_is_the_latest_snapshot_and_a_failed_window_is_made_up_for(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await at.payer()
        latest = minute(-1.5) + timedelta(microseconds=7)
        exporter.handler = sequence(
            page(sent(latest, {1: (20, 0)}), sent(minute(-2.5), {1: (10, 0)})),
            respond(500),
            page(sent(minute(2), {1: (50, 0)})),
        )
        process = await at.process(offer(exporter.url))
        await run(process)
        assert (await at.status()).last_completed_until == latest
        at.clock.advance(120)
        assert (await run(process)).error == "s-1: it answered 500"
        assert (await at.status()).last_completed_until == latest
        at.clock.advance(120)
        assert (await run(process)).status == "ok"
        assert asked(exporter.requests[2])["since"] == "2026-11-21T11:56:30.000007Z"
        assert (await at.status()).last_completed_until == minute(2)
        assert await at.buckets() == [("11:57", 10, 0, 10), ("11:58", 10, 0, 10), ("12:02", 30, 0, 30)]


@pytest.mark.parametrize("field", ["node", "env"])
async def test_c13_a_snapshot_of_another_node_fails_its_source_and_nothing_more_is_written(
    database: Database, field: str
) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await at.payer()
        other: dict[str, Any] = {field: "other"}
        exporter.handler = page(sent(minute(-2.5), {1: (10, 0)}), sent(minute(-2), {1: (20, 0)}, **other))
        made = await run(await at.process(offer(exporter.url)))
        assert made.status == "error"
        assert "than expected_" in made.error
        assert await at.buckets() == []
        assert (await at.status()).last_completed_until is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (respond(401), "it answered 401"),
        (respond(302, [("Location", "http://127.0.0.1:1/")]), "it answered 302"),
        (respond(200, [], b"{"), "its answer is not JSON"),
        (close_silently(), "its answer is no HTTP"),
        (garbage(), "its answer is no HTTP"),
        (wrong_length(100, 10), "its answer broke off, came too slowly or was longer than 32 MiB"),
        (big(33), "its answer broke off, came too slowly or was longer than 32 MiB"),
        (silent(), "it did not answer in time"),
        (page(sent(NOON + timedelta(minutes=6), {1: (1, 1)})), "a snapshot is dated in the future"),
    ],
)
async def test_c14_whatever_is_no_page_is_told_of_its_source(database: Database, answer: Handler, said: str) -> None:
    seconds = 0.3 if "in time" in said else 30
    async with collecting(database) as at, raw_upstream(answer) as exporter:
        made = await run(await at.process(offer(exporter.url, timeout_seconds=seconds)))
        assert (made.status, made.error) == ("error", f"s-1: {said}")
        assert made.source_statuses[0].last_error == (await at.status()).last_error == said


async def test_c14_a_source_that_nobody_answers_for_is_told(database: Database) -> None:
    with closed_port() as port:
        async with collecting(database) as at:
            made = await run(await at.process(offer(f"http://127.0.0.1:{port}")))
            assert made.error == "s-1: it cannot be reached"


async def test_wc12_a_cursor_that_does_not_move_forward_ends_the_source(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page(cursor="2026-11-21T11:58:00.5Z")) as exporter:
        made = await run(await at.process(offer(exporter.url)))
        assert made.error == "s-1: its cursor does not move forward"
        assert len(exporter.requests) == 2


async def test_wc12_a_source_with_more_pages_than_a_run_reads_is_read_on_by_the_next(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await at.payer()
        exporter.handler = sequence(
            page(sent(minute(-2.8), {1: (10, 0)}), cursor="2026-11-21T11:57:12Z"),
            page(sent(minute(-2.5), {1: (20, 0)}), cursor="2026-11-21T11:57:30Z"),
            page(sent(minute(-2.5), {1: (20, 0)}), sent(minute(-1.5), {1: (50, 0)})),
        )
        process = await at.process(offer(exporter.url), settings=attrs.evolve(SETTINGS, pages_max=2))
        made = await run(process)
        assert (made.status, made.error) == ("partial", "s-1: there was more after 2 pages; the next run goes on")
        assert (await at.status()).last_completed_until == minute(-2.5)
        assert (await run(process)).status == "ok"
        assert asked(exporter.requests[2])["since"] == "2026-11-21T11:55:30Z"
        assert await at.buckets() == [("11:57", 20, 0, 20), ("11:58", 30, 0, 30)]


async def test_wc12_pages_without_end_that_bring_nothing_new_are_an_error(database: Database) -> None:
    numbers = iter(range(10**6))

    async def endless(exchange: Exchange) -> None:
        await page(cursor=f"2026-11-21T11:57:00.{next(numbers):09}Z")(exchange)

    async with collecting(database) as at, raw_upstream(endless) as exporter:
        made = await run(await at.process(offer(exporter.url), settings=attrs.evolve(SETTINGS, pages_max=20)))
        assert (made.status, made.error) == ("error", "s-1: 20 pages brought nothing new")
        assert (await at.status()).last_completed_until is None


async def test_wc12_a_source_that_hangs_delays_no_other_and_no_probe(database: Database) -> None:
    gate = trio.Event()
    async with (
        collecting(database) as at,
        raw_upstream(gated(gate, page())) as slow,
        raw_upstream(page(sent(minute(-2), {1: (10, 0)}, node="node-2"))) as quick,
    ):
        await at.payer()
        process = await at.process(
            offer(slow.url, "slow", timeout_seconds=60), offer(quick.url, expected_node_id="node-2")
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, process)
            await slow.wait_requests(1)
            await until_read(at, "s-1")
            assert await at.buckets() == [("11:58", 10, 0, 10)]
            with watchdog("a probe"):
                assert not (await process.collector.health()).ok
                assert await process.collector.latest() is None
            gate.set()
        assert (await process.collector.health()).ok


async def test_one_source_fails_and_the_other_did_its_work(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(respond(500)) as bad, raw_upstream(page()) as good:
        process = await at.process(offer(bad.url, "bad"), offer(good.url, expected_node_id="node-2"))
        made = await run(process)
        assert (made.status, made.error) == ("partial", "bad: it answered 500")
        assert [each.source_id for each in made.source_statuses] == ["bad", "s-1"]
        assert await latest_run(database) == made


async def test_c09_without_an_enabled_source_a_run_is_an_error(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        process = await at.process(offer(exporter.url, enabled=False))
        made = await run(process)
        assert (made.status, made.error) == ("error", "no meter source is enabled")
        assert exporter.requests == []


async def test_c08_runs_of_two_processes_never_overlap(database: Database) -> None:
    at_once, most = 0, 0

    async def counted(exchange: Exchange) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        at_once -= 1
        await page()(exchange)

    async with collecting(database) as at, raw_upstream(counted) as exporter:
        processes = [await at.process(offer(exporter.url)) for _ in range(2)]
        async with trio.open_nursery() as nursery:
            for process in processes * 2:
                nursery.start_soon(run, process)
        assert len(exporter.requests) == 4
        assert most == 1


async def test_c08_one_process_collects_at_its_start_and_at_intervals_and_another_takes_over(
    database: Database,
) -> None:
    often = attrs.evolve(SETTINGS, interval_seconds=0.05)
    async with collecting(database, leads=True) as at, raw_upstream(page()) as exporter:
        first = await at.process(offer(exporter.url), settings=often)
        await exporter.wait_requests(3)
        holder = await database.fetch_value(HOLDER)
        second = await at.process(offer(exporter.url), settings=often)
        await exporter.wait_requests(len(exporter.requests) + 3)
        assert await database.fetch_value(HOLDER) == holder
        first.scope.cancel()
        with watchdog("the other to take over", 60):
            while await database.fetch_value(HOLDER) in (holder, None):  # noqa: ASYNC110 - another task stores it
                await trio.lowlevel.checkpoint()
        count = len(exporter.requests)
        await exporter.wait_requests(count + 3)
        assert (await second.collector.health()).ok


async def test_wc11_who_asked_for_a_run_may_leave_and_it_goes_on(database: Database) -> None:
    gate = trio.Event()
    async with collecting(database) as at, raw_upstream(gated(gate, page())) as exporter:
        process = await at.process(offer(exporter.url))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.collector.do, "collect-and-rate")
            await exporter.wait_requests(1)
            nursery.cancel_scope.cancel()
        gate.set()
        await until_read(at, "s-1")
        assert (await run(process)).status == "ok"
        assert await database.fetch_value("SELECT count(*) FROM job_runs") == 2


class BrokenRater(Rater):
    """Has a defect for one source."""

    def __init__(self) -> None:
        """Nothing is rated."""

    async def rate(self, source: MeterSource, snapshots: Sequence[Snapshot]) -> Rated:
        """Break for the source that is called bad."""
        await trio.lowlevel.checkpoint()
        if source.source_id == "bad":
            raise ZeroDivisionError
        return Rated(processed_samples=len(snapshots), latest=snapshots[-1].collected_at)


async def test_a_defect_met_with_one_source_stays_with_it(database: Database) -> None:
    async with (
        collecting(database) as at,
        raw_upstream(page(sent(minute(-2), {}))) as bad,
        raw_upstream(page(sent(minute(-2), {}, node="node-2"))) as good,
    ):
        process = await at.process(
            offer(bad.url, "bad"), offer(good.url, expected_node_id="node-2"), rater=BrokenRater()
        )
        made = await run(process)
        assert (made.status, made.error) == ("partial", "bad: reading it failed inside; the log says how")
        assert made.counted.processed_samples == 1


async def test_wc17_each_source_is_shown_its_own_credential_and_none_without_one(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as one, raw_upstream(page()) as two:
        process = await at.process(
            offer(one.url),
            offer(two.url, "s-2", expected_node_id="node-2", credential_env=f"{TOKEN}_2"),
            offer(two.url, "s-3", expected_node_id="node-3", credential_env=f"{TOKEN}_3"),
        )
        made = await run(process)
        assert made.error == f"s-3: its credential is missing: {TOKEN}_3 is not set"
        tokens = [[each.header("Authorization") for each in exporter.requests] for exporter in (one, two)]
        assert tokens == [["Bearer tests-token"], ["Bearer another-token"]]


async def test_what_the_environment_names_no_more_is_read_no_more_and_keeps_how_far_it_was_read(
    database: Database,
) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await run(await at.process(offer(exporter.url), offer(exporter.url, "s-2", expected_node_id="node-2")))
        reached = (await at.status()).last_completed_until
        api_id = (await enabled_sources(database))[0].source.api_id
        await run(await at.process(offer(exporter.url, "s-2", expected_node_id="node-2")))
        assert [each.source.source_id for each in await enabled_sources(database)] == ["s-2"]
        await at.process(offer(exporter.url))
        await run(await at.process(offer(exporter.url)))
        (again,) = await enabled_sources(database)
        assert (again.source.source_id, again.source.api_id) == ("s-1", api_id)
        assert again.status.last_completed_until == reached


async def test_wc16_a_source_that_is_anothers_node_is_told_and_not_read(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await run(await at.process(offer(exporter.url)))
        await database.execute("UPDATE meter_sources SET origin = 'operator'")
        made = await run(await at.process(offer(exporter.url, "s-2"), offer(exporter.url, "s-3", api_id=10**9)))
        assert made.status == "partial"
        assert made.error == "s-2: its node is another source's; s-3: no API has its api_id"


async def test_the_api_of_a_source_can_be_called_by_nobody(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page()) as exporter:
        await run(await at.process(offer(exporter.url)))
        row = await database.fetch_row(
            "SELECT a.status, e.retired_at IS NOT NULL AS retired, p.amount FROM meter_sources m"
            " JOIN apis a USING (api_id) JOIN api_endpoints e USING (endpoint_id)"
            " JOIN endpoint_prices p USING (endpoint_id)"
        )
        assert row is not None
        assert (row["status"], row["retired"], row["amount"]) == ("draft", True, 0)


async def test_wc15_reconciling_collects_compares_the_books_and_lists_what_does_not_add_up(database: Database) -> None:
    async with collecting(database) as at, raw_upstream(page(sent(minute(-2), {1: (10, 5)}))) as exporter:
        vault_id = await at.payer()
        process = await at.process(offer(exporter.url))
        made = await run(process, "reconcile")
        assert (made.job, made.status, made.differences) == ("reconcile", "ok", ())
        assert made.counted.processed_samples == 1
        await database.execute("UPDATE vaults SET available = available + 1")
        at.clock.advance(1)
        made = await run(process, "reconcile")
        assert made.status == "partial"
        assert any(each.example == vault_id and "every balance is" in each.rule for each in made.differences)
        assert (await latest_run(database)) == made
        await database.execute("UPDATE vaults SET available = available - 1")


async def test_c25_what_is_pushed_goes_the_same_way_and_only_for_a_source_that_is_known(database: Database) -> None:
    async with collecting(database) as at:
        await at.payer()
        only = attrs.evolve(SETTINGS, pushed=True)
        process = await at.process(offer("http://localhost:1"), settings=only)
        made = await process.collector.ingest(pushed(sent(minute(1), {1: (30, 0)}), sent(minute(0), {1: (10, 0)})))
        assert isinstance(made, JobRun)
        assert (made.job, made.status, made.counted.processed_samples) == ("ingest", "ok", 2)
        again = await process.collector.ingest(pushed(sent(minute(1), {1: (30, 0)})))
        assert isinstance(again, JobRun)
        assert (again.counted.processed_samples, again.counted.replayed_minutes) == (0, 1)
        assert await at.buckets() == [("12:00", 10, 0, 10), ("12:01", 20, 0, 20)]
        for other in (sent(minute(1), {}, node="other"), sent(minute(6), {1: (99, 0)})):
            refused = await process.collector.ingest(pushed(sent(minute(2), {1: (40, 0)}), other))
            assert isinstance(refused, NoSuchNode)
        assert len(await at.buckets()) == 2
