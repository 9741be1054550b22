"""A sandbox for the tests of its contracts: accounts, and calls that are simulated, signed and made into ledgers."""

import hashlib
from collections.abc import Sequence
from typing import Any

import attrs
from stellar_sdk import (
    Account,
    Asset,
    ChangeTrust,
    CreateAccount,
    InvokeHostFunction,
    Keypair,
    Payment,
    TransactionBuilder,
    TransactionEnvelope,
    scval,
    xdr,
)
from stellar_sdk.auth import authorize_entry
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.accounts import find_account, find_trust_line
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.sandbox.ledger import SandboxNode
from callora.stellar.sandbox.soroban.contracts import CODE, executable_of
from callora.stellar.sandbox.soroban.host import Contract
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.simulation import AuthMode, Simulation, SimulationFailed, Simulator
from callora.stellar.sandbox.soroban.values import sc_address
from callora.stellar.sandbox.state import Admission, Included, Undecodable
from callora.stellar.sandbox.transactions import decode
from tests.support.sandbox import make_town

FEE = 1000
"""Stroops that every transaction here bids for its inclusion."""
STROOPS = 10_000_000
SHORT = Limits(persistent_ledgers_min=60, temporary_ledgers_min=8, ledgers_max=90)
"""Lives that a test can outlive."""


@attrs.frozen
class Done:
    """What became of a transaction, read from its XDR."""

    included: Included
    code: str
    """`txSUCCESS`, `txFAILED` …"""
    operation: str | None
    """Of the contract operation: `TRAPPED`, `ENTRY_ARCHIVED` …, or None where no operation was applied."""
    value: Any
    """What the contract returned, as Python values."""

    @property
    def succeeded(self) -> bool:
        return self.included.successful

    @property
    def events(self) -> list[tuple[tuple[Any, ...], Any]]:
        """Topics and data, as Python values."""
        return [
            (tuple(plain(topic) for topic in event.topics), plain(event.value))
            for events in self.included.events
            for event in events
        ]

    @property
    def contract_error(self) -> int | None:
        """N of `Error(Contract, #N)`, from the diagnostic events."""
        for text in self.included.diagnostics:
            event = xdr.DiagnosticEvent.from_xdr(text).event
            assert event.body.v0 is not None
            for topic in event.body.v0.topics:
                if topic.error is not None and topic.error.contract_code is not None:
                    return topic.error.contract_code.uint32
        return None


def plain(text: str | xdr.SCVal) -> Any:
    """Return a value as Python values: addresses as text."""
    value = xdr.SCVal.from_xdr(text) if isinstance(text, str) else text
    return _plain(scval.to_native(value))


def _plain(native: Any) -> Any:
    if isinstance(native, list):
        return [_plain(each) for each in native]
    if isinstance(native, dict):
        return {_plain(key): _plain(each) for key, each in native.items()}
    address = getattr(native, "address", None)
    return address if isinstance(address, str) else native


def invoke(contract: str, name: str, *arguments: xdr.SCVal) -> xdr.HostFunction:
    """Return the host function that calls a contract."""
    call = xdr.InvokeContractArgs(sc_address(contract), xdr.SCSymbol(name.encode()), list(arguments))
    return xdr.HostFunction(xdr.HostFunctionType.HOST_FUNCTION_TYPE_INVOKE_CONTRACT, invoke_contract=call)


