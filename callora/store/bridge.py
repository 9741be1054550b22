"""PostgreSQL for Trio: the one module that knows the driver and the asyncio loop it runs on.

Three doors. `Database` is the pool, for reads and for writes that nobody waits for in bulk. `Connection` is one of its
connections, inside `acquire()` or `transaction()`. `Line` is a connection of its own for the ledger writer's rounds.

What holds here and nowhere else:

- Every exit (BEGIN, COMMIT, ROLLBACK, giving a connection back, closing) is shielded from cancellation and has a
  deadline. Without the shield the driver's exit never runs under a cancelled scope, and the connection is never given
  back.
- The driver's errors become Callora's faults, once, with `from`. Which one depends on what was sent: `StoreUnavailable`
  promises that nothing was written, `OutcomeUnknown` that nobody knows.
- An error report of the asyncio loop is logged. By default it would be raised out of the loop and end the service.
"""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, Final, TypeAlias, TypeVar, cast

import asyncpg
import trio
import trio_asyncio

from callora.ledger.faults import OutcomeUnknown, StoreConflict, StoreRefused, StoreUnavailable

Row: TypeAlias = Mapping[str, Any]
"""A row by column name. It is the driver's record: iterating it gives values, so write `row.keys()` or `dict(row)`."""

T = TypeVar("T")
Fault: TypeAlias = type[StoreUnavailable] | type[OutcomeUnknown]

_log = logging.getLogger(__name__)

EXIT_SECONDS: Final = 5.0
"""How long a shielded exit (ROLLBACK, giving back, closing) may take before the connection is cut."""

IDLE_IN_TRANSACTION_SECONDS_MAX: Final = 30
"""The server ends a session of ours that says nothing for so long inside a transaction: of a process that stands still.

Until then it keeps its row locks, and the old versions of every busy vault's row, which each round looks through.
"""

_RECEIVE_BYTES: Final = 64 * 1024


class StatementRejected(Exception):
    """PostgreSQL could not make sense of the statement or its arguments: a bug of ours. Nothing was written."""

    sqlstate: str
    """Five characters, such as 42601 for a syntax error."""
    position: int | None
    """Where in the SQL text, counted in characters from 1, where PostgreSQL tells it."""

    def __init__(self, message: str, *, sqlstate: str, position: int | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.position = position

    @property
    def of_older_schema(self) -> bool:
        """Whether a table or a column was missing: ours is there once migrations are applied."""
        return self.sqlstate in {"42P01", "42703"}


# --- from the driver's errors to faults -------------------------------------------------------------------------------

_CONNECTION_STATES = frozenset({"57P01", "57P02", "57P04", "57P05", "25P03", "25P04", "40003"})
"""The server ended the session, or says itself that it does not know. What was under way may have been committed."""

_REFUSED_AT_THE_DOOR = frozenset({"57P03", "53300"})
"""Starting up, shutting down, too many connections: the session never began."""

_STANDARD_CLASSES = re.compile("0[01238-9ABFLPZ]|10|2[0-8BDF]|3[489BDF]|4[024]|5[34578]|72|F0|HV|P0|XX")
"""PostgreSQL's own SQLSTATE classes. A code of any other class comes from a trigger of ours."""


def _translated(error: Exception, lost: Fault, *, connected: bool) -> Exception:
    """Return what to raise instead of the driver's error.

    Args:
        error: what the driver raised.
        lost: the fault that is true if the connection was lost here: `OutcomeUnknown` once something that may commit
            was sent, else `StoreUnavailable`.
        connected: whether the connection is still open. The driver has one class for a lost connection and for its own
            misuse; misuse leaves the connection open, and stays what it is, a bug.
    """
    if isinstance(error, asyncpg.PostgresError):
        return _translated_answer(error, lost)
    if isinstance(error, asyncpg.InterfaceError) and (connected or isinstance(error, ValueError)):
        return error
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError):  # TimeoutError is an OSError
        return lost(f"{type(error).__name__}: {error}")
    return error


def _not_connected(error: Exception) -> Exception:
    """Return the fault of a connection that could not be made or had: whatever the server said, nothing was sent."""
    if isinstance(error, asyncpg.PostgresError):
        return StoreUnavailable(f"{getattr(error, 'sqlstate', None)}: {error}")
    return _translated(error, StoreUnavailable, connected=False)


