"""What counters charged, for those who pay for it: sums, minutes, and how their vault stands."""

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from pydantic import Field

from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    InstantOut,
    Page,
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
from callora.http.rest.key_forms import Network
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.http.rest.periods import Period, PeriodQuery, Span, span_of
from callora.ledger.clock import Clock
from callora.ledger.ids import UserId, VaultId
from callora.store.reads import counter_usage as reads
from callora.store.reads import meters

MONTH: Final = timedelta(days=30)
DAY: Final = timedelta(days=1)
_CURSOR: Final = (int, str, str, str, str, str, str, str)
_BUCKET_KEY: Final = ("account_id", "env", "node_id", "meter", "region", "line", "multiplier")


class SummaryQuery(PeriodQuery, PageQuery):
    """Which of the caller's vaults, and when: by default the last 30 days."""

    network: Network = "testnet"


class BucketsQuery(PeriodQuery, PageQuery):
    """The same; by default the last day."""

    network: Network = "testnet"
    accountId: Uuid | None = Field(default=None, description="Of one account alone.")


class NetworkQuery(Form):
    """Which of the caller's vaults."""

    network: Network = "testnet"


class Used(Form):
    """What was used. Up and down are units as they were counted; what was included cost nothing."""

    up: int
    down: int
    total: int
    included: int
    charged: int = Field(description="Units that were charged: total less included.")
    cost_usdc: UsdcOut


class AccountUsed(Used):
    """What an account used."""

    accountId: str
    subject: str
    name: str
    minutes: int = Field(description="In which it used anything.")
    lastMinute: InstantOut | None


class UsageSummary(Form):
    """What the accounts that your vault pays for used."""

    data: list[AccountUsed]
    totals: Used = Field(description="Of all accounts, also those on other pages.")
    meta: PageMeta
    period: Period


class Bucket(Used):
    """A minute of an account on a node."""

    bucketStart: InstantOut
    accountId: str
    env: str
    nodeId: str
    meter: str
    region: str
    line: str
    multiplier: str


class BucketList(Form):
    """Minutes, the latest first. What they cost is what was charged."""

    data: list[Bucket]
    meta: PageMeta
    period: Period


class AccountTerms(Form):
    """An account, and what its units cost."""

    accountId: str
    subject: str
    name: str
    active: bool
    unitPrice: str | None = Field(description="USDC; null: the service's own.")
    multiplier: str = Field(description="Region and line together.")
    ruleVersion: str | None
    includedRemaining: int
    lastRatedMinute: InstantOut | None


class BillingSummary(Form):
    """How your vault stands, and whose counters it pays for."""

    vaultId: str
    network: Network
    balance_usdc: UsdcOut = Field(description="Available and held together, less what is owed.")
    available_usdc: UsdcOut
    held_usdc: UsdcOut
    owed_usdc: UsdcOut
    arrears: bool
    arrearsSince: InstantOut | None
    throttle_state: Literal["normal", "throttled"] = Field(description="throttled: calls are refused until it is paid.")
    suspend_state: Literal["active", "suspended"]
    accounts: list[AccountTerms] = Field(description=f"{reads.ACCOUNTS_MAX} at most.")


