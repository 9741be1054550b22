"""The sandbox as commands run it: kept in a directory, and told to the service as its settings."""

import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final

import attrs
import trio

from callora.ledger.clock import Clock
from callora.stellar.sandbox.genesis import Cast, Places
from callora.stellar.sandbox.ledger import PASSPHRASE
from callora.stellar.sandbox.network import Sandbox, base_url
from callora.stellar.sandbox.persist import SandboxUnreadable, open_sandbox_file

DEV_CLOSE_SECONDS: Final = 1.0
"""How often a ledger closes in `callora dev`: nobody wants to wait five seconds to see a deposit."""
NOTICE: Final = (
    "This is a sandbox: a stand-in for a Stellar network, for tests and first steps. Nothing in it has a value."
)


@attrs.frozen
class SandboxFacts:
    """Where a sandbox is, and what is where in it."""

    rpc_url: str
    horizon_url: str
    friendbot_url: str
    """Asked with `?addr=G…`: makes an account with XLM."""
    faucet_url: str
    """Asked with `?addr=G…&amount=100`: test USDC for an account that has a trust line to it."""
    network_passphrase: str
    vault_contract_id: str
    settlement_contract_id: str
    usdc_contract_id: str
    usdc_issuer: str
    xlm_contract_id: str

    @classmethod
    def at(cls, base: str) -> "SandboxFacts":
        """Return the facts of a sandbox at a URL, without a slash at its end."""
        places = Places.of(PASSPHRASE)
        return cls(
            rpc_url=f"{base}/rpc",
            horizon_url=base,
            friendbot_url=f"{base}/friendbot",
            faucet_url=f"{base}/faucet",
            network_passphrase=PASSPHRASE,
            vault_contract_id=places.vault_contract,
            settlement_contract_id=places.settlement_contract,
            usdc_contract_id=places.usdc_contract,
            usdc_issuer=places.issuer.public_key,
            xlm_contract_id=places.xlm_contract,
        )

    def settings(self) -> dict[str, str]:
        """Return the settings with which a service uses it."""
        return {
            "SOROBAN_RPC_ENABLED": "true",
            "SOROBAN_RPC_URL": self.rpc_url,
            "HORIZON_ENABLED": "true",
            "HORIZON_URL": self.horizon_url,
            "STELLAR_NETWORK": "testnet",
            "STELLAR_NETWORK_PASSPHRASE": self.network_passphrase,
            "STELLAR_TESTNET_VAULT_CONTRACT_ID": self.vault_contract_id,
            "STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID": self.settlement_contract_id,
        }


@attrs.frozen
class SandboxPlan:
    """A sandbox that will run: its listener is open, so that its address is known before it does."""

    facts: SandboxFacts
    settings: dict[str, str] = attrs.field(repr=False)
    """With which a service uses it, keys and all."""
    _listener: socket.socket
    _directory: Path
    _close_seconds: float | None
    _cast: Cast = attrs.field(repr=False)

    @classmethod
    def make(
        cls,
        listener: socket.socket,
        data_dir: Path,
        close_seconds: float | None,
        keys: Mapping[str, str],
        *,
        trusting: Sequence[str] = (),
        opening: int = 0,
    ) -> "SandboxPlan":
        """Return the plan of a data directory's sandbox.

        Args:
            listener: listens already; it is closed at the end of `running`.
            close_seconds: how often a ledger closes; None for only when told to.
            keys: VAULT_OWNER_SEED, CHANNEL_SEEDS, FEE_BUMPER_SECRET_KEY and the SETTLEMENT_…_SEEDs, which get accounts
                in it.
            trusting: seeds of who can hold test USDC from the start.
            opening: what the vault contract has from the start, stroops.
        """
        host, port = listener.getsockname()[:2]
        facts = SandboxFacts.at(base_url(host, port))
        funded = [*keys["CHANNEL_SEEDS"].split(","), keys["FEE_BUMPER_SECRET_KEY"]]
        cast = Cast.of_seeds(
            keys["VAULT_OWNER_SEED"],
            keys["SETTLEMENT_CHARGING_SEED"],
            keys["SETTLEMENT_CREDITING_SEED"],
            funded,
            trusting,
            opening,
        )
        settings = {**facts.settings(), **keys}
        return cls(facts, settings, listener, data_dir / "sandbox", close_seconds, cast)

    @asynccontextmanager
    async def running(self, clock: Clock) -> AsyncIterator[None]:
        """Serve it for the length of the block.

        Raises:
            SandboxUnreadable: the directory has something else, or another process has it open.
        """
        with closing(self._listener), open_sandbox_file(self._directory, PASSPHRASE) as file:
            sandbox = Sandbox.make(clock, cast=self._cast, keeper=file)
            if not sandbox.has(self._cast):
                raise SandboxUnreadable(f"{self._directory} was made with other keys; move it away to begin a new one")
            async with trio.open_nursery() as nursery:
                await nursery.start(sandbox.serve, self._listener, self._close_seconds)
                yield
                nursery.cancel_scope.cancel()
