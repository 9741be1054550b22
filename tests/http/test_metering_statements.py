"""Collecting over REST, by the numbers of the statements that it answers: C01 to C09, C25, C27, weak points W-C.

Windows, watermarks and what of several sources fails (C08 to C14, W-C12) stand in tests/actors/test_collector.py, what
an image and a source may be in tests/ledger/test_collecting.py and tests/test_config_metering.py. What is answered
otherwise, and why: docs/decisions/0033.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import attrs
import httpx
import pytest
import trio

from callora.demo_upstream import serve_demo_upstream
from callora.exporter_sim import SimNode, SimPlan, make_exporter, whole_minutes_ago
from callora.ledger.snapshots import parse_instant
from callora.store import counter_accounts
from callora.store.audit import audit
from tests.support.client import call, watchdog
from tests.support.collecting import asked, page, sent
from tests.support.counters import PROFILE, subject
from tests.support.rest import ADMIN_KEY, SERVICE_TOKEN, Person, admin, anonymous, biller, person, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import Exchange, Handler, RawUpstream, gated, raw_upstream, respond, silent

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
IMAGE: Final = f"registry.example:5000/billing-service:sha-{COMMIT}"
TOKENS: Final = {
    "INTERNAL_SERVICE_TOKEN": SERVICE_TOKEN,
    "ADMIN_API_KEY": ADMIN_KEY,
    "EXPORTER_TOKEN_ONE": "one",
    "EXPORTER_TOKEN_TWO": "two",
    "COLLECT_INTERVAL": "24h",
}


def described(*urls: str) -> dict[str, str]:
    """Return an environment with a source for each URL: `node-1` of `prod`, and so on."""
    names = ("ONE", "TWO")
    sources = [
        {
            "source_id": f"s-{number}",
            "base_url": url,
            "expected_node_id": f"node-{number}",
            "expected_env": "prod",
            "credential_env": f"EXPORTER_TOKEN_{names[number - 1]}",
        }
        for number, url in enumerate(urls, 1)
    ]
    return {**TOKENS, **({"EXPORTER_SOURCES_JSON": json.dumps(sources)} if urls else {})}


def latest(totals: Mapping[int, tuple[int, int]], node: str = "node-1") -> Handler:
    """Answer each window with one snapshot of its last second."""

    async def handle(exchange: Exchange) -> None:
        until = parse_instant(asked(exchange.request)["until"])
        assert until is not None
        await page(sent(until - timedelta(seconds=1), totals, node=node))(exchange)

    return handle


@attrs.frozen
class Metered:
    """A service that collects, and who asks it."""

    service: RunningService
    client: httpx.AsyncClient
    job: Person

    async def payer(self, number: int, balance_usdc: str = "100") -> tuple[Consumer, str]:
        """Make someone with a vault and an account for a subject's number."""
        consumer = await self.service.consumer(balance_usdc)
        account_id = self.service.context.ids.uuid7()
        made = await counter_accounts.add(
            self.service.database,
            account_id,
            consumer.vault_id,
            subject(number),
            PROFILE,
            0,
            self.service.context.clock.now(),
        )
        assert made is None
        return consumer, account_id

    async def until_collected(self) -> None:
        """Return when the run of the start has ended."""
        with watchdog("the first run", 60):
            while (await self.job.ask("GET", "/v1/status")).body["status"] == "":  # noqa: ASYNC110 - a task of the service
                await trio.sleep(0.02)


@asynccontextmanager
async def metered(database_url: str, environ: Mapping[str, str]) -> AsyncIterator[Metered]:
    """Yield a service with this environment."""
    async with running_service(database_url, environ) as service, rest_client(service) as client:
        yield Metered(service, client, biller(client))


@pytest.fixture
async def exporter() -> AsyncIterator[RawUpstream]:
    """A source that a test writes."""
    async with raw_upstream(page()) as upstream:
        yield upstream


