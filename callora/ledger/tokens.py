"""Access tokens: short-lived credentials under an API key, for a page or a job that must not hold the key itself.

A token is signed and names its row and its key, nothing more. What it may do stands in the row, and is cut down to what
its key may do at the moment of each use: a key that was narrowed later narrows every token under it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import attrs
import jwt

from callora.ledger.ids import ApiId, ApiKeyId, TokenId
from callora.ledger.keys import KeyRecord
from callora.ledger.money import Stroops

TTL_SECONDS_MAX: Final = 3600
ALGORITHM: Final = "HS256"
KIND: Final = "call"
ALL_SCOPES: Final = "*"
_FORM: Final = re.compile(rb"eyJ[A-Za-z0-9_-]{1,500}\.eyJ[A-Za-z0-9_-]{1,1500}\.[A-Za-z0-9_-]{0,500}")


@attrs.frozen
class Signing:
    """What tokens are signed and checked with."""

    secret: str = attrs.field(repr=False)
    """At least 32 bytes."""
    issuer: str | None
    """`iss` of our tokens; where set, the only one that is taken."""
    audience: str | None


class TokenInvalid(ValueError):
    """Not a token of ours for calls, or not signed by us."""


@attrs.frozen
class SignedToken:
    """What a token says of itself. Whether it still holds stands in its row."""

    token_id: TokenId
    api_key_id: ApiKeyId


@attrs.frozen(slots=True)
class TokenRecord:
    """A token as the gateway knows it."""

    token_id: TokenId
    key: KeyRecord
    """Its key, narrowed to what the token may do."""
    expires_at: datetime
    revoked_at: datetime | None


def sign_token(
    signing: Signing, token_id: TokenId, api_key_id: ApiKeyId, issued_at: datetime, expires_at: datetime
) -> str:
    """Return the signed token. It names no person, so nothing but a call can be made with it."""
    claims: dict[str, Any] = {
        "type": KIND,
        "tid": token_id,
        "kid": api_key_id,
        "iat": int(issued_at.timestamp()),
        "exp": int(expires_at.timestamp()),
    }
    if signing.issuer is not None:
        claims["iss"] = signing.issuer
    if signing.audience is not None:
        claims["aud"] = signing.audience
    return jwt.encode(claims, signing.secret, ALGORITHM)


def is_token_shaped(text: bytes) -> bool:
    """Tell whether these bytes have the form of a signed token; says nothing about whose it is."""
    return _FORM.fullmatch(text) is not None


def read_token(signing: Signing, text: bytes) -> SignedToken:
    """Return what a token says, its signature checked; its times are its row's to tell.

    Raises:
        TokenInvalid: it is not signed by us, is for another audience, or is a token for something else.
    """
    try:
        claims: dict[str, Any] = jwt.decode(
            text,
            signing.secret,
            algorithms=[ALGORITHM],
            issuer=signing.issuer,
            audience=signing.audience,
            options={
                "require": ["exp"],
                "verify_exp": False,  # by our clock and the row
                "verify_nbf": False,
                "verify_iat": False,
                "verify_sub": False,
                "verify_aud": signing.audience is not None,
            },
        )
    except jwt.InvalidTokenError as error:
        raise TokenInvalid("The token is not valid") from error
    token_id, api_key_id = claims.get("tid"), claims.get("kid")
    if claims.get("type") != KIND or not isinstance(token_id, str) or not isinstance(api_key_id, str):
        raise TokenInvalid("This token is not for calls")
    return SignedToken(TokenId(token_id), ApiKeyId(api_key_id))


def narrow(
    key: KeyRecord, token_id: TokenId, scopes: frozenset[str], allowed_apis: frozenset[ApiId] | None, *, budgeted: bool
) -> KeyRecord:
    """Return the key as a token presents it: what both the key and the token allow.

    Args:
        scopes: `*` is every scope.
        allowed_apis: None for every API.
        budgeted: whether the token has a budget of its own.
    """
    apis = key.allowed_apis
    if allowed_apis is not None:
        apis = allowed_apis if apis is None else apis & allowed_apis
    return attrs.evolve(
        key,
        scopes=common_scopes(key.scopes, scopes),
        allowed_apis=apis,
        budget=token_id if budgeted else None,
    )


def common_scopes(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """Return the scopes that both sets have; `*` has every scope."""
    if ALL_SCOPES in one:
        return other
    return one if ALL_SCOPES in other else one & other


@attrs.frozen(slots=True)
class BudgetTaken:
    """The price is out of the token's budget."""

    left: Stroops


@attrs.frozen(slots=True)
class BudgetExhausted:
    """The token's budget does not cover the price; nothing was taken."""

    budget: Stroops
    left: Stroops


@attrs.frozen(slots=True)
class BudgetGone:
    """No such token, or it has no budget."""


BudgetOutcome = BudgetTaken | BudgetExhausted | BudgetGone


def grant(
    budget: Stroops, spent: Stroops, asked: Sequence[Stroops]
) -> tuple[Stroops, list[BudgetTaken | BudgetExhausted]]:
    """Decide what a budget pays for, first come first served.

    Args:
        spent: what is out of the budget already, with what was given back taken off.
        asked: what each call costs, in the order they came.

    Returns:
        What is spent then, at most the budget; and the outcome of each.
    """
    outcomes: list[BudgetTaken | BudgetExhausted] = []
    for amount in asked:
        left = Stroops(budget - spent)
        if amount > left:
            outcomes.append(BudgetExhausted(budget, left))
        else:
            spent = Stroops(spent + amount)
            outcomes.append(BudgetTaken(Stroops(left - amount)))
    return spent, outcomes