def _translated_answer(error: asyncpg.PostgresError, lost: Fault) -> Exception:
    """Return the fault for an error that carries an SQLSTATE. An answered statement has been rolled back."""
    state = str(getattr(error, "sqlstate", None) or "XX000")
    kind = state[:2]
    text = f"{state}: {error}"
    if state in _REFUSED_AT_THE_DOOR:
        return StoreUnavailable(text)
    if state in _CONNECTION_STATES or kind == "08":
        return lost(text)
    if kind in ("23", "44") or state in ("40002", "P0001") or not _STANDARD_CLASSES.fullmatch(kind):
        name = getattr(error, "constraint_name", None)
        return StoreRefused(text, constraint=name, sqlstate=state)
    if kind == "40" or state == "55P03" or isinstance(error, asyncpg.InvalidCachedStatementError):
        return StoreConflict(text)
    if kind in ("53", "58") or state in ("57014", "25006"):  # out of resources, cancelled by a time-out, read-only
        return StoreUnavailable(text)
    position = getattr(error, "position", None)
    return StatementRejected(text, sqlstate=state, position=int(position) if position else None)


def _is_open(raw: Any) -> bool:
    """Tell whether a connection still stands. One that the driver cut has left the pool, and then refuses to say so."""
    try:
        return not raw.is_closed()
    except asyncpg.InterfaceError:
        return False


_READ_FIRST = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:select|with|values|show|table)\b", re.IGNORECASE | re.DOTALL)
_WRITES = re.compile(r"\b(?:insert|update|delete|merge|into|nextval|setval)\b", re.IGNORECASE)


@lru_cache(maxsize=1024)
def _lost_by(sql: str) -> Fault:
    """Return the fault of losing the connection under this statement outside a transaction; in doubt, it wrote."""
    return StoreUnavailable if _READ_FIRST.match(sql) and not _WRITES.search(sql) else OutcomeUnknown


# --- the pool ---------------------------------------------------------------------------------------------------------


