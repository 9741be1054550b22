"""The sandbox's JSON-RPC: every method's answer and refusals, and the rules of its pages."""

import base64
import hashlib
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from stellar_sdk import CreateAccount, InvokeHostFunction, Keypair, scval, xdr
from stellar_sdk import soroban_rpc as shapes
from stellar_sdk.exceptions import SorobanRpcErrorResponse
from stellar_sdk.soroban_server_async import SorobanServerAsync

from callora.stellar.sandbox.faults import Fault
from callora.stellar.sandbox.jsonrpc import TIME_LIMIT
from callora.stellar.sandbox.rpc import Rpc
from callora.stellar.sandbox.soroban.storage import instance_ledger_key
from tests.support.contracts import SHORT, STROOPS, World, address, i128, invoke
from tests.support.sandbox_client import URL, client_of

SYMBOL = scval.to_symbol("deposit").to_xdr()
TRANSFER = scval.to_symbol("transfer").to_xdr()


@pytest.fixture(scope="module")
def world() -> World:
    """A sandbox in which three deposits were made, in ledgers of their own; the tests of this module only read it."""
    made = World()
    wallet = made.depositor("payer", 100 * STROOPS)
    for amount in (1, 2, 3):
        made.must(wallet, made.vault, "deposit", address(wallet), i128(amount))
    return made


@pytest.fixture
def server(world: World) -> SorobanServerAsync:
    return SorobanServerAsync(f"{URL}/rpc", client_of(world.sandbox))


async def told(world: World, document: Any) -> Any:
    return await Rpc(world.simulator).answer(world.node, document)


async def call(world: World, method: str, params: Any = None) -> Any:
    answer = await told(world, {"jsonrpc": "2.0", "id": 8, "method": method, "params": params})
    assert answer["jsonrpc"] == "2.0"
    assert answer["id"] == 8
    return answer["result"]


async def refused(world: World, method: str, params: Any = None) -> tuple[int, str]:
    answer = await told(world, {"jsonrpc": "2.0", "id": 8, "method": method, "params": params})
    assert "result" not in answer, answer
    return answer["error"]["code"], answer["error"]["message"]


# JSON-RPC.


async def test_a_batch_is_answered_as_one(world: World) -> None:
    answers = await told(
        world,
        [
            {"jsonrpc": "2.0", "id": 1, "method": "getNetwork"},
            {"jsonrpc": "2.0", "method": "getNetwork"},
            {"jsonrpc": "2.0", "id": "two", "method": "none"},
            7,
        ],
    )
    assert [answer["id"] for answer in answers] == [1, "two", None]
    assert answers[0]["result"]["passphrase"] == world.passphrase
    assert [answer["error"]["code"] for answer in answers[1:]] == [-32601, -32600]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ([], -32600),
        ("hello", -32600),
        (None, -32600),
        ({"jsonrpc": "1.0", "id": 1, "method": "getHealth"}, -32600),
        ({"jsonrpc": "2.0", "id": 1}, -32600),
        ({"jsonrpc": "2.0", "id": {}, "method": "getHealth"}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "none"}, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": "getTransaction", "params": [1]}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "getTransaction", "params": {"hash": 5}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "getEvents", "params": {"startLedger": "1"}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "getEvents", "params": {"startLedger": 2**32}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "getLedgerEntries", "params": {"keys": {}}}, -32602),
    ],
)
async def test_what_is_no_request_is_answered_with_its_error(world: World, document: Any, code: int) -> None:
    assert (await told(world, document))["error"]["code"] == code


async def test_a_notification_is_not_answered(world: World) -> None:
    assert await told(world, {"jsonrpc": "2.0", "method": "getHealth"}) is None
    assert await told(world, [{"jsonrpc": "2.0", "method": "getHealth"}]) is None


async def test_xdr_in_json_is_refused(world: World) -> None:
    params = {"startLedger": 1, "xdrFormat": "json"}
    assert (await refused(world, "getEvents", params))[0] == -32602


async def test_an_error_can_be_planned_for_a_method() -> None:
    world = World()
    own = SorobanServerAsync(f"{URL}/rpc", client_of(world.sandbox))
    world.sandbox.plan.add(Fault("rpc_error", "getHealth", code=TIME_LIMIT))
    await own.get_network()
    with pytest.raises(SorobanRpcErrorResponse) as refused:
        await own.get_health()
    assert refused.value.code == -32001
    assert (await own.get_health()).status == "healthy"


