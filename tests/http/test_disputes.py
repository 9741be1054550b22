"""Disputes over REST: what may be disputed and by whom, what operators decide, and who is told."""

import json
from collections import Counter
from typing import Any

import pytest
import trio

from callora.ledger.commands import Command, PlaceHold, Refund
from callora.ledger.ids import DeveloperId, EventId, UserId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.outcomes import HoldPlaced, Overloaded
from callora.store import disputes as store
from tests.proof.books import assert_audit_clean
from tests.simulation.support import CHARGED
from tests.support.client import watchdog
from tests.support.rest import Person, Told, anonymous
from tests.support.service import running_service
from tests.support.shop import UNLIMITED, Shop, shop, together
from tests.support.upstream import raw_upstream, respond

PATH = "/api/billing/disputes"
NOBODYS = "0198c1a2-0000-7000-8000-000000000001"
CENT = parse_usdc("0.01")


async def paid(at: Shop, someone: Person, name: str = "r", amount: str = "0.01") -> str:
    """Return an event that somebody paid for."""
    made = await someone.ask("POST", "/api/billing/deduct", at.body(name, amount))
    assert made.status == 200, made
    return str(made.body["usageEventId"])


async def open_one(someone: Person, event_id: str, **fields: object) -> Told:
    """Dispute an event."""
    return await someone.ask("POST", PATH, {"usage_event_id": event_id, "reason": "It never answered", **fields})


async def disputed(at: Shop, someone: Person, name: str = "r", amount: str = "0.01") -> Any:
    """Return a dispute of a new event."""
    made = await open_one(someone, await paid(at, someone, name, amount))
    assert made.status == 201, made
    return made.body


async def resolve(at: Shop, dispute_id: str, resolution: str = "REFUNDED", **fields: object) -> Told:
    """Decide as an operator."""
    return await at.admin.ask("POST", f"{PATH}/{dispute_id}/resolve", {"resolution": resolution, **fields})


async def refunds(at: Shop) -> list[int]:
    """Return all refunds there are."""
    rows = await at.service.database.fetch("SELECT amount FROM ledger_entries WHERE kind = 'refund' ORDER BY amount")
    return [row["amount"] for row in rows]


async def told_of(at: Shop) -> list[tuple[str, str]]:
    """Return what stands in the outbox of disputes."""
    rows = await at.service.database.fetch(
        "SELECT type, payload ->> 'status' AS status FROM outbox WHERE type LIKE 'dispute%' ORDER BY type, status"
    )
    return [(row["type"], row["status"]) for row in rows]


