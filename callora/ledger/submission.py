"""What to do next about a transaction that Callora sends: the golden rules and the table of answers, as decisions.

A submission is one signed envelope, stored before it is first sent. What comes of it is decided here, from what is
stored and what a node answered, and nothing else:

- only the identical envelope is sent again, or a fee-bump around it;
- another envelope for its purpose is built only when it is provably dead, has failed on chain for a reason that goes
  away, or provably never reached the network: every send of it came to nothing, and nobody but Callora has it;
- that no node knows of it is no failure, whatever the time (Source: stellar.md C6).
"""

from collections.abc import Sequence
from typing import Final, Literal

import attrs

from callora.ledger.chain import Applied, Envelope, FeeStats, NotSeen, Retained, Sent

State = Literal["stored", "sent", "unresolved", "succeeded", "failed", "dead"]
"""`stored`: not sent yet. `sent`: it may be applied. `unresolved`: its time is past, and nobody asked can tell what
became of it. `dead`: it can never be applied."""
OPEN: Final = frozenset(("stored", "sent", "unresolved"))

POLL_SECONDS_MIN: Final = 1.0
POLL_SECONDS_MAX: Final = 5.0
UNRESOLVED_POLL_SECONDS: Final = 60.0
STUCK_LEDGERS: Final = 3
"""Ledgers that a transaction waits, its bid taken, before it is helped by a higher one."""
PUT_OFF_MAX: Final = 3
"""TRY_AGAIN_LATER in a row before a higher bid is tried; every other cause of it is over by then."""
UNPROVEN_LOOKS_MAX: Final = 120
"""Looks past the time bound without proof, about ten minutes, before an operator is asked."""
OPINIONS: Final = 3
"""Times, POLL_SECONDS_MAX apart, that the second witness is asked for what the first proves dead: it may be behind."""
OPINION_LOOKS: Final = 10
"""Every so many looks without proof the second witness is asked as well: it may keep more of the past."""
FAILURES_MAX: Final = 5
"""Times that a purpose may fail on chain, each at its price, for a reason that should have gone away."""
BUMP_FACTOR: Final = 10
"""By which a bid must exceed that of the queued transaction that it replaces. Source: stellar.md C3."""


@attrs.frozen
class FeeBump:
    """A fee-bump around a submission's envelope, stored before it is sent."""

    envelope: Envelope
    bid: int
    """Stroops of XLM an operation, without the resource fee."""


@attrs.frozen
class Submission:
    """An envelope that Callora sends for a purpose, and what is stored about it."""

    network: str
    epoch: int
    """The network's history that it was meant for."""
    purpose: str
    envelope: Envelope
    """Signed."""
    prepared_ledger: int
    """One that was closed before anybody could have sent it: it is in no ledger up to this one."""
    bid: int
    """Stroops of XLM an operation, without the resource fee."""
    channel: bool
    """Built on a channel account of Callora's: nobody else has it. False: a wallet signed it and may send it."""
    sponsored: bool
    """Whether a fee-bump at Callora's cost may help it."""
    failed_before: int = 0
    """How many of its purpose failed on chain before it."""
    state: State = "stored"
    sends: int = 0
    """Sends begun, by any process; counted before each."""
    untaken: int = 0
    """Of them, those that provably came to nothing: unsent, or refused."""
    bumps: tuple[FeeBump, ...] = ()
    """Oldest first."""
    refusal: str | None = None
    """What the last node that refused it said."""
    applied: Applied | None = None
    """Of what succeeded or failed."""
    closes_purpose: bool = False
    """Whether its outcome is its purpose's."""

    @property
    def hash(self) -> str:
        """What it goes by: of a fee-bump that was passed on, the inner transaction's."""
        return self.envelope.inner_hash or self.envelope.hash

    @property
    def hashes(self) -> tuple[str, ...]:
        """Every hash that it may be found under, its own first."""
        outer = () if self.envelope.inner_hash is None else (self.envelope.hash,)
        return (self.hash, *outer, *(bump.envelope.hash for bump in self.bumps))

    @property
    def took_nothing(self) -> bool:
        """True when it provably never reached the network: nobody else has it, and no send of it was taken."""
        return self.channel and self.sends == self.untaken

    @property
    def highest_bid(self) -> int:
        """Return the last bid made for it."""
        return self.bumps[-1].bid if self.bumps else self.bid

    def proven_dead(self, answer: NotSeen) -> bool:
        """Tell whether a node that does not know it thereby proves that it can never be applied any more."""
        return answer.proves_dead(self.envelope.max_time, self.prepared_ledger)


