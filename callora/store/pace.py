"""The pace that processes share: sliding logs in Redis or Valkey, asked by one script. Its client is known here alone.

Calls that come while a round trip is under way go out together with the next: one connection, nobody waits in line. The
store's own clock decides, so processes need not agree on the time. No money is here: what is lost with the store is
that calls were made.
"""

import hashlib
import logging
import ssl
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from random import Random
from typing import Any, Final, TypeGuard

import attrs
import trio
from coredis.commands import CommandRequest
from coredis.connection import (
    BaseConnection,
    BaseConnectionParams,
    TCPConnection,
    TCPLocation,
    UnixDomainSocketConnection,
    UnixDomainSocketLocation,
)
from coredis.exceptions import ConnectionError as ConnectionLost
from coredis.exceptions import NoScriptError, RedisError, ResponseError
from structlog.typing import FilteringBoundLogger

from callora.config.forms import RedisAddress
from callora.ledger.faults import RateStoreFault, RateStoreUnavailable
from callora.ledger.ids import ApiKeyId, UserId
from callora.ledger.limits import Limit, SharedCount, Standing, stand

ANSWER_SECONDS: Final = 0.1
"""How long a call waits for the store, and how late the store may answer to be asked by calls."""
HUNG_SECONDS: Final = 1.0
"""A round trip that lasts longer ends its connection; connecting may take as long."""
PAUSE_SECONDS: Final = 0.05
"""Before the store is tried again; doubles up to PAUSE_SECONDS_MAX."""
PAUSE_SECONDS_MAX: Final = 1.0
LATE_ANSWERS_MAX: Final = 2
"""Late answers in a row after which calls ask no more until one comes in time; a single one may be our own fault."""
ROUND_MAX: Final = 256
"""Calls that one round trip carries."""
UNMADE_MAX: Final = 10_000
"""Calls that are remembered to be taken out of the logs while the store is away."""
_ARRIVED_PASSES: Final = 4
"""How often the event loop goes round until an answer that is in the socket has come to its call."""
_STALLED_SECONDS: Final = 0.02
"""A deadline that is noticed later than this says that the process stood still, not the store."""

SCRIPT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local calls, full = {}, 0
for i = 1, 2 do
  redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', string.format('%.0f', now - ARGV[2 * i + 1]))
  calls[i] = redis.call('ZCARD', KEYS[i])
  if full == 0 and calls[i] >= tonumber(ARGV[2 * i]) then full = i end
end
if full == 0 then
  for i = 1, 2 do
    redis.call('ZADD', KEYS[i], string.format('%.0f', now), ARGV[1])
    redis.call('PEXPIRE', KEYS[i], string.format('%.0f', math.ceil(ARGV[2 * i + 1] / 1000) + 1))
    calls[i] = calls[i] + 1
  end
end
local answer = {full, now}
for i = 1, 2 do
  local oldest = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')[2]
  answer[2 * i + 1] = calls[i]
  answer[2 * i + 2] = oldest and tonumber(oldest) or now
