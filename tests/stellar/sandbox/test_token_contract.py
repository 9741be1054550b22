"""Assets as tokens: what accounts and contracts hold, how it moves, the contract's own error numbers and events."""

import pytest
from stellar_sdk import Asset, InvokeHostFunction, Keypair, MuxedAccount, Payment, scval

from callora.stellar.sandbox.soroban.simulation import Simulation
from callora.stellar.sandbox.soroban.values import sc_address
from tests.support.contracts import STROOPS, World, address, i128, invoke

NOBODY = Keypair.from_raw_ed25519_seed(bytes(32)).public_key
"""An account that no sandbox has."""


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def holder(world: World) -> Keypair:
    """A wallet with 10 USDC."""
    return world.wallet("holder", 10 * STROOPS)


def usdc_name(world: World) -> str:
    return f"USDC:{world.places.issuer.public_key}"


def test_a_token_says_what_it_is(world: World) -> None:
    assert world.ask(world.usdc, "name") == usdc_name(world)
    assert world.ask(world.usdc, "symbol") == "USDC"
    assert world.ask(world.usdc, "decimals") == 7
    assert world.ask(world.usdc, "admin") == world.places.issuer.public_key
    assert world.ask(world.xlm, "name") == "native"
    assert world.ask(world.xlm, "symbol") == "native"
    assert world.refused(world.owner, world.xlm, "admin") == "Error(Contract, #4)"


def test_its_id_is_the_one_that_the_sdk_computes(world: World) -> None:
    asset = Asset("USDC", world.places.issuer.public_key)
    assert asset.contract_id(world.passphrase) == world.usdc
    assert Asset.native().contract_id(world.passphrase) == world.xlm


def test_an_accounts_tokens_are_its_trust_line(world: World, holder: Keypair) -> None:
    other = world.wallet("other", 0)
    done = world.must(holder, world.usdc, "transfer", address(holder), address(other), i128(4 * STROOPS))
    assert done.events == [
        (("transfer", holder.public_key, other.public_key, usdc_name(world)), 4 * STROOPS),
    ]
    assert world.usdc_of(holder.public_key) == 6 * STROOPS
    assert world.usdc_of(other.public_key) == 4 * STROOPS
    pay = Payment(other.public_key, Asset("USDC", world.places.issuer.public_key), "6")
    assert world.apply(world.envelope(holder, pay)).succeeded
    assert world.ask(world.usdc, "balance", address(other)) == 10 * STROOPS
    assert world.ask(world.usdc, "balance", address(holder)) == 0


def test_a_contracts_tokens_are_an_entry_of_the_tokens_own(world: World, holder: Keypair) -> None:
    assert world.ask(world.usdc, "balance", address(world.vault)) == 0
    world.must(holder, world.usdc, "transfer", address(holder), address(world.vault), i128(3))
    assert world.ask(world.usdc, "balance", address(world.vault)) == 3
    assert world.ask(world.usdc, "authorized", address(world.vault)) is True


def test_xlm_moves_above_the_reserve_only(world: World) -> None:
    poor, other = world.wallet("poor"), world.wallet("other")
    free = world.ask(world.xlm, "balance", address(poor))
    assert free == world.xlm_of(poor.public_key) - 2 * 5_000_000
    assert world.refused(poor, world.xlm, "transfer", address(poor), address(other), i128(free + 1)) == (
        "Error(Contract, #10)"
    )
    before = world.xlm_of(other.public_key)
    done = world.must(poor, world.xlm, "transfer", address(poor), address(other), i128(5))
    assert done.events == [(("transfer", poor.public_key, other.public_key, "native"), 5)]
    assert world.xlm_of(other.public_key) == before + 5


def test_a_number_in_the_address_is_told_in_the_event(world: World, holder: Keypair) -> None:
    other = world.wallet("other", 0)
    muxed = MuxedAccount(other.public_key, 42).account_muxed
    assert muxed is not None
    done = world.must(holder, world.usdc, "transfer", address(holder), address(muxed), i128(5))
    assert done.events == [
        (("transfer", holder.public_key, other.public_key, usdc_name(world)), {"amount": 5, "to_muxed_id": 42}),
    ]
    assert world.usdc_of(other.public_key) == 5


def test_what_the_issuer_sends_comes_to_be_and_what_it_gets_ceases(world: World, holder: Keypair) -> None:
    issuer = world.places.issuer
    done = world.must(issuer, world.usdc, "transfer", address(issuer), address(holder), i128(5))
    assert done.events == [(("mint", holder.public_key, usdc_name(world)), 5)]
    done = world.must(holder, world.usdc, "transfer", address(holder), address(issuer), i128(7))
    assert done.events == [(("burn", holder.public_key, usdc_name(world)), 7)]
    assert world.usdc_of(holder.public_key) == 10 * STROOPS - 2


