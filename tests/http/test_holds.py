"""Holds over REST, by the numbers of the statements that they answer (B21 to B34, and the weak points)."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import pytest
import trio

from callora.http.problems import PROBLEMS
from callora.ledger.commands import Deposit, SetStanding
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import VaultId
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.ledger.rounds import RoundResult, Share
from callora.store import accounts
from tests.support.rest import Person, Told, anonymous, rest_client
from tests.support.service import Consumer, RunningService, running_service
from tests.support.shop import UNLIMITED, Shop, shop, together

HOLDS = "/api/billing/holds"
QUARTER = parse_usdc("0.25")


async def place(at: Shop, who: Consumer, name: str = "r", amount: str = "0.25", **more: Any) -> Told:
    """Ask for a hold."""
    body = at.body(name, amount, apiKeyId=who.api_key_id, **more)
    return await at.biller.ask("POST", HOLDS, body)


async def placed(at: Shop, who: Consumer, name: str = "r", amount: str = "0.25", **more: Any) -> str:
    """Place a hold and return its id."""
    told = await place(at, who, name, amount, **more)
    assert (told.status, told.body["status"]) == (201, "held"), told
    return str(told.body["holdId"])


async def capture(
    at: Shop, hold_id: str, transaction: str = "t", amount: str | None = None, mode: str = "exact"
) -> Told:
    """Ask for a capture."""
    body = {"transactionId": transaction, "mode": mode, **({} if amount is None else {"amountUsdc": amount})}
    return await at.biller.ask("POST", f"{HOLDS}/{hold_id}/capture", body)


async def release(at: Shop, hold_id: str) -> Told:
    """Ask for a release."""
    return await at.biller.ask("POST", f"{HOLDS}/{hold_id}/release")


async def refund(at: Shop, transaction: str = "t", key: str = "k", **body: Any) -> Told:
    """Ask for a refund."""
    path = f"/api/billing/transactions/{transaction}/refund"
    return await at.biller.ask("POST", path, {"reason": "why", **body}, headers={"Idempotency-Key": key})


async def extend(at: Shop, hold_id: str, key: str = "k", **body: Any) -> Told:
    """Ask for an extension."""
    path = f"{HOLDS}/{hold_id}/extend"
    return await at.biller.ask("POST", path, {"seconds": 1, **body}, headers={"Idempotency-Key": key})


async def look(at: Shop, hold_id: str) -> dict[str, Any]:
    """Return a hold as it is shown."""
    told = await at.biller.ask("GET", f"{HOLDS}/{hold_id}")
    assert told.status == 200
    shown: dict[str, Any] = told.body
    return shown


async def spent(at: Shop, who: Consumer, period: str = "day") -> str:
    """Return what a key has spent, as services see it."""
    told = await at.biller.ask("GET", f"/api/keys/{who.api_key_id}/spending")
    assert told.status == 200
    return str(told.body[period]["spent"])


async def limit(at: Shop, who: Consumer, amount: str, period: str = "day", *, vault: bool = False) -> None:
    """Set a spending limit."""
    path = f"/api/vault/limits/{period}" if vault else f"/api/keys/{who.api_key_id}/limits/{period}"
    assert (await at.person(who).ask("PUT", path, {"amount": amount})).status == 200


def problem(told: Told) -> tuple[int, str]:
    return told.status, told.code


async def states(at: Shop, who: Consumer) -> list[tuple[str, str | None, int | None]]:
    return [(state, outcome, amount) for state, outcome, amount, _ in await at.service.events(who)]


@asynccontextmanager
async def shop_on(database_url: str, at: Shop, **settings: str) -> AsyncIterator[Shop]:
    """Run another service on a shop's database."""
    async with running_service(database_url, {**UNLIMITED, **settings}) as service, rest_client(service) as client:
        yield Shop(service, client, at.api_id, at.endpoint_id)


@asynccontextmanager
async def two_shops(database_url: str) -> AsyncIterator[tuple[Shop, list[Person]]]:
    """Run a shop and another service on its database, and return who may ask at each."""
    async with shop(database_url) as at, shop_on(database_url, at) as other:
        yield at, [at.biller, other.biller]


# --- placing ----------------------------------------------------------------------------------------------------------


