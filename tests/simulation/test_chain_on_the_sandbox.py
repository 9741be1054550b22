"""The submitter over real HTTP, JSON-RPC and XDR: through the chain's clients, on a sandbox whose nodes fail by a plan.

No socket and no PostgreSQL are in it, so time passes by itself. The auditor counts the test USDC on the ledger.
"""

from datetime import datetime
from functools import partial
from random import Random
from typing import Final, cast

import attrs
import httpx
import pytest
import trio
import trio.testing
from stellar_sdk import TransactionEnvelope

from callora.actors.chain import Chain
from callora.actors.follower import Store, Tools
from callora.actors.submitter import BID_MAX, TIME_BOUND_SECONDS, Submitter
from callora.chain_part import make_chain
from callora.config.loading import load_settings
from callora.ledger.chain import Applied, ContractFault, Envelope
from callora.ledger.faults import CalloraFault
from callora.ledger.submission import OPEN
from callora.sandbox import SandboxFacts
from callora.stellar.contracts import ContractCall
from callora.stellar.envelopes import Signer, bump, inclusion_fee
from callora.stellar.rpc import Leeway
from callora.stellar.sandbox.faults import Fault, Kind, Stage
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.transport import Transport
from tests.simulation.chain_store import ChainTables, FaultyStore, MemoryStore
from tests.simulation.support import METRICS, Log
from tests.support.sandbox import START, MovedClock, Person, SandboxTransport, Town, make_town

BASE: Final = "http://localhost"
CLOSE_SECONDS: Final = 5.0
CHANNELS: Final = tuple(keypair_of(f"channel {number}") for number in range(3))
SPONSOR: Final = keypair_of("sponsor")
OWNER: Final = keypair_of("vault owner")
WALLET_HAS: Final = 1_000_000_000
DEPOSITED: Final = 500_000_000
PAID: Final = 10_000_000
PAYMENTS: Final = 8
PATIENCE_SECONDS: Final = 3600.0
KINDS: Final[tuple[Kind, ...]] = ("delay", "drop", "status", "html", "rpc_error", "try_again_later", "lose")


@attrs.define
class TrioTime(MovedClock):
    """A clock that shows Trio's time."""

    def now(self) -> datetime:
        """Return the present instant."""
        self.seconds = START + trio.current_time()
        return super().now()

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.now().timestamp()


@attrs.frozen
class Sponsor:
    """Who pays for fee-bumps."""

    signer: Signer

    def bump(self, envelope: Envelope, bid: int) -> Envelope:
        """Return a signed fee-bump."""
        return bump(envelope, self.signer, bid)


@attrs.define(eq=False)
class Shore:
    """A sandbox, the clients on it, and one store that all processes share."""

    town: Town
    random: Random
    tables: ChainTables = attrs.field(factory=ChainTables)
    log: Log = attrs.field(factory=Log)
    faulty: float = 0.05
    """How often the store fails."""

    async def chain(self) -> Chain:
        """Return a process's way to the network: two nodes and the second witness."""
        transport = Transport(httpx.AsyncClient(transport=SandboxTransport(self.town.sandbox), timeout=None))
        told = SandboxFacts.at(BASE).settings()
        told["SOROBAN_RPC_URL"] = f"{BASE}/rpc,{BASE}/nodes/b/rpc"
        chain = make_chain(
            load_settings(told),
            transport,
            clock=self.town.clock,
            random=self.random,
            metrics=METRICS,
            log=self.log.logger(),
        )
        await chain.check()
        return chain

    def submitter(self, chain: Chain) -> Submitter:
        """Return a process's submitter."""
        signer = partial(Signer.from_seed, passphrase=chain.passphrase)
        store = FaultyStore(MemoryStore(self.tables), self.random, self.faulty)
        tools = Tools(
            network="testnet",
            chain=chain,
            store=cast(Store, store),
            sponsor=Sponsor(signer(SPONSOR.secret)),
            has_witness=True,
            bid_max=BID_MAX,
            clock=self.town.clock,
            metrics=METRICS,
            log=self.log.logger(),
        )
        return Submitter(
            tools,
            channels=[signer(each.secret) for each in CHANNELS],
            authorities=[signer(OWNER.secret)],
            bid_of=partial(inclusion_fee, passphrase=chain.passphrase),
            random=self.random,
            base_fee=100,
        )

    async def spoil(self) -> None:
        """Let requests go wrong, until cancelled."""
        random, plan = self.random, self.town.sandbox.plan
        stages: tuple[Stage, ...] = ("before", "after")
        while True:
            kind = random.choice(KINDS)
            submission = kind in ("try_again_later", "lose")
            methods = ("sendTransaction",) if submission else ("*", "sendTransaction", "getTransaction")
            plan.add(
                Fault(
                    kind,
                    method=random.choice(methods),
                    times=random.randint(1, 4),
                    skip=random.randint(0, 3),
                    stage="before" if submission else random.choice(stages),
                    seconds=random.choice((0.0, 0.0, 3.0)),
                    status=random.choice((429, 500, 502, 503, 504)),
                )
            )
            await trio.sleep(5 + 20 * random.random())


async def ask_until(submitter: Submitter, purpose: str, call: ContractCall, random: Random) -> Applied | ContractFault:
    """Ask for a purpose until somebody can tell."""
    while True:
        try:
            return await submitter.call(purpose, call)
        except CalloraFault:
            await trio.sleep(1 + 10 * random.random())


