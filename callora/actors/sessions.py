"""Sessions: who logs in, for how long, and how a session is ended at once, everywhere.

A session is a family of refresh tokens, of which one is unused. Each use gives the next one; using a used one ends the
whole session, because one of the two that had it is a thief. That holds for two uses at the same moment as well: one
gets the next token, the other ends the session under it. What is not in PostgreSQL did not happen: every process sees
the same sessions, and a restart forgets nothing.
"""

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Final

import attrs
from structlog.typing import FilteringBoundLogger

from callora.ledger.clock import Clock
from callora.ledger.ids import Ids, UserId
from callora.stellar.proofs import ProofRefused, signed_message
from callora.store import sessions as store
from callora.store.bridge import Connection, Database

if TYPE_CHECKING:
    from callora.stellar.web_auth import WebAuth

REFRESH_SECONDS: Final = 7 * 86_400
"""How long a refresh token may wait to be used, and a session lasts without being used."""
MESSAGE_SECONDS: Final = 300
"""How long a wallet has to sign a message."""
KEPT_SECONDS: Final = 3600
"""How long what has expired is kept: longer than the clocks of two processes can differ."""
PURGE_BATCH: Final = 5000
_TOKEN_BYTES: Final = 32
_NONCE_BYTES: Final = 16
_PREFIX: Final = "crt_"
"""Tells a refresh token from everything else that looks random, for people and for scanners."""


@attrs.frozen
class Visitor:
    """Where a login comes from, as its owner will see it in the list of his sessions."""

    address: str
    agent: str


@attrs.frozen
class MessageToSign:
    """A challenge for SEP-53."""

    message: str
    nonce: str
    expires_at: datetime


@attrs.frozen
class Granted:
    """Someone is logged in."""

    user_id: UserId
    session_id: str
    wallet_address: str | None
    refresh_token: str = attrs.field(repr=False)


class Refusal(Enum):
    """Why nobody is logged in."""

    CHALLENGE = "challenge"
    """It is none of ours, is for another wallet, has expired, or was used before."""
    SIGNATURE = "signature"
    """The wallet did not sign exactly this."""
    UNKNOWN_TOKEN = "unknown token"  # noqa: S105 - a name
    """No such refresh token was issued, or so long ago that it is forgotten."""
    EXPIRED_TOKEN = "expired token"  # noqa: S105 - a name
    """The refresh token waited too long."""
    ENDED = "ended"
    """The session was ended, or ends now because its refresh token was used before."""


@attrs.frozen
class LoginRefused:
    """Nobody is logged in; where a session had to be ended for it, that is stored."""

    why: Refusal
    reason: str | None = None
    """What exactly is wrong, where there is more to say to the client."""