# The node.


async def test_a_node_says_how_it_is(world: World, server: SorobanServerAsync) -> None:
    health = await server.get_health()
    latest = world.ledger.header.sequence
    assert (health.status, health.latest_ledger, health.oldest_ledger) == ("healthy", latest, 1)
    world.clock.seconds += 31
    try:
        code, message = await refused(world, "getHealth")
    finally:
        world.clock.seconds -= 31
    assert code == -32603
    assert message == "latency (31s) since last known ledger closed is too high (>30s)"


async def test_a_node_says_which_network_it_is_on(world: World, server: SorobanServerAsync) -> None:
    network = await server.get_network()
    assert network.passphrase == world.passphrase
    assert network.protocol_version == world.ledger.rules.protocol_version
    version = await server.get_version_info()
    assert version.protocol_version == network.protocol_version


async def test_the_latest_ledger_is_told_with_its_meta(world: World, server: SorobanServerAsync) -> None:
    latest = await server.get_latest_ledger()
    header = world.ledger.header
    assert (latest.sequence, latest.id, latest.close_time) == (header.sequence, header.hash().hex(), header.closed_at)
    assert xdr.LedgerHeader.from_xdr(latest.header_xdr).ledger_seq.uint32 == header.sequence
    meta = xdr.LedgerCloseMeta.from_xdr(latest.metadata_xdr).v2
    assert meta is not None
    assert len(meta.tx_processing) == 1


async def test_fees_are_told_as_they_were_paid(world: World, server: SorobanServerAsync) -> None:
    stats = await server.get_fee_stats()
    soroban = stats.soroban_inclusion_fee
    assert soroban.transaction_count > 3
    assert (soroban.min, soroban.mode, soroban.p10, soroban.p50, soroban.p99, soroban.max) == (100,) * 6
    raw = await call(world, "getFeeStats")
    assert isinstance(raw["inclusionFee"]["p90"], str)


async def test_no_fees_are_told_as_zeros() -> None:
    world = World()
    world.close(60)
    raw = await call(world, "getFeeStats")
    assert raw["inclusionFee"]["max"] == raw["inclusionFee"]["p99"] == raw["inclusionFee"]["transactionCount"] == "0"


# Entries.


async def test_entries_are_told_in_the_order_asked_for_and_missing_ones_left_out(world: World) -> None:
    keys = [
        instance_ledger_key(world.usdc),
        instance_ledger_key(world.vault)[:-5] + bytes(5),
        instance_ledger_key(world.vault),
    ]
    asked = [base64.b64encode(key).decode() for key in (keys[0], keys[2])]
    missing = xdr.LedgerKey.from_xdr_bytes(instance_ledger_key(world.vault))
    assert missing.contract_data is not None
    missing.contract_data.durability = xdr.ContractDataDurability.TEMPORARY
    result = await call(world, "getLedgerEntries", {"keys": [*asked, missing.to_xdr()]})
    assert [entry["key"] for entry in result["entries"]] == asked
    assert all(entry["liveUntilLedgerSeq"] > world.ledger.header.sequence for entry in result["entries"])
    data = xdr.LedgerEntryData.from_xdr(result["entries"][1]["xdr"])
    assert data.contract_data is not None
    assert data.contract_data.val.instance is not None


async def test_the_sdk_reads_accounts_and_token_balances_from_entries(world: World, server: SorobanServerAsync) -> None:
    account = await server.load_account(world.owner.public_key)
    assert account.sequence == world.sequence_of(world.owner.public_key)
    balance = await server.get_sac_balance(world.vault, _sdk_usdc(world), world.passphrase)
    assert balance.balance_entry is not None
    assert balance.balance_entry.amount == 6
    assert balance.balance_entry.authorized


def _sdk_usdc(world: World) -> Any:
    return world.places.usdc


async def test_no_more_than_two_hundred_keys_and_no_lives_are_asked_for(world: World) -> None:
    key = base64.b64encode(instance_ledger_key(world.usdc)).decode()
    assert len((await call(world, "getLedgerEntries", {"keys": [key] * 200}))["entries"]) == 200
    assert await refused(world, "getLedgerEntries", {"keys": [key] * 201}) == (
        -32602,
        "key count (201) exceeds maximum supported (200)",
    )
    ttl = xdr.LedgerKey(xdr.LedgerEntryType.TTL, ttl=xdr.LedgerKeyTtl(xdr.Hash(bytes(32))))
    assert (await refused(world, "getLedgerEntries", {"keys": [ttl.to_xdr()]}))[0] == -32602
    assert (await refused(world, "getLedgerEntries", {"keys": ["AAA"]}))[1].startswith("cannot unmarshal key value AAA")
    assert (await refused(world, "getLedgerEntries", {"keys": [5]}))[0] == -32602


