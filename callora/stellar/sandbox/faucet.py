"""What a new wallet needs: friendbot, which gives it an account with XLM, and the faucet, which gives it test USDC."""

from typing import Final

import trio
from stellar_sdk import Account, Asset, CreateAccount, Keypair, Payment, StrKey, TransactionBuilder
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.accounts import find_account, find_trust_line
from callora.stellar.sandbox.genesis import Places
from callora.stellar.sandbox.horizon import Horizon
from callora.stellar.sandbox.ledger import SandboxNode
from callora.stellar.sandbox.web import Answer, Request, problem

STARTING_XLM: Final = "10000"
USDC_DEFAULT: Final = 100
USDC_MAX: Final = 10_000
_FEE: Final = 10_000
"""Stroops: it may bid in a surge."""


class Faucet:
    """Both of them, on one node. Each has one account, so what they do in one ledger is one transaction each."""

    def __init__(self, node: SandboxNode, places: Places) -> None:
        """Make one."""
        self._node = node
        self._places = places
        self._turns = {places.friendbot.public_key: trio.Lock(), places.issuer.public_key: trio.Lock()}

    async def friendbot(self, request: Request) -> Answer:
        """Answer `/friendbot?addr=G…`: 10 000 XLM in a new account, once the ledger with it has closed."""
        address = _address_of(request)
        if address is None:
            return _refused("the parameter addr must be an account, G…")
        if find_account(self._node.reader, address) is not None:
            return _refused("account already funded to starting balance")
        create = CreateAccount(address, STARTING_XLM)
        return await self._submit(self._places.friendbot, create)

    async def usdc(self, request: Request) -> Answer:
        """Answer `/faucet?addr=G…&amount=100`: test USDC for an account that has a trust line to it."""
        address = _address_of(request)
        amount = ({**request.query, **request.form()}).get("amount", str(USDC_DEFAULT))
        if address is None:
            return _refused("the parameter addr must be an account, G…")
        if not (amount.isascii() and amount.isdigit() and len(amount) <= 5 and 1 <= int(amount) <= USDC_MAX):
            return _refused(f"the parameter amount must be a whole number of USDC from 1 to {USDC_MAX}")
        usdc = self._places.usdc
        if find_account(self._node.reader, address) is None:
            return _refused(f"there is no account {address}: ask friendbot for one first")
        if find_trust_line(self._node.reader, address, usdc.to_xdr_object()) is None:
            return _refused(f"the account has no trust line to {usdc.code}:{usdc.issuer}: add it first, by ChangeTrust")
        return await self._submit(self._places.issuer, Payment(address, Asset(usdc.code, usdc.issuer), amount))

    async def _submit(self, keypair: Keypair, operation: Operation) -> Answer:
        """Submit one operation through Horizon, and return its answer."""
        async with self._turns[keypair.public_key]:
            account = find_account(self._node.ledger.state, keypair.public_key)
            assert account is not None
            source = Account(keypair.public_key, account.seq_num.sequence_number.int64)
            builder = TransactionBuilder(source, self._node.passphrase, _FEE).append_operation(operation)
            envelope = builder.add_time_bounds(0, 0).build()
            envelope.sign(keypair)
            return await Horizon(self._node, "").submit(envelope.to_xdr())


def _address_of(request: Request) -> str | None:
    address = ({**request.query, **request.form()}).get("addr", "")
    return address if StrKey.is_valid_ed25519_public_key(address) else None


def _refused(detail: str) -> Answer:
    return problem(400, "bad_request", "Bad Request", detail)
