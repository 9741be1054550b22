"""What deposits, withdrawals and their watchers ask of the chain and of whoever sends: the seams between them."""

from typing import Protocol

from callora.ledger.chain import (
    Applied,
    ContractFault,
    Envelope,
    EventPage,
    NotSeen,
    OutsideRange,
    Retained,
    Simulated,
    WalletBalances,
)
from callora.ledger.submission import Alive, Dead
from callora.stellar.contracts import ContractCall, VaultContract
from callora.stellar.rpc import Leeway


class OnChain(Protocol):
    """One network, whichever node answers. Every question raises ChainUnavailable or ChainMismatch."""

    @property
    def network(self) -> str:
        """testnet or mainnet."""
        ...

    @property
    def passphrase(self) -> str:
        """The network's."""
        ...

    @property
    def vault(self) -> VaultContract:
        """The vault contract. Raises ChainUnavailable until it was reached."""
        ...

    async def retained(self) -> Retained:
        """Return what the nodes have."""
        ...

    async def events(
        self, contract_id: str, *, cursor: str | None, start_ledger: int | None, limit: int
    ) -> EventPage | OutsideRange:
        """Return a page of a contract's events."""
        ...

    async def simulate(self, envelope: Envelope) -> Simulated | ContractFault:
        """Return what a contract call would return now."""
        ...

    async def is_allowed(self, address: str) -> bool:
        """Tell whether an address may deposit."""
        ...

    async def wallet(self, address: str) -> WalletBalances:
        """Return what an address has."""
        ...

    async def sequence_of(self, address: str) -> int | None:
        """Return the last sequence number that an account used; None where there is no such account."""
        ...

    def build(self, call: ContractCall, *, source: str, sequence: int, max_time: int, fee: int) -> Envelope:
        """Return the unsigned transaction of a call, without its resources."""
        ...

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Return it with its resources, its fee and its consents."""
        ...

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction."""
        ...

    async def wrapped_in(self, tx_hash: str, ledger: int) -> str | None:
        """Return the hash of the transaction inside a fee-bump that is applied; None for none."""
        ...

    def begin_again(self) -> None:
        """Forget which ledger was the newest."""
        ...


class Sender(Protocol):
    """Whoever stores transactions, sends them and follows them up; on this network."""

    async def call(self, purpose: str, call: ContractCall) -> Applied | ContractFault:
        """Have a call applied once, signed by keys of ours, and return what came of it, however long that takes."""
        ...

    async def outcome(self, tx_hash: str) -> Applied | Dead | Alive | None:
        """Return what became of what was passed on, as stored; None where nothing is."""
        ...

    async def pass_on(self, purpose: str, envelope: Envelope, prepared_ledger: int) -> str:
        """Store and send what somebody else signed; return the hash that it goes by."""
        ...
