"""The call: admit, hold, proxy, capture, answer. One flow, whatever becomes of it.

Money's order (design rules 3 to 5): the hold is durable before the upstream sees a byte, the capture before the head of
the answer is released; every way out of here that has not captured releases, and what cannot be known is looked up.
"""

import hashlib
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Final, Literal

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.breaker import Ticket
from callora.actors.budgets import Budgets
from callora.actors.compensation import Compensator, Undelivered
from callora.actors.mailbox import Envelope
from callora.actors.registry import VaultRegistry
from callora.http.gateway.admission import Admission, Caller, Offer, Refused, Upstream
from callora.http.gateway.bodies import BadBody
from callora.http.gateway.client import ClientConnection, ClientGone, ClientTooSlow, RequestBody
from callora.http.gateway.exchange import AnswerCut, Exchange, UpstreamFailed, UpstreamTimedOut
from callora.http.gateway.heads import RequestHead
from callora.http.gateway.metering import (
    MAX_CHARGE,
    QUANTITY_BODY_BYTES_MAX,
    answer_units,
    check_cap,
    is_event_stream,
    max_charge,
    rate,
    request_units,
)
from callora.http.gateway.rated import Rated
from callora.http.gateway.rewriting import answer_head, upstream_head
from callora.http.gateway.tolls import Toll
from callora.http.gateway.upstream import ConnectFailed, PoolExhausted, Upstreams
from callora.http.problems import PROBLEMS, problem_body
from callora.ledger.clock import Clock
from callora.ledger.commands import (
    Charged,
    CloseHold,
    Delivery,
    ExtendHold,
    IdempotencyClaim,
    PlaceHold,
    StoredAnswer,
    capture,
    release,
)
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable
from callora.ledger.ids import EventId, Ids, TokenId, VaultId
from callora.ledger.keys import KeyRecord
from callora.ledger.limits import Standing
from callora.ledger.money import ZERO, Stroops, format_usdc
from callora.ledger.outcomes import (
    Draining,
    HoldClosed,
    HoldExtended,
    HoldNotOpen,
    HoldPlaced,
    IdempotencyKeyTaken,
    InsufficientFunds,
    Overloaded,
    PolicyRefused,
    StandingRefused,
    VaultMissing,
)
from callora.ledger.rating import QuantityUnreadable, units_of
from callora.ledger.tokens import BudgetExhausted, BudgetGone, BudgetTaken
from callora.metrics import Metrics, Tally
from callora.outbound.addresses import TargetBlocked, TargetUnresolved
from callora.store.reads.claims import Claim, Claims

ROUTE: Final = "/v1/call/{api}"
_PROBLEM_LINES: Final = b"Content-Type: application/json\r\n"
_STORE_RETRY_SECONDS: Final = 1
NAMED_SECONDS_MAX: Final = 30.0
"""How old a call's id may be when its body is there; a hold is then placed well within the slack that ids have."""
_REQUEST_ID_CHARS_MAX: Final = 128
_CLIENT_CLOSED: Final = 499
"""Counted, never sent: the client left before its answer."""

OUTCOMES: Final = (
    "delivered",
    "shortfall",
    "quantity_unreadable",
    "stream_ended",
    "stream_cut",
    "upstream_status",
    "client_gone",
    "timeout",
    "upstream_failed",
    "connect_failed",
    "upstream_busy",
    "target_blocked",
    "bad_request_body",
    "hold_interrupted",
    "hold_expired",
    "capture_unknown",
    "cut_at_deadline",
    "internal_error",
)
"""What can become of a call that was held: recorded on its usage event and counted."""

HoldState = Literal["none", "asked", "open", "capturing", "closed"]


@attrs.frozen
class CallSettings:
    """The numbers of the call flow."""

    body_bytes_max: int
    keyed_body_bytes_max: int
    """The largest request body of an idempotent call, which is read whole before anything is held."""
    stored_answer_bytes_max: int
    connect_seconds: float
    answer_seconds: float
    idle_seconds: float
    """How long an upstream may be silent inside its answer's body."""
    hold_ttl_seconds: int
    claim_retention_seconds: int
    profile_upstreams: bool


