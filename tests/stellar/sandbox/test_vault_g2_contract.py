"""The vault contract's next generation, as far as the sandbox has it: what tells it from G1."""

import pytest
from stellar_sdk import Keypair, scval, xdr

from callora.ledger.chain import Applied, ContractFault, Envelope, EventPage, Simulated
from callora.ledger.faults import ChainMismatch
from callora.stellar.contracts import ContractCall, DeductItem, build, question, recognise
from callora.stellar.envelopes import Signer
from callora.stellar.rpc import RpcNode
from callora.stellar.sandbox.soroban.contracts.settlement import SettlementG2
from callora.stellar.sandbox.soroban.contracts.vault_g2 import VaultG2
from callora.stellar.sandbox.soroban.values import I128_MAX
from callora.stellar.transport import open_transport
from tests.support.contracts import STROOPS, World, address, i128
from tests.support.sandbox import served

VOID = scval.to_void()


class NextWorld(World):
    """A sandbox with a second vault, of generation G2, and the settlement contract that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.vault = self.deploy(VaultG2, "vault g2")
        self.settlement = self.deploy(SettlementG2, "settlement g2")
        self.must(self.admin, self.settlement, "init", address(self.admin), address(self.vault))
        self.must(
            self.owner,
            self.vault,
            "init",
            address(self.owner),
            address(self.usdc),
            i128(0),
            address(self.caller),
            i128(2),
            VOID,
            i128(1000),
            address(self.settlement),
        )


@pytest.fixture
def world() -> NextWorld:
    return NextWorld()


@pytest.fixture
def payer(world: NextWorld) -> Keypair:
    return world.depositor("payer", 10 * STROOPS)


def pairs(*items: tuple[int, int]) -> xdr.SCVal:
    return scval.to_vec([scval.to_vec([i128(amount), scval.to_uint64(number)]) for amount, number in items])


def test_it_answers_other_questions_than_g1(world: NextWorld) -> None:
    assert world.refused(world.owner, world.vault, "get_meta") == "Error(WasmVm, MissingValue)"
    assert world.ask(world.vault, "get_owner") == world.owner.public_key
    assert world.ask(world.vault, "capabilities") > 0
    assert world.ask(world.vault, "get_contract_addresses") == [world.usdc, world.settlement, None]
    assert world.ask(world.vault, "get_usdc_token") == world.usdc
    assert world.ask(world.vault, "get_settlement") == world.settlement
    assert world.ask(world.vault, "get_revenue_pool") is None
    assert world.ask(world.vault, "get_max_deduct") == 1000
    assert world.ask(world.vault, "is_request_processed", scval.to_uint64(1)) is False
    assert world.refused(world.owner, world.vault, "get_admin") == "Error(Contract, #1)"
    assert world.refused(world.owner, world.vault, "withdraw", i128(1)) == "Error(WasmVm, MissingValue)"


def test_a_deposit_returns_nothing_and_has_a_number_of_its_own_for_strangers(world: NextWorld, payer: Keypair) -> None:
    done = world.must(payer, world.vault, "deposit", address(payer), i128(500))
    assert done.value is None
    assert done.events[-1] == (("deposit", payer.public_key), [500, 500])
    assert world.ask(world.vault, "balance") == 500
    stranger = world.wallet("stranger", 5)
    assert world.refused(stranger, world.vault, "deposit", address(stranger), i128(1)) == "Error(Contract, #8)"
    assert world.refused(stranger, world.vault, "deposit", address(stranger), i128(5)) == "Error(Contract, #44)"


def test_only_the_authorized_caller_deducts_and_the_event_has_no_id(world: NextWorld, payer: Keypair) -> None:
    world.must(payer, world.vault, "deposit", address(payer), i128(500))
    arguments = (i128(100), scval.to_uint64(7))
    assert world.refused(world.owner, world.vault, "deduct", address(world.owner), *arguments) == "Error(Contract, #3)"
    for _ in range(2):  # the same id is no obstacle
        done = world.must(world.caller, world.vault, "deduct", address(world.caller), *arguments)
    assert done.events[0] == (("deduct", world.caller.public_key), [100, 300])
    assert world.ask(world.settlement, "get_total_received") == 200
    for amount, number in ((1, 8), (1001, 7), (400, 5), (0, 6)):
        refused = world.refused(
            world.caller, world.vault, "deduct", address(world.caller), i128(amount), scval.to_uint64(1)
        )
        assert refused == f"Error(Contract, #{number})"


def test_a_batch_may_leave_the_accounts_below_zero(world: NextWorld, payer: Keypair) -> None:
    world.must(payer, world.vault, "deposit", address(payer), i128(500))
    world.must(payer, world.usdc, "transfer", address(payer), address(world.vault), i128(500))
    done = world.must(world.caller, world.vault, "batch_deduct", address(world.caller), pairs((400, 1), (300, 2)))
    assert [event for event in done.events if event[0][0] == "deduct"] == [
        (("deduct", world.caller.public_key), [400, 100]),
        (("deduct", world.caller.public_key), [300, -200]),
    ]
    assert world.ask(world.vault, "balance") == -200
    too_much = pairs((400, 1))
    assert world.refused(world.caller, world.vault, "batch_deduct", address(world.caller), too_much) == (
        "Error(Contract, #10)"
    )


def test_a_batch_of_more_than_there_can_be_traps(world: NextWorld) -> None:
    most = pairs((I128_MAX, 1), (I128_MAX, 2))
    refused = world.refused(world.caller, world.vault, "batch_deduct", address(world.caller), most)
    assert refused == "Error(Value, InvalidInput)"


def test_its_owner_pauses_it_and_names_who_deducts(world: NextWorld, payer: Keypair) -> None:
    owner = address(world.owner)
    world.must(world.owner, world.vault, "pause", owner)
    assert world.ask(world.vault, "is_paused") is True
    assert world.refused(payer, world.vault, "deposit", address(payer), i128(5)) == "Error(Contract, #4)"
    world.must(world.owner, world.vault, "unpause", owner)
    assert world.refused(payer, world.vault, "pause", address(payer)) == "Error(Contract, #3)"
    stale = (address(world.owner), scval.to_uint64(9))
    assert world.refused(world.owner, world.vault, "set_authorized_caller", *stale) == "Error(Contract, #32)"
    world.must(world.owner, world.vault, "set_authorized_caller", address(world.owner), scval.to_uint64(0))
    assert world.ask(world.vault, "get_authorized_caller_nonce") == 1
    world.must(world.owner, world.vault, "add_address", owner, address(world.admin))
    assert world.ask(world.vault, "get_allowlist") == [payer.public_key, world.admin.public_key]
    world.must(world.owner, world.vault, "set_allowed_depositor", owner, VOID)
    assert world.ask(world.vault, "is_authorized_depositor", address(payer)) is False


def test_init_is_once_and_checks_its_bounds(world: NextWorld) -> None:
    another = world.deploy(VaultG2, "another g2")

    def refused(contract: str, least: int, most: int) -> str:
        arguments = [address(world.owner), address(world.usdc), i128(0), address(world.caller), i128(least), VOID]
        return world.refused(world.owner, contract, "init", *arguments, i128(most), address(world.settlement))

    assert refused(another, 0, 5) == "Error(Contract, #11)"
    assert refused(another, 1, 0) == "Error(Contract, #12)"
    assert refused(another, 6, 5) == "Error(Contract, #13)"
    assert refused(world.vault, 1, 5) == "Error(Contract, #2)"


async def test_our_side_recognises_it_charges_it_as_its_charger_and_reads_its_events(
    world: NextWorld, payer: Keypair
) -> None:
    async with served(world.town) as url, open_transport() as transport:
        rpc = RpcNode(f"{url}/rpc", world.passphrase, transport)

        async def ask(call: ContractCall) -> Simulated | ContractFault:
            return await rpc.simulate(question(call, world.passphrase))

        vault = await recognise(world.vault, ask)
        assert (vault.generation, vault.owner, vault.usdc) == ("g2", world.owner.public_key, world.usdc)
        world.must(payer, world.vault, "deposit", address(payer), i128(500))
        items = [DeductItem(100, "one"), DeductItem(50, "two")]

        async def charged(charger: Keypair) -> Envelope | ContractFault:
            call = vault.batch_deduct(items, charger.public_key)
            used = await rpc.sequence_of(charger.public_key)
            assert used is not None
            built = build(
                call,
                source=charger.public_key,
                sequence=used + 1,
                max_time=int(world.clock.seconds) + 300,
                fee=100,
                passphrase=world.passphrase,
            )
            return await rpc.prepare(built, leeway="some")

        refused = await charged(world.owner)
        assert isinstance(refused, ContractFault)
        assert vault.error_name(refused) == "Unauthorized", "its owner may not"
        prepared = await charged(world.caller)
        assert isinstance(prepared, Envelope)
        signed = Signer.from_seed(world.caller.secret, world.passphrase).sign(prepared)
        assert (await rpc.send(signed)).status == "pending"
        world.close()
        applied = await rpc.transaction(signed.hash)
        assert isinstance(applied, Applied)
        assert applied.successful
        page = await rpc.events(world.vault, cursor=None, start_ledger=applied.ledger, limit=10)
        assert isinstance(page, EventPage)
        read = [vault.read_event(event) for event in page.events]
        assert [(each.kind, each.amount, each.balance_after) for each in read if each is not None] == [
            ("deduct", 100, 400),
            ("deduct", 50, 350),
        ]
        with pytest.raises(ChainMismatch, match="withdraw_to"):
            vault.withdraw_to(payer.public_key, 1)
