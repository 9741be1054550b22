"""Which key is this: what services that charge outside the proxy ask of a key that was presented to them."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from callora.actors.catalogue import Catalogue, Ended
from callora.http.rest.forms import Form, InstantOut, Uuid
from callora.http.rest.key_forms import Network, moment, network_text
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.keys import KeyRecord, is_well_formed

KEY_CHARS_MAX: Final = 256
"""Far more than a key has: what is none is told as such, and not as a wrong field."""

Refusal = Literal["UNAUTHORIZED", "API_KEY_DISABLED", "API_KEY_EXPIRED", "API_KEY_REVOKED"]
_REFUSALS: Final[dict[Ended, Refusal]] = {
    "disabled": "API_KEY_DISABLED",
    "expired": "API_KEY_EXPIRED",
    "revoked": "API_KEY_REVOKED",
}


class KeyCheck(Form):
    """A key to be looked at."""

    key: Annotated[str, StringConstraints(min_length=1, max_length=KEY_CHARS_MAX)] = Field(
        description="The whole secret, as it was presented to you. It is neither stored nor logged."
    )


class KeyRights(Form):
    """Whose key it is, and what it may be used for. Null in a list does not narrow it."""

    apiKeyId: Uuid = Field(description="What holds are placed for.")
    userId: Uuid
    vaultId: Uuid
    network: Network
    scopes: list[str] = Field(description="`*` is every scope.")
    allowedApis: list[int] | None = Field(description="Those of its own and of its plan's.")
    allowedEndpoints: list[int] | None
    allowedIps: list[str] | None = Field(description="Where it may be used from; only you know where it was.")
    expiresAt: InstantOut | None


class KeyChecked(Form):
    """Whether a key is one that calls are made with."""

    usable: bool
    refusal: Refusal | None = Field(
        description="The code that a call with it is refused with; null where it is usable."
    )
    apiKey: KeyRights | None = Field(description="Null unless it is usable.")


def key_check_routes(catalogue: Catalogue) -> Routes:
    """Return the route that looks at a key."""
    routes = Routes("Holds")

    @routes.add("POST", "/api/billing/keys/check", access=Access.SERVICE, body=KeyCheck, answers={200: KeyChecked})
    async def check_key(ask: Ask[Any, Any, KeyCheck]) -> Answer:
        """Which key was presented, and whether it may be used; asking is noted as its use.

        Asked of what is as new as for a call: a revoked key is refused within a second. Access tokens are for
        `/v1/call` alone and are no keys here.
        """
        text = ask.body.key.encode()
        key = await catalogue.key(text) if is_well_formed(text) else None
        if key is None:
            return Answer(KeyChecked(usable=False, refusal="UNAUTHORIZED", apiKey=None))
        ended = catalogue.end_of(key)
        if ended is not None:
            return Answer(KeyChecked(usable=False, refusal=_REFUSALS[ended], apiKey=None))
        network: Network = "mainnet" if text.startswith(b"ck_live_") else "testnet"
        return Answer(KeyChecked(usable=True, refusal=None, apiKey=_rights(key, network)))

    return routes


def _rights(key: KeyRecord, network: Network) -> KeyRights:
    apis, endpoints, networks = key.usable_apis, key.allowed_endpoints, key.allowed_networks
    return KeyRights(
        apiKeyId=key.api_key_id,
        userId=key.user_id,
        vaultId=key.vault_id,
        network=network,
        scopes=sorted(key.scopes),
        allowedApis=None if apis is None else sorted(apis),
        allowedEndpoints=None if endpoints is None else sorted(endpoints),
        allowedIps=None if networks is None else [network_text(each) for each in networks],
        expiresAt=moment(key.expires_at),
    )
