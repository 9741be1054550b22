"""One RPC node: every question, every way an answer can be wrong, and what is certain of a send."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import pytest
import trio
from stellar_sdk import Account, Asset, Network, TransactionBuilder, TransactionEnvelope, scval, xdr

from callora.ledger.chain import (
    Applied,
    ContractFault,
    Envelope,
    EventPage,
    Head,
    NotSeen,
    OutsideRange,
    Retained,
    Simulated,
    WalletBalances,
)
from callora.ledger.faults import ChainOutcomeUnknown, ChainUnavailable
from callora.stellar.contracts import VaultContract, build, question
from callora.stellar.envelopes import Signer, inclusion_fee, read, seal
from callora.stellar.rpc import Leeway, RpcNode
from callora.stellar.transport import REPLY_BYTES_MAX, open_transport
from tests.support.nodes import (
    CLOSED_AT,
    OWNER,
    PASSPHRASE,
    RESOURCE_FEE,
    SETTLEMENT,
    USDC,
    VAULT,
    Refusal,
    RpcScript,
    ScriptedNode,
    Trap,
    account,
    as_html,
    as_json,
    error_event,
    scripted_rpc,
    soroban_data,
)
from tests.support.upstream import (
    Exchange,
    Handler,
    big,
    chunked,
    close_silently,
    reset_amid_body,
    reset_before_head,
    respond,
    silent,
)

CLOSED: Final = datetime.fromtimestamp(CLOSED_AT, UTC)
ALICE: Final = account("alice")
CHANNEL: Final = account("channel")
ADAPTER: Final = VaultContract(VAULT, "g1", OWNER.public_key, USDC, SETTLEMENT, None)
HASH: Final = "0f" * 32
Asking = Callable[[RpcNode], Awaitable[object]]


@pytest.fixture
async def node() -> AsyncIterator[ScriptedNode]:
    """A healthy node."""
    async with scripted_rpc() as found:
        yield found


@pytest.fixture
async def rpc(node: ScriptedNode) -> AsyncIterator[RpcNode]:
    """Our side of it."""
    async with open_transport() as transport:
        yield RpcNode(node.url, PASSPHRASE, transport)


def deposit(amount: int = 10_000_000) -> Envelope:
    """Return an unsigned deposit of Alice's."""
    return build(
        ADAPTER.deposit(ALICE.public_key, amount),
        source=ALICE.public_key,
        sequence=42,
        max_time=CLOSED_AT + 300,
        fee=100,
        passphrase=PASSPHRASE,
    )


def payment() -> TransactionEnvelope:
    """Return a payment that is signed."""
    builder = TransactionBuilder(Account(ALICE.public_key, 41), PASSPHRASE, base_fee=100)
    builder.append_payment_op(OWNER.public_key, Asset.native(), "1")
    builder.add_time_bounds(0, CLOSED_AT + 60)
    envelope = builder.build()
    envelope.sign(ALICE)
    return envelope


async def fault(asking: Awaitable[object]) -> ChainUnavailable:
    """Return the fault that a question must end in."""
    with pytest.raises(ChainUnavailable) as caught:
        await asking
    return caught.value


def result(code: str, operations: list[xdr.OperationResult] | None = None, fee: int = 100) -> str:
    """Return a transaction's result in base64 XDR."""
    return xdr.TransactionResult(
        xdr.Int64(fee),
        xdr.TransactionResultResult(xdr.TransactionResultCode[code], results=operations),
        xdr.TransactionResultExt(0),
    ).to_xdr()


def invoked(code: str) -> list[xdr.OperationResult]:
    """Return the result of one contract call."""
    kind = xdr.InvokeHostFunctionResultCode[f"INVOKE_HOST_FUNCTION_{code}"]
    success = xdr.Hash(bytes(32)) if code == "SUCCESS" else None
    tr = xdr.OperationResultTr(
        xdr.OperationType.INVOKE_HOST_FUNCTION,
        invoke_host_function_result=xdr.InvokeHostFunctionResult(kind, success=success),
    )
    return [xdr.OperationResult(xdr.OperationResultCode.opINNER, tr)]


