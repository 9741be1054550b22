"""What the routes of keys share, whoever uses them: reading a key, and what may not become of it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from callora.actors.keyring import KeyChange, Keyring, NewSecret
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, Page, PageQuery, Uuid, decode_cursor, invalid
from callora.http.rest.key_forms import (
    AdminKeyOut,
    KeyMade,
    KeyOut,
    KeyPatch,
    api_ids,
    endpoint_ids,
    ip_networks,
    key_fields,
    once,
)
from callora.ledger.clock import Clock
from callora.ledger.ids import FIRST_ID, LAST_ID, ApiKeyId, UserId, VaultId
from callora.ledger.tokens import ALL_SCOPES
from callora.store.reads.keys import KeyReads

_CHANGED: Final[Mapping[str, str]] = {
    "name": "name",
    "description": "description",
    "scopes": "scopes",
    "allowedApis": "allowed_apis",
    "allowedEndpoints": "allowed_endpoints",
    "allowedIps": "allowed_networks",
    "rateLimitPerMinute": "rate_limit_per_minute",
    "monthlyCreditCap": "monthly_credit_cap",
    "active": "disabled",
    "expiresAt": "expires_at",
}

Row = Mapping[str, Any]
Wrong = list[dict[str, str]]


class KeyDesk:
    """Reads keys, and says what is wrong with what is asked of them."""

    def __init__(self, reads: KeyReads, keyring: Keyring, clock: Clock) -> None:
        self.reads = reads
        self.keyring = keyring
        self._clock = clock

    async def row(self, key_id: str, user_id: UserId | None) -> Row:
        row = await self.reads.key(ApiKeyId(key_id), user_id)
        if row is None:
            raise ProblemRaised("API_KEY_NOT_FOUND")
        return row

    async def living_row(self, key_id: str, user_id: UserId | None) -> Row:
        row = await self.row(key_id, user_id)
        if row["revoked_at"] is not None:
            raise ProblemRaised("CONFLICT", "The key is revoked, for good")
        return row

    async def made(self, made: NewSecret) -> KeyMade:
        return KeyMade(key=made.secret, apiKey=self.shown(await self.row(made.api_key_id, None)))

    def shown(self, row: Row) -> KeyOut:
        return KeyOut(**key_fields(row, self._clock.now()))

    def shown_to_operators(self, row: Row) -> AdminKeyOut:
        return AdminKeyOut(**key_fields(row, self._clock.now()), userId=str(row["user_id"]), planId=row["plan_id"])

    async def wrong_narrowing(
        self,
        user_id: UserId,
        apis: Sequence[int] | None,
        endpoints: Sequence[int] | None,
        kept_apis: Sequence[int] | None = None,
        kept_endpoints: Sequence[int] | None = None,
    ) -> Wrong:
        """Return what is wrong with the APIs and endpoints that a key shall be narrowed to.

        Args:
            kept_apis: what the key has already: it may have been withdrawn since.
        """
        wrong: Wrong = []
        if apis is not None:
            known = await self.reads.usable_apis(apis, user_id) | set(kept_apis or ())
            wrong += _unknown("allowedApis", "API that is offered", apis, known)
        if endpoints is not None:
            known = await self.reads.usable_endpoints(endpoints, user_id) | set(kept_endpoints or ())
            wrong += _unknown("allowedEndpoints", "endpoint that is offered", endpoints, known)
        return wrong

    async def wrong_rate(self, vault_id: VaultId, rate: int | None) -> Wrong:
        """A key may only narrow what its plan allows."""
        if rate is None:
            return []
        plan = await self.reads.plan_rate(vault_id)
        if plan is None or rate <= plan:
            return []
        return [_detail("rateLimitPerMinute", f"Must be at most the plan's {plan} calls a minute", "TOO_LARGE")]

    async def refuse_outside_plan(
        self, vault_id: VaultId, apis: Sequence[int] | None, endpoints: Sequence[int] | None
    ) -> None:
        """Return when a vault's plan has all of these APIs, and those of these endpoints.

        Raises:
            ProblemRaised: PLAN_ENDPOINT_NOT_ALLOWED.
        """
        outside = await self.reads.outside_plan(vault_id, apis or (), endpoints or ()) if apis or endpoints else ()
        if outside:
            raise ProblemRaised("PLAN_ENDPOINT_NOT_ALLOWED", details={"apis": list(outside)})

    def wrong_token(self, row: Row, scopes: Sequence[str], apis: Sequence[int] | None) -> Wrong:
        """Return what of a token's rights its key does not have. Whatever it says, at use both must allow a call."""
        wrong: Wrong = []
        has = row["scopes"]
        if ALL_SCOPES not in has:
            wrong += [
                _detail(f"scopes[{index}]", "Must be a scope of the key", "INVALID_VALUE")
                for index, scope in enumerate(scopes)
                if scope != ALL_SCOPES and scope not in has
            ]
        if apis is not None and row["allowed_apis"] is not None:
            wrong += _unknown("apis", "API of the key's", apis, set(row["allowed_apis"]))
        return wrong

    def wrong_expiry(self, expires_at: datetime | None) -> Wrong:
        if expires_at is None or expires_at > self._clock.now():
            return []
        return [_detail("expiresAt", "Must lie ahead", "INVALID_VALUE")]

    async def page(
        self, user_id: UserId | None, query: PageQuery, *, active: bool | None = None, plan_id: str | None = None
    ) -> Page:
        """Return a page of keys, the newest first.

        Args:
            user_id: None for everybody's.
        """
        rows = await self.reads.keys(
            user_id, before=before_id(query.cursor), active=active, plan_id=plan_id, limit=query.limit + 1
        )
        return Page.of(rows, query.limit, "api_key_id")

    async def change(self, row: Row, body: KeyPatch, user_id: UserId | None, wrong: Wrong) -> Row:
        """Change a key and return it as it is then.

        Args:
            user_id: who asks; None for an operator.
            wrong: what has been found wrong already.
        """
        if not body.model_fields_set:
            raise invalid("body", "At least one field must be provided", "REQUIRED")
        wrong = wrong + self.wrong_expiry(body.expiresAt)
        wrong += await self.wrong_narrowing(
            UserId(str(row["user_id"])),
            body.allowedApis,
            body.allowedEndpoints,
            row["allowed_apis"],
            row["allowed_endpoints"],
        )
        refuse(wrong)
        await self.refuse_outside_plan(
            VaultId(str(row["vault_id"])),
            _added(body.allowedApis, row["allowed_apis"]),
            _added(body.allowedEndpoints, row["allowed_endpoints"]),
        )
        key_id = ApiKeyId(str(row["api_key_id"]))
        change = KeyChange(
            fields=frozenset(_CHANGED[name] for name in body.model_fields_set),
            name=body.name,
            description=body.description,
            scopes=once(body.scopes),
            allowed_apis=api_ids(body.allowedApis),
            allowed_endpoints=endpoint_ids(body.allowedEndpoints),
            allowed_networks=ip_networks(body.allowedIps),
            rate_limit_per_minute=body.rateLimitPerMinute,
            monthly_credit_cap=body.monthlyCreditCap,
            disabled=not body.active,
            expires_at=body.expiresAt,
        )
        if not await self.keyring.change(key_id, user_id, change):
            return await self.living_row(key_id, user_id)  # it was revoked meanwhile, which this says
        return await self.row(key_id, user_id)