async def test_an_archived_entry_is_told_with_its_life_over() -> None:
    world = World(SHORT)
    world.outlive()
    key = base64.b64encode(instance_ledger_key(world.vault)).decode()
    (entry,) = (await call(world, "getLedgerEntries", {"keys": [key]}))["entries"]
    assert entry["liveUntilLedgerSeq"] == 0


# Simulation.


async def test_a_simulation_says_what_failed_and_where(world: World) -> None:
    wallet = world.admin
    envelope = world.envelope(wallet, InvokeHostFunction(invoke(world.vault, "deposit", address(wallet), i128(1))))
    result = await call(world, "simulateTransaction", {"transaction": envelope.to_xdr()})
    lines = result["error"].splitlines()
    assert lines[0] == "HostError: Error(Contract, #3)"
    assert "Event log (newest first):" in lines
    assert f"contract:{world.vault}" in result["error"]
    assert result["latestLedger"] == world.ledger.header.sequence
    events = [xdr.DiagnosticEvent.from_xdr(event) for event in result["events"]]
    assert not any(event.in_successful_contract_call for event in events)


async def test_a_simulation_says_what_would_change(world: World) -> None:
    wallet = world.places.issuer
    function = invoke(world.usdc, "mint", address(world.vault), i128(1))
    envelope = world.envelope(wallet, InvokeHostFunction(function))
    result = await call(world, "simulateTransaction", {"transaction": envelope.to_xdr()})
    shapes.SimulateTransactionResponse.model_validate(result)
    (change,) = [each for each in result["stateChanges"] if each["type"] == "updated"]
    before, after = (xdr.LedgerEntry.from_xdr(change[name]).data.contract_data for name in ("before", "after"))
    assert before is not None
    assert after is not None
    assert scval.to_native(after.val)["amount"] == scval.to_native(before.val)["amount"] + 1  # type: ignore[index,call-overload,operator]
    assert isinstance(result["minResourceFee"], str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transaction": "AAAA"}, "Could not unmarshal transaction"),
        ({"authMode": "none"}, "optional 'authMode' must be one of enforce,record,record_allow_nonroot when included"),
    ],
)
async def test_a_simulation_that_makes_no_sense_says_so(world: World, change: dict[str, str], message: str) -> None:
    wallet = world.owner
    envelope = world.envelope(wallet, InvokeHostFunction(invoke(world.vault, "balance")))
    result = await call(world, "simulateTransaction", {"transaction": envelope.to_xdr(), **change})
    assert result == {"error": message, "latestLedger": world.ledger.header.sequence}


async def test_only_one_contract_operation_is_simulated(world: World) -> None:
    create = CreateAccount(Keypair.random().public_key, "1")
    for operations, message in (
        ((create,), "Transaction contains unsupported operation type: OperationTypeCreateAccount"),
        ((create, create), "Transaction contains more than one operation"),
    ):
        envelope = world.envelope(world.owner, *operations)
        result = await call(world, "simulateTransaction", {"transaction": envelope.to_xdr()})
        assert result["error"] == message


async def test_more_instructions_are_allowed_when_they_are_asked_for(world: World) -> None:
    envelope = world.envelope(world.owner, InvokeHostFunction(invoke(world.vault, "balance")))

    async def instructions(**config: int) -> int:
        params = {"transaction": envelope.to_xdr(), "resourceConfig": config}
        result = await call(world, "simulateTransaction", params)
        return xdr.SorobanTransactionData.from_xdr(result["transactionData"]).resources.instructions.uint32

    assert await instructions(instructionLeeway=1_000_000) == await instructions() + 1_000_000


# Transactions.


