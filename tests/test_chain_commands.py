"""What an operator does about the chain by commands, each a process, beside a service without the owner's key."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
from stellar_sdk import Keypair, TransactionEnvelope

from callora.sandbox import SandboxFacts
from tests.support.chain_service import OWNER, ChainService, Depositor, chain_service
from tests.support.processes import CalloraProcess, callora, run_callora
from tests.support.rest import admin

SECONDS_MAX = 60.0
"""How long a command may take."""


@attrs.frozen
class Office:
    """A service without the owner's key, someone who wants to deposit, and commands on the same database and chain."""

    at: ChainService
    someone: Depositor
    database_url: str
    directory: Path

    async def run(self, *arguments: str) -> CalloraProcess:
        """Run a command to its end; it may not end in a stack trace."""
        environ = {"DATABASE_URL": self.database_url, **SandboxFacts.at(self.at.url).settings()}
        with callora(*arguments, environ=environ, log_directory=self.directory) as done:  # signals want this thread
            await trio.to_thread.run_sync(done.wait, SECONDS_MAX)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    async def told(self, code: int, *arguments: str) -> str:
        """Return what a command prints, on either stream, that ends with this code."""
        done = await self.run(*arguments)
        assert done.popen.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def signed(self, xdr: str, keypair: Keypair = OWNER) -> str:
        """Return a transaction as somebody signs it, elsewhere."""
        envelope = TransactionEnvelope.from_xdr(xdr, self.at.town.passphrase)
        envelope.sign(keypair)
        return envelope.to_xdr()


@pytest.fixture
async def office(database_url: str, tmp_path: Path) -> AsyncIterator[Office]:
    """An office at which someone has asked to deposit."""
    async with chain_service(database_url, owner=False, DEPOSIT_LISTENER_INTERVAL_MS="500") as at:
        someone = await at.funded()
        told = await someone.prepare()
        assert (told.status, told.code) == (409, "DEPOSITOR_NOT_ADMITTED")
        yield Office(at, someone, database_url, tmp_path)


async def test_an_address_is_listed_and_admitted_by_what_its_owner_signed(office: Office) -> None:
    address = office.someone.wallet.address
    asked = await office.told(0, "depositors", "list", "--state", "asked")
    assert address in asked
    offered = await office.run("depositors", "admit", address)
    assert offered.popen.returncode == 0, offered.stderr
    assert "--signed" in offered.stderr
    unsigned = await office.told(1, "depositors", "admit", address, "--signed", offered.stdout.strip())
    assert "not sent: It is not signed" in unsigned
    signed = office.signed(offered.stdout.strip())
    assert "applied in ledger" in await office.told(0, "depositors", "admit", address, "--signed", signed)
    assert address in await office.told(0, "depositors", "list", "--state", "admitted")
    assert (await office.someone.deposit("3"))["stage"] == "confirmed", "the running service sees it"


async def test_an_address_is_refused_with_a_reason_once_and_a_stranger_not_at_all(office: Office) -> None:
    address, stranger = office.someone.wallet.address, Keypair.random().public_key
    assert "nobody has asked" in await office.told(1, "depositors", "admit", stranger)
    assert await office.told(0, "depositors", "refuse", address, "--reason", "sanctions") == "refused\n"
    assert "refused already" in await office.told(1, "depositors", "refuse", address, "--reason", "sanctions")
    assert "sanctions" in await office.told(0, "depositors", "list")
    told = await office.someone.prepare()
    assert (told.status, told.body["details"]) == (403, {"reason": "sanctions"})


async def test_withdrawals_are_listed_and_paid_or_given_back(office: Office) -> None:
    someone = office.someone
    operator, asked = admin(office.at.client), {"address": someone.wallet.address}
    xdr = (await operator.ask("POST", "/api/admin/depositors/admit", asked)).body["xdr"]
    await operator.ask("POST", "/api/admin/depositors/admit", {**asked, "signed_xdr": office.signed(xdr)})
    await office.at.until(lambda: someone.prepare(), lambda told: told.status == 200)
    await someone.deposit("25")

    async def withdraw(amount: str) -> str:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        told = await someone.ask("POST", "/api/vault/withdrawals", {"amount_usdc": amount}, headers=key)
        assert told.status in (200, 201, 202), told.body
        return str(told.body["id"])

    paid, refused = await withdraw("10"), await withdraw("5")
    listed = await office.told(0, "withdrawals", "list")
    assert paid in listed
    assert refused in listed
    assert "10.0000000" in listed
    offered = await office.run("withdrawals", "pay", paid)
    assert offered.popen.returncode == 0, offered.stderr
    may_be = await office.told(1, "withdrawals", "refuse", paid, "--reason", "changed my mind")
    assert "may still be applied" in may_be, "what was handed out may be sent by anyone"
    signed = office.signed(offered.stdout.strip())
    assert "applied in ledger" in await office.told(0, "withdrawals", "pay", paid, "--signed", signed)
    await office.at.until(
        lambda: someone.ask("GET", f"/api/vault/withdrawals/{paid}"), lambda told: told.body["state"] == "confirmed"
    )
    assert (await office.run("withdrawals", "refuse", refused, "--reason", "not now")).stdout == "given back\n"
    assert "no withdrawal of this id" in await office.told(1, "withdrawals", "pay", refused)
    assert await someone.balance() == "15.0000000"
    assert await someone.on_chain() == 85 * 10_000_000


def test_without_a_chain_such_a_command_names_the_setting(tmp_path: Path, database_url: str) -> None:
    arguments = ("depositors", "admit", Keypair.random().public_key)
    done = run_callora(*arguments, environ={"DATABASE_URL": database_url}, log_directory=tmp_path)
    assert done.popen.returncode == 2
    assert "SOROBAN_RPC_ENABLED" in done.stderr
    assert len(done.stderr.splitlines()) == 1
