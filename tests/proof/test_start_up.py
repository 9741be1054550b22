"""How long a start takes: from the process's start to the end of its first paid answer, on a warm database."""

import statistics
from pathlib import Path

import pytest

from tests.proof.books import first_paid, scene
from tests.support.processes import callora, free_port

STARTS = 30
START_SECONDS_MAX = 2.0


@pytest.mark.proof
async def test_the_first_paid_answer_comes_soon_after_the_start(database_url: str, tmp_path: Path) -> None:
    took: list[float] = []
    async with scene(database_url, upstream_seconds=0.0) as stage:
        for _ in range(STARTS):
            port = free_port()
            environ = {"DATABASE_URL": database_url, "PORT": str(port)}
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                took.append(await first_paid(process, port, stage.plain.api_key) - process.started_at)
                process.signal()
                assert await process.ended() == 0
    print(
        f"\n{STARTS} starts of `callora serve`: first paid answer after {statistics.median(took):.2f} s (median), "
        f"{min(took):.2f} to {max(took):.2f} s"
    )
    assert statistics.median(took) < START_SECONDS_MAX
