"""Several processes on one database: money stays exact between them, and a parent keeps its workers."""

import random
import signal
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import trio

from callora.ledger.money import parse_usdc
from tests.proof.books import API, PRICE, answer_uniquely, assert_audit_clean, books, first_paid
from tests.support.processes import (
    Answer,
    Caller,
    CalloraProcess,
    callora,
    free_port,
    nothing_left_in,
    run_callora,
)
from tests.support.service import Consumer, running_service
from tests.support.upstream import RawUpstream, raw_upstream
from tests.support.valkey import Valkey


async def seeded(database_url: str, upstream: RawUpstream, balances: list[str]) -> list[Consumer]:
    """Publish the API and make a consumer for each balance."""
    async with running_service(database_url) as service:
        await service.api(API, upstream.url)
        return [await service.consumer(balance) for balance in balances]


async def call_all_at_once(port_of: list[int], consumer: Consumer, target: str, key: str | None = None) -> list[Answer]:
    """Make one call to each port, each on a connection of its own that is open before any of them is sent."""
    answers: list[Answer] = []
    ready = trio.Event()
    waiting = 0

    async def one(port: int) -> None:
        nonlocal waiting
        async with Caller(port, consumer.api_key) as caller:
            await caller.connect()
            waiting += 1
            if waiting == len(port_of):
                ready.set()
            await ready.wait()
            answers.append(await caller.call(target, key=key))

    async with trio.open_nursery() as nursery:
        for port in port_of:
            nursery.start_soon(one, port)
    return answers


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.proof)])
async def test_two_processes_never_spend_a_balance_twice(database_url: str, tmp_path: Path, rounds: int) -> None:
    ports = [free_port() for _ in range(2)]
    async with raw_upstream(answer_uniquely(0.0)) as upstream, books(database_url) as database:
        *consumers, warm = await seeded(database_url, upstream, ["0.20"] * rounds + ["1"])
        with ExitStack() as stack:
            processes = []
            for port in ports:
                environ = {"DATABASE_URL": database_url, "PORT": str(port)}
                processes.append(stack.enter_context(callora("serve", environ=environ, log_directory=tmp_path)))
            for process, port in zip(processes, ports, strict=True):
                await first_paid(process, port, warm.api_key)
            for consumer in consumers:
                upstream.requests.clear()
                answers = await call_all_at_once(ports * 25, consumer, f"/v1/call/{API}/x")
                assert Counter(answer.status for answer in answers) == {200: 20, 402: 30}
                assert len(upstream.requests) == 20
                row = await database.fetch_row(
                    "SELECT available, held FROM vaults WHERE vault_id = $1", consumer.vault_id
                )
                assert row is not None
                assert (row["available"], row["held"]) == (0, 0)
            for process in processes:
                process.signal()
            assert [await process.ended() for process in processes] == [0, 0]
        await assert_audit_clean(database)
    print(f"\n{rounds} times 50 calls on 0.20 over two processes: 20 answered, 30 refused, nothing left, each time")


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.proof)])
async def test_two_processes_never_charge_an_intent_twice(database_url: str, tmp_path: Path, rounds: int) -> None:
    ports = [free_port() for _ in range(2)]
    met: Counter[str] = Counter()
    async with raw_upstream(answer_uniquely(0.01)) as upstream, books(database_url) as database:
        consumer, warm = await seeded(database_url, upstream, ["1000", "1"])
        with ExitStack() as stack:
            processes = []
            for port in ports:
                environ = {"DATABASE_URL": database_url, "PORT": str(port)}
                processes.append(stack.enter_context(callora("serve", environ=environ, log_directory=tmp_path)))
            for process, port in zip(processes, ports, strict=True):
                await first_paid(process, port, warm.api_key)
            upstream.requests.clear()
            for number in range(rounds):
                target, key = f"/v1/call/{API}/{number}", f"intent-{number}"
                answers = await call_all_at_once(ports * 3, consumer, target, key)
                answers += await call_all_at_once(ports, consumer, target, key)
                assert {answer.status for answer in answers} <= {200, 409}, answers
                assert {answer.status for answer in answers[-2:]} == {200}, "what is stored is replayed everywhere"
                assert len({answer.body for answer in answers if answer.status == 200}) == 1
                assert sum(answer.charge for answer in answers) == PRICE
                met.update(f"{answer.status} {answer.code or ''}".strip() for answer in answers)
            assert Counter(request.target for request in upstream.requests) == {f"/{n}": 1 for n in range(rounds)}
        row = await database.fetch_row("SELECT available, held FROM vaults WHERE vault_id = $1", consumer.vault_id)
        assert row is not None
        assert (row["available"], row["held"]) == (parse_usdc("1000") - rounds * PRICE, 0)
        await assert_audit_clean(database)
    print(f"\n{rounds} intents, eight requests each over two processes: called once, charged once; {dict(met)}")


def workers_of(process: CalloraProcess) -> list[psutil.Process]:
    """Return the workers of a parent, oldest first."""
    with suppress(psutil.Error):
        return sorted(psutil.Process(process.pid).children(), key=lambda child: child.create_time())
    return []


