"""Subscriptions through HTTP, and through months: W-A2, A36, W-A5, W-A8, W-A17."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import attrs
import pytest
import trio

from callora.actors.registry import VaultRegistry
from callora.actors.subscriptions import CLAIM_SECONDS, Subscriptions
from callora.ledger.commands import Command, Deposit, SetPlan
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import VaultId
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved, Draining, InsufficientFunds, Overloaded, PlanSet
from callora.ledger.quota import month_of
from tests.support.keys import NOBODYS, KeyShop, key_shop
from tests.support.quotas import MovingClock
from tests.support.rest import Person, Told, admin

PRO, ENTERPRISE = "19.0000000", "99.0000000"


@attrs.frozen
class Subscriber:
    """Ada with a vault, and a second process whose clock the test moves."""

    it: KeyShop
    vault_id: VaultId
    clock: MovingClock
    elsewhere: Subscriptions

    async def subscribe(self, plan_id: str = "pro", who: Person | None = None) -> Told:
        """Ask for a plan."""
        return await (who or self.it.ada).ask("POST", "/api/subscriptions", {"planId": plan_id})

    async def subscriptions(self) -> list[dict[str, Any]]:
        """Return Ada's, the latest first."""
        told = await self.it.ada.ask("GET", "/api/subscriptions")
        assert told.status == 200
        return list(told.body["data"])

    async def plan(self) -> str:
        """Return what the vault is on."""
        return str(await self.it.service.database.fetch_value("SELECT plan_id FROM vaults"))

    async def paid(self) -> list[tuple[int, str]]:
        """Return what was taken for subscriptions, in stroops, and for which month."""
        rows = await self.it.service.database.fetch(
            "SELECT amount, ref FROM ledger_entries WHERE kind = 'subscription' ORDER BY seq"
        )
        return [(row["amount"], row["ref"].rpartition(":")[2]) for row in rows]

    async def events(self) -> list[str]:
        """Return what was told of subscriptions, in its order."""
        rows = await self.it.service.database.fetch(
            "SELECT type FROM outbox WHERE type LIKE 'subscription%' AND user_id = $1 ORDER BY created_at, event_id",
            self.it.ada.user_id,
        )
        return [row["type"] for row in rows]

    async def top_up(self, amount: str) -> None:
        """Deposit, once for each amount."""
        moved = await self.it.service.ledger.registry.ask(self.vault_id, Deposit(parse_usdc(amount), f"top {amount}"))
        assert isinstance(moved, BalanceMoved)

    def next_month(self) -> str:
        """Move the clock to the first second of the next month; return its first day."""
        self.clock.shown = month_of(self.clock.shown)[1] + timedelta(seconds=1)
        return f"{self.clock.shown:%Y-%m-%d}"


@asynccontextmanager
async def subscriber(database_url: str, balance: str = "100") -> AsyncIterator[Subscriber]:
    """Open Ada's vault with so much in it; the service's own sweep looks once, before there is anything."""
    async with key_shop(database_url, SUBSCRIPTION_SWEEP_INTERVAL_SECONDS="3600") as it:
        vault_id = VaultId((await it.ada.ask("POST", "/api/vault", {"network": "testnet"})).body["vaultId"])
        clock = MovingClock(it.service.context.clock.now())
        at = Subscriber(it, vault_id, clock, elsewhere(it, clock, it.service.ledger.registry))
        await at.top_up(balance)
        yield at


def elsewhere(it: KeyShop, clock: MovingClock, registry: VaultRegistry) -> Subscriptions:
    """Return the subscriptions of another process."""
    return Subscriptions(
        it.service.database, registry, clock, it.service.context.ids, it.service.context.logs.logger("elsewhere")
    )


@attrs.define
class Failing:
    """A registry that fails before, or after, it carries a command out."""

    real: VaultRegistry
    before: list[object] = attrs.field(factory=list)
    after: list[Exception] = attrs.field(factory=list)

    async def ask(self, vault_id: VaultId, command: Command) -> object:
        """Carry out a command, or not."""
        if isinstance(command, SetPlan) and self.before:
            await trio.lowlevel.checkpoint()
            instead = self.before.pop()
            if isinstance(instead, Exception):
                raise instead
            return instead
        outcome = await self.real.ask(vault_id, command)
        if isinstance(command, SetPlan) and self.after:
            raise self.after.pop()
        return outcome


