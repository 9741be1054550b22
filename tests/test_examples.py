"""The examples, run as a stranger would: against `callora dev`, by what it prints."""

import re
import sys
from pathlib import Path

import trio

from tests.support.processes import callora, nothing_left_in

STRANGER = Path(__file__).parents[1] / "examples" / "stranger.py"


async def test_a_stranger_publishes_calls_and_sees_the_figures(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    arguments = ("dev", "--json", "--port", "0", "--data-dir", str(data_dir))
    with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
        facts = await trio.to_thread.run_sync(process.facts)
        done = await trio.run_process(
            [sys.executable, str(STRANGER), facts["url"], facts["upstream_url"], facts["admin_api_key"]],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    told = done.stdout.decode()
    assert done.returncode == 0, told + done.stderr.decode()
    assert "a call cost 0.0100000 and left 0.9900000" in told
    assert "the consumer has 0.9700000 left after 2 calls" in told
    assert "the developer has earned 0.0300000" in told
    requests = re.search(r"^(\d+) requests$", told, re.MULTILINE)
    assert requests is not None
    assert int(requests[1]) < 30
