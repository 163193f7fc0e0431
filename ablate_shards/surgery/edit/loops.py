"""Loops over the blocks of one large matrix, divided among threads that have nothing else to do."""

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ablate_shards.kernels.form import Turn

__all__ = ["Each", "SharedLoops", "in_order"]

#: Offsets taken before the first is done, beyond one a thread: who lags behind does not stop the others at once.
_AHEAD = 2

Do: TypeAlias = "Callable[[int, Turn | None], None]"
"""Does what there is to do at an offset; what has an order is done in its turn, and at once where that is None."""

Each: TypeAlias = Callable[[range, Do], None]
"""Does something at every offset of a range, and returns when all of it is done."""


def in_order(offsets: range, do: Do) -> None:
    """Does something at one offset after the other."""
    for offset in offsets:
        do(offset, None)


class SharedLoops:
    """Loops that threads of a pool join when they have nothing else to do.

    The thread that begins a loop never waits for others to join it: they come when the tasks before are done, or not at
    all. So nothing is divided where there are tasks enough.

    Args:
        threads: How many the pool has; the one that begins a loop is among them.
        submit: Gives the pool a task.
    """

    def __init__(self, threads: int, submit: Callable[[Callable[[], None]], object]) -> None:
        self._threads, self._submit = threads, submit
        self._open: list[_Loop] = []
        self._asked = 0
        self._choosing = threading.Lock()

    def each(self, offsets: range, do: Do) -> None:
        """Does something at every offset, in several threads if there are any; they take the offsets in order.

        Raises:
            Exception: What was raised at the first of the offsets where something was, as in one thread; no offsets are
                taken after it.
        """
        loop = _Loop(offsets, do, self._threads + _AHEAD)
        with self._choosing:
            self._open.append(loop)
            wanted = max(0, min(self._threads - 1 - self._asked, len(offsets) - 1))
            self._asked += wanted
        with contextlib.suppress(RuntimeError):  # the pool is being shut down, and the run has ended
            for _ in range(wanted):
                self._submit(self._join)
        try:
            loop.work()
        except BaseException as error:  # an interruption
            loop.fail(-1, error)
            raise
        finally:
            with self._choosing:
                self._open.remove(loop)
        loop.finish()

    def _join(self) -> None:
        """Works on one loop after the other, each time on the one with the fewest threads, until none has work left."""
        with self._choosing:
            self._asked -= 1
        while True:
            with self._choosing:
                loop = min((loop for loop in self._open if loop.has_work), key=lambda loop: loop.threads, default=None)
                if loop is None:
                    return
                loop.threads += 1
            loop.work()


class _Loop:
    """Offsets, and what to do at each of them.

    What has an order is done at once where everything before it is done, and otherwise by the thread that makes it so.

    Args:
        offsets: Where something is done.
        do: What.
        ahead: How many may be taken before the first of them is done; what waits for its turn is in memory.

    Attributes:
        threads: How many work on it.
        done: Everything before this number is done.
    """

    def __init__(self, offsets: range, do: Do, ahead: int) -> None:
        self._offsets, self._do, self._ahead = offsets, do, ahead
        self._taken = 0
        self._ended: dict[int, _Turn] = {}
        self._error: tuple[int, BaseException] | None = None
        self._changed = threading.Condition()
        self.threads, self.done = 1, 0

    @property
    def has_work(self) -> bool:
        """Whether there is an offset that no thread has taken."""
        return self._error is None and self._taken < len(self._offsets)

    def work(self) -> None:
        """Takes one offset after the other, until none is left."""
        while (number := self._take()) is not None:
            turn = _Turn(self, number)
            try:
                self._do(self._offsets[number], turn)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that began the loop
                self.fail(number, error)
            self._end(turn)

    def finish(self) -> None:
        """Waits for what others have taken.

        Raises:
            Exception: What was raised at the first of the offsets where something was.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.done == self._taken)
            if self._error is not None:
                raise self._error[1]

    def fail(self, number: int, error: BaseException) -> None:
        """Takes what was raised at an offset; no offsets are taken after it."""
        with self._changed:
            if self._error is None or number < self._error[0]:
                self._error = number, error
            self._changed.notify_all()

    def _take(self) -> int | None:
        """Returns the number of an offset that is then this thread's, once it is near enough; None if none is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self.has_work or self._taken - self.done < self._ahead)
            if not self.has_work:
                return None
            self._taken += 1
            return self._taken - 1

    def _end(self, turn: "_Turn") -> None:
        """Does what was left to do at an offset and those after it, if everything before is done."""
        with self._changed:
            self._ended[turn.number] = turn
            if self.done != turn.number:
                return
        while True:
            try:
                if self._error is None:
                    turn.do_all()
            except BaseException as error:  # noqa: BLE001 - as above
                self.fail(turn.number, error)
            with self._changed:
                del self._ended[self.done]
                self.done += 1
                self._changed.notify_all()
                if self.done not in self._ended:
                    return
                turn = self._ended[self.done]


class _Turn:
    """When what has an order is done at an offset: see ``Turn``."""

    def __init__(self, loop: _Loop, number: int) -> None:
        self.number = number
        self._loop, self._left = loop, list[Callable[[], None]]()

    def has_come(self) -> bool:
        """Whether everything before it is done."""
        return self._loop.done == self.number and not self._left

    def do(self, add: Callable[[], None]) -> None:
        """Does something now, if everything before it is done, or else when it is."""
        self._left.append(add)
        if self._loop.done == self.number:
            self.do_all()

    def do_all(self) -> None:
        """Does what was left to do."""
        left, self._left = self._left, []
        for add in left:
            add()
