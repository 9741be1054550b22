"""Deposits and withdrawals over REST, by wallets with keys of their own, on a sandbox ledger."""

import re
from typing import Final

import trio
from stellar_sdk import Keypair, TransactionEnvelope

from tests.support.chain_service import OWNER, chain_service
from tests.support.rest import Told, admin, person
from tests.support.sandbox import Person
from tests.support.upstream import raw_upstream, respond
from tests.support.wallets import Wallet, at_once, login_service

USDC = 10_000_000


async def test_a_wallet_deposits_and_a_paid_call_spends_it(database_url: str) -> None:
    async with chain_service(database_url) as at, raw_upstream(respond(200, body=b"x")) as upstream:
        await at.service.api("sold", upstream.url)
        someone = await at.funded("100")
        wallet = await someone.ask("GET", f"/api/wallets/{someone.wallet.address}/balances")
        assert wallet.body["balance_usdc"] == "100.0000000"
        before = Person(at.town, someone.wallet.keypair).xlm

        prepared = await someone.prepare("25.5")
        assert prepared.status == 200, prepared.body
        body = prepared.body
        assert body["amount"] == "25.5000000"
        assert body["contractId"] == at.town.sandbox.places.vault_contract
        assert body["operation"]["args"] == [
            {"type": "address", "value": someone.wallet.address},
            {"type": "i128", "value": "255000000"},
        ]
        assert body["sep7"].startswith("web+stellar:tx?xdr=")
        assert body["metadata"]["timeout"] == 300
        assert TransactionEnvelope.from_xdr(body["xdr"], body["networkPassphrase"]).hash_hex() == body["hash"]
        assert (await someone.ask("GET", f"/api/vault/deposits/{body['hash']}")).body["stage"] == "approving"

        submitted = await someone.submit(someone.sign(prepared))
        assert submitted.status == 200, submitted.body
        assert submitted.body["stage"] in ("pending", "confirmed")
        confirmed = await someone.stage(body["hash"], "confirmed")
        assert confirmed["ledger"] > 0
        assert await someone.balance() == "25.5000000"
        assert Person(at.town, someone.wallet.keypair).xlm == before, "its fee was paid by the sponsor"
        again = await someone.submit(someone.sign(prepared))
        assert (again.status, again.body["stage"]) == (200, "confirmed")

        key = (await someone.ask("POST", "/api/keys", {"name": "first"})).body["key"]
        called = await at.client.get("/v1/call/sold/x", headers={"X-Api-Key": key})
        assert called.status_code == 200
        assert called.headers["X-Callora-Balance"] == "25.4900000"
        balance = (await someone.ask("GET", "/api/vault/balance")).body
        assert balance["contractId"] == at.town.sandbox.places.vault_contract
        assert balance["lastSyncedAt"] is not None
        listed = (await someone.ask("GET", "/api/vault/deposits")).body["data"]
        assert [each["hash"] for each in listed] == [body["hash"]]


