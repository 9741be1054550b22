"""Settings of counter metering: nothing wrong is taken for a default, and no two sources share what is one's own."""

import json
from decimal import Decimal
from typing import Any

import pytest

from callora.config.loading import ConfigurationInvalid, load_settings

TOKEN = "s" * 32


def described(*changes: dict[str, Any], **environ: str) -> dict[str, str]:
    """Return an environment with these sources."""
    sources = [
        {
            "source_id": f"node-{number}",
            "base_url": "https://node.example",
            "expected_node_id": f"n{number}",
            "expected_env": "prod",
            "credential_env": f"EXPORTER_TOKEN_N{number}",
            **each,
        }
        for number, each in enumerate(changes)
    ]
    tokens = {f"EXPORTER_TOKEN_N{number}": f"token-{number}" for number in range(len(changes))}
    return {"EXPORTER_SOURCES_JSON": json.dumps(sources), **tokens, **environ}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigurationInvalid) as caught:
        load_settings(environ)
    return list(caught.value.problems)


def test_described_sources_have_credentials_of_their_own_that_are_never_shown() -> None:
    settings = load_settings(described({}, {"region": "eu"}, DEFAULT_REGION="asia"))
    assert [each.region for each in settings.meter_sources] == ["asia", "eu"]
    assert settings.exporter_tokens["EXPORTER_TOKEN_N1"].get_secret_value() == "token-1"
    assert "token-1" not in repr(settings)


def test_one_url_is_one_source_that_is_shown_the_service_token() -> None:
    settings = load_settings({"EXPORTER_BASE_URL": "https://node.example/", "INTERNAL_SERVICE_TOKEN": TOKEN})
    (source,) = settings.meter_sources
    assert (source.source_id, source.base_url, source.credential_env) == ("default", "https://node.example", None)
    assert problems({"EXPORTER_BASE_URL": "https://node.example"})[0].startswith("INTERNAL_SERVICE_TOKEN: is required")


def test_the_list_goes_before_the_one_url_and_no_source_is_no_fault() -> None:
    both = described({}, EXPORTER_BASE_URL="https://other.example")
    assert [each.source_id for each in load_settings(both).meter_sources] == ["node-0"]
    assert load_settings({}).meter_sources == ()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"EXPORTER_SOURCES_JSON": "[]"}, "must describe a source at least"),
        ({"EXPORTER_SOURCES_JSON": "{"}, "must be a JSON list"),
        ({"EXPORTER_SOURCES_JSON": "[" * 100_000}, "must be a JSON list"),
        ({"EXPORTER_SOURCES_JSON": "[1]"}, "must be an object"),
        (described({"base_url": "http://node.example"}), "base_url must be https"),
        (described({"colour": "red"}), "has no field 'colour'"),
        (described({}, {"source_id": "node-0"}), "node-0 is there twice"),
        (described({}, {"expected_node_id": "n0"}), "same node"),
    ],
)
def test_wc16_sources_that_cannot_be_stop_the_start(environ: dict[str, str], said: str) -> None:
    (problem,) = problems(environ)
    assert problem.startswith("EXPORTER_SOURCES_JSON: ")
    assert said in problem


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (described({"credential_env": None}, {"credential_env": None}, INTERNAL_SERVICE_TOKEN=TOKEN), "would share"),
        (described({}, {"credential_env": "EXPORTER_TOKEN_N0"}), "must be a secret of its own"),
        (described({}, {}, EXPORTER_TOKEN_N1="token-0"), "must be a secret of its own"),
        (described({}, EXPORTER_TOKEN_N0=TOKEN, INTERNAL_SERVICE_TOKEN=TOKEN), "must be a secret of its own"),
        (described({"credential_env": "EXPORTER_TOKEN_ELSE"}), "EXPORTER_TOKEN_ELSE: is required"),
        (described({}, EXPORTER_TOKEN_N0="a\nb"), "must be visible ASCII"),
    ],
)
def test_wc17_no_two_sources_share_a_credential(environ: dict[str, str], said: str) -> None:
    found = problems(environ)
    assert said in found[0]
    assert "token-0" not in "".join(found)


@pytest.mark.parametrize("text", ["0", "secret", '{"EXPORTER_TOKEN_N0": "secret"}'])
def test_a_credential_without_a_name_is_named_and_never_read(text: str) -> None:
    (problem,) = problems({"EXPORTER_TOKEN_": text})
    assert problem.startswith("EXPORTER_TOKEN_: is not a setting; must end in a name")
    assert "secret" not in problem


@pytest.mark.parametrize("name", ["PRICE_PER_BYTE", "INITIAL_INCLUDED_QUOTA_BYTES", "COLLECT_PAGE_SIZE"])
@pytest.mark.parametrize("text", ["free", "-1", "1e-9", "NaN", "0,5"])
def test_wc10_a_bad_number_stops_the_start_and_is_never_taken_for_nothing(name: str, text: str) -> None:
    (problem,) = problems({name: text})
    assert problem.startswith(f"{name}: must ")


def test_a_price_is_exact_and_a_duration_is_written_as_elsewhere() -> None:
    settings = load_settings({"PRICE_PER_BYTE": "0.000000000000000001", "COLLECT_INTERVAL": "1m30.5s"})
    assert settings.price_per_byte == Decimal("1e-18")
    assert settings.collect_interval_seconds == 90.5
    assert (settings.collect_overlap_seconds, load_settings({}).collect_interval_seconds) == (120, 60)
    for text in ("60", "1 m", "m", "0s", "25h", "-1m"):
        (problem,) = problems({"COLLECT_INTERVAL": text})
        assert problem.startswith("COLLECT_INTERVAL: must be a duration")


def test_money_that_nobody_paid_is_refused_with_the_reason() -> None:
    assert load_settings({"INITIAL_BALANCE": "0.00"}).initial_balance == 0
    (problem,) = problems({"INITIAL_BALANCE": "5"})
    assert "granted by an operator" in problem
