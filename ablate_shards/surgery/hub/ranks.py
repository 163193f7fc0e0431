"""An output that several ranks make: each its part, hidden beside the output, and the end that joins them."""

import dataclasses
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ablate_shards.errors import ChangedError, UsageError
from ablate_shards.names import RECEIPT_NAMES
from ablate_shards.surgery.capture.ranks import join_dump
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.files import Files, Folder
from ablate_shards.surgery.checkpoint.stores import hub_repository, open_files
from ablate_shards.surgery.edit.folder import perform_in_folder
from ablate_shards.surgery.edit.operation import Operation, RunOptions
from ablate_shards.surgery.edit.parts import EditedPart, Joined, agreed_on, join, join_in_folder, part_of, read_part
from ablate_shards.surgery.machine.parts import PARTS, is_complete, is_part, remove_joined, removed_rest
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.ranks import WorkerRank
from ablate_shards.surgery.machine.staging import OutFolder, beside

__all__ = ["Finished", "finish", "perform_part"]


def perform_part(
    checkpoint: Checkpoint,
    operation: Operation[Any, Any],
    out: OutFolder | Path | str,
    run: RunOptions,
    rank: WorkerRank,
    progress: Progress,
    *,
    private: bool = False,
) -> dict[str, Any]:
    """Does what one rank does of an operation, into a hidden folder beside OUT; nothing has OUT's name before the end.

    In a repository that folder is on a branch of its own.

    A rank that was interrupted goes on, and one that is complete is left as it is.

    Args:
        checkpoint: The source.
        operation: What all ranks do together.
        out: The folder that all of them make, ``hub:org/name``, or a URL that fsspec writes.
        run: How to run; ``overwrite`` throws away what ranks did of another operation.
        rank: Which rank this is.
        progress: Receives how far it has come.
        private: Whether a new repository is made private.

    Returns:
        The result of each edit that the rank did in this run, by tensor.

    Raises:
        ExecuteError: Another rank did a part of something else; and what one process alone may meet.
        HubError: The repository or the object store cannot be read or written.
        Interrupted: Ctrl-C or SIGTERM.
    """
    parts = _parts_of(out, overwrite=run.overwrite, private=private)
    parts.check(checkpoint)
    progress.note(f"this is {rank}, as {rank.said_by} say")
    agreed = agreed_on(operation, checkpoint)
    found = [read_part(files) for files in parts.complete()]
    remove = (lambda part: parts.remove(part.folder)) if run.overwrite else None
    if run.overwrite and found:
        # Only now is the arithmetic looked for, which may have to import torch.
        arithmetic = operation.editor(run, threading.Event()).identity()
        for other in [part for part in found if not part.is_computed_by(arithmetic)]:
            parts.remove(other.folder)
            found.remove(other)
    if is_complete(rank, agreed, found, remove=remove):
        progress.note("it was complete already")
        return {}
    part = part_of(operation, checkpoint, rank, run.command)
    try:
        return parts.perform(rank, checkpoint, part, dataclasses.replace(run, resume=True), progress)
    except ChangedError:
        if not run.overwrite:
            raise
        # The arithmetic changed since it was interrupted.
        return parts.perform(rank, checkpoint, part, dataclasses.replace(run, resume=False), progress)


@dataclass(frozen=True, slots=True)
class Finished:
    """What the parts of all ranks became.

    Attributes:
        holds: What it holds, in words.
        next: The words of a command that goes on with it.
    """

    holds: str
    next: tuple[str, ...]


def finish(out: Path | str, *, overwrite: bool, progress: Progress) -> Finished:
    """Joins what all ranks made, and gives it the name OUT.

    Args:
        out: The folder that they make, the dump that they capture, ``hub:org/name``, or a URL that fsspec writes.
        overwrite: Whether what an earlier run made is replaced.
        progress: Receives how far it has come.

    Raises:
        CaptureError: A dump is in the way.
        ExecuteError: A rank is missing, two do not fit together, or OUT is in the way.
        HubError: The repository or the object store cannot be read or written.
        Interrupted: Ctrl-C or SIGTERM.
        UsageError: OUT is a bucket.
    """
    folder = out if isinstance(out, Path) and hub_repository(out) is None else None
    with_dump = ("directions", str(out), "directions.safetensors")
    with_model = ("verify", "SOURCE", str(out))
    before = "what was joined before"
    if folder is not None and removed_rest(folder):
        is_model = any((folder / name).is_file() for name in RECEIPT_NAMES)
        return Finished(before, with_model if is_model else with_dump)
    if folder is not None and (captured := join_dump(folder, overwrite=overwrite)) is not None:
        pairs, layers = captured
        return Finished(f"{layers} layers of {pairs} pairs", with_dump)
    parts = _parts_of(out if folder is None else OutFolder(folder, overwrite), overwrite=overwrite)
    found = [read_part(files) for files in parts.complete()]
    if parts.are_joined(found):
        parts.remove("")
        return Finished(before, with_model)
    joined = join(out, parts.place, found)
    parts.join(joined, progress)
    parts.remove("")
    holds = f"{joined.receipt_name} and {len(joined.files)} other files"
    return Finished(holds, with_model)


class _Parts(Protocol):
    """Where the parts of an output are: each in a folder of its own."""

    @property
    def place(self) -> Path | str:
        """The folder of all of them."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuses an output that may not be written."""

    def complete(self) -> Iterator[Files]:
        """Yields the parts whose ranks are complete."""

    def perform(
        self, rank: WorkerRank, checkpoint: Checkpoint, part: Operation[Any, Any], run: RunOptions, progress: Progress
    ) -> dict[str, Any]:
        """Makes a part."""

    def are_joined(self, parts: Sequence[EditedPart]) -> bool:
        """Returns whether an interrupted run made the output of them, and began to remove them."""

    def join(self, joined: Joined, progress: Progress) -> None:
        """Makes the output."""

    def remove(self, name: str) -> None:
        """Removes a part, or all if the name is empty."""


