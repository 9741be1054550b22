"""The feed: each event that closed is in it once, in an order that never changes, whoever passes and whatever fails."""

from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random

import attrs
import pytest
import trio

from callora.ledger.commands import PlaceHold, capture
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import EventId, UserId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.rounds import CLEAN
from callora.store import feed, rollup
from callora.store.bridge import Database
from callora.store.feed import FULL, STEP_EVENTS, TRAIL, Passed
from callora.store.reads.feed import START, event_at, events_after, feeds, place_of
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED, DELIVERED
from tests.store.test_rollup import World, placed, taken

KEPT = timedelta(hours=24)


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def user_of(ledger: RealLedger, vault_id: VaultId) -> UserId:
    found = await ledger.database.fetch_value("SELECT user_id FROM vaults WHERE vault_id = $1", vault_id)
    return UserId(str(found))


@attrs.define
class Follower:
    """Someone who reads a user's feed from where he was."""

    ledger: RealLedger
    user_id: UserId
    position: int = 0
    seen: list[str] = attrs.field(factory=list)

    async def begin(self) -> None:
        await feed.begin(self.ledger.database, [self.user_id], self.ledger.clock.now(), KEPT)

    async def follow(self) -> list[str]:
        """Have passes made until nothing is left, and return what is new."""
        before = len(self.seen)
        while (await feed.advance(self.ledger.database, [self.user_id], self.ledger.clock.now())).behind:
            pass
        await self.read()
        return self.seen[before:]

    async def read(self) -> None:
        while rows := await events_after(self.ledger.database, {self.user_id: self.position}, 7):
            for row in rows:
                assert row["position"] == self.position + 1, "no gap"
                assert row["state"] != "held"
                self.position += 1
                self.seen.append(str(row["event_id"]))


async def closed_of(ledger: RealLedger, vault_id: VaultId) -> set[str]:
    sql = "SELECT event_id FROM usage_events WHERE vault_id = $1 AND state <> 'held'"
    return {str(row["event_id"]) for row in await ledger.database.fetch(sql, vault_id)}


@attrs.define
class FedWorld(World):
    """Calls at random, and followers of them who each began at some time."""

    followers: dict[VaultId, Follower] = attrs.field(factory=dict)
    before: dict[VaultId, set[str]] = attrs.field(factory=dict)
    """What had closed when its follower began."""

    async def begin(self) -> None:
        vault_id = self.random.choice(self.vaults)
        if vault_id not in self.followers:
            follower = Follower(self.ledger, await user_of(self.ledger, vault_id))
            self.before[vault_id] = await closed_of(self.ledger, vault_id)
            await follower.begin()
            self.followers[vault_id] = follower

    async def one_pass(self) -> None:
        users = [each.user_id for each in self.followers.values()]
        await feed.advance(self.ledger.database, users, self.ledger.clock.now())

    async def roll_up(self) -> None:
        await rollup.advance(self.ledger.database, self.ledger.clock.now())

    async def crash(self) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cut() -> None:
                    for _ in range(self.random.randrange(40)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cut)
                await self.one_pass()

    async def pass_at_once(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.one_pass)
            nursery.start_soon(self.close)

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        self.ledger.clock.advance(self.random.choice((0.01, 1, 9, 11, 20, 59, 200, 1000)))

    async def read(self) -> None:
        for follower in self.followers.values():
            await follower.read()

    async def all_seen(self) -> None:
        for vault_id, follower in self.followers.items():
            await follower.follow()
            assert len(set(follower.seen)) == len(follower.seen)
            closed = await closed_of(self.ledger, vault_id)
            assert closed - self.before[vault_id] <= set(follower.seen) <= closed


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_a_follower_sees_each_event_once(ledger: RealLedger, seed: int) -> None:
    random = Random(seed)
    world = FedWorld(ledger, random, [await ledger.vault(10_000) for _ in range(3)])
    steps = (
        *(world.place,) * 8,
        *(world.close,) * 7,
        *(world.wait,) * 4,
        *(world.one_pass,) * 4,
        world.begin,
        world.roll_up,
        world.crash,
        world.pass_at_once,
        world.read,
        world.all_seen,
    )
    for _ in range(150):
        await random.choice(steps)()
    await world.all_seen()
    while world.open:
        await world.close()
    await world.all_seen()
    mine = tuple(str(each) for each in world.followers)
    assert await ledger.count("usage_feed_open", f"vault_id::text = ANY ('{{{','.join(mine)}}}')") == 0


async def begun(ledger: RealLedger) -> tuple[VaultId, Follower]:
    vault_id = await ledger.vault(1000)
    follower = Follower(ledger, await user_of(ledger, vault_id))
    await follower.begin()
    await follower.follow()
    return vault_id, follower


