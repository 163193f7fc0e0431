"""Takes an operation to wherever OUT is: a folder, a repository on the Hub, or a folder of an object store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ablate_shards.errors import UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, files_of
from ablate_shards.surgery.checkpoint.stores import cached, hub_repository, open_source
from ablate_shards.surgery.edit.folder import perform_in_folder
from ablate_shards.surgery.edit.operation import Operation, RunOptions
from ablate_shards.surgery.machine.devices import find_device
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.staging import OutFolder, check_out

if TYPE_CHECKING:
    from ablate_shards.surgery.extract.plan import AdapterPlan
    from ablate_shards.surgery.extract.receipt import Describe, ModuleResult

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A source that has been opened, and an output that may be written.

    Attributes:
        checkpoint: The source.
        out: A folder, ``hub:org/name``, or a URL that fsspec writes.
        run: How to run.
        cache: Whether a source on the Hub is fetched to the ordinary cache first.
        private: Whether a new repository is made private.
    """

    checkpoint: Checkpoint
    out: OutFolder | Path | str
    run: RunOptions
    cache: bool = False
    private: bool = False

    def source(self) -> Checkpoint:
        """Returns the source as it is read: fetched first, where that was asked for."""
        return cached(self.checkpoint) if self.cache else self.checkpoint

    def perform(self, operation: Operation[Any, Any], progress: Progress) -> tuple[dict[str, Any], str | None]:
        """Performs an operation on the source; the output is complete or not there at all.

        Args:
            operation: What to do.
            progress: Receives how far the run has come.

        Returns:
            The result of each edit, by tensor, and the commit's URL, where the output is a repository.

        Raises:
            ExecuteError: The output is in the way, the disk is too small, or a tensor cannot be edited.
            HubError: The source cannot be fetched, or the repository or the store not be written.
            Interrupted: Ctrl-C or SIGTERM; what is complete is kept for a run that resumes.
            UsageError: The source is to be cached and is not from the Hub.
        """
        checkpoint = self.source()
        # What writes elsewhere than to this machine, or not alone, is imported where it is needed.
        if self.run.rank is not None:
            from ablate_shards.surgery.hub.ranks import perform_part

            return perform_part(
                checkpoint, operation, self.out, self.run, self.run.rank, progress, private=self.private
            ), None
        if isinstance(self.out, OutFolder):
            return perform_in_folder(checkpoint, operation, self.out, self.run, progress), None
        if (repo := hub_repository(self.out)) is not None:
            from ablate_shards.surgery.hub.push import PushOptions
            from ablate_shards.surgery.hub.transfer import perform_on_hub

            return perform_on_hub(checkpoint, operation, repo, PushOptions(private=self.private), self.run, progress)
        from ablate_shards.surgery.hub.objects import perform_in_store

        return perform_in_store(checkpoint, operation, str(self.out), self.run, progress), None

    def make_adapter(
        self, plan: "AdapterPlan", describe: "Describe", progress: Progress
    ) -> "tuple[dict[str, ModuleResult], str | None]":
        """Makes an adapter of the source; see :func:`ablate_shards.surgery.hub.adapters.make_adapter`."""
        from ablate_shards.surgery.hub.adapters import make_adapter

        return make_adapter(self.source(), plan, describe, self.out, self.run, progress, private=self.private)


def prepare(
    source: Path | str,
    out: Path | str,
    run: RunOptions,
    *,
    inputs: Sequence[Path] = (),
    cache: bool = False,
    private: bool = False,
    dry_run: bool = False,
) -> Prepared:
    """Opens a source, and checks all that can be checked before anything but its headers is read.

    Args:
        source: A ``.safetensors`` file, a folder, a Hub id, or a URL that fsspec reads.
        out: A folder, ``hub:org/name``, or a URL that fsspec writes.
        run: How to run.
        inputs: What else is read, which a folder that is replaced may not hold.
        cache: Whether a source on the Hub is fetched to the ordinary cache first.
        private: Whether a new repository is made private.
        dry_run: Whether nothing will be written, so that the output may be in the way.

    Raises:
        CheckpointError: The source is missing or malformed.
        ExecuteError: The output exists and may not be replaced, or its parent does not exist.
        HubError: The source cannot be read.
        UsageError: There is no such device, the output would replace what is read, or an option says nothing about
            such a source or output.
    """
    checkpoint = open_source(source)
    _check_options(checkpoint, out, link=run.link, cache=cache, private=private)
    # Looking for the best device may import torch, which can wait until the copying has begun.
    if run.device != "auto":
        find_device(run.device)
    place: OutFolder | Path | str = out
    if _is_folder(out) and not dry_run:
        place = check_out(checkpoint.path, files_of(checkpoint), out, overwrite=run.overwrite, inputs=inputs)
    return Prepared(checkpoint, place, run, cache=cache, private=private)


def _is_folder(out: Path | str) -> TypeGuard[Path]:
    """Returns whether an output is a folder on this machine.

    Raises:
        UsageError: It begins as a repository's name does, and is none.
    """
    return isinstance(out, Path) and hub_repository(out) is None


def _check_options(checkpoint: Checkpoint, out: Path | str, *, link: bool, cache: bool, private: bool) -> None:
    """Refuses options that say nothing about such a source or such an output.

    Raises:
        UsageError: One does.
    """
    if link and not cache and checkpoint.remote is not None:
        raise UsageError(f"--link: {checkpoint.name} is not on this machine; add --cache, or leave --link out")
    if (link or cache) and not _is_folder(out):
        raise UsageError(f"{out}: --link and --cache are for an OUT that is a folder on this machine; leave them out")
    repo, origin = hub_repository(out), checkpoint.origin
    if repo is not None and origin is not None and repo.lower() == origin[0].lower():
        raise UsageError(f"{out}: OUT and SOURCE may not be the same repository; name another one")
    if private and repo is None:
        raise UsageError(f"--private: {out} is no repository; name one, such as hub:me/model-edited")