async def test_a_transaction_is_sent_found_and_listed(server: SorobanServerAsync) -> None:
    world = World()
    own = SorobanServerAsync(f"{URL}/rpc", client_of(world.sandbox))
    envelope = world.envelope(world.owner, CreateAccount(Keypair.random().public_key, "5"))
    tx_hash = envelope.hash_hex()
    missing = await own.get_transaction(tx_hash)
    assert missing.status == shapes.GetTransactionStatus.NOT_FOUND
    assert missing.transaction_hash == tx_hash
    sent = await own.send_transaction(envelope)
    assert (sent.status, sent.hash) == (shapes.SendTransactionStatus.PENDING, tx_hash)
    assert (await own.send_transaction(envelope)).status == shapes.SendTransactionStatus.DUPLICATE
    world.close()
    found = await own.get_transaction(tx_hash)
    assert found.status == shapes.GetTransactionStatus.SUCCESS
    assert found.ledger == world.ledger.header.sequence
    assert found.application_order == 1
    assert found.envelope_xdr == envelope.to_xdr()
    assert found.fee_bump is False
    assert found.create_at == world.ledger.header.closed_at
    listed = await own.get_transactions(start_ledger=world.ledger.header.sequence)
    assert [each.transaction_hash for each in listed.transactions] == [tx_hash]
    raw = await call(world, "getTransaction", {"hash": tx_hash})
    assert isinstance(raw["createdAt"], str)
    assert isinstance(raw["latestLedgerCloseTime"], str)


async def test_a_refused_transaction_is_told_with_its_result() -> None:
    world = World()
    own = SorobanServerAsync(f"{URL}/rpc", client_of(world.sandbox))
    late = world.envelope(world.owner, CreateAccount(Keypair.random().public_key, "5"), max_time=1)
    sent = await own.send_transaction(late)
    assert sent.status == shapes.SendTransactionStatus.ERROR
    assert sent.error_result_xdr is not None
    code = xdr.TransactionResult.from_xdr(sent.error_result_xdr).result.code
    assert code == xdr.TransactionResultCode.txTOO_LATE


async def test_what_is_no_transaction_or_no_hash_is_refused(world: World) -> None:
    assert await refused(world, "sendTransaction", {"transaction": "AAAA"}) == (-32602, "invalid_xdr")
    assert await refused(world, "getTransaction", {"hash": "ab"}) == (-32602, "unexpected hash length (2)")
    assert (await refused(world, "getTransaction", {"hash": "x" * 64}))[0] == -32602


async def test_transactions_are_told_page_by_page(world: World) -> None:
    everything = await call(world, "getTransactions", {"startLedger": 1, "pagination": {"limit": 200}})
    wanted = [each["txHash"] for each in everything["transactions"]]
    found: list[str] = []
    params: dict[str, Any] = {"startLedger": 1, "pagination": {"limit": 3}}
    while True:
        page = await call(world, "getTransactions", params)
        found += [each["txHash"] for each in page["transactions"]]
        if len(page["transactions"]) < 3:
            break
        params = {"pagination": {"limit": 3, "cursor": page["cursor"]}}
    assert found == wanted
    after = await call(world, "getTransactions", {"pagination": {"cursor": page["cursor"]}})
    assert after["transactions"] == []


@pytest.mark.parametrize("method", ["getTransactions", "getLedgers"])
async def test_pages_begin_where_there_is_something(world: World, method: str) -> None:
    latest = world.ledger.header.sequence
    for start in (0, latest + 1):
        code, message = await refused(world, method, {"startLedger": start})
        assert code == -32600
        assert f"must be between the oldest ledger: 1 and the latest ledger: {latest}" in message
    both = {"startLedger": 1, "pagination": {"cursor": "5"}}
    assert (await refused(world, method, both))[0] == -32600
    assert (await refused(world, method, {"startLedger": 1, "pagination": {"limit": 201}}))[0] == -32600
    assert (await refused(world, method, {"pagination": {"cursor": "five"}}))[0] == -32602
    assert (await refused(world, method, {"pagination": {"cursor": str(2**60)}}))[0] == -32602


async def test_ledgers_are_told_page_by_page(world: World, server: SorobanServerAsync) -> None:
    page = await server.get_ledgers(start_ledger=2, limit=3)
    assert [ledger.sequence for ledger in page.ledgers] == [2, 3, 4]
    rest = await server.get_ledgers(cursor=page.cursor, limit=2)
    assert [ledger.sequence for ledger in rest.ledgers] == [5, 6]
    first = page.ledgers[1]
    history = xdr.LedgerHeaderHistoryEntry.from_xdr(first.header_xdr)
    assert history.hash.hash.hex() == first.hash
    assert history.header.previous_ledger_hash.hash.hex() == page.ledgers[0].hash
    meta = xdr.LedgerCloseMeta.from_xdr(first.metadata_xdr).v2
    assert meta is not None
    assert meta.ledger_header == history


