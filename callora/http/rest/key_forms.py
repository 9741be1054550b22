"""The forms of API keys: what is asked for, what is shown, and the bounds of both."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints

from callora.http.rest.forms import (
    INT64_MAX,
    ApiNumber,
    Flag,
    Form,
    Instant,
    InstantOut,
    PageMeta,
    PageQuery,
    Uuid,
    iso,
)
from callora.ledger.ids import ApiId, EndpointId
from callora.ledger.keys import mask_key
from callora.ledger.tokens import ALL_SCOPES

GRACE_SECONDS_MAX: Final = 86_400
RATE_MAX: Final = 100_000
CREDITS_MAX: Final = 10**12

Network = Literal["testnet", "mainnet"]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=120, pattern=r"\S")]
Description = Annotated[str, StringConstraints(max_length=500)]
Scope = Annotated[
    str,
    Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9:._/-]{0,63})$", description="`*` is every scope.", examples=["read"]),
]
Scopes = Annotated[list[Scope], Field(min_length=1, max_length=20)]
PlanId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$", examples=["free"])]
Number = Annotated[int, Field(ge=1, le=INT64_MAX)]
Numbers = Annotated[list[Number], Field(min_length=1, max_length=100)]
Rate = Annotated[int, Field(ge=1, le=RATE_MAX)]
CreditCap = Annotated[
    int,
    Field(ge=0, le=CREDITS_MAX, description="Credits of its vault's quota that it may burn in a month; null for all."),
]


def _networks(text: str) -> str:
    try:
        ip_network(text)
    except ValueError:
        raise ValueError("must be an address, or a network such as 203.0.113.0/24 without host bits") from None
    return text


AllowedIp = Annotated[str, AfterValidator(_networks), Field(max_length=43, examples=["203.0.113.0/24"])]
AllowedIps = Annotated[list[AllowedIp], Field(min_length=1, max_length=50)]


class KeyPath(Form):
    """Which key."""

    keyId: Uuid


class ApiPath(Form):
    """Which API."""

    apiId: ApiNumber


class KeyCreate(Form):
    """A new key. What is null or left out does not narrow it."""

    name: Name
    description: Description | None = None
    network: Network | None = Field(
        None, description="The vault's: testnet unless said. Your vault there is made where it is missing."
    )
    vaultId: Uuid | None = Field(None, description="Instead of the network: one of your vaults.")
    scopes: Scopes = Field([ALL_SCOPES])
    allowedApis: Numbers | None = None
    allowedEndpoints: Numbers | None = None
    allowedIps: AllowedIps | None = Field(None, description="Addresses and networks that it may be used from.")
    rateLimitPerMinute: Rate | None = Field(None, description="At most what the vault's plan allows; null for that.")
    monthlyCreditCap: CreditCap | None = None
    expiresAt: Instant | None = None


class ApiKeyCreate(Form):
    """A new key for one published API, for the caller's own vault."""

    name: Name | None = None
    network: Network = "testnet"
    scopes: Scopes = Field([ALL_SCOPES])
    rateLimitPerMinute: Rate | None = None
    monthlyCreditCap: CreditCap | None = None


class KeyPatch(Form):
    """What shall change; null takes a narrowing away."""

    # Factories, so that the document shows no default: what is left out stays as it is.
    name: Name = Field(default_factory=str)
    description: Description | None = None
    scopes: Scopes = Field(default_factory=list)
    allowedApis: Numbers | None = None
    allowedEndpoints: Numbers | None = None
    allowedIps: AllowedIps | None = None
    rateLimitPerMinute: Rate | None = None
    monthlyCreditCap: CreditCap | None = None
    active: bool = Field(default_factory=lambda: True)
    expiresAt: Instant | None = None


class Regenerate(Form):
    """How long the former secret lives on."""

    graceSeconds: int = Field(0, ge=0, le=GRACE_SECONDS_MAX)


