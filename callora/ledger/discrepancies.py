"""What is found when the books are compared: usage with revenue, revenue with settlements, settlements with the chain.

Pure: whoever compares brings what is stored and what the network told, and gets a list. What nobody could tell is no
discrepancy, and no proof that there is none; whoever compares counts it.

`difference` is always what is further from the caller's payment less what is nearer to it: revenue less usage, settled
less revenue, chain less settled.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final, Literal

import attrs

from callora.ledger.chain import Applied, NotSeen
from callora.ledger.ids import DeveloperId
from callora.ledger.money import Stroops, format_usdc

Kind = Literal["MISSING_TX", "STALE_PENDING", "FALSE_FAILURE", "UNEXPECTED_STATUS", "DRIFT"]
"""`MISSING_TX`: booked as applied, and the network has it not, or as failed. `STALE_PENDING`: applied and not booked,
or under way for too long. `FALSE_FAILURE`: given up, and applied all the same. `UNEXPECTED_STATUS`: two stored states
that contradict each other. `DRIFT`: amounts that differ."""

KINDS: Final[tuple[Kind, ...]] = ("MISSING_TX", "STALE_PENDING", "FALSE_FAILURE", "UNEXPECTED_STATUS", "DRIFT")
GRACE_SECONDS: Final = 300.0
"""How long what is applied may wait to be booked."""
STALE_SECONDS: Final = 7200.0
"""How long a settlement may be under way: a key's hour may have to pass first."""


@attrs.frozen
class Discrepancy:
    """One thing that does not add up."""

    kind: Kind
    subject: str
    """What it is about: `developer:`, `settlement:`, `transaction:`, `address:` and an id, or `vault contract`."""
    difference: int
    """Stroops of any sign; 0 where it is no amount."""
    said: str
    """For a person."""
    at: datetime | None = attrs.field(default=None, eq=False)
    """When what it is about ended, and with it until when it is looked at again; None for what always is."""

    @property
    def stops(self) -> bool:
        """Whether nothing new is settled until an operator has looked. What merely waits gets no worse by going on."""
        return self.kind != "STALE_PENDING"


# --- what is stored ---------------------------------------------------------------------------------------------------


@attrs.frozen
class KnownTransaction:
    """A charge or credits as the submitter has stored them."""

    hash: str
    purpose: str
    state: str
    """stored, sent, unresolved, succeeded, failed or dead."""
    ledger: int | None
    """The one that it is in, or one before it could be in any; None for what was never sent."""
    deducted: Stroops | None
    """Σ its `deduct` events; None where the events of its ledger are not known."""


@attrs.frozen
class BookedPart:
    """Some of a settlement's credits, as booked."""

    number: int
    state: str
    """sent, credited or split."""
    amount: Stroops
    purpose: str
    """Of its present transaction."""
    hash: str | None


@attrs.frozen
class BookedSettlement:
    """A settlement as booked, of the network's present history."""

    settlement_id: str
    state: str
    age_seconds: float
    """Since it was opened."""
    moved_seconds: float
    """Since it came to its state, or one of its parts did."""
    ended_at: datetime | None
    charge_total: Stroops
    credit_total: Stroops
    items_gross: Stroops
    """Σ what its items charge."""
    items_credit: Stroops
    """Σ what its items credit."""
    charged_by: str | None
    charge_hash: str | None
    charges: tuple[KnownTransaction, ...]
    credits: tuple[KnownTransaction, ...]
    parts: tuple[BookedPart, ...]

    @property
    def subject(self) -> str:
        """What a discrepancy of it is about."""
        return f"settlement:{self.settlement_id}"


@attrs.frozen
class RevenueGap:
    """A developer whose revenue is not that of his calls, or whose account is not that of his revenue."""

    developer_id: DeveloperId
    between: Literal["usage", "account", "sealed"]
    """`usage`: entries less calls and refunds. `account`: account less entries. `sealed`: items less account."""
    wrong: int
    """How many rows differ, > 0."""
    difference: int
    at: datetime | None = None
    """Of the first of them; None where all of them are always compared."""


