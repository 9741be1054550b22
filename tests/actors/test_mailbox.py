"""A reply is given once, waited for by one, and costs nothing when nobody waits."""

import pytest
import trio
import trio.testing

from callora.actors.mailbox import Envelope, Reply
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from tests.simulation.support import place


async def test_a_reply_may_come_before_its_waiter_or_after() -> None:
    early: Reply[int] = Reply()
    early.resolve(1)
    assert await early.wait() == 1
    late: Reply[int] = Reply()
    async with trio.open_nursery() as nursery:

        async def waits() -> None:
            assert await late.wait() == 2

        nursery.start_soon(waits)
        await trio.testing.wait_all_tasks_blocked()
        late.resolve(2)


async def test_waiting_is_a_checkpoint_even_when_the_answer_is_there() -> None:
    reply: Reply[int] = Reply()
    reply.resolve(1)
    with trio.testing.assert_checkpoints():
        await reply.wait()


async def test_a_fault_is_raised_where_the_reply_is_awaited() -> None:
    reply: Reply[int] = Reply()
    reply.fail(StoreUnavailable("down"))
    with pytest.raises(StoreUnavailable):
        await reply.wait()


def test_a_command_is_answered_once() -> None:
    reply: Reply[int] = Reply()
    reply.resolve(1)
    with pytest.raises(AssertionError):
        reply.resolve(2)
    with pytest.raises(AssertionError):
        reply.fail(StoreUnavailable("down"))


async def test_a_waiter_that_is_gone_is_not_woken() -> None:
    reply: Reply[int] = Reply()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reply.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    reply.resolve(1)
    assert reply.settled


async def test_an_envelope_left_unanswered_is_answered_as_unknown() -> None:
    envelope = Envelope(place(1, 1))
    with envelope:
        pass
    with pytest.raises(OutcomeUnknown):
        await envelope.reply.wait()


async def test_an_envelope_that_was_answered_keeps_its_answer() -> None:
    envelope = Envelope(place(1, 1))
    with envelope:
        envelope.reply.resolve("done")
    assert await envelope.reply.wait() == "done"
