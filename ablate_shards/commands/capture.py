"""``capture``: runs a model on pairs of prompts and keeps what its layers compute."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    COMMAND,
    PATH,
    as_json_flag,
    debug_flag,
    device_flag,
    engine_flag,
    parse_memory,
    parsed,
    print_json,
    print_rank,
    quiet_flag,
    rank_flags,
    rank_given,
    rank_record,
    ray_workers_flag,
)

__all__ = ["capture"]


@click.command()
@click.argument("model", type=PATH)
@click.argument("dump", type=PATH)
@click.option("--pairs", type=PATH, required=True, metavar="FILE", help="Pairs of prompts, as JSON Lines.")
@click.option(
    "--position",
    type=click.Choice(["auto", "last", "mean"]),
    default="auto",
    show_default=True,
    help="Last token of the response (of the prompt, where there is none), or mean over the response; auto: mean "
    "where pairs have responses.",
)
@click.option("--plain", is_flag=True, help="Feed the prompts as they are, without the chat template.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts computed at a time.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype to compute in; auto: the one the weights are stored in.",
)
@click.option(
    "--offload",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    show_default=True,
    help="Stream the weights from the shards, a layer at a time; auto: when they do not fit.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=parsed(parse_memory),
    default=None,
    help="Most that the weights may take before --offload auto streams them.  [default: most of what is free]",
)
@device_flag
@engine_flag
@ray_workers_flag
@rank_flags
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace DUMP if it exists.")
@as_json_flag
@quiet_flag
@debug_flag
def capture(
    model: Path,
    dump: Path,
    *,
    pairs: Path,
    worker_rank: int | None,
    world_size: int | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Run MODEL on pairs of prompts and write the residual stream after every layer to DUMP.

    MODEL is a checkpoint folder with its tokenizer; DUMP is a .safetensors file, or a folder of one
    shard per layer. It appears only when complete. With --worker-rank and --world-size, a process
    captures its share of the prompts, and `finish DUMP` joins them.
    """
    from ablate_shards.surgery.capture.forward import CaptureOptions
    from ablate_shards.surgery.capture.forward import capture as capture_stream
    from ablate_shards.surgery.model.samples import load_pairs
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json)
    prompts = load_pairs(pairs)
    rank = rank_given(worker_rank, world_size)
    options = CaptureOptions(**settings, rank=rank, command=click.get_current_context().meta.get(COMMAND, ()))
    with progress:
        captured = capture_stream(model, dump, prompts, options, progress)
    if as_json:
        print_json({**dataclasses.asdict(captured), "dump": str(captured.dump), **rank_record(rank)})
    elif rank is not None and not quiet:
        print_rank(rank, dump)
    elif not quiet:
        where = "last token" if captured.position == "last" else "mean over the response"
        click.echo(
            f"{captured.pairs} pairs, {captured.layers} layers, hidden size {captured.hidden_size}, {where}, "
            f"computed in {captured.dtype}"
        )
        click.echo(f"written to {captured.dump}")
        command = ["ablate-shards", "directions", str(captured.dump), "directions.safetensors"]
        click.echo(f"compute directions with: {shlex.join(command)}")