class Connection:
    """One connection of the pool, for as long as the block that gave it.

    Inside `transaction()` nothing is written before COMMIT, so every lost connection is `StoreUnavailable`. Inside
    `acquire()` each statement commits by itself.
    """

    def __init__(self, loop: Any, raw: Any) -> None:
        self._loop = loop
        self._raw = raw
        self._in_transaction = False

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        """Return all rows of one statement.

        Raises:
            StoreUnavailable: the connection was lost or the command took too long; nothing was written.
            OutcomeUnknown: the same, outside a transaction, under a statement that writes.
            StoreRefused, StoreConflict, StatementRejected: the server refused; nothing was written.

        Cancellation: the server is told to stop. Outside a transaction a write may have been committed before that.
        """
        return cast("list[Row]", await self._call(self._raw.fetch, sql, args))

    async def fetch_row(self, sql: str, *args: object) -> Row | None:
        """Return the first row, or None. Raises and cancellation: as `fetch`."""
        return cast("Row | None", await self._call(self._raw.fetchrow, sql, args))

    async def fetch_value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row, or None. Raises and cancellation: as `fetch`."""
        return await self._call(self._raw.fetchval, sql, args)

    async def execute(self, sql: str, *args: object, deadline_seconds: float | None = None) -> str:
        """Run one statement, or several when there are no args; return the last command's tag, such as `UPDATE 3`.

        Args:
            sql: the text; with args a single statement with `$1`….
            deadline_seconds: instead of the pool's command time-out, for what may take long, such as a migration.

        Raises and cancellation: as `fetch`, outside a transaction always as a statement that writes.
        """
        execute = partial(self._raw.execute, timeout=deadline_seconds)
        return cast("str", await self._call(execute, sql, args, OutcomeUnknown))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Connection"]:
        """Run the block in one database transaction on this connection. Else as `Database.transaction`."""
        assert not self._in_transaction, "a connection has one transaction at a time"
        with trio.CancelScope(shield=True):
            await self._control("BEGIN", StoreUnavailable)
        self._in_transaction = True
        try:
            yield self
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._roll_back()
            raise
        finally:
            self._in_transaction = False
        with trio.CancelScope(shield=True):
            # A statement that failed inside the block, and was caught there, turns COMMIT into a silent ROLLBACK.
            if await self._control("COMMIT", OutcomeUnknown) != "COMMIT":
                raise StoreConflict("COMMIT was answered with a rollback: a statement had failed before it")

    async def _call(
        self, verb: Callable[..., Awaitable[Any]], sql: str, args: tuple[object, ...], lost: Fault | None = None
    ) -> Any:
        if self._in_transaction:
            lost = StoreUnavailable
        try:
            return await self._loop.run_aio_coroutine(verb(sql, *args))
        except Exception as error:
            raise _translated(error, lost or _lost_by(sql), connected=_is_open(self._raw)) from error

    async def _control(self, sql: str, lost: Fault) -> str:
        """Run BEGIN or COMMIT and return its tag; a connection that does not answer it is cut."""
        try:
            return cast("str", await self._loop.run_aio_coroutine(self._raw.execute(sql)))
        except Exception as error:
            connected = _is_open(self._raw)
            if connected and not isinstance(error, asyncpg.PostgresError):
                self._raw.terminate()
            raise _translated(error, lost, connected=connected) from error

    async def _roll_back(self) -> None:
        """End a failed transaction. If that fails too the connection is cut, which rolls back as well."""
        if not _is_open(self._raw):
            return  # asking would raise, and hide the error that brought us here
        try:
            await self._loop.run_aio_coroutine(self._raw.execute("ROLLBACK", timeout=EXIT_SECONDS))
        except Exception as error:
            _log.warning("rolling back failed, the connection was cut: %s", error)
            self._raw.terminate()


class Database:
    """The pool of connections to one database, made by `open_database`.

    Its four verbs run one statement each, committed by itself, on any free connection.
    """

    def __init__(self, loop: Any, pool: Any, dsn: str, *, connect_seconds: float, command_seconds: float) -> None:
        self._loop = loop
        self._pool = pool
        self._dsn = dsn
        self._connect_seconds = connect_seconds
        self._command_seconds = command_seconds

    async def check(self) -> None:
        """Ask the database for a sign of life.

        Raises:
            StoreUnavailable: none came within the connect and command time-outs.
        """
        await self.fetch_value("SELECT 1")

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        """Return all rows of one statement.

        Raises:
            StoreUnavailable: no connection could be had, or it was lost or slow under a statement that only reads;
                nothing was written.
            OutcomeUnknown: the connection was lost, or the command time-out passed, under a statement that writes.
            StoreRefused, StoreConflict, StatementRejected: the server refused; nothing was written.

        Cancellation: the server is told to stop; a write may have been committed before that. No connection leaks.
        """
        return cast("list[Row]", await self._call("fetch", sql, args))

    async def fetch_row(self, sql: str, *args: object) -> Row | None:
        """Return the first row, or None. Raises and cancellation: as `fetch`."""
        return cast("Row | None", await self._call("fetchrow", sql, args))

    async def fetch_value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row, or None. Raises and cancellation: as `fetch`."""
        return await self._call("fetchval", sql, args)

    async def execute(self, sql: str, *args: object) -> str:
        """Run one statement, or several when there are no args; return the last command's tag, such as `UPDATE 3`.

        Raises and cancellation: as `fetch`, always as a statement that writes.
        """
        return cast("str", await self._call("execute", sql, args, OutcomeUnknown))

    async def _call(self, verb: str, sql: str, args: tuple[object, ...], lost: Fault | None = None) -> Any:
        lost_after_sending = lost or _lost_by(sql)

        async def on_asyncio() -> Any:
            # One coroutine for taking, using and giving back: the driver's own exits run inside one asyncio task, so a
            # cancellation reaches them as they expect it, and the border is crossed once.
            async with _Lent(self) as raw:
                try:
                    return await getattr(raw, verb)(sql, *args)
                except Exception as error:
                    raise _translated(error, lost_after_sending, connected=_is_open(raw)) from error

        return await self._loop.run_aio_coroutine(on_asyncio())

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """Lend one connection for several statements, each committed by itself. Its session state is reset after.

        Raises:
            StoreUnavailable: no connection could be had; nothing was sent.

        Cancellation: waiting for a connection can be cancelled; giving it back cannot, for at most `EXIT_SECONDS`.
        """
        raw = await self._loop.run_aio_coroutine(self._take())
        try:
            yield Connection(self._loop, raw)
        finally:
            with trio.CancelScope(shield=True):
                await self._loop.run_aio_coroutine(self._give_back(raw, reset=True))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Run the block in one database transaction: committed at its end, rolled back if it raises.

        Raises:
            StoreUnavailable: the connection could not be had or was lost before COMMIT was sent; nothing was written.
            OutcomeUnknown: COMMIT was sent and no answer came.
            StoreConflict: the transaction had failed and COMMIT was answered with a rollback; nothing was written.
            StoreRefused: a deferred constraint refused at COMMIT; nothing was written.

        Cancellation: inside the block it rolls back. BEGIN, COMMIT, ROLLBACK and giving back are shielded, each with a
        deadline, so a cancelled caller never leaves a COMMIT without an answer.
        """
        raw = await self._loop.run_aio_coroutine(self._take())
        try:
            async with Connection(self._loop, raw).transaction() as connection:
                yield connection
        finally:
            with trio.CancelScope(shield=True):
                await self._loop.run_aio_coroutine(self._give_back(raw))

    @asynccontextmanager
    async def line(self, settings: Mapping[str, str]) -> AsyncIterator["Line"]:
        """Give a `Line`: one dedicated connection outside the pool, made at first use and closed with the block.

        Args:
            settings: PostgreSQL settings of its session, such as `{"plan_cache_mode": "force_generic_plan"}`.

        Cancellation: closing is shielded, for at most `EXIT_SECONDS`.
        """
        line = Line(self._loop, self._dsn, settings, connect_seconds=self._connect_seconds)
        try:
            yield line
        finally:
            with trio.CancelScope(shield=True):
                await line.close()

    async def _take(self) -> Any:
        """Take a connection from the pool. On asyncio's side."""
        try:
            return await self._pool.acquire(timeout=self._connect_seconds + self._command_seconds)
        except Exception as error:
            raise _not_connected(error) from error

    async def _give_back(self, raw: Any, *, reset: bool = False) -> None:
        """Give a connection back, or cut it. On asyncio's side.

        Never raises: the outcome of what ran before is already decided. The pool shields it from cancellation.
        """
        try:
            if reset and _is_open(raw):
                await raw.execute(_RESET_SESSION, timeout=EXIT_SECONDS)
            await self._pool.release(raw, timeout=EXIT_SECONDS)
        except Exception as error:
            _log.warning("giving a connection back failed, it was cut: %s", error)


