"""Carries operations out to wherever OUT is: a folder, a repository on the Hub, or a folder of an object store."""

from pathlib import Path
from typing import Any, TypeGuard

from ablate_shards.errors import UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.stores import hub_repository
from ablate_shards.surgery.edit.execute import ExecuteOptions, Operation, perform
from ablate_shards.surgery.machine.progress import Progress

__all__ = ["carry_out", "check_options", "is_folder"]


def is_folder(out: Path | str) -> TypeGuard[Path]:
    """Returns whether an OUT is a folder on this machine.

    Raises:
        UsageError: It begins as a repository's name does, and is none.
    """
    return isinstance(out, Path) and hub_repository(out) is None


def check_options(checkpoint: Checkpoint, out: Path | str, *, link: bool, cache: bool, private: bool) -> None:
    """Refuses options that say nothing about such a SOURCE or such an OUT.

    Raises:
        UsageError: One does.
    """
    if link and not cache and checkpoint.remote is not None:
        raise UsageError(f"--link: {checkpoint.name} is not on this machine; add --cache, or leave --link out")
    if (link or cache) and not is_folder(out):
        raise UsageError(f"{out}: --link and --cache are for an OUT that is a folder on this machine; leave them out")
    repo, origin = hub_repository(out), checkpoint.origin
    if repo is not None and origin is not None and repo.lower() == origin[0].lower():
        raise UsageError(f"{out}: OUT and SOURCE may not be the same repository; name another one")
    if private and repo is None:
        raise UsageError(f"--private: {out} is no repository; name one, such as hub:me/model-edited")


def carry_out(
    checkpoint: Checkpoint,
    operation: Operation[Any, Any],
    out: Path | str,
    run: ExecuteOptions,
    progress: Progress,
    *,
    private: bool,
) -> tuple[dict[str, Any], str | None]:
    """Carries out an operation; OUT is complete or not there at all.

    Args:
        checkpoint: The source.
        operation: What to do.
        out: A folder, ``hub:org/name``, or a URL that fsspec writes.
        run: How to run.
        progress: Receives how far the run has come.
        private: Make a new repository private.

    Returns:
        The result of each edit, by tensor, and the commit's URL, where OUT is a repository.

    Raises:
        ExecuteError: OUT is in the way, the disk is too small, or a tensor cannot be edited.
        HubError: The repository or the store may not be written.
        Interrupted: Ctrl-C or SIGTERM; what is complete can be gone on with.
    """
    # The ways out of this machine are imported where they are taken.
    if isinstance(out, str):
        from ablate_shards.surgery.hub.objects import perform_in_store

        return perform_in_store(checkpoint, operation, out, run, progress), None
    if (repo := hub_repository(out)) is not None:
        from ablate_shards.surgery.hub.push import PushOptions
        from ablate_shards.surgery.hub.transfer import perform_on_hub

        return perform_on_hub(checkpoint, operation, repo, PushOptions(private=private), run, progress)
    return perform(checkpoint, operation, out, run, progress), None
