"""The ledger writer: gathers what vault actors decided and stores it, one round at a time.

While one commit is in flight the next round gathers; there is no lingering and one writer, which measured faster than
two. A round holds at most one stake of each vault, so rounds of one vault are stored in the order they were decided.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.mailbox import Envelope
from callora.ledger.commands import LockedCommand
from callora.ledger.faults import CalloraFault, OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable
from callora.ledger.ids import EventId, VaultId
from callora.ledger.outcomes import EventFound
from callora.ledger.rounds import RoundResult, Share
from callora.ledger.vault import VaultState
from callora.metrics import Metrics

CONFLICT_RETRIES_MAX = 3
"""A deadlock or serialisation failure rolled the whole statement back, so repeating it is safe."""


class LedgerStore(Protocol):
    """All that actors need of the store. A simulation stands in for it with lost, late and unknown commits."""

    async def load_vaults(self, vault_ids: Sequence[VaultId]) -> dict[VaultId, VaultState]:
        """Return the stored state of each vault that exists."""
        ...

    async def load_guarded(
        self, state: VaultState, known: VaultState | None, *, credited: bool, refusing: bool
    ) -> VaultState:
        """Return a vault that is limited with its rules and what they count, its quota renewed where that is due.

        Args:
            state: the vault, read a moment ago.
            known: the vault as its actor knew it last, of whose decisions none is on its way. Where `refusing`, all
                of them are stored.
            credited: whether something priced in credits is to be decided: then its quota is known.
            refusing: whether something will be refused by what is returned; else more than was spent may be counted.
        """
        ...

    async def find_event(self, vault_id: VaultId, event_id: EventId) -> EventFound | None:
        """Return a usage event as it stands, or None."""
        ...

    async def commit_round(self, shares: Sequence[Share]) -> RoundResult:
        """Store a round; return what did not go as decided."""
        ...

    async def commit_locked_round(
        self, vault_id: VaultId, decide: Callable[[VaultState], Share], *, credited: bool
    ) -> tuple[Share, RoundResult]:
        """Store one vault's share, decided with its row locked; its quota is known where that is asked."""
        ...

    async def commit_locked(self, vault_id: VaultId, command: LockedCommand) -> object:
        """Carry out one rare command with the vault's row locked; return its outcome."""
        ...


@attrs.define(slots=True, eq=False)
class Stake:
    """One vault's share of a round with the commands it answers."""

    holder: "StakeHolder"
    share: Share
    envelopes: list[Envelope] = attrs.field(factory=list)


class StakeHolder(Protocol):
    """Who is told what became of a stake. Called between checkpoints, in the order the stakes were taken."""

    def stored(self, stake: Stake, present: VaultState | None, missed: frozenset[EventId]) -> None:
        """The share is durable; `present` is the vault as it stands when that differs from what was decided."""

    def lost(self, stake: Stake) -> None:
        """Nothing of the share is stored: another process was faster."""

    def failed(self, stake: Stake, fault: CalloraFault) -> None:
        """The share is not stored (StoreUnavailable, StoreRefused) or perhaps stored (OutcomeUnknown)."""


@attrs.define(slots=True, eq=False)
class _Gathering:
    stakes: dict[VaultId, Stake] = attrs.field(factory=dict)
    commands: int = 0


