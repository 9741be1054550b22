"""What Horizon tells of accounts, ledgers, transactions, operations and effects, as JSON documents.

The shapes are Horizon's, with the fields that a client has a use for. Links are templates to absolute addresses.
"""

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import attrs
from stellar_sdk import StrKey, xdr

from callora.stellar.sandbox import classic, transactions
from callora.stellar.sandbox.accounts import LINE_AUTHORIZED, LINE_CLAWBACK, LINE_MAINTAIN, find_account, issuer_of
from callora.stellar.sandbox.events import asset_code
from callora.stellar.sandbox.state import (
    Entry,
    Header,
    Included,
    Keyed,
    Operation,
    Transaction,
    Undecodable,
    account_id,
    account_key,
    address_of,
)

Document: TypeAlias = dict[str, Any]
_UNIT: Final = 10_000_000
_ACCOUNT_FLAGS: Final = {
    "auth_required": xdr.AccountFlags.AUTH_REQUIRED_FLAG,
    "auth_revocable": xdr.AccountFlags.AUTH_REVOCABLE_FLAG,
    "auth_immutable": xdr.AccountFlags.AUTH_IMMUTABLE_FLAG,
    "auth_clawback_enabled": xdr.AccountFlags.AUTH_CLAWBACK_ENABLED_FLAG,
}
_HOST_FUNCTIONS: Final = {
    xdr.HostFunctionType.HOST_FUNCTION_TYPE_INVOKE_CONTRACT: "HostFunctionTypeHostFunctionTypeInvokeContract",
    xdr.HostFunctionType.HOST_FUNCTION_TYPE_CREATE_CONTRACT: "HostFunctionTypeHostFunctionTypeCreateContract",
    xdr.HostFunctionType.HOST_FUNCTION_TYPE_CREATE_CONTRACT_V2: "HostFunctionTypeHostFunctionTypeCreateContractV2",
    xdr.HostFunctionType.HOST_FUNCTION_TYPE_UPLOAD_CONTRACT_WASM: "HostFunctionTypeHostFunctionTypeUploadContractWasm",
}


def toid(ledger: int, order: int = 0, operation: int = 0) -> int:
    """Return the number by which Horizon knows a ledger, a transaction in it or an operation of that.

    Args:
        order: of the transaction, from 1.
        operation: from 1.
    """
    return ledger << 32 | order << 12 | operation


def amount_text(stroops: int) -> str:
    """Return an amount with seven decimals."""
    return f"{stroops // _UNIT}.{stroops % _UNIT:07d}"


def instant_text(seconds: int) -> str:
    """Return an instant, as `2026-01-01T00:00:00Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def asset_document(asset: xdr.Asset) -> Document:
    """Return the fields that say which asset something is of."""
    issuer = issuer_of(asset)
    if issuer is None:
        return {"asset_type": "native"}
    kind = "credit_alphanum4" if asset.alpha_num4 is not None else "credit_alphanum12"
    return {"asset_type": kind, "asset_code": asset_code(asset), "asset_issuer": issuer}


def account_document(reader: Keyed, address: str, base: str) -> Document | None:
    """Return an account; None where there is none.

    Args:
        address: `G…`.
        base: Horizon's own address, without a slash at its end.
    """
    account, entry = find_account(reader, address), reader.get(account_key(address))
    if account is None or entry is None:
        return None
    weight, low, medium, high = account.thresholds.thresholds
    signers = [
        {"weight": each.weight.uint32, "key": StrKey.encode_ed25519_public_key(each.key.ed25519.uint256)}
        for each in account.signers
        if each.key.ed25519 is not None
    ]
    signers.append({"weight": weight, "key": address})
    url = f"{base}/accounts/{address}"
    return {
        "_links": {
            "self": {"href": url},
            **{
                name: {"href": f"{url}/{name}{{?cursor,limit,order}}", "templated": True}
                for name in ("transactions", "operations", "payments", "effects")
            },
            "data": {"href": f"{url}/data/{{key}}", "templated": True},
        },
        "id": address,
        "account_id": address,
        "sequence": str(account.seq_num.sequence_number.int64),
        "subentry_count": account.num_sub_entries.uint32,
        **({"home_domain": account.home_domain.string32.decode("ascii")} if account.home_domain.string32 else {}),
        "last_modified_ledger": entry.last_modified,
        "thresholds": {"low_threshold": low, "med_threshold": medium, "high_threshold": high},
        "flags": {name: bool(account.flags.uint32 & flag) for name, flag in _ACCOUNT_FLAGS.items()},
        "balances": [*_line_documents(reader, address), _native_document(account)],
        "signers": [{**each, "type": "ed25519_public_key"} for each in signers],
        "data": {name: base64.b64encode(value).decode() for name, value in account_data(reader, address)},
        "num_sponsoring": 0,
        "num_sponsored": 0,
        "paging_token": address,
    }


def account_data(reader: Keyed, address: str) -> Iterator[tuple[str, bytes]]:
    """Return the names and values of an account's data entries."""
    for entry in _entries_of(reader, address, xdr.LedgerEntryType.DATA):
        assert entry.data.data is not None
        yield entry.data.data.data_name.string64.decode("ascii"), entry.data.data.data_value.data_value


