"""What settings contradict one another: values that are each well formed, and together cannot be meant."""

from collections.abc import Iterator
from typing import Final

from callora.config.metering import source_conflicts
from callora.config.settings import PASSPHRASES, Settings

_Conflict = tuple[tuple[str, ...], str]
_SETTLING: Final = ("settlement_charging_seed", "settlement_crediting_seed")


def conflicts(settings: Settings) -> Iterator[_Conflict]:
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