async def test_a_deposit_is_spoken_of_to_its_owner_alone(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone, other = await at.funded(), await at.funded()
        prepared = await someone.prepare()
        told = await other.ask("GET", f"/api/vault/deposits/{prepared.body['hash']}")
        assert (told.status, told.code) == (404, "DEPOSIT_NOT_FOUND")
        told = await other.submit(someone.sign(prepared))
        assert (told.status, told.code) == (404, "DEPOSIT_NOT_FOUND")
        told = await other.prepare(source_account=someone.wallet.address)
        assert (told.status, told.code) == (400, "INVALID_SOURCE_ACCOUNT")


async def test_only_what_was_prepared_comes_back_and_only_signed(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone = await at.funded()
        prepared = await someone.prepare()
        for wrong in (prepared.body["xdr"], "AAAA", "nonsense"):
            told = await someone.submit(wrong)
            assert (told.status, told.code) == (400, "INVALID_SIGNED_TRANSACTION"), wrong
        envelope = TransactionEnvelope.from_xdr(prepared.body["xdr"], prepared.body["networkPassphrase"])
        forged = TransactionEnvelope.from_xdr(prepared.body["xdr"], prepared.body["networkPassphrase"])
        forged.sign(someone.wallet.keypair)
        forged.signatures[0].signature = bytes(64)
        told = await someone.submit(forged.to_xdr())
        assert (told.status, told.code) == (400, "INVALID_SIGNED_TRANSACTION")
        envelope.transaction.fee += 1
        envelope.sign(someone.wallet.keypair)
        told = await someone.submit(envelope.to_xdr())
        assert (told.status, told.code) == (404, "DEPOSIT_NOT_FOUND")
        assert await someone.on_chain() == 100 * USDC


_WRONG: Final[tuple[tuple[dict[str, object], str], ...]] = (
    ({}, "MISSING_AMOUNT"),
    ({"amount_usdc": ""}, "MISSING_AMOUNT"),
    ({"amount_usdc": None, "network": "nowhere"}, "MISSING_AMOUNT"),
    ({"amount_usdc": 10, "network": "nowhere"}, "INVALID_AMOUNT_TYPE"),
    ({"amount_usdc": "1.12345678", "network": "nowhere"}, "INVALID_AMOUNT_FORMAT"),
    ({"amount_usdc": "0.0000000"}, "INVALID_AMOUNT_FORMAT"),
    ({"amount_usdc": "-1"}, "INVALID_AMOUNT_FORMAT"),
    ({"amount_usdc": "1e3"}, "INVALID_AMOUNT_FORMAT"),
    ({"amount_usdc": "1000000000.0000001"}, "INVALID_AMOUNT_FORMAT"),
    ({"amount_usdc": "1", "network": "nowhere", "source_account": "x"}, "INVALID_NETWORK"),
    ({"amount_usdc": "1", "network": 7}, "INVALID_NETWORK"),
    ({"amount_usdc": "1", "network": "mainnet", "source_account": "x"}, "NETWORK_MISMATCH"),
    ({"amount_usdc": "1", "source_account": "x"}, "INVALID_SOURCE_ACCOUNT"),
    ({"amount_usdc": "1", "source_account": "G" + "A" * 55}, "INVALID_SOURCE_ACCOUNT"),
    ({"amount_usdc": "1"}, "COMPONENT_NOT_CONFIGURED"),
)


async def test_what_is_wrong_with_a_deposit_is_told_in_order(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        someone = await person(service, client)
        for body, code in _WRONG:
            told = await someone.ask("POST", "/api/vault/deposit/prepare", body)
            assert told.code == code, body
            assert told.status == (503 if code == "COMPONENT_NOT_CONFIGURED" else 400)


async def test_a_deposit_needs_a_vault_an_account_and_the_money(database_url: str) -> None:
    async with chain_service(database_url) as at:
        stranger = await Wallet().log_in(at.client)
        told = await stranger.person.ask("POST", "/api/vault/deposit/prepare", {"amount_usdc": "1"})
        assert (told.status, told.code) == (404, "VAULT_NOT_FOUND")
        await stranger.person.ask("POST", "/api/vault", {"network": "testnet"})
        told = await stranger.person.ask("POST", "/api/vault/deposit/prepare", {"amount_usdc": "1"})
        assert (told.status, told.code) == (400, "SOURCE_ACCOUNT_NOT_FOUND")
        someone = await at.funded("10")
        told = await someone.prepare("10.0000001")
        assert (told.status, told.code) == (409, "WALLET_BALANCE_INSUFFICIENT")
        assert told.body["details"] == {"required": "10.0000001", "available": "10.0000000"}
        nobody = await person(at.service, at.client)
        await nobody.ask("POST", "/api/vault", {"network": "testnet"})
        told = await nobody.ask("POST", "/api/vault/deposit/prepare", {"amount_usdc": "1"})
        assert (told.status, told.code) == (400, "INVALID_SOURCE_ACCOUNT")


async def test_users_who_prepare_the_same_deposit_get_different_transactions_and_each_his_own_back(
    database_url: str,
) -> None:
    async with chain_service(database_url) as at:
        wallet = Wallet()
        at.fund(wallet)
        users = [await person(at.service, at.client) for _ in range(6)]
        for user in users:
            assert (await user.ask("POST", "/api/vault", {"network": "testnet"})).status == 201
        body = {"amount_usdc": "5", "source_account": wallet.address}
        await at.until(
            lambda: users[0].ask("POST", "/api/vault/deposit/prepare", body), lambda told: told.status == 200
        )

        async def ask(number: int) -> Told:
            return await users[number % len(users)].ask("POST", "/api/vault/deposit/prepare", body)

        answers = await at_once(12, ask)
        assert {each.status for each in answers} == {200}, [each.body for each in answers]
        rows = await at.service.database.fetch(
            "SELECT encode(tx_hash, 'hex') AS hash, vault_id::text AS vault FROM deposit_intents"
        )
        owners = {row["hash"]: row["vault"] for row in rows}
        assert len(set(owners.values())) == len(users)
        assert {each.body["hash"] for each in answers} <= set(owners)


async def test_deposits_under_way_are_limited(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone = await at.funded()
        assert (await someone.prepare("1")).status == 200

        async def ask(number: int) -> Told:
            body = {"amount_usdc": f"1.{number + 1:02d}"}
            return await someone.ask("POST", "/api/vault/deposit/prepare", body)

        answers = await at_once(20, ask)
        refused = [each for each in answers if each.status == 429]
        assert {each.code for each in refused} == {"TOO_MANY_OPEN_DEPOSITS"}
        assert all(1 <= int(each.headers["Retry-After"]) <= 300 for each in refused)
        assert len(answers) - len(refused) == 9
        assert int(await at.service.database.fetch_value("SELECT count(*) FROM deposit_intents")) == 10


async def test_without_the_owners_key_an_operator_admits_by_a_transaction_signed_elsewhere(database_url: str) -> None:
    async with chain_service(database_url, owner=False) as at:
        someone, operator = await at.funded(), admin(at.client)
        told = await someone.prepare()
        assert (told.status, told.code, told.headers["Retry-After"]) == (409, "DEPOSITOR_NOT_ADMITTED", "60")
        (waiting,) = (await operator.ask("GET", "/api/admin/depositors", query={"state": "asked"})).body["data"]
        assert waiting["address"] == someone.wallet.address
        asked = {"address": someone.wallet.address}
        offered = await operator.ask("POST", "/api/admin/depositors/admit", asked)
        assert (offered.status, offered.body["state"]) == (200, "to_sign"), offered.body
        assert (await operator.ask("POST", "/api/admin/depositors/admit", asked)).body == offered.body
        told = await operator.ask("POST", "/api/admin/depositors/admit", {**asked, "signed_xdr": offered.body["xdr"]})
        assert (told.status, told.code) == (400, "INVALID_SIGNED_TRANSACTION")
        envelope = TransactionEnvelope.from_xdr(offered.body["xdr"], at.town.passphrase)
        envelope.sign(OWNER)
        told = await operator.ask("POST", "/api/admin/depositors/admit", {**asked, "signed_xdr": envelope.to_xdr()})
        assert told.body["state"] == "sent", told.body
        await at.until(lambda: someone.prepare(), lambda told: told.status == 200)
        assert (await someone.deposit("3"))["stage"] == "confirmed"


async def test_an_address_that_the_operator_refuses_stays_out(database_url: str) -> None:
    async with chain_service(database_url, owner=False) as at:
        someone, operator = await at.funded(), admin(at.client)
        await someone.prepare()
        refusal = {"address": someone.wallet.address, "reason": "sanctions"}
        assert (await operator.ask("POST", "/api/admin/depositors/refuse", refusal)).status == 200
        assert (await operator.ask("POST", "/api/admin/depositors/refuse", refusal)).status == 409
        told = await someone.prepare()
        assert (told.status, told.code, told.body["details"]) == (403, "DEPOSITOR_REFUSED", {"reason": "sanctions"})


async def test_what_a_wallet_sent_before_its_owner_logged_in_is_claimed(database_url: str) -> None:
    async with chain_service(database_url) as at:
        wallet = Wallet()
        at.fund(wallet)
        helper = await person(at.service, at.client)
        await helper.ask("POST", "/api/vault", {"network": "testnet"})
        body = {"amount_usdc": "5", "source_account": wallet.address}
        prepared = await at.until(
            lambda: helper.ask("POST", "/api/vault/deposit/prepare", body), lambda told: told.status == 200
        )
        # The wallet signs another deposit than any that was prepared: with another bound.
        envelope = TransactionEnvelope.from_xdr(prepared.body["xdr"], prepared.body["networkPassphrase"])
        assert envelope.transaction.preconditions is not None
        assert envelope.transaction.preconditions.time_bounds is not None
        envelope.transaction.preconditions.time_bounds.max_time -= 1
        envelope.sign(wallet.keypair)
        assert at.town.submit(envelope).status == "PENDING"
        operator = admin(at.client)
        (waiting,) = (
            await at.until(
                lambda: operator.ask("GET", "/api/admin/chain/suspense"), lambda told: bool(told.body["data"])
            )
        ).body["data"]
        assert (waiting["address"], waiting["amount_usdc"]) == (wallet.address, "5.0000000")
        owner = (await wallet.log_in(at.client)).person
        told = await owner.ask("POST", "/api/vault/deposits/claim")
        assert told.body == {"claimed": 1, "amount_usdc": "5.0000000"}
        assert (await owner.ask("POST", "/api/vault/deposits/claim")).body["claimed"] == 0
        assert (await owner.ask("GET", "/api/vault/balance")).body["balance_usdc"] == "5.0000000"
        listed = (await owner.ask("GET", "/api/vault/deposits")).body["data"]
        assert [(each["stage"], each["expiresAt"]) for each in listed] == [("confirmed", None)]


async def test_the_older_shape_of_a_deposit_is_the_same_deposit(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone = await at.funded()
        await someone.prepare()
        body = {
            "sourcePublicKey": someone.wallet.address,
            "vaultPublicKey": at.town.sandbox.places.vault_contract,
            "amount": "2.5",
        }
        told = await someone.ask("POST", "/api/deposits/build", body)
        assert told.status == 200, told.body
        assert told.body["success"] is True
        envelope = TransactionEnvelope.from_xdr(told.body["transactionXdr"], at.town.passphrase)
        assert envelope.hash_hex() == told.body["hash"]
        for field, wrong in (("amount", "-1"), ("sourcePublicKey", "x"), ("vaultPublicKey", someone.wallet.address)):
            told = await someone.ask("POST", "/api/deposits/build", {**body, field: wrong})
            assert (told.status, told.wrong) == (400, [f"body.{field}"])


# Withdrawals


async def test_a_withdrawal_is_debited_paid_and_confirmed_once(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone = await at.funded("100")
        await someone.deposit("25")
        assert await someone.on_chain() == 75 * USDC

        async def ask(_: int) -> Told:
            headers = {"Idempotency-Key": "once"}
            return await someone.ask("POST", "/api/vault/withdrawals", {"amount_usdc": "10"}, headers=headers)

        answers = await at_once(5, ask)
        assert {each.status for each in answers} <= {202, 409}, [each.body for each in answers]
        told = await someone.ask("GET", "/api/vault/withdrawals")
        (made,) = told.body["data"]
        assert await someone.balance() == "15.0000000"
        paid = await at.until(
            lambda: someone.ask("GET", f"/api/vault/withdrawals/{made['id']}"),
            lambda told: told.body["state"] == "confirmed",
        )
        assert re.fullmatch(r"[0-9a-f]{64}", paid.body["hash"])
        assert await someone.on_chain() == 85 * USDC
        assert await someone.balance() == "15.0000000"
        other = await at.funded()
        assert (await other.ask("GET", f"/api/vault/withdrawals/{made['id']}")).status == 404


async def test_a_withdrawal_goes_to_the_proved_wallet_and_is_covered(database_url: str) -> None:
    async with chain_service(database_url) as at:
        someone = await at.funded("100")
        await someone.deposit("5")

        async def ask(body: dict[str, object], key: str) -> Told:
            headers = {"Idempotency-Key": key}
            return await someone.ask("POST", "/api/vault/withdrawals", body, headers=headers)

        told = await ask({"amount_usdc": "1", "address": Keypair.random().public_key}, "a")
        assert (told.status, told.code) == (409, "WALLET_NOT_PROVED")
        told = await ask({"amount_usdc": "5.0000001"}, "b")
        assert (told.status, told.code) == (402, "INSUFFICIENT_BALANCE")
        await someone.deposit("1")
        told = await ask({"amount_usdc": "5.0000001"}, "b")
        assert told.status == 202, "what was not debited may be tried again under its name"
        user = await person(at.service, at.client)
        await user.ask("POST", "/api/vault", {"network": "testnet"})
        told = await user.ask("POST", "/api/vault/withdrawals", {"amount_usdc": "1"}, headers={"Idempotency-Key": "a"})
        assert (told.status, told.code) == (409, "WALLET_NOT_PROVED")


async def test_a_withdrawal_that_the_contract_refuses_is_given_back_once(database_url: str) -> None:
    """Granted money has no counterpart on chain: the contract has not enough."""
    async with chain_service(database_url) as at:
        someone, operator = await at.funded("100"), admin(at.client)
        grant = {"userId": someone.session.user_id, "network": "testnet", "amountUsdc": "7", "reason": "welcome"}
        await operator.ask("POST", "/api/admin/billing/credits/grant", grant, headers={"Idempotency-Key": "g"})
        made = await someone.ask(
            "POST", "/api/vault/withdrawals", {"amount_usdc": "7"}, headers={"Idempotency-Key": "w"}
        )
        assert made.status == 202, made.body
        failed = await at.until(
            lambda: someone.ask("GET", f"/api/vault/withdrawals/{made.body['id']}"),
            lambda told: told.body["state"] == "failed",
        )
        assert failed.body["failure"] == "not paid: InsufficientBalance"
        assert await someone.balance() == "7.0000000"
        lines = (await someone.ask("GET", "/api/vault/statement")).body["data"]
        assert [(each["kind"], each["amount_usdc"]) for each in lines] == [
            ("adjustment", "7.0000000"),
            ("withdrawal", "-7.0000000"),
            ("grant", "7.0000000"),
        ]


async def test_without_the_owners_key_an_operator_pays_by_a_transaction_signed_elsewhere(database_url: str) -> None:
    async with chain_service(database_url, owner=False) as at:
        someone, operator = await at.funded("100"), admin(at.client)
        await someone.prepare()
        asked = {"address": someone.wallet.address}
        offered = await operator.ask("POST", "/api/admin/depositors/admit", asked)
        envelope = TransactionEnvelope.from_xdr(offered.body["xdr"], at.town.passphrase)
        envelope.sign(OWNER)
        await operator.ask("POST", "/api/admin/depositors/admit", {**asked, "signed_xdr": envelope.to_xdr()})
        await at.until(lambda: someone.prepare(), lambda told: told.status == 200)
        await someone.deposit("25")
        made = await someone.ask(
            "POST", "/api/vault/withdrawals", {"amount_usdc": "10"}, headers={"Idempotency-Key": "w"}
        )
        (waiting,) = (await operator.ask("GET", "/api/admin/withdrawals")).body["data"]
        assert waiting["id"] == made.body["id"]
        path = f"/api/admin/withdrawals/{made.body['id']}"
        offered = await operator.ask("POST", f"{path}/pay", {})
        assert offered.body["state"] == "to_sign", offered.body
        assert (await operator.ask("POST", f"{path}/pay", {})).body["hash"] == offered.body["hash"]
        told = await operator.ask("POST", f"{path}/refuse", {"reason": "changed my mind"})
        assert (told.status, told.code) == (409, "CONFLICT"), "what was handed out may be sent by anyone"
        envelope = TransactionEnvelope.from_xdr(offered.body["xdr"], at.town.passphrase)
        envelope.sign(OWNER)
        told = await operator.ask("POST", f"{path}/pay", {"signed_xdr": envelope.to_xdr()})
        assert told.body["state"] == "sent", told.body
        await at.until(
            lambda: someone.ask("GET", f"/api/vault/withdrawals/{made.body['id']}"),
            lambda told: told.body["state"] == "confirmed",
        )
        assert await someone.on_chain() == 85 * USDC
        # Another, which the operator does not want to pay.
        made = await someone.ask(
            "POST", "/api/vault/withdrawals", {"amount_usdc": "5"}, headers={"Idempotency-Key": "x"}
        )
        path = f"/api/admin/withdrawals/{made.body['id']}"
        assert (await operator.ask("POST", f"{path}/refuse", {"reason": "not now"})).status == 200
        assert (await operator.ask("POST", f"{path}/pay", {})).status == 409
        assert await someone.balance() == "15.0000000"


async def test_the_contract_and_the_ledger_are_compared_and_agree(database_url: str) -> None:
    async with chain_service(database_url, CHAIN_RECONCILIATION_INTERVAL_MS="200") as at:
        someone, operator = await at.funded("100"), admin(at.client)
        await someone.deposit("25")
        told = await at.until(
            lambda: operator.ask("GET", "/api/admin/chain"),
            lambda told: (
                told.status == 200 and (told.body["lastComparison"] or {}).get("on_chain_usdc") == "25.0000000"
            ),
        )
        assert told.body["lastComparison"]["drift_usdc"] == "0.0000000"
        assert told.body["settlementHalted"] is None
        # A made-up stroop is found, and stops settlement until an operator has looked.
        await at.service.database.execute("UPDATE vaults SET available = available + 1, version = version + 1")
        told = await at.until(
            lambda: operator.ask("GET", "/api/admin/chain"), lambda told: told.body["settlementHalted"] is not None
        )
        assert "-0.0000001" in told.body["settlementHalted"]
        await at.service.database.execute("UPDATE vaults SET available = available - 1, version = version + 1")
        with trio.fail_after(60):
            while True:
                lines = (await operator.ask("GET", "/api/admin/chain/reconciliations")).body["data"]
                if lines[0]["drift_usdc"] == "0.0000000":
                    break
        resumed = await operator.ask("POST", "/api/admin/chain/settlement/resume", {"reason": "explained"})
        assert resumed.status == 200


async def test_without_a_chain_deposits_answer_that_they_are_not_configured(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        someone = (await Wallet().log_in(client)).person
        await someone.ask("POST", "/api/vault", {"network": "testnet"})
        for method, path, body in (
            ("POST", "/api/vault/deposit/prepare", {"amount_usdc": "1"}),
            ("POST", "/api/vault/deposit/submit", {"signed_xdr": "AAAA"}),
            ("POST", "/api/vault/deposits/claim", None),
            ("GET", f"/api/wallets/{Wallet().address}/balances", None),
        ):
            told = await someone.ask(method, path, body)
            assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED"), path
        assert (await someone.ask("GET", "/api/vault/deposits")).body["data"] == []
        balance = (await someone.ask("GET", "/api/vault/balance")).body
        assert (balance["contractId"], balance["lastSyncedAt"]) == (None, None)
