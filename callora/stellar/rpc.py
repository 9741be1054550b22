"""One RPC node: every question Callora has for it, answered in the ledger's own values.

No policy: it asks once. Whatever stellar-sdk or the node does wrong becomes one of two faults: `ChainUnavailable`,
nothing was changed, or, of a send alone, `ChainOutcomeUnknown`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import urlsplit

from stellar_sdk import Address, Keypair, SorobanDataBuilder, TransactionEnvelope, scval, xdr
from stellar_sdk.exceptions import SorobanRpcErrorResponse
from stellar_sdk.soroban_rpc import (
    EventFilter,
    EventFilterType,
    EventInfo,
    GetTransactionResponse,
    GetTransactionStatus,
    SendTransactionStatus,
    SimulateTransactionResponse,
)
from stellar_sdk.soroban_server_async import SorobanServerAsync

from callora.ledger.chain import (
    Applied,
    Archived,
    ChainEvent,
    ContractFault,
    Envelope,
    EventPage,
    FeeStats,
    Head,
    NetworkFacts,
    NotSeen,
    OutsideRange,
    Retained,
    Sent,
    Simulated,
    WalletBalances,
)
from callora.ledger.faults import ChainOutcomeUnknown, ChainUnavailable
from callora.stellar.contracts import question, token_balance_call
from callora.stellar.envelopes import FOREIGN, read, seal, unseal
from callora.stellar.results import contract_fault, read_diagnostics, read_meta, read_result
from callora.stellar.transport import ReplyFault, Transport, rpc_fault

REQUEST_SECONDS_MAX: Final = 10.0
SEND_SECONDS_MAX: Final = 15.0
"""The node waits for its core, which verifies the transaction."""
EVENTS_MAX: Final = 10_000
"""The node's own bound of a page."""
Leeway = Literal["none", "some", "more"]
"""How far the state may move between simulation and ledger: not at all, as much as others' calls usually move it, or
farther, as one that failed for its resources has shown."""
LEEWAY: Final[dict[Leeway, tuple[int, int, int]]] = {"none": (0, 0, 0), "some": (15, 50, 512), "more": (30, 100, 2048)}
"""Percent more than the simulated resources and resource fee, and bytes on top of what is written: the vault contract's
entry grows with each depositor admitted. What of the fee is not used comes back.
Source: stellar.md C6 gives 15 % of the instructions; instructions and bytes above the need cost a little, a failure
costs the whole fee, the sequence number and a ledger."""
_WRITE_BYTES_MAX: Final = 132_096
_INSTRUCTIONS_MAX: Final = 400_000_000
_NO_TRANSACTION: Final = "0" * 64
_TRUSTLINE_MISSING: Final = 13
_OUT_OF_RANGE: Final = -32600
_RANGE: Final = re.compile(r"([0-9]{1,10})\s*-\s*([0-9]{1,10})")
_STATUSES: Final[dict[SendTransactionStatus, Literal["pending", "duplicate", "try_again_later", "refused"]]] = {
    SendTransactionStatus.PENDING: "pending",
    SendTransactionStatus.DUPLICATE: "duplicate",
    SendTransactionStatus.TRY_AGAIN_LATER: "try_again_later",
    SendTransactionStatus.ERROR: "refused",
}


@contextmanager
def translated(*, sending: bool = False) -> Iterator[None]:
    """Turn what the transport and the SDK raise into Callora's own faults; what they do not raise passes.

    Args:
        sending: whether a transaction is sent inside: then what is not certain is unknown.

    Raises:
        ChainUnavailable: no usable answer, and nothing was changed.
        ChainOutcomeUnknown: of a send, the node may have taken it.
    """
    try:
        yield
    except ReplyFault as fault:
        raise _fault(fault, sending) from fault
    except SorobanRpcErrorResponse as error:
        raise _fault(rpc_fault(error.code, error.message or ""), sending) from error
    except FOREIGN as error:
        text = f"a reply that cannot be read: {type(error).__name__}"
        raise _fault(ReplyFault(text, "malformed", passing=True, perhaps_done=True), sending) from error


def _fault(fault: ReplyFault, sending: bool) -> ChainUnavailable | ChainOutcomeUnknown:
    if sending and fault.perhaps_done:
        return ChainOutcomeUnknown(str(fault), kind=fault.kind)
    return ChainUnavailable(
        str(fault), kind=fault.kind, passing=fault.passing, retry_after_seconds=fault.retry_after_seconds
    )


