"""Open-loop load: calls at a constant rate, each timed from the moment it was due.

A closed loop waits while the server stalls and so never sees the queue it would have caused. Here a call that finds no
free connection, or a generator that was late, still counts from its due time. Runs as a process of its own, started by
`open_loop`, because a generator that shares an event loop with its supervisor measures both.
"""

import argparse
import json
import re
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

import attrs
import trio

from bench.load import Target
from bench.machine import BenchError

_READ_BYTES: Final = 65536
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_SILENCE_SECONDS: Final = 10.0
"""Without any answer for so long, the calls that are left are given up."""


@attrs.frozen
class Latencies:
    """What one open-loop run saw; times from when a call was due to the last byte of its answer, milliseconds."""

    calls: int
    """Calls that were due and sent."""
    answered: int
    """Calls answered with the expected status."""
    rate: float
    """Calls due a second."""
    calls_per_second: float
    """Calls answered a second, from the first one due to the last answer."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    lateness_p99_ms: float
    """How late the generator itself sent a call although a connection was free; p99 near the latencies' own p50 means
    that the generator, not the server, was measured."""


@attrs.define(eq=False)
class _Connection:
    socket: socket.socket
    due: float = 0.0
    received: bytes = b""


class _Generator:
    """Sends `total` calls, one every `interval` seconds, over a fixed set of connections kept open."""

    def __init__(self, port: int, requests: list[bytes], connections: int, expected: int) -> None:
        self._requests = requests
        self._status = str(expected).encode()
        self._epoll = select.epoll()
        self._free: list[_Connection] = []
        self._by_fd: dict[int, _Connection] = {}
        self._waiting: deque[float] = deque()
        self._busy = 0
        self._sent = 0
        self._heard_at = 0.0
        self._started_at = 0.0
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.unexpected = 0
        for _ in range(connections):
            opened = socket.create_connection(("127.0.0.1", port))
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.setblocking(False)
            connection = _Connection(opened)
            self._by_fd[opened.fileno()] = connection
            self._free.append(connection)
            self._epoll.register(opened.fileno(), select.EPOLLIN)

    def run(self, total: int, interval: float) -> None:
        """Return when every call is answered, or when no answer has come for 10 s."""
        start = self._started_at = self._heard_at = time.perf_counter() + 0.01
        due_count = 0
        while due_count < total or self._busy or self._waiting:
            now = time.perf_counter()
            if now > self._heard_at + _SILENCE_SECONDS:
                return
            while due_count < total and (due := start + due_count * interval) <= now:
                due_count += 1
                if self._free:
                    self.lateness.append(now - due)
                    self._send(self._free.pop(), due)
                else:
                    self._waiting.append(due)
            next_due = start + due_count * interval if due_count < total else now + 1.0
            # epoll rounds up to milliseconds; select on the epoll descriptor waits for microseconds.
            select.select([self._epoll.fileno()], [], [], max(0.0, next_due - time.perf_counter()))
            for fd, _ in self._epoll.poll(0):
                self._receive(self._by_fd[fd])

    @property
    def seconds(self) -> float:
        """How long the run took, to the last answer."""
        return self._heard_at - self._started_at

    def _send(self, connection: _Connection, due: float) -> None:
        connection.due = due
        connection.received = b""
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        self._busy += 1
        sent = connection.socket.send(request)
        assert sent == len(request), "a request of some hundred bytes fits an empty send buffer"

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("the server closed a connection that was to be kept")
        received = connection.received = connection.received + data
        head_end = received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        length = _LENGTH.search(received, 0, head_end + 2)
        if length is None:
            raise ConnectionError("an answer without Content-Length cannot be timed")
        if len(received) < head_end + 4 + int(length.group(1)):
            return
        self._heard_at = time.perf_counter()
        if received[9:12] == self._status:
            self.latencies.append(self._heard_at - connection.due)
        else:
            self.unexpected += 1
        self._busy -= 1
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._free.append(connection)


def percentile(ordered: list[float], share: float) -> float:
    """Return the value below which `share` of an ordered list lies; 0.0 for an empty list."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


async def open_loop(
    target: Target, *, rate: float, calls: int, connections: int, expected_status: int = 200
) -> Latencies:
    """Return the latencies of `calls` calls due at a constant `rate`, sent by a process of its own.

    Args:
        target: where the calls go; its keys are used in turn.
        rate: calls due a second, > 0; a rate out of reach makes the run a closed loop over all connections.
        calls: how many are due in all.
        connections: opened before the first call is due and kept.
        expected_status: what a counted answer has.

    Raises:
        BenchError: the generator failed, or calls had another status or no answer.
    """
    argv = [sys.executable, "-m", "bench.openloop", str(target.port), target.path, str(target.keys)]
    argv += [str(rate), str(calls), str(connections), str(expected_status)]
    completed = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    if completed.returncode != 0:
        raise BenchError(f"the open-loop generator failed:\n{completed.stderr.decode(errors='replace')}")
    latencies = Latencies(**json.loads(completed.stdout))
    if latencies.answered != calls:
        raise BenchError(
            f"open loop at {rate:.0f}/s: {calls} calls, {latencies.answered} with status {expected_status}"
        )
    return latencies


def main() -> None:
    """Run the generator as the command line says and print its `Latencies` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.openloop", description=__doc__)
    for name, kind in {"port": int, "path": str, "keys": Path}.items():
        parser.add_argument(name, type=kind)
    for name, number in {"rate": float, "calls": int, "connections": int, "expected": int}.items():
        parser.add_argument(name, type=number)
    asked = parser.parse_args()
    keys = asked.keys.read_text().split()
    head = f"GET {asked.path} HTTP/1.1\r\nHost: 127.0.0.1:{asked.port}\r\n"
    requests = [f"{head}X-Api-Key: {key}\r\n\r\n".encode() for key in keys] or [f"{head}\r\n".encode()]
    generator = _Generator(asked.port, requests, asked.connections, asked.expected)
    generator.run(asked.calls, 1 / asked.rate)
    latencies, lateness = sorted(generator.latencies), sorted(generator.lateness)
    seen = Latencies(
        calls=asked.calls,
        answered=len(latencies),
        rate=asked.rate,
        calls_per_second=len(latencies) / generator.seconds if latencies else 0.0,
        p50_ms=percentile(latencies, 0.50) * 1000,
        p99_ms=percentile(latencies, 0.99) * 1000,
        max_ms=percentile(latencies, 1.0) * 1000,
        lateness_p99_ms=percentile(lateness, 0.99) * 1000,
    )
    print(json.dumps(attrs.asdict(seen)))


if __name__ == "__main__":
    main()
