"""Rows of the chain's tables that tests need and nothing here writes."""

from callora.store.bridge import Database


async def set_network(database: Database, *, epoch: int, halted: str | None = None) -> None:
    """Store what is known of the test network: its history, and whether it is halted."""
    changed = await database.execute("UPDATE chain_networks SET epoch = $1, halted = $2", epoch, halted)
    if changed == "UPDATE 0":
        await database.execute(
            "INSERT INTO chain_networks (network, passphrase, epoch, contract_id, ledger, seen_ledger, halted,"
            " updated_at) VALUES ('testnet', 'p', $1, 'C' || repeat('A', 55), 0, 0, $2, now())",
            epoch,
            halted,
        )
