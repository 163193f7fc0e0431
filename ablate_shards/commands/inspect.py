"""``inspect``: shows what a checkpoint holds."""

from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import SOURCE, as_json_flag, debug_flag, print_json, recipe_flag

__all__ = ["inspect"]


@click.command()
@click.argument("source", type=SOURCE)
@recipe_flag
@as_json_flag
@debug_flag
def inspect(source: Path | str, *, recipe: Any, as_json: bool) -> None:
    """Show the tensors of SOURCE, the writers found in it, and what is left out and why."""
    from ablate_shards.errors import ArchitectureError
    from ablate_shards.surgery.anatomy.architecture import dissect
    from ablate_shards.surgery.checkpoint.stores import open_source
    from ablate_shards.terminal import results as screen

    checkpoint = open_source(source)
    unknown = None
    anatomy = None
    try:
        anatomy = dissect(checkpoint.tensors, checkpoint.config, recipe.targets if recipe else ())
    except ArchitectureError as error:
        unknown = error
    if as_json:
        print_json(screen.inspection(checkpoint, anatomy))
    else:
        screen.print_inspection(checkpoint, anatomy)
    if unknown is not None:
        raise unknown
