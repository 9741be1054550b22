"""getEvents: which events a client asks for, from where on, and how far one call looks."""

import base64
import binascii
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import attrs
from stellar_sdk import StrKey, xdr

from callora.stellar.sandbox.jsonrpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    U32_MAX,
    Document,
    RpcError,
    check_format,
    list_in,
    number_in,
    object_in,
    split_toid,
    text_in,
    toid_of,
)
from callora.stellar.sandbox.state import Event, Included, Node

EVENTS_DEFAULT: Final = 100
EVENTS_MAX: Final = 10_000
SCAN_LEDGERS_MAX: Final = 10_000
FILTERS_MAX: Final = 5
CONTRACTS_MAX: Final = 5
TOPICS_MAX: Final = 5
SEGMENTS_MAX: Final = 4
_ONE: Final = "*"
_REST: Final = "**"


@attrs.frozen(order=True)
class _Place:
    """Where an event is in history."""

    ledger: int
    order: int
    operation: int
    event: int

    def __str__(self) -> str:
        return f"{toid_of(self.ledger, self.order, self.operation):019d}-{self.event:010d}"


def _parse_place(text: str) -> _Place:
    first, dash, second = text.partition("-")
    sound = dash and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()
    if not sound or int(first) >= 2**63 or int(second) > U32_MAX:
        raise RpcError(INVALID_PARAMS, f"invalid parameters: invalid event id {text}")
    return _Place(*split_toid(int(first)), int(second))


@attrs.frozen
class _Filter:
    """Which events are wanted; what it does not name may be anything."""

    kinds: frozenset[str]
    contracts: frozenset[str]
    topics: tuple[tuple[str, ...], ...]
    """For each of them segments: base64 XDR, `*` for any one, `**` at the end for any more."""

    def wants(self, event: Event) -> bool:
        if self.kinds and event.kind not in self.kinds:
            return False
        if self.contracts and event.contract_id not in self.contracts:
            return False
        return not self.topics or any(_matches(segments, event.topics) for segments in self.topics)


def _matches(segments: tuple[str, ...], topics: tuple[str, ...]) -> bool:
    if segments[-1] == _REST:
        segments = segments[:-1]
        if len(topics) < len(segments):
            return False
    elif len(topics) != len(segments):
        return False
    return all(segment in (_ONE, topic) for segment, topic in zip(segments, topics, strict=False))


def _filter(told: Any, place: int) -> _Filter:
    if not isinstance(told, dict):
        raise RpcError(INVALID_PARAMS, "invalid parameters: filters must be objects")
    wrong = f"filter {place} invalid"
    kinds = frozenset(kind for kind in text_in(told, "type").split(",") if kind)
    if not kinds <= {"system", "contract"}:
        why = f"{wrong}: filter type invalid: if set, type must be either 'system' or 'contract'"
        raise RpcError(INVALID_PARAMS, why)
    ids, topics = list_in(told, "contractIds"), list_in(told, "topics")
    if len(ids) > CONTRACTS_MAX:
        raise RpcError(INVALID_PARAMS, f"{wrong}: maximum {CONTRACTS_MAX} contract IDs per filter")
    if len(topics) > TOPICS_MAX:
        raise RpcError(INVALID_PARAMS, f"{wrong}: maximum {TOPICS_MAX} topics per filter")
    for number, contract_id in enumerate(ids, start=1):
        if not isinstance(contract_id, str) or not StrKey.is_valid_contract(contract_id):
            raise RpcError(INVALID_PARAMS, f"{wrong}: contract ID {number} invalid")
    parsed = tuple(_topic(topic, f"{wrong}: topic {number} invalid") for number, topic in enumerate(topics, start=1))
    return _Filter(kinds, frozenset(ids), parsed)


def _topic(told: Any, wrong: str) -> tuple[str, ...]:
    if not isinstance(told, list) or not told:
        raise RpcError(INVALID_PARAMS, f"{wrong}: topic must have at least 1 segment")
    fixed = told[:-1] if told[-1] == _REST else told
    if _REST in fixed:
        place = fixed.index(_REST) + 1
        why = f"{wrong}: segment {place} invalid: wildcard '**' is only allowed as the last segment"
        raise RpcError(INVALID_PARAMS, why)
    if len(fixed) > SEGMENTS_MAX:
        raise RpcError(INVALID_PARAMS, f"{wrong}: topic cannot have more than {SEGMENTS_MAX} segments")
    return tuple(_segment(segment, wrong) for segment in told)


