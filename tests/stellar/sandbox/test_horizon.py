"""Horizon, driven over a socket by the SDK's own client, unmodified: every route that the sandbox has."""

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import attrs
import httpx
import pytest
import trio
from stellar_sdk import (
    Asset,
    ChangeTrust,
    Keypair,
    ManageData,
    Payment,
    Server,
    SetOptions,
    Signer,
    TransactionBuilder,
    TransactionEnvelope,
    scval,
    xdr,
)
from stellar_sdk.client.requests_client import RequestsClient
from stellar_sdk.exceptions import BadRequestError, BadResponseError, NotFoundError
from stellar_sdk.operation import Operation

from callora.stellar.sandbox import horizon
from callora.stellar.sandbox.faults import Fault
from callora.stellar.sandbox.genesis import NULL_ACCOUNT, Cast, keypair_of
from callora.stellar.sandbox.ledger import NetworkRules
from tests.support.sandbox import Town, make_town, served

T = TypeVar("T")
ALICE, BOB, NOBODY = keypair_of("alice"), keypair_of("bob"), keypair_of("nobody")


@attrs.frozen
class Place:
    """A sandbox on a socket, and the SDK's client for it."""

    town: Town
    url: str
    server: Server

    async def ask(self, function: Callable[[], T]) -> T:
        """Return what the SDK's synchronous client gets, from a thread."""
        return await trio.to_thread.run_sync(function)

    async def get(self, path: str, **query: str) -> httpx.Response:
        """Return an answer as it is."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            return await client.get(path, params=query)

    async def send(self, keypair: Keypair, *operations: Operation, **signers: Keypair) -> dict[str, Any]:
        """Return Horizon's answer to a transaction that the SDK loads, builds, signs and submits."""
        return await self.ask(lambda: self.server.submit_transaction(self.built(keypair, *operations, **signers)))

    def built(self, keypair: Keypair, *operations: Operation, **signers: Keypair) -> TransactionEnvelope:
        """Return a transaction, built as the SDK's documents say."""
        account = self.server.load_account(keypair.public_key)
        builder = TransactionBuilder(account, self.town.passphrase, self.server.fetch_base_fee())
        for operation in operations:
            builder.append_operation(operation)
        envelope = builder.set_timeout(300).add_text_memo("hello").build()
        for signer in (keypair, *signers.values()):
            envelope.sign(signer)
        return envelope


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    town = make_town()
    for name in ("alice", "bob"):
        town.someone(name)
    async with served(town, 0.02) as url:
        with closing(RequestsClient(num_retries=0)) as client:
            yield Place(town, url, Server(url, client))


async def test_root_says_which_network_it_is(place: Place) -> None:
    told = await place.ask(lambda: place.server.root().call())
    assert told["network_passphrase"] == place.town.passphrase
    assert told["core_latest_ledger"] == told["history_latest_ledger"] > 6
    assert told["history_elder_ledger"] == 1


async def test_an_account_is_told_whole(place: Place) -> None:
    town = place.town
    await place.send(
        ALICE, ChangeTrust(town.usdc, "500"), ManageData("color", b"blue"), SetOptions(home_domain="a.test")
    )
    await place.send(ALICE, SetOptions(signer=Signer.ed25519_public_key(BOB.public_key, 2), high_threshold=3))
    await place.send(town.issuer.keypair, Payment(ALICE.public_key, town.usdc, "12.5"))
    told = await place.ask(lambda: place.server.accounts().account_id(ALICE.public_key).call())
    assert told["id"] == told["account_id"] == ALICE.public_key
    assert (told["subentry_count"], told["home_domain"]) == (3, "a.test")
    line, native = told["balances"]
    assert (line["asset_code"], line["asset_issuer"], line["balance"], line["limit"]) == (
        "USDC",
        town.issuer.address,
        "12.5000000",
        "500.0000000",
    )
    assert (line["is_authorized"], native["asset_type"], native["balance"]) == (True, "native", "9999.9999600")
    assert told["thresholds"] == {"low_threshold": 0, "med_threshold": 0, "high_threshold": 3}
    weights = {signer["key"]: signer["weight"] for signer in told["signers"]}
    assert weights == {ALICE.public_key: 1, BOB.public_key: 2}
    assert base64.b64decode(told["data"]["color"]) == b"blue"
    data = await place.ask(lambda: place.server.data(ALICE.public_key, "color").call())
    assert data == {"value": told["data"]["color"]}


