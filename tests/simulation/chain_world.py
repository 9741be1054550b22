"""A chain's world from one seed: two submitters, a hostile network, a bad database, crashes; and who audits it.

The auditor knows nothing of submitters. It sees each envelope when it is sent, each ledger when it closes, each answer
that a caller was given, and the tables at the end; what it demands is the golden rules, not what the code does.
"""

import traceback
from datetime import datetime, timedelta
from random import Random
from typing import Final, cast

import attrs
import trio
import trio.testing
from trio._core import _run as scheduler

from callora.actors.follower import Store, Tools
from callora.actors.submitter import Submitter
from callora.ledger.chain import Applied, ContractFault, Envelope
from callora.ledger.faults import CalloraFault
from callora.ledger.submission import OPEN
from callora.stellar.contracts import ContractCall
from callora.store.transactions import Epoch
from tests.simulation.chain_store import ChainTables, FaultyStore, MemoryStore
from tests.simulation.sky import CALM, GENESIS, LEDGER_SECONDS, RESOURCE_FEE, Sky, View, Weather, account, bid_of
from tests.simulation.support import METRICS, Log

CHANNELS: Final = tuple(account(number) for number in range(1, 5))
OWNER: Final = account(10)
SPONSOR: Final = account(11)
WALLETS: Final = tuple(account(number) for number in range(20, 24))
BID_MAX: Final = 1_000_000
PATIENCE_SECONDS: Final = 4 * 3600.0
"""On the simulation's clock: whoever has no answer that long after the last storm never gets one."""

SPELLS: Final = (
    *(CALM, CALM, CALM),
    Weather(silent=0.5),
    Weather(silent=0.3, idle=0.5, ghost=0.2, lost=0.2),
    Weather(away=0.6),
    Weather(away=1.0),
    Weather(refusal=0.4),
    Weather(silent=0.5, refusal=0.4, idle=0.5),
    Weather(late=0.6),
    Weather(idle=0.9, lost=0.3, ghost=0.3),
    Weather(idle=1.0),
    Weather(failing=0.5),
    Weather(surge=2_000, idle=0.2),
    Weather(surge=200_000),
    Weather(surge=5_000_000),
    Weather(lag=3, silent=0.2),
    Weather(lag=40, silent=0.2, idle=0.3),
    Weather(kept=5),
    Weather(kept=5, silent=0.3, idle=0.5),
    Weather(kept=5, lag=10, away=0.3),
    Weather(stopped=True),
    Weather(silent=0.2, away=0.2, refusal=0.1, late=0.1, idle=0.3, lost=0.1, ghost=0.2, failing=0.1, lag=5, surge=500),
)


@attrs.define(eq=False)
class Want:
    """Something that somebody wants done once, asked for by one process or both."""

    purpose: str
    call: ContractCall
    processes: tuple[int, ...]
    answers: dict[int, Applied | ContractFault] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Passed:
    """A deposit that a wallet signed."""

    purpose: str
    envelope: Envelope
    prepared_ledger: int
    process: int
    at: float
    """When it reaches Callora; the wallet may have sent it long before."""
    stored: bool = False


@attrs.define(eq=False)
class SkewedClock:
    """A wall clock that is wrong."""

    offset: float = 0.0

    def now(self) -> datetime:
        """Return what it shows."""
        return GENESIS + timedelta(seconds=trio.current_time() + self.offset)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.now().timestamp()


