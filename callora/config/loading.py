"""Settings are read here and nowhere else: `load_settings` is the only door.

It reads the mapping it is given and nothing else, finds every fault at once and names each by its variable, and prints
the value of no secret.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Final

from pydantic import ValidationError

from callora.config.conflicts import conflicts
from callora.config.metering import tokens_of
from callora.config.settings import SETTINGS, Settings

_PREFIX: Final = "CALLORA_"
_READ_ELSEWHERE: Final = ("CALLORA_PG_BIN",)
"""Variables of ours that are no settings of the service: where the embedded PostgreSQL's programs are."""
_SHOWN_CHARS_MAX: Final = 80


class ConfigurationInvalid(Exception):
    """The environment cannot be used. Its text lists every problem, a line each, and no secret."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


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
    if environ.get("EXPORTER_TOKEN_"):
        yield "EXPORTER_TOKEN_: is not a setting; must end in a name of yours, as EXPORTER_TOKEN_NODE_1 does"


def _read(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return, by attribute, the variable that is set and its text."""
    found: dict[str, tuple[str, str]] = {}
    for attribute, setting in SETTINGS.items():
        if attribute == "exporter_tokens":
            continue  # what is documented is how the names of several begin
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
    at_odds = [line for attributes, line in conflicts(settings) if not problems.keys() & set(attributes)]
    lines = (*(problems[name] for name in SETTINGS if name in problems), *at_odds, *_unknown(environ))
    if lines:
        raise ConfigurationInvalid(lines)
    return settings
