"""Stellar transactions that Callora sends: stored before they are sent, ended once, never changed.

What must happen once is one conditional statement, and the constraints refuse what these forget: of any number of
processes that try, one finds the row as it must be.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import attrs

from callora.ledger.chain import Applied, ContractFault, Envelope, Retained
from callora.ledger.faults import StoreRefused
from callora.ledger.submission import FeeBump, Submission
from callora.store.bridge import Database, Row

_COLUMNS: Final = """
    encode(t.hash, 'hex') AS hash, encode(t.outer_hash, 'hex') AS outer_hash, t.network, t.epoch, t.purpose, t.envelope,
    t.source_account, t.sequence, extract(epoch FROM t.max_time)::bigint AS max_time, t.fee, t.bid, t.channel,
    t.sponsored, t.failed_before, t.state, t.sends, t.untaken, t.prepared_ledger, t.refusal, t.ledger, t.applied_at,
    t.result_code, t.operation_code, t.contract_error, t.reason, t.return_value, t.fee_charged, t.closes_purpose,
    (SELECT json_agg(json_build_array(encode(b.hash, 'hex'), b.envelope, b.fee, b.bid) ORDER BY b.bid)
     FROM chain_bumps b WHERE b.inner_hash = t.hash)::text AS bumps
"""

_ADD: Final = """
INSERT INTO chain_transactions (hash, outer_hash, network, epoch, purpose, envelope, source_account, sequence, max_time,
                                fee, prepared_ledger, bid, channel, sponsored, failed_before, state, stored_at)
VALUES (decode($1, 'hex'), decode($2, 'hex'), $3, $4, $5, $6, $7, $8, to_timestamp($9), $10, $11, $12, $13, $14, $15,
        'stored', $16)
"""

_FIND: Final = f"""
SELECT {_COLUMNS} FROM chain_transactions t
WHERE t.hash = decode($1, 'hex') OR t.outer_hash = decode($1, 'hex')
      OR t.hash = (SELECT b.inner_hash FROM chain_bumps b WHERE b.hash = decode($1, 'hex'))
"""  # noqa: S608 - columns of ours

_OF_PURPOSE: Final = f"""
SELECT {_COLUMNS} FROM chain_transactions t WHERE t.network = $1 AND t.purpose = $2 ORDER BY t.stored_at, t.hash
"""  # noqa: S608 - columns of ours

_OPEN: Final = f"""
SELECT {_COLUMNS}, t.stored_at, coalesce(t.sent_at, t.stored_at) AS touched_at FROM chain_transactions t
WHERE t.network = $1 AND t.state IN ('stored', 'sent', 'unresolved') ORDER BY t.stored_at, t.hash
"""  # noqa: S608 - columns of ours

_BUSY_CHANNELS: Final = """
SELECT source_account FROM chain_transactions
WHERE network = $1 AND epoch = $2 AND channel AND state IN ('stored', 'sent')
"""

_LAST_SEQUENCE: Final = """
SELECT max(sequence) FROM chain_transactions
WHERE network = $1 AND epoch = $2 AND source_account = $3 AND channel AND state IN ('succeeded', 'failed')
"""

_EPOCH: Final = "SELECT epoch, halted FROM chain_networks WHERE network = $1"

_BEGIN_SEND: Final = f"""
UPDATE chain_transactions t
SET state = 'sent', sends = t.sends + 1, sent_at = $2
WHERE t.hash = decode($1, 'hex') AND t.state IN ('stored', 'sent')
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

_NOTE_UNTAKEN: Final = f"""
UPDATE chain_transactions t SET untaken = t.untaken + 1, refusal = coalesce($2, t.refusal)
WHERE t.hash = decode($1, 'hex') AND t.state IN ('sent', 'unresolved') AND t.untaken < t.sends
RETURNING {_COLUMNS}
"""  # noqa: S608 - columns of ours

_ADD_BUMP: Final = """
INSERT INTO chain_bumps (hash, inner_hash, envelope, fee, bid, stored_at)
VALUES (decode($1, 'hex'), decode($2, 'hex'), $3, $4, $5, $6)
ON CONFLICT (hash) DO NOTHING
"""

_FINISH: Final = """
UPDATE chain_transactions
SET state = $2, ledger = $3, applied_at = $4, result_code = left($5, 120), operation_code = left($6, 120),
    contract_error = $7, reason = left($8, 500), return_value = $9, fee_charged = $10, closes_purpose = $11,
    ended_at = $12
WHERE hash = decode($1, 'hex') AND state IN ('stored', 'sent', 'unresolved')
RETURNING true
"""