async def test_wa2_a_plan_is_paid_for_by_the_vault_and_begins_at_once(database_url: str) -> None:
    async with subscriber(database_url, "25") as at:
        told = await at.subscribe()
        start, end = month_of(at.clock.shown)
        assert (told.status, told.body["chargedUsdc"], told.body["status"]) == (201, PRO, "active")
        assert (told.body["paidFrom"][:10], told.body["paidUntil"][:10]) == (f"{start:%Y-%m-%d}", f"{end:%Y-%m-%d}")
        assert (await at.plan(), await at.paid()) == ("pro", [(-190_000_000, f"{start:%Y-%m-%d}")])
        quota = (await at.it.ada.ask("GET", "/api/quotas")).body["data"][0]
        assert (quota["plan"], quota["credits"]["remaining"]) == ("pro", 5000)
        balance = await at.it.ada.ask("GET", "/api/vault/balance")
        assert balance.body["available_usdc"] == "6.0000000"
        statement = await at.it.ada.ask("GET", "/api/vault/statement", query={"kind": "subscription"})
        assert [each["amount_usdc"] for each in statement.body["data"]] == [f"-{PRO}"]

        again = await at.subscribe()
        assert (again.status, again.code) == (409, "CONFLICT")
        short = await at.subscribe("enterprise")
        assert (short.status, short.code) == (402, "INSUFFICIENT_BALANCE")
        assert short.body["details"] == {"required": "80.0000000", "available": "6.0000000"}
        assert [each["planId"] for each in await at.subscriptions()] == ["pro"], "what was refused leaves nothing"
        assert (await at.events(), len(await at.paid())) == (["subscription_started"], 1)


async def test_wa2_without_the_money_there_is_no_plan(database_url: str) -> None:
    async with subscriber(database_url, "18.9999999") as at:
        told = await at.subscribe()
        assert (told.status, told.code) == (402, "INSUFFICIENT_BALANCE")
        assert told.body["details"] == {"required": PRO, "available": "18.9999999"}
        assert (await at.plan(), await at.subscriptions(), await at.paid(), await at.events()) == ("free", [], [], [])
        await at.top_up("0.0000001")
        assert (await at.subscribe()).status == 201


async def test_wa2_only_a_person_who_is_logged_in_subscribes_and_only_to_what_is_sold(database_url: str) -> None:
    async with subscriber(database_url) as at:
        key = await at.it.key()
        token = await at.it.ada.ask("POST", f"/api/keys/{key.body['apiKey']['id']}/tokens", {"ttl": 60})
        for headers in (
            {},
            {"X-Api-Key": key.body["key"]},
            {"Authorization": f"Bearer {key.body['key']}"},
            {"Authorization": f"Bearer {token.body['token']}"},
        ):
            who = Person(at.it.stranger.client, headers)
            assert (await at.subscribe(who=who)).status == 401
            assert (await who.ask("GET", "/api/subscriptions")).status == 401
        for name in ("free", "nothing"):
            told = await at.subscribe(name)
            assert (told.status, told.code) == (404, "PLAN_NOT_FOUND"), "what costs nothing is given by operators"
        assert (await at.subscribe("Not a plan")).wrong == ["body.planId"]
        assert (await at.subscribe(who=at.it.bob)).code == "VAULT_NOT_FOUND"
        mine = (await at.subscribe()).body["id"]
        for path in (mine, NOBODYS):
            assert (await at.it.bob.ask("DELETE", f"/api/subscriptions/{path}")).code == "SUBSCRIPTION_NOT_FOUND"


async def test_wa5_of_ten_who_subscribe_at_once_one_is_charged(database_url: str) -> None:
    async with subscriber(database_url, "1000") as at:
        told: list[Told] = []

        async def one(plan_id: str) -> None:
            told.append(await at.subscribe(plan_id))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one, "pro")
                nursery.start_soon(one, "enterprise")
        made = [each for each in told if each.status == 201]
        assert {each.status for each in told} <= {200, 201, 409}
        living = [each for each in await at.subscriptions() if each["status"] == "active"]
        assert len(living) == 1
        assert await at.plan() == living[0]["planId"]
        charged = sum(parse_usdc(each.body["chargedUsdc"]) for each in made)
        assert -sum(amount for amount, _ in await at.paid()) == charged == parse_usdc(living[0]["priceUsdc"])


