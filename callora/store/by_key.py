"""Plans that go by keys and nothing else: for statements planned once that must be good for tables of any size."""

from collections.abc import Mapping
from typing import Final

BY_KEY: Final[Mapping[str, str]] = {
    # The plan is made once and kept: one made for the arrays of a first round on empty tables would not stay good.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    # A bitmap goes by the index too, but looks at every old version of a vault's row that the index still names, and
    # never marks one as dead, as an index scan does: thousands where vaults are few and busy. And it is how an index
    # of everybody's dates would be used.
    "enable_bitmapscan": "off",
    "jit": "off",
}
"""Settings of a session."""

GO_BY_KEY: Final = "; ".join(f"SET LOCAL {name} = {value}" for name, value in BY_KEY.items())
"""The same for the rest of a database transaction."""
