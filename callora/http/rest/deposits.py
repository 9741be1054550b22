"""Deposits: prepared for a wallet to sign, taken back signed, and followed until the money is there."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import quote

from pydantic import Field, WithJsonSchema

from callora.actors.treasury_answers import (
    ChainHalted,
    DepositMissing,
    Expired,
    Halted,
    Prepared,
    PrepareRefusal,
    Refused,
    SignedWrong,
    SimulationFailed,
    SourceMissing,
    SourceUnclear,
    TooManyAddresses,
    TooManyOpen,
    Waiting,
    WalletShort,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
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
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import VaultMissing
from callora.ledger.wallets import ADDRESS_PATTERN, is_address
from callora.store.reads import chain as reads

if TYPE_CHECKING:
    from callora.actors.treasury import Treasury

Network = Literal["testnet", "mainnet"]
NETWORKS: Final = ("testnet", "mainnet")
DEPOSIT_MAX: Final = 1_000_000_000 * 10_000_000
"""Of one deposit, in stroops."""
NOT_CONFIGURED: Final = "Deposits and withdrawals need SOROBAN_RPC_ENABLED"
_AMOUNT: Final = re.compile(r"(?:0|[1-9][0-9]{0,9})(?:\.[0-9]{1,7})?", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RETRY_SOON: Final = {"Retry-After": "5"}
_RETRY_LATER: Final = {"Retry-After": "60"}

_AmountIn = Annotated[
    Any,
    WithJsonSchema({"type": "string", "pattern": r"^(0|[1-9][0-9]{0,9})(\.[0-9]{1,7})?$", "examples": ["25.0000000"]}),
]
_NetworkIn = Annotated[Any, WithJsonSchema({"type": "string", "enum": list(NETWORKS)})]
_AddressIn = Annotated[Any, WithJsonSchema({"type": "string", "pattern": ADDRESS_PATTERN})]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="Of the transaction, 64 hexadecimal digits.")]
SignedXdr = Annotated[str, Field(min_length=1, max_length=100_000, description="The signed envelope, base64 XDR.")]


class DepositPrepare(Form):
    """What shall be deposited."""

    amount_usdc: _AmountIn = Field(default=None, description="At most 7 decimal places, at most 1000000000.")
    network: _NetworkIn = Field(default=None, description="The configured network; no other can be meant.")
    source_account: _AddressIn = Field(default=None, description="From where; else the wallet you logged in with.")


class Argument(Form):
    """One argument of the contract's call."""

    type: Literal["address", "i128"]
    value: str


class ContractOperation(Form):
    """What the transaction does."""

    type: Literal["invoke_contract"] = "invoke_contract"
    function: Literal["deposit"] = "deposit"
    args: list[Argument]


class DepositTerms(Form):
    """What it costs at most, and until when it is good."""

    fee: str = Field(description="Stroops of XLM, at most; the operator may pay it.")
    timeout: int = Field(description="Seconds from now.")
    expiresAt: InstantOut


class PreparedDeposit(Form):
    """A transaction to sign: it can be submitted as it is, but for the signature."""

    xdr: str = Field(description="The unsigned envelope, base64 XDR.")
    hash: Hash
    network: Network
    networkPassphrase: str
    contractId: str = Field(description="The vault contract.")
    amount: UsdcOut
    operation: ContractOperation
    metadata: DepositTerms
    sep7: str = Field(description="The same as a link for a wallet (SEP-7).")


class DepositSubmit(Form):
    """What the wallet made of it."""

    signed_xdr: SignedXdr


class DepositPath(Form):
    """Which deposit."""

    hash: Hash


