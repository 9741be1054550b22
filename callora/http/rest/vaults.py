"""Vaults: opened once a network, their balances, and the statement of everything that moved them."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from callora.actors.vaults import VaultOpening
from callora.http.problems import ProblemRaised
from callora.http.rest.forms import (
    Form,
    Instant,
    InstantOut,
    Page,
    PageMeta,
    PageQuery,
    UsdcOut,
    decode_cursor,
    encode_cursor,
    invalid,
    iso,
    usdc,
)
from callora.http.rest.key_desk import after_id
from callora.http.rest.key_forms import Network
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import UserId, VaultId
from callora.ledger.statement import Bound, Position, after, before_moment, earlier, usage_position
from callora.store.reads.vaults import VaultReads

Kind = Literal["deposit", "withdrawal", "refund", "grant", "adjustment", "subscription", "usage"]
SignedUsdc = Annotated[str, Field(pattern=r"^-?[0-9]+\.[0-9]{7}$", examples=["-0.0100000"])]
_ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NEVER: Final = datetime(9999, 12, 31, tzinfo=UTC)


class VaultCreate(Form):
    """Where the vault shall be."""

    network: Network


class NetworkQuery(Form):
    """Which of the caller's vaults."""

    network: Network = "testnet"


class VaultOut(Form):
    """A vault."""

    vaultId: str
    network: Network
    plan: str
    standing: Literal["active", "arrears", "suspended"]
    balance_usdc: UsdcOut = Field(description="Available and held together, less what is owed.")
    available_usdc: UsdcOut
    held_usdc: UsdcOut = Field(description="Set aside for calls in hand.")
    owed_usdc: UsdcOut = Field(description="What counters charged beyond the balance; a deposit pays it first.")
    createdAt: InstantOut


class VaultList(Form):
    """The caller's vaults, at most one a network."""

    data: list[VaultOut]
    meta: PageMeta


class BalanceOut(Form):
    """What a vault has."""

    balance_usdc: UsdcOut = Field(description="Available and held together, less what is owed.")
    available_usdc: UsdcOut
    held_usdc: UsdcOut = Field(description="Set aside for calls in hand.")
    owed_usdc: UsdcOut = Field(description="What counters charged beyond the balance; a deposit pays it first.")
    contractId: str | None = Field(description="The vault contract; null until the chain is configured.")
    network: Network
    lastSyncedAt: InstantOut | None = Field(
        description="When a new ledger was last looked at for deposits; null before the first time."
    )


class StatementQuery(PageQuery):
    """Which lines."""

    network: Network = "testnet"
    from_: Instant | None = Field(None, alias="from", description="The first moment shown.")
    to: Instant | None = Field(None, description="The first moment not shown any more.")
    kind: Kind | None = None


class LineOut(Form):
    """One line: what moved the balance."""

    at: InstantOut
    kind: Kind
    amount_usdc: SignedUsdc = Field(description="Below 0 for what was spent.")
    ref: str
    eventId: str | None = Field(description="The usage event that is charged or refunded.")
    balance_after: UsdcOut | None = Field(description="The whole balance after an entry; null for usage.")


class Statement(Form):
    """A page of lines, the newest first."""

    data: list[LineOut]
    meta: PageMeta


Synced = Callable[[str], Awaitable[tuple[str, datetime] | None]]
"""Returns a network's vault contract and when its events were last looked at; None before the first time."""


