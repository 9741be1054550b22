"""What the database itself refuses of a rate card, and that it refuses what the rules refuse."""

from collections.abc import Sequence
from random import Random

import pytest

from callora.ledger.faults import StoreRefused
from callora.ledger.money import Stroops
from callora.ledger.rating import CARD_COLUMNS, UNIT_SIZES, RateCard, Source, card_values
from callora.store.bridge import Database

_INSERT = f"""
INSERT INTO endpoint_prices (endpoint_id, version, effective_from, amount, {", ".join(CARD_COLUMNS)})
VALUES ($1, 1, now(), $2, $3, $4, $5, $6, $7, $8)
"""


@pytest.fixture
async def endpoint_id(database: Database) -> int:
    """An endpoint without a price."""
    made = await database.fetch_value(
        "WITH u AS (INSERT INTO users (user_id, name, created_at)"
        "           VALUES (gen_random_uuid(), 'd', now()) RETURNING user_id),"
        "     d AS (INSERT INTO developers (developer_id, user_id, name, created_at)"
        "           SELECT gen_random_uuid(), user_id, 'd', now() FROM u RETURNING developer_id),"
        "     a AS (INSERT INTO apis (developer_id, slug, name, base_url, created_at)"
        "           SELECT developer_id, 'a', 'a', 'http://127.0.0.1:9', now() FROM d RETURNING api_id)"
        " INSERT INTO api_endpoints (api_id, method, path) SELECT api_id, '*', '*' FROM a RETURNING endpoint_id"
    )
    assert isinstance(made, int)
    return made


async def is_taken(database: Database, endpoint_id: int, amount: int, columns: Sequence[object]) -> bool:
    """Tell whether the database takes a price, and take it away again."""
    try:
        await database.execute(_INSERT, endpoint_id, amount, *columns)
    except StoreRefused:
        return False
    await database.execute("DELETE FROM endpoint_prices")
    return True


SOURCES = (
    *("request.json:/urls", "request.header:X-Units", "request.bytes", "response.json:", "response.header:X"),
    *("response.bytes", "stream.bytes", "stream.events"),
)


def some_card(random: Random) -> RateCard:
    """Return a card, mostly one that does not fit together."""
    source = random.choice([None, *map(Source.parse, SOURCES)])
    numbers = [None, 1, 2, 10**7]
    return RateCard(
        random.choice(list(UNIT_SIZES)),
        random.choice([0, 0, 1, 10**6]),
        random.choice([1, 1, 2, 10**7]),
        random.choice(numbers),
        random.choice(numbers),
        source,
    )


async def test_the_database_takes_exactly_what_the_rules_take(database: Database, endpoint_id: int) -> None:
    random, taken_count = Random(22), 0
    for _ in range(400):
        card, amount = some_card(random), random.choice([0, 1, 10**6, 10**13])
        taken = await is_taken(database, endpoint_id, amount, card_values(card))
        assert taken == (not card.wrong(Stroops(amount))), (card, amount)
        taken_count += taken
    assert 20 < taken_count < 380, "both are tried"


@pytest.mark.parametrize(
    "columns",
    [
        ("parsec", 0, 1, None, None, "request.bytes"),
        ("call", -1, 1, None, None, None),
        ("call", 10**6 + 1, 1, None, None, None),
        ("url", 0, 0, None, None, "request.json:/a"),
        ("url", 0, 10**12 + 1, None, None, "request.json:/a"),
        ("url", 0, 1, None, None, "request.json:a"),
        ("url", 0, 1, None, None, "request.header:"),
        ("url", 0, 1, None, None, "stream.json:/a"),
        ("url", 0, 1, None, None, "request.json:/" + "a" * 200),
    ],
)
async def test_a_card_of_no_form_is_refused(database: Database, endpoint_id: int, columns: Sequence[object]) -> None:
    assert not await is_taken(database, endpoint_id, 1, columns)
    assert await is_taken(database, endpoint_id, 1, card_values(None))
