"""The keyring: every change of API keys and their access tokens, in effect at once in this process.

Secrets exist here for the length of one answer. What is stored is a hash, and what is logged or metered is an id.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.catalogue import Catalogue
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, Ids, TokenId, UserId, VaultId
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import Stroops
from callora.ledger.tokens import Signing, sign_token
from callora.store import keys, tokens
from callora.store.bridge import Database
from callora.store.keys import KeyChange, Network

__all__ = ["KeyChange", "KeySpec", "Keyring", "MintedToken", "Network", "NewSecret", "TokenSpec"]

EXPIRED_TOKENS_KEPT: Final = timedelta(days=1)
"""How long an expired token is still listed, and is told that it has expired."""
_SWEEP_BATCH: Final = 10_000


@attrs.frozen
class KeySpec:
    """What a new key shall be."""

    vault_id: VaultId
    network: str
    """The vault's: testnet or mainnet."""
    name: str
    description: str | None
    scopes: Sequence[str]
    allowed_apis: Sequence[ApiId] | None
    allowed_endpoints: Sequence[EndpointId] | None
    allowed_networks: Sequence[Network] | None
    rate_limit_per_minute: int | None
    monthly_credit_cap: int | None
    """Credits of its vault's quota that it may burn in a calendar month."""
    expires_at: datetime | None


@attrs.frozen
class NewSecret:
    """A key with its secret, which is told once."""

    api_key_id: ApiKeyId
    secret: str = attrs.field(repr=False)


@attrs.frozen
class TokenSpec:
    """What a new access token shall be."""

    ttl_seconds: int
    scopes: Sequence[str]
    allowed_apis: Sequence[ApiId] | None
    budget: Stroops | None


@attrs.frozen
class MintedToken:
    """An access token, which is told once."""

    token_id: TokenId
    token: str = attrs.field(repr=False)
    expires_at: datetime


class Keyring:
    """Changes keys. Every method raises StoreUnavailable (nothing was written) or OutcomeUnknown (it may have been)."""

    def __init__(
        self,
        database: Database,
        catalogue: Catalogue,
        clock: Clock,
        ids: Ids,
        random_bytes: Callable[[int], bytes],
        signing: Signing | None,
        log: FilteringBoundLogger,
    ) -> None:
        """Args:
        signing: what access tokens are signed with; None: none are made.
        """
        self._database = database
        self._catalogue = catalogue
        self._clock = clock
        self._ids = ids
        self._random_bytes = random_bytes
        self._signing = signing
        self._log = log

    @property
    def makes_tokens(self) -> bool:
        """Whether access tokens can be made here."""
        return self._signing is not None

    async def create(self, spec: KeySpec) -> NewSecret:
        """Make a key for a vault."""
        secret = make_key(spec.network, self._random_bytes(RANDOM_BYTES))
        api_key_id = ApiKeyId(self._ids.uuid7())
        added = await keys.add_key(
            self._database,
            api_key_id=api_key_id,
            vault_id=spec.vault_id,
            key=secret,
            name=spec.name,
            now=self._clock.now(),
            scopes=spec.scopes,
            rate_limit_per_minute=spec.rate_limit_per_minute,
            expires_at=spec.expires_at,
            description=spec.description,
            allowed_apis=spec.allowed_apis,
            allowed_endpoints=spec.allowed_endpoints,
            allowed_networks=spec.allowed_networks,
            monthly_credit_cap=spec.monthly_credit_cap,
        )
        assert added, "a vault is never deleted, and never changes its network"
        return NewSecret(api_key_id, secret)

    async def change(self, api_key_id: ApiKeyId, user_id: UserId | None, change: KeyChange) -> bool:
        """Change a key; False when there is none, or when it is revoked.

        Args:
            user_id: whose key it must be; None for anybody's.
        """
        changed = await keys.change_key(self._database, api_key_id, user_id, change)
        await self._take_effect()
        return changed

    async def regenerate(
        self, api_key_id: ApiKeyId, user_id: UserId, network: str, grace_seconds: int
    ) -> NewSecret | None:
        """Give a key a new secret. Its former one, and every access token made so far, ends with the grace.

        Returns:
            None when there is no such key, when it is revoked, or when it is to leave a former secret behind while
            another still lives.
        """
        secret = make_key(network, self._random_bytes(RANDOM_BYTES))
        now = self._clock.now()
        former_until = now + timedelta(seconds=grace_seconds)
        renewed = await keys.regenerate_key(self._database, api_key_id, user_id, secret, former_until, now)
        await self._take_effect()
        return NewSecret(api_key_id, secret) if renewed else None

    async def revoke(self, api_key_id: ApiKeyId, user_id: UserId | None) -> bool:
        """Revoke a key, for good; False when there is none. Its access tokens end with it."""
        revoked = await keys.revoke_key(self._database, api_key_id, user_id, self._clock.now(), self._ids.uuid7)
        await self._take_effect()
        return revoked

    async def mint_token(self, api_key_id: ApiKeyId, user_id: UserId, spec: TokenSpec) -> MintedToken | None:
        """Make an access token under a living key of a user; None when he has no such key."""
        assert self._signing is not None
        now = self._clock.now()
        token_id = TokenId(self._ids.uuid7())
        expires_at = await tokens.add_token(
            self._database,
            user_id,
            tokens.NewToken(
                token_id=token_id,
                api_key_id=api_key_id,
                scopes=spec.scopes,
                allowed_apis=spec.allowed_apis,
                budget=spec.budget,
                created_at=now,
                expires_at=now + timedelta(seconds=spec.ttl_seconds),
            ),
        )
        if expires_at is None:
            return None
        return MintedToken(token_id, sign_token(self._signing, token_id, api_key_id, now, expires_at), expires_at)

    async def revoke_token(self, token_id: TokenId, api_key_id: ApiKeyId, user_id: UserId) -> bool:
        """Revoke an access token; False when the user's key has none of this id."""
        revoked = await tokens.revoke_token(self._database, token_id, api_key_id, user_id, self._clock.now())
        await self._take_effect()
        return revoked

    async def _take_effect(self) -> None:
        """Let the gateway see the change now; where it cannot look, it trusts nothing it keeps within a second."""
        try:
            await self._catalogue.refresh()
        except CalloraFault as fault:  # what was written stands, and its answer must not be lost
            self._log.warning("catalogue_not_refreshed", error=str(fault))

    async def forget_expired_tokens(self) -> None:
        """Delete access tokens that expired a while ago."""
        before = self._clock.now() - EXPIRED_TOKENS_KEPT
        while await tokens.drop_expired_tokens(self._database, before, _SWEEP_BATCH) == _SWEEP_BATCH:
            pass