@attrs.frozen
class Alive:
    """It may be applied yet, or may have been."""

    state: State
    refusal: str | None
    """What a node last said against it."""


@attrs.frozen
class Dead:
    """It was never applied and never will be."""

    refusal: str | None
    """What a node last said against it; None where its time ran out."""


def outcome_of(submission: Submission) -> Applied | Dead | Alive:
    """Return what became of a submission, as stored."""
    if submission.applied is not None:
        return submission.applied
    if submission.state == "dead":
        return Dead(submission.refusal)
    return Alive(submission.state, submission.refusal)


# --- what a purpose needs ---------------------------------------------------------------------------------------------


@attrs.frozen
class Follow:
    """An envelope for the purpose is on its way: nothing may be built."""

    submission: Submission


@attrs.frozen
class Build:
    """Nothing for the purpose is applied or can be: build an envelope."""

    pressure: int
    """How many before it offered too little, or waited in vain."""
    leeway: bool
    """Whether the call needs more resources than its simulation says."""
    failed_before: int
    pause_seconds: float
    """To let pass first."""


def stand(history: Sequence[Submission], epoch: int) -> Follow | Applied | Build:
    """Return how a purpose stands.

    Args:
        history: everything ever stored for the purpose, oldest first.
        epoch: the network's present history; what closed the purpose on another one is gone with it.
    """
    for submission in history:
        if submission.state in OPEN:
            return Follow(submission)
    present = [each for each in history if each.epoch == epoch]
    for submission in present:
        if submission.closes_purpose:
            assert submission.applied is not None
            return submission.applied
    failed = [each.applied for each in present if each.applied is not None]
    refused = 0
    for each in reversed(present):
        if each.state != "dead" or each.refusal is None or not each.took_nothing:
            break
        refused += 1
    return Build(
        pressure=sum(each.state == "dead" and (not each.took_nothing or _is_low(each.refusal)) for each in present),
        leeway=any(each.operation_code in _SHORT_OF_RESOURCES for each in failed),
        failed_before=len(failed),
        pause_seconds=min(POLL_SECONDS_MAX * 2.0 ** (refused - 1), UNRESOLVED_POLL_SECONDS) if refused else 0.0,
    )


_SHORT_OF_RESOURCES: Final = frozenset(("resource_limit_exceeded", "insufficient_refundable_fee"))
_GOES_AWAY: Final = _SHORT_OF_RESOURCES | {"entry_archived"}
_NEVER_RAN: Final = frozenset(
    (
        *("tx_too_late", "tx_too_early", "tx_bad_seq", "tx_insufficient_fee", "tx_insufficient_balance"),
        *("tx_no_account", "tx_no_source_account", "tx_soroban_invalid", "tx_internal_error"),
    )
)
"""Results in a ledger, at the price of the fee, of what was valid when it was taken and not when its turn came."""


def goes_away(applied: Applied) -> bool:
    """Tell whether a failure says nothing about the call: simulated again, it may succeed.

    A trap without an error number of the contract may come of a footprint that was true when it was simulated; if not,
    the next simulation says so, at no price.
    """
    if applied.successful:
        return False
    if applied.operation_code == "trapped":
        return applied.fault is None or applied.fault.contract_error is None
    return applied.operation_code in _GOES_AWAY or applied.result_code in _NEVER_RAN


# --- what a submission needs ------------------------------------------------------------------------------------------


@attrs.frozen
class Shelved:
    """Its channel is free, and an operator knows."""