end
return answer
"""
# KEYS: the user's log, the key's; a call is in both or in none. ARGV: the call's name; limit and window (in
# microseconds) of the user, of the key. A log is emptied of what has left its window before it is counted, and expires
# a millisecond after its newest call has: expiry is in whole ones. Answers 0, or the number of the log that is full;
# the store's time; calls and oldest call of each log, in microseconds since 1970, of which a double holds every one.
_SHA: Final = hashlib.sha1(SCRIPT.encode()).hexdigest()  # noqa: S324 - what EVALSHA goes by


@attrs.define(slots=True, eq=False)
class _Ask:
    """One call that waits to hear."""

    logs: tuple[str, str]
    call_id: str
    limits: tuple[int, int, int, int]
    done: trio.Event = attrs.field(factory=trio.Event)
    answer: list[int] | None = None
    why: RateStoreFault = "timeout"
    """What it is told where there is no answer."""
    left: bool = False
    """Nobody waits any more."""

    def command(self) -> CommandRequest[Any]:
        return _command(b"EVALSHA", _SHA, 2, *self.logs, self.call_id, *self.limits)

    def take_back(self) -> list[CommandRequest[Any]]:
        return [_command(b"ZREM", log, self.call_id) for log in self.logs]


class SharedPace:
    """Takes calls from limits that every process on the same store shares."""

    def __init__(
        self, address: RedisAddress, random: Random, log: FilteringBoundLogger, *, takes_back: bool = True
    ) -> None:
        """Prepare; `run` connects.

        Args:
            takes_back: whether a call that was let in without hearing of it is taken out of the logs again, because it
                was not made. False where it was made all the same.
        """
        self._address = address
        self._random = random
        self._log = log
        self._takes_back = takes_back
        self._asks: deque[_Ask] = deque()
        self._unmade: deque[_Ask] = deque(maxlen=UNMADE_MAX)
        self._woken = trio.Event()
        self._pause = PAUSE_SECONDS
        self._answers = False
        self._told_away = False
        self.tried = trio.Event()
        """Set once it is known whether the store answers at the start."""

    @property
    def answers(self) -> bool:
        """Whether the store answered in time when it was last asked."""
        return self._answers

    async def take(self, call_id: str, user_id: UserId, user: Limit, api_key_id: ApiKeyId, key: Limit) -> Standing:
        """Take one call from the user's and the key's limit, from both or from none; return where the tighter stands.

        Args:
            call_id: names the call; no other call has the same.

        Raises:
            RateStoreUnavailable: nobody knows. Within ANSWER_SECONDS, and at once where the store is known to be away.

        Cancellation: the call is taken out of the logs again, should it be let in.
        """
        if not self._answers:
            raise RateStoreUnavailable("unreachable")
        ask = _Ask(logs_of(user_id, api_key_id), call_id, (user.calls, _us(user), key.calls, _us(key)))
        self._asks.append(ask)
        self._woken.set()
        try:
            deadline = trio.current_time() + ANSWER_SECONDS
            with trio.move_on_at(deadline):
                await ask.done.wait()
            if not ask.done.is_set():
                await _grace(ask.done, trio.current_time() - deadline)
        finally:
            ask.left = True
        if ask.answer is None:
            if not ask.done.is_set():
                self._answers = False  # until the round trip under way has ended, no other call waits for it
            raise RateStoreUnavailable(ask.why)
        full, now, user_calls, user_oldest, key_calls, key_oldest = ask.answer
        counts = (SharedCount("user", user, user_calls, user_oldest), SharedCount("key", key, key_calls, key_oldest))
        return stand(full, now, counts, trio.current_time())

    async def run(self) -> None:
        """Keep a connection and ask for whoever waits, until cancelled. Nothing that the store does ends it."""
        # What the client logs of a failure would go past our logs, and past what is taken out of them.
        logging.getLogger("coredis").setLevel(logging.CRITICAL)
        while True:
            said = await self._keep_asking()
            self._tell_away(said)
            self.tried.set()
            await self._rest()

    async def _keep_asking(self) -> str:
        """Connect, and ask until the connection ends or the store refuses; return what it said."""
        connection = connect_to(self._address)
        said = "the connection ended"
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(HUNG_SECONDS):
                    await nursery.start(self._hold_open, connection)
                await self._ask_all(connection)
            except (RedisError, OSError, trio.TooSlowError) as error:
                said = str(error) or "it does not answer"
            self._away("unreachable")
            nursery.cancel_scope.cancel()
        return said

    async def _hold_open(  # noqa: ASYNC114, ASYNC128 - awaited inside a nursery's block; the connection says started
        self, connection: BaseConnection, *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await connection.run(task_status=task_status)
        finally:
            self._away("unreachable")
            self._woken.set()  # whoever would ask next finds that the connection has ended

    async def _ask_all(self, connection: BaseConnection) -> None:
        """Ask for whoever waits; return when the connection has ended.

        Raises:
            RedisError: the store refused, or was lost.
        """
        await self._regain(connection)
        late = 0
        while connection.usable:
            if not self._asks and not self._unmade:
                self._woken = trio.Event()
                await self._woken.wait()
                continue
            asks = [self._asks.popleft() for _ in range(min(len(self._asks), ROUND_MAX))]
            began = trio.current_time()
            await self._ask(connection, [ask for ask in asks if not ask.left])
            late = late + 1 if trio.current_time() - began > ANSWER_SECONDS else 0
            if late < LATE_ANSWERS_MAX:
                self._answers = True
                continue
            self._away("timeout")
            self._tell_away("it answers late")
            await self._regain(connection)
            late = 0

    async def _regain(self, connection: BaseConnection) -> None:
        """Return when the script was run in time on logs of nobody, and calls may ask.

        Raises:
            RedisError: the store refused, or was lost.
        """
        _whole(await _exchange(connection, [_command(b"SCRIPT LOAD", SCRIPT)]))
        while True:
            began = trio.current_time()
            _whole(await _exchange(connection, [_TRIAL]))
            if trio.current_time() - began <= ANSWER_SECONDS:
                break
            self.tried.set()
            await self._rest()
        self._pause = PAUSE_SECONDS
        self._answers = True
        self.tried.set()
        if self._told_away:
            self._told_away = False
            self._log.info("rate_limit_store_back")

    async def _ask(self, connection: BaseConnection, asks: Sequence[_Ask]) -> None:
        """Make one round trip, or two where the store has forgotten the script.

        Raises:
            RedisError: the store refused a call, or was lost.
        """
        unmade = [self._unmade.popleft() for _ in range(min(len(self._unmade), ROUND_MAX))]
        undo = [command for ask in unmade for command in ask.take_back()]
        results: Sequence[object] = ()
        lost = True
        try:
            results = await _exchange(connection, [*undo, *(ask.command() for ask in asks)])
            lost = any(isinstance(each, BaseException) and not isinstance(each, ResponseError) for each in results)
            results = results[len(undo) :]
            again = [ask.command() for ask, result in zip(asks, results, strict=True) if _forgotten(result)]
            if again:
                later = iter((await _exchange(connection, [_command(b"SCRIPT LOAD", SCRIPT), *again]))[1:])
                results = [next(later) if _forgotten(result) else result for result in results]
        finally:
            if lost:
                self._unmade.extendleft(reversed(unmade))
            for ask, result in zip_longest(asks, results[: len(asks)]):
                self._settle(ask, result)
        _whole(results)
        if not all(_is_answer(result) for result in results):
            raise ConnectionLost("it answers what was not asked")

    def _settle(self, ask: _Ask, result: object) -> None:
        if _is_answer(result):
            ask.answer = result
            unmade = ask.left and result[0] == 0
        else:
            ask.why = "refused" if isinstance(result, ResponseError) else "unreachable"
            unmade = ask.why == "unreachable"  # it may have been let in
        ask.done.set()
        if unmade and self._takes_back:
            self._unmade.append(ask)

    def _away(self, why: RateStoreFault) -> None:
        self._answers = False
        while self._asks:
            ask = self._asks.popleft()
            ask.why = why
            ask.done.set()

    def _tell_away(self, said: str) -> None:
        if not self._told_away:
            self._told_away = True
            self._log.warning("rate_limit_store_away", said=said)

    async def _rest(self) -> None:
        pause, self._pause = self._pause, min(self._pause * 2, PAUSE_SECONDS_MAX)
        await trio.sleep(pause * (0.5 + self._random.random() / 2))


@attrs.frozen
class Examined:
    """What the store says of itself."""

    answer_seconds: float
    """One round trip with the script in it."""
    name: str
    """Which server, and its version."""
    eviction: str | None
    """What it forgets where its memory is full, other than nothing; None also where it does not say."""


async def examine(address: RedisAddress) -> Examined:
    """Ask the store for what calls ask it for, and what it is.

    Raises:
        RateStoreUnavailable: it does not answer within HUNG_SECONDS, or refuses; the text says what.
    """
    logging.getLogger("coredis").setLevel(logging.CRITICAL)
    connection = connect_to(address)
    fault: Exception | None = None
    seconds, told = 0.0, None
    async with trio.open_nursery() as nursery:
        try:
            with trio.fail_after(HUNG_SECONDS):
                await nursery.start(connection.run)
                _whole(await _exchange(connection, [_command(b"SCRIPT LOAD", SCRIPT)]))
                began = trio.current_time()
                _whole(await _exchange(connection, [_TRIAL]))
                seconds = trio.current_time() - began
                (told,) = await _exchange(connection, [_command(b"INFO")])
        except (RedisError, OSError, trio.TooSlowError) as error:  # raised outside, where no group wraps it
            fault = error
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise RateStoreUnavailable("unreachable", str(fault) or "it does not answer") from fault
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else ""
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    version = facts.get("valkey_version") or facts.get("redis_version") or "of an unknown version"
    policy = facts.get("maxmemory_policy", "noeviction")
    evicts = policy if policy != "noeviction" and facts.get("maxmemory") != "0" else None
    return Examined(seconds, f"{'Valkey' if 'valkey_version' in facts else 'Redis'} {version}", evicts)


def connect_to(address: RedisAddress) -> BaseConnection:
    """Return a connection that has not been opened."""
    how = BaseConnectionParams(
        connect_timeout=HUNG_SECONDS,
        username=address.username,
        password=address.password,
        db=address.database,
        client_name="callora",
        decode_responses=False,
    )
    if address.path is not None:
        return UnixDomainSocketConnection(UnixDomainSocketLocation(address.path), **how)
    if address.tls:
        how["ssl_context"] = ssl.create_default_context()
    return TCPConnection(TCPLocation(address.host, address.port), **how)


def logs_of(user_id: UserId, api_key_id: ApiKeyId) -> tuple[str, str]:
    """Return the names of the user's log and of the key's: what is in braces decides where a cluster keeps them."""
    return f"callora:pace:{{{user_id}}}:user", f"callora:pace:{{{user_id}}}:key:{api_key_id}"


async def _grace(done: trio.Event, late_seconds: float) -> None:
    """Wait for what our own lateness may hide: an answer that is here and not read yet, a question not sent yet.

    Args:
        late_seconds: how late it was noticed that the time is over.
    """
    for _ in range(_ARRIVED_PASSES):
        await trio.lowlevel.checkpoint()
        if done.is_set():
            return
    if late_seconds > _STALLED_SECONDS:
        with trio.move_on_after(min(late_seconds, ANSWER_SECONDS)):
            await done.wait()


def _us(limit: Limit) -> int:
    return round(limit.window_seconds * 1_000_000)


def _command(name: bytes, *arguments: str | int) -> CommandRequest[Any]:
    return CommandRequest(name, *arguments, execution_parameters={})


async def _exchange(connection: BaseConnection, commands: Sequence[CommandRequest[Any]]) -> Sequence[object]:
    """Return what each command came to, faults among them.

    Raises:
        RedisError: nothing was sent.
    """
    if not commands:
        return ()
    try:
        batch = connection.create_request_batch(commands, timeout=HUNG_SECONDS)
    except RedisError:
        raise
    except Exception as error:  # it closes its buffers before it says that it is of no use any more
        raise ConnectionLost("the connection is closing") from error
    return await batch


def _whole(results: Sequence[object]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _is_answer(result: object) -> TypeGuard[list[int]]:
    return isinstance(result, list) and len(result) == 6 and all(isinstance(each, int) for each in result)


def _forgotten(result: object) -> bool:
    return isinstance(result, NoScriptError)


_TRIAL: Final = _command(
    b"EVALSHA", _SHA, 2, "callora:pace:{trial}:user", "callora:pace:{trial}:key", "trial", 1, 1, 1, 1
)
"""A call of nobody's: what is in the way of it is in the way of every call, such as a store that only reads."""
