"""Charges over REST: each made once, to the caller's own vault, whatever else happens; refunds and grants."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from callora.ledger.commands import Grant, SetStanding
from callora.ledger.faults import OutcomeUnknown
from callora.ledger.ids import VaultId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.rounds import RoundResult, Share
from callora.store import accounts, apis
from tests.proof.books import answer_uniquely
from tests.support.rest import Person, Told, anonymous, person, rest_client
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, endpoint_of, shop, together
from tests.support.upstream import raw_upstream

CENT = parse_usdc("0.01")


async def test_a_deduct_charges_the_callers_vault_once_and_says_what_is_left(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        first = await someone.ask("POST", "/api/billing/deduct", at.body("r-1", "0.25"))
        assert first.status == 200, first
        event_id = first.body["usageEventId"]
        assert first.body == {
            "success": True,
            "usageEventId": event_id,
            "stellarTxHash": None,
            "alreadyProcessed": False,
            "amountUsdc": "0.2500000",
            "balance_usdc": "0.7500000",
        }
        again = await someone.ask("POST", "/api/billing/deduct", at.body("r-1", "0.2500"))
        assert again.body == {**first.body, "alreadyProcessed": True}
        assert await at.service.events(consumer) == [("captured", "deducted", parse_usdc("0.25"), None)]
        assert await at.service.balance(consumer) == (parse_usdc("0.75"), 0)
        row = await at.service.database.fetch_row(
            "SELECT u.event_id::text AS event_id, d.developer_id = u.developer_id AS theirs FROM usage_events u"
            " JOIN apis d ON d.api_id = u.api_id"
        )
        assert row is not None and dict(row) == {"event_id": event_id, "theirs": True}


async def test_the_same_request_id_with_another_body_is_refused_and_costs_nothing(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        assert (await someone.ask("POST", "/api/billing/deduct", at.body("r"))).status == 200
        for other in (at.body("r", "0.02"), at.body("r", network="testnet")):
            told = await someone.ask("POST", "/api/billing/deduct", other)
            assert (told.status, told.code) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        assert len(await at.service.events(consumer)) == 1
        # Another person's request of the same name is another request.
        _, another = await at.payer("1")
        told = await another.ask("POST", "/api/billing/deduct", at.body("r", "0.5"))
        assert (told.status, told.body["alreadyProcessed"]) == (200, False)


async def test_defect_13_a_deduct_names_nobody_else_and_charges_only_its_caller(database_url: str) -> None:
    async with shop(database_url) as at:
        victim, _ = await at.payer("1")
        thief, stealing = await at.payer("0")
        for field in ("developerId", "userId", "vaultId", "user_id"):
            told = await stealing.ask("POST", "/api/billing/deduct", at.body("r", **{field: victim.user_id}))
            assert (told.status, told.wrong) == (400, [f"body.{field}"])
        told = await stealing.ask("POST", "/api/billing/deduct", at.body("r", apiKeyId=victim.api_key_id))
        assert (told.status, told.code) == (404, "API_KEY_NOT_FOUND")
        items = {"items": [at.body("r", developerId=victim.user_id)]}
        assert (await stealing.ask("POST", "/api/billing/deduct/bulk", items)).wrong == ["body.items[0].developerId"]
        told = await stealing.ask("POST", "/api/billing/deduct", at.body("r"))
        assert (told.status, told.code) == (402, "INSUFFICIENT_BALANCE")
        assert await at.service.balance(victim) == (parse_usdc("1"), 0)
        assert await at.service.events(victim) == await at.service.events(thief) == []


async def test_what_cannot_be_charged_is_refused_by_its_own_rule(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        paused = await at.service.api("paused", "http://127.0.0.1:9")
        paused_endpoint = await endpoint_of(at.service, paused)
        await apis.set_status(at.service.database, paused, "paused", at.service.context.clock.now())
        other = await at.service.another_key(consumer.user_id, consumer.vault_id)
        database = at.service.database
        await database.execute(
            "UPDATE api_keys SET allowed_apis = $2 WHERE api_key_id = $1", other.api_key_id, [int(paused)]
        )
        revoked = await at.service.another_key(consumer.user_id, consumer.vault_id)
        await database.execute("UPDATE api_keys SET revoked_at = now() WHERE api_key_id = $1", revoked.api_key_id)
        mainnet = await at.service.consumer("0", network="mainnet")
        for body, status, code in (
            (at.body("a", apiId=999_999), 404, "NOT_FOUND"),
            (at.body("a", endpointId=999_999), 404, "NOT_FOUND"),
            (at.body("a", endpointId=paused_endpoint), 404, "NOT_FOUND"),
            (at.body("a", apiId=paused, endpointId=paused_endpoint), 404, "NOT_FOUND"),
            (at.body("a", apiKeyId=other.api_key_id), 403, "API_ACCESS_FORBIDDEN"),
            (at.body("a", apiKeyId=revoked.api_key_id), 404, "API_KEY_NOT_FOUND"),
            (at.body("a", apiKeyId=mainnet.api_key_id), 404, "API_KEY_NOT_FOUND"),
            (at.body("a", apiKeyId=consumer.api_key_id, network="mainnet"), 404, "API_KEY_NOT_FOUND"),
            (at.body("a", network="mainnet"), 404, "VAULT_NOT_FOUND"),
        ):
            told = await someone.ask("POST", "/api/billing/deduct", body)
            assert (told.status, told.code) == (status, code), (body, told)
        await at.service.ledger.registry.ask(consumer.vault_id, SetStanding("suspended"))
        told = await someone.ask("POST", "/api/billing/deduct", at.body("a"))
        assert (told.status, told.code) == (403, "VAULT_SUSPENDED")
        await at.service.ledger.registry.ask(consumer.vault_id, SetStanding("active"))
        # Nothing of this has used the name up, and numbers may come as text.
        body = at.body("a", apiId=str(at.api_id), endpointId=str(at.endpoint_id), apiKeyId=consumer.api_key_id)
        told = await someone.ask("POST", "/api/billing/deduct", at.body("b"))
        assert told.status == 200, told
        told = await someone.ask("POST", "/api/billing/deduct", {**body, "requestId": "c", "network": "testnet"})
        assert told.status == 200, told
        keys = await database.fetch("SELECT api_key_id::text AS key FROM usage_events ORDER BY event_id")
        assert [row["key"] for row in keys] == ["00000000-0000-0000-0000-000000000000", consumer.api_key_id]


async def test_whoever_has_several_vaults_says_which_pays(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        ids, now = at.service.context.ids, at.service.context.clock.now()
        live = await accounts.ensure_vault(
            at.service.database,
            VaultId(ids.uuid7()),
            consumer.user_id,
            "mainnet",
            "free",
            now,
        )
        await at.service.ledger.registry.ask(live, Grant(parse_usdc("2"), "g"))
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r"))
        assert (told.status, told.wrong) == (400, ["body.network"])
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r", network="mainnet"))
        assert told.body["balance_usdc"] == "1.9900000"
        told = await someone.ask("POST", "/api/billing/deduct", at.body("s", apiKeyId=consumer.api_key_id))
        assert told.body["balance_usdc"] == "0.9900000"


async def test_an_amount_that_is_none_is_told_with_everything_else_that_is_wrong(database_url: str) -> None:
    amounts: tuple[object, ...] = ("0", "-1.00", "abc", "1.5.0", "", "0.12345678", "1e2", 0.01, 1, None)
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        for amount in amounts:
            body = {**at.body("r"), "amountUsdc": amount, "requestId": "", "apiId": "x", "network": "Testnet"}
            told = await someone.ask("POST", "/api/billing/deduct", body)
            assert told.status == 400
            assert sorted(told.wrong) == ["body.amountUsdc", "body.apiId", "body.network", "body.requestId"], amount
        for name in ("a/b", "a b", "x" * 256, "ü", "a\n"):
            assert (await someone.ask("POST", "/api/billing/deduct", at.body(name))).wrong == ["body.requestId"]
        assert (await someone.ask("POST", "/api/billing/deduct", at.body("x" * 255))).status == 200
        assert len(await at.service.events(consumer)) == 1


async def test_defect_11_a_refused_deduct_is_never_reported_as_a_success_and_may_be_tried_again(
    database_url: str,
) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("0.02")
        for _ in range(3):
            told = await someone.ask("POST", "/api/billing/deduct", at.body("r", "0.05"))
            assert (told.status, told.code) == (402, "INSUFFICIENT_BALANCE")
            assert told.body["details"] == {"required": "0.0500000", "available": "0.0200000"}
            found = await someone.ask("GET", "/api/billing/request/r")
            assert (found.body["success"], found.body["status"], found.body["usageEventId"]) == (False, "pending", None)
        await at.service.ledger.registry.ask(consumer.vault_id, Grant(parse_usdc("1"), "later"))
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r", "0.05"))
        assert (told.status, told.body["alreadyProcessed"], told.body["balance_usdc"]) == (200, False, "0.9700000")
        found = await someone.ask("GET", "/api/billing/request/r")
        assert (found.body["success"], found.body["status"]) == (True, "captured")


async def test_fifty_identical_deducts_at_once_are_one_charge_and_all_succeed(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        told = await together(50, lambda _: someone.ask("POST", "/api/billing/deduct", at.body("same")))
        assert Counter(each.status for each in told) == {200: 50}
        assert len({each.body["usageEventId"] for each in told}) == 1
        assert sum(not each.body["alreadyProcessed"] for each in told) == 1
        assert await at.service.events(consumer) == [("captured", "deducted", CENT, None)]


async def _ask_either(people: Sequence[Person], body: object, number: int) -> Told:
    return await people[number % len(people)].ask("POST", "/api/billing/deduct", body)


async def test_fifty_identical_deducts_at_two_processes_are_one_charge(database_url: str) -> None:
    async with shop(database_url) as at, running_service(database_url, UNLIMITED) as other, rest_client(other) as there:
        consumer, someone = await at.payer("1")
        people = (someone, Person(there, someone.headers))
        for body in (at.body("a"), at.body("b"), at.body("c")):
            told = await together(50, partial(_ask_either, people, body))
            assert Counter(each.status for each in told) == {200: 50}
            assert len({each.body["usageEventId"] for each in told}) == 1
        assert await at.service.events(consumer) == [("captured", "deducted", CENT, None)] * 3
        assert await at.service.balance(consumer) == (parse_usdc("0.97"), 0)


@pytest.mark.parametrize("processes", [1, 2])
async def test_fifty_different_deducts_spend_what_is_there_and_no_more(database_url: str, processes: int) -> None:
    async with shop(database_url) as at, running_service(database_url, UNLIMITED) as other, rest_client(other) as there:
        consumer, someone = await at.payer("0.20")
        people = [someone, Person(there, someone.headers)][:processes]
        told = await together(
            50, lambda number: people[number % processes].ask("POST", "/api/billing/deduct", at.body(f"r-{number}"))
        )
        assert Counter(each.status for each in told) == {200: 20, 402: 30}
        assert await at.service.balance(consumer) == (0, 0)
        assert await at.service.events(consumer) == [("captured", "deducted", CENT, None)] * 20


async def test_an_unknown_outcome_is_said_to_be_unknown_and_its_retry_is_one_charge(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        store = at.service.ledger.store
        stored = store.commit_round
        silent = [True]

        async def without_an_answer(shares: Sequence[Share]) -> RoundResult:
            result = await stored(shares)
            if silent.pop() if silent else False:
                raise OutcomeUnknown("the answer was lost")
            return result

        store.commit_round = without_an_answer  # type: ignore[method-assign]
        key = {"Idempotency-Key": "k"}
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r"), headers=key)
        assert (told.status, told.code) == (504, "OUTCOME_UNKNOWN")
        found = await someone.ask("GET", "/api/billing/request/r")
        assert (found.body["success"], found.body["status"]) == (False, "held")
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r"), headers=key)
        assert (told.status, told.body["usageEventId"]) == (200, found.body["usageEventId"])
        silent.append(True)
        items = {"items": [at.body("s"), at.body("t")]}
        told = await someone.ask("POST", "/api/billing/deduct/bulk", items, headers={"Idempotency-Key": "b"})
        assert [each["error"] and each["error"]["code"] for each in told.body["results"]] == ["OUTCOME_UNKNOWN", None]
        told = await someone.ask("POST", "/api/billing/deduct/bulk", items, headers={"Idempotency-Key": "b"})
        assert [each["success"] for each in told.body["results"]] == [True, True]
        assert await at.service.events(consumer) == [("captured", "deducted", CENT, None)] * 3


async def test_defect_52_a_success_is_not_wrapped_and_every_problem_has_one_shape(database_url: str) -> None:
    async with shop(database_url) as at:
        _, someone = await at.payer("0.01")
        told = await someone.ask("POST", "/api/billing/deduct", at.body("r"))
        assert "data" not in told.body and "requestId" not in told.body
        for each in (
            await someone.ask("POST", "/api/billing/deduct", at.body("s")),
            await someone.ask("POST", "/api/billing/deduct", {}),
            await someone.ask("GET", "/api/billing/request/x"),
            await someone.ask("POST", "/api/billing/refund", {}),
        ):
            assert each.status >= 400
            assert set(each.body) - {"details"} == {"code", "message", "requestId"}
            assert each.body["requestId"] == each.headers["X-Request-Id"]


async def test_a_bulk_tells_of_each_item_in_order_and_those_that_failed_may_be_sent_again(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("0.03")
        items = [
            at.body("a", "0.02"),
            at.body("b", "0.02"),
            at.body("c", "0.01"),
            at.body("a", "0.02"),
            at.body("a", "0.01"),
            at.body("d", apiId=999_999),
        ]
        key = {"Idempotency-Key": "bulk"}
        told = await someone.ask("POST", "/api/billing/deduct/bulk", {"items": items}, headers=key)
        assert told.status == 200
        results = told.body["results"]
        assert [each["requestId"] for each in results] == ["a", "b", "c", "a", "a", "d"]
        assert [each["success"] for each in results] == [True, False, True, True, False, False]
        assert [each["alreadyProcessed"] for each in results] == [False, False, False, True, False, False]
        codes = [each["error"] and each["error"]["code"] for each in results]
        assert codes == [None, "INSUFFICIENT_BALANCE", None, None, "IDEMPOTENCY_KEY_REUSE_MISMATCH", "NOT_FOUND"]
        assert results[1]["error"]["details"] == {"required": "0.0200000", "available": "0.0100000"}
        await at.service.ledger.registry.ask(consumer.vault_id, Grant(CENT, "more"))
        await at.service.ledger.registry.ask(consumer.vault_id, Grant(CENT, "even more"))
        again = await someone.ask("POST", "/api/billing/deduct/bulk", {"items": items}, headers=key)
        assert [each["success"] for each in again.body["results"]] == [True, True, True, True, False, False]
        assert "Idempotent-Replayed" not in again.headers
        assert await at.service.balance(consumer) == (0, 0)


async def test_a_bulk_has_1_to_100_items_and_every_wrong_one_is_named(database_url: str) -> None:
    async with shop(database_url) as at:
        _, someone = await at.payer("1.02")
        for items in ([], [at.body(str(number)) for number in range(101)]):
            told = await someone.ask("POST", "/api/billing/deduct/bulk", {"items": items})
            assert (told.status, told.wrong) == (400, ["body.items"])
        wrong = [at.body("a", "0"), at.body("b"), at.body("c", more=1)]
        told = await someone.ask("POST", "/api/billing/deduct/bulk", {"items": wrong})
        assert told.wrong == ["body.items[0].amountUsdc", "body.items[2].more"]
        told = await someone.ask(
            "POST", "/api/billing/deduct/bulk", {"items": [at.body(str(number)) for number in range(100)]}
        )
        assert all(each["success"] for each in told.body["results"])


async def test_defect_30_nobody_sees_anothers_requests(database_url: str) -> None:
    async with shop(database_url) as at:
        _, owner = await at.payer("1")
        _, other = await at.payer("1")
        stranger = await person(at.service, at.client)
        assert (await owner.ask("POST", "/api/billing/deduct", at.body("mine"))).status == 200
        absent = await other.ask("GET", "/api/billing/request/no-such")
        for each in (other, stranger):
            told = await each.ask("GET", "/api/billing/request/mine")
            assert (told.status, told.code) == (404, "BILLING_REQUEST_NOT_FOUND")
            assert {**told.body, "requestId": ""} == {**absent.body, "requestId": ""}
            assert (await each.ask("GET", "/api/billing")).body["data"] == []
        for path in ("/api/billing/request/mine", "/api/billing", "/api/billing/credits", "/api/credits"):
            assert (await anonymous(at.client).ask("GET", path)).status == 401


async def test_the_list_pages_through_every_request_once_latest_first(database_url: str) -> None:
    async with shop(database_url) as at:
        _, someone = await at.payer("1")
        names = [f"r-{number}" for number in range(7)]
        for name in names:
            await someone.ask("POST", "/api/billing/deduct", at.body(name))
        # Some of them at the same instant
        await at.service.database.execute(
            "UPDATE billing_requests SET created_at = '2026-01-01' WHERE request_id < 'r-5'"
        )
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query: dict[str, str | int] = {"limit": 2, **({"cursor": cursor} if cursor else {})}
            told = await someone.ask("GET", "/api/billing", query=query)
            seen += [each["requestId"] for each in told.body["data"]]
            assert len(told.body["data"]) <= 2
            cursor = told.body["meta"]["nextCursor"]
            assert told.body["meta"]["hasMore"] == (cursor is not None)
            if cursor is None:
                break
        assert seen == ["r-6", "r-5", "r-0", "r-1", "r-2", "r-3", "r-4"]
        assert told.body["data"][0] == {
            "requestId": "r-4",
            "success": True,
            "status": "captured",
            "usageEventId": told.body["data"][0]["usageEventId"],
            "stellarTxHash": None,
            "alreadyProcessed": True,
            "apiId": at.api_id,
            "endpointId": at.endpoint_id,
            "apiKeyId": None,
            "amountUsdc": "0.0100000",
            "network": "testnet",
            "created_at": "2026-01-01T00:00:00.000Z",
        }
        for bad in ("x", "WzFd", "WzkyMjMzNzIwMzY4NTQ3NzU4MDcsImEiXQ"):
            assert (await someone.ask("GET", "/api/billing", query={"cursor": bad})).wrong == ["query.cursor"]


async def test_credits_show_the_balance_and_what_was_given(database_url: str) -> None:
    async with shop(database_url) as at:
        newcomer = await person(at.service, at.client)
        for path in ("/api/billing/credits", "/api/credits"):
            told = await newcomer.ask("GET", path)
            assert (told.status, told.body["balance_usdc"], told.body["granted_usdc"]) == (
                200,
                "0.0000000",
                "0.0000000",
            )
            assert told.body["user_id"] == newcomer.user_id
            told = await newcomer.ask("GET", path, query={"user_id": "x", "limit": 1})
            assert (told.status, sorted(told.wrong)) == (400, ["query.limit", "query.user_id"])
        consumer, someone = await at.payer("1")
        await someone.ask("POST", "/api/billing/deduct", at.body("r", "0.25"))
        await at.service.ledger.registry.ask(consumer.vault_id, Grant(parse_usdc("3"), "g"))
        told = await someone.ask("GET", "/api/billing/credits")
        assert (told.body["network"], told.body["balance_usdc"]) == ("testnet", "3.7500000")
        assert told.body["granted_usdc"] == "3.0000000"
        assert told.body["created_at"] < told.body["updated_at"]
        told = await someone.ask("GET", "/api/credits", query={"network": "mainnet"})
        assert (told.body["network"], told.body["balance_usdc"]) == ("mainnet", "0.0000000")


# --- operators --------------------------------------------------------------------------------------------------------


async def test_defect_22_a_grant_credits_exactly_its_amount_once(database_url: str) -> None:
    async with shop(database_url) as at:
        someone = await person(at.service, at.client)
        body = {"userId": someone.user_id, "network": "testnet", "amountUsdc": "2.5", "reason": "welcome"}
        path = "/api/admin/billing/credits/grant"
        assert (await at.admin.ask("POST", path, body)).code == "INVALID_IDEMPOTENCY_KEY"
        told = await together(20, lambda _: at.admin.ask("POST", path, body, headers={"Idempotency-Key": "g-1"}))
        assert {each.status for each in told} <= {200, 409}
        assert {each.code for each in told if each.status == 409} <= {"IDEMPOTENCY_IN_PROGRESS"}
        again = await at.admin.ask("POST", path, body, headers={"Idempotency-Key": "g-1"})
        assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
        assert again.body["balance_usdc"] == "2.5000000"
        credit = await someone.ask("GET", "/api/credits")
        assert (credit.body["balance_usdc"], credit.body["granted_usdc"]) == ("2.5000000", "2.5000000")
        # When the stored answer is long forgotten, the entry's own name still tells that it was made.
        await at.service.database.execute("DELETE FROM rest_idempotency")
        again = await at.admin.ask("POST", path, body, headers={"Idempotency-Key": "g-1"})
        assert (again.status, again.body["alreadyProcessed"], again.body["balance_usdc"]) == (200, True, "2.5000000")
        await at.service.database.execute("DELETE FROM rest_idempotency")
        told_other = await at.admin.ask("POST", path, {**body, "amountUsdc": "4"}, headers={"Idempotency-Key": "g-1"})
        assert (told_other.status, told_other.code) == (409, "IDEMPOTENCY_KEY_REUSE_MISMATCH")
        second = await at.admin.ask("POST", path, body, headers={"Idempotency-Key": "g-2"})
        assert second.body["balance_usdc"] == "5.0000000"
        # What was granted can be spent (defect 22: refunds and grants went where nothing could be spent).
        assert (await someone.ask("POST", "/api/billing/deduct", at.body("r", "5"))).status == 200


async def test_a_grant_is_bounded_and_for_a_user_who_exists(database_url: str) -> None:
    async with shop(database_url) as at:
        path, key = "/api/admin/billing/credits/grant", {"Idempotency-Key": "k"}
        body = {
            "userId": "00000000-0000-7000-8000-00000000dead",
            "network": "testnet",
            "amountUsdc": "1",
            "reason": "why",
        }
        assert (await at.admin.ask("POST", path, body, headers=key)).status == 404
        told = await at.admin.ask("POST", path, {**body, "amountUsdc": "1000000000.0000001"}, headers=key)
        assert told.wrong == ["body.amountUsdc"]
        told = await at.admin.ask("POST", path, {"amountUsdc": "0", "reason": "", "network": "x"}, headers=key)
        assert sorted(told.wrong) == ["body.amountUsdc", "body.network", "body.reason", "body.userId"]
        _, someone = await at.payer("1")
        for each in (someone, anonymous(at.client)):
            told = await each.ask("POST", path, {**body, "userId": someone.user_id}, headers=key)
            assert told.status in (401, 403)
        assert await at.service.database.fetch_value("SELECT count(*) FROM ledger_entries WHERE kind = 'grant'") == 0


async def test_refunds_go_to_who_paid_and_never_exceed_the_charge(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, someone = await at.payer("1")
        event_id = (await someone.ask("POST", "/api/billing/deduct", at.body("r", "0.30"))).body["usageEventId"]
        path = "/api/billing/refund"
        body = {"usageEventId": event_id, "amountUsdc": "0.10", "reason": "half of it failed"}

        async def refund(key: str, **other: Any) -> Told:
            asked = {name: value for name, value in {**body, **other}.items() if value is not None}
            return await at.admin.ask("POST", path, asked, headers={"Idempotency-Key": key})

        assert (await at.admin.ask("POST", path, body)).code == "INVALID_IDEMPOTENCY_KEY"
        assert (await someone.ask("POST", path, body, headers={"Idempotency-Key": "k"})).status == 403
        told = await refund("k-1")
        assert (told.status, told.body["amountUsdc"], told.body["balance_usdc"]) == (200, "0.1000000", "0.8000000")
        assert (await refund("k-1")).body == told.body
        told = await refund("k-2", amountUsdc="0.2000001")
        assert (told.status, told.code) == (409, "REFUND_EXCEEDS_CHARGE")
        assert told.body["details"] == {"refundable": "0.2000000"}
        # All that is left, by many at once, under one key and under many
        many = await together(20, lambda number: refund(f"all-{number % 4}", amountUsdc=None))
        given = {each.body["amountUsdc"] for each in many if each.status == 200}
        assert given == {"0.2000000"}
        assert {each.code for each in many if each.status == 409} <= {
            "IDEMPOTENCY_IN_PROGRESS",
            "REFUND_EXCEEDS_CHARGE",
        }
        await at.service.database.execute("DELETE FROM rest_idempotency")
        told = await refund("k-1")
        assert (told.status, told.body["alreadyProcessed"], told.body["amountUsdc"]) == (200, True, "0.1000000")
        await at.service.database.execute("DELETE FROM rest_idempotency")
        assert (await refund("k-1", amountUsdc="0.05")).code == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
        assert await at.service.balance(consumer) == (parse_usdc("1"), 0)
        assert (await refund("k-9", usageEventId="00000000-0000-7000-8000-00000000dead")).status == 404
        assert (await refund("k-8", usageEventId="ffffffff-ffff-7fff-bfff-ffffffffffff")).status == 404
        assert (await refund("k-7", usageEventId="00000000-0000-4000-8000-00000000dead")).status == 404


async def test_a_call_is_refunded_by_its_event_alone(database_url: str) -> None:
    async with shop(database_url) as at:
        async with raw_upstream(answer_uniquely(0)) as upstream:
            await at.service.api("called", upstream.url)
            consumer, _ = await at.payer("1")
            response = await at.client.get("/v1/call/called/x", headers={"X-Api-Key": consumer.api_key})
            assert response.status_code == 200
        event_id = await at.service.database.fetch_value("SELECT event_id::text FROM usage_events")
        told = await at.admin.ask(
            "POST",
            "/api/billing/refund",
            {"usageEventId": event_id, "reason": "wrong data"},
            headers={"Idempotency-Key": "k"},
        )
        assert (told.status, told.body["amountUsdc"]) == (200, "0.0100000")
        assert await at.service.balance(consumer) == (Stroops(parse_usdc("1")), 0)
