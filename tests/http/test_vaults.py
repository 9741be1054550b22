"""Vaults over REST: opened once, their balances exact, their statements whole, in order and quick."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
import trio

from callora.ledger.commands import Deposit, Refund, Withdraw
from callora.ledger.ids import EventId, least_id
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store.reads import vaults as vault_reads
from callora.store.usage import ensure_partitions
from tests.support.client import call
from tests.support.rest import Person, Told, anonymous, person, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.upstream import raw_upstream, respond

SETTINGS = {"REST_RATE_LIMIT_MAX_REQUESTS": "10000"}


@attrs.frozen
class Bank:
    """A service and someone with a vault that holds 10 USDC."""

    service: RunningService
    stranger: Person
    consumer: Consumer
    owner: Person

    async def booked(self, command: Deposit | Withdraw | Refund) -> None:
        """Move the balance."""
        assert isinstance(await self.service.ledger.registry.ask(self.consumer.vault_id, command), BalanceMoved)

    async def statement(self, **query: str | int) -> Told:
        """Return a page."""
        return await self.owner.ask("GET", "/api/vault/statement", query=query)

    async def walked(self, limit: int, **query: str | int) -> list[dict[str, Any]]:
        """Return every line, read page by page."""
        lines: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            told = await self.statement(limit=limit, **query, **({"cursor": cursor} if cursor else {}))
            assert told.status == 200, told.body
            lines += told.body["data"]
            assert len(told.body["data"]) <= limit
            cursor = told.body["meta"]["nextCursor"]
            assert told.body["meta"]["hasMore"] == (cursor is not None)
            if cursor is None:
                return lines

    async def use(self, count: int, at: str = "now()", amount: int = 100, state: str = "captured") -> None:
        """Write closed usage events as they would stand in the table, one a millisecond up to a moment."""
        await self.service.database.execute(
            f"""
            INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,
                created_at, expires_at, price_version, state, amount, closed_at, status, outcome)
            SELECT '{self.consumer.vault_id}',
                   (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
                    || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text || 'b'), 1, 15))::uuid,
                   '{self.consumer.api_key_id}', gen_random_uuid(), 1, 1, {amount}, at, at + interval '1 minute', 1,
                   '{state}', CASE WHEN '{state}' = 'captured' THEN {amount} END, at, 200, 'delivered'
            FROM (SELECT n, {at} - n * interval '1 millisecond' AS at FROM generate_series(1, {count}) n) AS events
            """
        )


@asynccontextmanager
async def bank(database_url: str) -> AsyncIterator[Bank]:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        await ensure_partitions(service.database, datetime.now(UTC))
        consumer = await service.consumer("10")
        owner = Person(client, {"X-User-Id": consumer.user_id}, consumer.user_id)
        yield Bank(service, anonymous(client), consumer, owner)


# --- opening and balances ---------------------------------------------------------------------------------------------


async def test_a_vault_is_opened_once_however_many_ask_at_the_same_time(database_url: str) -> None:
    async with running_service(database_url, SETTINGS) as service, rest_client(service) as client:
        ada = await person(service, client)
        told: list[Told] = []

        async def open_it() -> None:
            told.append(await ada.ask("POST", "/api/vault", {"network": "mainnet"}))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(open_it)
        assert sorted(each.status for each in told) == [200] * 9 + [201]
        assert len({each.body["vaultId"] for each in told}) == 1
        assert told[0].body["balance_usdc"] == "0.0000000"
        await ada.ask("POST", "/api/vault", {"network": "testnet"})
        listed = (await ada.ask("GET", "/api/vaults")).body
        assert [each["network"] for each in listed["data"]] == ["mainnet", "testnet"]
        first = (await ada.ask("GET", "/api/vaults", query={"limit": 1})).body
        second = (await ada.ask("GET", "/api/vaults", query={"cursor": first["meta"]["nextCursor"]})).body
        assert first["data"] + second["data"] == listed["data"]
        bob = await person(service, client)
        assert (await bob.ask("GET", "/api/vaults")).body["data"] == []


@pytest.mark.parametrize("body", [{}, {"network": ""}, {"network": "MAINNET"}, {"network": "testnet", "plan": "pro"}])
async def test_a_vault_is_on_a_network_that_exists(database_url: str, body: dict[str, str]) -> None:
    async with bank(database_url) as it:
        assert (await it.owner.ask("POST", "/api/vault", body)).status == 400


async def test_a_balance_is_what_is_available_and_what_is_held(database_url: str) -> None:
    async with bank(database_url) as it:
        await it.service.database.execute("UPDATE vaults SET available = available - 25, held = 25")
        for query in ({}, {"network": "testnet"}):
            told = await it.owner.ask("GET", "/api/vault/balance", query=query)
            assert (told.status, told.body) == (
                200,
                {
                    "balance_usdc": "10.0000000",
                    "available_usdc": "9.9999975",
                    "held_usdc": "0.0000025",
                    "owed_usdc": "0.0000000",
                    "contractId": None,
                    "network": "testnet",
                    "lastSyncedAt": None,
                },
            )
        await it.service.database.execute("UPDATE vaults SET available = available + 25, held = 0")


@pytest.mark.parametrize("network", ["", "   ", "TestNet", "MAINNET", "invalid", "testnet ", "mainnet,testnet"])
@pytest.mark.parametrize("path", ["/api/vault/balance", "/api/vault/statement"])
async def test_a_network_is_named_exactly(database_url: str, path: str, network: str) -> None:
    async with bank(database_url) as it:
        told = await it.owner.ask("GET", path, query={"network": network})
        assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", ["query.network"])


@pytest.mark.parametrize("path", ["/api/vault/balance", "/api/vault/statement"])
async def test_who_has_no_vault_there_is_told_so_and_strangers_nothing(database_url: str, path: str) -> None:
    async with bank(database_url) as it:
        told = await it.owner.ask("GET", path, query={"network": "mainnet"})
        assert (told.status, told.code) == (404, "VAULT_NOT_FOUND")
        bob = await person(it.service, it.stranger.client)
        assert (await bob.ask("GET", path)).code == "VAULT_NOT_FOUND"
        assert (await it.stranger.ask("GET", path)).status == 401


# --- the statement ----------------------------------------------------------------------------------------------------


async def test_a_statement_tells_everything_that_moved_the_balance_and_adds_up_to_it(database_url: str) -> None:
    async with bank(database_url) as it, raw_upstream(respond()) as upstream:
        await it.service.api("echo", upstream.url)
        for _ in range(3):
            assert (await call(it.service.port, "GET", "/v1/call/echo/x", it.consumer.headers)).status == 200
        event = EventId(str(await it.service.database.fetch_value("SELECT event_id FROM usage_events LIMIT 1")))
        await it.booked(Refund(event, parse_usdc("0.004"), "sorry"))
        await it.booked(Withdraw(parse_usdc("2"), "out"))
        lines = (await it.statement()).body["data"]
        assert [each["kind"] for each in lines] == ["withdrawal", "refund", "usage", "usage", "usage", "deposit"]
        assert [each["amount_usdc"] for each in lines] == [
            "-2.0000000",
            "0.0040000",
            "-0.0100000",
            "-0.0100000",
            "-0.0100000",
            "10.0000000",
        ]
        assert lines[0]["balance_after"] == "7.9740000"
        assert (lines[1]["eventId"], lines[1]["ref"]) == (event, "sorry")
        assert event in [each["eventId"] for each in lines[2:5]]
        assert [each["balance_after"] for each in lines[2:5]] == [None] * 3
        assert [each["at"] for each in lines] == sorted((each["at"] for each in lines), reverse=True)
        total = sum(round(float(each["amount_usdc"]) * 10_000_000) for each in lines)
        assert total == sum(await it.service.balance(it.consumer))


async def test_pages_of_any_size_tell_the_same_lines_once_each_also_within_one_millisecond(database_url: str) -> None:
    async with bank(database_url) as it:
        for number in range(6):
            await it.booked(Deposit(parse_usdc("1"), f"deposit {number}"))
        moment = "timestamptz '2026-01-02 03:04:05.006Z'"
        # All in one millisecond or its neighbours: entries at different microseconds, usage with ids of that date.
        await it.service.database.execute("ALTER TABLE ledger_entries DISABLE TRIGGER entries_never_rewritten")
        await it.service.database.execute(
            f"UPDATE ledger_entries SET created_at = {moment} + (seq / 2) * interval '400 microseconds'"
        )
        for offset in (0, 1, 2, 3):
            await it.use(1, f"{moment} + interval '{offset} milliseconds'", amount=offset + 1)
        whole = await it.walked(100)
        assert len(whole) == 11
        for limit in (1, 2, 3, 7):
            assert await it.walked(limit) == whole
        assert [each["at"] for each in whole] == sorted((each["at"] for each in whole), reverse=True)
        for kind, count in (("usage", 4), ("deposit", 7), ("refund", 0)):
            only = await it.walked(2, kind=kind)
            assert len(only) == count
            assert only == [each for each in whole if each["kind"] == kind]


async def test_a_statement_begins_at_from_and_ends_before_to(database_url: str) -> None:
    async with bank(database_url) as it:
        await it.service.database.execute("ALTER TABLE ledger_entries DISABLE TRIGGER entries_never_rewritten")
        await it.service.database.execute("UPDATE ledger_entries SET created_at = '2026-01-01T00:00:03Z'")
        await it.use(5, "timestamptz '2026-01-01 00:00:00.006Z'")  # from .001 to .005

        async def told(**query: str) -> list[str]:
            return [each["at"][17:-1] for each in await it.walked(2, **query)]

        day = "2026-01-01T00:00:"
        assert await told() == ["03.000", "00.005", "00.004", "00.003", "00.002", "00.001"]
        assert await told(**{"from": f"{day}00.002Z", "to": f"{day}00.004Z"}) == ["00.003", "00.002"]
        assert await told(**{"from": f"{day}00.0021Z", "to": f"{day}00.0031Z"}) == ["00.003"]
        assert await told(**{"from": f"{day}03Z"}) == ["03.000"]
        assert await told(to=f"{day}03Z") == ["00.005", "00.004", "00.003", "00.002", "00.001"]
        assert await told(to="2026-01-01") == []
        assert await told(**{"from": "2026-01-01T01:00:03+01:00"}) == ["03.000"]
        assert await told(**{"from": "0001-01-01", "to": "9999-12-31"}) == await told()


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ({"from": "yesterday"}, "query.from"),
        ({"to": "2026-01-01T00:00:00"}, "query.to"),
        ({"from": "2026-01-02", "to": "2026-01-01"}, "query.to"),
        ({"kind": "gift"}, "query.kind"),
        ({"limit": "0"}, "query.limit"),
        ({"limit": "101"}, "query.limit"),
        ({"cursor": "garbage"}, "query.cursor"),
        ({"cursor": '["x", 0, 0]'}, "query.cursor"),
        ({"cursor": '["", -1, 0]'}, "query.cursor"),
        ({"cursor": '["", 9223372036854775807, 1]'}, "query.cursor"),
        ({"cursor": '["01a1ff0e-0fb6-7396-aa6d-6df1fb066d39", 0]'}, "query.cursor"),
        ({"offset": "5"}, "query.offset"),
    ],
)
async def test_a_wrong_statement_query_is_told(database_url: str, query: dict[str, str], wrong: str) -> None:
    async with bank(database_url) as it:
        if query.get("cursor", "").startswith("["):
            query = {"cursor": base64.urlsafe_b64encode(query["cursor"].encode()).decode()}
        told = await it.statement(**query)
        assert (told.status, told.wrong) == (400, [wrong])


async def test_a_page_of_a_long_statement_reads_a_page_and_not_the_statement(database_url: str) -> None:
    """Neither side sorts or reads more than it shows: counted in rows, not in seconds."""
    async with bank(database_url) as it:
        await it.use(20_000)
        database = it.service.database
        await database.execute("ANALYZE usage_events; ANALYZE ledger_entries")
        middle = datetime.now(UTC) - timedelta(seconds=10)
        plan = await database.fetch(
            f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF) {vault_reads._USAGE}",
            it.consumer.vault_id,
            least_id(middle),
            least_id(datetime(1970, 1, 1, tzinfo=UTC)),
            21,
        )
        text = "\n".join(row["QUERY PLAN"] for row in plan)
        assert "->  Sort" not in text, text
        assert "Seq Scan" not in text, text
        assert "Backward" in text, text
        assert "rows=21" in text, text
        plan = await database.fetch(
            f"EXPLAIN {vault_reads._ENTRIES}", it.consumer.vault_id, middle, 0, middle, None, 21
        )
        assert "Seq Scan on usage" not in "\n".join(row["QUERY PLAN"] for row in plan)
        assert len(await it.walked(100, kind="usage", **{"from": "2026-01-01"})) == 20_000


async def test_calls_that_cost_nothing_are_not_on_the_statement(database_url: str) -> None:
    async with bank(database_url) as it:
        await it.use(3, amount=0)
        await it.use(3, "now() - interval '1 second'", state="released")
        assert [each["kind"] for each in await it.walked(2)] == ["deposit"]
