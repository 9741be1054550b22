"""Settings: read from what is given, all faults at once, no secret shown."""

import ipaddress
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from stellar_sdk import StrKey

from callora.config.forms import RedisAddress
from callora.config.loading import ConfigurationInvalid, load_settings
from callora.config.settings import SETTINGS, Settings
from callora.ledger.wallets import make_seed
from callora.logs import mask, redact

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


def test_a_service_token_is_long_and_a_secret_of_its_own() -> None:
    token = "t" * 32
    settings = load_settings({**PRODUCTION, "INTERNAL_SERVICE_TOKEN": token})
    assert settings.internal_service_token is not None
    assert token not in f"{settings!r} {settings}"
    assert load_settings(PRODUCTION).internal_service_token is None
    for wrong in (token[1:], f"{token} {token}", f"{token}ä"):
        (line,) = problems({**PRODUCTION, "INTERNAL_SERVICE_TOKEN": wrong})
        assert line == "INTERNAL_SERVICE_TOKEN: must be at least 32 visible ASCII characters"
    for name in ("JWT_SECRET", "ADMIN_API_KEY", "METRICS_API_KEY"):
        (line,) = problems({**PRODUCTION, "INTERNAL_SERVICE_TOKEN": token, name: token})
        assert line.startswith("INTERNAL_SERVICE_TOKEN: must be a secret of its own")


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


def test_aliases_of_calls_are_prefixes_of_whole_segments_each_once() -> None:
    settings = load_settings({"CALL_ALIASES": "/v1/tts=text-to-speech, /v1/search=search/api/v1/search"})
    assert settings.call_alias_targets == {"/v1/tts": "text-to-speech", "/v1/search": "search/api/v1/search"}
    assert load_settings({}).call_alias_targets == {}
    for wrong in (
        *("/v1/tts", "=a", "v1/tts=a", "/v1/tts=", "/v1/tts=A", "/v1/tts=/a", "/v1/tts/=a", "/v1/a b=a", "/v1/tts=a=b"),
        *("/v1/../x=a", "/v1/x=a/..", "/v1/call=a", "/v1/call/x=a", "/api=a", "/api/keys=a", "/livez=a", "/v1/%61=a"),
        *("/v1/tts=a,/v1/tts=b", ",".join(f"/v{number}=a" for number in range(101)), "/" + "a" * 500 + "=a"),
    ):
        assert problems({"CALL_ALIASES": wrong}), wrong


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


# --- the store of shared rate limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", RedisAddress("cache", 6379, None, False, 0, None, None)),
        ("redis://Cache.example:7000/3", RedisAddress("cache.example", 7000, None, False, 3, None, None)),
        ("valkey://:p%2Fw%40@10.0.0.1/", RedisAddress("10.0.0.1", 6379, None, False, 0, None, "p/w@")),
        ("rediss://me:secret@[::1]:6380/15", RedisAddress("::1", 6380, None, True, 15, "me", "secret")),
        ("valkeys://cache", RedisAddress("cache", 6379, None, True, 0, None, None)),
        ("unix:///run/valkey.sock", RedisAddress("", 6379, "/run/valkey.sock", False, 0, None, None)),
        ("unix://:secret@/run/a%20b.sock?db=2", RedisAddress("", 6379, "/run/a b.sock", False, 2, None, "secret")),
    ],
)
def test_the_store_of_rate_limits_is_a_url(url: str, address: RedisAddress) -> None:
    assert load_settings({"REDIS_URL": url}).redis_address == address


