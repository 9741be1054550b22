"""Calls priced by units, through HTTP: what is held, what is charged, and what is refused before anything is held."""

import json

import trio

from callora.ledger.money import parse_usdc
from tests.support.client import RawClient, call, request_bytes
from tests.support.keys import PATH, bearer, token_shop
from tests.support.rates import answer, card, meter, told
from tests.support.upstream import big, chunked, echo, respond, sequence, sse, wrong_length

UNIT = parse_usdc("0.001")


async def test_a22_a_list_in_the_request_costs_one_unit_per_item(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("url", "request.json:/urls"))
        for urls, units in ((["a"], 1), (["a", "b", "c"], 3), ([], 1)):
            response = await it.ask_json(path, {"urls": urls})
            assert told(response) == (200, f"0.00{units}0000", str(units))
            assert await it.last() == ("captured", "delivered", units * UNIT, units, units * UNIT)
        assert await it.spent() == 5 * UNIT


async def test_a24_a_text_in_the_request_costs_one_unit_per_started_thousand_characters(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("started_1000_chars", "request.json:/text"))
        for length, units in ((1, 1), (1000, 1), (1001, 2), (0, 1)):
            assert told(await it.ask_json(path, {"text": "é" * length})) == (200, f"0.00{units}0000", str(units))
        assert told(await it.ask_json(path, {})) == (200, "0.0010000", "1"), "absent is the least"


async def test_a24_a_duration_in_the_answer_costs_one_unit_per_started_minute(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=1), "0.01")
        for document, units in (({"duration": 60}, 1), ({"duration": 61}, 2), ({"duration": 60.5}, 2), ({}, 1)):
            it.upstream.handler = answer(document)
            response = await it.ask(path, b"sound")
            assert told(response) == (200, f"0.0{units}00000", str(units))
            assert response.json() == document
            assert await it.last() == ("captured", "delivered", units * 10 * UNIT, units, units * 10 * UNIT)
        assert it.upstream.requests[-1].header("Accept-Encoding") == "identity", "what is compressed cannot be read"


async def test_a25_an_upstream_s_error_costs_nothing_and_is_recorded(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=5))
        for status in (400, 404, 500, 503):
            it.upstream.handler = answer({"duration": 600}, status=status)
            assert told(await it.ask(path)) == (status, "0.0000000", None)
            assert await it.last() == ("released", "upstream_status", None, None, 5 * UNIT)
        assert await it.spent() == 0


async def test_wa4_a_long_answer_is_never_paid_by_an_overdraft(database_url: str) -> None:
    async with meter(database_url, "0.025") as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=1), "0.01")
        it.upstream.handler = answer({"duration": 3600})
        response = await it.ask(path)
        assert told(response) == (200, "0.0100000", "1")
        assert await it.last() == ("captured", "shortfall", 10 * UNIT, 1, 10 * UNIT)
        assert await it.service.balance(it.consumer) == (15 * UNIT, 0)


async def test_what_is_held_above_the_answer_is_given_back_and_what_is_missing_is_held_first(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("unit", "response.header:X-Count", held=10, least=2, most=20))
        for count, units, held, outcome in (
            ("3", 3, 10, "delivered"),
            ("0", 2, 10, "delivered"),
            ("10", 10, 10, "delivered"),
            ("15", 15, 15, "delivered"),
            ("999", 20, 20, "shortfall"),
        ):
            it.upstream.handler = respond(headers=[("X-Count", count)])
            assert told(await it.ask(path)) == (200, f"0.0{units:02d}0000", str(units))
            assert await it.last() == ("captured", outcome, units * UNIT, units, held * UNIT)


async def test_an_answer_s_quantity_that_is_none_is_charged_as_the_least_and_said_so(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("unit", "response.header:X-Count", held=10, least=2))
        for value in ("-1", "1e3", "NaN", "", "12,5", "9" * 30):
            it.upstream.handler = respond(headers=[("X-Count", value)], body=b"x")
            response = await it.ask(path)
            assert (*told(response), response.body) == (200, "0.0020000", "2", b"x")
            assert await it.last() == ("captured", "quantity_unreadable", 2 * UNIT, 2, 10 * UNIT)
        it.upstream.handler = respond(headers=[("X-Count", "3"), ("X-Count", "30")])
        assert told(await it.ask(path))[2] == "2"


