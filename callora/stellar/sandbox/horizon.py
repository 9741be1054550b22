"""Horizon, as far as clients of Callora need it: the routes, paging, submission and streams of one node.

Every answer is made from what the node knows, so a node that lags tells an older truth here as well.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

import attrs
import trio
from stellar_sdk import StrKey, xdr

from callora.stellar.sandbox import transactions
from callora.stellar.sandbox.codes import result_codes
from callora.stellar.sandbox.ledger import SandboxNode
from callora.stellar.sandbox.resources import (
    Document,
    Shown,
    account_data,
    account_document,
    instant_text,
    ledger_document,
    toid,
)
from callora.stellar.sandbox.state import Admission, Included, Transaction, Undecodable
from callora.stellar.sandbox.web import Answer, Request, Stream, bad_request, document, not_found, problem

SUBMIT_SECONDS: Final = 30.0
"""How long a submission waits for its ledger before it is answered with 504."""
LIMIT_DEFAULT: Final = 10
LIMIT_MAX: Final = 200
_PAYMENTS: Final = ("payment", "create_account", "invoke_host_function")
_CONTRACTS: Final = ("invoke_host_function",)
"""Operations alone in their transactions: they are of every account that the transaction's events name."""
_ADDRESS: Final = "(?P<account>[A-Z0-9]{56})"
_HASH: Final = "(?P<hash>[0-9a-fA-F]{64})"
_HELLO: Final = b'retry: 1000\nevent: open\ndata: "hello"\n\n'

Kind: TypeAlias = Literal["transactions", "operations", "payments", "effects", "ledgers"]
Token: TypeAlias = tuple[int, int]
"""A place in a list: the number of a ledger, transaction or operation, and of an effect in that."""
Handler: TypeAlias = Callable[[Request, Mapping[str, str]], Awaitable[Answer | Stream]]


@attrs.frozen
class _Page:
    """What part of a list is asked for."""

    cursor: Token | None
    descending: bool
    limit: int


