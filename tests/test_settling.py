"""`callora settle` where no service runs, and what `callora doctor` asks of the contracts; on a sandbox on a socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from callora.chain_part import examine
from callora.config.loading import load_settings
from callora.config.settings import Settings
from callora.ledger.faults import ChainMismatch
from callora.logs import Logs
from callora.sandbox import SandboxFacts
from callora.service import Budget, Context, SystemClock, chain_desk, open_ledger
from callora.settling import settle_now
from callora.store.bridge import Database
from tests.support.chain_service import CLOSE_SECONDS, LiveClock
from tests.support.payroll import CHANNELS, CHARGER, CREDITER, PLATFORM, Payroll, payroll
from tests.support.sandbox import served

USDC = 10_000_000


@asynccontextmanager
async def place(database: Database, **changes: str) -> AsyncIterator[tuple[Payroll, Settings]]:
    """Serve a sandbox, and give the settings of a process that settles on it."""
    async with payroll(database, clock=LiveClock()) as at, served(at.town, CLOSE_SECONDS) as url:
        environ = {
            **SandboxFacts.at(url).settings(),
            "CHANNEL_SEEDS": ",".join(each.secret for each in CHANNELS),
            "SETTLEMENT_CHARGING_SEED": CHARGER.secret,
            "SETTLEMENT_CREDITING_SEED": CREDITER.secret,
            **changes,
        }
        yield at, load_settings(environ)


async def test_where_no_service_settles_the_command_does_it_and_waits_for_the_end(
    database: Database, database_url: str
) -> None:
    async with place(database) as (at, settings):
        earned = {await at.developer(): 7 * USDC, await at.developer(): 8 * USDC}
        await at.earn(earned)
        with Logs(SystemClock()) as logs:
            settled = await settle_now(Context.make(settings, logs, SystemClock()), database_url, 60)
        assert settled.ended
        assert sorted((each.developer_id, each.amount, each.state) for each in settled.payments) == sorted(
            (developer, amount, "completed") for developer, amount in earned.items()
        )
        assert all(each.tx_hash for each in settled.payments)
        assert await at.paid() == earned
        assert await at.findings() == []


async def test_without_keys_and_without_a_service_the_command_says_what_is_missing(
    database: Database, database_url: str
) -> None:
    with Logs(SystemClock()) as logs:
        context = Context.make(load_settings({}), logs, SystemClock())
        with pytest.raises(ChainMismatch, match="SETTLEMENT_CHARGING_SEED"):
            await settle_now(context, database_url, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"SETTLEMENT_CHARGING_SEED": PLATFORM.secret}, "SETTLEMENT_CHARGING_SEED is the key of"),
        ({"SETTLEMENT_CREDITING_SEED": PLATFORM.secret}, "SETTLEMENT_CREDITING_SEED is the key of"),
    ],
)
async def test_doctor_asks_the_contracts_whether_they_know_the_keys_and_shows_none(
    database: Database, database_url: str, changes: dict[str, str], said: str | None
) -> None:
    async with place(database, **changes) as (_, settings):
        with Logs(SystemClock()) as logs:
            context = Context.make(settings, logs, SystemClock())
            async with open_ledger(context, database_url, Budget(1)) as ledger:
                found, refused = "", ""
                with trio.fail_after(60):
                    try:
                        found = await examine(chain_desk(context, ledger))
                    except ChainMismatch as mismatch:
                        refused = str(mismatch)
    assert ("know the keys" in found) == (said is None)
    assert (said or "") in refused
    assert not any(seed in found + refused for seed in (CHARGER.secret, CREDITER.secret, PLATFORM.secret))
