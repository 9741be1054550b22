"""The vault contract of the sandbox (G1): every function, error number and event, and the order of its checks."""

import pytest
from stellar_sdk import Keypair, MuxedAccount, scval, xdr

from callora.stellar.sandbox.soroban.contracts.vault import Vault, VaultError
from callora.stellar.sandbox.soroban.values import I128_MAX
from tests.support.contracts import STROOPS, World, address, i128

VOID = scval.to_void()
NO_LIMIT = scval.to_uint32(65535)


def error(number: VaultError) -> str:
    return f"Error(Contract, #{int(number)})"


def item(amount: int, request_id: str | None) -> xdr.SCVal:
    request = scval.to_symbol(request_id) if request_id is not None else VOID
    return scval.to_struct({"amount": i128(amount), "request_id": request})


def text(value: str) -> xdr.SCVal:
    return scval.to_string(value)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def payer(world: World) -> Keypair:
    """A wallet with 100 USDC that may deposit."""
    return world.depositor("payer", 100 * STROOPS)


@pytest.fixture
def funded(world: World, payer: Keypair) -> World:
    """A vault with 50 USDC in it."""
    world.must(payer, world.vault, "deposit", address(payer), i128(50 * STROOPS))
    return world


@pytest.fixture
def bare(world: World) -> str:
    """A vault contract that nobody initialised."""
    return world.deploy(Vault, "another vault")


def init_arguments(world: World, **changes: xdr.SCVal) -> list[xdr.SCVal]:
    arguments = {
        "owner": address(world.owner),
        "usdc_token": address(world.usdc),
        "initial_balance": VOID,
        "authorized_caller": VOID,
        "min_deposit": VOID,
        "revenue_pool": VOID,
        "max_deduct": VOID,
    }
    assert set(changes) <= set(arguments)
    return list((arguments | changes).values())


def test_init_keeps_what_it_was_given_and_says_so(world: World, bare: str) -> None:
    arguments = init_arguments(
        world,
        authorized_caller=address(world.caller),
        min_deposit=i128(7),
        max_deduct=i128(70),
        revenue_pool=address(world.admin),
    )
    done = world.must(world.owner, bare, "init", *arguments)
    meta = {
        "owner": world.owner.public_key,
        "balance": 0,
        "authorized_caller": world.caller.public_key,
        "min_deposit": 7,
    }
    assert done.value == meta
    assert done.events == [(("init", world.owner.public_key), 0)]
    assert world.ask(bare, "get_meta") == meta
    assert world.ask(bare, "get_max_deduct") == 70
    assert world.ask(bare, "get_admin") == world.owner.public_key
    assert world.ask(bare, "get_contract_addresses") == [world.usdc, None, world.admin.public_key]
    assert world.ask(bare, "get_revenue_pool") == world.admin.public_key


def test_init_by_default_allows_one_stroop_and_any_deduction(world: World, bare: str) -> None:
    world.must(world.owner, bare, "init", *init_arguments(world))
    assert world.ask(bare, "get_meta")["min_deposit"] == 1
    assert world.ask(bare, "get_max_deduct") == I128_MAX


def test_an_initial_balance_must_be_there(world: World, bare: str) -> None:
    wallet = world.wallet("rich", 9 * STROOPS)
    world.must(wallet, world.usdc, "transfer", address(wallet), address(bare), i128(5))
    refused = world.refused(world.owner, bare, "init", *init_arguments(world, initial_balance=i128(6)))
    assert refused == error(VaultError.INITIAL_BALANCE_EXCEEDS_ON_LEDGER)
    assert world.must(world.owner, bare, "init", *init_arguments(world, initial_balance=i128(5))).value["balance"] == 5


