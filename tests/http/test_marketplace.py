"""The marketplace: what everyone is shown of APIs, found, filtered, sorted and paged."""

import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from callora.actors.publisher import POPULARITY_WINDOW
from callora.store.apis import recount_popularity
from tests.support.market import Market, endpoint, market

PUBLIC = {
    "id",
    "slug",
    "name",
    "description",
    "category",
    "tags",
    "logo_url",
    "status",
    "developer",
    "provider",
    "priceFrom",
    "endpointCount",
    "endpoints",
    "createdAt",
    "stats",
}


async def names(made: Market, **query: str | int) -> list[str]:
    """Return the names of every page of a search, asked for two at a time."""
    found: list[str] = []
    limit = query.pop("limit", 2)
    for _ in range(50):
        told = await made.anyone.ask("GET", "/api/apis", query={**query, "limit": limit})
        assert told.status == 200, told.body
        assert told.body["meta"]["limit"] == limit
        assert told.body["meta"]["hasMore"] == (told.body["meta"]["nextCursor"] is not None)
        found += [each["name"] for each in told.body["data"]]
        if not told.body["meta"]["hasMore"]:
            return found
        query["cursor"] = told.body["meta"]["nextCursor"]
    raise AssertionError("pages without end")


async def used(made: Market, api_id: int, calls: int, *, failed: int = 0, ago: timedelta = timedelta(days=1)) -> None:
    """Store calls of an API as the rollup would."""
    ids = made.service.context.ids
    now: datetime = made.service.context.clock.now()
    await made.service.database.execute(
        "INSERT INTO usage_days (vault_id, day, api_key_id, endpoint_id, api_id, calls, charged_calls, failed_calls,"
        " timed_calls, amount, refunded, latency_us, request_bytes, response_bytes)"
        " VALUES ($1, date_trunc('day', $2::timestamptz, 'UTC'), $3, 1, $4, $5, $6, $7, $5, 0, 0, $8, 0, 0)",
        ids.uuid7(),
        now - ago,
        ids.uuid7(),
        api_id,
        calls,
        calls - failed,
        failed,
        calls * 2500,
    )


async def test_defect_31_no_public_answer_tells_where_an_upstream_is(database_url: str) -> None:
    async with market(database_url, {"UPSTREAM_HOST_ALLOWLIST": "203.0.113.0/24"}) as made:
        secret = "secret-of-the-upstream"
        await made.ada.ask("PATCH", "/api/developers/me", {"name": "Ada Ltd", "website": "https://ada.example"})
        api = await made.register(base_url="http://203.0.113.77/hidden", upstream_headers={"X-Hidden-Header": secret})
        for who in (made.anyone, made.eve, made.ada):
            listed = await who.ask("GET", "/api/apis")
            one = await who.ask("GET", f"/api/apis/{api['id']}")
            named = await who.ask("GET", "/api/apis/weather")
            assert (listed.status, one.status, named.status) == (200, 200, 200)
            assert listed.body["data"] == [one.body] == [named.body]
            assert set(one.body) == PUBLIC
            told = json.dumps([listed.body, one.body])
            for hidden in ("203.0.113.77", "hidden", "X-Hidden-Header", secret, "base_url", "upstream_headers"):
                assert hidden not in told
        assert one.body["developer"] == {"name": "Ada Ltd", "website": "https://ada.example", "description": None}
        assert one.body["provider"] == {"name": "Ada Ltd", "url": "https://ada.example"}
        assert one.body["endpoints"] == api["endpoints"]
        assert (one.body["priceFrom"], one.body["stats"], one.body["createdAt"]) == (
            "0.0100000",
            None,
            api["createdAt"],
        )


async def test_what_is_not_active_is_not_offered(database_url: str) -> None:
    async with market(database_url) as made:
        await made.register(name="Draft", status="draft")
        paused = await made.register(name="Paused")
        await made.register(name="Active")
        await made.ada.ask("POST", f"/api/apis/{paused['id']}/pause")
        assert await names(made) == ["Active"]
        assert await names(made, status="active") == ["Active"]
        for status in ("draft", "paused", "archived"):
            assert await names(made, status=status) == []
        assert (await made.ada.ask("GET", "/api/apis/paused")).status == 404, "not even to its owner"


