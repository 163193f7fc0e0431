"""``directions``: computes directions from a dump."""

from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import PATH, as_json_flag, debug_flag, estimation, print_json, quiet_flag
from ablate_shards.errors import UsageError

__all__ = ["directions"]


@click.command()
@click.argument("dump", type=PATH)
@click.argument("file", type=PATH)
@estimation
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@as_json_flag
@quiet_flag
@debug_flag
def directions(
    dump: Path,
    file: Path,
    *,
    estimator: Any,
    rank: int,
    winsorize: float | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute directions from the activation DUMP, write them to FILE and show their scores."""
    from ablate_shards.surgery.directions.activations import open_activations
    from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
    from ablate_shards.surgery.directions.formats import write_directions
    from ablate_shards.terminal.progress import show_progress

    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: directions are written as safetensors; name a file ending in .safetensors")
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise UsageError(f"{file}: expected a file in a folder that exists; make the folder first, or name another")
    if file.exists() and (not overwrite or file.resolve() in (dump.resolve(), *dump.resolve().glob("*.safetensors"))):
        way_out = "name another file" if overwrite else "--overwrite replaces it"
        raise UsageError(f"{file}: already exists{' and belongs to the dump' if overwrite else ''}; {way_out}")
    progress = show_progress(quiet=quiet or as_json)
    with progress:
        found = compute_directions(
            open_activations(dump),
            EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize),
            progress=progress.count,
        )
    write_directions(found, file)
    if as_json:
        from ablate_shards.terminal.results import scores

        print_json(scores(found))
    elif not quiet:
        from ablate_shards.terminal.results import print_scores

        print_scores(found, file)
