"""Logs: one object a line, no secret in any of them, nothing lost and nobody held up."""

import io
import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from callora.logs import REDACTED, Logs, mask, redact

KEY = "ck_live_" + "0123456789abcdef" * 3
SEED = "S" + "A2B3C4D5E6F" * 5


class FixedClock:
    def now(self) -> datetime:
        return datetime(2026, 11, 21, 10, 9, 8, 7654, tzinfo=UTC)

    def timestamp(self) -> float:
        return self.now().timestamp()


class StuckStream(io.StringIO):
    """A stream whose reader has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.released.wait(10)
        return super().write(text)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_object_with_its_date_level_part_and_request() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), stream=stream) as logs:
        logs.logger("gateway", worker=2).info("call", request_id="r-1", status=200)
    assert lines(stream) == [
        {
            "timestamp": "2026-11-21T10:09:08.007Z",
            "level": "info",
            "part": "gateway",
            "worker": 2,
            "request_id": "r-1",
            "status": 200,
            "event": "call",
        }
    ]


def test_a_line_break_in_a_value_does_not_break_the_line() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), stream=stream) as logs:
        logs.logger("x").info("a\nb", path="/\r\n{}\u2028")
    assert stream.getvalue().count("\n") == 1
    assert lines(stream)[0]["event"] == "a\nb"


def test_records_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), level="warning", stream=stream) as logs:
        logs.logger("x").info("quiet")
        logs.logger("x").warning("loud")
    assert [record["event"] for record in lines(stream)] == ["loud"]


@pytest.mark.parametrize("as_json", [True, False])
def test_no_secret_reaches_the_stream_in_any_form(as_json: bool) -> None:
    class Holder:
        def __repr__(self) -> str:
            return f"<Holder {KEY}>"

    stream = io.StringIO()
    with Logs(FixedClock(), as_json=as_json, stream=stream) as logs:
        log = logs.logger("x", admin_api_key="bound-secret")
        log.info(f"key {KEY}!", api_key="plain-secret", **{"X-Api-Key": "header-secret"})
        log.info("nested", headers={"Authorization": "Basic abc", "deep": [{"password": "nested-secret"}, (KEY,)]})
        log.info("texts", dsn_text="postgresql://u:url-secret@h/d", header="Bearer token-secret-123", raw=KEY.encode())
        log.info("object", holder=Holder(), keys={KEY: 1}, seed_text=f"seed {SEED}.")
        try:
            raise ValueError(f"bad key {KEY}")
        except ValueError:
            log.exception("failed", token="field-secret")
    text = stream.getvalue()
    assert len(text.splitlines()) >= 5
    assert "-secret" not in text
    assert KEY not in text
    assert KEY[17:] not in text
    assert SEED not in text
    assert "ck_live_01234567" in text
    assert REDACTED in text


def test_a_key_is_cut_to_its_prefix_and_a_prefix_stays() -> None:
    assert mask(f"<{KEY}>") == "<ck_live_01234567…>"
    assert mask("ck_test_01234567") == "ck_test_01234567"
    assert mask("postgres://a:b@h/x and http://h:80/@") == f"postgres://a:{REDACTED}@h/x and http://h:80/@"


def test_what_is_no_secret_is_left_alone() -> None:
    record = {"api_key_id": "k1", "token_count": 5, "path": "/v1/call/x", "ok": True, "none": None, "password": None}
    assert redact(record) == record


def test_deep_and_circular_values_end() -> None:
    circle: dict[str, object] = {}
    circle["circle"] = circle
    assert "…" in json.dumps(redact(circle), ensure_ascii=False)


def test_a_broken_repr_does_not_cost_the_record() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert redact({"x": Broken()}) == {"x": "<Broken>"}


def test_an_exception_group_is_rendered_whole_and_without_locals() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), stream=stream) as logs:
        try:
            local_value = "never shown"
            raise ExceptionGroup(f"group of {len(local_value)}", [ValueError("one"), KeyError("two")])
        except ExceptionGroup:
            logs.logger("x").exception("failed", request_id="r")
    [record] = lines(stream)
    assert record["level"] == "error"
    assert [inner[0]["exc_value"] for inner in record["exception"][0]["exceptions"]] == ["one", "'two'"]
    assert "never shown" not in stream.getvalue()


def test_records_wait_for_a_flush_where_no_thread_runs() -> None:
    stream = io.StringIO()
    logs = Logs(FixedClock(), stream=stream)
    logs.logger("x").info("early")
    assert stream.getvalue() == ""
    assert logs.flush()
    assert [record["event"] for record in lines(stream)] == ["early"]


def test_nothing_is_lost_when_many_threads_log_until_the_end() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), stream=stream) as logs:

        def work(number: int) -> None:
            log = logs.logger("x", number=number)
            for count in range(200):
                log.info("n", count=count)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    written = lines(stream)
    assert len(written) == 800
    for number in range(4):
        assert [record["count"] for record in written if record["number"] == number] == list(range(200))
    assert logs.dropped == 0


def test_a_record_is_written_without_a_flush_or_a_second_record() -> None:
    class Noting(io.StringIO):
        wrote = threading.Event()

        def flush(self) -> None:
            self.wrote.set()

    stream = Noting()
    with Logs(FixedClock(), stream=stream) as logs:
        for _ in range(3):  # from idle each time
            stream.wrote.clear()
            logs.logger("x").info("one")
            assert stream.wrote.wait(10)
    assert len(lines(stream)) == 3


def test_a_stuck_stream_holds_nobody_up_and_what_is_dropped_is_counted_and_told() -> None:
    stream = StuckStream()
    drops: list[None] = []
    with Logs(FixedClock(), stream=stream, records_max=3, on_drop=lambda: drops.append(None)) as logs:
        log = logs.logger("x")
        log.info("first")
        assert stream.entered.wait(10)
        for count in range(10):
            log.info("more", count=count)
        assert logs.dropped == len(drops) == 7
        stream.released.set()
    written = lines(stream)
    assert [record.get("count") for record in written[1:4]] == [0, 1, 2]
    assert written[4]["dropped"] == 7
    assert written[4]["level"] == "warning"


def test_a_closed_stream_raises_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    with Logs(FixedClock(), stream=stream) as logs:
        logs.logger("x").info("nobody listens")
    assert logs.dropped == 1


def test_records_of_the_standard_library_become_ours() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), stream=stream) as logs:
        foreign = logs.stdlib_logger("hypercorn")
        foreign.debug("too quiet")
        foreign.info("Running on %s", "unix:/x")
        try:
            raise OSError("100% gone")
        except OSError:
            foreign.exception("50% done")
    first, second = lines(stream)
    assert (first["part"], first["level"], first["event"]) == ("hypercorn", "info", "Running on unix:/x")
    assert (second["level"], second["event"]) == ("error", "50% done")
    assert second["exception"][0]["exc_value"] == "100% gone"


def test_development_lines_are_for_people() -> None:
    stream = io.StringIO()
    with Logs(FixedClock(), as_json=False, stream=stream) as logs:
        logs.logger("gateway").info("ready", port=3000)
    assert stream.getvalue() == "2026-11-21T10:09:08.007Z [info     ] ready part=gateway port=3000\n"


def test_modules_that_ask_structlog_for_a_logger_are_heard_and_redacted_too() -> None:
    early = structlog.get_logger("callora.actors.writer")
    stream = io.StringIO()
    try:
        with Logs(FixedClock(), stream=stream) as logs:
            logs.capture_structlog()
            early.info("round", key=KEY)
            early.debug("too quiet")
            structlog.get_logger().bind(request_id="r").warning("bound")
    finally:
        structlog.reset_defaults()
    first, second = lines(stream)
    assert (first["part"], first["event"], first["key"]) == ("callora.actors.writer", "round", "ck_live_01234567…")
    assert (second["part"], second["level"], second["request_id"]) == ("callora", "warning", "r")
