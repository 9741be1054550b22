"""The catalogue: keys, APIs and prices kept in memory, at most one second behind the database.

Every change of them gets a number in the database, in commit order. This process asks for new numbers every
`refresh_seconds` and drops what they name; when it cannot ask, it stops trusting what it keeps. So a key revoked or a
price changed takes effect here within STALE_SECONDS, or nothing is served; the process that makes a change calls
`refresh` and sees it at once.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from hmac import compare_digest
from typing import Final, Generic, Literal, TypeVar

import attrs
import trio
from structlog.typing import FilteringBoundLogger

from callora.actors.turns import in_turns
from callora.ledger.clock import Clock
from callora.ledger.faults import CalloraFault, StoreUnavailable
from callora.ledger.ids import ApiKeyId
from callora.ledger.keys import PREFIX_CHARS, KeyRecord, hash_key
from callora.ledger.pricing import ApiRecord
from callora.ledger.tokens import SignedToken, TokenRecord
from callora.metrics import Metrics
from callora.store.reads.gateway import CatalogueChange, Reads

STALE_SECONDS: Final = 1.0
"""The bound on staleness: nothing kept is used longer than this after the last complete look at the changes."""
UNKNOWN_SECONDS: Final = 0.5
"""How long "no such key" and "no such API" are remembered; new keys and APIs announce themselves by being asked for."""
KEYS_MAX: Final = 200_000
APIS_MAX: Final = 20_000
TOKENS_MAX: Final = 50_000
UNKNOWN_MAX: Final = 20_000
USED_BATCH: Final = 100
"""Keys whose use one statement notes: no call waits for more of them to be sent, and none of them long for its row."""

Ended = Literal["disabled", "expired", "revoked"]

V = TypeVar("V")


@attrs.define(slots=True, eq=False)
class _Loading(Generic[V]):
    done: trio.Event = attrs.field(factory=trio.Event)
    value: V | None = None
    fault: CalloraFault | None = None


class _Cache(Generic[V]):
    """Found values by key, least recently loaded out first; absent ones for a moment; one load at a time for a key."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self.found: OrderedDict[str | bytes, V] = OrderedDict()
        self._absent: OrderedDict[str | bytes, float] = OrderedDict()
        self._loading: dict[str | bytes, _Loading[V]] = {}
        self._drops = 0

    def drop(self, keys: list[str | bytes]) -> None:
        for key in keys:
            self.found.pop(key, None)
        self._absent.clear()
        self._drops += 1

    def clear(self) -> None:
        self.found.clear()
        self.drop([])

    async def load(self, key: str | bytes, read: Callable[[], Awaitable[V | None]]) -> V | None:
        absent_at = self._absent.get(key)
        if absent_at is not None and trio.current_time() - absent_at < UNKNOWN_SECONDS:
            return None
        loading = self._loading.get(key)
        if loading is not None:
            await loading.done.wait()
            if loading.fault is not None:
                raise loading.fault
            return loading.value
        loading = self._loading[key] = _Loading()
        try:
            # What was read before a change must not be kept after the change was seen.
            drops = self._drops
            loading.value = await read()
            if drops == self._drops:
                self._keep(key, loading.value)
            return loading.value
        except CalloraFault as fault:
            loading.fault = fault
            raise
        except BaseException:
            loading.fault = StoreUnavailable("whoever was loading this was cancelled")
            raise
        finally:
            del self._loading[key]
            loading.done.set()

    def _keep(self, key: str | bytes, value: V | None) -> None:
        if value is not None:
            self.found[key] = value
            if len(self.found) > self._size_max:
                self.found.popitem(last=False)
        else:
            self._absent[key] = trio.current_time()
            self._absent.move_to_end(key)
            if len(self._absent) > UNKNOWN_MAX:
                self._absent.popitem(last=False)


