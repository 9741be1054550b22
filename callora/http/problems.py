"""Problem documents: the one table from what went wrong to status, code, message and cure.

Nothing behind HTTP knows a status code. Whatever Callora itself answers that is not a success carries
`{"code","message","requestId","details"?}`; an upstream's answer is never rewritten into it. docs/errors.md shows this
table, and a test holds the two together.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

Details = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A small object for a refusal; a list of `{"field","message","code"}` for a validation error."""

CONTENT_TYPE: Final = "application/json"
UNKNOWN_REQUEST_ID: Final = "unknown"


@attrs.frozen
class Problem:
    """One way in which a request can end without a success."""

    code: str
    """What programs compare: never changed once published."""
    status: int
    """The HTTP status, always the same for a code."""
    message: str
    """What people read where the caller of `problem_body` has nothing more exact to say."""
    when: str
    """The rule that speaks, for the documentation."""
    cure: str
    """What the client does about it."""


_RETRY_SAME: Final = "Retry after the seconds of Retry-After, with the same Idempotency-Key."

_TABLE: Final = (
    # Before anything is known of the request
    Problem(
        "SERVICE_UNAVAILABLE",
        503,
        "The service cannot take this request now",
        "The service drains before a restart, a queue is full, or the database is down. Nothing was charged.",
        _RETRY_SAME,
    ),
    Problem(
        "BAD_REQUEST",
        400,
        "The request is malformed",
        "The request cannot be read, or can be read in two ways; the connection is closed.",
        "Send valid HTTP/1.1: one length, no folded header, CRLF line ends.",
    ),
    Problem(
        "REQUEST_BODY_TOO_LARGE",
        413,
        "The request body is too large",
        "The body exceeds GATEWAY_BODY_LIMIT on /v1/call, or REQUEST_BODY_LIMIT elsewhere.",
        "Send less, or ask the operator for a larger limit.",
    ),
    Problem(
        "REQUEST_HEADER_TOO_LARGE",
        431,
        "The request head is too large",
        "The header fields exceed their size or their number.",
        "Send fewer or shorter header fields.",
    ),
    Problem(
        "URI_TOO_LONG", 414, "The request target is too long", "Path and query exceed their size.", "Use a shorter URL."
    ),
    Problem(
        "REQUEST_TIMEOUT",
        408,
        "The request did not arrive in time",
        "The head, or progress on the body, took longer than CLIENT_HEAD_TIMEOUT_MS or CLIENT_BODY_TIMEOUT_MS.",
        "Send the request again on a new connection, with the same Idempotency-Key.",
    ),
    Problem(
        "UPGRADE_NOT_SUPPORTED",
        400,
        "Protocol upgrades are not supported",
        "The request asks to become a WebSocket, HTTP/2 or a CONNECT tunnel.",
        "Use plain HTTP/1.1; answers may stream, and server-sent events pass through.",
    ),
    # Who calls
    Problem(
        "UNAUTHORIZED",
        401,
        "Credentials are missing or not valid",
        "No API key, one of the wrong form or with a wrong checksum, or one that is not known.",
        "Send a key in X-Api-Key, or in Authorization: Bearer.",
    ),
    Problem(
        "API_KEY_DISABLED",
        401,
        "The API key is disabled",
        "Its owner has disabled the key.",
        "Enable the key, or use another.",
    ),
    Problem("API_KEY_EXPIRED", 401, "The API key has expired", "The key's expiry has passed.", "Make a new key."),
    Problem(
        "API_KEY_REVOKED",
        403,
        "The API key is revoked",
        "The key was revoked, for good.",
        "Make a new key.",
    ),
    # What is called, and whether this caller may
    Problem(
        "NOT_FOUND",
        404,
        "Not found",
        "No such route, API or endpoint; an API without a matching endpoint and without a default price is not free.",
        "Check method and path against the catalogue.",
    ),
    Problem(
        "METHOD_NOT_ALLOWED",
        405,
        "The method is not allowed here",
        "The path exists, for the methods in Allow. On /v1/call an endpoint's method is part of its match (NOT_FOUND).",
        "Use a method named in Allow.",
    ),
    Problem(
        "API_ACCESS_FORBIDDEN",
        403,
        "The API key may not use this API",
        "The key is narrowed to other APIs, or the API is not offered to its owner.",
        "Use a key for this API.",
    ),
    Problem(
        "ENDPOINT_FORBIDDEN",
        403,
        "The API key may not use this endpoint",
        "The key is narrowed to other endpoints of this API.",
        "Use a key for this endpoint.",
    ),
    Problem(
        "SCOPE_REQUIRED",
        403,
        "The API key lacks a scope",
        "The endpoint asks for a scope that the key does not have; details name it.",
        "Use a key with that scope.",
    ),
    Problem(
        "IP_NOT_ALLOWED",
        403,
        "The API key may not be used from this address",
        "The key is narrowed to other source addresses.",
        "Call from an allowed address, or widen the key's list.",
    ),
    Problem(
        "FORBIDDEN",
        403,
        "Not allowed",
        "The credentials are valid and do not suffice for this operation.",
        "Use credentials with the rights for it.",
    ),
    Problem(
        "VAULT_SUSPENDED",
        403,
        "The vault is suspended",
        "The owner's account does not stand well; details say since when.",
        "Ask the operator.",
    ),
    # Pace
    Problem(
        "TOO_MANY_REQUESTS",
        429,
        "Too many requests",
        "The key's or the user's rate limit is used up; details say which, and X-RateLimit-Reset when it ends.",
        _RETRY_SAME,
    ),
    Problem(
        "CONCURRENCY_LIMIT_EXCEEDED",
        429,
        "Too many calls at the same time",
        "The key has as many calls running as it may (KEY_MAX_CONCURRENCY_PER_KEY).",
        "Wait for running calls to end, then retry with the same Idempotency-Key.",
    ),
    # The intent
    Problem(
        "INVALID_IDEMPOTENCY_KEY",
        400,
        "The Idempotency-Key is not valid",
        "The key is empty, too long, repeated, or holds other than visible ASCII characters.",
        "Send one key of 1 to 255 visible characters, such as a UUID.",
    ),
    Problem(
        "IDEMPOTENCY_KEY_REUSE_MISMATCH",
        409,
        "The Idempotency-Key was used for another request",
        "The same key came before with another method, path, query or body.",
        "Use a new key for a new intent; repeat a request byte for byte.",
    ),
    Problem(
        "IDEMPOTENCY_IN_PROGRESS",
        409,
        "The first request with this Idempotency-Key is still running",
        "A duplicate arrived before the first was answered.",
        _RETRY_SAME,
    ),
    Problem(
        "IDEMPOTENCY_NOT_REPLAYABLE",
        409,
        "The first answer was not stored and cannot be replayed",
        "The first answer was streamed or larger than IDEMPOTENCY_MAX_BODY; details give its request id and charge. "
        "This duplicate cost nothing.",
        "Ask again with a new key if the answer is needed anew; that is a new charge.",
    ),
    # The upstream, before it is called
    Problem(
        "UPSTREAM_UNAVAILABLE",
        503,
        "The API is failing and is not called for now",
        "The API's circuit breaker is open after repeated failures. Nothing was charged.",
        _RETRY_SAME,
    ),
    Problem(
        "UPSTREAM_TARGET_BLOCKED",
        502,
        "The API's address may not be called",
        "The upstream's name leads to a private, loopback, link-local or special address that is not allow-listed.",
        "The API's developer corrects its base URL, or the operator allows the host.",
    ),
    # Money
    Problem(
        "INSUFFICIENT_BALANCE",
        402,
        "The balance does not cover the price",
        "The vault's available balance is below the price; details give required and available.",
        "Deposit USDC, then retry with the same Idempotency-Key.",
    ),
    Problem(
        "QUOTA_EXHAUSTED",
        402,
        "The plan's quota is used up",
        "The plan's allowance is spent and overage is not allowed; details give the numbers and resetAt.",
        "Wait for resetAt, or change the plan.",
    ),
    Problem(
        "SPENDING_LIMIT_EXCEEDED",
        402,
        "A spending limit would be exceeded",
        "The key's or the vault's daily, weekly, monthly or annual limit; details give window, limit and remaining.",
        "Wait for the window to end, or raise the limit.",
    ),
    Problem(
        "TOKEN_BUDGET_EXHAUSTED",
        402,
        "The access token's budget does not cover the price",
        "What is left of the budget that the token was made with is below the price; details give required, remaining "
        "and budget.",
        "Make a new token with a budget; the vault's balance is another matter.",
    ),
    Problem(
        "HOLD_EXPIRED",
        409,
        "The hold has expired",
        "The hold's time passed before it was captured; its amount was given back.",
        "Begin again with a new hold.",
    ),
    Problem(
        "CONFLICT",
        409,
        "The request conflicts with the present state",
        "What is to be changed has changed meanwhile, or exists already.",
        "Read it again, then decide.",
    ),
    # The call itself
    Problem(
        "BAD_GATEWAY",
        502,
        "The API could not be reached or answered badly",
        "Connecting or TLS failed, or the upstream's answer was not valid HTTP. Nothing was charged.",
        "Retry later, with the same Idempotency-Key.",
    ),
    Problem(
        "GATEWAY_TIMEOUT",
        504,
        "The API did not answer in time",
        "The upstream was silent past PROXY_TIMEOUT_MS (nothing was charged), or a probe past its own limit.",
        "Retry later, with the same Idempotency-Key.",
    ),
    Problem(
        "OUTCOME_UNKNOWN",
        504,
        "It is not known whether the call was charged",
        "The database was asked to commit and did not say whether it did. It is looked up before anything else.",
        "Retry with the same Idempotency-Key: it is never charged twice.",
    ),
    # Who asks over REST
    Problem(
        "INVALID_AUTH_HEADER",
        401,
        "The Authorization header is not valid",
        "Authorization is not of the scheme Bearer.",
        "Send `Authorization: Bearer` and an access token.",
    ),
    Problem(
        "MISSING_TOKEN",
        401,
        "The access token is missing",
        "Authorization names the scheme Bearer and no token.",
        "Send the access token that logging in gave.",
    ),
    Problem(
        "INVALID_TOKEN",
        401,
        "The token is not valid",
        "It is not signed by us with HS256, is for another issuer or audience, or is no access token.",
        "Log in again.",
    ),
    Problem(
        "MISSING_CLAIMS",
        401,
        "The token lacks claims",
        "It names no user (`userId` or `sub`), or has no `exp`.",
        "Let its issuer add them.",
    ),
    Problem(
        "TOKEN_EXPIRED",
        401,
        "The access token has expired",
        "Access tokens last 15 minutes; those for calls as long as they were made for, an hour at most.",
        "Refresh it with the refresh token; make a new one for calls.",
    ),
    Problem("TOKEN_NOT_ACTIVE", 401, "The token is not active yet", "Its `nbf` lies ahead.", "Wait until then."),
    Problem(
        "REVOKED_TOKEN",
        401,
        "The session has ended",
        "Its owner logged out, or one of its refresh tokens was used twice; a token for calls was revoked.",
        "Log in again; make a new token for calls.",
    ),
    # Logging in
    Problem(
        "INVALID_CHALLENGE",
        401,
        "The challenge is not valid",
        "It is not one of ours for this wallet and network, has expired, or was used before: each gives one login.",
        "Ask for a new challenge and sign that.",
    ),
    Problem(
        "INVALID_SIGNATURE",
        401,
        "The signature is not valid",
        "The wallet's master key did not sign exactly this message by SEP-53.",
        "Sign the message as it was given, with the key of walletAddress.",
    ),
    Problem(
        "INVALID_REFRESH_TOKEN",
        401,
        "The refresh token is not valid",
        "It is none of ours, or so old that it is forgotten.",
        "Log in again.",
    ),
    Problem(
        "EXPIRED_TOKEN",
        401,
        "The refresh token has expired",
        "Refresh tokens last 7 days.",
        "Log in again.",
    ),
    # REST
    Problem(
        "VALIDATION_ERROR",
        400,
        "Request validation failed",
        "Fields are missing or wrong; details list all of them at once.",
        "Correct every field that details name.",
    ),
    Problem(
        "NOT_ACCEPTABLE",
        406,
        "No acceptable representation",
        "The Accept header excludes what the route can answer with.",
        "Accept application/json.",
    ),
    Problem(
        "UNSUPPORTED_MEDIA_TYPE",
        415,
        "The media type is not supported",
        "The body's Content-Type is not one that the route reads.",
        "Send application/json.",
    ),
    Problem(
        "CONFLICT",
        409,
        "The request conflicts with what is",
        "Another request changed the same thing, or a name is taken; the message says which.",
        "Read what is, then decide anew.",
    ),
    Problem(
        "DEVELOPER_NOT_FOUND",
        403,
        "You have no developer profile",
        "Earnings and analytics belong to a developer profile, and this user has none.",
        "Open your profile first: GET /api/developers/me.",
    ),
    Problem("API_KEY_NOT_FOUND", 404, "No such API key", "No key of yours has this id.", "List your keys."),
    Problem(
        "TOKEN_NOT_FOUND", 404, "No such access token", "The key has no access token of this id.", "List its tokens."
    ),
    Problem(
        "VAULT_NOT_FOUND",
        404,
        "No such vault",
        "You have no vault on this network.",
        "Create one: POST /api/vault.",
    ),
    Problem(
        "BILLING_REQUEST_NOT_FOUND",
        404,
        "No such billing request",
        "No charge of yours was asked for under this request id.",
        "List them: GET /api/billing.",
    ),
    Problem(
        "REFUND_EXCEEDS_CHARGE",
        409,
        "The refund exceeds what is left of the charge",
        "Refunds of a usage event never exceed what was captured for it; details give what is refundable.",
        "Refund at most that.",
    ),
    Problem(
        "COMPONENT_NOT_CONFIGURED",
        503,
        "This part is not configured",
        "The operator has not set what the route needs; the message names it.",
        "Ask the operator.",
    ),
    Problem(
        "INTERNAL_SERVER_ERROR",
        500,
        "Something went wrong on our side",
        "A defect of Callora. The log has it under the request id.",
        "Report the requestId; retry with the same Idempotency-Key.",
    ),
)

