"""Every route against everyone who may ask: generated from the OpenAPI document, and shown in docs/routes.md."""

import hashlib
import itertools
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import trio

from tests.support.chain_service import sandbox_settings
from tests.support.rest import ADMIN_KEY, SERVICE_TOKEN, Person, Told, admin, anonymous, biller, rest_client
from tests.support.service import GENEROUS, RunningService, running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.wallets import Session, Wallet, bearer

TABLE: Final = Path(__file__).parents[2] / "docs" / "routes.md"
ASKERS: Final = ("anonymous", "API key", "call token", "refresh token", "other user", "operator", "service", "owner")
ENVIRON: Final = {
    **GENEROUS,
    "ADMIN_API_KEY": ADMIN_KEY,
    "JWT_SECRET": "a secret of the tests, long enough for it",
    "AUTH_SIGNING_SEED": "SAKICEVQLYWGSOJS4WW7HZJWAHZVEEBS527LHK5V4MLJALYKICQCJXMW",
    "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "LOGIN_RATE_LIMIT_MAX_REQUESTS": "1000000",
    "INTERNAL_SERVICE_TOKEN": SERVICE_TOKEN,
    "EXPORTER_TOKEN_MATRIX": "x",
    "COLLECT_INTERVAL": "24h",
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
            "set_key_limit": {"amount": "1000"},
            "set_vault_limit": {"amount": "1000"},
            "set_balance_alert": {"threshold": "1"},
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
            "check_key": {"key": "ck_test_"},
            "place_hold": {**deduct, "apiKeyId": self.places["keyId"]},
            "capture_hold": {"transactionId": f"transaction-{number}"},
            "extend_hold": {"seconds": 1},
            "release_hold_request": {"requestId": f"hold-{number}", "apiKeyId": self.places["keyId"]},
            "refund_transaction": {"reason": "because"},
            "set_standing": {"network": "testnet", "standing": "active", "reason": "because"},
            "prepare_deposit": {"amount_usdc": "1"},
            "submit_deposit": {"signed_xdr": "AAAA"},
            "build_deposit": {
                "sourcePublicKey": Wallet().address,
                "vaultPublicKey": self.places["contractId"],
                "amount": "1",
            },
            "withdraw": {"amount_usdc": "1"},
            "prepare_developer_withdrawal": {"amount_usdc": "1"},
            "submit_developer_withdrawal": {"signed_xdr": "AAAA"},
            "clear_discrepancy": {"reason": "because"},
            "begin_chain_epoch": {"epoch": 99, "reason": "because"},
            "resume_settlement": {"reason": "because"},
            "close_gap": {"epoch": 1, "firstLedger": 1, "moved_usdc": "0", "reason": "because"},
            "assign_suspense": {
                "epoch": 1,
                "eventId": f"{0:019d}-{0:010d}",
                "userId": self.places["userId"],
                "reason": "because",
            },
            "admit_depositor": {"address": self.places["address"]},
            "refuse_depositor": {"address": self.places["address"], "reason": "because"},
            "pay_withdrawal": {},
            "refuse_withdrawal": {"reason": "because"},
            "open_dispute": {"usage_event_id": self.places["disputableId"], "reason": "because"},
            "resolve_dispute": {"resolution": "REFUNDED"},
            "set_plan": {"name": "Plan", "priceUsdc": "0.02", "monthlyCredits": 10, "overage": "deny"},
            "subscribe": {"planId": self.places["planId"]},
            "request_quota": {"credits": 10, "reason": "because of more calls"},
            "set_vault_plan": {"planId": "pro"},
            "grant_quota": {
                "credits": 10,
                "expiresAt": "2030-01-01",
                "source": "promo",
                "ref": f"grant-{number}",
            },
            "approve_quota_request": {},
            "reject_quota_request": {},
            "add_meter_source": {**_SOURCE, "source_id": f"new-{number}", "expected_node_id": f"new-{number}"},
            "change_meter_source": {"region": "eu"},
            "ingest_snapshots": {
                "node_id": "node",
                "env": "prod",
                "collected_at": "2026-11-01T00:00:00Z",
                "samples": [],
            },
            "create_counter_account": {
                "vaultId": self.places["vaultId"],
                "subject": f"00000000-0000-4000-9000-{number:012x}",
            },
            "change_counter_account": {"name": "Changed"},
            "add_included_units": {"units": 1},
            "trip_breaker": {"reason": "because"},
            "reset_breaker": {"reason": "because"},
            "register_webhook": {"url": self.base_url, "events": ["settlement_completed"]},
            "change_webhook": {"description": "Changed"},
        }
        return bodies[operation_id.removesuffix("_alias")]


