"""The ledger check that ends every paid run: what was answered was charged, once, and the balances say so exactly."""

from typing import Final

import attrs
import trio

from bench.postgres import Postgres

_SETTLE_SECONDS: Final = 20.0
"""How long calls that were cut off when the load stopped may take to have their holds released."""

_ARRIVE_SECONDS: Final = 0.1
"""How long a call that was read from a socket before the load stopped may take to its hold."""

_OPEN: Final = "SELECT count(*) FROM usage_events WHERE state = 'held'"
_BOOKS: Final = """
WITH usage AS (
    SELECT vault_id, count(*) AS rows, count(*) FILTER (WHERE state = 'captured') AS captured,
           count(*) FILTER (WHERE state = 'held') AS held, coalesce(sum(amount), 0) AS charged,
           coalesce(sum(credits), 0) AS burnt
    FROM usage_events GROUP BY vault_id
), entries AS (
    SELECT vault_id, sum(amount) AS moved FROM ledger_entries GROUP BY vault_id
)
SELECT coalesce(sum(u.rows), 0), coalesce(sum(u.captured), 0), coalesce(sum(u.held), 0), coalesce(sum(u.charged), 0),
       coalesce(sum(u.burnt), 0), sum(v.held),
       count(*) FILTER (WHERE v.available + v.held - v.owed <> coalesce(e.moved, 0) - coalesce(u.charged, 0))
FROM vaults v LEFT JOIN usage u USING (vault_id) LEFT JOIN entries e USING (vault_id)
"""


@attrs.frozen
class Books:
    """A lane's database at one instant, sums over all its vaults."""

    calls: int
    """Usage events: one for each hold ever placed."""
    captured: int
    """Of those, captured."""
    open_holds: int
    """Of those, still held."""
    charged: int
    """Σ captured amounts, stroops."""
    burnt: int
    """Σ captured credits, one for a call that they paid."""
    held: int
    """Σ held, stroops."""
    vaults_off: int
    """Vaults whose balance is not Σ entries - Σ captured amounts."""


@attrs.frozen
class Traffic:
    """What the load and the upstream saw of the run that is checked."""

    answered: int
    """Success answers that reached the load."""
    cut_off: int
    """The most calls that can have been on their way when the load stopped."""
    upstream_requests: int
    """Requests that reached the upstream; it answers all of them with success."""


async def read_books(postgres: Postgres, dsn: str, *, settle: bool = True) -> Books:
    """Return the books, by default once no hold is open any more or 20 s have passed."""
    if settle:
        await trio.sleep(_ARRIVE_SECONDS)
        with trio.move_on_after(_SETTLE_SECONDS):
            while (await postgres.query(dsn, _OPEN))[0][0] != "0":  # noqa: ASYNC110 - another process holds them
                await trio.sleep(0.05)
    return Books(*(int(value) for value in (await postgres.query(dsn, _BOOKS))[0]))


def complaints(before: Books, after: Books, traffic: Traffic, *, price: int) -> list[str]:
    """Return what is wrong with the books after a paid run, nothing when all is exact.

    With C = rows captured in the run, the check is: answered <= C (no delivered success without a charge);
    C <= answered + cut_off (no charge beyond calls whose answer was on its way when the load stopped);
    C <= upstream requests <= usage events of the run (nothing charged that was not asked for, nothing asked for without
    a hold; the difference are calls cancelled when the load stopped); Σ captured amounts = price × captured rows that
    no credit paid; for each vault, balance = Σ entries - Σ captured amounts; no hold left open.

    Args:
        before: the books when the run began.
        after: the books once its holds had time to be released.
        traffic: what the load and the upstream saw in between.
        price: of one call, stroops.
    """
    captured, calls = after.captured - before.captured, after.calls - before.calls
    answered, asked = traffic.answered, traffic.upstream_requests
    checks = {
        f"{answered} calls answered, {captured} captured": answered <= captured,
        f"{captured} captured, {answered} answered and at most {traffic.cut_off} cut off": (
            captured <= answered + traffic.cut_off
        ),
        f"{captured} captured, {asked} upstream requests": captured <= asked,
        f"{asked} upstream requests, {calls} holds": asked <= calls,
        f"{after.charged} stroops and {after.burnt} credits charged for {after.captured} calls": (
            after.charged == price * (after.captured - after.burnt)
        ),
        f"{after.vaults_off} vaults off balance": after.vaults_off == 0,
        f"{after.open_holds} holds open with {after.held} stroops": after.open_holds == 0 and after.held == 0,
    }
    return [complaint for complaint, holds in checks.items() if not holds]
