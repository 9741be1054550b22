"""`callora reconcile` as a process of its own: what it prints, and its exit code."""

import json
from pathlib import Path

import trio

from callora.store.bridge import open_database
from callora.store.chain import add_network
from tests.simulation.ledgers import NOON
from tests.test_cli import run

REASON = ("--reason", "the node lied")


async def plant(dsn: str) -> None:
    """Have the vault contract's last comparison be a stroop off."""
    async with open_database(dsn) as database:
        await add_network(database, "testnet", "Sandbox", "C" + "A" * 55, NOON)
        await database.execute(
            "INSERT INTO chain_reconciliations (network, epoch, ledger, at, on_chain, expected, parts)"
            " VALUES ('testnet', 1, 5, now(), 2, 1, '{}')"
        )


async def halted(dsn: str) -> str | None:
    """Return why nothing is settled."""
    async with open_database(dsn) as database:
        found: str | None = await database.fetch_value("SELECT settlement_halted FROM chain_networks")
        return found


def test_reconcile_exits_1_on_a_stroop_and_0_once_it_is_cleared(tmp_path: Path, database_url: str) -> None:
    where = {"DATABASE_URL": database_url}
    trio.run(plant, database_url)
    found = run(tmp_path, "reconcile", **where)
    assert found.popen.returncode == 1
    for word in ("DRIFT", "vault contract", "0.0000001", "1 discrepancies"):
        assert word in found.stdout
    assert "DRIFT" in str(trio.run(halted, database_url))
    told = run(tmp_path, "reconcile", "--json", "--days", "1", **where)
    assert told.popen.returncode == 1
    (one,) = json.loads(told.stdout)["discrepancies"]
    assert (one["class"], one["difference_usdc"], one["stopsSettlement"]) == ("DRIFT", "0.0000001", True)
    cleared = run(tmp_path, "reconcile", "--clear", one["id"], *REASON, **where)
    assert (cleared.popen.returncode, cleared.stdout) == (0, "cleared\n")
    good = run(tmp_path, "reconcile", **where)
    assert (good.popen.returncode, good.stdout) == (0, "0 discrepancies; asked the network of 0\n")


def test_reconcile_refuses_what_it_cannot_do_in_a_line(tmp_path: Path) -> None:
    process = run(tmp_path, "reconcile", *REASON)
    assert (process.popen.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1
    away = run(tmp_path, "reconcile", DATABASE_URL="postgresql://postgres:hidden@127.0.0.1:1/nowhere")
    assert away.popen.returncode == 1
    assert len(away.stderr.splitlines()) == 1
    assert "hidden" not in away.stderr
