"""What a run found: the ratios beside the figures to reach, a table for the eye and a JSON file for comparison.

Ratios are of medians, taken side by side in one run; absolute numbers of another day or machine mean nothing here.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import attrs

from bench.bodies import BodyFigures
from bench.history import HistoryFigure
from bench.intents import IntentFigures
from bench.lanes import HOT_CONNECTIONS, LaneFigure, Spread
from bench.latency import LatencyFigures
from bench.ledger import LedgerFigures
from bench.machine import Machine
from bench.memory import MemoryFigures
from bench.plan import Plan
from bench.rating import RatingFigures
from bench.settlement import SettlementFigures
from bench.start import StartFigures
from bench.usage import UsageFigures
from bench.webhooks import WebhookFigures
from bench.workers import WorkerFigures

Verdict = Literal["aim", "pass", "MISS", "no figure", "not run"]


@attrs.define
class Results:
    """Everything one run measured; None for what was not asked for."""

    lanes: list[LaneFigure] | None = None
    ledger: LedgerFigures | None = None
    memory: MemoryFigures | None = None
    latency: LatencyFigures | None = None
    bodies: BodyFigures | None = None
    workers: WorkerFigures | None = None
    intents: IntentFigures | None = None
    start: StartFigures | None = None
    usage: UsageFigures | None = None
    settlement: SettlementFigures | None = None
    history: tuple[HistoryFigure, ...] | None = None
    rating: RatingFigures | None = None
    webhooks: WebhookFigures | None = None
    commit_ms: float | None = None
    """One commit: mean latency of `pgbench -N` by one client."""
    failures: list[str] = attrs.field(factory=list)
    """Sections that could not be measured, and why."""

    def complaints(self) -> list[str]:
        """Return why figures are missing: failed sections and ledger checks, lanes that refused calls."""
        found = self.failures + [
            f"({lane.letter}) at {lane.connections}: {complaint}"
            for lane in self.lanes or []
            for complaint in lane.complaints
        ]
        sections = {
            "ledger": self.ledger,
            "open loop": self.latency,
            "1 MiB bodies": self.bodies,
            "workers": self.workers,
            "intents": self.intents,
        }
        for name, section in sections.items():
            if section is not None:
                found += [f"{name}: {complaint}" for complaint in section.complaints]
        return found


@attrs.frozen
class Figure:
    """A measured value and how it was come by."""

    value: float
    note: str = ""


@attrs.frozen
class Row:
    """One figure to reach."""

    number: str
    title: str
    unit: str
    least: float
    aim: float
    higher: bool
    """Whether more is better."""
    figure: Callable[[Results], Figure | None]
    """None when it was not measured; raises LookupError when its lane has no figure."""

    def verdict(self, value: float) -> Verdict:
        """Return which of the two figures the value reaches."""
        for bound, verdict in ((self.aim, "aim"), (self.least, "pass")):
            if value >= bound if self.higher else value <= bound:
                return verdict  # type: ignore[return-value]
        return "MISS"


@attrs.frozen
class Judged:
    """A row with what this run says about it."""

    row: Row
    figure: Figure | None
    verdict: Verdict


def _lane(results: Results, letter: str, connections: int = HOT_CONNECTIONS) -> LaneFigure:
    for lane in results.lanes or []:
        if (lane.letter, lane.connections) == (letter, connections):
            if lane.complaints:
                raise LookupError(f"({letter}) at {connections} has no figure")
            return lane
    raise LookupError(f"({letter}) at {connections} was not measured")


def _per_cpu(results: Results, letter: str) -> Figure | None:
    if results.lanes is None:
        return None
    ours, nginx = _lane(results, letter), _lane(results, "n")
    ratio = nginx.gateway_us.median / ours.gateway_us.median
    whole = nginx.gateway_us.median / (ours.gateway_us.median + ours.postgres_us.median)
    note = f"{ours.gateway_us.median:.0f} µs beside {nginx.gateway_us.median:.0f} µs"
    if ours.postgres_us.median >= 1:
        note += f"; {whole:.2f} with PostgreSQL's {ours.postgres_us.median:.0f} µs"
    return Figure(ratio, note)


def _calls(results: Results, letter: str) -> Figure | None:
    if results.lanes is None:
        return None
    paid, other = _lane(results, "d"), _lane(results, letter)
    note = f"{paid.calls_per_second.median:.0f}/s beside {other.calls_per_second.median:.0f}/s"
    hot = _lane(results, "d1").calls_per_second.median
    return Figure(paid.calls_per_second.median / other.calls_per_second.median, f"{note}; one hot vault {hot:.0f}/s")


def _limited(results: Results) -> Figure | None:
    if results.lanes is None:
        return None
    limited, paid = _lane(results, "dl").calls_per_second.median, _lane(results, "d").calls_per_second.median
    return Figure(limited / paid, f"{limited:.0f}/s beside {paid:.0f}/s")


def _intents(results: Results) -> Figure | None:
    if results.intents is None:
        return None
    if results.intents.complaints:
        raise LookupError("the ledger check failed")
    keyed, plain = results.intents.keyed, results.intents.plain
    note = (
        f"{keyed.calls_per_second.median:.0f}/s beside {plain.calls_per_second.median:.0f}/s;"
        f" {keyed.gateway_us.median:.0f} µs beside {plain.gateway_us.median:.0f} µs"
    )
    return Figure(keyed.calls_per_second.median / plain.calls_per_second.median, note)


def _rounds(results: Results, vaults: Literal["hot", "many"]) -> Figure | None:
    if results.ledger is None:
        return None
    rounds, transactions = results.ledger.at("rounds", 256, vaults), results.ledger.at("transactions", 256, vaults)
    per_call = rounds.calls_per_second.median / transactions.calls_per_second.median
    note = (
        f"{rounds.changes_per_second.median:.0f} balance changes/s "
        f"beside {transactions.changes_per_second.median:.0f}; in whole calls (hold and capture) {per_call:.1f}"
    )
    return Figure(rounds.changes_per_second.median / transactions.changes_per_second.median, note)


def _hot_over_many(results: Results) -> Figure | None:
    if results.ledger is None:
        return None
    hot, many = results.ledger.at("rounds", 256, "hot"), results.ledger.at("rounds", 256, "many")
    note = f"{hot.changes_per_second.median:.0f}/s beside {many.changes_per_second.median:.0f}/s, 256 callers"
    return Figure(hot.changes_per_second.median / many.changes_per_second.median, note)


def _added_latency(results: Results) -> Figure | None:
    if results.lanes is None or results.commit_ms is None:
        return None
    added = _lane(results, "d", 1).p50_ms.median - _lane(results, "b", 1).p50_ms.median
    return Figure(added / results.commit_ms, f"{added:.2f} ms added; one commit {results.commit_ms:.2f} ms")


def _open_loop(results: Results) -> Figure | None:
    seen = results.latency
    if seen is None:
        return None
    if seen.complaints:
        raise LookupError("the ledger check failed")
    note = f"p50 {seen.p50_ms.median:.2f} ms, p99 {seen.p99_ms.median:.2f} ms at {seen.rate:.0f}/s"
    return Figure(seen.p99_over_p50.median, note)


def _bodies(results: Results) -> Figure | None:
    seen = results.bodies
    if seen is None:
        return None
    if seen.complaints:
        raise LookupError("the ledger check failed")
    ours, nginx = seen.callora_mib_per_cpu_second.median, seen.nginx_mib_per_cpu_second.median
    return Figure(ours / nginx, f"{ours:.0f} MiB per CPU second beside {nginx:.0f}")


def _memory(pick: Callable[[MemoryFigures], Figure]) -> Callable[[Results], Figure | None]:
    return lambda results: None if results.memory is None else pick(results.memory)


def _workers(pick: Callable[[WorkerFigures], Figure]) -> Callable[[Results], Figure | None]:
    def figure(results: Results) -> Figure | None:
        if results.workers is None:
            return None
        if results.workers.complaints:
            raise LookupError("the ledger check failed")
        return pick(results.workers)

    return figure


def _two_over_one(seen: WorkerFigures) -> Figure:
    one, two = seen.one_calls_per_second.median, seen.two_calls_per_second.median
    note = f"{two:.0f}/s beside {one:.0f}/s; gateway and PostgreSQL {seen.two_cpu_us.median:.0f} µs a call"
    return Figure(two / one, note)


def _limited_over_two(seen: WorkerFigures) -> Figure:
    limited, two = seen.limited_calls_per_second.median, seen.two_calls_per_second.median
    return Figure(limited / two, f"{limited:.0f}/s beside {two:.0f}/s")


def _start(results: Results) -> Figure | None:
    return None if results.start is None else Figure(results.start.seconds.median)


def _usage(results: Results) -> Figure | None:
    seen = results.usage
    if seen is None:
        return None
    slowest = seen.slowest
    return Figure(slowest.ms, f"{slowest.name}, over {seen.events} calls")


def _settlement(pick: Callable[[SettlementFigures], Figure]) -> Callable[[Results], Figure | None]:
    return lambda results: None if results.settlement is None else pick(results.settlement)


def _rating(results: Results) -> Figure | None:
    seen = results.rating
    if seen is None:
        return None
    note = (
        f"{seen.subjects} subjects, {seen.minutes} minutes; killed after {seen.killed_after_minutes} and gone on with"
    )
    return Figure(seen.samples_per_second, note)


def _growth(seen: SettlementFigures) -> Figure:
    last = seen.scales[-1]
    return Figure(
        seen.growth,
        f"{last.developers} developers, {last.events} calls: indexed in {last.index.seconds:.1f} s "
        f"({last.index.peak_mib:.0f} MiB), settled in {last.settle.seconds:.1f} s ({last.settle.peak_mib:.0f} MiB)",
    )


def _webhooks(pick: Callable[[WebhookFigures], Figure]) -> Callable[[Results], Figure | None]:
    return lambda results: None if results.webhooks is None else pick(results.webhooks)


ROWS: Final = (
    Row("1", "(b) proxy only ÷ (n) nginx, calls per CPU second", "", 0.40, 0.90, True, lambda r: _per_cpu(r, "b")),
    Row("2", "(d) paid ÷ (n) nginx, calls per CPU second", "", 0.15, 0.40, True, lambda r: _per_cpu(r, "d")),
    Row("3", "(d) paid ÷ (b) proxy only, calls/s", "", 0.33, 0.75, True, lambda r: _calls(r, "b")),
    Row("4", "(d) paid ÷ (x) naive stack, calls/s", "", 30, 80, True, lambda r: _calls(r, "x")),
    Row("4b", "(d) with all limits and a plan ÷ without, calls/s", "", 0.9, 1.0, True, _limited),
    Row("4c", "paid with an Idempotency-Key ÷ without, calls/s", "", 0.6, 0.8, True, _intents),
    Row("5a", "rounds ÷ transaction per call, one hot vault", "", 25, 80, True, lambda r: _rounds(r, "hot")),
    Row("5b", "rounds ÷ transaction per call, many vaults", "", 20, 50, True, lambda r: _rounds(r, "many")),
    Row("6", "holds + captures: one hot vault ÷ many vaults", "", 0.8, 1.0, True, _hot_over_many),
    Row("7", "paid, 1 connection: p50 added over (b), in commits", "", 3.0, 2.0, False, _added_latency),
    Row("8", "paid, open loop at 60 %: p99 ÷ p50", "", 4, 2, False, _open_loop),
    Row("9", "1 MiB bodies, bytes per CPU second ÷ nginx, buffering on", "", 0.8, 1.8, True, _bodies),
    Row("10a", "base memory", "MiB", 100, 60, False, _memory(lambda m: Figure(m.base_mib))),
    Row(
        "10b",
        "memory of an active vault",
        "KiB",
        20,
        8,
        False,
        _memory(lambda m: Figure(m.active_vault_kib, f"{m.burst_vaults} at once; {m.touched_mib:.0f} MiB in the end")),
    ),
    Row("10c", "memory of an idle vault", "bytes", 0, 0, False, _memory(lambda m: Figure(m.idle_vault_bytes))),
    Row(
        "10d",
        "longest pause among 100 000 touched vaults",
        "ms",
        50,
        15,
        False,
        _memory(lambda m: Figure(m.pause_ms, f"{m.vaults} vaults; {m.pause_base_ms:.1f} ms with one")),
    ),
    Row("11", "two workers ÷ one, paid, unpinned, calls/s", "", 1.5, 1.9, True, _workers(_two_over_one)),
    Row("11b", "two workers with all limits and a plan ÷ without", "", 0.7, 0.9, True, _workers(_limited_over_two)),
    Row("12", "start to first paid call", "s", 2, 0.7, False, _start),
    Row("13", "slowest page of usage, database time", "ms", 50, 20, False, _usage),
    Row(
        "14a",
        "calls indexed as revenue",
        "/s",
        20_000,
        40_000,
        True,
        _settlement(lambda s: Figure(s.scales[-1].events_per_second, f"{s.scales[-1].events} calls")),
    ),
    Row(
        "14b",
        "transactions for 50 developers",
        "",
        2,
        2,
        False,
        _settlement(
            lambda s: Figure(
                s.scales[-1].transactions_per_50,
                f"{s.scales[-1].transactions} in all; {s.scales[-1].in_vain}".rstrip("; "),
            )
        ),
    ),
    Row("14c", "settling: time for a developer, largest size ÷ smallest", "", 1.2, 1.0, False, _settlement(_growth)),
    Row("15", "counters rated, samples", "/s", 20_000, 40_000, True, _rating),
    Row(
        "15a",
        "a backlog of webhooks",
        "/s",
        200,
        500,
        True,
        _webhooks(lambda w: Figure(w.events_per_second, f"{w.events} events to {w.endpoints} endpoints")),
    ),
    Row(
        "15b",
        "memory that it adds",
        "MiB",
        40,
        10,
        False,
        _webhooks(lambda w: Figure(w.peak_mib - w.base_mib, f"{w.base_mib:.0f} MiB before")),
    ),
    Row(
        "15c",
        "webhooks: p99 from what happens to its delivery",
        "s",
        3,
        1,
        False,
        _webhooks(lambda w: Figure(w.lag_p99_seconds, f"{w.steady_rate:.0f}/s; p50 {w.lag_p50_seconds:.2f} s")),
    ),
)
"""The figures to reach."""


def judge(results: Results) -> Iterator[Judged]:
    """Yield every row with its figure and verdict; a lane whose check failed has no figure."""
    for row in ROWS:
        try:
            figure = row.figure(results)
        except LookupError as missing:
            yield Judged(row, Figure(float("nan"), str(missing)), "no figure")
        else:
            yield Judged(row, figure, "not run" if figure is None else row.verdict(figure.value))


def render(machine: Machine, plan: Plan, results: Results) -> str:
    """Return the run as text: the machine, the lanes, the rows, and what failed."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    parts = [
        f"{date}, {plan.name} run: {plan.repetitions} interleaved repetitions of {plan.seconds} s; "
        f"medians, and (least to most)",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_mib} MiB, {machine.kernel}, "
        f"TCP {machine.congestion_control}, {machine.python}",
        versions,
    ]
    if results.lanes is not None:
        parts += [
            "",
            _table(("lane", "conns", "calls/s", "", "p50 ms", "p99 ms", "CPU µs", "PG µs"), _lanes(results.lanes)),
        ]
    if results.ledger is not None:
        lines = [
            (
                each.way,
                str(each.callers),
                str(each.vaults),
                _number(each.calls_per_second),
                _range(each.calls_per_second),
            )
            for each in results.ledger.runs
        ]
        parts += ["", _table(("durable deductions", "callers", "vaults", "calls/s", ""), lines)]
    if results.usage is not None:
        parts += ["", *_pages(results.usage)]
    if results.settlement is not None:
        sizes = [
            (
                str(each.developers),
                str(each.events),
                f"{each.index.seconds:.1f}",
                f"{each.index.peak_mib:.0f}",
                f"{each.settle.seconds:.1f}",
                f"{each.settle.peak_mib:.0f}",
                str(each.settlements),
                str(each.transactions),
            )
            for each in results.settlement.scales
        ]
        head = ("settled developers", "calls", "index s", "MiB", "settle s", "MiB", "settlements", "transactions")
        parts += ["", _table(head, sizes)]
    if results.history is not None:
        aged = [
            (
                f"{each.which}, {each.events} past calls",
                f"{each.calls_per_second:.0f}",
                f"{each.call_ms:.1f}",
                f"{each.first_ms:.1f}",
                f"{each.refused_ms:.1f}",
            )
            for each in results.history
        ]
        columns = ("vault with limits", "calls/s", "hold and capture ms", "first hold ms", "refusal ms")
        parts += ["", _table(columns, aged)]
    judged = [
        (
            each.row.number,
            each.row.title,
            _measured(each),
            f"{each.row.least:g}",
            f"{each.row.aim:g}",
            each.verdict,
            "" if each.figure is None else each.figure.note,
        )
        for each in judge(results)
    ]
    parts += ["", _table(("#", "figure", "measured", "least", "aim", "verdict", ""), judged)]
    parts += ["", *(f"NO FIGURE: {complaint}" for complaint in results.complaints())]
    return "\n".join(parts)