async def test_an_answer_that_cannot_be_read_for_its_quantity_passes_whole_and_costs_the_least(
    database_url: str,
) -> None:
    ready = trio.Event()
    ready.set()
    long = json.dumps({"duration": 600, "text": "x" * 1_048_576}).encode()
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=3))
        for handler, body in (
            (respond(body=b"no json"), b"no json"),
            (respond(body=b'{"duration": "61"}'), b'{"duration": "61"}'),
            (respond(body=long), long),
            (chunked([long[:100], long[100:]]), long),
            (sse([(ready, b"data: 1\n\n")]), b"data: 1\n\n"),
            (respond(204), b""),
        ):
            it.upstream.handler = handler
            response = await it.ask(path)
            assert response.header("X-Callora-Units") == "1"
            assert response.body == body
            assert (await it.last())[:4] == ("captured", "quantity_unreadable", UNIT, 1)


async def test_bytes_are_counted_in_requests_and_in_answers(database_url: str) -> None:
    async with meter(database_url) as it:
        it.upstream.handler = echo()
        sent = await it.sell(card("byte", "request.bytes"), "0.0000001")
        assert (await it.ask(sent, b"x" * 5000)).header("X-Callora-Units") == "5000"
        in_chunks = [*it.consumer.headers, ("Transfer-Encoding", "chunked")]
        raw = b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
        async with RawClient.connect(port=it.service.port) as client:
            await client.send(request_bytes("POST", sent, in_chunks) + raw)
            response = await client.read_response()
        assert (response.header("X-Callora-Units"), response.body) == ("7", b"abcdefg")
        got = await it.sell(card("started_1000_chars", "response.bytes", held=1))
        assert (await it.ask(got, b"x" * 2001)).header("X-Callora-Units") == "3"
        it.upstream.handler = chunked([b"x" * 999, b"yy"])
        assert (await it.ask(got)).header("X-Callora-Units") == "2"
        it.upstream.handler = big(1)
        long = await it.ask(got, b"", ("X-Callora-Max-Charge", "0.9"))
        assert (long.header("X-Callora-Units"), len(long.body)) == ("1", 1_048_576)
        assert (await it.last())[1] == "shortfall"
        head = await call(it.service.port, "HEAD", got, it.consumer.headers)
        assert head.header("X-Callora-Units") == "1", "an answer without a body has no bytes"


async def test_a_request_whose_quantity_cannot_be_read_is_400_and_names_the_field(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("url", "request.json:/lists/0/urls", most=50))
        for urls, says in (
            ("no json", "JSON"),
            ('"a"', "array or a number"),
            ("-1", "from 0"),
            ("NaN", "NaN"),
            ('[1], "urls": []', "once"),
            ("1e30", "from 0"),
            ("51", "at most 50"),
        ):
            response = await it.ask(path, f'{{"lists": [{{"urls": {urls}}}]}}'.encode())
            assert (response.status, response.json()["code"]) == (400, "VALIDATION_ERROR")
            (detail,) = response.json()["details"]
            assert (detail["field"], says in detail["message"]) == ("body.lists[0].urls", True), detail
        assert (await it.ask(path)).status == 400, "no body is no JSON"
        assert (await it.service.events(it.consumer), it.upstream.requests) == ([], [])


async def test_a_quantity_in_a_header_is_read_as_it_is_passed_on(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "request.header:X-Duration"))
        assert told(await it.ask(path, b"", ("x-duration", "61.2"))) == (200, "0.0020000", "2")
        assert it.upstream.requests[-1].header("x-duration") == "61.2"
        assert told(await it.ask(path)) == (200, "0.0010000", "1")
        for values in (["1", "600"], ["long"]):
            response = await it.ask(path, b"", *(("X-Duration", value) for value in values))
            assert (response.status, response.json()["details"][0]["field"]) == (400, "header.X-Duration")


async def test_a_body_is_read_for_its_quantity_up_to_a_mebibyte_and_passed_on_byte_for_byte(database_url: str) -> None:
    async with meter(database_url) as it:
        it.upstream.handler = echo()
        path = await it.sell(card("url", "request.json:/urls"))
        odd = b' {"urls" : [1,\t2 ] , "more": 1.50 }\r\n'
        response = await it.ask(path, odd)
        assert (response.header("X-Callora-Units"), response.body) == ("2", odd)
        large = b'{"urls": [1, 2, 3], "text": "' + b"x" * (1_048_576 - 31) + b'"}'
        response = await it.ask(path, large)
        assert (response.header("X-Callora-Units"), response.body) == ("3", large)
        refused = await it.ask(path, large + b" ")
        assert (refused.status, refused.json()["code"]) == (413, "REQUEST_BODY_TOO_LARGE")
        assert "split" in refused.json()["message"]
        assert len(it.upstream.requests) == 2