_BURY: Final = """
UPDATE chain_transactions
SET state = 'dead', proof_closed_at = $2, proof_oldest = $3, proof_latest = $4, ended_at = $5
WHERE hash = decode($1, 'hex') AND state IN ('stored', 'sent', 'unresolved')
      AND ($2::timestamptz IS NOT NULL OR sends = untaken)
RETURNING true
"""

_SHELVE: Final = """
UPDATE chain_transactions SET state = 'unresolved', proof_closed_at = $2, proof_oldest = $3, proof_latest = $4
WHERE hash = decode($1, 'hex') AND state = 'sent'
RETURNING true
"""

Taken = Literal["purpose", "channel", "sequence", "network"]
"""What another one has already, or, of the network, that it is halted or on another history."""

_TAKEN: Final[Mapping[str | None, Taken]] = {
    "chain_transactions_one_open": "purpose",
    "chain_transactions_one_outcome": "purpose",
    "chain_transactions_one_a_channel": "channel",
    "chain_transactions_one_a_sequence": "sequence",
    "network_not_halted": "network",
}
_SAME: Final = ("chain_transactions_pkey", "chain_transactions_outer_hash_key")


@attrs.frozen
class Epoch:
    """Which history of its network Callora is on."""

    number: int
    halted: str | None
    """Why nothing may be sent until an operator has looked."""


@attrs.frozen
class OpenSubmission:
    """A submission that may be applied, with its dates."""

    submission: Submission
    stored_at: datetime
    touched_at: datetime
    """When it was last sent, or stored: who follows it sends it about every ledger."""


class TransactionStore:
    """What is stored of transactions.

    Every verb raises StoreUnavailable and StoreConflict: nothing was written. Those that write raise OutcomeUnknown
    too, and may be repeated then, but for `note_untaken`; `begin_send` counts once more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def epoch(self, network: str) -> Epoch:
        """Return the history that a network is on; the first, where nobody has looked yet."""
        row = await self._database.fetch_row(_EPOCH, network)
        return Epoch(1, None) if row is None else Epoch(row["epoch"], row["halted"])

    async def add(self, submission: Submission, now: datetime) -> Taken | None:
        """Store an envelope before it is sent; return what is in its way, or None. The same one again is no error.

        Raises:
            StoreRefused: another rule of the database is against it; nothing was written.

        Cancellation: it may be stored.
        """
        envelope = submission.envelope
        try:
            await self._database.execute(
                _ADD,
                submission.hash,
                None if envelope.inner_hash is None else envelope.hash,
                submission.network,
                submission.epoch,
                submission.purpose,
                envelope.xdr,
                envelope.source,
                envelope.sequence,
                envelope.max_time,
                envelope.fee,
                submission.prepared_ledger,
                submission.bid,
                submission.channel,
                submission.sponsored,
                submission.failed_before,
                now,
            )
        except StoreRefused as refused:
            if refused.constraint in _SAME:
                return None
            if refused.constraint in _TAKEN:
                return _TAKEN[refused.constraint]
            raise
        return None

    async def find(self, tx_hash: str) -> Submission | None:
        """Return what is stored under a hash: a transaction's own, or of a fee-bump around it."""
        row = await self._database.fetch_row(_FIND, tx_hash)
        return None if row is None else _submission(row)

    async def of_purpose(self, network: str, purpose: str) -> list[Submission]:
        """Return everything ever stored for a purpose, oldest first."""
        return [_submission(row) for row in await self._database.fetch(_OF_PURPOSE, network, purpose)]

    async def open_ones(self, network: str) -> list[OpenSubmission]:
        """Return what may be applied, of every history, oldest first."""
        rows = await self._database.fetch(_OPEN, network)
        return [OpenSubmission(_submission(row), row["stored_at"], row["touched_at"]) for row in rows]

    async def busy_channels(self, network: str, epoch: int) -> frozenset[str]:
        """Return the channel accounts whose next sequence number is in use."""
        rows = await self._database.fetch(_BUSY_CHANNELS, network, epoch)
        return frozenset(row["source_account"] for row in rows)

    async def last_sequence(self, network: str, epoch: int, channel: str) -> int | None:
        """Return the last sequence number that a channel is known to have used on chain."""
        found = await self._database.fetch_value(_LAST_SEQUENCE, network, epoch, channel)
        return None if found is None else int(found)

    async def begin_send(self, tx_hash: str, now: datetime) -> Submission | None:
        """Count a send that is about to be made, and return the submission; None where it may not be sent any more."""
        row = await self._database.fetch_row(_BEGIN_SEND, tx_hash, now)
        return None if row is None else _submission(row)

    async def note_untaken(self, tx_hash: str, refusal: str | None) -> Submission | None:
        """Count a send that provably came to nothing, once; return the submission, or None where it has ended.

        After OutcomeUnknown it must not be repeated: counted twice, it would hide a send that was taken.
        """
        row = await self._database.fetch_row(_NOTE_UNTAKEN, tx_hash, refusal)
        return None if row is None else _submission(row)

    async def add_bump(self, tx_hash: str, bump: FeeBump, now: datetime) -> bool:
        """Store a fee-bump before it is sent; False where another one is there already, or nothing may be sent."""
        envelope = bump.envelope
        try:
            await self._database.execute(_ADD_BUMP, envelope.hash, tx_hash, envelope.xdr, envelope.fee, bump.bid, now)
        except StoreRefused as refused:
            if refused.constraint in ("bumps_tenfold", "bumps_of_the_open"):
                return False
            raise
        return True

    async def finish(self, tx_hash: str, applied: Applied, now: datetime, *, closes_purpose: bool) -> bool:
        """Note that it is in a ledger; False where it has ended already."""
        fault = applied.fault
        found = await self._database.fetch_value(
            _FINISH,
            tx_hash,
            "succeeded" if applied.successful else "failed",
            applied.ledger,
            applied.closed_at,
            applied.result_code,
            applied.operation_code,
            None if fault is None else fault.contract_error,
            None if fault is None else fault.reason,
            applied.return_value,
            applied.fee_charged,
            closes_purpose,
            now,
        )
        return found is not None

    async def bury(self, tx_hash: str, proof: Retained | None, now: datetime) -> bool:
        """Note that it can never be applied; False where it has ended, or, without proof, a send of it may be taken.

        Args:
            proof: what a node had that did not know it; None: no send of it was taken.

        Raises:
            StoreRefused: the proof is none; nothing was written.
        """
        return await self._database.fetch_value(_BURY, tx_hash, *_proof(proof), now) is not None

    async def shelve(self, tx_hash: str, proof: Retained) -> bool:
        """Note that its time is past and nobody can tell what became of it; False where it is not sent any more."""
        return await self._database.fetch_value(_SHELVE, tx_hash, *_proof(proof)) is not None


