"""How texts become values: the form of a number, a size, a host, a URL, a secret, and what such a text then is.

What is wrong with a text is said here for the reader of the code alone: whoever set it is shown the setting's own form
and bounds.
"""

import ipaddress
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import unquote, urlsplit

import attrs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from callora.config.metering import from_duration, from_price, from_sources, from_tokens
from callora.ledger.collecting import SourceOffer, check_url
from callora.ledger.money import parse_usdc
from callora.ledger.wallets import is_address, is_contract, is_seed

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
"""A range of addresses; a single address is a range of one."""

JWT_SECRET_BYTES_MIN: Final = 32
SERVICE_TOKEN_CHARS_MIN: Final = 32
DOMAIN_CHARS_MAX: Final = 59
"""A login challenge has an entry named by the domain and " auth", and Stellar allows such a name 64 bytes."""
_HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?", re.ASCII)
_ALIAS: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+=[a-z][a-z0-9-]{0,62}(?:/[A-Za-z0-9._~-]+)*", re.ASCII)
_ALIAS_CHARS_MAX: Final = 500
_ALIASES_MAX: Final = 100
_OURS: Final = re.compile(r"/(?:v1/call|api|livez|readyz|healthz)/")
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(b|kb|mb|gb|tb)?", re.ASCII | re.IGNORECASE)
_SIZE_UNITS: Final = {"b": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3, "tb": 1024**4}
_LEVELS: Final = {"trace": "debug", "verbose": "debug", "http": "debug", "warn": "warning", "fatal": "critical"}


def _whole(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII) is None:
        raise ValueError("not a whole number")
    return value


def _from_milliseconds(value: object) -> object:
    return int(value) / 1000 if isinstance(_whole(value), str) else value  # type: ignore[call-overload]


def from_size(value: object) -> object:
    """Return the bytes of a size such as 512b, 100kb or 1.5mb; units are of 1024, a part of a byte is cut off.

    Raises:
        ValueError: it is none.
    """
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


def lower(value: object) -> object:
    """Return a text in lower case; what is no text as it is."""
    return value.lower() if isinstance(value, str) else value


def _level(value: object) -> object:
    lowered = lower(value)
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


def redis_address(url: str) -> RedisAddress:
    """Return what a URL of Redis or Valkey says.

    Raises:
        ValueError: it is none, or says more than an address.
    """
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
    redis_address(value.get_secret_value())
    return value


def _signing_secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value().encode()) < JWT_SECRET_BYTES_MIN:
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
    if len(value) > DOMAIN_CHARS_MAX or _HOST_NAME.fullmatch(name) is None or name.endswith("."):
        raise ValueError("not a domain")
    if colon and (re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII) is None or int(port) > 65535):
        raise ValueError("not a port")
    return value.lower()


def _header_secret(value: SecretStr) -> SecretStr:
    if re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()) is None:
        raise ValueError("not sendable in a header")
    return value


def _service_token(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < SERVICE_TOKEN_CHARS_MIN:
        raise ValueError("too short")
    return _header_secret(value)


def _readable(value: Path) -> Path:
    try:
        with value.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError("not readable") from error
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Milliseconds = Annotated[float, BeforeValidator(_from_milliseconds)]
"""Seconds, which the variable says in milliseconds."""
WholeSeconds = Annotated[float, BeforeValidator(_whole)]
"""Seconds, without a fraction in the variable."""
Size = Annotated[int, BeforeValidator(from_size)]
"""Bytes."""
Host = Annotated[str, AfterValidator(_host)]
Domain = Annotated[str, AfterValidator(_domain)]
UpstreamHosts = Annotated[tuple[Annotated[str, AfterValidator(_upstream_host)], ...], BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)]
CallAliases = Annotated[
    tuple[Annotated[str, AfterValidator(_call_alias)], ...], BeforeValidator(_split), AfterValidator(_call_aliases)
]
Claim = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_level)]
NodeUrl = Annotated[str, AfterValidator(check_url)]
NodeUrls = Annotated[tuple[NodeUrl, ...], BeforeValidator(_split)]
Contract = Annotated[str, AfterValidator(_contract)]
Address = Annotated[str, AfterValidator(_address)]
Usdc = Annotated[int, BeforeValidator(_from_usdc)]
"""Stroops, which the variable says in USDC."""
Seed = Annotated[SecretStr, AfterValidator(_signing_seed)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(_split)]
Duration = Annotated[float, BeforeValidator(from_duration)]
"""Seconds."""
Price = Annotated[Decimal, BeforeValidator(from_price)]
"""USDC."""
Sources = Annotated[tuple[SourceOffer | str, ...], BeforeValidator(from_sources)]
Tokens = Annotated[dict[str, SecretStr], BeforeValidator(from_tokens)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_header_secret)]
ServiceToken = Annotated[SecretStr, AfterValidator(_service_token)]
SigningSecret = Annotated[SecretStr, AfterValidator(_signing_secret)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
File = Annotated[Path, AfterValidator(_readable)]
