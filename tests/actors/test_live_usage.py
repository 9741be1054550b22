"""Live usage: what a follower is told whatever happens to him, to the others and to the database."""

from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random

import attrs
import pytest
import trio

from callora.actors import live_usage
from callora.actors.live_usage import Ended, Follower, LiveUsage, News, Placed, TooMany
from callora.ledger.faults import StoreUnavailable
from callora.ledger.ids import UserId, VaultId
from callora.ledger.outcomes import Draining
from callora.metrics import Metrics
from callora.store import feed
from callora.store.bridge import Database, Row
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import Log
from tests.store.test_feed import user_of
from tests.store.test_rollup import placed, taken


@attrs.frozen
class Desk:
    """A process's streams, in which a look is made only by the test."""

    ledger: RealLedger
    live: LiveUsage
    vault_id: VaultId
    user_id: UserId

    def follow(self, last: str | None = None, session_id: str | None = None) -> Follower:
        follower = self.live.follow(self.user_id, session_id, None, last)
        assert isinstance(follower, Follower)
        return follower

    async def call(self, times: int = 1) -> list[str]:
        """Make calls that end at once; return their ids."""
        ids = []
        for _ in range(times):
            self.ledger.clock.advance(1)  # a feed that was looked at a moment ago is left alone
            ids.append(await placed(self.ledger, self.vault_id))
            await taken(self.ledger, self.vault_id, ids[-1])
        return [str(each) for each in ids]

    async def told(self, follower: Follower, count: int) -> list[str]:
        """Return the next events that a follower is told."""
        found: list[str] = []
        while len(found) < count:
            told = await self.live.next(follower)
            assert isinstance(told, News), told
            found += told.blocks.decode().split()
        assert len(found) == count
        return found


def encoded(row: Row) -> bytes:
    return f"{row['event_id']} ".encode()


@pytest.fixture
async def desk(database: Database) -> AsyncIterator[Desk]:
    """Streams of one user at most two, with two events waiting at most."""
    clock = TestClock()
    async with real_ledger(database, clock) as ledger:
        live = LiveUsage(
            database,
            clock,
            Random(1),
            Metrics(),
            Log().logger(),
            encode=encoded,
            interval_seconds=1,
            heartbeat_seconds=20,
            kept_seconds=3600,
            streams_max=3,
            streams_per_user_max=2,
            buffer_events_max=2,
        )
        vault_id = await ledger.vault(10_000)
        yield Desk(ledger, live, vault_id, await user_of(ledger, vault_id))


async def test_who_comes_now_is_told_what_ends_from_now_on(desk: Desk) -> None:
    before = await desk.call(2)
    follower = desk.follow()
    await desk.live.look()
    assert await desk.live.next(follower) == Placed("live", before[-1])
    after = await desk.call(2)
    await desk.live.look()
    assert await desk.told(follower, 2) == after
    assert desk.live.streams == 1
    desk.live.leave(follower)
    desk.live.leave(follower)
    assert desk.live.streams == 0


async def test_what_is_too_much_for_a_queue_is_read_page_by_page_and_joined_without_a_gap(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_usage, "BATCH", 3)
    slow, quick = desk.follow(), desk.follow()
    await desk.live.look()
    first = await desk.call(7)
    while await desk.live.look():
        pass
    assert len(slow.queue) == 2, "bounded, also before it was told where it begins"
    for follower in (slow, quick):
        assert await desk.live.next(follower) == Placed("live", "0")
    assert await desk.told(quick, 7) == first
    second = await desk.call(2)
    await desk.live.look()
    assert await desk.told(quick, 2) == second
    assert await desk.told(slow, 9) == first + second
    assert {slow.state, quick.state} == {"live"}
    third = await desk.call(1)
    await desk.live.look()
    assert await desk.told(slow, 1) == await desk.told(quick, 1) == third


async def test_who_does_not_keep_up_is_let_go_and_comes_back_for_the_rest(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_usage, "LATE_SECONDS_MAX", -1.0)
    follower = desk.follow()
    await desk.live.look()
    await desk.live.next(follower)
    ids = await desk.call(5)
    await desk.live.look()
    await desk.live.recheck()
    assert await desk.told(follower, 2) == ids[:2]
    ended = await desk.live.next(follower)
    assert isinstance(ended, Ended)
    assert ended.reason == "lagged"
    desk.live.leave(follower)
    again = desk.follow(ids[1])
    await desk.live.look()
    assert await desk.live.next(again) == Placed("resumed", ids[1])
    assert await desk.told(again, 3) == ids[2:]


async def test_bounds_and_the_drain_refuse_and_whoever_never_starts_gives_his_place_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = desk.follow(), desk.follow()
    assert desk.live.follow(desk.user_id, None, None, None) == TooMany("user", 2)
    other = UserId(desk.ledger.ids.uuid7())
    assert isinstance(desk.live.follow(other, None, None, None), Follower)
    assert desk.live.follow(UserId(desk.ledger.ids.uuid7()), None, None, None) == TooMany("process", 3)
    monkeypatch.setattr(live_usage, "UNSTARTED_SECONDS_MAX", -1.0)
    first.started = True
    await desk.live.recheck()
    assert desk.live.streams == 1
    desk.live.close()
    assert desk.live.follow(desk.user_id, None, None, None) == Draining()
    ended = await desk.live.next(first)
    assert isinstance(ended, Ended)
    assert (ended.reason, 1 <= ended.retry_seconds <= 4) == ("draining", True)


async def test_who_waits_while_the_database_is_away_is_told_everything_when_it_is_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = desk.follow()
    await desk.live.look()
    await desk.live.next(follower)
    ids = await desk.call(2)
    with monkeypatch.context() as broken:

        async def lost(*_: object, **__: object) -> None:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("gone")

        broken.setattr("callora.store.reads.feed.events_after", lost)
        with pytest.raises(StoreUnavailable):
            await desk.live.look()
    await desk.live.look()
    assert await desk.told(follower, 2) == ids


async def test_nothing_is_asked_while_nobody_follows(desk: Desk) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.live.run)
        await trio.testing.wait_all_tasks_blocked()
        assert await desk.ledger.count("usage_feeds") == 0
        follower = desk.follow()
        assert await desk.live.next(follower) == Placed("live", "0")
        ids = await desk.call(1)
        assert await desk.told(follower, 1) == ids
        nursery.cancel_scope.cancel()


async def test_a_feed_that_began_anew_sends_its_followers_away(desk: Desk) -> None:
    follower = desk.follow()
    await desk.live.look()
    await desk.live.next(follower)
    ids = await desk.call(1)
    await desk.live.look()
    assert await desk.told(follower, 1) == ids
    desk.ledger.clock.advance(2 * 3600)
    await feed.begin(desk.ledger.database, [desk.user_id], desk.ledger.clock.now(), timedelta(hours=1))
    await desk.live.look()
    ended = await desk.live.next(follower)
    assert isinstance(ended, Ended)
    assert ended.reason == "restarted"
    desk.live.leave(follower)
    again = desk.follow(ids[0])
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.live.run)
        assert await desk.live.next(again) == Placed("reset", "0")
        nursery.cancel_scope.cancel()
    after = await desk.call(1)
    await desk.live.look()
    assert await desk.told(again, 1) == after
