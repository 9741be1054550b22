"""Who asks over REST: every credential that must not open anything, and the few that do."""

import base64
import json
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

import httpx
import jwt
import pytest
import trio
import trio.testing
from pydantic import SecretStr
from werkzeug.datastructures import Headers

from callora.http.problems import ProblemRaised
from callora.http.rest.identity import Authenticator, People, TokenSettings, mint_access_token
from callora.ledger.ids import UserId
from callora.service import SystemClock
from tests.support.rest import ADMIN_KEY, Told, anonymous, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.wallets import Wallet

SECRET = "a secret that is long enough for the algorithms that are not taken as well"
OUTSIDE = {"JWT_SECRET": SECRET, "ADMIN_API_KEY": ADMIN_KEY}
PRODUCTION = {**OUTSIDE, "APP_ENV": "production", "METRICS_API_KEY": "scrape-me"}
MINE = "/api/auth/sessions"
"""A route for people who are logged in."""
FAR = 4_000_000_000


def token(
    claims: Mapping[str, object] | bytes, *, secret: str = SECRET, algorithm: str = "HS256", **header: Any
) -> str:
    """Return a token that says just this."""
    payload = claims if isinstance(claims, bytes) else json.dumps(dict(claims)).encode()
    if algorithm == "none":
        parts = (json.dumps({"alg": "none", "typ": "JWT", **header}).encode(), payload, b"")
        return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    return jwt.api_jws.encode(payload, secret, algorithm, headers=header or None)


def outside(**claims: object) -> dict[str, object]:
    """Return the claims of a good token of an outside issuer, with changes; None leaves one out."""
    made = {"sub": "auth0|ann", "exp": FAR, **claims}
    return {name: value for name, value in made.items() if value is not None}


async def ask(client: httpx.AsyncClient, header: str | None, **headers: str) -> Told:
    """Return the answer to someone with this Authorization header and these others."""
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    if header is not None:
        sent.append((b"Authorization", header.encode()))
    response = await client.get(MINE, headers=httpx.Headers(sent))
    return Told(response.status_code, response.headers, response.json())


async def users(service: RunningService) -> int:
    return int(await service.database.fetch_value("SELECT count(*) FROM users"))


# --- tokens that open nothing -----------------------------------------------------------------------------------------

