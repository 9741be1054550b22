"""Staleness: what the gateway keeps of keys, APIs and prices is at most a second old, or it is not used."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import structlog
import trio

import callora.service
from callora.actors.catalogue import STALE_SECONDS, Catalogue
from callora.ledger.ids import ApiKeyId
from callora.ledger.keys import KeyRecord
from callora.ledger.money import parse_usdc
from callora.metrics import Metrics
from callora.service import SystemClock
from callora.store.bridge import Database, open_database
from callora.store.embedded import EmbeddedPostgres
from callora.store.reads.gateway import Reads
from tests.support.client import call, watchdog
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import RawUpstream, raw_upstream, respond

PATH = "/v1/call/echo/x"


async def ready(service: RunningService, upstream: RawUpstream) -> Consumer:
    await service.api("echo", upstream.url)
    return await service.consumer("10")


async def used(_: Sequence[ApiKeyId]) -> None:
    await trio.lowlevel.checkpoint()


def catalogue_on(database: Database) -> Catalogue:
    """Return a catalogue that looks at changes only when it is told to."""
    return Catalogue(Reads(database), Metrics(), structlog.get_logger(), 3600, used, SystemClock())


@asynccontextmanager
async def database_away(server: EmbeddedPostgres, dsn: str) -> AsyncIterator[None]:
    """Refuse every connection to the service's database and end those there are."""
    name = urlsplit(dsn).path.removeprefix("/")
    async with open_database(server.dsn) as outside:
        await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        await outside.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        try:
            yield
        finally:
            with trio.move_on_after(10, shield=True):
                await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("UPDATE api_keys SET revoked_at = now()", 403),
        ("UPDATE api_keys SET disabled = true", 401),
        ("DELETE FROM api_keys", 401),
        ("UPDATE apis SET status = 'paused'", 404),
        ("UPDATE vaults SET standing = 'suspended'", 403),
        ("UPDATE api_endpoints SET method = 'POST'", 404),
    ],
)
async def test_what_is_taken_away_in_the_database_is_refused_within_a_second(
    database_url: str, change: str, status: int
) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        await service.database.execute(change)
        changed_at = last_at = trio.current_time()
        with watchdog("the change to be seen"):
            while (await call(service.port, "GET", PATH, consumer.headers)).status == 200:
                last_at = trio.current_time()
        assert last_at - changed_at < STALE_SECONDS
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == status