def meta(value: xdr.SCVal | None, diagnostics: tuple[str, ...] = ()) -> str:
    """Return a transaction's meta, version 4, in base64 XDR."""
    soroban = xdr.SorobanTransactionMetaV2(xdr.SorobanTransactionMetaExt(0), value)
    v4 = xdr.TransactionMetaV4(
        xdr.ExtensionPoint(0),
        xdr.LedgerEntryChanges([]),
        [],
        xdr.LedgerEntryChanges([]),
        soroban,
        [],
        [xdr.DiagnosticEvent.from_xdr(each) for each in diagnostics],
    )
    return xdr.TransactionMeta(4, v4=v4).to_xdr()


def found(script: RpcScript, status: str, **told: object) -> Callable[[Mapping[str, Any]], object]:
    """Return an answer of getTransaction."""
    return lambda params: {
        "status": status,
        "txHash": params["hash"],
        "ledger": 990,
        "createdAt": str(CLOSED_AT - 50),
        "applicationOrder": 1,
        "feeBump": False,
        "envelopeXdr": deposit().xdr,
        **script.range,
        **told,
    }


def constant(answer: object) -> Callable[[Mapping[str, Any]], object]:
    """Return an answer that is always the same."""
    return lambda _: answer


def refusing(script: RpcScript, result_xdr: str) -> Callable[[Mapping[str, Any]], object]:
    """Return an answer of sendTransaction: the node does not take it."""
    return constant({"status": "ERROR", "hash": HASH, "errorResultXdr": result_xdr, **script.range})


# --- what a healthy node answers --------------------------------------------------------------------------------------


async def test_a_node_says_which_network_it_is_on_and_what_it_still_has(rpc: RpcNode, node: ScriptedNode) -> None:
    facts = await rpc.network()
    assert (facts.passphrase, facts.protocol_version, facts.friendbot_url) == (PASSPHRASE, 23, None)
    assert await rpc.retained() == Retained(1, Head(1000, CLOSED))
    assert rpc.latest == 1000
    await rpc.healthy()
    assert rpc.name == node.url.removeprefix("http://")


async def test_a_transaction_that_is_not_found_is_told_with_what_the_node_still_has(rpc: RpcNode) -> None:
    told = await rpc.transaction(HASH)
    assert told == NotSeen(Retained(1, Head(1000, CLOSED)))


async def test_a_contract_call_that_was_applied_is_told_with_what_it_returned(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.results["getTransaction"] = found(
        node.script,
        "SUCCESS",
        resultXdr=result("txSUCCESS", invoked("SUCCESS"), fee=6_000),
        resultMetaXdr=meta(scval.to_int128(7)),
    )
    assert await rpc.transaction(HASH) == Applied(
        successful=True,
        ledger=990,
        closed_at=datetime.fromtimestamp(CLOSED_AT - 50, UTC),
        result_code="tx_success",
        operation_code=None,
        fault=None,
        return_value=scval.to_int128(7).to_xdr(),
        fee_charged=6_000,
    )


async def test_a_contract_call_that_trapped_is_told_with_whose_rule_stopped_it(
    rpc: RpcNode, node: ScriptedNode
) -> None:
    node.script.results["getTransaction"] = found(
        node.script,
        "FAILED",
        resultXdr=result("txFAILED", invoked("TRAPPED")),
        resultMetaXdr=meta(None, (error_event(10, USDC), error_event(10, VAULT))),
    )
    told = await rpc.transaction(HASH)
    assert isinstance(told, Applied)
    assert (told.successful, told.result_code, told.operation_code) == (False, "tx_failed", "trapped")
    assert told.fault == ContractFault(10, "Error(Contract, #10)", USDC)
    assert told.return_value is None
    assert told.fault is not None
    assert ADAPTER.error_name(told.fault) == "Token.BalanceError"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("ENTRY_ARCHIVED", "entry_archived"),
        ("RESOURCE_LIMIT_EXCEEDED", "resource_limit_exceeded"),
        ("INSUFFICIENT_REFUNDABLE_FEE", "insufficient_refundable_fee"),
        ("MALFORMED", "malformed"),
    ],
)
async def test_every_reason_of_a_failed_call_has_its_name(
    rpc: RpcNode, node: ScriptedNode, code: str, name: str
) -> None:
    node.script.results["getTransaction"] = found(node.script, "FAILED", resultXdr=result("txFAILED", invoked(code)))
    told = await rpc.transaction(HASH)
    assert isinstance(told, Applied)
    assert told.operation_code == name


