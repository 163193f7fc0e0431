"""Builds an output folder under a hidden name: locked, with a journal, and named only when complete."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablate_shards.errors import ChangedError, ExecuteError, UsageError
from ablate_shards.names import ADAPTER_RECEIPT_NAME, NARROWING_NAME, RECEIPT_NAMES, TRAINING_NAME
from ablate_shards.surgery.machine.files import append_lines
from ablate_shards.surgery.machine.system import (
    exchange_folders,
    exclusive,
    name_folder,
    start_writing,
    sync,
    sync_folder,
)

__all__ = ["OutFolder", "Staging", "beside", "check_free", "check_out", "is_staged", "locked"]

_JOURNAL = ".journal.jsonl"
#: The files by which a folder that an earlier run made is known.
_RECEIPTS = (*RECEIPT_NAMES, ADAPTER_RECEIPT_NAME, TRAINING_NAME, NARROWING_NAME)


@dataclass(frozen=True, slots=True)
class OutFolder:
    """A folder to make, in which nothing would be lost; :func:`check_out` returns it.

    Attributes:
        path: Its name, no link.
        overwrite: Whether a folder of that name that an earlier run made may be replaced.
    """

    path: Path
    overwrite: bool


def check_out(
    source: Path, files: Iterable[Path], out: Path, *, overwrite: bool, inputs: Iterable[Path] = ()
) -> OutFolder:
    """Refuses an output folder that would lose something.

    Args:
        source: The checkpoint's file or folder.
        files: Its files, which may be links to other places.
        out: The folder to make.
        overwrite: Whether a folder that an earlier run made may be replaced.
        inputs: What else is read.

    Raises:
        UsageError: OUT is SOURCE, lies inside it or holds it, holds another input, or is not a folder name.
        ExecuteError: OUT exists and may not be replaced, or its parent does not exist.
    """
    if out.suffix == ".safetensors":
        raise UsageError(f"{out}: OUT is a folder; name it without .safetensors")
    here, there = source.resolve(), out.resolve()
    folder = here.parent if source.is_file() else here
    if there == here or there in here.parents or (folder in there.parents and not source.is_file()):
        raise UsageError(f"{out}: OUT and SOURCE may not be the same or lie inside each other; name another folder")
    if there == folder:
        raise UsageError(f"{out}: OUT is the folder that SOURCE lies in; name another folder")
    for file in files:
        if there in file.resolve().parents:
            raise UsageError(f"{out}: {file} is a link into OUT, which would be replaced; name another folder")
    if not there.parent.is_dir():
        raise ExecuteError(f"{there.parent}: the folder that OUT would lie in does not exist; make it first")
    check_free(out, overwrite=overwrite)
    for path in inputs:
        if there in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"{out}: holds {path}, which would be replaced; name another folder")
    return OutFolder(there if out.is_symlink() else out, overwrite)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that exists and may not be replaced.

    Raises:
        ExecuteError: It is one.
    """
    empty = out.is_dir() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not empty:
        if not _made_by_a_run(out):
            raise ExecuteError(
                f"{out}: already exists and holds no {' or '.join(_RECEIPTS)}, so it is not replaced; name another "
                "folder"
            )
        if not overwrite:
            raise ExecuteError(f"{out}: already exists; --overwrite replaces it, or name another folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock on one output folder; the system drops it when the process ends, however it ends.

    A disk without locks, as Lustre and NFS may be mounted, holds none.

    Raises:
        ExecuteError: Another run holds it.
    """
    with exclusive(beside(out, "lock")) as held:
        if not held:
            raise ExecuteError(f"{out}: another run is writing it; wait for that run to end")
        yield


@dataclass(slots=True)
class Staging:
    """An unfinished output folder and the journal of what is complete in it.

    Attributes:
        out: The final name.
        folder: Where the files are until then, on the same filesystem.
        overwrite: Whether an earlier output of that name may be replaced.
        sync: Whether what is said to be complete is on the disk by then.
        identity: What must be equal for a resumed run, by the names that errors use, as the journal has it.
        done: What the journal says of each complete shard.
    """

    out: Path
    folder: Path
    overwrite: bool
    sync: bool = True
    identity: dict[str, str] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        out: Path,
        identity: Mapping[str, str],
        sizes: Mapping[str, int] | None,
        *,
        resume: bool,
        overwrite: bool,
        sync: bool = True,
    ) -> "Staging":
        """Makes the folder, or continues the one an interrupted run left.

        Args:
            out: The final name.
            identity: What must be equal for a resumed run to give the same bytes, by the names that errors use.
            sizes: Bytes of each shard; one that is gone or of another size is made again. None: of any size.
            resume: Go on with an interrupted run, if there is one.
            overwrite: Throw an interrupted run away (with resume: if it cannot be gone on with).
            sync: Wait for the disk before anything is said to be complete.

        Raises:
            ExecuteError: An interrupted run is in the way, or is not of this plan and source.
        """
        staging = cls(out, beside(out, "staging"), overwrite, sync)
        journal = staging.folder / _JOURNAL
        if journal.is_file():
            if resume:
                staging._read(journal, sizes)
                if not (overwrite and staging._changed(identity)):
                    staging.agree(identity)
                    return staging
                staging = cls(out, staging.folder, overwrite, sync)
            elif not overwrite:
                raise ExecuteError(
                    f"{out}: an interrupted run is staged in {staging.folder}; --resume goes on with it, "
                    "--overwrite starts again"
                )
        if staging.folder.exists():
            shutil.rmtree(staging.folder)
        staging.folder.mkdir()
        staging.agree(identity)
        return staging

    def agree(self, identity: Mapping[str, str]) -> None:
        """Checks what must be equal for a resumed run against what the journal says, or writes it down.

        Raises:
            ChangedError: Something changed since the interrupted run.
        """
        if changed := self._changed(identity):
            raise ChangedError(
                f"{self.out}: cannot be resumed, because {' and '.join(changed)} changed since the interrupted "
                "run; --overwrite starts again"
            )
        if new := {what: value for what, value in identity.items() if what not in self.identity}:
            self._append({"identity": new})
            self.identity |= new

    def fsync(self, descriptor: int) -> None:
        """Waits until a file is on the disk."""
        if self.sync:
            sync(descriptor)

    def fsync_folder(self, folder: Path) -> None:
        """Waits until the names in a folder are on the disk."""
        if self.sync:
            sync_folder(folder)

    def start_writing(self, descriptor: int, start: int, end: int) -> None:
        """Starts writing a range of a file to the disk, where the system can, without waiting for it."""
        if self.sync:
            start_writing(descriptor, start, end)

    def record(self, shard: str, content: Any) -> None:
        """Writes down, durably, that a shard is complete."""
        self._append({"shard": shard, "content": content})
        self.done[shard] = content

    def publish(self, replaceable: Callable[[Path], bool] | None = None) -> None:
        """Gives the folder its final name, in one step, with everything in it on disk.

        Args:
            replaceable: Whether a folder is one that ``overwrite`` replaces; by its receipt if None.

        Raises:
            FileExistsError: The name was taken during the run, by what may not be replaced.
        """
        for folder, _, _ in os.walk(self.folder):
            self.fsync_folder(Path(folder))
        taken = self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))
        if taken and not (self.overwrite and (replaceable or _made_by_a_run)(self.out)):
            raise FileExistsError(errno.EEXIST, "appeared during the run and is not replaced", str(self.out))
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        if taken:
            exchange_folders(self.folder, self.out, beside(self.out, "replaced"))
            shutil.rmtree(self.folder)
        else:
            name_folder(self.folder, self.out)
        self.fsync_folder(self.out.parent)

    def discard(self) -> None:
        """Removes the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _changed(self, identity: Mapping[str, str]) -> list[str]:
        return [what for what in identity if self.identity.get(what, identity[what]) != identity[what]]

    def _read(self, journal: Path, sizes: Mapping[str, int] | None) -> None:
        for line in journal.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a kill can tear the last line; the shard that it named is made again
                entry = json.loads(line)
                self.identity |= entry.get("identity", {})
                if "shard" in entry:
                    self.done[entry["shard"]] = entry["content"]
        for name in list(self.done):
            path = self.folder / name
            if not path.is_file() or (sizes is not None and path.stat().st_size != sizes.get(name)):
                del self.done[name]

    def _append(self, entry: Mapping[str, Any]) -> None:
        append_lines(self.folder / _JOURNAL, [entry], sync=self.sync)


def _made_by_a_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _RECEIPTS)


def is_staged(out: Path) -> bool:
    """Returns whether a run left an output folder under its hidden name."""
    return (beside(out, "staging") / _JOURNAL).is_file()


def beside(out: Path, what: str) -> Path:
    """Returns the hidden name beside an output folder for what belongs to the making of it."""
    out = out.resolve()
    return out.with_name(f".{out.name}.ablate-{what}")
