"""One Horizon: the second source. It finds a transaction that RPC no longer has, takes one that RPC cannot, and knows
accounts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from stellar_sdk.exceptions import BaseHorizonError, NotFoundError
from stellar_sdk.server_async import ServerAsync

from callora.ledger.chain import Applied, Envelope, Head, Sent
from callora.stellar.results import contract_fault, read_meta, read_result
from callora.stellar.rpc import SEND_SECONDS_MAX, translated
from callora.stellar.transport import ReplyFault, Transport

REQUEST_SECONDS_MAX: Final = 11.0
_STATUSES: Final[Mapping[str, Literal["pending", "duplicate", "try_again_later", "refused"]]] = {
    "PENDING": "pending",
    "DUPLICATE": "duplicate",
    "TRY_AGAIN_LATER": "try_again_later",
    "ERROR": "refused",
}


class HorizonNode:
    """A Horizon server. Every method but `submit` changes nothing; each may be cancelled at any time."""

    def __init__(self, url: str, transport: Transport, *, health_seconds_max: float = 2.0) -> None:
        """Describe the server; nothing is asked yet.

        Args:
            url: where it listens.
            health_seconds_max: how long `healthy` waits.
        """
        self.url = url
        self.name = urlsplit(url).netloc
        """What to call it in a log."""
        self.latest = 0
        """The ledger that its root named last."""
        self._server = ServerAsync(url, transport.client(REQUEST_SECONDS_MAX))
        self._sender = transport.client(SEND_SECONDS_MAX)
        self._prober = ServerAsync(url, transport.client(health_seconds_max))

    async def healthy(self) -> None:
        """Return when the server answers.

        Raises:
            ChainUnavailable: it does not.
        """
        with _answered():
            await self._prober.root().call()

    async def root(self) -> tuple[str, Head]:
        """Return the network's passphrase and the last ledger that the server has.

        Raises:
            ChainUnavailable: no usable answer.
        """
        with _answered():
            told = await self._server.root().call()
            head = Head(int(told["history_latest_ledger"]), _instant(told["history_latest_ledger_closed_at"]))
            self.latest = head.sequence
            return str(told["network_passphrase"]), head

    async def sequence_of(self, address: str) -> int | None:
        """Return the last sequence number that an account used; None where there is no such account.

        Raises:
            ChainUnavailable: no usable answer.
        """
        with _answered():
            try:
                return (await self._server.load_account(address)).sequence
            except NotFoundError:
                return None

    async def transaction(self, tx_hash: str) -> Applied | None:
        """Return what became of a transaction; None where this server has none, which proves nothing.

        Args:
            tx_hash: 64 hexadecimal digits; of a fee-bump or of its inner transaction.

        Raises:
            ChainUnavailable: no usable answer.
        """
        with _answered():
            try:
                told = await self._server.transactions().transaction(tx_hash).call()
            except NotFoundError:
                return None
            return _applied(told)

    async def submit(self, envelope: Envelope) -> Sent:
        """Send a signed transaction, once, without waiting for its ledger.

        Raises:
            ChainUnavailable: provably nothing was sent, or the server refused to look at it.
            ChainOutcomeUnknown: the server may have passed it on.
        """
        _, head = await self.root()
        with translated(sending=True):
            # The SDK's own method would ask for every payee's memo rules first, and lose what a 503 says.
            told: Mapping[str, Any]
            try:
                reply = await self._sender.post(f"{self.url}/transactions_async", data={"tx": envelope.xdr})
                told = reply.json()
                if reply.status_code >= 400 and "tx_status" not in told:
                    raise ReplyFault(
                        f"HTTP status {reply.status_code}",
                        "refused",
                        passing=False,
                        perhaps_done=False,
                        status=reply.status_code,
                    )
            except ReplyFault as fault:
                if "tx_status" not in fault.document:
                    raise
                told = fault.document
            status = _STATUSES[told["tx_status"]]
            result = told.get("error_result_xdr")
            return Sent(status, read_result(result).result_code if result else None, head)


@contextmanager
def _answered() -> Iterator[None]:
    """`translated`, for an interface whose refusals are exceptions of the SDK with an HTTP status."""
    with translated():
        try:
            yield
        except BaseHorizonError as error:
            raise ReplyFault(
                f"HTTP status {error.status}", "refused", passing=False, perhaps_done=False, status=error.status
            ) from error


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def _applied(told: Mapping[str, Any]) -> Applied:
    outcome = read_result(told["result_xdr"])
    meta = told.get("result_meta_xdr")  # a server may be set to leave it out
    value, events = read_meta(meta) if meta else (None, ())
    return Applied(
        successful=outcome.successful,
        ledger=int(told["ledger"]),
        closed_at=_instant(told["created_at"]),
        result_code=outcome.result_code,
        operation_code=outcome.operation_code,
        fault=contract_fault(events, "") if events and not outcome.successful else None,
        return_value=value if outcome.successful else None,
        fee_charged=outcome.fee_charged,
    )
