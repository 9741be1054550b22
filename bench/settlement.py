"""Settlement of many developers: their calls are indexed, sealed, charged and credited on a sandbox, by the commands an
operator would run; for a quarter of the developers, for half of them and for all, so that growth is seen.

The sandbox is served by this process, so that what the commands cost is theirs alone.
"""

import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

import attrs
import trio
from stellar_sdk import scval

from bench.machine import GATEWAY_CORE, BenchError, Child, environment, running
from bench.plan import Plan, Progress
from bench.stack import ROOT, Stack
from callora.sandbox import SandboxFacts
from callora.service import SystemClock
from callora.stellar.contracts import ContractCall, question
from callora.stellar.sandbox.genesis import Cast, keypair_of
from callora.stellar.sandbox.network import Sandbox
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.simulation import Simulation, Simulator
from callora.stellar.sandbox.state import Undecodable
from callora.stellar.sandbox.transactions import decode
from callora.stellar.settlement import SettlementContract
from callora.store import usage
from callora.store.bridge import Database, open_database
from callora.store.chain import add_network

CALLS_EACH: Final = 1000
PRICE: Final = 100_000
"""Stroops: each developer earns 10 USDC, twice what he must have earned to be paid."""
CLOSE_SECONDS: Final = 0.25
"""How often a ledger closes: a network's own time is not what is measured."""
DAYS: Final = 10
_LOOK_SECONDS: Final = 0.05
_GIVE_UP_SECONDS: Final = 900.0
_COMMAND_SECONDS: Final = 300
_BATCH_DEVELOPERS: Final = 50
_CHANNELS: Final = tuple(keypair_of(f"channel {number}") for number in range(4))
_CHARGER: Final = keypair_of("charger")
_CREDITER: Final = keypair_of("settlement admin")


@attrs.frozen
class Cost:
    """What one command took."""

    seconds: float
    peak_mib: float
    """The most memory it ever had resident."""


@attrs.frozen
class Scale:
    """One size."""

    developers: int
    events: int
    index: Cost
    settle: Cost
    settlements: int
    transactions: int
    """Charges and credits that were built."""
    in_vain: str
    """What became of those that did not succeed; "" for none."""

    @property
    def events_per_second(self) -> float:
        """How fast calls became revenue."""
        return self.events / self.index.seconds

    @property
    def transactions_per_50(self) -> float:
        """Transactions for fifty developers."""
        return self.transactions / (self.developers / _BATCH_DEVELOPERS)


@attrs.frozen
class SettlementFigures:
    """Every size, the smallest first."""

    scales: tuple[Scale, ...]

    @property
    def growth(self) -> float:
        """Time of the largest over time of the smallest, for each developer: 1 is linear."""
        first, last = self.scales[0], self.scales[-1]
        return (_seconds(last) / last.developers) / (_seconds(first) / first.developers)


def _seconds(scale: Scale) -> float:
    return scale.index.seconds + scale.settle.seconds


_PEOPLE: Final = """
INSERT INTO users (user_id, name, wallet_address)
    SELECT ('00000000-0000-7000-a000-' || lpad(to_hex(n), 12, '0'))::uuid, 'User ' || n, address
    FROM unnest($1::text[]) WITH ORDINALITY AS made (address, n)
"""
_DEVELOPERS: Final = """
INSERT INTO developers (developer_id, user_id, name)
    SELECT ('00000000-0000-7000-b000-' || lpad(to_hex(n), 12, '0'))::uuid,
           ('00000000-0000-7000-a000-' || lpad(to_hex(n), 12, '0'))::uuid, 'Developer ' || n
    FROM generate_series(1, $1::int) n
"""
_CALLS: Final = f"""
INSERT INTO usage_events (vault_id, event_id, api_key_id, developer_id, api_id, endpoint_id, held_amount, created_at,
                          expires_at, price_version, state, amount, closed_at, latency_us, status, outcome)
SELECT $4::uuid,
       (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7000' || '8000'
        || lpad(to_hex(n), 12, '0'))::uuid,
       $4::uuid, ('00000000-0000-7000-b000-' || lpad(to_hex(n % $3::int + 1), 12, '0'))::uuid, 1, 1, {PRICE}, at,
       at + interval '2 minutes', 1, 'captured', {PRICE}, at, 50000, 200, 'delivered'
FROM (SELECT n, $1::timestamptz + n * ($2::interval / ($3::int * {CALLS_EACH})) AS at
      FROM generate_series(0, $3::int * {CALLS_EACH} - 1) n) AS made
"""

_CAME_TO: Final = """
SELECT count(*) AS settlements, count(*) FILTER (WHERE state = 'completed') AS completed,
       (SELECT count(*) FROM chain_transactions WHERE purpose LIKE ANY (ARRAY['charge:%', 'credit:%'])) AS transactions,
       (SELECT coalesce(string_agg(concat_ws(' ', state, result_code, operation_code, contract_error, refusal), ', '),
                        '')
        FROM chain_transactions WHERE state <> 'succeeded') AS in_vain
FROM settlements
"""


async def run_settlement(stack: Stack, plan: Plan, progress: Progress) -> SettlementFigures:
    """Return the figures.

    Raises:
        BenchError: a command failed, or somebody was not paid exactly what he earned.
    """
    scales = [await _settled(stack, developers, progress) for developers in plan.settled_developers]
    return SettlementFigures(tuple(scales))


