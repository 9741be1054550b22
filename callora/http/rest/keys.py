"""API keys as their owners see them: made, shown masked, changed, regenerated and revoked."""

from typing import Any

from callora.actors.keyring import KeySpec
from callora.actors.vaults import VaultOpening
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import PageQuery, invalid
from callora.http.rest.key_desk import KeyDesk, refuse
from callora.http.rest.key_forms import (
    ApiKeyCreate,
    ApiPath,
    KeyCreate,
    KeyList,
    KeyMade,
    KeyOut,
    KeyPatch,
    KeyPath,
    Regenerate,
    api_ids,
    endpoint_ids,
    ip_networks,
    once,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import ApiId, ApiKeyId, UserId, VaultId
from callora.store.reads.vaults import VaultReads


def keys_routes(desk: KeyDesk, vaults: VaultOpening, vault_reads: VaultReads) -> Routes:
    """Return the routes of keys, for their owners."""
    routes = Routes("Keys")
    _making_routes(routes, desk, vaults, vault_reads)
    _keeping_routes(routes, desk)
    return routes


def _making_routes(routes: Routes, desk: KeyDesk, vaults: VaultOpening, vault_reads: VaultReads) -> None:
    @routes.add(
        "POST",
        "/api/keys",
        access=Access.USER,
        body=KeyCreate,
        answers={201: KeyMade},
        problems=("VAULT_NOT_FOUND", "PLAN_ENDPOINT_NOT_ALLOWED"),
        aliases=("/api-keys",),
    )
    async def create_key(ask: Ask[Any, Any, KeyCreate]) -> Answer:
        """Make an API key; its secret is in this answer and nowhere else."""
        body = ask.body
        user_id = UserId(ask.user_id)
        if body.vaultId is not None and body.network is not None:
            raise invalid("body.vaultId", "Must not come with a network: the vault has its own", "INVALID_VALUE")
        wrong = desk.wrong_expiry(body.expiresAt)
        wrong += await desk.wrong_narrowing(user_id, body.allowedApis, body.allowedEndpoints)
        if body.vaultId is not None:
            found = await vault_reads.vault(VaultId(body.vaultId), user_id)
            if found is None:
                raise ProblemRaised("VAULT_NOT_FOUND", "You have no such vault")
            vault_id, network = VaultId(body.vaultId), str(found["network"])
        else:
            refuse(wrong)
            network = body.network or "testnet"
            vault_id = (await vaults.ensure(user_id, network)).vault_id
        refuse(wrong + await desk.wrong_rate(vault_id, body.rateLimitPerMinute))
        await desk.refuse_outside_plan(vault_id, body.allowedApis, body.allowedEndpoints)
        made = await desk.keyring.create(
            KeySpec(
                vault_id=vault_id,
                network=network,
                name=body.name,
                description=body.description,
                scopes=once(body.scopes),
                allowed_apis=api_ids(body.allowedApis),
                allowed_endpoints=endpoint_ids(body.allowedEndpoints),
                allowed_networks=ip_networks(body.allowedIps),
                rate_limit_per_minute=body.rateLimitPerMinute,
                monthly_credit_cap=body.monthlyCreditCap,
                expires_at=body.expiresAt,
            )
        )
        return Answer(await desk.made(made), 201)

    @routes.add(
        "POST",
        "/api/apis/{apiId}/keys",
        access=Access.USER,
        path_form=ApiPath,
        body=ApiKeyCreate,
        answers={201: KeyMade},
        problems=("NOT_FOUND", "PLAN_ENDPOINT_NOT_ALLOWED"),
    )
    async def create_api_key(ask: Ask[ApiPath, Any, ApiKeyCreate]) -> Answer:
        """Make a key for one published API.

        Anybody may: the key belongs to the caller and to his own vault, which is made where it is missing.
        """
        body = ask.body
        api_id = ApiId(ask.path.apiId)
        if not await desk.reads.api_is_published(api_id):
            raise ProblemRaised("NOT_FOUND", "No such API")
        vault_id = (await vaults.ensure(UserId(ask.user_id), body.network)).vault_id
        refuse(await desk.wrong_rate(vault_id, body.rateLimitPerMinute))
        await desk.refuse_outside_plan(vault_id, [api_id], None)
        made = await desk.keyring.create(
            KeySpec(
                vault_id=vault_id,
                network=body.network,
                name=body.name or f"API {api_id}",
                description=None,
                scopes=once(body.scopes),
                allowed_apis=[api_id],
                allowed_endpoints=None,
                allowed_networks=None,
                rate_limit_per_minute=body.rateLimitPerMinute,
                monthly_credit_cap=body.monthlyCreditCap,
                expires_at=None,
            )
        )
        return Answer(await desk.made(made), 201)


def _keeping_routes(routes: Routes, desk: KeyDesk) -> None:
    @routes.add("GET", "/api/keys", access=Access.USER, query=PageQuery, answers={200: KeyList}, aliases=("/api-keys",))
    async def list_keys(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your keys, the newest first, masked."""
        page = await desk.page(UserId(ask.user_id), ask.query)
        return Answer(KeyList(data=[desk.shown(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "GET",
        "/api/keys/{keyId}",
        access=Access.USER,
        path_form=KeyPath,
        answers={200: KeyOut},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}",),
    )
    async def get_key(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """One of your keys."""
        return Answer(desk.shown(await desk.row(ask.path.keyId, UserId(ask.user_id))))

    @routes.add(
        "PATCH",
        "/api/keys/{keyId}",
        access=Access.USER,
        path_form=KeyPath,
        body=KeyPatch,
        answers={200: KeyOut},
        problems=("API_KEY_NOT_FOUND", "CONFLICT", "PLAN_ENDPOINT_NOT_ALLOWED"),
        aliases=("/api-keys/{keyId}",),
    )
    async def change_key(ask: Ask[KeyPath, Any, KeyPatch]) -> Answer:
        """Change a key; calls obey from the next on."""
        user_id = UserId(ask.user_id)
        row = await desk.living_row(ask.path.keyId, user_id)
        if ask.body.rateLimitPerMinute != row["rate_limit_per_minute"]:
            wrong = await desk.wrong_rate(VaultId(str(row["vault_id"])), ask.body.rateLimitPerMinute)
        else:
            wrong = []
        return Answer(desk.shown(await desk.change(row, ask.body, user_id, wrong)))

    @routes.add(
        "DELETE",
        "/api/keys/{keyId}",
        access=Access.USER,
        path_form=KeyPath,
        answers={204: None},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}",),
    )
    async def delete_key(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """Revoke a key, for good.

        It stays listed, because its usage names it. Repeated, it changes nothing.
        """
        if not await desk.keyring.revoke(ApiKeyId(ask.path.keyId), UserId(ask.user_id)):
            raise ProblemRaised("API_KEY_NOT_FOUND")
        return Answer(status=204)

    @routes.add(
        "POST",
        "/api/keys/{keyId}/revoke",
        access=Access.USER,
        path_form=KeyPath,
        answers={200: KeyOut},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/revoke",),
    )
    async def revoke_key(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """Revoke a key, for good, and show it."""
        user_id = UserId(ask.user_id)
        if not await desk.keyring.revoke(ApiKeyId(ask.path.keyId), user_id):
            raise ProblemRaised("API_KEY_NOT_FOUND")
        return Answer(desk.shown(await desk.row(ask.path.keyId, user_id)))

    @routes.add(
        "POST",
        "/api/keys/{keyId}/regenerate",
        access=Access.USER,
        path_form=KeyPath,
        body=Regenerate,
        answers={200: KeyMade},
        problems=("API_KEY_NOT_FOUND", "CONFLICT"),
        aliases=("/api-keys/{keyId}/regenerate",),
    )
    async def regenerate_key(ask: Ask[KeyPath, Any, Regenerate]) -> Answer:
        """Give a key a new secret, shown once; everything else of it stays.

        The former secret, and every access token made so far, works for graceSeconds more, by default not at all.
        While a former secret still works, only a regeneration without a grace is carried out, which ends it.
        """
        user_id, key_id = UserId(ask.user_id), ApiKeyId(ask.path.keyId)
        row = await desk.living_row(key_id, user_id)
        made = await desk.keyring.regenerate(key_id, user_id, row["network"], ask.body.graceSeconds)
        if made is None:
            await desk.living_row(key_id, user_id)  # it may have been revoked meanwhile
            raise ProblemRaised("CONFLICT", "A former secret of this key still works; end it with graceSeconds 0")
        return Answer(await desk.made(made))
