"""Idempotency keys over REST: one intent, one answer, for who asked alone, and no crash that locks a key."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import httpx
import pytest
import structlog
import trio

from callora.actors.intents import ABANDONED_SECONDS, Begun, InProgress, Intents, KeptAnswer, Mismatch
from callora.ledger.commands import Grant
from callora.ledger.ids import Ids
from callora.ledger.money import parse_usdc
from callora.store.bridge import Database, open_database
from tests.simulation.ledgers import TestClock
from tests.support.client import RawClient, request_bytes
from tests.support.knife import Knife
from tests.support.rest import ADMIN_KEY, Person, Told, rest_client
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, Shop, shop, together

PATH = "/api/billing/deduct"
DAY = 86_400.0
SAME, OTHER = bytes(32), bytes(range(32))
ANSWER = KeptAnswer(201, {"Location": "/x"}, b'{"ok":true}')


def keyed(key: str) -> Mapping[str, str]:
    return {"Idempotency-Key": key}


# --- over HTTP ----------------------------------------------------------------------------------------------------


async def test_a_repetition_gets_the_first_answer_and_does_nothing(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        first = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
        assert (first.status, "Idempotent-Replayed" in first.headers) == (200, False)
        # The order of a body's fields makes no other intent.
        turned = dict(reversed(at.body("r").items()))
        again = await someone.ask("POST", PATH, turned, headers=keyed("k"))
        assert (again.status, again.headers["Idempotent-Replayed"], again.body) == (200, "true", first.body)
        assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
        assert again.headers["Content-Type"] == first.headers["Content-Type"]
        assert len(await at.service.events(consumer)) == 1


async def test_the_same_key_for_another_request_is_refused(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        assert (await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))).status == 200
        for path, body in (
            (PATH, at.body("r", "0.02")),
            (PATH, at.body("s")),
            (f"{PATH}/bulk", {"items": [at.body("r")]}),
        ):
            told = await someone.ask("POST", path, body, headers=keyed("k"))
            assert (told.status, told.code) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        assert len(await at.service.events(consumer)) == 1


async def test_defect_34_a_key_belongs_to_who_sent_it(database_url: str) -> None:
    async with shop(database_url) as at:
        _, one = await at.payer("1")
        _, two = await at.payer("5")
        body = at.body("r")
        first = await one.ask("POST", PATH, body, headers=keyed("k"))
        second = await two.ask("POST", PATH, body, headers=keyed("k"))
        assert "Idempotent-Replayed" not in second.headers
        assert (first.body["balance_usdc"], second.body["balance_usdc"]) == ("0.9900000", "4.9900000")
        assert first.body["usageEventId"] != second.body["usageEventId"]
        other = await two.ask("POST", PATH, at.body("other"), headers=keyed("k"))
        assert other.code == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
        # Nor does the gateway's key of the same name, whose scope is the vault.
        actors = await at.service.database.fetch("SELECT actor FROM rest_idempotency ORDER BY actor")
        assert [row["actor"] for row in actors] == sorted((f"user:{one.user_id}", f"user:{two.user_id}"))


async def test_a_refusal_is_decided_anew_under_its_key(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("0")
        for _ in range(2):
            told = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
            assert (told.status, told.code) == (402, "INSUFFICIENT_BALANCE")
        await at.service.ledger.registry.ask(consumer.vault_id, Grant(parse_usdc("1"), "g"))
        assert (await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))).status == 200
        # What was not even valid never took the key.
        assert (await someone.ask("POST", PATH, at.body("s", "0"), headers=keyed("k-2"))).status == 400
        assert (await someone.ask("POST", PATH, at.body("s"), headers=keyed("k-2"))).status == 200


async def test_a_key_is_one_of_1_to_255_visible_characters_in_the_header_or_the_body(database_url: str) -> None:
    async with shop(database_url) as at:
        _, someone = await at.payer("1")
        for key in ("", "a b", "x" * 256, "ä"):
            headers = httpx.Headers({**someone.headers, "Idempotency-Key": key}, encoding="utf-8")
            response = await at.client.post(PATH, json=at.body("r"), headers=headers)
            assert (response.status_code, response.json()["code"]) == (400, "INVALID_IDEMPOTENCY_KEY"), key
        told = await someone.ask("POST", PATH, at.body("r", idempotencyKey="b"), headers=keyed("a"))
        assert told.code == "INVALID_IDEMPOTENCY_KEY"
        two = [*someone.headers.items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        response = await at.client.post(PATH, json=at.body("r"), headers=two)
        assert response.json()["code"] == "INVALID_IDEMPOTENCY_KEY"
        assert (await someone.ask("POST", PATH, at.body("r", idempotencyKey="x" * 255))).status == 200
        told = await someone.ask("POST", PATH, at.body("r"), headers=keyed("x" * 255))
        assert told.headers["Idempotent-Replayed"] == "true"
        assert (await someone.ask("POST", PATH, at.body("r", idempotencyKey=7))).wrong == ["body.idempotencyKey"]


async def test_defect_41_fifty_at_once_under_one_key_at_two_processes_are_one_intent(database_url: str) -> None:
    async with shop(database_url) as at, running_service(database_url, UNLIMITED) as other, rest_client(other) as there:
        consumer, someone = await at.payer("1")
        people = (someone, Person(there, someone.headers))

        async def ask(number: int) -> Told:
            return await people[number % 2].ask("POST", PATH, at.body("r"), headers=keyed("k"))

        told = await together(50, ask)
        counts = Counter((each.status, each.body.get("code")) for each in told)
        assert set(counts) <= {(200, None), (409, "IDEMPOTENCY_IN_PROGRESS")}, counts
        assert counts[200, None] >= 1
        assert all(each.headers["Retry-After"] == "1" for each in told if each.status == 409)
        bodies = [each.body for each in told if each.status == 200]
        assert all(body == bodies[0] for body in bodies)
        assert sum("Idempotent-Replayed" not in each.headers for each in told if each.status == 200) == 1
        assert (await ask(0)).body == (await ask(1)).body == bodies[0]
        assert len(await at.service.events(consumer)) == 1


async def test_defect_41_a_crash_between_start_and_end_does_not_lock_the_key_for_a_day(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        done = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
        assert done.status == 200
        # As a process leaves it that dies after the charge and before the answer is kept
        await at.service.database.execute("UPDATE rest_idempotency SET status = NULL, headers = NULL, body = NULL")
        told = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
        assert (told.status, told.code) == (409, "IDEMPOTENCY_IN_PROGRESS")
        await age(at, ABANDONED_SECONDS)
        told = await someone.ask("POST", PATH, at.body("other"), headers=keyed("k"))
        assert told.code == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
        told = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
        assert (told.status, told.body) == (200, {**done.body, "alreadyProcessed": True})
        again = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
        assert (again.headers["Idempotent-Replayed"], again.body) == ("true", told.body)
        assert len(await at.service.events(consumer)) == 1


async def test_who_left_before_the_answer_finds_his_key_free_and_one_charge(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        headers = [*someone.headers.items(), ("Idempotency-Key", "k"), ("Content-Type", "application/json")]
        request = request_bytes("POST", PATH, headers, json.dumps(at.body("r")).encode())
        for number in range(20):
            async with RawClient.connect("127.0.0.1", at.service.port) as client:
                await client.send(request)
                await trio.sleep(0.0005 * number)  # and leave
        with trio.fail_after(60):
            while True:
                told = await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))
                if told.status == 200:
                    break
                assert told.code == "IDEMPOTENCY_IN_PROGRESS"
        assert len(await at.service.events(consumer)) == 1


async def test_an_operators_key_is_his_own(database_url: str) -> None:
    async with shop(database_url) as at:
        _, someone = await at.payer("1")
        body = {"userId": someone.user_id, "network": "testnet", "amountUsdc": "1", "reason": "r"}
        told = await at.admin.ask("POST", "/api/admin/billing/credits/grant", body, headers=keyed("k"))
        assert told.status == 200
        row = await at.service.database.fetch_row("SELECT actor, body FROM rest_idempotency")
        assert row is not None and row["actor"] == "admin-key"
        assert ADMIN_KEY.encode() not in row["body"]
        # A person's key of the same name is another.
        assert (await someone.ask("POST", PATH, at.body("r"), headers=keyed("k"))).body["balance_usdc"] == "1.9900000"


async def age(at: Shop, seconds: float) -> None:
    """Make every intent older."""
    await at.service.database.execute(
        "UPDATE rest_idempotency SET created_at = created_at - $1 * interval '1 second'", seconds
    )


# --- the piece itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


@pytest.fixture
def intents(database: Database, clock: TestClock) -> Intents:
    return made(database, clock)


def made(database: Database, clock: TestClock) -> Intents:
    return Intents(database, clock, Ids(clock, os.urandom), structlog.get_logger(), retention_seconds=DAY)


async def begun(intents: Intents, actor: str = "a", key: str = "k") -> Begun:
    """Return an intent that must be this attempt's."""
    found = await intents.begin(actor, key, SAME)
    assert isinstance(found, Begun)
    return found


