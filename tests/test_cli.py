"""The commands, each as a process of its own: what it prints, where, and its exit code."""

import re
import socket
from pathlib import Path

import pytest
import trio

from callora.store.bridge import open_database
from callora.store.embedded import EmbeddedPostgres
from tests.support.client import call
from tests.support.processes import CalloraProcess, callora, free_port, nothing_left_in, run_callora
from tests.support.service import running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.valkey import running_valkey

WRONG = {"PORT": "many", "HOLD_TTL_SECONDS": "0", "PROXY_TIMEOUT_MS": "soon", "CALLORA_TYPO": "1"}
COMMANDS = {
    (): [
        "serve",
        "dev",
        "migrate",
        "sandbox",
        "keys",
        "depositors",
        "withdrawals",
        "settle",
        "revenue",
        "rollup",
        "doctor",
    ],
    ("serve",): ["--workers", "--data-dir", "SIGTERM"],
    ("dev",): ["--json", "--port", "--data-dir", "embedded PostgreSQL"],
    ("migrate",): ["--status", "--down-to"],
    ("keys",): ["create", "list", "revoke"],
    ("keys", "create"): ["--vault", "--rate-limit", "--expires", "once"],
    ("keys", "list"): ["--vault", "masked"],
    ("keys", "revoke"): ["within a second"],
    ("depositors",): ["list", "admit", "refuse"],
    ("depositors", "admit"): ["--signed", "offline"],
    ("withdrawals",): ["list", "pay", "refuse"],
    ("withdrawals", "pay"): ["--signed", "offline"],
    ("rollup",): ["--rebuild", "count anew"],
    ("reconcile",): ["--json", "--clear", "Exit code 1"],
    ("doctor",): ["exit code 1"],
}


def run(directory: Path, *arguments: str, **environ: str) -> CalloraProcess:
    """Run a command to its end; no command may end in a stack trace."""
    process = run_callora(*arguments, environ=environ, log_directory=directory)
    assert "Traceback" not in process.stderr, process.stderr
    return process


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_every_command(tmp_path: Path, command: tuple[str, ...]) -> None:
    process = run(tmp_path, *command, "--help")
    assert process.popen.returncode == 0
    for word in COMMANDS[command]:
        assert word in " ".join(process.stdout.split())


@pytest.mark.parametrize("command", ["serve", "dev", "migrate"])
def test_a_wrong_configuration_is_told_whole_and_exits_2(tmp_path: Path, command: str) -> None:
    process = run(tmp_path, command, "--data-dir", str(tmp_path / "data"), **WRONG)
    assert process.popen.returncode == 2
    assert process.stdout == ""
    for name in WRONG:
        assert name in process.stderr
    assert not (tmp_path / "data" / "postgres").exists(), "nothing is started with half a configuration"


def test_production_without_a_database_is_refused_with_every_missing_secret(tmp_path: Path) -> None:
    process = run(tmp_path, "serve", "--data-dir", str(tmp_path / "data"), APP_ENV="production")
    assert process.popen.returncode == 2
    for name in ("DATABASE_URL", "JWT_SECRET", "ADMIN_API_KEY", "METRICS_API_KEY"):
        assert f"{name}: is required in production" in process.stderr
    assert not (tmp_path / "data").exists()


def test_dev_refuses_production(tmp_path: Path, database_url: str) -> None:
    process = run(
        tmp_path, "dev", "--data-dir", str(tmp_path / "data"), APP_ENV="production", DATABASE_URL=database_url
    )
    assert process.popen.returncode == 2
    assert len(process.stderr.splitlines()) == 1


