"""Requests for credits through HTTP, and the notices of used-up ones: A36, W-A4, W-A18."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import trio

from callora.actors import quota_notices
from callora.actors.quota_notices import QuotaNotices
from callora.actors.quota_requests import GIVEN, LEFT_BEHIND, OPEN_MAX, DecidedOtherwise, QuotaRequests
from callora.ledger.commands import Command
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import VaultId
from callora.ledger.quota import month_of
from tests.support.keys import NOBODYS, KeyShop, key_shop
from tests.support.quotas import MovingClock, burn, give
from tests.support.rest import Person, Told, admin

REASON = "A launch next week"


async def ask(it: KeyShop, who: Person | None = None, /, **fields: object) -> Told:
    """Ask for credits."""
    return await (who or it.ada).ask("POST", "/api/quotas/requests", {"credits": 1000, "reason": REASON, **fields})


async def decide(it: KeyShop, request_id: str, word: str, **fields: object) -> Told:
    """Decide on a request, as an operator."""
    return await admin(it.ada.client).ask("POST", f"/api/admin/quota-requests/{request_id}/{word}", fields)


async def remaining(it: KeyShop) -> int:
    """Return what is left of the credits of Ada's only vault."""
    quota: Any = (await it.ada.ask("GET", "/api/quotas")).body["data"][0]
    return int(quota["credits"]["remaining"])


async def vault_of(it: KeyShop) -> VaultId:
    """Open a vault of Ada's."""
    return VaultId((await it.ada.ask("POST", "/api/vault", {"network": "testnet"})).body["vaultId"])


async def told(it: KeyShop, kinds: str) -> Sequence[tuple[str, str]]:
    """Return the types and subjects of what was told."""
    rows = await it.service.database.fetch(
        "SELECT type, subject FROM outbox WHERE type LIKE $1 ORDER BY created_at, event_id", kinds
    )
    return [(row["type"], row["subject"]) for row in rows]


async def test_a_request_is_asked_for_seen_and_approved_once(database_url: str) -> None:
    async with key_shop(database_url) as it:
        assert (await ask(it)).code == "VAULT_NOT_FOUND"
        await vault_of(it)
        made = await ask(it)
        assert (made.status, made.body["status"], made.body["credits"]) == (201, "open", 1000)
        request_id = made.body["id"]
        assert (await it.ada.ask("GET", "/api/quotas/requests")).body["data"] == [made.body]
        assert (await it.bob.ask("GET", "/api/quotas/requests")).body["data"] == []
        for someone in (it.ada, it.bob, it.stranger):
            answer = await someone.ask("POST", f"/api/admin/quota-requests/{request_id}/approve", {})
            assert answer.status in (401, 403)
        assert await remaining(it) == 100

        answers: list[Told] = []

        async def approve() -> None:
            answers.append(await decide(it, request_id, "approve"))

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(approve)
        assert [each.status for each in answers] == [200] * 6
        first = answers[0].body
        assert all(each.body == first for each in answers), "two operators at once decide one thing"
        assert (first["creditsGranted"], first["decidedBy"], first["userId"]) == (1000, "admin-key", it.ada.user_id)
        assert await remaining(it) == 1100
        grants = await it.service.database.fetch("SELECT source, ref, amount FROM quota_grants WHERE source <> 'plan'")
        assert [dict(row) for row in grants] == [{"source": "promo", "ref": f"request:{request_id}", "amount": 1000}]

        assert (await decide(it, request_id, "approve", credits=1001)).code == "CONFLICT"
        assert (await decide(it, request_id, "reject")).code == "CONFLICT"
        assert (await decide(it, NOBODYS, "approve")).code == "QUOTA_REQUEST_NOT_FOUND"
        assert (await decide(it, NOBODYS, "reject")).code == "QUOTA_REQUEST_NOT_FOUND"
        assert await told(it, "quota_request%") == [
            ("quota_request_made", request_id),
            ("quota_request_approved", request_id),
        ]
        audit = await admin(it.ada.client).ask("GET", "/api/admin/audit", query={"action": "approve_quota_request"})
        assert [each["status"] for each in audit.body["data"]] == [404, 409, *[200] * 6, 401, 403, 403]