def vaults_routes(opening: VaultOpening, reads: VaultReads, synced: Synced) -> Routes:
    """Return the routes of vaults."""
    routes = Routes("Vaults")

    async def own(user_id: str, network: str) -> Mapping[str, Any]:
        row = await reads.vault_on(network, UserId(user_id))
        if row is None:
            raise ProblemRaised("VAULT_NOT_FOUND", f"You have no vault on {network}")
        return row

    @routes.add("POST", "/api/vault", access=Access.USER, body=VaultCreate, answers={200: VaultOut, 201: VaultOut})
    async def open_vault(ask: Ask[Any, Any, VaultCreate]) -> Answer:
        """Open your vault on a network: 201 when it is new, 200 when you have it already."""
        opened = await opening.ensure(UserId(ask.user_id), ask.body.network)
        return Answer(_shown(await own(ask.user_id, ask.body.network)), 201 if opened.made else 200)

    @routes.add("GET", "/api/vaults", access=Access.USER, query=PageQuery, answers={200: VaultList})
    async def list_vaults(ask: Ask[Any, PageQuery, Any]) -> Answer:
        """Your vaults."""
        limit = ask.query.limit
        rows = await reads.vaults(UserId(ask.user_id), after=after_id(ask.query.cursor), limit=limit + 1)
        page = Page.of(rows, limit, "vault_id")
        return Answer(VaultList(data=[_shown(row) for row in page.rows], meta=page.meta))

    @routes.add(
        "GET",
        "/api/vault/balance",
        access=Access.USER,
        query=NetworkQuery,
        answers={200: BalanceOut},
        problems=("VAULT_NOT_FOUND",),
    )
    async def get_balance(ask: Ask[Any, NetworkQuery, Any]) -> Answer:
        """What your vault on a network has."""
        row = await own(ask.user_id, ask.query.network)
        contract_id, at = await synced(ask.query.network) or (None, None)
        return Answer(
            BalanceOut(
                balance_usdc=usdc(row["available"] + row["held"] - row["owed"]),
                owed_usdc=usdc(row["owed"]),
                available_usdc=usdc(row["available"]),
                held_usdc=usdc(row["held"]),
                contractId=contract_id,
                network=ask.query.network,
                lastSyncedAt=None if at is None else iso(at),
            )
        )

    @routes.add(
        "GET",
        "/api/vault/statement",
        access=Access.USER,
        query=StatementQuery,
        answers={200: Statement},
        problems=("VAULT_NOT_FOUND",),
    )
    async def get_statement(ask: Ask[Any, StatementQuery, Any]) -> Answer:
        """Everything that moved your vault's balance, the newest first.

        A call stands at the moment it began, from the moment it was charged on.
        """
        query = ask.query
        since, until = max(query.from_ or _ALWAYS, _ALWAYS), max(query.to or _NEVER, _ALWAYS)
        if since > until:
            raise invalid("query.to", "Must not lie before from", "INVALID_VALUE")
        row = await own(ask.user_id, query.network)
        lines = await reads.statement(
            VaultId(str(row["vault_id"])),
            since=since,
            until=earlier(before_moment(until), _bound(query.cursor)),
            kind=query.kind,
            limit=query.limit + 1,
        )
        shown = lines[: query.limit]
        more = len(lines) > query.limit
        return Answer(
            Statement(
                data=[
                    LineOut(
                        at=iso(line.at),
                        kind=line.kind,  # type: ignore[arg-type]
                        amount_usdc=usdc(line.amount),
                        ref=line.ref,
                        eventId=line.event_id,
                        balance_after=None if line.balance_after is None else usdc(line.balance_after),
                    )
                    for line in shown
                ],
                meta=PageMeta(
                    limit=query.limit, nextCursor=_cursor(shown[-1].position) if more else None, hasMore=more
                ),
            )
        )

    return routes


def _shown(row: Mapping[str, Any]) -> VaultOut:
    return VaultOut(
        vaultId=str(row["vault_id"]),
        network=row["network"],
        plan=row["plan_id"],
        standing=row["standing"],
        balance_usdc=usdc(row["available"] + row["held"] - row["owed"]),
        owed_usdc=usdc(row["owed"]),
        available_usdc=usdc(row["available"]),
        held_usdc=usdc(row["held"]),
        createdAt=iso(row["created_at"]),
    )


def _cursor(position: Position) -> str:
    return encode_cursor(position.event_id, position.micros, position.seq)


def _bound(cursor: str | None) -> Bound:
    """Return what comes after the last line that was shown."""
    position = decode_cursor(cursor, str, int, int)
    if position is None:
        return before_moment(_NEVER)
    event_id, micros, seq = position
    try:
        if micros < 0 or seq < 0:
            raise ValueError
        if micros or seq:
            return after(Position(micros // 1000, "", micros, seq))
        return after(usage_position(after_id(encode_cursor(event_id))))
    except (ValueError, OverflowError, ProblemRaised):
        raise invalid("query.cursor", "Must be meta.nextCursor of an earlier page", "INVALID_VALUE") from None
