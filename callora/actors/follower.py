"""A follower: takes one stored transaction to its end, by the steps that `ledger.submission` decides.

It may be cancelled or die anywhere. What it does is stored before anybody can see it, so whoever takes the transaction
up next goes on from there; two that follow the same one, in any processes, do no harm.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Final, Protocol, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.ledger.chain import Applied, Archived, ContractFault, Envelope, FeeStats, NotSeen, Retained, Sent
from callora.ledger.clock import Clock
from callora.ledger.faults import (
    ChainMismatch,
    ChainOutcomeUnknown,
    ChainUnavailable,
    OutcomeUnknown,
    StoreConflict,
    StoreUnavailable,
)
from callora.ledger.submission import (
    OPEN,
    Answered,
    AskWitness,
    Bump,
    Bumped,
    Bury,
    Course,
    FeeBump,
    Finish,
    Look,
    Looked,
    News,
    NotBumped,
    NotLooked,
    NotSent,
    Opinion,
    Send,
    Shelve,
    Shelved,
    Silent,
    Step,
    Submission,
    TakenUp,
    advance,
    next_bid,
)
from callora.metrics import Metrics
from callora.stellar.contracts import ContractCall
from callora.stellar.rpc import Leeway
from callora.store.transactions import Epoch, OpenSubmission, Taken

_UNPAID: Final = frozenset(("tx_insufficient_balance", "tx_no_account", "tx_no_source_account"))
"""What a node says where whoever shall pay the fee cannot."""
STORE_PAUSE_SECONDS: Final = 0.5
STORE_PAUSE_SECONDS_MAX: Final = 5.0

T = TypeVar("T")


class Network(Protocol):
    """What sending asks of the chain; see `actors.chain.Chain`."""

    def build(self, call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction of a call."""

    def build_restore(self, archived: Archived, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction that restores what a call needs."""

    def unwrap(self, envelope: Envelope) -> Envelope:
        """Return the transaction inside a fee-bump."""

    async def retained(self) -> Retained:
        """Return what a node can tell of the past."""

    async def sequence_of(self, address: str) -> int | None:
        """Return the last sequence number that an account used; None where there is none."""

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Return the transaction with what its call needs."""

    async def send(self, envelope: Envelope) -> Sent:
        """Send a signed transaction."""

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction."""

    async def recorded(self, tx_hash: str) -> Applied | None:
        """Return what the second witness has of a transaction."""

    async def fee_stats(self) -> FeeStats:
        """Return what others bid lately."""


class Store(Protocol):
    """What is kept; see `store.transactions.TransactionStore`."""

    async def epoch(self, network: str) -> Epoch:
        """Return the history that a network is on."""

    async def add(self, submission: Submission, now: datetime) -> Taken | None:
        """Store an envelope before it is sent."""

    async def find(self, tx_hash: str) -> Submission | None:
        """Return what is stored under a hash."""

    async def of_purpose(self, network: str, purpose: str) -> list[Submission]:
        """Return everything ever stored for a purpose."""

    async def open_ones(self, network: str) -> list[OpenSubmission]:
        """Return what may be applied."""

    async def busy_channels(self, network: str, epoch: int) -> frozenset[str]:
        """Return the channels whose next sequence number is in use."""

    async def last_sequence(self, network: str, epoch: int, channel: str) -> int | None:
        """Return the last sequence number that a channel is known to have used."""

    async def begin_send(self, tx_hash: str, now: datetime) -> Submission | None:
        """Count a send that is about to be made."""

    async def note_untaken(self, tx_hash: str, refusal: str | None) -> Submission | None:
        """Count a send that came to nothing."""

    async def add_bump(self, tx_hash: str, bump: FeeBump, now: datetime) -> bool:
        """Store a fee-bump before it is sent."""

    async def finish(self, tx_hash: str, applied: Applied, now: datetime, *, closes_purpose: bool) -> bool:
        """Note that it is in a ledger."""

    async def bury(self, tx_hash: str, proof: Retained | None, now: datetime) -> bool:
        """Note that it can never be applied."""

    async def shelve(self, tx_hash: str, proof: Retained) -> bool:
        """Note that nobody can tell what became of it."""


class Sponsor(Protocol):
    """Who pays for fee-bumps."""

    def bump(self, envelope: Envelope, bid: int) -> Envelope:
        """Return a signed fee-bump around a signed transaction.

        Args:
            bid: stroops of XLM an operation, without the resource fee.
        """


@attrs.frozen
class Tools:
    """What a submitter and its followers share."""

    network: str
    """Its name, as stored."""
    chain: Network
    store: Store
    sponsor: Sponsor | None
    has_witness: bool
    """Whether `chain.recorded` has somebody to ask."""
    bid_max: int
    """Stroops of XLM an operation: more is never offered."""
    clock: Clock
    metrics: Metrics
    log: FilteringBoundLogger

    async def stored(self, verb: Callable[[], Awaitable[T]]) -> T:
        """Return what a verb of the store returns, asked again while the store is away; only for what may be repeated.

        Cancellation: it may be stored.
        """
        pause = STORE_PAUSE_SECONDS
        while True:
            try:
                return await verb()
            except (StoreUnavailable, StoreConflict, OutcomeUnknown) as fault:
                self.log.warning("transaction_store_away", error=str(fault))
            await trio.sleep(pause)
            pause = min(2 * pause, STORE_PAUSE_SECONDS_MAX)


class Follower:
    """Follows one submission."""

    def __init__(self, tools: Tools, submission: Submission, on_shelved: Callable[[], None]) -> None:
        """Args:
        submission: stored.
        on_shelved: called when nobody can tell what became of it.
        """
        self._tools = tools
        self._on_shelved = on_shelved
        sponsored = tools.sponsor is not None and submission.sponsored
        self._course = Course(submission, sponsor=sponsored, witness=tools.has_witness)
        self._log = tools.log.bind(hash=submission.hash, purpose=submission.purpose)
        self._steps: dict[type[Step], Callable[..., Awaitable[News | None]]] = {
            Send: self._send,
            Look: self._look,
            Bump: self._bump,
            AskWitness: self._ask_witness,
            Finish: self._finish,
            Bury: self._bury,
            Shelve: self._shelve,
        }

    async def run(self) -> Submission:
        """Return the submission once it has ended, whoever ended it.

        Cancellation: at any time; it stays stored as it is.
        """
        news: News | None = TakenUp()
        while news is not None:
            self._course, step = advance(self._course, news)
            news = await self._steps[type(step)](step)
        return self._course.submission

    def _keep(self, submission: Submission) -> None:
        self._course = attrs.evolve(self._course, submission=submission)

    async def _reload(self) -> News | None:
        """Read it again, since another process has changed it; None once it has ended."""
        found = await self._tools.stored(partial(self._tools.store.find, self._course.submission.hash))
        assert found is not None, "what is stored is never deleted"
        self._keep(found)
        return NotLooked() if found.state in OPEN else None

    async def _send(self, step: Send) -> News | None:
        tools, submission = self._tools, self._course.submission
        begun = await tools.stored(partial(tools.store.begin_send, submission.hash, tools.clock.now()))
        if begun is None:
            return await self._reload()
        self._keep(begun)
        envelope = begun.bumps[-1].envelope if begun.bumps and not step.inner_only else begun.envelope
        if envelope is begun.envelope and envelope.inner_hash is not None and begun.refusal in _UNPAID:
            # It was passed on inside a fee-bump, and nobody could pay: by turns without it, where its own source pays,
            # as either may have XLM by now.
            envelope = tools.chain.unwrap(envelope) if begun.sends % 2 == 0 else envelope
        return await self._sent(envelope)

    async def _sent(self, envelope: Envelope) -> News | None:
        """Send an envelope whose send is counted."""
        answers = self._tools.metrics.chain_sends
        try:
            sent = await self._tools.chain.send(envelope)
        except ChainUnavailable as fault:
            answers.of("unsent").inc()
            self._log.info("transaction_not_sent", error=str(fault))
            return await self._untaken(NotSent(), None)
        except (ChainOutcomeUnknown, ChainMismatch) as fault:
            answers.of("unknown").inc()
            self._log.info("transaction_sent_unknown", error=str(fault))
            return Silent()
        answers.of(sent.status).inc()
        if sent.status == "refused":
            self._log.warning("transaction_refused", code=sent.result_code, ledger=sent.latest.sequence)
            if envelope.inner_hash is not None and sent.result_code in _UNPAID:
                self._log.error("sponsor_cannot_pay", cure="send XLM to the account of FEE_BUMPER_SECRET_KEY")
            return await self._untaken(Answered(sent), sent.result_code)
        return Answered(sent)

    async def _untaken(self, news: News, refusal: str | None) -> News | None:
        """Note that the last send came to nothing. In doubt it counts as taken, and only time proves otherwise."""
        store, tx_hash = self._tools.store, self._course.submission.hash

        async def note() -> Submission | None:
            try:
                return await store.note_untaken(tx_hash, refusal)
            except OutcomeUnknown:
                return await self._tools.stored(partial(store.find, tx_hash))

        noted = await self._tools.stored(note)
        if noted is None or noted.state not in OPEN:
            return await self._reload()
        self._keep(noted)
        return news

    async def _look(self, step: Look) -> News | None:
        await trio.sleep(step.after_seconds)
        tools, submission = self._tools, self._course.submission
        if self._course.unproven or submission.state == "unresolved":
            epoch = await tools.stored(partial(tools.store.epoch, tools.network))
            self._course = attrs.evolve(self._course, epoch=epoch.number)
        answers: list[Applied | NotSeen] = []
        for tx_hash in submission.hashes:
            try:
                answer = await tools.chain.transaction(tx_hash)
            except (ChainUnavailable, ChainMismatch):
                return NotLooked()
            answers.append(answer)
            if isinstance(answer, Applied):
                break
        return Looked(tuple(answers))

    async def _bump(self, step: Bump) -> News | None:
        tools, submission = self._tools, self._course.submission
        assert tools.sponsor is not None
        try:
            stats = await tools.chain.fee_stats()
        except (ChainUnavailable, ChainMismatch):
            stats = None
        bid = next_bid(submission, stats, tools.bid_max, surge=step.surge)
        if bid is None:
            self._log.warning("transaction_at_bid_max", bid=submission.highest_bid, bid_max=tools.bid_max)
            return NotBumped()
        bump = FeeBump(tools.sponsor.bump(submission.envelope, bid), bid)
        added = await tools.stored(partial(tools.store.add_bump, submission.hash, bump, tools.clock.now()))
        ended = await self._reload()
        if ended is None:
            return None
        if not added:
            return NotBumped()
        tools.metrics.chain_fee_bumps.inc()
        self._log.info("transaction_bumped", bid=bid, bump=bump.envelope.hash)
        return Bumped()

    async def _ask_witness(self, _: AskWitness) -> News | None:
        for tx_hash in self._course.submission.hashes:
            try:
                applied = await self._tools.chain.recorded(tx_hash)
            except (ChainUnavailable, ChainMismatch):
                return Opinion(None)
            if applied is not None:
                return Opinion(applied)
        return Opinion(None)

    async def _finish(self, step: Finish) -> News | None:
        tools, applied = self._tools, step.applied
        finish = partial(tools.store.finish, closes_purpose=step.closes_purpose)
        if await tools.stored(partial(finish, self._course.submission.hash, applied, tools.clock.now())):
            self._count("succeeded" if applied.successful else "failed")
            told = self._log.info if applied.successful else self._log.warning
            told(
                "transaction_applied",
                successful=applied.successful,
                ledger=applied.ledger,
                code=applied.operation_code or applied.result_code,
                contract_error=None if applied.fault is None else applied.fault.contract_error,
                closes_purpose=step.closes_purpose,
            )
        return await self._reload()

    async def _bury(self, step: Bury) -> News | None:
        tools, submission = self._tools, self._course.submission
        if await tools.stored(partial(tools.store.bury, submission.hash, step.proof, tools.clock.now())):
            self._count("refused" if step.proof is None else "expired")
            self._log.warning("transaction_dead", refusal=submission.refusal, by_time=step.proof is not None)
        return await self._reload()

    async def _shelve(self, step: Shelve) -> News | None:
        tools, submission = self._tools, self._course.submission
        if await tools.stored(partial(tools.store.shelve, submission.hash, step.retained)):
            self._log.error(
                "transaction_unresolved",
                prepared_ledger=submission.prepared_ledger,
                oldest_ledger=step.retained.oldest,
            )
        if await self._reload() is None:
            return None
        self._on_shelved()
        return Shelved()

    def _count(self, outcome: str) -> None:
        self._tools.metrics.chain_transactions_ended.of(outcome).inc()
