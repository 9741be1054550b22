"""A sandbox ledger for tests: on a clock that only the test moves, and people who send transactions to it."""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import attrs
import httpx
import trio
from stellar_sdk import (
    Account,
    Asset,
    ChangeTrust,
    CreateAccount,
    FeeBumpTransactionEnvelope,
    Keypair,
    Payment,
    TransactionBuilder,
    TransactionEnvelope,
    xdr,
)
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.accounts import find_account, find_trust_line
from callora.stellar.sandbox.codes import result_codes
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.sandbox.ledger import Keeper, NetworkRules
from callora.stellar.sandbox.network import Sandbox
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.state import Admission
from callora.stellar.sandbox.web import Answer, Dropped, Request
from callora.stellar.transport import WholeBody

START = 1_700_000_000
"""When a test's network begins, seconds since 1970: in the past, so that bounds made by the machine's clock hold."""
XLM = 10_000_000
"""Stroops."""


@attrs.define
class MovedClock:
    """A clock that stands still until it is moved."""

    seconds: float = START

    def now(self) -> datetime:
        """Return the present instant."""
        return datetime.fromtimestamp(self.seconds, UTC)

    def timestamp(self) -> float:
        """Return it in seconds since 1970."""
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Move it."""
        self.seconds += seconds


@attrs.frozen
class Town:
    """A sandbox, its clock, and its people."""

    sandbox: Sandbox
    clock: MovedClock

    @property
    def passphrase(self) -> str:
        """The network's."""
        return self.sandbox.ledger.rules.passphrase

    def someone(self, name: str, *, xlm: int = 10_000) -> "Person":
        """Return someone with a new account."""
        person = Person(self, keypair_of(name))
        friendbot = Person(self, self.sandbox.places.friendbot)
        self.applied(friendbot.transaction([CreateAccount(person.address, str(xlm))]))
        return person

    @property
    def issuer(self) -> "Person":
        """Who issues test USDC."""
        return Person(self, self.sandbox.places.issuer)

    @property
    def usdc(self) -> Asset:
        """Test USDC."""
        return self.sandbox.places.usdc

    def submit(self, envelope: TransactionEnvelope | FeeBumpTransactionEnvelope | str) -> Admission:
        """Return what the network says to a transaction."""
        text = envelope if isinstance(envelope, str) else envelope.to_xdr()
        admission = self.sandbox.ledger.submit(text)
        assert isinstance(admission, Admission)
        return admission

    def refused(self, envelope: TransactionEnvelope | FeeBumpTransactionEnvelope | str) -> dict[str, Any]:
        """Return the result codes of a transaction that is not taken."""
        admission = self.submit(envelope)
        assert admission.status == "ERROR", admission
        return codes(admission.result)

    def closed(self, envelope: TransactionEnvelope | FeeBumpTransactionEnvelope) -> dict[str, Any]:
        """Submit a transaction, close a ledger, and return the result codes that it has there."""
        admission = self.submit(envelope)
        assert admission.status == "PENDING", codes(admission.result) if admission.result else admission
        self.sandbox.ledger.close()
        found = self.sandbox.ledger.transaction(envelope.hash_hex())
        assert found is not None
        return codes(found.result)

    def applied(self, envelope: TransactionEnvelope | FeeBumpTransactionEnvelope) -> None:
        """The same with one that succeeds."""
        told = self.closed(envelope)
        assert told["transaction"] in ("tx_success", "tx_fee_bump_inner_success"), told


