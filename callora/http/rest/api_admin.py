"""What operators see of anyone's APIs, and how they take one out of sight."""

from typing import Any

from pydantic import Field

from callora.http.rest.api_forms import ApiPath
from callora.http.rest.api_views import AdminApi, AdminApis, admin_api
from callora.http.rest.apis import Shop, after_of, no_such_api, page_of
from callora.http.rest.forms import Flag, PageQuery, Uuid
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.offers import ApiRef, Status
from callora.store.reads import apis as reads


class AdminQuery(PageQuery):
    """Which APIs."""

    search: str | None = Field(default=None, min_length=1, max_length=100, description="In name and slug.")
    status: Status | None = None
    deleted: Flag | None = Field(default=None, description="Only those that are deleted, or only those that are not.")
    developer_id: Uuid | None = None


def api_admin_routes(shop: Shop) -> Routes:
    """Return what operators do to APIs."""
    routes = Routes("Operators: APIs")

    @routes.add("GET", "/api/admin/apis", access=Access.ADMIN, query=AdminQuery, answers={200: AdminApis})
    async def list_all_apis(ask: Ask[Any, AdminQuery, Any]) -> Answer:
        """Everyone's APIs, deleted ones among them, newest first."""
        query = ask.query
        filters = reads.AdminFilters(query.search, query.status, query.deleted, query.developer_id)
        rows = await reads.list_all(shop.database, filters, after_of(query.cursor), query.limit + 1, shop.clock.now())
        page = page_of(rows, query.limit)
        return Answer(AdminApis(data=[admin_api(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "DELETE",
        "/api/admin/apis/{apiId}",
        access=Access.ADMIN,
        path_form=ApiPath,
        answers={204: None},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def delete_api(ask: Ask[ApiPath, Any, Any]) -> Answer:
        """Take an API out of everyone's sight, its developer's too; calls of it are answered 404 at once.

        Its rows stay, and with them what was called and paid. Deleting it again changes nothing.
        """
        if not await shop.publisher.delete(ApiRef.parse(ask.path.apiId)):
            raise no_such_api()
        return Answer(status=204)

    @routes.add(
        "POST",
        "/api/admin/apis/{apiId}/restore",
        access=Access.ADMIN,
        path_form=ApiPath,
        answers={200: AdminApi},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def restore_api(ask: Ask[ApiPath, Any, Any]) -> Answer:
        """Give a deleted API back, as it was."""
        ref = ApiRef.parse(ask.path.apiId)
        if not await shop.publisher.restore(ref):
            raise no_such_api()
        rows = await reads.list_all(shop.database, reads.AdminFilters(ref=ref), None, 1, shop.clock.now())
        return Answer(admin_api(rows[0]))

    return routes