def test_the_issuer_mints_and_holders_burn(world: World, holder: Keypair) -> None:
    issuer = world.places.issuer
    done = world.must(issuer, world.usdc, "mint", address(holder), i128(5))
    assert done.events == [(("mint", holder.public_key, usdc_name(world)), 5)]
    world.must(issuer, world.usdc, "mint", address(world.vault), i128(6))
    assert world.ask(world.usdc, "balance", address(world.vault)) == 6
    done = world.must(holder, world.usdc, "burn", address(holder), i128(5))
    assert done.events == [(("burn", holder.public_key, usdc_name(world)), 5)]
    assert world.usdc_of(holder.public_key) == 10 * STROOPS
    assert world.refused(issuer, world.usdc, "burn", address(issuer), i128(1)) == "Error(Contract, #2)"
    assert world.refused(issuer, world.usdc, "mint", address(issuer), i128(1)) == "Error(Contract, #2)"
    assert world.refused(holder, world.xlm, "burn", address(holder), i128(1)) == "Error(Contract, #2)"


def test_minting_needs_the_issuers_consent_whoever_asks(world: World, holder: Keypair) -> None:
    simulated = world.simulate(invoke(world.usdc, "mint", address(holder), i128(5)), holder)
    assert isinstance(simulated, Simulation)
    (entry,) = simulated.auth
    credentials = entry.credentials.address_v2
    assert credentials is not None
    assert credentials.address == sc_address(world.places.issuer.public_key)
    unsigned = InvokeHostFunction(invoke(world.usdc, "mint", address(holder), i128(5)), [entry])
    assert world.apply(world.envelope(holder, unsigned, data=simulated.data)).operation == "TRAPPED"


def test_a_transfer_is_refused_with_the_contracts_own_numbers(world: World, holder: Keypair) -> None:
    bare = world.wallet("bare")
    usdc = world.usdc

    def refused(source: Keypair, to: str, amount: int) -> str:
        return world.refused(source, usdc, "transfer", address(source), address(to), i128(amount))

    assert refused(holder, world.vault, -1) == "Error(Contract, #8)"
    assert refused(holder, world.vault, 10 * STROOPS + 1) == "Error(Contract, #10)"
    assert refused(holder, bare.public_key, 1) == "Error(Contract, #13)"
    assert refused(bare, world.vault, 1) == "Error(Contract, #13)"
    assert refused(holder, world.vault, 2**63) == "Error(Contract, #10)"
    assert world.refused(holder, usdc, "balance", address(bare)) == "Error(Contract, #13)"
    assert world.refused(holder, world.xlm, "balance", address(NOBODY)) == "Error(Contract, #6)"
    assert world.refused(holder, world.xlm, "transfer", address(holder), address(NOBODY), i128(1)) == (
        "Error(Contract, #6)"
    )
    assert world.ask(usdc, "balance", address(world.places.issuer)) == 2**63 - 1
    assert world.ask(usdc, "authorized", address(holder)) is True
    assert world.refused(holder, usdc, "authorized", address(bare)) == "Error(Contract, #13)"


def test_an_allowance_is_spent_and_ends(world: World, holder: Keypair) -> None:
    spender, other = world.wallet("spender"), world.wallet("other", 0)
    until = world.ledger.header.sequence + 4
    done = world.must(holder, world.usdc, "approve", address(holder), address(spender), i128(5), scval.to_uint32(until))
    assert done.events == [
        (("approve", holder.public_key, spender.public_key, usdc_name(world)), [5, until]),
    ]
    move = (address(spender), address(holder), address(other))
    done = world.must(spender, world.usdc, "transfer_from", *move, i128(3))
    assert done.events == [(("transfer", holder.public_key, other.public_key, usdc_name(world)), 3)]
    assert world.ask(world.usdc, "allowance", address(holder), address(spender)) == 2
    assert world.refused(spender, world.usdc, "transfer_from", *move, i128(3)) == "Error(Contract, #9)"
    world.close(4)
    assert world.ask(world.usdc, "allowance", address(holder), address(spender)) == 0
    assert world.refused(spender, world.usdc, "transfer_from", *move, i128(1)) == "Error(Contract, #9)"
    past = scval.to_uint32(world.ledger.header.sequence)
    refused = world.refused(holder, world.usdc, "approve", address(holder), address(spender), i128(5), past)
    assert refused == "Error(Contract, #9)"