def _entries_of(reader: Keyed, address: str, kind: xdr.LedgerEntryType) -> Iterator[Entry]:
    for key in reader.keys(kind.to_xdr_bytes() + account_id(address).to_xdr_bytes()):
        entry = reader.get(key)
        assert entry is not None
        yield entry


def _line_documents(reader: Keyed, address: str) -> Iterator[Document]:
    for entry in _entries_of(reader, address, xdr.LedgerEntryType.TRUSTLINE):
        line = entry.data.trust_line
        assert line is not None
        flags = line.flags.uint32
        asset = xdr.Asset(line.asset.type, alpha_num4=line.asset.alpha_num4, alpha_num12=line.asset.alpha_num12)
        yield {
            "balance": amount_text(line.balance.int64),
            "limit": amount_text(line.limit.int64),
            "buying_liabilities": amount_text(0),
            "selling_liabilities": amount_text(0),
            "last_modified_ledger": entry.last_modified,
            "is_authorized": bool(flags & LINE_AUTHORIZED),
            "is_authorized_to_maintain_liabilities": bool(flags & (LINE_AUTHORIZED | LINE_MAINTAIN)),
            "is_clawback_enabled": bool(flags & LINE_CLAWBACK),
            **asset_document(asset),
        }


def _native_document(account: xdr.AccountEntry) -> Document:
    return {
        "balance": amount_text(account.balance.int64),
        "buying_liabilities": amount_text(0),
        "selling_liabilities": amount_text(0),
        "asset_type": "native",
    }


def ledger_document(header: Header, included: tuple[Included, ...], network_id: bytes, base: str) -> Document:
    """Return a ledger, with how many transactions it has."""
    url = f"{base}/ledgers/{header.sequence}"
    operations = [(each.successful, len(opened(each, network_id).operations)) for each in included]
    return {
        "_links": {"self": {"href": url}},
        "id": header.hash().hex(),
        "paging_token": str(toid(header.sequence)),
        "hash": header.hash().hex(),
        "prev_hash": header.previous_hash.hex(),
        "sequence": header.sequence,
        "successful_transaction_count": sum(successful for successful, _ in operations),
        "failed_transaction_count": sum(not successful for successful, _ in operations),
        "operation_count": sum(count for successful, count in operations if successful),
        "tx_set_operation_count": sum(count for _, count in operations),
        "closed_at": instant_text(header.closed_at),
        "total_coins": amount_text(header.total_coins),
        "fee_pool": amount_text(header.fee_pool),
        "base_fee_in_stroops": header.base_fee,
        "base_reserve_in_stroops": header.base_reserve,
        "max_tx_set_size": 1000,
        "protocol_version": header.protocol_version,
        "header_xdr": header.to_xdr().to_xdr(),
    }


def opened(included: Included, network_id: bytes) -> Transaction:
    """Return the transaction of an envelope that a ledger has."""
    transaction = transactions.decode(included.envelope, network_id)
    assert not isinstance(transaction, Undecodable)
    return transaction


