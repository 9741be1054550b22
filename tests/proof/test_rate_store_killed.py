"""The store of shared rate limits is killed, or hangs, at random moments under load: callers get what is configured."""

import random
import time
from collections import Counter

import pytest
import trio

from callora.store.pace import ANSWER_SECONDS, HUNG_SECONDS, PAUSE_SECONDS_MAX
from tests.proof.books import assert_audit_clean
from tests.support.processes import Answer, Caller
from tests.support.service import RunningService, running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.valkey import Valkey

CALLERS = 8
SLACK_SECONDS = 0.4
"""What a busy machine may add to any wait."""
BACK_SECONDS_MAX = HUNG_SECONDS + PAUSE_SECONDS_MAX + SLACK_SECONDS


def undecided(service: RunningService, mode: str) -> float:
    """Return how many calls the store did not decide."""
    registry = service.context.metrics.registry
    name = "callora_rate_limit_undecided_total"
    return sum(
        registry.get_sample_value(name, {"mode": mode, "why": why}) or 0.0
        for why in ("unreachable", "timeout", "refused")
    )


@pytest.mark.parametrize("outages", [3, pytest.param(40, marks=pytest.mark.proof)])
@pytest.mark.parametrize("mode", ["closed", "open"])
async def test_an_outage_costs_callers_what_is_configured_and_no_time(
    database_url: str, valkey: Valkey, mode: str, outages: int
) -> None:
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = random.Random(seed)
    answers: list[Answer] = []
    spells: list[tuple[float, float]] = []
    back: list[float] = []
    stopping = False
    settings = {"REDIS_URL": valkey.url, "RATE_LIMIT_ON_FAILURE": mode}
    async with running_service(database_url, settings) as service, raw_upstream(respond()) as upstream:
        await service.api("echo", upstream.url)
        consumer = await service.consumer("1000")

        async def load() -> None:
            async with Caller(service.port, consumer.api_key) as caller:
                while not stopping:
                    answers.append(await caller.call("/v1/call/echo/x"))
                    await trio.sleep(moments.uniform(0, 0.02))

        async def decided_again() -> float:
            """Return when the store had decided on a call."""
            while True:
                before = undecided(service, mode)
                async with Caller(service.port, consumer.api_key) as caller:
                    answer = await caller.call("/v1/call/echo/x")
                answers.append(answer)
                if answer.status == 200 and undecided(service, mode) == before:
                    return answer.ended

        async with trio.open_nursery() as nursery:
            for _ in range(CALLERS):
                nursery.start_soon(load)
            for number in range(outages):
                await trio.sleep(moments.uniform(0.05, 0.3))
                if number % 3 == 2:
                    valkey.hang()
                    down = time.monotonic()
                    await trio.sleep(moments.uniform(0.2, 2 * HUNG_SECONDS))
                    up = time.monotonic()
                    valkey.go_on()
                else:
                    valkey.kill()
                    down = time.monotonic()
                    await trio.sleep(moments.uniform(0.2, HUNG_SECONDS))
                    up = time.monotonic()
                    valkey.start()
                spells.append((down, up))
                back.append(await decided_again() - up)
            stopping = True
        counted = undecided(service, mode)
        await service.until_no_hold(consumer)
        await assert_audit_clean(service.database)
        served = sum(answer.status == 200 for answer in answers)
        assert await service.balance(consumer) == (10_000_000_000 - served * 100_000, 0)
    assert service.exit_code == 0
    assert all(answer.whole for answer in answers)
    statuses = Counter(answer.status for answer in answers)
    without = [
        answer
        for down, up in spells
        for answer in answers
        if answer.began > down + ANSWER_SECONDS + SLACK_SECONDS and answer.ended < up
    ]
    if mode == "closed":
        assert statuses.keys() == {200, 503}
        assert all(answer.status == 503 for answer in without)
        assert counted == statuses[503]
    else:
        assert statuses.keys() == {200}
        assert counted > 0
    slowest = max(answer.ended - answer.began for answer in answers)
    if outages >= 40:  # told by the long run, on a machine that does nothing else
        assert slowest < ANSWER_SECONDS + SLACK_SECONDS
        assert max(back) < BACK_SECONDS_MAX
    print(f"{mode}: {dict(statuses)}, undecided {counted:.0f}, slowest {slowest:.3f} s, back after {max(back):.3f} s")
