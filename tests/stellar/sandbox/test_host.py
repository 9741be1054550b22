"""The host itself, with a contract of the tests' own: consent below the first call, re-entry, bounds of a call."""

import hashlib

import pytest
from stellar_sdk import InvokeHostFunction, Keypair, scval, xdr
from stellar_sdk.auth import authorize_entry

from callora.stellar.sandbox.soroban import contracts
from callora.stellar.sandbox.soroban.host import Contract, function
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.simulation import Simulation, SimulationFailed
from callora.stellar.sandbox.soroban.values import ADDRESS, I128, SYMBOL, U32, VOID, slot, symbol
from tests.support.contracts import STROOPS, World, address, i128, invoke


class Forwarder(Contract):
    """Calls others."""

    @function(ADDRESS, ADDRESS, ADDRESS, I128)
    def forward(self, token: str, source: str, to: str, amount: int) -> None:
        """Move somebody else's tokens, without asking for consent itself."""
        self.call(token, "transfer", [ADDRESS.encode(source), ADDRESS.encode(to), I128.encode(amount)], VOID)

    @function(ADDRESS, ADDRESS, ADDRESS, I128)
    def forward_twice(self, token: str, source: str, to: str, amount: int) -> None:
        """Move them in two equal transfers."""
        self.forward(token, source, to, amount)
        self.forward(token, source, to, amount)

    @function(ADDRESS)
    def ask_twice(self, who: str) -> None:
        """Ask for the same consent twice."""
        self.require_auth(who)
        self.require_auth(who)

    @function(ADDRESS)
    def call_me(self, other: str) -> None:
        """Have another contract call this one."""
        self.call(other, "call_me", [ADDRESS.encode(self.address)], VOID)

    @function(SYMBOL, U32, U32)
    def keep(self, name: str, number: int, extend_to: int) -> None:
        """Keep a number for a while."""
        place = slot("Number", U32, SYMBOL.encode(name))
        self.temporary.set(place, number)
        self.temporary.extend_ttl(place, extend_to, extend_to)

    @function(SYMBOL, returns=U32)
    def kept(self, name: str) -> int:
        """Return it; 0 for none."""
        return self.temporary.get(slot("Number", U32, SYMBOL.encode(name))) or 0

    @function(U32)
    def shout(self, times: int) -> None:
        """Publish events."""
        for _ in range(times):
            self.publish([symbol("hello")], SYMBOL.encode("x" * 32))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sandbox execute it."""
    code = b"\0asm\x01\0\0\0forwarder"
    monkeypatch.setitem(contracts.CODE, Forwarder, code)
    monkeypatch.setitem(contracts._BY_HASH, hashlib.sha256(code).digest(), Forwarder)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def forwarder(world: World) -> str:
    return world.deploy(Forwarder, "forwarder")


@pytest.fixture
def holder(world: World) -> Keypair:
    return world.wallet("holder", 10 * STROOPS)


def test_consent_below_the_first_call_is_recorded_only_where_that_is_allowed(
    world: World, forwarder: str, holder: Keypair
) -> None:
    call = invoke(forwarder, "forward", address(world.usdc), address(holder), address(forwarder), i128(5))
    failed = world.simulate(call, world.owner)
    assert isinstance(failed, SimulationFailed)
    assert "encountered authorization not tied to the root contract invocation" in failed.error
    found = world.simulate(call, world.owner, mode="record_allow_nonroot")
    assert isinstance(found, Simulation)
    (entry,) = found.auth
    assert entry.root_invocation.function.contract_fn is not None
    assert entry.root_invocation.function.contract_fn.function_name.sc_symbol == b"transfer"
    signed = authorize_entry(entry, holder, world.ledger.header.sequence + 9, world.passphrase)
    envelope = world.envelope(world.owner, InvokeHostFunction(call, [signed]), data=found.data)
    assert world.apply(envelope).succeeded
    assert world.ask(world.usdc, "balance", address(forwarder)) == 5


def test_one_entry_allows_one_of_two_equal_calls(world: World, forwarder: str, holder: Keypair) -> None:
    call = invoke(forwarder, "forward_twice", address(world.usdc), address(holder), address(forwarder), i128(5))
    found = world.simulate(call, world.owner, mode="record_allow_nonroot")
    assert isinstance(found, Simulation)
    assert len(found.auth) == 2
    until = world.ledger.header.sequence + 9
    first, second = (authorize_entry(entry, holder, until, world.passphrase) for entry in found.auth)

    def sent(*auth: xdr.SorobanAuthorizationEntry) -> str | None:
        envelope = world.envelope(world.owner, InvokeHostFunction(call, list(auth)), data=found.data)
        return world.apply(envelope).operation

    assert sent(first) == "TRAPPED"
    assert world.ask(world.usdc, "balance", address(forwarder)) == 0
    assert sent(first, second) == "SUCCESS"
    assert world.ask(world.usdc, "balance", address(forwarder)) == 10


def test_consent_cannot_be_asked_for_twice_in_one_call(world: World, forwarder: str, holder: Keypair) -> None:
    assert world.refused(holder, forwarder, "ask_twice", address(holder)) == "Error(Auth, ExistingValue)"


def test_a_contract_is_not_entered_again(world: World, forwarder: str) -> None:
    other = world.deploy(Forwarder, "other")
    assert world.refused(world.owner, forwarder, "call_me", address(other)) == "Error(Context, InvalidAction)"


def test_a_temporary_entry_lives_a_day_at_least_and_no_longer_than_it_was_given(world: World, forwarder: str) -> None:
    short = World(Limits(persistent_ledgers_min=500, temporary_ledgers_min=5, ledgers_max=600))
    place = short.deploy(Forwarder, "forwarder")
    name, number, extend_to = scval.to_symbol("n"), scval.to_uint32(7), scval.to_uint32(20)
    short.must(short.owner, place, "keep", name, number, extend_to)
    short.close(20)
    assert short.ask(place, "kept", name) == 0
    short.must(short.owner, place, "keep", name, number, extend_to)
    short.close(19)
    assert short.ask(place, "kept", name) == 7
    too_long = scval.to_uint32(600)
    assert short.refused(short.owner, place, "keep", name, number, too_long) == "Error(Storage, InvalidAction)"


def test_what_a_call_tells_is_bounded(world: World, forwarder: str) -> None:
    assert world.must(world.owner, forwarder, "shout", scval.to_uint32(50)).succeeded
    failed = world.simulate(invoke(forwarder, "shout", scval.to_uint32(400)), world.owner)
    assert isinstance(failed, SimulationFailed)
    assert failed.error.startswith("HostError: Error(Budget, ExceededLimit)")
    assert "total events size exceeds network config maximum" in failed.error


def test_what_a_call_computes_is_bounded() -> None:
    world = World(Limits(instructions=5_000_000))
    wallet = world.depositor("payer", 50)
    world.must(wallet, world.vault, "deposit", address(wallet), i128(50))

    def batch(size: int) -> xdr.SCVal:
        ids = (scval.to_symbol(f"r{number}") for number in range(size))
        return scval.to_vec([scval.to_struct({"amount": i128(1), "request_id": each}) for each in ids])

    refused = world.refused(world.caller, world.vault, "batch_deduct", address(world.caller), batch(50))
    assert refused == "Error(Budget, ExceededLimit)"
    world.must(world.caller, world.vault, "batch_deduct", address(world.caller), batch(10))


def test_an_entry_grows_to_its_bound_and_no_further() -> None:
    world = World(Limits(entry_bytes=1_500))
    grown = 0
    while True:
        arguments = (address(world.owner), address(Keypair.random()))
        simulated = world.simulate(invoke(world.vault, "set_allowed_depositor", *arguments), world.owner)
        if isinstance(simulated, SimulationFailed):
            break
        world.must(world.owner, world.vault, "set_allowed_depositor", *arguments)
        grown += 1
    assert simulated.error.startswith("HostError: Error(Storage, ExceededLimit)")
    assert grown > 3


def test_only_the_sandboxs_own_code_is_taken(world: World) -> None:
    kind = xdr.HostFunctionType.HOST_FUNCTION_TYPE_UPLOAD_CONTRACT_WASM
    failed = world.simulate(xdr.HostFunction(kind, wasm=b"\0asm\x01\0\0\0"), world.owner)
    assert isinstance(failed, SimulationFailed)
    assert failed.error.startswith("HostError: Error(WasmVm, InvalidAction)")


def test_a_contract_is_created_once(world: World, forwarder: str) -> None:
    with pytest.raises(AssertionError, match="ExistingValue"):
        world.deploy(Forwarder, "forwarder")


def test_nothing_is_called_where_no_contract_is(world: World) -> None:
    nowhere = "CAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAD2KM"
    assert world.refused(world.owner, nowhere, "balance") == "Error(Storage, MissingValue)"
    failed = world.simulate(invoke(world.owner.public_key, "balance"), world.owner)
    assert isinstance(failed, SimulationFailed)
    assert failed.error.startswith("HostError: Error(Context, InvalidInput)")
