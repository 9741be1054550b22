"""Proofs that someone holds a wallet: every way in which a challenge can be something else than what was asked."""

import base64
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stellar_sdk import (
    Account,
    FeeBumpTransactionEnvelope,
    IdMemo,
    Keypair,
    ManageData,
    MuxedAccount,
    Network,
    Operation,
    Payment,
    TextMemo,
    TransactionBuilder,
    TransactionEnvelope,
)
from stellar_sdk.asset import Asset
from stellar_sdk.memo import Memo
from stellar_sdk.sep.stellar_web_authentication import build_challenge_transaction

from callora.config.settings import PASSPHRASES
from callora.ledger.wallets import is_address, is_seed, make_seed
from callora.stellar.proofs import Proof, ProofRefused, signed_message
from callora.stellar.web_auth import CHALLENGE_SECONDS, WebAuth

SEED = make_seed(bytes(range(32)))
SERVER = Keypair.from_secret(SEED)
CLIENT = Keypair.from_secret(make_seed(bytes(range(1, 33))))
OTHER = Keypair.from_secret(make_seed(bytes(range(2, 34))))
DOMAIN = "callora.test"
TESTNET = Network.TESTNET_NETWORK_PASSPHRASE
AUTH = WebAuth.make(SEED, DOMAIN, PASSPHRASES["testnet"])


def now() -> datetime:
    return datetime.now(UTC)  # the SDK looks at the machine's clock, and nowhere else


def signed(transaction: str, *keypairs: Keypair, passphrase: str = TESTNET) -> str:
    envelope = TransactionEnvelope.from_xdr(transaction, passphrase)
    for keypair in keypairs:
        envelope.sign(keypair)
    return envelope.to_xdr()


def entry(name: str, value: bytes | str | None, source: str | MuxedAccount | None) -> ManageData:
    return ManageData(name, value, source)


NONCE = base64.b64encode(bytes(48))
FIRST = entry(f"{DOMAIN} auth", NONCE, CLIENT.public_key)
SECOND = entry("web_auth_domain", DOMAIN, SERVER.public_key)


def made(
    operations: Sequence[Operation] = (FIRST, SECOND),
    *,
    source: str = SERVER.public_key,
    sequence: int = 0,
    bounds: tuple[int, int] | None = None,
    memo: Memo | None = None,
    signers: Sequence[Keypair] = (SERVER, CLIENT),
) -> str:
    """Return a transaction that differs from a signed challenge in what is given."""
    builder = TransactionBuilder(Account(source, sequence - 1), TESTNET, 100)
    at = int(now().timestamp())
    builder.add_time_bounds(*(bounds if bounds is not None else (at - 1, at + 60)))
    if memo is not None:
        builder.add_memo(memo)
    for operation in operations:
        builder.append_operation(operation)
    envelope = builder.build()
    for signer in signers:
        envelope.signatures.append(signer.sign_decorated(envelope.hash()))
    return envelope.to_xdr()


def refused(transaction: str, auth: WebAuth = AUTH) -> str:
    answer = auth.verify(transaction, now())
    assert isinstance(answer, ProofRefused)
    assert answer.reason
    return answer.reason


def test_a_signed_challenge_proves_the_wallet() -> None:
    transaction = AUTH.challenge(CLIENT.public_key)
    envelope = TransactionEnvelope.from_xdr(transaction, TESTNET)
    inner = envelope.transaction
    assert inner.sequence == 0
    assert inner.preconditions is not None
    assert inner.preconditions.time_bounds is not None
    bounds = inner.preconditions.time_bounds
    assert bounds.max_time - bounds.min_time == CHALLENGE_SECONDS == 900
    proof = AUTH.verify(signed(transaction, CLIENT), now())
    assert isinstance(proof, Proof)
    assert proof.address == CLIENT.public_key
    assert proof.expires_at == datetime.fromtimestamp(bounds.max_time, UTC)
    assert proof.challenge_hash == envelope.hash()


def test_our_own_copy_of_a_challenge_is_taken() -> None:
    """So that what the next test changes is the reason why it is refused."""
    assert isinstance(AUTH.verify(made(), now()), Proof)


