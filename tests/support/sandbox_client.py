"""The HTTP that stellar-sdk asks for, on httpx: to a sandbox on a socket, or to one in the same process."""

from collections.abc import AsyncGenerator
from typing import Any

import httpx
from stellar_sdk.client.base_async_client import BaseAsyncClient
from stellar_sdk.client.response import Response

from callora.stellar.sandbox.network import Sandbox
from tests.support.sandbox import SandboxTransport

URL = "http://sandbox"
"""Of a sandbox in the same process."""


class SandboxClient(BaseAsyncClient):
    """The least that the SDK's servers and contract clients need."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def get(
        self, url: str, params: dict[str, str] | None = None, max_content_size: int | None = None
    ) -> Response:
        return _told(await self._http.get(url, params=params))

    async def post(
        self, url: str, data: dict[str, str] | None = None, json_data: dict[str, Any] | None = None
    ) -> Response:
        return _told(await self._http.post(url, data=data, json=json_data))

    def stream(self, url: str, params: dict[str, str] | None = None) -> AsyncGenerator[dict[str, Any], None]:
        raise NotImplementedError("no test of contracts streams")

    async def close(self) -> None:
        await self._http.aclose()


def client_of(sandbox: Sandbox) -> SandboxClient:
    """Return a client of a sandbox in the same process."""
    return SandboxClient(httpx.AsyncClient(transport=SandboxTransport(sandbox)))


def _told(answer: httpx.Response) -> Response:
    return Response(answer.status_code, answer.text, dict(answer.headers), str(answer.url))
