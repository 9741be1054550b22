"""What developers see of their money: revenue, settlements, statements, and the way of it into their wallets."""

import csv
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import attrs
import pytest
from stellar_sdk import Keypair, TransactionEnvelope

from callora.config.loading import load_settings
from callora.ledger.chain import Applied
from callora.ledger.commands import Refund
from callora.ledger.ids import EventId
from callora.ledger.money import Stroops, parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.store.accounts import PricedEndpoint
from callora.store.revenue import advance
from callora.store.settlements import ask_for_run
from tests.http.test_analytics import owner_of
from tests.support.chain_service import ChainService, Depositor, chain_service
from tests.support.client import call
from tests.support.rest import ADMIN_KEY, Told, admin, person, rest_client
from tests.support.service import RunningService, running_service
from tests.support.upstream import raw_upstream, respond
from tests.support.wallets import Wallet

PRICE = (PricedEndpoint("*", "*", parse_usdc("2.0000001")),)
JANUARY = {"from": "2026-01-01", "to": "2026-01-02"}
GHOST = "00000000-0000-7000-8000-00000000dead"
ENVIRON = {"REST_RATE_LIMIT_MAX_REQUESTS": "100000", "ADMIN_API_KEY": ADMIN_KEY}


@attrs.frozen
class Seller:
    """A developer on a chain, and what callers pay him for."""

    at: ChainService
    person: Depositor
    slug: str

    async def earn(self, calls: int) -> None:
        """Let somebody pay for calls."""
        consumer = await self.at.service.consumer("50")
        for _ in range(calls):
            told = await call(self.at.service.port, "GET", f"/v1/call/{self.slug}/x", consumer.headers)
            assert told.status == 200

    async def revenue(self) -> Any:
        """Return what the revenue route says."""
        told = await self.person.ask("GET", "/api/developers/revenue")
        assert told.status == 200, told.body
        return told.body

    async def settled(self, earned: str) -> Any:
        """Have everyone paid once the revenue says that all of it is earned, and return it once that is paid."""
        await self.at.until(self.revenue, lambda body: body["summary"]["total_earned"] == earned)
        await ask_for_run(self.at.service.database, "testnet")
        return await self.at.until(self.revenue, lambda body: body["summary"]["completed"] == earned)

    async def stage(self, tx_hash: str, wanted: str) -> Any:
        """Return a withdrawal once it is at a stage."""

        part = self.at.service.chain
        assert part is not None

        async def look() -> Told:
            await part.payouts.look()
            return await self.person.ask("GET", f"/api/developers/withdrawals/{tx_hash}")

        return (await self.at.until(look, lambda told: told.body["stage"] == wanted)).body

    async def statement(self, **query: str) -> list[dict[str, str]]:
        """Return the lines of the statement."""
        told = await self.person.ask("GET", "/api/developers/statement", query=query)
        assert told.status == 200, told.body
        return [*csv.DictReader(io.StringIO(told.body.decode()))]


@asynccontextmanager
async def selling(database_url: str) -> AsyncIterator[Seller]:
    """Run a service that settles, with one developer who sells."""
    async with (
        chain_service(database_url, settles=True) as at,
        raw_upstream(respond(200, body=b"paid")) as upstream,
    ):
        someone = await at.funded()
        assert (await someone.ask("GET", "/api/developers/me")).status == 200
        endpoint = {"path": "/x", "method": "GET", "price_per_call_usdc": "2.0000001"}
        made = await someone.ask(
            "POST", "/api/apis", {"name": "Sold", "base_url": upstream.url, "endpoints": [endpoint]}
        )
        assert made.status == 201, made.body
        yield Seller(at, someone, made.body["slug"])