def _pages(usage: UsageFigures) -> Iterator[str]:
    """Yield every page's plans, then the table of pages."""
    for page in usage.pages:
        yield f"== {page.name}"
        yield from page.plans
    yield ""
    lines = [
        (page.name, f"{page.ms:.1f}", f"{page.asked_ms:.1f}", str(page.statements), str(page.buffers))
        for page in sorted(usage.pages, key=lambda page: -page.ms)
    ]
    yield _table(("page of usage", "database ms", "asked ms", "statements", "buffers"), lines)
    yield (
        f"{usage.events} calls, counted at {usage.events_counted_per_second:.0f}/s from nothing; a pass over a minute "
        f"of 1000 calls/s takes {usage.pass_ms:.0f} ms, with nothing new {usage.idle_pass_ms:.0f} ms"
    )


def _measured(judged: Judged) -> str:
    if judged.figure is None or judged.verdict == "no figure":
        return "-"
    return f"{judged.figure.value:.3g} {judged.row.unit}".rstrip()


def _lanes(lanes: Sequence[LaneFigure]) -> Iterator[tuple[str, ...]]:
    for lane in sorted(lanes, key=lambda each: each.connections):
        name = f"({lane.letter}) {lane.title}"
        if lane.complaints:
            yield name, str(lane.connections), "no figure", *("",) * 5
            continue
        yield (
            name,
            str(lane.connections),
            _number(lane.calls_per_second),
            _range(lane.calls_per_second),
            f"{lane.p50_ms.median:.2f}",
            f"{lane.p99_ms.median:.2f}",
            f"{lane.gateway_us.median:.0f}",
            f"{lane.postgres_us.median:.0f}",
        )


