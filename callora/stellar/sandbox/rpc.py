"""The sandbox's JSON-RPC: what a node answers to the methods of stellar-rpc, in its shapes and with its refusals.

Source: stellar-rpc's own handlers. Whole numbers that it writes as strings are strings here. XDR is base64; its JSON
form (`xdrFormat: "json"`) is refused.
"""

import base64
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import trio
from stellar_sdk import xdr

from callora.stellar.sandbox.closing import close_meta
from callora.stellar.sandbox.event_pages import get_events
from callora.stellar.sandbox.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    U32_MAX,
    Document,
    RpcError,
    check_format,
    error_document,
    list_in,
    number_in,
    object_in,
    split_toid,
    text_in,
    toid_of,
)
from callora.stellar.sandbox.soroban.simulation import Simulation, SimulationFailed, Simulator
from callora.stellar.sandbox.soroban.storage import has_life, is_archived, is_temporary
from callora.stellar.sandbox.state import Header, Included, Node, Undecodable
from callora.stellar.sandbox.transactions import decode, network_id_of

HEALTHY_SECONDS: Final = 30
KEYS_MAX: Final = 200
PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 200
SOROBAN_FEES_LEDGERS: Final = 50
CLASSIC_FEES_LEDGERS: Final = 10
_PERCENTILES: Final = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
_EMPTY_EXT: Final = xdr.LedgerEntryExt(0).to_xdr()


class Rpc:
    """What answers for every node of a sandbox."""

    def __init__(self, simulator: Simulator) -> None:
        """Make one.

        Args:
            simulator: of the network's rules.
        """
        self._simulator = simulator
        self._methods: Mapping[str, Callable[[Node, Document], Document]] = {
            "getHealth": _get_health,
            "getNetwork": _get_network,
            "getLatestLedger": _get_latest_ledger,
            "getVersionInfo": _get_version_info,
            "getFeeStats": _get_fee_stats,
            "getLedgerEntries": _get_ledger_entries,
            "simulateTransaction": self._simulate_transaction,
            "sendTransaction": _send_transaction,
            "getTransaction": _get_transaction,
            "getTransactions": _get_transactions,
            "getLedgers": _get_ledgers,
            "getEvents": get_events,
        }

    async def answer(self, node: Node, told: Any) -> Any:
        """Return the answer to a JSON-RPC document: a request, or a batch of them.

        Args:
            told: the document, parsed.

        Returns:
            What to send back; None for nothing, where only notifications came.

        Cancellation: before anything was done.
        """
        await trio.lowlevel.checkpoint()
        if not isinstance(told, list):
            return self._answer_one(node, told)
        if not told:
            return error_document(None, INVALID_REQUEST, "empty request batch")
        answers = [answer for answer in (self._answer_one(node, each) for each in told) if answer is not None]
        return answers or None

    def _answer_one(self, node: Node, told: Any) -> Document | None:
        if not isinstance(told, dict):
            return error_document(None, INVALID_REQUEST, "request is not a JSON object")
        request_id = told.get("id")
        if isinstance(request_id, bool) or not isinstance(request_id, str | int | float | None):
            return error_document(None, INVALID_REQUEST, "invalid request ID")
        name = told.get("method")
        if told.get("jsonrpc") != "2.0" or not isinstance(name, str):
            return error_document(request_id, INVALID_REQUEST, "invalid request: no version 2.0, or no method")
        answer = self._answer_method(node, name, told.get("params"), request_id)
        return answer if "id" in told else None

    def _answer_method(self, node: Node, name: str, params: Any, request_id: Any) -> Document:
        method = self._methods.get(name)
        if method is None:
            return error_document(request_id, METHOD_NOT_FOUND, f"no such method {name!r}")
        try:
            if not (params is None or isinstance(params, dict) or params == []):
                raise RpcError(INVALID_PARAMS, "invalid parameters: an object is expected")
            result = method(node, dict(params or {}))
        except RpcError as error:
            return error_document(request_id, error.code, error.message)
        return {"jsonrpc": "2.0", "id": request_id, "result": result}

    def _simulate_transaction(self, node: Node, params: Document) -> Document:
        check_format(params)
        mode = params.get("authMode") or None
        latest = node.reader.header.sequence
        if mode not in (None, "enforce", "record", "record_allow_nonroot"):
            why = "optional 'authMode' must be one of enforce,record,record_allow_nonroot when included"
            return _failed_simulation(SimulationFailed(why), latest)
        transaction = decode(text_in(params, "transaction"), network_id_of(node.passphrase))
        if isinstance(transaction, Undecodable):
            return _failed_simulation(SimulationFailed("Could not unmarshal transaction"), latest)
        config = object_in(params, "resourceConfig")
        found = self._simulator.simulate(
            node.reader,
            node.context(),
            transaction,
            auth_mode=mode,
            upgraded_auth=params.get("useUpgradedAuth", True) is not False,
            more_instructions=number_in(config, "instructionLeeway") or 0,
        )
        if isinstance(found, SimulationFailed):
            return _failed_simulation(found, latest)
        return _simulated(found, latest)