def _segment(told: Any, wrong: str) -> str:
    if told in (_ONE, _REST):
        return str(told)
    try:
        base64.b64decode(told, validate=True)
        return xdr.SCVal.from_xdr(told).to_xdr()
    except (ValueError, TypeError, EOFError, binascii.Error) as error:
        raise RpcError(INVALID_PARAMS, f"{wrong}: a segment is no SCVal in base64 XDR") from error


@attrs.frozen
class _EventsAsked:
    """What a client wants to know of events."""

    start: _Place
    end_ledger: int | None
    """The first ledger that is not wanted."""
    limit: int
    filters: tuple[_Filter, ...]

    def wants(self, event: Event) -> bool:
        return not self.filters or any(each.wants(event) for each in self.filters)


def _events_asked(params: Document) -> _EventsAsked:
    check_format(params)
    start, end = number_in(params, "startLedger"), number_in(params, "endLedger")
    pagination = object_in(params, "pagination")
    limit = number_in(pagination, "limit") or EVENTS_DEFAULT
    cursor = pagination.get("cursor")
    if cursor is not None:
        if start or end:
            raise RpcError(INVALID_PARAMS, "ledger ranges and cursor cannot both be set")
        after = _parse_place(text_in(pagination, "cursor"))
        place = attrs.evolve(after, event=(after.event + 1) & U32_MAX)
    elif start is None:
        raise RpcError(INVALID_PARAMS, "startLedger must be positive")
    else:
        place = _Place(start, 0, 0, 0)
    if limit > EVENTS_MAX:
        raise RpcError(INVALID_PARAMS, f"limit must not exceed {EVENTS_MAX}")
    filters = list_in(params, "filters")
    if len(filters) > FILTERS_MAX:
        raise RpcError(INVALID_PARAMS, f"maximum {FILTERS_MAX} filters per request")
    parsed = tuple(_filter(told, number) for number, told in enumerate(filters, start=1))
    return _EventsAsked(place, end, limit, parsed)


def get_events(node: Node, params: Document) -> Document:
    """Return a page of events.

    Raises:
        RpcError: what is asked for makes no sense, or begins where the node has nothing.
    """
    asked = _events_asked(params)
    latest, oldest = node.reader.header, node.oldest
    start = asked.start.ledger
    if not oldest.sequence <= start <= latest.sequence:
        why = f"startLedger must be within the ledger range: {oldest.sequence} - {latest.sequence}"
        raise RpcError(INVALID_REQUEST, why)
    end = min(latest.sequence + 1, start + SCAN_LEDGERS_MAX)
    if asked.end_ledger is not None:
        end = min(end, asked.end_ledger)
    found: list[Document] = []
    for place, included, event in _events(node, asked.start, end):
        if asked.wants(event):
            found.append(_told_event(place, included, event))
            if len(found) == asked.limit:
                break
    cursor = _Place(end - 1, 0xFFFFF, 0xFFF, U32_MAX)
    return {
        "events": found,
        "latestLedger": latest.sequence,
        "oldestLedger": oldest.sequence,
        "latestLedgerCloseTime": str(latest.closed_at),
        "oldestLedgerCloseTime": str(oldest.closed_at),
        "cursor": found[-1]["id"] if len(found) == asked.limit else str(cursor),
    }


def _events(node: Node, start: _Place, end_ledger: int) -> Iterator[tuple[_Place, Included, Event]]:
    """Return the events of successful transactions, in order, from a place on up to a ledger, without it."""
    for included in node.included(start.ledger, end_ledger - 1):
        for operation, events in enumerate(included.events):
            for number, event in enumerate(events):
                place = _Place(included.ledger, included.order, operation, number)
                if place >= start:
                    yield place, included, event


def _told_event(place: _Place, included: Included, event: Event) -> Document:
    return {
        "type": event.kind,
        "ledger": place.ledger,
        "ledgerClosedAt": datetime.fromtimestamp(included.closed_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "contractId": event.contract_id or "",
        "id": str(place),
        "operationIndex": place.operation,
        "transactionIndex": place.order,
        "txHash": included.hash,
        "inSuccessfulContractCall": True,
        "topic": list(event.topics),
        "value": event.value,
    }
