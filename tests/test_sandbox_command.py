"""`callora sandbox`, and the sandbox inside of `callora dev`: facts, a funded wallet, and everything kept."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from stellar_sdk import ChangeTrust, Keypair, Server, SorobanServer, TransactionBuilder, scval, xdr
from stellar_sdk.asset import Asset
from stellar_sdk.contract import ContractClient

from tests.support.processes import CalloraProcess, callora, nothing_left_in, run_callora


@contextmanager
def sandbox(data_dir: Path, log_directory: Path, *more: str) -> Iterator[tuple[CalloraProcess, dict[str, Any]]]:
    """Run `callora sandbox` and yield it with its facts."""
    arguments = ("sandbox", "--json", "--port", "0", "--data-dir", str(data_dir), *more)
    with nothing_left_in(data_dir), callora(*arguments, log_directory=log_directory) as process:
        yield process, process.facts()


def ask(url: str, **query: str) -> Any:
    """Return a document of the sandbox."""
    answer = httpx.get(url, params=query, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def with_usdc(facts: dict[str, Any], wallet: Keypair) -> None:
    """Give a new wallet XLM, a trust line and 100 test USDC, as docs/sandbox.md says."""
    ask(facts["friendbot_url"], addr=wallet.public_key)
    with closing(Server(facts["horizon_url"])) as server:
        account = server.load_account(wallet.public_key)
        builder = TransactionBuilder(account, facts["network_passphrase"], server.fetch_base_fee())
        usdc = Asset("USDC", facts["usdc_issuer"])
        envelope = builder.append_operation(ChangeTrust(usdc)).set_timeout(60).build()
        envelope.sign(wallet)
        server.submit_transaction(envelope)
    ask(facts["faucet_url"], addr=wallet.public_key, amount="100")


def usdc_of(facts: dict[str, Any], address: str) -> int:
    """Return what the USDC contract says that an address has."""
    client = ContractClient(facts["usdc_contract_id"], facts["rpc_url"], facts["network_passphrase"])
    with closing(client.server):
        told = client.invoke("balance", [scval.to_address(address)]).result()
    assert isinstance(told, xdr.SCVal)
    return scval.from_int128(told)


def test_it_serves_alone_and_keeps_everything(tmp_path: Path) -> None:
    data_dir, wallet = tmp_path / "data", Keypair.random()
    with sandbox(data_dir, tmp_path, "--close-seconds", "0.1") as (process, facts):
        with closing(SorobanServer(facts["rpc_url"])) as server:
            assert server.get_network().passphrase == facts["network_passphrase"]
            assert server.get_health().status == "healthy"
        with_usdc(facts, wallet)
        assert usdc_of(facts, wallet.public_key) == 1_000_000_000
        process.signal(signal.SIGKILL)
        process.wait(10)
    with sandbox(data_dir, tmp_path, "--close-seconds", "0.1") as (process, again):
        assert usdc_of(again, wallet.public_key) == 1_000_000_000
        assert {name for name in facts if facts[name] != again[name]} <= {
            "rpc_url",
            "horizon_url",
            "friendbot_url",
            "faucet_url",
        }
        process.signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_it_says_that_it_is_a_stand_in(tmp_path: Path) -> None:
    arguments = ("sandbox", "--port", "0", "--data-dir", str(tmp_path / "data"))
    with nothing_left_in(tmp_path / "data"), callora(*arguments, log_directory=tmp_path) as process:
        deadline = time.monotonic() + 20
        while "xlm_contract_id" not in process.stdout and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "a stand-in for a Stellar network" in process.stdout
        process.signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_it_closes_only_when_told_to_and_two_on_one_directory_or_port_are_refused_in_a_line(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with sandbox(data_dir, tmp_path, "--close-seconds", "0") as (_, facts):
        before = ask(f"{facts['horizon_url']}/sandbox")["ledger"]
        closed = httpx.post(f"{facts['horizon_url']}/sandbox/close", json={"ledgers": 2}).json()["ledger"]
        assert closed == before + 2
        port = facts["horizon_url"].rpartition(":")[2]
        for arguments, said in (
            (("--port", "0", "--data-dir", str(data_dir)), "is in use by another process"),
            (("--port", port, "--data-dir", str(tmp_path / "other")), f"cannot listen on 127.0.0.1:{port}"),
        ):
            late = run_callora("sandbox", *arguments, log_directory=tmp_path)
            assert late.popen.returncode == 1
            assert said in late.stderr
            assert "Traceback" not in late.stderr


def test_dev_starts_one_whose_state_survives_a_restart(tmp_path: Path) -> None:
    data_dir, wallet = tmp_path / "data", Keypair.random()
    arguments = ("dev", "--json", "--port", "0", "--data-dir", str(data_dir))
    with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
        facts = process.facts()["sandbox"]
        assert set(facts) >= {"rpc_url", "horizon_url", "network_passphrase", "vault_contract_id", "usdc_contract_id"}
        with_usdc(facts, wallet)
        kept = json.loads((data_dir / "credentials.json").read_text())
        with closing(Server(facts["horizon_url"])) as server:
            for seed in (kept["vault_owner_seed"], kept["fee_bumper_secret_key"], *kept["channel_seeds"].split(",")):
                assert server.load_account(Keypair.from_secret(seed).public_key).sequence
                assert seed not in process.stderr
        process.signal(signal.SIGTERM)
        assert process.wait(15) == 0
    with nothing_left_in(data_dir), callora(*arguments, log_directory=tmp_path) as process:
        assert usdc_of(process.facts()["sandbox"], wallet.public_key) == 1_000_000_000


def test_dev_starts_none_where_the_settings_name_a_network(tmp_path: Path) -> None:
    arguments = ("dev", "--json", "--port", "0", "--data-dir", str(tmp_path / "data"))
    environ = {"SOROBAN_RPC_ENABLED": "false"}
    with nothing_left_in(tmp_path / "data"), callora(*arguments, environ=environ, log_directory=tmp_path) as process:
        assert process.facts()["sandbox"] is None
