"""APIs over REST: registering, changing, endpoints and prices, and what a call sees of it."""

import json
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.market import BASE_URL, api_body, counts, endpoint, market
from tests.support.rest import Person
from tests.support.upstream import raw_upstream, respond

SECRET = "s3cret-value-of-the-upstream-key"


# --- registering ------------------------------------------------------------------------------------------------------


async def test_an_api_is_registered_whole_and_shown_to_its_owner(database_url: str) -> None:
    async with market(database_url) as made:
        body = api_body(
            "Köln Weather!",
            description="All of it",
            category=" weather ",
            tags=["Rain", "sun", "rain"],
            logo_url="https://ada.example/logo.png",
            upstream_headers={"X-Upstream-Key": SECRET, "X-Short": "abc"},
            endpoints=[
                endpoint("/now"),
                endpoint("/reports/{city}", "0.0000001", "POST", description="One city", billable_statuses="2xx,404"),
                endpoint("*", "0", "*", required_scope="all:read"),
            ],
        )
        told = await made.ada.ask("POST", "/api/apis", body)
        assert told.status == 201
        api = told.body
        assert (api["slug"], api["status"], api["base_url"]) == ("koln-weather", "active", BASE_URL)
        assert (api["category"], api["tags"], api["priceFrom"]) == ("weather", ["Rain", "sun"], "0.0000000")
        assert api["upstream_headers"] == {"X-Upstream-Key": "****-key", "X-Short": "****"}
        first, second, third = api["endpoints"]
        assert first == {
            "id": first["id"],
            "path": "/now",
            "method": "GET",
            "price_per_call_usdc": "0.0100000",
            "rate_card": None,
            "next_price": None,
            "description": None,
            "billable_statuses": "2xx",
            "required_scope": None,
        }
        assert (second["price_per_call_usdc"], second["billable_statuses"]) == ("0.0000001", "2xx,404")
        assert (third["path"], third["method"], third["required_scope"]) == ("*", "*", "all:read")
        for name in (api["id"], api["slug"]):
            own = await made.ada.ask("GET", f"/api/developers/apis/{name}")
            assert (own.status, own.body) == (200, api)
        assert SECRET not in json.dumps(api)


async def test_the_alias_registers_too_and_a_stranger_does_not(database_url: str) -> None:
    async with market(database_url) as made:
        assert (await made.ada.ask("POST", "/api/developers/apis", api_body())).status == 201
        assert (await made.anyone.ask("POST", "/api/apis", api_body())).status == 401
        assert await counts(made) == [1, 1, 1]


