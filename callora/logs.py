"""Logs: structured records, secrets taken out, written by one thread away from the event loop.

A record is rendered where it is made (so that what it shows is what was true then) and put into a bounded buffer; a
thread writes the buffer in batches. A slow or stuck stderr therefore costs the service nothing but records, and those
are counted. Nothing here is global: whoever logs is given a logger.
"""

import json
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from callora.ledger.clock import Clock

Level = Literal["debug", "info", "warning", "error", "critical"]

REDACTED: Final = "[redacted]"

_PLAIN: Final = frozenset((int, float, bool, type(None)))
_RECORDS_MAX: Final = 10_000
_GATHER_SECONDS: Final = 0.05
_EXIT_SECONDS_MAX: Final = 2.0
_UTC_OFFSET: Final = timedelta(0)
_DEPTH_MAX: Final = 8
_SECRET_NAMES: Final = frozenset(
    (
        *("api_key", "apikey", "x_api_key", "authorization", "proxy_authorization", "cookie", "set_cookie"),
        *("credential", "credentials", "password", "passwd", "secret", "secret_key", "signing_key", "private_key"),
        *("seed", "seed_phrase", "mnemonic", "token", "refresh_token", "dsn", "database_url", "redis_url"),
    )
)
_SECRET_ENDINGS: Final = tuple(
    f"_{name}" for name in ("api_key", "authorization", "password", "private_key", "secret", "seed", "token", "dsn")
)
_SECRET_CHARS_MIN: Final = 6
_API_KEY: Final = re.compile(r"(ck_(?:live|test)_[0-9A-Za-z]{8})[0-9A-Za-z]+", re.ASCII)
_URL_PASSWORD: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*):[^\s/]*@", re.ASCII)
_BEARER: Final = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.ASCII | re.IGNORECASE)
_SEED: Final = re.compile(r"\bS[A-Z2-7]{55}\b", re.ASCII)


def mask(text: str) -> str:
    """Return the text without the secrets it holds.

    An API key is cut to its 16-character prefix, which is stored in clear anyway; a password in a URL, a bearer token
    and a Stellar seed are taken out.
    """
    if len(text) < _SECRET_CHARS_MIN:
        return text
    if "ck_" in text:
        text = _API_KEY.sub(r"\1…", text)
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1:{REDACTED}@", text)
    if "earer" in text or "asic" in text or "EARER" in text:
        text = _BEARER.sub(rf"\1 {REDACTED}", text)
    return _SEED.sub(REDACTED, text) if len(text) >= 56 else text


@lru_cache(maxsize=1024)
def _name(name: str) -> tuple[str, bool]:
    """Return the name as it may be written, and whether what it names is a secret."""
    plain = name.lower().replace("-", "_")
    return mask(name), plain in _SECRET_NAMES or plain.endswith(_SECRET_ENDINGS)


def redact(value: object, depth: int = 0) -> object:
    """Return the value as JSON can hold it, without secrets.

    What has a telling name goes whole, and `mask` is applied to every string. Objects become their `repr`, masked.
    """
    kind = type(value)
    if isinstance(value, str):
        return mask(value)
    if kind in _PLAIN:
        return value
    if depth >= _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        made: dict[str, object] = {}
        for name, item in value.items():
            shown, secret = _name(str(name))
            made[shown] = REDACTED if secret and item is not None else redact(item, depth + 1)
        return made
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, depth + 1) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return mask(bytes(value).decode("utf-8", "backslashreplace"))
    return mask(_safe_repr(value))


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # a broken __repr__ must not cost the record
        return f"<{type(value).__name__}>"