async def test_c01_to_c05_what_a_service_without_sources_says_of_itself(database_url: str) -> None:
    async with metered(database_url, {**described(), "IMAGE": IMAGE}) as it:
        stranger = anonymous(it.client)
        told = await stranger.ask("GET", "/api/ping")
        assert told.body == {"image": IMAGE, "tag": f"sha-{COMMIT}", "commit": COMMIT, "version": COMMIT}
        told = await stranger.ask("GET", "/healthz")
        assert (told.status, told.body) == (200, {"status": "ok", "message": ""})
        with watchdog("the service to be ready"):
            while (await stranger.ask("GET", "/readyz")).status != 200:  # noqa: ASYNC110 - it asks a service
                pass
        told = await it.job.ask("GET", "/v1/status")
        assert (told.status, told.body["status"], told.body["job"]) == (200, "", "")
        assert (told.body["processed_samples"], told.body["source_statuses"]) == (0, [])
        told = await it.job.ask("POST", "/v1/jobs/collect-and-rate")
        assert (told.status, told.body["status"], told.body["error"]) == (503, "error", "no meter source is enabled")


async def test_c03_c04_c06_runs_are_told_by_probe_and_status_and_survive_a_restart(
    database_url: str, exporter: RawUpstream
) -> None:
    gate = trio.Event()
    exporter.handler = gated(gate, latest({1: (100, 50), 2: (7, 0)}))
    environ = described(exporter.url)
    async with metered(database_url, environ) as it:
        await it.payer(1)
        stranger = anonymous(it.client)
        told = await stranger.ask("GET", "/healthz")
        assert (told.status, told.body["status"]) == (503, "degraded")  # nothing has ended yet
        gate.set()
        await it.until_collected()
        told = await it.job.ask("GET", "/v1/status")
        first = told.body
        assert (first["job"], first["status"]) == ("collect-and-rate", "partial")
        assert (first["processed_samples"], first["written_minutes"], first["quarantined_samples"]) == (1, 1, 1)
        assert first["error"] == "s-1: 1 samples are in quarantine"
        (source,) = first["source_statuses"]
        assert source["source_id"] == "s-1"
        assert source["last_error"] == ""
        assert None not in source.values()
        assert (await stranger.ask("GET", "/healthz")).body == {"status": "ok", "message": ""}
        exporter.handler = respond(500)
        told = await it.job.ask("POST", "/v1/jobs/collect-and-rate")
        failed = told.body
        assert (told.status, failed["status"], failed["error"]) == (503, "error", "s-1: it answered 500")
        assert failed["source_statuses"][0]["last_completed_until"] == source["last_completed_until"]
        told = await stranger.ask("GET", "/healthz")
        assert (told.status, told.body) == (
            503,
            {"status": "degraded", "message": "the last run failed: collect-and-rate"},
        )
    exporter.handler = silent()
    async with metered(database_url, environ) as it:
        assert (await it.job.ask("GET", "/v1/status")).body == failed
        assert (await anonymous(it.client).ask("GET", "/healthz")).status == 503
    assert it.service.exit_code == 0, "a run that hangs does not hold the drain up"


async def test_c02_c06_c07_wc15_jobs_run_now_and_only_for_who_has_the_service_token(
    database_url: str, exporter: RawUpstream
) -> None:
    async with metered(database_url, described(exporter.url)) as it:
        await it.until_collected()
        for path in ("/v1/jobs/collect-and-rate", "/v1/jobs/reconcile"):
            told = await it.job.ask("POST", path)
            assert (told.status, told.body["job"], told.body["status"]) == (200, path.rpartition("/")[2], "ok")
            assert told.body["differences"] == []
            assert (await it.job.ask("GET", path)).status == 405
            assert (await anonymous(it.client).ask("POST", path)).status == 401
            assert (await admin(it.client).ask("POST", path)).status == 401
        assert (await anonymous(it.client).ask("GET", "/v1/status")).status == 401
        told = await anonymous(it.client).ask("GET", "/api/ping")
        assert told.body == {"image": "", "tag": "", "commit": "", "version": ""}
        assert len(exporter.requests) == 3


