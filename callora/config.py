"""Settings: every environment variable Callora reads, its form, its bounds and its default.

`load_settings` is the only door. It reads the mapping it is given and nothing else, finds every fault at once and names
each by its variable, and prints the value of no secret. An attribute that is a duration ends in `_seconds` whatever the
unit of its variable, a size in `_bytes`.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, unquote, urlsplit

import attrs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from callora.config_metering import (
    from_duration,
    from_price,
    from_sources,
    from_tokens,
    offers_of,
    source_conflicts,
    tokens_of,
)
from callora.ledger.collecting import SourceOffer, check_url
from callora.ledger.money import parse_usdc
from callora.ledger.wallets import is_address, is_contract, is_seed

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX: Final = "CALLORA_"
_READ_ELSEWHERE: Final = ("CALLORA_PG_BIN",)
"""Variables of ours that are no settings of the service: where the embedded PostgreSQL's programs are."""
_SHOWN_CHARS_MAX: Final = 80
_JWT_SECRET_BYTES_MIN: Final = 32
_SERVICE_TOKEN_CHARS_MIN: Final = 32
_DOMAIN_CHARS_MAX: Final = 59
"""A login challenge has an entry named by the domain and " auth", and Stellar allows such a name 64 bytes."""
_HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?", re.ASCII)
_ALIAS: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+=[a-z][a-z0-9-]{0,62}(?:/[A-Za-z0-9._~-]+)*", re.ASCII)
_ALIAS_CHARS_MAX: Final = 500
_ALIASES_MAX: Final = 100
_OURS: Final = re.compile(r"/(?:v1/call|api|livez|readyz|healthz)/")
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(b|kb|mb|gb|tb)?", re.ASCII | re.IGNORECASE)
_SIZE_UNITS: Final = {"b": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3, "tb": 1024**4}
_URL_RULE: Final = "https except on this machine, without credentials, query and fragment"
_CONTRACT_RULE: Final = "be a contract's address (C and 55 more characters)"
_SEED_RULE: Final = "be a Stellar seed (S and 55 more characters)"
PASSPHRASES: Final[Mapping[str, str]] = {
    "testnet": "Test SDF Network ; September 2015",
    "mainnet": "Public Global Stellar Network ; September 2015",
}
"""The public networks' own. Source: developers.stellar.org/docs/networks."""
EXPLORERS: Final[Mapping[str, str]] = {
    "testnet": "https://stellar.expert/explorer/testnet/tx",
    "mainnet": "https://stellar.expert/explorer/public/tx",
}
"""Where people look at transactions of the public networks."""
_LEVELS: Final = {"trace": "debug", "verbose": "debug", "http": "debug", "warn": "warning", "fatal": "critical"}


