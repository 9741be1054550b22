"""Logging in with a wallet, and the sessions that follow: real keys, real sockets, a real database."""

import base64
import hashlib
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from stellar_sdk import Keypair, Network, TransactionEnvelope

from callora.actors.sessions import KEPT_SECONDS
from callora.ledger.wallets import make_seed
from tests.support.rest import Person, Told, anonymous, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.wallets import Session, Wallet, bearer, session

SECRET = "a secret of thirty-two bytes, at least"
SEED = make_seed(bytes(range(32)))
SIGNING_KEY = Keypair.from_secret(SEED).public_key
LOGIN = {"JWT_SECRET": SECRET, "AUTH_SIGNING_SEED": SEED, "AUTH_HOME_DOMAIN": "callora.test"}


@asynccontextmanager
async def login_service(database_url: str, **environ: str) -> AsyncIterator[tuple[RunningService, httpx.AsyncClient]]:
    async with running_service(database_url, {**LOGIN, **environ}) as service, rest_client(service) as client:
        yield service, client


async def at_once(count: int, ask: Callable[[int], Awaitable[Told]]) -> list[Told]:
    """Return the answers to requests that start together."""
    answers: list[Told] = []
    barrier = trio.Event()
    ready = trio.Semaphore(0)

    async def one(number: int) -> None:
        ready.release()
        await barrier.wait()
        answers.append(await ask(number))

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
        for _ in range(count):
            await ready.acquire()
        barrier.set()
    return answers


async def refresh(client: httpx.AsyncClient, token: str, path: str = "/api/auth/refresh") -> Told:
    return await anonymous(client).ask("POST", path, {"refreshToken": token})


async def alive(who: Person) -> bool:
    """Tell whether someone's access token still opens something."""
    told = await who.ask("GET", "/api/auth/sessions")
    if told.status == 401:
        assert told.code == "REVOKED_TOKEN"
    return told.status == 200


async def count(service: RunningService, table: str) -> int:
    return int(await service.database.fetch_value(f"SELECT count(*) FROM {table}"))


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


# --- by SEP-10 --------------------------------------------------------------------------------------------------------


async def ask_challenge(client: httpx.AsyncClient, wallet: Wallet, **query: str) -> Told:
    return await anonymous(client).ask("GET", "/auth", query={"account": wallet.address, **query})


async def signed_challenge(client: httpx.AsyncClient, wallet: Wallet) -> str:
    told = await ask_challenge(client, wallet)
    assert told.status == 200, told.body
    return wallet.sign_transaction(told.body["transaction"], told.body["network_passphrase"])


async def post_challenge(client: httpx.AsyncClient, transaction: str) -> Told:
    return await anonymous(client).ask("POST", "/auth", {"transaction": transaction})


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


# --- refresh tokens ---------------------------------------------------------------------------------------------------


