"""What operators see and do about the chain: what is watched, suspense, gaps, comparisons, depositors, payments."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.treasury_answers import (
    Admitted,
    ContractRefuses,
    Halted,
    MayBePaid,
    NotAsked,
    NotInSuspense,
    NotOpen,
    NotTaken,
    Offered,
    Taken,
)
from callora.http.problems import ProblemRaised
from callora.http.rest.billing_forms import Reason
from callora.http.rest.deposits import Hash, Network, SignedXdr, require
from callora.http.rest.forms import (
    INT64_MAX,
    Form,
    InstantOut,
    PageMeta,
    PageQuery,
    UsdcOut,
    Uuid,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    microseconds,
    moment_of,
    read_uuid,
    stroops,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.withdrawals import WithdrawalPath
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId
from callora.ledger.wallets import ADDRESS_PATTERN, is_address
from callora.store.reads import chain as reads
from callora.store.reads import operators

if TYPE_CHECKING:
    from callora.actors.treasury import Treasury

_EVENT_ID: Final = r"^[0-9]{19}-[0-9]{10}$"
Epoch = Annotated[int, Field(ge=1, le=2**31 - 1)]
Ledger = Annotated[int, Field(ge=1, le=INT64_MAX)]
Address = Annotated[str, Field(pattern=ADDRESS_PATTERN)]
SignedUsdc = Annotated[str, Field(pattern=r"^-?(0|[1-9][0-9]{0,11})(\.[0-9]{1,7})?$", examples=["-12.5000000"])]


class ComparisonOut(Form):
    """What the vault contract had, and should have had."""

    at: InstantOut
    epoch: int
    ledger: int
    on_chain_usdc: UsdcOut
    expected_usdc: UsdcOut
    drift_usdc: UsdcOut
    parts: dict[str, UsdcOut] = Field(description="What was expected is made of these; docs/operations.md says how.")


class ComparisonList(Form):
    """Comparisons, the latest first."""

    data: list[ComparisonOut]
    meta: PageMeta


class ChainOut(Form):
    """How a network's history is followed."""

    network: Network
    epoch: int = Field(description="Which of the network's histories: a test network begins anew at times.")
    contractId: str
    ledger: int = Field(description="Every ledger up to this one was looked at.")
    latestLedger: int = Field(description="The newest ledger seen.")
    halted: str | None = Field(description="Why nothing is noted or credited until a new epoch is begun.")
    settlementHalted: str | None = Field(description="Why nothing is settled until that is resumed.")
    updatedAt: InstantOut
    lastComparison: ComparisonOut | None


class EpochBody(Form):
    """Which epoch ends, and why."""

    epoch: Epoch
    reason: Reason


class ReasonBody(Form):
    """Why an operator steps in."""

    reason: Reason


class Done(Form):
    """It is done."""

    success: Literal[True] = True


class GapOut(Form):
    """Ledgers that no node could show when they were wanted."""

    network: Network
    epoch: int
    firstLedger: int
    lastLedger: int
    foundAt: InstantOut
    closedAt: InstantOut | None
    closedBy: str | None
    moved_usdc: UsdcOut | None


class GapList(Form):
    """Gaps, the oldest first."""

    data: list[GapOut]
    meta: PageMeta


class GapBody(Form):
    """Which gap is closed, and what was found elsewhere."""

    epoch: Epoch
    firstLedger: Ledger
    moved_usdc: SignedUsdc = Field(
        description="By how much its ledgers moved the contract's balance; 0 for not at all."
    )
    reason: Reason


class SuspendedOut(Form):
    """A deposit of nobody known."""

    network: Network
    epoch: int
    eventId: str
    hash: Hash
    address: str | None
    amount_usdc: UsdcOut
    ledger: int
    at: InstantOut


class SuspenseList(Form):
    """Deposits of nobody known, the oldest first."""

    data: list[SuspendedOut]
    meta: PageMeta


class AssignBody(Form):
    """Whose a deposit is."""

    epoch: Epoch
    eventId: Annotated[str, Field(pattern=_EVENT_ID)]
    userId: Uuid
    reason: Reason


