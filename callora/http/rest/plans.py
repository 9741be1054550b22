"""Plans: shown to everyone, and kept by operators, who put vaults on them and give credits."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from callora.actors.plans import DefaultPlanStays, Plan, Plans
from callora.actors.registry import VaultRegistry
from callora.actors.subscriptions import Busy, Subscriptions
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    Instant,
    InstantOut,
    PageMeta,
    PageQuery,
    Usdc,
    UsdcOut,
    Uuid,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    stroops,
    usdc,
)
from callora.http.rest.key_forms import CREDITS_MAX, Name, Rate
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.clock import Clock
from callora.ledger.commands import GrantQuota
from callora.ledger.ids import ApiId, Ids, VaultId
from callora.ledger.money import Stroops
from callora.ledger.outcomes import (
    Draining,
    Overloaded,
    PlanMissing,
    QuotaGranted,
    ReferenceTaken,
    VaultMissing,
)
from callora.ledger.quota import Overage
from callora.store.reads import plans as reads

PRICE_MAX: Final = Stroops(10**13)
GRANT_MAX: Final = timedelta(days=3660)
"""How far ahead a grant may end."""
RETRY: Final = {"Retry-After": "1"}
BUSY: Final = "A payment for this vault is under way; ask again in a moment"

PlanId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$", examples=["pro"])]
Credits = Annotated[int, Field(ge=1, le=CREDITS_MAX)]
Feature = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", examples=["priority_support"])]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]


class PlanOut(Form):
    """What vaults on a plan may do, and get each month."""

    id: str
    name: str
    priceUsdc: UsdcOut = Field(description="A calendar month, UTC; a plan without a price is given by operators alone.")
    monthlyCredits: int = Field(description="Given at the beginning of each calendar month, UTC, for that month.")
    overage: Overage = Field(description="When the credits are used up: `deny` calls, or `charge` their price.")
    rateLimitPerMinute: int | None = Field(description="Calls of each key; null: what the service allows.")
    features: list[str]
    apis: list[str] | None = Field(description="Slugs of the APIs that it is for; null for all.")


class PlanList(Form):
    """Plans, the cheapest first."""

    data: list[PlanOut]
    meta: PageMeta


class AdminPlanOut(PlanOut):
    """A plan, and whether vaults may be put on it."""

    active: bool


class AdminPlanList(Form):
    """All plans, the cheapest first."""

    data: list[AdminPlanOut]
    meta: PageMeta


class PlanPath(Form):
    """Which plan."""

    planId: PlanId


class PlanIn(Form):
    """A whole plan. What it grants changes for the months to come."""

    name: Name
    priceUsdc: Usdc = Field(description="A month; 0: nobody can subscribe to it.")
    monthlyCredits: int = Field(ge=0, le=CREDITS_MAX)
    overage: Overage
    rateLimitPerMinute: Rate | None = None
    features: list[Feature] = Field(default=[], max_length=50)
    apis: list[Slug] | None = Field(default=None, min_length=1, max_length=1000, description="Slugs; null for all.")
    active: bool = Field(default=True, description="false: vaults that are on it stay so, others are not put on it.")


class VaultPath(Form):
    """Which vault."""

    vaultId: Uuid


class VaultPlanIn(Form):
    """A plan."""

    planId: PlanId


class VaultPlanOut(Form):
    """The plan that a vault is on."""

    vaultId: str
    planId: str


class GrantIn(Form):
    """Credits for a vault."""

    credits: Credits
    expiresAt: Instant
    source: Literal["promo", "allocation"]
    ref: str = Field(
        pattern=r"^[A-Za-z0-9._:-]{1,128}$", description="Your name for this grant; it is made once for each source."
    )


class GrantOut(Form):
    """The credits are the vault's."""

    vaultId: str
    credits: int
    expiresAt: InstantOut
    source: Literal["promo", "allocation"]
    ref: str
    creditsRemaining: int = Field(description="Left of all its grants.")
    alreadyGranted: bool


