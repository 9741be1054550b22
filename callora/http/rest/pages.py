"""The OpenAPI document and the page that shows it."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import trio

from callora.http.rest.document import make_document
from callora.http.rest.operations import Access, Answer, Ask, Operation, Routes, Text

JSON: Final = "application/json"


def document_routes(operations: Callable[[], Sequence[Operation]], version: str) -> Routes:
    """Return the route of the document.

    Args:
        operations: every operation of the app, these among them.
        version: of the API.
    """
    routes = Routes("Document")

    @cache
    def document() -> bytes:
        return json.dumps(make_document(operations(), version=version), separators=(",", ":")).encode()

    @routes.add("GET", "/api/openapi.json", access=Access.PUBLIC, answers={200: Text(JSON, "OpenAPI 3.1")})
    async def get_openapi(_: Ask[Any, Any, Any]) -> Answer:
        """This document."""
        await trio.lowlevel.checkpoint()
        return Answer(document())

    return routes
