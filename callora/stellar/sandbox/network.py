"""A whole sandbox: the ledger, its nodes, the contracts' machine, friendbot and faucet, and what answers for them."""

import socket
from collections.abc import Mapping
from typing import Final

import attrs
import trio

from callora.ledger.clock import Clock
from callora.stellar.sandbox.accounts import find_account
from callora.stellar.sandbox.faucet import Faucet
from callora.stellar.sandbox.faults import FaultPlan
from callora.stellar.sandbox.genesis import Cast, Places, SandboxGenesis
from callora.stellar.sandbox.ledger import Keeper, NetworkRules, SandboxLedger, SandboxNode
from callora.stellar.sandbox.rpc import Rpc
from callora.stellar.sandbox.server import SandboxHttp, serve_connections
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.machine import SorobanMachine
from callora.stellar.sandbox.soroban.simulation import Simulator

NODES: Final = ("a", "b")
"""The first one answers at `/`, every one under `/nodes/`."""


@attrs.frozen
class Sandbox:
    """A sandbox and all its parts."""

    ledger: SandboxLedger
    nodes: Mapping[str, SandboxNode]
    places: Places
    plan: FaultPlan
    http: SandboxHttp

    @classmethod
    def make(
        cls,
        clock: Clock,
        *,
        rules: NetworkRules | None = None,
        cast: Cast | None = None,
        limits: Limits | None = None,
        keeper: Keeper | None = None,
    ) -> "Sandbox":
        """Begin a sandbox, or go on with the one that was kept.

        Args:
            clock: what ledgers' times come from.
            keeper: None for one that ends with its process.
        """
        rules, limits = rules or NetworkRules(), limits or Limits()
        simulator = Simulator(limits, rules.seed)
        genesis = SandboxGenesis(rules, cast or Cast(), simulator)
        ledger = SandboxLedger(rules, clock, SorobanMachine(limits), genesis, keeper)
        nodes = {name: SandboxNode(ledger, name) for name in NODES}
        faucet = Faucet(nodes[NODES[0]], genesis.places)
        plan = FaultPlan()
        helpers = {"/friendbot": faucet.friendbot, "/faucet": faucet.usdc}
        http = SandboxHttp(ledger, nodes, Rpc(simulator).answer, helpers, plan)
        return cls(ledger, nodes, genesis.places, plan, http)

    def has(self, cast: Cast) -> bool:
        """Tell whether it was begun with these keys: each has its account."""
        addresses = (cast.owner.public_key, cast.settlement_admin.public_key, *cast.funded)
        return all(find_account(self.ledger.state, address) is not None for address in addresses)

    async def serve(
        self,
        listener: socket.socket,
        close_seconds: float | None = None,
        *,
        task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve it until cancelled.

        Args:
            listener: listens already; closed at the end.
            close_seconds: how often a ledger closes; None for only when told to.
            task_status: `started` is given the base URL.

        Cancellation: closes every connection at once.
        """
        host, port = listener.getsockname()[:2]
        self.http.base = base = base_url(host, port)
        for node in self.nodes.values():
            node.friendbot_url = f"{base}/friendbot"
        async with trio.open_nursery() as nursery:
            if close_seconds is not None:
                nursery.start_soon(self.ledger.run, close_seconds)
            await nursery.start(serve_connections, self.http, listener)
            task_status.started(base)


def base_url(host: str, port: int) -> str:
    """Return the URL of a sandbox that listens there, as seen from this machine."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - read, not bound
