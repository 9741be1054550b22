"""The example `mana` through HTTP: the map of its routes, and the credits that each costs."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio

from callora.demo_upstream import serve_demo_upstream
from callora.example_mana import ALIASES, APIS, SOUND_BYTES_A_SECOND, make_mana
from callora.http.gateway.aliases import Aliases
from tests.proof.books import assert_audit_clean
from tests.support.client import RawResponse, call
from tests.support.service import Consumer, RunningService, running_service

BOUNDARY = "b0undary"
MULTIPART = ("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
SETTINGS = {"CALL_ALIASES": ",".join(f"{prefix}={target}" for prefix, target in ALIASES.items())}


def upload(seconds: float, name: str = "file") -> bytes:
    """Return a form with so much sound."""
    sound = b"s" * int(seconds * SOUND_BYTES_A_SECOND)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.wav"\r\n\r\n'.encode()
    return head + sound + f"\r\n--{BOUNDARY}--\r\n".encode()


@attrs.frozen
class Mana:
    """Who calls the example."""

    service: RunningService
    consumer: Consumer

    async def ask(self, line: str, body: object = None, *headers: tuple[str, str]) -> RawResponse:
        """Call by a line such as `POST /v1/search`."""
        method, path = line.split()
        sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return await call(self.service.port, method, path, [*self.consumer.headers, *headers], sent)

    async def credits(self, response: RawResponse) -> int:
        """Return the credits that a success cost, and check that it cost no money."""
        assert (response.status, response.header("X-Callora-Charge")) == (200, "0.0000000"), response
        return int(response.header("X-Callora-Credits") or 0)


@asynccontextmanager
async def mana(database_url: str) -> AsyncIterator[Mana]:
    """Run the example; at the end the ledger must be clean."""
    async with running_service(database_url, SETTINGS) as service, trio.open_nursery() as nursery:
        url = await nursery.start(partial(serve_demo_upstream, make_app=make_mana))
        for slug, (_, endpoints) in APIS.items():
            await service.api(slug, f"{url}/{slug}", endpoints)
        yield Mana(service, await service.consumer("0"))
        await assert_audit_clean(service.database)
        nursery.cancel_scope.cancel()


async def test_a22_a24_a31_every_route_of_the_map_answers_and_costs_what_the_table_says(database_url: str) -> None:
    async with mana(database_url) as it:
        for line, body, cost in (
            ("POST /v1/search", {"query": "tides"}, 1),
            ("POST /v1/extract", {"url": "https://example.com"}, 1),
            ("POST /v1/extract/bulk", {"urls": ["a", "b", "c"]}, 3),
            ("GET /v1/search/engines", None, 0),
            ("GET /v1/stt/models", None, 0),
            ("GET /v1/stt/languages?all=1", None, 0),
            ("GET /v1/tts/voices", None, 0),
            ("GET /v1/tts/languages", None, 0),
            ("POST /v1/tts/synthesize", {"text": ""}, 1),
            ("POST /v1/tts/synthesize", {"text": "x"}, 1),
            ("POST /v1/tts/synthesize", {"text": "x" * 1000}, 1),
            ("POST /v1/tts/synthesize", {"text": "x" * 1001}, 2),
            ("POST /v1/call/search/api/v1/extract/bulk", {"urls": ["a", "b"]}, 2),
        ):
            assert await it.credits(await it.ask(line, body)) == cost, line
        for seconds, cost in ((60, 10), (61, 20), (0, 10)):
            response = await it.ask("POST /v1/stt/transcribe", upload(seconds), MULTIPART)
            assert response.json()["duration"] == seconds
            assert await it.credits(response) == cost
        left = await it.service.database.fetch_value("SELECT credits FROM vaults")
        assert left == 50_000 - (1 + 1 + 3 + 1 + 1 + 1 + 2 + 2) - (10 + 20 + 10)


async def test_a31_speech_comes_back_as_sound_of_the_format_that_was_asked_for(database_url: str) -> None:
    async with mana(database_url) as it:
        for sent, kind in (({}, "mpeg"), ({"format": "wav"}, "wav"), ({"format": "ogg"}, "ogg")):
            response = await it.ask("POST /v1/tts/synthesize", {"text": "ahoy", **sent})
            assert (response.header("Content-Type"), len(response.body) > 100) == (f"audio/{kind}", True)


async def test_a25_a32_an_upstream_s_refusal_passes_untouched_and_costs_nothing(database_url: str) -> None:
    async with mana(database_url) as it:
        response = await it.ask("POST /v1/tts/synthesize", {"text": "ahoy", "format": "midi"})
        assert (response.status, response.header("X-Callora-Credits")) == (400, None)
        assert "format must be" in response.json()["error"]
        assert (await it.ask("POST /v1/stt/transcribe", upload(1, "other"), MULTIPART)).status == 400
        assert await it.service.database.fetch_value("SELECT coalesce(sum(credits), 0) FROM usage_events") == 0


async def test_an_alias_is_a_call_in_every_way_and_nothing_else_is(database_url: str) -> None:
    async with mana(database_url) as it:
        assert (await call(it.service.port, "POST", "/v1/search")).json()["code"] == "UNAUTHORIZED"
        for line in ("POST /v1/searching", "POST /v1//search", "GET /v1", "POST /V1/search"):
            assert "x-callora-charge" not in {name.lower() for name, _ in (await it.ask(line)).headers}, line
        assert (await it.ask("POST /v1/search/../extract")).json()["code"] == "BAD_REQUEST"
        assert (await it.ask("DELETE /v1/search")).status == 404
        keyed = ("Idempotency-Key", "one")
        first = await it.ask("POST /v1/search", {"query": "a"}, keyed)
        again = await it.ask("POST /v1/search", {"query": "a"}, keyed)
        assert (again.body, again.header("Idempotent-Replayed")) == (first.body, "true")
        other = await it.ask("GET /api/health")
        assert other.status in (200, 503), "other paths are what they were"


@pytest.mark.parametrize(
    ("path", "called"),
    [
        (b"/v1/tts", b"/v1/call/speech"),
        (b"/v1/tts/", b"/v1/call/speech/"),
        (b"/v1/tts/a//b", b"/v1/call/speech/a//b"),
        (b"/v1/tts/old/x", b"/v1/call/former/y/x"),
        (b"/v1/ttsx", None),
        (b"/v1/tt", None),
        (b"/", None),
    ],
)
def test_an_alias_is_of_whole_segments_and_the_longest_counts(path: bytes, called: bytes | None) -> None:
    assert Aliases({"/v1/tts": "speech", "/v1/tts/old": "former/y"}).call_path(path) == called
