"""Edits a checkpoint into a folder of an object store, shard by shard, with no more than one shard on this disk."""

import dataclasses
import functools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ablate_shards.errors import AblateError, ExecuteError, HubError, UsageError
from ablate_shards.names import RECEIPT_NAMES
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, size_of
from ablate_shards.surgery.checkpoint.object_store import UNFINISHED, FsspecFaults, entry_of, listing, open_system
from ablate_shards.surgery.checkpoint.remote import Entry, patiently
from ablate_shards.surgery.edit.operation import Operation, RunOptions, check_unchanged, ending_early
from ablate_shards.surgery.edit.parts import EditedPart, Joined, are_told_of, lacking
from ablate_shards.surgery.edit.queue import Work
from ablate_shards.surgery.edit.shard_writer import ShardWriter
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import Staging, locked
from ablate_shards.surgery.plan.edits import Edit

__all__ = [
    "check_in_store",
    "complete_in_store",
    "is_joined_in_store",
    "join_in_store",
    "perform_in_store",
    "remove_from_store",
]

_INDEX = ".safetensors.index.json"
_CONFIG = "config.json"
#: Files that the store copies at a time.
_COPIES = 8

_E = TypeVar("_E", bound=Edit)
_T = TypeVar("_T")


def perform_in_store(
    checkpoint: Checkpoint, operation: Operation[_E, Any], url: str, run: RunOptions, progress: Progress
) -> dict[str, Any]:
    """Carries out an operation into a folder of an object store.

    Shards are made one at a time in a folder here, sent, and removed; those without an edit the store copies by
    itself where it holds the source too. A journal in the folder says what has arrived; while it is there, the
    folder is not complete. What a loader looks for first, the configuration and the index, and then the receipt
    come last.

    Args:
        checkpoint: The source.
        operation: What to do.
        url: The folder, such as ``s3://bucket/model-edited``.
        run: How to run; ``overwrite`` replaces a folder that an earlier run made.
        progress: Receives how far the run has come.

    Returns:
        The result of each edit, by tensor.

    Raises:
        ExecuteError: OUT is in the way, the disk is too small, or a tensor cannot be edited.
        HubError: The store cannot be written.
        Interrupted: Ctrl-C or SIGTERM; what has been sent need not be sent again.
        UsageError: OUT is SOURCE, or lies inside it, or is no folder of an object store.
    """
    target = _Target(url)
    source = target.path_of(checkpoint)
    amended = operation.amend(checkpoint)
    # Beside it, hidden, are the lock and the shard under way.
    place = Path.cwd() / f"store-{re.sub(r'[^A-Za-z0-9.]+', '--', target.url)}"
    journal: _Journal | None = None
    staging: Staging | None = None

    def kept() -> str:
        if journal is None:
            return "nothing was written"
        return f"what is complete is kept in {target.url}, and the same command with --resume goes on"

    def discard() -> None:
        if journal is not None and not run.resume and not journal.replaced:
            with suppress(AblateError):
                target.remove(set(target.entries()) - {UNFINISHED})
                target.remove([UNFINISHED])

    with sigterm_as_interrupt(), locked(place), ending_early(target.url, kept, discard):
        try:
            found = _open_journal(target, run, operation.identity_on(checkpoint))
            staging = Staging.open(place, found.identity, {}, resume=False, overwrite=True)
            edited = {edit.shard for edit in operation.edits} | amended.amended
            by_store = {shard.name for shard in amended.shards if source is not None and shard.name not in edited}
            here = tuple(shard for shard in amended.shards if shard.name not in by_store)
            staging.done |= {shard.name: found.sent[shard.name].content for shard in here if shard.name in found.sent}
            todo = [shard.size for shard in here if shard.name not in staging.done]
            _check_disk(staging, max(todo, default=0))
            progress.begin(sum(todo) + sum(size_of(amended, name) for name in amended.sidecars))
            found.keep(target)
            journal = found
            target.remove(name for name in found.replaced if _found_first(name))
            for name in sorted(by_store - found.sent.keys()):
                found.sent[name] = _Sent(target.copy(f"{source}/{name}", name, size_of(amended, name)), {})
                found.keep(target)
            part = dataclasses.replace(amended, shards=here)
            with _Sender(part, operation, staging, progress, target, found) as sender:
                results, device = sender.write(run)
            check_unchanged(checkpoint)
            receipt = staging.folder / operation.receipt_name
            receipt.write_text(operation.receipt(checkpoint, results, device), encoding="utf-8", newline="\n")
            for name in [*sorted(amended.sidecars, key=_found_first), operation.receipt_name]:
                target.send(staging.folder / name, name)
            ours = {operation.receipt_name, *(shard.name for shard in amended.shards), *amended.sidecars}
            target.remove(name for name in found.replaced if name not in ours)
            target.remove([UNFINISHED])
        finally:
            if staging is not None:
                staging.discard()
    return results


