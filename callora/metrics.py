"""Metrics: every series Callora exports, each with its unit and labels, in one place.

A `Metrics` object owns its registry; nothing is global, so two services in one process never mix. Labels hold only
what is bounded: route templates, outcomes, codes, API ids; never a URL, a key or a vault.
"""

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

import attrs
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
"""What `Metrics.render` returns."""

OTHER: Final = "other"
"""The label value that takes what exceeds a family's bound."""

_FAMILY_CHILDREN_MAX: Final = 5000
_HTTP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_UPSTREAM_SECONDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROUND_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5)
_ROUND_COMMANDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)

BREAKER_STATES: Final = {"closed": 0, "open": 1, "half_open": 2}
"""The values of gateway_upstream_breaker_state."""

M = TypeVar("M", Counter, Gauge, Histogram)


@attrs.frozen
class Described:
    """One family as docs/metrics.md shows it."""

    name: str
    """Its name as Prometheus sees it; counters end in _total."""
    kind: str
    """counter, gauge or histogram."""
    labels: tuple[str, ...]
    """Its labels, in the order in which `Family.of` takes their values."""
    unit: str
    """What one unit of it is."""
    meaning: str
    """What it counts or shows."""


class Family(Generic[M]):
    """A labelled metric whose children are kept: finding one costs a dictionary look-up instead of a microsecond.

    A family has a bound. Past it new combinations share one child whose labels all say "other", so that a label that
    grows without bound costs precision, not memory.
    """

    def __init__(self, metric: M, labels_count: int, children_max: int = _FAMILY_CHILDREN_MAX) -> None:
        self._metric: M = metric
        self._children: dict[tuple[str, ...], M] = {}
        self._children_max = children_max
        self._overflow = (OTHER,) * labels_count

    def of(self, *values: str) -> M:
        """Return the child with these label values, in the order in which the family names its labels."""
        child = self._children.get(values)
        if child is None:
            child = self._make(values)
        return child

    def forget(self, *values: str) -> None:
        """Drop the child with these values, such as that of a deleted API. Unknown values are no error."""
        if self._children.pop(values, None) is not None:
            self._metric.remove(*values)

    def _make(self, values: tuple[str, ...]) -> M:
        if len(self._children) >= self._children_max and values != self._overflow:
            return self.of(*self._overflow)
        # labels() itself refuses a wrong number of values
        child: M = self._metric.labels(*values)
        self._children[values] = child
        return child


class Tally:
    """A counter on the hot path: one addition a count, carried over to its metric by `Metrics.flush`."""

    __slots__ = ("_counter", "value")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.value = 0

    def flush(self) -> None:
        """Carry over what was counted since the last flush."""
        if self.value:
            value, self.value = self.value, 0
            self._counter.inc(value)


