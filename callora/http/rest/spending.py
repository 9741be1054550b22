"""Spending limits of keys and of vaults: seen, set and removed by a person who is logged in, never by a key."""

from typing import Any

from pydantic import Field

from callora.actors.spending import LimitSetting
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, PositiveUsdc, UsdcOut, stroops, usdc
from callora.http.rest.key_desk import KeyDesk
from callora.http.rest.key_forms import KeyPath, Network
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.vaults import NetworkQuery
from callora.ledger.clock import Clock
from callora.ledger.ids import ApiKeyId, UserId, VaultId
from callora.ledger.spending import Period
from callora.store.reads import spending as reads
from callora.store.reads.vaults import VaultReads


class KeyPeriodPath(KeyPath):
    """Which limit of which key."""

    period: Period


class PeriodPath(Form):
    """Which limit."""

    period: Period


class LimitIn(Form):
    """A limit."""

    amount: PositiveUsdc = Field(description="USDC that may be spent in the period; reaching it is allowed.")


class PeriodOut(Form):
    """What may be spent in one period that ends now, and what was."""

    limit: UsdcOut | None = Field(description="null: no limit.")
    spent: UsdcOut = Field(description="Charged or held, less what was refunded; counted with or without a limit.")
    remaining: UsdcOut | None = Field(description="null: no limit.")


class LimitsOut(Form):
    """The last 24 hours, 7, 30 and 365 days."""

    network: Network
    day: PeriodOut
    week: PeriodOut
    month: PeriodOut
    year: PeriodOut


class LimitReads:
    """Shows limits beside what was spent."""

    def __init__(self, database: reads.Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def shown(self, vault_id: VaultId, api_key_id: ApiKeyId | None, network: Network) -> LimitsOut:
        """Return every period of a key, or of its whole vault."""
        accounts = await reads.account(self._database, vault_id, api_key_id, self._clock.now())
        periods: dict[str, Any] = {each.period: _shown(each) for each in accounts}
        return LimitsOut(network=network, **periods)


def _shown(account: reads.Account) -> PeriodOut:
    return PeriodOut(
        limit=None if account.limit is None else usdc(account.limit),
        spent=usdc(account.spent),
        remaining=None if account.remaining is None else usdc(account.remaining),
    )


def spending_routes(desk: KeyDesk, vaults: VaultReads, limits: LimitReads, setting: LimitSetting) -> Routes:
    """Return the routes of spending limits."""
    routes = Routes("Spending limits")
    _key_routes(routes, desk, limits, setting)
    _vault_routes(routes, vaults, limits, setting)
    return routes


def _key_routes(routes: Routes, desk: KeyDesk, limits: LimitReads, setting: LimitSetting) -> None:
    async def shown(key_id: str, user_id: str) -> LimitsOut:
        row = await desk.row(key_id, UserId(user_id))
        return await limits.shown(VaultId(str(row["vault_id"])), ApiKeyId(key_id), row["network"])

    @routes.add(
        "GET",
        "/api/keys/{keyId}/limits",
        access=Access.USER,
        path_form=KeyPath,
        answers={200: LimitsOut},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/limits",),
    )
    async def get_key_limits(ask: Ask[KeyPath, Any, Any]) -> Answer:
        """What one of your keys may spend, and has spent."""
        return Answer(await shown(ask.path.keyId, ask.user_id))

    @routes.add(
        "PUT",
        "/api/keys/{keyId}/limits/{period}",
        access=Access.USER,
        path_form=KeyPeriodPath,
        body=LimitIn,
        answers={200: LimitsOut},
        problems=("API_KEY_NOT_FOUND", "CONFLICT"),
        aliases=("/api-keys/{keyId}/limits/{period}",),
    )
    async def set_key_limit(ask: Ask[KeyPeriodPath, Any, LimitIn]) -> Answer:
        """Set what a key may spend in a period; the next call obeys, and what was spent before counts."""
        row = await desk.living_row(ask.path.keyId, UserId(ask.user_id))
        await setting.set(
            VaultId(str(row["vault_id"])),
            ApiKeyId(ask.path.keyId),
            ask.path.period,
            stroops(ask.body.amount),
            UserId(ask.user_id),
        )
        return Answer(await shown(ask.path.keyId, ask.user_id))

    @routes.add(
        "DELETE",
        "/api/keys/{keyId}/limits/{period}",
        access=Access.USER,
        path_form=KeyPeriodPath,
        answers={200: LimitsOut},
        problems=("API_KEY_NOT_FOUND",),
        aliases=("/api-keys/{keyId}/limits/{period}",),
    )
    async def remove_key_limit(ask: Ask[KeyPeriodPath, Any, Any]) -> Answer:
        """Remove a key's limit of a period; the others stay. Repeated, it changes nothing."""
        row = await desk.row(ask.path.keyId, UserId(ask.user_id))
        await setting.remove(VaultId(str(row["vault_id"])), ApiKeyId(ask.path.keyId), ask.path.period)
        return Answer(await shown(ask.path.keyId, ask.user_id))


def _vault_routes(routes: Routes, vaults: VaultReads, limits: LimitReads, setting: LimitSetting) -> None:
    async def own(user_id: str, network: Network) -> VaultId:
        row = await vaults.vault_on(network, UserId(user_id))
        if row is None:
            raise ProblemRaised("VAULT_NOT_FOUND")
        return VaultId(str(row["vault_id"]))

    @routes.add(
        "GET",
        "/api/vault/limits",
        access=Access.USER,
        query=NetworkQuery,
        answers={200: LimitsOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def get_vault_limits(ask: Ask[Any, NetworkQuery, Any]) -> Answer:
        """What all of a vault's keys together may spend, and have spent."""
        network = ask.query.network
        return Answer(await limits.shown(await own(ask.user_id, network), None, network))

    @routes.add(
        "PUT",
        "/api/vault/limits/{period}",
        access=Access.USER,
        path_form=PeriodPath,
        query=NetworkQuery,
        body=LimitIn,
        answers={200: LimitsOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def set_vault_limit(ask: Ask[PeriodPath, NetworkQuery, LimitIn]) -> Answer:
        """Set what a vault's keys may spend together in a period; each key's own limits hold besides."""
        network = ask.query.network
        vault_id = await own(ask.user_id, network)
        await setting.set(vault_id, None, ask.path.period, stroops(ask.body.amount), UserId(ask.user_id))
        return Answer(await limits.shown(vault_id, None, network))

    @routes.add(
        "DELETE",
        "/api/vault/limits/{period}",
        access=Access.USER,
        path_form=PeriodPath,
        query=NetworkQuery,
        answers={200: LimitsOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def remove_vault_limit(ask: Ask[PeriodPath, NetworkQuery, Any]) -> Answer:
        """Remove a vault's limit of a period; the others stay. Repeated, it changes nothing."""
        network = ask.query.network
        vault_id = await own(ask.user_id, network)
        await setting.remove(vault_id, None, ask.path.period)
        return Answer(await limits.shown(vault_id, None, network))
