"""The demo upstream: the API that `callora dev` publishes, so that a first call has something to pay for; and how any
such upstream is served.

It owns no state and no clock: the weather of a city follows from its name, so the same call gives the same answer.
"""

import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final

import hypercorn.config
import hypercorn.trio
import trio
from quart import Response, json, jsonify, request
from quart_trio import QuartTrio

EVENTS: Final = 5
EVENT_SECONDS: Final = 0.2
FORECAST_DAYS_MAX: Final = 14
_SKIES: Final = ("clear", "clouds", "rain", "snow", "fog")


def _weather(city: str, day: int = 0) -> dict[str, Any]:
    """Return the weather of a city, `day` days from today."""
    seed = hashlib.sha256(f"{city.casefold()}/{day}".encode()).digest()
    return {"city": city, "day": day, "celsius": seed[0] % 45 - 10, "sky": _SKIES[seed[1] % len(_SKIES)]}


def make_weather() -> QuartTrio:
    """Return the weather API."""
    app = QuartTrio(__name__)

    @app.get("/current")
    async def current() -> Response:
        await trio.lowlevel.checkpoint()
        return jsonify(_weather(request.args.get("city", "Lisbon")))

    @app.get("/forecast")
    async def forecast() -> tuple[Response, int]:
        await trio.lowlevel.checkpoint()
        days = request.args.get("days", "3")
        if not (days.isascii() and days.isdigit() and len(days) <= 2 and 1 <= int(days) <= FORECAST_DAYS_MAX):
            return jsonify(error=f"days must be a number from 1 to {FORECAST_DAYS_MAX}"), 400
        city = request.args.get("city", "Lisbon")
        return jsonify(city=city, days=[_weather(city, day) for day in range(1, int(days) + 1)]), 200

    @app.post("/reports/<city>")
    async def report(city: str) -> tuple[Response, int]:
        body = await request.get_data(as_text=False)
        assert isinstance(body, bytes)
        digest = hashlib.sha256(body).hexdigest()
        content = None
        with contextlib.suppress(ValueError):  # not UTF-8, or not JSON
            content = json.loads(body)
        receipt = {"receipt": digest[:16], "city": city, "bytes": len(body), "sha256": digest, "report": content}
        return jsonify(receipt), 201

    @app.get("/events")
    async def events() -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for number in range(1, EVENTS + 1):
                if number > 1:
                    await trio.sleep(EVENT_SECONDS)
                data = json.dumps(_weather("Lisbon", number))
                yield f"id: {number}\nevent: weather\ndata: {data}\n\n".encode()

        await trio.lowlevel.checkpoint()
        response = Response(stream(), content_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        response.timeout = None
        return response

    async def echo(_: Exception) -> tuple[Response, int]:
        await request.get_data()
        query = request.query_string.decode("latin-1")
        return jsonify(method=request.method, path=request.path, query=query), 200

    # Any other path, and any other method on the paths above.
    app.register_error_handler(404, echo)
    app.register_error_handler(405, echo)
    return app


def _answering(app: QuartTrio) -> Callable[..., Awaitable[None]]:
    """Return the app with its last send shielded.

    Hypercorn puts `http.disconnect` before it closes the socket; Quart-Trio then cancels the request, and with it the
    close, so a client that sent `Connection: close` would wait for an end that never comes.
    """

    async def send_shielded(send: Callable[[Any], Awaitable[None]], message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await send(message)
        else:
            await send(message)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, partial(send_shielded, send) if scope["type"] == "http" else send)

    return asgi


async def serve_demo_upstream(
    *,
    make_app: Callable[[], QuartTrio] = make_weather,
    port: int = 0,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a demo API on 127.0.0.1 until cancelled.

    Args:
        make_app: which.
        port: where to listen; 0 takes a free one.
        task_status: `started` is given the base URL, such as `http://127.0.0.1:49152`, once connections are accepted.

    Raises:
        OSError: the port is taken (inside an exception group).

    Cancellation: closes the listener and every connection at once, without waiting for answers under way.
    """
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = None
    config.loglevel = "WARNING"
    config.include_server_header = False
    app: Any = _answering(make_app())
    async with trio.open_nursery() as nursery:
        binds = await nursery.start(partial(hypercorn.trio.serve, app, config))
        task_status.started(binds[0])
