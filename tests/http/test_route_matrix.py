"""Every route against everyone who may ask: generated from the OpenAPI document, and shown in docs/routes.md."""

import itertools
import re
from pathlib import Path
from typing import Any, Final

import attrs
import httpx

from tests.support.rest import ADMIN_KEY, Person, Told, admin, anonymous, rest_client
from tests.support.service import GENEROUS, RunningService, running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.wallets import Session, Wallet, bearer

TABLE: Final = Path(__file__).parents[2] / "docs" / "routes.md"
ASKERS: Final = ("anonymous", "API key", "call token", "refresh token", "other user", "operator", "owner")
ENVIRON: Final = {
    **GENEROUS,
    "ADMIN_API_KEY": ADMIN_KEY,
    "JWT_SECRET": "a secret of the tests, long enough for it",
    "AUTH_SIGNING_SEED": "SAKICEVQLYWGSOJS4WW7HZJWAHZVEEBS527LHK5V4MLJALYKICQCJXMW",
    "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "LOGIN_RATE_LIMIT_MAX_REQUESTS": "1000000",
}
_numbers = itertools.count(1)


@attrs.define
class World:
    """Someone with everything that a path can name, and everyone else who might ask for it."""

    askers: dict[str, Person]
    owner: Session
    places: dict[str, str]
    base_url: str

    def body(self, operation_id: str) -> object:
        """Return a body that fits an operation."""
        number = next(_numbers)
        endpoint = {"path": f"/more/{number}", "method": "GET", "price_per_call_usdc": "0.01"}
        api = {"name": f"Api {number}", "base_url": self.base_url, "endpoints": [endpoint]}
        deduct = {
            "requestId": f"order-{number}",
            "apiId": int(self.places["apiId"]),
            "endpointId": int(self.places["endpointId"]),
            "amountUsdc": "0.01",
        }
        document = {
            "openapi": "3.1.0",
            "info": {"title": f"Api {number}", "version": "1"},
            "paths": {"/x": {"get": {}}},
        }
        exported = {**api, "endpoints": [{"path": "/x", "method": "GET", "prices": [{"price_per_call_usdc": "0.01"}]}]}
        bodies: dict[str, object] = {
            "post_web_auth": {"transaction": "AAAA"},
            "log_in_with_wallet": {"walletAddress": Wallet().address, "signature": "AAAA", "message": "x"},
            "refresh_session": {"refreshToken": "x"},
            "revoke_session": {"refreshToken": "x"},
            "change_profile": {"name": "Somebody"},
            "register_api": api,
            "change_api": {"description": "Changed"},
            "put_endpoints": {"endpoints": [endpoint]},
            "change_endpoint": {"price_per_call_usdc": "0.03"},
            "import_openapi": {"document": document, "base_url": self.base_url, "prices": {"default": "0.01"}},
            "import_api": exported,
            "create_key": {"name": "Another"},
            "create_api_key": {"name": "Another"},
            "change_key": {"description": "Changed"},
            "regenerate_key": {},
            "create_token": {"ttl": 60},
            "open_vault": {"network": "mainnet"},
            "change_any_key": {"description": "Changed"},
            "deduct": deduct,
            "deduct_bulk": {"items": [deduct]},
            "refund_charge": {"usageEventId": self.places["eventId"], "reason": "because"},
            "grant_credits": {
                "userId": self.places["userId"],
                "network": "testnet",
                "amountUsdc": "0.01",
                "reason": "because",
            },
            "set_standing": {"network": "testnet", "standing": "active", "reason": "because"},
            "trip_breaker": {"reason": "because"},
            "reset_breaker": {"reason": "because"},
        }
        return bodies[operation_id.removesuffix("_alias")]


_QUERIES: Final[dict[str, dict[str, str | int]]] = {
    "get_web_auth_challenge": {"account": Wallet().address},
    "get_wallet_challenge": {"walletAddress": Wallet().address},
    "get_developer_analytics": {"from": "2026-11-01", "to": "2026-11-30"},
}
_OPEN_TO_OTHERS: Final = frozenset(("create_api_key",))
"""Operations of a person on what is somebody else's and public."""


