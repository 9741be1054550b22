"""What operators see and do: people, the standing of vaults, circuit breakers, and the audit of all of it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import trio
from pydantic import Field

from callora.actors.breaker import Breaker, BreakerSettings
from callora.actors.catalogue import Catalogue
from callora.actors.registry import VaultRegistry
from callora.http.gateway.admission import Admission
from callora.http.problems import ProblemRaised
from callora.http.rest.billing_forms import Network, Reason
from callora.http.rest.forms import (
    INT64_MAX,
    Form,
    Instant,
    InstantOut,
    PageMeta,
    PageQuery,
    UsdcOut,
    Uuid,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    microseconds,
    moment_of,
    read_uuid,
    usdc,
)
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.clock import Clock
from callora.ledger.commands import SetStanding
from callora.ledger.ids import ApiId, UserId, VaultId
from callora.ledger.outcomes import Draining, Overloaded, StandingSet
from callora.store.reads import operators as reads

_RETRY: Final = {"Retry-After": "1"}
_NEVER_FAILED: Final = Breaker(BreakerSettings(1, 0.0, 1))

Standing = Literal["active", "arrears", "suspended"]
Text = Annotated[str, Field(min_length=1, max_length=255)]


class PeopleQuery(PageQuery):
    """Which users."""

    search: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        default=None, description="An id, a wallet or a subject as a whole, or a part of a name."
    )


class PersonLine(Form):
    """A user."""

    id: Uuid
    name: str
    wallet_address: str | None
    subject: str | None = Field(description="What an outside issuer calls him.")
    developer_id: Uuid | None
    vaults: int
    active_keys: int
    created_at: InstantOut


class PersonList(Form):
    """Users, the latest first."""

    data: list[PersonLine]
    meta: PageMeta


class UserPath(Form):
    """Which user."""

    userId: Uuid


class VaultLine(Form):
    """One of a user's vaults."""

    vault_id: Uuid
    network: Network
    plan: str
    balance_usdc: UsdcOut
    held_usdc: UsdcOut
    owed_usdc: UsdcOut
    arrears_since: InstantOut | None = Field(description="Since when it owes without a break; null where it does not.")
    standing: Standing
    created_at: InstantOut


class KeyCounts(Form):
    """How many API keys a user has."""

    total: int = Field(description="All there ever were.")
    active: int = Field(description="Neither revoked, disabled nor expired.")


class PersonDetail(Form):
    """A user with what is his."""

    id: Uuid
    name: str
    wallet_address: str | None
    subject: str | None
    developer_id: Uuid | None
    created_at: InstantOut
    vaults: list[VaultLine]
    keys: KeyCounts


class StandingBody(Form):
    """How a user's vault stands from now on."""

    network: Network
    standing: Standing = Field(
        description="Anything but active refuses new charges; suspended refuses calls at once. Who owes is in arrears"
        " at best."
    )
    reason: Reason


_CHAIN_BREAKERS: Final = ("chain:rpc", "chain:horizon")
"""In the order in which they are listed, before the APIs'."""


class BreakerState(Form):
    """A circuit breaker in the process that answers."""

    key: str = Field(description="What it is called: an API's number, `chain:rpc` or `chain:horizon`.")
    apiId: int | None = Field(description="The API's number; null for the chain's.")
    state: Literal["closed", "open", "half_open"]
    failures: int = Field(description="Failures in a row that count towards opening.")
    retryAfterSeconds: float = Field(description="How long an open breaker admits no trial yet.")
    scope: Literal["process"] = Field(
        default="process",
        description="Each process has its own breakers; others learn nothing of a reset or a trip here.",
    )


class BreakerList(Form):
    """The breakers before the chain, where it is configured, and of the APIs that this process has called."""

    data: list[BreakerState]
    meta: PageMeta


class BreakerPath(Form):
    """Which breaker."""

    key: str = Field(
        pattern=r"^(chain:rpc|chain:horizon|[1-9][0-9]{0,18})$",
        description="An API's number, `chain:rpc` or `chain:horizon`.",
    )


class BreakerBody(Form):
    """Why an operator steps in."""

    reason: str | None = Field(default=None, max_length=512)


class AuditQuery(PageQuery):
    """Which accesses."""

    action: Text | None = Field(default=None, description="The operation's id, such as `refund_charge`.")
    event: Text | None = Field(default=None, description="Another name of `action`.")
    actor: Text | None = Field(default=None, description="`admin-key`, `user:` and an id, or `unknown`.")
    target: Text | None = Field(default=None, description="What it was done to.")
    since: Instant | None = Field(default=None, alias="from")
    until: Instant | None = Field(default=None, alias="to", description="Accesses before this.")


class AuditLine(Form):
    """One access by an operator, or by who would be one."""

    id: Uuid
    at: InstantOut
    actor: str
    action: str
    target: str | None
    client_address: str
    request_id: str
    status: int = Field(description="Of the answer; 401 and 403 are those who were not let in.")
    details: dict[str, str]


