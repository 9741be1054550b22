"""The sandbox's network: the queue of transactions, the ledgers that close, their history, and the nodes that tell it.

A pure state machine: it closes a ledger when it is told to, at the time that the clock it was given says, and the same
seed and the same submissions make the same ledgers. What is slow, lost or late between a client and a node is no matter
of this module: see `faults`.
"""

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import attrs
import trio
from stellar_sdk import xdr

from callora.ledger.clock import Clock
from callora.stellar.sandbox import transactions
from callora.stellar.sandbox.classic import account_of
from callora.stellar.sandbox.events import told
from callora.stellar.sandbox.state import (
    Admission,
    Entry,
    Header,
    Included,
    Keyed,
    LedgerContext,
    Machine,
    Overlay,
    Reader,
    State,
    Transaction,
    Undecodable,
    address_of,
)

PASSPHRASE: Final = "Callora Sandbox Network ; stand-in, worth nothing"  # noqa: S105 - known to everyone
PROTOCOL_VERSION: Final = 27
WAITS_LEDGERS_MAX: Final = 4
"""How many ledgers a transaction waits before it is dropped."""
BANNED_LEDGERS: Final = 10
"""For how many ledgers the hash of a transaction that was dropped, or applied, is not taken again."""
QUEUE_LEDGERS: Final = 4
"""How many full ledgers may wait."""
FEES_LEDGERS: Final = 50
"""Over how many ledgers inclusion fees are remembered."""
TOTAL_COINS: Final = 10**18


@attrs.frozen
class NetworkRules:
    """What makes one network differ from another."""

    passphrase: str = PASSPHRASE
    protocol_version: int = PROTOCOL_VERSION
    base_fee: int = 100
    base_reserve: int = 5_000_000
    operations_max: int = 1000
    """Classic operations in a ledger."""
    contract_calls_max: int = 2000
    """Contract calls in a ledger."""
    retention: int = 17_280
    """How many ledgers of history nodes keep."""
    seed: str = "callora"
    """Of the order in which the transactions of a ledger are applied."""

    @property
    def network_id(self) -> bytes:
        """SHA-256 of the passphrase."""
        return transactions.network_id_of(self.passphrase)


@attrs.frozen
class ClosedLedger:
    """All that one ledger changed: what has to be kept of it."""

    header: Header
    changes: Mapping[bytes, Entry | None]
    """Entries as it left them; None where it deleted one."""
    included: tuple[Included, ...]
    oldest: int
    """The first ledger whose history is still wanted."""


@attrs.frozen
class Kept:
    """What was kept of a network when its process ended."""

    header: Header
    entries: Iterable[tuple[bytes, Entry]]
    headers: Sequence[Header]
    """In order; the last one is `header`."""
    included: Sequence[Included]
    """In order."""


class Keeper(Protocol):
    """Where the network is kept, so that it outlives its process."""

    def load(self) -> Kept | None:
        """Return what is kept; None for nothing."""
        ...

    def keep(self, closed: ClosedLedger) -> None:
        """Keep a ledger, whole or not at all; it is kept when this returns."""
        ...

    def forget(self) -> None:
        """Forget everything."""
        ...


class Genesis(Protocol):
    """How a network begins."""

    def entries(self) -> Iterable[tuple[bytes, Entry]]:
        """Return what its first ledger has."""
        ...

    def found(self, ledger: "SandboxLedger") -> None:
        """Make the rest of it out of transactions, and close the ledgers that they need."""
        ...

    def is_founded(self, reader: Reader) -> bool:
        """Tell whether that was done to its end."""
        ...


@attrs.define
class _Waiting:
    transaction: Transaction
    envelope: str
    ledgers: int = 0
    """How many closed without it."""


def genesis_state(rules: NetworkRules, closed_at: int, entries: Iterable[tuple[bytes, Entry]]) -> State:
    """Return the first ledger.

    Args:
        closed_at: seconds since 1970.
    """
    header = Header(
        sequence=1,
        closed_at=closed_at,
        protocol_version=rules.protocol_version,
        base_fee=rules.base_fee,
        base_reserve=rules.base_reserve,
        total_coins=TOTAL_COINS,
        fee_pool=0,
        previous_hash=bytes(32),
        result_hash=bytes(32),
    )
    return State(header, entries)