# Events.


async def test_events_are_told_with_where_and_when_they_happened(world: World, server: SorobanServerAsync) -> None:
    wanted = shapes.EventFilter(contract_ids=[world.vault], topics=[[SYMBOL, "*"]])  # type: ignore[call-arg]
    found = await server.get_events(start_ledger=1, filters=[wanted])
    assert [scval.to_native(event.value) for event in found.events] == [[1, 1], [2, 3], [3, 6]]
    event = found.events[0]
    assert event.contract_id == world.vault
    assert event.event_type == "contract"
    assert event.topic[0] == SYMBOL
    included = world.node.transaction(event.transaction_hash)
    assert included is not None
    assert (event.ledger, event.transaction_index, event.operation_index) == (included.ledger, included.order, 0)
    assert int(event.ledger_close_at.timestamp()) == included.closed_at
    toid, number = event.id.split("-")
    assert (len(toid), len(number)) == (19, 10)
    assert int(toid) == event.ledger << 32 | event.transaction_index << 12
    assert found.latest_ledger == world.ledger.header.sequence
    assert found.oldest_ledger == 1


async def ids(world: World, **params: Any) -> list[str]:
    return [event["id"] for event in (await call(world, "getEvents", params))["events"]]


async def test_events_are_told_page_by_page_without_a_gap(world: World) -> None:
    wanted = await ids(world, startLedger=1)
    assert len(wanted) > 6
    assert wanted == sorted(wanted)
    found: list[str] = []
    page = await call(world, "getEvents", {"startLedger": 1, "pagination": {"limit": 2}})
    while page["events"]:
        found += [event["id"] for event in page["events"]]
        page = await call(world, "getEvents", {"pagination": {"limit": 2, "cursor": page["cursor"]}})
    assert found == wanted


async def test_a_full_page_ends_at_its_last_event_and_another_at_the_end_of_what_was_looked_at(world: World) -> None:
    full = await call(world, "getEvents", {"startLedger": 1, "pagination": {"limit": 2}})
    assert full["cursor"] == full["events"][-1]["id"]
    rest = await call(world, "getEvents", {"startLedger": 1})
    latest = world.ledger.header.sequence
    assert rest["cursor"] == f"{(latest << 32) + 2**32 - 1:019d}-4294967295"
    again = await call(world, "getEvents", {"pagination": {"cursor": rest["cursor"]}})
    assert again["events"] == []
    assert again["cursor"] == rest["cursor"]


async def test_an_end_bounds_what_is_looked_at(world: World) -> None:
    events = (await call(world, "getEvents", {"startLedger": 1}))["events"]
    end = events[-1]["ledger"]
    page = await call(world, "getEvents", {"startLedger": 1, "endLedger": end})
    assert [event["id"] for event in page["events"]] == [event["id"] for event in events if event["ledger"] < end]
    assert page["cursor"].startswith(f"{((end - 1) << 32) + 2**32 - 1:019d}")


async def test_no_more_than_ten_thousand_ledgers_are_looked_at_at_once() -> None:
    world = World()
    wallet = world.wallet("wallet", 5)
    first = world.ledger.header.sequence
    world.close(10_000)
    world.must(wallet, world.usdc, "transfer", address(wallet), address(world.vault), i128(1))
    page = await call(world, "getEvents", {"startLedger": first + 1, "filters": [{"topics": [[TRANSFER, "**"]]}]})
    assert page["events"] == []
    assert int(page["cursor"].split("-")[0]) >> 32 == first + 10_000
    params = {"pagination": {"cursor": page["cursor"]}, "filters": [{"topics": [[TRANSFER, "**"]]}]}
    assert len((await call(world, "getEvents", params))["events"]) == 1