@attrs.define(slots=True, eq=False)
class Call:
    """One call in hand."""

    client: ClientConnection
    request: RequestHead
    request_id: str
    event_id: EventId
    body: RequestBody
    started: float
    """`time.perf_counter`, for Server-Timing."""
    caller: Caller | None = None
    standing: Standing | None = None
    """Where its rate limits stood when a store of them decided; None where this process did."""
    offer: Offer | None = None
    ticket: Ticket | None = None
    state: HoldState = "none"
    held: Stroops = ZERO
    rated: Rated | None = None
    """What its price is made of where it is priced by units; None where the price is a call's, in money alone."""
    budgeted: Stroops = ZERO
    """What is taken from its access token's budget."""
    outcome: str = "internal_error"
    """The word that its usage event gets should it end now."""
    status: int | None = None
    """The upstream's status, once known."""
    balance: Stroops | None = None
    charge: Stroops = ZERO
    upstream_started: float = 0.0
    upstream_seconds: float = 0.0
    final_answer: StoredAnswer | None = None
    """Our own answer to an idempotent call, to be stored when its hold is released."""
    released: bool = False
    """True once a byte of the answer's head has gone out."""


class CallFlow:
    """Serves gateway requests."""

    def __init__(
        self,
        *,
        admission: Admission,
        registry: VaultRegistry,
        upstreams: Upstreams,
        claims: Claims,
        compensator: Compensator,
        budgets: Budgets,
        settings: CallSettings,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._admission = admission
        self._registry = registry
        self._upstreams = upstreams
        self._claims = claims
        self._compensator = compensator
        self._budgets = budgets
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._log = log
        self._outcomes = {outcome: metrics.tally(metrics.calls, outcome) for outcome in OUTCOMES}
        self._counted: dict[tuple[str, int], Tally] = {}
        self.running = 0

    async def serve(self, client: ClientConnection, request: RequestHead) -> bool:
        """Serve one call; return whether the connection may carry another request.

        Cancellation: the hold is released without waiting; a capture already sent stands.
        """
        event_id = EventId(self._ids.uuid7())
        request_id = clean_request_id(request.first(b"x-request-id")) or event_id
        self.running += 1
        started = time.perf_counter()
        call: Call | None = None
        try:
            try:
                body = RequestBody(client, request, self._settings.body_bytes_max)
                call = Call(client, request, request_id, event_id, body, started)
                reusable = await self.admit(call)
                return reusable if body.done else await body.leave(reusable=reusable)
            except Refused as error:
                # With its traceback, or its cause's, it would hold this frame, which holds it: garbage that only a
                # collector finds, and whoever is refused may ask a thousand times a second.
                refused = error.with_traceback(None)
                refused.__cause__ = refused.__context__ = None
            except BadBody as error:
                refused = Refused(error.code, str(error), close=True)
            except StoreUnavailable:
                refused = Refused("SERVICE_UNAVAILABLE", retry_seconds=_STORE_RETRY_SECONDS)
            except OutcomeUnknown:
                refused = Refused("OUTCOME_UNKNOWN")
            except ClientTooSlow:
                refused = Refused("REQUEST_TIMEOUT", close=True)
            except (ClientGone, AnswerCut):
                self._count(request, call.status if call is not None and call.status is not None else _CLIENT_CLOSED)
                return False
            except Exception:
                self._log.exception("call_crashed", request_id=request_id)
                refused = Refused("INTERNAL_SERVER_ERROR", close=True)
            return await self._refuse(client, request, request_id, call, refused)
        finally:
            self.running -= 1

    # Before the hold.

    async def admit(self, call: Call) -> bool:
        request, client, admission = call.request, call.client, self._admission
        now = trio.current_time()
        key, in_authorization = await admission.identify(request, now)
        offer = call.offer = await admission.resolve(request, now, self._clock.now())
        admission.authorize(key, offer, request, client.peer)
        pace = admission.enter(key)
        caller = Caller(key, pace, in_authorization)
        try:
            if admission.shared_limiter is None:
                call.caller = caller
                admission.take_pace(key, pace, now)
            else:
                await self._take_shared_pace(call, caller)
                now = trio.current_time()
            idempotency_key = admission.idempotency_key(request)
            whole_body, claim = b"", None
            if idempotency_key is not None:
                whole_body = await self._read_whole(call)
                fingerprint = _fingerprint(key, request, whole_body)
                stored = await self._claims.find(key.vault_id, idempotency_key)
                replaces = None
                if stored is not None and stored.expires_at > self._clock.now():
                    if stored.state != "started" or stored.event_open or stored.fingerprint != fingerprint:
                        return await self._repeat(call, key.vault_id, idempotency_key, stored, fingerprint)
                    replaces = stored.event_id
                claim = IdempotencyClaim(idempotency_key, fingerprint, replaces, self._settings.claim_retention_seconds)
                now = self._name_anew(call)  # the body may have taken its time
            call.held = offer.price.amount
            if offer.price.card is not None or MAX_CHARGE in request.index:
                whole_body = await self._rate(call, offer, whole_body)
                now = self._name_anew(call)
            ticket = call.ticket = admission.admit_upstream(offer.api.api_id, now)
            try:
                upstream = await admission.upstream(offer.api, now)
                if key.budget is not None and call.held:
                    async with self._budgeted(call, key.budget):
                        return await self.hold(call, caller, offer, upstream, whole_body, claim)
                return await self.hold(call, caller, offer, upstream, whole_body, claim)
            finally:
                ticket.end(None, now)
        finally:
            admission.leave(pace)

    def _name_anew(self, call: Call) -> float:
        """Give a call whose body took long a new id; return the time.

        Whoever looks for events by the time in their ids, as lists and feeds do, counts on ids that are young.
        """
        if time.perf_counter() - call.started > NAMED_SECONDS_MAX:
            call.event_id = EventId(self._ids.uuid7())
        return trio.current_time()

    async def _rate(self, call: Call, offer: Offer, whole_body: bytes) -> bytes:
        """Tell what is to be held for the call; return its body as far as it had to be read for that."""
        cap, card = max_charge(call.request), offer.price.card
        if card is None:
            check_cap(cap, offer.price.amount)
            return whole_body
        units, whole_body = await request_units(card, call.request, call.body, whole_body, QUANTITY_BODY_BYTES_MAX)
        call.rated = rate(offer, card, cap, units)
        call.held = call.rated.held
        return whole_body

    async def _take_shared_pace(self, call: Call, caller: Caller) -> None:
        """Take the call from limits that processes share. Who is calling is noted once it is known how they stand."""
        admission = self._admission
        standing = await admission.take_shared_pace(caller.key, caller.pace, call.event_id)
        call.caller, call.standing = caller, standing
        if standing is None:
            admission.take_pace(caller.key, caller.pace, trio.current_time())
        else:
            admission.check_standing(standing)

    async def _read_whole(self, call: Call) -> bytes:
        """Read an idempotent request's body, which is part of what makes it this request."""
        limit = self._settings.keyed_body_bytes_max
        body = await call.body.read(limit)
        if body is None:
            raise Refused(
                "REQUEST_BODY_TOO_LARGE",
                f"A request with an Idempotency-Key may carry at most {limit} bytes; send it without one, or send less",
                close=True,
            )
        return body

    async def _repeat(self, call: Call, vault_id: VaultId, key: str, stored: Claim, fingerprint: bytes) -> bool:
        """Answer a duplicate of an idempotent call: free, and never from the upstream."""
        if stored.fingerprint != fingerprint:
            raise Refused("IDEMPOTENCY_KEY_REUSE_MISMATCH")
        if stored.state == "started":
            raise Refused("IDEMPOTENCY_IN_PROGRESS", retry_seconds=1)
        if stored.state == "not_replayable":
            assert stored.charge is not None
            details = {"eventId": stored.event_id, "charge": format_usdc(stored.charge)}
            raise Refused("IDEMPOTENCY_NOT_REPLAYABLE", details=details)
        answer = stored.answer or await self._claims.answer(vault_id, key, stored.event_id)
        if answer is None:  # it has just become too old, and the next attempt is a first one
            raise Refused("IDEMPOTENCY_IN_PROGRESS", retry_seconds=1)
        close = self._closes(call)
        bodiless = call.request.method == "HEAD" or answer.status in (204, 304)
        head = answer_head(
            answer.status,
            b"",
            answer.head + b"Idempotent-Replayed: true\r\n",
            length=None if bodiless else len(answer.body),
            chunked=False,
            own=self._own_lines(call),
            close=close,
        )
        self._count(call.request, answer.status)
        message = head if bodiless else head + answer.body
        await (call.client.send(message) if close else call.client.send_last(message))
        return not close

    # The hold.

    @asynccontextmanager
    async def _budgeted(self, call: Call, token_id: TokenId) -> AsyncIterator[None]:
        """Take what is to be held from an access token's budget for the block; what was not charged is given back.

        A capture whose outcome is unknown keeps it: a budget may be lost, never exceeded.
        """
        match await self._budgets.take(token_id, call.held):
            case BudgetExhausted(budget, left):
                details = {
                    "required": format_usdc(call.held),
                    "remaining": format_usdc(left),
                    "budget": format_usdc(budget),
                }
                raise Refused("TOKEN_BUDGET_EXHAUSTED", details=details)
            case BudgetGone():
                raise Refused("INVALID_TOKEN", "The access token is not known")
        call.budgeted = call.held
        try:
            yield
        finally:
            if call.state != "capturing" and call.charge < call.budgeted:
                self._budgets.give_back(token_id, Stroops(call.budgeted - call.charge))

    async def hold(
        self,
        call: Call,
        caller: Caller,
        offer: Offer,
        upstream: Upstream,
        whole_body: bytes,
        claim: IdempotencyClaim | None,
    ) -> bool:
        """Hold the price, then proxy; whatever happens, the hold is closed or on its way to be."""
        rated = call.rated
        charged = Charged(
            caller.key.api_key_id,
            offer.api.developer_id,
            offer.api.api_id,
            offer.endpoint.endpoint_id,
            offer.price.version,
        )
        if rated is None:
            place = PlaceHold(call.event_id, call.held, self._settings.hold_ttl_seconds, charged, claim)
        else:
            place = PlaceHold(
                call.event_id,
                call.held,
                self._settings.hold_ttl_seconds,
                charged,
                claim,
                units=rated.units,
                unit_credits=rated.card.unit_credits,
            )
        try:
            call.outcome = "hold_interrupted"
            call.state = "asked"
            outcome = await self._registry.ask(caller.key.vault_id, place)
            if not isinstance(outcome, HoldPlaced):
                call.state = "none"
                raise await self._hold_refused(caller, outcome, claim)
            call.state = "open"
            call.balance = outcome.available
            if rated is not None:
                rated.credits = outcome.credits
                call.held = rated.held
            call.outcome = "cut_at_deadline"
            return await self.proxy(call, offer, upstream, whole_body, claim)
        finally:
            if call.state in ("asked", "open"):
                self._release(call, call.final_answer)
            if call.state != "none":
                self._outcomes[call.outcome].value += 1

    async def _hold_refused(self, caller: Caller, outcome: object, claim: IdempotencyClaim | None) -> Refused:
        match outcome:
            case InsufficientFunds(required, available):
                return Refused(
                    "INSUFFICIENT_BALANCE",
                    details={"required": format_usdc(required), "available": format_usdc(available)},
                )
            case StandingRefused("suspended"):
                return Refused("VAULT_SUSPENDED")
            case StandingRefused(standing, owed):
                details = {"standing": standing, "owed": format_usdc(owed)}
                return Refused("INSUFFICIENT_BALANCE", "The vault is in arrears", details=details)
            case PolicyRefused(code, details, message):
                return Refused(code, message, details=details)
            case IdempotencyKeyTaken():
                assert claim is not None
                stored = await self._claims.find(caller.key.vault_id, claim.key)
                if stored is not None and stored.fingerprint != claim.fingerprint:
                    return Refused("IDEMPOTENCY_KEY_REUSE_MISMATCH")
                return Refused("IDEMPOTENCY_IN_PROGRESS", retry_seconds=1)
            case Overloaded() | Draining():
                return Refused("SERVICE_UNAVAILABLE", retry_seconds=_STORE_RETRY_SECONDS)
            case VaultMissing():
                raise AssertionError("an API key without a vault")
            case _:
                raise AssertionError(f"not an outcome of a hold: {outcome!r}")

    def _release(self, call: Call, answer: StoredAnswer | None) -> Envelope:
        """Send the hold's release without waiting: nobody waits for what costs nothing."""
        assert call.caller is not None
        delivery = Delivery(call.outcome, call.status, self._latency_us(call), call.body.received_bytes, None)
        held_credits = 0 if call.rated is None else call.rated.credits
        envelope = Envelope(release(call.event_id, call.held, delivery, answer, held_credits))
        self._registry.send(call.caller.key.vault_id, envelope)
        call.state = "closed"
        if call.balance is not None:
            call.balance = Stroops(call.balance + call.held)
        return envelope

    # The upstream.

    async def proxy(
        self, call: Call, offer: Offer, upstream: Upstream, whole_body: bytes, claim: IdempotencyClaim | None
    ) -> bool:
        """Pass the request on and its answer back; a call that is held is settled in between."""
        settings = self._settings
        exchange = Exchange(call.client, call.request, call.body, settings.idle_seconds)
        configured = offer.api.upstream_headers
        if call.rated is not None and call.rated.reads_answer:
            kept = {name: value for name, value in configured.items() if name.lower() != "accept-encoding"}
            configured = {**kept, "Accept-Encoding": "identity"}
        head = upstream_head(
            call.request,
            path=upstream.base_path + offer.path or b"/",
            authority=upstream.authority,
            request_id=call.request_id.encode("ascii"),
            configured=configured,
            key_in_authorization=call.caller is not None and call.caller.key_in_authorization,
        )
        pool = self._upstreams.pool(upstream.target)
        call.upstream_started = time.perf_counter()
        try:
            await exchange.send(pool, head, whole_body, settings.connect_seconds, settings.answer_seconds)

            if exchange.streams_request:
                return await self._answer_while_sending(call, exchange, claim)
            return await self._answer(call, exchange, claim)
        except (ConnectFailed, TargetUnresolved) as error:
            call.outcome = "connect_failed"
            raise self._upstream_refusal(call, "BAD_GATEWAY", error, None) from error
        except TargetBlocked as error:
            call.outcome = "target_blocked"
            raise Refused("UPSTREAM_TARGET_BLOCKED") from error
        except PoolExhausted as error:
            call.outcome = "upstream_busy"
            raise Refused("UPSTREAM_UNAVAILABLE", "The API is busy", retry_seconds=1) from error
        except UpstreamTimedOut as error:
            call.outcome = "timeout"
            raise self._upstream_refusal(call, "GATEWAY_TIMEOUT", error, claim) from error
        except UpstreamFailed as error:
            call.outcome = "upstream_failed"
            raise self._upstream_refusal(call, "BAD_GATEWAY", error, claim) from error
        except BadBody:
            call.outcome = "bad_request_body"
            raise
        except ClientGone:
            if call.state == "open":
                call.outcome = "client_gone"
                self._metrics.premature_aborts.inc()
            raise
        finally:
            exchange.drop()

    def _upstream_refusal(self, call: Call, code: str, error: Exception, claim: IdempotencyClaim | None) -> Refused:
        """Return the refusal of a call whose upstream failed.

        Args:
            claim: of an idempotent call that the upstream may have seen: the refusal is stored with the release, as a
                retry must not be sent again.
        """
        assert call.offer is not None
        if call.ticket is not None:
            call.ticket.end(False, trio.current_time())
        self._profile(call, "timeout" if code == "GATEWAY_TIMEOUT" else "error", 0)
        self._log.info("upstream_failed", request_id=call.request_id, api=call.offer.api.slug, error=repr(error))
        if claim is not None:
            document = problem_body(code, None, call.request_id)
            call.final_answer = StoredAnswer(claim.key, PROBLEMS[code].status, _PROBLEM_LINES, document, ZERO)
        return Refused(code)

    async def _keep_hold(self, call: Call) -> None:
        """While a long request body is on its way, keep its hold from expiring."""
        while True:
            await trio.sleep(self._settings.hold_ttl_seconds / 2)
            if call.state == "open" and call.caller is not None:
                extension = ExtendHold(call.event_id, self._settings.hold_ttl_seconds)
                self._registry.send(call.caller.key.vault_id, Envelope(extension))

    async def _answer_while_sending(self, call: Call, exchange: Exchange, claim: IdempotencyClaim | None) -> bool:
        """Pass the request's body on beside its answer."""

        async def answer() -> bool:
            return await self._answer(call, exchange, claim)

        return await exchange.while_sending(answer, self._settings.answer_seconds, lambda: self._keep_hold(call))

    async def _answer(self, call: Call, exchange: Exchange, claim: IdempotencyClaim | None) -> bool:
        """Read the answer's head, settle the call, then release the answer."""
        await exchange.read_head(self._settings.answer_seconds)
        answer = exchange.answer
        call.status = answer.status
        call.upstream_seconds = time.perf_counter() - call.upstream_started
        if call.ticket is not None:
            call.ticket.end(answer.status < 500, trio.current_time() if answer.status >= 500 else 0.0)
        if self._settings.profile_upstreams:
            self._profile(call, "success", answer.status)
        lines = exchange.lines
        rated = call.rated
        if call.state == "open":
            if rated is not None and rated.flows and call.offer is not None:
                rated.streaming = answer.status in call.offer.endpoint.billable
                rated.trailed = exchange.chunks_answer
            if rated is None or not rated.streaming:
                await self._settle(call, exchange, claim, lines)
        close = self._closes(call) or exchange.ends_by_close
        head = answer_head(
            answer.status,
            answer.reason,
            lines,
            length=answer.content_length,
            chunked=exchange.chunks_answer,
            own=self._own_lines(call),
            close=close,
        )
        self._count(call.request, answer.status)
        call.released = True
        if rated is not None and rated.streaming:
            return await self._stream(call, rated, exchange, claim, head) and not close
        return await exchange.release(head, closing=close)

    async def _settle(self, call: Call, exchange: Exchange, claim: IdempotencyClaim | None, lines: bytes) -> None:
        """Capture or release, durably where anyone relies on it."""
        offer, answer = call.offer, exchange.answer
        assert offer is not None
        billable = answer.status in offer.endpoint.billable
        rated = call.rated
        delivered = "delivered"
        if rated is not None and billable:
            delivered = await self._rate_answer(call, rated, exchange)
        amount = ZERO if not billable else call.held if rated is None or rated.due is None else rated.due.amount
        stored: StoredAnswer | None = None
        response_bytes = answer.content_length
        if claim is not None:
            body = kept = None
            if not is_event_stream(answer.first(b"content-type")):
                body = await exchange.read_body(self._settings.stored_answer_bytes_max)
            if body is not None:
                response_bytes = len(body)
                kept = lines
                if not body and answer.content_length and answer.status != 204:
                    # To HEAD, and with 304: the length of a body that is not sent.
                    kept += b"Content-Length: %d\r\n" % answer.content_length
            stored = StoredAnswer(claim.key, answer.status, kept, body, amount)
        if not billable:
            call.outcome = "upstream_status"
            envelope = self._release(call, stored)
            if stored is not None:
                await envelope.reply.wait()
            return
        call.outcome = delivered
        await self._capture(call, amount, response_bytes, stored)

    async def _rate_answer(self, call: Call, rated: Rated, exchange: Exchange) -> str:
        """Tell what a billable answer costs; return what the call has come to.

        What it costs more than is held is held as well, if the vault, its limits and the caller allow it; else what is
        held is all that is charged.
        """
        delivered, units = "delivered", rated.units
        if rated.card.source is not None and rated.card.source.side == "response":
            try:
                units = await answer_units(rated.card, exchange)
            except QuantityUnreadable as error:
                assert call.offer is not None
                api = call.offer.api.slug
                self._log.info("quantity_unreadable", request_id=call.request_id, api=api, error=str(error))
                delivered, units = "quantity_unreadable", rated.card.min_units
        bounded = min(units, rated.card.units_max(rated.price))
        if bounded > rated.units:
            await self._hold_more(call, rated, bounded, "units")
        if units > rated.units:
            delivered = "shortfall"
        rated.due = rated.cost(min(bounded, rated.units))
        return delivered

    async def _hold_more(self, call: Call, rated: Rated, units: int, ref: str) -> bool:
        """Hold as many units as this, which are more than are held; return whether they are.

        Args:
            ref: names the extension, once for this call.

        Raises:
            StoreUnavailable: they are not. OutcomeUnknown: they may be; the hold's end gives all of it back.
        """
        assert call.caller is not None
        key, more = call.caller.key, units - rated.units
        amount = Stroops(more * rated.price)
        if rated.cap is not None and rated.cost(units).amount > rated.cap:
            return False
        if key.budget is not None and amount:
            if not isinstance(await self._budgets.take(key.budget, amount), BudgetTaken):
                return False
            call.budgeted = Stroops(call.budgeted + amount)
        extend = ExtendHold(call.event_id, 0, amount, ref, more, rated.card.unit_credits)
        outcome = await self._registry.ask(key.vault_id, extend)
        if not isinstance(outcome, HoldExtended):
            return False
        if call.balance is not None:
            call.balance = Stroops(call.balance - (outcome.held_amount - call.held))
        rated.units, rated.credits, call.held = units, outcome.held_credits, outcome.held_amount
        return True

    async def _stream(
        self, call: Call, rated: Rated, exchange: Exchange, claim: IdempotencyClaim | None, head: bytes
    ) -> bool:
        """Release a success that is charged by what of it passes; however it ends, what has passed is charged."""
        answer = exchange.answer

        def stored(amount: Stroops) -> StoredAnswer | None:
            return None if claim is None else StoredAnswer(claim.key, answer.status, None, None, amount)

        async def close() -> list[tuple[bytes, bytes]]:
            call.outcome = "delivered" if toll.ended is None else "stream_ended"
            rated.due = rated.cost(units_of(rated.card, toll.quantity))
            amount = rated.due.amount
            await self._capture(call, amount, exchange.response_bytes, stored(amount), undone=False)
            charged = format_usdc(call.charge).encode("ascii")
            return [(b"X-Callora-Charge", charged), (b"X-Callora-Units", b"%d" % rated.due.units)]

        toll = Toll(
            rated,
            event_stream=is_event_stream(answer.first(b"content-type")),
            hold_more=lambda units, ref: self._hold_more(call, rated, units, ref),
            capture=close,
        )
        call.outcome = "stream_cut"
        fault: Exception | None = None
        result = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_hold, call)
                try:
                    result = await exchange.release_metered(head, toll)
                except Exception as error:  # taken out of the nursery as it is, not in a group
                    fault = error
                nursery.cancel_scope.cancel()
        finally:
            if call.state == "open" and toll.delivered:
                # Nobody waits for it: the client is gone, or learns from a closed connection that this is not all.
                rated.due = rated.cost(units_of(rated.card, toll.delivered))
                close_command = self._close_of(
                    call, rated.due.amount, exchange.response_bytes, stored(rated.due.amount)
                )
                assert call.caller is not None
                self._registry.send(call.caller.key.vault_id, Envelope(close_command))
                call.state, call.charge = "closed", rated.due.amount
                self._metrics.charged.value += rated.due.amount
        if fault is not None:
            raise fault
        return result

    def _close_of(
        self, call: Call, amount: Stroops, response_bytes: int | None, stored: StoredAnswer | None
    ) -> CloseHold:
        """Return the capture of what the call came to."""
        due = None if call.rated is None else call.rated.due
        delivery = Delivery(
            call.outcome,
            call.status,
            self._latency_us(call),
            call.body.received_bytes,
            response_bytes,
            None if due is None else due.units,
        )
        if call.rated is None or due is None:
            return capture(call.event_id, call.held, amount, delivery, stored)
        return capture(
            call.event_id,
            call.held,
            amount,
            delivery,
            stored,
            held_credits=call.rated.credits,
            spent_credits=due.credits,
        )

    async def _capture(
        self,
        call: Call,
        amount: Stroops,
        response_bytes: int | None,
        stored: StoredAnswer | None,
        *,
        undone: bool = True,
    ) -> None:
        """Capture, durably: whoever waits for this may release what was paid for.

        Args:
            undone: whether a capture whose outcome is unknown is undone, because nothing of its answer was released.

        Raises:
            OutcomeUnknown, StoreUnavailable: it is not known to be captured.
            Refused: HOLD_EXPIRED.
        """
        assert call.caller is not None
        close = self._close_of(call, amount, response_bytes, stored)
        call.state = "capturing"
        vault_id = call.caller.key.vault_id
        try:
            outcome = await self._registry.ask(vault_id, close)
        except (OutcomeUnknown, StoreUnavailable):
            call.outcome = "capture_unknown"
            if undone:
                kept = stored is not None and stored.body is not None
                self._compensator.add(
                    Undelivered(vault_id, call.event_id, call.held, amount, close.held_credits, close.credits, kept)
                )
            raise
        if isinstance(outcome, HoldClosed):
            call.state = "closed"
            call.charge = outcome.amount
            call.balance = outcome.available
            self._metrics.charged.value += outcome.amount
            if call.rated is not None:
                call.rated.charged = True
            return
        assert isinstance(outcome, HoldNotOpen)
        call.state = "closed"
        call.outcome = "hold_expired"
        raise Refused("HOLD_EXPIRED", "The call took longer than its hold lasts; it was not charged")

    # What the client is told.

    async def _refuse(
        self, client: ClientConnection, request: RequestHead, request_id: str, call: Call | None, refused: Refused
    ) -> bool:
        self._metrics.refusals.of(refused.code).inc()
        status = PROBLEMS[refused.code].status
        self._count(request, status)
        self._log.debug("call_refused", request_id=request_id, code=refused.code)
        if call is not None and call.released:
            return False
        document = problem_body(refused.code, refused.message, request_id, refused.details)
        own = b"X-Request-Id: %b\r\n" % request_id.encode("ascii") if call is None else self._own_lines(call)
        if refused.retry_seconds is not None:
            own += b"Retry-After: %d\r\n" % max(1, math.ceil(refused.retry_seconds))
        reusable = (
            not refused.close
            and request.keep_alive
            and not self._admission.draining
            and call is not None
            and not client.gone
            and (call.body.done or not (call.body.awaits_continue or call.body.too_long_to_drop))
        )
        bodiless = request.method == "HEAD"
        try:
            head = answer_head(
                status, b"", _PROBLEM_LINES, length=len(document), chunked=False, own=own, close=not reusable
            )
            message = head if bodiless else head + document
            await (client.send_last(message) if reusable else client.send(message))
            # What is left of the request is read behind the answer: its sender may wait for the answer first.
            if call is not None:
                return await call.body.leave(reusable=reusable)
            await client.linger()
        except ClientGone:
            pass
        return False

    def _closes(self, call: Call) -> bool:
        """Tell whether the connection ends with this answer."""
        return (
            not call.request.keep_alive
            or self._admission.draining
            or call.client.gone
            or (not call.body.done and not call.request.chunked and call.body.awaits_continue)
            or call.body.too_long_to_drop
        )

    def _own_lines(self, call: Call) -> bytes:
        """Return the header lines that every answer to a call carries."""
        own_ms = (time.perf_counter() - call.started - call.upstream_seconds) * 1000
        if call.caller is None:
            return f"X-Request-Id: {call.request_id}\r\nServer-Timing: callora;dur={own_ms:.2f}\r\n".encode("ascii")
        standing, now = call.standing, trio.current_time()
        if standing is None:
            which, log, remaining = call.caller.pace.tighter()
            limit, policy = _limit_lines(which, log.limit, log.window_seconds)
            seconds = math.ceil(log.reset_seconds(now))
            reset = math.ceil(self._clock.timestamp()) + seconds
        else:
            which, remaining = standing.which, standing.remaining
            limit, policy = _limit_lines(which, standing.limit.calls, standing.limit.window_seconds)
            seconds, reset = math.ceil(max(0.0, standing.reset_at - now)), math.ceil(standing.reset_timestamp)
        balance = "" if call.balance is None else f"X-Callora-Balance: {format_usdc(call.balance)}\r\n"
        told = f"X-Callora-Charge: {format_usdc(call.charge)}\r\n{balance}"
        if call.rated is not None:
            told = call.rated.shown(told)
        return (
            f"X-Request-Id: {call.request_id}\r\n{limit}X-RateLimit-Remaining: {remaining}\r\n"
            f"X-RateLimit-Reset: {reset}\r\n"
            f'{policy}RateLimit: "{which}";r={remaining};t={seconds}\r\n'
            f"{told}Server-Timing: callora;dur={own_ms:.2f}\r\n"
        ).encode("ascii")

    def _latency_us(self, call: Call) -> int:
        return min(int((time.perf_counter() - call.started) * 1_000_000), 2**31 - 1)

    def _count(self, request: RequestHead, status: int) -> None:
        counted = self._counted.get((request.method, status))
        if counted is None:
            counted = self._metrics.tally(self._metrics.http_requests, request.method, ROUTE, str(status), "gateway")
            self._counted[request.method, status] = counted
        counted.value += 1

    def _profile(self, call: Call, outcome: str, status: int) -> None:
        if self._settings.profile_upstreams:
            assert call.offer is not None
            labels = (str(call.offer.api.api_id), call.request.method, str(status), outcome)
            self._metrics.upstream_requests.of(*labels).inc()
            self._metrics.upstream_seconds.of(*labels).observe(time.perf_counter() - call.upstream_started)


@lru_cache(maxsize=1024)
def _limit_lines(which: str, limit: int, window_seconds: float) -> tuple[str, str]:
    """Return the header lines that say what a limit is, which are few."""
    return f"X-RateLimit-Limit: {limit}\r\n", f'RateLimit-Policy: "{which}";q={limit};w={window_seconds:.0f}\r\n'


def _fingerprint(key: KeyRecord, request: RequestHead, body: bytes) -> bytes:
    """Return what makes an idempotent request this request. The key is part of it: no key sees another's answer."""
    digest = hashlib.sha256()
    for part in (key.api_key_id.encode(), request.method.encode(), request.target, hashlib.sha256(body).digest()):
        digest.update(len(part).to_bytes(4) + part)
    return digest.digest()


def clean_request_id(value: bytes | None) -> str | None:
    """Return a client's X-Request-Id when it is 1 to 128 visible ASCII characters, else None. It only correlates."""
    if value is None or not 1 <= len(value) <= _REQUEST_ID_CHARS_MAX or not value.isascii():
        return None
    text = value.decode("ascii")
    return text if text.isprintable() else None
