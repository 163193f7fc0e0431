"""``finetune``: trains a LoRA adapter on instructions."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    as_json_flag,
    debug_flag,
    device_flag,
    parsed,
    print_json,
    quiet_flag,
)
from ablate_shards.terminal.trainings import print_training

__all__ = ["finetune"]


def _parse_targets(text: str) -> Any:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise ValueError(f"expected auto, or names such as q,k,v,o, found {text!r}")
    return "auto" if names == ("auto",) else names


@click.command()
@click.argument("model", type=PATH)
@click.argument("adapter", type=PATH)
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Instructions and responses, as JSON Lines.")
@click.option("--rank", type=int, default=16, show_default=True, help="Rank of each adapter.")
@click.option(
    "--alpha", type=float, default=32, show_default=True, help="Its scale: the change is alpha / rank times B A."
)
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Share of an adapter's inputs to drop.")
@click.option(
    "--targets",
    metavar="NAMES",
    callback=parsed(_parse_targets),
    default="q,k,v,o,gate,up,down",
    show_default=True,
    help="Linear modules to adapt, with or without _proj; auto: all in the decoder layers but routers.",
)
@click.option("--epochs", type=int, default=3, show_default=True, help="Times that each sample is seen.")
@click.option("--learning-rate", type=float, default=2e-4, show_default=True, help="At the start; falls linearly to 0.")
@click.option("--length", type=int, default=512, show_default=True, help="Most tokens of a sample; the rest is cut.")
@click.option("--batch", type=int, default=2, show_default=True, help="Samples computed at a time.")
@click.option("--accumulate", type=int, default=4, show_default=True, help="Batches per step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of split, order and first values.")
@click.option(
    "--evaluation-share",
    type=float,
    default=0.1,
    show_default=True,
    help="Share of each kind of sample to hold out and evaluate on.",
)
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank) instead: rank-stabilised LoRA.")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Compute activations twice to keep fewer of them.  [default: on a GPU]",
)
@click.option(
    "--keep",
    type=PATH,
    metavar="FILE",
    help="Prompts whose answers are to stay: the model answers them first, and is held to that.",
)
@click.option("--keep-weight", type=float, default=2.0, show_default=True, help="Weight of staying with them.")
@click.option("--keep-length", type=int, default=96, show_default=True, help="Most tokens of such an answer.")
@click.option(
    "--beta",
    type=float,
    default=2.0,
    show_default=True,
    help="How sharply a response is told from the rejected one, where a sample has one.",
)
@click.option(
    "--prefer-weight",
    type=float,
    default=0.1,
    show_default=True,
    help="Weight of that beside the response's likelihood; 0 leaves rejected ones out.",
)
@click.option(
    "--patience",
    type=int,
    default=0,
    show_default=True,
    help="End after so many epochs without a smaller held-out loss, and keep the best; 0: never.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in; auto: bfloat16 where the device has instructions for it, else float32.",
)
@device_flag
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an ADAPTER that an earlier run made.")
@as_json_flag
@quiet_flag
@debug_flag
def finetune(
    model: Path, adapter: Path, *, data: Path, keep: Path | None, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Train a LoRA adapter for MODEL on the responses in FILE and write it to ADAPTER.

    MODEL is a checkpoint folder with tokenizer and chat template; ADAPTER is a peft folder that
    appears only when complete.
    """
    from ablate_shards.surgery.finetune.lora import FinetuneOptions
    from ablate_shards.surgery.finetune.lora import finetune as train
    from ablate_shards.surgery.model.samples import load_instructions, load_questions
    from ablate_shards.terminal.progress import show_progress

    options = FinetuneOptions(**settings)
    progress = show_progress(quiet=quiet or as_json, counted="steps")
    samples = load_instructions(data)
    kept = () if keep is None else load_questions(keep)
    with progress:
        done = train(model, adapter, samples, options, progress, keep=kept)
    if as_json:
        print_json(dataclasses.asdict(done) | {"adapter": str(done.adapter)})
    elif not quiet:
        print_training(done, model)