class Sessions:
    """Logs people in and out. Every method raises StoreUnavailable; those that write raise OutcomeUnknown as well.

    Cancellation: at any time; a change under way is then either stored whole or not at all.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        ids: Ids,
        random_bytes: Callable[[int], bytes],
        domain: str,
        web_auth: "WebAuth | None",
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        random_bytes: cryptographically strong.
        domain: what messages to sign say who asks.
        web_auth: the server's side of SEP-10, None where it is not configured.
        """
        self._database = database
        self._clock = clock
        self._ids = ids
        self._random_bytes = random_bytes
        self._domain = domain
        self.web_auth: Final = web_auth
        self._log = log

    async def ask_wallet(self, address: str) -> MessageToSign:
        """Return a message for a wallet to sign, good for one login within MESSAGE_SECONDS.

        Args:
            address: `G…`, with a right checksum.
        """
        now = self._clock.now()
        expires_at = now + timedelta(seconds=MESSAGE_SECONDS)
        nonce = self._random_bytes(_NONCE_BYTES).hex()
        message = _message(self._domain, address, nonce, now, expires_at)
        await store.add_challenge(self._database, _hash(message), address, expires_at)
        return MessageToSign(message, nonce, expires_at)

    async def log_in_by_message(
        self, address: str, message: str, signature: str, visitor: Visitor
    ) -> Granted | LoginRefused:
        """Log a wallet in that has signed a message of `ask_wallet` by SEP-53. A wrong signature uses nothing up."""
        if not signed_message(address, message, signature):
            return LoginRefused(Refusal.SIGNATURE)
        now = self._clock.now()
        async with self._database.transaction() as connection:
            if not await store.use_challenge(connection, _hash(message), address, now):
                return LoginRefused(Refusal.CHALLENGE)
            return await self._log_in(connection, address, visitor, now)

    async def log_in_by_transaction(self, transaction: str, visitor: Visitor) -> Granted | LoginRefused:
        """Log a wallet in that has signed a challenge of SEP-10; one challenge gives one login."""
        assert self.web_auth is not None
        now = self._clock.now()
        proof = self.web_auth.verify(transaction, now)
        if isinstance(proof, ProofRefused):
            return LoginRefused(Refusal.CHALLENGE, proof.reason)
        async with self._database.transaction() as connection:
            if not await store.claim_challenge(connection, proof.challenge_hash, proof.address, proof.expires_at, now):
                return LoginRefused(Refusal.CHALLENGE, "The challenge was used before")
            return await self._log_in(connection, proof.address, visitor, now)

    async def refresh(self, token: str) -> Granted | LoginRefused:
        """Give the next refresh token of a session for an unused one; a used one ends the session."""
        now = self._clock.now()
        digest = _hash(token)
        async with self._database.transaction() as connection:
            session_id = await store.use_refresh_token(connection, digest, now)
            if session_id is None:
                return await self._refuse_token(connection, digest, now)
            expires_at = now + timedelta(seconds=REFRESH_SECONDS)
            session = await store.prolong(connection, session_id, now, expires_at)
            if session is None:
                return LoginRefused(Refusal.ENDED)
            following = await self._add_token(connection, session_id, now, expires_at)
            return Granted(UserId(str(session["user_id"])), session_id, session["wallet_address"], following)

    async def open_for(self, user_id: UserId, visitor: Visitor, seconds: int) -> str:
        """Open a session without a refresh token, which ends by itself, and return its id. For `callora dev`."""
        now = self._clock.now()
        session = self._session(user_id, visitor, now, now + timedelta(seconds=seconds))
        async with self._database.transaction() as connection:
            await store.add_session(connection, session)
        return session.session_id

    async def end_of_token(self, token: str) -> None:
        """End the session of a refresh token; done also where there is none."""
        await store.end_session_of_token(self._database, _hash(token), self._clock.now())

    async def end(self, user_id: UserId, session_id: str) -> bool:
        """End a session of this user's; False where he has no such session."""
        return await store.end_own_session(self._database, session_id, user_id, self._clock.now())

    async def end_all(self, user_id: UserId) -> None:
        """End every session of this user, whoever asks with which of them."""
        await store.end_all_sessions(self._database, user_id, self._clock.now())

    async def purge(self) -> None:
        """Delete what has expired KEPT_SECONDS ago."""
        before = self._clock.now() - timedelta(seconds=KEPT_SECONDS)
        while await store.purge(self._database, before, PURGE_BATCH) >= PURGE_BATCH:
            pass

    async def _log_in(self, connection: Connection, address: str, visitor: Visitor, now: datetime) -> Granted:
        user_id = await store.ensure_wallet_user(connection, UserId(self._ids.uuid7()), address, now)
        expires_at = now + timedelta(seconds=REFRESH_SECONDS)
        session = self._session(user_id, visitor, now, expires_at)
        await store.add_session(connection, session)
        token = await self._add_token(connection, session.session_id, now, expires_at)
        return Granted(user_id, session.session_id, address, token)

    def _session(self, user_id: UserId, visitor: Visitor, now: datetime, expires_at: datetime) -> store.NewSession:
        return store.NewSession(self._ids.uuid7(), user_id, visitor.address, visitor.agent, now, expires_at)

    async def _add_token(self, connection: Connection, session_id: str, now: datetime, expires_at: datetime) -> str:
        noise = base64.urlsafe_b64encode(self._random_bytes(_TOKEN_BYTES)).decode().rstrip("=")
        token = _PREFIX + noise
        await store.add_refresh_token(connection, _hash(token), session_id, now, expires_at)
        return token

    async def _refuse_token(self, connection: Connection, digest: bytes, now: datetime) -> LoginRefused:
        known = await store.find_refresh_token(connection, digest)
        if known is None:
            return LoginRefused(Refusal.UNKNOWN_TOKEN)
        if not known.used:
            return LoginRefused(Refusal.EXPIRED_TOKEN)
        await store.end_session(connection, known.session_id, now, "reuse")
        self._log.warning("refresh_token_reused", session_id=known.session_id)
        return LoginRefused(Refusal.ENDED)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _message(domain: str, address: str, nonce: str, now: datetime, expires_at: datetime) -> str:
    """Return what the wallet shows its owner. ASCII alone: not every wallet shows the rest as it is."""
    return (
        f"{domain} asks you to log in to Callora with your Stellar account\n"
        f"{address}\n\n"
        "Signing moves no money and costs nothing.\n\n"
        f"Nonce: {nonce}\n"
        f"Issued at: {_instant(now)}\n"
        f"Expires at: {_instant(expires_at)}"
    )


def _instant(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