async def test_filters_match_kinds_contracts_and_topics(world: World) -> None:
    deposits = await ids(world, startLedger=1, filters=[{"contractIds": [world.vault], "topics": [[SYMBOL, "**"]]}])
    assert len(deposits) == 3
    topics = {
        "two of any kind": [["*", "*"]],
        "deposit and one more": [[SYMBOL, "*"]],
        "deposit and any more": [[SYMBOL, "**"]],
        "either": [[TRANSFER, "*"], [SYMBOL, "*"]],
    }
    for name, wanted in topics.items():
        filters = [{"type": "contract", "contractIds": [world.vault], "topics": wanted}]
        found = await ids(world, startLedger=1, filters=filters)
        assert set(deposits) <= set(found), name
    none = [{"contractIds": [world.vault], "topics": [[SYMBOL], [SYMBOL, "*", "*"]]}]
    assert await ids(world, startLedger=1, filters=none) == []
    assert await ids(world, startLedger=1, filters=[{"type": "system"}]) == []
    everything = await ids(world, startLedger=1)
    assert await ids(world, startLedger=1, filters=[{"type": "system,contract"}]) == everything
    assert await ids(world, startLedger=1, filters=[{"topics": [["**"]]}]) == everything
    two = [{"contractIds": [world.vault], "topics": [[SYMBOL, "*"]]}, {"topics": [[TRANSFER, "**"]]}]
    assert set(await ids(world, startLedger=1, filters=two)) > set(deposits)


async def test_a_range_that_a_node_has_not_is_refused_with_the_one_that_it_has(world: World) -> None:
    latest = world.ledger.header.sequence
    wanted = (-32600, f"startLedger must be within the ledger range: 1 - {latest}")
    assert await refused(world, "getEvents", {"startLedger": latest + 1}) == wanted
    later = f"{(latest + 1) << 32:019d}-0000000000"
    assert await refused(world, "getEvents", {"pagination": {"cursor": later}}) == wanted
    world.node.retention = 2
    try:
        code, message = await refused(world, "getEvents", {"startLedger": 1})
    finally:
        world.node.retention = None
    assert (code, message) == (-32600, f"startLedger must be within the ledger range: {latest - 1} - {latest}")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "startLedger must be positive"),
        ({"startLedger": 0}, "startLedger must be positive"),
        (
            {"startLedger": 1, "pagination": {"cursor": "0000000004294967296-0000000000"}},
            "ledger ranges and cursor cannot both be set",
        ),
        (
            {"endLedger": 1, "pagination": {"cursor": "0000000004294967296-0000000000"}},
            "ledger ranges and cursor cannot both be set",
        ),
        ({"pagination": {"cursor": "17"}}, "invalid parameters: invalid event id 17"),
        ({"startLedger": 1, "pagination": {"limit": 10_001}}, "limit must not exceed 10000"),
        ({"startLedger": 1, "filters": [{}] * 6}, "maximum 5 filters per request"),
        (
            {"startLedger": 1, "filters": [{"type": "diagnostic"}]},
            "filter 1 invalid: filter type invalid: if set, type must be either 'system' or 'contract'",
        ),
        ({"startLedger": 1, "filters": [{"contractIds": ["C"]}]}, "filter 1 invalid: contract ID 1 invalid"),
        (
            {"startLedger": 1, "filters": [{"contractIds": ["C"] * 6}]},
            "filter 1 invalid: maximum 5 contract IDs per filter",
        ),
        ({"startLedger": 1, "filters": [{"topics": [["*"]] * 6}]}, "filter 1 invalid: maximum 5 topics per filter"),
        (
            {"startLedger": 1, "filters": [{"topics": [[]]}]},
            "filter 1 invalid: topic 1 invalid: topic must have at least 1 segment",
        ),
        (
            {"startLedger": 1, "filters": [{"topics": [["*"] * 5]}]},
            "filter 1 invalid: topic 1 invalid: topic cannot have more than 4 segments",
        ),
        (
            {"startLedger": 1, "filters": [{"topics": [["**", "*"]]}]},
            "filter 1 invalid: topic 1 invalid: segment 1 invalid: wildcard '**' is only allowed as the last segment",
        ),
        (
            {"startLedger": 1, "filters": [{"topics": [["hello"]]}]},
            "filter 1 invalid: topic 1 invalid: a segment is no SCVal in base64 XDR",
        ),
    ],
)
async def test_what_is_wrong_with_a_question_for_events_is_said(
    world: World, params: dict[str, Any], message: str
) -> None:
    assert await refused(world, "getEvents", params) == (-32602, message)