async def test_a_price_changed_in_the_database_is_charged_within_a_second(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", PATH, consumer.headers)).header("X-Callora-Charge") == "0.0100000"
        await service.database.execute(
            "INSERT INTO endpoint_prices (endpoint_id, version, amount, effective_from)"
            " SELECT endpoint_id, 2, $1, now() FROM api_endpoints",
            parse_usdc("0.02"),
        )
        changed_at = last_at = trio.current_time()
        with watchdog("the new price"):
            while (response := await call(service.port, "GET", PATH, consumer.headers)).header(
                "X-Callora-Charge"
            ) == "0.0100000":
                last_at = trio.current_time()
        assert last_at - changed_at < STALE_SECONDS
        assert response.header("X-Callora-Charge") == "0.0200000"
        versions = await service.database.fetch_value("SELECT array_agg(DISTINCT price_version) FROM usage_events")
        assert sorted(versions) == [1, 2]


async def test_a_price_with_a_date_takes_effect_on_its_date_without_any_change(database_url: str) -> None:
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        await service.database.execute(
            "INSERT INTO endpoint_prices (endpoint_id, version, amount, effective_from)"
            " SELECT endpoint_id, 2, 1, now() + interval '500 milliseconds' FROM api_endpoints"
        )
        assert (await call(service.port, "GET", PATH, consumer.headers)).header("X-Callora-Charge") == "0.0100000"
        with watchdog("the new price"):
            while (await call(service.port, "GET", PATH, consumer.headers)).header("X-Callora-Charge") != "0.0000001":
                pass


async def test_while_the_database_is_away_nothing_kept_is_served_and_nothing_is_charged(
    postgres_server: EmbeddedPostgres, database_url: str
) -> None:
    async with (
        running_service(database_url, {"LOG_LEVEL": "critical", "DB_CONN_TIMEOUT_MS": "500"}) as service,
        raw_upstream(respond()) as upstream,
    ):
        consumer = await ready(service, upstream)
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        async with database_away(postgres_server, database_url):
            # What is sent on a connection that is ending in this moment has an unknown outcome, and is told so.
            with watchdog("the ends of the connections to be seen"):
                while (response := await call(service.port, "GET", PATH, consumer.headers)).status == 504:
                    assert response.json()["code"] == "OUTCOME_UNKNOWN"
            for _ in range(5):
                response = await call(service.port, "GET", PATH, consumer.headers)
                assert (response.status, response.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
                assert response.header("Retry-After") == "1"
            assert len(upstream.requests) == 1
        with watchdog("the database to be back"):
            while (await call(service.port, "GET", PATH, consumer.headers)).status != 200:
                pass
        await service.until_no_hold(consumer)
        assert await service.balance(consumer) == (parse_usdc("9.98"), 0)
        assert len(upstream.requests) == 2


async def look(catalogue: Catalogue, consumer: Consumer) -> KeyRecord | None:
    return await catalogue.key(consumer.api_key.encode())


async def test_who_changes_something_sees_it_at_once_after_a_refresh(database_url: str) -> None:
    async with running_service(database_url) as service:
        consumer = await service.consumer("0")
        await service.api("echo", "http://127.0.0.1:1")
        catalogue = catalogue_on(service.database)
        await catalogue.refresh()
        key, api = await look(catalogue, consumer), await catalogue.api("echo")
        assert key is not None
        assert api is not None
        await service.database.execute("UPDATE api_keys SET disabled = true")
        await service.database.execute("UPDATE apis SET status = 'paused'")
        assert await look(catalogue, consumer) is key
        assert await catalogue.api("echo") is api
        await catalogue.refresh()
        key, api = await look(catalogue, consumer), await catalogue.api("echo")
        assert key is not None
        assert key.disabled
        assert api is not None
        assert not api.active


async def test_only_what_has_changed_is_read_again(database_url: str) -> None:
    async with running_service(database_url) as service:
        consumer, other = await service.consumer("0"), await service.consumer("0")
        catalogue = catalogue_on(service.database)
        await catalogue.refresh()
        before, unchanged = await look(catalogue, consumer), await look(catalogue, other)
        await service.database.execute("UPDATE api_keys SET disabled = true WHERE api_key_id = $1", consumer.api_key_id)
        await catalogue.refresh()
        assert await look(catalogue, consumer) is not before
        assert await look(catalogue, other) is unchanged


async def test_what_was_read_before_the_first_look_at_changes_is_not_kept(database_url: str) -> None:
    async with running_service(database_url) as service:
        consumer = await service.consumer("0")
        catalogue = catalogue_on(service.database)
        assert await look(catalogue, consumer) is not None
        await service.database.execute("UPDATE api_keys SET disabled = true")
        await catalogue.refresh()
        key = await look(catalogue, consumer)
        assert key is not None
        assert key.disabled


async def test_who_slept_past_the_changes_that_are_told_keeps_nothing(database_url: str) -> None:
    async with running_service(database_url) as service:
        consumer = await service.consumer("0")
        catalogue = catalogue_on(service.database)
        await catalogue.refresh()
        assert await look(catalogue, consumer) is not None
        await service.database.execute("UPDATE api_keys SET disabled = true")
        await service.database.execute("UPDATE plans SET active = active")
        await service.database.execute("DELETE FROM catalogue_changes WHERE kind = 'key'")
        await service.database.execute("UPDATE catalogue_changes SET kind = 'vault', ref = $1", consumer.user_id)
        await catalogue.refresh()
        key = await look(catalogue, consumer)
        assert key is not None
        assert key.disabled


async def test_when_a_key_was_last_used_is_noted(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callora.service, "KEY_USE_SECONDS", 0.01)
    async with running_service(database_url) as service, raw_upstream(respond()) as upstream:
        consumer = await ready(service, upstream)
        asked = "SELECT last_used_at FROM api_keys WHERE api_key_id = $1"
        assert await service.database.fetch_value(asked, consumer.api_key_id) is None
        assert (await call(service.port, "GET", PATH, consumer.headers)).status == 200
        with watchdog("the use of the key to be noted"):
            while await service.database.fetch_value(asked, consumer.api_key_id) is None:  # noqa: ASYNC110 - a job does
                await trio.lowlevel.checkpoint()