def test_a_port_in_use_is_one_clear_line_and_exits_1(tmp_path: Path, database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = run(tmp_path, "serve", DATABASE_URL=database_url, PORT=str(port))
    assert process.popen.returncode == 1
    assert process.stderr == f"callora: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_an_unknown_option_is_refused_before_anything_starts(tmp_path: Path) -> None:
    assert run(tmp_path, "serve", "--wrokers", "2").popen.returncode == 2


def test_serve_starts_before_its_database_and_says_that_it_is_not_ready(tmp_path: Path) -> None:
    port = free_port()
    environ = {"PORT": str(port), "DATABASE_URL": "postgresql://postgres@127.0.0.1:1/nowhere", "LOG_LEVEL": "info"}
    with callora("serve", environ=environ, log_directory=tmp_path) as process:
        trio.run(process.until, lambda: "serving" in process.stderr, "it to serve")
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.makefile("rb").readline().split()[1] == b"503"
        process.signal()
        assert process.wait(10) == 0


# --- migrate, keys, doctor --------------------------------------------------------------------------------------------


def test_migrate_tells_what_is_missing_applies_it_and_takes_it_back(tmp_path: Path, empty_database_url: str) -> None:
    where = {"DATABASE_URL": empty_database_url}
    missing = run(tmp_path, "migrate", "--status", **where)
    assert missing.popen.returncode == 0
    assert "missing 0001_" in missing.stdout
    applied = run(tmp_path, "migrate", **where)
    assert applied.popen.returncode == 0
    assert applied.stdout == missing.stdout.replace("missing", "applied")
    assert run(tmp_path, "migrate", "--status", **where).stdout == "nothing missing\n"
    assert run(tmp_path, "migrate", **where).stdout == "nothing applied\n"
    back = run(tmp_path, "migrate", "--down-to", "0", **where)
    assert back.popen.returncode == 0
    assert "taken back 0001_" in back.stdout
    assert run(tmp_path, "migrate", "--status", **where).stdout == missing.stdout


def test_commands_on_a_database_without_schema_name_the_cure(tmp_path: Path, empty_database_url: str) -> None:
    listed = run(tmp_path, "keys", "list", DATABASE_URL=empty_database_url)
    assert listed.popen.returncode == 1
    assert listed.stderr == "callora: the database has no schema yet, or an older one: run callora migrate\n"
    examined = run(tmp_path, "doctor", DATABASE_URL=empty_database_url)
    assert examined.popen.returncode == 1
    assert "missing: 0001_" in examined.stdout


def test_commands_without_their_database_say_so_in_one_line(tmp_path: Path) -> None:
    where = {"DATABASE_URL": "postgresql://postgres:hidden@127.0.0.1:1/nowhere"}
    for command in (["migrate"], ["keys", "list"]):
        process = run(tmp_path, *command, **where)
        assert process.popen.returncode == 1
        assert len(process.stderr.splitlines()) == 1
        assert "hidden" not in process.stderr
    examined = run(tmp_path, "doctor", **where)
    assert examined.popen.returncode == 1
    assert "does not answer" in examined.stdout
    assert "hidden" not in examined.stdout + examined.stderr


def test_doctor_is_content_with_a_sound_ledger_and_finds_a_planted_fault(tmp_path: Path, database_url: str) -> None:
    async def vault() -> str:
        async with running_service(database_url) as service:
            return (await service.consumer("1")).vault_id

    async def plant() -> None:
        async with open_database(database_url) as database:
            await database.execute("UPDATE vaults SET available = available + 1 WHERE vault_id = $1", vault_id)

    vault_id = trio.run(vault)
    assert run(tmp_path, "doctor", DATABASE_URL=database_url).popen.returncode == 0
    standby = f"{database_url}&options=-c%20default_transaction_read_only%3Don"
    assert run(tmp_path, "doctor", DATABASE_URL=standby).popen.returncode == 0, "it only reads"
    trio.run(plant)
    found = run(tmp_path, "doctor", DATABASE_URL=database_url)
    assert found.popen.returncode == 1
    wrong = [line for line in found.stdout.splitlines() if "WRONG" in line]
    assert len(wrong) == 1
    assert "every balance is deposits" in wrong[0]
    assert vault_id[:8] in found.stdout


def test_doctor_names_a_wrong_configuration(tmp_path: Path) -> None:
    process = run(tmp_path, "doctor", **WRONG)
    assert process.popen.returncode == 1
    for name in WRONG:
        assert name in process.stdout


def test_doctor_says_whether_the_store_of_rate_limits_answers(tmp_path: Path, database_url: str) -> None:
    with running_valkey(tmp_path / "valkey", password="hunter2") as valkey:
        where = {"DATABASE_URL": database_url, "REDIS_URL": valkey.url}
        content = run(tmp_path, "doctor", **where)
        assert content.popen.returncode == 0
        assert re.search(r"rate limits +. ok +. Valkey [0-9.]+ answers in [0-9.]+ ms", content.stdout)
        wrong = {**where, "REDIS_URL": valkey.url.replace("hunter2", "hunter3")}
        found = run(tmp_path, "doctor", **wrong)
        assert found.popen.returncode == 1
        assert re.search(r"rate limits +. WRONG +. REDIS_URL cannot be used: ", found.stdout)
        assert "hunter" not in found.stdout + found.stderr
        valkey.ask("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
        found = run(tmp_path, "doctor", **where)
        assert found.popen.returncode == 1
        assert "forgets limits when full: allkeys-lru" in found.stdout


def test_keys_are_made_once_listed_masked_and_revoked(tmp_path: Path, database_url: str) -> None:
    async def vault() -> str:
        async with running_service(database_url) as service:
            return (await service.consumer("1")).vault_id

    where = {"DATABASE_URL": database_url}
    vault_id = trio.run(vault)
    made = run(tmp_path, "keys", "create", "--vault", vault_id, "--name", "nightly", "--rate-limit", "7", **where)
    assert made.popen.returncode == 0
    key = made.stdout.strip()
    assert key.startswith("ck_test_")
    assert key not in made.stderr
    listed = run(tmp_path, "keys", "list", "--vault", vault_id, **where)
    assert "nightly" in listed.stdout
    assert key[:16] in listed.stdout
    assert key not in listed.stdout
    assert "active" in listed.stdout
    revoked = run(tmp_path, "keys", "revoke", key[:16], **where)
    assert revoked.popen.returncode == 0
    assert "revoked" in run(tmp_path, "keys", "list", **where).stdout
    assert run(tmp_path, "keys", "revoke", "ck_test_00000000", **where).popen.returncode == 1
    nowhere = run(tmp_path, "keys", "create", "--vault", "00000000-0000-7000-8000-000000000000", **where)
    assert nowhere.popen.returncode == 1
    assert "there is no vault" in nowhere.stderr
    for wrong in (
        ["--vault", "x"],
        ["--vault", vault_id, "--rate-limit", "0"],
        ["--vault", vault_id, "--name", "n" * 121],
    ):
        refused = run(tmp_path, "keys", "create", *wrong, **where)
        assert refused.popen.returncode in (1, 2), wrong
        assert refused.stdout == ""


def test_sums_of_usage_are_added_up_and_rebuilt(tmp_path: Path, database_url: str) -> None:
    async def paid() -> None:
        seldom = {"USAGE_ROLLUP_INTERVAL_MS": "3600000"}
        async with running_service(database_url, seldom) as service, raw_upstream(respond(200)) as upstream:
            await service.api("echo", upstream.url)
            consumer = await service.consumer("1")
            await call(service.port, "GET", "/v1/call/echo/x", consumer.headers)

    where = {"DATABASE_URL": database_url}
    trio.run(paid)
    assert "counted 1 calls more" in run(tmp_path, "rollup", **where).stdout
    assert "counted 0 calls more" in run(tmp_path, "rollup", **where).stdout
    assert "counted 1 calls anew" in run(tmp_path, "rollup", "--rebuild", **where).stdout


def test_commands_without_a_database_use_the_embedded_one_and_leave_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with nothing_left_in(data_dir):
        where = ("--data-dir", str(data_dir))
        assert "applied 0001_" in run(tmp_path, "migrate", *where).stdout
        examined = run(tmp_path, "doctor", *where)
        assert examined.popen.returncode == 0, examined.stdout
        assert str(data_dir) in examined.stderr


def test_a_command_beside_another_owner_of_the_data_says_who_has_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with nothing_left_in(data_dir):
        server = EmbeddedPostgres(data_dir, settings={"fsync": "off"})
        server.start()
        try:
            refused = run(tmp_path, "serve", "--data-dir", str(data_dir))
            assert refused.popen.returncode == 1
            assert "is in use by process" in refused.stderr
        finally:
            server.stop()
