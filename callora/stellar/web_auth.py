"""SEP-10: challenge transactions, made and verified through stellar-sdk. Loaded where a signing seed is configured."""

from datetime import UTC, datetime, timedelta
from typing import Final

import attrs
from stellar_sdk import Keypair, ManageData
from stellar_sdk.exceptions import SdkError
from stellar_sdk.sep import stellar_web_authentication as sep10

from callora.stellar.proofs import Proof, ProofRefused

CHALLENGE_SECONDS: Final = 900
"""How long a SEP-10 challenge is good for; the standard's own number."""
HOME_DOMAIN_CHARS_MAX: Final = 59
"""With " auth" behind it the name of a data entry, of which Stellar allows 64 bytes."""


@attrs.frozen
class WebAuth:
    """The server's side of SEP-10, for one network and one domain."""

    _keypair: Keypair = attrs.field(repr=False)
    home_domain: str
    """Where stellar.toml is; also the domain of the endpoint itself."""
    network_passphrase: str

    @classmethod
    def make(cls, seed: str, home_domain: str, network_passphrase: str) -> "WebAuth":
        """Return the server of a domain.

        Args:
            seed: `S…`, well-formed; it signs challenges and must sign nothing else.
            home_domain: at most HOME_DOMAIN_CHARS_MAX characters.
            network_passphrase: of the network that wallets log in on; it is part of what they sign.
        """
        assert len(home_domain) <= HOME_DOMAIN_CHARS_MAX
        return cls(Keypair.from_secret(seed), home_domain, network_passphrase)

    @property
    def signing_key(self) -> str:
        """The public key that signs challenges, for stellar.toml."""
        return self._keypair.public_key

    def challenge(self, address: str) -> str:
        """Return a challenge for a wallet: a transaction in base64 XDR that no network would take, signed by us.

        Args:
            address: `G…`, with a right checksum.
        """
        return sep10.build_challenge_transaction(
            server_secret=self._keypair.secret,
            client_account_id=address,
            home_domain=self.home_domain,
            web_auth_domain=self.home_domain,
            network_passphrase=self.network_passphrase,
            timeout=CHALLENGE_SECONDS,
        )

    def verify(self, transaction: str, now: datetime) -> Proof | ProofRefused:
        """Return what a signed challenge proves. Whether it was used before is for the caller to know.

        Stricter than the standard asks: exactly the two entries that `challenge` makes, no memo, no muxed account, and
        exactly two signatures, ours and the master key's.

        Args:
            transaction: base64 XDR, from anyone.
        """
        terms = (transaction, self.signing_key, self.home_domain, self.home_domain, self.network_passphrase)
        try:
            challenge = sep10.read_challenge_transaction(*terms)
        except SdkError as error:
            return ProofRefused(str(error))
        except Exception:
            # A stranger's bytes went through a foreign parser, which has an exception of its own for every fault.
            return ProofRefused("The transaction cannot be read: it must be a challenge of ours in base64 XDR")
        inner = challenge.transaction.transaction
        second = inner.operations[-1]
        if challenge.memo is not None or not challenge.client_account_id.startswith("G"):
            return ProofRefused("Neither memos nor muxed accounts can log in")
        if len(inner.operations) != 2 or not (isinstance(second, ManageData) and second.data_name == "web_auth_domain"):
            return ProofRefused("The transaction is no challenge of ours")
        try:
            sep10.verify_challenge_transaction_signed_by_client_master_key(*terms)
        except SdkError as error:
            return ProofRefused(str(error))
        assert inner.preconditions is not None
        assert inner.preconditions.time_bounds is not None
        expires_at = _EPOCH + timedelta(seconds=min(inner.preconditions.time_bounds.max_time, _SECONDS_MAX))
        if expires_at <= now:
            return ProofRefused("The challenge has expired")
        return Proof(challenge.client_account_id, challenge.transaction.hash(), expires_at)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS_MAX: Final = 250_000_000_000
"""About the year 9892: what a datetime holds."""