async def test_a_hold_that_was_open_before_the_feed_began_is_in_it_when_it_closes(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1000)
    old = await placed(ledger, vault_id, ttl_seconds=86_400)
    ledger.clock.advance(3600)
    await rollup.advance(ledger.database, ledger.clock.now())
    older_than_the_rollup = await placed(ledger, vault_id, ttl_seconds=86_400)
    ledger.clock.advance(TRAIL.total_seconds() + 1)
    young = await placed(ledger, vault_id, ttl_seconds=86_400)
    follower = Follower(ledger, await user_of(ledger, vault_id))
    await follower.begin()
    assert await follower.follow() == []
    ledger.clock.advance(1)
    for event_id in (old, older_than_the_rollup, young):
        await taken(ledger, vault_id, event_id)
        assert await follower.follow() == [event_id]


async def test_a_feed_is_one_users_over_all_of_his_vaults(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    other = VaultId(ledger.ids.uuid7())
    await ledger.database.execute(
        "INSERT INTO vaults (vault_id, user_id, network, available) VALUES ($1, $2, 'mainnet', 0)",
        other,
        follower.user_id,
    )
    strangers = await ledger.vault(100)
    first = await placed(ledger, vault_id)
    await taken(ledger, vault_id, first)
    await taken(ledger, strangers, await placed(ledger, strangers))
    free = ledger.event()
    hold = PlaceHold(free, Stroops(0), 60, CHARGED)
    assert await ledger.store.commit_round([await ledger.share(other, hold)]) == CLEAN
    ledger.clock.advance(0.001)
    close = capture(free, Stroops(0), Stroops(0), DELIVERED)
    assert await ledger.store.commit_round([await ledger.share(other, close)]) == CLEAN
    assert await follower.follow() == [first, free]


async def test_of_an_old_id_that_is_noted_before_it_is_placed_nothing_is_missed(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    old, young = ledger.event(), ledger.event()
    ledger.clock.advance(50_000)
    await follower.follow()
    await feed.note_late(ledger.database, vault_id, old, ledger.clock.now())
    await feed.note_late(ledger.database, vault_id, old, ledger.clock.now())
    assert await follower.follow() == []
    hold = PlaceHold(old, Stroops(10), 60, CHARGED)
    assert await ledger.store.commit_round([await ledger.share(vault_id, hold)]) == CLEAN
    assert await follower.follow() == []
    await taken(ledger, vault_id, old)
    assert await follower.follow() == [old]
    await feed.note_late(ledger.database, vault_id, old, ledger.clock.now())
    assert await follower.follow() == []
    young = ledger.event()
    await feed.note_late(ledger.database, vault_id, young, ledger.clock.now())
    assert await ledger.count("usage_feed_open") == 0, "a young id needs no note"


async def test_a_commit_that_takes_minutes_is_not_left_behind(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    event_id = ledger.event()
    done = "SELECT done_until FROM usage_feeds"
    async with ledger.database.transaction() as slow:
        await slow.execute(
            "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
            " created_at, expires_at, price_version, state, amount, closed_at) VALUES ($1, $2, $1, $1, 1, 1, 0, $3,"
            " $3::timestamptz + interval '1 minute', 1, 'captured', 0, $3)",
            vault_id,
            event_id,
            ledger.clock.now(),
        )
        for _ in range(2):
            ledger.clock.advance(500)
            before = await ledger.database.fetch_value(done)
            made = await feed.advance(ledger.database, [follower.user_id], ledger.clock.now(), slow_seconds=0)
            assert made == Passed(1, 0, behind=False)
            assert await ledger.database.fetch_value(done) == before
    assert await follower.follow() == [event_id]
    assert await ledger.database.fetch_value(done) == ledger.clock.now() - TRAIL


async def test_two_processes_share_the_work_and_neither_waits(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    async with ledger.database.transaction() as other:
        await other.fetch("SELECT * FROM usage_feeds FOR UPDATE")
        assert await feed.advance(ledger.database, [follower.user_id], ledger.clock.now()) == Passed(0, 0, behind=False)
    assert await feed.advance(ledger.database, [follower.user_id], ledger.clock.now()) == Passed(1, 1, behind=False)
    just_now = timedelta(seconds=0.5)
    made = await feed.advance(ledger.database, [follower.user_id], ledger.clock.now(), fresh=just_now)
    assert made == Passed(0, 0, behind=False)
    ledger.clock.advance(1)
    made = await feed.advance(ledger.database, [follower.user_id], ledger.clock.now(), fresh=just_now)
    assert made == Passed(1, 0, behind=False)


async def test_a_feed_that_nobody_listened_to_for_hours_is_caught_up_in_steps(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    ids: list[str] = []
    for _ in range(10):
        ledger.clock.advance(1000)
        ids += [ledger.event() for _ in range(STEP_EVENTS // 8)]
    await ledger.database.execute(
        "INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount,"
        " created_at, expires_at, price_version, state, amount, closed_at)"
        " SELECT $1, e, $1, $1, 1, 1, 0, $3, $3::timestamptz + interval '1 minute', 1, 'captured', 0, $3"
        " FROM unnest($2::uuid[]) AS e",
        vault_id,
        ids,
        ledger.clock.now(),
    )
    ledger.clock.advance(3600)
    first = await feed.advance(ledger.database, [follower.user_id], ledger.clock.now())
    assert first.behind
    assert 0 < first.events <= STEP_EVENTS
    assert set(await follower.follow()) == set(ids)
    state = (await feeds(ledger.database, [follower.user_id]))[follower.user_id]
    assert state.as_of == ledger.clock.now()


async def test_a_place_in_the_feed_is_an_event_and_holds_for_as_long_as_events_are_kept(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    user_id = follower.user_id
    assert await event_at(ledger.database, user_id, 0) is None
    assert await place_of(ledger.database, user_id, START) == 0
    ids = []
    for _ in range(3):
        ids.append(await placed(ledger, vault_id))
        await taken(ledger, vault_id, ids[-1])
        ledger.clock.advance(1)
    await follower.follow()
    assert [await place_of(ledger.database, user_id, each) for each in (START, *ids)] == [0, 1, 2, 3]
    assert await event_at(ledger.database, user_id, 2) == ids[1]
    for unknown in ("", "1", "nonsense", vault_id, ids[0].replace("-", "")[:-1] + "g"):
        assert await place_of(ledger.database, user_id, unknown) is None
    stranger = await begun(ledger)
    assert await place_of(ledger.database, stranger[1].user_id, ids[0]) is None
    ledger.clock.advance((KEPT + TRAIL).total_seconds() + 1)
    await follower.follow()
    await feed.forget(ledger.database, ledger.clock.now(), KEPT)
    assert [await place_of(ledger.database, user_id, each) for each in (START, *ids)] == [None, None, None, 3]


async def test_a_feed_that_was_left_alone_too_long_begins_anew(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    early = await placed(ledger, vault_id, ttl_seconds=86_400)
    missed = await placed(ledger, vault_id)
    await follower.follow()
    await taken(ledger, vault_id, early)
    assert await follower.follow() == [early]
    await taken(ledger, vault_id, missed)
    ledger.clock.advance((KEPT + TRAIL + FULL).total_seconds())
    await follower.begin()
    assert await place_of(ledger.database, follower.user_id, early) is None, "whoever knows it is told so"
    assert await place_of(ledger.database, follower.user_id, START) == 2, "nothing is missing from here on"
    follower.position = 2
    assert await follower.follow() == []
    new = await placed(ledger, vault_id)
    await taken(ledger, vault_id, new)
    assert await follower.follow() == [new]
    assert await place_of(ledger.database, follower.user_id, START) == 2
    assert await event_at(ledger.database, follower.user_id, 2) is None
    assert await place_of(ledger.database, follower.user_id, new) == 3


async def test_no_event_has_two_positions_and_no_position_changes(ledger: RealLedger) -> None:
    vault_id, follower = await begun(ledger)
    await taken(ledger, vault_id, await placed(ledger, vault_id))
    await follower.follow()
    with pytest.raises(StoreRefused):
        await ledger.database.execute("UPDATE usage_feed SET position = 9")
    with pytest.raises(StoreRefused):
        await ledger.database.execute(
            "INSERT INTO usage_feed SELECT user_id, 2, vault_id, event_id, fed_at FROM usage_feed"
        )


async def test_what_is_noted_as_open_and_never_placed_is_forgotten(ledger: RealLedger) -> None:
    vault_id, _ = await begun(ledger)
    never, held = ledger.event(), await placed(ledger, vault_id, ttl_seconds=86_400)
    ledger.clock.advance(3600)
    for event_id in (never, EventId(held)):
        await feed.note_late(ledger.database, vault_id, event_id, ledger.clock.now())
    ledger.clock.advance(feed.OPEN_KEPT.total_seconds() + 1)
    await feed.forget(ledger.database, ledger.clock.now(), KEPT)
    assert await ledger.count("usage_feed_open", f"event_id = '{held}'") == 1
    assert await ledger.count("usage_feed_open") == 1
