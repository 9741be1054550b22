"""The shared pace on a real Valkey: exact whoever asks, bounded when nobody answers, and forgotten by itself."""

import math
import random
import re
import shutil
import ssl
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callora.config.forms import RedisAddress
from callora.config.loading import load_settings
from callora.ledger.faults import RateStoreUnavailable
from callora.ledger.ids import ApiKeyId, UserId
from callora.ledger.limits import Limit, Standing
from callora.logs import Logs
from callora.service import SystemClock
from callora.store import pace as pace_of_store
from callora.store.pace import HUNG_SECONDS, SCRIPT, SharedPace, examine, logs_of
from tests.support.client import closed_port, watchdog
from tests.support.processes import free_port
from tests.support.valkey import Refused, Valkey, running_valkey

ADA, BOB = UserId("0190a000-0000-7000-8000-00000000000a"), UserId("0190a000-0000-7000-8000-00000000000b")
KEY, OTHER_KEY = ApiKeyId("0190a000-0000-7000-8000-000000000001"), ApiKeyId("0190a000-0000-7000-8000-000000000002")
MINUTE = 60.0
PLENTY = Limit(1_000_000, MINUTE)
SECOND_US = 1_000_000


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a busy machine be late with an answer: the bound itself is for the long run of outages to measure."""
    monkeypatch.setattr(pace_of_store, "ANSWER_SECONDS", 0.8)


def address_of(url: str) -> RedisAddress:
    address = load_settings({"REDIS_URL": url}).redis_address
    assert address is not None
    return address


@asynccontextmanager
async def shared(url: str, *, takes_back: bool = True) -> AsyncIterator[SharedPace]:
    """Run a client for the length of the block, from when it is known whether the store answers."""
    clock = SystemClock()
    with Logs(clock, level="critical") as logs:
        pace = SharedPace(address_of(url), random.Random(1), logs.logger("test"), takes_back=takes_back)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pace.run)  # noqa: ASYNC113 - what it tried is waited for
            with watchdog("the first look at the store"):
                await pace.tried.wait()
            yield pace
            nursery.cancel_scope.cancel()


class Calls:
    """Makes calls with names of their own."""

    def __init__(self) -> None:
        self.made = 0

    async def take(
        self, pace: SharedPace, key: Limit, user: Limit = PLENTY, *, of: tuple[UserId, ApiKeyId] = (ADA, KEY)
    ) -> Standing:
        """Take one call."""
        self.made += 1
        return await pace.take(f"call-{self.made}", of[0], user, of[1], key)


async def until(happened: Callable[[], bool], what: str) -> None:
    with watchdog(what):
        while not happened():  # noqa: ASYNC110 - the store cannot set an event of ours
            await trio.sleep(0.005)


async def refused_for(pace: SharedPace, calls: Calls) -> str | None:
    """Return why a call is not decided, None where it is."""
    try:
        await calls.take(pace, PLENTY)
    except RateStoreUnavailable as fault:
        return fault.why
    return None


# --- what is let in ---------------------------------------------------------------------------------------------------


async def test_a18_a19_of_many_at_once_exactly_the_limit_passes_and_each_is_told_what_is_left(valkey: Valkey) -> None:
    calls, standings = Calls(), list[Standing]()
    limit = Limit(10, MINUTE)
    async with shared(valkey.url) as one, shared(valkey.url) as two:
        before = valkey.now_us()

        async def take(pace: SharedPace) -> None:
            standings.append(await calls.take(pace, limit))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(take, (one, two)[number % 2])
        after = valkey.now_us()
        now = trio.current_time()
    passed = [each for each in standings if not each.refused]
    refused = [each for each in standings if each.refused]
    assert (len(passed), len(refused)) == (10, 90)
    assert sorted(each.remaining for each in passed) == list(range(10))
    assert {each.remaining for each in refused} == {0}
    assert all((each.which, each.limit) == ("key", limit) for each in standings)
    log = valkey.log(logs_of(ADA, KEY)[1])
    oldest = min(log.values())
    assert before <= oldest <= after
    assert {round(each.reset_timestamp * SECOND_US) for each in standings} == {oldest + 60 * SECOND_US}
    assert all(now + 58 < each.reset_at <= now + 60 for each in standings)


async def test_a20_what_left_the_window_makes_room_and_nothing_before(valkey: Valkey) -> None:
    limit, (user_log, key_log) = Limit(10, MINUTE), logs_of(ADA, KEY)
    first = valkey.now_us() - 60 * SECOND_US - 1000  # ten calls, a second apart; the first came 60.001 s ago
    for number in range(10):
        for log in (user_log, key_log):
            valkey.ask("ZADD", log, first + number * SECOND_US, f"earlier-{number}")
    async with shared(valkey.url) as pace:
        standing = await Calls().take(pace, limit)
        assert (standing.refused, standing.remaining) == (False, 0)
        assert "earlier-0" not in valkey.log(key_log)
        assert len(valkey.log(key_log)) == 10
        standing = await pace.take("one more", ADA, PLENTY, KEY, limit)
        assert (standing.refused, standing.which) == (True, "key")
        assert round(standing.reset_timestamp * SECOND_US) == first + 61 * SECOND_US
        assert 0 < standing.reset_at - trio.current_time() <= 1
        assert math.ceil(standing.reset_at - trio.current_time()) == 1


async def test_a21_refused_calls_are_nowhere_and_extend_nothing(valkey: Valkey) -> None:
    calls, limit = Calls(), Limit(2, MINUTE)
    async with shared(valkey.url) as pace:
        for _ in range(2):
            assert not (await calls.take(pace, limit)).refused
        logs = [valkey.log(name) for name in logs_of(ADA, KEY)]
        expiry = [valkey.ask("PEXPIRETIME", name) for name in logs_of(ADA, KEY)]
        resets = {(await calls.take(pace, limit)).reset_timestamp for _ in range(50)}
        assert len(resets) == 1
        assert [valkey.log(name) for name in logs_of(ADA, KEY)] == logs
        assert [valkey.ask("PEXPIRETIME", name) for name in logs_of(ADA, KEY)] == expiry


async def test_a21_keys_and_users_are_apart_and_a_users_keys_are_not(valkey: Valkey) -> None:
    calls, own, user = Calls(), Limit(1, MINUTE), Limit(3, MINUTE)
    async with shared(valkey.url) as pace:
        assert not (await calls.take(pace, own, user)).refused
        assert (await calls.take(pace, own, user)).which == "key"
        for _ in range(2):
            assert not (await calls.take(pace, PLENTY, user, of=(ADA, OTHER_KEY))).refused
        standing = await calls.take(pace, PLENTY, user, of=(ADA, OTHER_KEY))
        assert (standing.refused, standing.which, standing.limit) == (True, "user", user)
        assert not (await calls.take(pace, own, user, of=(BOB, KEY))).refused


async def test_what_one_limit_refuses_takes_nothing_from_the_other(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        await calls.take(pace, Limit(1, MINUTE), Limit(2, MINUTE))
        for _ in range(5):
            assert (await calls.take(pace, Limit(1, MINUTE), Limit(2, MINUTE))).refused
        assert [len(valkey.log(name)) for name in logs_of(ADA, KEY)] == [1, 1]
        await calls.take(pace, PLENTY, Limit(2, MINUTE), of=(ADA, OTHER_KEY))
        for _ in range(5):
            assert (await calls.take(pace, PLENTY, Limit(2, MINUTE))).which == "user"
        assert [len(valkey.log(name)) for name in logs_of(ADA, KEY)] == [2, 1]


async def test_wa6_calls_of_one_instant_count_each(valkey: Valkey) -> None:
    """One round trip carries them, and the store's clock may stand still in it; names keep them apart."""
    calls = Calls()
    async with shared(valkey.url) as pace, trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(calls.take, pace, PLENTY)
    log = valkey.log(logs_of(ADA, KEY)[1])
    assert len(log) == 200
    assert len({at // 1000 for at in log.values()}) < 200


async def test_a_lower_limit_holds_at_once_for_what_was_already_called(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        for _ in range(5):
            await calls.take(pace, PLENTY)
        standing = await calls.take(pace, Limit(3, MINUTE))
        assert (standing.refused, standing.remaining) == (True, 0)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asks=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=60),
    user_limit=st.integers(1, 6),
    user_window=st.integers(500, 4000),
    key_windows=st.tuples(*[st.integers(1, 3000)] * 3),
)
def test_the_script_agrees_with_a_plain_count(
    valkey: Valkey, asks: list[tuple[int, int]], user_limit: int, user_window: int, key_windows: tuple[int, ...]
) -> None:
    """Every answer is worked out again from the store's own time by a model that knows only lists."""
    valkey.ask("FLUSHALL")
    user: deque[int] = deque()
    keys: list[deque[int]] = [deque(), deque(), deque()]
    for number, (key, key_limit) in enumerate(asks):
        key_window = key_windows[key]
        names = logs_of(ADA, ApiKeyId(str(key)))
        answer = valkey.ask("EVAL", SCRIPT, 2, *names, number, user_limit, user_window, key_limit, key_window)
        assert isinstance(answer, list)
        full, now, *counted = (int(str(each)) for each in answer)
        for log, window in ((user, user_window), (keys[key], key_window)):
            while log and log[0] <= now - window:
                log.popleft()
        expected = 1 if len(user) >= user_limit else 2 if len(keys[key]) >= key_limit else 0
        assert full == expected
        if not full:
            user.append(now)
            keys[key].append(now)
        oldest = [log[0] if log else now for log in (user, keys[key])]
        assert counted == [len(user), oldest[0], len(keys[key]), oldest[1]]


# --- what is kept -----------------------------------------------------------------------------------------------------


async def test_logs_are_named_apart_and_expire_by_themselves(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        await calls.take(pace, Limit(5, 0.2), Limit(5, MINUTE))
        user_log, key_log = logs_of(ADA, KEY)
        assert valkey.names() <= {user_log, key_log, "callora:pace:{trial}:user", "callora:pace:{trial}:key"}
        assert 59_000 < int(str(valkey.ask("PTTL", user_log))) <= 60_001
        assert int(str(valkey.ask("PTTL", key_log))) <= 201
        await until(lambda: valkey.names() == {user_log}, "the key's log to expire")


async def test_a_cluster_takes_the_script_because_both_logs_of_a_call_are_in_one_slot(tmp_path: Path) -> None:
    with running_valkey(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        server.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await until(lambda: "cluster_state:ok" in str(server.ask("CLUSTER", "INFO")), "the cluster")
        with pytest.raises(Refused, match="CROSSSLOT"):
            server.ask("EVAL", SCRIPT, 2, "callora:a", "callora:b", "call", 1, 1, 1, 1)
        async with shared(server.url) as pace:
            for user in (ADA, BOB):
                for key in (KEY, OTHER_KEY):
                    assert not (await Calls().take(pace, PLENTY, of=(user, key))).refused


async def test_a_store_that_forgot_the_script_is_told_again_and_no_call_notices(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        for _ in range(3):
            valkey.ask("SCRIPT", "FLUSH")
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(calls.take, pace, PLENTY)
        assert len(valkey.log(logs_of(ADA, KEY)[1])) == 60


# --- where it is ------------------------------------------------------------------------------------------------------


async def test_a_password_and_a_database_are_used(tmp_path: Path) -> None:
    with running_valkey(tmp_path, password="p/w@?") as server:
        async with shared(f"redis://:p%2Fw%40%3F@127.0.0.1:{server.port}/3") as pace:
            await Calls().take(pace, PLENTY)
        assert "db3" in str(server.ask("INFO", "keyspace"))
        for wrong in (f"redis://127.0.0.1:{server.port}", f"redis://:other@127.0.0.1:{server.port}"):
            async with shared(wrong) as pace:
                assert await refused_for(pace, Calls()) == "unreachable"


async def test_the_documented_rights_suffice(valkey: Valkey) -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    said = text.partition("Callora needs ")[2].partition("; `callora doctor`")[0]
    words = [word for word in re.findall(r"`([^`]+)`", said) if word != "callora:pace:*"]
    assert len(words) == 12
    rights = [f"+{word.lower().replace(' ', '|')}" for word in words]
    valkey.ask("ACL", "SETUSER", "callora", "on", ">secret", "~callora:pace:*", *rights)
    async with shared(f"redis://callora:secret@127.0.0.1:{valkey.port}/1", takes_back=True) as pace:
        assert not (await Calls().take(pace, PLENTY)).refused
        valkey.ask("SCRIPT", "FLUSH")
        assert not (await Calls().take(pace, PLENTY)).refused
        valkey.hang()
        assert await refused_for(pace, Calls()) == "timeout"
        valkey.go_on()
        await until(lambda: pace.answers, "the store to answer again")


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a name that a UNIX socket's may begin with."""
    directory = Path(tempfile.mkdtemp(prefix="valkey-"))
    yield directory
    shutil.rmtree(directory)


async def test_a_unix_socket_will_do(tmp_path: Path, short_directory: Path) -> None:
    path = short_directory / "valkey.sock"
    with running_valkey(tmp_path, "--unixsocket", str(path)) as server:
        async with shared(f"unix://{path}?db=2") as pace:
            assert not (await Calls().take(pace, PLENTY)).refused
        assert "db2" in str(server.ask("INFO", "keyspace"))


@contextmanager
def trusted(authority: trustme.CA, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    with monkeypatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(directory / "ca.pem"))
        yield


async def test_tls_is_checked(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def pass_on(outside: trio.SSLStream[trio.SocketStream]) -> None:
        async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
            async for data in source:
                await sink.send_all(data)
            nursery.cancel_scope.cancel()

        try:
            inside = await trio.open_tcp_stream("127.0.0.1", valkey.port)
            async with outside, inside, trio.open_nursery() as nursery:
                nursery.start_soon(pump, outside, inside)
                nursery.start_soon(pump, inside, outside)
        except* trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, pass_on, 0, context, host="127.0.0.1"))
        port = listeners[0].transport_listener.socket.getsockname()[1]
        with trusted(authority, tmp_path, monkeypatch):
            async with shared(f"rediss://localhost:{port}") as pace:
                assert not (await Calls().take(pace, PLENTY)).refused
            async with shared(f"rediss://127.0.0.1:{port}") as pace:
                assert await refused_for(pace, Calls()) == "unreachable"
        async with shared(f"valkeys://localhost:{port}") as pace:
            assert await refused_for(pace, Calls()) == "unreachable"
        nursery.cancel_scope.cancel()


async def test_examining_tells_what_it_is_and_what_is_wrong(valkey: Valkey) -> None:
    found = await examine(address_of(valkey.url))
    assert found.name.startswith("Valkey 9.")
    assert found.eviction is None
    assert found.answer_seconds > 0
    valkey.ask("CONFIG", "SET", "maxmemory", "100mb")
    assert (await examine(address_of(valkey.url))).eviction is None
    valkey.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    assert (await examine(address_of(valkey.url))).eviction == "volatile-lru"
    valkey.ask("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(RateStoreUnavailable, match="read only replica"):
        await examine(address_of(valkey.url))
    valkey.hang()
    with pytest.raises(RateStoreUnavailable, match="Unable to establish a connection"):
        await examine(address_of(valkey.url))
    valkey.kill()
    with pytest.raises(RateStoreUnavailable, match="Unable to establish a connection"):
        await examine(address_of(valkey.url))


# --- when it is away --------------------------------------------------------------------------------------------------


async def test_where_nobody_listens_a_call_is_told_at_once() -> None:
    with closed_port() as port:
        async with shared(f"redis://127.0.0.1:{port}") as pace:
            assert not pace.answers
            for _ in range(200):
                assert await refused_for(pace, Calls()) == "unreachable", "at once, not after waiting"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"-ERR unknown command 'HELLO'\r\n",
        b"+OK\r\n",
        b"*99999999\r\n",
        b"\x00" * 64,
    ],
)
@pytest.mark.parametrize("closes", [True, False])
async def test_what_is_no_store_ends_nothing(said: bytes, closes: bool) -> None:
    asked = trio.Semaphore(0)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await stream.receive_some()
                await stream.send_all(said)
            except trio.BrokenResourceError:
                return
            finally:
                asked.release()
            if not closes:
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        async with shared(f"redis://127.0.0.1:{port}") as pace:
            with watchdog("another try"):
                for _ in range(2):
                    await asked.acquire()
            assert await refused_for(pace, Calls()) == "unreachable"
        nursery.cancel_scope.cancel()


async def test_a_store_that_talks_nonsense_later_is_left_and_asked_anew(valkey: Valkey) -> None:
    """What lies between says something of its own once the connection was good."""
    inserted, connections = b"", 0

    async def pass_on(outside: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1

        async def pump(source: trio.SocketStream, sink: trio.SocketStream, insert: bool) -> None:
            async for data in source:
                await sink.send_all((inserted if insert else b"") + data)
            nursery.cancel_scope.cancel()

        try:
            inside = await trio.open_tcp_stream("127.0.0.1", valkey.port)
            async with outside, inside, trio.open_nursery() as nursery:
                nursery.start_soon(pump, outside, inside, False)
                nursery.start_soon(pump, inside, outside, True)
        except* trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, pass_on, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        async with shared(f"redis://127.0.0.1:{port}") as pace:
            for nonsense in (b"\x00\x01garbage\r\n", b"$5\r\nab\r\n", b"-OOM command not allowed\r\n"):
                assert await refused_for(pace, Calls()) is None
                before, inserted = connections, nonsense
                assert await refused_for(pace, Calls()) is not None
                inserted = b""
                await until(lambda: pace.answers, "the store to be asked anew")
                assert connections > before
        nursery.cancel_scope.cancel()


async def test_wa7_a_hanging_store_costs_few_calls_their_hundred_milliseconds_and_none_more(valkey: Valkey) -> None:
    calls, seconds = Calls(), list[float]()
    async with shared(valkey.url) as pace:
        assert await refused_for(pace, calls) is None
        valkey.hang()

        async def late() -> None:
            began = trio.current_time()
            assert await refused_for(pace, calls) == "timeout"
            seconds.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(late)
        assert min(seconds) >= 0.1
        whys = Counter([await refused_for(pace, calls) for _ in range(200)])
        assert whys[None] == 0
        assert whys["timeout"] <= 20, "the others were told at once"
        valkey.go_on()
        with watchdog("the store to be asked again"):
            while await refused_for(pace, calls) is not None:  # noqa: ASYNC110 - nor here
                await trio.sleep(0.005)


async def test_a_killed_store_is_found_again_by_itself(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        for _ in range(3):
            assert await refused_for(pace, calls) is None
            valkey.kill()
            await until(lambda: not pace.answers, "the loss to be noticed")
            assert await refused_for(pace, calls) == "unreachable"
            valkey.start()
            await until(lambda: pace.answers, "the store to be found again")
            assert await refused_for(pace, calls) is None
            assert len(valkey.log(logs_of(ADA, KEY)[1])) == 1


async def test_calls_that_a_kill_leaves_without_an_answer_are_told_so(valkey: Valkey) -> None:
    calls, whys = Calls(), list[str | None]()
    async with shared(valkey.url) as pace:
        valkey.hang()

        async def take() -> None:
            whys.append(await refused_for(pace, calls))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            valkey.kill()
        assert set(whys) <= {"unreachable", "timeout"}


async def test_a_store_that_only_reads_is_not_asked_by_calls_until_it_writes_again(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        assert await refused_for(pace, calls) is None
        valkey.ask("REPLICAOF", "127.0.0.1", "1")
        assert await refused_for(pace, calls) == "refused"
        assert await refused_for(pace, calls) == "unreachable"
        valkey.ask("REPLICAOF", "NO", "ONE")
        await until(lambda: pace.answers, "the store to write again")
        assert await refused_for(pace, calls) is None


async def test_what_was_let_in_too_late_is_taken_out_again(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url) as pace:
        valkey.hang()
        assert await refused_for(pace, calls) == "timeout"
        with trio.move_on_after(0.01) as scope:
            await refused_for(pace, calls)
        valkey.go_on()
        await until(lambda: pace.answers, "the store to answer again")
        await until(lambda: not valkey.log(logs_of(ADA, KEY)[1]), "the late call to be taken out")
        assert not scope.cancelled_caught, "what is known to be away is not waited for"


async def test_what_was_let_in_on_a_connection_that_was_given_up_is_taken_out_through_the_next(valkey: Valkey) -> None:
    async with shared(valkey.url) as pace:
        valkey.hang()
        for _ in range(2):
            assert await refused_for(pace, Calls()) is not None
        await trio.sleep(
            HUNG_SECONDS + 0.2
        )  # the connection is given up meanwhile; what it carried is still carried out
        valkey.go_on()
        await until(lambda: pace.answers, "the store to be found again")
        await until(lambda: not valkey.log(logs_of(ADA, KEY)[1]), "the late call to be taken out")
        assert "cmdstat_zrem" in str(valkey.ask("INFO", "commandstats"))


async def test_a_call_that_is_cancelled_while_it_asks_is_taken_out_again(valkey: Valkey) -> None:
    async with shared(valkey.url) as pace:
        valkey.hang()
        with trio.move_on_after(0.01) as scope:
            await Calls().take(pace, PLENTY)
        assert scope.cancelled_caught
        valkey.go_on()
        await until(lambda: not valkey.log(logs_of(ADA, KEY)[1]), "the call to be taken out")
        assert pace.answers


async def test_what_was_made_all_the_same_stays_counted(valkey: Valkey) -> None:
    calls = Calls()
    async with shared(valkey.url, takes_back=False) as pace:
        valkey.hang()
        assert await refused_for(pace, calls) == "timeout"
        valkey.go_on()
        await until(lambda: pace.answers, "the store to answer again")
        assert list(valkey.log(logs_of(ADA, KEY)[1])) == ["call-1"]


async def test_an_answer_that_came_in_time_counts_although_the_process_was_busy(valkey: Valkey) -> None:
    async with shared(valkey.url) as pace, trio.open_nursery() as nursery:

        async def hog() -> None:
            while not valkey.log(logs_of(ADA, KEY)[1]):  # noqa: ASYNC110 - the store cannot set an event of ours
                await trio.lowlevel.checkpoint()
            time.sleep(0.3)  # noqa: ASYNC251 - that is what being busy is

        nursery.start_soon(hog)
        assert not (await Calls().take(pace, PLENTY)).refused
