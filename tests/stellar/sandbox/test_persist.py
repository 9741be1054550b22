"""The sandbox's file: what was closed is there after any end of the process."""

import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from stellar_sdk import Asset, ManageData

from callora.stellar.sandbox.genesis import keypair_of
from callora.stellar.sandbox.ledger import PASSPHRASE, NetworkRules
from callora.stellar.sandbox.persist import FILE, SandboxUnreadable, open_sandbox_file
from callora.stellar.sandbox.state import account_key
from tests.support.sandbox import Person, Town, make_town


def whole(town: Town) -> object:
    """Return everything that outlives a process."""
    ledger = town.sandbox.ledger
    entries = {key: ledger.state.get(key) for key in ledger.state.keys(b"")}
    headers = [ledger.header_of(sequence) for sequence in range(1, ledger.header.sequence + 1)]
    return entries, headers, list(ledger.included(1, ledger.header.sequence))


def test_a_second_process_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        town = make_town(keeper=file)
        alice, bob = town.someone("alice"), town.someone("bob")
        alice.trust(town.usdc)
        town.applied(alice.transaction([ManageData("note", b"1")]))
        town.applied(alice.transaction([ManageData("note", None)]))
        town.submit(alice.pay(bob, "5"))
        before = whole(town)
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        again = make_town(keeper=file)
        assert whole(again) == before
        assert again.sandbox.ledger.waiting == (), "what waited is gone, as on a network that starts anew"
        again.applied(Person(again, alice.keypair).pay(Person(again, bob.keypair), "5", Asset.native()))


def test_history_is_trimmed_in_the_file_too(tmp_path: Path) -> None:
    rules = NetworkRules(retention=4)
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        town = make_town(keeper=file, rules=rules)
        town.someone("alice")
        for _ in range(6):
            town.sandbox.ledger.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM ledgers").fetchone() == (4,)
        assert connection.execute("SELECT count(*) FROM transactions").fetchone() == (0,)
    connection.close()


def test_a_reset_is_kept(tmp_path: Path) -> None:
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        town = make_town(keeper=file)
        alice = town.someone("alice")
        town.sandbox.ledger.reset()
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        again = make_town(keeper=file)
        assert again.sandbox.ledger.state.get(account_key(alice.address)) is None


def test_an_interrupted_beginning_begins_again(tmp_path: Path) -> None:
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        whole_town = make_town(keeper=file)
        expected = whole_town.sandbox.ledger.header
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("DELETE FROM ledgers WHERE sequence > 3")
        connection.execute("DELETE FROM transactions WHERE ledger > 3")
    connection.close()
    with open_sandbox_file(tmp_path, PASSPHRASE) as file:
        assert make_town(keeper=file).sandbox.ledger.header == expected


def test_one_process_at_a_time_and_one_network_a_file(tmp_path: Path) -> None:
    with open_sandbox_file(tmp_path, PASSPHRASE), pytest.raises(SandboxUnreadable, match="in use"):
        with open_sandbox_file(tmp_path, PASSPHRASE):
            pass
    with pytest.raises(SandboxUnreadable, match="another version or network"):
        with open_sandbox_file(tmp_path, "Another Network"):
            pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"something else entirely " * 100)
    with pytest.raises(SandboxUnreadable, match="no sandbox"):
        with open_sandbox_file(tmp_path / "other", PASSPHRASE):
            pass


PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from stellar_sdk import ManageData
    from callora.stellar.sandbox.ledger import PASSPHRASE
    from callora.stellar.sandbox.persist import open_sandbox_file
    from callora.stellar.sandbox.genesis import keypair_of
    from tests.support.sandbox import Person, make_town
    with open_sandbox_file(Path(sys.argv[1]), PASSPHRASE) as file:
        town = make_town(keeper=file)
        person = Person(town, keypair_of("vault owner"))
        while True:
            town.applied(person.transaction([ManageData("note", str(person.sequence).encode())]))
            header = town.sandbox.ledger.header
            print(header.sequence, header.hash().hex(), person.sequence, flush=True)
    """
)


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.proof)])
def test_a_kill_loses_no_ledger_that_was_closed_and_leaves_no_half_of_one(tmp_path: Path, rounds: int) -> None:
    for number in range(rounds):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(5 + 3 * number)]
        process.kill()
        told += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        closed, tx_hash, used = [line for line in told if line.endswith("\n")][-1].split()
        with open_sandbox_file(tmp_path, PASSPHRASE) as file:
            town = make_town(keeper=file)
            ledger, owner = town.sandbox.ledger, Person(town, keypair_of("vault owner"))
            header = ledger.header_of(int(closed))
            assert header is not None
            assert header.hash().hex() == tx_hash, "what was told is there"
            more = ledger.header.sequence - int(closed)
            assert more in (0, 1), "and at most the one that was not told any more"
            assert owner.sequence == int(used) + more
            assert len(list(ledger.included(ledger.header.sequence, ledger.header.sequence))) == 1