class RpcNode:
    """A node that speaks Stellar RPC.

    Every method but `send` raises `ChainUnavailable` and changes nothing; each may be cancelled at any time.
    """

    def __init__(self, url: str, passphrase: str, transport: Transport, *, health_seconds_max: float = 2.0) -> None:
        """Describe the node; nothing is asked yet.

        Args:
            url: where it listens.
            passphrase: of the network it should be on.
            health_seconds_max: how long `healthy` waits.
        """
        self.url = url
        self.name = urlsplit(url).netloc
        """What to call it in a log: its path may be a provider's key."""
        self.latest = 0
        """The ledger that its last answer was given on; read it before anything else is awaited."""
        self._passphrase = passphrase
        self._server = SorobanServerAsync(url, transport.client(REQUEST_SECONDS_MAX))
        self._sender = SorobanServerAsync(url, transport.client(SEND_SECONDS_MAX))
        self._prober = SorobanServerAsync(url, transport.client(health_seconds_max))

    async def healthy(self) -> None:
        """Return when the node says that it is healthy."""
        with translated():
            await self._prober.get_health()

    async def network(self) -> NetworkFacts:
        """Return which network the node is on."""
        with translated():
            told = await self._server.get_network()
            return NetworkFacts(told.passphrase, told.protocol_version, told.friendbot_url or None)

    async def retained(self) -> Retained:
        """Return the ledgers that the node can tell of."""
        with translated():
            # Asking for a transaction that cannot be tells first and last ledger with their times, in one answer and on
            # every version; getHealth knows no times, and getLatestLedger none before protocol 23.
            return self._retained(await self._server.get_transaction(_NO_TRANSACTION))

    async def sequence_of(self, address: str) -> int | None:
        """Return the last sequence number that an account used; None where there is no such account."""
        with translated():
            account = await self._account(address)
            return None if account is None else account.seq_num.sequence_number.int64

    async def simulate(self, envelope: Envelope) -> Simulated | ContractFault:
        """Return what a contract call would return now, or why it cannot succeed."""
        with translated():
            told = await self._simulate(unseal(envelope, self._passphrase))
            fault = _simulation_fault(told)
            if fault is not None:
                return fault
            assert told.min_resource_fee is not None
            value = told.results[0].xdr if told.results else None
            return Simulated(value, told.min_resource_fee, told.latest_ledger)

    async def prepare(self, envelope: Envelope, *, leeway: Leeway = "none") -> Envelope | ContractFault:
        """Return the transaction with the resources, the fee and the consents that its call needs, unsigned.

        Args:
            envelope: as `contracts.build` made it; its signatures are dropped.
            leeway: how much more than was simulated to allow for.
        """
        with translated():
            opened = unseal(envelope, self._passphrase)
            assert isinstance(opened, TransactionEnvelope)
            told = await self._simulate(opened)
            fault = _simulation_fault(told)
            if fault is not None:
                return fault
            prepared = await self._server.prepare_transaction(opened, told)
            return seal(_with_leeway(prepared, leeway))

    async def send(self, envelope: Envelope) -> Sent:
        """Send a signed transaction, once.

        Raises:
            ChainUnavailable: provably nothing was sent, or the node refused to look at it.
            ChainOutcomeUnknown: the node may have taken it.
        """
        with translated(sending=True):
            told = await self._sender.send_transaction(envelope.xdr)
            code = read_result(told.error_result_xdr).result_code if told.error_result_xdr else None
            self.latest = told.latest_ledger
            head = Head(told.latest_ledger, _instant(told.latest_ledger_close_time))
            return Sent(_STATUSES[told.status], code, head)

    async def transaction(self, tx_hash: str) -> Applied | NotSeen:
        """Return what became of a transaction.

        Args:
            tx_hash: 64 hexadecimal digits; of a fee-bump or of its inner transaction.
        """
        with translated():
            told = await self._server.get_transaction(tx_hash)
            retained = self._retained(told)
            if told.status is GetTransactionStatus.NOT_FOUND:
                return NotSeen(retained)
            return _applied(told)

    async def wrapped_in(self, tx_hash: str, ledger: int) -> str | None:
        """Return the hash of the transaction inside a fee-bump; None for one that is no fee-bump, or that is forgotten.

        Args:
            tx_hash: of a transaction that is applied, as its events name it.
            ledger: which one it is in.

        Raises:
            ChainUnavailable: this node should know it, and does not.
        """
        with translated():
            told = await self._server.get_transaction(tx_hash)
            if told.status is GetTransactionStatus.NOT_FOUND:
                if told.oldest_ledger > ledger:
                    return None
                raise ChainUnavailable(f"{self.name} does not know a transaction of ledger {ledger}", kind="stale")
            assert told.envelope_xdr is not None
            envelope = read(told.envelope_xdr, self._passphrase)
            assert isinstance(envelope, Envelope)
            return envelope.inner_hash

    async def events(
        self, contract_id: str, *, cursor: str | None, start_ledger: int | None, limit: int
    ) -> EventPage | OutsideRange:
        """Return a contract's next events.

        Args:
            cursor: of the last page; the events after it.
            start_ledger: where there is no cursor: the events from this ledger on.
            limit: 1 to EVENTS_MAX.
        """
        assert (cursor is None) != (start_ledger is None)
        wanted = EventFilter(type=EventFilterType.CONTRACT, contractIds=[contract_id])
        with translated():
            try:
                told = await self._server.get_events(
                    start_ledger=start_ledger, filters=[wanted], cursor=cursor, limit=limit
                )
            except SorobanRpcErrorResponse as error:
                if error.code != _OUT_OF_RANGE:
                    raise
                return await self._outside(error.message or "")
            self.latest = told.latest_ledger
            head = Head(told.latest_ledger, _instant(told.latest_Ledger_close_time))
            events = tuple(_event(each) for each in told.events if each.event_type == "contract")
            return EventPage(events, told.cursor, Retained(told.oldest_ledger, head))

    async def fee_stats(self) -> FeeStats:
        """Return what contract calls bid lately."""
        with translated():
            told = await self._server.get_fee_stats()
            self.latest = told.latest_ledger
            bids = told.soroban_inclusion_fee
            return FeeStats(bids.p50, bids.p90, bids.p99, bids.max)

    async def wallet(self, address: str, usdc_contract: str) -> WalletBalances:
        """Return what an address has.

        Args:
            address: `G…` or `C…`.
            usdc_contract: the token's contract.
        """
        with translated():
            if address.startswith("C"):
                return await self._contract_wallet(address, usdc_contract)
            account = await self._account(address)
            if account is None:
                return WalletBalances(exists=False, xlm=0, usdc=None)
            asked_on = self.latest
            usdc = await self._token_balance(address, usdc_contract)
            self.latest = min(asked_on, self.latest)
            return WalletBalances(exists=True, xlm=account.balance.int64, usdc=usdc)

    async def _contract_wallet(self, address: str, usdc_contract: str) -> WalletBalances:
        instance = _contract_data(address, xdr.SCVal(xdr.SCValType.SCV_LEDGER_KEY_CONTRACT_INSTANCE))
        entry = scval.to_vec([scval.to_symbol("Balance"), scval.to_address(address)])
        found = await self._entries([instance, _contract_data(usdc_contract, entry)])
        held = next((each for each in found if each.contract_data and each.contract_data.key == entry), None)
        if held is None or held.contract_data is None:
            return WalletBalances(exists=bool(found), xlm=0, usdc=None)
        amount = scval.from_int128(scval.from_struct(held.contract_data.val)["amount"])
        return WalletBalances(exists=True, xlm=0, usdc=amount)

    async def _token_balance(self, address: str, token: str) -> int | None:
        asked = question(token_balance_call(token, address), self._passphrase)
        told = await self._simulate(unseal(asked, self._passphrase))
        fault = _simulation_fault(told)
        if fault is None:
            assert told.results
            return scval.from_int128(told.results[0].xdr)
        if fault.contract_error != _TRUSTLINE_MISSING:
            raise ReplyFault(f"the token {token} answers {fault.reason}", "refused", passing=False, perhaps_done=False)
        return None

    async def _account(self, address: str) -> xdr.AccountEntry | None:
        key = xdr.LedgerKey(
            xdr.LedgerEntryType.ACCOUNT,
            account=xdr.LedgerKeyAccount(Keypair.from_public_key(address).xdr_account_id()),
        )
        found = await self._entries([key])
        if not found:
            return None
        account = found[0].account
        assert account is not None
        return account

    async def _entries(self, keys: list[xdr.LedgerKey]) -> list[xdr.LedgerEntryData]:
        told = await self._server.get_ledger_entries(keys)
        self.latest = told.latest_ledger
        return [xdr.LedgerEntryData.from_xdr(each.xdr) for each in told.entries or ()]

    async def _simulate(self, envelope: object) -> SimulateTransactionResponse:
        assert isinstance(envelope, TransactionEnvelope)
        told = await self._server.simulate_transaction(envelope)
        self.latest = told.latest_ledger
        return told

    async def _outside(self, message: str) -> OutsideRange:
        told = _RANGE.search(message)
        if told is not None:
            self.latest = int(told[2])
            return OutsideRange(int(told[1]), int(told[2]))
        retained = self._retained(await self._server.get_transaction(_NO_TRANSACTION))
        return OutsideRange(retained.oldest, retained.latest.sequence)

    def _retained(self, told: GetTransactionResponse) -> Retained:
        self.latest = told.latest_ledger
        return Retained(told.oldest_ledger, Head(told.latest_ledger, _instant(told.latest_ledger_close_time)))


