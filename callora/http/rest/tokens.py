"""Access tokens: short-lived, signed, under a key, for who shall call without holding the key itself."""

from typing import Any

from pydantic import Field

from callora.actors.keyring import TokenSpec
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    InstantOut,
    Page,
    PageMeta,
    PageQuery,
    PositiveUsdc,
    UsdcOut,
    Uuid,
    iso,
    stroops,
    usdc,
)
from callora.http.rest.key_desk import KeyDesk, before_id, refuse
from callora.http.rest.key_forms import KeyPath, Numbers, Scopes, api_ids, moment, once
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import ApiKeyId, TokenId, UserId
from callora.ledger.tokens import ALL_SCOPES, TTL_SECONDS_MAX


class TokenPath(Form):
    """Which token of which key."""

    keyId: Uuid
    tokenId: Uuid


class TokenCreate(Form):
    """A new access token. It is never wider than its key, now or later."""

    ttl: int = Field(ge=1, le=TTL_SECONDS_MAX, description="How long it works, in seconds.")
    scopes: Scopes = Field([ALL_SCOPES], description="Of its key's; `*` is all that the key has.")
    apis: Numbers | None = Field(None, description="Of its key's; null for all that the key may use.")
    budget_usdc: PositiveUsdc | None = Field(None, description="What its calls may cost together; null for no bound.")


class TokenMade(Form):
    """A token."""

    token: str = Field(description="Send it to /v1/call as `Authorization: Bearer`. It is shown this once.")
    tokenId: str
    expiresAt: InstantOut = Field(description="No later than its key's.")


class TokenOut(Form):
    """A token as it stands, without what is presented."""

    tokenId: str
    scopes: list[str]
    apis: list[int] | None
    budget_usdc: UsdcOut | None
    spent_usdc: UsdcOut | None = Field(description="What is out of the budget; null without one.")
    createdAt: InstantOut
    expiresAt: InstantOut
    revokedAt: InstantOut | None


class TokenList(Form):
    """A page of a key's tokens, the newest first."""

    data: list[TokenOut]
    meta: PageMeta


def tokens_routes(desk: KeyDesk) -> Routes:
    """Return the routes of access tokens."""
    routes = Routes("Access tokens")
    keyring = desk.keyring

    @routes.add(
        "POST",
        "/api/keys/{keyId}/tokens",
        access=Access.USER,
        path_form=KeyPath,
        body=TokenCreate,
        answers={201: TokenMade},
        problems=("API_KEY_NOT_FOUND", "CONFLICT", "COMPONENT_NOT_CONFIGURED"),
        aliases=("/api-keys/{keyId}/tokens",),
    )
    async def create_token(ask: Ask[KeyPath, Any, TokenCreate]) -> Answer:
        """Make an access token under a key.

        It dies with its key, and when the key's secret is regenerated it dies with the former secret.
        """
        if not keyring.makes_tokens:
            raise ProblemRaised("COMPONENT_NOT_CONFIGURED", "Access tokens need JWT_SECRET")
        user_id, body = UserId(ask.user_id), ask.body
        row = await desk.living_row(ask.path.keyId, user_id)
        refuse(desk.wrong_token(row, body.scopes, body.apis))
        made = await keyring.mint_token(
            ApiKeyId(ask.path.keyId),
            user_id,
            TokenSpec(
                ttl_seconds=body.ttl,
                scopes=once(body.scopes),
                allowed_apis=api_ids(body.apis),
                budget=None if body.budget_usdc is None else stroops(body.budget_usdc),
            ),
        )
        if made is None:
            raise ProblemRaised("CONFLICT", "The key is disabled, expired or revoked")
        return Answer(TokenMade(token=made.token, tokenId=made.token_id, expiresAt=iso(made.expires_at)), 201)

    @routes.add(
        "GET",
        "/api/keys/{keyId}/tokens",
        access=Access.USER,
        path_form=KeyPath,
        query=PageQuery,
        answers={200: TokenList},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/tokens",),
    )
    async def list_tokens(ask: Ask[KeyPath, PageQuery, Any]) -> Answer:
        """A key's access tokens, the newest first; a day after they expired they are forgotten."""
        await desk.row(ask.path.keyId, UserId(ask.user_id))
        limit = ask.query.limit
        rows = await desk.reads.tokens(ApiKeyId(ask.path.keyId), before=before_id(ask.query.cursor), limit=limit + 1)
        page = Page.of(rows, limit, "token_id")
        return Answer(
            TokenList(
                data=[
                    TokenOut(
                        tokenId=str(row["token_id"]),
                        scopes=row["scopes"],
                        apis=row["allowed_apis"],
                        budget_usdc=None if row["budget"] is None else usdc(row["budget"]),
                        spent_usdc=None if row["budget"] is None else usdc(row["spent"]),
                        createdAt=iso(row["created_at"]),
                        expiresAt=iso(row["expires_at"]),
                        revokedAt=moment(row["revoked_at"]),
                    )
                    for row in page.rows
                ],
                meta=page.meta,
            )
        )

    @routes.add(
        "DELETE",
        "/api/keys/{keyId}/tokens/{tokenId}",
        access=Access.USER,
        path_form=TokenPath,
        answers={204: None},
        problems=("API_KEY_NOT_FOUND", "TOKEN_NOT_FOUND"),
        aliases=("/api-keys/{keyId}/tokens/{tokenId}",),
    )
    async def revoke_token(ask: Ask[TokenPath, Any, Any]) -> Answer:
        """Revoke an access token. Repeated, it changes nothing."""
        user_id, key_id = UserId(ask.user_id), ApiKeyId(ask.path.keyId)
        await desk.row(key_id, user_id)
        if not await keyring.revoke_token(TokenId(ask.path.tokenId), key_id, user_id):
            raise ProblemRaised("TOKEN_NOT_FOUND")
        return Answer(status=204)

    return routes