async def test_a_developer_is_paid_sees_it_and_takes_it_into_his_wallet(database_url: str) -> None:
    async with selling(database_url) as seller:
        at, someone = seller.at, seller.person
        await seller.earn(3)
        body = await seller.settled("6.0000003")
        assert body["summary"] == {
            "total_earned": "6.0000003",
            "completed": "6.0000003",
            "pending": "0.0000000",
            "available_to_withdraw": "0.0000000",
            "held_back": None,
        }
        (paid,) = body["settlements"]
        assert (paid["status"], paid["amount"], paid["gross"], paid["fee"]) == (
            "completed",
            "6.0000003",
            "6.0000003",
            "0.0000000",
        )
        assert paid["address"] == someone.wallet.address
        assert paid["explorer_url"] is None, "nobody shows a sandbox"
        assert paid["completed_at"] is not None
        assert at.service.chain is not None
        for tx_hash in (paid["tx_hash"], paid["charge_tx_hash"]):
            found = await at.service.chain.chain.transaction(tx_hash)
            assert isinstance(found, Applied)
            assert found.successful
        one = await someone.ask("GET", f"/api/developers/settlements/{paid['id']}")
        assert one.body == paid
        listed = await someone.ask("GET", "/api/developers/settlements")
        assert listed.body == {"data": [paid], "meta": {"limit": 20, "nextCursor": None, "hasMore": False}}

        assert (await someone.ask("GET", "/api/developers/balance")).body == {
            "network": "testnet",
            "address": someone.wallet.address,
            "balance_usdc": "6.0000003",
        }
        prepared = await someone.ask("POST", "/api/developers/withdrawals/prepare", {"amount_usdc": "2.5"})
        assert prepared.status == 200, prepared.body
        assert prepared.body["contractId"] == at.town.sandbox.places.settlement_contract
        assert [each["value"] for each in prepared.body["operation"]["args"]] == [
            someone.wallet.address,
            "25000000",
            "",
        ]
        assert prepared.body["sep7"].startswith("web+stellar:tx?xdr=")
        signed = {"signed_xdr": someone.sign(prepared)}
        for _ in range(2):
            told = await someone.ask("POST", "/api/developers/withdrawals/submit", signed)
            assert told.status == 200, told.body
        confirmed = await seller.stage(prepared.body["hash"], "confirmed")
        assert confirmed["ledger"] > 0
        assert await someone.on_chain() == parse_usdc("102.5")
        told = await someone.ask("POST", "/api/developers/withdrawals/submit", signed)
        assert (told.status, told.body["stage"]) == (200, "confirmed")

        rest = await someone.ask("POST", "/api/developers/withdrawals/prepare", {})
        assert rest.body["amount"] == "3.5000003", "all there is"
        told = await someone.ask("POST", "/api/developers/withdrawals/submit", {"signed_xdr": someone.sign(rest)})
        assert told.status == 200, told.body
        await seller.stage(rest.body["hash"], "confirmed")
        assert await someone.on_chain() == parse_usdc("106.0000003")
        told = await someone.ask("POST", "/api/developers/withdrawals/prepare", {})
        assert (told.status, told.code) == (409, "DEVELOPER_BALANCE_INSUFFICIENT")

        entries = [(line["account"], line["entry"], line["amount_usdc"]) for line in await seller.statement()]
        assert entries == [
            ("owed", "opening_balance", ""),
            ("owed", "usage", "6.0000003"),
            ("owed", "settlement", "-6.0000003"),
            ("on_chain", "settlement", "6.0000003"),
            ("on_chain", "withdrawal", "-2.5000000"),
            ("on_chain", "withdrawal", "-3.5000003"),
            ("owed", "closing_balance", ""),
        ]
        compared = await at.service.chain.bookkeeper.compare(at.service.context.clock.now() - timedelta(days=1))
        assert (compared.open, compared.untold) == ([], 0)


