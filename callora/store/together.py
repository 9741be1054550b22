"""Questions that many ask at once, answered together: a query for a hundred costs little more than one for one."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import attrs
import trio

from callora.ledger.faults import CalloraFault

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@attrs.define(slots=True, eq=False)
class _Gathering(Generic[Question, Answer]):
    questions: list[Question] = attrs.field(factory=list)
    answers: Sequence[Answer] = ()
    fault: CalloraFault | None = None
    abandoned: bool = False
    """Whether who carried it out was cancelled, or crashed, and there is neither."""
    done: trio.Event = attrs.field(factory=trio.Event)


class Together(Generic[Question, Answer]):
    """One query is under way; who asks meanwhile is gathered for the next. Nobody waits for others to come."""

    def __init__(self, answer: Callable[[Sequence[Question]], Awaitable[Sequence[Answer]]], most: int) -> None:
        """Args:
        answer: returns an answer to each question, in their order.
        most: a query that has so many questions takes no more, > 0.
        """
        self._answer = answer
        self._most = most
        self._gathering: _Gathering[Question, Answer] | None = None
        self._turn = trio.Lock()

    async def ask(self, *questions: Question) -> Sequence[Answer]:
        """Return the answers, true at some moment after this was called.

        Raises:
            CalloraFault: what the query came to.

        Cancellation: nobody else's answer is lost. Who asked first carries the query out, and where he is cancelled
        the others ask again.
        """
        while True:
            gathering, first = self._gathering, 0
            if gathering is None or len(gathering.questions) >= self._most:
                gathering = self._gathering = _Gathering()
                gathering.questions += questions
                await self._carry_out(gathering)
            else:
                first = len(gathering.questions)
                gathering.questions += questions
                await gathering.done.wait()
            if gathering.fault is not None:
                raise gathering.fault
            if not gathering.abandoned:
                return gathering.answers[first : first + len(questions)]

    async def _carry_out(self, gathering: _Gathering[Question, Answer]) -> None:
        try:
            async with self._turn:
                self._close(gathering)
                gathering.answers = await self._answer(gathering.questions)
        except CalloraFault as fault:
            gathering.fault = fault
        except BaseException:
            gathering.abandoned = True
            raise
        finally:
            self._close(gathering)
            gathering.done.set()

    def _close(self, gathering: _Gathering[Question, Answer]) -> None:
        if self._gathering is gathering:
            self._gathering = None