@attrs.frozen
class TakenUp:
    """It was stored just now, or found in the store."""


@attrs.frozen
class Answered:
    """A node answered a send."""

    sent: Sent


@attrs.frozen
class Silent:
    """It was sent and no answer came: it may have been taken."""


@attrs.frozen
class NotSent:
    """It provably was not sent."""


@attrs.frozen
class Looked:
    """Nodes were asked for it: what one knows, or has that does not know it; one answer for each hash."""

    answers: tuple[Applied | NotSeen, ...]


@attrs.frozen
class NotLooked:
    """No node could be asked."""


@attrs.frozen
class Opinion:
    """What the second witness has of it; None: nothing, which proves nothing."""

    applied: Applied | None


@attrs.frozen
class Bumped:
    """A fee-bump around it is stored."""


@attrs.frozen
class NotBumped:
    """No fee-bump could be made: a limit, no sponsor, or nobody to ask for prices."""


News = TakenUp | Answered | Silent | NotSent | Looked | NotLooked | Opinion | Bumped | NotBumped | Shelved


@attrs.frozen
class Send:
    """Send the identical envelope, or its last fee-bump."""

    inner_only: bool = False
    """True: without the fee-bump, which cannot be paid for."""


@attrs.frozen
class Look:
    """Ask a node for it, under every hash."""

    after_seconds: float


@attrs.frozen
class Bump:
    """Make a fee-bump around it, store and send it."""

    surge: bool
    """True: what it offers is too little now; False: it waits for too long."""


@attrs.frozen
class AskWitness:
    """Ask the second witness, where one is configured, before it is called dead."""


@attrs.frozen
class Finish:
    """It is in a ledger."""

    applied: Applied
    closes_purpose: bool


@attrs.frozen
class Bury:
    """It is dead."""

    proof: Retained | None
    """What the node had that did not know it; None: provably nobody ever took it."""


@attrs.frozen
class Shelve:
    """Its time is past and nobody can tell: keep its purpose closed, free its channel, tell an operator, ask on."""

    retained: Retained


Step = Send | Look | Bump | AskWitness | Finish | Bury | Shelve

Aftermath = Literal["build", "set_aside", "stop", "give_up"]
"""What a refusal that nothing came of means for who sent it. `set_aside`: the channel cannot pay. `stop`: the keys or
the network are wrong, so nothing may be sent until an operator has looked. `give_up`: it would be refused again."""

_LATER: Final = frozenset(("tx_too_early", "tx_internal_error", "tx_fee_bump_inner_failed"))
"""No verdict on the transaction."""
_ASK_FIRST: Final = frozenset(("tx_bad_seq", "tx_too_late"))
"""What a node also says of a transaction that was applied."""
_LOW: Final = frozenset(("tx_insufficient_fee",))
_POOR: Final = frozenset(("tx_insufficient_balance", "tx_no_account", "tx_no_source_account"))
_KEYS: Final = frozenset(("tx_bad_auth", "tx_bad_auth_extra"))
_BUILD: Final = _ASK_FIRST | _LOW | _LATER | {"tx_soroban_invalid"}


def _is_low(refusal: str | None) -> bool:
    return refusal in _LOW


def aftermath(refusal: str | None) -> Aftermath:
    """Return what a node's refusal of a submission means for the next one of its purpose."""
    if refusal is None or refusal in _BUILD:
        return "build"
    if refusal in _POOR:
        return "set_aside"
    return "stop" if refusal in _KEYS else "give_up"


