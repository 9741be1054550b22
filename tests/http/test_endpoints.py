"""Endpoints and their prices over REST, and what a call pays after each change."""

from datetime import timedelta

import trio
import trio.testing

from callora.http.rest.forms import iso
from tests.support.market import counts, endpoint, market
from tests.support.upstream import raw_upstream, respond


async def test_defect_9_a_path_without_an_endpoint_is_neither_offered_nor_free(database_url: str) -> None:
    """No prefix, no other method, and nothing after an endpoint was retired: what has no price is not called."""
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(base_url=upstream.url, endpoints=[endpoint("/now"), endpoint("/now", "0.05", "POST")])
        consumer = await made.service.consumer("1")
        for method, path in (("GET", "nowhere"), ("GET", "now/and"), ("GET", "nowadays"), ("PUT", "now"), ("GET", "")):
            assert (await made.call(consumer, f"weather/{path}", method)).status == 404
        assert not upstream.requests
        assert (await made.call(consumer, "weather/now", "POST")).headers["x-callora-charge"] == "0.0500000"
        retired = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][1]['id']}"
        assert (await made.ada.ask("DELETE", retired)).status == 204
        assert (await made.call(consumer, "weather/now", "POST")).status == 404
        assert (await made.call(consumer, "weather/now")).headers["x-callora-charge"] == "0.0100000"
        assert (await made.ada.ask("DELETE", retired)).status == 404, "it is not offered any more"
        assert (await made.ada.ask("GET", f"{retired}/prices")).status == 200, "its prices are still told"
        shown = (await made.anyone.ask("GET", "/api/apis/weather")).body["endpoints"]
        assert [each["method"] for each in shown] == ["GET"]