class Horizon:
    """The Horizon of one node."""

    def __init__(self, node: SandboxNode, base: str) -> None:
        """Make one.

        Args:
            base: its own address, without a slash at its end, for links.
        """
        self._node = node
        self._base = base
        self._routes: tuple[tuple[str, re.Pattern[str], Handler], ...] = tuple(
            (method, re.compile(path), handler)
            for method, path, handler in (
                ("GET", "/", self._root),
                ("GET", "/fee_stats", self._fee_stats),
                ("GET", "/ledgers", self._ledgers),
                ("GET", r"/ledgers/(?P<ledger>\d{1,10})", self._ledger),
                ("GET", f"/accounts/{_ADDRESS}", self._account),
                ("GET", f"/accounts/{_ADDRESS}/data/(?P<name>[^/]+)", self._data),
                ("GET", f"/accounts/{_ADDRESS}/(?P<kind>transactions|operations|payments|effects)", self._list),
                ("GET", "/(?P<kind>transactions|operations|payments|effects)", self._list),
                ("GET", f"/transactions/{_HASH}", self._transaction),
                ("GET", f"/transactions/{_HASH}/(?P<kind>operations|payments|effects)", self._list),
                (
                    "GET",
                    r"/ledgers/(?P<ledger>\d{1,10})/(?P<kind>transactions|operations|payments|effects)",
                    self._list,
                ),
                ("GET", r"/operations/(?P<operation>\d{1,19})", self._operation),
                ("POST", "/transactions", self._submit),
                ("POST", "/transactions_async", self._submit_async),
            )
        )

    async def answer(self, request: Request) -> Answer | Stream:
        """Return the answer to a request.

        Cancellation: leaves a submission in the queue.
        """
        for method, path, handler in self._routes:
            match = path.fullmatch(request.path)
            if match is not None and method == request.method:
                return await handler(request, match.groupdict())
        await trio.lowlevel.checkpoint()
        return not_found()

    # One thing.

    async def _root(self, _: Request, __: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        header, oldest = self._node.reader.header, self._node.oldest
        templates = {
            "account": "/accounts/{account_id}",
            "account_transactions": "/accounts/{account_id}/transactions{?cursor,limit,order}",
            "ledgers": "/ledgers{?cursor,limit,order}",
            "operations": "/operations{?cursor,limit,order}",
            "payments": "/payments{?cursor,limit,order}",
            "transaction": "/transactions/{hash}",
            "transactions": "/transactions{?cursor,limit,order}",
        }
        links = {name: {"href": self._base + path, "templated": True} for name, path in templates.items()}
        return document(
            {
                "_links": {**links, "self": {"href": self._base + "/"}},
                "horizon_version": "sandbox",
                "core_version": "sandbox",
                "ingest_latest_ledger": header.sequence,
                "history_latest_ledger": header.sequence,
                "history_latest_ledger_closed_at": instant_text(header.closed_at),
                "history_elder_ledger": oldest.sequence,
                "core_latest_ledger": header.sequence,
                "network_passphrase": self._node.passphrase,
                "current_protocol_version": header.protocol_version,
                "supported_protocol_version": header.protocol_version,
                "core_supported_protocol_version": header.protocol_version,
            }
        )

    async def _fee_stats(self, _: Request, __: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        header = self._node.reader.header
        fees = [fee for soroban in (False, True) for fee in self._node.inclusion_fees(5, soroban=soroban)]
        charged = _distribution(fees or [header.base_fee])
        return document(
            {
                "last_ledger": str(header.sequence),
                "last_ledger_base_fee": str(header.base_fee),
                "ledger_capacity_usage": "0.00",
                "fee_charged": charged,
                "max_fee": charged,
            }
        )

    async def _account(self, _: Request, place: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        address = place["account"]
        if not StrKey.is_valid_ed25519_public_key(address):
            return bad_request("account_id", "Account ID must start with `G` and contain 56 alphanum characters")
        told = account_document(self._node.reader, address, self._base)
        return document(told) if told is not None else not_found()

    async def _data(self, _: Request, place: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        told = account_document(self._node.reader, place["account"], self._base)
        names = [name for name, _ in account_data(self._node.reader, place["account"])] if told is not None else []
        return document({"value": told["data"][place["name"]]}) if told and place["name"] in names else not_found()

    async def _ledger(self, _: Request, place: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        told = self._ledger_document(int(place["ledger"]))
        return document(told) if told is not None else not_found()

    def _ledger_document(self, sequence: int) -> Document | None:
        header = self._node.header_of(sequence)
        if header is None:
            return None
        included = tuple(self._node.included(sequence, sequence))
        return ledger_document(header, included, self._node.ledger.network_id, self._base)

    async def _transaction(self, _: Request, place: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        found = self._node.transaction(place["hash"].lower())
        return document(self._shown(found).transaction_document()) if found is not None else not_found()

    async def _operation(self, _: Request, place: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        number = int(place["operation"])
        for included in self._node.included(number >> 32, number >> 32):
            for told in self._shown(included).operation_documents():
                if told["id"] == str(number):
                    return document(told)
        return not_found()

    def _shown(self, included: Included) -> Shown:
        return Shown.of(included, self._node.ledger.network_id, self._base)

    # Lists.

    async def _ledgers(self, request: Request, _: Mapping[str, str]) -> Answer | Stream:
        await trio.lowlevel.checkpoint()
        return self._listed(request, lambda page: self._ledger_records(page))

    async def _list(self, request: Request, place: Mapping[str, str]) -> Answer | Stream:
        await trio.lowlevel.checkpoint()
        tx_hash, account = place.get("hash"), place.get("account")
        if tx_hash is not None and self._node.transaction(tx_hash.lower()) is None:
            return not_found()
        if account is not None and account_document(self._node.reader, account, self._base) is None:
            return not_found()
        return self._listed(request, lambda page: self._records(place, request, page))

    def _listed(
        self, request: Request, records: Callable[[_Page], Iterator[tuple[Token, Document]]]
    ) -> Answer | Stream:
        page = self._page(request)
        if isinstance(page, Answer):
            return page
        if "text/event-stream" in request.headers.get("accept", ""):
            return Stream(self._stream(page, records))
        found = []
        for _, record in records(page):
            found.append(record)
            if len(found) == page.limit:
                break
        return document(self._page_document(request, page, found))

    def _page(self, request: Request) -> _Page | Answer:
        order, limit = request.query.get("order", "asc"), request.query.get("limit", str(LIMIT_DEFAULT))
        if order not in ("asc", "desc"):
            return bad_request("order", "order: invalid value")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= LIMIT_MAX):
            return bad_request("limit", f"limit: must be between 1 and {LIMIT_MAX}")
        cursor = request.query.get("cursor", "")
        if cursor == "now":
            place: Token | None = (toid(self._node.reader.header.sequence + 1), 0)
        elif cursor:
            match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,10}))?", cursor, re.ASCII)
            if match is None:
                return bad_request("cursor", "cursor: invalid value")
            place = (int(match[1]), int(match[2] or 0))
            if order == "asc" and 0 < place[0] < toid(self._node.oldest.sequence - 1):
                return _before_history()
        else:
            place = None
        return _Page(place, order == "desc", int(limit))

    def _page_document(self, request: Request, page: _Page, found: list[Document]) -> Document:
        def link(cursor: str, order: str) -> Document:
            url = f"{self._base}{request.path}?cursor={cursor}&limit={page.limit}&order={order}"
            return {"href": url}

        order, other = ("desc", "asc") if page.descending else ("asc", "desc")
        cursor = request.query.get("cursor", "")
        return {
            "_links": {
                "self": link(cursor, order),
                "next": link(found[-1]["paging_token"] if found else cursor, order),
                "prev": link(found[0]["paging_token"] if found else cursor, other),
            },
            "_embedded": {"records": found},
        }

    def _ledger_records(self, page: _Page) -> Iterator[tuple[Token, Document]]:
        oldest, latest = self._node.oldest.sequence, self._node.reader.header.sequence
        for sequence in range(latest, oldest - 1, -1) if page.descending else range(oldest, latest + 1):
            token = (toid(sequence), 0)
            if _is_past(page, token):
                told = self._ledger_document(sequence)
                assert told is not None
                yield token, told

    def _records(self, place: Mapping[str, str], request: Request, page: _Page) -> Iterator[tuple[Token, Document]]:
        failed_too = "hash" in place or request.query.get("include_failed", "false") == "true"
        for included in self._in_scope(place, page):
            if not included.successful and not failed_too:
                continue
            documents = list(self._documents(place, included))
            for told in reversed(documents) if page.descending else documents:
                token = _token_of(told)
                if _is_past(page, token):
                    yield token, told

    def _in_scope(self, place: Mapping[str, str], page: _Page) -> Iterable[Included]:
        if "hash" in place:
            found = self._node.transaction(place["hash"].lower())
            return [found] if found is not None else []
        if "ledger" in place:
            sequence = int(place["ledger"])
            scope = list(self._node.included(sequence, sequence))
            return reversed(scope) if page.descending else scope
        first = page.cursor[0] >> 32 if page.cursor is not None and not page.descending else 0
        everything = self._node.included_backwards() if page.descending else self._node.included(first, 2**32)
        account = place.get("account")
        return (each for each in everything if account is None or account in each.accounts)

    def _documents(self, place: Mapping[str, str], included: Included) -> Iterator[Document]:
        shown, kind, account = self._shown(included), place["kind"], place.get("account")
        if kind == "transactions":
            yield shown.transaction_document()
        elif kind == "effects":
            yield from (told for told in shown.effect_documents() if account in (None, told["account"]))
        else:
            for told in shown.operation_documents():
                if kind == "payments" and told["type"] not in _PAYMENTS:
                    continue
                parties = (told["source_account"], told.get("to"), told.get("account"), told.get("trustor"))
                if account is None or account in parties or told["type"] in _CONTRACTS:
                    yield told

    async def _stream(
        self, page: _Page, records: Callable[[_Page], Iterator[tuple[Token, Document]]]
    ) -> AsyncIterator[bytes]:
        yield _HELLO
        cursor = page.cursor
        while True:
            closed = self._node.ledger.closed
            for token, told in records(attrs.evolve(page, cursor=cursor)):
                yield _event(told)
                cursor = token
            await closed.wait()

    # Submission.

    async def _submit(self, request: Request, _: Mapping[str, str]) -> Answer:
        return await self.submit(request.form().get("tx", ""))

    async def submit(self, envelope: str) -> Answer:
        """Submit a transaction and wait for its ledger, at most SUBMIT_SECONDS.

        Args:
            envelope: base64 XDR, from anyone.

        Cancellation: leaves it in the queue.
        """
        await trio.lowlevel.checkpoint()
        transaction = transactions.decode(envelope, self._node.ledger.network_id)
        if isinstance(transaction, Undecodable):
            return _malformed(envelope)
        known = self._included_in(transaction)
        if known is not None:
            return self._submitted(known)
        admission = self._node.submit(envelope)
        assert isinstance(admission, Admission)
        if admission.status == "ERROR":
            known = self._included_in(transaction)
            return self._submitted(known) if known is not None else _failed(envelope, admission.result)
        with trio.move_on_after(SUBMIT_SECONDS):
            while True:
                closed = self._node.ledger.closed
                known = self._included_in(transaction)
                if known is not None:
                    return self._submitted(known)
                await closed.wait()
        detail = (
            "Your request timed out before completing.  Please try your request again. If you are submitting a"
            " transaction make sure you are sending exactly the same transaction (with the same sequence number)."
        )
        return problem(504, "timeout", "Timeout", detail, hash=admission.hash, envelope_xdr=envelope)

    def _included_in(self, transaction: Transaction) -> Included | None:
        return self._node.transaction(transaction.hash.hex())

    def _submitted(self, included: Included) -> Answer:
        if not included.successful:
            return _failed(included.envelope, included.result)
        return document(self._shown(included).transaction_document())

    async def _submit_async(self, request: Request, _: Mapping[str, str]) -> Answer:
        await trio.lowlevel.checkpoint()
        envelope = request.form().get("tx", "")
        admission = self._node.submit(envelope)
        if isinstance(admission, Undecodable):
            return _malformed(envelope)
        statuses = {"PENDING": 201, "DUPLICATE": 409, "TRY_AGAIN_LATER": 503, "ERROR": 400}
        told: Document = {"tx_status": admission.status, "hash": admission.hash}
        if admission.result is not None:
            told["error_result_xdr"] = admission.result
        return document(told, statuses[admission.status])


def _token_of(told: Document) -> Token:
    number, _, order = str(told["paging_token"]).partition("-")
    return int(number), int(order or 0)


def _is_past(page: _Page, token: Token) -> bool:
    if page.cursor is None:
        return True
    return token < page.cursor if page.descending else token > page.cursor


def _event(told: Document) -> bytes:
    return f"id: {told['paging_token']}\ndata: ".encode() + document(told).body + b"\n\n"


def _before_history() -> Answer:
    detail = "This horizon instance is configured to only track a portion of the Stellar network's latest history."
    return problem(410, "before_history", "Data Requested Is Before Recorded History", detail)


def _malformed(envelope: str) -> Answer:
    detail = (
        "Horizon could not decode the transaction envelope in this request. A transaction should be an XDR"
        " TransactionEnvelope struct encoded using base64."
    )
    return problem(400, "transaction_malformed", "Transaction Malformed", detail, envelope_xdr=envelope)


def _failed(envelope: str, result: str | None) -> Answer:
    assert result is not None
    detail = "The transaction failed when submitted to the stellar network. The `extras.result_codes` field says why."
    extras: dict[str, Any] = {
        "envelope_xdr": envelope,
        "result_codes": result_codes(xdr.TransactionResult.from_xdr(result)),
        "result_xdr": result,
    }
    return problem(400, "transaction_failed", "Transaction Failed", detail, **extras)


def _distribution(fees: list[int]) -> Document:
    ordered = sorted(fees)
    told = {
        "max": str(ordered[-1]),
        "min": str(ordered[0]),
        "mode": str(max(set(ordered), key=ordered.count)),
    }
    for percent in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99):
        told[f"p{percent}"] = str(ordered[max(0, -(-len(ordered) * percent // 100) - 1)])
    return told
