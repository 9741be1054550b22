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
from urllib.parse import quote, urlsplit

import attrs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from callora.ledger.wallets import is_seed

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX: Final = "CALLORA_"
_READ_ELSEWHERE: Final = ("CALLORA_PG_BIN",)
"""Variables of ours that are no settings of the service: where the embedded PostgreSQL's programs are."""
_SHOWN_CHARS_MAX: Final = 80
_JWT_SECRET_BYTES_MIN: Final = 32
_DOMAIN_CHARS_MAX: Final = 59
"""A login challenge has an entry named by the domain and " auth", and Stellar allows such a name 64 bytes."""
_HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?", re.ASCII)
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(b|kb|mb|gb|tb)?", re.ASCII | re.IGNORECASE)
_SIZE_UNITS: Final = {"b": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3, "tb": 1024**4}
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


def _signing_secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value().encode()) < _JWT_SECRET_BYTES_MIN:
        raise ValueError("too short")
    return value


def _signing_seed(value: SecretStr) -> SecretStr:
    if not is_seed(value.get_secret_value()):
        raise ValueError("not a seed")
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
_Claim = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]
_Networks = Annotated[tuple[Network, ...], BeforeValidator(_split)]
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
        "The Stellar network that wallets log in on.",
    )
    auth_signing_seed: Annotated[SecretStr, AfterValidator(_signing_seed)] | None = _setting(
        "AUTH_SIGNING_SEED",
        None,
        "be a Stellar seed (S and 55 more characters)",
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
        "Upstreams that may be called although their addresses are private. `*` allows all, not in production.",
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
    actor_mailbox_max: _Whole = _whole_number(
        "ACTOR_MAILBOX_MAX", 1024, 1, 1_000_000, "Commands that may wait for one vault; past it they are refused."
    )
    writer_round_max: _Whole = _whole_number(
        "WRITER_ROUND_MAX", 1000, 1, 10_000, "Commands that one round of the ledger may carry."
    )
    catalogue_refresh_seconds: _Milliseconds = _milliseconds(
        "CATALOGUE_REFRESH_MS", 300, 10, 60_000, "How often changed keys, APIs and prices are read."
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
    if settings.database_dsn is None:
        yield (("database_url", "db_host"), "DATABASE_URL: is required in production (or DB_HOST)")
    if "*" in settings.upstream_host_allowlist:
        yield (
            ("upstream_host_allowlist",),
            "UPSTREAM_HOST_ALLOWLIST: must name hosts or ranges in production, got '*'",
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
