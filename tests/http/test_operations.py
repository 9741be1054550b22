"""Operations: what stands before and behind every handler, whatever it does."""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import trio
from quart import Response
from quart.testing.utils import sentinel
from quart_trio import QuartTrio
from trio.testing import MockClock
from werkzeug.datastructures import Headers

from callora.config.loading import load_settings
from callora.http.problems import ProblemRaised
from callora.http.rest.app import create_app
from callora.http.rest.deps import RestDeps
from callora.http.rest.document import implied_problems, make_document
from callora.http.rest.forms import ApiNumber, Form, PageQuery
from callora.http.rest.frame import Exchange
from callora.http.rest.identity import Authenticator, Identity, People
from callora.http.rest.limits import PaceRule, RestLimiter
from callora.http.rest.operations import Access, Answer, Ask, Doors, Operation, Routes, Text
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import UserId
from callora.logs import Logs
from callora.metrics import Metrics
from callora.service import SystemClock

TOKEN = "a-service-token-of-forty-characters-----"


class ById(Form):
    thingId: ApiNumber


class NewThing(Form):
    name: str


class Thing(Form):
    id: int
    name: str
    by: str | None


@attrs.define
class House:
    app: QuartTrio
    operations: list[Operation]
    audited: list[tuple[str, str, int]]
    services: list[tuple[str, int]]
    """Accesses by services that were counted."""

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> tuple[int, Headers, Any]:
        answer = await self.app.test_client().open(
            path, method=method, headers=dict(headers or {}), data=data, json=sentinel
        )
        assert isinstance(answer, Response)
        body = await answer.get_data(as_text=False)
        json_ = answer.headers.get("content-type", "") == "application/json"
        return answer.status_code, answer.headers, json.loads(body) if json_ and body else body


async def subject(name: str) -> UserId:
    await trio.lowlevel.checkpoint()
    return UserId(f"id-of-{name}")


async def alive(_: str, __: UserId) -> bool:
    await trio.lowlevel.checkpoint()
    return True


def routes() -> Routes:
    made = Routes("Things")

    @made.add(
        "GET",
        "/api/things/{thingId}",
        access=Access.PUBLIC,
        path_form=ById,
        query=PageQuery,
        answers={200: Thing},
        etag=True,
    )
    async def get_thing(ask: Ask[ById, PageQuery, Any]) -> Answer:
        """One thing."""
        await trio.lowlevel.checkpoint()
        return Answer(Thing(id=ask.path.thingId, name=str(ask.query.limit), by=None))

    @made.add("POST", "/api/things", access=Access.USER, body=NewThing, answers={201: Thing}, aliases=("/things",))
    async def add_thing(ask: Ask[Any, Any, NewThing]) -> Answer:
        """A new thing.

        With a name.
        """
        await trio.lowlevel.checkpoint()
        match ask.body.name:
            case "down":
                raise StoreUnavailable("no")
            case "unknown":
                raise OutcomeUnknown("who knows")
            case "broken":
                raise RuntimeError("a defect")
        return Answer(Thing(id=1, name=ask.body.name, by=ask.user_id), 201)

    @made.add(
        "DELETE",
        "/api/things/{thingId}",
        access=Access.ADMIN,
        path_form=ById,
        answers={204: None},
        problems=("NOT_FOUND",),
    )
    async def delete_thing(ask: Ask[ById, Any, Any]) -> Answer:
        """No more thing."""
        await trio.lowlevel.checkpoint()
        if ask.path.thingId == 404:
            raise ProblemRaised("NOT_FOUND")
        return Answer(status=204)

    @made.add("POST", "/api/things/bulk", access=Access.PUBLIC, answers={200: Thing})
    async def put_things(_: Ask[Any, Any, Any]) -> Answer:
        """Many things."""
        await trio.lowlevel.checkpoint()
        return Answer(Thing(id=1, name="many", by=None))

    @made.add("POST", "/api/served", access=Access.SERVICE, query=PageQuery, answers={200: Thing}, audited=True)
    async def serve_thing(ask: Ask[Any, Any, Any]) -> Answer:
        """For services."""
        await trio.lowlevel.checkpoint()
        assert ask.identity is not None
        return Answer(Thing(id=1, name="served", by=ask.identity.actor))

    @made.add("GET", "/api/text", access=Access.PUBLIC, answers={200: Text("text/csv", "Lines")})
    async def get_text(_: Ask[Any, Any, Any]) -> Answer:
        """Lines."""
        await trio.lowlevel.checkpoint()
        return Answer(b"a,b\r\n")

    return made


