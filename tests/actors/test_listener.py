"""The listener and its booking: every deposit is credited once, to whom it belongs, whatever nodes and processes do."""

from collections.abc import AsyncIterator
from random import Random

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callora.actors.treasury_answers import Claimed, Halted, NotInSuspense
from callora.ledger.commands import LockedCommand
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import VaultId
from callora.store import chain as store
from callora.store.bridge import Database, open_database
from callora.store.embedded import EmbeddedPostgres
from callora.store.reads.chain import list_gaps, list_suspense
from callora.store.rounds import LINE_SETTINGS
from callora.store.vaults import LockedOutcome, VaultStore
from tests.simulation.ledgers import TestClock, real_ledger
from tests.support.knife import Knife
from tests.support.postgres import fresh_database
from tests.support.stream import Stream, contract_of, tx_hash_of, wallet_of
from tests.support.treasury import Books, books, watch

ANNA, BERT, NOBODY = wallet_of("anna"), wallet_of("bert"), wallet_of("nobody")


@pytest.fixture
async def at(database: Database) -> AsyncIterator[Books]:
    """Books whose ledger the audit finds clean when the test ends."""
    async with books(database, Stream()) as opened:
        yield opened


# Whose a deposit is


async def test_a_prepared_deposit_is_its_intents_whoever_holds_the_wallet_it_came_from(at: Books) -> None:
    user_id, vault_id = await at.user()
    await at.user(ANNA)
    assert vault_id is not None
    await at.intent(user_id, vault_id, tx_hash_of("mine"), ANNA, 30)
    at.stream.deposit(ANNA, 30, tx_hash=tx_hash_of("mine"))
    async with watch(at) as one:
        await one.follow()
    assert await at.ledger.balance(vault_id) == (30, 0)
    (intent,) = await at.rows("SELECT stage, event_id FROM deposit_intents")
    assert intent["stage"] == "confirmed"
    assert intent["event_id"] is not None


async def test_a_deposit_inside_our_fee_bump_is_its_intents(at: Books) -> None:
    user_id, vault_id = await at.user()
    assert vault_id is not None
    inner, outer = tx_hash_of("inner"), tx_hash_of("outer")
    await at.intent(user_id, vault_id, inner, NOBODY, 30)
    await at.database.execute(
        "INSERT INTO chain_transactions (hash, outer_hash, network, epoch, purpose, envelope, source_account, sequence,"
        " max_time, fee, prepared_ledger, bid, channel, sponsored, failed_before, state, stored_at)"
        " VALUES (decode($1, 'hex'), decode($2, 'hex'), 'testnet', 1, 'deposit:x', 'AAAA', $3, 1, now(), 100, 1, 100,"
        " false, false, 0, 'stored', now())",
        inner,
        outer,
        NOBODY,
    )
    at.stream.deposit(NOBODY, 30, tx_hash=outer)
    async with watch(at) as one:
        await one.follow()
    assert await at.ledger.balance(vault_id) == (30, 0)
    assert (await at.rows("SELECT stage FROM deposit_intents"))[0]["stage"] == "confirmed"


