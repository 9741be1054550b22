"""Developers who earn, a sandbox they are paid on, and processes that settle: on a real database, in a time that passes
only while nobody works.
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import Any, Final

import attrs
import httpx
import trio
from stellar_sdk import CreateAccount, scval, xdr

from callora.actors.chain import Chain
from callora.actors.follower import Tools
from callora.actors.revenue import RevenueIndexer
from callora.actors.settlement import Settlements, SettlementSettings
from callora.actors.submitter import BID_MAX, Submitter
from callora.chain_part import make_chain
from callora.config.loading import load_settings
from callora.ledger.ids import DeveloperId, Ids
from callora.ledger.money import Stroops
from callora.sandbox import SandboxFacts
from callora.stellar.contracts import ContractCall, question
from callora.stellar.envelopes import Signer, inclusion_fee
from callora.stellar.sandbox.genesis import Cast, SandboxGenesis, keypair_of
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.simulation import Simulation, Simulator
from callora.stellar.sandbox.state import Undecodable
from callora.stellar.sandbox.transactions import decode
from callora.stellar.settlement import SettlementContract
from callora.stellar.transport import Transport
from callora.store import accounts, usage
from callora.store.audit import audit
from callora.store.bridge import Database
from callora.store.chain import add_network
from callora.store.transactions import TransactionStore
from tests.simulation.support import METRICS, Log
from tests.support.contracts import invoke
from tests.support.sandbox import START, MovedClock, Person, SandboxTransport, Town, make_town

BASE: Final = "http://localhost"
CLOSE_SECONDS: Final = 5.0
CHANNELS: Final = tuple(keypair_of(f"channel {number}") for number in range(3))
CHARGER: Final = keypair_of("charger")
CREDITER: Final = keypair_of("settlement admin")
PLATFORM: Final = keypair_of("platform")
ABLE: Final = tuple(keypair_of(f"developer {number}") for number in range(110))
"""Who can hold USDC from the start."""
OPENING: Final = 100_000_000 * 10_000_000
"""What the vault contract has from the start, stroops."""
SIMULATOR: Final = Simulator(Limits(), "tests")
MANY: Final = Stroops(10**15)


@attrs.define
class TrioTime(MovedClock):
    """A clock that shows Trio's time."""

    def now(self) -> datetime:
        """Return the present instant."""
        self.seconds = START + trio.current_time()
        return datetime.fromtimestamp(self.seconds, UTC)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.now().timestamp()


@attrs.frozen
class Process:
    """One process that settles."""

    settlements: Settlements
    submitter: Submitter
    chain: Chain
    indexer: RevenueIndexer


