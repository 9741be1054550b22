"""A service is killed at random moments while wallets deposit and withdraw; in the end each did so exactly once."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from stellar_sdk import CreateAccount, Payment, TransactionEnvelope

from callora.sandbox import SandboxFacts
from callora.stellar.sandbox.genesis import Cast
from callora.stellar.sandbox.network import Sandbox
from tests.proof.books import assert_audit_clean, books
from tests.support.chain_service import BUMPER, CHANNELS, CLOSE_SECONDS, OWNER, LiveClock
from tests.support.processes import callora, free_port
from tests.support.sandbox import Person, Town, served
from tests.support.wallets import LOGIN, Wallet

USDC = 10_000_000
DEPOSITS = 3
"""Of each wallet, of 1 USDC each."""
PAUSE_SECONDS = 0.1


_ON_CHAIN = "SELECT on_chain FROM chain_reconciliations ORDER BY at DESC LIMIT 1"


class Customer:
    """Someone who deposits, asks again until he is answered, and then takes some of it out again."""

    def __init__(self, wallet: Wallet, url: str) -> None:
        self.wallet = wallet
        self.url = url
        self.token = ""
        self.done = 0

    async def ask(self, method: str, path: str, body: object = None, key: str | None = None) -> Any:
        """Return the answer to a request once there is one that a service stands by."""
        while True:
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            if key is not None:
                headers["Idempotency-Key"] = key
            try:
                response = await self._send(method, path, body, headers)
            except httpx.TransportError:
                await trio.sleep(PAUSE_SECONDS)
                continue
            if response.status_code < 500 and response.status_code != 409:
                assert response.status_code < 300, response.text
                return response.json()
            await trio.sleep(PAUSE_SECONDS)

    async def _send(self, method: str, path: str, body: object, headers: dict[str, str]) -> httpx.Response:
        # In a thread: what is cut while it sends leaves an asynchronous generator behind.
        send = partial(httpx.request, method, f"{self.url}{path}", json=body, headers=headers, timeout=30)
        return await trio.to_thread.run_sync(send)

    async def log_in(self) -> None:
        """Log in by a signed challenge."""
        challenge = await self.ask("GET", f"/auth?account={self.wallet.address}")
        signed = self.wallet.sign_transaction(challenge["transaction"], challenge["network_passphrase"])
        response = await self._send("POST", "/auth", {"transaction": signed}, {})
        assert response.status_code == 200, response.text
        self.token = response.json()["token"]

    async def bank(self) -> None:
        """Deposit, and withdraw half of a USDC each time."""
        await self.ask("POST", "/api/vault", {"network": "testnet"})
        for number in range(DEPOSITS):
            prepared = await self.ask("POST", "/api/vault/deposit/prepare", {"amount_usdc": "1"})
            envelope = TransactionEnvelope.from_xdr(prepared["xdr"], prepared["networkPassphrase"])
            envelope.sign(self.wallet.keypair)
            await self.ask("POST", "/api/vault/deposit/submit", {"signed_xdr": envelope.to_xdr()})
            while True:
                deposit = await self.ask("GET", f"/api/vault/deposits/{prepared['hash']}")
                assert deposit["stage"] != "failed", str(deposit)
                if deposit["stage"] == "confirmed":
                    break
                await trio.sleep(PAUSE_SECONDS)
            made = await self.ask("POST", "/api/vault/withdrawals", {"amount_usdc": "0.5"}, key=f"w-{number}")
            while made["state"] == "pending":
                await trio.sleep(PAUSE_SECONDS)
                made = await self.ask("GET", f"/api/vault/withdrawals/{made['id']}")
            assert made["state"] == "confirmed", made
            self.done += 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("customers", "kills"), [pytest.param(2, 3, marks=pytest.mark.proof), pytest.param(8, 40, marks=pytest.mark.proof)]
)
async def test_deposits_and_withdrawals_of_a_service_that_is_killed_are_each_made_once(
    database_url: str, tmp_path: Path, customers: int, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments, port, clock = random.Random(seed), free_port(), LiveClock()
    funded = tuple(each.public_key for each in (*CHANNELS, BUMPER))
    town = Town(Sandbox.make(clock, cast=Cast(owner=OWNER, funded=funded)), clock)
    people = [Customer(Wallet(), f"http://127.0.0.1:{port}") for _ in range(customers)]
    friendbot = Person(town, town.sandbox.places.friendbot)
    for each in people:
        town.applied(friendbot.transaction([CreateAccount(each.wallet.address, "1000")]))
        Person(town, each.wallet.keypair).trust(town.usdc)
        town.applied(town.issuer.transaction([Payment(each.wallet.address, town.usdc, "100")]))
    async with served(town, CLOSE_SECONDS) as url, trio.open_nursery() as nursery:
        environ = {
            **LOGIN,
            **SandboxFacts.at(url).settings(),
            "DATABASE_URL": database_url,
            "PORT": str(port),
            "CHANNEL_SEEDS": ",".join(each.secret for each in CHANNELS),
            "VAULT_OWNER_SEED": OWNER.secret,
            "FEE_BUMPER_SECRET_KEY": BUMPER.secret,
            "DEPOSIT_LISTENER_INTERVAL_MS": "50",
            "CHAIN_RECONCILIATION_INTERVAL_MS": "500",
            "REST_RATE_LIMIT_MAX_REQUESTS": "1000000",
            "LOGIN_RATE_LIMIT_MAX_REQUESTS": "1000000",
        }
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            async with trio.open_nursery() as logging_in:
                for each in people:
                    logging_in.start_soon(each.log_in)
            process.signal()
            assert await process.ended() == 0
        for each in people:
            nursery.start_soon(each.bank)
        for _ in range(kills):
            with callora("serve", environ=environ, log_directory=tmp_path) as process:
                await trio.sleep(moments.uniform(0.5, 4))
                process.kill()
                assert "Traceback" not in process.stderr, process.stderr
        with callora("serve", environ=environ, log_directory=tmp_path) as process:
            await process.until(lambda: not nursery.child_tasks, "everyone to be served", seconds=300)
            await people[0].ask("GET", "/livez")  # it may have had nothing left to do
            async with books(database_url) as database:
                with trio.fail_after(60):
                    while await database.fetch_value(_ON_CHAIN) != DEPOSITS * customers * USDC // 2:  # noqa: ASYNC110
                        await trio.sleep(PAUSE_SECONDS)
            process.signal()
            assert await process.ended() == 0
    assert [each.done for each in people] == [DEPOSITS] * customers
    async with books(database_url) as database:
        await assert_audit_clean(database)
        rows = await database.fetch("SELECT kind, count(*) AS count FROM chain_events GROUP BY 1")
        assert {row["kind"]: row["count"] for row in rows} == {
            "deposit": DEPOSITS * customers,
            "withdraw_to": DEPOSITS * customers,
        }
        balances = await database.fetch_value("SELECT sum(available)::bigint FROM vaults")
        last = await database.fetch_row("SELECT on_chain, drift FROM chain_reconciliations ORDER BY at DESC LIMIT 1")
        drifts = await database.fetch_value("SELECT count(*) FROM chain_reconciliations WHERE drift <> 0")
    assert balances == DEPOSITS * customers * USDC // 2
    assert last is not None and dict(last) == {"on_chain": balances, "drift": 0}
    assert drifts == 0, "at no moment"
    for each in people:
        assert Person(town, each.wallet.keypair).has(town.usdc) == 100 * USDC - DEPOSITS * USDC // 2
