"""Holds for services that charge outside the proxy: placed, captured, extended, released, refunded and looked up."""

from typing import Any, Final

from callora.actors import holds as actors
from callora.actors.billing import KeyMissing, Mismatch, VaultUnclear
from callora.actors.holds import HoldCaptured, Holds, HoldStands
from callora.actors.intents import reference
from callora.http.problems import ProblemRaised
from callora.http.rest import billing
from callora.http.rest.forms import invalid, stroops, usdc
from callora.http.rest.hold_forms import (
    CaptureBody,
    ExtendBody,
    HoldBody,
    HoldCapturedOut,
    HoldOut,
    HoldPath,
    HoldPlacedOut,
    HoldReleaseBody,
    TransactionPath,
    TransactionRefundBody,
    TransactionRefundOut,
    shown,
)
from callora.http.rest.key_forms import KeyPath
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.spending import LimitReads, LimitsOut
from callora.ledger.ids import ApiKeyId, HoldId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import RefundRefused
from callora.store.reads import holds as reads

_MONEY_PROBLEMS: Final = (
    "VAULT_NOT_FOUND",
    "VAULT_SUSPENDED",
    "INSUFFICIENT_BALANCE",
    "QUOTA_EXHAUSTED",
    "SPENDING_LIMIT_EXCEEDED",
    "OUTCOME_UNKNOWN",
)