@pytest.mark.parametrize(
    "url",
    [
        *("cache:6379", "http://cache", "redis://", "redis:///0", "redis://cache:0", "redis://cache:65536"),
        *("redis://cache/x", "redis://cache/-1", "redis://cache/0/1", "redis://cache?db=1", "redis://cache#x"),
        *("redis://cache?", "redis://me@cache", "redis://-x", "redis://a b", "unix://", "unix:///", "unix://host/path"),
        *("unix:///path?x=1", "unix:///path?db=", "unix:///path?db=1&x=2", "redis://:hunter2@one,two:6379"),
    ],
)
def test_what_is_no_url_of_a_store_is_refused_and_never_printed(url: str) -> None:
    (line,) = problems({"REDIS_URL": url})
    assert line == (
        "REDIS_URL: must be a URL such as redis://user:password@host:6379/0, rediss:// for TLS, or unix:///path?db=0"
    )


def test_the_stores_password_is_never_shown() -> None:
    settings = load_settings({"REDIS_URL": "redis://me:hunter2@cache"})
    assert "hunter2" not in f"{settings!r} {settings} {settings.redis_address!r}"
    assert "hunter2" not in mask("cannot reach redis://me:hunter2@cache") + str(redact({"redis_url": "hunter2"}))


def test_limits_are_a_process_s_own_by_default_and_an_outage_closes() -> None:
    settings = load_settings({})
    assert (settings.redis_address, settings.rate_limit_on_failure) == (None, "closed")
    assert load_settings({"RATE_LIMIT_ON_FAILURE": "OPEN"}).rate_limit_on_failure == "open"
    assert problems({"RATE_LIMIT_ON_FAILURE": "ajar"}) == ["RATE_LIMIT_ON_FAILURE: must be closed or open, got 'ajar'"]


# --- the chain --------------------------------------------------------------------------------------------------------

VAULT, SETTLEMENT = (StrKey.encode_contract(bytes([number]) * 32) for number in (1, 2))
SEEDS = [make_seed(bytes([number]) * 32) for number in range(1, 5)]
CHAIN = {
    "SOROBAN_RPC_ENABLED": "true",
    "SOROBAN_RPC_URL": "https://one.example/rpc, https://two.example",
    "STELLAR_TESTNET_VAULT_CONTRACT_ID": VAULT,
}


def test_the_chain_is_off_until_it_is_asked_for() -> None:
    settings = load_settings({})
    assert not settings.soroban_rpc_enabled
    assert not settings.horizon_enabled
    assert settings.network_passphrase == "Test SDF Network ; September 2015"
    assert (settings.circuit_breaker_threshold, settings.circuit_breaker_cooldown_seconds) == (5, 30)
    assert (settings.retry_max_attempts, settings.retry_base_delay_seconds) == (3, 1)
    assert settings.stellar_transaction_timeout_seconds == 300
    assert load_settings({"TRANSACTION_TIMEOUT": "60"}).stellar_transaction_timeout_seconds == 60


def test_only_the_networks_own_settings_count() -> None:
    environ = {
        "SOROBAN_RPC_ENABLED": "true",
        "HORIZON_ENABLED": "true",
        "SOROBAN_TESTNET_RPC_URL": "https://testnet.example",
        "SOROBAN_MAINNET_RPC_URL": "https://mainnet.example/",
        "STELLAR_TESTNET_HORIZON_URL": "https://horizon-testnet.example",
        "STELLAR_MAINNET_HORIZON_URL": "https://horizon.example",
        "STELLAR_TESTNET_VAULT_CONTRACT_ID": VAULT,
        "STELLAR_MAINNET_VAULT_CONTRACT_ID": SETTLEMENT,
        "STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID": SETTLEMENT,
    }
    testnet = load_settings(environ)
    assert testnet.rpc_urls == ("https://testnet.example",)
    assert testnet.horizon_url_in_use == "https://horizon-testnet.example"
    assert (testnet.vault_contract_id, testnet.settlement_contract_id) == (VAULT, SETTLEMENT)
    mainnet = load_settings({**environ, "STELLAR_NETWORK": "mainnet"})
    assert mainnet.rpc_urls == ("https://mainnet.example",)
    assert mainnet.network_passphrase == "Public Global Stellar Network ; September 2015"
    assert (mainnet.vault_contract_id, mainnet.settlement_contract_id) == (SETTLEMENT, None)
    named = load_settings({**environ, **CHAIN, "HORIZON_URL": "http://localhost:8000"})
    assert named.rpc_urls == ("https://one.example/rpc", "https://two.example")
    assert named.horizon_url_in_use == "http://localhost:8000"


