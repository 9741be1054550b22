"""`value`: makes a class of values that come several times a call.

The type checker sees `attrs.frozen` and refuses an assignment; at run time it is `attrs.define`, because what guards a
frozen instance then makes each one four times as dear.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attrs import frozen as value
else:
    from attrs import define as value

__all__ = ["value"]