def check_in_store(checkpoint: Checkpoint, url: str, *, overwrite: bool) -> None:
    """Refuses a folder of an object store that may not be written.

    Raises:
        ExecuteError: OUT is in the way.
        HubError: The store cannot be read.
        UsageError: OUT is SOURCE, or lies inside it, or is no folder of an object store.
    """
    target = _Target(url)
    target.path_of(checkpoint)
    entries = target.entries()
    if UNFINISHED not in entries:
        _check_free(target, entries, overwrite=overwrite)


def complete_in_store(place: str) -> list[str]:
    """Returns the folders of ranks that are complete, as URLs."""
    entries = _Target(place).entries()
    found = {folder for folder, _, name in (entry.partition("/") for entry in entries) if name in RECEIPT_NAMES}
    return [f"{place}/{folder}" for folder in sorted(found) if f"{folder}/{UNFINISHED}" not in entries]


def is_joined_in_store(parts: Sequence[EditedPart], place: str, url: str) -> bool:
    """Returns whether parts were joined, and all that is left of them is what :func:`remove_from_store` removes last.

    Args:
        parts: Those of ranks that are complete, or were.
        place: The folder of the parts.
        url: The folder that they made.
    """
    held = _Target(place).entries()
    kept = (f"{part.folder}/{name}" for part in parts for name in part.files if not _found_first(name))
    if not parts or any(path in held for path in kept):
        return False
    target = _Target(url)
    entries = target.entries()
    name = parts[0].receipt_name
    return UNFINISHED not in entries and name in entries and are_told_of(target.read(name), parts)


def remove_from_store(url: str) -> None:
    """Removes the folder of a rank, or of all; that by which ranks are known to be complete last."""
    target = _Target(url)
    target.remove(sorted(target.entries(), key=lambda name: (_found_first(name.partition("/")[2] or name), name)))


def join_in_store(joined: Joined, place: str, url: str, *, overwrite: bool, progress: Progress) -> None:
    """Makes the parts of all ranks one folder; the store itself copies their files.

    What was interrupted goes on when it is done again. The order of the files is that of :func:`perform_in_store`.

    Args:
        joined: What the parts make.
        place: The folder of the parts.
        url: The folder to make.
        overwrite: Whether a folder that an earlier run made is replaced.
        progress: Receives how far it has come.

    Raises:
        ExecuteError: OUT is in the way, or a file of a part is gone or has another size.
        HubError: The store cannot be written.
        Interrupted: Ctrl-C or SIGTERM.
    """
    target, parts = _Target(url), _Target(place)
    with sigterm_as_interrupt(), ending_early(target.url, lambda: "finish again to go on", lambda: None):
        held = parts.entries()
        left = all(f"{folder}/{name}" in held for name, (folder, _) in joined.files.items())
        if not (left and overwrite) and target.holds(joined.receipt_name, joined.receipt.encode()):
            return
        journal = _open_journal(target, RunOptions(resume=True, overwrite=overwrite), joined.identity)
        for name, (folder, size) in joined.files.items():
            path = f"{folder}/{name}"
            if (found := held[path].size if path in held else None) != size:
                raise lacking(f"{place}/{path}", size, found)
        progress.begin(sum(size for _, size in joined.files.values()))
        journal.keep(target)
        target.remove(name for name in journal.replaced if _found_first(name))

        keeping = threading.Lock()

        def copy(name: str) -> None:
            folder, size = joined.files[name]
            stamp = target.copy(f"{parts.root}/{folder}/{name}", name, size)
            with keeping:
                journal.sent[name] = _Sent(stamp, {})
                journal.keep(target)
            progress.advance(size)

        with ThreadPoolExecutor(_COPIES) as pool:
            todo = [name for name in joined.files if name not in journal.sent and not _found_first(name)]
            try:
                for copied in [pool.submit(copy, name) for name in todo]:
                    copied.result()
            finally:
                pool.shutdown(cancel_futures=True)
        for name in filter(_found_first, joined.files):
            copy(name)
        target.write(joined.receipt_name, joined.receipt.encode())
        target.remove(name for name in journal.replaced if name not in {joined.receipt_name, *joined.files})
        target.remove([UNFINISHED])