def house(rules: tuple[PaceRule, ...] = ()) -> House:
    logs = Logs(SystemClock(), level="critical", stream=io.StringIO())
    settings = load_settings({"APP_ENV": "test", "ADMIN_API_KEY": "the-admin-key", "INTERNAL_SERVICE_TOKEN": TOKEN})
    audited: list[tuple[str, str, int]] = []
    services: list[tuple[str, int]] = []

    async def audit(
        identity: Identity | None, operation: Operation, _: Exchange, status: int, __: Mapping[str, str]
    ) -> None:
        await trio.lowlevel.checkpoint()
        audited.append((identity.actor if identity else "unknown", operation.operation_id, status))

    def counted(operation: str, status: int) -> None:
        services.append((operation, status))

    deps = RestDeps(
        settings=settings,
        metrics=Metrics(),
        logger=logs.logger("rest"),
        clock=SystemClock(),
        new_request_id=lambda: "made",
        database_check=trio.lowlevel.checkpoint,
        draining=lambda: False,
    )
    authenticator = Authenticator(
        tokens=None,
        admin_key=settings.admin_api_key,
        admin_networks=(),
        service_token=settings.internal_service_token,
        user_header_allowed=True,
        people=People(subject, alive),
        clock=SystemClock(),
    )
    operations = routes().operations
    app = create_app(deps, operations, Doors(authenticator, RestLimiter(rules).admit, audit, counted))
    return House(app, operations, audited, services)


JSON = {"Content-Type": "application/json", "X-User-Id": "ann"}


async def test_what_fits_reaches_the_handler_and_its_answer_the_client() -> None:
    made = house()
    assert (await made.ask("GET", "/api/things/7?limit=5"))[2] == {"id": 7, "name": "5", "by": None}
    status, _, body = await made.ask("POST", "/api/things", JSON, b'{"name": "x"}')
    assert (status, body) == (201, {"id": 1, "name": "x", "by": "id-of-ann"})
    assert (await made.ask("POST", "/things", JSON, b'{"name": "x"}'))[0] == 201


async def test_wrong_fields_of_path_query_and_body_are_told_together() -> None:
    status, _, body = await house().ask("GET", "/api/things/0?limit=0&more=1")
    assert (status, body["code"]) == (400, "VALIDATION_ERROR")
    assert [detail["field"] for detail in body["details"]] == ["path.thingId", "query.limit", "query.more"]


async def test_credentials_are_asked_for_before_the_body_is_looked_at() -> None:
    status, headers, body = await house().ask("POST", "/api/things", {"Content-Type": "application/json"}, b"{")
    assert (status, body["code"], headers["www-authenticate"]) == (401, "UNAUTHORIZED", "Bearer")


async def test_a_body_of_another_type_is_415() -> None:
    status, _, body = await house().ask("POST", "/api/things", {"X-User-Id": "ann", "Content-Type": "text/plain"}, b"x")
    assert (status, body["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("down", 503, "SERVICE_UNAVAILABLE"),
        ("unknown", 504, "OUTCOME_UNKNOWN"),
        ("broken", 500, "INTERNAL_SERVER_ERROR"),
    ],
)
async def test_faults_become_problems(name: str, status: int, code: str) -> None:
    got, _, body = await house().ask("POST", "/api/things", JSON, json.dumps({"name": name}).encode())
    assert (got, body["code"]) == (status, code)


