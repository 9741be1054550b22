"""The settlement contract of the sandbox (G1): every function, every error number, every event."""

import pytest
from stellar_sdk import Keypair, scval, xdr

from callora.stellar.sandbox.soroban.contracts.settlement import Settlement, SettlementError
from callora.stellar.sandbox.soroban.values import I128_MAX, address_order
from tests.support.contracts import STROOPS, World, address, i128

VOID = scval.to_void()
TRAPPED = "Error(WasmVm, InvalidAction)"
DAY = 86_400


def error(number: SettlementError) -> str:
    return f"Error(Contract, #{int(number)})"


def shares(*items: tuple[Keypair, int]) -> xdr.SCVal:
    return scval.to_vec([scval.to_vec([address(developer), i128(amount)]) for developer, amount in items])


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def rich(world: World) -> World:
    """A settlement contract with 10 USDC in it."""
    wallet = world.wallet("rich", 10 * STROOPS)
    world.must(wallet, world.usdc, "transfer", address(wallet), address(world.settlement), i128(10 * STROOPS))
    return world


def test_init_is_once_and_for_different_parties(world: World) -> None:
    another = world.deploy(Settlement, "another settlement")
    admin, vault = address(world.admin), address(world.vault)
    assert world.refused(world.admin, another, "get_admin") == error(SettlementError.NOT_INITIALIZED)
    assert world.refused(world.admin, another, "get_vault") == error(SettlementError.NOT_INITIALIZED)
    assert world.refused(world.admin, another, "get_global_pool") == error(SettlementError.NOT_INITIALIZED)
    assert world.refused(world.admin, another, "get_developer_balance", admin) == error(SettlementError.NOT_INITIALIZED)
    assert world.refused(world.admin, another, "init", admin, admin) == TRAPPED
    assert world.refused(world.admin, another, "init", admin, address(another)) == TRAPPED
    assert world.must(world.admin, another, "init", admin, vault).events == []
    assert world.ask(another, "get_admin") == world.admin.public_key
    assert world.ask(another, "get_vault") == world.vault
    assert world.ask(another, "get_global_pool") == {"total_balance": 0, "last_updated": world.clock.seconds}
    assert world.refused(world.admin, another, "init", admin, vault) == error(SettlementError.ALREADY_INITIALIZED)


def test_a_payment_goes_to_the_pool_or_to_a_developer(world: World) -> None:
    admin, developer = world.admin.public_key, world.wallet("developer")
    pool = (scval.to_bool(True), VOID)
    done = world.must(world.admin, world.settlement, "receive_payment", address(admin), i128(7), *pool)
    told = {"from_vault": admin, "amount": 7, "to_pool": True, "developer": None}
    assert done.events == [(("payment_received", admin), told)]
    assert world.ask(world.settlement, "get_global_pool") == {"total_balance": 7, "last_updated": world.clock.seconds}
    direct = (scval.to_bool(False), address(developer))
    done = world.must(world.admin, world.settlement, "receive_payment", address(admin), i128(5), *direct)
    dev = developer.public_key
    assert done.events == [
        (("payment_received", admin), {"from_vault": admin, "amount": 5, "to_pool": False, "developer": dev}),
        (("balance_credited", dev), {"developer": dev, "amount": 5, "new_balance": 5}),
    ]
    assert world.ask(world.settlement, "get_developer_balance", address(dev)) == 5
    assert world.ask(world.settlement, "get_developer_balance", address(admin)) == 0


