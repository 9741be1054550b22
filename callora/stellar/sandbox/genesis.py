"""How a sandbox begins: who has an account, and the contracts that are there from the start.

Addresses and contract ids follow from the network's passphrase and from the names in here, so that they are the same in
every sandbox of that passphrase; only the keys of the vault's owner and of whoever else is named come from outside.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import attrs
from stellar_sdk import (
    Account,
    Address,
    Asset,
    InvokeHostFunction,
    Keypair,
    StrKey,
    TransactionBuilder,
    TransactionEnvelope,
    scval,
    xdr,
)
from stellar_sdk.operation import Operation as SdkOperation

from callora.stellar.sandbox import transactions
from callora.stellar.sandbox.accounts import find_account, new_account, new_trust_line
from callora.stellar.sandbox.events import contract_id_of_asset
from callora.stellar.sandbox.ledger import PASSPHRASE, TOTAL_COINS, NetworkRules, SandboxLedger
from callora.stellar.sandbox.soroban import contracts
from callora.stellar.sandbox.soroban.contracts.settlement import Settlement
from callora.stellar.sandbox.soroban.contracts.vault import Vault
from callora.stellar.sandbox.soroban.host import Contract
from callora.stellar.sandbox.soroban.machine import contract_id_of
from callora.stellar.sandbox.soroban.simulation import Simulation, Simulator
from callora.stellar.sandbox.state import Admission, Entry, Reader, Undecodable, account_key, trust_line_key

NULL_ACCOUNT: Final = "GAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAWHF"
"""Nobody's, on every public network: what reads are simulated as."""
FRIENDBOT_COINS: Final = TOTAL_COINS // 10
FUNDED_COINS: Final = 10_000 * 10_000_000
USDC_CODE: Final = "USDC"
FOUNDING_LEDGERS: Final = 5
"""How many ledgers the contracts take, after the first one."""
_FEE: Final = 1000


def keypair_of(name: str) -> Keypair:
    """Return a key that everyone can make: of friendbot, of the issuer, of a test's channel."""
    return Keypair.from_raw_ed25519_seed(hashlib.sha256(f"callora sandbox/{name}".encode()).digest())


@attrs.frozen
class Cast:
    """The keys that a sandbox is given."""

    owner: Keypair = attrs.field(factory=lambda: keypair_of("vault owner"))
    """Of the vault, and its administrator."""
    settlement_admin: Keypair = attrs.field(factory=lambda: keypair_of("settlement admin"))
    authorized_caller: str | None = None
    """Who may deduct besides the owner, `G…`."""
    funded: tuple[str, ...] = ()
    """Who else has an account with XLM: channels, sponsors."""
    trusting: tuple[str, ...] = ()
    """Of them, who can hold test USDC from the start."""
    opening: int = 0
    """What the vault has from the start, stroops of test USDC that nobody deposited."""

    @classmethod
    def of_seeds(
        cls,
        owner: str,
        charger: str,
        crediter: str,
        funded: Sequence[str] = (),
        trusting: Sequence[str] = (),
        opening: int = 0,
    ) -> "Cast":
        """Return who is in a sandbox, by their seeds.

        Args:
            owner: of the vault's owner.
            charger: of who may deduct from the vault.
            crediter: of the settlement's administrator.
            funded: of who else has XLM from the start.
            trusting: of who has, and can hold test USDC.
            opening: what the vault has from the start, stroops.
        """
        deducting = Keypair.from_secret(charger).public_key
        holders = tuple(Keypair.from_secret(seed).public_key for seed in trusting)
        return cls(
            owner=Keypair.from_secret(owner),
            settlement_admin=Keypair.from_secret(crediter),
            authorized_caller=deducting,
            funded=(deducting, *(Keypair.from_secret(seed).public_key for seed in funded), *holders),
            trusting=holders,
            opening=opening,
        )


