"""Spending limits through HTTP, by the numbers of the statements that they answer: B06 to B20, B27, weak points."""

from collections import Counter
from typing import Any

import pytest
import trio

from callora.ledger.money import parse_usdc
from callora.store.accounts import PricedEndpoint
from tests.support.keys import KeyShop, barrage, id_of, key_shop
from tests.support.rest import Person, Told
from tests.support.upstream import Exchange, RawUpstream, raw_upstream, respond

PERIODS = ("day", "week", "month", "year")
ADJECTIVES = {"day": "daily", "week": "weekly", "month": "monthly", "year": "annual"}
PRICED = (("/one", "0.001"), ("/three", "0.003"), ("/five", "0.005"), ("/thirty", "0.03"), ("/forty-five", "0.045"))


async def priced(it: KeyShop, upstream: RawUpstream) -> None:
    """Publish calls of several prices, each below `/v1/call/priced/`."""
    endpoints = [PricedEndpoint("GET", path, parse_usdc(price)) for path, price in PRICED]
    await it.service.api("priced", upstream.url, endpoints)


async def put(who: Person, key_id: str, period: str, amount: object) -> Told:
    """Set a limit."""
    return await who.ask("PUT", f"/api/keys/{key_id}/limits/{period}", {"amount": amount})


async def limits(who: Person, key_id: str) -> dict[str, tuple[Any, Any, Any]]:
    """Return limit, spent and remaining of every period."""
    told = await who.ask("GET", f"/api/keys/{key_id}/limits")
    assert told.status == 200
    return {
        each: (told.body[each]["limit"], told.body[each]["spent"], told.body[each]["remaining"]) for each in PERIODS
    }


NOTHING = (None, "0.0000000", None)


async def test_b06_a_limit_is_set_and_replaced(database_url: str) -> None:
    async with key_shop(database_url) as it:
        key_id = id_of(await it.key())
        assert await limits(it.ada, key_id) == dict.fromkeys(PERIODS, NOTHING)
        told = await put(it.ada, key_id, "day", "10")
        assert (told.status, told.body["day"]) == (
            200,
            {"limit": "10.0000000", "spent": "0.0000000", "remaining": "10.0000000"},
        )
        assert told.body["network"] == "testnet"
        assert (await put(it.ada, key_id, "day", "20.5")).body["day"]["limit"] == "20.5000000"
        assert (await it.ada.ask("GET", f"/api-keys/{key_id}/limits")).body["day"]["limit"] == "20.5000000"


async def test_b07_b08_four_periods_are_independent_and_removed_one_by_one(database_url: str) -> None:
    async with key_shop(database_url) as it:
        key_id = id_of(await it.key())
        for period, amount in zip(PERIODS, ("10", "50", "200", "1000"), strict=True):
            await put(it.ada, key_id, period, amount)
        assert [each[0] for each in (await limits(it.ada, key_id)).values()] == [
            "10.0000000",
            "50.0000000",
            "200.0000000",
            "1000.0000000",
        ]
        for gone in ("week", "week", "day", "month", "year", "year"):
            told = await it.ada.ask("DELETE", f"/api/keys/{key_id}/limits/{gone}")
            assert (told.status, told.body[gone]["limit"]) == (200, None)
        assert await limits(it.ada, key_id) == dict.fromkeys(PERIODS, NOTHING)
        assert not await it.service.database.fetch_value("SELECT count(*) FROM spending_limits")


@pytest.mark.parametrize("amount", ["0", "-1", "x", "1.23456789", "", None, 5])
async def test_b09_a_limit_is_positive(database_url: str, amount: object) -> None:
    async with key_shop(database_url) as it:
        key_id = id_of(await it.key())
        told = await put(it.ada, key_id, "day", amount)
        assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", ["body.amount"])
        told = await put(it.ada, key_id, "hour", "1")
        assert (told.status, told.wrong) == (400, ["path.period"])


