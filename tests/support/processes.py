"""Whole processes of Callora for tests: started, spoken to, killed, and never left behind; and a load that keeps books.

A process writes to files, so that it never waits for us and its last words are there whatever ended it.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import attrs
import psutil
import trio

from callora.config.settings import SETTINGS
from callora.ledger.money import parse_usdc
from tests.support.client import BodyReader, ClosedEarly, Head, Malformed, Wire, request_bytes
from tests.support.service import GENEROUS

POLL_SECONDS: Final = 0.01
START_SECONDS: Final = 60.0
CALL_SECONDS: Final = 60.0
REPOSITORY: Final = Path(__file__).parents[2]
_OURS: Final = frozenset(name for setting in SETTINGS.values() for name in setting.names)


class NeverHappened(AssertionError):
    """What a process was to do did not happen in time; the text ends with its last words."""


def free_port() -> int:
    """Return a port nobody listens on, below those that the system gives to outgoing connections.

    A killed service's port must still be there for its successor, while clients open connections by the hundred.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def processes_in(directory: Path) -> list[psutil.Process]:
    """Return every process that works in a directory or names it in its command line: an embedded server's family."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            named = str(directory) in " ".join(process.cmdline())
            if process.pid != os.getpid() and (named or Path(process.cwd()).is_relative_to(directory)):
                found.append(process)
    return found


@contextmanager
def _sigint_not_ignored() -> Iterator[None]:
    """Keep a child from inheriting that SIGINT is ignored, as shells have it for what a script runs in background."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class CalloraProcess:
    """One `callora` command in a process group of its own."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], log_directory: Path) -> None:
        """Start it.

        Args:
            arguments: after `callora`.
            environ: settings; those of the tests' own environment are not inherited.
        """
        inherited = {name: text for name, text in os.environ.items() if name not in _OURS}
        number = len(list(log_directory.glob("*.err")))
        self._out = log_directory / f"{number}.out"
        self._err = log_directory / f"{number}.err"
        self.started_at = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err, _sigint_not_ignored():
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "callora", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**inherited, **environ},
                cwd=REPOSITORY,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, and its group's."""
        return self.popen.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return self._err.read_text(errors="replace")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to the process alone."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill the process alone with SIGKILL and take its exit code; what it started is left to notice."""
        self.popen.kill()
        self.popen.wait()

    def end(self) -> None:
        """Kill its whole group, whatever state it is in. Idempotent."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Return its exit code; blocking, for tests without an event loop."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.never(f"it did not end within {seconds:g} s") from None

    async def ended(self, seconds: float = START_SECONDS) -> int:
        """Return its exit code."""
        await self.until(lambda: self.popen.poll() is not None, "it to end", seconds)
        assert self.popen.returncode is not None
        return self.popen.returncode

    async def until(self, happened: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Poll until something outside has happened.

        Raises:
            NeverHappened: it has not, in time.
        """
        with trio.move_on_after(seconds):
            while not happened():  # noqa: ASYNC110 - nobody in there can set an event of ours
                await trio.sleep(POLL_SECONDS)
            return
        raise self.never(f"waited {seconds:g} s for {what}")

    def facts(self, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Return the JSON line of `dev --json`, once it is printed; blocking."""
        deadline = time.monotonic() + seconds
        while not self.stdout.endswith("\n"):
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise self.never("it printed no JSON line")
            time.sleep(POLL_SECONDS)
        facts = json.loads(self.stdout)
        assert isinstance(facts, dict)
        return facts

    def never(self, what: str) -> NeverHappened:
        """Return the failure to raise."""
        return NeverHappened(f"{what}; exit code {self.popen.poll()}; its last words:\n{self.stderr[-4000:]}")


@contextmanager
def callora(*arguments: str, log_directory: Path, environ: Mapping[str, str] | None = None) -> Iterator[CalloraProcess]:
    """Run a command for the length of the block; then nothing of it is left, whatever happened.

    Args:
        environ: settings on top of GENEROUS.
    """
    process = CalloraProcess(arguments, {**GENEROUS, **(environ or {})}, log_directory)
    try:
        yield process
    finally:
        process.end()


def run_callora(
    *arguments: str, log_directory: Path, environ: Mapping[str, str] | None = None, seconds: float = 60
) -> CalloraProcess:
    """Run a command to its end; its exit code is `popen.returncode`."""
    with callora(*arguments, log_directory=log_directory, environ=environ) as process:
        process.wait(seconds)
    return process


@contextmanager
def nothing_left_in(directory: Path, seconds: float = 15.0) -> Iterator[None]:
    """Wait after the block until no process works in the directory; kill and fail otherwise."""
    try:
        yield
    finally:
        deadline = time.monotonic() + seconds
        while (left := processes_in(directory)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        assert not left, f"left behind: {left}"


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@attrs.frozen
class Answer:
    """What one request came to."""

    target: str
    key: str | None
    """Its idempotency key."""
    began: float
    """On the machine's monotonic clock, like `ended`."""
    ended: float
    head: Head | None = None
    """None where no whole head came."""
    body: bytes = b""
    error: str | None = None
    """Why the connection broke before the whole answer was there."""

    @property
    def status(self) -> int | None:
        """The answer's status, None without one."""
        return None if self.head is None else int(self.head.start[1])

    @property
    def whole(self) -> bool:
        """True when everything of the answer came."""
        return self.error is None

    @property
    def charge(self) -> int:
        """Stroops that the head says were charged."""
        said = self.header("X-Callora-Charge")
        return 0 if said is None else parse_usdc(said)

    @property
    def code(self) -> str | None:
        """The code of Callora's own problem document, None for anything else."""
        if (self.header("Content-Type") or "") != "application/json":
            return None
        with suppress(ValueError, AttributeError):
            code: str | None = json.loads(self.body).get("code")
            return code
        return None

    def header(self, name: str) -> str | None:
        """Return the only value of a header."""
        return None if self.head is None else self.head.header(name)


class Caller:
    """One client connection, kept alive and opened anew when it has broken."""

    def __init__(self, port: int, api_key: str) -> None:
        self._port = port
        self._api_key = api_key
        self._wire: Wire | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(1, shield=True):
            await self.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection that has not been seen to break."""
        return self._wire is not None

    async def close(self) -> None:
        """Close the connection, if there is one."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await trio.aclose_forcefully(wire.stream)

    async def connect(self) -> None:
        """Open a connection, if there is none; OSError where nobody listens."""
        if self._wire is None:
            self._wire = Wire(await trio.open_tcp_stream("127.0.0.1", self._port))
            self._wire.tape = None

    async def call(self, target: str, *, key: str | None = None, method: str = "GET", body: bytes = b"") -> Answer:
        """Return what a request came to; a broken connection is an answer too. Never longer than CALL_SECONDS."""
        began = time.monotonic()
        headers = [("X-Api-Key", self._api_key)]
        if key is not None:
            headers.append(("Idempotency-Key", key))
        head: Head | None = None
        received = b""
        error: str | None = f"no answer within {CALL_SECONDS:g} s"
        with trio.move_on_after(CALL_SECONDS):
            try:
                await self.connect()
                assert self._wire is not None
                await self._wire.stream.send_all(request_bytes(method, target, headers, body))
                head = await self._wire.head()
                reader = BodyReader.of_response(self._wire, head, method)
                received = await reader.read_all()
                error = None
            except ClosedEarly as early:
                error, received = f"{early}", early.received
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, Malformed) as broken:
                error = f"{type(broken).__name__}: {broken}"
        if error is not None or (head is not None and head.header("Connection") == "close"):
            await self.close()
        return Answer(target, key, began, time.monotonic(), head, received, error)