class ConfigurationInvalid(Exception):
    """The environment cannot be used. Its text lists every problem, a line each, and no secret."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _whole(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII) is None:
        raise ValueError("not a whole number")
    return value


def _from_milliseconds(value: object) -> object:
    return int(value) / 1000 if isinstance(_whole(value), str) else value  # type: ignore[call-overload]


def _from_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError("not a size")
    return int(Decimal(match[1]) * _SIZE_UNITS[(match[2] or "b").lower()])


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(dict.fromkeys(item for item in (part.strip() for part in value.split(",")) if item))


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _level(value: object) -> object:
    lowered = _lower(value)
    return _LEVELS.get(lowered, lowered) if isinstance(lowered, str) else lowered


def _host(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value.strip("[]")))
    except ValueError:
        if _HOST_NAME.fullmatch(value.lower()) is None:
            raise ValueError("neither an address nor a host name") from None
        return value.lower()


def _upstream_host(value: str) -> str:
    if value == "*":
        return value
    if "%" in value:
        raise ValueError("a zone identifier")
    try:
        return str(ipaddress.ip_network(value.strip("[]"), strict=True))
    except ValueError:
        name = value.rstrip(".")
        # A last label that begins with a digit is one of the ways to write an IPv4 address, and no name.
        if "/" in value or name.rpartition(".")[2][:1].isdigit():
            raise
        return _host(name)


def _call_alias(value: str) -> str:
    prefix, _, target = value.partition("=")
    if _ALIAS.fullmatch(value) is None or len(value) > _ALIAS_CHARS_MAX:
        raise ValueError("not a prefix and a call")
    if {".", ".."} & {*prefix.split("/"), *target.split("/")} or _OURS.match(prefix + "/") is not None:
        raise ValueError("dot segments, or a prefix of Callora's own")
    return value


def _call_aliases(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) > _ALIASES_MAX or len({value.partition("=")[0] for value in values}) < len(values):
        raise ValueError("too many, or one prefix twice")
    return values


def _origin(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("not an origin")
    if parts.path or parts.query or parts.fragment or value.endswith(("?", "#")):
        raise ValueError("more than an origin")
    assert parts.port is None or parts.port > 0  # reading the port validates it
    return value.lower()


def _database_url(value: SecretStr) -> SecretStr:
    parts = urlsplit(value.get_secret_value())
    if parts.scheme not in ("postgres", "postgresql"):
        raise ValueError("not a PostgreSQL URL")
    assert parts.port is None or parts.port > 0
    return value


@attrs.frozen
class RedisAddress:
    """Where a Redis or Valkey is, and as whom to speak to it."""

    host: str
    port: int
    path: str | None
    """Of a UNIX socket, which goes before host and port."""
    tls: bool
    database: int
    username: str | None
    password: str | None = attrs.field(repr=False)


def _redis_address(url: str) -> RedisAddress:
    parts = urlsplit(url)
    host, query = parts.hostname or "", parts.query
    if parts.scheme == "unix":
        path, number = unquote(parts.path), query.removeprefix("db=") if query else "0"
        if host or not path.strip("/") or (query and not query.startswith("db=")):
            raise ValueError("not a socket")
    elif parts.scheme in ("redis", "rediss", "valkey", "valkeys"):
        path, number = None, parts.path.removeprefix("/") or "0"
        if not host or query:
            raise ValueError("no host, or a query")
        host = _host(host)
    else:
        raise ValueError("not a URL of Redis or Valkey")
    if re.fullmatch(r"[0-9]{1,5}", number, re.ASCII) is None or parts.fragment or url.endswith(("?", "#")):
        raise ValueError("not a database's number, or a fragment")
    username, password = (unquote(text) if text else None for text in (parts.username, parts.password))
    if username is not None and password is None:
        raise ValueError("a name without a password")
    port = parts.port if parts.port is not None else 6379
    if port == 0:
        raise ValueError("not a port")
    return RedisAddress(host, port, path, parts.scheme in ("rediss", "valkeys"), int(number), username, password)


def _redis_url(value: SecretStr) -> SecretStr:
    _redis_address(value.get_secret_value())
    return value


def _signing_secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value().encode()) < _JWT_SECRET_BYTES_MIN:
        raise ValueError("too short")
    return value


def _signing_seed(value: SecretStr) -> SecretStr:
    if not is_seed(value.get_secret_value()):
        raise ValueError("not a seed")
    return value


def _address(value: str) -> str:
    if not is_address(value) and not is_contract(value):
        raise ValueError("not an address")
    return value


def _from_usdc(value: object) -> object:
    return parse_usdc(value) if isinstance(value, str) else value


def _contract(value: str) -> str:
    if not is_contract(value):
        raise ValueError("not a contract's address")
    return value


def _domain(value: str) -> str:
    name, colon, port = value.lower().partition(":")
    if len(value) > _DOMAIN_CHARS_MAX or _HOST_NAME.fullmatch(name) is None or name.endswith("."):
        raise ValueError("not a domain")
    if colon and (re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII) is None or int(port) > 65535):
        raise ValueError("not a port")
    return value.lower()


def _header_secret(value: SecretStr) -> SecretStr:
    if re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()) is None:
        raise ValueError("not sendable in a header")
    return value


def _service_token(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < _SERVICE_TOKEN_CHARS_MIN:
        raise ValueError("too short")
    return _header_secret(value)


def _readable(value: Path) -> Path:
    try:
        with value.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError("not readable") from error
    return value


_Whole = Annotated[int, BeforeValidator(_whole)]
_Milliseconds = Annotated[float, BeforeValidator(_from_milliseconds)]
_WholeSeconds = Annotated[float, BeforeValidator(_whole)]
_Size = Annotated[int, BeforeValidator(_from_size)]
_Host = Annotated[str, AfterValidator(_host)]
_UpstreamHosts = Annotated[tuple[Annotated[str, AfterValidator(_upstream_host)], ...], BeforeValidator(_split)]
_Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)]
_CallAliases = Annotated[
    tuple[Annotated[str, AfterValidator(_call_alias)], ...], BeforeValidator(_split), AfterValidator(_call_aliases)
]
_Claim = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]
_NodeUrl = Annotated[str, AfterValidator(check_url)]
_NodeUrls = Annotated[tuple[_NodeUrl, ...], BeforeValidator(_split)]
_Contract = Annotated[str, AfterValidator(_contract)]
_Address = Annotated[str, AfterValidator(_address)]
_Usdc = Annotated[int, BeforeValidator(_from_usdc)]
_Seed = Annotated[SecretStr, AfterValidator(_signing_seed)]
_Networks = Annotated[tuple[Network, ...], BeforeValidator(_split)]
_Duration = Annotated[float, BeforeValidator(from_duration)]
_Price = Annotated[Decimal, BeforeValidator(from_price)]
_Sources = Annotated[tuple[SourceOffer | str, ...], BeforeValidator(from_sources)]
_Tokens = Annotated[dict[str, SecretStr], BeforeValidator(from_tokens)]
_HeaderSecret = Annotated[SecretStr, AfterValidator(_header_secret)]
_File = Annotated[Path, AfterValidator(_readable)]


def _setting(names: str, default: Any, must: str, meaning: str, *, shown: str | None = None, **field: Any) -> Any:
    """Return a field read from the first of `names` (separated by spaces) that is set."""
    extra: dict[str, Any] = {"names": names.split(), "must": must, "shown": str(default) if shown is None else shown}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=meaning, json_schema_extra=extra, **made, **field)


def _whole_number(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    return _setting(name, default, f"be an integer between {low} and {high}", meaning, ge=low, le=high)


def _milliseconds(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    must = f"be an integer between {low} and {high} (milliseconds)"
    return _setting(name, default / 1000, must, meaning, shown=str(default), ge=low / 1000, le=high / 1000)


def _seconds(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    must = f"be an integer between {low} and {high} (seconds)"
    return _setting(name, float(default), must, meaning, shown=str(default), ge=low, le=high)


def _duration(name: str, default: str, low: str, high: str, meaning: str) -> Any:
    must = f"be a duration between {low} and {high}, such as 90s, 1m30s or 2h"
    low_seconds, high_seconds = (from_duration(each) for each in (low, high))
    return _setting(name, from_duration(default), must, meaning, shown=default, ge=low_seconds, le=high_seconds)


def _usdc(name: str, default: str, low: str, meaning: str) -> Any:
    must = f"be an amount of USDC of at least {low}, such as 12.5"
    return _setting(name, int(parse_usdc(default)), must, meaning, shown=default, ge=int(parse_usdc(low)))


def _size(name: str, default: str, low: str, high: str, meaning: str) -> Any:
    must = f"be a size between {low} and {high}, such as 512b, 100kb or 1.5mb"
    bounds = [_from_size(bound) for bound in (default, low, high)]
    return _setting(name, bounds[0], must, meaning, shown=default, ge=bounds[1], le=bounds[2])


def _production(data: Mapping[str, Any]) -> bool:
    return data.get("environment") == "production"


def _default_host(data: dict[str, Any]) -> str:
    return "0.0.0.0" if _production(data) else "127.0.0.1"  # noqa: S104 - production listens everywhere by default


def _default_origins(data: dict[str, Any]) -> tuple[str, ...]:
    return () if _production(data) else ("http://localhost:5173",)


class Settings(BaseSettings):
    """Everything that can be set, frozen. Made by `load_settings`, which also checks what two settings say together."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=False, arbitrary_types_allowed=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the arguments as the only source: the process's own environment is never read behind a caller."""
        return (init_settings,)

    # The process
    environment: Annotated[Literal["development", "test", "production"], BeforeValidator(_lower)] = _setting(
        "APP_ENV NODE_ENV",
        "development",
        "be development, test or production",
        "Where this process runs. In production secrets and a database are required and logs are JSON.",
    )
    host: _Host = _setting(
        "HOST",
        _default_host,
        "be an address or a host name",
        "The address to listen on.",
        shown="0.0.0.0 in production, else 127.0.0.1",
    )
    port: _Whole = _whole_number("PORT", 3000, 0, 65535, "The port to listen on; 0 lets the system choose.")
    app_version: str = _setting(
        "APP_VERSION",
        "1.0.0",
        "be 1 to 64 visible characters",
        "The version that `/api/health` reports.",
        pattern=r"^[\x21-\x7e]{1,64}$",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_level)] = _setting(
        "LOG_LEVEL",
        "info",
        "be debug, info, warning, error or critical",
        "The least severe record that is written; trace, verbose and http mean debug, warn warning, fatal critical.",
    )
    drain_timeout_seconds: _Milliseconds = _milliseconds(
        "DRAIN_TIMEOUT_MS", 30_000, 0, 600_000, "How long accepted calls may go on after SIGTERM."
    )
    tls_cert_file: _File | None = _setting(
        "TLS_CERT_FILE",
        None,
        "be a readable file",
        "The certificate chain (PEM) that the listener presents; needs TLS_KEY_FILE.",
        shown="none: plain HTTP",
    )
    tls_key_file: _File | None = _setting(
        "TLS_KEY_FILE", None, "be a readable file", "The private key (PEM) of TLS_CERT_FILE.", shown="none"
    )
    trusted_proxy_count: _Whole = _whole_number(
        "TRUSTED_PROXY_COUNT",
        0,
        0,
        32,
        "How many proxies in front of Callora are ours: the client's address is that entry of X-Forwarded-For, "
        "counted from the right. With 0 the header is ignored.",
    )

    # Secrets
    jwt_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = _setting(
        "JWT_SECRET",
        None,
        f"be at least {_JWT_SECRET_BYTES_MIN} bytes",
        "The key that signs dashboard sessions.",
        shown="required in production",
    )
    admin_api_key: _HeaderSecret | None = _setting(
        "ADMIN_API_KEY",
        None,
        "be visible ASCII characters",
        "What administrators present.",
        shown="required in production",
    )
    metrics_api_key: _HeaderSecret | None = _setting(
        "METRICS_API_KEY",
        None,
        "be visible ASCII characters",
        "What Prometheus presents as a Bearer token at `/api/metrics` in production.",
        shown="required in production",
    )
    internal_service_token: Annotated[SecretStr, AfterValidator(_service_token)] | None = _setting(
        "INTERNAL_SERVICE_TOKEN",
        None,
        f"be at least {_SERVICE_TOKEN_CHARS_MIN} visible ASCII characters",
        "What services that charge outside the proxy present as a Bearer token; without it no service is let in.",
        shown="–",
    )

    jwt_issuer: _Claim | None = _setting(
        "JWT_ISSUER",
        None,
        "be 1 to 255 visible characters",
        "The `iss` of access tokens; where set, no other is taken.",
        shown="none: not checked",
    )
    jwt_audience: _Claim | None = _setting(
        "JWT_AUDIENCE",
        None,
        "be 1 to 255 visible characters",
        "The `aud` of access tokens; where set, no other is taken.",
        shown="none: not checked",
    )
    admin_ip_allowed_ranges: _Networks = _setting(
        "ADMIN_IP_ALLOWED_RANGES",
        (),
        "be a comma list of addresses and CIDR ranges",
        "Where operators may come from.",
        shown="empty: from anywhere",
    )

    # Logging in with a wallet
    stellar_network: Annotated[Literal["testnet", "mainnet"], BeforeValidator(_lower)] = _setting(
        "STELLAR_NETWORK SOROBAN_NETWORK",
        "testnet",
        "be testnet or mainnet",
        "The Stellar network that wallets log in on and deposits come from. Of the settings that are named by a "
        "network, only those of this one count.",
    )
    stellar_network_passphrase: Annotated[str, Field(pattern=r"^[\x20-\x7e]{1,200}$")] | None = _setting(
        "STELLAR_NETWORK_PASSPHRASE",
        None,
        "be 1 to 200 visible characters",
        "The network's passphrase, where it is neither of the public ones: that of a sandbox.",
        shown="that of STELLAR_NETWORK",
    )
    auth_signing_seed: _Seed | None = _setting(
        "AUTH_SIGNING_SEED",
        None,
        _SEED_RULE,
        "Signs the challenges of SEP-10 and nothing else; its public key is in `/.well-known/stellar.toml`. It needs "
        "no account on the network.",
        shown="none: `/auth` answers 503",
    )
    auth_home_domain: Annotated[str, AfterValidator(_domain)] | None = _setting(
        "AUTH_HOME_DOMAIN",
        None,
        f"be a domain name of at most {_DOMAIN_CHARS_MAX} characters, with a port where it is not 443",
        "The domain that wallets show when they log in, under which this service's stellar.toml and `/auth` are "
        "reached; required in production where AUTH_SIGNING_SEED is set. What a request calls its Host is never "
        "believed.",
        shown="localhost and the port",
    )

    # The chain
    soroban_rpc_enabled: bool = _setting(
        "SOROBAN_RPC_ENABLED",
        False,
        "be true or false",
        "Whether this service speaks to the Stellar network: deposits, withdrawals and everything on chain. It then "
        "needs an RPC URL and the vault contract of the network.",
        shown="false",
    )
    soroban_rpc_url: _NodeUrls = _setting(
        "SOROBAN_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "Stellar RPC nodes, the preferred one first; where one fails, the next is asked.",
        shown="that of the network",
    )
    soroban_testnet_rpc_url: _NodeUrls = _setting(
        "SOROBAN_TESTNET_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "The same for testnet, where SOROBAN_RPC_URL is not set.",
        shown="none",
    )
    soroban_mainnet_rpc_url: _NodeUrls = _setting(
        "SOROBAN_MAINNET_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "The same for mainnet, where SOROBAN_RPC_URL is not set.",
        shown="none",
    )
    soroban_rpc_timeout_seconds: _Milliseconds = _milliseconds(
        "SOROBAN_RPC_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for an RPC node."
    )
    horizon_enabled: bool = _setting(
        "HORIZON_ENABLED",
        False,
        "be true or false",
        "Whether Horizon is asked where RPC does not answer or no longer knows; needs SOROBAN_RPC_ENABLED.",
        shown="false",
    )
    horizon_url: _NodeUrl | None = _setting(
        "HORIZON_URL", None, f"be a URL, {_URL_RULE}", "The Horizon server.", shown="that of the network"
    )
    stellar_testnet_horizon_url: _NodeUrl | None = _setting(
        "STELLAR_TESTNET_HORIZON_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The same for testnet, where HORIZON_URL is not set.",
        shown="none",
    )
    stellar_mainnet_horizon_url: _NodeUrl | None = _setting(
        "STELLAR_MAINNET_HORIZON_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The same for mainnet, where HORIZON_URL is not set.",
        shown="none",
    )
    horizon_timeout_seconds: _Milliseconds = _milliseconds(
        "HORIZON_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for Horizon."
    )
    stellar_testnet_vault_contract_id: _Contract | None = _setting(
        "STELLAR_TESTNET_VAULT_CONTRACT_ID", None, _CONTRACT_RULE, "The vault contract on testnet.", shown="none"
    )
    stellar_mainnet_vault_contract_id: _Contract | None = _setting(
        "STELLAR_MAINNET_VAULT_CONTRACT_ID", None, _CONTRACT_RULE, "The vault contract on mainnet.", shown="none"
    )
    stellar_testnet_settlement_contract_id: _Contract | None = _setting(
        "STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID",
        None,
        _CONTRACT_RULE,
        "The settlement contract on testnet; where set, the vault contract must name the same.",
        shown="none: what the vault contract names",
    )
    stellar_mainnet_settlement_contract_id: _Contract | None = _setting(
        "STELLAR_MAINNET_SETTLEMENT_CONTRACT_ID",
        None,
        _CONTRACT_RULE,
        "The settlement contract on mainnet; where set, the vault contract must name the same.",
        shown="none: what the vault contract names",
    )
    stellar_base_fee_stroops: _Whole = _whole_number(
        "STELLAR_BASE_FEE", 100, 100, 10_000_000, "What a transaction bids for its inclusion, in stroops of XLM."
    )
    stellar_transaction_timeout_seconds: _WholeSeconds = _seconds(
        "STELLAR_TRANSACTION_TIMEOUT TRANSACTION_TIMEOUT",
        300,
        10,
        86_400,
        "How long a prepared deposit may be signed and sent; then it is void.",
    )
    circuit_breaker_threshold: _Whole = _whole_number(
        "CIRCUIT_BREAKER_THRESHOLD",
        5,
        1,
        10_000,
        "Questions in a row that nobody answered, each in all its attempts, that open RPC's breaker, or Horizon's.",
    )
    circuit_breaker_cooldown_seconds: _Milliseconds = _milliseconds(
        "CIRCUIT_BREAKER_COOLDOWN_MS", 30_000, 1, 3_600_000, "How long it then refuses before it admits a trial."
    )
    retry_max_attempts: _Whole = _whole_number(
        "RETRY_MAX_ATTEMPTS", 3, 1, 20, "How often a question to the chain is asked in all; every node once each time."
    )
    retry_base_delay_seconds: _Milliseconds = _milliseconds(
        "RETRY_BASE_DELAY_MS",
        1000,
        1,
        60_000,
        "The pause before the second attempt; each further one is twice as long, up to 10 s, 30 % more or less.",
    )
    vault_owner_seed: _Seed | None = _setting(
        "VAULT_OWNER_SEED",
        None,
        _SEED_RULE,
        "The vault contract's owner: admits depositors and pays withdrawals out; needs CHANNEL_SEEDS. Without it "
        "operators do both (`callora depositors`).",
        shown="none",
    )
    channel_seeds: Annotated[tuple[_Seed, ...], BeforeValidator(_split)] = _setting(
        "CHANNEL_SEEDS",
        (),
        "be a comma list of Stellar seeds (S and 55 more characters)",
        "Accounts that carry Callora's transactions, one transaction at a time each, and pay their fees. Nothing else "
        "may use them.",
        shown="none",
    )
    fee_bumper_secret_key: _Seed | None = _setting(
        "FEE_BUMPER_SECRET_KEY",
        None,
        _SEED_RULE,
        "The account that pays the fees of users' deposits, and of transactions that are stuck.",
        shown="none: users pay their own",
    )
    deposit_listener_interval_seconds: _Milliseconds = _milliseconds(
        "DEPOSIT_LISTENER_INTERVAL_MS", 1000, 10, 3_600_000, "How often the vault contract's events are asked for."
    )
    chain_reconciliation_interval_seconds: _Milliseconds = _milliseconds(
        "CHAIN_RECONCILIATION_INTERVAL_MS",
        60_000,
        100,
        86_400_000,
        "How often the vault contract's balance is compared with the ledger's.",
    )
    chain_drift_max_stroops: _Whole = _whole_number(
        "CHAIN_DRIFT_MAX_STROOPS",
        0,
        0,
        10**17,
        "By how many stroops of USDC they may differ before settlement stops.",
    )

    # Settlement
    platform_fee_bps: _Whole = _whole_number(
        "PLATFORM_FEE_BPS",
        0,
        0,
        10_000,
        "The platform's share of every call, in hundredths of a percent, rounded down; a change holds for calls from "
        "two minutes after the start on. Needs PLATFORM_FEE_ADDRESS where it is not 0.",
    )
    platform_fee_address: _Address | None = _setting(
        "PLATFORM_FEE_ADDRESS",
        None,
        "be an address (G or C and 55 more characters)",
        "Who is credited with the platform's share by the settlement contract.",
        shown="none",
    )
    revenue_indexer_interval_seconds: _Milliseconds = _milliseconds(
        "REVENUE_LEDGER_INDEXER_INTERVAL_MS",
        30_000,
        10,
        3_600_000,
        "How often the revenue of developers is indexed; a settlement does so first.",
    )
    settlement_charging_seed: _Seed | None = _setting(
        "SETTLEMENT_CHARGING_SEED",
        None,
        _SEED_RULE,
        "The key that charges the vault contract, which must be its authorized caller; needs "
        "SETTLEMENT_CREDITING_SEED. Without both nothing is settled by this process.",
        shown="none",
    )
    settlement_crediting_seed: _Seed | None = _setting(
        "SETTLEMENT_CREDITING_SEED",
        None,
        _SEED_RULE,
        "The key that credits developers, which must be the settlement contract's administrator.",
        shown="none",
    )
    settlement_charging_cap_stroops: _Usdc = _usdc(
        "SETTLEMENT_CHARGING_CAP_USDC",
        "100000",
        "1",
        "What the charging key may charge in an hour, in all processes together.",
    )
    settlement_crediting_cap_stroops: _Usdc = _usdc(
        "SETTLEMENT_CREDITING_CAP_USDC",
        "100000",
        "1",
        "What the crediting key may credit in an hour, in all processes together.",
    )
    settlement_min_payout_stroops: _Usdc = _usdc(
        "SETTLEMENT_MIN_PAYOUT_USDC", "5", "0.0000001", "What a developer must have earned to be paid."
    )
    settlement_interval_seconds: _Milliseconds = _milliseconds(
        "SETTLEMENT_INTERVAL_MS",
        3_600_000,
        1000,
        604_800_000,
        "How often developers are paid; `callora settle --now` does not wait.",
    )
    settlement_status_sync_interval_seconds: _Milliseconds = _milliseconds(
        "SETTLEMENT_STATUS_SYNC_INTERVAL_MS",
        60_000,
        100,
        3_600_000,
        "How often settlements under way are looked at: what waits is tried again, what nobody carries on is taken up.",
    )
    settlement_status_sync_timeout_seconds: _Milliseconds = _milliseconds(
        "SETTLEMENT_STATUS_SYNC_TIMEOUT_MS",
        5000,
        1,
        600_000,
        "How long the chain may take to answer one question of such a look.",
    )
    settlement_recon_interval_seconds: _Milliseconds = _milliseconds(
        "SETTLEMENT_RECON_INTERVAL_MS",
        86_400_000,
        1000,
        604_800_000,
        "How often usage, revenue, settlements and the chain are compared; the first time at the start.",
    )
    stellar_explorer_url: _NodeUrl | None = _setting(
        "STELLAR_EXPLORER_URL",
        None,
        "be an https URL, or an http one of this machine, without credentials, query or fragment",
        "What a transaction's hash is put behind for people to look at; known of the public networks, and none on any "
        "other.",
        shown="the network's, else none",
    )

    # PostgreSQL
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = _setting(
        "DATABASE_URL",
        None,
        "be a URL such as postgresql://user:password@host:5432/callora",
        "The database; comes before the DB_* variables. In production one of both is required; "
        "elsewhere, without either, an embedded PostgreSQL is started.",
        shown="none",
    )
    db_host: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^\S+$")] | None = _setting(
        "DB_HOST",
        None,
        "be a host name, an address or the directory of a UNIX socket",
        "The database server, where DATABASE_URL is not set.",
        shown="none",
    )
    db_port: _Whole = _whole_number("DB_PORT", 5432, 1, 65535, "The database server's port.")
    db_user: Annotated[str, Field(min_length=1, max_length=63)] = _setting(
        "DB_USER", "postgres", "be 1 to 63 characters", "The database role."
    )
    db_password: SecretStr = _setting(
        "DB_PASSWORD", SecretStr("postgres"), "be a password", "The role's password.", shown="postgres"
    )
    db_name: Annotated[str, Field(min_length=1, max_length=63)] = _setting(
        "DB_NAME", "callora", "be 1 to 63 characters", "The database's name."
    )
    db_pool_max: _Whole = _whole_number(
        "DB_POOL_MAX", 10, 1, 1000, "Pooled connections, besides the ledger writer's own."
    )
    db_idle_timeout_seconds: _Milliseconds = _milliseconds(
        "DB_IDLE_TIMEOUT_MS", 30_000, 0, 86_400_000, "How long an unused pooled connection is kept; 0 keeps it."
    )
    db_conn_timeout_seconds: _Milliseconds = _milliseconds(
        "DB_CONN_TIMEOUT_MS", 2000, 1, 600_000, "How long connecting, or waiting for a pooled connection, may take."
    )
    commit_timeout_seconds: _Milliseconds = _milliseconds(
        "COMMIT_TIMEOUT_MS",
        5000,
        1,
        600_000,
        "How long a round of the ledger may take; past it its outcome is unknown and looked up.",
    )

    # The gateway's clients
    client_head_timeout_seconds: _Milliseconds = _milliseconds(
        "CLIENT_HEAD_TIMEOUT_MS", 10_000, 1, 600_000, "How long a request head may take to arrive."
    )
    client_idle_timeout_seconds: _Milliseconds = _milliseconds(
        "CLIENT_IDLE_TIMEOUT_MS", 75_000, 1, 3_600_000, "How long a connection may stay open between requests."
    )
    client_body_timeout_seconds: _Milliseconds = _milliseconds(
        "CLIENT_BODY_TIMEOUT_MS",
        30_000,
        1,
        3_600_000,
        "How long a client may make no progress while sending a body or taking an answer.",
    )
    client_max_connections: _Whole = _whole_number(
        "CLIENT_MAX_CONNECTIONS", 10_000, 1, 1_000_000, "Open client connections of one process."
    )
    gateway_body_limit_bytes: _Size = _size(
        "GATEWAY_BODY_LIMIT", "1gb", "0b", "1tb", "The largest request body on `/v1/call`; it is streamed, not stored."
    )
    request_body_limit_bytes: _Size = _size(
        "REQUEST_BODY_LIMIT", "100kb", "1b", "100mb", "The largest request body everywhere else."
    )

    # Upstreams
    proxy_timeout_seconds: _Milliseconds = _milliseconds(
        "PROXY_TIMEOUT_MS", 30_000, 1, 3_600_000, "How long an upstream may take to begin its answer."
    )
    proxy_connect_timeout_seconds: _Milliseconds = _milliseconds(
        "PROXY_CONNECT_TIMEOUT_MS", 5000, 1, 600_000, "How long connecting to an upstream, TLS included, may take."
    )
    upstream_host_allowlist: _UpstreamHosts = _setting(
        "UPSTREAM_HOST_ALLOWLIST",
        (),
        "be a comma list of host names, addresses and CIDR ranges",
        "Upstreams, and webhooks' receivers, that may be called although their addresses are private. `*` allows "
        "all, not in production.",
        shown="empty",
    )
    webhook_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = _setting(
        "WEBHOOK_SECRET",
        None,
        f"be a secret of at least {_JWT_SECRET_BYTES_MIN} bytes",
        "What the secrets of webhooks are derived from; another one changes all of them.",
        shown="JWT_SECRET",
    )
    webhook_timeout_seconds: _Milliseconds = _milliseconds(
        "WEBHOOK_TIMEOUT_MS", 10_000, 100, 30_000, "How long telling an endpoint of an event may take."
    )
    webhook_secret_grace_seconds: _Milliseconds = _milliseconds(
        "WEBHOOK_SECRET_ROTATION_GRACE_MS",
        86_400_000,
        0,
        2_592_000_000,
        "How long a webhook's secret signs beside the one that replaces it.",
    )
    webhook_poll_interval_seconds: _Milliseconds = _milliseconds(
        "WEBHOOK_POLL_INTERVAL_MS", 500, 10, 60_000, "How often new events are looked for, to be told to webhooks."
    )
    webhook_retention_seconds: _WholeSeconds = _seconds(
        "WEBHOOK_RETENTION_SECONDS",
        2_592_000,
        3600,
        31_536_000,
        "How long a webhook's deliveries are kept once they are over.",
    )
    call_aliases: _CallAliases = _setting(
        "CALL_ALIASES",
        (),
        "be a comma list of at most 100 prefixes with the call each stands for, such as /v1/tts=text-to-speech/v2",
        "Other paths of calls: the prefix, and what follows it, is served as `/v1/call/` with the API's slug and path.",
        shown="empty",
    )
    upstream_pool_max: _Whole = _whole_number("UPSTREAM_POOL_MAX", 256, 1, 65535, "Connections to one upstream.")
    proxy_breaker_failure_threshold: _Whole = _whole_number(
        "PROXY_BREAKER_FAILURE_THRESHOLD", 5, 1, 10_000, "Failures in a row that open an API's breaker."
    )
    proxy_breaker_cooldown_seconds: _Milliseconds = _milliseconds(
        "PROXY_BREAKER_COOLDOWN_MS", 30_000, 1, 3_600_000, "How long an open breaker refuses before it admits a trial."
    )
    proxy_breaker_success_threshold: _Whole = _whole_number(
        "PROXY_BREAKER_SUCCESS_THRESHOLD", 1, 1, 1000, "Trials in a row that must succeed to close a breaker."
    )
    gateway_profiling_enabled: bool = _setting(
        "GATEWAY_PROFILING_ENABLED",
        False,
        "be true or false",
        "Whether the per-API upstream series `gateway_upstream_*` are recorded.",
        shown="false",
    )

    # Limits
    gateway_rate_limit_window_seconds: _Milliseconds = _milliseconds(
        "GATEWAY_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of a user's limit over all keys."
    )
    gateway_rate_limit_max_requests: _Whole = _whole_number(
        "GATEWAY_RATE_LIMIT_MAX_REQUESTS", 100, 1, 1_000_000_000, "Calls of one user in that window."
    )
    rate_limit_window_seconds: _Milliseconds = _milliseconds(
        "RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of a key's limit."
    )
    rate_limit_max_requests: _Whole = _whole_number(
        "RATE_LIMIT_MAX_REQUESTS",
        5,
        1,
        1_000_000_000,
        "Calls of one key in that window, where neither the key nor its plan names a number.",
    )
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = _setting(
        "REDIS_URL",
        None,
        "be a URL such as redis://user:password@host:6379/0, rediss:// for TLS, or unix:///path?db=0",
        "The Redis or Valkey in which all processes share the two limits above; valkey:// and valkeys:// say the same.",
        shown="none: each process has its own",
    )
    rate_limit_on_failure: Annotated[Literal["closed", "open"], BeforeValidator(_lower)] = _setting(
        "RATE_LIMIT_ON_FAILURE",
        "closed",
        "be closed or open",
        "What happens to calls that REDIS_URL does not decide on within 100 ms: closed refuses them with 503, open "
        "lets each process decide by its own limits.",
    )
    key_max_concurrency: _Whole = _whole_number(
        "KEY_MAX_CONCURRENCY_PER_KEY", 50, 1, 1_000_000, "Calls of one key at the same time."
    )

    rest_rate_limit_window_seconds: _Milliseconds = _milliseconds(
        "REST_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of the dashboard routes' limit."
    )
    rest_rate_limit_max_requests: _Whole = _whole_number(
        "REST_RATE_LIMIT_MAX_REQUESTS",
        100,
        1,
        1_000_000_000,
        "Requests of one user, or of one address that is not logged in, in that window.",
    )
    login_rate_limit_window_seconds: _Milliseconds = _milliseconds(
        "LOGIN_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of the limit of logins."
    )
    login_rate_limit_max_requests: _Whole = _whole_number(
        "LOGIN_RATE_LIMIT_MAX_REQUESTS",
        5,
        1,
        1_000_000_000,
        "Logins of one address in that window, failed ones included; as many challenges may be asked for.",
    )

    # The ledger
    hold_ttl_seconds: _WholeSeconds = _seconds(
        "HOLD_TTL_SECONDS", 120, 1, 86_400, "How long a hold may stay open; must exceed PROXY_TIMEOUT_MS."
    )
    hold_sweep_interval_seconds: _WholeSeconds = _seconds(
        "HOLD_SWEEP_INTERVAL_SECONDS", 10, 1, 3600, "How often expired holds are looked for and released."
    )
    subscription_sweep_interval_seconds: _WholeSeconds = _seconds(
        "SUBSCRIPTION_SWEEP_INTERVAL_SECONDS",
        60,
        1,
        3600,
        "How often subscriptions are looked at whose paid month has ended, and approved credits that were not given.",
    )
    quota_notice_interval_seconds: _WholeSeconds = _seconds(
        "QUOTA_NOTICE_INTERVAL_SECONDS",
        60,
        1,
        86_400,
        "How often one of the processes looks which vaults have used up 80, 95 or 100 % of their credits.",
    )
    idempotency_retention_seconds: _WholeSeconds = _seconds(
        "IDEMPOTENCY_RETENTION_WINDOW_SECONDS",
        86_400,
        1,
        31_536_000,
        "How long an idempotency key is remembered; must exceed HOLD_TTL_SECONDS.",
    )
    idempotency_sweep_interval_seconds: _Milliseconds = _milliseconds(
        "IDEMPOTENCY_SWEEPER_INTERVAL_MS", 60_000, 100, 86_400_000, "How often forgotten keys are deleted."
    )
    idempotency_max_body_bytes: _Size = _size(
        "IDEMPOTENCY_MAX_BODY", "256kb", "0b", "16mb", "The largest answer that is stored to be replayed."
    )
    usage_rollup_interval_seconds: _Milliseconds = _milliseconds(
        "USAGE_ROLLUP_INTERVAL_MS",
        2000,
        10,
        3_600_000,
        "How often usage is added up; sums lag by about as much.",
    )
    usage_stream_interval_seconds: _Milliseconds = _milliseconds(
        "USAGE_STREAM_INTERVAL_MS",
        1000,
        10,
        60_000,
        "How often live usage is looked for, while anyone follows his; streams lag by about as much.",
    )
    usage_stream_heartbeat_seconds: _Milliseconds = _milliseconds(
        "USAGE_STREAM_HEARTBEAT_MS",
        15_000,
        10,
        30_000,
        "After how much silence a stream shows a sign of life.",
    )
    usage_notice_interval_seconds: _Milliseconds = _milliseconds(
        "USAGE_NOTICE_INTERVAL_MS",
        2000,
        10,
        3_600_000,
        "How often calls are gathered for webhooks that want them, while there are any.",
    )
    balance_alert_interval_seconds: _Milliseconds = _milliseconds(
        "BALANCE_ALERT_INTERVAL_MS",
        5000,
        10,
        3_600_000,
        "How often one of the processes looks which balances have fallen below what their owners set.",
    )
    usage_streams_max: _Whole = _whole_number(
        "USAGE_STREAMS_MAX", 2000, 1, 100_000, "Open streams of live usage of one process."
    )
    usage_streams_per_user_max: _Whole = _whole_number(
        "USAGE_STREAMS_PER_USER_MAX", 10, 1, 100_000, "Open streams of live usage of one user and process."
    )
    usage_stream_buffer_events_max: _Whole = _whole_number(
        "USAGE_STREAM_BUFFER_EVENTS",
        1000,
        1,
        1_000_000,
        "Calls that may wait in memory for a stream's client; one that is further behind is given them page by page.",
    )
    usage_feed_retention_seconds: _WholeSeconds = _seconds(
        "USAGE_FEED_RETENTION_SECONDS",
        86_400,
        60,
        2_592_000,
        "How long a stream of live usage can be taken up again after the call that was seen last.",
    )
    actor_mailbox_max: _Whole = _whole_number(
        "ACTOR_MAILBOX_MAX", 1024, 1, 1_000_000, "Commands that may wait for one vault; past it they are refused."
    )
    writer_round_max: _Whole = _whole_number(
        "WRITER_ROUND_MAX", 1000, 1, 10_000, "Commands that one round of the ledger may carry."
    )
    catalogue_refresh_seconds: _Milliseconds = _milliseconds(
        "CATALOGUE_REFRESH_MS", 300, 10, 60_000, "How often changed keys, APIs and prices are read."
    )

    # Metering by counters
    exporter_sources_json: _Sources | None = _setting(
        "EXPORTER_SOURCES_JSON",
        None,
        "be a JSON list of meter sources (docs/operations.md)",
        "Where counters are collected from, besides what operators add over REST.",
        shown="none",
    )
    exporter_base_url: _NodeUrl | None = _setting(
        "EXPORTER_BASE_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The one source, named `default`, of any node and environment, where EXPORTER_SOURCES_JSON is not set.",
        shown="none",
    )
    exporter_tokens: _Tokens = _setting(
        "EXPORTER_TOKEN_",
        dict,
        "be visible ASCII characters",
        "With a name of yours at its end: what a meter source whose credential_env names that variable is shown as a "
        "Bearer token. A source without one, of which there may be one, is shown INTERNAL_SERVICE_TOKEN.",
        shown="–",
    )
    billing_ingest_mode: Annotated[Literal["pull", "push"], BeforeValidator(_lower)] = _setting(
        "BILLING_INGEST_MODE",
        "pull",
        "be pull or push",
        "pull reads sources at intervals; push reads none and runs no job. Snapshots may be pushed in both.",
    )
    collect_interval_seconds: _Duration = _duration(
        "COLLECT_INTERVAL", "1m", "1s", "24h", "How often one of the processes reads the sources."
    )
    collect_overlap_seconds: _Duration = _duration(
        "COLLECT_OVERLAP", "2m", "1s", "24h", "How much of what a source was read before is read again."
    )
    collect_page_size: _Whole = _whole_number(
        "COLLECT_PAGE_SIZE", 120, 1, 10_000, "Snapshots that a source is asked for at once."
    )
    collect_max_pages: _Whole = _whole_number(
        "COLLECT_MAX_PAGES", 1000, 1, 1_000_000, "Pages of one source in one run; the next run reads on."
    )
    default_region: Annotated[str, Field(pattern=r"^[\x20-\x7e]{0,64}$")] = _setting(
        "DEFAULT_REGION",
        "",
        "be at most 64 visible characters",
        "What the facts of a source that names no region are filed under.",
        shown="empty",
    )
    source_revision: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,80}$")] = _setting(
        "SOURCE_REVISION",
        "billing-service-v1",
        "be 1 to 80 visible characters",
        "Names the rule by which counters are rated whose account names none.",
    )
    price_per_byte: _Price = _setting(
        "PRICE_PER_BYTE",
        Decimal(0),
        "be a price in USDC of at most 18 places, such as 0.000000001",
        "What a unit costs an account that has no price of its own.",
        shown="0",
    )
    initial_included_quota_bytes: _Whole = _whole_number(
        "INITIAL_INCLUDED_QUOTA_BYTES", 0, 0, 2**62, "Units that a new counter account may use for nothing."
    )
    initial_balance: _Price = _setting(
        "INITIAL_BALANCE",
        Decimal(0),
        "be 0: money that nobody paid is granted by an operator, and is then in the books",
        "Taken so that an existing `.env` keeps working.",
        shown="0",
        le=Decimal(0),
    )
    arrears_suspend_seconds: _Duration = _duration(
        "ARREARS_SUSPEND_THRESHOLD", "336h", "1s", "87600h", "How long a vault may owe before it is suspended."
    )
    arrears_sweep_seconds: _Duration = _duration(
        "ARREARS_SWEEP_INTERVAL", "1h", "1s", "24h", "How often vaults are looked for that owe for so long."
    )
    image: Annotated[str, Field(pattern=r"^[\x21-\x7e]{0,500}$")] = _setting(
        "IMAGE",
        "",
        "be at most 500 visible characters",
        "The image that this process was started from; `/api/ping` takes it apart.",
        shown="empty",
    )
    invoice_job_interval_seconds: _Milliseconds = _milliseconds(
        "MONTHLY_INVOICE_JOB_INTERVAL_MS",
        3_600_000,
        10,
        86_400_000,
        "How often it is looked whether a month can be closed, about a day after its end.",
    )

    # Health and browsers
    health_check_db_timeout_seconds: _Milliseconds = _milliseconds(
        "HEALTH_CHECK_DB_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for the database."
    )
    health_request_timeout_seconds: _Milliseconds = _milliseconds(
        "HEALTH_REQUEST_TIMEOUT_MS", 5000, 1, 60_000, "How long `/api/health` may take in all."
    )
    cors_allowed_origins: _Origins = _setting(
        "CORS_ALLOWED_ORIGINS",
        _default_origins,
        "be a comma list of origins such as https://app.example.com",
        "Origins whose browsers may read answers; set but empty allows none.",
        shown="none in production, else http://localhost:5173",
    )

    @property
    def is_production(self) -> bool:
        """Whether this is production."""
        return self.environment == "production"

    @property
    def tls_enabled(self) -> bool:
        """Whether the listener speaks TLS."""
        return self.tls_cert_file is not None

    @property
    def database_dsn(self) -> SecretStr | None:
        """The database's URL, from DATABASE_URL or made of the DB_* variables; None means an embedded PostgreSQL."""
        if self.database_url is not None or self.db_host is None:
            return self.database_url
        user, password, name = (
            quote(text, safe="") for text in (self.db_user, self.db_password.get_secret_value(), self.db_name)
        )
        if self.db_host.startswith("/"):
            where = f"/{name}?host={quote(self.db_host, safe='')}&port={self.db_port}"
        else:
            host = f"[{self.db_host}]" if ":" in self.db_host else self.db_host
            where = f"{host}:{self.db_port}/{name}"
        return SecretStr(f"postgresql://{user}:{password}@{where}")

    @property
    def meter_sources(self) -> tuple[SourceOffer, ...]:
        """The meter sources that the environment describes."""
        return offers_of(self.exporter_sources_json, self.exporter_base_url, self.default_region)

    @property
    def redis_address(self) -> RedisAddress | None:
        """What REDIS_URL says; None where rate limits are not shared."""
        return None if self.redis_url is None else _redis_address(self.redis_url.get_secret_value())

    @property
    def network_passphrase(self) -> str:
        """The passphrase of the network in use."""
        return self.stellar_network_passphrase or PASSPHRASES[self.stellar_network]

    def explorer_of(self, network: str) -> str | None:
        """Return what a transaction's hash is put behind for people to look at; None where nobody shows it."""
        if network != self.stellar_network:
            return EXPLORERS[network]
        if self.stellar_explorer_url is not None:
            return self.stellar_explorer_url
        return EXPLORERS[network] if self.network_passphrase == PASSPHRASES[network] else None

    @property
    def rpc_urls(self) -> tuple[str, ...]:
        """The RPC nodes of the network in use."""
        of_network: tuple[str, ...] = getattr(self, f"soroban_{self.stellar_network}_rpc_url")
        return self.soroban_rpc_url or of_network

    @property
    def horizon_url_in_use(self) -> str | None:
        """The Horizon of the network in use."""
        of_network: str | None = getattr(self, f"stellar_{self.stellar_network}_horizon_url")
        return self.horizon_url or of_network

    @property
    def vault_contract_id(self) -> str | None:
        """The vault contract of the network in use."""
        found: str | None = getattr(self, f"stellar_{self.stellar_network}_vault_contract_id")
        return found

    @property
    def settlement_contract_id(self) -> str | None:
        """The settlement contract of the network in use."""
        found: str | None = getattr(self, f"stellar_{self.stellar_network}_settlement_contract_id")
        return found

    @property
    def webhook_key(self) -> bytes:
        """What webhooks' secrets are derived from; with neither setting, so not in production, what anyone can know."""
        secret = self.webhook_secret or self.jwt_secret
        return b"callora development" if secret is None else secret.get_secret_value().encode()

    @property
    def call_alias_targets(self) -> dict[str, str]:
        """What follows `/v1/call/` in place of each prefix of CALL_ALIASES."""
        return {prefix: target for prefix, _, target in (alias.partition("=") for alias in self.call_aliases)}

    @property
    def upstream_allowed_hosts(self) -> frozenset[str]:
        """The host names of UPSTREAM_HOST_ALLOWLIST, in lower case."""
        return frozenset(item for item in self.upstream_host_allowlist if item != "*" and "/" not in item)

    @property
    def upstream_allowed_networks(self) -> tuple[Network, ...]:
        """The networks of UPSTREAM_HOST_ALLOWLIST; a single address is a network of one, `*` is both whole families."""
        items = self.upstream_host_allowlist
        everything = ("0.0.0.0/0", "::/0") if "*" in items else ()
        return tuple(ipaddress.ip_network(item) for item in (*items, *everything) if "/" in item)


