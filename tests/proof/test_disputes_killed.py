"""A service is killed while charges are disputed and operators give them back; each is given back once in the end."""

import random
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.proof.books import assert_audit_clean, books
from tests.support.client import Headers, Insistent, watchdog
from tests.support.processes import CalloraProcess, callora, free_port
from tests.support.rest import ADMIN_KEY
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, endpoint_of

WORKERS = 8
PATH = "/api/billing/disputes"
CENT = 100_000
DISPUTES_A_LIFE = 20
"""At least so many are decided in each life of the service."""


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.proof)])
async def test_disputes_of_a_service_that_is_killed_are_each_given_back_once(
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
    payer: Headers = [("X-User-Id", consumer.user_id)]
    operator: Headers = [("X-Admin-Api-Key", ADMIN_KEY)]
    stopping = trio.Event()
    events: set[str] = set()
    decided: set[str] = set()
    insistent, left = Insistent(port), 0

    async def insist(headers: Headers, path: str, body: object, *final: int) -> tuple[int, Any]:
        """Ask until there is an answer that is final."""
        while True:
            status, answer = await insistent.post(path, headers, body)
            if status in final:
                return status, answer
            assert status in (503, 504), answer

    async def work(worker: int) -> None:
        nonlocal left
        number = 0
        while not stopping.is_set():
            number += 1
            charge = {"requestId": f"{worker}-{number}", "apiId": api_id, "endpointId": endpoint_id}
            _, charged = await insist(payer, "/api/billing/deduct", {**charge, "amountUsdc": "0.01"}, 200)
            event_id = charged["usageEventId"]
            events.add(event_id)
            status, opened = await insist(payer, PATH, {"usage_event_id": event_id, "reason": "Too dear"}, 201, 409)
            if status == 409:  # the answer to an attempt before was lost
                assert opened["code"] == "DISPUTE_EXISTS"
            dispute_id = opened["id"] if status == 201 else opened["details"]["disputeId"]
            decision = {"resolution": "REFUNDED"}
            status, resolved = await insist(operator, f"{PATH}/{dispute_id}/resolve", decision, 200, 202, 409)
            if status == 409:
                assert resolved["code"] == "DISPUTE_RESOLVED"
                left += resolved["details"]["status"] == "REFUNDING"
            decided.add(dispute_id)

    async def settled(process: CalloraProcess, count: int) -> None:
        await process.until(lambda: len(decided) >= count, "more disputes")

    async with trio.open_nursery() as nursery:
        for worker in range(WORKERS):
            nursery.start_soon(work, worker)
        for _ in range(kills):
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                await settled(process, len(decided) + DISPUTES_A_LIFE)
                await trio.sleep(moments.uniform(0, 0.3))
                process.kill()
                assert "Traceback" not in process.stderr, process.stderr
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            await settled(process, len(decided) + WORKERS)
            stopping.set()
            await process.until(lambda: not nursery.child_tasks, "every dispute to be decided")
            # What a kill left between its decision and its note is carried out at each start.
            async with books(database_url) as database:
                with watchdog("every refund to be booked"):
                    while await database.fetch_value("SELECT EXISTS (SELECT FROM disputes WHERE status <> 'REFUNDED')"):
                        pass
            process.signal()
            assert await process.ended() == 0
    async with books(database_url) as database:
        await assert_audit_clean(database)
        refunds = await database.fetch(
            "SELECT e.event_id::text AS event_id, e.amount, d.dispute_id::text AS dispute_id"
            " FROM ledger_entries e LEFT JOIN disputes d ON d.event_id = e.event_id WHERE e.kind = 'refund'"
        )
        notices = await database.fetch(
            "SELECT type, count(*) AS told, count(DISTINCT subject) AS of FROM outbox WHERE type LIKE 'dispute%'"
            " GROUP BY type ORDER BY type"
        )
        balance = await database.fetch_row("SELECT available, held FROM vaults")
    assert sorted(row["event_id"] for row in refunds) == sorted(events), "each once"
    assert {row["dispute_id"] for row in refunds} == decided
    assert {row["amount"] for row in refunds} == {CENT}
    # Who paid and the developer are told once each of a dispute's beginning and its end.
    twice = 2 * len(decided)
    assert [tuple(row.values()) for row in notices] == [
        ("dispute_opened", twice, twice),
        ("dispute_resolved", twice, twice),
    ]
    assert balance is not None
    assert dict(balance) == {"available": 10_000 * 100 * CENT, "held": 0}, "all that was paid came back"
    print(f"{kills} kills, {insistent.cut} requests cut, {len(decided)} disputes, {left} found half-way by a retry")