class SandboxLedger:
    """One network: what was submitted waits for `close`, which makes the next ledger of it."""

    def __init__(
        self,
        rules: NetworkRules,
        clock: Clock,
        machine: Machine,
        genesis: Genesis,
        keeper: Keeper | None = None,
    ) -> None:
        """Begin a network, or go on with the one that was kept.

        Args:
            genesis: asked at the beginning and at every reset.
            keeper: None for a network that ends with its process.
        """
        self.rules = rules
        self.network_id: Final = rules.network_id
        self.closed = trio.Event()
        """Set when the next ledger has closed; another one is here from then on."""
        self.paused = False
        """Whether timed closing rests. `close` works all the same."""
        self.skew_seconds = 0
        """How far the ledgers' time is ahead of the clock's, or behind it. Ledgers never go back in time."""
        self.surge_fee: int | None = None
        """Stroops an operation must bid while there is a surge."""
        self._clock = clock
        self._machine = machine
        self._genesis = genesis
        self._keeper = keeper
        kept = keeper.load() if keeper is not None else None
        self._forget()
        if kept is not None:
            self._state = State(kept.header, kept.entries)
            self._headers.extend(kept.headers)
            self._remember(kept.included)
        if kept is None or not genesis.is_founded(self._state):
            self._forget()
            self._begin()

    def _forget(self) -> None:
        self._queue: dict[str, _Waiting] = {}
        self._banned: dict[str, int] = {}
        """Hash to the last ledger for which it is banned."""
        self._headers: deque[Header] = deque()
        """Without a gap."""
        self._ledgers: dict[int, tuple[Included, ...]] = {}
        self._filled: list[int] = []
        """The ledgers with transactions, in order."""
        self._by_hash: dict[str, Included] = {}
        self._fees: deque[tuple[int, bool, int]] = deque()
        """Ledger, whether for a contract call, and stroops an operation."""

    def _begin(self) -> None:
        entries = dict(self._genesis.entries())
        self._state = genesis_state(self.rules, self.now, entries.items())
        self._headers.append(self._state.header)
        if self._keeper is not None:
            self._keeper.forget()
            self._keeper.keep(ClosedLedger(self._state.header, entries, (), 1))
        self._genesis.found(self)

    def reset(self) -> None:
        """Begin again from the first ledger, with the same accounts, as test networks do: all history is gone."""
        self._forget()
        self._begin()
        self._announce()

    # What there is.

    @property
    def now(self) -> int:
        """Seconds since 1970, by the network's clock."""
        return int(self._clock.timestamp()) + self.skew_seconds

    @property
    def header(self) -> Header:
        """The last closed ledger."""
        return self._state.header

    @property
    def state(self) -> State:
        """The entries after it."""
        return self._state

    @property
    def waiting(self) -> tuple[str, ...]:
        """The hashes of the transactions that wait, in hexadecimal."""
        return tuple(each.transaction.hash.hex() for each in self._queue.values())

    @property
    def oldest(self) -> Header:
        """The first ledger whose history is kept."""
        return self._headers[0]

    def reader_at(self, sequence: int) -> Keyed:
        """Return the entries after a ledger, or after the next later one of which they are still known."""
        for later in range(max(sequence, 1), self.header.sequence):
            try:
                return self._state.at(later)
            except LookupError:
                continue
        return self._state

    def header_of(self, sequence: int) -> Header | None:
        """Return a ledger whose history is kept."""
        place = sequence - self.oldest.sequence
        return self._headers[place] if 0 <= place < len(self._headers) else None

    def transaction(self, tx_hash: str) -> Included | None:
        """Return a transaction whose ledger is kept, by the hash of the whole or of the inner one."""
        return self._by_hash.get(tx_hash)

    def included(self, first: int, last: int) -> Iterator[Included]:
        """Return the transactions of some ledgers, in order.

        Args:
            first: a ledger.
            last: a ledger, with it.
        """
        for sequence in self._filled[bisect_left(self._filled, first) : bisect_right(self._filled, last)]:
            yield from self._ledgers[sequence]

    def included_backwards(self, first: int, last: int) -> Iterator[Included]:
        """Return the same, the last one first."""
        for sequence in reversed(self._filled[bisect_left(self._filled, first) : bisect_right(self._filled, last)]):
            yield from reversed(self._ledgers[sequence])

    def inclusion_fees(self, ledgers: int, *, soroban: bool) -> tuple[int, ...]:
        """Return what was paid for inclusion lately, stroops an operation, a transaction each.

        Args:
            ledgers: how many of the last ones, at most FEES_LEDGERS.
        """
        after = self.header.sequence - ledgers
        return tuple(fee for sequence, call, fee in self._fees if sequence > after and call == soroban)

    def context(self, header: Header | None = None) -> LedgerContext:
        """Return the ledger that comes next, if it closes now.

        Args:
            header: the one before; by default the last.
        """
        last = header or self.header
        return LedgerContext(
            network_id=self.network_id,
            sequence=last.sequence + 1,
            closed_at=max(last.closed_at, self.now),
            base_reserve=last.base_reserve,
            protocol_version=last.protocol_version,
        )

    # Submission.

    def submit(self, envelope: str, reader: Reader | None = None, *, lose: bool = False) -> Admission | Undecodable:
        """Take a transaction into the queue.

        Args:
            envelope: base64 XDR, from anyone.
            reader: the entries that it is judged by; by default those after the last ledger.
            lose: accept it, and forget it: what a node does that dies.
        """
        transaction = transactions.decode(envelope, self.network_id)
        if isinstance(transaction, Undecodable):
            return transaction
        told_hash = transaction.hash.hex()
        if self._is_banned(transaction):
            return Admission("TRY_AGAIN_LATER", told_hash)
        waiting = self._queue.get(transaction.source)
        if waiting is not None:
            known = _beside(transaction, waiting.transaction)
            if known is not None:
                return known
        refused = self._refusal(transaction, reader or self._state, waiting)
        if refused is not None:
            return Admission("ERROR", told_hash, refused.to_xdr())
        if not lose:
            self._queue[transaction.source] = _Waiting(transaction, envelope)
        return Admission("PENDING", told_hash)

    def _is_banned(self, transaction: Transaction) -> bool:
        return self._banned.get(transaction.hash.hex(), 0) >= self.header.sequence

    def _refusal(
        self, transaction: Transaction, reader: Reader, waiting: _Waiting | None
    ) -> xdr.TransactionResult | None:
        base_fee = max(self.surge_fee or 0, self.rules.base_fee)
        refused = transactions.refusal(reader, transaction, self.context(reader.header), base_fee, self._machine)
        if refused is not None:
            return refused
        others = [each.transaction for each in self._queue.values() if each is not waiting]
        bound = sum(each.fee for each in others if each.fee_source == transaction.fee_source)
        if transactions.spendable_of(reader, transaction, self.rules.base_reserve) < bound + transaction.fee:
            return transactions.insufficient_balance()
        return self._make_room(transaction, others)

    def _make_room(self, transaction: Transaction, others: list[Transaction]) -> xdr.TransactionResult | None:
        """Drop cheaper transactions from a full queue, or return why there is no room."""
        soroban = transactions.is_soroban(transaction)
        lane = sorted((each for each in others if transactions.is_soroban(each) == soroban), key=transactions.rate)
        used = sum(transactions.size(each) for each in lane)
        over = used + transactions.size(transaction) - QUEUE_LEDGERS * self._lane_max(soroban=soroban)
        leaving = []
        for each in lane:
            if over <= 0:
                break
            if transactions.rate(each) >= transactions.rate(transaction):
                wanted = int(transactions.rate(each)) + 1
                return transactions.insufficient_fee(transactions.fee_wanted(transaction, wanted))
            leaving.append(each)
            over -= transactions.size(each)
        for each in leaving:
            self._drop(each)
        return None

    def _lane_max(self, *, soroban: bool) -> int:
        return self.rules.contract_calls_max if soroban else self.rules.operations_max

    def _drop(self, transaction: Transaction) -> None:
        del self._queue[transaction.source]
        self._ban(transaction)

    def _ban(self, transaction: Transaction) -> None:
        for each in (transaction.hash, transaction.inner_hash):
            self._banned[each.hex()] = self.header.sequence + BANNED_LEDGERS

    # Closing.

    def close(self) -> Header:
        """Close the next ledger with what waits, as far as it fits, and return its header."""
        context = self.context()
        chosen, base_fees = self._choose(context)
        order = random.Random(f"{self.rules.seed}/{context.sequence}")  # noqa: S311 - the same for ever, not secret
        order.shuffle(chosen)
        overlay = Overlay(self._state, context.sequence)
        charged = [
            transactions.charge(overlay, each.transaction, base_fees[transactions.is_soroban(each.transaction)])
            for each in chosen
        ]
        applied = [transactions.apply(overlay, each, context, self._machine) for each in charged]
        changes = dict(overlay.writes)
        overlay.commit()
        paid = sum(each.fee for each in charged) - sum(each.refund for each in applied)
        results = xdr.TransactionResultSet(
            [
                xdr.TransactionResultPair(xdr.Hash(each.transaction.hash), what.result)
                for each, what in zip(chosen, applied, strict=True)
            ]
        )
        header = attrs.evolve(
            self.header,
            sequence=context.sequence,
            closed_at=context.closed_at,
            fee_pool=self.header.fee_pool + paid,
            previous_hash=self.header.hash(),
            result_hash=hashlib.sha256(results.to_xdr_bytes()).digest() if chosen else bytes(32),
        )
        included = tuple(
            _included(each, fee, what, header, order)
            for order, (each, fee, what) in enumerate(zip(chosen, charged, applied, strict=True), start=1)
        )
        self._after(header, chosen, included, base_fees)
        if self._keeper is not None:
            self._keeper.keep(ClosedLedger(header, changes, included, self.oldest.sequence))
        self._announce()
        return header

    def _choose(self, context: LedgerContext) -> tuple[list[_Waiting], dict[bool, int]]:
        """Return the transactions of the next ledger, and what an operation of each lane costs in it."""
        chosen: list[_Waiting] = []
        base_fees = {}
        for soroban in (False, True):
            lane = [each for each in self._queue.values() if transactions.is_soroban(each.transaction) == soroban]
            lane.sort(key=lambda each: (-transactions.rate(each.transaction), each.transaction.hash))
            base_fees[soroban] = max(self.surge_fee or 0, self.rules.base_fee)
            room, taken = self._lane_max(soroban=soroban), len(chosen)
            for each in lane:
                if transactions.rate(each.transaction) < base_fees[soroban]:
                    break  # it waits until the surge is over
                if self._spoiled(each.transaction, context):
                    self._drop(each.transaction)
                    continue
                if transactions.size(each.transaction) > room:
                    # Whoever bids more than the first that has no room pays no more than the last that has.
                    if len(chosen) > taken:
                        base_fees[soroban] = int(transactions.rate(chosen[-1].transaction))
                    break
                room -= transactions.size(each.transaction)
                chosen.append(each)
        return chosen, base_fees

    def _spoiled(self, transaction: Transaction, context: LedgerContext) -> bool:
        """Tell whether what waits cannot be applied any more: it is too late, or its sequence number is used."""
        refused = transactions.refusal(self._state, transaction, context, self.rules.base_fee, self._machine)
        return refused is not None

    def _after(
        self, header: Header, chosen: list[_Waiting], included: tuple[Included, ...], base_fees: dict[bool, int]
    ) -> None:
        self._state.close(header)
        self._headers.append(header)
        self._remember(included)
        for each in chosen:
            soroban = transactions.is_soroban(each.transaction)
            self._fees.append(
                (header.sequence, soroban, min(base_fees[soroban], int(transactions.rate(each.transaction))))
            )
            self._drop(each.transaction)
        for waiting in list(self._queue.values()):
            waiting.ledgers += 1
            if waiting.ledgers >= WAITS_LEDGERS_MAX:
                self._drop(waiting.transaction)
        self._banned = {each: last for each, last in self._banned.items() if last >= header.sequence}
        while self._fees and self._fees[0][0] <= header.sequence - FEES_LEDGERS:
            self._fees.popleft()
        self._trim(header.sequence - self.rules.retention + 1)

    def _remember(self, included: Iterable[Included]) -> None:
        for each in included:
            if each.ledger not in self._ledgers:
                self._filled.append(each.ledger)
            self._ledgers[each.ledger] = (*self._ledgers.get(each.ledger, ()), each)
            self._by_hash[each.hash] = each
            if each.inner_hash is not None:
                self._by_hash[each.inner_hash] = each

    def _trim(self, oldest: int) -> None:
        while self._headers[0].sequence < oldest:
            self._headers.popleft()
        gone = bisect_left(self._filled, oldest)
        for sequence in self._filled[:gone]:
            for each in self._ledgers.pop(sequence):
                self._by_hash.pop(each.hash, None)
                self._by_hash.pop(each.inner_hash or "", None)
        del self._filled[:gone]

    def trim(self, ledgers: int) -> None:
        """Forget the history of all but the last ledgers.

        Args:
            ledgers: how many are kept, at least 1.
        """
        self._trim(self.header.sequence - max(ledgers, 1) + 1)

    def lose_waiting(self) -> None:
        """Forget everything that waits, as a network does whose nodes all start anew."""
        self._queue.clear()

    def _announce(self) -> None:
        closed, self.closed = self.closed, trio.Event()
        closed.set()

    async def run(self, close_seconds: float) -> None:
        """Close a ledger every so many seconds, of Trio's clock, for ever.

        Cancellation: at once, between two ledgers.
        """
        while True:
            await trio.sleep(close_seconds)
            if not self.paused:
                self.close()