@pytest.mark.parametrize(
    "url",
    [
        "http://rpc.example",
        "https://user:password@rpc.example",
        "https://rpc.example/?key=1",
        "https://rpc.example/#a",
        "https://rpc.example?",
        "https://",
        "ftp://localhost",
        "rpc.example",
        "https://rpc.example:0",
        "https://rpc.example:99999",
        "https://rpc.example/\u00e9",
    ],
)
def test_a_nodes_url_is_https_without_anything_secret(url: str) -> None:
    for name in ("SOROBAN_RPC_URL", "HORIZON_URL"):
        (line,) = problems({name: url})
        assert line.startswith(f"{name}: must be a")
        assert "password" not in line.removeprefix(f"{name}: must be a URL")


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000/rpc"])
def test_a_node_on_this_machine_may_be_plain(url: str) -> None:
    assert load_settings({"SOROBAN_RPC_URL": url}).rpc_urls == (url,)


def test_a_chain_that_is_turned_on_needs_its_settings() -> None:
    assert problems({"SOROBAN_RPC_ENABLED": "true", "HORIZON_ENABLED": "true"}) == [
        "SOROBAN_RPC_URL: is required where SOROBAN_RPC_ENABLED is true (or SOROBAN_TESTNET_RPC_URL)",
        "STELLAR_TESTNET_VAULT_CONTRACT_ID: is required where SOROBAN_RPC_ENABLED is true",
        "HORIZON_URL: is required where HORIZON_ENABLED is true (or STELLAR_TESTNET_HORIZON_URL)",
    ]
    assert problems({"HORIZON_ENABLED": "true", "HORIZON_URL": "https://horizon.example"}) == [
        "HORIZON_ENABLED: needs SOROBAN_RPC_ENABLED, which Horizon is second to"
    ]


def test_ids_and_seeds_are_checked_by_their_checksums_and_seeds_never_shown() -> None:
    wrong = VAULT[:-1] + ("A" if VAULT[-1] != "A" else "B")
    bad_seed = SEEDS[0][:-1] + ("A" if SEEDS[0][-1] != "A" else "B")
    found = problems(
        {
            "STELLAR_TESTNET_VAULT_CONTRACT_ID": wrong,
            "STELLAR_MAINNET_SETTLEMENT_CONTRACT_ID": SEEDS[0][:10],
            "VAULT_OWNER_SEED": bad_seed,
            "CHANNEL_SEEDS": f"{SEEDS[1]},{bad_seed}",
            "FEE_BUMPER_SECRET_KEY": VAULT,
        }
    )
    assert [line.partition(":")[0] for line in found] == [
        "STELLAR_TESTNET_VAULT_CONTRACT_ID",
        "STELLAR_MAINNET_SETTLEMENT_CONTRACT_ID",
        "VAULT_OWNER_SEED",
        "CHANNEL_SEEDS",
        "FEE_BUMPER_SECRET_KEY",
    ]
    assert not any(secret in line for line in found for secret in (bad_seed, SEEDS[1]))
    settings = load_settings({"CHANNEL_SEEDS": f"{SEEDS[0]}, {SEEDS[1]},"})
    assert [each.get_secret_value() for each in settings.channel_seeds] == SEEDS[:2]
    assert SEEDS[0] not in repr(settings)