@attrs.frozen
class Course:
    """How far the following of a submission has come: what is known besides what is stored, and lost in a crash.

    Losing it costs time and never a rule.
    """

    submission: Submission
    """As last read."""
    sponsor: bool
    """Whether somebody can pay for a fee-bump."""
    witness: bool
    """Whether there is a second witness to ask."""
    epoch: int = 0
    """The network's history, as last read; 0 before it was."""
    head: int = 0
    """The last ledger that any answer showed."""
    sent_at: int | None = None
    """`head` when it was last sent."""
    waiting_since: int | None = None
    """The ledger when its present bid was taken."""
    looks: int = 0
    """Since its present bid was taken."""
    put_off: int = 0
    """TRY_AGAIN_LATER in a row."""
    refused: str | None = None
    """The last answer, where that was a refusal."""
    unproven: int = 0
    """Looks past its time bound that proved nothing."""
    opinions: int = 0
    """Times that the second witness had nothing."""
    suspected: Bury | None = None
    """What the second witness is asked about."""

    @property
    def can_bump(self) -> bool:
        """Whether a fee-bump may be tried."""
        return self.sponsor and self.submission.sponsored and self.submission.state in ("stored", "sent")


def advance(course: Course, news: News) -> tuple[Course, Step]:
    """Return what to do next, and what is known then. The table C6 of stellar.md, row by row.

    Args:
        course: with the submission as it is stored now: a send is counted, and one that came to nothing too.
        news: what came of the step before.
    """
    match news:
        case TakenUp():
            return _take_up(course)
        case Answered(sent):
            return _answered(course, sent)
        case Silent():
            head = max(course.head, course.submission.prepared_ledger)
            return _look_soon(_bid_taken(attrs.evolve(course, head=head, sent_at=head, refused=None, put_off=0)))
        case NotSent():
            return _look(attrs.evolve(course, refused=None))
        case Looked(answers):
            return _looked(course, answers)
        case NotLooked() | Shelved():
            return _look(course)
        case Opinion(applied):
            return _heard(course, applied)
        case Bumped():
            # Counted anew from the higher bid.
            return attrs.evolve(course, waiting_since=None, looks=0, put_off=0, refused=None), Send()
        case NotBumped():
            return _look(attrs.evolve(course, waiting_since=course.head, put_off=0, refused=None))


def _take_up(course: Course) -> tuple[Course, Step]:
    if course.submission.state == "stored":
        return course, Send()
    # Another process, or this one before it crashed, may have got as far as the end.
    return course, Look(0.0)


def _answered(course: Course, sent: Sent) -> tuple[Course, Step]:
    stale = sent.latest.sequence < course.head
    head = max(course.head, sent.latest.sequence)
    course = attrs.evolve(course, head=head, sent_at=head, refused=None)
    if sent.status in ("pending", "duplicate"):
        return _look_soon(_bid_taken(attrs.evolve(course, put_off=0)))
    if sent.status == "try_again_later":
        course = attrs.evolve(course, put_off=course.put_off + 1)
        if course.put_off >= PUT_OFF_MAX and course.can_bump:
            return course, Bump(surge=False)
        return course, Look(0.0)  # it may be applied already
    code = sent.result_code or ""
    if code in _LATER or (stale and code in _ASK_FIRST):
        return _look(course)  # a node that is behind does not know which sequence numbers are used
    course = attrs.evolve(course, refused=code)
    if code in _ASK_FIRST:
        return course, Look(0.0)
    if course.submission.took_nothing:
        return _bury(course, Bury(None))
    # An earlier send of it may have been taken, or somebody else may send it: only time proves anything now.
    if (code in _LOW or (code == "tx_insufficient_balance" and not course.submission.bumps)) and course.can_bump:
        return course, Bump(surge=True)
    if course.submission.bumps and code in (_POOR | _KEYS):
        course = attrs.evolve(course, sponsor=False)
    return _look(course)


def _looked(course: Course, answers: Sequence[Applied | NotSeen]) -> tuple[Course, Step]:
    for answer in answers:
        if isinstance(answer, Applied):
            return course, _finish(course, answer)
    unseen = [answer for answer in answers if isinstance(answer, NotSeen)]
    latest = max((answer.retained.latest for answer in unseen), key=lambda head: head.sequence)
    course = attrs.evolve(course, head=max(course.head, latest.sequence), looks=course.looks + 1)
    submission = course.submission
    if all(submission.proven_dead(answer) for answer in unseen):
        return _bury(course, Bury(unseen[0].retained))
    if course.refused in _ASK_FIRST and submission.took_nothing:
        return _bury(course, Bury(None))
    past = [each for each in unseen if each.retained.latest.closed_at.timestamp() > submission.envelope.max_time]
    if past:
        return _unproven(course, past[0].retained)
    if submission.state == "unresolved":
        return _look(course)
    waited = 0 if course.waiting_since is None else course.head - course.waiting_since
    if waited >= STUCK_LEDGERS and course.can_bump:
        return course, Bump(surge=False)
    hopeless = course.refused is not None and aftermath(course.refused) in ("stop", "give_up")
    if (course.sent_at is None or course.head > course.sent_at) and not hopeless:
        return course, Send(inner_only=bool(submission.bumps) and not course.sponsor)
    return _look(course)