GOOD = outside()
REFUSED: list[Any] = [
    pytest.param("", "INVALID_AUTH_HEADER", id="an empty header"),
    pytest.param("Bearer", "MISSING_TOKEN", id="a scheme alone"),
    pytest.param("Basic YW5uOmFubg==", "INVALID_AUTH_HEADER", id="another scheme"),
    pytest.param(token(GOOD), "INVALID_AUTH_HEADER", id="a token alone"),
    pytest.param("Bearer x", "INVALID_TOKEN", id="no token"),
    pytest.param("Bearer ..", "INVALID_TOKEN", id="dots"),
    pytest.param("Bearer ä.ö.ü", "INVALID_TOKEN", id="letters beyond ASCII"),
    pytest.param(f"Bearer {token(GOOD)} {token(GOOD)}", "INVALID_TOKEN", id="two tokens"),
    pytest.param(f"Bearer {token(GOOD)}x", "INVALID_TOKEN", id="a changed signature"),
    pytest.param("Bearer " + token(GOOD).rpartition(".")[0] + ".", "INVALID_TOKEN", id="no signature"),
    pytest.param(f"Bearer {token(GOOD, algorithm='none')}", "INVALID_TOKEN", id="algorithm none"),
    pytest.param(
        "Bearer " + token(GOOD, algorithm="none").replace("bm9uZSI", "Tk9ORSI"), "INVALID_TOKEN", id="algorithm NONE"
    ),
    pytest.param(f"Bearer {token(GOOD, algorithm='HS384')}", "INVALID_TOKEN", id="HS384 with our secret"),
    pytest.param(f"Bearer {token(GOOD, algorithm='HS512')}", "INVALID_TOKEN", id="HS512 with our secret"),
    pytest.param(f"Bearer {token(GOOD, secret='another secret of 32 bytes, or more')}", "INVALID_TOKEN", id="a secret"),
    pytest.param(f"Bearer {token(GOOD, crit=['exp'])}", "INVALID_TOKEN", id="a critical header that we do not know"),
    pytest.param(f"Bearer {token(b'[]')}", "INVALID_TOKEN", id="claims that are a list"),
    pytest.param(f"Bearer {token(b'no json')}", "INVALID_TOKEN", id="claims that are no JSON"),
    pytest.param(f"Bearer {token(b'[' * 3000)}", "INVALID_TOKEN", id="claims too deep"),
    pytest.param("Bearer " + "W1tb" * 1500 + ".e30.AAAA", "INVALID_TOKEN", id="a header too deep"),
    pytest.param(f"Bearer {token(outside(exp=None))}", "MISSING_CLAIMS", id="no end"),
    pytest.param(f"Bearer {token(outside(exp=1))}", "TOKEN_EXPIRED", id="expired"),
    pytest.param(f"Bearer {token(outside(exp=-1))}", "TOKEN_EXPIRED", id="expired before time began"),
    pytest.param(f"Bearer {token(outside(exp='4000000000'))}", "INVALID_TOKEN", id="an end that is a text"),
    pytest.param(f"Bearer {token(outside(exp=[FAR]))}", "INVALID_TOKEN", id="an end that is a list"),
    pytest.param(f"Bearer {token(outside(exp=True))}", "INVALID_TOKEN", id="an end that is true"),
    pytest.param(b'{"sub": "ann", "exp": NaN}', "INVALID_TOKEN", id="an end that is no number"),
    pytest.param(b'{"sub": "ann", "exp": Infinity}', "INVALID_TOKEN", id="an end that never comes"),
    pytest.param(b'{"sub": "ann", "exp": 1e400}', "INVALID_TOKEN", id="an end past every number"),
    pytest.param(f"Bearer {token(outside(nbf=FAR))}", "TOKEN_NOT_ACTIVE", id="not active yet"),
    pytest.param(f"Bearer {token(outside(nbf='0'))}", "INVALID_TOKEN", id="a beginning that is a text"),
    pytest.param(b'{"sub": "ann", "exp": 4000000000, "nbf": NaN}', "INVALID_TOKEN", id="a beginning that is no number"),
    pytest.param(f"Bearer {token(outside(sub=None))}", "MISSING_CLAIMS", id="nobody"),
    pytest.param(f"Bearer {token(outside(sub='  '))}", "MISSING_CLAIMS", id="a blank name"),
    pytest.param(f"Bearer {token(outside(sub=7))}", "MISSING_CLAIMS", id="a number for a name"),
    pytest.param(f"Bearer {token(outside(sub='x' * 256))}", "MISSING_CLAIMS", id="a name too long"),
    pytest.param(f"Bearer {token(outside(sub='a' + chr(0)))}", "MISSING_CLAIMS", id="a name with NUL"),
    pytest.param(f"Bearer {token(outside(sub=chr(0xD800)))}", "MISSING_CLAIMS", id="a name that is no text"),
    pytest.param(f"Bearer {token(outside(userId=7))}", "MISSING_CLAIMS", id="a number before a name"),
    pytest.param(f"Bearer {token(outside(type='refresh'))}", "INVALID_TOKEN", id="a refresh token by type"),
    pytest.param(f"Bearer {token(outside(type='ACCESS'))}", "INVALID_TOKEN", id="a type in other letters"),
    pytest.param(b'{"sub": "ann", "exp": 4000000000, "type": null}', "INVALID_TOKEN", id="a type that is null"),
    pytest.param(f"Bearer {token(outside(sid='x'))}", "REVOKED_TOKEN", id="a session that is none"),
    pytest.param(f"Bearer {token(outside(sid=7))}", "REVOKED_TOKEN", id="a session that is a number"),
    pytest.param(f"Bearer {token(outside(sid=''))}", "REVOKED_TOKEN", id="an empty session"),
    pytest.param(
        f"Bearer {token(outside(sid='01900000-0000-7000-8000-000000000000'))}", "REVOKED_TOKEN", id="no such session"
    ),
]


async def test_defect_28_no_token_but_a_good_one_opens_anything(database_url: str) -> None:
    async with running_service(database_url, PRODUCTION) as service, rest_client(service) as client:
        wrong = []
        for case in REFUSED:
            header, code = case.values
            sent = f"Bearer {token(header)}" if isinstance(header, bytes) else header
            told = await ask(client, sent, X_User_Id="ann")
            challenge = told.headers.get("WWW-Authenticate", "")
            if (told.status, told.body.get("code"), challenge[:6]) != (401, code, "Bearer"):
                wrong.append((case.id, told.status, told.body.get("code")))
        assert not wrong
        twice = [("Authorization", f"Bearer {token(GOOD)}"), ("Authorization", "Bearer x")]
        for sent_twice in (twice, twice[::-1]):
            answer = await client.get(MINE, headers=sent_twice)
            assert (answer.status_code, answer.json()["code"]) == (401, "INVALID_AUTH_HEADER")
        assert await users(service) == 0, "none of them made a user"
        assert (await ask(client, f"bearer  {token(GOOD)}")).status == 200


