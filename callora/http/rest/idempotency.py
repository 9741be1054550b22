"""The Idempotency-Key of a REST request: what is one, and what makes a request the same request."""

import hashlib
import re
from typing import Final

from werkzeug.datastructures import Headers

from callora.actors.intents import Begun, InProgress, Intents, KeptAnswer, Mismatch
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form

REPLAYED: Final = {"Idempotent-Replayed": "true"}
BODY_FIELD: Final = "idempotencyKey"
"""Where a body may carry the key too; the header is preferred."""
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_RETRY: Final = {"Retry-After": "1"}


def presented_key(headers: Headers, body: Form | None, *, required: bool) -> str | None:
    """Return the request's key, None where it has none and needs none.

    Raises:
        ProblemRaised: INVALID_IDEMPOTENCY_KEY.
    """
    values = headers.getlist("Idempotency-Key")
    in_body = getattr(body, BODY_FIELD, None)
    if in_body is not None and in_body not in values:
        values.append(in_body)
    if len(values) > 1:
        raise ProblemRaised("INVALID_IDEMPOTENCY_KEY", "Send one Idempotency-Key")
    if not values and required:
        raise ProblemRaised("INVALID_IDEMPOTENCY_KEY", "This operation needs an Idempotency-Key")
    if values and _KEY.fullmatch(values[0]) is None:
        raise ProblemRaised("INVALID_IDEMPOTENCY_KEY")
    return values[0] if values else None


def fingerprint(method: str, target: str, body: Form | None) -> bytes:
    """Return what makes a request the same request: equal for any order of its body's fields.

    Args:
        target: path and query, as sent.
    """
    document = "" if body is None else body.model_dump_json(by_alias=True, exclude={BODY_FIELD})
    return hashlib.sha256("\n".join((method, target, document)).encode()).digest()


async def begin(intents: Intents, actor: str, key: str, request: bytes) -> Begun | KeptAnswer:
    """Return the intent to carry out, or the answer it was given.

    Raises:
        ProblemRaised: IDEMPOTENCY_KEY_REUSE_MISMATCH or IDEMPOTENCY_IN_PROGRESS.
        StoreUnavailable, OutcomeUnknown: nothing was carried out.
    """
    begun = await intents.begin(actor, key, request)
    if isinstance(begun, Mismatch):
        raise ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH")
    if isinstance(begun, InProgress):
        raise ProblemRaised("IDEMPOTENCY_IN_PROGRESS", headers=_RETRY)
    return begun