async def test_the_account_that_reads_are_simulated_as_exists(place: Place) -> None:
    account = await place.ask(lambda: place.server.load_account(NULL_ACCOUNT))
    assert account.sequence == 1 << 32


@pytest.mark.parametrize(
    "path",
    [
        f"/accounts/{NOBODY.public_key}",
        f"/accounts/{NOBODY.public_key}/transactions",
        f"/accounts/{ALICE.public_key}/data/nothing",
        f"/transactions/{'0' * 64}",
        f"/transactions/{'0' * 64}/operations",
        "/ledgers/999999",
        "/operations/1",
        "/nothing/of/the/kind",
    ],
)
async def test_what_is_not_there_is_a_problem_404(place: Place, path: str) -> None:
    answer = await place.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert answer.json()["type"] == "https://stellar.org/horizon-errors/not_found"


async def test_what_is_asked_wrongly_is_a_problem_400(place: Place) -> None:
    for query in ({"order": "up"}, {"limit": "0"}, {"limit": "201"}, {"cursor": "x"}):
        answer = await place.get("/transactions", **query)
        assert (answer.status_code, answer.json()["extras"]["invalid_field"]) == (400, next(iter(query)))
    assert (await place.get(f"/accounts/{'G' * 56}")).status_code == 400
    with pytest.raises(NotFoundError):
        await place.ask(lambda: place.server.load_account(Keypair.random().public_key))


async def test_ledgers_are_listed_and_told(place: Place) -> None:
    assert await place.ask(place.server.fetch_base_fee) == 100
    page = await place.ask(lambda: place.server.ledgers().order(True).limit(3).call())
    sequences = [record["sequence"] for record in page["_embedded"]["records"]]
    assert sequences == list(range(sequences[0], sequences[0] - 3, -1))
    told = await place.ask(lambda: place.server.ledgers().ledger(7).call())
    assert told["closed_at"] == "2023-11-14T22:13:20Z"
    assert (told["successful_transaction_count"], told["operation_count"], told["base_fee_in_stroops"]) == (1, 1, 100)
    assert told["prev_hash"] == (await place.get("/ledgers/6")).json()["hash"]


async def test_fee_stats_tell_what_was_paid(place: Place) -> None:
    stats = await place.ask(lambda: place.server.fee_stats().call())
    assert stats["last_ledger_base_fee"] == "100"
    assert stats["fee_charged"]["p99"] == "100"


async def test_a_submission_is_answered_when_its_ledger_has_closed(place: Place) -> None:
    told = await place.send(ALICE, Payment(BOB.public_key, Asset.native(), "1"))
    assert told["successful"]
    assert told["memo"] == "hello"
    assert (told["fee_charged"], told["operation_count"]) == ("100", 1)
    found = await place.ask(lambda: place.server.transactions().transaction(told["hash"]).call())
    assert found == told
    envelope = TransactionEnvelope.from_xdr(told["envelope_xdr"], place.town.passphrase)
    assert envelope.hash_hex() == told["hash"]
    again = await place.ask(lambda: place.server.submit_transaction(envelope))
    assert again == told, "the same transaction again is answered with what became of it"


