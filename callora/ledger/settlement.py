"""How developers are paid: what a settlement is made of, the states it walks, and what follows from each answer. Pure.

A settlement is one batch: the vault contract is charged once for at most 50 developers, then they are credited. Each
state is stored before what it allows is done, so whoever takes a settlement up goes on from there:

    open → sealed → charge_sent → charged → credit_sent → completed
              ↘          ↘ failed, and its revenue is released

- What may be charged yet is never failed; what is charged never is: its credits are tried until they are made.
- Nothing is charged or credited but under a purpose, which the submitter does once, and a charge has ids besides, which
  the vault contract takes once each.
- Fault 29, a known id, says that the charge is made; which ids the contract knows is asked before anything is released.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import attrs

from callora.ledger.chain import Applied, ContractFault
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops

State = Literal["open", "sealed", "charge_sent", "charged", "credit_sent", "completed", "failed"]
"""`open`: its items are being written, in the database transaction that seals it. `sealed`: nothing is sent.
`charge_sent`: the charge may be applied. `charged`: it is. `credit_sent`: credits may be applied. `completed`: all are.
`failed`: it was not charged and never will be, and its revenue is free for another settlement."""

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "open": frozenset(("sealed",)),
    "sealed": frozenset(("charge_sent", "failed")),
    "charge_sent": frozenset(("charged", "failed")),
    # To `failed` from these two only where the network has begun another history, and an operator says that the charge
    # is gone with the old one.
    "charged": frozenset(("credit_sent", "failed")),
    "credit_sent": frozenset(("completed", "failed")),
    "completed": frozenset(),
    "failed": frozenset(),
}
ENDED: Final[frozenset[State]] = frozenset(("completed", "failed"))

HeldBack = Literal["no_wallet", "no_account", "no_trustline", "refused", "over_cap"]
"""Why a developer is not paid: he has proved no wallet; it is no account; it cannot hold USDC; the contract refuses it;
he has earned more than the keys may move in an hour."""

ITEMS_MAX: Final = 50
"""The contracts' bound of a batch."""
ALREADY_DONE: Final = 29
"""DuplicateRequestId of the vault contract."""


@attrs.frozen
class Candidate:
    """What a developer has earned and was not settled yet."""

    developer_id: DeveloperId
    address: str
    """Where he is paid, `G…`."""
    gross: Stroops
    """What the vault is charged, > 0."""
    fee: Stroops
    """The platform's part of it, 0 <= fee < gross."""

    @property
    def credit(self) -> Stroops:
        """What he gets."""
        return Stroops(self.gross - self.fee)


@attrs.frozen
class Item:
    """What one address gets by a settlement."""

    position: int
    """1 to ITEMS_MAX."""
    developer_id: DeveloperId | None
    """None: the platform, which gets the fees of all others."""
    address: str
    gross: Stroops
    """What the vault is charged for it; 0 of the platform."""
    fee: Stroops
    credit: Stroops
    request_id: str | None
    """What the vault contract knows the charge by; None of the platform."""


@attrs.frozen
class Part:
    """Some of a settlement's credits, made by one transaction."""

    number: int
    """1: all of them. The halves of n are 2n and 2n + 1."""
    first: int
    """Position of its first item."""
    last: int
    state: Literal["sent", "credited", "split"] = "sent"
    attempt: int = 1
    """One more for each transaction of it that failed on chain for good."""

    @property
    def halves(self) -> tuple["Part", "Part"]:
        """What it is split in; it has more than one item."""
        assert self.last > self.first
        middle = (self.first + self.last) // 2
        return Part(2 * self.number, self.first, middle), Part(2 * self.number + 1, middle + 1, self.last)


@attrs.frozen
class Settlement:
    """One batch, as stored."""

    settlement_id: str
    network: str
    epoch: int
    """The network's history that it is for."""
    state: State
    items: tuple[Item, ...]
    """By position."""
    parts: tuple[Part, ...] = ()
    """By number; none before credits are due."""

    @property
    def charge_total(self) -> Stroops:
        """What the vault is charged."""
        return Stroops(sum(item.gross for item in self.items))

    @property
    def credit_total(self) -> Stroops:
        """What all get; never more than the charge."""
        return Stroops(sum(item.credit for item in self.items))

    @property
    def charge_purpose(self) -> str:
        """The name under which the submitter charges, once."""
        return f"charge:{self.settlement_id}"

    def credit_purpose(self, part: Part) -> str:
        """Return the name under which the submitter makes a part's credits, once."""
        return f"credit:{self.settlement_id}:{part.number}.{part.attempt}"

    def charged_items(self) -> tuple[Item, ...]:
        """Return the items that the vault is charged for."""
        return tuple(item for item in self.items if item.request_id is not None)

    def items_of(self, part: Part) -> tuple[Item, ...]:
        """Return the items that a part credits."""
        return self.items[part.first - 1 : part.last]


