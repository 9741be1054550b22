"""Aliases: other paths under which APIs are called, for callers that were here before the APIs had names of ours.

An alias stands for a call as if it had been asked for by that: everything behind the listener sees the call's own path.
"""

from collections.abc import Mapping

from callora.http.gateway.admission import CALL_PREFIX


class Aliases:
    """Prefixes of whole path segments, the longest first."""

    __slots__ = ("_targets",)

    def __init__(self, targets: Mapping[str, str]) -> None:
        """Args:
        targets: by prefix such as `/v1/tts`, what follows `/v1/call/` in its place: an API's slug, and a path below it.
        """
        self._targets = [
            (prefix.encode("ascii"), CALL_PREFIX + targets[prefix].encode("ascii"))
            for prefix in sorted(targets, key=len, reverse=True)
        ]

    def call_path(self, path: bytes) -> bytes | None:
        """Return the path of the call that a path stands for, None where it stands for none."""
        for prefix, target in self._targets:
            if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"", b"/"):
                return target + path[len(prefix) :]
        return None
