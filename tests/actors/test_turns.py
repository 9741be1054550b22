"""Turns: nobody who walks through many things keeps the others waiting. Counted in things looked at, never in time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from callora.actors.catalogue import USED_BATCH, Catalogue
from callora.actors.limiter import Limiter
from callora.actors.registry import IDLE_SECONDS, SWEEP_SECONDS
from callora.actors.turns import TURN, in_turns
from callora.actors.vault import VaultActor
from callora.ledger.ids import ApiKeyId, UserId, VaultId
from callora.ledger.keys import KeyRecord
from callora.ledger.limits import SlidingLog
from callora.ledger.outcomes import HoldPlaced
from callora.metrics import Metrics
from callora.service import SystemClock
from callora.store.reads.gateway import CatalogueChange, Reads
from tests.simulation.store import Scripted, SimulatedStore, Tables
from tests.simulation.support import place, running

MANY = 3 * TURN + 1
WINDOW_SECONDS = 60.0


def key(number: int, user: int | None = None) -> KeyRecord:
    """Return a key; without a user, each key has one of its own."""
    return KeyRecord(
        api_key_id=ApiKeyId(f"key {number}"),
        user_id=UserId(f"user {number if user is None else user}"),
        vault_id=VaultId(f"vault {number}"),
        key_hash=number.to_bytes(32, "big"),
        scopes=frozenset(),
        allowed_apis=None,
        allowed_endpoints=None,
        allowed_networks=None,
        rate_limit_per_minute=1000,
        disabled=False,
        expires_at=None,
        revoked_at=None,
        standing="active",
    )


class Looks(trio.abc.Instrument):
    """Counts what is looked at in one step of a task, from one checkpoint to the next."""

    def __init__(self) -> None:
        self._now = 0
        self.longest = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Begin anew."""
        self._now = 0

    def look(self) -> None:
        """Count one more."""
        self._now += 1
        self.longest = max(self.longest, self._now)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count for the length of the block."""
        trio.lowlevel.add_instrument(self)
        yield
        trio.lowlevel.remove_instrument(self)


def limiter() -> Limiter:
    return Limiter(
        user_limit=1000,
        user_window_seconds=WINDOW_SECONDS,
        key_limit_default=1000,
        key_window_seconds=WINDOW_SECONDS,
        running_max=50,
    )


def call(limits: Limiter, record: KeyRecord) -> None:
    kept = limits.enter(record)
    assert kept is not None
    assert limits.admit(record, kept, trio.current_time()) is None
    limits.leave(kept)


def test_things_come_in_turns_as_they_were_at_first() -> None:
    things = list(range(7))
    turns: list[Sequence[int]] = []
    for turn in in_turns(things, 3):
        turns.append(turn)
        things.clear()
    assert turns == [(0, 1, 2), (3, 4, 5), (6,)]
    nothing: list[int] = []
    assert list(in_turns(nothing)) == []


async def test_the_limiters_sweep_looks_at_a_turn_of_keys_at_a_time(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, looks = limiter(), Looks()
    for number in range(MANY):
        call(limits, key(number))
    ask = SlidingLog.is_empty

    def is_empty(log: SlidingLog, now: float) -> bool:
        looks.look()
        return ask(log, now)

    monkeypatch.setattr(SlidingLog, "is_empty", is_empty)
    mock_clock.jump(WINDOW_SECONDS + 1)
    with looks.counted():
        await limits.sweep()
    assert 0 < looks.longest <= 2 * TURN, "each key's log and its user's"
    assert not limits._keys
    assert not limits._users


async def test_the_limiter_forgets_a_user_with_the_last_of_his_keys_and_not_before(mock_clock: MockClock) -> None:
    limits = limiter()
    first, second = key(1, user=9), key(2, user=9)
    call(limits, first)
    running = limits.enter(second)
    assert running is not None
    mock_clock.jump(WINDOW_SECONDS + 1)
    await limits.sweep()
    assert (set(limits._keys), set(limits._users)) == ({second.api_key_id}, {second.user_id})
    limits.leave(running)
    call(limits, first)
    assert running.user is limits._users[first.user_id], "both keys go on counting in one log"
    mock_clock.jump(WINDOW_SECONDS + 1)
    await limits.sweep()
    assert not limits._keys
    assert not limits._users


async def test_a_key_that_calls_while_the_limiter_sweeps_is_kept(mock_clock: MockClock) -> None:
    limits = limiter()
    for number in range(MANY):
        call(limits, key(number))
    mock_clock.jump(WINDOW_SECONDS + 1)
    last = key(MANY - 1)

    async def calls() -> None:
        await trio.lowlevel.checkpoint()
        call(limits, last)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(limits.sweep)
        nursery.start_soon(calls)
    assert set(limits._keys) == {last.api_key_id}


async def test_the_registrys_sweep_looks_at_a_turn_of_actors_at_a_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, looks = Tables(), Looks()
    vault_ids = [VaultId(f"{number:032x}") for number in range(MANY)]
    for vault_id in vault_ids:
        tables.add_vault(vault_id, 10)
    idle = cast("Callable[[VaultActor], bool]", VaultActor.idle.fget)  # type: ignore[attr-defined]

    def is_idle(actor: VaultActor) -> bool:
        looks.look()
        return idle(actor)

    async with running(SimulatedStore(tables, Scripted())) as at:
        for number, vault_id in enumerate(vault_ids):
            assert isinstance(await at.ask(place(number, 1), vault_id), HoldPlaced)
        monkeypatch.setattr(VaultActor, "idle", property(is_idle))
        with looks.counted():
            await trio.sleep(IDLE_SECONDS + 2 * SWEEP_SECONDS)
        assert at.registry.active == 0
    assert 0 < looks.longest <= 2 * TURN, "each actor, and again where it is retired"


@attrs.frozen
class _Changed:
    """Tells of changes, in place of the database."""

    changes: list[CatalogueChange] = attrs.field(factory=list)

    async def catalogue_version(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.changes[-1].version if self.changes else 0

    async def catalogue_changes(self, after: int) -> Sequence[CatalogueChange]:
        await trio.lowlevel.checkpoint()
        return [each for each in self.changes if each.version > after]


async def test_the_use_of_many_keys_is_noted_a_batch_at_a_time_and_each_once(autojump_clock: MockClock) -> None:
    noted: list[Sequence[ApiKeyId]] = []

    async def note(used: Sequence[ApiKeyId]) -> None:
        await trio.lowlevel.checkpoint()
        noted.append(used)

    catalogue = Catalogue(cast(Reads, _Changed()), Metrics(), structlog.get_logger(), 1, note, SystemClock())
    keys = {ApiKeyId(f"key {number}") for number in range(2 * USED_BATCH + 1)}
    catalogue._used |= keys
    await catalogue.note_used()
    await catalogue.note_used()
    assert [len(each) for each in noted] == [USED_BATCH, USED_BATCH, 1]
    assert {each for batch in noted for each in batch} == keys


async def test_looks_at_changes_do_not_wait_for_the_use_of_keys_to_be_noted(autojump_clock: MockClock) -> None:
    async def never(_: Sequence[ApiKeyId]) -> None:
        await trio.sleep_forever()

    changed = _Changed()
    catalogue = Catalogue(cast(Reads, changed), Metrics(), structlog.get_logger(), 0.25, never, SystemClock())
    catalogue._keys.found[b"kept"] = key(1)
    catalogue._used.add(key(1).api_key_id)
    async with trio.open_nursery() as nursery:
        await nursery.start(catalogue.run)
        await wait_all_tasks_blocked()
        catalogue._keys.found[b"kept"] = key(1)
        nursery.start_soon(catalogue.note_used)
        changed.changes.append(CatalogueChange(1, "key", "key 1"))
        await trio.sleep(0.5)
        assert not catalogue._keys.found
        nursery.cancel_scope.cancel()


async def test_one_walk_through_what_is_kept_drops_all_that_many_changes_name(autojump_clock: MockClock) -> None:
    async def note(_: Sequence[ApiKeyId]) -> None:
        await trio.lowlevel.checkpoint()

    changed = _Changed()
    catalogue = Catalogue(cast(Reads, changed), Metrics(), structlog.get_logger(), 1, note, SystemClock())
    await catalogue.refresh()
    records: dict[str | bytes, KeyRecord] = {bytes([number]): key(number) for number in range(6)}
    catalogue._keys.found.update(records)
    changed.changes.extend(
        [
            CatalogueChange(1, "key", "key 0"),
            CatalogueChange(2, "vault", "vault 1"),
            CatalogueChange(3, "key", "key 2"),
            CatalogueChange(4, "api", "7"),
        ]
    )
    drops = catalogue._keys._drops
    await catalogue.refresh()
    assert set(catalogue._keys.found) == {bytes([number]) for number in (3, 4, 5)}
    assert catalogue._keys._drops == drops + 1
    changed.changes.append(CatalogueChange(5, "plan", "free"))
    await catalogue.refresh()
    assert not catalogue._keys.found
