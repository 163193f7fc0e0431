"""Performs an operation into a folder of this machine, which appears when it is complete."""

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, size_of
from ablate_shards.surgery.edit.operation import (
    Operation,
    RunOptions,
    check_unchanged,
    ending_early,
    what_is_kept,
)
from ablate_shards.surgery.edit.shard_writer import ShardWriter
from ablate_shards.surgery.machine.copying import clone
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt, uninterrupted
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import OutFolder, Staging, locked
from ablate_shards.surgery.plan.edits import Edit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["perform_in_folder"]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R", bound="DataclassInstance")


def perform_in_folder(
    checkpoint: Checkpoint, operation: Operation[_E, _R], out: OutFolder, run: RunOptions, progress: Progress
) -> dict[str, _R]:
    """Performs an operation on a checkpoint; OUT appears complete or not at all.

    Args:
        checkpoint: The source, never opened for writing.
        operation: What to do.
        out: The folder to make.
        run: How to run.
        progress: Receives how far the run has come.

    Returns:
        The result of each edit, by tensor.

    Raises:
        ExecuteError: An interrupted run is in the way, the disk is too small, or a tensor cannot be edited.
        Interrupted: Ctrl-C or SIGTERM; the staged state can be resumed.
    """
    amended = operation.amend(checkpoint)
    sizes = {shard.name: shard.size for shard in amended.shards}
    identity = operation.identity_on(checkpoint)
    staging: Staging | None = None

    def discard() -> None:
        if staging is not None and not run.resume:
            staging.discard()

    with sigterm_as_interrupt(), locked(out.path), ending_early(out.path, lambda: what_is_kept(staging), discard):
        staging = Staging.open(out.path, identity, sizes, resume=run.resume, overwrite=out.overwrite, sync=run.sync)
        _check_disk(amended, operation.edits, staging, link=run.link)
        progress.begin(_bytes_to_write(amended, staging))
        with ShardWriter(amended, operation, staging, progress, link=run.link) as writer:
            results, identity = writer.write(run)
        check_unchanged(checkpoint)
        with (staging.folder / operation.receipt_name).open("w", encoding="utf-8", newline="\n") as file:
            file.write(operation.receipt(checkpoint, results, identity))
            file.flush()
            staging.fsync(file.fileno())
        with uninterrupted():
            staging.publish()
    return results


def _bytes_to_write(checkpoint: Checkpoint, staging: Staging) -> int:
    shards = sum(shard.size for shard in checkpoint.shards if shard.name not in staging.done)
    return shards + sum(size_of(checkpoint, name) for name in checkpoint.sidecars)


def _check_disk(checkpoint: Checkpoint, edits: Iterable[Edit], staging: Staging, *, link: bool) -> None:
    reused = sum(path.stat().st_size for path in staging.folder.rglob("*") if path.is_file())
    complete = sum(shard.size for shard in checkpoint.shards if shard.name in staging.done)
    edited = {edit.shard for edit in edits} | checkpoint.amended
    linked = sum(shard.size for shard in checkpoint.shards if link and shard.name not in edited | staging.done.keys())
    needed = _bytes_to_write(checkpoint, staging) - (reused - complete) - linked
    if _shares_blocks(checkpoint, staging):
        apart = staging.done.keys() | checkpoint.amended
        needed = sum(edit.end - edit.start for edit in edits if edit.shard not in apart)
        needed += sum(
            shard.size for shard in checkpoint.shards if shard.name in checkpoint.amended - staging.done.keys()
        )
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise ExecuteError(
            f"{staging.out}: needs {size_text(needed, 5)}, but its disk has {size_text(free, 5)} free; "
            "free some or name a folder on another disk"
        )


def _shares_blocks(checkpoint: Checkpoint, staging: Staging) -> bool:
    """Whether the shards of OUT can share the source's blocks: tried with a file that is then removed."""
    if checkpoint.remote is not None or not checkpoint.shards:
        return False
    path = staging.folder / ".shared"
    with checkpoint.shards[0].path.open("rb") as source, path.open("wb") as target:
        shares = clone(source.fileno(), target.fileno())
    path.unlink()
    return shares
