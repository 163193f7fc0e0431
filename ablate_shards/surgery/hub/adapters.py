"""Makes an adapter wherever OUT is: in a folder, or in a repository on the Hub, where it comes with a card."""

import shlex
import shutil
import tempfile
from pathlib import Path

from ablate_shards.errors import HubError, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.stores import hub_repository
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.extract.extraction import extract_adapter
from ablate_shards.surgery.extract.plan import AdapterPlan
from ablate_shards.surgery.extract.receipt import Describe, ModuleResult
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.staging import OutFolder

__all__ = ["make_adapter"]


def make_adapter(
    checkpoint: Checkpoint,
    plan: AdapterPlan,
    describe: Describe,
    out: OutFolder | Path | str,
    run: RunOptions,
    progress: Progress,
    *,
    private: bool = False,
) -> tuple[dict[str, ModuleResult], str | None]:
    """Makes an adapter; OUT appears complete or not at all.

    For a repository it is made in a hidden folder of the working folder, which is kept where it cannot be sent.

    Args:
        checkpoint: The source.
        plan: What the adapter holds.
        describe: Returns the text of the receipt.
        out: A folder, or ``hub:org/name``.
        run: How to run; ``overwrite`` replaces an adapter that the repository has.
        progress: Receives how far the run has come.
        private: Whether a new repository is made private.

    Returns:
        What was measured of each module, by its path, and the commit's address where there is one.

    Raises:
        ExecuteError: A matrix cannot be edited, the source changed meanwhile, or OUT is in the way.
        HubError: The repository may not be written, or holds what may not be replaced.
        Interrupted: Ctrl-C or SIGTERM; nothing is left of the run.
        UsageError: OUT is neither a folder nor a repository.
    """
    if isinstance(out, OutFolder):
        return extract_adapter(checkpoint, plan, describe, out, run, progress), None
    if (repo := hub_repository(out)) is None:
        raise UsageError(f"{out}: expected a folder of this machine, or a repository such as hub:me/adapter")
    # A folder needs nothing of what sends.
    from ablate_shards.surgery.hub.push import PushOptions, check_place_of_adapter, push

    options = PushOptions(private=private)
    check_place_of_adapter(repo, options, overwrite=run.overwrite)
    holder = Path(tempfile.mkdtemp(prefix=f".hub-{repo.replace('/', '--')}-", dir=Path.cwd()))
    made = holder / "adapter"
    try:
        results = extract_adapter(checkpoint, plan, describe, OutFolder(made, overwrite=False), run, progress)
        url = push(made, repo, options, run, progress).url
    except BaseException as error:
        if isinstance(error, HubError) and made.is_dir():
            again = f"ablate-shards push {shlex.quote(str(made))} {repo}"
            raise HubError(f"{error}; the adapter is kept, send it with `{again}`") from error
        shutil.rmtree(holder, ignore_errors=True)
        raise
    shutil.rmtree(holder)
    return results, url
