"""Services are killed at every transition of a settlement, two at a time; in the end each developer is paid once."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from callora.ledger.settlement import TRANSITIONS
from callora.sandbox import SandboxFacts
from callora.store.bridge import Database
from tests.proof.books import books
from tests.support.chain_service import CLOSE_SECONDS, LiveClock
from tests.support.payroll import CHANNELS, CHARGER, CREDITER, OPENING, payroll
from tests.support.processes import CalloraProcess, callora
from tests.support.sandbox import served

USDC = 10_000_000
PAUSE_SECONDS = 0.02
DEVELOPERS = 3
LIVING = [(state, after) for state, all_after in TRANSITIONS.items() for after in sorted(all_after)]
UNREACHED = {("sealed", "failed"), ("charged", "failed"), ("credit_sent", "failed")}
"""Only where the network begins another history."""

# A transition that waits a second before it is made, once: where a process can be killed at it. Whether it is made all
# the same is for the database to know.
BREAKPOINT = """
CREATE TABLE breakpoints (hit boolean);
CREATE FUNCTION break_here() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM breakpoints) THEN
        PERFORM pg_sleep(1);
    END IF;
    RETURN NEW;
END $$;
"""
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"


@asynccontextmanager
async def two(environ: dict[str, str], directory: Path) -> AsyncIterator[list[CalloraProcess]]:
    """Run two services on one database."""
    async with AsyncExitStack() as stack:
        yield [stack.enter_context(callora("serve", environ=environ, log_directory=directory)) for _ in range(2)]


async def until(database: Database, sql: str, seconds: float = 90) -> None:
    """Wait until a query finds something."""
    with trio.fail_after(seconds):
        while not await database.fetch_value(sql):  # noqa: ASYNC110 - other processes do it
            await trio.sleep(PAUSE_SECONDS)


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "transition", [each for each in LIVING if each not in UNREACHED], ids=lambda each: f"{each[0]}-{each[1]}"
)
async def test_services_killed_at_a_transition_pay_each_developer_once(
    database_url: str, tmp_path: Path, transition: tuple[str, str]
) -> None:
    before, after = transition
    async with books(database_url) as database, payroll(database, clock=LiveClock()) as at:
        for _ in range(DEVELOPERS):
            await at.developer()
        await at.earn({each: 7 * USDC + number for number, each in enumerate(at.wallets)})
        await database.execute(BREAKPOINT)
        for state in {before, "sealed"} if after == "failed" else {before}:
            target = after if state == before else "charge_sent"
            await database.execute(
                f"CREATE TRIGGER break_{state} BEFORE UPDATE ON settlements FOR EACH ROW"
                f" WHEN (OLD.state = '{state}' AND NEW.state = '{target}') EXECUTE FUNCTION break_here()"
            )
        async with served(at.town, CLOSE_SECONDS) as url:
            environ = {
                **SandboxFacts.at(url).settings(),
                "DATABASE_URL": database_url,
                "PORT": "0",
                "CHANNEL_SEEDS": ",".join(each.secret for each in CHANNELS),
                "SETTLEMENT_CHARGING_SEED": CHARGER.secret,
                "SETTLEMENT_CREDITING_SEED": CREDITER.secret,
                "SETTLEMENT_INTERVAL_MS": "1000",
                "SETTLEMENT_STATUS_SYNC_INTERVAL_MS": "200",
                "DEPOSIT_LISTENER_INTERVAL_MS": "50",
            }
            async with two(environ, tmp_path) as processes:
                await until(database, WAITING)
                if after == "failed":
                    await at.pause()
                    await until(database, "SELECT count(*) FROM settlements WHERE state = 'charge_sent'")
                    await until(database, WAITING)
                for process in processes:
                    process.kill()
                    assert "Traceback" not in process.stderr, process.stderr
            if after == "failed":
                await at.pause("unpause")
            await database.execute("INSERT INTO breakpoints VALUES (true)")
            async with two(environ, tmp_path) as processes:
                await until(
                    database,
                    "SELECT (SELECT sum(sealed_gross) = sum(gross) AND count(open_settlement) = 0"
                    " FROM revenue_accounts)",
                )
                for process in processes:
                    process.signal()
                    assert await process.ended() == 0
                    assert "Traceback" not in process.stderr, process.stderr
        assert await at.paid() == await at.earned()
        assert await at.findings() == []
        charged = await database.fetch_value(
            "SELECT count(*) FROM chain_transactions WHERE state = 'succeeded' AND purpose LIKE 'charge:%'"
        )
        states = await at.states()
        assert charged == states.count("completed") == 1
        print(f"\nkilled at {before} → {after}: settlements {states}, {OPENING} at first, each developer paid once")
