"""Collecting, pure: windows, how far a source is read, what a source may be, what a run came to."""

from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callora.ledger.collecting import (
    MINUTE,
    Counted,
    Difference,
    SourceOffer,
    SourceOutcome,
    Window,
    check_url,
    clash_of,
    judge,
    misdated,
    parse_offer,
    read_until,
    window_at,
)
from callora.ledger.ids import ApiId, EndpointId
from callora.ledger.images import Image, parse_image
from callora.ledger.snapshots import MeterSource, Snapshot

OVERLAP = timedelta(minutes=2)
NOW = datetime(2026, 11, 22, 10, 7, 42, 5, UTC)
UNTIL = datetime(2026, 11, 22, 10, 6, tzinfo=UTC)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFER = {"source_id": "jp-1", "base_url": "https://jp.example/x/", "expected_node_id": "jp", "expected_env": "prod"}


def test_c10_a_window_ends_a_minute_before_this_one_and_begins_an_overlap_before_it() -> None:
    assert window_at(NOW, None, OVERLAP) == Window(UNTIL - OVERLAP, UNTIL)
    completed = datetime(2026, 11, 22, 9, 59, 30, 250, UTC)
    assert window_at(NOW, completed, OVERLAP) == Window(completed - OVERLAP, UNTIL)


def test_c10_where_a_window_begins_after_it_ends_the_watermark_is_its_end() -> None:
    window = window_at(NOW, NOW + timedelta(hours=1), OVERLAP)
    assert window.since > window.until
    assert read_until(window, None) == UNTIL


def test_c12_the_watermark_is_the_earlier_of_the_windows_end_and_the_latest_snapshot() -> None:
    window = Window(UNTIL - OVERLAP, UNTIL)
    seen = UNTIL - timedelta(seconds=30, microseconds=7)
    assert read_until(window, seen) == seen
    assert read_until(window, UNTIL + MINUTE) == UNTIL
    assert read_until(window, None) == UNTIL


@given(st.timedeltas(timedelta(days=-400), timedelta(days=400)), st.timedeltas(timedelta(days=-2), timedelta(days=2)))
def test_the_next_window_leaves_no_gap(ago: timedelta, latest: timedelta) -> None:
    window = window_at(NOW, NOW - ago, OVERLAP)
    reached = read_until(window, NOW + latest)
    assert reached <= window.until
    following = window_at(NOW + MINUTE, reached, OVERLAP)
    assert following.since < reached
    assert following.until == window.until + MINUTE


def source(**changes: Any) -> MeterSource:
    made = MeterSource("jp-1", "https://jp.example", "jp", "prod", ApiId(1), EndpointId(1))
    return attrs.evolve(made, **changes)


def test_c13_snapshots_of_another_node_or_environment_or_of_the_future_are_told() -> None:
    good = Snapshot("jp", "prod", NOW, (), 0)
    assert misdated(source(), [good], NOW) is None
    assert misdated(source(expected_node_id="", expected_env=""), [Snapshot("x", "y", NOW, (), 0)], NOW) is None
    for bad in (
        Snapshot("us", "prod", NOW, (), 0),
        Snapshot("jp", "preview", NOW, (), 0),
        Snapshot("jp", "prod", NOW + timedelta(minutes=6), (), 0),
    ):
        assert misdated(source(), [good, bad], NOW) is not None


