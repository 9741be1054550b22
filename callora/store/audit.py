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
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM vaults WHERE available < 0 OR held < 0 OR owed < 0
        """,
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
            WHERE v.available + v.held - v.owed <> coalesce(e.total, 0) - coalesce(u.total, 0)
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
        "a vault knows whether it has spending limits or quota grants",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM vaults v
        WHERE v.limited <> (EXISTS (SELECT FROM spending_limits l WHERE l.vault_id = v.vault_id)
                            OR EXISTS (SELECT FROM quota_grants g WHERE g.vault_id = v.vault_id))
        """,
    ),
    Check(
        "a vault's credits are its grants − what ended unburnt − what calls burnt and hold",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM (
            SELECT v.vault_id FROM vaults v
            LEFT JOIN (SELECT vault_id, sum(amount - lapsed) AS total FROM quota_grants GROUP BY 1) g
                ON g.vault_id = v.vault_id
            LEFT JOIN (SELECT vault_id, sum(coalesce(credits, held_credits)) AS total FROM usage_events GROUP BY 1) u
                ON u.vault_id = v.vault_id
            WHERE v.credits <> coalesce(g.total, 0) - coalesce(u.total, 0)
        ) AS w
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
        "a captured event names what was delivered, or was charged without a call",
        """
        SELECT count(*) AS wrong, min(event_id::text) AS example FROM usage_events
        WHERE state = 'captured'
              AND (outcome IN ('delivered', 'shortfall', 'quantity_unreadable', 'stream_ended', 'stream_cut')
                       AND status IS NOT NULL
                   OR outcome IN ('deducted', 'shortfall', 'metered') AND status IS NULL) IS NOT TRUE
        """,
    ),
    Check(
        "who owes is in arrears or suspended, and since when is known",
        """
        SELECT count(*) AS wrong, min(vault_id::text) AS example FROM vaults
        WHERE (owed > 0) <> (arrears_since IS NOT NULL) OR owed > 0 AND standing = 'active'
            OR standing_for_debt AND owed = 0
        """,
    ),
    Check(
        "a metered charge is the sum of the deltas that it carries",
        """
        SELECT count(*) AS wrong, min(coalesce(u.event_id, d.event_id)::text) AS example FROM (
            SELECT vault_id, event_id, api_key_id AS account_id, amount, quantity FROM usage_events
            WHERE outcome = 'metered'
        ) AS u FULL JOIN (
            SELECT vault_id, event_id, account_id, sum(amount) AS amount, sum(up + down) AS quantity FROM counter_deltas
            GROUP BY vault_id, event_id, account_id
        ) AS d ON d.vault_id = u.vault_id AND d.event_id = u.event_id AND d.account_id = u.account_id
        WHERE (u.amount, u.quantity) IS DISTINCT FROM (d.amount, d.quantity)
        """,
    ),
    Check(
        "what a counter was rated by is without gaps in each epoch, up to its checkpoint",
        """
        SELECT count(*) AS wrong, min(counter_id::text) AS example FROM (
            SELECT d.*, c.counter_id AS known, c.epoch AS present, c.up AS last_up, c.down AS last_down, c.seen_at,
                   lag(d.from_up + d.up) OVER epochs AS before_up, lag(d.from_down + d.down) OVER epochs AS before_down,
                   lag(d.collected_at) OVER epochs AS before_at,
                   row_number() OVER epochs = count(*) OVER (PARTITION BY d.vault_id, d.counter_id, d.epoch) AS latest
            FROM counter_deltas d
            LEFT JOIN counter_checkpoints c ON c.vault_id = d.vault_id AND c.counter_id = d.counter_id
                AND c.account_id = d.account_id
            WINDOW epochs AS (PARTITION BY d.vault_id, d.counter_id, d.epoch ORDER BY d.from_up, d.from_down)
        ) AS w
        WHERE known IS NULL OR epoch > present OR collected_at > seen_at OR collected_at <= before_at
            OR (from_up, from_down) <> (before_up, before_down)
            OR latest AND epoch = present AND (from_up + up, from_down + down) <> (last_up, last_down)
        """,
    ),
    Check(
        "the included units of an account that are used are those of its deltas",
        """
        SELECT count(*) AS wrong, min(a.account_id::text) AS example FROM counter_accounts a LEFT JOIN (
            SELECT vault_id, account_id, sum(included) AS used FROM counter_deltas GROUP BY vault_id, account_id
        ) AS d ON d.vault_id = a.vault_id AND d.account_id = a.account_id
        WHERE a.included_used <> coalesce(d.used, 0)
        """,
    ),
    Check(
        "a service's hold that is captured names its transaction, and for how much",
        """
        SELECT count(*) AS wrong, min(h.hold_id::text) AS example FROM external_holds h
        JOIN usage_events u ON u.vault_id = h.vault_id AND u.event_id = h.event_id
        WHERE u.state = 'captured'
            AND (h.transaction_id IS NULL OR (u.outcome = 'shortfall') <> (u.amount < h.asked_amount))
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
        "a dispute is refunded exactly where the ledger has its refund",
        """
        SELECT count(*) AS wrong, min(d.dispute_id::text) AS example FROM disputes d
        LEFT JOIN ledger_entries e
            ON e.vault_id = d.vault_id AND e.kind = 'refund' AND e.ref = 'dispute:' || d.dispute_id
        WHERE d.status = 'REFUNDED' AND (e.event_id, e.amount) IS DISTINCT FROM (d.event_id, d.refunded)
            OR d.status IN ('OPEN', 'UPHELD') AND e.ref IS NOT NULL
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
        "revenue is that of the events, each once",
        """
        SELECT count(*) AS wrong, min(coalesce(u.vault_id, e.vault_id)::text) AS example FROM (
            SELECT vault_id, count(*) AS events, sum(amount) AS gross FROM usage_events u
            WHERE state = 'captured' AND amount > 0 AND created_at < (SELECT done_until FROM revenue_index)
                AND NOT EXISTS (SELECT FROM revenue_open o WHERE o.vault_id = u.vault_id AND o.event_id = u.event_id)
            GROUP BY vault_id
        ) AS u FULL JOIN (
            SELECT vault_id, count(*) AS events, sum(gross) AS gross FROM revenue_entries
            WHERE refund_seq = 0 AND at < (SELECT done_until FROM revenue_index) GROUP BY vault_id
        ) AS e ON e.vault_id = u.vault_id
        WHERE (u.events, u.gross) IS DISTINCT FROM (e.events, e.gross)
        """,
    ),
    Check(
        "an entry of revenue is what its event or refund says",
        """
        SELECT count(*) AS wrong, min(e.event_id::text) AS example FROM revenue_entries e
        LEFT JOIN usage_events u ON u.vault_id = e.vault_id AND u.event_id = e.event_id AND u.state = 'captured'
        LEFT JOIN ledger_entries r ON r.vault_id = e.vault_id AND r.seq = e.refund_seq AND r.kind = 'refund'
        WHERE e.developer_id IS DISTINCT FROM u.developer_id
            OR e.gross IS DISTINCT FROM CASE WHEN e.refund_seq = 0 THEN u.amount ELSE -r.amount END
        """,
    ),
    Check(
        "a developer's account is the sum of his entries",
        """
        SELECT count(*) AS wrong, min(coalesce(a.developer_id, e.developer_id)::text) AS example
        FROM revenue_accounts a FULL JOIN (
            SELECT network, developer_id, count(*) AS entries, sum(gross) AS gross, sum(fee) AS fee
            FROM revenue_entries GROUP BY network, developer_id
        ) AS e ON e.network = a.network AND e.developer_id = a.developer_id
        WHERE (a.entries, a.gross, a.fee) IS DISTINCT FROM (e.entries, e.gross, e.fee)
        """,
    ),
    Check(
        "what is sealed of an account is in settlements that did not fail, without gaps",
        """
        SELECT count(*) AS wrong, min(a.developer_id::text) AS example FROM revenue_accounts a LEFT JOIN (
            SELECT i.network, i.developer_id, sum(i.gross) AS gross, sum(i.fee) AS fee, max(i.to_pass) AS last,
                   bool_and(i.from_pass = i.before) AS gapless
            FROM (SELECT i.*, lag(i.to_pass, 1, 0::bigint) OVER (PARTITION BY i.network, i.developer_id
                                                               ORDER BY i.to_pass) AS before
                  FROM settlement_items i JOIN settlements s USING (settlement_id)
                  WHERE s.state <> 'failed' AND i.developer_id IS NOT NULL) AS i
            GROUP BY i.network, i.developer_id
        ) AS i ON i.network = a.network AND i.developer_id = a.developer_id
        WHERE (a.sealed_gross, a.sealed_fee, a.sealed_pass)
              IS DISTINCT FROM (coalesce(i.gross, 0), coalesce(i.fee, 0), coalesce(i.last, 0))
            OR NOT coalesce(i.gapless, true)
        """,
    ),
    Check(
        "what a settlement charges for a developer is the sum of the entries it sealed",
        """
        SELECT count(*) AS wrong, min(i.settlement_id::text) AS example FROM settlement_items i
        WHERE i.developer_id IS NOT NULL AND i.gross <> (
            SELECT coalesce(sum(e.gross), 0) FROM revenue_entries e
            WHERE e.network = i.network AND e.developer_id = i.developer_id
                AND e.pass > i.from_pass AND e.pass <= i.to_pass)
        """,
    ),
    Check(
        "what is charged or credited on chain is so once, for a settlement that did not fail",
        """
        SELECT count(*) AS wrong, min(purpose) AS example FROM (
            SELECT t.purpose FROM chain_transactions t
            LEFT JOIN settlements s ON s.settlement_id::text = split_part(t.purpose, ':', 2) AND s.epoch = t.epoch
            WHERE (t.purpose LIKE 'charge:%' OR t.purpose LIKE 'credit:%') AND t.state = 'succeeded'
                AND t.epoch = (SELECT n.epoch FROM chain_networks n WHERE n.network = t.network)
            GROUP BY t.network, t.epoch, t.purpose, s.state
            HAVING count(*) > 1 OR s.state IS NULL OR s.state = 'failed'
        ) AS w
        """,
    ),
    Check(
        "what is credited of a settlement is each item once, and no more than was charged",
        """
        SELECT count(*) AS wrong, min(s.settlement_id::text) AS example FROM settlements s
        WHERE s.credit_total > s.charge_total
            OR (SELECT coalesce(sum(c.amount), 0) FROM settlement_credits c
                WHERE c.settlement_id = s.settlement_id AND c.state = 'credited') > s.credit_total
            OR (s.state = 'completed') <> ((SELECT coalesce(sum(c.amount), 0) FROM settlement_credits c
                WHERE c.settlement_id = s.settlement_id AND c.state = 'credited') = s.credit_total)
               AND s.state IN ('completed', 'open', 'sealed', 'charge_sent', 'charged')
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
        "a vault's hours add up to its minutes",
        """
        SELECT count(*) AS wrong, min(coalesce(h.vault_id, m.vault_id)::text) AS example FROM (
            SELECT vault_id, sum(amount) AS amount FROM key_hours GROUP BY vault_id
        ) AS h FULL JOIN (
            SELECT vault_id, sum(amount) AS amount FROM usage_minutes GROUP BY vault_id
        ) AS m ON m.vault_id = h.vault_id
        WHERE coalesce(h.amount, 0) <> coalesce(m.amount, 0)
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
