"""Logging in with a wallet: real keys, real sockets, a real database."""

import base64
import tomllib

from stellar_sdk import Network, TransactionEnvelope

from tests.support.rest import anonymous, rest_client
from tests.support.service import running_service
from tests.support.wallets import (
    SECRET,
    SEED,
    SIGNING_KEY,
    Wallet,
    alive,
    ask_challenge,
    at_once,
    bearer,
    count,
    login_service,
    post_challenge,
    refresh,
    session,
    signed_challenge,
)

# --- by a signed message ----------------------------------------------------------------------------------------------


async def test_defect_37_a_wallet_logs_in_and_is_let_in(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        told = await anonymous(client).ask("GET", "/api/auth/challenge", query={"walletAddress": wallet.address})
        assert set(told.body) == {"message", "nonce", "expiresAt"}
        message = told.body["message"]
        assert message.isascii()
        assert message.startswith("callora.test asks you to log in to Callora")
        assert wallet.address in message.splitlines()
        assert f"Nonce: {told.body['nonce']}" in message.splitlines()
        told = await wallet.answer(client, message)
        assert told.status == 200
        assert set(told.body) == {"accessToken", "refreshToken", "tokenType", "expiresIn", "user"}
        assert (told.body["tokenType"], told.body["expiresIn"]) == ("Bearer", 900)
        assert told.body["user"]["walletAddress"] == wallet.address
        row = await service.database.fetch_row("SELECT user_id, wallet_address FROM users")
        assert row is not None
        assert (str(row["user_id"]), row["wallet_address"]) == (told.body["user"]["id"], wallet.address)
        assert await alive(bearer(client, told.body["accessToken"]))
        again = await wallet.log_in(client)
        assert again.user_id == told.body["user"]["id"], "the second login is of the same user"
        assert await count(service, "users") == 1


async def test_a_signature_in_hexadecimal_digits_counts_as_well(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        message = await wallet.message(client)
        signature = wallet.keypair.sign_message(message).hex()
        assert (await wallet.answer(client, message, signature=signature)).status == 200


async def test_a_message_gives_one_login_also_to_parallel_ones(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        message = await wallet.message(client)
        answers = await at_once(8, lambda _: wallet.answer(client, message))
        assert sorted(told.status for told in answers) == [200] + [401] * 7
        assert {told.code for told in answers if told.status == 401} == {"INVALID_CHALLENGE"}
        assert await count(service, "sessions") == 1


async def test_parallel_first_logins_of_a_wallet_make_one_user(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        messages = [await wallet.message(client) for _ in range(8)]
        answers = await at_once(8, lambda number: wallet.answer(client, messages[number]))
        assert [told.status for told in answers] == [200] * 8
        assert len({told.body["user"]["id"] for told in answers}) == 1
        assert (await count(service, "users"), await count(service, "sessions")) == (1, 8)


async def test_what_was_not_signed_as_given_is_refused_and_uses_nothing_up(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet, other = Wallet(), Wallet()
        message = await wallet.message(client)
        raw = wallet.keypair.sign_message(message)
        refused = {
            "another wallet's signature": {"signature": other.sign(message)},
            "one of the bare message": {"signature": base64.b64encode(wallet.keypair.sign(message.encode())).decode()},
            "one of another message": {"signature": wallet.sign(message + " ")},
            "a changed message": {"message": message + "\n"},
            "a short one": {"signature": base64.b64encode(raw[:-1]).decode()},
            "a long one": {"signature": base64.b64encode(raw + b"\0").decode()},
            "no base64": {"signature": "*" * 88},
            "letters beyond ASCII": {"signature": "é" * 88},
            "zeroes": {"signature": "0" * 128},
        }
        for what, changed in refused.items():
            told = await wallet.answer(client, message, **changed)
            assert (told.status, told.code) == (401, "INVALID_SIGNATURE"), what
            assert told.headers["WWW-Authenticate"] == "Bearer"
        told = await other.answer(client, message)
        assert told.code == "INVALID_CHALLENGE", "a message for another wallet"
        own = message.replace("Nonce: ", "Nonce: 0")
        assert (await wallet.answer(client, own)).code == "INVALID_CHALLENGE", "a message of one's own"
        assert await count(service, "users") == 0
        assert (await wallet.answer(client, message)).status == 200


async def test_a_message_is_good_for_five_minutes(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        for age, status in (("4 min 50 s", 200), ("5 min", 401)):
            message = await wallet.message(client)
            await service.database.execute(
                f"UPDATE login_challenges SET expires_at = expires_at - interval '{age}' WHERE used_at IS NULL"
            )
            assert (await wallet.answer(client, message)).status == status


async def test_every_wrong_field_of_a_login_is_told_at_once(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        nobody = anonymous(client)
        address = Wallet().address
        told = await nobody.ask("POST", "/api/auth/wallet", {})
        assert (told.status, told.wrong) == (400, ["body.walletAddress", "body.signature", "body.message"])
        mistyped = address[:10] + ("A" if address[10] != "A" else "B") + address[11:]
        for wrong in (mistyped, SEED, address.lower(), address[:-1], "M" + address[1:], address + "\n", ""):
            told = await nobody.ask("GET", "/api/auth/challenge", query={"walletAddress": wrong})
            assert (told.status, told.wrong) == (400, ["query.walletAddress"]), wrong
            told = await nobody.ask("GET", "/auth", query={"account": wrong, "memo": "1"})
            assert (told.status, told.wrong) == (400, ["query.account", "query.memo"]), wrong


async def test_without_a_secret_nobody_logs_in_and_everything_says_what_is_missing(database_url: str) -> None:
    async with running_service(database_url, {"AUTH_SIGNING_SEED": SEED}) as service, rest_client(service) as client:
        nobody, address = anonymous(client), Wallet().address
        for method, path, query, body in (
            ("GET", "/api/auth/challenge", {"walletAddress": address}, None),
            ("POST", "/api/auth/wallet", None, {"walletAddress": address, "signature": "x", "message": "x"}),
            ("POST", "/api/auth/refresh", None, {"refreshToken": "x"}),
            ("GET", "/auth", {"account": address}, None),
            ("POST", "/auth", None, {"transaction": "x"}),
        ):
            told = await nobody.ask(method, path, body, query=query)
            assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED"), path
            assert "JWT_SECRET" in told.body["message"]
        assert (await nobody.ask("GET", "/.well-known/stellar.toml")).status == 200


async def test_sep_10_logs_a_wallet_in_as_the_same_user(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        first = await wallet.log_in(client)
        told = await ask_challenge(client, wallet, home_domain="callora.test", client_domain="wallet.example")
        assert told.body["network_passphrase"] == Network.TESTNET_NETWORK_PASSPHRASE
        envelope = TransactionEnvelope.from_xdr(told.body["transaction"], told.body["network_passphrase"])
        assert envelope.transaction.source.account_id == SIGNING_KEY
        assert envelope.transaction.sequence == 0, "no network takes it"
        told = await post_challenge(client, await signed_challenge(client, wallet))
        assert told.status == 200
        assert told.body["token"] == told.body["accessToken"]
        assert session(client, told.body).user_id == first.user_id
        assert await alive(bearer(client, told.body["token"]))
        assert (await refresh(client, told.body["refreshToken"])).status == 200
        assert await count(service, "users") == 1


async def test_sep_10_takes_an_html_form_as_well(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        signed = await signed_challenge(client, Wallet())
        answer = await client.post("/auth", data={"transaction": signed})
        assert answer.status_code == 200
        assert answer.json()["token"]
        answer = await client.post("/auth", data={"transactions": signed})
        assert [each["field"] for each in answer.json()["details"]] == ["body.transaction", "body.transactions"]
        assert (await client.post("/auth", content=signed)).status_code == 415
        answer = await client.post("/api/auth/refresh", data={"refreshToken": "x"})
        assert answer.status_code == 415, "nothing else does"


async def test_a_sep_10_challenge_gives_one_login_also_to_parallel_ones(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        wallet = Wallet()
        signed = await signed_challenge(client, wallet)
        envelope = TransactionEnvelope.from_xdr(signed, Network.TESTNET_NETWORK_PASSPHRASE)
        # The same challenge in other words: another encoding, the signatures the other way round
        envelope.signatures.reverse()
        turned = envelope.to_xdr()
        answers = await at_once(8, lambda number: post_challenge(client, turned if number % 2 else signed))
        assert sorted(told.status for told in answers) == [200] + [401] * 7
        assert {told.code for told in answers if told.status == 401} == {"INVALID_CHALLENGE"}
        assert await count(service, "sessions") == 1
    async with login_service(database_url) as (_, client):
        assert (await post_challenge(client, signed)).code == "INVALID_CHALLENGE", "a restart forgets nothing"


async def test_sep_10_refuses_what_is_no_challenge_of_ours(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        told = await ask_challenge(client, wallet)
        unsigned = told.body["transaction"]
        for transaction in (
            unsigned,
            Wallet().sign_transaction(unsigned, Network.TESTNET_NETWORK_PASSPHRASE),
            wallet.sign_transaction(unsigned, Network.PUBLIC_NETWORK_PASSPHRASE),
            "AAAA",
            "not base64",
            "é",
        ):
            told = await post_challenge(client, transaction)
            assert (told.status, told.code) == (401, "INVALID_CHALLENGE")
        told = await post_challenge(client, "A" * 8193)
        assert (told.status, told.wrong) == (400, ["body.transaction"])
        for query, wrong in (
            ({"home_domain": "evil.example"}, "query.home_domain"),
            ({"memo": "123"}, "query.memo"),
            ({"account": SIGNING_KEY}, "query.account"),
        ):
            told = await ask_challenge(client, wallet, **query)
            assert (told.status, told.wrong) == (400, [wrong])
        assert (await ask_challenge(client, wallet, memo="")).status == 200


async def test_stellar_toml_tells_wallets_of_every_site_what_they_need(database_url: str) -> None:
    async with login_service(database_url, AUTH_HOME_DOMAIN="callora.test:8443") as (_, client):
        headers = {"Origin": "https://wallet.example", "Host": "evil.example"}
        answer = await client.get("/.well-known/stellar.toml", headers=headers)
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert tomllib.loads(answer.text) == {
            "NETWORK_PASSPHRASE": "Test SDF Network ; September 2015",
            "SIGNING_KEY": SIGNING_KEY,
            "WEB_AUTH_ENDPOINT": "https://callora.test:8443/auth",
        }
        for answer in (
            await client.get("/auth", params={"account": Wallet().address}, headers=headers),
            await client.post("/auth", json={"transaction": "x"}, headers=headers),
            await client.post("/auth", content=b"x", headers=headers),
        ):
            assert answer.headers["access-control-allow-origin"] == "*", answer.status_code
        asked = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        answer = await client.options("/auth", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "content-type" in answer.headers["access-control-allow-headers"].lower()
        answer = await client.get("/api/auth/sessions", headers=headers)
        assert "access-control-allow-origin" not in answer.headers, "nothing else is for every site"


async def test_without_a_domain_wallets_are_told_of_this_machine_and_never_what_the_host_header_says(
    database_url: str,
) -> None:
    environ = {"JWT_SECRET": SECRET, "AUTH_SIGNING_SEED": SEED, "STELLAR_NETWORK": "mainnet"}
    async with running_service(database_url, environ) as service, rest_client(service) as client:
        answer = await client.get("/.well-known/stellar.toml", headers={"Host": "evil.example"})
        told = tomllib.loads(answer.text)
        assert told["WEB_AUTH_ENDPOINT"] == f"http://localhost:{service.port}/auth"
        assert told["NETWORK_PASSPHRASE"] == Network.PUBLIC_NETWORK_PASSPHRASE
        assert (await Wallet().message(client)).startswith(f"localhost:{service.port} ")


async def test_without_a_seed_messages_still_log_in_and_sep_10_says_what_is_missing(database_url: str) -> None:
    async with running_service(database_url, {"JWT_SECRET": SECRET}) as service, rest_client(service) as client:
        nobody = anonymous(client)
        for told in (
            await nobody.ask("GET", "/.well-known/stellar.toml"),
            await ask_challenge(client, Wallet()),
            await post_challenge(client, "x"),
        ):
            assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED")
            assert "AUTH_SIGNING_SEED" in told.body["message"]
        await Wallet().log_in(client)


# --- pace -------------------------------------------------------------------------------------------------------------


async def test_logins_are_throttled_by_address_and_ordinary_use_is_not(database_url: str) -> None:
    async with login_service(database_url, LOGIN_RATE_LIMIT_MAX_REQUESTS="3") as (_, client):
        wallet = Wallet()
        mine = await wallet.log_in(client)
        told = await wallet.answer(client, "a guess")
        assert told.code == "INVALID_CHALLENGE"
        session(client, (await post_challenge(client, await signed_challenge(client, wallet))).body)
        told = await wallet.answer(client, "a guess")
        assert (told.status, told.code, told.body["details"]["limitedBy"]) == (429, "TOO_MANY_REQUESTS", "login")
        assert int(told.headers["Retry-After"]) >= 1
        assert (await post_challenge(client, "x")).status == 429, "both ways in are one budget"
        assert (await ask_challenge(client, wallet)).status == 200, "the third challenge"
        told = await ask_challenge(client, wallet)
        assert (told.status, told.body["details"]["limitedBy"]) == (429, "challenge")
        for _ in range(8):
            told = await refresh(client, mine.refresh_token)
            mine = session(client, told.body)
            assert await alive(mine.person)
        told = await anonymous(client).ask("POST", "/api/auth/revoke", {"refreshToken": mine.refresh_token})
        assert told.status == 204


async def test_a_wallet_logs_in_on_the_network_that_is_configured_and_on_no_other(database_url: str) -> None:
    sandbox = "A Sandbox ; of our own"
    async with login_service(database_url, STELLAR_NETWORK_PASSPHRASE=sandbox) as (_, client):
        wallet = Wallet()
        told = await ask_challenge(client, wallet)
        assert told.body["network_passphrase"] == sandbox
        unsigned = told.body["transaction"]
        wrong = wallet.sign_transaction(unsigned, Network.TESTNET_NETWORK_PASSPHRASE)
        assert (await post_challenge(client, wrong)).status == 401
        assert (await post_challenge(client, wallet.sign_transaction(unsigned, sandbox))).status == 200
        stated = tomllib.loads((await client.get("/.well-known/stellar.toml")).text)
        assert stated["NETWORK_PASSPHRASE"] == sandbox
