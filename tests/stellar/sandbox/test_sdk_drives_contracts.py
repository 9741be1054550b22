"""stellar-sdk's own clients, unmodified, against the sandbox's contracts: reads, calls, consent, bumps, restoring."""

from typing import Any

import attrs
import httpx
import pytest
from stellar_sdk import (
    Address,
    ExtendFootprintTTL,
    RestoreFootprint,
    SorobanDataBuilder,
    TransactionBuilder,
    scval,
    xdr,
)
from stellar_sdk.contract import AssembledTransactionAsync, ContractClientAsync
from stellar_sdk.contract.exceptions import ExpiredStateError, NoSignatureNeededError, SimulationFailedError
from stellar_sdk.exceptions import PrepareTransactionException
from stellar_sdk.soroban_rpc import GetTransactionStatus, SendTransactionStatus
from stellar_sdk.soroban_server_async import SorobanServerAsync

from callora.stellar.sandbox.soroban.storage import instance_ledger_key
from tests.support.contracts import SHORT, STROOPS, World, address, i128
from tests.support.sandbox import served
from tests.support.sandbox_client import URL, SandboxClient, client_of

RPC = f"{URL}/rpc"


@pytest.fixture
def world() -> World:
    return World()


def contract_of(world: World, contract: str) -> ContractClientAsync:
    return ContractClientAsync(contract, RPC, world.passphrase, client_of(world.sandbox))


async def sent(world: World, assembled: AssembledTransactionAsync[Any]) -> GetTransactionStatus:
    """Send what was assembled and signed, close a ledger, and return what became of it."""
    server = assembled.server
    assert assembled.built_transaction is not None
    answer = await server.send_transaction(assembled.built_transaction)
    assert answer.status == SendTransactionStatus.PENDING, answer
    world.close()
    return (await server.get_transaction(answer.hash)).status


async def test_a_contract_is_read_without_an_account_of_ones_own(world: World) -> None:
    vault = contract_of(world, world.vault)
    balance = await vault.invoke("balance", parse_result_xdr_fn=scval.from_int128)
    assert balance.result() == 0
    assert balance.is_read_call()
    admin = await vault.invoke("get_admin", parse_result_xdr_fn=scval.from_address)
    admin_address = admin.result()
    assert isinstance(admin_address, Address)
    assert admin_address.address == world.owner.public_key
    with pytest.raises(NoSignatureNeededError):
        balance.sign(world.owner)
    usdc = contract_of(world, world.usdc)
    name = await usdc.invoke("name", parse_result_xdr_fn=scval.from_string)
    assert name.result() == f"USDC:{world.places.issuer.public_key}".encode()


async def test_a_wallet_deposits(world: World) -> None:
    wallet = world.depositor("payer", 100 * STROOPS)
    vault = contract_of(world, world.vault)
    deposit: AssembledTransactionAsync[Any] = await vault.invoke(
        "deposit",
        [address(wallet), i128(25 * STROOPS)],
        wallet.public_key,
        wallet,
        parse_result_xdr_fn=scval.from_int128,
    )
    assert deposit.result() == 25 * STROOPS
    assert not deposit.is_read_call()
    assert deposit.needs_non_invoker_signing_by() == set()
    deposit.sign()
    assert await sent(world, deposit) == GetTransactionStatus.SUCCESS
    assert world.ask(world.vault, "balance") == 25 * STROOPS


@pytest.mark.parametrize("upgraded", [True, False])
async def test_a_wallet_consents_and_a_sponsor_pays(world: World, upgraded: bool) -> None:
    wallet, sponsor = world.depositor("payer", 100 * STROOPS), world.wallet("sponsor")
    deposit: AssembledTransactionAsync[Any] = await contract_of(world, world.vault).invoke(
        "deposit", [address(wallet), i128(5)], sponsor.public_key, sponsor, use_upgraded_auth=upgraded
    )
    assert deposit.needs_non_invoker_signing_by() == {wallet.public_key}
    await deposit.authorize(wallet.public_key, wallet)
    await deposit.prepare()  # the entries are there now: the node enforces them
    deposit.sign()
    assert await sent(world, deposit) == GetTransactionStatus.SUCCESS


async def test_a_call_that_cannot_succeed_is_not_assembled(world: World) -> None:
    stranger = world.wallet("stranger", 5)
    with pytest.raises(SimulationFailedError, match=r"Error\(Contract, #3\)"):
        await contract_of(world, world.vault).invoke("deposit", [address(stranger), i128(5)], stranger.public_key)


async def test_a_transaction_is_prepared_bumped_and_found_by_both_hashes(world: World) -> None:
    wallet, sponsor = world.depositor("payer", 100 * STROOPS), world.wallet("sponsor")
    server = SorobanServerAsync(RPC, client_of(world.sandbox))
    source = await server.load_account(wallet.public_key)
    plain = (
        TransactionBuilder(source, world.passphrase, 100)
        .append_invoke_contract_function_op(world.vault, "deposit", [address(wallet), i128(7)])
        .add_time_bounds(0, int(world.clock.seconds) + 300)
        .build()
    )
    prepared = await server.prepare_transaction(plain)
    assert prepared.transaction.soroban_data is not None
    assert prepared.transaction.fee == 100 + prepared.transaction.soroban_data.resource_fee.int64
    prepared.sign(wallet)
    bump = TransactionBuilder.build_fee_bump_transaction(
        sponsor, prepared.transaction.fee + 1_000, prepared, world.passphrase
    )
    bump.sign(sponsor)
    answer = await server.send_transaction(bump)
    assert (answer.status, answer.hash) == (SendTransactionStatus.PENDING, bump.hash_hex())
    world.close()
    found = await server.get_transaction(bump.hash_hex())
    assert found.status == GetTransactionStatus.SUCCESS
    assert found.fee_bump is True
    assert found.result_meta_xdr is not None
    meta = xdr.TransactionMeta.from_xdr(found.result_meta_xdr).v4
    assert meta is not None
    assert meta.soroban_meta is not None
    assert meta.soroban_meta.return_value is not None
    assert scval.from_int128(meta.soroban_meta.return_value) == 7
    assert found.events is not None
    assert found.events.contract_events_xdr is not None
    events = [xdr.ContractEvent.from_xdr(event) for event in found.events.contract_events_xdr[0]]
    assert [scval.to_native(event.body.v0.topics[0]) for event in events if event.body.v0] == ["deposit", "transfer"]
    assert (await server.get_transaction(prepared.hash_hex())).status == GetTransactionStatus.SUCCESS