@pytest.mark.parametrize(
    "transaction",
    [
        pytest.param(lambda: made(signers=(SERVER,)), id="not signed by the wallet"),
        pytest.param(lambda: made(signers=(CLIENT,)), id="not signed by us"),
        pytest.param(lambda: made(signers=()), id="not signed"),
        pytest.param(lambda: made(signers=(SERVER, OTHER)), id="signed by another wallet"),
        pytest.param(lambda: made(signers=(SERVER, CLIENT, OTHER)), id="signed by a third as well"),
        pytest.param(lambda: made(signers=(SERVER, CLIENT, CLIENT)), id="signed twice"),
        pytest.param(lambda: made(signers=(SERVER, SERVER, CLIENT)), id="signed twice by us"),
        pytest.param(lambda: made(source=OTHER.public_key), id="of another server"),
        pytest.param(lambda: made(sequence=1), id="one that a network could take"),
        pytest.param(lambda: made(bounds=(0, 0)), id="without an end"),
        pytest.param(lambda: made(bounds=(1, int(now().timestamp()) - 1)), id="expired"),
        pytest.param(lambda: made(bounds=(int(now().timestamp()) + 600, int(now().timestamp()) + 900)), id="not begun"),
        pytest.param(lambda: made(memo=IdMemo(7)), id="with an id memo"),
        pytest.param(lambda: made(memo=TextMemo("7")), id="with a text memo"),
        pytest.param(lambda: made((FIRST,)), id="without the endpoint's domain"),
        pytest.param(lambda: made((SECOND, FIRST)), id="entries the other way round"),
        pytest.param(
            lambda: made((FIRST, entry("web_auth_domain", "evil.test", SERVER.public_key))), id="another endpoint"
        ),
        pytest.param(
            lambda: made((FIRST, entry("web_auth_domain", DOMAIN, CLIENT.public_key))), id="an endpoint of the wallet's"
        ),
        pytest.param(
            lambda: made((FIRST, entry("web_auth_domain", None, SERVER.public_key))), id="an endpoint without a name"
        ),
        pytest.param(lambda: made((FIRST, SECOND, entry("more", "x", SERVER.public_key))), id="one more entry of ours"),
        pytest.param(lambda: made((FIRST, SECOND, SECOND)), id="an entry twice"),
        pytest.param(
            lambda: made((FIRST, SECOND, entry("client_domain", "wallet.test", OTHER.public_key))),
            id="a client's domain",
        ),
        pytest.param(
            lambda: made((FIRST, SECOND, Payment(OTHER.public_key, Asset.native(), "1", CLIENT.public_key))),
            id="a payment as well",
        ),
        pytest.param(
            lambda: made((Payment(OTHER.public_key, Asset.native(), "1", CLIENT.public_key), SECOND)), id="a payment"
        ),
        pytest.param(
            lambda: made((entry("evil.test auth", NONCE, CLIENT.public_key), SECOND)), id="another home domain"
        ),
        pytest.param(lambda: made((entry(DOMAIN, NONCE, CLIENT.public_key), SECOND)), id="a home domain alone"),
        pytest.param(lambda: made((entry(f"{DOMAIN} auth", NONCE, None), SECOND)), id="for nobody"),
        pytest.param(lambda: made((entry(f"{DOMAIN} auth", None, CLIENT.public_key), SECOND)), id="without a nonce"),
        pytest.param(
            lambda: made((entry(f"{DOMAIN} auth", NONCE[:60], CLIENT.public_key), SECOND)), id="with a short nonce"
        ),
        pytest.param(
            lambda: made((entry(f"{DOMAIN} auth", b"*" * 64, CLIENT.public_key), SECOND)), id="with a nonce not base64"
        ),
        pytest.param(
            lambda: made((entry(f"{DOMAIN} auth", NONCE, MuxedAccount(CLIENT.public_key, 5)), SECOND)),
            id="for a muxed account",
        ),
        pytest.param(
            lambda: made((entry(f"{DOMAIN} auth", NONCE, SERVER.public_key), SECOND), signers=(SERVER,)),
            id="for ourselves",
        ),
        pytest.param(
            lambda: made((entry(f"{DOMAIN} auth", NONCE, SERVER.public_key), SECOND), signers=(SERVER, SERVER)),
            id="for ourselves, signed twice",
        ),
    ],
)
def test_everything_else_is_refused_whoever_signed_it(transaction: Callable[[], str]) -> None:
    refused(transaction())


def test_what_was_changed_after_we_signed_is_refused() -> None:
    envelope = TransactionEnvelope.from_xdr(AUTH.challenge(CLIENT.public_key), TESTNET)
    envelope.transaction.operations[0].source = MuxedAccount(OTHER.public_key)
    envelope.sign(OTHER)
    assert "not signed by server" in refused(envelope.to_xdr())


