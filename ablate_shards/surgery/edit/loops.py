"""Loops over the blocks of one large matrix, divided among threads that have nothing else to do."""

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ablate_shards.kernels.form import Turn

__all__ = ["Each", "SharedLoops", "Stopped", "in_order"]

Do: TypeAlias = "Callable[[int, Turn | None], None]"
"""Does what there is to do at an offset; what has an order is done in its turn, and at once where that is None."""

Each: TypeAlias = Callable[[range, Do], None]
"""Does something at every offset of a range, and returns when all of it is done."""


class Stopped(Exception):  # noqa: N818 - not an error: it ends a worker whose run has ended elsewhere
    """Ends a worker whose run has failed or been interrupted elsewhere."""


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
            Exception: The first that was raised at an offset; no more offsets are taken after it.
        """
        loop = _Loop(offsets, do)
        with self._choosing:
            self._open.append(loop)
            wanted = max(0, min(self._threads - 1 - self._asked, len(offsets) - 1))
            self._asked += wanted
        with contextlib.suppress(RuntimeError):  # the pool is being shut down, and the run has ended
            for _ in range(wanted):
                self._submit(self._join)
        try:
            loop.work()
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
    """Offsets, and what to do at each of them."""

    def __init__(self, offsets: range, do: Do) -> None:
        self._offsets, self._do = offsets, do
        self._taken, self._late = 0, set[int]()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        #: Everything before this number is done.
        self.done = 0
        self.threads = 1

    @property
    def has_work(self) -> bool:
        """Whether there is an offset that no thread has taken."""
        return self._error is None and self._taken < len(self._offsets)

    def work(self) -> None:
        """Takes one offset after the other, until none is left."""
        while True:
            with self._changed:
                if not self.has_work:
                    return
                number = self._taken
                self._taken += 1
            try:
                self._do(self._offsets[number], _Turn(self, number))
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that began the loop
                self._end(number, error)
            else:
                self._end(number, None)

    def finish(self) -> None:
        """Waits for what others have taken.

        Raises:
            Exception: The first that was raised at an offset.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.done == self._taken)
            if self._error is not None:
                raise self._error

    def wait(self, number: int) -> None:
        """Waits until everything before a number is done.

        Raises:
            Stopped: It never will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.done == number or self._error is not None)
            if self._error is not None:
                raise Stopped

    def _end(self, number: int, error: BaseException | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._late.add(number)
            while self.done in self._late:
                self._late.remove(self.done)
                self.done += 1
            self._changed.notify_all()


class _Turn:
    """When what has an order may be done at an offset: see ``Turn``."""

    def __init__(self, loop: _Loop, number: int) -> None:
        self._loop, self._number = loop, number

    def has_come(self) -> bool:
        """Whether everything before it is done."""
        return self._loop.done == self._number

    def wait(self) -> None:
        """Returns when everything before it is done.

        Raises:
            Stopped: It never will be, as something before it failed.
        """
        if not self.has_come():
            self._loop.wait(self._number)