async def test_a_withdrawal_is_taken_back_only_as_it_was_prepared_and_only_from_its_developer(
    database_url: str,
) -> None:
    async with selling(database_url) as seller:
        at, someone = seller.at, seller.person
        await seller.earn(3)
        await seller.settled("6.0000003")
        prepared = await someone.ask("POST", "/api/developers/withdrawals/prepare", {"amount_usdc": "1"})
        envelope = TransactionEnvelope.from_xdr(prepared.body["xdr"], prepared.body["networkPassphrase"])
        other = await at.funded()
        told = await other.ask("POST", "/api/developers/withdrawals/submit", {"signed_xdr": someone.sign(prepared)})
        assert (told.status, told.code) == (403, "DEVELOPER_NOT_FOUND")
        await other.ask("GET", "/api/developers/me")
        for signed, status, code in (
            (someone.sign(prepared), 404, "WITHDRAWAL_NOT_FOUND"),
            ("AAAA", 400, "INVALID_SIGNED_TRANSACTION"),
        ):
            told = await other.ask("POST", "/api/developers/withdrawals/submit", {"signed_xdr": signed})
            assert (told.status, told.code) == (status, code)
        envelope.transaction.fee += 1
        envelope.sign(someone.wallet.keypair)
        for signed, code in (
            (envelope.to_xdr(), "WITHDRAWAL_NOT_FOUND"),
            (prepared.body["xdr"], "INVALID_SIGNED_TRANSACTION"),
        ):
            told = await someone.ask("POST", "/api/developers/withdrawals/submit", {"signed_xdr": signed})
            assert told.code == code
        (settlement,) = (await seller.revenue())["settlements"]
        for path in (f"settlements/{settlement['id']}", f"withdrawals/{prepared.body['hash']}"):
            assert (await other.ask("GET", f"/api/developers/{path}")).status == 404
            assert (await someone.ask("GET", f"/api/developers/{path}")).status == 200
        told = await someone.ask("POST", "/api/developers/withdrawals/prepare", {"amount_usdc": "6.0000004"})
        assert (told.status, told.code) == (409, "DEVELOPER_BALANCE_INSUFFICIENT")
        assert told.body["details"] == {"required": "6.0000004", "available": "6.0000003"}
        for number in range(1, 10):
            body = {"amount_usdc": f"0.000000{number}"}
            assert (await someone.ask("POST", "/api/developers/withdrawals/prepare", body)).status == 200
        told = await someone.ask("POST", "/api/developers/withdrawals/prepare", {"amount_usdc": "1"})
        assert (told.status, told.code) == (409, "TOO_MANY_OPEN_WITHDRAWALS")
        first = await someone.ask("GET", "/api/developers/withdrawals", query={"limit": 6})
        rest = await someone.ask(
            "GET", "/api/developers/withdrawals", query={"limit": 6, "cursor": first.body["meta"]["nextCursor"]}
        )
        shown = [each["hash"] for page in (first, rest) for each in page.body["data"]]
        assert len(shown) == len({*shown}) == 10
        assert rest.body["meta"]["hasMore"] is False


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"amount_usdc": "0"}, "body.amount_usdc"),
        ({"amount_usdc": "-1"}, "body.amount_usdc"),
        ({"amount_usdc": "1.00000001"}, "body.amount_usdc"),
        ({"amount_usdc": "1e3"}, "body.amount_usdc"),
        ({"amount_usdc": 1.5}, "body.amount_usdc"),
        ({"address": "G"}, "body.address"),
    ],
)
async def test_amounts_are_exact_decimals_within_bounds(database_url: str, body: dict[str, Any], field: str) -> None:
    async with running_service(database_url, ENVIRON) as service, rest_client(service) as client:
        someone = await person(service, client)
        told = await someone.ask("POST", "/api/developers/withdrawals/prepare", body)
        assert (told.status, told.code, told.wrong) == (400, "VALIDATION_ERROR", [field])


