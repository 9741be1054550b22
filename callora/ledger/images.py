"""What an image reference says about the code in it. What it does not say is empty, never made up."""

import re
from typing import Final

import attrs

_COMMIT: Final = re.compile(r"(?:sha-)?([0-9a-f]{40})", re.ASCII)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


@attrs.frozen
class Image:
    """An image reference, taken apart."""

    reference: str
    tag: str = ""
    commit: str = ""
    """40 hexadecimal digits, where the tag is a commit's."""


def parse_image(reference: str) -> Image:
    """Return the parts of `[host[:port]/]path[:tag][@digest]`; a colon before the last slash is a port's."""
    name = reference.partition("@")[0].rpartition("/")[2]
    _, colon, tag = name.partition(":")
    if not colon or _TAG.fullmatch(tag) is None:
        return Image(reference)
    commit = _COMMIT.fullmatch(tag)
    return Image(reference, tag, "" if commit is None else commit[1])
