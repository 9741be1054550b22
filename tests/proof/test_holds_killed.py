"""A service that keeps holds for others is killed at random moments; every hold is settled once in the end."""

import random
from pathlib import Path
from typing import Any

import pytest
import trio

from callora.ledger.money import parse_usdc
from tests.proof.books import assert_audit_clean, books
from tests.support.client import Insistent
from tests.support.processes import callora, free_port
from tests.support.rest import SERVICE_TOKEN
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, endpoint_of

WORKERS = 8
HOLDS = "/api/billing/holds"
CENT = 100_000
SETTLED = 40
"""At least so many are settled in each life of the service."""


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.proof)])
async def test_holds_of_a_service_that_is_killed_are_each_settled_once(
    database_url: str, tmp_path: Path, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    port = free_port()
    environ = {**UNLIMITED, "DATABASE_URL": database_url, "PORT": str(port)}
    async with running_service(database_url) as service:
        api_id = await service.api("sold", "http://127.0.0.1:9")
        endpoint_id = await endpoint_of(service, api_id)
        consumer = await service.consumer("10000")
    stopping = trio.Event()
    told: dict[str, tuple[str, int]] = {}
    insistent = Insistent(port)

    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request until it is answered."""
        headers = [("Authorization", f"Bearer {SERVICE_TOKEN}")]
        while True:
            status, answer = await insistent.post(path, headers, body)
            if status in (200, 201):
                return answer  # type: ignore[no-any-return]
            assert status in (503, 504), answer

    async def work(worker: int) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            name = f"{worker}-{number}"
            held = {"requestId": name, "apiKeyId": consumer.api_key_id, "apiId": api_id, "endpointId": endpoint_id}
            hold = await ask(HOLDS, {**held, "amountUsdc": "0.02"})
            path = f"{HOLDS}/{hold['holdId']}"
            match number % 4:
                case 0:
                    answer = await ask(f"{path}/release", {})
                case 1:
                    answer = await ask(f"{path}/capture", {"transactionId": name})
                case 2:
                    less = {"transactionId": name, "amountUsdc": "0.01", "mode": "partial"}
                    answer = await ask(f"{path}/capture", less)
                case _:
                    more = {"transactionId": name, "amountUsdc": "0.03", "mode": "partial"}
                    answer = await ask(f"{path}/capture", more)
            told[name] = answer["status"], parse_usdc(answer["capturedUsdc"])

    async with trio.open_nursery() as nursery:
        for worker in range(WORKERS):
            nursery.start_soon(work, worker)
        for _ in range(kills):
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                until = len(told) + SETTLED
                await process.until(lambda until=until: len(told) >= until, "more holds to be settled")  # type: ignore[misc]
                await trio.sleep(moments.uniform(0, 0.3))
                process.kill()
                assert "Traceback" not in process.stderr, process.stderr
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            stopping.set()
            await process.until(lambda: not nursery.child_tasks, "every request to be answered")
            process.signal()
            assert await process.ended() == 0
    async with books(database_url) as database:
        await assert_audit_clean(database)
        rows = await database.fetch(
            "SELECT h.request_id, u.state::text AS state, coalesce(u.amount, 0) AS amount, h.transaction_id"
            " FROM usage_events u LEFT JOIN external_holds h ON h.vault_id = u.vault_id AND h.event_id = u.event_id"
        )
        balance = await database.fetch_row("SELECT available, held FROM vaults")
    assert {row["request_id"]: (row["state"], row["amount"]) for row in rows} == told
    assert len(rows) == len(told), "one event a hold"
    assert {amount for _, amount in told.values()} == {0, CENT, 2 * CENT, 3 * CENT}
    spent = sum(amount for _, amount in told.values())
    assert balance is not None and dict(balance) == {"available": 10_000 * 100 * CENT - spent, "held": 0}
    print(f"{kills} kills, {insistent.cut} requests cut, {len(told)} holds settled")