class KeyOut(Form):
    """A key, without its secret."""

    id: str
    name: str
    description: str | None
    maskedKey: str = Field(description="Its kind and its last four characters.", examples=["ck_test_…ab12"])
    prefix: str = Field(description="Its first 16 characters, by which it can be found.")
    last4: str
    network: Network
    vaultId: str
    scopes: list[str]
    allowedApis: list[int] | None
    allowedEndpoints: list[int] | None
    allowedIps: list[str] | None
    rateLimitPerMinute: int | None = Field(description="Its own rate; null for its plan's.")
    monthlyCreditCap: int | None = Field(description="null: what its vault has.")
    active: bool = Field(description="Neither disabled nor revoked.")
    revoked: bool
    formerSecretUntil: InstantOut | None = Field(description="Until when the secret before the present one works.")
    createdAt: InstantOut
    expiresAt: InstantOut | None
    lastUsedAt: InstantOut | None
    revokedAt: InstantOut | None


class AdminKeyOut(KeyOut):
    """A key and whose it is."""

    userId: str
    planId: str = Field(description="The plan of its vault.")


class KeyMade(Form):
    """A key with its secret."""

    key: str = Field(description="The secret. It is shown this once and cannot be had again.")
    apiKey: KeyOut


class KeyList(Form):
    """A page of keys, the newest first."""

    data: list[KeyOut]
    meta: PageMeta


class AdminKeyList(Form):
    """A page of everybody's keys, the newest first."""

    data: list[AdminKeyOut]
    meta: PageMeta


class AdminKeyQuery(PageQuery):
    """Which keys."""

    userId: Uuid | None = None
    planId: PlanId | None = Field(default=None, description="Only keys of vaults that have this plan.")
    active: Flag | None = None


def key_fields(row: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """Return what is shown of a key.

    Args:
        row: of `store.reads.keys`.
    """
    former_until = row["previous_expires_at"]
    return {
        "id": str(row["api_key_id"]),
        "name": row["name"],
        "description": row["description"],
        "maskedKey": mask_key(row["prefix"], row["last4"]),
        "prefix": row["prefix"],
        "last4": row["last4"],
        "network": row["network"],
        "vaultId": str(row["vault_id"]),
        "scopes": row["scopes"],
        "allowedApis": row["allowed_apis"],
        "allowedEndpoints": row["allowed_endpoints"],
        "allowedIps": None if row["allowed_cidrs"] is None else [network_text(n) for n in row["allowed_cidrs"]],
        "rateLimitPerMinute": row["rate_limit_per_minute"],
        "monthlyCreditCap": row["monthly_credit_cap"],
        "active": row["revoked_at"] is None and not row["disabled"],
        "revoked": row["revoked_at"] is not None,
        "formerSecretUntil": iso(former_until) if former_until and former_until > now else None,
        "createdAt": iso(row["created_at"]),
        "expiresAt": moment(row["expires_at"]),
        "lastUsedAt": moment(row["last_used_at"]),
        "revokedAt": moment(row["revoked_at"]),
    }


def moment(moment: datetime | None) -> str | None:
    """Return a moment as answers show it, None for none."""
    return None if moment is None else iso(moment)


def once(scopes: Sequence[str]) -> list[str]:
    """Return scopes, each once."""
    return list(dict.fromkeys(scopes))


def api_ids(numbers: Sequence[int] | None) -> list[ApiId] | None:
    """Return the APIs that a list names, each once."""
    return None if numbers is None else [ApiId(number) for number in dict.fromkeys(numbers)]


def endpoint_ids(numbers: Sequence[int] | None) -> list[EndpointId] | None:
    """Return the endpoints that a list names, each once."""
    return None if numbers is None else [EndpointId(number) for number in dict.fromkeys(numbers)]


def ip_networks(texts: Sequence[str] | None) -> list[IPv4Network | IPv6Network] | None:
    """Return the networks that a list names, each once."""
    return None if texts is None else list(dict.fromkeys(ip_network(text) for text in texts))


def network_text(network: IPv4Network | IPv6Network) -> str:
    """Return a network as answers show it: one address without its length."""
    return str(network.network_address) if network.num_addresses == 1 else str(network)