def plan_routes(plans: Plans, database: reads.Database) -> Routes:
    """Return the routes of plans."""
    routes = Routes("Plans")

    async def page(query: PageQuery, *, inactive: bool) -> tuple[list[Mapping[str, Any]], PageMeta]:
        position = decode_cursor(query.cursor, int, str)
        after = None if position is None else (position[0], position[1])
        rows = await reads.list_plans(database, inactive=inactive, after=after, limit=query.limit + 1)
        shown = list(rows[: query.limit])
        more = len(rows) > query.limit
        cursor = encode_cursor(shown[-1]["price"], shown[-1]["plan_id"]) if more else None
        return shown, PageMeta(limit=query.limit, nextCursor=cursor, hasMore=more)

    @routes.add("GET", "/api/plans", access=Access.PUBLIC, query=PageQuery, answers={200: PlanList}, etag=True)
    async def list_plans(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """The plans that are offered, the cheapest first."""
        rows, meta = await page(ask.query, inactive=False)
        return Answer(PlanList(data=[PlanOut(**_shown(row)) for row in rows], meta=meta))

    @routes.add("GET", "/api/admin/plans", access=Access.ADMIN, query=PageQuery, answers={200: AdminPlanList})
    async def list_all_plans(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """All plans, the cheapest first."""
        rows, meta = await page(ask.query, inactive=True)
        return Answer(AdminPlanList(data=[_shown_to_operators(row) for row in rows], meta=meta))

    @routes.add(
        "PUT",
        "/api/admin/plans/{planId}",
        access=Access.ADMIN,
        path_form=PlanPath,
        body=PlanIn,
        answers={200: AdminPlanOut, 201: AdminPlanOut},
        problems=("CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def set_plan(ask: Ask[PlanPath, Any, PlanIn]) -> Answer:
        """Make a plan, or replace it: 201 when it is new.

        Its APIs and its rate hold from the next call on, what it grants from the next month on. Who is subscribed to it
        goes on at the price that he agreed to.
        """
        body = ask.body
        ask.exchange.audit_details |= {"plan": body.model_dump_json()}
        price = stroops(body.priceUsdc)
        if price > PRICE_MAX:
            raise invalid("body.priceUsdc", f"Must be at most {usdc(PRICE_MAX)}", "TOO_LARGE")
        done = await plans.put(
            Plan(
                plan_id=ask.path.planId,
                name=body.name,
                price=price,
                monthly_credits=body.monthlyCredits,
                overage=body.overage,
                rate_limit_per_minute=body.rateLimitPerMinute,
                features=list(dict.fromkeys(body.features)),
                allowed_apis=None if body.apis is None else await numbers_of(body.apis),
                active=body.active,
            ),
        )
        if isinstance(done, DefaultPlanStays):
            raise ProblemRaised("CONFLICT", "New vaults are put on this plan: it stays active")
        row = await reads.find_plan(database, ask.path.planId)
        assert row is not None, "plans are never deleted"
        return Answer(_shown_to_operators(row), 201 if done == "made" else 200)

    async def numbers_of(slugs: list[str]) -> list[ApiId]:
        known = await reads.apis_of(database, slugs)
        wrong = [
            {"field": f"body.apis[{index}]", "message": "Must be the slug of an API", "code": "INVALID_VALUE"}
            for index, slug in enumerate(slugs)
            if slug not in known
        ]
        if wrong:
            raise ProblemRaised("VALIDATION_ERROR", details=wrong)
        return [ApiId(number) for number in dict.fromkeys(known[slug] for slug in slugs)]

    return routes


def vault_plan_routes(
    registry: VaultRegistry, subscriptions: Subscriptions, plans: Plans, clock: Clock, ids: Ids
) -> Routes:
    """Return the routes by which operators put vaults on plans and give them credits."""
    routes = Routes("Operators: plans")

    @routes.add(
        "PUT",
        "/api/admin/vaults/{vaultId}/plan",
        access=Access.ADMIN,
        path_form=VaultPath,
        body=VaultPlanIn,
        answers={200: VaultPlanOut},
        problems=("VAULT_NOT_FOUND", "PLAN_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
    )
    async def set_vault_plan(ask: Ask[VaultPath, Any, VaultPlanIn]) -> Answer:
        """Put a vault on a plan, free of charge.

        A subscription of the vault's ends with this, and what was paid for it is not given back.
        """
        ask.exchange.audit_details |= {"planId": ask.body.planId}
        outcome = await subscriptions.set_plan(VaultId(ask.path.vaultId), ask.body.planId)
        match outcome:
            case PlanMissing():
                raise ProblemRaised("PLAN_NOT_FOUND")
            case VaultMissing():
                raise ProblemRaised("VAULT_NOT_FOUND", "No vault has this id")
            case Busy():
                raise ProblemRaised("CONFLICT", BUSY)
            case Overloaded() | Draining():
                raise ProblemRaised("SERVICE_UNAVAILABLE", headers=RETRY)
        await plans.take_effect()
        return Answer(VaultPlanOut(vaultId=ask.path.vaultId, planId=ask.body.planId))

    @routes.add(
        "POST",
        "/api/admin/vaults/{vaultId}/credits",
        access=Access.ADMIN,
        path_form=VaultPath,
        body=GrantIn,
        answers={200: GrantOut, 201: GrantOut},
        problems=("VAULT_NOT_FOUND", "IDEMPOTENCY_KEY_REUSE_MISMATCH", "OUTCOME_UNKNOWN"),
    )
    async def grant_quota(ask: Ask[VaultPath, Any, GrantIn]) -> Answer:
        """Give a vault credits that end: once for a ref, 201 when it is new."""
        body = ask.body
        ask.exchange.audit_details |= {"credits": str(body.credits), "source": body.source, "ref": body.ref}
        refuse_end(body.expiresAt, clock.now())
        command = GrantQuota(ids.uuid7(), body.source, body.credits, f"operator:{body.ref}", body.expiresAt)
        outcome = await registry.ask(VaultId(ask.path.vaultId), command)
        match outcome:
            case QuotaGranted(left, repeated):
                granted = GrantOut(
                    vaultId=ask.path.vaultId,
                    credits=body.credits,
                    expiresAt=iso(body.expiresAt),
                    source=body.source,
                    ref=body.ref,
                    creditsRemaining=left,
                    alreadyGranted=repeated,
                )
                return Answer(granted, 200 if repeated else 201)
            case ReferenceTaken():
                raise ProblemRaised("IDEMPOTENCY_KEY_REUSE_MISMATCH", "The ref was used for another grant")
            case VaultMissing():
                raise ProblemRaised("VAULT_NOT_FOUND", "No vault has this id")
            case Overloaded() | Draining():
                raise ProblemRaised("SERVICE_UNAVAILABLE", headers=RETRY)
            case _:
                raise AssertionError(f"not an outcome of a grant: {outcome!r}")

    return routes


def refuse_end(expires_at: datetime, now: datetime) -> None:
    """Return when credits may end then.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `body.expiresAt`.
    """
    if expires_at <= now:
        raise invalid("body.expiresAt", "Must lie ahead", "INVALID_VALUE")
    if expires_at > now + GRANT_MAX:
        raise invalid("body.expiresAt", "Must lie within ten years", "TOO_LARGE")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["plan_id"],
        "name": row["name"],
        "priceUsdc": usdc(row["price"]),
        "monthlyCredits": row["monthly_credits"],
        "overage": row["overage"],
        "rateLimitPerMinute": row["rate_limit_per_minute"],
        "features": row["features"],
        "apis": row["apis"],
    }


def _shown_to_operators(row: Mapping[str, Any]) -> AdminPlanOut:
    return AdminPlanOut(**_shown(row), active=row["active"])