async def test_diagnostic_events_beside_the_meta_are_read_too(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.results["getTransaction"] = found(
        node.script,
        "FAILED",
        resultXdr=result("txFAILED", invoked("TRAPPED")),
        diagnosticEventsXdr=[error_event(4, VAULT)],
    )
    told = await rpc.transaction(HASH)
    assert isinstance(told, Applied)
    assert told.fault == ContractFault(4, "Error(Contract, #4)", VAULT)


async def test_a_fee_bump_tells_what_became_of_its_inner_transaction(rpc: RpcNode, node: ScriptedNode) -> None:
    def bumped(outer: str, inner: str, operations: list[xdr.OperationResult] | None) -> str:
        pair = xdr.InnerTransactionResultPair(
            xdr.Hash(bytes(32)),
            xdr.InnerTransactionResult(
                xdr.Int64(0),
                xdr.InnerTransactionResultResult(xdr.TransactionResultCode[inner], operations),
                xdr.InnerTransactionResultExt(0),
            ),
        )
        return xdr.TransactionResult(
            xdr.Int64(200),
            xdr.TransactionResultResult(xdr.TransactionResultCode[outer], inner_result_pair=pair),
            xdr.TransactionResultExt(0),
        ).to_xdr()

    for outer, inner, operations, expected in (
        ("txFEE_BUMP_INNER_SUCCESS", "txSUCCESS", invoked("SUCCESS"), (True, "tx_fee_bump_inner_success", None)),
        ("txFEE_BUMP_INNER_FAILED", "txFAILED", invoked("TRAPPED"), (False, "tx_fee_bump_inner_failed", "trapped")),
        ("txFEE_BUMP_INNER_FAILED", "txBAD_SEQ", None, (False, "tx_bad_seq", None)),
    ):
        told_result = bumped(outer, inner, operations)
        node.script.results["getTransaction"] = found(node.script, "SUCCESS", resultXdr=told_result, feeBump=True)
        told = await rpc.transaction(HASH)
        assert isinstance(told, Applied)
        assert (told.successful, told.result_code, told.operation_code) == expected


async def test_a_call_is_simulated_or_says_why_not(rpc: RpcNode, node: ScriptedNode) -> None:
    asked = question(ADAPTER.balance().call, PASSPHRASE)
    told = await rpc.simulate(asked)
    assert told == Simulated(scval.to_int128(250_000_000).to_xdr(), RESOURCE_FEE, 1000)
    assert ADAPTER.balance().answer(told) == 250_000_000
    for trap, owner in ((Trap(4, VAULT), VAULT), (Trap(4), None)):
        node.script.views["balance"] = trap
        refused = await rpc.simulate(asked)
        assert isinstance(refused, ContractFault)
        assert (refused.contract_error, refused.contract_id) == (4, owner)
        assert ADAPTER.error_name(refused) == "Paused"
    del node.script.views["balance"]
    missing = await rpc.simulate(asked)
    assert isinstance(missing, ContractFault)
    assert missing.contract_error is None
    assert "non-existent" in missing.reason


async def test_a_prepared_call_has_resources_consents_and_their_fee(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.views["deposit"] = scval.to_int128(1)
    asked = deposit()
    prepared = await rpc.prepare(asked)
    assert isinstance(prepared, Envelope)
    assert prepared.hash != asked.hash
    assert (prepared.source, prepared.sequence, prepared.max_time) == (asked.source, 42, CLOSED_AT + 300)
    assert prepared.fee == 100 + RESOURCE_FEE
    assert inclusion_fee(prepared, PASSPHRASE) == 100
    opened = TransactionEnvelope.from_xdr(prepared.xdr, PASSPHRASE)
    assert opened.signatures == []
    allowed: dict[Leeway, tuple[int, int, int]] = {"some": (1150, 627, 150), "more": (1300, 2178, 200)}
    for leeway, (instructions, write_bytes, fee) in allowed.items():
        roomy = await rpc.prepare(asked, leeway=leeway)
        assert isinstance(roomy, Envelope)
        assert roomy.fee == 100 + RESOURCE_FEE * fee // 100
        assert inclusion_fee(roomy, PASSPHRASE) == 100
        data = TransactionEnvelope.from_xdr(roomy.xdr, PASSPHRASE).transaction.soroban_data
        assert data is not None
        declared = data.resources
        assert (declared.instructions.uint32, declared.write_bytes.uint32) == (instructions, write_bytes)
        assert data.resource_fee.int64 == RESOURCE_FEE * fee // 100


async def test_what_must_be_restored_first_is_told_with_what_restores_it(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.results["simulateTransaction"] = lambda _: {
        "transactionData": soroban_data(),
        "minResourceFee": "1",
        "results": [{"auth": [], "xdr": scval.to_void().to_xdr()}],
        "restorePreamble": {"transactionData": soroban_data(77), "minResourceFee": "77"},
        "latestLedger": 1000,
    }
    told = await rpc.prepare(deposit())
    assert isinstance(told, ContractFault)
    assert told.archived is not None
    assert told.archived.resource_fee == 77


async def test_an_account_that_does_not_exist_has_no_sequence_and_no_balances(rpc: RpcNode) -> None:
    assert await rpc.sequence_of(ALICE.public_key) is None
    assert await rpc.wallet(ALICE.public_key, USDC) == WalletBalances(exists=False, xlm=0, usdc=None)
    assert await rpc.wallet(VAULT, USDC) == WalletBalances(exists=False, xlm=0, usdc=None)


def account_entry(balance: int, sequence: int) -> str:
    """Return Alice's account in base64 XDR."""
    entry = xdr.AccountEntry(
        ALICE.xdr_account_id(),
        xdr.Int64(balance),
        xdr.SequenceNumber(xdr.Int64(sequence)),
        xdr.Uint32(0),
        None,
        xdr.Uint32(0),
        xdr.String32(b""),
        xdr.Thresholds(b"\1\0\0\0"),
        [],
        xdr.AccountEntryExt(0),
    )
    return xdr.LedgerEntryData(xdr.LedgerEntryType.ACCOUNT, account=entry).to_xdr()


async def test_an_account_has_its_sequence_and_balances(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.results["getLedgerEntries"] = lambda params: {
        "entries": [{"key": params["keys"][0], "xdr": account_entry(123, 41), "lastModifiedLedgerSeq": 9}],
        "latestLedger": 1000,
    }
    node.script.views["balance"] = scval.to_int128(55)
    assert await rpc.sequence_of(ALICE.public_key) == 41
    assert await rpc.wallet(ALICE.public_key, USDC) == WalletBalances(exists=True, xlm=123, usdc=55)
    node.script.views["balance"] = Trap(13, USDC)
    assert await rpc.wallet(ALICE.public_key, USDC) == WalletBalances(exists=True, xlm=123, usdc=None)
    node.script.views["balance"] = Trap(11, USDC)
    assert (await fault(rpc.wallet(ALICE.public_key, USDC))).kind == "refused"


async def test_a_contracts_wallet_is_its_entry_in_the_token(rpc: RpcNode, node: ScriptedNode) -> None:
    def entry(token: str, key: xdr.SCVal, value: xdr.SCVal) -> str:
        data = xdr.ContractDataEntry(
            xdr.ExtensionPoint(0),
            scval.to_address(token).address,  # type: ignore[arg-type]
            key,
            xdr.ContractDataDurability.PERSISTENT,
            value,
        )
        return xdr.LedgerEntryData(xdr.LedgerEntryType.CONTRACT_DATA, contract_data=data).to_xdr()

    held = entry(
        USDC,
        scval.to_vec([scval.to_symbol("Balance"), scval.to_address(VAULT)]),
        scval.to_struct(
            {"amount": scval.to_int128(9), "authorized": scval.to_bool(True), "clawback": scval.to_bool(False)}
        ),
    )
    node.script.results["getLedgerEntries"] = lambda params: {
        "entries": [{"key": params["keys"][1], "xdr": held, "lastModifiedLedgerSeq": 9, "liveUntilLedgerSeq": 2000}],
        "latestLedger": 1000,
    }
    assert await rpc.wallet(VAULT, USDC) == WalletBalances(exists=True, xlm=0, usdc=9)


async def test_bids_are_told_by_their_quantiles(rpc: RpcNode) -> None:
    told = await rpc.fee_stats()
    assert (told.p50, told.p90, told.p99, told.max) == (106, 110, 112, 113)


async def test_a_page_of_events_has_its_cursor_and_the_nodes_range(rpc: RpcNode, node: ScriptedNode) -> None:
    event = {
        "type": "contract",
        "ledger": 990,
        "ledgerClosedAt": "2027-01-15T07:59:10Z",
        "contractId": VAULT,
        "id": "0004252017623040001-0000000003",
        "operationIndex": 0,
        "transactionIndex": 1,
        "txHash": HASH,
        "topic": [scval.to_symbol("deposit").to_xdr(), scval.to_address(ALICE.public_key).to_xdr()],
        "value": scval.to_vec([scval.to_int128(5), scval.to_int128(6)]).to_xdr(),
    }
    asked: list[Mapping[str, Any]] = []

    def answer(params: Mapping[str, Any]) -> object:
        asked.append(params)
        return {"events": [event], "cursor": "here", **node.script.range}

    node.script.results["getEvents"] = answer
    page = await rpc.events(VAULT, cursor=None, start_ledger=980, limit=7)
    assert isinstance(page, EventPage)
    assert (page.cursor, page.retained) == ("here", Retained(1, Head(1000, CLOSED)))
    (told,) = page.events
    moved = ADAPTER.read_event(told)
    assert moved is not None
    assert (moved.kind, moved.address, moved.amount, moved.balance_after) == ("deposit", ALICE.public_key, 5, 6)
    assert (moved.event_id, moved.ledger, moved.closed_at.minute) == (event["id"], 990, 59)
    await rpc.events(VAULT, cursor="here", start_ledger=None, limit=7)
    assert asked[0]["startLedger"] == 980
    assert asked[0]["filters"][0]["contractIds"] == [VAULT]
    assert (asked[1]["pagination"], asked[1].get("startLedger")) == ({"cursor": "here", "limit": 7}, None)


@pytest.mark.parametrize("message", ["startLedger must be within the ledger range: 500 - 1000", "no such ledger"])
async def test_a_place_outside_the_range_is_a_value_not_a_fault(rpc: RpcNode, node: ScriptedNode, message: str) -> None:
    node.script.oldest = 500
    node.script.results["getEvents"] = lambda _: Refusal(-32600, message)
    assert await rpc.events(VAULT, cursor=None, start_ledger=1001, limit=7) == OutsideRange(500, 1000)
    assert rpc.latest == 1000


# --- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [("PENDING", "pending"), ("DUPLICATE", "duplicate"), ("TRY_AGAIN_LATER", "try_again_later")],
)
async def test_a_send_tells_what_the_node_said(rpc: RpcNode, node: ScriptedNode, status: str, expected: str) -> None:
    node.script.results["sendTransaction"] = lambda _: {"status": status, "hash": HASH, **node.script.range}
    told = await rpc.send(seal(payment()))
    assert (told.status, told.result_code, told.latest) == (expected, None, Head(1000, CLOSED))


async def test_a_refused_send_tells_why(rpc: RpcNode, node: ScriptedNode) -> None:
    for code, name in (("txBAD_SEQ", "tx_bad_seq"), ("txINSUFFICIENT_FEE", "tx_insufficient_fee")):
        node.script.results["sendTransaction"] = refusing(node.script, result(code))
        told = await rpc.send(seal(payment()))
        assert (told.status, told.result_code) == ("refused", name)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (close_silently(), "unreachable"),
        (reset_before_head(), "unreachable"),
        (reset_amid_body(3, 100), "unreachable"),
        (as_html(502), "status"),
        (as_html(504), "status"),
        (as_html(503), "status"),
        (as_json({"error": "overloaded"}, 503), "status"),
        (as_html(), "malformed"),
        (as_json([]), "malformed"),
        (as_json({"jsonrpc": "2.0", "id": "another", "result": {}}), "malformed"),
        (respond(200, body=b""), "malformed"),
        (respond(200, body=b'{"jsonrpc":"2.0"'), "malformed"),
    ],
)
async def test_a_send_without_a_usable_answer_is_unknown(
    rpc: RpcNode, node: ScriptedNode, answer: Handler, kind: str
) -> None:
    node.script.faults.append(answer)
    with pytest.raises(ChainOutcomeUnknown) as caught:
        await rpc.send(seal(payment()))
    assert caught.value.kind == kind
    assert node.script.asked == ["sendTransaction"], "it is not sent again"


@pytest.mark.parametrize(
    ("refusal", "kind"), [(Refusal(-32603, "could not submit"), "error"), (Refusal(-32001, "too slow"), "error")]
)
async def test_a_send_that_the_node_could_not_finish_is_unknown(
    rpc: RpcNode, node: ScriptedNode, refusal: Refusal, kind: str
) -> None:
    node.script.results["sendTransaction"] = lambda _: refusal
    with pytest.raises(ChainOutcomeUnknown) as caught:
        await rpc.send(seal(payment()))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("answer", "kind", "passing"),
    [
        (as_html(429, (("Retry-After", "7"),)), "rate_limited", True),
        (as_html(401), "status", False),
        (as_html(413), "status", False),
    ],
)
async def test_a_send_that_was_not_taken_up_was_provably_not_sent(
    rpc: RpcNode, node: ScriptedNode, answer: Handler, kind: str, passing: bool
) -> None:
    node.script.faults.append(answer)
    told = await fault(rpc.send(seal(payment())))
    assert (told.kind, told.passing) == (kind, passing)


