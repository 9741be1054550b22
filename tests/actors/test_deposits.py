"""Deposits at a process's own level: cut at any wait, prepared by many, and failed only when that is proved."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import cast

import attrs
import pytest
import trio
from stellar_sdk import Asset, CreateAccount, Keypair, Payment, TransactionEnvelope

from callora.actors.chain import Chain
from callora.actors.follower import Tools
from callora.actors.submitter import BID_MAX, Submitter
from callora.actors.treasury import Treasury, TreasurySettings, make_treasury
from callora.actors.treasury_answers import Expired, Prepared
from callora.chain_part import make_chain
from callora.config.loading import load_settings
from callora.ledger.chain import Envelope
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.sandbox import SandboxFacts
from callora.stellar.envelopes import Signer, bump, inclusion_fee, read
from callora.stellar.sandbox.genesis import Cast
from callora.stellar.sandbox.network import Sandbox
from callora.stellar.transport import open_transport
from callora.store.bridge import Database
from callora.store.deposits import Intent
from callora.store.transactions import TransactionStore
from tests.simulation.ledgers import TestClock, real_ledger
from tests.simulation.support import METRICS, QUIET, running
from tests.support.chain_service import OWNER
from tests.support.knife import Knife
from tests.support.sandbox import MovedClock, Person, Town, served
from tests.support.stream import Stream
from tests.support.treasury import Books

RESERVE = 5_000_000
"""Stroops of XLM that an account keeps for each of its entries."""
LEDGERS_MAX = 100
"""Ledgers that a test lets close until a deposit is in one."""


@attrs.frozen
class Bank:
    """A database, a network, and someone with a wallet that may deposit."""

    books: Books
    town: Town
    chain: Chain
    wallet: Keypair
    user_id: UserId
    vault_id: VaultId

    def sign(self, prepared: Prepared) -> str:
        """Return a prepared deposit, signed."""
        envelope = TransactionEnvelope.from_xdr(prepared.intent.envelope, self.town.passphrase)
        envelope.sign(self.wallet)
        return envelope.to_xdr()

    def close(self, seconds: float = 5) -> None:
        """Close a ledger, some time later."""
        self.town.clock.advance(seconds)
        self.town.sandbox.ledger.close()

    async def balance(self) -> int:
        """Return what the vault has."""
        return (await self.books.ledger.balance(self.vault_id))[0]

    async def intents(self) -> dict[str, str]:
        """Return the stage of every deposit prepared."""
        rows = await self.books.rows("SELECT encode(tx_hash, 'hex') AS hash, stage FROM deposit_intents")
        return {row["hash"]: row["stage"] for row in rows}


@pytest.fixture
async def bank(database: Database) -> AsyncIterator[Bank]:
    """A bank whose ledger the audit finds clean when the test ends, and whose contract has what it should."""
    clock = cast(MovedClock, TestClock())
    town = Town(Sandbox.make(clock, cast=Cast(owner=OWNER)), clock)
    wallet = Keypair.random()
    async with (
        real_ledger(database, cast(TestClock, clock)) as ledger,
        served(town) as url,
        open_transport() as transport,
    ):
        settings = load_settings({**SandboxFacts.at(url).settings(), "RETRY_BASE_DELAY_MS": "10"})
        chain = make_chain(settings, transport, clock=clock, random=Random(0), metrics=METRICS, log=QUIET)
        await chain.check()
        books = Books(ledger, Stream())
        friendbot = Person(town, town.sandbox.places.friendbot)
        town.applied(friendbot.transaction([CreateAccount(wallet.public_key, "10000")]))
        Person(town, wallet).trust(town.usdc)
        town.applied(town.issuer.transaction([Payment(wallet.public_key, town.usdc, "10000")]))
        await admit(chain, town, wallet.public_key)
        user_id, vault_id = await books.user(wallet.public_key)
        assert vault_id is not None
        yield Bank(books, town, chain, wallet, user_id, vault_id)
        assert await ledger.findings() == []


async def admit(chain: Chain, town: Town, address: str) -> None:
    """Have the contract's owner admit an address."""
    owner = Signer.from_seed(OWNER.secret, town.passphrase)
    sequence = await chain.sequence_of(owner.address)
    assert sequence is not None
    max_time = int(town.clock.timestamp()) + 1000
    call = chain.vault.set_allowed_depositor(address)
    built = chain.build(call, source=owner.address, sequence=sequence + 1, max_time=max_time, fee=100)
    prepared = await chain.prepare(built)
    assert isinstance(prepared, Envelope)
    signed = TransactionEnvelope.from_xdr(owner.sign(prepared).xdr, town.passphrase)
    town.applied(signed)


