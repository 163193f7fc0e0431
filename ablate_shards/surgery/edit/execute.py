"""Carries out a plan: copies byte ranges, edits tensors into theirs, publishes the folder when complete."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, HubError, Interrupted
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, files_of, fingerprint, size_of
from ablate_shards.surgery.checkpoint.headers import Shard
from ablate_shards.surgery.edit.blocks import BlockEditor, Channels, Part, Stopped
from ablate_shards.surgery.edit.queue import Task, UnderWay, Work
from ablate_shards.surgery.machine.devices import cores, find_device
from ablate_shards.surgery.machine.files import pread_into, pwrite_all
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt, uninterrupted
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import Staging, check_out, locked
from ablate_shards.surgery.plan.edits import Edit, by_shard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "ExecuteOptions",
    "Operation",
    "Surgeon",
    "check_unchanged",
    "ending_early",
    "perform",
    "untouched",
    "what_is_kept",
]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R", bound="DataclassInstance")

#: Bytes copied before an edit may write: with more, edits wait too long; with fewer, copying does. A large shard is
#: copied in larger pieces, so that there are never more than _MOST_PIECES.
_COPY_CHUNK, _MOST_PIECES = 8 << 20, 500
_FALLBACK_CHUNK = 1 << 20
_MANY_CORES = 4
_SHARDS_IN_FLIGHT = 4
_FICLONE = 0x40049409
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class ExecuteOptions:
    """How to run, none of which changes a byte of the output on one device.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes that all working buffers may take together.
        jobs: Tensors, or parts of large ones, edited at a time, one per available core if None.
        resume: Go on with an interrupted run.
        overwrite: Replace a folder that an earlier run made.
        link: Make shards without an edit hard links to the source's, which share their bytes for good.
        sync: End only when everything is on the disk; otherwise as ``cp`` does, and a power failure may lose OUT.
    """

    device: str = "auto"
    memory: int = 256_000_000
    jobs: int | None = None
    resume: bool = False
    overwrite: bool = False
    link: bool = False
    sync: bool = True


@dataclass(frozen=True, slots=True)
class Operation(Generic[_E, _R]):
    """What is done to a checkpoint, whatever it is: the edits, who carries them out, and the receipt.

    Attributes:
        edits: The tensors to edit.
        identity: What must be equal for an interrupted run to be resumed: values by the names that errors use.
        editor: Makes the editor of a run that ends early when the event is set.
        result: Makes a result of the fields that the journal kept of it.
        receipt_name: The file in OUT that says what was done.
        receipt: Returns its text, from the results and from what did the arithmetic.
    """

    edits: tuple[_E, ...]
    identity: Mapping[str, str]
    editor: Callable[[ExecuteOptions, threading.Event], BlockEditor[_E, _R]]
    result: Callable[..., _R]
    receipt_name: str
    receipt: Callable[[Mapping[str, _R], Mapping[str, str]], str]

    def identity_on(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Returns all that must be equal for an interrupted run on a checkpoint to be resumed."""
        return {
            **self.identity,
            "the source": checkpoint.fingerprint,
            "the version of ablate-shards": __version__,
        }


def perform(
    checkpoint: Checkpoint, operation: Operation[_E, _R], out: Path, run: ExecuteOptions, progress: Progress
) -> dict[str, _R]:
    """Carries out an operation on a checkpoint; OUT appears complete or not at all.

    Args:
        checkpoint: The source, never opened for writing.
        operation: What to do.
        out: The folder to make.
        run: How to run.
        progress: Receives how far the run has come.

    Returns:
        The result of each edit, by tensor.

    Raises:
        ExecuteError: OUT is in the way, the disk is too small, or a tensor cannot be edited.
        Interrupted: Ctrl-C or SIGTERM; the staged state can be resumed.
    """
    check_out(checkpoint.path, files_of(checkpoint), out, overwrite=run.overwrite)
    out = out.resolve() if out.is_symlink() else out
    sizes = {shard.name: shard.size for shard in checkpoint.shards}
    identity = operation.identity_on(checkpoint)
    if run.device != "auto":
        find_device(run.device)
    staging: Staging | None = None

    def discard() -> None:
        if staging is not None and not run.resume:
            staging.discard()

    with sigterm_as_interrupt(), locked(out), ending_early(out, lambda: what_is_kept(staging), discard):
        staging = Staging.open(out, identity, sizes, resume=run.resume, overwrite=run.overwrite, sync=run.sync)
        _check_disk(checkpoint, operation.edits, staging, link=run.link)
        progress.begin(_bytes_to_write(checkpoint, staging))
        with Surgeon(checkpoint, operation, staging, progress, link=run.link) as surgeon:
            results, identity = surgeon.operate(run)
        check_unchanged(checkpoint)
        with (staging.folder / operation.receipt_name).open("w", encoding="utf-8") as file:
            file.write(operation.receipt(results, identity))
            file.flush()
            staging.fsync(file.fileno())
        with uninterrupted():
            staging.publish()
    return results


