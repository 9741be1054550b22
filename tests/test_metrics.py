"""Metrics: what is exported is documented, bounded, and no one else's."""

import re
from pathlib import Path

import pytest

from callora.metrics import CONTENT_TYPE, OTHER, Family, Metrics

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_every_metric_is_documented_with_its_labels_and_unit() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    expected = [
        (each.name, each.kind, ", ".join(f"`{label}`" for label in each.labels) or "–", each.unit, each.meaning)
        for each in Metrics().described
    ]
    assert rows == expected


def test_every_metric_described_is_registered_and_the_other_way_round() -> None:
    metrics = Metrics()
    exported = dict(re.findall(r"^# TYPE (\S+) (\w+)$", metrics.render().decode(), re.MULTILINE))
    own = {name: kind for name, kind in exported.items() if not name.startswith(("process_", "python_"))}
    assert own == {each.name: each.kind for each in metrics.described}
    assert exported["process_resident_memory_bytes"] == "gauge"


def test_a_scrape_is_plain_text_without_creation_times() -> None:
    metrics = Metrics()
    metrics.calls.of("captured").inc()
    metrics.round_seconds.observe(0.003)
    text = metrics.render().decode()
    assert 'callora_calls_total{outcome="captured"} 1.0\n' in text
    assert 'callora_round_duration_seconds_bucket{le="0.005"} 1.0\n' in text
    assert "_created" not in text
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_two_services_in_one_process_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.draining.set(1)
    assert "callora_draining 0.0" in other.render().decode()


def test_a_child_is_found_again_and_a_forgotten_one_is_not_exported() -> None:
    metrics = Metrics()
    child = metrics.upstream_breaker_state.of("api-1")
    assert metrics.upstream_breaker_state.of("api-1") is child
    child.set(1)
    metrics.upstream_breaker_state.forget("api-1")
    metrics.upstream_breaker_state.forget("api-2")
    assert "api-1" not in metrics.render().decode()


def test_a_label_without_bound_costs_one_child_past_the_limit() -> None:
    metrics = Metrics()
    raw = metrics.calls._metric
    family = Family(raw, labels_count=1, children_max=2)
    for value in ("a", "b", "c", "d"):
        family.of(value).inc()
    assert family.of("c") is family.of(OTHER)
    text = metrics.render().decode()
    assert f'callora_calls_total{{outcome="{OTHER}"}} 2.0' in text
    assert 'outcome="c"' not in text


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="label"):
        Metrics().calls.of("captured", "surplus")
