"""What the tests of actors share: a quiet log, one set of metrics, commands by their numbers."""

import logging
import os
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import attrs
import structlog
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.mailbox import Envelope
from callora.actors.registry import VaultRegistry
from callora.actors.writer import LedgerStore, Writer
from callora.ledger.commands import (
    Charged,
    CloseHold,
    Command,
    Delivery,
    IdempotencyClaim,
    PlaceHold,
    StoredAnswer,
    capture,
    release,
)
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, EndpointId, EventId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.metrics import Metrics
from callora.service import SystemClock
from tests.simulation.store import Policies, SimulatedStore

METRICS = Metrics()
"""Shared: making one takes longer than a whole simulated minute."""

CHARGED = Charged(
    ApiKeyId("00000000-0000-7000-8000-00000000000a"),
    DeveloperId("00000000-0000-7000-8000-00000000000b"),
    ApiId(1),
    EndpointId(1),
    1,
)
DELIVERED = Delivery("delivered", 200, 1000, 10, 20)
VAULT = VaultId("00000000-0000-7000-8000-000000000001")
OTHER_VAULT = VaultId("00000000-0000-7000-8000-000000000002")


@attrs.define
class Log:
    """A log that keeps the names of its events."""

    events: list[str] = attrs.field(factory=list)

    def logger(self, level: int = logging.DEBUG) -> FilteringBoundLogger:
        """Return a logger that writes here from this level on."""

        def keep(_: Any, __: str, record: MutableMapping[str, Any]) -> Any:
            self.events.append(str(record["event"]))
            raise structlog.DropEvent

        return cast(
            FilteringBoundLogger,
            structlog.wrap_logger(None, processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(level)),
        )


QUIET = Log().logger(logging.CRITICAL)
IDS = Ids(SystemClock(), os.urandom)


def event(number: int) -> EventId:
    """Return an event's id by its number."""
    return EventId(f"00000000-0000-7000-9000-{number:012x}")


def place(number: int, amount: int, *, ttl_seconds: int = 60, key: str | None = None) -> PlaceHold:
    """Return the hold of event `number`."""
    claim = None if key is None else IdempotencyClaim(key, bytes(32), None, 86_400)
    return PlaceHold(event(number), Stroops(amount), ttl_seconds, CHARGED, claim)


def captured(number: int, held: int, amount: int | None = None, answer: StoredAnswer | None = None) -> CloseHold:
    """Return the capture of event `number`, whole unless said otherwise."""
    return capture(event(number), Stroops(held), Stroops(held if amount is None else amount), DELIVERED, answer)


def released(number: int, held: int) -> CloseHold:
    """Return the release of event `number`."""
    return release(event(number), Stroops(held), Delivery("client_gone"))


@attrs.frozen
class Running:
    """A registry and its writer at work."""

    registry: VaultRegistry
    writer: Writer
    log: Log
    nursery: trio.Nursery
    writer_scope: trio.CancelScope
    registry_scope: trio.CancelScope

    def send(self, command: Command, vault_id: VaultId = VAULT) -> Envelope:
        """Send a command that must be taken, without waiting for what it comes to."""
        envelope = Envelope(command)
        assert self.registry.send(vault_id, envelope) is None
        return envelope

    async def ask(self, command: Command, vault_id: VaultId = VAULT) -> object:
        """Send a command and return what it came to."""
        return await self.registry.ask(vault_id, command)


@asynccontextmanager
async def running(
    store: LedgerStore,
    *,
    policies: Policies | None = None,
    mailbox_max: int = 1000,
    round_max: int = 1000,
    make_writer: Callable[..., Writer] = Writer,
) -> AsyncIterator[Running]:
    """Run a writer and a registry for the length of the block; then drain the registry."""
    log = Log()
    if policies is not None:
        assert isinstance(store, SimulatedStore)
        store.policies = policies
    writer = make_writer(store, METRICS, log.logger(), round_max)
    registry = VaultRegistry(store, writer, METRICS, log.logger(), Random(0), mailbox_max)
    writer_scope, registry_scope = trio.CancelScope(), trio.CancelScope()

    async def run(scope: trio.CancelScope, task: Any, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(task)
                task_status.started()

    failure: BaseException | None = None
    async with trio.open_nursery() as writing:
        await writing.start(run, writer_scope, writer.run)
        async with trio.open_nursery() as acting:
            await acting.start(run, registry_scope, registry.run)
            try:
                yield Running(registry, writer, log, acting, writer_scope, registry_scope)
            except Exception as error:  # raised outside, where the nurseries do not wrap it
                failure = error
            registry.close()
            if failure is not None:
                acting.cancel_scope.cancel()
        writer_scope.cancel()
    if failure is not None:
        raise failure