async def test_an_intent_is_begun_once_and_answered_the_same_until_it_is_forgotten(
    intents: Intents, clock: TestClock, database: Database
) -> None:
    first = await begun(intents)
    assert await intents.begin("a", "k", SAME) == InProgress()
    assert await intents.begin("a", "k", OTHER) == Mismatch()
    await begun(intents, actor="b")
    await begun(intents, key="l")
    await intents.keep(first, ANSWER)
    assert await intents.begin("a", "k", SAME) == ANSWER
    assert await intents.begin("a", "k", OTHER) == Mismatch()
    clock.advance(DAY - 1)
    await intents.drop_expired()
    assert await intents.begin("a", "k", SAME) == ANSWER
    clock.advance(1)
    # Past its retention the key is free, swept or not.
    assert isinstance(await intents.begin("a", "k", OTHER), Begun)
    await intents.drop_expired()
    assert await database.fetch_value("SELECT count(*) FROM rest_idempotency") == 1


async def test_an_attempt_that_came_to_nothing_frees_the_key_for_any_request(intents: Intents) -> None:
    await intents.forget(await begun(intents))
    assert isinstance(await intents.begin("a", "k", OTHER), Begun)


async def test_who_was_taken_over_from_neither_answers_nor_frees(intents: Intents, clock: TestClock) -> None:
    dead = await begun(intents)
    clock.advance(ABANDONED_SECONDS - 1)
    assert await intents.begin("a", "k", SAME) == InProgress()
    clock.advance(1)
    assert await intents.begin("a", "k", OTHER) == Mismatch()
    heir = await begun(intents)
    assert await intents.begin("a", "k", SAME) == InProgress()
    await intents.keep(dead, KeptAnswer(500, {}, b"late"))
    await intents.forget(dead)
    assert await intents.begin("a", "k", SAME) == InProgress()
    await intents.keep(heir, ANSWER)
    await intents.keep(dead, KeptAnswer(500, {}, b"later still"))
    await intents.forget(dead)
    assert await intents.begin("a", "k", SAME) == ANSWER


