"""The clients against the sandbox: a ledger's own answers, on real sockets, to every question Callora asks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import pytest
from stellar_sdk import scval

from callora.ledger.chain import Applied, ContractFault, Envelope, EventPage, NotSeen, OutsideRange, Simulated
from callora.ledger.faults import ChainMismatch
from callora.stellar.contracts import ContractCall, VaultContract, build, question, read_transfer, recognise
from callora.stellar.envelopes import Signer, bump
from callora.stellar.horizon import HorizonNode
from callora.stellar.rpc import RpcNode
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.transport import open_transport
from tests.support.sandbox import MovedClock, Person, Town, make_town, served

CHANNEL: Final = keypair_of("channel")


@attrs.frozen
class Beach:
    """A sandbox that is served, and our side of it."""

    town: Town
    rpc: RpcNode
    other: RpcNode
    horizon: HorizonNode
    vault: VaultContract

    @property
    def passphrase(self) -> str:
        """The network's."""
        return self.town.passphrase

    def signer(self, person: Person) -> Signer:
        """Return his key as Callora signs with it."""
        return Signer.from_seed(person.keypair.secret, self.passphrase)

    async def prepared(self, call: ContractCall, source: str, fee: int = 100) -> Envelope | ContractFault:
        """Return a call as it is handed out to be signed."""
        used = await self.rpc.sequence_of(source)
        assert used is not None
        max_time = int(self.town.clock.seconds) + 300
        built = build(call, source=source, sequence=used + 1, max_time=max_time, fee=fee, passphrase=self.passphrase)
        return await self.rpc.prepare(built)

    async def apply(self, call: ContractCall, source: Person, *others: Person) -> Applied:
        """Prepare, sign, send and close; return what became of it."""
        envelope = await self.prepared(call, source.address)
        assert isinstance(envelope, Envelope), envelope
        for person in (source, *others):
            envelope = self.signer(person).sign(envelope)
        assert (await self.rpc.send(envelope)).status == "pending"
        self.close()
        told = await self.rpc.transaction(envelope.hash)
        assert isinstance(told, Applied)
        return told

    def close(self) -> None:
        """Close a ledger, five seconds later."""
        self.town.clock.advance(5)
        self.town.sandbox.ledger.close()


@asynccontextmanager
async def beach() -> AsyncIterator[Beach]:
    """Serve a sandbox for the length of the block."""
    town = make_town(cast=Cast(funded=(CHANNEL.public_key,)), clock=MovedClock())
    async with served(town) as url, open_transport() as transport:
        rpc = RpcNode(f"{url}/rpc", town.passphrase, transport)

        async def ask(call: ContractCall) -> Simulated | ContractFault:
            return await rpc.simulate(question(call, town.passphrase))

        vault = await recognise(town.sandbox.places.vault_contract, ask)
        other = RpcNode(f"{url}/nodes/b/rpc", town.passphrase, transport)
        yield Beach(town, rpc, other, HorizonNode(url, transport), vault)


@pytest.fixture
async def at() -> AsyncIterator[Beach]:
    """A sandbox with our side of it."""
    async with beach() as found:
        yield found


def owner(at: Beach) -> Person:
    """Return the vault contract's owner."""
    return Person(at.town, keypair_of("vault owner"))


def rich(at: Beach, name: str, amount: str = "100") -> Person:
    """Return someone with USDC."""
    person = at.town.someone(name)
    person.trust(at.town.usdc)
    at.town.applied(at.town.issuer.pay(person, amount, at.town.usdc))
    return person


async def test_the_vault_contract_is_recognised(at: Beach) -> None:
    places = at.town.sandbox.places
    assert (at.vault.generation, at.vault.owner) == ("g1", owner(at).address)
    assert (at.vault.usdc, at.vault.settlement) == (places.usdc_contract, places.settlement_contract)
    assert (await at.rpc.network()).passphrase == at.passphrase
    assert (await at.horizon.root())[0] == at.passphrase

    async def ask(call: ContractCall) -> Simulated | ContractFault:
        return await at.rpc.simulate(question(call, at.passphrase))

    with pytest.raises(ChainMismatch, match="no vault that Callora knows"):
        await recognise(places.usdc_contract, ask)