@asynccontextmanager
async def process(bank: Bank, sponsor: Person | None = None) -> AsyncIterator[Treasury]:
    """Run one process: its registry, its submitter, and a treasury that the test moves."""
    ledger, chain = bank.books.ledger, bank.chain
    tools = Tools(
        network="testnet",
        chain=chain,
        store=TransactionStore(ledger.database),
        sponsor=None,
        has_witness=False,
        bid_max=BID_MAX,
        clock=ledger.clock,
        metrics=METRICS,
        log=QUIET,
    )
    submitter = Submitter(
        tools,
        channels=(),
        authorities=(),
        bid_of=lambda envelope: inclusion_fee(envelope, chain.passphrase),
        random=Random(0),
        base_fee=100,
    )
    settings = TreasurySettings(
        listen_seconds=0.01,
        compare_seconds=60,
        drift_max=0,
        deposit_seconds=300,
        bid=100,
        owner_signs=False,
        sponsor=None if sponsor is None else Signer.from_seed(sponsor.keypair.secret, bank.town.passphrase),
    )
    async with running(ledger.store) as at, trio.open_nursery() as nursery:
        await nursery.start(submitter.run)
        yield make_treasury(
            chain,
            submitter,
            ledger.database,
            at.registry,
            settings,
            clock=ledger.clock,
            ids=ledger.ids,
            metrics=METRICS,
            log=QUIET,
        )
        nursery.cancel_scope.cancel()


async def follow(treasury: Treasury) -> None:
    """Note and book whatever the network shows."""
    while await treasury.listener.look() in ("more", "moved", "lost"):
        pass
    await treasury.booking.book_all("testnet")


async def prepared(bank: Bank, treasury: Treasury, amount: int) -> Prepared:
    made = await treasury.deposits.prepare(bank.user_id, Stroops(amount), None)
    assert isinstance(made, Prepared), made
    return made


async def arrives(bank: Bank, treasury: Treasury, tx_hash: str) -> None:
    """Let ledgers close until a deposit is confirmed."""
    for _ in range(LEDGERS_MAX):
        bank.close(1)
        await follow(treasury)
        if (await bank.intents())[tx_hash] == "confirmed":
            return
        await trio.sleep(0.01)  # its follower sends it on the machine's clock
    raise AssertionError("it never arrived")


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.proof)])
async def test_a_deposit_cut_at_any_wait_ends_once_after_a_restart(bank: Bank, stride: int) -> None:
    """Prepare, submit and credit are cut as by a kill; the user then submits what he signed again, or prepares anew."""
    cut_at, deposits = 1, 0
    async with process(bank) as treasury:
        await follow(treasury)
    while True:
        knife = Knife(cut_at)
        made: Prepared | None = None
        async with process(bank) as treasury:
            with knife as scope, scope:
                made = await prepared(bank, treasury, 10)
                assert isinstance(await treasury.deposits.submit(bank.user_id, bank.sign(made)), Intent)
                bank.close(1)
                await follow(treasury)
        async with process(bank) as treasury:
            if made is None:
                made = await prepared(bank, treasury, 10)
            again = await treasury.deposits.submit(bank.user_id, bank.sign(made))
            assert isinstance(again, Intent), again
            await arrives(bank, treasury, made.intent.tx_hash)
            compared = await treasury.reconciliation.compare()
            assert compared is not None
            assert compared.drift == 0
        deposits += 1
        assert await bank.balance() == 10 * deposits
        assert await bank.books.ledger.count("chain_transactions") == deposits
        assert await bank.books.ledger.count("chain_events", "kind = 'deposit'") == deposits
        await bank.books.database.execute(
            "UPDATE deposit_intents SET stage = 'failed', failure = 'left by a cut' WHERE stage = 'approving'"
        )
        if not knife.cut:
            break
        cut_at += stride
    assert cut_at > 50, "it was cut where it waits"


async def test_a_prepared_deposit_fails_only_when_no_ledger_can_hold_it_any_more(bank: Bank) -> None:
    async with process(bank) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        bank.town.clock.advance(299)
        await treasury.deposits.look()
        assert set((await bank.intents()).values()) == {"approving"}
        bank.town.clock.advance(60)
        assert isinstance(await treasury.deposits.submit(bank.user_id, bank.sign(made)), Expired)
        await treasury.deposits.look()
        assert set((await bank.intents()).values()) == {"approving"}, "no ledger has closed after its time bound"
        bank.close()
        await treasury.deposits.look()
        assert set((await bank.intents()).values()) == {"failed"}


async def test_a_node_that_forgot_the_past_proves_nothing(bank: Bank) -> None:
    async with process(bank) as treasury:
        await follow(treasury)
        await prepared(bank, treasury, 10)
        for _ in range(10):
            bank.close(60)
        bank.town.sandbox.ledger.trim(2)
        await treasury.deposits.look()
        assert set((await bank.intents()).values()) == {"approving"}


async def test_a_deposit_that_the_wallet_sent_by_itself_is_confirmed(bank: Bank) -> None:
    async with process(bank) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        assert bank.town.submit(bank.sign(made)).status == "PENDING"
        bank.close()
        await follow(treasury)
        assert set((await bank.intents()).values()) == {"confirmed"}
        assert await bank.balance() == 10


