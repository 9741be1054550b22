"""External holds as they are stored: what the database refuses whoever writes, and extensions that are made once."""

from collections.abc import AsyncIterator
from datetime import timedelta

import attrs
import pytest

from callora.ledger.commands import (
    Delivery,
    ExtendHold,
    IdempotencyClaim,
    PlaceHold,
    SetStanding,
    capture,
    expire,
    release,
)
from callora.ledger.faults import StoreRefused
from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, EventId, HoldId, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    HoldExtended,
    HoldNotOpen,
    InsufficientFunds,
    ReferenceTaken,
    StandingRefused,
    StandingSet,
)
from callora.ledger.rounds import CLEAN
from callora.store import holds as store
from callora.store.bridge import Database
from callora.store.holds import Placing
from callora.store.reads import holds as reads
from callora.store.reads.holds import FoundHold
from tests.simulation.ledgers import RealLedger, TestClock, real_ledger
from tests.simulation.support import CHARGED

AMOUNT = Stroops(60)
CHARGE = Delivery("deducted")


@attrs.frozen
class House:
    """A ledger, and a vault with a key."""

    ledger: RealLedger
    vault_id: VaultId
    api_key_id: ApiKeyId

    async def bind(self, name: str = "r") -> FoundHold:
        """Bind a name to a hold that is not placed."""
        placing = Placing(ApiId(1), EndpointId(1), AMOUNT, 60, b"f" * 32)
        hold_id = HoldId(self.ledger.ids.uuid7())
        now = self.ledger.clock.now()
        await store.bind_hold(self.ledger.database, self.vault_id, name, hold_id, self.api_key_id, placing, now)
        return await self.look(name)

    async def look(self, name: str = "r") -> FoundHold:
        """Return it as it is stored."""
        found = await reads.find_request(self.ledger.database, self.vault_id, name)
        assert found is not None
        return found

    async def place(self, name: str = "r") -> FoundHold:
        """Bind a name, and place its hold."""
        event_id = (await self.bind(name)).hold.event_id
        charged = attrs.evolve(CHARGED, api_key_id=self.api_key_id)
        hold = PlaceHold(event_id, AMOUNT, 60, charged)
        assert await self.ledger.store.commit_round([await self.ledger.share(self.vault_id, hold)]) == CLEAN
        return await self.look(name)

    async def end(self, state: str, name: str = "r") -> None:
        """End a hold."""
        event_id = (await self.look(name)).hold.event_id
        close = {
            "captured": capture(event_id, AMOUNT, AMOUNT, CHARGE),
            "released": release(event_id, AMOUNT, Delivery("given_up")),
            "expired": expire(event_id, AMOUNT),
        }[state]
        if state == "expired":
            self.ledger.clock.advance(61)
        assert await self.ledger.store.commit_round([await self.ledger.share(self.vault_id, close)]) == CLEAN

    async def write(self, change: str, name: str = "r") -> None:
        """Write to a hold's row as no actor would."""
        await self.ledger.database.execute(f"UPDATE external_holds SET {change} WHERE request_id = '{name}'")


@pytest.fixture
async def house(database: Database) -> AsyncIterator[House]:
    """A vault whose ledger the audit finds clean when the test ends."""
    async with real_ledger(database, TestClock()) as ledger:
        vault_id, key = await ledger.vault(10_000), ApiKeyId(ledger.ids.uuid7())
        await database.execute(
            "INSERT INTO api_keys (api_key_id, user_id, vault_id, prefix, key_hash, last4)"
            " SELECT $1, user_id, vault_id, 'ck_test_00000001', sha256('1'), 'abcd' FROM vaults WHERE vault_id = $2",
            key,
            vault_id,
        )
        yield House(ledger, vault_id, key)
        assert await ledger.findings() == []


BIND = "transaction_id = 't', asked_amount = 60"
REBIND = "event_id = '00000000-0000-7000-8000-0000000000ff'"
CLEAR = "transaction_id = NULL, asked_amount = NULL"


@pytest.mark.parametrize(
    "change",
    [
        "request_id = 'other'",
        "vault_id = gen_random_uuid()",
        "hold_id = gen_random_uuid()",
        "api_key_id = gen_random_uuid()",
        "api_id = 2",
        "endpoint_id = 2",
        "amount = 61",
        "ttl_seconds = 61",
        "fingerprint = sha256('x')",
        "created_at = now()",
        "amount = NULL",
        "asked_amount = 60",
        "transaction_id = 't'",
        "transaction_id = '', asked_amount = 60",
        "transaction_id = 't', asked_amount = 0",
        REBIND,
        "event_amount = 61",
    ],
)
async def test_the_database_refuses_what_no_open_hold_becomes(house: House, change: str) -> None:
    before = await house.place()
    with pytest.raises(StoreRefused):
        await house.write(change)
    assert await house.look() == before
    await house.end("released")


@pytest.mark.parametrize(
    ("state", "allowed", "refused"),
    [
        ("pending", ["released_at = now()"], [BIND, REBIND]),
        ("held", [BIND, "released_at = now()"], [REBIND, f"{BIND}, released_at = now()"]),
        ("held for a transaction", ["released_at = now()"], [CLEAR, "transaction_id = 'u'", "asked_amount = 61"]),
        ("captured", [], [CLEAR, "transaction_id = 'u'", "released_at = now()", REBIND]),
        ("released", [CLEAR, "released_at = now()"], ["transaction_id = 'u'", REBIND]),
        ("expired", [CLEAR, "released_at = now()"], ["transaction_id = 'u'", REBIND]),
        ("expired", [f"{REBIND}, {CLEAR}"], [f"{REBIND}, transaction_id = 'u'"]),
    ],
)
async def test_a_hold_becomes_what_its_event_allows(
    house: House, state: str, allowed: list[str], refused: list[str]
) -> None:
    if state == "pending":
        await house.bind()
    else:
        await house.place()
    if state not in ("pending", "held"):
        await house.write(BIND)
    if state in ("captured", "released", "expired"):
        await house.end(state)
    for change in refused:
        with pytest.raises(StoreRefused) as error:
            await house.write(change)
        assert error.value.constraint == "holds_move_forwards", change
    for change in allowed:
        await house.write(change)
    if "released_at = now()" in allowed:
        for change in ("released_at = NULL", "released_at = now() + interval '1 second'", REBIND):
            with pytest.raises(StoreRefused):
                await house.write(change)