def request_id_of(settlement_id: str, developer_id: str) -> str:
    """Return what the vault contract knows a developer's charge by: 32 hex digits, the same for the same two."""
    return hashlib.sha256(f"{settlement_id}|{developer_id}".encode()).hexdigest()[:32]


# --- what a developer and the platform get ----------------------------------------------------------------------------

BPS: Final = 10_000


def platform_fee(amount: Stroops, bps: int) -> Stroops:
    """Return the platform's share, rounded down: the developer loses no stroop to rounding.

    Args:
        bps: hundredths of a percent, 0 to 10 000.
    """
    return Stroops(amount * bps // BPS)


def refunded_fee(captured: Stroops, before: Stroops, refund: Stroops, bps: int) -> Stroops:
    """Return how much of the platform's share a refund gives back: what is left to share decides.

    So a call that is refunded whole gives back the whole share, in however many refunds, and none gives back more than
    was taken.

    Args:
        captured: what the call cost.
        before: what of it was refunded before.
        refund: what is refunded now; `before + refund <= captured`.
        bps: the share that was taken of the call.
    """
    left = Stroops(captured - before)
    return Stroops(platform_fee(left, bps) - platform_fee(Stroops(left - refund), bps))


# --- who is settled together ------------------------------------------------------------------------------------------


def grouped(
    candidates: Iterable[Candidate], *, charge_max: Stroops, credit_max: Stroops
) -> tuple[list[list[Candidate]], list[Candidate]]:
    """Return who is settled together, in the order given, and who has earned more than the keys may move in an hour.

    A batch has room for the platform where somebody in it pays a fee.

    Args:
        charge_max: what one charge may be.
        credit_max: what the credits of one may be together, the platform's among them.
    """
    groups: list[list[Candidate]] = []
    over: list[Candidate] = []
    gross, has_fee = 0, False
    # The platform's credit is the fees, so that credits together are the charge.
    together_max = min(charge_max, credit_max)
    for candidate in candidates:
        if candidate.gross > together_max:
            over.append(candidate)
            continue
        with_fee = has_fee or candidate.fee > 0
        full = not groups or len(groups[-1]) + 1 + with_fee > ITEMS_MAX or gross + candidate.gross > together_max
        if full:
            groups.append([])
            gross, with_fee = 0, candidate.fee > 0
        groups[-1].append(candidate)
        gross, has_fee = gross + candidate.gross, with_fee
    return groups, over


def items_for(settlement_id: str, group: Sequence[Candidate], platform: str | None) -> tuple[Item, ...]:
    """Return the items of a settlement.

    Args:
        group: as `grouped` made it.
        platform: who gets the fees; needed where there are any.
    """
    items = [
        Item(
            position,
            each.developer_id,
            each.address,
            each.gross,
            each.fee,
            each.credit,
            request_id_of(settlement_id, each.developer_id),
        )
        for position, each in enumerate(group, 1)
    ]
    fees = Stroops(sum(each.fee for each in group))
    if fees:
        assert platform is not None, "checked with the settings"
        items.append(Item(len(items) + 1, None, platform, Stroops(0), Stroops(0), fees, None))
    assert 0 < len(items) <= ITEMS_MAX
    return tuple(items)


# --- what a settlement needs ------------------------------------------------------------------------------------------


@attrs.frozen
class BeginCharge:
    """Store that the charge may be sent from now on."""


@attrs.frozen
class Charge:
    """Have the vault charged."""


@attrs.frozen
class AskContract:
    """Ask the vault contract which of the charge's ids it knows."""

    fault: str
    """Why the charge was not made, as far as is known."""
    known: bool
    """Whether that says that an id is known."""


@attrs.frozen
class BookCharge:
    """Store that the charge is made."""

    by: Literal["transaction", "found"]


@attrs.frozen
class BeginCredits:
    """Store that credits may be sent from now on."""


@attrs.frozen
class MakeCredits:
    """Have a part's developers credited."""

    part: Part


@attrs.frozen
class AskHalves:
    """Simulate both halves of a part, which cannot be made as a whole."""

    part: Part
    fault: str
    closed: bool
    """Whether a transaction of this attempt failed for good."""


@attrs.frozen
class BookCredits:
    """Store that a part's developers are credited."""

    part: Part


@attrs.frozen
class Split:
    """Make a part's credits in two halves from now on."""

    part: Part


@attrs.frozen
class Again:
    """Make a part's credits by another transaction, later: the one before failed for good."""

    part: Part
    fault: str


@attrs.frozen
class Complete:
    """Store that all are credited."""


@attrs.frozen
class Fail:
    """Store that it is not charged and never will be; its revenue is free."""

    reason: str


@attrs.frozen
class Wait:
    """Look again later, and tell an operator why."""

    reason: str


@attrs.frozen
class Done:
    """It has ended."""


Step = (
    BeginCharge
    | Charge
    | AskContract
    | BookCharge
    | BeginCredits
    | MakeCredits
    | AskHalves
    | BookCredits
    | Split
    | Again
    | Complete
    | Fail
    | Wait
    | Done
)


def next_step(settlement: Settlement, epoch: int, tried: frozenset[int] = frozenset()) -> Step:
    """Return what is to be done, from what is stored alone.

    Args:
        epoch: the network's present history.
        tried: numbers of parts whose credits wait: they keep no other part.
    """
    match settlement.state:
        case "completed" | "failed":
            return Done()
        case "charged" | "credit_sent" if settlement.epoch < epoch:
            # Whether what was charged is gone with that history, as on a test network that was reset, or was real, as
            # where the contract was replaced, only an operator knows: `callora settlements release`.
            return Wait("charged on a history that is over: an operator decides whether that is lost")
        case _ if settlement.epoch < epoch:
            return Fail("the network has begun another history")
        case "open":
            raise AssertionError("what is opened is sealed in the same database transaction")
        case "sealed":
            return BeginCharge()
        case "charge_sent":
            return Charge()
        case "charged":
            return BeginCredits()
        case "credit_sent":
            sent = [part for part in settlement.parts if part.state == "sent"]
            for part in sent:
                if part.number not in tried:
                    return MakeCredits(part)
            return Wait("credits wait") if sent else Complete()


def after_charge(outcome: Applied | ContractFault, name: str | None) -> BookCharge | AskContract:
    """Return what follows from what became of a charge.

    Args:
        outcome: what the submitter says: final.
        name: what the contract calls its fault, where it is known.
    """
    if isinstance(outcome, Applied) and outcome.successful:
        return BookCharge("transaction")
    fault = outcome.fault if isinstance(outcome, Applied) else outcome
    known = fault is not None and fault.contract_error == ALREADY_DONE and name == "DuplicateRequestId"
    return AskContract(_told(outcome, name), known)


def after_asking(asked: AskContract, processed: Sequence[bool] | None) -> BookCharge | Fail | Wait:
    """Return what follows from which ids the vault contract knows.

    A charge is made for all of its items or none, and its ids are nobody else's.

    Args:
        processed: of each item; None where the contract does not remember them.
    """
    if processed is None:
        return (
            Wait(f"the contract says that an id is known, and forgets them: {asked.fault}")
            if asked.known
            else _failed(asked)
        )
    if all(processed):
        return BookCharge("found")
    if any(processed):
        return Wait("the contract knows some ids of this charge and not others")
    return Wait("the contract refused an id as known, and does not know it now") if asked.known else _failed(asked)


def _failed(asked: AskContract) -> Fail:
    return Fail(f"not charged: {asked.fault}"[:200])


def after_credits(
    part: Part, outcome: Applied | ContractFault, name: str | None
) -> BookCredits | AskHalves | Again | Wait:
    """Return what follows from what became of a part's credits.

    Args:
        outcome: what the submitter says: final, or of a fault that came of a simulation, true for now.
        name: what the contract calls its fault, where it is known.
    """
    if isinstance(outcome, Applied) and outcome.successful:
        return BookCredits(part)
    told, closed = _told(outcome, name), isinstance(outcome, Applied)
    if part.last > part.first:
        return AskHalves(part, told, closed)
    return Again(part, told) if closed else Wait(f"charged and not credited: {told}")


def after_halves(asked: AskHalves, first: bool, second: bool) -> Split | Again | Wait:
    """Return what follows from whether the halves of a part could be made by themselves.

    Where neither can, the fault is nobody's in particular, and splitting would only cost more fees.
    """
    if first or second:
        return Split(asked.part)
    return Again(asked.part, asked.fault) if asked.closed else Wait(f"charged and not credited: {asked.fault}")


def blamed(could: Mapping[int, bool]) -> tuple[int, ...]:
    """Return the positions that a charge fails for, from whether each could be charged alone; none where none could.

    Args:
        could: by position.
    """
    return (
        tuple(sorted(position for position, could_be in could.items() if not could_be)) if any(could.values()) else ()
    )


def _told(outcome: Applied | ContractFault, name: str | None) -> str:
    if name is not None:
        return name
    if isinstance(outcome, ContractFault):
        return outcome.reason[:160]
    return outcome.operation_code or outcome.result_code
