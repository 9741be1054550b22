"""Who allowed which call: authorization entries, checked against the tree of calls as it is made, or recorded from it.

An entry allows one tree: a function of a contract with exactly these arguments, and below it the calls in which the
same address is asked for again. Every node allows one call. Who is asked in a contract that an address itself called
(a contract that moves its own tokens) needs no entry.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import attrs
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey
from stellar_sdk import xdr

from callora.stellar.sandbox.accounts import find_account
from callora.stellar.sandbox.soroban.faults import HostError
from callora.stellar.sandbox.soroban.storage import TEMPORARY, Storage, data_ledger_key
from callora.stellar.sandbox.soroban.values import BYTES, Unfit, address_text, fields, sc_address
from callora.stellar.sandbox.state import account_key

SIGNATURES_MAX: Final = 20
VERIFY_INSTRUCTIONS: Final = 420_000
"""What checking one signature costs."""
_CREDENTIALS = xdr.SorobanCredentialsType
_SIGNER_ED25519: Final = xdr.SignerKeyType.SIGNER_KEY_TYPE_ED25519
_MEDIUM: Final = 2
"""Where an account's medium threshold is among its thresholds."""


@attrs.define
class Node:
    """One call that an entry allows."""

    function: bytes
    """XDR of a SorobanAuthorizedFunction."""
    below: list["Node"] = attrs.field(factory=list)
    used: bool = False

    @classmethod
    def of(cls, invocation: xdr.SorobanAuthorizedInvocation) -> "Node":
        """Return the tree of an entry."""
        return cls(invocation.function.to_xdr_bytes(), [cls.of(sub) for sub in invocation.sub_invocations])

    def to_xdr(self) -> xdr.SorobanAuthorizedInvocation:
        """Return it as entries have it."""
        function = xdr.SorobanAuthorizedFunction.from_xdr_bytes(self.function)
        return xdr.SorobanAuthorizedInvocation(function, [node.to_xdr() for node in self.below])


class Authorization(Protocol):
    """What the host asks of whoever keeps authorizations."""

    def push(self) -> None:
        """Note that a call begins."""
        ...

    def pop(self) -> None:
        """Note that the innermost call ended."""
        ...

    def require(self, address: str, function: xdr.SorobanAuthorizedFunction) -> None:
        """Require that an address allowed the innermost call.

        Args:
            address: `G…`, or a contract that is not the caller.
            function: the innermost call.

        Raises:
            HostError: it did not.
        """
        ...


class _Tree:
    """One tree, and how far down the present calls are in it."""

    def __init__(self, address: str, root: Node, depth: int) -> None:
        self.address = address
        self.root = root
        self.path: list[Node | None] = [None] * depth
        """For each call under way the node that it used."""

    @property
    def innermost(self) -> Node | None:
        """The node of the deepest call that used one."""
        return next((node for node in reversed(self.path) if node is not None), None)


class Enforced:
    """Entries as a transaction brings them."""

    def __init__(
        self,
        entries: Sequence[xdr.SorobanAuthorizationEntry],
        *,
        source: str,
        network_id: bytes,
        storage: Storage,
        charge: Callable[[int], None],
    ) -> None:
        """Make one.

        Args:
            source: the source account of the operation, whose signature is checked with the transaction.
            storage: where nonces and signers are.
            charge: takes instructions; raises where there are too few.
        """
        self._network_id = network_id
        self._storage = storage
        self._charge = charge
        self._trees: list[tuple[_Tree, xdr.SorobanAuthorizationEntry]] = []
        self._verified: set[int] = set()
        for entry in entries:
            credentials = _address_credentials(entry.credentials)
            try:
                address = source if credentials is None else address_text(credentials.address)
            except Unfit as error:
                raise HostError("Auth", "InvalidInput", str(error)) from error
            self._trees.append((_Tree(address, Node.of(entry.root_invocation), 0), entry))

    def push(self) -> None:
        """Note that a call begins."""
        for tree, _ in self._trees:
            tree.path.append(None)

    def pop(self) -> None:
        """Note that the innermost call ended."""
        for tree, _ in self._trees:
            tree.path.pop()

    def require(self, address: str, function: xdr.SorobanAuthorizedFunction) -> None:
        """Require that an address allowed the innermost call; the first use of an entry checks its credentials.

        Raises:
            HostError: it did not, or its signature, nonce or expiration is wrong.
        """
        wanted = function.to_xdr_bytes()
        active = any(tree.address == address and tree.innermost is not None for tree, _ in self._trees)
        for index, (tree, entry) in enumerate(self._trees):
            if tree.address != address or tree.path[-1] is not None:
                continue
            above = tree.innermost
            if above is None and active:
                continue
            allowed = above.below if above is not None else [tree.root]
            node = next((node for node in allowed if not node.used and node.function == wanted), None)
            if node is None:
                continue
            node.used = True
            tree.path[-1] = node
            if index not in self._verified:
                self._authenticate(entry)
                self._verified.add(index)
            return
        raise HostError("Auth", "InvalidAction", f"Unauthorized function call for address {address}")

    def _authenticate(self, entry: xdr.SorobanAuthorizationEntry) -> None:
        credentials = _address_credentials(entry.credentials)
        if credentials is None:
            return
        address = address_text(credentials.address)
        expiration = credentials.signature_expiration_ledger.uint32
        if expiration < self._storage.sequence:
            raise HostError("Auth", "InvalidInput", "signature has expired")
        if expiration > self._storage.sequence + self._storage.limits.ledgers_max - 1:
            raise HostError("Auth", "InvalidInput", "signature expiration is too late")
        preimage = _preimage(entry, credentials, self._network_id)
        payload = hashlib.sha256(preimage.to_xdr_bytes()).digest()
        if not address.startswith("G"):
            raise HostError("Auth", "InvalidAction", "failed account authentication: the contract has no __check_auth")
        self._check_signatures(address, payload, credentials.signature)
        consume_nonce(self._storage, address, credentials.nonce.int64, expiration)

    def _check_signatures(self, address: str, payload: bytes, signature: xdr.SCVal) -> None:
        signatures = _signatures(signature)
        weights, threshold = signers_of(self._storage, address)
        total, last = 0, b""
        for public_key, signed in signatures:
            self._charge(VERIFY_INSTRUCTIONS)
            if public_key <= last:
                raise HostError("Auth", "InvalidInput", "public keys are not ordered")
            last = public_key
            try:
                VerifyKey(public_key).verify(payload, signed)
            except (BadSignatureError, ValueError) as error:
                raise HostError("Auth", "InvalidAction", "failed account authentication: wrong signature") from error
            if public_key not in weights:
                raise HostError("Auth", "InvalidAction", "signature doesn't belong to account")
            total += weights[public_key]
        if total < threshold:
            raise HostError("Auth", "InvalidAction", "signature weight is lower than threshold")


