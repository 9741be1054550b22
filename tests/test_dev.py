"""`callora dev`: one line of facts, everything kept between starts, and nothing left behind by any way of ending it."""

import json
import os
import random
import signal
import stat
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import jwt
import psutil
import pytest
import trio

from callora.demo import dev_credentials
from callora.ledger.money import parse_usdc
from callora.ledger.wallets import is_seed
from tests.support.client import call
from tests.support.processes import (
    Caller,
    CalloraProcess,
    callora,
    nothing_left_in,
    processes_in,
    run_callora,
)
from tests.support.wallets import Wallet

WEATHER = "/v1/call/weather-api/current"


@contextmanager
def dev(
    data_dir: Path, log_directory: Path, *more: str, **environ: str
) -> Iterator[tuple[CalloraProcess, dict[str, Any]]]:
    """Run `callora dev` and yield it with its facts; whatever ends it, nothing of it is left."""
    arguments = ("dev", "--json", "--port", "0", "--data-dir", str(data_dir), *more)
    with nothing_left_in(data_dir), callora(*arguments, environ=environ, log_directory=log_directory) as process:
        yield process, process.facts()


def port_of(facts: dict[str, Any]) -> int:
    """Return the port in the facts."""
    return int(facts["url"].rpartition(":")[2])


def pay(
    facts: dict[str, Any], path: str = WEATHER, key: str | None = None, method: str = "GET"
) -> tuple[int, str | None]:
    """Make one call as the demo consumer; return its status and the balance it says is left."""

    async def one() -> tuple[int, str | None]:
        headers = [("X-Api-Key", facts["consumer"]["api_key"])]
        if key is not None:
            headers.append(("Idempotency-Key", key))
        response = await call(port_of(facts), method, path, headers)
        return response.status, response.header("X-Callora-Balance")

    return trio.run(one)


def test_the_demo_developer_is_paid_on_the_sandbox_when_somebody_says_so(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path, SETTLEMENT_MIN_PAYOUT_USDC="0.1") as (_, facts):
        for _ in range(3):
            assert pay(facts, "/v1/call/weather-api/forecast")[0] == 200
        told = run_callora(
            "settle", "--now", "--wait", "60", "--data-dir", str(data_dir), environ={}, log_directory=tmp_path
        )
        assert told.popen.returncode == 0, told.stdout + told.stderr
        (line,) = [each for each in told.stdout.splitlines() if "completed" in each]
        assert "0.1500000" in line
        assert facts["developer"]["wallet"] in line


def test_it_prints_one_json_line_and_serves_at_once(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path, LOG_LEVEL="info") as (process, facts):
        assert facts["url"].startswith("http://127.0.0.1:")
        assert facts["pid"] == process.pid
        assert facts["database_url"].startswith("postgresql://")
        assert facts["data_dir"] == str(data_dir)
        assert facts["upstream_url"].startswith("http://127.0.0.1:")
        assert facts["admin_api_key"]
        assert set(facts["consumer"]) == {"user_id", "api_key", "vault_id", "token"}
        assert set(facts["developer"]) == {*("user_id", "wallet", "wallet_seed", "api_id", "api_slug", "token")}
        assert pay(facts) == (200, "99.9900000")
        assert pay(facts, "/v1/call/weather-api/forecast?days=3") == (200, "99.9400000")
        assert pay(facts, "/v1/call/weather-api/reports/oslo", "first-order", "POST") == (201, "99.9200000")
        assert pay(facts, "/v1/call/weather-api/reports/oslo", "first-order", "POST")[0] == 201
        assert pay(facts)[1] == "99.9100000"
        process.signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert len(process.stdout.splitlines()) == 1
        assert json.loads(process.stdout) == facts
        assert "stopped" in process.stderr
        tokens = (facts["consumer"]["token"], facts["developer"]["token"])
        for secret in (facts["consumer"]["api_key"], facts["admin_api_key"], *tokens):
            assert secret not in process.stderr
    assert stat.S_IMODE((data_dir / "credentials.json").stat().st_mode) == 0o600