@attrs.frozen
class Places:
    """What is where in every sandbox of a passphrase."""

    root: Keypair
    """Who has all XLM at first: as on every network, whoever knows its passphrase."""
    friendbot: Keypair
    issuer: Keypair
    """Of test USDC."""
    usdc: Asset
    usdc_contract: str
    """`C…`, like the others."""
    xlm_contract: str
    vault_contract: str
    settlement_contract: str

    @classmethod
    def of(cls, passphrase: str = PASSPHRASE) -> "Places":
        """Return what follows from a passphrase."""
        network_id = transactions.network_id_of(passphrase)
        root, issuer = Keypair.from_raw_ed25519_seed(network_id), keypair_of("usdc issuer")
        usdc = Asset(USDC_CODE, issuer.public_key)
        return cls(
            root=root,
            friendbot=keypair_of("friendbot"),
            issuer=issuer,
            usdc=usdc,
            usdc_contract=StrKey.encode_contract(contract_id_of_asset(network_id, usdc.to_xdr_object())),
            xlm_contract=StrKey.encode_contract(contract_id_of_asset(network_id, Asset.native().to_xdr_object())),
            vault_contract=contract_id_of(network_id, _preimage(root, "vault")),
            settlement_contract=contract_id_of(network_id, _preimage(root, "settlement")),
        )


def _preimage(deployer: Keypair, name: str) -> xdr.ContractIDPreimage:
    return xdr.ContractIDPreimage(
        xdr.ContractIDPreimageType.CONTRACT_ID_PREIMAGE_FROM_ADDRESS,
        from_address=xdr.ContractIDPreimageFromAddress(
            Address(deployer.public_key).to_xdr_sc_address(),
            xdr.Uint256(hashlib.sha256(name.encode()).digest()),
        ),
    )


class SandboxGenesis:
    """The beginning of a sandbox."""

    def __init__(self, rules: NetworkRules, cast: Cast, simulator: Simulator) -> None:
        """Make one.

        Args:
            simulator: what says the footprints of the transactions that deploy the contracts.
        """
        self._rules = rules
        self._cast = cast
        self._simulator = simulator
        self.places: Final = Places.of(rules.passphrase)

    # The first ledger.

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        """Return the accounts of the first ledger."""
        places = self.places
        owners = [self._cast.owner.public_key, self._cast.settlement_admin.public_key, places.issuer.public_key]
        coins = {NULL_ACCOUNT: FUNDED_COINS, places.friendbot.public_key: FRIENDBOT_COINS}
        coins |= dict.fromkeys([*owners, *self._cast.funded], FUNDED_COINS)
        coins[places.root.public_key] = TOTAL_COINS - sum(coins.values())
        for address, balance in coins.items():
            account = new_account(address, balance, 1 << 32)
            if address in self._cast.trusting:
                account.num_sub_entries = xdr.Uint32(1)
            yield account_key(address), Entry(xdr.LedgerEntryData(xdr.LedgerEntryType.ACCOUNT, account=account), 1)
        usdc = places.usdc.to_xdr_object()
        for address in self._cast.trusting:
            line = new_trust_line(address, usdc, (1 << 63) - 1)
            data = xdr.LedgerEntryData(xdr.LedgerEntryType.TRUSTLINE, trust_line=line)
            yield trust_line_key(address, usdc), Entry(data, 1)

    # The contracts.

    def is_founded(self, reader: Reader) -> bool:
        """Tell whether the contracts are there and know of each other."""
        return reader.header.sequence > FOUNDING_LEDGERS

    def found(self, ledger: SandboxLedger) -> None:
        """Deploy the contracts, and close the ledgers that this takes."""
        places, owner, admin = self.places, self._cast.owner, self._cast.settlement_admin
        root = places.root
        vault, settlement, usdc = (
            scval.to_address(each) for each in (places.vault_contract, places.settlement_contract, places.usdc_contract)
        )
        caller = self._cast.authorized_caller
        none = scval.to_void()
        own, administer = scval.to_address(owner.public_key), scval.to_address(admin.public_key)
        opening = self._cast.opening
        has = scval.to_int128(opening) if opening else none
        init = [own, usdc, has, scval.to_address(caller) if caller is not None else none, none, none, none]
        minted = [scval.to_address(places.issuer.public_key), vault, scval.to_int128(opening)]
        steps: tuple[tuple[tuple[Keypair, xdr.HostFunction], ...], ...] = (
            ((root, _upload(Vault)), (root, _upload(Settlement))),
            ((root, _create_of_asset(places.usdc)), (root, _create_of_asset(Asset.native()))),
            (
                (root, _create(root, "vault", Vault)),
                (root, _create(root, "settlement", Settlement)),
                *(((places.issuer, _call(usdc, "transfer", *minted)),) if opening else ()),
            ),
            ((owner, _call(vault, "init", *init)), (admin, _call(settlement, "init", administer, vault))),
            (
                (owner, _call(vault, "set_settlement", own, settlement)),
                (admin, _call(settlement, "set_usdc_token", administer, usdc)),
            ),
        )
        assert len(steps) == FOUNDING_LEDGERS
        for step in steps:
            # One transaction a ledger is each account's: others pay, whoever acts.
            for payer, (actor, function) in zip((root, places.friendbot, places.issuer), step, strict=False):
                self._submit(ledger, payer, actor, function)
            ledger.close()

    def _submit(self, ledger: SandboxLedger, payer: Keypair, actor: Keypair, function: xdr.HostFunction) -> None:
        """Simulate, sign and submit one host function.

        Args:
            payer: whose sequence number and fee it uses.
            actor: whose operation it is.
        """
        account = find_account(ledger.state, payer.public_key)
        assert account is not None
        sequence = account.seq_num.sequence_number.int64
        plain = self._envelope(payer, sequence, InvokeHostFunction(function, source=actor.public_key), None)
        decoded = transactions.decode(plain.to_xdr(), ledger.network_id)
        assert not isinstance(decoded, Undecodable)
        simulated = self._simulator.simulate(ledger.state, ledger.context(), decoded)
        assert isinstance(simulated, Simulation), simulated
        operation = InvokeHostFunction(function, list(simulated.auth), source=actor.public_key)
        envelope = self._envelope(payer, sequence, operation, simulated.data)
        for each in {payer.public_key: payer, actor.public_key: actor}.values():
            envelope.sign(each)
        admission = ledger.submit(envelope.to_xdr())
        assert isinstance(admission, Admission)
        assert admission.status == "PENDING", admission

    def _envelope(
        self, payer: Keypair, sequence: int, operation: SdkOperation, data: xdr.SorobanTransactionData | None
    ) -> TransactionEnvelope:
        builder = TransactionBuilder(Account(payer.public_key, sequence), self._rules.passphrase, _FEE)
        builder.append_operation(operation).add_time_bounds(0, 0)
        if data is not None:
            builder.set_soroban_data(data)
        return builder.build()


