"""``merge``: merges a LoRA adapter into a checkpoint."""

import dataclasses
from pathlib import Path

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    cache_flag,
    debug_flag,
    print_json,
    quiet_flag,
    resources,
    sync_flag,
)
from ablate_shards.errors import UsageError

__all__ = ["merge"]


@click.command()
@click.argument("model", type=SOURCE)
@click.argument("adapter", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Multiply what the adapter adds by this, beside its own scale; whole parameters it replaces stay whole.",
)
@resources
@cache_flag
@click.option("--link", is_flag=True, help="Hard-link shards without a change; they share their bytes with MODEL.")
@sync_flag
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier run made.")
@as_json_flag
@quiet_flag
@debug_flag
def merge(
    model: Path | str,
    adapter: Path,
    out: Path,
    *,
    scale: float,
    device: str,
    memory: int,
    jobs: int | None,
    cache: bool,
    link: bool,
    sync: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add a LoRA adapter to the weights of MODEL and write the merged checkpoint to OUT.

    MODEL is the checkpoint that ADAPTER was trained on: a .safetensors file, a checkpoint folder, a
    Hub id org/name[@revision] or a URL that fsspec reads. ADAPTER is a folder that peft saved; OUT
    is a folder that appears only when complete. No model is built: what the adapter does not name
    stays as it is, byte for byte.
    """
    from ablate_shards import screen
    from ablate_shards.surgery.adapter import read_adapter
    from ablate_shards.surgery.execute import ExecuteOptions
    from ablate_shards.surgery.merge import MergeOptions, plan_merge
    from ablate_shards.surgery.merge import merge as merge_checkpoint
    from ablate_shards.surgery.stores import cached, open_source

    progress = screen.progress(quiet=quiet or as_json)
    run = ExecuteOptions(
        device=device, memory=memory, jobs=jobs, resume=resume, overwrite=overwrite, link=link, sync=sync
    )
    checkpoint = open_source(model)
    if checkpoint.remote is not None:
        if link and not cache:
            raise UsageError(f"--link: {checkpoint.name} is not on this machine; add --cache, or leave --link out")
        if checkpoint.remote.revision:
            progress.note(f"{checkpoint.name} is commit {checkpoint.remote.revision}")
    if dry_run:
        plan = plan_merge(checkpoint, read_adapter(adapter), scale)
        for note in plan.notes:
            progress.note(note)
        if as_json:
            print_json(plan.as_dict())
        elif not quiet:
            screen.print_merge_plan(checkpoint, plan)
        return
    if cache:
        checkpoint = cached(checkpoint)
    with progress:
        merged = merge_checkpoint(checkpoint, adapter, out, MergeOptions(scale, run), progress)
    if as_json:
        results = {name: dataclasses.asdict(result) for name, result in merged.results.items()}
        print_json({"out": str(out), "tensors": results})
    elif not quiet:
        screen.print_merge(checkpoint, merged, adapter, out)
