"""Wallets: real key pairs that log in over real sockets."""

import base64
from collections.abc import Mapping
from typing import Any

import attrs
import httpx
from stellar_sdk import Keypair, TransactionEnvelope

from callora.ledger.ids import UserId
from tests.support.rest import Person, Told, anonymous


@attrs.frozen
class Session:
    """Someone who is logged in."""

    person: Person
    access_token: str
    refresh_token: str
    user_id: UserId

    @property
    def client(self) -> httpx.AsyncClient:
        """What he asks with."""
        return self.person.client


@attrs.frozen
class Wallet:
    """Someone with a key of his own."""

    keypair: Keypair = attrs.field(factory=Keypair.random)

    @property
    def address(self) -> str:
        """`G…`."""
        return self.keypair.public_key

    def sign(self, message: str) -> str:
        """Return the signature of a message by SEP-53, in base64."""
        return base64.b64encode(self.keypair.sign_message(message)).decode()

    def sign_transaction(self, transaction: str, passphrase: str) -> str:
        """Return a challenge with the wallet's signature added."""
        envelope = TransactionEnvelope.from_xdr(transaction, passphrase)
        envelope.sign(self.keypair)
        return envelope.to_xdr()

    async def message(self, client: httpx.AsyncClient) -> str:
        """Return a message to sign."""
        told = await anonymous(client).ask("GET", "/api/auth/challenge", query={"walletAddress": self.address})
        assert told.status == 200, told.body
        return str(told.body["message"])

    async def answer(self, client: httpx.AsyncClient, message: str, /, **other: str) -> Told:
        """Return the answer to a login with this message, signed; `other` replaces fields of the body."""
        body = {"walletAddress": self.address, "signature": self.sign(message), "message": message, **other}
        return await anonymous(client).ask("POST", "/api/auth/wallet", body)

    async def log_in(self, client: httpx.AsyncClient) -> Session:
        """Log in by a signed message."""
        told = await self.answer(client, await self.message(client))
        assert told.status == 200, told.body
        return session(client, told.body)


def session(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Session:
    """Return the session that a login's or a refresh's answer gives."""
    user_id = UserId(body["user"]["id"])
    return Session(bearer(client, body["accessToken"], user_id), body["accessToken"], body["refreshToken"], user_id)


def bearer(client: httpx.AsyncClient, token: str, user_id: UserId | None = None) -> Person:
    """Return someone who presents a token."""
    return Person(client, {"Authorization": f"Bearer {token}"}, user_id)