async def test_a_caller_s_highest_charge_is_kept(database_url: str) -> None:
    async with meter(database_url) as it:
        bulk = await it.sell(card("url", "request.json:/urls"))
        response = await it.ask_json(bulk, {"urls": [1, 2, 3]}, ("X-Callora-Max-Charge", "0.0029999"))
        assert (response.status, response.json()["code"]) == (402, "MAX_CHARGE_EXCEEDED")
        assert response.json()["details"] == {"required": "0.0030000", "maxCharge": "0.0029999"}
        assert (await it.service.events(it.consumer), it.upstream.requests) == ([], [])
        assert told(await it.ask_json(bulk, {"urls": [1, 2, 3]}, ("X-Callora-Max-Charge", "0.003")))[0] == 200
        assert it.upstream.requests[-1].header("X-Callora-Max-Charge") is None, "nobody learns what one would pay"

        late = await it.sell(card("unit", "response.header:X-Count", held=10))
        it.upstream.handler = respond(headers=[("X-Count", "7")])
        assert told(await it.ask(late, b"", ("X-Callora-Max-Charge", "0.0055"))) == (200, "0.0050000", "5")
        assert await it.last() == ("captured", "shortfall", 5 * UNIT, 5, 5 * UNIT)
        assert told(await it.ask(late, b"", ("X-Callora-Max-Charge", "0.008"))) == (200, "0.0070000", "7")
        assert (await it.ask(late, b"", ("X-Callora-Max-Charge", "0.0009999"))).status == 402

        plain = await it.sell(None)
        assert (await it.ask(plain, b"", ("X-Callora-Max-Charge", "0.0009999"))).status == 402
        assert told(await it.ask(plain, b"", ("X-Callora-Max-Charge", "0.001"))) == (200, "0.0010000", None)


async def test_a_highest_charge_that_is_malformed_is_400(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(None)
        for values in (["0.00000001"], ["-1"], ["1e3"], [""], ["1", "1"], ["\xb2"]):
            response = await it.ask(path, b"", *(("X-Callora-Max-Charge", value) for value in values))
            assert (response.status, response.json()["details"][0]["field"]) == (400, "header.X-Callora-Max-Charge")
        assert it.upstream.requests == []


async def test_more_than_the_balance_is_402_before_the_upstream(database_url: str) -> None:
    async with meter(database_url, "0.0025") as it:
        path = await it.sell(card("url", "request.json:/urls"))
        response = await it.ask_json(path, {"urls": [1, 2, 3]})
        assert (response.status, response.json()["details"]) == (
            402,
            {"required": "0.0030000", "available": "0.0025000"},
        )
        assert it.upstream.requests == []
        assert told(await it.ask_json(path, {"urls": [1, 2]}))[0] == 200


async def test_a_spending_limit_is_asked_again_for_what_an_answer_costs_more(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("unit", "response.header:X-Count", held=2))
        await it.service.database.execute(
            "INSERT INTO spending_limits (vault_id, period, amount, set_by, set_at) VALUES ($1, 'day', $2, $3, now())",
            it.consumer.vault_id,
            5 * UNIT,
            it.consumer.user_id,
        )
        for count, units, outcome in (("3", 3, "delivered"), ("3", 2, "shortfall")):
            it.upstream.handler = respond(headers=[("X-Count", count)])
            assert told(await it.ask(path)) == (200, f"0.00{units}0000", str(units))
            assert (await it.last())[:4] == ("captured", outcome, units * UNIT, units)
        refused = await it.ask(path)
        assert (refused.status, refused.json()["code"]) == (402, "SPENDING_LIMIT_EXCEEDED")


async def test_a_duplicate_of_a_call_priced_by_units_is_free_and_tells_what_the_first_cost(database_url: str) -> None:
    keyed = ("Idempotency-Key", "one")
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=1))
        it.upstream.handler = sequence(answer({"duration": 100}), answer({"duration": 1}))
        first, second = await it.ask(path, b"sound", keyed), await it.ask(path, b"sound", keyed)
        assert told(first) == (200, "0.0020000", "2")
        assert (second.json(), second.header("Idempotent-Replayed")) == ({"duration": 100}, "true")
        assert second.header("X-Callora-Charge") == "0.0000000"
        other = await it.ask(path, b"other", keyed)
        assert other.json()["code"] == "IDEMPOTENCY_KEY_REUSE_MISMATCH"
        assert await it.spent() == 2 * UNIT

        large = ("Idempotency-Key", "two")
        it.upstream.handler = answer({"duration": 121, "text": "x" * 300_000})
        assert told(await it.ask(path, b"sound", large)) == (200, "0.0030000", "3")
        again = await it.ask(path, b"sound", large)
        assert (again.status, again.json()["details"]["charge"]) == (409, "0.0030000")