def test_init_refuses_what_makes_no_sense(world: World, bare: str) -> None:
    itself = address(bare)
    for changes, wanted in (
        ({"usdc_token": itself}, VaultError.USDC_TOKEN_CANNOT_BE_VAULT),
        ({"revenue_pool": itself}, VaultError.REVENUE_POOL_CANNOT_BE_VAULT),
        ({"authorized_caller": itself}, VaultError.AUTHORIZED_CALLER_CANNOT_BE_VAULT),
        ({"initial_balance": i128(-1)}, VaultError.INITIAL_BALANCE_NEGATIVE),
        ({"min_deposit": i128(0)}, VaultError.MIN_DEPOSIT_NOT_POSITIVE),
        ({"max_deduct": i128(0)}, VaultError.MAX_DEDUCT_NOT_POSITIVE),
        ({"min_deposit": i128(9), "max_deduct": i128(8)}, VaultError.MIN_DEPOSIT_EXCEEDS_MAX_DEDUCT),
    ):
        assert world.refused(world.owner, bare, "init", *init_arguments(world, **changes)) == error(wanted), wanted
    world.must(world.owner, bare, "init", *init_arguments(world))
    assert world.refused(world.owner, bare, "init", *init_arguments(world)) == error(VaultError.ALREADY_INITIALIZED)


def test_a_vault_that_is_not_initialised_says_so(world: World, bare: str) -> None:
    wanted = error(VaultError.NOT_INITIALIZED)
    owner = address(world.owner)
    calls: list[tuple[str, list[xdr.SCVal]]] = [
        ("balance", []),
        ("get_meta", []),
        ("get_admin", []),
        ("get_usdc_token", []),
        ("is_authorized_depositor", [owner]),
        ("require_owner", [owner]),
        ("deposit", [owner, i128(1)]),
        ("deduct", [owner, i128(1), VOID, NO_LIMIT]),
        ("withdraw", [i128(1)]),
        ("pause", [owner]),
        ("transfer_ownership", [owner]),
    ]
    for name, arguments in calls:
        assert world.refused(world.owner, bare, name, *arguments) == wanted, name
    assert world.ask(bare, "get_max_deduct") == I128_MAX
    assert world.ask(bare, "is_paused") is False
    assert world.refused(world.owner, bare, "get_settlement") == error(VaultError.SETTLEMENT_NOT_SET)


def test_a_deposit_moves_the_tokens_and_tells_amount_and_balance(world: World, payer: Keypair) -> None:
    done = world.must(payer, world.vault, "deposit", address(payer), i128(25 * STROOPS))
    assert done.value == 25 * STROOPS
    assert done.events == [
        (("deposit", payer.public_key), [25 * STROOPS, 25 * STROOPS]),
        (("transfer", payer.public_key, world.vault, f"USDC:{world.places.issuer.public_key}"), 25 * STROOPS),
    ]
    assert world.ask(world.vault, "balance") == 25 * STROOPS
    assert world.ask(world.usdc, "balance", address(world.vault)) == 25 * STROOPS
    assert world.usdc_of(payer.public_key) == 75 * STROOPS


def test_a_deposit_is_refused_by_the_first_rule_that_it_breaks(world: World, payer: Keypair, bare: str) -> None:
    world.must(world.owner, bare, "init", *init_arguments(world, min_deposit=i128(100)))
    stranger = world.wallet("stranger", STROOPS)
    assert world.refused(stranger, world.vault, "deposit", address(stranger), i128(0)) == error(
        VaultError.AMOUNT_NOT_POSITIVE
    )
    assert world.refused(stranger, world.vault, "deposit", address(stranger), i128(1)) == error(VaultError.UNAUTHORIZED)
    assert world.refused(world.owner, bare, "deposit", address(world.owner), i128(99)) == error(
        VaultError.BELOW_MIN_DEPOSIT
    )
    # The token's own numbers come through unchanged: 10, not enough; 13, no trust line.
    assert world.refused(payer, world.vault, "deposit", address(payer), i128(101 * STROOPS)) == "Error(Contract, #10)"
    assert world.refused(world.owner, bare, "deposit", address(world.owner), i128(100)) == "Error(Contract, #13)"
    world.must(world.owner, world.vault, "pause", address(world.owner))
    assert world.refused(stranger, world.vault, "deposit", address(stranger), i128(0)) == error(VaultError.PAUSED)