def test_a_payment_is_refused_by_the_first_rule_that_it_breaks(world: World) -> None:
    stranger = world.wallet("stranger")

    def refused(by: Keypair, amount: int, *, to_pool: bool, developer: Keypair | None) -> str:
        arguments = (address(by), i128(amount), scval.to_bool(to_pool), address(developer))
        return world.refused(by, world.settlement, "receive_payment", *arguments)

    assert refused(stranger, 0, to_pool=True, developer=stranger) == error(SettlementError.UNAUTHORIZED)
    assert refused(world.admin, 0, to_pool=True, developer=stranger) == error(SettlementError.AMOUNT_NOT_POSITIVE)
    assert refused(world.admin, 1, to_pool=True, developer=stranger) == error(SettlementError.DEVELOPER_MUST_BE_NONE)
    assert refused(world.admin, 1, to_pool=False, developer=None) == error(SettlementError.DEVELOPER_REQUIRED)
    for to_pool, developer, wanted in (
        (True, None, SettlementError.POOL_OVERFLOW),
        (False, stranger, SettlementError.DEVELOPER_OVERFLOW),
    ):
        arguments = (address(world.admin), i128(I128_MAX), scval.to_bool(to_pool), address(developer))
        world.must(world.admin, world.settlement, "receive_payment", *arguments)
        assert refused(world.admin, 1, to_pool=to_pool, developer=developer) == error(wanted)


def test_a_batch_credits_each_developer_even_twice(world: World) -> None:
    admin = world.admin.public_key
    one, two = world.wallet("one"), world.wallet("two")
    items = shares((one, 3), (two, 4), (one, 5))
    done = world.must(world.admin, world.settlement, "batch_receive_payment", address(admin), items)
    assert done.events == [
        (("balance_credited", dev.public_key), {"developer": dev.public_key, "amount": amount, "new_balance": balance})
        for dev, amount, balance in ((one, 3, 3), (two, 4, 4), (one, 5, 8))
    ]
    assert world.ask(world.settlement, "get_developer_balance", address(one)) == 8


def test_a_batch_of_fifty_developers_fits_a_transaction(world: World) -> None:
    developers = [Keypair.random() for _ in range(50)]
    items = shares(*((developer, 1) for developer in developers))
    done = world.must(world.admin, world.settlement, "batch_receive_payment", address(world.admin), items)
    assert len(done.events) == 50
    everyone = sorted((each.public_key for each in developers), key=address_order)
    told = world.must(world.admin, world.settlement, "get_all_developer_balances", address(world.admin)).value
    assert [each["address"] for each in told] == everyone


def test_a_batch_that_makes_no_sense_traps(world: World) -> None:
    admin, one = address(world.admin), world.wallet("one")
    for items in (shares(), shares(*([(one, 1)] * 51)), shares((one, 1), (one, 0))):
        assert world.refused(world.admin, world.settlement, "batch_receive_payment", admin, items) == TRAPPED
    refused = world.refused(one, world.settlement, "batch_receive_payment", address(one), shares((one, 1)))
    assert refused == error(SettlementError.UNAUTHORIZED)
    full = shares((one, I128_MAX), (one, 1))
    refused = world.refused(world.admin, world.settlement, "batch_receive_payment", admin, full)
    assert refused == error(SettlementError.DEVELOPER_OVERFLOW)


def test_a_developer_is_paid_what_it_claims(rich: World) -> None:
    world, developer, other = rich, rich.wallet("developer", 0), rich.wallet("other", 0)
    dev = developer.public_key
    items = shares((developer, 6 * STROOPS))
    world.must(world.admin, world.settlement, "batch_receive_payment", address(world.admin), items)
    done = world.must(developer, world.settlement, "withdraw_developer_balance", address(dev), i128(2 * STROOPS), VOID)
    assert done.events[-1] == (
        ("developer_withdraw", dev),
        {"developer": dev, "amount": 2 * STROOPS, "remaining_balance": 4 * STROOPS, "to": dev},
    )
    assert world.usdc_of(dev) == 2 * STROOPS
    claim = (address(dev), i128(1 * STROOPS), address(other))
    world.must(developer, world.settlement, "withdraw_developer_balance", *claim)
    assert world.usdc_of(other.public_key) == 1 * STROOPS
    assert world.ask(world.settlement, "get_developer_balance", address(dev)) == 3 * STROOPS
    assert world.ask(world.settlement, "get_withdrawal_today", address(dev)) == 3 * STROOPS
    world.clock.seconds += DAY
    assert world.ask(world.settlement, "get_withdrawal_today", address(dev)) == 0