class World:
    """A sandbox whose ledgers close when the test says so."""

    def __init__(self, limits: Limits | None = None, *, authorized_caller: bool = True) -> None:
        self.limits = limits or Limits()
        self.owner = keypair_of("vault owner")
        self.admin = keypair_of("settlement admin")
        self.caller = keypair_of("charger")
        funded = (self.caller.public_key,)
        cast = Cast(authorized_caller=self.caller.public_key if authorized_caller else None, funded=funded)
        self.town = make_town(cast=cast, limits=self.limits)
        self.clock, self.sandbox = self.town.clock, self.town.sandbox
        self.ledger, self.places = self.sandbox.ledger, self.sandbox.places
        self.node: SandboxNode = self.sandbox.nodes["a"]
        self.passphrase = self.ledger.rules.passphrase
        self.simulator = Simulator(self.limits, "tests")
        self.vault = self.places.vault_contract
        self.settlement = self.places.settlement_contract
        self.usdc = self.places.usdc_contract
        self.xlm = self.places.xlm_contract

    # Ledgers and accounts.

    def close(self, ledgers: int = 1) -> None:
        for _ in range(ledgers):
            self.clock.advance(5)
            self.ledger.close()

    def outlive(self) -> None:
        """Let so many ledgers close that everything that nobody used is archived, where lives are SHORT."""
        assert self.limits.ledgers_max == SHORT.ledgers_max
        self.close(SHORT.ledgers_max + 1)

    def sequence_of(self, address: str) -> int:
        account = find_account(self.ledger.state, address)
        assert account is not None
        return account.seq_num.sequence_number.int64

    def xlm_of(self, address: str) -> int:
        account = find_account(self.ledger.state, address)
        assert account is not None
        return account.balance.int64

    def usdc_of(self, address: str) -> int | None:
        line = find_trust_line(self.ledger.state, address, self.places.usdc.to_xdr_object())
        return line.balance.int64 if line is not None else None

    def envelope(
        self,
        source: Keypair,
        *operations: Operation,
        data: xdr.SorobanTransactionData | None = None,
        fee: int = FEE,
        max_time: int = 0,
        signers: Sequence[Keypair] = (),
    ) -> TransactionEnvelope:
        account = Account(source.public_key, self.sequence_of(source.public_key))
        builder = TransactionBuilder(account, self.passphrase, fee)
        for operation in operations:
            builder.append_operation(operation)
        builder.add_time_bounds(0, max_time)
        if data is not None:
            builder.set_soroban_data(data)
        envelope = builder.build()
        for signer in (source, *signers):
            envelope.sign(signer)
        return envelope

    def submit(self, envelope: Any) -> Admission:
        admission = self.node.submit(envelope.to_xdr())
        assert isinstance(admission, Admission)
        return admission

    def apply(self, envelope: Any) -> Done:
        """Submit, close a ledger, and return what became of it."""
        admission = self.submit(envelope)
        assert admission.status == "PENDING", refused_code(admission)
        self.close()
        return self.done(admission.hash)

    def done(self, tx_hash: str) -> Done:
        included = self.node.transaction(tx_hash)
        assert included is not None
        return read(included)

    def wallet(self, name: str, usdc: int | None = None) -> Keypair:
        """Return the key of a new account with XLM, and with a trust line if it is to have USDC.

        Args:
            usdc: stroops.
        """
        made = Keypair.from_raw_ed25519_seed(hashlib.sha256(name.encode()).digest())
        assert self.apply(self.envelope(self.places.friendbot, CreateAccount(made.public_key, "1000"))).succeeded
        if usdc is not None:
            asset = Asset(self.places.usdc.code, self.places.usdc.issuer)
            assert self.apply(self.envelope(made, ChangeTrust(asset))).succeeded
            if usdc:
                pay = Payment(made.public_key, asset, f"{usdc // STROOPS}.{usdc % STROOPS:07d}")
                assert self.apply(self.envelope(self.places.issuer, pay)).succeeded
        return made

    # Contracts.

    def simulate(
        self,
        function: xdr.HostFunction,
        source: Keypair,
        *,
        auth: Sequence[xdr.SorobanAuthorizationEntry] = (),
        mode: AuthMode | None = None,
        upgraded: bool = True,
    ) -> Simulation | SimulationFailed:
        plain_envelope = self.envelope(source, InvokeHostFunction(function, list(auth)))
        decoded = decode(plain_envelope.to_xdr(), self.ledger.network_id)
        assert not isinstance(decoded, Undecodable)
        return self.simulator.simulate(
            self.ledger.state, self.ledger.context(), decoded, auth_mode=mode, upgraded_auth=upgraded
        )

    def prepare(
        self,
        function: xdr.HostFunction,
        source: Keypair,
        *,
        authorizers: Sequence[Keypair] = (),
        upgraded: bool = True,
        live_ledgers: int = 100,
    ) -> TransactionEnvelope:
        """Return a transaction that is simulated, assembled and signed."""
        simulated = self.simulate(function, source, upgraded=upgraded)
        assert isinstance(simulated, Simulation), simulated
        until = self.ledger.header.sequence + live_ledgers
        auth = [self._authorized(entry, authorizers, until) for entry in simulated.auth]
        return self.envelope(source, InvokeHostFunction(function, auth), data=simulated.data)

    def _authorized(
        self, entry: xdr.SorobanAuthorizationEntry, authorizers: Sequence[Keypair], until: int
    ) -> xdr.SorobanAuthorizationEntry:
        credentials = entry.credentials.address or entry.credentials.address_v2
        if credentials is None:
            return entry
        signer = next(each for each in authorizers if sc_address(each.public_key) == credentials.address)
        return authorize_entry(entry, signer, until, self.passphrase)

    def call(
        self, source: Keypair, contract: str, name: str, *arguments: xdr.SCVal, authorizers: Sequence[Keypair] = ()
    ) -> Done:
        """Call a contract, in a ledger of its own, and return what became of it."""
        return self.apply(self.prepare(invoke(contract, name, *arguments), source, authorizers=authorizers))

    def must(self, source: Keypair, contract: str, name: str, *arguments: xdr.SCVal) -> Done:
        """Call a contract, and see to it that it succeeds."""
        done = self.call(source, contract, name, *arguments)
        assert done.succeeded, (name, done)
        return done

    def refused(self, source: Keypair, contract: str, name: str, *arguments: xdr.SCVal) -> str:
        """Return the error of a call that fails in simulation: `Error(Contract, #5)`."""
        simulated = self.simulate(invoke(contract, name, *arguments), source)
        assert isinstance(simulated, SimulationFailed), simulated
        return simulated.error.splitlines()[0].removeprefix("HostError: ")

    def ask(self, contract: str, name: str, *arguments: xdr.SCVal) -> Any:
        """Return what a function answers that changes nothing."""
        simulated = self.simulate(invoke(contract, name, *arguments), self.owner)
        assert isinstance(simulated, Simulation), simulated
        assert simulated.value is not None
        return plain(simulated.value)

    def deploy(self, model: type[Contract], name: str) -> str:
        """Upload and create another contract, and return its id."""
        kinds = xdr.HostFunctionType
        upload = xdr.HostFunction(kinds.HOST_FUNCTION_TYPE_UPLOAD_CONTRACT_WASM, wasm=CODE[model])
        assert self.apply(self.prepare(upload, self.owner)).succeeded
        preimage = xdr.ContractIDPreimage(
            xdr.ContractIDPreimageType.CONTRACT_ID_PREIMAGE_FROM_ADDRESS,
            from_address=xdr.ContractIDPreimageFromAddress(
                sc_address(self.owner.public_key), xdr.Uint256(hashlib.sha256(name.encode()).digest())
            ),
        )
        create = xdr.HostFunction(
            kinds.HOST_FUNCTION_TYPE_CREATE_CONTRACT,
            create_contract=xdr.CreateContractArgs(preimage, executable_of(model)),
        )
        done = self.apply(self.prepare(create, self.owner))
        assert done.succeeded
        assert isinstance(done.value, str)
        return done.value

    # What the vault needs to be useful.

    def depositor(self, name: str, usdc: int) -> Keypair:
        """Return a wallet that may deposit."""
        made = self.wallet(name, usdc)
        self.must(self.owner, self.vault, "set_allowed_depositor", address(self.owner), address(made))
        return made


