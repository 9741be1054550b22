"""Budgets on a real PostgreSQL: exact whoever asks, given back when nobody waits, lost rather than exceeded."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
import trio

from callora.actors import budgets as module
from callora.actors.budgets import Budgets
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import ApiKeyId, TokenId, UserId
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import Stroops
from callora.ledger.tokens import BudgetExhausted, BudgetGone, BudgetOutcome, BudgetTaken
from callora.store import keys, tokens
from callora.store.bridge import Database, open_database
from callora.store.embedded import EmbeddedPostgres
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger
from tests.simulation.support import QUIET


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def token_of(ledger: RealLedger, budget: int | None) -> TokenId:
    """Make a vault, a key and a token."""
    vault_id = await ledger.vault(0)
    api_key_id = ApiKeyId(ledger.ids.uuid7())
    key = make_key("testnet", api_key_id.encode()[-RANDOM_BYTES:])
    assert await keys.add_key(ledger.database, api_key_id=api_key_id, vault_id=vault_id, key=key, name="k", now=NOON)
    token_id = TokenId(ledger.ids.uuid7())
    user_id = UserId(str(await ledger.database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", vault_id)))
    amount = None if budget is None else Stroops(budget)
    token = tokens.NewToken(token_id, api_key_id, ["*"], None, amount, NOON, NOON + timedelta(hours=1))
    assert await tokens.add_token(ledger.database, user_id, token) == NOON + timedelta(hours=1)
    return token_id


async def spent(database: Database, token_id: TokenId) -> int:
    value: int = await database.fetch_value("SELECT spent FROM access_tokens WHERE token_id = $1", token_id)
    return value


@asynccontextmanager
async def keeping(database: Database) -> AsyncIterator[Budgets]:
    """Run budgets for the block."""
    async with trio.open_nursery() as nursery:
        kept = Budgets(database, QUIET)
        await nursery.start(kept.run)
        yield kept
        nursery.cancel_scope.cancel()


async def test_two_processes_give_out_a_budget_once(ledger: RealLedger, database_url: str) -> None:
    token_id, other = await token_of(ledger, 200), await token_of(ledger, 50)
    outcomes: list[BudgetOutcome] = []
    async with open_database(database_url) as second, keeping(ledger.database) as here, keeping(second) as there:
        async with trio.open_nursery() as nursery:

            async def take(kept: Budgets, of: TokenId) -> None:
                outcomes.append(await kept.take(of, Stroops(10)))

            for _ in range(30):
                for kept in (here, there):
                    nursery.start_soon(take, kept, token_id)
                    nursery.start_soon(take, kept, other)
    assert sum(isinstance(each, BudgetTaken) for each in outcomes) == 25
    assert sum(isinstance(each, BudgetExhausted) for each in outcomes) == 95
    assert (await spent(ledger.database, token_id), await spent(ledger.database, other)) == (200, 50)


async def test_what_is_given_back_is_there_for_whoever_asks_next(ledger: RealLedger) -> None:
    token_id = await token_of(ledger, 10)
    async with keeping(ledger.database) as kept:
        for _ in range(5):
            assert await kept.take(token_id, Stroops(10)) == BudgetTaken(Stroops(0))
            assert await kept.take(token_id, Stroops(1)) == BudgetExhausted(Stroops(10), Stroops(0))
            kept.give_back(token_id, Stroops(10))


async def test_a_token_that_is_not_there_or_has_no_budget_gives_nothing(ledger: RealLedger) -> None:
    unbounded = await token_of(ledger, None)
    async with keeping(ledger.database) as kept:
        assert await kept.take(unbounded, Stroops(1)) == BudgetGone()
        assert await kept.take(TokenId(ledger.ids.uuid7()), Stroops(1)) == BudgetGone()


async def test_a_caller_cancelled_at_any_point_costs_no_budget(ledger: RealLedger) -> None:
    token_id = await token_of(ledger, 1000)
    taken = 0
    async with keeping(ledger.database) as kept:
        for steps in range(60):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel(after: int, scope: trio.CancelScope) -> None:
                        for _ in range(after):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(cancel, steps * 20, scope)
                    await kept.take(token_id, Stroops(10))
                    taken += 10
                    nursery.cancel_scope.cancel()
        assert await kept.take(token_id, Stroops(1000 - taken)) == BudgetTaken(Stroops(0))
    assert await spent(ledger.database, token_id) == 1000


async def test_at_the_end_what_is_to_be_given_back_is_stored_and_who_still_waits_is_answered(
    ledger: RealLedger,
) -> None:
    token_id = await token_of(ledger, 10)
    async with keeping(ledger.database) as kept:
        assert await kept.take(token_id, Stroops(10)) == BudgetTaken(Stroops(0))
        kept.give_back(token_id, Stroops(10))
    assert await spent(ledger.database, token_id) == 0


async def test_while_the_database_is_away_nothing_is_given_out_and_nothing_owed_is_forgotten(
    ledger: RealLedger, postgres_server: EmbeddedPostgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    token_id = await token_of(ledger, 10)
    name = urlsplit(database_url).path.removeprefix("/")
    async with open_database(database_url, connect_seconds=1) as mine, keeping(mine) as kept:
        assert await kept.take(token_id, Stroops(10)) == BudgetTaken(Stroops(0))
        async with open_database(postgres_server.dsn) as outside:
            await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
            await outside.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
            kept.give_back(token_id, Stroops(10))
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await kept.take(token_id, Stroops(1))
            await outside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
        assert await kept.take(token_id, Stroops(10)) == BudgetTaken(Stroops(0)), "all of it is there again"