class DepositorsQuery(PageQuery):
    """Which addresses."""

    state: Literal["asked", "admitted", "refused"] | None = None


class DepositorOut(Form):
    """An address that somebody wants to deposit from."""

    address: str
    userId: Uuid
    state: Literal["asked", "admitted", "refused"]
    reason: str | None
    askedAt: InstantOut
    answeredAt: InstantOut | None


class DepositorList(Form):
    """Addresses in the order in which they were asked for."""

    data: list[DepositorOut]
    meta: PageMeta


class AdmitBody(Form):
    """Which address, and the owner's signed transaction once there is one."""

    address: Address
    signed_xdr: SignedXdr | None = None


class RefuseBody(Form):
    """Which address is refused, and why; the user is told."""

    address: Address
    reason: Annotated[str, Field(min_length=1, max_length=200)]


class SigningOut(Form):
    """What the vault contract's owner is to sign, or what became of it."""

    state: Literal["to_sign", "sent", "done"]
    xdr: str | None = Field(default=None, description="To be signed by the owner, offline, and sent back.")
    hash: Hash | None = None
    expiresAt: InstantOut | None = None


class PayBody(Form):
    """The owner's signed payment, once there is one."""

    signed_xdr: SignedXdr | None = None


class ReturnBody(Form):
    """Why a withdrawal is given back; the user is told."""

    reason: Annotated[str, Field(min_length=1, max_length=200)]


class OpenWithdrawal(Form):
    """A withdrawal under way."""

    id: Uuid
    userId: Uuid
    network: Network
    state: Literal["asked", "debited", "sent", "returning"]
    amount_usdc: UsdcOut
    address: str
    askedAt: InstantOut


class OpenWithdrawals(Form):
    """Withdrawals under way, the oldest first."""

    data: list[OpenWithdrawal]
    meta: PageMeta