# The node and its network.


def _get_health(node: Node, params: Document) -> Document:
    latest, oldest = node.reader.header, node.oldest
    latency = node.now - latest.closed_at
    if latency > HEALTHY_SECONDS:
        why = f"latency ({latency}s) since last known ledger closed is too high (>{HEALTHY_SECONDS}s)"
        raise RpcError(INTERNAL_ERROR, why)
    return {
        "status": "healthy",
        "latestLedger": latest.sequence,
        "latestLedgerCloseTime": str(latest.closed_at),
        "oldestLedger": oldest.sequence,
        "oldestLedgerCloseTime": str(oldest.closed_at),
        "ledgerRetentionWindow": latest.sequence - oldest.sequence + 1,
    }


def _get_network(node: Node, params: Document) -> Document:
    told: Document = {"passphrase": node.passphrase, "protocolVersion": node.reader.header.protocol_version}
    if node.friendbot_url is not None:
        told["friendbotUrl"] = node.friendbot_url
    return told


def _get_latest_ledger(node: Node, params: Document) -> Document:
    latest = node.reader.header
    return {
        "id": latest.hash().hex(),
        "protocolVersion": latest.protocol_version,
        "sequence": latest.sequence,
        "closeTime": str(latest.closed_at),
        "headerXdr": latest.to_xdr().to_xdr(),
        "metadataXdr": close_meta(latest, tuple(node.included(latest.sequence, latest.sequence))),
    }


def _get_version_info(node: Node, params: Document) -> Document:
    return {
        "version": "callora-sandbox",
        "commitHash": "",
        "buildTimestamp": "",
        "captiveCoreVersion": "callora-sandbox: no stellar-core",
        "protocolVersion": node.reader.header.protocol_version,
    }


def _get_fee_stats(node: Node, params: Document) -> Document:
    latest = node.reader.header.sequence
    return {
        "sorobanInclusionFee": _distribution(node, SOROBAN_FEES_LEDGERS, latest, soroban=True),
        "inclusionFee": _distribution(node, CLASSIC_FEES_LEDGERS, latest, soroban=False),
        "latestLedger": latest,
    }