async def test_who_has_no_profile_no_wallet_or_no_chain_is_told_so(database_url: str) -> None:
    async with running_service(database_url, ENVIRON) as service, rest_client(service) as client:
        someone = await person(service, client)
        for path in ("revenue", "settlements", f"settlements/{GHOST}", "statement", "withdrawals"):
            told = await someone.ask("GET", f"/api/developers/{path}")
            assert (told.status, told.code) == (403, "DEVELOPER_NOT_FOUND"), path
        told = await someone.ask("GET", "/api/developers/balance")
        assert (told.status, told.code) == (503, "COMPONENT_NOT_CONFIGURED")
        await someone.ask("GET", "/api/developers/me")
        for path, status in (
            ("settlements/x", 400),
            (f"settlements/{GHOST}", 404),
            ("withdrawals/x", 400),
            (f"withdrawals/{'0' * 64}", 404),
            ("settlements?cursor=x", 400),
            ("revenue?cursor=eyJ4Ijox", 400),
            ("withdrawals?cursor=WzEsIngiXQ", 400),
            ("revenue?limit=101", 400),
            ("revenue?network=futurenet", 400),
            ("statement?from=1990-01-01", 400),
            ("statement?from=2020-01-01&to=2026-01-01", 400),
            ("revenue?network=mainnet", 200),
        ):
            assert (await someone.ask("GET", f"/api/developers/{path}")).status == status, path
    async with chain_service(database_url) as at:
        loner = await person(at.service, at.client)
        await loner.ask("GET", "/api/developers/me")
        for method, path, body in (("GET", "balance", None), ("POST", "withdrawals/prepare", {})):
            told = await loner.ask(method, f"/api/developers/{path}", body)
            assert (told.status, told.code) == (409, "WALLET_NOT_PROVED")
        wallet = Wallet()
        session = await wallet.log_in(at.client)
        await session.person.ask("GET", "/api/developers/me")
        told = await session.person.ask("POST", "/api/developers/withdrawals/prepare", {})
        assert (told.status, told.code) == (400, "SOURCE_ACCOUNT_NOT_FOUND")


@asynccontextmanager
async def earned(database_url: str, **environ: str) -> AsyncIterator[tuple[RunningService, Any]]:
    """Run a service without a chain where somebody has paid for five calls, and yield it and the developer."""
    async with (
        running_service(database_url, {**ENVIRON, **environ}) as service,
        raw_upstream(respond(200, body=b"paid")) as upstream,
        rest_client(service) as client,
    ):
        await service.api("sold", upstream.url, PRICE)
        consumer = await service.consumer("50")
        for _ in range(5):
            assert (await call(service.port, "GET", "/v1/call/sold/x", consumer.headers)).status == 200
        event = await service.database.fetch_value("SELECT event_id::text FROM usage_events LIMIT 1")
        refund = Refund(EventId(event), Stroops(3), "because")
        assert isinstance(await service.ledger.registry.ask(consumer.vault_id, refund), BalanceMoved)
        assert await advance(service.database, service.context.clock.now(), wait=True) is not None
        yield service, await owner_of(service, client, "sold")


