"""Developers' profiles over REST."""

import pytest
import trio
import trio.testing

from tests.support.market import market

PATH = "/api/developers/me"


async def test_a_profile_is_blank_at_first_and_the_same_afterwards(database_url: str) -> None:
    async with market(database_url) as made:
        first = await made.ada.ask("GET", PATH)
        assert first.status == 200
        assert list(first.body) == [
            "id",
            "user_id",
            "name",
            "website",
            "description",
            "category",
            "created_at",
            "updated_at",
        ]
        assert first.body["user_id"] == made.ada.user_id
        assert {first.body[name] for name in ("name", "website", "description", "category")} == {None}
        assert (await made.ada.ask("GET", PATH)).body == first.body
        assert (await made.eve.ask("GET", PATH)).body["id"] != first.body["id"]
        assert (await made.anyone.ask("GET", PATH)).status == 401


async def test_defect_43_two_parallel_first_calls_make_one_profile(database_url: str) -> None:
    async with market(database_url) as made:
        answers = []
        start = trio.Event()

        async def first(method: str, body: object) -> None:
            await start.wait()
            answers.append(await made.ada.ask(method, PATH, body))

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(first, *(("GET", None) if number % 2 else ("PATCH", {"name": "Ada"})))
            await trio.testing.wait_all_tasks_blocked()
            start.set()
        assert [answer.status for answer in answers] == [200] * 12
        assert len({answer.body["id"] for answer in answers}) == 1
        assert await made.service.database.fetch_value("SELECT count(*) FROM developers") == 1
        assert (await made.ada.ask("GET", PATH)).body["name"] == "Ada", "no first call overwrote another"


async def test_a_change_sets_what_it_names_and_null_clears(database_url: str) -> None:
    async with market(database_url) as made:
        whole = {
            "name": "  Ada Ltd ",
            "website": "https://ada.example/a?b=c#d",
            "description": "Weather\nand more",
            "category": "developer-tools",
        }
        told = await made.ada.ask("PATCH", PATH, whole)
        assert told.status == 200
        assert {name: told.body[name] for name in whole} == {**whole, "name": "Ada Ltd"}
        told = await made.ada.ask("PATCH", PATH, {"website": None, "category": None})
        assert (told.body["name"], told.body["description"]) == ("Ada Ltd", "Weather\nand more")
        assert (told.body["website"], told.body["category"]) == (None, None)
        assert told.body["updated_at"] > told.body["created_at"]
        assert (await made.eve.ask("GET", PATH)).body["name"] is None


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, ["body"]),
        ({"name": " "}, ["body.name"]),
        ({"name": "x" * 121}, ["body.name"]),
        ({"name": "a\nb"}, ["body.name"]),
        ({"name": 7}, ["body.name"]),
        ({"description": "x" * 501}, ["body.description"]),
        ({"category": "weather"}, ["body.category"]),
        ({"user_id": "x"}, ["body.user_id"]),
        (
            {"name": "", "website": "ftp://x", "description": "", "category": ""},
            ["body.name", "body.website", "body.description", "body.category"],
        ),
    ],
)
async def test_everything_wrong_with_a_change_is_told_at_once(
    database_url: str, body: object, wrong: list[str]
) -> None:
    async with market(database_url) as made:
        told = await made.ada.ask("PATCH", PATH, body)
        assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", wrong)
        assert (await made.ada.ask("GET", PATH)).body["name"] is None


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "https://",
        "https://user:secret@ada.example",
        "//ada.example",
        "https://ada.example/<script>",
        "https://ada.example/ x",
        "https://ada.example\\x",
        "https://-ada.example",
        "https://ada.example/" + "x" * 2048,
        "",
    ],
)
async def test_a_website_is_an_http_url_that_a_page_can_link_to(database_url: str, url: str) -> None:
    async with market(database_url) as made:
        assert (await made.ada.ask("PATCH", PATH, {"website": url})).wrong == ["body.website"]