def test_a_challenge_counts_on_its_own_network_alone() -> None:
    mainnet = WebAuth.make(SEED, DOMAIN, PASSPHRASES["mainnet"])
    transaction = signed(AUTH.challenge(CLIENT.public_key), CLIENT)
    refused(transaction, mainnet)
    refused(signed(AUTH.challenge(CLIENT.public_key), CLIENT, passphrase=mainnet.network_passphrase))


def test_a_challenge_counts_for_its_own_server_and_domain_alone() -> None:
    transaction = signed(AUTH.challenge(CLIENT.public_key), CLIENT)
    refused(transaction, WebAuth.make(OTHER.secret, DOMAIN, PASSPHRASES["testnet"]))
    refused(transaction, WebAuth.make(SEED, "other.test", PASSPHRASES["testnet"]))


def test_a_client_domain_that_we_signed_once_is_refused_as_well() -> None:
    transaction = build_challenge_transaction(
        SEED, CLIENT.public_key, DOMAIN, DOMAIN, TESTNET, client_domain="w.test", client_signing_key=OTHER.public_key
    )
    refused(signed(transaction, CLIENT, OTHER))


def test_our_clock_ends_a_challenge_too() -> None:
    """For a service whose idea of the time is ahead of the machine's, such as another process that has purged it."""
    transaction = signed(AUTH.challenge(CLIENT.public_key), CLIENT)
    assert isinstance(AUTH.verify(transaction, now() + timedelta(seconds=CHALLENGE_SECONDS - 5)), Proof)
    assert AUTH.verify(transaction, now() + timedelta(seconds=CHALLENGE_SECONDS + 1)) == ProofRefused(
        "The challenge has expired"
    )


def test_a_challenge_without_an_end_in_sight_still_has_a_date() -> None:
    proof = AUTH.verify(made(bounds=(1, 2**64 - 1)), now())
    assert isinstance(proof, Proof)


def test_one_challenge_has_one_hash_however_it_is_written() -> None:
    transaction = signed(AUTH.challenge(CLIENT.public_key), CLIENT)
    envelope = TransactionEnvelope.from_xdr(transaction, TESTNET)
    envelope.signatures.reverse()
    spaced = transaction[:100] + "\n" + transaction[100:]
    hashes = set()
    for text in (transaction, envelope.to_xdr(), spaced, transaction.rstrip("=") + "=="):
        answer = AUTH.verify(text, now())
        if isinstance(answer, Proof):
            hashes.add(answer.challenge_hash)
    assert len(hashes) == 1
    another = AUTH.verify(signed(AUTH.challenge(CLIENT.public_key), CLIENT), now())
    assert isinstance(another, Proof)
    assert another.challenge_hash not in hashes, "each challenge has a nonce of its own"


def test_a_fee_bump_is_no_challenge() -> None:
    inner = TransactionEnvelope.from_xdr(signed(AUTH.challenge(CLIENT.public_key), CLIENT), TESTNET)
    bump: FeeBumpTransactionEnvelope = TransactionBuilder.build_fee_bump_transaction(CLIENT, 200, inner, TESTNET)
    bump.sign(CLIENT)
    refused(bump.to_xdr())


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=200), st.binary(max_size=400).map(lambda raw: base64.b64encode(raw).decode())))
def test_no_bytes_of_a_stranger_are_more_than_refused(text: str) -> None:
    refused(text)


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
def test_a_challenge_with_any_byte_changed_or_cut_proves_nothing_else(at: int, change: int, cut: bool) -> None:
    """Bytes that say nothing, such as padding, may differ: then it is the same challenge, and as used as that."""
    good = base64.b64decode(signed(AUTH.challenge(CLIENT.public_key), CLIENT))
    at %= len(good)
    raw = good[:at] if cut else good[:at] + bytes([good[at] ^ change]) + good[at + 1 :]
    answer = AUTH.verify(base64.b64encode(raw).decode(), now())
    whole = AUTH.verify(base64.b64encode(good).decode(), now())
    assert isinstance(whole, Proof)
    assert isinstance(answer, ProofRefused) or answer == whole
    assert not (cut and isinstance(answer, Proof))


def test_the_seed_is_in_no_text_of_ours() -> None:
    assert SEED not in repr(AUTH)
    assert SEED not in str(AUTH)


# --- signed messages --------------------------------------------------------------------------------------------------

STANDARD_ADDRESS = "GBXFXNDLV4LSWA4VB7YIL5GBD7BVNR22SGBTDKMO2SBZZHDXSKZYCP7L"


