"""The REST surface: the Quart-Trio app, its errors as problem documents, and how it is served."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import Framework
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from callora.http.problems import CONTENT_TYPE, PROBLEMS, ProblemRaised, problem_body, problem_for_status
from callora.http.rest.deps import RestDeps
from callora.http.rest.frame import EXCHANGE, UNKNOWN_ROUTE, AsgiApp, Exchange, Frame, shielded
from callora.http.rest.operations import Doors, Operation, Text, bind
from callora.ledger.faults import (
    ChainMismatch,
    ChainUnavailable,
    OutcomeUnknown,
    StoreConflict,
    StoreUnavailable,
    leaves_of,
)

__all__ = ["RestDeps", "create_app", "serve_rest", "shielded"]

_UNIX = "unix:"
_BACKLOG = 2048
"""A full queue of a UNIX socket refuses at once: streams come back all together after a restart."""


def exchange() -> Exchange:
    """Return the exchange of the request being handled."""
    return cast(Exchange, cast(dict[str, Any], request.scope)[EXCHANGE])


class RestApp(QuartTrio):
    """Quart-Trio with one way from an exception to an answer, in place of its handlers by type.

    Of a group the framework would answer with the first member that has a handler and drop the rest unseen. Here a
    group is a problem only if every member is; else it is a defect, logged whole.
    """

    deps: RestDeps

    async def handle_user_exception(self, error: Exception | BaseExceptionGroup[Any]) -> Response:
        """Return the answer for whatever a route raised."""
        leaves = list(leaves_of(error))
        if all(isinstance(leaf, ProblemRaised | HTTPException) for leaf in leaves):
            return self._problem(cast(ProblemRaised | HTTPException, leaves[0]))
        if all(isinstance(leaf, StoreUnavailable | StoreConflict) for leaf in leaves):
            return self._problem(ProblemRaised("SERVICE_UNAVAILABLE", headers={"Retry-After": "1"}))
        if all(isinstance(leaf, ChainUnavailable | ChainMismatch) for leaf in leaves):
            waits = [leaf.retry_after_seconds or 1.0 for leaf in leaves if isinstance(leaf, ChainUnavailable)]
            retry = {"Retry-After": str(math.ceil(max(waits)))} if waits else {}
            return self._problem(ProblemRaised("NETWORK_UNAVAILABLE", headers=retry))
        if all(isinstance(leaf, OutcomeUnknown) for leaf in leaves):
            return self._problem(ProblemRaised("OUTCOME_UNKNOWN"))
        if all(isinstance(leaf, trio.TooSlowError) for leaf in leaves):
            return self._problem(ProblemRaised("GATEWAY_TIMEOUT", "The request took too long"))
        self.deps.logger.error(
            "request failed", request_id=exchange().request_id, route=exchange().route, exc_info=error
        )
        return self._problem(ProblemRaised("INTERNAL_SERVER_ERROR"))

    async def handle_exception(self, error: Exception) -> Response:
        """Return the answer for what went wrong around a route."""
        return await self.handle_user_exception(error)

    def _problem(self, error: ProblemRaised | HTTPException) -> Response:
        if isinstance(error, HTTPException):
            raised = ProblemRaised(problem_for_status(error.code or 500).code)
            if isinstance(error, MethodNotAllowed) and error.valid_methods:
                raised.headers["Allow"] = ", ".join(sorted(error.valid_methods))
            error = raised
        body = problem_body(error.problem.code, error.message, exchange().request_id, error.details)
        return Response(body, PROBLEMS[error.problem.code].status, error.headers, content_type=CONTENT_TYPE)


def create_app(deps: RestDeps, operations: Sequence[Operation], doors: Doors) -> QuartTrio:
    """Return the app with these routes. Nothing is started, and nothing is shared with another app."""
    app = RestApp("callora", static_folder=None)
    app.deps = deps
    larger = larger_bodies(operations, deps.settings.request_body_limit_bytes)
    app.config["MAX_CONTENT_LENGTH"] = max(deps.settings.request_body_limit_bytes, *larger.values(), 0)
    app.config["BODY_TIMEOUT"] = deps.settings.client_body_timeout_seconds
    # A path with a slash too many matches or is 404: redirects are answers that no client of an API asks for
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.before_request(_note_route)
    bind(app, operations, doors)
    app.asgi_app = Frame(cast(AsgiApp, app.asgi_app), deps, larger)  # type: ignore[method-assign,assignment]
    return app


def stream_paths(operations: Sequence[Operation]) -> frozenset[str]:
    """Return the paths whose answers last: each such answer keeps a connection for as long as its client stays."""
    return frozenset(
        each.path
        for each in operations
        if any(isinstance(answer, Text) and answer.endless for answer in each.answers.values())
    )


def larger_bodies(operations: Sequence[Operation], request_body_limit_bytes: int) -> dict[str, int]:
    """Return the paths that take a larger request body than all others, each with its limit in bytes."""
    return {
        each.path: max(each.body_bytes_max, request_body_limit_bytes)
        for each in operations
        if each.body_bytes_max is not None
    }


async def _note_route() -> None:
    """Note which route matched. A coroutine, because the framework would run a plain function in a thread."""
    exchange().route = request.url_rule.rule if request.url_rule is not None else UNKNOWN_ROUTE
    await trio.lowlevel.checkpoint()


async def serve_rest(
    app: QuartTrio,
    *,
    binds: Sequence[str],
    logger: logging.Logger,
    shutdown: Callable[[], Awaitable[None]],
    graceful_timeout_seconds: float,
    keep_alive_seconds: float,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the app until it is told to end; report the bound addresses as started.

    Args:
        app: what `create_app` returned.
        binds: `unix:/path`, `fd://N` (which is then owned here) or `host:port`; port 0 lets the system choose.
        logger: where the server's own records go; `Logs.stdlib_logger` makes one.
        shutdown: returns when serving shall end. New connections are refused from then on, idle ones closed, and
            running requests may finish.
        graceful_timeout_seconds: how long they may take; then they are cancelled.
        keep_alive_seconds: how long a connection may stay idle; longer than the listener in front keeps its own, so
            that a request never meets a closing connection.

    Raises:
        OSError: an address cannot be bound, in an exception group.

    Cancellation: running requests are cancelled at once.
    """
    config = Config()
    config.bind = list(binds)
    config.backlog = _BACKLOG
    config.umask = 0o177  # a UNIX socket is for this process's user alone
    config.include_server_header = False
    config.graceful_timeout = graceful_timeout_seconds
    config.keep_alive_timeout = keep_alive_seconds
    config.errorlog = logger
    config.accesslog = None
    served = cast(Framework, shielded(cast(AsgiApp, app)))
    server = partial(serve, served, config, shutdown_trigger=shutdown, mode="asgi")
    try:
        async with trio.open_nursery() as nursery:
            task_status.started(await nursery.start(server))
    finally:
        with trio.CancelScope(shield=True):
            for bind in binds:
                if bind.startswith(_UNIX):
                    with suppress(OSError):
                        await trio.Path(bind.removeprefix(_UNIX)).unlink(missing_ok=True)
