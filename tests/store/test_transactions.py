"""Transactions as stored: what the verbs do, what of many that try only one does, and what the database refuses."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import attrs
import pytest
import trio

from callora.ledger.chain import Applied, ContractFault, Envelope, Head, Retained
from callora.ledger.faults import StoreRefused
from callora.ledger.submission import FeeBump, Submission
from callora.store.bridge import Database
from callora.store.transactions import Epoch, TransactionStore
from tests.support.chain_rows import set_network

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MAX_TIME = int((NOON + timedelta(seconds=90)).timestamp())
CHANNEL = "G" + "A" * 55
OTHER_CHANNEL = "G" + "B" * 55
SENT_AT = 1000

IN_TIME = Retained(1, Head(SENT_AT + 18, NOON + timedelta(seconds=90)))
PAST = Retained(SENT_AT, Head(SENT_AT + 19, NOON + timedelta(seconds=91)))
TRIMMED = Retained(SENT_AT + 1, Head(SENT_AT + 19, NOON + timedelta(seconds=91)))
OTHER_HISTORY = Retained(1, Head(SENT_AT - 1, NOON + timedelta(seconds=91)))

DONE = Applied(True, 1002, NOON, "tx_success", None, None, "AAAA", 4321)
FAILED = Applied(False, 1002, NOON, "tx_failed", "trapped", ContractFault(5, "Error(Contract, #5)"), None, 4321)


@pytest.fixture
def store(database: Database) -> TransactionStore:
    """The store on a migrated database."""
    return TransactionStore(database)


def submission(
    number: int = 1,
    *,
    purpose: str = "pay:1",
    channel: bool = True,
    sponsored: bool = True,
    source: str = CHANNEL,
    sequence: int | None = None,
    epoch: int = 1,
) -> Submission:
    """Return a new submission by its number."""
    own = number if sequence is None else sequence
    made = Envelope(f"xdr-{number}", f"{number:064x}", None, source, own, MAX_TIME, 50_100)
    return Submission("testnet", epoch, purpose, made, SENT_AT, 100, channel, sponsored)


def bump_of(inner: Submission, number: int, bid: int) -> FeeBump:
    """Return a fee-bump by its number."""
    made = attrs.evolve(inner.envelope, xdr=f"xdr-{number}", hash=f"{number:064x}", inner_hash=inner.hash, fee=bid * 2)
    return FeeBump(made, bid)


async def sent(store: TransactionStore, made: Submission) -> Submission:
    """Store a submission and count one send of it."""
    assert await store.add(made, NOON) is None
    begun = await store.begin_send(made.hash, NOON)
    assert begun is not None
    return begun


async def found(store: TransactionStore, made: Submission) -> Submission:
    """Return a submission as stored."""
    present = await store.find(made.hash)
    assert present is not None
    return present


# --- what the verbs do ------------------------------------------------------------------------------------------------


async def test_what_is_stored_is_found_as_it_was(store: TransactionStore) -> None:
    made = submission()
    assert await store.add(made, NOON) is None
    assert await store.find(made.hash) == made
    assert await store.of_purpose("testnet", "pay:1") == [made]
    assert [each.submission for each in await store.open_ones("testnet")] == [made]
    assert await store.open_ones("mainnet") == []
    assert await store.find("ff" * 32) is None


async def test_a_fee_bump_that_was_passed_on_is_found_by_both_hashes(store: TransactionStore) -> None:
    made = submission(channel=False, sponsored=False)
    outer = attrs.evolve(made.envelope, xdr="outer", hash="ab" * 32, inner_hash=made.hash)
    passed = attrs.evolve(made, envelope=outer)
    assert await store.add(passed, NOON) is None
    assert await store.add(passed, NOON) is None, "the same again is no error"
    assert await store.find(made.hash) == passed
    assert await store.find("ab" * 32) == passed


async def test_sends_are_counted_before_they_are_made(store: TransactionStore) -> None:
    made = submission()
    begun = await sent(store, made)
    assert (begun.state, begun.sends, begun.untaken) == ("sent", 1, 0)
    again = await store.begin_send(made.hash, NOON)
    assert again is not None
    assert again.sends == 2
    noted = await store.note_untaken(made.hash, "tx_bad_seq")
    assert noted is not None
    assert (noted.untaken, noted.refusal, noted.took_nothing) == (1, "tx_bad_seq", False)
    noted = await store.note_untaken(made.hash, None)
    assert noted is not None
    assert (noted.untaken, noted.refusal, noted.took_nothing) == (2, "tx_bad_seq", True)
    assert await store.note_untaken(made.hash, None) is None, "no more sends came to nothing than were made"


@pytest.mark.parametrize("applied", [DONE, FAILED])
async def test_what_is_in_a_ledger_is_kept_whole(store: TransactionStore, applied: Applied) -> None:
    made = submission()
    await sent(store, made)
    assert await store.finish(made.hash, applied, NOON, closes_purpose=True)
    present = await found(store, made)
    assert present.applied == applied
    assert present.state == ("succeeded" if applied.successful else "failed")
    assert not await store.finish(made.hash, FAILED, NOON, closes_purpose=True), "what has ended has ended"
    assert await found(store, made) == present
    assert await store.begin_send(made.hash, NOON) is None


async def test_a_fee_bump_is_kept_with_what_it_is_around(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    bumps = bump_of(made, 50, 1_000), bump_of(made, 51, 10_000)
    for bump in bumps:
        assert await store.add_bump(made.hash, bump, NOON)
        assert await store.add_bump(made.hash, bump, NOON), "the same again is no error"
    assert (await found(store, made)).bumps == bumps
    by_bump = await store.find(bumps[1].envelope.hash)
    assert by_bump is not None
    assert by_bump.hash == made.hash


async def test_a_channel_is_busy_until_its_transaction_has_ended(store: TransactionStore) -> None:
    made = submission(sequence=41)
    await sent(store, made)
    assert await store.busy_channels("testnet", 1) == {CHANNEL}
    assert await store.last_sequence("testnet", 1, CHANNEL) is None, "nobody knows yet whether it was used"
    await store.finish(made.hash, DONE, NOON, closes_purpose=True)
    assert await store.busy_channels("testnet", 1) == frozenset()
    assert await store.last_sequence("testnet", 1, CHANNEL) == 41
    assert await store.last_sequence("testnet", 2, CHANNEL) is None


async def test_what_nobody_can_tell_frees_its_channel_and_not_its_purpose(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    assert await store.shelve(made.hash, TRIMMED)
    assert not await store.shelve(made.hash, TRIMMED)
    assert await store.busy_channels("testnet", 1) == frozenset()
    assert await store.add(submission(2), NOON) == "purpose"
    assert await store.begin_send(made.hash, NOON) is None
    other = submission(3, purpose="pay:2", sequence=1)
    assert await store.add(other, NOON) is None, "its sequence number may be unused"
    assert await store.finish(made.hash, DONE, NOON, closes_purpose=True), "until somebody can tell"


async def test_the_history_is_read_from_the_network(store: TransactionStore, database: Database) -> None:
    assert await store.epoch("testnet") == Epoch(1, None)
    await set_network(database, epoch=3, halted="the network has begun another history")
    assert await store.epoch("testnet") == Epoch(3, "the network has begun another history")


# --- of many that try, one does ---------------------------------------------------------------------------------------


async def at_once(count: int, attempt: Callable[[int], Awaitable[object]]) -> list[object]:
    """Run attempts that begin together; return what each came to."""
    results: list[object] = [None] * count

    async def run(number: int) -> None:
        results[number] = await attempt(number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(run, number)
    return results


async def test_of_many_envelopes_for_one_purpose_one_is_stored(store: TransactionStore, database: Database) -> None:
    sources = ["G" + letter * 55 for letter in "ABCDEFGH"]
    results = await at_once(8, lambda number: store.add(submission(number + 1, source=sources[number]), NOON))
    assert sorted(map(str, results)) == ["None"] + ["purpose"] * 7
    assert await database.fetch_value("SELECT count(*) FROM chain_transactions") == 1


async def test_of_many_purposes_on_one_channel_one_is_stored(store: TransactionStore, database: Database) -> None:
    results = await at_once(8, lambda number: store.add(submission(number + 1, purpose=f"pay:{number}"), NOON))
    assert sorted(map(str, results)) == ["None"] + ["channel"] * 7
    assert await database.fetch_value("SELECT count(*) FROM chain_transactions") == 1


async def test_of_a_send_and_a_burial_at_once_the_first_one_counts(store: TransactionStore) -> None:
    for number in range(10):
        made = submission(number + 1, purpose=f"pay:{number}", source=f"G{'ABCDEFGHIJ'[number] * 55}")
        await sent(store, made)
        await store.note_untaken(made.hash, "tx_bad_seq")

        async def attempt(which: int, tx_hash: str = made.hash) -> object:
            if which:
                return await store.begin_send(tx_hash, NOON)
            return await store.bury(tx_hash, None, NOON)

        buried, begun = await at_once(2, attempt)
        assert buried == (begun is None), "it is dead, or being sent, never both"


async def test_of_many_that_end_it_one_does(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    results = await at_once(8, lambda _: store.finish(made.hash, DONE, NOON, closes_purpose=True))
    assert sorted(map(bool, results)) == [False] * 7 + [True]


# --- what is in the way -----------------------------------------------------------------------------------------------


async def test_after_an_outcome_a_purpose_takes_nothing_more(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    await store.finish(made.hash, FAILED, NOON, closes_purpose=True)
    assert await store.add(submission(2), NOON) == "purpose"


async def test_after_a_failure_that_goes_away_a_purpose_takes_another(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    await store.finish(made.hash, FAILED, NOON, closes_purpose=False)
    assert await store.add(submission(2), NOON) is None
    assert [each.hash for each in await store.of_purpose("testnet", "pay:1")] == [made.hash, submission(2).hash]


async def test_a_sequence_number_that_was_used_on_chain_is_never_used_again(store: TransactionStore) -> None:
    made = submission(sequence=41)
    await sent(store, made)
    await store.finish(made.hash, DONE, NOON, closes_purpose=True)
    assert await store.add(submission(2, purpose="pay:2", sequence=41), NOON) == "sequence"
    assert await store.add(submission(3, purpose="pay:2", sequence=42), NOON) is None


async def test_the_sequence_number_of_what_is_dead_is_free(store: TransactionStore) -> None:
    made = submission(sequence=41)
    await sent(store, made)
    assert await store.bury(made.hash, PAST, NOON)
    assert await store.add(submission(2, sequence=41), NOON) is None


async def test_a_purpose_that_is_open_on_another_history_is_open(store: TransactionStore, database: Database) -> None:
    await sent(store, submission())
    await set_network(database, epoch=2)
    assert await store.add(submission(2, epoch=2, source=OTHER_CHANNEL), NOON) == "purpose"


async def test_on_another_history_a_purpose_begins_anew(store: TransactionStore, database: Database) -> None:
    made = submission(sequence=41)
    await sent(store, made)
    await store.finish(made.hash, DONE, NOON, closes_purpose=True)
    await set_network(database, epoch=2)
    assert await store.add(submission(2, epoch=2, sequence=41), NOON) is None


async def test_nothing_is_stored_while_the_network_is_halted(store: TransactionStore, database: Database) -> None:
    await set_network(database, epoch=1, halted="look at it")
    assert await store.add(submission(), NOON) == "network"
    await database.execute("UPDATE chain_networks SET halted = NULL, epoch = 2")
    assert await store.add(submission(), NOON) == "network"
    assert await store.add(submission(epoch=2), NOON) is None


# --- what the database refuses, whoever asks --------------------------------------------------------------------------


async def refused(database: Database, sql: str, *args: object) -> str | None:
    """Try a statement as a hand at a console would; return the rule that refused it."""
    with pytest.raises(StoreRefused) as caught:
        await database.execute(sql, *args)
    return caught.value.constraint


@pytest.mark.parametrize(
    "change",
    [
        *("envelope = 'other'", "sequence = 8", "max_time = now()", "purpose = 'other'", "channel = false"),
        *("network = 'mainnet'", "epoch = 2", "fee = 1", "bid = 1", "source_account = 'G' || repeat('Z', 55)"),
        *("failed_before = 1", "sponsored = false", "stored_at = now()", "state = 'stored', sends = 0"),
        *("sends = 0", "prepared_ledger = 1"),
    ],
)
async def test_an_envelope_and_its_sends_never_change(store: TransactionStore, database: Database, change: str) -> None:
    await sent(store, submission())
    assert await refused(database, f"UPDATE chain_transactions SET {change}") == "envelopes_never_change"


@pytest.mark.parametrize("change", ["state = 'sent'", "result_code = 'x'", "ended_at = now()", "refusal = 'x'"])
async def test_what_has_ended_has_ended(store: TransactionStore, database: Database, change: str) -> None:
    made = submission()
    await sent(store, made)
    await store.finish(made.hash, DONE, NOON, closes_purpose=True)
    assert await refused(database, f"UPDATE chain_transactions SET {change}") == "envelopes_never_change"


@pytest.mark.parametrize("state", ["sent", "succeeded", "dead"])
async def test_nothing_is_stored_as_if_it_had_been_sent(database: Database, state: str) -> None:
    rule = await refused(
        database,
        "INSERT INTO chain_transactions (hash, network, epoch, purpose, envelope, source_account, sequence, max_time,"
        " fee, prepared_ledger, bid, channel, sponsored, failed_before, state, stored_at)"
        " VALUES (decode(repeat('ab', 32), 'hex'),"
        " 'testnet', 1, 'p', 'x', 'G' || repeat('A', 55), 1, now(), 1, 1, 1, true, true, 0, $1, now())",
        state,
    )
    assert rule == "stored_before_sent"


@pytest.mark.parametrize("proof", [None, IN_TIME, TRIMMED, OTHER_HISTORY])
async def test_nothing_that_may_have_been_taken_is_dead_without_proof(
    store: TransactionStore, database: Database, proof: Retained | None
) -> None:
    made = submission()
    await sent(store, made)
    if proof is None:
        assert not await store.bury(made.hash, None, NOON)
        sql = "UPDATE chain_transactions SET state = 'dead', ended_at = now()"
        assert await refused(database, sql) == "dead_only_with_proof"
    else:
        with pytest.raises(StoreRefused) as caught:
            await store.bury(made.hash, proof, NOON)
        assert caught.value.constraint == "dead_only_with_proof"
    assert (await found(store, made)).state == "sent"
    assert await store.bury(made.hash, PAST, NOON)


async def test_what_a_wallet_signed_is_not_dead_because_a_node_refused_it(
    store: TransactionStore, database: Database
) -> None:
    made = submission(channel=False)
    await sent(store, made)
    await store.note_untaken(made.hash, "tx_bad_auth")
    with pytest.raises(StoreRefused) as caught:
        await store.bury(made.hash, None, NOON)
    assert caught.value.constraint == "dead_only_with_proof", "the wallet has it too"
    assert await store.bury(made.hash, PAST, NOON)


async def test_what_a_wallet_signed_and_callora_never_sent_is_not_dead_by_a_node_that_forgot_when_it_may_have_come(
    store: TransactionStore,
) -> None:
    made = submission(channel=False)
    assert await store.add(made, NOON) is None
    with pytest.raises(StoreRefused) as caught:
        await store.bury(made.hash, TRIMMED, NOON)
    assert caught.value.constraint == "dead_only_with_proof", "the wallet may have sent it itself"
    assert await store.bury(made.hash, PAST, NOON)


async def test_what_no_send_of_was_taken_is_dead(store: TransactionStore) -> None:
    never = submission()
    assert await store.add(never, NOON) is None
    assert await store.bury(never.hash, None, NOON), "it was not even sent"
    made = submission(2)
    await sent(store, made)
    await store.note_untaken(made.hash, "tx_bad_seq")
    assert await store.bury(made.hash, None, NOON)


async def test_a_dead_one_is_not_sent_in_the_same_breath(store: TransactionStore, database: Database) -> None:
    made = submission()
    await sent(store, made)
    await store.note_untaken(made.hash, "tx_bad_seq")
    sql = "UPDATE chain_transactions SET state = 'dead', sends = 2, untaken = 2, ended_at = now()"
    assert await refused(database, sql) == "dead_only_with_proof"


async def test_what_was_meant_for_a_history_that_is_gone_is_dead_when_its_time_is_past(
    store: TransactionStore, database: Database
) -> None:
    made = submission()
    await sent(store, made)
    await set_network(database, epoch=2)
    with pytest.raises(StoreRefused):
        await store.bury(made.hash, attrs.evolve(OTHER_HISTORY, latest=Head(7, IN_TIME.latest.closed_at)), NOON)
    assert await store.bury(made.hash, OTHER_HISTORY, NOON)


async def test_a_channel_is_not_freed_before_the_time_bound_is_past(store: TransactionStore) -> None:
    made = submission()
    await sent(store, made)
    with pytest.raises(StoreRefused) as caught:
        await store.shelve(made.hash, IN_TIME)
    assert caught.value.constraint == "unresolved_only_past_its_time"


async def test_a_bid_that_is_not_tenfold_is_no_fee_bump(store: TransactionStore, database: Database) -> None:
    made = submission()
    await sent(store, made)
    assert not await store.add_bump(made.hash, bump_of(made, 50, 999), NOON)
    assert await store.add_bump(made.hash, bump_of(made, 51, 1_000), NOON)
    assert not await store.add_bump(made.hash, bump_of(made, 52, 9_999), NOON)
    assert len((await found(store, made)).bumps) == 1


async def test_only_what_is_open_and_sponsored_has_fee_bumps(store: TransactionStore) -> None:
    own = submission(sponsored=False)
    await sent(store, own)
    assert not await store.add_bump(own.hash, bump_of(own, 50, 1_000), NOON)
    done = submission(2, purpose="pay:2", source=OTHER_CHANNEL)
    await sent(store, done)
    await store.finish(done.hash, DONE, NOON, closes_purpose=True)
    assert not await store.add_bump(done.hash, bump_of(done, 51, 1_000), NOON)


@pytest.mark.parametrize("table", ["chain_transactions", "chain_bumps"])
async def test_nothing_of_it_is_deleted(store: TransactionStore, database: Database, table: str) -> None:
    made = submission()
    await sent(store, made)
    await store.add_bump(made.hash, bump_of(made, 50, 1_000), NOON)
    for sql in (f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
        await refused(database, sql)
    await refused(database, "UPDATE chain_bumps SET bid = bid + 1")
    assert await store.find(made.hash) is not None