# ---------------------------------------------------------------------------------------------------------------------
# Load


@attrs.define
class Intent:
    """One keyed call and all its attempts."""

    key: str
    target: str
    answers: list[Answer] = attrs.field(factory=list)
    due: float = 0.0
    """When it may be tried again, on Trio's clock."""

    @property
    def answered(self) -> list[Answer]:
        """The answers that came whole and that a retry would only repeat: the stored ones, and refusals for good."""
        return [
            answer
            for answer in self.answers
            if answer.whole and (answer.status in (200, 402) or answer.header("Idempotent-Replayed") == "true")
        ]

    @property
    def decided(self) -> bool:
        """True once an answer was final."""
        return bool(self.answered)


class Load:
    """Paid calls, plain and keyed, by several callers at once, with the books kept on this side of the wire.

    A keyed call that got no final answer is sent again, under its key, until it gets one. `settle` finishes them.
    """

    def __init__(
        self, port: int, api: str, plain_key: str, keyed_key: str, *, seed: int, pause_seconds: float = 0.02
    ) -> None:
        """Args:
        api: the slug of an API that answers every path with 200 and something unique.
        plain_key: API key for plain calls.
        keyed_key: API key, of another vault, for calls with an Idempotency-Key.
        pause_seconds: between two calls of one caller, at most.
        """
        self._port = port
        self._base = f"/v1/call/{api}"
        self._plain_key = plain_key
        self._keyed_key = keyed_key
        self._random = random.Random(seed)
        self._pause_seconds = pause_seconds
        self._count = 0
        self._pending: list[Intent] = []
        self.plain: list[Answer] = []
        self.intents: list[Intent] = []
        self.stopping = False

    async def run(self, plain_callers: int, keyed_callers: int) -> None:
        """Call until `stopping`."""
        async with trio.open_nursery() as nursery:
            for _ in range(plain_callers):
                nursery.start_soon(self._call_plainly)
            for _ in range(keyed_callers):
                nursery.start_soon(self._call_keyed)

    async def settle(self, seconds: float, callers: int = 8) -> None:
        """After `run`: retry what is undecided until everything is decided."""
        self.stopping = False
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(callers):
                    nursery.start_soon(self._finish_pending)
        undecided = [intent for intent in self.intents if not intent.decided]
        assert not undecided, f"{len(undecided)} keyed calls are undecided, such as {undecided[0]}"

    @property
    def keyed(self) -> list[Answer]:
        """Every answer to a keyed call."""
        return [answer for intent in self.intents for answer in intent.answers]

    async def _call_plainly(self) -> None:
        async with Caller(self._port, self._plain_key) as caller:
            while not self.stopping:
                self._count += 1
                answer = await caller.call(f"{self._base}/plain/{self._count}")
                self.plain.append(answer)
                await self._pace(answer)

    async def _call_keyed(self) -> None:
        async with Caller(self._port, self._keyed_key) as caller:
            while not self.stopping:
                intent = self._next_due()
                if intent is None:
                    self._count += 1
                    intent = Intent(f"intent-{self._count}", f"{self._base}/keyed/{self._count}")
                    self.intents.append(intent)
                await self._try(caller, intent)

    async def _finish_pending(self) -> None:
        async with Caller(self._port, self._keyed_key) as caller:
            while any(not intent.decided for intent in self.intents):
                intent = self._next_due()
                if intent is None:
                    await trio.sleep(POLL_SECONDS)
                else:
                    await self._try(caller, intent)

    async def _try(self, caller: Caller, intent: Intent) -> None:
        answer = await caller.call(intent.target, key=intent.key)
        intent.answers.append(answer)
        if not intent.decided:
            # A retry at once meets the same outage; one after a while, in any order, meets what was stored.
            intent.due = trio.current_time() + self._random.uniform(0.05, 0.5)
            self._pending.append(intent)
        elif self._random.random() < 0.2 and len(intent.answers) < 3:
            # A client that retries although it has its answer.
            intent.answers.append(await caller.call(intent.target, key=intent.key))
        await self._pace(answer)

    def _next_due(self) -> Intent | None:
        now = trio.current_time()
        for intent in self._pending:
            if intent.due <= now:
                self._pending.remove(intent)
                return intent
        return None

    async def _pace(self, answer: Answer) -> None:
        # While nobody listens a refused connection costs nothing, and a loop without a pause would only burn the CPU.
        await trio.sleep(self._random.uniform(0, self._pause_seconds) if answer.whole else 0.02)