async def test_all_wrong_fields_are_told_at_once_by_their_paths(database_url: str) -> None:
    async with market(database_url) as made:
        body = {
            "name": " ",
            "slug": "Not A Slug",
            "base_url": "ftp://example.com",
            "category": "a,b",
            "tags": ["ok", ""],
            "logo_url": "data:x",
            "status": "paused",
            "upstream_headers": {"Host": "x"},
            "price": "1",
            "endpoints": [
                endpoint(price="0.12345678"),
                endpoint("now", "-1", "BREW"),
                {"path": "/x", "method": "GET"},
                endpoint("/y", billable_statuses="all", required_scope="", effective_from="soon"),
            ],
        }
        told = await made.ada.ask("POST", "/api/apis", body)
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")
        assert told.wrong == [
            "body.name",
            "body.slug",
            "body.base_url",
            "body.category",
            "body.tags[1]",
            "body.logo_url",
            "body.upstream_headers",
            "body.status",
            "body.endpoints[0].price_per_call_usdc",
            "body.endpoints[1].path",
            "body.endpoints[1].method",
            "body.endpoints[1].price_per_call_usdc",
            "body.endpoints[2].price_per_call_usdc",
            "body.endpoints[3].billable_statuses",
            "body.endpoints[3].required_scope",
            "body.endpoints[3].effective_from",
            "body.price",
        ]
        assert await counts(made) == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"endpoints": []}, ["body.endpoints"]),
        ({"endpoints": [endpoint(f"/{number}") for number in range(101)]}, ["body.endpoints"]),
        ({"name": "x" * 121}, ["body.name"]),
        ({"slug": "import"}, ["body.slug"]),
        ({"category": "x" * 61}, ["body.category"]),
        ({"tags": [str(number) for number in range(21)]}, ["body.tags"]),
        ({"endpoints": [endpoint(price="1000000.0000001")]}, ["body.endpoints[0].price_per_call_usdc"]),
        ({"endpoints": [endpoint(price="01")]}, ["body.endpoints[0].price_per_call_usdc"]),
        ({"endpoints": [endpoint(price="1e3")]}, ["body.endpoints[0].price_per_call_usdc"]),
        ({"endpoints": [{**endpoint(), "price_per_call_usdc": 1}]}, ["body.endpoints[0].price_per_call_usdc"]),
        ({"endpoints": [endpoint("/a/../b")]}, ["body.endpoints[0].path"]),
        ({"endpoints": [endpoint("/{a}b")]}, ["body.endpoints[0].path"]),
        ({"endpoints": [endpoint("/*/a")]}, ["body.endpoints[0].path"]),
        ({"endpoints": [endpoint("/" + "a" * 512)]}, ["body.endpoints[0].path"]),
        ({"endpoints": [endpoint("/{a}/")]}, ["body.endpoints[0].path"]),
        ({"base_url": "https://user:pw@example.com"}, ["body.base_url"]),
        ({"base_url": "https://example.com/?a=b"}, ["body.base_url"]),
        ({"base_url": "https://example.com/#a"}, ["body.base_url"]),
        ({"base_url": "/relative"}, ["body.base_url"]),
        ({"upstream_headers": {"X-A": "a\r\nX-B: b"}}, ["body.upstream_headers"]),
        ({"upstream_headers": {"X A": "a"}}, ["body.upstream_headers"]),
        ({"upstream_headers": {"Content_Length": "3"}}, ["body.upstream_headers"]),
        ({"upstream_headers": {"x-callora-charge": "0"}}, ["body.upstream_headers"]),
        ({"upstream_headers": {f"X-{number}": "a" for number in range(21)}}, ["body.upstream_headers"]),
        ({"upstream_headers": {f"X-{number}": "a" * 2000 for number in range(5)}}, ["body.upstream_headers"]),
        ({"upstream_headers": {"X-A": "ä"}}, ["body.upstream_headers"]),
        ({"upstream_headers": {"X-A": "****-key"}}, ["body.upstream_headers"]),
        ({"endpoints": [endpoint(), endpoint("/x"), endpoint()]}, ["body.endpoints[2]"]),
        (
            {"endpoints": [endpoint("/{a}"), endpoint("/{b}"), endpoint("/{b}")]},
            ["body.endpoints[1]", "body.endpoints[2]"],
        ),
        ({"endpoints": [endpoint("*"), endpoint("/*")]}, ["body.endpoints[1]"]),
        ({"endpoints": [endpoint(effective_from="2020-01-01")]}, ["body.endpoints[0].effective_from"]),
        ({"endpoints": [endpoint(effective_from="2999-01-01")]}, ["body.endpoints[0].effective_from"]),
    ],
)
async def test_what_is_wrong_is_refused_and_leaves_nothing(
    database_url: str, fields: dict[str, Any], wrong: list[str]
) -> None:
    async with market(database_url) as made:
        told = await made.ada.ask("POST", "/api/apis", {**api_body(), **fields})
        assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", wrong)
        assert await counts(made) == [0, 0, 0]