async def world(service: RunningService, client: httpx.AsyncClient, base_url: str) -> World:
    """Make the owner, his things, and the others."""
    owner, other = await Wallet().log_in(client), await Wallet().log_in(client)
    number = next(_numbers)
    made = await done(
        owner.person.ask(
            "POST",
            "/api/apis",
            {
                "name": f"Owned {number}",
                "base_url": base_url,
                "endpoints": [{"path": "/x", "method": "GET", "price_per_call_usdc": "0.01"}],
            },
        )
    )
    key = await done(owner.person.ask("POST", "/api/keys", {"name": "first"}))
    key_id = key.body["apiKey"]["id"]
    token = await done(owner.person.ask("POST", f"/api/keys/{key_id}/tokens", {"ttl": 600}))
    grant = {"userId": owner.user_id, "network": "testnet", "amountUsdc": "5", "reason": "welcome"}
    for someone in (owner, other):
        await done(
            admin(client).ask(
                "POST",
                "/api/admin/billing/credits/grant",
                {**grant, "userId": someone.user_id},
                headers={"Idempotency-Key": f"welcome-{someone.user_id}"},
            )
        )
    await done(other.person.ask("GET", "/api/developers/me"))
    sessions = await done(owner.person.ask("GET", "/api/auth/sessions"))
    places = {
        "apiId": str(made.body["id"]),
        "endpointId": str(made.body["endpoints"][0]["id"]),
        "keyId": key_id,
        "tokenId": token.body["tokenId"],
        "sessionId": sessions.body["data"][0]["id"],
        "requestId": f"first-{number}",
        "userId": owner.user_id,
    }
    deduct = {
        "requestId": places["requestId"],
        "apiId": made.body["id"],
        "endpointId": made.body["endpoints"][0]["id"],
        "amountUsdc": "0.02",
    }
    places["eventId"] = (await done(owner.person.ask("POST", "/api/billing/deduct", deduct))).body["usageEventId"]
    called = await client.get(f"/v1/call/{made.body['slug']}/x", headers={"X-Api-Key": key.body["key"]})
    assert called.status_code == 200, called.text
    askers = {
        "anonymous": anonymous(client),
        "API key": bearer(client, key.body["key"]),
        "call token": bearer(client, token.body["token"]),
        "refresh token": bearer(client, owner.refresh_token),
        "other user": other.person,
        "operator": admin(client),
        "owner": owner.person,
    }
    return World(askers, owner, places, base_url)


async def done(asking: Any) -> Told:
    """Return an answer that is a success."""
    told: Told = await asking
    assert told.status < 300, told
    return told


async def ask(at: World, method: str, path: str, operation: dict[str, Any], asker: str) -> int:
    """Return the status that someone gets who sends a request that fits."""
    filled = re.sub(r"\{(\w+)\}", lambda match: at.places[match[1]], path)
    body = at.body(operation["operationId"]) if "requestBody" in operation else None
    headers = {"Idempotency-Key": f"key-{next(_numbers)}"} if _keyed(operation) else {}
    query = _QUERIES.get(operation["operationId"].removesuffix("_alias"))
    return (await at.askers[asker].ask(method.upper(), filled, body, query=query, headers=headers)).status


def _keyed(operation: dict[str, Any]) -> bool:
    return any(each["name"] == "Idempotency-Key" for each in operation["parameters"])


def expected(operation: dict[str, Any], path: str, asker: str) -> int | None:
    """Return the status that a route's declaration promises someone; None: any success."""
    schemes = {name for scheme in operation["security"] for name in scheme}
    if not schemes:
        return None
    if asker in ("anonymous", "API key", "call token", "refresh token"):
        return 401
    if "adminKey" in schemes:
        return None if asker == "operator" else 403
    if asker == "operator":
        return 401
    others = asker == "other user" and "{" in path and operation["operationId"] not in _OPEN_TO_OTHERS
    return 404 if others else None


async def test_every_route_answers_everyone_as_it_declares(database_url: str) -> None:
    rows: list[str] = []
    wrong: list[str] = []
    async with (
        raw_upstream(respond(200, body=b"x")) as upstream,
        running_service(database_url, ENVIRON) as service,
        rest_client(service) as client,
    ):
        document = (await client.get("/api/openapi.json")).json()
        shared = await world(service, client, upstream.url)
        for path, item in document["paths"].items():
            for method, operation in item.items():
                # What names somebody's things may also end them.
                ends = "{" in path or operation["operationId"] == "revoke_all_sessions"
                at = await world(service, client, upstream.url) if ends else shared
                told = {asker: await ask(at, method, path, operation, asker) for asker in ASKERS}
                for asker, status in told.items():
                    promise = expected(operation, path, asker)
                    refused = status in (401, 403, 404) and operation["security"]
                    if status != promise if promise is not None else (status >= 500 or refused):
                        wrong.append(f"{method.upper()} {path}: {asker} got {status}, not {promise or 'a success'}")
                rows.append(f"| `{method.upper()} {path}` | {' | '.join(str(told[asker]) for asker in ASKERS)} |")
    assert not wrong, "\n".join(wrong)
    shown = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert shown == rows, "docs/routes.md must show:\n" + "\n".join(rows)


async def test_no_answer_that_is_kept_for_a_repetition_holds_a_secret(database_url: str) -> None:
    """What an Idempotency-Key gives again is stored as it was given."""
    secrets = {"key", "token", "accessToken", "refreshToken", "secret"}
    async with running_service(database_url, ENVIRON) as service, rest_client(service) as client:
        document = (await client.get("/api/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def names(node: Any) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(names, node))
        if not isinstance(node, dict):
            return set()
        referred = names(schemas[node["$ref"].rpartition("/")[2]]) if "$ref" in node else set()
        return set(node.get("properties", ())) | referred | names(list(node.values()))

    kept: dict[str, set[str]] = {}
    open_: dict[str, set[str]] = {}
    for item in document["paths"].values():
        for operation in item.values():
            shown = names([answer for status, answer in operation["responses"].items() if int(status) < 400])
            (kept if _keyed(operation) else open_)[operation["operationId"]] = shown & secrets
    assert len(kept) >= 4
    assert not {name: found for name, found in kept.items() if found}
    assert open_["create_key"] == {"key"}, "the search finds what there is"
