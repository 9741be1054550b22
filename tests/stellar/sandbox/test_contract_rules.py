"""What the network checks around a contract call: consent, footprint, resources, fees, lives and restoring."""

import hashlib

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stellar_sdk import (
    ExtendFootprintTTL,
    FeeBumpTransactionEnvelope,
    InvokeHostFunction,
    Keypair,
    RestoreFootprint,
    SetOptions,
    Signer,
    TextMemo,
    TransactionBuilder,
    TransactionEnvelope,
    scval,
    xdr,
)
from stellar_sdk.auth import authorize_entry, authorize_invocation
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.soroban.machine import SorobanMachine
from callora.stellar.sandbox.soroban.simulation import Simulation, SimulationFailed
from callora.stellar.sandbox.soroban.storage import PERSISTENT, data_ledger_key, instance_ledger_key
from callora.stellar.sandbox.state import Transaction, Undecodable, key_bytes
from callora.stellar.sandbox.transactions import decode
from tests.support.contracts import FEE, SHORT, STROOPS, Done, World, address, i128, invoke, refused_code


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def payer(world: World) -> Keypair:
    """A wallet with 100 USDC that may deposit."""
    return world.depositor("payer", 100 * STROOPS)


@pytest.fixture
def sponsor(world: World) -> Keypair:
    """Somebody with XLM."""
    return world.wallet("sponsor")


def deposit(world: World, payer: Keypair, amount: int = STROOPS) -> xdr.HostFunction:
    return invoke(world.vault, "deposit", address(payer), i128(amount))


def simulated(found: Simulation | SimulationFailed) -> Simulation:
    assert isinstance(found, Simulation), found
    return found


def sent(
    world: World,
    source: Keypair,
    function: xdr.HostFunction,
    auth: list[xdr.SorobanAuthorizationEntry],
    data: xdr.SorobanTransactionData,
) -> Done:
    return world.apply(world.envelope(source, InvokeHostFunction(function, auth), data=data))


def auth_error(done: Done) -> str:
    """Return the error with which a call trapped."""
    assert done.operation == "TRAPPED", done
    for text in done.included.diagnostics:
        body = xdr.DiagnosticEvent.from_xdr(text).event.body.v0
        assert body is not None
        for topic in body.topics:
            if topic.error is not None:
                assert topic.error.code is not None
                return f"{topic.error.type.name[4:]} {topic.error.code.name[5:]}"
    raise AssertionError("no error was told")


# Consent.