def read(included: Included) -> Done:
    """Return what a transaction's XDR says of it."""
    result = xdr.TransactionResult.from_xdr(included.result).result
    code = result.code.name
    results = result.results
    if result.inner_result_pair is not None:
        results = result.inner_result_pair.result.result.results
        code = result.inner_result_pair.result.result.code.name
    operation = None
    if results and results[0].tr is not None:
        made = results[0].tr
        inner = made.invoke_host_function_result or made.extend_footprint_ttl_result or made.restore_footprint_result
        if inner is not None:
            operation = inner.code.name.split("_", 3)[-1] if made.invoke_host_function_result else inner.code.name
    meta = xdr.TransactionMeta.from_xdr(included.meta).v4
    assert meta is not None
    returned = meta.soroban_meta.return_value if meta.soroban_meta is not None else None
    return Done(included, code, operation, plain(returned) if returned is not None else None)


def refused_code(admission: Admission) -> str:
    """Return the code of a refused submission: `txBAD_SEQ`."""
    assert admission.result is not None
    return xdr.TransactionResult.from_xdr(admission.result).result.code.name


def address(of: Keypair | str | None) -> xdr.SCVal:
    """Return an address as an argument; nothing as void."""
    if of is None:
        return scval.to_void()
    return scval.to_address(of if isinstance(of, str) else of.public_key)


i128 = scval.to_int128
"""An amount as an argument."""
