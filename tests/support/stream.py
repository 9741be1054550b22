"""A vault contract's events as nodes tell them: in real XDR, by the paging rules of getEvents, and with whatever else
nodes do: late, twice, overlapping, forgetful, of another history.
"""

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import attrs
import trio
from stellar_sdk import Keypair, StrKey, scval

from callora.ledger.chain import (
    Applied,
    ChainEvent,
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
from callora.stellar.contracts import ContractCall, VaultContract
from callora.stellar.rpc import Leeway

GENESIS: Final = datetime(2026, 11, 1, tzinfo=UTC)
LEDGER_SECONDS: Final = 5
PASSPHRASE: Final = "Test SDF Network ; September 2015"


def contract_of(name: str) -> str:
    """Return a contract's address; the same for the same name."""
    return StrKey.encode_contract(hashlib.sha256(name.encode()).digest())


def wallet_of(name: str) -> str:
    """Return an account's address; the same for the same name."""
    return Keypair.from_raw_ed25519_seed(hashlib.sha256(name.encode()).digest()).public_key


def tx_hash_of(name: str) -> str:
    """Return a transaction's hash; the same for the same name."""
    return hashlib.sha256(f"tx {name}".encode()).hexdigest()


VAULT: Final = VaultContract(contract_of("vault"), "g1", wallet_of("owner"), contract_of("usdc"), None, None)


@attrs.define
class Stream:
    """One network's history, and a node that tells it."""

    network: str = "testnet"
    passphrase: str = PASSPHRASE
    vault: VaultContract = VAULT
    oldest: int = 1
    latest: int = 10
    balance: int = 0
    """The contract's own count."""
    genesis: datetime = GENESIS
    ledgers: dict[int, list[ChainEvent]] = attrs.field(factory=dict)
    mangle: Callable[[list[ChainEvent]], list[ChainEvent]] | None = None
    """What a page's events become on their way."""
    asked: int = 0

    # What happens on the network

    def event(
        self,
        kind: str,
        address: str,
        amount: int,
        *,
        tx_hash: str | None = None,
        ledger: int | None = None,
        contract_id: str | None = None,
    ) -> ChainEvent:
        """Add an event to a ledger, by default to the latest."""
        ledger = self.latest if ledger is None else ledger
        found = self.ledgers.setdefault(ledger, [])
        toid = (ledger << 32) | ((len(found) + 1) << 12)
        if kind != "distribute":
            self.balance += amount if kind == "deposit" else -amount
        where = scval.to_address(address)
        owner = scval.to_address(self.vault.owner)
        topics = [scval.to_symbol(kind), *([owner, where] if kind == "withdraw_to" else [where])]
        told = [scval.to_int128(amount), scval.to_int128(self.balance)]
        value = scval.to_int128(amount) if kind == "distribute" else scval.to_vec(told)
        made = ChainEvent(
            event_id=f"{toid:019d}-{0:010d}",
            contract_id=contract_id or self.vault.contract_id,
            ledger=ledger,
            closed_at=self.closed_at(ledger),
            tx_hash=tx_hash or tx_hash_of(f"{ledger} {len(found)} {self.genesis}"),
            topics=tuple(each.to_xdr() for each in topics),
            value=value.to_xdr(),
        )
        found.append(made)
        return made

    def deposit(self, address: str, amount: int, *, tx_hash: str | None = None) -> ChainEvent:
        """Add a deposit to the latest ledger."""
        return self.event("deposit", address, amount, tx_hash=tx_hash)

    def close(self, ledgers: int = 1) -> None:
        """Close ledgers."""
        self.latest += ledgers

    def closed_at(self, ledger: int) -> datetime:
        """Return when a ledger closed."""
        return self.genesis + timedelta(seconds=LEDGER_SECONDS * ledger)

    def reset(self, *, latest: int = 3) -> None:
        """Begin another history, later."""
        self.genesis = self.closed_at(self.latest + 1)
        self.ledgers, self.oldest, self.latest, self.balance = {}, 1, latest, 0

    # What a node answers

    async def retained(self) -> Retained:
        await trio.lowlevel.checkpoint()
        return Retained(self.oldest, Head(self.latest, self.closed_at(self.latest)))

    async def events(
        self, contract_id: str, *, cursor: str | None, start_ledger: int | None, limit: int
    ) -> EventPage | OutsideRange:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        assert contract_id == self.vault.contract_id
        start = start_ledger if cursor is None else int(cursor.partition("-")[0]) >> 32
        assert start is not None
        if not self.oldest <= start <= self.latest:
            return OutsideRange(self.oldest, self.latest)
        found = [
            event
            for ledger in range(start, self.latest + 1)
            for event in self.ledgers.get(ledger, ())
            if cursor is None or event.event_id > cursor
        ]
        page = found[:limit]
        end = page[-1].event_id if len(page) == limit else f"{((self.latest + 1) << 32) - 1:019d}-4294967294"
        told = page if self.mangle is None else self.mangle(list(page))
        return EventPage(tuple(told), end, await self.retained())

    async def simulate(self, envelope: Envelope) -> Simulated | ContractFault:
        """Answer the only question that is asked by simulation here: the balance."""
        await trio.lowlevel.checkpoint()
        return Simulated(scval.to_int128(self.balance).to_xdr(), 0, self.latest)

    async def wrapped_in(self, tx_hash: str, ledger: int) -> str | None:
        """Return what is inside: nothing here is a fee-bump."""
        await trio.lowlevel.checkpoint()
        return None

    def begin_again(self) -> None:
        """Nothing is remembered."""

    # What nobody asks this node

    async def is_allowed(self, address: str) -> bool:
        raise NotImplementedError

    async def wallet(self, address: str) -> WalletBalances:
        raise NotImplementedError

    async def sequence_of(self, address: str) -> int | None:
        raise NotImplementedError

    def build(self, call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        raise NotImplementedError

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        raise NotImplementedError

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        raise NotImplementedError


def events_of(stream: Stream) -> Sequence[ChainEvent]:
    """Return every event that a stream ever had, in order."""
    return [event for ledger in sorted(stream.ledgers) for event in stream.ledgers[ledger]]
