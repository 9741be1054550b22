"""Alerts of low balances and invoices over REST."""

import trio

from callora.ledger.commands import Withdraw
from callora.ledger.money import Stroops
from tests.support.rest import Person, rest_client
from tests.support.service import Consumer, RunningService, running_service

PATH = "/api/vault/alerts/low-balance"


async def alerts_of(service: RunningService, consumer: Consumer) -> int:
    sql = "SELECT count(*) FROM outbox WHERE type = 'low_balance_alert' AND user_id = $1"
    return int(await service.database.fetch_value(sql, consumer.user_id))


async def test_an_owner_says_below_which_balance_he_wants_to_hear_of_it(database_url: str) -> None:
    async with (
        running_service(database_url, {"BALANCE_ALERT_INTERVAL_MS": "20"}) as service,
        rest_client(service) as client,
    ):
        consumer, other = await service.consumer("10"), await service.consumer("10")
        me, stranger = (Person(client, {"X-User-Id": each.user_id}) for each in (consumer, other))
        unset = {"network": "testnet", "threshold": None, "lowSince": None}
        assert (await me.ask("GET", PATH)).body == unset
        assert (await me.ask("DELETE", PATH)).body == unset
        for beyond in ("0", "1000000.0000001", "33237886584.3708931"):
            assert (await me.ask("PUT", PATH, {"threshold": beyond})).wrong == ["body.threshold"]
        told = await me.ask("PUT", PATH, {"threshold": "1"}, query={"network": "mainnet"})
        assert (told.status, told.code) == (404, "VAULT_NOT_FOUND")
        told = await me.ask("PUT", PATH, {"threshold": "5"})
        assert (told.status, told.body) == (200, {**unset, "threshold": "5.0000000"})
        assert (await stranger.ask("GET", PATH)).body == unset
        await service.ledger.registry.ask(consumer.vault_id, Withdraw(Stroops(60_000_000), "out"))
        with trio.fail_after(60):
            while not await alerts_of(service, consumer):  # noqa: ASYNC110 - the service's own job
                await trio.sleep(0.01)
        shown = (await me.ask("GET", PATH)).body
        assert shown["threshold"] == "5.0000000"
        assert shown["lowSince"] is not None
        assert (await me.ask("DELETE", PATH)).body == unset
        assert await alerts_of(service, other) == 0


async def test_an_owner_sees_the_invoices_of_his_own_vaults(database_url: str) -> None:
    async with running_service(database_url) as service, rest_client(service) as client:
        consumer, other = await service.consumer("10"), await service.consumer("10")
        me, stranger = (Person(client, {"X-User-Id": each.user_id}) for each in (consumer, other))
        ids = [service.context.ids.uuid7() for _ in range(3)]
        await service.database.execute(
            "INSERT INTO invoices (invoice_id, vault_id, month, calls, usage, refunded, subscriptions, issued_at)"
            " SELECT i, $2, ('2026-0' || n || '-01')::date, n, 10 * n, 2, 5, now()"
            " FROM unnest($1::uuid[]) WITH ORDINALITY AS u (i, n)",
            sorted(ids),
            consumer.vault_id,
        )
        first = (await me.ask("GET", "/api/billing/invoices", query={"limit": 2})).body
        assert [each["month"] for each in first["data"]] == ["2026-03", "2026-02"]
        query = {"limit": 2, "cursor": first["meta"]["nextCursor"]}
        last = (await me.ask("GET", "/api/invoices", query=query)).body
        assert last["meta"]["hasMore"] is False
        (invoice,) = last["data"]
        assert {**invoice, "issuedAt": None} == {
            "id": min(ids),
            "vaultId": consumer.vault_id,
            "network": "testnet",
            "month": "2026-01",
            "calls": 1,
            "usage_usdc": "0.0000010",
            "refunded_usdc": "0.0000002",
            "subscriptions_usdc": "0.0000005",
            "total_usdc": "0.0000013",
            "issuedAt": None,
        }
        one = f"/api/billing/invoices/{invoice['id']}"
        assert (await me.ask("GET", one)).body == invoice
        assert (await stranger.ask("GET", one)).code == "NOT_FOUND"
        assert (await stranger.ask("GET", "/api/invoices")).body["data"] == []
        assert (await me.ask("GET", "/api/invoices", query={"cursor": "x"})).wrong == ["query.cursor"]