async def test_defect_19_a_statement_adds_up_to_the_stroop_with_fees_and_refunds(database_url: str) -> None:
    fee = {"PLATFORM_FEE_BPS": "333", "PLATFORM_FEE_ADDRESS": Keypair.random().public_key}
    async with earned(database_url, **fee) as (_, developer):
        summary = (await developer.ask("GET", "/api/developers/revenue")).body["summary"]
        told = await developer.ask("GET", "/api/developers/statement")
        assert told.headers["content-type"] == "text/csv; charset=utf-8"
        assert "attachment" in told.headers["content-disposition"]
        lines = [*csv.DictReader(io.StringIO(told.body.decode()))]
        amounts = {line["entry"]: parse_signed(line["amount_usdc"]) for line in lines[1:-1]}
        price = parse_usdc("2.0000001")
        assert amounts["usage"] == 5 * price
        assert amounts["platform_fee"] == -5 * (price * 333 // 10_000)
        assert amounts["refund"] == -3
        assert sum(amounts.values()) == parse_signed(summary["total_earned"])
        assert lines[0]["balance_usdc"] == "0.0000000"
        assert lines[-1]["balance_usdc"] == summary["total_earned"] == summary["available_to_withdraw"]
        assert {line["api"] for line in lines[1:-1]} == {"sold"}

        later = await developer.ask(
            "GET", "/api/developers/statement", query={"from": "2026-01-01", "to": "2026-01-02"}
        )
        assert [line["entry"] for line in csv.DictReader(io.StringIO(later.body.decode()))] == [
            "opening_balance",
            "closing_balance",
        ]


def parse_signed(text: str) -> int:
    """Return stroops of a decimal string with 7 places."""
    assert len(text.partition(".")[2]) == 7, text
    return -parse_usdc(text[1:]) if text.startswith("-") else parse_usdc(text)


async def test_defect_20_of_two_developers_each_sees_his_own_and_nothing_else(database_url: str) -> None:
    async with earned(database_url) as (service, developer):
        await service.api("other", "http://127.0.0.1:9", PRICE)
        other = await owner_of(service, developer.client, "other")
        mine, theirs = [(await each.ask("GET", "/api/developers/revenue")).body for each in (developer, other)]
        assert mine["summary"]["total_earned"] == "10.0000002"
        assert theirs["summary"]["total_earned"] == "0.0000000"


async def test_operators_list_what_does_not_add_up_and_clear_it_once(database_url: str) -> None:
    async with chain_service(database_url) as at:
        operator, part = admin(at.client), at.service.chain
        assert part is not None
        await part.treasury.listener.until_noted(1)
        await at.service.database.execute(
            "INSERT INTO chain_reconciliations (network, epoch, ledger, at, on_chain, expected, parts)"
            " SELECT network, epoch, 5, now() + interval '1 day', 2, 1, '{}' FROM chain_networks"
        )
        since = at.service.context.clock.now() - timedelta(days=1)
        (noted,) = (await part.bookkeeper.compare(since)).open
        (shown,) = (await operator.ask("GET", "/api/admin/settlements/discrepancies")).body["data"]
        assert (shown["id"], shown["kind"], shown["difference_usdc"]) == (noted.discrepancy_id, "DRIFT", "0.0000001")
        assert shown["stopsSettlement"] is True
        assert (await operator.ask("GET", "/api/admin/chain")).body["settlementHalted"] is not None
        path = f"/api/admin/settlements/discrepancies/{shown['id']}/clear"
        assert (await operator.ask("POST", path, {"reason": "the node lied"})).status == 200
        assert (await operator.ask("POST", path, {"reason": "again"})).status == 404
        assert (await operator.ask("POST", "/api/admin/chain/settlement/resume", {"reason": "cleared"})).status == 200
        assert (await part.bookkeeper.compare(since)).open == []
        assert (await operator.ask("GET", "/api/admin/chain")).body["settlementHalted"] is None
        assert (await operator.ask("GET", "/api/admin/settlements/discrepancies")).body["data"] == []
        query = {"all": "true"}
        (kept,) = (await operator.ask("GET", "/api/admin/settlements/discrepancies", query=query)).body["data"]
        assert (kept["clearedBy"] is not None, kept["reason"]) == (True, "the node lied")


def test_transactions_are_shown_where_people_look_at_them() -> None:
    public = load_settings({"APP_ENV": "test"})
    assert public.explorer_of("testnet") == "https://stellar.expert/explorer/testnet/tx"
    assert public.explorer_of("mainnet") == "https://stellar.expert/explorer/public/tx"
    sandbox = {"APP_ENV": "test", "STELLAR_NETWORK_PASSPHRASE": "Sandbox"}
    assert load_settings(sandbox).explorer_of("testnet") is None
    told = load_settings({**sandbox, "STELLAR_EXPLORER_URL": "https://look.example/tx/"})
    assert told.explorer_of("testnet") == "https://look.example/tx"