class _WithoutCreated(Collector):
    """A registry without its `_created` samples: they double the scrape and say what a reset already shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """All series of one process. Attributes without labels are metrics; those with labels are `Family`s."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry(auto_describe=True)
        self._described: list[Described] = []
        self._exported = _WithoutCreated(self.registry)
        self._tallies: dict[int, Tally] = {}

        # HTTP, on both transports
        http = ("method", "route", "status_code", "route_group")
        self.http_requests = self._counters(
            "http_requests_total",
            http,
            "requests",
            "Requests answered. `route` is a template; `route_group` is gateway, health, metrics or other.",
        )
        self.http_request_seconds = self._histograms(
            "http_request_duration_seconds",
            http,
            "seconds",
            "From the request's head to the last byte of its answer.",
            _HTTP_SECONDS,
        )
        self.service_requests = self._counters(
            "callora_service_requests_total",
            ("operation", "status_code"),
            "requests",
            "Requests on routes for services, refused ones as well; `operation` is its id in the OpenAPI document.",
        )
        self.connections = self._gauge("callora_connections", "connections", "Open client connections.")
        self.inflight_calls = self._gauge(
            "callora_inflight_calls", "calls", "Calls accepted on `/v1/call` and not yet answered."
        )
        self.draining = self._gauge("callora_draining", "0 or 1", "1 from SIGTERM on.")
        self.log_records_dropped = self._counter(
            "callora_log_records_dropped_total", "records", "Log records dropped because their buffer was full."
        )

        # The call
        self.api_key_lookups = self._counters(
            "gateway_api_key_lookup_total",
            ("outcome",),
            "look-ups",
            "API keys looked up: hit, miss, revoked, expired or disabled.",
        )
        self.calls = self._counters(
            "callora_calls_total", ("outcome",), "calls", "Calls that reached the hold, by the outcome recorded."
        )
        self.refusals = self._counters(
            "callora_refusals_total", ("code",), "calls", "Calls refused, by the code of docs/errors.md."
        )
        self.rate_limit_undecided = self._counters(
            "callora_rate_limit_undecided_total",
            ("mode", "why"),
            "calls",
            "Calls whose shared rate limits the store did not decide: refused where RATE_LIMIT_ON_FAILURE is closed, "
            "decided by this process alone where it is open. why is unreachable (or known to be away), timeout (after "
            "100 ms) or refused (it answered with an error).",
        )
        self.rate_limit_store_up = self._gauge(
            "callora_rate_limit_store_up",
            "0 or 1",
            "1 while the store of shared rate limits answers in time; 0 also without REDIS_URL.",
        )
        self.premature_aborts = self._counter(
            "proxy_premature_aborts_total", "calls", "Calls whose client left before the upstream answered."
        )
        upstream = ("api_id", "method", "status_code", "outcome")
        self.upstream_seconds = self._histograms(
            "gateway_upstream_duration_seconds",
            upstream,
            "seconds",
            "From the upstream request to the head of its answer; outcome is success, timeout or error. "
            "Recorded with GATEWAY_PROFILING_ENABLED.",
            _UPSTREAM_SECONDS,
        )
        self.upstream_requests = self._counters(
            "gateway_upstream_requests_total",
            upstream,
            "requests",
            "Requests sent upstream. Recorded with GATEWAY_PROFILING_ENABLED.",
        )
        self.upstream_breaker_state = self._gauges(
            "gateway_upstream_breaker_state", ("api_id",), "state", "An API's breaker: 0 closed, 1 open, 2 half-open."
        )

        # The ledger
        self.charged_stroops = self._counter(
            "callora_charged_stroops_total", "stroops", "What captured calls were charged."
        )
        self.rounds = self._counters(
            "callora_rounds_total",
            ("result",),
            "rounds",
            "Rounds of the ledger: stored, refused, or the fault that ended one (StoreUnavailable, OutcomeUnknown).",
        )
        self.round_commands = self._histogram(
            "callora_round_commands", "commands", "Commands that one round carried.", _ROUND_COMMANDS
        )
        self.round_seconds = self._histogram(
            "callora_round_duration_seconds", "seconds", "One round, from its statement to its commit.", _ROUND_SECONDS
        )
        self.vault_mailbox_depth_max = self._gauge(
            "callora_vault_mailbox_depth_max",
            "commands",
            "The longest queue of any vault; its bound: ACTOR_MAILBOX_MAX.",
        )
        self.active_vaults = self._gauge("callora_active_vaults", "vaults", "Vaults that have an actor now.")
        self.actor_restarts = self._counter(
            "callora_actor_restarts_total", "restarts", "Actors that crashed and were started again."
        )
        self.expired_holds = self._counter(
            "callora_expired_holds_total", "holds", "Holds that nobody closed and the sweep released."
        )
        self.catalogue_age_seconds = self._gauge(
            "callora_catalogue_age_seconds", "seconds", "Since keys, APIs and prices were last read."
        )

        # Money, from the background audit: what must hold, watched
        self.available_stroops = self._gauge("callora_available_stroops", "stroops", "Σ available over all vaults.")
        self.held_stroops = self._gauge("callora_held_stroops", "stroops", "Σ held over all vaults.")
        self.owed_stroops = self._gauge(
            "callora_owed_stroops", "stroops", "Σ owed over all vaults: what counters charged beyond their balances."
        )
        self.unsettled_stroops = self._gauge(
            "callora_unsettled_stroops", "stroops", "Σ earned by developers and not paid yet, sealed or not."
        )
        self.ledger_drift_stroops = self._gauge(
            "callora_ledger_drift_stroops",
            "stroops",
            "Σ balances minus Σ ledger entries and captures; anything but 0 is an alarm.",
        )
        self.hold_oldest_seconds = self._gauge(
            "callora_hold_oldest_seconds",
            "seconds",
            "The age of the oldest open hold; its bound: HOLD_TTL_SECONDS, or what a service asked for.",
        )
        self.hold_overdue_seconds = self._gauge(
            "callora_hold_overdue_seconds",
            "seconds",
            "How long ago the most overdue hold that the last sweep saw should have ended; expected: below "
            "HOLD_SWEEP_INTERVAL_SECONDS.",
        )

        self.usage_rollup_lag_seconds = self._gauge(
            "callora_usage_rollup_lag_seconds",
            "seconds",
            "How far sums of usage are behind the calls; expected: USAGE_ROLLUP_INTERVAL_MS, and some 20 s under load.",
        )
        self.usage_streams = self._gauge("callora_usage_streams", "streams", "Open streams of live usage.")
        self.usage_streams_ended = self._counters(
            "callora_usage_streams_ended_total",
            ("reason",),
            "streams",
            "Streams of live usage that ended: client_gone, or what their clients were told: draining, lagged, "
            "session_ended, token_expired, restarted.",
        )
        self.usage_stream_lag_seconds = self._gauge(
            "callora_usage_stream_lag_seconds",
            "seconds",
            "Of the calls that were last sent to streams, how long the oldest had ended; expected: about "
            "USAGE_STREAM_INTERVAL_MS.",
        )

        # Settlement
        self.revenue_lag_seconds = self._gauge(
            "callora_revenue_lag_seconds",
            "seconds",
            "How far revenue is behind the calls; expected: REVENUE_LEDGER_INDEXER_INTERVAL_MS, and some 100 s under "
            "load.",
        )
        self.collect_runs = self._counters(
            "callora_collect_runs_total",
            ("job", "status"),
            "runs",
            "Runs that read meter sources or rated what was pushed: ok, partial or error.",
        )
        self.meter_samples = self._counters(
            "callora_meter_samples_total",
            ("result",),
            "samples",
            "Samples of counters that runs were given: processed, quarantined (of nobody known) or invalid.",
        )
        self.meter_source_read_until = self._gauges(
            "callora_meter_source_read_until_seconds",
            ("source_id",),
            "seconds since 1970",
            "How far a meter source is read, by the process that collects; expected: within COLLECT_INTERVAL and 2 "
            "minutes of now.",
        )
        self.settlements_open = self._gauge(
            "callora_settlements_open", "settlements", "Settlements that have not ended, by the process that runs them."
        )
        self.settlement_oldest_seconds = self._gauge(
            "callora_settlement_oldest_seconds",
            "seconds",
            "The age of the oldest of them; expected: below two time bounds of 90.",
        )
        self.settlements_ended = self._counters(
            "callora_settlements_ended_total",
            ("outcome",),
            "settlements",
            "Settlements that ended in this process: completed, or failed, whose revenue is released.",
        )
        self.settled_stroops = self._counter(
            "callora_settled_stroops_total", "stroops", "Credited on chain by settlements that this process completed."
        )
        self.settlement_waits = self._counters(
            "callora_settlement_waits_total",
            ("why",),
            "waits",
            "Times that a settlement, or a run, could not go on: cap (of a key's hour), halted, contract (its answer "
            "is in the log), underfunded (the vault contract has less than was earned).",
        )
        self.settlement_late_successes = self._counter(
            "callora_settlement_late_successes_total",
            "transactions",
            "Charges or credits found in a ledger after they were proven dead: an alarm, settlement is halted.",
        )
        self.discrepancies_open = self._gauges(
            "callora_discrepancies_open",
            ("kind",),
            "discrepancies",
            "What did not add up when the books were last compared and no operator has cleared, by the process that "
            "compared: MISSING_TX, STALE_PENDING, FALSE_FAILURE, UNEXPECTED_STATUS, DRIFT; anything but 0 is an alarm.",
        )
        self.books_compared_at = self._gauge(
            "callora_books_compared_timestamp_seconds",
            "seconds",
            "When this process last compared usage, revenue, settlements and the chain; expected: one process's within "
            "SETTLEMENT_RECON_INTERVAL_MS.",
        )
        self.books_untold = self._gauge(
            "callora_books_untold",
            "questions",
            "Transactions and addresses of which no node could tell in that comparison.",
        )
        self.developer_withdrawals = self._counters(
            "callora_developer_withdrawals_total",
            ("stage",),
            "withdrawals",
            "Withdrawals of developers that came to a stage in this process: approving, pending, confirmed, failed.",
        )

        # The chain
        self.chain_requests = self._counters(
            "callora_chain_requests_total",
            ("source", "method", "outcome"),
            "requests",
            "Requests to the chain's nodes; source is rpc or horizon, outcome is answered or why there was no answer: "
            "unreachable, timeout, rate_limited, status, malformed, error or refused.",
        )
        self.chain_breaker_state = self._gauges(
            "callora_chain_breaker_state",
            ("breaker",),
            "state",
            "The breaker of chain:rpc or chain:horizon: 0 closed, 1 open, 2 half-open.",
        )
        self.chain_head_ledger = self._gauge(
            "callora_chain_head_ledger", "ledgers", "The newest ledger that a node has named."
        )
        self.chain_lag_seconds = self._gauge(
            "callora_chain_lag_seconds",
            "seconds",
            "Since that ledger closed, or since the start where none was named; expected: about 5, at most 15.",
        )
        self.chain_halted = self._gauge(
            "callora_chain_halted", "0 or 1", "1 where what answers is not what was configured: the log says what."
        )

        # What the chain says, and what was made of it
        self.chain_events = self._counters(
            "callora_chain_events_total",
            ("kind",),
            "events",
            "Events of the vault contract noted: deposit, withdraw, withdraw_to, deduct or distribute.",
        )
        self.chain_listener_lag_ledgers = self._gauge(
            "callora_chain_listener_lag_ledgers",
            "ledgers",
            "How far the events noted are behind the newest ledger; expected: 0 or 1.",
        )
        self.listener_halted = self._gauge(
            "callora_chain_listener_halted",
            "0 or 1",
            "1 where another history is suspected: nothing is noted or credited until a new epoch is begun.",
        )
        self.chain_gaps = self._counter(
            "callora_chain_gaps_total",
            "gaps",
            "Times that ledgers had to be passed over because no node has them any more.",
        )
        self.chain_drift_stroops = self._gauge(
            "callora_chain_drift_stroops",
            "stroops",
            "What the vault contract has minus what the ledger says it should have; anything but 0 is an alarm.",
        )
        self.chain_suspense_stroops = self._gauge(
            "callora_chain_suspense_stroops", "stroops", "Deposits of nobody known, waiting to be claimed or assigned."
        )
        self.chain_unbooked_stroops = self._gauge(
            "callora_chain_unbooked_stroops",
            "stroops",
            "Deposits seen and not credited yet; expected: 0 most of the time.",
        )

        # Transactions that Callora sends
        self.chain_transactions_open = self._gauges(
            "callora_chain_transactions_open",
            ("state",),
            "transactions",
            "Stored and not ended: stored, sent, or unresolved, which waits for an operator; of all processes.",
        )
        self.chain_transaction_oldest_seconds = self._gauge(
            "callora_chain_transaction_oldest_seconds",
            "seconds",
            "The age of the oldest transaction that has not ended; expected: below its time bound of 90, a deposit's "
            "of STELLAR_TRANSACTION_TIMEOUT.",
        )
        self.chain_transactions_ended = self._counters(
            "callora_chain_transactions_ended_total",
            ("outcome",),
            "transactions",
            "Ended by this process: succeeded, failed (in a ledger), expired (never applied, by time), refused (never "
            "taken).",
        )
        self.chain_sends = self._counters(
            "callora_chain_sends_total",
            ("answer",),
            "sends",
            "Sends of transactions by their answer: pending, duplicate, try_again_later, refused, unsent (provably), "
            "unknown.",
        )
        self.chain_fee_bumps = self._counter(
            "callora_chain_fee_bumps_total", "fee-bumps", "Fee-bumps made around transactions that were stuck."
        )
        self.chain_channels_free = self._gauge(
            "callora_chain_channels_free", "channels", "Channel accounts that no transaction uses now."
        )
        self.chain_channels_set_aside = self._gauge(
            "callora_chain_channels_set_aside", "channels", "Channel accounts that could not pay a fee: top them up."
        )
        self.chain_submitter_stopped = self._gauge(
            "callora_chain_submitter_stopped",
            "0 or 1",
            "1 where a refusal says that keys or network are wrong: nothing is sent until a restart.",
        )

        # Webhooks
        self.webhook_attempts = self._counters(
            "callora_webhook_attempts_total",
            ("outcome",),
            "attempts",
            "Attempts to tell an endpoint of an event: delivered, again (a status that is tried again), refused, gone, "
            "unanswered.",
        )
        self.webhook_dead = self._counter(
            "callora_webhook_dead_total", "deliveries", "Deliveries given up; their owners may have them made again."
        )
        self.webhook_lag_seconds = self._histogram(
            "callora_webhook_lag_seconds",
            "seconds",
            "From what happened to the endpoint's success; expected: around WEBHOOK_POLL_INTERVAL_MS where endpoints "
            "answer.",
            (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200),
        )
        self.webhook_turns = self._gauge(
            "callora_webhook_turns", "turns", "Endpoints that this process tells something now; at most 64."
        )

        self.charged = self._tally_of(self.charged_stroops)
        """The tally of charged_stroops."""
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    @property
    def described(self) -> tuple[Described, ...]:
        """Callora's own families, in the order of docs/metrics.md; those of the process and of Python come besides."""
        return tuple(self._described)

    def tally(self, family: Family[Counter], *values: str) -> Tally:
        """Return the tally of a family's child, always the same one."""
        return self._tally_of(family.of(*values))

    def _tally_of(self, counter: Counter) -> Tally:
        tally = self._tallies.get(id(counter))
        if tally is None:
            tally = self._tallies[id(counter)] = Tally(counter)
        return tally

    def flush(self) -> None:
        """Carry every tally over to its metric: several times a second, and before a scrape."""
        for tally in self._tallies.values():
            tally.flush()

    def render(self) -> bytes:
        """Return all series as Prometheus text. Takes milliseconds with many routes: call it in a thread."""
        return generate_latest(self._exported)

    def _describe(self, name: str, kind: str, labels: tuple[str, ...], unit: str, meaning: str) -> None:
        self._described.append(Described(name, kind, labels, unit, meaning))

    def _counter(self, name: str, unit: str, meaning: str) -> Counter:
        self._describe(name, "counter", (), unit, meaning)
        return Counter(name, meaning, registry=self.registry)

    def _counters(self, name: str, labels: tuple[str, ...], unit: str, meaning: str) -> Family[Counter]:
        self._describe(name, "counter", labels, unit, meaning)
        return Family(Counter(name, meaning, labels, registry=self.registry), len(labels))

    def _gauge(self, name: str, unit: str, meaning: str) -> Gauge:
        self._describe(name, "gauge", (), unit, meaning)
        return Gauge(name, meaning, registry=self.registry)

    def _gauges(self, name: str, labels: tuple[str, ...], unit: str, meaning: str) -> Family[Gauge]:
        self._describe(name, "gauge", labels, unit, meaning)
        return Family(Gauge(name, meaning, labels, registry=self.registry), len(labels))

    def _histogram(self, name: str, unit: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        self._describe(name, "histogram", (), unit, meaning)
        return Histogram(name, meaning, registry=self.registry, buckets=buckets)

    def _histograms(
        self, name: str, labels: tuple[str, ...], unit: str, meaning: str, buckets: tuple[float, ...]
    ) -> Family[Histogram]:
        self._describe(name, "histogram", labels, unit, meaning)
        return Family(Histogram(name, meaning, labels, registry=self.registry, buckets=buckets), len(labels))
