"""Writes the shards of an output: copies what stays, edits the tensors of a plan, writes down what is complete."""

import dataclasses
import functools
import itertools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import Shard
from ablate_shards.surgery.edit.blocks import BlockEditor, Channels, Portion, Stopped
from ablate_shards.surgery.edit.operation import Operation, RunOptions
from ablate_shards.surgery.edit.queue import Task, UnderWay, Work
from ablate_shards.surgery.machine.copying import allocate, clone, copy_range, link
from ablate_shards.surgery.machine.files import pread_into, pwrite_all
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.staging import Staging
from ablate_shards.surgery.machine.system import cores, open_file
from ablate_shards.surgery.plan.edits import Edit, by_shard, untouched

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["ShardWriter"]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R", bound="DataclassInstance")

#: Bytes copied before an edit may write: with more, edits wait too long; with fewer, copying does. A large shard is
#: copied in larger pieces, so that there are never more than _MOST_PIECES.
_COPY_CHUNK, _MOST_PIECES = 8 << 20, 500
_MANY_CORES = 4
_SHARDS_IN_FLIGHT = 4


class ShardWriter(Generic[_E, _R]):
    """Copies and edits shard after shard, a few at a time, in threads of its own.

    Args:
        checkpoint: The source.
        operation: What to do.
        staging: Where to write.
        progress: Receives how far it has come.
        link: Make shards without an edit hard links to the source's.
    """

    #: Shards under way at a time.
    in_flight = _SHARDS_IN_FLIGHT

    def __init__(
        self,
        checkpoint: Checkpoint,
        operation: Operation[_E, _R],
        staging: Staging,
        progress: Progress,
        *,
        link: bool,
    ) -> None:
        self._checkpoint, self._operation, self._edits = checkpoint, operation, by_shard(operation.edits)
        self._staging, self._progress, self._link = staging, progress, link
        self._stop = threading.Event()
        self._under_way: UnderWay[_R] = UnderWay()
        self._pools: list[ThreadPoolExecutor] = []
        self._open: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._open:
            os.close(descriptor)

    def write(self, run: RunOptions) -> tuple[dict[str, _R], dict[str, str]]:
        """Writes every file but the receipt; returns what was measured, and by what."""
        results = {
            name: self._operation.result(**values)
            for content in self._staging.done.values()
            for name, values in content.items()
        }
        copiers = self._pool(self._copiers(run))
        sidecars = [copiers.submit(self._copy_sidecar, name) for name in self._checkpoint.sidecars]
        shards = (shard for shard in self._checkpoint.shards if shard.name not in self._staging.done)
        under_way = deque(self._start_copy(shard, copiers) for shard in itertools.islice(shards, self.in_flight))
        # torch is imported only now, if at all: the copying above needs neither torch nor the interpreter lock.
        editor = self._operation.editor(run, self._stop)
        self._progress.note(editor.reason)
        identity = editor.identity()
        self._staging.agree({f"the {what}": value for what, value in identity.items()})
        editors = self._pool(editor.jobs)
        editor.share(editors.submit)
        with editor.one_thread_each():
            for work in under_way:
                self._start_edits(work, editor, editors)
            while under_way:
                results |= self.finish(under_way.popleft())
                for shard in itertools.islice(shards, 1):
                    under_way.append(self._start_copy(shard, copiers))
                    self._start_edits(under_way[-1], editor, editors)
        for future in sidecars:
            future.result()
        return results, identity

    def _copiers(self, run: RunOptions) -> int:
        """Returns how many threads copy: where there are few cores, the edits need them more."""
        if self._checkpoint.amended:  # what is computed takes as long as an edit, and edits wait for it
            return max(1, min(self.in_flight, run.jobs or cores()))
        if self._checkpoint.remote is not None:
            return self.in_flight
        return 1 if cores() < _MANY_CORES else 2

    def _pool(self, workers: int) -> ThreadPoolExecutor:
        self._pools.append(ThreadPoolExecutor(workers))
        return self._pools[-1]

    def _start_copy(self, shard: Shard, copiers: ThreadPoolExecutor) -> Work[_R]:
        path = self._staging.folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        edits = self._edits.get(shard.name, ())
        if self._checkpoint.fetched(shard.name) is not None:
            return self._start_fetch(shard, path, [(edit.start, edit.end) for edit in edits], copiers)
        path.unlink(missing_ok=True)
        linked = not edits and self._link and link(shard.path, path)
        source = self._hold(open_file(shard.path))
        if linked:
            self._progress.advance(shard.size)
            return Work(shard, source, self._hold(open_file(path)))
        target = self._hold(open_file(path, new=True))
        ranges = list(untouched(shard, edits))
        work: Work[_R] = Work(shard, source, target)
        if clone(source, target):
            self._progress.advance(sum(end - start for start, end in ranges))
            return work
        allocate(target, shard.size)
        chunk = max(_COPY_CHUNK, shard.size // _MOST_PIECES)
        tasks = [
            Task(functools.partial(self._copy, work, start, min(start + chunk, end)))
            for first, end in ranges
            for start in range(first, end, chunk)
        ]
        work.copies += [task.future for task in tasks]
        self._under_way.add(work, copies=tasks)
        for _ in tasks:
            copiers.submit(self._under_way.copy_next)
        return work

    def _start_fetch(
        self, shard: Shard, path: Path, edited: list[tuple[int, int]], copiers: ThreadPoolExecutor
    ) -> Work[_R]:
        target = self._hold(open_file(path, write=True))
        source = self._hold(open_file(path))
        fetched = copiers.submit(self._fetch, shard.name, path, edited)
        return Work(shard, source, target, [fetched], fetched=fetched)

    def _fetch(self, name: str, path: Path, edited: list[tuple[int, int]]) -> None:
        if (remote := self._checkpoint.fetched(name)) is not None:
            remote.fetch(name, path, stop=self._stop, advance=self._progress.advance, edited=edited)

    def _start_edits(self, work: Work[_R], editor: BlockEditor[_E, _R], editors: ThreadPoolExecutor) -> None:
        def write(data: memoryview, offset: int) -> None:
            with work.writing():
                pwrite_all(work.target, data, offset)
            if work.fetched is None:
                self._progress.advance(len(data))

        channels = Channels(
            read=functools.partial(pread_into, work.source),
            write=write,
            reread=functools.partial(pread_into, work.target),
        )
        tasks = [
            Task(functools.partial(self._edit, edit.name, portion, work))
            for edit in self._edits.get(work.shard.name, ())
            for portion in editor.portions(edit, channels)
        ]
        work.edits += [task.future for task in tasks]
        self._under_way.add(work, edits=tasks)
        for _ in (*tasks, *work.copies):
            editors.submit(self._under_way.edit_next)

    def finish(self, work: Work[_R]) -> dict[str, _R]:
        """Waits for a shard, makes it durable and writes it down; returns what was measured."""
        for future in work.copies:
            future.result()
        results = dict(filter(None, [future.result() for future in work.edits]))
        self._under_way.remove(work)
        self._staging.fsync(work.target)
        self._staging.fsync_folder((self._staging.folder / work.shard.name).parent)
        for descriptor in (work.source, work.target):
            self._open.remove(descriptor)
            os.close(descriptor)
        self._staging.record(work.shard.name, {name: dataclasses.asdict(result) for name, result in results.items()})
        return results

    def _edit(self, name: str, portion: Portion[_R], work: Work[_R]) -> tuple[str, _R] | None:
        if work.fetched is not None:
            work.fetched.result()
        result = portion.do()
        self._staging.start_writing(work.target, portion.start, portion.end)
        return None if result is None else (name, result)

    def _copy(self, work: Work[_R], start: int, end: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with work.writing():
            copy_range(work.source, work.target, start, end)
        # The disk is busy from the start, and what is left to wait for at the end is little.
        self._staging.start_writing(work.target, start, end)
        self._progress.advance(end - start)

    def _copy_sidecar(self, name: str) -> None:
        path = self._staging.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.fetched(name) is not None:
            self._fetch(name, path, [])
            with path.open("r+b") as target:
                self._staging.fsync(target.fileno())
            return
        with (self._checkpoint.root / name).open("rb") as source, path.open("wb") as target:
            size = os.fstat(source.fileno()).st_size
            copy_range(source.fileno(), target.fileno(), 0, size)
            self._staging.fsync(target.fileno())
        self._progress.advance(size)

    def _hold(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor
