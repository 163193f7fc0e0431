"""``merge``: merges a LoRA adapter into a checkpoint."""

from pathlib import Path

import click

from ablate_shards.commands.options import PATH, SOURCE, print_json
from ablate_shards.commands.output import OutputOptions, made, output_options
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
@click.option(
    "--dequantise",
    is_flag=True,
    help="Write every quantised weight of MODEL in bfloat16 first; an adapter cannot be added to codes.",
)
@output_options
def merge(
    model: Path | str, adapter: Path, out: Path | str, *, scale: float, dequantise: bool, output: OutputOptions
) -> None:
    """Add a LoRA adapter to the weights of MODEL and write the merged checkpoint to OUT.

    MODEL is the checkpoint that ADAPTER was trained on: a .safetensors file, a checkpoint folder, a
    Hub id org/name[@revision] or a URL that fsspec reads. ADAPTER is a folder that peft saved. OUT
    is a folder that appears only when complete, a repository hub:org/name that gets one commit, or
    a folder of an object store such as s3://bucket/name. No model is built: what the adapter does
    not name stays as it is, byte for byte.
    """
    one_blas_thread()
    from ablate_shards.surgery.dequantise.dequantisation import plan_dequantisation
    from ablate_shards.surgery.merge.adapter import read_adapter
    from ablate_shards.surgery.merge.merge import merging
    from ablate_shards.surgery.merge.plan import plan_merge

    progress = output.show_progress()
    prepared = output.prepare(model, out, (adapter,), progress)
    checkpoint = prepared.checkpoint
    read = read_adapter(adapter)
    dequantisation = plan_dequantisation(checkpoint) if dequantise else None
    if dequantisation is not None:
        checkpoint = dequantisation.applied(checkpoint)
    plan = plan_merge(checkpoint, read, scale)
    for note in plan.notes:
        progress.note(note)
    if output.dry_run:
        if output.as_json:
            print_json(plan.as_dict())
        elif not output.quiet:
            from ablate_shards.terminal.results import print_merge_plan

            print_merge_plan(checkpoint, plan, dequantisation)
        return
    with progress:
        results, url = prepared.perform(merging(read, plan, dequantisation), progress)
    if (worker := prepared.run.rank) is not None:
        output.print_part(worker, out, results)
    elif output.as_json:
        print_json(made(out, url, results))
    elif not output.quiet:
        from ablate_shards.terminal.results import print_merge

        print_merge(checkpoint, plan, results, adapter, out, url, dequantisation)
