"""A service that collects is killed at random moments; what a node truly used is charged once in the end."""

import random
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from quart_trio import QuartTrio

from callora.demo_upstream import serve_demo_upstream
from callora.exporter_sim import SimNode, SimPlan, make_exporter, whole_minutes_ago
from callora.service import SystemClock
from callora.store import counter_accounts
from tests.proof.books import assert_audit_clean, books
from tests.support.counters import PROFILE
from tests.support.processes import callora, free_port
from tests.support.rest import SERVICE_TOKEN
from tests.support.service import running_service

VAULTS = 5


@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=pytest.mark.proof)])
async def test_what_is_collected_by_a_service_that_is_killed_is_charged_once(
    database_url: str, tmp_path: Path, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments, clock, port = random.Random(seed), SystemClock(), free_port()
    plan = SimPlan(
        whole_minutes_ago(clock.now(), 90),
        seed=seed,
        subjects=20,
        interval_seconds=20,
        resets=9,
        restarts=40,
        gaps=9,
        late=9,
        duplicates=5,
        ticks_max=240,
    )
    node = SimNode(plan)
    async with running_service(database_url) as service:
        payers = [await service.consumer("1000") for _ in range(VAULTS)]
        for number, subject in enumerate(node.subjects):
            vault_id, account_id = payers[number % VAULTS].vault_id, service.context.ids.uuid7()
            made = await counter_accounts.add(service.database, account_id, vault_id, subject, PROFILE, 0, clock.now())
            assert made is None
    pages = 0

    def make_app() -> QuartTrio:
        app = make_exporter(plan, clock, SERVICE_TOKEN)

        @app.before_request
        async def count() -> None:
            nonlocal pages
            await trio.lowlevel.checkpoint()
            pages += 1

        return app

    async with trio.open_nursery() as nursery, books(database_url) as database:
        url = await nursery.start(partial(serve_demo_upstream, make_app=make_app))
        environ = {
            "DATABASE_URL": database_url,
            "PORT": str(port),
            "INTERNAL_SERVICE_TOKEN": SERVICE_TOKEN,
            "EXPORTER_BASE_URL": url,
            "COLLECT_OVERLAP": "2h",
            "COLLECT_PAGE_SIZE": "10",
        }
        for _ in range(kills):
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                enough = pages + moments.randrange(1, 20)
                await process.until(lambda enough=enough: pages >= enough, "more pages to be read")  # type: ignore[misc]
                await trio.sleep(moments.uniform(0, 0.05))
                process.kill()
                assert "Traceback" not in process.stderr, process.stderr
            # As ten seconds later.
            await database.execute(
                "UPDATE collector_leases SET held_until = clock_timestamp() WHERE holder IS NOT NULL"
            )
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
                told: list[httpx.Response] = []
                with trio.fail_after(60):
                    while not told:
                        try:
                            told.append(await client.post("/v1/jobs/reconcile"))
                        except httpx.ConnectError:
                            await trio.sleep(0.1)
                run = told[0].json()
                assert (told[0].status_code, run["status"], run["differences"]) == (200, "ok", []), run
            process.signal()
            assert await process.ended() == 0
        rows = await database.fetch(
            "SELECT a.subject::text AS subject, sum(d.up + d.down)::bigint AS units, sum(d.amount)::bigint AS amount"
            " FROM counter_deltas d JOIN counter_accounts a USING (vault_id, account_id) GROUP BY a.subject"
        )
        now = clock.now()
        assert {row["subject"]: row["units"] for row in rows} == node.true_usage(now, now)
        assert all(row["amount"] == row["units"] for row in rows)
        left = await database.fetch_value("SELECT sum(available + held - owed)::bigint FROM vaults")
        assert left == VAULTS * 1000 * 10**7 - sum(row["amount"] for row in rows)
        await assert_audit_clean(database)
        nursery.cancel_scope.cancel()
    print(f"{kills} kills, {pages} pages")
