"""Access tokens: what a signature proves, and that no token is ever wider than its key."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.ledger.ids import ApiId, ApiKeyId, EndpointId, TokenId, UserId, VaultId
from callora.ledger.keys import KeyRecord
from callora.ledger.money import Stroops
from callora.ledger.tokens import (
    BudgetExhausted,
    BudgetTaken,
    Signing,
    TokenInvalid,
    common_scopes,
    grant,
    is_token_shaped,
    narrow,
    read_token,
    sign_token,
)

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SIGNING = Signing("s" * 32, None, None)
TOKEN, KEY = TokenId("01a1ff0e-0fb6-7396-aa6d-6df1fb066d39"), ApiKeyId("01a1ff0e-10dd-749f-98e9-63e79b253cfe")
RECORD = KeyRecord(
    api_key_id=KEY,
    user_id=UserId("u"),
    vault_id=VaultId("v"),
    key_hash=b"h",
    scopes=frozenset("*"),
    allowed_apis=None,
    allowed_endpoints=frozenset([EndpointId(7)]),
    allowed_networks=(ip_network("10.0.0.0/8"),),
    rate_limit_per_minute=3,
    disabled=False,
    expires_at=NOW,
    revoked_at=None,
    standing="active",
)
quick = settings(max_examples=300, database=None)
scopes = st.frozensets(st.sampled_from(["*", "read", "write", "admin"]))
apis = st.none() | st.frozensets(st.integers(1, 4).map(ApiId))


def signed(signing: Signing = SIGNING) -> bytes:
    return sign_token(signing, TOKEN, KEY, NOW, NOW + timedelta(minutes=1)).encode()


def test_what_was_signed_is_read() -> None:
    for signing in (SIGNING, Signing("t" * 40, "callora", "calls")):
        text = signed(signing)
        assert is_token_shaped(text)
        read = read_token(signing, text)
        assert (read.token_id, read.api_key_id) == (TOKEN, KEY)


@pytest.mark.parametrize(
    "other",
    [Signing("t" * 32, None, None), Signing("s" * 32, "callora", None), Signing("s" * 32, None, "calls")],
)
def test_what_others_signed_or_signed_for_others_is_not(other: Signing) -> None:
    with pytest.raises(TokenInvalid):
        read_token(other, signed())


def test_a_token_for_an_audience_is_not_taken_where_none_is_configured() -> None:
    """Nor does it need to be: the secret is the same, and the row decides."""
    assert read_token(SIGNING, signed(Signing("s" * 32, "callora", "calls"))).token_id == TOKEN


@quick
@given(st.binary(max_size=80))
def test_whatever_is_presented_is_refused_and_nothing_worse(text: bytes) -> None:
    with pytest.raises(TokenInvalid):
        read_token(SIGNING, text)


@quick
@given(st.integers(0, 400), st.integers(1, 255))
def test_no_byte_of_a_token_can_be_changed(place: int, flip: int) -> None:
    text = bytearray(signed())
    place %= len(text)
    text[place] ^= flip
    try:
        read = read_token(SIGNING, bytes(text))
    except TokenInvalid:
        return
    # The last character of the signature has bits that mean nothing; what is read is what was signed.
    assert place == len(text) - 1
    assert read.token_id == TOKEN


@pytest.mark.parametrize(
    "text", [b"", b"ck_test_" + b"a" * 48, b"a.b.c", b"eyJ.eyJ.", b"eyJa.eyJa.a.b", b"eyJa.eyJa\n.a"]
)
def test_other_credentials_have_not_the_form_of_a_token(text: bytes) -> None:
    assert not is_token_shaped(text)


@quick
@given(scopes, scopes, st.sampled_from(["read", "write", "admin", "other"]))
def test_a_scope_is_common_when_both_sides_allow_it(one: frozenset[str], other: frozenset[str], scope: str) -> None:
    def allows(these: frozenset[str]) -> bool:
        return scope in these or "*" in these

    assert allows(common_scopes(one, other)) == (allows(one) and allows(other))


@quick
@given(scopes, scopes, apis, apis)
def test_a_token_allows_an_api_only_where_its_key_does_and_leaves_all_else_of_the_key(
    key_scopes: frozenset[str],
    token_scopes: frozenset[str],
    key_apis: frozenset[ApiId] | None,
    token_apis: frozenset[ApiId] | None,
) -> None:
    key = attrs.evolve(RECORD, scopes=key_scopes, allowed_apis=key_apis)
    made = narrow(key, TOKEN, token_scopes, token_apis, budgeted=True)
    for api_id in range(1, 6):
        allowed = made.allowed_apis is None or api_id in made.allowed_apis
        both = [each is None or api_id in each for each in (key_apis, token_apis)]
        assert allowed == all(both)
    assert made.budget == TOKEN
    assert attrs.evolve(made, scopes=key.scopes, allowed_apis=key.allowed_apis, budget=None) == key
    assert narrow(key, TOKEN, token_scopes, token_apis, budgeted=False).budget is None


@quick
@given(st.integers(1, 1000), st.integers(0, 1000), st.lists(st.integers(1, 400)))
def test_a_budget_is_never_exceeded_and_never_refuses_what_it_covers(budget: int, spent: int, asked: list[int]) -> None:
    spent = min(spent, budget)
    after, outcomes = grant(Stroops(budget), Stroops(spent), [Stroops(amount) for amount in asked])
    left = budget - spent
    for amount, outcome in zip(asked, outcomes, strict=True):
        if amount <= left:
            left -= amount
            assert outcome == BudgetTaken(Stroops(left))
        else:
            assert outcome == BudgetExhausted(Stroops(budget), Stroops(left))
    assert after == budget - left <= budget


def test_a_secret_is_not_shown() -> None:
    assert "s" * 32 not in repr(SIGNING)
