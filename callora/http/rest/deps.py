"""What the REST surface is given. It builds nothing itself and reaches nothing that is not here."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.sources import Health
from callora.config.settings import Settings
from callora.ledger.clock import Clock
from callora.metrics import Metrics


def _nothing() -> None:
    return None


def _none_pending() -> int:
    return 0


@attrs.frozen
class RestDeps:
    """Everything the app needs, made by `service`."""

    settings: Settings
    """The service's settings."""
    metrics: Metrics
    """Where requests are counted, and what `/api/metrics` shows."""
    logger: FilteringBoundLogger
    """Where requests and defects are written; a request's id is an argument of every record."""
    clock: Clock
    """The date in answers."""
    new_request_id: Callable[[], str]
    """Makes the id of a request that came without a usable one; 1 to 128 visible characters."""
    database_check: Callable[[], Awaitable[None]]
    """Returns when the database has answered a trivial query, raises anything when not. Cancelled at a deadline."""
    draining: Callable[[], bool]
    """Whether the process has been asked to end."""
    pending_migrations: Callable[[], int] = _none_pending
    """How many migrations the database lacks, as last seen; with any the process is not ready."""
    refresh_metrics: Callable[[], None] = _nothing
    """Called on the event loop before each scrape, for gauges that are read rather than kept. Must not block."""
    chain_health: Callable[[], Awaitable[Mapping[Literal["rpc", "horizon"], Health]]] | None = None
    """Returns how the chain's sources fare; None where none is configured. Cancelled at a deadline."""
    behind_listener: bool = True
    """Whether all connections come from our listener, whose X-Forwarded-For names the client. Else it is ignored."""
