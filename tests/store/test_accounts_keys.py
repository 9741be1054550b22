"""Users, vaults, APIs, prices and keys: made once whoever makes them, and told to the catalogue."""

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import trio

from callora.ledger.ids import ApiKeyId, DeveloperId, UserId, VaultId
from callora.ledger.keys import PREFIX_CHARS, RANDOM_BYTES, make_key
from callora.ledger.money import Stroops
from callora.store import accounts, apis, keys
from callora.store.accounts import PricedEndpoint
from callora.store.bridge import Database
from callora.store.reads.gateway import KEYS, Reads
from tests.simulation.ledgers import NOON, RealLedger, TestClock, real_ledger


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[RealLedger]:
    """A ledger."""
    async with real_ledger(database, TestClock()) as opened:
        yield opened


async def user_of(ledger: RealLedger, name: str = "Ada") -> UserId:
    """Make a user."""
    user_id = UserId(ledger.ids.uuid7())
    await accounts.add_user(ledger.database, user_id, name, NOON)
    return user_id


async def developer_of(ledger: RealLedger) -> DeveloperId:
    """Make a developer."""
    return await accounts.ensure_developer(
        ledger.database, DeveloperId(ledger.ids.uuid7()), await user_of(ledger), "Dev", NOON
    )


async def key_of(ledger: RealLedger, vault_id: VaultId, seed: int = 0, network: str = "testnet") -> tuple[str, bool]:
    """Make a key; return it and whether it was stored."""
    key = make_key(network, bytes([seed]) * RANDOM_BYTES)
    stored = await keys.add_key(
        ledger.database, api_key_id=ApiKeyId(ledger.ids.uuid7()), vault_id=vault_id, key=key, name="test", now=NOON
    )
    return key, stored


# --- accounts ---------------------------------------------------------------------------------------------------------


async def test_a_user_is_added_once_and_found_by_name(ledger: RealLedger) -> None:
    user_id = await user_of(ledger)
    await accounts.add_user(ledger.database, user_id, "Ada", NOON)
    await accounts.add_user(ledger.database, UserId(ledger.ids.uuid7()), "Ada", NOON + timedelta(days=1))
    assert await accounts.find_user(ledger.database, "Ada") == user_id, "the oldest"
    assert await accounts.find_user(ledger.database, "nobody") is None


async def test_everybody_who_makes_a_users_vault_at_once_gets_the_same_one(ledger: RealLedger) -> None:
    user_id, got = await user_of(ledger), set()

    async def make() -> None:
        mine = VaultId(ledger.ids.uuid7())
        got.add(await accounts.ensure_vault(ledger.database, mine, user_id, "testnet", "free", NOON))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(make)
    assert len(got) == await ledger.count("vaults") == 1


async def test_each_network_has_its_own_vault(ledger: RealLedger) -> None:
    user_id = await user_of(ledger)
    made = {
        await accounts.ensure_vault(ledger.database, VaultId(ledger.ids.uuid7()), user_id, network, "free", NOON)
        for network in ("testnet", "mainnet")
    }
    assert len(made) == 2
    assert {await keys.network_of(ledger.database, each) for each in made} == {"testnet", "mainnet"}
    assert await keys.network_of(ledger.database, VaultId(ledger.ids.uuid7())) is None


async def test_an_api_is_repeated_safely_and_a_price_gets_a_version_only_when_it_changes(ledger: RealLedger) -> None:
    developer_id = await developer_of(ledger)

    async def publish(amount: int, base_url: str = "http://one") -> int:
        return await accounts.ensure_api(
            ledger.database,
            developer_id=developer_id,
            slug="weather",
            name="Weather",
            base_url=base_url,
            endpoints=[PricedEndpoint("GET", "/now", Stroops(amount))],
            now=NOON,
        )

    api_id = await publish(10)
    assert {await publish(10), await publish(20), await publish(20), await publish(10)} == {api_id}
    rows = await ledger.database.fetch("SELECT version, amount FROM endpoint_prices ORDER BY version")
    assert [(row["version"], row["amount"]) for row in rows] == [(1, 10), (2, 20), (3, 10)]
    await publish(10, "http://two")
    record = await Reads(ledger.database).api("weather")
    assert record is not None
    assert (record.api_id, record.base_url, record.active) == (api_id, "http://two", True)
    await apis.set_status(ledger.database, record.api_id, "paused", NOON)
    paused = await Reads(ledger.database).api(str(api_id))
    assert paused is not None and not paused.active


@pytest.mark.parametrize("text", ["9" * 30, "٣", "-1", "", "weather'--", "nobody"])
async def test_what_names_no_api_finds_none(ledger: RealLedger, text: str) -> None:
    assert await Reads(ledger.database).api(text) is None