@attrs.frozen
class StrangeCharge:
    """A charge of the vault contract that no settlement has made."""

    tx_hash: str
    amount: Stroops
    ledger: int
    at: datetime
    """When that closed."""


@attrs.frozen
class Owed:
    """What the settlement contract owes an address, against what it may owe it."""

    address: str
    on_chain: int
    credited_max: int
    """Σ credits that are made or may be, less withdrawals seen."""
    at: datetime
    """When it was last credited."""


Told = Mapping[str, Applied | NotSeen]
"""What the network says of transactions, by hash; without those of which nobody could tell."""

_CHARGED: Final = frozenset(("charged", "credit_sent", "completed"))
_UNDER_WAY: Final = frozenset(("sealed", "charge_sent", "charged", "credit_sent"))


# --- rules ------------------------------------------------------------------------------------------------------------


def of_revenue(gap: RevenueGap) -> Discrepancy:
    """Return what a developer's revenue is off by."""
    words = {
        "usage": "entries of revenue are not what calls and refunds say",
        "account": "account is not the sum of its entries",
        "sealed": "sealed revenue is not the sum of the settlements that hold it",
    }
    said = f"{gap.wrong} × {words[gap.between]}, by {format_usdc(gap.difference)} USDC"
    return Discrepancy("DRIFT", f"developer:{gap.developer_id}:{gap.between}", gap.difference, said, gap.at)


def of_vault(drift: int, ledger: int) -> Iterator[Discrepancy]:
    """Yield what the vault contract's balance is off by."""
    if drift:
        said = f"the vault contract has {format_usdc(drift)} USDC more than it should at ledger {ledger}"
        yield Discrepancy("DRIFT", "vault contract", drift, said)


def of_charge(strange: StrangeCharge) -> Discrepancy:
    """Return that the vault contract was charged by somebody else."""
    said = f"no settlement has charged {format_usdc(strange.amount)} USDC in ledger {strange.ledger}"
    return Discrepancy("DRIFT", f"transaction:{strange.tx_hash}", strange.amount, said, strange.at)


def of_address(owed: Owed) -> Iterator[Discrepancy]:
    """Yield that an address was credited more than settlements say. Less is no proof: its owner may take it unseen."""
    difference = owed.on_chain - owed.credited_max
    if difference > 0:
        said = f"the settlement contract owes it {format_usdc(difference)} USDC that no settlement has credited"
        yield Discrepancy("DRIFT", f"address:{owed.address}", difference, said, owed.at)


def of_settlement(booked: BookedSettlement, told: Told) -> Iterator[Discrepancy]:
    """Yield what does not add up in a settlement."""
    for each in (*_of_totals(booked), *_of_charges(booked, told), *_of_credits(booked, told)):
        yield attrs.evolve(each, at=booked.ended_at)
    if booked.state in _UNDER_WAY and booked.age_seconds > STALE_SECONDS:
        said = f"it is {booked.state} since {round(booked.moved_seconds)} s"
        yield Discrepancy("STALE_PENDING", booked.subject, 0, said)


def _of_totals(booked: BookedSettlement) -> Iterator[Discrepancy]:
    for name, total, items in (
        ("charges", booked.charge_total, booked.items_gross),
        ("credits", booked.credit_total, booked.items_credit),
    ):
        if items != total:
            said = f"its {name} are {format_usdc(total)} USDC, and those of its items {format_usdc(items)}"
            yield Discrepancy("DRIFT", f"{booked.subject}:{name}", items - total, said)


