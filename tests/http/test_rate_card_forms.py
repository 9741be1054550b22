"""Rate cards over REST: taken, shown, versioned, kept, exported, and refused with the field's name."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from callora.http.rest.forms import iso
from tests.support.market import Market, counts, endpoint, market
from tests.support.rest import Told
from tests.support.upstream import raw_upstream, respond

URLS = {"unit": "url", "quantity_from": "request.json:/urls"}
MINUTES = {"unit": "started_minute", "unit_credits": 10, "held_units": 5, "quantity_from": "response.json:/duration"}
PLAIN = {
    "unit": "call",
    "unit_credits": 0,
    "min_units": 1,
    "held_units": None,
    "max_units": None,
    "quantity_from": None,
}


def whole(sent: Mapping[str, object]) -> dict[str, object]:
    """Return a card as it is shown."""
    return {**PLAIN, **sent}


async def prices(made: Market, api: Any, number: int = 0) -> list[tuple[str, object]]:
    """Return price and unit of every version, the latest first."""
    told = await made.ada.ask("GET", f"/api/apis/{api['id']}/endpoints/{api['endpoints'][number]['id']}/prices")
    return [
        (each["price_per_call_usdc"], each["rate_card"] and each["rate_card"]["unit"]) for each in told.body["data"]
    ]


async def test_a_rate_card_is_taken_shown_to_everyone_and_charged_by(database_url: str) -> None:
    async with market(database_url) as made, raw_upstream(respond(headers=[("X-Count", "3")])) as upstream:
        counted = {"unit": "unit", "quantity_from": "response.header:X-Count", "held_units": 2, "max_units": 9}
        api = await made.register(
            base_url=upstream.url,
            endpoints=[
                endpoint("/bulk", rate_card=URLS),
                endpoint("/stt", rate_card=MINUTES),
                endpoint("/count", rate_card=counted),
                endpoint("/call", rate_card={"unit_credits": 2}),
                endpoint("/now", rate_card={}),
            ],
        )
        expected = [whole(URLS), whole(MINUTES), whole(counted), whole({"unit_credits": 2}), None]
        assert [each["rate_card"] for each in api["endpoints"]] == expected
        shown = (await made.anyone.ask("GET", "/api/apis/weather")).body["endpoints"]
        assert [each["rate_card"] for each in shown] == expected
        listed = (await made.anyone.ask("GET", "/api/apis")).body["data"][0]["endpoints"]
        assert [each["rate_card"] for each in listed] == expected
        told = await made.call(await made.service.consumer("1"), "weather/count")
        assert (told.headers["x-callora-units"], told.headers["x-callora-charge"]) == ("3", "0.0300000")


async def test_a_card_is_a_version_like_a_price_and_stays_where_it_is_not_named(database_url: str) -> None:
    async with market(database_url) as made:
        api = await made.register(endpoints=[endpoint("/bulk", rate_card=URLS)])
        bulk = f"/api/apis/{api['id']}/endpoints/bulk"
        one = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"

        async def put(**fields: object) -> Told:
            told = await made.ada.ask("POST", bulk, {"endpoints": [endpoint("/bulk", **fields)]})  # type: ignore[arg-type]
            assert told.status == 201, told.body
            return told

        assert (await put()).body["data"][0]["rate_card"] == whole(URLS)
        assert await prices(made, api) == [("0.0100000", "url")]
        await put(price="0.02")
        told = await made.ada.ask("PATCH", one, {"price_per_call_usdc": "0.03"})
        assert (told.body["price_per_call_usdc"], told.body["rate_card"]) == ("0.0300000", whole(URLS))
        told = await made.ada.ask("PATCH", one, {"price_per_call_usdc": "0.03", "rate_card": MINUTES})
        assert told.body["rate_card"] == whole(MINUTES), "the same price of another unit is another price"
        await put(price="0.03", rate_card=None)
        assert await prices(made, api) == [
            ("0.0300000", None),
            ("0.0300000", "started_minute"),
            ("0.0300000", "url"),
            ("0.0200000", "url"),
            ("0.0100000", "url"),
        ]
        ahead = iso(made.service.context.clock.now() + timedelta(days=1))
        dated = {"price_per_call_usdc": "0.04", "effective_from": ahead, "rate_card": URLS}
        told = await made.ada.ask("PATCH", one, dated)
        assert (told.body["rate_card"], told.body["next_price"]["rate_card"]) == (None, whole(URLS))


async def test_an_export_takes_its_rate_cards_along(database_url: str) -> None:
    async with market(database_url) as made:
        ahead = iso(made.service.context.clock.now() + timedelta(days=1))
        api = await made.register(endpoints=[endpoint("/bulk", rate_card=URLS), endpoint("/now")])
        one = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"
        dated = {"price_per_call_usdc": "0.04", "effective_from": ahead, "rate_card": MINUTES}
        assert (await made.ada.ask("PATCH", one, dated)).status == 200
        exported = (await made.ada.ask("GET", f"/api/apis/{api['id']}/export")).body
        told = await made.eve.ask("POST", "/api/apis/import", exported)
        assert told.status == 201, told.body
        again = (await made.eve.ask("GET", f"/api/apis/{told.body['id']}/export")).body
        assert again["endpoints"] == exported["endpoints"]
        assert again["endpoints"][0]["rate_card"] == whole(URLS)
        assert again["endpoints"][0]["prices_ahead"][0]["rate_card"] == whole(MINUTES)


async def test_a_card_that_does_not_fit_together_is_refused_by_its_field(database_url: str) -> None:
    async with market(database_url) as made:
        for card, field in (
            ({"unit": "parsec"}, ".unit"),
            ({"unit": "url", "quantity_from": "request.json:urls"}, ".quantity_from"),
            ({"unit": "url", "quantity_from": "request.json:/" + "a" * 200}, ".quantity_from"),
            ({"unit": "url", "quantity_from": "request.json:/a\t"}, ".quantity_from"),
            ({"unit_credits": -1}, ".unit_credits"),
            ({"unit_credits": 10**7}, ".unit_credits"),
            ({**URLS, "min_units": 0}, ".min_units"),
            ({**URLS, "min_units": "2"}, ".min_units"),
            ({**URLS, "more": 1}, ".more"),
            ({"unit": "url"}, ""),
            ({"quantity_from": "request.json:/a"}, ""),
            ({"min_units": 2}, ""),
            ({**URLS, "held_units": 2}, ""),
            ({**MINUTES, "held_units": None}, ""),
            ({**MINUTES, "held_units": 2, "min_units": 3}, ""),
            ({**MINUTES, "held_units": 10**11}, ""),
            ({**URLS, "min_units": 3, "max_units": 2}, ""),
            ({"unit": "url", "quantity_from": "request.bytes"}, ""),
            ({"unit": "byte", "held_units": 1, "quantity_from": "stream.events"}, ""),
        ):
            body = {"name": "Weather", "base_url": "http://127.0.0.1:9", "endpoints": [endpoint(rate_card=card)]}
            told = await made.ada.ask("POST", "/api/apis", body)
            assert (told.status, told.wrong) == (400, [f"body.endpoints[0].rate_card{field}"]), (card, told.body)
        assert await counts(made) == [0, 0, 0]

        minutes = {**MINUTES, "held_units": 1000}
        api = await made.register(endpoints=[endpoint("/stt", rate_card=minutes)])
        one = f"/api/apis/{api['id']}/endpoints/{api['endpoints'][0]['id']}"
        assert (await made.ada.ask("PATCH", one, {"rate_card": URLS})).status == 400, "it names no price"
        told = await made.ada.ask("PATCH", one, {"price_per_call_usdc": "1001"})
        assert (told.status, told.wrong) == (400, ["body.rate_card"]), "a unit that is kept must fit the new price"
        bulk = {"endpoints": [endpoint("/stt", "1001")]}
        told = await made.ada.ask("POST", f"/api/apis/{api['id']}/endpoints/bulk", bulk)
        assert (told.status, told.wrong) == (400, ["body.endpoints[0].rate_card"])
