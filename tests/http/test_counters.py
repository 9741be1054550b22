"""Counters over HTTP: accounts, what is pushed for them, the quarantine, and what arrears mean to who calls.

By the numbers of the statements: C21, C26, W-C9, W-C14; others of them in tests/actors/test_rating.py.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import trio

from callora.actors.arrears import Arrears
from callora.ledger.commands import Deposit
from callora.ledger.ids import VaultId
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store.audit import audit
from callora.store.rollup import rebuild
from tests.simulation.support import QUIET
from tests.support.client import watchdog
from tests.support.counters import subject
from tests.support.keys import NOBODYS, KeyShop, key_shop
from tests.support.quotas import MovingClock
from tests.support.rest import SERVICE_TOKEN, Person, Told, admin, biller

ACCOUNTS = "/api/admin/counter-accounts"
QUARANTINE = "/api/admin/quarantined-samples"


@attrs.frozen
class Metered:
    """A service with a meter source, someone who pays, and an operator."""

    it: KeyShop
    operator: Person
    exporter: Person
    key: str
    vault_id: VaultId

    async def push(self, at: datetime, *samples: tuple[int, int, int]) -> Told:
        """Push what subjects' counters stand at."""
        body = {
            "node_id": "n-1",
            "env": "prod",
            "collected_at": at.isoformat(),
            "samples": [
                {
                    "uuid": subject(number),
                    "inbound_tag": "in",
                    "uplink_bytes_total": up,
                    "downlink_bytes_total": down,
                }
                for number, up, down in samples
            ],
        }
        return await self.exporter.ask("POST", "/v1/ingest/snapshots", body)

    async def account(self, number: int = 1, **fields: object) -> Told:
        """Make an account."""
        return await self.operator.ask(
            "POST", ACCOUNTS, {"vaultId": self.vault_id, "subject": subject(number), "unitPriceUsdc": "0.001", **fields}
        )

    async def vault(self) -> Any:
        """Return the payer's vault."""
        return (await self.it.ada.ask("GET", "/api/vaults")).body["data"][0]

    async def deposit(self, amount: str, ref: str) -> None:
        """Pay in."""
        outcome = await self.it.service.ledger.registry.ask(self.vault_id, Deposit(parse_usdc(amount), ref))
        assert isinstance(outcome, BalanceMoved)

    async def until(self, wanted: str) -> None:
        """Return when a call comes to this: standings reach the gateway with the catalogue."""
        with watchdog(wanted):
            while await self.it.outcome(self.key) != wanted:  # noqa: ASYNC110 - the gateway sets no event
                await trio.sleep(0.01)


@asynccontextmanager
async def metered(database_url: str) -> AsyncIterator[Metered]:
    settings = {"INTERNAL_SERVICE_TOKEN": SERVICE_TOKEN, "EXPORTER_TOKEN_ONE": "t", "COLLECT_INTERVAL": "24h"}
    async with key_shop(database_url, BILLING_INGEST_MODE="push", **settings) as it:
        made = await it.key()
        client = it.ada.client
        source = {
            "source_id": "s-1",
            "base_url": "http://127.0.0.1:9",
            "expected_node_id": "n-1",
            "expected_env": "prod",
            "credential_env": "EXPORTER_TOKEN_ONE",
        }
        added = await admin(client).ask("POST", "/api/admin/meter-sources", source)
        assert added.status == 201, added.body
        vault_id = VaultId(made.body["apiKey"]["vaultId"])
        yield Metered(it, admin(client), biller(client), made.body["key"], vault_id)
        found = await audit(it.service.database, it.service.context.clock.now())
        assert [each.rule for each in found if each.wrong] == []