async def test_a_killed_worker_is_replaced_and_a_drain_reaches_them_all(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    environ = {"DATABASE_URL": database_url, "PORT": str(port), "LOG_LEVEL": "info"}
    answers: list[Answer] = []
    async with raw_upstream(answer_uniquely(0.01)) as upstream, books(database_url) as database:
        (consumer,) = await seeded(database_url, upstream, ["1000"])
        with callora("serve", "--workers", "2", environ=environ, log_directory=tmp_path) as process:
            await process.until(lambda: process.stderr.count("serving") == 2, "both workers to serve")
            first, second = workers_of(process)

            async def call_until_ended() -> None:
                async with Caller(port, consumer.api_key) as caller:
                    while process.popen.poll() is None:
                        answers.append(await caller.call(f"/v1/call/{API}/{len(answers)}"))
                        await trio.sleep(0.005)

            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(call_until_ended)
                await trio.sleep(0.2)
                first.kill()
                await process.until(lambda: process.stderr.count("serving") == 3, "a worker in its place")
                assert second in workers_of(process)
                assert len(workers_of(process)) == 2
                family = workers_of(process)
                before = len([answer for answer in answers if answer.status == 200])
                await process.until(
                    lambda: len([answer for answer in answers if answer.status == 200]) > before + 20, "calls to go on"
                )
                process.signal()
                assert await process.ended() == 0
            assert not [each for each in family if each.is_running()]
        assert {answer.status for answer in answers} <= {200, 503, None}
        told = sum(answer.charge > 0 for answer in answers)
        captured = await database.fetch_value("SELECT count(*) FROM usage_events WHERE state = 'captured'")
        assert told <= captured <= told + 6, "only the killed worker's calls may have been charged unheard"
        await assert_audit_clean(database)


async def test_workers_end_with_a_parent_that_is_killed(database_url: str, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": database_url, "PORT": str(free_port()), "LOG_LEVEL": "info"}
    with callora("serve", "--workers", "2", environ=environ, log_directory=tmp_path) as process:
        await process.until(lambda: process.stderr.count("serving") == 2, "both workers to serve")
        family = workers_of(process)
        process.kill()
        try:
            await process.until(lambda: not any(each.is_running() for each in family), "the workers to end", 10)
        finally:
            for each in family:
                with suppress(psutil.Error):
                    each.kill()


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.proof)])
async def test_a_parent_told_to_stop_while_workers_start_waits_for_them(
    database_url: str, tmp_path: Path, rounds: int
) -> None:
    environ = {"DATABASE_URL": database_url, "PORT": str(free_port())}
    for _ in range(rounds):
        with callora("serve", "--workers", "2", environ=environ, log_directory=tmp_path) as process:
            await process.until(lambda: len(workers_of(process)) == 2, "two workers")
            family = workers_of(process)
            await trio.sleep(random.uniform(0, 0.8))
            process.signal(random.choice([signal.SIGTERM, signal.SIGINT]))
            assert await process.ended() == 0, process.stderr
            assert not [each for each in family if each.is_running()]
            assert "Traceback" not in process.stderr, process.stderr


def test_workers_on_an_embedded_database_leave_nothing_behind(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    environ = {"PORT": str(free_port()), "LOG_LEVEL": "info"}
    with nothing_left_in(data_dir):
        with callora(
            "serve", "--workers", "2", "--data-dir", str(data_dir), environ=environ, log_directory=tmp_path
        ) as process:

            async def drain() -> int:
                await process.until(lambda: process.stderr.count("serving") == 2, "both workers to serve")
                process.signal()
                return await process.ended()

            assert trio.run(drain) == 0


def test_workers_need_a_port_that_is_named_and_free(database_url: str, tmp_path: Path) -> None:
    nameless = run_callora(
        "serve", "--workers", "2", environ={"DATABASE_URL": database_url, "PORT": "0"}, log_directory=tmp_path
    )
    assert nameless.popen.returncode == 2
    assert "PORT" in nameless.stderr
    port = free_port()
    environ = {"DATABASE_URL": database_url, "PORT": str(port), "LOG_LEVEL": "info"}
    with callora("serve", "--workers", "2", environ=environ, log_directory=tmp_path) as process:
        trio.run(process.until, lambda: process.stderr.count("serving") == 2, "both workers to serve")
        for workers in ("1", "2"):
            late = run_callora("serve", "--workers", workers, environ=environ, log_directory=tmp_path)
            assert late.popen.returncode == 1
            assert len(late.stderr.splitlines()) == 1
            assert f"127.0.0.1:{port}" in late.stderr


@pytest.mark.proof
async def test_workers_share_the_limits_of_a_key_through_the_store(
    database_url: str, valkey: Valkey, tmp_path: Path
) -> None:
    port = free_port()
    environ = {"DATABASE_URL": database_url, "PORT": str(port), "REDIS_URL": valkey.url}
    async with raw_upstream(answer_uniquely(0.0)) as upstream:
        consumer, warm = await seeded(database_url, upstream, ["10", "1"])
        async with books(database_url) as database:
            changed = "UPDATE api_keys SET rate_limit_per_minute = 10 WHERE api_key_id = $1"
            await database.execute(changed, consumer.api_key_id)
        with callora("serve", "--workers", "2", environ=environ, log_directory=tmp_path) as process:
            await first_paid(process, port, warm.api_key)
            answers = await call_all_at_once([port] * 60, consumer, f"/v1/call/{API}/x")
            assert Counter(answer.status for answer in answers) == {200: 10, 429: 50}
            process.signal()
            assert await process.ended() == 0, process.stderr
