"""Fields of settings: a variable, its default, its bounds and what it means, each said once.

The bounds that are checked and those that are documented are made of the same arguments.
"""

from typing import Any

from pydantic import Field

from callora.config.forms import from_size
from callora.config.metering import from_duration
from callora.ledger.money import parse_usdc


def setting(names: str, default: Any, must: str, meaning: str, *, shown: str | None = None, **field: Any) -> Any:
    """Return a field read from the first of `names` (separated by spaces) that is set.

    Args:
        default: the value, or what makes it: a function of nothing, or of the settings before this one.
        must: the form and bounds, after the word "must".
        shown: the default as it is documented; where None, the text of `default`.
        field: what else pydantic's Field takes.
    """
    extra: dict[str, Any] = {"names": names.split(), "must": must, "shown": str(default) if shown is None else shown}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=meaning, json_schema_extra=extra, **made, **field)


def whole_number(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    """Return a field of a whole number between two, both included."""
    return setting(name, default, f"be an integer between {low} and {high}", meaning, ge=low, le=high)


def milliseconds(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    """Return a field that holds seconds; default and bounds, both included, are in milliseconds."""
    must = f"be an integer between {low} and {high} (milliseconds)"
    return setting(name, default / 1000, must, meaning, shown=str(default), ge=low / 1000, le=high / 1000)


def seconds(name: str, default: int, low: int, high: int, meaning: str) -> Any:
    """Return a field of whole seconds between two numbers of them, both included."""
    must = f"be an integer between {low} and {high} (seconds)"
    return setting(name, float(default), must, meaning, shown=str(default), ge=low, le=high)


def duration(name: str, default: str, low: str, high: str, meaning: str) -> Any:
    """Return a field that holds seconds; default and bounds, both included, are durations such as 1m30s."""
    must = f"be a duration between {low} and {high}, such as 90s, 1m30s or 2h"
    low_seconds, high_seconds = (from_duration(each) for each in (low, high))
    return setting(name, from_duration(default), must, meaning, shown=default, ge=low_seconds, le=high_seconds)


def usdc(name: str, default: str, low: str, meaning: str) -> Any:
    """Return a field that holds stroops; default and lower bound, included, are in USDC."""
    must = f"be an amount of USDC of at least {low}, such as 12.5"
    return setting(name, int(parse_usdc(default)), must, meaning, shown=default, ge=int(parse_usdc(low)))


def size(name: str, default: str, low: str, high: str, meaning: str) -> Any:
    """Return a field that holds bytes; default and bounds, both included, are sizes such as 100kb."""
    must = f"be a size between {low} and {high}, such as 512b, 100kb or 1.5mb"
    bounds = [from_size(bound) for bound in (default, low, high)]
    return setting(name, bounds[0], must, meaning, shown=default, ge=bounds[1], le=bounds[2])