@attrs.define(eq=False)
class Payroll:
    """A sandbox, a database, and who earns."""

    town: Town
    database: Database
    random: Random
    log: Log = attrs.field(factory=Log)
    vault_id: str = ""
    wallets: dict[DeveloperId, Person] = attrs.field(factory=dict)
    ids: Ids = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.ids = Ids(self.town.clock, os.urandom)

    # Who earns

    async def developer(self, *, wallet: bool = True, account: bool = True, trusts: bool = True) -> DeveloperId:
        """Return a new developer.

        Args:
            wallet: whether he has proved one.
            account: whether that is an account.
            trusts: whether it can hold USDC.
        """
        number = len(self.wallets)
        now, user_id, developer_id = self.town.clock.now(), self.ids.uuid7(), DeveloperId(self.ids.uuid7())
        able = account and trusts and number < len(ABLE)
        person = Person(self.town, ABLE[number] if able else keypair_of(f"stranger {number}"))
        self.wallets[developer_id] = person
        if account and not able:
            friendbot = Person(self.town, self.town.sandbox.places.friendbot)
            self.town.applied(friendbot.transaction([CreateAccount(person.address, "100")]))
            if trusts:
                person.trust(self.town.usdc)
        await self.database.execute(
            "INSERT INTO users (user_id, name, wallet_address, created_at) VALUES ($1, 'Developer', $2, $3)",
            user_id,
            person.address if wallet else None,
            now,
        )
        await self.database.execute(
            "INSERT INTO developers (developer_id, user_id, name, created_at) VALUES ($1, $2, $3, $4)",
            developer_id,
            user_id,
            f"Developer {number}",
            now,
        )
        return developer_id

    async def earn(self, earned: Mapping[DeveloperId, int], calls: int = 1) -> None:
        """Let calls be paid for, as the ledger's rounds leave them.

        Args:
            earned: what each call of a developer's costs, stroops.
        """
        now = self.town.clock.now()
        developers = [each for each in earned for _ in range(calls)]
        await self.database.execute(
            "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
            " created_at, expires_at, price_version, state, amount, closed_at, status, outcome)"
            " SELECT $1, e.event_id, $1, e.developer_id, 1, 1, e.amount, $2, $2::timestamptz + interval '1 minute', 1,"
            " 'captured', e.amount, $2, 200, 'delivered'"
            " FROM unnest($3::uuid[], $4::uuid[], $5::bigint[]) AS e (event_id, developer_id, amount)",
            self.vault_id,
            now,
            [self.ids.uuid7() for _ in developers],
            developers,
            [earned[each] for each in developers],
        )
        await self.database.execute(
            "UPDATE vaults SET available = available - $2 WHERE vault_id = $1",
            self.vault_id,
            calls * sum(earned.values()),
        )

    async def as_owner(self, function: str, *arguments: xdr.SCVal) -> None:
        """Have the vault contract's owner do something, in a ledger of its own."""
        await trio.lowlevel.checkpoint()
        ledger, places = self.town.sandbox.ledger, self.town.sandbox.places
        call = invoke(places.vault_contract, function, *arguments)
        SandboxGenesis(ledger.rules, Cast(), SIMULATOR)._submit(ledger, places.friendbot, Cast().owner, call)
        ledger.close()

    async def pause(self, function: str = "pause") -> None:
        """Have the vault contract paused; `unpause` lets it go on."""
        await self.as_owner(function, scval.to_address(Cast().owner.public_key))

    # Who pays

    @asynccontextmanager
    async def process(self, **changes: Any) -> AsyncIterator[Process]:
        """Run a process's submitter, and give what settles; it runs only where a test runs it.

        Args:
            changes: of the settings of settlement.
        """
        chain = await self.chain()
        submitter = self._submitter(chain)
        settings = SettlementSettings(
            charger=CHARGER.public_key,
            crediter=CREDITER.public_key,
            charging_cap=MANY,
            crediting_cap=MANY,
            payout_min=Stroops(1),
            platform=PLATFORM.public_key,
            interval_seconds=600.0,
            sync_seconds=60.0,
            sync_timeout_seconds=60.0,
        )
        indexer = RevenueIndexer(
            self.database,
            self.town.clock,
            METRICS,
            self.log.logger(),
            network="testnet",
            fee_bps=changes.pop("fee_bps", 0),
            interval_seconds=30.0,
        )
        settlements = Settlements(
            chain,
            submitter,
            indexer,
            self.database,
            attrs.evolve(settings, **changes),
            clock=self.town.clock,
            ids=self.ids,
            metrics=METRICS,
            log=self.log.logger(),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(submitter.run)
            yield Process(settlements, submitter, chain, indexer)
            nursery.cancel_scope.cancel()

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

    def _submitter(self, chain: Chain) -> Submitter:
        signer = partial(Signer.from_seed, passphrase=chain.passphrase)
        tools = Tools(
            network="testnet",
            chain=chain,
            store=TransactionStore(self.database),
            sponsor=None,
            has_witness=True,
            bid_max=BID_MAX,
            clock=self.town.clock,
            metrics=METRICS,
            log=self.log.logger(),
        )
        return Submitter(
            tools,
            channels=[signer(each.secret) for each in CHANNELS],
            authorities=[signer(each.secret) for each in (CHARGER, CREDITER)],
            bid_of=partial(inclusion_fee, passphrase=chain.passphrase),
            random=self.random,
            base_fee=100,
        )

    # Who audits

    async def all_ended(self) -> bool:
        """Tell whether no settlement is under way."""
        return not await self.database.fetch_value(
            "SELECT count(*) FROM settlements WHERE state NOT IN ('completed', 'failed')"
        )

    async def states(self) -> list[str]:
        """Return the state of every settlement, the oldest first."""
        rows = await self.database.fetch("SELECT state FROM settlements ORDER BY opened_at, settlement_id")
        return [row["state"] for row in rows]

    def on_chain(self, address: str) -> int:
        """Return what the settlement contract owes somebody, as the ledger itself has it."""
        places = self.town.sandbox.places
        contract = SettlementContract(places.settlement_contract, CREDITER.public_key, places.vault_contract)
        return int(self._told(contract.developer_balance(address).call))

    def vault_has(self, chain: Chain) -> int:
        """Return what the vault contract has, as the ledger itself has it."""
        return int(self._told(chain.vault.balance().call))

    def _told(self, call: ContractCall) -> int:
        ledger = self.town.sandbox.ledger
        asked = decode(question(call, self.town.passphrase).xdr, ledger.network_id)
        assert not isinstance(asked, Undecodable)
        simulated = SIMULATOR.simulate(ledger.state, ledger.context(), asked)
        assert isinstance(simulated, Simulation), simulated
        assert simulated.value is not None
        return scval.from_int128(simulated.value)

    async def paid(self) -> dict[DeveloperId, int]:
        """Return what every developer was credited on chain."""
        await trio.lowlevel.checkpoint()
        return {developer: self.on_chain(person.address) for developer, person in self.wallets.items()}

    async def earned(self) -> dict[DeveloperId, int]:
        """Return what every developer has earned, by the calls themselves."""
        rows = await self.database.fetch(
            "SELECT developer_id, sum(amount)::bigint AS amount FROM usage_events WHERE state = 'captured' GROUP BY 1"
        )
        found = {DeveloperId(str(row["developer_id"])): row["amount"] for row in rows}
        return {developer: found.get(developer, 0) for developer in self.wallets}

    async def findings(self) -> list[str]:
        """Return the rules that the audit finds broken, but for those of the ledger's own entries."""
        found = await audit(self.database, self.town.clock.now())
        return [each.rule for each in found if each.wrong]


def payroll_town(clock: MovedClock) -> Town:
    """Return a sandbox whose vault is charged and whose developers are credited by keys of their own."""
    able = tuple(each.public_key for each in ABLE)
    cast = Cast(
        settlement_admin=CREDITER,
        authorized_caller=CHARGER.public_key,
        funded=(*(each.public_key for each in (*CHANNELS, CHARGER, PLATFORM)), *able),
        trusting=able,
        opening=OPENING,
    )
    return make_town(cast=cast, clock=clock)


@asynccontextmanager
async def payroll(
    database: Database, random: Random | None = None, clock: MovedClock | None = None
) -> AsyncIterator[Payroll]:
    """Open a payroll whose caller is rich, and whose ledgers the test closes."""
    town = payroll_town(clock or TrioTime())
    made = Payroll(town, database, random or Random(1))
    now = town.clock.now()
    await usage.ensure_partitions(database, now)
    await add_network(database, "testnet", town.passphrase, town.sandbox.places.vault_contract, now)
    user_id, made.vault_id = made.ids.uuid7(), made.ids.uuid7()
    await accounts.add_user(database, user_id, "Caller", now)  # type: ignore[arg-type]
    await database.execute(
        "INSERT INTO vaults (vault_id, user_id, network, plan_id, available, version, entry_seq, created_at)"
        " VALUES ($1, $2, 'testnet', 'free', $3, 1, 1, $4)",
        made.vault_id,
        user_id,
        OPENING,
        now,
    )
    await database.execute(
        "INSERT INTO ledger_entries (vault_id, seq, kind, amount, balance_after, ref, created_at)"
        " VALUES ($1, 1, 'deposit', $2, $2, 'first', $3)",
        made.vault_id,
        OPENING,
        now,
    )
    yield made