async def test_defect_43_an_api_is_stored_with_all_its_endpoints_or_not_at_all(database_url: str) -> None:
    """The database itself refuses the last price, as no rule of ours would; the API and its endpoints go with it."""
    async with market(database_url) as made:
        await made.service.database.execute(
            "CREATE FUNCTION break_price() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'broken' USING ERRCODE = '53000'; END $$"
        )
        await made.service.database.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON endpoint_prices FOR EACH ROW WHEN (NEW.amount = 130000)"
            " EXECUTE FUNCTION break_price()"
        )
        endpoints = [endpoint(f"/{number}", f"0.0{number + 10}") for number in range(4)]
        told = await made.ada.ask("POST", "/api/apis", api_body(endpoints=endpoints))
        assert (told.status, told.code) == (503, "SERVICE_UNAVAILABLE")
        assert await counts(made) == [0, 0, 0]
        await made.service.database.execute("DROP TRIGGER broken ON endpoint_prices")
        assert (await made.ada.ask("POST", "/api/apis", api_body(endpoints=endpoints))).status == 201
        assert await counts(made) == [1, 4, 4]


async def test_slugs_are_unique_whoever_registers_at_once(database_url: str) -> None:
    async with market(database_url) as made:
        slugs, statuses, start = [], [], trio.Event()

        async def register(who: Person) -> None:
            await start.wait()
            slugs.append((await made.register(who))["slug"])

        async def claim(who: Person) -> None:
            await start.wait()
            statuses.append((await who.ask("POST", "/api/apis", api_body(slug="mine"))).status)

        async with trio.open_nursery() as nursery:
            for who in (made.ada, made.eve) * 4:
                nursery.start_soon(register, who)
                nursery.start_soon(claim, who)
            await trio.testing.wait_all_tasks_blocked()
            start.set()
        assert len(set(slugs)) == 8
        assert {"weather", "weather-2"} < set(slugs)
        assert sorted(statuses) == [201] + [409] * 7
        told = await made.eve.ask("POST", "/api/apis", api_body(slug="mine"))
        assert (told.code, told.body["details"]) == ("CONFLICT", {"field": "body.slug"})


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.2",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "[fd00::1]",
        "localhost",
    ],
)
async def test_defect_32_a_private_address_is_refused_at_registration(database_url: str, host: str) -> None:
    async with market(database_url, {"UPSTREAM_HOST_ALLOWLIST": "203.0.113.0/24"}) as made:
        body = api_body(base_url=f"http://{host}/v1", endpoints=[endpoint(), endpoint()])
        told = await made.ada.ask("POST", "/api/apis", body)
        assert told.wrong == ["body.base_url", "body.endpoints[1]"]
        assert told.body["details"][0]["code"] == "BLOCKED_ADDRESS"
        assert "127" not in told.body["details"][0]["message"], "where a name leads is not told"
        allowed = await made.ada.ask("POST", "/api/apis", api_body(base_url="http://203.0.113.9/v1/"))
        assert (allowed.status, allowed.body["base_url"]) == (201, "http://203.0.113.9/v1")
        moved = await made.ada.ask("PATCH", f"/api/apis/{allowed.body['id']}", {"base_url": f"http://{host}"})
        assert moved.wrong == ["body.base_url"]
        kept = await made.ada.ask("GET", f"/api/developers/apis/{allowed.body['id']}")
        assert kept.body["base_url"] == "http://203.0.113.9/v1"


@pytest.mark.parametrize("url", ["http://0x7f.1", "http://127.1", "http://2130706433", "http://017700000001"])
async def test_defect_32_odd_spellings_of_an_address_are_refused(database_url: str, url: str) -> None:
    async with market(database_url) as made:
        told = await made.ada.ask("POST", "/api/apis", api_body(base_url=url))
        assert (told.status, told.wrong) == (400, ["body.base_url"])


async def test_a_host_that_cannot_be_resolved_is_told(database_url: str) -> None:
    async with market(database_url) as made:
        told = await made.ada.ask("POST", "/api/apis", api_body(base_url="http://no-such-host.invalid"))
        assert told.wrong == ["body.base_url"]
        assert told.body["details"][0]["code"] == "UNRESOLVABLE_HOST"


