"""The machine: which cores do what, what a process has cost, which tools must be there, and how children are run.

Figures are only comparable side by side in one run, so everything that could favour a lane is decided here once: the
gateway under test has a core to itself, and load, upstream and PostgreSQL share another.
"""

import http.client
import importlib.metadata
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import psutil
import trio

GATEWAY_CORE: Final = 0
LOAD_CORE: Final = 1

DEBIAN_PACKAGES: Final = {"wrk": "wrk", "nginx": "nginx", "taskset": "util-linux"}
"""Tools that are not Python packages, and the Debian package that brings each."""

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_VERSIONS_OF: Final = ("callora", "trio", "trio-asyncio", "asyncpg", "hypercorn", "quart-trio", "httpx")
_STOP_SECONDS: Final = 40.0
"""Longer than the service's own drain, so that a stop that has to be forced is a defect and not a habit."""


class BenchError(Exception):
    """A measurement that cannot be taken: a tool is missing, a process died, an answer is not what it should be."""


@attrs.frozen
class Machine:
    """Where the figures were taken."""

    cpu: str
    """The processor's model name."""
    cores: int
    """Cores this process may use."""
    memory_mib: int
    """Memory of the machine, MiB."""
    kernel: str
    """Operating system and kernel release."""
    congestion_control: str
    """How TCP paces what is sent. Large bodies cost several times as much CPU time with one as with another."""
    python: str
    """Implementation and version of the interpreter."""
    versions: dict[str, str]
    """Version of each package and tool that takes part."""


@attrs.frozen
class Child:
    """A process that the benchmark started, with all that it started itself."""

    pid: int
    """Root of its process tree."""
    log: Path
    """Its standard output and standard error."""
    process: trio.Process
    """The handle to wait on."""

    def freeze(self) -> None:
        """Stop the whole tree where it stands, so that it costs nothing while others are measured."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the whole tree go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in tree(self.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended between the look and the signal

    def tail(self) -> str:
        """Return the last lines of its log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def require_tools() -> dict[str, str]:
    """Return the path of each tool the benchmark drives.

    Raises:
        BenchError: some are missing; all of them are named, with the package that brings them.
    """
    # nginx lives in /usr/sbin, which is not on every user's PATH.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    found = {tool: shutil.which(tool, path=search) for tool in DEBIAN_PACKAGES}
    missing = [tool for tool, path in found.items() if path is None]
    if missing:
        packages = " ".join(DEBIAN_PACKAGES[tool] for tool in missing)
        raise BenchError(f"the benchmark needs {', '.join(missing)}; on Debian: apt-get install {packages}")
    return {tool: path for tool, path in found.items() if path is not None}


def describe(tools: Mapping[str, str]) -> Machine:
    """Return what this machine is and which versions take part."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    nginx = subprocess.run([tools["nginx"], "-v"], capture_output=True, text=True, check=True)
    versions["nginx"] = nginx.stderr.strip().rpartition("/")[2]
    wrk = subprocess.run([tools["wrk"], "-v"], capture_output=True, text=True, check=False)  # exits with 1 by design
    versions["wrk"] = wrk.stdout.partition(" Copyright")[0].removeprefix("wrk ").strip()
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) // 1024,
        kernel=f"{platform.system()} {platform.release()}",
        congestion_control=Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        versions=versions,
    )


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def move(pids: Sequence[int], cores: Sequence[int]) -> None:
    """Put processes on these cores, with every thread they have now; what they start later inherits it.

    Cores that the machine lacks are left out; where it has none of them, nothing is moved.
    """
    usable = set(cores) & set(all_cores())
    for pid in pids:
        try:
            threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
            for thread in threads if usable else []:
                os.sched_setaffinity(thread, usable)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile


def all_cores() -> list[int]:
    """Return every core of the machine that a child may be given."""
    return list(range(os.cpu_count() or 1))


def tree(root: int) -> list[int]:
    """Return the pids of a process and all its descendants; empty when it has ended."""
    try:
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(root: int) -> float:
    """Return user and system time of a process tree so far, seconds, with that of its children that have ended.

    A child that ends is waited for by its parent and goes on counting there, so the difference of two readings loses
    nothing. The kernel counts in ticks of 10 ms: measure over seconds.
    """
    total = 0.0
    for pid in tree(root):
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue  # ended between the look and the reading; its parent counts it from now on
        total += times.user + times.system + times.children_user + times.children_system
    return total


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process tree, bytes; pages that its processes share count once for each."""
    return sum(psutil.Process(pid).memory_info().rss for pid in tree(root))


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what a child gets for an environment: these variables and nothing of ours that could change a figure."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, **(variables or {})}


@asynccontextmanager
async def running(
    argv: Sequence[str],
    *,
    cores: Sequence[int],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> AsyncIterator[Child]:
    """Run a command on the given cores for as long as the block lasts, then stop it with SIGTERM and wait for it.

    Args:
        argv: the command; its process must stay in the foreground.
        cores: cores it may use; those the machine lacks are left out.
        log: file that takes its standard output and standard error.
        env: variables it gets beside those of `environment`.
        cwd: directory it starts in, ours by default.

    Cancellation: the process is stopped all the same; one that ignores SIGTERM for 40 s is killed with its children.
    """
    usable = [core for core in cores if core in all_cores()] or all_cores()
    process = await trio.lowlevel.open_process(
        ["taskset", "--cpu-list", ",".join(map(str, usable)), *argv],
        stdin=subprocess.DEVNULL,
        stdout=(out := _create(log)),
        stderr=subprocess.STDOUT,
        env=environment(env),
        cwd=cwd,
        start_new_session=True,  # an interrupt at the terminal is ours to pass on, in order
    )
    os.close(out)
    child = Child(pid=process.pid, log=log, process=process)
    try:
        yield child
    finally:
        with trio.move_on_after(_STOP_SECONDS, shield=True):
            child.thaw()
            process.terminate()
            await process.wait()
        if process.returncode is None:
            print(f"{argv[0]} did not stop within {_STOP_SECONDS:.0f} s and was killed", file=sys.stderr)
            for pid in reversed(tree(child.pid)):
                os.kill(pid, signal.SIGKILL)
            with trio.move_on_after(5, shield=True):
                await process.wait()


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


async def fetch(port: int, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Return status and body of one GET on 127.0.0.1, over a connection of its own.

    Raises:
        OSError: nobody listens, or the connection broke.
        http.client.HTTPException: the answer is not HTTP.
    """

    def blocking() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    return await trio.to_thread.run_sync(blocking)


async def until_ready(
    child: Child, port: int, path: str, *, headers: Mapping[str, str] | None = None, seconds: float = 30
) -> None:
    """Return once a GET of `path` is answered with 200.

    Raises:
        BenchError: the process ended, or `seconds` have passed; its last lines are in the message.
    """
    with trio.move_on_after(seconds):
        while child.process.poll() is None:
            try:
                if (await fetch(port, path, headers))[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            await trio.sleep(0.02)
    raise BenchError(f"no 200 from port {port}{path}; the last lines of {child.log.name}:\n{child.tail()}")
