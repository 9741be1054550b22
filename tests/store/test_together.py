"""Questions that many ask at once."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from callora.ledger.faults import StoreUnavailable
from callora.store.together import Together


class Asked:
    """What reached the database: queries, answered when the test lets them."""

    def __init__(self, most: int = 100) -> None:
        self.queries: list[list[int]] = []
        self.gate = trio.Semaphore(0)
        self.faults: list[Exception | None] = []
        self.together = Together(self._answer, most)
        self.told: dict[int, Sequence[str] | BaseException] = {}

    async def _answer(self, questions: Sequence[int]) -> Sequence[str]:
        self.queries.append(list(questions))
        await self.gate.acquire()
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        return [f"answer {question}" for question in questions]

    async def ask(self, *questions: int) -> None:
        """Ask, and note what was told."""
        try:
            self.told[questions[0]] = await self.together.ask(*questions)
        except StoreUnavailable as fault:
            self.told[questions[0]] = fault


async def test_what_is_asked_while_a_query_is_under_way_goes_into_the_next_and_each_is_told_his_own() -> None:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked.ask, 1)
        await trio.testing.wait_all_tasks_blocked()
        for first in (10, 20, 30):
            nursery.start_soon(asked.ask, first, first + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert asked.queries == [[1]]
        asked.gate.release()
        await trio.testing.wait_all_tasks_blocked()
        assert list(asked.told) == [1]
        assert sorted(asked.queries[1]) == [10, 11, 20, 21, 30, 31]
        asked.gate.release()
    assert asked.told == {
        1: ["answer 1"],
        **{first: [f"answer {first}", f"answer {first + 1}"] for first in (10, 20, 30)},
    }


async def test_those_who_ask_at_once_are_answered_at_once_as_far_as_a_query_goes() -> None:
    asked = Asked(most=3)
    async with trio.open_nursery() as nursery:
        for number in range(7):
            nursery.start_soon(asked.ask, number)
        for _ in range(3):
            asked.gate.release()
    assert [len(each) for each in asked.queries] == [3, 3, 1]
    assert asked.told == {number: [f"answer {number}"] for number in range(7)}


async def test_a_fault_is_everybodys_of_its_query_and_nobody_elses() -> None:
    asked = Asked(most=2)
    asked.faults = [StoreUnavailable("down"), None]
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(asked.ask, number)
        asked.gate.release()
        asked.gate.release()
    assert sorted(len(each) for each in asked.queries) == [1, 2]
    faulty, sound = asked.queries
    assert all(isinstance(asked.told[number], StoreUnavailable) for number in faulty)
    assert all(asked.told[number] == [f"answer {number}"] for number in sound)


@pytest.mark.parametrize("under_way", [False, True])
async def test_who_is_cancelled_takes_nobodys_answer_with_him(under_way: bool) -> None:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        if not under_way:
            nursery.start_soon(asked.ask, 0)
            await trio.testing.wait_all_tasks_blocked()
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await asked.ask(1)

        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(asked.ask, 2)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert 1 not in asked.told
        if under_way:
            assert asked.queries == [[1], [2]], "he was not of that query"
            asked.gate.release()
            await trio.testing.wait_all_tasks_blocked()
        else:
            assert asked.queries == [[0]]
            asked.gate.release()
            await trio.testing.wait_all_tasks_blocked()
            assert asked.queries == [[0], [2]]
            asked.gate.release()
            await trio.testing.wait_all_tasks_blocked()
        assert asked.told[2] == ["answer 2"]
        nursery.start_soon(asked.ask, 3)
        asked.gate.release()
    assert asked.told[3] == ["answer 3"]


async def test_a_crash_is_everybodys_own_and_nobody_waits_for_ever() -> None:
    asked = Asked()
    asked.faults = [ValueError("a bug")] * 3
    crashes = 0

    async def one(number: int) -> None:
        nonlocal crashes
        with pytest.raises(ValueError, match="a bug"):
            await asked.together.ask(number)
        crashes += 1

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(one, number)
            asked.gate.release()
    assert crashes == 3


async def test_of_many_who_are_cancelled_one_after_another_the_last_is_told() -> None:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(5)]

        async def one(number: int) -> None:
            with scopes[number]:
                await asked.ask(number)

        nursery.start_soon(asked.ask, 100)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(asked.ask, 101)
        await trio.testing.wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        asked.gate.release()
        await trio.testing.wait_all_tasks_blocked()
        asked.gate.release()
    assert len(asked.queries) == 2
    assert asked.told == {100: ["answer 100"], 101: ["answer 101"]}
