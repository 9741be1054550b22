"""Nodes of the chain whose every answer a test scripts, on real sockets and in real XDR. They judge nothing: what a
network would do with a transaction is the sandbox's to show.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import httpx
import trio
from stellar_sdk import Keypair, StrKey, TransactionEnvelope, scval, xdr

from callora.config.settings import PASSPHRASES
from callora.stellar.transport import Transport
from tests.support.upstream import Exchange, Handler, RawUpstream, raw_upstream, respond

PASSPHRASE: Final = PASSPHRASES["testnet"]
CLOSED_AT: Final = 1_800_000_000
"""When the scripted node's latest ledger closed."""
RESOURCE_FEE: Final = 5_000


def contract(name: str) -> str:
    """Return the address of a contract that exists in name only."""
    return StrKey.encode_contract(hashlib.sha256(name.encode()).digest())


def account(name: str) -> Keypair:
    """Return an account's key; the same for the same name."""
    return Keypair.from_raw_ed25519_seed(hashlib.sha256(name.encode()).digest())


VAULT: Final = contract("vault")
USDC: Final = contract("usdc")
SETTLEMENT: Final = contract("settlement")
OWNER: Final = account("owner")
ENVIRON: Final[Mapping[str, str]] = {
    "SOROBAN_RPC_ENABLED": "true",
    "STELLAR_TESTNET_VAULT_CONTRACT_ID": VAULT,
}
"""Settings of a service with a chain, but for the node's URL."""


HORIZON_ROOT: Final = {
    "history_latest_ledger": 1000,
    "history_latest_ledger_closed_at": "2027-01-15T08:00:00Z",
    "network_passphrase": PASSPHRASE,
}
"""What the root of a Horizon says."""


@attrs.frozen
class Refusal:
    """A JSON-RPC error."""

    code: int
    message: str = ""
    data: object = None


@attrs.frozen
class Trap:
    """A contract call that fails."""

    number: int
    contract_id: str | None = None
    """Whose error it is; None: no diagnostic event tells."""


def vault_views() -> dict[str, xdr.SCVal | Trap]:
    """Return what a g1 vault contract answers when it is asked."""
    return {
        "get_meta": scval.to_struct(
            {
                "owner": scval.to_address(OWNER.public_key),
                "balance": scval.to_int128(250_000_000),
                "authorized_caller": scval.to_void(),
                "min_deposit": scval.to_int128(1),
            }
        ),
        "get_contract_addresses": scval.to_vec([scval.to_address(USDC), scval.to_address(SETTLEMENT), scval.to_void()]),
        "balance": scval.to_int128(250_000_000),
        "is_authorized_depositor": scval.to_bool(True),
        "is_paused": scval.to_bool(False),
        "is_request_processed": scval.to_bool(False),
        "deposit": scval.to_int128(1),
        "set_allowed_depositor": scval.to_void(),
        "withdraw_to": Trap(5),
        "batch_deduct": scval.to_int128(1),
    }


def g2_views() -> dict[str, xdr.SCVal | Trap]:
    """Return what a g2 vault contract answers when it is asked."""
    views = vault_views()
    del views["get_meta"], views["withdraw_to"]
    return {**views, "get_owner": scval.to_address(OWNER.public_key), "capabilities": scval.to_uint64(7)}


def error_event(number: int, contract_id: str | None) -> str:
    """Return the diagnostic event of a contract's error, in base64 XDR."""
    error = xdr.SCVal(
        xdr.SCValType.SCV_ERROR,
        error=xdr.SCError(xdr.SCErrorType.SCE_CONTRACT, contract_code=xdr.Uint32(number)),
    )
    body = xdr.ContractEventBody(0, xdr.ContractEventV0([scval.to_symbol("error"), error], scval.to_void()))
    owner = None if contract_id is None else xdr.ContractID(xdr.Hash(StrKey.decode_contract(contract_id)))
    event = xdr.ContractEvent(xdr.ExtensionPoint(0), owner, xdr.ContractEventType.DIAGNOSTIC, body)
    return xdr.DiagnosticEvent(False, event).to_xdr()