async def test_an_account_is_made_shown_changed_and_given_units(database_url: str) -> None:
    async with metered(database_url) as at:
        made = await at.account(name="Ada's line", includedUnits=5, regionMultiplier="1.2", lineMultiplier="2")
        assert made.status == 201, made.body
        shown = made.body
        assert {
            name: shown[name] for name in ("name", "active", "unitPriceUsdc", "regionMultiplier", "ruleVersion")
        } == {
            "name": "Ada's line",
            "active": True,
            "unitPriceUsdc": "0.001",
            "regionMultiplier": "1.2",
            "ruleVersion": None,
        }
        assert shown["includedUnits"] == {"granted": 5, "used": 0, "remaining": 5}
        assert (await at.account()).code == "CONFLICT"
        assert (await at.account(2, vaultId=NOBODYS)).code == "VAULT_NOT_FOUND"
        path = f"{ACCOUNTS}/{shown['id']}"
        assert (await at.operator.ask("GET", path)).body == shown
        listed = await at.operator.ask("GET", ACCOUNTS, query={"subject": subject(1), "vaultId": at.vault_id})
        assert listed.body["data"] == [shown]
        assert (await at.operator.ask("GET", ACCOUNTS, query={"subject": subject(3)})).body["data"] == []
        changed = await at.operator.ask("PATCH", path, {"unitPriceUsdc": None, "ruleVersion": "v2", "active": False})
        assert (changed.body["unitPriceUsdc"], changed.body["ruleVersion"], changed.body["active"]) == (
            None,
            "v2",
            False,
        )
        assert (changed.body["name"], changed.body["regionMultiplier"]) == ("Ada's line", "1.2")
        keyed = {"Idempotency-Key": "once"}
        for _ in range(2):
            given = await at.operator.ask("POST", f"{path}/included-units", {"units": 7}, headers=keyed)
            assert given.body["includedUnits"] == {"granted": 12, "used": 0, "remaining": 12}
        assert (await at.operator.ask("POST", f"{path}/included-units", {"units": 2**62})).code == "CONFLICT"
        assert (await at.operator.ask("PATCH", f"{ACCOUNTS}/{NOBODYS}", {"name": "x"})).code == "NOT_FOUND"
        assert (await at.operator.ask("POST", f"{ACCOUNTS}/{NOBODYS}/included-units", {"units": 1})).code == "NOT_FOUND"
        wrong = await at.account(
            4, unitPriceUsdc="1000000.1", regionMultiplier="0", lineMultiplier="1e3", ruleVersion="", includedUnits=-1
        )
        assert sorted(wrong.wrong) == [
            "body.includedUnits",
            "body.lineMultiplier",
            "body.regionMultiplier",
            "body.ruleVersion",
            "body.unitPriceUsdc",
        ]
        assert (await at.it.ada.ask("GET", ACCOUNTS)).status == 403


async def test_c21_wc14_counters_may_put_a_vault_into_arrears_which_calls_feel_until_it_is_paid(
    database_url: str,
) -> None:
    """A dollar prepaid; counters charge 1.5: calls get 402, after a fortnight 403, and pass again once it is paid."""
    async with metered(database_url) as at:
        start = at.it.service.context.clock.now().replace(microsecond=0) - timedelta(minutes=10)
        await at.account()
        assert (await at.push(start, (1, 500, 200))).body["processed_samples"] == 1
        assert ((await at.vault())["available_usdc"], await at.it.outcome(at.key)) == ("0.3000000", "200")
        told = await at.push(start + timedelta(minutes=1), (1, 900, 600))
        assert (told.status, told.body["status"], told.body["written_minutes"]) == (200, "ok", 1)
        vault = await at.vault()
        assert (vault["standing"], vault["balance_usdc"], vault["owed_usdc"]) == ("arrears", "-0.5100000", "0.5100000")
        refused = await at.it.call(at.key)
        assert (refused.status, refused.json()["code"]) == (402, "INSUFFICIENT_BALANCE")
        assert refused.json()["details"] == {"standing": "arrears", "owed": "0.5100000"}
        service = at.it.service

        async def sweep(days: int) -> None:
            clock = MovingClock(datetime.now(UTC) + timedelta(days=days))
            arrears = Arrears(service.database, service.ledger.registry, clock, QUIET, suspend_seconds=14 * 86_400)
            await arrears.sweep()

        await sweep(13)
        assert (await at.vault())["standing"] == "arrears"
        await sweep(15)
        assert (await at.vault())["standing"] == "suspended"
        await at.until("VAULT_SUSPENDED")
        person = (await at.operator.ask("GET", f"/api/admin/users/{at.it.ada.user_id}")).body["vaults"][0]
        assert (person["owed_usdc"], person["arrears_since"] is not None) == ("0.5100000", True)
        await at.deposit("0.5", "some")
        await at.until("VAULT_SUSPENDED")
        await at.deposit("0.5", "more")
        vault = await at.vault()
        assert (vault["standing"], vault["balance_usdc"], vault["owed_usdc"]) == ("active", "0.4900000", "0.0000000")
        await at.until("200")
        statement = (await at.it.ada.ask("GET", "/api/vault/statement", query={"kind": "deposit"})).body["data"]
        assert [line["balance_after"] for line in statement] == [
            "0.4900000",
            "-0.0100000",
            "1.0000000",
        ]