async def test_wc11_a_client_that_leaves_cancels_no_run_and_no_probe_waits_for_one(
    database_url: str, exporter: RawUpstream
) -> None:
    async with metered(database_url, described(exporter.url)) as it:
        await it.until_collected()
        before = (await it.job.ask("GET", "/v1/status")).body
        gate = trio.Event()
        exporter.handler = gated(gate, page())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.job.ask, "POST", "/v1/jobs/reconcile")
            await exporter.wait_requests(2)
            with watchdog("probes and status to answer while a run hangs"):
                for path in ("/healthz", "/readyz", "/livez", "/api/health"):
                    assert (await anonymous(it.client).ask("GET", path)).status == 200
                assert (await it.job.ask("GET", "/v1/status")).body == before
            nursery.cancel_scope.cancel()
        gate.set()
        with watchdog("the run to end", 60):
            while (await it.job.ask("GET", "/v1/status")).body["job"] != "reconcile":  # noqa: ASYNC110 - as above
                await trio.sleep(0.02)
        assert (await it.job.ask("GET", "/v1/status")).body["status"] == "ok"


async def test_c25_snapshots_are_pushed_in_three_forms_and_told_what_is_wrong(database_url: str) -> None:
    environ = {**described("http://localhost:1"), "BILLING_INGEST_MODE": "push"}
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=5)
    one, two = (sent(at + timedelta(minutes=number), {1: (10 + 5 * number, 0)}) for number in (0, 1))
    async with metered(database_url, environ) as it:
        await it.payer(1)

        async def push(body: str, media_type: str = "application/json") -> httpx.Response:
            headers = {**it.job.headers, "Content-Type": media_type}
            return await it.client.post("/v1/ingest/snapshots", content=body.encode(), headers=headers)

        for body, media_type, processed in (
            (json.dumps({**one, "unknown": 1}), "application/json", 1),
            (json.dumps([one, two]), "application/json", 1),
            (f"{json.dumps(one)}\n{json.dumps(two)}\n", "application/x-ndjson", 0),
        ):
            answer = await push(body, media_type)
            assert answer.status_code == 200, answer.text
            told = answer.json()
            assert (told["job"], told["status"], told["processed_samples"]) == ("ingest", "ok", processed)
        assert await it.service.database.fetch_value("SELECT sum(amount) FROM counter_deltas") == 15
        for body in ("", "[]", "no JSON " * 100):
            answer = await push(body)
            assert (answer.status_code, answer.json()["code"]) == (400, "VALIDATION_ERROR")
            (detail,) = answer.json()["details"]
            assert json.dumps(body[:120]) in detail["message"]
            assert len(detail["message"]) < 250
        for wrong in ({"node_id": ""}, {"env": None}, {"collected_at": "soon"}, {"node_id": "other"}):
            answer = await push(json.dumps({**one, **wrong}))
            assert (answer.status_code, answer.json()["status"]) == (422, "error")
            assert answer.json()["error"]
        assert (await push("{}", "text/plain")).status_code == 415
        assert (await it.client.post("/v1/ingest/snapshots", json=one)).status_code == 401
        length = [("Content-Length", str(32 * 1024 * 1024 + 1)), ("Content-Type", "application/json")]
        said = [*it.job.headers.items(), *length]
        assert (await call(it.service.port, "POST", "/v1/ingest/snapshots", said)).status == 413
        for job in ("collect-and-rate", "reconcile"):
            disabled = await it.job.ask("POST", f"/v1/jobs/{job}")
            assert (disabled.status, disabled.body["status"]) == (503, "disabled")
        assert (await anonymous(it.client).ask("GET", "/healthz")).status == 200


