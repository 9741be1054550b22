"""The forms of settings of counter metering: durations, prices, sources and their credentials."""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

import attrs
from pydantic import SecretStr

from callora.ledger.collecting import CREDENTIAL_PATTERN, SourceOffer, clash_of, parse_offer

PRICE_MAX: Final = Decimal(1_000_000)
_TOKEN_NAME: Final = re.compile(CREDENTIAL_PATTERN, re.ASCII)
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|s|m|h))+", re.ASCII)
_DURATION_PART: Final = re.compile(r"([0-9.]+)(ms|s|m|h)", re.ASCII)
_UNIT_SECONDS: Final = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_PRICE: Final = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,18})?", re.ASCII)
_HEADER: Final = re.compile(r"[\x21-\x7e]{1,4096}", re.ASCII)


def from_duration(value: object) -> object:
    """Return the seconds of a duration such as 90s, 1m30s or 336h.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        return value
    if _DURATION.fullmatch(value) is None:
        raise ValueError("not a duration")
    return float(sum(Decimal(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(value)))


def from_price(value: object) -> object:
    """Return the price that a text names, exactly: at most 18 places, at most a million USDC.

    Raises:
        ValueError: it names none; nothing is ever taken for 0.
    """
    if not isinstance(value, str):
        return value
    if _PRICE.fullmatch(value) is None or Decimal(value) > PRICE_MAX:
        raise ValueError("not a price")
    return Decimal(value)


def from_sources(value: object) -> object:
    """Return each source that EXPORTER_SOURCES_JSON describes, or what is wrong with it.

    Raises:
        ValueError: it is no list.
    """
    if not isinstance(value, str):
        return value
    try:
        listed = json.loads(value)
    except RecursionError as error:
        raise ValueError("not JSON") from error
    if not isinstance(listed, list):
        raise ValueError("not a list")
    return tuple(parse_offer(item, "") for item in listed)


def from_tokens(value: object) -> object:
    """Return the credentials by their variables.

    Raises:
        ValueError: one cannot be sent in a header.
    """
    if not isinstance(value, str):
        return value
    tokens: dict[str, str] = json.loads(value)
    if not all(_HEADER.fullmatch(token) for token in tokens.values()):
        raise ValueError("not sendable in a header")
    return {name: SecretStr(token) for name, token in tokens.items()}


def tokens_of(environ: Mapping[str, str]) -> str | None:
    """Return the credentials that an environment holds, as `from_tokens` reads them; None where it holds none."""
    found = {name: text for name, text in environ.items() if text and _TOKEN_NAME.fullmatch(name)}
    return json.dumps(found) if found else None


def offers_of(
    listed: tuple[SourceOffer | str, ...] | None, base_url: str | None, region: str
) -> tuple[SourceOffer, ...]:
    """Return the sources that the environment describes: the list, else the one URL, else none."""
    if listed is not None:
        offers = [each for each in listed if isinstance(each, SourceOffer)]
        return tuple(each if each.region else attrs.evolve(each, region=region) for each in offers)
    if base_url is not None:
        return (SourceOffer("default", base_url, "", "", region=region),)
    return ()


def source_conflicts(
    listed: tuple[SourceOffer | str, ...] | None,
    offers: tuple[SourceOffer, ...],
    tokens: Mapping[str, SecretStr],
    service_token: SecretStr | None,
) -> Iterator[str]:
    """Yield what of the sources cannot be used, a line each."""
    if listed is not None:
        if not listed:
            yield "EXPORTER_SOURCES_JSON: must describe a source at least, or be left out"
        yield from (f"EXPORTER_SOURCES_JSON: {each}" for each in listed if isinstance(each, str))
    clash = clash_of(offers)
    if clash is not None:
        yield f"EXPORTER_SOURCES_JSON: {clash}"
        return
    without = [each.source_id for each in offers if each.credential_env is None]
    if len(without) > 1:
        yield f"EXPORTER_SOURCES_JSON: {without[0]} and {without[1]} would share a credential: name a credential_env"
    if without and service_token is None:
        yield f"INTERNAL_SERVICE_TOKEN: is required where a meter source ({without[0]}) has no credential_env"
    seen: dict[Any, str] = {} if service_token is None else {service_token: "INTERNAL_SERVICE_TOKEN"}
    for each in offers:
        if each.credential_env is None:
            continue
        token = tokens.get(each.credential_env)
        if token is None:
            yield f"{each.credential_env}: is required by the meter source {each.source_id}"
        elif token in seen:
            yield f"{each.credential_env}: must be a secret of its own, and is that of {seen[token]}"
        else:
            seen[token] = each.source_id
