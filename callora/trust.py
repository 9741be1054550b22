"""Whose certificates are trusted by what connects to others: those that the system trusts."""

import ssl
from functools import cache


@cache
def system_trust() -> ssl.SSLContext:
    """Return the one context of this process for connections of ours, all of which speak HTTP/1.1.

    Reading the system's certificates takes 20 ms and keeps a mebibyte, so that is done once.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
