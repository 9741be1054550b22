"""Entries under changes that are kept or dropped, and as they were some ledgers ago; against a plain dictionary."""

from collections.abc import Sequence

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stellar_sdk import xdr

from callora.stellar.sandbox.accounts import new_account
from callora.stellar.sandbox.genesis import keypair_of
from callora.stellar.sandbox.ledger import NetworkRules, genesis_state
from callora.stellar.sandbox.state import PAST_LEDGERS, Overlay, State, account_key

ADDRESSES = [keypair_of(f"someone {number}").public_key for number in range(5)]
KEYS = [account_key(address) for address in ADDRESSES]


def data(number: int, balance: int) -> xdr.LedgerEntryData:
    account = new_account(ADDRESSES[number], balance, 0)
    return xdr.LedgerEntryData(xdr.LedgerEntryType.ACCOUNT, account=account)


def empty() -> State:
    return genesis_state(NetworkRules(), 1_700_000_000, ())


def close(state: State) -> None:
    state.close(attrs.evolve(state.header, sequence=state.header.sequence + 1))


def seen(state: State, sequence: int) -> dict[bytes, int]:
    """Return the balances after a ledger."""
    reader = state.at(sequence)
    found = {}
    for key in reader.keys(b""):
        entry = reader.get(key)
        assert entry is not None
        assert entry.data.account is not None
        found[key] = entry.data.account.balance.int64
    return found


WRITES = st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 9))), max_size=4)
LEDGERS = st.lists(st.lists(st.tuples(st.booleans(), WRITES), max_size=3), max_size=12)


@given(LEDGERS)
def test_every_ledger_can_be_read_as_it_was(
    ledgers: Sequence[Sequence[tuple[bool, list[tuple[int, int | None]]]]],
) -> None:
    state, model = empty(), [dict[bytes, int]()]
    for transactions in ledgers:
        now = dict(model[-1])
        overlay = Overlay(state, state.header.sequence + 1)
        for succeeds, writes in transactions:
            nested, then = overlay.nested(), dict(now)
            for number, balance in writes:
                if balance is None:
                    nested.delete(KEYS[number])
                    then.pop(KEYS[number], None)
                else:
                    nested.put(KEYS[number], data(number, balance))
                    then[KEYS[number]] = balance
            if succeeds:
                nested.commit()
                now = then
        overlay.commit()
        close(state)
        model.append(now)
        for sequence, expected in enumerate(model, start=1):
            assert seen(state, sequence) == expected


def test_no_further_back_than_it_says() -> None:
    state = empty()
    for _ in range(PAST_LEDGERS + 5):
        close(state)
    assert seen(state, state.header.sequence - PAST_LEDGERS) == {}
    for sequence in (state.header.sequence - PAST_LEDGERS - 1, state.header.sequence + 1):
        with pytest.raises(LookupError):
            state.at(sequence)


def test_an_overlay_tells_what_it_read_and_what_it_would_change() -> None:
    state = empty()
    first = Overlay(state, 2)
    first.put(KEYS[0], data(0, 5))
    first.put(KEYS[1], data(1, 5), live_until=9)
    first.commit()
    close(state)
    overlay = Overlay(state, 3)
    dropped = overlay.nested()
    assert dropped.get(KEYS[3]) is None
    dropped.put(KEYS[3], data(3, 1))
    overlay.put(KEYS[0], data(0, 6))
    overlay.extend(KEYS[1], 20)
    overlay.put(KEYS[2], data(2, 1))
    overlay.delete(KEYS[4])
    assert list(overlay.reads) == [KEYS[3], KEYS[1]], "also what a dropped one on top of it read"
    changes = [(change.type.name.removeprefix("LEDGER_ENTRY_"), _kind(change)) for change in overlay.changes()]
    assert changes == [
        ("STATE", "ACCOUNT"),
        ("UPDATED", "ACCOUNT"),
        ("STATE", "TTL"),
        ("UPDATED", "TTL"),
        ("CREATED", "ACCOUNT"),
    ]


def _kind(change: xdr.LedgerEntryChange) -> str:
    entry = change.state or change.updated or change.created
    assert entry is not None
    return entry.data.type.name
