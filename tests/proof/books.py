"""The books of a load held against the stored ones: what callers were told, what the upstream saw, what was charged."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import attrs
import trio

from callora.ledger.money import parse_usdc
from callora.store.audit import audit
from callora.store.bridge import Database, open_database
from tests.support.processes import POLL_SECONDS, Caller, CalloraProcess, Load
from tests.support.service import Consumer, running_service
from tests.support.upstream import Exchange, RawUpstream, head_bytes, raw_upstream

PRICE: Final = parse_usdc("0.01")
API: Final = "proved"
DEPOSIT: Final = "10000"


@attrs.frozen
class Scene:
    """A database with an API and two people who pay, and the upstream behind the API."""

    dsn: str
    upstream: RawUpstream
    plain: Consumer
    """Pays for calls without an Idempotency-Key."""
    keyed: Consumer
    """Pays for calls with one."""

    def load(self, port: int, seed: int) -> Load:
        """Return a load of both kinds."""
        return Load(port, API, self.plain.api_key, self.keyed.api_key, seed=seed)


def answer_uniquely(seconds: float) -> "Answering":
    """Answer every request with a number of its own, after a while."""
    return Answering(seconds)


class Answering:
    """An upstream's handler: 200 with a number that no other answer has, so that a replay can be told."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._count = 0

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.read_body()
        self._count += 1
        body = b'{"answer":%d}' % self._count
        # Some answers at once, some after a while: a process is to be hit before, during and after its upstream's work.
        await trio.sleep(self._seconds * (self._count % 4) / 3)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        await exchange.send(head_bytes(200, headers) + body)


@asynccontextmanager
async def scene(dsn: str, upstream_seconds: float = 0.03) -> AsyncIterator[Scene]:
    """Seed a migrated database and run the upstream."""
    async with raw_upstream(answer_uniquely(upstream_seconds)) as upstream:
        async with running_service(dsn) as service:
            await service.api(API, upstream.url)
            plain, keyed = await service.consumer(DEPOSIT), await service.consumer(DEPOSIT)
        yield Scene(dsn, upstream, plain, keyed)


async def first_paid(process: CalloraProcess, port: int, api_key: str, path: str = f"/v1/call/{API}/probe") -> float:
    """Ask again and again until a call is served; return when that was, on the machine's monotonic clock."""
    answer = None
    async with Caller(port, api_key) as caller:
        with trio.move_on_after(30):
            while process.popen.poll() is None:
                answer = await caller.call(path)
                if answer.whole and answer.status == 200:
                    return answer.ended
                await trio.sleep(POLL_SECONDS)
    raise process.never(f"no paid answer; the last one was {answer}")


@asynccontextmanager
async def books(dsn: str) -> AsyncIterator[Database]:
    """Open the database beside the service, as an auditor does."""
    async with open_database(dsn, pool_max=2) as database:
        yield database


async def assert_audit_clean(database: Database) -> None:
    """Fail with the rules that are broken."""
    findings = await audit(database, datetime.now(UTC))
    wrong = [finding for finding in findings if finding.wrong]
    assert not wrong, wrong


async def overdue_seconds(database: Database) -> float:
    """Return by how much the most overdue open hold has outlived its time; 0 where none has."""
    seconds = await database.fetch_value(
        "SELECT coalesce(extract(epoch FROM max(now() - expires_at)), 0)::float8 FROM usage_events WHERE state = 'held'"
    )
    assert isinstance(seconds, float)
    return max(0.0, seconds)


async def until_no_hold(database: Database, seconds: float) -> None:
    """Wait until no hold is open."""
    with trio.fail_after(seconds):
        while await database.fetch_value("SELECT count(*) FROM usage_events WHERE state = 'held'"):  # noqa: ASYNC110
            await trio.sleep(0.05)


@attrs.frozen
class Sums:
    """What the books say in the end, for the proof's figures."""

    told: int
    """Charges that callers were told of, in calls."""
    captured: int
    """Captured usage events."""
    refunded: int
    intents: int
    replays: int
    states: Mapping[str, int]
    """Usage events by state."""


