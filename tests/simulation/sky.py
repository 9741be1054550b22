"""A network of Stellar nodes, small and hostile: within the protocol's rules it does whatever hurts most.

It may apply any envelope that was ever handed to it, in any ledger within its time bound, whatever it answered when it
was sent; it loses what it said it took; its nodes are behind, forget the past, and are swapped for others. It never
applies what every node refused that was given it. Envelopes are text, hashes and signatures are real enough to be
told apart.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, TypeVar

import attrs
import trio

from callora.ledger.chain import Applied, Archived, ContractFault, Envelope, FeeStats, Head, NotSeen, Retained, Sent
from callora.ledger.faults import ChainOutcomeUnknown, ChainUnavailable
from callora.ledger.submission import goes_away
from callora.stellar.contracts import ContractCall
from callora.stellar.rpc import Leeway

GENESIS: Final = datetime(2026, 11, 21, tzinfo=UTC)
LEDGER_SECONDS: Final = 5.0
BASE_FEE: Final = 100
RESOURCE_FEE: Final = 50_000
QUEUE_LEDGERS: Final = 4
BAN_LEDGERS: Final = 10

T = TypeVar("T")


def seal(fields: dict[str, Any]) -> Envelope:
    """Return an envelope of its fields; signatures do not change the hash."""
    signed = {name: value for name, value in fields.items() if name != "signatures"}
    tx_hash = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
    inner = fields.get("inner")
    core = inner or fields
    return Envelope(
        xdr=json.dumps(fields, sort_keys=True),
        hash=tx_hash,
        inner_hash=None if inner is None else seal(inner).hash,
        source=core["source"],
        sequence=core["sequence"],
        max_time=core["max_time"],
        fee=fields["bid"] + RESOURCE_FEE,
    )


def unseal(envelope: Envelope) -> dict[str, Any]:
    """Return an envelope's fields."""
    fields: dict[str, Any] = json.loads(envelope.xdr)
    return fields


def bid_of(envelope: Envelope) -> int:
    """Return what it offers, stroops an operation."""
    return int(unseal(envelope)["bid"])


@attrs.frozen
class Key:
    """A key that signs."""

    address: str

    def sign(self, envelope: Envelope) -> Envelope:
        """Return the envelope with this signature as well."""
        fields = unseal(envelope)
        fields["signatures"] = sorted({*fields["signatures"], self.address})
        return seal(fields)

    def bump(self, envelope: Envelope, bid: int) -> Envelope:
        """Return a signed fee-bump that this account pays."""
        return seal({"inner": unseal(envelope), "bid": bid, "payer": self.address, "signatures": [self.address]})


def account(number: int) -> Key:
    """Return an account's key by its number."""
    return Key("G" + "A" * 45 + f"{number:010d}".translate(str.maketrans("0123456789", "ABCDEFGHIJ")))


@attrs.define(eq=False)
class Account:
    """An account on the ledger."""

    xlm: int
    sequences: list[tuple[int, int]]
    """Ledgers in which its sequence number changed, and to what."""

    def sequence_at(self, ledger: int) -> int:
        """Return its sequence number after a ledger."""
        for since, sequence in reversed(self.sequences):
            if since <= ledger:
                return sequence
        return self.sequences[0][1]


@attrs.define(eq=False)
class Waiting:
    """An envelope that was handed to the network."""

    envelope: Envelope
    purpose: str
    since: int
    queued: bool
    """Whether the nodes say that it waits; if not, it floats about, and may come back."""


@attrs.define(eq=False)
class Weather:
    """What goes wrong, by chance: the likelihoods of a spell."""

    silent: float = 0.0
    """A send without an answer."""
    away: float = 0.0
    refusal: float = 0.0
    late: float = 0.0
    """TRY_AGAIN_LATER for no reason."""
    idle: float = 0.0
    """A ledger without what waits for it."""
    lost: float = 0.0
    """Taken, and gone."""
    ghost: float = 0.0
    """Gone, and back."""
    failing: float = 0.0
    surge: int = 0
    """What a bid must be."""
    lag: int = 0
    """Ledgers that a node is behind, at most."""
    kept: int = 100_000
    """Ledgers that a node keeps."""
    stopped: bool = False
    """No ledger closes."""