def chain_admin_routes(treasury: "Treasury | None", database: reads.Database, network: Network, clock: Clock) -> Routes:
    """Return operators' routes about the chain.

    Args:
        treasury: None where the chain is not configured.
        network: the configured one.
    """
    routes = Routes("Chain")

    @routes.add("GET", "/api/admin/chain", access=Access.ADMIN, answers={200: ChainOut}, problems=("CONFLICT",))
    async def get_chain(_: Ask[Any, Any, Any]) -> Answer:
        """How far the vault contract's events were followed, and what the last comparison came to."""
        found = await reads.watched(database, network)
        if found is None:
            raise ProblemRaised("CONFLICT", "The chain was never looked at")
        compared = await reads.list_comparisons(database, network, None, 1)
        return Answer(
            ChainOut(
                network=network,
                epoch=found.epoch,
                contractId=found.contract_id,
                ledger=found.ledger,
                latestLedger=found.seen_ledger,
                halted=found.halted,
                settlementHalted=found.settlement_halted,
                updatedAt=iso(found.updated_at),
                lastComparison=_comparison(compared[0]) if compared else None,
            )
        )

    @routes.add(
        "POST",
        "/api/admin/chain/epochs",
        access=Access.ADMIN,
        body=EpochBody,
        answers={200: Done},
        problems=("CONFLICT", "COMPONENT_NOT_CONFIGURED", "NETWORK_UNAVAILABLE"),
    )
    async def begin_chain_epoch(ask: Ask[Any, Any, EpochBody]) -> Answer:
        """Follow the history that the nodes have now, from its beginning, after the one named was halted.

        Balances stay as they are: what they came from is not on the new history, and reconciliation counts it as
        unbacked. Deposits that were noted before are still credited.
        """
        ask.exchange.audit_details |= {"epoch": str(ask.body.epoch), "reason": ask.body.reason}
        if not await require(treasury).listener.begin_epoch(ask.body.epoch):
            raise ProblemRaised("CONFLICT", "This epoch is not the present one, or is not halted")
        return Answer(Done())

    @routes.add(
        "POST",
        "/api/admin/chain/settlement/resume",
        access=Access.ADMIN,
        body=ReasonBody,
        answers={200: Done},
        problems=("CONFLICT", "COMPONENT_NOT_CONFIGURED"),
    )
    async def resume_settlement(ask: Ask[Any, Any, ReasonBody]) -> Answer:
        """Let settlement go on after a difference was explained."""
        ask.exchange.audit_details["reason"] = ask.body.reason
        if not await require(treasury).resume_settlement():
            raise ProblemRaised("CONFLICT", "Settlement is not stopped")
        return Answer(Done())

    @routes.add(
        "GET", "/api/admin/chain/reconciliations", access=Access.ADMIN, query=PageQuery, answers={200: ComparisonList}
    )
    async def list_reconciliations(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """What the vault contract had and should have had, the latest comparison first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int)
        before = None if position is None else moment_of(position[0])
        found = await reads.list_comparisons(database, network, before, limit + 1)
        cursor = encode_cursor(microseconds(found[limit - 1].at)) if len(found) > limit else None
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(ComparisonList(data=[_comparison(each) for each in found[:limit]], meta=meta))

    @routes.add("GET", "/api/admin/chain/gaps", access=Access.ADMIN, query=PageQuery, answers={200: GapList})
    async def list_gaps(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Ledgers that no node could show any more when they were wanted."""
        limit = ask.query.limit
        after: Any = decode_cursor(ask.query.cursor, int, int) or (0, 0)
        if not 0 <= after[0] < 2**31:
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        found = await reads.list_gaps(database, network, after, limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        cursor = None if last is None else encode_cursor(last.epoch, last.first_ledger)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(GapList(data=[_gap(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "POST",
        "/api/admin/chain/gaps/close",
        access=Access.ADMIN,
        body=GapBody,
        answers={200: Done},
        problems=("CONFLICT", "COMPONENT_NOT_CONFIGURED"),
    )
    async def close_gap(ask: Ask[Any, Any, GapBody]) -> Answer:
        """Close a gap after its ledgers were looked up elsewhere. Whom they credit is granted what is his besides."""
        body = ask.body
        ask.exchange.audit_target = f"{body.epoch}:{body.firstLedger}"
        ask.exchange.audit_details |= {"moved_usdc": body.moved_usdc, "reason": body.reason}
        moved = stroops(body.moved_usdc.removeprefix("-")) * (-1 if body.moved_usdc.startswith("-") else 1)
        assert ask.identity is not None
        closed = await require(treasury).close_gap(body.epoch, body.firstLedger, moved, ask.identity.actor, clock)
        if not closed:
            raise ProblemRaised("CONFLICT", "No open gap begins there")
        return Answer(Done())

    @routes.add("GET", "/api/admin/chain/suspense", access=Access.ADMIN, query=PageQuery, answers={200: SuspenseList})
    async def list_suspense(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Deposits that came from nobody known, the oldest first. Whoever logs in with that wallet may claim them."""
        limit = ask.query.limit
        after: Any = decode_cursor(ask.query.cursor, int, str) or (0, "")
        if not 0 <= after[0] < 2**31 or (after[1] and re.fullmatch(_EVENT_ID, after[1]) is None):
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        found = await reads.list_suspense(database, network, after, limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        cursor = None if last is None else encode_cursor(last.epoch, last.event_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(SuspenseList(data=[_suspended(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "POST",
        "/api/admin/chain/suspense/assign",
        access=Access.ADMIN,
        body=AssignBody,
        answers={200: Done},
        problems=("NOT_FOUND", "CONFLICT", "CHAIN_HALTED", "COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def assign_suspense(ask: Ask[Any, Any, AssignBody]) -> Answer:
        """Credit a user with a deposit of nobody known. It is for ever."""
        body = ask.body
        ask.exchange.audit_target = body.eventId
        ask.exchange.audit_details |= {"userId": body.userId, "reason": body.reason, "epoch": str(body.epoch)}
        booking = require(treasury).booking
        if await operators.find_person(database, UserId(body.userId), clock.now()) is None:
            raise ProblemRaised("NOT_FOUND", "No such user")
        assigned = await booking.assign(network, body.epoch, body.eventId, UserId(body.userId))
        if isinstance(assigned, Halted):
            raise ProblemRaised("CHAIN_HALTED")
        if isinstance(assigned, NotInSuspense):
            raise ProblemRaised("CONFLICT", "No deposit of this id waits for an owner")
        return Answer(Done())

    @routes.add(
        "GET",
        "/api/admin/depositors",
        access=Access.ADMIN,
        query=DepositorsQuery,
        answers={200: DepositorList},
    )
    async def list_depositors(ask: Ask[Any, DepositorsQuery, Any]) -> Answer:
        """Addresses that users want to deposit from, in the order in which they asked."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        if position is not None and not is_address(position[1]):
            raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
        after = None if position is None else (moment_of(position[0]), position[1])
        found = await reads.list_depositors(database, network, ask.query.state, after, limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        cursor = None if last is None else encode_cursor(microseconds(last.asked_at), last.address)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(DepositorList(data=[_depositor(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "POST",
        "/api/admin/depositors/admit",
        access=Access.ADMIN,
        body=AdmitBody,
        answers={200: SigningOut},
        problems=(
            "NOT_FOUND",
            "CONFLICT",
            "INVALID_SIGNED_TRANSACTION",
            "NETWORK_UNAVAILABLE",
            "COMPONENT_NOT_CONFIGURED",
        ),
    )
    async def admit_depositor(ask: Ask[Any, Any, AdmitBody]) -> Answer:
        """Get the transaction that admits an address, for the owner to sign offline; or hand it back signed."""
        body = ask.body
        ask.exchange.audit_target = body.address
        depositors = require(treasury).depositors
        if not is_address(body.address):
            raise invalid("body.address", "Must be an account's address with a right checksum", "INVALID_VALUE")
        if body.signed_xdr is None:
            return Answer(_signing(await depositors.offer(body.address)))
        return Answer(_signing(await depositors.take(body.address, body.signed_xdr)))

    @routes.add(
        "POST",
        "/api/admin/depositors/refuse",
        access=Access.ADMIN,
        body=RefuseBody,
        answers={200: Done},
        problems=("CONFLICT", "NETWORK_UNAVAILABLE", "COMPONENT_NOT_CONFIGURED"),
    )
    async def refuse_depositor(ask: Ask[Any, Any, RefuseBody]) -> Answer:
        """Refuse an address that a user asked for."""
        ask.exchange.audit_target = ask.body.address
        ask.exchange.audit_details["reason"] = ask.body.reason
        if not await require(treasury).depositors.refuse(ask.body.address, ask.body.reason):
            raise ProblemRaised("CONFLICT", "Nobody has asked for this address, or it is refused already")
        return Answer(Done())

    @routes.add("GET", "/api/admin/withdrawals", access=Access.ADMIN, query=PageQuery, answers={200: OpenWithdrawals})
    async def list_open_withdrawals(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Withdrawals under way, the oldest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int, str)
        after = None if position is None else (moment_of(position[0]), read_uuid(position[1]))
        found = await reads.open_withdrawals(database, network, after, limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        cursor = None if last is None else encode_cursor(microseconds(last.asked_at), last.withdrawal_id)
        meta = PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None)
        return Answer(OpenWithdrawals(data=[_open(each) for each in found[:limit]], meta=meta))

    @routes.add(
        "POST",
        "/api/admin/withdrawals/{withdrawalId}/pay",
        access=Access.ADMIN,
        path_form=WithdrawalPath,
        body=PayBody,
        answers={200: SigningOut},
        problems=("CONFLICT", "INVALID_SIGNED_TRANSACTION", "NETWORK_UNAVAILABLE", "COMPONENT_NOT_CONFIGURED"),
    )
    async def pay_withdrawal(ask: Ask[WithdrawalPath, Any, PayBody]) -> Answer:
        """Get the payment of a withdrawal, for the owner to sign offline; or hand it back signed.

        From then on no other payment of it is sent until this one provably can never be applied.
        """
        withdrawals = require(treasury).withdrawals
        if ask.body.signed_xdr is None:
            return Answer(_signing(await withdrawals.offer(ask.path.withdrawalId)))
        return Answer(_signing(await withdrawals.take(ask.path.withdrawalId, ask.body.signed_xdr)))

    @routes.add(
        "POST",
        "/api/admin/withdrawals/{withdrawalId}/refuse",
        access=Access.ADMIN,
        path_form=WithdrawalPath,
        body=ReturnBody,
        answers={200: Done},
        problems=("CONFLICT", "NETWORK_UNAVAILABLE", "COMPONENT_NOT_CONFIGURED", "OUTCOME_UNKNOWN"),
    )
    async def refuse_withdrawal(ask: Ask[WithdrawalPath, Any, ReturnBody]) -> Answer:
        """Give a withdrawal back to its vault instead of paying it; refused while a payment of it may be applied."""
        ask.exchange.audit_details["reason"] = ask.body.reason
        refused = await require(treasury).withdrawals.refuse(ask.path.withdrawalId, ask.body.reason)
        if isinstance(refused, NotOpen | MayBePaid):
            _signing(refused)
        return Answer(Done())

    return routes


_Signing = Offered | Admitted | NotAsked | NotOpen | MayBePaid | ContractRefuses | NotTaken | Taken


def _signing(outcome: _Signing) -> SigningOut:
    match outcome:
        case Offered(envelope, expires_at):
            return SigningOut(state="to_sign", xdr=envelope.xdr, hash=envelope.hash, expiresAt=iso(expires_at))
        case Admitted():
            return SigningOut(state="done")
        case NotAsked():
            raise ProblemRaised("NOT_FOUND", "Nobody has asked for this address")
        case NotOpen():
            raise ProblemRaised("CONFLICT", "No debited withdrawal of this id waits to be paid")
        case MayBePaid():
            raise ProblemRaised("CONFLICT", "A payment of it may still be applied; ask again when its time is over")
        case ContractRefuses(reason):
            raise ProblemRaised("CONFLICT", f"The vault contract refuses it: {reason}")
        case NotTaken(reason):
            raise ProblemRaised("INVALID_SIGNED_TRANSACTION", reason)
        case Taken(tx_hash):
            return SigningOut(state="sent", hash=tx_hash)


def _comparison(found: reads.Comparison) -> ComparisonOut:
    return ComparisonOut(
        at=iso(found.at),
        epoch=found.epoch,
        ledger=found.ledger,
        on_chain_usdc=usdc(found.on_chain),
        expected_usdc=usdc(found.expected),
        drift_usdc=usdc(found.drift),
        parts={name: usdc(amount) for name, amount in found.parts.items()},
    )


def _gap(found: reads.Gap) -> GapOut:
    network: Any = found.network
    return GapOut(
        network=network,
        epoch=found.epoch,
        firstLedger=found.first_ledger,
        lastLedger=found.last_ledger,
        foundAt=iso(found.found_at),
        closedAt=None if found.closed_at is None else iso(found.closed_at),
        closedBy=found.closed_by,
        moved_usdc=None if found.moved is None else usdc(found.moved),
    )


def _suspended(found: reads.Suspended) -> SuspendedOut:
    network: Any = found.network
    return SuspendedOut(
        network=network,
        epoch=found.epoch,
        eventId=found.event_id,
        hash=found.tx_hash,
        address=found.address,
        amount_usdc=usdc(found.amount),
        ledger=found.ledger,
        at=iso(found.closed_at),
    )


def _depositor(found: reads.DepositorLine) -> DepositorOut:
    state: Any = found.state
    return DepositorOut(
        address=found.address,
        userId=found.user_id,
        state=state,
        reason=found.reason,
        askedAt=iso(found.asked_at),
        answeredAt=None if found.answered_at is None else iso(found.answered_at),
    )


def _open(found: reads.ShownWithdrawal) -> OpenWithdrawal:
    network: Any = found.network
    state: Any = found.state
    return OpenWithdrawal(
        id=found.withdrawal_id,
        userId=found.user_id,
        network=network,
        state=state,
        amount_usdc=usdc(found.amount),
        address=found.address,
        askedAt=iso(found.asked_at),
    )