async def test_a_send_that_the_node_refuses_to_read_was_not_sent(rpc: RpcNode, node: ScriptedNode) -> None:
    node.script.results["sendTransaction"] = lambda _: Refusal(-32602, "invalid_xdr")
    told = await fault(rpc.send(seal(payment())))
    assert (told.kind, told.passing) == ("refused", False)


async def test_a_send_to_nobody_was_provably_not_sent() -> None:
    async with scripted_rpc() as gone:
        url = gone.url
    async with open_transport() as transport:
        told = await fault(RpcNode(url, PASSPHRASE, transport).send(seal(payment())))
    assert (told.kind, told.passing) == ("unreachable", True)


async def test_a_send_past_its_deadline_is_unknown_and_one_that_never_connected_is_not(
    mock_clock: trio.testing.MockClock,
) -> None:
    reached = trio.Event()

    async def deaf(exchange: Exchange) -> None:
        reached.set()
        await silent()(exchange)

    script = RpcScript()
    script.fault = deaf
    async with scripted_rpc(script) as node, open_transport() as transport, trio.open_nursery() as nursery:
        rpc = RpcNode(node.url, PASSPHRASE, transport)
        raised: list[Exception] = []

        async def send() -> None:
            try:
                await rpc.send(seal(payment()))
            except (ChainOutcomeUnknown, ChainUnavailable) as error:
                raised.append(error)

        nursery.start_soon(send)
        await reached.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(16)
        await trio.testing.wait_all_tasks_blocked(0.05)
        (told,) = raised
        assert isinstance(told, ChainOutcomeUnknown)
        assert told.kind == "timeout"

    # A peer that accepts and never greets: TLS is not there yet, so the request cannot have left.
    async with scripted_rpc() as node, open_transport() as transport, trio.open_nursery() as nursery:
        rpc = RpcNode(node.url.replace("http:", "https:"), PASSPHRASE, transport)
        raised.clear()
        nursery.start_soon(send)
        await node.upstream.wait_connections(1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(6)
        await trio.testing.wait_all_tasks_blocked(0.05)
        (told,) = raised
        assert isinstance(told, ChainUnavailable)


# --- every way an answer can be wrong ---------------------------------------------------------------------------------


def told_by(**changed: object) -> Handler:
    """Answer like JSON-RPC, with these members instead of the right ones."""

    async def handle(exchange: Exchange) -> None:
        request = json.loads(await exchange.read_body())
        right = {"jsonrpc": "2.0", "id": request["id"], "result": {"passphrase": "x", "protocolVersion": 1}}
        await as_json({**right, **changed})(exchange)

    return handle


@pytest.mark.parametrize(
    ("answer", "kind", "passing", "retry_after"),
    [
        # The rows of what the SDK makes of them otherwise: JSONDecodeError, ValidationError, AssertionError …
        (as_html(), "malformed", True, None),
        (as_html(429, (("Retry-After", "7"),)), "rate_limited", True, 7.0),
        (as_html(503), "status", True, None),
        (as_json({"message": "quota"}, 429, (("Retry-After", "7"),)), "rate_limited", True, 7.0),
        (as_json({"message": "overloaded"}, 503), "status", True, None),
        (respond(503), "status", True, None),
        (told_by(error={"code": -32603, "message": "m", "data": {"an": "object"}}, result=None), "error", True, None),
        (told_by(result=None), "malformed", True, None),
        (told_by(id="another"), "malformed", True, None),
        (told_by(result={"protocolVersion": 1}), "malformed", True, None),
        (told_by(result=[]), "malformed", True, None),
        (told_by(jsonrpc="1.0"), "malformed", True, None),
        (told_by(error="text", result=None), "malformed", True, None),
        (told_by(error={"code": "text"}, result=None), "malformed", True, None),
        (told_by(error={"code": -32601}, result=None), "refused", False, None),
        (told_by(error={"code": -32700}, id=None, result=None), "refused", False, None),
        (as_json([]), "malformed", True, None),
        (as_json(None), "malformed", True, None),
        (as_json("text"), "malformed", True, None),
        (respond(200, body=b"\xff\xfe"), "malformed", True, None),
        (respond(200, body=b"[" * 100_000), "malformed", True, None),
        (respond(200, body=b'{"id":' + b"9" * 5000 + b"}"), "malformed", True, None),
        (respond(200, [("Content-Encoding", "gzip")], b"\x1f\x8b"), "malformed", True, None),
        (respond(204), "status", False, None),
        (respond(302, [("Location", "http://127.0.0.1:1/")]), "status", False, None),
        (as_html(404), "status", False, None),
        (as_html(408), "status", True, None),
        (as_html(500), "status", True, None),
        (as_html(429, (("Retry-After", "soon"),)), "rate_limited", True, None),
        (
            as_html(
                429,
                (("Date", "Sat, 21 Nov 2026 10:00:00 GMT"), ("Retry-After", "Sat, 21 Nov 2026 10:00:30 GMT")),
            ),
            "rate_limited",
            True,
            30.0,
        ),
        (as_html(429, (("Retry-After", "86400"),)), "rate_limited", True, 3600.0),
        (big(REPLY_BYTES_MAX // (1 << 20) + 1), "malformed", True, None),
        (chunked([b"x" * (1 << 20)] * (REPLY_BYTES_MAX // (1 << 20) + 1)), "malformed", True, None),
        (reset_amid_body(3, 100), "unreachable", True, None),
        (close_silently(), "unreachable", True, None),
    ],
)
async def test_a_wrong_answer_is_one_fault_that_says_what_to_do(
    rpc: RpcNode, node: ScriptedNode, answer: Handler, kind: str, passing: bool, retry_after: float | None
) -> None:
    async def forgiving(exchange: Exchange) -> None:
        try:
            await answer(exchange)
        except trio.BrokenResourceError:  # we went away before the end of it
            await exchange.connection.close()

    node.script.faults.append(forgiving)
    told = await fault(rpc.network())
    assert (told.kind, told.passing, told.retry_after_seconds) == (kind, passing, retry_after)
    assert (await rpc.network()).passphrase == PASSPHRASE, "the next question is answered"


ASKINGS: Final[Mapping[str, Asking]] = {
    "network": lambda rpc: rpc.network(),
    "healthy": lambda rpc: rpc.healthy(),
    "retained": lambda rpc: rpc.retained(),
    "sequence_of": lambda rpc: rpc.sequence_of(ALICE.public_key),
    "simulate": lambda rpc: rpc.simulate(deposit()),
    "prepare": lambda rpc: rpc.prepare(deposit()),
    "transaction": lambda rpc: rpc.transaction(HASH),
    "events": lambda rpc: rpc.events(VAULT, cursor="c", start_ledger=None, limit=1),
    "fee_stats": lambda rpc: rpc.fee_stats(),
    "wallet": lambda rpc: rpc.wallet(ALICE.public_key, USDC),
    "contract wallet": lambda rpc: rpc.wallet(VAULT, USDC),
}
WRONG_RESULTS: Final[tuple[object, ...]] = (
    {},
    {"latestLedger": "x"},
    {"status": "SUCCESS"},
    [],
    7,
    "text",
    {"error": 7},
    {"entries": 7},
)


@pytest.mark.parametrize("method", list(ASKINGS))
async def test_no_result_makes_a_question_raise_anything_but_its_fault(
    rpc: RpcNode, node: ScriptedNode, method: str
) -> None:
    good = await _told(ASKINGS[method](rpc))
    assert not isinstance(good, ChainUnavailable) or method == "prepare"
    for wrong in WRONG_RESULTS:
        node.script.fault = told_by(result=wrong)
        assert isinstance(await _told(ASKINGS[method](rpc)), ChainUnavailable), wrong


async def _told(asking: Awaitable[object]) -> object:
    try:
        return await asking
    except ChainUnavailable as error:
        return error


async def test_xdr_that_cannot_be_read_is_a_fault(rpc: RpcNode, node: ScriptedNode) -> None:
    for bad in ("", "AAAA", "not base64!", "////" * 50):
        node.script.results["getTransaction"] = found(node.script, "SUCCESS", resultXdr=bad)
        assert (await fault(rpc.transaction(HASH))).kind == "malformed"
        entry = {"key": "AAAA", "xdr": bad, "lastModifiedLedgerSeq": 1}
        node.script.results["getLedgerEntries"] = constant({"entries": [entry], "latestLedger": 1})
        assert (await fault(rpc.sequence_of(ALICE.public_key))).kind == "malformed"
        node.script.results["sendTransaction"] = refusing(node.script, bad)
        if bad:
            with pytest.raises(ChainOutcomeUnknown):
                await rpc.send(seal(payment()))


async def test_a_question_can_be_cancelled_and_the_next_one_is_answered(rpc: RpcNode, node: ScriptedNode) -> None:
    for _ in range(40):  # more than there are connections
        node.script.fault = silent()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                count = len(node.script.asked)
                nursery.start_soon(rpc.network)
                while len(node.script.asked) == count:  # noqa: ASYNC110 - the node is in this loop
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    node.script.fault = None
    assert (await rpc.network()).passphrase == PASSPHRASE


def test_the_networks_passphrases_are_the_sdks() -> None:
    assert Network.TESTNET_NETWORK_PASSPHRASE == PASSPHRASE
    assert isinstance(read(deposit().xdr, PASSPHRASE), Envelope)
    assert Signer.from_seed(CHANNEL.secret, PASSPHRASE).address == CHANNEL.public_key