async def test_a_dearer_plan_begins_at_once_for_the_difference_and_a_cheaper_one_with_the_next_month(
    database_url: str,
) -> None:
    async with subscriber(database_url, "200") as at:
        await at.subscribe("pro")
        told = await at.subscribe("enterprise")
        assert (told.status, told.body["chargedUsdc"], await at.plan()) == (201, "80.0000000", "enterprise")
        assert [each["status"] for each in await at.subscriptions()] == ["active", "replaced"]

        told = await at.subscribe("pro")
        assert (told.status, told.body["chargedUsdc"], told.body["planId"]) == (200, "0.0000000", "enterprise")
        assert (told.body["nextPlanId"], told.body["nextPriceUsdc"], await at.plan()) == ("pro", PRO, "enterprise")
        assert (await at.subscribe("pro")).code == "CONFLICT"
        assert (await at.subscribe("enterprise")).body["nextPlanId"] is None, "it goes on as it is"
        assert (await at.subscribe("pro")).status == 200

        month = at.next_month()
        await at.elsewhere.sweep()
        assert (await at.plan(), (await at.paid())[-1]) == ("pro", (-190_000_000, month))
        latest = (await at.subscriptions())[0]
        assert (latest["planId"], latest["priceUsdc"], latest["nextPlanId"]) == ("pro", PRO, None)
        assert await at.events() == ["subscription_started", "subscription_started", "subscription_renewed"]


async def test_a_cancelled_one_lasts_as_long_as_it_is_paid_and_can_be_taken_up_again(database_url: str) -> None:
    async with subscriber(database_url) as at:
        path = f"/api/subscriptions/{(await at.subscribe()).body['id']}"
        told = await at.it.ada.ask("DELETE", path)
        assert (told.status, told.body["status"]) == (200, "active")
        assert (await at.it.ada.ask("DELETE", path)).body["cancelledAt"] == told.body["cancelledAt"]
        await at.elsewhere.sweep()
        assert await at.plan() == "pro"
        resumed = await at.subscribe()
        assert (resumed.status, resumed.body["cancelledAt"], len(await at.paid())) == (200, None, 1)

        await at.it.ada.ask("DELETE", path)
        at.next_month()
        await at.elsewhere.sweep()
        ended = (await at.subscriptions())[0]
        assert (ended["status"], await at.plan(), len(await at.paid())) == ("ended", "free", 1)
        assert (await at.it.ada.ask("DELETE", path)).body == ended
        assert await at.events() == ["subscription_started", "subscription_ended"]
        assert (await at.subscribe()).status == 201, "and it can be had anew"


async def test_each_month_is_charged_once_however_many_processes_look(database_url: str) -> None:
    async with subscriber(database_url) as at:
        await at.subscribe()
        others = [elsewhere(at.it, at.clock, at.it.service.ledger.registry) for _ in range(5)]
        for expected in (2, 3):
            at.next_month()
            async with trio.open_nursery() as nursery:
                for each in others:
                    nursery.start_soon(each.sweep)
            assert len(await at.paid()) == expected
        at.next_month()
        month = at.next_month()
        await at.elsewhere.sweep()
        await at.elsewhere.sweep()
        assert ((await at.paid())[-1][1], len(await at.paid())) == (month, 4), "a month nobody served is not paid for"
        assert (await at.events()).count("subscription_renewed") == 3
        await at.it.service.database.execute("UPDATE plans SET price = 1000000000 WHERE plan_id = 'pro'")
        at.next_month()
        await at.elsewhere.sweep()
        assert (await at.paid())[-1][0] == -190_000_000, "the price that was agreed to"


@pytest.mark.parametrize("reason", ["balance", "plan_withdrawn"])
async def test_what_cannot_be_paid_lapses_to_the_free_plan(database_url: str, reason: str) -> None:
    async with subscriber(database_url, "20" if reason == "balance" else "100") as at:
        await at.subscribe()
        if reason == "plan_withdrawn":
            await at.it.service.database.execute("UPDATE plans SET active = false WHERE plan_id = 'pro'")
        at.next_month()
        await at.elsewhere.sweep()
        lapsed = (await at.subscriptions())[0]
        assert (lapsed["status"], await at.plan(), len(await at.paid())) == ("lapsed", "free", 1)
        told = await at.it.service.database.fetch_value(
            "SELECT payload ->> 'reason' FROM outbox WHERE type = 'subscription_lapsed'"
        )
        assert told == reason