# --- changing ---------------------------------------------------------------------------------------------------------


async def test_a_change_sets_what_it_names_and_null_clears(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(
            description="old", category="a", tags=["x"], upstream_headers={"X-Key": SECRET, "X-Other": SECRET}
        )
        path = f"/api/apis/{api['id']}"
        told = await made.ada.ask(
            "PATCH",
            path,
            {"description": None, "tags": None, "name": "New", "upstream_headers": {"x-key": None, "X-Third": "v"}},
        )
        assert told.status == 200
        assert (told.body["description"], told.body["tags"], told.body["name"]) == (None, [], "New")
        assert (told.body["category"], told.body["slug"]) == ("a", api["slug"])
        assert set(told.body["upstream_headers"]) == {"X-Other", "X-Third"}
        stored = await made.service.database.fetch_value("SELECT upstream_headers::text FROM apis")
        assert json.loads(stored) == {"X-Other": SECRET, "X-Third": "v"}
        told = await made.ada.ask("PATCH", path, {"upstream_headers": None, "category": None})
        assert (told.body["upstream_headers"], told.body["category"], told.body["name"]) == ({}, None, "New")
        for body, wrong in (
            ({}, ["body"]),
            ({"name": None}, ["body.name"]),
            ({"base_url": None}, ["body.base_url"]),
            ({"slug": "x"}, ["body.slug"]),
            ({"status": "active"}, ["body.status"]),
            ({"upstream_headers": told.body["upstream_headers"] | {"X-A": "****"}}, ["body.upstream_headers"]),
        ):
            assert (await made.ada.ask("PATCH", path, body)).wrong == wrong


async def test_headers_stay_within_their_bound_over_many_changes(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(upstream_headers={f"X-{number}": "a" for number in range(20)})
        told = await made.ada.ask("PATCH", f"/api/apis/{api['id']}", {"upstream_headers": {"X-20": "a"}})
        assert told.wrong == ["body.upstream_headers"]
        told = await made.ada.ask("PATCH", f"/api/apis/{api['id']}", {"upstream_headers": {"X-20": "a", "X-0": None}})
        assert told.status == 200


async def test_another_developers_api_is_answered_as_one_that_is_not_there(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(status="draft")
        number = api["endpoints"][0]["id"]

        async def answers(who: Person, name: object) -> list[tuple[int, Any]]:
            asked: list[tuple[str, str, object]] = [
                ("GET", f"/api/developers/apis/{name}", None),
                ("GET", f"/api/apis/{name}", None),
                ("PATCH", f"/api/apis/{name}", {"name": "Mine"}),
                ("PATCH", f"/api/apis/{name}", {"base_url": "http://10.0.0.1"}),
                *(("POST", f"/api/apis/{name}/{move}", None) for move in ("publish", "pause", "resume", "archive")),
                ("POST", f"/api/apis/{name}/endpoints/bulk", {"endpoints": [endpoint("/new")]}),
                ("PATCH", f"/api/apis/{name}/endpoints/{number}", {"price_per_call_usdc": "0"}),
                ("DELETE", f"/api/apis/{name}/endpoints/{number}", None),
                ("GET", f"/api/apis/{name}/endpoints/{number}/prices", None),
                ("GET", f"/api/apis/{name}/export", None),
            ]
            told = [await who.ask(*each) for each in asked]
            return [(each.status, each.body | {"requestId": ""}) for each in told]

        others = await answers(made.eve, api["id"])
        assert {status for status, _ in others} == {404}
        assert others == await answers(made.eve, 10**15) == await answers(made.eve, "no-such-api")
        assert others == await answers(made.eve, api["slug"])
        assert (await made.ada.ask("GET", f"/api/developers/apis/{api['id']}")).body == api


@pytest.mark.parametrize(
    "name", ["0", "-1", "x" * 64, "99999999999999999999", "9223372036854775808", "A", "a.b", "%00"]
)
async def test_what_can_name_no_api_is_refused(database_url: str, name: str) -> None:
    async with market(database_url) as made:
        told = await made.anyone.ask("GET", f"/api/apis/{name}")
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")


# --- standings and calls ----------------------------------------------------------------------------------------------


async def test_a_paused_api_is_404_on_calls_at_once_and_resumed_at_once(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(base_url=upstream.url, status="draft")
        consumer = await made.service.consumer("1")
        path = f"/api/apis/{api['id']}"
        assert (await made.call(consumer, "weather/now")).status == 404, "a draft"
        for move, status, called in (
            ("publish", "active", 200),
            ("pause", "paused", 404),
            ("pause", "paused", 404),
            ("resume", "active", 200),
            ("archive", "archived", 404),
            ("archive", "archived", 404),
        ):
            told = await made.ada.ask("POST", f"{path}/{move}")
            assert (told.status, told.body["status"]) == (200, status)
            assert (await made.call(consumer, "weather/now")).status == called, move
            assert (await made.anyone.ask("GET", path)).status == called
        for move in ("publish", "pause", "resume"):
            told = await made.ada.ask("POST", f"{path}/{move}")
            assert (told.status, told.code, told.body["details"]) == (409, "CONFLICT", {"status": "archived"})
        assert (await made.ada.ask("PATCH", path, {"name": "x"})).status == 409
        assert (await made.ada.ask("POST", f"{path}/endpoints/bulk", {"endpoints": [endpoint("/x")]})).status == 409
        assert [each[0] for each in await made.service.events(consumer)] == ["captured", "captured"]
        assert await counts(made) == [1, 1, 1], "what is archived keeps its rows"


async def test_a_draft_is_neither_paused_nor_resumed(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(status="draft")
        for move in ("pause", "resume"):
            assert (await made.ada.ask("POST", f"/api/apis/{api['slug']}/{move}")).status == 409


async def test_the_upstream_and_its_headers_change_at_once(database_url: str) -> None:
    async with (
        market(database_url) as made,
        raw_upstream(respond(body=b"one")) as one,
        raw_upstream(respond(body=b"two")) as two,
    ):
        api = await made.register(base_url=one.url, upstream_headers={"Authorization": f"Bearer {SECRET}"})
        consumer = await made.service.consumer("1")
        assert (await made.call(consumer, "weather/now")).body == b"one"
        assert one.requests[0].header("Authorization") == f"Bearer {SECRET}"
        changes = {"base_url": two.url, "upstream_headers": {"authorization": "Basic x"}}
        assert (await made.ada.ask("PATCH", f"/api/apis/{api['id']}", changes)).status == 200
        assert (await made.call(consumer, "weather/now")).body == b"two"
        assert two.requests[0].header("Authorization") == "Basic x"


# --- own and operators ------------------------------------------------------------------------------------------------


async def test_own_apis_are_listed_in_pages_by_status(database_url: str) -> None:
    async with market(database_url) as made:
        for number in range(5):
            await made.register(name=f"API {number}", status="active" if number % 2 else "draft")
        await made.register(made.eve, name="Other")
        names, cursor = [], None
        while True:
            query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            told = await made.ada.ask("GET", "/api/developers/apis", query=query)
            names += [each["name"] for each in told.body["data"]]
            assert all(each["base_url"] == BASE_URL for each in told.body["data"])
            cursor = told.body["meta"]["nextCursor"]
            if cursor is None:
                break
        assert names == [f"API {number}" for number in (4, 3, 2, 1, 0)]
        drafts = await made.ada.ask("GET", "/api/developers/apis", query={"status": "draft"})
        assert [each["name"] for each in drafts.body["data"]] == ["API 4", "API 2", "API 0"]
        assert (await made.ada.ask("GET", "/api/developers/apis", query={"status": "gone"})).wrong == ["query.status"]


async def test_a_deleted_api_is_gone_for_everyone_until_it_is_restored(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        api = await made.register(base_url=upstream.url)
        consumer = await made.service.consumer("1")
        path = f"/api/admin/apis/{api['id']}"
        assert (await made.call(consumer, "weather/now")).status == 200
        for _ in range(2):
            assert (await made.operator.ask("DELETE", path)).status == 204
            assert (await made.call(consumer, "weather/now")).status == 404
            assert (await made.anyone.ask("GET", "/api/apis/weather")).status == 404
            assert (await made.anyone.ask("GET", "/api/apis")).body["data"] == []
            assert (await made.ada.ask("GET", f"/api/developers/apis/{api['id']}")).status == 404
            assert (await made.ada.ask("PATCH", f"/api/apis/{api['id']}", {"name": "x"})).status == 404
        assert (await made.ada.ask("POST", "/api/apis", api_body(slug="weather"))).status == 409, (
            "its slug stays its own"
        )
        listed = await made.operator.ask("GET", "/api/admin/apis", query={"deleted": "true"})
        assert [(each["id"], each["deletedAt"] is not None) for each in listed.body["data"]] == [(api["id"], True)]
        restored = await made.operator.ask("POST", f"{path}/restore")
        assert (restored.status, restored.body["deletedAt"], restored.body["base_url"]) == (200, None, upstream.url)
        assert restored.body["developer"]["user_id"] == made.ada.user_id
        assert (await made.call(consumer, "weather/now")).status == 200
        assert (await made.operator.ask("DELETE", "/api/admin/apis/nothing")).status == 404
        assert (await made.operator.ask("POST", "/api/admin/apis/nothing/restore")).status == 404


async def test_operators_alone_see_everyones_apis_by_filter(database_url: str) -> None:
    async with market(database_url) as made:
        one = await made.register(name="One 100%")
        await made.register(made.eve, name="Two", status="draft")
        for who, status in ((made.anyone, 401), (made.ada, 403)):
            assert (await who.ask("GET", "/api/admin/apis")).status == status
            assert (await who.ask("DELETE", f"/api/admin/apis/{one['id']}")).status == status
        everything = (await made.operator.ask("GET", "/api/admin/apis")).body["data"]
        assert [each["name"] for each in everything] == ["Two", "One 100%"]
        developer = everything[0]["developer"]["id"]
        for query, names in (
            ({"status": "draft"}, ["Two"]),
            ({"search": "100%"}, ["One 100%"]),
            ({"search": "0_%"}, []),
            ({"deleted": "true"}, []),
            ({"deleted": "false", "limit": 1}, ["Two"]),
            ({"developer_id": developer}, ["Two"]),
        ):
            told = await made.operator.ask("GET", "/api/admin/apis", query=query)  # type: ignore[arg-type]
            assert [each["name"] for each in told.body["data"]] == names
        actions = await made.service.database.fetch(
            "SELECT action, status FROM audit_events WHERE action = 'delete_api'"
        )
        assert sorted(row["status"] for row in actions) == [401, 403]


async def test_defect_52_every_list_has_one_envelope_and_every_error_another(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register()
        prices = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}/prices"
        for who, path in (
            (made.anyone, "/api/apis"),
            (made.ada, "/api/developers/apis"),
            (made.ada, prices),
            (made.operator, "/api/admin/apis"),
        ):
            told = await who.ask("GET", path)
            assert (told.status, set(told.body)) == (200, {"data", "meta"})
            assert told.body["meta"] == {"limit": 20, "nextCursor": None, "hasMore": False}
            wrong = await who.ask("GET", path, query={"limit": 0})
            assert (wrong.status, set(wrong.body)) == (400, {"code", "message", "requestId", "details"})
        gone = await made.anyone.ask("GET", "/api/apis/gone")
        assert (gone.status, set(gone.body)) == (404, {"code", "message", "requestId"})