async def test_a_node_that_lags_tells_the_past(world: World) -> None:
    events = (await call(world, "getEvents", {"startLedger": 1}))["events"]
    last = events[-1]
    lagging = attrs.evolve(world.node, lag=1)
    answer = await Rpc(world.simulator).answer(
        lagging, {"jsonrpc": "2.0", "id": 1, "method": "getEvents", "params": {"startLedger": 1}}
    )
    assert last["id"] not in [event["id"] for event in answer["result"]["events"]]
    assert answer["result"]["latestLedger"] == world.ledger.header.sequence - 1
    envelope = world.envelope(world.owner, InvokeHostFunction(invoke(world.vault, "balance")))
    document = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "simulateTransaction",
        "params": {"transaction": envelope.to_xdr()},
    }
    result = (await Rpc(world.simulator).answer(lagging, document))["result"]
    assert scval.to_native(result["results"][0]["xdr"]) == 3
    assert result["latestLedger"] == world.ledger.header.sequence - 1


# Anything at all.

NAMES = [
    "startLedger",
    "endLedger",
    "pagination",
    "cursor",
    "limit",
    "filters",
    "type",
    "contractIds",
    "topics",
    "keys",
    "hash",
    "transaction",
    "authMode",
    "resourceConfig",
    "instructionLeeway",
    "xdrFormat",
    "useUpgradedAuth",
]
SMALL = World()
"""A sandbox for what is generated."""
SPONSOR = SMALL.wallet("sponsor")
PAYER = SMALL.depositor("payer", STROOPS)
DEPOSIT = invoke(SMALL.vault, "deposit", address(PAYER), i128(1))
SOUND = [
    (envelope.to_transaction_envelope_v1().transaction.to_xdr_object().to_xdr_bytes(), signer)
    for envelope, signer in (
        (SMALL.envelope(PAYER, InvokeHostFunction(DEPOSIT)), PAYER),
        (SMALL.prepare(DEPOSIT, PAYER), PAYER),
        (SMALL.prepare(DEPOSIT, SPONSOR, authorizers=[PAYER], live_ledgers=10_000), SPONSOR),
    )
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**33)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "*", "AAAA", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(data=st.data())
def test_no_document_makes_the_server_fail(data: st.DataObject) -> None:
    methods = list(Rpc(SMALL.simulator)._methods)
    params = JSON | st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)
    request = st.fixed_dictionaries(
        {"jsonrpc": st.just("2.0"), "id": st.just(1), "method": st.sampled_from(methods), "params": params}
    )
    document = data.draw(request | JSON)
    answer = trio.run(Rpc(SMALL.simulator).answer, SMALL.node, document)
    for each in answer if isinstance(answer, list) else [answer]:
        assert each is None or ("result" in each) != ("error" in each)


@settings(max_examples=150)
@given(data=st.data())
def test_no_transaction_makes_simulation_or_a_ledger_fail(data: st.DataObject) -> None:
    send_something_like_a_transaction(data)


@pytest.mark.proof
@settings(max_examples=10_000)
@given(data=st.data())
def test_no_transaction_of_thousands_makes_simulation_or_a_ledger_fail(data: st.DataObject) -> None:
    send_something_like_a_transaction(data)


def send_something_like_a_transaction(data: st.DataObject) -> None:
    """A sound transaction with some bytes changed, and signed again, is refused or applied: what it says is its own."""
    sound, signer = data.draw(st.sampled_from(SOUND))
    raw = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        made = xdr.Transaction.from_xdr_bytes(bytes(raw))
        made.seq_num = xdr.SequenceNumber(xdr.Int64(SMALL.sequence_of(signer.public_key) + 1))
        envelope = signed_again(made, signer)
    except Exception:
        return  # it is no transaction any more
    for method in ("simulateTransaction", "sendTransaction"):
        document = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"transaction": envelope}}
        answer = trio.run(Rpc(SMALL.simulator).answer, SMALL.node, document)
        assert "result" in answer or answer["error"]["message"] == "invalid_xdr"
    SMALL.close()


def signed_again(transaction: xdr.Transaction, signer: Keypair) -> str:
    kind = xdr.EnvelopeType.ENVELOPE_TYPE_TX
    told = SMALL.ledger.network_id + kind.to_xdr_bytes() + transaction.to_xdr_bytes()
    signature = signer.sign_decorated(hashlib.sha256(told).digest()).to_xdr_object()
    v1 = xdr.TransactionV1Envelope(transaction, [signature])
    return xdr.TransactionEnvelope(kind, v1=v1).to_xdr()