async def test_a_fee_bump_is_told_with_what_is_in_it(place: Place) -> None:
    inner = await place.ask(lambda: place.built(ALICE, ManageData("note", b"1")))
    outer = TransactionBuilder.build_fee_bump_transaction(BOB, 200, inner, place.town.passphrase)
    outer.sign(BOB)
    told = await place.ask(lambda: place.server.submit_transaction(outer))
    assert (told["source_account"], told["fee_account"]) == (ALICE.public_key, BOB.public_key)
    assert told["inner_transaction"]["hash"] == inner.hash_hex()
    assert told["fee_bump_transaction"]["hash"] == outer.hash_hex() == told["hash"]
    by_inner = await place.get(f"/transactions/{inner.hash_hex()}")
    assert by_inner.json()["hash"] == outer.hash_hex()


async def test_refusals_and_failures_tell_their_codes(place: Place) -> None:
    with pytest.raises(BadRequestError) as failed:
        await place.send(ALICE, Payment(BOB.public_key, Asset.native(), "99999"))
    assert failed.value.extras is not None
    assert failed.value.extras["result_codes"] == {"transaction": "tx_failed", "operations": ["op_underfunded"]}
    assert failed.value.type == "https://stellar.org/horizon-errors/transaction_failed"
    envelope = await place.ask(lambda: place.built(ALICE, ManageData("note", b"1")))
    envelope.signatures.clear()
    with pytest.raises(BadRequestError) as refused:
        await place.ask(lambda: place.server.submit_transaction(envelope))
    assert refused.value.extras is not None
    assert refused.value.extras["result_codes"] == {"transaction": "tx_bad_auth"}
    async with httpx.AsyncClient(base_url=place.url) as client:
        malformed = await client.post("/transactions", data={"tx": "AAAA"})
    assert malformed.json()["type"] == "https://stellar.org/horizon-errors/transaction_malformed"


async def test_a_submission_that_finds_no_ledger_in_time_is_a_504_and_may_come_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horizon, "SUBMIT_SECONDS", 0.05)
    place.town.sandbox.ledger.paused = True
    envelope = await place.ask(lambda: place.built(ALICE, ManageData("note", b"1")))
    with pytest.raises(BadResponseError) as late:
        await place.ask(lambda: place.server.submit_transaction(envelope))
    assert late.value.status == 504
    assert late.value.extras is not None
    assert late.value.extras["hash"] == envelope.hash_hex()
    place.town.sandbox.ledger.close()
    assert (await place.get(f"/transactions/{envelope.hash_hex()}")).json()["successful"]


async def test_an_asynchronous_submission_tells_all_four_states(place: Place) -> None:
    place.town.sandbox.ledger.paused = True
    submit = place.server.submit_transaction_async
    envelope = await place.ask(lambda: place.built(ALICE, ManageData("note", b"1")))
    told = await place.ask(lambda: submit(envelope))
    assert told == {"tx_status": "PENDING", "hash": envelope.hash_hex()}
    with pytest.raises(BadRequestError) as duplicate:
        await place.ask(lambda: submit(envelope))
    assert duplicate.value.status == 409
    other = await place.ask(lambda: place.built(ALICE, ManageData("note", b"2")))
    with pytest.raises(BadResponseError) as later:
        await place.ask(lambda: submit(other))
    assert later.value.status == 503
    place.town.sandbox.ledger.close()
    with pytest.raises(BadRequestError) as error:
        await place.ask(lambda: submit(other))
    assert error.value.status == 400
    assert '"error_result_xdr"' in (error.value.message or "")


async def test_lists_go_on_from_where_they_were_in_both_directions(place: Place) -> None:
    sent = [await place.send(ALICE, ManageData("note", bytes([number]))) for number in range(5)]
    hashes = [told["hash"] for told in sent]

    def pages(call: Any) -> Iterator[list[str]]:
        page = call.call()
        while page["_embedded"]["records"]:
            yield [record["hash"] for record in page["_embedded"]["records"]]
            page = call.next()

    def of(builder: Any) -> Any:
        return builder.for_account(ALICE.public_key)

    first, *rest = await place.ask(lambda: list(pages(of(place.server.transactions()).limit(2))))
    found = [first[1], *(tx_hash for page in rest for tx_hash in page)]
    assert found == hashes, "the first is the one that made the account"
    backwards = await place.ask(lambda: list(pages(of(place.server.transactions()).limit(4).order(True))))
    assert [tx_hash for page in backwards for tx_hash in page] == [*hashes[::-1], first[0]]


