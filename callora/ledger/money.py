"""Money: stroops, and the only two doors between stroops and text.

1 USDC = 10 000 000 stroops, the base unit of a Stellar asset. Nothing in Callora holds money in a float, and nothing
rounds without a rule in its name.
"""

import re
from typing import Final, NewType

Stroops = NewType("Stroops", int)
"""An amount in base units; 0 <= amount <= MAX_STROOPS unless a docstring says otherwise."""

STROOPS_PER_USDC: Final = 10_000_000
MAX_STROOPS: Final = Stroops(2**63 - 1)
ZERO: Final = Stroops(0)

_USDC = re.compile(r"(0|[1-9][0-9]{0,11})(?:\.([0-9]{1,7}))?", re.ASCII)


def parse_usdc(text: str) -> Stroops:
    """Return the amount that a decimal USDC string names.

    Args:
        text: digits with at most 7 decimal places, no sign, exponent or leading zeros: `"0.01"`, `"12"`.

    Raises:
        ValueError: the text is not such a number, or does not fit 64 bits.
    """
    match = _USDC.fullmatch(text)
    if match is None:
        raise ValueError("must be a decimal number of USDC with at most 7 decimal places, such as 0.0100000")
    whole, fraction = match.groups()
    amount = int(whole) * STROOPS_PER_USDC + int((fraction or "").ljust(7, "0"))
    if amount > MAX_STROOPS:
        raise ValueError("must be at most 922337203685.4775807 USDC")
    return Stroops(amount)


def format_usdc(amount: int) -> str:
    """Return the amount as a decimal string with 7 places: 100000 is `"0.0100000"`.

    Args:
        amount: stroops, any sign (ledger entries are signed).
    """
    if amount < 0:
        return "-" + format_usdc(-amount)
    whole, fraction = divmod(amount, STROOPS_PER_USDC)
    return f"{whole}.{fraction:07d}"


def div_floor(amount: Stroops, divisor: int) -> Stroops:
    """Return amount / divisor rounded down; divisor > 0."""
    return Stroops(amount // divisor)


def div_ceil(amount: Stroops, divisor: int) -> Stroops:
    """Return amount / divisor rounded up; divisor > 0."""
    return Stroops(-(-amount // divisor))