CALM: Final = Weather()


class Sky:
    """The network."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.weather = CALM
        self.history = 1
        """Counts its histories: a test network begins again now and then."""
        self.ledger = 100
        self.first = 100
        """The first ledger of this history."""
        self.closed = {100: GENESIS}
        self.accounts: dict[str, Account] = {}
        self.waiting: dict[str, Waiting] = {}
        """By the hash of the inner transaction."""
        self.banned: dict[str, int] = {}
        self.applied: dict[str, Applied] = {}
        """By every hash."""
        self.everything: dict[str, Applied] = {}
        """The same, of all histories."""
        self.effects: dict[tuple[int, str], int] = {}
        """How often a purpose was achieved, by history."""
        self.hashes: dict[tuple[int, str], set[str]] = {}
        """The envelopes that were handed over for a purpose, by history."""
        self.wrong: list[str] = []
        self.count: dict[str, int] = {}
        """What happened, and how often."""

    def note(self, what: str) -> None:
        """Count something that happened."""
        self.count[what] = self.count.get(what, 0) + 1

    def open_account(self, key: Key, xlm: int = 10**12) -> None:
        """Make an account."""
        self.accounts[key.address] = Account(xlm, [(self.ledger, self.ledger << 32)])

    def head(self, lag: int = 0) -> Head:
        """Return the last ledger that a node knows which is behind by so many."""
        ledger = max(self.ledger - lag, self.first)
        return Head(ledger, self.closed[ledger])

    async def close_ledgers(self) -> None:
        """Close ledgers until cancelled."""
        began = trio.current_time()
        while True:
            await trio.sleep(LEDGER_SECONDS * (0.9 + 0.2 * self.random.random()))
            if not self.weather.stopped:
                self.close(GENESIS + timedelta(seconds=int(trio.current_time() - began)))

    def close(self, now: datetime) -> None:
        """Close a ledger with whatever it likes of what was handed over."""
        self.ledger += 1
        self.closed[self.ledger] = now
        random, weather = self.random, self.weather
        by_source: dict[str, list[Waiting]] = {}
        for each in self.waiting.values():
            by_source.setdefault(each.envelope.source, []).append(each)
        for source, found in by_source.items():
            random.shuffle(found)
            for each in found:
                if self._is_due(each, source):
                    likely = (1.0 - weather.idle) if each.queued else weather.ghost
                    if bid_of(each.envelope) >= weather.surge and random.random() < likely:
                        if not each.queued:
                            self.note("came back")
                        self._apply(each)
                        break
        for tx_hash, each in list(self.waiting.items()):
            if now.timestamp() > each.envelope.max_time:
                del self.waiting[tx_hash]
            elif each.queued and (self.ledger - each.since >= QUEUE_LEDGERS or random.random() < weather.lost):
                each.queued = False
                self.banned[tx_hash] = self.ledger + BAN_LEDGERS
                self.note("dropped")

    def _is_due(self, each: Waiting, source: str) -> bool:
        at = self.accounts[source].sequences[-1][1]
        in_time = self.closed[self.ledger].timestamp() <= each.envelope.max_time
        return in_time and each.envelope.sequence == at + 1

    def _apply(self, each: Waiting) -> None:
        envelope, inner = each.envelope, each.envelope.inner_hash or each.envelope.hash
        fields = unseal(envelope)
        payer = self.accounts[fields.get("payer", envelope.source)]
        payer.xlm -= envelope.fee
        self.accounts[envelope.source].sequences.append((self.ledger, envelope.sequence))
        result, operation, fault = "tx_success", None, None
        if self.random.random() < self.weather.failing:
            result = "tx_failed"
            ways: tuple[str, ...] = ("resource_limit_exceeded", "insufficient_refundable_fee")
            if not each.purpose.startswith("restored"):  # which runs no contract
                ways = ("trapped", "trapped", "entry_archived", *ways)
            operation = self.random.choice(ways)
            if operation == "trapped":
                fault = ContractFault(self.random.choice((None, 5, 4)), "trapped")
        done = Applied(
            result == "tx_success", self.ledger, self.closed[self.ledger], result, operation, fault, None, envelope.fee
        )
        self.note("applied" if done.successful else f"failed: {operation}")
        for tx_hash in {inner, envelope.hash}:
            self.applied[tx_hash] = self.everything[tx_hash] = done
        del self.waiting[inner]
        if done.successful:
            key = self.history, each.purpose
            self.effects[key] = self.effects.get(key, 0) + 1
            if self.effects[key] > 1:
                self.wrong.append(f"{each.purpose} was applied twice on one history")

    def reset(self) -> None:
        """Begin another history, as test networks do: ledgers and accounts start again, time goes on."""
        now = self.closed[self.ledger]
        self.history += 1
        self.ledger = self.first = 1
        self.closed = {1: now}
        self.waiting.clear()
        self.banned.clear()
        self.applied.clear()
        for each in self.accounts.values():
            each.sequences = [(1, (self.history << 32) + self.random.randrange(1000))]

    def take(self, envelope: Envelope, lag: int) -> Sent:
        """Let a node that is behind by so many ledgers take an envelope or not."""
        weather, random = self.weather, self.random
        inner = envelope.inner_hash or envelope.hash
        fields = unseal(envelope)
        core = fields.get("inner", fields)
        purpose = core["purpose"]
        head = self.head(lag)
        if inner not in self.applied and self.closed[self.ledger].timestamp() <= envelope.max_time:
            self._watch(purpose, inner)  # else it was long under way, and comes to nothing

        def refuse(code: str) -> Sent:
            self.note(f"refused: {code}")
            return Sent("refused", code, head)

        if inner in self.applied:
            recent = self.applied[inner].ledger > self.ledger - 10
            return Sent("try_again_later", None, head) if recent else refuse("tx_bad_seq")
        # Before anything else: another node may have it, and this one not.
        if random.random() < weather.refusal:
            codes = ("tx_soroban_invalid", "tx_internal_error", "tx_bad_seq", "tx_insufficient_fee")
            return refuse(random.choice(codes))
        waiting = self.waiting.get(inner)
        if waiting is not None and waiting.queued and bid_of(envelope) < 10 * bid_of(waiting.envelope):
            if bid_of(envelope) == bid_of(waiting.envelope):
                return Sent("duplicate", None, head)
            return refuse("tx_insufficient_fee")
        if self.banned.get(envelope.hash, 0) > self.ledger or random.random() < weather.late:
            return Sent("try_again_later", None, head)
        if head.closed_at.timestamp() > envelope.max_time:
            return refuse("tx_too_late")
        source = self.accounts.get(envelope.source)
        payer = self.accounts.get(fields.get("payer", envelope.source))
        if source is None or payer is None:
            return refuse("tx_no_account")
        if envelope.sequence != source.sequence_at(head.sequence) + 1:
            return refuse("tx_bad_seq")
        if not set(core["signers"]) <= set(core["signatures"]):
            return refuse("tx_bad_auth")
        if payer.xlm < envelope.fee:
            return refuse("tx_insufficient_balance")
        if bid_of(envelope) < max(BASE_FEE, weather.surge // 2):
            return refuse("tx_insufficient_fee")
        others = [each for each in self.waiting.values() if each.queued and each.envelope.source == envelope.source]
        if any(each is not waiting for each in others):
            return Sent("try_again_later", None, head)
        self.waiting[inner] = Waiting(envelope, purpose, self.ledger, queued=True)
        return Sent("pending", None, head)

    def _watch(self, purpose: str, inner: str) -> None:
        """Check the first golden rule at each send: no other envelope of this purpose can be applied, or was."""
        known = self.hashes.setdefault((self.history, purpose), set())
        for other in known - {inner}:
            done, waiting = self.applied.get(other), self.waiting.get(other)
            final = done is not None and (done.successful or not goes_away(done))
            if final or (waiting is not None and self._may_come(waiting)):
                self.wrong.append(f"{purpose}: {inner[:8]} was sent while {other[:8]} was or could be applied")
        known.add(inner)

    def _may_come(self, waiting: Waiting) -> bool:
        in_time = self.closed[self.ledger].timestamp() <= waiting.envelope.max_time
        return in_time and waiting.envelope.sequence > self.accounts[waiting.envelope.source].sequences[-1][1]


class View:
    """How one process sees the network: through nodes that fail, are behind, forget, and are swapped."""

    def __init__(self, sky: Sky, *, slow: float) -> None:
        """Args:
        slow: seconds that an answer takes, mostly.
        """
        self._sky = sky
        self._slow = slow

    def build(self, call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction of a call; its function is its purpose."""
        signers = sorted({source, call.authority})
        return self._draft(call.function, signers, source, sequence, max_time, fee)

    def build_restore(self, archived: Archived, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction that restores what a call needs."""
        return self._draft(archived.resources, [source], source, sequence, max_time, fee)

    def _draft(self, purpose: str, signers: list[str], source: str, sequence: int, max_time: int, bid: int) -> Envelope:
        return seal(
            {
                "purpose": purpose,
                "signers": signers,
                "source": source,
                "sequence": sequence,
                "max_time": max_time,
                "bid": bid,
                "signatures": [],
            }
        )

    def unwrap(self, envelope: Envelope) -> Envelope:
        """Return the transaction inside a fee-bump."""
        return seal(unseal(envelope)["inner"])

    async def retained(self) -> Retained:
        """Return what a node has."""
        return await self._ask(self._retained)

    async def sequence_of(self, address: str) -> int | None:
        """Return an account's sequence number as a node knows it."""
        sky = self._sky

        def look() -> int | None:
            found = sky.accounts.get(address)
            return None if found is None else found.sequence_at(sky.head(self._lag()).sequence)

        return await self._ask(look)

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Return the envelope with its resources, or why it would fail: by chance, or while its data is archived."""
        sky = self._sky
        purpose = unseal(envelope)["purpose"]

        def simulate() -> Envelope | ContractFault:
            if sky.random.random() < sky.weather.refusal / 10:
                return ContractFault(5, "Error(Contract, #5)")
            needed = f"restored {purpose}"
            if purpose.endswith("0") and (sky.history, needed) not in sky.effects:
                return ContractFault(None, "archived", archived=Archived(needed, 1000))
            return envelope

        return await self._ask(simulate)

    async def send(self, envelope: Envelope) -> Sent:
        """Send."""
        sky, random = self._sky, self._sky.random
        await self._pause()
        if random.random() < sky.weather.away:
            raise ChainUnavailable("no node can be reached")
        if random.random() < sky.weather.silent:
            if random.random() < 0.6:
                sky.take(envelope, self._lag())
            await self._pause()
            sky.note("no answer")
            raise ChainOutcomeUnknown("no answer")
        sent = sky.take(envelope, self._lag())
        await self._pause()
        return sent

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Look up."""
        sky = self._sky

        def look() -> Applied | NotSeen:
            retained = self._retained()
            done = sky.applied.get(tx_hash)
            if done is not None and retained.oldest <= done.ledger <= retained.latest.sequence:
                return done
            return NotSeen(retained)

        return await self._ask(look)

    async def recorded(self, tx_hash: str) -> Applied | None:
        """Ask the second witness, which keeps everything and is behind a little."""
        await self._pause()
        done = self._sky.applied.get(tx_hash)
        return done if done is not None and done.ledger < self._sky.ledger else None

    async def fee_stats(self) -> FeeStats:
        """Return what others bid."""
        surge = max(BASE_FEE, self._sky.weather.surge)
        return await self._ask(lambda: FeeStats(surge // 2, surge, 2 * surge, 4 * surge))

    def _retained(self) -> Retained:
        head = self._sky.head(self._lag())
        return Retained(max(head.sequence - self._sky.weather.kept, self._sky.first), head)

    def _lag(self) -> int:
        lag = self._sky.weather.lag
        return self._sky.random.randint(0, lag) if lag and self._sky.random.random() < 0.5 else 0

    async def _pause(self) -> None:
        random = self._sky.random
        await trio.sleep(self._slow * random.random() * (10 if random.random() < 0.01 else 1))

    async def _ask(self, look: Callable[[], T]) -> T:
        await self._pause()
        if self._sky.random.random() < self._sky.weather.away:
            raise ChainUnavailable("no node can be reached", kind="rate_limited")
        return look()