class _Lent:
    """A connection of the pool, on asyncio's side, for one `async with`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._raw: Any = None

    async def __aenter__(self) -> Any:
        self._raw = await self._database._take()
        return self._raw

    def __aexit__(self, *_: object) -> Coroutine[Any, Any, None]:
        return self._database._give_back(self._raw)


class _PoolConnection(asyncpg.Connection):
    """A connection that is not reset at every release, which would double the round trips of a read.

    A single statement and a database transaction leave no session state behind; `acquire()` resets for itself.
    """

    def get_reset_query(self) -> str:
        return ""


_RESET_SESSION: Final = "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL"


@asynccontextmanager
async def open_database(
    dsn: str,
    *,
    pool_max: int = 10,
    idle_seconds: float = 30,
    connect_seconds: float = 2,
    command_seconds: float = 10,
    beside_calls: bool = False,
) -> AsyncIterator[Database]:
    """Open the pool, and the asyncio loop under it; close both at the end of the block.

    No connection is made before the first use, so that the service starts, and says what is wrong, while the database
    is down. `Database.check()` asks.

    Args:
        dsn: `postgresql://user:password@host:port/name`, or `postgresql://user@/name?host=/directory` for a socket.
        pool_max: connections, > 0. `Line`s come on top.
        idle_seconds: a connection unused for so long is closed; 0 keeps it.
        connect_seconds: for one connection to be made.
        command_seconds: for one statement, COMMIT among them.
        beside_calls: no statement of the pool is spread over several of the server's processes: it would be done
            sooner, and the rounds of paid calls later, which share the machine with it.

    Cancellation: closing is shielded; after `EXIT_SECONDS` what is still lent is cut.
    """
    failure: Exception | None = None
    settings = _session_settings("callora")
    if beside_calls:
        settings["max_parallel_workers_per_gather"] = "0"
    async with trio_asyncio.open_loop() as loop:
        loop.set_exception_handler(_log_loop_error)

        async def open_pool() -> Any:
            return await asyncpg.create_pool(
                dsn,
                loop=loop,
                min_size=0,
                max_size=pool_max,
                max_inactive_connection_lifetime=idle_seconds,
                timeout=connect_seconds,
                command_timeout=command_seconds,
                connection_class=_PoolConnection,
                server_settings=settings,
            )

        pool = await loop.run_aio_coroutine(open_pool())
        try:
            yield Database(loop, pool, dsn, connect_seconds=connect_seconds, command_seconds=command_seconds)
        except Exception as error:
            failure = error  # raised outside, where the loop's nurseries do not wrap it in two exception groups
        finally:
            with trio.move_on_after(EXIT_SECONDS, shield=True) as closing:
                try:
                    await loop.run_aio_coroutine(pool.close())
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                    # A connection that had just been lost cannot say goodbye; the pool has cut all of them.
                    _log.debug("a connection was lost while the pool closed: %s", error)
            if closing.cancelled_caught:
                pool.terminate()
    if failure is not None:
        raise failure


def _session_settings(name: str) -> dict[str, str]:
    return {
        "application_name": name,
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS_MAX}s",
    }


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    _log.error("asyncio loop: %s", context.get("message", "no message"), exc_info=context.get("exception"))


# --- the line ---------------------------------------------------------------------------------------------------------


class _Waiter(asyncio.Future[Any]):
    """The future of one answer on a driven connection. Its only callback, the driver's own, is kept and run by us.

    An ordinary future sends its callbacks through the loop's queue, which wakes the loop's task: 40 µs for nothing.
    """

    _callback: Callable[[Any], object] | None = None

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Any = None) -> None:
        self._callback = fn

    def settle(self) -> None:
        if self._callback is not None:
            self._callback(self)


class _LineLoop:
    """The asyncio loop as the driver sees it on a line: it shows us the transport and makes `_Waiter`s while driven."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self.driven = False
        self.encrypted = False
        self.transport: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def create_future(self) -> asyncio.Future[Any]:
        return _Waiter(loop=self._loop) if self.driven else self._loop.create_future()

    async def create_unix_connection(self, *args: Any, **options: Any) -> Any:
        return self._seen(await self._loop.create_unix_connection(*args, **options), encrypted=False)

    async def create_connection(self, *args: Any, **options: Any) -> Any:
        made = await self._loop.create_connection(*args, **options)
        return self._seen(made, encrypted=bool(options.get("ssl")))

    async def start_tls(self, *args: Any, **options: Any) -> Any:
        self.encrypted = True
        return await self._loop.start_tls(*args, **options)

    def _seen(self, made: Any, *, encrypted: bool) -> Any:
        self.transport, self.encrypted = made[0], encrypted
        return made