async def test_wc9_what_is_pushed_without_an_account_waits_in_quarantine(database_url: str) -> None:
    async with metered(database_url) as at:
        start = at.it.service.context.clock.now().replace(second=0, microsecond=0) - timedelta(minutes=10)
        for number in range(3):
            told = await at.push(start + timedelta(minutes=number), (1, 10 * number, 0), (2, 5, 5))
            assert (told.body["status"], told.body["quarantined_samples"]) == ("partial", 2)
        listed = (await at.operator.ask("GET", QUARANTINE, query={"limit": 1})).body
        assert listed["meta"]["hasMore"]
        (line,) = listed["data"]
        assert (line["subject"], line["samples"], line["sources"]) == (subject(1), 3, ["s-1"])
        assert (await at.operator.ask("POST", f"{QUARANTINE}/{subject(1)}/replay")).code == "NOT_FOUND"
        made = await at.account(1, unitPriceUsdc="0.01")
        assert made.body["active"]
        assert (await at.vault())["available_usdc"] == "0.8000000"
        left = await at.account(2, unitPriceUsdc="0.01", replay=False)
        assert left.status == 201
        assert (await at.vault())["available_usdc"] == "0.8000000"
        replayed = await at.operator.ask("POST", f"{QUARANTINE}/{subject(2)}/replay")
        assert (replayed.body["processedSamples"], replayed.body["writtenMinutes"]) == (3, 1)
        assert (await at.vault())["available_usdc"] == "0.7000000"
        assert (await at.operator.ask("GET", QUARANTINE)).body["data"] == []
        await at.push(start + timedelta(minutes=5), (9, 1, 1))
        assert (await at.operator.ask("DELETE", f"{QUARANTINE}/{subject(9)}")).body == {"samples": 1}
        assert (await at.operator.ask("GET", QUARANTINE)).body["data"] == []


async def test_what_counters_charge_is_in_the_usage_of_its_owner(database_url: str) -> None:
    async with metered(database_url) as at:
        await at.account()
        await at.push(at.it.service.context.clock.now() - timedelta(minutes=10), (1, 100, 200))
        service = at.it.service
        await rebuild(service.database, service.context.clock, lambda _: None, timedelta(days=400))
        shown = await at.it.ada.ask("GET", "/api/usage")
        (event,) = shown.body["events"]
        assert (event["outcome"], event["cost_usdc"], event["status"]) == ("metered", "0.3000000", "success")
        assert event["endpoint"]["path"] == "/meters/s-1"
        totals = shown.body["stats"]
        assert (totals["totalCalls"], totals["totalSpent"], totals["failedCalls"]) == (1, "0.3000000", 0)
