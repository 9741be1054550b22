"""Processes share limits through one store: never above them, in any window, whatever the load."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

from callora.ledger.ids import ApiKeyId, UserId
from callora.store.pace import logs_of
from tests.support.pacer import Outcome, Phase
from tests.support.processes import REPOSITORY
from tests.support.valkey import Valkey, Watched, running_valkey

WINDOW_SECONDS = 0.03
USER_CALLS, KEY_CALLS = 10, 6
USER = UserId("0190a000-0000-7000-8000-00000000000a")
KEYS = (ApiKeyId("key-0"), ApiKeyId("key-1"))
PROCESSES_MAX = 4


@contextmanager
def pacer(url: str, name: str, errors: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that takes calls, for the length of the block."""
    with errors.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.pacer", url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            cwd=REPOSITORY,
            text=True,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[str]") -> str:
    """Return a process's next line; empty where it has ended."""
    assert process.stdout is not None
    return process.stdout.readline()


@attrs.frozen
class Crowd:
    """A store, and processes that share it."""

    valkey: Valkey
    processes: list["subprocess.Popen[str]"]

    def run(self, phase: Phase) -> tuple[list[Outcome], dict[str, list[tuple[int, str]]]]:
        """Return what each process was told, and by log when the store let in which call."""
        self.valkey.ask("FLUSHALL")
        watched = Watched(self.valkey)
        running = self.processes[: phase.processes]
        for process in running:
            assert process.stdin is not None
            process.stdin.write(json.dumps(attrs.asdict(phase)) + "\n")
            process.stdin.flush()
        outcomes = [Outcome(**json.loads(told(process))) for process in running]
        let_in = watched.end()
        return outcomes, {log: calls for log, calls in let_in.items() if "{trial}" not in log}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """As many processes as any test wants."""
    directory = tmp_path_factory.mktemp("pacers")
    with ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(directory / "valkey"))
        files = [directory / f"p{number}.err" for number in range(PROCESSES_MAX)]
        running = [stack.enter_context(pacer(valkey.url, file.stem, file)) for file in files]
        for process, file in zip(running, files, strict=True):
            assert told(process) == "ready\n", file.read_text()
        yield Crowd(valkey, running)


@pytest.mark.parametrize("windows", [15, pytest.param(1000, marks=pytest.mark.proof)])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("mode", ["burst", "steady"])
def test_no_window_ever_has_more_calls_than_its_limit(crowd: Crowd, mode: str, processes: int, windows: int) -> None:
    outcomes, let_in = crowd.run(Phase(mode, windows, WINDOW_SECONDS, USER_CALLS, KEY_CALLS, processes, USER))
    user_log, key_logs = logs_of(USER, KEYS[0])[0], [logs_of(USER, key)[1] for key in KEYS]
    assert let_in.keys() == {user_log, *key_logs}
    for log, limit in ((user_log, USER_CALLS), *((log, KEY_CALLS) for log in key_logs)):
        times = sorted(at for at, _ in let_in[log])
        for first, beyond in zip(times, times[limit:], strict=False):
            assert beyond - first >= WINDOW_SECONDS * 1_000_000, log
    # One entry a call, in both of its logs, of exactly the calls that were told so.
    named = [call for _, call in let_in[user_log]]
    assert len(named) == len(set(named))
    assert sorted(named) == sorted(call for log in key_logs for _, call in let_in[log])
    admitted = {call for outcome in outcomes for call in outcome.admitted}
    undecided = {call for outcome in outcomes for call in outcome.undecided}
    assert admitted <= set(named) <= admitted | undecided
    # The limits were used, not only kept.
    assert sum(outcome.refused for outcome in outcomes) > 0
    assert len(admitted) > windows * USER_CALLS / 3
    print(f"\n{processes} processes, {mode}: {len(admitted)} let in, {len(undecided)} undecided")
