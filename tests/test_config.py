"""Settings: read from what is given, all faults at once, no secret shown."""

import ipaddress
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from callora.config import SETTINGS, ConfigurationInvalid, Settings, load_settings
from callora.ledger.wallets import make_seed

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"
PRODUCTION = {
    "APP_ENV": "production",
    "DATABASE_URL": "postgresql://callora:hunter2@db:5432/callora",
    "JWT_SECRET": "j" * 32,
    "ADMIN_API_KEY": "admin-secret",
    "METRICS_API_KEY": "metrics-secret",
}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigurationInvalid) as caught:
        load_settings(environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_every_setting_is_documented_with_its_default_and_form() -> None:
    rows = re.findall(r"^\| (`[A-Z_]+`.*?) \| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    expected = [
        (" then ".join(f"`{name}`" for name in each.names), each.default, f"must {each.must}", each.meaning)
        for each in SETTINGS.values()
    ]
    assert rows == expected


def test_no_variable_belongs_to_two_settings() -> None:
    names = [name for each in SETTINGS.values() for name in each.names]
    assert len(names) == len(set(names))


def test_every_documented_default_is_the_default_in_force() -> None:
    stated = {
        each.names[0]: each.default
        for attribute, each in SETTINGS.items()
        if re.fullmatch(r"[0-9]+|[0-9.]+(kb|gb)|true|false|[a-z]+", each.default)
        and each.default not in ("none", "empty")
        and attribute != "environment"
    }
    assert len(stated) > 30
    assert load_settings(stated) == load_settings({})


def test_an_empty_environment_gives_development_on_the_loopback() -> None:
    settings = load_settings({})
    assert settings.environment == "development"
    assert (settings.host, settings.port) == ("127.0.0.1", 3000)
    assert settings.database_dsn is None
    assert settings.cors_allowed_origins == ("http://localhost:5173",)
    assert settings.proxy_timeout_seconds == 30
    assert settings.catalogue_refresh_seconds == 0.3
    assert settings.gateway_body_limit_bytes == 1024**3
    assert settings.idempotency_max_body_bytes == 256 * 1024
    assert not settings.tls_enabled


def test_production_listens_everywhere_and_trusts_no_origin() -> None:
    settings = load_settings(PRODUCTION)
    assert settings.is_production
    assert settings.host == "0.0.0.0"
    assert settings.cors_allowed_origins == ()


def test_the_process_environment_is_never_read_behind_the_callers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("port", "1")
    assert load_settings({}).port == 3000
    assert Settings().port == 3000


def test_app_env_is_read_before_node_env_and_the_variable_at_fault_is_named() -> None:
    assert load_settings({"APP_ENV": "test", "NODE_ENV": "production"}).environment == "test"
    assert load_settings({"APP_ENV": "", "NODE_ENV": "TEST"}).environment == "test"
    assert problems({"NODE_ENV": "staging"}) == ["NODE_ENV: must be development, test or production, got 'staging'"]


def test_all_problems_are_listed_at_once_in_the_order_of_the_documentation() -> None:
    assert problems(
        {
            "CALLORA_PROT": "3000",
            "HOLD_TTL_SECONDS": "30",
            "DB_PORT": "70000",
            "PORT": "abc",
            "APP_ENV": "production",
            "TLS_KEY_FILE": "/nonexistent/key.pem",
            "GATEWAY_PROFILING_ENABLED": "perhaps",
            "GATEWAY_BODY_LIMIT": "1xb",
        }
    ) == [
        "PORT: must be an integer between 0 and 65535, got 'abc'",
        "TLS_KEY_FILE: must be a readable file, got '/nonexistent/key.pem'",
        "DB_PORT: must be an integer between 1 and 65535, got '70000'",
        "GATEWAY_BODY_LIMIT: must be a size between 0b and 1tb, such as 512b, 100kb or 1.5mb, got '1xb'",
        "GATEWAY_PROFILING_ENABLED: must be true or false, got 'perhaps'",
        "HOLD_TTL_SECONDS: must exceed PROXY_TIMEOUT_MS (30 s), got 30 s",
        "JWT_SECRET: is required in production",
        "ADMIN_API_KEY: is required in production",
        "METRICS_API_KEY: is required in production",
        "DATABASE_URL: is required in production (or DB_HOST)",
        "CALLORA_PROT: is not a setting; did you mean PORT?",
    ]


def test_no_secret_is_ever_printed() -> None:
    wrong = {
        **PRODUCTION,
        "JWT_SECRET": "short-jwt-secret",
        "DATABASE_URL": "mysql://callora:hunter2@db/callora",
        "ADMIN_API_KEY": "admin secret with spaces",
        "CORS_ALLOWED_ORIGINS": "https://user:hunter2@example.com",
        "PORT": "no",
    }
    text = "\n".join(problems(wrong))
    assert text.count("\n") == 4
    for secret in ("short-jwt-secret", "hunter2", "admin secret", "metrics-secret"):
        assert secret not in text
    settings = load_settings(PRODUCTION)
    for secret in ("hunter2", "jjjj", "admin-secret", "metrics-secret"):
        assert secret not in f"{settings!r} {settings} {settings.database_dsn!r}"


def test_a_long_wrong_value_is_cut() -> None:
    [line] = problems({"PORT": "9" * 5000})
    assert len(line) < 200


@pytest.mark.parametrize(
    "value", ["", " ", "-1", "1e3", "1_0", "0x10", "1.0", "٣", "+5", "99999999999999999999999999", "3000\n3001"]
)
def test_a_number_is_digits_only(value: str) -> None:
    if value.strip():
        assert problems({"PORT": value})
    else:
        assert load_settings({"PORT": value}).port == 3000


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512b", 512), ("100kb", 102400), ("1.5MB", 1572864), ("1 gb", 1024**3), ("1tb", 1024**4)],
)
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    assert load_settings({"GATEWAY_BODY_LIMIT": text}).gateway_body_limit_bytes == size