async def test_b10_wb6_only_the_owner_who_is_logged_in_changes_limits(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        key_id, secret = id_of(made), made.body["key"]
        await put(it.ada, key_id, "day", "10")
        assert ((await put(it.bob, key_id, "day", "99")).status, (await put(it.bob, key_id, "day", "99")).code) == (
            404,
            "API_KEY_NOT_FOUND",
        )
        for asker in (
            it.stranger,
            Person(it.stranger.client, {"X-Api-Key": secret}),
            Person(it.stranger.client, {"Authorization": f"Bearer {secret}"}),
        ):
            for method in ("GET", "PUT", "DELETE"):
                path = f"/api/keys/{key_id}/limits" + ("" if method == "GET" else "/day")
                assert (await asker.ask(method, path, {"amount": "99"} if method == "PUT" else None)).status == 401
        assert (await limits(it.ada, key_id))["day"][0] == "10.0000000"
        await it.ada.ask("DELETE", f"/api/keys/{key_id}")
        assert (await put(it.ada, key_id, "day", "11")).code == "CONFLICT", "a revoked key spends nothing"


async def test_b11_limits_set_in_parallel_all_stick(database_url: str) -> None:
    async with key_shop(database_url) as it:
        key_id = id_of(await it.key())
        statuses: list[int] = []

        async def one(period: str, amount: str) -> None:
            statuses.append((await put(it.ada, key_id, period, amount)).status)

        async def remove() -> None:
            statuses.append((await it.ada.ask("DELETE", f"/api/keys/{key_id}/limits/year")).status)

        async with trio.open_nursery() as nursery:
            for period in ("day", "week", "month"):
                nursery.start_soon(one, period, "100")
            for _ in range(5):
                nursery.start_soon(one, "year", "500")
        assert [each[0] for each in (await limits(it.ada, key_id)).values()] == ["100.0000000"] * 3 + ["500.0000000"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "year", "200")
            nursery.start_soon(remove)
        assert (await limits(it.ada, key_id))["year"][0] in ("200.0000000", None)
        assert set(statuses) == {200}


async def test_b13_to_b17_a_call_passes_up_to_every_limit_and_the_first_that_fails_is_named(database_url: str) -> None:
    async with key_shop(database_url) as it, raw_upstream(respond()) as upstream:
        await priced(it, upstream)
        made = await it.key()
        key_id, secret = id_of(made), made.body["key"]

        async def outcome(path: str) -> str:
            response = await it.call(secret, f"/v1/call/priced{path}")
            if response.status == 200:
                return "200"
            problem = response.json()
            assert (response.status, problem["code"]) == (402, "SPENDING_LIMIT_EXCEEDED")
            assert ADJECTIVES[problem["details"]["window"]] in problem["message"]
            return str(problem["details"]["window"])

        assert await outcome("/five") == "200"
        await put(it.ada, key_id, "day", "0.010")
        assert (await limits(it.ada, key_id))["day"] == ("0.0100000", "0.0050000", "0.0050000"), "B14: spent before"
        assert await outcome("/thirty") == "day"
        assert await outcome("/three") == "200", "B15"
        await it.ada.ask("DELETE", f"/api/keys/{key_id}/limits/day")
        for period, amount in (("week", "0.05"), ("month", "0.1"), ("year", "0.5")):
            await put(it.ada, key_id, period, amount)
        assert await outcome("/forty-five") == "week", "B16: 8 spent of 50"
        assert await outcome("/thirty") == "200"
        assert {each[1] for each in (await limits(it.ada, key_id)).values()} == {"0.0380000"}
        await put(it.ada, key_id, "week", "0.04")
        assert await outcome("/three") == "week", "B17: 38 spent of 40"
        assert await outcome("/one") == "200"
        assert await outcome("/one") == "200", "B13: reaching a limit is allowed"
        assert await outcome("/one") == "week"


async def test_b18_spending_is_each_keys_own_whatever_kind_of_charge_it_is(database_url: str) -> None:
    async with key_shop(database_url) as it:
        one, two = await it.key(), await it.key()
        for made in (one, two):
            await put(it.ada, id_of(made), "day", "0.03")
        assert [await it.outcome(one.body["key"]) for _ in range(2)] == ["200"] * 2
        endpoint = await it.service.database.fetch_value(
            "SELECT endpoint_id FROM api_endpoints WHERE api_id = $1", int(it.api_id)
        )
        charge = {
            "requestId": "r",
            "apiId": int(it.api_id),
            "endpointId": endpoint,
            "amountUsdc": "0.01",
            "apiKeyId": id_of(one),
        }
        assert (await it.ada.ask("POST", "/api/billing/deduct", charge)).status == 200
        told = await it.ada.ask("POST", "/api/billing/deduct", {**charge, "requestId": "s"})
        assert (told.status, told.code, told.body["details"]["window"]) == (402, "SPENDING_LIMIT_EXCEEDED", "day")
        assert "daily" in told.body["message"]
        assert await it.outcome(one.body["key"]) == "SPENDING_LIMIT_EXCEEDED"
        minted = await it.ada.ask("POST", f"/api/keys/{id_of(one)}/tokens", {"ttl": 60})
        bearer = [("Authorization", f"Bearer {minted.body['token']}")]
        assert await barrage(it.service.port, 1, bearer) == ["SPENDING_LIMIT_EXCEEDED"], "a token is its key's"
        assert [await it.outcome(two.body["key"]) for _ in range(4)] == ["200"] * 3 + ["SPENDING_LIMIT_EXCEEDED"]


async def test_b19_twenty_at_once_on_a_limit_of_ten_are_ten(database_url: str) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        await it.service.database.execute("UPDATE vaults SET plan_id = 'enterprise'")
        await put(it.ada, id_of(made), "day", "0.1")
        outcomes = Counter(await barrage(it.service.port, 20, [("X-Api-Key", made.body["key"])]))
        assert outcomes == {"200": 10, "SPENDING_LIMIT_EXCEEDED": 10}
        assert (await limits(it.ada, id_of(made)))["day"] == ("0.1000000", "0.1000000", "0.0000000")


async def test_b20_what_is_held_counts_while_the_call_runs_and_comes_back_when_it_fails(database_url: str) -> None:
    async with key_shop(database_url) as it:
        asked, go = trio.Event(), trio.Event()

        async def slow(exchange: Exchange) -> None:
            asked.set()
            await go.wait()
            await respond(500)(exchange)

        async with raw_upstream(slow) as upstream, trio.open_nursery() as nursery:
            await it.service.api("slow", upstream.url)
            made = await it.key()
            key_id, secret = id_of(made), made.body["key"]
            await put(it.ada, key_id, "day", "0.01")
            nursery.start_soon(it.call, secret, "/v1/call/slow/x")
            await asked.wait()
            assert (await limits(it.ada, key_id))["day"] == ("0.0100000", "0.0100000", "0.0000000")
            assert await it.outcome(secret) == "SPENDING_LIMIT_EXCEEDED"
            go.set()
        with trio.fail_after(60):
            while await it.outcome(secret) != "200":  # noqa: ASYNC110 - a release is stored after its answer
                await trio.lowlevel.checkpoint()


async def test_b27_what_was_spent_is_shown_with_and_without_a_limit_and_remaining_is_never_negative(
    database_url: str,
) -> None:
    async with key_shop(database_url) as it:
        made = await it.key()
        for _ in range(3):
            await it.outcome(made.body["key"])
        await put(it.ada, id_of(made), "month", "0.02")
        assert await limits(it.ada, id_of(made)) == {
            **dict.fromkeys(PERIODS, (None, "0.0300000", None)),
            "month": ("0.0200000", "0.0300000", "0.0000000"),
        }


async def test_wb7_a_vaults_own_limit_binds_all_its_keys_together(database_url: str) -> None:
    async with key_shop(database_url) as it:
        one, two = await it.key(), await it.key()
        told = await it.ada.ask("PUT", "/api/vault/limits/week", {"amount": "0.03"})
        assert told.body["week"] == {"limit": "0.0300000", "spent": "0.0000000", "remaining": "0.0300000"}
        outcomes = [await it.outcome(each.body["key"]) for each in (one, two, one, two)]
        assert outcomes == ["200", "200", "200", "SPENDING_LIMIT_EXCEEDED"]
        problem = (await it.call(one.body["key"])).json()
        assert (problem["details"]["limitedBy"], problem["details"]["window"]) == ("vault", "week")
        assert (await it.ada.ask("GET", "/api/vault/limits")).body["week"]["spent"] == "0.0300000"
        assert (await it.bob.ask("GET", "/api/vault/limits")).code == "VAULT_NOT_FOUND"
        assert (await it.ada.ask("GET", "/api/vault/limits", query={"network": "mainnet"})).code == "VAULT_NOT_FOUND"
        assert (await it.ada.ask("DELETE", "/api/vault/limits/week")).body["week"]["limit"] is None
        assert await it.outcome(two.body["key"]) == "200"


async def test_wb15_a_limit_may_be_as_large_as_an_amount_can_be(database_url: str) -> None:
    async with key_shop(database_url) as it:
        key_id = id_of(await it.key())
        most = "900000000000"
        assert (await put(it.ada, key_id, "year", most)).body["year"]["limit"] == f"{most}.0000000"