def test_a_deposit_that_would_overflow_is_refused(world: World, bare: str, payer: Keypair) -> None:
    world.must(world.owner, bare, "init", *init_arguments(world))
    world.must(world.owner, bare, "set_allowed_depositor", address(world.owner), address(payer))
    world.must(payer, bare, "deposit", address(payer), i128(1))
    refused = world.refused(payer, bare, "deposit", address(payer), i128(I128_MAX))
    assert refused == error(VaultError.OVERFLOW)


def test_depositors_are_admitted_and_sent_away_by_the_owner_alone(world: World) -> None:
    wallet, vault, owner = world.wallet("wallet", 10), world.vault, address(world.owner)
    assert world.ask(vault, "is_authorized_depositor", owner) is True
    assert world.ask(vault, "is_authorized_depositor", address(wallet)) is False
    for name, arguments in (
        ("set_allowed_depositor", [address(wallet)]),
        ("add_address", [address(wallet)]),
        ("clear_allowed_depositors", []),
        ("clear_all", []),
    ):
        assert world.refused(wallet, vault, name, address(wallet), *arguments) == error(VaultError.UNAUTHORIZED), name
    assert world.must(world.owner, vault, "set_allowed_depositor", owner, address(wallet)).events == []
    world.must(world.owner, vault, "set_allowed_depositor", owner, address(wallet))
    assert world.ask(vault, "get_allowed_depositors") == [wallet.public_key]
    assert world.must(world.owner, vault, "set_allowed_depositor", owner, VOID).events == []
    assert world.ask(vault, "get_allowed_depositors") == []
    added = world.must(world.owner, vault, "add_address", owner, address(wallet))
    assert added.events == [(("allowlist_add", world.owner.public_key, wallet.public_key), None)]
    assert world.ask(vault, "get_allowlist") == [wallet.public_key]
    cleared = world.must(world.owner, vault, "clear_all", owner)
    assert cleared.events == [(("allowlist_clear", world.owner.public_key), None)]
    world.must(world.owner, vault, "add_address", owner, address(wallet))
    world.must(world.owner, vault, "clear_allowed_depositors", owner)
    assert world.ask(vault, "is_authorized_depositor", address(wallet)) is False


def test_a_deduction_goes_to_the_settlement_contracts_pool(funded: World) -> None:
    world = funded
    caller, amount, left = world.caller.public_key, 3 * STROOPS, 47 * STROOPS
    done = world.must(
        world.caller, world.vault, "deduct", address(caller), i128(amount), scval.to_symbol("r1"), NO_LIMIT
    )
    assert done.value == left
    usdc = f"USDC:{world.places.issuer.public_key}"
    received = {"from_vault": world.vault, "amount": amount, "to_pool": True, "developer": None}
    assert done.events == [
        (("transfer", world.vault, world.settlement, usdc), amount),
        (("payment_received", world.vault), received),
        (("deduct", caller, "r1"), [amount, left]),
    ]
    assert world.ask(world.vault, "balance") == left
    assert world.ask(world.settlement, "get_global_pool")["total_balance"] == amount
    assert world.ask(world.vault, "is_request_processed", scval.to_symbol("r1")) is True
    assert world.ask(world.vault, "is_request_processed", scval.to_symbol("r2")) is False


def test_a_deduction_without_an_id_tells_an_empty_symbol(funded: World) -> None:
    done = funded.must(funded.owner, funded.vault, "deduct", address(funded.owner), i128(1), VOID, NO_LIMIT)
    assert done.events[-1] == (("deduct", funded.owner.public_key, ""), [1, 50 * STROOPS - 1])


def test_a_deduction_is_refused_by_the_first_rule_that_it_breaks(funded: World, payer: Keypair) -> None:
    world, vault, owner = funded, funded.vault, address(funded.owner)
    world.must(world.owner, vault, "set_max_deduct", i128(60 * STROOPS))
    world.must(world.owner, vault, "deduct", owner, i128(1), scval.to_symbol("used"), NO_LIMIT)

    def refused(by: Keypair, amount: int, request: str | None = None, bps: int = 65535) -> str:
        named = scval.to_symbol(request) if request is not None else VOID
        return world.refused(by, vault, "deduct", address(by), i128(amount), named, scval.to_uint32(bps))

    assert refused(payer, 0) == error(VaultError.AMOUNT_NOT_POSITIVE)
    assert refused(payer, 61 * STROOPS) == error(VaultError.UNAUTHORIZED)
    assert refused(world.caller, 61 * STROOPS, "used") == error(VaultError.EXCEEDS_MAX_DEDUCT)
    assert refused(world.caller, 55 * STROOPS, "used") == error(VaultError.DUPLICATE_REQUEST_ID)
    assert refused(world.caller, 55 * STROOPS, bps=0) == error(VaultError.INSUFFICIENT_BALANCE)
    assert refused(world.caller, 25 * STROOPS, bps=100) == error(VaultError.SLIPPAGE)
    world.must(world.owner, vault, "pause", owner)
    assert refused(payer, 0) == error(VaultError.PAUSED)