async def test_a_deposit_that_fails_on_chain_is_told_with_its_reason(bank: Bank) -> None:
    async with process(bank) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        # The wallet spends what it wanted to deposit, in the same ledger or before.
        person = Person(bank.town, bank.wallet)
        balance = person.has(bank.town.usdc)
        assert balance is not None
        signed = bank.sign(made)
        assert bank.town.submit(signed).status == "PENDING"
        bank.town.sandbox.ledger.lose_waiting()
        amount = f"{balance // 10**7}.{balance % 10**7:07d}"
        bank.town.applied(person.transaction([Payment(bank.town.issuer.address, bank.town.usdc, amount)]))
        bank.town.clock.advance(400)
        bank.close()
        await treasury.deposits.look()
        (row,) = await bank.books.rows("SELECT stage, failure FROM deposit_intents")
        assert row == {"stage": "failed", "failure": "expired"}, "its sequence number went to another transaction"


async def test_many_who_submit_the_same_signed_deposit_send_it_once(bank: Bank) -> None:
    async with process(bank) as one, process(bank) as other:
        await follow(one)
        made = await prepared(bank, one, 10)
        answers: list[object] = []

        async def submit(treasury: Treasury) -> None:
            answers.append(await treasury.deposits.submit(bank.user_id, bank.sign(made)))

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(submit, (one, other)[number % 2])
        assert {type(each) for each in answers} == {Intent}
        await arrives(bank, one, made.intent.tx_hash)
        await follow(other)
    assert await bank.balance() == 10
    assert await bank.books.ledger.count("chain_transactions") == 1


async def test_a_deposit_still_fits_when_others_were_admitted_before_it_was_signed(bank: Bank) -> None:
    """The contract's entry has grown since the deposit was simulated."""
    async with process(bank) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        for _ in range(8):
            await admit(bank.chain, bank.town, Keypair.random().public_key)
        assert isinstance(await treasury.deposits.submit(bank.user_id, bank.sign(made)), Intent)
        await arrives(bank, treasury, made.intent.tx_hash)
    assert await bank.balance() == 10


# --- who pays the fee -------------------------------------------------------------------------------------------------


def drain(person: Person) -> None:
    """Take so much XLM from somebody that he cannot pay the fee of a contract call."""
    town, entry = person.town, person.entry
    spent = entry.balance.int64 - (2 + entry.num_sub_entries.uint32) * RESERVE - 200
    friendbot = town.sandbox.places.friendbot.public_key
    town.applied(person.transaction([Payment(friendbot, Asset.native(), f"{spent // 10**7}.{spent % 10**7:07d}")]))


async def test_a_deposit_arrives_though_its_sponsor_is_out_of_xlm(bank: Bank) -> None:
    sponsor, wallet = bank.town.someone("sponsor", xlm=2), Person(bank.town, bank.wallet)
    drain(sponsor)
    before = wallet.xlm
    async with process(bank, sponsor) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        assert isinstance(await treasury.deposits.submit(bank.user_id, bank.sign(made)), Intent)
        await arrives(bank, treasury, made.intent.tx_hash)
    assert await bank.balance() == 10
    assert wallet.xlm < before, "the wallet paid"


async def test_a_deposit_that_neither_sponsor_nor_wallet_can_pay_fails_and_says_so(bank: Bank) -> None:
    sponsor, wallet = bank.town.someone("sponsor", xlm=2), Person(bank.town, bank.wallet)
    drain(sponsor)
    drain(wallet)
    async with process(bank, sponsor) as treasury:
        await follow(treasury)
        made = await prepared(bank, treasury, 10)
        assert isinstance(await treasury.deposits.submit(bank.user_id, bank.sign(made)), Intent)
        (hash_,) = await bank.intents()
        with trio.fail_after(60):
            while (await bank.intents())[hash_] == "pending":
                bank.close(10)
                await treasury.deposits.look()
                await trio.sleep(0.05)  # its follower sends it on the machine's clock
        (row,) = await bank.books.rows("SELECT stage, failure FROM deposit_intents")
    assert row == {"stage": "failed", "failure": "expired: the wallet has too little XLM for the network's fee"}
    assert await bank.balance() == 0


@pytest.mark.parametrize("proved", [True, False])
async def test_a_deposit_in_a_strangers_fee_bump_is_whose_it_was_prepared_for(bank: Bank, *, proved: bool) -> None:
    """Its event goes by the fee-bump's hash, which nobody here has seen."""
    stranger = Signer.from_seed(bank.town.someone("stranger").keypair.secret, bank.town.passphrase)
    if not proved:
        await bank.books.database.execute("UPDATE users SET wallet_address = NULL")
    async with process(bank) as treasury:
        await follow(treasury)
        made = await treasury.deposits.prepare(bank.user_id, Stroops(10), bank.wallet.public_key)
        assert isinstance(made, Prepared), made
        signed = read(bank.sign(made), bank.town.passphrase)
        assert isinstance(signed, Envelope)
        assert bank.town.submit(bump(signed, stranger, 200).xdr).status == "PENDING"
        bank.close()
        await follow(treasury)
        await treasury.deposits.look()
        assert set((await bank.intents()).values()) == {"confirmed"}
        assert await bank.balance() == 10
        assert await bank.books.ledger.count("chain_events", "state = 'suspense'") == 0
        compared = await treasury.reconciliation.compare()
        assert compared is not None
        assert compared.drift == 0