async def test_a_search_finds_names_tags_developers_and_descriptions_best_first(database_url: str) -> None:
    async with market(database_url) as made:
        await made.eve.ask("PATCH", "/api/developers/me", {"name": "Rain Makers"})
        await made.register(name="Sun", description="also rain, on some days")
        await made.register(made.eve, name="Snow")
        await made.register(name="Clouds", tags=["Rain", "sky"])
        await made.register(name="Brain teasers")
        await made.register(name="Rain today")
        await made.register(name="rain")
        await made.register(name="Dust")
        best_first = ["rain", "Rain today", "Brain teasers", "Clouds", "Snow", "Sun"]
        assert await names(made, search="RAIN") == best_first
        assert await names(made, search="rain", sort="newest") == [
            "rain",
            "Rain today",
            "Brain teasers",
            "Clouds",
            "Snow",
            "Sun",
        ]
        assert await names(made, search="hail") == []


@pytest.mark.parametrize("text", ["100%", "a_b", "back\\slash", "it's", "50% off_\\"])
async def test_a_search_means_its_characters(database_url: str, text: str) -> None:
    async with market(database_url) as made:
        await made.register(name=f"x {text} y")
        for other in ("100x", "aXb", "backslash", "its", "50z offz"):
            await made.register(name=f"x {other} y")
        assert await names(made, search=text) == [f"x {text} y"]
        assert await names(made, search="%%") == []


async def test_categories_and_prices_filter_together(database_url: str) -> None:
    async with market(database_url) as made:
        for name, category, prices in (
            ("a", "weather", ("0.03", "0.01")),
            ("b", "Weather", ("0.02",)),
            ("c", "finance", ("0.02", "5")),
            ("d", None, ("0",)),
        ):
            endpoints = [endpoint(f"/{number}", price) for number, price in enumerate(prices)]
            await made.register(name=name, category=category, endpoints=endpoints)
        assert await names(made, category="weather") == ["b", "a"]
        assert await names(made, category="finance, WEATHER") == ["c", "b", "a"]
        assert await names(made, min_price="0.02") == ["c", "b"], "of the cheapest endpoint"
        assert await names(made, max_price="0.01") == ["d", "a"]
        assert await names(made, min_price="0.0100001", max_price="0.02", category="weather") == ["b"]
        assert await names(made, category="nothing") == []


async def test_every_sort_is_paged_without_gap_or_repetition(database_url: str) -> None:
    async with market(database_url) as made:
        for number, price in enumerate(("0.02", "0.01", "0.03", "0.02", "0.02", "0.01", "0")):
            api = await made.register(name=f"API {number}", endpoints=[endpoint(price=price)])
            if number in (1, 4):
                await used(made, api["id"], 10 * number)
        unpriced = await made.register(name="API 7")
        await made.ada.ask("DELETE", f"/api/apis/{unpriced['id']}/endpoints/{unpriced['endpoints'][0]['id']}")
        await recount_popularity(made.service.database, made.service.context.clock.now() - POPULARITY_WINDOW)

        def shown(*numbers: int) -> list[str]:
            return [f"API {number}" for number in numbers]

        expected = {
            "newest": shown(7, 6, 5, 4, 3, 2, 1, 0),
            "relevance": shown(7, 6, 5, 4, 3, 2, 1, 0),
            "price_asc": shown(6, 5, 1, 4, 3, 0, 2, 7),
            "price_desc": shown(2, 4, 3, 0, 5, 1, 6, 7),
            "popularity": shown(4, 1, 7, 6, 5, 3, 2, 0),
        }
        for sort, order in expected.items():
            for limit in (1, 3, 100):
                assert await names(made, sort=sort, limit=limit) == order, (sort, limit)
        assert await names(made, search="api", limit=3) == shown(4, 1, 7, 6, 5, 3, 2, 0)


