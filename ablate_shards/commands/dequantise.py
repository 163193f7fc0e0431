"""``dequantise``: turns the codes of a quantised checkpoint into bfloat16."""

from pathlib import Path

import click

from ablate_shards.commands.options import SOURCE, print_json
from ablate_shards.commands.output import OutputOptions, made, output_options
from ablate_shards.commands.startup import one_blas_thread

__all__ = ["dequantise"]


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=SOURCE)
@output_options
def dequantise(source: Path | str, out: Path | str, *, output: OutputOptions) -> None:
    """Write SOURCE to OUT with every quantised weight in bfloat16, as models are that never were quantised.

    SOURCE is a checkpoint folder, a Hub id org/name[@revision] or a URL that fsspec reads; OUT is a
    folder that appears only when complete, a repository hub:org/name that gets one commit, or a
    folder of an object store such as s3://bucket/name. A weight becomes the bfloat16 nearest to what
    its codes stand for. Scales and the rest of the format go, and the configuration no longer says
    that the model is quantised; every other byte is the source's.
    """
    one_blas_thread()
    from ablate_shards.surgery.dequantise.dequantisation import plan_dequantisation
    from ablate_shards.surgery.edit.dequantise import dequantising

    progress = output.show_progress()
    prepared = output.prepare(source, out, (), progress)
    checkpoint = prepared.checkpoint
    dequantisation = plan_dequantisation(checkpoint)
    if output.dry_run:
        if output.as_json:
            print_json(dequantisation.as_dict())
        elif not output.quiet:
            from ablate_shards.terminal.results import print_dequantisation_plan

            print_dequantisation_plan(checkpoint, dequantisation)
        return
    with progress:
        results, url = prepared.perform(dequantising(dequantisation), progress)
    if (worker := prepared.run.rank) is not None:
        output.print_part(worker, out, results)
    elif output.as_json:
        print_json({**made(out, url, {}), **dequantisation.as_dict()})
    elif not output.quiet:
        from ablate_shards.terminal.results import print_dequantisation

        print_dequantisation(checkpoint, dequantisation, out, url)