def soroban_data(fee: int = RESOURCE_FEE) -> str:
    """Return the resources of a call that touches nothing, in base64 XDR."""
    resources = xdr.SorobanResources(xdr.LedgerFootprint([], []), xdr.Uint32(1000), xdr.Uint32(200), xdr.Uint32(100))
    return xdr.SorobanTransactionData(xdr.SorobanTransactionDataExt(0), resources, xdr.Int64(fee)).to_xdr()


class RpcScript:
    """What an RPC node answers. Everything may be changed between two requests."""

    def __init__(self) -> None:
        """Begin as a healthy node of testnet with a g1 vault contract."""
        self.passphrase = PASSPHRASE
        self.oldest, self.ledger, self.closed_at = 1, 1000, CLOSED_AT
        self.views = vault_views()
        """What contract functions return, by name."""
        self.results: dict[str, Callable[[Mapping[str, Any]], object]] = {}
        """Answers of methods, by name, instead of the usual ones: a result or a Refusal, of the parameters."""
        self.faults: list[Handler] = []
        """Taken one a request, before any answer."""
        self.fault: Handler | None = None
        """Instead of every answer."""
        self.asked: list[str] = []
        """Methods, in order, those included that a fault answered."""

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        request = json.loads(await exchange.read_body())
        self.asked.append(request["method"])
        if self.faults:
            await self.faults.pop(0)(exchange)
            return
        if self.fault is not None:
            await self.fault(exchange)
            return
        answer = self.answer(request["method"], request.get("params") or {})
        told: dict[str, object] = {"jsonrpc": "2.0", "id": request["id"]}
        if isinstance(answer, Refusal):
            told["error"] = {"code": answer.code, "message": answer.message, "data": answer.data}
        else:
            told["result"] = answer
        await respond(200, [("Content-Type", "application/json")], json.dumps(told).encode())(exchange)

    def answer(self, method: str, params: Mapping[str, Any]) -> object:
        """Return the result of a method, or a Refusal."""
        if method in self.results:
            return self.results[method](params)
        return getattr(self, f"_{method}")(params)

    @property
    def range(self) -> dict[str, object]:
        """What most answers say of the ledgers that the node has."""
        return {
            "latestLedger": self.ledger,
            "latestLedgerCloseTime": str(self.closed_at),
            "oldestLedger": self.oldest,
            "oldestLedgerCloseTime": str(self.closed_at - 5 * (self.ledger - self.oldest)),
        }

    def _getHealth(self, _: Mapping[str, Any]) -> object:
        return {"status": "healthy", "ledgerRetentionWindow": 120960, **self.range}

    def _getNetwork(self, _: Mapping[str, Any]) -> object:
        return {"passphrase": self.passphrase, "protocolVersion": 23}

    def _getTransaction(self, params: Mapping[str, Any]) -> object:
        return {"status": "NOT_FOUND", "txHash": params["hash"], **self.range}

    def _getLedgerEntries(self, _: Mapping[str, Any]) -> object:
        return {"entries": [], "latestLedger": self.ledger}

    def _sendTransaction(self, _: Mapping[str, Any]) -> object:
        return {"status": "PENDING", "hash": "ab" * 32, **self.range}

    def _getEvents(self, _: Mapping[str, Any]) -> object:
        return {"events": [], "cursor": f"{self.ledger << 32:019d}-0000000000", **self.range}

    def _getFeeStats(self, _: Mapping[str, Any]) -> object:
        names = ("min", "mode", "p10", "p20", "p30", "p40", "p50", "p60", "p70", "p80", "p90", "p95", "p99", "max")
        bids: dict[str, object] = {name: str(100 + number) for number, name in enumerate(names)}
        bids |= {"transactionCount": "10", "ledgerCount": 50}
        return {"sorobanInclusionFee": bids, "inclusionFee": bids, "latestLedger": self.ledger}

    def _simulateTransaction(self, params: Mapping[str, Any]) -> object:
        function = called(params["transaction"])
        found = self.views.get(function)
        if found is None:
            text = (
                f"HostError: Error(WasmVm, MissingValue)\ntrying to invoke non-existent contract function, {function}"
            )
            return {"error": text, "events": [], "latestLedger": self.ledger}
        if isinstance(found, Trap):
            events = [error_event(found.number, found.contract_id)] if found.contract_id is not None else []
            text = f"HostError: Error(Contract, #{found.number})"
            return {"error": text, "events": events, "latestLedger": self.ledger}
        return {
            "transactionData": soroban_data(),
            "minResourceFee": str(RESOURCE_FEE),
            "results": [{"auth": [], "xdr": found.to_xdr()}],
            "events": [],
            "latestLedger": self.ledger,
        }


