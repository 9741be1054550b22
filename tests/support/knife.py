"""What cuts a task at a chosen wait, as a drain's deadline or a kill would."""

import attrs
import trio


@attrs.define(eq=False)
class Knife(trio.abc.Instrument):
    """Counts where the tasks of one call wait, and cancels the call where it waits for the n-th time."""

    cut_at: int
    """1 is the first wait; larger than the call has waits, and nothing is cut."""
    waits: int = 0
    ended: trio.Event = attrs.field(factory=trio.Event)
    _task: trio.lowlevel.Task | None = None
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def __enter__(self) -> trio.CancelScope:
        assert self._task is None, "one call a knife"
        self._task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        return self._scope

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)
        self.ended.set()

    @property
    def cut(self) -> bool:
        """Whether the call was cancelled and did not end before it noticed."""
        return self._scope.cancelled_caught

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a wait of the call's task or of one it started."""
        each: trio.lowlevel.Task | None = task
        while each is not None and each is not self._task:
            each = each.parent_nursery.parent_task if each.parent_nursery is not None else None
        if each is None:
            return
        self.waits += 1
        if self.waits == self.cut_at:
            self._scope.cancel()
