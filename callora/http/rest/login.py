"""Logging in with a Stellar wallet, and the sessions that follow.

Two ways prove that someone holds a wallet: a transaction that is never sent (SEP-10, `/auth`), and a signed message
(SEP-53, `/api/auth/wallet`). Both end in the same session: an access token for a quarter of an hour and a refresh token
that is used once.
"""

import re
from typing import Annotated, Any, Final, Literal, NoReturn

import trio
from pydantic import AfterValidator, Field, WithJsonSchema

from callora.actors.sessions import Granted, LoginRefused, Refusal, Sessions, Visitor
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    InstantOut,
    Page,
    PageMeta,
    PageQuery,
    Uuid,
    decode_cursor,
    invalid,
    iso,
)
from callora.http.rest.identity import ACCESS_SECONDS, TokenSettings, mint_access_token
from callora.http.rest.operations import Access, Answer, Ask, Routes, Text
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId
from callora.ledger.wallets import ADDRESS_PATTERN, is_address
from callora.store.reads.people import SessionReads

TOML: Final = "text/plain; charset=utf-8"
"""What SEP-1 recommends, so that a browser shows the file."""
_CHALLENGED: Final = {"WWW-Authenticate": "Bearer"}
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def _address(text: str) -> str:
    if not is_address(text):
        raise ValueError("must be the address of a Stellar account: G and 55 more characters, with a right checksum")
    return text


def _no_memo(text: str) -> str:
    if text:
        raise ValueError("memos are not supported: every user has a wallet of his own")
    return text


Address = Annotated[
    str,
    AfterValidator(_address),
    WithJsonSchema({"type": "string", "pattern": ADDRESS_PATTERN, "description": "A Stellar account, `G…`."}),
]


class WebAuthQuery(Form):
    """Who asks for a SEP-10 challenge."""

    account: Address
    home_domain: Annotated[str, Field(max_length=255)] | None = Field(
        default=None, description="If sent, the home domain of this service."
    )
    memo: Annotated[str, AfterValidator(_no_memo), WithJsonSchema({"type": "string", "maxLength": 0})] | None = Field(
        default=None, description="Not supported."
    )
    client_domain: Annotated[str, Field(max_length=255)] | None = Field(
        default=None, description="Accepted and ignored: clients' domains are not verified."
    )


class WebAuthChallenge(Form):
    """A SEP-10 challenge."""

    transaction: str = Field(description="Base64 XDR, signed by the SIGNING_KEY of stellar.toml; sign it as well.")
    network_passphrase: str


class WebAuthAnswer(Form):
    """A signed SEP-10 challenge."""

    transaction: str = Field(min_length=1, max_length=8192, description="Base64 XDR.")


class WalletQuery(Form):
    """Who asks for a message to sign."""

    walletAddress: Address


class WalletMessage(Form):
    """A message to sign."""

    message: str = Field(description="Sign exactly this, by SEP-53, and send it back as it is.")
    nonce: str
    expiresAt: InstantOut


class WalletLogin(Form):
    """A signed message."""

    walletAddress: Address
    signature: str = Field(min_length=1, max_length=256, description="64 bytes in base64, or in hexadecimal digits.")
    message: str = Field(min_length=1, max_length=2000)


class RefreshToken(Form):
    """A refresh token."""

    refreshToken: str = Field(min_length=1, max_length=512)


class LoggedInUser(Form):
    """Whose session it is."""

    id: Uuid
    walletAddress: str | None


class Login(Form):
    """A session's tokens."""

    accessToken: str = Field(description="For `Authorization: Bearer`.")
    refreshToken: str = Field(description="Gives the next pair, once. Used twice it ends the session.")
    tokenType: Literal["Bearer"] = "Bearer"
    expiresIn: int = Field(description="Seconds that the access token lasts.")
    user: LoggedInUser


class WebAuthLogin(Login):
    """A session's tokens, with the access token under the name that SEP-10 gives it as well."""

    token: str


class SessionPath(Form):
    """Which session."""

    sessionId: Uuid


class SessionOut(Form):
    """A session that can be used."""

    id: Uuid
    createdAt: InstantOut
    lastUsedAt: InstantOut = Field(description="When it began or was last refreshed.")
    expiresAt: InstantOut = Field(description="When it ends unless it is refreshed.")
    clientAddress: str
    userAgent: str
    current: bool = Field(description="Whether this request came with it.")


class SessionList(Form):
    """Sessions, the latest first."""

    data: list[SessionOut]
    meta: PageMeta


