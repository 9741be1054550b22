"""What a new installation shows: a demo developer with a demo API, and a consumer with a funded vault and a key."""

import json
import os
import secrets
from pathlib import Path
from typing import Final

import attrs

from callora.actors.sessions import Sessions, Visitor
from callora.dashboard import token_settings
from callora.http.rest.identity import mint_access_token
from callora.ledger.commands import Grant
from callora.ledger.ids import ApiId, ApiKeyId, DeveloperId, UserId, VaultId
from callora.ledger.keys import RANDOM_BYTES, make_key
from callora.ledger.money import parse_usdc
from callora.ledger.outcomes import BalanceMoved
from callora.ledger.wallets import KEY_BYTES, make_seed
from callora.service import Context, Ledger
from callora.stellar.envelopes import Signer
from callora.store import accounts
from callora.store.accounts import PricedEndpoint
from callora.store.keys import add_key
from callora.store.reads.gateway import Reads

API_SLUG: Final = "weather-api"
GRANT: Final = "100"
"""USDC in the demo consumer's vault on the first start: given, not deposited. The sandbox's vault contract has as much
from the start, so that what he spends can be settled."""
CHANNELS: Final = 3
"""How many accounts a data directory has to send transactions from."""
ENDPOINTS: Final = (
    PricedEndpoint("GET", "/current", parse_usdc("0.01")),
    PricedEndpoint("GET", "/forecast", parse_usdc("0.05")),
    PricedEndpoint("POST", "/reports/{city}", parse_usdc("0.02")),
    PricedEndpoint("*", "*", parse_usdc("0.005")),
)
TOKEN_SECONDS: Final = 86_400
"""How long the demo's access tokens last. Fifteen minutes, like everyone else's, would end under a script; and there is
no refresh token, which one of two scripts would use under the other."""
_CREDENTIALS_FILE: Final = "credentials.json"


@attrs.frozen
class DevCredentials:
    """The secrets of a development data directory, made once and kept in it, readable by its owner alone."""

    admin_api_key: str
    jwt_secret: str
    metrics_api_key: str
    consumer_api_key: str
    auth_signing_seed: str
    vault_owner_seed: str
    channel_seeds: str
    """Separated by commas."""
    fee_bumper_secret_key: str
    settlement_charging_seed: str
    settlement_crediting_seed: str
    developer_wallet_seed: str
    """The demo developer's, to withdraw with what he earned."""

    def chain_settings(self) -> dict[str, str]:
        """Return the settings with the keys that act on chain."""
        return {
            "VAULT_OWNER_SEED": self.vault_owner_seed,
            "CHANNEL_SEEDS": self.channel_seeds,
            "FEE_BUMPER_SECRET_KEY": self.fee_bumper_secret_key,
            "SETTLEMENT_CHARGING_SEED": self.settlement_charging_seed,
            "SETTLEMENT_CREDITING_SEED": self.settlement_crediting_seed,
        }


def dev_credentials(data_dir: Path) -> DevCredentials:
    """Return the directory's credentials, made on the first call; what an older version did not know is added."""
    path = data_dir / _CREDENTIALS_FILE
    kept = json.loads(path.read_text()) if path.exists() else {}
    made = DevCredentials(
        **{
            "admin_api_key": secrets.token_urlsafe(24),
            "jwt_secret": secrets.token_urlsafe(48),
            "metrics_api_key": secrets.token_urlsafe(24),
            "consumer_api_key": make_key("testnet", secrets.token_bytes(RANDOM_BYTES)),
            "auth_signing_seed": _new_seed(),
            "vault_owner_seed": _new_seed(),
            "channel_seeds": ",".join(_new_seed() for _ in range(CHANNELS)),
            "fee_bumper_secret_key": _new_seed(),
            "settlement_charging_seed": _new_seed(),
            "settlement_crediting_seed": _new_seed(),
            "developer_wallet_seed": _new_seed(),
            **kept,
        }
    )
    if attrs.asdict(made) != kept:
        temporary = path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(attrs.asdict(made), file)
        temporary.rename(path)
    return made


def _new_seed() -> str:
    return make_seed(secrets.token_bytes(KEY_BYTES))


@attrs.frozen
class Demo:
    """The ids of the demo's people and things."""

    consumer_id: UserId
    vault_id: VaultId
    developer_user_id: UserId
    developer_wallet: str
    api_id: ApiId


async def ensure_demo(context: Context, ledger: Ledger, credentials: DevCredentials, upstream_url: str) -> Demo:
    """Return the demo, made where it is missing; a second start finds it, with what was spent."""
    database, now, ids = ledger.database, context.clock.now(), context.ids
    developer_user = await _ensure_user(context, ledger, "Demo developer")
    consumer = await _ensure_user(context, ledger, "Demo consumer")
    wallet = Signer.from_seed(credentials.developer_wallet_seed, context.settings.network_passphrase).address
    await accounts.give_wallet(database, developer_user, wallet)
    developer = await accounts.ensure_developer(database, DeveloperId(ids.uuid7()), developer_user, "Demo Weather", now)
    api_id = await accounts.ensure_api(
        database,
        developer_id=developer,
        slug=API_SLUG,
        name="Weather",
        base_url=upstream_url,
        endpoints=ENDPOINTS,
        now=now,
    )
    vault_id = await accounts.ensure_vault(database, VaultId(ids.uuid7()), consumer, "testnet", "enterprise", now)
    moved = await ledger.registry.ask(vault_id, Grant(parse_usdc(GRANT), "demo"))
    assert isinstance(moved, BalanceMoved)
    key = credentials.consumer_api_key
    if not await Reads(database).keys_with_prefix(key[:16]):
        added = await add_key(
            database, api_key_id=ApiKeyId(ids.uuid7()), vault_id=vault_id, key=key, name="Demo key", now=now
        )
        assert added
    return Demo(consumer, vault_id, developer_user, wallet, api_id)


async def demo_token(context: Context, ledger: Ledger, user_id: UserId) -> str:
    """Return an access token of a demo user, in a session of its own, good for TOKEN_SECONDS."""
    tokens = token_settings(context.settings)
    assert tokens is not None, "dev has a secret"
    sessions = Sessions(
        database=ledger.database,
        clock=context.clock,
        ids=context.ids,
        random_bytes=os.urandom,
        domain="",
        web_auth=None,
        log=context.logs.logger("demo"),
    )
    session_id = await sessions.open_for(user_id, Visitor("", "callora dev"), TOKEN_SECONDS)
    return mint_access_token(tokens, context.clock, user_id, session_id, None, TOKEN_SECONDS)


async def _ensure_user(context: Context, ledger: Ledger, name: str) -> UserId:
    found = await accounts.find_user(ledger.database, name)
    if found is not None:
        return found
    user_id = UserId(context.ids.uuid7())
    await accounts.add_user(ledger.database, user_id, name, context.clock.now())
    return user_id