def called(transaction: str) -> str:
    """Return the name of the contract function that a transaction calls."""
    (operation,) = TransactionEnvelope.from_xdr(transaction, PASSPHRASE).transaction.operations
    function: Any = operation
    name: bytes = function.host_function.invoke_contract.function_name.sc_symbol
    return name.decode()


@attrs.frozen
class ScriptedNode:
    """A listening node."""

    script: RpcScript
    upstream: RawUpstream

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.upstream.url


@asynccontextmanager
async def scripted_rpc(script: RpcScript | None = None, *, port: int = 0) -> AsyncIterator[ScriptedNode]:
    """Serve a scripted RPC node for the length of the block."""
    script = script or RpcScript()
    async with raw_upstream(script, port=port) as upstream:
        yield ScriptedNode(script, upstream)


def as_json(document: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Handler:
    """Answer with a JSON document."""
    body = json.dumps(document).encode()
    return respond(status, [("Content-Type", "application/json"), *headers], body)


def as_html(status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Handler:
    """Answer as a proxy's error page does."""
    return respond(status, [("Content-Type", "text/html"), *headers], b"<html><body>Please wait</body></html>")


class MemoryNet:
    """A network in memory, for tests on a virtual clock: scripted RPC nodes by host name, and what befalls them."""

    def __init__(self, **scripts: RpcScript) -> None:
        """Describe the network.

        Args:
            scripts: nodes by host name, such as `one`, which answers at `https://one`.
        """
        self.scripts = scripts
        self.faults: dict[str, Exception | httpx.Response | float] = {}
        """By host: what is raised, answered instead, or how many seconds the answer takes."""
        self.horizon: dict[str, tuple[int, object]] = {"/": (200, HORIZON_ROOT)}
        """What `https://horizon` answers, by path: status and document; of anything else that there is none."""
        self.requests: list[tuple[float, str, str]] = []
        """When, to whom, and which method, or path."""

    def transport(self) -> Transport:
        """Return our side of it."""
        return Transport(httpx.AsyncClient(transport=httpx.MockTransport(self._answer)))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        is_rpc = request.url.host != "horizon"
        asked: dict[str, Any] = json.loads(request.content) if is_rpc else {"method": request.url.path}
        self.requests.append((trio.current_time(), request.url.host, asked["method"]))
        fault = self.faults.get(request.url.host)
        if isinstance(fault, Exception):
            raise type(fault)(*fault.args)  # a new one: each raise would add to the old one's traceback
        if isinstance(fault, httpx.Response):
            return _response(fault.status_code, fault.content, fault.headers)
        if fault is not None:
            await trio.sleep(fault)
        if not is_rpc:
            status, document = self.horizon.get(asked["method"], (404, {"type": "not_found", "status": 404}))
            return _response(status, json.dumps(document).encode())
        found = self.scripts[request.url.host].answer(asked["method"], asked.get("params") or {})
        told: dict[str, object]
        if isinstance(found, Refusal):
            told = {"error": {"code": found.code, "message": found.message, "data": found.data}}
        else:
            told = {"result": found}
        return _response(200, json.dumps({"jsonrpc": "2.0", "id": asked["id"], **told}).encode())


def _response(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """Return a response whose body comes as a stream, as from a socket."""

    async def pieces() -> AsyncIterator[bytes]:  # noqa: ASYNC124 - a stream of one piece
        yield body

    kept = {name: value for name, value in (headers or {}).items() if name.lower() != "content-length"}
    return httpx.Response(status, headers=kept, content=pieces())
