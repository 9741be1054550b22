"""Horizon, the second source: what it answers, and what its refusals mean."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import attrs
import pytest

from callora.ledger.chain import Applied, Head
from callora.ledger.faults import ChainOutcomeUnknown, ChainUnavailable
from callora.stellar.envelopes import seal
from callora.stellar.horizon import HorizonNode
from callora.stellar.transport import open_transport
from tests.stellar.test_rpc import ALICE, HASH, invoked, meta, payment, result
from tests.support.nodes import HORIZON_ROOT, PASSPHRASE, VAULT, as_html, as_json, error_event
from tests.support.upstream import Exchange, Handler, close_silently, raw_upstream, respond

NOT_FOUND: Final = as_json({"type": "not_found", "title": "Resource Missing", "status": 404, "extras": None}, 404)


@attrs.define
class HorizonScript:
    """What a Horizon answers, by path; the root is always there."""

    answers: dict[str, Handler] = attrs.field(factory=dict)
    asked: list[str] = attrs.field(factory=list)

    async def __call__(self, exchange: Exchange) -> None:
        path = exchange.request.target.partition("?")[0]
        self.asked.append(path)
        await self.answers.get(path, as_json(HORIZON_ROOT) if path in ("/", "") else NOT_FOUND)(exchange)


@pytest.fixture
def script() -> HorizonScript:
    """A Horizon that knows nothing."""
    return HorizonScript()


@pytest.fixture
async def horizon(script: HorizonScript) -> AsyncIterator[HorizonNode]:
    """Our side of it."""
    async with raw_upstream(script) as upstream, open_transport() as transport:
        yield HorizonNode(upstream.url, transport)


async def test_the_root_tells_network_and_ledger(horizon: HorizonNode) -> None:
    await horizon.healthy()
    assert await horizon.root() == (PASSPHRASE, Head(1000, datetime(2027, 1, 15, 8, tzinfo=UTC)))
    assert horizon.latest == 1000


async def test_an_account_has_its_sequence_and_an_unknown_one_none(horizon: HorizonNode, script: HorizonScript) -> None:
    assert await horizon.sequence_of(ALICE.public_key) is None
    script.answers[f"/accounts/{ALICE.public_key}"] = as_json(
        {"id": ALICE.public_key, "account_id": ALICE.public_key, "sequence": "41", "thresholds": {}, "signers": []}
    )
    assert await horizon.sequence_of(ALICE.public_key) == 41


async def test_a_transaction_is_told_as_rpc_tells_it(horizon: HorizonNode, script: HorizonScript) -> None:
    assert await horizon.transaction(HASH) is None
    document = {
        "hash": HASH,
        "ledger": 990,
        "created_at": "2027-01-15T07:59:10Z",
        "successful": False,
        "result_xdr": result("txFAILED", invoked("TRAPPED")),
        "result_meta_xdr": meta(None, (error_event(5, VAULT),)),
    }
    script.answers[f"/transactions/{HASH}"] = as_json(document)
    told = await horizon.transaction(HASH)
    assert isinstance(told, Applied)
    assert (told.successful, told.ledger, told.operation_code) == (False, 990, "trapped")
    assert told.closed_at == datetime(2027, 1, 15, 7, 59, 10, tzinfo=UTC)
    assert told.fault is not None
    assert (told.fault.contract_error, told.fault.contract_id) == (5, VAULT)
    script.answers[f"/transactions/{HASH}"] = as_json({**document, "result_meta_xdr": None})
    told = await horizon.transaction(HASH)
    assert told is not None
    assert told.fault is None


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (201, "PENDING", "pending"),
        (409, "DUPLICATE", "duplicate"),
        (503, "TRY_AGAIN_LATER", "try_again_later"),
        (400, "ERROR", "refused"),
    ],
)
async def test_a_submission_tells_what_the_core_said(
    horizon: HorizonNode, script: HorizonScript, status: int, said: str, expected: str
) -> None:
    document = {"tx_status": said, "hash": HASH}
    if said == "ERROR":
        document["error_result_xdr"] = result("txBAD_SEQ")
    script.answers["/transactions_async"] = as_json(document, status)
    told = await horizon.submit(seal(payment()))
    assert (told.status, told.latest.sequence) == (expected, 1000)
    assert told.result_code == ("tx_bad_seq" if said == "ERROR" else None)


@pytest.mark.parametrize(
    "answer",
    [
        close_silently(),
        as_html(502),
        as_json({"type": "timeout", "status": 504, "extras": {"hash": HASH}}, 504),
        as_json({"tx_status": "ODD"}, 201),
        as_html(201),
        as_json([], 201),
    ],
)
async def test_a_submission_without_a_usable_answer_is_unknown(
    horizon: HorizonNode, script: HorizonScript, answer: Handler
) -> None:
    script.answers["/transactions_async"] = answer
    with pytest.raises(ChainOutcomeUnknown):
        await horizon.submit(seal(payment()))
    assert script.asked.count("/transactions_async") == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (as_json({"type": "bad", "status": 400, "extras": {"reason": "malformed"}}, 400), "refused"),
        (as_json({"type": "bad", "status": 400, "extras": None}, 400), "refused"),
        (as_html(400), "status"),
        (as_html(429), "rate_limited"),
        (NOT_FOUND, "refused"),
    ],
)
async def test_a_submission_that_was_not_taken_up_was_not_sent(
    horizon: HorizonNode, script: HorizonScript, answer: Handler, kind: str
) -> None:
    script.answers["/transactions_async"] = answer
    with pytest.raises(ChainUnavailable) as caught:
        await horizon.submit(seal(payment()))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "answer",
    [
        as_html(),
        as_json([]),
        as_json({"history_latest_ledger": None}),
        as_json({**HORIZON_ROOT, "history_latest_ledger_closed_at": "yesterday"}),
        as_json({"type": "x", "extras": None}, 400),
        as_json([], 400),
        as_html(503),
        respond(200, body=b"[" * 100_000),
    ],
)
async def test_a_wrong_answer_is_one_fault(horizon: HorizonNode, script: HorizonScript, answer: Handler) -> None:
    script.answers["/"] = answer
    with pytest.raises(ChainUnavailable):
        await horizon.root()
