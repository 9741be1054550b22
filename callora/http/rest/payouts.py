"""Developers' withdrawals: prepared for a wallet to sign, taken back signed, and followed to a ledger."""

import re
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from callora.actors.payout_answers import (
    Balance,
    BalanceShort,
    ChainHalted,
    ContractRefuses,
    Expired,
    NoAccount,
    NoDeveloper,
    NoTrustline,
    NoWallet,
    PayoutMissing,
    Prepared,
    PrepareRefusal,
    SignedWrong,
    SubmitRefusal,
    TooManyOpen,
)
from callora.config.settings import Settings
from callora.http.problems import ProblemRaised
from callora.http.rest.deposits import NOT_CONFIGURED, DepositTerms, Hash, Network, SignedXdr, sep7
from callora.http.rest.forms import (
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
    PositiveUsdc,
    UsdcOut,
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
from callora.http.rest.revenue import developer_of, explorer_url
from callora.ledger.ids import UserId
from callora.store.reads import settlements as reads

if TYPE_CHECKING:
    from callora.actors.payouts import Payouts

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_UNREACHED: Final = ("NETWORK_UNAVAILABLE", "COMPONENT_NOT_CONFIGURED")


class BalanceOut(Form):
    """What the settlement contract owes you."""

    network: Network
    address: str = Field(description="The wallet you logged in with.")
    balance_usdc: UsdcOut


class PayoutPrepare(Form):
    """What shall be withdrawn."""

    amount_usdc: PositiveUsdc | None = Field(default=None, description="All there is, where left out.")


class ContractArgument(Form):
    """One argument of the contract's call."""

    type: Literal["address", "i128", "void"]
    value: str


class PayoutOperation(Form):
    """What the transaction does."""

    type: Literal["invoke_contract"] = "invoke_contract"
    function: Literal["withdraw_developer_balance"] = "withdraw_developer_balance"
    args: list[ContractArgument]


class PreparedPayout(Form):
    """A transaction to sign: it can be submitted as it is, but for the signature."""

    xdr: str = Field(description="The unsigned envelope, base64 XDR.")
    hash: Hash
    network: Network
    networkPassphrase: str
    contractId: str = Field(description="The settlement contract.")
    address: str = Field(description="Your wallet, which signs and is paid.")
    amount: UsdcOut
    operation: PayoutOperation
    metadata: DepositTerms
    sep7: str = Field(description="The same as a link for a wallet (SEP-7).")


class PayoutSubmit(Form):
    """What the wallet made of it."""

    signed_xdr: SignedXdr


class PayoutPath(Form):
    """Which withdrawal."""

    hash: Hash


class PayoutsQuery(PageQuery):
    """Which withdrawals."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class PayoutOut(Form):
    """A withdrawal of yours."""

    hash: Hash
    network: Network
    stage: Literal["approving", "pending", "confirmed", "failed"] = Field(
        description="approving: to be signed; pending: sent; confirmed: your wallet has it; failed: it never will by "
        "this, and the settlement contract owes it still."
    )
    amount_usdc: UsdcOut
    address: str
    failure: str | None
    ledger: int | None = Field(description="The ledger that holds it.")
    explorer_url: str | None = Field(description="Where people look at it; null on networks that nobody shows.")
    createdAt: InstantOut
    expiresAt: InstantOut
    confirmedAt: InstantOut | None = Field(description="When its ledger closed.")


class PayoutList(Form):
    """A page of withdrawals, the latest first."""

    data: list[PayoutOut]
    meta: PageMeta


def payout_routes(payouts: "Payouts | None", settings: Settings, database: reads.Database) -> Routes:
    """Return the routes of developers' withdrawals.

    Args:
        payouts: None where the chain is not configured.
    """
    routes = Routes("Developers")
    configured: Any = settings.stellar_network

    def require() -> "Payouts":
        if payouts is None:
            raise ProblemRaised("COMPONENT_NOT_CONFIGURED", NOT_CONFIGURED)
        return payouts

    def shown(found: reads.ShownPayout) -> PayoutOut:
        network: Any = found.network
        stage: Any = found.stage
        sent = found.tx_hash if found.stage in ("pending", "confirmed") else None
        return PayoutOut(
            hash=found.tx_hash,
            network=network,
            stage=stage,
            amount_usdc=usdc(found.amount),
            address=found.address,
            failure=found.failure,
            ledger=found.ledger,
            explorer_url=explorer_url(settings, found.network, sent),
            createdAt=iso(found.prepared_at),
            expiresAt=iso(found.expires_at),
            confirmedAt=None if found.applied_at is None else iso(found.applied_at),
        )

    @routes.add(
        "GET",
        "/api/developers/balance",
        access=Access.USER,
        answers={200: BalanceOut},
        problems=("DEVELOPER_NOT_FOUND", "WALLET_NOT_PROVED", *_UNREACHED),
    )
    async def get_developer_balance(ask: Ask[Any, Any, Any]) -> Answer:
        """What the settlement contract owes the wallet you logged in with, as the network says now."""
        balance = await require().balance(UserId(ask.user_id))
        if not isinstance(balance, Balance):
            raise _refusal(balance)
        return Answer(BalanceOut(network=configured, address=balance.address, balance_usdc=usdc(balance.amount)))

    @routes.add(
        "POST",
        "/api/developers/withdrawals/prepare",
        access=Access.USER,
        body=PayoutPrepare,
        answers={200: PreparedPayout},
        problems=(
            "DEVELOPER_NOT_FOUND",
            "WALLET_NOT_PROVED",
            "SOURCE_ACCOUNT_NOT_FOUND",
            "TRUSTLINE_MISSING",
            "DEVELOPER_BALANCE_INSUFFICIENT",
            "TOO_MANY_OPEN_WITHDRAWALS",
            "SIMULATION_FAILED",
            "CHAIN_HALTED",
            "OUTCOME_UNKNOWN",
            *_UNREACHED,
        ),
    )
    async def prepare_developer_withdrawal(ask: Ask[Any, Any, PayoutPrepare]) -> Answer:
        """What you were credited, into your wallet: a transaction for it to sign, simulated and complete.

        It is paid by the settlement contract to the wallet you logged in with, which pays the network's fee.
        """
        amount = None if ask.body.amount_usdc is None else stroops(ask.body.amount_usdc)
        prepared = await require().prepare(UserId(ask.user_id), amount)
        if not isinstance(prepared, Prepared):
            raise _refusal(prepared)
        return Answer(_prepared(prepared, configured))

    @routes.add(
        "POST",
        "/api/developers/withdrawals/submit",
        access=Access.USER,
        body=PayoutSubmit,
        answers={200: PayoutOut},
        problems=(
            "DEVELOPER_NOT_FOUND",
            "INVALID_SIGNED_TRANSACTION",
            "WITHDRAWAL_NOT_FOUND",
            "WITHDRAWAL_EXPIRED",
            "CHAIN_HALTED",
            "OUTCOME_UNKNOWN",
            *_UNREACHED,
        ),
    )
    async def submit_developer_withdrawal(ask: Ask[Any, Any, PayoutSubmit]) -> Answer:
        """Send a withdrawal that your wallet has signed. Sent again, it answers how far it is.

        It must be the very transaction that was prepared for you. It is stored before it is sent, and sent until it is
        in a ledger or its time is over.
        """
        outcome = await require().submit(UserId(ask.user_id), ask.body.signed_xdr)
        if isinstance(outcome, SubmitRefusal):
            raise _refusal(outcome)
        found = await reads.find_payout(database, outcome.developer_id, outcome.tx_hash)
        assert found is not None, "withdrawals are never deleted"
        return Answer(shown(found))

    @routes.add(
        "GET",
        "/api/developers/withdrawals",
        access=Access.USER,
        query=PayoutsQuery,
        answers={200: PayoutList},
        problems=("DEVELOPER_NOT_FOUND",),
    )
    async def list_developer_withdrawals(ask: Ask[Any, PayoutsQuery, Any]) -> Answer:
        """Your withdrawals from the settlement contract, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        if position is not None and _HASH.fullmatch(position[1]) is None:
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        before = None if position is None else (moment_of(position[0]), position[1])
        developer_id = await developer_of(database, ask.user_id)
        found = await reads.list_payouts(database, ask.query.network or configured, developer_id, before, limit + 1)
        cursor = None
        if len(found) > limit:
            cursor = encode_cursor(microseconds(found[limit - 1].prepared_at), found[limit - 1].tx_hash)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(PayoutList(data=[shown(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "GET",
        "/api/developers/withdrawals/{hash}",
        access=Access.USER,
        path_form=PayoutPath,
        answers={200: PayoutOut},
        problems=("DEVELOPER_NOT_FOUND", "WITHDRAWAL_NOT_FOUND"),
    )
    async def get_developer_withdrawal(ask: Ask[PayoutPath, Any, Any]) -> Answer:
        """How far a withdrawal of yours is. It has failed only when no ledger can hold it any more."""
        developer_id = await developer_of(database, ask.user_id)
        found = await reads.find_payout(database, developer_id, ask.path.hash)
        if found is None:
            raise ProblemRaised("WITHDRAWAL_NOT_FOUND")
        return Answer(shown(found))

    return routes


def _refusal(refused: PrepareRefusal | SubmitRefusal) -> ProblemRaised:
    match refused:
        case NoDeveloper():
            return ProblemRaised("DEVELOPER_NOT_FOUND")
        case NoWallet():
            return ProblemRaised("WALLET_NOT_PROVED")
        case NoAccount():
            return ProblemRaised("SOURCE_ACCOUNT_NOT_FOUND")
        case NoTrustline():
            return ProblemRaised("TRUSTLINE_MISSING")
        case BalanceShort(required, available):
            details = {"required": None if required is None else usdc(required), "available": usdc(available)}
            return ProblemRaised("DEVELOPER_BALANCE_INSUFFICIENT", details=details)
        case TooManyOpen():
            return ProblemRaised("TOO_MANY_OPEN_WITHDRAWALS")
        case ContractRefuses(rule):
            return ProblemRaised("SIMULATION_FAILED", details=None if rule is None else {"rule": rule})
        case PayoutMissing():
            return ProblemRaised("WITHDRAWAL_NOT_FOUND")
        case SignedWrong(reason):
            return ProblemRaised("INVALID_SIGNED_TRANSACTION", reason)
        case Expired():
            return ProblemRaised("WITHDRAWAL_EXPIRED")
        case ChainHalted():
            return ProblemRaised("CHAIN_HALTED")


def _prepared(prepared: Prepared, network: Network) -> PreparedPayout:
    payout = prepared.payout
    arguments = [
        ContractArgument(type="address", value=payout.address),
        ContractArgument(type="i128", value=str(payout.amount)),
        ContractArgument(type="void", value=""),
    ]
    return PreparedPayout(
        xdr=payout.envelope,
        hash=payout.tx_hash,
        network=network,
        networkPassphrase=prepared.passphrase,
        contractId=prepared.contract_id,
        address=payout.address,
        amount=usdc(payout.amount),
        operation=PayoutOperation(args=arguments),
        metadata=DepositTerms(fee=str(payout.fee), timeout=prepared.timeout_seconds, expiresAt=iso(payout.expires_at)),
        sep7=sep7(payout.envelope, prepared.passphrase),
    )