@attrs.frozen
class Documented:
    """One setting as docs/configuration.md shows it."""

    names: tuple[str, ...]
    """Its variables; the first that is set counts."""
    default: str
    """What holds where none is set."""
    must: str
    """Its form and bounds, after the word "must"."""
    meaning: str
    """What it does."""
    secret: bool
    """Whether its value is never printed."""


def _documented(field: FieldInfo) -> Documented:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return Documented(
        names=tuple(extra["names"]),  # type: ignore[arg-type]
        default=str(extra["shown"]),
        must=str(extra["must"]),
        meaning=field.description or "",
        secret="SecretStr" in str(field.annotation),
    )


SETTINGS: Final[Mapping[str, Documented]] = {name: _documented(field) for name, field in Settings.model_fields.items()}
"""Every setting by its attribute, in the order of the documentation."""

_Conflict = tuple[tuple[str, ...], str]


def _conflicts(settings: Settings) -> Iterator[_Conflict]:
    """Yield what settings contradict one another: the attributes at odds, and the line to print."""
    if settings.hold_ttl_seconds <= settings.proxy_timeout_seconds:
        yield (
            ("hold_ttl_seconds", "proxy_timeout_seconds"),
            f"HOLD_TTL_SECONDS: must exceed PROXY_TIMEOUT_MS ({settings.proxy_timeout_seconds:g} s), "
            f"got {settings.hold_ttl_seconds:g} s",
        )
    if settings.idempotency_retention_seconds <= settings.hold_ttl_seconds:
        yield (
            ("idempotency_retention_seconds", "hold_ttl_seconds"),
            "IDEMPOTENCY_RETENTION_WINDOW_SECONDS: must exceed HOLD_TTL_SECONDS "
            f"({settings.hold_ttl_seconds:g} s), got {settings.idempotency_retention_seconds:g} s",
        )
    files = {"TLS_CERT_FILE": settings.tls_cert_file, "TLS_KEY_FILE": settings.tls_key_file}
    missing = [name for name, file in files.items() if file is None]
    if len(missing) == 1:
        other = next(name for name in files if name not in missing)
        yield (("tls_cert_file", "tls_key_file"), f"{missing[0]}: is required where {other} is set")
    others = ("jwt_secret", "admin_api_key", "metrics_api_key")
    if settings.internal_service_token is not None and settings.internal_service_token in (
        getattr(settings, name) for name in others
    ):
        yield (
            ("internal_service_token", *others),
            "INTERNAL_SERVICE_TOKEN: must be a secret of its own: who has it is no operator",
        )
    yield from _chain_conflicts(settings)
    for line in source_conflicts(
        settings.exporter_sources_json,
        settings.meter_sources,
        settings.exporter_tokens,
        settings.internal_service_token,
    ):
        yield ("exporter_sources_json", "exporter_base_url", "exporter_tokens", "internal_service_token"), line
    if not settings.is_production:
        return
    for name in ("jwt_secret", "admin_api_key", "metrics_api_key"):
        if getattr(settings, name) is None:
            yield ((name,), f"{name.upper()}: is required in production")
    if settings.auth_signing_seed is not None and settings.auth_home_domain is None:
        yield (
            ("auth_signing_seed", "auth_home_domain"),
            "AUTH_HOME_DOMAIN: is required in production where AUTH_SIGNING_SEED is set",
        )
    if settings.stellar_network == "mainnet" and settings.network_passphrase != PASSPHRASES["mainnet"]:
        yield (
            ("stellar_network", "stellar_network_passphrase"),
            "STELLAR_NETWORK_PASSPHRASE: must be mainnet's own in production, or be left out",
        )
    if settings.database_dsn is None:
        yield (("database_url", "db_host"), "DATABASE_URL: is required in production (or DB_HOST)")
    if "*" in settings.upstream_host_allowlist:
        yield (
            ("upstream_host_allowlist",),
            "UPSTREAM_HOST_ALLOWLIST: must name hosts or ranges in production, got '*'",
        )


