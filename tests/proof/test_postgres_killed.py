"""PostgreSQL is killed at random moments under load; nobody is served unpaid, and service resumes with the database."""

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio

from callora.store.embedded import EmbeddedPostgres
from tests.proof.books import (
    assert_audit_clean,
    assert_books_agree,
    books,
    first_paid,
    overdue_seconds,
    scene,
    until_no_hold,
)
from tests.support.postgres import make_template
from tests.support.processes import Answer, callora, free_port, nothing_left_in

TTL_SECONDS = 2
SWEEP_SECONDS = 1
QUICK = {
    "HOLD_TTL_SECONDS": str(TTL_SECONDS),
    "PROXY_TIMEOUT_MS": "1000",
    "HOLD_SWEEP_INTERVAL_SECONDS": str(SWEEP_SECONDS),
}
BACK_SECONDS_MAX = 3.0
LONG_OUTAGE_SECONDS = 7.0
"""Longer than closes are tried again, so that the outcome of some captures stays unknown."""


@pytest.fixture
def durable_server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of our own with fsync on, to be killed."""
    data_dir = tmp_path / "data"
    with nothing_left_in(data_dir):
        server = EmbeddedPostgres(data_dir)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def durable_url(durable_server: EmbeddedPostgres) -> str:
    """A migrated database on it."""
    return durable_server.dsn_for(make_template(durable_server))


def assert_all_answered(answers: list[Answer], words: str) -> None:
    """Fail for a connection that broke, or an answer that is no word for an outage."""
    broken = [answer for answer in answers if not answer.whole]
    assert not broken, (words, broken[:3])
    odd = [answer for answer in answers if answer.status not in (200, 409, 503, 504)]
    assert not odd, (words, odd[:3])


async def kill(server: EmbeddedPostgres) -> float:
    """Kill the server; return when the last of its processes was gone: one may outlive its parent and still commit."""
    assert server.server_pid is not None
    postmaster = psutil.Process(server.server_pid)
    family = postmaster.children(recursive=True)
    postmaster.kill()
    _, left = await trio.to_thread.run_sync(psutil.wait_procs, family, 10)
    assert not left
    return time.monotonic()


@pytest.mark.parametrize(
    ("kills", "long_every"), [(2, 0), pytest.param(30, 10, marks=pytest.mark.proof)], ids=["slice", "proof"]
)
async def test_nobody_is_served_unpaid_while_the_database_is_down(
    durable_server: EmbeddedPostgres, durable_url: str, tmp_path: Path, kills: int, long_every: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    port = free_port()
    environ = {**QUICK, "DATABASE_URL": durable_url, "PORT": str(port)}
    back: list[float] = []
    outages: list[tuple[float, float]] = []
    overdue = 0.0
    async with scene(durable_url) as stage:
        load = stage.load(port, seed)
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            await first_paid(process, port, stage.plain.api_key)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run, 6, 6)
                for number in range(1, kills + 1):
                    await trio.sleep(moments.uniform(0.2, 1.0))
                    down = await kill(durable_server)
                    long = long_every and number % long_every == 0
                    await trio.sleep(LONG_OUTAGE_SECONDS if long else moments.uniform(0, 1.0))
                    await trio.to_thread.run_sync(durable_server.restart)
                    up = time.monotonic()
                    outages.append((down, up))
                    back.append(await first_paid(process, port, stage.plain.api_key) - up)
                    async with books(durable_url) as database:
                        await assert_audit_clean(database)
                        overdue = max(overdue, await overdue_seconds(database) - (up - down))
                load.stopping = True
            async with books(durable_url) as database:
                await load.settle(TTL_SECONDS + 2 * SWEEP_SECONDS + 60)
                await until_no_hold(database, TTL_SECONDS + 2 * SWEEP_SECONDS + 1)
                # What was charged and not delivered is given back by a task that nobody waits for.
                await trio.sleep(1)
                process.signal()
                assert await process.ended() == 0, process.never("nothing had to be cut")
                sums = await assert_books_agree(database, stage, load)
        assert "Traceback" not in process.stderr, process.stderr[-6000:]
    answers = [*load.plain, *load.keyed]
    assert_all_answered(answers, "whatever the database does, callers get an answer")
    during = [answer for answer in answers if any(down < answer.began and answer.ended < up for down, up in outages)]
    assert not [answer for answer in during if answer.status == 200 and answer.charge], "served while nothing is stored"
    told = Counter(f"{answer.status} {answer.code or ''}".strip() for answer in during)
    print(
        f"{kills} kills: serving {statistics.median(back):.2f} s (median), {max(back):.2f} s (worst) after the database"
        f"; within outages {dict(told)}; worst overdue hold {overdue:.2f} s beyond its outage; {sums}"
    )
    assert sum(count for words, count in told.items() if words.startswith("503")), "no call met an outage"
    assert kills < 30 or max(back) < BACK_SECONDS_MAX, "told by the long run, on a machine that does nothing else"
    assert overdue < max(back) + SWEEP_SECONDS
