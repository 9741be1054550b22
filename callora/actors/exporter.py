"""The client of meter sources: a window's pages, one after another, checked before anything of them is believed."""

from collections.abc import Callable
from typing import Final
from urllib.parse import urlencode

import trio
from pydantic import SecretStr

from callora.ledger.collecting import Window
from callora.ledger.faults import CalloraFault
from callora.ledger.snapshots import Cursor, Malformed, MeterSource, Page, format_instant, parse_page
from callora.outbound.client import Outbound, OutboundFault

PAGE_BYTES_MAX: Final = 32 * 1024 * 1024
PARSED_AT_ONCE: Final = 64 * 1024
"""Longer bodies are read in a thread: calls that are being proxied do not wait for it."""

Credentials = Callable[[MeterSource], SecretStr | None]
"""The bearer token of a source; None where the environment holds none."""


class SourceFault(CalloraFault):
    """A source could not be read. Its text is shown to operators, and has nothing of what the source said."""


class Exporter:
    """Asks sources."""

    def __init__(self, outbound: Outbound, credentials: Credentials, *, page_size: int) -> None:
        """Args:
        page_size: snapshots of a page.
        """
        self._outbound = outbound
        self._credentials = credentials
        self._page_size = page_size

    async def fetch(self, source: MeterSource, window: Window, cursor: Cursor | None, seconds_max: float) -> bytes:
        """Return one page of a window as it came, at most PAGE_BYTES_MAX.

        Args:
            cursor: where it begins; None for the first.
            seconds_max: for it, where the source's own time-out is longer.

        Raises:
            SourceFault: there is none. Nothing was changed, here or there.

        Cancellation: the connection is closed.
        """
        credential = self._credentials(source)
        if credential is None:
            name = source.credential_env or "INTERNAL_SERVICE_TOKEN"
            raise SourceFault(f"its credential is missing: {name} is not set")
        asked = {
            "since": format_instant(window.since),
            "until": format_instant(window.until),
            "limit": str(self._page_size),
        }
        if cursor is not None:
            asked["cursor"] = cursor.text
        try:
            reply = await self._outbound.exchange(
                "GET",
                f"{source.base_url}/v1/snapshots/window?{urlencode(asked)}",
                {"Accept": "application/json", "Authorization": f"Bearer {credential.get_secret_value()}"},
                seconds_max=min(source.timeout_seconds, seconds_max),
                reply_bytes_max=PAGE_BYTES_MAX,
            )
        except OutboundFault as fault:
            raise SourceFault(_SAID[fault.kind]) from fault
        except ValueError as wrong:
            raise SourceFault("its URL may not be called") from wrong
        if reply.status != 200:
            raise SourceFault(f"it answered {reply.status}")
        if not reply.whole:
            raise SourceFault("its answer broke off, came too slowly or was longer than 32 MiB")
        return reply.body


async def read_page(body: bytes, cursor: Cursor | None) -> Page:
    """Return what a page says.

    Args:
        cursor: where it was asked to begin; the next one must be later, to the nanosecond.

    Raises:
        SourceFault: it is no page, or leads nowhere.

    Cancellation: at any time.
    """
    if len(body) > PARSED_AT_ONCE:
        page = await trio.to_thread.run_sync(parse_page, body)
    else:
        await trio.lowlevel.checkpoint()
        page = parse_page(body)
    if isinstance(page, Malformed):
        raise SourceFault(f"its answer {page.reason}")
    if page.has_more and page.next_cursor is None:
        raise SourceFault("its answer has more and no next_cursor")
    if page.next_cursor is not None and cursor is not None and page.next_cursor.nanos <= cursor.nanos:
        raise SourceFault("its cursor does not move forward")
    return page


_SAID: Final = {
    "blocked": "its address may not be called",
    "unresolved": "its host has no address",
    "unreachable": "it cannot be reached",
    "timeout": "it did not answer in time",
    "malformed": "its answer is no HTTP",
}
