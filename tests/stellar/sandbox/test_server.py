"""The sandbox on its port: what goes wrong by plan, its controls, and what any client may send."""

import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import pytest
import trio
from stellar_sdk import ManageData

from callora.stellar.sandbox.faults import Fault, FaultInvalid, FaultPlan, control, fault_of
from tests.support.sandbox import Person, Town, make_town, served


@attrs.frozen
class Place:
    """A sandbox on a socket, and a client of it."""

    town: Town
    url: str
    client: httpx.AsyncClient

    async def rpc(self, method: str, node: str = "", **params: Any) -> httpx.Response:
        """Return the answer to an RPC method."""
        document = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return await self.client.post(f"{node}/rpc", json=document)

    async def send(self, person: Person, value: bytes = b"1") -> tuple[str, httpx.Response]:
        """Return the hash of a transaction, and the answer to it."""
        envelope = person.transaction([ManageData("note", value)])
        return envelope.hash_hex(), await self.rpc("sendTransaction", transaction=envelope.to_xdr())


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    town = make_town()
    async with served(town) as url, httpx.AsyncClient(base_url=url) as client:
        yield Place(town, url, client)


async def test_a_fault_is_for_its_method_and_as_often_as_it_says(place: Place) -> None:
    place.town.sandbox.plan.add(Fault("status", "getHealth", times=2, status=502))
    statuses = [(await place.rpc(name)).status_code for name in ("getNetwork", "getHealth", "getHealth", "getHealth")]
    assert statuses == [200, 502, 502, 200]


async def test_a_fault_before_leaves_the_request_undone_and_one_after_does_it(place: Place) -> None:
    alice = place.town.someone("alice")
    ledger, plan = place.town.sandbox.ledger, place.town.sandbox.plan
    plan.add(Fault("status", "sendTransaction", status=504))
    assert (await place.send(alice))[1].status_code == 504
    assert list(ledger.waiting) == []
    plan.add(Fault("status", "sendTransaction", status=504, stage="after"))
    tx_hash, answer = await place.send(alice)
    assert answer.status_code == 504
    assert list(ledger.waiting) == [tx_hash], "the client knows nothing, and the network has it"


@pytest.mark.parametrize("stage", ["before", "after"])
async def test_a_dropped_connection_ends_without_a_byte(place: Place, stage: str) -> None:
    alice = place.town.someone("alice")
    place.town.sandbox.plan.add(fault_of({"kind": "drop", "method": "sendTransaction", "stage": stage}))
    with pytest.raises(httpx.RemoteProtocolError):
        await place.send(alice)
    assert len(place.town.sandbox.ledger.waiting) == (stage == "after")


async def test_a_proxys_page_comes_with_any_status(place: Place) -> None:
    for status in (200, 503):
        place.town.sandbox.plan.add(Fault("html", status=status, retry_after=3))
        answer = await place.rpc("getHealth")
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html")
        assert answer.headers["retry-after"] == "3"


async def test_a_delay_delays_and_then_answers(place: Place) -> None:
    place.town.sandbox.plan.add(Fault("delay", "getHealth", seconds=0.05))
    started = trio.current_time()
    assert (await place.rpc("getHealth")).status_code == 200
    assert trio.current_time() - started >= 0.05


async def test_submissions_are_put_off_or_lost_by_plan(place: Place) -> None:
    alice = place.town.someone("alice")
    place.town.sandbox.plan.add(Fault("try_again_later", "sendTransaction"), Fault("lose", "sendTransaction"))
    said = [(await place.send(alice))[1].json()["result"]["status"] for _ in range(4)]
    assert said == ["TRY_AGAIN_LATER", "PENDING", "PENDING", "DUPLICATE"]


async def test_a_fault_may_be_one_nodes_alone(place: Place) -> None:
    place.town.sandbox.plan.add(Fault("status", node="b", times=None))
    assert (await place.rpc("getHealth")).status_code == 200
    assert (await place.rpc("getHealth", "/nodes/a")).status_code == 200
    assert (await place.rpc("getHealth", "/nodes/b")).status_code == 503