async def test_defect_23_a_refunded_dispute_gives_back_what_was_paid_and_says_so(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, ada = await at.payer("1")
        event_id = await paid(at, ada, amount="0.25")
        made = await open_one(ada, event_id.upper())
        assert made.status == 201
        dispute_id = made.body["id"]
        assert made.body == {
            "id": dispute_id,
            "usageEventId": event_id,
            "network": "testnet",
            "vaultId": consumer.vault_id,
            "apiId": at.api_id,
            "endpointId": at.endpoint_id,
            "amountUsdc": "0.2500000",
            "reason": "It never answered",
            "status": "OPEN",
            "notes": None,
            "refundedUsdc": None,
            "createdAt": made.body["createdAt"],
            "decidedAt": None,
            "resolvedAt": None,
        }
        assert (await ada.ask("GET", "/api/refunds")).body["refunds"] == []
        done = await resolve(at, dispute_id, notes="The upstream was down")
        assert done.status == 200, done
        assert await at.service.balance(consumer) == (parse_usdc("1"), 0)
        shown = (await ada.ask("GET", f"{PATH}/{dispute_id}")).body
        dispute = shown["dispute"]
        assert (dispute["status"], dispute["refundedUsdc"], dispute["notes"]) == (
            "REFUNDED",
            "0.2500000",
            "The upstream was down",
        )
        assert dispute["decidedAt"] <= dispute["resolvedAt"]
        more = {"userId": consumer.user_id, "refundableUsdc": "0.0000000", "decidedBy": "admin-key"}
        assert done.body == {**dispute, **more, "developerId": done.body["developerId"]}
        assert [(each["type"], each["resolution"], each["notes"], each["amountUsdc"]) for each in shown["events"]] == [
            ("opened", None, None, None),
            ("decided", "REFUNDED", "The upstream was down", None),
            ("refunded", None, None, "0.2500000"),
        ]
        listed = (await ada.ask("GET", "/api/refunds")).body
        assert (listed["refunds"], listed["total"]) == ([dispute], 1)
        assert (await ada.ask("GET", PATH)).body["disputes"] == [dispute]
        # One for who paid and one for the developer, each time.
        assert await told_of(at) == [("dispute_opened", "OPEN")] * 2 + [("dispute_resolved", "REFUNDED")] * 2


async def test_what_cannot_be_disputed_says_why(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, ada = await at.payer("1")
        _, bob = await at.payer("1")
        event_id = await paid(at, ada)
        for wrong, field in (
            ({"usage_event_id": "x"}, "usage_event_id"),
            ({"usage_event_id": 1}, "usage_event_id"),
            ({"reason": ""}, "reason"),
            ({"reason": "x" * 1001}, "reason"),
            ({"reason": None}, "reason"),
            ({"userId": consumer.user_id}, "userId"),
        ):
            assert (await open_one(ada, event_id, **wrong)).wrong == [f"body.{field}"]
        assert (await ada.ask("POST", PATH, {})).wrong == ["body.usage_event_id", "body.reason"]
        assert (await open_one(bob, event_id)).code == "NOT_FOUND"
        assert (await open_one(ada, NOBODYS)).code == "NOT_FOUND"
        assert (await open_one(anonymous(at.client), event_id)).status == 401

        registry, context = at.service.ledger.registry, at.service.context
        held = EventId(context.ids.uuid7())
        assert isinstance(
            await registry.ask(consumer.vault_id, PlaceHold(held, Stroops(1), 60, CHARGED)),
            HoldPlaced,
        )
        uncharged = await open_one(ada, held)
        assert (uncharged.status, uncharged.code) == (409, "NOTHING_TO_REFUND")
        back = await paid(at, ada, "given-back")
        await registry.ask(consumer.vault_id, Refund(EventId(back), CENT, "operator"))
        assert (await open_one(ada, back)).code == "NOTHING_TO_REFUND"
        assert await told_of(at) == []

        first = await open_one(ada, event_id, reason="x" * 1000)
        assert first.status == 201
        again = await open_one(ada, event_id)
        assert (again.status, again.code) == (409, "DISPUTE_EXISTS")
        assert again.body["details"] == {"disputeId": first.body["id"], "status": "OPEN"}
        assert (await resolve(at, first.body["id"], "UPHELD")).status == 200
        after = await open_one(ada, event_id)
        assert (after.code, after.body["details"]["status"]) == ("DISPUTE_EXISTS", "UPHELD"), "one an event, for good"


async def test_a_call_through_the_proxy_is_disputed_like_any_charge(database_url: str) -> None:
    async with raw_upstream(respond()) as upstream, shop(database_url) as at:
        await at.service.api("called", upstream.url)
        consumer, ada = await at.payer("1")
        called = await at.client.get("/v1/call/called/x", headers=dict(consumer.headers))
        assert called.status_code == 200
        (call,) = (await ada.ask("GET", "/api/usage")).body["events"]
        made = await open_one(ada, call["id"])
        assert (made.status, made.body["amountUsdc"]) == (201, "0.0100000")
        assert (await resolve(at, made.body["id"])).body["status"] == "REFUNDED"
        assert await at.service.balance(consumer) == (parse_usdc("1"), 0)


async def test_what_is_somebody_elses_is_not_there_and_operators_alone_decide(database_url: str) -> None:
    async with shop(database_url) as at:
        _, ada = await at.payer("1")
        _, bob = await at.payer("1")
        made = await disputed(at, ada)
        dispute_id = made["id"]
        assert (await bob.ask("GET", f"{PATH}/{dispute_id}")).code == "DISPUTE_NOT_FOUND"
        assert (await ada.ask("GET", f"{PATH}/{NOBODYS}")).code == "DISPUTE_NOT_FOUND"
        assert (await ada.ask("GET", f"{PATH}/x")).wrong == ["path.disputeId"]
        for path, field in ((PATH, "disputes"), ("/api/refunds", "refunds")):
            listed = (await bob.ask("GET", path)).body
            assert (listed[field], listed["total"], listed["meta"]["hasMore"]) == ([], 0, False)
            assert (await anonymous(at.client).ask("GET", path)).status == 401
        for someone in (ada, bob, anonymous(at.client)):
            assert (await someone.ask("GET", f"{PATH}/admin/all")).status in (401, 403)
            told = await someone.ask("POST", f"{PATH}/{dispute_id}/resolve", {"resolution": "REFUNDED"})
            assert told.status in (401, 403)
        for fields, wrong in (
            ({"resolution": "OPEN"}, "resolution"),
            ({"resolution": "REFUNDING"}, "resolution"),
            ({"notes": ""}, "notes"),
            ({"notes": "x" * 1001}, "notes"),
            ({"amountUsdc": "1"}, "amountUsdc"),
        ):
            assert (await resolve(at, dispute_id, **{"resolution": "UPHELD", **fields})).wrong == [f"body.{wrong}"]
        assert (await resolve(at, NOBODYS)).code == "DISPUTE_NOT_FOUND"
        upheld = await resolve(at, dispute_id, "UPHELD", notes="It answered")
        assert (upheld.status, upheld.body["status"], upheld.body["refundableUsdc"]) == (200, "UPHELD", "0.0100000")
        for resolution in ("UPHELD", "REFUNDED"):
            again = await resolve(at, dispute_id, resolution)
            assert (again.status, again.code) == (409, "DISPUTE_RESOLVED")
            assert again.body["details"] == {"status": "UPHELD"}
        assert await refunds(at) == []
        assert await told_of(at) == [("dispute_opened", "OPEN")] * 2 + [("dispute_resolved", "UPHELD")] * 2
        audit = (await at.admin.ask("GET", "/api/admin/audit", query={"action": "resolve_dispute"})).body["data"]
        assert Counter(each["status"] for each in audit) == {200: 1, 400: 5, 401: 1, 403: 2, 404: 1, 409: 2}
        (done,) = [each for each in audit if each["status"] == 200]
        assert done["target"] == dispute_id
        assert done["details"] == {"disputeId": dispute_id, "resolution": "UPHELD", "notes": "It answered"}
        looked = (await at.admin.ask("GET", "/api/admin/audit", query={"action": "list_all_disputes"})).body["data"]
        assert sorted(each["status"] for each in looked) == [401, 403, 403]


async def test_what_was_refunded_otherwise_is_given_back_once_and_can_be_upheld(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, ada = await at.payer("1")
        part, whole = await disputed(at, ada, "part", "0.1"), await disputed(at, ada, "whole", "0.2")
        for made, amount in ((part, "0.04"), (whole, "0.2")):
            body = {"usageEventId": made["usageEventId"], "amountUsdc": amount, "reason": "sorry"}
            key = {"Idempotency-Key": amount}
            assert (await at.admin.ask("POST", "/api/billing/refund", body, headers=key)).status == 200
        done = await resolve(at, part["id"])
        assert (done.status, done.body["refundedUsdc"]) == (200, "0.0600000")
        refused = await resolve(at, whole["id"])
        assert (refused.status, refused.code) == (409, "NOTHING_TO_REFUND")
        assert (await resolve(at, whole["id"], "UPHELD")).status == 200
        assert await at.service.balance(consumer) == (parse_usdc("1"), 0)


async def test_lists_are_paged_counted_and_filtered(database_url: str) -> None:
    async with shop(database_url) as at:
        _, ada = await at.payer("1")
        _, bob = await at.payer("1")
        ids = [(await disputed(at, ada, f"r-{number}"))["id"] for number in range(5)]
        bobs = (await disputed(at, bob))["id"]
        for dispute_id in ids[:2]:
            assert (await resolve(at, dispute_id)).status == 200
        assert (await resolve(at, ids[2], "UPHELD")).status == 200

        async def walk(someone: Person, path: str, field: str = "disputes", **query: str | int) -> list[str]:
            found: list[str] = []
            while True:
                page = (await someone.ask("GET", path, query={"limit": 2, **query})).body
                found += [each["id"] for each in page[field]]
                if not page["meta"]["hasMore"]:
                    assert page["total"] == len(found)
                    return found
                query["cursor"] = page["meta"]["nextCursor"]

        assert await walk(ada, PATH) == ids[::-1]
        assert await walk(ada, "/api/refunds", "refunds") == [ids[1], ids[0]]
        assert await walk(at.admin, f"{PATH}/admin/all") == [bobs, *ids[::-1]]
        for status, expected in (("OPEN", [bobs, ids[4], ids[3]]), ("REFUNDED", [ids[1], ids[0]]), ("REFUNDING", [])):
            assert await walk(at.admin, f"{PATH}/admin/all", status=status) == expected
        told = await at.admin.ask("GET", f"{PATH}/admin/all", query={"status": "open", "limit": 101})
        assert sorted(told.wrong) == ["query.limit", "query.status"]
        assert (await ada.ask("GET", PATH, query={"cursor": "x"})).wrong == ["query.cursor"]


@pytest.mark.parametrize("processes", [1, 2])
async def test_of_many_operators_at_once_one_decides(database_url: str, processes: int) -> None:
    async with shop(database_url) as at, running_service(database_url, UNLIMITED) as other:
        consumer, ada = await at.payer("1")
        urls = [at.service.url, other.url][:processes]
        upheld = 0
        for turn in range(5):
            made = await disputed(at, ada, f"r-{turn}")

            async def decide(number: int, dispute_id: str = made["id"]) -> Told:
                path = f"{urls[number % processes]}{PATH}/{dispute_id}/resolve"
                return await at.admin.ask("POST", path, {"resolution": ("REFUNDED", "UPHELD")[number // 2 % 2]})

            told = await together(16, decide)
            assert Counter(each.status for each in told) == {200: 1, 409: 15}
            (won,) = [each.body["status"] for each in told if each.status == 200]
            upheld += won == "UPHELD"
            assert (await ada.ask("GET", f"{PATH}/{made['id']}")).body["dispute"]["status"] == won
        assert await refunds(at) == [CENT] * (5 - upheld)
        assert (await at.service.balance(consumer))[0] == parse_usdc("1") - upheld * CENT
        assert len(await told_of(at)) == 20


async def test_a_refund_that_cannot_be_booked_now_is_accepted_and_booked_by_whoever_serves_next(
    database_url: str,
) -> None:
    async with shop(database_url) as at:
        consumer, ada = await at.payer("1")
        made = await disputed(at, ada)
        registry: Any = at.service.ledger.registry
        asked = registry.ask

        async def overloaded(vault_id: Any, command: Command) -> object:
            if isinstance(command, Refund):
                await trio.lowlevel.checkpoint()
                return Overloaded()
            return await asked(vault_id, command)

        registry.ask = overloaded
        told = await resolve(at, made["id"])
        assert (told.status, told.body["status"], told.body["refundedUsdc"]) == (202, "REFUNDING", None)
        shown = (await ada.ask("GET", f"{PATH}/{made['id']}")).body
        assert (shown["dispute"]["status"], shown["dispute"]["resolvedAt"]) == ("REFUNDING", None)
        assert [each["type"] for each in shown["events"]] == ["opened", "decided"]
        assert (await resolve(at, made["id"])).body["details"] == {"status": "REFUNDING"}
        assert await refunds(at) == []
        # The start of another process carries it out.
        async with running_service(database_url, UNLIMITED):
            with watchdog("the pass at the start"):
                while (await ada.ask("GET", f"{PATH}/{made['id']}")).body["dispute"]["status"] != "REFUNDED":
                    pass
        assert await refunds(at) == [CENT]
        assert await at.service.balance(consumer) == (parse_usdc("1"), 0)
        assert (await told_of(at)).count(("dispute_resolved", "REFUNDED")) == 2


async def test_who_paid_and_the_developer_hear_of_it_by_webhook_and_who_is_both_hears_once(database_url: str) -> None:
    async with (
        raw_upstream(respond(204)) as receiver,
        shop(database_url, WEBHOOK_POLL_INTERVAL_MS="10") as at,
    ):
        consumer, ada = await at.payer("1")
        row = await at.service.database.fetch_row(
            "SELECT d.developer_id, d.user_id FROM developers d JOIN apis a USING (developer_id) WHERE a.api_id = $1",
            at.api_id,
        )
        assert row is not None
        developer_id, owner = DeveloperId(str(row["developer_id"])), UserId(str(row["user_id"]))
        developer = Person(at.client, {"X-User-Id": owner}, owner)
        events = ["dispute.opened", "dispute.resolved"]
        for someone, path in ((ada, "/ada"), (developer, "/developer")):
            made = await someone.ask("POST", "/api/webhooks", {"url": receiver.url + path, "events": events})
            assert (made.status, made.body["events"]) == (201, events)
        dispute = await disputed(at, ada)
        assert (await resolve(at, dispute["id"], notes="n")).status == 200
        with watchdog("four messages"):
            while len(receiver.requests) < 4:  # noqa: ASYNC110 - another task's socket
                await trio.sleep(0.01)
        said: dict[str, list[Any]] = {"/ada": [], "/developer": []}
        for request in receiver.requests:
            said[request.target].append(json.loads(request.body))
        for path, whose in (("/ada", None), ("/developer", developer_id)):
            assert [each["event"] for each in said[path]] == events, "in order"
            assert [each.get("developerId") for each in said[path]] == [whose] * 2
            opened, resolved = (dict(each["data"]) for each in said[path])
            assert opened.pop("vaultId", None) == (consumer.vault_id if path == "/ada" else None)
            assert opened == {
                "disputeId": dispute["id"],
                "usageEventId": dispute["usageEventId"],
                "apiId": at.api_id,
                "endpointId": at.endpoint_id,
                "amountUsdc": "0.0100000",
                "reason": "It never answered",
                "status": "OPEN",
                "notes": None,
                "refundedUsdc": None,
            }
            assert (resolved["status"], resolved["notes"], resolved["refundedUsdc"]) == ("REFUNDED", "n", "0.0100000")

        # The developer calls his own API, pays for it, and disputes that.
        assert (await developer.ask("POST", "/api/vault", {"network": "testnet"})).status in (200, 201)
        grant = {"userId": owner, "network": "testnet", "amountUsdc": "1", "reason": "x"}
        key = {"Idempotency-Key": "k"}
        assert (await at.admin.ask("POST", "/api/admin/billing/credits/grant", grant, headers=key)).status == 200
        own = await disputed(at, developer)
        rows = await at.service.database.fetch("SELECT subject FROM outbox WHERE subject LIKE $1", f"{own['id']}%")
        assert [each["subject"] for each in rows] == [own["id"]]


async def test_a_decision_whose_process_is_gone_is_carried_out_at_the_next_start(database_url: str) -> None:
    async with shop(database_url) as at:
        consumer, ada = await at.payer("1")
        made = await disputed(at, ada)
        async with at.service.database.transaction() as connection:
            now = at.service.context.clock.now()
            assert await store.decide(connection, made["id"], "REFUNDING", None, now, "admin-key") is not None
    async with running_service(database_url, UNLIMITED) as service:
        with watchdog("the pass at the start"):
            while not await service.database.fetch_value(
                "SELECT EXISTS (SELECT FROM disputes WHERE status = 'REFUNDED')"
            ):
                pass
        assert await service.balance(consumer) == (parse_usdc("1"), 0)
        await assert_audit_clean(service.database)