def _distribution(node: Node, ledgers: int, latest: int, *, soroban: bool) -> Document:
    found = sorted(node.inclusion_fees(ledgers, soroban=soroban))
    told: Document = {"transactionCount": str(len(found)), "ledgerCount": min(ledgers, latest)}
    if not found:
        return told | {"max": "0", "min": "0", "mode": "0"} | {f"p{part}": "0" for part in _PERCENTILES}
    mode = Counter(found).most_common(1)[0][0]
    told |= {"max": str(found[-1]), "min": str(found[0]), "mode": str(mode)}
    return told | {f"p{part}": str(found[-(-part * len(found) // 100) - 1]) for part in _PERCENTILES}


# Entries.


def _get_ledger_entries(node: Node, params: Document) -> Document:
    check_format(params)
    keys = list_in(params, "keys")
    if len(keys) > KEYS_MAX:
        raise RpcError(INVALID_PARAMS, f"key count ({len(keys)}) exceeds maximum supported ({KEYS_MAX})")
    wanted = [_ledger_key(text, place) for place, text in enumerate(keys)]
    reader = node.reader
    found = []
    for key in wanted:
        entry = reader.get(key)
        if entry is None:
            continue
        told = {
            "key": base64.b64encode(key).decode(),
            "xdr": entry.data.to_xdr(),
            "lastModifiedLedgerSeq": entry.last_modified,
            "extXdr": _EMPTY_EXT,
        }
        if has_life(key):
            assert entry.live_until is not None
            if entry.live_until < reader.header.sequence and is_temporary(key):
                continue
            archived = is_archived(key, entry, reader.header.sequence)
            told["liveUntilLedgerSeq"] = 0 if archived else entry.live_until
        found.append(told)
    return {"entries": found, "latestLedger": reader.header.sequence}


def _ledger_key(text: Any, place: int) -> bytes:
    try:
        key = xdr.LedgerKey.from_xdr(text)
        raw = key.to_xdr_bytes()
    except Exception:
        # A stranger's bytes go through a foreign parser, which has an exception of its own for every fault.
        raise RpcError(INVALID_PARAMS, f"cannot unmarshal key value {text} at index {place}") from None
    if key.type == xdr.LedgerEntryType.TTL:
        raise RpcError(INVALID_PARAMS, "ledger ttl entries cannot be queried directly")
    return raw


# Simulation.


def _failed_simulation(failed: SimulationFailed, latest: int) -> Document:
    told: Document = {"error": failed.error, "latestLedger": latest}
    if failed.events:
        told["events"] = [event.to_xdr() for event in failed.events]
    return told


def _simulated(found: Simulation, latest: int) -> Document:
    told: Document = {
        "transactionData": found.data.to_xdr(),
        "minResourceFee": str(found.fee),
        "events": [event.to_xdr() for event in found.events],
        "latestLedger": latest,
    }
    if found.value is not None:
        told["results"] = [{"auth": [entry.to_xdr() for entry in found.auth], "xdr": found.value.to_xdr()}]
    if found.restoring is not None:
        told["restorePreamble"] = {
            "transactionData": found.restoring.data.to_xdr(),
            "minResourceFee": str(found.restoring.fee),
        }
    told["stateChanges"] = [
        {
            "type": "created" if change.before is None else "deleted" if change.after is None else "updated",
            "key": change.key,
            "before": change.before,
            "after": change.after,
        }
        for change in found.changes
    ]
    return told


# Transactions.


def _send_transaction(node: Node, params: Document) -> Document:
    check_format(params)
    latest = node.reader.header
    admission = node.submit(text_in(params, "transaction"))
    if isinstance(admission, Undecodable):
        raise RpcError(INVALID_PARAMS, "invalid_xdr")
    told: Document = {
        "status": admission.status,
        "hash": admission.hash,
        "latestLedger": latest.sequence,
        "latestLedgerCloseTime": str(latest.closed_at),
    }
    if admission.result is not None:
        told["errorResultXdr"] = admission.result
        told["diagnosticEventsXdr"] = list(admission.diagnostics)
    return told


def _get_transaction(node: Node, params: Document) -> Document:
    check_format(params)
    text = text_in(params, "hash")
    if len(text) != 64:
        raise RpcError(INVALID_PARAMS, f"unexpected hash length ({len(text)})")
    try:
        tx_hash = bytes.fromhex(text).hex()
    except ValueError:
        raise RpcError(INVALID_PARAMS, f"incorrect hash: {text}") from None
    latest, oldest = node.reader.header, node.oldest
    found = node.transaction(tx_hash)
    told = {
        "latestLedger": latest.sequence,
        "latestLedgerCloseTime": str(latest.closed_at),
        "oldestLedger": oldest.sequence,
        "oldestLedgerCloseTime": str(oldest.closed_at),
    }
    if found is None:
        return {"status": "NOT_FOUND", "txHash": text, **told}
    return {**told, **_told(found), "txHash": text, "createdAt": str(found.closed_at)}


def _told(found: Included) -> Document:
    told: Document = {
        "status": "SUCCESS" if found.successful else "FAILED",
        "txHash": found.hash,
        "applicationOrder": found.order,
        "feeBump": found.inner_hash is not None,
        "envelopeXdr": found.envelope,
        "resultXdr": found.result,
        "resultMetaXdr": found.meta,
        "events": {
            "transactionEventsXdr": list(found.transaction_events),
            "contractEventsXdr": [[event.xdr for event in events] for events in found.events],
        },
        "ledger": found.ledger,
        "createdAt": found.closed_at,
    }
    if found.diagnostics:
        told["diagnosticEventsXdr"] = list(found.diagnostics)
    return told


@attrs.frozen
class _Page:
    """Which part of a list is asked for."""

    start: int
    """A ledger; 0 where there is a cursor."""
    cursor: str
    limit: int


def _page(node: Node, params: Document) -> _Page:
    """Return which page is asked for.

    Raises:
        RpcError: none that the node has.
    """
    check_format(params)
    start = number_in(params, "startLedger") or 0
    pagination = object_in(params, "pagination")
    cursor = text_in(pagination, "cursor")
    limit = number_in(pagination, "limit") or PAGE_DEFAULT
    oldest, latest = node.oldest.sequence, node.reader.header.sequence
    if cursor and start:
        raise RpcError(INVALID_REQUEST, f"startLedger ({start}) and cursor ({cursor}) cannot both be set")
    if not cursor and not oldest <= start <= latest:
        why = (
            f"start ledger ({start}) must be between the oldest ledger: {oldest} and the latest ledger: {latest}"
            " for this rpc instance"
        )
        raise RpcError(INVALID_REQUEST, why)
    if limit > PAGE_MAX:
        raise RpcError(INVALID_REQUEST, f"limit must not exceed {PAGE_MAX}")
    return _Page(start, cursor, limit)


def _get_transactions(node: Node, params: Document) -> Document:
    page = _page(node, params)
    latest, oldest = node.reader.header, node.oldest
    after = (page.start, 0)
    if page.cursor:
        if not page.cursor.isascii() or not page.cursor.isdigit() or int(page.cursor) >= 2**63:
            raise RpcError(INVALID_PARAMS, f"invalid cursor {page.cursor}")
        ledger, order, _ = split_toid(int(page.cursor))
        after = (ledger, order)
        if not oldest.sequence <= ledger <= latest.sequence:
            raise RpcError(INVALID_PARAMS, f"database does not contain metadata for ledger: {ledger}")
    found: list[Included] = []
    for each in node.included(after[0], latest.sequence):
        if (each.ledger, each.order) > after:
            found.append(each)
            if len(found) == page.limit:
                break
    last = toid_of(latest.sequence, _count(node, latest.sequence), 1)
    if len(found) == page.limit:
        last = toid_of(found[-1].ledger, found[-1].order, 1)
    return {
        "transactions": [_told(each) for each in found],
        "latestLedger": latest.sequence,
        "latestLedgerCloseTimestamp": latest.closed_at,
        "oldestLedger": oldest.sequence,
        "oldestLedgerCloseTimestamp": oldest.closed_at,
        "cursor": str(last),
    }


def _count(node: Node, ledger: int) -> int:
    return sum(1 for _ in node.included(ledger, ledger))


def _get_ledgers(node: Node, params: Document) -> Document:
    page = _page(node, params)
    latest, oldest = node.reader.header, node.oldest
    start = page.start
    if page.cursor:
        if not page.cursor.isascii() or not page.cursor.isdigit() or int(page.cursor) >= U32_MAX:
            raise RpcError(INVALID_PARAMS, f"invalid cursor {page.cursor}")
        start = int(page.cursor) + 1
        if not oldest.sequence <= start <= latest.sequence:
            why = (
                f"cursor ('{page.cursor}') must be between the oldest ledger: {oldest.sequence} and the latest"
                f" ledger: {latest.sequence} for this rpc instance"
            )
            raise RpcError(INVALID_PARAMS, why)
    last = min(start + page.limit - 1, latest.sequence)
    headers = [header for header in map(node.header_of, range(start, last + 1)) if header is not None]
    return {
        "ledgers": [_told_ledger(node, header) for header in headers],
        "latestLedger": latest.sequence,
        "latestLedgerCloseTime": latest.closed_at,
        "oldestLedger": oldest.sequence,
        "oldestLedgerCloseTime": oldest.closed_at,
        "cursor": str(last),
    }


def _told_ledger(node: Node, header: Header) -> Document:
    history = xdr.LedgerHeaderHistoryEntry(xdr.Hash(header.hash()), header.to_xdr(), xdr.LedgerHeaderHistoryEntryExt(0))
    return {
        "hash": header.hash().hex(),
        "sequence": header.sequence,
        "ledgerCloseTime": str(header.closed_at),
        "headerXdr": history.to_xdr(),
        "metadataXdr": close_meta(header, tuple(node.included(header.sequence, header.sequence))),
    }
