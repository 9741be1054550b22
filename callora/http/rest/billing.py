"""Charges over REST: deduct from the caller's own vault, look up what became of it; refunds and grants by operators."""

from typing import Any, Final

from callora.actors.billing import (
    Billing,
    ChargeMissing,
    Credited,
    Deducted,
    KeyMissing,
    KeyNarrowed,
    Mismatch,
    NotOffered,
    Refusal,
    UserMissing,
    VaultUnclear,
)
from callora.actors.intents import reference
from callora.http.problems import ProblemRaised
from callora.http.rest.billing_forms import (
    BilledList,
    BilledRequest,
    BulkAnswer,
    BulkBody,
    BulkResult,
    Credits,
    CreditsQuery,
    DeductAnswer,
    DeductBody,
    DeductItem,
    GrantAnswer,
    GrantBody,
    ItemProblem,
    RefundAnswer,
    RefundBody,
    RequestPath,
)
from callora.http.rest.forms import (
    PageMeta,
    PageQuery,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    microseconds,
    moment_of,
    stroops,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import EventId, UserId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    Draining,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
    RefundRefused,
    StandingRefused,
    VaultMissing,
)
from callora.store.reads import billing as reads

_GRANT_MAX: Final = 1_000_000_000 * 10_000_000
_RETRY: Final = {"Retry-After": "1"}
_NARROWED: Final = {
    "api": "API_ACCESS_FORBIDDEN",
    "plan": "PLAN_ENDPOINT_NOT_ALLOWED",
    "endpoint": "ENDPOINT_FORBIDDEN",
    "scope": "SCOPE_REQUIRED",
}
_DEDUCT_PROBLEMS: Final = (
    "NOT_FOUND",
    "API_KEY_NOT_FOUND",
    "API_ACCESS_FORBIDDEN",
    "PLAN_ENDPOINT_NOT_ALLOWED",
    "ENDPOINT_FORBIDDEN",
    "VAULT_NOT_FOUND",
    "VAULT_SUSPENDED",
    "INSUFFICIENT_BALANCE",
    "QUOTA_EXHAUSTED",
    "SPENDING_LIMIT_EXCEEDED",
    "OUTCOME_UNKNOWN",
)