def test_without_a_settlement_address_nothing_is_deducted(world: World, bare: str, payer: Keypair) -> None:
    world.must(world.owner, bare, "init", *init_arguments(world))
    world.must(world.owner, bare, "set_allowed_depositor", address(world.owner), address(payer))
    world.must(payer, bare, "deposit", address(payer), i128(10))
    owner = address(world.owner)
    wanted = error(VaultError.SETTLEMENT_NOT_SET)
    assert world.refused(world.owner, bare, "deduct", owner, i128(1), VOID, NO_LIMIT) == wanted
    assert world.refused(world.owner, bare, "batch_deduct", owner, scval.to_vec([item(1, None)])) == wanted
    done = world.must(world.owner, bare, "set_settlement", owner, address(world.settlement))
    assert done.events == [(("set_settlement", world.owner.public_key), world.settlement)]
    # The settlement contract knows one vault, and this is another: its number, 3, comes through.
    assert world.refused(world.owner, bare, "deduct", owner, i128(1), VOID, NO_LIMIT) == "Error(Contract, #3)"


def test_a_batch_is_one_transfer_and_one_event_an_item_with_the_final_balance(funded: World) -> None:
    world, caller = funded, funded.caller.public_key
    items = scval.to_vec([item(1 * STROOPS, "a"), item(2 * STROOPS, "b"), item(3 * STROOPS, None)])
    done = world.must(world.caller, world.vault, "batch_deduct", address(caller), items)
    left = 44 * STROOPS
    assert done.value == left
    assert [event for event in done.events if event[0][0] == "transfer"] == [
        (("transfer", world.vault, world.settlement, f"USDC:{world.places.issuer.public_key}"), 6 * STROOPS)
    ]
    assert done.events[-3:] == [
        (("deduct", caller, "a"), [1 * STROOPS, left]),
        (("deduct", caller, "b"), [2 * STROOPS, left]),
        (("deduct", caller, ""), [3 * STROOPS, left]),
    ]


def test_a_batch_of_fifty_fits_a_transaction_and_one_more_is_refused(funded: World) -> None:
    world, caller = funded, address(funded.caller)
    fifty = [item(1, f"id{number:030d}") for number in range(50)]
    assert world.must(world.caller, world.vault, "batch_deduct", caller, scval.to_vec(fifty)).value == 50 * STROOPS - 50
    more = [item(1, f"more{number}") for number in range(51)]
    refused = world.refused(world.caller, world.vault, "batch_deduct", caller, scval.to_vec(more))
    assert refused == error(VaultError.BATCH_TOO_LARGE)


def test_a_batch_is_refused_whole_by_the_first_rule_that_an_item_breaks(funded: World, payer: Keypair) -> None:
    world, vault, owner = funded, funded.vault, address(funded.owner)
    world.must(world.owner, vault, "set_max_deduct", i128(40 * STROOPS))
    world.must(world.owner, vault, "deduct", owner, i128(1), scval.to_symbol("used"), NO_LIMIT)

    def refused(by: Keypair, *items: xdr.SCVal) -> str:
        return world.refused(by, vault, "batch_deduct", address(by), scval.to_vec(list(items)))

    sound = item(1, "sound")
    assert refused(payer) == error(VaultError.UNAUTHORIZED)
    assert refused(world.caller) == error(VaultError.BATCH_EMPTY)
    assert refused(world.caller, sound, item(0, "used")) == error(VaultError.AMOUNT_NOT_POSITIVE)
    assert refused(world.caller, sound, item(41 * STROOPS, "used")) == error(VaultError.EXCEEDS_MAX_DEDUCT)
    first = item(40 * STROOPS, "first")
    assert refused(world.caller, first, item(40 * STROOPS, "used")) == error(VaultError.INSUFFICIENT_BALANCE)
    assert refused(world.caller, sound, item(1, "used")) == error(VaultError.DUPLICATE_REQUEST_ID)
    assert refused(world.caller, sound, sound) == error(VaultError.DUPLICATE_REQUEST_ID)
    assert world.ask(vault, "balance") == 50 * STROOPS - 1
    assert world.ask(vault, "is_request_processed", scval.to_symbol("sound")) is False