async def test_an_unchanged_answer_is_304_without_a_body() -> None:
    made = house()
    _, headers, body = await made.ask("GET", "/api/things/7")
    tag = headers["etag"]
    assert tag == f'"{hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()[:32]}"'
    for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        status, headers, empty = await made.ask("GET", "/api/things/7", {"If-None-Match": condition})
        assert (status, empty, headers["etag"]) == (304, b"", tag)
    assert (await made.ask("GET", "/api/things/8", {"If-None-Match": tag}))[0] == 200


async def test_every_access_of_a_service_is_counted_and_audited_where_the_operation_says_so() -> None:
    made = house((PaceRule("rest", ("/api/served",), 2, 60.0),))
    good = {"Authorization": f"Bearer {TOKEN}"}
    for _ in range(5):
        status, _, body = await made.ask("POST", "/api/served", good)
        assert (status, body["by"]) == (200, "service-token"), "a service speaks for many, and is not paced"
    assert (await made.ask("POST", "/api/served?limit=0", good))[0] == 400
    for headers in (
        {},
        {"X-Service-Token": TOKEN},
        {"X-Admin-Api-Key": "the-admin-key"},
        {"X-User-Id": "ann"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer"},
    ):
        status, got, body = await made.ask("POST", "/api/served", headers)
        assert (status, body["code"]) in ((401, "UNAUTHORIZED"), (429, "TOO_MANY_REQUESTS"))
        assert TOKEN not in json.dumps(body) + str(got)
    assert (status, body["details"]["limitedBy"]) == (429, "rest"), "whoever guesses is paced"
    statuses = [200] * 5 + [400] + [401] * 2 + [429] * 6
    assert made.services == [("serve_thing", each) for each in statuses]
    assert made.audited == [("service-token" if each < 401 else "unknown", "serve_thing", each) for each in statuses]
    for method, path in (("POST", "/api/things"), ("DELETE", "/api/things/1")):
        status, _, body = await made.ask(method, path, good)
        assert (status, body["code"]) == (401, "INVALID_TOKEN"), "it opens nothing else"


async def test_every_access_of_an_operator_is_audited_whatever_came_of_it() -> None:
    made = house()
    key = {"X-Admin-Api-Key": "the-admin-key"}
    assert (await made.ask("DELETE", "/api/things/1", key))[0] == 204
    assert (await made.ask("DELETE", "/api/things/404", key))[0] == 404
    assert (await made.ask("DELETE", "/api/things/x", key))[0] == 400
    assert (await made.ask("DELETE", "/api/things/1", {"X-Admin-Api-Key": "guess"}))[0] == 401
    assert (await made.ask("DELETE", "/api/things/1", {"X-User-Id": "ann"}))[0] == 403
    assert made.audited == [
        ("admin-key", "delete_thing", 204),
        ("admin-key", "delete_thing", 404),
        ("admin-key", "delete_thing", 400),
        ("unknown", "delete_thing", 401),
        ("unknown", "delete_thing", 403),
    ]


async def test_pace_is_per_user_and_per_address_and_refusals_take_nothing(
    autojump_clock: MockClock,
) -> None:
    made = house((PaceRule("rest", ("/api/things",), 2, 60.0),))
    for _ in range(2):
        assert (await made.ask("POST", "/api/things", JSON, b'{"name": "x"}'))[0] == 201
    status, headers, body = await made.ask("POST", "/api/things", JSON, b'{"name": "x"}')
    assert (status, body["code"], headers["retry-after"]) == (429, "TOO_MANY_REQUESTS", "60")
    assert body["details"] == {"limitedBy": "rest", "limit": 2, "retryAfter": 60}
    assert (await made.ask("POST", "/api/things", {**JSON, "X-User-Id": "bob"}, b'{"name": "x"}'))[0] == 201
    assert [(await made.ask("POST", "/api/things", {}, b""))[0] for _ in range(3)] == [401, 401, 429]
    assert (await made.ask("GET", "/api/text"))[0] == 200
    await trio.sleep(60)
    assert (await made.ask("POST", "/api/things", JSON, b'{"name": "x"}'))[0] == 201


def test_the_document_shows_what_is_validated() -> None:
    operations = routes().operations
    document = make_document(operations, version="1")
    get = document["paths"]["/api/things/{thingId}"]["get"]
    assert [(each["name"], each["in"], each["required"]) for each in get["parameters"]] == [
        ("thingId", "path", True),
        ("limit", "query", False),
        ("cursor", "query", False),
        ("If-None-Match", "header", False),
    ]
    assert get["parameters"][0]["schema"]["minimum"] == 1
    assert get["security"] == []
    assert "304" in get["responses"]
    post = document["paths"]["/api/things"]["post"]
    assert (post["summary"], post["description"]) == ("A new thing", "With a name.")
    assert post["requestBody"]["required"]
    assert document["paths"]["/things"]["post"]["operationId"] == "add_thing_alias"
    body = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][body]["additionalProperties"] is False
    admin = document["paths"]["/api/things/{thingId}"]["delete"]
    assert admin["security"] == [{"adminKey": []}, {"session": []}]
    for operation in operations:
        shown = document["paths"][operation.path][operation.method.lower()]["responses"]
        listed = {code for answer in shown.values() for code in answer["description"].split(", ")}
        assert set(implied_problems(operation)) <= listed