@attrs.frozen
class Shown:
    """A transaction in a ledger, opened, for its documents."""

    included: Included
    transaction: Transaction
    base: str

    @classmethod
    def of(cls, included: Included, network_id: bytes, base: str) -> "Shown":
        """Open one."""
        return cls(included, opened(included, network_id), base)

    @property
    def _created_at(self) -> str:
        return instant_text(self.included.closed_at)

    def transaction_document(self) -> Document:
        """Return the transaction."""
        included, transaction = self.included, self.transaction
        url = f"{self.base}/transactions/{included.hash}"
        result = xdr.TransactionResult.from_xdr(included.result)
        token = str(toid(included.ledger, included.order))
        signatures = [_signature_text(each) for each in transaction.outer_signatures or transaction.signatures]
        told = {
            "_links": {
                "self": {"href": url},
                "account": {"href": f"{self.base}/accounts/{included.source}"},
                "ledger": {"href": f"{self.base}/ledgers/{included.ledger}"},
                "operations": {"href": f"{url}/operations{{?cursor,limit,order}}", "templated": True},
                "effects": {"href": f"{url}/effects{{?cursor,limit,order}}", "templated": True},
            },
            "id": included.hash,
            "paging_token": token,
            "successful": included.successful,
            "hash": included.hash,
            "ledger": included.ledger,
            "created_at": self._created_at,
            "source_account": included.source,
            "source_account_sequence": str(transaction.sequence),
            "fee_account": included.fee_source,
            "fee_charged": str(result.fee_charged.int64),
            "max_fee": str(transaction.fee),
            "operation_count": len(transaction.operations),
            "envelope_xdr": included.envelope,
            "result_xdr": included.result,
            "result_meta_xdr": included.meta,
            "fee_meta_xdr": included.fee_meta,
            **_memo_document(transaction.body.memo),
            "signatures": signatures,
        }
        bounds = _bounds_document(transaction.body.cond)
        if bounds is not None:
            told["preconditions"] = {"timebounds": bounds}
        if transaction.is_fee_bump:
            told["fee_bump_transaction"] = {"hash": included.hash, "signatures": signatures}
            told["inner_transaction"] = {
                "hash": included.inner_hash,
                "signatures": [_signature_text(each) for each in transaction.signatures],
                "max_fee": str(transaction.body.fee.uint32),
            }
        return told

    def operation_documents(self) -> Iterator[Document]:
        """Return its operations, in order."""
        for place, operation in enumerate(self.transaction.operations, start=1):
            number = str(toid(self.included.ledger, self.included.order, place))
            yield {
                "_links": {
                    "self": {"href": f"{self.base}/operations/{number}"},
                    "transaction": {"href": f"{self.base}/transactions/{self.included.hash}"},
                    "effects": {"href": f"{self.base}/operations/{number}/effects"},
                },
                "id": number,
                "paging_token": number,
                "transaction_successful": self.included.successful,
                "source_account": operation.source,
                "type": operation.body.type.name.lower(),
                "type_i": operation.body.type.value,
                "created_at": self._created_at,
                "transaction_hash": self.included.hash,
                **_details(operation),
            }

    def effect_documents(self) -> Iterator[Document]:
        """Return what its operations did to accounts; nothing unless it succeeded."""
        if not self.included.successful:
            return
        for place, operation in enumerate(self.transaction.operations, start=1):
            number = toid(self.included.ledger, self.included.order, place)
            for order, (address, kind, details) in enumerate(_effects(operation), start=1):
                yield {
                    "_links": {
                        "operation": {"href": f"{self.base}/operations/{number}"},
                    },
                    "id": f"{number:019d}-{order:010d}",
                    "paging_token": f"{number}-{order}",
                    "account": address,
                    "type": kind,
                    "type_i": _EFFECTS[kind],
                    "created_at": self._created_at,
                    **details,
                }


def _signature_text(signature: xdr.DecoratedSignature) -> str:
    return base64.b64encode(signature.signature.signature).decode()


def _bounds_document(conditions: xdr.Preconditions) -> Document | None:
    bounds = conditions.time_bounds or (conditions.v2 and conditions.v2.time_bounds)
    if not bounds:
        return None
    told = {"min_time": str(bounds.min_time.time_point.uint64)}
    if bounds.max_time.time_point.uint64:
        told["max_time"] = str(bounds.max_time.time_point.uint64)
    return told


def _memo_document(memo: xdr.Memo) -> Document:
    if memo.text is not None:
        return {"memo_type": "text", "memo": memo.text.decode("utf-8", "replace")}
    if memo.id is not None:
        return {"memo_type": "id", "memo": str(memo.id.uint64)}
    if memo.hash is not None:
        return {"memo_type": "hash", "memo": base64.b64encode(memo.hash.hash).decode()}
    if memo.ret_hash is not None:
        return {"memo_type": "return", "memo": base64.b64encode(memo.ret_hash.hash).decode()}
    return {"memo_type": "none"}