def test_the_source_of_a_transaction_consents_by_signing_it(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    (entry,) = found.auth
    assert entry.credentials.type == xdr.SorobanCredentialsType.SOROBAN_CREDENTIALS_SOURCE_ACCOUNT
    (transfer,) = entry.root_invocation.sub_invocations
    assert transfer.function.contract_fn is not None
    assert transfer.function.contract_fn.function_name.sc_symbol == b"transfer"
    assert sent(world, payer, deposit(world, payer), list(found.auth), found.data).succeeded


@pytest.mark.parametrize("upgraded", [True, False])
def test_another_account_consents_by_its_own_signature(
    world: World, payer: Keypair, sponsor: Keypair, upgraded: bool
) -> None:
    envelope = world.prepare(deposit(world, payer), sponsor, authorizers=[payer], upgraded=upgraded)
    paid = world.xlm_of(payer.public_key)
    assert world.apply(envelope).succeeded
    assert world.xlm_of(payer.public_key) == paid
    assert world.ask(world.vault, "balance") == STROOPS


def test_the_operations_own_source_consents_by_signing_the_transaction(
    world: World, payer: Keypair, sponsor: Keypair
) -> None:
    operation = InvokeHostFunction(deposit(world, payer), source=payer.public_key)
    plain = world.envelope(sponsor, operation)
    found = trial(world, plain)
    assert found.auth[0].credentials.type == xdr.SorobanCredentialsType.SOROBAN_CREDENTIALS_SOURCE_ACCOUNT
    operation = InvokeHostFunction(deposit(world, payer), list(found.auth), source=payer.public_key)
    envelope = world.envelope(sponsor, operation, data=found.data, signers=[payer])
    assert world.apply(envelope).succeeded


def decoded(world: World, envelope: TransactionEnvelope) -> Transaction:
    found = decode(envelope.to_xdr(), world.ledger.network_id)
    assert not isinstance(found, Undecodable)
    return found


def trial(world: World, envelope: TransactionEnvelope) -> Simulation:
    """Return what the simulation of a whole transaction says."""
    return simulated(world.simulator.simulate(world.ledger.state, world.ledger.context(), decoded(world, envelope)))


def test_a_call_without_the_entry_that_it_needs_is_refused(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    assert auth_error(sent(world, payer, deposit(world, payer), [], found.data)) == "AUTH INVALID_ACTION"


def test_consent_to_the_call_is_no_consent_to_the_transfer_below_it(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    (entry,) = found.auth
    root = xdr.SorobanAuthorizedInvocation(entry.root_invocation.function, [])
    bare = xdr.SorobanAuthorizationEntry(entry.credentials, root)
    assert auth_error(sent(world, payer, deposit(world, payer), [bare], found.data)) == "AUTH INVALID_ACTION"


def test_consent_to_other_arguments_is_none(world: World, payer: Keypair) -> None:
    small = simulated(world.simulate(deposit(world, payer, 1), payer))
    large = deposit(world, payer, 2)
    assert auth_error(sent(world, payer, large, list(small.auth), small.data)) == "AUTH INVALID_ACTION"


def test_a_signed_entry_works_once(world: World, payer: Keypair, sponsor: Keypair) -> None:
    function = deposit(world, payer)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 50
    signed = [authorize_entry(entry, payer, until, world.passphrase) for entry in found.auth]
    assert sent(world, sponsor, function, signed, found.data).succeeded
    assert auth_error(sent(world, sponsor, function, signed, found.data)) == "AUTH EXISTING_VALUE"
    assert world.ask(world.vault, "balance") == STROOPS


def test_a_signed_entry_is_void_after_its_ledger(world: World, payer: Keypair, sponsor: Keypair) -> None:
    function = deposit(world, payer)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 1
    signed = [authorize_entry(entry, payer, until, world.passphrase) for entry in found.auth]
    world.close()
    assert auth_error(sent(world, sponsor, function, signed, found.data)) == "AUTH INVALID_INPUT"


def test_a_signature_of_another_key_or_for_another_network_is_refused(
    world: World, payer: Keypair, sponsor: Keypair
) -> None:
    function = deposit(world, payer)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 50
    foreign = [authorize_entry(entry, payer, until, "Another network") for entry in found.auth]
    assert auth_error(sent(world, sponsor, function, foreign, found.data)) == "AUTH INVALID_ACTION"
    wrong = [authorize_entry(entry, sponsor, until, world.passphrase) for entry in found.auth]
    assert auth_error(sent(world, sponsor, function, wrong, found.data)) == "AUTH INVALID_ACTION"
    unsigned = [expiring(entry, until) for entry in found.auth]
    assert auth_error(sent(world, sponsor, function, unsigned, found.data)) == "AUTH INVALID_ACTION"


def expiring(entry: xdr.SorobanAuthorizationEntry, until: int) -> xdr.SorobanAuthorizationEntry:
    """Return an entry with an expiration, and unsigned all the same."""
    made = xdr.SorobanAuthorizationEntry.from_xdr(entry.to_xdr())
    credentials = made.credentials.address or made.credentials.address_v2
    assert credentials is not None
    credentials.signature_expiration_ledger = xdr.Uint32(until)
    return made


def test_an_accounts_signers_must_reach_its_medium_threshold(world: World, payer: Keypair, sponsor: Keypair) -> None:
    second = Keypair.random()
    options = SetOptions(
        master_weight=1,
        low_threshold=1,
        med_threshold=2,
        high_threshold=2,
        signer=Signer.ed25519_public_key(second.public_key, 1),
    )
    assert world.apply(world.envelope(payer, options)).succeeded
    function = deposit(world, payer)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 50
    alone = [authorize_entry(entry, payer, until, world.passphrase) for entry in found.auth]
    assert auth_error(sent(world, sponsor, function, alone, found.data)) == "AUTH INVALID_ACTION"

    def both(preimage: xdr.HashIDPreimage) -> xdr.SCVal:
        payload = hashlib.sha256(preimage.to_xdr_bytes()).digest()
        keys = sorted((payer, second), key=lambda key: key.raw_public_key())
        return scval.to_vec(
            [
                scval.to_map(
                    {
                        scval.to_symbol("public_key"): scval.to_bytes(key.raw_public_key()),
                        scval.to_symbol("signature"): scval.to_bytes(key.sign(payload)),
                    }
                )
                for key in keys
            ]
        )

    together = [authorize_entry(entry, both, until, world.passphrase) for entry in found.auth]
    # What was recorded counted on one signature. With both there, the node says what they cost.
    assert sent(world, sponsor, function, together, found.data).operation == "RESOURCE_LIMIT_EXCEEDED"
    enforced = simulated(world.simulate(function, sponsor, auth=together))
    assert sent(world, sponsor, function, together, enforced.data).succeeded


def test_an_entry_made_without_simulation_is_as_good(world: World, payer: Keypair, sponsor: Keypair) -> None:
    function = deposit(world, payer)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 50
    own = [
        authorize_invocation(payer, payer.public_key, until, entry.root_invocation, world.passphrase)
        for entry in found.auth
    ]
    enforced = simulated(world.simulate(function, sponsor, auth=own))
    assert [entry.to_xdr() for entry in enforced.auth] == [entry.to_xdr() for entry in own]
    assert sent(world, sponsor, function, own, enforced.data).succeeded


def test_simulation_enforces_the_entries_that_it_is_given(world: World, payer: Keypair, sponsor: Keypair) -> None:
    function = deposit(world, payer)
    entries = simulated(world.simulate(function, sponsor)).auth
    failed = world.simulate(function, sponsor, auth=entries)
    assert isinstance(failed, SimulationFailed)
    assert failed.error.startswith("HostError: Error(Auth, ")
    conflict = world.simulate(function, sponsor, auth=entries, mode="record")
    assert conflict == SimulationFailed("cannot set authMode to 'record' with an auth footprint")
    nothing = world.simulate(function, payer, mode="enforce")
    assert isinstance(nothing, SimulationFailed)


def test_a_memo_is_refused_where_somebody_else_consents(world: World, payer: Keypair, sponsor: Keypair) -> None:
    prepared = world.prepare(deposit(world, payer), sponsor, authorizers=[payer])
    prepared.transaction.memo = TextMemo("hello")
    prepared.signatures = []
    prepared.sign(sponsor)
    assert refused_code(world.submit(prepared)) == "txSOROBAN_INVALID"


# What a transaction declares.


def test_a_contract_call_needs_its_footprint_and_fee(world: World, payer: Keypair) -> None:
    bare = world.envelope(payer, InvokeHostFunction(deposit(world, payer)))
    assert refused_code(world.submit(bare)) == "txMALFORMED"
    found = simulated(world.simulate(deposit(world, payer), payer))
    operation = InvokeHostFunction(deposit(world, payer), list(found.auth))

    def refused(**changes: int) -> str:
        resources = xdr.SorobanResources(
            found.data.resources.footprint,
            xdr.Uint32(changes.get("instructions", found.data.resources.instructions.uint32)),
            xdr.Uint32(changes.get("disk_read_bytes", found.data.resources.disk_read_bytes.uint32)),
            xdr.Uint32(changes.get("write_bytes", found.data.resources.write_bytes.uint32)),
        )
        fee = xdr.Int64(changes.get("fee", 10 * STROOPS))
        data = xdr.SorobanTransactionData(found.data.ext, resources, fee)
        return refused_code(world.submit(world.envelope(payer, operation, data=data)))

    assert refused(instructions=400_000_001) == "txSOROBAN_INVALID"
    assert refused(disk_read_bytes=200_001) == "txSOROBAN_INVALID"
    assert refused(write_bytes=132_097) == "txSOROBAN_INVALID"
    assert refused(fee=1000) == "txSOROBAN_INVALID"
    two = world.envelope(payer, operation, operation, data=found.data)
    assert refused_code(world.submit(two)) == "txMALFORMED"


def test_a_footprint_names_each_key_once(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    footprint = found.data.resources.footprint
    doubled = xdr.LedgerFootprint([*footprint.read_only, footprint.read_write[0]], list(footprint.read_write))
    envelope = world.envelope(
        payer,
        InvokeHostFunction(deposit(world, payer), list(found.auth)),
        data=_data(found.data, footprint=doubled, fee=10 * STROOPS),
    )
    assert refused_code(world.submit(envelope)) == "txSOROBAN_INVALID"


def _data(
    data: xdr.SorobanTransactionData,
    *,
    footprint: xdr.LedgerFootprint | None = None,
    instructions: int | None = None,
    write_bytes: int | None = None,
    disk_read_bytes: int | None = None,
    fee: int | None = None,
) -> xdr.SorobanTransactionData:
    old = data.resources
    resources = xdr.SorobanResources(
        footprint or old.footprint,
        old.instructions if instructions is None else xdr.Uint32(instructions),
        old.disk_read_bytes if disk_read_bytes is None else xdr.Uint32(disk_read_bytes),
        old.write_bytes if write_bytes is None else xdr.Uint32(write_bytes),
    )
    return xdr.SorobanTransactionData(data.ext, resources, data.resource_fee if fee is None else xdr.Int64(fee))


def test_what_is_outside_the_footprint_cannot_be_touched(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    footprint = found.data.resources.footprint
    smaller = xdr.LedgerFootprint(list(footprint.read_only), list(footprint.read_write[1:]))
    data = _data(found.data, footprint=smaller, fee=10 * STROOPS)
    done = sent(world, payer, deposit(world, payer), list(found.auth), data)
    assert auth_error(done) == "STORAGE EXCEEDED_LIMIT"


@pytest.mark.parametrize("resource", ["instructions", "write_bytes", "disk_read_bytes"])
def test_more_than_was_declared_is_not_given(world: World, payer: Keypair, resource: str) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    less = {"instructions": 1_000_000, "write_bytes": 300, "disk_read_bytes": 20}[resource]
    data = _data(found.data, **{resource: less})  # type: ignore[arg-type]
    before = world.sequence_of(payer.public_key)
    done = sent(world, payer, deposit(world, payer), list(found.auth), data)
    assert done.operation == "RESOURCE_LIMIT_EXCEEDED"
    assert done.code == "txFAILED"
    assert world.sequence_of(payer.public_key) == before + 1
    assert world.ask(world.vault, "balance") == 0


def test_a_state_that_grew_since_the_simulation_needs_another_one(world: World, payer: Keypair) -> None:
    prepared = world.prepare(deposit(world, payer), payer)
    for _ in range(3):
        newcomer = address(Keypair.random())
        world.must(world.owner, world.vault, "set_allowed_depositor", address(world.owner), newcomer)
    assert world.apply(prepared).operation == "RESOURCE_LIMIT_EXCEEDED"
    assert world.apply(world.prepare(deposit(world, payer), payer)).succeeded


def least_admitted(
    world: World, source: Keypair, operation: Operation, data: xdr.SorobanTransactionData
) -> xdr.SorobanTransactionData:
    """Return data with the least fee that is admitted: it has nothing for rent and events."""
    machine = SorobanMachine(world.limits)
    low, high = 0, data.resource_fee.int64
    while high - low > 1:
        middle = (low + high) // 2
        envelope = world.envelope(source, operation, data=_data(data, fee=middle))
        refused = machine.check(world.ledger.state, decoded(world, envelope))
        low, high = (low, middle) if refused is None else (middle, high)
    return _data(data, fee=high)


def test_rent_and_events_must_fit_what_the_fee_has_for_them(world: World, payer: Keypair) -> None:
    found = simulated(world.simulate(deposit(world, payer), payer))
    operation = InvokeHostFunction(deposit(world, payer), list(found.auth))
    poor = least_admitted(world, payer, operation, found.data)
    assert world.apply(world.envelope(payer, operation, data=poor)).operation == "INSUFFICIENT_REFUNDABLE_FEE"


def test_what_is_not_used_of_the_fee_goes_back(world: World, payer: Keypair) -> None:
    prepared = world.prepare(deposit(world, payer), payer)
    data = prepared.transaction.soroban_data
    assert data is not None
    generous = _data(data, fee=data.resource_fee.int64 + 5 * STROOPS)
    envelope = world.envelope(payer, prepared.transaction.operations[0], data=generous)
    before = world.xlm_of(payer.public_key)
    done = world.apply(envelope)
    assert done.succeeded
    paid = before - world.xlm_of(payer.public_key)
    charged = xdr.TransactionResult.from_xdr(done.included.result).fee_charged.int64
    assert paid == charged < data.resource_fee.int64 + FEE
    meta = xdr.TransactionMeta.from_xdr(done.included.meta).v4
    assert meta is not None
    assert meta.soroban_meta is not None
    told = meta.soroban_meta.ext.v1
    assert told is not None
    inclusion = 100
    parts = told.total_non_refundable_resource_fee_charged.int64 + told.total_refundable_resource_fee_charged.int64
    assert parts + inclusion == charged


def test_a_call_that_traps_pays_for_what_it_declared_only(world: World, payer: Keypair) -> None:
    prepared = world.prepare(deposit(world, payer, 60 * STROOPS), payer)
    later = world.prepare(deposit(world, payer, 50 * STROOPS), payer)
    assert world.apply(prepared).succeeded
    again = world.envelope(payer, later.transaction.operations[0], data=later.transaction.soroban_data)
    done = world.apply(again)
    assert (done.code, done.operation, done.contract_error) == ("txFAILED", "TRAPPED", 10)
    assert done.events == []
    meta = xdr.TransactionMeta.from_xdr(done.included.meta).v4
    assert meta is not None
    assert meta.soroban_meta is not None
    assert meta.soroban_meta.ext.v1 is not None
    assert meta.soroban_meta.ext.v1.total_refundable_resource_fee_charged.int64 == 0


def test_somebody_else_pays_for_a_call_by_a_fee_bump(world: World, payer: Keypair, sponsor: Keypair) -> None:
    inner = world.prepare(deposit(world, payer), payer)
    bump: FeeBumpTransactionEnvelope = TransactionBuilder.build_fee_bump_transaction(
        sponsor, inner.transaction.fee + 5_000, inner, world.passphrase
    )
    bump.sign(sponsor)
    before = world.xlm_of(payer.public_key)
    done = world.apply(bump)
    assert done.succeeded
    assert world.xlm_of(payer.public_key) == before
    assert world.node.transaction(inner.hash_hex()) == world.node.transaction(bump.hash_hex())
    assert world.ask(world.vault, "balance") == STROOPS


# Lives.


@pytest.fixture
def brief() -> World:
    """A sandbox in which entries live shortly, and a vault with money in it."""
    world = World(SHORT)
    wallet = world.depositor("payer", 10 * STROOPS)
    world.must(wallet, world.vault, "deposit", address(wallet), i128(5))
    world.must(
        world.caller,
        world.vault,
        "deduct",
        address(world.caller),
        i128(1),
        scval.to_symbol("old"),
        scval.to_uint32(65535),
    )
    return world


@pytest.fixture
def wallet() -> Keypair:
    """The key of the wallet in `brief`."""
    return Keypair.from_raw_ed25519_seed(hashlib.sha256(b"payer").digest())


def marker(world: World) -> bytes:
    """Return the key of the mark of the request id `old`."""
    key = scval.to_vec([scval.to_symbol("ProcessedRequest"), scval.to_symbol("old")])
    return data_ledger_key(world.vault, key.to_xdr_bytes(), PERSISTENT)


def test_an_archived_contract_is_restored_with_the_call_that_needs_it(brief: World, wallet: Keypair) -> None:
    world = brief
    world.outlive()
    found = simulated(world.simulate(deposit(world, wallet, 1), wallet))
    assert found.data.ext.resource_ext is not None
    assert found.restoring is None
    named = [
        key_bytes(found.data.resources.footprint.read_write[index.uint32])
        for index in found.data.ext.resource_ext.archived_soroban_entries
    ]
    assert instance_ledger_key(world.vault) in named
    done = sent(world, wallet, deposit(world, wallet, 1), list(found.auth), found.data)
    assert done.succeeded
    assert done.value == 5
    entry = world.ledger.state.get(instance_ledger_key(world.vault))
    assert entry is not None
    assert entry.live_until is not None
    assert entry.live_until >= world.ledger.header.sequence + SHORT.persistent_ledgers_min - 1


def test_an_archived_entry_that_is_not_named_fails_the_call(brief: World, wallet: Keypair) -> None:
    world = brief
    prepared = world.prepare(deposit(world, wallet, 1), wallet)
    world.outlive()
    assert world.apply(prepared).operation == "ENTRY_ARCHIVED"


def test_a_mark_of_a_request_id_still_counts_when_it_is_archived(brief: World) -> None:
    world = brief
    world.outlive()
    arguments = (address(world.caller), i128(1), scval.to_symbol("old"), scval.to_uint32(65535))
    assert world.refused(world.caller, world.vault, "deduct", *arguments) == "Error(Contract, #29)"


def test_a_legacy_node_asks_for_a_restoration_first() -> None:
    world = World(attrs.evolve(SHORT, legacy_restore=True))
    wallet = world.depositor("payer", 10 * STROOPS)
    world.must(wallet, world.vault, "deposit", address(wallet), i128(5))
    world.outlive()
    found = simulated(world.simulate(deposit(world, wallet, 1), wallet))
    assert found.data.ext.resource_ext is None
    assert found.restoring is not None
    assert sent(world, wallet, deposit(world, wallet, 1), list(found.auth), found.data).operation == "ENTRY_ARCHIVED"
    restored = world.apply(world.envelope(wallet, RestoreFootprint(), data=found.restoring.data))
    assert restored.operation == "RESTORE_FOOTPRINT_SUCCESS"
    again = simulated(world.simulate(deposit(world, wallet, 1), wallet))
    assert again.restoring is None
    assert sent(world, wallet, deposit(world, wallet, 1), list(again.auth), again.data).succeeded


def test_a_restoration_costs_rent_and_what_lives_needs_none(brief: World, wallet: Keypair) -> None:
    world = brief
    world.outlive()
    key = xdr.LedgerKey.from_xdr_bytes(marker(world))

    def restoration() -> Simulation:
        wanted = xdr.SorobanTransactionData(
            xdr.SorobanTransactionDataExt(0),
            xdr.SorobanResources(xdr.LedgerFootprint([], [key]), xdr.Uint32(0), xdr.Uint32(0), xdr.Uint32(0)),
            xdr.Int64(0),
        )
        return trial(world, world.envelope(wallet, RestoreFootprint(), data=wanted))

    found = restoration()
    poor = least_admitted(world, wallet, RestoreFootprint(), found.data)
    assert (
        world.apply(world.envelope(wallet, RestoreFootprint(), data=poor)).operation
        == "RESTORE_FOOTPRINT_INSUFFICIENT_REFUNDABLE_FEE"
    )
    small = world.envelope(wallet, RestoreFootprint(), data=_data(found.data, disk_read_bytes=0))
    assert world.apply(small).operation == "RESTORE_FOOTPRINT_RESOURCE_LIMIT_EXCEEDED"
    assert world.apply(world.envelope(wallet, RestoreFootprint(), data=found.data)).succeeded
    assert restoration().data.resources.footprint.read_write == []
    reading = _data(found.data, footprint=xdr.LedgerFootprint([key], []), fee=found.fee * 2)
    assert world.apply(world.envelope(wallet, RestoreFootprint(), data=reading)).operation == (
        "RESTORE_FOOTPRINT_MALFORMED"
    )


def test_a_life_is_extended_for_rent(brief: World, wallet: Keypair) -> None:
    world = brief
    key = xdr.LedgerKey.from_xdr_bytes(marker(world))
    wanted = xdr.SorobanTransactionData(
        xdr.SorobanTransactionDataExt(0),
        xdr.SorobanResources(xdr.LedgerFootprint([key], []), xdr.Uint32(0), xdr.Uint32(0), xdr.Uint32(0)),
        xdr.Int64(0),
    )
    extend = ExtendFootprintTTL(89)
    found = trial(world, world.envelope(wallet, extend, data=wanted))
    poor = least_admitted(world, wallet, extend, found.data)
    assert (
        world.apply(world.envelope(wallet, extend, data=poor)).operation
        == "EXTEND_FOOTPRINT_TTL_INSUFFICIENT_REFUNDABLE_FEE"
    )
    done = world.apply(world.envelope(wallet, extend, data=found.data))
    assert done.operation == "EXTEND_FOOTPRINT_TTL_SUCCESS"
    entry = world.ledger.state.get(marker(world))
    assert entry is not None
    assert entry.live_until == world.ledger.header.sequence + 89
    too_far = world.envelope(wallet, ExtendFootprintTTL(90), data=found.data)
    assert world.apply(too_far).operation == "EXTEND_FOOTPRINT_TTL_MALFORMED"


def test_a_nonce_is_forgotten_when_nobody_could_use_it_again(brief: World, wallet: Keypair) -> None:
    world = brief
    sponsor = world.wallet("sponsor")
    function = deposit(world, wallet, 1)
    found = simulated(world.simulate(function, sponsor))
    until = world.ledger.header.sequence + 20
    signed = [authorize_entry(entry, wallet, until, world.passphrase) for entry in found.auth]
    assert sent(world, sponsor, function, signed, found.data).succeeded
    credentials = signed[0].credentials.address_v2
    assert credentials is not None
    nonce = xdr.SCVal(xdr.SCValType.SCV_LEDGER_KEY_NONCE, nonce_key=xdr.SCNonceKey(credentials.nonce))
    key = data_ledger_key(wallet.public_key, nonce.to_xdr_bytes(), xdr.ContractDataDurability.TEMPORARY)
    entry = world.ledger.state.get(key)
    assert entry is not None
    assert entry.live_until == until


# Sequences of calls.


@settings(max_examples=12)
@given(st.data())
def test_tokens_are_neither_made_nor_lost_and_the_vault_is_the_sum_of_its_events(data: st.DataObject) -> None:
    audit_a_sequence_of_calls(data, 10)


@pytest.mark.proof
@settings(max_examples=300)
@given(st.data())
def test_tokens_are_neither_made_nor_lost_in_long_sequences(data: st.DataObject) -> None:
    audit_a_sequence_of_calls(data, 40)


def audit_a_sequence_of_calls(data: st.DataObject, most: int) -> None:
    """Make calls of any kind and amount, and after each compare what is there with what was told."""
    world = World()
    wallets = [world.depositor(f"wallet {number}", 20 * STROOPS) for number in range(2)]
    holders: list[Keypair | str] = [*wallets, world.vault, world.settlement]
    minted = 40 * STROOPS
    told = 0
    amounts = st.integers(-1, 12 * STROOPS)
    for step in range(data.draw(st.integers(1, most))):
        wallet = data.draw(st.sampled_from(wallets))
        amount = i128(data.draw(amounts))
        function, signer = data.draw(
            st.sampled_from(
                [
                    (invoke(world.vault, "deposit", address(wallet), amount), wallet),
                    (invoke(world.vault, "withdraw_to", address(wallet), amount), world.owner),
                    (invoke(world.vault, "distribute", address(world.owner), address(wallet), i128(1)), world.owner),
                    (
                        invoke(
                            world.vault,
                            "deduct",
                            address(world.caller),
                            amount,
                            scval.to_symbol(f"id{step % 4}"),
                            scval.to_uint32(65535),
                        ),
                        world.caller,
                    ),
                    (invoke(world.usdc, "transfer", address(wallet), address(world.vault), amount), wallet),
                    (invoke(world.usdc, "mint", address(wallet), i128(5)), world.places.issuer),
                    (invoke(world.usdc, "burn", address(wallet), i128(5)), wallet),
                ]
            )
        )
        if isinstance(found := world.simulate(function, signer), SimulationFailed):
            continue
        done = sent(world, signer, function, list(found.auth), found.data)
        assert done.succeeded
        for topics, value in done.events:
            told += {"deposit": 1, "deduct": -1, "withdraw_to": -1}.get(topics[0], 0) * (
                value[0] if isinstance(value, list) else 0
            )
            minted += {"mint": 1, "burn": -1}.get(topics[0], 0) * (value if isinstance(value, int) else 0)
        assert sum(world.ask(world.usdc, "balance", address(holder)) for holder in holders) == minted
        assert world.ask(world.vault, "balance") == told