def test_a_claim_is_refused_by_the_first_rule_that_it_breaks(rich: World) -> None:
    world, developer = rich, rich.wallet("developer", 0)
    items = shares((developer, 20 * STROOPS))
    world.must(world.admin, world.settlement, "batch_receive_payment", address(world.admin), items)

    def refused(amount: int, to: str | None = None) -> str:
        arguments = (address(developer), i128(amount), address(to))
        return world.refused(developer, world.settlement, "withdraw_developer_balance", *arguments)

    assert refused(0, world.settlement) == error(SettlementError.AMOUNT_NOT_POSITIVE)
    assert refused(21 * STROOPS, world.settlement) == TRAPPED
    assert refused(21 * STROOPS) == error(SettlementError.INSUFFICIENT_DEVELOPER_BALANCE)
    assert refused(11 * STROOPS) == error(SettlementError.INSUFFICIENT_CONTRACT_BALANCE)
    cap = (address(world.admin), address(developer), i128(3 * STROOPS))
    done = world.must(world.admin, world.settlement, "set_daily_withdraw_cap", *cap)
    told = {"developer": developer.public_key, "new_cap": 3 * STROOPS}
    assert done.events == [(("daily_withdraw_cap_changed", world.admin.public_key), told)]
    assert world.ask(world.settlement, "get_daily_withdraw_cap", address(developer)) == 3 * STROOPS
    assert refused(4 * STROOPS) == error(SettlementError.DAILY_WITHDRAW_CAP_EXCEEDED)
    claim = (address(developer), i128(3 * STROOPS), VOID)
    world.must(developer, world.settlement, "withdraw_developer_balance", *claim)
    assert refused(1) == error(SettlementError.DAILY_WITHDRAW_CAP_EXCEEDED)
    world.clock.seconds += DAY
    world.must(developer, world.settlement, "withdraw_developer_balance", *claim)


def test_without_a_token_nothing_is_paid(world: World) -> None:
    another = world.deploy(Settlement, "another settlement")
    admin, developer = address(world.admin), world.wallet("developer", 0)
    world.must(world.admin, another, "init", admin, address(world.vault))
    world.must(world.admin, another, "batch_receive_payment", admin, shares((developer, 1)))
    claim = (address(developer), i128(1), VOID)
    refused = world.refused(developer, another, "withdraw_developer_balance", *claim)
    assert refused == error(SettlementError.USDC_TOKEN_NOT_CONFIGURED)
    assert world.refused(world.admin, another, "set_usdc_token", admin, address(another)) == TRAPPED
    assert world.refused(developer, another, "set_usdc_token", address(developer), address(world.usdc)) == TRAPPED


def test_the_administrator_credits_by_decree(world: World) -> None:
    dev = world.wallet("developer")
    decree = (address(dev), i128(9), scval.to_symbol("refund"))
    done = world.must(world.admin, world.settlement, "force_credit_developer", address(world.admin), *decree)
    told = {"developer": dev.public_key, "amount": 9, "reason": "refund", "new_balance": 9}
    assert done.events == [(("developer_force_credited", dev.public_key), told)]
    assert world.refused(dev, world.settlement, "force_credit_developer", address(dev), *decree) == error(
        SettlementError.UNAUTHORIZED
    )
    nothing = (address(dev), i128(0), scval.to_symbol("refund"))
    refused = world.refused(world.admin, world.settlement, "force_credit_developer", address(world.admin), *nothing)
    assert refused == error(SettlementError.AMOUNT_NOT_POSITIVE)


