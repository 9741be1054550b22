"""API keys as operators see them: everybody's."""

from typing import Any

from callora.http.problems import ProblemRaised
from callora.http.rest.key_desk import KeyDesk
from callora.http.rest.key_forms import AdminKeyList, AdminKeyOut, AdminKeyQuery, KeyPatch, KeyPath
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import ApiKeyId, UserId


def admin_keys_routes(desk: KeyDesk) -> Routes:
    """Return the routes of keys, for operators."""
    routes = Routes("Operators: keys")

    @routes.add(
        "GET",
        "/api/admin/keys",
        access=Access.ADMIN,
        query=AdminKeyQuery,
        answers={200: AdminKeyList},
        aliases=("/admin/api-keys",),
    )
    async def list_all_keys(ask: Ask[Any, AdminKeyQuery, Any]) -> Answer:
        """Everybody's keys, the newest first, masked."""
        query = ask.query
        user_id = None if query.userId is None else UserId(query.userId)
        page = await desk.page(user_id, query, active=query.active, plan_id=query.planId)
        return Answer(AdminKeyList(data=[desk.shown_to_operators(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "GET",
        "/api/admin/keys/{keyId}",
        access=Access.ADMIN,
        path_form=KeyPath,
        answers={200: AdminKeyOut},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/admin/api-keys/{keyId}",),
    )
    async def get_any_key(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """A key of anybody."""
        return Answer(desk.shown_to_operators(await desk.row(ask.path.keyId, None)))

    @routes.add(
        "PATCH",
        "/api/admin/keys/{keyId}",
        access=Access.ADMIN,
        path_form=KeyPath,
        body=KeyPatch,
        answers={200: AdminKeyOut},
        problems=("API_KEY_NOT_FOUND", "CONFLICT", "PLAN_ENDPOINT_NOT_ALLOWED"),
        aliases=("/admin/api-keys/{keyId}",),
    )
    async def change_any_key(ask: Ask[KeyPath, Any, KeyPatch]) -> Answer:
        """Change a key of anybody; its rate may exceed its plan's."""
        row = await desk.living_row(ask.path.keyId, None)
        return Answer(desk.shown_to_operators(await desk.change(row, ask.body, None, [])))

    @routes.add(
        "DELETE",
        "/api/admin/keys/{keyId}",
        access=Access.ADMIN,
        path_form=KeyPath,
        answers={204: None},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/admin/api-keys/{keyId}",),
    )
    async def delete_any_key(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """Revoke a key of anybody, for good."""
        if not await desk.keyring.revoke(ApiKeyId(ask.path.keyId), None):
            raise ProblemRaised("API_KEY_NOT_FOUND")
        return Answer(status=204)

    return routes