async def test_a_refresh_gives_the_next_pair_and_keeps_the_session(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        first = await Wallet().log_in(client)
        told = await refresh(client, first.refresh_token)
        assert told.status == 200
        second = session(client, told.body)
        assert second.refresh_token != first.refresh_token
        assert second.user_id == first.user_id
        assert await alive(first.person), "the former access token lasts until it expires"
        assert await alive(second.person)
        assert (await refresh(client, second.refresh_token, "/api/refresh-token")).status == 200
        assert await count(service, "sessions") == 1


async def test_only_hashes_of_refresh_tokens_are_stored(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        logged_in = await Wallet().log_in(client)
        rows = await service.database.fetch("SELECT token_hash, t::text AS everything FROM refresh_tokens t")
        assert [row["token_hash"] for row in rows] == [hashlib.sha256(logged_in.refresh_token.encode()).digest()]
        assert logged_in.refresh_token not in rows[0]["everything"]
        assert len(logged_in.refresh_token) >= 43, "256 bits"


async def test_a_refresh_token_used_twice_ends_the_whole_session(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        first = await Wallet().log_in(client)
        bystander = await Wallet().log_in(client)
        second = session(client, (await refresh(client, first.refresh_token)).body)
        third = session(client, (await refresh(client, second.refresh_token)).body)
        told = await refresh(client, first.refresh_token)
        assert (told.status, told.code) == (401, "REVOKED_TOKEN")
        for each in (first, second, third):
            assert not await alive(each.person)
            assert (await refresh(client, each.refresh_token)).code == "REVOKED_TOKEN"
        assert await service.database.fetch_value("SELECT count(*) FROM sessions WHERE revoked_for = 'reuse'") == 1
        assert await alive(bystander.person)


async def test_defect_42_of_parallel_uses_one_wins_and_the_session_ends_under_it(database_url: str) -> None:
    async with login_service(database_url) as (service, client), login_service(database_url) as (_, other):
        for _ in range(5):
            logged_in = await Wallet().log_in(client)
            clients = (client, other)  # two processes on one database
            answers = await at_once(8, lambda n: refresh(clients[n % 2], logged_in.refresh_token))  # noqa: B023
            won = [told for told in answers if told.status == 200]
            assert len(won) == 1
            assert [told.code for told in answers if told.status != 200] == ["REVOKED_TOKEN"] * 7
            winner = session(client, won[0].body)
            assert not await alive(winner.person)
            assert (await refresh(client, winner.refresh_token)).code == "REVOKED_TOKEN"
        assert await count(service, "refresh_tokens") == 10, "one for each login, one for each winner"


async def test_a_refresh_beside_a_logout_never_outlives_it(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        for _ in range(10):
            logged_in = await Wallet().log_in(client)

            async def one(number: int, token: str = logged_in.refresh_token) -> Told:
                if number:
                    return await refresh(client, token)
                return await anonymous(client).ask("POST", "/api/auth/revoke", {"refreshToken": token})

            answers = await at_once(2, one)
            assert sorted(told.status for told in answers) in ([200, 204], [204, 401])
            for told in answers:
                if told.status == 200:
                    assert not await alive(session(client, told.body).person)
                    assert (await refresh(client, told.body["refreshToken"])).code == "REVOKED_TOKEN"


async def test_refresh_tokens_that_are_none_or_too_old_are_refused(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        logged_in = await Wallet().log_in(client)
        for token in ("crt_", "x" * 512, logged_in.refresh_token + "x", logged_in.access_token[:512], "é"):
            told = await refresh(client, token)
            assert (told.status, told.code) == (401, "INVALID_REFRESH_TOKEN"), token
            assert "Bearer" in told.headers["WWW-Authenticate"]
        told = await anonymous(client).ask("POST", "/api/auth/refresh", {})
        assert (told.status, told.wrong) == (400, ["body.refreshToken"])
        assert (await refresh(client, "x" * 513)).wrong == ["body.refreshToken"]
        await service.database.execute("UPDATE refresh_tokens SET expires_at = now() - interval '1 second'")
        assert (await refresh(client, logged_in.refresh_token)).code == "EXPIRED_TOKEN"


async def test_a_refresh_token_lasts_seven_days_from_its_issue(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        logged_in = await Wallet().log_in(client)
        ages = "SELECT extract(epoch FROM max(expires_at) - now())::int FROM "
        await service.database.execute("UPDATE sessions SET expires_at = now() + interval '1 day'")
        assert (await refresh(client, logged_in.refresh_token)).status == 200
        for table in ("refresh_tokens", "sessions"):
            assert abs(await service.database.fetch_value(ages + table) - 7 * 86_400) < 60, table


# --- ending sessions --------------------------------------------------------------------------------------------------


async def end_by_revoke(mine: Session) -> Told:
    return await anonymous(mine.client).ask("POST", "/api/auth/revoke", {"refreshToken": mine.refresh_token})


async def end_by_revoke_all(mine: Session) -> Told:
    return await mine.person.ask("POST", "/api/auth/revoke-all")


async def end_by_id(mine: Session) -> Told:
    listed = await mine.person.ask("GET", "/api/auth/sessions")
    current = next(each for each in listed.body["data"] if each["current"])
    return await mine.person.ask("DELETE", f"/api/auth/sessions/{current['id']}")


@pytest.mark.parametrize("end", [end_by_revoke, end_by_revoke_all, end_by_id])
async def test_defect_44_an_ended_session_is_dead_at_once_everywhere_and_after_a_restart(
    database_url: str, end: Callable[[Session], Awaitable[Told]]
) -> None:
    async with login_service(database_url) as (_, client), login_service(database_url) as (_, other):
        mine = await Wallet().log_in(client)
        assert await alive(bearer(other, mine.access_token))
        told = await end(mine)
        assert (told.status, told.body) == (204, None)
        for at in (client, other):
            assert not await alive(bearer(at, mine.access_token))
            assert (await refresh(at, mine.refresh_token)).code == "REVOKED_TOKEN"
    async with login_service(database_url) as (_, client):
        assert not await alive(bearer(client, mine.access_token))
        assert (await refresh(client, mine.refresh_token)).code == "REVOKED_TOKEN"


async def test_logging_out_is_done_whatever_was_there(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        mine, mine_too = await wallet.log_in(client), await wallet.log_in(client)
        for _ in range(2):
            assert (await end_by_revoke(mine)).status == 204
        told = await anonymous(client).ask("POST", "/api/auth/revoke", {"refreshToken": "never issued"})
        assert told.status == 204
        assert await alive(mine_too.person), "the other session of the same user"
        # A token that was used ends its session as well: whoever asks for that means the session
        session(client, (await refresh(client, mine_too.refresh_token)).body)
        assert (await end_by_revoke(mine_too)).status == 204
        assert not await alive(mine_too.person)


async def test_revoke_all_ends_every_session_of_its_user_and_of_nobody_else(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        mine = [await wallet.log_in(client) for _ in range(3)]
        other = await Wallet().log_in(client)
        assert (await end_by_revoke_all(mine[0])).status == 204
        assert [await alive(each.person) for each in mine] == [False] * 3
        assert await alive(other.person)
        assert await alive((await wallet.log_in(client)).person), "he may log in again"
        assert (await anonymous(client).ask("POST", "/api/auth/revoke-all")).status == 401


async def test_sessions_are_listed_by_pages_with_the_current_one_marked(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        mine = [await wallet.log_in(client) for _ in range(5)]
        ended = await wallet.log_in(client)
        await end_by_revoke(ended)
        await Wallet().log_in(client)
        seen: list[Any] = []
        query: dict[str, str | int] = {"limit": 2}
        while True:
            told = await mine[1].person.ask("GET", "/api/auth/sessions", query=query)
            seen += told.body["data"]
            if not told.body["meta"]["hasMore"]:
                break
            query["cursor"] = told.body["meta"]["nextCursor"]
        assert len({each["id"] for each in seen}) == len(seen) == 5
        assert [each["current"] for each in seen] == [False, False, False, True, False], "the latest first"
        assert sorted((each["createdAt"] for each in seen), reverse=True) == [each["createdAt"] for each in seen]
        assert seen[0]["clientAddress"] == "127.0.0.1"
        assert seen[0]["userAgent"].startswith("python-httpx/")
        for cursor in ("x", base64.urlsafe_b64encode(b'["no-id"]').decode(), base64.urlsafe_b64encode(b"[1]").decode()):
            told = await mine[0].person.ask("GET", "/api/auth/sessions", query={"cursor": cursor})
            assert (told.status, told.wrong) == (400, ["query.cursor"])


async def test_only_ones_own_sessions_can_be_ended(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        mine, other = await Wallet().log_in(client), await Wallet().log_in(client)
        theirs = (await other.person.ask("GET", "/api/auth/sessions")).body["data"][0]["id"]
        unknown = service.context.ids.uuid7()
        answers = [await mine.person.ask("DELETE", f"/api/auth/sessions/{each}") for each in (theirs, unknown)]
        assert [told.status for told in answers] == [404, 404]
        for told in answers:
            told.body.pop("requestId")
        assert answers[0].body == answers[1].body
        assert await alive(other.person)
        told = await mine.person.ask("DELETE", "/api/auth/sessions/no-uuid")
        assert (told.status, told.wrong) == (400, ["path.sessionId"])
        for _ in range(2):
            assert (await other.person.ask("DELETE", f"/api/auth/sessions/{theirs}")).status in (204, 401)
        assert not await alive(other.person)


async def test_ending_a_session_again_does_nothing(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        wallet = Wallet()
        mine, gone = await wallet.log_in(client), await wallet.log_in(client)
        listed = (await gone.person.ask("GET", "/api/auth/sessions")).body["data"]
        gone_id = next(each["id"] for each in listed if each["current"])
        for _ in range(2):
            assert (await mine.person.ask("DELETE", f"/api/auth/sessions/{gone_id}")).status == 204
        assert await alive(mine.person)


async def test_long_and_odd_client_names_are_kept_as_far_as_they_fit(database_url: str) -> None:
    async with login_service(database_url) as (_, client):
        client.headers["User-Agent"] = "ä" * 500
        mine = await Wallet().log_in(client)
        listed = (await mine.person.ask("GET", "/api/auth/sessions")).body["data"]
        assert 0 < len(listed[0]["userAgent"]) <= 256
        del client.headers["User-Agent"]
        await Wallet().log_in(client)


# --- pace and housekeeping --------------------------------------------------------------------------------------------


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
        assert (await end_by_revoke(mine)).status == 204


async def test_what_has_expired_is_deleted_and_nothing_else(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        await Wallet().log_in(client)
        await post_challenge(client, await signed_challenge(client, Wallet()))
        tables = ("login_challenges", "refresh_tokens", "sessions")
        for table in tables:
            late = f"UPDATE {table} SET expires_at = now() - make_interval(secs => $1)"
            await service.database.execute(late, float(KEPT_SECONDS + 60))
        mine = await Wallet().log_in(client)
        waiting = Wallet()
        message = await waiting.message(client)
    async with login_service(database_url) as (service, client):  # purges when it starts
        with trio.fail_after(10):
            while await count(service, "sessions") > 1:  # noqa: ASYNC110 - a job that nobody waits for
                await trio.lowlevel.checkpoint()
        assert await count(service, "refresh_tokens") == 1
        assert await alive(bearer(client, mine.access_token))
        assert (await refresh(client, mine.refresh_token)).status == 200
        assert (await waiting.answer(client, message)).status == 200


async def test_a_user_without_a_wallet_has_sessions_to_look_at_too(database_url: str) -> None:
    async with login_service(database_url) as (service, client):
        someone = await person(service, client)
        told = await someone.ask("GET", "/api/auth/sessions")
        assert told.body == {"data": [], "meta": {"limit": 20, "nextCursor": None, "hasMore": False}}