class AuditList(Form):
    """Accesses, the latest first. The table behind it is append-only."""

    data: list[AuditLine]
    meta: PageMeta


def operator_routes(
    database: reads.Database,
    registry: VaultRegistry,
    catalogue: Catalogue,
    admission: Admission,
    chain_breakers: Mapping[str, Breaker],
    clock: Clock,
) -> Routes:
    """Return the routes of people, standings, breakers and the audit.

    Args:
        chain_breakers: those before the chain, by their keys; empty where it is not configured.
    """
    routes = Routes("Operators")

    @routes.add("GET", "/api/admin/users", access=Access.ADMIN, query=PeopleQuery, answers={200: PersonList}, etag=True)
    async def list_users(ask: Ask[Any, PeopleQuery, Any]) -> Answer:
        """All users, the latest first."""
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, str)
        after = None if position is None else UserId(read_uuid(position[0]))
        found = await reads.list_people(database, clock.now(), limit + 1, after, ask.query.search)
        more = len(found) > limit
        cursor = encode_cursor(found[limit - 1].user_id) if more else None
        return Answer(
            PersonList(
                data=[_line(each) for each in found[:limit]],
                meta=PageMeta(limit=limit, nextCursor=cursor, hasMore=more),
            )
        )

    @routes.add(
        "GET",
        "/api/admin/users/{userId}",
        access=Access.ADMIN,
        path_form=UserPath,
        answers={200: PersonDetail},
        problems=("NOT_FOUND",),
        etag=True,
    )
    async def get_user(ask: Ask[UserPath, Any, Any]) -> Answer:
        """A user with his vaults and how many keys he has."""
        return Answer(await person(UserId(ask.path.userId)))

    @routes.add(
        "POST",
        "/api/admin/users/{userId}/standing",
        access=Access.ADMIN,
        path_form=UserPath,
        body=StandingBody,
        answers={200: PersonDetail},
        problems=("NOT_FOUND", "VAULT_NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def set_standing(ask: Ask[UserPath, Any, StandingBody]) -> Answer:
        """Set how a user's vault stands; takes effect here at once, in other processes within a second."""
        body = ask.body
        ask.exchange.audit_details |= {"network": body.network, "standing": body.standing, "reason": body.reason}
        before = await person(UserId(ask.path.userId))
        vault = next((each for each in before.vaults if each.network == body.network), None)
        if vault is None:
            raise ProblemRaised("VAULT_NOT_FOUND", "The user has no vault on this network")
        outcome = await registry.ask(VaultId(vault.vault_id), SetStanding(body.standing))
        if isinstance(outcome, Overloaded | Draining):
            raise ProblemRaised("SERVICE_UNAVAILABLE", headers=_RETRY)
        assert isinstance(outcome, StandingSet), outcome
        await catalogue.refresh()
        return Answer(await person(UserId(ask.path.userId)))

    @routes.add("GET", "/api/admin/circuit-breakers", access=Access.ADMIN, query=PageQuery, answers={200: BreakerList})
    async def list_breakers(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """The circuit breakers before the chain and of the APIs that this process has called.

        Every process has its own.
        """
        await trio.lowlevel.checkpoint()
        limit = ask.query.limit
        position = decode_cursor(ask.query.cursor, int)
        # The chain's come before the APIs', whose numbers begin at 1.
        breakers = {
            number - len(_CHAIN_BREAKERS): (key, chain_breakers[key])
            for number, key in enumerate(_CHAIN_BREAKERS)
            if key in chain_breakers
        }
        breakers |= {api_id: (str(api_id), breaker) for api_id, breaker in admission.breaker_states().items()}
        found = sorted(number for number in breakers if position is None or number > position[0])
        cursor = encode_cursor(found[limit - 1]) if len(found) > limit else None
        return Answer(
            BreakerList(
                data=[_breaker(*breakers[number]) for number in found[:limit]],
                meta=PageMeta(limit=limit, nextCursor=cursor, hasMore=cursor is not None),
            )
        )

    @routes.add(
        "GET",
        "/api/admin/circuit-breakers/{key}",
        access=Access.ADMIN,
        path_form=BreakerPath,
        answers={200: BreakerState},
        problems=("NOT_FOUND",),
    )
    async def get_breaker(ask: Ask[BreakerPath, Any, Any]) -> Answer:
        """A circuit breaker in the process that answers."""
        return Answer(_breaker(ask.path.key, await breaker_of(ask.path.key, make=False)))

    @routes.add(
        "POST",
        "/api/admin/circuit-breakers/{key}/reset",
        access=Access.ADMIN,
        path_form=BreakerPath,
        body=BreakerBody,
        answers={200: BreakerState},
        problems=("NOT_FOUND",),
    )
    async def reset_breaker(ask: Ask[BreakerPath, Any, BreakerBody]) -> Answer:
        """Close a circuit breaker in the process that answers: what it stands before is called again."""
        note_reason(ask)
        breaker = await breaker_of(ask.path.key, make=True)
        breaker.reset(trio.current_time())
        return Answer(_breaker(ask.path.key, breaker))

    @routes.add(
        "POST",
        "/api/admin/circuit-breakers/{key}/trip",
        access=Access.ADMIN,
        path_form=BreakerPath,
        body=BreakerBody,
        answers={200: BreakerState},
        problems=("NOT_FOUND",),
    )
    async def trip_breaker(ask: Ask[BreakerPath, Any, BreakerBody]) -> Answer:
        """Open a circuit breaker in the process that answers.

        Calls are refused until its cooldown has passed; then a trial is admitted. To take an API off for longer, pause
        it.
        """
        note_reason(ask)
        breaker = await breaker_of(ask.path.key, make=True)
        breaker.trip(trio.current_time())
        return Answer(_breaker(ask.path.key, breaker))

    @routes.add("GET", "/api/admin/audit", access=Access.ADMIN, query=AuditQuery, answers={200: AuditList})
    async def list_audit(ask: Ask[Any, AuditQuery, Any]) -> Answer:
        """What operators did, and who was not let in; the latest first. Looking at it is an access too."""
        query, limit = ask.query, ask.query.limit
        if query.action is not None and query.event is not None and query.action != query.event:
            raise invalid("query.event", "Must be what `action` is, or be left out", "INVALID_VALUE")
        position = decode_cursor(query.cursor, int, str)
        after = None if position is None else (moment_of(position[0]), read_uuid(position[1]))
        chosen = reads.AuditFilter(query.since, query.until, query.action or query.event, query.actor, query.target)
        rows = await reads.list_accesses(database, limit + 1, after, chosen)
        more = len(rows) > limit
        last = rows[limit - 1] if more else None
        cursor = None if last is None else encode_cursor(microseconds(last["at"]), str(last["audit_id"]))
        return Answer(
            AuditList(
                data=[_access(row) for row in rows[:limit]],
                meta=PageMeta(limit=limit, nextCursor=cursor, hasMore=more),
            )
        )

    async def person(user_id: UserId) -> PersonDetail:
        found = await reads.find_person(database, user_id, clock.now())
        if found is None:
            raise ProblemRaised("NOT_FOUND", "No such user")
        return PersonDetail(
            id=found.user_id,
            name=found.name,
            wallet_address=found.wallet_address,
            subject=found.subject,
            developer_id=found.developer_id,
            created_at=iso(found.created_at),
            vaults=[_vault_line(each) for each in await reads.vaults_of(database, user_id)],
            keys=KeyCounts(total=found.keys, active=found.live_keys),
        )

    async def breaker_of(key: str, *, make: bool) -> Breaker:
        if key in _CHAIN_BREAKERS:
            await trio.lowlevel.checkpoint()
            if key not in chain_breakers:
                raise ProblemRaised("NOT_FOUND", "The chain is not configured, or not this part of it")
            return chain_breakers[key]
        api_id = ApiId(int(key))
        if api_id > INT64_MAX or not await reads.api_exists(database, api_id):
            raise ProblemRaised("NOT_FOUND", "No such API")
        return admission.breaker(api_id) if make else admission.breaker_states().get(api_id, _NEVER_FAILED)

    def note_reason(ask: Ask[Any, Any, BreakerBody]) -> None:
        if ask.body.reason is not None:
            ask.exchange.audit_details["reason"] = ask.body.reason

    return routes


def _line(found: reads.PersonFound) -> PersonLine:
    return PersonLine(
        id=found.user_id,
        name=found.name,
        wallet_address=found.wallet_address,
        subject=found.subject,
        developer_id=found.developer_id,
        vaults=found.vaults,
        active_keys=found.live_keys,
        created_at=iso(found.created_at),
    )


def _vault_line(found: reads.VaultFound) -> VaultLine:
    network: Any = found.network
    return VaultLine(
        vault_id=found.vault_id,
        network=network,
        plan=found.plan_id,
        balance_usdc=usdc(found.available),
        held_usdc=usdc(found.held),
        owed_usdc=usdc(found.owed),
        arrears_since=None if found.arrears_since is None else iso(found.arrears_since),
        standing=found.standing,
        created_at=iso(found.created_at),
    )


def _breaker(key: str, breaker: Breaker) -> BreakerState:
    return BreakerState(
        key=key,
        apiId=None if key in _CHAIN_BREAKERS else int(key),
        state=breaker.state,
        failures=breaker.failures,
        retryAfterSeconds=round(breaker.remaining(trio.current_time()), 3),
    )


def _access(row: Any) -> AuditLine:
    return AuditLine(
        id=str(row["audit_id"]),
        at=iso(row["at"]),
        actor=row["actor"],
        action=row["action"],
        target=row["target"],
        client_address=row["client_address"],
        request_id=row["request_id"],
        status=row["status"],
        details=json.loads(row["details"]),
    )