def test_the_owner_forgets_request_ids(funded: World) -> None:
    world, owner = funded, address(funded.owner)
    world.must(world.owner, world.vault, "deduct", owner, i128(1), scval.to_symbol("r1"), NO_LIMIT)
    ids = scval.to_vec([scval.to_symbol("r1"), scval.to_symbol("r2")])
    caller = address(world.caller)
    assert world.refused(world.caller, world.vault, "prune_processed_requests", caller, ids) == error(
        VaultError.UNAUTHORIZED
    )
    done = world.must(world.owner, world.vault, "prune_processed_requests", owner, ids)
    assert done.events == [(("request_id_pruned", world.owner.public_key), "r1")]
    assert world.ask(world.vault, "is_request_processed", scval.to_symbol("r1")) is False


def test_the_owner_withdraws_also_while_paused(funded: World) -> None:
    world, vault, owner = funded, funded.vault, funded.owner.public_key
    other = world.wallet("other", 0)
    world.must(world.owner, vault, "pause", address(owner))
    done = world.must(world.owner, vault, "withdraw_to", address(other), i128(2 * STROOPS))
    assert done.value == 48 * STROOPS
    assert done.events[-1] == (("withdraw_to", owner, other.public_key), [2 * STROOPS, 48 * STROOPS])
    assert world.usdc_of(other.public_key) == 2 * STROOPS
    for name, arguments in (("withdraw", []), ("withdraw_to", [address(other)])):
        assert world.refused(world.owner, vault, name, *arguments, i128(0)) == error(VaultError.AMOUNT_NOT_POSITIVE)
        refused = world.refused(world.owner, vault, name, *arguments, i128(49 * STROOPS))
        assert refused == error(VaultError.INSUFFICIENT_BALANCE)
    # The owner's own account has no trust line: the token's number.
    assert world.refused(world.owner, vault, "withdraw", i128(1)) == "Error(Contract, #13)"


def test_withdraw_pays_the_owner(world: World, bare: str) -> None:
    owner = world.wallet("an owner", 30)
    world.must(owner, bare, "init", *init_arguments(world, owner=address(owner)))
    world.must(owner, bare, "deposit", address(owner), i128(30))
    done = world.must(owner, bare, "withdraw", i128(10))
    assert done.value == 20
    assert done.events[-1] == (("withdraw", owner.public_key), [10, 20])
    assert world.usdc_of(owner.public_key) == 10


def test_distribute_pays_from_what_is_there_and_leaves_the_accounts_alone(funded: World) -> None:
    world, vault, owner = funded, funded.vault, address(funded.owner)
    other = world.wallet("other", 0)
    caller = address(world.caller)
    assert world.refused(world.caller, vault, "distribute", caller, address(other), i128(1)) == error(
        VaultError.UNAUTHORIZED
    )
    for amount, wanted in ((0, VaultError.AMOUNT_NOT_POSITIVE), (51 * STROOPS, VaultError.INSUFFICIENT_BALANCE)):
        refused = world.refused(world.owner, vault, "distribute", owner, address(other), i128(amount))
        assert refused == error(wanted)
    done = world.must(world.owner, vault, "distribute", owner, address(other), i128(5))
    assert done.events[0] == (("distribute", other.public_key), 5)
    assert world.ask(vault, "balance") == 50 * STROOPS
    assert world.ask(world.usdc, "balance", address(vault)) == 50 * STROOPS - 5