_SOURCE: Final = {
    "base_url": "http://localhost:1",
    "expected_env": "prod",
    "credential_env": "EXPORTER_TOKEN_MATRIX",
    "enabled": False,
}

_QUERIES: Final[dict[str, dict[str, str | int]]] = {
    "get_web_auth_challenge": {"account": Wallet().address},
    "get_wallet_challenge": {"walletAddress": Wallet().address},
    "get_developer_analytics": {"from": "2026-11-01", "to": "2026-11-30"},
}
_OPEN_TO_OTHERS: Final = frozenset(("create_api_key", "get_wallet_balances", "set_vault_limit", "remove_vault_limit"))
"""Operations of a person on what is somebody else's and public, or whose path names nothing of the owner's."""

_OF_THE_OWNERS: Final = frozenset(("open_dispute",))
"""Operations whose body, and not their path, names something of the owner's."""


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
    source = {**_SOURCE, "source_id": f"source-{number}", "expected_node_id": f"node-{number}"}
    await done(admin(client).ask("POST", "/api/admin/meter-sources", source))
    places = {
        "sourceId": source["source_id"],
        "apiId": str(made.body["id"]),
        "endpointId": str(made.body["endpoints"][0]["id"]),
        "keyId": key_id,
        "period": "year",
        "tokenId": token.body["tokenId"],
        "sessionId": sessions.body["data"][0]["id"],
        "requestId": f"first-{number}",
        "userId": owner.user_id,
        "key": str(made.body["id"]),
        **await money_on_its_way(service, owner),
        **await plans_and_credits(client, owner, key.body["apiKey"]["vaultId"], number),
        **await given_up(service, owner, base_url),
    }
    deduct = {
        "requestId": places["requestId"],
        "apiId": made.body["id"],
        "endpointId": made.body["endpoints"][0]["id"],
        "amountUsdc": "0.02",
    }
    for name in ("eventId", "disputableId", "disputedId"):
        charge = {**deduct, "requestId": deduct["requestId"] if name == "eventId" else f"{name}-{number}"}
        places[name] = (await done(owner.person.ask("POST", "/api/billing/deduct", charge))).body["usageEventId"]
    dispute = {"usage_event_id": places["disputedId"], "reason": "because"}
    places["disputeId"] = (await done(owner.person.ask("POST", "/api/billing/disputes", dispute))).body["id"]
    held = {**deduct, "apiKeyId": key_id, "amountUsdc": "0.01"}
    names: list[str] = []
    for name in ("captured", "held"):
        body = {**held, "requestId": f"{name}-{number}"}
        names.append((await done(biller(client).ask("POST", "/api/billing/holds", body))).body["holdId"])
    places |= {"transactionId": f"transaction-of-{number}", "holdId": names[1]}
    charged = {"transactionId": places["transactionId"]}
    await done(biller(client).ask("POST", f"/api/billing/holds/{names[0]}/capture", charged))
    called = await client.get(f"/v1/call/{made.body['slug']}/x", headers={"X-Api-Key": key.body["key"]})
    assert called.status_code == 200, called.text
    askers = {
        "anonymous": anonymous(client),
        "API key": bearer(client, key.body["key"]),
        "call token": bearer(client, token.body["token"]),
        "refresh token": bearer(client, owner.refresh_token),
        "other user": other.person,
        "operator": admin(client),
        "service": biller(client),
        "owner": owner.person,
    }
    return World(askers, owner, places, base_url)


