"""What a Stellar network says, as values: ledgers, transactions, events, and what follows from it.

Hashes are lower-case hex, envelopes base64 XDR, money stroops, instants aware UTC.
"""

from datetime import datetime
from typing import Literal

import attrs


@attrs.frozen
class Head:
    """The last closed ledger that a node knows."""

    sequence: int
    closed_at: datetime


@attrs.frozen
class Retained:
    """What a node can tell of the past, said with most of its answers."""

    oldest: int
    """The first ledger it still has."""
    latest: Head


@attrs.frozen
class NetworkFacts:
    """Which network a node is on."""

    passphrase: str
    protocol_version: int
    friendbot_url: str | None


@attrs.frozen
class Envelope:
    """A transaction envelope as it is stored and sent: signed or not, with or without a fee-bump around it."""

    xdr: str
    hash: str
    """Of the outermost transaction; what signatures sign and networks look up. Signatures do not change it."""
    inner_hash: str | None
    """Of the inner transaction of a fee-bump; both hashes find it."""
    source: str
    """The account whose sequence number it uses, `G…`."""
    sequence: int
    max_time: int
    """The last second of its time bound, since 1970; 0 for none, which Callora neither builds nor takes."""
    fee: int
    """Stroops of XLM, at most; with the resource fee of a contract call."""


@attrs.frozen
class Sent:
    """What a node said to a transaction that it was sent; never that it was applied."""

    status: Literal["pending", "duplicate", "try_again_later", "refused"]
    """`pending` and `duplicate`: it waits for a ledger. `refused`: this node did not take it, see `result_code`."""
    result_code: str | None
    """Of a refusal: `tx_bad_seq`, `tx_insufficient_fee` …"""
    latest: Head


@attrs.frozen
class Archived:
    """What a contract call needs is archived, on a network that does not restore it by itself.

    It is restored by a transaction of its own, made of this, before the call is prepared anew.
    Source: networks from protocol 23 on restore with the call; older ones say `restorePreamble`.
    """

    resources: str
    """Base64 XDR of what to restore."""
    resource_fee: int
    """Stroops of XLM."""


@attrs.frozen
class ContractFault:
    """Why a contract call cannot succeed."""

    contract_error: int | None
    """N of `Error(Contract, #N)`, the number of a contract's own rule; None for any other reason."""
    reason: str
    """For a log: the node's text, at most 500 characters."""
    contract_id: str | None = None
    """Whose rule it is, `C…`: the contract that was called, or one that it called; None where nobody says."""
    archived: Archived | None = None
    """Where this is all that is in the way."""


@attrs.frozen
class Applied:
    """A transaction is in a ledger, for ever."""

    successful: bool
    ledger: int
    closed_at: datetime
    result_code: str
    """`tx_success`, `tx_failed`, `tx_fee_bump_inner_failed` …"""
    operation_code: str | None
    """Of the operation that failed: `trapped`, `entry_archived`, `resource_limit_exceeded` …"""
    fault: ContractFault | None
    """Of a contract call that trapped."""
    return_value: str | None
    """Base64 XDR of what a contract call returned."""
    fee_charged: int


@attrs.frozen
class NotSeen:
    """This node knows of no such transaction. That is no failure: see `retained`."""

    retained: Retained

    def proves_dead(self, max_time: int, prepared_ledger: int) -> bool:
        """Tell whether the transaction can never be applied any more.

        Only where a ledger closed after its time bound, on a node that still has every ledger since it was prepared.
        A node whose last ledger is before that one, and yet closed after the bound, is on another history.
        Source: the network takes no transaction into a ledger that closes after its `maxTime`.
        """
        retained = self.retained
        return (
            retained.latest.closed_at.timestamp() > max_time
            and retained.oldest <= prepared_ledger <= retained.latest.sequence
        )


@attrs.frozen
class Simulated:
    """A contract call that would succeed now."""

    return_value: str | None
    """Base64 XDR."""
    resource_fee: int
    latest: int
    """The ledger it was simulated on."""


@attrs.frozen
class ChainEvent:
    """One event of a contract, of a transaction that succeeded."""

    event_id: str
    """19 digits, a dash, 10 digits: the same for ever and on every node; sorts by when it happened."""
    contract_id: str
    ledger: int
    closed_at: datetime
    tx_hash: str
    topics: tuple[str, ...]
    """Base64 XDR."""
    value: str
    """Base64 XDR."""


@attrs.frozen
class EventPage:
    """Events in order, and where to go on."""

    events: tuple[ChainEvent, ...]
    cursor: str
    retained: Retained


@attrs.frozen
class OutsideRange:
    """The place asked for is not one that this node has: not yet, no longer, or on another history."""

    oldest: int
    latest: int


@attrs.frozen
class FeeStats:
    """What was bid lately for a contract call's inclusion, stroops an operation."""

    p50: int
    p90: int
    p99: int
    max: int


@attrs.frozen
class WalletBalances:
    """What an account has, as far as deposits are concerned."""

    exists: bool
    xlm: int
    """Stroops of XLM (7 decimals), whole balance."""
    usdc: int | None
    """Stroops; None without a trustline (or, for a contract's address, without an entry)."""


@attrs.frozen
class TokenTransfer:
    """An event of a token contract: somebody paid somebody."""

    event_id: str
    sender: str
    """`G…` or `C…`."""
    receiver: str
    """`G…` or `C…`."""
    amount: int
    """Base units, >= 0."""


@attrs.frozen
class VaultEvent:
    """An event of the vault contract that moved its balance."""

    event_id: str
    kind: Literal["deposit", "withdraw", "withdraw_to", "deduct", "distribute"]
    ledger: int
    closed_at: datetime
    tx_hash: str
    address: str | None
    """Who deposited, or to whom was paid."""
    amount: int
    """Stroops, > 0."""
    balance_after: int | None
    """What the contract says it has then."""
