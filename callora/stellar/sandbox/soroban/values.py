"""Contract values: what Python values look like as SCVals, and back, checked as a contract's own types check them.

Addresses are strings (`G…`, `C…`; `M…` only where a muxed one is allowed), symbols and strings are str, structures are
attrs classes. A value that has not the shape asked for is `Unfit`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, Generic, TypeVar, cast

import attrs
from stellar_sdk import Address, StrKey, scval, xdr

T = TypeVar("T")
U = TypeVar("U")

I128_MAX: Final = 2**127 - 1
I128_MIN: Final = -(2**127)
SYMBOL_CHARS_MAX: Final = 32
_SYMBOL: Final = re.compile(r"[A-Za-z0-9_]{0,32}", re.ASCII)
_KIND = xdr.SCValType
VOID_VALUE: Final = xdr.SCVal(_KIND.SCV_VOID)
_NUMBERS: Final = (
    _KIND.SCV_U32,
    _KIND.SCV_I32,
    _KIND.SCV_U64,
    _KIND.SCV_I64,
    _KIND.SCV_U128,
    _KIND.SCV_I128,
    _KIND.SCV_U256,
    _KIND.SCV_I256,
)


class Unfit(Exception):
    """A value has not the shape asked for."""


@attrs.frozen
class Shape(Generic[T]):
    """One type of contract values."""

    name: str
    encode: Callable[[T], xdr.SCVal]
    """Turn a value into an SCVal; raises Unfit for a number that is too large."""
    decode: Callable[[xdr.SCVal], T]
    """Turn an SCVal into a value; raises Unfit."""


def _expect(value: xdr.SCVal, kind: xdr.SCValType) -> None:
    if value.type != kind:
        raise Unfit(f"{value.type.name} where {kind.name} was expected")


def _decode_void(value: xdr.SCVal) -> None:
    _expect(value, _KIND.SCV_VOID)


def _decode_bool(value: xdr.SCVal) -> bool:
    _expect(value, _KIND.SCV_BOOL)
    return cast(bool, value.b)


def _decode_u32(value: xdr.SCVal) -> int:
    _expect(value, _KIND.SCV_U32)
    assert value.u32 is not None
    return value.u32.uint32


def _decode_u16(value: xdr.SCVal) -> int:
    number = _decode_u32(value)
    if number >= 2**16:
        raise Unfit("a number of more than 16 bits")
    return number


def _decode_u64(value: xdr.SCVal) -> int:
    _expect(value, _KIND.SCV_U64)
    assert value.u64 is not None
    return value.u64.uint64


def _decode_i128(value: xdr.SCVal) -> int:
    _expect(value, _KIND.SCV_I128)
    assert value.i128 is not None
    return (value.i128.hi.int64 << 64) | value.i128.lo.uint64


def _encode_i128(value: int) -> xdr.SCVal:
    if not I128_MIN <= value <= I128_MAX:
        raise Unfit("a number of more than 128 bits")
    parts = xdr.Int128Parts(xdr.Int64(value >> 64), xdr.Uint64(value & (2**64 - 1)))
    return xdr.SCVal(_KIND.SCV_I128, i128=parts)


def symbol(text: str) -> xdr.SCVal:
    """Return a symbol: at most 32 of A-Z, a-z, 0-9 and _."""
    return xdr.SCVal(_KIND.SCV_SYMBOL, sym=xdr.SCSymbol(text.encode()))


def _decode_symbol(value: xdr.SCVal) -> str:
    _expect(value, _KIND.SCV_SYMBOL)
    assert value.sym is not None
    text = value.sym.sc_symbol.decode("latin-1")
    if not _SYMBOL.fullmatch(text):
        raise Unfit("a symbol with characters that symbols have not")
    return text


def _encode_string(text: str) -> xdr.SCVal:
    return xdr.SCVal(_KIND.SCV_STRING, str=xdr.SCString(text.encode("utf-8", "surrogateescape")))


def _decode_string(value: xdr.SCVal) -> str:
    _expect(value, _KIND.SCV_STRING)
    assert value.str is not None
    return value.str.sc_string.decode("utf-8", "surrogateescape")


def _encode_bytes(value: bytes) -> xdr.SCVal:
    return xdr.SCVal(_KIND.SCV_BYTES, bytes=xdr.SCBytes(value))


def _decode_bytes(value: xdr.SCVal) -> bytes:
    _expect(value, _KIND.SCV_BYTES)
    assert value.bytes is not None
    return value.bytes.sc_bytes


def _decode_bytes32(value: xdr.SCVal) -> bytes:
    found = _decode_bytes(value)
    if len(found) != 32:
        raise Unfit("not 32 bytes")
    return found


@functools.lru_cache(maxsize=4096)
def sc_address(address: str) -> xdr.SCAddress:
    """Return the XDR of an address, never to be changed in place."""
    kinds = xdr.SCAddressType
    if address.startswith("C"):
        contract = xdr.ContractID(xdr.Hash(StrKey.decode_contract(address)))
        return xdr.SCAddress(kinds.SC_ADDRESS_TYPE_CONTRACT, contract_id=contract)
    if address.startswith("M"):
        raw = StrKey.decode_med25519_public_key(address)
        muxed = xdr.MuxedEd25519Account(xdr.Uint64(int.from_bytes(raw[32:], "big")), xdr.Uint256(raw[:32]))
        return xdr.SCAddress(kinds.SC_ADDRESS_TYPE_MUXED_ACCOUNT, muxed_account=muxed)
    key = xdr.PublicKey(
        xdr.PublicKeyType.PUBLIC_KEY_TYPE_ED25519, ed25519=xdr.Uint256(StrKey.decode_ed25519_public_key(address))
    )
    return xdr.SCAddress(kinds.SC_ADDRESS_TYPE_ACCOUNT, account_id=xdr.AccountID(key))


@functools.lru_cache(maxsize=4096)
def contract_text(contract_id: bytes) -> str:
    """Return a contract's id as text, `C…`."""
    return StrKey.encode_contract(contract_id)


