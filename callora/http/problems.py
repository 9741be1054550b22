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
        "The service drains before a restart, a queue is full, or the database or the store of rate limits is away. "
        "Nothing was charged.",
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
        "The body exceeds GATEWAY_BODY_LIMIT on /v1/call, or REQUEST_BODY_LIMIT elsewhere; or it is to be read for a "
        "quantity or with an Idempotency-Key, and is longer than what is read.",
        "Send less, split it, or ask the operator for a larger limit.",
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
        "PLAN_ENDPOINT_NOT_ALLOWED",
        403,
        "The plan does not include this API",
        "The plan of the vault is for other APIs; details name those that it lacks.",
        "Subscribe to a plan that includes it: GET /api/plans.",
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
        "MAX_CHARGE_EXCEEDED",
        402,
        "The call costs more than its X-Callora-Max-Charge",
        "What the call is known to cost at least is above what the caller allows; details give required and maxCharge. "
        "Nothing was held.",
        "Send less in one call, or a higher X-Callora-Max-Charge.",
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
        "The hold's time passed before it was captured. Its amount was given back and could not be held again; "
        "details say why.",
        "Begin again with a new hold.",
    ),
    Problem(
        "HOLD_NOT_FOUND",
        404,
        "No such hold",
        "No hold has this id, or none is captured for this transaction.",
        "Place it first; its requestId finds it again.",
    ),
    Problem(
        "HOLD_AMOUNT_MISMATCH",
        409,
        "The amount is not the hold's",
        "An exact capture of another amount than is held, or of a transaction that was captured for another; "
        "details give stored and given.",
        "Capture what is held, or say `partial`.",
    ),
    Problem(
        "HOLD_ALREADY_CAPTURED",
        409,
        "The hold is captured",
        "It was captured for the transaction that details name, and is neither captured for another nor extended nor "
        "released.",
        "Refund it by its transaction.",
    ),
    Problem(
        "HOLD_RELEASED",
        409,
        "The hold was released",
        "It was released, perhaps before it was placed; nothing is placed or captured under its name any more.",
        "Begin again with a new hold.",
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
    Problem("PLAN_NOT_FOUND", 404, "No such plan", "No active plan has this id.", "List them: GET /api/plans."),
    Problem(
        "SUBSCRIPTION_NOT_FOUND",
        404,
        "No such subscription",
        "No subscription of yours has this id.",
        "List them: GET /api/subscriptions.",
    ),
    Problem(
        "QUOTA_REQUEST_NOT_FOUND", 404, "No such request", "No request for credits has this id.", "List the requests."
    ),
    Problem(
        "INVALID_WEBHOOK_REGISTRATION",
        400,
        "The webhook cannot be registered so",
        "A secret is given, or a developerId that is not your own.",
        "Leave both out.",
    ),
    Problem(
        "INVALID_WEBHOOK_EVENT_TYPES",
        400,
        "Some of these events are not told",
        "No event is named, or one that does not exist.",
        "Name some of details.known.",
    ),
    Problem(
        "INVALID_WEBHOOK_URL",
        400,
        "Nothing is sent to this URL",
        "The URL is malformed, or no https URL in production, or its host cannot be resolved or leads to a private "
        "address.",
        "Give a public https URL without user name and fragment.",
    ),
    Problem(
        "INVALID_RETRY_POLICY",
        400,
        "maxRetries must be 0 to 10, baseDelayMs 100 to 60000",
        "A number of the retry policy is out of its bounds.",
        "Keep within them.",
    ),
    Problem(
        "TOO_MANY_WEBHOOKS",
        409,
        "You have as many webhooks as anyone may",
        "You have 20 endpoints.",
        "Delete one, or have one hear of more events.",
    ),
    Problem(
        "WEBHOOK_NOT_FOUND", 404, "No such webhook", "No webhook of yours has this id.", "List them: GET /api/webhooks."
    ),
    Problem(
        "WEBHOOK_DELIVERY_NOT_FOUND",
        404,
        "No such delivery",
        "No delivery to a webhook of yours has this id, or it is past its retention.",
        "List them: GET /api/webhooks/{webhookId}/deliveries.",
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
    Problem("DISPUTE_NOT_FOUND", 404, "No such dispute", "No dispute of yours has this id.", "List the disputes."),
    Problem(
        "DISPUTE_EXISTS",
        409,
        "The charge is disputed already",
        "A usage event is disputed once, whatever was decided; details give the dispute's id and status.",
        "Look at that dispute.",
    ),
    Problem(
        "DISPUTE_RESOLVED",
        409,
        "The dispute is decided already",
        "A dispute is decided once; details give its status.",
        "Read what was decided. A refund beyond it: POST /api/billing/refund.",
    ),
    Problem(
        "NOTHING_TO_REFUND",
        409,
        "Nothing of the usage event can be given back",
        "The usage event was not charged, cost no money, or was refunded whole.",
        "Nothing; an operator upholds such a dispute.",
    ),
    # Deposits and withdrawals
    Problem("MISSING_AMOUNT", 400, "amount_usdc is required", "amount_usdc is missing or empty.", "Send an amount."),
    Problem(
        "INVALID_AMOUNT_TYPE",
        400,
        "amount_usdc must be a string",
        "amount_usdc is a number or something else than a text.",
        "Send the amount as a decimal string.",
    ),
    Problem(
        "INVALID_AMOUNT_FORMAT",
        400,
        "amount_usdc must be a decimal with 1 to 7 places, more than 0 and at most 1000000000",
        "amount_usdc is no such decimal.",
        "Send an amount such as 25.0000000.",
    ),
    Problem("INVALID_NETWORK", 400, "No such network", "network is neither testnet nor mainnet.", "Leave it out."),
    Problem(
        "NETWORK_MISMATCH",
        400,
        "The service is on another network",
        "network is not the one that the service is configured for; the message names that.",
        "Leave network out, or use the service of that network.",
    ),
    Problem(
        "INVALID_SOURCE_ACCOUNT",
        400,
        "The account's address is not valid",
        "It is no address of an account with a right checksum, is another user's wallet, or is missing where you "
        "logged in without a wallet.",
        "Send the address of a wallet of yours (G…).",
    ),
    Problem(
        "SOURCE_ACCOUNT_NOT_FOUND",
        400,
        "The account does not exist on the network",
        "The network knows no account of this address.",
        "Fund the account first.",
    ),
    Problem(
        "WALLET_BALANCE_INSUFFICIENT",
        409,
        "The wallet does not have the amount",
        "The account has less USDC than the deposit, or no trustline; details give required and available.",
        "Deposit less, or fund the wallet.",
    ),
    Problem(
        "DEPOSITOR_NOT_ADMITTED",
        409,
        "The address waits to be admitted",
        "The vault contract takes deposits of addresses that its owner admitted, and an operator has yet to do so.",
        "Ask again after Retry-After seconds.",
    ),
    Problem(
        "DEPOSITOR_BEING_ADMITTED",
        503,
        "The address is being admitted",
        "The vault contract's owner is admitting the address; that takes a few ledgers.",
        "Ask again after Retry-After seconds.",
    ),
    Problem(
        "DEPOSITOR_REFUSED",
        403,
        "Deposits of this address are refused",
        "The operator refused the address; details say why, where he said so.",
        "Ask the operator.",
    ),
    Problem(
        "TOO_MANY_DEPOSITORS",
        409,
        "You have asked for too many addresses",
        "A user may have a few addresses admitted: each makes the contract's calls dearer.",
        "Deposit from an address that is admitted.",
    ),
    Problem(
        "TOO_MANY_OPEN_DEPOSITS",
        429,
        "Too many deposits are under way",
        "Prepared deposits that are neither confirmed nor expired are limited for each vault.",
        "Finish one, or ask again after Retry-After seconds.",
    ),
    Problem(
        "SIMULATION_FAILED",
        502,
        "The contract would not take the transaction",
        "The network simulated the deposit or withdrawal and the contract refused it; details name the contract's "
        "rule, such as Paused, BelowMinDeposit or DailyWithdrawCapExceeded.",
        "Correct what the rule names, or ask the operator.",
    ),
    Problem(
        "INVALID_SIGNED_TRANSACTION",
        400,
        "The signed transaction is not valid",
        "It cannot be read, is not the one that was prepared, is not signed, or a signature is wrong; the message says "
        "which.",
        "Sign exactly the XDR that was prepared, with the account's key.",
    ),
    Problem(
        "DEPOSIT_NOT_FOUND",
        404,
        "No such deposit",
        "No deposit of yours has this hash.",
        "List them: GET /api/vault/deposits.",
    ),
    Problem(
        "DEPOSIT_EXPIRED",
        409,
        "The prepared deposit has expired",
        "It was not sent within its time.",
        "Prepare another.",
    ),
    Problem(
        "WALLET_NOT_PROVED",
        409,
        "You have not proved to hold this wallet",
        "Suspense is claimed by, and withdrawals go to, the wallet that you logged in with, and no other.",
        "Log in with the wallet.",
    ),
    Problem(
        "TRUSTLINE_MISSING",
        409,
        "The wallet cannot receive USDC",
        "The account does not exist, or has no trustline for USDC.",
        "Add the trustline in the wallet, then ask again.",
    ),
    Problem(
        "TOO_MANY_OPEN_WITHDRAWALS",
        409,
        "Too many withdrawals are under way",
        "Withdrawals that are neither confirmed nor failed are limited for each vault, and for each developer.",
        "Wait for one to end.",
    ),
    Problem(
        "WITHDRAWAL_NOT_FOUND",
        404,
        "No such withdrawal",
        "No withdrawal of yours has this id.",
        "List them: GET /api/vault/withdrawals.",
    ),
    Problem(
        "WITHDRAWAL_EXPIRED",
        409,
        "The prepared withdrawal has expired",
        "It was not sent within its time.",
        "Prepare another.",
    ),
    Problem(
        "DEVELOPER_BALANCE_INSUFFICIENT",
        409,
        "The settlement contract owes you less",
        "You were credited less than you want to withdraw, or nothing; details give required and available.",
        "Withdraw less, or wait for the next settlement: GET /api/developers/revenue.",
    ),
    Problem(
        "SETTLEMENT_NOT_FOUND",
        404,
        "No such settlement",
        "No settlement of yours has this id.",
        "List them: GET /api/developers/settlements.",
    ),
    Problem(
        "CHAIN_HALTED",
        503,
        "Deposits and withdrawals are stopped",
        "What the network shows does not fit what was seen before, and an operator has to look. Balances are as they "
        "were.",
        "Ask the operator; calls that are paid from a balance go on.",
    ),
    Problem(
        "COMPONENT_NOT_CONFIGURED",
        503,
        "This part is not configured",
        "The operator has not set what the route needs; the message names it.",
        "Ask the operator.",
    ),
    Problem(
        "NETWORK_UNAVAILABLE",
        503,
        "The Stellar network cannot be reached",
        "No node of the chain answers, or what answers is not what the operator configured. Nothing was sent. Calls "
        "that are paid from a balance go on.",
        "Repeat the request after Retry-After seconds; without that field, ask the operator.",
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
