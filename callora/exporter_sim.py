"""A reference exporter: counters of made-up subjects behind the window contract, and what they truly grew by.

Everything follows from the plan: the same seed gives the same counters, resets, restarts, gaps, late and duplicate
snapshots. What it claims can be had from it by any reader who follows the contract: a counter begins anew right after a
snapshot that was shown in time, so that no growth is between snapshots that nobody could see.
"""

import hmac
import random
import uuid
from bisect import bisect_right
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import attrs
import trio
from quart import Response, jsonify, request
from quart_trio import QuartTrio

from callora.ledger.clock import Clock
from callora.ledger.snapshots import format_instant, parse_instant

LIMIT_MAX: Final = 10_000
LATE_TICKS: Final = 3
"""By how many intervals a late snapshot is late."""
GROWTH_MAX: Final = 100_000
FRACTION: Final = timedelta(microseconds=123_456)
"""Of a second: that cursors carry all of it can be seen."""


@attrs.frozen
class SimPlan:
    """What a simulated node does."""

    began_at: datetime
    """When its counters were 0."""
    seed: int = 1
    node_id: str = "sim-1"
    env: str = "dev"
    subjects: int = 10
    interval_seconds: float = 60.0
    """Between snapshots."""
    resets: int = 0
    """One snapshot in so many finds a subject's counters begun anew; 0: none."""
    restarts: int = 0
    """The same, of all subjects at once."""
    gaps: int = 0
    """One snapshot in so many is never taken."""
    late: int = 0
    """One snapshot in so many can be seen LATE_TICKS intervals after its date."""
    duplicates: int = 0
    """One snapshot in so many comes twice."""
    ticks_max: int | None = None
    """After so many snapshots there are no more; None: without end."""


@attrs.frozen
class Tick:
    """One snapshot of the plan."""

    at: datetime
    seen_from: datetime
    """From when on it is shown."""
    times: int
    """How often it is shown: 0 for a gap."""
    restarted: bool
    calm: bool
    """Whether it and the one before are shown in time: only then may counters begin anew."""