def _instant(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _contract_data(contract_id: str, key: xdr.SCVal) -> xdr.LedgerKey:
    return xdr.LedgerKey(
        xdr.LedgerEntryType.CONTRACT_DATA,
        contract_data=xdr.LedgerKeyContractData(
            Address(contract_id).to_xdr_sc_address(), key, xdr.ContractDataDurability.PERSISTENT
        ),
    )


def _simulation_fault(told: SimulateTransactionResponse) -> ContractFault | None:
    if told.error is not None:
        return contract_fault(read_diagnostics(told.events or ()), told.error)
    if told.restore_preamble is not None:
        needed = told.restore_preamble
        archived = Archived(needed.transaction_data, needed.min_resource_fee)
        return ContractFault(None, "what it needs is archived and must be restored first", archived=archived)
    return None


def _with_leeway(prepared: TransactionEnvelope, leeway: Leeway) -> TransactionEnvelope:
    more, more_fee, more_bytes = LEEWAY[leeway]
    transaction = prepared.transaction
    assert transaction.soroban_data is not None
    resources = transaction.soroban_data.resources
    simulated_fee = transaction.soroban_data.resource_fee.int64
    fee = -(-simulated_fee * (100 + more_fee) // 100)
    data = SorobanDataBuilder.from_xdr(transaction.soroban_data).set_resource_fee(fee)
    data.set_resources(
        min(-(-resources.instructions.uint32 * (100 + more) // 100), _INSTRUCTIONS_MAX),
        resources.disk_read_bytes.uint32,
        min(-(-resources.write_bytes.uint32 * (100 + more) // 100) + more_bytes, _WRITE_BYTES_MAX),
    )
    transaction.soroban_data = data.build()  # type: ignore[no-untyped-call]
    transaction.fee += fee - simulated_fee
    return prepared


def _applied(told: GetTransactionResponse) -> Applied:
    assert told.result_xdr is not None
    assert told.ledger is not None
    assert told.create_at is not None
    outcome = read_result(told.result_xdr)
    value, events = read_meta(told.result_meta_xdr) if told.result_meta_xdr else (None, ())
    fault = None
    if outcome.operation_code is not None and _is_contract_call(told.envelope_xdr):
        events = events or read_diagnostics(told.diagnostic_events_xdr or ())
        fault = contract_fault(events, "")
    return Applied(
        successful=outcome.successful,
        ledger=told.ledger,
        closed_at=_instant(told.create_at),
        result_code=outcome.result_code,
        operation_code=outcome.operation_code,
        fault=fault,
        return_value=value if outcome.successful else None,
        fee_charged=outcome.fee_charged,
    )


def _is_contract_call(envelope_xdr: str | None) -> bool:
    if envelope_xdr is None:
        return False
    read = xdr.TransactionEnvelope.from_xdr(envelope_xdr)
    inner = read.fee_bump.tx.inner_tx.v1 if read.fee_bump is not None else read.v1
    return inner is not None and any(
        each.body.type == xdr.OperationType.INVOKE_HOST_FUNCTION for each in inner.tx.operations
    )


def _event(told: EventInfo) -> ChainEvent:
    return ChainEvent(
        event_id=told.id,
        contract_id=told.contract_id,
        ledger=told.ledger,
        closed_at=told.ledger_close_at,
        tx_hash=told.transaction_hash,
        topics=tuple(told.topic),
        value=told.value,
    )
