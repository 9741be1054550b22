"""Settings: every environment variable Callora reads, its form, its bounds and its default.

An attribute that is a duration ends in `_seconds` whatever the unit of its variable, a size in `_bytes`.
"""

import ipaddress
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

import attrs
from pydantic import BeforeValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from callora.config.fields import duration, milliseconds, seconds, setting, size, usdc, whole_number
from callora.config.forms import (
    DOMAIN_CHARS_MAX,
    JWT_SECRET_BYTES_MIN,
    SERVICE_TOKEN_CHARS_MIN,
    Address,
    CallAliases,
    Claim,
    Contract,
    DatabaseUrl,
    Domain,
    Duration,
    File,
    HeaderSecret,
    Host,
    LogLevel,
    Milliseconds,
    Network,
    Networks,
    NodeUrl,
    NodeUrls,
    Origins,
    Price,
    RedisAddress,
    RedisUrl,
    Seed,
    Seeds,
    ServiceToken,
    SigningSecret,
    Size,
    Sources,
    Tokens,
    UpstreamHosts,
    Usdc,
    Whole,
    WholeSeconds,
    lower,
    redis_address,
)
from callora.config.metering import offers_of
from callora.ledger.collecting import SourceOffer

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
    environment: Annotated[Literal["development", "test", "production"], BeforeValidator(lower)] = setting(
        "APP_ENV NODE_ENV",
        "development",
        "be development, test or production",
        "Where this process runs. In production secrets and a database are required and logs are JSON.",
    )
    host: Host = setting(
        "HOST",
        _default_host,
        "be an address or a host name",
        "The address to listen on.",
        shown="0.0.0.0 in production, else 127.0.0.1",
    )
    port: Whole = whole_number("PORT", 3000, 0, 65535, "The port to listen on; 0 lets the system choose.")
    app_version: str = setting(
        "APP_VERSION",
        "1.0.0",
        "be 1 to 64 visible characters",
        "The version that `/api/health` reports.",
        pattern=r"^[\x21-\x7e]{1,64}$",
    )
    log_level: LogLevel = setting(
        "LOG_LEVEL",
        "info",
        "be debug, info, warning, error or critical",
        "The least severe record that is written; trace, verbose and http mean debug, warn warning, fatal critical.",
    )
    drain_timeout_seconds: Milliseconds = milliseconds(
        "DRAIN_TIMEOUT_MS", 30_000, 0, 600_000, "How long accepted calls may go on after SIGTERM."
    )
    tls_cert_file: File | None = setting(
        "TLS_CERT_FILE",
        None,
        "be a readable file",
        "The certificate chain (PEM) that the listener presents; needs TLS_KEY_FILE.",
        shown="none: plain HTTP",
    )
    tls_key_file: File | None = setting(
        "TLS_KEY_FILE", None, "be a readable file", "The private key (PEM) of TLS_CERT_FILE.", shown="none"
    )
    trusted_proxy_count: Whole = whole_number(
        "TRUSTED_PROXY_COUNT",
        0,
        0,
        32,
        "How many proxies in front of Callora are ours: the client's address is that entry of X-Forwarded-For, "
        "counted from the right. With 0 the header is ignored.",
    )

    # Secrets
    jwt_secret: SigningSecret | None = setting(
        "JWT_SECRET",
        None,
        f"be at least {JWT_SECRET_BYTES_MIN} bytes",
        "The key that signs dashboard sessions.",
        shown="required in production",
    )
    admin_api_key: HeaderSecret | None = setting(
        "ADMIN_API_KEY",
        None,
        "be visible ASCII characters",
        "What administrators present.",
        shown="required in production",
    )
    metrics_api_key: HeaderSecret | None = setting(
        "METRICS_API_KEY",
        None,
        "be visible ASCII characters",
        "What Prometheus presents as a Bearer token at `/api/metrics` in production.",
        shown="required in production",
    )
    internal_service_token: ServiceToken | None = setting(
        "INTERNAL_SERVICE_TOKEN",
        None,
        f"be at least {SERVICE_TOKEN_CHARS_MIN} visible ASCII characters",
        "What services that charge outside the proxy present as a Bearer token; without it no service is let in.",
        shown="–",
    )

    jwt_issuer: Claim | None = setting(
        "JWT_ISSUER",
        None,
        "be 1 to 255 visible characters",
        "The `iss` of access tokens; where set, no other is taken.",
        shown="none: not checked",
    )
    jwt_audience: Claim | None = setting(
        "JWT_AUDIENCE",
        None,
        "be 1 to 255 visible characters",
        "The `aud` of access tokens; where set, no other is taken.",
        shown="none: not checked",
    )
    admin_ip_allowed_ranges: Networks = setting(
        "ADMIN_IP_ALLOWED_RANGES",
        (),
        "be a comma list of addresses and CIDR ranges",
        "Where operators may come from.",
        shown="empty: from anywhere",
    )

    # Logging in with a wallet
    stellar_network: Annotated[Literal["testnet", "mainnet"], BeforeValidator(lower)] = setting(
        "STELLAR_NETWORK SOROBAN_NETWORK",
        "testnet",
        "be testnet or mainnet",
        "The Stellar network that wallets log in on and deposits come from. Of the settings that are named by a "
        "network, only those of this one count.",
    )
    stellar_network_passphrase: Annotated[str, Field(pattern=r"^[\x20-\x7e]{1,200}$")] | None = setting(
        "STELLAR_NETWORK_PASSPHRASE",
        None,
        "be 1 to 200 visible characters",
        "The network's passphrase, where it is neither of the public ones: that of a sandbox.",
        shown="that of STELLAR_NETWORK",
    )
    auth_signing_seed: Seed | None = setting(
        "AUTH_SIGNING_SEED",
        None,
        _SEED_RULE,
        "Signs the challenges of SEP-10 and nothing else; its public key is in `/.well-known/stellar.toml`. It needs "
        "no account on the network.",
        shown="none: `/auth` answers 503",
    )
    auth_home_domain: Domain | None = setting(
        "AUTH_HOME_DOMAIN",
        None,
        f"be a domain name of at most {DOMAIN_CHARS_MAX} characters, with a port where it is not 443",
        "The domain that wallets show when they log in, under which this service's stellar.toml and `/auth` are "
        "reached; required in production where AUTH_SIGNING_SEED is set. What a request calls its Host is never "
        "believed.",
        shown="localhost and the port",
    )

    # The chain
    soroban_rpc_enabled: bool = setting(
        "SOROBAN_RPC_ENABLED",
        False,
        "be true or false",
        "Whether this service speaks to the Stellar network: deposits, withdrawals and everything on chain. It then "
        "needs an RPC URL and the vault contract of the network.",
        shown="false",
    )
    soroban_rpc_url: NodeUrls = setting(
        "SOROBAN_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "Stellar RPC nodes, the preferred one first; where one fails, the next is asked.",
        shown="that of the network",
    )
    soroban_testnet_rpc_url: NodeUrls = setting(
        "SOROBAN_TESTNET_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "The same for testnet, where SOROBAN_RPC_URL is not set.",
        shown="none",
    )
    soroban_mainnet_rpc_url: NodeUrls = setting(
        "SOROBAN_MAINNET_RPC_URL",
        (),
        f"be a comma list of URLs, {_URL_RULE}",
        "The same for mainnet, where SOROBAN_RPC_URL is not set.",
        shown="none",
    )
    soroban_rpc_timeout_seconds: Milliseconds = milliseconds(
        "SOROBAN_RPC_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for an RPC node."
    )
    horizon_enabled: bool = setting(
        "HORIZON_ENABLED",
        False,
        "be true or false",
        "Whether Horizon is asked where RPC does not answer or no longer knows; needs SOROBAN_RPC_ENABLED.",
        shown="false",
    )
    horizon_url: NodeUrl | None = setting(
        "HORIZON_URL", None, f"be a URL, {_URL_RULE}", "The Horizon server.", shown="that of the network"
    )
    stellar_testnet_horizon_url: NodeUrl | None = setting(
        "STELLAR_TESTNET_HORIZON_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The same for testnet, where HORIZON_URL is not set.",
        shown="none",
    )
    stellar_mainnet_horizon_url: NodeUrl | None = setting(
        "STELLAR_MAINNET_HORIZON_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The same for mainnet, where HORIZON_URL is not set.",
        shown="none",
    )
    horizon_timeout_seconds: Milliseconds = milliseconds(
        "HORIZON_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for Horizon."
    )
    stellar_testnet_vault_contract_id: Contract | None = setting(
        "STELLAR_TESTNET_VAULT_CONTRACT_ID", None, _CONTRACT_RULE, "The vault contract on testnet.", shown="none"
    )
    stellar_mainnet_vault_contract_id: Contract | None = setting(
        "STELLAR_MAINNET_VAULT_CONTRACT_ID", None, _CONTRACT_RULE, "The vault contract on mainnet.", shown="none"
    )
    stellar_testnet_settlement_contract_id: Contract | None = setting(
        "STELLAR_TESTNET_SETTLEMENT_CONTRACT_ID",
        None,
        _CONTRACT_RULE,
        "The settlement contract on testnet; where set, the vault contract must name the same.",
        shown="none: what the vault contract names",
    )
    stellar_mainnet_settlement_contract_id: Contract | None = setting(
        "STELLAR_MAINNET_SETTLEMENT_CONTRACT_ID",
        None,
        _CONTRACT_RULE,
        "The settlement contract on mainnet; where set, the vault contract must name the same.",
        shown="none: what the vault contract names",
    )
    stellar_base_fee_stroops: Whole = whole_number(
        "STELLAR_BASE_FEE", 100, 100, 10_000_000, "What a transaction bids for its inclusion, in stroops of XLM."
    )
    stellar_transaction_timeout_seconds: WholeSeconds = seconds(
        "STELLAR_TRANSACTION_TIMEOUT TRANSACTION_TIMEOUT",
        300,
        10,
        86_400,
        "How long a prepared deposit may be signed and sent; then it is void.",
    )
    circuit_breaker_threshold: Whole = whole_number(
        "CIRCUIT_BREAKER_THRESHOLD",
        5,
        1,
        10_000,
        "Questions in a row that nobody answered, each in all its attempts, that open RPC's breaker, or Horizon's.",
    )
    circuit_breaker_cooldown_seconds: Milliseconds = milliseconds(
        "CIRCUIT_BREAKER_COOLDOWN_MS", 30_000, 1, 3_600_000, "How long it then refuses before it admits a trial."
    )
    retry_max_attempts: Whole = whole_number(
        "RETRY_MAX_ATTEMPTS", 3, 1, 20, "How often a question to the chain is asked in all; every node once each time."
    )
    retry_base_delay_seconds: Milliseconds = milliseconds(
        "RETRY_BASE_DELAY_MS",
        1000,
        1,
        60_000,
        "The pause before the second attempt; each further one is twice as long, up to 10 s, 30 % more or less.",
    )
    vault_owner_seed: Seed | None = setting(
        "VAULT_OWNER_SEED",
        None,
        _SEED_RULE,
        "The vault contract's owner: admits depositors and pays withdrawals out; needs CHANNEL_SEEDS. Without it "
        "operators do both (`callora depositors`).",
        shown="none",
    )
    channel_seeds: Seeds = setting(
        "CHANNEL_SEEDS",
        (),
        "be a comma list of Stellar seeds (S and 55 more characters)",
        "Accounts that carry Callora's transactions, one transaction at a time each, and pay their fees. Nothing else "
        "may use them.",
        shown="none",
    )
    fee_bumper_secret_key: Seed | None = setting(
        "FEE_BUMPER_SECRET_KEY",
        None,
        _SEED_RULE,
        "The account that pays the fees of users' deposits, and of transactions that are stuck.",
        shown="none: users pay their own",
    )
    deposit_listener_interval_seconds: Milliseconds = milliseconds(
        "DEPOSIT_LISTENER_INTERVAL_MS", 1000, 10, 3_600_000, "How often the vault contract's events are asked for."
    )
    chain_reconciliation_interval_seconds: Milliseconds = milliseconds(
        "CHAIN_RECONCILIATION_INTERVAL_MS",
        60_000,
        100,
        86_400_000,
        "How often the vault contract's balance is compared with the ledger's.",
    )
    chain_drift_max_stroops: Whole = whole_number(
        "CHAIN_DRIFT_MAX_STROOPS",
        0,
        0,
        10**17,
        "By how many stroops of USDC they may differ before settlement stops.",
    )

    # Settlement
    platform_fee_bps: Whole = whole_number(
        "PLATFORM_FEE_BPS",
        0,
        0,
        10_000,
        "The platform's share of every call, in hundredths of a percent, rounded down; a change holds for calls from "
        "two minutes after the start on. Needs PLATFORM_FEE_ADDRESS where it is not 0.",
    )
    platform_fee_address: Address | None = setting(
        "PLATFORM_FEE_ADDRESS",
        None,
        "be an address (G or C and 55 more characters)",
        "Who is credited with the platform's share by the settlement contract.",
        shown="none",
    )
    revenue_indexer_interval_seconds: Milliseconds = milliseconds(
        "REVENUE_LEDGER_INDEXER_INTERVAL_MS",
        30_000,
        10,
        3_600_000,
        "How often the revenue of developers is indexed; a settlement does so first.",
    )
    settlement_charging_seed: Seed | None = setting(
        "SETTLEMENT_CHARGING_SEED",
        None,
        _SEED_RULE,
        "The key that charges the vault contract, which must be its authorized caller; needs "
        "SETTLEMENT_CREDITING_SEED. Without both nothing is settled by this process.",
        shown="none",
    )
    settlement_crediting_seed: Seed | None = setting(
        "SETTLEMENT_CREDITING_SEED",
        None,
        _SEED_RULE,
        "The key that credits developers, which must be the settlement contract's administrator.",
        shown="none",
    )
    settlement_charging_cap_stroops: Usdc = usdc(
        "SETTLEMENT_CHARGING_CAP_USDC",
        "100000",
        "1",
        "What the charging key may charge in an hour, in all processes together.",
    )
    settlement_crediting_cap_stroops: Usdc = usdc(
        "SETTLEMENT_CREDITING_CAP_USDC",
        "100000",
        "1",
        "What the crediting key may credit in an hour, in all processes together.",
    )
    settlement_min_payout_stroops: Usdc = usdc(
        "SETTLEMENT_MIN_PAYOUT_USDC", "5", "0.0000001", "What a developer must have earned to be paid."
    )
    settlement_interval_seconds: Milliseconds = milliseconds(
        "SETTLEMENT_INTERVAL_MS",
        3_600_000,
        1000,
        604_800_000,
        "How often developers are paid; `callora settle --now` does not wait.",
    )
    settlement_status_sync_interval_seconds: Milliseconds = milliseconds(
        "SETTLEMENT_STATUS_SYNC_INTERVAL_MS",
        60_000,
        100,
        3_600_000,
        "How often settlements under way are looked at: what waits is tried again, what nobody carries on is taken up.",
    )
    settlement_status_sync_timeout_seconds: Milliseconds = milliseconds(
        "SETTLEMENT_STATUS_SYNC_TIMEOUT_MS",
        5000,
        1,
        600_000,
        "How long the chain may take to answer one question of such a look.",
    )
    settlement_recon_interval_seconds: Milliseconds = milliseconds(
        "SETTLEMENT_RECON_INTERVAL_MS",
        86_400_000,
        1000,
        604_800_000,
        "How often usage, revenue, settlements and the chain are compared; the first time at the start.",
    )
    stellar_explorer_url: NodeUrl | None = setting(
        "STELLAR_EXPLORER_URL",
        None,
        "be an https URL, or an http one of this machine, without credentials, query or fragment",
        "What a transaction's hash is put behind for people to look at; known of the public networks, and none on any "
        "other.",
        shown="the network's, else none",
    )

    # PostgreSQL
    database_url: DatabaseUrl | None = setting(
        "DATABASE_URL",
        None,
        "be a URL such as postgresql://user:password@host:5432/callora",
        "The database; comes before the DB_* variables. In production one of both is required; "
        "elsewhere, without either, an embedded PostgreSQL is started.",
        shown="none",
    )
    db_host: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^\S+$")] | None = setting(
        "DB_HOST",
        None,
        "be a host name, an address or the directory of a UNIX socket",
        "The database server, where DATABASE_URL is not set.",
        shown="none",
    )
    db_port: Whole = whole_number("DB_PORT", 5432, 1, 65535, "The database server's port.")
    db_user: Annotated[str, Field(min_length=1, max_length=63)] = setting(
        "DB_USER", "postgres", "be 1 to 63 characters", "The database role."
    )
    db_password: SecretStr = setting(
        "DB_PASSWORD", SecretStr("postgres"), "be a password", "The role's password.", shown="postgres"
    )
    db_name: Annotated[str, Field(min_length=1, max_length=63)] = setting(
        "DB_NAME", "callora", "be 1 to 63 characters", "The database's name."
    )
    db_pool_max: Whole = whole_number(
        "DB_POOL_MAX",
        10,
        1,
        1000,
        "Pooled connections, besides two of the gateway's own, for rounds and for idempotency keys.",
    )
    db_idle_timeout_seconds: Milliseconds = milliseconds(
        "DB_IDLE_TIMEOUT_MS", 30_000, 0, 86_400_000, "How long an unused pooled connection is kept; 0 keeps it."
    )
    db_conn_timeout_seconds: Milliseconds = milliseconds(
        "DB_CONN_TIMEOUT_MS", 2000, 1, 600_000, "How long connecting, or waiting for a pooled connection, may take."
    )
    commit_timeout_seconds: Milliseconds = milliseconds(
        "COMMIT_TIMEOUT_MS",
        5000,
        1,
        600_000,
        "How long a round of the ledger may take; past it its outcome is unknown and looked up.",
    )

    # The gateway's clients
    client_head_timeout_seconds: Milliseconds = milliseconds(
        "CLIENT_HEAD_TIMEOUT_MS", 10_000, 1, 600_000, "How long a request head may take to arrive."
    )
    client_idle_timeout_seconds: Milliseconds = milliseconds(
        "CLIENT_IDLE_TIMEOUT_MS", 75_000, 1, 3_600_000, "How long a connection may stay open between requests."
    )
    client_body_timeout_seconds: Milliseconds = milliseconds(
        "CLIENT_BODY_TIMEOUT_MS",
        30_000,
        1,
        3_600_000,
        "How long a client may make no progress while sending a body or taking an answer.",
    )
    client_max_connections: Whole = whole_number(
        "CLIENT_MAX_CONNECTIONS", 10_000, 1, 1_000_000, "Open client connections of one process."
    )
    gateway_body_limit_bytes: Size = size(
        "GATEWAY_BODY_LIMIT", "1gb", "0b", "1tb", "The largest request body on `/v1/call`; it is streamed, not stored."
    )
    request_body_limit_bytes: Size = size(
        "REQUEST_BODY_LIMIT", "100kb", "1b", "100mb", "The largest request body everywhere else."
    )

    # Upstreams
    proxy_timeout_seconds: Milliseconds = milliseconds(
        "PROXY_TIMEOUT_MS", 30_000, 1, 3_600_000, "How long an upstream may take to begin its answer."
    )
    proxy_connect_timeout_seconds: Milliseconds = milliseconds(
        "PROXY_CONNECT_TIMEOUT_MS", 5000, 1, 600_000, "How long connecting to an upstream, TLS included, may take."
    )
    upstream_host_allowlist: UpstreamHosts = setting(
        "UPSTREAM_HOST_ALLOWLIST",
        (),
        "be a comma list of host names, addresses and CIDR ranges",
        "Upstreams, and webhooks' receivers, that may be called although their addresses are private. `*` allows "
        "all, not in production.",
        shown="empty",
    )
    webhook_secret: SigningSecret | None = setting(
        "WEBHOOK_SECRET",
        None,
        f"be a secret of at least {JWT_SECRET_BYTES_MIN} bytes",
        "What the secrets of webhooks are derived from; another one changes all of them.",
        shown="JWT_SECRET",
    )
    webhook_timeout_seconds: Milliseconds = milliseconds(
        "WEBHOOK_TIMEOUT_MS", 10_000, 100, 30_000, "How long telling an endpoint of an event may take."
    )
    webhook_secret_grace_seconds: Milliseconds = milliseconds(
        "WEBHOOK_SECRET_ROTATION_GRACE_MS",
        86_400_000,
        0,
        2_592_000_000,
        "How long a webhook's secret signs beside the one that replaces it.",
    )
    webhook_poll_interval_seconds: Milliseconds = milliseconds(
        "WEBHOOK_POLL_INTERVAL_MS", 500, 10, 60_000, "How often new events are looked for, to be told to webhooks."
    )
    webhook_retention_seconds: WholeSeconds = seconds(
        "WEBHOOK_RETENTION_SECONDS",
        2_592_000,
        3600,
        31_536_000,
        "How long a webhook's deliveries are kept once they are over.",
    )
    call_aliases: CallAliases = setting(
        "CALL_ALIASES",
        (),
        "be a comma list of at most 100 prefixes with the call each stands for, such as /v1/tts=text-to-speech/v2",
        "Other paths of calls: the prefix, and what follows it, is served as `/v1/call/` with the API's slug and path.",
        shown="empty",
    )
    upstream_pool_max: Whole = whole_number("UPSTREAM_POOL_MAX", 256, 1, 65535, "Connections to one upstream.")
    proxy_breaker_failure_threshold: Whole = whole_number(
        "PROXY_BREAKER_FAILURE_THRESHOLD", 5, 1, 10_000, "Failures in a row that open an API's breaker."
    )
    proxy_breaker_cooldown_seconds: Milliseconds = milliseconds(
        "PROXY_BREAKER_COOLDOWN_MS", 30_000, 1, 3_600_000, "How long an open breaker refuses before it admits a trial."
    )
    proxy_breaker_success_threshold: Whole = whole_number(
        "PROXY_BREAKER_SUCCESS_THRESHOLD", 1, 1, 1000, "Trials in a row that must succeed to close a breaker."
    )
    gateway_profiling_enabled: bool = setting(
        "GATEWAY_PROFILING_ENABLED",
        False,
        "be true or false",
        "Whether the per-API upstream series `gateway_upstream_*` are recorded.",
        shown="false",
    )

    # Limits
    gateway_rate_limit_window_seconds: Milliseconds = milliseconds(
        "GATEWAY_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of a user's limit over all keys."
    )
    gateway_rate_limit_max_requests: Whole = whole_number(
        "GATEWAY_RATE_LIMIT_MAX_REQUESTS", 100, 1, 1_000_000_000, "Calls of one user in that window."
    )
    rate_limit_window_seconds: Milliseconds = milliseconds(
        "RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of a key's limit."
    )
    rate_limit_max_requests: Whole = whole_number(
        "RATE_LIMIT_MAX_REQUESTS",
        5,
        1,
        1_000_000_000,
        "Calls of one key in that window, where neither the key nor its plan names a number.",
    )
    redis_url: RedisUrl | None = setting(
        "REDIS_URL",
        None,
        "be a URL such as redis://user:password@host:6379/0, rediss:// for TLS, or unix:///path?db=0",
        "The Redis or Valkey in which all processes share the two limits above; valkey:// and valkeys:// say the same.",
        shown="none: each process has its own",
    )
    rate_limit_on_failure: Annotated[Literal["closed", "open"], BeforeValidator(lower)] = setting(
        "RATE_LIMIT_ON_FAILURE",
        "closed",
        "be closed or open",
        "What happens to calls that REDIS_URL does not decide on within 100 ms: closed refuses them with 503, open "
        "lets each process decide by its own limits.",
    )
    key_max_concurrency: Whole = whole_number(
        "KEY_MAX_CONCURRENCY_PER_KEY", 50, 1, 1_000_000, "Calls of one key at the same time."
    )

    rest_rate_limit_window_seconds: Milliseconds = milliseconds(
        "REST_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of the dashboard routes' limit."
    )
    rest_rate_limit_max_requests: Whole = whole_number(
        "REST_RATE_LIMIT_MAX_REQUESTS",
        100,
        1,
        1_000_000_000,
        "Requests of one user, or of one address that is not logged in, in that window.",
    )
    login_rate_limit_window_seconds: Milliseconds = milliseconds(
        "LOGIN_RATE_LIMIT_WINDOW_MS", 60_000, 1, 86_400_000, "The window of the limit of logins."
    )
    login_rate_limit_max_requests: Whole = whole_number(
        "LOGIN_RATE_LIMIT_MAX_REQUESTS",
        5,
        1,
        1_000_000_000,
        "Logins of one address in that window, failed ones included; as many challenges may be asked for.",
    )

    # The ledger
    hold_ttl_seconds: WholeSeconds = seconds(
        "HOLD_TTL_SECONDS", 120, 1, 86_400, "How long a hold may stay open; must exceed PROXY_TIMEOUT_MS."
    )
    hold_sweep_interval_seconds: WholeSeconds = seconds(
        "HOLD_SWEEP_INTERVAL_SECONDS", 10, 1, 3600, "How often expired holds are looked for and released."
    )
    subscription_sweep_interval_seconds: WholeSeconds = seconds(
        "SUBSCRIPTION_SWEEP_INTERVAL_SECONDS",
        60,
        1,
        3600,
        "How often subscriptions are looked at whose paid month has ended, and approved credits that were not given.",
    )
    quota_notice_interval_seconds: WholeSeconds = seconds(
        "QUOTA_NOTICE_INTERVAL_SECONDS",
        60,
        1,
        86_400,
        "How often one of the processes looks which vaults have used up 80, 95 or 100 % of their credits.",
    )
    idempotency_retention_seconds: WholeSeconds = seconds(
        "IDEMPOTENCY_RETENTION_WINDOW_SECONDS",
        86_400,
        1,
        31_536_000,
        "How long an idempotency key is remembered; must exceed HOLD_TTL_SECONDS.",
    )
    idempotency_sweep_interval_seconds: Milliseconds = milliseconds(
        "IDEMPOTENCY_SWEEPER_INTERVAL_MS", 60_000, 100, 86_400_000, "How often forgotten keys are deleted."
    )
    idempotency_max_body_bytes: Size = size(
        "IDEMPOTENCY_MAX_BODY", "256kb", "0b", "16mb", "The largest answer that is stored to be replayed."
    )
    usage_rollup_interval_seconds: Milliseconds = milliseconds(
        "USAGE_ROLLUP_INTERVAL_MS",
        2000,
        10,
        3_600_000,
        "How often usage is added up; sums lag by about as much.",
    )
    usage_stream_interval_seconds: Milliseconds = milliseconds(
        "USAGE_STREAM_INTERVAL_MS",
        1000,
        10,
        60_000,
        "How often live usage is looked for, while anyone follows his; streams lag by about as much.",
    )
    usage_stream_heartbeat_seconds: Milliseconds = milliseconds(
        "USAGE_STREAM_HEARTBEAT_MS",
        15_000,
        10,
        30_000,
        "After how much silence a stream shows a sign of life.",
    )
    usage_notice_interval_seconds: Milliseconds = milliseconds(
        "USAGE_NOTICE_INTERVAL_MS",
        2000,
        10,
        3_600_000,
        "How often calls are gathered for webhooks that want them, while there are any.",
    )
    balance_alert_interval_seconds: Milliseconds = milliseconds(
        "BALANCE_ALERT_INTERVAL_MS",
        5000,
        10,
        3_600_000,
        "How often one of the processes looks which balances have fallen below what their owners set.",
    )
    usage_streams_max: Whole = whole_number(
        "USAGE_STREAMS_MAX", 2000, 1, 100_000, "Open streams of live usage of one process."
    )
    usage_streams_per_user_max: Whole = whole_number(
        "USAGE_STREAMS_PER_USER_MAX", 10, 1, 100_000, "Open streams of live usage of one user and process."
    )
    usage_stream_buffer_events_max: Whole = whole_number(
        "USAGE_STREAM_BUFFER_EVENTS",
        1000,
        1,
        1_000_000,
        "Calls that may wait in memory for a stream's client; one that is further behind is given them page by page.",
    )
    usage_feed_retention_seconds: WholeSeconds = seconds(
        "USAGE_FEED_RETENTION_SECONDS",
        86_400,
        60,
        2_592_000,
        "How long a stream of live usage can be taken up again after the call that was seen last.",
    )
    actor_mailbox_max: Whole = whole_number(
        "ACTOR_MAILBOX_MAX", 1024, 1, 1_000_000, "Commands that may wait for one vault; past it they are refused."
    )
    writer_round_max: Whole = whole_number(
        "WRITER_ROUND_MAX", 1000, 1, 10_000, "Commands that one round of the ledger may carry."
    )
    catalogue_refresh_seconds: Milliseconds = milliseconds(
        "CATALOGUE_REFRESH_MS", 300, 10, 60_000, "How often changed keys, APIs and prices are read."
    )

    # Metering by counters
    exporter_sources_json: Sources | None = setting(
        "EXPORTER_SOURCES_JSON",
        None,
        "be a JSON list of meter sources (docs/operations.md)",
        "Where counters are collected from, besides what operators add over REST.",
        shown="none",
    )
    exporter_base_url: NodeUrl | None = setting(
        "EXPORTER_BASE_URL",
        None,
        f"be a URL, {_URL_RULE}",
        "The one source, named `default`, of any node and environment, where EXPORTER_SOURCES_JSON is not set.",
        shown="none",
    )
    exporter_tokens: Tokens = setting(
        "EXPORTER_TOKEN_",
        dict,
        "be visible ASCII characters",
        "With a name of yours at its end: what a meter source whose credential_env names that variable is shown as a "
        "Bearer token. A source without one, of which there may be one, is shown INTERNAL_SERVICE_TOKEN.",
        shown="–",
    )
    billing_ingest_mode: Annotated[Literal["pull", "push"], BeforeValidator(lower)] = setting(
        "BILLING_INGEST_MODE",
        "pull",
        "be pull or push",
        "pull reads sources at intervals; push reads none and runs no job. Snapshots may be pushed in both.",
    )
    collect_interval_seconds: Duration = duration(
        "COLLECT_INTERVAL", "1m", "1s", "24h", "How often one of the processes reads the sources."
    )
    collect_overlap_seconds: Duration = duration(
        "COLLECT_OVERLAP", "2m", "1s", "24h", "How much of what a source was read before is read again."
    )
    collect_page_size: Whole = whole_number(
        "COLLECT_PAGE_SIZE", 120, 1, 10_000, "Snapshots that a source is asked for at once."
    )
    collect_max_pages: Whole = whole_number(
        "COLLECT_MAX_PAGES", 1000, 1, 1_000_000, "Pages of one source in one run; the next run reads on."
    )
    default_region: Annotated[str, Field(pattern=r"^[\x20-\x7e]{0,64}$")] = setting(
        "DEFAULT_REGION",
        "",
        "be at most 64 visible characters",
        "What the facts of a source that names no region are filed under.",
        shown="empty",
    )
    source_revision: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,80}$")] = setting(
        "SOURCE_REVISION",
        "billing-service-v1",
        "be 1 to 80 visible characters",
        "Names the rule by which counters are rated whose account names none.",
    )
    price_per_byte: Price = setting(
        "PRICE_PER_BYTE",
        Decimal(0),
        "be a price in USDC of at most 18 places, such as 0.000000001",
        "What a unit costs an account that has no price of its own.",
        shown="0",
    )
    initial_included_quota_bytes: Whole = whole_number(
        "INITIAL_INCLUDED_QUOTA_BYTES", 0, 0, 2**62, "Units that a new counter account may use for nothing."
    )
    initial_balance: Price = setting(
        "INITIAL_BALANCE",
        Decimal(0),
        "be 0: money that nobody paid is granted by an operator, and is then in the books",
        "Taken so that an existing `.env` keeps working.",
        shown="0",
        le=Decimal(0),
    )
    arrears_suspend_seconds: Duration = duration(
        "ARREARS_SUSPEND_THRESHOLD", "336h", "1s", "87600h", "How long a vault may owe before it is suspended."
    )
    arrears_sweep_seconds: Duration = duration(
        "ARREARS_SWEEP_INTERVAL", "1h", "1s", "24h", "How often vaults are looked for that owe for so long."
    )
    image: Annotated[str, Field(pattern=r"^[\x21-\x7e]{0,500}$")] = setting(
        "IMAGE",
        "",
        "be at most 500 visible characters",
        "The image that this process was started from; `/api/ping` takes it apart.",
        shown="empty",
    )
    invoice_job_interval_seconds: Milliseconds = milliseconds(
        "MONTHLY_INVOICE_JOB_INTERVAL_MS",
        3_600_000,
        10,
        86_400_000,
        "How often it is looked whether a month can be closed, about a day after its end.",
    )

    # Health and browsers
    health_check_db_timeout_seconds: Milliseconds = milliseconds(
        "HEALTH_CHECK_DB_TIMEOUT", 2000, 1, 60_000, "How long a probe waits for the database."
    )
    health_request_timeout_seconds: Milliseconds = milliseconds(
        "HEALTH_REQUEST_TIMEOUT_MS", 5000, 1, 60_000, "How long `/api/health` may take in all."
    )
    cors_allowed_origins: Origins = setting(
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
        return None if self.redis_url is None else redis_address(self.redis_url.get_secret_value())

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