@functools.lru_cache(maxsize=4096)
def _account_text(public_key: bytes) -> str:
    return StrKey.encode_ed25519_public_key(public_key)


def address_text(address: xdr.SCAddress) -> str:
    """Return an address as text: `G…`, `C…` or `M…`.

    Raises:
        Unfit: it is a claimable balance or a liquidity pool, which no contract here knows.
    """
    kinds = xdr.SCAddressType
    if address.type == kinds.SC_ADDRESS_TYPE_CONTRACT:
        assert address.contract_id is not None
        return contract_text(address.contract_id.contract_id.hash)
    if address.type == kinds.SC_ADDRESS_TYPE_ACCOUNT:
        assert address.account_id is not None
        assert address.account_id.account_id.ed25519 is not None
        return _account_text(address.account_id.account_id.ed25519.uint256)
    if address.type == kinds.SC_ADDRESS_TYPE_MUXED_ACCOUNT:
        assert address.muxed_account is not None
        muxed = address.muxed_account
        return StrKey.encode_med25519_public_key(muxed.ed25519.uint256 + muxed.id.uint64.to_bytes(8, "big"))
    raise Unfit("an address of a kind that contracts here do not know")


def address_order(address: str) -> tuple[int, bytes]:
    """Return what addresses sort by: accounts before contracts, then their bytes."""
    if address.startswith("C"):
        return 1, StrKey.decode_contract(address)
    return 0, StrKey.decode_ed25519_public_key(address)


def split_muxed(address: str) -> tuple[str, int | None]:
    """Return the account or contract of an address, and the number that a muxed one carries."""
    if not address.startswith("M"):
        return address, None
    raw = StrKey.decode_med25519_public_key(address)
    return StrKey.encode_ed25519_public_key(raw[:32]), int.from_bytes(raw[32:], "big")


def _encode_address(address: str) -> xdr.SCVal:
    return xdr.SCVal(_KIND.SCV_ADDRESS, address=sc_address(address))


def _decode_muxed(value: xdr.SCVal) -> str:
    _expect(value, _KIND.SCV_ADDRESS)
    assert value.address is not None
    return address_text(value.address)


def _decode_address(value: xdr.SCVal) -> str:
    text = _decode_muxed(value)
    if text.startswith("M"):
        raise Unfit("a muxed address")
    return text


