"""Closed-loop load: wrk, with a script that walks through the API keys and reports as JSON."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

import attrs
import trio

from bench.machine import BenchError

_SCRIPT: Final = """\
local keys = {}
for line in io.lines(os.getenv("BENCH_KEYS")) do keys[#keys + 1] = line end

local requests, turn = {}, 0
if #keys > 1 then
    function init(args)
        for i, key in ipairs(keys) do
            requests[i] = wrk.format("GET", nil, {["X-Api-Key"] = key, ["Host"] = wrk.headers["Host"]})
        end
    end
    local intent, intents = os.getenv("BENCH_INTENT"), 0
    function request()
        turn = turn % #requests + 1
        if intent == nil then return requests[turn] end
        intents = intents + 1
        local line = "\\r\\nIdempotency-Key: " .. intent .. "-" .. intents .. "\\r\\n\\r\\n"
        return (requests[turn]:gsub("\\r\\n\\r\\n", line, 1))
    end
elseif #keys == 1 then
    wrk.headers["X-Api-Key"] = keys[1]
end

function done(summary, latency, requests)
    local e = summary.errors
    io.write(string.format(
        '\\nBENCH {"requests": %d, "micros": %d, "bytes": %d, "p50": %d, "p99": %d, "max": %d, ' ..
        '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}\\n',
        summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(99), latency.max,
        e.connect, e.read, e.write, e.status, e.timeout))
end
"""
_MARK: Final = "BENCH "


@attrs.frozen
class Target:
    """What the load is sent to."""

    port: int
    """On 127.0.0.1."""
    path: str
    """Path of the call."""
    keys: Path
    """File with one API key a line; calls walk through them in turn. Empty for calls without a key."""
    keyed: bool = False
    """Whether each call has an Idempotency-Key of its own; there are several API keys then."""


@attrs.frozen
class Load:
    """What one closed-loop run saw."""

    requests: int
    """Answers received whole, of any status."""
    refused: int
    """Of those, how many had a status of 400 or more."""
    broken: int
    """Connections and calls that failed without an answer."""
    seconds: float
    """How long the run took."""
    received_bytes: int
    """Heads and bodies."""
    p50_ms: float
    p99_ms: float
    max_ms: float

    @property
    def answered(self) -> int:
        """Answers with a success status: no upstream of the benchmark redirects."""
        return self.requests - self.refused

    @property
    def calls_per_second(self) -> float:
        """Successful answers a second."""
        return self.answered / self.seconds

    @property
    def complaint(self) -> str | None:
        """Why this run has no figure, or None: a lane that refuses calls is fast at the wrong thing."""
        if self.refused or self.broken or not self.answered:
            return f"{self.refused} calls refused, {self.broken} broken, {self.answered} answered"
        return None


def write_keys(path: Path, api_keys: Sequence[str]) -> Path:
    """Write a file of API keys for a `Target` and return its path."""
    path.write_text("".join(f"{key}\n" for key in api_keys))
    return path


async def run_wrk(wrk: str, target: Target, *, connections: int, seconds: float, directory: Path) -> Load:
    """Return what wrk saw: one thread, `connections` open, each sending its next call as soon as it is answered.

    Args:
        wrk: path of the binary.
        target: where the calls go.
        connections: open at the same time, > 0.
        seconds: length of the run; wrk counts in whole seconds, >= 1.
        directory: where the script is put.

    Raises:
        BenchError: wrk failed; its output is in the message.
    """
    script = directory / "wrk.lua"
    script.write_text(_SCRIPT)
    environ = {"BENCH_KEYS": str(target.keys)} | ({"BENCH_INTENT": uuid4().hex} if target.keyed else {})
    completed = await trio.run_process(
        [
            *(wrk, "--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"),
            *("--timeout", "10s", "--script", str(script), f"http://127.0.0.1:{target.port}{target.path}"),
        ],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
        env=environ,
    )
    output = completed.stdout.decode(errors="replace")
    report = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    if completed.returncode != 0 or report is None:
        raise BenchError(f"wrk ended with {completed.returncode}:\n{output}")
    said = json.loads(report.removeprefix(_MARK))
    return Load(
        requests=said["requests"],
        refused=said["status"],
        broken=said["connect"] + said["read"] + said["write"] + said["timeout"],
        seconds=said["micros"] / 1e6,
        received_bytes=said["bytes"],
        p50_ms=said["p50"] / 1000,
        p99_ms=said["p99"] / 1000,
        max_ms=said["max"] / 1000,
    )