def _details(operation: Operation) -> Document:
    """Return what only this kind of operation has to tell."""
    body = operation.body
    if body.payment_op is not None:
        return {
            "from": operation.source,
            "to": classic.account_of(body.payment_op.destination),
            "amount": amount_text(body.payment_op.amount.int64),
            **asset_document(body.payment_op.asset),
        }
    if body.create_account_op is not None:
        return {
            "funder": operation.source,
            "account": address_of(body.create_account_op.destination),
            "starting_balance": amount_text(body.create_account_op.starting_balance.int64),
        }
    if body.change_trust_op is not None:
        asset = classic.asset_of(body.change_trust_op.line)
        return {
            "trustor": operation.source,
            "trustee": issuer_of(asset),
            "limit": amount_text(body.change_trust_op.limit.int64),
            **asset_document(asset),
        }
    if body.manage_data_op is not None:
        value = body.manage_data_op.data_value
        return {
            "name": body.manage_data_op.data_name.string64.decode("ascii", "replace"),
            "value": base64.b64encode(value.data_value).decode() if value is not None else None,
        }
    if body.bump_sequence_op is not None:
        return {"bump_to": str(body.bump_sequence_op.bump_to.sequence_number.int64)}
    if body.set_options_op is not None:
        return _options_details(body.set_options_op)
    if body.set_trust_line_flags_op is not None:
        return {
            "trustor": address_of(body.set_trust_line_flags_op.trustor),
            **asset_document(body.set_trust_line_flags_op.asset),
        }
    if body.invoke_host_function_op is not None:
        return _invocation_details(body.invoke_host_function_op)
    return {}


def _options_details(options: xdr.SetOptionsOp) -> Document:
    told: Document = {}
    for name, value in (
        ("master_key_weight", options.master_weight),
        ("low_threshold", options.low_threshold),
        ("med_threshold", options.med_threshold),
        ("high_threshold", options.high_threshold),
    ):
        if value is not None:
            told[name] = value.uint32
    if options.home_domain is not None:
        told["home_domain"] = options.home_domain.string32.decode("ascii", "replace")
    if options.signer is not None and options.signer.key.ed25519 is not None:
        told["signer_key"] = StrKey.encode_ed25519_public_key(options.signer.key.ed25519.uint256)
        told["signer_weight"] = options.signer.weight.uint32
    return told


def _invocation_details(invocation: xdr.InvokeHostFunctionOp) -> Document:
    function = invocation.host_function
    told: Document = {"function": _HOST_FUNCTIONS[function.type]}
    if function.invoke_contract is not None:
        call = function.invoke_contract
        parameters = [
            xdr.SCVal(xdr.SCValType.SCV_ADDRESS, address=call.contract_address),
            xdr.SCVal(xdr.SCValType.SCV_SYMBOL, sym=call.function_name),
            *call.args,
        ]
        told["parameters"] = [
            {"value": each.to_xdr(), "type": each.type.name.removeprefix("SCV_").title()} for each in parameters
        ]
    return told


_EFFECTS: Final = {
    "account_created": 0,
    "account_credited": 2,
    "account_debited": 3,
    "signer_created": 10,
    "signer_removed": 11,
    "trustline_created": 20,
    "trustline_removed": 21,
    "data_created": 40,
    "data_removed": 41,
    "sequence_bumped": 43,
}


def _effects(operation: Operation) -> Iterator[tuple[str, str, Document]]:
    """Return account, kind and details of what an operation that succeeded did."""
    body, source = operation.body, operation.source
    if body.payment_op is not None:
        told = {"amount": amount_text(body.payment_op.amount.int64), **asset_document(body.payment_op.asset)}
        yield classic.account_of(body.payment_op.destination), "account_credited", told
        yield source, "account_debited", told
    elif body.create_account_op is not None:
        address = address_of(body.create_account_op.destination)
        amount = amount_text(body.create_account_op.starting_balance.int64)
        yield address, "account_created", {"starting_balance": amount}
        yield source, "account_debited", {"amount": amount, "asset_type": "native"}
        yield address, "signer_created", {"weight": 1, "public_key": address, "key": ""}
    elif body.change_trust_op is not None:
        limit = body.change_trust_op.limit.int64
        told = {"limit": amount_text(limit), **asset_document(classic.asset_of(body.change_trust_op.line))}
        yield source, "trustline_created" if limit else "trustline_removed", told
    elif body.manage_data_op is not None:
        name = body.manage_data_op.data_name.string64.decode("ascii")
        value = body.manage_data_op.data_value
        if value is None:
            yield source, "data_removed", {"name": name}
        else:
            yield source, "data_created", {"name": name, "value": base64.b64encode(value.data_value).decode()}
    elif body.bump_sequence_op is not None:
        yield source, "sequence_bumped", {"new_seq": str(body.bump_sequence_op.bump_to.sequence_number.int64)}
    elif body.set_options_op is not None and body.set_options_op.signer is not None:
        signer = body.set_options_op.signer
        assert signer.key.ed25519 is not None
        key = StrKey.encode_ed25519_public_key(signer.key.ed25519.uint256)
        weight = signer.weight.uint32
        yield source, "signer_created" if weight else "signer_removed", {"weight": weight, "public_key": key}