VOID: Final = Shape[None]("void", lambda _: VOID_VALUE, _decode_void)
BOOL: Final = Shape[bool]("bool", lambda value: xdr.SCVal(_KIND.SCV_BOOL, b=value), _decode_bool)
U16: Final = Shape[int]("u16", lambda value: xdr.SCVal(_KIND.SCV_U32, u32=xdr.Uint32(value)), _decode_u16)
"""Contracts have no such type on the wire: a u32 that must fit."""
U32: Final = Shape[int]("u32", lambda value: xdr.SCVal(_KIND.SCV_U32, u32=xdr.Uint32(value)), _decode_u32)
U64: Final = Shape[int]("u64", lambda value: xdr.SCVal(_KIND.SCV_U64, u64=xdr.Uint64(value)), _decode_u64)
I128: Final = Shape[int]("i128", _encode_i128, _decode_i128)
SYMBOL: Final = Shape[str]("symbol", symbol, _decode_symbol)
STRING: Final = Shape[str]("string", _encode_string, _decode_string)
BYTES: Final = Shape[bytes]("bytes", _encode_bytes, _decode_bytes)
BYTES32: Final = Shape[bytes]("bytesN<32>", _encode_bytes, _decode_bytes32)
ADDRESS: Final = Shape[str]("address", _encode_address, _decode_address)
MUXED_ADDRESS: Final = Shape[str]("muxed address", _encode_address, _decode_muxed)


def option(shape: Shape[T]) -> Shape[T | None]:
    """Return the shape of a value or nothing, which is void."""

    def encode(value: T | None) -> xdr.SCVal:
        return VOID_VALUE if value is None else shape.encode(value)

    def decode(value: xdr.SCVal) -> T | None:
        return None if value.type == _KIND.SCV_VOID else shape.decode(value)

    return Shape(f"option<{shape.name}>", encode, decode)


def vec_value(items: Sequence[xdr.SCVal]) -> xdr.SCVal:
    """Return a vector of values."""
    return xdr.SCVal(_KIND.SCV_VEC, vec=xdr.SCVec(list(items)))


def _items(value: xdr.SCVal) -> list[xdr.SCVal]:
    _expect(value, _KIND.SCV_VEC)
    if value.vec is None:
        raise Unfit("a vector without its items")
    return value.vec.sc_vec


def vec(shape: Shape[T]) -> Shape[tuple[T, ...]]:
    """Return the shape of a vector of one type."""

    def encode(values: tuple[T, ...]) -> xdr.SCVal:
        return vec_value([shape.encode(value) for value in values])

    def decode(value: xdr.SCVal) -> tuple[T, ...]:
        return tuple(shape.decode(item) for item in _items(value))

    return Shape(f"vec<{shape.name}>", encode, decode)


def pair(first: Shape[T], second: Shape[U]) -> Shape[tuple[T, U]]:
    """Return the shape of two values of their own types."""

    def encode(values: tuple[T, U]) -> xdr.SCVal:
        return vec_value([first.encode(values[0]), second.encode(values[1])])

    def decode(value: xdr.SCVal) -> tuple[T, U]:
        items = _items(value)
        if len(items) != 2:
            raise Unfit("not a pair")
        return first.decode(items[0]), second.decode(items[1])

    return Shape(f"({first.name}, {second.name})", encode, decode)


def fields(value: xdr.SCVal) -> dict[str, xdr.SCVal]:
    """Return the members of a structure.

    Raises:
        Unfit: it is no map with symbols as keys.
    """
    _expect(value, _KIND.SCV_MAP)
    if value.map is None:
        raise Unfit("a map without its entries")
    return {_decode_symbol(entry.key): entry.val for entry in value.map.sc_map}


def struct_value(members: dict[str, xdr.SCVal]) -> xdr.SCVal:
    """Return a structure: a map with symbols as keys, in their order."""
    entries = [xdr.SCMapEntry(symbol(name), members[name]) for name in sorted(members)]
    return xdr.SCVal(_KIND.SCV_MAP, map=xdr.SCMap(entries))