@pytest.mark.parametrize(
    ("client", "caller"),
    [
        ("192.0.2.7", "ip:192.0.2.7"),
        ("::ffff:192.0.2.7", "ip:192.0.2.7"),
        ("2001:db8:1:2:3::4", "ip:2001:db8:1:2::/64"),
        ("", "ip:"),
    ],
)
def test_an_address_is_counted_as_what_one_party_holds(client: str, caller: str) -> None:
    assert Exchange("id", "GET", client, None, 0).caller == caller


def test_a_status_that_is_an_answer_and_a_problem_shows_both() -> None:
    made = Routes("Probes")

    @made.add("GET", "/probe", access=Access.PUBLIC, answers={200: Thing, 503: Thing})
    async def get_probe(_: Ask[Any, Any, Any]) -> Answer:
        """How it fares."""
        await trio.lowlevel.checkpoint()
        return Answer(Thing(id=1, name="x", by=None), 503)

    answer = make_document(made.operations, version="1")["paths"]["/probe"]["get"]["responses"]["503"]
    thing, problem = answer["content"]["application/json"]["schema"]["anyOf"]
    assert thing["$ref"].endswith("/Thing")
    assert "SERVICE_UNAVAILABLE" in problem["allOf"][1]["properties"]["code"]["enum"]


async def test_a_word_in_the_place_of_a_parameter_is_not_taken_for_its_value() -> None:
    made = house()
    assert (await made.ask("POST", "/api/things/bulk"))[2]["name"] == "many"
    status, headers, body = await made.ask("GET", "/api/things/bulk")
    assert (status, body["code"], headers["allow"]) == (405, "METHOD_NOT_ALLOWED", "OPTIONS, POST")


def test_no_route_is_missing_from_the_document() -> None:
    made = house()
    document = make_document(made.operations, version="1")
    declared = {
        (re.sub(r"\{(\w+)\}", r"<\1>", path), method.upper())
        for path, item in document["paths"].items()
        for method in item
    }
    routed = {
        (rule.rule, method)
        for rule in made.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.endpoint.startswith("none of ")
    }
    assert routed == declared


def test_a_declaration_whose_parameters_have_no_form_is_refused() -> None:
    with pytest.raises(AssertionError, match="parameters and form"):

        @Routes("x").add("GET", "/api/x/{id}", access=Access.PUBLIC, answers={204: None})
        async def get_x(_: Ask[Any, Any, Any]) -> Answer:
            """X."""
            await trio.lowlevel.checkpoint()
            return Answer(status=204)
