"""The chain from outside: probes, breakers, a start that is refused, and calls that need no chain."""

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import httpx
import pytest
import trio

from callora.config.settings import PASSPHRASES
from callora.ledger.faults import ChainMismatch
from callora.ledger.money import parse_usdc
from tests.support.nodes import ENVIRON, HORIZON_ROOT, RpcScript, ScriptedNode, as_html, as_json, scripted_rpc
from tests.support.rest import ADMIN_KEY, Person, admin, anonymous, rest_client
from tests.support.service import GENEROUS, Consumer, RunningService, running_service
from tests.support.upstream import Handler, RawUpstream, close_silently, raw_upstream, respond, silent

IMPATIENT = {
    "ADMIN_API_KEY": ADMIN_KEY,
    "CIRCUIT_BREAKER_THRESHOLD": "1",
    "CIRCUIT_BREAKER_COOLDOWN_MS": "20",
    "RETRY_BASE_DELAY_MS": "1",
    "SOROBAN_RPC_TIMEOUT": "200",
    "LOG_LEVEL": "error",
}


@attrs.frozen
class Shop:
    """A service with a chain, an API and someone who pays."""

    service: RunningService
    node: ScriptedNode
    client: httpx.AsyncClient
    consumer: Consumer
    upstream: RawUpstream

    def forget(self) -> None:
        """Drop the test's own records of what was asked."""
        self.node.script.asked.clear()
        for each in (self.node.upstream, self.upstream):
            each.requests.clear()
            each.connections.clear()

    @property
    def operator(self) -> Person:
        """Someone with the admin key."""
        return admin(self.client)

    async def pays(self) -> None:
        """Make a paid call, which must succeed."""
        answer = await self.client.get("/v1/call/shop/x", headers={"X-Api-Key": self.consumer.api_key})
        assert answer.status_code == 200, answer.text

    async def health(self) -> tuple[int, str, str]:
        """Return status, overall state and that of RPC."""
        told = await anonymous(self.client).ask("GET", "/api/health")
        return told.status, told.body["status"], told.body["checks"]["soroban_rpc"]

    async def until_rpc_is(self, state: str) -> None:
        """Return when a probe says so; its result is kept for a second."""
        await self.until_check_is("soroban_rpc", state)

    async def until_check_is(self, name: str, state: str) -> None:
        """The same of any check."""
        with trio.fail_after(60):
            while (await anonymous(self.client).ask("GET", "/api/health")).body["checks"][name] != state:  # noqa: ASYNC110
                await trio.sleep(0.05)

    async def until_metrics_say(self, line: str) -> str:
        """Return the metrics once they have this line."""
        with trio.fail_after(60):
            while line not in (text := (await self.client.get("/metrics")).text):  # noqa: ASYNC110
                await trio.sleep(0.05)
        return text


@asynccontextmanager
async def shop(database_url: str, **environ: str) -> AsyncIterator[Shop]:
    """Run a service beside a scripted node."""
    async with scripted_rpc() as node, raw_upstream(respond(200, body=b"x")) as upstream:
        settings = {**ENVIRON, **IMPATIENT, "SOROBAN_RPC_URL": node.url, **environ}
        async with running_service(database_url, settings) as service, rest_client(service) as client:
            await service.api("shop", upstream.url)
            yield Shop(service, node, client, await service.consumer("1"), upstream)


async def test_health_shows_rpc_and_the_service_can_do_without_it(database_url: str) -> None:
    async with shop(database_url) as at:
        assert await at.health() == (200, "ok", "ok")
        told = await anonymous(at.client).ask("GET", "/api/health")
        assert list(told.body["checks"]) == ["api", "database", "soroban_rpc"]
        faults: list[tuple[Handler, str]] = [
            (close_silently(), "down"),
            (silent(), "down"),
            (as_html(503), "degraded"),
            (as_json({"message": "no"}, 429), "degraded"),
        ]
        for fault, state in faults:
            at.node.script.fault = fault
            await at.until_rpc_is(state)
            assert await at.health() == (200, "degraded", state)
            await at.pays()
            assert (await anonymous(at.client).ask("GET", "/readyz")).status == 200
        at.node.script.fault = None
        await at.until_rpc_is("ok")
        assert await at.health() == (200, "ok", "ok"), "without a restart"


async def test_a_service_without_a_chain_shows_none(database_url: str) -> None:
    async with running_service(database_url, {"ADMIN_API_KEY": ADMIN_KEY}) as service, rest_client(service) as client:
        told = await anonymous(client).ask("GET", "/api/health")
        assert list(told.body["checks"]) == ["api", "database"]
        told = await anonymous(client).ask("GET", "/api/deposits/health")
        assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED")
        assert (await admin(client).ask("GET", "/api/admin/circuit-breakers")).body["data"] == []
        assert (await admin(client).ask("GET", "/api/admin/circuit-breakers/chain:rpc")).status == 404


