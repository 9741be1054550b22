"""The reference exporter: one seed is one node, its window is the contract, and its truth is what a reader gets."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from callora.exporter_sim import SimNode, SimPlan, make_exporter
from callora.ledger.snapshots import Page, parse_instant, parse_page
from tests.simulation.ledgers import NOON, TestClock
from tests.support.processes import callora

BEGAN = NOON - timedelta(hours=1)
WHOLE = {"since": "2026-11-21T00:00:00Z", "until": "2026-11-21T12:00:00Z"}


async def get(clock: TestClock, plan: SimPlan, path: str, token: str = "t", **query: str) -> tuple[int, Any]:
    client = make_exporter(plan, clock, "t").test_client()
    response = await client.get(path, query_string=query, headers={"Authorization": f"Bearer {token}"})
    return response.status_code, await response.get_data(as_text=False)


async def pages(clock: TestClock, plan: SimPlan, limit: int) -> list[Page]:
    """Return every page of the whole window."""
    found: list[Page] = []
    while not found or found[-1].has_more:
        cursor = {"cursor": found[-1].next_cursor.text} if found and found[-1].next_cursor is not None else {}
        status, body = await get(clock, plan, "/v1/snapshots/window", **WHOLE, limit=str(limit), **cursor)
        assert status == 200
        read = parse_page(body)
        assert isinstance(read, Page)
        found.append(read)
    return found


async def test_a_window_has_each_snapshot_once_whatever_the_pages_are() -> None:
    plan = SimPlan(BEGAN, subjects=2, interval_seconds=30, duplicates=4, gaps=9)
    whole = [each for one in await pages(TestClock(), plan, 1000) for each in one.snapshots]
    assert len(whole) > 90
    assert len({each.collected_at for each in whole}) < len(whole)
    for limit in (1, 7):
        read = await pages(TestClock(), plan, limit)
        assert [each for one in read for each in one.snapshots] == whole
        cursors = [one.next_cursor.nanos for one in read if one.next_cursor is not None]
        assert cursors == sorted(set(cursors))


async def test_who_has_no_token_or_asks_for_no_window_is_told_so() -> None:
    plan, clock = SimPlan(BEGAN), TestClock()
    for path in ("/v1/snapshots/window", "/truth"):
        assert (await get(clock, plan, path, token="other"))[0] == 401
    for wrong in ({"since": "x"}, {"until": ""}, {"limit": "0"}, {"limit": "99999"}, {"cursor": "x"}):
        assert (await get(clock, plan, "/v1/snapshots/window", **{**WHOLE, **wrong}))[0] == 400


async def test_the_same_seed_is_the_same_node_and_another_is_another() -> None:
    plan = SimPlan(BEGAN, seed=5, resets=5, late=5)
    same = await pages(TestClock(), plan, 100)
    assert await pages(TestClock(), plan, 10_000) == same
    other = SimPlan(BEGAN, seed=6, resets=5, late=5)
    assert await pages(TestClock(), other, 100) != same


rates = st.sampled_from([0, 2, 3, 7])


@given(
    plan=st.builds(
        SimPlan,
        began_at=st.just(BEGAN),
        seed=st.integers(0, 1000),
        subjects=st.integers(1, 3),
        interval_seconds=st.sampled_from([10.0, 20.0, 60.0, 90.0]),
        resets=rates,
        restarts=rates,
        gaps=rates,
        late=rates,
        duplicates=rates,
        ticks_max=st.integers(1, 40),
    ),
    steps=st.lists(st.integers(1, 600), max_size=12),
)
def test_a_reader_who_follows_the_contract_gets_what_was_truly_used(plan: SimPlan, steps: list[int]) -> None:
    """However often he reads, everything anew, with replays dropped by their date and resets from their new total."""
    node, now = SimNode(plan), BEGAN
    seen: dict[str, tuple[datetime, int, int]] = {}
    used = dict.fromkeys(node.subjects, 0)
    for step in [*steps, 24 * 3600]:
        now += timedelta(seconds=step)
        for number in node.shown(BEGAN, now, now):
            snapshot = node.snapshot(number)
            at = parse_instant(snapshot["collected_at"])
            assert at is not None
            for name in node.subjects:
                own = [each for each in snapshot["samples"] if each["uuid"] == name]
                up, down = (sum(each[f"{way}link_bytes_total"] for each in own) for way in ("up", "down"))
                last_at, last_up, last_down = seen.get(name, (datetime(2000, 1, 1, tzinfo=UTC), 0, 0))
                if at <= last_at:
                    continue
                if up >= last_up and down >= last_down:
                    used[name] += up - last_up + down - last_down
                seen[name] = (at, up, down)
        assert used == node.true_usage(now, now)


def test_the_command_serves_what_its_options_say(tmp_path: Path) -> None:
    arguments = ("exporter-sim", "--json", "--port", "0", "--subjects", "2", "--minutes", "3", "--node-id", "n-1")
    with callora(*arguments, log_directory=tmp_path, environ={"EXPORTER_SIM_TOKEN": "t"}) as process:
        facts = process.facts()
        assert (facts["node_id"], len(facts["subjects"])) == ("n-1", 2)
        answer = httpx.get(f"{facts['url']}/truth", headers={"Authorization": "Bearer t"}, timeout=20)
        assert set(answer.json()["used"]) == set(facts["subjects"])
        assert min(answer.json()["used"].values()) > 0
        process.signal()
        assert process.wait() == 0