async def test_c27_who_pays_sees_sums_minutes_and_how_his_vault_stands(
    database_url: str, exporter: RawUpstream
) -> None:
    async with metered(database_url, described(exporter.url)) as it:
        await it.until_collected()
        consumer, account_id = await it.payer(1)
        debtor, _ = await it.payer(2, "0")
        now = datetime.now(UTC)
        for ago, totals in ((60, {1: (100, 50), 2: (10**7, 0)}), (0, {1: (130, 60), 2: (2 * 10**7, 0)})):
            snapshots = [sent(now - timedelta(seconds=ago), totals)]
            answer = await it.client.post("/v1/ingest/snapshots", json=snapshots, headers=it.job.headers)
            assert answer.json()["processed_samples"] == 2
        own = Person(it.client, {"X-User-Id": consumer.user_id})
        told = (await own.ask("GET", "/api/account/usage/summary")).body
        used = {"up": 130, "down": 60, "total": 190, "included": 0, "charged": 190, "cost_usdc": "0.0000190"}
        assert told["totals"] == used
        (account,) = told["data"]
        assert {name: account[name] for name in used} == used
        assert (account["accountId"], account["subject"], account["minutes"]) == (account_id, subject(1), 2)
        first = (await own.ask("GET", "/api/account/usage/buckets", query={"limit": 1})).body
        assert first["meta"]["hasMore"]
        cursor = first["meta"]["nextCursor"]
        second = (await own.ask("GET", "/api/account/usage/buckets", query={"limit": 1, "cursor": cursor})).body
        assert not second["meta"]["hasMore"]
        minutes = [*first["data"], *second["data"]]
        assert [(each["up"], each["down"], each["cost_usdc"]) for each in minutes] == [
            (30, 10, "0.0000040"),
            (100, 50, "0.0000150"),
        ]
        assert {(each["nodeId"], each["env"], each["meter"]) for each in minutes} == {("node-1", "prod", "bytes")}
        bill = (await own.ask("GET", "/api/account/billing/summary")).body
        assert (bill["balance_usdc"], bill["arrears"], bill["throttle_state"]) == ("99.9999810", False, "normal")
        assert bill["accounts"][0]["unitPrice"] == "0.0000001"
        owing = Person(it.client, {"X-User-Id": debtor.user_id})
        bill = (await owing.ask("GET", "/api/account/billing/summary")).body
        assert (bill["balance_usdc"], bill["owed_usdc"]) == ("-2.0000000", "2.0000000")
        assert (bill["arrears"], bill["throttle_state"], bill["suspend_state"]) == (True, "throttled", "active")
        other = await person(it.service, it.client)
        assert (await other.ask("GET", "/api/account/usage/summary")).body["data"] == []
        assert (await other.ask("GET", "/api/account/usage/buckets", query={"accountId": account_id})).body[
            "data"
        ] == []
        assert (await other.ask("GET", "/api/account/billing/summary")).status == 404
        assert (await other.ask("GET", "/api/account/usage/buckets", query={"cursor": "x"})).status == 400


async def test_operators_keep_sources_and_leave_those_of_the_environment(
    database_url: str, exporter: RawUpstream
) -> None:
    async with metered(database_url, described(exporter.url)) as it:
        await it.until_collected()
        operator = admin(it.client)
        path = "/api/admin/meter-sources"
        source = {
            "source_id": "rest-1",
            "base_url": exporter.url,
            "expected_node_id": "node-9",
            "expected_env": "prod",
            "credential_env": "EXPORTER_TOKEN_TWO",
            "timeout_seconds": 2.5,
            "meter": "seconds",
        }
        for wrong, status in (
            ({"base_url": "http://elsewhere.example"}, 400),
            ({"credential_env": "JWT_SECRET"}, 400),
            ({"credential_env": "EXPORTER_TOKEN_THREE"}, 400),
            ({"credential_env": "EXPORTER_TOKEN_ONE"}, 409),
            ({"api_id": 10**9}, 400),
            ({"source_id": "s-1"}, 409),
            ({"expected_node_id": "node-1"}, 409),
            ({"credential": "secret"}, 400),
        ):
            told = await operator.ask("POST", path, {**source, **wrong})
            assert told.status == status, told.body
        made = await operator.ask("POST", path, source)
        assert made.status == 201
        assert {name: made.body[name] for name in source} == source
        assert (made.body["origin"], made.body["enabled"], made.body["last_completed_until"]) == (
            "operator",
            True,
            None,
        )
        assert (await it.job.ask("POST", "/v1/jobs/collect-and-rate")).body["status"] == "ok"
        assert exporter.requests[-1].header("Authorization") in ("Bearer one", "Bearer two")
        found = await operator.ask("GET", f"{path}/rest-1")
        assert found.body["last_completed_until"] is not None
        listed = await operator.ask("GET", path, query={"limit": 1})
        assert ([each["source_id"] for each in listed.body["data"]], listed.body["meta"]["hasMore"]) == (
            ["rest-1"],
            True,
        )
        rest = await operator.ask("GET", path, query={"cursor": listed.body["meta"]["nextCursor"]})
        assert [each["source_id"] for each in rest.body["data"]] == ["s-1"]
        changed = await operator.ask("PATCH", f"{path}/rest-1", {"enabled": False, "region": "eu"})
        assert (changed.body["enabled"], changed.body["region"], changed.body["meter"]) == (False, "eu", "seconds")
        assert changed.body["last_completed_until"] == found.body["last_completed_until"]
        assert (await operator.ask("PATCH", f"{path}/rest-1", {"expected_node_id": "node-1"})).status == 409
        assert (await operator.ask("PATCH", f"{path}/none", {"enabled": True})).status == 404
        for method, body in (("PATCH", {"enabled": False}), ("DELETE", None)):
            assert (await operator.ask(method, f"{path}/s-1", body)).status == 409
        assert (await operator.ask("DELETE", f"{path}/rest-1")).status == 204
        assert (await operator.ask("GET", f"{path}/rest-1")).status == 404
        assert (await operator.ask("DELETE", f"{path}/rest-1")).status == 404
        assert (await operator.ask("POST", path, source)).status == 201
        assert (await anonymous(it.client).ask("GET", path)).status == 401
        slug = await it.service.database.fetch_value("SELECT slug FROM apis WHERE api_id = $1", made.body["api_id"])
        consumer = await it.service.consumer("1")
        answer = await call(it.service.port, "POST", f"/v1/call/{slug}/meters/rest-1", consumer.headers)
        assert answer.status == 404