async def test_an_approval_may_give_other_numbers_and_a_rejection_its_reason(database_url: str) -> None:
    async with key_shop(database_url) as it:
        await vault_of(it)
        first, second = (await ask(it)).body["id"], (await ask(it)).body["id"]
        ends = (it.service.context.clock.now() + timedelta(days=7)).isoformat()
        given = await decide(it, first, "approve", credits=250, expiresAt=ends)
        assert (given.status, given.body["creditsGranted"], given.body["expiresAt"][:19]) == (200, 250, ends[:19])
        assert (await decide(it, first, "approve", credits=250, expiresAt=ends)).body == given.body
        assert await remaining(it) == 350
        refused = await decide(it, second, "reject", reason="Subscribe instead")
        assert (refused.status, refused.body["status"], refused.body["answer"]) == (
            200,
            "rejected",
            "Subscribe instead",
        )
        assert (await decide(it, second, "reject")).body == refused.body
        assert (await decide(it, second, "approve")).code == "CONFLICT"
        mine = (await it.ada.ask("GET", "/api/quotas/requests")).body["data"]
        assert [(each["status"], each["answer"]) for each in mine] == [
            ("rejected", "Subscribe instead"),
            ("approved", None),
        ]
        assert "decidedBy" not in mine[0]

        async def listed(**query: str | int) -> list[str]:
            page = await admin(it.ada.client).ask("GET", "/api/admin/quota-requests", query=query)
            return [each["id"] for each in page.body["data"]]

        assert await listed() == [second, first]
        assert (await listed(status="approved"), await listed(status="open")) == ([first], [])
        page = await admin(it.ada.client).ask("GET", "/api/admin/quota-requests", query={"limit": 1})
        assert await listed(limit=1, cursor=page.body["meta"]["nextCursor"]) == [first]
        assert (await admin(it.ada.client).ask("GET", "/api/admin/quota-requests", query={"status": "x"})).status == 400


async def test_a_vault_has_so_many_undecided_requests_and_each_has_bounds(database_url: str) -> None:
    async with key_shop(database_url) as it:
        await vault_of(it)
        for field, value in (
            ("credits", 0),
            ("credits", 10**12 + 1),
            ("credits", "5"),
            ("reason", "too short"),
            ("reason", "x" * 1001),
            ("network", "moon"),
            ("plan", "pro"),
        ):
            assert (await ask(it, **{field: value})).wrong == [f"body.{field}"]
        answers: list[Told] = []

        async def one() -> None:
            answers.append(await ask(it))

        async with trio.open_nursery() as nursery:
            for _ in range(OPEN_MAX + 4):
                nursery.start_soon(one)
        assert sorted(each.status for each in answers) == [201] * OPEN_MAX + [409] * 4
        request_id = next(each.body["id"] for each in answers if each.status == 201)
        for field, value in (("credits", 0), ("expiresAt", "2020-01-01"), ("expiresAt", "2099-01-01")):
            assert (await decide(it, request_id, "approve", **{field: value})).wrong == [f"body.{field}"]
        assert (await decide(it, request_id, "reject", reason="")).wrong == ["body.reason"]
        assert (await decide(it, request_id, "reject")).status == 200
        assert (await ask(it)).status == 201, "a decided one makes room"
        await it.ada.ask("POST", "/api/vault", {"network": "mainnet"})
        assert (await ask(it, network="mainnet")).status == 201, "a vault has its own"


class Dying:
    """A registry that loses its process when it has carried a command out, or before."""

    def __init__(self, it: KeyShop, *, sends: bool) -> None:
        self._it = it
        self._sends = sends

    async def ask(self, vault_id: VaultId, command: Command) -> object:
        """Lose the answer."""
        await trio.lowlevel.checkpoint()
        if self._sends:
            await self._it.service.ledger.registry.ask(vault_id, command)
        raise StoreUnavailable("the process died")


