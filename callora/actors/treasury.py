"""The treasury: everything that moves money between the vault contract and the vaults of users, on one network."""

from collections.abc import Awaitable, Callable

import attrs
from structlog.typing import FilteringBoundLogger

from callora.actors.booking import Booking
from callora.actors.depositors import Depositors
from callora.actors.deposits import Deposits
from callora.actors.listener import Listener
from callora.actors.onchain import OnChain, Sender
from callora.actors.reconciliation import Reconciliation
from callora.actors.registry import VaultRegistry
from callora.actors.vaults import VaultOpening
from callora.actors.withdrawals import Withdrawals
from callora.ledger.clock import Clock
from callora.ledger.ids import Ids
from callora.metrics import Metrics
from callora.stellar.envelopes import Signer
from callora.store import chain as store
from callora.store.bridge import Database

Task = Callable[[], Awaitable[None]]


@attrs.frozen
class TreasurySettings:
    """How the treasury works."""

    listen_seconds: float
    """How often events are asked for."""
    compare_seconds: float
    """How often the contract is compared with the ledger."""
    drift_max: int
    """Stroops by which they may differ before settlement stops."""
    deposit_seconds: int
    """How long a prepared deposit may be signed and sent."""
    bid: int
    """Stroops of XLM that a transaction offers for its inclusion."""
    owner_signs: bool
    """Whether the sender has the key of the contract's owner."""
    sponsor: Signer | None
    """Who pays the fees of deposits; None: who deposits."""


@attrs.frozen
class Treasury:
    """What routes and commands ask."""

    network: str
    passphrase: str
    database: Database
    booking: Booking
    listener: Listener
    depositors: Depositors
    deposits: Deposits
    withdrawals: Withdrawals
    reconciliation: Reconciliation

    @property
    def tasks(self) -> tuple[tuple[str, Task], ...]:
        """What runs beside the calls, in the order in which it starts."""
        return (
            ("listener", self.listener.run),
            ("depositors", self.depositors.run),
            ("deposits", self.deposits.run),
            ("withdrawals", self.withdrawals.run),
            ("reconciliation", self.reconciliation.run),
        )

    async def close_gap(self, epoch: int, first_ledger: int, moved: int, by: str, clock: Clock) -> bool:
        """Close a gap on an operator's word; False where no open one begins there.

        Args:
            moved: by how many stroops its ledgers changed the contract's balance, of any sign.
        """
        return await store.close_gap(self.database, self.network, epoch, first_ledger, moved, by, clock.now())

    async def resume_settlement(self) -> bool:
        """Let settlement go on, on an operator's word; False where it was not stopped."""
        return await store.resume_settlement(self.database, self.network)

    async def watched(self) -> store.WatchedNetwork | None:
        """Return how far the network's events were followed; None before the first look."""
        return await store.find_network(self.database, self.network)


def make_treasury(
    chain: OnChain,
    sender: Sender,
    database: Database,
    registry: VaultRegistry,
    settings: TreasurySettings,
    *,
    clock: Clock,
    ids: Ids,
    metrics: Metrics,
    log: FilteringBoundLogger,
) -> Treasury:
    """Return the treasury of a network; nothing is started or asked."""
    booking = Booking(chain, database, registry, VaultOpening(database, clock, ids), clock, log)
    listener = Listener(chain, database, booking, clock, metrics, log, interval_seconds=settings.listen_seconds)
    depositors = Depositors(chain, sender, database, clock, log, owner_signs=settings.owner_signs, bid=settings.bid)
    return Treasury(
        network=chain.network,
        passphrase=chain.passphrase,
        database=database,
        booking=booking,
        listener=listener,
        depositors=depositors,
        deposits=Deposits(
            chain,
            sender,
            depositors,
            database,
            clock,
            log,
            bid=settings.bid,
            timeout_seconds=settings.deposit_seconds,
            sponsor=settings.sponsor,
        ),
        withdrawals=Withdrawals(
            chain, sender, database, registry, clock, log, owner_signs=settings.owner_signs, bid=settings.bid
        ),
        reconciliation=Reconciliation(
            chain,
            listener,
            database,
            clock,
            metrics,
            log,
            interval_seconds=settings.compare_seconds,
            drift_max=settings.drift_max,
        ),
    )