class Recording:
    """Entries as they would have to be: what a simulation answers."""

    def __init__(
        self,
        *,
        source: str,
        storage: Storage,
        charge: Callable[[int], None],
        nonce: Callable[[], int],
        upgraded: bool,
        allow_below_root: bool,
    ) -> None:
        """Make one.

        Args:
            source: the source account of the operation, which signs the transaction anyway.
            storage: where nonces and signers are, so that the footprint has them.
            charge: takes instructions; raises where there are too few.
            nonce: returns a new nonce.
            upgraded: whether entries bind the address that signs (ADDRESS_V2).
            allow_below_root: whether an address may be asked for that the outermost call did not ask for.
        """
        self._source = source
        self._storage = storage
        self._charge = charge
        self._nonce = nonce
        self._upgraded = upgraded
        self._allow_below_root = allow_below_root
        self._depth = 0
        self._trees: list[tuple[_Tree, int]] = []

    def push(self) -> None:
        """Note that a call begins."""
        self._depth += 1
        for tree, _ in self._trees:
            tree.path.append(None)

    def pop(self) -> None:
        """Note that the innermost call ended."""
        self._depth -= 1
        for tree, _ in self._trees:
            tree.path.pop()

    def require(self, address: str, function: xdr.SorobanAuthorizedFunction) -> None:
        """Write down that an address is asked for.

        Raises:
            HostError: asked for twice in one call; asked for outside the outermost one where that is not allowed; or a
                contract that cannot sign.
        """
        node = Node(function.to_xdr_bytes())
        for tree, _ in self._trees:
            above = tree.innermost
            if tree.address != address or above is None:
                continue
            if tree.path[-1] is not None:
                raise HostError("Auth", "ExistingValue", "frame is already authorized")
            above.below.append(node)
            tree.path[-1] = node
            return
        if self._depth > 1 and not self._allow_below_root:
            why = "[recording authorization only] encountered authorization not tied to the root contract invocation"
            raise HostError("Auth", "InvalidAction", why)
        number = 0
        if address != self._source:
            number = self._nonce()
            self._emulate(address, number)
        tree = _Tree(address, node, self._depth)
        tree.path[-1] = node
        self._trees.append((tree, number))

    def _emulate(self, address: str, number: int) -> None:
        """Touch and pay for what checking the entry will touch and cost."""
        if not address.startswith("G"):
            raise HostError("Auth", "InvalidAction", "the contract has no __check_auth")
        signers_of(self._storage, address)
        self._charge(VERIFY_INSTRUCTIONS)
        latest = self._storage.sequence + self._storage.limits.ledgers_max - 1
        consume_nonce(self._storage, address, number, latest)

    def entries(self) -> list[xdr.SorobanAuthorizationEntry]:
        """Return what was asked for, unsigned."""
        return [self._entry(tree, number) for tree, number in self._trees]

    def _entry(self, tree: _Tree, number: int) -> xdr.SorobanAuthorizationEntry:
        if tree.address == self._source:
            credentials = xdr.SorobanCredentials(_CREDENTIALS.SOROBAN_CREDENTIALS_SOURCE_ACCOUNT)
        else:
            of_address = xdr.SorobanAddressCredentials(
                sc_address(tree.address), xdr.Int64(number), xdr.Uint32(0), xdr.SCVal(xdr.SCValType.SCV_VOID)
            )
            if self._upgraded:
                kind = _CREDENTIALS.SOROBAN_CREDENTIALS_ADDRESS_V2
                credentials = xdr.SorobanCredentials(kind, address_v2=of_address)
            else:
                kind = _CREDENTIALS.SOROBAN_CREDENTIALS_ADDRESS
                credentials = xdr.SorobanCredentials(kind, address=of_address)
        return xdr.SorobanAuthorizationEntry(credentials, tree.root.to_xdr())


