"""A service that takes charges over REST is killed at random moments; every request is charged once in the end."""

import random
from pathlib import Path

import pytest
import trio

from tests.proof.books import assert_audit_clean, books
from tests.support.client import Insistent
from tests.support.processes import CalloraProcess, callora, free_port
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, endpoint_of

WORKERS = 8
PATH = "/api/billing/deduct"
CENT = 100_000
CHARGES = 40
"""At least so many are made in each life of the service."""


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.proof)])
async def test_defect_11_deducts_of_a_service_that_is_killed_are_each_charged_once(
    database_url: str, tmp_path: Path, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    port = free_port()
    # A hold left by a kill is found by its retry, and is not waited for.
    environ = {**UNLIMITED, "DATABASE_URL": database_url, "PORT": str(port)}
    async with running_service(database_url) as service:
        api_id = await service.api("sold", "http://127.0.0.1:9")
        endpoint_id = await endpoint_of(service, api_id)
        consumer = await service.consumer("10000")
    stopping = trio.Event()
    told: dict[str, str] = {}
    insistent = Insistent(port)

    async def work(worker: int) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            name = f"{worker}-{number}"
            body = {"requestId": name, "apiId": api_id, "endpointId": endpoint_id, "amountUsdc": "0.01"}
            headers = [("X-User-Id", consumer.user_id)]
            # One in two names its intent twice, by a key as well.
            keyed = [("Idempotency-Key", name)] if number % 2 else []
            while name not in told:
                status, answer = await insistent.post(PATH, [*headers, *keyed], body)
                if status == 200:
                    told[name] = answer["usageEventId"]
                elif answer["code"] == "IDEMPOTENCY_IN_PROGRESS":
                    # Its process has died at it: the key is taken over in a minute, the request by its name at once.
                    keyed = []
                else:
                    assert status in (503, 504), answer

    async def settled(process: CalloraProcess, count: int) -> None:
        await process.until(lambda: len(told) >= count, "more charges")

    async with trio.open_nursery() as nursery:
        for worker in range(WORKERS):
            nursery.start_soon(work, worker)
        for _ in range(kills):
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                await settled(process, len(told) + CHARGES)
                await trio.sleep(moments.uniform(0, 0.3))
                process.kill()
                assert "Traceback" not in process.stderr, process.stderr
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            await settled(process, len(told) + WORKERS)
            stopping.set()
            await process.until(lambda: not nursery.child_tasks, "every request to be answered")
            process.signal()
            assert await process.ended() == 0
    async with books(database_url) as database:
        await assert_audit_clean(database)
        charged = await database.fetch(
            "SELECT r.request_id, u.event_id::text AS event_id, u.amount FROM usage_events u"
            " LEFT JOIN billing_requests r ON r.event_id = u.event_id WHERE u.state = 'captured'"
        )
        balance = await database.fetch_row("SELECT available, held FROM vaults")
    assert {row["request_id"]: row["event_id"] for row in charged} == told
    assert len(charged) == len(told)
    assert balance is not None and dict(balance) == {"available": 10_000 * 100 * CENT - len(told) * CENT, "held": 0}
    print(f"{kills} kills, {insistent.cut} requests cut, {len(told)} charges")