def test_a_second_start_keeps_balance_ids_and_key(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, first):
        assert pay(first, key="once") == (200, "99.9900000")
        process.signal(signal.SIGTERM)
        assert process.wait(15) == 0
    with dev(data_dir, tmp_path) as (process, second):
        for who in ("consumer", "developer"):
            assert first[who].pop("token") != second[who].pop("token"), "a session of each start's own"
        for name in ("consumer", "developer", "admin_api_key", "data_dir"):
            assert second[name] == first[name]
        assert pay(second, key="once")[0] == 200, "a retry after the restart"
        assert pay(second) == (200, "99.9800000")
        process.signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_the_example_is_called_under_its_own_paths_and_paid_in_credits(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    for example in (("--example", "mana"), ()):
        with dev(data_dir, tmp_path, *example) as (process, facts):
            searched = pay(facts, "/v1/search", method="POST")
            assert searched == ((200, "100.0000000") if example else (404, None))
            if example:
                assert pay(facts, "/v1/tts/voices") == (200, "100.0000000")
            assert pay(facts)[0] == 200, "the demo API is there as well"
            process.signal(signal.SIGTERM)
            assert process.wait(15) == 0


def test_the_second_of_two_on_one_directory_says_who_has_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, facts):
        late = run_callora("dev", "--port", "0", "--data-dir", str(data_dir), log_directory=tmp_path)
        assert late.popen.returncode == 1
        assert f"is in use by process {process.pid}" in late.stderr
        assert "Traceback" not in late.stderr
        assert pay(facts)[0] == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_way_of_ending_it_leaves_a_process(tmp_path: Path, number: signal.Signals) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, _):
        family = [*psutil.Process(process.pid).children(recursive=True), *processes_in(data_dir)]
        assert any("postgres" in each.name() for each in family)
        process.signal(number)
        assert process.wait(15) == (-number if number == signal.SIGKILL else 0)
        assert psutil.wait_procs(family, timeout=15)[1] == []
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    # After any of them the directory is as good as before.
    if number == signal.SIGKILL:
        with dev(data_dir, tmp_path) as (_, facts):
            assert pay(facts)[0] == 200


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.proof)])
def test_an_interrupted_start_leaves_nothing_and_the_next_one_works(tmp_path: Path, rounds: int) -> None:
    data_dir = tmp_path / "data"
    for _ in range(rounds):
        arguments = ("dev", "--json", "--port", "0", "--data-dir", str(data_dir))
        with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
            time.sleep(random.uniform(0, 2.5))
            process.signal(random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
            process.wait(15)
    with dev(data_dir, tmp_path) as (_, facts):
        assert pay(facts) == (200, "99.9900000")


def test_keys_are_made_and_revoked_beside_a_running_dev(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    where = ("--data-dir", str(data_dir))
    with dev(data_dir, tmp_path) as (_, facts):
        vault_id = facts["consumer"]["vault_id"]
        made = run_callora("keys", "create", "--vault", vault_id, *where, log_directory=tmp_path)
        assert made.popen.returncode == 0, made.stderr
        key = made.stdout.strip()
        listed = run_callora("keys", "list", *where, log_directory=tmp_path)
        assert key[:16] in listed.stdout
        assert run_callora("doctor", *where, log_directory=tmp_path).popen.returncode == 0

        async def use_until_refused() -> float:
            async with Caller(port_of(facts), key) as caller:
                assert (await caller.call(WEATHER)).status == 200
                revoking = run_callora("keys", "revoke", key[:16], *where, log_directory=tmp_path)
                revoked = time.monotonic()
                assert revoking.popen.returncode == 0
                with trio.fail_after(60):
                    while (await caller.call(WEATHER)).status == 200:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                answer = await caller.call(WEATHER)
                assert (answer.status, answer.code) == (403, "API_KEY_REVOKED")
                return time.monotonic() - revoked

        assert trio.run(use_until_refused) < 5.0
        assert pay(facts)[0] == 200, "the other key lives"


def test_commands_work_after_a_dev_that_was_killed(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    where = ("--data-dir", str(data_dir))
    with dev(data_dir, tmp_path) as (process, _):
        process.kill()
    with nothing_left_in(data_dir):
        examined = run_callora("doctor", *where, log_directory=tmp_path)
        assert examined.popen.returncode == 0, examined.stdout + examined.stderr
        listed = run_callora("keys", "list", *where, log_directory=tmp_path)
        assert "Demo key" in listed.stdout, listed.stderr


def test_a_killed_postgres_comes_back_under_a_running_dev(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, facts):
        assert pay(facts) == (200, "99.9900000")
        postmaster = psutil.Process(int((data_dir / "postgres" / "postmaster.pid").read_text().split()[0]))
        postmaster.kill()

        async def until_served() -> None:
            async with Caller(port_of(facts), facts["consumer"]["api_key"]) as caller:
                await process.until(lambda: "was restarted" in process.stderr, "the server to be started again")
                with trio.fail_after(60):
                    while (answer := await caller.call(WEATHER)).status != 200:
                        assert answer.status in (503, 504)
                        await trio.sleep(0.01)
            assert answer.charge == parse_usdc("0.01")

        trio.run(until_served)
        process.signal(signal.SIGINT)
        assert process.wait(15) == 0


def test_it_welcomes_people_with_commands_that_work(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    arguments = ("dev", "--port", "0", "--data-dir", str(data_dir))
    with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
        trio.run(process.until, lambda: "Ctrl-C" in process.stdout, "the welcome")
        assert str(data_dir) in process.stderr
        lines = [line.strip() for line in process.stdout.splitlines() if line.strip().startswith("curl")]
        assert len(lines) >= 4
        for line in lines:
            assert os.system(f"{line} --silent --fail --output /dev/null") == 0, line


def ask(facts: dict[str, Any], path: str, token: str | None = None) -> tuple[int, Any]:
    """Return status and document of a request to the dashboard's REST."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    answer = httpx.get(facts["url"] + path, headers=headers)
    return answer.status_code, answer.json()


def test_its_tokens_are_sessions_of_the_demo_users_for_a_day(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, facts):
        for who in ("consumer", "developer"):
            status, document = ask(facts, "/api/auth/sessions", facts[who]["token"])
            assert status == 200
            (session,) = document["data"]
            assert session["current"]
            claims = jwt.decode(facts[who]["token"], options={"verify_signature": False})
            assert claims["sub"] == facts[who]["user_id"]
            assert claims["exp"] - claims["iat"] == 86_400
        process.signal(signal.SIGTERM)
        assert process.wait(15) == 0
    with dev(data_dir, tmp_path) as (_, later):
        assert ask(later, "/api/auth/sessions", facts["consumer"]["token"])[0] == 200, "a restart ends no session"


def test_wallets_log_in_to_it_and_its_signing_key_stays(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with dev(data_dir, tmp_path) as (process, facts):
        wallet = Wallet()
        status, challenge = ask(facts, f"/auth?account={wallet.address}")
        assert status == 200
        signed = wallet.sign_transaction(challenge["transaction"], challenge["network_passphrase"])
        assert httpx.post(facts["url"] + "/auth", json={"transaction": signed}).status_code == 200
        toml = tomllib.loads(httpx.get(facts["url"] + "/.well-known/stellar.toml").text)
        assert toml["WEB_AUTH_ENDPOINT"] == f"http://localhost:{port_of(facts)}/auth"
        process.signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert json.loads((data_dir / "credentials.json").read_text())["auth_signing_seed"] not in process.stderr
    with dev(data_dir, tmp_path) as (_, facts):
        again = tomllib.loads(httpx.get(facts["url"] + "/.well-known/stellar.toml").text)
        assert again["SIGNING_KEY"] == toml["SIGNING_KEY"]


def test_a_directory_of_an_older_version_gets_the_secrets_it_lacks(tmp_path: Path) -> None:
    first = dev_credentials(tmp_path)
    path = tmp_path / "credentials.json"
    kept = {name: value for name, value in attrs.asdict(first).items() if name != "auth_signing_seed"}
    path.write_text(json.dumps(kept))
    second = dev_credentials(tmp_path)
    assert {**attrs.asdict(second), "auth_signing_seed": ""} == {**kept, "auth_signing_seed": ""}
    assert is_seed(second.auth_signing_seed)
    assert dev_credentials(tmp_path) == second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
