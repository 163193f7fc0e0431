"""Which shard is worked on next: copies and edits wait in turn, and a file has one writer at a time."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ablate_shards.surgery.checkpoint.headers import Shard

__all__ = ["Task", "UnderWay", "Work"]

_T = TypeVar("_T")
_R = TypeVar("_R")


class Task(Generic[_T]):
    """Something to do to a shard, and the result of it."""

    def __init__(self, do: Callable[[], _T]) -> None:
        self._do, self.future = do, Future[_T]()

    def run(self) -> None:
        """Does it, once."""
        try:
            self.future.set_result(self._do())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is waited for
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Work(Generic[_R]):
    """One shard under way; one that is fetched is edited in place, once it is all there."""

    shard: Shard
    source: int
    target: int
    copies: list[Future[None]] = field(default_factory=list)
    fetched: Future[None] | None = None
    edits: list[Future[tuple[str, _R] | None]] = field(default_factory=list)
    to_copy: deque[Task[None]] = field(default_factory=deque)
    to_edit: deque[Task[tuple[str, _R] | None]] = field(default_factory=deque)
    writers: int = 0
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lets one thread at a time write to the shard; the kernel would let the others wait busily, at full load."""
        with self._turn:  # so that a thread that has just written does not overtake one that waits
            self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()


class UnderWay(Generic[_R]):
    """The shards under way, and which of their tasks to do next.

    Only one thread at a time can write to a file, and others would wait. So the next task is one of the shard with the
    fewest writers. If several shards have equally few, edits go to the first and copying to the last.
    """

    def __init__(self) -> None:
        self._works: list[Work[_R]] = []
        self._choosing = threading.Lock()

    def add(
        self,
        work: Work[_R],
        *,
        copies: Iterable[Task[None]] = (),
        edits: Iterable[Task[tuple[str, _R] | None]] = (),
    ) -> None:
        """Adds tasks of a shard to the queues."""
        with self._choosing:
            work.to_copy.extend(copies)
            work.to_edit.extend(edits)
            if work not in self._works:
                self._works.append(work)

    def remove(self, work: Work[_R]) -> None:
        """Forgets a shard that has no task left, if it was ever added."""
        with self._choosing:
            if work in self._works:
                self._works.remove(work)

    def copy_next(self) -> None:
        """Runs the next task that copies, if any is left."""
        self._run_next(lambda work: work.to_copy, order=-1)

    def edit_next(self) -> None:
        """Runs the next task that edits or, if none is left, one that copies to a shard that nobody writes to."""
        if not self._run_next(lambda work: work.to_edit):
            self._run_next(lambda work: work.to_copy if not work.writers else deque(), order=-1)

    def _run_next(self, queue: Callable[[Work[_R]], deque[Any]], order: int = 1) -> bool:
        """Runs a task of the queue of a shard, if there is one; returns whether it did."""
        with self._choosing:
            waiting = [work for work in self._works[::order] if queue(work)]
            if not waiting:
                return False
            work = min(waiting, key=lambda work: work.writers)
            task = queue(work).popleft()
            work.writers += 1
        task.run()
        with self._choosing:
            work.writers -= 1
        return True