async def test_a_deposit_from_admission_to_its_event(at: Beach) -> None:
    alice = rich(at, "alice")
    channel = Person(at.town, CHANNEL)
    answered = await at.rpc.simulate(question(at.vault.is_allowed(alice.address).call, at.passphrase))
    assert isinstance(answered, Simulated)
    assert at.vault.is_allowed(alice.address).answer(answered) is False
    refused = await at.prepared(at.vault.deposit(alice.address, 250_000_000), alice.address)
    assert isinstance(refused, ContractFault)
    assert at.vault.error_name(refused) == "Unauthorized"
    admitted = await at.apply(at.vault.set_allowed_depositor(alice.address), channel, owner(at))
    assert (admitted.successful, admitted.result_code) == (True, "tx_success")

    assert (await at.rpc.wallet(alice.address, at.vault.usdc)).usdc == 1_000_000_000
    start = (await at.rpc.retained()).latest.sequence
    done = await at.apply(at.vault.deposit(alice.address, 250_000_000), alice)
    assert done.successful
    assert done.return_value == scval.to_int128(250_000_000).to_xdr()
    assert (await at.rpc.wallet(alice.address, at.vault.usdc)).usdc == 750_000_000
    assert (await at.rpc.wallet(at.vault.contract_id, at.vault.usdc)).usdc == 250_000_000

    page = await at.rpc.events(at.vault.contract_id, cursor=None, start_ledger=start, limit=10)
    assert isinstance(page, EventPage)
    moved = [found for each in page.events if (found := at.vault.read_event(each)) is not None]
    (deposit,) = moved
    assert (deposit.kind, deposit.address) == ("deposit", alice.address)
    assert (deposit.amount, deposit.balance_after) == (250_000_000, 250_000_000)
    assert deposit.ledger == done.ledger
    again = await at.rpc.events(at.vault.contract_id, cursor=page.cursor, start_ledger=None, limit=10)
    assert isinstance(again, EventPage)
    assert again.events == ()
    transfers = await at.rpc.events(at.vault.usdc, cursor=None, start_ledger=start, limit=10)
    assert isinstance(transfers, EventPage)
    paid = list(map(read_transfer, transfers.events))
    assert [(each.sender, each.receiver, each.amount) for each in paid if each is not None] == [
        (alice.address, at.vault.contract_id, 250_000_000)
    ]

    told = await at.horizon.transaction(deposit.tx_hash)
    assert told is not None
    assert (told.successful, told.ledger, told.return_value) == (True, done.ledger, done.return_value)

    out = await at.apply(at.vault.withdraw_to(alice.address, 50_000_000), channel, owner(at))
    assert out.successful
    assert (await at.rpc.wallet(alice.address, at.vault.usdc)).usdc == 800_000_000


async def test_what_the_token_refuses_is_named_as_the_tokens(at: Beach) -> None:
    poor, stranger = rich(at, "poor", "1"), at.town.someone("stranger")
    channel = Person(at.town, CHANNEL)
    for person in (poor, stranger):
        await at.apply(at.vault.set_allowed_depositor(person.address), channel, owner(at))
    refused = await at.prepared(at.vault.deposit(poor.address, 20_000_000), poor.address)
    assert isinstance(refused, ContractFault)
    assert at.vault.error_name(refused) == "Token.BalanceError"
    missing = await at.prepared(at.vault.deposit(stranger.address, 20_000_000), stranger.address)
    assert isinstance(missing, ContractFault)
    assert at.vault.error_name(missing) == "Token.TrustlineMissing"
    assert (await at.rpc.wallet(stranger.address, at.vault.usdc)).usdc is None


async def test_a_call_that_fails_in_its_ledger_says_by_which_rule(at: Beach) -> None:
    alice = rich(at, "alice", "1")
    channel = Person(at.town, CHANNEL)
    await at.apply(at.vault.set_allowed_depositor(alice.address), channel, owner(at))
    envelope = await at.prepared(at.vault.deposit(alice.address, 10_000_000), alice.address)
    assert isinstance(envelope, Envelope)
    signed = at.signer(alice).sign(envelope)
    bob = rich(at, "bob", "0.0000001")
    at.town.submit(alice.pay(bob, "0.5", at.town.usdc))  # uses the number that the deposit was to have
    at.close()
    assert (await at.rpc.send(signed)).result_code == "tx_bad_seq"
    envelope = await at.prepared(at.vault.deposit(alice.address, 5_000_000), alice.address)
    assert isinstance(envelope, Envelope)
    pause = ContractCall(
        owner(at).address, at.vault.contract_id, "pause", (scval.to_address(owner(at).address).to_xdr(),)
    )
    paused = await at.apply(pause, channel, owner(at))
    assert paused.successful
    assert (await at.rpc.send(at.signer(alice).sign(envelope))).status == "pending"
    at.close()
    told = await at.rpc.transaction(envelope.hash)
    assert isinstance(told, Applied)
    assert (told.successful, told.result_code, told.operation_code) == (False, "tx_failed", "trapped")
    assert told.fault is not None
    assert at.vault.error_name(told.fault) == "Paused"


