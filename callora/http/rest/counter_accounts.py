"""Counter accounts and the quarantine of their samples, for operators."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, WithJsonSchema

from callora.actors.counter_accounts import CounterAccounts
from callora.actors.rating import SubjectUnknown
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import Form, InstantOut, PageMeta, PageQuery, Uuid, iso
from callora.http.rest.forms import Page as PageOfRows
from callora.http.rest.key_desk import after_id, before_id
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.counters import (
    INCLUDED_MAX,
    MULTIPLIER_MAX,
    MULTIPLIER_PLACES,
    PRICE_MAX,
    PRICE_PLACES,
    Profile,
    SubjectTaken,
)
from callora.ledger.ids import VaultId
from callora.ledger.outcomes import VaultMissing
from callora.store.reads import counters as reads

_PRICE_PATTERN: Final = rf"^(0|[1-9][0-9]{{0,6}})(\.[0-9]{{1,{PRICE_PLACES}}})?$"
_MULTIPLIER_PATTERN: Final = rf"^(0|[1-9][0-9]{{0,2}})(\.[0-9]{{1,{MULTIPLIER_PLACES}}})?$"


def _price(text: str) -> str:
    if Decimal(text) > PRICE_MAX:
        raise ValueError(f"must be at most {PRICE_MAX} USDC")
    return text


def _multiplier(text: str) -> str:
    if not 0 < Decimal(text) <= MULTIPLIER_MAX:
        raise ValueError(f"must be more than 0 and at most {MULTIPLIER_MAX}")
    return text


UnitPrice = Annotated[
    str,
    Field(pattern=_PRICE_PATTERN),
    AfterValidator(_price),
    WithJsonSchema({"type": "string", "pattern": _PRICE_PATTERN, "examples": ["0.00000000025"]}),
]
Multiplier = Annotated[
    str,
    Field(pattern=_MULTIPLIER_PATTERN),
    AfterValidator(_multiplier),
    WithJsonSchema({"type": "string", "pattern": _MULTIPLIER_PATTERN, "examples": ["1.2"]}),
]
Units = Annotated[int, Field(ge=0, le=INCLUDED_MAX)]
Name = Annotated[str, Field(max_length=120)]
RuleVersion = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,80}$", examples=["pricing-v2"])]


class AccountIn(Form):
    """A subject's account."""

    vaultId: Uuid = Field(description="Which vault pays.")
    subject: Uuid = Field(description="What meter sources call it; a subject has one account.")
    name: Name = ""
    unitPriceUsdc: UnitPrice | None = Field(default=None, description="Of a unit; null: PRICE_PER_BYTE.")
    regionMultiplier: Multiplier = "1"
    lineMultiplier: Multiplier = "1"
    ruleVersion: RuleVersion | None = Field(default=None, description="Filed with what is rated; null: the service's.")
    includedUnits: Units | None = Field(
        default=None, description="Units that cost nothing; null: INITIAL_INCLUDED_QUOTA_BYTES."
    )
    replay: bool = Field(default=True, description="Whether what is quarantined of the subject is rated first.")


class AccountPatch(Form):
    """What changes; what was rated stays as it was."""

    name: Name = ""
    active: bool = Field(default=True, description="false: its samples are quarantined.")
    unitPriceUsdc: UnitPrice | None = None
    regionMultiplier: Multiplier = "1"
    lineMultiplier: Multiplier = "1"
    ruleVersion: RuleVersion | None = None


class IncludedIn(Form):
    """Units to be added."""

    units: Annotated[int, Field(ge=1, le=INCLUDED_MAX)]


class IncludedOut(Form):
    """Units that cost nothing."""

    granted: int = Field(description="All there ever were.")
    used: int
    remaining: int


class AccountOut(Form):
    """A subject's account."""

    id: Uuid
    vaultId: Uuid
    subject: Uuid
    name: str
    active: bool
    unitPriceUsdc: str | None
    regionMultiplier: str
    lineMultiplier: str
    ruleVersion: str | None
    includedUnits: IncludedOut
    createdAt: InstantOut
    updatedAt: InstantOut


class AccountList(Form):
    """Accounts, the latest first."""

    data: list[AccountOut]
    meta: PageMeta


class AccountQuery(PageQuery):
    """Which accounts."""

    vaultId: Uuid | None = None
    subject: Uuid | None = None


class AccountPath(Form):
    """Which account."""

    accountId: Uuid


class SubjectPath(Form):
    """Which subject."""

    subject: Uuid