@contextlib.contextmanager
def ending_early(out: object, kept: Callable[[], str], discard: Callable[[], None]) -> Iterator[None]:
    """Adds what is kept to the error of a run that can be resumed; after any other error, discards what was written."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(f"{out}: interrupted; {kept()}") from error
    except HubError as error:
        raise HubError(f"{error}; {kept()}") from error
    except OSError as error:
        raise ExecuteError(f"{error.filename or out}: {error.strerror or error}; {kept()}") from error
    except Exception:
        discard()
        raise


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Compares a source that has been read with what it was before.

    Raises:
        ExecuteError: It has changed.
    """
    if fingerprint(checkpoint) != checkpoint.fingerprint:
        raise ExecuteError(f"{checkpoint.name}: changed while it was read; run again when nothing writes to it")


def what_is_kept(staging: Staging | None) -> str:
    """Returns the end of an error's sentence: what an interrupted run leaves, and how to go on."""
    if staging is None:
        return "nothing was written"
    return f"what is complete is kept in {staging.folder}, and the same command with --resume goes on"


class Surgeon(Generic[_E, _R]):
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

    def operate(self, run: ExecuteOptions) -> tuple[dict[str, _R], dict[str, str]]:
        """Writes every file but the receipt; returns what was measured, and by what."""
        results = {
            name: self._operation.result(**values)
            for content in self._staging.done.values()
            for name, values in content.items()
        }
        # Where there are few cores, the edits need them more than copying does.
        copiers = self._pool((1 if cores() < _MANY_CORES else 2) if self._checkpoint.remote is None else self.in_flight)
        sidecars = [copiers.submit(self._copy_sidecar, name) for name in self._checkpoint.sidecars]
        shards = (shard for shard in self._checkpoint.shards if shard.name not in self._staging.done)
        under_way = deque(self._start_copy(shard, copiers) for shard in itertools.islice(shards, self.in_flight))
        # torch is imported only now, if at all: the copying above needs neither torch nor the interpreter lock.
        editor = self._operation.editor(run, self._stop)
        self._progress.note(editor.reason)
        identity = editor.identity()
        self._staging.agree({f"the {what}": value for what, value in identity.items()})
        editors = self._pool(editor.jobs)
        with editor.one_thread_each():
            for work in under_way:
                self._start_edits(work, editor, editors)
            while under_way:
                results |= self.complete(under_way.popleft())
                for shard in itertools.islice(shards, 1):
                    under_way.append(self._start_copy(shard, copiers))
                    self._start_edits(under_way[-1], editor, editors)
        for future in sidecars:
            future.result()
        return results, identity

    def _pool(self, workers: int) -> ThreadPoolExecutor:
        self._pools.append(ThreadPoolExecutor(workers))
        return self._pools[-1]

    def _start_copy(self, shard: Shard, copiers: ThreadPoolExecutor) -> Work[_R]:
        path = self._staging.folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        edits = self._edits.get(shard.name, ())
        if self._checkpoint.remote is not None:
            return self._start_fetch(shard, path, [(edit.start, edit.end) for edit in edits], copiers)
        path.unlink(missing_ok=True)
        linked = not edits and self._link and _link(shard.path, path)
        source = self._hold(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
        if linked:
            self._progress.advance(shard.size)
            return Work(shard, source, self._hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
        target = self._hold(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        ranges = list(untouched(shard, edits))
        work: Work[_R] = Work(shard, source, target)
        if _clone(source, target):
            self._progress.advance(sum(end - start for start, end in ranges))
            return work
        _allocate(target, shard.size)
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
        target = self._hold(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        source = self._hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        fetched = copiers.submit(self._fetch, shard.name, path, edited)
        return Work(shard, source, target, [fetched], fetched=fetched)

    def _fetch(self, name: str, path: Path, edited: list[tuple[int, int]]) -> None:
        if self._checkpoint.remote is not None:
            advance = self._progress.advance
            self._checkpoint.remote.fetch(name, path, stop=self._stop, advance=advance, edited=edited)

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
            Task(functools.partial(self._edit, edit.name, part, work))
            for edit in self._edits.get(work.shard.name, ())
            for part in editor.parts(edit, channels)
        ]
        work.edits += [task.future for task in tasks]
        self._under_way.add(work, edits=tasks)
        for _ in tasks:
            editors.submit(self._under_way.edit_next)

    def complete(self, work: Work[_R]) -> dict[str, _R]:
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

    def _edit(self, name: str, part: Part[_R], work: Work[_R]) -> tuple[str, _R] | None:
        if work.fetched is not None:
            work.fetched.result()
        result = part.do()
        self._staging.start_writing(work.target, part.start, part.end)
        return None if result is None else (name, result)

    def _copy(self, work: Work[_R], start: int, end: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with work.writing():
            _copy_range(work.source, work.target, start, end)
        # The disk is busy from the start, and what is left to wait for at the end is little.
        self._staging.start_writing(work.target, start, end)
        self._progress.advance(end - start)

    def _copy_sidecar(self, name: str) -> None:
        path = self._staging.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.remote is not None:
            self._fetch(name, path, [])
            with path.open("rb") as target:
                self._staging.fsync(target.fileno())
            return
        with (self._checkpoint.root / name).open("rb") as source, path.open("wb") as target:
            size = os.fstat(source.fileno()).st_size
            _copy_range(source.fileno(), target.fileno(), 0, size)
            self._staging.fsync(target.fileno())
        self._progress.advance(size)

    def _hold(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor


def untouched(shard: Shard, edits: Iterable[Edit]) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges of a shard outside its edits (in the order of their bytes), the header among them."""
    position = 0
    for edit in edits:
        if position < edit.start:
            yield position, edit.start
        position = edit.end
    if position < shard.size:
        yield position, shard.size


def _bytes_to_write(checkpoint: Checkpoint, staging: Staging) -> int:
    shards = sum(shard.size for shard in checkpoint.shards if shard.name not in staging.done)
    return shards + sum(size_of(checkpoint, name) for name in checkpoint.sidecars)


def _check_disk(checkpoint: Checkpoint, edits: Iterable[Edit], staging: Staging, *, link: bool) -> None:
    reused = sum(path.stat().st_size for path in staging.folder.rglob("*") if path.is_file())
    complete = sum(shard.size for shard in checkpoint.shards if shard.name in staging.done)
    edited = {edit.shard for edit in edits}
    linked = sum(shard.size for shard in checkpoint.shards if link and shard.name not in edited | staging.done.keys())
    needed = _bytes_to_write(checkpoint, staging) - (reused - complete) - linked
    if _shares_blocks(checkpoint, staging):
        needed = sum(edit.end - edit.start for edit in edits if edit.shard not in staging.done)
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise ExecuteError(
            f"{staging.out}: needs {size_text(needed, 5)}, but its disk has {size_text(free, 5)} free; "
            "free some or name a folder on another disk"
        )


def _shares_blocks(checkpoint: Checkpoint, staging: Staging) -> bool:
    """Whether the shards of OUT can share the source's blocks: tried with a file that is then removed."""
    if checkpoint.remote is not None:
        return False
    path = staging.folder / ".shared"
    with checkpoint.shards[0].path.open("rb") as source, path.open("wb") as target:
        shares = _clone(source.fileno(), target.fileno())
    path.unlink()
    return shares


def _link(source: Path, target: Path) -> bool:
    """Makes a hard link; returns False where the two do not share a filesystem."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    return True


def _clone(source: int, target: int) -> bool:
    """Makes an empty file share another's blocks until either is written to; False where the filesystem cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in {*_NOT_HERE, errno.ENOTTY}:
            raise
        return False
    return True


def _allocate(descriptor: int, size: int) -> None:
    """Gives a file its size, and its blocks where the filesystem can."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
        else:
            return
    os.ftruncate(descriptor, size)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    if hasattr(os, "copy_file_range"):
        try:
            while start < end:
                count = os.copy_file_range(source, target, end - start, start, start)
                if count == 0:
                    break
                start += count
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    buffer = memoryview(bytearray(min(_FALLBACK_CHUNK, end - start)))
    while start < end:
        data = buffer[: end - start]
        pread_into(source, data, start)
        pwrite_all(target, data, start)
        start += len(data)