@pytest.mark.parametrize(
    "text", ["https://a.example", "https://a.example:8443/base/", "http://localhost:9", "http://[::1]"]
)
def test_a_source_may_be_https_anywhere_and_http_here(text: str) -> None:
    assert check_url(text) == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    [
        "http://a.example",
        "https://",
        "ftp://a.example",
        "https://u:p@a.example",
        "https://a.example/?x=1",
        "https://a.example/#x",
        "https://a.example?",
        "https://a.example:0",
        "https://a.example:99999",
        "https://a b.example",
        "http://localhost.example",
    ],
)
def test_wc17_no_source_is_plain_http_elsewhere_or_carries_anything_in_its_url(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of several texts
        check_url(text)
    assert isinstance(parse_offer({**OFFER, "base_url": text}, ""), str)


def test_a_described_source_has_defaults_and_what_it_says() -> None:
    made = SourceOffer("jp-1", "https://jp.example/x", "jp", "prod", region="asia")
    assert parse_offer({**OFFER, "timeout_seconds": 0}, "asia") == made
    more = {"region": "eu", "enabled": False, "timeout_seconds": 2.5, "first_seen": "baseline", "meter": "seconds"}
    more |= {"reset": "count_new_total", "api_id": 7, "credential_env": "EXPORTER_TOKEN_JP"}
    parsed = parse_offer({**OFFER, **more}, "asia")
    assert isinstance(parsed, SourceOffer)
    assert {name: getattr(parsed, name) for name in more} == more


@pytest.mark.parametrize(
    "changes",
    [
        {"source_id": ""},
        {"source_id": "a b"},
        {"source_id": "a\n"},
        {"expected_node_id": ""},
        {"expected_env": None},
        {"enabled": 1},
        {"timeout_seconds": 61},
        {"timeout_seconds": "15"},
        {"first_seen": "half"},
        {"reset": None},
        {"meter": "Bytes"},
        {"api_id": 0},
        {"api_id": True},
        {"credential_env": "JWT_SECRET"},
        {"credential": "secret"},
        {"base_url": 7},
    ],
)
def test_what_is_wrong_with_a_described_source_is_said(changes: dict[str, Any]) -> None:
    said = parse_offer({**OFFER, **changes}, "")
    assert isinstance(said, str)
    assert next(iter(changes)) in said
    assert "secret" not in said.removeprefix("a source has no field 'credential'")


def test_wc16_two_sources_of_one_id_or_of_one_node_clash() -> None:
    one = SourceOffer("a", "https://a.example", "n", "prod")
    assert clash_of([one, SourceOffer("b", "https://a.example", "n", "preview")]) is None
    assert "twice" in str(clash_of([one, SourceOffer("a", "https://b.example", "m", "prod")]))
    assert "same node" in str(clash_of([one, SourceOffer("b", "https://b.example", "n", "prod")]))


def outcome(source_id: str = "a", error: str = "", processed: int = 0, **counts: int) -> SourceOutcome:
    return SourceOutcome(source_id, Counted(processed_samples=processed, **counts), error)


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([], "error"),
        ([outcome()], "ok"),
        ([outcome(processed=3)], "ok"),
        ([outcome(error="it answered 500")], "error"),
        ([outcome(error="x"), outcome("b", error="y")], "error"),
        ([outcome(error="x", processed=1)], "partial"),
        ([outcome(error="x"), outcome("b")], "partial"),
        ([outcome(processed=1, invalid=1)], "partial"),
        ([outcome(processed=1, quarantined=1)], "partial"),
    ],
)
def test_c09_a_run_is_an_error_only_where_nothing_was_done(outcomes: list[SourceOutcome], status: str) -> None:
    assert judge(outcomes)[0] == status


def test_c09_what_failed_is_named_and_a_difference_makes_a_run_partial() -> None:
    status, said = judge([outcome(error="it answered 500"), outcome("b", processed=1)])
    assert (status, said) == ("partial", "a: it answered 500")
    assert judge([outcome()], [Difference("sums are sums", 2, "v")]) == ("partial", "the books break rules: 1")


@pytest.mark.parametrize(
    ("reference", "tag", "commit"),
    [
        (f"registry.example/billing-service:sha-{COMMIT}", f"sha-{COMMIT}", COMMIT),
        (f"registry.example:5000/a/billing-service:{COMMIT}", COMMIT, COMMIT),
        (f"billing-service:sha-{COMMIT}@sha256:{COMMIT}{COMMIT[:24]}", f"sha-{COMMIT}", COMMIT),
    ],
)
def test_c01_an_image_of_a_commit_names_it(reference: str, tag: str, commit: str) -> None:
    assert parse_image(reference) == Image(reference, tag, commit)


@pytest.mark.parametrize(
    ("reference", "tag"),
    [
        ("", ""),
        ("billing-service", ""),
        ("billing-service:sha-1234", "sha-1234"),
        ("billing-service:latest", "latest"),
        (f"billing-service:{COMMIT.upper()}", COMMIT.upper()),
        (f"billing-service:sha-{COMMIT}0", f"sha-{COMMIT}0"),
        ("billing-service:", ""),
    ],
)
def test_c02_what_an_image_does_not_say_is_empty(reference: str, tag: str) -> None:
    assert parse_image(reference) == Image(reference, tag, "")


@pytest.mark.parametrize(
    "reference",
    [f"registry.example:5000/billing-service@sha256:{COMMIT}{COMMIT[:24]}", "registry.example:5000/billing-service"],
)
def test_wc16_a_digest_and_a_port_are_no_tag(reference: str) -> None:
    assert parse_image(reference) == Image(reference, "", "")