def _beside(new: Transaction, waiting: Transaction) -> Admission | None:
    """Return what is said to a transaction whose source has another one waiting; None if it may take its place."""
    told_hash = new.hash.hex()
    if new.hash in (waiting.hash, waiting.inner_hash):
        return Admission("DUPLICATE", told_hash)
    if new.sequence < waiting.sequence:
        result = transactions.result_of(new, xdr.TransactionResultCode.txBAD_SEQ, (), 0)
        return Admission("ERROR", told_hash, result.to_xdr())
    if not new.is_fee_bump or new.sequence > waiting.sequence:
        return Admission("TRY_AGAIN_LATER", told_hash)
    wanted = transactions.fee_to_replace(new, waiting)
    if new.fee < wanted:
        return Admission("ERROR", told_hash, transactions.insufficient_fee(wanted).to_xdr())
    return None


def _included(
    waiting: _Waiting, charged: transactions.Charged, applied: transactions.Applied, header: Header, order: int
) -> Included:
    transaction = waiting.transaction
    return Included(
        hash=transaction.hash.hex(),
        inner_hash=transaction.inner_hash.hex() if transaction.is_fee_bump else None,
        ledger=header.sequence,
        order=order,
        closed_at=header.closed_at,
        successful=applied.successful,
        source=transaction.source,
        fee_source=transaction.fee_source,
        accounts=tuple(dict.fromkeys((*_accounts_of(transaction), *_accounts_in(applied.events)))),
        envelope=waiting.envelope,
        result=applied.result.to_xdr(),
        meta=applied.meta.to_xdr(),
        fee_meta=xdr.LedgerEntryChanges(charged.changes).to_xdr(),
        transaction_events=tuple(event.to_xdr() for event in applied.transaction_events),
        events=tuple(tuple(told(event) for event in events) for events in applied.events),
        diagnostics=tuple(event.to_xdr() for event in applied.diagnostics),
    )


