"""The sweep on a real PostgreSQL: it ends what is due, once, whoever placed it."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import attrs
import pytest
import trio

from callora.actors import expiry
from callora.actors.expiry import ExpirySweep
from callora.actors.registry import VaultRegistry
from callora.ledger.commands import CloseHold, ExtendHold, PlaceHold, capture
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import EventId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import HoldClosed, HoldNotOpen
from callora.store.breath import BREATH_SECONDS
from callora.store.bridge import Database, open_database
from callora.store.rounds import LINE_SETTINGS
from callora.store.usage import OpenHold
from callora.store.vaults import VaultStore
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED, METRICS, QUIET, running

TTL = 60


@attrs.frozen
class Sweeping:
    """A process that sweeps."""

    sweep: ExpirySweep
    registry: VaultRegistry

    def fails_for(self, vault_id: VaultId) -> None:
        """Let every command to this vault fail from now on."""
        send: Callable[..., object] = self.registry.send

        def broken(to: VaultId, envelope: object) -> object:
            if to == vault_id:
                envelope.reply.fail(StoreUnavailable("this vault's actor keeps failing"))  # type: ignore[attr-defined]
                return None
            return send(to, envelope)

        self.registry.send = broken  # type: ignore[method-assign,assignment]


@asynccontextmanager
async def sweeping(url: str, clock: TestClock) -> AsyncIterator[Sweeping]:
    """Run a process with its own pool, line, writer and registry, and a sweep that only the test starts."""
    async with open_database(url) as database, database.line(LINE_SETTINGS) as line:
        async with running(VaultStore(database, line, clock, Ids(clock, os.urandom).uuid7, 5)) as at:
            sweep = ExpirySweep(database, at.registry, clock, METRICS, QUIET, interval_seconds=10, commit_seconds_max=5)
            yield Sweeping(sweep, at.registry)


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger that the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened
        assert await opened.findings() == []


async def held(ledger: RealLedger, vault_id: VaultId, ttl_seconds: int = TTL) -> EventId:
    """Place a hold of 10, as a process that is no more."""
    event_id = ledger.event()
    hold = PlaceHold(event_id, Stroops(10), ttl_seconds, CHARGED)
    await ledger.store.commit_round([await ledger.share(vault_id, hold)])
    return event_id


async def state_of(ledger: RealLedger, event_id: EventId) -> str:
    """Return the state of an event."""
    row = await ledger.event_row(event_id)
    assert row is not None
    return str(row["state"])


async def test_a_sweep_ends_exactly_what_is_due(ledger: RealLedger, database_url: str) -> None:
    vault_id, other = await ledger.vault(100), await ledger.vault(100)
    due = [await held(ledger, vault_id), await held(ledger, other)]
    later = await held(ledger, vault_id, TTL + 1)
    async with sweeping(database_url, ledger.clock) as process:
        ledger.clock.advance(TTL - 1)
        assert await process.sweep.sweep() == 0
        ledger.clock.advance(1)
        assert await process.sweep.sweep() == 2
        assert [await state_of(ledger, each) for each in (*due, later)] == ["expired", "expired", "held"]
        assert await ledger.balance(vault_id) == (90, 10)
        ledger.clock.advance(1)
        assert await process.sweep.sweep() == 1
        assert await process.sweep.sweep() == 0
    assert await ledger.balance(vault_id) == (100, 0)


async def test_how_overdue_a_hold_was_when_it_was_found_is_shown(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(100)
    await held(ledger, vault_id)
    async with sweeping(database_url, ledger.clock) as process:
        for seconds, overdue in ((TTL - 1, 0), (8, 7), (1, 0)):
            ledger.clock.advance(seconds)
            await process.sweep.sweep()
            assert process.sweep._metrics.registry.get_sample_value("callora_hold_overdue_seconds") == overdue


async def test_a_process_that_starts_finds_the_holds_of_one_that_crashed(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(1000)
    events = [await held(ledger, vault_id, 86_400), await held(ledger, vault_id)]
    ledger.clock.advance(86_400)
    async with sweeping(database_url, ledger.clock) as process:
        assert await process.sweep.sweep() == 2
    assert [await state_of(ledger, each) for each in events] == ["expired"] * 2


async def test_the_first_sweep_hurries_and_later_ones_rest(
    ledger: RealLedger, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []

    async def looked(*args: object) -> list[OpenHold]:
        rests.append(cast(float, args[-1]))
        await trio.lowlevel.checkpoint()
        return []

    monkeypatch.setattr(expiry, "open_holds", looked)
    async with sweeping(database_url, ledger.clock) as process:
        for _ in range(3):
            await process.sweep.sweep()
    assert rests == [0.0, BREATH_SECONDS, BREATH_SECONDS]


async def test_an_extension_is_seen_before_its_hold_is_ended(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(100)
    event_id = await held(ledger, vault_id)
    async with sweeping(database_url, ledger.clock) as process:
        await process.sweep.sweep()
        await ledger.locked(vault_id, ExtendHold(event_id, TTL))
        ledger.clock.advance(TTL)
        assert await process.sweep.sweep() == 0
        assert await state_of(ledger, event_id) == "held"
        ledger.clock.advance(TTL)
        assert await process.sweep.sweep() == 1


async def test_an_extension_between_the_last_look_and_the_expiry_keeps_its_hold(
    ledger: RealLedger, database_url: str
) -> None:
    vault_id = await ledger.vault(100)
    event_id = await held(ledger, vault_id)
    ledger.clock.advance(TTL)
    async with sweeping(database_url, ledger.clock) as process:
        expire = process.sweep._expire

        async def extended_first(holds: object) -> int:
            await ledger.locked(vault_id, ExtendHold(event_id, TTL))
            return await expire(holds)  # type: ignore[arg-type]

        process.sweep._expire = extended_first  # type: ignore[method-assign]
        assert await process.sweep.sweep() == 0
        assert await state_of(ledger, event_id) == "held"
        process.sweep._expire = expire  # type: ignore[method-assign]
        ledger.clock.advance(TTL)
        assert await process.sweep.sweep() == 1


async def test_of_a_capture_and_an_expiry_at_once_one_counts(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(1000)
    events = [await held(ledger, vault_id) for _ in range(30)]
    ledger.clock.advance(TTL)
    answers: dict[EventId, object] = {}
    async with sweeping(database_url, ledger.clock) as process:

        async def capture_it(event_id: EventId) -> None:
            command: CloseHold = capture(event_id, Stroops(10), Stroops(10), DELIVERED)
            answers[event_id] = await process.registry.ask(vault_id, command)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.sweep.sweep)
            for event_id in events:
                nursery.start_soon(capture_it, event_id)
    for event_id in events:
        state = await state_of(ledger, event_id)
        answer = answers[event_id]
        assert isinstance(answer, HoldClosed if state == "captured" else HoldNotOpen)
        assert answer.state == state


async def test_two_processes_sweeping_at_once_end_each_hold_once(ledger: RealLedger, database_url: str) -> None:
    vault_id = await ledger.vault(1000)
    events = [await held(ledger, vault_id) for _ in range(30)]
    ledger.clock.advance(TTL)
    async with sweeping(database_url, ledger.clock) as one, sweeping(database_url, ledger.clock) as two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.sweep.sweep)
            nursery.start_soon(two.sweep.sweep)
    assert [await state_of(ledger, each) for each in events] == ["expired"] * 30
    assert await ledger.balance(vault_id) == (1000, 0)


async def test_more_holds_of_one_round_than_a_batch_are_all_found(
    ledger: RealLedger, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.actors.expiry.BATCH", 3)
    vault_id = await ledger.vault(1000)
    share = await ledger.share(vault_id, *(PlaceHold(ledger.event(), Stroops(1), TTL, CHARGED) for _ in range(10)))
    await ledger.store.commit_round([share])
    ledger.clock.advance(TTL)
    async with sweeping(database_url, ledger.clock) as process:
        with trio.fail_after(60):
            assert await process.sweep.sweep() == 10


async def test_a_vault_that_fails_does_not_keep_the_others_from_expiring(ledger: RealLedger, database_url: str) -> None:
    broken, sound = await ledger.vault(100), await ledger.vault(100)
    for vault_id in (broken, sound):
        await held(ledger, vault_id)
    ledger.clock.advance(TTL)
    async with sweeping(database_url, ledger.clock) as process:
        process.fails_for(broken)
        assert await process.sweep.sweep() == 1
        assert await ledger.balance(sound) == (100, 0)
        assert await ledger.balance(broken) == (90, 10)
    async with sweeping(database_url, ledger.clock) as process:
        assert await process.sweep.sweep() == 1


async def test_a_hold_that_becomes_visible_late_is_found_by_a_later_sweep(
    ledger: RealLedger, database_url: str
) -> None:
    vault_id = await ledger.vault(100)
    async with sweeping(database_url, ledger.clock) as process:
        born = ledger.clock.now()
        ledger.clock.advance(15)
        await process.sweep.sweep()
        ledger.clock.at, now = born, ledger.clock.at
        event_id = await held(ledger, vault_id)  # dated before the sweep, stored after it
        ledger.clock.at = now
        ledger.clock.advance(TTL)
        assert await process.sweep.sweep() == 1
    assert await state_of(ledger, event_id) == "expired"
