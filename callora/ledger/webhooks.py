"""Webhooks' rules: what events are called, how they are signed, what an attempt came to, and when the next one is."""

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import attrs

EVENTS: Final[Mapping[str, str]] = {
    "usage_event_created": "usage_event.created",
    "settlement_completed": "settlement_completed",
    "settlement_failed": "settlement_failed",
    "low_balance_alert": "low_balance_alert",
    "quota_threshold": "quota.threshold.reached",
    "quota_request_approved": "quota.request.approved",
    "quota_request_rejected": "quota.request.rejected",
    "subscription_started": "subscription.started",
    "subscription_renewed": "subscription.renewed",
    "subscription_ended": "subscription.ended",
    "subscription_lapsed": "subscription.lapsed",
    "key_revoked": "key.revoked",
    "invoice_created": "invoice_created",
    "deposit_confirmed": "deposit.confirmed",
    "dispute_opened": "dispute.opened",
    "dispute_resolved": "dispute.resolved",
}
"""What is told, by its type in the outbox, and what receivers know it as."""
TEST_EVENT: Final = "webhook.test"
_ALIASES: Final = {"new_api_call": "usage_event_created"}
_STORED: Final = {public: stored for stored, public in EVENTS.items()} | _ALIASES
REGISTRABLE: Final = tuple(sorted(_STORED))

RETRIES_MAX_DEFAULT: Final = 10
BASE_DELAY_MS_DEFAULT: Final = 5000
DELAY_SECONDS_MAX: Final = 3600.0
"""The longest pause before another attempt, whatever a receiver wishes."""
ENDPOINTS_MAX: Final = 20
"""Endpoints of one user."""
SECRET_BYTES: Final = 32
_RETRYABLE: Final = frozenset((408, 425, 429))
_GONE: Final = 410


def stored_type(name: str) -> str | None:
    """Return an event's type in the outbox; None where no event is called so."""
    return _STORED.get(name)


@attrs.frozen
class RetryPolicy:
    """How often and how fast a delivery is tried again."""

    retries_max: int = RETRIES_MAX_DEFAULT
    """0 to 10, after the first attempt."""
    base_delay_ms: int = BASE_DELAY_MS_DEFAULT
    """100 to 60000: before the first of them; each next one waits twice as long, up to DELAY_SECONDS_MAX."""


@attrs.frozen
class Attempt:
    """What one attempt came to."""

    status: int | None
    """The receiver's; None where it had no answer."""
    error: str | None = None
    """Why there is none, for whoever owns the endpoint."""
    retry_after_seconds: float | None = None
    """What the receiver wishes."""


Verdict = Literal["delivered", "again", "refused", "gone"]


def judge(attempt: Attempt) -> Verdict:
    """Return what an attempt's outcome means: taken, to be tried again, refused for good, or nobody there any more."""
    status = attempt.status
    if status is None or status >= 500 or status in _RETRYABLE:
        return "again"
    if 200 <= status < 300:
        return "delivered"
    return "gone" if status == _GONE else "refused"


def pause_seconds(policy: RetryPolicy, attempts: int, retry_after_seconds: float | None, jitter: float) -> float:
    """Return how long after an attempt the next one is made.

    Args:
        attempts: how many there were, at least 1.
        retry_after_seconds: what the receiver wishes; honoured up to DELAY_SECONDS_MAX.
        jitter: 0 ≤ jitter < 1, drawn for this pause: half to one and a half of it, so that what failed together does
            not come back together.
    """
    grown = policy.base_delay_ms / 1000 * 2.0 ** min(attempts - 1, 20)
    pause = min(grown, DELAY_SECONDS_MAX) * (0.5 + jitter)
    return min(max(pause, retry_after_seconds or 0.0), DELAY_SECONDS_MAX)


class Secrets:
    """The secrets of endpoints: derived whenever they are needed, so that none is stored."""

    def __init__(self, server_key: bytes) -> None:
        """Args:
        server_key: the service's own; another one makes other secrets of all endpoints.
        """
        self._key = hmac.digest(server_key, b"callora webhooks", hashlib.sha256)

    def raw(self, endpoint_id: str, generation: int) -> bytes:
        """Return the key that signs what an endpoint is told."""
        return hmac.digest(self._key, f"{endpoint_id}\n{generation}".encode(), hashlib.sha256)

    def shown(self, endpoint_id: str, generation: int) -> str:
        """Return it as its owner is shown it, once: `whsec_` and base64."""
        return f"whsec_{b64encode(self.raw(endpoint_id, generation)).decode()}"


@attrs.frozen
class Message:
    """One event as one endpoint is told of it, the same at every attempt."""

    event: str
    """Its public name."""
    webhook_id: str
    """The event's id, by which a receiver knows what it has seen."""
    delivery_id: str
    body: bytes
    """JSON."""


def signed_headers(message: Message, keys: Sequence[bytes], timestamp: int) -> dict[str, str]:
    """Return the headers of an attempt.

    Source: the Standard Webhooks specification; the X-Callora headers say the same with the body's MAC in hexadecimal,
    over the timestamp, a full stop and the body.

    Args:
        keys: the present secret, and while it is being replaced the one before.
        timestamp: of this attempt, in seconds since 1970.
    """
    standard = f"{message.webhook_id}.{timestamp}.".encode() + message.body
    ours = f"{timestamp}.".encode() + message.body
    return {
        "Content-Type": "application/json",
        "User-Agent": "Callora-Webhook/1.0",
        "webhook-id": message.webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            f"v1,{b64encode(hmac.digest(key, standard, hashlib.sha256)).decode()}" for key in keys
        ),
        "X-Callora-Event": message.event,
        "X-Callora-Timestamp": str(timestamp),
        "X-Callora-Delivery": message.delivery_id,
        "X-Callora-Signature": ",".join(f"sha256={hmac.digest(key, ours, hashlib.sha256).hex()}" for key in keys),
    }