async def _settled(stack: Stack, developers: int, progress: Progress) -> Scale:
    wallets = [keypair_of(f"developer {number}").public_key for number in range(developers)]
    tenant = await stack.tenant(f"settlement_{developers}", vaults=1)
    sandbox = Sandbox.make(SystemClock(), cast=_cast(wallets))
    listener = socket.create_server(("127.0.0.1", 0))
    async with open_database(tenant.dsn, command_seconds=_COMMAND_SECONDS) as database, trio.open_nursery() as nursery:
        await _seed(database, sandbox, wallets, tenant.vault_ids[0])
        progress.say(f"settlement: {developers * CALLS_EACH} calls of {developers} developers made")
        env = {"DATABASE_URL": tenant.dsn, **_settings(await nursery.start(sandbox.serve, listener, CLOSE_SECONDS))}
        index = await _command(stack, f"revenue_{developers}", ["revenue"], env)
        progress.say(f"settlement: indexed in {index.seconds:.1f} s")
        settle = await _command(stack, f"settle_{developers}", ["settle", "--now", "--wait", "600"], env)
        progress.say(f"settlement: settled in {settle.seconds:.1f} s")
        row = await database.fetch_row(_CAME_TO)
        assert row is not None
        _must_be_paid(sandbox, wallets)
        if row["completed"] != row["settlements"]:
            raise BenchError(f"{row['settlements'] - row['completed']} settlements did not end")
        nursery.cancel_scope.cancel()
    return Scale(
        developers=developers,
        events=developers * CALLS_EACH,
        index=index,
        settle=settle,
        settlements=row["settlements"],
        transactions=row["transactions"],
        in_vain=row["in_vain"],
    )


def _cast(wallets: Sequence[str]) -> Cast:
    return Cast(
        settlement_admin=_CREDITER,
        authorized_caller=_CHARGER.public_key,
        funded=(*(each.public_key for each in (*_CHANNELS, _CHARGER)), *wallets),
        trusting=tuple(wallets),
        opening=2 * len(wallets) * CALLS_EACH * PRICE,
    )


def _settings(url: str) -> dict[str, str]:
    return {
        **SandboxFacts.at(url).settings(),
        "APP_ENV": "development",
        "CHANNEL_SEEDS": ",".join(each.secret for each in _CHANNELS),
        "SETTLEMENT_CHARGING_SEED": _CHARGER.secret,
        "SETTLEMENT_CREDITING_SEED": _CREDITER.secret,
        "SETTLEMENT_CHARGING_CAP_USDC": "1000000",
        "SETTLEMENT_CREDITING_CAP_USDC": "1000000",
    }


async def _seed(database: Database, sandbox: Sandbox, wallets: Sequence[str], vault_id: str) -> None:
    now = SystemClock().now()
    start = now - timedelta(days=DAYS)
    await add_network(database, "testnet", sandbox.ledger.rules.passphrase, sandbox.places.vault_contract, now)
    await database.execute(_PEOPLE, wallets)
    await database.execute(_DEVELOPERS, len(wallets))
    await usage.ensure_partitions(database, start)
    await database.execute(_CALLS, start, timedelta(days=DAYS), len(wallets), vault_id)
    await database.execute("VACUUM (ANALYZE)")


async def _command(stack: Stack, name: str, words: Sequence[str], env: dict[str, str]) -> Cost:
    """Run a command to its end and return what it cost."""
    began = trio.current_time()
    argv = [sys.executable, "-m", "callora", *words]
    with trio.fail_after(_GIVE_UP_SECONDS):
        async with running(
            argv, cores=[GATEWAY_CORE], log=stack.directory / f"{name}.log", env=environment(env), cwd=ROOT
        ) as child:
            peak = await _peak_until_end(child)
            seconds = trio.current_time() - began
            if child.process.returncode != 0:
                raise BenchError(f"callora {' '.join(words)} ended with {child.process.returncode}:\n{child.tail()}")
    return Cost(seconds, peak)


async def _peak_until_end(child: Child) -> float:
    """Wait for a process to end and return the most memory it was seen to have had, MiB."""
    peak = 0.0
    while child.process.poll() is None:
        peak = max(peak, _high_water_mib(child.pid))
        await trio.sleep(_LOOK_SECONDS)
    return peak


def _high_water_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except ProcessLookupError:
        return 0.0  # it ended between the look and the reading
    told = next((line for line in lines if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(told.split()[1]) / 1024


def _must_be_paid(sandbox: Sandbox, wallets: Sequence[str]) -> None:
    contract = SettlementContract(
        sandbox.places.settlement_contract, _CREDITER.public_key, sandbox.places.vault_contract
    )
    for wallet in wallets:
        paid = _told(sandbox, contract.developer_balance(wallet).call)
        if paid != CALLS_EACH * PRICE:
            raise BenchError(f"{wallet} earned {CALLS_EACH * PRICE} stroops and was paid {paid}")


def _told(sandbox: Sandbox, call: ContractCall) -> int:
    ledger = sandbox.ledger
    asked = decode(question(call, ledger.rules.passphrase).xdr, ledger.network_id)
    if isinstance(asked, Undecodable):
        raise BenchError("the sandbox cannot read a question")
    found = Simulator(Limits(), "bench").simulate(ledger.state, ledger.context(), asked)
    if not isinstance(found, Simulation) or found.value is None:
        raise BenchError(f"the sandbox does not say what a developer has: {found}")
    return scval.from_int128(found.value)