def test_the_authorized_caller_changes_with_its_nonce(world: World) -> None:
    vault, owner = world.vault, world.owner.public_key
    assert world.ask(vault, "get_authorized_caller_nonce") == 0
    new = Keypair.random().public_key
    wrong = (address(new), scval.to_uint64(1))
    assert world.refused(world.owner, vault, "set_authorized_caller", *wrong) == error(VaultError.STALE_NONCE)
    itself = (address(vault), scval.to_uint64(0))
    assert world.refused(world.owner, vault, "set_authorized_caller", *itself) == error(
        VaultError.AUTHORIZED_CALLER_CANNOT_BE_VAULT
    )
    done = world.must(world.owner, vault, "set_authorized_caller", address(new), scval.to_uint64(0))
    assert done.events == [(("set_authorized_caller", owner), [world.caller.public_key, new, 0])]
    assert world.ask(vault, "get_meta")["authorized_caller"] == new
    world.must(world.owner, vault, "set_authorized_caller", VOID, scval.to_uint64(1))
    assert world.ask(vault, "get_authorized_caller_nonce") == 2
    assert world.refused(world.caller, vault, "deduct", address(world.caller), i128(1), VOID, NO_LIMIT) == error(
        VaultError.UNAUTHORIZED
    )


def test_the_most_that_a_deduction_takes_is_the_owners_to_say(world: World) -> None:
    assert world.refused(world.owner, world.vault, "set_max_deduct", i128(0)) == error(
        VaultError.MAX_DEDUCT_NOT_POSITIVE
    )
    done = world.must(world.owner, world.vault, "set_max_deduct", i128(5))
    assert done.events == [(("set_max_deduct", world.owner.public_key), [I128_MAX, 5])]
    assert world.ask(world.vault, "get_max_deduct") == 5


def test_pausing_is_told_and_is_no_habit(world: World) -> None:
    vault, owner, caller = world.vault, address(world.owner), address(world.caller)
    assert world.refused(world.caller, vault, "pause", caller) == error(VaultError.UNAUTHORIZED)
    assert world.refused(world.owner, vault, "unpause", owner) == error(VaultError.NOT_PAUSED)
    assert world.must(world.owner, vault, "pause", owner).events == [(("vault_paused", world.owner.public_key), None)]
    assert world.ask(vault, "is_paused") is True
    assert world.refused(world.owner, vault, "pause", owner) == error(VaultError.ALREADY_PAUSED)
    done = world.must(world.owner, vault, "unpause", owner)
    assert done.events == [(("vault_unpaused", world.owner.public_key), None)]


def test_the_administrator_changes_in_two_steps(world: World) -> None:
    vault, owner, new = world.vault, world.owner.public_key, world.wallet("new admin")
    assert world.refused(new, vault, "accept_admin") == error(VaultError.NO_ADMIN_TRANSFER_PENDING)
    assert world.refused(new, vault, "set_admin", address(new), address(new)) == error(VaultError.UNAUTHORIZED)
    done = world.must(world.owner, vault, "set_admin", address(owner), address(new))
    assert done.events == [(("admin_nominated", owner, new.public_key), None)]
    assert world.ask(vault, "get_pending_admin") == new.public_key
    done = world.must(new, vault, "accept_admin")
    assert done.events == [(("admin_accepted", owner, new.public_key), None)]
    assert world.ask(vault, "get_admin") == new.public_key
    assert world.ask(vault, "get_pending_admin") is None
    assert world.refused(world.owner, vault, "set_settlement", address(owner), address(owner)) == error(
        VaultError.UNAUTHORIZED
    )


def test_the_owner_changes_in_two_steps(world: World) -> None:
    vault, owner, new = world.vault, world.owner.public_key, world.wallet("new owner")
    assert world.refused(new, vault, "accept_ownership") == error(VaultError.NO_OWNERSHIP_TRANSFER_PENDING)
    assert world.refused(world.owner, vault, "transfer_ownership", address(owner)) == error(
        VaultError.NEW_OWNER_SAME_AS_CURRENT
    )
    done = world.must(world.owner, vault, "transfer_ownership", address(new))
    assert done.events == [(("ownership_nominated", owner, new.public_key), None)]
    assert world.ask(vault, "get_pending_owner") == new.public_key
    done = world.must(new, vault, "accept_ownership")
    assert done.events == [(("ownership_accepted", owner, new.public_key), None)]
    assert world.ask(vault, "get_meta")["owner"] == new.public_key
    assert world.refused(world.owner, vault, "require_owner", address(owner)) == error(VaultError.UNAUTHORIZED)