async def test_a_cursor_belongs_to_its_sort(database_url: str) -> None:
    async with market(database_url) as made:
        for number in range(3):
            await made.register(name=f"API {number}")
        told = await made.anyone.ask("GET", "/api/apis", query={"limit": 1, "sort": "price_asc"})
        cursor = told.body["meta"]["nextCursor"]
        for query in ({"sort": "newest", "cursor": cursor}, {"cursor": cursor}, {"cursor": "nonsense"}, {"cursor": ""}):
            assert (await made.anyone.ask("GET", "/api/apis", query=query)).wrong == ["query.cursor"]
        forged = "WyJuZXdlc3QiLDkyMjMzNzIwMzY4NTQ3NzU4MDcsMV0"  # ["newest",9223372036854775807,1]
        assert (await made.anyone.ask("GET", "/api/apis", query={"cursor": forged})).wrong == ["query.cursor"]


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ({"limit": "0"}, "query.limit"),
        ({"limit": "101"}, "query.limit"),
        ({"sort": "name"}, "query.sort"),
        ({"search": ""}, "query.search"),
        ({"search": "x" * 101}, "query.search"),
        ({"category": "a,,b"}, "query.category"),
        ({"category": ",".join("abcdefghijklmnopqrstuvwxyz")}, "query.category"),
        ({"min_price": "-1"}, "query.min_price"),
        ({"max_price": "0.00000001"}, "query.max_price"),
        ({"min_price": "2", "max_price": "1"}, "query"),
        ({"status": "deleted"}, "query.status"),
        ({"page": "1"}, "query.page"),
    ],
)
async def test_a_wrong_query_is_told(database_url: str, query: dict[str, str | int], wrong: str) -> None:
    async with market(database_url) as made:
        assert (await made.anyone.ask("GET", "/api/apis", query=query)).wrong == [wrong]


async def test_what_has_not_changed_is_not_sent_again(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register()
        for path in ("/api/apis", "/api/apis/weather"):
            told = await made.anyone.ask("GET", path)
            tag = told.headers["etag"]
            again = await made.anyone.ask("GET", path, headers={"If-None-Match": f'"other", W/{tag}'})
            assert (again.status, again.body, again.headers["etag"]) == (304, None, tag)
            assert (await made.anyone.ask("GET", path, headers={"If-None-Match": '"other"'})).status == 200
            await made.ada.ask("PATCH", f"/api/apis/{api['id']}", {"description": f"changed for {path}"})
            changed = await made.anyone.ask("GET", path, headers={"If-None-Match": tag})
            assert (changed.status, changed.headers["etag"] != tag) == (200, True)


async def test_popularity_is_the_calls_of_thirty_days(database_url: str) -> None:
    async with market(database_url) as made:
        one, two, old = [await made.register(name=name) for name in ("one", "two", "old")]
        await used(made, one["id"], 3)
        await used(made, one["id"], 5, failed=2)
        await used(made, two["id"], 9)
        await used(made, old["id"], 100, ago=timedelta(days=31))
        await used(made, 10**9, 5)  # of an API that is not there
        since = made.service.context.clock.now() - POPULARITY_WINDOW
        for _ in range(2):
            await recount_popularity(made.service.database, since)
            assert await names(made, sort="popularity") == ["two", "one", "old"]
        told: dict[str, Any] = (await made.anyone.ask("GET", "/api/apis/one")).body
        assert told["stats"] == {"totalCalls": 8, "avgResponseMs": 2.5, "uptimePct": 75.0}
        assert (await made.anyone.ask("GET", "/api/apis/old")).body["stats"] is None
        own = (await made.ada.ask("GET", "/api/developers/apis", query={"limit": 100})).body["data"]
        assert {each["name"]: each["callCount"] for each in own} == {"one": 8, "two": 9, "old": 0}
        await recount_popularity(made.service.database, since + timedelta(days=30))
        assert (await made.anyone.ask("GET", "/api/apis/one")).body["stats"] is None


async def test_browsing_has_a_limit_of_its_own(database_url: str) -> None:
    async with market(database_url, {"REST_RATE_LIMIT_MAX_REQUESTS": "3"}) as made:
        statuses = [(await made.anyone.ask("GET", "/api/apis")).status for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert (await made.ada.ask("GET", "/api/developers/me")).status == 200
