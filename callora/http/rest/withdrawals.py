"""Withdrawals: from your vault back to the wallet you logged in with."""

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.intents import reference
from callora.actors.treasury_answers import (
    ChainHalted,
    Mismatch,
    TooManyWithdrawals,
    TrustlineMissing,
    WalletNotProved,
    WithdrawalRefusal,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.deposits import Network, require
from callora.http.rest.forms import (
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
    PositiveUsdc,
    UsdcOut,
    Uuid,
    decode_cursor,
    encode_cursor,
    iso,
    microseconds,
    moment_of,
    read_uuid,
    stroops,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import UserId
from callora.ledger.outcomes import Draining, InsufficientFunds, Overloaded, StandingRefused, VaultMissing
from callora.ledger.wallets import ADDRESS_PATTERN
from callora.store.reads import chain as reads

if TYPE_CHECKING:
    from callora.actors.treasury import Treasury

_RETRY: Final = {"Retry-After": "1"}


class WithdrawalBody(Form):
    """What shall be paid out."""

    amount_usdc: PositiveUsdc
    address: Annotated[str, Field(pattern=ADDRESS_PATTERN)] | None = Field(
        default=None, description="The wallet you logged in with, and no other."
    )


class WithdrawalPath(Form):
    """Which withdrawal."""

    withdrawalId: Uuid


class WithdrawalsQuery(PageQuery):
    """Which withdrawals."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class WithdrawalOut(Form):
    """A withdrawal."""

    id: Uuid
    network: Network
    state: Literal["pending", "confirmed", "failed"] = Field(
        description="pending: your vault is debited; confirmed: the wallet was paid; failed: what was debited is back."
    )
    amount_usdc: UsdcOut
    address: str
    failure: str | None
    hash: str | None = Field(description="Of the payment, once it was seen.")
    ledger: int | None
    createdAt: InstantOut
    updatedAt: InstantOut


class WithdrawalList(Form):
    """A page of withdrawals, the latest first."""

    data: list[WithdrawalOut]
    meta: PageMeta


def withdrawal_routes(treasury: "Treasury | None", database: reads.Database, network: Network) -> Routes:
    """Return the routes of withdrawals.

    Args:
        treasury: None where the chain is not configured.
        network: the configured one.
    """
    routes = Routes("Withdrawals")

    @routes.add(
        "POST",
        "/api/vault/withdrawals",
        access=Access.USER,
        body=WithdrawalBody,
        answers={202: WithdrawalOut},
        problems=(
            "VAULT_NOT_FOUND",
            "VAULT_SUSPENDED",
            "INSUFFICIENT_BALANCE",
            "WALLET_NOT_PROVED",
            "TRUSTLINE_MISSING",
            "TOO_MANY_OPEN_WITHDRAWALS",
            "CHAIN_HALTED",
            "NETWORK_UNAVAILABLE",
            "COMPONENT_NOT_CONFIGURED",
            "OUTCOME_UNKNOWN",
        ),
        idempotency_key="required",
    )
    async def withdraw(ask: Ask[Any, Any, WithdrawalBody]) -> Answer:
        """Take USDC out of your vault. It is debited at once and paid within a few ledgers, or given back.

        It goes to the wallet you logged in with. Where the operator pays by hand, that takes as long as he does.
        """
        treasury_ = require(treasury)
        withdrawal_id = _id_of(ask)
        made = await treasury_.withdrawals.request(
            UserId(ask.user_id), withdrawal_id, stroops(ask.body.amount_usdc), ask.body.address
        )
        if isinstance(made, WithdrawalRefusal):
            raise _problem(made)
        shown = await reads.find_withdrawal(database, UserId(ask.user_id), withdrawal_id)
        assert shown is not None, "withdrawals are never deleted"
        return Answer(_shown(shown), 202)

    @routes.add(
        "GET", "/api/vault/withdrawals", access=Access.USER, query=WithdrawalsQuery, answers={200: WithdrawalList}
    )
    async def list_withdrawals(ask: Ask[Any, WithdrawalsQuery, Any]) -> Answer:
        """Your withdrawals, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        before = None if position is None else (moment_of(position[0]), read_uuid(position[1]))
        found = await reads.list_withdrawals(
            database, UserId(ask.user_id), ask.query.network or network, before, limit + 1
        )
        cursor = None
        if len(found) > limit:
            last = found[limit - 1]
            cursor = encode_cursor(microseconds(last.asked_at), last.withdrawal_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(WithdrawalList(data=[_shown(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "GET",
        "/api/vault/withdrawals/{withdrawalId}",
        access=Access.USER,
        path_form=WithdrawalPath,
        answers={200: WithdrawalOut},
        problems=("WITHDRAWAL_NOT_FOUND",),
    )
    async def get_withdrawal(ask: Ask[WithdrawalPath, Any, Any]) -> Answer:
        """How far a withdrawal of yours is."""
        found = await reads.find_withdrawal(database, UserId(ask.user_id), ask.path.withdrawalId)
        if found is None:
            raise ProblemRaised("WITHDRAWAL_NOT_FOUND")
        return Answer(_shown(found))

    return routes


def _id_of(ask: Ask[Any, Any, Any]) -> str:
    """Return the id of the withdrawal that an Idempotency-Key names: the same for the same key, for ever."""
    assert ask.identity is not None
    assert ask.idempotency_key is not None, "the operation requires one"
    named = hashlib.sha256(reference(ask.identity.actor, ask.idempotency_key, "withdrawal").encode()).hexdigest()
    return f"{named[:8]}-{named[8:12]}-8{named[13:16]}-8{named[17:20]}-{named[20:32]}"


def _problem(refused: WithdrawalRefusal) -> ProblemRaised:
    match refused:
        case VaultMissing():
            return ProblemRaised("VAULT_NOT_FOUND")
        case StandingRefused():
            return ProblemRaised("VAULT_SUSPENDED")
        case InsufficientFunds(required, available):
            details = {"required": usdc(required), "available": usdc(available)}
            return ProblemRaised("INSUFFICIENT_BALANCE", details=details)
        case WalletNotProved(None):
            return ProblemRaised("WALLET_NOT_PROVED")
        case WalletNotProved():
            return ProblemRaised("WALLET_NOT_PROVED", "Withdrawals go to the wallet you logged in with, and no other")
        case TrustlineMissing():
            return ProblemRaised("TRUSTLINE_MISSING")
        case TooManyWithdrawals():
            return ProblemRaised("TOO_MANY_OPEN_WITHDRAWALS")
        case Mismatch():
            return ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH")
        case ChainHalted():
            return ProblemRaised("CHAIN_HALTED")
        case Overloaded() | Draining():
            return ProblemRaised("SERVICE_UNAVAILABLE", headers=_RETRY)


def _shown(found: reads.ShownWithdrawal) -> WithdrawalOut:
    network: Any = found.network
    state: Any = found.state if found.state in ("confirmed", "failed") else "pending"
    return WithdrawalOut(
        id=found.withdrawal_id,
        network=network,
        state=state,
        amount_usdc=usdc(found.amount),
        address=found.address,
        failure=found.failure,
        hash=found.tx_hash,
        ledger=found.ledger,
        createdAt=iso(found.asked_at),
        updatedAt=iso(found.updated_at),
    )
