"""The secrets of API keys: regenerated, nowhere kept; and API keys as operators see them."""

import base64
import hashlib
from datetime import UTC, datetime

import pytest
import trio

from callora.ledger.faults import StoreRefused
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.store.keys import revoke_keys
from tests.support.client import call, watchdog
from tests.support.keys import NOBODYS, PATH, id_of, key_shop
from tests.support.rest import Told, admin
from tests.support.service import RunningService


async def everything_stored(service: RunningService) -> str:
    """Return every row of every table as text."""
    tables = await service.database.fetch(
        "SELECT quote_ident(table_name) AS name FROM information_schema.tables"
        " WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
    )
    rows: list[str] = []
    for table in tables:
        rows += (row["text"] for row in await service.database.fetch(f"SELECT t::text AS text FROM {table['name']} t"))
        for row in await service.database.fetch(f"SELECT to_jsonb(t) AS bytes FROM {table['name']} t"):
            for word in row["bytes"].split("\\\\x")[1:]:  # bytea in its hexadecimal form
                digits = word.split('"', 1)[0]
                rows.append(bytes.fromhex(digits).decode("latin-1"))
    return "\n".join(rows)


# --- regenerating -----------------------------------------------------------------------------------------------------


async def test_a_regenerated_key_is_the_same_key_with_another_secret(database_url: str) -> None:
    async with key_shop(database_url, CATALOGUE_REFRESH_MS="900") as it:
        made = await it.key(network="mainnet", scopes=["read"], rateLimitPerMinute=9, allowedApis=[it.api_id])
        assert await it.outcome(made.body["key"]) == "200"
        told = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/regenerate", {})
        secret, shown = told.body["key"], told.body["apiKey"]
        assert secret != made.body["key"] and secret.startswith("ck_live_")
        changed = {"prefix": secret[:16], "last4": secret[-4:], "maskedKey": f"ck_live_…{secret[-4:]}"}
        assert {**shown, "lastUsedAt": None} == {**made.body["apiKey"], **changed}
        assert await it.outcome(made.body["key"]) == "UNAUTHORIZED", "at once"
        assert await it.outcome(secret) == "200"
        keys = await it.service.database.fetch("SELECT DISTINCT api_key_id::text AS id FROM usage_events")
        assert [row["id"] for row in keys] == [shown["id"]]