def _redact_record(_logger: Any, _method: str, record: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return cast(dict[str, Any], redact(record))


_encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _as_json(_logger: Any, _method: str, record: MutableMapping[str, Any]) -> str:
    return _encode(record)


class Logs:
    """Where records go, and the maker of loggers.

    Use as a context manager: inside it a thread writes; leaving it writes what is left, for at most two seconds.
    Outside of it records wait in the buffer until `flush`.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        level: Level = "info",
        as_json: bool = True,
        stream: TextIO | None = None,
        records_max: int = _RECORDS_MAX,
        on_drop: Callable[[], None] | None = None,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            clock: the date on each record.
            level: the least severe record that is kept; others cost one call.
            as_json: one object a line; otherwise lines for people, coloured on a terminal.
            stream: where lines go; None means stderr.
            records_max: records that may wait. Past it new ones are dropped and counted: the first records of a
                flood say more than its last.
            on_drop: called for each dropped record, from whichever thread made it.
        """
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._records_max = records_max
        self._on_drop = on_drop
        self._buffer: deque[str] = deque()
        self._dropped = 0
        self._dropped_told = 0
        self._state = threading.Condition()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._idle = False
        self._level = level
        self._chain = self._processors(as_json=as_json)
        wrapper = structlog.make_filtering_bound_logger(level)
        root = structlog.wrap_logger(_Sink(self.emit, "callora"), processors=list(self._chain), wrapper_class=wrapper)
        self._root: FilteringBoundLogger = root.bind()

    @property
    def dropped(self) -> int:
        """Records dropped so far because the buffer was full."""
        return self._dropped

    def logger(self, part: str, **bound: object) -> FilteringBoundLogger:
        """Return a logger whose records name `part` and carry `bound`. A request's id is given by argument, always."""
        return self._root.bind(part=part, **bound)

    def stdlib_logger(self, part: str) -> logging.Logger:
        """Return a standard-library logger, known to nobody else, whose records become ours: for foreign packages."""
        made = logging.Logger(part, level=getattr(logging, self._level.upper()))
        made.propagate = False
        made.addHandler(_Forward(self.logger(part)))
        return made

    def capture_structlog(self) -> None:
        """Send the records of every `structlog.get_logger(name)` here, with `name` as their part.

        This sets structlog's process-wide configuration, for modules that ask it for their logger: call it once, where
        the process is composed, before anything logs.
        """
        structlog.configure(
            processors=list(self._chain),
            wrapper_class=structlog.make_filtering_bound_logger(self._level),
            logger_factory=lambda *names: _Sink(self.emit, str(names[0]) if names else "callora"),
            cache_logger_on_first_use=False,
        )

    def __enter__(self) -> "Logs":
        assert self._thread is None
        self._stopping = False
        # A daemon, so that a stuck stderr cannot keep the process from ending; the exit below waits for it first
        self._thread = threading.Thread(target=self._write_until_stopped, name="callora-logs", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, self._thread = self._thread, None
        assert thread is not None
        with self._state:
            self._stopping = True
            self._state.notify_all()
        thread.join(_EXIT_SECONDS_MAX)
        if not thread.is_alive():
            self.flush()

    def flush(self) -> bool:
        """Write what waits, in this thread; whether all was written.

        Blocks while another flush is writing, for at most two seconds. For the end of a process, and for tests.
        """
        if not self._writing.acquire(timeout=_EXIT_SECONDS_MAX):
            return False
        try:
            self._write_batch()
        finally:
            self._writing.release()
        return True

    def emit(self, line: str) -> None:
        """Put a finished line into the buffer, or drop and count it. Any thread; never blocks on the stream."""
        if len(self._buffer) >= self._records_max:
            with self._state:
                self._dropped += 1
            if self._on_drop is not None:
                self._on_drop()
            return
        self._buffer.append(line)
        # The thread says that it is idle before it looks at the buffer a last time: one of us sees the other
        if self._idle:
            with self._state:
                self._state.notify_all()

    def _processors(self, *, as_json: bool) -> tuple[Processor, ...]:
        if as_json:
            # No locals in tracebacks: they hold keys, bodies and balances
            tracebacks = structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=30)
            )
            return (self._stamp, tracebacks, _redact_record, _as_json)
        console = structlog.dev.ConsoleRenderer(
            colors=self._stream.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
        return (self._stamp, structlog.processors.format_exc_info, _redact_record, console)

    def _stamp(self, logger: Any, method: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        now = self._clock.now()
        assert now.utcoffset() == _UTC_OFFSET
        stamp = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        level = "error" if method == "exception" else method
        return {"timestamp": stamp, "level": level, "part": logger.part, **record}

    def _write_until_stopped(self) -> None:
        while True:
            with self._state:
                self._idle = True
                while not self._buffer and not self._stopping:
                    self._state.wait()
                self._idle = False
                if not self._stopping:
                    # Under load this gathers a batch; it ends at once when the process does
                    self._state.wait_for(lambda: self._stopping, timeout=_GATHER_SECONDS)
                stopping = self._stopping
            self.flush()
            if stopping:
                return

    def _write_batch(self) -> None:
        lines = [self._buffer.popleft() for _ in range(len(self._buffer))]
        untold = self._dropped - self._dropped_told
        if untold:
            self._dropped_told += untold
        if lines:
            self._write("\n".join(lines) + "\n")
        if untold:
            self._root.warning("log records were dropped: the buffer was full", part="logs", dropped=untold)
            lines = [self._buffer.popleft() for _ in range(len(self._buffer))]
            self._write("".join(f"{line}\n" for line in lines))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader has gone, or the stream is closed: there is nobody left to tell
            with self._state:
                self._dropped += text.count("\n")
                self._dropped_told += text.count("\n")


class _Sink:
    """What structlog calls with a rendered line, whatever its level."""

    def __init__(self, emit: Callable[[str], None], part: str) -> None:
        self.part = part
        self.debug = self.info = self.warning = self.error = self.critical = emit
        self.exception = self.fatal = self.msg = self.log = self.warn = emit


class _Forward(logging.Handler):
    """Standard-library records as ours."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            exception = record.exc_info if record.exc_info and record.exc_info[0] is not None else None
            # Without arguments: structlog would interpolate the message a second time
            self._logger.log(record.levelno // 10 * 10, record.getMessage(), exc_info=exception)
        except Exception:
            self.handleError(record)