async def test_operations_payments_and_effects_of_an_account(place: Place) -> None:
    await place.send(ALICE, ManageData("note", b"1"), Payment(BOB.public_key, Asset.native(), "2"))
    server = place.server
    operations = await place.ask(lambda: server.operations().for_account(BOB.public_key).call())
    told = [(record["type"], record.get("amount")) for record in operations["_embedded"]["records"]]
    assert told == [("create_account", None), ("payment", "2.0000000")]
    payments = await place.ask(lambda: server.payments().for_account(ALICE.public_key).call())
    assert [record["type"] for record in payments["_embedded"]["records"]] == ["create_account", "payment"]
    effects = await place.ask(lambda: server.effects().for_account(ALICE.public_key).call())
    kinds = [record["type"] for record in effects["_embedded"]["records"]]
    assert kinds == ["account_created", "signer_created", "data_created", "account_debited"]
    tx_hash = payments["_embedded"]["records"][1]["transaction_hash"]
    of_transaction = await place.ask(lambda: server.operations().for_transaction(tx_hash).call())
    assert [record["type"] for record in of_transaction["_embedded"]["records"]] == ["manage_data", "payment"]
    number = of_transaction["_embedded"]["records"][0]["id"]
    assert (await place.ask(lambda: server.operations().operation(number).call()))["name"] == "note"
    ledger = (await place.get(f"/transactions/{tx_hash}")).json()["ledger"]
    in_ledger = await place.ask(lambda: server.transactions().for_ledger(ledger).call())
    assert [record["hash"] for record in in_ledger["_embedded"]["records"]] == [tx_hash]


async def test_contract_calls_are_listed_with_what_they_call(place: Place) -> None:
    owner = Cast().owner.public_key
    page = await place.ask(lambda: place.server.operations().for_account(owner).call())
    init, settle = page["_embedded"]["records"]
    assert {init["type"], settle["type"]} == {"invoke_host_function"}
    assert init["function"] == "HostFunctionTypeHostFunctionTypeInvokeContract"
    contract, name, first, *_ = (xdr.SCVal.from_xdr(each["value"]) for each in init["parameters"])
    assert scval.from_address(contract).address == place.town.sandbox.places.vault_contract
    assert scval.from_symbol(name) == "init"
    assert scval.from_address(first).address == owner
    paid = await place.ask(lambda: place.server.transactions().transaction(init["transaction_hash"]).call())
    assert paid["source_account"] != owner, "somebody else's transaction, with an operation of the owner's"


async def test_failed_transactions_are_listed_only_when_asked_for(place: Place) -> None:
    with pytest.raises(BadRequestError):
        await place.send(ALICE, Payment(BOB.public_key, Asset.native(), "99999"))
    server, address = place.server, ALICE.public_key
    without = await place.ask(lambda: server.transactions().for_account(address).call())
    with_failed = await place.ask(lambda: server.transactions().for_account(address).include_failed(True).call())
    assert [len(page["_embedded"]["records"]) for page in (without, with_failed)] == [1, 2]


async def test_a_cursor_before_what_is_kept_is_gone() -> None:
    town = make_town(rules=NetworkRules(retention=3))
    for _ in range(10):
        town.sandbox.ledger.close()
    async with served(town) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/transactions", params={"cursor": str(5 << 32)})
        assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (410, "before_history")