@dataclass(frozen=True, slots=True)
class _Sent:
    """A shard that has arrived.

    Attributes:
        stamp: What the store called it then; another one means that it was changed.
        content: What was measured of its edits.
    """

    stamp: str
    content: dict[str, Any]


@dataclass(slots=True)
class _Journal:
    """What is complete in an unfinished folder; kept in that folder.

    Attributes:
        identity: What must be equal for a resumed run to give the same bytes, by what to call it.
        replaced: The files that were there at the start; what is left of them is removed at the end.
        sent: The shards that have arrived.
    """

    identity: dict[str, str]
    replaced: tuple[str, ...]
    sent: dict[str, _Sent] = field(default_factory=dict)

    def keep(self, target: "_Target") -> None:
        """Writes it into the folder."""
        target.write(UNFINISHED, json.dumps(dataclasses.asdict(self)).encode())


def _open_journal(target: "_Target", run: RunOptions, identity: Mapping[str, str]) -> _Journal:
    """Returns the journal of an interrupted run, or a new one where the folder may be written.

    Raises:
        ExecuteError: The folder is in the way.
    """
    entries = target.entries()
    fresh = _Journal(dict(identity), tuple(name for name in entries if name != UNFINISHED))
    if UNFINISHED in entries:
        if run.resume:
            journal = _read(target)
            changed = [what for what, value in identity.items() if journal.identity.get(what) != value]
            if not changed:
                sent = {
                    name: sent
                    for name, sent in journal.sent.items()
                    if name in entries and target.state(name).stamp == sent.stamp
                }
                return dataclasses.replace(journal, sent=sent)
            if not run.overwrite:
                raise ExecuteError(
                    f"{target.url}: cannot be resumed, because {' and '.join(changed)} changed since the interrupted "
                    "run; --overwrite starts again"
                )
        elif not run.overwrite:
            raise ExecuteError(
                f"{target.url}: an interrupted run has left it half made; --resume goes on with it, "
                "--overwrite starts again (make sure that no other run is writing it)"
            )
        return fresh
    _check_free(target, entries, overwrite=run.overwrite)
    return fresh


def _check_free(target: "_Target", entries: Mapping[str, Entry], *, overwrite: bool) -> None:
    """Refuses a folder that exists and may not be replaced.

    Raises:
        ExecuteError: It is one.
    """
    if "" in entries:
        raise ExecuteError(f"{target.url}: is a file; name a folder")
    if entries and not any(name in entries for name in RECEIPT_NAMES):
        raise ExecuteError(
            f"{target.url}: already exists and holds no {' or '.join(RECEIPT_NAMES)}, so it is not replaced; name "
            "another folder"
        )
    if entries and not overwrite:
        raise ExecuteError(f"{target.url}: already exists; --overwrite replaces it, or name another folder")


def _read(target: "_Target") -> _Journal:
    try:
        content = json.loads(target.read(UNFINISHED))
        sent = {name: _Sent(**value) for name, value in content["sent"].items()}
        return _Journal(dict(content["identity"]), tuple(content["replaced"]), sent)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExecuteError(
            f"{target.url}/{UNFINISHED}: is not what an interrupted run wrote; --overwrite starts again"
        ) from error


class _Sender(ShardWriter[_E, Any]):
    """Edits one shard at a time, sends it, and removes it here."""

    in_flight = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        operation: Operation[_E, Any],
        staging: Staging,
        progress: Progress,
        target: "_Target",
        journal: _Journal,
    ) -> None:
        # A link costs no disk, and what is removed here after it was sent is the link.
        super().__init__(checkpoint, operation, staging, progress, link=checkpoint.remote is None)
        self._target, self._journal = target, journal

    def finish(self, work: Work[Any]) -> dict[str, Any]:
        """Waits for a shard and sends it."""
        results = super().finish(work)
        name = work.shard.name
        path = self._staging.folder / name
        stamp = self._target.send(path, name)
        path.unlink()
        # By now it holds what did the arithmetic too, which a resumed run has to agree with.
        self._journal.identity |= self._staging.identity
        self._journal.sent[name] = _Sent(stamp, self._staging.done[name])
        self._journal.keep(self._target)
        return results


