"""``merge``: merges a LoRA adapter into a checkpoint."""

import dataclasses
import sys
from pathlib import Path

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    cache_flag,
    debug_flag,
    print_json,
    private_flag,
    quiet_flag,
    resources,
    sync_flag,
)
from ablate_shards.commands.startup import one_blas_thread

__all__ = ["merge"]


@click.command()
@click.argument("model", type=SOURCE)
@click.argument("adapter", type=PATH)
@click.argument("out", type=SOURCE)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Multiply what the adapter adds by this, besides its own scale; parameters that it replaces are not scaled.",
)
@resources
@cache_flag
@private_flag
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
    out: Path | str,
    *,
    scale: float,
    device: str,
    memory: int,
    jobs: int | None,
    cache: bool,
    private: bool,
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
    Hub id org/name[@revision] or a URL that fsspec reads. ADAPTER is a folder that peft saved. OUT
    is a folder that appears only when complete, a repository hub:org/name that gets one commit, or
    a folder of an object store such as s3://bucket/name. No model is built: what the adapter does
    not name stays as it is, byte for byte.
    """
    one_blas_thread()
    from ablate_shards.surgery.checkpoint.hub_store import quieten_hub
    from ablate_shards.surgery.checkpoint.stores import cached, hub_repository, open_source
    from ablate_shards.surgery.edit.execute import ExecuteOptions
    from ablate_shards.surgery.hub.outputs import carry_out, check_options, is_folder
    from ablate_shards.surgery.merge.adapter import read_adapter
    from ablate_shards.surgery.merge.merge import Merged, check_merge_out, merging
    from ablate_shards.surgery.merge.plan import plan_merge
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json)
    run = ExecuteOptions(
        device=device, memory=memory, jobs=jobs, resume=resume, overwrite=overwrite, link=link, sync=sync
    )
    checkpoint = open_source(model)
    check_options(checkpoint, out, link=link, cache=cache, private=private)
    if checkpoint.remote is not None and checkpoint.remote.revision:
        progress.note(f"{checkpoint.name} is commit {checkpoint.remote.revision}")
    if cache or hub_repository(out) is not None:
        quieten_hub(bars=quiet or as_json or not sys.stderr.isatty())
    if not dry_run:
        if is_folder(out):
            check_merge_out(checkpoint, adapter, out, overwrite=overwrite)
        if cache:
            checkpoint = cached(checkpoint)
    read = read_adapter(adapter)
    plan = plan_merge(checkpoint, read, scale)
    for note in plan.notes:
        progress.note(note)
    if dry_run:
        if as_json:
            print_json(plan.as_dict())
        elif not quiet:
            from ablate_shards.terminal.results import print_merge_plan

            print_merge_plan(checkpoint, plan)
        return
    with progress:
        operation = merging(checkpoint, read, plan)
        results, url = carry_out(checkpoint, operation, out, run, progress, private=private)
    if as_json:
        tensors = {name: dataclasses.asdict(result) for name, result in results.items()}
        print_json({"out": url or str(out), "tensors": tensors})
    elif not quiet:
        from ablate_shards.terminal.results import print_merge

        print_merge(checkpoint, Merged(plan, results), adapter, out, url)
