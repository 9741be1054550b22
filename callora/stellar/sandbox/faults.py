"""What goes wrong between a client and a node, as a plan: for which requests, how often, and how.

Faults of single requests are here; what is wrong with a node or the network as a whole (a lag, a short retention, a
pause, a surge, a wrong clock) is set on `SandboxNode` and `SandboxLedger` themselves, and `control` sets both from one
document.
"""

import random
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from callora.stellar.sandbox.ledger import SandboxLedger, SandboxNode

Kind: TypeAlias = Literal["delay", "drop", "status", "html", "rpc_error", "try_again_later", "lose"]
Stage: TypeAlias = Literal["before", "after"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SUBMISSIONS: Final = ("sendTransaction", "POST /transactions", "POST /transactions_async")


class FaultInvalid(ValueError):
    """A plan that says nothing that can be done; nothing was changed."""


@attrs.frozen
class Fault:
    """One thing that goes wrong."""

    kind: Kind
    """`delay`: only later. `drop`: the connection ends without an answer. `status`: another status, with a problem
    document. `html`: what a proxy says. `rpc_error`: an error of JSON-RPC. `try_again_later` and `lose`: of
    submissions, see SandboxNode."""
    method: str = "*"
    """The RPC method, or method and path of Horizon; `*` for every request, `POST /transactions*` for a beginning."""
    node: str | None = None
    """Of which node; None for any."""
    times: int | None = 1
    """How often; None for as long as it is in the plan."""
    skip: int = 0
    """How many requests it lets pass before."""
    chance: float = 1.0
    """Of each request that it is for."""
    stage: Stage = "before"
    """Whether the request is done nevertheless, and only its answer spoiled: `after`."""
    seconds: float = 0.0
    """Of a delay; with any other kind it comes on top."""
    status: int = 503
    """Of `status`, and of `html`."""
    retry_after: int | None = None
    """Seconds, as a Retry-After header."""
    code: int = -32603
    """Of `rpc_error`: -32603 for a node that is not well, -32001 for a request that took too long."""

    def __attrs_post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            FaultInvalid: that is so.
        """
        if self.kind not in KINDS or self.stage not in ("before", "after"):
            raise FaultInvalid(f"a fault is one of {', '.join(KINDS)}, before or after")
        if self.kind in ("try_again_later", "lose") and self.method != "*" and self.method not in SUBMISSIONS:
            raise FaultInvalid(f"{self.kind} is a fault of submissions: {', '.join(SUBMISSIONS)}")
        if not (0 <= self.chance <= 1 and self.seconds >= 0 and 100 <= self.status <= 599 and self.skip >= 0):
            raise FaultInvalid("a number is out of its range")

    def is_for(self, node: str, method: str) -> bool:
        """Tell whether a request is one of those that it is for."""
        if self.node not in (None, node):
            return False
        if self.kind in ("try_again_later", "lose") and method not in SUBMISSIONS:
            return False
        if self.kind == "rpc_error" and (not method or " " in method):
            return False
        if self.method.endswith("*"):
            return method.startswith(self.method[:-1])
        return method == self.method


class FaultPlan:
    """The faults to come. The first one in it that is for a request happens to it, and counts."""

    def __init__(self, chances: random.Random | None = None) -> None:
        """Make an empty plan.

        Args:
            chances: what decides where a fault has a chance; by default one that is the same in every run.
        """
        self._chances = chances or random.Random("faults")  # noqa: S311 - the same every time is what is wanted
        self._faults: list[Fault] = []

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is still to happen."""
        return tuple(self._faults)

    def add(self, *faults: Fault) -> None:
        """Add faults, behind those that are there."""
        self._faults += faults

    def clear(self) -> None:
        """Let everything go right."""
        self._faults.clear()

    def take(self, node: str, method: str) -> Fault | None:
        """Return what goes wrong with a request, and count it; None if nothing does.

        Args:
            node: which node it is for.
            method: the RPC method, or `GET /accounts/…`.
        """
        for place, fault in enumerate(self._faults):
            if not fault.is_for(node, method):
                continue
            if fault.skip:
                self._faults[place] = attrs.evolve(fault, skip=fault.skip - 1)
                continue
            if fault.chance < 1 and self._chances.random() >= fault.chance:
                continue
            if fault.times == 1:
                del self._faults[place]
            elif fault.times is not None:
                self._faults[place] = attrs.evolve(fault, times=fault.times - 1)
            return fault
        return None


def fault_of(told: Mapping[str, Any]) -> Fault:
    """Return the fault that a document describes, with Fault's own names.

    Raises:
        FaultInvalid: it describes none.
    """
    known = {field.name: field for field in attrs.fields(Fault)}
    types: Mapping[str, tuple[type, ...]] = {
        "times": (int, type(None)),
        "skip": (int,),
        "status": (int,),
        "code": (int,),
        "chance": (int, float),
        "seconds": (int, float),
        "retry_after": (int, type(None)),
        "node": (str, type(None)),
    }
    for name, value in told.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, types.get(name, (str,))):
            raise FaultInvalid(f"{name}: no such field, or not such a value")
    if "kind" not in told:
        raise FaultInvalid("kind: is missing")
    return Fault(**told)


def control(ledger: SandboxLedger, nodes: Mapping[str, SandboxNode], told: Mapping[str, Any]) -> None:
    """Set what is wrong with the network and its nodes as a whole.

    Args:
        told: any of `paused` (bool), `skew_seconds` (int), `surge_fee` (int or null), and `nodes`: for each name any of
            `lag`, `retention`, `try_again`, `lose` (int, `retention` also null).

    Raises:
        FaultInvalid: it says something else; nothing was set.
    """
    if set(told) - {"paused", "skew_seconds", "surge_fee", "nodes"}:
        raise FaultInvalid("known are paused, skew_seconds, surge_fee and nodes")
    wanted = told.get("nodes", {})
    if not isinstance(wanted, dict) or set(wanted) - set(nodes):
        raise FaultInvalid(f"the nodes are {', '.join(nodes)}")
    if not isinstance(told.get("paused", False), bool):
        raise FaultInvalid("paused: true or false")
    _check_int("skew_seconds", told.get("skew_seconds", 0), least=None)
    _check_int("surge_fee", told.get("surge_fee"), none=True)
    for settings in wanted.values():
        if not isinstance(settings, dict) or set(settings) - {"lag", "retention", "try_again", "lose"}:
            raise FaultInvalid("a node has lag, retention, try_again and lose")
        for name, value in settings.items():
            _check_int(name, value, none=name == "retention")
    for name in ("paused", "skew_seconds", "surge_fee"):
        if name in told:
            setattr(ledger, name, told[name])
    for node, settings in wanted.items():
        for name, value in settings.items():
            setattr(nodes[node], name, value)


def _check_int(name: str, value: object, *, least: int | None = 0, none: bool = False) -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise FaultInvalid(f"{name}: a whole number" + ("" if least is None else f" of at least {least}"))