def _number(figure: Spread) -> str:
    return f"{figure.median:,.0f}".replace(",", " ")


def _range(figure: Spread) -> str:
    return f"({figure.least:.0f} to {figure.most:.0f})"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numeric = [all(_is_number(line[column]) for line in lines[1:]) for column in range(len(head))]

    def cells(line: Sequence[str]) -> Iterator[str]:
        for text, width, right in zip(line, widths, numeric, strict=True):
            yield text.rjust(width) if right else text.ljust(width)

    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)


def _is_number(text: str) -> bool:
    return not text or text in ("-", "no figure") or text.replace(" ", "").replace(".", "", 1).isdigit()


def save(path: Path, machine: Machine, plan: Plan, results: Results) -> None:
    """Write the run as JSON: date, machine, plan, every figure with its spread, every row with its verdict."""
    rows = [
        {
            "row": each.row.number,
            "figure": each.row.title,
            "unit": each.row.unit,
            "least": each.row.least,
            "aim": each.row.aim,
            "measured": None if each.figure is None or each.verdict == "no figure" else each.figure.value,
            "note": "" if each.figure is None else each.figure.note,
            "verdict": each.verdict,
        }
        for each in judge(results)
    ]
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": attrs.asdict(machine),
        "plan": attrs.asdict(plan),
        "rows": rows,
        "complaints": results.complaints(),
        **attrs.asdict(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
