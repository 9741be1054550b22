"""API keys by the numbers of the statements that they answer: B01 to B05, and weak points W-B that stand nowhere else.

B06 to B20 and B27 are in test_spending.py, B21 to B34 in test_holds.py, with the other weak points; W-B14 of calls is
in test_gateway_statements.py. What is answered otherwise, and why: docs/decisions/0029.
"""

from typing import Any

import jwt
import pytest

import callora.service
from callora.ledger.keys import RANDOM_BYTES, is_well_formed, make_key
from callora.ledger.money import parse_usdc
from callora.store.accounts import PricedEndpoint
from tests.support.client import call, watchdog
from tests.support.keys import NOBODYS, PATH, SECRET, KeyShop, barrage, bearer, id_of, key_shop
from tests.support.rest import SERVICE_TOKEN, Person, Told, biller
from tests.support.upstream import raw_upstream, respond

EXPIRED = "UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE api_key_id = $1"


async def test_b01_a_key_with_a_name_alone_has_every_scope_and_no_empty_list_of_them(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.ada.ask("POST", "/api/keys", {"name": "mine"})
        assert (made.status, made.body["apiKey"]["scopes"]) == (201, ["*"])
        assert is_well_formed(made.body["key"].encode())
        assert made.body["key"] not in str((await it.ada.ask("GET", "/api/keys")).body), "told once"
        told = await it.ada.ask("POST", "/api/keys", {"name": "mine", "scopes": []})
        assert (told.status, told.wrong) == (400, ["body.scopes"])


async def test_b02_a_key_does_what_its_scopes_say_and_no_scope_lets_it_manage_anything(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        scopes = ("read", "write", "receive")
        await it.service.api(
            "scoped", upstream.url, [PricedEndpoint("GET", f"/{s}", parse_usdc("0.01")) for s in scopes]
        )
        await it.service.database.execute(
            "UPDATE api_endpoints SET required_scope = substr(path, 2) WHERE path = ANY ($1)", [f"/{s}" for s in scopes]
        )
        for scope in ("read", "receive", "*"):
            made = await it.key(scopes=[scope])
            outcomes = [await it.outcome(made.body["key"], f"/v1/call/scoped/{each}") for each in scopes]
            assert outcomes == ["200" if scope in ("*", each) else "SCOPE_REQUIRED" for each in scopes]
            for method, path in (("GET", "/api/keys"), ("GET", "/api/usage"), ("PATCH", f"/api/keys/{id_of(made)}")):
                told = await it.stranger.ask(method, path, headers={"X-Api-Key": made.body["key"]})
                assert told.status == 401


async def test_b03_a_key_may_never_expire_and_one_that_has_ended_or_is_none_is_refused(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made, ended = await it.key(), await it.key(expiresAt="2130-01-01T00:00:00Z")
        assert (made.body["apiKey"]["expiresAt"], ended.body["apiKey"]["expiresAt"]) == (
            None,
            "2130-01-01T00:00:00.000Z",
        )
        await it.service.database.execute(EXPIRED, id_of(ended))
        another = "dev_" + make_key("testnet", bytes(RANDOM_BYTES)).rpartition("_")[2]
        for headers, status, code in (
            ([("X-Api-Key", ended.body["key"])], 401, "API_KEY_EXPIRED"),
            ([("X-Api-Key", another)], 401, "UNAUTHORIZED"),
            ([], 401, "UNAUTHORIZED"),
        ):
            response = await call(it.service.port, "GET", PATH, headers)
            assert (response.status, response.json()["code"]) == (status, code)
        await it.ada.ask("POST", f"/api/keys/{id_of(made)}/revoke")
        response = await it.call(made.body["key"])
        assert (response.status, response.json()["code"]) == (403, "API_KEY_REVOKED")


async def test_b04_a_key_is_revoked_by_its_owner_alone_and_stays_listed(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api/keys/{id_of(made)}"
        foreign = await it.bob.ask("POST", f"{path}/revoke")
        assert (foreign.status, foreign.code) == (404, "API_KEY_NOT_FOUND")
        assert (await it.ada.ask("GET", path)).body == made.body["apiKey"], "unchanged"
        told = await it.ada.ask("POST", f"{path}/revoke")
        assert (told.status, told.body["revoked"], told.body["active"]) == (200, True, False)
        (listed,) = (await it.ada.ask("GET", "/api/keys")).body["data"]
        assert listed == told.body
        assert await it.outcome(made.body["key"]) == "API_KEY_REVOKED"


async def test_b05_services_are_told_whose_key_was_presented_and_that_is_noted_as_its_use(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callora.service, "KEY_USE_SECONDS", 0.01)
    async with key_shop(database_url, INTERNAL_SERVICE_TOKEN=SERVICE_TOKEN) as it:
        service = biller(it.stranger.client)
        made = await it.key(scopes=["write", "read"], allowedApis=[it.api_id], allowedIps=["192.0.2.7", "10.0.0.0/8"])

        async def checked(key: str) -> tuple[bool, str | None, Any]:
            told = await service.ask("POST", "/api/billing/keys/check", {"key": key})
            assert told.status == 200
            assert key not in str(told.body)
            return told.body["usable"], told.body["refusal"], told.body["apiKey"]

        rights = {
            "apiKeyId": id_of(made),
            "userId": it.ada.user_id,
            "vaultId": made.body["apiKey"]["vaultId"],
            "network": "testnet",
            "scopes": ["read", "write"],
            "allowedApis": [it.api_id],
            "allowedEndpoints": None,
            "allowedIps": ["192.0.2.7", "10.0.0.0/8"],
            "expiresAt": None,
        }
        assert await checked(made.body["key"]) == (True, None, rights)
        path = f"/api/keys/{id_of(made)}"
        with watchdog("the use to be noted"):
            while (await it.ada.ask("GET", path)).body["lastUsedAt"] is None:
                pass
        live = await it.key(network="mainnet")
        assert (await checked(live.body["key"]))[2]["network"] == "mainnet"
        for change, refusal in (({"active": False}, "API_KEY_DISABLED"), ({"active": True}, None)):
            await it.ada.ask("PATCH", path, change)
            assert (await checked(made.body["key"]))[1] == refusal
        await it.service.database.execute(EXPIRED, id_of(live))
        with watchdog("the expiry to be seen"):
            while (told := await checked(live.body["key"]))[0]:
                pass
        assert told == (False, "API_KEY_EXPIRED", None)
        await it.ada.ask("DELETE", path)
        assert await checked(made.body["key"]) == (False, "API_KEY_REVOKED", None)
        for none in (made.body["key"][:-1], make_key("testnet", bytes(RANDOM_BYTES)), "dev_key", "x" * 256, "é"):
            assert await checked(none) == (False, "UNAUTHORIZED", None)
        assert (await service.ask("POST", "/api/billing/keys/check", {"key": ""})).wrong == ["body.key"]
        assert (await it.ada.ask("POST", "/api/billing/keys/check", {"key": "x"})).status == 401


async def test_b05_a_signed_token_names_its_key_and_nothing_but_a_text_is_a_name(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        minted = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/tokens", {"ttl": 60})
        token = minted.body["token"]
        claims = jwt.decode(token, SECRET, algorithms=["HS256"])
        assert claims["kid"] == id_of(made)
        assert await barrage(it.service.port, 1, bearer(token)) == ["200"]
        used = await it.service.database.fetch_value("SELECT api_key_id::text FROM usage_events")
        assert used == id_of(made)
        for kid in ("", 5, None, [id_of(made)], NOBODYS):
            forged = jwt.encode({**claims, "kid": kid}, SECRET, algorithm="HS256")
            assert await barrage(it.service.port, 1, bearer(forged)) == ["INVALID_TOKEN"], kid


# --- weak points that Callora does not have ---------------------------------------------------------------------------


async def test_wb6_no_key_and_no_token_makes_changes_or_revokes_keys(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made, sibling = await it.key(scopes=["*"]), await it.key()
        minted = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/tokens", {"ttl": 60})
        path = f"/api/keys/{id_of(sibling)}"
        for credential in (
            {"X-Api-Key": made.body["key"]},
            {"Authorization": f"Bearer {made.body['key']}"},
            {"Authorization": f"Bearer {minted.body['token']}"},
        ):
            asker = Person(it.stranger.client, credential)
            told: list[Told] = [
                await asker.ask("POST", "/api/keys", {"name": "n"}),
                await asker.ask("PATCH", path, {"active": False}),
                await asker.ask("POST", f"{path}/regenerate", {}),
                await asker.ask("POST", f"{path}/revoke"),
                await asker.ask("DELETE", path),
                await asker.ask("DELETE", f"{path}/limits/day"),
                await asker.ask("POST", f"{path}/tokens", {"ttl": 60}),
            ]
            assert [each.status for each in told] == [401] * len(told)
        assert await it.outcome(sibling.body["key"]) == "200"
        assert await it.service.database.fetch_value("SELECT count(*) FROM api_keys") == 2


async def test_wb9_a_call_adds_up_nothing_that_was_spent_before(database_url: str) -> None:
    """What was spent is counted when a vault is read, and before a refusal; from there it is carried on."""
    async with key_shop(database_url, USAGE_ROLLUP_INTERVAL_MS="3600000") as it:
        made = await it.key()
        for period in ("day", "week", "month", "year"):
            await it.ada.ask("PUT", f"/api/keys/{id_of(made)}/limits/{period}", {"amount": "0.05"})
        assert await it.outcome(made.body["key"]) == "200"
        await hidden(it, "usage_minutes", "key_hours", "usage_days")
        assert [await it.outcome(made.body["key"]) for _ in range(4)] == ["200"] * 4
        await shown(it, "usage_minutes", "key_hours", "usage_days")
        with watchdog("the sixth call to be refused"):
            assert await it.outcome(made.body["key"]) == "SPENDING_LIMIT_EXCEEDED"


async def hidden(it: KeyShop, *tables: str) -> None:
    """Take sums away: whatever reads them fails."""
    for table in tables:
        await it.service.database.execute(f"ALTER TABLE {table} RENAME TO {table}_hidden")


async def shown(it: KeyShop, *tables: str) -> None:
    """Bring sums back."""
    for table in tables:
        await it.service.database.execute(f"ALTER TABLE {table}_hidden RENAME TO {table}")