class Line:
    """One dedicated connection for the ledger writer's rounds, one statement at a time.

    The driver runs on asyncio, but on a line its coroutines are stepped by the Trio task that asks, and that task also
    waits for the socket and feeds the driver what it reads. The asyncio loop only makes the connection. CPU time of one
    trivial prepared statement, client side, on the machine the benchmark's figures come from, 4 000 round trips:

    - `aio_as_trio(statement.fetch)`: 205 µs, with `timeout=` 215 µs
    - a long-lived asyncio task fed by a queue: 177 µs
    - stepped by the Trio task, answers still through the loop: 155 µs
    - this: 65 µs, deadline and liveness check included; plain asyncio without Trio: 54 µs

    An encrypted connection cannot be read beside its transport, so there the first way is taken.
    """

    def __init__(self, loop: Any, dsn: str, settings: Mapping[str, str], *, connect_seconds: float) -> None:
        self._loop = loop
        self._dsn = dsn
        self._settings = {**_session_settings("callora-line"), **settings}
        self._connect_seconds = connect_seconds
        self._line_loop = _LineLoop(loop)
        self._raw: Any = None
        self._statements: dict[str, Any] = {}
        self._socket: socket.socket | None = None  # our duplicate of the driver's; None if the loop does the reading
        self._feed: Callable[[bytes], None] | None = None
        self._busy = False
        self._in_transaction = False

    async def run(self, sql: str, *args: object, deadline_seconds: float) -> list[Row]:
        """Run one statement and return its rows. Outside `transaction()` it is committed when this returns.

        The connection is made, or made again, when there is none. Each distinct SQL text is prepared once on it.

        Args:
            sql: one statement, with `$1`… for the args.
            deadline_seconds: from sending to the last row, > 0. Connecting and preparing come before, with the
                connect time-out each.

        Raises:
            StoreUnavailable: no connection, or the statement could not be prepared in time; nothing was sent. Inside
                `transaction()` also: the connection was lost, and with it the transaction; nothing was written.
            OutcomeUnknown: it was sent, and no answer came before the connection was lost or the deadline passed. The
                connection is cut; the server may still finish the statement.
            StoreRefused, StoreConflict: the server refused and rolled the statement back; nothing was written.
            StatementRejected: the statement is wrong; nothing was written.

        Cancellation: before sending, nothing was done. Once sent, the statement is shielded until its answer or its
        deadline, so that a cancelled caller never leaves a commit whose outcome nobody saw.
        """
        with self._alone():
            if self._in_transaction:
                return await self._run(sql, args, deadline_seconds, StoreUnavailable)
            if self._raw is None or not self._alive():
                await self._connect()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            return await self._run(sql, args, deadline_seconds, OutcomeUnknown)

    @asynccontextmanager
    async def transaction(self, *, deadline_seconds: float) -> AsyncIterator["Line"]:
        """Run the block's `run`s in one database transaction: committed at its end, rolled back if it raises.

        Args:
            deadline_seconds: for BEGIN, for COMMIT and for ROLLBACK, each.

        Raises:
            StoreUnavailable: no connection, or it was lost before COMMIT was sent; nothing was written.
            OutcomeUnknown: COMMIT was sent and no answer came.
            StoreConflict: COMMIT was answered with a rollback; nothing was written.
            StoreRefused: a deferred constraint refused at COMMIT; nothing was written.

        Cancellation: between statements it rolls back; each statement, BEGIN, COMMIT and ROLLBACK is shielded.
        """
        assert not self._in_transaction, "a line has one transaction at a time"
        with self._alone():
            if self._raw is None or not self._alive():
                await self._connect()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            await self._exchange(self._raw.execute("BEGIN"), deadline_seconds, StoreUnavailable)
        self._in_transaction = True
        try:
            yield self
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._roll_back(deadline_seconds)
            raise
        else:
            if self._raw is None:
                raise StoreUnavailable("the connection was lost before COMMIT was sent")
            with self._alone():
                tag = await self._exchange(self._raw.execute("COMMIT"), deadline_seconds, OutcomeUnknown)
            if tag != "COMMIT":
                raise StoreConflict("COMMIT was answered with a rollback: a statement had failed before it")
        finally:
            self._in_transaction = False

    async def close(self) -> None:
        """Close the connection; the next `run` would make a new one. Takes at most `EXIT_SECONDS`."""
        raw, transport = self._raw, self._line_loop.transport
        if raw is None:
            return
        reading = self._socket is not None
        self._forget()
        if raw.is_closed():
            raw.terminate()
            return
        if reading:
            transport.resume_reading()  # closing ends when the loop sees the server hang up
        try:
            await self._loop.run_aio_coroutine(raw.close(timeout=EXIT_SECONDS))
        except Exception as error:
            _log.warning("closing a line failed, it was cut: %s", error)

    def _alone(self) -> "_Alone":
        return _Alone(self)

    async def _run(self, sql: str, args: tuple[object, ...], deadline_seconds: float, lost: Fault) -> list[Row]:
        if self._raw is None:
            raise StoreUnavailable("the connection was lost, and the transaction with it")
        statement: Any = self._statements.get(sql)
        if statement is None:
            # Shielded, since the driver must not be left in the middle of an exchange.
            statement = await self._exchange(self._raw.prepare(sql), self._connect_seconds, StoreUnavailable)
            self._statements[sql] = statement
        return cast("list[Row]", await self._exchange(statement.fetch(*args), deadline_seconds, lost))

    async def _roll_back(self, deadline_seconds: float) -> None:
        """End a failed transaction; a connection that cannot is cut, which rolls back as well."""
        if self._raw is None:
            return
        try:
            with self._alone():
                await self._exchange(self._raw.execute("ROLLBACK"), deadline_seconds, StoreUnavailable)
        except Exception as error:
            _log.warning("rolling back failed, the line was cut: %s", error)
            self._drop()

    async def _connect(self) -> None:
        """Make the connection and take its reading over from the loop.

        Raises:
            StoreUnavailable: it could not be made; nothing was sent.

        Cancellation: nothing was done.
        """
        self._drop()
        line_loop = self._line_loop

        async def on_asyncio() -> Any:
            return await asyncpg.connect(
                self._dsn,
                loop=cast("asyncio.AbstractEventLoop", line_loop),
                timeout=self._connect_seconds,
                server_settings=self._settings,
            )

        try:
            self._raw = raw = await self._loop.run_aio_coroutine(on_asyncio())
        except Exception as error:
            raise _not_connected(error) from error
        if line_loop.encrypted:
            return
        transport = line_loop.transport
        protocol = transport.get_protocol()
        # With several hosts in the DSN the driver may have settled on an earlier connection than the last one seen.
        if not isinstance(protocol, asyncio.Protocol) or transport.is_closing():
            return
        if cast("Any", protocol).get_server_pid() != raw.get_server_pid():
            return
        transport.pause_reading()
        # A duplicate, so that the driver closing its own can never make us wait on a stranger's descriptor.
        self._socket = transport.get_extra_info("socket").dup()
        self._feed = protocol.data_received

    def _alive(self) -> bool:
        """Tell whether the connection still stands, and drop it if not.

        Nobody reads between statements, so what came meanwhile is taken in first: a notice, or the server's good-bye.
        Without this a statement would be sent into a dead connection, and its outcome be unknown for no reason.
        """
        if self._socket is not None and self._feed is not None:
            try:
                while data := self._socket.recv(_RECEIVE_BYTES):
                    self._feed(data)
            except BlockingIOError:
                if not self._raw.is_closed():
                    return True
            except Exception as error:
                _log.info("a line was lost while idle: %s", error)
        elif not self._raw.is_closed():
            return True
        self._drop()
        return False

    async def _exchange(self, coroutine: Coroutine[Any, Any, T], deadline_seconds: float, lost: Fault) -> T:
        """Run one of the driver's coroutines to its end, shielded; cut the line if the deadline passes before."""
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + deadline_seconds):
                if self._socket is None:
                    return cast("T", await self._loop.run_aio_coroutine(coroutine))
                return await self._drive(coroutine, self._socket)
        except Exception as error:
            connected = self._raw is not None and _is_open(self._raw)
            fault = _translated(error, lost, connected=connected)
            refused = isinstance(fault, StoreRefused | StatementRejected | StoreConflict)
            if not connected or not refused or isinstance(error, asyncpg.InvalidCachedStatementError):
                # Unanswered, or this server is no longer the one that writes, or the prepared statements are stale.
                self._drop()
            raise fault from error
        except BaseException:
            self._drop()
            raise
        self._drop()
        raise lost(f"no answer within {deadline_seconds} s; the connection was cut")

    async def _drive(self, coroutine: Coroutine[Any, Any, T], connection: socket.socket) -> T:
        """Step the driver's coroutine, reading its answers from the socket ourselves.

        All that these coroutines ever wait for is an answer of their own connection, as a future made by `_LineLoop`.
        """
        assert self._feed is not None
        waiter: _Waiter | None = None
        self._line_loop.driven = True
        try:
            while True:
                waiter = coroutine.send(None)
                assert isinstance(waiter, _Waiter), "the driver waited for something that is no answer"
                waiter._asyncio_future_blocking = False  # what an asyncio task does with a future it takes over
                while not waiter.done():
                    await trio.lowlevel.wait_readable(connection)
                    try:
                        data = connection.recv(_RECEIVE_BYTES)
                    except BlockingIOError:
                        continue
                    if data:
                        self._feed(data)
                    else:
                        self._raw.terminate()  # completes the waiter with the reason the server gave, if it gave one
                waiter.settle()
        except StopIteration as end:
            return cast("T", end.value)
        except BaseException:
            if waiter is not None:
                waiter.cancel()  # or its error would be reported as never retrieved
            raise
        finally:
            self._line_loop.driven = False
            coroutine.close()

    def _drop(self) -> None:
        """Cut the connection, if there is one; the next use makes a new one."""
        raw = self._raw
        self._forget()
        if raw is not None:
            raw.terminate()

    def _forget(self) -> None:
        self._raw = None
        self._statements = {}
        self._feed = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Alone:
    """Refuses a second task on the same line: the driver would mix the answers up."""

    __slots__ = ("_line",)

    def __init__(self, line: Line) -> None:
        self._line = line

    def __enter__(self) -> None:
        assert not self._line._busy, "a line runs one statement at a time"
        self._line._busy = True

    def __exit__(self, *_: object) -> None:
        self._line._busy = False