class SimNode:
    """A node of a plan: its ticks and counters, as far as time has come."""

    def __init__(self, plan: SimPlan) -> None:
        self._plan = plan
        self._random = random.Random(f"{plan.seed}/ticks")  # noqa: S311 - made-up figures
        self._ticks: list[Tick] = []
        self._dates: list[datetime] = []
        names = random.Random(f"{plan.seed}/{plan.node_id}/subjects")  # noqa: S311
        self.subjects = tuple(str(uuid.UUID(int=names.getrandbits(128), version=4)) for _ in range(plan.subjects))
        self._growth = {name: random.Random(f"{plan.seed}/{name}") for name in self.subjects}  # noqa: S311
        self._totals: dict[str, list[tuple[int, int]]] = {name: [] for name in self.subjects}
        self._true: dict[str, list[int]] = {name: [] for name in self.subjects}

    def shown(self, since: datetime, until: datetime, now: datetime) -> Iterator[int]:
        """Yield the ticks of a window that can be seen now, each as often as it is shown."""
        self._advance(now)
        first = bisect_right(self._dates, since - timedelta(microseconds=1))
        for number in range(first, bisect_right(self._dates, until)):
            tick = self._ticks[number]
            if tick.seen_from <= now:
                yield from (number,) * tick.times

    def snapshot(self, number: int) -> dict[str, Any]:
        """Return a snapshot as it is sent. Each subject has two inbounds."""
        samples = []
        for name in self.subjects:
            up, down = self._totals[name][number]
            for inbound, share in (("tcp", up // 3), ("ws", up - up // 3)):
                samples.append(
                    {
                        "uuid": name,
                        "email": f"{name[:8]}@example.com",
                        "inbound_tag": inbound,
                        "uplink_bytes_total": share,
                        "downlink_bytes_total": down // 2 if inbound == "tcp" else down - down // 2,
                    }
                )
        return {
            "collected_at": format_instant(self._ticks[number].at),
            "node_id": self._plan.node_id,
            "env": self._plan.env,
            "samples": samples,
        }

    def date(self, number: int) -> datetime:
        """Return a tick's date."""
        return self._dates[number]

    def true_usage(self, until: datetime, now: datetime) -> dict[str, int]:
        """Return what each subject has used by the latest snapshot up to `until` that can be seen now."""
        self._advance(now)
        for number in range(bisect_right(self._dates, until) - 1, -1, -1):
            tick = self._ticks[number]
            if tick.times and tick.seen_from <= now:
                return {name: self._true[name][number] for name in self.subjects}
        return dict.fromkeys(self.subjects, 0)

    def _advance(self, now: datetime) -> None:
        interval = timedelta(seconds=self._plan.interval_seconds)
        ticks_max = self._plan.ticks_max
        while ticks_max is None or len(self._ticks) < ticks_max:
            at = self._plan.began_at + len(self._ticks) * interval + FRACTION
            if at > now:
                return
            self._add_tick(at, interval)

    def _add_tick(self, at: datetime, interval: timedelta) -> None:
        plan = self._plan
        gap, late, twice, restart = (
            bool(each) and self._random.randrange(each) == 0
            for each in (plan.gaps, plan.late, plan.duplicates, plan.restarts)
        )
        before = self._ticks[-1] if self._ticks else None
        plain = before is not None and bool(before.times) and before.seen_from == before.at
        calm = plain and not gap and not late
        times = 0 if gap else 2 if twice else 1
        seen_from = at + LATE_TICKS * interval if late and not gap else at
        self._ticks.append(Tick(at, seen_from, times, restart and calm, calm))
        self._dates.append(at)
        for name in self.subjects:
            self._grow(name, self._ticks[-1])

    def _grow(self, name: str, tick: Tick) -> None:
        figures, totals, true = self._growth[name], self._totals[name], self._true[name]
        up, down = (figures.randrange(GROWTH_MAX) for _ in range(2))
        reset = bool(self._plan.resets) and figures.randrange(self._plan.resets) == 0 and tick.calm
        if reset or tick.restarted:
            totals.append((0, 0))
            true.append(true[-1])
            return
        last_up, last_down = totals[-1] if totals else (0, 0)
        totals.append((last_up + up, last_down + down))
        true.append((true[-1] if true else 0) + up + down)


def make_exporter(plan: SimPlan, clock: Clock, token: str) -> QuartTrio:
    """Return the exporter: `/v1/snapshots/window`, and `/truth?until=` of what was used.

    Args:
        token: what readers must present as a Bearer token.
    """
    app = QuartTrio(__name__)
    node = SimNode(plan)

    def refused() -> Response | None:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, f"Bearer {token}".encode()):
            return None
        return _problem(401, "present the Bearer token")

    @app.get("/v1/snapshots/window")
    async def window() -> Response:
        await trio.lowlevel.checkpoint()
        if (refusal := refused()) is not None:
            return refusal
        since, until = (parse_instant(request.args.get(name, "")) for name in ("since", "until"))
        limit = request.args.get("limit", "120")
        cursor = request.args.get("cursor")
        if since is None or until is None:
            return _problem(400, "since and until must be RFC 3339 instants")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 5 and 1 <= int(limit) <= LIMIT_MAX):
            return _problem(400, f"limit must be 1 to {LIMIT_MAX}")
        if cursor is not None:
            after = parse_instant(cursor)
            if after is None:
                return _problem(400, "cursor must be the next_cursor of a page")
            since = after + timedelta(microseconds=1)
        numbers = list(node.shown(since, until, clock.now()))
        page = numbers[: int(limit)]
        # A cursor is a date: what is shown twice stays on one page.
        while len(page) < len(numbers) and numbers[len(page)] == page[-1]:
            page.append(page[-1])
        more = len(numbers) > len(page)
        return jsonify(
            node_id=plan.node_id,
            env=plan.env,
            snapshots=[node.snapshot(each) for each in page],
            has_more=more,
            next_cursor=format_instant(node.date(page[-1])) if more else "",
        )

    @app.get("/truth")
    async def truth() -> Response:
        await trio.lowlevel.checkpoint()
        if (refusal := refused()) is not None:
            return refusal
        now = clock.now()
        until = parse_instant(request.args.get("until", "")) or now
        return jsonify(until=format_instant(until), used=node.true_usage(until, now))

    return app


def whole_minutes_ago(now: datetime, minutes: int) -> datetime:
    """Return the minute that began so many minutes ago."""
    return now.astimezone(UTC).replace(second=0, microsecond=0) - timedelta(minutes=minutes)


def _problem(status: int, message: str) -> Response:
    response: Response = jsonify(error=message)
    response.status_code = status
    return response