def counter_usage_routes(database: meters.Database, clock: Clock) -> Routes:
    """Return the routes of what counters charged."""
    routes = Routes("Usage")

    @routes.add(
        "GET", "/api/account/usage/summary", access=Access.USER, query=SummaryQuery, answers={200: UsageSummary}
    )
    async def get_counter_usage(ask: Ask[Any, SummaryQuery, Any]) -> Answer:
        """What counters of yours used and cost, account by account.

        A minute counts as soon as its snapshot is rated: two minutes after it, where its source is read in time.
        """
        query = ask.query
        position = decode_cursor(query.cursor, str)
        span = span_of(query, clock.now(), MONTH)
        scope = _scope(ask.user_id, query.network, span)
        after = None if position is None else read_uuid(position[0])
        rows = await reads.used(database, scope, after, query.limit + 1)
        page = Page.of(rows, query.limit, "account_id")
        data = [
            AccountUsed(
                accountId=str(row["account_id"]),
                subject=str(row["subject"]),
                name=row["name"],
                minutes=row["minutes"],
                lastMinute=_iso(row["last_minute"]),
                **_used(row),
            )
            for row in page.rows
        ]
        totals = Used(**_used(await reads.total_used(database, scope)))
        return Answer(UsageSummary(data=data, totals=totals, meta=page.meta, period=span.shown))

    @routes.add("GET", "/api/account/usage/buckets", access=Access.USER, query=BucketsQuery, answers={200: BucketList})
    async def list_counter_minutes(ask: Ask[Any, BucketsQuery, Any]) -> Answer:
        """What counters of yours used, minute by minute, the latest first."""
        query = ask.query
        span = span_of(query, clock.now(), DAY)
        scope = _scope(ask.user_id, query.network, span)
        rows = await reads.buckets(database, scope, query.accountId, _before(query.cursor), query.limit + 1)
        shown, more = rows[: query.limit], len(rows) > query.limit
        cursor = None
        if more:
            last = shown[-1]
            cursor = encode_cursor(microseconds(last["bucket_start"]), *(str(last[name]) for name in _BUCKET_KEY))
        data = [
            Bucket(
                bucketStart=iso(row["bucket_start"]),
                accountId=str(row["account_id"]),
                env=row["env"],
                nodeId=row["node_id"],
                meter=row["meter"],
                region=row["region"],
                line=row["line"],
                multiplier=_plain(row["multiplier"]),
                **_used(row),
            )
            for row in shown
        ]
        meta = PageMeta(limit=query.limit, nextCursor=cursor, hasMore=more)
        return Answer(BucketList(data=data, meta=meta, period=span.shown))

    @routes.add(
        "GET",
        "/api/account/billing/summary",
        access=Access.USER,
        query=NetworkQuery,
        answers={200: BillingSummary},
        problems=("VAULT_NOT_FOUND",),
    )
    async def get_counter_billing(ask: Ask[Any, NetworkQuery, Any]) -> Answer:
        """How your vault stands, and on what terms it pays for counters."""
        vault = await reads.vault_of(database, UserId(ask.user_id), ask.query.network)
        if vault is None:
            raise ProblemRaised("VAULT_NOT_FOUND", f"You have no vault on {ask.query.network}")
        accounts = await reads.accounts_of(database, VaultId(str(vault["vault_id"])))
        standing = vault["standing"]
        return Answer(
            BillingSummary(
                vaultId=str(vault["vault_id"]),
                network=vault["network"],
                balance_usdc=usdc(vault["available"] + vault["held"] - vault["owed"]),
                available_usdc=usdc(vault["available"]),
                held_usdc=usdc(vault["held"]),
                owed_usdc=usdc(vault["owed"]),
                arrears=vault["owed"] > 0,
                arrearsSince=_iso(vault["arrears_since"]),
                throttle_state="throttled" if standing == "arrears" else "normal",
                suspend_state="suspended" if standing == "suspended" else "active",
                accounts=[_terms(row) for row in accounts],
            )
        )

    return routes


def _scope(user_id: str, network: str, span: Span) -> reads.Scope:
    return reads.Scope(UserId(user_id), network, span.since, span.until)


def _used(row: Mapping[str, Any]) -> dict[str, Any]:
    total = row["up"] + row["down"]
    return {
        "up": row["up"],
        "down": row["down"],
        "total": total,
        "included": row["included"],
        "charged": total - row["included"],
        "cost_usdc": usdc(row["amount"]),
    }


def _terms(row: Mapping[str, Any]) -> AccountTerms:
    return AccountTerms(
        accountId=str(row["account_id"]),
        subject=str(row["subject"]),
        name=row["name"],
        active=row["active"],
        unitPrice=None if row["unit_price"] is None else _plain(row["unit_price"]),
        multiplier=_plain(row["region_multiplier"] * row["line_multiplier"]),
        ruleVersion=row["rule_version"],
        includedRemaining=row["included_granted"] - row["included_used"],
        lastRatedMinute=_iso(row["last_minute"]),
    )


def _plain(number: Decimal) -> str:
    """Return a number without an exponent and without zeros at its end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _iso(moment: Any) -> str | None:
    return None if moment is None else iso(moment)


def _before(cursor: str | None) -> tuple[object, ...] | None:
    position = decode_cursor(cursor, *_CURSOR)
    if position is None:
        return None
    try:
        multiplier = Decimal(position[-1])
    except InvalidOperation:
        multiplier = Decimal("NaN")
    if not multiplier.is_finite() or any("\0" in text for text in position[2:]):
        raise invalid("query.cursor", "must be meta.nextCursor of an earlier page", "INVALID_VALUE")
    return (moment_of(position[0]), read_uuid(position[1]), *position[2:-1], multiplier)