async def test_a_transaction_is_one_holds_of_a_vault_and_a_key_is_its_vaults(house: House) -> None:
    await house.place("a")
    second = await house.place("b")
    await house.write(BIND, "a")
    with pytest.raises(StoreRefused) as error:
        await house.write(BIND, "b")
    assert error.value.constraint == "external_holds_transaction"
    await store.bind_transaction(house.ledger.database, second.hold, "t", AMOUNT)
    assert await house.look("b") == second, "who is late changes nothing"
    other = await house.ledger.vault(1)
    with pytest.raises(StoreRefused) as error:
        await attrs.evolve(house, vault_id=other).bind()
    assert error.value.constraint == "external_holds_key"


async def test_a_hold_is_never_deleted_and_what_is_remembered_is_a_release(house: House) -> None:
    await house.bind()
    for sql in ("DELETE FROM external_holds", "TRUNCATE external_holds"):
        with pytest.raises(StoreRefused):
            await house.ledger.database.execute(sql)
    for columns, values in (("", ""), (", released_at, amount", ", now(), 1")):
        with pytest.raises(StoreRefused):
            await house.ledger.database.execute(
                "INSERT INTO external_holds (vault_id, request_id, hold_id, api_key_id, event_id, created_at"
                f"{columns}) VALUES ($1, 'x', gen_random_uuid(), $2, gen_random_uuid(), now(){values})",
                house.vault_id,
                house.api_key_id,
            )


async def test_an_event_that_is_barred_is_never_placed_and_one_that_is_placed_cannot_be_barred(house: House) -> None:
    for name in ("barred", "placed"):
        hold = (await house.bind(name)).hold
        barred = name == "barred"
        hour = timedelta(hours=1)
        now = house.ledger.clock.now()
        if barred:
            assert await store.bar_event(house.ledger.database, hold, b"f" * 32, now, hour)
            assert await store.bar_event(house.ledger.database, hold, b"f" * 32, now, hour), "by whoever comes next"
        claim = IdempotencyClaim(store.claim_key(hold.event_id), b"f" * 32, None, 3600)
        charged = attrs.evolve(CHARGED, api_key_id=house.api_key_id)
        share = await house.ledger.share(house.vault_id, PlaceHold(hold.event_id, AMOUNT, 60, charged, claim))
        result = await house.ledger.store.commit_round([share])
        assert (result.missed == {hold.event_id}) == barred
        assert ((await house.look(name)).state is None) == barred
        if not barred:
            assert not await store.bar_event(house.ledger.database, hold, b"f" * 32, now, hour)
            await house.end("released", name)


# --- extensions -------------------------------------------------------------------------------------------------------


async def extend(house: House, event_id: EventId, seconds: int, amount: int, ref: str | None) -> object:
    return await house.ledger.locked(house.vault_id, ExtendHold(event_id, seconds, Stroops(amount), ref))


async def test_an_extension_is_made_once_under_its_reference(house: House) -> None:
    event_id = (await house.place()).hold.event_id
    before = (await house.look()).expires_at
    assert before is not None
    assert await extend(house, event_id, 10, 5, "a") == HoldExtended(Stroops(65))
    for _ in range(3):
        assert await extend(house, event_id, 10, 5, "a") == HoldExtended(Stroops(65), repeated=True)
    assert await extend(house, event_id, 10, 6, "a") == ReferenceTaken()
    assert await extend(house, event_id, 11, 5, "a") == ReferenceTaken()
    assert await extend(house, event_id, 10, 5, "b") == HoldExtended(Stroops(70))
    found = await house.look()
    assert (found.held_amount, found.expires_at) == (70, before + timedelta(seconds=20))
    await house.end("released")
    assert await extend(house, event_id, 10, 5, "a") == HoldExtended(Stroops(70), repeated=True), "it was made"
    assert await extend(house, event_id, 10, 5, "c") == HoldNotOpen("released")
    for sql in ("DELETE FROM hold_extensions", "UPDATE hold_extensions SET amount = 1", "TRUNCATE hold_extensions"):
        with pytest.raises(StoreRefused):
            await house.ledger.database.execute(sql)


async def test_a_refused_extension_leaves_its_reference_free_and_a_suspended_vault_holds_no_more(house: House) -> None:
    event_id = (await house.place()).hold.event_id
    assert await extend(house, event_id, 1, 9_941, "a") == InsufficientFunds(Stroops(9_941), Stroops(9_940))
    assert await house.ledger.locked(house.vault_id, SetStanding("suspended")) == StandingSet()
    assert await extend(house, event_id, 1, 1, "a") == StandingRefused("suspended")
    assert await extend(house, event_id, 1, 0, "time") == HoldExtended(AMOUNT), "time costs nothing"
    assert await house.ledger.locked(house.vault_id, SetStanding("active")) == StandingSet()
    assert await extend(house, event_id, 1, 9_940, "a") == HoldExtended(Stroops(10_000))
    await house.write(BIND)
    await house.end("captured")