_REFUSALS: Final[dict[Refusal, str]] = {
    Refusal.CHALLENGE: "INVALID_CHALLENGE",
    Refusal.SIGNATURE: "INVALID_SIGNATURE",
    Refusal.UNKNOWN_TOKEN: "INVALID_REFRESH_TOKEN",
    Refusal.EXPIRED_TOKEN: "EXPIRED_TOKEN",
    Refusal.ENDED: "REVOKED_TOKEN",
}
_REFRESH_PROBLEMS: Final = (
    "INVALID_REFRESH_TOKEN",
    "EXPIRED_TOKEN",
    "REVOKED_TOKEN",
    "COMPONENT_NOT_CONFIGURED",
    "OUTCOME_UNKNOWN",
)


def _refuse(refused: LoginRefused) -> NoReturn:
    raise ProblemRaised(_REFUSALS[refused.why], refused.reason, headers=_CHALLENGED)


def _not_configured(name: str) -> ProblemRaised:
    return ProblemRaised("COMPONENT_NOT_CONFIGURED", f"Logging in needs {name}, which the operator has not set")


class _Tokens:
    """Makes the answer to a login."""

    def __init__(self, settings: TokenSettings | None, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    def require(self) -> TokenSettings:
        """Return what tokens are signed with.

        Raises:
            ProblemRaised: COMPONENT_NOT_CONFIGURED. Asked before anything is used up.
        """
        if self._settings is None:
            raise _not_configured("JWT_SECRET")
        return self._settings

    def fields(self, granted: Granted | LoginRefused) -> dict[str, Any]:
        """Return the fields of `Login`.

        Raises:
            ProblemRaised: the login was refused.
        """
        if isinstance(granted, LoginRefused):
            _refuse(granted)
        token = mint_access_token(
            self.require(), self._clock, granted.user_id, granted.session_id, granted.wallet_address
        )
        return {
            "accessToken": token,
            "refreshToken": granted.refresh_token,
            "expiresIn": ACCESS_SECONDS,
            "user": LoggedInUser(id=granted.user_id, walletAddress=granted.wallet_address),
        }


def _visitor(ask: Ask[Any, Any, Any]) -> Visitor:
    return Visitor(ask.exchange.client, ask.headers.get("User-Agent", ""))


def web_auth_routes(sessions: Sessions, tokens: TokenSettings | None, clock: Clock, endpoint: str) -> Routes:
    """Return SEP-1's file and SEP-10's two operations.

    Args:
        endpoint: the URL of `/auth` as wallets reach it.
    """
    routes = Routes("Login")
    made = _Tokens(tokens, clock)

    @routes.add(
        "GET",
        "/.well-known/stellar.toml",
        access=Access.PUBLIC,
        answers={200: Text(TOML, "TOML, by SEP-1")},
        problems=("COMPONENT_NOT_CONFIGURED",),
    )
    async def get_stellar_toml(_: Ask[Any, Any, Any]) -> Answer:
        """What wallets need to know to log in here, by SEP-1."""
        await trio.lowlevel.checkpoint()
        if sessions.web_auth is None:
            raise _not_configured("AUTH_SIGNING_SEED")
        return Answer(
            f'NETWORK_PASSPHRASE="{sessions.web_auth.network_passphrase}"\n'
            f'SIGNING_KEY="{sessions.web_auth.signing_key}"\n'
            f'WEB_AUTH_ENDPOINT="{endpoint}"\n'.encode()
        )

    @routes.add(
        "GET",
        "/auth",
        access=Access.PUBLIC,
        query=WebAuthQuery,
        answers={200: WebAuthChallenge},
        problems=("COMPONENT_NOT_CONFIGURED",),
    )
    async def get_web_auth_challenge(ask: Ask[Any, WebAuthQuery, Any]) -> Answer:
        """Ask for a SEP-10 challenge.

        A transaction that no network takes. Check that SIGNING_KEY signed it, sign it with the account's master key
        and send it back within 15 minutes; it gives one login.
        """
        await trio.lowlevel.checkpoint()
        made.require()
        web_auth = sessions.web_auth
        if web_auth is None:
            raise _not_configured("AUTH_SIGNING_SEED")
        if ask.query.home_domain not in (None, web_auth.home_domain):
            raise invalid("query.home_domain", f"Must be {web_auth.home_domain}", "INVALID_VALUE")
        if ask.query.account == web_auth.signing_key:
            raise invalid("query.account", "Must not be the server's own", "INVALID_VALUE")
        return Answer(
            WebAuthChallenge(
                transaction=web_auth.challenge(ask.query.account), network_passphrase=web_auth.network_passphrase
            )
        )

    @routes.add(
        "POST",
        "/auth",
        access=Access.PUBLIC,
        body=WebAuthAnswer,
        urlencoded=True,
        answers={200: WebAuthLogin},
        problems=("INVALID_CHALLENGE", "COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def post_web_auth(ask: Ask[Any, Any, WebAuthAnswer]) -> Answer:
        """Log in with a signed SEP-10 challenge."""
        made.require()
        if sessions.web_auth is None:
            raise _not_configured("AUTH_SIGNING_SEED")
        fields = made.fields(await sessions.log_in_by_transaction(ask.body.transaction, _visitor(ask)))
        return Answer(WebAuthLogin(token=fields["accessToken"], **fields))

    return routes


def login_routes(sessions: Sessions, tokens: TokenSettings | None, clock: Clock, reads: SessionReads) -> Routes:
    """Return the login by signed message and everything about sessions."""
    routes = Routes("Login")
    made = _Tokens(tokens, clock)

    @routes.add(
        "GET",
        "/api/auth/challenge",
        access=Access.PUBLIC,
        query=WalletQuery,
        answers={200: WalletMessage},
        problems=("COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def get_wallet_challenge(ask: Ask[Any, WalletQuery, Any]) -> Answer:
        """Ask for a message that a wallet signs to log in.

        It is good for one login within 5 minutes.
        """
        made.require()
        asked = await sessions.ask_wallet(ask.query.walletAddress)
        return Answer(WalletMessage(message=asked.message, nonce=asked.nonce, expiresAt=iso(asked.expires_at)))

    @routes.add(
        "POST",
        "/api/auth/wallet",
        access=Access.PUBLIC,
        body=WalletLogin,
        answers={200: Login},
        problems=("INVALID_CHALLENGE", "INVALID_SIGNATURE", "COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def log_in_with_wallet(ask: Ask[Any, Any, WalletLogin]) -> Answer:
        """Log in with a message signed by SEP-53.

        The first login of a wallet makes its user.
        """
        made.require()
        body = ask.body
        granted = await sessions.log_in_by_message(body.walletAddress, body.message, body.signature, _visitor(ask))
        return Answer(Login(**made.fields(granted)))

    @routes.add(
        "POST",
        "/api/auth/refresh",
        access=Access.PUBLIC,
        body=RefreshToken,
        answers={200: Login},
        problems=_REFRESH_PROBLEMS,
        aliases=("/api/refresh-token",),
    )
    async def refresh_session(ask: Ask[Any, Any, RefreshToken]) -> Answer:
        """Exchange a refresh token for the next pair of tokens.

        A refresh token is used once. Using it again, even at the same moment, ends the session and everything that was
        given under it: log in again.
        """
        made.require()
        return Answer(Login(**made.fields(await sessions.refresh(ask.body.refreshToken))))

    @routes.add(
        "POST",
        "/api/auth/revoke",
        access=Access.PUBLIC,
        body=RefreshToken,
        answers={204: None},
        problems=("OUTCOME_UNKNOWN",),
    )
    async def revoke_session(ask: Ask[Any, Any, RefreshToken]) -> Answer:
        """Log out: end the session of a refresh token, with its access tokens.

        Done as well where it has ended already, or never was.
        """
        await sessions.end_of_token(ask.body.refreshToken)
        return Answer(status=204)

    @routes.add("POST", "/api/auth/revoke-all", access=Access.USER, answers={204: None}, problems=("OUTCOME_UNKNOWN",))
    async def revoke_all_sessions(ask: Ask[Any, Any, Any]) -> Answer:
        """Log out everywhere: end every session of yours, this one too."""
        await sessions.end_all(UserId(ask.user_id))
        return Answer(status=204)

    @routes.add("GET", "/api/auth/sessions", access=Access.USER, query=PageQuery, answers={200: SessionList})
    async def list_sessions(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your sessions that can be used, the latest first."""
        position = decode_cursor(ask.query.cursor, str)
        before = position[0] if position is not None else None
        if before is not None and _UUID.fullmatch(before) is None:
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        limit = ask.query.limit
        rows = await reads.page(UserId(ask.user_id), clock.now(), before=before, limit=limit + 1)
        page = Page.of(rows, limit, "session_id")
        current = ask.identity.session_id if ask.identity is not None else None
        data = [
            SessionOut(
                id=str(row["session_id"]),
                createdAt=iso(row["created_at"]),
                lastUsedAt=iso(row["last_used_at"]),
                expiresAt=iso(row["expires_at"]),
                clientAddress=row["client_address"],
                userAgent=row["user_agent"],
                current=str(row["session_id"]) == current,
            )
            for row in page.rows
        ]
        return Answer(SessionList(data=data, meta=page.meta))

    @routes.add(
        "DELETE",
        "/api/auth/sessions/{sessionId}",
        access=Access.USER,
        path_form=SessionPath,
        answers={204: None},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def end_session(ask: Ask[SessionPath, Any, Any]) -> Answer:
        """End one of your sessions, with its access tokens. Ending it again does nothing."""
        if not await sessions.end(UserId(ask.user_id), ask.path.sessionId):
            raise ProblemRaised("NOT_FOUND", "No such session")
        return Answer(status=204)

    return routes
