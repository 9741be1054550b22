"""The OpenAPI document and the page that shows it."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import trio

from callora.http.rest.document import make_document
from callora.http.rest.operations import Access, Answer, Ask, Operation, Routes, Text
from callora.http.rest.reference import CONTENT_SECURITY_POLICY, render

JSON: Final = "application/json"
HTML: Final = "text/html; charset=utf-8"


def document_routes(operations: Callable[[], Sequence[Operation]], version: str) -> Routes:
    """Return the route of the document.

    Args:
        operations: every operation of the app, these among them.
        version: of the API.
    """
    routes = Routes("Document")

    @cache
    def document() -> dict[str, Any]:
        return make_document(operations(), version=version)

    @cache
    def as_json() -> bytes:
        return json.dumps(document(), separators=(",", ":")).encode()

    @cache
    def as_page() -> bytes:
        return render(document())

    @routes.add("GET", "/api/openapi.json", access=Access.PUBLIC, answers={200: Text(JSON, "OpenAPI 3.1")})
    async def get_openapi(_: Ask[Any, Any, Any]) -> Answer:
        """This document."""
        await trio.lowlevel.checkpoint()
        return Answer(as_json())

    @routes.add(
        "GET", "/api/docs", access=Access.PUBLIC, answers={200: Text(HTML, "The reference page")}, aliases=("/docs",)
    )
    async def get_docs(_: Ask[Any, Any, Any]) -> Answer:
        """The reference page, made of this document."""
        await trio.lowlevel.checkpoint()
        return Answer(as_page(), headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    return routes
