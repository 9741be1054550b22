"""Live usage over REST: server-sent events of one's own calls as they close."""

import json
from collections.abc import Mapping
from typing import Any, Final

import trio
from pydantic import Field

from callora.actors.live_usage import Ended, Follower, LiveUsage, News, Placed, Quiet, TooMany, shown
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form
from callora.http.rest.operations import Access, Answer, Ask, Routes, Text
from callora.ledger.faults import CalloraFault
from callora.ledger.ids import UserId
from callora.ledger.outcomes import Draining

EVENT_STREAM: Final = "text/event-stream"
RECONNECT_MILLISECONDS: Final = 2000
"""What clients wait before they come back, where the stream's end does not say otherwise."""
FAULT_SECONDS: Final = 1.0
"""Between attempts to reach a database that does not answer."""
_HEADERS: Final = {"X-Accel-Buffering": "no"}
"""No proxy in front may keep events back."""
_OPENING: Final = f"retry: {RECONNECT_MILLISECONDS}\n\n".encode()
_HEARTBEAT: Final = b": heartbeat\n\n"
_MESSAGES: Final = {
    "draining": "The service restarts; come back",
    "lagged": "The client did not keep up; come back for the rest",
    "session_ended": "The session has ended; log in again",
    "token_expired": "The access token has expired; come back with a new one",
    "restarted": "The stream began anew; come back",
}


class StreamQuery(Form):
    """Where to go on."""

    lastEventId: str | None = Field(
        default=None,
        max_length=64,
        description="As the header Last-Event-ID, which goes before, for clients that cannot send that at first.",
    )


def encode_event(row: Mapping[str, Any]) -> bytes:
    """Return a call as an event."""
    return _event("usage", shown(row), str(row["event_id"]))


def _event(kind: str, data: Mapping[str, object], event_id: str | None = None) -> bytes:
    named = "" if event_id is None else f"id: {event_id}\n"
    return f"{named}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class _Stream:
    """What one client is sent, piece by piece; closing it lets its follower go."""

    def __init__(self, live: LiveUsage, follower: Follower) -> None:
        self._live = live
        self._follower = follower
        self._opened = False
        self._over = False

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        if not self._opened:
            self._opened = True
            return _OPENING
        try:
            told = await self._live.next(self._follower)
        except CalloraFault:  # what was missed is asked for again
            await trio.sleep(FAULT_SECONDS)
            return _HEARTBEAT
        match told:
            case News(blocks):
                return blocks
            case Quiet():
                return _HEARTBEAT
            case Placed(how, last):
                return self._placed(how, last)
            case Ended(reason, retry_seconds):
                self._over = True
                kind = "lagged" if reason == "lagged" else "end"
                hint = f"retry: {round(retry_seconds * 1000)}\n".encode()
                return hint + _event(kind, {"reason": reason, "message": _MESSAGES[reason]})

    def _placed(self, how: str, last: str) -> bytes:
        connected = _event("connected", {"resumed": how == "resumed", "lastEventId": last}, last)
        if how != "reset":
            return connected
        message = "Some calls after the one that was seen last may be missing here; GET /api/usage has them"
        return _event("reset", {"reason": "not_kept", "message": message}) + connected

    async def aclose(self) -> None:
        """Let the follower go. Waits for nothing: it is called in a request that is being cancelled as well."""
        self._live.leave(self._follower)
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()


def live_usage_routes(live: LiveUsage) -> Routes:
    """Return the route of live usage."""
    routes = Routes("Usage")

    @routes.add(
        "GET",
        "/api/usage/sse",
        access=Access.USER,
        query=StreamQuery,
        answers={
            200: Text(
                EVENT_STREAM,
                "`connected`, then `usage` for each call that has ended; `reset`, `lagged` or `end` where the client "
                "has to do something. Ids are those of calls.",
                endless=True,
            )
        },
    )
    async def follow_usage(ask: Ask[Any, StreamQuery, Any]) -> Answer:
        """Calls of all your vaults as they end, as server-sent events.

        Last-Event-ID names the call that was seen last: those after it follow, each once. The `data` of `usage` is an
        event of `GET /api/usage`, with `vaultId` and `closedAt`. With too many streams of yours open it is 429.
        """
        await trio.lowlevel.checkpoint()
        if ask.exchange.method == "HEAD":
            return Answer(b"", headers=_HEADERS)
        identity = ask.identity
        assert identity is not None
        last = ask.headers.get("Last-Event-ID") or ask.query.lastEventId
        follower = live.follow(UserId(ask.user_id), identity.session_id, identity.expires_at, last or None)
        match follower:
            case Draining():
                raise ProblemRaised("SERVICE_UNAVAILABLE", "The service restarts", headers={"Retry-After": "1"})
            case TooMany("user", limit):
                raise ProblemRaised(
                    "TOO_MANY_REQUESTS",
                    f"You have {limit} streams open, which is as many as you may have here; close one",
                    details={"limitedBy": "streams", "limit": limit, "retryAfter": 5},
                    headers={"Retry-After": "5"},
                )
            case TooMany():
                raise ProblemRaised(
                    "SERVICE_UNAVAILABLE", "No more streams can be opened here now", headers={"Retry-After": "5"}
                )
        return Answer(_Stream(live, follower), headers=_HEADERS)

    return routes