async def test_an_answer_cut_while_its_quantity_is_looked_for_costs_nothing(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("started_minute", "response.json:/duration", held=1))
        it.upstream.handler = wrong_length(100, 10)
        response = await it.ask(path)
        assert (response.status, response.header("X-Callora-Units")) == (502, None)
        assert (await it.last())[:3] == ("released", "upstream_failed", None)


async def test_a_token_s_budget_pays_for_units_and_for_what_an_answer_costs_more(database_url: str) -> None:
    counts = sequence(*(respond(headers=[("X-Count", count)]) for count in ("1", "3", "3")))
    async with token_shop(database_url, handler=counts) as it:
        await it.service.database.execute(
            "UPDATE endpoint_prices SET amount = $1, unit = 'unit', quantity_from = 'response.header:X-Count',"
            " held_units = 2",
            UNIT,
        )
        token = await it.token(budget_usdc="0.006")
        for units, spent in ((1, 1), (3, 4), (2, 6)):
            response = await call(it.service.port, "GET", PATH, bearer(token))
            assert told(response) == (200, f"0.00{units}0000", str(units))
            await it.until_spent(spent * UNIT)
        assert (await call(it.service.port, "GET", PATH, bearer(token))).json()["code"] == "TOKEN_BUDGET_EXHAUSTED"


async def test_a22_credits_pay_whole_units_first_and_money_the_rest(database_url: str) -> None:
    async with meter(database_url) as it:
        minutes = await it.sell(card("started_minute", "response.json:/duration", held=2, unit_credits=10))
        await it.service.database.execute("UPDATE plans SET monthly_credits = 45, overage = 'charge'")
        for duration, units, money, burnt in ((60, 1, 0, "10"), (121, 3, 0, "30"), (300, 5, 5, None)):
            it.upstream.handler = answer({"duration": duration})
            response = await it.ask(minutes)
            assert told(response) == (200, f"0.00{money}0000", str(units))
            assert response.header("X-Callora-Credits") == burnt
            assert (await it.last())[:4] == ("captured", "delivered", money * UNIT, units)
        row = await it.service.database.fetch_row("SELECT credits FROM vaults")
        assert (row and row["credits"], await it.spent()) == (5, 5 * UNIT)


async def test_a22_credits_that_were_held_come_back_with_what_was_not_used_or_not_delivered(database_url: str) -> None:
    async with meter(database_url) as it:
        path = await it.sell(card("unit", "response.header:X-Count", held=10, unit_credits=3))
        await it.service.database.execute("UPDATE plans SET monthly_credits = 40")
        for handler, left in (
            (respond(500), 40),
            (respond(headers=[("X-Count", "1")]), 37),
            (respond(headers=[("X-Count", "999")]), 7),
        ):
            it.upstream.handler = handler
            response = await it.ask(path)
            assert (await it.last())[0] != "held"
            row = await it.service.database.fetch_row("SELECT credits FROM vaults")
            assert (row and row["credits"], response.header("X-Callora-Charge")) == (left, "0.0000000")
        refused = await it.ask(path)
        assert (refused.status, refused.json()["code"]) == (402, "QUOTA_EXHAUSTED")
        assert await it.spent() == 0


async def test_wa9_what_is_free_in_credits_and_money_costs_neither(database_url: str) -> None:
    async with meter(database_url, "0") as it:
        path = await it.sell(None, "0")
        response = await it.ask(path)
        assert (*told(response), response.header("X-Callora-Credits")) == (200, "0.0000000", None, None)