async def test_a_deposit_that_nobody_prepared_is_of_whoever_proved_the_wallet(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    at.stream.deposit(ANNA, 40)
    async with watch(at) as one:
        await one.follow()
    assert await at.ledger.balance(vault_id) == (40, 0)


async def test_a_proved_wallet_without_a_vault_gets_one(at: Books) -> None:
    user_id, _ = await at.user(ANNA, vault=False)
    at.stream.deposit(ANNA, 40)
    async with watch(at) as one:
        await one.follow()
    (vault,) = await at.rows("SELECT available, network FROM vaults WHERE user_id = $1", user_id)
    assert vault == {"available": 40, "network": "testnet"}


async def test_a_deposit_of_nobody_waits_in_suspense(at: Books) -> None:
    at.stream.deposit(NOBODY, 50)
    async with watch(at) as one:
        await one.follow()
        assert one.log.events.count("deposit_in_suspense") == 1
        await one.follow()
        assert one.log.events.count("deposit_in_suspense") == 1
    assert await at.events() == [("suspense", "deposit")]
    assert await at.credited() == 0
    assert [each.address for each in await list_suspense(at.database, "testnet", (0, ""), 10)] == [NOBODY]


async def test_whoever_proves_the_wallet_claims_what_it_sent_before_once(at: Books) -> None:
    at.stream.deposit(NOBODY, 50)
    at.stream.deposit(BERT, 7)
    at.stream.deposit(NOBODY, 60)
    user_id, vault_id = await at.user(NOBODY)
    assert vault_id is not None
    await at.database.execute("UPDATE users SET wallet_address = NULL")
    async with watch(at) as one:
        await one.follow()
        answers: list[Claimed | Halted] = []

        async def claim() -> None:
            answers.append(await one.booking.claim(user_id, "testnet", NOBODY))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(claim)
        assert sum(each.count for each in answers if isinstance(each, Claimed)) == 2
        assert sum(each.amount for each in answers if isinstance(each, Claimed)) == 110
        # What comes later is his by itself.
        await at.database.execute("UPDATE users SET wallet_address = $2 WHERE user_id = $1", user_id, NOBODY)
        at.stream.close()
        at.stream.deposit(NOBODY, 1)
        await one.follow()
    assert await at.ledger.balance(vault_id) == (111, 0)
    assert await at.events() == [("booked", "deposit"), ("suspense", "deposit"), *[("booked", "deposit")] * 2]


async def test_an_operator_assigns_the_rest_once(at: Books) -> None:
    event = at.stream.deposit(NOBODY, 50)
    users = [await at.user() for _ in range(5)]
    async with watch(at) as one:
        await one.follow()
        answers: list[object] = []

        async def assign(number: int) -> None:
            answers.append(await one.booking.assign("testnet", 1, event.event_id, users[number][0]))

        async with trio.open_nursery() as nursery:
            for number in range(len(users)):
                nursery.start_soon(assign, number)
        assert answers.count(True) == 1
        assert answers.count(NotInSuspense()) == len(users) - 1
    assert await at.credited() == 50


# Once


async def test_many_listeners_at_once_credit_every_deposit_once(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    for _ in range(20):
        at.stream.deposit(ANNA, 3)
        at.stream.close()
    async with watch(at, page_events=2) as one, watch(at, page_events=3) as other:
        async with trio.open_nursery() as nursery:
            for each in (one, other, one, other, one, other):
                nursery.start_soon(each.follow)
    assert await at.ledger.balance(vault_id) == (60, 0)
    assert len(await at.events()) == 20


async def test_a_pass_repeated_by_many_books_once(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    for _ in range(5):
        at.stream.deposit(ANNA, 3)
    async with watch(at) as one:
        assert await one.listener.look() == "moved"
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one.booking.book_all, "testnet")
    assert await at.ledger.balance(vault_id) == (15, 0)


async def test_a_listener_cut_at_any_wait_leaves_nothing_lost_or_double(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    user_id, other = await at.user()
    assert other is not None
    cut_at, deposits, cuts = 0, 0, 0
    while True:
        cut_at += 1
        at.stream.close()
        at.stream.deposit(ANNA, 1)
        await at.intent(user_id, other, tx_hash_of(f"cut {cut_at}"), BERT, 1)
        at.stream.deposit(BERT, 1, tx_hash=tx_hash_of(f"cut {cut_at}"))
        at.stream.deposit(NOBODY, 1)
        deposits += 1
        async with watch(at) as first:
            knife = Knife(cut_at)
            with knife as scope, scope:
                await first.follow()
            cuts += knife.cut
        async with watch(at) as second:
            await second.follow()
        assert await at.ledger.balance(vault_id) == (deposits, 0)
        assert await at.ledger.balance(other) == (deposits, 0)
        assert len(await at.events()) == 3 * deposits
        if not knife.cut:
            break
    assert cuts > 10, "it was cut where it waits"


@pytest.mark.parametrize("stored", [True, False])
async def test_a_credit_without_an_answer_is_made_once(at: Books, stored: bool) -> None:
    """The commit of a Deposit was sent and no answer came."""

    class Silent(VaultStore):
        faults = 3

        async def commit_locked(self, vault_id: VaultId, command: LockedCommand) -> LockedOutcome:
            if self.faults:
                self.faults -= 1
                if stored:
                    await super().commit_locked(vault_id, command)
                raise OutcomeUnknown("no answer")
            return await super().commit_locked(vault_id, command)

    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    at.stream.deposit(ANNA, 9)
    async with at.database.line(LINE_SETTINGS) as line:
        silent = Silent(at.database, line, at.ledger.clock, at.ledger.ids.uuid7, 10)
        async with watch(at, store=silent) as one:
            await one.listener.look()
            for _ in range(4):
                try:
                    await one.booking.book_all("testnet")
                except (OutcomeUnknown, StoreUnavailable):
                    continue
    assert await at.ledger.balance(vault_id) == (9, 0)
    assert await at.events() == [("booked", "deposit")]


async def test_what_was_decided_of_a_deposit_is_not_decided_again_by_another_wallet_owner(at: Books) -> None:
    """The wallet changes hands between the decision and the credit."""
    user_id, vault_id = await at.user(ANNA)
    assert vault_id is not None
    event = at.stream.deposit(ANNA, 9)
    async with watch(at) as one:
        await one.listener.look()
        assert await store.give_event(at.database, "testnet", 1, event.event_id, vault_id)
        await at.database.execute("UPDATE users SET wallet_address = NULL WHERE user_id = $1", user_id)
        _, other = await at.user(ANNA)
        assert other is not None
        await one.booking.book_all("testnet")
    assert await at.ledger.balance(vault_id) == (9, 0)
    assert await at.ledger.balance(other) == (0, 0)


# Where it stands


async def test_a_caught_up_listener_writes_nothing_and_finds_no_gap(at: Books) -> None:
    async with watch(at) as one:
        await one.follow()
        before = await store.find_network(at.database, "testnet")
        for _ in range(3):
            assert await one.listener.look() == "caught_up"
        assert await store.find_network(at.database, "testnet") == before
    assert before is not None
    assert before.seen.ledger == 10


async def test_the_first_look_begins_at_the_oldest_ledger_that_is_kept(at: Books) -> None:
    at.stream.event("deposit", NOBODY, 5, ledger=2)
    at.stream.event("deposit", NOBODY, 6, ledger=7)
    at.stream.oldest = 4
    async with watch(at) as one:
        await one.follow()
    assert len(await at.events()) == 1
    assert await list_gaps(at.database, "testnet", (0, 0), 10) == []
    watched = await store.find_network(at.database, "testnet")
    assert watched is not None
    assert watched.opening == 5, "what came before the first event is what the contract was opened with"


async def test_ledgers_that_no_node_keeps_are_a_gap_that_is_told_and_passed(at: Books) -> None:
    async with watch(at) as one:
        await one.follow()
        at.stream.close(100)
        at.stream.event("deposit", NOBODY, 5, ledger=50)
        at.stream.event("deposit", NOBODY, 6, ledger=105)
        at.stream.oldest = 90
        await one.follow()
        assert "chain_gap" in one.log.events
        await one.follow()
    (gap,) = await list_gaps(at.database, "testnet", (0, 0), 10)
    assert (gap.first_ledger, gap.last_ledger, gap.closed_at) == (11, 89, None)
    assert len(await at.events()) == 1
    assert await store.close_gap(at.database, "testnet", 1, 11, 5, "admin-key", at.ledger.clock.now())
    assert not await store.close_gap(at.database, "testnet", 1, 11, 6, "admin-key", at.ledger.clock.now())


async def test_a_network_that_began_anew_halts_everything_until_a_new_epoch(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    at.stream.deposit(ANNA, 5)
    async with watch(at) as one:
        await one.follow()
        at.stream.reset()
        at.stream.deposit(ANNA, 7)
        assert await one.listener.look() == "halted"
        await one.follow()
        assert one.log.events.count("chain_halted") == 1
        assert await at.credited() == 5
        assert isinstance(await one.booking.claim((await at.user())[0], "testnet", NOBODY), Halted)
        assert not await one.listener.begin_epoch(7)
        assert await one.listener.begin_epoch(1)
        assert not await one.listener.begin_epoch(1)
        await one.follow()
        assert await at.ledger.balance(vault_id) == (12, 0)
        watched = await store.find_network(at.database, "testnet")
        assert watched is not None
        assert (watched.epoch, watched.halted, watched.opening) == (2, None, 0)


async def test_what_was_noted_before_a_halt_is_credited_after_it(at: Books) -> None:
    _, vault_id = await at.user(ANNA)
    assert vault_id is not None
    at.stream.deposit(ANNA, 5)
    async with watch(at) as one:
        await one.listener.look()
        at.stream.reset()
        assert await one.listener.look() == "halted"
        assert await one.booking.book_all("testnet") == 0
        assert await one.listener.begin_epoch(1)
        await one.booking.book_all("testnet")
    assert await at.ledger.balance(vault_id) == (5, 0)


@pytest.mark.parametrize("change", ["passphrase", "contract"])
async def test_another_passphrase_or_contract_than_before_halts(at: Books, change: str) -> None:
    async with watch(at) as one:
        await one.follow()
        if change == "passphrase":
            at.stream.passphrase = "Another Network"
        else:
            at.stream.vault = attrs.evolve(at.stream.vault, contract_id=contract_of("another"))
        assert await one.listener.look() == "halted"
        assert await one.listener.begin_epoch(1)
        assert await one.listener.look() == "moved"


async def test_an_event_of_an_unknown_form_halts_and_is_not_skipped(at: Books) -> None:
    event = at.stream.deposit(ANNA, 5)
    at.stream.ledgers[event.ledger] = [attrs.evolve(event, value=event.topics[0])]
    async with watch(at) as one:
        assert await one.listener.look() == "halted"
    assert await at.events() == []


async def test_a_stale_node_neither_halts_nor_moves_the_cursor_back(at: Books) -> None:
    async with watch(at) as one:
        at.stream.close(50)
        await one.follow()
        at.stream.latest = 20
        for _ in range(3):
            assert await one.listener.look() == "caught_up"
        at.stream.latest = 70
        at.stream.deposit(NOBODY, 5)
        await one.follow()
    assert await at.events() == [("suspense", "deposit")]


async def test_deductions_are_noted_as_booked_and_a_payment_of_ours_by_nobody_is_told(at: Books) -> None:
    at.stream.deposit(NOBODY, 50)
    at.stream.event("deduct", wallet_of("caller"), 5)
    at.stream.event("distribute", wallet_of("caller"), 5)
    at.stream.event("withdraw_to", BERT, 5)
    at.stream.event("withdraw", wallet_of("owner"), 5)
    async with watch(at) as one:
        await one.follow()
        assert one.log.events.count("payment_unexplained") == 2
    assert await at.events() == [
        ("suspense", "deposit"),
        ("booked", "deduct"),
        ("booked", "distribute"),
        ("booked", "withdraw_to"),
        ("booked", "withdraw"),
    ]


# Any stream

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("deposit"), st.sampled_from(("anna", "bert", "prepared", "nobody")), st.integers(1, 9)),
        st.tuples(st.just("close"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("look"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("book"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("cut"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("trim"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("stale"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("count", [10, pytest.param(1500, marks=pytest.mark.proof)])
def test_any_stream_credits_each_deposit_that_a_node_could_show_once(
    postgres_server: EmbeddedPostgres, database_template: str, count: int
) -> None:
    """Duplicates, overlaps, gaps, stale nodes, resets, two listeners, and cuts at any wait."""

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(steps=STEPS, seed=st.integers(0, 2**32), page=st.integers(1, 4))
    def holds(steps: list[tuple[str, object, int]], seed: int, page: int) -> None:
        with fresh_database(postgres_server, database_template) as dsn:
            trio.run(_stream_holds, dsn, steps, Random(seed), page)

    holds()


async def _stream_holds(dsn: str, steps: list[tuple[str, object, int]], random: Random, page: int) -> None:
    def mangled(events: list[object]) -> list[object]:
        if events and random.random() < 0.3:
            events += random.sample(events, 1)
        if random.random() < 0.3:
            random.shuffle(events)
        return events

    stream = Stream(mangle=mangled)  # type: ignore[arg-type]
    async with open_database(dsn) as database, real_ledger(database, TestClock()) as ledger:
        at = Books(ledger, stream)
        vaults = {"anna": (await at.user(ANNA))[1], "bert": (await at.user(BERT))[1]}
        prepared_by, vaults["prepared"] = await at.user()
        expected = dict.fromkeys((*vaults, "nobody"), 0)
        numbers = iter(range(10**6))

        async def settle() -> None:
            """Let a listener see whatever nodes can still show."""
            async with watch(at, page_events=page) as one:
                await one.follow()

        async with watch(at, page_events=page) as first, watch(at, page_events=page + 1) as second:
            both = (first, second)
            for kind, what, amount in steps:
                # What was cut while it was being committed may be committed yet: wait until it is or is not.
                await database.fetch("SELECT FROM chain_networks FOR UPDATE")
                watched = await store.find_network(database, "testnet")
                match kind:
                    case "deposit":
                        name = str(what)
                        if watched is not None and stream.latest <= watched.seen.seen_ledger:
                            stream.close()  # a ledger never changes once it is closed
                        tx_hash = tx_hash_of(f"step {next(numbers)}")
                        wallet = {"anna": ANNA, "bert": BERT}.get(name, wallet_of(name))
                        if name == "prepared":
                            assert vaults["prepared"] is not None
                            await at.intent(prepared_by, vaults["prepared"], tx_hash, wallet, amount)
                        stream.deposit(wallet, amount, tx_hash=tx_hash)
                        expected[name] += amount
                    case "close":
                        assert isinstance(what, int)
                        stream.close(what)
                    case "look":
                        assert isinstance(what, int)
                        await both[what].listener.look()
                    case "book":
                        assert isinstance(what, int)
                        await both[what].booking.book_all("testnet")
                    case "cut":
                        assert isinstance(what, int)
                        knife = Knife(what)
                        async with watch(at, page_events=page) as third:
                            with knife as scope, scope:
                                await third.follow()
                    case "trim":
                        assert isinstance(what, int)
                        await settle()
                        stream.close()
                        stream.deposit(ANNA, 1000)  # nobody can ever know
                        stream.close(what)
                        stream.oldest = stream.latest
                    case "stale":
                        assert isinstance(what, int)
                        newest = stream.latest
                        stream.latest = max(stream.oldest, newest - what)
                        await first.listener.look()
                        stream.latest = newest
                    case "reset":
                        await settle()
                        stream.reset()
                        if await first.listener.look() == "halted":
                            watched = await store.find_network(database, "testnet")
                            assert watched is not None
                            assert await first.listener.begin_epoch(watched.epoch)
        await settle()
        for name, vault_id in vaults.items():
            assert vault_id is not None
            assert (await ledger.balance(vault_id))[0] == expected[name], name
        waiting = await list_suspense(database, "testnet", (0, ""), 10_000)
        assert sum(each.amount for each in waiting) == expected["nobody"]
        assert await at.credited() == sum(expected.values()) - expected["nobody"]
        assert await ledger.findings() == []