async def test_whatever_dies_on_the_way_is_charged_once_and_carried_on(database_url: str) -> None:
    async with subscriber(database_url) as at:
        failing: Any = Failing(at.it.service.ledger.registry)
        dying = elsewhere(at.it, at.clock, failing)
        assert at.it.ada.user_id is not None

        async def subscribe() -> object:
            assert at.it.ada.user_id is not None
            return await dying.subscribe(at.it.ada.user_id, at.vault_id, "pro")

        failing.before = [Overloaded()]
        assert isinstance(await subscribe(), Overloaded)
        assert await at.subscriptions() == []
        failing.after = [StoreUnavailable("the connection was lost")]
        with pytest.raises(OutcomeUnknown):
            await subscribe()
        assert ([each["status"] for each in await at.subscriptions()], len(await at.paid())) == (["pending"], 1)
        assert (await at.subscribe()).code == "CONFLICT", "somebody is at it"
        path = f"/api/subscriptions/{(await at.subscriptions())[0]['id']}"
        assert (await at.it.ada.ask("DELETE", path)).code == "CONFLICT"
        at.clock.shown += timedelta(seconds=CLAIM_SECONDS)
        await at.elsewhere.sweep()
        assert ([each["status"] for each in await at.subscriptions()], len(await at.paid())) == (["active"], 1)

        at.next_month()
        for lost in (Draining(), StoreUnavailable("away")):
            failing.before, failing.after = ([lost], []) if isinstance(lost, Draining) else ([], [lost])
            await dying.sweep()
            assert (await at.subscriptions())[0]["paidUntil"][:10] == f"{month_of(at.clock.shown)[0]:%Y-%m-%d}"
            await at.elsewhere.sweep()
            at.clock.shown += timedelta(seconds=CLAIM_SECONDS)
        await at.elsewhere.sweep()
        assert ((await at.subscriptions())[0]["status"], len(await at.paid())) == ("active", 2)


async def test_what_was_paid_counts_although_the_plan_is_withdrawn_or_the_month_over_meanwhile(
    database_url: str,
) -> None:
    async with subscriber(database_url) as at:
        failing: Any = Failing(at.it.service.ledger.registry)
        dying = elsewhere(at.it, at.clock, failing)
        assert at.it.ada.user_id is not None
        failing.after = [OutcomeUnknown("the connection was lost")]
        with pytest.raises(OutcomeUnknown):
            await dying.subscribe(at.it.ada.user_id, at.vault_id, "pro")
        await at.it.service.database.execute("UPDATE plans SET active = false WHERE plan_id = 'pro'")
        at.clock.shown += timedelta(seconds=CLAIM_SECONDS)
        await at.elsewhere.sweep()
        assert [each["status"] for each in await at.subscriptions()] == ["active"]
        assert isinstance(await dying.set_plan(at.vault_id, "free"), PlanSet)

        await at.it.service.database.execute("UPDATE plans SET active = true WHERE plan_id = 'pro'")
        failing.before = [OutcomeUnknown("not sent")]
        with pytest.raises(OutcomeUnknown):
            await dying.subscribe(at.it.ada.user_id, at.vault_id, "pro")
        at.next_month()
        await at.elsewhere.sweep()
        assert [each["status"] for each in await at.subscriptions()] == ["ended"], "what was never paid is forgotten"
        assert len(await at.paid()) == 1


async def test_an_operators_plan_ends_a_subscription_without_more(database_url: str) -> None:
    async with subscriber(database_url) as at:
        await at.subscribe()
        path = f"/api/admin/vaults/{at.vault_id}/plan"
        told = await admin(at.it.ada.client).ask("PUT", path, {"planId": "nothing"})
        assert (told.code, (await at.subscriptions())[0]["status"]) == ("PLAN_NOT_FOUND", "active")
        assert (await admin(at.it.ada.client).ask("PUT", path, {"planId": "enterprise"})).status == 200
        assert ((await at.subscriptions())[0]["status"], await at.plan()) == ("ended", "enterprise")
        at.next_month()
        await at.elsewhere.sweep()
        assert (await at.plan(), len(await at.paid())) == ("enterprise", 1)


async def test_a_renewal_that_is_due_is_made_before_anything_else(database_url: str) -> None:
    async with subscriber(database_url, "20") as at:
        await at.subscribe()
        at.next_month()
        assert at.it.ada.user_id is not None
        outcome = await at.elsewhere.subscribe(at.it.ada.user_id, at.vault_id, "pro")
        assert isinstance(outcome, InsufficientFunds), "what was paid has ended, and lapsed for want of money"
        assert ((await at.subscriptions())[0]["status"], await at.plan()) == ("lapsed", "free")