async def test_a_fee_bump_is_found_by_both_hashes(at: Beach) -> None:
    alice = rich(at, "alice")
    channel = Person(at.town, CHANNEL)
    await at.apply(at.vault.set_allowed_depositor(alice.address), channel, owner(at))
    envelope = await at.prepared(at.vault.deposit(alice.address, 10_000_000), alice.address)
    assert isinstance(envelope, Envelope)
    before = alice.xlm
    outer = bump(at.signer(alice).sign(envelope), at.signer(channel), 200)
    assert (await at.rpc.send(outer)).status == "pending"
    assert (await at.rpc.send(outer)).status == "duplicate"
    at.close()
    for tx_hash in (outer.hash, envelope.hash):
        told = await at.rpc.transaction(tx_hash)
        assert isinstance(told, Applied)
        assert told.successful
        assert told.result_code == "tx_fee_bump_inner_success"
    assert alice.xlm == before, "the channel paid"


async def test_every_refusal_of_a_send_has_its_code(at: Beach) -> None:
    alice = rich(at, "alice")
    channel = Person(at.town, CHANNEL)
    await at.apply(at.vault.set_allowed_depositor(alice.address), channel, owner(at))
    envelope = await at.prepared(at.vault.deposit(alice.address, 10_000_000), alice.address)
    assert isinstance(envelope, Envelope)
    assert (await at.rpc.send(envelope)).result_code == "tx_bad_auth"
    built = build(
        at.vault.deposit(alice.address, 1),
        source=alice.address,
        sequence=alice.sequence + 1,
        max_time=envelope.max_time,
        fee=100,
        passphrase=at.passphrase,
    )
    assert (await at.rpc.send(at.signer(alice).sign(built))).status == "refused", "it was not prepared"
    at.town.clock.advance(400)
    at.town.sandbox.ledger.close()
    late = await at.rpc.send(at.signer(alice).sign(envelope))
    assert (late.status, late.result_code) == ("refused", "tx_too_late")
    told = await at.rpc.transaction(envelope.hash)
    assert isinstance(told, NotSeen)
    assert told.proves_dead(envelope.max_time, told.retained.oldest)
    assert not told.proves_dead(envelope.max_time + 10_000, told.retained.oldest)


async def test_a_place_past_the_head_is_outside_the_range(at: Beach) -> None:
    head = (await at.rpc.retained()).latest.sequence
    told = await at.rpc.events(at.vault.contract_id, cursor=None, start_ledger=head + 1, limit=1)
    assert isinstance(told, OutsideRange)
    assert told.latest == head


async def test_horizon_takes_a_transaction_too(at: Beach) -> None:
    alice = rich(at, "alice")
    assert await at.horizon.sequence_of(alice.address) == alice.sequence
    assert await at.horizon.sequence_of(keypair_of("nobody").public_key) is None
    channel = Person(at.town, CHANNEL)
    envelope = await at.prepared(at.vault.set_allowed_depositor(alice.address), channel.address)
    assert isinstance(envelope, Envelope)
    unsigned = await at.horizon.submit(envelope)
    assert (unsigned.status, unsigned.result_code) == ("refused", "tx_bad_auth")
    signed = at.signer(owner(at)).sign(at.signer(channel).sign(envelope))
    assert (await at.horizon.submit(signed)).status == "pending"
    assert (await at.horizon.submit(signed)).status == "duplicate"
    at.close()
    told = await at.horizon.transaction(signed.hash)
    assert told is not None
    assert told.successful


async def test_bids_are_told(at: Beach) -> None:
    assert (await at.rpc.fee_stats()).max >= 0
    await at.rpc.healthy()
    await at.horizon.healthy()
