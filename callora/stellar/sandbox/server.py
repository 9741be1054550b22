"""The sandbox on one port: Horizon at `/`, RPC at `/rpc`, more nodes under `/nodes/…`, its controls under `/sandbox`.

HTTP/1.1 is read and written with h11 on Trio's streams, because a stand-in must also be able to do what no web
framework does: to end a connection instead of answering.
"""

import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, TypeAlias

import attrs
import h11
import trio

from callora.stellar.sandbox.faults import Fault, FaultInvalid, FaultPlan, control, fault_of
from callora.stellar.sandbox.horizon import Horizon
from callora.stellar.sandbox.jsonrpc import PARSE_ERROR, error_document
from callora.stellar.sandbox.ledger import SandboxLedger, SandboxNode
from callora.stellar.sandbox.state import Node
from callora.stellar.sandbox.web import (
    JSON,
    PROBLEM,
    Answer,
    Dropped,
    Request,
    Stream,
    document,
    not_found,
    problem,
)

BODY_BYTES_MAX: Final = 2 * 1024 * 1024
READ_SECONDS: Final = 60.0
_CHUNK: Final = 65_536
_TITLES: Final = {429: "Rate Limit Exceeded", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Timeout"}

AnswerRpc: TypeAlias = Callable[[Node, Any], Awaitable[Any]]
"""What answers a JSON-RPC document on behalf of a node; None where there is nothing to say."""
Helper: TypeAlias = Callable[[Request], Awaitable[Answer]]
"""What answers a route that belongs to no node: friendbot, the faucet."""


class SandboxHttp:
    """What answers every request of a sandbox, whatever carried it here."""

    def __init__(
        self,
        ledger: SandboxLedger,
        nodes: Mapping[str, SandboxNode],
        answer_rpc: AnswerRpc,
        helpers: Mapping[str, Helper],
        plan: FaultPlan,
    ) -> None:
        """Make one.

        Args:
            nodes: by name; the first one is at `/` as well.
            helpers: by path, for GET and POST.
        """
        self.ledger = ledger
        self.nodes = nodes
        self.plan = plan
        self.base = ""
        """Its own address, without a slash at its end, once it is known: for links."""
        self._answer_rpc = answer_rpc
        self._helpers = helpers

    async def answer(self, request: Request) -> Answer | Stream | Dropped:
        """Return the answer to a request, or what becomes of it by the plan."""
        if request.path.startswith("/sandbox"):
            await trio.lowlevel.checkpoint()
            return self._controlled(request)
        helper = self._helpers.get(request.path)
        if helper is not None:
            return await helper(request)
        name, base = next(iter(self.nodes)), self.base
        if request.path.startswith("/nodes/"):
            name = request.path.split("/")[2]
            if name not in self.nodes:
                await trio.lowlevel.checkpoint()
                return not_found()
            base += f"/nodes/{name}"
            request = request.under(f"/nodes/{name}")
        return await self._answer_of(self.nodes[name], base, request)

    async def _answer_of(self, node: SandboxNode, base: str, request: Request) -> Answer | Stream | Dropped:
        rpc = request.path == "/rpc" and request.method == "POST"
        method = _rpc_method(request.body) if rpc else f"{request.method} {request.path}"
        fault = self.plan.take(node.name, method)
        if fault is not None and fault.stage == "before":
            await trio.sleep(fault.seconds)
            if fault.kind in _SPOILING:
                return _spoiled(fault, request)
            if fault.kind != "delay":
                setattr(node, _COUNTS[fault.kind], getattr(node, _COUNTS[fault.kind]) + 1)
        answer = await self._rpc(node, request) if rpc else await Horizon(node, base).answer(request)
        if fault is not None and fault.stage == "after":
            await trio.sleep(fault.seconds)
            if fault.kind in _SPOILING:
                return _spoiled(fault, request)
        return answer

    async def _rpc(self, node: SandboxNode, request: Request) -> Answer:
        try:
            told = json.loads(request.body)
        except ValueError:
            await trio.lowlevel.checkpoint()
            return document(error_document(None, PARSE_ERROR, "Parse error"), content_type=JSON)
        answer = await self._answer_rpc(node, told)
        return document(answer, content_type=JSON) if answer is not None else Answer(204, b"", JSON)

    def _controlled(self, request: Request) -> Answer:
        route = (request.method, request.path.removeprefix("/sandbox"))
        try:
            if route == ("POST", "/faults"):
                told = _object(request)
                self.plan.add(*(fault_of(each) for each in told.get("faults", [told])))
            elif route == ("DELETE", "/faults"):
                self.plan.clear()
            elif route == ("POST", "/control"):
                control(self.ledger, self.nodes, _object(request))
            elif route == ("POST", "/close"):
                for _ in range(_count(_object(request).get("ledgers", 1))):
                    self.ledger.close()
            elif route == ("POST", "/trim"):
                self.ledger.trim(_count(_object(request).get("ledgers", 1)))
            elif route == ("POST", "/lose"):
                self.ledger.lose_waiting()
            elif route == ("POST", "/reset"):
                self.ledger.reset()
            elif route not in (("GET", ""), ("GET", "/faults")):
                return not_found()
        except (FaultInvalid, TypeError, AttributeError) as error:
            return problem(400, "bad_request", "Bad Request", str(error))
        return document(self._status(), content_type=JSON)

    def _status(self) -> dict[str, Any]:
        ledger = self.ledger
        nodes = {
            name: {"lag": node.lag, "retention": node.retention, "try_again": node.try_again, "lose": node.lose}
            for name, node in self.nodes.items()
        }
        return {
            "note": "A sandbox: a stand-in for a Stellar network, for tests and first steps. Nothing here has a value.",
            "network_passphrase": ledger.rules.passphrase,
            "ledger": ledger.header.sequence,
            "closed_at": ledger.header.closed_at,
            "waiting": list(ledger.waiting),
            "paused": ledger.paused,
            "skew_seconds": ledger.skew_seconds,
            "surge_fee": ledger.surge_fee,
            "nodes": nodes,
            "faults": [attrs.asdict(fault) for fault in self.plan.faults],
        }


_SPOILING: Final = ("drop", "status", "html", "rpc_error")
_COUNTS: Final = {"try_again_later": "try_again", "lose": "lose"}


def _object(request: Request) -> dict[str, Any]:
    try:
        told = json.loads(request.body or b"{}")
    except ValueError as error:
        raise FaultInvalid("the body must be a JSON object") from error
    if not isinstance(told, dict):
        raise FaultInvalid("the body must be a JSON object")
    return told


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise FaultInvalid("ledgers: a whole number from 1 to 100000")
    return value


def _rpc_method(body: bytes) -> str:
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    method = told.get("method") if isinstance(told, dict) else None
    return method if isinstance(method, str) else ""


def _spoiled(fault: Fault, request: Request) -> Answer | Dropped:
    """Return what comes instead of an answer."""
    if fault.kind == "drop":
        return Dropped()
    if fault.kind == "rpc_error":
        told = error_document(json.loads(request.body).get("id"), fault.code, "a fault of the sandbox's plan")
        return document(told, content_type=JSON)
    headers = (("Retry-After", str(fault.retry_after)),) if fault.retry_after is not None else ()
    if fault.kind == "html":
        page = f"<html><body><h1>{fault.status}</h1><p>A proxy's own page.</p></body></html>"
        return Answer(fault.status, page.encode(), "text/html", headers)
    title = _TITLES.get(fault.status, "Error")
    told = {"type": "about:blank", "title": title, "status": fault.status, "detail": "A fault of the sandbox's plan."}
    return Answer(fault.status, json.dumps(told).encode(), PROBLEM, headers)


# Sockets.


async def serve_connections(
    http: SandboxHttp, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer whoever connects, until cancelled.

    Args:
        listener: listens already; closed at the end.

    Cancellation: closes the listener and every connection at once.
    """
    listener.setblocking(False)
    async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as listening:
        task_status.started()
        await trio.serve_listeners(partial(_serve_connection, http), [listening])


async def _serve_connection(http: SandboxHttp, stream: trio.SocketStream) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        while True:
            with trio.move_on_after(READ_SECONDS) as reading:
                request = await _read_request(connection, stream)
            if reading.cancelled_caught or request is None:
                return
            if not await _send(connection, stream, await http.answer(request), request):
                return
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
        return
    finally:
        with trio.move_on_after(1) as closing:
            closing.shield = True
            await stream.aclose()


async def _read_request(connection: h11.Connection, stream: trio.SocketStream) -> Request | None:
    """Return the next request; None when the client has gone."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                await stream.send_all(_bytes_of(connection, h11.InformationalResponse(status_code=100, headers=[])))
            connection.receive_data(await stream.receive_some(_CHUNK))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_BYTES_MAX:
                raise h11.RemoteProtocolError("the body is too large", 413)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
            return Request.make(head.method.decode("ascii"), head.target.decode("latin-1"), headers, bytes(body))
        else:
            return None


async def _send(
    connection: h11.Connection, stream: trio.SocketStream, answer: Answer | Stream | Dropped, request: Request
) -> bool:
    """Send an answer; return whether there may be another one on this connection."""
    if isinstance(answer, Dropped):
        return False
    if isinstance(answer, Stream):
        headers = [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache")]
        await stream.send_all(_bytes_of(connection, h11.Response(status_code=200, headers=headers)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stream_until_gone, connection, stream, answer, nursery.cancel_scope)
            await _until_gone(stream)
            nursery.cancel_scope.cancel()
        return False
    sent = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))), *answer.headers]
    data = _bytes_of(connection, h11.Response(status_code=answer.status, headers=sent))
    if request.method != "HEAD":
        data += _bytes_of(connection, h11.Data(data=answer.body))
    await stream.send_all(data + _bytes_of(connection, h11.EndOfMessage()))
    return True


async def _stream_until_gone(
    connection: h11.Connection, stream: trio.SocketStream, answer: Stream, gone: trio.CancelScope
) -> None:
    try:
        async for chunk in answer.chunks:
            await stream.send_all(_bytes_of(connection, h11.Data(data=chunk)))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        gone.cancel()


async def _until_gone(stream: trio.SocketStream) -> None:
    """Return when the client has closed its side: it sends nothing more on a stream."""
    try:
        while await stream.receive_some(_CHUNK):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


def _bytes_of(connection: h11.Connection, event: h11.Event) -> bytes:
    data = connection.send(event)
    return data if data is not None else b""