def _address_credentials(credentials: xdr.SorobanCredentials) -> xdr.SorobanAddressCredentials | None:
    """Return who signs an entry, and how; None where the transaction's own signature counts.

    Raises:
        HostError: credentials with delegates, which no contract here has.
    """
    if credentials.type == _CREDENTIALS.SOROBAN_CREDENTIALS_SOURCE_ACCOUNT:
        return None
    found = credentials.address or credentials.address_v2
    if found is None:
        raise HostError("Auth", "InvalidInput", "credentials of a kind that the sandbox does not know")
    return found


def _preimage(
    entry: xdr.SorobanAuthorizationEntry, credentials: xdr.SorobanAddressCredentials, network_id: bytes
) -> xdr.HashIDPreimage:
    """Return what is hashed and signed. With ADDRESS_V2 it also has the address (CAP-71)."""
    network, nonce, expiration = xdr.Hash(network_id), credentials.nonce, credentials.signature_expiration_ledger
    if entry.credentials.type == _CREDENTIALS.SOROBAN_CREDENTIALS_ADDRESS:
        return xdr.HashIDPreimage(
            xdr.EnvelopeType.ENVELOPE_TYPE_SOROBAN_AUTHORIZATION,
            soroban_authorization=xdr.HashIDPreimageSorobanAuthorization(
                network, nonce, expiration, entry.root_invocation
            ),
        )
    return xdr.HashIDPreimage(
        xdr.EnvelopeType.ENVELOPE_TYPE_SOROBAN_AUTHORIZATION_WITH_ADDRESS,
        soroban_authorization_with_address=xdr.HashIDPreimageSorobanAuthorizationWithAddress(
            network, nonce, expiration, credentials.address, entry.root_invocation
        ),
    )


def _signatures(value: xdr.SCVal) -> list[tuple[bytes, bytes]]:
    """Return public keys and signatures, as accounts expect them.

    Raises:
        HostError: they are written otherwise, or are none or too many.
    """
    try:
        if value.vec is None:
            raise Unfit("not a vector of signatures")
        found = [fields(item) for item in value.vec.sc_vec]
        pairs = [(BYTES.decode(item["public_key"]), BYTES.decode(item["signature"])) for item in found]
    except (Unfit, KeyError) as error:
        raise HostError("Auth", "InvalidAction", f"failed account authentication: {error}") from error
    if not 0 < len(pairs) <= SIGNATURES_MAX:
        raise HostError("Auth", "InvalidAction", "failed account authentication: too many or too few signatures")
    if any(len(key) != 32 or len(signed) != 64 for key, signed in pairs):
        raise HostError("Auth", "InvalidAction", "failed account authentication: not ed25519")
    return pairs


def signers_of(storage: Storage, address: str) -> tuple[dict[bytes, int], int]:
    """Return the weights of the keys that sign for an account, and the medium threshold, which contract calls need.

    Args:
        address: `G…`.

    Raises:
        HostError: there is no such account.
    """
    storage.touch(account_key(address))
    account = find_account(storage.overlay, address)
    if account is None:
        raise HostError("Storage", "MissingValue", f"no account {address}")
    thresholds = account.thresholds.thresholds
    key = account.account_id.account_id.ed25519
    assert key is not None
    weights = {key.uint256: thresholds[0]} if thresholds[0] else {}
    for signer in account.signers:
        if signer.key.type == _SIGNER_ED25519:
            assert signer.key.ed25519 is not None
            weights[signer.key.ed25519.uint256] = signer.weight.uint32
    return weights, thresholds[_MEDIUM]


def consume_nonce(storage: Storage, address: str, number: int, expiration: int) -> None:
    """Use a nonce; it stays used until the signature could not be used again anyway.

    Args:
        expiration: the last ledger of the signature.

    Raises:
        HostError: it was used before.
    """
    nonce = xdr.SCVal(xdr.SCValType.SCV_LEDGER_KEY_NONCE, nonce_key=xdr.SCNonceKey(xdr.Int64(number)))
    key = data_ledger_key(address, nonce.to_xdr_bytes(), TEMPORARY)
    if storage.get(key) is not None:
        raise HostError("Auth", "ExistingValue", f"nonce already exists for address {address}")
    data = xdr.ContractDataEntry(
        xdr.ExtensionPoint(0), sc_address(address), nonce, TEMPORARY, xdr.SCVal(xdr.SCValType.SCV_VOID)
    )
    entry = xdr.LedgerEntryData(xdr.LedgerEntryType.CONTRACT_DATA, contract_data=data)
    storage.put(key, entry, live_ledgers=expiration - storage.sequence + 1)