async def assert_books_agree(database: Database, scene: Scene, load: Load) -> Sums:
    """Hold everything against everything, after the load has settled and no hold is open."""
    await assert_audit_clean(database)
    hits = Counter(request.target for request in scene.upstream.requests)

    # Plain calls: nothing is told that is not stored, and nothing is delivered unpaid.
    for answer in load.plain:
        assert answer.charge == (PRICE if answer.status == 200 else 0), answer
    plain_captured = await _captured(database, scene.plain)
    told_plain = sum(answer.charge > 0 for answer in load.plain)
    assert told_plain <= plain_captured <= sum(count for target, count in hits.items() if "/keyed/" not in target)

    # Keyed calls: one intent, one charge, one answer, and one upstream call but for those that a crash cut.
    replays = 0
    paid_for: set[str] = set()
    for intent in load.intents:
        first, *others = intent.answered
        assert all((other.status, other.body) == (first.status, first.body) for other in others), intent
        assert sum(answer.charge > 0 for answer in intent.answers) <= 1, intent
        replays += sum(answer.header("Idempotent-Replayed") == "true" for answer in intent.answered)
        cut = sum(not answer.whole or answer.status in (502, 503, 504) for answer in intent.answers)
        expired = sum(answer.code == "HOLD_EXPIRED" for answer in intent.answers)  # an outage as long as the hold
        calls = hits[intent.target.removeprefix(f"/v1/call/{API}")]
        assert 1 <= calls <= 1 + cut + expired, (intent, calls)
        if first.status == 200:
            paid_for.add(intent.key)
        else:  # our own word for an upstream that failed: final and free
            assert first.status in (502, 504), intent
    paid = await database.fetch(
        """
        SELECT k.key, u.state::text AS state, u.amount,
               (SELECT count(*) FROM ledger_entries e
                WHERE e.vault_id = k.vault_id AND e.event_id = k.event_id AND e.kind = 'refund') AS refunds
        FROM idempotency_keys k JOIN usage_events u ON u.vault_id = k.vault_id AND u.event_id = k.event_id
        WHERE k.vault_id = $1 AND k.charge <> 0
        """,
        scene.keyed.vault_id,
    )
    for row in paid:
        assert (row["state"], row["amount"], row["refunds"]) == ("captured", PRICE, 0), dict(row)
    assert {row["key"] for row in paid} == paid_for
    refunded = await database.fetch_value("SELECT count(*) FROM ledger_entries WHERE kind = 'refund'")
    keyed_captured = await _captured(database, scene.keyed)
    refunded_keyed = await database.fetch_value(
        "SELECT count(*) FROM ledger_entries WHERE kind = 'refund' AND vault_id = $1", scene.keyed.vault_id
    )
    assert keyed_captured - refunded_keyed == len(paid_for)

    # The whole: what came in less what was spent is what is there.
    whole = await database.fetch_row(
        """
        SELECT (SELECT sum(amount) FROM ledger_entries)::bigint
                   - (SELECT coalesce(sum(amount), 0) FROM usage_events WHERE state = 'captured')::bigint AS left_over,
               (SELECT sum(available) FROM vaults)::bigint AS available, (SELECT sum(held) FROM vaults)::bigint AS held
        """
    )
    assert whole is not None
    assert (whole["available"], whole["held"]) == (whole["left_over"], 0)
    states = await database.fetch("SELECT state::text AS state, count(*) AS count FROM usage_events GROUP BY 1")
    return Sums(
        told=told_plain + sum(answer.charge > 0 for answer in load.keyed),
        captured=plain_captured + keyed_captured,
        refunded=refunded,
        intents=len(load.intents),
        replays=replays,
        states={row["state"]: row["count"] for row in states},
    )


async def _captured(database: Database, consumer: Consumer) -> int:
    count = await database.fetch_value(
        "SELECT count(*) FROM usage_events WHERE vault_id = $1 AND state = 'captured'", consumer.vault_id
    )
    assert isinstance(count, int)
    return count