async def test_the_breaker_is_shown_to_depositors_and_moved_by_operators(database_url: str) -> None:
    async with shop(database_url, CIRCUIT_BREAKER_COOLDOWN_MS="3600000") as at:
        told = await anonymous(at.client).ask("GET", "/api/deposits/health")
        assert told.status == 200
        assert told.body["success"] is True
        breaker = told.body["circuitBreaker"]
        assert told.body["circuitBreakers"] == {"rpc": breaker, "horizon": None}
        assert (breaker["state"], breaker["totalFailures"], breaker["lastFailureTime"]) == ("CLOSED", 0, None)
        assert breaker["totalSuccesses"] == breaker["consecutiveSuccesses"] > 0
        assert breaker["lastStateChange"] > 1_700_000_000_000

        (only,) = (await at.operator.ask("GET", "/api/admin/circuit-breakers")).body["data"]
        assert (only["key"], only["apiId"], only["state"]) == ("chain:rpc", None, "closed")
        path = "/api/admin/circuit-breakers/chain:rpc"
        told = await at.operator.ask("POST", f"{path}/trip", {"reason": "the provider asked"})
        assert (told.status, told.body["state"]) == (200, "open")
        shown = (await anonymous(at.client).ask("GET", "/api/deposits/health")).body["circuitBreaker"]
        assert shown["state"] == "OPEN"
        assert shown["lastStateChange"] > breaker["lastStateChange"]
        assert await at.health() == (200, "degraded", "degraded")
        metrics = (await at.client.get("/api/metrics")).text
        assert 'callora_chain_breaker_state{breaker="chain:rpc"} 1.0' in metrics
        assert (await at.operator.ask("POST", f"{path}/reset", {})).body["state"] == "closed"
        assert (await at.operator.ask("GET", path)).body["state"] == "closed"
        assert (await at.operator.ask("GET", "/api/admin/circuit-breakers/chain:horizon")).status == 404
        assert (await at.operator.ask("GET", "/api/admin/circuit-breakers/chain:x")).wrong == ["path.key"]

        # The chain's come first, then the APIs' by their numbers, a page at a time.
        await at.pays()
        keys: list[str] = []
        cursor: str | None = None
        while True:
            query: dict[str, str | int] = {"limit": 1} | ({"cursor": cursor} if cursor else {})
            page = (await at.operator.ask("GET", "/api/admin/circuit-breakers", query=query)).body
            keys += [each["key"] for each in page["data"]]
            cursor = page["meta"]["nextCursor"]
            if cursor is None:
                break
        assert keys[0] == "chain:rpc"
        assert len(keys) == 2
        assert keys[1].isdigit()


async def test_metrics_show_the_head_its_age_and_every_request(database_url: str) -> None:
    async with shop(database_url) as at:
        text = await at.until_metrics_say("callora_chain_head_ledger 1000.0")
        assert re.search(r"^callora_chain_lag_seconds -?[0-9]", text, re.MULTILINE)
        assert "callora_chain_halted 0.0" in text
        simulated = r'^callora_chain_requests_total\{method="simulate",outcome="answered",source="rpc"\} [1-9]'
        assert re.search(simulated, text, re.MULTILINE)


async def test_horizon_is_checked_and_shown_where_it_is_used(database_url: str) -> None:
    async with (
        raw_upstream(as_json(HORIZON_ROOT)) as horizon,
        shop(database_url, HORIZON_ENABLED="true", HORIZON_URL=horizon.url) as at,
    ):
        told = await anonymous(at.client).ask("GET", "/api/health")
        assert told.body["checks"] == {"api": "ok", "database": "ok", "soroban_rpc": "ok", "horizon": "ok"}
        told = await anonymous(at.client).ask("GET", "/api/deposits/health")
        assert told.body["circuitBreaker"] == told.body["circuitBreakers"]["horizon"]
        found = (await at.operator.ask("GET", "/api/admin/circuit-breakers")).body["data"]
        assert [each["key"] for each in found] == ["chain:rpc", "chain:horizon"]
        horizon.handler = as_html(503)
        await at.until_check_is("horizon", "degraded")


async def test_a_start_on_another_network_is_refused_in_one_line_with_an_exit_code_of_its_own(
    database_url: str,
) -> None:
    script = RpcScript()
    script.passphrase = PASSPHRASES["mainnet"]
    async with scripted_rpc(script) as node:
        environ = {**GENEROUS, **ENVIRON, "SOROBAN_RPC_URL": node.url, "DATABASE_URL": database_url}
        with pytest.RaisesGroup(ChainMismatch, flatten_subgroups=True):
            async with running_service(database_url, environ):
                pass
        ended = await trio.run_process(
            [sys.executable, "-m", "callora", "serve"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environ,
        )
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("callora: The node 127.0.0.1:")
    assert "'Public Global Stellar Network ; September 2015'" in line
    assert "check STELLAR_NETWORK" in line


async def test_a_node_that_is_down_at_the_start_is_looked_at_later_and_a_mismatch_then_halts_the_chain_alone(
    database_url: str,
) -> None:
    script = RpcScript()
    script.fault = close_silently()
    async with scripted_rpc(script) as node, raw_upstream(respond(200, body=b"x")) as upstream:
        settings = {**ENVIRON, **IMPATIENT, "SOROBAN_RPC_URL": node.url, "LOG_LEVEL": "critical"}
        async with running_service(database_url, settings) as service, rest_client(service) as client:
            await service.api("shop", upstream.url)
            at = Shop(service, node, client, await service.consumer("1"), upstream)
            assert await at.health() == (200, "degraded", "down")
            await at.pays()
            script.views = {}
            script.fault = None
            await at.until_metrics_say("callora_chain_halted 1.0")
            assert await at.health() == (200, "degraded", "down")
            await at.pays()
            assert await service.balance(at.consumer) == (parse_usdc("0.98"), 0)
        assert service.exit_code == 0


async def test_many_outages_leave_nothing_behind(database_url: str) -> None:
    """A slice of the hour in tests/proof."""
    async with shop(database_url) as at:
        for _ in range(2):
            at.node.script.fault = close_silently()
            await at.until_rpc_is("down")
            await at.pays()
            at.node.script.fault = None
            await at.until_rpc_is("ok")
        shown = (await anonymous(at.client).ask("GET", "/api/deposits/health")).body["circuitBreaker"]
        assert shown["totalSuccesses"] > 0
    assert at.service.exit_code == 0