async def test_defect_41_of_many_that_begin_or_take_over_at_once_one_does(
    database_url: str, database: Database, clock: TestClock
) -> None:
    async with open_database(database_url) as other:
        both = (made(database, clock), made(other, clock))
        for _ in range(3):
            found: list[object] = []
            waiting, barrier = 0, trio.Event()

            async def one(number: int, found: list[object] = found, barrier: trio.Event = barrier) -> None:
                nonlocal waiting
                waiting += 1
                if waiting == 40:
                    barrier.set()
                await barrier.wait()
                found.append(await both[number % 2].begin("a", "k", SAME))

            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(one, number)
            assert Counter(type(each) for each in found) == {Begun: 1, InProgress: 39}
            clock.at += timedelta(seconds=ABANDONED_SECONDS)


async def test_beginning_that_is_cancelled_at_any_wait_leaves_no_key_locked(intents: Intents) -> None:
    cut_at = 0
    while True:
        cut_at += 1
        key, knife = f"k-{cut_at}", Knife(cut_at)
        found: object = None
        with knife as scope, scope:
            found = await intents.begin("a", key, SAME)
        if isinstance(found, Begun):
            await intents.forget(found)
        await intents.forget(await begun(intents, key=key))
        if knife.waits < cut_at:
            break
    assert cut_at > 1, "never cut"
