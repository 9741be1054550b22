"""The submitter: what Callora wants done on a network is done once, through channel accounts, whatever fails meanwhile.

A purpose names one intent. However often it is asked for, by whichever process, before or after a crash, one
transaction at a time is under way for it, and its outcome is the answer to all who ask.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random
from typing import Final

import attrs
import trio

from callora.actors.channels import Channels, Signer
from callora.actors.follower import Follower, Tools
from callora.ledger.chain import Applied, Archived, ContractFault, Envelope, FeeStats, Head
from callora.ledger.faults import CalloraFault, ChainMismatch, ChainOutcomeUnknown, ChainUnavailable
from callora.ledger.submission import (
    OPEN,
    Alive,
    Build,
    Dead,
    Follow,
    Submission,
    aftermath,
    first_bid,
    outcome_of,
    stand,
)
from callora.stellar.contracts import ContractCall
from callora.store.transactions import Epoch

TIME_BOUND_SECONDS: Final = 90
"""How long a transaction may be applied after it was built. Source: stellar.md C6, 60 to 120 s."""
SWEEP_SECONDS: Final = 10.0
FOREIGN_SECONDS: Final = 30.0
"""A transaction that was not sent for so long has nobody who follows it; who does sends it about every ledger."""
CRASH_PAUSE_SECONDS: Final = 30.0
RESTORES_MAX: Final = 3
"""Restores that one purpose may need in a row."""
BID_MAX: Final = 10_000_000
"""Stroops of XLM an operation: 1 XLM."""
CONTEST_PAUSE_SECONDS: Final = 1.0

Make = Callable[[str, int, int, Build, int], Awaitable[Envelope | ContractFault]]
"""Makes an unsigned envelope of a source account, its sequence number, a time bound, how a purpose stands and a bid."""


@attrs.define(eq=False)
class _Following:
    """A submission that this process takes to its end."""

    submission: Submission
    changed: trio.Event = attrs.field(factory=trio.Event)
    """Set when it has ended, and when nobody can tell how."""


class Submitter:
    """Sends transactions on one network. Several processes may run one on the same database."""

    def __init__(
        self,
        tools: Tools,
        *,
        channels: Sequence[Signer],
        authorities: Sequence[Signer],
        bid_of: Callable[[Envelope], int],
        random: Random,
        base_fee: int,
    ) -> None:
        """Prepare; nothing is asked or sent before `run`.

        Args:
            channels: accounts that lend sequence numbers and pay fees, each another; without any the authorities do.
            authorities: the keys that calls need.
            bid_of: what an envelope offers for its inclusion, stroops an operation.
            base_fee: stroops an operation, the least that is offered.
        """
        self._tools = tools
        lent = channels or authorities
        self._channels = Channels(tools.network, lent, tools.store, random, tools.metrics, tools.log)
        self._authorities = {signer.address: signer for signer in (*channels, *authorities)}
        self._bid_of = bid_of
        self._base_fee = base_fee
        self._followed: dict[str, _Following] = {}
        self._nursery: trio.Nursery | None = None
        self._newest: Head | None = None
        self.stopped: str | None = None
        """Why nothing is built any more until an operator has looked and Callora was started again."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take every open transaction up and to its end, now and as they come, until cancelled.

        Cancellation: at any time; whatever is under way is stored as far as it is.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for following in self._followed.values():
                    nursery.start_soon(self._follow_to_end, following)
                task_status.started()
                foreign_seconds = 0.0
                while True:
                    try:
                        await self._sweep(foreign_seconds)
                        foreign_seconds = FOREIGN_SECONDS
                    except CalloraFault as fault:
                        self._tools.log.warning("submitter_sweep_failed", error=str(fault))
                    await trio.sleep(SWEEP_SECONDS)
            finally:
                self._nursery = None

    async def call(self, purpose: str, call: ContractCall) -> Applied | ContractFault:
        """Have a contract called, once for its purpose, and return what came of it.

        The same purpose again, from any process and after any crash, follows or returns the first.

        Args:
            purpose: 1 to 110 characters, always with the same call.
            call: its authority is one of those whose keys are here.

        Returns:
            Applied: it is in a ledger, successful or not. ContractFault: a simulation says that it cannot succeed now;
            nothing of it is or will be in a ledger, and the next time it is simulated anew.

        Raises:
            ChainUnavailable, StoreUnavailable, OutcomeUnknown: for now nobody can tell or go on. What is stored goes
                its way; ask again.
            ChainOutcomeUnknown: nobody can tell what became of its transaction, and an operator was told.
            ChainMismatch: keys, settings or the network are wrong, and an operator was told.
            StoreRefused: a rule of the database is against it; nothing was sent.

        Cancellation: at any time; what is stored goes its way.
        """

        async def make(source: str, sequence: int, max_time: int, plan: Build, bid: int) -> Envelope | ContractFault:
            draft = self._tools.chain.build(call, source=source, sequence=sequence, max_time=max_time, fee=bid)
            # Others write the same entries meanwhile, and a failure would cost the whole fee and a ledger.
            return await self._tools.chain.prepare(draft, leeway="more" if plan.leeway else "some")

        restores = 0
        while True:
            outcome = await self._carry_out(purpose, call.authority, make)
            if not isinstance(outcome, ContractFault) or outcome.archived is None or restores == RESTORES_MAX:
                return outcome
            restores += 1
            await self._restore(f"restore{restores}:{purpose}", outcome.archived)

    async def pass_on(self, purpose: str, envelope: Envelope, prepared_ledger: int, *, sponsored: bool = False) -> str:
        """Store what somebody else signed and send it until it is in a ledger or can be no more.

        Args:
            purpose: 1 to 120 characters.
            envelope: signed and with a time bound; a fee-bump or not.
            prepared_ledger: one that was closed before anybody could have signed it.
            sponsored: whether Callora may put a fee-bump around it where it would fail for its fee, or wait too long.

        Returns:
            The hash that `outcome` knows it by: its own, without a fee-bump, or that of the first of this purpose.

        Raises:
            StoreUnavailable, OutcomeUnknown: it may be stored, or not; the same again is no error.
            StoreRefused: a rule of the database is against it; nothing was stored.
            ChainMismatch: the network is halted.

        Cancellation: it may be stored.
        """
        assert envelope.max_time > 0, "what has no time bound would never be dead"
        tools = self._tools
        epoch = await tools.store.epoch(tools.network)
        submission = Submission(
            network=tools.network,
            epoch=epoch.number,
            purpose=purpose,
            envelope=envelope,
            prepared_ledger=prepared_ledger,
            bid=self._bid_of(envelope),
            channel=False,
            sponsored=sponsored and envelope.inner_hash is None,
        )
        taken = await tools.store.add(submission, tools.clock.now())
        if taken == "network":
            raise ChainMismatch(epoch.halted or "the network is on another history")
        if taken is not None:
            history = await tools.store.of_purpose(tools.network, purpose)
            submission = next(each for each in history if each.state in OPEN or each.closes_purpose)
        if submission.state in OPEN:
            self._follow(submission)
        return submission.hash

    async def outcome(self, tx_hash: str) -> Applied | Dead | Alive | None:
        """Return what became of a transaction, as stored; None where none is stored.

        Args:
            tx_hash: its own, or that of a fee-bump around it.

        Raises:
            StoreUnavailable.
        """
        submission = await self._tools.store.find(tx_hash)
        return None if submission is None else outcome_of(submission)

    # --- one purpose --------------------------------------------------------------------------------------------------

    async def _carry_out(self, purpose: str, authority: str | None, make: Make) -> Applied | ContractFault:
        """Return the outcome of a purpose; build for it as often as the rules allow.

        Args:
            authority: who signs besides the channel.
        """
        tools = self._tools
        while True:
            epoch = await tools.store.epoch(tools.network)
            standing = stand(await tools.store.of_purpose(tools.network, purpose), epoch.number)
            if isinstance(standing, Applied):
                return standing
            if isinstance(standing, Follow):
                await self._wait_for(standing.submission)
                continue
            self._require_going(authority, epoch)
            await trio.sleep(standing.pause_seconds)
            fault = await self._build(purpose, authority, make, standing, epoch)
            if fault is not None:
                return fault

    def _require_going(self, authority: str | None, epoch: Epoch) -> None:
        if self.stopped is not None:
            raise ChainMismatch(self.stopped)
        if epoch.halted is not None:
            raise ChainMismatch(epoch.halted)
        if not self._channels:
            raise ChainMismatch("no key is configured that could send anything: set CHANNEL_SEEDS")
        if authority is not None and authority not in self._authorities:
            raise ChainMismatch(f"the key of {authority} is not configured, and a call needs its consent")

    async def _wait_for(self, submission: Submission) -> None:
        """Return when a submission has ended.

        Raises:
            ChainOutcomeUnknown: nobody can tell what became of it.
            ChainMismatch: it was refused, and the next one of its purpose would be too.
        """
        following = self._follow(submission)
        if following.submission.state != "unresolved":
            await following.changed.wait()
        ended = following.submission
        if ended.state == "unresolved":
            raise ChainOutcomeUnknown(f"what became of transaction {ended.hash} cannot be told by any node")
        if ended.state == "dead" and ended.took_nothing and aftermath(ended.refusal) == "give_up":
            raise ChainMismatch(f"transaction {ended.hash} was refused: {ended.refusal}")

    async def _build(
        self, purpose: str, authority: str | None, make: Make, plan: Build, epoch: Epoch
    ) -> ContractFault | None:
        """Build an envelope on a free channel, store it and begin to follow it; return why it would fail.

        Where another process was faster, nothing is stored.
        """
        tools = self._tools
        async with self._channels.lease(epoch.number) as channel:
            bid = first_bid(self._base_fee, await self._fee_stats(), plan.pressure, tools.bid_max)
            latest = (await tools.chain.retained()).latest
            used = await tools.chain.sequence_of(channel.address)
            if used is None:
                self._channels.set_aside(channel.address, "there is no such account")
                return None
            # A node that is behind does not know the last ones.
            known = await tools.store.last_sequence(tools.network, epoch.number, channel.address)
            sequence = max(used, known or 0) + 1
            max_time = int(self._newest_of(latest).closed_at.timestamp()) + TIME_BOUND_SECONDS
            made = await make(channel.address, sequence, max_time, plan, bid)
            if isinstance(made, ContractFault):
                return made
            signed = channel.sign(made)
            if authority is not None and authority != channel.address:
                signed = self._authorities[authority].sign(signed)
            submission = Submission(
                network=tools.network,
                epoch=epoch.number,
                purpose=purpose,
                envelope=signed,
                prepared_ledger=latest.sequence,
                bid=bid,
                channel=True,
                sponsored=True,
                failed_before=plan.failed_before,
            )
            taken = await tools.stored(partial(tools.store.add, submission, tools.clock.now()))
            if taken is None:
                self._follow(submission)
                return None
        if taken != "purpose":
            await trio.sleep(CONTEST_PAUSE_SECONDS)
        return None

    async def _restore(self, purpose: str, archived: Archived) -> None:
        """Restore what a call needs, on networks that do not do it with the call."""

        async def make(source: str, sequence: int, max_time: int, _: Build, bid: int) -> Envelope:
            await trio.lowlevel.checkpoint()
            return self._tools.chain.build_restore(
                archived, source=source, sequence=sequence, max_time=max_time, fee=bid
            )

        await self._carry_out(purpose, None, make)

    async def _fee_stats(self) -> FeeStats | None:
        try:
            return await self._tools.chain.fee_stats()
        except ChainUnavailable:
            return None  # a low bid is raised later; waiting helps nobody

    def _newest_of(self, head: Head) -> Head:
        """Return the newest ledger known: a node that is behind would give a transaction less time."""
        if self._newest is None or head.closed_at > self._newest.closed_at:
            self._newest = head
        return self._newest

    # --- following ----------------------------------------------------------------------------------------------------

    def _follow(self, submission: Submission) -> _Following:
        """Take a submission to its end in this process, where that is not under way."""
        following = self._followed.get(submission.hash)
        if following is None:
            following = self._followed[submission.hash] = _Following(submission)
            if self._nursery is not None:
                self._nursery.start_soon(self._follow_to_end, following)
        return following

    async def _follow_to_end(self, following: _Following) -> None:
        """Run a follower until its submission has ended; a crash costs a pause and concerns no other."""
        tools, tx_hash = self._tools, following.submission.hash

        def shelved() -> None:
            following.submission = attrs.evolve(following.submission, state="unresolved")
            following.changed.set()

        while True:
            try:
                following.submission = await Follower(tools, following.submission, shelved).run()
                break
            except Exception:
                tools.log.exception("transaction_follower_crashed", hash=tx_hash)
                tools.metrics.actor_restarts.inc()
            await trio.sleep(CRASH_PAUSE_SECONDS)
            found = await tools.stored(partial(tools.store.find, tx_hash))
            assert found is not None, "what is stored is never deleted"
            following.submission = found
            if found.state not in OPEN:
                break
        del self._followed[tx_hash]
        self._heed(following.submission)
        following.changed.set()
        self._channels.look()

    def _heed(self, ended: Submission) -> None:
        """Do what the end of a submission means for others."""
        if ended.state != "dead" or not ended.took_nothing:
            return
        match aftermath(ended.refusal):
            case "set_aside":
                self._channels.set_aside(ended.envelope.source, str(ended.refusal))
            case "stop" if self.stopped is None:
                self.stopped = f"a transaction was refused with {ended.refusal}: check the keys and the passphrase"
                self._tools.metrics.chain_submitter_stopped.set(1)
                self._tools.log.error("submitter_stopped", code=ended.refusal, hash=ended.hash)

    async def _sweep(self, foreign_seconds: float) -> None:
        """Take up what nobody follows, and show what is under way.

        Args:
            foreign_seconds: how long ago it was last sent.
        """
        tools = self._tools
        found = await tools.store.open_ones(tools.network)
        now = tools.clock.now()
        for each in found:
            # Another process's clock may be ahead of this one's.
            if abs((now - each.touched_at).total_seconds()) >= foreign_seconds:
                self._follow(each.submission)
        states = ("stored", "sent", "unresolved")
        for state in states:
            tools.metrics.chain_transactions_open.of(state).set(sum(each.submission.state == state for each in found))
        oldest = min((each.stored_at for each in found), default=now)
        tools.metrics.chain_transaction_oldest_seconds.set(max(0.0, (now - oldest).total_seconds()))
        if self._channels:
            await self._channels.free((await tools.store.epoch(tools.network)).number)
