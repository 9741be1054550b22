"""Where a sandbox outlives its process: one SQLite file, written whole ledgers at a time.

A ledger is one database transaction, durable when `keep` returns as far as the process is concerned: after a kill the
file has every ledger that was closed, and never half of one. What waits in the queue is not kept; a network of which
all nodes start anew has lost that as well.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
from stellar_sdk import xdr

from callora.ledger.faults import CalloraFault
from callora.stellar.sandbox.ledger import ClosedLedger, Kept
from callora.stellar.sandbox.state import Entry, Event, Header, Included

FILE: Final = "sandbox.sqlite3"
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE network (version INTEGER NOT NULL, passphrase TEXT NOT NULL);
CREATE TABLE entries (key BLOB PRIMARY KEY, data BLOB NOT NULL, last_modified INTEGER NOT NULL, live_until INTEGER)
    WITHOUT ROWID;
CREATE TABLE ledgers (sequence INTEGER PRIMARY KEY, header TEXT NOT NULL);
CREATE TABLE transactions (ledger INTEGER NOT NULL, place INTEGER NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (ledger, place)) WITHOUT ROWID;
"""


class SandboxUnreadable(CalloraFault):
    """The file is of another version or another network, or no such file: nothing was changed."""


class SandboxFile:
    """The file of one sandbox, open."""

    def __init__(self, connection: sqlite3.Connection, passphrase: str) -> None:
        """Make one; see `open_sandbox_file`."""
        self._connection = connection
        self._passphrase = passphrase

    def load(self) -> Kept | None:
        """Return what is kept; None for nothing."""
        read = self._connection.execute
        headers = [_header_of(text) for (text,) in read("SELECT header FROM ledgers ORDER BY sequence")]
        if not headers:
            return None
        entries = [
            (bytes(key), Entry(xdr.LedgerEntryData.from_xdr_bytes(data), last_modified, live_until))
            for key, data, last_modified, live_until in read("SELECT key, data, last_modified, live_until FROM entries")
        ]
        rows = read("SELECT document FROM transactions ORDER BY ledger, place")
        return Kept(headers[-1], entries, headers, [_included_of(text) for (text,) in rows])

    def keep(self, closed: ClosedLedger) -> None:
        """Keep a ledger, whole or not at all."""
        gone = [(key,) for key, entry in closed.changes.items() if entry is None]
        there = [
            (key, entry.data.to_xdr_bytes(), entry.last_modified, entry.live_until)
            for key, entry in closed.changes.items()
            if entry is not None
        ]
        told = [(each.ledger, each.order, json.dumps(attrs.asdict(each))) for each in closed.included]
        with self._connection as connection:
            connection.executemany("DELETE FROM entries WHERE key = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", there)
            connection.execute("INSERT INTO ledgers VALUES (?, ?)", (closed.header.sequence, _text_of(closed.header)))
            connection.executemany("INSERT INTO transactions VALUES (?, ?, ?)", told)
            connection.execute("DELETE FROM ledgers WHERE sequence < ?", (closed.oldest,))
            connection.execute("DELETE FROM transactions WHERE ledger < ?", (closed.oldest,))

    def forget(self) -> None:
        """Forget everything."""
        with self._connection as connection:
            for table in ("entries", "ledgers", "transactions"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - names from here


@contextmanager
def open_sandbox_file(directory: Path, passphrase: str) -> Iterator[SandboxFile]:
    """Open a directory's sandbox, made where there is none.

    Args:
        directory: made where it is missing. One process at a time may have it open.

    Raises:
        SandboxUnreadable: what is there is none of this version and network, or another process has it open.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    connection = sqlite3.connect(path, timeout=0, isolation_level="DEFERRED")
    try:
        _prepare(connection, path, passphrase)
        yield SandboxFile(connection, passphrase)
    finally:
        connection.close()


def _prepare(connection: sqlite3.Connection, path: Path, passphrase: str) -> None:
    try:
        # One owner, for as long as the file is open; written pages reach the system at every commit.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute("SELECT name FROM sqlite_master WHERE name = 'network'").fetchone()
            if known is None:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute("INSERT INTO network VALUES (?, ?)", (_VERSION, passphrase))
            found = connection.execute("SELECT version, passphrase FROM network").fetchone()
    except sqlite3.OperationalError as error:
        raise SandboxUnreadable(f"{path} is in use by another process, or cannot be written: {error}") from error
    except sqlite3.DatabaseError as error:
        raise SandboxUnreadable(f"{path} is no sandbox: {error}; move it away to begin a new one") from error
    if found != (_VERSION, passphrase):
        raise SandboxUnreadable(f"{path} is the sandbox of another version or network; move it away to begin a new one")


def _text_of(header: Header) -> str:
    told = attrs.asdict(header)
    return json.dumps({name: value.hex() if isinstance(value, bytes) else value for name, value in told.items()})


def _header_of(text: str) -> Header:
    told: dict[str, Any] = json.loads(text)
    for name in ("previous_hash", "result_hash"):
        told[name] = bytes.fromhex(told[name])
    return Header(**told)


def _included_of(text: str) -> Included:
    told: dict[str, Any] = json.loads(text)
    told["events"] = tuple(tuple(_event_of(event) for event in events) for events in told["events"])
    for name in ("accounts", "transaction_events", "diagnostics"):
        told[name] = tuple(told[name])
    return Included(**told)


def _event_of(told: dict[str, Any]) -> Event:
    return Event(**{**told, "topics": tuple(told["topics"])})
