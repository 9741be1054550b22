"""The embedded PostgreSQL: it outlives nothing, loses nothing, and leaves nothing behind."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio

from callora.ledger.faults import CalloraFault
from callora.store import embedded
from callora.store.bridge import open_database
from callora.store.embedded import EmbeddedBusy, EmbeddedFailed, EmbeddedPostgres, find_binaries, running_postgres

QUICK = {"fsync": "off"}


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A short path: with pytest's own the socket would always move elsewhere."""
    with tempfile.TemporaryDirectory(prefix="callora-") as directory:
        yield Path(directory) / "data"


def server_processes(data_dir: Path) -> list[psutil.Process]:
    """Return the server of this data directory and its children; they are told by their working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(data_dir):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


async def run(dsn: str, sql: str) -> object:
    async with open_database(dsn) as database:
        return await database.fetch_value(sql)


def test_it_starts_stops_and_keeps_its_data_from_plain_code(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    server.start()
    assert server.dsn == f"postgresql://postgres@/callora?host={data_dir}/socket"
    assert trio.run(run, server.dsn, "SELECT current_setting('fsync')") == "on"
    trio.run(run, server.dsn, "CREATE TABLE kept AS SELECT 7 AS number")
    assert len(server_processes(data_dir)) > 1
    server.stop()
    server.stop()
    assert server_processes(data_dir) == []
    assert {path.name for path in data_dir.iterdir()} == {"postgres", "postgres.log", "owner.lock", "socket"}
    assert list((data_dir / "socket").iterdir()) == []
    assert "database system is shut down" in server.log_end()
    server.start()
    try:
        assert trio.run(run, server.dsn, "SELECT number FROM kept") == 7
    finally:
        server.stop()


def test_only_its_user_may_connect_since_every_connection_is_trusted(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, settings=QUICK)
    server.start()
    try:
        path = data_dir / "socket" / ".s.PGSQL.5432"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert trio.run(run, server.dsn, "SELECT current_setting('listen_addresses')") == ""
    finally:
        server.stop()


def test_a_long_path_gets_a_short_socket_directory_that_goes_with_it(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir / ("deep" * 25), settings=QUICK)
    server.start()
    try:
        socket_dir = Path(server.dsn.partition("host=")[2])
        assert not socket_dir.is_relative_to(data_dir)
        assert trio.run(run, server.dsn, "SELECT 1") == 1
    finally:
        server.stop()
    assert not socket_dir.exists()


def test_two_owners_are_refused(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, settings=QUICK)
    server.start()
    try:
        with pytest.raises(EmbeddedBusy, match=f"in use by process {os.getpid()}"):
            EmbeddedPostgres(data_dir, settings=QUICK).start()
        assert trio.run(run, server.dsn, "SELECT 1") == 1
    finally:
        server.stop()


async def test_a_killed_server_comes_back_on_the_same_dsn_with_what_was_committed(data_dir: Path) -> None:
    told: list[str] = []
    back = trio.Event()

    def on_restart(sentence: str) -> None:
        told.append(sentence)
        back.set()

    async with running_postgres(data_dir, on_restart=on_restart) as dsn, open_database(dsn) as database:
        await database.execute("CREATE TABLE kept (number int)")
        await database.execute("INSERT INTO kept VALUES (7)")
        os.kill(int((data_dir / "postgres/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        with trio.fail_after(60):
            await back.wait()
        # The pool may still hold connections of the old server, and finds that out by using them.
        with trio.fail_after(60):
            while True:
                try:
                    assert await database.fetch_value("SELECT number FROM kept") == 7
                    break
                except CalloraFault:
                    await trio.lowlevel.checkpoint()
    assert told == ["the embedded PostgreSQL died and was restarted (1 of 10)"]
    assert server_processes(data_dir) == []


async def test_a_server_that_keeps_dying_is_given_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "RESTARTS_MAX", 1)

    def kill(_sentence: str = "") -> None:
        os.kill(int((data_dir / "postgres/postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    async def live() -> None:
        async with running_postgres(data_dir, settings=QUICK, on_restart=kill):
            kill()
            await trio.sleep_forever()

    with pytest.RaisesGroup(pytest.RaisesExc(EmbeddedFailed, match="died 2 times")), trio.fail_after(60):
        await live()
    with trio.fail_after(60):  # the killed server's children end when they notice
        while server_processes(data_dir):  # noqa: ASYNC110 - processes announce their end to nobody
            await trio.sleep(0.02)


async def test_the_blocks_own_error_comes_out_as_it_is(data_dir: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with running_postgres(data_dir, settings=QUICK):
            raise KeyError("mine")
    assert server_processes(data_dir) == []


async def test_a_cancelled_start_leaves_nothing_running(data_dir: Path) -> None:
    for seconds in (0.0, 0.3, 0.6):
        with trio.move_on_after(seconds):
            async with running_postgres(data_dir, settings=QUICK):
                await trio.sleep_forever()
        assert server_processes(data_dir) == []


OWNER = """
import sys, time
from pathlib import Path
from callora.store.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.server_pid, flush=True)
time.sleep(600)
"""


def test_a_killed_owner_takes_its_server_with_it_and_the_next_owner_finds_the_data(data_dir: Path) -> None:
    deep = data_dir / ("deep" * 25)
    with subprocess.Popen([sys.executable, "-c", OWNER, str(deep)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        family = [server, *server.children(recursive=True)]
        socket_dir = Path((deep / "postgres/postmaster.pid").read_text().splitlines()[4])
        assert socket_dir.exists()
        owner.kill()
    successor = EmbeddedPostgres(deep)
    successor.start()  # at once: it waits for the old server itself
    try:
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert trio.run(run, successor.dsn, "SELECT 1") == 1
        assert not socket_dir.exists()
    finally:
        successor.stop()
    assert server_processes(deep) == []


def test_an_owner_killed_in_its_first_start_leaves_no_half_made_cluster(data_dir: Path) -> None:
    (data_dir / "postgres.new-killed").mkdir(parents=True)
    (data_dir / "postgres.new-killed/PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(data_dir, settings=QUICK)
    server.start()
    server.stop()
    assert not list(data_dir.glob("postgres.new-*"))


def test_data_of_another_version_is_refused_with_the_cure(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres/PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedFailed, match=r"made by PostgreSQL 9.*CALLORA_PG_BIN"):
        EmbeddedPostgres(data_dir).start()


def test_a_setting_the_server_refuses_is_shown(data_dir: Path) -> None:
    with pytest.raises(EmbeddedFailed, match="no_such_setting"):
        EmbeddedPostgres(data_dir, settings={"no_such_setting": "1"}).start()
    assert server_processes(data_dir) == []


def test_the_binaries_may_be_named_and_must_be_there(tmp_path: Path) -> None:
    binaries = find_binaries({})
    assert find_binaries({"CALLORA_PG_BIN": str(binaries)}) == binaries
    with pytest.raises(EmbeddedFailed, match="CALLORA_PG_BIN"):
        find_binaries({"CALLORA_PG_BIN": str(tmp_path)})


def test_root_without_user_namespaces_runs_it_as_nobody_and_others_as_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "_user_namespaces_work", lambda: False)
    root = os.geteuid() == 0
    if root:  # others are not kept out of what is theirs
        with tempfile.TemporaryDirectory(prefix="callora-", dir="/tmp") as directory:
            Path(directory).chmod(0o700)
            with pytest.raises(EmbeddedFailed, match="cannot reach"):
                EmbeddedPostgres(Path(directory) / "data", settings=QUICK).start()
            assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o700
    with tempfile.TemporaryDirectory(prefix="callora-", dir="/tmp") as directory:
        Path(directory).chmod(0o711)
        data_dir = Path(directory) / "data"
        server = EmbeddedPostgres(data_dir, settings=QUICK)
        server.start()
        try:
            whose = "nobody" if root else psutil.Process().username()
            assert {process.username() for process in server_processes(data_dir)} == {whose}
            assert trio.run(run, server.dsn, "CREATE TABLE kept AS SELECT 7 AS number") is None
        finally:
            server.stop()
        # The same data where user namespaces work: it still belongs to the same, who still runs it.
        monkeypatch.undo()
        server.start()
        try:
            assert trio.run(run, server.dsn, "SELECT number FROM kept") == 7
        finally:
            server.stop()