def struct(made: type[T], **members: Shape[Any]) -> Shape[T]:
    """Return the shape of an attrs class.

    Args:
        made: the class, whose attributes are the members.
        members: their shapes, all of them.
    """

    def encode(value: T) -> xdr.SCVal:
        return struct_value({name: shape.encode(getattr(value, name)) for name, shape in members.items()})

    def decode(value: xdr.SCVal) -> T:
        found = fields(value)
        if found.keys() != members.keys():
            raise Unfit(f"not the members of {made.__name__}")
        return made(**{name: shape.decode(found[name]) for name, shape in members.items()})

    return Shape(made.__name__, encode, decode)


def unit_enum(made: type[IntEnum]) -> Shape[IntEnum]:
    """Return the shape of an enumeration whose variants carry nothing: a vector of the variant's name."""
    names = {_camel(variant.name): variant for variant in made}

    def encode(value: IntEnum) -> xdr.SCVal:
        return vec_value([symbol(_camel(value.name))])

    def decode(value: xdr.SCVal) -> IntEnum:
        items = _items(value)
        if len(items) != 1 or (name := _decode_symbol(items[0])) not in names:
            raise Unfit(f"no variant of {made.__name__}")
        return names[name]

    return Shape(made.__name__, encode, decode)


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


@attrs.frozen
class Slot(Generic[T]):
    """One place in a contract's storage."""

    key: xdr.SCVal
    shape: Shape[T]
    raw: bytes = attrs.field(init=False, default=attrs.Factory(lambda self: self.key.to_xdr_bytes(), takes_self=True))
    """The key's XDR."""


def slot(name: str, shape: Shape[T], *parts: xdr.SCVal) -> Slot[T]:
    """Return the place that a contract's enumeration of keys names: the variant's name, and what it carries."""
    return Slot(vec_value([symbol(name), *parts]), shape)


def value_order(value: xdr.SCVal) -> tuple[Any, ...]:
    """Return what the host sorts the keys of maps by: the kind, then the content.

    Raises:
        Unfit: no contract here has such keys.
    """
    kind = value.type
    if kind == _KIND.SCV_SYMBOL:
        assert value.sym is not None
        return kind, value.sym.sc_symbol
    if kind == _KIND.SCV_VEC:
        return kind, tuple(value_order(item) for item in _items(value))
    if kind == _KIND.SCV_STRING:
        assert value.str is not None
        return kind, value.str.sc_string
    if kind == _KIND.SCV_ADDRESS:
        return kind, address_order(_decode_address(value))
    raise Unfit(f"{kind.name} in the key of a map")


def sorted_map(entries: Iterable[xdr.SCMapEntry]) -> xdr.SCMap:
    """Return a map in the order that the host keeps."""
    return xdr.SCMap(sorted(entries, key=lambda entry: value_order(entry.key)))


def value_text(value: xdr.SCVal) -> str:
    """Return a value as a node writes it into the log of a failed simulation; a value of any kind, from anyone."""
    kind = value.type
    if kind == _KIND.SCV_VEC:
        items = value.vec.sc_vec if value.vec is not None else []
        return f"[{', '.join(map(value_text, items))}]"
    if kind == _KIND.SCV_MAP:
        entries = value.map.sc_map if value.map is not None else []
        return f"{{{', '.join(f'{value_text(entry.key)}: {value_text(entry.val)}' for entry in entries)}}}"
    if kind == _KIND.SCV_SYMBOL:
        assert value.sym is not None
        return value.sym.sc_symbol.decode("latin-1")
    if kind == _KIND.SCV_STRING:
        assert value.str is not None
        return f'"{value.str.sc_string.decode("utf-8", "replace")}"'
    if kind == _KIND.SCV_BYTES:
        return f"Bytes({_decode_bytes(value).hex()})"
    if kind == _KIND.SCV_ADDRESS:
        assert value.address is not None
        return Address.from_xdr_sc_address(value.address).address
    if kind == _KIND.SCV_VOID:
        return "Void"
    if kind == _KIND.SCV_BOOL:
        return str(value.b).lower()
    if kind in _NUMBERS:
        return str(scval.to_native(value))
    return kind.name