def _upload(model: type[Contract]) -> xdr.HostFunction:
    return xdr.HostFunction(xdr.HostFunctionType.HOST_FUNCTION_TYPE_UPLOAD_CONTRACT_WASM, wasm=contracts.CODE[model])


def _create(root: Keypair, name: str, model: type[Contract]) -> xdr.HostFunction:
    made = xdr.CreateContractArgs(_preimage(root, name), contracts.executable_of(model))
    return xdr.HostFunction(xdr.HostFunctionType.HOST_FUNCTION_TYPE_CREATE_CONTRACT, create_contract=made)


def _create_of_asset(asset: Asset) -> xdr.HostFunction:
    preimage = xdr.ContractIDPreimage(
        xdr.ContractIDPreimageType.CONTRACT_ID_PREIMAGE_FROM_ASSET, from_asset=asset.to_xdr_object()
    )
    made = xdr.CreateContractArgs(preimage, contracts.ASSET_EXECUTABLE)
    return xdr.HostFunction(xdr.HostFunctionType.HOST_FUNCTION_TYPE_CREATE_CONTRACT, create_contract=made)


def _call(contract: xdr.SCVal, name: str, *arguments: xdr.SCVal) -> xdr.HostFunction:
    assert contract.address is not None
    called = xdr.InvokeContractArgs(contract.address, xdr.SCSymbol(name.encode()), list(arguments))
    return xdr.HostFunction(xdr.HostFunctionType.HOST_FUNCTION_TYPE_INVOKE_CONTRACT, invoke_contract=called)
