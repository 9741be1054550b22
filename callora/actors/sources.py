"""Asking the chain until somebody answers: nodes of one kind, one after another, again after a pause, behind a breaker.

The breaker stands around the whole of it: one question that nobody answered in all its attempts is one failure.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from random import Random
from typing import Final, Generic, Literal, Protocol, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.breaker import Breaker, BreakerSettings, State, Ticket
from callora.ledger.faults import ChainMismatch, ChainOutcomeUnknown, ChainUnavailable
from callora.metrics import Metrics

PAUSE_SECONDS_MAX: Final = 10.0
JITTER: Final = 0.3
"""Of a pause, up or down."""
STALE_LEDGERS: Final = 6
"""An answer from further behind the newest ledger known, half a minute or so, is not relied upon."""
_LOST: Final = ("unreachable", "timeout", "status", "malformed")
"""After these, what answers at the same address may be another node."""
_ANSWERED: Final = ("refused", "stale")
"""Faults of the question, or of the moment: the dependency itself is there."""


class Node(Protocol):
    """What a source asks."""

    @property
    def name(self) -> str:
        """What to call it in a log."""

    @property
    def latest(self) -> int:
        """The ledger of its last answer; 0 where answers name none."""

    async def healthy(self) -> None:
        """Return when it says that it is well; raise ChainUnavailable when not."""


Health = Literal["ok", "degraded", "down"]
N = TypeVar("N", bound=Node)
T = TypeVar("T")


@attrs.frozen
class BreakerReport:
    """What a breaker of the chain has seen."""

    state: State
    consecutive_failures: int
    consecutive_successes: int
    total_failures: int
    total_successes: int
    last_failure_time: datetime | None
    last_state_change: datetime


@attrs.frozen
class RetrySettings:
    """How often a question is asked, and how far apart."""

    attempts: int
    """In all, >= 1; in each of them every node is asked once."""
    base_seconds: float
    """The first pause; each further one is twice as long, up to PAUSE_SECONDS_MAX."""


@attrs.define(eq=False)
class _Place(Generic[N]):
    """A node and how it has behaved."""

    node: N
    verified: bool = False
    away_until: float = 0.0
    """It asked to be left alone until then."""
    failing: bool = False


class Source(Generic[N]):
    """Nodes of one kind. A question is asked at most attempts times nodes; a send is repeated only where the node's
    own method says that nothing was sent.
    """

    def __init__(
        self,
        name: str,
        nodes: Sequence[N],
        verify: Callable[[N], Awaitable[None]],
        *,
        breaker_settings: BreakerSettings,
        retry: RetrySettings,
        random: Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """Describe the source; nothing is asked yet.

        Args:
            name: `rpc` or `horizon`, for logs and metrics.
            nodes: at least one; the first is preferred until it fails.
            verify: returns when a node is on the right network, raises ChainMismatch when it is not. Called before a
                node is asked anything else, and again after it was lost.
        """
        assert nodes
        self.name = name
        self.breaker = Breaker(breaker_settings)
        self.newest = 0
        """The newest ledger that any node has named."""
        self._places = [_Place(node) for node in nodes]
        self._preferred = self._places[0]
        self._verify = verify
        self._retry = retry
        self._random = random
        self._metrics = metrics
        self._log = log

    @property
    def nodes(self) -> list[N]:
        """All nodes, as configured."""
        return [place.node for place in self._places]

    def forget_newest(self) -> None:
        """Begin anew to learn which ledger is the newest: the network has another history."""
        self.newest = 0

    async def verify_all(self) -> None:
        """Ask every node, at the same time, which network it is on; one that does not answer is asked later.

        Raises:
            ChainMismatch: of any of them.

        Cancellation: at any time; who has not answered is asked later.
        """
        mismatches: list[ChainMismatch] = []

        async def verify(place: _Place[N]) -> None:
            try:
                await self._verify(place.node)
                place.verified = True
            except ChainMismatch as mismatch:
                mismatches.append(mismatch)
            except ChainUnavailable as fault:
                self._note(place, fault)

        async with trio.open_nursery() as nursery:
            for place in self._places:
                nursery.start_soon(verify, place)
        if mismatches:
            raise mismatches[0]

    async def ask(self, method: str, asking: Callable[[N], Awaitable[T]], *, stale_allowed: bool = False) -> T:
        """Return what a node answers.

        Args:
            method: what is asked, for metrics.
            asking: asks one node once.
            stale_allowed: whether an answer of a node that is behind is better than none; the newest there is.

        Raises:
            ChainUnavailable: the breaker is open, or no node answered in any attempt.
            ChainOutcomeUnknown: of a send.
            ChainMismatch: a node is on another network.

        Cancellation: at any time; the breaker counts it neither way.
        """
        admitted = self.breaker.admit(trio.current_time())
        if not isinstance(admitted, Ticket):
            raise ChainUnavailable(
                f"the breaker of {self.name} is {self.breaker.state}", kind="open", retry_after_seconds=admitted
            )
        succeeded: bool | None = None
        try:
            answer = await self._persist(method, asking, stale_allowed)
            succeeded = True
            return answer
        except ChainUnavailable as fault:
            succeeded = fault.kind in _ANSWERED
            raise
        except ChainOutcomeUnknown:
            succeeded = False
            raise
        finally:
            admitted.end(succeeded, trio.current_time())

    async def _persist(self, method: str, asking: Callable[[N], Awaitable[T]], stale_allowed: bool) -> T:
        fault = ChainUnavailable(f"no node of {self.name} was asked")
        for attempt in range(self._retry.attempts):
            if attempt:
                pause = self._pause(attempt - 1)
                if pause > PAUSE_SECONDS_MAX * (1 + JITTER):
                    break
                await trio.sleep(pause)
            passing = False
            behind: list[tuple[int, T]] = []
            for place in self._in_order():
                try:
                    answer = await self._once(place, method, asking)
                except ChainUnavailable as error:
                    fault, passing = error, passing or error.passing
                    continue
                if place.node.latest >= self.newest - STALE_LEDGERS or place.node.latest == 0:
                    self._preferred = place
                    return answer
                behind.append((place.node.latest, answer))
                text = f"{place.node.name} is at ledger {place.node.latest}, and {self.newest} was seen"
                fault, passing = ChainUnavailable(text, kind="stale"), True
            if behind and stale_allowed:
                return max(behind, key=lambda each: each[0])[1]
            if not passing:
                break
        raise fault

    async def _once(self, place: _Place[N], method: str, asking: Callable[[N], Awaitable[T]]) -> T:
        now = trio.current_time()
        if now < place.away_until:
            wait = place.away_until - now
            raise ChainUnavailable(
                f"{place.node.name} asked to be left alone", kind="rate_limited", retry_after_seconds=wait
            )
        try:
            if not place.verified:
                await self._verify(place.node)
                place.verified = True
            answer = await asking(place.node)
        except (ChainUnavailable, ChainOutcomeUnknown) as fault:
            self._metrics.chain_requests.of(self.name, method, fault.kind).inc()
            self._note(place, fault)
            raise
        self._metrics.chain_requests.of(self.name, method, "answered").inc()
        if place.failing:
            place.failing = False
            self._log.info("chain_node_answers", source=self.name, node=place.node.name)
        self.newest = max(self.newest, place.node.latest)
        return answer

    def _note(self, place: _Place[N], fault: ChainUnavailable | ChainOutcomeUnknown) -> None:
        if fault.kind in _LOST:
            place.verified = False
        if fault.kind not in _ANSWERED and not place.failing:
            place.failing = True
            self._log.warning("chain_node_fails", source=self.name, node=place.node.name, fault=str(fault))
        if isinstance(fault, ChainUnavailable) and fault.retry_after_seconds is not None:
            place.away_until = trio.current_time() + fault.retry_after_seconds

    def _in_order(self) -> list[_Place[N]]:
        """Return the nodes, those that want to be left alone last, else the preferred one first."""
        now = trio.current_time()
        return sorted(self._places, key=lambda each: (each.away_until > now, each is not self._preferred))

    def _pause(self, exponent: int) -> float:
        """Return how long to wait before the next attempt, in seconds."""
        doubled = self._retry.base_seconds * 2.0 ** min(exponent, 30)
        pause = min(doubled, PAUSE_SECONDS_MAX) * (1 + JITTER * (2 * self._random.random() - 1))
        back = min(place.away_until for place in self._places) - trio.current_time()
        return max(pause, back)