def test_no_key_does_two_things_that_must_not_be_one_keys() -> None:
    owner, channel, bumper, login = SEEDS
    fine = {
        **CHAIN,
        "VAULT_OWNER_SEED": owner,
        "CHANNEL_SEEDS": channel,
        "FEE_BUMPER_SECRET_KEY": bumper,
        "AUTH_SIGNING_SEED": login,
    }
    assert load_settings(fine).channel_seeds
    for change, name in (
        ({"CHANNEL_SEEDS": f"{channel},{owner}"}, "CHANNEL_SEEDS"),
        ({"CHANNEL_SEEDS": bumper}, "CHANNEL_SEEDS"),
        ({"CHANNEL_SEEDS": ""}, "CHANNEL_SEEDS"),
        ({"AUTH_SIGNING_SEED": owner}, "AUTH_SIGNING_SEED"),
        ({"AUTH_SIGNING_SEED": channel}, "AUTH_SIGNING_SEED"),
        ({"AUTH_SIGNING_SEED": bumper}, "AUTH_SIGNING_SEED"),
        ({"STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID": VAULT}, "STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID"),
    ):
        (line,) = problems({**fine, **change})
        assert line.startswith(f"{name}: ")


def test_mainnet_in_production_is_mainnet() -> None:
    environ = {**PRODUCTION, "STELLAR_NETWORK": "mainnet", "STELLAR_NETWORK_PASSPHRASE": "Sandbox"}
    (line,) = problems(environ)
    assert line.startswith("STELLAR_NETWORK_PASSPHRASE: must be mainnet's own")
    assert load_settings({**environ, "APP_ENV": "development"}).network_passphrase == "Sandbox"
    assert load_settings({**environ, "STELLAR_NETWORK": "testnet"}).network_passphrase == "Sandbox"


def test_what_settles_has_two_keys_of_its_own_and_somewhere_for_a_fee_to_go() -> None:
    owner, channel, charging, crediting = SEEDS
    fine = {
        **CHAIN,
        "VAULT_OWNER_SEED": owner,
        "CHANNEL_SEEDS": channel,
        "SETTLEMENT_CHARGING_SEED": charging,
        "SETTLEMENT_CREDITING_SEED": crediting,
        "PLATFORM_FEE_BPS": "250",
        "PLATFORM_FEE_ADDRESS": VAULT,
    }
    settings = load_settings(fine)
    assert settings.settlement_min_payout_stroops == 5 * 10_000_000
    assert charging not in repr(settings)
    for change, line in (
        ({"SETTLEMENT_CREDITING_SEED": ""}, "SETTLEMENT_CREDITING_SEED: is required"),
        ({"SETTLEMENT_CHARGING_SEED": ""}, "SETTLEMENT_CHARGING_SEED: is required"),
        ({"SETTLEMENT_CREDITING_SEED": charging}, "SETTLEMENT_CREDITING_SEED: must be a key of its own"),
        ({"SETTLEMENT_CHARGING_SEED": owner}, "SETTLEMENT_CHARGING_SEED: must be a key of its own"),
        ({"SETTLEMENT_CHARGING_SEED": channel}, "SETTLEMENT_CHARGING_SEED: must be a key of its own"),
        ({"AUTH_SIGNING_SEED": charging}, "AUTH_SIGNING_SEED: must be a key of its own"),
        ({"PLATFORM_FEE_ADDRESS": ""}, "PLATFORM_FEE_ADDRESS: is required"),
        ({"PLATFORM_FEE_ADDRESS": "somewhere"}, "PLATFORM_FEE_ADDRESS: must be an address"),
        ({"PLATFORM_FEE_BPS": "10001"}, "PLATFORM_FEE_BPS: must"),
        ({"SETTLEMENT_MIN_PAYOUT_USDC": "0"}, "SETTLEMENT_MIN_PAYOUT_USDC: must"),
        ({"SETTLEMENT_MIN_PAYOUT_USDC": "1e3"}, "SETTLEMENT_MIN_PAYOUT_USDC: must"),
        ({"SETTLEMENT_CHARGING_CAP_USDC": "0.5"}, "SETTLEMENT_CHARGING_CAP_USDC: must"),
    ):
        found = problems({**fine, **change})
        assert any(each.startswith(line) for each in found), (change, found)
        assert not any(seed in each for seed in SEEDS for each in found)