class Catalogue:
    """Keys by their hash, access tokens by their id, APIs by slug and by number."""

    def __init__(
        self,
        reads: Reads,
        metrics: Metrics,
        log: FilteringBoundLogger,
        refresh_seconds: float,
        note_use: Callable[[Sequence[ApiKeyId]], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._reads = reads
        self._metrics = metrics
        self._log = log
        self._refresh_seconds = refresh_seconds
        self._note_use = note_use
        self._clock = clock
        self._keys: _Cache[KeyRecord] = _Cache(KEYS_MAX)
        self._apis: _Cache[ApiRecord] = _Cache(APIS_MAX)
        self._tokens: _Cache[TokenRecord] = _Cache(TOKENS_MAX)
        self._version = -1
        self._looked_at = float("-inf")
        self._used: set[ApiKeyId] = set()

    def key_now(self, key: bytes, now: float) -> KeyRecord | None:
        """Return the record of a key that is kept and still trusted; None says nothing: ask `key`.

        Args:
            now: on Trio's clock.
        """
        if now - self._looked_at > STALE_SECONDS:
            return None
        record = self._keys.found.get(hash_key(key))
        if record is not None:
            self._note(record)
        return record

    def api_now(self, slug_or_id: str, now: float) -> ApiRecord | None:
        """Return an API that is kept and still trusted; None says nothing: ask `api`."""
        return self._apis.found.get(slug_or_id) if now - self._looked_at <= STALE_SECONDS else None

    async def key(self, key: bytes) -> KeyRecord | None:
        """Return the record of a well-formed key, or None where there is no such key.

        The hash is compared by being looked up: what an attacker learns from timing is about a SHA-256 of his guess.

        Raises:
            StoreUnavailable: it is not known, and cannot be read now.
        """
        digest = hash_key(key)
        record = self._keys.found.get(digest) if self._fresh else None
        if record is None:
            record = await self._keys.load(digest, lambda: self._read_key(key[:PREFIX_CHARS].decode(), digest))
        if record is not None:
            self._note(record)
        return record

    async def token(self, signed: SignedToken) -> TokenRecord | None:
        """Return the record of a signed access token, or None where its key has no such token.

        It is dropped with every change of its key, so it is never wider than its key is now.

        Raises:
            StoreUnavailable: it is not known, and cannot be read now.
        """
        record = self._tokens.found.get(signed.token_id) if self._fresh else None
        if record is None:
            record = await self._tokens.load(signed.token_id, lambda: self._reads.token(signed))
        if record is None or record.key.api_key_id != signed.api_key_id:
            return None
        if record.revoked_at is None and record.expires_at > self._clock.now():
            self._note(record.key)
        return record

    async def api(self, slug_or_id: str) -> ApiRecord | None:
        """Return an API by its slug or its number, or None where there is no such API.

        Raises:
            StoreUnavailable: it is not known, and cannot be read now.
        """
        record = self._apis.found.get(slug_or_id) if self._fresh else None
        if record is None:
            record = await self._apis.load(slug_or_id, lambda: self._reads.api(slug_or_id))
        return record

    async def refresh(self) -> None:
        """Look at what has changed, and drop it. The process that made a change calls this to see it at once.

        Raises:
            StoreUnavailable: nothing was looked at.
        """
        began = trio.current_time()
        version = await self._reads.catalogue_version()
        if version != self._version:
            changes = await self._reads.catalogue_changes(self._version) if self._version >= 0 else ()
            if not changes or changes[0].version != self._version + 1:
                # The first look, or one after changes that are no longer told: what is kept may be older than them.
                self._keys.clear()
                self._apis.clear()
                self._tokens.clear()
                self._version = version
            if changes:
                self._drop(changes)
                self._version = changes[-1].version
        self._looked_at = max(self._looked_at, began)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep looking until cancelled; a database that is away is asked again, and nothing kept is used meanwhile."""
        task_status.started()
        away = False
        while True:
            try:
                await self.refresh()
                if away:
                    away = False
                    self._log.info("catalogue_refreshed_again")
            except CalloraFault as fault:
                if not away:
                    self._log.warning("catalogue_not_refreshed", error=str(fault))
                away = True
            self._metrics.catalogue_age_seconds.set(trio.current_time() - self._looked_at)
            await trio.sleep(self._refresh_seconds)

    async def note_used(self) -> None:
        """Store which keys were used since the last time, USED_BATCH at a time: apart from the looks at the changes,
        which must not wait for it.

        Raises:
            CalloraFault: the rest is not noted, until those keys are used again.
        """
        used, self._used = self._used, set()
        for turn in in_turns(used, USED_BATCH):
            await self._note_use(turn)

    def end_of(self, key: KeyRecord) -> Ended | None:
        """Return why no call is made with a key any more, or None for one that lives."""
        if key.disabled:
            return "disabled"
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            return "expired"
        return None if key.revoked_at is None else "revoked"

    def _note(self, key: KeyRecord) -> None:
        """Note a key as used, unless it has ended: refusing it is no use of it."""
        if self.end_of(key) is None:
            self._used.add(key.api_key_id)

    @property
    def _fresh(self) -> bool:
        return trio.current_time() - self._looked_at <= STALE_SECONDS

    async def _read_key(self, prefix: str, digest: bytes) -> KeyRecord | None:
        for record in await self._reads.keys_with_prefix(prefix):
            if compare_digest(record.key_hash, digest):
                return record
        return None

    def _drop(self, changes: Sequence[CatalogueChange]) -> None:
        """Drop what the changes name, in one walk through what is kept, however many they are."""
        named: dict[str, set[str]] = {"key": set(), "vault": set(), "plan": set(), "api": set()}
        for change in changes:
            named[change.kind].add(change.ref)
        keys, vaults, apis, every = named["key"], named["vault"], named["api"], bool(named["plan"])
        if keys or vaults or every:

            def changed(key: KeyRecord) -> bool:
                return every or key.api_key_id in keys or key.vault_id in vaults

            self._keys.drop([digest for digest, key in self._keys.found.items() if changed(key)])
            self._tokens.drop([token_id for token_id, token in self._tokens.found.items() if changed(token.key)])
        if apis:
            self._apis.drop([name for name, api in self._apis.found.items() if str(api.api_id) in apis])