@attrs.define(eq=False)
class Process:
    """One process: a submitter and those who ask it."""

    world: "ChainWorld"
    number: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    submitter: Submitter = attrs.field(init=False)
    nursery: trio.Nursery = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        world = self.world
        tools = Tools(
            network="testnet",
            chain=world.view(),
            store=world.store(self.number),
            sponsor=SPONSOR if world.sponsored else None,
            has_witness=world.witnessed,
            bid_max=BID_MAX,
            clock=world.clocks[self.number],
            metrics=METRICS,
            log=world.log.logger(),
        )
        self.submitter = Submitter(
            tools, channels=CHANNELS, authorities=(OWNER,), bid_of=bid_of, random=world.random, base_fee=100
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until it crashes; those who asked ask again in the next life."""
        world = self.world
        with self.scope:
            async with trio.open_nursery() as self.nursery:
                await self.nursery.start(self.submitter.run)
                for want in world.wants:
                    self.ask(want)
                for passed in world.passed:
                    self.pass_on(passed)
                task_status.started()
                await trio.sleep_forever()

    def ask(self, want: Want) -> None:
        """Ask for it, where this process does and has no answer yet."""
        if self.number in want.processes and self.number not in want.answers:
            self.nursery.start_soon(self._ask, want)

    def pass_on(self, passed: Passed) -> None:
        """Pass a deposit on, where this process is to and has not."""
        if passed.process == self.number and not passed.stored:
            self.nursery.start_soon(self._pass_on, passed)

    async def _ask(self, want: Want) -> None:
        while self.number not in want.answers:
            try:
                want.answers[self.number] = await self.submitter.call(want.purpose, want.call)
            except CalloraFault:
                await trio.sleep(1 + 20 * self.world.random.random())

    async def _pass_on(self, passed: Passed) -> None:
        await trio.sleep_until(passed.at)
        while not passed.stored:
            try:
                sponsored = passed.process == 0
                await self.submitter.pass_on(
                    passed.purpose, passed.envelope, passed.prepared_ledger, sponsored=sponsored
                )
                passed.stored = True
            except CalloraFault:
                await trio.sleep(1 + 20 * self.world.random.random())


class ChainWorld:
    """The world of a seed."""

    def __init__(self, seed: int, ledgers: int) -> None:
        self.random = Random(seed)
        self.ledgers = ledgers
        self.sky = Sky(self.random)
        self.tables = ChainTables()
        self.kept: Store = MemoryStore(self.tables)
        self.log = Log()
        self.clocks = (SkewedClock(), SkewedClock())
        self.processes: list[Process] = []
        self.wants: list[Want] = []
        self.passed: list[Passed] = []
        self.wrong: list[str] = []
        self.sponsored = self.random.random() < 0.7
        self.witnessed = self.random.random() < 0.5
        self.busy = self.random.choice((0.02, 0.1, 0.3))
        """How likely a ledger brings something new to do."""
        self.store_faults = 0.0
        self.resets = 0
        self.crashes = 0
        for key in (*CHANNELS, OWNER, SPONSOR, *WALLETS):
            self.sky.open_account(key)
        for key in CHANNELS[:2]:
            self.sky.accounts[key.address].xlm = 30 * RESOURCE_FEE

    def view(self) -> View:
        """Return a process's way to the network."""
        return View(self.sky, slow=self.random.choice((0.05, 0.5)))

    def store(self, number: int) -> Store:
        """Return a process's way to the database."""
        return cast(Store, FaultyStore(self.kept, self.random, self.store_faults))

    async def run(self) -> None:
        """Live through the ledgers, come to rest, and audit."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sky.close_ledgers)
            for number in range(2):
                self.processes.append(Process(self, number))
                await nursery.start(self.processes[number].run)
            nursery.start_soon(self._spells)
            began = trio.current_time()
            while trio.current_time() < began + self.ledgers * LEDGER_SECONDS:
                await trio.sleep(LEDGER_SECONDS)
                await self._happen(nursery)
            await self._come_to_rest()
            nursery.cancel_scope.cancel()
        self._audit()

    async def _spells(self) -> None:
        while True:
            self.sky.weather = self.random.choice(SPELLS)
            self.store_faults = self.random.choice((0.0, 0.0, 0.02, 0.3))
            self._set_faults(self.store_faults)
            await trio.sleep(LEDGER_SECONDS * self.random.choice((1, 3, 10, 30, 60)))

    def _set_faults(self, faults: float) -> None:
        for process in self.processes:
            store = process.submitter._tools.store
            assert isinstance(store, FaultyStore)
            store.faults = faults

    async def _happen(self, nursery: trio.Nursery) -> None:
        random = self.random
        if random.random() < self.busy:
            self._want()
        if random.random() < self.busy / 4:
            self._sign()
        if random.random() < 0.01:
            await self._crash(nursery, random.randrange(2))
        if random.random() < 0.01:
            random.choice(self.clocks).offset = random.choice((0.0, 90.0, -90.0, 7200.0, -7200.0))
        if random.random() < 0.02:
            for key in CHANNELS[:2]:
                self.sky.accounts[key.address].xlm = random.choice((1, 30)) * 30 * RESOURCE_FEE
        if random.random() < 1 / 2000:
            nursery.start_soon(self._reset)

    def _want(self) -> None:
        random = self.random
        number = len(self.wants)
        purpose = f"want-{number}"
        call = ContractCall(OWNER.address, "C", purpose)
        self.wants.append(Want(purpose, call, random.choice(((0,), (1,), (0, 1), (0, 1)))))
        for process in self.processes:
            process.ask(self.wants[-1])

    def _sign(self) -> None:
        """Let a wallet sign a deposit; it may send it as well, or sign it wrongly."""
        random, sky = self.random, self.sky
        wallet = random.choice(WALLETS)
        sequence = sky.accounts[wallet.address].sequences[-1][1] + 1
        max_time = int(sky.head().closed_at.timestamp()) + random.choice((30, 300))
        number = len(self.passed)
        draft = View(sky, slow=0).build(
            ContractCall(wallet.address, "C", f"deposit-{number}"),
            source=wallet.address,
            sequence=sequence,
            max_time=max_time,
            fee=random.choice((100, 5_000)),
        )
        signed = wallet.sign(draft) if random.random() < 0.9 else draft
        at = trio.current_time() + random.choice((0.0, 400.0))
        self.passed.append(Passed(f"deposit-{number}", signed, sky.ledger, random.randrange(2), at))
        if random.random() < 0.5:
            sky.take(wallet.sign(draft), 0)
        for process in self.processes:
            process.pass_on(self.passed[-1])

    async def _crash(self, nursery: trio.Nursery, number: int) -> None:
        self.crashes += 1
        self.processes[number].scope.cancel()
        await trio.sleep(self.random.choice((0.0, 1.0, 60.0)))
        self.processes[number] = Process(self, number)
        await nursery.start(self.processes[number].run)

    async def _reset(self) -> None:
        """Begin another history, and let an operator notice."""
        self.resets += 1
        number = self.tables.epoch.number
        self.sky.reset()
        await trio.sleep(60 * self.random.random())
        await self.set_epoch(Epoch(number, "the network has begun another history"))
        await trio.sleep(600 * self.random.random())
        await self.set_epoch(Epoch(number + 1, None))

    async def set_epoch(self, epoch: Epoch) -> None:
        """Do what an operator does."""
        self.tables.epoch = epoch
        await trio.lowlevel.checkpoint()

    async def load(self) -> None:
        """Bring `tables` up to what is stored."""
        await trio.lowlevel.checkpoint()

    async def _come_to_rest(self) -> None:
        end = trio.current_time() + PATIENCE_SECONDS
        while trio.current_time() < end:
            self.sky.weather = CALM
            self._set_faults(0.0)
            for each in self.sky.accounts.values():
                each.xlm = 10**12
            await trio.sleep(LEDGER_SECONDS)
            await self.load()
            if self._at_rest():
                return

    def _at_rest(self) -> bool:
        return (
            self.tables.epoch.halted is None
            and all(set(want.answers) == set(want.processes) for want in self.wants)
            and all(passed.stored for passed in self.passed)
            and all(row.submission.state not in OPEN for row in self.tables.rows.values())
        )

    def _audit(self) -> None:
        self.wrong += self.sky.wrong
        self.wrong += [f"the database had to refuse: {rule}" for rule in self.tables.refusals]
        crashes = {"transaction_follower_crashed", "submitter_stopped"}
        self.wrong += [f"logged: {event}" for event in self.log.events if event in crashes]
        for want in self.wants:
            self._audit_want(want)
        for passed in self.passed:
            if not passed.stored:
                self.wrong.append(f"{passed.purpose} was never stored")
        for tx_hash, row in self.tables.rows.items():
            submission = row.submission
            truth = self.sky.everything.get(tx_hash)
            if submission.state in OPEN:
                self.wrong.append(f"{submission.purpose}: {tx_hash[:8]} is still {submission.state}")
            elif submission.state == "dead":
                if truth is not None and not self.resets:
                    self.wrong.append(f"{submission.purpose}: {tx_hash[:8]} is called dead and was applied")
            elif submission.applied != truth:
                self.wrong.append(f"{submission.purpose}: {tx_hash[:8]} is {submission.applied} and was {truth}")

    def _audit_want(self, want: Want) -> None:
        done = sum(self.sky.effects.get((history, want.purpose), 0) for history in range(1, self.sky.history + 1))
        if done > 1 and not self.resets:
            self.wrong.append(f"{want.purpose} was done {done} times")
        for number in want.processes:
            answer = want.answers.get(number)
            if answer is None:
                self.wrong.append(f"{want.purpose} was never answered to process {number}")
            elif isinstance(answer, Applied) and answer.successful and not done:
                self.wrong.append(f"{want.purpose} is said to be done and is not")
            elif isinstance(answer, Applied) and not answer.successful and done and not self.resets:
                self.wrong.append(f"{want.purpose} is said to have failed and was done")


def simulate_chain(seed: int, ledgers: int = 300) -> list[str]:
    """Run the world of a seed and return every rule that it broke."""
    return run_chain_world(seed, ledgers).wrong


def run_chain_world(seed: int, ledgers: int = 300) -> ChainWorld:
    """Run the world of a seed, the same way every time, and return it as it ended."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    world = ChainWorld(seed, ledgers)
    # Trio deals the tasks of a batch by chance. This is its own way, made for Hypothesis, to have them dealt by a seed.
    scheduler._hypothesis_plugin_setup()
    scheduler._r.seed(seed)
    try:
        trio.run(world.run, clock=clock)
    except Exception:
        world.wrong.append(traceback.format_exc())
    return world