def wallet_of(town: Town) -> Person:
    """Return a wallet with test USDC."""
    wallet = town.someone("wallet")
    wallet.trust(town.usdc)
    town.applied(town.issuer.pay(wallet, str(WALLET_HAS // 10_000_000), town.usdc))
    return wallet


async def deposit(chain: Chain, wallet: Person) -> tuple[Envelope, int]:
    """Return a deposit as a wallet signs it, and the ledger it was prepared on."""
    while True:
        try:
            used = await chain.sequence_of(wallet.address)
            assert used is not None
            head = (await chain.retained()).latest
            max_time = int(head.closed_at.timestamp()) + 300
            call = chain.vault.deposit(wallet.address, DEPOSITED)
            draft = chain.build(call, source=wallet.address, sequence=used + 1, max_time=max_time, fee=100)
            prepared = await chain.prepare(draft)
        except CalloraFault:
            await trio.sleep(1)
            continue
        assert isinstance(prepared, Envelope), prepared
        return Signer.from_seed(wallet.keypair.secret, chain.passphrase).sign(prepared), head.sequence


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(2, 60))])
async def test_admission_deposit_and_payments_are_done_once_whatever_the_nodes_answer(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    random = Random(seed)
    funded = tuple(each.public_key for each in (*CHANNELS, SPONSOR))
    town = make_town(cast=Cast(owner=OWNER, funded=funded), clock=TrioTime())
    wallet = wallet_of(town)
    shore = Shore(town, random)
    chains = [await shore.chain() for _ in range(2)]
    submitters = [shore.submitter(chain) for chain in chains]
    vault = chains[0].vault
    outcomes: dict[str, list[Applied | ContractFault]] = {}

    async def ask(number: int, purpose: str, call: ContractCall) -> None:
        outcomes.setdefault(purpose, []).append(await ask_until(submitters[number], purpose, call, random))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(town.sandbox.ledger.run, CLOSE_SECONDS)
        nursery.start_soon(shore.spoil)
        for submitter in submitters:
            await nursery.start(submitter.run)
        with trio.fail_after(PATIENCE_SECONDS):
            admission = vault.set_allowed_depositor(wallet.address)
            async with trio.open_nursery() as asking:
                for number in range(2):
                    asking.start_soon(ask, number, "admit", admission)
            signed, prepared = await deposit(chains[0], wallet)
            while True:
                try:
                    passed = await submitters[0].pass_on("deposit", signed, prepared, sponsored=True)
                    while shore.tables.rows[passed].submission.state in OPEN:  # noqa: ASYNC110 - rows set no event
                        await trio.sleep(1)
                    break
                except CalloraFault:
                    await trio.sleep(1)
            async with trio.open_nursery() as asking:
                for number in range(PAYMENTS):
                    payment = vault.withdraw_to(wallet.address, PAID)
                    for process in range(2):
                        asking.start_soon(ask, process, f"pay:{number}", payment)
            while any(row.submission.state in OPEN for row in shore.tables.rows.values()):  # noqa: ASYNC110
                await trio.sleep(TIME_BOUND_SECONDS)
        nursery.cancel_scope.cancel()
    assert shore.tables.refusals == []
    assert "transaction_follower_crashed" not in shore.log.events
    assert len(outcomes) == PAYMENTS + 1
    for purpose, told in outcomes.items():
        assert len(told) == 2, purpose
        assert told[0] == told[1], purpose
        assert isinstance(told[0], Applied), purpose
        assert told[0].successful, purpose
    deposited = shore.tables.rows[passed].submission
    came = DEPOSITED if deposited.state == "succeeded" else 0
    assert wallet.has(town.usdc) == WALLET_HAS - came + PAYMENTS * PAID


async def test_a_payment_fits_at_once_though_others_were_admitted_since_it_was_simulated(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's entry, which every call writes, has grown meanwhile."""
    funded = tuple(each.public_key for each in CHANNELS)
    town = make_town(cast=Cast(owner=OWNER, funded=funded), clock=TrioTime())
    wallet = wallet_of(town)
    shore = Shore(town, Random(0), faulty=0.0)
    chain = await shore.chain()
    owner = Person(town, OWNER)
    prepare = chain.prepare

    async def admit(address: str) -> None:
        sequence, max_time = owner.sequence + 1, int(town.clock.timestamp()) + 300
        call = chain.vault.set_allowed_depositor(address)
        draft = chain.build(call, source=owner.address, sequence=sequence, max_time=max_time, fee=100)
        prepared = await prepare(draft)
        assert isinstance(prepared, Envelope)
        signed = Signer.from_seed(OWNER.secret, chain.passphrase).sign(prepared)
        town.applied(TransactionEnvelope.from_xdr(signed.xdr, chain.passphrase))

    async def prepare_in_a_crowd(envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        prepared = await prepare(envelope, leeway=leeway)
        for number in range(6):
            await admit(keypair_of(f"another {number}").public_key)
        return prepared

    await admit(wallet.address)
    paid_in, _ = await deposit(chain, wallet)
    town.applied(TransactionEnvelope.from_xdr(paid_in.xdr, chain.passphrase))
    monkeypatch.setattr(chain, "prepare", prepare_in_a_crowd)
    submitter = shore.submitter(chain)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(town.sandbox.ledger.run, CLOSE_SECONDS)
        await nursery.start(submitter.run)
        outcome = await submitter.call("pay", chain.vault.withdraw_to(wallet.address, PAID))
        nursery.cancel_scope.cancel()
    assert isinstance(outcome, Applied)
    assert outcome.successful
    assert [row.submission.state for row in shore.tables.rows.values()] == ["succeeded"], "one fee was paid"
