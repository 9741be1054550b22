"""Alerts of low balances: seen, set and removed by the vault's owner."""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

from callora.actors.balance_alerts import BalanceAlerts
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, InstantOut, PositiveUsdc, UsdcOut, iso, stroops, usdc
from callora.http.rest.key_forms import Network
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.vaults import NetworkQuery
from callora.ledger.ids import UserId, VaultId
from callora.ledger.money import Stroops
from callora.store.reads import balance_alerts as reads
from callora.store.reads.vaults import VaultReads

THRESHOLD_MAX: Final = Stroops(10**13)


def _threshold(text: str) -> str:
    if stroops(text) > THRESHOLD_MAX:
        raise ValueError(f"must be at most {usdc(THRESHOLD_MAX)}")
    return text


class AlertIn(Form):
    """A threshold."""

    threshold: Annotated[PositiveUsdc, AfterValidator(_threshold)] = Field(
        description="USDC, at most 1000000; you are told when your balance falls below."
    )


class AlertOut(Form):
    """A vault's threshold."""

    network: Network
    threshold: UsdcOut | None = Field(description="null: none is set.")
    lowSince: InstantOut | None = Field(
        description="When the balance was found below; you are told once, and again after it was above."
    )


def alert_routes(alerts: BalanceAlerts, vaults: VaultReads, database: reads.Database) -> Routes:
    """Return the routes of alerts."""
    routes = Routes("Vaults")

    async def own(user_id: str, network: Network) -> VaultId:
        row = await vaults.vault_on(network, UserId(user_id))
        if row is None:
            raise ProblemRaised("VAULT_NOT_FOUND")
        return VaultId(str(row["vault_id"]))

    async def shown(vault_id: VaultId, network: Network) -> Answer:
        row = await reads.find_alert(database, vault_id)
        since = None if row is None else row["low_since"]
        return Answer(
            AlertOut(
                network=network,
                threshold=None if row is None else usdc(row["threshold"]),
                lowSince=None if since is None else iso(since),
            )
        )

    @routes.add(
        "GET",
        "/api/vault/alerts/low-balance",
        access=Access.USER,
        query=NetworkQuery,
        answers={200: AlertOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def get_balance_alert(ask: Ask[Any, NetworkQuery, Any]) -> Answer:
        """Below which balance you are told of it."""
        network = ask.query.network
        return await shown(await own(ask.user_id, network), network)

    @routes.add(
        "PUT",
        "/api/vault/alerts/low-balance",
        access=Access.USER,
        query=NetworkQuery,
        body=AlertIn,
        answers={200: AlertOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def set_balance_alert(ask: Ask[Any, NetworkQuery, AlertIn]) -> Answer:
        """Be told, by webhooks that want `low_balance_alert`, when a balance falls below this.

        A balance is what is available and held, less what is owed. One that is below already is told of at once.
        """
        network = ask.query.network
        vault_id = await own(ask.user_id, network)
        await alerts.set(vault_id, stroops(ask.body.threshold), UserId(ask.user_id))
        return await shown(vault_id, network)

    @routes.add(
        "DELETE",
        "/api/vault/alerts/low-balance",
        access=Access.USER,
        query=NetworkQuery,
        answers={200: AlertOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def remove_balance_alert(ask: Ask[Any, NetworkQuery, Any]) -> Answer:
        """Be told no more. Repeated, it changes nothing."""
        network = ask.query.network
        vault_id = await own(ask.user_id, network)
        await alerts.remove(vault_id)
        return await shown(vault_id, network)

    return routes
