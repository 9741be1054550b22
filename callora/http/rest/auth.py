"""Who asks: credentials of the REST surface."""

import hashlib
import hmac

from pydantic import SecretStr

from callora.http.problems import ProblemRaised

_SCHEME = "bearer"


def bearer_token(header: str | None) -> str | None:
    """Return the token of an Authorization header, None where there is none of the scheme Bearer."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == _SCHEME else None


def require_token(header: str | None, expected: SecretStr | None) -> None:
    """Return when the Authorization header carries the expected Bearer token.

    Takes the same time for every wrong token, whatever it shares with the right one, its length included.

    Args:
        header: the Authorization header.
        expected: the token; None lets nobody in.

    Raises:
        ProblemRaised: UNAUTHORIZED, with WWW-Authenticate.
    """
    given = hashlib.sha256((bearer_token(header) or "").encode("utf-8", "surrogateescape")).digest()
    wanted = hashlib.sha256((expected.get_secret_value() if expected else "").encode()).digest()
    if not hmac.compare_digest(given, wanted) or expected is None:
        raise ProblemRaised("UNAUTHORIZED", headers={"WWW-Authenticate": "Bearer"})