@attrs.frozen
class Person:
    """Someone with a key."""

    town: Town
    keypair: Keypair

    @property
    def address(self) -> str:
        """`G…`."""
        return self.keypair.public_key

    @property
    def entry(self) -> xdr.AccountEntry:
        """His account."""
        found = find_account(self.town.sandbox.ledger.state, self.address)
        assert found is not None
        return found

    @property
    def sequence(self) -> int:
        """The last sequence number that he used."""
        return self.entry.seq_num.sequence_number.int64

    @property
    def xlm(self) -> int:
        """What he has, stroops."""
        return self.entry.balance.int64

    def has(self, asset: Asset) -> int | None:
        """Return what he has of an asset, stroops; None without a trust line."""
        line = find_trust_line(self.town.sandbox.ledger.state, self.address, asset.to_xdr_object())
        return line.balance.int64 if line is not None else None

    def builder(self, *, fee: int = 100, sequence: int | None = None) -> TransactionBuilder:
        """Return a builder of a transaction of his, the next one unless `sequence` names another one before it."""
        account = Account(self.address, self.sequence if sequence is None else sequence)
        return TransactionBuilder(account, self.town.passphrase, fee)

    def transaction(
        self,
        operations: Sequence[Operation],
        *,
        fee: int = 100,
        sequence: int | None = None,
        bounds: tuple[int, int] = (0, 0),
        signers: Sequence[Keypair] | None = None,
    ) -> TransactionEnvelope:
        """Return a signed transaction.

        Args:
            fee: stroops an operation.
            sequence: the number before its own; by default the last one used.
            bounds: of its time.
            signers: by default himself.
        """
        builder = self.builder(fee=fee, sequence=sequence).add_time_bounds(*bounds)
        for operation in operations:
            builder.append_operation(operation)
        envelope = builder.build()
        for signer in [self.keypair] if signers is None else signers:
            envelope.sign(signer)
        return envelope

    def trust(self, asset: Asset, limit: str | None = None) -> None:
        """Make a trust line."""
        self.town.applied(self.transaction([ChangeTrust(asset, limit)]))

    def pay(self, to: "Person", amount: str, asset: Asset | None = None) -> TransactionEnvelope:
        """Return a payment."""
        return self.transaction([Payment(to.address, asset or Asset.native(), amount)])

    def bump(self, inner: TransactionEnvelope, fee: int, *, signers: Sequence[Keypair] | None = None) -> Any:
        """Return a transaction around another one, for which he pays.

        Args:
            fee: stroops in all.
        """
        bumped = TransactionBuilder.build_fee_bump_transaction(self.keypair, 10**6, inner, self.town.passphrase)
        bumped.transaction.fee = fee
        for signer in [self.keypair] if signers is None else signers:
            bumped.sign(signer)
        return bumped


def codes(result: str | None) -> dict[str, Any]:
    """Return the codes of a result, as Horizon writes them."""
    assert result is not None
    return result_codes(xdr.TransactionResult.from_xdr(result))


def make_town(
    *,
    rules: NetworkRules | None = None,
    cast: Cast | None = None,
    limits: Limits | None = None,
    keeper: Keeper | None = None,
    clock: MovedClock | None = None,
) -> Town:
    """Return a new sandbox with its clock."""
    clock = clock or MovedClock()
    return Town(Sandbox.make(clock, rules=rules, cast=cast, limits=limits, keeper=keeper), clock)


class SandboxTransport(httpx.AsyncBaseTransport):
    """What carries an httpx client's requests to a sandbox in the same process: no socket, so any clock will do."""

    def __init__(self, sandbox: Sandbox) -> None:
        """Make one."""
        self._sandbox = sandbox

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the sandbox's answer.

        Raises:
            RemoteProtocolError: it dropped the connection.
        """
        headers = {name.lower(): value for name, value in request.headers.items()}
        target = request.url.raw_path.decode("ascii")
        asked = Request.make(request.method, target, headers, await request.aread())
        answer = await self._sandbox.http.answer(asked)
        if isinstance(answer, Dropped):
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.", request=request)
        assert isinstance(answer, Answer), "streams need a socket here"
        sent = [("content-type", answer.content_type), *answer.headers]
        # As from a socket: not read yet.
        return httpx.Response(answer.status, headers=sent, stream=WholeBody(answer.body), request=request)


@asynccontextmanager
async def served(town: Town, close_seconds: float | None = None) -> AsyncIterator[str]:
    """Serve a sandbox on a socket for the length of the block, and yield its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    async with trio.open_nursery() as nursery:
        url = await nursery.start(town.sandbox.serve, listener, close_seconds)
        failure: Exception | None = None
        try:
            yield url
        except Exception as error:  # raised outside, where the nursery does not wrap it in an exception group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