class DepositQuery(Form):
    """On which network."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class DepositsQuery(PageQuery):
    """Which deposits."""

    network: Network | None = Field(default=None, description="The configured one, where left out.")


class DepositOut(Form):
    """A deposit."""

    hash: Hash
    network: Network
    stage: Literal["approving", "pending", "confirmed", "failed"] = Field(
        description="approving: to be signed; pending: sent; confirmed: it is in your vault; failed: it never will be."
    )
    amount_usdc: UsdcOut
    address: str | None = Field(description="From where.")
    failure: str | None
    ledger: int | None = Field(description="The ledger that holds it.")
    createdAt: InstantOut
    expiresAt: InstantOut | None = Field(description="Null for one that came without being prepared here.")
    confirmedAt: InstantOut | None = Field(description="When its ledger closed.")


class DepositList(Form):
    """A page of deposits, the latest first."""

    data: list[DepositOut]
    meta: PageMeta


class Claimed(Form):
    """What was waiting for you."""

    claimed: int = Field(description="How many deposits.")
    amount_usdc: UsdcOut


class OlderBuild(Form):
    """The older shape of a deposit."""

    sourcePublicKey: Annotated[str, Field(min_length=1, max_length=64, description="From where.")]
    vaultPublicKey: Annotated[str, Field(min_length=1, max_length=64, description="The vault contract.")]
    amount: Annotated[str, Field(min_length=1, max_length=32, description="USDC, more than 0.")]


class OlderBuilt(Form):
    """A transaction to sign, in the older shape."""

    success: Literal[True] = True
    transactionXdr: str
    hash: Hash


_PREPARE_PROBLEMS: Final = (
    "SOURCE_ACCOUNT_NOT_FOUND",
    "VAULT_NOT_FOUND",
    "WALLET_BALANCE_INSUFFICIENT",
    "DEPOSITOR_NOT_ADMITTED",
    "DEPOSITOR_BEING_ADMITTED",
    "DEPOSITOR_REFUSED",
    "TOO_MANY_DEPOSITORS",
    "TOO_MANY_OPEN_DEPOSITS",
    "SIMULATION_FAILED",
    "CHAIN_HALTED",
    "NETWORK_UNAVAILABLE",
    "COMPONENT_NOT_CONFIGURED",
    "OUTCOME_UNKNOWN",
)


def deposit_routes(treasury: "Treasury | None", database: reads.Database, network: Network, clock: Clock) -> Routes:
    """Return the routes of deposits.

    Args:
        treasury: None where the chain is not configured.
        network: the configured one.
    """
    routes = Routes("Deposits")

    @routes.add(
        "POST",
        "/api/vault/deposit/prepare",
        access=Access.USER,
        body=DepositPrepare,
        answers={200: PreparedDeposit},
        problems=(
            "MISSING_AMOUNT",
            "INVALID_AMOUNT_TYPE",
            "INVALID_AMOUNT_FORMAT",
            "INVALID_NETWORK",
            "NETWORK_MISMATCH",
            "INVALID_SOURCE_ACCOUNT",
            *_PREPARE_PROBLEMS,
        ),
    )
    async def prepare_deposit(ask: Ask[Any, Any, DepositPrepare]) -> Answer:
        """A deposit for your wallet to sign, simulated and complete.

        An address that deposits for the first time is admitted by the vault contract's owner first; where that takes
        longer than this request may, ask again after Retry-After.
        """
        amount = _amount(ask.body.amount_usdc)
        _check_network(ask.body.network, network)
        source = _address(ask.body.source_account)
        prepared = await require(treasury).deposits.prepare(UserId(ask.user_id), amount, source)
        if not isinstance(prepared, Prepared):
            raise _refusal(prepared, amount, network, clock)
        return Answer(_prepared(prepared, network))

    @routes.add(
        "POST",
        "/api/vault/deposit/submit",
        access=Access.USER,
        body=DepositSubmit,
        answers={200: DepositOut},
        problems=(
            "INVALID_SIGNED_TRANSACTION",
            "DEPOSIT_NOT_FOUND",
            "DEPOSIT_EXPIRED",
            "CHAIN_HALTED",
            "NETWORK_UNAVAILABLE",
            "COMPONENT_NOT_CONFIGURED",
            "OUTCOME_UNKNOWN",
        ),
    )
    async def submit_deposit(ask: Ask[Any, Any, DepositSubmit]) -> Answer:
        """Send a deposit that your wallet has signed. Sent again, it answers how far it is.

        It must be the very transaction that was prepared for you. It is stored before it is sent, and sent until it is
        in a ledger or its time is over.
        """
        outcome = await require(treasury).deposits.submit(UserId(ask.user_id), ask.body.signed_xdr)
        match outcome:
            case DepositMissing():
                raise ProblemRaised("DEPOSIT_NOT_FOUND")
            case SignedWrong(reason):
                raise ProblemRaised("INVALID_SIGNED_TRANSACTION", reason)
            case Expired():
                raise ProblemRaised("DEPOSIT_EXPIRED")
            case ChainHalted():
                raise ProblemRaised("CHAIN_HALTED")
        shown = await reads.find_deposit(database, UserId(ask.user_id), network, outcome.tx_hash)
        assert shown is not None, "deposits are never deleted"
        return Answer(_shown(shown))

    @routes.add("GET", "/api/vault/deposits", access=Access.USER, query=DepositsQuery, answers={200: DepositList})
    async def list_deposits(ask: Ask[Any, DepositsQuery, Any]) -> Answer:
        """Your deposits, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        if position is not None and _HASH.fullmatch(position[1]) is None:
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        before = None if position is None else (moment_of(position[0]), position[1])
        found = await reads.list_deposits(
            database, UserId(ask.user_id), ask.query.network or network, before, limit + 1
        )
        cursor = None
        if len(found) > limit:
            cursor = encode_cursor(microseconds(found[limit - 1].at), found[limit - 1].tx_hash)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(DepositList(data=[_shown(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "GET",
        "/api/vault/deposits/{hash}",
        access=Access.USER,
        path_form=DepositPath,
        query=DepositQuery,
        answers={200: DepositOut},
        problems=("DEPOSIT_NOT_FOUND",),
    )
    async def get_deposit(ask: Ask[DepositPath, DepositQuery, Any]) -> Answer:
        """How far a deposit of yours is. It has failed only when no ledger can hold it any more."""
        found = await reads.find_deposit(database, UserId(ask.user_id), ask.query.network or network, ask.path.hash)
        if found is None:
            raise ProblemRaised("DEPOSIT_NOT_FOUND")
        return Answer(_shown(found))

    @routes.add(
        "POST",
        "/api/vault/deposits/claim",
        access=Access.USER,
        answers={200: Claimed},
        problems=("WALLET_NOT_PROVED", "CHAIN_HALTED", "COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def claim_deposits(ask: Ask[Any, Any, Any]) -> Answer:
        """Take what the wallet you logged in with deposited before you did.

        What it deposits from then on is yours by itself.
        """
        treasury_ = require(treasury)
        wallet = await reads.wallet_of(database, UserId(ask.user_id))
        if wallet is None:
            raise ProblemRaised("WALLET_NOT_PROVED")
        claimed = await treasury_.booking.claim(UserId(ask.user_id), network, wallet)
        if isinstance(claimed, Halted):
            raise ProblemRaised("CHAIN_HALTED")
        return Answer(Claimed(claimed=claimed.count, amount_usdc=usdc(claimed.amount)))

    @routes.add(
        "POST",
        "/api/deposits/build",
        access=Access.USER,
        body=OlderBuild,
        answers={200: OlderBuilt},
        problems=_PREPARE_PROBLEMS,
    )
    async def build_deposit(ask: Ask[Any, Any, OlderBuild]) -> Answer:
        """A deposit for a wallet to sign, in the shape of older clients; else as `/api/vault/deposit/prepare`."""
        body = ask.body
        if not is_address(body.sourcePublicKey):
            raise invalid("body.sourcePublicKey", "Must be an account's address (G…)", "INVALID_VALUE")
        try:
            amount = stroops(body.amount)
        except ValueError as error:
            raise invalid("body.amount", str(error), "INVALID_VALUE") from None
        if not 0 < amount <= DEPOSIT_MAX:
            raise invalid("body.amount", f"Must be more than 0 and at most {usdc(DEPOSIT_MAX)}", "INVALID_VALUE")
        deposits = require(treasury).deposits
        if body.vaultPublicKey != deposits.contract_id:
            raise invalid("body.vaultPublicKey", "Must be the vault contract's address", "INVALID_VALUE")
        prepared = await deposits.prepare(UserId(ask.user_id), amount, body.sourcePublicKey)
        if not isinstance(prepared, Prepared):
            raise _refusal(prepared, amount, network, clock)
        return Answer(OlderBuilt(transactionXdr=prepared.intent.envelope, hash=prepared.intent.tx_hash))

    return routes


def require(treasury: "Treasury | None") -> "Treasury":
    """Return the treasury.

    Raises:
        ProblemRaised: COMPONENT_NOT_CONFIGURED.
    """
    if treasury is None:
        raise ProblemRaised("COMPONENT_NOT_CONFIGURED", NOT_CONFIGURED)
    return treasury


def sep7(xdr: str, passphrase: str) -> str:
    """Return a transaction as a link that wallets open. Source: SEP-7, `tx`."""
    return f"web+stellar:tx?xdr={quote(xdr, safe='')}&network_passphrase={quote(passphrase, safe='')}"


def _amount(value: object) -> Stroops:
    if value is None or value == "":
        raise ProblemRaised("MISSING_AMOUNT")
    if not isinstance(value, str):
        raise ProblemRaised("INVALID_AMOUNT_TYPE")
    amount = stroops(value) if _AMOUNT.fullmatch(value) else Stroops(0)
    if not 0 < amount <= DEPOSIT_MAX:
        raise ProblemRaised("INVALID_AMOUNT_FORMAT")
    return amount


def _check_network(value: object, network: Network) -> None:
    if value is None:
        return
    if value not in NETWORKS:
        raise ProblemRaised("INVALID_NETWORK")
    if value != network:
        raise ProblemRaised("NETWORK_MISMATCH", f"This service is on {network}")


def _address(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not is_address(value):
        raise ProblemRaised("INVALID_SOURCE_ACCOUNT")
    return value


def _refusal(refused: PrepareRefusal, amount: Stroops, network: Network, clock: Clock) -> ProblemRaised:
    match refused:
        case VaultMissing():
            return ProblemRaised("VAULT_NOT_FOUND", f"You have no vault on network '{network}'")
        case SourceUnclear(True):
            return ProblemRaised("INVALID_SOURCE_ACCOUNT", "source_account is another user's wallet")
        case SourceUnclear():
            return ProblemRaised("INVALID_SOURCE_ACCOUNT", "source_account is required: you logged in without a wallet")
        case SourceMissing():
            return ProblemRaised("SOURCE_ACCOUNT_NOT_FOUND")
        case WalletShort(has):
            details = {"required": usdc(amount), "available": None if has is None else usdc(has)}
            return ProblemRaised("WALLET_BALANCE_INSUFFICIENT", details=details)
        case Waiting(True):
            return ProblemRaised("DEPOSITOR_BEING_ADMITTED", headers=_RETRY_SOON)
        case Waiting():
            return ProblemRaised("DEPOSITOR_NOT_ADMITTED", headers=_RETRY_LATER)
        case Refused(reason):
            return ProblemRaised("DEPOSITOR_REFUSED", details=None if reason is None else {"reason": reason})
        case TooManyAddresses():
            return ProblemRaised("TOO_MANY_DEPOSITORS")
        case TooManyOpen(ends):
            seconds = max(1, math.ceil((ends - clock.now()).total_seconds()))
            return ProblemRaised("TOO_MANY_OPEN_DEPOSITS", headers={"Retry-After": str(seconds)})
        case SimulationFailed(rule):
            return ProblemRaised("SIMULATION_FAILED", details=None if rule is None else {"rule": rule})
        case ChainHalted():
            return ProblemRaised("CHAIN_HALTED")


def _prepared(prepared: Prepared, network: Network) -> PreparedDeposit:
    intent = prepared.intent
    arguments = [Argument(type="address", value=intent.address), Argument(type="i128", value=str(intent.amount))]
    return PreparedDeposit(
        xdr=intent.envelope,
        hash=intent.tx_hash,
        network=network,
        networkPassphrase=prepared.passphrase,
        contractId=prepared.contract_id,
        amount=usdc(intent.amount),
        operation=ContractOperation(args=arguments),
        metadata=DepositTerms(fee=str(intent.fee), timeout=prepared.timeout_seconds, expiresAt=iso(intent.expires_at)),
        sep7=sep7(intent.envelope, prepared.passphrase),
    )


def _shown(found: reads.Shown) -> DepositOut:
    stage: Any = found.stage
    network: Any = found.network
    return DepositOut(
        hash=found.tx_hash,
        network=network,
        stage=stage,
        amount_usdc=usdc(found.amount),
        address=found.address,
        failure=found.failure,
        ledger=found.ledger,
        createdAt=iso(found.at),
        expiresAt=None if found.expires_at is None else iso(found.expires_at),
        confirmedAt=None if found.confirmed_at is None else iso(found.confirmed_at),
    )
