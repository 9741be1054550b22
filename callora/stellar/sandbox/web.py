"""Requests and answers of the sandbox, between what reads a socket and what knows an answer."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import attrs

HAL: Final = "application/hal+json; charset=utf-8"
PROBLEM: Final = "application/problem+json; charset=utf-8"
JSON: Final = "application/json"
_PROBLEMS: Final = "https://stellar.org/horizon-errors/"


@attrs.frozen
class Request:
    """A request, read to its end."""

    method: str
    path: str
    """Without the query; `/` at least."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes

    @classmethod
    def make(cls, method: str, target: str, headers: Mapping[str, str], body: bytes) -> "Request":
        """Return the request for a target as the request line has it."""
        parts = urlsplit(target)
        return cls(method, parts.path or "/", dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body)

    def form(self) -> dict[str, str]:
        """Return the fields of its body; a body that is no form has none."""
        return dict(parse_qsl(self.body.decode("utf-8", "replace"), keep_blank_values=True))

    def under(self, prefix: str) -> "Request":
        """Return the request as it is without a prefix of its path."""
        assert self.path.startswith(prefix)
        return attrs.evolve(self, path=self.path[len(prefix) :] or "/")


@attrs.frozen
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    content_type: str = HAL
    headers: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class Stream:
    """An answer of server-sent events that ends with the connection."""

    chunks: AsyncIterator[bytes]


@attrs.frozen
class Dropped:
    """No answer: the connection ends."""


def document(value: Any, status: int = 200, content_type: str = HAL) -> Answer:
    """Return an answer with a JSON document."""
    return Answer(status, json.dumps(value).encode(), content_type)


def problem(status: int, kind: str, title: str, detail: str, **extras: Any) -> Answer:
    """Return a problem as Horizon tells it.

    Args:
        kind: the last part of its type, such as `not_found`.
    """
    told: dict[str, Any] = {"type": _PROBLEMS + kind, "title": title, "status": status, "detail": detail}
    if extras:
        told["extras"] = extras
    return document(told, status, PROBLEM)


def not_found() -> Answer:
    """Return Horizon's answer where there is nothing."""
    detail = (
        "The resource at the url requested was not found.  This usually occurs for one of two reasons:  The url"
        " requested is not valid, or no data in our database could be found with the parameters provided."
    )
    return problem(404, "not_found", "Resource Missing", detail)


def bad_request(field: str, reason: str) -> Answer:
    """Return Horizon's answer to a parameter that is wrong."""
    detail = "The request you sent was invalid in some way."
    return problem(400, "bad_request", "Bad Request", detail, invalid_field=field, reason=reason)