def _accounts_in(events: Iterable[Iterable[xdr.ContractEvent]]) -> Iterator[str]:
    """Return the accounts that events name: whose tokens a contract moved."""
    for event in (event for each in events for event in each):
        assert event.body.v0 is not None
        for topic in event.body.v0.topics:
            if topic.address is not None and topic.address.account_id is not None:
                yield address_of(topic.address.account_id)


def _accounts_of(transaction: Transaction) -> tuple[str, ...]:
    """Return the accounts that a transaction names itself."""
    found = {transaction.source: None, transaction.fee_source: None}
    for operation in transaction.operations:
        found[operation.source] = None
        body = operation.body
        if body.payment_op is not None:
            found[account_of(body.payment_op.destination)] = None
        if body.create_account_op is not None:
            found[address_of(body.create_account_op.destination)] = None
        if body.set_trust_line_flags_op is not None:
            found[address_of(body.set_trust_line_flags_op.trustor)] = None
    return tuple(found)


@attrs.define(eq=False)
class SandboxNode:
    """One node of the network, which may lag behind the others or have less of the past."""

    ledger: SandboxLedger
    name: str
    friendbot_url: str | None = None
    lag: int = 0
    """How many ledgers it is behind."""
    retention: int | None = None
    """How many ledgers it keeps; None for what the network keeps."""
    try_again: int = 0
    """To how many more submissions it answers TRY_AGAIN_LATER."""
    lose: int = 0
    """How many more submissions it accepts and loses."""

    @property
    def passphrase(self) -> str:
        """The network's."""
        return self.ledger.rules.passphrase

    @property
    def _latest(self) -> int:
        return max(self.ledger.header.sequence - self.lag, 1)

    @property
    def reader(self) -> Keyed:
        """The entries, with the last ledger that this node knows as `header`."""
        return self.ledger.reader_at(self._latest)

    @property
    def oldest(self) -> Header:
        """The first ledger that this node still has."""
        oldest = self.ledger.oldest
        if self.retention is not None:
            first = max(self.reader.header.sequence - self.retention + 1, oldest.sequence)
            oldest = self.ledger.header_of(first) or oldest
        return oldest

    @property
    def now(self) -> int:
        """Seconds since 1970 by the network's clock."""
        return self.ledger.now

    def context(self) -> LedgerContext:
        """Return the ledger that would come next, for a simulation."""
        return self.ledger.context(self.reader.header)

    def submit(self, envelope: str) -> Admission | Undecodable:
        """Take a transaction into the queue of the network, judged by the ledger that this node knows."""
        decoded = transactions.decode(envelope, self.ledger.network_id)
        if isinstance(decoded, Undecodable):
            return decoded
        if self.try_again:
            self.try_again -= 1
            return Admission("TRY_AGAIN_LATER", decoded.hash.hex())
        admission = self.ledger.submit(envelope, self.reader, lose=self.lose > 0)
        if self.lose and isinstance(admission, Admission) and admission.status == "PENDING":
            self.lose -= 1
        return admission

    def transaction(self, tx_hash: str) -> Included | None:
        """Return a transaction that this node still has, by the hash of the whole or of the inner one."""
        found = self.ledger.transaction(tx_hash)
        if found is None or not self.oldest.sequence <= found.ledger <= self.reader.header.sequence:
            return None
        return found

    def header_of(self, sequence: int) -> Header | None:
        """Return a ledger that this node still has."""
        known = self.oldest.sequence <= sequence <= self.reader.header.sequence
        return self.ledger.header_of(sequence) if known else None

    def included(self, first: int, last: int) -> Iterator[Included]:
        """Return the transactions of ledgers that this node still has, in order; cheap where ledgers are empty."""
        return self.ledger.included(max(first, self.oldest.sequence), min(last, self.reader.header.sequence))

    def included_backwards(self) -> Iterator[Included]:
        """Return all of them, the last one first."""
        return self.ledger.included_backwards(self.oldest.sequence, self.reader.header.sequence)

    def inclusion_fees(self, ledgers: int, *, soroban: bool) -> tuple[int, ...]:
        """Return the inclusion fees an operation of the transactions in the last ledgers, stroops, in any order."""
        return self.ledger.inclusion_fees(ledgers, soroban=soroban)
