"""``narrow``: an edit as an adapter that acts on contested inputs and spares others."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    as_json_flag,
    biproject_flag,
    coefficient_flag,
    components_flag,
    debug_flag,
    device_flag,
    dtype_flag,
    layers_flag,
    print_json,
    quiet_flag,
    source_layer_flag,
)

__all__ = ["narrow"]


@click.command()
@click.argument("model", type=PATH)
@click.argument("adapter", type=PATH)
@click.option("-d", "--directions", type=PATH, required=True, help="Directions file.")
@click.option(
    "--pairs", type=PATH, required=True, metavar="FILE", help="Prompt pairs, whose positive sides are contested."
)
@click.option(
    "--keep",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Prompts whose answers are to stay, as JSON Lines: some of every kind, a hundred or more.",
)
@layers_flag
@components_flag
@coefficient_flag
@biproject_flag
@source_layer_flag
@click.option(
    "--input-rank",
    type=int,
    default=32,
    show_default=True,
    help="Along how many directions of its input each writer is edited.",
)
@click.option(
    "--length", type=int, default=24, show_default=True, help="Most tokens of an answer that the model gives itself."
)
@click.option("--batch", type=int, default=16, show_default=True, help="Prompts computed at a time.")
@dtype_flag
@device_flag
@click.option("--overwrite", is_flag=True, help="Replace an ADAPTER that an earlier run made.")
@as_json_flag
@quiet_flag
@debug_flag
def narrow(
    model: Path,
    adapter: Path,
    *,
    directions: Path,
    pairs: Path,
    keep: Path,
    input_rank: int,
    length: int,
    batch: int,
    dtype: Any,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **which: Any,
) -> None:
    """Make ADAPTER remove a direction from what MODEL makes of contested prompts, and spare others.

    MODEL is a checkpoint folder with tokenizer and chat template; ADAPTER is a peft folder that appears only when
    complete. Nothing is trained: the model answers the prompts, and of what each writer reads, the adapter takes that
    which contested prompts have and those to be kept have not. `merge` writes it into the weights.
    """
    from ablate_shards.surgery.directions.formats import read_directions
    from ablate_shards.surgery.model.samples import load_pairs, load_questions
    from ablate_shards.surgery.narrow.narrowing import NarrowOptions
    from ablate_shards.surgery.narrow.narrowing import narrow as make
    from ablate_shards.surgery.plan.recipe import AblateOptions
    from ablate_shards.terminal.adapters import print_narrowing
    from ablate_shards.terminal.progress import show_progress

    layer = which["source_layer"]
    found = read_directions(directions, layer if isinstance(layer, int) else None)
    progress = show_progress(quiet=quiet or as_json, counted="modules")
    options = NarrowOptions(input_rank, length, batch, dtype, device, overwrite)
    with progress:
        done = make(
            model, adapter, found, load_pairs(pairs), load_questions(keep), AblateOptions(**which), options, progress
        )
    if as_json:
        print_json(dataclasses.asdict(done) | {"adapter": str(done.adapter)})
    elif not quiet:
        print_narrowing(done, model)