def test_the_revenue_pool_changes_in_two_steps(world: World) -> None:
    vault, owner, pool = world.vault, world.owner.public_key, world.wallet("pool")
    none_pending = error(VaultError.NO_REVENUE_POOL_TRANSFER_PENDING)
    assert world.refused(pool, vault, "accept_revenue_pool") == none_pending
    assert world.refused(world.owner, vault, "cancel_revenue_pool") == none_pending
    assert world.refused(world.owner, vault, "propose_revenue_pool", address(vault)) == error(
        VaultError.REVENUE_POOL_CANNOT_BE_VAULT
    )
    done = world.must(world.owner, vault, "propose_revenue_pool", address(pool))
    assert done.events == [(("revenue_pool_proposed", owner, pool.public_key), None)]
    assert world.ask(vault, "get_pending_revenue_pool") == pool.public_key
    done = world.must(pool, vault, "accept_revenue_pool")
    assert done.events == [(("revenue_pool_accepted", None, pool.public_key), None)]
    assert world.ask(vault, "get_revenue_pool") == pool.public_key
    assert world.refused(world.owner, vault, "propose_revenue_pool", address(pool)) == error(
        VaultError.NEW_REVENUE_POOL_SAME_AS_CURRENT
    )
    world.must(world.owner, vault, "propose_revenue_pool", VOID)
    done = world.must(world.owner, vault, "cancel_revenue_pool")
    assert done.events == [(("revenue_pool_cancelled", owner, None), None)]
    world.must(world.owner, vault, "propose_revenue_pool", VOID)
    assert world.must(world.owner, vault, "accept_revenue_pool").events == [
        (("revenue_pool_accepted", pool.public_key, None), None)
    ]
    assert world.ask(vault, "get_revenue_pool") is None


def test_prices_are_kept_listed_and_forgotten(world: World) -> None:
    vault, owner = world.vault, address(world.owner)
    done = world.must(world.owner, vault, "set_price", owner, text("weather"), text("100"))
    assert done.events == [(("price_set", world.owner.public_key, "weather"), "100")]
    world.must(world.owner, vault, "set_price", owner, text("maps"), text("+7"))
    world.must(world.owner, vault, "set_price", owner, text("weather"), text("200"))
    assert world.ask(vault, "get_price", text("weather")) == "200"
    assert world.ask(vault, "get_price", text("nothing")) is None
    assert world.ask(vault, "list_prices", scval.to_uint32(0), scval.to_uint32(1000)) == [["weather", 200], ["maps", 7]]
    assert world.ask(vault, "list_prices", scval.to_uint32(1), scval.to_uint32(1)) == [["maps", 7]]
    assert world.ask(vault, "list_prices", scval.to_uint32(2), scval.to_uint32(1)) == []
    done = world.must(world.owner, vault, "remove_price", owner, text("weather"))
    assert done.events == [(("price_removed", world.owner.public_key, "weather"), None)]
    world.must(world.owner, vault, "remove_price", owner, text("maps"))
    assert world.ask(vault, "list_prices", scval.to_uint32(0), scval.to_uint32(9)) == []


def test_metadata_is_kept_changed_and_forgotten(world: World) -> None:
    vault, owner = world.vault, address(world.owner)
    done = world.must(world.owner, vault, "set_metadata", owner, text("weather"), text("cid1"))
    assert done.value == "cid1"
    assert done.events == [(("metadata_set", "weather", world.owner.public_key), "cid1")]
    done = world.must(world.owner, vault, "update_metadata", owner, text("weather"), text("cid2"))
    assert done.events == [(("metadata_updated", "weather", world.owner.public_key), ["cid1", "cid2"])]
    assert world.ask(vault, "get_metadata", text("weather")) == "cid2"
    done = world.must(world.owner, vault, "remove_metadata", owner, text("weather"))
    assert done.events == [(("metadata_removed", "weather", world.owner.public_key), None)]
    assert world.ask(vault, "get_metadata", text("weather")) is None