def _unproven(course: Course, retained: Retained) -> tuple[Course, Step]:
    """Nobody takes it any more, and nobody asked has every ledger since it was prepared."""
    if course.epoch > course.submission.epoch:
        return course, Bury(retained)  # an operator says that the history it was sent on is gone
    if course.submission.state == "unresolved":
        return _look(course)
    course = attrs.evolve(course, unproven=course.unproven + 1)
    if course.unproven >= UNPROVEN_LOOKS_MAX:
        return attrs.evolve(course, unproven=0), Shelve(retained)
    if course.witness and course.unproven % OPINION_LOOKS == 1:
        return course, AskWitness()
    return _look(course)


def _heard(course: Course, applied: Applied | None) -> tuple[Course, Step]:
    if applied is not None:
        return course, _finish(course, applied)
    burial = course.suspected
    course = attrs.evolve(course, suspected=None, opinions=course.opinions + 1)
    if burial is not None and (burial.proof is None or course.opinions >= OPINIONS):
        return course, burial
    return _look(course)


def _bury(course: Course, burial: Bury) -> tuple[Course, Step]:
    if course.witness:
        return attrs.evolve(course, suspected=burial), AskWitness()
    return course, burial


def _finish(course: Course, applied: Applied) -> Finish:
    once_more = goes_away(applied) and course.submission.failed_before + 1 < FAILURES_MAX
    return Finish(applied, closes_purpose=not once_more)


def _bid_taken(course: Course) -> Course:
    return attrs.evolve(course, waiting_since=course.head) if course.waiting_since is None else course


def _look_soon(course: Course) -> tuple[Course, Step]:
    return course, Look(min(POLL_SECONDS_MIN + course.looks, POLL_SECONDS_MAX))


def _look(course: Course) -> tuple[Course, Step]:
    """Look again, a little later each time."""
    looks = course.looks + 1
    if course.submission.state == "unresolved":
        return course, Look(UNRESOLVED_POLL_SECONDS)
    return attrs.evolve(course, looks=looks), Look(min(POLL_SECONDS_MIN * looks, POLL_SECONDS_MAX))


# --- what it offers ---------------------------------------------------------------------------------------------------


def first_bid(base_fee: int, stats: FeeStats | None, pressure: int, bid_max: int) -> int:
    """Return what a new envelope offers for its inclusion, stroops of XLM an operation.

    Args:
        base_fee: the least.
        stats: what others offered lately; None where nobody could be asked.
        pressure: how many envelopes of its purpose offered too little or waited in vain.
        bid_max: the most.
    """
    if stats is None:
        wanted = base_fee << min(pressure, 30)
    else:
        level = (stats.p50, stats.p90, stats.p99, stats.max)
        wanted = level[min(pressure, 3)] << min(max(pressure - 3, 0), 30)
    return min(max(base_fee, wanted), bid_max)


def next_bid(submission: Submission, stats: FeeStats | None, bid_max: int, *, surge: bool) -> int | None:
    """Return what a fee-bump around it offers, stroops of XLM an operation; None when that is more than `bid_max`.

    At least ten times its last bid, or the network would not replace that.
    """
    least = BUMP_FACTOR * max(submission.highest_bid, 1)
    if least > bid_max:
        return None
    wanted = 0 if stats is None else (stats.p99 if surge else stats.p90)
    return min(max(least, wanted), bid_max)
