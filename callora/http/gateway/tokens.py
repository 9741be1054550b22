"""Access tokens on a call: the signature checked once, everything else looked up as it is now."""

import hashlib
from collections import OrderedDict
from typing import Final

from callora.actors.catalogue import Catalogue
from callora.http.gateway.admission import Refused
from callora.ledger.clock import Clock
from callora.ledger.keys import KeyRecord
from callora.ledger.tokens import SignedToken, Signing, TokenInvalid, read_token

VERIFIED_MAX: Final = 50_000
"""Tokens whose signature is remembered, by their hash; the one checked longest ago is forgotten first."""


class AccessTokens:
    """Answers which key a token stands for."""

    def __init__(self, signing: Signing | None, catalogue: Catalogue, clock: Clock) -> None:
        """Args:
        signing: None: no token is taken.
        """
        self._signing = signing
        self._catalogue = catalogue
        self._clock = clock
        self._verified: OrderedDict[bytes, SignedToken] = OrderedDict()

    async def key(self, text: bytes) -> KeyRecord:
        """Return the key of a token, narrowed to what the token may do; whether the key itself lives is not asked.

        Raises:
            Refused: INVALID_TOKEN, TOKEN_EXPIRED or REVOKED_TOKEN.
            StoreUnavailable: the token is not known here and cannot be read now.
        """
        token = await self._catalogue.token(self._read(text))
        if token is None:
            raise Refused("INVALID_TOKEN", "The access token is not known")
        if token.revoked_at is not None:
            raise Refused("REVOKED_TOKEN", "The access token is revoked")
        if token.expires_at <= self._clock.now():
            raise Refused("TOKEN_EXPIRED", "The access token has expired; make a new one")
        return token.key

    def _read(self, text: bytes) -> SignedToken:
        digest = hashlib.sha256(text).digest()
        signed = self._verified.get(digest)
        if signed is None:
            if self._signing is None:
                raise Refused("INVALID_TOKEN", "No tokens are taken here: JWT_SECRET is not set")
            try:
                signed = read_token(self._signing, text)
            except TokenInvalid as error:
                raise Refused("INVALID_TOKEN", str(error)) from error
            self._verified[digest] = signed
            if len(self._verified) > VERIFIED_MAX:
                self._verified.popitem(last=False)
        return signed