def hold_routes(holds: Holds, database: reads.Database, limits: LimitReads) -> Routes:
    """Return the routes of holds, and of what services read of a key."""
    routes = Routes("Holds")
    _placing_routes(routes, holds, database)
    _ending_routes(routes, holds)

    @routes.add(
        "GET",
        "/api/keys/{keyId}/spending",
        access=Access.SERVICE,
        path_form=KeyPath,
        answers={200: LimitsOut},
        problems=("API_KEY_NOT_FOUND",),
    )
    async def get_key_spending(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """What a key may spend, and has spent; what is held counts."""
        key_id = ApiKeyId(ask.path.keyId)
        key = await reads.paying_key(database, key_id)
        if key is None:
            raise refusal(KeyMissing())
        network: Any = key.network
        return Answer(await limits.shown(key.vault_id, key_id, network))

    return routes


def _placing_routes(routes: Routes, holds: Holds, database: reads.Database) -> None:
    @routes.add(
        "POST",
        "/api/billing/holds",
        access=Access.SERVICE,
        body=HoldBody,
        answers={201: HoldPlacedOut, 200: HoldPlacedOut},
        problems=(
            "NOT_FOUND",
            "API_KEY_NOT_FOUND",
            "API_ACCESS_FORBIDDEN",
            "PLAN_ENDPOINT_NOT_ALLOWED",
            "ENDPOINT_FORBIDDEN",
            "SCOPE_REQUIRED",
            "IDEMPOTENCY_KEY_REUSE_MISMATCH",
            "HOLD_EXPIRED",
            "HOLD_RELEASED",
            *_MONEY_PROBLEMS,
        ),
    )
    async def place_hold(ask: Ask[Any, Any, HoldBody]) -> Answer:
        """Hold an amount of a key's vault.

        The same requestId with the same body is one hold, however often it is sent; 200 says that it was placed
        before. One that was refused may be sent again.
        """
        made = _done(await holds.place(ask.body.order()))
        return Answer(_placed(made), status=200 if made.already else 201)

    @routes.add(
        "GET",
        "/api/billing/holds/{holdId}",
        access=Access.SERVICE,
        path_form=HoldPath,
        answers={200: HoldOut},
        problems=("HOLD_NOT_FOUND",),
    )
    async def get_hold(ask: Ask[HoldPath, Any, Any]) -> Answer:
        """What became of a hold."""
        found = await reads.find_hold(database, HoldId(ask.path.holdId))
        if found is None:
            raise ProblemRaised("HOLD_NOT_FOUND")
        return Answer(HoldOut(**shown(found)))

    @routes.add(
        "POST",
        "/api/billing/holds/{holdId}/extend",
        access=Access.SERVICE,
        path_form=HoldPath,
        body=ExtendBody,
        answers={200: HoldPlacedOut},
        problems=("HOLD_NOT_FOUND", "HOLD_ALREADY_CAPTURED", "HOLD_EXPIRED", "HOLD_RELEASED", *_MONEY_PROBLEMS),
        idempotency_key="required",
    )
    async def extend_hold(ask: Ask[HoldPath, Any, ExtendBody]) -> Answer:
        """Give a hold more time, and perhaps more money: once for each Idempotency-Key."""
        body = ask.body
        extra = Stroops(0) if body.extraAmountUsdc is None else stroops(body.extraAmountUsdc)
        named = _reference(ask, ask.path.holdId)
        return Answer(_placed(_done(await holds.extend(HoldId(ask.path.holdId), body.seconds, extra, named))))


def _ending_routes(routes: Routes, holds: Holds) -> None:
    @routes.add(
        "POST",
        "/api/billing/holds/{holdId}/capture",
        access=Access.SERVICE,
        path_form=HoldPath,
        body=CaptureBody,
        answers={200: HoldCapturedOut},
        problems=(
            "HOLD_NOT_FOUND",
            "HOLD_AMOUNT_MISMATCH",
            "HOLD_ALREADY_CAPTURED",
            "HOLD_EXPIRED",
            "HOLD_RELEASED",
            "OUTCOME_UNKNOWN",
        ),
    )
    async def capture_hold(ask: Ask[HoldPath, Any, CaptureBody]) -> Answer:
        """Charge a hold for a transaction.

        A transaction is charged once a vault: repeated it changes nothing, and of two holds that are captured for one
        transaction and amount the second is released. A hold that expired is held again where that is possible.
        """
        made = await holds.capture(HoldId(ask.path.holdId), ask.body.order())
        if not isinstance(made, HoldCaptured):
            raise refusal(made)
        charged = made.charged
        return Answer(
            HoldCapturedOut(
                **shown(made.found),
                alreadyProcessed=made.already,
                balance_usdc=usdc(made.found.available),
                chargedHoldId=charged.hold.hold_id,
                chargedUsdc=usdc(charged.amount),
            )
        )

    @routes.add(
        "POST",
        "/api/billing/holds/{holdId}/release",
        access=Access.SERVICE,
        path_form=HoldPath,
        answers={200: HoldPlacedOut},
        problems=("HOLD_NOT_FOUND", "HOLD_ALREADY_CAPTURED", "OUTCOME_UNKNOWN"),
    )
    async def release_hold(ask: Ask[HoldPath, Any, Any]) -> Answer:
        """Give a hold back whole. Repeated, it changes nothing."""
        return Answer(_placed(_done(await holds.release(HoldId(ask.path.holdId)))))

    @routes.add(
        "POST",
        "/api/billing/holds/release",
        access=Access.SERVICE,
        body=HoldReleaseBody,
        answers={200: HoldPlacedOut},
        problems=("API_KEY_NOT_FOUND", "HOLD_ALREADY_CAPTURED", "OUTCOME_UNKNOWN"),
    )
    async def release_hold_request(ask: Ask[Any, Any, HoldReleaseBody]) -> Answer:
        """Give a hold back by its requestId, also one that is not known: should it come later, it is refused."""
        body = ask.body
        return Answer(_placed(_done(await holds.release_request(ApiKeyId(body.apiKeyId), body.requestId))))

    @routes.add(
        "POST",
        "/api/billing/transactions/{transactionId}/refund",
        access=Access.SERVICE,
        path_form=TransactionPath,
        body=TransactionRefundBody,
        answers={200: TransactionRefundOut},
        problems=("API_KEY_NOT_FOUND", "HOLD_NOT_FOUND", "REFUND_EXCEEDS_CHARGE", "OUTCOME_UNKNOWN"),
        idempotency_key="required",
        audited=True,
    )
    async def refund_transaction(ask: Ask[TransactionPath, Any, TransactionRefundBody]) -> Answer:
        """Give back all or part of what a transaction was charged: once for each Idempotency-Key.

        All refunds together never exceed what was captured. What is given back counts as not spent.
        """
        body = ask.body
        ask.exchange.audit_details |= {"reason": body.reason, "amountUsdc": body.amountUsdc or "all"}
        made = await holds.refund(
            ask.path.transactionId,
            None if body.apiKeyId is None else ApiKeyId(body.apiKeyId),
            None if body.amountUsdc is None else stroops(body.amountUsdc),
            lambda found: _reference(ask, found.hold.hold_id),
        )
        if isinstance(made, RefundRefused):
            raise ProblemRaised("REFUND_EXCEEDS_CHARGE", details={"refundable": usdc(made.refundable)})
        if not isinstance(made, tuple):
            raise refusal(made)
        found, credited = made
        return Answer(
            TransactionRefundOut(
                transactionId=ask.path.transactionId,
                holdId=found.hold.hold_id,
                usageEventId=found.hold.event_id,
                amountUsdc=usdc(credited.amount),
                refundedUsdc=usdc(found.refunded),
                alreadyProcessed=credited.already,
                balance_usdc=usdc(credited.available),
            )
        )


def refusal(outcome: actors.Refusal) -> ProblemRaised:
    """Return the problem of what was refused."""
    match outcome:
        case actors.HoldMissing():
            return ProblemRaised("HOLD_NOT_FOUND")
        case actors.HoldAlreadyCaptured(stored):
            return ProblemRaised("HOLD_ALREADY_CAPTURED", details={"transactionId": stored})
        case actors.HoldAmountMismatch(stored, given):
            return ProblemRaised("HOLD_AMOUNT_MISMATCH", details={"stored": usdc(stored), "given": usdc(given)})
        case actors.HoldEnded("released"):
            return ProblemRaised("HOLD_RELEASED")
        case actors.HoldEnded(_, None):
            return ProblemRaised("HOLD_EXPIRED")
        case actors.HoldEnded(because=because):
            assert because is not None, "that case is above"
            why = refusal(because)
            return ProblemRaised("HOLD_EXPIRED", details={"code": why.problem.code, "details": why.details})
        case Mismatch():
            return ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH", "This name was used for something else")
        case KeyMissing():
            return ProblemRaised("API_KEY_NOT_FOUND", "No usable key has this id")
        case VaultUnclear():
            return invalid("body.apiKeyId", "Several vaults paid for transactions of this name: say which", "REQUIRED")
        case _:
            return billing.refusal(outcome)


def _done(made: HoldStands | actors.Refusal) -> HoldStands:
    if not isinstance(made, HoldStands):
        raise refusal(made)
    return made


def _placed(made: HoldStands) -> HoldPlacedOut:
    return HoldPlacedOut(**shown(made.found), alreadyProcessed=made.already, balance_usdc=usdc(made.found.available))


def _reference(ask: Ask[Any, Any, Any], *subjects: str) -> str:
    assert ask.identity is not None
    assert ask.idempotency_key is not None, "the operation requires one"
    return reference(ask.identity.actor, ask.idempotency_key, *subjects)
