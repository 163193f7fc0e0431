"""``directions``: computes directions from a dump."""

from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import PATH, as_json_flag, debug_flag, estimation, print_json, quiet_flag
from ablate_shards.errors import UsageError

__all__ = ["directions"]


@click.command()
@click.argument("dump", type=PATH, nargs=-1, required=True)
@click.argument("file", type=PATH)
@estimation
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@as_json_flag
@quiet_flag
@debug_flag
def directions(
    dump: tuple[Path, ...],
    file: Path,
    *,
    estimator: Any,
    rank: int,
    winsorize: float | None,
    without: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute directions from the activation DUMP, write them to FILE and show their scores.

    Several dumps of one model, such as one per kind of pairs, are compared: which separates best, and
    how far their directions agree. FILE gets the directions of the best.
    """
    from ablate_shards.surgery.directions.activations import open_activations
    from ablate_shards.surgery.directions.compare import compare_directions
    from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
    from ablate_shards.surgery.directions.formats import write_directions
    from ablate_shards.surgery.directions.without import read_without
    from ablate_shards.terminal.progress import show_progress

    _check_file(file, dump, without, overwrite=overwrite)
    options = EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize)
    dumps = [open_activations(path) for path in dump]
    comparison = None
    progress = show_progress(quiet=quiet or as_json)
    with progress:
        if len(dumps) == 1:
            other = read_without(without, dumps[0])
            found = compute_directions(dumps[0], options, without=other, progress=progress.count)
        else:
            comparison = compare_directions(dumps, options, without=without, progress=progress.count)
            found = comparison.directions
    write_directions(found, file)
    if as_json:
        from ablate_shards.terminal.results import scores

        print_json(scores(found, comparison))
    elif not quiet:
        from ablate_shards.terminal.results import print_comparison, print_scores

        if comparison is not None:
            print_comparison(comparison)
        print_scores(found, file)


def _check_file(file: Path, dumps: tuple[Path, ...], without: tuple[Path, ...], *, overwrite: bool) -> None:
    """Refuses a FILE that cannot be written, or that is read."""
    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: directions are written as safetensors; name a file ending in .safetensors")
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise UsageError(f"{file}: expected a file in a folder that exists; make the folder first, or name another")
    if not file.exists():
        return
    if not overwrite:
        raise UsageError(f"{file}: already exists; --overwrite replaces it")
    parts = {part for dump in dumps for part in (dump.resolve(), *dump.resolve().glob("*.safetensors"))}
    if file.resolve() in parts:
        raise UsageError(f"{file}: already exists and belongs to the dump; name another file")
    if file.resolve() in {path.resolve() for path in without}:
        raise UsageError(f"{file}: is read by --without; name another file")