def _chain_conflicts(settings: Settings) -> Iterator[_Conflict]:
    network = settings.stellar_network
    if settings.soroban_rpc_enabled:
        if not settings.rpc_urls:
            yield (
                ("soroban_rpc_enabled", "soroban_rpc_url", f"soroban_{network}_rpc_url"),
                "SOROBAN_RPC_URL: is required where SOROBAN_RPC_ENABLED is true "
                f"(or SOROBAN_{network.upper()}_RPC_URL)",
            )
        if settings.vault_contract_id is None:
            name = f"stellar_{network}_vault_contract_id"
            yield (
                ("soroban_rpc_enabled", name),
                f"{name.upper()}: is required where SOROBAN_RPC_ENABLED is true",
            )
    if settings.horizon_enabled and settings.horizon_url_in_use is None:
        yield (
            ("horizon_enabled", "horizon_url", f"stellar_{network}_horizon_url"),
            f"HORIZON_URL: is required where HORIZON_ENABLED is true (or STELLAR_{network.upper()}_HORIZON_URL)",
        )
    if settings.horizon_enabled and not settings.soroban_rpc_enabled:
        yield (
            ("horizon_enabled", "soroban_rpc_enabled"),
            "HORIZON_ENABLED: needs SOROBAN_RPC_ENABLED, which Horizon is second to",
        )
    if settings.vault_contract_id is not None and settings.vault_contract_id == settings.settlement_contract_id:
        names = (f"stellar_{network}_vault_contract_id", f"stellar_{network}_settlement_contract_id")
        yield names, f"{names[1].upper()}: must be another contract than {names[0].upper()}"
    if settings.vault_owner_seed is not None and not settings.channel_seeds:
        yield (
            ("vault_owner_seed", "channel_seeds"),
            "CHANNEL_SEEDS: is required where VAULT_OWNER_SEED is set",
        )
    yield from _settlement_conflicts(settings)
    yield from _seed_conflicts(settings)


