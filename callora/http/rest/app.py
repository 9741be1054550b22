"""The REST surface: the Quart-Trio app, its errors as problem documents, and how it is served."""

import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
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
from callora.http.rest.auth import require_token
from callora.http.rest.deps import RestDeps
from callora.http.rest.frame import EXCHANGE, UNKNOWN_ROUTE, AsgiApp, Exchange, Frame, shielded
from callora.http.rest.health import Health
from callora.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE

__all__ = ["RestDeps", "create_app", "json_response", "serve_rest", "shielded"]

_UNIX = "unix:"


def exchange() -> Exchange:
    """Return the exchange of the request being handled."""
    return cast(Exchange, cast(dict[str, Any], request.scope)[EXCHANGE])


def json_response(document: Any, status: int = 200) -> Response:
    """Return the document as a compact JSON answer."""
    return Response(json.dumps(document, separators=(",", ":")), status, content_type=CONTENT_TYPE)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


class RestApp(QuartTrio):
    """Quart-Trio with one way from an exception to an answer, in place of its handlers by type.

    Of a group the framework would answer with the first member that has a handler and drop the rest unseen. Here a
    group is a problem only if every member is; else it is a defect, logged whole.
    """

    deps: RestDeps

    async def handle_user_exception(self, error: Exception | BaseExceptionGroup[Any]) -> Response:
        """Return the answer for whatever a route raised."""
        leaves = list(_leaves(error))
        if all(isinstance(leaf, ProblemRaised | HTTPException) for leaf in leaves):
            return self._problem(cast(ProblemRaised | HTTPException, leaves[0]))
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


def create_app(deps: RestDeps) -> QuartTrio:
    """Return the app with every REST route. Nothing is started, and nothing is shared with another app."""
    app = RestApp("callora", static_folder=None)
    app.deps = deps
    app.config["MAX_CONTENT_LENGTH"] = deps.settings.request_body_limit_bytes
    app.config["BODY_TIMEOUT"] = deps.settings.client_body_timeout_seconds
    # A path with a slash too many matches or is 404: redirects are answers that no client of an API asks for
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.before_request(_note_route)
    _add_health(app, Health(deps))
    _add_metrics(app, deps)
    app.asgi_app = Frame(cast(AsgiApp, app.asgi_app), deps)  # type: ignore[method-assign,assignment]
    return app


async def _note_route() -> None:
    """Note which route matched. A coroutine, because the framework would run a plain function in a thread."""
    exchange().route = request.url_rule.rule if request.url_rule is not None else UNKNOWN_ROUTE
    await trio.lowlevel.checkpoint()


def _add_health(app: QuartTrio, health: Health) -> None:
    @app.get("/api/health")
    async def get_health() -> Response:
        return json_response(*await health.report())

    @app.get("/livez")
    async def get_livez() -> Response:
        await trio.lowlevel.checkpoint()
        return json_response({"status": "ok"})

    @app.get("/readyz")
    async def get_readyz() -> Response:
        await health.require_ready()
        return json_response({"status": "ok"})

    @app.get("/healthz")
    async def get_healthz() -> Response:
        await trio.lowlevel.checkpoint()
        return json_response({"status": "ok"})


def _add_metrics(app: QuartTrio, deps: RestDeps) -> None:
    # One scrape at a time: rendering is work for the interpreter, and two would only slow each other and the calls
    rendering = trio.CapacityLimiter(1)

    @app.get("/metrics")
    @app.get("/api/metrics")
    async def get_metrics() -> Response:
        if deps.settings.is_production:
            require_token(request.headers.get("Authorization"), deps.settings.metrics_api_key)
        deps.refresh_metrics()
        text = await trio.to_thread.run_sync(deps.metrics.render, limiter=rendering)
        return Response(text, content_type=METRICS_CONTENT_TYPE)


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