async def test_expiry_is_by_our_clock_to_the_second(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        at = service.context.clock.now().timestamp()
        assert (await ask(client, f"Bearer {token(outside(exp=at - 0.5))}")).code == "TOKEN_EXPIRED"
        assert (await ask(client, f"Bearer {token(outside(exp=at + 60, nbf=at - 1))}")).status == 200
        assert (await ask(client, f"Bearer {token(outside(nbf=at + 60))}")).code == "TOKEN_NOT_ACTIVE"
        assert (await ask(client, f"Bearer {token(outside(iat=FAR))}")).status == 200, "iat says nothing about validity"


async def test_our_own_token_ends_after_its_time_though_its_session_lives(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        claims = jwt.decode(mine.access_token, options={"verify_signature": False})
        assert claims["exp"] - claims["iat"] == 900
        assert (claims["type"], claims["sub"], claims["userId"]) == ("access", mine.user_id, mine.user_id)
        assert "iss" not in claims
        expired = token({**claims, "exp": claims["iat"] - 1})
        assert (await ask(client, f"Bearer {expired}")).code == "TOKEN_EXPIRED"


async def test_our_own_token_is_no_ones_else(database_url: str) -> None:
    """Even who knows the secret cannot borrow a session: it belongs to its user."""
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine, other = await Wallet().log_in(client), await Wallet().log_in(client)
        claims = jwt.decode(mine.access_token, options={"verify_signature": False})
        for borrowed in (
            {**claims, "userId": other.user_id},
            {**claims, "userId": mine.user_id.upper()},
            {**claims, "userId": f" {mine.user_id}"},
            {**claims, "sid": claims["sid"].upper()},
        ):
            assert (await ask(client, f"Bearer {token(borrowed)}")).code == "REVOKED_TOKEN"
        assert (await ask(client, f"Bearer {token(claims)}")).status == 200


async def test_defect_28_a_refresh_token_is_no_access_token_nor_the_other_way_round(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        told = await ask(client, f"Bearer {mine.refresh_token}")
        assert (told.status, told.code) == (401, "INVALID_TOKEN")
        told = await anonymous(client).ask("POST", "/api/auth/refresh", {"refreshToken": mine.access_token})
        assert (told.status, told.code) == (401, "INVALID_REFRESH_TOKEN")


async def test_an_api_key_opens_nothing_here(database_url: str) -> None:
    async with running_service(database_url, PRODUCTION) as service, rest_client(service) as client:
        consumer = await service.consumer("1")
        assert (await ask(client, f"Bearer {consumer.api_key}")).code == "INVALID_TOKEN"
        assert (await ask(client, None, X_Api_Key=consumer.api_key)).code == "UNAUTHORIZED"
        assert (await ask(client, None, X_Admin_Api_Key=ADMIN_KEY)).code == "UNAUTHORIZED", "an operator is no person"


async def test_without_a_secret_no_token_is_taken(database_url: str) -> None:
    async with running_service(database_url) as service, rest_client(service) as client:
        for text in (token(GOOD, secret="x" * 32), token(GOOD, algorithm="none")):
            assert (await ask(client, f"Bearer {text}")).code == "INVALID_TOKEN"


# --- issuer and audience ----------------------------------------------------------------------------------------------


async def test_a_configured_issuer_and_audience_are_the_only_ones(database_url: str) -> None:
    environ = {**OUTSIDE, "JWT_ISSUER": "https://id.test", "JWT_AUDIENCE": "callora"}
    async with running_service(database_url, environ) as service, rest_client(service) as client:
        for claims, code in (
            (outside(), "MISSING_CLAIMS"),
            (outside(iss="https://id.test"), "MISSING_CLAIMS"),
            (outside(aud="callora"), "MISSING_CLAIMS"),
            (outside(iss="https://evil.test", aud="callora"), "INVALID_TOKEN"),
            (outside(iss="https://id.test/", aud="callora"), "INVALID_TOKEN"),
            (outside(iss=["https://id.test"], aud="callora"), "INVALID_TOKEN"),
            (outside(iss="https://id.test", aud="other"), "INVALID_TOKEN"),
            (outside(iss="https://id.test", aud=["other", 7]), "INVALID_TOKEN"),
            (outside(iss="https://id.test", aud={"callora": 1}), "INVALID_TOKEN"),
        ):
            told = await ask(client, f"Bearer {token(claims)}")
            assert (told.status, told.code) == (401, code), claims
        for audience in ("callora", ["other", "callora"]):
            good = outside(iss="https://id.test", aud=audience)
            assert (await ask(client, f"Bearer {token(good)}")).status == 200
        mine = await Wallet().log_in(client)
        assert (await ask(client, f"Bearer {mine.access_token}")).status == 200, "our own say both"


async def test_without_configuration_issuer_and_audience_are_not_looked_at(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        assert (await ask(client, f"Bearer {token(outside(iss='https://any.test', aud=['any']))}")).status == 200


# --- people of an outside issuer --------------------------------------------------------------------------------------


async def test_an_outside_issuers_user_is_the_same_person_each_time(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        for claims in (
            outside(),
            outside(userId="auth0|ann", sub="something else"),
            outside(sub=" auth0|ann "),
            outside(type="access"),
        ):
            assert (await ask(client, f"Bearer {token(claims)}")).status == 200
        assert await users(service) == 1
        assert (await ask(client, f"Bearer {token(outside(sub='auth0|bob'))}")).status == 200
        assert (await ask(client, f"Bearer {token(outside(sub='ä' * 255))}")).status == 200
        assert await users(service) == 3


async def test_an_outside_issuer_may_name_a_user_by_our_id(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        for name in (mine.user_id, mine.user_id.upper()):
            told = await ask(client, f"Bearer {token(outside(sub=name))}")
            assert [each["current"] for each in told.body["data"]] == [False], "his session, seen from outside of it"
        assert await users(service) == 1


async def test_parallel_first_requests_of_an_outside_user_make_one(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        statuses: list[int] = []
        start = trio.Event()

        async def one() -> None:
            await start.wait()
            statuses.append((await ask(client, f"Bearer {token(GOOD)}")).status)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            start.set()
        assert statuses == [200] * 8
        assert await users(service) == 1


# --- X-User-Id --------------------------------------------------------------------------------------------------------


async def test_defect_28_x_user_id_is_nobody_in_production(database_url: str) -> None:
    async with running_service(database_url, PRODUCTION) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        for name in (mine.user_id, "ann"):
            told = await ask(client, None, X_User_Id=name)
            assert (told.status, told.code) == (401, "UNAUTHORIZED")
        assert await users(service) == 1


async def test_x_user_id_names_a_user_elsewhere_unless_a_token_is_sent(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        someone = await person(service, client)
        assert (await someone.ask("GET", MINE)).status == 200
        assert (await ask(client, None, X_User_Id="ann")).status == 200
        assert (await ask(client, None, X_User_Id="ann")).status == 200
        assert await users(service) == 2
        assert (await ask(client, "Bearer x", X_User_Id="ann")).code == "INVALID_TOKEN", "no way back to the header"
        assert (await ask(client, None, X_User_Id="")).code == "UNAUTHORIZED"
        assert (await ask(client, None, X_User_Id="x" * 256)).code == "INVALID_TOKEN"


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_an_ended_session_takes_its_access_token_along(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        assert (await mine.person.ask("GET", MINE)).status == 200
        await anonymous(client).ask("POST", "/api/auth/revoke", {"refreshToken": mine.refresh_token})
        told = await mine.person.ask("GET", MINE)
        assert (told.status, told.code) == (401, "REVOKED_TOKEN")


async def test_an_expired_session_takes_its_access_token_along(database_url: str) -> None:
    async with running_service(database_url, OUTSIDE) as service, rest_client(service) as client:
        mine = await Wallet().log_in(client)
        await service.database.execute("UPDATE sessions SET expires_at = now()")
        assert (await mine.person.ask("GET", MINE)).code == "REVOKED_TOKEN"
        told = await anonymous(client).ask("POST", "/api/auth/refresh", {"refreshToken": mine.refresh_token})
        assert told.code == "REVOKED_TOKEN"


# --- operators --------------------------------------------------------------------------------------------------------

# Asked of the authenticator itself: which operations are an operator's is not this file's business.

PEOPLE = People(user_of_subject=lambda subject: _known(subject), session_alive=lambda *_: _alive())


async def _known(subject: str) -> UserId:
    await trio.lowlevel.checkpoint()
    return UserId(subject)


async def _alive() -> bool:
    await trio.lowlevel.checkpoint()
    return True


def authenticator(
    *, networks: tuple[str, ...] = (), admin_key: str | None = ADMIN_KEY, secret: str | None = SECRET
) -> Authenticator:
    """Return an authenticator as production has it."""
    return Authenticator(
        tokens=TokenSettings(SecretStr(secret), None, None) if secret else None,
        admin_key=SecretStr(admin_key) if admin_key else None,
        admin_networks=tuple(map(ip_network, networks)),
        service_token=None,
        user_header_allowed=False,
        people=PEOPLE,
        clock=SystemClock(),
    )


async def operator(headers: Mapping[str, str], *, client: str = "10.0.0.7", **made: Any) -> str:
    """Return how the audit names whoever sends these headers from there, or the code that refuses him."""
    try:
        identity = await authenticator(**made).admin(Headers(dict(headers)), client)
    except ProblemRaised as problem:
        return problem.problem.code
    return identity.actor


KEY = {"X-Admin-Api-Key": ADMIN_KEY}


async def test_the_admin_key_is_taken_whatever_stands_in_authorization() -> None:
    assert await operator(KEY) == "admin-key"
    for other in ("Bearer x", "Basic x", "", f"Bearer {token(GOOD)}", f"Bearer {token(GOOD, algorithm='none')}"):
        assert await operator({**KEY, "Authorization": other}) == "admin-key"


async def test_a_wrong_admin_key_is_refused_whatever_else_is_right() -> None:
    good = {"Authorization": f"Bearer {token(outside(role='admin'))}"}
    for key in ("", " ", ADMIN_KEY[:-1], ADMIN_KEY + "x", ADMIN_KEY.upper(), "ä"):
        assert await operator({**good, "X-Admin-Api-Key": key}) == "UNAUTHORIZED", key
    for key in ("", "None", "x"):
        assert await operator({"X-Admin-Api-Key": key}, admin_key=None) == "UNAUTHORIZED", "none is set"
    assert await operator({"Authorization": f"Bearer {ADMIN_KEY}"}) == "INVALID_TOKEN"
    assert await operator({"X-Api-Key": ADMIN_KEY}) == "UNAUTHORIZED"


async def test_a_token_is_an_operators_by_its_role_alone() -> None:
    assert await operator({"Authorization": f"Bearer {token(outside(role='admin'))}"}) == "user:auth0|ann"
    for role in (None, "", "Admin", "ADMIN", "admin ", "user", ["admin"], True, {"admin": True}):
        assert await operator({"Authorization": f"Bearer {token(outside(role=role))}"}) == "FORBIDDEN", role
    assert await operator({"Authorization": f"Bearer {token(outside(roles=['admin'], admin=True))}"}) == "FORBIDDEN"


async def test_defect_28_an_operators_token_is_checked_like_any_other() -> None:
    for claims, code in (
        (outside(role="admin", type="refresh"), "INVALID_TOKEN"),
        (outside(role="admin", exp=1), "TOKEN_EXPIRED"),
        (outside(role="admin", sub=None), "MISSING_CLAIMS"),
    ):
        assert await operator({"Authorization": f"Bearer {token(claims)}"}) == code
    for algorithm in ("none", "HS384"):
        forged = token(outside(role="admin"), algorithm=algorithm)
        assert await operator({"Authorization": f"Bearer {forged}"}) == "INVALID_TOKEN"
    assert await operator({"X-User-Id": "admin"}) == "UNAUTHORIZED"
    assert await operator({}) == "UNAUTHORIZED"


async def test_our_own_tokens_are_never_an_operators() -> None:
    ours = mint_access_token(TokenSettings(SecretStr(SECRET), None, None), SystemClock(), UserId("u"), "s", "admin")
    assert await operator({"Authorization": f"Bearer {ours}"}) == "FORBIDDEN"


async def test_operators_come_from_allowed_addresses_or_not_at_all() -> None:
    networks = ("10.1.0.0/16", "2001:db8::/32")
    good = {**KEY, "Authorization": f"Bearer {token(outside(role='admin'))}"}
    for client in ("10.1.2.3", "10.1.255.255", "2001:db8::1", "::ffff:10.1.2.3"):
        assert await operator(good, client=client, networks=networks) == "admin-key", client
    for client in (
        *("10.2.0.1", "127.0.0.1", "2001:db9::1", "::1", "::ffff:10.2.0.1", "::10.1.2.3"),
        *("", "unknown", "10.1.2.3, 10.9.9.9", "10.1.2.3:443", "010.1.2.3", "10.1.2", "10.1.2.3%eth0"),
    ):
        assert await operator(good, client=client, networks=networks) == "IP_NOT_ALLOWED", client
    for wrong in ({}, {"X-Admin-Api-Key": "x"}):
        assert await operator(wrong, client="10.2.0.1", networks=networks) == "IP_NOT_ALLOWED", "the address first"
        assert await operator(wrong, client="10.1.2.3", networks=networks) == "UNAUTHORIZED"