def test_a_hold_must_outlive_the_slowest_upstream_and_its_key_must_outlive_the_hold() -> None:
    assert problems({"PROXY_TIMEOUT_MS": "120000"}) == [
        "HOLD_TTL_SECONDS: must exceed PROXY_TIMEOUT_MS (120 s), got 120 s"
    ]
    assert problems({"IDEMPOTENCY_RETENTION_WINDOW_SECONDS": "120"}) == [
        "IDEMPOTENCY_RETENTION_WINDOW_SECONDS: must exceed HOLD_TTL_SECONDS (120 s), got 120 s"
    ]


def test_tls_needs_both_of_its_files(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("x")
    key.write_text("x")
    assert load_settings({"TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key)}).tls_enabled
    assert problems({"TLS_CERT_FILE": str(cert)}) == ["TLS_KEY_FILE: is required where TLS_CERT_FILE is set"]
    assert problems({"TLS_KEY_FILE": str(key)}) == ["TLS_CERT_FILE: is required where TLS_KEY_FILE is set"]
    assert problems({"TLS_CERT_FILE": str(tmp_path), "TLS_KEY_FILE": str(key)}) == [
        f"TLS_CERT_FILE: must be a readable file, got '{tmp_path}'"
    ]


def test_a_database_url_is_made_of_its_parts_and_a_whole_one_comes_first() -> None:
    def dsn(**environ: str) -> str:
        made = load_settings(environ).database_dsn
        assert made is not None
        return made.get_secret_value()

    assert dsn(DB_HOST="db") == "postgresql://postgres:postgres@db:5432/callora"
    assert dsn(DB_HOST="::1", DB_USER="a@b", DB_PASSWORD=" p/w ", DB_NAME="x y", DB_PORT="6000") == (
        "postgresql://a%40b:%20p%2Fw%20@[::1]:6000/x%20y"
    )
    assert dsn(DB_HOST="/run/pg") == "postgresql://postgres:postgres@/callora?host=%2Frun%2Fpg&port=5432"
    assert dsn(DB_HOST="db", DATABASE_URL="postgres://u@h/d") == "postgres://u@h/d"


def test_the_allow_list_takes_names_addresses_and_ranges() -> None:
    settings = load_settings({"UPSTREAM_HOST_ALLOWLIST": "LocalHost, 127.0.0.1,[::1],10.0.0.0/8,,api.internal."})
    assert settings.upstream_allowed_hosts == {"localhost", "api.internal"}
    assert [str(network) for network in settings.upstream_allowed_networks] == ["127.0.0.1/32", "::1/128", "10.0.0.0/8"]
    addresses = "10.0.0.1/8 10.0.0.0/33 256.1.1.1 2130706433 0x7f.1 127.1 fe80::1%eth0 fe80::%1/64 ::1::"
    names = "-x - localhost:9000 http://localhost *.local user@host host/24 bücher.example"
    for wrong in (*addresses.split(), *names.split(), "a b"):
        assert problems({"UPSTREAM_HOST_ALLOWLIST": f"localhost,{wrong}"}), wrong


def test_every_private_upstream_may_be_allowed_but_not_in_production() -> None:
    networks = load_settings({"UPSTREAM_HOST_ALLOWLIST": "*"}).upstream_allowed_networks
    assert any(ipaddress.ip_address("192.168.1.1") in network for network in networks)
    assert any(ipaddress.ip_address("fd00::1") in network for network in networks)
    assert problems({**PRODUCTION, "UPSTREAM_HOST_ALLOWLIST": "*"}) == [
        "UPSTREAM_HOST_ALLOWLIST: must name hosts or ranges in production, got '*'"
    ]


def test_origins_are_origins_and_an_empty_list_allows_none() -> None:
    settings = load_settings({"CORS_ALLOWED_ORIGINS": "https://App.example.com, http://localhost:5173"})
    assert settings.cors_allowed_origins == ("https://app.example.com", "http://localhost:5173")
    assert load_settings({"CORS_ALLOWED_ORIGINS": ""}).cors_allowed_origins == ()
    for wrong in ("*", "null", "example.com", "https://example.com/", "https://example.com/path", "https://x:99999"):
        assert problems({"CORS_ALLOWED_ORIGINS": wrong})


def test_level_names_of_other_loggers_are_understood() -> None:
    assert load_settings({"LOG_LEVEL": "WARN"}).log_level == "warning"
    assert load_settings({"LOG_LEVEL": "trace"}).log_level == "debug"
    assert problems({"LOG_LEVEL": "loud"})


def test_the_stellar_network_has_a_former_name() -> None:
    assert load_settings({}).stellar_network == "testnet"
    assert load_settings({"SOROBAN_NETWORK": "mainnet"}).stellar_network == "mainnet"
    assert load_settings({"STELLAR_NETWORK": "Testnet", "SOROBAN_NETWORK": "mainnet"}).stellar_network == "testnet"
    assert problems({"STELLAR_NETWORK": "pubnet"}) == ["STELLAR_NETWORK: must be testnet or mainnet, got 'pubnet'"]


def test_a_signing_seed_is_a_seed_and_is_never_printed() -> None:
    seed = make_seed(bytes(32))
    assert seed not in repr(load_settings({"AUTH_SIGNING_SEED": seed}))
    for wrong in (seed[:-1] + "A", seed.lower(), seed[:-1], f"{seed} ", "G" + seed[1:], "x"):
        (line,) = problems({"AUTH_SIGNING_SEED": wrong})
        assert line == "AUTH_SIGNING_SEED: must be a Stellar seed (S and 55 more characters)"


@pytest.mark.parametrize(
    "domain", ["callora.test", "CALLORA.test:8443", "localhost", "10.0.0.1:3000", "a" * 55 + ".com"]
)
def test_a_home_domain_is_a_name_with_or_without_a_port(domain: str) -> None:
    assert load_settings({"AUTH_HOME_DOMAIN": domain}).auth_home_domain == domain.lower()


@pytest.mark.parametrize(
    "domain",
    [
        *("https://callora.test", "callora.test/", "callora.test:", "callora.test:0", "callora.test:65536", ":80"),
        *("a b.test", "callora.test.", "-a.test", "a" * 55 + ".comm", 'a".test', "[::1]:80", "user@callora.test"),
    ],
)
def test_what_is_no_domain_is_refused(domain: str) -> None:
    (line,) = problems({"AUTH_HOME_DOMAIN": domain})
    assert line.startswith("AUTH_HOME_DOMAIN: must be a domain name of at most 59 characters")


def test_production_names_the_domain_that_it_signs_for() -> None:
    seed = make_seed(bytes(32))
    assert problems({**PRODUCTION, "AUTH_SIGNING_SEED": seed}) == [
        "AUTH_HOME_DOMAIN: is required in production where AUTH_SIGNING_SEED is set"
    ]
    assert load_settings({**PRODUCTION, "AUTH_SIGNING_SEED": seed, "AUTH_HOME_DOMAIN": "callora.test"})
    assert load_settings(PRODUCTION).auth_signing_seed is None


def test_an_unknown_prefixed_name_is_a_misspelling_and_other_names_are_none_of_our_business() -> None:
    assert problems({"CALLORA_XYZZY": "1"}) == ["CALLORA_XYZZY: is not a setting"]
    load_settings({"PATH": "/bin", "MADE_UP": "1"})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings({}).port = 1