async def test_what_cannot_be_prepared_says_why(world: World) -> None:
    server = SorobanServerAsync(RPC, client_of(world.sandbox))
    source = await server.load_account(world.admin.public_key)
    plain = (
        TransactionBuilder(source, world.passphrase, 100)
        .append_invoke_contract_function_op(world.vault, "withdraw", [i128(1)])
        .add_time_bounds(0, 0)
        .build()
    )
    with pytest.raises(PrepareTransactionException) as refused:
        await server.prepare_transaction(plain)
    assert refused.value.simulate_transaction_response.error is not None
    assert refused.value.simulate_transaction_response.error.startswith("HostError: Error(Contract, #5)")


async def test_an_archived_contract_is_restored_by_the_call_or_on_its_own() -> None:
    world = World(SHORT)
    wallet = world.depositor("payer", 100)
    world.outlive()
    deposit: AssembledTransactionAsync[Any] = await contract_of(world, world.vault).invoke(
        "deposit", [address(wallet), i128(5)], wallet.public_key, wallet
    )
    assert deposit.simulation is not None
    assert deposit.simulation.restore_preamble is None
    deposit.sign()
    assert await sent(world, deposit) == GetTransactionStatus.SUCCESS


async def test_a_legacy_node_tells_the_sdk_to_restore_first() -> None:
    world = World(attrs.evolve(SHORT, legacy_restore=True))
    wallet = world.depositor("payer", 100)
    world.outlive()
    vault = contract_of(world, world.vault)
    deposit: AssembledTransactionAsync[Any] = await vault.invoke(
        "deposit", [address(wallet), i128(5)], wallet.public_key, wallet, restore=False
    )
    with pytest.raises(ExpiredStateError):
        deposit.sign()
    assert deposit.simulation is not None
    preamble = deposit.simulation.restore_preamble
    assert preamble is not None
    server = deposit.server
    source = await server.load_account(wallet.public_key)
    data = SorobanDataBuilder.from_xdr(preamble.transaction_data).set_resource_fee(preamble.min_resource_fee).build()  # type: ignore[no-untyped-call]
    restore = (
        TransactionBuilder(source, world.passphrase, 100 + preamble.min_resource_fee)
        .set_soroban_data(data)
        .append_operation(RestoreFootprint())
        .add_time_bounds(0, 0)
        .build()
    )
    restore.sign(wallet)
    assert world.apply(restore).succeeded
    again: AssembledTransactionAsync[Any] = await vault.invoke(
        "deposit", [address(wallet), i128(5)], wallet.public_key, wallet
    )
    again.sign()
    assert await sent(world, again) == GetTransactionStatus.SUCCESS


async def test_lives_are_extended_and_restored_as_the_sdk_prepares_it() -> None:
    world = World(SHORT)
    wallet = world.wallet("wallet")
    server = SorobanServerAsync(RPC, client_of(world.sandbox))
    key = SorobanDataBuilder().set_read_only([_instance(world)]).build()  # type: ignore[no-untyped-call]
    source = await server.load_account(wallet.public_key)
    extend = (
        TransactionBuilder(source, world.passphrase, 100)
        .set_soroban_data(key)
        .append_operation(ExtendFootprintTTL(89))
        .add_time_bounds(0, 0)
        .build()
    )
    prepared = await server.prepare_transaction(extend)
    prepared.sign(wallet)
    assert world.apply(prepared).operation == "EXTEND_FOOTPRINT_TTL_SUCCESS"
    entries = await server.get_ledger_entries([_instance(world)])
    assert entries.entries is not None
    assert entries.entries[0].live_until_ledger == world.ledger.header.sequence + 89


def _instance(world: World) -> xdr.LedgerKey:
    return xdr.LedgerKey.from_xdr_bytes(instance_ledger_key(world.vault))


async def test_the_code_of_a_contract_can_be_fetched(world: World) -> None:
    server = SorobanServerAsync(RPC, client_of(world.sandbox))
    assert (await server.get_contract_wasm(world.vault)).startswith(b"\0asm")


async def test_the_sdk_deposits_over_a_socket(world: World) -> None:
    wallet = world.depositor("payer", 100)
    async with served(world.town) as base, httpx.AsyncClient(timeout=10) as http:
        vault = ContractClientAsync(world.vault, f"{base}/rpc", world.passphrase, SandboxClient(http))
        deposit: AssembledTransactionAsync[Any] = await vault.invoke(
            "deposit", [address(wallet), i128(5)], wallet.public_key, wallet
        )
        deposit.sign()
        assert await sent(world, deposit) == GetTransactionStatus.SUCCESS
        balance = await vault.invoke("balance", parse_result_xdr_fn=scval.from_int128)
        assert balance.result() == 5
        broken = await http.post(f"{base}/rpc", content=b"{")
        assert broken.json()["error"]["code"] == -32700
