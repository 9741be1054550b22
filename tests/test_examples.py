"""The examples, run as a stranger would: against `callora dev`, by what it prints."""

import re
import sys
from pathlib import Path

import trio

from tests.support.processes import callora, nothing_left_in

EXAMPLES = Path(__file__).parents[1] / "examples"
STRANGER = EXAMPLES / "stranger.py"
DEPOSIT = EXAMPLES / "deposit.py"


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


async def test_a_wallet_with_its_own_key_deposits_and_a_paid_call_spends_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    arguments = ("dev", "--json", "--port", "0", "--data-dir", str(data_dir))
    with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
        facts = await trio.to_thread.run_sync(process.facts)
        sandbox = facts["sandbox"]
        done = await trio.run_process(
            [sys.executable, str(DEPOSIT), facts["url"], sandbox["horizon_url"], sandbox["usdc_issuer"]],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    told = done.stdout.decode()
    assert done.returncode == 0, told + done.stderr.decode()
    assert "the wallet has 100.0000000 USDC" in told
    assert re.search(r"^the deposit is confirmed in ledger \d+; the vault has 25.0000000$", told, re.MULTILINE)
    assert "a call cost 0.0100000 and left 24.9900000" in told