class _Target:
    """A folder of an object store, where files appear whole or not at all.

    Args:
        url: The folder.

    Attributes:
        url: The folder, as messages call it.
        root: The folder, as the store calls it.

    Raises:
        UsageError: It is no folder of an object store.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            raise UsageError(f"{url}: is a folder here; name it without {protocol}://")
        if protocol == "hf":
            raise UsageError(f"{url}: a repository gets one commit; name it as hub:org/name")
        self._system, self.root = open_system(self.url)
        self._faults = FsspecFaults(self.url, writing=True)

    def path_of(self, checkpoint: Checkpoint) -> str | None:
        """Returns where a checkpoint is in this store, None where it is elsewhere.

        Raises:
            UsageError: The folder is the checkpoint's, lies in it, or holds it.
        """
        if checkpoint.remote is None or checkpoint.remote.revision is not None:
            return None
        system, root = open_system(checkpoint.remote.name)
        if system is not self._system:
            return None
        if f"{root}/".startswith(f"{self.root}/") or f"{self.root}/".startswith(f"{root}/"):
            raise UsageError(
                f"{self.url}: OUT and SOURCE may not be the same or lie inside each other; name another folder"
            )
        return root

    def entries(self) -> dict[str, Entry]:
        """Returns its files as they are now."""
        try:
            return self._patiently(lambda: listing(self._system, self.root))
        except HubError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise HubError(f"{self.url}: there is no such bucket; make it first") from error
            raise

    def read(self, name: str) -> bytes:
        """Returns a small file's content."""
        return bytes(self._patiently(lambda: self._system.cat_file(f"{self.root}/{name}")))

    def holds(self, name: str, content: bytes) -> bool:
        """Returns whether the folder is complete and a small file in it has this content."""
        entries = self.entries()
        return UNFINISHED not in entries and name in entries and self.read(name) == content

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        self._patiently(lambda: self._system.pipe_file(f"{self.root}/{name}", content))

    def send(self, path: Path, name: str) -> str:
        """Writes a file from this disk; returns what the store calls its state."""
        self._patiently(lambda: self._system.put_file(str(path), f"{self.root}/{name}", **self._parts()))
        return self._arrived(name, path.stat().st_size)

    def copy(self, source: str, name: str, size: int) -> str:
        """Has the store copy a file that it holds; returns the copy's state as the store names it."""
        self._patiently(lambda: self._system.cp_file(source, f"{self.root}/{name}"))
        return self._arrived(name, size)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; a file that is already gone is no error."""
        for name in names:
            self._patiently(functools.partial(self._gone, f"{self.root}/{name}"))

    def _gone(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(path)

    def state(self, name: str) -> Entry:
        """Returns what the store knows of a file now; a listing may word it otherwise."""
        self._system.invalidate_cache()
        return entry_of(self._patiently(lambda: self._system.info(f"{self.root}/{name}")))

    def _arrived(self, name: str, size: int) -> str:
        entry = self.state(name)
        if entry.size != size:
            raise HubError(f"{self.url}/{name}: arrived with {entry.size} bytes, expected {size}")
        return entry.stamp

    def _parts(self) -> dict[str, int]:
        """Keeps s3fs, which sends ten parts of 50 MiB at a time, from holding all of them in memory."""
        return {"max_concurrency": 2} if "s3" in self._system.protocol else {}

    def _patiently(self, call: Callable[[], _T]) -> _T:
        return patiently(self._faults, call)


def _found_first(name: str) -> bool:
    """Returns whether a file is one that a loader, or this package, takes for a sign of a checkpoint."""
    return name == _CONFIG or name.endswith(_INDEX) or name in RECEIPT_NAMES


def _check_disk(staging: Staging, needed: int) -> None:
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise ExecuteError(
            f"{staging.folder}: needs {size_text(needed, 5)} for one shard, but its disk has {size_text(free, 5)} "
            "free; free some, or run it from a folder on another disk"
        )