@pytest.mark.parametrize(
    ("message", "signature"),
    [
        (
            "Hello, World!",
            "fO5dbYhXUhBMhe6kId/cuVq/AfEnHRHEvsP8vXh03M1uLpi5e46yO2Q8rEBzu3feXQewcQE5GArp88u6ePK6BA==",
        ),
        (
            "Hello, World!",
            "7cee5d6d885752104c85eea421dfdcb95abf01f1271d11c4bec3fcbd7874dccd"
            "6e2e98b97b8eb23b643cac4073bb77de5d07b0710139180ae9f3cbba78f2ba04",
        ),
        (
            "こんにちは、世界！",
            "CDU265Xs8y3OWbB/56H9jPgUss5G9A0qFuTqH2zs2YDgTm+++dIfmAEceFqB7bhfN3am59lCtDXrCtwH2k1GBA==",
        ),
    ],
)
def test_the_standards_own_examples_verify(message: str, signature: str) -> None:
    assert signed_message(STANDARD_ADDRESS, message, signature)
    assert not signed_message(STANDARD_ADDRESS, message + " ", signature)
    assert not signed_message(CLIENT.public_key, message, signature)


def test_a_signature_of_something_else_is_no_signature_of_the_message() -> None:
    message = "log in"
    good = CLIENT.sign_message(message)
    prefixed = b"Stellar Signed Message:\n" + message.encode()
    for raw in (CLIENT.sign(message.encode()), CLIENT.sign(prefixed), good[:-1], good + b"\0", b"", os.urandom(64)):
        assert not signed_message(CLIENT.public_key, message, base64.b64encode(raw).decode())
        assert not signed_message(CLIENT.public_key, message, raw.hex())
    text = base64.b64encode(good).decode()
    for odd in (text[:-2], text + "=", f" {text}", text.replace("=", ""), "é" * 88, "\ud800"):
        assert not signed_message(CLIENT.public_key, message, odd)
    assert not signed_message(CLIENT.public_key, "\ud800", text)


def test_the_key_of_nobody_signs_nothing() -> None:
    """The point of order one, for which a lax verifier takes a signature of zeroes over anything."""
    nobody = Keypair.from_raw_ed25519_public_key(bytes(32)).public_key
    one = Keypair.from_raw_ed25519_public_key(bytes([1]) + bytes(31)).public_key
    for address in (nobody, one):
        assert is_address(address)
        for raw in (bytes(64), bytes([1]) + bytes(63)):
            assert not signed_message(address, "log in", base64.b64encode(raw).decode())


_LOADED: Final = """
import sys, trio
from callora.config.loading import load_settings
from callora.logs import Logs
from callora.service import Context, Serving, SystemClock, serve

async def main():
    settings = load_settings(dict(each.split("=", 1) for each in sys.argv[1:]))
    clock, stop = SystemClock(), trio.Event()

    async def tell(serving: Serving) -> None:
        print(*sorted({"stellar_sdk", "httpx", "requests", "quart", "nacl"} & set(sys.modules)))
        stop.set()

    with Logs(clock, level="critical", as_json=True) as logs:
        await serve(Context.make(settings, logs, clock), settings.database_url.get_secret_value(), stop, on_ready=tell)

trio.run(main)
"""


@pytest.mark.parametrize(
    ("environ", "loaded"),
    [
        pytest.param({}, "nacl quart", id="neither chain nor challenges"),
        pytest.param({"AUTH_SIGNING_SEED": SEED}, "nacl quart requests stellar_sdk", id="challenges"),
    ],
)
def test_a_service_loads_the_sdk_before_it_serves_and_only_where_it_is_configured(
    environ: dict[str, str], loaded: str
) -> None:
    """It takes 20 MiB, which most have no use for, and half a second, which no request may wait for."""
    given = {"HOST": "127.0.0.1", "PORT": "0", "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none", **environ}
    argv = [sys.executable, "-c", _LOADED, *(f"{name}={text}" for name, text in given.items())]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (run.stdout.strip(), run.returncode) == (loaded, 0), run.stderr


# --- how keys are written ---------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_seeds_and_addresses_are_told_as_the_sdk_writes_them(raw: bytes) -> None:
    keypair = Keypair.from_raw_ed25519_seed(raw)
    assert make_seed(raw) == keypair.secret
    assert (is_seed(keypair.secret), is_address(keypair.secret)) == (True, False)
    assert (is_seed(keypair.public_key), is_address(keypair.public_key)) == (False, True)


@given(st.integers(1, 55), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_a_mistyped_address_is_none(at: int, letter: str) -> None:
    address = CLIENT.public_key
    typed = address[:at] + letter + address[at + 1 :]
    assert is_address(typed) == (typed == address)