async def test_a_former_secret_works_until_its_grace_ends(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api/keys/{id_of(made)}"
        told = await it.ada.ask("POST", f"{path}/regenerate", {"graceSeconds": 1})
        assert told.body["apiKey"]["formerSecretUntil"] is not None
        assert await it.outcome(told.body["key"]) == "200"
        before = await it.outcome(made.body["key"])
        with watchdog("the end of the grace"):
            while (after := await it.outcome(made.body["key"])) in ("200", "TOO_MANY_REQUESTS"):  # noqa: ASYNC110 - the wall clock decides
                await trio.sleep(0.05)
        assert (before, after) == ("200", "API_KEY_EXPIRED")
        assert (await it.ada.ask("GET", path)).body["formerSecretUntil"] is None


async def test_a_former_secret_shares_its_keys_rate_and_dies_with_it(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key(rateLimitPerMinute=2)
        path = f"/api/keys/{id_of(made)}"
        told = await it.ada.ask("POST", f"{path}/regenerate", {"graceSeconds": 3600})
        secrets = (told.body["key"], made.body["key"], told.body["key"])
        assert [await it.outcome(each) for each in secrets] == ["200", "200", "TOO_MANY_REQUESTS"]
        await it.ada.ask("DELETE", path)
        assert [await it.outcome(each) for each in secrets[:2]] == ["API_KEY_REVOKED"] * 2


async def test_a_second_grace_never_cuts_the_first_short(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        path = f"/api/keys/{id_of(made)}/regenerate"
        told: list[Told] = []

        async def regenerate() -> None:
            told.append(await it.ada.ask("POST", path, {"graceSeconds": 600}))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(regenerate)
        assert sorted(each.status for each in told) == [200, 409, 409, 409, 409]
        (present,) = (each.body["key"] for each in told if each.status == 200)
        assert [await it.outcome(each) for each in (present, made.body["key"])] == ["200", "200"]
        last = await it.ada.ask("POST", path, {"graceSeconds": 0})
        outcomes = [await it.outcome(each) for each in (made.body["key"], present, last.body["key"])]
        assert outcomes == ["UNAUTHORIZED", "UNAUTHORIZED", "200"]


async def test_the_command_line_revokes_by_a_former_secrets_prefix_as_well(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        await it.ada.ask("POST", f"/api/keys/{id_of(made)}/regenerate", {"graceSeconds": 600})
        new_id = it.service.context.ids.uuid7
        (revoked,) = await revoke_keys(it.service.database, made.body["key"][:16], datetime.now(UTC), new_id)
        assert str(revoked["api_key_id"]) == id_of(made)


@pytest.mark.parametrize("grace", [-1, 86_401, "60", None])
async def test_a_grace_lasts_a_day_at_most(database_url: str, grace: object) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        told = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/regenerate", {"graceSeconds": grace})
        assert told.wrong == ["body.graceSeconds"]


# --- operators --------------------------------------------------------------------------------------------------------


async def test_operators_see_and_change_everybodys_keys_and_every_access_is_noted(database_url: str) -> None:
    async with key_shop(database_url) as it:
        operator = admin(it.stranger.client)
        ada, bob = await it.key(), await it.key(it.bob)
        await it.bob.ask("PATCH", f"/api/keys/{id_of(bob)}", {"active": False})

        async def listed(**query: str) -> set[str]:
            told = await operator.ask("GET", "/api/admin/keys", query=query)
            return {each["id"] for each in told.body["data"]}

        assert await listed() == {id_of(ada), id_of(bob)}
        assert await listed(userId=str(it.bob.user_id)) == await listed(active="false") == {id_of(bob)}
        assert await listed(active="true") == {id_of(ada)}
        path = f"/api/admin/keys/{id_of(ada)}"
        assert (await operator.ask("GET", path)).body["userId"] == it.ada.user_id
        told = await operator.ask("PATCH", path, {"rateLimitPerMinute": 50_000})
        assert told.body["rateLimitPerMinute"] == 50_000, "an operator may give more than the plan"
        told = await it.ada.ask("PATCH", f"/api/keys/{id_of(ada)}", {"rateLimitPerMinute": 50_000, "name": "kept"})
        assert told.status == 200, "what she has already is not refused"
        assert (await operator.ask("DELETE", path)).status == 204
        assert await it.outcome(ada.body["key"]) == "API_KEY_REVOKED"
        assert (await operator.ask("PATCH", path, {"name": "n"})).code == "CONFLICT"
        for method in ("GET", "DELETE"):
            assert (await operator.ask(method, f"/api/admin/keys/{NOBODYS}")).code == "API_KEY_NOT_FOUND"
        lines = await it.service.database.fetch("SELECT action, target, status FROM audit_events ORDER BY audit_id")
        assert ("delete_any_key", id_of(ada), 204) in [(row["action"], row["target"], row["status"]) for row in lines]
        assert len(lines) == 10


async def test_people_are_no_operators(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for method, path in (("GET", ""), ("GET", f"/{id_of(made)}"), ("DELETE", f"/{id_of(made)}")):
            assert (await it.ada.ask(method, f"/api/admin/keys{path}")).status == 403
            assert (await it.stranger.ask(method, f"/api/admin/keys{path}")).status == 401
        assert await it.outcome(made.body["key"]) == "200"


# --- defects that Callora does not have -------------------------------------------------------------------------------


async def test_defect_33_no_secret_is_stored_anywhere_in_any_form(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        regenerated = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/regenerate", {"graceSeconds": 60})
        token = await it.ada.ask("POST", f"/api/keys/{id_of(made)}/tokens", {"ttl": 60})
        secrets = [made.body["key"], regenerated.body["key"], token.body["token"]]
        keyed = [("Idempotency-Key", "once"), ("Authorization", f"Bearer {secrets[2]}")]
        assert (await call(it.service.port, "POST", PATH, keyed)).status == 200
        for secret in secrets[:2]:
            assert await it.outcome(secret) == "200"
        stored = await everything_stored(it.service)
        assert id_of(made) in stored and made.body["key"][:16] in stored, "it does read the tables"
        for secret in secrets:
            for form in (secret, secret.rpartition("_")[2], base64.b64encode(secret.encode()).decode()):
                assert form not in stored
        assert secrets[2].split(".")[2] not in stored, "nor a token's signature"


async def test_defect_35_what_is_stored_is_no_key_in_any_form(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        secret = made.body["key"]
        digest = hashlib.sha256(secret.encode()).digest()
        forms = (
            digest.hex(),
            base64.b64encode(digest).decode(),
            base64.b64encode(secret.encode()).decode(),
            f"{secret[:16]}{digest.hex()[:40]}",
        )
        for form in forms:
            assert await it.outcome(form) == "UNAUTHORIZED"
        plain = base64.b64encode(secret.encode())
        with pytest.raises(StoreRefused):
            await it.service.database.execute("UPDATE api_keys SET key_hash = $1", plain)


async def test_defect_38_without_a_key_nobody_learns_which_apis_exist(database_url: str) -> None:
    async with key_shop(database_url) as it:
        unknown = make_key("testnet", bytes(RANDOM_BYTES))
        for headers in ([], [("X-Api-Key", unknown)], [("X-Api-Key", "x")], [("Authorization", "Bearer a.b.c")]):
            told = [
                (answer.status, answer.json()["code"], answer.json()["message"])
                for answer in [
                    await call(it.service.port, "GET", path, headers) for path in (PATH, "/v1/call/no-such-api/x")
                ]
            ]
            assert told[0] == told[1]
            assert told[0][0] == 401