async def test_changes_are_told_in_order_and_without_gaps_under_concurrency(ledger: RealLedger) -> None:
    developer_id = await developer_of(ledger)
    reads = Reads(ledger.database)
    before = await reads.catalogue_version()

    async def publish(number: int) -> None:
        await accounts.ensure_api(
            ledger.database,
            developer_id=developer_id,
            slug=f"api-{number}",
            name="x",
            base_url="http://x",
            endpoints=[PricedEndpoint("GET", "/", Stroops(1))],
            now=NOON,
        )

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(publish, number)
    changes = await reads.catalogue_changes(before)
    after = await reads.catalogue_version()
    assert [each.version for each in changes] == list(range(before + 1, after + 1))
    assert len(changes) == 30, "an API, an endpoint and a price each"


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_is_stored_as_prefix_and_hash_and_never_in_clear(ledger: RealLedger) -> None:
    key, stored = await key_of(ledger, await ledger.vault(0))
    assert stored
    row = await ledger.database.fetch_row("SELECT *, api_keys::text AS everything FROM api_keys")
    assert row is not None
    assert (row["prefix"], row["last4"]) == (key[:PREFIX_CHARS], key[-4:])
    assert row["key_hash"] == hashlib.sha256(key.encode()).digest()
    assert key not in row["everything"]
    assert key[PREFIX_CHARS:-4] not in row["everything"]
    found = await Reads(ledger.database).keys_with_prefix(key[:PREFIX_CHARS])
    assert [each.key_hash for each in found] == [row["key_hash"]]


async def test_a_key_of_the_other_network_or_of_no_vault_is_not_stored(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(0)
    assert not (await key_of(ledger, vault_id, network="mainnet"))[1]
    assert not (await key_of(ledger, VaultId(ledger.ids.uuid7())))[1]
    assert await ledger.count("api_keys") == 0


async def test_revoking_is_for_ever_and_keeps_its_first_date(ledger: RealLedger) -> None:
    key, _ = await key_of(ledger, await ledger.vault(0))
    prefix = key[:PREFIX_CHARS]
    reads = Reads(ledger.database)
    before = await reads.catalogue_version()
    for days in range(2):
        assert len(await keys.revoke_keys(ledger.database, prefix, NOON + timedelta(days=days), ledger.ids.uuid7)) == 1
    (record,) = await reads.keys_with_prefix(prefix)
    assert record.revoked_at == NOON
    assert [each.kind for each in await reads.catalogue_changes(before)][:1] == ["key"]
    assert await keys.revoke_keys(ledger.database, record.api_key_id, NOON, ledger.ids.uuid7) != []
    assert await keys.revoke_keys(ledger.database, "ck_test_0badcafe", NOON, ledger.ids.uuid7) == []


async def test_a_list_of_keys_holds_no_secret(ledger: RealLedger) -> None:
    vault_id, other = await ledger.vault(0), await ledger.vault(0)
    made = [(await key_of(ledger, each, seed))[0] for seed, each in enumerate((vault_id, vault_id, other))]
    listed = await keys.list_keys(ledger.database, vault_id, 10)
    assert {row["prefix"] for row in listed} == {each[:PREFIX_CHARS] for each in made[:2]}
    assert "key_hash" not in listed[0].keys()  # noqa: SIM118 - a driver's record iterates over values
    assert len(await keys.list_keys(ledger.database, None, 10)) == 3
    assert len(await keys.list_keys(ledger.database, None, 2)) == 2


async def test_noting_a_use_tells_the_catalogue_nothing(ledger: RealLedger) -> None:
    key, _ = await key_of(ledger, await ledger.vault(0))
    (record,) = await Reads(ledger.database).keys_with_prefix(key[:PREFIX_CHARS])
    before = await Reads(ledger.database).catalogue_version()
    await keys.note_use(ledger.database, [record.api_key_id], NOON)
    assert await Reads(ledger.database).catalogue_version() == before
    assert await ledger.count("api_keys", f"last_used_at = '{NOON.isoformat()}'") == 1


# --- many at once -----------------------------------------------------------------------------------------------------


async def test_keys_asked_for_together_are_each_told_their_own_by_index_and_at_one_go(ledger: RealLedger) -> None:
    vault_id = await ledger.vault(1)
    await ledger.database.execute(
        "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4, previous_prefix, previous_hash,"
        " previous_expires_at)"
        " SELECT gen_random_uuid(), v.user_id, v.vault_id, w.new, sha256(w.new::bytea), 'abcd', w.old,"
        " sha256(w.old::bytea), CASE WHEN w.old IS NOT NULL THEN now() END"
        " FROM vaults v, generate_series(1, 20000) AS n, LATERAL (SELECT 'ck_test_0' || lpad(n::text, 7, '0') AS new,"
        " CASE WHEN n % 100 = 0 THEN 'ck_test_9' || lpad(n::text, 7, '0') END AS old) AS w WHERE v.vault_id = $1",
        vault_id,
    )
    async with ledger.database.acquire() as connection:
        await connection.execute("VACUUM ANALYZE api_keys")
    prefixes = [f"ck_test_{former}{number:07}" for number in range(50, 3000, 50) for former in (0, 9)]
    reads, told = Reads(ledger.database), dict[str, list[bytes]]()

    async def ask(prefix: str) -> None:
        told[prefix] = [each.key_hash for each in await reads.keys_with_prefix(prefix)]

    async with trio.open_nursery() as nursery:
        for prefix in prefixes:
            nursery.start_soon(ask, prefix)
    for prefix in prefixes:
        there = prefix[8] == "0" or prefix.endswith("00")
        assert told[prefix] == ([hashlib.sha256(prefix.encode()).digest()] if there else []), prefix
    for count in (1, len(prefixes)):
        async with ledger.database.acquire() as connection:
            rows = await connection.fetch(f"EXPLAIN {KEYS}", prefixes[:count])
        plan = "\n".join(row["QUERY PLAN"] for row in rows)
        assert "Seq Scan on api_keys" not in plan, plan