def billing_routes(billing: Billing, database: reads.Database) -> Routes:
    """Return the routes of charges, refunds and grants."""
    routes = Routes("Billing")

    @routes.add(
        "POST",
        "/api/billing/deduct",
        access=Access.USER,
        body=DeductBody,
        answers={200: DeductAnswer},
        problems=_DEDUCT_PROBLEMS,
        idempotency_key="optional",
    )
    async def deduct(ask: Ask[Any, Any, DeductBody]) -> Answer:
        """Charge your own vault once.

        The same requestId with the same body is charged once, however often it is sent; with another body it is
        refused. A request that was refused, or whose outcome is unknown, may be sent again.
        """
        made = await billing.deduct(UserId(ask.user_id), ask.body.order())
        if not isinstance(made, Deducted):
            raise refusal(made)
        return Answer(
            DeductAnswer(
                usageEventId=made.event_id,
                stellarTxHash=None,
                alreadyProcessed=made.already,
                amountUsdc=usdc(made.amount),
                balance_usdc=usdc(made.available),
            )
        )

    @routes.add(
        "POST",
        "/api/billing/deduct/bulk",
        access=Access.USER,
        body=BulkBody,
        answers={200: BulkAnswer},
        problems=("OUTCOME_UNKNOWN",),
        idempotency_key="optional",
    )
    async def deduct_bulk(ask: Ask[Any, Any, BulkBody]) -> Answer:
        """Charge your own vault for several requests, one after the other.

        Each item stands for itself: those that succeeded are charged whatever became of the others. Sent again, the
        items that are charged stay so and the others are tried anew.
        """
        results: list[BulkResult] = []
        fault: StoreUnavailable | None = None
        for item in ask.body.items:
            try:
                if fault is not None:
                    raise fault  # the database is away: the rest would only wait for it
                results.append(_result(item, await billing.deduct(UserId(ask.user_id), item.order())))
            except StoreUnavailable as error:
                fault = error
                results.append(_failed(item, ProblemRaised("SERVICE_UNAVAILABLE")))
            except OutcomeUnknown:
                results.append(_failed(item, ProblemRaised("OUTCOME_UNKNOWN")))
        return Answer(BulkAnswer(results=results), keep=all(each.success for each in results))

    @routes.add(
        "GET",
        "/api/billing/request/{requestId}",
        access=Access.USER,
        path_form=RequestPath,
        answers={200: BilledRequest},
        problems=("BILLING_REQUEST_NOT_FOUND",),
    )
    async def get_billing_request(ask: Ask[RequestPath, Any, Any]) -> Answer:
        """What became of a charge of yours."""
        found = await reads.find_request(database, UserId(ask.user_id), ask.path.requestId)
        if found is None:
            raise ProblemRaised("BILLING_REQUEST_NOT_FOUND")
        return Answer(_shown(found))

    @routes.add("GET", "/api/billing", access=Access.USER, query=PageQuery, answers={200: BilledList})
    async def list_billing_requests(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your charges over REST, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        after = None if position is None else (moment_of(position[0]), position[1])
        found = await reads.list_requests(database, UserId(ask.user_id), limit + 1, after)
        cursor = None
        if len(found) > limit:
            last = found[limit - 1].request
            cursor = encode_cursor(microseconds(last.created_at), last.request_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(BilledList(data=[_shown(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "GET",
        "/api/billing/credits",
        access=Access.USER,
        query=CreditsQuery,
        answers={200: Credits},
        aliases=("/api/credits",),
    )
    async def get_credits(ask: Ask[Any, CreditsQuery, Any]) -> Answer:
        """What you have to spend; nothing where you have no vault yet."""
        user_id = UserId(ask.user_id)
        network: Any = ask.query.network
        if network is None:
            vaults = await reads.vaults_of(database, user_id)
            network = next(iter(vaults)) if len(vaults) == 1 else "mainnet"
        found = await reads.credits_of(database, user_id, network)
        if found is None:
            raise ProblemRaised("INVALID_TOKEN", "The token's user does not exist")
        return Answer(
            Credits(
                user_id=user_id,
                network=network,
                balance_usdc=usdc(found.available),
                granted_usdc=usdc(found.granted),
                created_at=iso(found.created_at),
                updated_at=iso(found.updated_at),
            )
        )

    @routes.add(
        "POST",
        "/api/billing/refund",
        access=Access.ADMIN,
        body=RefundBody,
        answers={200: RefundAnswer},
        problems=("NOT_FOUND", "REFUND_EXCEEDS_CHARGE", "OUTCOME_UNKNOWN"),
        idempotency_key="required",
    )
    async def refund_charge(ask: Ask[Any, Any, RefundBody]) -> Answer:
        """Give back all or part of a charge, to the vault that paid it.

        All refunds of a usage event together never exceed what was captured for it.
        """
        body = ask.body
        ask.exchange.audit_target = body.usageEventId
        ask.exchange.audit_details |= {"reason": body.reason, "amountUsdc": body.amountUsdc or "all"}
        asked = None if body.amountUsdc is None else stroops(body.amountUsdc)
        made = await billing.refund(EventId(body.usageEventId), asked, _reference(ask, body.usageEventId))
        if isinstance(made, ChargeMissing):
            raise ProblemRaised("NOT_FOUND", "No captured usage event has this id")
        if isinstance(made, RefundRefused):
            raise ProblemRaised("REFUND_EXCEEDS_CHARGE", details={"refundable": usdc(made.refundable)})
        credited = _credited(made)
        return Answer(
            RefundAnswer(
                usageEventId=body.usageEventId,
                amountUsdc=usdc(credited.amount),
                balance_usdc=usdc(credited.available),
                alreadyProcessed=credited.already,
            )
        )

    @routes.add(
        "POST",
        "/api/admin/billing/credits/grant",
        access=Access.ADMIN,
        body=GrantBody,
        answers={200: GrantAnswer},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
        idempotency_key="required",
    )
    async def grant_credits(ask: Ask[Any, Any, GrantBody]) -> Answer:
        """Credit a user's vault with exactly this amount; it is made where he has none."""
        body = ask.body
        ask.exchange.audit_target = body.userId
        ask.exchange.audit_details |= {"reason": body.reason, "amountUsdc": body.amountUsdc, "network": body.network}
        amount = stroops(body.amountUsdc)
        if amount > _GRANT_MAX:
            raise invalid("body.amountUsdc", f"Must be at most {usdc(_GRANT_MAX)}", "TOO_LARGE")
        made = await billing.grant(
            UserId(body.userId), body.network, Stroops(amount), _reference(ask, body.userId, body.network)
        )
        if isinstance(made, UserMissing):
            raise ProblemRaised("NOT_FOUND", "No such user")
        credited = _credited(made)
        return Answer(
            GrantAnswer(
                userId=body.userId,
                network=body.network,
                amountUsdc=usdc(credited.amount),
                balance_usdc=usdc(credited.available),
                alreadyProcessed=credited.already,
            )
        )

    return routes


def refusal(outcome: Refusal) -> ProblemRaised:
    """Return the problem of a deduct that was refused."""
    match outcome:
        case Mismatch():
            return ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH", "The requestId was used for another charge")
        case NotOffered():
            return ProblemRaised("NOT_FOUND", "No published API offers this endpoint")
        case KeyMissing():
            return ProblemRaised("API_KEY_NOT_FOUND", "No usable key of yours on this network has this id")
        case KeyNarrowed(to):
            return ProblemRaised(_NARROWED[to])
        case VaultUnclear():
            return invalid("body.network", "You have more than one vault: say which pays", "REQUIRED")
        case VaultMissing():
            return ProblemRaised("VAULT_NOT_FOUND")
        case InsufficientFunds(required, available):
            details = {"required": usdc(required), "available": usdc(available)}
            return ProblemRaised("INSUFFICIENT_BALANCE", details=details)
        case StandingRefused("suspended"):
            return ProblemRaised("VAULT_SUSPENDED")
        case StandingRefused(standing, owed):
            details = {"standing": standing, "owed": usdc(owed)}
            return ProblemRaised("INSUFFICIENT_BALANCE", "The vault is in arrears", details=details)
        case PolicyRefused(code, about, message):
            return ProblemRaised(code, message, details=about)
        case Overloaded() | Draining():
            return ProblemRaised("SERVICE_UNAVAILABLE", headers=_RETRY)


def _credited(made: Credited | Mismatch | Overloaded | Draining) -> Credited:
    if isinstance(made, Mismatch):
        raise ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH")
    if isinstance(made, Overloaded | Draining):
        raise ProblemRaised("SERVICE_UNAVAILABLE", headers=_RETRY)
    return made


def _reference(ask: Ask[Any, Any, Any], *subjects: str) -> str:
    assert ask.identity is not None
    assert ask.idempotency_key is not None, "the operation requires one"
    return reference(ask.identity.actor, ask.idempotency_key, *subjects)


def _result(item: DeductItem, made: Deducted | Refusal) -> BulkResult:
    if not isinstance(made, Deducted):
        return _failed(item, refusal(made))
    return BulkResult(requestId=item.requestId, success=True, usageEventId=made.event_id, alreadyProcessed=made.already)


def _failed(item: DeductItem, raised: ProblemRaised) -> BulkResult:
    problem = ItemProblem(
        code=raised.problem.code, message=raised.message or raised.problem.message, details=raised.details
    )
    return BulkResult(requestId=item.requestId, success=False, error=problem)


def _shown(found: reads.BilledRequest) -> BilledRequest:
    request, charged = found.request, found.state == "captured"
    network: Any = found.network
    return BilledRequest(
        requestId=request.request_id,
        success=charged,
        status=found.state or "pending",
        usageEventId=None if found.state is None else request.event_id,
        stellarTxHash=None,
        alreadyProcessed=charged,
        apiId=request.api_id,
        endpointId=request.endpoint_id,
        apiKeyId=request.api_key_id,
        amountUsdc=usdc(request.amount),
        network=network,
        created_at=iso(request.created_at),
    )