def _settlement_conflicts(settings: Settings) -> Iterator[_Conflict]:
    seeds = {name: getattr(settings, name) for name in _SETTLING}
    missing = [name for name, seed in seeds.items() if seed is None]
    if len(missing) == 1:
        other = next(name for name in seeds if name not in missing)
        yield tuple(seeds), f"{missing[0].upper()}: is required where {other.upper()} is set"
    if not missing:
        if not settings.soroban_rpc_enabled:
            yield (
                ("settlement_charging_seed", "soroban_rpc_enabled"),
                "SETTLEMENT_CHARGING_SEED: needs SOROBAN_RPC_ENABLED",
            )
        if not settings.channel_seeds:
            yield (
                ("settlement_charging_seed", "channel_seeds"),
                "CHANNEL_SEEDS: is required where SETTLEMENT_CHARGING_SEED is set",
            )
    if settings.platform_fee_bps and settings.platform_fee_address is None:
        yield (
            ("platform_fee_bps", "platform_fee_address"),
            "PLATFORM_FEE_ADDRESS: is required where PLATFORM_FEE_BPS is not 0",
        )


_SETTLING: Final = ("settlement_charging_seed", "settlement_crediting_seed")


def _seed_conflicts(settings: Settings) -> Iterator[_Conflict]:
    """Yield which keys do two things that must not be one key's."""
    channels = set(settings.channel_seeds)
    if settings.vault_owner_seed in channels:
        yield (
            ("vault_owner_seed", "channel_seeds"),
            "CHANNEL_SEEDS: must not hold VAULT_OWNER_SEED, whose account others' transactions would block",
        )
    if settings.fee_bumper_secret_key in channels:
        yield (
            ("fee_bumper_secret_key", "channel_seeds"),
            "CHANNEL_SEEDS: must not hold FEE_BUMPER_SECRET_KEY, which rescues them",
        )
    settling = {
        "SETTLEMENT_CHARGING_SEED": settings.settlement_charging_seed,
        "SETTLEMENT_CREDITING_SEED": settings.settlement_crediting_seed,
    }
    taken = {settings.vault_owner_seed, settings.fee_bumper_secret_key, *channels} - {None}
    for name, seed in settling.items():
        if seed is not None and seed in taken:
            yield ((name.lower(),), f"{name}: must be a key of its own: what it may move is counted")
        taken.add(seed)
    if settings.auth_signing_seed is not None:
        others = {settings.vault_owner_seed, settings.fee_bumper_secret_key, *channels, *settling.values()}
        if settings.auth_signing_seed in others:
            yield (
                ("auth_signing_seed", "vault_owner_seed", "channel_seeds", "fee_bumper_secret_key", *_SETTLING),
                "AUTH_SIGNING_SEED: must be a key of its own: it signs what strangers ask for",
            )