def _proof(proof: Retained | None) -> tuple[datetime | None, int | None, int | None]:
    if proof is None:
        return None, None, None
    return proof.latest.closed_at, proof.oldest, proof.latest.sequence


def _submission(row: Row) -> Submission:
    own, outer = str(row["hash"]), row["outer_hash"]

    def envelope(xdr: str, tx_hash: str, inner: str | None, fee: int) -> Envelope:
        return Envelope(xdr, tx_hash, inner, row["source_account"], row["sequence"], row["max_time"], fee)

    made = envelope(row["envelope"], own, None, row["fee"])
    if outer is not None:
        made = envelope(row["envelope"], outer, own, row["fee"])
    bumps: list[list[Any]] = json.loads(row["bumps"] or "[]")
    return Submission(
        network=row["network"],
        epoch=row["epoch"],
        purpose=row["purpose"],
        envelope=made,
        prepared_ledger=row["prepared_ledger"],
        bid=row["bid"],
        channel=row["channel"],
        sponsored=row["sponsored"],
        failed_before=row["failed_before"],
        state=row["state"],
        sends=row["sends"],
        untaken=row["untaken"],
        bumps=tuple(FeeBump(envelope(xdr, tx_hash, own, fee), bid) for tx_hash, xdr, fee, bid in bumps),
        refusal=row["refusal"],
        applied=_applied(row),
        closes_purpose=row["closes_purpose"],
    )


def _applied(row: Row) -> Applied | None:
    if row["ledger"] is None:
        return None
    has_fault = row["contract_error"] is not None or row["reason"] is not None
    return Applied(
        successful=row["state"] == "succeeded",
        ledger=row["ledger"],
        closed_at=row["applied_at"].astimezone(UTC),
        result_code=row["result_code"],
        operation_code=row["operation_code"],
        fault=ContractFault(row["contract_error"], row["reason"] or "") if has_fault else None,
        return_value=row["return_value"],
        fee_charged=row["fee_charged"],
    )
