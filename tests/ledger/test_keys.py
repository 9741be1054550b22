"""API keys: their form, and that every slip of a single character is caught without looking anything up."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.keys import KEY_CHARS, PREFIX_CHARS, RANDOM_BYTES, hash_key, is_well_formed, make_key

quick = settings(max_examples=200, database=None)
noises = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)
networks = st.sampled_from(["mainnet", "testnet"])
A_KEY = make_key("testnet", bytes(range(RANDOM_BYTES)))


@quick
@given(networks, noises)
def test_a_key_that_was_made_is_well_formed(network: str, noise: bytes) -> None:
    key = make_key(network, noise)
    assert len(key) == KEY_CHARS
    assert re.fullmatch(r"ck_(live|test)_[0-9a-f]{48}", key)
    assert is_well_formed(key.encode())
    assert key.startswith("ck_live_" if network == "mainnet" else "ck_test_")


@quick
@given(networks, noises, st.integers(0, KEY_CHARS - 1), st.integers(0, 255))
def test_changing_any_one_character_is_caught(network: str, noise: bytes, place: int, octet: int) -> None:
    key = make_key(network, noise).encode()
    changed = key[:place] + bytes([octet]) + key[place + 1 :]
    assert is_well_formed(changed) == (changed == key)


def test_every_single_change_of_one_key_is_caught() -> None:
    key = A_KEY.encode()
    for place in range(KEY_CHARS):
        for octet in b"0123456789abcdefABCDEF_-lt \x00":
            changed = key[:place] + bytes([octet]) + key[place + 1 :]
            assert is_well_formed(changed) == (changed == key)


@quick
@given(networks, noises, st.integers(0, KEY_CHARS - 2))
def test_swapping_two_neighbours_is_caught(network: str, noise: bytes, place: int) -> None:
    key = make_key(network, noise).encode()
    swapped = key[:place] + key[place : place + 2][::-1] + key[place + 2 :]
    assert is_well_formed(swapped) == (swapped == key)


@quick
@given(st.binary(max_size=80))
def test_noise_is_no_key(noise: bytes) -> None:
    assert not is_well_formed(noise)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        A_KEY[:-1].encode(),
        A_KEY.encode() + b"0",
        A_KEY.encode() + b"\n",
        b" " + A_KEY.encode(),
        A_KEY.upper().encode(),
        A_KEY.replace("ck_test", "ck_live").encode(),
        A_KEY.replace("ck_test", "ck_demo").encode(),
    ],
)
def test_what_only_resembles_a_key_is_refused(key: bytes) -> None:
    assert not is_well_formed(key)


def test_what_is_stored_is_a_prefix_that_reveals_eight_digits_and_a_sha256() -> None:
    assert A_KEY[:PREFIX_CHARS] == "ck_test_00010203"
    assert hash_key(A_KEY.encode()) == hashlib.sha256(A_KEY.encode()).digest()