PROBLEMS: Final[Mapping[str, Problem]] = {problem.code: problem for problem in _TABLE}
"""Every problem by its code, in the order of docs/errors.md."""

_BY_STATUS: Final = {
    400: "BAD_REQUEST",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    406: "NOT_ACCEPTABLE",
    408: "REQUEST_TIMEOUT",
    409: "CONFLICT",
    413: "REQUEST_BODY_TOO_LARGE",
    414: "URI_TOO_LONG",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "TOO_MANY_REQUESTS",
    431: "REQUEST_HEADER_TOO_LARGE",
    502: "BAD_GATEWAY",
    503: "SERVICE_UNAVAILABLE",
    504: "GATEWAY_TIMEOUT",
}


class ProblemRaised(Exception):
    """A problem on its way out of a route: the edge of HTTP turns it into its document."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        details: Details | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say which problem.

        Args:
            code: a key of `PROBLEMS`.
            message: what to say instead of the table's message.
            details: what the document carries besides.
            headers: header fields of the answer, such as Retry-After.
        """
        self.problem = PROBLEMS[code]
        super().__init__(code)
        self.message = message
        self.details = details
        self.headers = dict(headers or {})


def problem_for_status(status: int) -> Problem:
    """Return the problem that stands for a bare HTTP status: the general one of its class where it has none itself."""
    return PROBLEMS[_BY_STATUS.get(status, "BAD_REQUEST" if 400 <= status < 500 else "INTERNAL_SERVER_ERROR")]


def problem_body(code: str, message: str | None, request_id: str | None, details: Details | None = None) -> bytes:
    """Return the problem document as compact JSON.

    Args:
        code: a key of `PROBLEMS`.
        message: what people read; None for the table's message. Never a stack, SQL or a host name.
        request_id: the X-Request-Id of the answer; None where there is none.
        details: a list of fields at fault, or a small object that explains a refusal. Amounts are strings.
    """
    document: dict[str, Any] = {
        "code": code,
        "message": PROBLEMS[code].message if message is None else message,
        "requestId": request_id or UNKNOWN_REQUEST_ID,
    }
    if details is not None:
        document["details"] = details
    return json.dumps(document, separators=(",", ":")).encode("ascii")
