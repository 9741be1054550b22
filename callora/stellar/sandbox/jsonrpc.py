"""JSON-RPC: errors, the documents that tell them, and parameters read as stellar-rpc reads them."""

from typing import Any, Final, TypeAlias

Document: TypeAlias = dict[str, Any]

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
TIME_LIMIT: Final = -32001
"""A request took longer than a node allows; only the plan of faults makes it so."""
U32_MAX: Final = 2**32 - 1


class RpcError(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        """Make one.

        Args:
            code: as JSON-RPC numbers them.
            message: for the client.
        """
        super().__init__(message)
        self.code = code
        self.message = message


def error_document(request_id: Any, code: int, message: str) -> Document:
    """Return the answer that says what is wrong with a request.

    Args:
        request_id: the request's own; None where it cannot be told.
        code: as JSON-RPC numbers them.
    """
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}


def check_format(params: Document) -> None:
    """Refuse any form of XDR but base64.

    Raises:
        RpcError: another one is asked for.
    """
    if params.get("xdrFormat") not in (None, "", "base64"):
        raise RpcError(INVALID_PARAMS, "expected xdrFormat to be base64: the sandbox has no JSON form of XDR")


def text_in(params: Document, name: str) -> str:
    """Return a text; empty where there is none.

    Raises:
        RpcError: it is something else.
    """
    value = params.get(name)
    if not isinstance(value, str | None):
        raise RpcError(INVALID_PARAMS, f"invalid parameters: {name} must be a string")
    return value or ""


def number_in(params: Document, name: str) -> int | None:
    """Return a whole number of 32 bits; None where there is none or 0, which mean the same.

    Raises:
        RpcError: it is something else.
    """
    value = params.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= U32_MAX:
        raise RpcError(INVALID_PARAMS, f"invalid parameters: {name} must be a whole number of 32 bits")
    return value or None


def object_in(params: Document, name: str) -> Document:
    """Return an object; empty where there is none.

    Raises:
        RpcError: it is something else.
    """
    value = params.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RpcError(INVALID_PARAMS, f"invalid parameters: {name} must be an object")
    return value


def list_in(params: Document, name: str) -> list[Any]:
    """Return a list; empty where there is none.

    Raises:
        RpcError: it is something else.
    """
    value = params.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RpcError(INVALID_PARAMS, f"invalid parameters: {name} must be a list")
    return value


def toid_of(ledger: int, order: int, operation: int) -> int:
    """Return the number of an operation in all of history: it sorts as they happened."""
    return ledger << 32 | (order & 0xFFFFF) << 12 | operation & 0xFFF


def split_toid(toid: int) -> tuple[int, int, int]:
    """Return ledger, order and operation of such a number."""
    return toid >> 32, toid >> 12 & 0xFFFFF, toid & 0xFFF