async def plans_and_credits(client: httpx.AsyncClient, owner: Session, vault_id: str, number: int) -> dict[str, str]:
    """Give someone a subscription, a dearer plan to ask for, and an undecided request; return their names."""
    plan = {"name": "Plan", "monthlyCredits": 10, "overage": "deny"}
    for name, price in (("small", "0.01"), ("large", "0.02")):
        await done(admin(client).ask("PUT", f"/api/admin/plans/{name}-{number}", {**plan, "priceUsdc": price}))
    made = await done(owner.person.ask("POST", "/api/subscriptions", {"planId": f"small-{number}"}))
    body = {"credits": 10, "reason": "because of more calls"}
    asked = await done(owner.person.ask("POST", "/api/quotas/requests", body))
    subject = f"00000000-0000-4000-8000-{number:012x}"
    counted = await done(
        admin(client).ask("POST", "/api/admin/counter-accounts", {"vaultId": vault_id, "subject": subject})
    )
    return {
        "accountId": counted.body["id"],
        "subject": subject,
        "vaultId": vault_id,
        "planId": f"large-{number}",
        "subscriptionId": made.body["id"],
        "quotaRequestId": asked.body["id"],
    }


async def given_up(service: RunningService, owner: Session, url: str) -> dict[str, str]:
    """Give someone a webhook with a delivery that was given up; return their names."""
    made = await done(owner.person.ask("POST", "/api/webhooks", {"url": url, "events": ["settlement_completed"]}))
    event_id, delivery_id, now = service.context.ids.uuid7(), service.context.ids.uuid7(), service.context.clock.now()
    await service.database.execute(
        "INSERT INTO outbox (event_id, type, subject, payload, created_at)"
        " VALUES ($1::uuid, 'settlement_completed', $1::uuid::text, '{}', $2)",
        event_id,
        now,
    )
    await service.database.execute(
        "INSERT INTO webhook_deliveries (delivery_id, endpoint_id, event_id, lane, state, created_at, closed_at)"
        " VALUES ($1, $2, $3, 'lane', 'dead', $4, $4)",
        delivery_id,
        made.body["id"],
        event_id,
        now,
    )
    return {"webhookId": made.body["id"], "deliveryId": delivery_id}


async def money_on_its_way(service: RunningService, owner: Session) -> dict[str, str]:
    """Give someone a prepared deposit, a debited withdrawal and an address that he asked for; return their names."""
    ids, now, database = service.context.ids, service.context.clock.now(), service.database
    row = await database.fetch_row(
        "SELECT v.vault_id, u.wallet_address FROM vaults v JOIN users u USING (user_id) WHERE v.user_id = $1",
        owner.user_id,
    )
    assert row is not None
    tx_hash, withdrawal_id = hashlib.sha256(ids.uuid7().encode()).digest(), ids.uuid7()
    vault_id, address = row["vault_id"], row["wallet_address"]
    await database.execute(
        "INSERT INTO deposit_intents (tx_hash, network, epoch, vault_id, address, amount, envelope, fee,"
        " prepared_ledger, prepared_at, expires_at, updated_at)"
        " VALUES ($1, 'testnet', 1, $2, $3, 1, 'AAAA', 100, 1, $4, $5, $4)",
        tx_hash,
        vault_id,
        address,
        now,
        now + timedelta(days=1),
    )
    await database.execute(
        "INSERT INTO withdrawals (withdrawal_id, network, epoch, vault_id, address, amount, state, asked_at,"
        " updated_at)"
        " VALUES ($1, 'testnet', 1, $2, $3, 1, 'debited', $4, $4)",
        withdrawal_id,
        vault_id,
        address,
        now,
    )
    await database.execute(
        "INSERT INTO depositors (network, epoch, address, user_id, state, asked_at)"
        " VALUES ('testnet', 1, $1, $2, 'asked', $3)",
        address,
        owner.user_id,
        now,
    )
    invoice_id = ids.uuid7()
    await database.execute(
        "INSERT INTO invoices (invoice_id, vault_id, month, calls, usage, refunded, subscriptions, issued_at)"
        " VALUES ($1, $2, '2026-10-01', 1, 1, 0, 0, $3)",
        invoice_id,
        vault_id,
        now,
    )
    contract_id = str(service.context.settings.vault_contract_id)
    names = await earnings_on_their_way(service, owner, tx_hash, address)
    return {
        **names,
        "hash": tx_hash.hex(),
        "withdrawalId": withdrawal_id,
        "invoiceId": invoice_id,
        "address": address,
        "contractId": contract_id,
    }


