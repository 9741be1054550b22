"""What follows a login: refresh tokens used once, sessions that are ended at once, and nothing that outlives them."""

import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from callora.actors.sessions import KEPT_SECONDS
from tests.support.rest import Told, anonymous, person
from tests.support.wallets import (
    Session,
    Wallet,
    alive,
    at_once,
    bearer,
    count,
    login_service,
    post_challenge,
    refresh,
    session,
    signed_challenge,
)

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


# --- housekeeping -----------------------------------------------------------------------------------------------------


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
        with trio.fail_after(60):
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