def test_offerings_are_refused_by_the_first_rule_that_they_break(world: World) -> None:
    vault, owner = world.vault, address(world.owner)
    long_id, long_data = text("o" * 65), text("m" * 257)

    def refused(name: str, *arguments: xdr.SCVal) -> str:
        return world.refused(world.owner, vault, name, owner, *arguments)

    for broken in ("", " a", "a ", "a\x00b", "a\x7f"):
        assert refused("set_price", text(broken), text("1")) == error(VaultError.OFFERING_ID_INVALID), broken
        assert refused("set_metadata", text("a"), text(broken)) == error(VaultError.METADATA_INVALID), broken
    assert refused("set_metadata", text(""), text("m")) == error(VaultError.OFFERING_ID_INVALID)
    assert refused("set_price", long_id, text("x")) == error(VaultError.OFFERING_ID_TOO_LONG)
    assert refused("set_metadata", long_id, text("m")) == error(VaultError.OFFERING_ID_TOO_LONG)
    assert refused("remove_price", long_id) == error(VaultError.OFFERING_ID_TOO_LONG)
    assert refused("remove_metadata", long_id) == error(VaultError.OFFERING_ID_TOO_LONG)
    assert refused("update_metadata", long_id, text("m")) == error(VaultError.OFFERING_ID_TOO_LONG)
    assert refused("update_metadata", text("a"), long_data) == error(VaultError.METADATA_TOO_LONG)
    for price in ("", "0", "-1", "1.5", "x", "1_0", str(2**127)):
        assert refused("set_price", text("a"), text(price)) == error(VaultError.PRICE_PARSE_ERROR), price
    # Longer than the buffers that the contract copies into: it panics.
    assert refused("set_metadata", text("a"), long_data) == "Error(WasmVm, InvalidAction)"
    assert refused("set_price", text("a"), text("1" * 65)) == "Error(WasmVm, InvalidAction)"
    caller = address(world.caller)
    assert world.refused(world.caller, vault, "set_price", caller, text("a"), text("1")) == error(
        VaultError.UNAUTHORIZED
    )


def test_the_administrator_may_say_something(world: World) -> None:
    vault, owner = world.vault, address(world.owner)
    severity = scval.to_vec([scval.to_symbol("Warn")])
    done = world.must(world.owner, vault, "broadcast", owner, severity, text("hello"))
    assert done.events == [
        (("admin_broadcast", world.owner.public_key), {"message": "hello", "severity": ["Warn"]}),
    ]
    for message in ("", "m" * 257):
        refused = world.refused(world.owner, vault, "broadcast", owner, severity, text(message))
        assert refused == error(VaultError.METADATA_TOO_LONG)
    unknown = scval.to_vec([scval.to_symbol("Loud")])
    assert world.refused(world.owner, vault, "broadcast", owner, unknown, text("m")) == "Error(WasmVm, InvalidAction)"


def test_no_version_was_installed_by_an_upgrade(world: World) -> None:
    assert world.ask(world.vault, "get_version") is None


def test_the_error_numbers_are_those_of_the_interface() -> None:
    assert [int(number) for number in VaultError] == list(range(1, 36))


def test_an_argument_of_another_type_or_number_traps(world: World) -> None:
    owner = address(world.owner)
    assert (
        world.refused(world.owner, world.vault, "deposit", owner, scval.to_uint64(1)) == "Error(WasmVm, InvalidAction)"
    )
    assert world.refused(world.owner, world.vault, "deposit", owner) == "Error(WasmVm, UnexpectedSize)"
    assert world.refused(world.owner, world.vault, "no_such") == "Error(WasmVm, MissingValue)"
    muxed = MuxedAccount(world.owner.public_key, 1).account_muxed
    assert muxed is not None
    refused = world.refused(world.owner, world.vault, "is_authorized_depositor", address(muxed))
    assert refused == "Error(WasmVm, InvalidAction)"