async def earnings_on_their_way(
    service: RunningService, owner: Session, tx_hash: bytes, address: str
) -> dict[str, str]:
    """Give a developer a settlement and a prepared withdrawal, and the operators a discrepancy; return their names."""
    ids, now, database = service.context.ids, service.context.clock.now(), service.database
    settlement_id, discrepancy_id = ids.uuid7(), ids.uuid7()
    developer_id = await database.fetch_value("SELECT developer_id FROM developers WHERE user_id = $1", owner.user_id)
    await database.execute(
        "INSERT INTO developer_withdrawals (developer_id, tx_hash, network, epoch, address, amount, envelope, fee,"
        " prepared_ledger, prepared_at, expires_at, updated_at)"
        " VALUES ($1, $2, 'testnet', 1, $3, 1, 'AAAA', 100, 1, $4, $5, $4)",
        developer_id,
        tx_hash,
        address,
        now,
        now + timedelta(days=1),
    )
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(
            "INSERT INTO settlements (settlement_id, network, epoch, state, items, charge_total, credit_total, failure,"
            " opened_at, moved_at, ended_at) VALUES ($1, 'testnet', 1, 'failed', 1, 2, 1, 'because', $2, $2, $2)",
            settlement_id,
            now,
        )
        await connection.execute(
            "INSERT INTO settlement_items (settlement_id, position, network, developer_id, address, from_pass, to_pass,"
            " gross, fee, credit, request_id) VALUES ($1, 1, 'testnet', $2, $3, 0, 1, 2, 1, 1, $4)",
            settlement_id,
            developer_id,
            address,
            settlement_id.replace("-", ""),
        )
    await database.execute(
        "INSERT INTO discrepancies (discrepancy_id, network, kind, subject, difference, said, found_at, seen_at)"
        " VALUES ($1::uuid, 'testnet', 'DRIFT', $1::uuid::text, 1, 'something', $2, $2)",
        discrepancy_id,
        now,
    )
    return {"settlementId": settlement_id, "discrepancyId": discrepancy_id}


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
    if "serviceToken" in schemes:
        return None if asker == "service" else 401
    if asker in ("anonymous", "API key", "call token", "refresh token", "service"):
        return 401
    if "adminKey" in schemes:
        return None if asker == "operator" else 403
    if asker == "operator":
        return 401
    name = operation["operationId"]
    owned = ("{" in path and name not in _OPEN_TO_OTHERS) or name in _OF_THE_OWNERS
    others = asker == "other user" and owned
    return 404 if others else None


async def test_every_route_answers_everyone_as_it_declares(database_url: str) -> None:
    rows: list[str] = []
    wrong: list[str] = []
    async with (
        # What it calls is no API in particular, and a meter source that has nothing to say.
        raw_upstream(respond(200, body=b"{}")) as upstream,
        sandbox_settings() as chain,
        running_service(database_url, {**ENVIRON, **chain, "EXPORTER_BASE_URL": upstream.url}) as service,
        rest_client(service) as client,
    ):
        while (await admin(client).ask("GET", "/api/admin/chain")).status != 200:  # noqa: ASYNC110
            await trio.sleep(0.05)  # until the listener has looked once
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