async def test_bulk_adds_changes_and_prices_at_once(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(
            base_url=upstream.url, endpoints=[endpoint(description="Now", billable_statuses="2xx,404")]
        )
        bulk = f"/api/apis/{api['id']}/endpoints/bulk"
        consumer = await made.service.consumer("1")
        assert (await made.call(consumer, "weather/now")).headers["x-callora-charge"] == "0.0100000"
        sent = [endpoint("/later", "0.03"), endpoint("/now", "0.02", required_scope="x")]
        told = await made.ada.ask("POST", bulk, {"endpoints": sent})
        assert (told.status, told.body["created"]) == (201, 1)
        later, now = told.body["data"]
        assert (later["path"], later["price_per_call_usdc"]) == ("/later", "0.0300000")
        assert (now["id"], now["price_per_call_usdc"]) == (api["endpoints"][0]["id"], "0.0200000")
        kept = (now["description"], now["billable_statuses"], now["required_scope"])
        assert kept == ("Now", "2xx,404", "x"), "what was not sent stays"
        assert (await made.call(consumer, "weather/now")).headers["x-callora-charge"] == "0.0200000"
        before = await counts(made)
        again = await made.ada.ask("POST", bulk, {"endpoints": sent})
        assert (again.status, again.body["created"], again.body["data"]) == (201, 0, told.body["data"])
        assert await counts(made) == before == [1, 2, 3], "the same again is no new version"
        prices = await made.ada.ask("GET", f"/api/apis/{api['id']}/endpoints/{now['id']}/prices")
        assert [(each["version"], each["price_per_call_usdc"], each["in_effect"]) for each in prices.body["data"]] == [
            (2, "0.0200000", True),
            (1, "0.0100000", False),
        ]


async def test_bulk_is_refused_whole(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(endpoints=[endpoint("/{city}")])
        bulk = f"/api/apis/{api['id']}/endpoints/bulk"
        told = await made.ada.ask("POST", bulk, {"endpoints": [endpoint("/fine"), endpoint("/{town}")]})
        assert (told.status, told.wrong) == (400, ["body.endpoints[1]"])
        assert "GET /{city}" in told.body["details"][0]["message"]
        told = await made.ada.ask("POST", bulk, {"endpoints": [endpoint(f"/{number}") for number in range(51)]})
        assert told.wrong == ["body.endpoints"]
        assert await counts(made) == [1, 1, 1]
        for part in range(9):
            many = [endpoint(f"/{part}/{number}") for number in range(50)]
            assert (await made.ada.ask("POST", bulk, {"endpoints": many})).status == 201
        many = [endpoint(f"/last/{number}") for number in range(50)]
        assert (await made.ada.ask("POST", bulk, {"endpoints": many})).wrong == ["body.endpoints"]
        assert (await made.ada.ask("POST", bulk, {"endpoints": many[:49]})).status == 201
        listed = (await made.anyone.ask("GET", "/api/apis")).body["data"][0]
        assert (listed["endpointCount"], len(listed["endpoints"])) == (500, 20)
        assert len((await made.anyone.ask("GET", "/api/apis/weather")).body["endpoints"]) == 500


async def test_parallel_price_changes_each_get_a_version_of_their_own(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register()
        place, start = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}", trio.Event()
        told = []

        async def change(cents: int) -> None:
            await start.wait()
            told.append(await made.ada.ask("PATCH", place, {"price_per_call_usdc": f"0.{cents}"}))

        async with trio.open_nursery() as nursery:
            for cents in range(11, 23):
                nursery.start_soon(change, cents)
            await trio.testing.wait_all_tasks_blocked()
            start.set()
        assert [each.status for each in told] == [200] * 12
        first = await made.ada.ask("GET", f"{place}/prices", query={"limit": 5})
        assert [each["version"] for each in first.body["data"]] == [13, 12, 11, 10, 9]
        assert [each["in_effect"] for each in first.body["data"]] == [True] + [False] * 4
        second = await made.ada.ask("GET", f"{place}/prices", query={"cursor": first.body["meta"]["nextCursor"]})
        assert [each["version"] for each in second.body["data"]] == [8, 7, 6, 5, 4, 3, 2, 1]


async def test_a_price_dated_ahead_is_announced_and_takes_effect_at_its_date(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(base_url=upstream.url)
        place = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"
        consumer = await made.service.consumer("10000")
        clock = made.service.context.clock
        date = clock.now().replace(microsecond=0) + timedelta(seconds=2)
        told = await made.ada.ask("PATCH", place, {"price_per_call_usdc": "0.05", "effective_from": iso(date)})
        assert (told.status, told.body["price_per_call_usdc"]) == (200, "0.0100000")
        assert told.body["next_price"] == {
            "price_per_call_usdc": "0.0500000",
            "effective_from": iso(date),
            "rate_card": None,
        }
        shown = (await made.anyone.ask("GET", "/api/apis/weather")).body["endpoints"][0]
        assert shown["next_price"] == told.body["next_price"], "callers are told before they pay it"
        charges, began = [], clock.now()
        while began < date:  # nothing tells of a date but the date itself
            began = clock.now()
            charge = (await made.call(consumer, "weather/now")).headers["x-callora-charge"]
            if clock.now() < date:
                assert charge == "0.0100000"
            if began >= date:
                assert charge == "0.0500000"
            charges.append(charge)
        assert charges[0] == "0.0100000"
        shown = (await made.anyone.ask("GET", "/api/apis/weather")).body
        assert (shown["endpoints"][0]["price_per_call_usdc"], shown["priceFrom"]) == ("0.0500000", "0.0500000")
        assert shown["endpoints"][0]["next_price"] is None


async def test_an_endpoint_dated_ahead_is_not_offered_before(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        date = iso(made.service.context.clock.now() + timedelta(days=1))
        api = await made.register(base_url=upstream.url, endpoints=[endpoint(effective_from=date)])
        assert (api["priceFrom"], api["endpoints"][0]["price_per_call_usdc"]) == (None, None)
        assert api["endpoints"][0]["next_price"]["effective_from"] == date
        assert (await made.call(await made.service.consumer("1"), "weather/now")).status == 404


async def test_a_retired_endpoint_comes_back_as_itself_and_only_at_once(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(base_url=upstream.url)
        number = api["endpoints"][0]["id"]
        place, bulk = f"/api/apis/{api['id']}/endpoints/{number}", f"/api/apis/{api['id']}/endpoints/bulk"
        assert (await made.ada.ask("DELETE", place)).status == 204
        assert (await made.ada.ask("PATCH", place, {"description": "x"})).status == 404
        date = iso(made.service.context.clock.now() + timedelta(days=1))
        told = await made.ada.ask("POST", bulk, {"endpoints": [endpoint(price="0.02", effective_from=date)]})
        assert told.wrong == ["body.endpoints[0].effective_from"]
        told = await made.ada.ask("POST", bulk, {"endpoints": [endpoint(price="0.02")]})
        assert (told.body["created"], told.body["data"][0]["id"]) == (1, number)
        consumer = await made.service.consumer("1")
        assert (await made.call(consumer, "weather/now")).headers["x-callora-charge"] == "0.0200000"


async def test_an_endpoint_is_changed_and_null_clears(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(
            endpoints=[endpoint(description="x", billable_statuses="2xx,4xx", required_scope="y")]
        )
        place = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"
        told = await made.ada.ask("PATCH", place, {"description": "z", "billable_statuses": None})
        assert (told.body["description"], told.body["billable_statuses"], told.body["required_scope"]) == (
            "z",
            "2xx",
            "y",
        )
        told = await made.ada.ask("PATCH", place, {"description": None, "required_scope": None})
        assert (told.body["description"], told.body["required_scope"]) == (None, None)
        date = iso(made.service.context.clock.now() + timedelta(days=1))
        for body, wrong in (
            ({}, ["body"]),
            ({"effective_from": date}, ["body"]),
            ({"price_per_call_usdc": None}, ["body.price_per_call_usdc"]),
            ({"price_per_call_usdc": "1", "effective_from": "2020-01-01"}, ["body.effective_from"]),
            ({"path": "/x"}, ["body.path"]),
        ):
            assert (await made.ada.ask("PATCH", place, body)).wrong == wrong
        assert await counts(made) == [1, 1, 1]