async def test_a_stream_tells_what_happens_as_it_happens(place: Place) -> None:
    def first_two() -> list[str]:
        events = place.server.payments().for_account(BOB.public_key).cursor("now").stream()
        return [next(events)["amount"] for _ in range(2)]

    amounts: list[str] = []

    async def watch() -> None:
        amounts.extend(await place.ask(first_two))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        with trio.fail_after(60):
            while len(amounts) < 2:
                # Whatever came before the stream was open is not on it.
                await place.send(ALICE, Payment(BOB.public_key, Asset.native(), "3"))
    assert amounts == ["3.0000000"] * 2


async def test_friendbot_makes_an_account_once(place: Place) -> None:
    new = Keypair.random()
    told = await place.get("/friendbot", addr=new.public_key)
    assert told.json()["successful"]
    account = await place.ask(lambda: place.server.load_account(new.public_key))
    assert account.raw_data is not None
    assert account.raw_data["balances"][0]["balance"] == "10000.0000000"
    again = await place.get("/friendbot", addr=new.public_key)
    assert (again.status_code, again.json()["detail"]) == (400, "account already funded to starting balance")
    assert (await place.get("/friendbot", addr="nobody")).status_code == 400


async def test_many_ask_friendbot_at_once_and_each_is_served(place: Place) -> None:
    asked = [Keypair.random().public_key for _ in range(5)]
    answers: list[int] = []

    async def ask(address: str) -> None:
        answers.append((await place.get("/friendbot", addr=address)).status_code)

    async with trio.open_nursery() as nursery:
        for address in asked:
            nursery.start_soon(ask, address)
    assert answers == [200] * 5


async def test_the_faucet_gives_usdc_to_whoever_trusts_it(place: Place) -> None:
    asked = {"addr": ALICE.public_key, "amount": "25"}
    refused = await place.get("/faucet", **asked)
    assert (refused.status_code, "no trust line" in refused.json()["detail"]) == (400, True)
    await place.send(ALICE, ChangeTrust(place.town.usdc))
    assert (await place.get("/faucet", **asked)).json()["successful"]
    account = await place.ask(lambda: place.server.load_account(ALICE.public_key))
    assert account.raw_data is not None
    assert account.raw_data["balances"][0]["balance"] == "25.0000000"
    for wrong in ({"amount": "0"}, {"amount": "10001"}, {"amount": "1.5"}, {"addr": "G"}, {"addr": NULL_ACCOUNT[:-1]}):
        assert (await place.get("/faucet", **{**asked, **wrong})).status_code == 400
    assert (await place.get("/faucet", addr=Keypair.random().public_key)).status_code == 400


async def test_multisig_of_the_sdk_is_taken(place: Place) -> None:
    joint = SetOptions(signer=Signer.ed25519_public_key(BOB.public_key, 1), med_threshold=2, high_threshold=2)
    await place.send(ALICE, joint)
    payment = Payment(BOB.public_key, Asset.native(), "1")
    with pytest.raises(BadRequestError) as refused:
        await place.send(ALICE, payment)
    assert refused.value.extras is not None
    assert refused.value.extras["result_codes"]["operations"] == ["op_bad_auth"]
    assert (await place.send(ALICE, payment, second=BOB))["successful"]


async def test_a_second_node_tells_an_older_truth(place: Place) -> None:
    place.town.sandbox.ledger.paused = True
    place.town.sandbox.nodes["b"].lag = 3
    latest = (await place.get("/")).json()["core_latest_ledger"]
    older = (await place.get("/nodes/b")).json()["core_latest_ledger"]
    assert latest - older == 3
    assert (await place.get("/nodes/c")).status_code == 404


async def test_faults_of_the_plan_happen_to_horizon_too(place: Place) -> None:
    place.town.sandbox.plan.add(Fault("status", "GET /accounts*", status=429, retry_after=7))
    answer = await place.get(f"/accounts/{ALICE.public_key}")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert (await place.get(f"/accounts/{ALICE.public_key}")).status_code == 200