class Writer:
    """One task, one dedicated connection, one round in flight."""

    def __init__(
        self, store: LedgerStore, metrics: Metrics, log: FilteringBoundLogger, round_commands_max: int
    ) -> None:
        self._store = store
        self._log = log
        self._metrics = metrics
        self._round_commands_max = round_commands_max
        self._queue: deque[_Gathering] = deque([_Gathering()])
        self._parked: trio.lowlevel.Task | None = None

    def stake(self, holder: StakeHolder, vault_id: VaultId, make_share: Callable[[], Share]) -> Stake:
        """Return the vault's stake in the round that is gathering, making one where there is none.

        The caller adds one command to it before its next checkpoint.
        """
        gathering = self._queue[-1]
        if gathering.commands >= self._round_commands_max:
            gathering = _Gathering()
            self._queue.append(gathering)
        stake = gathering.stakes.get(vault_id)
        if stake is None:
            stake = gathering.stakes[vault_id] = Stake(holder, make_share())
        gathering.commands += 1
        if self._parked is not None:
            trio.lowlevel.reschedule(self._parked)
            self._parked = None
        return stake

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Store rounds until cancelled.

        Cancellation: a round in flight is waited for (at most the store's commit deadline); the stakes of rounds never
        sent are failed as not stored.
        """
        task_status.started()
        try:
            while True:
                if not self._queue[0].stakes:
                    await self._park()
                gathered = self._queue.popleft()
                if not self._queue:
                    self._queue.append(_Gathering())
                await self._store_round(list(gathered.stakes.values()), gathered.commands)
        finally:
            for gathered in self._queue:
                for stake in gathered.stakes.values():
                    stake.holder.failed(stake, StoreUnavailable("the ledger writer has stopped"))
            self._queue = deque([_Gathering()])

    async def _park(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _store_round(self, stakes: list[Stake], commands: int) -> None:
        started = trio.current_time()
        try:
            result = await self._commit(stakes)
        except (StoreUnavailable, OutcomeUnknown) as fault:
            self._metrics.rounds.of(type(fault).__name__).inc()
            self._log.warning("round_failed", fault=type(fault).__name__, vaults=len(stakes), error=str(fault))
            for stake in stakes:
                stake.holder.failed(stake, fault)
            return
        except CalloraFault as fault:
            self._metrics.rounds.of("refused").inc()
            await self._store_alone(stakes, fault)
            return
        except Exception:
            # A bug, of the store or in what one vault decided. Ending the writer would fail every vault's next round
            # for it, and a close that is tried again would end the process.
            self._metrics.rounds.of("OutcomeUnknown").inc()
            self._log.exception("round_crashed", vaults=len(stakes))
            for stake in stakes:
                stake.holder.failed(stake, OutcomeUnknown("the round crashed"))
            return
        except BaseException:
            for stake in stakes:
                stake.holder.failed(stake, OutcomeUnknown("the round was interrupted"))
            raise
        self._metrics.rounds.of("stored").inc()
        self._metrics.round_commands.observe(commands)
        self._metrics.round_seconds.observe(trio.current_time() - started)
        self._tell(stakes, result)

    async def _commit(self, stakes: Sequence[Stake]) -> RoundResult:
        shares = [stake.share for stake in stakes]
        for _ in range(CONFLICT_RETRIES_MAX):
            try:
                return await self._store.commit_round(shares)
            except StoreConflict:
                continue
        return await self._store.commit_round(shares)

    async def _store_alone(self, stakes: list[Stake], fault: CalloraFault) -> None:
        """The database refused a whole round: store each stake alone, so that only the guilty one is refused."""
        if len(stakes) == 1:
            self._log.error("share_refused", vault_id=stakes[0].share.vault_id, error=str(fault))
            refused = fault if isinstance(fault, StoreRefused) else StoreUnavailable(f"given up: {fault}")
            stakes[0].holder.failed(stakes[0], refused)
            return
        waiting = deque(stakes)
        try:
            while waiting:
                stake = waiting.popleft()
                await self._store_round([stake], len(stake.envelopes))
        finally:
            for stake in waiting:
                stake.holder.failed(stake, StoreUnavailable("the ledger writer has stopped"))

    def _tell(self, stakes: Sequence[Stake], result: RoundResult) -> None:
        if not (result.lost or result.drifted or result.missed):
            for stake in stakes:
                stake.holder.stored(stake, None, result.missed)
            return
        lost = {state.vault_id for state in result.lost}
        drifted = {state.vault_id: state for state in result.drifted}
        for stake in stakes:
            vault_id = stake.share.vault_id
            if vault_id in lost:
                stake.holder.lost(stake)
            else:
                stake.holder.stored(stake, drifted.get(vault_id), result.missed)