async def test_what_was_approved_by_who_died_at_it_is_given_once(database_url: str) -> None:
    async with key_shop(database_url, SUBSCRIPTION_SWEEP_INTERVAL_SECONDS="3600") as it:
        await vault_of(it)
        clock = MovingClock(it.service.context.clock.now())

        def requests(registry: Any) -> QuotaRequests:
            service = it.service
            log = service.context.logs.logger("elsewhere")
            return QuotaRequests(service.database, registry, clock, service.context.ids, log)

        ids = [str((await ask(it)).body["id"]) for _ in range(3)]
        for request_id, sends in zip(ids, (True, False, False), strict=True):
            try:
                await requests(Dying(it, sends=sends)).approve(request_id, None, None, "somebody")
            except OutcomeUnknown:
                continue
        living = requests(it.service.ledger.registry)
        await living.sweep()
        assert await told(it, "quota_request_approved") == [], "perhaps somebody is still at it"
        assert not isinstance(await living.approve(ids[2], 1000, None, "another"), DecidedOtherwise)
        clock.shown += LEFT_BEHIND
        await living.sweep()
        await living.sweep()
        assert await remaining(it) == 3100
        assert sorted(subject for _, subject in await told(it, "quota_request_approved")) == sorted(ids)

        late = str((await ask(it)).body["id"])
        try:
            await requests(Dying(it, sends=False)).approve(late, None, None, "somebody")
        except OutcomeUnknown:
            clock.shown += GIVEN
        await living.sweep()
        assert await remaining(it) == 3100, "what has ended before it could be given is not given"


async def test_an_owner_hears_once_a_month_of_each_threshold_that_is_reached(database_url: str) -> None:
    async with key_shop(database_url, QUOTA_NOTICE_INTERVAL_SECONDS="86400") as it:
        vault_id = await vault_of(it)
        clock = MovingClock(it.service.context.clock.now())
        month = f"{month_of(clock.shown)[0]:%Y-%m}"
        notices = QuotaNotices(it.service.database, clock, it.service.context.ids, interval_seconds=60)
        await it.service.database.execute("UPDATE quota_watch SET due_at = '-infinity'")

        async def heard() -> list[int]:
            clock.shown += timedelta(seconds=60)
            await notices.sweep()
            return sorted(int(subject.rpartition(":")[2]) for _, subject in await told(it, "quota_threshold"))

        assert await heard() == [], "nothing was called"
        await burn(it.service, vault_id, 79)
        assert await heard() == []
        await burn(it.service, vault_id, 1)
        assert (await heard(), await heard()) == ([80], [80])
        await burn(it.service, vault_id, 20)
        assert await heard() == [80, 95, 100]
        await give(it.service, vault_id, 900, "more")
        await burn(it.service, vault_id, 700)
        assert await heard() == [80, 95, 100], "once a month"
        rows = await it.service.database.fetch(
            "SELECT subject, user_id::text AS user_id, payload ->> 'creditsRemaining' AS remaining FROM outbox"
            " WHERE type = 'quota_threshold' ORDER BY (payload ->> 'threshold')::int"
        )
        assert {row["user_id"] for row in rows} == {it.ada.user_id}
        assert rows[0]["subject"] == f"{vault_id}:{month}:80"
        assert [row["remaining"] for row in rows] == ["20", "0", "0"]


async def test_notices_are_walked_in_batches_by_one_process_at_a_time(database_url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(quota_notices, "BATCH", 2)
    async with key_shop(database_url, QUOTA_NOTICE_INTERVAL_SECONDS="86400") as it:
        vaults = [(await it.service.consumer("0")).vault_id for _ in range(7)]
        for each in vaults:
            assert await burn(it.service, each, 50_000) == "paid"
        await it.service.consumer("0")
        clock = MovingClock(it.service.context.clock.now())
        await it.service.database.execute("UPDATE quota_watch SET due_at = '-infinity'")
        looks = [
            QuotaNotices(it.service.database, clock, it.service.context.ids, interval_seconds=60) for _ in range(4)
        ]
        async with trio.open_nursery() as nursery:
            for look in looks:
                nursery.start_soon(look.sweep)
        subjects = [subject for _, subject in await told(it, "quota_threshold")]
        assert len(subjects) == len(set(subjects)) == 21
        assert {subject.partition(":")[0] for subject in subjects} == set(vaults)
