"""Whole APIs in and out: from OpenAPI documents, and as JSON that is given and taken alike."""

import json
from datetime import timedelta
from typing import Any

import pytest

from callora.http.rest.forms import iso
from tests.support.market import BASE_URL, Market, endpoint, market
from tests.support.rest import Person, Told
from tests.support.upstream import raw_upstream, respond

OPENAPI = "/api/apis/import/openapi"


def operation(**more: object) -> dict[str, object]:
    """Return an operation of a document."""
    return {"responses": {"200": {"description": "ok"}}, **more}


def document(**more: object) -> dict[str, Any]:
    """Return a document of a pet shop."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "  Pet\nShop ", "version": "1", "description": "All pets"},
        "servers": [{"url": f"{BASE_URL}/{{stage}}", "variables": {"stage": {"default": "v1"}}}],
        "paths": {
            "/pets": {
                "parameters": [{"$ref": "#/components/parameters/Limit"}],
                "get": operation(summary="List pets", operationId="listPets"),
                "post": operation(description="Add a pet"),
            },
            "/pets/{id}": {"get": operation(), "x-note": "kept out"},
            "x-internal": {"get": operation()},
        },
        **more,
    }


async def sent(who: Person, doc: object = None, **fields: object) -> Told:
    """Import a document."""
    body = {"document": document() if doc is None else doc, "prices": {"default": "0.01"}, **fields}
    return await who.ask("POST", OPENAPI, body)


async def count(made: Market) -> int:
    """Return how many APIs and endpoints are stored."""
    return int(
        await made.service.database.fetch_value(
            "SELECT (SELECT count(*) FROM apis) + (SELECT count(*) FROM api_endpoints)"
        )
    )


async def test_a_document_becomes_an_api_at_the_prices_named(database_url: str) -> None:
    async with market(database_url) as made:
        prices = {
            "default": "0.01",
            "by_path": {"/pets": "0.02"},
            "by_operation": {"POST /pets": "0.05"},
        }
        told = await sent(made.ada, prices=prices, category="pets", tags=["dog"], upstream_headers={"X-Key": "value"})
        assert told.status == 201, told.body
        api = told.body
        assert (api["name"], api["slug"], api["description"]) == ("Pet Shop", "pet-shop", "All pets")
        assert (api["base_url"], api["status"], api["category"]) == (f"{BASE_URL}/v1", "active", "pets")
        assert [
            (each["method"], each["path"], each["price_per_call_usdc"], each["description"])
            for each in api["endpoints"]
        ] == [
            ("GET", "/pets", "0.0200000", "List pets"),
            ("POST", "/pets", "0.0500000", "Add a pet"),
            ("GET", "/pets/{id}", "0.0100000", None),
        ]
        by_id = {"by_operation": {"listPets": "0.07"}, "default": "1"}
        told = await sent(
            made.ada, prices=by_id, name="Other", slug="other", base_url="http://127.0.0.1:8", status="draft"
        )
        assert (told.body["name"], told.body["slug"], told.body["base_url"]) == ("Other", "other", "http://127.0.0.1:8")
        assert (told.body["status"], told.body["endpoints"][0]["price_per_call_usdc"]) == ("draft", "0.0700000")


async def test_an_imported_api_is_called_and_charged_by_its_operations(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(body=b"ok")) as upstream:
        told = await sent(
            made.ada, base_url=f"{upstream.url}/v2", prices={"default": "0.01", "by_path": {"/pets": "0.02"}}
        )
        assert told.status == 201
        consumer = await made.service.consumer("1")
        for path, charge in (("pets", "0.0200000"), ("pets/7", "0.0100000")):
            assert (await made.call(consumer, f"pet-shop/{path}")).headers["x-callora-charge"] == charge
        assert (await made.call(consumer, "pet-shop/pets/7", "DELETE")).status == 404
        assert [request.target for request in upstream.requests] == ["/v2/pets", "/v2/pets/7"]


async def test_a_dry_run_tells_everything_and_stores_nothing(database_url: str) -> None:
    async with market(database_url) as made:
        told = await sent(made.ada, dry_run=True, prices={"by_path": {"/pets": "0.02", "/petz": "1"}})
        assert told.status == 200
        assert (told.body["dry_run"], told.body["name"], told.body["base_url"]) == (True, "Pet Shop", f"{BASE_URL}/v1")
        assert [each["path"] for each in told.body["endpoints"]] == ["/pets", "/pets"]
        assert [(each["field"], each["code"]) for each in told.body["errors"]] == [
            ("body.document.paths./pets/{id}.get", "UNPRICED"),
            ("body.prices.by_path./petz", "UNKNOWN_OPERATION"),
        ]
        assert await count(made) == 0


async def test_everything_that_cannot_be_offered_is_told_at_once(database_url: str) -> None:
    async with market(database_url) as made:
        doc = {
            "openapi": "2.0",
            "paths": {
                "/a": {"get": operation()},
                "no-slash": {"get": operation()},
                "/files/{name}.json": {"get": operation()},
                "/dots/../x": {"get": operation()},
                "/p/{a}": {"get": operation()},
                "/p/{b}": {"get": operation(), "put": operation()},
                "/all/*": {"get": operation()},
                "/elsewhere": {"$ref": "other.json"},
                "/t": {"trace": operation()},
                "/odd": 7,
            },
        }
        told = await sent(made.ada, doc, prices={"by_path": {"/p/{a}": "1", "/p/{b}": "1"}}, exclude=["/b"])
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")
        assert [(each["field"], each["code"]) for each in told.body["details"]] == [
            ("body.document.openapi", "INVALID_FORMAT"),
            ("body.document.paths./a.get", "UNPRICED"),
            ("body.document.paths.no-slash.get", "UNSUPPORTED_PATH"),
            ("body.document.paths./files/{name}.json.get", "UNSUPPORTED_PATH"),
            ("body.document.paths./dots/../x.get", "UNSUPPORTED_PATH"),
            ("body.document.paths./p/{b}.get", "DUPLICATE"),
            ("body.document.paths./all/*.get", "UNSUPPORTED_PATH"),
            ("body.document.paths./elsewhere", "UNSUPPORTED_REFERENCE"),
            ("body.document.paths./t.trace", "UNSUPPORTED_METHOD"),
            ("body.document.paths./odd", "INVALID_TYPE"),
            ("body.exclude", "UNKNOWN_OPERATION"),
            ("body.name", "REQUIRED"),
            ("body.base_url", "REQUIRED"),
        ]
        assert await count(made) == 0


async def test_what_is_excluded_is_not_offered(database_url: str) -> None:
    async with market(database_url) as made:
        told = await sent(made.ada, exclude=["POST /pets", "/pets/{id}"])
        assert [(each["method"], each["path"]) for each in told.body["endpoints"]] == [("GET", "/pets")]
        everything = await sent(made.ada, exclude=["/pets", "/pets/{id}"])
        assert everything.wrong == ["body.document.paths"]


@pytest.mark.parametrize(
    ("servers", "code"),
    [
        ([{"url": "/relative"}], "REQUIRED"),
        ([], "REQUIRED"),
        ("x", "REQUIRED"),
        ([7], "REQUIRED"),
        ([{"url": "https://{nowhere}/x"}], "INVALID_FORMAT"),
        ([{"url": "http://10.0.0.1"}], "BLOCKED_ADDRESS"),
        ([{"url": "http://user:pw@127.0.0.1"}], "INVALID_FORMAT"),
        ([{"url": "{x}" * 20, "variables": {"x": {"default": "a" * 2000}}}], "REQUIRED"),
    ],
)
async def test_defect_32_a_documents_server_is_checked_like_any_base_url(
    database_url: str, servers: object, code: str
) -> None:
    async with market(database_url) as made:
        told = await sent(made.ada, document(servers=servers))
        assert (told.status, [each["code"] for each in told.body["details"]]) == (400, [code])
        assert (await sent(made.ada, document(servers=servers), base_url=BASE_URL)).status == 201


@pytest.mark.parametrize(
    "doc",
    [
        {},
        {"openapi": 3, "info": [], "paths": []},
        {"openapi": "3.0.3", "info": {"title": "x"}, "paths": {}},
        {"openapi": "3.0.3", "info": {"title": 7, "description": {}}, "paths": {"/x": {"get": [], "post": None}}},
        {"openapi": "3.0.3", "paths": {"/x": {"get": {"operationId": {}, "summary": 7}}}},
        {"openapi": "3.0.3" + "9" * 100, "paths": None},
    ],
)
async def test_a_document_of_odd_types_is_refused_and_never_a_defect(database_url: str, doc: object) -> None:
    async with market(database_url) as made:
        told = await sent(made.ada, doc)
        assert (told.status, told.code) == (400, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prices": {}}, ["body.document.paths./pets.get", "body.document.paths./pets.post"]),
        ({"prices": {"default": "1000001"}}, ["body.prices.default"]),
        ({"prices": {"by_path": {"/pets": 1}}}, ["body.prices.by_path./pets"]),
        ({"prices": {"by_tag": {}}}, ["body.prices.by_tag"]),
        ({"prices": None}, ["body.prices"]),
        ({"document": "{}"}, ["body.document"]),
        ({"dry_run": "yes"}, ["body.dry_run"]),
        (
            {"name": "", "slug": "-", "upstream_headers": {"TE": "x"}},
            ["body.name", "body.slug", "body.upstream_headers"],
        ),
    ],
)
async def test_what_is_wrong_beside_the_document_is_told(
    database_url: str, fields: dict[str, Any], wrong: list[str]
) -> None:
    async with market(database_url) as made:
        body = {"document": document(paths={"/pets": document()["paths"]["/pets"]}), "prices": {"default": "1"}}
        told = await made.ada.ask("POST", OPENAPI, {**body, **fields})
        assert (told.status, told.wrong) == (400, wrong)


async def test_references_are_not_followed_however_they_turn(database_url: str) -> None:
    """A reference to itself, a thousand that double each time, and one to a file: none is ever looked at."""
    bomb = {f"S{number}": {"allOf": [{"$ref": f"#/components/schemas/S{number + 1}"}] * 2} for number in range(1000)}
    schemas = {**bomb, "Loop": {"$ref": "#/components/schemas/Loop"}, "File": {"$ref": "file:///etc/passwd"}}
    paths = {"/x": {"get": operation(requestBody={"$ref": "#/components/schemas/S0"})}}
    async with market(database_url) as made:
        told = await sent(made.ada, document(components={"schemas": schemas}, paths=paths))
        assert (told.status, len(told.body["endpoints"])) == (201, 1)


async def test_a_document_has_its_bounds(database_url: str) -> None:
    async with market(database_url) as made:
        large = document(paths={f"/{number}": {"get": operation()} for number in range(500)})
        large["components"] = {"x-filler": "x" * 1_500_000}
        told = await sent(made.ada, large)
        assert (told.status, told.body["endpointCount"]) == (201, 500)
        large["paths"]["/one-more"] = {"get": operation()}
        assert (await sent(made.ada, large)).wrong == ["body.document.paths"]
        large["components"] = {"x-filler": "x" * 2_200_000}
        assert (await sent(made.ada, large)).code == "REQUEST_BODY_TOO_LARGE"
        many = {f"{letter}{number}": {"get": operation()} for number in range(1000) for letter in "ab"}
        assert len((await sent(made.ada, document(paths=many))).wrong) == 50, "not an answer without end"
        body = json.dumps(document())[:-1] + ', "x-deep": ' + "[" * 5000 + "]" * 5000 + "}"
        raw = f'{{"document": {body}, "prices": {{}}}}'.encode()
        headers = {**made.ada.headers, "Content-Type": "application/json"}
        response = await made.ada.client.post(OPENAPI, content=raw, headers=headers)
        assert (response.status_code, response.json()["code"]) == (400, "VALIDATION_ERROR")


# --- our own form -----------------------------------------------------------------------------------------------------


async def test_an_export_imported_by_another_is_the_same_api_without_its_secrets(database_url: str) -> None:
    async with market(database_url) as made:
        date = iso(made.service.context.clock.now() + timedelta(days=3))
        api = await made.register(
            name="Weather",
            description="All of it\nand more",
            category="weather",
            tags=["a", "b"],
            logo_url="https://ada.example/l.png",
            upstream_headers={"X-Key": "a-secret-that-stays-here"},
            endpoints=[
                endpoint("/now", "0.0000001", "GET", billable_statuses="2xx,404"),
                endpoint("/later", "0.5", "POST", effective_from=date, description="Later"),
                endpoint("*", "1000000", "*", required_scope="all"),
            ],
        )
        place = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"
        await made.ada.ask("PATCH", place, {"price_per_call_usdc": "0.2", "effective_from": date})
        await made.ada.ask("PATCH", place, {"price_per_call_usdc": "0.3", "effective_from": date})
        exported = await made.ada.ask("GET", f"/api/apis/{api['id']}/export")
        assert exported.status == 200
        assert "secret" not in json.dumps(exported.body)
        assert exported.body["endpoints"][0]["prices_ahead"] == [
            {"price_per_call_usdc": "0.3000000", "rate_card": None, "effective_from": date}
        ], "a version that another of its date replaced is not told"
        imported = await made.eve.ask("POST", "/api/apis/import", exported.body)
        assert imported.status == 201, imported.body
        assert imported.body["slug"] == "weather-2"
        again = await made.eve.ask("GET", f"/api/apis/{imported.body['id']}/export")
        assert again.body == {**exported.body, "slug": "weather-2"}
        own = (await made.ada.ask("GET", f"/api/developers/apis/{api['id']}")).body
        differs = {name for name in own if own[name] != imported.body[name]}
        assert differs == {"id", "slug", "endpoints", "upstream_headers", "createdAt", "updatedAt"}
        assert imported.body["upstream_headers"] == {}
        assert [{**each, "id": 0} for each in own["endpoints"]] == [
            {**each, "id": 0} for each in imported.body["endpoints"]
        ]


async def test_dates_that_have_passed_since_an_export_are_at_once(database_url: str) -> None:
    async with market(database_url) as made:
        body = {
            "format": "callora.api/1",
            "name": "Old",
            "base_url": BASE_URL,
            "endpoints": [
                {
                    "method": "GET",
                    "path": "/now",
                    "price_per_call_usdc": "0.01",
                    "prices_ahead": [
                        {"price_per_call_usdc": "0.03", "effective_from": "2021-01-01"},
                        {"price_per_call_usdc": "0.02", "effective_from": "2020-01-01"},
                    ],
                }
            ],
        }
        told = await made.ada.ask("POST", "/api/apis/import", body)
        assert (told.status, told.body["endpoints"][0]["price_per_call_usdc"]) == (201, "0.0300000")
        assert (told.body["slug"], told.body["endpoints"][0]["next_price"]) == ("old", None)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"format": "callora.api/2"}, ["body.format"]),
        (
            {"base_url": "http://10.0.0.1", "endpoints": [endpoint(), endpoint()]},
            ["body.base_url", "body.endpoints[1]"],
        ),
        ({"endpoints": [{"method": "GET", "path": "/x"}]}, ["body.endpoints[0]"]),
        ({"endpoints": [{**endpoint(), "id": 3}]}, ["body.endpoints[0].id"]),
        ({"id": 3}, ["body.id"]),
        (
            {"endpoints": [endpoint(prices_ahead=[{"price_per_call_usdc": "1", "effective_from": "2999-01-01"}])]},
            ["body.endpoints[0].prices_ahead[0].effective_from"],
        ),
        ({"upstream_headers": {"Host": "x"}}, ["body.upstream_headers"]),
    ],
)
async def test_what_is_no_export_is_refused_whole(database_url: str, change: dict[str, Any], wrong: list[str]) -> None:
    async with market(database_url) as made:
        body = {"format": "callora.api/1", "name": "x", "base_url": BASE_URL, "endpoints": [endpoint()]}
        told = await made.ada.ask("POST", "/api/apis/import", {**body, **change})
        assert (told.status, told.wrong) == (400, wrong)
        assert await count(made) == 0


async def test_a_paused_api_is_exported_as_a_draft(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register()
        await made.ada.ask("POST", f"/api/apis/{api['id']}/pause")
        exported = await made.ada.ask("GET", f"/api/apis/{api['slug']}/export")
        assert exported.body["status"] == "draft"
        assert (await made.anyone.ask("GET", f"/api/apis/{api['slug']}/export")).status == 401
