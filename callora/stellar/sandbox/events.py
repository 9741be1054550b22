"""The events that the network itself emits, in the name of an asset's contract: fees, and what classic operations move.

Source: CAP-67.
"""

import hashlib
from functools import lru_cache
from typing import Final

from stellar_sdk import Address, StrKey, scval, xdr

from callora.stellar.sandbox.accounts import issuer_of
from callora.stellar.sandbox.classic import account_of
from callora.stellar.sandbox.state import Event, Operation, address_of

NATIVE: Final = xdr.Asset(xdr.AssetType.ASSET_TYPE_NATIVE)


def contract_id_of_asset(network_id: bytes, asset: xdr.Asset) -> bytes:
    """Return the id of an asset's contract, 32 bytes."""
    return _contract_id_of_asset(network_id, asset.to_xdr_bytes())


@lru_cache(maxsize=256)
def _contract_id_of_asset(network_id: bytes, asset: bytes) -> bytes:
    preimage = xdr.HashIDPreimage(
        xdr.EnvelopeType.ENVELOPE_TYPE_CONTRACT_ID,
        contract_id=xdr.HashIDPreimageContractID(
            xdr.Hash(network_id),
            xdr.ContractIDPreimage(
                xdr.ContractIDPreimageType.CONTRACT_ID_PREIMAGE_FROM_ASSET,
                from_asset=xdr.Asset.from_xdr_bytes(asset),
            ),
        ),
    )
    return hashlib.sha256(preimage.to_xdr_bytes()).digest()


def asset_code(asset: xdr.Asset) -> str:
    """Return an asset's code; `native` for XLM."""
    if asset.alpha_num4 is not None:
        code = asset.alpha_num4.asset_code.asset_code4
    elif asset.alpha_num12 is not None:
        code = asset.alpha_num12.asset_code.asset_code12
    else:
        return "native"
    return code.rstrip(bytes(1)).decode("ascii")


def asset_name(asset: xdr.Asset) -> str:
    """Return an asset as events name it: `native`, or `CODE:ISSUER`."""
    issuer = issuer_of(asset)
    return asset_code(asset) if issuer is None else f"{asset_code(asset)}:{issuer}"


def fee_event(network_id: bytes, payer: str, amount: int, stage: xdr.TransactionEventStage) -> xdr.TransactionEvent:
    """Return the event of a fee.

    Args:
        payer: `G…`.
        amount: stroops of XLM; negative where some of it goes back.
    """
    topics = [scval.to_symbol("fee"), scval.to_address(payer)]
    return xdr.TransactionEvent(stage, _event(network_id, NATIVE, topics, amount))


def events_of(network_id: bytes, operation: Operation) -> tuple[xdr.ContractEvent, ...]:
    """Return the events of a classic operation that succeeded."""
    payment, create = operation.body.payment_op, operation.body.create_account_op
    if payment is not None:
        return (_moved(network_id, payment.asset, operation.source, account_of(payment.destination), payment.amount),)
    if create is not None and create.starting_balance.int64:
        moved = _moved(network_id, NATIVE, operation.source, address_of(create.destination), create.starting_balance)
        return (moved,)
    return ()


def _moved(network_id: bytes, asset: xdr.Asset, source: str, to: str, amount: xdr.Int64) -> xdr.ContractEvent:
    issuer = issuer_of(asset)
    if issuer == source and issuer != to:
        topics = [scval.to_symbol("mint"), scval.to_address(to)]
    elif issuer == to and issuer != source:
        topics = [scval.to_symbol("burn"), scval.to_address(source)]
    else:
        topics = [scval.to_symbol("transfer"), scval.to_address(source), scval.to_address(to)]
    return _event(network_id, asset, [*topics, scval.to_string(asset_name(asset))], amount.int64)


def _event(network_id: bytes, asset: xdr.Asset, topics: list[xdr.SCVal], amount: int) -> xdr.ContractEvent:
    return xdr.ContractEvent(
        xdr.ExtensionPoint(0),
        xdr.ContractID(xdr.Hash(contract_id_of_asset(network_id, asset))),
        xdr.ContractEventType.CONTRACT,
        xdr.ContractEventBody(0, xdr.ContractEventV0(topics, scval.to_int128(amount))),
    )


def told(event: xdr.ContractEvent) -> Event:
    """Return an event as a node tells it."""
    assert event.body.v0 is not None
    contract = event.contract_id
    return Event(
        kind=event.type.name.lower(),
        contract_id=StrKey.encode_contract(contract.contract_id.hash) if contract is not None else None,
        topics=tuple(topic.to_xdr() for topic in event.body.v0.topics),
        value=event.body.v0.data.to_xdr(),
        xdr=event.to_xdr(),
    )


def address_text(value: xdr.SCVal) -> str:
    """Return an address of an event, `G…` or `C…`."""
    assert value.address is not None
    return Address.from_xdr_sc_address(value.address).address