def _of_charges(booked: BookedSettlement, told: Told) -> Iterator[Discrepancy]:
    known = {each.hash: each for each in booked.charges}
    if booked.state in _CHARGED and booked.charged_by == "transaction":
        yield from _booked_as_applied(
            booked, "charge", None if booked.charge_hash is None else known.get(booked.charge_hash), told
        )
    for each in booked.charges:
        if each.hash == booked.charge_hash or not _is_applied(each, told):
            continue
        subject, amount = f"{booked.subject}:{each.hash}", booked.charge_total
        if booked.state == "failed":
            yield Discrepancy("FALSE_FAILURE", subject, amount, "it failed, and its charge is applied")
        elif booked.state in _CHARGED and booked.charged_by == "transaction":
            yield Discrepancy("DRIFT", subject, amount, "it is charged a second time")
        elif booked.state in ("open", "sealed"):
            yield Discrepancy("UNEXPECTED_STATUS", subject, 0, f"it is {booked.state}, and its charge is applied")
        elif booked.state == "charge_sent" and booked.moved_seconds > GRACE_SECONDS:
            yield Discrepancy("STALE_PENDING", subject, 0, "its charge is applied and not booked")


def _of_credits(booked: BookedSettlement, told: Told) -> Iterator[Discrepancy]:
    known = {each.hash: each for each in booked.credits}
    present = {part.purpose: part for part in booked.parts}
    for part in booked.parts:
        if part.state == "credited":
            yield from _booked_as_applied(
                booked, f"credits {part.number}", None if part.hash is None else known.get(part.hash), told
            )
    credited = {part.hash for part in booked.parts if part.state == "credited"}
    for each in booked.credits:
        if each.hash in credited or not _is_applied(each, told):
            continue
        at, subject = present.get(each.purpose), f"{booked.subject}:{each.hash}"
        if booked.state != "credit_sent" and booked.state != "completed":
            said = f"it is {booked.state}, and credits of it are applied"
            yield Discrepancy("UNEXPECTED_STATUS", subject, 0, said)
        elif at is None or at.state != "sent":
            yield Discrepancy("FALSE_FAILURE", subject, 0, f"{each.purpose} was given up, and is applied")
        elif booked.moved_seconds > GRACE_SECONDS:
            yield Discrepancy("STALE_PENDING", subject, 0, "credits of it are applied and not booked")
    total = sum(part.amount for part in booked.parts if part.state == "credited")
    if booked.state == "completed" and total != booked.credit_total:
        said = f"it is completed, and {format_usdc(total)} of {format_usdc(booked.credit_total)} USDC are credited"
        yield Discrepancy("DRIFT", f"{booked.subject}:credited", total - booked.credit_total, said)


def _booked_as_applied(
    booked: BookedSettlement, what: str, known: KnownTransaction | None, told: Told
) -> Iterator[Discrepancy]:
    """Yield what speaks against a transaction that is booked as applied."""
    subject = f"{booked.subject}:{what}"
    if known is None:
        yield Discrepancy("MISSING_TX", subject, 0, "no transaction of ours has made it")
        return
    if known.state != "succeeded":
        said = f"it is booked, and its transaction {known.hash} is {known.state}"
        yield Discrepancy("UNEXPECTED_STATUS", subject, 0, said)
    found = told.get(known.hash)
    if isinstance(found, Applied) and not found.successful:
        yield Discrepancy("MISSING_TX", subject, 0, f"transaction {known.hash} has failed: {found.result_code}")
    elif isinstance(found, NotSeen) and should_have(found, known.ledger):
        yield Discrepancy("MISSING_TX", subject, 0, f"no node knows transaction {known.hash}")
    elif what == "charge" and known.deducted == 0:
        said = f"transaction {known.hash} has charged the vault contract nothing"
        yield Discrepancy("MISSING_TX", subject, -booked.charge_total, said)
    elif what == "charge" and known.deducted is not None and known.deducted != booked.charge_total:
        said = f"{format_usdc(known.deducted)} of {format_usdc(booked.charge_total)} USDC were charged"
        yield Discrepancy("DRIFT", subject, known.deducted - booked.charge_total, said)


def should_have(found: NotSeen, ledger: int | None) -> bool:
    """Tell whether who does not know a transaction of this ledger would have to."""
    return ledger is not None and found.retained.oldest <= ledger <= found.retained.latest.sequence


def _is_applied(known: KnownTransaction, told: Told) -> bool:
    found = told.get(known.hash)
    if isinstance(found, Applied):
        return found.successful
    return known.state == "succeeded" or bool(known.deducted)
