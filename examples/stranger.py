"""A stranger's first quarter of an hour: publish an API, let a second wallet call it, and look at the figures.

    python examples/stranger.py URL UPSTREAM_URL ADMIN_KEY

URL, UPSTREAM_URL and ADMIN_KEY are `url`, `upstream_url` and `admin_api_key` of the line that `callora dev --json`
prints. Needs `httpx` and `stellar-sdk`; nothing of Callora's own is imported.
"""

import sys
from typing import Any

import httpx
from stellar_sdk import Keypair, TransactionEnvelope

DOCUMENT = {
    "openapi": "3.1.0",
    "info": {"title": "Tides", "version": "1", "description": "When the water comes and goes"},
    "paths": {
        "/current": {"get": {"summary": "The tide now", "responses": {"200": {"description": "The tide"}}}},
        "/reports/{city}": {
            "post": {
                "summary": "A report for a city",
                "parameters": [{"name": "city", "in": "path", "required": True, "schema": {"type": "string"}}],
                "responses": {"200": {"description": "The report"}},
            }
        },
    },
}


class Client:
    """Asks, counts, and stops at the first answer that is no success."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.requests = 0

    def ask(self, method: str, path: str, *, token: str | None = None, **sent: Any) -> httpx.Response:
        """Return the answer to one request."""
        headers = {**sent.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        self.requests += 1
        answer = self.http.request(method, path, headers=headers, **sent)
        if not answer.is_success:
            sys.exit(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer

    def log_in(self) -> str:
        """Return the access token of a fresh wallet, by SEP-10: sign the challenge, change nothing in it."""
        wallet = Keypair.random()
        challenge = self.ask("GET", "/auth", params={"account": wallet.public_key}).json()
        envelope = TransactionEnvelope.from_xdr(challenge["transaction"], challenge["network_passphrase"])
        envelope.sign(wallet)
        return str(self.ask("POST", "/auth", json={"transaction": envelope.to_xdr()}).json()["token"])


def main(url: str, upstream_url: str, admin_key: str) -> None:
    """Walk through it."""
    client = Client(url)

    developer = client.log_in()
    client.ask("PATCH", "/api/developers/me", token=developer, json={"name": "Tide Tables", "category": "data"})
    published = client.ask(
        "POST",
        "/api/apis/import/openapi",
        token=developer,
        json={
            "document": DOCUMENT,
            "base_url": upstream_url,
            "category": "weather",
            "prices": {
                "default": "0.01",
                "operations": [{"method": "POST", "path": "/reports/{city}", "price": "0.02"}],
            },
        },
    ).json()
    print(f"published {published['name']} as {published['slug']}")

    consumer = client.log_in()
    found = client.ask("GET", "/api/apis", params={"search": "Tides", "sort": "newest"}).json()["data"][0]
    client.ask("POST", "/api/vault", token=consumer, json={"network": "testnet"})
    user_id = client.ask("GET", "/api/billing/credits", token=consumer).json()["user_id"]
    client.ask(
        "POST",
        "/api/admin/billing/credits/grant",
        headers={"X-Admin-Api-Key": admin_key, "Idempotency-Key": f"welcome-{user_id}"},
        json={"userId": user_id, "network": "testnet", "amountUsdc": "1", "reason": "welcome"},
    )
    key = client.ask("POST", f"/api/apis/{found['id']}/keys", token=consumer, json={"name": "first"}).json()["key"]

    paid = {"X-Api-Key": key}
    first = client.ask("GET", f"/v1/call/{found['slug']}/current", headers=paid)
    client.ask("POST", f"/v1/call/{found['slug']}/reports/oslo", headers=paid, json={"days": 3})
    print(f"a call cost {first.headers['X-Callora-Charge']} and left {first.headers['X-Callora-Balance']}")

    balance = client.ask("GET", "/api/vault/balance", token=consumer).json()
    usage = client.ask("GET", "/api/usage", token=consumer).json()
    print(f"the consumer has {balance['balance_usdc']} left after {len(usage['events'])} calls")
    revenue = client.ask("GET", "/api/developers/revenue", token=developer).json()["summary"]
    print(f"the developer has earned {revenue['total_earned']}")
    print(f"{client.requests} requests")


if __name__ == "__main__":
    main(*sys.argv[1:4])