class _PartsInFolder:
    def __init__(self, out: OutFolder) -> None:
        path = out.path.resolve() if out.path.is_symlink() else out.path
        self._out = OutFolder(path, out.overwrite)
        self._place = beside(path, PARTS)

    @property
    def place(self) -> Path | str:
        return self._place

    def check(self, checkpoint: Checkpoint) -> None:
        """Does nothing: whoever made an ``OutFolder`` has checked it."""

    def complete(self) -> Iterator[Files]:
        found = sorted(self._place.iterdir()) if self._place.is_dir() else []
        for path in found:
            if is_part(path.name) and any((path / name).is_file() for name in RECEIPT_NAMES):
                yield Folder(path)

    def perform(
        self, rank: WorkerRank, checkpoint: Checkpoint, part: Operation[Any, Any], run: RunOptions, progress: Progress
    ) -> dict[str, Any]:
        self._place.mkdir(exist_ok=True)
        return perform_in_folder(checkpoint, part, OutFolder(self._place / rank.folder, run.overwrite), run, progress)

    def are_joined(self, parts: Sequence[EditedPart]) -> bool:
        """Returns False: they have another name from then on."""
        return False

    def join(self, joined: Joined, progress: Progress) -> None:
        join_in_folder(joined, self._place, self._out)

    def remove(self, name: str) -> None:
        if name:
            shutil.rmtree(self._place / name, ignore_errors=True)
        else:
            remove_joined(self._out.path)


class _PartsInStore:
    def __init__(self, url: str, *, overwrite: bool) -> None:
        self._out, self._overwrite = url.rstrip("/"), overwrite
        above, _, name = self._out.rpartition("/")
        if not name or above.endswith("/"):
            raise UsageError(f"{url}: ranks make a folder in a bucket, with their parts beside it; name one in it")
        self._place = f"{above}/.{name}.ablate-{PARTS}"

    @property
    def place(self) -> Path | str:
        return self._place

    def check(self, checkpoint: Checkpoint) -> None:
        from ablate_shards.surgery.hub.objects import check_in_store

        check_in_store(checkpoint, self._out, overwrite=self._overwrite)

    def complete(self) -> Iterator[Files]:
        from ablate_shards.surgery.hub.objects import complete_in_store

        return map(open_files, complete_in_store(self._place))

    def perform(
        self, rank: WorkerRank, checkpoint: Checkpoint, part: Operation[Any, Any], run: RunOptions, progress: Progress
    ) -> dict[str, Any]:
        from ablate_shards.surgery.hub.objects import perform_in_store

        return perform_in_store(checkpoint, part, f"{self._place}/{rank.folder}", run, progress)

    def are_joined(self, parts: Sequence[EditedPart]) -> bool:
        from ablate_shards.surgery.hub.objects import is_joined_in_store

        return is_joined_in_store(parts, self._place, self._out)

    def join(self, joined: Joined, progress: Progress) -> None:
        from ablate_shards.surgery.hub.objects import join_in_store

        join_in_store(joined, self._place, self._out, overwrite=self._overwrite, progress=progress)

    def remove(self, name: str) -> None:
        from ablate_shards.surgery.hub.objects import remove_from_store

        remove_from_store(f"{self._place}/{name}")


class _PartsOnHub:
    def __init__(self, repo: str, *, overwrite: bool, private: bool) -> None:
        self._repo, self._overwrite, self._private = repo, overwrite, private

    @property
    def place(self) -> Path | str:
        from ablate_shards.surgery.hub.branch import BRANCH

        return f"{self._repo}@{BRANCH}"

    def check(self, checkpoint: Checkpoint) -> None:
        from ablate_shards.surgery.hub.branch import open_branch
        from ablate_shards.surgery.hub.push import PushOptions

        del checkpoint
        open_branch(self._repo, PushOptions(private=self._private), overwrite=self._overwrite)

    def complete(self) -> Iterator[Files]:
        from ablate_shards.surgery.hub.branch import complete_on_branch

        return complete_on_branch(self._repo)

    def perform(
        self, rank: WorkerRank, checkpoint: Checkpoint, part: Operation[Any, Any], run: RunOptions, progress: Progress
    ) -> dict[str, Any]:
        from ablate_shards.surgery.hub.branch import perform_part_on_hub

        return perform_part_on_hub(checkpoint, part, self._repo, rank, run, progress)

    def are_joined(self, parts: Sequence[EditedPart]) -> bool:
        """Returns False: they are removed in one step."""
        return False

    def join(self, joined: Joined, progress: Progress) -> None:
        from ablate_shards.surgery.hub.branch import join_on_hub

        join_on_hub(joined, self._repo, overwrite=self._overwrite, progress=progress)

    def remove(self, name: str) -> None:
        from ablate_shards.surgery.hub.branch import delete_branch, remove_from_branch

        if name:
            remove_from_branch(self._repo, name)
        else:
            delete_branch(self._repo)


def _parts_of(out: OutFolder | Path | str, *, overwrite: bool, private: bool = False) -> _Parts:
    if isinstance(out, OutFolder):
        return _PartsInFolder(out)
    if (repo := hub_repository(out)) is not None:
        return _PartsOnHub(repo, overwrite=overwrite, private=private)
    return _PartsInStore(str(out), overwrite=overwrite)