def test_faults_can_wait_and_can_be_left_to_chance() -> None:
    plan = FaultPlan()
    plan.add(Fault("drop", "getHealth", skip=2))
    assert [plan.take("a", "getHealth") is None for _ in range(4)] == [True, True, False, True]
    plan.add(Fault("drop", chance=0.5, times=None))
    taken = [plan.take("a", "getHealth") is not None for _ in range(200)]
    assert 60 < sum(taken) < 140
    again = FaultPlan()
    again.add(Fault("drop", chance=0.5, times=None))
    assert [again.take("a", "getHealth") is not None for _ in range(200)] == taken, "the same chances in every run"


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"kind": "explode"},
        {"kind": "drop", "color": "red"},
        {"kind": "drop", "times": "often"},
        {"kind": "drop", "chance": 2},
        {"kind": "drop", "stage": "never"},
        {"kind": "status", "status": 42},
        {"kind": "lose", "method": "getHealth"},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(FaultInvalid):
        fault_of(told)


@pytest.mark.parametrize(
    "told",
    [
        {"pause": True},
        {"paused": 1},
        {"skew_seconds": "5"},
        {"surge_fee": -1},
        {"nodes": {"z": {}}},
        {"nodes": {"a": {"speed": 1}}},
        {"nodes": {"a": {"lag": -1}}},
        {"nodes": {"a": {"lag": None}}},
        {"nodes": []},
    ],
)
def test_a_control_that_makes_no_sense_changes_nothing(told: dict[str, Any]) -> None:
    sandbox = make_town().sandbox
    with pytest.raises(FaultInvalid):
        control(sandbox.ledger, sandbox.nodes, {"skew_seconds": 9, **told})
    assert sandbox.ledger.skew_seconds == 0


async def test_everything_can_be_scripted_over_the_port(place: Place) -> None:
    client, ledger = place.client, place.town.sandbox.ledger
    first = (await client.get("/sandbox")).json()
    assert "stand-in" in first["note"]
    assert (await client.post("/sandbox/close", json={"ledgers": 3})).json()["ledger"] == first["ledger"] + 3
    wanted = {"paused": True, "skew_seconds": 60, "surge_fee": 500, "nodes": {"b": {"lag": 2, "retention": 1}}}
    told = (await client.post("/sandbox/control", json=wanted)).json()
    assert (told["paused"], told["skew_seconds"], told["surge_fee"]) == (True, 60, 500)
    assert told["nodes"]["b"] == {"lag": 2, "retention": 1, "try_again": 0, "lose": 0}
    faults = {"faults": [{"kind": "drop", "times": 5}, {"kind": "html", "method": "getHealth"}]}
    assert len((await client.post("/sandbox/faults", json=faults)).json()["faults"]) == 2
    assert (await client.request("DELETE", "/sandbox/faults")).json()["faults"] == []
    await client.post("/sandbox/control", json={"surge_fee": None})
    await place.send(place.town.someone("alice"))
    assert len((await client.get("/sandbox")).json()["waiting"]) == 1
    assert (await client.post("/sandbox/lose")).json()["waiting"] == []
    await client.post("/sandbox/trim", json={"ledgers": 2})
    assert ledger.oldest.sequence == ledger.header.sequence - 1
    assert (await client.post("/sandbox/reset")).json()["ledger"] == first["ledger"]
    for path, body in (("/close", {"ledgers": 0}), ("/faults", {"kind": "?"}), ("/control", [1]), ("/nothing", {})):
        answer = await client.post(f"/sandbox{path}", json=body)
        assert answer.status_code in (400, 404)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /rpc HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12",
    ],
)
async def test_what_is_no_request_ends_the_connection_and_nothing_else(place: Place, sent: bytes) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", int(place.url.rsplit(":", 1)[1]))
    async with stream:
        try:
            await stream.send_all(sent)
            await stream.send_eof()
            with trio.fail_after(60):
                assert await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            pass  # reset: we were still sending
    assert (await place.rpc("getHealth")).status_code == 200


async def test_documents_that_are_no_rpc_are_answered_as_such(place: Place) -> None:
    for body in (b"", b"{", b"[]", b"5", b'{"jsonrpc":"2.0","id":1,"method":5}'):
        answer = await place.client.post("/rpc", content=body)
        assert answer.status_code == 200
        assert "error" in answer.json()
    note = json.dumps({"jsonrpc": "2.0", "method": "getHealth"}).encode()
    assert (await place.client.post("/rpc", content=note)).status_code == 204


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(place: Place) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "getHealth"}).encode()
    answer = await place.client.post("/rpc", content=body, headers={"Expect": "100-continue"})
    assert answer.json()["result"]["status"] == "healthy"
