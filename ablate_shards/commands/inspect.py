"""``inspect``: shows what a checkpoint holds."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablate_shards.commands.options import PATH, SOURCE, as_json_flag, debug_flag, print_json, recipe_flag

if TYPE_CHECKING:
    from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint

__all__ = ["inspect"]


@click.command()
@click.argument("source", type=SOURCE)
@recipe_flag
@click.option(
    "--derive",
    is_flag=True,
    help="Find the writers by intervention on a tiny random twin of the architecture, and print them as the lines of a "
    "recipe.",
)
@click.option("--save", type=PATH, help="Recipe to write what --derive finds to.")
@as_json_flag
@debug_flag
def inspect(source: Path | str, *, recipe: Any, derive: bool, save: Path | None, as_json: bool) -> None:
    """Show the tensors of SOURCE, the writers found in it, and what is left out and why.

    Of a folder that holds an adapter it shows what that would change, by layer.
    """
    from ablate_shards.errors import ArchitectureError, UsageError
    from ablate_shards.surgery.anatomy.architecture import dissect
    from ablate_shards.surgery.checkpoint.stores import open_source
    from ablate_shards.terminal import results as screen

    if save is not None and not derive:
        raise UsageError("--save writes what --derive finds; give both")
    if not derive and isinstance(source, Path) and _show_adapter(source, as_json=as_json):
        return
    checkpoint = open_source(source)
    if derive:
        _derive(checkpoint, save, as_json=as_json)
        return
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


def _show_adapter(folder: Path, *, as_json: bool) -> bool:
    """Shows an adapter, and tells whether the folder holds one."""
    from ablate_shards.surgery.merge.adapter import holds_adapter, read_adapter
    from ablate_shards.terminal.adapters import adapter_inspection, print_adapter_inspection

    if not holds_adapter(folder):
        return False
    adapter = read_adapter(folder)
    if as_json:
        print_json(adapter_inspection(adapter))
    else:
        print_adapter_inspection(adapter)
    return True


def _derive(checkpoint: "Checkpoint", save: Path | None, *, as_json: bool) -> None:
    """Prints the lines for a checkpoint's architecture, or says what they leave."""
    from ablate_shards.errors import ArchitectureError, UsageError
    from ablate_shards.surgery.derive import derive_checkpoint, leaks_of, recipe_lines
    from ablate_shards.surgery.machine.files import write_whole

    if save is not None and save.exists():
        raise UsageError(f"{save}: exists already; name another file, or remove it")
    found = derive_checkpoint(checkpoint)
    lines = recipe_lines(found.targets)
    if as_json:
        targets = [dataclasses.asdict(target) for target in found.targets]
        print_json({"targets": targets, "complete": found.complete, "left": found.left, "leaks": leaks_of(found)})
    elif save is None or not found.complete:
        click.echo(lines, nl=False)
    if not found.complete:
        what = "" if found.targets else "no tensor was found that writes; "
        raise ArchitectureError(f"{what}no complete description was found: {'; '.join(leaks_of(found))}")
    if save is not None:
        write_whole(save, [lines.encode()])
        click.echo(f"{save}: {len(found.targets)} kinds of writers", err=True)