class QuarantineQuery(PageQuery):
    """Which subjects."""

    subject: Uuid | None = None


class QuarantineLine(Form):
    """What is kept of a subject that could not be charged."""

    subject: Uuid
    sources: list[str]
    reasons: list[str] = Field(description="`unknown_subject`, or `charge_too_large` where a price must be wrong.")
    samples: int
    firstAt: InstantOut
    lastAt: InstantOut


class QuarantineList(Form):
    """Subjects with samples in quarantine."""

    data: list[QuarantineLine]
    meta: PageMeta


class ReplayOut(Form):
    """What rating came to."""

    processedSamples: int
    writtenMinutes: int
    replayedMinutes: int = Field(description="Minutes that were rated before: nothing changed.")
    resets: int
    quarantined: int = Field(description="Still.")


class DroppedOut(Form):
    """What was forgotten."""

    samples: int


def counter_account_routes(accounts: CounterAccounts, database: reads.Database, included_default: int) -> Routes:
    """Return the routes of counter accounts and of the quarantine.

    Args:
        included_default: units that a new account may use for nothing where its maker says nothing of it.
    """
    routes = Routes("Operators: counters")

    @routes.add(
        "POST",
        "/api/admin/counter-accounts",
        access=Access.ADMIN,
        body=AccountIn,
        answers={201: AccountOut},
        problems=("VAULT_NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
        idempotency_key="optional",
    )
    async def create_counter_account(ask: Ask[Any, Any, AccountIn]) -> Answer:
        """Have a subject's counters charged to a vault, from its first sample in quarantine on."""
        body = ask.body
        ask.exchange.audit_details |= {"vaultId": body.vaultId, "subject": body.subject}
        profile = Profile(
            name=body.name,
            active=True,
            unit_price=_decimal(body.unitPriceUsdc),
            region_multiplier=Decimal(body.regionMultiplier),
            line_multiplier=Decimal(body.lineMultiplier),
            rule_version=body.ruleVersion,
        )
        included = included_default if body.includedUnits is None else body.includedUnits
        made = await accounts.make(VaultId(body.vaultId), body.subject, profile, included, replay=body.replay)
        if isinstance(made, VaultMissing):
            raise ProblemRaised("VAULT_NOT_FOUND")
        if isinstance(made, SubjectTaken):
            raise ProblemRaised("CONFLICT", "The subject has an account")
        return Answer(_shown(await found(made)), 201)

    @routes.add(
        "GET", "/api/admin/counter-accounts", access=Access.ADMIN, query=AccountQuery, answers={200: AccountList}
    )
    async def list_counter_accounts(ask: Ask[Any, AccountQuery, Any]) -> Answer:
        """Counter accounts, the latest first."""
        query = ask.query
        rows = await reads.list_accounts(
            database,
            before=before_id(query.cursor),
            vault_id=query.vaultId,
            subject=query.subject,
            limit=query.limit + 1,
        )
        page = PageOfRows.of(rows, query.limit, "account_id")
        return Answer(AccountList(data=[_shown(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "GET",
        "/api/admin/counter-accounts/{accountId}",
        access=Access.ADMIN,
        path_form=AccountPath,
        answers={200: AccountOut},
        problems=("NOT_FOUND",),
    )
    async def get_counter_account(ask: Ask[AccountPath, Any, Any]) -> Answer:
        """A counter account."""
        return Answer(_shown(await found(ask.path.accountId)))

    @routes.add(
        "PATCH",
        "/api/admin/counter-accounts/{accountId}",
        access=Access.ADMIN,
        path_form=AccountPath,
        body=AccountPatch,
        answers={200: AccountOut},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def change_counter_account(ask: Ask[AccountPath, Any, AccountPatch]) -> Answer:
        """Change by what an account is rated from now on; null takes the service's default again."""
        row, body = await found(ask.path.accountId), ask.body
        given = body.model_dump(include=body.model_fields_set)
        ask.exchange.audit_details |= {name: str(value) for name, value in given.items()}
        profile = Profile(
            name=given.get("name", row["name"]),
            active=given.get("active", row["active"]),
            unit_price=_decimal(given["unitPriceUsdc"]) if "unitPriceUsdc" in given else row["unit_price"],
            region_multiplier=Decimal(given.get("regionMultiplier", row["region_multiplier"])),
            line_multiplier=Decimal(given.get("lineMultiplier", row["line_multiplier"])),
            rule_version=given.get("ruleVersion", row["rule_version"]),
        )
        await accounts.change(ask.path.accountId, profile)
        return Answer(_shown(await found(ask.path.accountId)))

    @routes.add(
        "POST",
        "/api/admin/counter-accounts/{accountId}/included-units",
        access=Access.ADMIN,
        path_form=AccountPath,
        body=IncludedIn,
        answers={200: AccountOut},
        problems=("NOT_FOUND", "CONFLICT", "OUTCOME_UNKNOWN"),
        idempotency_key="optional",
    )
    async def add_included_units(ask: Ask[AccountPath, Any, IncludedIn]) -> Answer:
        """Give an account units that cost nothing. Repeated with its Idempotency-Key, it gives nothing again."""
        ask.exchange.audit_details |= {"units": str(ask.body.units)}
        given = await accounts.include(ask.path.accountId, ask.body.units)
        if given is False:
            raise ProblemRaised("CONFLICT", "More units than an account may be given")
        return Answer(_shown(await found(ask.path.accountId)))

    @routes.add(
        "GET",
        "/api/admin/quarantined-samples",
        access=Access.ADMIN,
        query=QuarantineQuery,
        answers={200: QuarantineList},
    )
    async def list_quarantined_samples(ask: Ask[Any, QuarantineQuery, Any]) -> Answer:
        """Subjects whose samples could be charged to nobody."""
        query = ask.query
        rows = await reads.list_quarantined(
            database, after=after_id(query.cursor), subject=query.subject, limit=query.limit + 1
        )
        page = PageOfRows.of(rows, query.limit, "subject")
        return Answer(QuarantineList(data=[_line(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "POST",
        "/api/admin/quarantined-samples/{subject}/replay",
        access=Access.ADMIN,
        path_form=SubjectPath,
        answers={200: ReplayOut},
        problems=("NOT_FOUND", "OUTCOME_UNKNOWN"),
    )
    async def replay_quarantined_samples(ask: Ask[SubjectPath, Any, Any]) -> Answer:
        """Rate and charge what is quarantined of a subject that has an account, active or not."""
        rated = await accounts.replay(ask.path.subject)
        if isinstance(rated, SubjectUnknown):
            raise ProblemRaised("NOT_FOUND", "The subject has no account")
        return Answer(
            ReplayOut(
                processedSamples=rated.processed_samples,
                writtenMinutes=rated.written_minutes,
                replayedMinutes=rated.replayed_minutes,
                resets=rated.resets,
                quarantined=rated.quarantined,
            )
        )

    @routes.add(
        "DELETE",
        "/api/admin/quarantined-samples/{subject}",
        access=Access.ADMIN,
        path_form=SubjectPath,
        answers={200: DroppedOut},
        problems=("OUTCOME_UNKNOWN",),
    )
    async def drop_quarantined_samples(ask: Ask[SubjectPath, Any, Any]) -> Answer:
        """Forget what is quarantined of a subject: nobody is charged for it."""
        dropped = await accounts.drop(ask.path.subject)
        ask.exchange.audit_details |= {"samples": str(dropped)}
        return Answer(DroppedOut(samples=dropped))

    async def found(account_id: str) -> Mapping[str, Any]:
        row = await reads.find_account(database, account_id)
        if row is None:
            raise ProblemRaised("NOT_FOUND", "No such counter account")
        return row

    return routes


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _text(number: Decimal) -> str:
    """Return a number without the zeros that its column adds."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _shown(row: Mapping[str, Any]) -> AccountOut:
    return AccountOut(
        id=str(row["account_id"]),
        vaultId=str(row["vault_id"]),
        subject=str(row["subject"]),
        name=row["name"],
        active=row["active"],
        unitPriceUsdc=None if row["unit_price"] is None else _text(row["unit_price"]),
        regionMultiplier=_text(row["region_multiplier"]),
        lineMultiplier=_text(row["line_multiplier"]),
        ruleVersion=row["rule_version"],
        includedUnits=IncludedOut(
            granted=row["included_granted"],
            used=row["included_used"],
            remaining=row["included_granted"] - row["included_used"],
        ),
        createdAt=iso(row["created_at"]),
        updatedAt=iso(row["updated_at"]),
    )


def _line(row: Mapping[str, Any]) -> QuarantineLine:
    return QuarantineLine(
        subject=str(row["subject"]),
        sources=row["sources"],
        reasons=row["reasons"],
        samples=row["samples"],
        firstAt=iso(row["first_at"]),
        lastAt=iso(row["last_at"]),
    )