async def test_a_simulated_node_is_charged_exactly_what_it_truly_used(database_url: str) -> None:
    clock_now = datetime.now(UTC)
    plan = SimPlan(
        began_at=whole_minutes_ago(clock_now, 90),
        seed=7,
        node_id="node-1",
        env="prod",
        subjects=6,
        interval_seconds=20,
        resets=7,
        restarts=31,
        gaps=9,
        late=11,
        duplicates=5,
        ticks_max=180,
    )
    subjects = SimNode(plan).subjects
    async with trio.open_nursery() as nursery:
        node = RunningClock()
        make_app = partial(make_exporter, plan, node, "one")
        url = await nursery.start(partial(serve_demo_upstream, make_app=make_app))
        environ = {**described(url), "COLLECT_OVERLAP": "2h", "COLLECT_PAGE_SIZE": "17", "PRICE_PER_BYTE": "0.0000003"}
        async with metered(database_url, environ) as it:
            await it.until_collected()  # of subjects that nobody knows: all of it is in quarantine
            consumer = await it.service.consumer("1000")
            for each in subjects:
                made = await counter_accounts.add(
                    it.service.database,
                    it.service.context.ids.uuid7(),
                    consumer.vault_id,
                    each,
                    attrs.evolve(PROFILE, unit_price=None),
                    0,
                    node.now(),
                )
                assert made is None
            for _ in range(2):
                told = await it.job.ask("POST", "/v1/jobs/reconcile")
                assert (told.status, told.body["status"], told.body["differences"]) == (200, "ok", []), told.body
            assert told.body["processed_samples"] == 0
            answer = await it.client.get(f"{url}/truth", headers={"Authorization": "Bearer one"})
            truth: dict[str, int] = answer.json()["used"]
            rows = await it.service.database.fetch(
                "SELECT a.subject, sum(d.up + d.down)::bigint AS units, sum(d.amount)::bigint AS amount"
                " FROM counter_deltas d JOIN counter_accounts a USING (vault_id, account_id) GROUP BY a.subject"
            )
            assert {str(row["subject"]): row["units"] for row in rows} == truth
            assert {str(row["subject"]): row["amount"] for row in rows} == {
                name: 3 * units for name, units in truth.items()
            }
            charged = 3 * sum(truth.values())
            assert await it.service.balance(consumer) == (1000 * 10**7 - charged, 0)
            findings = await audit(it.service.database, node.now())
            assert [each for each in findings if each.wrong] == []
        nursery.cancel_scope.cancel()


class RunningClock:
    """The machine's clock, which the simulated node shares with the service."""

    def now(self) -> datetime:
        """Return the present instant."""
        return datetime.now(UTC)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.now().timestamp()
