"""Wallets: what an address has, as far as deposits are concerned."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from callora.http.problems import ProblemRaised
from callora.http.rest.deposits import Network, require
from callora.http.rest.forms import Form, UsdcOut, usdc
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.wallets import is_address, is_contract

if TYPE_CHECKING:
    from callora.actors.treasury import Treasury


class WalletPath(Form):
    """Whose wallet."""

    address: Annotated[str, Field(pattern=r"^[GC][A-Z2-7]{55}$", description="An account's or a contract's address.")]


class WalletOut(Form):
    """What an address has."""

    address: str
    network: Network
    exists: bool
    balance_usdc: UsdcOut | None = Field(description="Null without a trustline.")
    balance_xlm: UsdcOut = Field(description="All of it, reserves included; fees are paid with it.")


def wallet_routes(treasury: "Treasury | None", network: Network) -> Routes:
    """Return the route of wallets.

    Args:
        treasury: None where the chain is not configured.
        network: the configured one.
    """
    routes = Routes("Deposits")

    @routes.add(
        "GET",
        "/api/wallets/{address}/balances",
        access=Access.USER,
        path_form=WalletPath,
        answers={200: WalletOut},
        problems=("INVALID_SOURCE_ACCOUNT", "NETWORK_UNAVAILABLE", "COMPONENT_NOT_CONFIGURED"),
    )
    async def get_wallet_balances(ask: Ask[WalletPath, Any, Any]) -> Answer:
        """What an address has on the network, to deposit and to pay fees with. It is public there."""
        address = ask.path.address
        if not is_address(address) and not is_contract(address):
            raise ProblemRaised("INVALID_SOURCE_ACCOUNT", "The address's checksum is wrong")
        found = await require(treasury).deposits.wallet(address)
        return Answer(
            WalletOut(
                address=address,
                network=network,
                exists=found.exists,
                balance_usdc=None if found.usdc is None else usdc(found.usdc),
                balance_xlm=usdc(found.xlm),
            )
        )

    return routes
