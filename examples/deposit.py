"""A wallet with a key of its own deposits 25 USDC, and a paid call spends some of it.

    python examples/deposit.py URL HORIZON_URL USDC_ISSUER

The three are `url`, `sandbox.horizon_url` and `sandbox.usdc_issuer` of the line that `callora dev --json` prints:
Callora, and the ledger that stands in for Stellar. On a real network only `funded_wallet` differs: there the wallet has
its USDC already.
Needs `httpx` and `stellar-sdk`; nothing of Callora's own is imported.
"""

import sys
import time
from typing import Any

import httpx
from stellar_sdk import Asset, Keypair, Server, TransactionBuilder, TransactionEnvelope

API = "weather-api"


class Client:
    """Asks, waits where it is told to, and stops at any other answer that is no success."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)

    def ask(self, method: str, path: str, *, token: str | None = None, **sent: Any) -> httpx.Response:
        """Return the answer to one request."""
        headers = {**sent.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        answer = self.http.request(method, path, headers=headers, **sent)
        while answer.status_code == 503 and "Retry-After" in answer.headers:
            time.sleep(float(answer.headers["Retry-After"]))
            answer = self.http.request(method, path, headers=headers, **sent)
        if not answer.is_success:
            sys.exit(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer

    def log_in(self, wallet: Keypair) -> str:
        """Return the access token of a wallet, by SEP-10."""
        challenge = self.ask("GET", "/auth", params={"account": wallet.public_key}).json()
        envelope = TransactionEnvelope.from_xdr(challenge["transaction"], challenge["network_passphrase"])
        envelope.sign(wallet)
        return str(self.ask("POST", "/auth", json={"transaction": envelope.to_xdr()}).json()["token"])


def funded_wallet(horizon_url: str, usdc_issuer: str) -> Keypair:
    """Return a wallet with XLM, a trust line to the sandbox's USDC, and 100 of it."""
    wallet, horizon = Keypair.random(), Server(horizon_url)
    sandbox = Client(horizon_url)
    sandbox.ask("GET", "/friendbot", params={"addr": wallet.public_key})
    passphrase = sandbox.ask("GET", "/").json()["network_passphrase"]
    trust = TransactionBuilder(horizon.load_account(wallet.public_key), passphrase).set_timeout(60)
    envelope = trust.append_change_trust_op(Asset("USDC", usdc_issuer)).build()
    envelope.sign(wallet)
    horizon.submit_transaction(envelope)
    sandbox.ask("GET", "/faucet", params={"addr": wallet.public_key, "amount": "100"})
    return wallet


def main(url: str, horizon_url: str, usdc_issuer: str) -> None:
    """Walk through it."""
    wallet, client = funded_wallet(horizon_url, usdc_issuer), Client(url)
    token = client.log_in(wallet)
    client.ask("POST", "/api/vault", token=token, json={"network": "testnet"})
    has = client.ask("GET", f"/api/wallets/{wallet.public_key}/balances", token=token).json()
    print(f"the wallet has {has['balance_usdc']} USDC")

    prepared = client.ask("POST", "/api/vault/deposit/prepare", token=token, json={"amount_usdc": "25"}).json()
    envelope = TransactionEnvelope.from_xdr(prepared["xdr"], prepared["networkPassphrase"])
    envelope.sign(wallet)
    signed = {"signed_xdr": envelope.to_xdr()}
    deposit = client.ask("POST", "/api/vault/deposit/submit", token=token, json=signed).json()
    print(f"the deposit of {deposit['amount_usdc']} is {deposit['stage']}")
    while deposit["stage"] == "pending":
        time.sleep(0.5)
        deposit = client.ask("GET", f"/api/vault/deposits/{prepared['hash']}", token=token).json()
    balance = client.ask("GET", "/api/vault/balance", token=token).json()
    print(f"the deposit is {deposit['stage']} in ledger {deposit['ledger']}; the vault has {balance['balance_usdc']}")

    key = client.ask("POST", "/api/keys", token=token, json={"name": "first"}).json()["key"]
    called = client.ask("GET", f"/v1/call/{API}/current", headers={"X-Api-Key": key})
    print(f"a call cost {called.headers['X-Callora-Charge']} and left {called.headers['X-Callora-Balance']}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