def test_the_administrator_pages_through_the_balances(world: World) -> None:
    admin = address(world.admin)
    developers = sorted((Keypair.random().public_key for _ in range(3)), key=address_order)
    items = scval.to_vec([scval.to_vec([address(each), i128(1)]) for each in reversed(developers)])
    world.must(world.admin, world.settlement, "batch_receive_payment", admin, items)
    page = world.must(
        world.admin, world.settlement, "get_developer_balances_page", admin, scval.to_uint32(1), scval.to_uint32(9)
    )
    assert [each["address"] for each in page.value] == developers[1:]
    first, after = world.must(
        world.admin, world.settlement, "get_developer_balances_cursor", admin, VOID, scval.to_uint32(2)
    ).value
    assert [each["address"] for each in first] == developers[:2]
    rest, end = world.must(
        world.admin, world.settlement, "get_developer_balances_cursor", admin, address(after), scval.to_uint32(2)
    ).value
    assert [each["address"] for each in rest] == developers[2:]
    assert end is None
    stranger = world.wallet("stranger")
    for name, arguments, wanted in (
        ("get_all_developer_balances", [], error(SettlementError.UNAUTHORIZED)),
        ("get_developer_balances_page", [scval.to_uint32(0), scval.to_uint32(1)], TRAPPED),
        ("get_developer_balances_cursor", [VOID, scval.to_uint32(1)], error(SettlementError.UNAUTHORIZED)),
    ):
        assert world.refused(stranger, world.settlement, name, address(stranger), *arguments) == wanted, name


def test_more_than_a_hundred_balances_are_not_told_at_once(world: World) -> None:
    admin = address(world.admin)
    for _ in range(3):
        items = shares(*((Keypair.random(), 1) for _ in range(34)))
        world.must(world.admin, world.settlement, "batch_receive_payment", admin, items)
    refused = world.refused(world.admin, world.settlement, "get_all_developer_balances", admin)
    assert refused == error(SettlementError.GAS_EXHAUSTION_RISK)


def test_the_administrator_changes_in_two_steps(world: World) -> None:
    admin, new = world.admin.public_key, world.wallet("new admin")
    assert world.refused(new, world.settlement, "accept_admin") == TRAPPED
    assert world.refused(new, world.settlement, "set_admin", address(new), address(new)) == error(
        SettlementError.UNAUTHORIZED
    )
    done = world.must(world.admin, world.settlement, "set_admin", address(admin), address(new))
    assert done.events == [(("admin_nominated", admin, new.public_key), None)]
    assert world.ask(world.settlement, "get_pending_admin") == new.public_key
    done = world.must(new, world.settlement, "accept_admin")
    assert done.events == [(("admin_accepted", admin, new.public_key), None)]
    assert world.ask(world.settlement, "get_admin") == new.public_key


def test_the_vault_changes_in_two_steps(world: World) -> None:
    admin, new = world.admin.public_key, world.wallet("new vault")
    stranger = world.wallet("stranger")
    assert world.refused(new, world.settlement, "accept_vault", address(new)) == TRAPPED
    assert (
        world.refused(world.admin, world.settlement, "propose_vault", address(admin), address(world.settlement))
        == TRAPPED
    )
    assert world.refused(new, world.settlement, "propose_vault", address(new), address(new)) == error(
        SettlementError.UNAUTHORIZED
    )
    done = world.must(world.admin, world.settlement, "set_vault", address(admin), address(new))
    told = {"current_vault": world.vault, "proposed_vault": new.public_key}
    assert done.events == [(("vault_proposed", admin), told)]
    assert world.refused(stranger, world.settlement, "accept_vault", address(stranger)) == TRAPPED
    done = world.must(new, world.settlement, "accept_vault", address(new))
    told = {"old_vault": world.vault, "new_vault": new.public_key, "accepted_by": new.public_key}
    assert done.events == [(("vault_accepted", new.public_key), told)]
    assert world.ask(world.settlement, "get_vault") == new.public_key