class _Position(Form):
    """A position in a list by id."""

    id: Uuid


def before_id(cursor: str | None) -> str:
    """Return the id that a page of what is listed by id, the newest first, begins below.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.cursor`.
    """
    return _id_of(cursor) or LAST_ID


def after_id(cursor: str | None) -> str:
    """Return the id that a page of what is listed by id, the oldest first, begins above. Raises as `before_id`."""
    return _id_of(cursor) or FIRST_ID


def _id_of(cursor: str | None) -> str | None:
    position = decode_cursor(cursor, str)
    try:
        return None if position is None else _Position(id=position[0]).id
    except ValueError:
        raise invalid("query.cursor", "Must be meta.nextCursor of an earlier page", "INVALID_VALUE") from None


def refuse(wrong: Wrong) -> None:
    """Return when nothing is wrong.

    Raises:
        ProblemRaised: VALIDATION_ERROR with everything that is.
    """
    if wrong:
        raise ProblemRaised("VALIDATION_ERROR", details=wrong)


def _detail(field: str, message: str, code: str) -> dict[str, str]:
    return {"field": f"body.{field}", "message": message, "code": code}


def _added(asked: Sequence[int] | None, kept: Sequence[int] | None) -> Sequence[int]:
    return [number for number in asked or () if number not in (kept or ())]


def _unknown(field: str, kind: str, asked: Sequence[int], known: frozenset[int] | set[int]) -> Wrong:
    return [
        _detail(f"{field}[{index}]", f"Must be an {kind}", "INVALID_VALUE")
        for index, number in enumerate(asked)
        if number not in known
    ]
