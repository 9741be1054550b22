"""The audit: every invariant of the ledger that is a query. An empty answer is a clean ledger."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import attrs

from callora.store.bridge import Database

GRACE: Final = timedelta(seconds=30)
"""How long past its time a hold may wait for the sweep before the audit calls it overdue."""


@attrs.frozen
class Check:
    """One invariant."""

    rule: str
    """What must hold."""
    sql: str
    """Returns one row, `wrong` and `example`: how many break the rule, and one of them."""


@attrs.frozen
class Finding:
    """What a check found."""

    rule: str
    wrong: int
    example: str | None


_CHECKS: Final = (
    Check(
        "no vault has a negative balance",
        "SELECT count(*) AS wrong, min(vault_id::text) AS example FROM vaults WHERE available < 0 OR held < 0",
    ),
    Check(
        "what a vault holds is the sum of its open holds",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM (
            SELECT v.vault_id FROM vaults v
            LEFT JOIN (SELECT vault_id, sum(held_amount) AS held FROM usage_events WHERE state = 'held' GROUP BY 1) u
                ON u.vault_id = v.vault_id
            WHERE v.held <> coalesce(u.held, 0)
        ) AS w
        """,
    ),
    Check(
        "every balance is deposits + grants − withdrawals − captures + refunds",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM (
            SELECT v.vault_id FROM vaults v
            LEFT JOIN (SELECT vault_id, sum(amount) AS total FROM ledger_entries GROUP BY 1) e
                ON e.vault_id = v.vault_id
            LEFT JOIN (SELECT vault_id, sum(amount) AS total FROM usage_events WHERE state = 'captured' GROUP BY 1) u
                ON u.vault_id = v.vault_id
            WHERE v.available + v.held <> coalesce(e.total, 0) - coalesce(u.total, 0)
        ) AS w
        """,
    ),
    Check(
        "no hold outlives its time",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events
        WHERE state = 'held' AND expires_at < $1
        """,
    ),
    Check(
        "every usage event belongs to a vault",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events u
        WHERE NOT EXISTS (SELECT FROM vaults v WHERE v.vault_id = u.vault_id)
        """,
    ),
    Check(
        "a closed event keeps to what it held, and has an amount exactly when it is captured",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events
        WHERE amount < 0 OR amount > held_amount OR (state = 'captured') <> (amount IS NOT NULL)
              OR (state = 'held') <> (closed_at IS NULL)
        """,
    ),
    Check(
        "a captured event names what was delivered, or was deducted without a call",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events
        WHERE state = 'captured'
              AND (outcome = 'delivered' AND status IS NOT NULL OR outcome = 'deducted' AND status IS NULL) IS NOT TRUE
        """,
    ),
    Check(
        "no event is refunded beyond its capture",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM (
            SELECT e.event_id FROM ledger_entries e
            LEFT JOIN usage_events u ON u.vault_id = e.vault_id AND u.event_id = e.event_id AND u.state = 'captured'
            WHERE e.kind = 'refund' GROUP BY e.vault_id, e.event_id, u.amount
            HAVING sum(e.amount) > coalesce(u.amount, 0)
        ) AS w
        """,
    ),
    Check(
        "a vault's entries are numbered without a gap up to its counter",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM (
            SELECT v.vault_id FROM vaults v
            LEFT JOIN (SELECT vault_id, max(seq) AS last, count(*) AS entries FROM ledger_entries GROUP BY 1) e
                ON e.vault_id = v.vault_id
            WHERE v.entry_seq <> coalesce(e.last, 0) OR v.entry_seq <> coalesce(e.entries, 0)
        ) AS w
        """,
    ),
    Check(
        "an answered idempotency key belongs to a closed event and names its charge",
        """
        SELECT count(*) AS wrong, min(k.key) AS example FROM idempotency_keys k
        LEFT JOIN usage_events u ON u.vault_id = k.vault_id AND u.event_id = k.event_id
        WHERE k.state <> 'started' AND (u.state IS NULL OR u.state = 'held' OR k.charge <> coalesce(u.amount, 0))
        """,
    ),
    Check(
        "the final sums of usage are those of the events",
        """
        SELECT count(*) AS wrong, min(coalesce(e.vault_id, m.vault_id)::text) AS example FROM (
            SELECT vault_id, count(*) AS calls, coalesce(sum(amount), 0) AS amount FROM usage_events u
            WHERE state <> 'held' AND created_at < (SELECT done_until FROM usage_rollup)
                AND NOT EXISTS (SELECT FROM usage_open o WHERE o.vault_id = u.vault_id AND o.event_id = u.event_id)
            GROUP BY vault_id
        ) AS e FULL JOIN (
            SELECT vault_id, sum(calls) AS calls, sum(amount) AS amount FROM usage_minutes
            WHERE minute < (SELECT done_until FROM usage_rollup) GROUP BY vault_id HAVING sum(calls) > 0
        ) AS m ON m.vault_id = e.vault_id
        WHERE (e.calls, e.amount) IS DISTINCT FROM (m.calls, m.amount)
        """,
    ),
    Check(
        "a vault's days add up to its minutes",
        """
        SELECT count(*) AS wrong, min(coalesce(d.vault_id, m.vault_id)::text) AS example FROM (
            SELECT vault_id, sum(calls) AS calls, sum(amount) AS amount, sum(refunded) AS refunded FROM usage_days
            GROUP BY vault_id
        ) AS d FULL JOIN (
            SELECT vault_id, sum(calls) AS calls, sum(amount) AS amount, sum(refunded) AS refunded FROM usage_minutes
            GROUP BY vault_id
        ) AS m ON m.vault_id = d.vault_id
        WHERE (d.calls, d.amount, d.refunded) IS DISTINCT FROM (m.calls, m.amount, m.refunded)
        """,
    ),
    Check(
        "no usage event fell into the default partition",
        "SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events_default",
    ),
)


async def audit(database: Database, now: datetime) -> Sequence[Finding]:
    """Return what each check found; a ledger in use may be audited, each check sees one moment."""
    findings: list[Finding] = []
    for check in _CHECKS:
        arguments = (now - GRACE,) if "$1" in check.sql else ()
        row = await database.fetch_row(check.sql, *arguments)
        assert row is not None
        findings.append(Finding(check.rule, row["wrong"], row["example"]))
    return findings
