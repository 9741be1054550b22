"""The vault contract: recognised by asking it, called in its own terms, its events read or refused, never skipped."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import attrs
import pytest
import trio
from stellar_sdk import TransactionEnvelope, scval, xdr

from callora.ledger.chain import Archived, ChainEvent, ContractFault, Simulated
from callora.ledger.faults import ChainMismatch
from callora.stellar.contracts import (
    ContractCall,
    DeductItem,
    VaultContract,
    build_restore,
    number_of,
    read_transfer,
    recognise,
)
from tests.support.nodes import (
    OWNER,
    PASSPHRASE,
    SETTLEMENT,
    USDC,
    VAULT,
    Trap,
    account,
    contract,
    g2_views,
    soroban_data,
    vault_views,
)

ALICE: Final = account("alice").public_key
G1: Final = VaultContract(VAULT, "g1", OWNER.public_key, USDC, SETTLEMENT, None)
G2: Final = attrs.evolve(G1, generation="g2", authorized_caller=ALICE)
EVENT: Final = ChainEvent(
    event_id="0004252017623040001-0000000003",
    contract_id=VAULT,
    ledger=990,
    closed_at=datetime(2026, 11, 21, tzinfo=UTC),
    tx_hash="0f" * 32,
    topics=(),
    value="",
)


def event(*topics: xdr.SCVal, value: xdr.SCVal, contract_id: str = VAULT) -> ChainEvent:
    """Return an event with these topics."""
    return attrs.evolve(
        EVENT, contract_id=contract_id, topics=tuple(each.to_xdr() for each in topics), value=value.to_xdr()
    )


def pair(one: int, other: int) -> xdr.SCVal:
    """Return a tuple of two amounts."""
    return scval.to_vec([scval.to_int128(one), scval.to_int128(other)])


async def recognised(views: Mapping[str, xdr.SCVal | Trap]) -> VaultContract:
    """Return what a contract with these views is taken for."""

    async def ask(call: ContractCall) -> Simulated | ContractFault:
        await trio.lowlevel.checkpoint()
        found = views.get(call.function)
        if isinstance(found, Trap):
            if found.number == 0:
                return ContractFault(None, "HostError: Error(Object, UnexpectedSize)", None)
            return ContractFault(found.number, "the node's text", found.contract_id)
        return (
            ContractFault(None, "HostError: Error(WasmVm, MissingValue)")
            if found is None
            else Simulated(found.to_xdr(), 1, 1)
        )

    return await recognise(VAULT, ask)


async def test_a_contract_is_recognised_by_what_it_answers() -> None:
    assert await recognised(vault_views()) == G1
    g2 = await recognised(g2_views())
    assert (g2.generation, g2.owner, g2.usdc) == ("g2", OWNER.public_key, USDC)


async def test_a_caller_that_may_charge_is_told_by_the_contract() -> None:
    views = vault_views()
    meta = scval.from_struct(views["get_meta"])  # type: ignore[arg-type]
    views["get_meta"] = scval.to_struct({**meta, "authorized_caller": scval.to_address(ALICE)})
    found = await recognised(views)
    assert found.batch_deduct([DeductItem(1, "a")]).authority == ALICE
    assert G1.batch_deduct([DeductItem(1, "a")]).authority == OWNER.public_key


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"get_meta": Trap(1)}, "call its init first"),
        ({"get_meta": Trap(3)}, "no vault that Callora knows"),
        ({"get_meta": scval.to_uint32(1)}, "unknown form"),
        ({"get_contract_addresses": Trap(1)}, "initialise it first"),
        (
            {"get_contract_addresses": scval.to_vec([scval.to_void(), scval.to_void(), scval.to_void()])},
            "initialise it first",
        ),
    ],
)
async def test_what_is_no_vault_is_refused_with_what_to_do(change: Mapping[str, xdr.SCVal | Trap], says: str) -> None:
    with pytest.raises(ChainMismatch, match=says):
        await recognised({**vault_views(), **change})


async def test_a_vault_that_lacks_functions_or_takes_others_is_refused_by_their_names() -> None:
    views = vault_views()
    del views["withdraw_to"], views["is_paused"]
    with pytest.raises(ChainMismatch, match=f"{VAULT}.*it has no is_paused, withdraw_to"):
        await recognised(views)
    with pytest.raises(ChainMismatch, match="it takes other arguments for batch_deduct"):
        await recognised({**vault_views(), "batch_deduct": Trap(0)})  # as the variant of July 2026
    rules = {name: Trap(number) for number, name in enumerate(("deposit", "withdraw_to", "batch_deduct"), 4)}
    assert await recognised({**vault_views(), **rules}) == G1, "a rule that speaks was asked"


def test_who_may_charge_is_asked_by_generation() -> None:
    items = [DeductItem(1, "a")]
    with pytest.raises(ChainMismatch, match="set_authorized_caller"):
        G1.batch_deduct(items, ALICE)
    nameless = attrs.evolve(G2, authorized_caller=None)
    with pytest.raises(ChainMismatch, match="does not say who may charge"):
        nameless.batch_deduct(items)
    assert nameless.batch_deduct(items, ALICE).authority == ALICE
    with pytest.raises(ChainMismatch, match="withdraw_to"):
        nameless.withdraw_to(ALICE, 1)


async def test_nothing_at_the_address_is_refused() -> None:
    with pytest.raises(ChainMismatch, match="STELLAR_NETWORK"):
        await recognised({})


def test_calls_have_the_contracts_own_arguments() -> None:
    deposit = G1.deposit(ALICE, 25)
    assert (deposit.authority, deposit.function) == (ALICE, "deposit")
    assert [scval.to_native(each) for each in deposit.args][1] == 25
    admit = G1.set_allowed_depositor(ALICE)
    assert (admit.authority, len(admit.args)) == (OWNER.public_key, 2)
    assert scval.from_address(admit.args[1]).address == ALICE
    out = G1.withdraw_to(ALICE, 7)
    assert (out.authority, out.function, scval.from_int128(out.args[1])) == (OWNER.public_key, "withdraw_to", 7)


def test_a_batch_is_written_as_each_generation_reads_it() -> None:
    items = [DeductItem(5, "a" * 32), DeductItem(6, "B_9")]
    first = scval.from_vec(G1.batch_deduct(items).args[1])[0]
    assert {name: scval.to_native(value) for name, value in scval.from_struct(first).items()} == {
        "amount": 5,
        "request_id": "a" * 32,
    }
    second = scval.from_vec(G2.batch_deduct(items).args[1])[1]
    assert scval.to_native(second) == [6, number_of("B_9")]
    assert G2.batch_deduct(items).authority == ALICE


@pytest.mark.parametrize("wrong", ["", "a-b", "a" * 33, "é", "a b"])
def test_a_request_id_that_is_no_symbol_is_never_sent(wrong: str) -> None:
    with pytest.raises(AssertionError):
        DeductItem(1, wrong)


@pytest.mark.parametrize("items", [[], [DeductItem(1, "a")] * 2, [DeductItem(1, str(n)) for n in range(51)]])
def test_a_batch_that_the_contract_would_refuse_is_never_built(items: list[DeductItem]) -> None:
    with pytest.raises(AssertionError):
        G1.batch_deduct(items)


@pytest.mark.parametrize("amount", [0, -1, 2**63])
def test_an_amount_that_is_none_is_never_sent(amount: int) -> None:
    for make in (G1.deposit, G1.withdraw_to):
        with pytest.raises(AssertionError):
            make(ALICE, amount)


def test_every_event_that_moves_the_balance_is_read() -> None:
    alice, owner = scval.to_address(ALICE), scval.to_address(OWNER.public_key)
    for made, kind, address, amount, after in (
        (event(scval.to_symbol("deposit"), alice, value=pair(5, 6)), "deposit", ALICE, 5, 6),
        (event(scval.to_symbol("withdraw"), owner, value=pair(5, 1)), "withdraw", OWNER.public_key, 5, 1),
        (event(scval.to_symbol("withdraw_to"), owner, alice, value=pair(5, 1)), "withdraw_to", ALICE, 5, 1),
        (
            event(scval.to_symbol("deduct"), alice, scval.to_symbol("id"), value=pair(5, 0)),
            "deduct",
            ALICE,
            5,
            0,
        ),
        (event(scval.to_symbol("deduct"), alice, value=pair(5, -3)), "deduct", ALICE, 5, -3),
        (event(scval.to_symbol("distribute"), alice, value=scval.to_int128(9)), "distribute", ALICE, 9, None),
    ):
        found = G1.read_event(made)
        assert found is not None
        assert (found.kind, found.address, found.amount, found.balance_after) == (kind, address, amount, after)
        assert (found.event_id, found.ledger, found.tx_hash) == (EVENT.event_id, 990, EVENT.tx_hash)


def test_an_event_that_moves_nothing_or_is_another_contracts_is_none() -> None:
    alice = scval.to_address(ALICE)
    assert G1.read_event(event(scval.to_symbol("vault_paused"), alice, value=scval.to_void())) is None
    assert G1.read_event(event(scval.to_uint32(1), value=scval.to_void())) is None
    assert G1.read_event(event(value=scval.to_void())) is None
    elsewhere = event(scval.to_symbol("deposit"), alice, value=pair(5, 6), contract_id=contract("another"))
    assert G1.read_event(elsewhere) is None


def test_an_event_that_moves_the_balance_in_an_unknown_form_is_never_skipped() -> None:
    alice = scval.to_address(ALICE)
    for wrong in (
        event(scval.to_symbol("deposit"), value=pair(5, 6)),
        event(scval.to_symbol("deposit"), alice, value=scval.to_int128(5)),
        event(scval.to_symbol("deposit"), scval.to_symbol("alice"), value=pair(5, 6)),
        event(scval.to_symbol("deposit"), alice, value=pair(0, 6)),
        event(scval.to_symbol("deposit"), alice, value=pair(2**63, 2**63)),
        event(scval.to_symbol("distribute"), alice, value=pair(5, 6)),
        attrs.evolve(event(scval.to_symbol("deposit"), alice, value=pair(5, 6)), value="AAAA"),
    ):
        with pytest.raises(ChainMismatch, match="unknown form"):
            G1.read_event(wrong)


def test_both_forms_of_a_tokens_transfer_are_read() -> None:
    topics = (scval.to_symbol("transfer"), scval.to_address(ALICE), scval.to_address(VAULT), scval.to_string("USDC:G"))
    plain = event(*topics, value=scval.to_int128(7), contract_id=USDC)
    mapped = event(
        *topics,
        value=scval.to_struct({"amount": scval.to_int128(7), "to_muxed_id": scval.to_uint64(9)}),
        contract_id=USDC,
    )
    for made in (plain, mapped):
        found = read_transfer(made)
        assert found is not None
        assert (found.sender, found.receiver, found.amount) == (ALICE, VAULT, 7)
    assert read_transfer(event(scval.to_symbol("mint"), scval.to_address(ALICE), value=scval.to_int128(7))) is None
    assert read_transfer(attrs.evolve(plain, value="AAAA")) is None


def test_an_error_is_named_by_whose_it_is() -> None:
    def name(vault: VaultContract, number: int | None, owner: str | None) -> str | None:
        return vault.error_name(ContractFault(number, "", owner))

    assert name(G1, 4, VAULT) == "Paused"
    assert name(G1, 29, None) == "DuplicateRequestId"
    assert name(G1, 44, VAULT) is None
    assert name(G2, 44, VAULT) == "CallerNotInAllowlist"
    assert name(G1, 13, USDC) == "Token.TrustlineMissing"
    assert name(G1, 13, contract("another")) is None
    assert name(G1, None, VAULT) is None
    assert name(G1, 999, USDC) is None


def test_what_restores_is_built_complete() -> None:
    built = build_restore(
        Archived(soroban_data(), 77), source=ALICE, sequence=3, max_time=9, fee=100, passphrase=PASSPHRASE
    )
    opened = TransactionEnvelope.from_xdr(built.xdr, PASSPHRASE)
    assert opened.transaction.is_soroban_transaction()
    assert built.fee == 177
