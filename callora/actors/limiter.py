"""The limiter: the one owner of every key's and user's pace and of every key's running calls, in this process."""

from typing import Final

import attrs
import trio

from callora.actors.turns import in_turns
from callora.ledger.ids import ApiKeyId, UserId
from callora.ledger.keys import KeyRecord
from callora.ledger.limits import Limit, Pace, SlidingLog

SWEEP_SECONDS: Final = 30.0


@attrs.frozen(slots=True)
class PaceRefused:
    """Refused by a rate limit."""

    which: str
    """`key` or `user`."""
    pace: Pace


@attrs.define(slots=True, eq=False)
class _User:
    log: SlidingLog
    keys: int = 0
    """How many of the user's keys are kept."""


@attrs.define(slots=True, eq=False)
class KeyPace:
    """One key's running calls and logs; a call holds it from its admission to its end."""

    user_id: UserId
    log: SlidingLog
    user: _User
    running: int = 0

    def tighter(self) -> tuple[str, SlidingLog, int]:
        """Return which of the key's and its user's limits admits fewer calls now, its log, and how many it admits."""
        by_key, by_user = self.log.remaining, self.user.log.remaining
        if by_key <= by_user:
            return "key", self.log, by_key
        return "user", self.user.log, by_user


class Limiter:
    """Admits calls by pace and by number at the same time. Plain methods: nothing here waits."""

    def __init__(
        self,
        *,
        user_limit: int,
        user_window_seconds: float,
        key_limit_default: int,
        key_window_seconds: float,
        running_max: int,
    ) -> None:
        self._user_limit = user_limit
        self._user_window_seconds = user_window_seconds
        self._key_limit_default = key_limit_default
        self._key_window_seconds = key_window_seconds
        self._running_max = running_max
        self._keys: dict[ApiKeyId, KeyPace] = {}
        self._users: dict[UserId, _User] = {}

    def enter(self, key: KeyRecord) -> KeyPace | None:
        """Count a call as running and return its key's pace, or None when the key runs as many as it may.

        Whoever enters leaves, whatever comes of the call.
        """
        kept = self._keys.get(key.api_key_id)
        if kept is None:
            user = self._users.get(key.user_id)
            if user is None:
                user = self._users[key.user_id] = _User(SlidingLog(self._user_limit, self._user_window_seconds))
            user.keys += 1
            kept = self._keys[key.api_key_id] = KeyPace(key.user_id, SlidingLog(0, self._key_window_seconds), user)
        if kept.running >= self._running_max:
            return None
        kept.running += 1
        return kept

    def leave(self, kept: KeyPace) -> None:
        """Count a call as ended."""
        kept.running -= 1

    def admit(self, key: KeyRecord, kept: KeyPace, now: float) -> PaceRefused | None:
        """Take one call from the key's and the user's limit, from both or from none.

        Args:
            now: on Trio's clock.
        """
        kept.log.limit = self._key_limit(key)
        refused = kept.user.log.refuse(now)
        if refused is not None:
            return PaceRefused("user", refused)
        refused = kept.log.refuse(now)
        if refused is not None:
            return PaceRefused("key", refused)
        kept.user.log.admit(now)
        kept.log.admit(now)
        return None

    def limits(self, key: KeyRecord) -> tuple[Limit, Limit]:
        """Return the user's limit and the key's."""
        return (
            Limit(self._user_limit, self._user_window_seconds),
            Limit(self._key_limit(key), self._key_window_seconds),
        )

    def note(self, key: KeyRecord, kept: KeyPace, now: float) -> None:
        """Count a call that others let in, whatever the limits here say of it.

        Args:
            now: on Trio's clock.
        """
        kept.log.limit = self._key_limit(key)
        for log in (kept.user.log, kept.log):
            log.refuse(now)  # what has left the window goes
            log.admit(now)

    def _key_limit(self, key: KeyRecord) -> int:
        return key.rate_limit_per_minute or self._key_limit_default

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forget logs that have emptied, until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(SWEEP_SECONDS)
            await self.sweep()

    async def sweep(self) -> None:
        """Forget logs that have emptied, a turn at a time. Nothing else forgets any, so what comes is still there."""
        for turn in in_turns(self._keys):
            now = trio.current_time()
            for key_id in turn:
                kept = self._keys[key_id]
                if kept.running == 0 and kept.log.is_empty(now) and kept.user.log.is_empty(now):
                    del self._keys[key_id]
                    kept.user.keys -= 1
                    if kept.user.keys == 0:
                        del self._users[kept.user_id]
            await trio.lowlevel.checkpoint()