async def test_a_hold_is_a_usage_event_that_takes_its_amount_out_of_what_can_be_spent(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        told = await place(at, who, ttlSeconds=77)
        assert told.status == 201
        assert told.body == {
            "holdId": told.body["holdId"],
            "requestId": "r",
            "status": "held",
            "apiKeyId": who.api_key_id,
            "apiId": at.api_id,
            "endpointId": at.endpoint_id,
            "network": "testnet",
            "usageEventId": told.body["usageEventId"],
            "amountUsdc": "0.2500000",
            "capturedUsdc": "0.0000000",
            "refundedUsdc": "0.0000000",
            "shortfallUsdc": "0.0000000",
            "transactionId": None,
            "createdAt": told.body["createdAt"],
            "expiresAt": told.body["expiresAt"],
            "closedAt": None,
            "alreadyProcessed": False,
            "balance_usdc": "0.7500000",
        }
        moments = [datetime.fromisoformat(told.body[name]) for name in ("createdAt", "expiresAt")]
        assert (moments[1] - moments[0]).total_seconds() == 77
        assert await at.service.balance(who) == (parse_usdc("0.75"), QUARTER)
        assert await states(at, who) == [("held", None, None)]
        again = await place(at, who, ttlSeconds=77)
        assert (again.status, again.body) == (200, {**told.body, "alreadyProcessed": True})
        first = {name: value for name, value in told.body.items() if name not in ("alreadyProcessed", "balance_usdc")}
        assert await look(at, told.body["holdId"]) == first
        await release(at, told.body["holdId"])


async def test_a_request_is_one_hold_a_vault_and_with_another_body_it_is_refused(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        another_key = await at.service.another_key(who.user_id, who.vault_id)
        other, _ = await at.payer("1")
        hold_id = await placed(at, who)
        for told in (
            await place(at, who, amount="0.26"),
            await place(at, who, ttlSeconds=5),
            await place(at, another_key),
        ):
            assert problem(told) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        assert await placed(at, other) != hold_id
        assert await states(at, who) == [("held", None, None)]


async def test_fifty_identical_requests_at_once_are_one_hold(database_url: str) -> None:
    async with two_shops(database_url) as (at, billers):
        who, _ = await at.payer("1")
        for name in ("a", "b", "c"):
            body = at.body(name, apiKeyId=who.api_key_id)
            told = await together(50, partial(_ask_either, billers, HOLDS, body))
            assert Counter(each.status for each in told) == {201: 1, 200: 49}
            assert len({each.body["holdId"] for each in told}) == 1
        assert await at.service.balance(who) == (parse_usdc("0.97"), parse_usdc("0.03"))


async def _ask_either(people: Sequence[Person], path: str, body: object, number: int) -> Told:
    return await people[number % len(people)].ask("POST", path, body)


async def test_what_cannot_be_held_is_refused_by_its_own_rule_and_may_be_asked_again(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("0.20")
        database = at.service.database
        narrow = await at.service.another_key(who.user_id, who.vault_id)
        one_endpoint = await at.service.another_key(who.user_id, who.vault_id)
        ended = [await at.service.another_key(who.user_id, who.vault_id) for _ in range(3)]
        for key, change in (
            (narrow, "allowed_apis = '{999}'"),
            (one_endpoint, "allowed_endpoints = '{999}'"),
            (ended[0], "revoked_at = now()"),
            (ended[1], "disabled = true"),
            (ended[2], "expires_at = now()"),
        ):
            await database.execute(f"UPDATE api_keys SET {change} WHERE api_key_id = $1", key.api_key_id)
        for told, expected in (
            (await place(at, narrow), (403, "API_ACCESS_FORBIDDEN")),
            (await place(at, one_endpoint), (403, "ENDPOINT_FORBIDDEN")),
            (await place(at, ended[0]), (404, "API_KEY_NOT_FOUND")),
            (await place(at, ended[1]), (404, "API_KEY_NOT_FOUND")),
            (await place(at, ended[2]), (404, "API_KEY_NOT_FOUND")),
            (await place(at, who, apiId=999_999), (404, "NOT_FOUND")),
            (await place(at, who, "e", endpointId=999_999), (404, "NOT_FOUND")),
            (await place(at, who, "b"), (402, "INSUFFICIENT_BALANCE")),
        ):
            assert problem(told) == expected
        assert told.body["details"] == {"required": "0.2500000", "available": "0.2000000"}
        await at.service.top_up(who, "0.05")
        await at.service.ledger.registry.ask(who.vault_id, SetStanding("suspended"))
        assert problem(await place(at, who, "b")) == (403, "VAULT_SUSPENDED")
        await at.service.ledger.registry.ask(who.vault_id, SetStanding("active"))
        assert await states(at, who) == []
        await placed(at, who, "b")
        nobodys = {"apiKeyId": "01a1ff0e-0fb6-7396-aa6d-6df1fb066d39", "requestId": "x"}
        told = await at.biller.ask("POST", HOLDS, {**at.body("x"), **nobodys})
        assert problem(told) == (404, "API_KEY_NOT_FOUND")
        assert problem(await at.biller.ask("POST", f"{HOLDS}/release", nobodys)) == (404, "API_KEY_NOT_FOUND")
        path = f"/api/keys/{nobodys['apiKeyId']}/spending"
        assert problem(await at.biller.ask("GET", path)) == (404, "API_KEY_NOT_FOUND")
        # Whose key was revoked since is still answered what he asked before.
        await database.execute("UPDATE api_keys SET revoked_at = now() WHERE api_key_id = $1", who.api_key_id)
        assert (await place(at, who, "b")).status == 200
        assert await spent(at, who) == "0.2500000"


async def test_twenty_parallel_reservations_of_1_000_on_a_limit_of_10_000_are_exactly_ten(database_url: str) -> None:
    async with two_shops(database_url) as (at, both):
        for billers in (both[:1], both):
            who, _ = await at.payer("1")
            await limit(at, who, "0.001")

            async def one(number: int, who: Consumer = who, billers: list[Person] = billers) -> Told:
                body = at.body(f"r-{number}", "0.0001", apiKeyId=who.api_key_id)
                return await billers[number % len(billers)].ask("POST", HOLDS, body)

            told = await together(20, one)
            assert Counter(each.status for each in told) == {201: 10, 402: 10}
            assert {each.code for each in told if each.status == 402} == {"SPENDING_LIMIT_EXCEEDED"}
            assert await spent(at, who) == "0.0010000"
            assert len(await at.service.events(who)) == 10


# --- settling, by statement -------------------------------------------------------------------------------------------


async def test_b21_what_is_captured_is_the_event_that_was_held_with_its_date_and_amount(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        sql = "SELECT event_id::text, created_at, held_amount, count(*) OVER () AS count FROM usage_events"
        before = await at.service.database.fetch_row(sql)
        told = await capture(at, hold_id, "journal-1")
        assert (told.status, told.body["status"], told.body["transactionId"]) == (200, "captured", "journal-1")
        assert (told.body["capturedUsdc"], told.body["chargedUsdc"], told.body["balance_usdc"]) == (
            "0.2500000",
            "0.2500000",
            "0.7500000",
        )
        after = await at.service.database.fetch_row(sql)
        assert before is not None and after is not None and dict(before) == dict(after)
        assert told.body["usageEventId"] == after["event_id"]
        assert await states(at, who) == [("captured", "deducted", QUARTER)]
        assert await spent(at, who) == "0.2500000"


async def test_b22_a_capture_that_is_repeated_changes_nothing(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        first = await capture(at, hold_id)
        for again in (await capture(at, hold_id), await capture(at, hold_id, amount="0.2500")):
            assert (again.status, again.body) == (200, {**first.body, "alreadyProcessed": True})
        for told, details in (
            (await capture(at, hold_id, amount="0.24"), {"stored": "0.2500000", "given": "0.2400000"}),
            (await capture(at, hold_id, amount="0.3", mode="partial"), {"stored": "0.2500000", "given": "0.3000000"}),
        ):
            assert (*problem(told), told.body["details"]) == (409, "HOLD_AMOUNT_MISMATCH", details)
        told = await capture(at, hold_id, "another")
        assert (*problem(told), told.body["details"]) == (409, "HOLD_ALREADY_CAPTURED", {"transactionId": "t"})
        assert await states(at, who) == [("captured", "deducted", QUARTER)]
        assert await at.service.balance(who) == (parse_usdc("0.75"), 0)


async def test_wb2_identical_captures_at_once_all_succeed_with_one_charge(database_url: str) -> None:
    async with two_shops(database_url) as (at, billers):
        who, _ = await at.payer("1")
        for number in range(4):
            hold_id = await placed(at, who, str(number), "0.05")
            path, body = f"{HOLDS}/{hold_id}/capture", {"transactionId": f"t-{number}"}
            told = await together(20, partial(_ask_either, billers, path, body))
            assert Counter(each.status for each in told) == {200: 20}
            assert {each.body["chargedUsdc"] for each in told} == {"0.0500000"}
        assert await states(at, who) == [("captured", "deducted", parse_usdc("0.05"))] * 4
        assert await at.service.balance(who) == (parse_usdc("0.80"), 0)


async def test_b23_of_two_holds_for_one_transaction_the_second_is_released(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        first, second, third = [await placed(at, who, name) for name in "abc"]
        assert (await capture(at, first)).status == 200
        for already in (True, True):
            told = await capture(at, second)
            assert (told.status, told.body["status"], told.body["alreadyProcessed"]) == (200, "released", already)
            assert (told.body["chargedHoldId"], told.body["chargedUsdc"]) == (first, "0.2500000")
        assert await at.service.balance(who) == (parse_usdc("0.50"), QUARTER)
        told = await capture(at, third, amount="0.10", mode="partial")
        assert problem(told) == (409, "HOLD_AMOUNT_MISMATCH")
        assert (await look(at, third))["status"] == "held", "nothing is changed"
        assert [state for state, *_ in await states(at, who)] == ["captured", "released", "held"]
        await release(at, third)


async def test_b23_many_holds_captured_at_once_for_one_transaction_are_one_charge(database_url: str) -> None:
    async with two_shops(database_url) as (at, billers):
        who, _ = await at.payer("1")
        holds = [await placed(at, who, str(number), "0.05") for number in range(10)]

        async def one(number: int) -> Told:
            path = f"{HOLDS}/{holds[number]}/capture"
            return await billers[number % len(billers)].ask("POST", path, {"transactionId": "same"})

        told = await together(10, one)
        assert {each.status for each in told} == {200}
        assert len({each.body["chargedHoldId"] for each in told}) == 1
        assert Counter(state for state, *_ in await states(at, who)) == {"captured": 1, "released": 9}
        assert await at.service.balance(who) == (parse_usdc("0.95"), 0)


async def test_b24_what_is_not_there_is_not_found_and_what_is_wrong_is_told_at_once(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        nobodys = "01a1ff0e-0fb6-7396-aa6d-6df1fb066d39"
        for told in (
            await capture(at, nobodys),
            await release(at, nobodys),
            await extend(at, nobodys),
            await refund(at, "no-such"),
            await at.biller.ask("GET", f"{HOLDS}/{nobodys}"),
        ):
            assert problem(told) == (404, "HOLD_NOT_FOUND")
        hold_id = await placed(at, who)
        for amount in ("0", "-1", "x", ""):
            told = await at.biller.ask("POST", f"{HOLDS}/{hold_id}/capture", {"amountUsdc": amount, "mode": "some"})
            assert told.status == 400
            assert sorted(told.wrong) == ["body.amountUsdc", "body.mode", "body.transactionId"]
        for transaction in ("", "a b", "x" * 129, "a/b", None):
            told = await at.biller.ask("POST", f"{HOLDS}/{hold_id}/capture", {"transactionId": transaction})
            assert (told.status, told.wrong) == (400, ["body.transactionId"])
        told = await at.biller.ask("POST", HOLDS, {"amountUsdc": "0", "ttlSeconds": 86_401})
        required = ("apiId", "apiKeyId", "endpointId", "requestId", "amountUsdc", "ttlSeconds")
        assert sorted(told.wrong) == sorted(f"body.{name}" for name in required)
        assert problem(await at.biller.ask("GET", f"{HOLDS}/x")) == (400, "VALIDATION_ERROR")
        assert (await look(at, hold_id))["status"] == "held"
        await release(at, hold_id)


async def test_b25_nothing_is_charged_without_a_hold_and_both_steps_repeated_are_one_charge(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        for _ in range(3):
            told = await place(at, who)
            assert (await capture(at, told.body["holdId"], "journal")).status == 200
        assert await states(at, who) == [("captured", "deducted", QUARTER)]
        assert (await place(at, who)).body["status"] == "captured", "who comes back sees how far it went"


async def test_b26_a_release_is_repeated_without_effect_and_never_undoes_a_charge(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        for already in (False, True, True):
            told = await release(at, hold_id)
            assert (told.status, told.body["status"], told.body["alreadyProcessed"]) == (200, "released", already)
            assert told.body["balance_usdc"] == "1.0000000"
        named = {"requestId": "r", "apiKeyId": who.api_key_id}
        assert (await at.biller.ask("POST", f"{HOLDS}/release", named)).body["holdId"] == hold_id
        for unknown in ("u", "u", "v"):
            told = await at.biller.ask("POST", f"{HOLDS}/release", {**named, "requestId": unknown})
            assert (told.status, told.body["status"], told.body["amountUsdc"]) == (200, "released", None)
        told = await at.biller.ask("POST", f"{HOLDS}/release", {**named, "requestId": ""})
        assert (told.status, told.wrong) == (400, ["body.requestId"])
        for told in (await capture(at, hold_id), await place(at, who), await extend(at, hold_id)):
            assert problem(told) == (409, "HOLD_RELEASED")
        charged = await placed(at, who, "s")
        await capture(at, charged)
        for told in (
            await release(at, charged),
            await at.biller.ask("POST", f"{HOLDS}/release", {**named, "requestId": "s"}),
            await extend(at, charged),
        ):
            assert (*problem(told), told.body["details"]) == (409, "HOLD_ALREADY_CAPTURED", {"transactionId": "t"})
        assert await states(at, who) == [("released", "given_up", None), ("captured", "deducted", QUARTER)]


async def test_b27_services_see_what_a_key_may_spend_and_has_spent(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        path = f"/api/keys/{who.api_key_id}/spending"
        nothing = {"limit": None, "spent": "0.0000000", "remaining": None}
        told = await at.biller.ask("GET", path)
        assert told.body == {"network": "testnet", "day": nothing, "week": nothing, "month": nothing, "year": nothing}
        await placed(at, who)
        await limit(at, who, "0.20", "week")
        await limit(at, who, "1", "year")
        told = await at.biller.ask("GET", path)
        assert told.body["day"] == {"limit": None, "spent": "0.2500000", "remaining": None}
        assert told.body["week"] == {"limit": "0.2000000", "spent": "0.2500000", "remaining": "0.0000000"}
        assert told.body["year"] == {"limit": "1.0000000", "spent": "0.2500000", "remaining": "0.7500000"}


async def test_b28_the_accounts_limits_come_before_the_keys_and_a_refusal_leaves_no_hold(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.2")
        await limit(at, who, "0.1", "year", vault=True)
        told = await place(at, who)
        assert problem(told) == (402, "SPENDING_LIMIT_EXCEEDED")
        assert (told.body["details"]["limitedBy"], told.body["details"]["window"]) == ("vault", "year")
        assert await states(at, who) == []
        assert await at.service.balance(who) == (parse_usdc("1"), 0)
        await limit(at, who, "5", "year", vault=True)
        told = await place(at, who, "s")
        assert (told.body["details"]["limitedBy"], told.body["details"]["window"]) == ("key", "day")
        assert "daily" in told.body["message"]
        hold_id = await placed(at, who, "s2", "0.2")
        assert (await capture(at, hold_id)).status == 200
        assert await spent(at, who) == "0.2000000", "reaching the limit is allowed"


async def test_b29_what_becomes_of_a_hold_is_said_and_never_inferred(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        # Neither being asked about, nor being asked for again, nor a wrong or refused settlement settles it.
        for told in (
            await place(at, who),
            await capture(at, hold_id, amount="0.2"),
            await at.biller.ask("POST", f"{HOLDS}/{hold_id}/capture", {}),
            await refund(at, "t"),
            await extend(at, hold_id),
        ):
            assert told.status < 500
            assert (await look(at, hold_id))["status"] == "held"
        assert await states(at, who) == [("held", None, None)]
        await release(at, hold_id)


SETTLEMENTS = {
    "success": "captured",
    "already paid": "released",
    "failed before its journal": "released",
    "lock failure": "released",
    "error, journal reverted inline": "released",
    "pending": "captured",
    "pending, then not found": "captured",
}
"""What services make of a payment's result."""


async def test_b30_each_result_of_a_payment_has_its_settlement(database_url: str) -> None:
    async with shop(database_url) as at:
        for result, settled in SETTLEMENTS.items():
            who, _ = await at.payer("1")
            hold_id = await placed(at, who)
            told = await (capture(at, hold_id, "journal") if settled == "captured" else release(at, hold_id))
            assert (told.status, told.body["status"]) == (200, settled), result
            assert await spent(at, who) == ("0.2500000" if settled == "captured" else "0.0000000")
            assert await at.service.balance(who) == (parse_usdc("0.75" if settled == "captured" else "1"), 0)


async def test_b31_a_capture_without_its_transaction_is_refused_and_changes_nothing(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        for body in ({}, {"transactionId": None}, {"transactionId": ""}):
            told = await at.biller.ask("POST", f"{HOLDS}/{hold_id}/capture", body)
            assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", ["body.transactionId"])
        assert (await look(at, hold_id))["status"] == "held"
        assert (await release(at, hold_id)).body["status"] == "released", "what was meant is still to be said"


class Silence:
    """Makes a service's rounds lose their answers, or not be stored at all."""

    def __init__(self, service: RunningService) -> None:
        self._store = service.ledger.store
        self._commit = self._store.commit_round
        self.faults: list[str] = []
        self._store.commit_round = self._faulty  # type: ignore[method-assign]

    async def _faulty(self, shares: Sequence[Share]) -> RoundResult:
        fault = self.faults.pop(0) if self.faults else "ok"
        if fault == "unavailable":
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("away")
        result = await self._commit(shares)
        if fault == "stored":
            raise OutcomeUnknown("the answer was lost")
        return result


async def test_b32_a_settlement_that_fails_changes_nothing_and_is_carried_on(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        silence = Silence(at.service)
        hold_id = await placed(at, who)
        find = at.service.database.fetch_row

        async def away(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("away")

        at.service.database.fetch_row = away  # type: ignore[method-assign,assignment]
        assert problem(await capture(at, hold_id, "journal")) == (503, "SERVICE_UNAVAILABLE")
        at.service.database.fetch_row = find  # type: ignore[method-assign]
        assert (await look(at, hold_id))["status"] == "held"
        silence.faults = ["stored", "unavailable"]
        assert (await capture(at, hold_id, "journal")).status == 200, "an unknown outcome is looked up"
        assert await states(at, who) == [("captured", "deducted", QUARTER)]


async def test_b33_a_payment_that_fails_later_is_refunded_and_counts_as_not_spent(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.25")
        hold_id = await placed(at, who)
        await capture(at, hold_id, "journal")
        assert problem(await place(at, who, "next")) == (402, "SPENDING_LIMIT_EXCEEDED")
        told = await refund(at, "journal", amountUsdc="0.10")
        assert (told.status, told.body["amountUsdc"], told.body["refundedUsdc"]) == (200, "0.1000000", "0.1000000")
        assert (told.body["holdId"], told.body["balance_usdc"]) == (hold_id, "0.8500000")
        assert await spent(at, who) == "0.1500000"
        assert (await refund(at, "journal", amountUsdc="0.10")).body == told.body, "the same intent"
        told = await refund(at, "journal", "rest")
        assert (told.body["amountUsdc"], told.body["refundedUsdc"]) == ("0.1500000", "0.2500000")
        assert [await spent(at, who, each) for each in ("day", "week", "month", "year")] == ["0.0000000"] * 4
        for amount in ({}, {"amountUsdc": "0.0000001"}):
            told = await refund(at, "journal", f"more-{len(amount)}", **amount)
            assert (*problem(told), told.body["details"]) == (409, "REFUND_EXCEEDS_CHARGE", {"refundable": "0.0000000"})
        shown = await look(at, hold_id)
        assert (shown["status"], shown["capturedUsdc"], shown["refundedUsdc"]) == ("captured", "0.2500000", "0.2500000")
        assert await states(at, who) == [("captured", "deducted", QUARTER)], "nothing is deleted"
        assert await at.service.balance(who) == (parse_usdc("1"), 0)
        await placed(at, who, "next")


async def test_b34_without_a_key_only_the_vaults_limits_count_and_nothing_skips_a_check(database_url: str) -> None:
    async with shop(database_url) as at:
        who, someone = await at.payer("1")
        await limit(at, who, "0.01")
        await limit(at, who, "0.5", vault=True)
        assert (await someone.ask("POST", "/api/billing/deduct", at.body("a", "0.30"))).status == 200
        assert await spent(at, who) == "0.0000000", "a session's charge is no key's"
        told = await someone.ask("POST", "/api/billing/deduct", at.body("b", "0.30"))
        assert (told.status, told.body["details"]["limitedBy"]) == (402, "vault")
        told = await place(at, who, amount="0.02")
        assert (told.status, told.body["details"]["limitedBy"]) == (402, "key")
        told = await place(at, who, "c", "0.02", skipChecks=True)
        assert (told.status, told.wrong) == (400, ["body.skipChecks"])


# --- more and less than is held ---------------------------------------------------------------------------------------


async def test_a_partial_capture_gives_the_rest_back_and_an_exact_one_is_all_or_nothing(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        for amount in ("0.24", "0.26"):
            told = await capture(at, hold_id, amount=amount)
            assert (*problem(told), told.body["details"]) == (
                409,
                "HOLD_AMOUNT_MISMATCH",
                {"stored": "0.2500000", "given": f"{amount}00000"},
            )
        told = await capture(at, hold_id, amount="0.1", mode="partial")
        assert (told.body["chargedUsdc"], told.body["shortfallUsdc"]) == ("0.1000000", "0.0000000")
        assert await at.service.balance(who) == (parse_usdc("0.9"), 0)
        assert await spent(at, who) == "0.1000000"
        assert (await capture(at, hold_id, amount="0.1", mode="partial")).status == 200
        assert problem(await capture(at, hold_id)) == (409, "HOLD_AMOUNT_MISMATCH")


async def test_a_capture_above_the_hold_holds_the_rest_first_within_the_limits(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.40")
        hold_id = await placed(at, who)
        told = await capture(at, hold_id, amount="0.40", mode="partial")
        assert (told.body["chargedUsdc"], told.body["amountUsdc"]) == ("0.4000000", "0.4000000")
        assert await states(at, who) == [("captured", "deducted", parse_usdc("0.40"))]
        assert await at.service.balance(who) == (parse_usdc("0.60"), 0)


async def test_what_cannot_be_held_besides_is_a_shortfall_and_what_is_held_is_charged(database_url: str) -> None:
    async with shop(database_url) as at:
        for by in ("limit", "balance", "standing"):
            who, _ = await at.payer("0.30" if by == "balance" else "1")
            hold_id = await placed(at, who)
            if by == "limit":
                await limit(at, who, "0.39")
            if by == "standing":
                await at.service.ledger.registry.ask(who.vault_id, SetStanding("suspended"))
            told = await capture(at, hold_id, amount="0.40", mode="partial")
            assert (told.status, told.body["status"]) == (200, "captured")
            assert (told.body["chargedUsdc"], told.body["shortfallUsdc"]) == ("0.2500000", "0.1500000")
            assert await states(at, who) == [("captured", "shortfall", QUARTER)]
            again = await capture(at, hold_id, amount="0.40", mode="partial")
            assert (again.status, again.body["alreadyProcessed"]) == (200, True)


async def test_an_extension_is_made_once_under_its_key_and_obeys_the_limits(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.30")
        hold_id = await placed(at, who, ttlSeconds=60)
        told = await at.biller.ask("POST", f"{HOLDS}/{hold_id}/extend", {"seconds": 1})
        assert problem(told) == (400, "INVALID_IDEMPOTENCY_KEY")
        for seconds in (0, 86_401, None):
            assert (await extend(at, hold_id, seconds=seconds)).wrong == ["body.seconds"]
        told = await extend(at, hold_id, "a", extraAmountUsdc="0.06")
        assert problem(told) == (402, "SPENDING_LIMIT_EXCEEDED")
        first = await extend(at, hold_id, "a", seconds=30, extraAmountUsdc="0.05")
        assert (first.status, first.body["amountUsdc"], first.body["alreadyProcessed"]) == (200, "0.3000000", False)
        moments = [datetime.fromisoformat(first.body[name]) for name in ("createdAt", "expiresAt")]
        assert (moments[1] - moments[0]).total_seconds() == 90
        again = await extend(at, hold_id, "a", seconds=30, extraAmountUsdc="0.05")
        assert (again.body, again.headers["Idempotent-Replayed"]) == (first.body, "true")
        # When the stored answer is long forgotten, the extension's own name still tells that it was made.
        await at.service.database.execute("DELETE FROM rest_idempotency")
        again = await extend(at, hold_id, "a", seconds=30, extraAmountUsdc="0.05")
        assert again.body == {**first.body, "alreadyProcessed": True}
        await at.service.database.execute("DELETE FROM rest_idempotency")
        told = await extend(at, hold_id, "a", seconds=31, extraAmountUsdc="0.05")
        assert problem(told) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        assert (await capture(at, hold_id)).body["chargedUsdc"] == "0.3000000"


async def test_an_extension_whose_outcome_is_unknown_is_made_once(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        store = at.service.ledger.store
        locked, silent = store.commit_locked, [True, True]

        async def without_an_answer(*arguments: Any) -> Any:
            outcome = await locked(*arguments)
            if silent.pop() if silent else False:
                raise OutcomeUnknown("the answer was lost")
            return outcome

        store.commit_locked = without_an_answer  # type: ignore[method-assign,assignment]
        hold_id = await placed(at, who)
        assert problem(await extend(at, hold_id, extraAmountUsdc="0.10")) == (504, "OUTCOME_UNKNOWN")
        told = await capture(at, hold_id, amount="0.40", mode="partial")
        assert problem(told) == (504, "OUTCOME_UNKNOWN"), "of the rest, which is held first"
        told = await extend(at, hold_id, extraAmountUsdc="0.10")
        assert (told.body["amountUsdc"], told.body["alreadyProcessed"]) == ("0.4000000", True)
        told = await capture(at, hold_id, amount="0.40", mode="partial")
        assert (told.body["chargedUsdc"], told.body["shortfallUsdc"]) == ("0.4000000", "0.0000000")
        assert await at.service.balance(who) == (parse_usdc("0.60"), 0)


# --- time -------------------------------------------------------------------------------------------------------------

SWEEPING = {"HOLD_SWEEP_INTERVAL_SECONDS": "1"}


async def until(at: Shop, hold_id: str, status: str) -> None:
    with trio.fail_after(60):
        while (await look(at, hold_id))["status"] != status:  # noqa: ASYNC110 - the clock is the service's
            await trio.sleep(0.05)


async def test_an_expired_hold_is_held_again_by_its_capture_where_that_is_possible(database_url: str) -> None:
    async with shop(database_url, **SWEEPING) as at:
        who, _ = await at.payer("0.60")
        again, never = await placed(at, who, "a", ttlSeconds=1), await placed(at, who, "b", "0.30", ttlSeconds=1)
        first_event = (await look(at, again))["usageEventId"]
        await until(at, again, "expired")
        await until(at, never, "expired")
        assert await at.service.balance(who) == (parse_usdc("0.60"), 0)
        for told in (await place(at, who, "a", ttlSeconds=1), await extend(at, again)):
            assert problem(told) == (409, "HOLD_EXPIRED")
        assert problem(await capture(at, again, amount="0.3")) == (409, "HOLD_AMOUNT_MISMATCH")
        told = await capture(at, again)
        assert (told.status, told.body["holdId"], told.body["chargedUsdc"]) == (200, again, "0.2500000")
        assert told.body["usageEventId"] != first_event
        await limit(at, who, "0.54")
        told = await capture(at, never, "u")
        assert problem(told) == (409, "HOLD_EXPIRED")
        assert told.body["details"]["code"] == "SPENDING_LIMIT_EXCEEDED"
        assert (await look(at, never))["transactionId"] is None
        await limit(at, who, "0.55")
        hold_id = await placed(at, who, "c", "0.30")
        assert (await capture(at, hold_id, "u")).status == 200, "begun again with a new hold"
        told = await capture(at, never, "u")
        assert (told.status, told.body["chargedHoldId"], told.body["status"]) == (200, hold_id, "released")
        assert (await capture(at, again)).body["alreadyProcessed"]
        assert Counter(state for state, *_ in await states(at, who)) == {"expired": 2, "captured": 2}


async def test_wb1_a_hold_that_nobody_settles_is_given_back_in_its_time(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.25")
        hold_id = await placed(at, who, ttlSeconds=1)
        assert problem(await place(at, who, "next")) == (402, "SPENDING_LIMIT_EXCEEDED")
    # That service has gone without settling anything; another finds what it left.
    async with shop_on(database_url, at, **SWEEPING) as there:
        await until(there, hold_id, "expired")
        assert await spent(there, who) == "0.0000000"
        await placed(there, who, "next")
        assert await there.service.balance(who) == (parse_usdc("0.75"), QUARTER)


# --- weak points ------------------------------------------------------------------------------------------------------


async def test_wb3_a_transaction_is_each_vaults_own_and_none_is_dropped(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        other, _ = await at.payer("1")
        second_key = await at.service.another_key(who.user_id, who.vault_id)
        for each in (who, other):
            assert (await capture(at, await placed(at, each))).body["alreadyProcessed"] is False
        # A key of the same vault is told what was charged, and by which hold; its amount is compared.
        told = await capture(at, await placed(at, second_key, "s"))
        assert (told.body["alreadyProcessed"], told.body["status"]) == (True, "released")
        told = await capture(at, await placed(at, second_key, "u", "0.3"))
        assert problem(told) == (409, "HOLD_AMOUNT_MISMATCH")
        assert await at.service.balance(other) == (parse_usdc("0.75"), 0)
        # A refund says whose it is where that is not clear.
        told = await refund(at)
        assert (told.status, told.wrong) == (400, ["body.apiKeyId"])
        told = await refund(at, apiKeyId=other.api_key_id)
        assert (told.status, told.body["balance_usdc"]) == (200, "1.0000000")
        assert (await refund(at, key="l", apiKeyId="01a1ff0e-0fb6-7396-aa6d-6df1fb066d39")).code == "API_KEY_NOT_FOUND"
        assert [await spent(at, each) for each in (who, second_key)] == ["0.2500000", "0.3000000"]


async def test_wb4_a_release_before_its_hold_refuses_the_hold_and_nothing_is_deleted(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        other, _ = await at.payer("1")
        named = {"requestId": "r", "apiKeyId": who.api_key_id}
        told = await at.biller.ask("POST", f"{HOLDS}/release", named)
        assert (told.status, told.body["status"], told.body["alreadyProcessed"]) == (200, "released", False)
        hold_id = told.body["holdId"]
        for late in (await place(at, who), await capture(at, hold_id), await extend(at, hold_id)):
            assert problem(late) == (409, "HOLD_RELEASED")
        again = await at.biller.ask("POST", f"{HOLDS}/release", named)
        assert (again.body["holdId"], again.body["alreadyProcessed"]) == (hold_id, True)
        assert (await release(at, hold_id)).body["status"] == "released"
        assert await states(at, who) == []
        await placed(at, other)  # another vault's request of the same name
        await release(at, await placed(at, who, "s"))
        assert await states(at, who) == [("released", "given_up", None)], "what was released stays to be seen"


async def test_wb4_a_release_and_its_hold_at_once_end_with_nothing_held(database_url: str) -> None:
    async with two_shops(database_url) as (at, billers):
        who, _ = await at.payer("1")

        async def either(name: str, number: int) -> Told:
            one = billers[number % len(billers)]
            if number % 4 < 2:
                return await one.ask("POST", HOLDS, at.body(name, apiKeyId=who.api_key_id))
            return await one.ask("POST", f"{HOLDS}/release", {"requestId": name, "apiKeyId": who.api_key_id})

        for round_ in range(8):
            told = await together(8, partial(either, f"r-{round_}"))
            assert {each.status for each in told} <= {200, 201, 409}
            assert {each.code for each in told if each.status == 409} <= {"HOLD_RELEASED"}
        assert await at.service.balance(who) == (parse_usdc("1"), 0)


async def test_wb5_a_hold_whose_capture_failed_is_found_by_its_request_and_never_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callora.actors.vault.CLOSE_RETRY_SECONDS", 0.2)
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        silence = Silence(at.service)
        silence.faults = ["unavailable"] * 100_000
        told = await capture(at, hold_id, "journal")
        assert problem(told) == (504, "OUTCOME_UNKNOWN")
        silence.faults = []
        assert (await place(at, who)).body["holdId"] == hold_id
        told = await refund(at, "journal")
        assert (*problem(told), told.body["details"]) == (409, "REFUND_EXCEEDS_CHARGE", {"refundable": "0.0000000"})
        assert (await release(at, hold_id)).body["status"] == "released", "what was not charged is given back"
        assert await at.service.balance(who) == (parse_usdc("1"), 0)


async def test_wb8_what_a_limit_counts_is_all_that_leaves_the_vault(database_url: str) -> None:
    address = "GAAZI4TCR3TY5OJHCTJC2A4QSY6CJWJH5IAJTGKIN2ER7LBNVKOCCWN7"
    async with shop(database_url, PLATFORM_FEE_BPS="2500", PLATFORM_FEE_ADDRESS=address) as at:
        who, _ = await at.payer("1")
        await capture(at, await placed(at, who), amount="0.40", mode="partial")
        available, held = await at.service.balance(who)
        assert (parse_usdc("1") - available - held, await spent(at, who)) == (parse_usdc("0.40"), "0.4000000")


async def test_wb10_a_hold_that_waited_for_its_vault_is_dated_when_it_was_decided(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await limit(at, who, "0.5")
        told: list[Told] = []

        async def one() -> None:
            told.append(await place(at, who))

        async with trio.open_nursery() as nursery:
            async with at.service.database.transaction() as connection:
                await connection.execute("UPDATE vaults SET version = version + 1 WHERE vault_id = $1", who.vault_id)
                nursery.start_soon(one)
                with trio.fail_after(60):
                    while not await at.service.database.fetch_value(  # noqa: ASYNC110 - another connection waits
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname ="
                        " current_database()"
                    ):
                        await trio.sleep(0.01)
                before = at.service.context.clock.now()
        assert told[0].status == 201
        created = await at.service.database.fetch_value("SELECT created_at FROM usage_events")
        assert created > before, "not when its statement began to wait"


async def test_wb11_every_refusal_is_a_code_of_the_catalogue_and_none_is_a_text_to_be_parsed(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        await capture(at, hold_id)
        await limit(at, who, "0.3")
        for told, code in (
            (await place(at, who, "a", "0"), "VALIDATION_ERROR"),
            (await place(at, who, "a", "-0.1"), "VALIDATION_ERROR"),
            (await place(at, who, "a", "0.2"), "SPENDING_LIMIT_EXCEEDED"),
            (await place(at, who, "a", "2"), "IDEMPOTENCY_KEY_REUSE_MISMATCH"),
            (await place(at, who, "b", "2"), "INSUFFICIENT_BALANCE"),
            (await capture(at, hold_id, "other"), "HOLD_ALREADY_CAPTURED"),
            (await capture(at, hold_id, amount="0.1"), "HOLD_AMOUNT_MISMATCH"),
        ):
            assert (told.status, told.code) == (PROBLEMS[code].status, code)
            assert told.status < 500


async def test_wb12_a_database_that_fails_is_an_answer_and_the_service_goes_on(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        hold_id = await placed(at, who)
        await at.service.database.execute("ALTER TABLE api_keys RENAME TO api_keys_away")
        for told in (await place(at, who, "s"), await at.biller.ask("GET", f"/api/keys/{who.api_key_id}/spending")):
            assert problem(told) == (500, "INTERNAL_SERVER_ERROR")
        await at.service.database.execute("ALTER TABLE api_keys_away RENAME TO api_keys")
        await at.service.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with trio.fail_after(60):
            while (told := await capture(at, hold_id)).status != 200:
                assert told.status in (503, 504)
        assert await states(at, who) == [("captured", "deducted", QUARTER)]


async def test_wb13_a_database_that_does_not_answer_is_told_in_time_and_asked_again(database_url: str) -> None:
    async with shop(database_url, COMMIT_TIMEOUT_MS="200") as at:
        who, _ = await at.payer("1")
        async with at.service.database.transaction() as connection:
            await connection.fetch_row("SELECT FROM vaults WHERE vault_id = $1 FOR UPDATE", who.vault_id)
            with trio.fail_after(60):
                assert problem(await place(at, who)) == (504, "OUTCOME_UNKNOWN")
        with trio.fail_after(60):
            while (told := await place(at, who)).status >= 500:
                pass
        assert told.body["status"] == "held"
        assert await at.service.balance(who) == (parse_usdc("0.75"), QUARTER)


async def test_wb14_a_hold_writes_nothing_to_its_key_and_an_unknown_scope_is_no_fault(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        database = at.service.database
        await database.execute("UPDATE api_keys SET scopes = '{weird,%s}' WHERE api_key_id = $1", who.api_key_id)
        row = "SELECT xmin::text, last_used_at FROM api_keys WHERE api_key_id = $1"
        before = await database.fetch_row(row, who.api_key_id)
        await capture(at, await placed(at, who))
        after = await database.fetch_row(row, who.api_key_id)
        assert before is not None and after is not None and dict(before) == dict(after)
        await database.execute(
            "UPDATE api_endpoints SET required_scope = 'read' WHERE endpoint_id = $1", at.endpoint_id
        )
        assert problem(await place(at, who, "s")) == (403, "SCOPE_REQUIRED")
        await database.execute("UPDATE api_keys SET scopes = '{read}' WHERE api_key_id = $1", who.api_key_id)
        await placed(at, who, "s")


# --- who may ask ------------------------------------------------------------------------------------------------------


async def test_without_a_service_token_no_service_is_let_in(database_url: str) -> None:
    async with shop(database_url, INTERNAL_SERVICE_TOKEN="") as at:
        who, someone = await at.payer("1")
        for asker in (
            at.biller,
            anonymous(at.client),
            at.admin,
            someone,
            Person(at.client, {"Authorization": "Bearer"}),
        ):
            told = await asker.ask("POST", HOLDS, at.body("r", apiKeyId=who.api_key_id))
            assert problem(told) == (401, "UNAUTHORIZED")
        assert await states(at, who) == []


async def test_accesses_by_services_are_counted_and_refunds_are_audited(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        await capture(at, await placed(at, who))
        await anonymous(at.client).ask("POST", HOLDS, {})
        await refund(at, amountUsdc="0.1")
        text = (await at.client.get("/metrics")).text
        for line in (
            'callora_service_requests_total{operation="place_hold",status_code="201"} 1.0',
            'callora_service_requests_total{operation="place_hold",status_code="401"} 1.0',
            'callora_service_requests_total{operation="capture_hold",status_code="200"} 1.0',
            'callora_service_requests_total{operation="refund_transaction",status_code="200"} 1.0',
        ):
            assert line in text
        rows = await at.service.database.fetch("SELECT actor, action, target, status, details FROM audit_events")
        assert [(row["actor"], row["action"], row["target"], row["status"]) for row in rows] == [
            ("service-token", "refund_transaction", "t", 200)
        ]
        assert '"reason": "why"' in rows[0]["details"]


async def test_an_operator_refunds_a_services_charge_by_its_event(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        told = await capture(at, await placed(at, who))
        body = {"usageEventId": told.body["usageEventId"], "amountUsdc": "0.2", "reason": "why"}
        told = await at.admin.ask("POST", "/api/billing/refund", body, headers={"Idempotency-Key": "k"})
        assert (told.status, told.body["balance_usdc"]) == (200, "0.9500000")
        told = await refund(at)
        assert (told.status, told.body["amountUsdc"], told.body["refundedUsdc"]) == (200, "0.0500000", "0.2500000")


async def test_holds_of_mainnet_and_testnet_are_each_keys_own(database_url: str) -> None:
    async with shop(database_url) as at:
        who, _ = await at.payer("1")
        ids, now = at.service.context.ids, at.service.context.clock.now()
        live = await accounts.ensure_vault(
            at.service.database, VaultId(ids.uuid7()), who.user_id, "mainnet", "free", now
        )
        moved = await at.service.ledger.registry.ask(live, Deposit(parse_usdc("2"), "first"))
        assert isinstance(moved, BalanceMoved)
        key = await at.service.another_key(who.user_id, live, network="mainnet")
        told = await place(at, key)
        assert (told.body["network"], told.body["balance_usdc"]) == ("mainnet", "1.7500000")
        assert await at.service.balance(who) == (parse_usdc("1"), 0)