def _shown(text: str) -> str:
    """Return a rejected value as a message may show it: short, and without what could be a password in a URL."""
    if "://" in text and "@" in text:
        return "a URL with credentials"
    return repr(text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…")


def _unknown(environ: Mapping[str, str]) -> Iterator[str]:
    known = [*(name for setting in SETTINGS.values() for name in setting.names), *_READ_ELSEWHERE]
    for name in sorted(environ):
        if name.upper().startswith(_PREFIX) and name not in known:
            near = difflib.get_close_matches(name.upper().removeprefix(_PREFIX), known, n=1)
            yield f"{name}: is not a setting" + (f"; did you mean {near[0]}?" if near else "")


def _read(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return, by attribute, the variable that is set and its text."""
    found: dict[str, tuple[str, str]] = {}
    for attribute, setting in SETTINGS.items():
        keeps_empty = attribute in ("cors_allowed_origins", "upstream_host_allowlist")
        for name in setting.names:
            raw = environ.get(name)
            if raw is None:
                continue
            text = raw if setting.secret else raw.strip()
            if text or keeps_empty:
                found[attribute] = (name, text)
                break
    tokens = tokens_of(environ)
    if tokens is not None:
        found["exporter_tokens"] = ("EXPORTER_TOKEN_", tokens)
    return found


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings that the mapping describes.

    A variable that is set but empty counts as not set (lists excepted), as Compose files leave them. A variable that
    begins with CALLORA_ and is no setting is refused as a misspelling.

    Args:
        environ: variable names and texts, such as `os.environ`; nothing else is read but the TLS files it names.

    Raises:
        ConfigurationInvalid: with every problem found, in the order of the documentation, unknown names last.
    """
    found = _read(environ)
    problems: dict[str, str] = {}

    def build(attributes: dict[str, tuple[str, str]]) -> Settings:
        return Settings(**{attribute: text for attribute, (_, text) in attributes.items()})  # type: ignore[arg-type]

    try:
        settings = build(found)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False, include_context=False, include_input=False):
            attribute = str(error["loc"][0])
            if attribute not in found:
                continue  # a default that depends on others is not made while one of them is wrong
            name, text = found[attribute]
            got = "" if SETTINGS[attribute].secret else f", got {_shown(text)}"
            problems[attribute] = f"{name}: must {SETTINGS[attribute].must}{got}"
        settings = build({attribute: value for attribute, value in found.items() if attribute not in problems})
    at_odds = [line for attributes, line in _conflicts(settings) if not problems.keys() & set(attributes)]
    lines = (*(problems[name] for name in SETTINGS if name in problems), *at_odds, *_unknown(environ))
    if lines:
        raise ConfigurationInvalid(lines)
    return settings
