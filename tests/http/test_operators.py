"""Operators: what they see and do, and the audit that sees them."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import jwt
import pytest
import trio

from callora.ledger.commands import Deposit
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import UserId
from callora.ledger.keys import make_key
from callora.ledger.money import parse_usdc
from callora.store import accounts
from callora.store.bridge import Database
from tests.proof.books import answer_uniquely
from tests.support.rest import ADMIN_KEY, Person, Told, admin, anonymous, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.upstream import raw_upstream

SECRET = "s" * 40
ENVIRON = {"REST_RATE_LIMIT_MAX_REQUESTS": "1000000", "ADMIN_API_KEY": ADMIN_KEY, "JWT_SECRET": SECRET}
GHOST = "00000000-0000-7000-8000-00000000dead"
ROUTES: tuple[tuple[str, str, dict[str, str] | None], ...] = (
    ("GET", "/api/admin/users", None),
    ("GET", f"/api/admin/users/{GHOST}", None),
    ("POST", f"/api/admin/users/{GHOST}/standing", {"network": "testnet", "standing": "active", "reason": "r"}),
    ("GET", "/api/admin/circuit-breakers", None),
    ("GET", "/api/admin/circuit-breakers/1", None),
    ("POST", "/api/admin/circuit-breakers/1/reset", {}),
    ("POST", "/api/admin/circuit-breakers/1/trip", {}),
    ("GET", "/api/admin/audit", None),
    ("POST", "/api/billing/refund", {"usageEventId": GHOST, "reason": "r"}),
    (
        "POST",
        "/api/admin/billing/credits/grant",
        {"userId": GHOST, "network": "testnet", "amountUsdc": "1", "reason": "r"},
    ),
)
KEYED = {"Idempotency-Key": "k"}


@asynccontextmanager
async def office(
    database_url: str, environ: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[RunningService, httpx.AsyncClient, Person]]:
    """Run a service that has an operator."""
    async with (
        running_service(database_url, {**ENVIRON, **(environ or {})}) as service,
        rest_client(service) as client,
    ):
        yield service, client, admin(client)


async def lines(database: Database) -> list[tuple[str, str, str | None, int]]:
    """Return actor, action, target and status of every access, oldest first."""
    rows = await database.fetch("SELECT actor, action, target, status FROM audit_events ORDER BY at, audit_id")
    return [(row["actor"], row["action"], row["target"], row["status"]) for row in rows]


# --- who is let in, and what is noted of it ---------------------------------------------------------------------------


async def test_only_operators_are_let_in_and_every_access_is_noted_with_its_end(database_url: str) -> None:
    async with office(database_url) as (service, client, operator):
        someone = await person(service, client)
        claims = {"sub": someone.user_id, "exp": 4_000_000_000}
        boss = Person(client, bearer({**claims, "role": "admin"}), someone.user_id)
        liar = Person(client, {"X-Admin-Api-Key": "wrong"})
        expected: list[tuple[str, int]] = []
        for method, path, body in ROUTES:
            for who, actor, refused in (
                (anonymous(client), "unknown", 401),
                (liar, "unknown", 401),
                (someone, "unknown", 403),
                (Person(client, bearer(claims)), "unknown", 403),
                (operator, "admin-key", None),
                (boss, f"user:{someone.user_id}", None),
            ):
                told = await who.ask(method, path, body, headers=KEYED)
                assert told.status == (refused or told.status)
                assert told.status < 500 and (refused or told.status not in (401, 403)), (path, told)
                expected.append((actor, told.status))
        noted = await lines(service.database)
        assert [(actor, status) for actor, _, _, status in noted] == expected
        assert len({action for _, action, _, _ in noted}) == len(ROUTES)
        assert {target for _, action, target, _ in noted if action == "get_user"} == {GHOST}


async def test_an_access_from_elsewhere_or_too_fast_is_noted_too(database_url: str) -> None:
    environ = {"ADMIN_IP_ALLOWED_RANGES": "10.0.0.0/8"}
    async with office(database_url, environ) as (service, _, operator):
        told = await operator.ask("GET", "/api/admin/users")
        assert (told.status, told.code) == (403, "IP_NOT_ALLOWED")
        assert await lines(service.database) == [("unknown", "list_users", None, 403)]
    async with office(database_url, {"REST_RATE_LIMIT_MAX_REQUESTS": "1"}) as (service, _, operator):
        assert (await operator.ask("GET", "/api/admin/users")).status == 200
        assert (await operator.ask("GET", "/api/admin/users")).status == 429
        assert (await lines(service.database))[1:] == [
            ("admin-key", "list_users", None, 200),
            ("unknown", "list_users", None, 429),
        ]


async def test_the_audit_can_only_grow(database_url: str) -> None:
    async with office(database_url) as (service, _, operator):
        await operator.ask("GET", "/api/admin/users")
        for statement in (
            "UPDATE audit_events SET status = 200",
            "DELETE FROM audit_events",
            "TRUNCATE audit_events",
        ):
            with pytest.raises(CalloraFault):
                await service.database.execute(statement)
        assert await lines(service.database) == [("admin-key", "list_users", None, 200)]


async def test_defect_33_no_secret_gets_into_the_audit(database_url: str) -> None:
    key = make_key("mainnet", secrets.token_bytes(20))
    seed = "S" + "A" * 55
    async with office(database_url) as (service, client, operator):
        someone = await person(service, client)
        grant = {"userId": someone.user_id, "network": "testnet", "amountUsdc": "1"}
        for method, path, body in (
            ("GET", f"/api/admin/users/{key}", None),
            ("GET", f"/api/admin/users/%00{key}", None),
            ("GET", f"/api/admin/users?search={key}", None),
            ("POST", "/api/admin/billing/credits/grant", {**grant, "reason": f"lost {key} and {seed}"}),
            ("POST", "/api/admin/billing/credits/grant", {**grant, "reason": "r", "password": "hunter2hunter2"}),
        ):
            headers = {**KEYED, "X-Request-Id": key, "Authorization": f"Bearer {seed}"}
            assert (await operator.ask(method, path, body, headers=headers)).status in (200, 400)
        wrong = Person(client, {"X-Admin-Api-Key": "wrong-admin-key"})
        assert (await wrong.ask("GET", "/api/admin/users")).status == 401
        whole = await service.database.fetch_value("SELECT string_agg(a::text, ' ') FROM audit_events a")
        for secret in (key, key[20:], seed, ADMIN_KEY, "wrong-admin-key", "hunter2"):
            assert secret not in whole
        assert (await service.database.fetch_value("SELECT count(*) FROM audit_events")) == 6
        detail = await service.database.fetch_value("SELECT details::text FROM audit_events WHERE action LIKE 'grant%'")
        assert json.loads(detail)["amountUsdc"] == "1"


async def test_the_audit_is_listed_by_page_and_filter(database_url: str) -> None:
    async with office(database_url) as (service, client, operator):
        someone = await person(service, client)
        for number in range(3):
            body = {"userId": someone.user_id, "network": "testnet", "amountUsdc": "1", "reason": f"why {number}"}
            await operator.ask(
                "POST", "/api/admin/billing/credits/grant", body, headers={"Idempotency-Key": str(number)}
            )
            await operator.ask("GET", f"/api/admin/users/{someone.user_id}")
        await anonymous(client).ask("GET", "/api/admin/users")
        seen: list[str] = []
        query: dict[str, str | int] = {"limit": 2, "to": "2999-01-01"}
        # Looking is an access too: pages go back from where the first began.
        while True:
            told = await operator.ask("GET", "/api/admin/audit", query=query)
            seen += [each["action"] for each in told.body["data"]]
            if told.body["meta"]["nextCursor"] is None:
                break
            query["cursor"] = told.body["meta"]["nextCursor"]
        assert seen == ["list_users", *(["get_user", "grant_credits"] * 3)]

        async def found(**query: str) -> list[dict[str, object]]:
            told = await operator.ask("GET", "/api/admin/audit", query=query)
            assert told.status == 200, told
            return list(told.body["data"])

        for name in ("action", "event"):
            grants = await found(**{name: "grant_credits"})
            assert [each["details"]["reason"] for each in grants] == ["why 2", "why 1", "why 0"]  # type: ignore[index]
            assert {each["target"] for each in grants} == {someone.user_id}
        assert [each["status"] for each in await found(actor="unknown")] == [401]
        assert len(await found(target=str(someone.user_id))) == 6
        assert await found(**{"from": "2999-01-01"}) == []
        assert await found(to="2001-01-01") == []
        told = await operator.ask("GET", "/api/admin/audit", query={"action": "a", "event": "b", "from": "x"})
        assert told.wrong == ["query.from"]
        assert (await operator.ask("GET", "/api/admin/audit", query={"action": "a", "event": "b"})).status == 400
        for cursor in ("x", "WzEsImEiXQ", "WzkyMjMzNzIwMzY4NTQ3NzU4MDcsImEiXQ"):
            assert (await operator.ask("GET", "/api/admin/audit", query={"cursor": cursor})).wrong == ["query.cursor"]


# --- people -----------------------------------------------------------------------------------------------------------


async def test_people_are_listed_by_page_and_found_by_id_wallet_or_name(database_url: str) -> None:
    async with office(database_url) as (service, _, operator):
        ids, now = service.context.ids, service.context.clock.now()
        made = []
        for number in range(5):
            user_id = UserId(ids.uuid7())
            await accounts.add_user(service.database, user_id, f"Name {number}%_", now)
            made.append(user_id)
        wallet = "G" + "A" * 55
        await service.database.execute("UPDATE users SET wallet_address = $2 WHERE user_id = $1", made[2], wallet)
        seen: list[str] = []
        query: dict[str, str | int] = {"limit": 2}
        while True:
            told = await operator.ask("GET", "/api/admin/users", query=query)
            seen += [each["id"] for each in told.body["data"]]
            if told.body["meta"]["nextCursor"] is None:
                break
            query["cursor"] = told.body["meta"]["nextCursor"]
        assert seen == sorted(made, reverse=True)

        async def found(search: str) -> list[str]:
            told = await operator.ask("GET", "/api/admin/users", query={"search": search})
            return [each["id"] for each in told.body["data"]]

        assert await found(made[1].upper()) == [made[1]]
        assert await found(wallet.lower()) == [made[2]]
        assert await found("name 3%") == [made[3]]
        assert await found("nobody") == await found("%x") == []
        assert sorted(await found("%_")) == sorted(made)
        for cursor in ("x", "WyJhIl0", "WzFd"):
            assert (await operator.ask("GET", "/api/admin/users", query={"cursor": cursor})).wrong == ["query.cursor"]


async def test_a_list_that_has_not_changed_is_304_and_still_noted(database_url: str) -> None:
    async with office(database_url) as (service, client, operator):
        await person(service, client)
        first = await operator.ask("GET", "/api/admin/users")
        tag = {"If-None-Match": first.headers["ETag"]}
        assert (await operator.ask("GET", "/api/admin/users", headers=tag)).status == 304
        assert (await anonymous(client).ask("GET", "/api/admin/users", headers=tag)).status == 401
        await person(service, client)
        assert (await operator.ask("GET", "/api/admin/users", headers=tag)).status == 200
        assert [status for _, _, _, status in await lines(service.database)] == [200, 304, 401, 200]


async def test_a_person_is_shown_with_vaults_and_keys(database_url: str) -> None:
    async with office(database_url) as (service, _, operator):
        consumer = await service.consumer("1.5")
        revoked = await service.another_key(consumer.user_id, consumer.vault_id)
        await service.database.execute(
            "UPDATE api_keys SET revoked_at = now() WHERE api_key_id = $1", revoked.api_key_id
        )
        told = await operator.ask("GET", f"/api/admin/users/{consumer.user_id}")
        assert told.body["keys"] == {"total": 2, "active": 1}
        (vault,) = told.body["vaults"]
        assert {**vault, "created_at": ""} == {
            "vault_id": consumer.vault_id,
            "network": "testnet",
            "plan": "enterprise",
            "balance_usdc": "1.5000000",
            "held_usdc": "0.0000000",
            "owed_usdc": "0.0000000",
            "arrears_since": None,
            "standing": "active",
            "created_at": "",
        }
        assert consumer.api_key not in json.dumps(told.body)
        assert (await operator.ask("GET", f"/api/admin/users/{GHOST}")).status == 404
        assert (await operator.ask("GET", "/api/admin/users/1")).wrong == ["path.userId"]


async def test_a_standing_takes_effect_at_once_on_calls_and_charges_and_back(database_url: str) -> None:
    async with (
        raw_upstream(answer_uniquely(0)) as upstream,
        office(database_url) as (service, client, operator),
    ):
        await service.api("called", upstream.url)
        consumer = await service.consumer("1")

        async def call() -> int:
            response = await client.get("/v1/call/called/x", headers={"X-Api-Key": consumer.api_key})
            return response.status_code

        async def stand(standing: str, network: str = "testnet") -> Told:
            body = {"network": network, "standing": standing, "reason": "chargeback"}
            return await operator.ask("POST", f"/api/admin/users/{consumer.user_id}/standing", body)

        assert await call() == 200
        for standing, status in (("suspended", 403), ("arrears", 402), ("active", 200)):
            told = await stand(standing)
            assert (told.status, told.body["vaults"][0]["standing"]) == (200, standing)
            assert await call() == status
        assert (await stand("active", "mainnet")).code == "VAULT_NOT_FOUND"
        assert (await stand("gone")).wrong == ["body.standing"]
        # Money may come in whatever the standing.
        await stand("suspended")
        await service.ledger.registry.ask(consumer.vault_id, Deposit(parse_usdc("1"), "d"))
        assert await service.balance(consumer) == (parse_usdc("1.98"), 0)
        details = await service.database.fetch_value(
            "SELECT details::text FROM audit_events WHERE action = 'set_standing' ORDER BY at LIMIT 1"
        )
        assert json.loads(details) == {
            "userId": consumer.user_id,
            "network": "testnet",
            "standing": "suspended",
            "reason": "chargeback",
        }


# --- circuit breakers -------------------------------------------------------------------------------------------------


async def test_a_breaker_is_seen_tripped_and_reset(database_url: str) -> None:
    async with (
        raw_upstream(answer_uniquely(0)) as upstream,
        office(database_url) as (service, client, operator),
    ):
        api_id = await service.api("called", upstream.url)
        consumer = await service.consumer("1")
        path = f"/api/admin/circuit-breakers/{api_id}"

        async def call() -> int:
            response = await client.get("/v1/call/called/x", headers={"X-Api-Key": consumer.api_key})
            return response.status_code

        assert (await operator.ask("GET", "/api/admin/circuit-breakers")).body["data"] == []
        closed = {
            "key": str(api_id),
            "apiId": api_id,
            "state": "closed",
            "failures": 0,
            "retryAfterSeconds": 0.0,
            "scope": "process",
        }
        assert (await operator.ask("GET", path)).body == closed
        assert (await operator.ask("GET", "/api/admin/circuit-breakers")).body["data"] == []
        told = await operator.ask("POST", f"{path}/trip", {"reason": "the provider asked"})
        assert (told.status, told.body["state"]) == (200, "open")
        assert 0 < told.body["retryAfterSeconds"] <= 30
        assert await call() == 503
        (only,) = (await operator.ask("GET", "/api/admin/circuit-breakers")).body["data"]
        assert (only["apiId"], only["state"]) == (api_id, "open")
        assert (await operator.ask("POST", f"{path}/reset", {})).body == closed
        assert await call() == 200
        assert await service.balance(consumer) == (parse_usdc("0.99"), 0)
        for wrong, status in ((f"{path}x", 400), ("/api/admin/circuit-breakers/999999", 404)):
            assert (await operator.ask("GET", wrong)).status == status
            assert (await operator.ask("POST", f"{wrong}/trip", {})).status == status
        assert (await operator.ask("POST", f"{path}/trip", {"reason": "x" * 513})).wrong == ["body.reason"]
        second = await service.api("another", upstream.url)
        assert (await operator.ask("POST", f"/api/admin/circuit-breakers/{second}/trip", {})).status == 200
        page = await operator.ask("GET", "/api/admin/circuit-breakers", query={"limit": 1})
        cursor = page.body["meta"]["nextCursor"]
        rest = await operator.ask("GET", "/api/admin/circuit-breakers", query={"limit": 1, "cursor": cursor})
        assert [each["apiId"] for each in (*page.body["data"], *rest.body["data"])] == [api_id, second]
        assert rest.body["meta"] == {"limit": 1, "nextCursor": None, "hasMore": False}
        # What does not exist leaves no breaker behind.
        assert len((await operator.ask("GET", "/api/admin/circuit-breakers")).body["data"]) == 2


async def test_parallel_standings_leave_every_access_in_the_audit(database_url: str) -> None:
    async with office(database_url) as (service, _, operator):
        consumer = await service.consumer("1")
        path = f"/api/admin/users/{consumer.user_id}/standing"

        async def one(number: int) -> None:
            standing = ("active", "suspended")[number % 2]
            told = await operator.ask("POST", path, {"network": "testnet", "standing": standing, "reason": "r"})
            assert told.status == 200

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number)
        assert await lines(service.database) == [("admin-key", "set_standing", consumer.user_id, 200)] * 30


def bearer(claims: Mapping[str, object]) -> dict[str, str]:
    """Return the header of a token of an outside issuer with these claims."""
    return {"Authorization": f"Bearer {jwt.encode(dict(claims), SECRET, 'HS256')}"}
