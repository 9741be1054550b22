"""The example `mana`: search, speech-to-text and text-to-speech as three APIs with rate cards; and what answers them.

`callora dev --example mana` publishes them, and serves the paths that their callers know as aliases. What answers is a
stand-in that owns no state: the same call gives the same answer.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import trio
from quart import Response, json, jsonify, request
from quart_trio import QuartTrio

from callora.demo import Demo
from callora.ledger.ids import DeveloperId
from callora.ledger.money import ZERO, parse_usdc
from callora.ledger.rating import RateCard, Source
from callora.service import Context, Ledger
from callora.store import accounts
from callora.store.accounts import PricedEndpoint

UPLOAD_BYTES_MAX: Final = 100 * 1024 * 1024
SOUND_BYTES_A_SECOND: Final = 16_000
"""What the stand-in takes for a second of sound."""
CREDIT: Final = parse_usdc("0.001")
"""What a credit's worth costs where a plan charges it."""
ALIASES: Final[Mapping[str, str]] = {
    "/v1/search": "search/api/v1/search",
    "/v1/extract": "search/api/v1/extract",
    "/v1/stt": "speech-to-text",
    "/v1/tts": "text-to-speech",
}
"""The paths that callers know, and what each stands for."""

_CALL: Final = RateCard(unit_credits=1)
_URL: Final = RateCard("url", 1, source=Source.parse("request.json:/urls"))
_CHARS: Final = RateCard("started_1000_chars", 1, source=Source.parse("request.json:/text"))
_MINUTE: Final = RateCard("started_minute", 10, held_units=5, source=Source.parse("response.json:/duration"))
_FREE: Final = ZERO

APIS: Final[Mapping[str, tuple[str, tuple[PricedEndpoint, ...]]]] = {
    "search": (
        "Search",
        (
            PricedEndpoint("POST", "/api/v1/search", CREDIT, _CALL),
            PricedEndpoint("GET", "/api/v1/search/engines", _FREE),
            PricedEndpoint("POST", "/api/v1/extract", CREDIT, _CALL),
            PricedEndpoint("POST", "/api/v1/extract/bulk", CREDIT, _URL),
        ),
    ),
    "speech-to-text": (
        "Speech to text",
        (
            PricedEndpoint("POST", "/transcribe", parse_usdc("0.01"), _MINUTE),
            PricedEndpoint("GET", "/models", _FREE),
            PricedEndpoint("GET", "/languages", _FREE),
        ),
    ),
    "text-to-speech": (
        "Text to speech",
        (
            PricedEndpoint("POST", "/synthesize", CREDIT, _CHARS),
            PricedEndpoint("GET", "/voices", _FREE),
            PricedEndpoint("GET", "/languages", _FREE),
        ),
    ),
}
"""Name and endpoints of each API, by slug; below its upstream each has a path of its own, the slug."""

_SOUND_TYPES: Final = {"mp3": "audio/mpeg", "wav": "audio/wav", "ogg": "audio/ogg"}
_LISTS: Final[Mapping[str, Any]] = {
    "/search/api/v1/search/engines": {"engines": ["web", "news", "images"]},
    "/speech-to-text/models": {"models": ["small", "large"]},
    "/speech-to-text/languages": {"languages": ["de", "en", "pt"]},
    "/text-to-speech/voices": {"voices": ["alto", "bass"]},
    "/text-to-speech/languages": {"languages": ["de", "en", "pt"]},
}


async def ensure_mana(context: Context, ledger: Ledger, demo: Demo, upstream_url: str) -> None:
    """Publish the example's APIs for the demo's developer; a second start finds them, and tells where they are now."""
    database, now = ledger.database, context.clock.now()
    developer = await accounts.ensure_developer(
        database, DeveloperId(context.ids.uuid7()), demo.developer_user_id, "Demo Weather", now
    )
    for slug, (name, endpoints) in APIS.items():
        await accounts.ensure_api(
            database,
            developer_id=developer,
            slug=slug,
            name=name,
            base_url=f"{upstream_url}/{slug}",
            endpoints=endpoints,
            now=now,
        )


async def _sent() -> dict[str, Any]:
    """Return the request's JSON object, an empty one where it is none."""
    body = await request.get_data(as_text=False)
    with contextlib.suppress(ValueError):  # not UTF-8, or not JSON
        found = json.loads(body)
        if isinstance(found, dict):
            return found
    return {}


def _page(url: str) -> dict[str, str]:
    return {"url": url, "title": f"Page {hashlib.sha256(url.encode()).hexdigest()[:8]}", "text": f"What {url} says."}


def make_mana() -> QuartTrio:
    """Return what stands behind the example's APIs."""
    app = QuartTrio(__name__)
    app.config["MAX_CONTENT_LENGTH"] = UPLOAD_BYTES_MAX

    @app.post("/search/api/v1/search")
    async def search() -> Response:
        query = str((await _sent()).get("query", ""))
        return jsonify(query=query, results=[_page(f"https://example.com/{query}/{number}") for number in range(3)])

    @app.post("/search/api/v1/extract")
    async def extract() -> Response:
        return jsonify(_page(str((await _sent()).get("url", ""))))

    @app.post("/search/api/v1/extract/bulk")
    async def extract_bulk() -> Response:
        urls = (await _sent()).get("urls", [])
        return jsonify(results=[_page(str(url)) for url in urls] if isinstance(urls, list) else [])

    @app.post("/speech-to-text/transcribe")
    async def transcribe() -> tuple[Response, int]:
        file = (await request.files).get("file")
        if file is None:
            return jsonify(error="send the sound as the part `file` of multipart/form-data"), 400
        sound = file.read()
        digest = hashlib.sha256(sound).hexdigest()
        return jsonify(text=f"Words {digest[:16]}", duration=len(sound) / SOUND_BYTES_A_SECOND), 200

    @app.post("/text-to-speech/synthesize")
    async def synthesize() -> Response | tuple[Response, int]:
        sent = await _sent()
        kind = _SOUND_TYPES.get(str(sent.get("format", "mp3")))
        if kind is None:
            return jsonify(error=f"format must be one of {', '.join(_SOUND_TYPES)}"), 400
        sound = hashlib.sha256(str(sent.get("text", "")).encode()).digest() * 32
        return Response(sound, content_type=kind)

    def listed(path: str, answer: Any) -> None:
        async def handler() -> Response:
            await trio.lowlevel.checkpoint()
            return jsonify(answer)

        app.add_url_rule(path, path.strip("/").replace("/", "_"), handler, methods=["GET"])

    for path, answer in _LISTS.items():
        listed(path, answer)
    return app
